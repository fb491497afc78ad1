"""Our own checkpoint format: everything comes back, and a file is never half written."""

import stat

import pytest
import torch
from safetensors import safe_open

from mambavision.config import MambaVisionConfig, Preprocessing, get_config
from mambavision.weights import CheckpointError, checkpoint, read_checkpoint, save_checkpoint


@pytest.fixture
def config() -> MambaVisionConfig:
    names = ("Zürich", "a, b", "")
    return get_config(
        "mamba_vision_test_tiny", num_classes=3, class_names=names, preprocessing=Preprocessing(crop_mode="squash")
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "counter": torch.tensor(7),
        "half": torch.randn(2, dtype=torch.bfloat16),
    }


def test_everything_comes_back(tmp_path, config, tensors):
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_checkpoint(path, tensors, config, metrics={"top1": 81.5}, extra={"epoch": 3, "seen": ["a"]})
    read = read_checkpoint(path)
    assert read.config == config
    assert read.metrics == {"top1": 81.5}
    assert read.extra == {"epoch": 3, "seen": ["a"]}
    assert read.path == path
    assert set(read.state_dict) == set(tensors)
    for name, tensor in tensors.items():
        assert read.state_dict[name].dtype == tensor.dtype
        torch.testing.assert_close(read.state_dict[name], tensor, rtol=0, atol=0)


def test_any_safetensors_reader_opens_it(tmp_path, config, tensors):
    save_checkpoint(tmp_path / "model.safetensors", tensors, config)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata()["format"] == "pt"


def test_tensors_that_share_memory_are_stored_apart(tmp_path, config):
    whole = torch.arange(6.0)
    save_checkpoint(tmp_path / "shared", {"whole": whole, "again": whole, "part": whole[2:4]}, config)
    read = read_checkpoint(tmp_path / "shared").state_dict
    assert read["again"].equal(whole)
    assert read["part"].equal(whole[2:4])


def test_dtype_converts_floating_point_only(tmp_path, config, tensors):
    save_checkpoint(tmp_path / "half", tensors, config, dtype=torch.float16)
    read = read_checkpoint(tmp_path / "half").state_dict
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "weight": torch.float16,
        "transposed": torch.float16,
        "counter": torch.int64,
        "half": torch.float16,
    }
    assert tensors["weight"].dtype == torch.float32


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, config, tensors, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tensors, config, extra={"run": 1})
    before = path.read_bytes()

    def half_written(_tensors, target, **_):
        target.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, tensors, config, extra={"run": 2})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path, config, tensors):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tensors, config, extra={"run": 1})
    with path.open("rb") as opened_before:
        save_checkpoint(path, tensors, config, extra={"run": 2})
        assert b'{\\"run\\": 1}' in opened_before.read()  # a reader keeps the old file, whole
    assert read_checkpoint(path).extra == {"run": 2}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_others_may_read_the_file_as_the_umask_says(tmp_path, config, tensors):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "model.safetensors", tensors, config)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "model.safetensors")}
    assert len(modes) == 1


def test_a_meta_tensor_is_named(tmp_path, config):
    tensors = {"here": torch.zeros(1), "nowhere": torch.zeros(1, device="meta")}
    with pytest.raises(CheckpointError, match="nowhere on the meta device"):
        save_checkpoint(tmp_path / "model.safetensors", tensors, config)
    assert not list(tmp_path.iterdir())
