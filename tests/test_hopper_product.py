"""Products by the kernel for Hopper GPUs: how they are cut, where they go, and on such a GPU their results."""

import threading
from functools import partial

import pytest
import torch

from hopper_checks import TYPES, channels_last, check, on_hopper, require_bindings, wide
from mambavision.ops.activation import activate
from mambavision.ops.conv3x3 import aligned_rows, conv3x3, weight_of_rows
from mambavision.ops.conv3x3.float8 import conv3x3_float8, conv3x3_float8_reference
from mambavision.ops.float8 import to_float8
from mambavision.ops.linear import linear
from mambavision.ops.map_layout import padded_to_lines
from op_checks import DEVICE, gapped, random, require_triton
from test_float8 import operands, rows_and_weight
from test_optimize import difference

require_triton()

from mambavision.ops import launch  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.conv3x3 import triton_op as conv3x3_op  # noqa: E402
from mambavision.ops.hopper import product_op  # noqa: E402
from mambavision.ops.hopper.plan import ACTIVATIONS, definitions, last_line, linear_plan, plan  # noqa: E402
from mambavision.ops.linear import gpu_op as linear_gpu_op  # noqa: E402
from mambavision.ops.linear import triton_op as linear_op  # noqa: E402
from mambavision.ops.tiles import HOPPER, LIBRARY  # noqa: E402


