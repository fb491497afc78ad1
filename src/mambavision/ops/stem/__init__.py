"""The stem: two 3x3 convolutions with ReLU, from a picture to the first map."""

from __future__ import annotations

from torch import Tensor

from mambavision.ops.backend import Backend, Situation, check_shapes, refuse_inference_kernels, select, situation_of
from mambavision.ops.stem.reference import stem_reference


def _triton(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, strides: tuple[int, int]
) -> Tensor:
    from mambavision.ops.stem.triton_op import stem

    y: Tensor = stem(x, weight1, bias1, weight2, bias2, *strides)
    return y


def _refuse_kernel(situation: Situation) -> str | None:
    middle = situation.width
    if middle < 16 or middle & (middle - 1):
        return f"its kernel takes 16, 32, 64, ... middle channels, not {middle}"
    return refuse_inference_kernels(situation)


BACKENDS = (
    Backend("triton", _triton, "GPU kernel", _refuse_kernel),
    Backend("reference", stem_reference, "plain PyTorch, runs and exports everywhere", lambda _: None),
)


def stem(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    strides: tuple[int, int] = (2, 2),
    backend: str = "auto",
) -> Tensor:
    """ReLU(conv(ReLU(conv(x)))) with padding 1, for inference (paper, section 3.1).

    Args:
        x: pictures, (batch, colours, H, W), of any floating type and memory order.
        weight1: (middle, colours, 3, 3); its type is that of the arithmetic and of the result. The kernel takes 16, 32,
            64, ... middle channels.
        bias1: (middle,).
        weight2: (columns, middle, 3, 3).
        bias2: (columns,).
        strides: of the two convolutions.
        backend: `auto`, or the name of one of `BACKENDS`.

    Returns:
        (batch, columns, H / strides, W / strides), each side rounded up, in the type of the weights.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    middle, columns = weight1.shape[0], weight2.shape[0]
    check_shapes(
        weight1=(weight1, (middle, x.shape[1], 3, 3)),
        bias1=(bias1, (middle,)),
        weight2=(weight2, (columns, middle, 3, 3)),
        bias2=(bias2, (columns,)),
    )
    differentiated = situation_of(x, weight1, weight2).differentiated
    situation = Situation(x.device.type, weight1.dtype, width=middle, differentiated=differentiated)
    choice = select("stem", BACKENDS, situation, backend)
    return choice.backend.function(x, weight1, bias1, weight2, bias2, strides)


__all__ = ["BACKENDS", "stem"]
