"""Computations that have more than one implementation; each op is a folder with one signature for all of them."""

from mambavision.ops.add_layer_norm import add_layer_norm
from mambavision.ops.linear_gelu import linear_gelu
from mambavision.ops.selective_scan import selective_scan, selective_scan_
from mambavision.ops.token_conv import token_conv
from mambavision.ops.window_attention import window_attention

__all__ = ["add_layer_norm", "linear_gelu", "selective_scan", "selective_scan_", "token_conv", "window_attention"]
