"""The variants as timm models: what timm asks of its own models, asked of ours."""

import copy
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from deterministic_weights import deterministic_images, deterministic_state_dict
from mambavision import create_model, list_models
from mambavision.config import VARIANTS
from mambavision.inference.picture_files import SAMPLES
from mambavision.inference.predictor import Predictor
from mambavision.weights import WEIGHTS, read_checkpoint

timm = pytest.importorskip("timm")
create_optimizer_v2 = pytest.importorskip("timm.optim").create_optimizer_v2
integration = pytest.importorskip("mambavision.integrations.timm")

TINY = "mamba_vision_test_tiny"
NANO = "mamba_vision_nano_32"
# timm's names for the variants' networks and, behind the dot, their weights.
TAGGED = {
    "mamba_vision_T": "mamba_vision_t.in1k",
    "mamba_vision_T2": "mamba_vision_t2.in1k",
    "mamba_vision_S": "mamba_vision_s.in1k",
    "mamba_vision_B": "mamba_vision_b.in1k",
    "mamba_vision_B_21k": "mamba_vision_b.in21k_ft_in1k",
    "mamba_vision_L": "mamba_vision_l.in1k",
    "mamba_vision_L_21k": "mamba_vision_l.in21k_ft_in1k",
    "mamba_vision_L2": "mamba_vision_l2.in1k",
    "mamba_vision_L2_512_21k": "mamba_vision_l2_512.in21k_ft_in1k",
    "mamba_vision_L3_256_21k": "mamba_vision_l3_256.in21k_ft_in1k",
    "mamba_vision_L3_512_21k": "mamba_vision_l3_512.in21k_ft_in1k",
    NANO: f"{NANO}.cifar10",
    TINY: TINY,
}
NAMES = sorted({*TAGGED, *TAGGED.values()})


def deterministic(**arguments):
    """The tiny variant as timm builds it, with weights that depend on names alone."""
    model = timm.create_model(TINY, **arguments).eval()
    model.load_state_dict(deterministic_state_dict({key: t.shape for key, t in model.state_dict().items()}))
    return model


@pytest.fixture(scope="module")
def tiny():
    return deterministic()


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_variant_is_listed_by_both_names():
    assert list(TAGGED) == list_models()
    assert set(timm.list_models("mamba_vision*")) == {name.split(".")[0] for name in NAMES}
    assert set(timm.list_pretrained("mamba_vision*")) == set(NAMES) - {TINY, NANO}
    assert timm.list_models("mamba_vision_l3*", pretrained=True) == [
        "mamba_vision_l3_256.in21k_ft_in1k",
        "mamba_vision_l3_512.in21k_ft_in1k",
    ]
    assert all(timm.is_model(name) for name in NAMES)


def test_the_documented_names_are_these():
    text = (Path(__file__).parents[1] / "docs" / "timm.md").read_text()
    pairs = re.findall(r"\| `(mamba_vision_\w+)` \| `(mamba_vision_\w+\.\w+)` ", text)
    assert dict(pairs) == {variant: name for variant, name in TAGGED.items() if variant != TINY}


def test_no_model_of_timm_is_replaced():
    modules = {name for name in timm.list_modules() if name != "timm"}  # our module's last name
    assert not [name for name in NAMES if timm.models.is_model_in_modules(name, modules)]


def test_one_name_with_two_tags_is_one_network():
    for name in ("mamba_vision_B", "mamba_vision_L"):
        assert VARIANTS[name] == VARIANTS[f"{name}_21k"]
        assert timm.get_pretrained_cfg(name.lower()).tag == "in1k"  # without a tag


@pytest.mark.parametrize("name", NAMES)
def test_a_name_builds_its_network(name):
    variant = next(variant for variant, tagged in TAGGED.items() if name in (variant, tagged))
    state = timm.create_model(name, device="meta").state_dict()
    expected = create_model(variant, device="meta").state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: t.shape for key, t in expected.items()}


def test_an_unknown_tag_or_argument_is_an_error():
    with pytest.raises(RuntimeError, match="in22k"):
        timm.create_model("mamba_vision_t.in22k", device="meta")
    with pytest.raises(TypeError, match="drop_paths"):
        timm.create_model(TINY, drop_paths=0.1)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(TINY, pretrained=True)


