"""Folding for inference: every kind of module, and whole networks, against what they were."""

import copy

import pytest
import torch
from torch import nn

from deterministic_weights import deterministic_images
from mambavision import create_model
from mambavision.inference.fuse import FusedMixer, fuse
from mambavision.models.backbone import MambaVisionBackbone

TINY = "mamba_vision_test_tiny"


def trained(name=TINY, **arguments):
    """A network in which nothing is at its start: norms have statistics, scales differ from one."""
    arguments = {"layer_scale": 0.5, "layer_scale_conv": 0.5, **arguments}
    model = create_model(name, **arguments)
    with torch.no_grad():
        for module in model.modules():
            for tensor in (getattr(module, "running_mean", None), getattr(module, "bias", None)):
                if isinstance(tensor, torch.Tensor):
                    tensor.normal_(0, 0.3)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
            for gamma in ("gamma", "gamma_1", "gamma_2"):
                if isinstance(getattr(module, gamma, None), torch.Tensor):
                    getattr(module, gamma).uniform_(0.5, 1.5)
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    return model


def outputs(model, images):
    with torch.no_grad():
        if isinstance(model, MambaVisionBackbone) and not hasattr(model, "head"):
            return model(images)
        final, maps = model.forward_intermediates(images)
        features = model.forward_features(images)
        return [model(images), features, model.forward_head(features), final, *maps]


@pytest.mark.parametrize("arguments", [{}, {"layer_scale": None, "layer_scale_conv": None}, {"features_only": True}])
@pytest.mark.parametrize("order", ["mamba_first", "attention_first"])
def test_everything_that_comes_out_is_the_same(arguments, order):
    model = trained(mixer_order=order, **arguments).double().eval()
    images = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    fused = fuse(model)
    for actual, expected in zip(outputs(fused, images), outputs(model, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_nothing_that_can_be_folded_is_left():
    fused = fuse(trained())
    kinds = {type(module) for module in fused.modules()}
    assert FusedMixer in kinds
    assert (
        sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == 1
    )  # the one `forward_features` shows
    assert not any(isinstance(module, nn.LayerNorm) and module.elementwise_affine for module in fused.modules())
    assert not [name for name, _ in fused.named_parameters() if "gamma" in name]
    calls = []
    fused.norm.register_forward_hook(lambda *_: calls.append(1))
    fused(torch.randn(1, 3, 64, 64))
    assert not calls  # and the logits do without it


def test_the_model_is_left_as_it_was():
    model = trained().train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert model.training
    assert not fused.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in owned for parameter in fused.parameters())


def test_fusing_twice_changes_nothing():
    fused = fuse(trained())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fuse(fused)(images), fused(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mamba_vision_T", "mamba_vision_B", "mamba_vision_nano_32"])
def test_variants_stay_within_float32(name):
    model = trained(name, layer_scale=1e-5 if name.endswith("B") else None, layer_scale_conv=None).eval()
    images = deterministic_images(1, *model.config.preprocessing.img_size)
    with torch.no_grad():
        expected, actual = model(images), fuse(model)(images)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision_keeps_the_scan_exact(dtype, bound):
    model = trained().eval()
    images = torch.randn(2, 3, 64, 64)
    fused = fuse(model).to(dtype)
    mixer = next(module for module in fused.modules() if isinstance(module, FusedMixer))
    assert {mixer.A.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {torch.float32}
    with torch.no_grad():
        expected, actual = model(images), fused(images.to(dtype))
    assert actual.dtype == dtype
    assert (actual - expected).norm() <= bound * expected.norm()


def test_it_compiles_exports_and_takes_another_head():
    model = trained()
    fused = fuse(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fused(images)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
        program = torch.export.export(fused, (images,), strict=False).module()
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
        fused.reset_classifier(3)
        torch.testing.assert_close(fused(images), fused.forward_head(fused.forward_features(images)))
    assert fused(images).shape == (2, 3)
    fused.reset_classifier(0)
    assert fused(images).shape == (2, fused.num_features)


def test_without_weights_there_is_nothing_to_fold():
    with pytest.raises(ValueError, match="meta device"):
        fuse(create_model(TINY, device="meta"))
