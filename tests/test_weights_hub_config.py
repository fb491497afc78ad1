"""The fields of a Hugging Face `config.json`."""

import json

import pytest

from mambavision.config import VARIANTS
from mambavision.weights.hub_config import hub_fields, network_config
from weight_files import public_config


def read(fields, network):
    return network_config(
        fields, num_classes=network.num_classes, in_chans=network.in_chans, class_names=network.class_names
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_can_be_written_and_read(name):
    changes = {"mixer_order": "attention_first", "attn_drop_rate": 0.1, "in_chans": 4, "d_state": 4}
    for network in (VARIANTS[name], VARIANTS[name].replace(**changes)):
        fields = json.loads(json.dumps(hub_fields(network)))
        assert read(fields, network) == network


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("mamba_vision_") and name[13].isupper()])
def test_the_fields_of_the_public_files_suffice(name):
    network = VARIANTS[name]
    assert read(public_config(network), network) == network


def test_the_labels_are_written():
    network = VARIANTS["mamba_vision_test_tiny"].replace(num_classes=2, class_names=("cat", "dog"))
    fields = hub_fields(network)
    assert fields["id2label"] == {0: "cat", 1: "dog"}
    assert fields["label2id"] == {"cat": 0, "dog": 1}
    assert hub_fields(network.replace(class_names=None))["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}


def test_what_is_missing_or_wrong_is_named():
    fields = hub_fields(VARIANTS["mamba_vision_T"])
    with pytest.raises(KeyError, match="depths"):
        network_config({key: fields[key] for key in fields if key != "depths"}, num_classes=0, in_chans=3)
    with pytest.raises(ValueError, match="crop_pct"):
        network_config({**fields, "crop_pct": 2}, num_classes=0, in_chans=3)
