"""Products by the kernel for Hopper GPUs as operators that PyTorch knows, and where they serve."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch
from mambavision.ops.hopper.availability import BYTES, fault, processors
from mambavision.ops.hopper.plan import ACTIVATIONS, CLUSTER, LINE, UNIT, definitions, last_line, linear_plan, plan
from mambavision.ops.map_layout import empty_map, laid_out
from mambavision.ops.precision import FLOAT8, HALVES

# Where the copies take longer than the products: with fewer columns, or where the lines that are copied are so much
# longer than the channels.
LEAST_COLUMNS, MOST_COPIED = 80, 1.4
MOST_PIXELS = 2**31 - 2**20  # of a map; they are counted in 32 bits, to the end of the last tile


def serves(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str
) -> bool:
    """Whether the product of a map or rows, on whatever device, should be computed here, if it is a large one."""
    columns, channels = weight.shape[:2]
    return (
        x.is_cuda
        and _types_fit(x, weight, scale, bias, residual)
        and fault(launch.index_of(x.device)) is None  # before what a compiler would guard elsewhere too
        and activation in ACTIVATIONS
        and fits(channels, columns, x.numel() // channels, x.element_size())
    )


def fits(channels: int, columns: int, pixels: int, bytes_each: int = 2) -> bool:
    """Whether the kernel takes, and is fast for, a product of pixels or rows of so many channels to so many columns."""
    bytes_of_pixel = channels * bytes_each
    return (
        columns >= LEAST_COLUMNS
        and columns % UNIT == 0
        and bytes_of_pixel % BYTES == 0
        and (bytes_of_pixel - 1) // LINE * LINE + last_line(bytes_of_pixel) <= MOST_COPIED * bytes_of_pixel
        and pixels < MOST_PIXELS
    )


def _types_fit(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernel reads the operands as what they are; 8 bits come with scale and bias."""
    types = [None if tensor is None else tensor.dtype for tensor in (weight, scale, bias, residual)]
    if x.dtype == FLOAT8:
        return types[:3] == [FLOAT8, torch.float32, torch.float32] and types[3] in (None, *HALVES)
    return x.dtype in HALVES and types[:2] == [x.dtype, None] and all(kind in (None, x.dtype) for kind in types[2:])


@custom_op("mambavision::conv3x3_hopper", mutates_args=())
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """act(conv(x) + bias) + residual, channels-last; arguments as in `mambavision.ops.conv3x3`."""
    out = empty_map(x, weight, stride)
    _fill(out, None, x, weight, None, bias, residual, stride, activation)
    return out


conv3x3.register_fake(lambda x, weight, _bias, _residual, stride, _activation: empty_map(x, weight, stride))


@custom_op("mambavision::linear_hopper", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x weight^T + bias), contiguous; arguments as in `mambavision.ops.linear`."""
    columns, inner = weight.shape
    out = x.new_empty((*x.shape[:-1], columns))
    rows = x.reshape(-1, inner)
    _fill(_as_map(out.view(-1, columns)), None, _as_map(rows), _as_taps(weight), None, bias, None, 1, activation)
    return out


linear.register_fake(lambda x, weight, _bias, _activation: x.new_empty((*x.shape[:-1], weight.shape[0])))


@custom_op("mambavision::conv3x3_hopper_float8", mutates_args=())
def conv3x3_float8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Like `conv3x3`, of 8-bit numbers and to such; arguments as in `mambavision.ops.conv3x3.float8`."""
    copy = empty_map(x, weight)
    _fill(None, copy, x, weight, scale, bias, None, 1, activation)
    return copy


conv3x3_float8.register_fake(lambda x, weight, _scale, _bias, _activation: empty_map(x, weight))


