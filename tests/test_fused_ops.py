"""The ops of the inference path: each kernel against float64, on a GPU or interpreted, and each reference likewise."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from mambavision.ops.backend import Situation, refuse_inference_kernels
from mambavision.ops.conv3x3 import aligned_rows, conv3x3, weight_of_rows
from mambavision.ops.conv3x3.float8 import conv3x3_float8
from mambavision.ops.layer_norm import layer_norm, layer_norm_and_sum, layer_norm_of_sum_
from mambavision.ops.linear import linear, linear_with_moments
from mambavision.ops.stem import stem
from mambavision.ops.token_conv import token_conv
from op_checks import DEVICE, gapped, random, require_triton

require_triton()

from mambavision.ops.conv3x3 import triton_op as conv3x3_op  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.layer_norm import triton_op as layer_norm_op  # noqa: E402
from mambavision.ops.linear import triton_op as linear_op  # noqa: E402
from mambavision.ops.stem import triton_op as stem_op  # noqa: E402
from mambavision.ops.tiles import (  # noqa: E402
    Tile,
    choose,
    footprint,
    is_large,
    measuring,
    small_tiles,
    that_fit,
)
from mambavision.ops.token_conv import triton_op as token_conv_op  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# On a GPU float32 products are cut to TF32, and the ops refuse it; Triton's interpreter cannot multiply bfloat16.
TYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def distance(actual, expected):
    return (actual.double() - expected).norm().item()


def check(actual, usual, expected, *, gelu=False):
    """At most twice as far from float64 as PyTorch in the same type, and of its shape and type.

    The kernels' GELU may be 6e-5 off, which is less than their types round, but for float32 in the interpreter.
    """
    assert actual.shape == usual.shape
    assert actual.dtype == usual.dtype
    allowed = (6e-5 if gelu else 1e-6) * expected.numel() ** 0.5
    assert distance(actual, expected) <= 2 * distance(usual, expected) + allowed


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("norm", "residual", "bias"), [(True, True, True), (False, False, False), (True, False, True)])
def test_linear(dtype, activation, norm, residual, bias, poisoned):
    x, weight = random(3, 11, 40, dtype=dtype) + 0.5, random(24, 40, dtype=dtype, scale=0.2)
    arguments = (
        random(24, dtype=dtype) if bias else None,
        random(3, 11, 24, dtype=dtype) if residual else None,
        1e-5 if norm else None,
        None,
        activation,
    )
    truth = linear(*wide(x, weight, arguments[0]), residual=wide(arguments[1])[0], norm_eps=arguments[2],
                   activation=activation)  # fmt: skip
    usual = linear(x, weight, arguments[0], residual=arguments[1], norm_eps=arguments[2], activation=activation,
                   backend="reference")  # fmt: skip
    weight_sum = weight.float().sum(1) if norm else None
    found = linear_op.linear(x, weight, arguments[0], arguments[1], weight_sum, 1e-5, activation)
    check(found, usual, truth, gelu=activation.startswith("gelu"))


@pytest.mark.parametrize("tile", [*small_tiles(196, 320), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4)], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 16), (35, 72, 40), (130, 33, 7)])
def test_linear_tiles(tile, rows, inner, columns, poisoned):
    """Every tile, at sizes that no tile divides, single rows and odd channels; x part of wider rows."""
    dtype = TYPES[-1]
    x, weight = random(rows, 2 * inner, dtype=dtype)[:, :inner], random(columns, inner, dtype=dtype, scale=0.1)
    truth = linear(*wide(x, weight), norm_eps=1e-5)
    usual = linear(x, weight, norm_eps=1e-5, backend="reference")
    out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    linear_op.launch(x, weight, None, None, weight.float().sum(1), 1e-5, "none", out, tile)
    check(out, usual, truth)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tile", small_tiles(196, 320), ids=str)
@pytest.mark.parametrize("columns", [16, 40, 67])
def test_linear_with_moments(dtype, tile, columns, poisoned, monkeypatch):
    """Of each 16 columns, the last of them fewer; and the norm that the next layer makes of them."""
    monkeypatch.setattr(linear_op, "candidates", lambda *_: [tile])
    x, weight, bias = random(3, 11, 40, dtype=dtype), random(columns, 40, dtype=dtype), random(columns, dtype=dtype)
    residual = random(3, 11, columns, dtype=dtype) + 0.5
    truth, _ = linear_with_moments(*wide(x, weight, bias), residual=residual.double())
    usual, _ = linear_with_moments(x, weight, bias, residual=residual, backend="reference")
    found, moments = linear_op.linear_with_moments(x, weight, bias, residual)
    check(found, usual, truth)
    assert moments.dtype == torch.float32
    for place, part in enumerate(found.double().flatten(0, 1).split(16, dim=1)):
        torch.testing.assert_close(moments[:, 0, place].double(), part.mean(1), rtol=1e-5, atol=1e-5)
        spread = part.var(1, correction=0) * part.shape[1]
        torch.testing.assert_close(moments[:, 1, place].double(), spread, rtol=1e-5, atol=1e-5)
    identity = torch.eye(columns, dtype=dtype, device=DEVICE)
    _, expected = linear_with_moments(found, identity, backend="reference")
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-5)

    following = random(24, columns, dtype=dtype, scale=0.2)
    truth = linear(*wide(found, following), norm_eps=1e-5)
    usual = linear(found, following, norm_eps=1e-5, backend="reference")
    sums = following.float().sum(1)
    for given in (moments, gapped(moments)):
        check(linear_op.linear(found, following, None, None, sums, 1e-5, "none", given), usual, truth)


@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize("given", [False, True])
def test_a_norm_keeps_its_digits_where_rows_lie_far_from_zero(mean, given, poisoned):
    x = (random(33, 320, dtype=torch.float32) + mean).to(TYPES[-1])
    weight = random(24, 320, dtype=TYPES[-1], scale=0.1)
    moments = linear_with_moments(x, torch.eye(320, device=DEVICE, dtype=x.dtype), backend="reference")[1]
    truth = linear(*wide(x, weight), norm_eps=1e-5)
    usual = linear(x, weight, norm_eps=1e-5, backend="reference")
    sums = weight.float().sum(1)
    check(linear_op.linear(x, weight, None, None, sums, 1e-5, "none", moments if given else None), usual, truth)


def test_moments_of_nothing():
    weight = random(24, 40, dtype=TYPES[-1])
    for backend in ("reference", "triton") if DEVICE == "cuda" else ("reference",):
        y, moments = linear_with_moments(random(0, 5, 40, dtype=TYPES[-1]), weight, backend=backend)
        assert y.shape == (0, 5, 24)
        assert moments.shape == (0, 2, 2)
    with pytest.raises(ValueError, match="moments must be"):
        linear(torch.ones(3, 4), torch.ones(2, 4), norm_eps=1e-5, moments=torch.ones(3, 1, 2))
    with pytest.raises(ValueError, match="residual must be"):
        linear_with_moments(torch.ones(3, 4), torch.ones(2, 4), residual=torch.ones(3, 4))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("channels", "columns", "height", "width"), [(16, 24, 9, 7), (40, 80, 1, 5), (3, 5, 4, 4)])
def test_conv3x3(dtype, stride, activation, channels, columns, height, width, poisoned):
    x = random(2, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=0.1)
    bias = random(columns, dtype=dtype)
    residual = random(2, columns, -(-height // stride), -(-width // stride), dtype=dtype) if stride == 1 else None
    truth = conv3x3(*wide(x, weight, bias), residual=wide(residual)[0], stride=stride, activation=activation)
    usual = conv3x3(x, weight, bias, residual=residual, stride=stride, activation=activation, backend="reference")
    found = conv3x3_op.conv3x3(x, weight, bias, residual, stride, activation)
    check(found, usual, truth, gelu=activation.startswith("gelu"))


@pytest.mark.parametrize(
    "tile", [conv3x3_op.LIBRARY, Tile(32, 16, 64, 4, 2, 16), Tile(128, 128, 64, 4, 3, 32)], ids=str
)
def test_conv3x3_tiles(tile, poisoned):
    """A library's convolution with the kernel behind it, and tiles with a tail, on a view of a wider map."""
    dtype = TYPES[-1]
    x = random(2, 40, 6, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)[:, :32]
    weight, residual = random(80, 32, 3, 3, dtype=dtype, scale=0.1), random(2, 80, 6, 5, dtype=dtype)
    truth = conv3x3(*wide(x, weight), residual=residual.double(), activation="gelu_tanh")
    usual = conv3x3(x, weight, residual=residual, activation="gelu_tanh", backend="reference")
    for laid_out in (weight, weight_of_rows(aligned_rows(weight, bytes_each=weight.element_size()), 32)):
        check(conv3x3_op.launch(x, laid_out, None, residual, 1, "gelu_tanh", tile), usual, truth, gelu=True)
    gaps = torch.full((80, 9 * 64), float("nan"), dtype=dtype, device=DEVICE)  # what lies between the taps is not read
    weight_of_rows(gaps, 32).copy_(weight)
    check(conv3x3_op.launch(x, weight_of_rows(gaps, 32), None, residual, 1, "gelu_tanh", tile), usual, truth, gelu=True)


