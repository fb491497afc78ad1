"""What transformers expects of a model: the behaviours of its common model tests, written for ours."""

# ruff: noqa: E402  (what comes after the check for transformers needs it)
import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from huggingface_models import pictures, tiny_config, tiny_network
from mambavision import create_model
from mambavision.config import VARIANTS
from mambavision.integrations.huggingface import (
    MambaVisionBackbone,
    MambaVisionConfig,
    MambaVisionForImageClassification,
    MambaVisionModel,
)

MODELS = (MambaVisionModel, MambaVisionForImageClassification, MambaVisionBackbone)
every_model = pytest.mark.parametrize("model_class", MODELS)


def tensors(output):
    """Every tensor of an output, in order."""
    return [
        tensor
        for value in output.to_tuple()
        for tensor in (value if isinstance(value, tuple) else (value,))
        if tensor is not None
    ]


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_describes_every_variant(name):
    network = VARIANTS[name]
    config = MambaVisionConfig.from_network_config(network)
    assert config.network_config(num_classes=network.num_classes).replace(class_names=None) == network
    assert (config.num_labels, config.hidden_size) == (network.num_classes, network.num_features)


def test_without_arguments_it_is_the_smallest_variant():
    network = MambaVisionConfig().network_config(num_classes=1000)
    assert network.replace(class_names=None) == VARIANTS["mamba_vision_T"]


def test_a_configuration_survives_its_file(tmp_path):
    config = tiny_config(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}, out_indices=[2, 4])
    config.save_pretrained(tmp_path)
    loaded = MambaVisionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.id2label, loaded.out_features) == ({0: "cat", 1: "dog"}, ["stage2", "stage4"])
    assert MambaVisionConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7


def test_configurations_are_equal_when_their_fields_are():
    assert tiny_config() == tiny_config()
    assert tiny_config() != tiny_config(drop_path_rate=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 2]}, "depths must be 4 positive integers"),
        ({"crop_mode": "round"}, "crop_mode must be one of"),
        ({"num_heads": [2, 4, 7, 16]}, "num_heads 7"),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "name other stages"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MambaVisionConfig(**fields)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_the_outputs_are_those_of_the_network():
    network, x = tiny_network(), pictures(side=72)
    model = MambaVisionForImageClassification.from_network(network)
    final, maps = network.forward_intermediates(x)
    output = model(x, output_hidden_states=True)
    assert torch.equal(output.logits, network(x))
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, maps, strict=True))
    assert model(x).hidden_states is None

    bare = MambaVisionModel(tiny_config()).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".head." not in k})
    output = bare(x)
    assert torch.equal(output.pooler_output, network.forward_head(final, pre_logits=True))
    assert torch.equal(output.last_hidden_state, final)
    pooled, features = output
    assert pooled is output["pooler_output"]
    assert all(torch.equal(a, b) for a, b in zip(features, maps, strict=True))
    assert list(output.keys()) == ["pooler_output", "hidden_states", "last_hidden_state"]


@every_model
def test_outputs_are_alike_as_tuple_and_as_dictionary(model_class):
    model, x = model_class(tiny_config()).eval(), pictures()
    output = model(x)
    assert isinstance(output, transformers.utils.ModelOutput)
    plain = model(x, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(output.to_tuple())
    for a, b in zip(plain, output.to_tuple(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    model.config.return_dict = False
    assert type(model(x)) is tuple
    reloaded = pickle.loads(pickle.dumps(output))
    assert all(torch.equal(a, b) for a, b in zip(tensors(reloaded), tensors(output), strict=True))


@every_model
def test_the_first_argument_is_pixel_values(model_class):
    assert list(inspect.signature(model_class.forward).parameters)[1] == "pixel_values"
    assert model_class.main_input_name == "pixel_values"


@every_model
def test_pictures_may_have_any_size_and_wrong_ones_are_named(model_class):
    model = model_class(tiny_config()).eval()
    model(torch.randn(1, 3, 33, 70))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="normalised pictures of a floating type"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    if model_class is not MambaVisionBackbone:
        with pytest.raises(ValueError, match="Give pixel_values"):
            model()


def test_grey_pictures_and_no_labels():
    model = MambaVisionForImageClassification(tiny_config(num_channels=1, mean=[0.5], std=[0.5], num_labels=0))
    assert model.eval()(pictures(channels=1)).logits.shape == (2, 64)


# ---- attention -------------------------------------------------------------------------------------------------------


@every_model
def test_eager_attention_gives_its_weights(model_class):
    model, x = model_class(tiny_config(attn_implementation="eager")).eval(), pictures(side=128)
    assert model.config._attn_implementation == "eager"
    output = model(x, output_attentions=True)
    # A 128 px picture has 8 x 8 and 4 x 4 cells in levels 2 and 3, thus 4 windows each of 4 x 4 and 2 x 2 tokens.
    assert [tuple(weights.shape) for weights in output.attentions] == [(8, 2, 16, 16), (8, 4, 4, 4)]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert model(x).attentions is None
    assert not any(layer._forward_hooks for layer in model.modules())
    model.config.output_attentions = True
    assert len(model(x).attentions) == 2


@every_model
def test_eager_and_fused_attention_agree_and_can_be_exchanged(model_class):
    model, x = model_class(tiny_config()).eval(), pictures()
    assert model.config._attn_implementation == "sdpa"
    fused = tensors(model(x))
    with pytest.raises(ValueError, match=r'set_attn_implementation\("eager"\)'):
        model(x, output_attentions=True)
    model.set_attn_implementation("eager")
    eager = tensors(model(x))
    assert len(model(x, output_attentions=True).attentions) == 2
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), fused, strict=True))


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "no_such_attention"])
def test_attention_that_is_not_there_is_refused(name):
    with pytest.raises((ValueError, ImportError), match="(?i)attention"):
        MambaVisionModel(tiny_config(attn_implementation=name))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        (None, torch.tensor([1, 2]), F.cross_entropy),
        ("single_label_classification", torch.tensor([0, 2]), F.cross_entropy),
        (None, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), F.binary_cross_entropy_with_logits),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0]]), F.binary_cross_entropy_with_logits),
        ("regression", torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]), F.mse_loss),
    ],
)
def test_the_loss_follows_the_labels_and_the_problem_type(problem, labels, expected):
    model = MambaVisionForImageClassification(tiny_config(num_labels=3, problem_type=problem)).eval()
    output = model(pictures(), labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))
    assert output[0] is output.loss
    assert output[1] is output["logits"]


