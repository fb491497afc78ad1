"""`optimize`: the same results from kernels and graphs, on a GPU; its parts through their references elsewhere."""

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from deterministic_weights import deterministic_images
from mambavision import create_model
from mambavision.inference import gpu, optimize
from mambavision.inference.cpu import can_pack
from mambavision.inference.cudnn import fastest_convolutions
from mambavision.inference.fuse import fuse
from mambavision.inference.graphs import MAX_GRAPHS, MAX_REMEMBERED, RECORDED_AT, REPLACING_AT, GraphRunner
from mambavision.inference.images import read_image
from mambavision.inference.optimization import _check_as_built, finished
from mambavision.inference.picture_files import sample_pictures
from mambavision.inference.preprocess import build_transform
from mambavision.layers.attention import Attention
from mambavision.ops.window_attention import window_attention
from test_fuse import outputs, trained

TINY = "mamba_vision_test_tiny"
# Channels and heads that must be padded: 12 and 24 are no multiples of 16, and heads of 12 none of 8.
PADDED = {"dim": 12, "num_heads": (1, 1, 4, 8)}


def difference(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def photographs(model):
    """The pictures that ship with the package, as `model` takes them."""
    prepare = build_transform(model.config.preprocessing)
    return torch.stack([prepare(read_image(path)) for path in sample_pictures()])


def with_kernels(model):
    """What `optimize` makes on a GPU, without graphs and in the model's type, on any device."""
    fused = fuse(model)
    gpu.use_kernels(fused)
    return finished(fused, dtype=next(model.parameters()).dtype, tune=False)


@pytest.fixture(params=["few", "many"])
def amount(request, monkeypatch):
    """Both ways that tokens go; elsewhere than on a GPU the second is asked for by name."""
    monkeypatch.setattr(gpu, "takes_few", lambda _: request.param == "few")


@pytest.mark.parametrize("arguments", [{}, PADDED, {"layer_scale": None, **PADDED}, {"features_only": True, **PADDED}])
def test_the_kernels_network_computes_the_same(arguments, amount):
    model = trained(**arguments).eval()
    images = torch.randn(2, 3, 70, 64)
    for actual, expected in zip(outputs(with_kernels(model), images), outputs(model, images), strict=True):
        assert actual.shape == expected.shape
        assert difference(actual, expected) < 2e-5  # GELU in its tanh form included


@pytest.mark.parametrize("float8", [False, True])
def test_a_pruned_network_can_be_optimised(float8):
    model = trained().eval()
    model.prune_intermediate_layers([1])
    fused = fuse(model)
    gpu.use_kernels(fused, float8=float8)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = finished(fused, dtype=torch.float32, tune=False).forward_features(images)
        assert difference(found, model.forward_features(images)) < (6e-2 if float8 else 2e-5)


@pytest.mark.parametrize(("shape", "gradient", "first"), [
    ((128, 8, 196, 40), False, "CUDNN_ATTENTION"),
    ((1, 8, 196, 40), False, None),  # PyTorch's own order
    ((128, 8, 196, 40), True, "FLASH_ATTENTION"),
])  # fmt: skip
def test_attention_takes_the_fastest_backend(monkeypatch, shape, gradient, first):
    chosen = []
    monkeypatch.setattr(gpu, "sdpa_kernel", lambda order, **_: chosen.append([backend.name for backend in order]))
    query = SimpleNamespace(shape=shape, is_cuda=True, requires_grad=gradient)
    gpu._fastest_attention(query)
    assert [order[0] for order in chosen] == ([] if first is None else [first])
    assert not gradient or "CUDNN_ATTENTION" not in chosen[0]  # whose backward gives NaN


@pytest.mark.parametrize(
    ("windows", "length", "ours"),
    [(3, 49, True), (gpu.MANY_WINDOWS, 49, True), (3, 196, True), (gpu.MANY_WINDOWS, 196, False), (3, 300, False)],
)
def test_padded_heads_keep_the_scale_of_their_width(monkeypatch, windows, length, ours):
    attention = Attention(24, num_heads=2).eval()  # heads of 12 channels, padded to 16
    kernels = gpu.KernelAttention(attention)
    asked = []
    monkeypatch.setattr(
        gpu, "window_attention", lambda qkv, **how: (asked.append(how), window_attention(qkv, **how))[1]
    )
    x = torch.randn(windows, length, 24)
    found = kernels.last(kernels(F.linear(x, kernels.first.weight, kernels.first.bias)))
    torch.testing.assert_close(found, attention(x))
    assert asked == ([{"num_heads": 2, "scale": 12**-0.5}] if ours else [])


def test_it_compiles_without_breaks(amount):
    network = with_kernels(trained().eval())
    images = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert difference(compiled(images), network(images)) < 1e-5


def test_overlapping_calls_leave_cudnns_setting_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    first, second = fastest_convolutions(), fastest_convolutions()
    with first:
        second.__enter__()
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
    second.__exit__(None, None, None)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(not can_pack(torch.float32), reason="nothing is replaced here")
def test_activations_that_are_called_may_be_others():
    model = trained().eval()
    model.patch_embed.conv_down[2] = torch.nn.SiLU()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert difference(optimize(model, dtype=torch.float32)(images), model(images)) < 2e-5
    with pytest.raises(ValueError, match="conv_down.2 is SiLU"):  # on a GPU the stem is one kernel
        _check_as_built(model, called=())


@pytest.mark.skipif(not can_pack(torch.float32), reason="nothing is replaced here")
@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.ReLU])  # ReLU is called elsewhere
@pytest.mark.parametrize("part", ["blocks.0.act1", "mlp.act"])
def test_other_activations_are_refused(part, activation):
    model = trained()
    where = {"blocks.0.act1": model.levels[0], "mlp.act": model.levels[2].blocks[0]}
    owner, _, name = part.rpartition(".")
    setattr(where[part].get_submodule(owner), name, activation())
    with pytest.raises(
        ValueError, match=rf"{part} is {activation.__name__}\(\), and the kernels compute .*; use `fuse`"
    ):
        optimize(model)


