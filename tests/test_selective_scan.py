"""Every backend of the scan against golden vectors, float64, finite differences and each other."""

import sys
import types

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from mambavision.ops import backend as backends_module
from mambavision.ops import selective_scan, selective_scan_
from mambavision.ops.backend import Situation, select
from mambavision.ops.selective_scan import BACKENDS, choose_backend
from mambavision.ops.selective_scan.mamba_ssm import selective_scan_mamba_ssm

# test_scan_kernels.py has triton, and mamba_ssm is not among what is installed.
NAMES = [backend.name for backend in BACKENDS if backend.name not in ("meta", "triton", "mamba_ssm")]
VECTORS = np.load(GOLDEN / "selective_scan.npz")
CASES = sorted({key.split("/")[0] for key in VECTORS})
INPUTS = ("x", "dt", "A", "B", "C", "D", "dt_bias")
GOLDEN_NAMES = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
# length 1, not a square, a square, one more than a square, longer than a window
LENGTHS = (1, 2, 7, 49, 50, 200)


def golden(case, name):
    tensor = torch.from_numpy(VECTORS[f"{case}/{name}"]).double()
    return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor  # channels last, as our scan takes them


def random_inputs(batch, length, channels, state, dtype=torch.float32):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "dt": torch.randn(batch, length, channels).to(dtype),
        "A": -torch.rand(channels, state) * 4 - 0.1,
        "B": torch.randn(batch, length, state).to(dtype),
        "C": torch.randn(batch, length, state).to(dtype),
        "D": torch.randn(channels),
        "dt_bias": torch.randn(channels),
    }


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def with_gradients(inputs, backend, grad_y, dtype=None):
    """Output and gradients of a scan; `dtype` casts all inputs first."""
    leaves = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}
    y = selective_scan(**leaves, backend=backend)
    y.backward(grad_y.to(y.dtype))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", NAMES)
def test_equals_golden_outputs_and_gradients(case, backend):
    inputs = {name: golden(case, f"in/{GOLDEN_NAMES.get(name, name)}") for name in INPUTS}
    y, grads = with_gradients(inputs, backend, golden(case, "in/grad_y"))
    assert relative(y, golden(case, "out/y")) < 1e-12
    for name in INPUTS:
        expected = golden(case, f"out/grad_{GOLDEN_NAMES.get(name, name)}")
        assert (grads[name] - expected).norm() <= 1e-12 * expected.norm() + 1e-14, name


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_in_float64(length):
    inputs = random_inputs(3, length, 5, 4, torch.float64)
    grad_y = torch.randn(3, length, 5, dtype=torch.float64)
    expected, expected_grads = with_gradients(inputs, "reference", grad_y, torch.float64)
    y, grads = with_gradients(inputs, "chunked", grad_y, torch.float64)
    assert relative(y, expected) < 1e-13
    for name in INPUTS:
        # A's gradient of a single token is exactly zero
        assert (grads[name] - expected_grads[name]).norm() <= 1e-12 * expected_grads[name].norm() + 1e-14, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunked_is_as_exact_as_reference_in_each_type(dtype):
    inputs = random_inputs(2, 49, 16, 8, dtype)
    grad_y = torch.randn(2, 49, 16).to(dtype)
    truth, true_grads = with_gradients(inputs, "reference", grad_y, torch.float64)
    plain, plain_grads = with_gradients(inputs, "reference", grad_y)
    y, grads = with_gradients(inputs, "chunked", grad_y)
    assert y.dtype == dtype
    assert relative(y, truth) <= 2 * relative(plain, truth) + 1e-7
    for name in INPUTS:
        assert grads[name].dtype == inputs[name].dtype
        assert relative(grads[name], true_grads[name]) <= 2 * relative(plain_grads[name], true_grads[name]) + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_is_as_exact_as_the_reference_on_the_cpu(dtype, compiled):
    inputs = random_inputs(4, 49, 32, 8, dtype)
    grad_y = torch.randn(4, 49, 32).to(dtype)
    truth, true_grads = with_gradients(inputs, "reference", grad_y, torch.float64)
    plain, plain_grads = with_gradients(inputs, "reference", grad_y)
    scan = torch.compile(selective_scan, fullgraph=True) if compiled else selective_scan
    leaves = {name: tensor.cuda().requires_grad_() for name, tensor in inputs.items()}
    y = scan(**leaves)
    y.backward(grad_y.cuda())
    assert relative(y.cpu(), truth) <= 2 * relative(plain, truth) + 1e-6
    for name in INPUTS:
        bound = 2 * relative(plain_grads[name], true_grads[name]) + 1e-5
        assert relative(leaves[name].grad.cpu(), true_grads[name]) <= bound, name


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("length", [1, 5])
def test_gradients_equal_finite_differences(backend, length):
    inputs = random_inputs(1, length, 2, 2, torch.float64)
    leaves = [inputs[name].double().requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, backend=backend), leaves)
    assert torch.autograd.gradgradcheck(lambda *args: selective_scan(*args, backend=backend), leaves)


