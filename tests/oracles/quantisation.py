"""Symmetric round-to-nearest quantisation in numpy float64 (LLM.int8's absmax form, arXiv:2208.07339, section 2.1).

    s = max |w| / levels        q = round(w / s)

An implementation in float32 may round the other way where w / s is within its own rounding of a tie, so the oracle also
tells how far each element is from one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

U = 2.0**-24  # float32's unit roundoff


class Quantised(NamedTuple):
    """codes: integers as float64; scale: with the shape of w, reduced dims 1; slack: of w / s to the nearest tie."""

    codes: np.ndarray
    scale: np.ndarray
    slack: np.ndarray


def symmetric(w: Any, dims: tuple[int, ...], levels: int = 127) -> Quantised:
    """Quantise w with one scale over `dims`; codes -levels..levels; what is all zero has codes 0."""
    w = np.asarray(w, np.float64)
    largest = np.abs(w).max(axis=dims, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0) / levels
    exact = w / scale
    codes = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    return Quantised(codes, scale, np.abs(np.abs(exact) % 1 - 0.5))


def tie_width(levels: int = 127) -> float:
    """How near a tie float32 may go either way: the scale and w / s are each a rounding or two off, relative to at most
    `levels`."""
    return 4 * U * levels