# --- the pretrained configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_tells_everything(name):
    variant = next(variant for variant, tagged in TAGGED.items() if name in (variant, tagged))
    config, preprocessing, spec = VARIANTS[variant], VARIANTS[variant].preprocessing, WEIGHTS.get(variant)
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.architecture == name.split(".")[0]
    assert cfg.input_size == (3, *preprocessing.img_size)
    assert (cfg.num_classes, cfg.fixed_input_size) == (config.num_classes, False)
    for field in ("crop_pct", "crop_mode", "interpolation", "mean", "std"):
        assert getattr(cfg, field) == getattr(preprocessing, field)
    if spec is not None:
        assert cfg.license == spec.license.lower()
        assert (cfg.hf_hub_id, cfg.origin_url) == (spec.repo_id, spec.url)
        assert cfg.hf_hub_filename == (None if spec.repo_id is None else "model.safetensors")
        assert spec.trained_on in cfg.description


@pytest.mark.parametrize("name", sorted(set(TAGGED.values())))
def test_the_configuration_names_what_the_network_has(name):
    model = timm.create_model(name, device="meta").eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    features = model.forward_features(torch.empty(2, *cfg["input_size"], device="meta"))
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features).shape == (2, cfg["num_classes"])


def test_classes_of_our_own_weights():
    assert timm.get_pretrained_cfg(NANO).label_names == read_checkpoint(WEIGHTS[NANO].asset).config.class_names


def test_the_image_size_reaches_the_configuration():
    model = timm.create_model("mamba_vision_t", img_size=(256, 384), in_chans=1, device="meta")
    assert model.config.window_size[2:] == (24, 12)
    assert model.pretrained_cfg["input_size"] == (3, 256, 384)  # of the weights, which have three channels
    assert model.pretrained_cfg["pool_size"] == (8, 12)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 256, 384)
    backbone = timm.create_model("mamba_vision_t", img_size=384, features_only=True, device="meta")
    assert timm.data.resolve_model_data_config(backbone)["input_size"] == (3, 384, 384)
    assert timm.get_pretrained_cfg("mamba_vision_t").input_size == (3, 224, 224)  # nobody else's


def test_pretrained_weights_and_preprocessing_predict_what_ours_do():
    model = timm.create_model(NANO, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    predictor = Predictor()
    for path in sorted(SAMPLES.glob("*.jpg"))[:2]:
        picture = Image.open(path).convert("RGB")
        with torch.no_grad():
            probability, index = model(transform(picture)[None]).softmax(-1).max(-1)
        (prediction,) = predictor([path])
        assert model.pretrained_cfg["label_names"][index] == prediction.labels[0]
        assert probability.item() == pytest.approx(prediction.probabilities[0], abs=1e-4)


# --- forward and backward ---------------------------------------------------------------------------------------------


def test_forward_is_ours(tiny):
    ours = create_model(TINY).eval()
    ours.load_state_dict(tiny.state_dict())
    for size in ((64, 64), (50, 97)):
        images = deterministic_images(2, *size)
        logits = tiny(images)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, ours(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features_only", [False, True])
def test_backward_reaches_every_parameter(features_only):
    model = deterministic() if not features_only else timm.create_model(TINY, features_only=True)
    out = model.train()(torch.randn(2, 3, 64, 64))
    loss = sum(part.square().mean() for part in out) if features_only else out.mean()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_channels_classes_and_rates():
    model = timm.create_model(TINY, in_chans=5, num_classes=7, drop_rate=0.5, drop_path_rate=0.3)
    assert (model.in_chans, model.num_classes) == (5, 7)
    assert model.eval()(torch.zeros(1, 5, 64, 64)).shape == (1, 7)
    assert (model.config.drop_rate, model.levels[-1].blocks[-1].drop_path.rate) == (0.5, 0.3)
    images = torch.randn(4, 5, 64, 64)
    features = model.forward_features(images)
    assert not torch.equal(model.train().forward_head(features), model.eval().forward_head(features))


def test_type_and_device():
    model = timm.create_model(TINY, dtype=torch.bfloat16, device="cpu", global_pool="catavgmax").eval()
    assert model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_is_compiled_copied_exported_and_traced(tiny):
    images = deterministic_images(2, 64, 64)
    with torch.no_grad():
        expected = tiny(images)
        compiled = torch.compile(tiny, fullgraph=True, backend="eager")  # the graph alone
        torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(copy.deepcopy(tiny)(images), expected)
        torch.testing.assert_close(torch.export.export(tiny, (images,), strict=False).module()(images), expected)
        torch.testing.assert_close(torch.jit.trace(tiny, images)(images), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(tiny, images), file)  # with gradients, and without Python inside
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(images), expected)


# --- head and pooling -------------------------------------------------------------------------------------------------


def test_pooling_is_what_its_name_says(tiny):
    images = deterministic_images(2, 64, 64)
    x = tiny.forward_features(images)
    mean, largest = x.mean((2, 3)), x.amax((2, 3))
    expected = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "catavgmax": torch.cat((mean, largest), 1),
        "": x,
    }
    assert set(expected) == set(integration.POOLS)
    for pool, value in expected.items():
        model = timm.create_model(TINY, num_classes=0, global_pool=pool).eval()
        model.load_state_dict({name: t for name, t in tiny.state_dict().items() if not name.startswith("head.")})
        torch.testing.assert_close(model(images), value)
        assert model.head_hidden_size == value.shape[1]


