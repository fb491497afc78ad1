"""The selective scan in plain PyTorch, vectorised over chunks of tokens: for CPU, MPS, export and GPUs without Triton.

The tokens are cut into about sqrt(length) chunks of about sqrt(length) tokens (for a square window: its rows). All
chunks walk side by side from a zero state, only to learn how much each adds; a walk over the chunks turns that into
the state that enters each; a second walk side by side starts there and gives the outputs. So a window of 196 tokens
takes 14 + 14 + 14 steps of wide arithmetic, not 196 narrow ones, and every decay is at most 1: nothing can overflow.

Memory is linear in length: autograd keeps the inputs alone (batch x length x channels); states (`state` times as much)
live only while a forward or backward runs, which walks the chunks again. The backward is made of differentiable
operations: second derivatives work too. Products over the state are written as sums, since autocast would run matrix
products in half precision.
"""

from __future__ import annotations

import math
from typing import Any, List  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def selective_scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None
) -> Tensor:
    """Chunk-parallel scan with exact gradients; arguments and result as in `mambavision.ops.selective_scan`."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    scan = _opaque_scan if _is_compiled_for_cpu(x) else _ChunkedScan.apply
    y: Tensor = scan(x, dt, A, B, C)
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    return y.to(x.dtype)


def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Y = scan(x, softplus(dt), A, B, C), in float32 or wider."""
    x, dt, A, B, C = _widen(x, dt, A, B, C)
    step = _softplus(dt)
    decays, drives, through = _factors(_places(step), _places(step * x), A, _places(B))
    _, states = _walk_chunks(decays, drives, through)
    y = [h.mul_(c.unsqueeze(-1)).sum(2) for c, h in zip(_places(C), states, strict=True)]
    return _join(torch.stack(y), x.shape[1])


