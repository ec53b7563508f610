"""Attention of few queries over a long cache in plain XLA: a block of slots at a time, as they are stored.

A loop goes over the blocks that some query of some row can see, keeps for each query the greatest score so far, the sum of
exponentials and the weighted sum of values (online softmax, arXiv:1805.02867), and turns codes into numbers one block at a
time. Scales meet the products, in float32: a score is s (q . codes), and a value's scale is multiplied into its weight. So
neither the cache in another dtype nor all scores are ever written. Slots are not padded, which would copy the cache: the last
block is moved back to end with the slots, and what it shares with the one before is not seen twice.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K, H head dim; C slots of a block, J blocks; R = G T rows of a kv
head.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import HIDDEN, NEVER, visible
from pallas_kernels.attention.xla import beginning
from pallas_kernels.decode_attention.reference import gathered, held, planes
from pallas_kernels.decode_attention.tiles import spans
from pallas_kernels.dispatch import gpu

LEAST = 2.0**-120  # of a block's greatest scale


def block(S: int, page: int | None) -> int:
    """Slots at a time, whole pages: on a CPU what its caches hold, on a GPU many, for each block is half a dozen kernels."""
    most = min(512 if gpu() is None else 4096, S)
    return most if page is None else max(1, most // page) * page


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    page_table: Int[Array, "B M"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    at_once: int | None = None,
) -> Any:
    """reference.decode_attention. at_once: the slots of a block, of a paged cache whole pages (None: those of `block`)."""
    B, T, N, H = q.shape
    K, page = k.shape[1], None if page_table is None else k.shape[2]
    G, R = N // K, N // K * T
    if page_table is not None:
        assert lengths is not None
        assert page is not None
        k_positions = held(page_table, lengths, page)
    assert k_positions is not None
    S = k_positions.shape[1]
    C = block(S, page) if at_once is None else min(at_once, S)
    starts = np.arange(0, S, C)
    slots = np.minimum(starts, S - C)[:, None] + np.arange(C)
    at = jnp.where((slots < starts[:, None])[None], -1, k_positions[:, slots])  # [B, J, C]
    span = spans(q_positions, at.reshape(B, -1), window, C)
    # slots that no row sees are passed over; a row that sees nothing has an empty span
    seeing = span.end > span.first
    first, end = jnp.where(seeing, span.first, len(starts)).min(), span.end.max()

    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R, H)
    if sinks is None:
        m, total = jnp.full((B, K, R), HIDDEN, jnp.float32), jnp.zeros((B, K, R), jnp.float32)
    else:
        m, total = (jnp.broadcast_to(a.reshape(1, K, G, 1), (B, K, G, T)).reshape(B, K, R) for a in beginning(sinks))

    def taken(a: Array | None, j: Array) -> Array | None:
        """Block j of codes or scales, [B, K, C, ...]."""
        if a is None:
            return None
        start = jnp.minimum(j * C, S - C)
        if page_table is None or page is None:
            return lax.dynamic_slice_in_dim(a, start, C, 2)
        return gathered(a, lax.dynamic_slice_in_dim(page_table, start // page, C // page, 1))

    def meet(j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total, o = running
        ks, vs = (planes(x, taken(s, j)) for x, s in ((taken(k, j), k_scale), (taken(v, j), v_scale)) if x is not None)
        x, start = jnp.zeros((), jnp.float32), 0
        for numbers, s in ks:
            width = numbers.shape[-1]
            # keys first: see attention/reference.py
            d = _dot("bksh,bkrh->bksr", numbers, rows[..., start : start + width], q.dtype)
            x, start = x + (d if s is None else d * s[..., None]), start + width
        x = x.swapaxes(2, 3) * scale
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        k_at = lax.dynamic_index_in_dim(at, j, 1, keepdims=False)
        seen = visible(q_positions[:, :, None], k_at[:, None, :], window, None, None)
        x = jnp.where(seen[:, None, None], x.reshape(B, K, G, T, C), NEVER).reshape(B, K, R, C)
        m_new = jnp.maximum(m, x.max(-1))
        p, shrunk = jnp.exp(x - m_new[..., None]), jnp.exp(m - m_new)
        parts = [_weighed(p, numbers, s, q.dtype) for numbers, s in vs]
        o = o * shrunk[..., None] + jnp.concatenate(parts, -1)
        return m_new, total * shrunk + p.sum(-1), o

    start = (m, total, jnp.zeros((B, K, R, H), jnp.float32))
    m, total, o = lax.fori_loop(first, end, meet, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (o / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
    if not return_lse:
        return out
    lse = jnp.where(some, m + jnp.log(total), NEVER)
    return out, lse.reshape(B, K, G, T).transpose(0, 3, 1, 2).reshape(B, T, N)


def _weighed(
    p: Float[Array, "B K R C"], numbers: Array, s: Float[Array, "B K C"] | None, dtype: Any
) -> Float[Array, "B K R H"]:
    """The sum over a block's slots of values by their weights."""
    if s is None or dtype != jnp.float16:
        return _dot("bkrs,bksh->bkrh", p if s is None else p * s[:, :, None, :], numbers, dtype)
    # whose range a weight times a scale leaves: scales are divided by the block's greatest
    most = jnp.maximum(s.max(-1, keepdims=True), LEAST)
    return _dot("bkrs,bksh->bkrh", p * (s / most)[:, :, None, :], numbers, dtype) * most[..., None]


def _dot(spec: str, x: Array, y: Array, dtype: Any) -> Array:
    """einsum(spec, x, y) of operands in `dtype`, accumulated in float32; on a CPU of operands in float32."""

    def wide(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)  # or tensor cores would round to 10 bits

    def narrow(x: Array, y: Array) -> Array:
        return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)

    if dtype == jnp.float32:
        return wide(x, y)
    # XLA:CPU has no product of 16-bit matrices: it converts them, or refuses ("Unsupported element type for DotThunk")
    return lax.platform_dependent(x, y, cpu=wide, default=narrow)
