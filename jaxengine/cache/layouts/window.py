"""A ring: under a sliding window W a layer keeps its last W tokens, at slot = position mod W.

The cache of a windowed layer stops growing at W tokens. A new token overwrites the one that has just left the window,
so what was overwritten cannot be had back: no rewinding.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

CAN_REWIND = False


def num_slots(length: int, window: int | None) -> int:
    """The window, or the whole sequence where that is shorter."""
    if window is None:
        raise ValueError(
            "The window layout needs a layer with a sliding window; this one sees all tokens: layout 'full'"
        )
    return min(length, window)


def slots(positions: Int[Array, "B T"], lengths: Int[Array, "B"], S: int) -> Int[Array, "B T"]:
    """Position mod S, for the last S tokens of the sequence (`lengths` counts the new tokens in); others take none."""
    kept = (positions >= 0) & (positions >= lengths[:, None] - S)
    return jnp.where(kept, positions % S, S)


def positions(lengths: Int[Array, "B"], S: int) -> Int[Array, "B S"]:
    """Slot s holds the last position before `lengths` that is s mod S."""
    last = lengths[:, None] - 1
    at = last - (last - jnp.arange(S, dtype=jnp.int32)[None, :]) % S
    return jnp.where(at >= 0, at, -1)


def holds(T: int, S: int, window: int | None) -> bool:
    """The first of T new tokens still needs the window before it, and the last is written by then. Fewer slots than the
    window means that the whole sequence fits and nothing is ever overwritten."""
    return window is not None and (window > S or window + T - 1 <= S)
