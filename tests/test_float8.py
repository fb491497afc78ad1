"""8-bit numbers: rounding, the convolution against float64, and the network that uses them."""

import copy
import pickle
import re
from importlib import import_module

import numpy as np
import pytest
import torch

from mambavision import create_model
from mambavision.inference import gpu, optimize
from mambavision.inference.fuse import fuse
from mambavision.inference.optimization import finished
from mambavision.ops.activation import activate
from mambavision.ops.backend import Situation
from mambavision.ops.conv3x3.float8 import conv3x3_float8, conv3x3_float8_reference
from mambavision.ops.float8 import scaled_to_float8, to_float8
from mambavision.ops.layer_norm import layer_norm, layer_norm_and_sum, layer_norm_of_sum_
from mambavision.ops.linear.float8 import linear_float8
from mambavision.ops.precision import FLOAT8
from mambavision.ops.tiles import that_fit
from op_checks import gapped, require_triton
from test_optimize import difference, photographs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
LAST = torch.channels_last


def triton_op(name):
    require_triton()
    return import_module(f"mambavision.ops.{name}.triton_op")


def mended(found, expected):
    """`found` in float64; what Triton's interpreter gets wrong is put right.

    It forgets to carry: of a number that rounds up to a power of two it makes half of that.
    """
    found, expected = found.double(), expected.double()
    if DEVICE == "cuda":
        return found
    halved = (2 * found == expected) & (expected.abs().log2().frac() == 0)
    return torch.where(halved, expected, found)


