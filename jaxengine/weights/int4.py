"""int4: codes 0..15 with a scale for each group of inputs (the W4 of W4A16; round to nearest).

    w ~ s (q - 8)        affine: w ~ s (q - z), z whole

`_grouped.py` says how steps are chosen and what the scale's dtype bounds. Zeros are whole numbers, as GPTQ, AWQ and
compressed-tensors store them, so that an exact 0 is held exactly; zeros of an import need not be. Bits per weight: 4
+ 16 / group_size, 4.125 at the defaults; affine, and scales in float32, pay that fraction twice. Smaller groups buy more
than zeros do: normal numbers are held better by symmetric groups of 64 than by affine groups of 128, in as many bytes.

act_order: columns are sorted by their largest magnitude, descending, before they are grouped, and the permutation is
stored, so that columns of like size share a scale. GPTQ (arXiv:2210.17323) has the order from its Hessian's diagonal
(`desc_act`) and stores it the same way; `encode` sees no activations. x is gathered once before each product.

act_order=4: that order, with the same codes and scales, resolved in 4 parts of a row, each of which gathers from itself alone
(_parts.py). A matrix whose inputs a mesh splits over as many devices then needs no inputs of others; what is read grows:
of 4096 inputs in groups of 128, 4.125 bits a weight to 6.25 in 2 parts, 7.5 in 4 and 10 in 8.
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


def encode(
    w: Array,
    *,
    out: int,
    group_size: int = 128,
    affine: bool = False,
    scale: str = "bfloat16",
    act_order: bool | int = False,
) -> _grouped.Grouped:
    """Quantise w [out..., in...] to 4 bits. scale: the dtype of scales and zeros. act_order: true, or in how many parts."""
    grid = 1.0 if affine else None
    return _grouped.encode(w, out=out, bits=4, group_size=group_size, scale=scale, grid=grid, parts=int(act_order))


def pack(codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None) -> _grouped.Grouped:
    """The Weight of codes that were chosen elsewhere: uint8 [out..., I], scale and zero [out..., groups], perm int32 [I].

    numpy in, numpy out; `_grouped.packed` says more. It is the tree of `encode` with the group size and the dtype of
    `scale`, affine where there is a zero, act_order where there is a perm.
    """
    return _grouped.packed(4, codes, scale, zero, in_shape=in_shape, perm=perm)


def refit(leaf: _grouped.Grouped, *, act_order: bool | int = False, **options: Any) -> _grouped.Grouped:
    """What was stored in this format, or in it with an order of columns that is whole or in other parts, in this format."""
    del options
    return _grouped.refit(leaf, act_order)


def leaf_axes(
    axes: tuple[str | None, ...],
    out: int,
    group_size: int = 128,
    affine: bool = False,
    scale: str = "bfloat16",
    act_order: bool | int = False,
) -> _grouped.Grouped:
    """Codes, scales and zeros as the out dims and the first in dim; the permutation is whole everywhere, or split by parts."""
    del group_size, scale
    return _grouped.leaf_axes(axes, out, bits=4, affine=affine, parts=int(act_order))
