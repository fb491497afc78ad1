"""The kernels for Hopper GPUs without one: their CUDA C++ on the host, by `hopper_emulator`, against float64."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hopper_checks import channels_last, check, require_bindings, wide
from mambavision.ops.activation import activate
from mambavision.ops.conv3x3 import aligned_rows, conv3x3, weight_of_rows
from mambavision.ops.conv3x3.float8 import conv3x3_float8_reference
from mambavision.ops.float8 import to_float8
from mambavision.ops.linear import linear
from mambavision.ops.window_attention import window_attention
from op_checks import check as check_gradients
from op_checks import fail_if_required, random, require_triton
from test_float8 import operands, rows_and_weight
from test_optimize import difference

require_triton()
require_bindings()

from hopper_emulator import Fault, called, compiler, emulate  # noqa: E402  (it needs what was asked for)
from mambavision.ops.hopper import attention_op, build, conv3x3_op, product_op  # noqa: E402

pytestmark = [
    # CUDA_VISIBLE_DEVICES= hides the GPU: these are for a host's memory.
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a Hopper GPU the kernels' own tests run"),
    pytest.mark.skipif(sys.platform != "linux", reason="its fibers are Linux's"),
]
if not compiler():
    try:
        pytest.skip("there is no C++ compiler", allow_module_level=True)
    except pytest.skip.Exception as skipped:
        fail_if_required(skipped)
        raise

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where what is compiled is kept, for the tests that share it."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=[False, True], ids=["at once", "as late as can be"])
def emulated(request, monkeypatch, folder):
    """Products are computed at one end of the time that a kernel gives them, or at the other."""
    emulate(monkeypatch, folder, seed=int(request.param), late=request.param)


@pytest.mark.parametrize(
    ("dtype", "batch", "channels", "columns", "height", "width", "stride", "bias", "residual", "activation"),
    [
        (BF16, 2, 80, 80, 19, 21, 1, True, True, "gelu_tanh"),  # four products a thread, more tiles than processors
        (F16, 2, 208, 112, 9, 7, 2, False, False, "none"),  # a last chunk of 16 channels
        (BF16, 1, 24, 256, 17, 9, 1, True, False, "relu"),  # one team
        (F16, 1, 64, 216, 6, 31, 1, True, True, "gelu_tanh"),  # tiles of an odd number of blocks, the last not full
        (BF16, 150, 16, 120, 1, 1, 1, True, True, "none"),  # many pictures in a tile
    ],
)
def test_convolutions(
    emulated, poisoned, dtype, batch, channels, columns, height, width, stride, bias, residual, activation
):
    x = channels_last(random(batch, channels, height, width, dtype=dtype))
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    bias = random(columns, dtype=dtype) if bias else None
    shape = (batch, columns, -(-height // stride), -(-width // stride))
    residual = channels_last(random(*shape, dtype=dtype)) if residual else None
    truth = conv3x3(*wide(x, weight, bias), residual=wide(residual)[0], stride=stride, activation=activation)
    usual = conv3x3(x, weight, bias, residual=residual, stride=stride, activation=activation, backend="reference")
    for laid_out in (weight, weight_of_rows(aligned_rows(weight, bytes_each=2), channels)):
        found = product_op.conv3x3(x, laid_out, bias, residual, stride, activation)
        check(found, usual, truth, gelu=activation == "gelu_tanh")


def test_a_convolution_and_its_gradients(emulated, poisoned):
    tensors = [
        channels_last(random(2, 80, 9, 7, dtype=F16)),
        random(96, 80, 3, 3, dtype=F16, scale=(9 * 80) ** -0.5),
    ]
    check_gradients(conv3x3_op.conv3x3, partial(F.conv2d, padding=1), tensors, random(2, 96, 9, 7, dtype=F16))


@pytest.mark.parametrize(
    ("dtype", "rows", "inner", "columns", "activation"),
    [(F16, 300, 72, 136, "gelu_tanh"), (BF16, 1, 8, 112, "none"), (BF16, 600, 320, 400, "none")],
)
def test_linear_layers(emulated, poisoned, dtype, rows, inner, columns, activation):
    x, weight = random(rows, inner, dtype=dtype), random(columns, inner, dtype=dtype, scale=inner**-0.5)
    bias = random(columns, dtype=dtype)
    truth = linear(*wide(x, weight, bias), activation=activation)
    usual = linear(x, weight, bias, activation=activation, backend="reference")
    check(product_op.linear(x, weight, bias, activation), usual, truth, gelu=activation == "gelu_tanh")


@pytest.mark.parametrize(("channels", "columns", "height", "width"), [(144, 168, 9, 7), (96, 328, 5, 6)])
def test_convolutions_of_eight_bits(emulated, poisoned, channels, columns, height, width):
    x, weight, scale, bias, residual = operands(channels, columns, height, width)
    exact_operands = (x, weight, scale.double(), bias.double())
    _, expected = conv3x3_float8_reference(*exact_operands, None, "gelu_tanh")
    zeros = torch.zeros_like(residual, dtype=torch.double)
    exact, _ = conv3x3_float8_reference(*exact_operands, zeros, "gelu_tanh")
    found = product_op.conv3x3_float8(x, weight, scale, bias, "gelu_tanh")
    assert difference(found.double(), exact) <= 1.1 * difference(expected.double(), exact)
    total, expected = conv3x3_float8_reference(*exact_operands, residual.double(), "none")
    found, rounded = product_op.conv3x3_float8_add(x, weight, scale, bias, residual, "none")
    assert difference(found.double(), total) < 1e-3
    assert difference(rounded.double(), total) <= 1.1 * difference(expected.double(), total)


def test_a_linear_layer_of_eight_bits(emulated, poisoned):
    x, weight, scale, _, bias = rows_and_weight(300, 160, 144)
    exact = activate(x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double(), "gelu_tanh")
    allowed = 1.1 * difference(to_float8(exact.float(), backend="reference").double(), exact)
    assert difference(product_op.linear_float8(x, weight, scale, bias, "gelu_tanh").double(), exact) <= allowed


@pytest.mark.parametrize(
    ("dtype", "windows", "length", "heads", "width"),
    [(BF16, 5, 196, 2, 40), (F16, 9, 65, 1, 24), (BF16, 4, 208, 1, 64), (F16, 1, 130, 2, 56)],
)
def test_attention(emulated, poisoned, dtype, windows, length, heads, width):
    qkv = random(windows, length, 3 * heads * width, dtype=dtype, scale=2.0)
    truth = window_attention(qkv.double(), num_heads=heads, backend="sdpa")
    usual = window_attention(qkv, num_heads=heads, backend="sdpa")
    check(attention_op.attention(qkv, heads, width**-0.5), usual, truth)


def product():
    """Of several tiles, each with more stages than there are at once."""
    x = channels_last(random(2, 208, 19, 21, dtype=F16))
    weight = random(80, 208, 3, 3, dtype=F16, scale=0.02)
    return product_op.conv3x3(x, weight, None, None, 1, "none"), F.conv2d(x.double(), weight.double(), padding=1)


def attention():
    """Of more heads than are there at once."""
    qkv = random(15, 65, 72, dtype=F16)
    return attention_op.attention(qkv, 1, 0.2), window_attention(qkv.double(), num_heads=1, scale=0.2, backend="sdpa")


WRONG = "the result is another"


def outcome(run, late, seed, monkeypatch, folder):
    """Nothing, or what went wrong."""
    emulate(monkeypatch, folder, seed=seed, late=late, processors=2)
    try:
        found, truth = run()
    except Fault as fault:
        return str(fault)
    return "" if difference(found.double(), truth) < 1e-3 else WRONG


@pytest.mark.parametrize("late", [False, True], ids=["at once", "as late as can be"])
@pytest.mark.parametrize("run", [product, attention])
def test_many_orders_of_what_happens(run, late, monkeypatch, folder):
    assert {outcome(run, late, seed, monkeypatch, folder) for seed in range(6)} == {""}


@pytest.mark.parametrize(
    ("run", "right", "wrong", "late", "what"),
    [
        (product, "barrier_wait(full + 8 * stage, phase);", "", False, "more arrive"),
        (product, "await_products<1>();", "", True, WRONG),
        (product, "give_turn(1 - team);", "", False, "all threads wait"),
        (product, "barrier_wait(empty + 8 * stage, phase ^ 1);", "", True, "more arrive"),
        (product, "if (turn == rank)", "", False, "all threads wait"),
        (product, "barrier_arrive(empty + 8 * read, lane)", "barrier_arrive(empty, 2)", False, "that is not there"),
        (attention, "barrier_wait(full + 8 * then, next / TILES / STAGES & 1);", "", False, WRONG),
        (attention, "4 * TILES - 1", "4 * TILES - 2", True, WRONG),
        (attention, "if (key + 8 > LENGTH && key + 2 * q + i % 2 >= LENGTH) scores[i] = NEVER;", "", False, WRONG),
        (attention, "  __syncthreads();\n", "", False, "used before it is made"),
        (attention, "  start_products();\n", "", False, "without a fence"),
        (attention, "(shared_address(memory) + 1023) & ~1023u", "shared_address(memory)", False, "where none may"),
    ],
)
def test_what_is_wrong_shows(run, right, wrong, late, what, monkeypatch, folder):
    source = build.source

    def changed(*arguments):
        text = source(*arguments)
        if right not in text:
            raise ValueError(f"the kernel has no {right}")
        return text.replace(right, wrong)

    monkeypatch.setattr(build, "source", changed)
    assert any(what in outcome(run, late, seed, monkeypatch, folder) for seed in range(12))


def test_an_instruction_for_which_nothing_stands_is_an_error():
    assert called('asm volatile("" : "+f"(x)::"memory");') == "ptx_nothing();"
    assert called('asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(f(a, b)));') == "ptx_exp2(y, f(a, b));"
    with pytest.raises(LookupError, match="fma.rn.f32"):
        called('asm("fma.rn.f32 %0, %1, %1, %1;" : "=f"(y) : "f"(x));')
