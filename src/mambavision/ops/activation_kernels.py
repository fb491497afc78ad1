"""The activations that end a fused op, in Triton."""

import triton
import triton.language as tl


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """v, float32, behind its activation."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    elif ACTIVATION == "gelu":
        # v times the normal distribution's integral; that is 1/2 + c P(c^2) with c = v cut to -4..4, within 4e-5.
        c = tl.minimum(tl.maximum(v, -4.0), 4.0)
        q = c * c
        p = 1.0419315793e-07 - 1.3012550407e-09 * q
        p = p * q - 3.6570475583e-06
        p = p * q + 7.4853741964e-05
        p = p * q - 0.0010064794476
        p = p * q + 0.0095053490788
        p = p * q - 0.065887738514
        p = p * q + 0.39867332159
        v = v * (0.5 + c * p)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) is the logistic function of 2 u.
        u = v * (1.5957691216057308 + 0.07135481282553245 * v * v)
        v = v / (1.0 + tl.exp2(-1.4426950408889634 * u))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp2(-1.4426950408889634 * v))
    return v