def test_every_column_is_computed_by_a_tile_that_fits():
    for columns in (16, 32, 48, 64, 80, 96, 128, 160, 192, 208, 224, 256, 400, 416, 512):
        for tiles in (conv3x3_op.candidates(10**6, columns, columns, 1), conv3x3_op.float8_candidates(10**6, columns)):
            for tile in tiles:
                if tile != conv3x3_op.LIBRARY:
                    assert tile.columns in (64, 128, 256)
                    assert tile.tail in (0, 16, 32, 64)
        width = sum(conv3x3_op.fitting(columns))
        assert -(-columns // width) * width - columns <= 112  # computed for nothing


@pytest.mark.parametrize(
    ("columns", "stride", "first"),
    [
        (80, 1, Tile(128, 64, 64, 4, 4, 16)),
        (128, 1, Tile(128, 128, 64, 4, 3)),
        (160, 1, Tile(128, 128, 64, 4, 3, 32)),
        (192, 1, conv3x3_op.LIBRARY),
        (208, 1, Tile(128, 256, 64, 8, 4)),
        (208, 2, conv3x3_op.LIBRARY),
        (400, 1, Tile(128, 256, 64, 8, 4)),
    ],
)
def test_the_networks_widths_get_the_tiles_that_were_measured(columns, stride, first):
    assert conv3x3_op.candidates(10**6, columns, columns, stride)[0] == first


def test_tiles_that_a_gpu_has_no_room_for_are_left_out(monkeypatch):
    tiles = [Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4)]
    monkeypatch.setattr("mambavision.ops.tiles._shared_memory", lambda index: {0: 101_376, 1: 232_448, 2: 1}[index])
    assert that_fit(tiles, 2, torch.device("cuda:0")) == tiles[1:]
    assert that_fit(tiles, 2, torch.device("cuda:1")) == tiles
    assert that_fit(tiles, 2, torch.device("cuda:2")) == tiles[-1:]
    assert that_fit(tiles, 2, torch.device("cpu")) == tiles
    assert footprint(conv3x3_op.LIBRARY, 2) == 0
    narrow = small_tiles(49, 640)
    assert that_fit(narrow, 2, torch.device("cuda:1"))[0] == narrow[0]
    assert that_fit(narrow, 2, torch.device("cuda:0"))[0] == narrow[0]._replace(stages=4)


