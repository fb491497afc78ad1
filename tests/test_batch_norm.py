"""Batch norm for training: kernels against float64, on a GPU or interpreted, and the layers that take it."""

import copy

import pytest
import torch
from torch import nn

from mambavision.layers import normed_conv as layer
from mambavision.layers import stem
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.stem import Stem
from mambavision.ops.backend import Backend
from mambavision.ops.batch_norm import BACKENDS, batch_norm, refuse_batch_norm_kernels
from op_checks import DEVICE, HALVES, check, error, random, require_triton

require_triton()

from mambavision.ops.batch_norm import triton_op as batch_norm_op  # noqa: E402  (Triton is not everywhere)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SHAPES = [(2, 8, 1, 1), (3, 10, 5, 7), (2, 80, 8, 8), (5, 33, 6, 6), (1, 160, 4, 4), (9, 32, 9, 8)]


def maps(*shape, dtype=torch.float32):
    return random(*shape, dtype=dtype, scale=2.0).add(3).contiguous(memory_format=torch.channels_last)


def own(scale, activation):
    def function(x, weight, bias, residual=None):
        return batch_norm_op.batch_norm(x, weight, bias, scale, residual, 1e-5, activation)[0]

    return function


def plain(scale, activation):
    def function(x, weight, bias, residual=None):
        wide = None if scale is None else scale.to(x.dtype)
        options = {"eps": 1e-5, "activation": activation, "backend": "reference"}
        return batch_norm(x, weight, bias, scale=wide, residual=residual, **options)[0]

    return function


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu_tanh"])
def test_the_kernels(dtype, shape, activation, poisoned):
    tensors = [maps(*shape, dtype=dtype), random(shape[1]), random(shape[1])]
    check(own(None, activation), plain(None, activation), tensors, random(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_with_drop_path_and_residual(dtype, shape, poisoned):
    tensors = [maps(*shape, dtype=dtype), random(shape[1]), random(shape[1]), random(*shape, dtype=dtype)]
    scale = torch.arange(shape[0], device=DEVICE).remainder(3).to(dtype)  # with zeros
    check(own(scale, "none"), plain(scale, "none"), tensors, random(*shape, dtype=dtype))


def test_many_rows_of_few_programs(poisoned, monkeypatch):
    monkeypatch.setattr(batch_norm_op, "PROGRAMS", 3)
    monkeypatch.setattr(batch_norm_op, "MERGE_P", 4)
    shape = (5, 48, 12, 11)
    tensors = [maps(*shape), random(48), random(48)]
    check(own(None, "relu"), plain(None, "relu"), tensors, random(*shape))


def test_a_large_mean_costs_no_digits():
    x = maps(4, 24, 9, 9) + 1000 * torch.arange(24, device=DEVICE)[:, None, None]
    weight, bias = random(24), random(24)
    for found, expected in zip(
        batch_norm_op.batch_norm(x, weight, bias, None, None, 1e-5, "none"),
        batch_norm(x.double(), weight, bias, eps=1e-5, backend="reference"),
        strict=True,
    ):
        assert error(found, expected) < 1e-3  # the sum of squares alone would be off by more than the variance


def test_a_residual_of_a_wider_type_makes_a_wider_result():
    x, residual = maps(2, 8, 3, 3, dtype=torch.float16), random(2, 8, 3, 3)
    tensors = [x, random(8), random(8), residual]
    check(own(None, "none"), plain(None, "none"), tensors, random(2, 8, 3, 3))


def test_parameters_may_have_gaps(poisoned):
    scale = torch.tensor([[0.5, 9.0], [2.0, 9.0]], device=DEVICE)[:, 0]
    tensors = [maps(2, 8, 3, 5), random(8, 2), random(16), random(2, 8, 3, 5)]

    def by(function):
        return lambda x, weight, bias, residual: function(x, weight[:, 0], bias[::2], residual)

    check(by(own(scale, "none")), by(plain(scale, "none")), tensors, random(2, 8, 3, 5))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu_tanh"])
def test_what_is_not_a_number_stays_none(activation):
    x = maps(2, 8, 3, 5)
    x[0, 1, 2, 2] = float("nan")
    y, mean, variance = batch_norm_op.batch_norm(x, random(8), random(8), None, None, 1e-5, activation)
    assert y[:, 1].isnan().all()
    assert mean.isnan().tolist() == variance.isnan().tolist() == [False, True, *[False] * 6]


def test_maps_in_another_order_are_copied():
    tensors = [random(2, 8, 3, 5), random(8), random(8), random(2, 8, 3, 5)]
    check(own(None, "none"), plain(None, "none"), tensors, random(2, 8, 5, 3).transpose(2, 3))


def test_the_reference_is_what_pytorch_computes():
    x, weight, bias = torch.randn(3, 5, 4, 4).double(), torch.randn(5).double(), torch.randn(5).double()
    mean, variance = torch.zeros(5).double(), torch.zeros(5).double()
    expected = nn.functional.relu(nn.functional.batch_norm(x, mean, variance, weight, bias, True, 1.0, 1e-5))
    y, its_mean, its_variance = batch_norm(x, weight, bias, eps=1e-5, activation="relu", backend="reference")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(its_mean, mean)
    torch.testing.assert_close(its_variance * 48 / 47, variance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, "weight must be"),
        ({"scale": torch.ones(5)}, "scale must be"),
        ({"residual": torch.ones(2, 4, 1, 3)}, "residual must be"),
        ({"activation": "gelu"}, "one of none, relu, gelu_tanh"),
        ({"x": torch.ones(1, 4, 1, 1)}, "more than one value"),
        ({"x": torch.ones(0, 4, 3, 3)}, "more than one value"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": torch.ones(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.ones(4), "eps": 1e-5, **change}
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments)


def test_the_layers_leave_a_map_in_another_order_to_pytorch():
    assert "not channels-last" in refuse_batch_norm_kernels(torch.ones(2, 4, 3, 3))
    last = torch.ones(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert "cannot compile for cpu" in refuse_batch_norm_kernels(last)


@pytest.fixture
def kernels_taken(monkeypatch):
    """The layers take the kernels wherever they run; how often."""
    taken = []

    def counted(*arguments):
        taken.append(arguments)
        return BACKENDS[0].function(*arguments)

    accepting = (Backend("triton", counted, "", lambda _: None),)
    monkeypatch.setattr("mambavision.ops.batch_norm.BACKENDS", accepting)
    monkeypatch.setattr(layer, "refuse_batch_norm_kernels", lambda _: None)
    for module in (layer, stem):
        monkeypatch.setattr(module, "is_fused", lambda _: True)
    return taken


def follows(module, modules, x, kernels_taken, calls, steps=2):
    """The module trains as its modules do one by one, its running statistics included."""
    other = copy.deepcopy(module)
    grad = None
    for _ in range(steps):
        torch.manual_seed(3)
        y = module(x)
        torch.manual_seed(3)
        expected = modules(other, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
        expected.backward(grad)
    assert len(kernels_taken) == calls * steps
    for (name, parameter), (_, its) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        # A bias before a norm has the gradient zero, which the modules find in rounding errors.
        tolerance = 1e-3 if not name.endswith(("conv1.bias", "conv2.bias")) else 1e-2
        torch.testing.assert_close(parameter.grad, its.grad, rtol=tolerance, atol=tolerance, msg=name)
    for (name, buffer), (_, its) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, its, rtol=1e-4, atol=1e-5, msg=name)


def block_by_modules(block, x):
    branch = block.norm2(block.conv2(block.act1(block.norm1(block.conv1(x)))))
    branch = branch if block.gamma is None else branch * block.gamma[:, None, None]
    return x + block.drop_path(branch)


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.4, "layer_scale": 0.5}], ids=["plain", "all"])
def test_a_conv_block_trains_by_the_kernels_as_by_its_modules(settings, kernels_taken):
    torch.manual_seed(0)
    block = ConvBlock(6, **settings).to(DEVICE, memory_format=torch.channels_last)
    x = maps(8, 6, 5, 4)
    follows(block, block_by_modules, x, kernels_taken, calls=2)


