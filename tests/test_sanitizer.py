"""The kernels under NVIDIA's compute-sanitizer: they touch only what is theirs, and wait where they must."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

# Files whose tests launch kernels on small and odd shapes. Left out: what compiles, records or is large, which takes
# minutes under the sanitizer and launches the same kernels.
FILES = (
    "scan_kernels",
    "fused_ops",
    "hopper_product",
    "hopper_attention",
    "hopper_conv3x3",
    "float8",
    "training_ops",
    "add_layer_norm",
    "batch_norm",
)
LEFT_OUT = ("compile", "networks", "torch_asks", "known_to_pytorch", "graph", "memory", "network", "packaged", "logits")
ERROR = 99


@pytest.fixture
def sanitizer():
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not on PATH")
    return found


@pytest.mark.parametrize("file", FILES)
def test_kernels_stay_inside_their_memory(file, sanitizer):
    check(sanitizer, "memcheck", file)


@pytest.mark.parametrize("file", ["hopper_product", "hopper_attention", "hopper_conv3x3"])
def test_kernels_with_barriers_of_their_own_use_them_rightly(file, sanitizer):
    check(sanitizer, "synccheck", file)


def check(sanitizer, tool, file):
    """Run a file's tests under one of the sanitizer's tools."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
    tests += [f"tests/test_{file}.py", "-k", " and ".join(f"not {word}" for word in LEFT_OUT)]
    done = subprocess.run(
        # Not what the driver answers: CUDA's bindings ask for functions that it may not have. A failing launch raises.
        [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(ERROR), *tests],
        cwd=Path(__file__).parents[1],
        # Every tensor by itself: inside PyTorch's blocks of memory a read beside a tensor would be allowed.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    assert " passed" in done.stdout
