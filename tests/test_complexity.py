"""Counted parameters and multiply-adds against the published ones and against formulas by hand."""

import pytest
import torch

from mambavision.config import VARIANTS, get_config
from mambavision.models.classifier import MambaVision
from mambavision.models.complexity import count_complexity
from mambavision.weights import WEIGHTS


def cost_of(name, img_size=None, **changes):
    return count_complexity(MambaVision(get_config(name, **changes), device="meta"), img_size)


@pytest.mark.parametrize("variant", [name for name, weights in WEIGHTS.items() if weights.repo_id])
def test_public_variants_cost_what_was_published(variant):
    cost = cost_of(variant)
    assert cost.parameters == WEIGHTS[variant].parameters
    # The published multiply-adds leave out what is not a layer: attention's products and the scan.
    beside = sum(layer.macs for layer in cost.layers if layer.kind in ("Attention", "MambaVisionMixer"))
    assert (cost.macs - beside) / 1e9 == pytest.approx(WEIGHTS[variant].gmacs, rel=0.015)


def test_layers_and_blocks_both_add_up_to_the_network():
    cost = cost_of("mamba_vision_test_tiny")
    parameters = sum(p.numel() for p in MambaVision(VARIANTS["mamba_vision_test_tiny"]).parameters())
    assert cost.parameters == parameters == sum(block.parameters for block in cost.blocks)
    assert cost.macs == sum(block.macs for block in cost.blocks)
    names = [block.name for block in cost.blocks]
    assert names[:3] == ["patch_embed", "levels.0.blocks.0", "levels.0.downsample"]
    assert names[-4:] == ["levels.3.blocks.0", "levels.3.blocks.1", "norm", "head"]


def test_one_block_of_each_kind_by_hand():
    config = get_config("mamba_vision_test_tiny")
    layers = {layer.name: layer for layer in cost_of("mamba_vision_test_tiny").layers}
    tokens, dim, half, rank, states = 16, 32, 16, 2, config.d_state  # level 2 of a 64 px picture: 4 x 4 tokens
    mixer = "levels.2.blocks.0.mixer"
    assert layers[f"{mixer}.in_proj"].macs == tokens * dim * dim
    assert layers[f"{mixer}.conv1d_x"].macs == tokens * half * config.d_conv
    assert layers[f"{mixer}.x_proj"].macs == tokens * half * (rank + 2 * states)
    assert layers[f"{mixer}.dt_proj"].macs == tokens * rank * half
    assert layers[mixer].macs == tokens * half * (4 * states + 2)
    assert layers[mixer].parameters == half * (states + 1)
    attention = layers["levels.2.blocks.1.mixer"]
    assert attention.macs == 2 * tokens * tokens * dim
    stem = layers["patch_embed.conv_down.0"]
    assert (stem.macs, stem.output_shape) == (32 * 32 * 8 * 3 * 9, (1, 8, 32, 32))
    assert layers["head"].macs == 64 * 10


def test_other_sizes_and_padding_count_what_is_computed():
    assert cost_of("mamba_vision_test_tiny", (128, 64)).macs > 1.9 * cost_of("mamba_vision_test_tiny").macs
    attention = {layer.name: layer.macs for layer in cost_of("mamba_vision_test_tiny", (65, 64)).layers}
    # 65 px give 5 x 4 tokens, padded to two windows of 4 x 4.
    assert attention["levels.2.blocks.1.mixer"] == 2 * 2 * 16 * 16 * 32


def test_a_network_with_values_costs_the_same_and_is_left_as_it_was():
    network = MambaVision(get_config("mamba_vision_test_tiny", drop_rate=0.5)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert count_complexity(network) == cost_of("mamba_vision_test_tiny")
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
