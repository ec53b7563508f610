"""int2: codes 0..3 with a scale for each group of inputs.

    w ~ s (q - 2)        affine: w ~ s (q - z), z a multiple of 1/16

`_grouped.py` says how steps are chosen and what the scale's dtype bounds. Four codes around a whole zero are uneven, one
below and two above or the other way round; affine puts the zero between two where that is nearer (a quarter of the error
of normal numbers less), so that a weight of exactly 0 is held within half a step like any other. It holds the largest numbers on
both sides half a step too small, which a model may feel more than the error says (scripts/LOG.md). Bits per weight: 2 + 16 /
group_size, 2.5 at the defaults; affine pays that fraction twice. Rounding to nearest in 2 bits loses much: a seventh of a
normal matrix's power. It is for weights that were calibrated or trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from jaxengine.weights import _grouped

OPTIONS = {"group_size": (16, 32, 64, 128, 256), "affine": (False, True), "scale": _grouped.SCALES}
GRID = 1 / 16  # of zeros: with 6 significant bits at most they are exact in every dtype of scales


def encode(
    w: Array, *, out: int, group_size: int = 32, affine: bool = False, scale: str = "bfloat16"
) -> _grouped.Grouped:
    """Quantise w [out..., in...] to 2 bits. scale: the dtype of scales and zeros."""
    grid = GRID if affine else None
    return _grouped.encode(w, out=out, bits=2, group_size=group_size, scale=scale, grid=grid)


def pack(codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None) -> _grouped.Grouped:
    """The Weight of codes that were chosen elsewhere: uint8 [out..., I], scale and zero [out..., groups].

    numpy in, numpy out; `_grouped.packed` says more. Raises ValueError for a perm: a plan has no name for one here.
    """
    if perm is not None:
        raise ValueError(
            "int2: columns are in the matrix's own order, got a perm; pack it as int4, which has act_order"
        )
    return _grouped.packed(2, codes, scale, zero, in_shape=in_shape)


def leaf_axes(
    axes: tuple[str | None, ...], out: int, group_size: int = 32, affine: bool = False, scale: str = "bfloat16"
) -> _grouped.Grouped:
    """Codes, scales and zeros as the out dims and the first in dim."""
    del group_size, scale
    return _grouped.leaf_axes(axes, out, bits=2, affine=affine)
