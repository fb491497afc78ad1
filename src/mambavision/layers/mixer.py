"""The MambaVision mixer: a selective scan beside a symmetric branch without one (paper, section 3.2, equation 6)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.config import StepBiasInit
from mambavision.layers.plain import are_plain, has_hooks, is_fused
from mambavision.ops import selective_scan, token_conv
from mambavision.ops.precision import at_least_float32

# Range of Mamba's own initial steps (arXiv 2312.00752, section 3.6).
_STEP_RANGE = (1e-3, 1e-1)


class TokenConv(nn.Conv1d):
    """SiLU of each channel's convolution over the tokens of its window, with `nn.Conv1d`'s parameters."""

    def __init__(self, channels: int, kernel_size: int, **factory: Any) -> None:
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False, **factory
        )

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, channels), the same out
        return token_conv(x, self.weight.squeeze(1))


class MambaVisionMixer(nn.Module):
    """out_proj(concat(scan(SiLU(conv(x))), SiLU(conv(z)))) with x, z the halves of in_proj's output.

    The depthwise convolutions look at a token's both neighbours: not causal, unlike Mamba's.
    """

    def __init__(
        self, dim: int, *, d_state: int = 8, d_conv: int = 3, dt_bias_init: StepBiasInit = "zero", **factory: Any
    ) -> None:
        super().__init__()
        half = dim // 2
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.dt_bias_init = dt_bias_init
        self.scan_backend = "auto"
        self.in_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.conv1d_x = TokenConv(half, d_conv, **factory)
        self.conv1d_z = TokenConv(half, d_conv, **factory)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, half, **factory)
        self.A_log = nn.Parameter(torch.empty(half, d_state, **factory))
        self.D = nn.Parameter(torch.empty(half, **factory))
        self.out_proj = nn.Linear(dim, dim, bias=False, **factory)

    def init_scan_parameters(self) -> None:
        """Start of A, D and the step bias (Mamba, section 3.6); the projections are initialised with the network."""
        with torch.no_grad():
            states = torch.arange(1, self.d_state + 1, device=self.A_log.device)
            self.A_log.copy_(states.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            self.dt_proj.bias.zero_()
            if self.dt_bias_init == "log_uniform":
                low, high = (math.log(bound) for bound in _STEP_RANGE)
                step = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp()
                bias = step + torch.log(-torch.expm1(-step))  # inverse softplus
                self.dt_proj.bias.copy_(bias / 2)  # `forward` adds it twice

    def forward(self, x: Tensor) -> Tensor:  # (windows, length, dim), the same out
        x, z = self._convolved(self.in_proj(x))  # (windows, length, half) each
        dt, dt_bias, B, C = self._parameters_of_the_scan(x)
        A = -torch.exp(self.A_log.to(at_least_float32(self.A_log.dtype)))
        y = selective_scan(x, dt, A, B, C, self.D, dt_bias, backend=self.scan_backend)
        return self.out_proj(torch.cat([y, z], dim=-1))

    def _convolved(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU(conv(x)) and SiLU(conv(z)) of (windows, length, dim)."""
        convs = (self.conv1d_x, self.conv1d_z)
        alike = self.conv1d_x.weight.shape == self.conv1d_z.weight.shape
        if both.is_cuda and alike and all(type(conv) is TokenConv and not has_hooks(conv) for conv in convs):
            # A GPU makes one pass over both halves, here and for their gradients.
            x, z = token_conv(both, torch.cat([conv.weight for conv in convs]).squeeze(1)).chunk(2, dim=-1)
            return x, z
        x, z = both.chunk(2, dim=-1)
        return self.conv1d_x(x), self.conv1d_z(z)

    def _parameters_of_the_scan(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps of all channels, (windows, length, half), before the softplus, the bias still to add, and B and C.

        The published network adds the step bias in the projection and once more in the scan; its weights need both.
        """
        states = [self.d_state, self.d_state]
        plain = are_plain(self.x_proj, self.dt_proj) and self.x_proj.bias is None
        if plain and is_fused(x) and torch.is_grad_enabled():
            # One product with the product of both weights: the narrow one between takes a GPU longer, twice backwards.
            low, rest = self.x_proj.weight.split([self.dt_rank, 2 * self.d_state])
            weight = torch.cat([self.dt_proj.weight @ low, rest.to(x.dtype)])
            dt, B, C = F.linear(x, weight).split([x.shape[-1], *states], dim=-1)
            return dt, 2 * self.dt_proj.bias, B, C
        dt, B, C = self.x_proj(x).split([self.dt_rank, *states], dim=-1)
        if are_plain(self.dt_proj):
            return F.linear(dt, self.dt_proj.weight), 2 * self.dt_proj.bias, B, C
        # Only its own call may know the parameters, when they are offloaded or adapted: the bias is what it makes of 0.
        return self.dt_proj(dt), self.dt_proj(dt.new_zeros(1, self.dt_rank))[0], B, C
