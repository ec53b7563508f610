"""The Triton kernel of quant_matmul compiled for real cards, without a card: that it compiles with nothing spilled, fits shared
memory, holds no unpacked copy of a matrix, and spends few instructions on a weight.

What cannot be seen here: whether inline PTX computes what its numpy double does (tests/test_quant_matmul_triton.py), and speed.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot, disassembly, dispatch
from pallas_kernels.quant_matmul import triton, xla
from pallas_kernels.quant_matmul.config import CODES, Config, config

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

GENERATIONS = ["A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"]  # sm_80, 86, 89, 90, 100, 120
SUMMED = r"= [( ]*(\w+)\[([\d,]+)\].* all-reduce(?:-start)?\("
NO_SPILL = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def arguments(kind: str, M: int, N: int, K: int, group_size: int, affine: bool, dtype: Any) -> tuple[Any, ...]:
    """Abstract x, codes, scale and, if any, zero."""
    if kind == "fp8_block":
        scales: tuple[int, ...] = -(-N // 128), -(-K // 128)
    else:
        scales = (N, K // group_size) if group_size else (N,)
    codes = (N, K // 4) if CODES[kind][0] == 4 else (N, K)
    of_codes = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "fp8_block": jnp.float8_e4m3fn}.get(kind, jnp.uint16)
    of_scale = {"int4": jnp.bfloat16, "int8": jnp.bfloat16, "mxfp4": jnp.uint8}.get(kind, jnp.float32)
    scale = jax.ShapeDtypeStruct(scales, of_scale)
    return (
        jax.ShapeDtypeStruct((M, K), dtype), jax.ShapeDtypeStruct(codes, of_codes), scale, *([scale] if affine else []),
    )  # fmt: skip


def product(kind: str, group_size: int, dtype: Any) -> Any:
    def call(x: jax.Array, codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return triton.quant_matmul(x, codes, scale, zero, kind=kind, group_size=group_size, dtype=dtype)

    return jax.jit(call)


def compiled_on(
    card: str, kind: str, M: int, N: int, K: int, group_size: int, affine: bool = False, dtype: Any = jnp.bfloat16
) -> tuple[Any, disassembly.Kernel, Config]:
    """The program, its kernel, and the tiles."""
    with aot.target(aot.CARDS[card]) as target:
        given = target.place(arguments(kind, M, N, K, group_size, affine, dtype))
        compiled = target.compile(product(kind, group_size, dtype), *given, **NO_SPILL)
        gpu = dispatch.gpu()
    assert gpu is not None
    assert gpu.capability == aot.CARDS[card].capability
    tiles = config(M, N, K, kind, group_size, gpu, bfloat16=dtype == jnp.bfloat16, affine=affine)
    [kernel] = (k for k in disassembly.kernels(compiled) if k.name.startswith(("quant_matmul", "pallas_call")))
    return compiled, kernel, tiles


def check(
    compiled: Any, kernel: disassembly.Kernel, tiles: Config, kind: str, M: int, N: int, K: int, card: str
) -> None:
    limits = aot.CARDS[card].limits
    assert kernel.stack == 0
    assert kernel.shared_memory <= tiles.shared_memory(kind) <= limits.shared_memory_block
    assert kernel.threads == 32 * tiles.warps
    assert kernel.registers * kernel.threads <= 65536
    assert math.prod(kernel.grid) == -(-M // tiles.block_m) * -(-N // tiles.block_n) * tiles.splits
    # nothing as large as half the matrix is written: rows, and float32 parts of the result
    memory = compiled.memory_analysis()
    rows = M * K * 2 * max(1, tiles.copies)
    assert memory.temp_size_in_bytes < 4 * M * N * tiles.splits + 2 * rows + 2**20
    for shape in re.findall(r"= (?:bf16|f16|f32|s32)\[([\d,]+)\]", compiled.as_text()):
        assert math.prod(map(int, shape.split(","))) < N * K // 2, shape


def instructions_per_weight(kernel: disassembly.Kernel, tiles: Config, kind: str) -> float:
    """Of one thread, times threads, for each weight of a turn of the loop."""
    loop = disassembly.innermost_loop(disassembly.instructions(kernel))
    assert disassembly.matrix_instructions(loop)
    assert not disassembly.counts(loop).keys() & {"STL", "LDL"}
    assert disassembly.counts(loop)["LDGSTS"], "loads do not run ahead of the computation"
    weights = tiles.block_n * tiles.columns * tiles.unroll * (4 if CODES[kind][0] == 4 else 1)
    return len(loop) * kernel.threads / weights


# 7B, 8B and 70B models: (N, K), each generation with each number of rows
SIZES = [(4096, 4096), (4096, 14336), (8192, 28672)]
FEWEST_ROWS = {1: 2.1, 16: 2.4, 64: 5.0}  # rows: instructions a weight of 4 bits, groups of 128


@pytest.mark.parametrize("M", list(FEWEST_ROWS))
@pytest.mark.parametrize("card", GENERATIONS)
def test_four_bits_on_every_generation(card: str, M: int) -> None:
    N, K = SIZES[(GENERATIONS.index(card) + list(FEWEST_ROWS).index(M)) % 3]
    compiled, kernel, tiles = compiled_on(card, "int4", M, N, K, 128)
    check(compiled, kernel, tiles, "int4", M, N, K, card)
    if disassembly.missing() is None:
        assert instructions_per_weight(kernel, tiles, "int4") <= FEWEST_ROWS[M]


# kind, group_size, affine, rows, card, dtype, and the most instructions that a weight may take: a tenth more than it does
OTHERS = [
    ("int4", 64, True, 16, "RTX 3090", jnp.bfloat16, 3.2),
    ("int4", 32, False, 1, "RTX 4090", jnp.bfloat16, 2.6),
    ("int4", 32, False, 8, "A100", jnp.bfloat16, 2.9),
    ("int4", 32, False, 64, "H200", jnp.bfloat16, 5.3),
    ("int4", 32, True, 1, "H200", jnp.bfloat16, 3.0),  # GGUF's Q4_K
    ("int4", 16, False, 1, "H200", jnp.bfloat16, 3.5),
    ("int4", 128, True, 64, "A100", jnp.float16, 5.5),
    ("int4", 128, False, 1, "H200", jnp.float16, 2.1),
    ("int8", 0, False, 1, "H200", jnp.bfloat16, 3.3),
    ("int8", 0, False, 64, "RTX 4090", jnp.bfloat16, 8.2),
    ("int8", 128, False, 16, "RTX 5090", jnp.float16, 4.8),
    ("nf4", 64, False, 1, "H200", jnp.bfloat16, 5.3),
    ("nf4", 64, False, 64, "RTX 3090", jnp.float16, 7.7),
    ("mxfp4", 32, False, 1, "B200", jnp.bfloat16, 4.8),
    ("mxfp4", 32, False, 16, "A100", jnp.float16, 6.0),
    ("fp8", 0, False, 1, "RTX 3090", jnp.bfloat16, 3.9),  # has no conversion of fp8
    ("fp8", 0, False, 64, "H200", jnp.bfloat16, 4.2),
    ("fp8_block", 128, False, 16, "RTX 4090", jnp.float16, 4.0),
]


@pytest.mark.parametrize(("kind", "group_size", "affine", "M", "card", "dtype", "most"), OTHERS, ids=str)
def test_other_kinds(kind: str, group_size: int, affine: bool, M: int, card: str, dtype: Any, most: float) -> None:
    N, K = 4096, 4096
    compiled, kernel, tiles = compiled_on(card, kind, M, N, K, group_size, affine, dtype)
    check(compiled, kernel, tiles, kind, M, N, K, card)
    if disassembly.missing() is None:
        assert instructions_per_weight(kernel, tiles, kind) <= most


def test_ragged_sizes_compile() -> None:
    """130 rows, outputs and inputs that are multiples of no tile, a block of fp8 scales that is cut on both sides."""
    for kind, N, K, group_size in (("int4", 1000, 2208, 32), ("fp8_block", 1000, 2200, 128)):
        _, kernel, tiles = compiled_on("RTX 4090", kind, 130, N, K, group_size)
        assert kernel.stack == 0
        assert kernel.shared_memory <= tiles.shared_memory(kind)


@pytest.mark.parametrize("way", ["outputs", "inputs"])
def test_split_over_two_cards(way: str) -> None:
    """Each card compiles the kernel of its half; only split inputs are summed."""
    N, K = 4096, 14336
    with aot.target(aot.CARDS["H200"], tensor=2) as target:
        split = P("tensor", None) if way == "outputs" else P(None, "tensor")
        specs = (P() if way == "outputs" else P(None, "tensor"), split, split)
        given = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(target.mesh, s))
            for a, s in zip(arguments("int4", 16, N, K, 128, False, jnp.bfloat16), specs, strict=True)
        ]
        compiled = target.compile(product("int4", 128, jnp.bfloat16), *target.place(given), **NO_SPILL)
    text = compiled.as_text()
    told = set(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))
    assert told == (set() if way == "outputs" else {"all-reduce"})
    half = (N // 2, K // 4) if way == "outputs" else (N, K // 8)
    assert re.search(rf"= u16\[{half[0]},{half[1]}\]\S* parameter", text)


@pytest.mark.parametrize("way", ["forward", "back"])
@pytest.mark.parametrize(
    ("kind", "group_size", "N", "K", "card"),
    [("nf4", 64, 14336, 4096, "RTX 4090"), ("int4", 32, 4096, 14336, "H200"), ("fp8_block", 128, 14336, 4096, "A100")],
    ids=str,
)
def test_many_rows_hold_one_chunk(kind: str, group_size: int, N: int, K: int, card: str, way: str) -> None:
    """Beside the result stand one chunk of the matrix, in 16 bits, and what it gives: no float32 of all rows or of a chunk."""
    M, dtype = 2048, jnp.bfloat16
    x, *w = arguments(kind, M, N, K, group_size, False, dtype)
    x, op = (x, xla.quant_matmul) if way == "forward" else (jax.ShapeDtypeStruct((M, N), dtype), xla.transposed)
    program = jax.jit(lambda x, *w: op(x, *w, kind=kind, group_size=group_size, dtype=dtype))
    with aot.target(aot.CARDS[card]) as target:
        compiled = target.compile(program, *target.place((x, *w)))
    chunks, columns = N * K // xla.GPU_CHUNK + 1, N if way == "forward" else K
    assert chunks == 4  # a power of two
    chunk, gave = 2 * N * K // chunks, 2 * M * columns // chunks
    scales = 4 * N * K // group_size  # float32
    assert compiled.memory_analysis().temp_size_in_bytes <= chunk + gave + scales + 2**16


@pytest.mark.parametrize("way", ["outputs", "inputs"])
def test_many_rows_split_over_two_cards(way: str) -> None:
    """Codes stay where they are, forward and back; what is summed over cards is what a split dim asks for."""
    M, N, K, dtype = 2048, 4096, 14336, jnp.bfloat16
    split = P("tensor", None) if way == "outputs" else P(None, "tensor")
    _, *w = arguments("nf4", M, N, K, 64, False, dtype)
    for op, columns, given in ((xla.quant_matmul, K, P(None, split[1])), (xla.transposed, N, P(None, split[0]))):
        with aot.target(aot.CARDS["H200"], tensor=2) as target:
            program = jax.jit(functools.partial(op, kind="nf4", group_size=64, dtype=dtype))
            x = jax.ShapeDtypeStruct((M, columns), dtype)
            placed = [
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(target.mesh, s))
                for a, s in zip((x, *w), (given, split, split), strict=True)
            ]
            text = target.compile(program, *target.place(placed)).as_text()
        told = set(
            re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
        )
        assert told == ({"all-reduce"} if given == P(None, "tensor") else set())
        summed = {(of, math.prod(map(int, dims.split(",")))) for of, dims in re.findall(SUMMED, text)}
        # chunks are added up before they are rounded; one number a row is of no account (xla.py)
        assert {of for of, size in summed if size > M} <= {"f32"}
        assert bool(summed) == bool(told)
        assert f"u16[{N},{K // 4}]" not in text


def test_the_kernels_facts_are_those_of_the_program() -> None:
    """What is read out of a cubin, against a program whose every number is known: 64 adds in a loop, a grid of 3 x 5."""
    from jax.experimental import pallas as pl

    from pallas_kernels.triton_call import triton_call

    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = jax.lax.fori_loop(0, x_ref[0].astype(jnp.int32), lambda i, c: c * 0.5 + x_ref[...], x_ref[...])

    def call(x: jax.Array) -> jax.Array:
        spec = pl.BlockSpec((64,), lambda i, j: (i * 5 + j,))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return triton_call(
            kernel, x, out_shape=shape, grid=(3, 5), in_specs=[spec], out_specs=spec, num_warps=2, num_stages=1, name="adds"
        )  # fmt: skip

    with aot.target(aot.CARDS["H200"]) as target:
        compiled = target.compile(jax.jit(call), *target.place((jax.ShapeDtypeStruct((64 * 15,), np.float32),)))
    [found] = disassembly.kernels(compiled)
    assert (found.grid, found.threads, found.stack, found.shared_memory) == ((3, 5, 1), 64, 0, 0)
    assert 4 <= found.registers <= 32
    if disassembly.missing() is None:
        listing = disassembly.instructions(found)
        assert [i.address for i in listing] == sorted({i.address for i in listing})
        loop = disassembly.innermost_loop(listing)
        assert disassembly.counts(loop)["BRA"] == 1
        assert disassembly.matrix_instructions(loop) == 0


def test_a_program_for_the_cpu_has_no_kernels() -> None:
    with pytest.raises(ValueError, match="holds no kernel"):
        disassembly.kernels(jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile())
