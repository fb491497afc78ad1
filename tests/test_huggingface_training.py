"""Trainer, and transformers' models for segmentation and detection over our backbone."""

# ruff: noqa: E402  (what comes after the check for transformers needs it)
import pytest
import torch

transformers = pytest.importorskip("transformers")

from huggingface_models import pictures, tiny_config
from mambavision.integrations.huggingface import MambaVisionBackbone, MambaVisionForImageClassification

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Blobs(torch.utils.data.Dataset):
    """Pictures of noise with one quarter brighter; which one is the label."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(4, (count,), generator=generator)
        self.pictures = 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
        for picture, label in zip(self.pictures, self.labels.tolist(), strict=True):
            top, left = 16 * (label // 2), 16 * (label % 2)
            picture[:, top : top + 16, left : left + 16] += 1.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pictures[index], "labels": self.labels[index]}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_raises_the_accuracy_and_its_checkpoint_gives_it_again(tmp_path):
    pytest.importorskip("accelerate")
    model = MambaVisionForImageClassification(tiny_config(num_labels=4, layer_scale=0.1, layer_scale_conv=0.1))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Blobs(640, seed=1),
        eval_dataset=Blobs(128, seed=2),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.5
    assert after > 0.9
    trainer.save_model(str(tmp_path / "model"))
    trainer.model = MambaVisionForImageClassification.from_pretrained(tmp_path / "model")
    again = transformers.Trainer(model=trainer.model, args=arguments, compute_metrics=accuracy)
    assert again.evaluate(Blobs(128, seed=2))["eval_accuracy"] == after


def step(model, backbone, loss):
    """Fail unless a step of gradient descent reaches every weight of the backbone and moves most of them."""
    before = [parameter.detach().clone() for parameter in backbone.parameters()]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = [not torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2  # biases in front of a batch norm have no effect, others little


@pytest.fixture
def upernet():
    config = transformers.UperNetConfig(
        backbone_config=tiny_config(out_features=STAGES, layer_scale=0.1),
        hidden_size=8,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=3,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def test_upernet_segments(upernet):
    assert type(upernet.backbone) is MambaVisionBackbone
    output = upernet.train()(pictures(), labels=torch.randint(3, (2, 64, 64)))
    assert output.logits.shape == (2, 3, 64, 64)
    step(upernet, upernet.backbone, output.loss)


def test_settings_of_the_whole_model_reach_the_backbone(upernet, tmp_path):
    upernet.eval().set_attn_implementation("eager")
    output = upernet(pictures(), output_attentions=True, output_hidden_states=True)
    assert (len(output.attentions), len(output.hidden_states)) == (2, 5)
    upernet.save_pretrained(tmp_path)
    x = pictures()
    again = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x).logits, upernet(x).logits)


def test_mask2former_segments():
    pytest.importorskip("scipy")
    config = transformers.Mask2FormerConfig(
        backbone_config=tiny_config(out_features=STAGES, layer_scale=0.1),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        train_num_points=32,
        num_labels=3,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).train()
    masks = torch.zeros(2, 64, 64)
    masks[:, :32] = 1
    output = model(pictures(), mask_labels=list(masks[:, None]), class_labels=[torch.tensor([1])] * 2)
    step(model, model.model.pixel_level_module.encoder, output.loss)


@pytest.mark.parametrize("frozen", [True, False])
def test_rt_detr_detects(frozen):
    pytest.importorskip("scipy")
    config = transformers.RTDetrConfig(
        backbone_config=tiny_config(out_features=STAGES[1:], layer_scale=0.1),
        freeze_backbone_batch_norms=frozen,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 32, 64],
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=10,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=3,
    )
    model = transformers.RTDetrForObjectDetection(config).train()
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    step(model, model.model.backbone, model(pictures(), labels=[target, target]).loss)
