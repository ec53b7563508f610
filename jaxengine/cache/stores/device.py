"""Slots as arrays [B, K, S, ...] in the device's memory, one set for each layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def make(shapes: Any) -> Any:
    """Empty slots of these shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def write(slots: Any, new: Any, where: Int[Array, "B T"]) -> Any:
    """Put new [B, K, T, ...] into the slots `where`; a token whose slot is outside [0, S) is dropped."""

    def put(old: Array, x: Array, where: Array) -> Array:
        rows = jnp.arange(where.shape[0], dtype=where.dtype)[:, None]
        by_token = x.swapaxes(1, 2)  # the indexed dims come first in an advanced-index update: [B, T, K, ...]
        return old.at[rows, :, where].set(by_token, mode="drop", wrap_negative_indices=False)

    def put_twice(old: Array, x: Array, where: Array) -> Array:
        # and a second time into no slot: of an update with one token XLA:CPU makes a slice update, fuses it into what
        # reads the slots, and so copies all of them twice a step (a seventh of the time of a decode step, batch 1)
        nowhere = jnp.full_like(where, old.shape[2])
        return put(old, jnp.concatenate([x, x], axis=2), jnp.concatenate([where, nowhere], axis=1))

    def write_one(old: Array, x: Array) -> Array:
        if where.size == 1:
            return lax.platform_dependent(old, x, where, cpu=put_twice, default=put)
        return put(old, x, where)

    return jax.tree.map(write_one, slots, new)


def read(slots: Any) -> Any:
    """All slots."""
    return slots
