"""The network on packed weights for a CPU: the same outputs, the original untouched, and what cannot be said so."""

import copy
import pickle

import pytest
import torch

from mambavision import create_model
from mambavision.inference import cpu, optimize
from mambavision.inference.cpu import PackedConv, PackedConvBlock, PackedLinear, PackedMixer, optimize_for_cpu
from mambavision.inference.fuse import FusedMixer, fuse

TINY = "mamba_vision_test_tiny"
packed = pytest.mark.skipif(not cpu.can_pack(torch.float32), reason="oneDNN's packed kernels are for x86 here")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model(TINY, layer_scale=0.5, layer_scale_conv=0.5).eval()


def outputs(model, images):
    with torch.inference_mode():
        final, maps = model.forward_intermediates(images)
        return [model(images), model.forward_features(images), final, *maps]


# One window, padding in one direction and in both, batches, and maps of one token.
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 70, 64), (2, 37, 53), (1, 4, 7)])
def test_everything_that_comes_out_is_the_same(network, shape):
    batch, height, width = shape
    images = torch.randn(batch, 3, height, width)
    fast = optimize_for_cpu(fuse(network))
    for actual, expected in zip(outputs(fast, images), outputs(network, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_gives_the_same_maps():
    backbone = create_model(TINY, features_only=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        for actual, expected in zip(optimize_for_cpu(fuse(backbone))(images), backbone(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision_stays_close(network, dtype, bound):
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        actual = optimize_for_cpu(fuse(network), dtype=dtype)(images.to(dtype))
    assert actual.dtype == dtype
    assert (actual - expected).norm() <= bound * expected.norm()


@packed
def test_nothing_slow_is_left(network):
    fast = optimize_for_cpu(fuse(network))
    kinds = [type(module) for module in fast.levels.modules()]
    assert {PackedConv, PackedConvBlock, PackedLinear, PackedMixer} <= set(kinds)
    assert not {torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, FusedMixer} & set(kinds)


def test_the_model_is_left_as_it_was(network):
    fused = fuse(network)
    before = copy.deepcopy(fused.state_dict())
    kinds = [type(module) for module in fused.modules()]
    optimize_for_cpu(fused, dtype=torch.bfloat16)
    assert [type(module) for module in fused.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in fused.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in fused.state_dict().items())


def test_where_nothing_can_be_packed_it_runs_in_pytorch(network, monkeypatch):
    monkeypatch.setattr(cpu, "can_pack", lambda _: False)
    fast = optimize_for_cpu(fuse(network))
    assert not any(isinstance(module, PackedLinear) for module in fast.modules())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), network(images), rtol=1e-4, atol=1e-5)


def test_a_copy_computes_the_same(network):
    fast = optimize_for_cpu(fuse(network))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(fast)(images), fast(images))


@pytest.mark.slow
def test_compiled_it_computes_the_same(network, monkeypatch):
    monkeypatch.setattr(cpu, "can_pack", lambda _: False)
    fast = optimize_for_cpu(fuse(network), mode="full")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), network(images), rtol=1e-4, atol=1e-5)


def test_what_does_not_exist_is_refused(network):
    fused = fuse(network)
    with pytest.raises(ValueError, match="mode must be"):
        optimize_for_cpu(fused, mode="best")
    with pytest.raises(ValueError, match="dtype must be"):
        optimize_for_cpu(fused, dtype=torch.float64)
    with pytest.raises(ValueError, match="on the CPU"):
        optimize_for_cpu(create_model(TINY, device="meta"))


@packed
def test_it_compiles_as_one_graph(network):
    fast, images = optimize_for_cpu(fuse(network)), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("instructions", [False, True])
def test_bfloat16_is_fast_where_there_are_instructions_for_it(instructions, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "can_pack", lambda _: True)
    assert cpu.has_fast_bfloat16() == instructions
    monkeypatch.setattr(cpu, "can_pack", lambda _: False)
    assert not cpu.has_fast_bfloat16()


@packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_maps(dtype, stride):
    """Of which some CPUs' 16-bit convolutions make something else."""
    if not cpu.can_pack(dtype):
        pytest.skip("not in this type on this CPU")
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 64, 3, stride, 1).to(dtype)
    packed_conv = PackedConv(conv.to(memory_format=torch.channels_last))
    for height in (1, 2, 3, 8, 9, 10, 17, 64):
        for width in (1, 2, 3, 4):
            x = torch.randn(2, 64, height, width).to(dtype)
            with torch.no_grad():
                expected, found = conv.float()(x.float()), packed_conv(x)
            assert found.shape == expected.shape
            assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_none(network, dtype):
    images = torch.randn(3, 3, 64, 64)
    images[1, 0, 5, 6] = float("nan")
    with torch.no_grad():
        found = optimize(network, dtype=dtype)(images)
    assert found.isnan().any(1).tolist() == [False, True, False]


@packed
def test_it_cannot_be_saved(network, tmp_path):
    fast = optimize(network)
    copy.deepcopy(fast)
    for save in (pickle.dumps, lambda fast: torch.save(fast, tmp_path / "fast.pt")):
        with pytest.raises(pickle.PicklingError, match="save the model that it was made of"):
            save(fast)
    with pytest.raises(RuntimeError, match="save the model that it was made of"):
        fast.state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="or load into that one"):
            fast.load_state_dict(network.state_dict(), strict=strict)
