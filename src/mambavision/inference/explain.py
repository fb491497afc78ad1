"""Where a classifier looked: its class-activation map and its attention, as maps over the picture (paper, section 5).

The class-activation map is exact, since the head is a linear layer behind an average pool: the logit of a class is the
mean over the cells of the last map of what the head makes of each cell. `mambavision.inference.overlay` draws the maps.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from mambavision.config import Preprocessing
from mambavision.inference.gpu import KernelTokens
from mambavision.inference.images import Picture, picture_name, read_image
from mambavision.inference.predictor import Prediction, Predictor
from mambavision.inference.preprocess import MAX_RESIZED_PIXELS, build_transform
from mambavision.layers.attention import Attention
from mambavision.layers.window import window_partition, window_reverse
from mambavision.models.classifier import MambaVision

SHOWN_CLASSES = 3
# A picture is shown at least this large, however small the network's input is.
SHOWN_SIDE = 320


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """The attention of one block, averaged over its heads.

    Attributes:
        level: the block's level, 2 or 3.
        block: its place in the level.
        window: side of a window in tokens.
        rows: rows of the level's map.
        columns: columns of the level's map.
        weights: (windows, length, length), float32: what each token of a window takes from each; rows sum to 1. At the
            right and the bottom, windows may reach beyond the map.
    """

    level: int
    block: int
    window: int
    rows: int
    columns: int
    weights: Tensor

    @property
    def name(self) -> str:
        """Where in the network it is."""
        return f"levels.{self.level}.blocks.{self.block}"

    def received(self) -> Tensor:
        """Attention that each token gets from those of its window, (rows, columns); 1 is what even attention gives."""
        inside = window_partition(torch.ones(1, 1, self.rows, self.columns), self.window)  # (windows, length, 1)
        mean = (self.weights * inside).sum(1) / inside.sum(1)  # (windows, length), over queries inside of the map
        return self._stitch(mean * mean.shape[-1])

    def sent(self, x: float, y: float) -> Tensor:
        """Attention that the token at a point pays to each, (rows, columns); 1 is even, 0 stands for other windows.

        Args:
            x: place from the left of the map, in 0..1.
            y: place from its top, in 0..1.

        Raises:
            ValueError: the point lies outside.
        """
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(f"The point must lie in 0..1 both ways, got {x:g},{y:g}.")
        chosen = torch.zeros(1, 1, self.rows, self.columns)
        chosen[0, 0, min(int(y * self.rows), self.rows - 1), min(int(x * self.columns), self.columns - 1)] = 1
        weights = (self.weights * window_partition(chosen, self.window)).sum(1)  # (windows, length)
        return self._stitch(weights * weights.shape[-1])

    def _stitch(self, values: Tensor) -> Tensor:  # (windows, length) to (rows, columns)
        return window_reverse(values[..., None], self.window, self.rows, self.columns)[0, 0]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a classifier said of a picture, and what that rests on.

    Attributes:
        source: the picture's path, or what it is called without one.
        prediction: the likeliest classes.
        label: the class that `activation` is about.
        index: its place among the network's outputs.
        probability: the network's, of that class.
        activation: class-activation map, (rows, columns) of the last level, float32; its mean is the class's logit.
        attention: the attention of each block that attends, in order; empty where all scan.
        seen: the picture as the network saw it.
        shown: the same part of the picture, larger where the network's input is small.
        reductions: input pixels under one side of a cell, a level.
    """

    source: str
    prediction: Prediction
    label: str
    index: int
    probability: float
    activation: Tensor
    attention: tuple[AttentionMap, ...]
    seen: Image.Image
    shown: Image.Image
    reductions: tuple[int, ...]

    def attention_of(self, level: int, point: tuple[float, float] | None = None) -> Tensor:
        """Mean over the level's blocks of the attention received, or of what the token at `point` (x, y) pays.

        Raises:
            ValueError: no block of this level attends, or the point lies outside.
        """
        maps = [block for block in self.attention if block.level == level]
        if not maps:
            raise ValueError(f"No block of level {level} attends.")
        return torch.stack([block.received() if point is None else block.sent(*point) for block in maps]).mean(0)


