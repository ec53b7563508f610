"""Integer codes in groups, in numpy float64, a group at a time: which step is the least, and where a code stands.

A group of numbers between -a and b is held within s / 2 by codes 0 .. 2^bits - 1 with zero z when

    a <= (z + 1/2) s        b <= (2^bits - 1/2 - z) s

`least` tries every zero that there may be and both signs, and rounds the step up to its dtype by walking through the dtype's
numbers. `word_of` is the layout written as its definition, for one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


class Group(NamedTuple):
    """step: signed, as stored; bounds: the step before it was rounded, of each zero that there may be."""

    step: float
    bounds: dict[float, float]


def rounded_up(s: float, dtype: str) -> float:
    """The least number of a dtype that is s or more."""
    near = np.array(s, DTYPES[dtype])
    if float(near) < s:
        near = np.nextafter(near, np.array(np.inf, DTYPES[dtype]))
    assert float(near) >= s
    return float(near)


def least(numbers: Any, bits: int, zeros: Sequence[float] | None, dtype: str) -> Group:
    """The least step for some numbers; zeros: those there may be, None for the middle code and either sign."""
    a, b = max(0.0, -float(np.min(numbers))), max(0.0, float(np.max(numbers)))
    middle, last, bounds = 2.0 ** (bits - 1), 2.0**bits - 1, {}
    for z in [middle] if zeros is None else zeros:
        low, high = (max(a, b), min(a, b)) if zeros is None else (a, b)
        if (low > 0 and z + 0.5 <= 0) or (high > 0 and last + 0.5 - z <= 0):
            continue
        bounds[z] = max(low / (z + 0.5) if low else 0.0, high / (last + 0.5 - z) if high else 0.0)
    step = rounded_up(min(bounds.values()), dtype)
    return Group(-step if zeros is None and b > a else step, bounds)


def word_of(k: int, bits: int, group_size: int) -> tuple[int, int]:
    """(word, lowest bit) of input k's code in a plane of so many bits."""
    words = group_size * bits // 16
    for r in range(words):
        for j in range(16 // bits):
            if k % group_size == r + j * words:
                return k // group_size * words + r, bits * j
    raise AssertionError(k)


def error(w: np.ndarray, held: np.ndarray) -> float:
    """Mean square error over mean square."""
    return float(((w - held) ** 2).mean() / (w**2).mean())


def by_rule(w: np.ndarray, bits: int, rule: str) -> np.ndarray:
    """Groups [N, G] as the usual rules of symmetric quantisation hold them.

    "levels": max|w| / (2^(bits-1) - 1), the textbook's. "half": max|w| / (2^(bits-1) - 1/2), qwix's get_symmetric_bound and
    AQT's. "extreme": the number of largest magnitude to the first code, ggml's quantize_row_q4_0_ref.
    """
    half = 2.0 ** (bits - 1)
    largest = np.take_along_axis(w, np.abs(w).argmax(-1, keepdims=True), -1)
    step = {"levels": abs(largest) / (half - 1), "half": abs(largest) / (half - 0.5), "extreme": -largest / half}[rule]
    return np.clip(np.round(w / step), -half, half - 1) * step
