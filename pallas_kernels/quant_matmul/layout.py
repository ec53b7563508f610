"""How a quantised matrix lies in memory: the shapes of each kind's arrays, and the way back to numbers.

Codes of fewer than 8 bits stand in planes of 16-bit words, each group of G inputs for itself. A word of a plane of b
bits holds 16/b codes that lie G b / 16 inputs apart: in group g, word r, bits b j .. b j + b - 1 are the code of input

    k = g G + r + j (G b / 16)          0 <= r < G b / 16,  0 <= j < 16 / b

so that a plane is unpacked by 16/b shifts of whole vectors, and nothing is interleaved. int5 is a plane of the lower 4
bits and one of the highest, int3 the same with 2.

kind        codes                                    scale                                   weight
int8        int8 [N, K]                              float [N], or [N, K/G] with G > 0       s q
int5        (uint16 [N, K/4], uint16 [N, K/16])      float [N, K/G], zero the same or None   s (q - z), z = 16
int4        uint16 [N, K/4]                          float [N, K/G], zero the same or None   s (q - z), z = 8
int3        (uint16 [N, K/8], uint16 [N, K/16])      float [N, K/G], zero the same or None   s (q - z), z = 4
int2        uint16 [N, K/8]                          float [N, K/G], zero the same or None   s (q - z), z = 2
nf4         uint16 [N, K/4]                          float [N, K/G], the largest magnitude   s NF4[q]
mxfp4       uint16 [N, K/4]                          uint8 [N, K/G], e8m0                    2^(s-127) E2M1[q]
fp8         float8_e4m3fn or float8_e5m2 [N, K]      float [N]                               s q
fp8_block   float8_e4m3fn or float8_e5m2 [N, K]      float [ceil(N/G), ceil(K/G)], G = 128   s q

NF4 is the table of QLoRA (arXiv:2305.14314, appendix E); E2M1 and e8m0 are of the OCP Microscaling Formats
specification v1.0. z is counted in codes and need not be whole.

N outputs, K inputs, G group size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt16

BITS = {"int8": 8, "int5": 5, "int4": 4, "int3": 3, "int2": 2, "nf4": 4, "mxfp4": 4, "fp8": 8, "fp8_block": 8}
KINDS = tuple(BITS)
MIDDLE = {"int5": 16, "int4": 8, "int3": 4, "int2": 2}  # the code of zero where no zero is given
FLOATS = ("fp8", "fp8_block")
BLOCK = 128  # of fp8_block, both ways
FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def planes(kind: str) -> tuple[int, ...]:
    """Bits of each plane of 16-bit words that a kind's codes stand in; none where a code is a byte."""
    return {"int5": (4, 1), "int3": (2, 1), "int2": (2,)}.get(kind, (4,) if BITS[kind] == 4 else ())


def outputs(codes: Any) -> int:
    """N of a matrix."""
    return (codes[0] if isinstance(codes, tuple) else codes).shape[0]


def unpack(words: UInt16[Array, "... W"], bits: int, group_size: int) -> UInt16[Array, "... K"]:
    """The codes of one plane, in the order of the inputs."""
    per = group_size * bits // 16
    grouped = words.reshape(*words.shape[:-1], -1, 1, per)
    shifts = (jnp.arange(16 // bits, dtype=jnp.uint16) * jnp.uint16(bits)).reshape((1,) * (grouped.ndim - 2) + (-1, 1))
    codes = jnp.bitwise_and(jnp.right_shift(grouped, shifts), jnp.uint16(2**bits - 1))
    return codes.reshape(*words.shape[:-1], -1)


def e8m0(scale: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """2^(s-127) in float32; 255 is NaN. 0, the one subnormal number among them, may be flushed to zero."""
    bits = jnp.where(scale == 0, jnp.uint32(1 << 22), scale.astype(jnp.uint32) << 23)
    return jnp.where(scale == 255, jnp.float32(jnp.nan), lax.bitcast_convert_type(bits, jnp.float32))


def numbers(codes: Any, kind: str, group_size: int) -> Float[Array, "N K"] | Int[Array, "N K"]:
    """What the codes stand for before zero and scale: float32, [N, K]."""
    if len(made_of := planes(kind)) == 2:
        low, high = (unpack(plane, bits, group_size) for plane, bits in zip(codes, made_of, strict=True))
        return (low + jnp.uint16(1 << made_of[0]) * high).astype(jnp.float32)
    if kind in ("int8", "fp8", "fp8_block"):
        return codes.astype(jnp.float32)
    found = unpack(codes, planes(kind)[0], group_size)
    if kind in MIDDLE:
        return found.astype(jnp.float32)
    return jnp.take(jnp.array(NF4 if kind == "nf4" else E2M1, jnp.float32), found.astype(jnp.int32), axis=0)
