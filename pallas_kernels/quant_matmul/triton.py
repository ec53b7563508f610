"""Few rows times a matrix held as codes, in Pallas for Triton: the codes are read once, as they are, and nothing is written.

    acc[n, m] = sum over groups g of  s_ng (sum over k in g of q_nk x_mk  -  z_ng sum over k in g of x_mk)

At a few rows the time is that of reading the matrix, so two things count: instructions for each weight, and loads under
way. What is done about them:

- The matrix is the left operand of the tensor core product, and rows are its columns, padded to 8 (not 16 or 64).
- A word holds codes that lie a quarter of a group apart (layout.py): each of four shifts gives one product's operand as it
  is, with no interleaving.
- A number is made of a code by placing its bits: 0x4300 | q is the bfloat16 128 + q, 0x5400 | q << 4 the float16 64 + q (Kim
  et al., arXiv:2211.10017; MARLIN, arXiv:2408.11743). Two weights are one lop3 instruction of inline PTX (`packed`); in
  plain jnp, which the interpreter takes, the same bits are made one weight at a time. The 128 is taken off by a product
  with a constant, which the tensor cores do for nothing while rows are few; exact, as every number here is.
- Scales meet the products, in float32, not the weights. Where several groups share one tensor core product (32 inputs a
  group) rows stand in it once for each group, with the others' inputs zero. The few rows of decode are fewer than the columns
  of a product anyway: copies are columns of one product, and parts of a row are added at the end. With more rows each group
  has a product of its own; from 32 rows on in bfloat16 that costs more than it is worth, and weights are rounded to bfloat16
  with their scales on.
- NF4's table is looked up by byte permutations, four codes at a time (`prmt`); in plain jnp it is loaded from memory.
- The inputs are split over blocks of threads where outputs are too few to fill the card; float32 sums of the parts are
  added in a fixed order (arXiv:2402.00025 adds them atomically, and is not deterministic).

GSPMD cannot see into a kernel: the op says itself how it splits (`custom_partitioning`). Outputs are split with no
communication, inputs with one sum over the mesh axes, rows freely. Batched (vmap), the products come one after another.

M rows, N outputs, K inputs, G group size, C columns of the codes' array in a turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Gpu, Refused, gpu
from pallas_kernels.quant_matmul import layout
from pallas_kernels.quant_matmul.config import CODES, MOST_ROWS, Config, config
from pallas_kernels.triton_call import triton_call

FEWEST_IN_GROUP = 16
MOST_CODES = 2**31 - 1  # addresses are of 32 bits
ASSUMED = Gpu((8, 0), 108)  # whose tiles the interpreter takes where there is no GPU

# 128 + code in bfloat16 and 64 + code in float16: the bits without the code, the number, and the code's place in the bits.
# The least number that spares a shift; the more it is, the more float32 sums lose when it is taken off.
MAGIC = {"bfloat16": (0x4300, 128, 0), "float16": (0x5400, 64, 4)}


def quant_matmul(
    x: Float[Array, "M K"],
    codes: Any,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
    interpret: bool = False,
    packed: bool | None = None,
) -> Float[Array, "M N"]:
    """As `pallas_kernels.quant_matmul`, on a GPU; with `interpret` on the CPU, slowly. Raises dispatch.Refused.

    packed: whether numbers are made of codes by inline PTX, two at a time, or in plain jnp; None: by PTX on a GPU."""
    card = gpu() or (ASSUMED if interpret else None)
    if card is None:
        raise Refused("there is no GPU here that Triton compiles for; 'xla' serves on every machine")
    said = refusal(x, codes, kind=kind, group_size=group_size, card=card)
    if said is not None:
        raise Refused(said)
    splits = _splits(kind, group_size, codes.shape[0], x.shape[1])
    packed = not interpret if packed is None else packed
    call = _partitioned(kind, group_size, jnp.dtype(dtype), card, zero is not None, interpret, packed, splits)
    return call(x, codes, scale, *(() if zero is None else (zero,)))


def refusal(x: Any, codes: Any, *, kind: str, group_size: int, card: Gpu) -> str | None:
    """Why a call cannot be served; None if it can."""
    if kind not in CODES:
        return f"there is no kernel of {kind}; there are {', '.join(CODES)}; 'xla' serves {kind}"
    if card.capability < (8, 0):
        return f"compute capability {card.capability} knows no bfloat16 products; it takes 8.0 or more, or 'xla'"
    if x.dtype.name not in MAGIC:
        return f"x is {x.dtype.name}; the kernel takes {' or '.join(MAGIC)}, and 'xla' float32"
    M, K = x.shape
    if not 1 <= M <= MOST_ROWS:
        return f"{M} rows; the kernel serves 1 to {MOST_ROWS}, 'xla' any number"
    if 0 in (codes.shape[0], K):
        return f"the matrix [{codes.shape[0]}, {K}] is empty; 'xla' serves it"
    if codes.size > MOST_CODES:
        return f"{codes.size} words of codes; the kernel counts to {MOST_CODES}; split the outputs, or 'xla'"
    if group_size and (group_size < FEWEST_IN_GROUP or group_size & (group_size - 1)):
        return f"group_size {group_size}; the kernel takes powers of two from {FEWEST_IN_GROUP} on, 'xla' any"
    try:
        _tiles(x, codes, False, kind, group_size, card)
    except ValueError as e:
        return str(e)
    return None


# -- over a mesh


def _splits(kind: str, group_size: int, N: int, K: int) -> tuple[bool, bool]:
    """Whether outputs and inputs can be split: where scales are of several, only between those, if there are two or more."""

    def between(n: int) -> bool:
        return n % group_size == 0 and n > group_size

    return kind != "fp8_block" or between(N), not group_size or between(K)


def _rule(
    kind: str, group_size: int, has_zero: bool, splits: tuple[bool, bool]
) -> tuple[str, set[str], dict[str, int]]:
    """How dims correspond, in Shardy's words: the rule, the factors that stay whole, sizes. M is m, N n, K k; g is groups."""
    if not group_size:
        return "m k, n k, n -> m n", set(), {}
    whole: set[str] = set()
    sizes: dict[str, int] = {}

    def dim(split: bool, outer: str, inner: str, size: int) -> str:
        whole.add(inner)
        if not split:
            return inner
        sizes[inner] = size
        return f"({outer} {inner})"

    n = dim(splits[0], "a", "n", group_size) if kind == "fp8_block" else "n"
    k = dim(splits[1], "g", "k", group_size)
    words = dim(splits[1], "g", "w", group_size // 4) if CODES[kind][0] == 4 else k
    whole |= {f for f, split in zip("ag", splits, strict=True) if not split}
    scale = f"{'a' if kind == 'fp8_block' else 'n'} g"
    return f"m {k}, {n} {words}, {scale}{', ' + scale if has_zero else ''} -> m {n}", whole, sizes


@functools.cache
def _partitioned(
    kind: str,
    group_size: int,
    dtype: Any,
    card: Gpu,
    has_zero: bool,
    interpret: bool,
    packed: bool,
    splits: tuple[bool, bool],
) -> Callable[..., Array]:
    """The op with its rules for a mesh; arguments x, codes, scale and, if any, zero."""

    def local(*arrays: Array, dtype: Any = dtype) -> Array:
        x, codes, scale, zero = arrays if has_zero else (*arrays, None)
        how: Any = {"kind": kind, "group_size": group_size, "dtype": dtype, "card": card}
        return _local(x, codes, scale, zero, **how, interpret=interpret, packed=packed)

    def specs(mesh: Any, x: Any, codes: Any) -> tuple[Any, Any, Any]:
        """Mesh axes of rows, outputs and inputs."""

        def size(axes: Any) -> int:
            axes = (axes,) if isinstance(axes, str) else axes or ()
            count = 1
            for a in axes:
                count *= mesh.shape[a]
            return count

        def names(axes: Any) -> set[str]:
            return {axes} if isinstance(axes, str) else set(axes or ())

        def spec(a: Any) -> tuple[Any, ...]:
            return (*a.sharding.spec, None, None)[:2]

        (m, _), (n, k) = spec(x), spec(codes)
        if not splits[0] or codes.shape[0] % (size(n) * (group_size if kind == "fp8_block" else 1)):
            n = None
        if not splits[1] or x.shape[1] % (size(k) * (group_size or 1)):
            k = None
        if names(m) & (names(n) | names(k)) or x.shape[0] % size(m):
            m = None
        return m, n, k

    def shardings(mesh: Any, arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        m, n, k = specs(mesh, arguments[0], arguments[1])
        of_scale = P(n, k) if len(arguments[2].shape) == 2 else P(n)
        operands = (P(m, k), P(n, k), of_scale, *([of_scale] if has_zero else []))
        return NamedSharding(mesh, P(m, n)), tuple(NamedSharding(mesh, p) for p in operands)

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:
        return shardings(mesh, arguments)[0]

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        result, operands = shardings(mesh, arguments)
        k = operands[0].spec[1]

        def one(*arrays: Array) -> Array:
            if k is None:
                return local(*arrays)
            return lax.psum(local(*arrays, dtype=jnp.float32), k).astype(dtype)

        return mesh, one, result, operands

    op = custom_partitioning(_named_arguments(local, has_zero))
    rule, whole, sizes = _rule(kind, group_size, has_zero, splits)
    inputs = {"g"} if group_size else {"k"}
    op.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        reduction_factors=tuple(inputs - whole),
        need_replication_factors=tuple(sorted(whole, key=rule.index)),  # Shardy wants their order
        **sizes,  # pyright: ignore[reportArgumentType]
    )
    single = jax.custom_batching.custom_vmap(lambda *arrays: op(*arrays))

    @single.def_vmap
    def one_after_another(size: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        def call(mapped: list[Array]) -> Array:
            rest = iter(mapped)
            return op(*(next(rest) if b else a for a, b in zip(arrays, batched, strict=True)))

        return lax.map(call, [a for a, b in zip(arrays, batched, strict=True) if b]), True

    return jax.jit(single)  # compiled once for each shape, also where the caller has no jit


def _named_arguments(call: Callable[..., Array], has_zero: bool) -> Callable[..., Array]:
    """custom_partitioning reads the names of the arguments."""
    if has_zero:
        return lambda x, codes, scale, zero: call(x, codes, scale, zero)
    return lambda x, codes, scale: call(x, codes, scale)


# -- on one device


def _tiles(x: Any, codes: Any, has_zero: bool, kind: str, group_size: int, card: Gpu) -> Config:
    (M, K), N = x.shape, codes.shape[0]
    return config(M, N, K, kind, group_size, card, bfloat16=x.dtype == jnp.bfloat16, affine=has_zero)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the kernel is compiled for."""

    kind: str
    group_size: int
    M: int
    N: int
    K: int
    dtype: str  # of x, and of the tensor core products
    tiles: Config
    has_zero: bool
    fp8: str | None  # what the codes are, if they are fp8
    pairs: str | None  # what scales are, if those of two groups are loaded as one number
    converts: bool  # whether the card converts fp8: Triton's own conversion kills the process where it does not
    packed: bool  # inline PTX
    interpret: bool

    @property
    def planes(self) -> int:
        """Products of a turn: codes in a word of the array of codes."""
        return 4 if CODES[self.kind][0] == 4 else 1

    @property
    def inputs(self) -> int:
        """Inputs of a tile."""
        return self.tiles.columns * self.planes

    @property
    def turns(self) -> int:
        return -(-self.K // (self.inputs * self.tiles.unroll))

    @property
    def ragged(self) -> bool:
        """Whether the last turn has inputs that are not there."""
        return self.K % (self.inputs * self.tiles.unroll) != 0

    @property
    def groups(self) -> int:
        """Groups of a tile; 0 where a scale is of a whole output."""
        return self.inputs // self.group_size if self.group_size else 0


def _local(
    x: Array, codes: Array, scale: Array, zero: Array | None, *,
    kind: str, group_size: int, dtype: Any, card: Gpu, interpret: bool, packed: bool | None = None, tiles: Config | None = None,
) -> Array:  # fmt: skip
    """The product on one device. packed, tiles: for tests and tuning; None takes what is best."""
    (M, K), N = x.shape, codes.shape[0]
    made = tiles or _tiles(x, codes, zero is not None, kind, group_size, card)
    call = _Call(
        kind=kind, group_size=group_size, M=M, N=N, K=K, dtype=x.dtype.name, tiles=made, has_zero=zero is not None,
        fp8=codes.dtype.name if kind in ("fp8", "fp8_block") else None, pairs=_pairs(scale, zero, made),
        converts=card.capability >= (8, 9),
        packed=not interpret if packed is None else packed, interpret=interpret,
    )  # fmt: skip
    BM, BN, S = made.block_m, made.block_n, made.splits
    if kind in ("fp8", "fp8_block"):
        codes = lax.bitcast_convert_type(codes, jnp.uint8)  # of fp8 itself Triton loads no part of a tile

    there = call.turns * made.unroll  # tiles, the last of which may hang over
    columns, groups = there * made.columns, there * call.groups
    rows = x
    if call.planes > 1 and call.groups > 1:
        rows = _by_group(x, group_size, 1 if made.fold else call.groups, columns)
    if made.beside:  # copy h of row m is row m copies + h
        rows = jnp.pad(rows.reshape(M * made.copies, -1), ((0, BM - M * made.copies), (0, 0)))
    if call.pairs is not None:
        groups //= 2
        scale = lax.bitcast_convert_type(scale.reshape(N, -1, 2), jnp.uint32)
        zero = None if zero is None else lax.bitcast_convert_type(zero.reshape(N, -1, 2), jnp.uint32)
    arrays = [rows, codes, scale]
    specs = [
        pl.BlockSpec((BM, max(rows.shape[1], there * call.inputs)), lambda m, n, s: (m, 0)),
        pl.BlockSpec((BN, columns), lambda m, n, s: (n, 0)),
    ]
    if kind == "fp8_block":
        specs.append(pl.BlockSpec(scale.shape, lambda m, n, s: (0, 0)))
    elif not group_size:
        specs.append(pl.BlockSpec((BN,), lambda m, n, s: (n,)))
    else:
        specs.append(pl.BlockSpec((BN, groups), lambda m, n, s: (n, 0)))
    if zero is not None:
        arrays.append(zero)
        specs.append(specs[-1])
    if made.sums:
        arrays.append(x.reshape(M, K // group_size, group_size).sum(-1, dtype=jnp.float32).T)
        specs.append(pl.BlockSpec((groups, BM), lambda m, n, s: (0, m)))
    if kind == "nf4" and not call.packed:
        arrays.append(jnp.stack([jnp.full((), v, x.dtype) for v in layout.NF4]))  # no constant: nothing may be captured
        specs.append(pl.BlockSpec((16,), lambda m, n, s: (0,)))

    tiled = (-(-M // BM), -(-N // BN), S)
    one = triton_call(
        functools.partial(_kernel, call=call),
        *arrays,
        out_shape=jax.ShapeDtypeStruct((S, M, N), jnp.dtype(dtype) if S == 1 else jnp.float32),
        grid=tiled,
        in_specs=specs,
        out_specs=pl.BlockSpec((None, BM // (made.copies if made.beside else 1), BN), lambda m, n, s: (s, m, n)),
        num_warps=made.warps,
        num_stages=made.stages,
        name=f"quant_matmul_{kind}",
        interpret=interpret,
    )
    return one[0] if S == 1 else one.sum(0).astype(dtype)


def _pairs(scale: Array, zero: Array | None, tiles: Config) -> str | None:
    """The dtype of scales that are loaded two at a time: a load is a detour over shared memory, and a wait for all threads."""
    fits = scale.dtype.itemsize == 2 and scale.shape[-1] % 2 == 0 and (zero is None or zero.dtype == scale.dtype)
    return scale.dtype.name if tiles.beside and fits else None


def _by_group(x: Array, group_size: int, copies: int, columns: int) -> Array:
    """x as several groups in one product want it: plane by plane, each padded to `columns`. Copy h of the whole has zeros in
    place of all groups but each copies-th from h on."""
    M, groups = x.shape[0], x.shape[1] // group_size
    planes = x.reshape(M, groups, 4, group_size // 4).swapaxes(1, 2)
    group = jnp.arange(groups)[:, None] % copies
    made = jnp.stack([jnp.where(group == h, planes, jnp.zeros_like(planes)) for h in range(copies)], axis=1)
    made = made.reshape(M, 4 * copies, -1)
    return jnp.pad(made, ((0, 0), (0, 0), (0, columns - made.shape[2]))).reshape(M, -1)


def _kernel(*refs: Any, call: _Call) -> None:
    """One block of outputs and rows, over one part of the inputs."""
    *given, out_ref = refs
    x_ref, codes_ref, scale_ref = given[:3]
    rest = given[3:]
    zero_ref = rest.pop(0) if call.has_zero else None
    sums_ref = rest.pop(0) if call.tiles.sums else None
    table_ref = rest.pop(0) if rest else None

    BM, BN, C, U = call.tiles.block_m, call.tiles.block_n, call.tiles.columns, call.tiles.unroll
    m, n, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    each = -(-call.turns // call.tiles.splits)
    first = part * each
    last = jnp.minimum(first + each, call.turns)
    outputs_left, rows_left = call.N - n * BN, call.M - m * BM
    ragged_N, ragged_M = call.N % BN != 0, call.M % BM != 0 and not call.tiles.beside

    def iota(shape: tuple[int, ...], axis: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def load(ref: Any, at: tuple[Any, ...], masks: list[Array]) -> Array:
        if not masks:
            return plt.load(ref.at[at])
        return plt.load(ref.at[at], mask=functools.reduce(jnp.logical_and, masks), other=0)

    def load_codes(tile: Array) -> Array:
        masks = [iota((BN, C), 0) < outputs_left] if ragged_N else []
        if call.ragged:
            masks.append(iota((BN, C), 1) < call.K // call.planes - tile * C)
        return load(codes_ref, (slice(None), pl.ds(tile * C, C)), masks)

    def load_x(tile: Array, j: int, h: int) -> Array:
        """The inputs of plane j, [C, BM]; with several groups in a tile, those of all but group h zero."""
        masks = [iota((BM, C), 0) < rows_left] if ragged_M else []
        if call.groups > 1 and call.planes > 1:  # (of copies side by side h is 0)
            start = (h * call.planes + j) * (call.turns * U * C) + tile * C
        else:
            start = tile * call.inputs + j * C
            if call.ragged:
                masks.append(iota((BM, C), 1) < call.K - start)
        return load(x_ref, (slice(None), pl.ds(start, C)), masks).T

    def dot(w: Array, x: Array) -> Array:
        if call.interpret:  # XLA:CPU lacks some products of bfloat16 into float32; these are as exact
            w, x = w.astype(jnp.float32), x.astype(jnp.float32)
        return jnp.dot(w, x, preferred_element_type=jnp.float32)

    def load_scales(tile: Array) -> tuple[Array, ...]:
        """Scales of the tile's groups, then its zeros."""
        if not call.groups:
            return ()
        if call.kind == "fp8_block":
            return (plt.load(scale_ref.at[n * BN // call.group_size, jnp.minimum(tile, scale_ref.shape[1] - 1)]),)
        masks = [iota((BN,), 0) < outputs_left] if ragged_N else []
        found, each = [], 2 if call.pairs else 1
        for ref in (scale_ref, zero_ref):
            for h in range(call.groups // each if ref is not None else 0):
                g = jnp.minimum(tile * (call.groups // each) + h, call.K // call.group_size // each - 1)
                found.append(load(ref, (slice(None), g), masks))
        return tuple(found)

    def turn(t: Array, carry: tuple[Array, list[tuple[Array, ...]]]) -> tuple[Array, list[tuple[Array, ...]]]:
        acc, raw = carry
        tiles = [t * U + u for u in range(U)]
        following = [load_scales(each + U) for each in tiles]  # under way while this turn computes
        for each, scales in zip(tiles, raw, strict=True):
            acc = add(acc, each, scales)
        return acc, following

    def add(acc: Array, tile: Array, raw: tuple[Array, ...]) -> Array:
        ws = _unpacked(load_codes(tile), call, table_ref)
        if call.pairs is not None:
            raw = tuple(a for both in raw for a in _apart(both, call.pairs))
        if call.tiles.beside:
            raw = tuple(by_column(raw[i : i + call.groups]) for i in range(0, len(raw), call.groups))
        each = 1 if call.tiles.beside else call.groups
        scales = [_number(s, call.kind) for s in raw[:each]]
        zeros = [z.astype(jnp.float32) for z in raw[each:]]
        if not call.groups or call.tiles.fold:
            for j, w in enumerate(_folded(ws, scales, call) if call.groups else ws):
                acc = acc + dot(w, load_x(tile, j, 0))
            return acc
        for h, s in enumerate(scales):
            xs = [load_x(tile, j, h) for j in range(call.planes)]
            d = jnp.zeros((BN, BM), jnp.float32)
            if call.kind == "int4" and not zeros:
                d = off_middle(tile * call.groups + h, xs)
            for w, x in zip(ws, xs, strict=True):
                d = d + dot(w, x)
            if zeros:
                z = zeros[h] if zeros[h].ndim == 2 else zeros[h][:, None]
                z = jnp.float32(-MAGIC[call.dtype][1]) - z
                d = _fma(z, sums(tile * call.groups + h, xs, 1), d, call.packed)
            acc = _fma(d, s[:, None] if s.ndim == 1 else s, acc, call.packed)
        return acc

    def by_column(each: tuple[Array, ...]) -> Array:
        """A number of each output and group, [BN], as each column of a product wants it, [BN, BM]. A thread has neighbouring
        columns, so that of two groups nothing is chosen while it runs."""
        group, found = iota((BN, BM), 1) % call.tiles.copies, jnp.broadcast_to(each[0][:, None], (BN, BM))
        for h, of_group in enumerate(each[1:], 1):
            found = jnp.where(group >= h, jnp.broadcast_to(of_group[:, None], (BN, BM)), found)
        return found

    def off_middle(g: Array, xs: list[Array]) -> Array:
        """What the offset of the unpacked numbers adds to each product where there are no zeros, taken off."""
        whole = -(MAGIC[call.dtype][1] + layout.MIDDLE["int4"])
        if sums_ref is None:
            return sums(g, xs, whole)
        return jnp.broadcast_to(jnp.float32(whole) * sums(g, xs, 1), (BN, BM))

    def sums(g: Array, xs: list[Array], times: int) -> Array:
        """Of the rows in group g, times a number: [BN, BM] by the tensor cores, or [1, BM] as they come from outside."""
        if sums_ref is None:
            ones = jnp.full((BN, C), times, call.dtype)
            return functools.reduce(jnp.add, (dot(ones, x) for x in xs))
        masks = [iota((BM,), 0) < rows_left] if ragged_M else []
        if call.ragged:
            masks.append(jnp.broadcast_to(g < call.K // call.group_size, (BM,)))
        return load(sums_ref, (g, slice(None)), masks)[None, :]

    acc = jnp.zeros((BN, BM), jnp.float32)
    acc, _ = lax.fori_loop(first, last, turn, (acc, [load_scales(first * U + u) for u in range(U)]))
    if not call.groups:
        masks = [iota((BN,), 0) < outputs_left] if ragged_N else []
        acc = acc * load(scale_ref, (slice(None),), masks).astype(jnp.float32)[:, None]
    out = acc.T
    if call.tiles.beside:
        out = out.reshape(BM // call.tiles.copies, call.tiles.copies, BN).sum(1)
    out = out.astype(out_ref.dtype)
    masks = ([iota(out.shape, 0) < rows_left] if call.M % len(out) else []) + (
        [iota(out.shape, 1) < outputs_left] if ragged_N else []
    )
    plt.store(out_ref, out, mask=functools.reduce(jnp.logical_and, masks) if masks else None)


# -- numbers out of codes


def _apart(both: Array, dtype: str) -> tuple[Array, Array]:
    """Two 16-bit numbers that were loaded as one of 32 bits, the first in its low half, as float32."""
    if dtype == "bfloat16":
        halves = jnp.left_shift(both, jnp.uint32(16)), both & jnp.uint32(0xFFFF0000)
        return tuple(lax.bitcast_convert_type(h, jnp.float32) for h in halves)  # pyright: ignore[reportReturnType]
    halves = both & jnp.uint32(0xFFFF), jnp.right_shift(both, jnp.uint32(16))
    halves = (lax.bitcast_convert_type(h.astype(jnp.uint16), jnp.float16) for h in halves)
    return tuple(h.astype(jnp.float32) for h in halves)  # pyright: ignore[reportReturnType]


def _number(scale: Array, kind: str) -> Array:
    """A scale as float32. e8m0 is the exponent of a float32; 0 is the one that is subnormal there."""
    if kind != "mxfp4":
        return scale.astype(jnp.float32)
    exponent = scale.astype(jnp.uint32)
    bits = jnp.where(exponent == 0, jnp.uint32(1 << 22), exponent << 23)
    return jnp.where(exponent == 255, jnp.float32(float("nan")), lax.bitcast_convert_type(bits, jnp.float32))


def _unpacked(words: Array, call: _Call, table_ref: Any) -> list[Array]:
    """The operands of a turn's products, in x's dtype: the codes' numbers, int4's with MAGIC's offset on."""
    dtype = jnp.dtype(call.dtype)
    if call.planes == 1:
        if words.dtype == jnp.uint8 and call.packed and not call.converts:
            return [_asm(fp8_ptx(call.dtype, call.fp8 == "float8_e5m2"), [words], dtype, 4)]
        return [_eight(words, call)]
    if call.packed:
        text = {"int4": int4_ptx, "nf4": nf4_ptx, "mxfp4": mxfp4_ptx}[call.kind]
        return [_asm(text(j, call.dtype), [words], dtype, 2) for j in range(4)]
    found = []
    for j in range(4):
        code = jnp.right_shift(words, jnp.uint16(4 * j)) & jnp.uint16(15)
        if call.kind == "int4":
            bits, _, place = MAGIC[call.dtype]
            found.append(lax.bitcast_convert_type(code << jnp.uint16(place) | jnp.uint16(bits), dtype))
        elif call.kind == "nf4":
            found.append(plt.load(table_ref.at[code.astype(jnp.int32)]))
        else:
            bits = (code & jnp.uint16(7)) << jnp.uint16(9) | (code & jnp.uint16(8)) << jnp.uint16(12)
            found.append((lax.bitcast_convert_type(bits, jnp.float16) * jnp.float16(2**14)).astype(dtype))
    return found


def _eight(codes: Array, call: _Call) -> Array:
    """Codes of 8 bits as numbers. A card that cannot convert fp8 takes its bits: they are those of a float16, but for e4m3's
    exponent, which counts from 7 and not from 15. Its NaN, which no matrix should hold, is then 480."""
    if call.fp8 is None:
        return codes.astype(call.dtype)
    if call.converts:
        return lax.bitcast_convert_type(codes, jnp.dtype(call.fp8)).astype(call.dtype)
    wide = codes.astype(jnp.uint16)
    if call.fp8 == "float8_e5m2":
        return lax.bitcast_convert_type(wide << jnp.uint16(8), jnp.float16).astype(call.dtype)
    bits = (wide & jnp.uint16(0x80)) << jnp.uint16(8) | (wide & jnp.uint16(0x7F)) << jnp.uint16(7)
    return (lax.bitcast_convert_type(bits, jnp.float16) * jnp.float16(256)).astype(call.dtype)


def _folded(ws: list[Array], scales: list[Array], call: _Call) -> list[Array]:
    """The weights themselves, in bfloat16, rounded once where the scales are of it."""
    BN, C = call.tiles.block_n, call.tiles.columns
    group = lax.broadcasted_iota(jnp.int32, (BN, C), 1) // (C // call.groups)
    s = jnp.broadcast_to(scales[0][:, None], (BN, C))
    for h, e in enumerate(scales[1:], 1):
        s = jnp.where(group >= h, jnp.broadcast_to(e[:, None], (BN, C)), s)
    offset = layout.MIDDLE["int4"] + MAGIC[call.dtype][1] if call.kind == "int4" else 0
    if call.packed:
        s = s.astype(jnp.bfloat16)
        return [_asm(folded_ptx(offset), [w, s], jnp.bfloat16, 2) for w in ws]
    return [((w.astype(jnp.float32) - jnp.float32(offset)) * s).astype(jnp.bfloat16) for w in ws]


# -- the same in PTX, two or four codes at a time


def _asm(text: str, args: list[Array], dtype: Any, pack: int) -> Array:
    """text on the 32-bit registers that hold `pack` elements of each argument."""

    def registers(d: Any) -> int:
        return max(1, pack * jnp.dtype(d).itemsize // 4)

    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    constraints = ",".join(["=r"] * registers(dtype) + ["r"] * sum(registers(a.dtype) for a in args))
    return plt.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )[0]


def _fma(a: Array, b: Array, c: Array, packed: bool) -> Array:
    """a b + c in float32, of c's shape; Triton makes two instructions of it."""
    a, b = jnp.broadcast_to(a, c.shape), jnp.broadcast_to(b, c.shape)
    if not packed:
        return a * b + c
    result = jax.ShapeDtypeStruct(a.shape, jnp.float32)
    return plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, b, c], constraints="=f,f,f,f", pack=1, result_shape_dtypes=[result]
    )[0]


def _shifted(by: int, to: str = "t", source: str = "$1") -> str:
    """PTX: bits moved up by `by` (down where it is negative)."""
    if by == 0:
        return f"mov.b32 {to}, {source};"
    return f"{'shl' if by > 0 else 'shr'}.b32 {to}, {source}, {abs(by)};"


def int4_ptx(j: int, dtype: str) -> str:
    """Two words to two numbers: MAGIC's offset + code j of each. 0xEA is (a & b) | c."""
    bits, _, place = MAGIC[dtype]
    mask = 15 << place
    return (
        f"{{ .reg .b32 t; {_shifted(place - 4 * j)}"
        f" lop3.b32 $0, t, 0x{mask:04X}{mask:04X}, 0x{bits:04X}{bits:04X}, 0xEA; }}"
    )


def folded_ptx(offset: int) -> str:
    """Two bfloat16 numbers less `offset`, which is exact, times two scales."""
    if offset == 0:
        return "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
    minus = np.array(-offset, jnp.bfloat16).view(np.uint16).item()
    return (
        f"{{ .reg .b32 t, o, m, z; mov.b32 o, 0x3F803F80; mov.b32 m, 0x{minus:04X}{minus:04X};"
        " mov.b32 z, 0x80008000; fma.rn.bf16x2 t, $1, o, m; fma.rn.bf16x2 $0, t, $2, z; }"
    )


def fp8_ptx(dtype: str, e5m2: bool) -> str:
    """Four bytes of fp8 to four numbers. Its bits in their place make the number but for a power of two (also a subnormal
    one), which a product puts right; float16's exponent is e5m2's."""
    spread = "prmt.b32 t, $2, z, 0x1404; prmt.b32 u, $2, z, 0x3424;"
    if e5m2 and dtype == "float16":
        return f"{{ .reg .b32 t, u, z; mov.b32 z, 0; {spread} mov.b32 $0, t; mov.b32 $1, u; }}"
    down, power = {
        ("bfloat16", False): (4, 0x7B80), ("bfloat16", True): (3, 0x7780), ("float16", False): (1, 0x5C00),
    }[dtype, e5m2]  # fmt: skip
    mask = 0x7F00 >> down
    suffix = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    text = f"{{ .reg .b32 t, u, v, p, z; mov.b32 z, 0; {spread} mov.b32 p, 0x{power:04X}{power:04X}; mov.b32 z, 0x80008000;"
    for register, out in (("t", "$0"), ("u", "$1")):
        text += (
            f" shr.b32 v, {register}, {down}; and.b32 v, v, 0x{mask:04X}{mask:04X};"
            f" lop3.b32 v, {register}, 0x80008000, v, 0xEA; fma.rn.{suffix} {out}, v, p, z;"
        )
    return text + " }"


def mxfp4_ptx(j: int, dtype: str) -> str:
    """Two words to the two E2M1 numbers of code j of each: exponent and mantissa in their place make the number but for a
    power of two (also a subnormal one), which a product puts right."""
    mantissa, power = {"bfloat16": (7, 0x7E80), "float16": (10, 0x7400)}[dtype]
    up = mantissa - 1 - 4 * j
    magnitude = 7 << mantissa - 1
    suffix = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    return (
        f"{{ .reg .b32 t, u, p, z; {_shifted(up)} and.b32 t, t, 0x{magnitude:04X}{magnitude:04X};"
        f" {_shifted(12 - 4 * j, 'u')} lop3.b32 t, u, 0x80008000, t, 0xEA;"
        f" mov.b32 p, 0x{power:04X}{power:04X}; mov.b32 z, 0x80008000; fma.rn.{suffix} $0, t, p, z; }}"
    )


def nf4_ptx(j: int, dtype: str) -> str:
    """Two words to the two NF4 numbers of code j of each. prmt looks up four codes of a word in 8 bytes of the table, by their
    low three bits; the fourth chooses between two such halves (0xCA is a ? b : c), the low and the high bytes of the numbers
    apart. What the four texts have in common the compiler does once.

    The table is made to look as if it differed from thread to thread, or the compiler would move half of it, as constants
    that prmt does not take, at each lookup.
    """
    numbers = np.array(layout.NF4, np.float32).astype(dtype).tobytes()
    halves = [numbers[first::2][i : i + 4] for first in (0, 1) for i in (0, 4, 8, 12)]
    text = ["{ .reg .b32 n, w, b, u, z, s, l, h, x<2>, y<2>, t<8>;"]
    text.append("mov.u32 n, %lanemask_eq; mov.u32 z, %lanemask_lt; and.b32 n, n, z; mov.b32 z, 0;")
    text += [f"or.b32 t{i}, n, 0x{int.from_bytes(half, 'little'):08X};" for i, half in enumerate(halves)]
    text.append("or.b32 s, n, 0x0000FF00;")
    for word in (0, 1):
        text.append("shr.b32 w, $1, 16;" if word else "mov.b32 w, $1;")
        text.append("and.b32 b, w, 0x7777; shr.b32 u, w, 3; and.b32 u, u, 0x1111; prmt.b32 u, s, z, u;")
        for out, i in (("x", 0), ("y", 4)):
            text.append(f"prmt.b32 l, t{i}, t{i + 1}, b; prmt.b32 h, t{i + 2}, t{i + 3}, b;")
            text.append(f"lop3.b32 {out}{word}, u, h, l, 0xCA;")
        # the bytes of codes 0 and 1, or of 2 and 3, as two numbers
        text.append(f"prmt.b32 x{word}, x{word}, y{word}, 0x{'7362' if j >= 2 else '5140'};")
    text.append(f"prmt.b32 $0, x0, x1, 0x{'7632' if j % 2 else '5410'}; }}")
    return " ".join(text)