@pytest.mark.parametrize(
    "columns", [80, 96, 104, 112, 128, 160, 192, 200, 208, 216, 256, 392, 400, 512, 784, 1568, 3136, 6272]
)
def test_a_plan_covers_all_columns_and_fits_the_gpu(columns):
    even = plan(columns)
    for cut in (even, linear_plan(25088, columns, 320, 78), linear_plan(25088, columns, 784, 132)):
        tiles = -(-columns // cut.n)
        assert cut.n % 8 == 0
        assert tiles * cut.n < (columns + 8 * tiles if cut == even else 1.25 * columns)
        assert cut.teams * cut.members == 2
        assert cut.parts * cut.n // 2 <= 208  # sums in a thread's 240 registers
        assert cut.stages >= 3
        assert cut.shared_bytes + 16 * cut.stages <= 227 * 1024  # two barriers a stage


def test_a_linear_layers_plan_leaves_few_processors_without_work():
    assert linear_plan(25088, 3136, 784, 132).n == 176  # 27 rounds of 176 columns; wider tiles need 26 of 192
    assert linear_plan(6272, 4096, 1024, 132).n == 160  # 10 rounds; of 176 columns as many
    assert linear_plan(6272, 1024, 1024, 132).n == 208  # 2 rounds, of narrower tiles 3
    assert linear_plan(6272, 1024, 1024, 132, bytes_each=1).n == 160  # not the widest tiles, in 8 bits
    assert linear_plan(25088, 1280, 320, 132).n == 160
    assert linear_plan(25088, 2048, 512, 132).n == 176  # few inner columns: not the widest tiles


def test_a_plan_is_not_cut_finer_than_it_has_to():
    assert [plan(columns).n for columns in (80, 104, 112, 160, 208, 216, 256, 400, 784)] == [
        80, 104, 112, 160, 208, 112, 256, 200, 200,
    ]  # fmt: skip
    assert plan(256).teams == 1
    assert plan(208).teams == 2
    assert [plan(columns).rows for columns in (80, 104, 112)] == [256, 256, 128]  # of few columns a tile has more rows


@pytest.mark.parametrize(
    ("channels", "bytes_each", "line"),
    [(8, 2, 32), (16, 2, 32), (24, 2, 64), (40, 2, 128), (64, 2, 128), (80, 2, 32), (160, 2, 64), (784, 2, 32),
     (224, 1, 128), (416, 1, 32), (128, 1, 128)],
)  # fmt: skip
def test_the_last_line_of_a_tap_is_as_short_as_can_be(channels, bytes_each, line):
    assert last_line(channels * bytes_each) == line


@pytest.mark.parametrize(
    ("columns", "channels", "size", "stride", "bias", "activation", "residual", "dtype"),
    [
        (208, 208, 3, 1, True, "gelu_tanh", False, torch.bfloat16),
        (256, 128, 3, 1, True, "none", True, torch.float16),
        (200, 48, 3, 2, False, "relu", False, torch.bfloat16),
        (80, 80, 3, 1, True, "none", True, torch.bfloat16),
        (104, 160, 3, 1, True, "gelu_tanh", False, torch.float16),
        (400, 400, 3, 1, True, "none", True, torch.float8_e4m3fn),
        (208, 208, 3, 1, True, "gelu_tanh", False, torch.float8_e4m3fn),
        (3136, 784, 1, 1, True, "gelu_tanh", False, torch.float16),
        (1280, 320, 1, 1, False, "gelu_tanh", False, torch.bfloat16),
        (3136, 784, 1, 1, True, "gelu_tanh", False, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_the_source_compiles(columns, channels, size, stride, bias, activation, residual, dtype, tmp_path, monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = build.source(
        "product",
        definitions(
            plan(columns) if size == 3 else linear_plan(25088, columns, channels, 132),
            columns,
            channels,
            dtype=dtype,
            out_dtype=torch.bfloat16 if dtype == torch.float8_e4m3fn and residual else dtype,
            stride=stride,
            size=size,
            bias=bias,
            residual=residual,
            activation=activation,
        ),
    )
    code = build.compiled(text)
    assert code[:4] == b"\x7fELF"
    assert [path.read_bytes() for path in tmp_path.rglob("kernel.cubin")] == [code]
    monkeypatch.setattr(build.nvrtc, "nvrtcCreateProgram", None)
    assert build.compiled(text) == code  # as it was kept
    with pytest.raises(TypeError):
        build.compiled(text + "\n")


def test_types_that_do_not_fit_are_refused():
    x, weight = torch.zeros(1, 16, 4, 4, dtype=torch.float16), torch.zeros(112, 16, 3, 3, dtype=torch.float16)
    for bias, residual in ((torch.zeros(112), None), (None, torch.zeros(1, 112, 4, 4))):
        with pytest.raises(TypeError, match="must be of the map's type"):
            product_op._fill(None, None, x, weight, None, bias, residual, 1, "none")
    map8, weight8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    ones, copy = torch.ones(112), torch.zeros(1, 112, 4, 4, dtype=torch.float8_e4m3fn)
    for operands8 in (
        (None, copy, map8, weight8, ones.half(), ones),
        (None, copy, map8, weight8, ones, ones.half()),
        (None, copy, map8, weight8, None, ones),
        (None, copy, map8, weight8, ones, None),
        (None, copy, map8, weight, ones, ones),
        (copy, None, map8, weight8, ones, ones),
        (x, copy, x, weight, None, None),
        (x, None, x, weight, ones, None),
        (x, None, x, weight.bfloat16(), None, None),
        (x.float(), None, x.float(), weight.float(), None, None),
    ):
        with pytest.raises(TypeError, match="must be of the map's type"):
            product_op._fill(*operands8, None, 1, "none")
    with pytest.raises(TypeError, match="must be of the map's type"):
        product_op._fill(ones, copy, map8, weight8, ones, ones, torch.zeros(1, 112, 4, 4), 1, "none")


@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (1, 16, 5, 1), (1, 16, 1, 6), (2, 16, 3, 4)])
def test_what_the_copy_unit_cannot_read_is_copied(shape):
    x = channels_last(torch.randn(shape).half())
    assert product_op._readable(x) is x
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(shape[0], *shape[2:], 16).permute(0, 3, 1, 2)
    expanded = torch.randn(1, 1, 1, 16).half().permute(0, 3, 1, 2).expand(shape)
    for other in (shifted.copy_(x), expanded):
        found = product_op._readable(other)
        assert torch.equal(found, other)
        assert found.stride(1) == 1
        assert found.data_ptr() % 16 == 0
        assert all(found.stride(dim) % 8 == 0 for dim in (0, 2, 3) if shape[dim] > 1)
        assert found is not other or max(shape[0], *shape[2:]) == 1
    rows = torch.zeros(112 * 9 * 64 + 1, dtype=x.dtype)[1:].view(112, 9 * 64)  # a weight with gaps, shifted
    found = product_op._readable(weight_of_rows(rows, 16))
    assert found.stride() == (144, 1, 48, 16)


def test_other_devices_are_not_served():
    x = torch.zeros(1, 128, 8, 8, dtype=torch.bfloat16)
    assert not product_op.serves(x, torch.zeros(128, 128, 3, 3, dtype=x.dtype), None, None, None, "none")


def test_a_measured_choice_holds_only_where_the_kernel_serves(monkeypatch):
    """Else a bias of another type, for which the kernel is no candidate, would be read by it."""
    asked = []
    monkeypatch.setattr(conv3x3_op, "is_large", lambda *_: True)
    monkeypatch.setattr(product_op, "serves", lambda x, _, __, bias, *___: bias.dtype == x.dtype)
    monkeypatch.setattr(conv3x3_op, "choose", lambda key, tiles, _: (asked.append((key, tiles[0])), tiles[-1])[1])
    x, weight = channels_last(random(1, 16, 5, 5, dtype=torch.float16)), random(16, 16, 3, 3, dtype=torch.float16)
    for dtype in (torch.float16, torch.float32):
        conv3x3_op.launch(x, weight, random(16, dtype=dtype), None, 1, "none")
    (one, first), (other, second) = asked
    assert one != other
    assert first == HOPPER != second


def test_a_measured_choice_of_a_linear_layer_holds_only_where_it_serves(monkeypatch):
    asked = []
    monkeypatch.setattr(linear_op, "is_large", lambda *_: True)
    monkeypatch.setattr(linear_op, "_on_gpu", lambda _: True)
    monkeypatch.setattr(product_op, "serves", lambda x, _, __, bias, *___: bias is None or bias.dtype == x.dtype)
    monkeypatch.setattr(linear_op, "choose", lambda key, tiles, _: (asked.append((key, tiles[:2])), tiles[-1])[1])
    x, weight = random(5, 16, dtype=torch.float16), random(16, 16, dtype=torch.float16, scale=0.2)
    for bias in (random(16, dtype=torch.float16), random(16), None):
        linear_op.linear(x, weight, bias, None, None, 0.0, "gelu_tanh")
    linear_op.linear(x, weight, None, None, None, 0.0, "none")
    linear_op.linear(x, weight, None, random(5, 16, dtype=torch.float16), None, 0.0, "none")
    linear_op.linear(x, weight, None, None, weight.float().sum(1), 1e-5, "none")
    keys, first = zip(*asked, strict=True)
    assert len(set(keys)) == 6
    assert first[0] == first[3] == [HOPPER, LIBRARY]
    assert first[2][0] == HOPPER
    assert all(LIBRARY not in tiles for tiles in first[1:3] + first[4:])
    assert HOPPER not in (first[1] + first[4] + first[5])


def test_eight_bits_go_where_they_are_served(monkeypatch):
    """The kernel's results as they come; those of the tiles where it does not serve."""
    served = []
    x, weight, scale, bias, residual = operands(16, 16, 5, 5)
    rounded, total = torch.zeros_like(x), torch.zeros_like(residual)
    monkeypatch.setattr(conv3x3_op, "is_large", lambda *_: True)
    monkeypatch.setattr(product_op, "serves", lambda *operands: served.append(operands[2]) or answer)
    monkeypatch.setattr(product_op, "conv3x3_float8", lambda *_: rounded)
    monkeypatch.setattr(product_op, "conv3x3_float8_add", lambda *_: (total, rounded))
    for answer in (True, False):
        alone = conv3x3_op._float8(x, weight, scale, bias, None, "none")
        both = conv3x3_op._float8(x, weight, scale, bias, residual, "none")
        assert (alone[1] is rounded) == (both[1] is rounded) == (both[0] is total) == answer
        assert alone[0] is None
    assert all(each is scale for each in served)


def test_linear_layers_of_eight_bits_go_where_they_are_served(monkeypatch):
    """Those with results of 8 bits and a bias; the others to the library."""
    operands = rows_and_weight(5, 32, 48)
    filled = partial(torch.full, (5, 48))
    monkeypatch.setattr(linear_gpu_op, "is_large", lambda *_: True)
    monkeypatch.setattr(product_op, "serves", lambda *_: answer)
    monkeypatch.setattr(product_op, "linear_float8", lambda *_: filled(1.0, dtype=torch.float8_e4m3fn))
    monkeypatch.setattr(linear_gpu_op, "_by_library", lambda *arguments: filled(2.0, dtype=arguments[-1]))
    for answer in (True, False):
        found = [
            linear_gpu_op.linear_float8(*operands[:4], bias, "gelu_tanh", dtype)[0, 0].item()
            for bias, dtype in (
                (operands[4], torch.float8_e4m3fn),
                (operands[4], torch.bfloat16),
                (None, torch.float8_e4m3fn),
            )
        ]
        assert found == [1 if answer else 2, 2, 2]


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("batch", "channels", "columns", "height", "width", "stride", "bias", "residual"),
    [
        (1, 8, 112, 1, 1, 1, True, True),  # a single pixel
        (2, 80, 160, 9, 7, 2, False, False),  # columns for 20 blocks, two chunks of channels
        (3, 208, 208, 15, 13, 1, True, True),  # a last chunk of 16 channels
        (2, 400, 392, 6, 31, 1, True, False),  # two tiles of columns, the last not full, an odd number of blocks
        (1, 24, 256, 40, 33, 1, True, True),  # one team
        (2, 80, 80, 19, 21, 1, True, True),  # four products a thread, a last chunk of 16 channels
        (3, 96, 104, 13, 18, 2, True, False),  # one of 32
        (4, 64, 208, 31, 29, 2, True, False),
        (300, 16, 120, 1, 1, 1, True, True),  # many pictures in a tile
        (1, 64, 136, 1, 50, 2, False, True),
        (1, 64, 136, 51, 1, 2, True, False),
    ],
)
def test_convolutions(dtype, activation, batch, channels, columns, height, width, stride, bias, residual, poisoned):
    x = channels_last(random(batch, channels, height, width, dtype=dtype))
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    bias = random(columns, dtype=dtype) if bias else None
    shape = (batch, columns, -(-height // stride), -(-width // stride))
    residual = random(*shape, dtype=dtype) if residual else None
    truth = conv3x3(*wide(x, weight, bias), residual=wide(residual)[0], stride=stride, activation=activation)
    usual = conv3x3(x, weight, bias, residual=residual, stride=stride, activation=activation, backend="reference")
    for laid_out in (weight, weight_of_rows(aligned_rows(weight, bytes_each=2), channels)):
        found = product_op.conv3x3(x, laid_out, bias, residual, stride, activation)
        assert found.is_contiguous(memory_format=torch.channels_last)
        check(found, usual, truth, gelu=activation.startswith("gelu"))


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "side", "stride", "residual"),
    [(208, 208, 56, 1, True), (400, 400, 28, 1, True), (64, 208, 112, 2, False), (400, 784, 28, 2, False),
     (160, 160, 28, 1, True), (256, 256, 28, 1, True), (80, 80, 56, 1, True), (96, 96, 56, 1, True)],
)  # fmt: skip
def test_convolutions_at_the_sizes_of_the_networks(dtype, channels, columns, side, stride, residual, poisoned):
    """Repeated, since a race would show now and then only; more tiles than the GPU has processors."""
    x = channels_last(random(24, channels, side, side, dtype=dtype))
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    bias = random(columns, dtype=dtype)
    arguments = {"residual": x if residual else None, "stride": stride, "activation": "gelu_tanh"}
    usual = conv3x3(x, weight, bias, backend="reference", **arguments)
    truth = conv3x3(*wide(x, weight, bias), **{**arguments, "residual": wide(arguments["residual"])[0]})
    assert conv3x3_op.is_large(usual.numel() // columns, columns)
    found = [product_op.conv3x3(x, weight, bias, arguments["residual"], stride, "gelu_tanh") for _ in range(5)]
    check(found[0], usual, truth, gelu=True)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(
        conv3x3_op.conv3x3(x, weight, bias, arguments["residual"], stride, "gelu_tanh"), found[0]
    )  # by rule


@on_hopper
def test_views_with_gaps_and_unaligned_ones(poisoned):
    dtype = torch.bfloat16
    wider = channels_last(random(2, 72, 8, 9, dtype=dtype))
    weight = random(120, 32, 3, 3, dtype=dtype, scale=0.06)
    bias, residual = random(120, dtype=dtype), random(2, 128, 8, 9, dtype=dtype)
    memory = random(120 * 9 * 32 + 1, dtype=dtype)[1:]
    shifted = memory.copy_(weight.permute(0, 2, 3, 1).reshape(-1)).view(120, 3, 3, 32).permute(0, 3, 1, 2)
    expanded = random(1, 32, 1, 1, dtype=dtype).expand(2, 32, 8, 9)
    for x in (
        expanded,
        wider[:, :32],
        wider[:, 1:33],
        wider[:, 40:],
        wider[:, :32].contiguous(),
        wider[:, :32].transpose(2, 3),
    ):
        more = residual[:, :120] if x.shape[3] == 9 else residual[:, :120].transpose(2, 3)
        truth = conv3x3(*wide(x, weight, bias), residual=more.double())
        usual = conv3x3(x, weight, bias, residual=more, backend="reference")
        for other in (weight, shifted):
            check(product_op.conv3x3(x, other, gapped(bias), more, 1, "none"), usual, truth)


@on_hopper
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("channels", "columns", "height", "width"),
    [(16, 112, 1, 1), (208, 208, 15, 13), (400, 400, 28, 28), (144, 168, 9, 7), (128, 256, 9, 9), (96, 328, 5, 6),
     (96, 96, 19, 21), (32, 80, 9, 9)],
)  # fmt: skip
def test_eight_bits(channels, columns, height, width, activation, poisoned):
    x, weight, scale, bias, residual = operands(channels, columns, height, width)
    wide = (x, weight, scale.double(), bias.double())
    _, expected = conv3x3_float8_reference(*wide, None, activation)
    exact = conv3x3_float8_reference(*wide, torch.zeros_like(residual, dtype=torch.double), activation)[0]
    found = product_op.conv3x3_float8(x, weight, gapped(scale), gapped(bias), activation)
    assert found.dtype == torch.float8_e4m3fn
    assert difference(found.double(), exact) <= 1.1 * difference(expected.double(), exact)
    for more in (residual, residual.bfloat16()):
        total, expected = conv3x3_float8_reference(*wide, more.double(), activation)
        found, rounded = product_op.conv3x3_float8_add(x, weight, scale, bias, more, activation)
        assert found.dtype == more.dtype
        assert difference(found.double(), total) < (1e-3 if more.dtype == torch.float16 else 3e-3)
        assert difference(rounded.double(), total) <= 1.1 * difference(expected.double(), total)
        both = conv3x3_float8(x, weight, scale, bias, residual=more, activation=activation)
        assert difference(both[0].double(), total) < 4e-3


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 8, 112), (300, 72, 136), (700, 88, 104)])
def test_linear_layers(rows, inner, columns, dtype, activation, poisoned):
    check_linear(rows, inner, columns, dtype, activation)


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "activation"),
    [(25088, 784, 3136, "gelu_tanh"), (6272, 1568, 6272, "gelu_tanh"), (6272, 640, 2560, "gelu_tanh"),
     (25088, 320, 1280, "gelu_tanh"), (25088, 320, 960, "none"), (25088, 784, 2688, "none"),
     (6272, 1568, 1568, "none")],
)  # fmt: skip
def test_linear_layers_at_the_sizes_of_the_networks(rows, inner, columns, activation, dtype, poisoned):
    """Repeated, since a race would show now and then only."""
    found = [check_linear(rows, inner, columns, dtype, activation) for _ in range(3)]
    assert linear_op.is_large(rows, columns)
    assert all(torch.equal(found[0], other) for other in found[1:])


