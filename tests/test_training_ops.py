"""The ops of the layers that have gradients: kernels against float64, on a GPU or interpreted, and their references."""

import pytest
import torch
import torch.nn.functional as F

from mambavision.ops.backend import Situation
from mambavision.ops.linear_gelu import BACKENDS as GELU_BACKENDS
from mambavision.ops.linear_gelu import linear_gelu
from mambavision.ops.token_conv import token_conv
from mambavision.ops.window_attention import BACKENDS, window_attention
from op_checks import DEVICE, HALVES, check, gradients, random, require_triton

require_triton()

from mambavision.ops.linear_gelu import triton_op as gelu_op  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.token_conv import triton_op as token_conv_op  # noqa: E402
from mambavision.ops.window_attention import triton_op as attention_op  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def plain_conv(x, weight):
    return token_conv(x, weight, backend="reference")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("windows", "length", "channels"), [(1, 1, 8), (3, 10, 40), (2, 49, 7)])
def test_token_conv(dtype, kernel, windows, length, channels, poisoned):
    wide = random(windows, length, 2 * channels, dtype=dtype)  # the projection of which x is a half
    weight = random(channels, kernel)
    grad_y = random(windows, length, 2 * channels, dtype=dtype)[..., channels:]

    def by(function):
        return lambda wide, weight: function(wide[..., :channels], weight)

    check(by(token_conv_op.token_conv), by(plain_conv), [wide, weight], grad_y)


def test_token_conv_sums_the_weight_of_many_programs(poisoned, monkeypatch):
    monkeypatch.setattr(token_conv_op, "PROGRAMS", 2)
    tensors = [random(9, 20, 40), random(40, 3)]
    check(token_conv_op.token_conv, plain_conv, tensors, random(9, 20, 40))


def test_the_reference_is_what_pytorch_computes():
    x, weight = torch.randn(2, 6, 8).double(), torch.randn(8, 5).double()
    expected = F.silu(F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=2, groups=8).transpose(1, 2))
    torch.testing.assert_close(token_conv(x, weight, backend="reference"), expected)


def sdpa(num_heads):
    return lambda qkv: window_attention(qkv, num_heads=num_heads, backend="sdpa")


def own(num_heads):
    return lambda qkv: attention_op.window_attention(qkv, num_heads, (qkv.shape[2] // (3 * num_heads)) ** -0.5)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("windows", "length", "heads", "width"), [(1, 1, 1, 4), (3, 49, 2, 40), (2, 70, 1, 49), (1, 33, 3, 64)]
)
def test_window_attention(dtype, windows, length, heads, width, poisoned):
    qkv = random(windows, length, 3 * heads * width, dtype=dtype, scale=2.0)
    check(own(heads), sdpa(heads), [qkv], random(windows, length, heads * width, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("length", "width", "scale"), [(49, 104, 98**-0.5), (49, 56, 49**-0.5), (70, 24, 1.5)])
def test_window_attention_with_a_scale_of_its_own_and_wide_heads(dtype, length, width, scale, poisoned):
    qkv = random(2, length, 3 * 2 * width, dtype=dtype)
    truth = window_attention(qkv.double(), num_heads=2, scale=scale, backend="sdpa")
    q, k, v = qkv.double().view(2, length, 3, 2, width).permute(2, 0, 3, 1, 4)
    by_hand = ((q @ k.transpose(2, 3) * scale).softmax(3) @ v).transpose(1, 2).reshape(truth.shape)
    torch.testing.assert_close(truth, by_hand)
    usual = window_attention(qkv, num_heads=2, scale=scale, backend="sdpa")
    found = attention_op.window_attention(qkv, 2, scale)[0]
    assert (found - truth).norm() <= 2 * (usual - truth).norm()
    assert (found - truth).abs().max() <= 2 * (usual - truth).abs().max()


def test_window_attention_of_views(poisoned):
    wide = random(2, 40, 2 * 3 * 16, dtype=torch.float16)
    grad_y = random(40, 2, 16, dtype=torch.float16).transpose(0, 1)
    check(lambda w: own(2)(w[..., 48:]), lambda w: sdpa(2)(w[..., 48:]), [wide], grad_y)


def test_window_attention_with_large_scores_stays_finite(poisoned):
    qkv = random(1, 40, 3 * 16, dtype=torch.float16, scale=40.0)  # weights are 0 and 1, and log sums hundreds
    qkv[:, :, :16] = -qkv[:, :, 16:32]
    check(own(1), sdpa(1), [qkv], random(1, 40, 16, dtype=torch.float16), slack=1e-3)


def layer(rows, channels, hidden, dtype):
    """x, weight and bias; the bias in float32, as autocast leaves it to the op."""
    return [random(*rows, channels, dtype=dtype, scale=2.0), random(hidden, channels, dtype=dtype), random(hidden)]


def scaled(function):
    return lambda x, weight, bias: function(x, weight / weight.shape[1] ** 0.5, bias.to(x.dtype))


def plain_gelu(x, weight, bias):
    return linear_gelu(x, weight, bias, backend="reference")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"), [((1, 1), 16, 64), ((3, 11), 40, 72), ((130,), 33, 7), ((0, 5), 8, 16)], ids=str
)
def test_linear_gelu(dtype, rows, channels, hidden, poisoned):
    grad_y = random(hidden, *rows, dtype=dtype).movedim(0, -1)  # not contiguous
    check(scaled(gelu_op.linear_gelu), scaled(plain_gelu), layer(rows, channels, hidden, dtype), grad_y)


def test_a_bias_keeps_its_own_type():
    x, weight, bias = layer((70,), 16, 24, torch.float32)
    before = (x @ weight.t() / 4).half()
    bias.requires_grad_()
    gelu_op.gelu(before, bias).backward(grad := random(70, 24, dtype=torch.float16))
    slope = torch.autograd.functional.jvp(F.gelu, before.double(), torch.ones_like(before).double())[1]
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), (grad * slope).sum(0), rtol=1e-4, atol=1e-4)


