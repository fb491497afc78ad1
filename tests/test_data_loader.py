import numpy as np
import pytest
import torch

from mambavision.config import Preprocessing
from mambavision.data import DataError
from mambavision.data.config import AugmentConfig
from mambavision.data.folder import open_pictures, open_training
from mambavision.data.loader import EvaluationBatches, TrainBatches, make_loader
from mambavision.data.transforms import build_train_transform
from mambavision.inference.preprocess import build_transform
from training_data import make_bad, make_folder, make_npz

PREPROCESSING = Preprocessing(img_size=(32, 32))
AUGMENT = AugmentConfig(crop="pad", auto_augment="rand-m9-mstd0.5-inc1")


def batches_of(pictures, **changes):
    settings = {"batch_size": 8, "seed": 5} | changes
    return TrainBatches(pictures, build_train_transform(AUGMENT, PREPROCESSING), **settings)


@pytest.fixture
def train(tmp_path):
    return open_training(make_npz(tmp_path))[0]  # 48 pictures


def test_a_batch_depends_on_its_position_alone(train):
    batches = batches_of(train)
    one_process = [batches[position] for position in range(3, 14)]
    workers = list(make_loader(batches_of(train), range(3, 14), workers=2, pin_memory=False))
    for (images, labels, _), (other_images, other_labels, _) in zip(one_process, workers, strict=True):
        assert images.dtype == torch.uint8
        assert images.shape == (8, 32, 32, 3)
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_an_epoch_has_every_picture_once_in_an_order_of_its_own(train):
    plain = TrainBatches(train, lambda picture: picture, batch_size=8, seed=5)
    epochs = [torch.cat([plain[position][0] for position in range(start, start + 6)]) for start in (0, 6)]
    everything = np.stack([np.asarray(train.read(index)) for index in range(48)])
    for epoch in epochs:
        assert sorted(image.tobytes() for image in epoch.numpy()) == sorted(image.tobytes() for image in everything)
    assert not torch.equal(*epochs)


def test_seeds_differ_in_order_and_in_augmentation(train):
    assert not torch.equal(batches_of(train)[0][1], batches_of(train, seed=6)[0][1])
    assert not torch.equal(batches_of(train)[0][0], batches_of(train)[6][0])


def test_epochs_hold_whole_steps(train):
    batches = batches_of(train, batch_size=5, batches_per_step=2)
    assert (batches.steps_per_epoch, batches.per_epoch) == (4, 8)
    with pytest.raises(DataError, match="48 training pictures do not fill one step of 50"):
        batches_of(train, batch_size=25, batches_per_step=2)


def test_a_bad_picture_is_replaced_and_named(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, 12))
    bad = make_bad(tmp_path / "ant" / "00003.png")
    batches = TrainBatches(pictures, lambda picture: picture, batch_size=12)
    images, labels, reported = batches[0]
    assert images.shape[0] == labels.shape[0] == 12
    assert [name for name, _ in reported] == [str(bad)]
    shares = {image.tobytes(): label for image, label in zip(images.numpy(), labels.tolist(), strict=True)}
    assert len(shares) == 11  # the next picture came twice
    for index in range(12):
        if pictures.name(index) != str(bad):
            assert shares[np.asarray(pictures.read(index)).tobytes()] == pictures.labels[index]


def test_only_bad_pictures_is_an_error(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, 3))
    for file in tmp_path.rglob("*.png"):
        make_bad(file)
    with pytest.raises(DataError, match="None of the 3"):
        TrainBatches(pictures, lambda picture: picture, batch_size=3)[0]


def test_evaluation_has_every_picture_once_through_the_transform_of_prediction(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, 11, size=40))
    bad = make_bad(tmp_path / "bee" / "00001.png")
    transform = build_transform(PREPROCESSING)
    batches = EvaluationBatches(pictures, transform, batch_size=4)
    loaded = list(make_loader(batches, range(len(batches)), workers=0, pin_memory=False))
    assert [len(labels) for _, labels, _ in loaded] == [4, 3, 3]
    assert [name for *_, names in loaded for name, _ in names] == [str(bad)]
    good = [index for index in range(11) if pictures.name(index) != str(bad)]
    expected = torch.stack([transform(pictures.read(index)) for index in good])
    assert torch.equal(torch.cat([images for images, *_ in loaded]), expected)
    assert torch.cat([labels for _, labels, _ in loaded]).tolist() == pictures.labels[good].tolist()


def test_an_evaluation_batch_may_be_empty(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, 3))
    for file in (tmp_path / "ant").iterdir():
        make_bad(file)
    images, labels, bad = EvaluationBatches(pictures, build_transform(PREPROCESSING), batch_size=1)[0]
    assert (len(images), len(labels), len(bad)) == (0, 0, 1)
