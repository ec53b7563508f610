"""int2: codes 0..3 with a scale for each group of inputs.

    w ~ s (q - 2)        affine: w ~ s (q - z), z a multiple of 1/16

`_grouped.py` says how steps are chosen and what the scale's dtype bounds. Four codes around a whole zero are uneven, one
below and two above or the other way round; affine puts the zero between two where that is nearer (a quarter of the error
of normal numbers less), so that a weight of exactly 0 is held within half a step like any other. It holds the largest numbers on
both sides half a step too small, which a model may feel more than the error says (scripts/LOG.md). Bits per weight: 2 + 16 /
group_size, 2.5 at the defaults; affine pays that fraction twice. Rounding to nearest in 2 bits loses much: a seventh of a
normal matrix's power. It is for weights that were calibrated or trained for it.

act_order: as int4's, whole or in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from jaxengine.weights import _grouped

OPTIONS = {
    "group_size": (16, 32, 64, 128, 256),
    "affine": (False, True),
    "scale": _grouped.SCALES,
    "act_order": _grouped.ORDERS,
}
GRID = 1 / 16  # of zeros: with 6 significant bits at most they are exact in every dtype of scales


def encode(
    w: Array,
    *,
    out: int,
    group_size: int = 32,
    affine: bool = False,
    scale: str = "bfloat16",
    act_order: bool | int = False,
) -> _grouped.Grouped:
    """Quantise w [out..., in...] to 2 bits. scale: the dtype of scales and zeros. act_order: as int4's."""
    grid = GRID if affine else None
    return _grouped.encode(w, out=out, bits=2, group_size=group_size, scale=scale, grid=grid, parts=int(act_order))


def pack(codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None) -> _grouped.Grouped:
    """The Weight of codes that were chosen elsewhere: uint8 [out..., I], scale and zero [out..., groups], perm int32 [I].

    numpy in, numpy out; `_grouped.packed` says more.
    """
    return _grouped.packed(2, codes, scale, zero, in_shape=in_shape, perm=perm)


def refit(leaf: _grouped.Grouped, *, act_order: bool | int = False, **options: Any) -> _grouped.Grouped:
    """What was stored in this format, or in it with an order of columns that is whole or in other parts, in this format."""
    del options
    return _grouped.refit(leaf, act_order)


def leaf_axes(
    axes: tuple[str | None, ...],
    out: int,
    group_size: int = 32,
    affine: bool = False,
    scale: str = "bfloat16",
    act_order: bool | int = False,
) -> _grouped.Grouped:
    """Codes, scales and zeros as the out dims and the first in dim; the permutation is whole everywhere, or split by parts."""
    del group_size, scale
    return _grouped.leaf_axes(axes, out, bits=2, affine=affine, parts=int(act_order))
