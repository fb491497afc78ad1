"""The network against golden vectors of the original, and what any input, type, compiler or wrapper must not change."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from deterministic_weights import deterministic_images, deterministic_state_dict
from mambavision import create_model, list_models
from mambavision.config import VARIANTS
from mambavision.layers.attention import Attention
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.window import window_partition, window_reverse
from mambavision.models.backbone import MambaVisionBackbone
from mambavision.models.classifier import MambaVision

PUBLIC = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
GOLDEN_SIZES = [
    (variant, size)
    for variant in ("mamba_vision_T", "mamba_vision_S", "mamba_vision_B")
    for size in sorted({key.split("/")[0] for key in np.load(GOLDEN / f"{variant}.npz")})
]
TINY = "mamba_vision_test_tiny"
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def deterministic(name, **arguments):
    """A variant in evaluation mode with weights that depend on names alone."""
    model = create_model(name, **arguments).eval()
    model.load_state_dict(deterministic_state_dict({key: t.shape for key, t in model.state_dict().items()}))
    return model


def set_scan_backend(model, backend):
    for module in model.modules():
        if isinstance(module, MambaVisionMixer):
            module.scan_backend = backend
    return model


def relative(actual, expected):
    actual, expected = (torch.as_tensor(value).double().cpu() for value in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def tiny():
    return deterministic(TINY)


# --- the original -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLIC)
def test_state_dict_has_the_original_names_and_shapes(variant):
    state = create_model(variant, device="meta").state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == PUBLIC[variant]


@pytest.mark.parametrize(("variant", "size"), GOLDEN_SIZES)
def test_outputs_equal_the_original(variant, size):
    vectors = np.load(GOLDEN / f"{variant}.npz")
    model = deterministic(variant)
    images = deterministic_images(*map(int, size.split("x")))
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        pooled = model.forward_head(final, pre_logits=True)
        logits = model(images)
    assert relative(logits, vectors[f"{size}/logits"]) < 1e-5
    assert relative(pooled, vectors[f"{size}/pooled"]) < 1e-5
    for stage, feature_map in enumerate(maps, start=1):
        expected = {key: vectors[f"{size}/stage{stage}/{key}"] for key in ("shape", "norm", "channel_mean", "corner")}
        assert list(feature_map.shape) == expected["shape"].tolist()
        assert abs(feature_map.double().norm().item() / float(expected["norm"]) - 1) < 1e-5
        assert relative(feature_map.mean((2, 3)), expected["channel_mean"]) < 1e-5
        assert relative(feature_map[:, :8, -3:, -3:], expected["corner"]) < 1e-5


def test_published_parameter_counts():
    published = {"T": 31_794_248, "T2": 35_104_008, "S": 50_140_584, "B": 97_685_288, "L": 227_961_048}
    for name, count in published.items():
        model = create_model(f"mamba_vision_{name}", device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_step_bias_counts_twice(monkeypatch):
    """The original adds it in the projection and in the scan."""
    mixer = MambaVisionMixer(16).eval()
    mixer.init_scan_parameters()
    torch.nn.init.normal_(mixer.dt_proj.bias)
    seen = {}

    def scan(x, dt, A, B, C, D, dt_bias, **_):
        low, _, _ = mixer.x_proj(x).split([mixer.dt_rank, 8, 8], dim=-1)
        seen["bias"] = (dt - low @ mixer.dt_proj.weight.t()).mean((0, 1)) + dt_bias
        return x

    monkeypatch.setattr("mambavision.layers.mixer.selective_scan", scan)
    with torch.no_grad():
        mixer(torch.randn(1, 9, 16))
    torch.testing.assert_close(seen["bias"], 2 * mixer.dt_proj.bias.detach())
    for init, expected in (("zero", 0.0), ("log_uniform", None)):
        fresh = MambaVisionMixer(64, dt_bias_init=init)
        fresh.init_scan_parameters()
        steps = torch.nn.functional.softplus(2 * fresh.dt_proj.bias.detach())
        if expected is None:
            assert steps.min() >= 1e-3 * 0.999
            assert steps.max() <= 1e-1 * 1.001
        else:
            assert (fresh.dt_proj.bias == expected).all()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 200), (33, 65), (64, 64), (100, 36)], ids=str)
def test_every_size_equals_the_reference_scan(size):
    model = deterministic(TINY)
    images = deterministic_images(2, *size)
    with torch.no_grad():
        logits, maps = model(images), model.forward_intermediates(images, intermediates_only=True)
        expected = set_scan_backend(model, "reference")(images)
    assert relative(logits, expected) < 1e-5
    for level, feature_map in enumerate(maps):
        sides = [-(-side // 2 ** (level + 2)) for side in size]  # ceilings of ceilings are the ceiling
        assert list(feature_map.shape[2:]) == sides


@pytest.mark.parametrize("size", [(224, 224), (97, 301)], ids=str)
def test_tiny_variant_of_the_paper_at_other_sizes_equals_the_reference_scan(size):
    model = deterministic("mamba_vision_T")
    images = deterministic_images(1, *size)
    with torch.no_grad():
        logits = model(images)
        expected = set_scan_backend(model, "reference")(images)
    assert relative(logits, expected) < 1e-5


def test_empty_batch(tiny):
    assert tiny(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize("size", [1, 3, 4, 6], ids=str)
def test_windows_are_put_back_where_they_were(size):
    x = torch.randn(2, 5, 6, 7)
    windows = window_partition(x, size)
    rows, columns = -(-6 // size), -(-7 // size)
    assert windows.shape == (2 * rows * columns, size * size, 5)
    assert torch.equal(windows[0, 0], x[0, :, 0, 0])
    if columns > 1:
        assert torch.equal(windows[1, 0], x[0, :, 0, size])  # row-major: the next window is to the right
    back = window_reverse(windows, size, 6, 7)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert back.view(2, 5, -1).shape == (2, 5, 42)  # as decoders do


def test_padding_is_zero_on_the_right_and_at_the_bottom():
    windows = window_partition(torch.ones(1, 1, 3, 3), 4)
    assert windows.reshape(4, 4)[:3, :3].eq(1).all()
    assert windows.sum() == 9


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"\(batch, 3, height, width\), got \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), r"got \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating type, got torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float16), "torch.float16 but the weights torch.float32"),
        (torch.zeros(1, 3, 0, 5), r"got \(1, 3, 0, 5\)"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "Pictures are on meta and the weights on cpu"),
        (np.zeros((1, 3, 64, 64)), "tensor of pictures, got ndarray"),
    ],
)
def test_wrong_input_is_one_clear_sentence(tiny, images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(images)


def test_autocast_does_not_hide_float64(tiny):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="float64 but the weights"):
        tiny(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


# --- types, layouts, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_half_precision(device, dtype, bound, way):
    model = deterministic(TINY).to(device)
    images = deterministic_images(2, 64, 64).to(device)
    with torch.no_grad():
        expected = model(images)
        if way == "autocast":
            with torch.autocast(device, dtype):
                logits = model(images)
        else:
            logits = model.to(dtype)(images.to(dtype))
    assert logits.isfinite().all()
    assert relative(logits, expected) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_training_under_autocast_has_finite_gradients_everywhere(device):
    model = deterministic(TINY).to(device).train()
    for dtype in (torch.float16, torch.bfloat16):
        model.zero_grad()
        with torch.autocast(device, dtype):
            loss = model(deterministic_images(4, 64, 64).to(device)).float().square().mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_changes_nothing(device):
    model = deterministic(TINY).to(device)
    images = deterministic_images(2, 50, 64).to(device)
    with torch.no_grad():
        expected = model(images)
        logits = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert relative(logits, expected) < (1e-5 if device == "cpu" else 1e-3)


@gpu
def test_gpu_equals_golden_vectors():
    vectors = np.load(GOLDEN / "mamba_vision_T.npz")
    model = deterministic("mamba_vision_T").cuda()
    flags = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            logits = model(deterministic_images(2, 224, 224).cuda())
    finally:
        torch.backends.cudnn.allow_tf32 = flags
    assert relative(logits, vectors["2x224x224/logits"]) < 1e-5


@gpu
def test_cuda_graph_replays_the_forward():
    model = deterministic(TINY).cuda()
    images = deterministic_images(2, 64, 64).cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        assert relative(logits, model(images)) < 1e-4


def test_meta_device_gives_shapes_without_memory():
    model = create_model("mamba_vision_L3_512_21k", device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.zeros(2, 3, 512, 512, device="meta")).shape == (2, 1000)


def test_dtype_argument():
    model = create_model(TINY, dtype=torch.bfloat16)
    floating = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.bfloat16}


# --- compilers, copies, wrappers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device):
    model = deterministic(TINY).to(device)
    images = deterministic_images(2, 64, 64).to(device)
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True)(images), model(images)) < (
            1e-5 if device == "cpu" else 1e-3
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "autocast", "checkpointing"])
def test_compiled_training_has_the_gradients_of_eager_training(device, way):
    dtype = torch.float32 if way == "autocast" else torch.float64

    def gradients(compiled):
        torch.compiler.reset()
        model = deterministic(TINY, drop_path_rate=0.0).to(device, dtype).train()
        model.set_grad_checkpointing(way == "checkpointing")
        # On a CPU without the code generator, which takes a minute and is tested by the forward pass.
        backend = "inductor" if device == "cuda" else "aot_eager"
        network = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        with torch.autocast(device, torch.bfloat16, enabled=way == "autocast"):
            logits = network(deterministic_images(4, 64, 64).to(device, dtype))
        logits.to(dtype).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(compiled=False)
    largest = max(grad.norm() for grad in expected.values())
    # A bias before a batch norm has a gradient of zero: measure against the largest.
    absolute, relative_bound = (5e-2, 0.1) if way == "autocast" else (1e-9, 1e-7)
    for name, grad in gradients(compiled=True).items():
        assert (grad - expected[name]).norm() <= absolute * largest + relative_bound * expected[name].norm(), name


def test_exports_with_a_dynamic_batch_and_standard_operators_only(tiny):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(tiny, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "mambavision" in target]
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(images), tiny(images))


def test_exports_in_training_mode():
    """With the norms as they are, whose statistics move as in the network."""
    model = deterministic(TINY, drop_path_rate=0.0).train()
    images = deterministic_images(2, 64, 64)
    program = torch.export.export(model, (images,), strict=False).module()
    torch.testing.assert_close(program(images), model(images))
    moved = dict(program.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(moved[name], buffer, msg=name)


def test_copies_and_pickles(tiny):
    images = deterministic_images(1, 64, 64)
    expected = tiny(images)
    assert torch.equal(copy.deepcopy(tiny)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(tiny))(images), expected)
    buffer = io.BytesIO()
    torch.save(tiny.state_dict(), buffer)
    buffer.seek(0)
    other = create_model(TINY).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(images), expected)


def test_distributed_data_parallel_takes_the_same_step(tmp_path):
    model = deterministic(TINY, drop_path_rate=0.0).train()
    plain = copy.deepcopy(model)
    images = deterministic_images(2, 64, 64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        # find_unused_parameters stays off: DDP itself complains when a parameter gets no gradient
        torch.nn.parallel.DistributedDataParallel(model)(images).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    plain(images).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["mamba_first", "attention_first", "mamba_only", "attention_only"])
def test_every_parameter_gets_a_gradient(order):
    model = create_model(TINY, mixer_order=order, layer_scale=1.0, layer_scale_conv=1.0, drop_path_rate=0.0).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    # A convolution's bias before batch norm and the keys' bias before softmax shift nothing: their gradient is zero.
    silent = ("conv1.bias", "conv2.bias")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith(silent), name


def test_gradients_equal_finite_differences():
    """End to end in float64, along random directions through input and all parameters."""
    model = deterministic(TINY).double()
    images = deterministic_images(1, 20, 24).double().requires_grad_()
    leaves = [images, *model.parameters()]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    weight = torch.randn(10, dtype=torch.float64)

    def value():
        return (model(images) * weight).sum()

    grads = torch.autograd.grad(value(), leaves)
    expected = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True)).item()
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * step)
            values.append(value().item())
    assert abs((values[0] - values[1]) / (2 * step) / expected - 1) < 1e-5


def test_checkpointing_changes_no_gradient_and_keeps_less():
    def run(enabled):
        model = deterministic(TINY, drop_path_rate=0.0, depths=(2, 2, 4, 4)).train()
        model.set_grad_checkpointing(enabled)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(deterministic_images(2, 64, 64)).square().mean()
        loss.backward()
        return sum(kept), {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, expected = run(enabled=False)
    less, grads = run(enabled=True)
    assert less < plain / 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("case", ["half precision", "biases alone", "synchronised norms"])
def test_checkpointing_computes_the_same_again(case):
    """In the very same way: another one would round otherwise, or keep other tensors than were kept before."""

    def run(enabled):
        model = deterministic(TINY, drop_path_rate=0.0).train()
        for name, parameter in model.named_parameters():
            if name.endswith("conv1.bias"):
                torch.nn.init.constant_(parameter, 3.0)  # of a size that rounds otherwise with the map than alone
            parameter.requires_grad_(case != "biases alone" or name.endswith("conv1.bias") or name.startswith("head"))
        if case == "synchronised norms":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.set_grad_checkpointing(enabled)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "half precision"):
            loss = model(deterministic_images(2, 64, 64)).float().square().mean()
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, dict(model.named_buffers())

    (expected, statistics), (grads, after) = run(enabled=False), run(enabled=True)
    for name, grad in expected.items():
        assert grad is grads[name] is None or torch.equal(grads[name], grad), name
    assert all(torch.equal(after[name], buffer) for name, buffer in statistics.items())


def test_attention_dropout_acts_in_training_only():
    attention = Attention(16, num_heads=2, attn_drop=0.5)
    x = torch.randn(1, 9, 16)
    assert not torch.equal(attention.train()(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))
    torch.testing.assert_close(attention(x), Attention.forward(copy.deepcopy(attention).eval(), x))


def test_attention_equals_its_definition():
    attention = Attention(12, num_heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.reshape(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1)  # sqrt(head_dim) = 2
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12)))


def test_attention_without_fused_kernels_shows_its_weights():
    attention = Attention(12, num_heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, _ = (part.reshape(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    fused = attention(x)
    attention.fused_attn = False
    seen = []
    attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    torch.testing.assert_close(attention(x), fused)
    torch.testing.assert_close(seen[0], torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1))
    attention.attn_drop.p = 0.5
    assert not torch.equal(attention.train()(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    from mambavision.layers.drop_path import DropPath

    layer = DropPath(0.25).train()
    y = layer(torch.ones(4000, 3))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (y == y[:, :1]).all()
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(layer.eval()(y), y)


def test_drop_path_rises_linearly():
    model = create_model("mamba_vision_T", device="meta")
    rates = [block.drop_path.rate for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0.2 * index / 15 for index in range(16)])


def test_initial_weights():
    model = create_model("mamba_vision_T")
    mixer = model.levels[2].blocks[0].mixer
    torch.testing.assert_close(mixer.A_log[3], torch.arange(1.0, 9.0).log())
    assert (mixer.D == 1).all()
    assert (mixer.dt_proj.bias == 0).all()
    assert abs(model.levels[3].blocks[0].mlp.fc1.weight.std().item() - 0.02) < 1e-3
    assert (model.head.bias == 0).all()


# --- timm's contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_contract_on_every_variant(name):
    model = create_model(name, device="meta")
    config = VARIANTS[name]
    side = config.preprocessing.img_size[0]
    x = torch.zeros(1, 3, side, side, device="meta")
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == model.head_hidden_size == config.dim * 8
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    assert model.forward_head(features).shape == (1, model.num_classes)
    backbone = create_model(name, features_only=True, device="meta")
    maps = backbone(x)
    assert [feature_map.shape[1] for feature_map in maps] == backbone.feature_info.channels()
    assert [side // feature_map.shape[2] for feature_map in maps] == backbone.feature_info.reduction()
    assert model.get_classifier() is model.head


def test_features_are_one_thing_everywhere(tiny):
    images = deterministic_images(2, 50, 64)
    backbone = create_model(TINY, features_only=True, out_indices=(1, 3)).eval()
    backbone.load_state_dict(
        {name: tensor for name, tensor in tiny.state_dict().items() if not name.startswith(("norm.", "head."))}
    )
    final, maps = tiny.forward_intermediates(images)
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, 8, 13, 16),
        (2, 16, 7, 8),
        (2, 32, 4, 4),
        (2, 64, 2, 2),
    ]
    for feature_map, expected in zip(backbone(images), (maps[1], maps[3]), strict=True):
        assert torch.equal(feature_map, expected)
    hooked = []
    handle = tiny.get_submodule(tiny.feature_info[2]["module"]).register_forward_hook(
        lambda *args: hooked.append(args[2])
    )
    logits = tiny(images)
    handle.remove()
    assert torch.equal(hooked[0], maps[2])
    assert torch.equal(final, tiny.forward_features(images))
    assert torch.equal(logits, tiny.forward_head(final))


def test_forward_intermediates_options(tiny):
    images = deterministic_images(1, 64, 64)
    final, maps = tiny.forward_intermediates(images)
    assert len(tiny.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    only = tiny.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert len(only) == 1
    assert torch.equal(only[0], maps[1])
    normed = tiny.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True)[0]
    assert torch.equal(normed, final)
    assert torch.equal(final, tiny.norm(maps[3]))
    with pytest.raises(ValueError, match="Level indices"):
        tiny.forward_intermediates(images, indices=[4])
    with pytest.raises(ValueError, match="NCHW"):
        tiny.forward_intermediates(images, output_fmt="NLC")


def test_reset_classifier():
    model = create_model(TINY, class_names=["cat", "dog"])
    assert model.num_classes == 2
    model.reset_classifier(7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert model.config.class_names is None
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)


def test_no_weight_decay_names_the_scan_parameters(tiny):
    names = tiny.no_weight_decay()
    assert names == {name for name, _ in tiny.named_parameters() if name.split(".")[-1] in ("A_log", "D")}
    assert len(names) == 4


def test_group_matcher_orders_every_parameter_by_depth(tiny):
    helpers = pytest.importorskip("timm.models")
    for coarse in (False, True):
        groups = helpers.group_parameters(tiny, tiny.group_matcher(coarse), reverse=True)
        assert set(groups) == {name for name, _ in tiny.named_parameters()}
        assert groups["patch_embed.conv_down.0.weight"] == 0
        assert (
            groups["levels.0.blocks.0.conv1.weight"]
            < groups["levels.3.blocks.1.mlp.fc1.weight"]
            <= groups["head.weight"]
        )


def test_classes_of_what_comes_out():
    assert isinstance(create_model(TINY), MambaVision)
    backbone = create_model(TINY, features_only=True)
    assert type(backbone) is MambaVisionBackbone
