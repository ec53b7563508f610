"""Attention in linear memory, in plain XLA: blocks of queries against blocks of keys, forwards and backwards.

Forwards a block of queries meets one block of keys after another and keeps, for each query, the greatest score so far m, the
sum l of exp(score - m) and the sum o of values weighed so (online softmax, Milakov & Gimelshein, arXiv:1805.02867;
FlashAttention-2, Dao, arXiv:2307.08691, algorithm 1):

    m' = max(m, max_s x_s)    l' = e^(m - m') l + sum_s e^(x_s - m')    o' = e^(m - m') o + sum_s e^(x_s - m') v_s

Backwards only o and lse = m + log l were kept, and a block's weights are made anew (algorithm 2):

    p = e^(x - lse)    dv = p^T do    dp = do v^T    ds = p (dp - rowsum(do o))    dq = ds k    dk = ds^T q

A loop goes only from the first to the last block in which some query of some row can see something. They follow, when the
program runs, from the least and greatest position and segment in each block: a causal prompt costs half, a sliding window
costs the window, packed texts cost their own lengths. A block that is passed over would have added exact zeros, so that
this changes no bit. On a CPU what a query does not see is hidden in a step of its own, which a pair of blocks goes without
where each query sees every slot. Slots are never padded, which would copy a cache: the last block of keys is moved back to end
with the slots, and what it then has in common with the block before is not seen twice.

Memory beside the arguments: a copy of the queries, which becomes that of the result, and the scores of one pair of blocks.
The price is that k and v are read once for each block of queries, and five products backwards where saved weights need
four.

`few` writes all scores out, which is the faster on a CPU where they are few.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K, H head dim; I blocks of P queries, J blocks of C slots;
R = G P rows of a kv head, head by head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import (
    HIDDEN,
    NEVER,
    as_set,
    check,
    check_blocks,
    hidden,
    named,
    softmax,
    visible,
)
from pallas_kernels.dispatch import gpu


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many queries and slots meet at a time."""

    queries: int
    keys: int


