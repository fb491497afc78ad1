"""The activations that end a fused op, in Triton."""

import triton
import triton.language as tl


@triton.jit
def normal_integral(v):
    """The normal distribution's integral up to v, float32, 0 below -4.4; v times it is within 6e-5 of GELU."""
    # 1/2 + c P(c^2) with c = v cut to -4.4..4.4.
    c = tl.minimum(tl.maximum(v, -4.4), 4.4)
    q = c * c
    p = 3.5694515380e-11 * q - 3.7540672379e-09
    p = p * q + 1.7408534818e-07
    p = p * q - 4.7248793827e-06
    p = p * q + 8.4293133157e-05
    p = p * q - 1.0549932114e-03
    p = p * q + 9.6430303940e-03
    p = p * q - 6.6076433981e-02
    p = p * q + 0.39876161186
    return tl.where(v < -4.4, 0.0, 0.5 + c * p)


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """v, float32, behind its activation."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        v = v * normal_integral(v)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) is the logistic function of 2 u, 2^(2 u / ln 2) over 1 more than that.
        v = v / (1.0 + tl.exp2(v * (-2.3022081981 - 0.1029432346 * (v * v))))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp2(-1.4426950408889634 * v))
    return v


@triton.jit
def slope(v, ACTIVATION: tl.constexpr):
    """The derivative of an activation at v, float32."""
    d = tl.full(v.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        d = tl.where(v > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu_tanh":
        square = v * v
        logistic = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v * (1.5957691216057308 + 0.07135481282553245 * square)))
        d = logistic + v * logistic * (1.0 - logistic) * (1.5957691216057308 + 0.21406443847659735 * square)
    return d
