"""The 3x3 convolution of training by the kernel for Hopper GPUs: what goes there, gradients, results."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hopper_checks import TYPES, channels_last, on_hopper
from mambavision.layers.conv_block import ConvBlock
from mambavision.layers.normed_conv import normed_conv
from mambavision.ops.conv3x3 import conv3x3_for_training
from mambavision.ops.hopper import availability, conv3x3_op, product_op
from op_checks import DEVICE, check, random

plain = partial(F.conv2d, padding=1)


@pytest.fixture
def plainly(monkeypatch):
    """The kernel's product by PyTorch, on any device."""

    def conv3x3(x, weight, bias, residual, stride, activation):
        assert (bias, residual, stride, activation) == (None, None, 1, "none")
        return channels_last(plain(x, weight))

    monkeypatch.setattr(product_op, "conv3x3", conv3x3)


@pytest.mark.parametrize("shape", [(2, 8, 5, 4), (1, 16, 1, 1), (3, 8, 7, 1)])
def test_the_gradients_are_put_together_rightly(shape, plainly):
    tensors = [channels_last(random(*shape)), random(24, shape[1], 3, 3)]
    check(conv3x3_op.conv3x3, plain, tensors, random(shape[0], 24, *shape[2:]))


def test_the_operator_is_registered_as_torch_asks(plainly):
    x, weight = channels_last(random(2, 8, 5, 4)).requires_grad_(), random(16, 8, 3, 3).requires_grad_()
    torch.library.opcheck(conv3x3_op.conv3x3, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_elsewhere_it_is_pytorchs(dtype):
    x, weight = random(2, 8, 5, 4).to(dtype), random(8, 8, 3, 3).to(dtype)
    assert torch.equal(conv3x3_for_training(x, weight), plain(x, weight))


def test_other_devices_and_types_are_not_served():
    maps, weight = random(64, 80, 56, 56), random(80, 80, 3, 3)
    for dtype in (torch.float32, torch.float64) if DEVICE == "cuda" else (torch.float32, torch.bfloat16):
        assert not conv3x3_op.serves(maps, weight, dtype)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"stride": 2}, False), ({"padding": 0}, False), ({"dilation": 2}, False), ({"groups": 2}, False),
     ({"padding": "same"}, False), ({"kernel_size": 1}, False), ({"padding_mode": "reflect"}, False)],
)  # fmt: skip
def test_only_what_it_computes_goes_there(settings, expected, monkeypatch):
    """On any device, as if it were compiled for a GPU."""
    asked = []
    monkeypatch.setattr("mambavision.layers.normed_conv.is_fused", lambda _: True)
    monkeypatch.setattr("mambavision.layers.normed_conv.refuse_batch_norm_kernels", lambda _: "not here")
    monkeypatch.setattr(
        "mambavision.layers.normed_conv.conv3x3_for_training", lambda x, weight: asked.append(x) or plain(x, weight)
    )
    conv = torch.nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **settings}).to(DEVICE)
    norm = torch.nn.BatchNorm2d(8).to(DEVICE)
    x = random(2, 8, 9, 7)
    y = normed_conv(conv, norm, x)
    assert len(asked) == expected
    with torch.no_grad():
        torch.testing.assert_close(normed_conv(conv, norm, x), y)
    assert len(asked) == expected  # without gradients PyTorch's is taken


@on_hopper
def test_what_is_served():
    for columns, expected in ((80, True), (160, True), (96, True), (192, True), (128, False), (196, False)):
        maps, weight = random(64, columns, 28, 28), random(columns, columns, 3, 3)
        assert conv3x3_op.serves(maps, weight, torch.bfloat16) == expected
        assert not conv3x3_op.serves(maps, weight, torch.float32)
        assert not conv3x3_op.serves(maps[:1], weight, torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "columns"),
    [((2, 80, 9, 7), 80), ((1, 160, 1, 1), 96), ((16, 80, 56, 56), 80), ((16, 192, 28, 28), 192)],
)
def test_the_kernel(dtype, shape, columns, poisoned):
    channels = shape[1]
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    grad_y = random(shape[0], columns, *shape[2:], dtype=dtype)
    for grad in (grad_y, channels_last(grad_y)):
        check(conv3x3_op.conv3x3, plain, [channels_last(random(*shape, dtype=dtype)), weight], grad)


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_compiled_block_takes_the_kernel_and_has_its_own_gradients(dtype):
    from torch.profiler import ProfilerActivity, profile

    block = ConvBlock(80).to(DEVICE).train().to(memory_format=torch.channels_last)
    x = channels_last(random(16, 80, 56, 56))
    grads = []
    for run in (block, torch.compile(block, backend="aot_eager")):
        block.zero_grad()
        with torch.autocast("cuda", dtype=dtype), profile(activities=[ProfilerActivity.CUDA]) as kernels:
            leaf = x.detach().clone().requires_grad_()
            run(leaf).float().square().mean().mul(1e3).backward()
        grads.append([leaf.grad, *(parameter.grad for parameter in block.parameters())])
        assert (run is not block) == any(event.key == "product" for event in kernels.key_averages())
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() <= 0.03 * one.norm() + 1e-3


def graph_of(x, weight):
    """What torch.compile traces of the convolution under autocast, of tensors that say they are on a GPU."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with mode:
            leaves = (torch.empty(each, device="cuda:0", dtype=kind, requires_grad=True) for each, kind in (x, weight))
            y = torch.compile(conv3x3_for_training, backend=keep, fullgraph=True)(*leaves)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
    (graph,) = graphs
    taken = [node for node in graph.graph.nodes if "conv3x3_hopper_for_training" in str(node.target)]
    return y, taken


@pytest.mark.skipif(DEVICE == "cuda", reason="without a GPU, as if there were one")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older PyTorch may ask the GPU that is not there")
@pytest.mark.parametrize(
    ("batch", "channels", "columns", "dtype", "expected"),
    [
        (64, 80, 80, torch.float32, True),
        (64, 160, 160, torch.bfloat16, True),
        (64, 80, 80, torch.float64, False),
        (1, 80, 80, torch.float32, False),  # few pixels
        (64, 128, 128, torch.float32, False),  # the library's
        (64, 128, 80, torch.float32, False),
        (64, 196, 196, torch.float32, False),  # lines that no copy takes
        (64, 64, 64, torch.float32, False),
    ],
)
def test_what_goes_there_on_a_hopper_gpu_alone(batch, channels, columns, dtype, expected, monkeypatch):
    for fault in (None, "another generation"):
        monkeypatch.setattr(availability, "_fault", lambda _, fault=fault: fault)
        y, taken = graph_of(((batch, channels, 28, 28), dtype), ((columns, channels, 3, 3), dtype))
        assert bool(taken) == (expected and fault is None)
        assert y.shape == (batch, columns, 28, 28)
        assert y.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
        if taken:
            assert [argument.meta["example_value"].dtype for argument in taken[0].args] == [torch.bfloat16] * 2
            assert y.is_contiguous(memory_format=torch.channels_last)
