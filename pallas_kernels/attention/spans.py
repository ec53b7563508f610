"""Which tiles of keys a tile of queries can see, by arithmetic that runs before a kernel does.

It follows from the least and greatest position of each tile, whatever the order of positions (a ring buffer's are not
sorted). Per tile of queries there are four bounds lo <= a <= b <= hi: no tile outside [lo, hi) has anything to see, and in
[a, b) everything is seen by everyone, so that a kernel needs no mask there. For sorted positions the bounds are exact; for
others they are sound and wider.

B batch, T queries, S slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FAR = 2**30  # the position of a slot that holds nothing: later than every query


class _Extent(NamedTuple):
    """Of each tile [B, tiles]: least and greatest position, whether every row holds something, likewise segments."""

    lo: jax.Array
    hi: jax.Array
    whole: jax.Array
    segment_lo: jax.Array | None
    segment_hi: jax.Array | None


def _extremes(least: list[jax.Array], most: list[jax.Array]) -> list[jax.Array]:
    """Minima and maxima over the last axis, in one reduction, which XLA makes one kernel."""
    info = jnp.iinfo(jnp.int32)
    split = len(least)

    def of_two(x: Any, y: Any) -> Any:
        return tuple((lax.min if i < split else lax.max)(*pair) for i, pair in enumerate(zip(x, y, strict=True)))

    arrays = tuple(x.astype(jnp.int32) for x in [*least, *most])
    start = tuple(jnp.int32(info.max if i < split else info.min) for i in range(len(arrays)))
    return list(lax.reduce(arrays, start, of_two, (arrays[0].ndim - 1,)))


def _extent(positions: jax.Array, segments: jax.Array | None, block: int, *, ends: bool) -> _Extent:
    """ends: whether the rows that fill the last tile up count as holding nothing."""
    at = padded(positions, block, -1 if ends else FAR)
    at = at.reshape(at.shape[0], -1, block)
    held = (at >= 0) & (at < FAR)
    least, most = [jnp.where(held, at, FAR), at >= 0], [jnp.where(held, at, -1)]
    if segments is None:
        lo, whole, hi = _extremes(least, most)
        return _Extent(lo, hi, whole > 0, None, None)
    of = padded(segments, block, 0).reshape(at.shape)
    lo, whole, of_lo, hi, of_hi = _extremes([*least, jnp.where(held, of, FAR)], [*most, jnp.where(held, of, -FAR)])
    return _Extent(lo, hi, whole > 0, of_lo, of_hi)


def _spans(q: _Extent, k: _Extent, window: int | None, *, of_keys: bool) -> tuple[jax.Array, ...]:
    """(lo, a, b, hi), each [B, tiles of queries], a, b and lo to be cut off at hi: see the head of this file.

    of_keys: bounds on tiles of queries for each tile of keys instead.
    """

    def meet(q: _Extent, k: _Extent) -> tuple[jax.Array, jax.Array]:
        """[B, owned, walked over]: whether anything can be seen, and whether everything is."""
        q, k = (
            _Extent(*(None if x is None else x[:, None, :] if walked else x[:, :, None] for x in extent))  # pyright: ignore[reportArgumentType]
            for extent, walked in ((q, of_keys), (k, not of_keys))
        )
        some, every = k.lo <= q.hi, (k.hi <= q.lo) & (q.whole & k.whole)
        if window is not None:
            some &= q.lo - k.hi < window
            every &= q.hi - k.lo < window
        if q.segment_lo is not None and q.segment_hi is not None:
            assert k.segment_lo is not None
            assert k.segment_hi is not None
            some &= (q.segment_lo <= k.segment_hi) & (q.segment_hi >= k.segment_lo)
            one = (q.segment_lo == q.segment_hi) & (k.segment_lo == k.segment_hi)
            every &= one & (q.segment_lo == k.segment_lo)
        return some, some & every

    def following(x: _Extent) -> _Extent:
        return _Extent(*(None if y is None else jnp.pad(y[:, 1:], ((0, 0), (0, 1))) for y in x))  # pyright: ignore[reportArgumentType]

    some, every = meet(q, k)
    _, every_after = meet(following(q), k) if of_keys else meet(q, following(k))
    n = some.shape[2]
    index = jnp.arange(n, dtype=jnp.int32)[None, None]
    lo, a, b, hi = _extremes(
        [jnp.where(some, index, n), jnp.where(every, index, n), jnp.where(every & ~every_after, index + 1, n)],
        [jnp.where(some, index + 1, 0)],
    )
    return lo, a, b, hi


def padded(x: jax.Array, block: int, fill: float, axis: int = 1) -> jax.Array:
    """x filled up along `axis` to a multiple of `block`."""
    more = -x.shape[axis] % block
    if not more:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=fill)


def bounds(
    window: int | None, block_q: int, block_k: int, q_at: Any, k_at: Any, q_of: Any, k_of: Any, *, of_keys: bool
) -> tuple[jax.Array, ...]:
    """(lo, a, b, hi) of each tile of block_q queries in tiles of block_k keys, each [B, tiles], a, b and lo to be cut off at
    hi. of_keys: of each tile of keys in tiles of queries instead."""
    q = _extent(q_at, q_of, block_q, ends=False)
    k = _extent(k_at, k_of, block_k, ends=True)
    return _spans(q, k, window, of_keys=of_keys)


def places(q_at: Any, k_at: Any, q_of: Any, k_of: Any, block_q: int, block_k: int) -> tuple[Any, ...]:
    """Positions and segments as kernels read them: filled up to whole tiles with rows that hold nothing."""
    return (
        padded(q_at, block_q, -1), padded(k_at, block_k, -1),
        None if q_of is None else padded(q_of, block_q, 0), None if k_of is None else padded(k_of, block_k, 0),
    )  # fmt: skip
