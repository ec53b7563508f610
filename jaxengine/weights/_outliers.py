"""A few columns of a matrix in full precision, the others in a format that they would have spoiled.

    x . w  =  x_R . w_R  +  x_S . w_S        S: N columns as they were, R: the others, quantised

LLM.int8() (arXiv:2208.07339) does this with the columns of activations that are large at the time, at most 7 of thousands,
in 16 bits. Here activations are never quantised, and what spoils a scale is a large weight: one column a hundred times the
others takes all their codes but a few. `encode` therefore chooses columns by their largest magnitude in the matrix, once,
when it is encoded, and their number is fixed, so that bytes are known before a weight is read. In the quantised part they
are zero, which every format holds exactly; their codes stay where they are, so that a split of the inputs over devices is
what it is without them.

The cost is N (16 + 32 / outputs) bits a row, and a gather of N numbers of each x. It is worth that where columns stand out.
Of normal numbers, where none does, 16 columns of 1,024 take a twenty-seventh off the squared error.

N columns kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxengine.weights import _rows
from jaxengine.weights.base import Weight, einsum, split_spec

SHARE = 8  # at most one column in so many is kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers(Weight):
    """rest: the matrix with zeros in the columns `index`, in its format; columns: these, [out..., N]; index: int32 [N],
    where they are among the flattened inputs."""

    rest: Any
    columns: Float[Array, "..."]
    index: Int32[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rest.shape

    def _filled(self, matrix: Array, columns: Any) -> Array:
        """A matrix [out..., in...] with these in the columns kept."""
        flat = jnp.broadcast_to(matrix, self.shape).reshape(*self.columns.shape[:-1], -1)
        return _filled(flat, jnp.broadcast_to(columns, self.columns.shape), jnp.asarray(self.index)).reshape(self.shape)

    def dense(self) -> Array:
        return self._filled(self.rest.dense(), jnp.asarray(self.columns).astype(jnp.float32))

    def error_bound(self) -> Array:
        return self._filled(self.rest.error_bound(), jnp.float32(0))

    def contract(self, spec: str, x: Array) -> Array:
        batch, _, outs = split_spec(spec)
        lead = x.shape[: len(batch)]
        x_MN = jnp.take(x.reshape(math.prod(lead), -1), self.index, axis=-1, mode="clip")
        flat = self.columns.reshape(-1, self.columns.shape[-1])

        def product(x: Array, w: Array) -> Array:
            return einsum("mn,on->mo", x, w, jnp.float32)

        def widened(x: Array, w: Array) -> Array:
            return product(x.astype(jnp.float32), w.astype(jnp.float32))

        # XLA:CPU cannot run a dot of 16 bits with a float32 sum into which it has taken a slice of a stack
        kept = lax.platform_dependent(x_MN, flat.astype(x.dtype), cpu=widened, default=product)
        kept = kept.reshape(*lead, *self.columns.shape[: len(outs)])
        return (self.rest.contract(spec, x).astype(jnp.float32) + kept).astype(x.dtype)

    def take(self, ids: Array, dtype: Any) -> Array:
        rows = self.rest.take(ids, jnp.float32)
        columns = jnp.take(self.columns, ids, axis=0).astype(jnp.float32)
        flat = rows.reshape(*columns.shape[:-1], -1)
        return _filled(flat, columns, self.index).reshape(rows.shape).astype(dtype)


def _filled(flat: Array, columns: Array, index: Array) -> Array:
    if index.ndim > 1:  # a stack
        return jax.vmap(_filled)(flat, columns, index)
    return flat.at[..., index].set(columns, mode="drop", unique_indices=True)


def encode(w: Array, out: int, count: int, encoded: Callable[[Array], Any]) -> Outliers:
    """w with `count` columns as they are, those of the largest magnitude, or an eighth of the columns where there are fewer than
    8 `count`; encoded: makes the others' Weight of some rows [O, in...]."""
    flat = w.reshape(*w.shape[:out], -1)
    count = min(count, -(-flat.shape[-1] // SHARE))
    largest = jnp.abs(flat.astype(jnp.float32)).max(axis=tuple(range(out)))
    index = jnp.sort(lax.top_k(largest, count)[1]).astype(jnp.int32)
    columns = jnp.take(flat, index, axis=-1, mode="clip")
    there = jnp.zeros(flat.shape[-1], bool).at[index].set(True, mode="drop", unique_indices=True)
    there = there.reshape(1, *w.shape[out:])
    rest = _rows.in_blocks(lambda rows: encoded(jnp.where(there, jnp.zeros((), w.dtype), rows)), w, out)
    return Outliers(rest, columns, index)


def leaf_axes(rest: Any, axes: tuple[str | None, ...], out: int) -> Outliers:
    """rest: the names of the quantised part's dims. The columns kept, few and anywhere, are whole on every device."""
    return Outliers(rest, (*axes[:out], None), (None,))  # pyright: ignore[reportArgumentType]
