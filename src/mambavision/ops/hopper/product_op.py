"""The Hopper product as operators that PyTorch knows: convolution and linear layer. Imported only where they run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mambavision.ops import launch

CLUSTER = 2  # blocks, as in `product.cu`, and its next two
CHUNK = 64  # channels
WIDEST_TURNS = 208  # columns up to which a thread holds the sums of two products
SHARED_BYTES, AROUND = 227 * 1024, 2048  # of a block; for its barriers and to align the stages
MOST_STAGES = 8
THREADS = 384  # one group of 128 that copies, two that multiply
LEAST_COLUMNS = 112  # below, what is copied for a product takes longer than the product
UNIT, BYTES = 8, 16  # elements and their bytes, of which the copy unit wants multiples
MOST_ELEMENTS = 2**31 - 2**20  # of a map, which are counted in 32 bits
ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2, "gelu": 3}


class Plan(NamedTuple):
    """How a product is cut; names as in `product.cu`.

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
    """Why the kernel cannot run on a GPU, or None."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "it is not of the Hopper generation"
    try:
        from mambavision.ops.hopper.build import compiler_version

        major, _ = compiler_version()
    except ImportError:
        return "cuda-bindings is not installed"
    except RuntimeError as error:  # so does the package say that it finds no library
        return str(error)
    return None if major >= 12 else "CUDA's compiler is older than 12"


def serves(x: Tensor, columns: int, channels: int, bias: Tensor | None, activation: str) -> bool:
    """Whether products of x, pixels or rows of so many channels, with so many columns should be computed here."""
    if not x.is_cuda or fault(torch.cuda.current_device() if x.device.index is None else x.device.index) is not None:
        return False
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and (bias is None or bias.dtype == x.dtype)
        and activation in ACTIVATIONS
        and columns >= LEAST_COLUMNS
        and columns % UNIT == 0
        and channels % UNIT == 0
        and x.numel() // channels * max(channels, columns) < MOST_ELEMENTS
    )


@custom_op("mambavision::hopper_conv3x3", mutates_args=())
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """act(conv(x) + bias) + residual, channels-last; arguments as in `mambavision.ops.conv3x3`."""
    columns, channels = weight.shape[:2]
    if x.stride(1) != 1 or any(step % UNIT for step in (x.stride(0), x.stride(2), x.stride(3))):
        x = x.contiguous(memory_format=torch.channels_last)
    x = _readable(x)
    if weight.stride()[1:] != (1, 3 * channels, channels) or weight.stride(0) % UNIT:  # rows may have gaps between
        weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    out = _empty_map(x, weight, stride)
    batch, _, height, width = x.shape
    pixels = _Pixels(x.data_ptr(), (channels, width, height, batch), (x.stride(3), x.stride(2), x.stride(0)))
    _launch(x, pixels, 3, stride, _readable(weight), bias, residual, out, out.shape[2:], activation)
    return out


conv3x3.register_fake(lambda x, weight, _bias, _residual, stride, _activation: _empty_map(x, weight, stride))


@custom_op("mambavision::hopper_linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x weight^T + bias), contiguous; arguments as in `mambavision.ops.linear`."""
    weight = _readable(weight.contiguous())
    rows = _readable((x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1]))
    if rows.stride(0) % UNIT:
        rows = rows.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    many, step = rows.shape[0], rows.stride(0)
    pixels = _Pixels(rows.data_ptr(), (rows.shape[1], many, 1, 1), (step, step, step))
    taps = weight.view(*weight.shape, 1, 1)
    _launch(x, pixels, 1, 1, taps, bias, None, out, (1, many), activation)
    return out


linear.register_fake(lambda x, weight, _bias, _activation: x.new_empty((*x.shape[:-1], weight.shape[0])))


def _empty_map(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    shape = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class _Pixels(NamedTuple):
    """A map in memory, channels side by side."""

    address: int
    sizes: tuple[int, int, int, int]  # channels, columns, rows, pictures
    strides: tuple[int, int, int]  # from column to column, from row to row, from picture to picture; in elements


def _readable(tensor: Tensor) -> Tensor:
    """The tensor or a copy of it, where the copy unit can start."""
    return tensor if tensor.data_ptr() % BYTES == 0 else tensor.clone()


def _launch(
    x: Tensor,
    pixels: _Pixels,
    size: int,
    stride: int,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    out_size: Sequence[int],
    activation: str,
) -> None:
    """Fill `out`, of `out_size` rows and columns a picture; `weight` has its channels side by side."""
    from mambavision.ops.hopper import build

    columns, channels = weight.shape[:2]
    cut = plan(columns)
    bfloat16 = x.dtype == torch.bfloat16
    constants = (
        ("N", cut.n), ("TEAMS", cut.teams), ("MEMBERS", cut.members), ("PARTS", cut.parts), ("STAGES", cut.stages),
        ("CHANNELS", channels), ("SIZE", size), ("STRIDE", stride), ("BFLOAT16", int(bfloat16)),
        ("HAS_BIAS", int(bias is not None)), ("HAS_RESIDUAL", int(residual is not None)),
        ("ACTIVATION", ACTIVATIONS[activation]),
    )  # fmt: skip
    ready = partial(build.kernel, constants, cut.shared_bytes, x.device.index)
    if launch.is_precompiling():
        launch.note(("hopper", constants, x.device), ready)
        return
    rows = out.numel() // columns
    tiles_of_columns = -(-columns // cut.n)
    items = tiles_of_columns * -(-rows // (cut.rows * CLUSTER))
    clusters = min(torch.cuda.get_device_properties(x.device).multi_processor_count // CLUSTER, items)
    bias, residual = (None if tensor is None else _readable(tensor.contiguous() if tensor.dim() == 1 else tensor)
                      for tensor in (bias, residual))  # fmt: skip
    number, pointer = ctypes.c_int, ctypes.c_void_p
    arguments = {
        "x_map": (build.pixels_map(*pixels, size, stride, cut.rows, bfloat16), None),
        "weight_map": (
            build.weight_map(weight.data_ptr(), columns, size**2, channels, weight.stride(0), cut.n, bfloat16), None
        ),
        "bias": (0 if bias is None else bias.data_ptr(), pointer),
        "residual": (0 if residual is None else residual.data_ptr(), pointer),
        "out": (out.data_ptr(), pointer),
        "pixels": (rows, number),
        "out_height": (out_size[0], number),
        "out_width": (out_size[1], number),
        "columns": (columns, number),
        "tiles_of_columns": (tiles_of_columns, number),
        "items": (items, number),
    }  # fmt: skip
    with torch.cuda.device(x.device):
        build.start(ready(), clusters * CLUSTER, THREADS, cut.shared_bytes, list(arguments.values()))
