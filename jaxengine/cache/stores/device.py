"""Slots as arrays [B, K, S, ...] in the device's memory, one set for each layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def make(shapes: Any) -> Any:
    """Empty slots of these shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def write(slots: Any, new: Any, where: Int[Array, "B T"]) -> Any:
    """Put new [B, K, T, ...] into the slots `where`; a token whose slot is outside [0, S) is dropped."""
    rows = jnp.arange(where.shape[0], dtype=where.dtype)[:, None]

    def put(old: Array, x: Array) -> Array:
        by_token = x.swapaxes(1, 2)  # the indexed dims come first in an advanced-index update: [B, T, K, ...]
        return old.at[rows, :, where].set(by_token, mode="drop", wrap_negative_indices=False)

    return jax.tree.map(put, slots, new)


def read(slots: Any) -> Any:
    """All slots."""
    return slots