@pytest.mark.parametrize("backend", NAMES)
def test_optional_skip_and_bias(backend):
    inputs = random_inputs(2, 10, 3, 4)
    zeros = {**inputs, "D": torch.zeros(3), "dt_bias": torch.zeros(3)}
    without = {**inputs, "D": None, "dt_bias": None}
    torch.testing.assert_close(selective_scan(**without, backend=backend), selective_scan(**zeros, backend=backend))


@pytest.mark.parametrize("backend", NAMES)
def test_strided_views_give_the_same(backend):
    inputs = random_inputs(2, 20, 6, 4)
    strided = {
        name: torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2].copy_(tensor)
        for name, tensor in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    torch.testing.assert_close(selective_scan(**strided, backend=backend), selective_scan(**inputs, backend=backend))


def test_empty_batch():
    inputs = random_inputs(0, 9, 4, 2)
    assert selective_scan(**inputs).shape == (0, 9, 4)


def test_large_steps_neither_overflow_nor_give_nan():
    inputs = random_inputs(2, 64, 4, 8, torch.float16)
    inputs["dt"] = torch.full_like(inputs["dt"], 500.0)
    y, grads = with_gradients(inputs, "chunked", torch.ones(2, 64, 4))
    reference = selective_scan(**inputs, backend="reference")
    torch.testing.assert_close(y, reference)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_autocast_leaves_the_state_in_float32():
    inputs = random_inputs(2, 49, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = with_gradients(inputs, "chunked", torch.ones(2, 49, 8))
    expected, expected_grads = with_gradients(inputs, "chunked", torch.ones(2, 49, 8))
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in INPUTS)


def test_memory_kept_for_the_backward_is_linear_in_length_and_free_of_states():
    def kept(length):
        inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs(1, length, 4, 16).items()}
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            selective_scan(**inputs)
        return sum(sizes.values())

    short, long = kept(256), kept(1024)
    assert long <= 4 * short
    # x, dt, B, C, the biased dt and what casting keeps: well under the 16 states a channel
    assert long < 1024 * 4 * 16 * 4


def test_compiles_without_graph_breaks():
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs(2, 10, 4, 4).items()}
    compiled = torch.compile(selective_scan, fullgraph=True)
    y = compiled(**inputs)
    expected = selective_scan(**inputs)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(inputs.values()), grad_y)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(inputs.values()), grad_y))


def test_the_compiler_is_told_from_export():
    """Dynamo before PyTorch 2.12 says of every compilation that it exports."""
    inputs = random_inputs(2, 10, 4, 4)
    graphs = []
    torch.compile(selective_scan, backend=lambda graph, _: graphs.append(graph) or graph)(**inputs)
    exported = torch.export.export(Scan(), (), inputs, strict=False)
    assert "chunked_scan" in graphs[0].code
    assert "chunked_scan" not in exported.graph_module.code


class Scan(torch.nn.Module):
    def forward(self, **inputs):
        return selective_scan(**inputs)


def test_registered_ops_obey_the_rules_of_custom_ops():
    from mambavision.ops.selective_scan.chunked import _opaque_backward, _opaque_scan

    inputs = random_inputs(2, 10, 4, 4)
    tensors = [inputs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")]
    torch.library.opcheck(_opaque_scan, tensors)
    torch.library.opcheck(_opaque_backward, [torch.randn(2, 10, 4), *(tensor.detach() for tensor in tensors)])


def test_export_holds_only_standard_operators():
    class Scan(torch.nn.Module):
        def forward(self, *args):
            return selective_scan(*args)

    args = tuple(random_inputs(2, 10, 4, 4).values())
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} if tensor.dim() == 3 else None for tensor in args)
    program = torch.export.export(Scan(), args, dynamic_shapes=(shapes,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "mambavision" in target]
    more = tuple(random_inputs(5, 10, 4, 4).values())
    torch.testing.assert_close(program.module()(*more), selective_scan(*more))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dt", (2, 9, 4)), ("A", (3, 8)), ("B", (2, 10, 7)), ("C", (1, 10, 8)), ("D", (5,)), ("dt_bias", (4, 1))],
)
def test_wrong_shapes_are_named(name, shape):
    inputs = {**random_inputs(2, 10, 4, 8), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=name):
        selective_scan(**inputs)


