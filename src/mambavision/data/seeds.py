"""Every random draw of a training run is a function of the run's seed and of the position in the run.

Nothing depends on how fast a worker process was or on what ran before, so a run that continues from a checkpoint
draws what it would have drawn, and no generator's state has to be stored.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a draw is for; streams do not overlap."""

    ORDER = 0
    PICTURES = 1
    STEP = 2


def generator(seed: int, stream: Stream, position: int) -> np.random.Generator:
    """A generator of its own for one position."""
    return np.random.default_rng([seed, stream, position])


def seed_globals(seed: int, stream: Stream, position: int) -> None:
    """Start the global generators of random, NumPy and torch (all devices) anew for one position.

    timm's transforms and mixing draw from these, and so does stochastic depth.
    """
    words = np.random.SeedSequence([seed, stream, position]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch_seed = int(words[2]) << 32 | int(words[3])
    if torch.utils.data.get_worker_info() is None:
        torch.manual_seed(torch_seed)
    else:
        torch.default_generator.manual_seed(torch_seed)  # a worker has no other device to seed
