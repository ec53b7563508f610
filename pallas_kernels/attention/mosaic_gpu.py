"""Prompt attention by positions for Hopper (H100, H200), forward, on Pallas for Mosaic GPU.

NOT RUN ON A CARD YET. What holds: in jax's interpreter of this backend, which runs the barriers and copies as they are
written, its numbers are those of numpy float64 (tests/test_attention_mosaic.py); and it compiles for sm_90a without spills.
How fast it is nobody knows, and the interpreter knows no layouts of registers. Therefore the dispatcher takes it by name, or
where a card's table, which is made by measuring on that card, has it first.

The shape of FlashAttention-3 (Shah et al., arXiv:2407.08608). A block has three warpgroups. One moves tiles of keys and values
into shared memory by TMA, `stages` of them ahead; two compute, 64 queries each, and share what was moved. They take turns:
while one has the tensor cores, the other has its exponentials to do. Scores, softmax and sums are as in `triton.py`: online
softmax in float32 to the base 2, -1e30 for what is not seen, weights rounded once to the inputs' dtype; tiles outside
[lo, hi) are passed over and those in [a, b) have no mask (`spans.py`). Positions of the slots travel with the keys.

What the interpreter does not run as it is written is one instruction: weights in registers times values in shared memory,
added to a sum. It has no such wgmma, so that under `interpret` a product of jnp stands there.

Backward is Triton's, from the log-sum-exp that this kernel gives. Over a mesh both split as `over_mesh.py` says.

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention.over_mesh import over_mesh
from pallas_kernels.attention.reference import NEVER, check, named
from pallas_kernels.attention.spans import FAR, bounds, padded, places

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
GROUPS, ROWS = 2, 64  # computing warpgroups, and the queries of each
SHARED = 227 * 2**10  # bytes that a block can have on Hopper
OLDEST = (0, 11, 1)  # jax in which this backend has what is used here


@dataclasses.dataclass(frozen=True)
class Config:
    """Slots of a tile, and tiles under way."""

    block_k: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call."""

    scale: float
    window: int | None
    softcap: float | None
    config: Config
    interpret: bool


def choose(H: int) -> Config:
    """By head_dim, a multiple of 64: what stays in 232 registers a thread and in shared memory."""
    if H <= 64:
        return Config(128, 4)
    return Config(128, 2) if H <= 128 else Config(64, 2)


