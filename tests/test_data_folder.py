import numpy as np
import pytest

from mambavision.data import DataError
from mambavision.data.folder import open_evaluation, open_pictures, open_training
from mambavision.data.pools import cache
from training_data import CLASSES, make_bad, make_folder, make_npz, pictures


def contents(split):
    return [np.asarray(split.read(index)) for index in range(len(split))]


@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_folders_of_classes(tmp_path, evaluation):
    make_folder(tmp_path / "train", 9)
    make_folder(tmp_path / evaluation, 6, seed=1)
    train, val = open_training(tmp_path)
    assert train.class_names == val.class_names == CLASSES
    images, labels = pictures(9)
    order = np.argsort(labels, kind="stable")
    assert train.labels.tolist() == labels[order].tolist()
    np.testing.assert_array_equal(contents(train), images[order])
    assert len(val) == 6
    assert val.name(0).endswith(f"{evaluation}/ant/00000.png")


def test_npz(tmp_path):
    train, val = open_training(make_npz(tmp_path, train=12, val=6))
    images, labels = pictures(12)
    np.testing.assert_array_equal(contents(train), images)
    assert train.labels.tolist() == labels.tolist()
    assert train.class_names == val.class_names == CLASSES
    assert val.name(3) == f"{tmp_path / 'val.npz'}[3]"


def test_npz_names_come_from_the_file_then_the_listing_then_the_setting_then_numbers(tmp_path):
    make_npz(tmp_path, names=None)
    assert open_training(tmp_path)[0].class_names == ("0", "1", "2")
    assert open_training(tmp_path, class_names=["x", "y", "z"])[1].class_names == ("x", "y", "z")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_training(tmp_path, class_names=["x", "y", "z"])[0].class_names == ("a", "b", "c")
    make_npz(tmp_path)
    assert open_training(tmp_path)[0].class_names == CLASSES


def test_a_split_of_the_training_pictures_is_the_same_for_every_run_and_leaves_val_alone(tmp_path):
    make_npz(tmp_path, train=50)
    first, second, other = (open_training(tmp_path, val_split=0.2, split_seed=seed) for seed in (3, 3, 4))
    assert [len(part) for part in first] == [40, 10]
    assert sorted([*first[0].indices, *first[1].indices]) == list(range(50))
    assert all(a.indices.tolist() == b.indices.tolist() for a, b in zip(first, second, strict=True))
    assert first[1].indices.tolist() != other[1].indices.tolist()
    assert first[1].pool is first[0].pool


def test_a_flat_folder_needs_a_split(tmp_path):
    make_folder(tmp_path, 20)
    with pytest.raises(DataError, match="--val-split"):
        open_training(tmp_path)
    train, val = open_training(tmp_path, val_split=0.25)
    assert (len(train), len(val)) == (15, 5)


def test_limit_keeps_a_random_choice_and_all_evaluation_pictures(tmp_path):
    make_npz(tmp_path, train=48, val=24)
    train, val = open_training(tmp_path, limit_train=10)
    assert (len(train), len(val)) == (10, 24)
    assert train.indices.tolist() == sorted(train.indices.tolist()) != list(range(10))


def test_evaluation_finds_val_or_takes_what_is_named(tmp_path):
    make_npz(tmp_path, val=6)
    make_folder(tmp_path / "elsewhere", 3)
    assert len(open_evaluation(tmp_path)) == 6
    assert len(open_evaluation(tmp_path / "elsewhere")) == 3
    assert len(open_evaluation(tmp_path / "train.npz")) == 48


def test_evaluation_labels_are_numbers_into_the_training_classes(tmp_path):
    make_folder(tmp_path / "train", 9)
    make_folder(tmp_path / "val", 9)
    for file in (tmp_path / "val" / "ant").iterdir():
        file.unlink()
    (tmp_path / "val" / "ant").rmdir()
    assert set(open_training(tmp_path)[1].labels.tolist()) == {1, 2}
    (tmp_path / "val" / "cow").rename(tmp_path / "val" / "dog")
    with pytest.raises(DataError, match="dog"):
        open_training(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "does not exist|neither a folder"),
        (lambda path: path.mkdir(), "no class folders"),
        (lambda path: (path / "empty").mkdir(parents=True), "holds no pictures"),
    ],
)
def test_unusable_folders_are_named(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        open_pictures(tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "labels"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32), "labels": np.zeros(2, np.int64)}, "uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, np.int64)}, "uint8"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, -1])}, "labels must lie"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([None, {}])}, "not a readable"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_pictures(tmp_path / "x.npz")


def test_a_broken_npz_is_named(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"x\.npz is not a readable"):
        open_pictures(tmp_path / "x.npz")


def test_the_cache_holds_the_same_pictures_of_any_size_without_the_bad_ones(tmp_path):
    make_folder(tmp_path, 6, size=32)
    make_folder(tmp_path / "wide", 3, size=20)
    (tmp_path / "wide").rename(tmp_path.parent / "wide")
    for name in CLASSES:
        for file in (tmp_path.parent / "wide" / name).iterdir():
            file.rename(tmp_path / name / f"small{file.name}")
    files = open_pictures(tmp_path)
    bad = make_bad(tmp_path / "bee" / "00001.png")
    kept, reasons = cache(files, threads=2)
    assert list(reasons) == [str(bad)]
    assert str(bad) in reasons[str(bad)]
    good = [index for index in range(len(files)) if files.name(index) != str(bad)]
    assert kept.labels.tolist() == files.labels[good].tolist()
    assert [kept.name(place) for place in range(len(kept))] == [files.name(index) for index in good]
    assert all(
        (np.asarray(kept.read(place)) == np.asarray(files.read(index))).all() for place, index in enumerate(good)
    )