@on_hopper
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 16, 112), (300, 784, 144), (25088, 784, 3136)])
def test_linear_layers_of_eight_bits(rows, inner, columns, activation, poisoned):
    x, weight, scale, _, bias = rows_and_weight(rows, inner, columns)
    exact = activate(x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double(), activation)
    allowed = 1.1 * difference(to_float8(exact.float(), backend="reference").double(), exact)
    found = [product_op.linear_float8(x, weight, scale, bias, activation) for _ in range(3)]
    assert found[0].dtype == torch.float8_e4m3fn
    assert difference(found[0].double(), exact) <= allowed
    assert all(torch.equal(found[0].view(torch.uint8), other.view(torch.uint8)) for other in found[1:])


def check_linear(rows, inner, columns, dtype, activation):
    torch.manual_seed(0)
    x, weight = random(rows, inner, dtype=dtype), random(columns, inner, dtype=dtype, scale=inner**-0.5)
    bias = random(columns, dtype=dtype)
    truth = linear(*wide(x, weight, bias), activation=activation)
    usual = linear(x, weight, bias, activation=activation, backend="reference")
    found = product_op.linear(x, weight, bias, activation)
    check(found, usual, truth, gelu=activation.startswith("gelu"))
    aligned = padded_to_lines(weight, bytes_each=2)[:, :inner]
    assert torch.equal(product_op.linear(x, aligned, bias, activation), found)
    plain = linear(x, weight, activation=activation, backend="reference")
    check(
        product_op.linear(x, weight, None, activation),
        plain,
        linear(*wide(x, weight), activation=activation),
        gelu=True,
    )
    if linear_op.is_large(rows, columns) and activation in ("none", "gelu_tanh"):
        assert torch.equal(linear_op.linear(x, weight, bias, None, None, 0.0, activation), found)  # by rule
    return found


