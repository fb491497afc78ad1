"""The residual sum with its layer norm: kernels against float64, on a GPU or interpreted, and blocks with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision.layers import token_block
from mambavision.layers.token_block import TokenBlock
from mambavision.ops.add_layer_norm import BACKENDS, add_layer_norm
from mambavision.ops.backend import Situation
from op_checks import DEVICE, HALVES, check, gradients, random, require_triton

require_triton()

from mambavision.ops.add_layer_norm import triton_op  # noqa: E402  (Triton is not everywhere)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-5


def own(x, weight, bias):
    return triton_op.affine_layer_norm(x, weight, bias, EPS, x.dtype)[0]


def plain(x, weight, bias):
    return add_layer_norm(x, None, weight, bias, eps=EPS, backend="reference")[1]


def inputs(shape, dtype, scale=2.0):
    """x, and weight and bias in float32, as autocast leaves them to the op."""
    return [random(*shape, dtype=dtype, scale=scale) + 0.5, random(shape[-1]), random(shape[-1])]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 10, 40), (130, 33), (7, 640)], ids=str)
def test_values_and_gradients(dtype, shape, poisoned):
    check(own, plain, inputs(shape, dtype), random(*shape, dtype=dtype))


def test_the_gradient_of_a_wider_branch_keeps_its_digits(poisoned):
    """Where it is that of the narrower stream, too."""
    x, weight, bias = inputs((3, 10, 40), HALVES[-1])
    branch, grad_y = random(3, 10, 40), random(3, 10, 40)

    def sum_by(function):
        return lambda branch: function(branch)[0].float() + function(branch)[1].float()

    def kernel(branch):
        return triton_op.add_layer_norm(x, branch, None, None, None, weight, bias, EPS, torch.float32)[:2]

    def reference(branch):
        return add_layer_norm(
            x.to(branch.dtype), branch, weight, bias, eps=EPS, dtype=branch.dtype, backend="reference"
        )

    _, found = gradients(sum_by(kernel), [branch], grad_y)
    _, expected = gradients(sum_by(reference), [branch], grad_y, torch.float64)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("channels", [24, 1100])
def test_views_of_wider_maps(channels, poisoned):
    wide, weight, bias = inputs((2, 9, 2 * channels), HALVES[-1])
    grad_y = random(channels, 2, 9, dtype=HALVES[-1]).movedim(0, -1)

    def by(function):
        return lambda wide, *affine: function(wide[..., channels:], *affine)

    check(by(own), by(plain), [wide, weight[:channels], bias[channels:]], grad_y)


@pytest.mark.parametrize(("rows", "channels"), [(1000, 40), (15, 640), (9, 2048)])
def test_a_program_walks_over_many_rows(rows, channels, poisoned, monkeypatch):
    monkeypatch.setattr(triton_op, "PROGRAMS", 2)
    check(own, plain, inputs((rows, channels), torch.float32), random(rows, channels))


def test_the_parts_of_many_programs_are_summed(poisoned, monkeypatch):
    monkeypatch.setattr("mambavision.ops.column_sums.BLOCK_M", 4)
    monkeypatch.setattr(triton_op, "BACKWARD_BYTES", {4: 256})
    check(own, plain, inputs((19, 40), torch.float32), random(19, 40))


def test_a_mean_far_from_zero_costs_no_more_than_in_pytorch(poisoned):
    x, weight, bias = inputs((60, 320), torch.float32)
    check(own, plain, [x + 1000, weight, bias], random(60, 320))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_of_the_type_of_x(dtype, poisoned):
    tensors = [tensor.to(dtype) for tensor in inputs((5, 40), dtype)]
    check(own, plain, tensors, random(5, 40, dtype=dtype))


def test_an_empty_batch_has_empty_results():
    y, grad_x, *others = gradients(own, inputs((0, 5, 8), torch.float16), random(0, 5, 8, dtype=torch.float16))
    assert y.shape == grad_x.shape == (0, 5, 8)
    for grad in others:
        assert grad.shape == (8,)
        assert not grad.any()


def test_the_reference_is_what_pytorch_computes():
    tensors = [tensor.double().requires_grad_() for tensor in inputs((3, 4, 6), torch.float64)]
    expected = F.layer_norm(tensors[0], (6,), *tensors[1:], EPS)
    torch.testing.assert_close(plain(*tensors), expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(plain, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_result_has_the_type_of_x(dtype):
    x, weight, bias = inputs((3, 4, 6), dtype)
    expected = F.layer_norm(x.double(), (6,), weight.double(), bias.double(), EPS)
    for autocast in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            total, y = add_layer_norm(x, None, weight, bias, eps=EPS)
        assert total is x
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype))


def test_the_kernels_run_only_where_there_will_be_a_backward():
    refusal = BACKENDS[0].refusal
    assert "for training" in refusal(Situation("cuda", torch.float16))
    assert "cannot compile for cpu" in refusal(Situation("cpu", torch.float16, differentiated=True))
    assert "too wide" in refusal(Situation("cuda", torch.float64, differentiated=True))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert refusal(Situation("cuda", dtype, differentiated=True)) is None


def test_a_request_that_cannot_be_met_gives_the_reason():
    with pytest.raises(RuntimeError, match=r"triton.*add_layer_norm cannot run here: its kernels are for training"):
        add_layer_norm(torch.ones(2, 4), None, torch.ones(4), torch.ones(4), eps=EPS, backend="triton")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight", 3), ("bias", (1, 4)), ("shift", 1), ("gamma", 5), ("scale", 3), ("branch", (2, 1, 4))],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    x = torch.ones(2, 3, 4)
    tensors = {"branch": x, "weight": torch.ones(4), "bias": torch.ones(4), name: torch.ones(shape)}
    with pytest.raises(ValueError, match=f"{name} must be "):
        add_layer_norm(x, **tensors, eps=EPS)


# --- with a sum before it ---------------------------------------------------------------------------------------------


def both(function, scale):
    """Of the sum and the norm, as one tensor."""

    def of(x, branch, weight, bias, shift=None, gamma=None):
        factor = None if scale is None else scale.to(branch.dtype)
        total, y = function(x, branch, shift, gamma, factor, weight, bias)
        return torch.stack([total, y.to(total.dtype)])

    return of


def summed(x, branch, shift, gamma, scale, weight, bias):
    return triton_op.add_layer_norm(x, branch, shift, gamma, scale, weight, bias, EPS, x.dtype)[:2]


def summed_plainly(x, branch, shift, gamma, scale, weight, bias):
    ends = {"shift": shift, "gamma": gamma, "scale": scale}
    return add_layer_norm(x, branch, weight, bias, **ends, eps=EPS, backend="reference")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 10, 40), (5, 26, 33)], ids=str)
def test_sums(dtype, with_scale, with_shift, shape, poisoned):
    x, weight, bias = inputs(shape, dtype)
    scale = torch.arange(shape[0], device=DEVICE).remainder(3) / 2 if with_scale else None  # with zeros
    tensors = [x, random(*shape, dtype=dtype), weight, bias, random(shape[-1]) if with_shift else None]
    check(both(summed, scale), both(summed_plainly, scale), tensors, random(2, *shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
def test_sums_with_layer_scale_are_as_wide_as_it(dtype, with_scale, with_shift, poisoned, monkeypatch):
    monkeypatch.setattr(triton_op, "PROGRAMS", 2)
    shape = (4, 50, 40)
    x, weight, bias = inputs(shape, torch.float32)
    scale = torch.tensor([0.0, 1.25, 1.25, 0.0], device=DEVICE) if with_scale else None
    shift = random(40) if with_shift else None
    tensors = [x, random(*shape, dtype=dtype), weight, bias, shift, random(40)]
    check(both(summed, scale), both(summed_plainly, scale), tensors, random(2, *shape))


def test_the_first_sum_with_layer_scale_widens_the_stream():
    x, weight, bias = inputs((2, 5, 8), torch.float16)
    tensors = [x, random(2, 5, 8, dtype=torch.float16), weight, bias, None, random(8)]
    check(both(summed, None), both(summed_plainly, None), tensors, random(2, 2, 5, 8))


# --- in a block -------------------------------------------------------------------------------------------------------


def block_of(channels, device=DEVICE, **settings):
    block = TokenBlock(channels, nn.Linear(channels, channels), **settings).to(device)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def looked_at(block):
    """A copy that calls its norms as modules, since somebody looks on."""
    other = copy.deepcopy(block)
    for norm in (other.norm1, other.norm2):
        norm.register_forward_hook(lambda *_: None)
    return other


@pytest.fixture
def calls(monkeypatch):
    """What the op gets, which runs by its kernels, as under a compiler on a GPU."""
    seen = []

    def op(x, branch, weight, bias, *, shift=None, gamma=None, scale=None, eps, dtype):
        seen.append((branch is not None, shift is not None, weight, eps, dtype))
        return BACKENDS[0].function(x, branch, shift, gamma, scale, weight, bias, eps, dtype or x.dtype)

    monkeypatch.setattr(token_block, "add_layer_norm", op)
    monkeypatch.setattr(token_block, "is_fused", lambda _: True)
    return seen


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.4, "layer_scale": 0.5}], ids=["plain", "all"])
def test_blocks_train_as_their_modules_do(settings, calls):
    blocks = [block_of(24, **settings) for _ in range(2)]
    others = [looked_at(block) for block in blocks]
    x, grad_y = random(6, 9, 24), random(6, 9, 24)

    def seeded(function):
        def run(x):
            torch.manual_seed(5)
            return function(x)

        return run

    found = gradients(seeded(lambda x: token_block.run_blocks(blocks, x)), [x], grad_y)
    expected = gradients(seeded(lambda x: others[1](others[0](x))), [x], grad_y)
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    shifts = [False, False, True, False]  # the MLP's last bias is left to the op, and what mixes here is no attention
    assert [call[:4] for call in calls] == [
        (place > 0, shifts[place], norm.weight, norm.eps) for place, norm in enumerate(norms)
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for block, other in zip(blocks, others, strict=True):
        for (name, parameter), its in zip(block.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, its.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("settings", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_a_norm_without_scale_or_shift_is_called(settings, calls):
    norm, x = nn.LayerNorm(24, **settings).to(DEVICE), random(5, 24)
    torch.testing.assert_close(token_block._add_and_norm(x, None, norm), (x, norm(x)))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_under_autocast_the_result_has_its_type(dtype, calls, monkeypatch):
    norm = nn.LayerNorm(24).to(DEVICE)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": torch.float16}.get)
    x = random(5, 24, dtype=dtype)
    assert token_block._add_and_norm(x, None, norm)[1].dtype == calls[0][-1] == torch.float16


def test_under_autocast_float64_stays_as_pytorch_leaves_it(calls, monkeypatch):
    norm = nn.LayerNorm(24).to(DEVICE).double()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": torch.float16}.get)
    monkeypatch.setattr(token_block, "add_layer_norm", add_layer_norm)
    x = random(5, 24, dtype=torch.float64)
    torch.testing.assert_close(token_block._add_and_norm(x, None, norm), (x, norm(x)))


def test_on_a_cpu_a_block_calls_its_modules(monkeypatch):
    monkeypatch.setattr(token_block, "add_layer_norm", None)
    block_of(24, "cpu")(torch.randn(2, 9, 24)).sum().backward()


# --- what only a GPU shows --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(25088, 320), (6272, 640), (25088, 512), (3136, 1568)])
def test_sizes_of_the_networks(dtype, rows, channels, poisoned):
    check(own, plain, inputs((rows, channels), dtype), random(rows, channels, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("shape", [(128, 196, 320), (128, 49, 1024)], ids=str)
def test_sums_of_the_sizes_of_the_networks(dtype, layer_scale, shape, poisoned):
    x, weight, bias = inputs(shape, torch.float32 if layer_scale else dtype)
    scale = torch.rand(shape[0], device=DEVICE)
    tensors = [
        x,
        random(*shape, dtype=dtype),
        weight,
        bias,
        random(shape[-1]),
        random(shape[-1]) if layer_scale else None,
    ]
    check(both(summed, scale), both(summed_plainly, scale), tensors, random(2, *shape, dtype=x.dtype))


@pytest.mark.gpu
def test_the_operator_is_registered_as_torch_asks():
    tensors = [tensor.requires_grad_() for tensor in inputs((2, 49, 40), torch.bfloat16)]
    torch.library.opcheck(triton_op.affine_layer_norm, (*tensors, EPS, torch.bfloat16))


@pytest.mark.gpu
def test_the_operator_of_the_sum_is_registered_as_torch_asks():
    x, weight, bias = [tensor.requires_grad_() for tensor in inputs((2, 49, 40), torch.bfloat16)]
    branch, shift, gamma, scale = random(2, 49, 40, dtype=torch.bfloat16), random(40), random(40), random(2)
    some = (x, branch.requires_grad_(), shift.requires_grad_(), gamma.requires_grad_(), scale, weight, bias)
    torch.library.opcheck(triton_op.add_layer_norm, (*some, EPS, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_compiled_block_trains_as_its_modules_do(precision, layer_scale):
    block = block_of(64, layer_scale=layer_scale)
    other = looked_at(block)
    x, grad_y = (random(4, 49, 64, dtype=precision) for _ in range(2))
    results = []
    for function in (torch.compile(block, fullgraph=True), other):
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            results.append(gradients(function, [x], grad_y))
    torch.testing.assert_close(*results, rtol=2e-2, atol=5e-2)
    for (name, parameter), its in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, its.grad, rtol=2e-2, atol=2e-2 * its.grad.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_wide_stream_gives_a_result_of_the_type_asked_for(half, poisoned):
    tensors = [random(3, 10, 40, scale=2.0), random(40), random(40)]
    grad_y = random(3, 10, 40, dtype=half)
    found = gradients(lambda *t: triton_op.affine_layer_norm(*t, EPS, half)[0], tensors, grad_y)
    options = {"eps": EPS, "dtype": half, "backend": "reference"}
    expected = gradients(lambda x, *t: add_layer_norm(x, None, *t, **options)[1], tensors, grad_y)
    assert found[0].dtype == expected[0].dtype == half
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
