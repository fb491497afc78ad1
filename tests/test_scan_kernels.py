"""The Triton kernels of the selective scan: values and every gradient against float64, on a GPU or interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from op_checks import DEVICE, error, gapped, gradients, require_triton

require_triton()

from mambavision.ops.selective_scan import kernels, triton_op  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.selective_scan.chunked import selective_scan_chunked  # noqa: E402
from mambavision.ops.selective_scan.reference import selective_scan_reference  # noqa: E402
from mambavision.ops.selective_scan.triton_op import Cut, cut, selective_scan_triton  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(batch, length, channels, state, dtype=torch.float32, strided=False):
    """Scan inputs; `strided` ones are parts of wider tensors, as a network's projections give them."""
    if strided:
        wide = torch.randn(batch, length, 3 * channels + 2 * state).to(dtype)
        x, _, dt, B, C = wide.split([channels, channels, channels, state, state], dim=-1)
    else:
        x, dt = (torch.randn(batch, length, channels).to(dtype) for _ in range(2))
        B, C = (torch.randn(batch, length, state).to(dtype) for _ in range(2))
    A = -torch.rand(channels, state) * 4 - 0.1
    return [tensor.to(DEVICE) for tensor in (x, dt, A, B, C, torch.randn(channels), torch.randn(channels))]


def check(tensors, grad_y):
    """Values and gradients are at most twice as far from float64 as the reference's in the same type."""
    # Triton's interpreter cuts to bfloat16 where a GPU rounds, which errs twice as far, always to one side.
    factor = 6 if DEVICE == "cpu" and tensors[0].dtype == torch.bfloat16 else 2
    # Step by step where that is quick; test_selective_scan.py holds the other form to it.
    pytorch = selective_scan_reference if tensors[0].shape[1] <= 256 else selective_scan_chunked
    truth = gradients(pytorch, tensors, grad_y, torch.float64)
    plain = gradients(pytorch, tensors, grad_y)
    found = gradients(selective_scan_triton, tensors, grad_y)
    for name, actual, usual, expected in zip(("y", *NAMES), found, plain, truth, strict=True):
        if expected is not None:
            assert actual.dtype == usual.dtype
            assert error(actual, expected) <= factor * error(usual, expected) + 1e-6, name
    with torch.no_grad():
        assert error(selective_scan_triton(*tensors), truth[0]) <= factor * error(plain[0], truth[0]) + 1e-6


@pytest.mark.parametrize("which", ["B", "C"])
def test_each_of_the_projections_keeps_its_digits(which, poisoned):
    """One of them of fewer bits: then the other is not rounded to it."""
    tensors = inputs(1, 20, 8, 8)
    place = NAMES.index(which)
    tensors[place] = tensors[place].bfloat16()
    with torch.no_grad():
        expected = selective_scan_reference(*(tensor.double() for tensor in tensors))
        assert error(selective_scan_triton(*tensors), expected) < 1e-6


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("state", [4, 8, 16])
def test_values_and_gradients(dtype, state, poisoned):
    tensors = inputs(1, 6, 33, state, dtype)
    check(tensors, torch.randn(1, 6, 33, device=DEVICE).to(dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (3, 4, 32), (2, 14, 20)], ids=str)