def test_every_parameter_gets_a_gradient_and_so_do_states_and_attentions():
    model = MambaVisionForImageClassification(tiny_config(attn_implementation="eager")).train()
    output = model(pictures(), labels=torch.tensor([1, 2]), output_attentions=True, output_hidden_states=True)
    watched = (*output.hidden_states, *output.attentions)
    for tensor in watched:
        tensor.retain_grad()
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in watched)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name that 4 and 5 both have
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_checkpointed_activations_leave_the_gradients_as_they_are(implementation):
    model = MambaVisionForImageClassification(tiny_config(attn_implementation=implementation)).train()
    assert model.supports_gradient_checkpointing
    x, labels = pictures(), torch.tensor([1, 2])

    def gradients():
        model.zero_grad()
        model(x, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(level.grad_checkpointing for level in model.model.levels)
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(level.grad_checkpointing for level in model.model.levels)


# ---- initialisation --------------------------------------------------------------------------------------------------


def check_initial(state_dict, layer_scale=1e-5):
    """Fail unless every tensor is what a new network starts with."""
    for name, tensor in state_dict.items():
        assert tensor.isfinite().all(), name
        if name.endswith("A_log"):
            torch.testing.assert_close(tensor, torch.arange(1.0, 9).log().expand_as(tensor))
        elif "gamma" in name:
            assert (tensor == layer_scale).all(), name
        elif name.endswith((".D", "running_var")) or ("norm" in name and name.endswith("weight")):
            assert (tensor == 1).all(), name
        elif name.endswith(("running_mean", "num_batches_tracked", "proj.bias", "qkv.bias", "fc1.bias", "head.bias")):
            assert (tensor == 0).all(), name
        elif name.endswith(("qkv.weight", "fc1.weight", "in_proj.weight", "head.weight")):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.25), name
        elif tensor.dim() == 4:  # PyTorch's own start: uniform within 1 / sqrt(fan-in)
            bound = 1 / math.sqrt(tensor[0].numel())
            assert 0.5 * bound < tensor.abs().max() <= bound, name


@every_model
def test_a_new_model_starts_as_a_new_network_does(model_class):
    check_initial(model_class(tiny_config()).state_dict())


@every_model
def test_what_a_checkpoint_lacks_is_initialised(model_class):
    check_initial(model_class.from_pretrained(None, config=tiny_config(), state_dict={}).state_dict())


def test_what_a_checkpoint_has_is_not_initialised_again(tmp_path):
    network = tiny_network()
    MambaVisionForImageClassification.from_network(network).save_pretrained(tmp_path)
    model = MambaVisionForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    expected = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if ".head." in name:
            assert len(tensor) == 3
        else:
            assert torch.equal(tensor, expected[name]), name
    check_initial({name: tensor for name, tensor in model.state_dict().items() if ".head." in name})

    # Half of a module: what is there stays.
    part = {name: tensor for name, tensor in expected.items() if not name.endswith((".D", "running_mean", "gamma_1"))}
    model = MambaVisionForImageClassification.from_pretrained(None, config=tiny_config(), state_dict=part)
    for name, tensor in part.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    check_initial({name: tensor for name, tensor in model.state_dict().items() if name not in part})