def _backward(grad_y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the five inputs of `_forward`, each in the type of its input."""
    x, dt, A, B, C = _widen(*inputs)
    length, step = x.shape[1], _softplus(dt)
    steps, tokens, Bs, Cs, grad_ys = (_places(tensor) for tensor in (step, x, B, C, grad_y))
    decays, drives, through = _factors(steps, steps * tokens, A, Bs)
    entering, states = _walk_chunks(decays, drives, through)
    h = torch.stack(states)  # (size, batch, chunks, state, channels), as all of the following
    previous = torch.cat([entering.unsqueeze(0), h[:-1]])
    grad_h = torch.stack(_walk_chunks_back(decays, Cs.unsqueeze(-1) * grad_ys.unsqueeze(-2), through))
    grad_exponent = grad_h * decays * previous  # of step * A
    grad_drive = (Bs.unsqueeze(-1) * grad_h).sum(-2)  # of step * x: (size, batch, chunks, channels)
    grad_step = (grad_exponent * A.t()).sum(-2) + grad_drive * tokens
    grads = (
        _join(grad_drive * steps, length),
        _join(grad_step, length) * torch.sigmoid(dt),
        (grad_exponent * steps.unsqueeze(-2)).sum((0, 1, 2)).t(),
        _join((grad_h * (steps * tokens).unsqueeze(-2)).sum(-1), length),
        _join((h * grad_ys.unsqueeze(-2)).sum(-1), length),
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
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _softplus(dt: Tensor) -> Tensor:
    """log(1 + exp(dt)); several times faster on a CPU than `F.softplus` and `log1p`, which are scalar code there."""
    small = torch.exp(-dt.abs())
    one_more = 1 + small
    lost = small - (one_more - 1)  # what rounding took from the sum; without it small steps would be coarse
    return torch.maximum(dt, torch.zeros_like(dt)) + (torch.log(one_more) + lost / one_more)


def _places(tensor: Tensor) -> Tensor:
    """(batch, length, n) as (size, batch, chunks, n): first the place in a chunk; zeros fill the last chunk."""
    length = tensor.shape[1]
    size = math.isqrt(length - 1) + 1  # ceil(sqrt(length))
    count = -(-length // size)
    if padding := count * size - length:  # a step of zero neither decays nor drives a state
        tensor = F.pad(tensor, (0, 0, 0, padding))
    return tensor.reshape(tensor.shape[0], count, size, tensor.shape[2]).movedim(2, 0)


def _join(places: Tensor, length: int) -> Tensor:
    """The inverse of `_places`."""
    return places.movedim(0, 2).flatten(1, 2)[:, :length]


def _factors(steps: Tensor, inputs: Tensor, A: Tensor, Bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What makes each state from the one before, channels last, where arithmetic is widest.

    Args:
        steps: (size, batch, chunks, channels).
        inputs: step * x, the same shape.
        A: (channels, state).
        Bs: (size, batch, chunks, state).

    Returns:
        exp(step A) and step B x, (size, batch, chunks, state, channels), and the product of the decays through each
        chunk, (batch, chunks, state, channels).
    """
    transition = A.t().contiguous()  # its layout decides that of every state
    decays = (steps.unsqueeze(-2) * transition).exp_()  # a second tensor of this size costs more than the exponential
    through = torch.exp(steps.sum(0).unsqueeze(-2) * transition)
    return decays, Bs.unsqueeze(-1) * inputs.unsqueeze(-2), through


def _walk_chunks(decays: Tensor, drives: Tensor, through: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The states that enter the chunks, (batch, chunks, state, channels), and those at each place in them, likewise."""
    decay, drive = decays.unbind(0), drives.unbind(0)
    end = drive[0]
    for k in range(1, len(drive)):
        end = torch.addcmul(drive[k], decay[k], end)
    entering = [torch.zeros_like(end[:, 0])]
    for chunk_end, chunk_decay in zip(end.unbind(1)[:-1], through.unbind(1)[:-1], strict=True):
        entering.append(torch.addcmul(chunk_end, chunk_decay, entering[-1]))
    entry = h = torch.stack(entering, dim=1)
    states = []
    for k in range(len(drive)):
        h = torch.addcmul(drive[k], decay[k], h)
        states.append(h)
    return entry, states


def _walk_chunks_back(decays: Tensor, asked: Tensor, through: Tensor) -> list[Tensor]:
    """Gradient of each state: what its output asks of it, plus the next state's gradient times the decay between."""
    decay, ask = decays.unbind(0), asked.unbind(0)
    leaving = ask[-1] * decay[-1]  # what a chunk hands to the one before, as if it received nothing itself
    for k in reversed(range(len(ask) - 1)):
        leaving = (ask[k] + leaving) * decay[k]
    received = [torch.zeros_like(leaving[:, 0])]
    for chunk_leaving, chunk_decay in zip(leaving.unbind(1)[:0:-1], through.unbind(1)[:0:-1], strict=True):
        received.append(torch.addcmul(chunk_leaving, chunk_decay, received[-1]))
    handed = torch.stack(received[::-1], dim=1)
    grads = []
    for k in reversed(range(len(ask))):
        grads.append(ask[k] + handed)
        handed = grads[-1] * decay[k]
    return grads[::-1]


# The CPU compiler makes one loop nest of all the steps, many times slower than PyTorch's own kernels run them one by
# one, and takes minutes to do so. There the scan is an operator that the compiler calls and does not look into.


def _is_compiled_for_cpu(x: Tensor) -> bool:
    # torch 2.6 cannot tell a strict export from a compilation; export with strict=False there.
    exporting = hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    return x.device.type == "cpu" and torch.compiler.is_dynamo_compiling() and not exporting


@torch.library.custom_op("mambavision::chunked_scan", mutates_args=())
def _opaque_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return _forward(x, dt, A, B, C).contiguous()


@torch.library.custom_op("mambavision::chunked_scan_backward", mutates_args=())
def _opaque_backward(grad_y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> List[Tensor]:  # noqa: UP006  (torch 2.6 reads the schema from this annotation and knows no other spelling)
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
