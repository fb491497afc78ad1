"""Bring published weights to this machine through huggingface_hub: its cache, resume, offline mode and mirrors."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from pathlib import Path

from mambavision.files import replaced_when_done
from mambavision.weights.checkpoint import CheckpointError
from mambavision.weights.reading import HUB_MODEL
from mambavision.weights.table import WEIGHTS, WeightSpec

logger = logging.getLogger(__name__)


def fetch_weights(variant: str, *, model_path: str | os.PathLike[str] | None = None) -> Path:
    """File with the published weights of `variant`, downloaded when it is not here yet.

    The hub's own variables rule where and how: HF_HOME and HF_HUB_CACHE (cache), HF_HUB_OFFLINE (never connect),
    HF_ENDPOINT (mirror). The weights' license is logged once a process for each variant.

    Args:
        variant: name with a row in `WEIGHTS`.
        model_path: a file to use when it exists, and the place where the public `.pth.tar` is put when it does not.
            None takes the repository's safetensors file, or its `.pth.tar` when it has none, from the hub's cache.

    Raises:
        CheckpointError: when there are no such weights, or they cannot be reached.
    """
    if model_path is not None and (target := Path(model_path).expanduser()).exists():
        return target
    spec = WEIGHTS.get(variant)
    if spec is None:
        raise CheckpointError(f"There are no published weights for {variant}; there are for {', '.join(WEIGHTS)}.")
    if spec.repo_id is None or spec.pth_name is None:
        return _shipped_file(spec, model_path)
    if model_path is None:
        return _download(spec, spec.repo_id, (HUB_MODEL, spec.pth_name))
    archive = _download(spec, spec.repo_id, (spec.pth_name,))
    with replaced_when_done(target) as temporary:
        shutil.copyfile(archive, temporary)
    return target


def _shipped_file(spec: WeightSpec, model_path: str | os.PathLike[str] | None) -> Path:
    if model_path is not None:
        raise CheckpointError(
            f"There is no file {model_path}, and {spec.variant} ships in the package: omit model_path."
        )
    if not spec.asset.is_file():
        raise CheckpointError(f"The package lacks its file {spec.asset.name}; install it again.")
    return spec.asset


def _download(spec: WeightSpec, repo_id: str, names: tuple[str, ...]) -> Path:
    """The first of `names` that the repository has, in the hub's cache."""
    from huggingface_hub import constants, hf_hub_download  # here, because importing it takes a while
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    reason, disconnected = "", False
    cause: Exception | None = None
    for name in names:
        try:
            # After one failure to connect, only the cache is asked: the hub retries for half a minute each time.
            path = Path(hf_hub_download(repo_id, name, local_files_only=disconnected))
        except LocalEntryNotFoundError as error:
            offline = "offline mode is on (HF_HUB_OFFLINE)"
            reached = offline if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} gave no usable answer"
            reason = f"{reached} and the cache {constants.HF_HUB_CACHE} has no {' or '.join(names)}"
            cause, disconnected = cause or error, True
        except EntryNotFoundError as error:
            reason, cause = f"the repository has no {' or '.join(names)}", error
        except HfHubHTTPError as error:
            answer = f"the hub answered {type(error).__name__}, {str(error).splitlines()[0]}"
            raise CheckpointError(_unreachable(spec, answer)) from error
        else:
            say_license(spec)
            return path
    raise CheckpointError(_unreachable(spec, reason)) from cause


def _unreachable(spec: WeightSpec, reason: str) -> str:
    return (
        f"The weights of {spec.variant} cannot be fetched from {spec.repo_id}: {reason.rstrip('.')}; "
        f"pass a file that you have as model_path or checkpoint_path, or try again when connected."
    )


@functools.cache
def say_license(spec: WeightSpec) -> None:
    """Log the license of published weights, once a process."""
    # A warning, so that it is seen where logging is not set up.
    logger.warning("The weights of %s (%s) are licensed %s.", spec.variant, spec.url, spec.license)