def shared_bytes(config: Config, H: int, *, segments: bool = False) -> int:
    """Of tiles, in 16 bits, and of the positions (and segments) beside them; barriers are a few bytes more."""
    queries = GROUPS * ROWS * (2 * H + 4 + 4 + 4 * segments)  # with their log-sum-exp
    return queries + config.stages * config.block_k * (2 * 2 * H + 4 + 4 * segments)


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
    config: Config | None = None,
) -> Any:
    """What pallas_kernels.attention.reference gives; with return_lse beside it lse [B, T, N], natural.

    Differentiable in q, k, v and sinks where Triton's backward is to be had. Lengths are filled up to whole tiles and heads
    to a multiple of 64, a copy where they are not. interpret: run on the CPU in jax's interpreter, for tests. Raises
    dispatch.Refused for what it cannot serve.
    """
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    refuse(q, k, v, scale, interpret)
    config = choose(q.shape[3] + -q.shape[3] % 64) if config is None else config
    call = Call(float(scale), window, softcap, config, interpret)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    out, lse = _attend(call, q, k, v, sinks, q_positions, k_positions, q_segments, k_segments)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def refuse(q: Any, k: Any, v: Any, scale: float, interpret: bool) -> None:
    """Raise Refused for the first thing that stands in the way."""
    instead = "our Triton kernel (triton) or the chunked form (xla) serves it"
    if tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise dispatch.Refused(f"jax is {jax.__version__}; this kernel is written for {oldest} and later: {instead}")
    card = dispatch.gpu()
    if not interpret:
        if card is None:
            raise dispatch.Refused("there is no GPU: the chunked form (xla) serves it")
        if card.capability[0] != 9:
            major, minor = card.capability
            raise dispatch.Refused(
                f"compute capability is {major}.{minor}; wgmma is Hopper's alone, 9.0 (H100, H200): {instead}"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            raise dispatch.Refused(f"{name} is {x.dtype}; the tensor cores take bfloat16 and float16 here: {instead}")
    if q.shape[3] > 256:
        raise dispatch.Refused(
            f"head_dim is {q.shape[3]}; tiles are at most 256 wide: the chunked form (xla) serves it"
        )
    if not scale > 0:
        raise dispatch.Refused(
            f"scale is {scale}; the running maximum needs one above 0: the chunked form (xla) serves it"
        )


# ---- in the kernel


def _kernel(
    *refs: Any, call: Call, G: int, dtype: Any, sinks: bool, segments: bool,
) -> None:  # fmt: skip
    """q [B, T, N, H], k and v [B, K, S, H], places [B, T] and [B, S], bounds [B, tiles]; out [B, T, N, H], lse [B, N, T]."""
    config, H = call.config, refs[0].shape[3]
    backend: Any = plgpu  # its transforms are abstract classes to a type checker
    transforms = (backend.TilingTransform((8, 64)), backend.SwizzleTransform(128))

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def numbers(*shape: int, dtype: Any = jnp.int32) -> Any:
        return plgpu.SMEM(shape, dtype)

    stages, BK = config.stages, config.block_k
    pl.run_scoped(
        functools.partial(_block, *refs, call=call, G=G, sinks=sinks, segments=segments),
        q_tile=tile(GROUPS, ROWS, H),
        k_tile=tile(stages, BK, H),
        v_tile=tile(stages, BK, H),
        lse_tile=numbers(GROUPS, ROWS, dtype=jnp.float32),
        q_place=numbers(1 + segments, GROUPS, ROWS),
        k_place=numbers(1 + segments, stages, BK),
        q_there=plgpu.Barrier(num_arrivals=2 + segments, num_barriers=GROUPS),
        k_there=plgpu.Barrier(num_arrivals=2 + segments, num_barriers=stages),
        v_there=plgpu.Barrier(num_barriers=stages),
        k_used=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        v_used=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=GROUPS),
        collective_axes="group",
    )


