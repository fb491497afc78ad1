"""Export to ONNX: what the file holds, computes and says, and what happens when it would be wrong."""

import json
import shutil
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from mambavision import create_model
from mambavision.cli import main
from mambavision.export import onnx as export
from mambavision.export.check import ExportError
from mambavision.inference.images import read_image
from mambavision.inference.picture_files import sample_pictures
from mambavision.inference.preprocess import build_transform

TINY = "mamba_vision_test_tiny"


pytestmark = pytest.mark.usefixtures("onnx_exporter")


@pytest.fixture(scope="module")
def maps(onnx_exporter, tmp_path_factory):
    """A backbone that takes bytes."""
    torch.manual_seed(0)
    model = create_model(TINY, features_only=True).eval()
    return model, export.export_onnx(model, tmp_path_factory.mktemp("onnx") / "maps.onnx", uint8=True)


def open_session(report):
    import onnxruntime

    return onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


# Whole windows, padding in one direction and in both, maps of one token, batch 1 and more.
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 96), (1, 37, 53), (2, 33, 64), (1, 4, 7), (2, 1, 1)])
def test_a_classifier_computes_the_same_at_any_size(nano_onnx, shape):
    model, report = nano_onnx
    batch, height, width = shape
    pictures = torch.randn(batch, 3, height, width)
    with torch.inference_mode():
        expected = model(pictures).numpy()
    (found,) = open_session(report).run(["logits"], {"pixel_values": pictures.numpy()})
    assert_close(found, expected)


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 97, 70), (1, 5, 200)])
def test_a_backbone_gives_four_maps_of_bytes(maps, shape):
    model, report = maps
    session = open_session(report)
    assert [value.name for value in session.get_outputs()] == [
        f"stride_{reduction}" for reduction in model.feature_info.reduction()
    ]
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v) for v in (model.config.preprocessing.mean, model.config.preprocessing.std))
    with torch.inference_mode():
        expected = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    found = session.run(None, {"pixels": pixels.numpy()})
    for ours, theirs in zip(expected, found, strict=True):
        assert_close(theirs, ours.numpy())


def test_the_graph_is_standard_clean_and_names_its_dimensions(nano_onnx, maps):
    import onnx

    for _, report in (nano_onnx, maps):
        proto = onnx.load(report.path)
        onnx.checker.check_model(proto, full_check=True)
        assert [entry.domain for entry in proto.opset_import] == [""]
        assert {node.domain for node in proto.graph.node} == {""}
        assert not proto.functions
        assert len(proto.graph.node) == report.nodes
        assert str(export.__file__).encode() not in report.path.read_bytes()  # nothing of where it was made
    (pixels,) = proto.graph.input
    names = [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim]
    assert names == ["batch", "height", "width", 3]


def test_metadata_tells_the_preprocessing_and_the_classes(nano_onnx):
    model, report = nano_onnx
    found = open_session(report).get_modelmeta().custom_metadata_map
    values = {name: json.loads(value) for name, value in found.items()}
    preprocessing = model.config.preprocessing
    assert values["image_size"] == list(preprocessing.img_size)
    assert (values["mean"], values["std"]) == (list(preprocessing.mean), list(preprocessing.std))
    assert values["class_names"] == list(model.config.class_names)


def test_the_report_is_of_the_file(nano_onnx):
    _, report = nano_onnx
    assert [path.name for path in report.path.parent.iterdir()] == [report.path.name]
    assert report.size == report.path.stat().st_size
    assert report.nodes < 3000
    assert 0 < report.error < 1e-4
    assert report.milliseconds > 0


def test_it_classifies_the_photographs_as_pytorch_does(nano_onnx):
    model, report = nano_onnx
    transform = build_transform(model.config.preprocessing)
    pictures = torch.stack([transform(read_image(path)) for path in sample_pictures()])
    (found,) = open_session(report).run(None, {"pixel_values": pictures.numpy()})
    with torch.inference_mode():
        assert found.argmax(-1).tolist() == model(pictures).argmax(-1).tolist()


@pytest.fixture
def quick(monkeypatch, nano_onnx):
    """The packaged model's graph in place of tracing."""
    import onnx

    proto = onnx.load(nano_onnx[1].path)
    monkeypatch.setattr(export, "trace_onnx", lambda *_: proto)
    return proto


def test_a_file_that_differs_is_not_kept(quick, tmp_path, capsys):
    weight = quick.graph.initializer[0]
    values = np.frombuffer(weight.raw_data, np.float32) + 0.5
    weight.raw_data = values.astype(np.float32).tobytes()
    path = tmp_path / "nano.onnx"
    path.write_text("the old file")
    assert main(["export", "mamba_vision_nano_32", "--output", str(path), "--overwrite"]) == 1
    assert "was not kept" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["nano.onnx"]
    assert path.read_text() == "the old file"