@on_hopper
@pytest.mark.parametrize(
    ("channels", "columns", "side"), [(224, 224, 56), (416, 416, 28), (64, 208, 56), (16, 208, 56)]
)
def test_eight_bits_at_the_sizes_of_the_networks(channels, columns, side, poisoned):
    """More tiles than the GPU has processors, so that teams take turns; repeated for races."""
    x, weight, scale, bias, residual = operands(channels, columns, side, side, batch=24)
    exact = conv3x3_float8_reference(x, weight, scale.double(), bias.double(), residual.double(), "none")[0]
    assert conv3x3_op.is_large(residual.numel() // columns, columns)
    found = [product_op.conv3x3_float8_add(x, weight, scale, bias, residual, "none") for _ in range(5)]
    assert difference(found[0][0].double(), exact) < 1e-3
    _, rounded = conv3x3_float8_reference(x, weight, scale.double(), bias.double(), None, "gelu_tanh")
    exact = conv3x3_float8_reference(
        x, weight, scale.double(), bias.double(), torch.zeros_like(residual, dtype=torch.double), "gelu_tanh"
    )[0]
    alone = [product_op.conv3x3_float8(x, weight, scale, bias, "gelu_tanh") for _ in range(5)]
    assert difference(alone[0].double(), exact) <= 1.1 * difference(rounded.double(), exact)
    for other, one in zip(found, alone, strict=True):
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1].view(torch.uint8), found[0][1].view(torch.uint8))
        assert torch.equal(one.view(torch.uint8), alone[0].view(torch.uint8))
    served = product_op.serves(x, weight, scale, bias, residual, "none")
    assert served == (channels > 16)  # of pixels shorter than what is copied at once, most would be copied in vain
    if served:
        by_rule = conv3x3_float8(x, weight, scale, bias, residual=residual)
        assert torch.equal(by_rule[0], found[0][0])
        by_rule = conv3x3_float8(x, weight, scale, bias, activation="gelu_tanh")
        assert torch.equal(by_rule[1].view(torch.uint8), alone[0].view(torch.uint8))