def blocks(B: int, T: int, S: int, N: int, *, packed: bool = False, on_gpu: bool | None = None) -> Blocks:
    """Blocks for what this is traced for: on a CPU about what its caches hold, on a GPU large ones, for each pair of blocks
    is half a dozen kernels there. Slots hang on none of the sizes: a row is summed in the order in which it is alone. But for
    packed rows, as in training, which stand in no other batch.

    On two cores of a CPU (x86-64 with AVX-512, jax 0.10.2, heads of 64, float32, CPU milliseconds, the least of rounds).
    Forwards and backwards, 12 heads, queries by slots:

        rows     64 x 64   128 x 64   128 x 128   128 x 256   256 x 64   256 x 256
        4 x 256       66         65          70          82         75         102
        4 x 512      231        227         229         295

    (on jax 0.12 of 4 x 256: 63, 67, -, 74), and forwards, 8 heads, a prompt of 2k by 256 x 256 and 512 x 256: 160 and 150 (jax
    0.12: 100 and 109), of 8k 1812 and 1600 (1530 and 1496); of 8k by 512 x 512 2186, by 1024 x 256 2157. On other
    cores of the kind 4k by 256 x 256 and 512 x 256: 250 and 253, in 196 and 139 of wall time (jax 0.12: 244 and 236). A block
    that is wider than it needs to be is computed above the diagonal, of which a short row has much and a long prompt little.
    """
    if gpu() is not None if on_gpu is None else on_gpu:
        most_queries, keys, most_bytes = 1024, 1024, 64 * 2**20
    else:
        most_queries, keys = (128, 64) if packed and S <= 512 else (256, 256) if T < 4096 else (512, 256)
        most_bytes = 6 * 2**20
    queries = max(16, min(most_queries, most_bytes // (4 * B * N * keys)))  # scores are float32
    return Blocks(min(1 << (queries.bit_length() - 1), T), min(keys, S))


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
    at_once: Blocks | None = None,
) -> Any:
    """reference.attention, differentiable in q, k, v and sinks. at_once: the blocks (None: those of `blocks`)."""
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    (B, T, N, _), S = q.shape, k.shape[2]
    if at_once is None:
        at_once = blocks(B, T, S, N, packed=k_segments is not None)
    # on a GPU the step is part of a kernel that runs anyway, and a branch waits; small blocks of short texts are seldom whole
    apart = gpu() is None and k_segments is None and softcap is None and scale > 0
    how = _How(float(scale), window, softcap, min(at_once.queries, T), min(at_once.keys, S), apart)
    out, lse = _attend(how, q, k, v, sinks, _Places(q_positions, k_positions, q_segments, k_segments))
    return (out, lse) if return_lse else out


def few(
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
    """reference.attention for a CPU and few queries: all scores at once, in q's dtype where they and weights meet k and v."""
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    G = N // K
    # the queries of one kv head as one matrix in the order of the result, and keys first: XLA:CPU turns the scores of
    # "btkgh,bksh->bkgts" over in memory afterwards, and reads keys that stand second at a third of the speed
    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bksh,bkqh->bksq", k.astype(q.dtype), rows, preferred_element_type=jnp.float32).swapaxes(2, 3)
    scores = scores.reshape(B, K, G, T, S) * scale
    scores = hidden(scores, (q_positions, k_positions, q_segments, k_segments), window, softcap)
    weights, lse = softmax(scores, sinks)
    # transposed apart from the einsum: asked for "btkgh" it puts v on the left, and that dot XLA:CPU refuses in bfloat16
    # for some shapes ("Unsupported element type for DotThunk: BF16 x BF16 = F32", jaxlib 0.10.2 to 0.12)
    out = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
    )
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
    return (out, lse) if return_lse else out


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
    """reference.sparse_attention: the m-th key block of every head's list at a time, up to the longest list of a block of
    queries. No gradient: XLA does not know one of a loop whose length is not known."""
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    check_blocks(q, blocks, block_q, block_k)
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    C, J = min(block_k, S), -(-S // block_k)
    lists = as_set(blocks, J)  # J stands for none
    longest = (lists < J).sum(-1).max((0, 1))  # [I]

    def by_blocks(x: Array, fill: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -T % block_q)), constant_values=fill).reshape(B, -1, block_q)

    q_at, q_of = by_blocks(q_positions, -1), None if q_segments is None else by_blocks(q_segments, 0)

    def block(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = done
        q_i = _block(out, i)  # [B, N, P, H]; not done yet
        list_i, q_at_i = (lax.dynamic_index_in_dim(a, i, axis, keepdims=False) for a, axis in ((lists, 2), (q_at, 1)))

        def meet(m: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, o = running
            j = lax.dynamic_index_in_dim(list_i, m, 2, keepdims=False)  # [B, N]
            start = jnp.minimum(j * block_k, S - C)
            slots = start[..., None] + jnp.arange(C, dtype=jnp.int32)[None, None]  # [B, N, C]

            def of_slots(x: Array) -> Array:
                """[B, S] -> [B, N, C]."""
                return jnp.take_along_axis(x[:, None], slots, 2, mode="clip")

            def taken(x: Array) -> Array:
                """[B, K, S, H] -> [B, N, C, H]."""

                def one(x: Array, head: Array, at: Array) -> Array:
                    return lax.dynamic_slice(x, (head, at, jnp.int32(0)), (1, C, H))[0]

                heads = jnp.repeat(jnp.arange(K, dtype=jnp.int32), N // K)
                return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, 0))(x, heads, start).astype(q.dtype)

            x = _dot("bnph,bnch->bnpc", q_i, taken(k)) * scale
            if softcap is not None:
                x = softcap * jnp.tanh(x / softcap)
            # of a block that was moved back, and of none, nothing is seen
            k_at = jnp.where((slots >= j[..., None] * block_k) & (j < J)[..., None], of_slots(k_positions), -1)
            q_of_i = None if q_of is None else lax.dynamic_index_in_dim(q_of, i, 1, keepdims=False)[:, None, :, None]
            k_of = None if k_segments is None else of_slots(k_segments)[:, :, None]
            x = jnp.where(visible(q_at_i[:, None, :, None], k_at[:, :, None], window, q_of_i, k_of), x, NEVER)
            top_new = jnp.maximum(top, x.max(-1))
            p, shrunk = jnp.exp(x - top_new[..., None]), jnp.exp(top - top_new)
            return top_new, total * shrunk + p.sum(-1), o * shrunk[..., None] + _dot("bnpc,bnch->bnph", p, taken(v))

        if sinks is None:
            top, total = jnp.full(q_i.shape[:3], HIDDEN, jnp.float32), jnp.zeros(q_i.shape[:3], jnp.float32)
        else:
            top, total = (jnp.broadcast_to(a[None, :, None], q_i.shape[:3]) for a in beginning(sinks))
        top, total, o = lax.fori_loop(0, longest[i], meet, (top, total, jnp.zeros(q_i.shape, jnp.float32)))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        made = (o / total[..., None]).astype(q.dtype), jnp.where(some, top + jnp.log(total), NEVER)
        return tuple(lax.dynamic_update_index_in_dim(a, a_i, i, 0) for a, a_i in zip((out, lse), made, strict=True))

    q_b = _to_blocks(q, N, block_q)
    out, lse = lax.fori_loop(0, len(q_b), block, (q_b, jnp.zeros(q_b.shape[:-1], jnp.float32)))
    out, lse = _from_blocks(out, T, 1), _from_blocks(lse[..., None], T, 1)[..., 0]
    return (out, lse) if return_lse else out


def beginning(sinks: Float[Array, "N"]) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """The running maximum and denominator before any slot. A sink may be -inf, or so low that hidden slots would weigh."""
    sinks = sinks.astype(jnp.float32)
    top = jnp.maximum(sinks, HIDDEN)
    return top, jnp.exp(sinks - top)


class _How(NamedTuple):
    """What is static about a call."""

    scale: float
    window: int | None
    softcap: float | None
    P: int
    C: int
    apart: bool  # what is not seen is hidden in a step of its own, of those pairs of blocks alone that have any


class _Places(NamedTuple):
    """Where queries and slots stand, and of which segment they are: [B, T] and [B, S], or by blocks [I, B, P], [J, B, C]."""

    q_at: Array
    k_at: Array
    q_of: Array | None
    k_of: Array | None


class _Span(NamedTuple):
    """From which block of the other kind a loop goes, and up to which, for each block."""

    first: Array
    end: Array


def _forward(how: _How, q: Array, k: Array, v: Array, sinks: Array | None, places: _Places) -> tuple[Array, Array]:
    (B, T, N, H), K = q.shape, k.shape[1]
    G, R = N // K, N // K * how.P
    places_b, keys_of, _ = _blocked(how, places)
    whole = _whole(how, places_b) if how.apart else None
    if sinks is None:
        m, total = jnp.full((B, K, R), HIDDEN, jnp.float32), jnp.zeros((B, K, R), jnp.float32)
    else:
        m, total = (
            jnp.broadcast_to(a.reshape(1, K, G, 1), (B, K, G, how.P)).reshape(B, K, R) for a in beginning(sinks)
        )

    def block(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = done
        q_i = _block(out, i)  # not done yet

        def meet(j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, total, o = running
            k_j, v_j = (_slots(how, a, j).astype(q.dtype) for a in (k, v))
            if whole is None:
                x, factor = _scores(how, places_b, q_i, k_j, i, j)[0], 1.0
            else:  # the scale goes with the exponential, and what is seen by all is not gone over to hide nothing
                x, factor = _dot("bkrh,bksh->bkrs", q_i, k_j), how.scale
                hide = functools.partial(
                    _hidden, how, places_b, i, j, max(NEVER / factor, float(jnp.finfo(jnp.float32).min))
                )
                x = lax.fori_loop(0, jnp.where(whole[i, j], 0, 1), lambda _, x: hide(x), x)
            m_new = jnp.maximum(m, x.max(-1) * factor)
            p, shrunk = jnp.exp(x * factor - m_new[..., None]), jnp.exp(m - m_new)
            o = o * shrunk[..., None] + _dot("bkrs,bksh->bkrh", p, v_j)
            return m_new, total * shrunk + p.sum(-1), o

        start = (m, total, jnp.zeros((B, K, R, H), jnp.float32))
        m_i, total_i, o_i = lax.fori_loop(keys_of.first[i], keys_of.end[i], meet, start)
        some = total_i > 0
        total_i = jnp.where(some, total_i, 1.0)
        o_i, lse_i = (o_i / total_i[..., None]).astype(q.dtype), jnp.where(some, m_i + jnp.log(total_i), NEVER)
        return tuple(lax.dynamic_update_index_in_dim(a, a_i, i, 0) for a, a_i in ((out, o_i), (lse, lse_i)))

    # results take the place of their queries. Into an array of their own that begins as zeros, XLA:CPU would copy one such
    # array for each layer of a model before the first layer runs, and keep all of them
    q_b = _to_blocks(q, K, how.P)
    out, lse = lax.fori_loop(0, len(q_b), block, (q_b, jnp.zeros(q_b.shape[:-1], jnp.float32)))
    return _from_blocks(out, T, G), _from_blocks(lse[..., None], T, G)[..., 0]


def _backward(how: _How, kept: Any, gradients: tuple[Array, Array]) -> Any:
    q, k, v, sinks, places, out, lse = kept
    dout, dlse = gradients
    (_, T, N, _), (K, S) = q.shape, k.shape[1:3]
    G, P = N // K, how.P
    places_b, _, queries_of = _blocked(how, places)
    # d lse / d x = p, and d out / d x = p (v - out): what comes through lse only lowers the row's sum
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse
    sees = lse > HIDDEN
    q_b, dout_b = _to_blocks(q, K, P), _to_blocks(dout.astype(q.dtype), K, P)
    # where nothing is seen, weights exp(NEVER - 0) = 0
    lse_b, delta_b = (_to_blocks(a[..., None], K, P)[..., 0] for a in (jnp.where(sees, lse, 0.0), delta))

    def block(j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = running
        k_j, v_j = (_slots(how, a, j).astype(q.dtype) for a in (k, v))

        def meet(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk_j, dv_j = running
            q_i, dout_i, lse_i, delta_i = (_block(a, i) for a in (q_b, dout_b, lse_b, delta_b))
            x, slope = _scores(how, places_b, q_i, k_j, i, j)
            p = jnp.exp(x - lse_i[..., None])
            dv_j = dv_j + _dot("bkrs,bkrh->bksh", p, dout_i)
            dx = p * (_dot("bkrh,bksh->bkrs", dout_i, v_j) - delta_i[..., None])
            if slope is not None:
                dx = dx * slope
            dq_i = _block(dq, i) + _dot("bkrs,bksh->bkrh", dx, k_j)
            dq = lax.dynamic_update_index_in_dim(dq, dq_i, i, 0)
            return dq, dk_j + _dot("bkrs,bkrh->bksh", dx, q_i), dv_j

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        dq, dk_j, dv_j = lax.fori_loop(queries_of.first[j], queries_of.end[j], meet, (dq, zeros, zeros))

        def put(whole: Array, part: Array) -> Array:
            # added: the last block's share of what it has in common with the one before is zero
            part = part.astype(whole.dtype) + _slots(how, whole, j)
            return lax.dynamic_update_slice_in_dim(whole, part, _start(how, S, j), 2)

        return dq, put(dk, dk_j * how.scale), put(dv, dv_j)

    start = (_zeros_beside(q_b, jnp.float32), _zeros_beside(k, k.dtype), _zeros_beside(v, v.dtype))
    dq, dk, dv = lax.fori_loop(0, len(places_b.k_at), block, start)
    dq = _from_blocks((dq * how.scale).astype(q.dtype), T, G)
    if sinks is None:
        return dq, dk, dv, None, None
    weight = jnp.exp(sinks.astype(jnp.float32)[None, None] - lse)
    return dq, dk, dv, -(weight * delta).sum((0, 1)).astype(sinks.dtype), None


def _forward_keeping(how: _How, q: Array, k: Array, v: Array, sinks: Array | None, places: _Places) -> Any:
    out, lse = named(*_forward(how, q, k, v, sinks, places))
    return (out, lse), (q, k, v, sinks, places, out, lse)


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_forward_keeping, _backward)
# so that a call outside jit is compiled once and not at every call, as loops over new functions would be
_attend = jax.jit(_differentiable, static_argnums=0)


def _scores(how: _How, places: _Places, q_i: Array, k_j: Array, i: Array, j: Array) -> tuple[Array, Array | None]:
    """Scores [B, K, R, C] of a pair of blocks, NEVER where nothing is seen, and the slope of the cap at each."""
    x, slope = _dot("bkrh,bksh->bkrs", q_i, k_j) * how.scale, None
    if how.softcap is not None:
        bent = jnp.tanh(x / how.softcap)
        x, slope = how.softcap * bent, 1.0 - bent * bent
    return _hidden(how, places, i, j, NEVER, x), slope


def _hidden(how: _How, places: _Places, i: Array, j: Array, never: float, x: Array) -> Array:
    """Scores of a pair of blocks, `never` where nothing is seen."""
    q_at, k_at, q_of, k_of = (None if a is None else _block(a, at) for a, at in zip(places, (i, j, i, j), strict=True))
    assert q_at is not None
    assert k_at is not None
    seen = visible(
        q_at[:, :, None], k_at[:, None, :], how.window,
        None if q_of is None else q_of[:, :, None], None if k_of is None else k_of[:, None, :],
    )  # fmt: skip
    B, K, R, C = x.shape
    by_head = x.reshape(B, K, R // how.P, how.P, C)
    return jnp.where(seen[:, None, None], by_head, never).reshape(x.shape)


def _dot(spec: str, x: Array, y: Array) -> Array:
    """einsum(spec, x, y) in y's precision, accumulated in float32."""

    def wide(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)  # or tensor cores would round to 10 bits

    def narrow(x: Array, y: Array) -> Array:
        return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)

    if y.dtype == jnp.float32:
        return wide(x, y)
    # XLA:CPU has no product of 16-bit matrices: it converts them, or refuses ("Unsupported element type for DotThunk")
    return lax.platform_dependent(x, y, cpu=wide, default=narrow)


# -- blocks


def _to_blocks(x: Array, K: int, P: int) -> Array:
    """[B, T, N, H] -> [I, B, K, R, H]; zeros fill the last block."""
    B, T, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % P), (0, 0), (0, 0)))
    return x.reshape(B, -1, P, K, N // K, H).transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, N // K * P, H)


def _from_blocks(x: Array, T: int, G: int) -> Array:
    """The reverse, for T queries."""
    _, B, K, R, H = x.shape
    x = x.reshape(-1, B, K, G, R // G, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, K * G, H)[:, :T]


def _block(x: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _zeros_beside(x: Array, dtype: Any) -> Array:
    """Zeros of x's shape that wait for x, and take nothing of it, a NaN neither. Zeros that wait for nothing XLA:CPU copies for
    all layers of a model before the first of them runs: see `_forward`."""
    return ((x != x) & (x == x)).astype(dtype)


def _start(how: _How, S: int, j: Any) -> Array:
    return jnp.minimum(j * how.C, S - how.C)


def _slots(how: _How, x: Array, j: Array) -> Array:
    """Block j of slots, [B, K, C, H]."""
    return lax.dynamic_slice_in_dim(x, _start(how, x.shape[2], j), how.C, 2)


def _blocked(how: _How, places: _Places) -> tuple[_Places, _Span, _Span]:
    """Places by blocks; for each block of queries the blocks of keys that it may meet, and the other way round."""
    P, C, T, S = how.P, how.C, places.q_at.shape[1], places.k_at.shape[1]
    starts = np.arange(0, S, C)
    slots = np.minimum(starts, S - C)[:, None] + np.arange(C)
    again = (slots < starts[:, None])[:, None]  # [J, 1, C]: those of the block before

    def queries(x: Array, fill: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -T % P)), constant_values=fill).reshape(len(x), -1, P).swapaxes(0, 1)

    def keys(x: Array) -> Array:
        return x[:, slots].swapaxes(0, 1)

    q_at, k_at = queries(places.q_at, -1), jnp.where(again, -1, keys(places.k_at))
    q_of = None if places.q_of is None else queries(places.q_of, 0)
    k_of = None if places.k_of is None else keys(places.k_of)

    (q_low, q_high), (k_low, k_high) = _extremes(q_at, q_at >= 0), _extremes(k_at, k_at >= 0)
    meet = k_low[None] <= q_high[:, None]  # [I, J, B]
    if how.window is not None:
        meet &= k_high[None] > q_low[:, None] - how.window
    if q_of is not None and k_of is not None:
        (q_low, q_high), (k_low, k_high) = _extremes(q_of, q_at >= 0), _extremes(k_of, k_at >= 0)
        meet &= (k_low[None] <= q_high[:, None]) & (q_low[:, None] <= k_high[None])
    meet = meet.any(-1)
    return _Places(q_at, k_at, q_of, k_of), _span(meet), _span(meet.T)


def _whole(how: _How, places: _Places) -> Array:
    """Whether in a pair of blocks each query of each row sees every slot, [I, J]; of rows without segments."""
    q_at, k_at = places.q_at, places.k_at
    every = (k_at.min(-1)[None] >= 0) & (k_at.max(-1)[None] <= q_at.min(-1)[:, None])  # [I, J, B]
    if how.window is not None:
        every &= q_at.max(-1)[:, None] - k_at.min(-1)[None] < how.window
    return every.all(-1)


def _extremes(x: Array, held: Array) -> tuple[Array, Array]:
    """The least and the greatest of x [., B, .] where something is held; where nothing is, the least is above them all."""
    info = jnp.iinfo(x.dtype)
    return jnp.where(held, x, info.max).min(-1), jnp.where(held, x, info.min).max(-1)


def _span(meet: Array) -> _Span:
    """The first and one past the last of each row's blocks that meet; 0 and 0 where none do."""
    n, some = meet.shape[1], meet.any(1)
    return _Span(jnp.argmax(meet, 1), jnp.where(some, n - jnp.argmax(meet[:, ::-1], 1), 0))
