"""What is built on timm takes our models by name: segmentation_models_pytorch and transformers' TimmBackbone."""

import pytest
import torch

from deterministic_weights import deterministic_images
from mambavision import create_model

integration = pytest.importorskip("mambavision.integrations.timm")

TINY = "mamba_vision_test_tiny"
NANO = "mamba_vision_nano_32"


# --- segmentation_models_pytorch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmentation():
    return pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("decoder", ["Unet", "UPerNet"])
def test_segmentation_takes_a_training_step(segmentation, decoder):
    network = getattr(segmentation, decoder)(f"tu-{TINY}", encoder_weights=None, classes=3).train()
    assert network.encoder.out_channels == [3, 0, 8, 16, 32, 64]
    images, masks = torch.randn(2, 3, 64, 96), torch.randint(3, (2, 64, 96))
    logits = network(images)
    assert logits.shape == (2, 3, 64, 96)
    segmentation.losses.DiceLoss("multiclass")(logits, masks).backward()
    assert [name for name, parameter in network.encoder.named_parameters() if parameter.grad is None] == []


def test_segmentation_sees_the_pretrained_maps(segmentation):
    encoder = segmentation.encoders.get_encoder(f"tu-{NANO}.cifar10", weights=True, depth=3).eval()
    images = deterministic_images(1, 32, 64)
    expected = create_model(NANO, pretrained=True, features_only=True)(images)
    assert all(torch.equal(left, right) for left, right in zip(encoder(images), expected, strict=True))


def test_segmentation_with_the_packaged_model(segmentation):
    """Its stride is 8, so there are three steps up; docs/timm.md shows it."""
    network = segmentation.Unet(
        f"tu-{NANO}.cifar10", encoder_weights=True, encoder_depth=3, decoder_channels=(64, 32, 16), classes=5
    ).eval()
    assert network.encoder.output_stride == 8
    assert network(torch.zeros(1, 3, 40, 64)).shape == (1, 5, 40, 64)


@pytest.mark.parametrize("decoder", integration.UNDILATED)
def test_segmentation_by_every_decoder_that_is_named(segmentation, decoder):
    network = getattr(segmentation, decoder)(f"tu-{TINY}", encoder_weights=None, classes=3).eval()
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_a_decoder_that_wants_a_dilated_encoder_is_told_so(segmentation, decoder):
    with pytest.raises(TypeError, match=r"fixed stride of 32 and no dilated form\. .* Unet, .*, DPT do without\."):
        getattr(segmentation, decoder)(f"tu-{TINY}", encoder_weights=None)


def test_segmentation_with_other_channels_and_fewer_levels(segmentation):
    network = segmentation.Unet(
        f"tu-{TINY}", encoder_weights=None, in_channels=1, encoder_depth=4, decoder_channels=(32, 16, 8, 8)
    ).eval()
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 1, 64, 64)
    assert len(network.encoder.model.model.levels) == 3


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def backbone_config(transformers, **arguments):
    """For the tiny variant without weights, of which version 4 has to be told."""
    before = {"use_pretrained_backbone": False} if transformers.__version__.startswith("4.") else {}
    return transformers.TimmBackboneConfig(backbone=TINY, **before, **arguments)


def test_transformers_backbone_gives_the_chosen_maps(transformers):
    config = backbone_config(transformers, out_indices=(1, 3))
    backbone = transformers.TimmBackbone(config).eval()
    ours = create_model(TINY, features_only=True).eval()
    ours.load_state_dict(
        {name.removeprefix("_backbone.model."): tensor for name, tensor in backbone.state_dict().items()}
    )
    images = deterministic_images(2, 64, 64)
    expected = ours(images)
    assert backbone.channels == [16, 64]
    for _ in range(2):  # asking for all maps must not change what the next call gives
        out = backbone(images)
        assert out.hidden_states is None
        assert all(torch.equal(a, b) for a, b in zip(out.feature_maps, (expected[1], expected[3]), strict=True))
        out = backbone(images, output_hidden_states=True)
        assert all(torch.equal(a, b) for a, b in zip(out.feature_maps, (expected[1], expected[3]), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected, strict=True))


def test_transformers_backbone_shows_the_levels_it_kept(transformers):
    backbone = transformers.TimmBackbone(backbone_config(transformers, out_indices=(1,))).eval()
    out = backbone(deterministic_images(1, 64, 64), output_hidden_states=True)
    assert [feature_map.shape[1] for feature_map in out.hidden_states] == [8, 16]
    assert torch.equal(out.feature_maps[0], out.hidden_states[1])


def test_transformers_backbone_keeps_the_pretrained_statistics(transformers):
    backbone = transformers.TimmBackbone.from_pretrained(f"{NANO}.cifar10", out_indices=(0, 1, 2, 3)).eval()
    images = deterministic_images(1, 32, 32)
    expected = create_model(NANO, pretrained=True, features_only=True)(images)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images).feature_maps, expected, strict=True))


def test_transformers_backbone_freezes_batch_norms(transformers):
    config = backbone_config(transformers, out_indices=(3,), freeze_batch_norm_2d=True)
    backbone = transformers.TimmBackbone(config).train()
    before = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64)).feature_maps[0].mean().backward()
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.named_buffers())


def test_transformers_segmentation_takes_a_training_step(transformers):
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(transformers, out_indices=(0, 1, 2, 3)),
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=3,
    )
    network = transformers.UperNetForSemanticSegmentation(config).train()
    out = network(torch.randn(2, 3, 64, 64), labels=torch.randint(3, (2, 64, 64)))
    out.loss.backward()
    assert out.logits.shape == (2, 3, 64, 64)
    assert [name for name, p in network.backbone.named_parameters() if p.grad is None] == []