def test_reset_classifier():
    model = timm.create_model(TINY).eval()
    images = torch.randn(2, 3, 64, 64)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, model.num_features, 2, 2)
    model.reset_classifier(3, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features == model.get_classifier().in_features
    assert model(images).shape == (2, 3)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(4)  # the pooling stays
    assert model.get_classifier().weight.shape == (4, 2 * model.num_features)


def test_a_head_as_built_equals_one_after_reset():
    torch.manual_seed(5)
    built = timm.create_model(TINY, global_pool="catavgmax", num_classes=1000).head.weight
    assert built.shape == (1000, 128)
    assert built.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"global_pool": "mean"}, "one of 'avg', 'max'"), ({"global_pool": ""}, "pass num_classes=0, not 10")],
)
def test_wrong_pooling_is_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(TINY, **arguments)
    with pytest.raises(ValueError, match=message):
        timm.create_model(TINY).reset_classifier(10, **arguments)


# --- feature maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_indices", "feature_cls"),
    [
        *((indices, None) for indices in (None, (1, 3), (0, 2), (1,), (0, -1), 2)),
        *((indices, name) for indices in (None, (1, 3)) for name in ("getter", "hook")),
    ],
    ids=str,
)
def test_features_are_the_levels_maps(tiny, out_indices, feature_cls):
    arguments = {"out_indices": out_indices, "feature_cls": feature_cls}  # timm leaves None out
    backbone = timm.create_model(TINY, features_only=True, **arguments).eval()
    inner = backbone["body"] if feature_cls == "hook" else backbone.model
    inner.load_state_dict({name: t for name, t in tiny.state_dict().items() if name in inner.state_dict()})
    images = deterministic_images(2, 50, 64)
    maps = backbone(images)
    levels = {None: [0, 1, 2, 3], 2: [2, 3]}.get(out_indices) or [index % 4 for index in out_indices]
    expected = tiny.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(levels)
    for level, feature_map in zip(levels, maps, strict=True):
        assert torch.equal(feature_map, expected[level])
    assert backbone.feature_info.channels() == [feature_map.shape[1] for feature_map in maps]
    for reduction, feature_map in zip(backbone.feature_info.reduction(), maps, strict=True):
        assert feature_map.shape[2:] == (math.ceil(50 / reduction), math.ceil(64 / reduction))


def test_features_of_the_last_level_may_be_normed(tiny):
    backbone = integration.FeatureMaps(copy.deepcopy(tiny), out_indices=(3,), norm=True)
    images = deterministic_images(1, 64, 64)
    assert torch.equal(backbone(images)[0], tiny.forward_features(images))


