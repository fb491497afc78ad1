"""Folding for inference: every kind of module, and whole networks, against what they were."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as pruning

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


def with_frozen_norms(module):
    """Batch norms as detection code has them: buffers alone."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(
                {key: value for key, value in child.state_dict().items() if "num_batches" not in key}
            )
            setattr(module, name, frozen)
        else:
            with_frozen_norms(child)
    return module


def without_affine_norms(module):
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.LayerNorm)):
            child.weight, child.bias = None, None
            child.affine = child.elementwise_affine = False
    return module


@pytest.mark.parametrize(
    "change",
    [nn.SyncBatchNorm.convert_sync_batchnorm, with_frozen_norms, without_affine_norms],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("features_only", [False, True])
def test_other_batch_norms_are_folded_too(change, features_only):
    model = trained(features_only=features_only).double().eval()
    model = change(model).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for actual, expected in zip(outputs(fuse(model), images), outputs(model, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


class Adapted(nn.Linear):
    """As libraries of adapters do: a layer that adds something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def adapt(block):
    block.mlp.fc1 = Adapted(block.mlp.fc1.in_features, block.mlp.fc1.out_features)


def wrap(block):
    block.mixer.x_proj = nn.Sequential(block.mixer.x_proj)


def prune(block):
    pruning.l1_unstructured(block.mlp.fc2, "weight", amount=0.1)


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.mixer.in_proj)


def watch(block):
    block.mixer.register_forward_hook(lambda *_: None)


def forget(block):
    block.norm1 = nn.Identity()


CHANGES = {
    adapt: r"mlp.fc1 \(Adapted\) cannot be folded: merge adapters",
    wrap: r"mixer.x_proj \(Sequential\) cannot be folded",
    prune: r"mlp.fc2 \(Linear\) cannot be folded",
    parametrize: r"mixer.in_proj \(Parametrized.*\) cannot be folded",
    watch: "mixer has a hook",
    forget: r"norm1 \(Identity\) cannot be folded",
}


@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_what_is_more_than_its_weights_is_refused(change, message):
    model = trained()
    change(model.levels[2].blocks[0])
    with pytest.raises(ValueError, match=f"levels.2.blocks.0.{message}"):
        fuse(model)


def test_norms_of_batches_are_refused():
    model = trained()
    norm = model.levels[0].blocks[0].norm1
    model.levels[0].blocks[0].norm1 = nn.BatchNorm2d(norm.num_features, track_running_stats=False)
    with pytest.raises(ValueError, match=r"levels.0.blocks.0.norm1 \(BatchNorm2d\) cannot .* running statistics"):
        fuse(model)
    model.levels[0].blocks[0].norm1 = nn.GroupNorm(1, norm.num_features)
    with pytest.raises(ValueError, match=r"norm1 \(GroupNorm\)"):
        fuse(model)


def test_a_frozen_norm_that_hides_its_epsilon_is_refused():
    model = with_frozen_norms(trained())
    del model.levels[0].blocks[0].norm1.eps
    with pytest.raises(ValueError, match=r"norm1 \(FrozenBatchNorm2d\) cannot be folded"):
        fuse(model)


def test_a_wrapped_forward_is_refused_and_an_unwrapped_one_is_not():
    model, images = trained().eval(), torch.randn(2, 3, 64, 64)
    expected = outputs(model, images)[0]
    for module in model.modules():
        module.forward = module.forward  # as some unwrappers leave it
    model.levels[2].blocks[0].mixer.compile(backend="eager")  # which a copy does not keep
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(images), expected, rtol=1e-4, atol=1e-4)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="forward is wrapped"):
        fuse(model)


def test_an_adapted_head_is_called():
    model = trained().eval()
    model.head = Adapted(model.head.in_features, model.head.out_features)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_training_mode_changes_nothing():
    model = trained(drop_path_rate=0.9, drop_rate=0.9, attn_drop_rate=0.9).eval()
    images = torch.randn(2, 3, 64, 64)
    for network in (model, trained(drop_path_rate=0.9, attn_drop_rate=0.9, features_only=True).eval()):
        fused = fuse(network)
        expected, found = outputs(fused, images), outputs(fused.train(), images)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_the_head_can_be_assigned():
    fused, images = fuse(trained().eval()), torch.randn(2, 3, 64, 64)
    fused.head = nn.Linear(fused.num_features, 5)
    with torch.no_grad():
        expected = fused.forward_head(fused.forward_features(images))
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)
        fused.norm = nn.Identity()
        expected = fused.forward_head(fused.forward_features(images))
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [nn.Linear(1, 1), "mamba_vision_T", None])
def test_what_is_no_network_of_ours_is_refused(other):
    with pytest.raises(TypeError, match="fuse takes a MambaVision network, got"):
        fuse(other)
    with pytest.raises(TypeError, match=r"got DataParallel: pass its `\.module`\."):
        fuse(nn.DataParallel(trained()))
    with pytest.raises(TypeError, match=r"got OptimizedModule: pass its `\._orig_mod`\."):
        fuse(torch.compile(trained()))