def test_aligned_rows_hold_the_weight():
    weight = random(6, 5, 3, 3, dtype=torch.float32)
    rows = aligned_rows(weight, bytes_each=2)
    assert rows.shape == (6, 9 * 64)
    assert rows.count_nonzero() == weight.count_nonzero()
    assert torch.equal(weight_of_rows(rows, 5), weight)


def test_a_librarys_product_keeps_the_type_under_autocast(monkeypatch):
    monkeypatch.setattr(linear_op, "_on_gpu", lambda _: True)
    for op in (linear_op, conv3x3_op):
        monkeypatch.setattr(op, "choose", lambda *_: conv3x3_op.LIBRARY)
    x, weight = random(5, 16, dtype=torch.bfloat16), random(24, 16, dtype=torch.bfloat16)
    maps, kernel = random(1, 16, 4, 4, dtype=torch.bfloat16), random(24, 16, 3, 3, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert linear_op.linear(x, weight, None, None, None, 0.0, "none").dtype == torch.bfloat16
        assert conv3x3_op.launch(maps, kernel, None, None, 1, "none").dtype == torch.bfloat16


def test_operands_may_have_gaps(poisoned, monkeypatch):
    dtype = TYPES[-1]
    x, weight, bias = (
        gapped(random(3, 5, 16, dtype=dtype)),
        gapped(random(24, 16, dtype=dtype)),
        random(24, dtype=dtype),
    )
    residual, sums = gapped(random(3, 5, 24, dtype=dtype)), weight.float().sum(1)
    truth = linear(*wide(x, weight, bias), residual=residual.double(), norm_eps=1e-5)
    usual = linear(x, weight, bias, residual=residual, norm_eps=1e-5, backend="reference")
    check(linear_op.linear(x, weight, gapped(bias), residual, gapped(sums), 1e-5, "none"), usual, truth)

    shift = random(16, dtype=torch.float32)
    usual = layer_norm(x, shift, eps=1e-5, backend="reference")
    check(layer_norm_op.layer_norm(x, gapped(shift), 1e-5), usual, layer_norm(*wide(x, shift), eps=1e-5))

    maps, kernel = gapped(random(2, 16, 5, 4, dtype=dtype)), gapped(random(24, 16, 3, 3, dtype=dtype, scale=0.1))
    residual = gapped(random(2, 24, 5, 4, dtype=dtype))
    truth = conv3x3(*wide(maps, kernel, bias), residual=residual.double())
    usual = conv3x3(maps, kernel, bias, residual=residual, backend="reference")
    for tile in (conv3x3_op.LIBRARY, Tile(32, 16, 64, 4, 2, 16)):
        check(conv3x3_op.launch(maps, kernel, gapped(bias), residual, 1, "none", tile), usual, truth)

    first, first_bias = gapped(random(16, 16, 3, 3, dtype=dtype, scale=0.1)), random(16, dtype=dtype)
    truth = stem(*wide(maps, first, first_bias, kernel, bias), strides=(2, 1))
    usual = stem(maps, first, first_bias, kernel, bias, strides=(2, 1), backend="reference")
    for two_steps_from in (1, 10**9):
        monkeypatch.setattr(stem_op, "TWO_STEPS_FROM", two_steps_from)
        check(stem_op.stem(maps, first, gapped(first_bias), kernel, gapped(bias), 2, 1), usual, truth)

    taps = gapped(random(16, 3, dtype=dtype))
    check(token_conv_op.token_conv(x, taps), token_conv(x, taps, backend="reference"), token_conv(*wide(x, taps)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("windows", "length", "channels"), [(1, 1, 8), (3, 10, 40), (2, 49, 7)])
def test_token_conv(dtype, kernel, windows, length, channels, poisoned):
    x, weight = (
        random(windows, length, 2 * channels, dtype=dtype)[..., :channels],
        random(channels, kernel, dtype=dtype),
    )
    usual = token_conv(x, weight, backend="reference")
    check(token_conv_op.token_conv(x, weight), usual, token_conv(*wide(x, weight)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 40), (5, 700)], ids=str)
def test_layer_norm(dtype, offset, shape, poisoned):
    x = random(*shape, dtype=dtype) + 3
    shift = random(shape[-1], dtype=torch.float32) if offset else None
    truth = layer_norm(*wide(x, shift), eps=1e-5)
    usual = layer_norm(x, shift, eps=1e-5, backend="reference")
    check(layer_norm_op.layer_norm(x, shift, 1e-5), usual, truth)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 40), (5, 700)], ids=str)