def test_a_stem_trains_by_the_kernels_as_by_its_modules(kernels_taken):
    stem = Stem(3, 4, 6).to(DEVICE, memory_format=torch.channels_last)
    follows(stem, lambda stem, x: stem.conv_down(x), maps(4, 3, 9, 10), kernels_taken, calls=2)


def test_layer_scale_widens_the_result_by_the_kernels_too(kernels_taken):
    block = ConvBlock(6, layer_scale=0.5).to(DEVICE, memory_format=torch.channels_last)
    for module in (block.conv1, block.norm1, block.conv2, block.norm2):
        module.half()
    assert block(maps(2, 6, 5, 4, dtype=torch.float16)).dtype == torch.float32
    assert len(kernels_taken) == 2


def test_a_hook_on_the_stems_modules_is_called(kernels_taken):
    stem = Stem(3, 4, 6).to(DEVICE, memory_format=torch.channels_last)
    seen = []
    stem.conv_down[2].register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    stem(maps(2, 3, 8, 8))
    assert len(seen) == 1
    stem.conv_down.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    stem(maps(2, 3, 8, 8))
    assert len(seen) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 80, 56, 56), (16, 160, 28, 28), (4, 32, 112, 112), (2, 196, 56, 56)], ids=str)
def test_the_kernels_at_the_sizes_of_the_networks(dtype, shape, poisoned):
    tensors = [maps(*shape, dtype=dtype), random(shape[1]), random(shape[1])]
    check(own(None, "gelu_tanh"), plain(None, "gelu_tanh"), tensors, random(*shape, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_conv_block_under_autocast_takes_the_kernels_where_it_is_compiled(compiled):
    block = ConvBlock(16, drop_path=0.3, layer_scale=0.5).cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(block)
    x = maps(32, 16, 10, 10)
    with torch.autocast("cuda", torch.bfloat16):
        torch.manual_seed(1)
        expected = block_by_modules(other, x)
        torch.manual_seed(1)
        with torch.profiler.profile() as profile:
            y = (torch.compile(block, backend="aot_eager") if compiled else block)(x)
    assert compiled == any("apply_kernel" in event.key for event in profile.key_averages())
    assert y.dtype == expected.dtype
    assert error(y, expected.double()) < 0.02
    for module, result in ((block, y), (other, expected)):
        result.float().square().sum().backward()
        assert module.conv1.weight.grad.isfinite().all()
    for name in ("norm1.weight", "norm2.bias", "gamma", "conv2.weight"):
        ours, its = (dict(module.named_parameters())[name].grad for module in (block, other))
        assert error(ours, its.double()) < 0.03, name
    torch.testing.assert_close(block.norm2.running_var, other.norm2.running_var, rtol=0.01, atol=1e-3)