def test_odd_and_single_sizes(shape, poisoned):
    tensors = inputs(*shape, 8)
    check(tensors, torch.randn(*shape, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [24, 17])
def test_chunks_are_stitched(dtype, length, poisoned, monkeypatch):
    monkeypatch.setattr(triton_op, "cut", lambda *_, **__: Cut(32, 2, 4, 8, 3))
    monkeypatch.setattr(triton_op, "AHEAD", 2)
    tensors = inputs(1, length, 33, 4, dtype)
    check(tensors, torch.randn(1, length, 33, device=DEVICE).to(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strided_views(dtype, poisoned):
    tensors = inputs(2, 6, 33, 8, dtype, strided=True)  # rows of odd length: neither B nor C can be read in pairs
    check(tensors, torch.randn(6, 2, 33, device=DEVICE).to(dtype).transpose(0, 1))


def test_strided_parameters(poisoned):
    x, dt, A, B, C, D, dt_bias = inputs(2, 6, 33, 8)
    A = A.t().contiguous().t()
    D, dt_bias = gapped(D), gapped(dt_bias)
    assert not A.is_contiguous()
    check([x, dt, A, B, C, D, dt_bias], torch.randn(2, 6, 33, device=DEVICE))
    rates = (-torch.arange(1.0, 9, device=DEVICE)).expand(33, 8)  # the same for every channel
    with torch.no_grad():
        found = selective_scan_triton(x, dt, rates, B, C, D[:1].expand(33), dt_bias)
        expected = selective_scan_reference(x, dt, rates, B, C, D[:1].expand(33), dt_bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), ("D", "dt_bias")], ids=str)
def test_absent_skip_and_bias(absent, poisoned):
    tensors = [None if name in absent else t for name, t in zip(NAMES, inputs(1, 5, 8, 4), strict=True)]
    check(tensors, torch.randn(1, 5, 8, device=DEVICE))


def test_extreme_steps_stay_finite_and_exact():
    tensors = inputs(1, 6, 32, 8)
    tensors[1] = torch.linspace(-90, 90, 6 * 32, device=DEVICE).reshape(1, 6, 32)
    check(tensors, torch.randn(1, 6, 32, device=DEVICE))


@pytest.mark.parametrize("length", [1, 9, 14, 40])
def test_in_place_it_gives_the_same(length):
    tensors = inputs(2, length, 33, 8, strided=True)
    with torch.no_grad():
        expected = selective_scan_triton(*tensors)
        triton_op.scan_(*tensors)
    torch.testing.assert_close(tensors[0], expected, rtol=0, atol=0)


def test_an_empty_batch_has_an_empty_result():
    found = gradients(selective_scan_triton, inputs(0, 5, 8, 4), torch.randn(0, 5, 8, device=DEVICE))
    assert found[0].shape == (0, 5, 8)
    assert all(not gradient.any() for gradient in found[1:])


def test_an_unneeded_gradient_is_not_given():
    tensors = inputs(1, 5, 8, 4)
    tensors[0].requires_grad_()
    selective_scan_triton(*tensors).sum().backward()
    assert tensors[0].grad is not None
    assert all(tensor.grad is None for tensor in tensors[1:])


@pytest.mark.parametrize(
    ("batch", "length", "channels"),
    [(1, 1, 1), (1, 49, 320), (1, 196, 160), (4, 1024, 256), (1, 12544, 160), (128, 196, 160)],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_cut_covers_every_token_and_channel_once(batch, length, channels, training):
    block, blocks, group, chunk, chunks = cut(batch, length, channels, training=training)
    assert (blocks - 1) * block < channels <= blocks * block
    assert (chunks - 1) * chunk < length <= chunks * chunk
    assert chunk % group == 0


def test_few_long_sequences_are_cut_and_many_short_ones_are_not():
    assert cut(1, 12544, 160).chunks * cut(1, 12544, 160).blocks >= 500
    assert cut(128, 196, 160).chunks == 1


def test_windows_are_walked_without_masks_by_as_many_warps_as_keep_a_gpu_busy():
    assert cut(128, 196, 160)[:3] == (16, 10, 7)
    assert cut(128, 196, 256)[:3] == (32, 8, 7)
    assert cut(128, 49, 320)[:3] == (32, 10, 7)
    assert cut(512, 64, 160).group == 8
    assert cut(512, 65, 160).group == 8  # no group divides it
    assert cut(128, 49, 320, training=True).group == triton_op.SAVED_GROUP


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mambavision.ops.selective_scan import kernels
from mambavision.ops.selective_scan.triton_op import AHEAD

FLOAT32 = {"A", "D", "dt_bias", "starts", "saved", "ends", "sums", "entering"}
FLOAT32 |= {"grad_BC", "grad_constants"}
DATA = {"x", "dt", "B", "C", "y", "grad_y", "grad_x", "grad_dt"}

def build(kernel, data, constants):
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(DATA, "*" + data)
    types = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature=types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    print(kernel.__name__, data)

rows = dict.fromkeys(("x_row", "dt_row", "B_row", "C_row"), 176)
for data in ("bf16", "fp16", "fp32"):
    shared = dict(rows, N=8, WIDTH=4, PAIRED=data != "fp32", BLOCK=32, GROUP=4, WHOLE=True, FULL=True)
    shared |= dict(HAS_D=True, HAS_BIAS=True)
    for starts, save, ends in ((False, True, False), (True, False, False), (False, False, True)):
        short = not save and data != "fp32"
        build(kernels.walk_kernel, data, dict(shared, y_row=320, STARTS=starts, SAVE=save, ENDS=ends, SHORT=short))
    for ends in (False, True):
        build(kernels.backward_kernel, data, dict(shared, grad_y_row=320, STARTS=True, ENDS=ends, LEVELS=4))
for reverse in (False, True):
    build(kernels.stitch_kernel, "fp32", dict(N=8, BLOCK=128, AHEAD=AHEAD, REVERSE=reverse))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes with its Linux builds")
def test_kernels_compile_for_a_gpu():
    """The interpreter takes much that the compiler does not; compiling needs no GPU."""
    source = Path(kernels.__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 17


# --- what only a GPU shows --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(64, 196, 160), (64, 49, 320), (8, 196, 392), (4, 1024, 160), (1, 12544, 160)], ids=str
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sizes_of_the_networks(shape, dtype, poisoned):
    tensors = inputs(*shape, 8, dtype, strided=True)
    check(tensors, torch.randn(shape, device=DEVICE).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [49, 1024])
def test_the_operators_are_registered_as_torch_asks(length):
    tensors = inputs(2, length, 64, 8)
    torch.library.opcheck(triton_op.scan, tensors)
    torch.library.opcheck(triton_op.scan_for_training, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.gpu
def test_compiled_values_and_gradients_are_those_of_eager():
    tensors = inputs(4, 49, 64, 8, torch.bfloat16)
    grad_y = torch.randn(4, 49, 64, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(selective_scan_triton, fullgraph=True)
    for actual, expected in zip(
        gradients(compiled, tensors, grad_y), gradients(selective_scan_triton, tensors, grad_y), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    tensors = inputs(4, 196, 64, 8, torch.float16)
    with torch.inference_mode():
        selective_scan_triton(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = selective_scan_triton(*tensors)
        tensors[0].mul_(0.5)
        graph.replay()
        torch.testing.assert_close(y, selective_scan_triton(*tensors), rtol=0, atol=0)


@pytest.mark.gpu
def test_memory_stays_linear_in_the_length():
    def peak(length):
        tensors = [tensor.requires_grad_() for tensor in inputs(4, length, 256, 8, torch.bfloat16)]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        selective_scan_triton(*tensors).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(4096) < 4.5 * peak(1024)
