"""GPTQ in numpy float64, a column at a time, by Gaussian elimination of the inverse Hessian (arXiv:2210.17323, equations 2 and
3): no Cholesky factor, no blocks, every update made at once.

    w_j -= (w_i - q_i) / [H^-1]_ii [H^-1]_ij        H^-1 -= [H^-1]_:i [H^-1]_i: / [H^-1]_ii
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Steps = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # a group's columns [O, G] -> (steps [O], zeros [O])


class Chosen(NamedTuple):
    """codes [O, I] in the order in which they were chosen; order [I]; held [O, I] in the matrix's own order; steps [O, NG];
    slack: of the nearest w / s to a tie."""

    codes: np.ndarray
    order: np.ndarray
    held: np.ndarray
    steps: np.ndarray
    slack: float


def gptq(
    w: Any, H: Any, steps: Steps, *, group: int, bits: int, damping: float = 0.01, ordered: bool = False
) -> Chosen:
    """Round w [O, I] for the Hessian H [I, I]."""
    w, H = np.array(w, np.float64), np.array(H, np.float64)
    I = len(H)  # noqa: E741
    order = np.argsort(-np.diagonal(H), kind="stable") if ordered else np.arange(I)
    w, H = w[:, order], H[np.ix_(order, order)]
    inverse = np.linalg.inv(H + damping * np.mean(np.diagonal(H)) * np.eye(I))
    codes, held, all_steps, slack = np.zeros_like(w), np.zeros_like(w), [], 1.0
    s = z = np.zeros(len(w))
    for i in range(I):
        if i % group == 0:
            s, z = steps(w[:, i : i + group])
            all_steps.append(s)
        exact = w[:, i] / s + z
        inside = np.clip(exact, 0, 2**bits - 1)
        slack = min(slack, float(np.abs(np.abs(inside) % 1 - 0.5).min()))
        codes[:, i] = np.clip(np.round(exact), 0, 2**bits - 1)
        held[:, i] = s * (codes[:, i] - z)
        error = (w[:, i] - held[:, i]) / inverse[i, i]
        w -= np.outer(error, np.where(np.arange(I) > i, inverse[i], 0.0))
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # eliminated; never read again but for its rounding
    back = np.argsort(order)
    return Chosen(codes, order, held[:, back], np.stack(all_steps, 1), slack)


def lost(w: Any, held: Any, x: Any) -> float:
    """The part of the power of x w^T that is lost, x [N, I]."""
    w, held, x = (np.asarray(a, np.float64) for a in (w, held, x))
    return float((((held - w) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum())
