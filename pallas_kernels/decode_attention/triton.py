"""Flash-decoding for NVIDIA cards from sm_80 on: few queries over a long cache, its codes read once, in Pallas for Triton.

A program keeps the rows of one kv head (T queries times G query heads, so that keys and values are read once for all of
them) and walks over its part of the slots with a running maximum and sum (online softmax, arXiv:1805.02867). Parts are merged
by their log-sum-exps (Flash-Decoding, Dao et al., 2023), in float32 and in a fixed order, by XLA. `tiles.py` says how many
parts; a part that lies past a row's length or outside its window reads nothing.

At few rows the time is that of reading the cache, so what counts is instructions for each element, and loads under way:

- Keys are the left operand of the scores' product and values, turned, that of the result's; rows are the columns of both,
  padded to 8 and not to 16 or 64, and a code that becomes a number does so once, in registers.
- Scales meet the products. A score is s (codes . q); a value's scale is multiplied into its weight. Codes of 8 and 4 bits
  are exact in bfloat16 and float16, so nothing is rounded but the weights, as with raw values.
- int4 has two planes, low bits and high: two products of half the width. Its numbers are made by placing bits, two at a time,
  in inline PTX; the interpreter takes plain jnp. (For int8 Triton's own conversion takes fewer instructions.)
- A page that holds a block of slots is found by one load; of smaller pages each slot finds its own.

GSPMD cannot see into a kernel, and would gather its arguments: the op says itself how it splits (`custom_partitioning`),
by batch and by kv heads, with no communication. Pages belong to no row: over the batch they are whole.

B batch, T queries, S slots, N query heads, K kv heads, G = N / K, H head dim; R rows of a kv head, T G; W the width of a plane.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import reference, tiles
from pallas_kernels.decode_attention.tiles import Config
from pallas_kernels.triton_call import triton_call

NEVER = -1e30  # finite, so that a row with nothing to see makes no NaN
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
LEAST = 2.0**-120  # of a block's greatest scale
MOST_ROWS = 256  # of a kv head: above, the cache is read once for each tile of them, and the tiled kernel is better
ASSUMED = dispatch.Gpu((8, 0), 108)  # whose tiles the interpreter takes where there is no GPU


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call."""

    scale: float
    window: int | None
    softcap: float | None
    card: dispatch.Gpu
    interpret: bool
    packed: bool  # inline PTX
    config: Config | None
    splits: int | None


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
    interpret: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> Any:
    """reference.decode_attention on a GPU; with `interpret` on the CPU as written, for tests.

    config, splits: instead of those that `tiles.py` chooses for the card. Raises dispatch.Refused for what it cannot serve.
    """
    card = dispatch.gpu() or (ASSUMED if interpret else None)
    if card is None:
        raise dispatch.Refused("there is no GPU; on a CPU the form in blocks (xla) serves, or interpret=True for tests")
    if (said := refusal(q, k, card, scale, interpret)) is not None:
        raise dispatch.Refused(f"{said}: the form in blocks (xla) serves it")
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it is at least 1, or None for what fills the card")
    call = Call(float(scale), window, softcap, card, interpret, not interpret, config, splits)
    arrays = dict(
        q=q, k=k, v=v, ks=k_scale, vs=v_scale, q_at=q_positions, k_at=k_positions, table=page_table, lengths=lengths,
        sinks=sinks,
    )  # fmt: skip
    there = tuple(name for name, x in arrays.items() if x is not None)
    out, lse = _partitioned(call, there)(arrays)
    return (out, lse) if return_lse else out


def refusal(q: Any, k: Any, card: dispatch.Gpu, scale: float, interpret: bool) -> str | None:
    """Why a call cannot be served; None if it can."""
    _, T, N, H = q.shape
    major, minor = card.capability
    if card.capability < (8, 0):
        return f"compute capability {major}.{minor} is below 8.0"
    for name, x in (("q", q), ("k", k)):
        if x.dtype == jnp.float32 and not interpret:
            return f"{name} is float32; the tensor cores take bfloat16 and float16 here, and would round it to 10 bits"
    if H > 256:
        return f"head_dim is {H}; tiles are at most 256 wide"
    if T * N // k.shape[1] > MOST_ROWS:
        return (
            f"{T} queries of {N // k.shape[1]} heads are {T * N // k.shape[1]} rows of a kv head; it takes {MOST_ROWS}"
        )
    if not scale > 0:
        return f"scale is {scale}; the running maximum needs one above 0"
    # Pallas counts elements in 32 bits, signed, while the array has no more than 2**32 bytes
    if k.size >= 2**31 and k.size * k.dtype.itemsize <= 2**32:
        return f"k has {k.size} elements, which 32-bit addresses cannot count"
    return None


