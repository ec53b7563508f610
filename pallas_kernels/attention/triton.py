"""Tiled attention by positions for NVIDIA cards from sm_80 on: one Pallas kernel forward, two backward, on Triton.

Scores are never stored. A program keeps one tile of queries and walks over tiles of keys with a running maximum and a
running sum (online softmax, Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691), so that each
query is read once, keys and values once per tile of queries, and memory is linear in length. Backward recomputes the
scores from the log-sum-exp that forward kept: one kernel owns tiles of keys (dk, dv), one tiles of queries (dq), so that
no sum needs atomics and gradients are the same from run to run.

Which tiles of keys a tile of queries can see is known before the kernel runs (`spans.py`): none outside [lo, hi), and in
[a, b) everything is seen by everyone. Those run without a mask; the rest, with the diagonal, runs with one.

Where queries are few (decode, short chunks) the G query heads of one kv head are rows of one tile, so that keys and values
are read once for all of them.

Exponentials are to the base 2; a score that is not seen is -1e30, not -inf, so that no row makes a NaN. Scores, softmax
and sums are float32; weights are rounded once to the inputs' dtype for the second product. A query that sees nothing
gives zeros, a log-sum-exp of -1e30 (or its sink), and no gradient.

Forward and backward split over a mesh as `over_mesh.py` says.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K, H head dim; R rows of P heads: T of N, or, packed, T G
of K.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import tiles as tiling
from pallas_kernels.attention.over_mesh import over_mesh
from pallas_kernels.attention.reference import as_set, check, check_blocks, named
from pallas_kernels.attention.spans import FAR, bounds, padded, places
from pallas_kernels.attention.tiles import Config, Tiles
from pallas_kernels.triton_call import triton_call

NEVER = -1e30  # finite, so that a row with nothing to see makes no NaN
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
PACKED = 64  # fewer queries than this: the query heads of a kv head share a tile


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call: the shape of the mask, and the tiles."""

    scale: float
    window: int | None
    softcap: float | None
    tiles: Tiles
    interpret: bool


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
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Any:
    """What pallas_kernels.attention.reference gives, in tiles; with return_lse beside it lse [B, T, N], natural.

    Differentiable in q, k, v and sinks, through the log-sum-exp too. interpret: run on the CPU as written, for tests. tiles:
    instead of those that `pallas_kernels.attention.tiles` chooses. Raises dispatch.Refused for what it cannot serve.
    """
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    capability = _serves(q, k, v, scale, interpret)
    T, H, G = q.shape[1], q.shape[3], q.shape[2] // k.shape[1]
    if tiles is None:
        tiles = tiling.choose(capability, H, T * G if _packs(T, G) else T)
    call = Call(float(scale), window, softcap, tiles, interpret)
    # a cache in another 16-bit type than the model's is turned first: tiles of both would not fit
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    out, lse = _attend(call, q, k, v, sinks, q_positions, k_positions, q_segments, k_segments)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


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
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Any:
    """What pallas_kernels.attention.reference.sparse_attention gives, in tiles. Forward only: a gradient raises."""
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    check_blocks(q, blocks, block_q, block_k)
    (_, T, _, H), S = q.shape, k.shape[2]
    capability = _serves(q, k, v, scale, interpret)
    tiles = tiling.choose(capability, H, T) if tiles is None else tiles
    config = dataclasses.replace(
        tiles.forward, block_q=min(tiles.forward.block_q, block_q), block_k=min(tiles.forward.block_k, block_k)
    )
    call = Call(float(scale), window, softcap, dataclasses.replace(tiles, forward=config), interpret)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    places = q_positions, k_positions, q_segments, k_segments
    out, lse = _sparse(call, block_q, block_k, q, k, v, sinks, *places, as_set(blocks, pl.cdiv(S, block_k)))
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def _packs(T: int, G: int) -> bool:
    """Whether the query heads of a kv head share a tile."""
    return G > 1 and T < PACKED


