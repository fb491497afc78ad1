"""Where kernels can be tested, and how those with gradients are held to float64."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cannot multiply matrices of bfloat16.
HALVES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)
MANY = 1000  # numbers


def require_triton():
    """Skip the module, or the test, where kernels run neither on a GPU nor in Triton's interpreter.

    With MAMBAVISION_REQUIRE_TRITON in the environment that is a failure.
    """
    try:
        pytest.importorskip("triton", "3.3")
        if DEVICE == "cpu" and torch.__version__ < "2.13":  # compared as versions
            pytest.skip("PyTorch older than 2.13 launches no interpreted kernels", allow_module_level=True)
    except pytest.skip.Exception as skipped:
        fail_if_required(skipped)
        raise


def fail_if_required(skipped):
    """Fail, and do not skip, where kernels have to be tested."""
    if os.environ.get("MAMBAVISION_REQUIRE_TRITON"):
        pytest.fail(f"MAMBAVISION_REQUIRE_TRITON is set, and {skipped}", pytrace=False)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(dtype).to(DEVICE)


def gapped(tensor):
    """The same values with others between them."""
    wider = torch.stack([tensor, torch.full_like(tensor, 9)], dim=-1)[..., 0]
    assert not wider.is_contiguous()
    return wider


def gradients(function, tensors, grad_y, dtype=None):
    """The result and the gradients of all tensors, None for those that are None."""
    leaves = [
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors
    ]
    y = function(*leaves)
    y.backward(grad_y.to(y.dtype))
    return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def largest_error(actual, expected):
    """Of many numbers, relative to the largest: a few wrong ones would not show in the norm, as they do of few."""
    if expected.numel() < MANY:
        return 0.0
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def check(kernel, plain, tensors, grad_y, slack=1e-6):
    """Values and gradients are at most twice as far from float64 as PyTorch's in the same type, and of that type."""
    found = gradients(kernel, tensors, grad_y)
    usual = gradients(plain, tensors, grad_y)
    truth = gradients(plain, tensors, grad_y, torch.float64)
    for place, (actual, common, expected) in enumerate(zip(found, usual, truth, strict=True)):
        if common is None:
            assert actual is None
            continue
        assert actual.shape == common.shape
        assert actual.dtype == common.dtype
        for measure in (error, largest_error):
            assert measure(actual, expected) <= 2 * measure(common, expected) + slack, (place, measure.__name__)
