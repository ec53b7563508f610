"""A layer in tiles: all that it makes of each token apart from the others, for some tokens at a time.

    y = attention of all tokens                        the layer, from which only that is taken
    x' = rest of the layer, of (x, y) of some tokens   in a loop over tiles, each run again on its way back

What stands of the feed-forward block, two to four times as wide as x, is that of one tile, and of the whole row only x,
queries, keys, values and y (TiledMLP of ALST, Bekman et al., arXiv:2506.13996). No model knows of it: a block calls `attend`
for what goes between tokens, and what attend gives as its state the block hands out. The first time that is y; then y comes in
as a tile's state. What the block makes besides is not used, and XLA leaves it out.

The price is a gradient of the layer's matrices that is added up over tiles in the parameters' own dtype, and the feed-forward
block once more in a way back (layers that are run again run it in tiles, and each tile runs again).

B batch, T tokens, D model, N query heads, H head dim, C tokens of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.cache.base import PlainAttend
from jaxengine.engine import Engine, layer_body
from jaxengine.walk import Body

REMATS = ("full", "offload")


def body(engine: Engine, attend: PlainAttend, tile: int) -> Body:
    """The body of a walk without a cache, `tile` tokens of each row at a time (0: all)."""
    if not tile:
        return layer_body(engine, attend)
    return jax.tree_util.Partial(functools.partial(_in_tiles, engine, tile), attend)


def check(tile: int, remat: str) -> None:
    """Refuse, with ValueError, what could not be."""
    if tile < 0:
        raise ValueError(f"tile is {tile}; it is so many tokens of a row, or 0 for all")
    if tile and remat not in REMATS:
        raise ValueError(
            f"tile is {tile} and remat {remat!r}; a tile runs again on its way back, and nothing that its matrices gave is kept:"
            f" say remat='full' or 'offload', or leave tile out"
        )


@dataclasses.dataclass(frozen=True)
class _Attending:
    """Hands out what it makes."""

    attend: PlainAttend

    @property
    def positions(self) -> Int[Array, "B T"]:
        return self.attend.positions

    def __call__(self, attention: Any, q: Array, k: Array, v: Array, kv: Any, **how: Any) -> tuple[Array, Array]:
        y, _ = self.attend(attention, q, k, v, kv, **how)
        return y, y


@dataclasses.dataclass(frozen=True)
class _Attended:
    """Gives what comes in as the layer's state."""

    positions: Int[Array, "B C"]

    def __call__(self, attention: Any, q: Array, k: Array, v: Array, kv: Array, **how: Any) -> tuple[Array, tuple[()]]:
        del attention, q, k, v, how
        return kv, ()


def _in_tiles(
    engine: Engine, tile: int, attend: PlainAttend, kind: Hashable, weights: Any, x: Float[Array, "B T D"], state: Any
) -> tuple[Array, Any]:
    B, T, _ = x.shape
    if tile >= T:
        return layer_body(engine, attend)(kind, weights, x, state)
    y = layer_body(engine, _Attending(attend))(kind, weights, x, ())[1]

    def split(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, -T % tile), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(B, -1, tile, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(row: Any) -> Array:
        x, y, positions = row
        return layer_body(engine, _Attended(positions))(kind, weights, x, y)[0]

    out = lax.map(one, jax.tree.map(split, (x, y, attend.positions)))
    return out.swapaxes(0, 1).reshape(B, -1, x.shape[-1])[:, :T], state
