"""Stochastic depth (Huang et al., arXiv 1603.09382), a residual branch dropped sample by sample."""

from __future__ import annotations

from torch import Tensor, nn

from mambavision.layers.plain import has_hooks


class DropPath(nn.Module):
    """Zeroes a sample's whole branch with probability `rate` in training and scales the rest to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # (batch, ...)
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *([1] * (x.dim() - 1)))

    def factors(self, x: Tensor) -> Tensor | None:
        """What this step multiplies the samples of x with, (batch,) in its type, or None for nothing."""
        if self.rate == 0 or not self.training:
            return None
        return x.new_empty(x.shape[0]).bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def takes_factors(drop_path: nn.Module) -> bool:
    """Whether a branch may be multiplied with the module's `factors` in place of its call."""
    return type(drop_path) is DropPath and not has_hooks(drop_path)
