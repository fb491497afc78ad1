"""Pictures for training and evaluation: from folders and arrays to augmented batches on the device."""

from __future__ import annotations


class DataError(ValueError):
    """The data given cannot be used; the message is one sentence that names the thing and the remedy."""