@pytest.mark.skipif(not can_pack(torch.float32), reason="nothing is replaced here")
def test_hooks_that_would_be_lost_are_refused():
    model = trained().eval()
    handle = model.levels[0].blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"levels.0.blocks.0 has a hook, which the copy would not call"):
        optimize(model)
    handle.remove()
    called = []
    kept = (model, model.levels[0], model.levels[2].blocks[0])  # which a copy for a CPU calls
    for module in kept:
        module.register_forward_hook(lambda *_: called.append(1))
    optimize(model)(torch.randn(1, 3, 64, 64))
    assert len(called) == len(kept)


@pytest.mark.skipif(not can_pack(torch.float32), reason="nothing is replaced here")
def test_a_head_can_be_assigned_in_any_type():
    model, images = trained().eval(), torch.randn(2, 3, 64, 64)
    fast = optimize(model, dtype=torch.bfloat16)
    for head in (torch.nn.Linear(model.num_features, 5), torch.nn.Sequential(torch.nn.Linear(model.num_features, 5))):
        fast.head = head
        with torch.no_grad():
            assert difference(fast(images), fast.forward_head(fast.forward_features(images))) < 2e-2


def test_every_result_has_the_type_of_the_pictures():
    model = trained().eval()
    images = torch.randn(2, 3, 64, 64)
    for network in (with_kernels(model).to(torch.bfloat16), optimize(model, dtype=torch.bfloat16)):
        with torch.no_grad():
            features, (final, maps) = network.forward_features(images), network.forward_intermediates(images)
            only = network.forward_intermediates(images, intermediates_only=True)
            found = [
                features,
                final,
                *maps,
                *only,
                network.forward_head(features),
                network.forward_head(features, True),
            ]
            assert {tensor.dtype for tensor in found} == {torch.float32}
            assert difference(network.forward_head(features), model(images)) < 3e-2