# ---- memory, types, copies, compilers --------------------------------------------------------------------------------


@every_model
def test_shapes_need_no_memory(model_class):
    with torch.device("meta"):
        model = model_class(MambaVisionConfig.from_network_config(VARIANTS["mamba_vision_L3_512_21k"]))
        output = model(torch.empty(1, 3, 512, 512))
    assert {tensor.device.type for tensor in (*model.state_dict().values(), *tensors(output))} == {"meta"}


@every_model
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_weights_come_in_the_type_and_to_the_device_that_is_asked_for(model_class, argument, tmp_path):
    pytest.importorskip("accelerate")
    saved = model_class(tiny_config())
    saved.save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, device_map={"": "cpu"}, **{argument: torch.bfloat16})
    floating = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.bfloat16}
    assert not model.training
    assert {tensor.dtype for tensor in tensors(model(pictures()))} == {torch.bfloat16}  # of float32 pictures
    assert {tensor.dtype for tensor in model_class.from_pretrained(tmp_path).parameters()} == {torch.float32}


@every_model
@pytest.mark.parametrize(
    "device_map",
    [
        {"model": "disk"},
        {"model.patch_embed": "cpu", "model.levels": "disk", "model.norm": "cpu", "model.head": "disk"},
    ],
    ids=["whole", "levels"],
)
def test_weights_that_stay_on_the_disk_give_the_same_outputs(model_class, device_map, tmp_path):
    pytest.importorskip("accelerate")
    saved = model_class(tiny_config()).eval()
    for name, parameter in saved.named_parameters():
        if name.endswith("dt_proj.bias"):
            torch.nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    device_map = {
        name: place for name, place in device_map.items() if name == "model" or hasattr(saved.model, name[6:])
    }
    model = model_class.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert model.model.levels[2].blocks[0].mixer.dt_proj.weight.is_meta
    x = pictures()
    for found, expected in zip(tensors(model(x)), tensors(saved(x)), strict=True):
        torch.testing.assert_close(found, expected)


@every_model
def test_copies_give_the_same_outputs(model_class, tmp_path):
    model, x = model_class(tiny_config()).eval(), pictures()
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(tensors(twin(x)), tensors(model(x)), strict=True))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_whole_model_compiles_into_one_graph(implementation):
    model, x = MambaVisionForImageClassification(tiny_config(attn_implementation=implementation)).eval(), pictures()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, model(x).logits)


@every_model
def test_the_model_exports_for_any_batch(model_class):
    model, x = model_class(tiny_config()).eval(), pictures()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (x,), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    five = pictures(5)
    for a, b in zip(tensors(program.module()(five)), tensors(model(five)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ---- backbone --------------------------------------------------------------------------------------------------------


def test_the_backbone_returns_the_stages_that_are_asked_for():
    network, x = tiny_network(), pictures(side=72)
    expected = [network.patch_embed(x), *network.forward_intermediates(x, intermediates_only=True)]
    for names in (["stem"], ["stage2"], ["stem", "stage1", "stage4"], None):
        model = MambaVisionBackbone(tiny_config(out_features=names)).eval()
        model.model.load_state_dict({k: v for k, v in network.state_dict().items() if "levels." in k or "embed" in k})
        output = model(x)
        taken = [model.stage_names.index(name) for name in names or ["stage4"]]
        assert all(torch.equal(a, expected[i]) for a, i in zip(output.feature_maps, taken, strict=True))
        assert model.channels == [tensor.shape[1] for tensor in output.feature_maps]
        states = model(x, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
        assert list(model.out_feature_channels.values()) == [tensor.shape[1] for tensor in expected]


def test_stages_can_be_named_by_number_and_changed():
    model = MambaVisionBackbone(tiny_config(out_indices=[1, 3])).eval()
    assert (model.out_features, model.out_indices) == (["stage1", "stage3"], [1, 3])
    model.out_features = ["stage2"]
    assert [tensor.shape[1] for tensor in model(pictures()).feature_maps] == [16]


def test_levels_that_nobody_asks_for_are_not_computed():
    model = MambaVisionBackbone(tiny_config(out_features=["stage2"])).eval()
    model.model.levels[2].register_forward_hook(lambda *_: pytest.fail("level 2 was computed"))
    model(pictures())


def test_a_network_of_ours_becomes_a_model_without_copies():
    network = create_model("mamba_vision_test_tiny", class_names=["a", "b", "c"])
    model = MambaVisionForImageClassification.from_network(network)
    assert model.model is network
    assert model.training is network.training
    assert (model.config.id2label, model.num_labels) == ({0: "a", 1: "b", 2: "c"}, 3)
