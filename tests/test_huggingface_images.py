"""Image processors against the evaluation transform, whose pixels the published accuracies were measured with."""

# ruff: noqa: E402  (what comes after the check for transformers needs it)
import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from transformers import AutoImageProcessor

from huggingface_models import tiny_config, tiny_network
from mambavision import Predictor
from mambavision.config import VARIANTS
from mambavision.inference.picture_files import SAMPLES
from mambavision.inference.preprocess import build_transform
from mambavision.integrations.huggingface import (
    IMAGE_PROCESSORS,
    MambaVisionConfig,
    MambaVisionForImageClassification,
    MambaVisionImageProcessor,
)

every_backend = pytest.mark.parametrize("backend", sorted(IMAGE_PROCESSORS))
# One of 255 grey levels in the units of the normalised picture.
LEVEL = 1 / 255 / min(VARIANTS["mamba_vision_T"].preprocessing.std)


def photograph(size):
    with Image.open(SAMPLES / "cat.jpg") as image:
        return image.convert("RGB").resize(size)


def pixels(processor, pictures, **options):
    batch = processor(pictures, return_tensors="pt", **options)["pixel_values"]
    assert batch.dtype == torch.float32
    return batch


@every_backend
@pytest.mark.parametrize("size", [(300, 300), (251, 333), (333, 250), (97, 411), (64, 64), (40, 31)])
@pytest.mark.parametrize("variant", ["mamba_vision_T2", "mamba_vision_S", "mamba_vision_L2_512_21k"])
def test_pictures_are_prepared_as_for_the_published_accuracies(backend, size, variant):
    preprocessing = VARIANTS[variant].preprocessing
    picture = photograph(size)
    expected = build_transform(preprocessing)(picture)
    processor = IMAGE_PROCESSORS[backend].from_model_config(MambaVisionConfig.from_network_config(VARIANTS[variant]))
    (found,) = pixels(processor, picture)
    if backend == "pil":
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    else:
        difference = (found - expected).abs()
        assert difference.max() < 2.1 * LEVEL
        assert difference.mean() < 0.15 * LEVEL


@every_backend
def test_pictures_come_in_any_form(backend):
    processor = IMAGE_PROCESSORS[backend].from_model_config(tiny_config())
    picture = photograph((90, 70))
    expected = pixels(processor, picture)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (array, array.transpose(2, 0, 1), tensor):
        assert torch.equal(pixels(processor, form), expected)
    assert torch.equal(pixels(processor, [picture, picture])[1], expected[0])
    grey = picture.convert("L")
    assert torch.equal(pixels(processor, grey), pixels(processor, grey.convert("RGB")))
    two_sizes = pixels(processor, [picture, photograph((50, 80))])
    assert two_sizes.shape == (2, 3, 64, 64)
    assert torch.equal(two_sizes[0], expected[0])
    if backend == "pil":  # the fast processors of transformers 4 give PyTorch's tensors alone
        assert np.array_equal(processor(picture, return_tensors="np")["pixel_values"], expected.numpy())


@every_backend
def test_every_step_can_be_left_out(backend):
    processor = IMAGE_PROCESSORS[backend].from_model_config(tiny_config())
    picture = photograph((64, 64))
    raw = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()
    plain = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    assert torch.equal(processor(picture, return_tensors="pt", **plain)["pixel_values"][0].float(), raw)
    torch.testing.assert_close(pixels(processor, picture, **{**plain, "do_rescale": True})[0], raw / 255)
    cropped = processor(picture, return_tensors="pt", **{**plain, "do_center_crop": True}, crop_size=32)
    assert torch.equal(cropped["pixel_values"][0].float(), raw[:, 16:48, 16:48])
    padded = processor(picture, return_tensors="pt", **{**plain, "do_center_crop": True}, crop_size=80)
    assert torch.equal(padded["pixel_values"][0, :, 8:72, 8:72].float(), raw)


@every_backend
def test_a_processor_survives_its_file(backend, tmp_path):
    processor = IMAGE_PROCESSORS[backend](size={"height": 50, "width": 40}, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path)
    again = IMAGE_PROCESSORS[backend].from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found) in IMAGE_PROCESSORS.values()
    assert list(found.image_mean) == [0.4, 0.5, 0.6]


def test_by_default_pictures_are_prepared_for_the_smallest_variant():
    default, of_model = MambaVisionImageProcessor(), MambaVisionImageProcessor.from_model_config(MambaVisionConfig())
    assert torch.equal(pixels(default, photograph((300, 250))), pixels(of_model, photograph((300, 250))))


@every_backend
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(300, 300), (90, 70), (411, 97)])
def test_networks_of_other_shapes_and_of_one_channel(backend, crop_mode, channels, size, tmp_path):
    config = tiny_config(image_size=(64, 96), crop_mode=crop_mode, num_channels=channels)
    expected = build_transform(config.network_config().preprocessing, channels)(photograph(size))
    processor = IMAGE_PROCESSORS[backend].from_model_config(config)
    processor.save_pretrained(tmp_path)
    for each in (processor, IMAGE_PROCESSORS[backend].from_pretrained(tmp_path)):
        (found,) = pixels(each, photograph(size))
        assert found.shape == (channels, 64, 96)
        if backend == "pil":
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        else:
            assert (found - expected).abs().max() < 2.1 * LEVEL


def test_a_pipeline_of_a_network_of_one_channel(tmp_path):
    network = tiny_network(in_chans=1)
    MambaVisionForImageClassification.from_network(network).save_pretrained(tmp_path)
    found = transformers.pipeline("image-classification", model=str(tmp_path))(str(SAMPLES / "cat.jpg"), top_k=10)
    (expected,) = Predictor(checkpoint=tmp_path, device="cpu")([SAMPLES / "cat.jpg"], top_k=10)
    scores = dict(zip(expected.labels, expected.probabilities, strict=True))
    for entry in found:
        assert entry["score"] == pytest.approx(scores[entry["label"]], abs=1e-3)  # torchvision resizes otherwise