# ---- one device


def _local(
    call: Call, *, q: Any, k: Any, v: Any, ks: Any, vs: Any, q_at: Any, k_at: Any, table: Any, lengths: Any, sinks: Any
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, H] and lse [B, T, N], natural."""
    (B, T, N, H), K = q.shape, k.shape[1]
    G, R = N // K, T * (N // K)
    kind = reference.kind(k, ks)
    P = 2 if kind == "int4" else 1
    W = tiles.padded(H // P)
    config = call.config or tiles.config(R, kind, H, call.card)
    BK, BR = config.block_k, config.block_r
    page = None if table is None else k.shape[2]
    if table is not None:
        k_at = reference.held(table, lengths, k.shape[2])
    S = k_at.shape[1]
    Rp = -(-R // BR) * BR
    programs = B * K * (Rp // BR)
    splits = call.splits or tiles.splits(S, programs, config, call.card.cores)
    first, end = tiles.parts(tiles.spans(q_at, k_at, call.window, BK), splits)
    if S % BK:
        k_at = jnp.pad(k_at, ((0, 0), (0, -S % BK)), constant_values=-1)

    # few and small: rows are filled up here, so that the kernel has no masks for them
    rows = q.reshape(B, T, K, G, P, H // P).transpose(0, 2, 1, 3, 4, 5).reshape(B, K, R, P, H // P)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, Rp - R), (0, 0), (0, W - H // P))).reshape(B, K, Rp, P * W)
    row_at = jnp.pad(jnp.repeat(q_at, G, 1), ((0, 0), (0, Rp - R)), constant_values=-1)

    tiled = Rp // BR
    slots = -(-S // BK) * BK

    def cache(a: Any, width: int | None) -> pl.BlockSpec | None:
        """All slots of a row and kv head, or all pages of a kv head; scales have a plane's width of P, or none."""
        if a is None:
            return None
        last = () if a.ndim == 3 else (width,)
        zeros = (0,) * len(last)
        if page is None:
            return pl.BlockSpec((None, None, slots, *last), lambda s, h, b: (b, h // tiled, 0, *zeros))
        return pl.BlockSpec((k.shape[0], None, page, *last), lambda s, h, b: (0, h // tiled, 0, *zeros))

    entries = None if table is None else pl.BlockSpec((None, table.shape[1]), lambda s, h, b: (b, 0))
    of_rows = pl.BlockSpec((None, None, BR, P * W), lambda s, h, b: (b, h // tiled, h % tiled, 0))
    part = pl.BlockSpec((None, None), lambda s, h, b: (b, s))
    results = pl.BlockSpec((None, None, None, BR, P * W), lambda s, h, b: (b, h // tiled, s, h % tiled, 0))
    sums = pl.BlockSpec((None, None, None, BR), lambda s, h, b: (b, h // tiled, s, h % tiled))
    like = jax.ShapeDtypeStruct((B, K, splits, Rp), jnp.float32)
    acc, top, mass = triton_call(
        functools.partial(
            _kernel, call=call, config=config, kind=kind, S=S, width=H // P, W=W, page=page, dtype=jnp.dtype(q.dtype)
        ),
        rows, k, v, ks, vs, row_at, k_at, table, first, end,
        out_shape=(jax.ShapeDtypeStruct((*like.shape, P * W), jnp.float32), like, like),
        grid=(splits, K * tiled, B),
        in_specs=[
            of_rows, cache(k, W), cache(v, W), cache(ks, P), cache(vs, P),
            pl.BlockSpec((None, BR), lambda s, h, b: (b, h % tiled)), pl.BlockSpec((None, slots), lambda s, h, b: (b, 0)),
            entries, part, part,
        ],
        out_specs=(results, sums, sums),
        num_warps=config.warps,
        num_stages=config.stages,
        name=f"decode_attention_{kind}",
        interpret=call.interpret,
    )  # fmt: skip
    out, lse = _merged(acc, top, mass, sinks, R, T)
    out = out.reshape(B, K, R, P, W)[..., : H // P].reshape(B, K, T, G, H)
    out = out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)
    return out, lse.reshape(B, K, T, G).transpose(0, 2, 1, 3).reshape(B, T, N)


def _merged(
    acc: jax.Array, top: jax.Array, mass: jax.Array, sinks: jax.Array | None, R: int, T: int
) -> tuple[jax.Array, jax.Array]:
    """Results [B, K, R, .] and their log-sum-exps [B, K, R] from those of each split, [B, K, splits, R', .]; with sinks."""
    acc, top, mass = acc[:, :, :, :R], top[:, :, :, :R], mass[:, :, :, :R]
    most = top.max(2)
    K = top.shape[1]
    sink = None
    if sinks is not None:
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(1, K, -1) * LOG2E, (1, 1, T))  # rows are token by token
        most = jnp.maximum(most, sink)
    weight = jnp.exp2(top - most[:, :, None])
    total = (weight * mass).sum(2)
    if sink is not None:
        total = total + jnp.exp2(sink - most)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (acc * weight[..., None]).sum(2) / total[..., None]
    return out, jnp.where(some, (most + jnp.log2(total)) * LN2, NEVER)


# ---- the kernel


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, ks_ref: Any, vs_ref: Any, q_at_ref: Any, k_at_ref: Any, table_ref: Any,
    first_ref: Any, end_ref: Any, acc_ref: Any, top_ref: Any, mass_ref: Any,
    *, call: Call, config: Config, kind: str, S: int, width: int, W: int, page: int | None, dtype: Any,
) -> None:  # fmt: skip
    BK, BR = config.block_k, config.block_r
    P = 2 if kind == "int4" else 1
    factor = call.scale * LOG2E
    queries = [plt.load(q_ref.at[:, pl.ds(p * W, W)]) for p in range(P)]
    q_at = q_at_ref[...]

    by_slot = page is not None and page % BK != 0
    first, end = first_ref[...], end_ref[...]

    def within(j: Any, k_at: Any, *, ahead: bool = False) -> Callable[..., jax.Array]:
        """How to load block j of a cache's array: its rows, and which column or all of them. ahead: only where j < end."""
        slots = j * BK + jnp.arange(BK)
        there = k_at >= 0
        ragged = slots < S if S % BK else None
        if ahead:
            ragged = jnp.broadcast_to(j < end, (BK,)) if ragged is None else ragged & (j < end)
            there &= j < end
        if page is None:
            rows: tuple[Any, ...] = (pl.ds(j * BK, BK),)
        elif by_slot:
            ragged = there
            # of a slot that holds nothing the table may say anything
            entry = plt.load(table_ref.at[jnp.minimum(lax.div(slots, page), S // page - 1)], mask=there, other=0)
            rows = entry, lax.rem(slots, page)
        else:
            each = page // BK
            entry = table_ref.at[lax.div(j, each)]
            rows = (
                plt.load(entry, mask=j < end, other=0) if ahead else plt.load(entry),
                pl.ds(lax.rem(j, each) * BK, BK),
            )

        def load(ref: Any, column: int | None) -> jax.Array:
            if len(ref.shape) == len(k_ref.shape) and column is None:
                mask = None if ragged is None else jnp.broadcast_to(ragged[:, None], (BK, W))
                columns = jnp.arange(W)
                if width != W:
                    inside = jnp.broadcast_to((columns < width)[None, :], (BK, W))
                    mask = inside if mask is None else mask & inside
                if by_slot:
                    at = tuple(jnp.broadcast_to(x[:, None], (BK, W)) for x in rows)
                    view = ref.at[(*at, jnp.broadcast_to(columns[None, :], (BK, W)))]
                else:
                    view = ref.at[(*rows, slice(None))]
            else:
                mask = ragged
                last = () if column is None else (jnp.full((BK,) if by_slot else (), column, jnp.int32),)
                view = ref.at[(*rows, *last)]
            return plt.load(view) if mask is None else plt.load(view, mask=mask, other=0)

        return load

    def scales(load: Any, ref: Any) -> list[Any]:
        if kind == "raw":
            return [None]
        return [load(ref, p) for p in range(2)] if kind == "int4" else [load(ref, None)]

    def ahead(j: Any) -> jax.Array:
        """The values' codes of block j, a turn before they are needed. What is loaded where it is used goes to the product by
        way of shared memory as codes, and is turned over there: 8 bits by 8 bits on 8.x and 9.0, and by an instruction that
        the compiler does not know on 12.0. What comes from registers is made into numbers first."""
        k_at = None
        if by_slot:
            start = jnp.minimum(j, pl.cdiv(S, BK) - 1) * BK
            k_at = k_at_ref[pl.ds(start, BK)]
        return within(j, jnp.zeros((BK,), jnp.int32) if k_at is None else k_at, ahead=True)(v_ref, None)

    def body(j: Any, carry: Any) -> Any:
        accs, top, mass, codes = carry
        k_at = k_at_ref[pl.ds(j * BK, BK)]
        load = within(j, k_at)
        following = None if codes is None else ahead(j + 1)
        raw = jnp.zeros((BK, BR), jnp.float32)
        for q, k, s in zip(
            queries, _numbers(load(k_ref, None), kind, dtype, call.packed), scales(load, ks_ref), strict=True
        ):
            d = _dot(k, q, (1, 1), call)
            raw = raw + (d if s is None else d * s[:, None])
        score = raw * factor if call.softcap is None else _capped(raw, call)
        seen = ((k_at >= 0)[:, None]) & (k_at[:, None] <= q_at[None, :])
        if call.window is not None:
            seen &= q_at[None, :] - k_at[:, None] < call.window
        score = jnp.where(seen, score, NEVER)
        now = jnp.maximum(top, score.max(0))
        # a column that has seen nothing so far: its weights are nothing, and not exp2(0)
        weight = jnp.where(seen, jnp.exp2(score - now[None, :]), 0.0)
        keep = jnp.exp2(top - now)
        mass = mass * keep + weight.sum(0)
        made = []
        values = _numbers(load(v_ref, None) if codes is None else codes, kind, dtype, call.packed)
        for acc, v, s in zip(accs, values, scales(load, vs_ref), strict=True):
            if s is None:
                d = _dot(v, weight.astype(dtype), (0, 0), call)
            elif dtype == jnp.float16:  # whose range a scale may leave: divided by the block's greatest
                most = jnp.maximum(s.max(), LEAST)
                d = _dot(v, (weight * (s / most)[:, None]).astype(dtype), (0, 0), call) * most
            else:
                d = _dot(v, (weight * s[:, None]).astype(dtype), (0, 0), call)
            made.append(acc * keep[None, :] + d)
        return tuple(made), now, mass, following

    zeros = tuple(jnp.zeros((W, BR), jnp.float32) for _ in range(P))
    start = zeros, jnp.full((BR,), NEVER, jnp.float32), jnp.zeros((BR,), jnp.float32)
    accs, top, mass, _ = lax.fori_loop(first, end, body, (*start, None if kind == "raw" else ahead(first)))
    for p, acc in enumerate(accs):
        plt.store(acc_ref.at[:, pl.ds(p * W, W)], acc.T)
    top_ref[...] = top
    mass_ref[...] = mass


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], call: Call) -> jax.Array:
    if call.interpret:  # XLA:CPU lacks some products of 16 bits into float32; these are as exact
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _capped(raw: jax.Array, call: Call) -> jax.Array:
    """softcap tanh(scale raw / softcap) in units of log 2, by one exponential: 1 - 2 / (exp(2x) + 1)."""
    assert call.softcap is not None
    tanh = 1.0 - 2.0 / (jnp.exp2(raw * (2 * LOG2E * call.scale / call.softcap)) + 1.0)
    return tanh * (call.softcap * LOG2E)


def _numbers(codes: jax.Array, kind: str, dtype: Any, packed: bool) -> list[jax.Array]:
    """A block's planes as numbers in `dtype`, exact but for raw ones of another dtype."""
    if kind in ("raw", "int8"):
        return [codes.astype(dtype)]
    if packed:
        return [_asm(int4_ptx(p, dtype.name), codes, dtype) for p in range(2)]
    return [(x.astype(jnp.int8) - jnp.int8(reference.MIDDLE)).astype(dtype) for x in (codes & 15, codes >> 4)]


def _asm(text: str, codes: jax.Array, dtype: Any) -> jax.Array:
    """text on a register of four codes, which makes two of two numbers each."""
    result = jax.ShapeDtypeStruct(codes.shape, dtype)
    return plt.elementwise_inline_asm(text, args=[codes], constraints="=r,=r,r", pack=4, result_shape_dtypes=[result])[
        0
    ]


# a byte below one of these is the number 128 + byte (of 7 bits), or 1024 + byte
MAGIC = {"bfloat16": (0x43, 128, "bf16x2"), "float16": (0x64, 1024, "f16x2")}


def _halves(x: float, dtype: str) -> str:
    """A register with x in both its halves."""
    bits = np.array(x, np.float32).astype(dtype).view(np.uint16).item()
    return f"0x{bits:04X}{bits:04X}"


def int4_ptx(plane: int, dtype: str) -> str:
    """Four bytes ($2) to the numbers of their low or high bits, less 8: a byte set below MAGIC's, and its offset taken off."""
    byte, offset, suffix = MAGIC[dtype]
    return (
        f"{{ .reg .b32 t, u, m, o, z; mov.b32 m, 0x{byte:02X}{byte:02X}{byte:02X}{byte:02X};"
        f" mov.b32 o, {_halves(1.0, dtype)}; mov.b32 z, {_halves(-offset - reference.MIDDLE, dtype)};"
        f" {'shr.b32 t, $2, 4;' if plane else 'mov.b32 t, $2;'} and.b32 t, t, 0x0F0F0F0F;"
        f" prmt.b32 u, t, m, 0x4140; fma.rn.{suffix} $0, u, o, z; prmt.b32 u, t, m, 0x4342; fma.rn.{suffix} $1, u, o, z; }}"
    )


# ---- over a mesh

# b batch, t queries, s slots, n query heads, k kv heads, h head dim, x of codes, m pages of a row; paged: p pages, g slots of one
DIMS = {
    "q": "btnh", "k": "bksx", "v": "bksx", "ks": "bksy", "vs": "bksy", "q_at": "bt", "k_at": "bs", "table": "bm",
    "lengths": "b", "sinks": "n", "out": "btnh", "lse": "btn",
}  # fmt: skip
PAGED = {"k": "pkgx", "v": "pkgx", "ks": "pkgy", "vs": "pkgy"}
RESULTS = ("out", "lse")


def _split(mesh: Any, arrays: dict[str, Any], dims: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that batch and kv heads are split over: those of keys, which are the most to move, then what others are
    split over further; as many, from the first, as divide."""

    def over(names: tuple[str, ...], of: str, size: int, taken: tuple[str, ...]) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        for name in names:
            x = arrays.get(name)
            spec = () if x is None or x.sharding is None else x.sharding.spec
            for dim, entry in zip(dims[name], spec, strict=False):
                if dim not in of or entry is None:
                    continue
                axes = (entry,) if isinstance(entry, str) else tuple(entry)
                while axes and (size % math.prod(mesh.shape[a] for a in axes) or set(axes) & set(taken)):
                    axes = axes[:-1]
                if axes[: len(found)] == found:
                    found = axes
        return found

    every = ("k", *(name for name in arrays if name != "k"))
    B, K = arrays["q"].shape[0], arrays["k"].shape[1]
    batch = over(every, "b", B, over(("k",), "k", K, ()))
    return batch, over(every, "kn", K, batch)


@functools.cache
def _partitioned(call: Call, there: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[jax.Array, jax.Array]]:
    """_local as an op that says how it splits, from a dict of arrays, those `there` and None, to (out, lse)."""
    dims = DIMS | (PAGED if "table" in there else {})

    def run(arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return _local(call, **arrays)

    def shardings(mesh: Any, arrays: dict[str, Any], made: Any) -> tuple[Any, Any]:
        known = {name: arrays[name] for name in there} | dict(zip(RESULTS, made, strict=False))
        batch, heads = _split(mesh, known, dims)
        axes = {"b": batch or None, "n": heads or None, "k": heads or None}

        def of(name: str, ndim: int) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(dim) for dim in dims[name][:ndim])))

        results = tuple(of(name, len(dims[name])) for name in RESULTS)
        return results, {name: of(name, len(arrays[name].shape)) if name in there else None for name in arrays}

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:
        return shardings(mesh, arguments[0], ())[0]

    def partition(mesh: Any, arguments: Any, made: Any) -> Any:
        result, operands = shardings(mesh, arguments[0], made)
        return mesh, run, result, (operands,)

    def compiled(arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """The rule names each array's dims, and scales have a last one only where codes have two planes."""
        op = custom_partitioning(run)
        said = [" ".join(dims[name][: arrays[name].ndim]) for name in sorted(there)]
        rule = f"{', '.join(said)} -> {', '.join(' '.join(dims[name]) for name in RESULTS)}"
        whole = dict.fromkeys(f for x in said for f in x.split() if f in "tshxympg")
        op.def_partition(
            partition, infer_sharding_from_operands=infer, sharding_rule=rule, need_replication_factors=tuple(whole)
        )
        return op(arrays)

    return jax.jit(compiled)  # where the caller has no jit, arrays on several devices are split all the same
