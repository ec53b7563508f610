"""Attention by positions: the meaning of the op, in plain jnp.

    out_t = sum_s softmax_s( cap( scale q_t . k_s ) + mask(t, s) ) v_s          (Vaswani et al., arXiv:1706.03762)

A mask is never passed. Each query and each key slot has a position (-1: nothing there), and query t sees key s when
both are there, s is not later than t, under a sliding window W fewer than W positions lie between them, and, where texts
are packed, both are of one segment. The same call therefore serves prefill, decode, a ring buffer, a padded batch and
training. Inputs of any dtype are taken as the float32 numbers that they are, everything is float32, and what is given is
rounded once, to q's dtype. The scores [B, K, G, T, S] are materialised.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K queries per kv head, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Refused

ATTENDED = "attended"  # the name of what a way back takes of the way forward, for what is kept for it
NEVER = -1e30  # the score of what is not seen; finite, where -inf would give NaN in a row that sees nothing
HIDDEN = NEVER / 2  # below it a greatest score is of a query that sees nothing; exp(NEVER - HIDDEN) is 0


def named(out: Array, lse: Array) -> tuple[Array, Array]:
    """A result and its lse as a way back takes them, under their name."""
    return checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)


class CountsTokens(Refused):
    """The implementation's causal mask counts tokens, and the caller has not said that they stand at 0, 1, ...."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
) -> Any:
    """Grouped-query attention [B, T, N, H] in q's dtype; with return_lse beside it lse [B, T, N] in float32.

    scale multiplies the scores; window: a query at p sees p-window+1 .. p; softcap c: scores become c tanh(scores / c)
    (Gemma 2, arXiv:2408.00118); sinks: for each head a score that takes its part of the softmax and has no value
    (gpt-oss; Xiao et al., arXiv:2309.17453), not scaled and not capped; segments: a query sees keys of its own only.
    lse: the natural logarithm of the softmax's denominator, the sink in it; -1e30 where there is nothing to sum.
    A query that sees nothing (such as one at position -1) gives a row of zeros, and no gradient to q, k and v.
    """
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    places = q_positions, k_positions, q_segments, k_segments
    return _written_out(q, k, v, places, scale, window, softcap, sinks, return_lse, None)


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    blocks: Int[Array, "B N I M"],
    block_q: int,
    block_k: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
) -> Any:
    """attention in which block i of block_q queries of head n sees slots of the key blocks blocks[b, n, i] only.

    blocks: a set of indices of blocks of block_k slots, in any order; -1, and any that is no block, stands for none. The
    masks hold within them. Both block sizes are powers of two from 16 on.
    """
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    check_blocks(q, blocks, block_q, block_k)
    (_, T, N, _), (K, S) = q.shape, k.shape[1:3]
    every = jnp.arange(-(-S // block_k), dtype=jnp.int32)[None, None, None, None]
    listed = (blocks[..., None] == every).any(3)  # [B, N, I, J]
    allowed = listed.repeat(block_q, 2)[:, :, :T].repeat(block_k, 3)[..., :S]
    places = q_positions, k_positions, q_segments, k_segments
    allowed = allowed.reshape(-1, K, N // K, T, S)
    return _written_out(q, k, v, places, scale, window, softcap, sinks, return_lse, allowed)


def _written_out(
    q: Array, k: Array, v: Array, places: tuple[Any, ...], scale: float, window: int | None, softcap: float | None,
    sinks: Array | None, return_lse: bool, allowed: Array | None,
) -> Any:  # fmt: skip
    """allowed [B, K, G, T, S]: what may be seen of what the masks leave."""
    B, T, N, H = q.shape
    K = k.shape[1]
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    rows = wide_q.reshape(B, T, K, N // K, H)
    # a GPU's default for float32 is products of 10 bits
    scores = jnp.einsum("btkgh,bksh->bkgts", rows, wide_k, precision=lax.Precision.HIGHEST) * scale
    scores = hidden(scores, places, window, softcap, allowed)
    weights, lse = softmax(scores, sinks)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, wide_v, precision=lax.Precision.HIGHEST)
    out = out.reshape(B, T, N, H).astype(q.dtype)
    return (out, lse) if return_lse else out


def hidden(
    scores: Float[Array, "B K G T S"], places: tuple[Any, ...], window: int | None, softcap: float | None,
    allowed: Array | None = None,
) -> Float[Array, "B K G T S"]:  # fmt: skip
    """Scaled scores under the cap, NEVER where nothing is seen. places: q_positions, k_positions, q_segments, k_segments."""
    q_at, k_at, q_of, k_of = places
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = visible(
        q_at[:, :, None], k_at[:, None, :], window,
        None if q_of is None else q_of[:, :, None], None if k_of is None else k_of[:, None, :],
    )[:, None, None]  # fmt: skip
    return jnp.where(seen if allowed is None else seen & allowed, scores, NEVER)


def softmax(
    scores: Float[Array, "B K G T S"], sinks: Float[Array, "N"] | None
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B T N"]]:
    """Weights over the slots, all zeros in a row that sees nothing, and the log-sum-exp; in float32, the sinks in both."""
    B, K, G, T, _ = scores.shape
    top = jnp.maximum(scores.max(-1, keepdims=True), HIDDEN)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, G, 1, 1)
    if sink is not None:
        top = jnp.maximum(top, sink)
    top = lax.stop_gradient(top)  # it cancels
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(total), NEVER)
    return weights / total, lse.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G)


def visible(q_at: Array, k_at: Array, window: int | None, q_of: Array | None, k_of: Array | None) -> Array:
    """Whether queries at q_at, of segments q_of, see keys at k_at, of k_of; all broadcast against each other."""
    seen = (k_at >= 0) & (k_at <= q_at)
    if window is not None:
        seen &= q_at - k_at < window
    if q_of is not None and k_of is not None:
        seen &= q_of == k_of
    return seen


def check_blocks(q: Any, blocks: Any, block_q: int, block_k: int) -> None:
    """ValueError where lists of blocks are not those of q's blocks."""
    for name, x in (("block_q", block_q), ("block_k", block_k)):
        if x < 16 or x & (x - 1):
            raise ValueError(
                f"{name} is {x}; it is a power of two from 16 on: {max(16, 1 << max(x, 1).bit_length() - 1)}"
            )
    B, T, N, _ = q.shape
    wanted = (B, N, -(-T // block_q))
    if blocks.ndim != 4 or blocks.shape[:3] != wanted:
        said = ", ".join(map(str, wanted))
        raise ValueError(f"blocks is {blocks.shape}; with q {q.shape} and block_q {block_q} it is [{said}, M]")


def as_set(blocks: Array, n: int) -> Array:
    """Each index below n once, ascending, and then n: a block that is listed twice counts once."""
    blocks = jnp.sort(jnp.where((blocks >= 0) & (blocks < n), blocks, n).astype(jnp.int32), -1)
    again = jnp.pad(blocks[..., 1:] == blocks[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    return jnp.sort(jnp.where(again, n, blocks), -1)


def check(
    q: Any, k: Any, v: Any, q_positions: Any, k_positions: Any, window: int | None, softcap: float | None, sinks: Any,
    q_segments: Any, k_segments: Any,
) -> None:  # fmt: skip
    """ValueError where shapes or options are not those of one attention."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q is {q.shape} and k {k.shape}; q is [B, T, N, H], k and v are [B, K, S, H]")
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    if k.shape != (B, K, S, H) or v.shape != k.shape:
        raise ValueError(f"q is {q.shape}, k {k.shape}, v {v.shape}; with this q, k and v are both [{B}, K, S, {H}]")
    if N % K:
        raise ValueError(f"{N} query heads do not divide into {K} kv heads; each kv head serves N / K query heads")
    for name, x, wanted in (
        ("q_positions", q_positions, (B, T)), ("k_positions", k_positions, (B, S)), ("sinks", sinks, (N,)),
        ("q_segments", q_segments, (B, T)), ("k_segments", k_segments, (B, S)),
    ):  # fmt: skip
        if x is not None and x.shape != wanted:
            raise ValueError(f"{name} is {x.shape}; with q {q.shape} and k {k.shape} it is {wanted}")
    if (q_segments is None) != (k_segments is None):
        there, absent = ("k", "q") if q_segments is None else ("q", "k")
        raise ValueError(f"{there}_segments is given without {absent}_segments; give both, or neither")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it is at least 1 (a query sees itself), or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it is greater than 0, or None for no cap")
