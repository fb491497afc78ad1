"""Vectors of pictures: the numbers, the table's two formats, continuing a killed run, and neighbours."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from mambavision import Predictor, create_model
from mambavision.cli import main
from mambavision.inference import embed as embedding_module
from mambavision.inference.embed import describe, embed, embed_files, same_network
from mambavision.inference.features import Features, FeaturesError, load_features, save_features
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import SAMPLES, sample_pictures
from mambavision.inference.preprocess import build_transform
from mambavision.weights import save_checkpoint

CAT, DOG = SAMPLES / "cat.jpg", SAMPLES / "dog.jpg"


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return Predictor(create_model("mamba_vision_test_tiny"), batch_size=2)


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, predictor.model.state_dict(), predictor.config)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """The samples in two folders, and a broken one."""
    shutil.copytree(SAMPLES, tmp_path / "pictures")
    (tmp_path / "pictures" / "deep").mkdir()
    os.replace(tmp_path / "pictures" / "dog.jpg", tmp_path / "pictures" / "deep" / "dog.jpg")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(CAT.read_bytes()[:5000])
    return tmp_path / "pictures"


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


# ---- vectors ---------------------------------------------------------------------------------------------------------


def test_vectors_are_the_pooled_output_of_the_network(predictor, tmp_path):
    found = list(embed(predictor, [CAT, tmp_path / "missing.jpg", DOG, b""]))
    transform = build_transform(predictor.config.preprocessing)
    for embedding, path in ((found[0], CAT), (found[2], DOG)):
        with torch.no_grad():
            maps = predictor.model.forward_features(transform(read_image(path))[None])
            expected = maps.mean((2, 3))[0].numpy()
        np.testing.assert_allclose(embedding.vector, expected, rtol=1e-4, atol=1e-6)
        assert (embedding.source, embedding.error) == (str(path), None)
        assert embedding.vector.dtype == np.float32
    assert "does not exist" in found[1].error
    assert found[3].error == "picture 4 is empty."


def test_a_vector_that_is_not_finite_is_an_error():
    network = create_model("mamba_vision_test_tiny")
    torch.nn.init.constant_(network.norm.bias, float("inf"))
    (embedding,) = embed(Predictor(network), CAT)
    assert embedding.vector is None
    assert embedding.error == f"{CAT}: the network's output is not finite."


def test_the_description_tells_weights_apart(predictor):
    about = describe(predictor, model="mamba_vision_test_tiny")
    assert json.loads(json.dumps(about)) == about
    assert (about["model"], about["channels"]) == ("mamba_vision_test_tiny", 64)
    assert about["preprocessing"]["img_size"] == [64, 64]
    torch.manual_seed(1)
    other = describe(Predictor(create_model("mamba_vision_test_tiny")))
    assert not same_network(about, other)
    assert same_network(about, describe(predictor, checkpoint="elsewhere.safetensors"))


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_table_comes_back_as_it_was(suffix, tmp_path):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    saved = Features(paths=("a.jpg", "b c.png", "ü/✓.png"), vectors=vectors, metadata={"model": "m", "n": [1, None]})
    save_features(saved, tmp_path / f"deep/table.{suffix}")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [f"table.{suffix}"]
    loaded = load_features(tmp_path / f"deep/table.{suffix}")
    assert (loaded.paths, loaded.metadata) == (saved.paths, saved.metadata)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    assert loaded.vectors.dtype == np.float32


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04cut off"])
def test_what_is_no_table_is_named(suffix, content, tmp_path):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"table.{suffix}"
    with pytest.raises(FeaturesError, match="does not exist"):
        load_features(path)
    path.write_bytes(content)
    with pytest.raises(FeaturesError, match="is not a table of vectors"):
        load_features(path)


def test_other_arrays_are_no_table(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(FeaturesError, match="is not a table of vectors"):
        load_features(tmp_path / "other.npz")


def test_without_pyarrow_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FeaturesError, match=r"^A .parquet file needs pyarrow.*: pip install pyarrow\.$"):
        save_features(Features(paths=(), vectors=np.zeros((0, 2)), metadata={}), tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text(tmp_path):
    pytest.importorskip("pyarrow")
    strange = os.fsdecode(b"\xff.jpg")
    table = Features(paths=(strange,), vectors=np.ones((1, 2), np.float32), metadata={})
    for suffix, expected in (("npz", strange), ("parquet", "\N{REPLACEMENT CHARACTER}.jpg")):
        save_features(table, tmp_path / f"t.{suffix}")
        assert load_features(tmp_path / f"t.{suffix}").paths == (expected,)


# ---- many files, killed and continued --------------------------------------------------------------------------------


def counting(monkeypatch):
    """The paths that go through the network from now on."""
    seen = []
    real = embedding_module.embed

    def counted(predictor, pictures):
        for embedding in real(predictor, pictures):
            seen.append(embedding.source)
            yield embedding

    monkeypatch.setattr(embedding_module, "embed", counted)
    return seen


def stop_after(count):
    def report(_embedding):
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt

    return report


def test_a_killed_run_continues_with_the_same_result(predictor, tmp_path, monkeypatch):
    paths = sample_pictures()
    whole, _ = embed_files(predictor, paths, tmp_path / "whole.npz")
    output = tmp_path / "killed.npz"
    with pytest.raises(KeyboardInterrupt):
        embed_files(predictor, paths, output, report=stop_after(4))
    assert {path.name for path in tmp_path.iterdir()} == {"whole.npz", "killed.npz.partial"}
    with open(tmp_path / "killed.npz.partial", "ab") as file:
        file.write(b'{"path": "half a li')  # as a kill would leave it
    seen, resumed = counting(monkeypatch), []
    continued, bad = embed_files(predictor, paths, output, resumed=resumed.append)
    assert (resumed, bad, len(seen)) == ([4], [], len(paths) - 4)
    assert continued.paths == whole.paths == load_features(output).paths
    np.testing.assert_allclose(load_features(output).vectors, whole.vectors, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "killed.npz.partial").exists()


def test_files_that_changed_in_between_are_done_again(predictor, folder, tmp_path, monkeypatch):
    paths = [folder / "cat.jpg", folder / "duck.jpg", folder / "horse.jpg"]
    with pytest.raises(KeyboardInterrupt):
        embed_files(predictor, paths, tmp_path / "f.npz", report=stop_after(2))
    shutil.copy(DOG, paths[0])
    seen = counting(monkeypatch)
    features, _ = embed_files(predictor, paths, tmp_path / "f.npz")
    assert seen == [str(paths[0]), str(paths[2])]
    (dog,) = embed(predictor, DOG)
    np.testing.assert_allclose(features.vectors[0], dog.vector, rtol=1e-4, atol=1e-6)


def test_other_weights_do_not_continue(predictor, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed_files(predictor, [CAT, DOG], tmp_path / "f.npz", report=stop_after(1))
    before = (tmp_path / "f.npz.partial").read_bytes()
    torch.manual_seed(1)
    other = Predictor(create_model("mamba_vision_test_tiny"))
    with pytest.raises(FeaturesError, match=r"f\.npz\.partial holds vectors of other weights"):
        embed_files(other, [CAT, DOG], tmp_path / "f.npz")
    assert (tmp_path / "f.npz.partial").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_by_the_system_and_continued_by_the_same_command(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "f.npz"
    slow = (
        "import sys, time; from mambavision.cli import main; from mambavision.inference import embed as module;"
        "real = module._Partial.add;"
        "module._Partial.add = lambda *a: (real(*a), print('one', flush=True), time.sleep(0.5));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["embed", str(folder), "-o", str(output), "--checkpoint", checkpoint, "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    code, out, err = run(capsys, *command)
    assert code == 1
    assert "Continuing: 2 of 8 pictures were done before." in err
    assert out == f"{output}: 7 vectors of 64 channels\n"


def test_control_c_says_how_to_continue(capsys, checkpoint, tmp_path, monkeypatch):
    real = embedding_module._Partial.add

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedding_module._Partial, "add", interrupted)
        code, out, err = run(capsys, "embed", SAMPLES, "-o", tmp_path / "f.npz", "--checkpoint", checkpoint)
    assert (code, out) == (130, "")
    assert err == "Stopped; what is done is in f.npz.partial, and the same command continues.\n"
    code, _, err = run(capsys, "embed", SAMPLES, "-o", tmp_path / "f.npz", "--checkpoint", checkpoint)
    assert (code, err) == (0, "Continuing: 1 of 7 pictures were done before.\n")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_folder_becomes_a_table_and_bad_pictures_are_named(capsys, checkpoint, folder, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    output = folder.parent / f"f.{suffix}"
    code, out, err = run(capsys, "embed", folder, "-o", output, "--checkpoint", checkpoint)
    assert code == 1
    assert out == f"{output}: 7 vectors of 64 channels\n"
    assert len(err.splitlines()) == 1
    assert "broken.jpg is broken" in err
    features = load_features(output)
    assert [os.path.basename(path) for path in features.paths].count("dog.jpg") == 1
    assert features.vectors.shape == (7, 64)
    assert (features.metadata["model"], features.metadata["checkpoint"]) == (None, checkpoint)
    code, _, err = run(capsys, "embed", folder, "-o", output, "--checkpoint", checkpoint)
    assert (code, err) == (2, f"mambavision: {output} exists; --overwrite replaces it, --output names another.\n")


def test_nothing_readable_leaves_nothing(capsys, checkpoint, tmp_path):
    (tmp_path / "a.jpg").touch()
    code, out, err = run(capsys, "embed", tmp_path, "-o", tmp_path / "f.npz", "--checkpoint", checkpoint)
    assert (code, out) == (1, "")
    assert err.endswith("No picture could be read; nothing was written.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["embed", SAMPLES], "-o/--output"),
        (["embed", "-o", "f.npz"], "DIR"),
        (["embed", SAMPLES, "-o", "f.csv"], "must be a file that ends in .npz or .parquet"),
        (["embed", SAMPLES, "-o", "f.npz", "--model", "mamba_vision_TT"], "nearest names"),
        (["neighbours", "missing.npz"], "missing.npz does not exist."),
        (["neighbours", str(CAT)], "cat.jpg is not a table of vectors"),
    ],
)
def test_wrong_use(capsys, arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# ---- neighbours ------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_with_the_largest_cosine():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(50, 8)).astype(np.float32)
    vectors[7] = 0
    names = tuple(f"{place}.png" for place in range(50))
    features = Features(paths=names, vectors=vectors, metadata={})
    queries = generator.normal(size=(1500, 8)).astype(np.float32)
    exact = queries.astype(float) @ vectors.astype(float).T
    exact /= np.linalg.norm(queries, axis=1)[:, None] * np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
    for row, near in zip(exact, features.nearest(queries, 3), strict=True):
        assert [neighbour.path for neighbour in near] == [names[place] for place in np.argsort(-row)[:3]]
        np.testing.assert_allclose([neighbour.cosine for neighbour in near], np.sort(row)[::-1][:3], atol=1e-6)
    assert len(features.nearest(vectors, 99, queries=names)[0]) == 49
    assert "3.png" not in {neighbour.path for neighbour in features.nearest(vectors[3:4], 99, queries=["3.png"])[0]}
    with pytest.raises(ValueError, match="at least 1"):
        features.nearest(vectors, 0)
    with pytest.raises(ValueError, match=r"\(queries, 8\)"):
        features.nearest(vectors[:, :3])


@pytest.fixture
def table(checkpoint, tmp_path, capsys):
    path = tmp_path / "samples.npz"
    assert run(capsys, "embed", SAMPLES, "-o", path, "--checkpoint", checkpoint)[0] == 0
    return path


def test_neighbours_of_a_picture(capsys, table, tmp_path):
    copy = tmp_path / "copy.jpg"
    shutil.copy(CAT, copy)
    code, out, _ = run(capsys, "neighbours", table, copy, CAT, "-k", 2, "--format", "json")
    assert code == 0
    of_copy, of_cat = json.loads(out)
    assert of_copy["picture"] == str(copy)
    assert of_copy["neighbours"][0]["path"] == str(CAT)
    assert of_copy["neighbours"][0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert len(of_cat["neighbours"]) == 2
    assert str(CAT) not in {neighbour["path"] for neighbour in of_cat["neighbours"]}


def test_neighbours_of_all_need_no_network(capsys, table, monkeypatch):
    monkeypatch.setattr("mambavision.cli.neighbours.open_predictor", None)
    code, out, _ = run(capsys, "neighbours", table, "-k", 1, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [row["picture"] for row in rows] == [str(path) for path in sample_pictures()]
    assert all(row["neighbour"] != row["picture"] and -1 <= float(row["cosine"]) <= 1 for row in rows)
    code, out, _ = run(capsys, "neighbours", table)
    assert code == 0
    assert "cosine" in out
    code, _, err = run(capsys, "neighbours", table, "--model", "mamba_vision_T")
    assert code == 2
    assert "--model and --checkpoint are for pictures, and none is given" in err


def test_a_bad_query_is_named_and_the_rest_is_answered(capsys, table, tmp_path):
    code, out, err = run(capsys, "neighbours", table, tmp_path / "none.jpg", CAT, "--format", "json")
    assert code == 1
    assert err == f"{tmp_path / 'none.jpg'} does not exist.\n"
    assert [record["picture"] for record in json.loads(out)] == [str(CAT)]


def test_weights_that_are_gone_are_asked_for(capsys, checkpoint, tmp_path):
    table, copy = tmp_path / "samples.npz", tmp_path / "copy.safetensors"
    shutil.copy(checkpoint, copy)
    assert run(capsys, "embed", CAT, "-o", table, "--checkpoint", copy)[0] == 0
    copy.unlink()
    code, _, err = run(capsys, "neighbours", table, CAT)
    assert code == 2
    assert f"{table} was made with {copy}, which is not there: name these weights with --checkpoint." in err


def test_a_table_of_a_network_without_a_name_asks_for_it(capsys, predictor, checkpoint, tmp_path):
    table = tmp_path / "samples.npz"
    embed_files(predictor, [CAT], table)
    code, _, err = run(capsys, "neighbours", table, CAT)
    assert code == 2
    assert f"{table} does not say which network made it: name that with --model or --checkpoint." in err
    assert run(capsys, "neighbours", table, CAT, "--checkpoint", checkpoint)[0] == 0


def test_other_weights_are_no_neighbours(capsys, table, tmp_path):
    torch.manual_seed(1)
    network = create_model("mamba_vision_test_tiny")
    save_checkpoint(tmp_path / "other.safetensors", network.state_dict(), network.config)
    code, _, err = run(capsys, "neighbours", table, CAT, "--checkpoint", tmp_path / "other.safetensors")
    assert code == 2
    assert "made with other weights" in err


def test_like_pictures_are_near_in_the_packaged_models_space(capsys, tmp_path):
    """A mirrored photograph is nearest to its original, but for the one that the model gets wrong."""
    mirrored = []
    for path in sample_pictures():
        mirrored.append(tmp_path / path.name)
        read_image(path).transpose(0).save(mirrored[-1])
    assert run(capsys, "embed", SAMPLES, "-o", tmp_path / "f.npz")[0] == 0
    code, out, _ = run(capsys, "neighbours", tmp_path / "f.npz", *mirrored, "-k", 1, "--format", "json")
    assert code == 0
    found = {os.path.basename(record["picture"]): record["neighbours"][0]["path"] for record in json.loads(out)}
    assert {name for name, path in found.items() if os.path.basename(path) != name} <= {"airplane.jpg"}