def nearest(values):
    """The closest of all numbers that the type has, by search; ties to an even mantissa."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = np.flatnonzero(numbers.isfinite().numpy())
    distances = (values.double()[:, None] - numbers[codes]).abs() + 1e-12 * torch.from_numpy(codes % 2)
    return numbers[codes][distances.argmin(1)]


def test_rounding_takes_the_nearest_number_and_cuts_what_is_too_large():
    values = torch.cat(
        [torch.randn(500) * 10.0 ** torch.randint(-3, 3, (500,)), torch.tensor([448.0, 460.0, 1e9, -1e9, 0.0])]
    )
    expected = nearest(values)
    assert torch.equal(to_float8(values, backend="reference").double(), expected)
    found = triton_op("float8").to_float8(values.to(DEVICE)).cpu()
    exact = (expected == values) | (DEVICE == "cuda")  # what needs no rounding: the interpreter's is not a GPU's
    assert exact.sum() > 1
    assert torch.equal(found.double()[exact], expected[exact])
    if DEVICE == "cuda":  # of NaN the interpreter makes a number
        assert triton_op("float8").to_float8(torch.full((3,), float("nan"), device=DEVICE)).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_rounds_maps_of_any_layout(dtype):
    x = (100 * torch.randn(2, 5, 6, 7)).to(dtype).to(DEVICE)
    x[0, 0, 0, 0] = 1e4
    for view in (x, x.contiguous(memory_format=LAST), x[:, 1:], x[..., ::2], x.permute(0, 3, 2, 1), x[:0]):
        found, expected = triton_op("float8").to_float8(view), to_float8(view, backend="reference")
        assert found.shape == expected.shape
        assert found.stride() == torch.empty_like(view).stride()
        found, expected = mended(found, expected), expected.double()
        if DEVICE == "cuda":
            assert torch.equal(found, expected)
        else:  # which cuts the smallest numbers and ties
            torch.testing.assert_close(found, expected, rtol=1 / 8, atol=2**-9)


def test_a_weight_is_its_rounded_numbers_times_a_scale():
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-4, 2, 6)[:, None, None, None]
    weight[2] = 0
    numbers, scale = scaled_to_float8(weight)
    found = numbers.double() * scale.double()[:, None, None, None]
    assert torch.equal(found[2], torch.zeros(4, 3, 3, dtype=torch.double))
    for output in (0, 1, 3, 4, 5):  # however small or large
        assert difference(found[output], weight[output]) < 2**-4
        assert numbers[output].float().abs().max() == 448


def operands(channels, columns, height, width, batch=2):
    x = to_float8(torch.randn(batch, channels, height, width)).to(DEVICE).contiguous(memory_format=LAST)
    weight, scale = scaled_to_float8(torch.randn(columns, channels, 3, 3) * (9 * channels) ** -0.5)
    residual = torch.randn(batch, columns, height, width).half().to(DEVICE)
    return x, weight.to(DEVICE), scale.to(DEVICE), torch.randn(columns).to(DEVICE), residual


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize(("channels", "columns", "height", "width"), [(16, 48, 9, 7), (32, 80, 1, 5), (48, 16, 4, 4)])
def test_the_kernel_against_float64(channels, columns, height, width, activation, poisoned):
    x, weight, scale, bias, residual = operands(channels, columns, height, width)
    op = triton_op("conv3x3")
    wide = (x, weight, scale.double(), bias.double())
    _, expected = conv3x3_float8_reference(*wide, None, activation)
    found = op.conv3x3_float8(x, weight, *map(gapped, (scale, bias)), activation)
    exact = conv3x3_float8_reference(*wide, torch.zeros_like(residual, dtype=torch.double), activation)[0]
    assert found.dtype == expected.dtype == torch.float8_e4m3fn
    assert difference(mended(found, expected), exact) <= 1.1 * difference(expected, exact)
    total, expected = conv3x3_float8_reference(*wide, residual.double(), activation)
    found = op.conv3x3_float8_add(x, weight, scale, bias, residual, activation)
    assert found[0].dtype == residual.dtype
    assert difference(found[0], total) < 1e-3  # the sum's type, and on a GPU the matrix unit's short sums
    assert difference(mended(found[1], expected), total) <= 1.1 * difference(expected, total)


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)])
def test_the_kernel_takes_nothing(shape):
    x = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    weight, scale = scaled_to_float8(torch.randn(16, 16, 3, 3, device=DEVICE))
    assert triton_op("conv3x3").conv3x3_float8(x, weight, scale, scale, "none").shape == shape


@pytest.mark.parametrize("channels", [16, 700])
def test_norms_are_given_in_8_bits(channels, poisoned):
    op = triton_op("layer_norm")
    x, share = (torch.randn(5, channels).half().to(DEVICE) for _ in range(2))
    constant = torch.randn(channels).half().to(DEVICE)
    kind = torch.float8_e4m3fn
    pairs = [
        (op.layer_norm(x, constant.float(), 1e-5, kind), layer_norm(x, constant.float(), eps=1e-5, dtype=kind)),
        (op.layer_norm_and_sum(x, constant, 1e-5, kind)[0], layer_norm_and_sum(x, constant, eps=1e-5, dtype=kind)[0]),
        (
            op.layer_norm_of_sum_(x.clone(), share, None, 1e-5, kind),
            layer_norm_of_sum_(x.clone(), share, eps=1e-5, dtype=kind),
        ),
    ]
    for found, expected in pairs:
        assert found.dtype == expected.dtype == kind
        # A number beside a tie may be rounded to either side; the interpreter cuts ties and small numbers.
        torch.testing.assert_close(mended(found, expected.double()), expected.double(), rtol=1 / 7, atol=2**-9)


def rows_and_weight(rows, inner, columns):
    x = to_float8(torch.randn(rows, inner)).to(DEVICE)
    weight, scale = scaled_to_float8(torch.randn(columns, inner) * inner**-0.5, together=True)
    one = torch.ones(1, device=DEVICE)
    return x, weight.to(DEVICE), scale.to(DEVICE).contiguous(), one, torch.randn(columns, device=DEVICE)


def test_one_scale_for_a_whole_weight():
    weight = torch.randn(6, 32) * torch.logspace(-3, 0, 6)[:, None]
    numbers, scale = scaled_to_float8(weight, together=True)
    assert len(set(scale.tolist())) == 1
    assert numbers.float().abs().max() == 448
    for row, expected in zip(numbers.double() * scale[0].double(), weight, strict=True):  # also a thousandth
        assert difference(row, expected) < 2**-4


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_the_linear_layer_reads_as_its_parts(activation):
    x, weight, scale, one, bias = rows_and_weight(5, 32, 48)
    expected = activate(x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double(), activation)
    for kind, allowed in ((torch.bfloat16, 5e-3), (torch.float8_e4m3fn, 4e-2)):
        found = linear_float8(x, weight, scale, one, bias, activation=activation, dtype=kind, backend="reference")
        assert found.dtype == kind
        assert difference(found, expected) < allowed


def test_what_the_linear_layer_does_not_take_is_named():
    x, weight, scale, one, bias = rows_and_weight(5, 32, 48)
    with pytest.raises(TypeError, match=r"must be float8_e4m3fn, got torch.float32"):
        linear_float8(x.float(), weight, scale, one, dtype=torch.float16)
    with pytest.raises(ValueError, match="scale must be"):
        linear_float8(x, weight, scale[:1], one, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"multiples of 16 rows and columns, got \(40, 32\)"):
        linear_float8(x, weight[:40], scale[:40], one, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"bfloat16 or float16, got torch.float32"):
        linear_float8(x, weight, scale, one, dtype=torch.float32)


def test_other_types_and_shapes_are_refused():
    x, weight, scale, bias, _ = operands(16, 16, 4, 4)
    with pytest.raises(TypeError, match=r"must be float8_e4m3fn, got torch.float32"):
        conv3x3_float8(x.float(), weight, scale, bias)
    with pytest.raises(ValueError, match="to fit the map"):
        conv3x3_float8(x, weight[:, :8], scale, bias)


def of_float8(model):
    """What `optimize` makes on a GPU, without graphs, on any device."""
    fused = fuse(model)
    gpu.use_kernels(fused, float8=True)
    return finished(fused, dtype=torch.bfloat16, tune=False)


@pytest.mark.parametrize("arguments", [{}, {"dim": 12, "num_heads": (1, 1, 4, 8)}, {"features_only": True}])
def test_the_network_stays_close_to_float32(arguments):
    from test_fuse import outputs, trained

    model = trained(**arguments).eval()
    images = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        for actual, expected in zip(outputs(of_float8(model), images), outputs(model, images), strict=True):
            assert actual.shape == expected.shape
            assert difference(actual, expected) < 6e-2


@pytest.mark.parametrize("rows", [gpu.FLOAT8_ROWS, 1])
def test_the_packaged_model_sees_the_same_in_photographs(rows, monkeypatch):
    monkeypatch.setattr(gpu, "FLOAT8_ROWS", rows)
    model = create_model("mamba_vision_nano_32", pretrained=True).eval()
    images = photographs(model)
    with torch.no_grad():
        found, expected = of_float8(model)(images), model(images)
    assert 3e-2 < difference(found, expected) < 8e-2  # more than 16 bits take, and no harm was done
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_many_tokens_are_multiplied_in_8_bits(monkeypatch):
    model = create_model("mamba_vision_nano_32", pretrained=True).eval()
    images, found = torch.randn(2, 3, 32, 32), {}
    network = of_float8(model)
    assert all(level.blocks[0].float8 for level in network.levels[2:])
    with torch.no_grad():
        expected = model(images)
        for rows in (10**9, 1):
            monkeypatch.setattr(gpu, "FLOAT8_ROWS", rows)
            found[rows] = network(images)
        assert not torch.equal(found[10**9], found[1])
        assert max(difference(each, expected) for each in found.values()) < 0.15  # noise, which no class explains
        for block in network.levels[3].blocks[0].blocks:  # its numbers are those that count
            block.products.fc2.scale.zero_()
        assert not torch.equal(network(images), found[1])


def test_numbers_of_8_bits_stay_what_they_are_when_the_rest_is_cast():
    network = of_float8(create_model("mamba_vision_test_tiny"))
    kept = re.compile("convs|products.*(rounded|scale|one|fc1.bias)")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items() if kept.search(key)}
    assert len(before) == 3 * 2 * sum(network.config.depths[:2]) + 10 * sum(network.config.depths[2:])
    after = network.half().state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("rows", [gpu.FLOAT8_ROWS, 1])
def test_copies_compute_the_same(rows, monkeypatch):
    monkeypatch.setattr(gpu, "FLOAT8_ROWS", rows)
    network = of_float8(create_model("mamba_vision_test_tiny").eval())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(twin(images), network(images))


def test_a_gradient_is_not_lost_in_silence():
    network = of_float8(create_model("mamba_vision_test_tiny").eval())
    with pytest.raises(RuntimeError, match="float8 has no gradients"):
        network(torch.randn(1, 3, 64, 64, requires_grad=True))


def test_norms_are_left_to_pytorch_where_a_gpu_has_no_8_bits(monkeypatch):
    from mambavision.ops.layer_norm import BACKENDS, IN_PLACE_BACKENDS, SUM_BACKENDS

    monkeypatch.setattr("mambavision.ops.backend.triton_fault", lambda: None)
    monkeypatch.setattr("mambavision.ops.float8.triton_fault", lambda: None)
    for rows in (BACKENDS, SUM_BACKENDS, IN_PLACE_BACKENDS):
        for capability, result, runs in (((8, 6), None, True), ((8, 6), FLOAT8, False), ((9, 0), FLOAT8, True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            situation = Situation("cuda", torch.bfloat16, result=result)
            assert (rows[0].refusal(situation) is None) == runs


def test_where_it_cannot_run_one_sentence_says_so():
    with pytest.raises(ValueError, match=r"cannot compute in float8 here: cpu is no CUDA GPU. Choose another type"):
        optimize(create_model("mamba_vision_test_tiny"), dtype=torch.float8_e4m3fn)


# --- what only a GPU shows --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "batch", "bound"), [("mamba_vision_L", 32, 3e-2), ("mamba_vision_T", 1, 6e-2)])
def test_logits_stay_close_on_a_gpu(name, batch, bound):
    from deterministic_weights import deterministic_images

    model = create_model(name, device="cuda").eval()
    network = optimize(model, dtype=torch.float8_e4m3fn)
    images = deterministic_images(batch, *model.config.preprocessing.img_size).cuda()
    with torch.no_grad():
        assert 6e-3 < difference(network(images), model(images)) < bound  # above what bfloat16 alone would give


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side"), [(224, 56), (416, 28), (96, 56)])
def test_the_tiles_of_the_networks(channels, side):
    x = to_float8(torch.randn(16, channels, side, side, device="cuda")).contiguous(memory_format=LAST)
    weight, scale = scaled_to_float8(torch.randn(channels, channels, 3, 3, device="cuda") * (9 * channels) ** -0.5)
    bias, residual = (
        torch.randn(channels, device="cuda"),
        torch.randn(16, channels, side, side, device="cuda").bfloat16(),
    )
    expected, _ = conv3x3_float8_reference(x, weight, scale, bias, residual, "none")
    op = triton_op("conv3x3")
    for tile in that_fit(op.float8_candidates(16 * side**2, channels), 1, x.device):
        found, rounded = torch.empty_like(residual, memory_format=LAST), torch.empty_like(x)
        op.launch_float8(x, weight, scale, bias, residual, found, rounded, "none", tile)
        assert difference(found, expected) < 3e-3
        assert difference(rounded, expected) < 4e-2


@pytest.mark.gpu
def test_the_operators_are_known_to_pytorch():
    x, weight, scale, bias, residual = operands(32, 48, 8, 8)
    op = triton_op("conv3x3")
    checks = ("test_faketensor",)  # others multiply what they compare, which PyTorch does not in 8 bits
    torch.library.opcheck(triton_op("float8").to_float8, (residual,), test_utils=checks)
    torch.library.opcheck(op.conv3x3_float8, (x, weight, scale, bias, "gelu_tanh"), test_utils=checks)
    torch.library.opcheck(op.conv3x3_float8_add, (x, weight, scale, bias, residual, "none"), test_utils=checks)
    linear_op = import_module("mambavision.ops.linear.gpu_op").linear_float8
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        torch.library.opcheck(linear_op, (*rows_and_weight(7, 32, 48), "gelu_tanh", dtype), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 16, 16), (300, 784, 3136), (6400, 784, 2352), (6272, 320, 1280), (4096, 6272, 1568)],
)
def test_the_linear_layer_on_a_gpu(rows, inner, columns, activation):
    x, weight, scale, one, bias = rows_and_weight(rows, inner, columns)
    expected = activate(x.float() @ (weight.float() * scale[:, None]).t() + bias, activation)
    rounding = difference(to_float8(expected), expected)
    for kind, allowed in ((torch.bfloat16, 1e-2), (torch.float8_e4m3fn, 1.2 * rounding)):
        for shift in (bias, bias.bfloat16()):
            found = linear_float8(x, weight, scale, one, shift, activation=activation, dtype=kind, backend="gpu")
            assert found.dtype == kind
            assert difference(found, expected) < allowed
    assert linear_float8(x[:0], weight, scale, one, bias, dtype=torch.bfloat16, backend="gpu").shape == (0, columns)


@pytest.mark.gpu
def test_many_tokens_on_a_gpu():
    """Recorded, and compiled with recordings, of a batch whose tokens go through the 8-bit products."""
    model = create_model("mamba_vision_T", device="cuda").eval()
    network = optimize(model, dtype=torch.float8_e4m3fn)
    images = torch.randn(32, 3, 224, 224, device="cuda")
    compiled = torch.compile(of_float8(model), mode="reduce-overhead")
    with torch.no_grad():
        expected = model(images)
        for _ in range(3):  # as it is, recorded, replayed
            assert difference(network(images), expected) < 0.15
            assert difference(compiled(images), expected) < 0.15
        assert difference(network.float()(images), expected) < 0.15  # of other types the library takes none
