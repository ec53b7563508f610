"""int5: codes 0..31 with a scale for each group of inputs, a plane of four bits and a plane of one.

    w ~ s (q - 16)        affine: w ~ s (q - z), z whole

`_grouped.py` says how steps are chosen and what the scale's dtype bounds. Half the step of int4 for a quarter more bytes: what
GGUF's Q5_1 holds is held here (checkpoints/gguf.py), and codes of its Q5_K lie the same way (kquant.py). Bits per weight:
5 + 16 / group_size, 5.25 at the defaults; affine, and scales in float32, pay that fraction twice. No kernel of Triton reads
two planes: on a GPU XLA decodes a chunk at a time, which a stream from host memory hides and matrices that stand on the
device pay for. On a CPU a row takes some three times as long as with int4 (`python scripts/bench_quant.py --rows 1 --group-size
64 --kind int5 --kind int4 --shape 4096x4096`, jax 0.12.0.1, 2 cores: 3.5 ms and 1.1, float32 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from jaxengine.weights import _grouped

OPTIONS = {"group_size": (16, 32, 64, 128, 256), "affine": (False, True), "scale": _grouped.SCALES}


def encode(
    w: Array, *, out: int, group_size: int = 64, affine: bool = False, scale: str = "bfloat16"
) -> _grouped.Grouped:
    """Quantise w [out..., in...] to 5 bits. scale: the dtype of scales and zeros."""
    grid = 1.0 if affine else None
    return _grouped.encode(w, out=out, bits=5, group_size=group_size, scale=scale, grid=grid)


def pack(codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None) -> _grouped.Grouped:
    """The Weight of codes that were chosen elsewhere: uint8 [out..., I], scale and zero [out..., groups].

    numpy in, numpy out; `_grouped.packed` says more. Raises ValueError for a perm: a plan has no name for one here.
    """
    if perm is not None:
        raise ValueError(
            "int5: columns are in the matrix's own order, got a perm; pack it as int4, which has act_order"
        )
    return _grouped.packed(5, codes, scale, zero, in_shape=in_shape)


def leaf_axes(
    axes: tuple[str | None, ...], out: int, group_size: int = 64, affine: bool = False, scale: str = "bfloat16"
) -> _grouped.Grouped:
    """Codes, scales and zeros as the out dims and the first in dim."""
    del group_size, scale
    return _grouped.leaf_axes(axes, out, bits=5, affine=affine)
