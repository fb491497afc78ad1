"""`Predictor` on a small random network, compared with running the network by hand; and on the packaged one."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambavision import Predictor, create_model
from mambavision.config import UnknownVariantError, get_config
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import SAMPLES, sample_pictures
from mambavision.inference.predictor import PACKAGED_MODEL, DeviceError, class_labels
from mambavision.inference.preprocess import build_transform
from mambavision.weights import WEIGHTS, CheckpointError, save_checkpoint

NAMES = tuple("abcdefg")
CAT, DOG = SAMPLES / "cat.jpg", SAMPLES / "dog.jpg"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = create_model("mamba_vision_test_tiny", class_names=NAMES, img_size=48, attn_drop_rate=0.5)
    torch.nn.init.normal_(network.head.weight)  # far from uniform
    return network


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, model.state_dict(), model.config)
    return path


def by_hand(model, path):
    with torch.no_grad():
        logits = model.eval()(build_transform(model.config.preprocessing)(read_image(path))[None])
    return logits.softmax(-1)[0]


def test_the_three_lines_equal_the_network_run_by_hand(model, checkpoint):
    predictions = Predictor(checkpoint=checkpoint)([CAT, DOG], top_k=3)
    for path, prediction in zip((CAT, DOG), predictions, strict=True):
        expected = by_hand(model, path).sort(descending=True)
        assert prediction.source == str(path)
        assert prediction.indices == tuple(expected.indices[:3].tolist())
        assert prediction.labels == tuple(NAMES[index] for index in prediction.indices)
        np.testing.assert_allclose(prediction.probabilities, expected.values[:3], rtol=1e-4)
        assert prediction.error is None
        best = f"{prediction.labels[0]} {prediction.probabilities[0]:.1%}"
        assert str(prediction).startswith(f"{path}: {best}, ")


def test_every_kind_of_picture_alone_and_in_a_list(model):
    predictor = Predictor(model)
    expected = predictor(CAT)
    assert len(expected) == 1
    image = Image.open(CAT)
    for picture in (str(CAT), CAT.read_bytes(), io.BytesIO(CAT.read_bytes()), image, np.asarray(image)):
        (prediction,) = predictor(picture)
        assert prediction.probabilities == expected[0].probabilities
    batch = np.stack([np.asarray(image)] * 2)
    assert [prediction.source for prediction in predictor(batch)] == ["picture 1", "picture 2"]
    assert predictor([]) == []


def test_broken_pictures_keep_their_place_and_stop_nothing(model, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(CAT.read_bytes()[:5000])
    pictures = [broken, CAT, tmp_path / "missing.png", b"", DOG, np.zeros((3, 3))]
    predictions = Predictor(model, batch_size=2)(pictures)
    errors = ("is broken", None, "does not exist", "picture 4 is empty", None, "picture 6 is an array")
    for prediction, error in zip(predictions, errors, strict=True):
        assert (prediction.error is None) == (error is None)
        assert error is None or (
            error in prediction.error and prediction.labels == () and str(prediction) == prediction.error
        )
    assert predictions[1].source == str(CAT)


def test_the_batch_size_changes_nothing_but_the_batches(model):
    paths = sample_pictures()
    one, many = (Predictor(model, batch_size=size)(paths, top_k=99) for size in (1, 5))
    for first, second in zip(one, many, strict=True):
        assert sorted(first.labels) == sorted(NAMES)  # all, where top_k asks for more
        a, b = (dict(zip(each.indices, each.probabilities, strict=True)) for each in (first, second))
        np.testing.assert_allclose([a[index] for index in range(7)], [b[index] for index in range(7)], rtol=1e-4)


def test_streaming_reads_no_further_than_one_batch(model):
    read = []

    def paths():
        for path in [CAT] * 9:
            read.append(path)
            yield path

    stream = Predictor(model, batch_size=3).stream(paths())
    next(stream)
    assert len(read) == 3
    assert len(list(stream)) == 8


def test_the_network_is_switched_to_evaluation_and_keeps_its_type():
    network = create_model("mamba_vision_test_tiny", drop_rate=0.9).train()
    predictor = Predictor(network.bfloat16())
    assert predictor(CAT) == predictor(CAT)
    assert not network.training
    assert next(network.parameters()).dtype == torch.bfloat16


def test_a_grey_network_takes_colour_pictures():
    network = create_model("mamba_vision_test_tiny", in_chans=1)
    colour, grey = Predictor(network)([Image.open(CAT), Image.open(CAT).convert("L")])
    np.testing.assert_allclose(colour.probabilities, grey.probabilities, rtol=1e-4)
    with pytest.raises(ValueError, match="The model takes 4"):
        Predictor(create_model("mamba_vision_test_tiny", in_chans=4))


def test_output_that_is_not_finite_is_an_error_of_the_picture():
    network = create_model("mamba_vision_test_tiny")
    torch.nn.init.constant_(network.head.bias, float("nan"))
    (prediction,) = Predictor(network)(CAT)
    assert "not finite" in prediction.error


def test_labels():
    assert class_labels(get_config("mamba_vision_test_tiny", class_names=tuple("0123456789"))) == tuple("0123456789")
    assert class_labels(get_config("mamba_vision_test_tiny"))[3] == "class 3"
    imagenet = class_labels(get_config("mamba_vision_T"))
    assert len(imagenet) == 1000
    assert (imagenet[0], imagenet[999]) == ("tench", "toilet tissue")
    with pytest.raises(ValueError, match="no classifier"):
        class_labels(get_config("mamba_vision_T", num_classes=0))


def test_wrong_use_is_said(model, checkpoint, tmp_path):
    with pytest.raises(UnknownVariantError, match="mamba_vision_T"):
        Predictor("mamba_vision_TT")
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
        Predictor(checkpoint=tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="mamba_vision_T"):
        Predictor("mamba_vision_T", checkpoint=checkpoint)
    with pytest.raises(ValueError, match="not both"):
        Predictor(model, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="batch_size"):
        Predictor(model, batch_size=0)
    with pytest.raises(ValueError, match="top_k"):
        Predictor(model).stream([CAT], top_k=0)
    with pytest.raises(TypeError, match="MambaVisionBackbone"):
        Predictor(create_model("mamba_vision_test_tiny", features_only=True))
    for device in ("abacus", "cuda:99", "meta"):
        with pytest.raises(DeviceError, match=device):
            Predictor(checkpoint=checkpoint, device=device)


def test_public_weights_bring_imagenet_labels_and_preprocessing(tmp_path, monkeypatch):
    """`Predictor("mamba_vision_T")` with the hub's answer replaced by a file of the public layout."""
    network = create_model("mamba_vision_T")
    path = tmp_path / "mambavision_tiny_1k.pth.tar"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, path)
    monkeypatch.setattr("mambavision.factory.fetch_weights", lambda *_, **__: path)
    (prediction,) = Predictor("mamba_vision_T")(CAT, top_k=1000)
    assert set(prediction.labels) == set(class_labels(network.config))
    best = by_hand(network, CAT).max()
    np.testing.assert_allclose(prediction.probabilities[0], best, rtol=1e-3)


# What the samples show, in the words of CIFAR-10.
SUBJECTS = {
    "airplane": "airplane",
    "boats": "ship",
    "cat": "cat",
    "dog": "dog",
    "duck": "bird",
    "horse": "horse",
    "moose": "deer",
}


def test_the_packaged_model_knows_most_samples():
    record = json.loads(WEIGHTS[PACKAGED_MODEL].asset.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["top1"] >= 96
    predictor = Predictor()
    assert set(SUBJECTS.values()) < set(predictor.labels)
    predictions = predictor(sample_pictures(), top_k=1)
    answers = {Path(prediction.source).stem: prediction.labels[0] for prediction in predictions}
    assert answers.keys() == SUBJECTS.keys()
    assert sum(answers[name] == SUBJECTS[name] for name in SUBJECTS) >= len(SUBJECTS) - 2, answers
