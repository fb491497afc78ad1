"""Repositories: the public layout, the original's own examples, saving, pushing, and what the Auto classes decide."""

# ruff: noqa: E402  (what comes after the check for transformers needs it)
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from huggingface_models import pictures, tiny_config, tiny_network
from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.inference.picture_files import SAMPLES
from mambavision.integrations.huggingface import (
    IMAGE_PROCESSORS,
    MambaVisionBackbone,
    MambaVisionConfig,
    MambaVisionForImageClassification,
    MambaVisionModel,
    auto_classes,
)
from mambavision.weights import WEIGHTS
from mambavision.weights.hub_config import hub_fields
from weight_files import REMOTE_CLASSES, hub_cache, remote_repository, use_hub_cache

TRUST = pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)


@pytest.fixture(scope="module")
def network():
    return tiny_network(class_names=[f"name {index % 9}" for index in range(10)])  # two have one name, like the cranes


@pytest.fixture
def repository(tmp_path, network):
    return remote_repository(tmp_path / "repository", network)


@TRUST
def test_a_public_repository_loads_natively(repository, network, trust):
    x = pictures()
    model = AutoModelForImageClassification.from_pretrained(repository, **trust)
    assert type(model) is MambaVisionForImageClassification
    assert torch.equal(model(x).logits, network(x))
    assert model.config.id2label[3] == "name 3"
    bare = AutoModel.from_pretrained(repository, **trust)
    assert type(bare) is MambaVisionModel
    assert torch.equal(bare(x).last_hidden_state, network.forward_features(x))
    assert type(AutoConfig.from_pretrained(repository, **trust)) is MambaVisionConfig
    assert type(AutoModel.from_config(bare.config, **trust)) is MambaVisionModel


