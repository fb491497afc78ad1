import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing

from mambavision.config import Preprocessing
from mambavision.data.config import AugmentConfig
from mambavision.data.device import DeviceAugment, erase
from mambavision.data.transforms import RandomPadCrop, build_train_transform
from mambavision.inference.preprocess import build_transform
from training_data import pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "rand-m10-n4-p1.0", "original", "augmix-m9"])
@pytest.mark.parametrize("crop", ["rrc", "pad"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_every_policy_gives_pictures_of_the_networks_size(crop, policy, size):
    augment = AugmentConfig(crop=crop, auto_augment=policy, color_jitter=0.4)
    transform = build_train_transform(augment, Preprocessing(img_size=size))
    for image in pictures(30, size=40)[0]:
        varied = transform(Image.fromarray(image))
        assert (varied.mode, varied.size) == ("RGB", size[::-1])


def test_pad_crop_shifts_the_picture_by_at_most_the_padding_and_fills_with_black():
    image = pictures(1)[0][0]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    crop = RandomPadCrop((32, 32), 4)
    random.seed(0)
    seen = {np.asarray(crop(Image.fromarray(image))).tobytes() for _ in range(2000)}
    assert seen == windows


def test_flip_follows_its_probability():
    image = Image.fromarray(pictures(1)[0][0])
    for probability in (0.0, 1.0):
        transform = build_train_transform(
            AugmentConfig(crop="pad", pad=0, hflip=probability), Preprocessing(img_size=(32, 32))
        )
        expected = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if probability else image
        assert transform(image).tobytes() == expected.tobytes()


def test_the_device_normalises_as_prediction_does():
    preprocessing = Preprocessing(img_size=(32, 32), mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.4))
    images, labels = pictures(5)
    augment = DeviceAugment(AugmentConfig(), preprocessing, num_classes=3, smoothing=0.1, device=CPU)
    inputs, targets = augment(torch.from_numpy(images), torch.from_numpy(labels))
    expected = torch.stack([build_transform(preprocessing)(Image.fromarray(image)) for image in images])
    torch.testing.assert_close(inputs, expected, atol=1e-6, rtol=1e-5)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert targets.tolist() == labels.tolist()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_mixes_pictures_and_targets_alike(mode):
    images = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    images[32:] = 255
    labels = torch.cat([torch.zeros(32), torch.ones(32)]).long()
    plain = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
    config = AugmentConfig(mixup=0.8, cutmix=1.0, mix_mode=mode)
    augment = DeviceAugment(config, plain, num_classes=2, smoothing=0.0, device=CPU)
    inputs, targets = augment(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(inputs.mean((1, 2, 3)), targets[:, 1])  # a picture's brightness is its share of class 1


def test_erasing_draws_rectangles_as_timm_does():
    torch.manual_seed(0)
    random.seed(0)
    ones = torch.full((4000, 1, 32, 32), 7.0)
    ours = erase(ones.clone(), 0.25)
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(ones.clone())
    for erased in (ours, theirs):
        assert erased.shape == ones.shape
    statistics = [
        [
            (mask.any((1, 2))).float().mean(),  # how many pictures
            mask[mask.any((1, 2))].float().mean(),  # how much of them
            mask[mask.any((1, 2))].any(2).sum(1).float().std(),  # spread of the heights
            mask[mask.any((1, 2))].any(1).sum(1).float().std(),  # and widths
        ]
        for mask in ((ours != 7)[:, 0], (theirs != 7)[:, 0])
    ]
    np.testing.assert_allclose(statistics[0], statistics[1], rtol=0.08)
    for axis in (1, 2):  # how often each row and each column is hit: less at the border, alike at both
        profiles = [(erased != 7)[:, 0].float().mean((0, axis)) for erased in (ours, theirs)]
        np.testing.assert_allclose(*profiles, atol=0.012)
    masks = (ours != 7)[:, 0]
    rows, columns = masks.any(2), masks.any(1)
    assert torch.equal(masks, rows[:, :, None] & columns[:, None, :])  # each is one rectangle
    noise = ours[ours != 7]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_erasing_follows_its_probability(probability):
    erased = erase(torch.full((200, 3, 8, 8), 7.0), probability)
    assert (erased != 7).any((1, 2, 3)).float().mean() == probability
