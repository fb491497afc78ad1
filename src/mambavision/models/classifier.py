"""The classifier: backbone, batch norm, average pool and a linear head, under timm's contract for backbones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.config import NUM_LEVELS, MambaVisionConfig
from mambavision.models.backbone import MambaVisionBackbone, init_linear


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
        self.norm: nn.Module = nn.BatchNorm2d(config.num_features, eps=1e-5, device=device, dtype=dtype)
        self.head = _head(config.num_features, config.num_classes, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.config.channels[len(self.levels) - 1]

    @property
    def pool_type(self) -> str:
        """How the last map becomes a vector: `avg`, or in timm's form of the network another name of its pools."""
        return "avg"

    @property
    def head_hidden_size(self) -> int:
        """Channels of the pooled vector, which enters the classifier; timm's name."""
        return self.num_features

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a classifier gives logits, not maps
        """Logits, (batch, num_classes), of pictures (batch, in_chans, height, width) of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map after the final norm, (batch, num_features, H / stride, W / stride), rounded up.

        The stride is `config.reductions[-1]`: 32, or less where the stem's strides are 1.
        """
        return self.norm(self._level_maps(x, last=len(self.levels) - 1)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from `forward_features`' map, or with `pre_logits` the pooled vector (batch, num_features)."""
        x = self._pool(x)
        if pre_logits:
            return x
        return self.head(F.dropout(x, self.config.drop_rate, self.training))

    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one of `num_classes` outputs, 0 for none; class names are forgotten."""
        self.config = self.config.replace(num_classes=num_classes, class_names=None)
        weight = next(self.parameters())
        self.head = _head(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` with these `indices` does not need, with timm's arguments.

        Args:
            indices: levels to keep the maps of: a list, or a number for the last so many.
            prune_norm: remove the final norm; it goes anyway when the last level does.
            prune_head: remove the classifier; it goes anyway when the last level does.

        Returns:
            `indices` counted from the first level.

        Raises:
            ValueError: an index names no level.
        """
        taken = self._keep_levels(indices)
        shorter = len(self.levels) < NUM_LEVELS
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0)
        return taken

    def _pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _head(features: int, classes: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    head = nn.Linear(features, classes, device=device, dtype=dtype)
    init_linear(head)
    return head
