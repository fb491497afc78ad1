"""The selective scan in plain PyTorch, parallel over chunks of tokens: for CPU, MPS, export and GPUs without Triton.

Two neighbouring tokens act on the state like one: their decays multiply, and the first one's drive passes through the
second one's decay. So the tokens are merged into chunks of two, those into chunks of four and so on, until a few are
left to walk one by one; on the way back each chunk's middle follows from the state before it (the odd-even form of a
parallel prefix: Blelloch, Prefix sums and their applications, 1990). A window of 196 tokens takes 20 steps of wide
arithmetic, not 196 narrow ones, and every decay is at most 1: nothing can overflow.

Memory is linear in length: autograd keeps the inputs alone (batch x length x channels); states (`state` times as much)
live only while a forward or backward runs, which scans again. The backward is made of differentiable operations: second
derivatives work too. Products over the state are written as sums, since autocast would run matrix products in half
precision.
"""

from __future__ import annotations

import math
from typing import Any, List  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mambavision.ops.precision import at_least_float32
from mambavision.ops.tracing import is_exporting, is_jit_tracing

_LOG2_E = math.log2(math.e)
_FEW = 6  # tokens that are walked one by one sooner than in pairs


def selective_scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """Chunk-parallel scan with exact gradients; arguments and result as in `mambavision.ops.selective_scan`."""
    dt = dt.to(at_least_float32(dt.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    scan = _opaque_scan if _is_compiled_for_cpu(x) else _ChunkedScan.apply
    if is_jit_tracing():
        scan = _forward
    y: Tensor = scan(x, dt, A, B, C)
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype), x.to(y.dtype))
    return y.to(x.dtype)


def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Y = scan(x, softplus(dt), A, B, C), in float32 or wider."""
    x, dt, A, B, C = _widen(x, dt, A, B, C)
    step = _softplus(dt)
    h = _walk(_decays(step, A), B.unsqueeze(-1) * (step * x).unsqueeze(-2))
    return h.mul_(C.unsqueeze(-1)).sum(-2)


def _backward(grad_y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the five inputs of `_forward`, each in the type of its input."""
    x, dt, A, B, C = _widen(*inputs)
    step = _softplus(dt)
    decays = _decays(step, A)  # (batch, length, state, channels), as all of the following
    h = _walk(decays.clone(), B.unsqueeze(-1) * (step * x).unsqueeze(-2))
    # A state's gradient is what its output asks of it, plus the next state's gradient times the decay between.
    asked = C.unsqueeze(-1) * grad_y.unsqueeze(-2)
    grad_h = _walk(F.pad(decays[:, 1:].flip(1), (0, 0, 0, 0, 1, 0)), asked.flip(1)).flip(1)
    grad_exponent = grad_h * decays * F.pad(h[:, :-1], (0, 0, 0, 0, 1, 0))  # of step * A
    grad_drive = (B.unsqueeze(-1) * grad_h).sum(-2)  # of step * x: (batch, length, channels)
    grad_step = (grad_exponent * A.t()).sum(-2) + grad_drive * x
    grads = (
        grad_drive * step,
        grad_step * torch.sigmoid(dt),
        (grad_exponent * step.unsqueeze(-2)).sum((0, 1)).t(),
        (grad_h * (step * x).unsqueeze(-2)).sum(-1),
        (h * grad_y.unsqueeze(-2)).sum(-1),
    )
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True)]