def test_layer_norm_and_sum(dtype, shape, poisoned):
    x, shift = random(*shape, dtype=dtype) + 3, random(shape[-1], dtype=dtype)
    truth = layer_norm_and_sum(*wide(x, shift), eps=1e-5)
    for constant in (shift, shift.float()):
        usual = layer_norm_and_sum(x, constant, eps=1e-5, backend="reference")
        for here in (x, gapped(x)):
            found = layer_norm_op.layer_norm_and_sum(here, gapped(constant), 1e-5)
            for compared in zip(found, usual, truth, strict=True):
                check(*compared)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 40), (5, 700)], ids=str)
def test_layer_norm_of_sum(dtype, offset, shape, poisoned):
    x, share = random(*shape, dtype=dtype) + 3, random(*shape, dtype=dtype)
    shift = random(shape[-1], dtype=torch.float32) if offset else None
    exact, usual, found = x.double(), x.clone(), x.clone()
    truth = layer_norm_of_sum_(exact, share.double(), *wide(shift), eps=1e-5)
    plain = layer_norm_of_sum_(usual, share, shift, eps=1e-5, backend="reference")
    check(layer_norm_op.layer_norm_of_sum_(found, gapped(share), shift, 1e-5), plain, truth)
    check(found, usual, exact)
    with pytest.raises(ValueError, match="no gaps"):
        layer_norm_of_sum_(gapped(x), share, eps=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("strides", [(2, 2), (1, 1)])
@pytest.mark.parametrize("pictures", [(2, 3, 21, 18), (1, 1, 1, 1), (1, 4, 5, 33)], ids=str)
@pytest.mark.parametrize("two_steps", [False, True])
def test_stem(dtype, strides, pictures, two_steps, poisoned, monkeypatch):
    monkeypatch.setattr(stem_op, "TWO_STEPS_FROM", 1 if two_steps else 10**9)
    x = random(*pictures, dtype=torch.float32)  # the weights' type decides, not the pictures'
    weight1, bias1 = random(16, pictures[1], 3, 3, dtype=dtype, scale=0.2), random(16, dtype=dtype)
    weight2, bias2 = random(24, 16, 3, 3, dtype=dtype, scale=0.1), random(24, dtype=dtype)
    truth = stem(*wide(x.to(dtype), weight1, bias1, weight2, bias2), strides=strides)
    usual = stem(x, weight1, bias1, weight2, bias2, strides=strides, backend="reference")
    check(stem_op.stem(x, weight1, bias1, weight2, bias2, *strides), usual, truth)


@pytest.mark.parametrize("two_steps", [False, True])
def test_the_stem_keeps_nan(two_steps, monkeypatch):
    monkeypatch.setattr(stem_op, "TWO_STEPS_FROM", 1 if two_steps else 10**9)
    dtype = TYPES[-1]
    x = random(1, 3, 9, 40, dtype=torch.float32)
    x[0, 1, 4, 3] = float("nan")
    weights = (
        random(16, 3, 3, 3, dtype=dtype),
        random(16, dtype=dtype),
        random(24, 16, 3, 3, dtype=dtype),
        random(24, dtype=dtype),
    )
    expected = stem(x, *weights, backend="reference").isnan()
    assert expected.any()
    assert not expected.all()
    assert torch.equal(stem_op.stem(x, *weights, 2, 2).isnan(), expected)


def test_an_empty_batch_has_an_empty_result():
    dtype = TYPES[-1]
    x, weight = random(0, 8, 4, 4, dtype=dtype), random(16, 8, 3, 3, dtype=dtype)
    assert conv3x3_op.conv3x3(x, weight, None, None, 2, "none").shape == (0, 16, 2, 2)
    assert linear_op.linear(random(0, 5, 8, dtype=dtype), weight[:, :, 0, 0], None, None, None, 0.0, "none").shape == (
        0, 5, 16,
    )  # fmt: skip
    assert token_conv_op.token_conv(random(0, 5, 8, dtype=dtype), random(8, 3, dtype=dtype)).shape == (0, 5, 8)
    assert layer_norm_op.layer_norm(random(0, 8, dtype=dtype), None, 1e-5).shape == (0, 8)
    y, total = layer_norm_op.layer_norm_and_sum(random(0, 8, dtype=dtype), random(8, dtype=dtype), 1e-5)
    assert y.shape == total.shape == (0, 8)


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (Situation("cpu", torch.bfloat16), "cannot compile for cpu"),
        (Situation("cuda", torch.float32), "16-bit"),
        (Situation("cuda", torch.bfloat16, differentiated=True), "no backward"),
    ],
)
def test_the_kernels_refuse_what_they_cannot_do(situation, reason):
    assert reason in refuse_inference_kernels(situation)
    assert refuse_inference_kernels(Situation("cuda", torch.float16)) is None


