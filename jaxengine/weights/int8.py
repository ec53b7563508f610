"""int8, symmetric: one scale per output channel (the W8 of W8A16), or per group of inputs.

    s_o = max(max_i |w_oi| / 127, 2^-120)        q_oi = round(w_oi / s_o)        w_oi ~ q_oi s_o

The scale belongs to the output, so it is applied after the matmul (pallas_kernels/quant_matmul), to float32 sums: sums of
codes are up to 127 / max|w| times the result and overflow float16. A quarter of float32's bytes, half of bfloat16's; the
error of an element is at most s_o / 2. The scale is kept in float32.

group_size: 0 is the above. With 16, 32, 64 or 128 each group of that many inputs has a scale, as in GGUF's Q8_0
(`_grouped.py`): 8 + 32 / group_size bits per weight for errors that follow the group's largest number, not the channel's.

outliers: so many columns, those of the largest numbers, are kept as they are and take no part in any scale (LLM.int8(),
arXiv:2208.07339, for weights; `_outliers.py` says what differs).

act_order: groups are of columns in another order, as int4's are, whole or in parts; of groups alone, and not beside outliers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxengine.weights import _grouped, _outliers
from jaxengine.weights.base import Integers, Weight, split_spec
from pallas_kernels.quant_matmul import quant_matmul

OPTIONS = {"group_size": (0, 16, 32, 64, 128), "outliers": (0, 8, 16, 32, 64, 128), "act_order": _grouped.ORDERS}
LEAST = 2.0**-120  # of a scale: half of it, and its products with codes, are normal float32 numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerChannel(Weight):
    """codes int8 [out..., in...], scale float32 [out...]."""

    codes: Int8[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def _wide_scale(self) -> Array:
        return self.scale.reshape(self.scale.shape + (1,) * (self.codes.ndim - self.scale.ndim))

    def dense(self) -> Array:
        return self.codes.astype(jnp.float32) * self._wide_scale()

    def error_bound(self) -> Array:
        # half a step, and the two float32 roundings of w / s and q s (each relative 2^-24, of at most 127 s)
        return self._wide_scale() * (0.5 + 2 * 127 * 2.0**-24)

    def contract(self, spec: str, x: Array) -> Array:
        batch, _, outs = split_spec(spec)
        lead, out_shape = x.shape[: len(batch)], self.codes.shape[: len(outs)]
        rows = x.reshape(math.prod(lead), -1)
        codes, scale = self.codes.reshape(-1, rows.shape[1]), self.scale.reshape(-1)
        y = quant_matmul(rows, codes, scale, kind="int8", group_size=0, dtype=x.dtype)
        return y.reshape(*lead, *out_shape)

    def integers(self) -> Integers:
        return Integers(8, self.codes.reshape(*self.scale.shape, -1), self.scale)

    def take(self, ids: Array, dtype: Any) -> Array:
        codes, scale = jnp.take(self.codes, ids, axis=0), jnp.take(self.scale, ids, axis=0)
        scale = scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
        return (codes.astype(jnp.float32) * scale).astype(dtype)


def encode(
    w: Array, *, out: int, group_size: int = 0, outliers: int = 0, act_order: bool | int = False
) -> PerChannel | _grouped.Grouped | _outliers.Outliers:
    """Quantise w [out..., in...] to int8 with one scale for each of its leading `out` dims' channels, or of their groups;
    `outliers` columns stay as they are. act_order: as int4's. ValueError for it without groups, and beside outliers."""
    if act_order and not group_size:
        raise ValueError(
            f"int8: act_order={str(act_order).lower()} orders columns into groups, and group_size is 0, one scale for all of a"
            f" row: say group_size=128 (or 16, 32, 64) too, or leave act_order out"
        )
    if act_order and outliers:
        raise ValueError(
            f"int8: act_order={str(act_order).lower()} and outliers={outliers}: columns that are kept have no place in an order;"
            f" leave one of the two out"
        )
    if outliers:
        return _outliers.encode(w, out, outliers, lambda rows: encode(rows, out=1, group_size=group_size))
    if group_size:
        return _grouped.encode(w, out=out, bits=8, group_size=group_size, scale="float32", parts=int(act_order))
    wide = w.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=tuple(range(out, w.ndim)), keepdims=True)
    # never a subnormal, which XLA flushes to zero; an all-zero channel keeps its zeros
    scale = jnp.maximum(largest / 127, LEAST)
    codes = jnp.round(wide / scale).astype(jnp.int8)
    return PerChannel(codes, scale.reshape(w.shape[:out]))


def pack(
    codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None
) -> PerChannel | _grouped.Grouped:
    """The Weight of codes that were chosen elsewhere; numpy in, numpy out.

    codes: [out..., I], int8, or uint8 with 128 for zero. scale: float32, [out...] for one per channel, or [out..., groups].
    perm: int32 [I], of groups. Raises ValueError for another dtype or shape, for a zero (the format is symmetric), and for a
    perm of one scale per channel, which no order of columns changes.
    """
    if zero is not None:
        raise ValueError(
            "int8: codes are symmetric, got a zero; subtract one that is the same everywhere from the codes first, or decode"
            " the matrix and encode it anew"
        )
    if perm is not None and scale.ndim < codes.ndim:
        raise ValueError(
            f"int8: got a perm of columns that share one scale a row: put them in the matrix's own order, or give scales"
            f" [out..., groups] in place of {list(scale.shape)}"
        )
    if scale.dtype != np.float32:
        raise ValueError(f"int8: scale is {scale.dtype.name}; it is float32, which holds bfloat16 and float16 exactly")
    if scale.ndim == codes.ndim:
        codes = codes.view(np.uint8) ^ np.uint8(128) if codes.dtype == np.int8 else codes
        return _grouped.packed(8, codes, scale, in_shape=in_shape, perm=perm)
    inputs = math.prod(in_shape)
    if codes.dtype not in (np.int8, np.uint8) or codes.shape[-1] != inputs or scale.shape != codes.shape[:-1]:
        raise ValueError(
            f"int8: codes are {codes.dtype} {list(codes.shape)} and scale {list(scale.shape)}; for in dims {list(in_shape)} they"
            f" are int8 or uint8 [out..., {inputs}], and [out...] or [out..., groups]"
        )
    codes = (codes ^ np.uint8(128)).view(np.int8) if codes.dtype == np.uint8 else codes
    return PerChannel(codes.reshape(*scale.shape, *in_shape), scale)


def refit(leaf: Any, *, act_order: bool | int = False, **options: Any) -> Any:
    """What was stored in this format, or in it with an order of columns that is whole or in other parts, in this format."""
    del options
    return _grouped.refit(leaf, act_order) if isinstance(leaf, _grouped.Grouped) else leaf


def leaf_axes(
    axes: tuple[str | None, ...], out: int, group_size: int = 0, outliers: int = 0, act_order: bool | int = False
) -> PerChannel | _grouped.Grouped | _outliers.Outliers:
    """Codes are laid out as w, and of groups with the inputs as one dim; the scale as its output dims, and the groups; the
    permutation is whole everywhere, or split by parts."""
    if outliers:
        return _outliers.leaf_axes(leaf_axes(axes, out, group_size), axes, out)
    if group_size:
        return _grouped.leaf_axes(axes, out, bits=8, parts=int(act_order))
    return PerChannel(codes=axes, scale=axes[:out])  # pyright: ignore[reportArgumentType]
