"""Every token keeps its slot: slot = position. What is outside a sliding window is kept too, and masked by position."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

CAN_REWIND = True


def num_slots(length: int, window: int | None) -> int:
    """As many slots as tokens."""
    del window
    return length


def slots(positions: Int[Array, "B T"], lengths: Int[Array, "B"], S: int) -> Int[Array, "B T"]:
    """The token at position p takes slot p; padding takes none (S)."""
    del lengths
    return jnp.where(positions >= 0, positions, S)


def positions(lengths: Int[Array, "B"], S: int) -> Int[Array, "B S"]:
    """Slot s holds position s, in the first `lengths` slots."""
    at = jnp.arange(S, dtype=jnp.int32)[None, :]
    return jnp.where(at < lengths[:, None], at, -1)


def holds(T: int, S: int, window: int | None) -> bool:
    """Nothing is ever overwritten."""
    del T, S, window
    return True