@on_hopper
def test_rows_with_gaps_and_unaligned_ones(poisoned):
    rows, matrix = random(3, 50, 40, dtype=TYPES[0]), random(120, 24, dtype=TYPES[0])
    shifted = torch.cat([random(1, dtype=TYPES[0]), matrix.flatten()])[1:].view(120, 24)
    for x in (rows[..., :24], rows[..., 3:27], rows[..., 16:], rows.transpose(1, 2)[:, :, :24], gapped(rows[..., :24])):
        truth, usual = linear(*wide(x, matrix)), linear(x, matrix, backend="reference")
        for weight in (matrix, shifted, matrix.t().contiguous().t()):
            check(product_op.linear(x, weight, None, "none"), usual, truth)


@on_hopper
def test_sums_stay_in_registers():
    """What spills is a part of what a thread finishes a tile with; the sums alone have 208."""
    from cuda.bindings import driver

    from mambavision.ops.hopper import build

    x, weight = channels_last(random(1, 208, 5, 5, dtype=TYPES[0])), random(208, 208, 3, 3, dtype=TYPES[0])
    with launch.precompiling():
        product_op.conv3x3(x, weight, None, None, 1, "gelu_tanh")
        ((_, defined, _),) = launch._precompiling.asked
    arguments = "product", defined, plan(208).shared_bytes, x.device.index
    function = build.kernel(*arguments)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
    assert build.checked(driver.cuFuncGetAttribute(attribute, function)) <= 64