def test_second_derivatives_and_vmap_where_they_are_promised():
    inputs = {name: tensor.double().requires_grad_() for name, tensor in random_inputs(2, 5, 3, 4).items()}
    values = tuple(inputs.values())
    assert torch.autograd.gradgradcheck(lambda *given: selective_scan(*given, backend="chunked"), values)
    x, dt, A, B, C, D, dt_bias = (tensor.detach() for tensor in values)

    def scan(*sequence):
        x, dt, B, C = (part.unsqueeze(0) for part in sequence)
        return selective_scan(x, dt, A, B, C, D, dt_bias, backend="reference")[0]

    torch.testing.assert_close(torch.vmap(scan)(x, dt, B, C), selective_scan(x, dt, A, B, C, D, dt_bias))


def test_nothing_is_replaced_where_elements_share_memory():
    inputs = random_inputs(2, 5, 3, 8)
    inputs["x"] = inputs["x"][:1].expand(2, -1, -1)
    with pytest.raises(ValueError, match="share memory"):
        selective_scan_(**inputs)


def test_wrong_input_is_named():
    inputs = random_inputs(2, 10, 4, 8)
    with pytest.raises(ValueError, match="floating"):
        selective_scan(**{**inputs, "x": inputs["x"].long()})
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(**{**inputs, "x": inputs["x"][:, :0]})
    with pytest.raises(ValueError, match="meta, triton, chunked, mamba_ssm, reference"):
        selective_scan(**inputs, backend="cuda")


def test_selection_is_pure_and_gives_its_reason():
    situation = Situation("cpu", torch.float32, 49, 8)
    assert select("selective_scan", BACKENDS, situation).backend.name == "chunked"
    assert select("selective_scan", BACKENDS, situation, "reference").reason == "requested"
    assert "everywhere" in choose_backend(torch.zeros(1, 4, 2)).reason


def test_meta_tensors_have_shapes_only():
    inputs = {name: tensor.to("meta") for name, tensor in random_inputs(2, 10, 4, 8, torch.bfloat16).items()}
    y = selective_scan(**inputs)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 10, 4), torch.bfloat16)
    with pytest.raises(RuntimeError, match="cpu tensors have values"):
        selective_scan(**random_inputs(2, 10, 4, 8), backend="meta")


def test_selection_passes_over_what_cannot_run_and_says_why():
    from dataclasses import replace

    chunked = next(backend for backend in BACKENDS if backend.name == "chunked")
    fast = replace(chunked, name="fast", refusal=lambda s: None if s.device_type == "cuda" else "needs a GPU")
    backends = (fast, *BACKENDS)
    choice = select("scan", backends, Situation("cpu", torch.float32, 49, 8))
    assert choice.backend.name == "chunked"
    assert "not fast: needs a GPU" in choice.reason
    assert select("scan", backends, Situation("cuda", torch.float32, 49, 8)).backend.name == "fast"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        select("scan", backends, Situation("cpu", torch.float32, 49, 8), "fast")
    with pytest.raises(RuntimeError, match="No backend of scan"):
        select("scan", (fast,), Situation("cpu", torch.float32, 49, 8))


def test_what_triton_misses_is_said_once_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(backends_module, "triton_fault", lambda: "Triton finds no C compiler")
    backends_module._say_once.cache_clear()
    for device in ("cpu", "cuda", "cuda"):
        assert select("scan", BACKENDS, Situation(device, torch.float32, 49, 8)).backend.name == "chunked"
    assert [record.getMessage() for record in caplog.records] == [
        "On the GPU slower code runs in place of the kernels: Triton finds no C compiler."
    ]
    backends_module._say_once.cache_clear()


def test_a_compiler_and_its_headers_are_looked_for(monkeypatch, tmp_path):
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert "no C compiler" in backends_module._launcher_fault()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(backends_module.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert "Python.h" in backends_module._launcher_fault()
    (tmp_path / "Python.h").touch()
    assert backends_module._launcher_fault() is None
    (tmp_path / "gcc").unlink()
    (tmp_path / "cache" / "built before").mkdir(parents=True)
    assert backends_module._launcher_fault() is None


# --- mamba_ssm --------------------------------------------------------------------------------------------------------


def test_mamba_ssm_is_asked_in_its_own_layout(monkeypatch):
    """With a stand-in for the package, which takes channels before tokens and steps in float32."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None
        assert delta_softplus
        assert all(tensor.is_contiguous() for tensor in (u, delta, B, C))
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        x, dt, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
        return selective_scan(x, dt, A, B, C, D, delta_bias).transpose(1, 2)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    inputs = random_inputs(2, 9, 6, 4)
    torch.testing.assert_close(selective_scan_mamba_ssm(*inputs.values()), selective_scan(**inputs))


def test_mamba_ssm_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="mamba_ssm is for CUDA"):
        selective_scan(**random_inputs(1, 2, 2, 2), backend="mamba_ssm")
    refusal = {backend.name: backend.refusal for backend in BACKENDS}["mamba_ssm"]
    assert "not installed" in refusal(Situation("cuda", torch.float32, 4, 8))
    assert "too wide" in refusal(Situation("cuda", torch.float64, 4, 8))
