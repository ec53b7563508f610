"""NF4: 4-bit codes into a table of the normal distribution's quantiles, one scale a group (QLoRA, arXiv:2305.14314).

    a_og = max |w_oi| over group g        q_oi = the entry of NF4 nearest to w_oi / a_og        w_oi ~ NF4[q_oi] a_og

Weights of a trained matrix are about normal, so that a table whose entries are about equally likely (the paper's appendix
E) spends its 16 values better than equal steps: on normal numbers in groups of 64 the mean squared error is 27% below
that of int4 with steps of a / 7 and 14% below that with a / 8. Its price is a look-up, where an integer is its own value.

A float32 scale for each 64 inputs is half a bit a weight. Double quantisation (the paper's section 3) stores the scales in
8 bits too: a row's, 256 at a time, as the nearest of 256 equal steps from the least of them to the largest,

    a_og ~ least_os + step_os c_og        c_og in 0..255,  s = g // 256

The paper's second level runs over the flattened matrix, about one mean; here rows are on their own, to be split over
devices by output and looked up one at a time. The codes are searched with the scale that will be read back. On normal
numbers it adds less than a thousandth to the error; a group whose largest is hundreds of times below another's of its row,
it loses.
4 + 8/64 + 64 / min(inputs, 64 * 256) bits a weight: 4.141 at 4,096 inputs, 4.129 at multiples of 16,384; and 4.5 with
double=False, which is what bitsandbytes stores without its nested form.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt16

from jaxengine.weights import _codebook, _rows
from jaxengine.weights._codebook import InShape
from jaxengine.weights.base import Weight
from pallas_kernels.quant_matmul.layout import NF4 as TABLE

OPTIONS = {"group_size": (32, 64, 128), "double": (True, False)}

SECTION = 256  # scales that share a step
LEAST = 2.0**-120  # of a scale: its products with entries, and with half of what lies between two, are normal numbers
ZERO = TABLE.index(0.0)
LAST = len(TABLE) - 1
HALVES = tuple((high - low) / 2 for low, high in itertools.pairwise(TABLE))
THRESHOLDS = tuple(low + half for low, half in zip(TABLE, HALVES, strict=False))
# a number's distance from its entry over the scale: half of what lies between entries, on the wider side, and in float32
# the roundings of scale, thresholds and product
REACH = tuple(max(HALVES[max(i - 1, 0)], HALVES[min(i, LAST - 1)]) + 8 * 2.0**-24 for i in range(LAST + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Weight):
    """codes uint16 [out..., K/4], K the inputs padded to whole groups; absmax float32 [out..., K/G], or uint8 with float32
    step and least [out..., ceil(K/G / 256)]."""

    codes: UInt16[Array, "..."]
    absmax: Array
    step: Float[Array, "..."] | None
    least: Float[Array, "..."] | None
    in_shape: InShape = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], *self.in_shape)

    def scale(self) -> Float[Array, "..."]:
        """The largest magnitude of each group, float32 [out..., K/G]."""
        if self.step is None or self.least is None:
            return self.absmax
        return _whole(self.absmax, self.step, self.least)

    def _indices(self) -> Array:
        return _codebook.codes_of(self.codes, self.absmax.shape[-1])

    def dense(self) -> Array:
        return _codebook.scaled(_codebook.look_up(TABLE, self._indices()), self.scale(), self.in_shape)

    def error_bound(self) -> Array:
        scale, codes = self.scale(), self._indices()
        bound = _codebook.scaled(_codebook.look_up(REACH, codes), scale, self.in_shape)
        if self.step is None:
            return bound
        # half a step is what the scale, and so a number beyond the table's ends, may be off
        half = _by_group(self.step, scale.shape[-1]) * (0.5 + 2.0**-12)
        ends = ((codes == 0) | (codes == LAST)).astype(jnp.float32)
        return jnp.maximum(bound, _codebook.scaled(ends, half, self.in_shape))

    def contract(self, spec: str, x: Array) -> Array:
        return _codebook.contract(spec, x, self.codes, self.scale(), "nf4", self.in_shape)

    def take(self, ids: Array, dtype: Any) -> Array:
        return _codebook.rows(self, ids, dtype)


def _by_group(each: Array, groups: int) -> Array:
    """What sections have each [..., NS], for their groups [..., NG]."""
    return jnp.repeat(each, SECTION, axis=-1)[..., :groups]


def _whole(codes: Array, step: Array, least: Array) -> Array:
    groups = codes.shape[-1]
    return codes.astype(jnp.float32) * _by_group(step, groups) + _by_group(least, groups)


def _doubled(absmax: Array) -> tuple[Array, Array, Array]:
    """Scales [..., NG] as codes [..., NG], and step and least of each section [..., NS]."""
    groups = absmax.shape[-1]
    lead = ((0, 0),) * (absmax.ndim - 1)
    sections = jnp.pad(absmax, (*lead, (0, -groups % SECTION)), mode="edge")
    sections = sections.reshape(*absmax.shape[:-1], -1, SECTION)
    least = sections.min(axis=-1)
    # a little below a 255th: the largest scale must not be read back as infinity
    step = jnp.maximum((sections.max(axis=-1) - least) * ((1 - 2.0**-20) / 255), LEAST)
    steps = (absmax - _by_group(least, groups)) / _by_group(step, groups)
    return jnp.clip(jnp.round(steps), 0, 255).astype(jnp.uint8), step, least


def encode(w: Array, *, out: int, group_size: int = 64, double: bool = True) -> NF4:
    """Quantise w [out..., in...] in groups of its flattened inputs; double: the scales in 8 bits."""

    def rows(w: Array) -> NF4:
        groups = _codebook.grouped(w, 1, group_size)
        absmax, step, least = jnp.maximum(jnp.abs(groups).max(axis=-1), LEAST), None, None
        scale = absmax
        if double:
            absmax, step, least = _doubled(absmax)
            scale = _whole(absmax, step, least)
        codes = _codebook.nearest(groups, scale, THRESHOLDS)
        return NF4(_codebook.to_words(codes), absmax, step, least, InShape(w.shape[1:]))

    return _rows.in_blocks(rows, w, out)


def leaf_axes(axes: tuple[str | None, ...], out: int, group_size: int = 64, double: bool = True) -> NF4:
    """The flattened dim has the name of the first in dim; sections of scales are whole on every device."""
    del group_size
    flat, sections = (*axes[:out], axes[out]), (*axes[:out], None) if double else None
    return NF4(flat, flat, sections, sections, InShape.any(len(axes) - out))  # pyright: ignore[reportArgumentType]


def pack(codes: np.ndarray, absmax: np.ndarray, *, in_shape: Sequence[int]) -> NF4:
    """What is in NF4 already, in numpy: codes uint8 [out..., I], one a byte; absmax float32 [out..., groups of I].

    The form of double=False. Raises ValueError for arrays that disagree.
    """
    if absmax.dtype != np.float32 or not np.isfinite(absmax).all():
        raise ValueError(
            f"NF4: absmax is {absmax.dtype} with numbers from {absmax.min()} to {absmax.max()}; it is float32 and"
            f" finite. Expand scales that are themselves quantised first"
        )
    words = _codebook.packed("NF4", codes, absmax.shape, in_shape, ZERO)
    return NF4(words, absmax, None, None, InShape(in_shape))  # pyright: ignore[reportArgumentType]
