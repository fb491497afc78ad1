"""The kernels of the attention inside windows as an operator that PyTorch knows, with its gradient.

Imported only where the backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from mambavision.ops.launch import launcher
from mambavision.ops.window_attention.kernels import attend_backward_kernel, attend_kernel, mean_kernel

BLOCK, STEP, WARPS, STAGES = 64, 32, 4, 3


@triton_op("mambavision::window_attention", mutates_args=())
def window_attention(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and what the backward needs of it: float32 (windows, heads, length)."""
    windows, length, inner = qkv.shape
    out = torch.empty((windows, length, inner // 3), dtype=qkv.dtype, device=qkv.device)
    logs = torch.empty((windows, num_heads, length), dtype=torch.float32, device=qkv.device)
    if out.numel():
        launcher(attend_kernel)[(windows * num_heads, triton.cdiv(length, BLOCK))](
            qkv.contiguous(), out, logs, length, **_settings(inner, num_heads, scale)
        )
    return out, logs


@triton_op("mambavision::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, num_heads: int, scale: float
) -> Tensor:
    """Gradient of qkv, (windows, length, 3 x channels)."""
    windows, length, inner = qkv.shape
    grad_qkv = torch.empty((windows, length, inner), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        settings = _settings(inner, num_heads, scale)
        grad_out = grad_out.contiguous()
        means = torch.empty_like(logs)
        blocks = triton.cdiv(length, BLOCK)
        once = {name: settings[name] for name in ("HEADS", "WIDTH", "D", "BLOCK", "num_warps")}
        launcher(mean_kernel)[(windows * num_heads, blocks)](out, grad_out, means, length, **once)
        launcher(attend_backward_kernel)[(windows * num_heads, 2 * blocks)](
            qkv.contiguous(), grad_out, logs, means, grad_qkv, length, **settings
        )
    return grad_qkv


def _settings(inner: int, num_heads: int, scale: float) -> dict[str, Any]:
    width = inner // (3 * num_heads)
    padded = max(16, triton.next_power_of_2(width))  # what a matrix unit takes
    return {
        "HEADS": num_heads,
        "WIDTH": width,
        "D": padded,
        "SCALE": scale,
        "BLOCK": BLOCK,
        "STEP": STEP,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return window_attention_backward(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


window_attention.register_autograd(_differentiate, setup_context=_setup_context)
