"""The scan by the package mamba_ssm, where it happens to be installed: to compare with, never chosen by itself.

Its kernels want channels before tokens, so inputs and output are transposed.
"""

from __future__ import annotations

from torch import Tensor


def selective_scan_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """Arguments and result as in `mambavision.ops.selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (tensor.to(x.dtype).transpose(1, 2).contiguous() for tensor in (x, dt, B, C))
    exact = [None if tensor is None else tensor.float() for tensor in (D, dt_bias)]
    y: Tensor = selective_scan_fn(x, dt, A.float(), B, C, exact[0], delta_bias=exact[1], delta_softplus=True)
    return y.transpose(1, 2)
