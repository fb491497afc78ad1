"""Attention by the kernel for Hopper GPUs: that it compiles anywhere, and on such a GPU its results."""

import ctypes
from functools import partial

import pytest
import torch

from hopper_checks import TYPES, check, on_hopper, require_bindings
from mambavision.inference.gpu import MANY_WINDOWS, KernelAttention
from mambavision.layers.attention import Attention
from mambavision.ops.window_attention import window_attention
from op_checks import random, require_triton

require_triton()

from mambavision.ops import launch  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.hopper import attention_op  # noqa: E402


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("length", "heads", "width"), [(196, 8, 40), (196, 16, 56), (65, 2, 8), (208, 1, 64)])
def test_the_source_compiles(length, heads, width, dtype, tmp_path, monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = build.source("attention", attention_op.attention_definitions(length, heads, width, dtype))
    assert build.compiled(text)[:4] == b"\x7fELF"


def test_a_window_is_read_head_by_head_with_zeros_behind_it(monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    asked = []

    def encode(_map, _kind, rank, address, sizes, steps, box, *_):
        asked.append((rank.value, address.value, list(sizes), list(steps), list(box)))
        return 0

    monkeypatch.setattr(build, "_library", lambda: type("Driver", (), {"cuTensorMapEncodeTiled": encode}))
    made = build.heads_map.__wrapped__(4096, (40, 24, 196, 7), 208, torch.bfloat16)
    assert isinstance(made, ctypes.Array)
    assert asked == [(4, 4096, [40, 24, 196, 7], [80, 24 * 80, 196 * 24 * 80], [64, 1, 208, 1])]


def test_only_what_it_was_made_for_is_served(monkeypatch):
    faults = []
    monkeypatch.setattr(attention_op, "fault", lambda _: faults.append(1))

    class Somewhere:
        """What a tensor on a GPU says of itself."""

        is_cuda, device = True, torch.device("cuda:0")

        def __init__(self, shape, dtype=torch.float16, requires_grad=False):
            self.shape, self.dtype, self.requires_grad = shape, dtype, requires_grad

    assert attention_op.serves(Somewhere((64, 196, 960)), 8)
    assert faults
    assert not attention_op.serves(torch.zeros(64, 196, 960), 8)
    for refused in (
        Somewhere((64, 196, 960), torch.float32),
        Somewhere((64, 196, 960), requires_grad=True),
        Somewhere((64, 64, 960)),
        Somewhere((64, 209, 960)),
        Somewhere((64, 196, 3 * 8 * 72)),
        Somewhere((64, 196, 3 * 8 * 44)),
        Somewhere((64, 196, 3 * 8 * 16)),
        Somewhere((2**28, 196, 960)),
    ):
        assert not attention_op.serves(refused, 8)
    monkeypatch.setattr(attention_op, "fault", lambda _: "another generation")
    assert not attention_op.serves(Somewhere((64, 196, 960)), 8)


@pytest.mark.parametrize(
    ("windows", "served", "ours"), [(MANY_WINDOWS, True, True), (MANY_WINDOWS, False, False), (3, True, False)]
)
def test_many_windows_go_where_they_are_served(windows, served, ours, monkeypatch):
    attention = Attention(24, num_heads=2).eval()  # heads of 12 channels, padded to 16
    kernels = KernelAttention(attention)
    asked = []
    monkeypatch.setattr(attention_op, "serves", lambda *_: served)
    monkeypatch.setattr(
        attention_op,
        "attention",
        lambda qkv, heads, scale: (asked.append((heads, scale)), window_attention(qkv, num_heads=heads, scale=scale))[
            1
        ],
    )
    x = torch.randn(windows, 70, 24)
    qkv = torch.nn.functional.linear(x, kernels.first.weight, kernels.first.bias)
    torch.testing.assert_close(kernels.last(kernels(qkv)), attention(x))
    assert asked == ([(2, 12**-0.5)] if ours else [])


def attend(qkv, heads, scale):
    return attention_op.attention(qkv, heads, scale)


def check_attention(qkv, heads, scale):
    usual = window_attention(qkv, num_heads=heads, scale=scale, backend="sdpa")
    truth = window_attention(qkv.double(), num_heads=heads, scale=scale, backend="sdpa")
    found = attend(qkv, heads, scale)
    assert found.is_contiguous()
    check(found, usual, truth)
    return found


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("windows", "length", "heads", "width"),
    [
        (1, 196, 1, 64),  # one head
        (3, 65, 2, 8),  # a query in a second tile
        (5, 128, 3, 24),
        (150, 144, 5, 40),  # three tiles: the teams alternate between heads
        (2, 207, 4, 40),
        (70, 208, 5, 48),  # more heads than the GPU has processors
        (301, 81, 1, 56),
    ],
)
def test_attention(windows, length, heads, width, dtype, poisoned):
    check_attention(random(windows, length, 3 * heads * width, dtype=dtype), heads, width**-0.5)


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(8, 40), (8, 48), (8, 64), (16, 56)])
def test_attention_at_the_sizes_of_the_networks(heads, width, dtype, poisoned):
    """Repeated, since a race would show now and then only."""
    qkv = random(128, 196, 3 * heads * width, dtype=dtype)
    found = check_attention(qkv, heads, 49**-0.5)
    for _ in range(4):
        assert torch.equal(attend(qkv, heads, 49**-0.5), found)


