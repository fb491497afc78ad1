"""Put the tensors of a checkpoint into a network: strictly, and saying every adaptation."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from mambavision.weights.checkpoint import CheckpointError, listed
from mambavision.weights.reading import FIRST_CONV, HEAD

logger = logging.getLogger(__name__)

# Parts that a features-only backbone does not have.
CLASSIFIER_PARTS = ("norm.", "head.")


def load_weights(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, allow_head_change: bool = False
) -> list[str]:
    """Load every tensor into `model`; a name too many or too few, or another shape, is an error.

    Three differences are adapted to, and said: a first convolution for another number of input channels (see
    `adapt_first_conv`), a classifier for another number of classes, when `allow_head_change`, and a classifier that
    `model` does not have. Stored types are converted to the model's. A model on the meta device receives the tensors
    themselves, on the CPU.

    Args:
        model: a network with the state-dict names of `MambaVision` or `MambaVisionBackbone`.
        state_dict: tensors as `read_checkpoint` returns them.
        allow_head_change: leave the model's own, freshly initialised classifier in place when the checkpoint has
            none or one for another number of classes.

    Returns:
        One sentence for each adaptation, as logged.

    Raises:
        CheckpointError: listing the names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    given = dict(state_dict)
    said = _drop_absent_parts(own, given)
    kept: list[str] = []
    if _has_other_head(own, given):
        if not allow_head_change:
            raise CheckpointError(
                f"The checkpoint classifies into {_classes(given)} classes and the model into {_classes(own)}; "
                f"give num_classes to replace the head on purpose."
            )
        said.append(
            f"The checkpoint's head for {_classes(given)} classes is dropped; "
            f"the one for {_classes(own)} classes is freshly initialised and needs training."
        )
        kept = [name for name in own if name.startswith("head.")]
        given = {name: tensor for name, tensor in given.items() if not name.startswith("head.")}
    if (convolution := _adapted_first_conv(own, given)) is not None:
        before, after = given[FIRST_CONV].shape[1], convolution.shape[1]
        given[FIRST_CONV] = convolution
        said.append(f"{FIRST_CONV} is adapted from {before} to {after} input channel{'s' if after > 1 else ''}.")

    check_fit(type(model).__name__, {name: own[name] for name in own if name not in kept}, given)
    if empty := [name for name in kept if own[name].is_meta]:
        raise CheckpointError(f"{listed(empty)} would stay on the meta device without values; use another device.")
    if any(tensor.is_meta for tensor in own.values()):
        given = {name: _like(tensor, own[name]) for name, tensor in given.items()}
        model.load_state_dict({**own, **given}, strict=True, assign=True)
    else:
        model.load_state_dict({**own, **given}, strict=True)
    for sentence in said:
        logger.warning(sentence)  # a warning, so that it is seen where logging is not set up
    return said


def adapt_first_conv(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Weights of a convolution over 3 channels for `in_chans` channels, as timm adapts them.

    One channel gets the sum over the three, which is exact for a grey picture given as three equal channels. More
    channels repeat the three and are scaled by 3 / in_chans, which keeps the scale of the output.

    Args:
        weight: (out, 3, height, width), any floating-point type.
        in_chans: channels of the new input, at least 1.

    Returns:
        (out, in_chans, height, width) in the type of `weight`.
    """
    exact = weight.float()  # sums in half precision would round
    if in_chans == 1:
        adapted = exact.sum(dim=1, keepdim=True)
    else:
        repeats = -(-in_chans // 3)
        adapted = exact.repeat(1, repeats, 1, 1)[:, :in_chans] * (3 / in_chans)
    return adapted.to(weight.dtype)


def _drop_absent_parts(own: Mapping[str, torch.Tensor], given: dict[str, torch.Tensor]) -> list[str]:
    """Remove from `given` what belongs to a classifier part that the model does not have."""
    dropped = [
        name
        for part in CLASSIFIER_PARTS
        if not any(name.startswith(part) for name in own)
        for name in given
        if name.startswith(part)
    ]
    for name in dropped:
        del given[name]
    return [f"The model has no place for {listed(dropped)}; they are dropped."] if dropped else []


def _classes(state_dict: Mapping[str, torch.Tensor]) -> int:
    return len(state_dict[HEAD]) if HEAD in state_dict else 0


def _has_other_head(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> bool:
    return HEAD in own and _classes(own) != _classes(given)


def _adapted_first_conv(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The first convolution for the model's channels, or None when it fits already."""
    if FIRST_CONV not in own or FIRST_CONV not in given:
        return None
    channels, wanted = given[FIRST_CONV].shape[1], own[FIRST_CONV].shape[1]
    if channels == wanted:
        return None
    if channels != 3:
        raise CheckpointError(
            f"The checkpoint is for pictures of {channels} channel{'s' if channels > 1 else ''} and the model for "
            f"{wanted}; only weights for 3 channels can be adapted: create the model with in_chans={channels}."
        )
    return adapt_first_conv(given[FIRST_CONV], wanted)


def check_fit(model: str, own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """CheckpointError unless `given` has the names and shapes of `own`, the state dict of a `model`."""
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    other = [
        f"{name} (checkpoint {tuple(given[name].shape)}, model {tuple(own[name].shape)})"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {label}: {listed(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit {model}, check that both are the same variant; {'; '.join(problems)}."
        )


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`tensor` in the type of `target` and on its device, if that one holds values."""
    return tensor.to(dtype=target.dtype, device=tensor.device if target.is_meta else target.device)
