"""The convolution for Hopper GPUs as an operator that PyTorch knows, and how it is cut."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch

CLUSTER = 2  # blocks, as in `kernel.cu`, and its next two
CHUNK = 64  # channels
WIDEST_TURNS = 208  # columns up to which a thread holds the sums of two products
SHARED_BYTES, AROUND = 227 * 1024, 2048  # of a block; for its barriers and to align the stages
MOST_STAGES = 8
THREADS = 384  # one group of 128 that copies, two that multiply
# Where what is copied for a product takes longer than the product: with fewer columns, or where so much more than the
# channels is copied.
LEAST_COLUMNS, MOST_COPIED = 112, 1.4
UNIT, BYTES = 8, 16  # elements and their bytes, of which the copy unit wants multiples
MOST_ELEMENTS = 2**31 - 2**20  # of a map, which are counted in 32 bits
ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2}


class Plan(NamedTuple):
    """How a product is cut; names as in `kernel.cu`.

    Attributes:
        n: columns of a tile.
        teams: that take turns.
        members: groups of 128 threads in a team.
        parts: products of 64 rows a group.
        stages: of the ring.
    """

    n: int
    teams: int
    members: int
    parts: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.members * self.parts

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stages * _stage_bytes(self.rows, self.n) + AROUND


def plan(columns: int) -> Plan:
    """The cut for so many columns: tiles as equal as multiples of 8 can be.

    Two teams that take turns hide how a tile is finished; multiples of 256 columns are worth more in one tile.
    """
    if columns % 256 == 0:
        n, teams, members, parts = 256, 1, 2, 1
    else:
        tiles = -(-columns // WIDEST_TURNS)
        n, teams, members, parts = -(-columns // (tiles * UNIT)) * UNIT, 2, 1, 2
    stages = (SHARED_BYTES - AROUND) // _stage_bytes(64 * members * parts, n)
    return Plan(n, teams, members, parts, min(stages, MOST_STAGES))


def _stage_bytes(rows: int, n: int) -> int:
    return (rows + n) * CHUNK * 2


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
        and channels % UNIT == 0
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
    channels = weight.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    if weight.stride()[1:] != (1, 3 * channels, channels):  # between its rows there may be gaps
        weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if residual is not None:
        residual = _readable(residual.contiguous(memory_format=torch.channels_last))
    if bias is not None:
        bias = bias.contiguous()
        bias = bias if bias.data_ptr() % BYTES == 0 else bias.clone()
    x, weight = _readable(x), _readable(weight)
    out = _empty_map(x, weight, stride)
    _fill(out, x, weight, bias, residual, stride, activation)
    return out


conv3x3.register_fake(lambda x, weight, _bias, _residual, stride, _activation: _empty_map(x, weight, stride))


def _empty_map(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    shape = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


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
    bfloat16 = x.dtype == torch.bfloat16
    constants = (
        ("N", cut.n), ("TEAMS", cut.teams), ("MEMBERS", cut.members), ("PARTS", cut.parts), ("STAGES", cut.stages),
        ("CHANNELS", channels), ("STRIDE", stride), ("BFLOAT16", int(bfloat16)), ("HAS_BIAS", int(bias is not None)),
        ("HAS_RESIDUAL", int(residual is not None)), ("ACTIVATION", ACTIVATIONS[activation]),
    )  # fmt: skip
    compiled = partial(build.kernel, constants, cut.shared_bytes, x.device.index)
    if launch.is_precompiling():
        launch.note(("conv3x3_hopper", constants, x.device), compiled)
        return
    pixels = out.numel() // columns
    tiles_of_columns = -(-columns // cut.n)
    items = tiles_of_columns * -(-pixels // (cut.rows * CLUSTER))
    clusters = min(torch.cuda.get_device_properties(x.device).multi_processor_count // CLUSTER, items)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sizes, strides = (channels, width, height, batch), (x.stride(3), x.stride(2), x.stride(0))
    with build.on(x.device.index):
        arguments = [
            (build.pixels_map(x.data_ptr(), sizes, strides, stride, cut.rows, bfloat16), None),
            (build.weight_map(weight.data_ptr(), columns, channels, weight.stride(0), cut.n, bfloat16), None),
            *((0 if tensor is None else tensor.data_ptr(), ctypes.c_void_p) for tensor in (bias, residual, out)),
            *((number, ctypes.c_int) for number in (pixels, *out.shape[2:], columns, tiles_of_columns, items)),
        ]
        build.start(compiled(), clusters * CLUSTER, THREADS, cut.shared_bytes, stream, arguments)
