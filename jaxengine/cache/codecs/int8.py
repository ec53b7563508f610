"""int8 keys and values, one float32 scale for each token and kv head, symmetric.

    s = max(max_h |x_h| / 127, 2^-120)        q_h = round(x_h / s)

H + 4 bytes for H elements: about half of bfloat16's. The error of an element is at most s / 2.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

LEAST = 2.0**-120  # of a scale: half of it, and its products with codes, are normal float32 numbers


def encode(x: Array) -> dict[str, Array]:
    """x [B, K, T, H] to codes int8 [B, K, T, H] and scale float32 [B, K, T]."""
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1)
    scale = jnp.maximum(largest / 127, LEAST)  # never a subnormal, which XLA flushes to zero
    return {"codes": jnp.round(wide / scale[..., None]).astype(jnp.int8), "scale": scale}


def decode(stored: dict[str, Array], dtype: Any) -> Array:
    """[B, K, T, H] in `dtype`."""
    return (stored["codes"].astype(jnp.float32) * stored["scale"][..., None]).astype(dtype)


def coded(stored: dict[str, Array]) -> tuple[Array, Array | None]:
    """Codes and scales."""
    return stored["codes"], stored["scale"]
