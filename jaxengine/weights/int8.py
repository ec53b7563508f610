"""int8, one scale per output channel, symmetric (the W8 of W8A16).

    s_o = max(max_i |w_oi| / 127, 2^-120)        q_oi = round(w_oi / s_o)        w_oi ~ q_oi s_o

The scale belongs to the output, so it is applied after the matmul: the codes go into the dot as they are, and XLA:GPU
reads them as int8 (tests/test_aot.py). XLA:CPU writes them out as a float matrix before each dot: there the format
saves memory at rest, not time. A quarter of float32's bytes, half of bfloat16's; the error of an element is at most
s_o / 2. The scale is kept in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxengine.weights.base import Weight, einsum

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
        # float32 until the scale is in: sums of codes are up to 127 / max|w| times the result and overflow float16
        y = einsum(spec, x, self.codes.astype(x.dtype), jnp.float32)
        scale = self.scale.reshape((1,) * (y.ndim - self.scale.ndim) + self.scale.shape)
        return (y * scale).astype(x.dtype)

    def take(self, ids: Array, dtype: Any) -> Array:
        codes, scale = jnp.take(self.codes, ids, axis=0), jnp.take(self.scale, ids, axis=0)
        scale = scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
        return (codes.astype(jnp.float32) * scale).astype(dtype)


def encode(w: Array, *, out: int) -> PerChannel:
    """Quantise w [out..., in...] to int8 with one scale for each of its leading `out` dims' channels."""
    wide = w.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=tuple(range(out, w.ndim)), keepdims=True)
    # never a subnormal, which XLA flushes to zero; an all-zero channel keeps its zeros
    scale = jnp.maximum(largest / 127, LEAST)
    codes = jnp.round(wide / scale).astype(jnp.int8)
    return PerChannel(codes, scale.reshape(w.shape[:out]))


def leaf_axes(axes: tuple[str | None, ...], out: int) -> PerChannel:
    """Codes are laid out as w; the scale as its output dims."""
    return PerChannel(codes=axes, scale=axes[:out])  # pyright: ignore[reportArgumentType]