def explain(
    predictor: Predictor,
    picture: Picture,
    *,
    target: str | int | None = None,
    img_size: tuple[int, int] | None = None,
) -> Explanation:
    """Say where the network looked in one picture.

    Args:
        predictor: network, preprocessing and labels.
        picture: a path, the bytes of a file, an opened file, a PIL image or a uint8 array.
        target: the class to explain, by name or by place among the outputs; None for the likeliest.
        img_size: height and width in pixels that the picture is resized to, other than the network's own; the windows
            stay as they are.

    Raises:
        ImageError: the picture cannot be read.
        ValueError: no such class, a size too large to prepare pictures of, a network that does not average its last
            map or is optimised for a GPU, or an output that is not finite.
    """
    pool = predictor.model.pool_type
    if pool != "avg":
        raise ValueError(f"A class-activation map needs a network that averages its last map, not {pool!r}.")
    if any(isinstance(module, KernelTokens) for module in predictor.model.modules()):
        raise ValueError("A network optimised for a GPU forms no attention weights; explain the one it was made of.")
    name = picture_name(picture) or "the picture"
    chosen = None if target is None else find_class(target, predictor.labels)
    settings = preprocessing_of_size(predictor.config.preprocessing, img_size)
    height, width = settings.img_size
    factor = max(1, -(-SHOWN_SIDE // max(height, width)))
    image = read_image(picture, name=name)
    transform = build_transform(settings, predictor.config.in_chans).transforms
    seen = Compose(transform[:-2])(image)  # all but turning pixels into numbers
    larger = build_transform(replace(settings, img_size=(factor * height, factor * width)), predictor.config.in_chans)
    shown = Compose(larger.transforms[:-2])(image)

    inputs = predictor.to_network(Compose(transform[-2:])(seen)[None])
    with torch.inference_mode(), _attention_weights(predictor.model) as weights:
        final = predictor.model.forward_features(inputs)
        logits = predictor.model.forward_head(final).float()[0]
        head = predictor.model.head
        assert isinstance(head, nn.Linear)  # a predictor has classes
        if not logits.isfinite().all():
            raise ValueError(f"{name}: the network's output is not finite.")
        probabilities = logits.softmax(-1).cpu()
        index = int(probabilities.argmax()) if chosen is None else chosen
        bias = None if head.bias is None else head.bias[index : index + 1].float()
        cells = final[0].float().permute(1, 2, 0)  # (rows, columns, channels)
        activation = F.linear(cells, head.weight[index : index + 1].float(), bias)[..., 0]
    reductions = predictor.config.reductions
    best = probabilities.topk(min(SHOWN_CLASSES, len(predictor.labels)))
    return Explanation(
        source=name,
        prediction=Prediction(
            source=name,
            labels=tuple(predictor.labels[place] for place in best.indices.tolist()),
            indices=tuple(best.indices.tolist()),
            probabilities=tuple(best.values.tolist()),
        ),
        label=predictor.labels[index],
        index=index,
        probability=float(probabilities[index]),
        activation=activation.cpu().clone(),
        attention=tuple(
            AttentionMap(
                level=level,
                block=block,
                window=predictor.config.window_size[level],
                rows=-(-height // reductions[level]),
                columns=-(-width // reductions[level]),
                weights=values,
            )
            for (level, block), values in sorted(weights.items())
        ),
        seen=seen,
        shown=shown,
        reductions=reductions,
    )


def preprocessing_of_size(settings: Preprocessing, img_size: tuple[int, int] | None) -> Preprocessing:
    """`settings` for another height and width, None for their own.

    Raises:
        ValueError: pictures would be resized to more pixels than `preprocess.MAX_RESIZED_PIXELS`.
    """
    if img_size is None:
        return settings
    sized = replace(settings, img_size=img_size)
    longest = math.isqrt(MAX_RESIZED_PIXELS)
    if max(sized.resize_size) > longest:
        height, width = img_size
        raise ValueError(
            f"An image size of {height} x {width} px is too large; choose one of at most "
            f"{int(longest * settings.crop_pct)} px a side."
        )
    return sized


def find_class(target: str | int, labels: tuple[str, ...]) -> int:
    """Place among the outputs of a class that is given by name, in any case, or by place.

    Raises:
        ValueError: there is none; the message tells the nearest names or the number of classes.
    """
    if isinstance(target, str):
        folded = [label.casefold() for label in labels]
        if target.casefold() in folded:
            return folded.index(target.casefold())
        if not target.isdecimal():
            near = difflib.get_close_matches(target.casefold(), folded, n=3)
            names = ", ".join(labels[folded.index(name)] for name in near or folded[:3])
            raise ValueError(f"No class is called {target!r}; the {'nearest' if near else 'first'} names are {names}.")
    if not 0 <= int(target) < len(labels):
        raise ValueError(f"There is no class {target}; the classes are 0 to {len(labels) - 1}.")
    return int(target)


@contextlib.contextmanager
def _attention_weights(model: MambaVision) -> Iterator[dict[tuple[int, int], Tensor]]:
    """A dictionary that a forward pass fills: (level, block) to weights (windows, length, length), mean over heads."""
    weights: dict[tuple[int, int], Tensor] = {}
    undo = contextlib.ExitStack()
    with undo:
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                _, level, _, block, _ = name.split(".")  # levels.2.blocks.4.mixer
                place = (int(level), int(block))

                def keep(_module: nn.Module, _inputs: object, values: Tensor, place: tuple[int, int] = place) -> None:
                    weights[place] = values.mean(1, dtype=torch.float32).cpu().clone()

                undo.callback(setattr, module, "fused_attn", module.fused_attn)
                module.fused_attn = False
                undo.callback(module.attn_drop.register_forward_hook(keep).remove)
        yield weights