def test_a_request_that_cannot_be_met_gives_the_reason():
    with pytest.raises(RuntimeError, match=r"triton.*linear.*cannot run here"):
        linear(torch.ones(2, 4), torch.ones(3, 4), backend="triton")


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="x must have 4 channels"):
        linear(torch.ones(2, 5), torch.ones(3, 4))
    with pytest.raises(ValueError, match="residual must be"):
        linear(torch.ones(2, 4), torch.ones(3, 4), residual=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"weight must be \(columns, 5, 3, 3\)"):
        conv3x3(torch.ones(1, 5, 4, 4), torch.ones(3, 4, 3, 3))
    with pytest.raises(ValueError, match="weight must be"):
        token_conv(torch.ones(1, 5, 4), torch.ones(4, 2))
    x, weight, long = torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3), torch.ones(4)
    for arguments in ({"bias": long}, {"residual": torch.ones(1, 3, 6, 5), "stride": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be "):
            conv3x3(x, weight, **arguments)
    for arguments in ({"bias": long}, {"weight_sum": long}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be "):
            linear(torch.ones(2, 4), torch.ones(3, 4), **arguments)
    with pytest.raises(ValueError, match="offset must be "):
        layer_norm(torch.ones(2, 5), long, eps=1e-5)
    with pytest.raises(ValueError, match="shift must be "):
        layer_norm_and_sum(torch.ones(2, 5), long, eps=1e-5)
    with pytest.raises(ValueError, match="bias2 must be "):
        stem(x, torch.ones(16, 4, 3, 3), torch.ones(16), torch.ones(8, 16, 3, 3), long)
    bytes8 = (tensor.to(torch.float8_e4m3fn) for tensor in (x, weight))
    with pytest.raises(ValueError, match="scale must be "):
        conv3x3_float8(*bytes8, long, torch.ones(3))


def test_other_settings_than_there_are_are_named():
    with pytest.raises(ValueError, match=r"activation must be one of none, relu, gelu, gelu_tanh, got 'silu'"):
        linear(torch.ones(2, 4), torch.ones(3, 4), activation="silu")
    with pytest.raises(ValueError, match="activation must be"):
        conv3x3(torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3), activation="swish")
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        conv3x3(torch.ones(1, 4, 6, 5), torch.ones(3, 4, 3, 3), stride=3)


def test_little_work_gets_small_tiles_and_much_work_large_ones():
    assert not is_large(196, 1280)
    assert is_large(25088, 320)
    assert small_tiles(196, 1280)[0].columns == 64
    assert small_tiles(49, 640)[0].columns == 16


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at what happens without a GPU's clock")
def test_a_choice_is_kept(monkeypatch):
    from mambavision.ops import tiles

    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(tiles, "_milliseconds", lambda run, tile: (run(tile), tile.rows)[1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    candidates, runs = [Tile(64, 1, 1, 1, 1), Tile(32, 1, 1, 1, 1)], []
    assert choose("key", candidates, runs.append) == candidates[0]  # by rule
    assert not runs
    with measuring():
        assert choose("key", candidates, runs.append) == candidates[1]  # by time
    assert len(runs) == 2
    assert choose("key", candidates, runs.append) == candidates[1]
    assert len(runs) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at what happens without a GPU's clock")
def test_choices_are_bounded_and_made_by_the_thread_that_measures(monkeypatch):
    from mambavision.ops import tiles

    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setattr(tiles, "MAX_CHOSEN", 3)
    monkeypatch.setattr(tiles, "_milliseconds", lambda _, tile: tile.rows)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    candidates = [Tile(64, 1, 1, 1, 1), Tile(32, 1, 1, 1, 1)]
    with measuring():
        for number in range(5):
            assert choose(number, candidates, lambda _: None) == candidates[1]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(choose, "new", candidates, lambda _: None).result() == candidates[0]
    assert list(tiles._chosen) == [2, 3, 4]
    assert choose("new", candidates, lambda _: None) == candidates[0]


# --- what only a GPU shows --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 49, 700])
def test_gelu_at_the_end_of_the_librarys_product(dtype, rows, poisoned):
    """Where the kernel for Hopper GPUs does not serve; a bias of another type goes to ours."""
    x, weight = random(rows, 40, dtype=dtype), random(88, 40, dtype=dtype, scale=40**-0.5)
    bias = random(88, dtype=dtype)
    truth = linear(*wide(x, weight, bias), activation="gelu_tanh")
    usual = linear(x, weight, bias, activation="gelu_tanh", backend="reference")
    for shift in (bias, bias.float()):
        found = linear_op.linear(x, weight, shift, None, None, 0.0, "gelu_tanh")
        assert found.dtype == dtype
        assert (found - truth).abs().max() <= 2 * (usual - truth).abs().max() + 6e-4
    torch.library.opcheck(linear_op.linear, (x, weight, bias, None, None, 0.0, "gelu_tanh"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(25088, 320, 1280), (6272, 640, 640), (49, 2560, 640)])
def test_linear_at_the_sizes_of_the_networks(dtype, rows, inner, columns, poisoned):
    """Repeated, since a race would show now and then only."""
    x, weight = random(rows, inner, dtype=dtype) + 0.5, random(columns, inner, dtype=dtype, scale=inner**-0.5)
    truth = linear(*wide(x, weight), norm_eps=1e-5, activation="gelu")
    usual = linear(x, weight, norm_eps=1e-5, activation="gelu", backend="reference")
    for tile in linear_op.candidates(rows, columns):
        out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
        for _ in range(3):
            linear_op.launch(x, weight, None, None, weight.float().sum(1), 1e-5, "gelu", out, tile)
            check(out, usual, truth)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "columns", "side", "stride"),
    [(80, 80, 56, 1), (160, 160, 28, 1), (80, 160, 56, 2), (208, 400, 28, 2), (208, 208, 56, 1)],
)
def test_conv3x3_at_the_sizes_of_the_networks(channels, columns, side, stride, poisoned):
    dtype = torch.bfloat16
    x = random(16, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (
        random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
        random(columns, dtype=dtype),
    )
    truth = conv3x3(*wide(x, weight, bias), stride=stride, activation="gelu_tanh")
    usual = conv3x3(x, weight, bias, stride=stride, activation="gelu_tanh", backend="reference")
    pixels = 16 * (side // stride) ** 2
    for tile in conv3x3_op.candidates(pixels, columns, channels, stride):
        check(conv3x3_op.launch(x, weight, bias, None, stride, "gelu_tanh", tile), usual, truth, gelu=True)


@pytest.mark.gpu
def test_the_operators_are_registered_as_torch_asks():
    dtype = torch.bfloat16
    x, weight = random(4, 16, 64, dtype=dtype), random(32, 64, dtype=dtype)
    torch.library.opcheck(linear_op.linear, (x, weight, None, None, weight.float().sum(1), 1e-5, "gelu"))
    torch.library.opcheck(linear_op.linear_with_moments, (x, weight, None, None))
    torch.library.opcheck(token_conv_op.token_conv, (x, random(64, 3, dtype=dtype)))
    torch.library.opcheck(layer_norm_op.layer_norm, (x, None, 1e-5))
    torch.library.opcheck(layer_norm_op.layer_norm_and_sum, (x, x.new_ones(x.shape[-1]), 1e-5))
    torch.library.opcheck(layer_norm_op.layer_norm_of_sum_, (x.clone(), x, None, 1e-5))
    maps = random(2, 16, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(conv3x3_op.conv3x3, (maps, random(32, 16, 3, 3, dtype=dtype), None, None, 1, "relu"))
    pictures, weights = random(2, 3, 16, 16, dtype=dtype), random(16, 3, 3, 3, dtype=dtype)
    bias = random(16, dtype=dtype)
    torch.library.opcheck(stem_op.stem, (pictures, weights, bias, random(16, 16, 3, 3, dtype=dtype), bias, 2, 2))


@pytest.mark.gpu
def test_they_compile():
    dtype = torch.bfloat16
    x, weight = random(4, 16, 64, dtype=dtype), random(32, 64, dtype=dtype)

    def function(x):
        return linear(token_conv(x, weight[:, :1].repeat(2, 3)), weight, norm_eps=1e-5, activation="gelu")

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x), rtol=2e-2, atol=2e-2)


def test_references_give_the_type_of_x():
    """As the kernels do, whatever the types of bias and residual."""
    x, weight, bias = torch.randn(2, 4).half(), torch.randn(3, 4).half(), torch.randn(3)
    residual = torch.randn(2, 3)
    expected = F.linear(x, weight) + bias + residual
    found = linear(x, weight, bias, residual=residual)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    maps, kernel = x[:, :, None, None], weight[:, :, None, None].expand(-1, -1, 3, 3)
    found = conv3x3(maps, kernel, bias, residual=residual[:, :, None, None])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found[:, :, 0, 0].float(), expected, rtol=1e-2, atol=1e-2)


def test_references_are_what_pytorch_computes():
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    expected = F.gelu(F.linear(F.layer_norm(x, (8,), eps=1e-5), weight)) + 1
    torch.testing.assert_close(
        linear(x, weight, residual=torch.ones(2, 5, 6), norm_eps=1e-5, activation="gelu"), expected
    )