def test_the_command_prints_what_it_wrote(quick, tmp_path, capsys):
    path = tmp_path / "folder" / "nano.onnx"
    assert main(["export", "mamba_vision_nano_32", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: " in out
    for word in (
        "MiB",
        "nodes",
        "largest error",
        "the same class for 100% of the photographs",
        "ms a call (onnxruntime)",
    ):
        assert word in out
    assert [file.name for file in path.parent.iterdir()] == ["nano.onnx"]


def test_a_file_that_is_there_is_replaced_when_asked_for_alone(quick, tmp_path, capsys):
    path = tmp_path / "nano.onnx"
    path.write_text("the old file")
    assert main(["export", "mamba_vision_nano_32", "-o", str(path)]) == 2
    sentence = f"{path} exists; --overwrite replaces it, --output names another."
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"
    assert path.read_text() == "the old file"
    assert main(["export", "mamba_vision_nano_32", "-o", str(path), "--overwrite"]) == 0
    assert path.stat().st_size > 10**6


def test_large_weights_lie_beside_the_graph(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES_INSIDE", 2**20)
    report = export.export_onnx(create_model("mamba_vision_nano_32", pretrained=True), tmp_path / "nano.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nano.onnx", "nano.onnx.data"]
    assert report.path.stat().st_size < 2**21 < report.size
    open_session(report)


def read_types(proto):
    """Number types of the weights -> how many bytes of each."""
    import onnx

    found = Counter()
    for tensor in proto.graph.initializer:
        found[onnx.TensorProto.DataType.Name(tensor.data_type)] += len(tensor.raw_data)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("uint8", [False, True])
def test_half_precision_halves_the_file_and_keeps_the_scan(nano_onnx, tmp_path, uint8):
    import onnx

    model, whole = nano_onnx
    report = export.export_onnx(model, tmp_path / "half.onnx", dtype="float16", uint8=uint8)
    assert report.size < 0.52 * whole.size
    assert 1e-5 < report.error < 2e-3
    assert report.agreement == 1
    proto = onnx.load(report.path)
    types = read_types(proto)
    assert types["FLOAT16"] > 50 * types["FLOAT"] > 0  # A, D and the step bias
    assert [value.type.tensor_type.elem_type for value in proto.graph.output] == [onnx.TensorProto.FLOAT]
    assert {node.domain for node in proto.graph.node} == {""}


@pytest.mark.slow
def test_int8_quantises_products_and_leaves_the_scan(quick, nano_onnx, tmp_path, monkeypatch, caplog):
    import onnx

    model, whole = nano_onnx
    monkeypatch.setattr(export, "MAX_BYTES_INSIDE", 2**20)
    report = export.export_onnx(model, tmp_path / "int8.onnx", dtype="int8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.data"]
    assert report.size < 0.3 * whole.size
    assert 1e-3 < report.error < 0.2
    assert report.agreement == 1
    assert report.calibration == "the sample photographs, whole, in their corners and mirrored"
    proto = onnx.load(report.path)
    onnx.checker.check_model(report.path, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.domain for entry in proto.opset_import] == [""]
    types = read_types(proto)
    assert types["INT8"] > 10 * types["FLOAT"] > 0
    fed = {name for node in proto.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in proto.graph.node:
        if node.op_type in export.QUANTIZED_OPERATORS:
            assert set(node.input[:2]) <= fed, node.name
    assert not caplog.records  # onnxruntime's advice to run its optimiser first


def test_int8_takes_pictures_of_ones_own(quick, nano_onnx, tmp_path):
    folder = tmp_path / "pictures" / "cat"
    folder.mkdir(parents=True)
    for path in sample_pictures()[:3]:
        shutil.copy(path, folder)
    report = export.export_onnx(nano_onnx[0], tmp_path / "i.onnx", dtype="int8", calibration=folder.parent)
    assert report.calibration == f"3 pictures of {folder.parent}"


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_one_sentence(missing, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", "mamba_vision_nano_32", "--output", str(tmp_path / "nano.onnx")]) == 2
    sentence = f"Export to ONNX needs {missing}, which is not installed: pip install onnx onnxruntime onnxscript."
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_onnxruntime_cannot_use_is_one_sentence(monkeypatch, tmp_path, capsys):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    output = tmp_path / "nano.onnx"
    arguments = ["export", "mamba_vision_nano_32", "--output", str(output), "--device"]
    assert main([*arguments, "cuda"]) == 2
    sentence = "This onnxruntime was built without CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu."
    assert capsys.readouterr().err == f"mambavision: {sentence}\n"
    assert main([*arguments, "mps"]) == 2
    assert capsys.readouterr().err == "mambavision: onnxruntime opens files here on cpu or cuda, not on 'mps'.\n"
    assert not output.exists()


def test_a_gpu_that_does_not_start_is_told_from_one_that_does(nano_onnx, monkeypatch):
    """Without its libraries onnxruntime falls back to the CPU, and says so in its log alone."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setitem(export.PROVIDERS, "cuda", "CPUExecutionProvider")
    with pytest.raises(ExportError, match="could not start on the GPU"):
        export.open_file(nano_onnx[1].path, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file_computes_the_same_on_a_gpu(dtype, tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime was built without CUDA")
    model = create_model("mamba_vision_nano_32", pretrained=True)
    report = export.export_onnx(model, tmp_path / "nano.onnx", dtype=dtype, device="cuda")
    assert report.runtime == "onnxruntime on cuda"
    assert report.error < {"float32": 1e-5, "float16": 1e-2}[dtype]
    assert report.agreement == 1


def test_frozen_parts_stay_frozen(tmp_path):
    model = create_model(TINY).train()
    model.patch_embed.eval()
    modes = [module.training for module in model.modules()]
    export.export_onnx(model, tmp_path / "a.onnx")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.slow
def test_t_is_small_and_loads_quickly(tmp_path):
    report = export.export_onnx(create_model("mamba_vision_T"), tmp_path / "t.onnx")
    started = time.perf_counter()
    open_session(report)
    assert time.perf_counter() - started < 3
    assert report.nodes < 3000


def test_an_old_pytorch_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cpu"))
    with pytest.raises(ExportError, match=r"needs PyTorch 2\.7 or newer, and this is 2\.6\.0\+cpu: pip install"):
        export.export_onnx(create_model(TINY).eval(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