def _block(
    *refs: Any, call: Call, G: int, sinks: bool, segments: bool, q_tile: Any, k_tile: Any, v_tile: Any, lse_tile: Any,
    q_place: Any, k_place: Any, q_there: Any, k_there: Any, v_there: Any, k_used: Any, v_used: Any, turn: Any,
) -> None:  # fmt: skip
    q_ref, k_ref, v_ref, q_at_ref, k_at_ref, *rest = refs
    (q_of_ref, k_of_ref, *rest) = rest if segments else (None, None, *rest)
    (sink_ref, *rest) = rest if sinks else (None, *rest)
    lo_ref, a_ref, b_ref, hi_ref, out_ref, lse_ref = rest
    config, H = call.config, q_ref.shape[3]
    BK, stages = config.block_k, jnp.int32(config.stages)
    b, n, i, group = (lax.axis_index(name) for name in ("batch", "head", "tile", "group"))
    i = q_ref.shape[1] // (GROUPS * ROWS) - 1 - i  # later tiles first: under a causal mask they are the longest
    hi = hi_ref[b, i]
    lo, first, end = (jnp.minimum(ref[b, i], hi) for ref in (lo_ref, a_ref, b_ref))

    @pl.when(group == GROUPS)
    def _move() -> None:
        plgpu.set_max_registers(40, action="decrease")
        h = lax.div(n, jnp.int32(G))

        @pl.loop(lo, hi)
        def _tile(j: Any) -> None:
            slot, slots = lax.rem(j - lo, stages), pl.ds(j * BK, BK)

            @pl.when(j - lo >= stages)
            def _() -> None:
                plgpu.barrier_wait(k_used.at[slot])

            plgpu.copy_gmem_to_smem(k_ref.at[b, h, slots], k_tile.at[slot], k_there.at[slot])
            plgpu.copy_gmem_to_smem(k_at_ref.at[b, slots], k_place.at[0, slot], k_there.at[slot])
            if k_of_ref is not None:
                plgpu.copy_gmem_to_smem(k_of_ref.at[b, slots], k_place.at[1, slot], k_there.at[slot])

            @pl.when(j - lo >= stages)
            def _() -> None:
                plgpu.barrier_wait(v_used.at[slot])

            plgpu.copy_gmem_to_smem(v_ref.at[b, h, slots], v_tile.at[slot], v_there.at[slot])

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(i * (GROUPS * ROWS) + group * ROWS, ROWS)
        mine = q_tile.at[group]
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], mine, q_there.at[group])
        plgpu.copy_gmem_to_smem(q_at_ref.at[b, rows], q_place.at[0, group], q_there.at[group])
        if q_of_ref is not None:
            plgpu.copy_gmem_to_smem(q_of_ref.at[b, rows], q_place.at[1, group], q_there.at[group])
        plgpu.barrier_wait(q_there.at[group])

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def row(x: Any) -> Any:
            return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

        def each_row(ref: Any) -> Any:
            return _spread(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), (ROWS, BK), 0)

        def each_slot(ref: Any) -> Any:
            return _spread(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0)), (ROWS, BK), 1)

        def body(j: Any, carry: Any, masked: bool) -> Any:
            acc, top, mass = carry
            slot = lax.rem(j - lo, stages)
            plgpu.barrier_wait(k_there.at[slot])

            def scores(raw: Any) -> Any:
                plgpu.wgmma(raw, mine, k_tile.at[slot].transpose((1, 0)))
                take_turns()
                return raw[...]

            raw = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, BK), jnp.float32))
            factor = call.scale * LOG2E
            if call.softcap is not None:
                tanh = 1.0 - 2.0 / (jnp.exp2(raw * (2 * factor / call.softcap)) + 1.0)
                raw, factor = tanh * (call.softcap * LOG2E), 1.0
            if masked:
                # scaled before and not in the exponent: in a row that sees nothing of this tile a multiply-add of -1e30
                # would leave a rounding error of 1e22 there, and its exponential is no number
                raw, factor = raw * factor, 1.0
                k_at = each_slot(k_place.at[0, slot])
                q_at = each_row(q_place.at[0, group])
                seen = jnp.where(k_at < 0, FAR, k_at) <= q_at
                if call.window is not None:
                    seen &= q_at - k_at < call.window
                if segments:
                    seen &= each_row(q_place.at[1, group]) == each_slot(k_place.at[1, slot])
                raw = jnp.where(seen, raw, NEVER)
            plgpu.barrier_arrive(k_used.at[slot])
            now = jnp.maximum(top, raw.max(axis=1) * factor)
            weight = jnp.exp2(raw * factor - _spread(now, raw.shape, 0))
            keep = jnp.exp2(top - now)
            mass = mass * keep + weight.sum(axis=1)
            rounded = weight.astype(q_ref.dtype)
            plgpu.barrier_arrive(turn)  # the exponentials are done
            plgpu.barrier_wait(v_there.at[slot])
            plgpu.barrier_wait(turn)  # the tensor cores are free

            acc = acc * _spread(keep, acc.shape, 0)
            if call.interpret:  # it takes no matrix out of registers, and no accumulator that begins at something
                acc += jnp.dot(rounded, v_tile[slot], preferred_element_type=jnp.float32)
            else:

                def add(values: Any) -> None:
                    plgpu.wgmma(values, rounded, v_tile.at[slot])

                acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
            plgpu.barrier_arrive(v_used.at[slot])
            return acc, now, mass

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
        sink = None if sink_ref is None else sink_ref[n]
        carry = zeros, row(NEVER if sink is None else sink * LOG2E), row(0.0 if sink is None else 1.0)
        pl.when(group == 1)(take_turns)
        carry = lax.fori_loop(lo, first, functools.partial(body, masked=True), carry)
        carry = lax.fori_loop(first, end, functools.partial(body, masked=False), carry)
        acc, top, mass = lax.fori_loop(end, hi, functools.partial(body, masked=True), carry)
        pl.when(group == 0)(take_turns)

        found = (top > NEVER / 2) & (mass > 0)
        mass = jnp.where(found, mass, 1.0)
        share = jnp.where(found, 1.0 / mass, 0.0)
        mine[...] = (acc * _spread(share, acc.shape, 0)).astype(q_ref.dtype)
        lse_tile.at[group][...] = jnp.where(found, (top + jnp.log2(mass)) * LN2, NEVER)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out_ref.at[b, rows, n])
        plgpu.copy_smem_to_gmem(lse_tile.at[group], lse_ref.at[b, n, rows])
        plgpu.wait_smem_to_gmem(0)


