"""How the convolution for Hopper GPUs is cut, and what its source has to know of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch

CLUSTER = 2  # blocks of threads that load weights for each other
CHUNK = 64  # channels that a copy brings: 128 bytes, a line of the cache and the unit of the swizzle
GROUP = 128  # threads that multiply together
WIDEST_TURNS = 208  # columns up to which a thread holds the sums of two products
SHARED_BYTES, AROUND = 227 * 1024, 2048  # that a block may have, and of them what aligns the stages and is left over
MOST_STAGES = 8
UNIT = 8  # columns, of which a tile has a multiple
ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2}

Definitions = tuple[tuple[str, int], ...]


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

    @property
    def threads(self) -> int:
        """Threads of a block: one group copies, the others multiply."""
        return GROUP * (self.teams * self.members + 1)


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


def definitions(
    columns: int,
    channels: int,
    *,
    dtype: torch.dtype,
    stride: int,
    bias: bool,
    residual: bool,
    activation: str,
) -> Definitions:
    """The constants of `kernel.cu`.

    Args:
        columns: channels of the result.
        channels: of the map.
        dtype: of all tensors.
        stride: of the convolution.
        bias: whether there is one.
        residual: likewise.
        activation: one of `ACTIVATIONS`.
    """
    cut = plan(columns)
    return (
        ("CLUSTER", CLUSTER),
        ("CHUNK", CHUNK),
        ("N", cut.n),
        ("TEAMS", cut.teams),
        ("MEMBERS", cut.members),
        ("PARTS", cut.parts),
        ("STAGES", cut.stages),
        ("CHANNELS", channels),
        ("STRIDE", stride),
        ("BFLOAT16", int(dtype == torch.bfloat16)),
        ("HAS_BIAS", int(bias)),
        ("HAS_RESIDUAL", int(residual)),
        ("ACTIVATION", ACTIVATIONS[activation]),
    )
