"""Attention by positions in numpy float64: one loop over batch, one over queries, one over heads.

    out_t = sum_s softmax_s( cap( scale q_t . k_s ) ) v_s        over the slots s that t sees (arXiv:1706.03762)

Query t at position p sees slot s at position r when both hold something (are not negative), r <= p, and under a window
W also r > p - W, the Hugging Face convention. Query head n reads kv head n // (N / K) (GQA, arXiv:2305.13245).

Beside the result comes how far a 16- or 32-bit implementation may be from it, by running error analysis: inputs are
exact in their dtype; scores, softmax and the weighted sum are float32; the softmax's weights are rounded to the inputs'
dtype once before the weighted sum, and the result once more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

U = 2.0**-24  # float32's unit roundoff
FUNCTION = 8 * U  # what exp and tanh may be off: relative, and relative to 1


class Attended(NamedTuple):
    """out [B, T, N, H], NaN where a query sees nothing; bound: elementwise, on an implementation's distance from it."""

    out: np.ndarray
    bound: np.ndarray


def sees(p: int, r: int, window: int | None) -> bool:
    """Whether a query at position p sees a key at position r."""
    return p >= 0 and 0 <= r <= p and (window is None or r > p - window)


def attention(
    q: Any,
    k: Any,
    v: Any,
    q_positions: Any,
    k_positions: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dtype: Any = np.float32,
    summed: int | None = None,
) -> Attended:
    """q [B, T, N, H]; k, v [B, K, S, H]; positions [B, T] and [B, S].

    dtype: what the implementation works in; summed: how many slots its sums run over, empty ones with them (default S).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    info = ml_dtypes.finfo(dtype)
    u, tiny = float(info.eps) / 2, float(info.tiny)
    B, T, N, H = q.shape
    S = k.shape[2] if summed is None else summed
    group = N // k.shape[1]
    out, bound = np.full(q.shape, np.nan), np.full(q.shape, np.nan)
    for b in range(B):
        for t in range(T):
            p = int(q_positions[b][t])
            slots = [s for s, r in enumerate(k_positions[b]) if sees(p, int(r), window)]
            for n in range(N if slots else 0):
                scores, errors = [], []
                for s in slots:
                    product = scale * q[b, t, n] * k[b, n // group, s]
                    score, error = math.fsum(product), (H + 3) * U * math.fsum(abs(product))
                    if softcap is not None:
                        error += 3 * U * abs(score)
                        score = softcap * math.tanh(score / softcap)
                        error += (FUNCTION + 3 * U) * softcap
                    scores.append(score)
                    errors.append(error)
                top = max(scores)
                mass = np.array([math.exp(score - top) for score in scores])
                weights = mass / math.fsum(mass)
                # relative: the exponents' errors in numerator and denominator, exp, the sum, the division
                exponent = 2 * max(errors) + U * (top - min(scores))
                relative = math.expm1(2 * exponent + 2 * FUNCTION + (S + 2) * U)
                values = v[b, n // group, slots]
                out[b, t, n] = weights @ values
                magnitude = weights @ abs(values)
                inside = magnitude * (relative + u + (S + 1) * U) * (1 + relative)
                inside = inside + tiny * abs(values).sum(0)  # weights below the smallest normal number may be flushed
                bound[b, t, n] = inside + u * (abs(out[b, t, n]) + inside)
    return Attended(out, bound)
