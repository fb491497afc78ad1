"""Launching: on the GPU where the tensors are, for any number of programs, and by several threads."""

import threading
from functools import partial
from time import sleep

import pytest
import torch

from mambavision import create_model
from mambavision.inference import optimize
from mambavision.ops.conv3x3 import conv3x3
from mambavision.ops.linear import linear
from mambavision.ops.selective_scan import selective_scan
from op_checks import require_triton

require_triton()

from mambavision.ops import launch  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.linear import triton_op as linear_op  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_beside_a_second_gpu_a_kernel_still_computes(monkeypatch):
    x, weight = torch.randn(5, 16), torch.randn(7, 16)
    entered = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "_OnItsDevice", lambda kernel: entered.append(kernel) or kernel)
    y = linear_op.linear(x, weight, None, None, None, 0.0, "none")
    assert len(entered) == 1
    torch.testing.assert_close(y, x @ weight.t())


def test_a_thread_launches_while_another_compiles():
    seen = []
    with launch.precompiling():
        thread = threading.Thread(target=lambda: seen.append(launch.is_precompiling()))
        thread.start()
        thread.join()
        assert launch.is_precompiling()
    assert seen == [False]
    assert not launch.is_precompiling()


def test_what_is_noted_is_compiled_at_the_end_once_and_the_longest_first(monkeypatch):
    monkeypatch.setattr(launch, "WORKERS", 1)
    done = []
    with launch.precompiling():
        for name, length in (("short", 1), ("long", 9), ("short", 1)):
            launch.note(name, partial(done.append, name), length=length)
        assert not done
    assert done == ["long", "short"]


def test_compilers_that_are_no_python_begin_at_once():
    begun, end = threading.Event(), threading.Event()
    with launch.precompiling():
        for _ in range(2):
            launch.note("name", lambda: (begun.set(), end.wait(60)), at_once=True)
        assert begun.wait(60)
        assert len(launch._precompiling.asked) == 1
        end.set()


def test_compilers_that_are_no_python_hold_no_others_up(monkeypatch):
    monkeypatch.setattr(launch, "NATIVE_WORKERS", 1)
    end = threading.Event()
    with launch.precompiling():
        launch.note("native", lambda: end.wait(60) or pytest.fail("the other one was not compiled"), at_once=True)
        launch.note("triton", end.set)


def test_nothing_is_compiled_for_what_failed():
    done = []

    def fail():
        with launch.precompiling():
            launch.note("name", partial(done.append, "name"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not done
    assert not launch.is_precompiling()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_failed_compilation_is_told(at_once):
    with pytest.raises(ZeroDivisionError), launch.precompiling():
        launch.note("name", lambda: 1 / 0, at_once=at_once)


def test_behind_a_failure_nothing_is_compiled_any_more(monkeypatch):
    monkeypatch.setattr(launch, "WORKERS", 1)
    done = []

    def fail():
        sleep(0.2)
        raise ZeroDivisionError

    def compile_all():
        with launch.precompiling():
            launch.note("fails", fail, length=1)
            for number in range(100):
                launch.note(number, lambda: (sleep(0.01), done.append(1)))

    with pytest.raises(ZeroDivisionError):
        compile_all()
    assert len(done) < 50


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    x, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((64, 32), (48, 32)))
    results = [linear(x.to(device), weight.to(device), backend="triton").cpu() for device in ("cuda:0", "cuda:1")]
    assert torch.equal(*results)
    model = create_model("mamba_vision_test_tiny").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        found = optimize(model.to("cuda:1"))(images.to("cuda:1"))
    assert found.device == torch.device("cuda:1")
    assert (found.cpu() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
def test_more_programs_than_a_grid_has_rows():
    """65,535 is the most in its second and third dimension."""
    x, weight = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((1, 8, 4200, 2050), (16, 8, 3, 3))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = conv3x3(x, weight, backend="triton")
        expected = torch.nn.functional.conv2d(x, weight, padding=1)
    assert (y - expected).norm() < 0.01 * expected.norm()

    u = torch.randn(70_000, 3, 8, device="cuda")
    A, B = -torch.rand(8, 8, device="cuda"), torch.randn(70_000, 3, 8, device="cuda")
    inputs = [tensor.requires_grad_() for tensor in (u, u.clone(), A, B, B.clone())]
    found, expected = (
        torch.autograd.grad(selective_scan(*inputs, backend=backend).square().sum(), inputs)
        for backend in ("triton", "reference")
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
