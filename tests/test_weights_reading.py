"""Every file format people have, broken files, and files that are programs."""

import argparse
import builtins
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambavision.config import get_config
from mambavision.models.classifier import MambaVision
from mambavision.weights import CheckpointError, read_checkpoint, save_checkpoint
from weight_files import public_archive, public_config, public_repository

TINY = get_config("mamba_vision_test_tiny")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MambaVision(TINY).state_dict()


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].equal(tensor), name


# Public archives


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_archive_with_flags_epoch_and_optimiser(tmp_path, weights, zipped):
    path = public_archive(tmp_path / "mambavision_tiny_1k.pth.tar", weights)
    content = torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert_same(read.state_dict, weights)
    assert read.extra == {"epoch": 299, "arch": "mamba_vision_T"}
    assert read.config is None


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model"])
def test_keys_under_which_weights_lie(tmp_path, weights, key):
    torch.save({key: weights, "epoch": 1}, tmp_path / "a.pt")
    assert_same(read_checkpoint(tmp_path / "a.pt").state_dict, weights)


def test_bare_state_dict_and_parameters(tmp_path, weights):
    torch.save(
        OrderedDict((name, torch.nn.Parameter(t, t.is_floating_point())) for name, t in weights.items()), tmp_path / "a"
    )
    read = read_checkpoint(tmp_path / "a").state_dict
    assert_same(read, weights)
    assert not any(tensor.requires_grad for tensor in read.values())


def test_averaged_weights_are_preferred_and_said(tmp_path, weights, caplog):
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    path = public_archive(tmp_path / "a.pth.tar", weights, state_dict_ema=averaged)
    assert_same(read_checkpoint(path).state_dict, averaged)
    assert "state_dict_ema and state_dict; state_dict_ema is used" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_wrappers(tmp_path, weights, prefix):
    path = public_archive(tmp_path / "a.pth.tar", {prefix + name: tensor for name, tensor in weights.items()})
    assert_same(read_checkpoint(path).state_dict, weights)


def test_a_prefix_that_not_all_names_have_stays(tmp_path, weights):
    torch.save({**weights, "module.extra": torch.zeros(1)}, tmp_path / "a.pt")
    assert "module.extra" in read_checkpoint(tmp_path / "a.pt").state_dict


def test_the_allow_list_is_left_as_it_was(tmp_path, weights):
    path = public_archive(tmp_path / "a.pth.tar", weights)
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


# Public repositories


def test_repository_with_its_configuration(tmp_path, weights):
    config = public_config(TINY, window_size=(8, 8, 4, 2), crop_pct=0.93, crop_mode="squash", layer_scale_conv=None)
    folder = public_repository(tmp_path / "repository", weights, config)
    for path in (folder, folder / "model.safetensors"):
        read = read_checkpoint(path)
        assert_same(read.state_dict, weights)
        assert read.config.class_names == tuple(f"class {index}" for index in range(10))
        assert read.config.preprocessing.img_size == (64, 64)
        assert (read.config.preprocessing.crop_pct, read.config.preprocessing.crop_mode) == (0.93, "squash")
        expected = TINY.replace(
            layer_scale_conv=None, preprocessing=read.config.preprocessing, class_names=read.config.class_names
        )
        assert read.config == expected


@pytest.mark.parametrize(
    "variant", ["mamba_vision_T", "mamba_vision_S", "mamba_vision_L3_256_21k", "mamba_vision_L2_512_21k"]
)
def test_input_size_follows_from_the_windows(tmp_path, variant):
    config = get_config(variant, num_classes=5)
    tensors = {"patch_embed.conv_down.0.weight": torch.zeros(4, 3, 3, 3), "head.weight": torch.zeros(5, 4)}
    read = read_checkpoint(public_repository(tmp_path, tensors, public_config(config)))
    assert read.config.replace(class_names=None) == config


def test_channels_and_classes_come_from_the_tensors(tmp_path):
    tensors = {"patch_embed.conv_down.0.weight": torch.zeros(4, 1, 3, 3), "head.weight": torch.zeros(7, 4)}
    config = read_checkpoint(public_repository(tmp_path, tensors, public_config(TINY))).config
    assert (config.in_chans, config.num_classes, config.class_names) == (1, 7, None)