@custom_op("mambavision::conv3x3_hopper_float8_add", mutates_args=())
def conv3x3_float8_add(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The sum in the type of the residual, and in 8 bits."""
    out, copy = empty_map(x, weight, dtype=residual.dtype), empty_map(x, weight)
    _fill(out, copy, x, weight, scale, bias, residual, 1, activation)
    return out, copy


@conv3x3_float8_add.register_fake
def _(x: Tensor, weight: Tensor, _scale: Tensor, _bias: Tensor, residual: Tensor, _: str) -> tuple[Tensor, Tensor]:
    return empty_map(x, weight, dtype=residual.dtype), empty_map(x, weight)


@custom_op("mambavision::linear_hopper_float8", mutates_args=())
def linear_float8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Like `linear`, of 8-bit numbers (rows, inner) and to such."""
    copy = x.new_empty((len(x), len(weight)))
    _fill(None, _as_map(copy), _as_map(x), _as_taps(weight), scale, bias, None, 1, activation)
    return copy


linear_float8.register_fake(lambda x, weight, _scale, _bias, _activation: x.new_empty((x.shape[0], weight.shape[0])))


def _as_map(rows: Tensor) -> Tensor:
    """Rows (rows, channels) as a channels-last map of one row of pixels."""
    return rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _as_taps(weight: Tensor) -> Tensor:
    """A linear layer's weight as that of a convolution with a single tap."""
    return weight[:, :, None, None]


def _readable(tensor: Tensor) -> Tensor:
    """A map or a weight, or a dense copy where the copy unit does not take it as it lies."""
    size = tensor.element_size()
    steps = [tensor.stride(dim) * size for dim in (0, 2, 3) if tensor.shape[dim] > 1]
    if tensor.data_ptr() % BYTES == 0 and all(step > 0 and step % BYTES == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.channels_last)


def _aligned(vector: Tensor | None) -> Tensor | None:
    """Numbers side by side, of which a thread can read two at once."""
    if vector is None:
        return None
    vector = vector.contiguous()
    return vector if vector.data_ptr() % BYTES == 0 else vector.clone()


def _fill(
    out: Tensor | None,
    copy: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str,
) -> None:
    """Compute `out` and `copy`, its numbers in 8 bits, where they are given."""
    if not _types_fit(x, weight, scale, bias, residual) or (copy is None) == (x.dtype == FLOAT8):
        raise TypeError("weight, bias and residual must be of the map's type; scale and bias of 8 bits, float32.")
    from mambavision.ops.hopper import build

    x, weight, residual = laid_out(x, weight, residual)
    x, weight = _readable(x), _readable(weight)
    residual = None if residual is None else _readable(residual)
    scale, bias = _aligned(scale), _aligned(bias)
    columns, channels, size = weight.shape[:3]
    batch, _, height, width = x.shape
    result = copy if out is None else out
    assert result is not None
    pixels = result.numel() // columns
    present = processors(x.device.index)
    cut = linear_plan(pixels, columns, channels, present, x.element_size()) if size == 1 else plan(columns)
    defined = definitions(
        cut,
        columns,
        channels,
        dtype=x.dtype,
        out_dtype=result.dtype,
        stride=stride,
        size=size,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
    )
    compiled = partial(build.kernel, "product", defined, cut.shared_bytes, x.device.index)
    if launch.is_precompiling():
        launch.note(("hopper", defined, x.device), compiled, at_once=True)
        return
    items = -(-columns // cut.n) * -(-pixels // (cut.rows * CLUSTER))
    clusters = min(present // CLUSTER, items)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sizes, strides = (channels, width, height, batch), (x.stride(3), x.stride(2), x.stride(0))
    weight_sizes = channels, size**2, columns
    weight_strides = weight.stride(3) if size > 1 else weight.stride(0), weight.stride(0)
    lines = LINE, last_line(channels * x.element_size())
    others = [None if tensor is None else tensor.data_ptr() for tensor in (scale, bias, residual, out, copy)]
    with build.on(x.device.index):
        arguments = []
        for line in lines:
            arguments += [
                build.pixels_map(x.data_ptr(), sizes, strides, size, stride, cut.rows, line, x.dtype),
                build.weight_map(weight.data_ptr(), weight_sizes, weight_strides, cut.n, line, x.dtype),
            ]
        arguments += [
            *map(ctypes.c_void_p, others),
            *map(ctypes.c_int, (pixels, *result.shape[2:], items)),
        ]
        build.start(compiled(), clusters * CLUSTER, cut.threads, cut.shared_bytes, stream, arguments)