class _ChunkedScan(Function):
    """`_forward` with its gradients, visible to torch.export and to compilers."""

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004  (torch's signature)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        return tuple(_backward(grad_y, *ctx.saved_tensors))


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or in float64 where any of them is."""
    dtype = at_least_float32(*(tensor.dtype for tensor in tensors))
    return tuple(tensor.to(dtype) for tensor in tensors)


def _softplus(dt: Tensor) -> Tensor:
    """log(1 + exp(dt)); several times faster on a CPU than `F.softplus` and `log1p`, which are slow there."""
    small = _exp_(-dt.abs())
    one_more = 1 + small
    lost = small - (one_more - 1)  # what rounding took from the sum; without it small steps would be coarse
    return torch.addcdiv(torch.maximum(dt, torch.zeros_like(dt)) + torch.log(one_more), lost, one_more)


def _exp_(exponent: Tensor) -> Tensor:
    """exp(exponent) in its memory; on a CPU powers of two are four times faster. Exported graphs hold the plain one."""
    return exponent.exp_() if torch.compiler.is_compiling() else exponent.mul_(_LOG2_E).exp2_()


def _decays(step: Tensor, A: Tensor) -> Tensor:
    """exp(step A), (batch, length, state, channels): channels last, where arithmetic is widest."""
    return _exp_(step.unsqueeze(-2) * A.t().contiguous())  # the layout of A decides that of every state


def _walk(decays: Tensor, drives: Tensor) -> Tensor:
    """The states h[t] = decays[t] h[t - 1] + drives[t], (batch, length, state, channels) as both inputs.

    Where no derivative is asked of the walk itself, the states take the place of `drives`, and `decays` is used up.
    """
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_jit_tracing())
    length = drives.shape[1]
    if length <= _FEW:
        decay, drive = decays.unbind(1), drives.unbind(1)
        states = [drive[0]]
        for k in range(1, length):
            states.append(torch.addcmul(drive[k], decay[k], states[-1], out=drive[k] if in_place else None))
        return drives if in_place else torch.stack(states, dim=1)
    (decay_1, decay_2), (drive_1, drive_2) = _pairs(decays), _pairs(drives)
    merged = torch.addcmul(drive_2, decay_2, drive_1, out=drive_2 if in_place else None)
    ends = _walk(torch.mul(decay_2, decay_1, out=decay_2 if in_place else None), merged)
    rest = drive_1[:, 1:]
    rest = torch.addcmul(rest, decay_1[:, 1:], ends[:, :-1], out=rest if in_place else None)
    parts = []
    if not in_place:
        parts = [torch.stack([torch.cat([drive_1[:, :1], rest], dim=1), ends], dim=2).flatten(1, 2)]
    if length % 2:
        last = drives[:, -1:]
        parts.append(torch.addcmul(last, decays[:, -1:], ends[:, -1:], out=last if in_place else None))
    return drives if in_place else torch.cat(parts, dim=1)


def _pairs(tensor: Tensor) -> tuple[Tensor, ...]:
    """The first and the second of each two tokens, views (batch, pairs, state, channels)."""
    batch, length, state, channels = tensor.shape
    pairs = length // 2  # not every second token by a step: onnxruntime is slow at that
    return tensor[:, : 2 * pairs].view(batch, pairs, 2, state, channels).unbind(2)


# The CPU compiler makes one loop nest of all the steps, many times slower than PyTorch's own kernels run them one by
# one, and takes minutes to do so. There the scan is an operator that the compiler calls and does not look into.


def _is_compiled_for_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.compiler.is_dynamo_compiling() and not is_exporting()


@torch.library.custom_op("mambavision::chunked_scan", mutates_args=())
def _opaque_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    with torch.no_grad():  # a registered operator has its gradient beside it
        return _forward(x, dt, A, B, C).contiguous()


@torch.library.custom_op("mambavision::chunked_scan_backward", mutates_args=())
def _opaque_backward(grad_y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> List[Tensor]:  # noqa: UP006  (torch 2.6 reads the schema from this annotation and knows no other spelling)
    with torch.no_grad():
        return [grad.contiguous() for grad in _backward(grad_y, x, dt, A, B, C)]


@_opaque_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    dtype = _widen(x[:0], dt[:0], A[:0], B[:0], C[:0])[0].dtype
    return x.new_empty(x.shape, dtype=dtype)


@_opaque_backward.register_fake
def _(grad_y: Tensor, *inputs: Tensor) -> list[Tensor]:  # noqa: ARG001  (torch's signature)
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


_opaque_scan.register_autograd(
    lambda ctx, grad_y: tuple(_opaque_backward(grad_y, *ctx.saved_tensors)), setup_context=_ChunkedScan.setup_context
)
