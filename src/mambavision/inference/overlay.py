"""An `Explanation` as one picture: labelled panels with the maps as colours over the photograph."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mambavision.files import replaced_when_done
from mambavision.inference.explain import AttentionMap, Explanation
from mambavision.inference.images import printable

PANEL = 320  # longer side of a panel, px
_GAP = 16
_TITLE = 24
_COLUMNS = 4
_INK, _FAINT, _PAPER = (28, 30, 34), (110, 114, 122), (255, 255, 255)
# Google's Turbo at equal steps without its dark ends: blue, cyan, green, yellow, orange, red.
_COLOURS = np.array(
    [
        (65, 69, 171),
        (70, 117, 237),
        (57, 162, 252),
        (27, 207, 212),
        (36, 236, 166),
        (97, 252, 108),
        (164, 252, 59),
        (209, 232, 52),
        (243, 198, 58),
        (254, 155, 45),
        (243, 99, 21),
        (217, 56, 6),
        (177, 25, 1),
    ],
    dtype=np.float32,
)


def overlay(
    explanation: Explanation, *, per_block: bool = False, point: tuple[float, float] | None = None
) -> Image.Image:
    """Draw the picture as the network saw it, its class-activation map and its attention, each from low to high.

    Args:
        explanation: what `explain` gave.
        per_block: a panel for the attention of each block instead of their mean, a level.
        point: (x, y) in 0..1; attention is then what the token there pays, instead of what each token receives.

    Raises:
        ValueError: the point lies outside of the picture.
    """
    height, width = explanation.seen.height, explanation.seen.width
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    photograph = explanation.shown.convert("RGB").resize(size, Image.Resampling.LANCZOS)

    def panel(values: Tensor, level: int, marked: tuple[float, float] | None = None) -> Image.Image:
        reduction = explanation.reductions[level]
        drawn = _coloured(photograph, values, box=(0, 0, width / reduction, height / reduction))
        if marked is not None:
            _mark(drawn, marked)
        return drawn

    what = "received" if point is None else "paid by x"
    seen = explanation.seen.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BOX)
    panels = [
        (f"Input, {height} x {width} px", seen),  # in the order of `img_size`
        (f"Activation: {explanation.label} {explanation.probability:.1%}", panel(explanation.activation, -1)),
    ]
    if per_block:
        maps = [
            (f"level {block.level} block {block.block}", block.level, _attention(block, point))
            for block in explanation.attention
        ]
    else:
        levels = sorted({block.level for block in explanation.attention})
        maps = [(f"level {level}", level, explanation.attention_of(level, point)) for level in levels]
    panels += [(f"Attention {what}, {name}", panel(values, level, point)) for name, level, values in maps]
    classes = zip(explanation.prediction.labels, explanation.prediction.probabilities, strict=True)
    heading = os.path.basename(explanation.source) or explanation.source
    return _sheet(f"{heading}: " + ", ".join(f"{name} {value:.1%}" for name, value in classes), panels)


def save_overlay(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, atomically; missing folders are made."""
    with replaced_when_done(Path(path)) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def _attention(block: AttentionMap, point: tuple[float, float] | None) -> Tensor:
    return block.received() if point is None else block.sent(*point)


def _coloured(photograph: Image.Image, values: Tensor, *, box: tuple[float, float, float, float]) -> Image.Image:
    """`values` (rows, columns) stretched from lowest to highest, as colours over the grey photograph."""
    low, high = values.aminmax()
    scaled = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    smooth = Image.fromarray(scaled.numpy().astype(np.float32)).resize(
        photograph.size, Image.Resampling.BICUBIC, box=box
    )
    strength = np.asarray(smooth).clip(0, 1)[..., None]
    grey = np.asarray(photograph.convert("L"), np.float32)[..., None]
    mixed = 0.5 * grey + 0.5 * _colours(strength[..., 0])
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _colours(strength: np.ndarray) -> np.ndarray:
    """(..., 3) in 0..255 for values in 0..1."""
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(strength, places, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def _mark(panel: Image.Image, point: tuple[float, float]) -> None:
    draw = ImageDraw.Draw(panel)
    x, y = point[0] * (panel.width - 1), point[1] * (panel.height - 1)
    for colour, thickness in ((_INK, 5), (_PAPER, 2)):
        for slope in (-1, 1):
            draw.line((x - 6, y - 6 * slope, x + 6, y + 6 * slope), fill=colour, width=thickness)


def _sheet(heading: str, panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    width = max(image.width for _, image in panels)
    height = max(image.height for _, image in panels)
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    cell = max(width, 250)  # for the title
    sheet = Image.new("RGB", (columns * (cell + _GAP) + _GAP, 44 + rows * (_TITLE + height + _GAP) + 34), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (_GAP, 14), heading, 18, sheet.width - 2 * _GAP, _INK)
    for place, (title, image) in enumerate(panels):
        left = _GAP + place % columns * (cell + _GAP)
        top = 44 + place // columns * (_TITLE + height + _GAP)
        _text(draw, (left, top), title, 14, cell, _FAINT)
        sheet.paste(image, (left, top + _TITLE))
    bar = _colours(np.tile(np.linspace(0, 1, 120), (10, 1)))
    top = sheet.height - 30
    _text(draw, (_GAP, top), "least", 13, 60, _FAINT)
    sheet.paste(Image.fromarray(bar.astype(np.uint8)), (_GAP + 40, top + 4))
    _text(draw, (_GAP + 168, top), "most, in each panel", 13, 200, _FAINT)
    return sheet


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int, colour: tuple[int, int, int]
) -> None:
    """One line of text, shortened to `width` pixels."""
    font = ImageFont.load_default(size)
    text = printable(text)
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(f"{text}...", font=font) > width:
            text = text[:-1]
        text += "..."
    draw.text(place, text, fill=colour, font=font)
