"""Where a layer takes another way than its modules one by one, it comes to the same."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision import create_model
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.layers.plain import are_plain
from mambavision.layers.stem import FewChannelConv
from mambavision.layers.token_block import Mlp, TokenBlock


def normal(module):
    """The module with parameters that all matter."""
    for tensor in module.parameters():
        nn.init.normal_(tensor, std=0.5)
    return module


def changed(block, x):
    """Names of the buffers that a pass changes."""
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    block(x)
    return {name for name, buffer in block.named_buffers() if not torch.equal(buffer, before[name])}


def module_by_module(block, x):
    return x + block.norm2(block.conv2(block.act1(block.norm1(block.conv1(x)))))


def test_a_conv_block_trains_as_its_modules_do():
    block = normal(ConvBlock(6)).double()
    other = copy.deepcopy(block)
    x = torch.randn(3, 6, 5, 4).double().requires_grad_()
    grad = torch.randn(3, 6, 5, 4).double()
    for _ in range(3):  # the running statistics, too, follow
        y, expected = block(x), module_by_module(other, x)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad, True), torch.autograd.grad(expected, x, grad, True))
    y.backward(grad)
    expected.backward(grad)
    for (name, parameter), (_, its) in zip(block.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, its.grad, msg=name)
    for (name, buffer), (_, its) in zip(block.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, its, msg=name)
    torch.testing.assert_close(block.eval()(x), module_by_module(other.eval(), x))


@pytest.mark.parametrize("graded", [True, False])
def test_a_conv_block_may_run_again_before_its_backward(graded):
    block = normal(ConvBlock(6)).double()
    other = copy.deepcopy(block)
    first, second = torch.randn(2, 3, 6, 5, 4).double()
    losses = []
    for function in (block, lambda x: module_by_module(other, x)):
        loss = function(first).square().sum()
        with torch.set_grad_enabled(graded):
            more = function(second).square().sum()
        loss = loss + more
        losses.append(loss)
        loss.backward()
    torch.testing.assert_close(*losses)
    for (name, parameter), (_, its) in zip(block.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, its.grad, msg=name)
    for buffer, its in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, its)


@pytest.mark.parametrize(
    "settings",
    [{"dilation": 2, "padding": "same"}, {"padding_mode": "circular"}, {"groups": 3}, {"bias": False}],
    ids=str,
)
def test_a_conv_block_heeds_the_settings_of_its_modules(settings):
    block = normal(ConvBlock(6))
    block.conv1 = normal(nn.Conv2d(6, 6, 3, **{"padding": 1, **settings}))
    block.norm2 = nn.BatchNorm2d(6, affine=False)
    other = copy.deepcopy(block)
    x = torch.randn(3, 6, 5, 4)
    torch.testing.assert_close(block(x), module_by_module(other, x))
    for buffer, its in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, its)


def test_a_forward_that_fails_leaves_the_statistics():
    block = normal(ConvBlock(6))
    with pytest.raises(ValueError, match="more than 1 value"):
        block(torch.randn(1, 6, 1, 1))
    assert not block.norm1.running_mean.any()


@pytest.mark.parametrize("change", ["frozen", "cumulative", "forgetful", "untracked", "synchronised"])
def test_a_conv_block_with_another_norm_calls_it(change):
    block = normal(ConvBlock(6))
    if change == "frozen":
        block.norm1.eval()
    elif change == "cumulative":
        block.norm1.momentum = None
    elif change == "forgetful":
        block.norm1.momentum = 1.0
    elif change == "untracked":
        block.norm1 = nn.BatchNorm2d(6, track_running_stats=False)
    else:
        block.norm1 = nn.SyncBatchNorm(6)
        block.norm1.eval()  # in training it asks for a GPU
    other = copy.deepcopy(block)
    x = torch.randn(3, 6, 5, 4)
    torch.testing.assert_close(block(x), module_by_module(other, x))
    for buffer, its in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, its)


def test_a_hook_sees_the_map_of_its_module():
    block = normal(ConvBlock(6))
    seen = []
    block.conv1.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    x = torch.randn(2, 6, 5, 4)
    block(x)
    torch.testing.assert_close(seen, [F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)])


def test_what_is_plain():
    mlp = Mlp(8, 16)
    assert are_plain(mlp.fc1, mlp.act, mlp.fc2)
    assert not are_plain(mlp.fc1, nn.Sequential(mlp.fc2))
    assert not are_plain(type("Adapted", (nn.Linear,), {})(4, 4))
    handle = mlp.fc2.register_full_backward_hook(lambda *_: None)
    assert not are_plain(mlp.fc1, mlp.fc2)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not are_plain(mlp.fc1)
    handle.remove()
    mlp.act.register_forward_pre_hook(lambda *_: None)
    assert not are_plain(mlp.act)
    assert are_plain(mlp.fc1)
    mlp.fc1.forward = lambda x: x
    assert not are_plain(mlp.fc1)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.GELU("tanh")], ids=str)
def test_an_mlp_takes_another_activation(act):
    mlp = Mlp(8, 16)
    mlp.act = act
    x = torch.randn(3, 8)
    torch.testing.assert_close(mlp(x), mlp.fc2(act(mlp.fc1(x))))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_few_channels_are_padded_without_a_trace(channels, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    conv = FewChannelConv(channels, 16, 3, 2, 1, bias=False, device="cuda", dtype=dtype)
    x = torch.randn(2, channels, 17, 12, device="cuda", dtype=dtype)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y, expected = conv(x), nn.Conv2d.forward(conv, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (found,), (usual,) = (torch.autograd.grad(result, conv.weight, grad) for result in (y, expected))
    torch.testing.assert_close(found, usual, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [None, "tanh", "no bias"])
def test_an_mlp_trains_as_its_modules_do(change):
    mlp = normal(Mlp(64, 256)).cuda()
    if change == "tanh":
        mlp.act = nn.GELU("tanh")
    if change == "no bias":
        mlp.fc1.bias = None
    other = copy.deepcopy(mlp)
    seen = []
    other.act.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    x = torch.randn(3, 49, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, expected = mlp(x), other(x)
    assert len(seen) == 1
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    for parameter, its in zip(mlp.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, its.grad, rtol=2e-2, atol=0.1)


class Adapted(nn.Module):
    """A linear layer inside another module, as adapters put it."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + 0.5 * x.sum(-1, keepdim=True)