def test_configuration_of_another_architecture_is_not_ours(tmp_path, weights):
    public_repository(tmp_path, weights, {"model_type": "vit", "hidden_size": 768})
    assert read_checkpoint(tmp_path).config is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"model_type": "mambavision"}', "window_size"),
        (json.dumps(public_config(TINY, dim="wide")), "dim must be a positive integer"),
    ],
)
def test_broken_configuration_is_named(tmp_path, weights, text, reason):
    public_repository(tmp_path, weights, {})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json does not describe a MambaVision network") as caught:
        read_checkpoint(tmp_path)
    assert reason in str(caught.value)


def test_shards_with_their_index(tmp_path, weights):
    """What `save_pretrained` makes of large models."""
    config = public_config(TINY)
    folder = public_repository(tmp_path / "repository", weights, config)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or model\.safetensors\.index\.json"):
        read_checkpoint(folder)
    names = list(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: whole[name] for name in held}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}}))
    for path in (folder, index):
        read = read_checkpoint(path)
        assert_same(read.state_dict, weights)
        assert read.config.class_names == tuple(f"class {index}" for index in range(10))
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"repository lacks b\.safetensors, which .*\.index\.json names"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../a.safetensors"}}'],
)
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json is not an index of shards beside it"):
        read_checkpoint(tmp_path)


# Broken files


@pytest.fixture(params=["safetensors", "zip", "legacy"])
def intact(request, tmp_path, weights) -> Path:
    path = tmp_path / "intact"
    if request.param == "safetensors":
        save_checkpoint(path, weights, TINY)
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=request.param == "zip")
    read_checkpoint(path)
    return path


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 0.999])
def test_truncated_files_are_named(intact, share):
    intact.write_bytes(intact.read_bytes()[: int(intact.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="is a truncated or corrupt") as caught:
        read_checkpoint(intact)
    assert_one_sentence(caught.value, intact)


def test_a_flipped_byte_in_an_archive_is_found(tmp_path, weights):
    path = public_archive(tmp_path / "a.pth.tar", weights)
    content = bytearray(path.read_bytes())
    pattern = weights["levels.2.blocks.0.mixer.in_proj.weight"].numpy().tobytes()
    content[content.index(pattern) + 5] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<html>404 Not Found</html>", "is neither a safetensors file nor a PyTorch archive: it starts with b'<html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "starts with b'version https://git-lfs"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is neither"),
        (bytes(1000), "is neither"),
        (b"\x80", "truncated or corrupt"),
        (b"\x80\x02]q\x00.", "truncated or corrupt"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{", "truncated or corrupt"),
        (b"\x02" + bytes(7) + b"{]", "truncated or corrupt"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, reason):
    path = tmp_path / "model.pth.tar"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert reason in str(caught.value)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"state_dict": {}}, "holds an empty state dict"),
        ({"weights": {"a": torch.zeros(1)}, "epoch": 1}, "none of the keys state_dict_ema, state_dict, model: weights"),
        ({"state_dict": {"a": torch.zeros(1), "b": "text"}}, "not tensors under 'state_dict': b"),
    ],
)
def test_archives_without_a_state_dict_are_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript")
def test_a_zip_of_something_else_and_torchscript_are_named(tmp_path):
    for name, members in {
        "documents": ["readme.txt"],
        "script": ["a/constants.pkl", "a/data.pkl", "a/version"],
    }.items():
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, "3")
        with pytest.raises(CheckpointError, match="is a truncated or corrupt PyTorch archive") as caught:
            read_checkpoint(path)
        assert_one_sentence(caught.value, path)


@pytest.mark.parametrize("header", ["{", "{}", '{"config": {"depth": 3}, "metrics": {}, "extra": {}}', "[]"])
def test_a_header_that_is_not_ours_is_named(tmp_path, header):
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"mambavision": header})
    with pytest.raises(CheckpointError, match="The mambavision header of .* is not one this version reads"):
        read_checkpoint(tmp_path / "a")


def test_missing_files_are_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no weight file .*nowhere.pt; check the path"):
        read_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        read_checkpoint(tmp_path)


