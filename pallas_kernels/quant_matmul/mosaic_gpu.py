"""Rows times a matrix held as codes, for Hopper (H100, H200), on Pallas for Mosaic GPU; asked for by name only.

NOT RUN ON A CARD YET. What holds: in jax's interpreter of this backend, which runs the barriers and copies as they are
written, its numbers are those of numpy float64 (tests/test_quant_matmul_mosaic.py); and it compiles for sm_90a without spills.
How fast it is nobody knows, and the interpreter knows no layouts of registers. Therefore the dispatcher never takes it by
itself, and `implementation="mosaic_gpu"` does.

    acc[n, m] = sum over groups g of  s_ng (sum over k in g of (q_nk - middle) x_mk  -  (z_ng - middle) sum over k in g of x_mk)

Operands are swapped, as in `triton.py`: wgmma takes 64 outputs by inputs from registers, where codes have just become bfloat16,
and the rows, which need no work, from shared memory. A block has three warpgroups. One moves tiles of codes and rows into shared
memory by TMA, `stages` of them ahead; two compute 64 outputs each, and while one has the tensor cores the other unpacks.
A word's four codes lie a quarter of a group apart (layout.py), so that each shift is one product's operand. Every number that
codes stand for is exact in bfloat16; scales meet the float32 sum of their group. Where tiles are too few for the card the
inputs are split, and XLA adds the float32 parts in a fixed order.

What the interpreter does not run as it is written: matrices in registers times those in shared memory, for which it has no
wgmma, and inline PTX. Under `interpret` jnp stands there; the PTX is checked by what its instructions mean.

Tensor cores are what bounds it from 64 rows on; with fewer the matrix is still read once, but of what a tile's rows cost
most is padding. On several devices it is run as XLA splits it, gathered: one card is what it is for.

M rows, N outputs, K inputs, G group size, C columns of the array of codes in a group's quarter.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as gpu_utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import layout
from pallas_kernels.quant_matmul.config import MOST_ROWS

GROUPS, OUTPUTS = 2, 64  # computing warpgroups, and the outputs of each
SHARED = 227 * 2**10  # bytes that a block can have on Hopper
OLDEST = (0, 11, 1)  # jax in which this backend has what is used here
MOST_SPLITS, FEWEST_TURNS = 16, 4  # of the inputs, and of a split: below, filling the pipeline is most of the work
MIDDLE = layout.MIDDLE["int4"]
SERVED = {"int4": (64, 128, 256), "int8": (0, 32, 64, 128, 256), "fp8": (0,), "fp8_block": (layout.BLOCK,)}
CORES = 132  # of an H200, whose splits the interpreter takes


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows of a block, inputs of a turn, tiles under way, parts of the inputs."""

    block_m: int
    block_k: int
    stages: int
    splits: int


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call."""

    kind: str
    group_size: int
    dtype: Any  # of the result
    has_zero: bool
    config: Config
    interpret: bool

    @property
    def turned(self) -> bool:
        """Whether blocks write the result as it is to be; else parts of it, as they have it: outputs by rows, in float32."""
        return self.config.splits == 1 and self.dtype.itemsize == 2

    @property
    def group(self) -> int:
        """Inputs of a turn whose products share a sum."""
        return min(self.group_size or self.config.block_k, self.config.block_k)

    @property
    def piece(self) -> int:
        """Inputs of one product: rows stand in shared memory in such pieces, which can be taken out of a tile."""
        return min(self.group // 4 if self.kind == "int4" else self.group, 64)


def choose(M: int, N: int, K: int, kind: str, group_size: int, cores: int) -> Config:
    """Tiles of x [M, K] times a matrix [N, K]: a block for each core, and as much under way as shared memory holds."""
    block_k = inputs_of_a_turn(kind, group_size)
    # 32 KiB of rows a tile; and with four sums a turn a thread would not hold 128 columns of them
    most = 64 if block_k == 256 or 0 < group_size < 64 else 128
    block_m = next(b for b in (8, 16, 32, 64, 128) if b >= min(M, most))
    turns, tiles = K // block_k, -(-M // block_m) * (N // (GROUPS * OUTPUTS))
    splits = max(1, min(cores // tiles, turns // FEWEST_TURNS, MOST_SPLITS))
    splits = -(-turns // -(-turns // splits))
    made = Config(block_m, block_k, 8, splits)
    while shared_bytes(made, kind) > SHARED - 4096:
        made = dataclasses.replace(made, stages=made.stages - 1)
    return made


def inputs_of_a_turn(kind: str, group_size: int) -> int:
    """128, but a whole group where codes lie a quarter of it apart."""
    return max(group_size, 128) if kind == "int4" else 128


def shared_bytes(config: Config, kind: str) -> int:
    """Of tiles and of the results on their way out; barriers and what the compiler aligns are a few bytes more."""
    rows, outputs = config.block_m, GROUPS * OUTPUTS
    codes = outputs * config.block_k // (2 if kind == "int4" else 1)
    return config.stages * (codes + rows * config.block_k * 2 + rows * 8) + rows * outputs * 4


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
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """As `pallas_kernels.quant_matmul`, on a Hopper GPU; with `interpret` on the CPU, slowly. Raises dispatch.Refused."""
    refuse(x, codes, kind=kind, group_size=group_size, interpret=interpret)
    (M, K), N = x.shape, codes.shape[0]
    card = dispatch.gpu()
    made = config or choose(M, N, K, kind, group_size, CORES if card is None else card.cores)
    call = Call(kind, group_size, jnp.dtype(dtype), zero is not None, made, interpret)
    return _product(call, x, codes, scale, zero)


def refuse(x: Any, codes: Any, *, kind: str, group_size: int, interpret: bool) -> None:
    """Raise Refused for the first thing that stands in the way."""
    instead = "our Triton kernel (triton) or XLA's form (xla) serves it"
    if tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise dispatch.Refused(f"jax is {jax.__version__}; this kernel is written for {oldest} and later: {instead}")
    card = dispatch.gpu()
    if not interpret:
        if card is None:
            raise dispatch.Refused("there is no GPU: XLA's form (xla) serves it")
        if card.capability[0] != 9:
            major, minor = card.capability
            raise dispatch.Refused(
                f"compute capability is {major}.{minor}; wgmma is Hopper's alone, 9.0 (H100, H200): {instead}"
            )
    if kind not in SERVED:
        raise dispatch.Refused(f"there is no kernel of {kind} here; there are {', '.join(SERVED)}: {instead}")
    if group_size not in SERVED[kind]:
        sizes = ", ".join(map(str, SERVED[kind]))
        why = "; a quarter of a smaller group is no product of the tensor cores" if kind == "int4" else ""
        raise dispatch.Refused(f"group_size of {kind} is {group_size}; here it is one of {sizes}{why}: {instead}")
    if x.dtype != jnp.bfloat16:
        raise dispatch.Refused(f"x is {x.dtype}; codes become bfloat16 here, and so x has to be: {instead}")
    (M, K), N = x.shape, codes.shape[0]
    if not 1 <= M <= MOST_ROWS:
        raise dispatch.Refused(f"{M} rows; the kernel serves 1 to {MOST_ROWS}: XLA's form (xla) serves any number")
    for what, size, least in (
        ("outputs", N, GROUPS * OUTPUTS), ("inputs", K, inputs_of_a_turn(kind, group_size)),
    ):  # fmt: skip
        if size % least or not size:
            raise dispatch.Refused(f"the matrix has {size} {what}, not a multiple of its tile's {least}: {instead}")


# ---- in the kernel


def _kernel(*refs: Any, call: Call) -> None:
    """x [M, K], codes [N, columns], scale, sums [groups, M] and zero where there is one; out [M, N], or parts [S, N, M]."""
    x_ref, codes_ref = refs[:2]
    config = call.config
    backend: Any = plgpu  # its transforms are abstract classes to a type checker

    def tile(shape: tuple[int, ...], dtype: Any, row: int) -> Any:
        """row: bytes of what stands together, which is what copies swizzle."""
        across = row // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(
            shape, dtype, transforms=(backend.TilingTransform((8, across)), backend.SwizzleTransform(row))
        )

    outputs, stages = GROUPS * OUTPUTS, config.stages
    columns = config.block_k // (4 if call.kind == "int4" else 1)
    sums: Any = plgpu.SMEM((stages, config.block_k // call.group, config.block_m), jnp.float32)
    out: Any
    if call.turned:
        out = plgpu.SMEM((GROUPS, config.block_m, OUTPUTS), call.dtype, transforms=(backend.SwizzleTransform(128),))
    else:
        out = plgpu.SMEM((GROUPS, OUTPUTS, config.block_m), jnp.float32)
    pl.run_scoped(
        functools.partial(_block, *refs, call=call),
        x_tile=tile((stages, config.block_m, config.block_k), x_ref.dtype, 2 * call.piece),
        w_tile=tile((stages, outputs, columns), codes_ref.dtype, min(128, columns * codes_ref.dtype.itemsize)),
        sums_tile=sums if call.has_zero else None,
        out_tile=out,
        there=plgpu.Barrier(num_arrivals=2 + call.has_zero, num_barriers=stages),
        used=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        collective_axes="group",
    )


def _block(
    *refs: Any, call: Call, x_tile: Any, w_tile: Any, sums_tile: Any, out_tile: Any, there: Any, used: Any
) -> None:
    x_ref, codes_ref, scale_ref, *rest, out_ref = refs
    zero_ref, sums_ref = rest or (None, None)
    config, K = call.config, x_ref.shape[1]
    BM, BK, stages = config.block_m, config.block_k, jnp.int32(config.stages)
    m, n, part, group = (lax.axis_index(name) for name in ("rows", "outputs", "part", "group"))
    each = -(-(K // BK) // config.splits)
    first = part * each
    turns = jnp.minimum(each, K // BK - first)
    rows = pl.ds(m * BM, BM)
    mine = pl.ds(n * (GROUPS * OUTPUTS) + group * OUTPUTS, OUTPUTS)
    per_turn = BK // call.group  # groups, where scales are of groups

    @pl.when(group == GROUPS)
    def _move() -> None:
        plgpu.set_max_registers(40, action="decrease")
        columns = w_tile.shape[2]
        outputs = pl.ds(n * (GROUPS * OUTPUTS), GROUPS * OUTPUTS)

        @pl.loop(0, turns)
        def _tile(i: Any) -> None:
            slot, t = lax.rem(i, stages), first + i

            @pl.when(i >= stages)
            def _() -> None:
                plgpu.barrier_wait(used.at[slot])

            plgpu.copy_gmem_to_smem(codes_ref.at[outputs, pl.ds(t * columns, columns)], w_tile.at[slot], there.at[slot])
            plgpu.copy_gmem_to_smem(x_ref.at[rows, pl.ds(t * BK, BK)], x_tile.at[slot], there.at[slot])
            if sums_ref is not None:
                some = pl.ds(t * per_turn, per_turn)
                plgpu.copy_gmem_to_smem(sums_ref.at[some, rows], sums_tile.at[slot], there.at[slot])

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        def of_outputs(ref: Any, g: Any) -> Any:
            """A number for each of this warpgroup's outputs. Such a column is not what copies can take."""
            if call.kind == "fp8_block":
                return plgpu.layout_cast(jnp.full((OUTPUTS,), ref[n, g], jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            at = ref.at[mine] if g is None else ref.at[mine, g]
            return plgpu.load(at, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

        def scales(t: Any) -> tuple[Any, ...]:
            """Of turn t's groups, then zeros, as they are stored; of the last turn's where there is none."""
            if not call.group_size:
                return ()
            at = lax.div(jnp.minimum(t, K // BK - 1) * BK, jnp.int32(call.group_size))
            refs = [scale_ref] if zero_ref is None else [scale_ref, zero_ref]
            return tuple(of_outputs(ref, at + g) for ref in refs for g in range(per_turn))

        def turn(i: Any, carry: Any) -> Any:
            acc, now = carry
            slot = lax.rem(i, stages)
            following = scales(first + i + 1)  # under way while this turn computes
            plgpu.barrier_wait(there.at[slot])
            codes = _load_codes(w_tile.at[slot, pl.ds(group * OUTPUTS, OUTPUTS)], call)
            for g in range(per_turn):
                pieces = _pieces(codes, g, call)

                def add(values: Any, pieces: Any = pieces) -> None:
                    for w, at in pieces:
                        plgpu.wgmma(values, w, x_tile.at[slot, :, pl.ds(at, call.piece)].transpose((1, 0)))

                d: Any = (
                    _zeros(BM) if now else acc
                )  # where scales are outputs', the products are added to the whole sum
                if call.interpret:  # it takes no matrix out of registers, and no accumulator that begins at something
                    for w, at in pieces:
                        some = x_tile[slot, :, pl.ds(at, call.piece)]
                        d = d + jnp.dot(w, some.T, preferred_element_type=jnp.float32)
                else:
                    d = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(d))
                acc = acc + d * _spread(now[g].astype(jnp.float32), acc.shape, 0) if now else d
                if sums_ref is not None:
                    z = (jnp.float32(MIDDLE) - now[per_turn + g].astype(jnp.float32)) * now[g].astype(jnp.float32)
                    e = plgpu.load(sums_tile.at[slot, g], layout=plgpu.Layout.WGMMA.reduce(0))
                    acc = acc + _spread(z, acc.shape, 0) * _spread(e, acc.shape, 1)
            plgpu.barrier_arrive(used.at[slot])
            return acc, following

        acc, _ = lax.fori_loop(0, turns, turn, (_zeros(BM), scales(first)))
        if not call.group_size:
            acc = acc * _spread(of_outputs(scale_ref, None).astype(jnp.float32), acc.shape, 0)
        ours = out_tile.at[group]
        if call.turned:
            ours.T[...] = plgpu.layout_cast(acc.astype(call.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            where = out_ref.at[rows, mine]
        else:
            ours[...] = acc
            where = out_ref.at[part, mine, rows]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ours, where)
        plgpu.wait_smem_to_gmem(0)


def _zeros(block_m: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((OUTPUTS, block_m), jnp.float32), plgpu.Layout.WGMMA)


def _spread(x: Any, shape: tuple[int, ...], dim: int) -> Any:
    """x along dim `dim` of an array of `shape`, the same along the other."""
    return lax.broadcast_in_dim(x, shape, (dim,))


def _load_codes(ref: Any, call: Call) -> Any:
    """A turn's codes of 64 outputs in registers: as words, or as bfloat16 where a code is a byte."""
    if call.kind == "int4":
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    codes = plgpu.layout_cast(plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X), plgpu.Layout.WGMMA)
    if call.kind == "int8":
        return codes.astype(jnp.bfloat16)
    return codes.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)


def _pieces(codes: Any, g: int, call: Call) -> list[tuple[Any, int]]:
    """Operands of the products of a turn's group g, and where in the turn's inputs each begins."""
    start, C = g * call.group, call.piece
    if call.kind == "int4":
        words = codes[:, g * C : (g + 1) * C]
        return [(_unpacked(words, j, call), start + j * C) for j in range(4)]
    return [(codes[:, at : at + C], at) for at in range(start, start + call.group, C)]


def _unpacked(words: Any, j: int, call: Call) -> Any:
    """Code j of each word, less MIDDLE, in bfloat16."""
    if call.interpret:
        bits = (words >> jnp.uint16(4 * j)) & jnp.uint16(15) | jnp.uint16(0x4300)
        return lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.bfloat16(128 + MIDDLE)
    text = unpack_ptx(j)

    result = plgpu.ShapeDtypeStruct(words.shape, jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    def unpack(_: Any, words: Any) -> Any:
        register, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        found = np.empty_like(words.registers)
        for at, two in np.ndenumerate(words.registers):
            bits = llvm.inline_asm(register, [gpu_utils.bitcast(two, register)], text, "=r,r")
            found[at] = gpu_utils.bitcast(bits, pair)
        return FragmentedArray(_registers=found, _layout=words.layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    return inline(unpack)(words)


def unpack_ptx(j: int) -> str:
    """Two words to two bfloat16 numbers: code j of each, less MIDDLE. 0x4300 | q is 128 + q; 0xEA is (a & b) | c."""
    shift = f"shr.b32 t, $1, {4 * j};" if j else "mov.b32 t, $1;"
    return (
        f"{{ .reg .b32 t, o; {shift} lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;"
        f" mov.b32 o, 0x{0x43004300 | MIDDLE << 16 | MIDDLE:08X}; sub.rn.bf16x2 $0, t, o; }}"
    )


# ---- around it


def _product(call: Call, x: Array, codes: Array, scale: Array, zero: Array | None) -> Array:
    (M, K), N, config = x.shape, codes.shape[0], call.config
    BM, splits, turned = config.block_m, config.splits, call.turned
    x = jnp.pad(x, ((0, -M % BM), (0, 0)))
    rows = x.shape[0]
    more = []
    if zero is not None:
        sums = x.reshape(rows, K // call.group_size, call.group_size).sum(-1, dtype=jnp.float32).T
        more = [zero, sums]
    out = (rows, N) if turned else (splits, N, rows)
    run = plgpu.kernel(
        functools.partial(_kernel, call=call),
        out_type=jax.ShapeDtypeStruct(out, call.dtype if turned else jnp.float32),
        grid=(splits, N // (GROUPS * OUTPUTS), rows // BM),
        grid_names=("part", "outputs", "rows"),  # the last in turn: blocks of the same codes run at a time
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"quant_matmul_{call.kind}_hopper",
        interpret=plgpu.InterpretGPUParams() if call.interpret else None,
    )
    y = run(x, codes, scale, *more)
    return (y if turned else y.sum(0).T.astype(call.dtype))[:M]