@pytest.mark.parametrize(
    "model_class", [MambaVisionModel, MambaVisionForImageClassification, MambaVisionBackbone], ids=lambda c: c.__name__
)
def test_nothing_is_missing_and_nothing_is_too_much(repository, model_class):
    _, found = model_class.from_pretrained(repository, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ---- the original's examples -----------------------------------------------------------------------------------------

CLASSIFICATION = """
from transformers import AutoModelForImageClassification
from PIL import Image
from timm.data.transforms_factory import create_transform

model = AutoModelForImageClassification.from_pretrained("nvidia/MambaVision-T-1K", trust_remote_code=True)
model.eval()
image = Image.open("cat.jpg")
input_resolution = (3, 224, 224)
transform = create_transform(
    input_size=input_resolution,
    is_training=False,
    mean=model.config.mean,
    std=model.config.std,
    crop_mode=model.config.crop_mode,
    crop_pct=model.config.crop_pct,
)
inputs = transform(image).unsqueeze(0)
outputs = model(inputs)
logits = outputs["logits"]
predicted_class_idx = logits.argmax(-1).item()
label = model.config.id2label[predicted_class_idx]
"""
FEATURES = """
from transformers import AutoModel
from PIL import Image
from timm.data.transforms_factory import create_transform

model = AutoModel.from_pretrained("nvidia/MambaVision-T-1K", trust_remote_code=True)
model.eval()
image = Image.open("cat.jpg")
input_resolution = (3, 224, 224)
transform = create_transform(
    input_size=input_resolution,
    is_training=False,
    mean=model.config.mean,
    std=model.config.std,
    crop_mode=model.config.crop_mode,
    crop_pct=model.config.crop_pct,
)
inputs = transform(image).unsqueeze(0)
out_avg_pool, features = model(inputs)
shapes = [tuple(out_avg_pool.size())] + [tuple(feature.size()) for feature in features]
"""


@pytest.fixture(scope="module")
def tiny_variant():
    return tiny_network("mamba_vision_T", class_names=[f"name {index}" for index in range(1000)])


@pytest.fixture
def cached_repository(tiny_variant, tmp_path, monkeypatch):
    """nvidia/MambaVision-T-1K with weights of our own, in the hub's cache."""
    use_hub_cache(monkeypatch, tmp_path / "cache")
    repository = remote_repository(tmp_path / "repository", tiny_variant)
    hub_cache(tmp_path / "cache", "nvidia/MambaVision-T-1K", repository)
    monkeypatch.chdir(tmp_path)
    Image.open(SAMPLES / "cat.jpg").convert("RGB").save(tmp_path / "cat.jpg", quality=100)


def test_the_original_examples_run(cached_repository, tiny_variant):
    pytest.importorskip("timm")
    ran = {}
    exec(CLASSIFICATION, ran)
    assert type(ran["model"]) is MambaVisionForImageClassification
    torch.testing.assert_close(ran["logits"], tiny_variant(ran["inputs"]))
    assert ran["label"] == f"name {ran['predicted_class_idx']}"

    ran = {}
    exec(FEATURES, ran)
    assert ran["shapes"] == [(1, 640), (1, 80, 56, 56), (1, 160, 28, 28), (1, 320, 14, 14), (1, 640, 7, 7)]
    final, maps = tiny_variant.forward_intermediates(ran["inputs"])
    assert torch.equal(ran["out_avg_pool"], tiny_variant.forward_head(final, pre_logits=True))
    assert all(torch.equal(a, b) for a, b in zip(ran["features"], maps, strict=True))


def test_pipeline_processor_and_backbone_come_by_the_repository_name(cached_repository, tiny_variant):
    name = "nvidia/MambaVision-T-1K"
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    x = torch.as_tensor(processor(Image.open("cat.jpg"), return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        expected = tiny_variant(x).softmax(-1)[0]
    for beside in ({}, {"trust_remote_code": True}):
        classify = transformers.pipeline("image-classification", model=name, **beside)
        (best,) = classify("cat.jpg", top_k=1)
        assert best["label"] == f"name {expected.argmax()}"
        assert best["score"] == pytest.approx(expected.max().item(), rel=1e-4)
    backbone = AutoBackbone.from_pretrained(name, out_features=["stage2", "stage4"])
    assert type(backbone) is MambaVisionBackbone
    assert backbone.channels == [160, 640]


# ---- backbones -------------------------------------------------------------------------------------------------------


@TRUST
@pytest.mark.parametrize("more", [{}, {"use_timm_backbone": False, "code_revision": None}], ids=["", "auto arguments"])
def test_a_backbone_comes_from_a_folder(repository, network, trust, more):
    backbone, found = AutoBackbone.from_pretrained(
        str(repository), out_features=["stage1", "stage3"], output_loading_info=True, **trust, **more
    )
    assert type(backbone) is MambaVisionBackbone
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = pictures()
    _, maps = network.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x).feature_maps, (maps[0], maps[2]), strict=True))


def test_a_saved_backbone_comes_back_with_its_stages_or_with_those_of_a_configuration(tmp_path):
    MambaVisionBackbone(tiny_config(out_features=["stage2"])).save_pretrained(tmp_path)
    assert AutoBackbone.from_pretrained(tmp_path).out_features == ["stage2"]
    assert AutoBackbone.from_pretrained(tmp_path, out_indices=[1, 4]).out_features == ["stage1", "stage4"]
    config = AutoConfig.from_pretrained(tmp_path, out_features=["stage3"])
    assert AutoBackbone.from_pretrained(tmp_path, config=config).out_features == ["stage3"]


def test_a_head_for_segmentation_takes_the_configuration_of_a_folder(repository, network):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = AutoBackbone.from_pretrained(repository, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=AutoConfig.from_pretrained(repository, out_features=stages),
        hidden_size=8,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    assert type(model.backbone) is MambaVisionBackbone
    model.backbone.load_state_dict(backbone.state_dict())
    x = pictures()
    _, maps = network.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone(x).feature_maps, maps, strict=True))