def _serves(q: Any, k: Any, v: Any, scale: float, interpret: bool) -> tuple[int, int]:
    """The compute capability that the call is compiled for; raises Refused where this file cannot serve it."""
    card = dispatch.gpu()
    if not interpret:
        if card is None:
            raise dispatch.Refused(
                "there is no GPU; on a CPU the chunked form (xla) serves, or interpret=True for tests"
            )
        if card.capability < (8, 0):
            major, minor = card.capability
            raise dispatch.Refused(f"compute capability {major}.{minor} is below 8.0; the chunked form (xla) serves it")
    floats = (jnp.bfloat16, jnp.float16, *((jnp.float32,) if interpret else ()))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in floats:
            raise dispatch.Refused(
                f"{name} is {x.dtype}; the tensor cores take bfloat16 and float16 here, and would round float32 to 10 bits:"
                " the chunked form (xla) serves it"
            )
    if q.shape[3] > 256:
        raise dispatch.Refused(
            f"head_dim is {q.shape[3]}; tiles are at most 256 wide: the chunked form (xla) serves it"
        )
    if not scale > 0:
        raise dispatch.Refused(
            f"scale is {scale}; the running maximum needs one above 0: the chunked form (xla) serves it"
        )
    return (8, 0) if card is None else card.capability


def _bounds(
    call: Call, config: Config, q_at: Any, k_at: Any, q_of: Any, k_of: Any, *, of_keys: bool
) -> tuple[jax.Array, ...]:
    return bounds(call.window, config.block_q, config.block_k, q_at, k_at, q_of, k_of, of_keys=of_keys)


# ---- in the kernels


def _load(
    ref: Any, start: Any, block: int, count: int, H: int, *, head: Any = None, unit: int | None = None
) -> jax.Array:
    """Rows start .. start+block of ref [rows, H'] (or [rows, heads, H']); zeros past `count` rows and H columns.

    unit: what the walk goes in steps of, where that is more than a block.
    """
    wide = ref.shape[-1]
    rows = pl.ds(start, block)
    view = ref.at[rows, :] if head is None else ref.at[rows, head, :]
    mask = _inside(start, block, count, wide, H, unit)
    return plt.load(view) if mask is None else plt.load(view, mask=mask, other=0.0)


def _inside(start: Any, block: int, count: int, wide: int, H: int, unit: int | None = None) -> jax.Array | None:
    """[block, wide]: where there is anything; None where that is everywhere, known when traced."""
    mask = None
    if count % (unit or block):
        mask = jnp.broadcast_to((start + jnp.arange(block) < count)[:, None], (block, wide))
    if wide != H:
        columns = jnp.broadcast_to((jnp.arange(wide) < H)[None, :], (block, wide))
        mask = columns if mask is None else mask & columns
    return mask


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _capped(raw: jax.Array, call: Call) -> jax.Array:
    """softcap tanh(scale raw / softcap) in units of log 2, by one exponential: 1 - 2 / (exp(2x) + 1)."""
    assert call.softcap is not None
    tanh = 1.0 - 2.0 / (jnp.exp2(raw * (2 * LOG2E * call.scale / call.softcap)) + 1.0)
    return tanh * (call.softcap * LOG2E)


def _seen(q_at: jax.Array, k_at: jax.Array, q_of: Any, k_of: Any, window: int | None) -> jax.Array:
    """Mask of rank 2, of columns and rows as the arguments are turned: [BQ, 1] and [1, BK], or [1, BQ] and [BK, 1]."""
    seen = jnp.where(k_at < 0, FAR, k_at) <= q_at
    if window is not None:
        seen &= q_at - k_at < window
    if q_of is not None:
        seen &= q_of == k_of
    return seen


