"""How the product for Hopper GPUs is cut, and what its source has to know of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch

CLUSTER = 2  # blocks of threads that load weights for each other
LINE = 128  # bytes of the channels that one copy brings, but for
LAST_LINES = (32, 64, LINE)  # the last copy of a tap: the shortest of these that holds what is left
GROUP = 128  # threads that multiply together
WIDEST_TURNS = 208  # columns up to which a thread's registers hold the sums of two products, and half as many of four
SHARED_BYTES = 227 * 1024  # of a block, at most
ALIGNMENT = 1024  # bytes that the stages start at a multiple of
BARRIERS = 1024  # bytes that are left to the stages' barriers
MOST_STAGES = 8
UNIT = 8  # columns, of which a tile has a multiple
# Of linear layers: tiles of so many columns are compared, of equally good ones the first is taken; and what a tile
# costs beside its columns, in columns. With few inner columns how a tile is started and finished counts, and the widest
# ones have the fewest stages that could be under way meanwhile.
CUTS, COST_OF_A_TILE = (192, 176, 160, 144, 128), 16
FEW_INNER = 768
ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2}

Definitions = tuple[tuple[str, int], ...]


class Plan(NamedTuple):
    """How a product is cut; names as in `product.cu`.

    Attributes:
        n: columns of a tile.
        teams: that take turns.
        members: groups of threads in a team.
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
        """Pixels, or rows, of a tile."""
        return 64 * self.members * self.parts

    @property
    def threads(self) -> int:
        """Threads of a block: one group copies, the others multiply."""
        return GROUP * (self.teams * self.members + 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block that is asked for at its launch."""
        return self.stages * _stage_bytes(self.rows, self.n) + ALIGNMENT


def plan(columns: int) -> Plan:
    """The cut of a convolution to so many columns: tiles as equal as multiples of 8 can be.

    Two teams that take turns hide how a tile is finished; multiples of 256 columns are worth more in one tile. Of few
    columns a tile has more rows: it then copies less weight for each.
    """
    if columns % 256 == 0:
        n, teams, members, parts = 256, 1, 2, 1
    elif columns <= WIDEST_TURNS // 2:
        n, teams, members, parts = _even(columns, columns), 2, 1, 4
    else:
        n, teams, members, parts = _even(columns, WIDEST_TURNS), 2, 1, 2
    return _staged(n, teams, members, parts)


def linear_plan(rows: int, columns: int, inner: int, processors: int, bytes_each: int = 2) -> Plan:
    """The cut of a linear layer, by the time that its rounds of tiles take.

    Args:
        rows: of the left matrix.
        columns: of the result.
        inner: columns of the left matrix.
        processors: of the GPU, an even number.
        bytes_each: of an element.
    """
    if columns <= WIDEST_TURNS:
        return plan(columns)
    # Where tiles are rounded to 8 bits at their end, the widest have no registers for it.
    widths = CUTS if inner < FEW_INNER or bytes_each == 1 else (*CUTS, WIDEST_TURNS)
    cuts = [_staged(n, teams=2, members=1, parts=2) for n in widths]

    def cost(cut: Plan) -> int:
        items = -(-rows // (cut.rows * CLUSTER)) * -(-columns // cut.n)
        return -(-items // (processors // CLUSTER)) * (cut.n + COST_OF_A_TILE)

    return min(cuts, key=cost)


def _even(columns: int, most: int) -> int:
    """Columns of tiles as equal as multiples of 8 can be, of which none has more than so many."""
    tiles = -(-columns // most)
    return -(-columns // (tiles * UNIT)) * UNIT


def _staged(n: int, teams: int, members: int, parts: int) -> Plan:
    stages = (SHARED_BYTES - ALIGNMENT - BARRIERS) // _stage_bytes(64 * members * parts, n)
    return Plan(n, teams, members, parts, min(stages, MOST_STAGES))


def _stage_bytes(rows: int, n: int) -> int:
    return (rows + n) * LINE


def last_line(bytes_of_pixel: int) -> int:
    """Bytes of a line of a tap's last copy."""
    left = (bytes_of_pixel - 1) % LINE + 1
    return next(line for line in LAST_LINES if line >= left)


def definitions(
    cut: Plan,
    columns: int,
    channels: int,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    stride: int,
    size: int,
    bias: bool,
    residual: bool,
    activation: str,
) -> Definitions:
    """The constants of `product.cu`.

    Args:
        cut: of the product.
        columns: channels of the result.
        channels: of the map.
        dtype: of map and weight.
        out_dtype: of the result, or with 8 bits of the one that is wider.
        stride: of the convolution.
        size: rows and columns of its taps; 1 for a linear layer.
        bias: whether there is one.
        residual: likewise.
        activation: one of `ACTIVATIONS`.
    """
    return (
        ("COLUMNS", columns),
        ("CHANNELS", channels),
        ("STRIDE", stride),
        ("SIZE", size),
        ("FLOAT8", int(dtype == torch.float8_e4m3fn)),
        ("BFLOAT16", int(out_dtype == torch.bfloat16)),
        ("HAS_BIAS", int(bias)),
        ("HAS_RESIDUAL", int(residual)),
        ("ACTIVATION", ACTIVATIONS[activation]),
        ("N", cut.n),
        ("TEAMS", cut.teams),
        ("MEMBERS", cut.members),
        ("PARTS", cut.parts),
        ("STAGES", cut.stages),
        ("CLUSTER", CLUSTER),
        ("LINE", LINE),
        ("LAST_LINE", last_line(channels * dtype.itemsize)),
    )