def test_backbones_of_others_go_on_to_transformers(tmp_path, monkeypatch):
    """What is not here is asked of nobody on our behalf."""
    asked = []
    monkeypatch.setattr(
        auto_classes, "MambaVisionBackbone", SimpleNamespace(from_pretrained=lambda *_, **__: pytest.fail("ours"))
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.file_download.get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked")
    )
    for name in (str(tmp_path / "other"), "resnet50", "someone/absent"):
        given = {"out_indices": [1], "use_timm_backbone": True}
        auto_classes._backbone_of_ours(lambda *inputs, **kwargs: asked.append((inputs, kwargs)), name, 7, **given)
        assert asked.pop() == ((name, 7), given)


# ---- image processors that the repository does not bring -------------------------------------------------------------


@TRUST
def test_a_repository_without_preprocessor_gets_the_one_of_its_config(tmp_path, network, trust):
    fields = {"crop_pct": 0.5, "crop_mode": "squash", "mean": [0.1, 0.2, 0.3]}
    repository = remote_repository(tmp_path, network, **fields)
    processor = AutoImageProcessor.from_pretrained(repository, **trust)
    assert type(processor) in IMAGE_PROCESSORS.values()
    assert dict(processor.size) == {"height": 128, "width": 128}
    assert dict(processor.crop_size) == {"height": 64, "width": 64}
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    for other in (False, True):
        chosen = AutoImageProcessor.from_pretrained(repository, use_fast=other)
        assert type(chosen) is IMAGE_PROCESSORS["torchvision" if other else "pil"]


def test_a_preprocessor_that_is_there_is_used(tmp_path, repository):
    AutoImageProcessor.from_pretrained(repository, size={"shortest_edge": 100}).save_pretrained(repository)
    assert (repository / "preprocessor_config.json").is_file()
    assert AutoImageProcessor.from_pretrained(repository).size["shortest_edge"] == 100


def test_repositories_of_others_fail_as_before(tmp_path):
    with pytest.raises(OSError, match="preprocessor_config.json"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(OSError, match="preprocessor_config.json"):
        AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="preprocessor_config.json"):
        next(iter(IMAGE_PROCESSORS.values())).from_pretrained(tmp_path)


def test_code_of_other_repositories_still_runs_where_it_is_trusted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "other.Other"}}))
    (tmp_path / "other.py").write_text("raise AssertionError('remote code was run')\n")
    with pytest.raises(AssertionError, match="remote code was run"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)


# ---- there and back --------------------------------------------------------------------------------------------------


def test_a_saved_model_has_the_public_layout(repository, network, tmp_path):
    saved = tmp_path / "saved"
    AutoModelForImageClassification.from_pretrained(repository).save_pretrained(saved)
    public, ours = (load_file(folder / "model.safetensors") for folder in (repository, saved))
    assert list(public.keys()) == list(ours.keys())
    assert all(torch.equal(public[name], ours[name]) for name in public)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (repository, saved))
    for field in set(before) - {"auto_map", "torch_dtype", "architectures"}:
        assert after[field] == before[field], field
    assert "auto_map" not in after  # its code lies in the other folder

    x = pictures()
    again = AutoModelForImageClassification.from_pretrained(saved, trust_remote_code=True)
    assert torch.equal(again(x).logits, network(x))
    native = create_model(None, checkpoint_path=saved)
    assert torch.equal(native(x), network(x))
    assert native.config == network.config


def test_the_name_of_code_in_another_repository_is_kept(tmp_path):
    elsewhere = {name: f"nvidia/MambaVision-T-1K--{place}" for name, place in REMOTE_CLASSES.items()}
    tiny_config(auto_map=elsewhere).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == elsewhere
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["auto_map"] == elsewhere


def test_what_came_from_the_hub_names_its_code_there(tmp_path, monkeypatch, repository):
    """So that whoever gets the fine-tuned weights can load them without this package."""
    name = "someone/mambavision"
    use_hub_cache(monkeypatch, hub_cache(tmp_path / "cache", name, repository))
    AutoModelForImageClassification.from_pretrained(name).save_pretrained(tmp_path / "saved")
    expected = {auto_class: f"{name}--{place}" for auto_class, place in REMOTE_CLASSES.items()}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == expected
    AutoModel.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == expected