def _spread(x: Any, shape: tuple[int, ...], dim: int) -> Any:
    """x along dim `dim` of an array of `shape`, the same along the other."""
    return lax.broadcast_in_dim(x, shape, (dim,))


# ---- around it


def _forward(call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any) -> Any:
    """out [B, T, N, H] and lse [B, N, T]."""
    (B, T, N, H), K = q.shape, k.shape[1]
    BQ, BK, dtype = GROUPS * ROWS, call.config.block_k, q.dtype
    span = bounds(call.window, BQ, BK, q_at, k_at, q_of, k_of, of_keys=False)
    at_q, at_k, of_q, of_k = places(q_at, k_at, q_of, k_of, BQ, BK)
    q = padded(padded(q, BQ, 0), 64, 0, 3)
    k, v = (padded(padded(x, BK, 0, 2), 64, 0, 3) for x in (k, v))
    more = [] if of_q is None else [of_q.astype(jnp.int32), of_k.astype(jnp.int32)]
    more += [] if sinks is None else [sinks.astype(jnp.float32)]
    rows = q.shape[1]
    run = plgpu.kernel(
        functools.partial(
            _kernel, call=call, G=N // K, dtype=dtype, sinks=sinks is not None, segments=of_q is not None
        ),
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, N, rows), jnp.float32)),
        grid=(N, rows // BQ, B),
        grid_names=("head", "tile", "batch"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_forward_hopper",
        interpret=plgpu.InterpretGPUParams() if call.interpret else None,
    )
    out, lse = run(q, k, v, at_q.astype(jnp.int32), at_k.astype(jnp.int32), *more, *span)
    return out[:, :T, :, :H], lse[:, :, :T]


def _attended(
    call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> tuple[jax.Array, jax.Array]:
    if call.interpret:  # whose callbacks are in order, which an op that is split cannot have
        return _forward(call, q, k, v, sinks, q_at, k_at, q_of, k_of)
    arrays = dict(q=q, k=k, v=v, sinks=sinks, q_at=q_at, k_at=k_at, q_of=q_of, k_of=k_of)
    return over_mesh(_forward, (call,), ("out", "lse"), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any
) -> tuple[jax.Array, jax.Array]:
    return _attended(call, q, k, v, sinks, q_at, k_at, q_of, k_of)


def _attend_forward(call: Call, q: Any, k: Any, v: Any, sinks: Any, q_at: Any, k_at: Any, q_of: Any, k_of: Any) -> Any:
    out, lse = named(*_attended(call, q, k, v, sinks, q_at, k_at, q_of, k_of))
    return (out, lse), (q, k, v, sinks, q_at, k_at, q_of, k_of, out, lse)


def _attend_backward(call: Call, kept: Any, given: Any) -> Any:
    try:
        from pallas_kernels.attention import triton
    except ImportError as e:
        raise dispatch.Refused(f"the backward kernels are Triton's, and this jax has no Pallas for it ({e})") from e
    return triton.backward(kept, given, call.scale, call.window, call.softcap, interpret=call.interpret)


_attend.defvjp(_attend_forward, _attend_backward)
