"""The evaluation transform against timm's own, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from mambavision.config import VARIANTS, Preprocessing
from mambavision.inference import preprocess
from mambavision.inference.preprocess import build_transform

# (width, height): landscape, portrait, square, smaller than the crop, one pixel wide or high, very long.
SIZES = [(451, 300), (333, 500), (256, 256), (37, 23), (1, 41), (41, 1), (2900, 31)]


def picture(width, height, mode="RGB"):
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def timm_transform(settings):
    data = pytest.importorskip("timm.data")
    return data.create_transform(
        input_size=(3, *settings.img_size),
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        crop_pct=settings.crop_pct,
        crop_mode=settings.crop_mode,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_timm_to_the_last_bit(variant):
    settings = VARIANTS[variant].preprocessing
    ours, theirs = build_transform(settings), timm_transform(settings)
    for size in SIZES:
        image = picture(*size)
        result = ours(image)
        assert result.dtype == torch.float32
        assert result.shape == (3, *settings.img_size)
        assert torch.equal(result, theirs(image)), size


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("img_size", "crop_pct"), [((64, 64), 0.875), ((64, 96), 0.9), ((97, 55), 1.0)])
def test_other_settings_equal_timm_too(crop_mode, interpolation, img_size, crop_pct):
    settings = Preprocessing(img_size=img_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    for size in SIZES:
        image = picture(*size)
        assert torch.equal(build_transform(settings)(image), timm_transform(settings)(image)), size


def test_each_setting_changes_the_result():
    image, base = picture(120, 80), Preprocessing(img_size=(32, 32))
    before = build_transform(base)(image)
    changes = (
        {"crop_pct": 0.8},
        {"crop_mode": "squash"},
        {"interpolation": "bilinear"},
        {"mean": (0.5,) * 3},
        {"std": (0.3,) * 3},
    )
    for change in changes:
        assert not torch.equal(build_transform(dataclasses.replace(base, **change))(image), before), change


def test_a_grey_network_gets_luma_with_averaged_statistics():
    settings = Preprocessing(img_size=(20, 30), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    image = picture(30, 20)
    result = build_transform(settings, in_chans=1)(image)
    expected = (torch.from_numpy(np.array(image.convert("L"))) / 255 - 0.4) / 0.2
    torch.testing.assert_close(result, expected[None])
    one_value = build_transform(dataclasses.replace(settings, mean=(0.4,), std=(0.2,)), in_chans=1)(image)
    torch.testing.assert_close(result, one_value)


def test_channels_that_a_photograph_does_not_have_are_refused():
    with pytest.raises(ValueError, match="The model takes 4"):
        build_transform(Preprocessing(), in_chans=4)
    with pytest.raises(ValueError, match="normalises 2 channels and the model takes 3"):
        build_transform(Preprocessing(mean=(0.5, 0.5), std=(1.0, 1.0)))


@pytest.mark.parametrize("size", [(3, 999), (999, 3)])
@pytest.mark.parametrize("img_size", [(24, 24), (24, 16)])
def test_a_very_long_picture_is_trimmed_about_its_centre(monkeypatch, size, img_size):
    ramp = np.linspace(0, 255, 999).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None] if size[1] == 999 else ramp[None, :], (size[1], size[0]))
    image = Image.fromarray(np.repeat(pixels[:, :, None], 3, axis=2))
    settings = Preprocessing(img_size=img_size, mean=(0, 0, 0), std=(1, 1, 1))
    whole = build_transform(settings)(image)
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 24 * 24 * 20)
    trimmed = build_transform(settings)(image)
    torch.testing.assert_close(trimmed, whole, rtol=0, atol=1.01 / 255)
    assert max(preprocess.TrimEnds(24)(image).size) < 70  # of 999


def test_one_pixel_by_a_million_takes_no_gigabytes():
    assert build_transform(Preprocessing())(Image.new("RGB", (1_000_000, 1), "red")).shape == (3, 224, 224)
