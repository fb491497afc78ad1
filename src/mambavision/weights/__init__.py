"""Weights: which are published, how they are fetched, read without running code, loaded strictly and saved.

`table` lists the published weights, `fetching` brings their files here, `reading` turns any supported file into a
`Checkpoint`, `loading` puts its tensors into a network, and `checkpoint` defines our own file format.
"""

from mambavision.weights.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from mambavision.weights.fetching import fetch_weights
from mambavision.weights.loading import adapt_first_conv, load_weights
from mambavision.weights.reading import read_checkpoint
from mambavision.weights.table import WEIGHTS, WeightSpec

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "CheckpointError",
    "WeightSpec",
    "adapt_first_conv",
    "fetch_weights",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
]
