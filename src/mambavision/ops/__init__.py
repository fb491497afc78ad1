"""Computations that have more than one implementation; each op is a folder with one signature for all of them."""

from mambavision.ops.selective_scan import selective_scan

__all__ = ["selective_scan"]