@on_hopper
def test_nan_and_infinity_come_through():
    x = torch.ones(1, 64, 30, 30, dtype=torch.bfloat16, device=DEVICE)
    x[0, :, 5, 5], x[0, 3, 20, 20] = float("nan"), float("inf")
    weight = torch.ones(112, 64, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    for activation in ACTIVATIONS:
        y = product_op.conv3x3(channels_last(x), weight, None, None, 1, activation)
        assert y[0, :, 4:7, 4:7].isnan().all()
        assert (y[0, :, 19:22, 19:22] == float("inf")).all()
        assert y.isfinite().sum() == 112 * (900 - 18)


@on_hopper
def test_it_is_an_operator_that_compiles_and_records():
    dtype = torch.bfloat16
    x, weight = channels_last(random(2, 16, 9, 8, dtype=dtype)), random(112, 16, 3, 3, dtype=dtype, scale=0.1)
    torch.library.opcheck(product_op.conv3x3, (x, weight, None, None, 2, "relu"))
    torch.library.opcheck(product_op.linear, (random(3, 5, 16, dtype=dtype), weight[:, :, 0, 0], None, "gelu_tanh"))
    numbers = operands(32, 112, 8, 8)
    checks = ("test_faketensor",)  # others multiply what they compare, which PyTorch does not in 8 bits
    torch.library.opcheck(product_op.conv3x3_float8, (*numbers[:4], "gelu_tanh"), test_utils=checks)
    torch.library.opcheck(product_op.conv3x3_float8_add, (*numbers, "none"), test_utils=checks)

    def function(x):
        return product_op.conv3x3(x, weight, None, None, 1, "gelu_tanh") * 2

    expected = function(x)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = function(x)
    x.zero_()
    graph.replay()
    assert recorded.count_nonzero() == 0


@on_hopper
def test_it_is_compiled_beforehand(monkeypatch):
    from mambavision.ops.hopper import build

    x, weight = channels_last(random(1, 24, 5, 5, dtype=TYPES[0])), random(176, 24, 3, 3, dtype=TYPES[0])
    asked, started = [], []
    monkeypatch.setattr(build, "kernel", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(build, "start", lambda *_: started.append(1))
    with launch.precompiling():
        product_op.conv3x3(x, weight, None, None, 1, "none")
        product_op.conv3x3(x, weight, None, None, 1, "none")
    assert len(asked) == 1
    assert not started


@on_hopper
def test_a_thread_that_never_used_the_gpu_compiles_and_launches():
    x, weight = channels_last(random(1, 32, 5, 5, dtype=TYPES[0])), random(184, 32, 3, 3, dtype=TYPES[0])
    results = []
    thread = threading.Thread(target=lambda: results.append(product_op.conv3x3(x, weight, None, None, 1, "none")))
    thread.start()
    thread.join()
    assert torch.equal(results[0], product_op.conv3x3(x, weight, None, None, 1, "none"))