def test_types_at_the_border_are_those_of_the_pictures():
    network = with_kernels(trained().eval()).to(torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert network(torch.randn(1, 3, 64, 64, dtype=dtype)).dtype == dtype
    with pytest.raises(ValueError, match="floating type"):
        network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pictures as"):
        network(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_it_takes_any_type_too(dtype):
    model = trained().eval()
    network = optimize(model, dtype=dtype)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for kind in (torch.float32, torch.float16):
            found = network(images.to(kind))
            assert found.dtype == kind
            assert difference(found, model(images)) < (2e-3 if dtype == torch.float32 else 3e-2)
        assert difference(network.forward_features(images), model.forward_features(images)) < 3e-2


@pytest.mark.parametrize("fast", [False, True])
def test_on_a_cpu_the_type_is_the_fastest_by_default(fast, monkeypatch):
    monkeypatch.setattr("mambavision.inference.optimization.has_fast_bfloat16", lambda: fast)
    model, images = trained().eval(), torch.randn(2, 3, 64, 64)
    network = optimize(model)
    assert network.compute_dtype == (torch.bfloat16 if fast else torch.float32)
    with torch.no_grad():
        assert difference(network(images), model(images)) < 3e-2


def test_on_a_cpu_a_gradient_is_not_lost_in_silence():
    network = optimize(trained().eval())
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        network(images)
    with torch.no_grad():
        assert network(images).shape == (1, network.num_classes)


def test_gradients_reach_the_pictures():
    model = trained().eval()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = torch.autograd.grad(model(images).sum(), images)[0]
    found = torch.autograd.grad(with_kernels(model)(images).sum(), images)[0]
    assert difference(found, expected) < 1e-4


def test_the_head_can_be_replaced():
    network = with_kernels(trained().eval())
    network.reset_classifier(3)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(images), network.forward_head(network.forward_features(images)))


def test_graphs_are_for_shapes_that_come_again(monkeypatch):
    runner = GraphRunner(dtype=torch.float32)
    recorded = []

    def record(_, x):
        recorded.append(len(x))
        raise StopIteration  # what follows needs a GPU

    monkeypatch.setattr(runner, "_run_once", lambda *_, new: ("once", new))
    monkeypatch.setattr(runner, "_record", record)
    assert runner.run(None, torch.zeros(1)) == ("once", True)
    with pytest.raises(StopIteration):
        runner.run(None, torch.zeros(1))
    assert recorded == [1]
    runner._recorded.update({(number,): None for number in range(MAX_GRAPHS)})
    sights = [runner.run(None, torch.zeros(2)) for _ in range(REPLACING_AT - 1)]
    assert sights == [("once", True)] + [("once", False)] * (REPLACING_AT - 2)
    with pytest.raises(StopIteration):
        runner.run(None, torch.zeros(2))
    assert recorded == [1, 2]
    assert len(runner._recorded) == MAX_GRAPHS - 1  # room was made
    runner._recorded.update({"full": None})
    for length in range(3, 2 * MAX_REMEMBERED):
        runner.run(None, torch.zeros(length))
    assert len(runner._calls) == MAX_REMEMBERED


def test_graphs_take_pictures_as_they_lie(monkeypatch):
    """Channels-last ones are recorded for themselves; views are made dense."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    usual = torch.zeros(2, 3, 8, 8)
    last = usual.contiguous(memory_format=torch.channels_last)
    preserving = GraphRunner(dtype=torch.bfloat16, memory_format=torch.preserve_format)
    for x, layout in (
        (usual, torch.contiguous_format),
        (last, torch.channels_last),
        (usual[..., ::2], torch.contiguous_format),
        (last[:, :, 1:], torch.contiguous_format),
        (torch.zeros(4), torch.contiguous_format),
    ):
        seen = preserving._run_once(lambda tensor: tensor, x, new=False)
        assert seen.dtype == torch.bfloat16
        assert seen.is_contiguous(memory_format=layout)
    assert GraphRunner(dtype=torch.bfloat16, memory_format=torch.channels_last)._layout(usual) == torch.channels_last


def test_copies_have_no_graphs():
    network = with_kernels(trained().eval())
    images = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(images), network(images))
        assert twin.graphs is not network.graphs


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode must be one of instant, full"):
        optimize(create_model(TINY), mode="fast")


def test_what_cannot_be_optimised_is_said():
    with pytest.raises(TypeError, match="got Linear"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="optimised already"):
        optimize(optimize(create_model(TINY)))
    with pytest.raises(ValueError, match="meta device"):
        optimize(create_model(TINY, device="meta"))


def test_a_model_of_timms_registry_is_one_of_ours():
    timm = pytest.importorskip("timm")
    import mambavision.integrations.timm  # noqa: F401  (registers)

    model = timm.create_model("mamba_vision_t").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert difference(optimize(model, dtype=torch.float32)(images), model(images)) < 1e-4
    for pool in ("max", "avgmax", "catavgmax", ""):
        other = timm.create_model("mamba_vision_nano_32", global_pool=pool, num_classes=2 if pool else 0)
        with pytest.raises(ValueError, match=f"average their last map, not '{pool}'"):
            optimize(other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads", [{"prune_norm": True, "prune_head": False}, {"prune_norm": False}, {}], ids=str)
def test_what_is_pruned_later_is_gone(device, heads):
    model = create_model(TINY, device=device).eval()
    network, images = optimize(model, dtype=torch.float32), torch.randn(2, 3, 64, 64, device=device)
    with torch.inference_mode():
        network(images)
        for each in (model, network):
            each.prune_intermediate_layers([-1], **heads)
        assert difference(network(images), model(images)) < 1e-3


def test_a_network_for_a_cpu_keeps_its_type():
    network = optimize(create_model(TINY), dtype=torch.float32)
    images = torch.randn(1, 3, 64, 64)
    expected = network(images)
    assert torch.equal(network.to(memory_format=torch.channels_last).float()(images), expected)
    for move in (lambda: network.to(torch.bfloat16), lambda: network.double(), lambda: network.to("meta")):
        with pytest.raises(RuntimeError, match="keep their type and place"):
            move()
    assert torch.equal(network(images), expected)


# --- what only a GPU shows --------------------------------------------------------------------------------------------

ERRORS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("name", ["mamba_vision_T", "mamba_vision_L"])
def test_logits_stay_close_to_float32(name, dtype):
    model = create_model(name, device="cuda").eval()
    for parameter, values in model.named_parameters():
        if "gamma" in parameter:  # else the token blocks of a network that is not trained would hardly count
            values.data.fill_(1.0)
    network = optimize(model, dtype=dtype)
    for batch in (1, 3, 32):
        images = deterministic_images(batch, *model.config.preprocessing.img_size).cuda()
        with torch.no_grad():
            assert difference(network(images), model(images)) < ERRORS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_a_trained_model_is_as_exact_as_pytorch_in_the_same_type(dtype):
    """On photographs, whose logits are four times as large as those of noise, and what the model was trained for."""
    model = create_model("mamba_vision_nano_32", pretrained=True, device="cuda").eval()
    network, plain = optimize(model, dtype=dtype), copy.deepcopy(model).to(dtype)
    images = photographs(model).cuda()
    with torch.no_grad():
        expected = model(images)
        error = difference(network(images), expected)
        assert error < difference(plain(images.to(dtype)), expected)
        assert error < 1.2 * ERRORS[dtype]  # below ERRORS on CIFAR's pictures: benchmarks/gpu_accuracy.py


@pytest.mark.gpu
def test_other_sizes_and_maps_are_right():
    model = create_model("mamba_vision_T", device="cuda", features_only=True).eval()
    network = optimize(model)
    images = deterministic_images(2, 200, 312).cuda()
    with torch.no_grad():
        for actual, expected in zip(network(images), model(images), strict=True):
            assert actual.shape == expected.shape
            assert difference(actual, expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_it_compiles_with_its_kernels(batch):
    model = trained().eval().cuda()
    network = optimize(model)
    images = torch.randn(batch, 3, 64, 64, device="cuda")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled, code = run_and_get_code(torch.compile(network, fullgraph=True), images)
        assert code
        # With NaN memory would be filled before a kernel fills it.
        assert not any('float("nan")' in part for part in code)
        assert difference(compiled, network(images)) < 1e-2
        assert difference(compiled, model(images)) < 3e-2


@pytest.mark.gpu
def test_graphs_are_replayed_for_new_pictures_and_bounded_in_number():
    model = trained().eval().cuda()
    network = optimize(model)
    images = [torch.randn(2, 3, 64, 64, device="cuda") for _ in range(3)]
    with torch.inference_mode():  # what is recorded here serves elsewhere too
        for _ in range(RECORDED_AT):
            assert difference(network(images[0]), model(images[0])) < 3e-2
    assert len(network.graphs._recorded) == 1
    with torch.no_grad():
        results = [network(x) for x in images]
        for result, x in zip(results, images, strict=True):  # none was overwritten by the next
            assert difference(result, model(x)) < 3e-2
        for batch in range(1, MAX_GRAPHS + 4):
            network(torch.randn(batch, 3, 64, 64, device="cuda"))
        assert len(network.graphs._recorded) == 1  # they came but once
        for batch in range(1, MAX_GRAPHS + 4):
            network(torch.randn(batch, 3, 64, 64, device="cuda"))
        assert len(network.graphs._recorded) == MAX_GRAPHS
        late = torch.randn(MAX_GRAPHS + 3, 3, 64, 64, device="cuda")
        for _ in range(REPLACING_AT):
            assert difference(network(late), model(late)) < 3e-2
        assert (tuple(late.shape), torch.contiguous_format, late.device) in network.graphs._recorded
        assert len(network.graphs._recorded) == MAX_GRAPHS
        assert network(images[0][:0]).shape == (0, model.num_classes)
        for _ in range(REPLACING_AT):
            assert difference(network(late.contiguous(memory_format=torch.channels_last)), model(late)) < 3e-2
        layouts = [key[1] for key in network.graphs._recorded if key[0] == tuple(late.shape)]
        assert layouts == [torch.contiguous_format, torch.channels_last]


@pytest.mark.gpu
def test_the_model_and_its_gradients_are_left_alone():
    model = trained().eval().cuda()
    before = copy.deepcopy(model.state_dict())
    network = optimize(model)
    images = torch.randn(1, 3, 64, 64, device="cuda", requires_grad=True)
    network(images).sum().backward()  # through the ops' references
    assert images.grad is not None
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.gpu
def test_full_mode_measures_and_agrees():
    model = trained(dim=80, num_heads=(1, 1, 2, 4)).eval().cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    with torch.no_grad():
        assert difference(optimize(model, mode="full")(images), model(images)) < 3e-2


@pytest.mark.gpu
def test_a_runner_follows_changed_weights_and_works_inside_another_graph():
    network = optimize(trained().eval().cuda())
    images = torch.randn(1, 3, 64, 64, device="cuda")
    with torch.no_grad():
        for _ in range(RECORDED_AT):
            first = network(images)
        for parameter in network.parameters():
            parameter.mul_(0.9)
        assert difference(network(images), first) > 1e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            inside = network(images)
        graph.replay()
        torch.testing.assert_close(inside, network(images), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_float32_stays_exact():
    model = trained().eval().cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert difference(optimize(model, dtype=torch.float32)(images), model(images)) < 1e-4


@pytest.mark.gpu
def test_a_runner_gives_copies():
    runner = GraphRunner(dtype=torch.float32)
    a, b = (torch.full((4,), value, device="cuda") for value in (1.0, 2.0))
    for _ in range(RECORDED_AT):
        first = runner.run(lambda x: [x + 1, x * 2], a)
    runner.run(lambda x: [x + 1, x * 2], b)
    assert first[0].tolist() == [2.0] * 4
    assert len(runner._recorded) == 1
