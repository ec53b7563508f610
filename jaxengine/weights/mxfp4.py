"""MXFP4: 4-bit floats in groups of 32 that share a power of two (OCP Microscaling Formats specification v1.0, section 6).

    e_og = floor(log2 max |w_oi|) - 2        q_oi = w_oi / 2^e_og, rounded to E2M1        w_oi ~ q_oi 2^e_og

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; the shared exponent is a byte, e8m0: 4.25 bits a weight, and nothing but
shifts to read. Rounding is to the nearest, ties to the even code; what lies above 6 (a group's largest may be just below 8,
in units of its scale) saturates, as the specification asks. That and scales a factor of two apart are the format's price:
on normal numbers its mean squared error is above NF4's at about the same size. It is here for checkpoints that were trained
or published in it (gpt-oss), and for cards that multiply it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8, UInt16

from jaxengine.weights import _codebook, _rows
from jaxengine.weights._codebook import InShape
from jaxengine.weights.base import Weight
from pallas_kernels.quant_matmul.layout import E2M1, e8m0

OPTIONS: dict[str, tuple[Any, ...]] = {}

GROUP = 32
BIAS = 127  # of e8m0
LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2^2
LEAST = BIAS - 120  # of a shared exponent: products of 2^-120 with entries and their halves are normal float32 numbers
MAGNITUDES = E2M1[:8]
THRESHOLDS = tuple((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES))
TIES_UP = tuple(code % 2 == 1 for code in range(len(THRESHOLDS)))  # from an odd code to the even one above
# a number's distance from its entry over the scale; all is exact in float32. Up to 8 saturates at 6
REACH = (0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 2.0) * 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4(Weight):
    """codes uint16 [out..., K/4], K the inputs padded to whole groups; scale uint8 [out..., K/32], an exponent plus 127."""

    codes: UInt16[Array, "..."]
    scale: UInt8[Array, "..."]
    in_shape: InShape = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], *self.in_shape)

    def _read(self, table: Sequence[float]) -> Array:
        codes = _codebook.codes_of(self.codes, self.scale.shape[-1])
        return _codebook.scaled(_codebook.look_up(table, codes), e8m0(self.scale), self.in_shape)

    def dense(self) -> Array:
        return self._read(E2M1)

    def error_bound(self) -> Array:
        return self._read(REACH)

    def contract(self, spec: str, x: Array) -> Array:
        return _codebook.contract(spec, x, self.codes, self.scale, "mxfp4", self.in_shape)

    def take(self, ids: Array, dtype: Any) -> Array:
        return _codebook.rows(self, ids, dtype)


def encode(w: Array, *, out: int) -> MXFP4:
    """Quantise w [out..., in...] in groups of 32 of its flattened inputs."""

    def rows(w: Array) -> MXFP4:
        groups = _codebook.grouped(w, 1, GROUP)
        largest = lax.bitcast_convert_type(jnp.abs(groups).max(axis=-1), jnp.uint32)
        # the exponent is read from the bits: a logarithm is rounded, and off by one just below a power of two
        exponent = (largest >> 23).astype(jnp.int32) - LARGEST_EXPONENT
        scale = jnp.maximum(exponent, LEAST).astype(jnp.uint8)
        codes = _codebook.nearest(jnp.abs(groups), e8m0(scale), THRESHOLDS, TIES_UP)
        codes += jnp.signbit(groups).astype(jnp.uint8) * jnp.uint8(8)
        return MXFP4(_codebook.to_words(codes), scale, InShape(w.shape[1:]))

    return _rows.in_blocks(rows, w, out)


def leaf_axes(axes: tuple[str | None, ...], out: int) -> MXFP4:
    """The flattened dim has the name of the first in dim."""
    flat = (*axes[:out], axes[out])
    return MXFP4(flat, flat, InShape.any(len(axes) - out))  # pyright: ignore[reportArgumentType]


def pack(codes: np.ndarray, scale_e8m0: np.ndarray, *, in_shape: Sequence[int]) -> MXFP4:
    """What is in MXFP4 already, in numpy: codes uint8 [out..., I], one a byte, bit 3 the sign; scale_e8m0 uint8 or
    float8_e8m0fnu [out..., ceil(I / 32)]. Raises ValueError for arrays that disagree, and for a scale that is NaN.
    """
    if scale_e8m0.dtype == ml_dtypes.float8_e8m0fnu:
        scale_e8m0 = scale_e8m0.view(np.uint8)
    if scale_e8m0.dtype != np.uint8 or (scale_e8m0 == 255).any():
        raise ValueError(
            f"MXFP4: scales are {scale_e8m0.dtype}, the largest {scale_e8m0.max()}; they are uint8 or float8_e8m0fnu,"
            f" an exponent plus 127, below 255 (NaN)"
        )
    wanted = -(-codes.shape[-1] // GROUP)
    if scale_e8m0.shape[-1] != wanted:
        raise ValueError(
            f"MXFP4: {scale_e8m0.shape[-1]} scales for {codes.shape[-1]} inputs; groups are of {GROUP}, which needs {wanted}"
        )
    words = _codebook.packed("MXFP4", codes, scale_e8m0.shape, in_shape, 0)
    return MXFP4(words, scale_e8m0, InShape(in_shape))  # pyright: ignore[reportArgumentType]
