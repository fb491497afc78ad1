"""What the formats share: the table of them, the check before a file is kept, the pictures, the command's sentences."""

import sys
from pathlib import Path

import pytest
import torch

from mambavision import create_model
from mambavision.cli import main
from mambavision.export import check, formats, graph, pictures
from mambavision.inference import optimize
from mambavision.inference.picture_files import sample_pictures


@pytest.fixture(scope="module")
def nano():
    return create_model("mamba_vision_nano_32", pretrained=True)


def written(draft):
    """A file of two, and its operations."""
    draft.write_text("graph")
    draft.with_name("weights").write_text("weights")
    return 7


def runs(model, change=lambda logits: logits):
    """A runtime that computes what PyTorch does, changed."""

    @torch.inference_mode()
    def run(batch):
        return [change(model(batch))]

    return lambda _: run


def write_checked(model, path, dtype="float32", **changes):
    arguments = {"runtime": "the runtime", "uint8": False, "write": written, "load": runs(model), **changes}
    return check.write_checked(model, path, dtype=dtype, **arguments)


def test_what_is_equal_is_kept_with_what_lies_beside_it(nano, tmp_path):
    report = write_checked(nano, tmp_path / "deep" / "graph.file")
    assert sorted(path.name for path in report.path.parent.iterdir()) == ["graph.file", "weights"]
    assert (report.size, report.nodes, report.runtime, report.dtype) == (12, 7, "the runtime", "float32")
    assert (report.error, report.agreement, report.calibration) == (0, 1, None)
    assert report.milliseconds > 0


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("float32", lambda logits: logits * 1.001),
        ("float16", lambda logits: logits * 1.05),
        ("int8", lambda logits: logits * 1.5),
        ("float32", lambda logits: logits / 0),
    ],
)
def test_what_differs_is_not(nano, tmp_path, dtype, change):
    path = tmp_path / "graph.file"
    path.write_text("the old file")
    with pytest.raises(check.DifferenceError, match=r"graph\.file was not kept: the runtime"):
        write_checked(nano, path, dtype, load=runs(nano, change))
    assert [file.name for file in tmp_path.iterdir()] == ["graph.file"]
    assert path.read_text() == "the old file"


def test_other_classes_are_a_difference_within_int8s_error(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(check.TOLERANCES, "int8", 10.0)
    with pytest.raises(check.DifferenceError, match="gives only 0% of the sample photographs PyTorch's class"):
        write_checked(nano, tmp_path / "graph.file", "int8", load=runs(nano, lambda logits: -logits))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_file_of_one_batch_size_is_fed_nothing_else(nano, tmp_path, batch_size):
    shapes = set()

    def load(draft):
        def run(batch):
            shapes.add(tuple(batch.shape))
            return runs(nano)(draft)(batch)

        return run

    assert write_checked(nano, tmp_path / "graph.file", load=load, batch_size=batch_size).agreement == 1
    assert shapes == {(batch_size, 3, 32, 32)}


def test_batches_are_filled_with_the_first():
    found = pictures.in_batches(torch.arange(5), 3)
    assert torch.stack(found).tolist() == [[0, 1, 2], [3, 4, 0]]
    assert torch.stack(pictures.in_batches(torch.arange(2), 5)).tolist() == [[0, 1, 0, 1, 0]]
    assert torch.stack(pictures.in_batches(torch.arange(4), 2)).tolist() == [[0, 1], [2, 3]]


def test_calibration_takes_the_photographs_a_folder_or_pictures(nano, tmp_path, caplog):
    photographs = len(sample_pictures())
    views = torch.cat(pictures.calibration_batches(nano, None, uint8=False))
    assert views.shape == (10 * photographs, 3, 32, 32)
    assert len(views.flatten(1).unique(dim=0)) == len(views)
    torch.testing.assert_close(views[::10], pictures.photographs(nano))
    whole = pictures.calibration_batches(nano, sample_pictures()[0].parent, uint8=True, batch_size=4)
    assert [tuple(batch.shape) for batch in whole] == [(4, 32, 32, 3)] * -(-photographs // 4)
    assert whole[0].dtype == torch.uint8
    assert len(pictures.calibration_batches(nano, sample_pictures()[:2] * 200, uint8=False)) == 256
    assert "sample photographs" in pictures.describe_calibration(None, [views])
    with pytest.raises(ValueError, match="is a folder without pictures"):
        pictures.calibration_batches(nano, tmp_path, uint8=False)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert len(pictures.calibration_batches(nano, [tmp_path / "broken.jpg", sample_pictures()[0]], uint8=False)) == 1
    assert f"{tmp_path / 'broken.jpg'} is not a picture" in caplog.text
    with pytest.raises(ValueError, match="None of the pictures"):
        pictures.calibration_batches(nano, tmp_path, uint8=False)
    with pytest.raises(ValueError, match="no pictures"):
        pictures.calibration_batches(nano, [], uint8=False)


def test_bytes_are_what_was_normalised(nano):
    normalised = pictures.photographs(nano)
    model = graph.Graph(nano, uint8=True)
    with torch.inference_mode():
        found = model(pictures.as_input(nano, normalised, uint8=True))
        torch.testing.assert_close(found, graph.Graph(nano)(normalised), rtol=1e-4, atol=1e-4)


def test_half_precision_spares_the_scan(nano):
    model = graph.Graph(nano, dtype=torch.float16)
    types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.named_buffers()}
    assert (types["A"], types["D"], types["dt_bias"]) == (torch.float32,) * 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert next(nano.parameters()).dtype == torch.float32


def test_every_format_has_its_functions():
    for row in formats.FORMATS.values():
        assert row.export.__module__ == f"mambavision.export.{row.module}"
        assert callable(row.open_file)
        assert set(row.dtypes) <= set(formats.DTYPES)
        assert ("calibration" in row.settings) == ("int8" in row.dtypes)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "mamba_vision_T.onnx"),
        ("--format aoti --dtype float16", "mamba_vision_T.float16.aoti.pt2"),
        ("--features --uint8", "mamba_vision_T.features.uint8.onnx"),
        ("--uint8 --resize --dtype int8", "mamba_vision_T.resize.int8.onnx"),
        ("--img-size 384", "mamba_vision_T.384.onnx"),
        ("--img-size 384x640 --format openvino", "mamba_vision_T.384x640.xml"),
        ("--format executorch --batch-size 4", "mamba_vision_T.batch4.pte"),
        ("--checkpoint runs/mine/best.safetensors --features", "best.features.onnx"),
        ("--checkpoint runs/mine/last.pth.tar", "last.onnx"),
        ("--checkpoint runs/mine/", "mine.onnx"),
    ],
)
def test_the_default_name_says_what_was_asked_for(arguments, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("the old file")
    assert main(["export", "mamba_vision_T", *arguments.split()]) == 2
    sentence = f"{name} exists; --overwrite replaces it, --output names another."
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--format", "torch-export", "--dtype", "int8"],
            "torch-export files are written in float32 or float16, not in 'int8'; "
            "choose onnx or openvino or executorch for int8.",
        ),
        (["--calibration", "."], "Pictures for calibration are for int8 alone, and float32 was asked for."),
        (
            ["--format", "aoti", "--calibration", "."],
            "--calibration works only with onnx and openvino and executorch, not with aoti.",
        ),
        (["--batch-size", "4"], "--batch-size works only with executorch, not with onnx."),
        (
            ["--format", "openvino", "--device", "cuda"],
            "--device works only with aoti and onnx, and openvino was asked for.",
        ),
        (["--format", "openvino", "--output", "t.bin"], "The file for openvino must end in .xml, got t.bin."),
    ],
)
def test_what_a_format_does_not_have_is_one_sentence(arguments, sentence, capsys):
    assert main(["export", "mamba_vision_nano_32", *arguments]) == 2
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"


