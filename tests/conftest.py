"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, which must be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What a shell runs in the background ignores Ctrl-C, and so would the commands that tests start, and end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test must never reach a hub: what is not here is an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"

pytest.register_assert_rewrite("op_checks", "hopper_checks")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow: run with -m slow")
    gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "slow" in item.keywords and "slow" not in (config.getoption("-m") or ""):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so that what a kernel leaves out shows."""

    def filling(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.dtype.is_floating_point else made

        return filled

    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, filling(getattr(place, name)))


@pytest.fixture(scope="session")
def onnx_exporter():
    """Skips where there is none."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from mambavision.export.onnx import OLDEST_TORCH

    if not torch.__version__ >= OLDEST_TORCH:
        pytest.skip(f"PyTorch older than {OLDEST_TORCH}")


@pytest.fixture(scope="session")
def nano_onnx(onnx_exporter, tmp_path_factory):
    """The packaged model as an ONNX classifier, and the report of its export."""
    from mambavision import create_model
    from mambavision.export.onnx import export_onnx

    model = create_model("mamba_vision_nano_32", pretrained=True)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "mamba_vision_nano_32.onnx")