# Files that are programs


class Payload:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Disguised(dict):
    """A dict of tensors to look at; unpickling it runs the payload kept in `payload`."""

    payload: Payload

    def __reduce__(self):
        return self.payload.__reduce__()


def hidden_in_a_dict_subclass(payload):
    disguised = Disguised(weight=torch.zeros(1))
    disguised.payload = payload
    return {"state_dict": disguised}


DISGUISES = {
    "top level": lambda payload: payload,
    "beside the weights": lambda payload: {"state_dict": {"a": torch.zeros(1)}, "args": payload},
    "among the weights": lambda payload: {"state_dict": {"a": torch.zeros(1), "b": payload}},
    "as a name": lambda payload: {"state_dict": {"a": torch.zeros(1)}, "keys": (payload,)},
    "inside a Namespace": lambda payload: {"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(x=payload)},
    "deep in optimiser state": lambda payload: {
        "model": {"a": torch.zeros(1)},
        "optimizer": [{"state": [{0: payload}]}],
    },
    "dict subclass": hidden_in_a_dict_subclass,
}
CALLS = {
    "os.system": lambda marker: Payload(os.system, f"touch {marker}"),
    "open": lambda marker: Payload(open, str(marker), "w"),
    "exec": lambda marker: Payload(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
    "getattr": lambda marker: Payload(getattr(Path, "touch"), marker),  # noqa: B009 (a bound builtin, as attackers do)
    "torch code": lambda marker: Payload(torch.save, 1, str(marker)),
}


def assert_one_sentence(error: Exception, path: Path) -> None:
    text = str(error).replace(str(path), "FILE")
    assert text.startswith("FILE")
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text
    assert "weights_only" not in text.replace(
        "weights_only=True`` with TorchScript", ""
    )  # no advice to switch safety off


def assert_refused(path: Path, marker: Path, run) -> None:
    """The payload in `path` is live when loaded the unsafe way, and does not run when read here."""
    run(path)
    assert marker.exists(), "the payload is not live, so this test would prove nothing"
    marker.unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not marker.exists()
    assert_one_sentence(caught.value, path)
    return str(caught.value)


def run_unsafely(path: Path) -> None:
    torch.load(path, weights_only=False)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_payload_is_refused_and_does_not_run(tmp_path, disguise, zipped):
    path, marker = tmp_path / "mambavision_tiny_1k.pth.tar", tmp_path / "ran"
    torch.save(DISGUISES[disguise](CALLS["os.system"](marker)), path, _use_new_zipfile_serialization=zipped)
    said = assert_refused(path, marker, run_unsafely)
    assert "is refused and nothing in it was run: it asks for " in said
    assert "system" in said


@pytest.mark.parametrize("call", CALLS)
def test_no_function_is_called_for_a_pickle(tmp_path, call):
    path, marker = tmp_path / "a.pt", tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": CALLS[call](marker)}, path)
    assert "is refused and nothing in it was run: it asks for " in assert_refused(path, marker, run_unsafely)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.pt", "model.safetensors", "picture.jpg"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_whatever_its_protocol_and_name(tmp_path, protocol, name):
    path, marker = tmp_path / name, tmp_path / "ran"
    path.write_bytes(pickle.dumps(CALLS["os.system"](marker), protocol=protocol))
    assert_refused(path, marker, lambda file: pickle.loads(file.read_bytes()))


def test_the_tar_of_old_pytorch_is_refused(tmp_path):
    """Members of the oldest format are pickles of their own."""
    path, marker = tmp_path / "a.pth.tar", tmp_path / "ran"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(CALLS["os.system"](marker), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def run(file):
        with pytest.raises(EOFError):
            torch.load(file, weights_only=False)  # runs the first member, then misses what should follow

    assert_refused(path, marker, run)


def test_a_payload_in_the_header_of_safetensors_is_text(tmp_path):
    marker = tmp_path / "ran"
    payload = pickle.dumps(CALLS["os.system"](marker), protocol=0).decode()
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"mambavision": payload})
    with pytest.raises(CheckpointError, match="is not one this version reads"):
        read_checkpoint(tmp_path / "a.safetensors")
    assert not marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it asks for torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "a.pt")