def test_a_backbone_keeps_only_what_it_needs(tiny):
    full = set(tiny.state_dict())
    backbone = timm.create_model(TINY, features_only=True, out_indices=(0, 2))
    kept = {name.removeprefix("model.") for name in backbone.state_dict()}
    gone = ("levels.3.", "levels.2.downsample.", "norm.", "head.")
    assert kept == {name for name in full if not name.startswith(gone)}
    assert backbone.model.num_features == 32
    whole = timm.create_model(TINY, features_only=True)
    assert {name.removeprefix("model.") for name in whole.state_dict()} == {
        name for name in full if not name.startswith(("norm.", "head."))
    }


def test_intermediates_follow_timms_arguments(tiny):
    images = deterministic_images(2, 64, 64)
    final, maps = tiny.forward_intermediates(images, output_fmt="NCHW")
    torch.testing.assert_close(final, tiny.forward_features(images))
    info = timm.models.FeatureInfo(tiny.feature_info, out_indices=(0, 1, 2, 3))
    assert [feature_map.shape[1] for feature_map in maps] == info.channels()
    assert [64 // feature_map.shape[2] for feature_map in maps] == info.reduction()
    last = tiny.forward_intermediates(images, indices=2, intermediates_only=True)
    assert all(torch.equal(left, right) for left, right in zip(last, maps[2:], strict=True))
    early = tiny.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(left, right) for left, right in zip(early, maps[:2], strict=True))
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"4 levels to take the last of, got {wrong}"):
            tiny.forward_intermediates(images, indices=wrong)


def test_pruning_changes_no_map(tiny):
    images = deterministic_images(1, 64, 64)
    expected = tiny.forward_intermediates(images, intermediates_only=True)
    model = copy.deepcopy(tiny)
    assert model.prune_intermediate_layers([1, -2], prune_head=False) == [1, 2]
    assert (len(model.levels), model.num_features, model.num_classes) == (3, 32, 0)
    final, maps = model.forward_intermediates(images)
    assert all(torch.equal(left, right) for left, right in zip(maps, expected, strict=False))
    assert torch.equal(final, expected[2])
    assert torch.equal(model(images), expected[2])  # no pooling without a head, as timm has it
    model = copy.deepcopy(tiny)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert torch.equal(model(images), tiny(images))  # all of it was kept
    with pytest.raises(ValueError, match="Level indices"):
        model.prune_intermediate_layers([4])


def test_pruning_our_own_classifier():
    model = create_model(TINY).eval()
    assert model.prune_intermediate_layers((0, 1)) == [0, 1]
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 16) == (1, model.head_hidden_size)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features_only", [False, True])
def test_checkpointing_changes_no_gradient_and_keeps_less(features_only):
    images = deterministic_images(2, 64, 64)

    def run(enable):
        torch.manual_seed(0)
        model = timm.create_model(TINY, features_only=features_only, depths=(2, 2, 4, 4)).train()
        model.set_grad_checkpointing(enable)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = model(images)
        sum(part.square().mean() for part in (out if features_only else [out])).backward()
        return sum(kept), {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, expected = run(False)
    less, grads = run(True)
    assert less < plain / 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_timms_optimizer_groups_every_parameter(tiny):
    optimizer = create_optimizer_v2(tiny, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            scale[name], decay[name] = group["lr_scale"], group["weight_decay"]
    assert not names
    assert scale["patch_embed.conv_down.0.weight"] < scale["levels.2.blocks.0.mixer.in_proj.weight"] < 1
    assert scale["head.weight"] == 1
    assert decay["levels.2.blocks.0.mixer.A_log"] == decay["levels.2.blocks.0.mixer.D"] == 0
    assert decay["levels.2.blocks.0.mixer.in_proj.weight"] == 0.1


# --- without timm -----------------------------------------------------------------------------------------------------


def test_without_timm_one_sentence_tells_what_to_install():
    script = "import sys; sys.modules['timm'] = None; import mambavision.integrations.timm"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: timm is not installed; run pip install "timm>=1.0.26", or install mambavision[timm].'
    )
