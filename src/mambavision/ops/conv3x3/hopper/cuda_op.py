"""The convolution for Hopper GPUs as an operator that PyTorch knows, and where it serves."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache, partial

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch
from mambavision.ops.conv3x3.hopper.plan import ACTIVATIONS, CHUNK, CLUSTER, UNIT, definitions, plan
from mambavision.ops.conv3x3.layout import empty_map, laid_out

# Where what is copied for a product takes longer than the product: with fewer columns, or where so much more than the
# channels is copied.
LEAST_COLUMNS, MOST_COPIED = 112, 1.4
BYTES = 16  # of which the copy unit wants multiples, where it starts and from pixel to pixel
MOST_ELEMENTS = 2**31 - 2**20  # of a map, of which the kernel counts the pixels in 32 bits


@cache
def fault(device: int) -> str | None:
    """Why the kernel cannot run on a GPU, or None. On a GPU that it is made for, a warning says it too."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "it is not of the Hopper generation"
    try:
        from mambavision.ops.conv3x3.hopper import build

        build.try_out(device)
    except ImportError:
        reason = "cuda-bindings is not installed (pip install cuda-bindings)"
    except Exception as error:  # whatever it is, the kernel in Triton needs nothing of it
        reason = f"{type(error).__name__}: {error}"
    else:
        return None
    warnings.warn(f"Convolutions run through Triton, not through their kernel for this GPU: {reason}", stacklevel=2)
    return reason


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> bool:
    """Whether the convolution of a map, on whatever device, should be computed here, if it is a large one."""
    columns, channels = weight.shape[:2]
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and _types_fit(x, weight, bias, residual)
        and activation in ACTIVATIONS
        and columns >= LEAST_COLUMNS
        and -(-channels // CHUNK) * CHUNK <= MOST_COPIED * channels
        and columns % UNIT == 0
        and channels * x.element_size() % BYTES == 0
        and x.numel() // channels * max(channels, columns) < MOST_ELEMENTS
        and fault(torch.cuda.current_device() if x.device.index is None else x.device.index) is None
    )


def _types_fit(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias, residual))


@custom_op("mambavision::conv3x3_hopper", mutates_args=())
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """act(conv(x) + bias) + residual, channels-last; arguments as in `mambavision.ops.conv3x3`."""
    if not _types_fit(x, weight, bias, residual):  # the kernel would read them as what they are not
        raise TypeError("weight, bias and residual must be of the map's type.")
    x, weight, residual = laid_out(x, weight, residual)
    residual = None if residual is None else _readable(residual)
    if bias is not None:
        bias = bias.contiguous()
        bias = bias if bias.data_ptr() % BYTES == 0 else bias.clone()
    x, weight = _readable(x), _readable(weight)
    out = empty_map(x, weight, stride)
    _fill(out, x, weight, bias, residual, stride, activation)
    return out


conv3x3.register_fake(lambda x, weight, _bias, _residual, stride, _activation: empty_map(x, weight, stride))


def _readable(tensor: Tensor) -> Tensor:
    """A map or a weight, or a dense copy where the copy unit does not take it as it lies."""
    size = tensor.element_size()
    steps = [tensor.stride(dim) * size for dim in (0, 2, 3) if tensor.shape[dim] > 1]
    if tensor.data_ptr() % BYTES == 0 and all(step > 0 and step % BYTES == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.channels_last)


def _fill(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str,
) -> None:
    from mambavision.ops.conv3x3.hopper import build

    columns, channels = weight.shape[:2]
    batch, _, height, width = x.shape
    cut = plan(columns)
    defined = definitions(
        columns,
        channels,
        dtype=x.dtype,
        stride=stride,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
    )
    compiled = partial(build.kernel, defined, cut.shared_bytes, x.device.index)
    if launch.is_precompiling():
        launch.note(("conv3x3_hopper", defined, x.device), compiled)
        return
    pixels = out.numel() // columns
    tiles_of_columns = -(-columns // cut.n)
    items = tiles_of_columns * -(-pixels // (cut.rows * CLUSTER))
    clusters = min(torch.cuda.get_device_properties(x.device).multi_processor_count // CLUSTER, items)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sizes, strides = (channels, width, height, batch), (x.stride(3), x.stride(2), x.stride(0))
    with build.on(x.device.index):
        arguments = [
            (build.pixels_map(x.data_ptr(), sizes, strides, stride, cut.rows, x.dtype), None),
            (build.weight_map(weight.data_ptr(), columns, channels, weight.stride(0), cut.n, x.dtype), None),
            *((0 if tensor is None else tensor.data_ptr(), ctypes.c_void_p) for tensor in (bias, residual, out)),
            *((number, ctypes.c_int) for number in (pixels, *out.shape[2:], columns, tiles_of_columns, items)),
        ]
        build.start(compiled(), clusters * CLUSTER, cut.threads, cut.shared_bytes, stream, arguments)