@pytest.mark.parametrize(
    ("name", "missing", "install"),
    [
        ("openvino", "openvino", "openvino onnx onnxruntime onnxscript"),
        ("executorch", "executorch", "executorch"),
    ],
)
def test_a_missing_library_is_one_sentence(name, missing, install, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / f"nano{formats.FORMATS[name].suffix}"
    assert main(["export", "mamba_vision_nano_32", "--format", name, "--output", str(path)]) == 2
    called = {"openvino": "OpenVINO", "executorch": "ExecuTorch"}[name]
    sentence = f"Export to {called} needs {missing}, which is not installed: pip install {install}."
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_is_told_what_it_waits_for(terminal, nano, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mambavision.export.onnx.export_onnx", lambda model, path, **_: write_checked(model, Path(path))
    )
    assert main(["export", "mamba_vision_nano_32", "-o", "[/a].onnx"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("[/a].onnx: 0.0 MiB, 7 nodes")
    assert ("writing [/a].onnx" in err) if terminal else (err == "")


def test_without_a_compiler_aoti_says_so(nano, monkeypatch, tmp_path):
    from mambavision.export.aoti import export_aoti

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(check.ExportError, match=r"needs a C\+\+ compiler"):
        export_aoti(nano, tmp_path / "nano.pt2")
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr("shutil.which", lambda name: None if name == "my-compiler" else name)
    with pytest.raises(check.ExportError, match="there is no my-compiler, which CXX names"):
        export_aoti(nano, tmp_path / "nano.pt2")


def test_feature_maps_of_timm_are_told_their_remedy():
    """Their `.model` is a classifier, which would be written as one map without complaint."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("mambavision.integrations.timm")
    maps = timm.create_model("mamba_vision_nano_32", features_only=True)
    with pytest.raises(
        TypeError, match=r"got FeatureMaps: make it with mambavision\.create_model\(.*features_only=True"
    ):
        check.check_model(maps)


def test_without_a_head_there_are_no_classes_to_compare(tmp_path):
    headless = create_model("mamba_vision_test_tiny", num_classes=0).eval()
    report = write_checked(headless, tmp_path / "graph.file")
    assert (report.error, report.agreement) == (0, None)
    assert graph.output_names(headless) == ["features"]
    assert "class_names" not in graph.metadata(headless)
    assert graph.output_names(create_model("mamba_vision_test_tiny")) == ["logits"]


def test_what_is_no_network_to_export_is_one_sentence(nano):
    with pytest.raises(TypeError, match="Export takes a network of create_model, got Linear"):
        check.check_model(torch.nn.Linear(2, 2))
    wrapped = torch.nn.Module()
    wrapped.model = nano
    with pytest.raises(TypeError, match=r"got Module: pass its `\.model`"):
        check.check_model(wrapped)
    with pytest.raises(ValueError, match="optimised network cannot be exported"):
        check.check_model(optimize(nano))
    with pytest.raises(ValueError, match=r"export model\.float\(\)"):
        check.check_model(create_model("mamba_vision_test_tiny", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="1 or 3 channels, and the model takes 4"):
        check.check_model(create_model("mamba_vision_test_tiny", in_chans=4))