def _walk(spans: Any, body: Callable[[Any, Any, bool], Any], carry: Any) -> Any:
    """body(tile, carry, masked) over [a, b) without a mask, then over what is left of [lo, hi) with one."""
    lo, a, b, hi = (ref[...] for ref in spans)
    lo, a, b = (jnp.minimum(x, hi) for x in (lo, a, b))
    before = a - lo
    carry = lax.fori_loop(a, b, lambda j, c: body(j, c, False), carry)

    def rest(r: Any, carry: Any) -> Any:
        return body(jnp.where(r < before, lo + r, b + r - before), carry, True)

    return lax.fori_loop(0, before + hi - b, rest, carry)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, sink_ref: Any, q_at_ref: Any, k_at_ref: Any, q_of_ref: Any, k_of_ref: Any,
    lo_ref: Any, a_ref: Any, b_ref: Any, hi_ref: Any, list_ref: Any, count_ref: Any, o_ref: Any, lse_ref: Any,
    *, call: Call, config: Config, R: int, S: int, H: int, unit: int,
) -> None:  # fmt: skip
    BQ, BK = config.block_q, config.block_k
    wide = q_ref.shape[-1]
    start = _tile_of_queries(R, BQ) * BQ
    inside = _inside(start, BQ, R, wide, H)
    q = q_ref[...] if inside is None else plt.load(q_ref.at[:, :], mask=inside, other=0.0)
    factor = call.scale * LOG2E

    def body(j: Any, carry: Any, masked: bool) -> Any:
        acc, top, mass = carry
        slots = pl.ds(j * BK, BK)
        k = _load(k_ref, j * BK, BK, S, H, unit=unit)
        raw = _dot(q, k, (1, 1))
        if call.softcap is not None or masked:
            score = raw * factor if call.softcap is None else _capped(raw, call)
            if masked:
                # the rows' positions are read again here: kept over the loop without a mask, they cost it registers
                q_of, k_of = (None, None) if q_of_ref is None else (q_of_ref[...][:, None], k_of_ref[slots][None, :])
                seen = _seen(q_at_ref[...][:, None], k_at_ref[slots][None, :], q_of, k_of, call.window)
                score = jnp.where(seen, score, NEVER)
            now = jnp.maximum(top, score.max(1))
            weight = jnp.exp2(score - now[:, None])
        else:
            # the scale goes into the exponent's multiply-add instead of a pass over the scores
            now = jnp.maximum(top, raw.max(1) * factor)
            weight = jnp.exp2(raw * factor - now[:, None])
        keep = jnp.exp2(top - now)
        mass = mass * keep + weight.sum(1)
        v = _load(v_ref, j * BK, BK, S, H, unit=unit)
        acc = acc * keep[:, None] + _dot(weight.astype(q.dtype), v)
        return acc, now, mass

    if sink_ref is None:
        top, mass = jnp.full((BQ,), NEVER, jnp.float32), jnp.zeros((BQ,), jnp.float32)
    else:
        top, mass = sink_ref[...] * LOG2E, jnp.ones((BQ,), jnp.float32)
    acc = jnp.zeros((BQ, wide), jnp.float32)
    if list_ref is None:
        acc, top, mass = _walk((lo_ref, a_ref, b_ref, hi_ref), body, (acc, top, mass))
    else:
        each = jnp.int32(unit // BK)

        def listed(r: Any, carry: Any) -> Any:
            # lax's, since the floor division of jnp does not lower
            return body(list_ref[lax.div(r, each)] * each + lax.rem(r, each), carry, True)

        acc, top, mass = lax.fori_loop(0, count_ref[...] * each, listed, (acc, top, mass))
    # what was summed of slots that are not seen before one that is was scaled to nothing; where none is, it stands here
    found = (top > NEVER) & (mass > 0)
    mass = jnp.where(found, mass, 1.0)
    out = jnp.where(found[:, None], acc, 0.0) / mass[:, None]
    plt.store(o_ref.at[:, :], out.astype(o_ref.dtype), mask=inside)
    lse_ref[...] = jnp.where(found, (top + jnp.log2(mass)) * LN2, NEVER)


def _tile_of_queries(R: int, BQ: int) -> Any:
    """Later tiles first: under a causal mask they are the longest, and the short ones fill the end."""
    return pl.cdiv(R, BQ) - 1 - pl.program_id(0)


def _forward(
    call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any,
    lists: Any = None, block_q: int = 0, block_k: int = 0,
) -> Any:  # fmt: skip
    """Rows: q [B, R, P, H], q_at [B, R], sinks [P, R] or None; gives out [B, R, P, H] and lse [B, P, R].

    lists: [B, P, blocks of block_q rows, M] of key blocks of block_k slots, ascending, those that are none at the end.
    """
    config = call.tiles.forward
    (B, R, P, H), (K, S) = q.shape, k.shape[1:3]
    BQ, unit = config.block_q, block_k or config.block_k
    wide, G = tiling.padded(H), P // K
    steps, slots = pl.cdiv(R, BQ), pl.cdiv(S, unit) * unit
    counts, spans = None, (None,) * 4
    if lists is None:
        spans = _bounds(call, config, q_at, k_at, q_of, k_of, of_keys=False)
    else:
        counts = (lists < slots // unit).sum(-1, dtype=jnp.int32)

    def at(i: Any) -> Any:
        return steps - 1 - i

    rows = pl.BlockSpec((None, BQ, None, wide), lambda i, p, b: (b, at(i), p, 0))
    keys = pl.BlockSpec((None, None, slots, wide), lambda i, p, b: (b, p // G, 0, 0))
    row = pl.BlockSpec((None, BQ), lambda i, p, b: (b, at(i)))
    slot = pl.BlockSpec((None, slots), lambda i, p, b: (b, 0))
    span = pl.BlockSpec((None, None), lambda i, p, b: (b, at(i)))
    per_row = pl.BlockSpec((None, None, BQ), lambda i, p, b: (b, p, at(i)))
    sink = pl.BlockSpec((None, BQ), lambda i, p, b: (p, at(i)))
    listed = count = None
    if lists is not None:
        listed = pl.BlockSpec((None, None, None, lists.shape[3]), lambda i, p, b: (b, p, at(i) * BQ // block_q, 0))
        count = pl.BlockSpec((None, None, None), lambda i, p, b: (b, p, at(i) * BQ // block_q))
    if sinks is not None:
        sinks = padded(sinks.astype(jnp.float32), BQ, 0.0)
    arrays = (q, k, v, sinks, *places(q_at, k_at, q_of, k_of, BQ, unit), *spans, lists, counts)
    specs = (rows, keys, keys, sink, row, slot, row, slot, span, span, span, span, listed, count)
    out, lse = triton_call(
        functools.partial(_forward_kernel, call=call, config=config, R=R, S=S, H=H, unit=unit),
        *arrays,
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, P, steps * BQ), jnp.float32),
        ),
        grid=(steps, P, B),
        in_specs=specs,
        out_specs=(rows, per_row),
        num_warps=config.warps,
        num_stages=config.stages,
        name="attention_forward",
        interpret=call.interpret,
    )
    return out, lse[:, :, :R]


def _queries_forward(
    call: Call, block_q: int, block_k: int, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any,
    k_of: Any, lists: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """out [B, T, N, H], lse [B, N, T]: the heads of a kv head in one tile where queries are few and there are no lists."""
    (B, T, N, H), K = q.shape, k.shape[1]
    G = N // K
    if lists is not None or not _packs(T, G):
        sinks = None if sinks is None else jnp.broadcast_to(sinks[:, None], (N, T))
        return _forward(call, q, k, v, sinks, q_at, k_at, q_of, k_of, lists, block_q, block_k)
    rows = q.reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(K, 1, G), (K, T, G)).reshape(K, T * G)
    q_at, q_of = (None if x is None else jnp.repeat(x, G, 1) for x in (q_at, q_of))
    out, lse = _forward(call, rows, k, v, sinks, q_at, k_at, q_of, k_of)
    out = out.reshape(B, T, G, K, H).swapaxes(2, 3).reshape(B, T, N, H)
    return out, lse.reshape(B, K, T, G).swapaxes(2, 3).reshape(B, N, T)


# ---- backward


def _weights(raw: jax.Array, lse: jax.Array, seen: jax.Array | None, call: Call) -> tuple[jax.Array, Any]:
    """softmax's weights from raw scores and the log-sum-exp (in units of log 2), and d score / d (scale raw)."""
    if call.softcap is None:
        weight, slope = jnp.exp2(raw * (call.scale * LOG2E) - lse), None
    else:
        score = _capped(raw, call)
        weight = jnp.exp2(score - lse)
        tanh = score * (1.0 / (call.softcap * LOG2E))
        slope = 1.0 - tanh * tanh
    # after the exponential: where nothing is seen the log-sum-exp is -1e30 and it overflows
    return weight if seen is None else jnp.where(seen, weight, 0.0), slope


def _keys_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, lse_ref: Any, delta_ref: Any,
    q_at_ref: Any, k_at_ref: Any, q_of_ref: Any, k_of_ref: Any, lo_ref: Any, a_ref: Any, b_ref: Any, hi_ref: Any,
    dk_ref: Any, dv_ref: Any, *, call: Call, config: Config, T: int, S: int, H: int, G: int,
) -> None:  # fmt: skip
    BQ, BK = config.block_q, config.block_k
    wide = k_ref.shape[-1]
    inside = _inside(pl.program_id(0) * BK, BK, S, wide, H)
    dtype = q_ref.dtype
    k, v = (ref[...] if inside is None else plt.load(ref.at[:, :], mask=inside, other=0.0) for ref in (k_ref, v_ref))

    def head(g: Any, carry: Any) -> Any:
        def body(i: Any, carry: Any, masked: bool) -> Any:
            dk, dv = carry
            rows = pl.ds(i * BQ, BQ)
            q = _load(q_ref, i * BQ, BQ, T, H, head=g)
            lse, delta = lse_ref[g, rows] * LOG2E, delta_ref[g, rows]
            seen = None
            if masked:
                q_of, k_of = (None, None) if q_of_ref is None else (q_of_ref[rows][None, :], k_of_ref[...][:, None])
                seen = _seen(q_at_ref[rows][None, :], k_at_ref[...][:, None], q_of, k_of, call.window)
            # keys stand first, so that neither product below needs the weights turned over
            weight, slope = _weights(_dot(k, q, (1, 1)), lse[None, :], seen, call)
            do = _load(do_ref, i * BQ, BQ, T, H, head=g)
            dv = dv + _dot(weight.astype(dtype), do)
            d = weight * (_dot(v, do, (1, 1)) - delta[None, :])
            if slope is not None:
                d = d * slope
            return dk + _dot(d.astype(dtype), q), dv

        return _walk((lo_ref, a_ref, b_ref, hi_ref), body, carry)

    zeros = jnp.zeros((BK, wide), jnp.float32)
    dk, dv = lax.fori_loop(0, G, head, (zeros, zeros))
    plt.store(dk_ref.at[:, :], (dk * call.scale).astype(dk_ref.dtype), mask=inside)
    plt.store(dv_ref.at[:, :], dv.astype(dv_ref.dtype), mask=inside)


def _queries_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, lse_ref: Any, delta_ref: Any,
    q_at_ref: Any, k_at_ref: Any, q_of_ref: Any, k_of_ref: Any, lo_ref: Any, a_ref: Any, b_ref: Any, hi_ref: Any,
    dq_ref: Any, *, call: Call, config: Config, T: int, S: int, H: int,
) -> None:  # fmt: skip
    BQ, BK = config.block_q, config.block_k
    wide = q_ref.shape[-1]
    inside = _inside(_tile_of_queries(T, BQ) * BQ, BQ, T, wide, H)
    q, do = (ref[...] if inside is None else plt.load(ref.at[:, :], mask=inside, other=0.0) for ref in (q_ref, do_ref))
    lse, delta = lse_ref[...] * LOG2E, delta_ref[...]

    def body(j: Any, dq: Any, masked: bool) -> Any:
        slots = pl.ds(j * BK, BK)
        k = _load(k_ref, j * BK, BK, S, H)
        v = _load(v_ref, j * BK, BK, S, H)
        seen = None
        if masked:
            q_of, k_of = (None, None) if q_of_ref is None else (q_of_ref[...][:, None], k_of_ref[slots][None, :])
            seen = _seen(q_at_ref[...][:, None], k_at_ref[slots][None, :], q_of, k_of, call.window)
        weight, slope = _weights(_dot(q, k, (1, 1)), lse[:, None], seen, call)
        d = weight * (_dot(do, v, (1, 1)) - delta[:, None])
        if slope is not None:
            d = d * slope
        return dq + _dot(d.astype(q.dtype), k)

    dq = _walk((lo_ref, a_ref, b_ref, hi_ref), body, jnp.zeros((BQ, wide), jnp.float32))
    plt.store(dq_ref.at[:, :], (dq * call.scale).astype(dq_ref.dtype), mask=inside)


def _backward(
    call: Call, q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv; lse and delta are [B, N, T]."""
    return (
        _backward_queries(call, q, k, v, do, lse, delta, q_at, k_at, q_of, k_of),
        *_backward_keys(call, q, k, v, do, lse, delta, q_at, k_at, q_of, k_of),
    )


def _backward_keys(
    call: Call, q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, by tiles of keys: the G heads of a tile one after another, so that their sums need no second pass."""
    config = call.tiles.keys
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    BQ, BK = config.block_q, config.block_k
    wide, G, rows = tiling.padded(H), N // K, pl.cdiv(T, BQ) * BQ
    queries = pl.BlockSpec((None, rows, G, wide), lambda j, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, None, BK, wide), lambda j, h, b: (b, h, j, 0))
    row = pl.BlockSpec((None, rows), lambda j, h, b: (b, 0))
    slot = pl.BlockSpec((None, BK), lambda j, h, b: (b, j))
    span = pl.BlockSpec((None, None), lambda j, h, b: (b, j))
    per_row = pl.BlockSpec((None, G, rows), lambda j, h, b: (b, h, 0))
    spans = _bounds(call, config, q_at, k_at, q_of, k_of, of_keys=True)
    sums = padded(lse, BQ, 0.0, 2), padded(delta, BQ, 0.0, 2)
    arrays = (q, k, v, do, *sums, *places(q_at, k_at, q_of, k_of, BQ, BK), *spans)
    specs = (queries, keys, keys, queries, per_row, per_row, row, slot, row, slot, span, span, span, span)
    dk, dv = triton_call(
        functools.partial(_keys_kernel, call=call, config=config, T=T, S=S, H=H, G=G),
        *arrays,
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(pl.cdiv(S, BK), K, B),
        in_specs=specs,
        out_specs=(keys, keys),
        num_warps=config.warps,
        num_stages=config.stages,
        name="attention_backward_keys",
        interpret=call.interpret,
    )
    return dk, dv


def _backward_queries(
    call: Call, q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> jax.Array:
    """dq, by tiles of queries."""
    config = call.tiles.queries
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    BQ, BK = config.block_q, config.block_k
    wide, G = tiling.padded(H), N // K
    steps, slots = pl.cdiv(T, BQ), pl.cdiv(S, BK) * BK

    def at(i: Any) -> Any:
        return steps - 1 - i

    queries = pl.BlockSpec((None, BQ, None, wide), lambda i, n, b: (b, at(i), n, 0))
    keys = pl.BlockSpec((None, None, slots, wide), lambda i, n, b: (b, n // G, 0, 0))
    row = pl.BlockSpec((None, BQ), lambda i, n, b: (b, at(i)))
    slot = pl.BlockSpec((None, slots), lambda i, n, b: (b, 0))
    span = pl.BlockSpec((None, None), lambda i, n, b: (b, at(i)))
    per_row = pl.BlockSpec((None, None, BQ), lambda i, n, b: (b, n, at(i)))
    spans = _bounds(call, config, q_at, k_at, q_of, k_of, of_keys=False)
    sums = padded(lse, BQ, 0.0, 2), padded(delta, BQ, 0.0, 2)
    arrays = (q, k, v, do, *sums, *places(q_at, k_at, q_of, k_of, BQ, BK), *spans)
    specs = (queries, keys, keys, queries, per_row, per_row, row, slot, row, slot, span, span, span, span)
    return triton_call(
        functools.partial(_queries_kernel, call=call, config=config, T=T, S=S, H=H),
        *arrays,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(steps, N, B),
        in_specs=specs,
        out_specs=queries,
        num_warps=config.warps,
        num_stages=config.stages,
        name="attention_backward_queries",
        interpret=call.interpret,
    )


# ---- over a mesh


def _attended(
    call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any, lists: Any = None,
    block_q: int = 0, block_k: int = 0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    arrays = dict(q=q, k=k, v=v, sinks=sinks, q_at=q_at, k_at=k_at, q_of=q_of, k_of=k_of, lists=lists)
    return over_mesh(_queries_forward, (call, block_q, block_k), ("out", "lse"), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> tuple[jax.Array, jax.Array]:
    return _attended(call, q, k, v, sinks, q_at, k_at, q_of, k_of)


def _attend_forward(call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any) -> Any:
    out, lse = named(*_attended(call, q, k, v, sinks, q_at, k_at, q_of, k_of))
    return (out, lse), (q, k, v, sinks, q_at, k_at, q_of, k_of, out, lse)


def _attend_backward(call: Call, kept: Any, given: Any) -> Any:
    q, k, v, sinks, q_at, k_at, q_of, k_of, out, lse = kept
    do, dlse = given
    # d score_s = weight_s (do . v_s - do . out + dlse)
    delta = jnp.einsum("btnh,btnh->bnt", do, out, preferred_element_type=jnp.float32) - dlse
    arrays = dict(q=q, k=k, v=v, do=do, lse=lse, delta=delta, q_at=q_at, k_at=k_at, q_of=q_of, k_of=k_of)
    dq, dk, dv = over_mesh(_backward, (call,), ("dq", "dk", "dv"), arrays)
    dsinks = None
    if sinks is not None:
        # a sink is a score whose value is zero
        weight = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = -(weight * delta).sum((0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dsinks, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def backward(
    kept: Any, given: Any, scale: float, window: int | None, softcap: float | None, *, interpret: bool = False
) -> Any:
    """The gradients for another forward kernel.

    kept: (q, k, v, sinks, q_at, k_at, q_of, k_of, out, lse [B, N, T]); given: the gradients of out and of lse. Gives those of
    the first four, and None for the rest of the eight.
    """
    q, k, v = kept[:3]
    capability = _serves(q, k, v, scale, interpret)
    tiles = tiling.choose(capability, q.shape[3], q.shape[1])
    return _attend_backward(Call(scale, window, softcap, tiles, interpret), kept, given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sparse(
    call: Call, block_q: int, block_k: int, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any,
    k_of: Any, lists: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    return _attended(call, q, k, v, sinks, q_at, k_at, q_of, k_of, lists, block_q, block_k)


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError("sparse_attention has no gradient; attention has one")


_sparse.defvjp(_no_gradient, _no_gradient)
