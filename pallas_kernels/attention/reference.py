"""Attention by positions: the meaning of the op, in plain jnp.

    out_t = sum_s softmax_s( cap( scale q_t . k_s ) + mask(t, s) ) v_s          (Vaswani et al., arXiv:1706.03762)

A mask is never passed. Each query and each key slot has a position (-1: nothing there), and query t sees key s when
both are there, s is not later than t, and, under a sliding window W, fewer than W positions lie between them. The same
call therefore serves prefill, decode, a ring buffer, a padded batch and training. Scores, softmax and the weighted
sum are accumulated in float32. The scores [B, K, G, T, S] are materialised.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K queries per kv head, H head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -1e30  # finite: a query that sees nothing averages the slots and stays finite, where -inf would give NaN


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
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; the result is in q's dtype.

    scale multiplies the scores; window: a query at p sees p-window+1 .. p; softcap c: scores become c tanh(scores / c)
    (Gemma 2, arXiv:2408.00118). A query at position -1 gives an arbitrary finite row.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G, S = N // K, k.shape[2]
    # the queries of one kv head as one matrix in the order of the result, and keys first: XLA:CPU turns the scores of
    # "btkgh,bksh->bkgts" over in memory afterwards, and reads keys that stand second at a third of the speed
    q_rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bksh,bkqh->bksq", k.astype(q.dtype), q_rows, preferred_element_type=jnp.float32).swapaxes(2, 3)
    scores = scores.reshape(B, K, G, T, S) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    q_pos, k_pos = q_positions[:, :, None], k_positions[:, None, :]
    seen = (k_pos >= 0) & (k_pos <= q_pos)
    if window is not None:
        seen &= q_pos - k_pos < window
    scores = jnp.where(seen[:, None, None], scores, NEVER)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    # transposed apart from the einsum: asked for "btkgh" it puts v on the left, and that dot XLA:CPU refuses in bfloat16
    # for some shapes ("Unsupported element type for DotThunk: BF16 x BF16 = F32", jaxlib 0.10.2 to 0.12)
    out = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
