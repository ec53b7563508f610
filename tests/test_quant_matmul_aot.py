"""The Triton kernel of quant_matmul compiled for real cards, without a card: that it compiles with nothing spilled, fits shared
memory, holds no unpacked copy of a matrix, and spends few instructions on a weight.

What cannot be seen here: whether inline PTX computes what its numpy double does (tests/test_quant_matmul_triton.py), and speed.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from pathlib import Path
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

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_quant as bench  # pyright: ignore[reportMissingImports]

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
    compiled: Any,
    kernel: disassembly.Kernel,
    tiles: Config,
    kind: str,
    M: int,
    N: int,
    K: int,
    card: str,
    stack: int = 0,
) -> None:
    limits = aot.CARDS[card].limits
    assert kernel.stack <= stack
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
    """Of one thread, times threads, for each weight of a turn of the loop, which has no spills."""
    told = disassembly.counts(disassembly.innermost_loop(disassembly.instructions(kernel)))
    assert not told.keys() & {"STL", "LDL"}
    assert told["LDGSTS"], "loads do not run ahead of the computation"
    return bench.instructions_per_weight(kernel, tiles, bench.Kind.usual(kind))


# 7B, 8B and 70B models: (N, K), each generation with each number of rows
SIZES = [(4096, 4096), (4096, 14336), (8192, 28672)]
FEWEST_ROWS = {1: 2.1, 16: 2.4, 64: 5.0}  # rows: instructions a weight of 4 bits, groups of 128


@pytest.mark.parametrize("M", list(FEWEST_ROWS))
@pytest.mark.parametrize("card", GENERATIONS)
@pytest.mark.some_rows
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
@pytest.mark.some_rows
def test_other_kinds(kind: str, group_size: int, affine: bool, M: int, card: str, dtype: Any, most: float) -> None:
    N, K = 4096, 4096
    compiled, kernel, tiles = compiled_on(card, kind, M, N, K, group_size, affine, dtype)
    check(compiled, kernel, tiles, kind, M, N, K, card)
    if disassembly.missing() is None:
        assert instructions_per_weight(kernel, tiles, kind) <= most


# SASS instructions a weight at 1, 16 and 64 rows, the most that was read over the shapes above with `scripts/bench_quant.py
# --compiled` (jax 0.12.0.1): on sm_80, 86, 89 and 120, and on sm_90 and 100, whose products are other instructions
RECORDED = {
    "int4": ((1.9, 1.8), (2.2, 2.2), (4.2, 4.0)),
    "int8": ((3.3, 3.0), (3.7, 3.5), (8.1, 6.5)),
    "nf4": ((4.9, 4.8), (5.4, 5.4), (7.7, 8.0)),
    "fp8": ((3.6, 3.0), (4.0, 3.4), (8.0, 3.9)),
    "mxfp4": ((4.5, 4.5), (5.5, 5.3), (6.6, 5.8)),
    "fp8_block": ((3.8, 3.2), (4.2, 3.6), (8.8, 4.4)),
    "int4, groups of 128, zeros": ((2.0, 2.0), (2.4, 2.3), (5.3, 6.1)),
    "int4, groups of 32": ((2.4, 2.4), (4.4, 4.1), (5.3, 4.6)),
    "int4, groups of 32, zeros": ((2.75, 2.7), (5.2, 4.8), (13.7, 17.4)),
    "int8, groups of 32": ((4.0, 3.8), (4.7, 4.4), (12.3, 9.8)),
}
PLAIN = {
    "int4": ((4.4, 4.3), (4.8, 4.8), (7.2, 7.0)),
    "nf4": ((6.8, 6.7), (7.7, 7.5), (9.6, 9.7)),
    "mxfp4": ((9.0, 8.9), (10.2, 10.2), (12.8, 11.5)),
    "int4, groups of 128, zeros": ((4.5, 4.5), (5.1, 5.0), (8.8, 9.6)),
    "int4, groups of 32": ((5.1, 5.0), (7.3, 7.2), (9.6, 9.2)),
    "int4, groups of 32, zeros": ((5.5, 5.5), (8.5, 8.3), (19.4, 23.9)),
}
# Bytes of a thread's stack, the most that was seen: an address that a turn needs once, where ptxas stops at a number of registers
# that lets one more block stand on a core. Which number that is differs from one shape to the next.
STACK = {
    ("int8, groups of 32", 64, "RTX 3090"): 8,
    ("int8, groups of 32", 64, "RTX 4090"): 8,
    ("nf4, plain", 16, "RTX 3090"): 16,
    ("int4, groups of 32, zeros, plain", 64, "A100"): 24,
}
ROWS = (1, 16, 64)


def of_kinds(kinds: Any) -> list[Any]:
    """(kind, card, rows): in a usual run each kind on each card, the numbers of rows in turn."""
    return [
        pytest.param(kind, card, M, marks=() if ROWS[(i + j) % 3] == M else pytest.mark.thorough)
        for i, kind in enumerate(kinds) for j, card in enumerate(GENERATIONS) for M in ROWS
    ]  # fmt: skip


def compiled_kind(kind: str, card: str, M: int, implementation: str) -> float | None:
    """Instructions a weight, if they can be read, of a kernel that is held to its card; the shapes take turns."""
    [of] = [k for k in bench.COMPILED_KINDS if str(k) == kind]
    N, K = SIZES[(list(RECORDED).index(kind) + 2 * GENERATIONS.index(card) + ROWS.index(M)) % 3]
    compiled, kernel, tiles = bench.compile_for(card, of, M, N, K, implementation=implementation)
    told = kind + (", plain" if implementation == "triton_plain" else "")
    check(compiled, kernel, tiles, of.kind, M, N, K, card, STACK.get((told, M, card), 0))
    found = bench.instructions_per_weight(kernel, tiles, of) if disassembly.missing() is None else None
    print(card, told, f"{M} rows", f"{N}x{K}", tiles, "registers", kernel.registers, "stack", kernel.stack, "shared",
          kernel.shared_memory, "instructions a weight", found)  # fmt: skip
    return found


def most(recorded: Any, kind: str, card: str, M: int) -> float:
    """A tenth more than was read."""
    return 1.1 * recorded[kind][ROWS.index(M)][card in ("H200", "B200")]


@pytest.mark.parametrize(("kind", "card", "M"), of_kinds(RECORDED))
@pytest.mark.some_rows
def test_every_kind_on_every_generation(kind: str, card: str, M: int) -> None:
    found = compiled_kind(kind, card, M, "triton")
    assert found is None or found <= most(RECORDED, kind, card, M)


@pytest.mark.parametrize(("kind", "card", "M"), [(k, GENERATIONS[i], ROWS[i % 3]) for i, k in enumerate(PLAIN)])
@pytest.mark.some_rows
def test_the_plain_unpack_stands_beside_the_packed_one(
    kind: str, card: str, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with no inline PTX in it; what that spares is what it is for."""
    packed = compiled_kind(kind, card, M, "triton")
    monkeypatch.setattr(triton.plt, "elementwise_inline_asm", lambda *a, **k: pytest.fail("there is inline PTX"))
    plain = compiled_kind(kind, card, M, "triton_plain")
    if plain is not None and packed is not None:
        assert packed < plain <= most(PLAIN, kind, card, M)


def test_the_kinds_are_those_that_are_told() -> None:
    assert [str(k) for k in bench.COMPILED_KINDS] == list(RECORDED)
    assert [str(k) for k in bench.COMPILED_KINDS if CODES[k.kind][0] == 4] == [k for k in RECORDED if k in PLAIN]
    assert tuple(GENERATIONS) == bench.GENERATIONS
    assert {f"{N}x{K}" for N, K in SIZES} == set(bench.GPU_SHAPES)


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
