"""4-bit keys and values, two to a byte; each half of a token's head has a float32 scale, symmetric.

    s_i = max(max_(h in half i) |x_h| / 7, 2^-120)        q_h = round(x_h / s_i) + 8        byte h = q_h + 16 q_(h + H/2)

H / 2 + 8 bytes for H elements: with heads of 128 a 3.6th of bfloat16's. The error of an element is at most s / 2: a 14th of the
largest magnitude in its half. That the halves of a byte are the halves of a head lets a kernel take 4 bits of each byte as
one operand of a product, and a scale for each slot after it, with nothing interleaved.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

LEAST = 2.0**-120  # of a scale: half of it, and its products with codes, are normal float32 numbers
MIDDLE = 8  # the code of zero


def encode(x: Array) -> dict[str, Array]:
    """x [B, K, T, H], H even, to codes uint8 [B, K, T, H/2] and scale float32 [B, K, T, 2]."""
    H = x.shape[-1]
    if H % 2:
        raise ValueError(f"head_dim is {H}; the int4 cache puts two elements in a byte: take kv int8")
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, H // 2)
    scale = jnp.maximum(jnp.abs(halves).max(-1) / 7, LEAST)  # never a subnormal, which XLA flushes to zero
    codes = (jnp.round(halves / scale[..., None]) + MIDDLE).astype(jnp.uint8)
    return {"codes": codes[..., 0, :] | codes[..., 1, :] << jnp.uint8(4), "scale": scale}


def decode(stored: dict[str, Array], dtype: Any) -> Array:
    """[B, K, T, H] in `dtype`."""
    codes, scale = stored["codes"], stored["scale"]
    halves = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], -2)
    numbers = halves.astype(jnp.float32) - MIDDLE
    return (numbers * scale[..., None]).astype(dtype).reshape(*codes.shape[:-1], -1)


def coded(stored: dict[str, Array]) -> tuple[Array, Array | None]:
    """Codes and scales."""
    return stored["codes"], stored["scale"]