def test_the_gelu_kernel_runs_only_where_there_will_be_a_backward():
    assert "for the backward" in GELU_BACKENDS[0].refusal(Situation("cuda", torch.float16))
    assert "too wide" in GELU_BACKENDS[0].refusal(Situation("cuda", torch.float64, differentiated=True))
    assert GELU_BACKENDS[0].refusal(Situation("cuda", torch.bfloat16, differentiated=True)) is None


def test_an_empty_batch_has_empty_results():
    for y in gradients(own(2), [random(0, 5, 24, dtype=torch.float16)], random(0, 5, 8, dtype=torch.float16)):
        assert y.numel() == 0
    assert not gradients(gelu_op.gelu, [random(0, 5, 8), random(8)], random(0, 5, 8))[2].any()
    y, grad_x, grad_weight = gradients(token_conv_op.token_conv, [random(0, 5, 8), random(8, 3)], random(0, 5, 8))
    assert y.numel() == grad_x.numel() == 0
    assert not grad_weight.any()


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (Situation("cpu", torch.bfloat16, 49, width=40), "cannot compile for cpu"),
        (Situation("cuda", torch.float32, 49, width=40), "16-bit"),
        (Situation("cuda", torch.float16, 1024, width=40), "at most 256 tokens"),
        (Situation("cuda", torch.float16, 49, width=128, differentiated=True), "at most 64 channels"),
        (Situation("cuda", torch.float16, 196, width=72), "at most 64 channels"),
        (Situation("cuda", torch.float16, 49, width=136), "at most 128 channels"),
        (Situation("cuda", torch.float16, 49, width=40, dropout=True), "no dropout"),
    ],
)
def test_the_attention_kernels_refuse_what_they_cannot_do(situation, reason):
    assert reason in BACKENDS[0].refusal(situation)
    assert BACKENDS[0].refusal(Situation("cuda", torch.bfloat16, 196, width=40)) is None
    assert BACKENDS[0].refusal(Situation("cuda", torch.bfloat16, 49, width=128)) is None


def test_heads_that_do_not_divide_the_channels_are_named():
    with pytest.raises(ValueError, match=r"3 x 5 x width"):
        window_attention(torch.ones(1, 4, 48), num_heads=5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("windows", "length", "heads", "width"), [(128, 196, 8, 40), (128, 49, 16, 40), (16, 196, 16, 49), (16, 256, 8, 64)]
)
def test_window_attention_at_the_sizes_of_the_networks(dtype, windows, length, heads, width, poisoned):
    qkv = random(windows, length, 3 * heads * width, dtype=dtype)
    check(own(heads), sdpa(heads), [qkv], random(windows, length, heads * width, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("windows", "length", "channels"), [(128, 196, 160), (128, 49, 320), (16, 196, 392)])
def test_token_conv_at_the_sizes_of_the_networks(dtype, windows, length, channels, poisoned):
    tensors = [random(windows, length, channels, dtype=dtype), random(channels, 3)]
    grad_y = random(windows, length, channels, dtype=dtype)
    check(token_conv_op.token_conv, plain_conv, tensors, grad_y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"), [((25088,), 320, 1280), ((6272,), 640, 2560), ((3136,), 784, 3136)]
)
def test_linear_gelu_at_the_sizes_of_the_networks(dtype, rows, channels, hidden, poisoned):
    grad_y = random(*rows, hidden, dtype=dtype)
    check(scaled(gelu_op.linear_gelu), scaled(plain_gelu), layer(rows, channels, hidden, dtype), grad_y)


@pytest.mark.gpu
def test_the_operators_are_registered_as_torch_asks():
    qkv = random(2, 49, 48, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(attention_op.window_attention, (qkv, 2, 0.35))
    x, weight = random(2, 49, 16, dtype=torch.bfloat16).requires_grad_(), random(16, 3).requires_grad_()
    torch.library.opcheck(token_conv_op.token_conv, (x, weight))
    bias = random(16).requires_grad_()
    torch.library.opcheck(gelu_op.gelu, (x, bias))


@pytest.mark.gpu
def test_compiled_gradients_are_those_of_eager():
    tensors = [random(4, 49, 48, dtype=torch.bfloat16), random(16, 3), random(64, 16), random(64)]
    grad_y = random(4, 49, 64, dtype=torch.bfloat16)

    def function(qkv, taps, weight, bias):
        mixed = token_conv(window_attention(qkv, num_heads=2), taps)
        with torch.autocast("cuda", torch.bfloat16):
            return linear_gelu(mixed, weight, bias)

    compiled = gradients(torch.compile(function, fullgraph=True), tensors, grad_y)
    for actual, expected in zip(compiled, gradients(function, tensors, grad_y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