def test_the_model_in_the_package_goes_there_and_back(tmp_path):
    """It has what no public repository says: another stem, and a picture size of its own."""
    network = create_model("mamba_vision_nano_32", pretrained=True)
    MambaVisionForImageClassification.from_network(network).save_pretrained(tmp_path)
    assert create_model(None, checkpoint_path=tmp_path).config == network.config
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x).logits, network(x))
    classify = transformers.pipeline(
        "image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(tmp_path)
    )
    for name in ("cat", "dog", "horse"):
        assert classify(str(SAMPLES / f"{name}.jpg"), top_k=1)[0]["label"] == name


def test_a_model_saved_in_shards_is_read_by_both(tmp_path):
    network = create_model("mamba_vision_test_tiny").eval()
    MambaVisionForImageClassification.from_network(network).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(AutoModelForImageClassification.from_pretrained(tmp_path)(x).logits, network(x))
    torch.testing.assert_close(create_model(None, checkpoint_path=tmp_path)(x), network(x))


def test_checkpoints_of_one_model_load_into_the_others(tmp_path):
    classifier = MambaVisionForImageClassification(tiny_config())
    classifier.save_pretrained(tmp_path / "classifier")
    bare = MambaVisionModel.from_pretrained(tmp_path / "classifier")
    bare.save_pretrained(tmp_path / "bare")
    names = load_file(tmp_path / "bare" / "model.safetensors").keys()
    assert all(name.startswith("model.") and not name.startswith("model.head") for name in names)
    again, found = MambaVisionForImageClassification.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(found["missing_keys"]) == {"model.head.weight", "model.head.bias"}
    assert all(torch.equal(again.state_dict()[name], classifier.state_dict()[name]) for name in names)


@pytest.mark.parametrize("variant", [name for name, spec in WEIGHTS.items() if spec.repo_id])
def test_every_published_configuration_is_understood(variant):
    """Without what the public files leave out: fields of ours, and layer scale below B."""
    network = VARIANTS[variant]
    fields = hub_fields(network)
    public = {"dim", "in_dim", "depths", "num_heads", "window_size", "mlp_ratio", "drop_path_rate", "mean", "std"}
    public |= {"crop_pct", "crop_mode", "id2label", "label2id", "model_type"}
    public |= {"layer_scale", "layer_scale_conv"} if network.layer_scale is not None else set()
    config = MambaVisionConfig.from_dict({key: fields[key] for key in public})
    assert config.network_config(num_classes=1000).replace(class_names=None) == network
    assert MambaVisionConfig.from_dict({**fields, "drop_path_rate": 0.3}).drop_path_rate == 0.3  # as of L3-512


def test_push_to_hub_uploads_weights_and_configuration(tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        """A hub that keeps what it is given."""

        def create_repo(self, repo_id, **_):
            return type("Url", (str,), {"repo_id": repo_id})(repo_id)

        def create_commit(self, operations, **_):
            for operation in operations:
                uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    hub = transformers.utils.hub
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", Hub)
        monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub, raising=False)
    else:
        monkeypatch.setattr(hub, "create_repo", Hub().create_repo)
        monkeypatch.setattr(hub, "create_commit", Hub().create_commit)
    monkeypatch.setattr(hub.ModelCard, "load", lambda *_, **__: hub.ModelCard("---\nlicense: mit\n---\n"))
    model = MambaVisionForImageClassification(tiny_config())
    model.push_to_hub("someone/mine")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(uploaded[name])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


# ---- without transformers --------------------------------------------------------------------------------------------


def test_without_transformers_one_sentence_tells_what_to_install():
    script = "import sys; sys.modules['transformers'] = None; import mambavision.integrations.huggingface"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: transformers is not installed; "
        'run pip install "transformers>=4.57", or install mambavision[huggingface].'
    )