@on_hopper
def test_scores_far_from_zero_and_views(poisoned):
    qkv = random(4, 196, 3 * 2 * 40, dtype=torch.bfloat16)
    check_attention(30 * qkv, 2, 1.0)
    check_attention(qkv - 20, 2, 1.0)
    shifted = torch.cat([qkv.flatten()[:1], qkv.flatten()])[1:].view(qkv.shape)
    for view in (torch.cat([qkv, qkv], 2)[..., 7 : 7 + 3 * 2 * 40], shifted):
        assert torch.equal(attend(view, 2, 0.2), check_attention(view.clone(), 2, 0.2))
    assert attend(qkv[:0], 2, 1.0).shape == (0, 196, 80)


def test_scores_have_to_grow_with_the_products():
    with pytest.raises(ValueError, match="positive"):
        attend(torch.zeros(2, 70, 72), 1, 0.0)


@on_hopper
def test_a_query_that_is_no_number_is_alone_with_it(poisoned):
    qkv = random(2, 196, 3 * 2 * 40, dtype=torch.float16)
    expected = attend(qkv, 2, 0.2)
    qkv[0, 130, 5], qkv[1, 195, 45] = float("nan"), float("inf")  # of the first head, and of the second
    found = attend(qkv, 2, 0.2)
    assert found[0, 130, :40].isnan().all()
    assert found[1, 195, 40:].isnan().all()
    expected[0, 130, :40], expected[1, 195, 40:] = 0, 0
    assert torch.equal(found.nan_to_num(0), expected)


@on_hopper
def test_scores_stay_in_registers(poisoned):
    from cuda.bindings import driver

    from mambavision.ops.hopper import build

    with launch.precompiling():
        attend(random(2, 196, 3 * 2 * 56, dtype=torch.bfloat16), 2, 0.2)
        ((_, defined, device),) = launch._precompiling.asked
    function = build.kernel("attention", defined, attention_op.shared_bytes(defined), device.index)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
    assert build.checked(driver.cuFuncGetAttribute(attribute, function)) == 0


@on_hopper
def test_a_networks_attention_compiles_in_one_graph():
    kernels = KernelAttention(Attention(64, num_heads=2).eval()).bfloat16().cuda()
    qkv = random(MANY_WINDOWS, 196, 3 * 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert attention_op.serves(qkv, 2)
        assert torch.equal(torch.compile(kernels, fullgraph=True)(qkv), kernels(qkv))


@on_hopper
def test_a_window_sees_nothing_of_its_neighbours(poisoned):
    qkv = random(3, 196, 3 * 2 * 40, dtype=torch.float16)
    alone = attend(qkv[1:2].clone(), 2, 0.2)
    qkv[0], qkv[2] = float("nan"), float("inf")
    assert torch.equal(attend(qkv, 2, 0.2)[1], alone[0])
    assert attend(qkv, 2, 0.2)[0].isnan().all()


@on_hopper
def test_it_compiles_and_replays():
    qkv = random(32, 196, 3 * 8 * 40, dtype=torch.bfloat16)
    function = partial(attend, heads=8, scale=0.2)
    expected = function(qkv)
    assert torch.equal(torch.compile(function, fullgraph=True)(qkv), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = function(qkv)
    replayed.zero_()
    graph.replay()
    assert torch.equal(replayed, expected)
    torch.library.opcheck(attention_op.attention, (qkv, 8, 0.2))


@on_hopper
def test_it_is_compiled_beforehand(monkeypatch):
    from mambavision.ops.hopper import build

    qkv = random(32, 100, 3 * 2 * 32, dtype=torch.bfloat16)
    asked, started = [], []
    monkeypatch.setattr(build, "kernel", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(build, "start", lambda *_: started.append(1))
    with launch.precompiling():
        attend(qkv, 2, 0.2)
        attend(qkv, 2, 0.2)
    assert len(asked) == 1
    assert not started
