"""The optimizers' update rules, each once, on float32 values in registers, whatever states are held in. Contract: :mod:`q_core.ops.optim`.

``m``, ``v`` and ``slow`` are state1, state2 and state3; ``h`` are the host's :class:`q_triton.optim.Settings`. What a rule has no use for
is passed through.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def average(state, value, beta, rest):
    return beta * state + rest * value


@triton.jit
def over_root(x, v, correction, h, TINY_EPS: tl.constexpr):
    """``x / (sqrt(v) * correction + eps)``; zero over zero, where eps is 0, is zero: what gets no gradient doesn't move.

    An eps that isn't tiny keeps the denominator away from 0, so that a GPU's approximate roots serve, which take a subnormal v for 0. With
    a tiny one the precise ones are worth their ten times more instructions.
    """
    if TINY_EPS:
        result = tl.where(x == 0.0, 0.0, tl.div_rn(x, tl.sqrt_rn(v) * correction + h.eps))
    else:
        inverse_root = tl.rsqrt(tl.sqrt(v) * correction + h.eps)
        result = x * inverse_root * inverse_root
    return result


@triton.jit
def lamb(p, g, m, v, h, TINY_EPS: tl.constexpr):
    """LAMB's direction, before its trust ratio, and the moments."""
    m = average(m, g, h.beta1, h.rest1)
    v = average(v, g * g, h.beta2, h.rest2)
    return over_root(m * h.correction, v, h.root_correction, h, TINY_EPS) + h.weight_decay * p, m, v


@triton.jit
def heavy_ball(p, g, m, h, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr):
    direction = g
    if MOMENTUM:
        m = g if FIRST else average(m, g, h.beta1, h.undamped)
        direction = m
        if NESTEROV:
            direction = g + h.beta1 * m
    return p - h.lr * direction, m


@triton.jit
def updated(
    p, g, m, v, slow, ratio, h,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr, TINY_EPS: tl.constexpr,
):  # fmt: skip
    """A parameter and its states after a step; ``ratio`` is the trust ratio of lamb and lars."""
    if RULE == "lion":
        direction = average(m, g, h.beta1, h.rest1)
        sign = tl.where(direction > 0.0, 1.0, 0.0) - tl.where(direction < 0.0, 1.0, 0.0)
        p = p * h.decay - h.lr * sign
        m = average(m, g, h.beta2, h.rest2)
    elif RULE == "lamb":
        direction, m, v = lamb(p, g, m, v, h, TINY_EPS)
        p = p - h.lr * ratio * direction
    elif RULE == "lars":
        p, m = heavy_ball(p, (g + h.weight_decay * p) * ratio, m, h, MOMENTUM, NESTEROV, FIRST)
    elif RULE == "sgd":
        p, m = heavy_ball(p, g + h.weight_decay * p, m, h, MOMENTUM, NESTEROV, FIRST)
    elif RULE == "adagrad":
        g = g + h.weight_decay * p
        v = v + g * g
        p = p - h.lr * over_root(g, v, 1.0, h, TINY_EPS)
    elif RULE == "rmsprop":
        g = g + h.weight_decay * p
        v = average(v, g * g, h.beta2, h.rest2)
        direction = over_root(g, v, 1.0, h, TINY_EPS)
        if MOMENTUM:
            m = h.beta1 * m + direction
            direction = m
        p = p - h.lr * direction
    else:
        if RULE == "adam":
            g = g + h.weight_decay * p
        else:
            p = p * h.decay
        m = average(m, g, h.beta1, h.rest1)
        v = average(v, g * g, h.beta2, h.rest2)
        direction = m * h.correction
        if RULE == "ademamix":
            slow = average(slow, g, h.beta3, h.rest3)
            direction += h.alpha * slow
        p = p - h.lr * over_root(direction, v, h.root_correction, h, TINY_EPS)
    return p, m, v, slow


@triton.jit
def norm_terms(p, g, m, v, h, RULE: tl.constexpr, TINY_EPS: tl.constexpr):
    """What a trust ratio takes the norms of, its numerator's and its denominator's."""
    if RULE == "lamb":
        g, m, v = lamb(p, g, m, v, h, TINY_EPS)
    return p, g
