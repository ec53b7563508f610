"""A matrix taken a block of rows after another, where what is made of it on the way is several times what is kept.

Blocks are rows that lie as many apart as there are blocks: whichever way the rows are split over devices, all have their part of
each.

O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ENCODED = 2**19  # numbers that are encoded at a time


def blocks_of(O: int, I: int, limit: int) -> tuple[int, int]:  # noqa: E741
    """(blocks, rows of each) of at most `limit` numbers; a power of two."""
    blocks = 1
    while blocks * limit < O * I and 2 * blocks <= O:
        blocks *= 2
    return blocks, O // blocks


def in_blocks(encoded: Callable[[Array], Any], w: Float[Array, "..."], out: int) -> Any:
    """encoded(w), a tree of arrays [out..., ...] that are made of each row alone, a block of rows at a time.

    w: [out..., in...]; `encoded` is given matrices [O, in...], and gives arrays [O, ...].
    """
    lead, wide = w.shape[:out], w.reshape(math.prod(w.shape[:out]), *w.shape[out:])
    blocks, each = blocks_of(len(wide), math.prod(w.shape[out:]), ENCODED)
    if blocks == 1:
        made = encoded(wide)
    else:
        main = wide[: each * blocks].reshape(each, blocks, *wide.shape[1:])
        made = lax.map(lambda i: encoded(lax.dynamic_index_in_dim(main, i, 1, keepdims=False)), jnp.arange(blocks))
        made = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(each * blocks, *a.shape[2:]), made)
        if each * blocks < len(wide):
            left = encoded(wide[each * blocks :])
            made = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made, left)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), made)
