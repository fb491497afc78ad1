"""The classifier: backbone, batch norm, average pool and a linear head, under timm's contract for backbones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.config import NUM_LEVELS, MambaVisionConfig
from mambavision.models.backbone import MambaVisionBackbone


class MambaVision(MambaVisionBackbone):
    """Picture in, logits out (paper, figure 2).

    Args:
        config: the network; `num_classes` 0 leaves the head out and gives the pooled vector.
        device: where parameters are made, `meta` included.
        dtype: type of parameters and buffers.
    """

    def __init__(
        self,
        config: MambaVisionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(config.num_features, eps=1e-5, device=device, dtype=dtype)
        self.head = _head(config.num_features, config.num_classes, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the pooled vector."""
        return self.config.num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels that enter the classifier; timm's name for `num_features` here."""
        return self.config.num_features

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a classifier gives logits, not maps
        """Logits, (batch, num_classes), of pictures (batch, in_chans, height, width) of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map after the final norm, (batch, num_features, H / 32, W / 32)."""
        return self.norm(self._level_maps(x, last=NUM_LEVELS - 1)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from `forward_features`' map, or with `pre_logits` the pooled vector (batch, num_features)."""
        x = x.mean((2, 3))
        if pre_logits:
            return x
        return self.head(F.dropout(x, self.config.drop_rate, self.training))

    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one of `num_classes` outputs, 0 for none; class names are forgotten."""
        self.config = self.config.replace(num_classes=num_classes, class_names=None)
        weight = self.norm.weight
        self.head = _head(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _head(features: int, classes: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    head = nn.Linear(features, classes, device=device, dtype=dtype)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
