"""Which implementation of an op runs, decided by a pure function that also says why.

An op lists its implementations as a tuple of `Backend`, best first. `select` is called before the op itself, on
metadata alone, so that torch.compile and torch.export see the chosen implementation and nothing of the choice.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from mambavision.ops.precision import HALVES

Result = TypeVar("Result")  # of an op
_logger = logging.getLogger("mambavision")


class Situation(NamedTuple):
    """What a backend may look at to accept or refuse a call."""

    device_type: str
    dtype: torch.dtype
    length: int = 0  # tokens of a sequence or window
    state: int = 0  # states of a scanned channel
    width: int = 0  # channels of a head, or of the map between two convolutions
    dropout: bool = False  # whether weights of an attention are dropped
    differentiated: bool = False  # whether gradients are asked for
    result: torch.dtype | None = None  # the type that is asked for, where it is not that of the operands


@dataclass(frozen=True)
class Backend(Generic[Result]):
    """One implementation of an op.

    Attributes:
        name: what users pass as `backend=`.
        function: the implementation; every backend of an op has the same signature.
        strength: why it is the choice where it is chosen, for users.
        refusal: for a `Situation`, the reason why the backend cannot run there, or None when it can.
        automatic: whether `auto` may take it; the others run when they are asked for by name.
    """

    name: str
    function: Callable[..., Result]
    strength: str
    refusal: Callable[[Situation], str | None]
    automatic: bool = True


@dataclass(frozen=True)
class Choice(Generic[Result]):
    """The backend that runs and the reason in one phrase."""

    backend: Backend[Result]
    reason: str


def _launcher_fault() -> str | None:
    """What Triton misses to build its launchers, which are in C, or None."""
    kept = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if sys.platform != "linux" or (kept.is_dir() and any(kept.iterdir())):  # builds for Windows bring a compiler
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for what launches its kernels (CC, gcc or clang)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does on Debian
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not (header.exists() or elsewhere):
        return f"Triton finds no {header} for what launches its kernels (python3-dev or python3-devel)"
    return None


_LAUNCHER_FAULT = _launcher_fault()  # once, and not while a compiler traces; where Triton was used before, it is there


def triton_fault() -> str | None:
    """What is wrong with the installed Triton, or None; torch.compile follows it."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    version: str = triton.__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 3):
        return f"Triton {version} is older than 3.3"
    return _LAUNCHER_FAULT


@cache
def _say_once(fault: str) -> None:
    _logger.warning("On the GPU slower code runs in place of the kernels: %s.", fault)


def refuse_kernels(situation: Situation) -> str | None:
    """Why kernels for the usual floating types cannot run, or None."""
    if situation.device_type != "cuda":
        return f"Triton cannot compile for {situation.device_type} here"
    if situation.dtype not in (*HALVES, torch.float32):
        return f"{situation.dtype} is too wide for its kernels"
    return triton_fault()


def refuse_16_bit_kernels(situation: Situation) -> str | None:
    """Why kernels that multiply matrices of 16-bit numbers cannot run, or None."""
    if situation.device_type == "cuda" and situation.dtype not in HALVES:
        return f"its kernels multiply 16-bit numbers, not {situation.dtype}"
    return refuse_kernels(situation)


def refuse_inference_kernels(situation: Situation) -> str | None:
    """Why the kernels that have no backward and multiply 16-bit numbers cannot run, or None."""
    return refuse_16_bit_kernels(situation) or ("its kernels have no backward" if situation.differentiated else None)


def situation_of(x: torch.Tensor, *others: torch.Tensor | None) -> Situation:
    """Of an op on `x` and other tensors."""
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return Situation(x.device.type, x.dtype, differentiated=differentiated)


def check_shapes(**expected: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the argument, where a tensor that is given has another shape than the one beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit the others, got {tuple(tensor.shape)}.")


def select(
    op: str, backends: Sequence[Backend[Result]], situation: Situation, requested: str = "auto"
) -> Choice[Result]:
    """Choose the backend of `op` for a situation.

    Args:
        op: name for error messages.
        backends: the implementations, best first.
        situation: what is known of the call without its values.
        requested: a backend's name, or `auto` for the first that accepts the situation.

    Returns:
        The backend and why.

    Raises:
        ValueError: `requested` is no backend of `op`.
        RuntimeError: the requested backend cannot run here, or none can; the reasons are in the message.
    """
    if requested != "auto":
        for backend in backends:
            if backend.name == requested:
                if refusal := backend.refusal(situation):
                    raise RuntimeError(f"Backend {requested!r} of {op} cannot run here: {refusal}.")
                return Choice(backend, "requested")
        names = ", ".join(backend.name for backend in backends)
        raise ValueError(f"Unknown backend {requested!r} of {op}; choose auto or one of {names}.")
    if situation.device_type == "cuda" and not torch.compiler.is_compiling() and (fault := triton_fault()) is not None:
        _say_once(fault)
    refusals: list[str] = []
    for backend in backends:
        if not backend.automatic:
            continue
        refusal = backend.refusal(situation)
        if refusal is None:
            return Choice(backend, "; ".join([backend.strength, *refusals]))
        refusals.append(f"not {backend.name}: {refusal}")
    raise RuntimeError(f"No backend of {op} can run here: {'; '.join(refusals)}.")
