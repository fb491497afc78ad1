"""Selective scan: the recurrence at the heart of the MambaVision mixer, with one signature for every backend."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mambavision.ops.backend import Backend, Choice, Situation, refuse_kernels, select
from mambavision.ops.selective_scan.chunked import selective_scan_chunked
from mambavision.ops.selective_scan.reference import selective_scan_reference


def _shape_only(x: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _refuse_values(situation: Situation) -> str | None:
    return None if situation.device_type == "meta" else f"{situation.device_type} tensors have values"


def _triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    from mambavision.ops.selective_scan.triton_op import selective_scan_triton

    return selective_scan_triton(x, dt, A, B, C, D, dt_bias)


def _refuse_triton(situation: Situation) -> str | None:
    if fault := refuse_kernels(situation):
        return fault
    if situation.state not in (4, 8, 16):
        return f"its kernels are for 4, 8 or 16 states, not {situation.state}"
    return None


def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> Tensor:
    from mambavision.ops.selective_scan.mamba_ssm import selective_scan_mamba_ssm

    return selective_scan_mamba_ssm(x, dt, A, B, C, D, dt_bias)


def _refuse_mamba_ssm(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"mamba_ssm is for CUDA, not for {situation.device_type}"
    if situation.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{situation.dtype} is too wide for mamba_ssm"
    return None if importlib.util.find_spec("mamba_ssm") else "mamba_ssm is not installed"


# Best first.
BACKENDS = (
    Backend("meta", _shape_only, "meta tensors have no values to compute", _refuse_values),
    Backend("triton", _triton, "GPU kernels", _refuse_triton),
    Backend("chunked", selective_scan_chunked, "plain PyTorch, runs and exports everywhere", lambda _: None),
    Backend(
        "mamba_ssm", _mamba_ssm, "the CUDA kernels of mamba_ssm, to compare with", _refuse_mamba_ssm, automatic=False
    ),
    Backend("reference", selective_scan_reference, "the definition, step by step", lambda _: None, automatic=False),
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scan each sequence with input-dependent steps (Mamba, arXiv 2312.00752, section 3.2).

    For each sequence, channel c and state n, starting from h = 0:

        step    = softplus(dt[t, c] + dt_bias[c])
        h[c, n] = exp(step * A[c, n]) * h[c, n] + step * B[t, n] * x[t, c]
        y[t, c] = sum over n of C[t, n] * h[c, n] + D[c] * x[t, c]

    Steps and states are float32 whatever the inputs' type (float64 for float64 inputs); of 16-bit inputs without a
    gradient, a GPU's steps are exact to 6e-5 of their size. Inputs may be strided views. GPU kernels have first
    derivatives only, `backend="chunked"` has second ones, too; torch.vmap takes `reference` alone.

    Args:
        x: input, (batch, length, channels), any floating type.
        dt: step before bias and softplus, (batch, length, channels).
        A: transition, (channels, state); negative for a decaying state.
        B: input projection, (batch, length, state).
        C: output projection, (batch, length, state).
        D: skip weight, (channels,), or None for no skip.
        dt_bias: step bias, (channels,), or None for no bias.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        y, (batch, length, channels), in the type of x.

    Raises:
        ValueError: shapes do not fit, or the backend does not exist.
        RuntimeError: the requested backend cannot run here.
    """
    _check(x, dt, A, B, C, D, dt_bias)
    return choose_backend(x, backend, state=A.shape[1]).backend.function(x, dt, A, B, C, D, dt_bias)


def selective_scan_(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """`selective_scan` that replaces x by its result, for inference; on a GPU without a second tensor.

    Raises:
        ValueError: as there, or elements of x share their memory, as those of an expanded tensor do.
        RuntimeError: as there.
    """
    _check(x, dt, A, B, C, D, dt_bias)
    if any(x.stride(dim) == 0 and x.shape[dim] > 1 for dim in range(3)):
        raise ValueError("x cannot be replaced by its result, as its elements share memory; pass x.contiguous().")
    if choose_backend(x, state=A.shape[1]).backend.name == "triton" and x.stride(2) == 1:
        from mambavision.ops.selective_scan.triton_op import scan_

        scan_(x, dt, A, B, C, D, dt_bias)
        return x
    return x.copy_(selective_scan(x, dt, A, B, C, D, dt_bias))


def choose_backend(x: Tensor, requested: str = "auto", *, state: int = 8) -> Choice[Tensor]:
    """The backend that `selective_scan` takes for an input like `x`, (batch, length, channels), and the reason."""
    return select("selective_scan", BACKENDS, Situation(x.device.type, x.dtype, x.shape[1], state), requested)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length, channels) with at least one token, got {tuple(x.shape)}.")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be of a floating type, got {x.dtype}.")
    if A.dim() != 2:
        raise ValueError(f"A must be (channels, state), got {tuple(A.shape)}.")
    batch, length, channels = x.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, A.shape[1])),
        "B": (B, (batch, length, A.shape[1])),
        "C": (C, (batch, length, A.shape[1])),
        "D": (D, (channels,)),
        "dt_bias": (dt_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}.")


__all__ = ["BACKENDS", "choose_backend", "selective_scan", "selective_scan_"]
