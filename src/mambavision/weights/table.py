"""Published weights, one row a variant: where they are, under which license, and what they reached.

The numbers of the public weights are those of the paper (arXiv 2407.08083, table 1) and of their model cards:
accuracy in percent on the validation pictures of ImageNet-1K. Those weights are not ours: they are fetched by the
user, never shipped. The numbers of our own small model are read from the record that lies beside its file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
PUBLIC_LICENSE = "CC-BY-NC-SA-4.0"
HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """Weights of one variant.

    Attributes:
        variant: name of the variant in `mambavision.config.VARIANTS`.
        repo_id: Hugging Face repository, or None when the weights ship in the package.
        pth_name: name of the `.pth.tar` archive in that repository, or None when the weights ship in the package.
        license: SPDX identifier of the weights' license; the code's license is another matter.
        trained_on: data sets the weights have seen, in order.
        top1: accuracy in percent on the last of these data sets' test or validation pictures; None when unknown.
        top5: the same, counting the five likeliest classes.
        parameters: number of parameters.
        gmacs: multiply-adds of one picture at the variant's own resolution, in 1e9.
        class_names: name of each output, or None for the classes of ImageNet-1K.
    """

    variant: str
    repo_id: str | None
    pth_name: str | None
    license: str
    trained_on: str
    top1: float | None
    top5: float | None
    parameters: int | None
    gmacs: float | None
    class_names: tuple[str, ...] | None = None

    @property
    def url(self) -> str | None:
        """Web page of the weights, or None when they ship in the package."""
        return None if self.repo_id is None else f"{HUB}/{self.repo_id}"

    @property
    def asset(self) -> Path:
        """Where the file lies when the weights ship in the package."""
        return ASSETS / f"{self.variant}.safetensors"


def _public(
    variant: str, repository: str, archive: str, top1: float, top5: float, parameters: int, gmacs: float
) -> WeightSpec:
    return WeightSpec(
        variant=variant,
        repo_id=f"nvidia/MambaVision-{repository}",
        pth_name=f"mambavision_{archive}.pth.tar",
        license=PUBLIC_LICENSE,
        trained_on="ImageNet-21K, ImageNet-1K" if repository.endswith("21K") else "ImageNet-1K",
        top1=top1,
        top5=top5,
        parameters=parameters,
        gmacs=gmacs,
    )


def _shipped(variant: str, trained_on: str) -> WeightSpec:
    try:
        record = json.loads((ASSETS / f"{variant}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # a source tree in which the model has not been trained yet
        record = {}
    return WeightSpec(
        variant=variant,
        repo_id=None,
        pth_name=None,
        license="Apache-2.0",
        trained_on=trained_on,
        top1=record.get("top1"),
        top5=record.get("top5"),
        parameters=record.get("parameters"),
        gmacs=record.get("gmacs"),
        class_names=tuple(record["per_class"]) if "per_class" in record else None,
    )


_ROWS = (
    # variant, repository, archive, top-1, top-5, parameters, GMACs
    _public("mamba_vision_T", "T-1K", "tiny_1k", 82.3, 96.2, 31_794_248, 4.4),
    _public("mamba_vision_T2", "T2-1K", "tiny2_1k", 82.7, 96.3, 35_104_008, 5.1),
    _public("mamba_vision_S", "S-1K", "small_1k", 83.3, 96.5, 50_140_584, 7.5),
    _public("mamba_vision_B", "B-1K", "base_1k", 84.2, 96.9, 97_685_288, 15.0),
    _public("mamba_vision_B_21k", "B-21K", "base_21k", 84.9, 97.5, 97_685_288, 15.0),
    _public("mamba_vision_L", "L-1K", "large_1k", 85.0, 97.1, 227_961_048, 34.9),
    _public("mamba_vision_L_21k", "L-21K", "large_21k", 86.1, 97.9, 227_961_048, 34.9),
    _public("mamba_vision_L2", "L2-1K", "large2_1k", 85.3, 97.2, 241_554_824, 37.5),
    _public("mamba_vision_L2_512_21k", "L2-512-21K", "L2_21k_240m_512", 87.3, 98.4, 241_554_824, 196.3),
    _public("mamba_vision_L3_256_21k", "L3-256-21K", "L3_21k_740m_256", 87.3, 98.3, 739_570_472, 122.3),
    _public("mamba_vision_L3_512_21k", "L3-512-21K", "L3_21k_740m_512", 88.1, 98.6, 739_570_472, 489.1),
    _shipped("mamba_vision_nano_32", "CIFAR-10"),
)

WEIGHTS: dict[str, WeightSpec] = {row.variant: row for row in _ROWS}
