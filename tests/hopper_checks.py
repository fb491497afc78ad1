"""Where the kernels for Hopper GPUs can be tested, and how their results are held to float64."""

import os

import pytest
import torch

from op_checks import DEVICE, fail_if_required

TYPES = (torch.bfloat16, torch.float16)


def _runs():
    if DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return False
    from mambavision.ops.hopper.availability import fault

    reason = fault(0)
    assert reason is None or not os.environ.get("MAMBAVISION_REQUIRE_TRITON"), reason
    return reason is None


IS_HOPPER = _runs()


def require_bindings():
    """Skip the module, or the test, where what compiles CUDA C++ has no interface for Python.

    With MAMBAVISION_REQUIRE_TRITON in the environment that is a failure.
    """
    try:
        pytest.importorskip("cuda.bindings", "12.0")
    except pytest.skip.Exception as skipped:
        fail_if_required(skipped)
        raise


def on_hopper(test):
    """Mark a test as one for such a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of the Hopper generation")(test))


def check(actual, usual, truth, gelu=False):
    """At most twice as far from float64 as PyTorch in the same type; GELU may be 6e-5 off."""
    assert actual.shape == usual.shape
    assert actual.dtype == usual.dtype
    slack = 6e-5 if gelu else 1e-6
    errors, allowed = (actual.double() - truth).abs(), (usual.double() - truth).abs()
    assert errors.norm() <= 2 * allowed.norm() + slack * truth.numel() ** 0.5
    assert errors.max() <= 2 * allowed.max() + slack  # a few wrong ones among millions would not show in the norm


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)
