"""A matrix held as codes, times rows: the meaning of the op, in plain jnp.

    y_mn = sum_k x_mk w_nk        w the matrix that codes and scales stand for (layout.py)

in float32 throughout. The matrix is materialised.

M rows, N outputs, K inputs, G group size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quant_matmul import layout


def dense(codes: Any, scale: Array, zero: Array | None, *, kind: str, group_size: int) -> Float[Array, "N K"]:
    """The matrix itself, float32."""
    q = layout.numbers(codes, kind, group_size)
    N, K = q.shape
    s = layout.e8m0(scale) if kind == "mxfp4" else scale.astype(jnp.float32)
    if s.ndim == 1:
        return q * s[:, None]
    if kind == "fp8_block":
        return q * jnp.repeat(jnp.repeat(s, group_size, 0)[:N], group_size, 1)[:, :K]
    if kind in layout.MIDDLE:
        z = jnp.full_like(s, layout.MIDDLE[kind]) if zero is None else zero.astype(jnp.float32)
        q = q - jnp.repeat(z, group_size, 1)
    return q * jnp.repeat(s, group_size, 1)


def quant_matmul(
    x: Float[Array, "M K"],
    codes: Any,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
) -> Float[Array, "M N"]:
    """x . dense()^T, the result in `dtype`."""
    w = dense(codes, scale, zero, kind=kind, group_size=group_size)
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision="highest").astype(dtype)