def test_a_mixer_calls_its_projection_of_steps_where_that_is_more_than_a_product():
    mixer = normal(MambaVisionMixer(16)).double()
    x = torch.randn(3, 5, 16).double()
    expected = mixer(x)
    seen = []
    handle = mixer.dt_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    torch.testing.assert_close(mixer(x), expected)
    assert len(seen) > 0
    handle.remove()
    linear = mixer.dt_proj
    mixer.dt_proj = Adapted(linear)
    adapted = mixer(x)
    mixer.dt_proj = linear
    linear.weight.data += 0.5
    torch.testing.assert_close(adapted, mixer(x))


@pytest.mark.gpu
def test_a_mixer_convolves_both_halves_in_one_pass():
    mixer = normal(MambaVisionMixer(48)).cuda()
    x, grad = torch.randn(2, 3, 21, 48, device="cuda")
    results = []
    for apart in (False, True):
        seen = []
        if apart:  # somebody looks on, so the modules are called one by one
            mixer.conv1d_z.register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments[-1]))
        y = mixer(x.requires_grad_())
        results.append([y, *torch.autograd.grad(y, [x, *mixer.parameters()], grad)])
        assert len(seen) == apart
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["conv", "token"])
def test_stochastic_depth_of_the_users_own_is_called(kind):
    block = normal(ConvBlock(6, drop_path=0.5) if kind == "conv" else TokenBlock(6, nn.Linear(6, 6), drop_path=0.5))
    x = torch.randn(3, 6, 5, 4) if kind == "conv" else torch.randn(3, 5, 6)
    seen = []
    handle = block.drop_path.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    block(x)
    assert len(seen) == (1 if kind == "conv" else 2)
    handle.remove()
    other = copy.deepcopy(block)
    block.drop_path = nn.Identity()
    other.drop_path.rate = 0.0
    torch.testing.assert_close(block(x), other(x))


def test_a_block_compiled_by_itself_is_called_as_compiled():
    level = create_model("mamba_vision_test_tiny").levels[2]
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    for block in level.blocks:
        block.compile(backend=backend)
    level(torch.randn(1, level.blocks[0].norm1.weight.shape[0], 4, 4))
    assert compiled


def test_statistics_that_are_not_tracked_stay():
    block = normal(ConvBlock(6))
    x = torch.randn(3, 6, 5, 4)
    assert len(changed(block, x)) == 6
    block.norm1.track_running_stats = block.norm2.track_running_stats = False
    assert not changed(block, x)
    block.norm1.track_running_stats = block.norm2.track_running_stats = True
    block.norm1.num_batches_tracked = block.norm2.num_batches_tracked = None
    assert changed(block, x) == {f"norm{n}.running_{what}" for n in (1, 2) for what in ("mean", "var")}


def test_no_pictures_change_no_statistics():
    block = normal(ConvBlock(6))
    assert not changed(block, torch.randn(0, 6, 5, 4)) - {"norm1.num_batches_tracked", "norm2.num_batches_tracked"}


def test_a_pass_in_training_leaves_one_in_evaluation_its_backward():
    block, other = normal(ConvBlock(6)), None
    other = copy.deepcopy(block)
    x = torch.randn(3, 6, 5, 4)
    gradients = []
    for call, module in ((block, block), (lambda x: module_by_module(other, x), other)):
        evaluated = [module.eval(), call(x)][1]
        trained = [module.train(), call(x)][1]
        (evaluated.sum() + trained.square().sum()).backward()
        gradients.append([parameter.grad for name, parameter in module.named_parameters() if "bias" not in name])
    torch.testing.assert_close(*gradients)


def test_a_network_of_quantised_layers_still_runs():
    model = create_model("mamba_vision_test_tiny").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        assert F.cosine_similarity(quantised(x), model(x)) > 0.99


@pytest.mark.gpu
def test_gradients_of_parts_of_one_map_are_told_apart():
    """Compilers differ in what they make of a view that begins inside a tensor."""
    torch._dynamo.reset()
    block, mix = ConvBlock(16).cuda(), nn.Conv2d(16, 8, 3).cuda()
    x = torch.randn(2, 2, 16, 9, 9, device="cuda").to(memory_format=torch.channels_last_3d).requires_grad_()
    weights = [parameter for name, parameter in block.named_parameters() if name not in ("conv1.bias", "conv2.bias")]
    parameters = [x, *weights, *mix.parameters()]

    def loss(block, a, b):
        return mix(torch.cat([block(a), block(b)])).square().sum()

    found, expected = (
        torch.autograd.grad(run(block, *map(last, x)), parameters)
        for run in (torch.compile(loss), lambda block, *maps: loss(lambda a: module_by_module(block, a), *maps))
    )
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-3 * its.abs().max().item() + 1e-6)


def last(maps):
    return maps.contiguous(memory_format=torch.channels_last)
