"""What an adapter makes of its matrix, in numpy float64, from the papers: LoRA arXiv:2106.09685, DoRA arXiv:2402.09353."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def adapted(w: np.ndarray, a: np.ndarray, b: np.ndarray, m: np.ndarray | None, s: float, out: int) -> np.ndarray:
    """W + s B A, and with magnitudes m the direction of each of its rows times m. w [out..., in...], `out` dims of it
    outputs; a [r, in...]; b [out..., r]; m [out...]."""
    rows, columns = math.prod(w.shape[:out]), math.prod(w.shape[out:])
    r = a.shape[0]
    made = w.astype(np.float64).reshape(rows, columns).copy()
    for i in range(rows):
        for j in range(r):
            made[i] += s * float(b.reshape(rows, r)[i, j]) * a.reshape(r, columns)[j].astype(np.float64)
        if m is not None:
            made[i] *= float(m.reshape(rows)[i]) / math.sqrt(float((made[i] ** 2).sum()))
    return made.reshape(w.shape)


def all_adapted(
    base: Mapping[str, np.ndarray], adapters: Mapping[str, Any], config: Any, params: Any
) -> dict[str, Any]:
    """Every parameter of the base by our name, float64, those with an adapter changed; s from the config's fields."""
    made = {name: array.astype(np.float64) for name, array in base.items()}
    for name, one in adapters.items():
        rank, alpha = config.rank_pattern.get(name, config.rank), config.alpha_pattern.get(name, config.alpha)
        s = alpha / (rank**0.5 if config.rslora else rank)
        made[name] = adapted(base[name], one.a, one.b, one.magnitude, s, params[name].out)
    return made
