"""Speed of rows times a quantised matrix, beside the same matrix in float32 or bfloat16, in one run.

    python scripts/bench_quant.py                          every kind, shapes of models of 7B (on a GPU of 70B too)
    python scripts/bench_quant.py --kind int4 --rows 1     one of them
    python scripts/bench_quant.py --kind int4 --group-size 32 --affine    of other groups, with zeros
    python scripts/bench_quant.py --table                  on a GPU: what was fastest serves from now on
    python scripts/bench_quant.py --json FILE              a row of results a line
    python scripts/bench_quant.py --compiled               what the compiler makes of the kernels for six cards, without one
    python scripts/bench_quant.py --decode                 tokens/s of a whole model, from GGUF files
    python scripts/bench_quant.py --decode --peer PROGRAM  the same files in llama.cpp's llama-bench, in turns

A few rows are bounded by the bytes of codes and scales: GB/s of those is reported, and its fraction of the memory
bandwidth that is measured in the same run. `to float32` and `to bfloat16` are a dense matrix's time over this one's (on a GPU
by cuBLAS), `to xla` the least of XLA's other forms': above 1 this one is faster. Every call takes another matrix than the last,
of enough to exceed four times the last-level cache; implementations take turns, round by round, and medians are compared. On a
GPU every implementation is measured, and beside them `xla, whole`: the whole matrix written out in the rows' dtype, and a dot. A
program is one pass over all matrices, called several times before it is waited for, so that launches from Python do not count.
One whose results are not the reference's is told, and left out.

Aims of an H200 are multiples of bfloat16's speed at 16 rows or fewer (int4: Marlin's on an A100, github.com/IST-DASLab/marlin),
and at any number of rows no less than that of XLA's best form. They are of what serves: by the table, the fastest.

What an implementation refuses is said as it is met. One that fails otherwise is a row that says how; Mosaic's, which may hang or
end its process, is tried in another process first.

With --table the times become the card's table, by which pallas_kernels/dispatch.py orders implementations from then on; all
kinds are measured, and beside them what checkpoints bring (OTHERS: groups of 32, zeros).

--compiled needs XLA's GPU compiler and no card: registers, stack and shared memory of the Triton kernels, and SASS instructions
a weight in their loop (KERNELS.md, 3a: 3.1 for 4 bits is what an H200 has time for), of the packed and of the plain unpack.

--decode: a random Llama of 125 M parameters is written as three GGUF files, F32, Q8_0 and Q4_0, all matrices of one type. Every
round decodes from each of them once, on each side: batch 1, 63 tokens after a prompt of 128, greedy. The peer is told the
same (`llama-bench -p 0 -n 63 -d 128`) with as many threads as there are cores.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from bench import SHAPE_125M, Ours
from click.core import ParameterSource
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxengine
from jaxengine.architecture import architecture, initialise
from jaxengine.command import A_FILE, SETTINGS, reported, start_jax
from jaxengine.plan import parameter_bytes
from jaxengine.weights import base
from pallas_kernels import aot, cards, disassembly, dispatch
from pallas_kernels.quant_matmul import NAMES, case, layout, quant_matmul, reference
from pallas_kernels.quant_matmul.config import CODES, Config, config

GROUPS = {
    "int8": 0, "int5": 64, "int4": 128, "int3": 128, "int2": 64, "nf4": 64, "mxfp4": 32, "fp8": 0, "fp8_block": layout.BLOCK,
}  # fmt: skip
CPU_BYTES = 160 << 20  # of matrices, in turn: four times the last-level cache of most
LARGEST_L2 = 128 << 20  # of the cards in pallas_kernels/cards.py; what one that is not there is taken to have
LONG, MOST = 5e-3, 30  # seconds that calls of a GPU take before they are waited for, and how many they are at most
TABLE_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
CPU_SHAPES, GPU_SHAPES = ("4096x4096", "14336x4096"), ("4096x4096", "4096x14336", "8192x28672")
AIMS = {"int4": dict(zip(GPU_SHAPES, (1.4, 2.4, 3.0), strict=True)), "int8": dict.fromkeys(GPU_SHAPES, 1.7),
        "nf4": dict.fromkeys(GPU_SHAPES, 1.6)}  # fmt: skip
OF_XLA = 1.0  # what serves is to be no slower than XLA's best form
WHOLE = "xla, whole"  # the whole matrix written out in the rows' dtype, and a plain dot: what serves nobody
XLA = ("xla", WHOLE)
GPU_NAMES = ("triton", "triton_plain", "mosaic_gpu", *XLA)
PROBED = "mosaic_gpu"  # waits for barriers, and may end its process while it is compiled
PROBE_ROWS, PROBE_SECONDS = (16, 64, 256), 180
DENSE = ("float32", "bfloat16")
CUBLAS = {"xla_gpu_enable_triton_gemm": False}  # or XLA takes a kernel that it writes itself, where that is faster


class Kind(NamedTuple):
    """What a matrix is held as. group_size: 0 is one scale an output."""

    kind: str
    group_size: int
    affine: bool = False

    @classmethod
    def usual(cls, kind: str) -> Kind:
        return cls(kind, GROUPS[kind])

    def __str__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size != GROUPS[self.kind] or self.affine else ""
        return self.kind + groups + (", zeros" if self.affine else "")


# what GPTQ, AWQ and GGUF bring beside the usual groups
OTHERS = (Kind("int4", 128, True), Kind("int4", 32), Kind("int4", 32, True), Kind("int8", 32))


class Row(NamedTuple):
    """One measurement, as it is printed and stored; None where nothing was measured beside it.

    fraction: of the rate of memory. to_float32, to_bfloat16: a dense matrix's time over this one's; to_xla: the least of XLA's
    forms', itself apart. serves: whether it is the fastest that can be asked for, which a card's table makes serve. aims: what
    these are to be at least on a GPU, and whether they are.
    """

    what: str
    shape: tuple[int, int]
    rows: int
    implementation: str
    ms: float
    gigabytes: float
    fraction: float
    to_float32: float | None
    to_bfloat16: float | None
    to_xla: float | None
    serves: bool
    aims: dict[str, float]
    reached: dict[str, bool]


class Found(NamedTuple):
    """What was measured of one kind, shape and number of rows.

    beside: milliseconds of dense matrices. wrong: implementations with other numbers than the reference's, and how far off
    (`off`). left_out: those that did not run, and why. unchecked: why numbers were held against nothing; then no row is for a
    table. failed: those left out that had not refused. shape, M: what was measured.
    """

    rows: list[Row]
    beside: dict[str, float]
    wrong: dict[str, float]
    left_out: dict[str, str]
    unchecked: str
    failed: frozenset[str] = frozenset()
    shape: tuple[int, int] = (0, 0)
    M: int = 0

    def absent(self) -> dict[str, str]:
        """What is to be said of implementations that should have run, and are in no row."""
        wrong = {n: f"other numbers than the reference's, by {far:.3g} of the bound" for n, far in self.wrong.items()}
        return {n: self.left_out[n] for n in sorted(self.failed)} | wrong


def aims_of(kind: str, shape: tuple[int, int], rows: int) -> dict[str, float]:
    """What serves is to reach on a GPU: of bfloat16's speed where something is asked, and of XLA's everywhere."""
    if not on_gpu():
        return {}
    of_bfloat16 = AIMS.get(kind, {}).get("x".join(map(str, shape))) if rows <= 16 else None
    return ({} if of_bfloat16 is None else {"to_bfloat16": of_bfloat16}) | {"to_xla": OF_XLA}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def dense_matrix(dtype: str, N: int, K: int, seed: int) -> jax.Array:
    return (0.01 * jax.random.normal(jax.random.key(seed), (N, K), jnp.float32)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def matrix(kind: Kind, N: int, K: int, seed: int) -> tuple[Any, ...]:
    """Random codes and scales of a kind, and zeros where it has them; no NaN among them."""
    name, G, affine = kind
    keys = iter(jax.random.split(jax.random.key(seed), 4))

    def words(per: int) -> jax.Array:
        return jax.random.bits(next(keys), (N, K // per), jnp.uint16)

    def numbers(shape: tuple[int, ...], least: int, end: int) -> jax.Array:
        return jax.random.randint(next(keys), shape, least, end, jnp.int32)

    def codes() -> Any:
        if name == "int8":
            return jnp.maximum(lax.bitcast_convert_type(jax.random.bits(next(keys), (N, K), jnp.uint8), jnp.int8), -127)
        if name in layout.FLOATS:
            drawn = jax.random.bits(next(keys), (N, K), jnp.uint8)
            finite = jnp.where((drawn & jnp.uint8(127)) == jnp.uint8(127), jnp.uint8(0), drawn)
            return lax.bitcast_convert_type(finite, jnp.float8_e4m3fn)
        if name in ("int5", "int3"):
            return words(4 if name == "int5" else 8), words(16)
        return words(8 if name == "int2" else 4)

    made = codes()
    if name == "mxfp4":
        return made, numbers((N, K // G), 118, 122).astype(jnp.uint8)
    shape = (-(-N // G), -(-K // G)) if name == "fp8_block" else (N, K // G) if G else (N,)
    scale = jax.random.uniform(next(keys), shape, jnp.float32, 0.005, 0.01)
    if name not in ("int8", "nf4", *layout.FLOATS):
        scale = scale.astype(jnp.bfloat16)
    return (made, scale, *([numbers(shape, 0, 2 ** layout.BITS[name]).astype(jnp.bfloat16)] if affine else []))


def size(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Wall time of one call, of so many that are waited for together."""
    start, out = time.perf_counter(), None
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def often(run: Callable[[], Any]) -> int:
    """How often a call is made before it is waited for; it has run before. On a GPU starting one takes as long as a short
    one does."""
    return min(MOST, math.ceil(LONG / max(seconds(run), 1e-9))) if on_gpu() else 1


def bandwidth(nbytes: int | None = None) -> float:
    """Bytes/s of reading so many (None: 1 GiB; CPU: 512 MiB), the best of a row maximum, a sum and a matrix times a vector."""
    columns = 2**13 if on_gpu() else 2**12
    x = jnp.ones((2**15 if nbytes is None else max(1, nbytes // (4 * columns)), columns), jnp.float32)
    v = jnp.ones((x.shape[1],), jnp.float32)
    reads = [jax.jit(lambda x: x.max(-1)), jax.jit(lambda x: x.sum()), jax.jit(lambda x: x @ v)]
    runs = [functools.partial(read, x) for read in reads]
    for run in runs:
        run().block_until_ready()
    calls = [often(run) for run in runs]
    return x.nbytes / min(seconds(run, n) for _ in range(7) for run, n in zip(runs, calls, strict=True))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class Turns:
    """One product for each of several matrices in turn, in one program; traced when it is made, and refused then.

    On a CPU it is a program of one product, which is called with each. options: the compiler's, on a GPU.
    """

    def __init__(
        self,
        product: Callable[[jax.Array, Any], jax.Array],
        x: jax.Array,
        all_of_them: list[Any],
        options: dict[str, Any] | None = None,
    ):
        self.x, self.matrices = x, all_of_them

        def chained(x: jax.Array, matrices: list[Any]) -> jax.Array:
            y = None
            for w in matrices:
                x, y = lax.optimization_barrier((x, product(x, w)))
            assert y is not None
            return y

        self.each = [all_of_them] if on_gpu() else [[w] for w in all_of_them]
        self._lowered, self._options = jax.jit(chained).lower(x, self.each[0]), options if on_gpu() else None

    def compile(self) -> Callable[..., Any]:
        """Takes its time, and may be called in a thread."""
        self.run = self._lowered.compile(compiler_options=self._options)
        return self.run

    def begin(self) -> jax.Array:
        """What the first program's last product gives."""
        gave = self.run(self.x, self.each[0]).block_until_ready()
        self.calls = often(lambda: self.run(self.x, self.each[0]))
        return gave

    def time(self) -> float:
        """Of one product."""
        times = [seconds(lambda g=g: self.run(self.x, g), self.calls) for g in self.each]
        return statistics.median(times) / len(self.each[0])


def distinct_bytes() -> int:
    """Of matrices that a turn goes through, to be exceeded: four times the last-level cache."""
    if not on_gpu():
        return CPU_BYTES
    try:
        return 4 * cards.find(jax.devices()[0].device_kind).l2
    except ValueError:
        return 4 * LARGEST_L2


def some(one: Callable[[int], Any], nbytes: int | None = None) -> list[Any]:
    """More bytes than these (None: than the caches hold), of two at least; one: made of a seed."""
    first = one(0)
    count = (distinct_bytes() if nbytes is None else nbytes) // size(first) + 1
    return [first, *(one(i) for i in range(1, max(2, count)))]


def dense_turns(name: str, x: jax.Array, weights: list[jax.Array]) -> Turns:
    """Rows times matrices as numbers; on a GPU by cuBLAS."""
    made = Turns(functools.partial(base.einsum, "bi,oi->bo"), x.astype(name), weights, CUBLAS)
    made.compile()
    made.begin()
    return made


def whole(x: jax.Array, w: tuple[Any, ...], kind: Kind) -> jax.Array:
    """The matrix dequantised at once, in x's dtype, and a dot."""
    codes, scale, *zero = w
    dense = reference.dense(codes, scale, zero[0] if zero else None, kind=kind.kind, group_size=kind.group_size)
    return jnp.einsum("mk,nk->mn", x, dense.astype(x.dtype))


@functools.partial(jax.jit, static_argnums=1)
def exact_matrix(w: tuple[Any, ...], kind: Kind) -> jax.Array:
    """float32."""
    codes, scale, *zero = w
    return reference.dense(codes, scale, zero[0] if zero else None, kind=kind.kind, group_size=kind.group_size)


@jax.jit
def exact(x: jax.Array, dense: jax.Array) -> jax.Array:
    """What the reference gives; one program for all kinds."""
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), dense, precision="highest").astype(x.dtype)


@jax.jit
def _apart(found: jax.Array, meant: jax.Array) -> jax.Array:
    a, b = found.astype(jnp.float32), meant.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def off(found: jax.Array, meant: jax.Array, K: int) -> float:
    """How far results are from the reference's, in times of what rounding allows: what is fast and wrong is to stand in no
    table.

    The root of the sum of squared differences, of random numbers: a weight and a result rounded to the result's dtype, each to
    half an epsilon at most, and float32 sums of K products; twice of all that.
    """
    allowed = 2 * float(jnp.finfo(meant.dtype).eps) + 2.0**-24 * K**0.5
    found_off = float(_apart(found, meant)) / allowed
    return found_off if math.isfinite(found_off) else 1e30  # JSON has no infinity


def alike(found: jax.Array, meant: jax.Array, K: int) -> bool:
    """Whether results are the reference's but for rounding."""
    return off(found, meant, K) <= 1


def names_for(kind: Kind, names: Sequence[str] | None) -> list[str]:
    """Implementations to ask for: where nothing is said all of them on a GPU, and elsewhere the one that serves. The plain
    unpack where it is another than the packed one: of four bits."""
    asked = names if names is not None else GPU_NAMES if on_gpu() else ("xla",)
    return [n for n in asked if n != "triton_plain" or layout.BITS[kind.kind] == 4]


def made_ready(
    kind: Kind, x: jax.Array, weights: list[tuple[Any, ...]], dense: jax.Array, names: Sequence[str] | None
) -> tuple[dict[str, Turns], dict[str, float], dict[str, str], str, frozenset[str]]:
    """(by implementation those that serve and have the reference's numbers, which are wrong, left out, unchecked, failed: see
    `Found`); traced one by one, and compiled at the same time. dense: the matrix of the last product, in float32."""

    def product_by(name: str) -> Callable[[jax.Array, Any], jax.Array]:
        if name == WHOLE:
            return functools.partial(whole, kind=kind)
        product = functools.partial(
            quant_matmul, kind=kind.kind, group_size=kind.group_size, dtype=x.dtype, implementation=name
        )
        return lambda x, w: product(x, *w)

    def say(name: str, what: object, style: str | None = None) -> None:
        told = f"{kind}, {len(x)} rows, {name}: {what}"
        Console(stderr=True).print(told, style=style, highlight=False, markup=False)

    traced: dict[str, Turns] = {}
    ready: dict[str, Turns] = {}
    wrong: dict[str, float] = {}
    left_out: dict[str, str] = {}
    failed: set[str] = set()

    def give_up(name: str, e: Exception) -> None:
        left_out[name] = reason(e)
        failed.update(() if isinstance(e, dispatch.Refused) else (name,))
        say(name, left_out[name], None if isinstance(e, dispatch.Refused) else "red")

    # whatever goes wrong in one, and kernels go wrong in many ways, the others are measured
    for name in names_for(kind, names):
        try:
            traced[name] = Turns(product_by(name), x, weights)
        except Exception as e:
            give_up(name, e)
    try:
        meant, unchecked = exact(x, dense).block_until_ready(), ""
    except Exception as e:
        meant, unchecked = None, f"the reference, against which numbers are held, did not run: {reason(e)}"
        say("reference", f"{unchecked}; nothing of this is written to a table", "red")
    # XLA's forms try products on the card while they are compiled, which is not to be two at a time
    with ThreadPoolExecutor(max(1, len(traced))) as pool, ThreadPoolExecutor(1) as alone:
        finished = {n: (alone if n in XLA else pool).submit(turns.compile) for n, turns in traced.items()}
    for name, turns in traced.items():
        try:
            finished[name].result()
            gave = turns.begin()
        except Exception as e:
            give_up(name, e)
            continue
        if meant is not None and (far := off(gave, meant, x.shape[1])) > 1:
            wrong[name] = far
            say(name, f"other numbers than the reference's, by {far:.3g} of the bound; left out", "red")
        else:
            ready[name] = turns
    return ready, wrong, left_out, unchecked, frozenset(failed)


def probe(name: str, seconds: float = PROBE_SECONDS) -> str:
    """Why this implementation is not to be tried in this process: '' where some small products with it came back in another."""
    # this process has most of the card's memory
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    asked = [sys.executable, str(Path(__file__).resolve()), "--probe", name]
    try:
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"its first calls, in a process of their own, did not come back within {seconds:g} s"
    if not done.returncode:
        return ""
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was said")
    return f"its first calls ended a process of their own with {done.returncode}: {last[:200]}"


def probed(name: str) -> None:
    """Products by it, of which nothing is kept: whether they end is what is asked."""
    kinds = [Kind.usual(n) for n in ("int4", "int8", "fp8")]
    for _ in measured([(kinds, PROBE_ROWS)], [(1024, 4096)], 1, jnp.dtype(jnp.bfloat16), 1.0, (), [name], 0):
        pass


def reason(e: Exception) -> str:
    said = next(iter(str(e).splitlines()), "")[:300]
    return said if isinstance(e, dispatch.Refused) else f"{type(e).__name__}: {said}"


def measured(
    groups: Sequence[tuple[Sequence[Kind], Sequence[int]]],
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    dtype: Any,
    limit: float,
    beside: Sequence[str] = DENSE,
    names: Sequence[str] | None = None,
    nbytes: int | None = None,
) -> Iterator[tuple[Kind, dict[str, Any] | None, Found]]:
    """For each shape, and of each group its kinds with each of its numbers of rows: the kind, the row of a card's table (None
    where there is none), and what each implementation takes. beside: dtypes of dense matrices. names: what is asked for
    (`names_for`). nbytes: of all matrices of a turn (`some`)."""
    for N, K in shapes:
        stored = {name: some(functools.partial(dense_matrix, name, N, K), nbytes) for name in beside}
        xs: dict[int, jax.Array] = {}
        dense: dict[int, dict[str, Turns]] = {}
        for kinds, rows in groups:
            for kind in kinds:
                weights = some(functools.partial(matrix, kind, N, K), nbytes)
                last = exact_matrix(weights[-1] if on_gpu() else weights[0], kind)
                for M in rows:
                    if M not in xs:
                        xs[M] = jax.random.normal(jax.random.key(1), (M, K), dtype)
                        dense[M] = {name: dense_turns(name, xs[M], w) for name, w in stored.items()}
                    ready, wrong, left_out, unchecked, failed = made_ready(kind, xs[M], weights, last, names)
                    of_all, of_dense = compared(str(kind), (N, K), xs[M], dense[M], ready, rounds, limit)
                    found = Found(of_all, of_dense, wrong, left_out, unchecked, failed, (N, K), M)
                    yield kind, table_row(kind, xs[M], weights[0], found), found


def table_row(kind: Kind, x: jax.Array, weight: tuple[Any, ...], found: Found) -> dict[str, Any] | None:
    """A row of the card's table: what each implementation that served took; None where none did, or numbers were held against
    nothing."""
    times = {r.implementation: r.ms for r in found.rows if r.implementation in NAMES}
    if found.unchecked or not times:
        return None
    codes, _, *zero = weight
    told = case(x, codes, zero[0] if zero else None, kind.kind, kind.group_size)
    return {"op": "quant_matmul", **told, "milliseconds": times}


def compared(
    kind: str,
    shape: tuple[int, int],
    x: jax.Array,
    dense: dict[str, Turns],
    coded: dict[str, Turns],
    rounds: int,
    limit: float,
) -> tuple[list[Row], dict[str, float]]:
    """All take turns, round by round; gives rows, and milliseconds of the dense ones."""
    turns = {**dense, **coded}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn.time())
    median = {name: statistics.median(t) for name, t in times.items()}
    fastest = min((n for n in coded if n in NAMES), key=lambda n: median[n], default=None)
    found = []
    for name, turn in coded.items():
        t = median[name]
        rate, of_xla = size(turn.matrices[0]) / t, [median[n] for n in XLA if n in coded and n != name]
        to_float32, to_bfloat16 = (median[n] / t if n in dense else None for n in DENSE)
        row = Row(
            kind, shape, len(x), name, 1e3 * t, rate / 1e9, rate / limit, to_float32, to_bfloat16,
            min(of_xla) / t if of_xla else None, name == fastest, {}, {},
        )  # fmt: skip
        if row.serves:
            aims = {of: a for of, a in aims_of(kind, shape, len(x)).items() if getattr(row, of) is not None}
            row = row._replace(aims=aims, reached={of: getattr(row, of) >= a for of, a in aims.items()})
        found.append(row)
    return found, {name: 1e3 * median[name] for name in dense}


# --- what the compiler makes of the kernels, without a card ---------------------------------------------------------------

GENERATIONS = ("A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090")  # sm_80, 86, 89, 90, 100, 120
COMPILED_KINDS = (*(Kind.usual(n) for n in ("int4", "int8", "nf4", "fp8", "mxfp4", "fp8_block")), *OTHERS)


class Compiled(NamedTuple):
    """A kernel as it is compiled for a card. Bytes of a block (limit: the card's most), registers and bytes of stack of a thread,
    SASS instructions in a turn of the loop for each weight (None where nvdisasm is missing)."""

    what: str
    shape: tuple[int, int]
    rows: int
    implementation: str
    card: str
    tile: tuple[int, int, int]
    warps: int
    stages: int
    splits: int
    registers: int
    stack: int
    shared_memory: int
    limit: int
    instructions: float | None


def abstract(kind: Kind, M: int, N: int, K: int, dtype: Any) -> tuple[Any, ...]:
    """Rows, codes, scales and, if any, zeros."""
    return jax.ShapeDtypeStruct((M, K), dtype), *jax.eval_shape(functools.partial(matrix, kind, N, K, 0))


def compile_for(
    card: str, kind: Kind, M: int, N: int, K: int, dtype: Any = jnp.bfloat16, implementation: str = "triton"
) -> tuple[Any, disassembly.Kernel, Config]:
    """The program, its kernel, and the tiles."""
    product = functools.partial(
        quant_matmul, kind=kind.kind, group_size=kind.group_size, dtype=dtype, implementation=implementation
    )
    with aot.target(aot.CARDS[card]) as target:
        given = target.place(abstract(kind, M, N, K, dtype))
        compiled = target.compile(jax.jit(lambda x, *w: product(x, *w)), *given)
        gpu = dispatch.gpu()
    assert gpu is not None
    assert gpu.capability == aot.CARDS[card].capability
    how: Any = {"bfloat16": jnp.dtype(dtype) == jnp.bfloat16, "affine": kind.affine}
    tiles = config(M, N, K, kind.kind, kind.group_size, gpu, **how)
    [kernel] = (k for k in disassembly.kernels(compiled) if k.name.startswith(("quant_matmul", "pallas_call")))
    return compiled, kernel, tiles


def instructions_per_weight(kernel: disassembly.Kernel, tiles: Config, kind: Kind) -> float:
    """Of one thread, times threads, for each weight of a turn of the loop."""
    loop = disassembly.innermost_loop(disassembly.instructions(kernel))
    if not disassembly.matrix_instructions(loop):
        raise ValueError(
            f"{kernel.name}: its loop has no product on the tensor cores: {dict(disassembly.counts(loop))}"
        )
    weights = tiles.block_n * tiles.columns * tiles.unroll * (4 if layout.BITS[kind.kind] == 4 else 1)
    return len(loop) * kernel.threads / weights


def compiled_row(card: str, kind: Kind, M: int, N: int, K: int, implementation: str = "triton") -> Compiled:
    _, kernel, tiles = compile_for(card, kind, M, N, K, implementation=implementation)
    return Compiled(
        str(kind), (N, K), M, implementation, card, (tiles.block_m, tiles.block_n, tiles.columns), tiles.warps, tiles.stages,
        tiles.splits, kernel.registers, kernel.stack, kernel.shared_memory, aot.CARDS[card].limits.shared_memory_block,
        instructions_per_weight(kernel, tiles, kind) if disassembly.missing() is None else None,
    )  # fmt: skip


def compiled_rows(kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> Iterator[Compiled]:
    """Each on every generation of cards, packed and, of four bits, plain."""
    for kind in kinds:
        for M in rows:
            for N, K in shapes:
                for name in names_for(kind, ("triton", "triton_plain")):
                    for card in GENERATIONS:
                        yield compiled_row(card, kind, M, N, K, name)


def compiled_table(kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> Iterator[Compiled]:
    """Prints them as Markdown, a line for each kind, number of rows, shape and unpack, as soon as it is known."""
    print(f"jax {jax.__version__}; registers, shared memory (stack, where there is any): instructions a weight\n")
    print(f"| kind | rows | shape | by | {' | '.join(GENERATIONS)} |")
    print(f"|---|---|---|---|{'---|' * len(GENERATIONS)}")
    every = compiled_rows(kinds, shapes, rows)
    while line := list(itertools.islice(every, len(GENERATIONS))):
        cells = []
        for c in line:
            spilt = f" ({c.stack})" if c.stack else ""
            counted = "" if c.instructions is None else f": {c.instructions:.2f}"
            cells.append(f"{c.registers}, {c.shared_memory}{spilt}{counted}")
        c = line[0]
        print(
            f"| {c.what} | {c.rows} | {c.shape[0]}x{c.shape[1]} | {c.implementation} | {' | '.join(cells)} |",
            flush=True,
        )
        yield from line


# --- a whole model, from a file that llama.cpp reads too -----------------------------------------------------------------

PROMPT, NEW = 128, 64  # of NEW the first is prefill's
GGUF = {
    "embedding": "token_embd", "final_norm": "output_norm", "lm_head": "output", "input_norm": "attn_norm",
    "mlp_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate",
    "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def q8_0(w: np.ndarray) -> np.ndarray:
    """ggml's blocks of 32 int8: each row's bytes."""
    groups = w.reshape(-1, 32)
    d = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.round(groups / np.maximum(d.astype(np.float32), 1e-30)).astype(np.int8)
    return np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=1)


def q4_0(w: np.ndarray) -> np.ndarray:
    """ggml's blocks of 32 codes of 4 bits: the number of largest magnitude becomes the first code."""
    groups = w.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    d = (largest / -8).astype(np.float16)
    wide = d.astype(np.float32)
    codes = np.clip(np.round(np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0) + 8), 0, 15)
    codes = codes.astype(np.uint8)
    return np.concatenate([d.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)


# {type: (its number, what makes its bytes)}
TYPES: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": (0, lambda w: w), "Q8_0": (8, q8_0), "Q4_0": (2, q4_0),
}  # fmt: skip


def write_gguf(path: Path, shape: Mapping[str, Any], params: Mapping[str, Any], kind: str) -> None:
    """A Llama as a GGUF file, its matrices all of one type; without words, which a benchmark does not need."""

    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    def entry(key: str, value: Any) -> bytes:
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        return text(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))

    heads, rope = shape["num_attention_heads"], dict(architecture(shape).config.rope)
    fields = {
        "general.architecture": "llama", "general.name": f"random {kind}", "tokenizer.ggml.model": "none",
        "llama.block_count": shape["num_hidden_layers"], "llama.context_length": shape["max_position_embeddings"],
        "llama.embedding_length": shape["hidden_size"], "llama.feed_forward_length": shape["intermediate_size"],
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": shape.get("num_key_value_heads", heads),
        "llama.attention.layer_norm_rms_epsilon": float(shape["rms_norm_eps"]),
        "llama.rope.freq_base": float(rope["rope_theta"]),
        "llama.rope.dimension_count": shape["hidden_size"] // heads, "llama.vocab_size": shape["vocab_size"],
    }  # fmt: skip
    head, specs = b"", architecture(shape).specs()
    at, made = 0, []
    for name, array in params.items():
        spec, (*layer, last) = specs[name], name.split(".")
        rows = np.asarray(array, np.float32)
        if spec.out is not None:
            rows = rows.reshape(int(np.prod(spec.shape[: spec.out])), -1)
        number, pack = TYPES[kind if spec.out is not None else "F32"]
        theirs = (f"blk.{layer[1]}." if layer else "") + GGUF[last] + ".weight"
        head += text(theirs) + struct.pack(f"<I{rows.ndim}QIQ", rows.ndim, *reversed(rows.shape), number, at)
        made.append(np.ascontiguousarray(pack(rows)).tobytes())
        at += len(made[-1]) + -len(made[-1]) % 32
    start = b"GGUF" + struct.pack("<IQQ", 3, len(params), len(fields))
    start += b"".join(entry(k, v) for k, v in fields.items()) + head
    with path.open("wb") as file:
        for part in (start, *made):
            file.write(part + b"\0" * (-len(part) % 32))


def program(peer: str) -> str:
    """Where the peer is; UsageError where it is not."""
    found = shutil.which(peer)
    if found is None:
        raise click.BadParameter(
            f"{peer!r} is no program here: give the path of llama.cpp's llama-bench, or put it on the PATH (built from"
            f" its sources: cmake -B build && cmake --build build --target llama-bench)",
            param_hint="--peer",
        )
    return found


def of_peer(command: str, path: Path) -> float:
    """Tokens/s that llama-bench decodes from a file, one round."""
    given = ["-m", str(path), "-p", "0", "-n", str(NEW - 1), "-d", str(PROMPT), "-r", "1", "-ngl", "0"]
    done = subprocess.run(
        [command, *given, "-t", str(os.cpu_count() or 1), "-o", "json"], capture_output=True, text=True, check=False
    )
    try:
        [row] = json.loads(done.stdout)
        return float(row["avg_ts"])
    except (ValueError, KeyError):
        said = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise click.ClickException(
            f"{command} ended with {done.returncode} and no result:\n" + "\n".join(said)
        ) from None


def decoded(shape: dict[str, Any], peer: str | None, rounds: int, file: Path | None) -> None:
    """Print decode from each file, on each side."""
    if shape.get("model_type") != "llama":
        raise click.BadParameter(
            f"model_type is {shape.get('model_type')!r}; files are written of a llama", param_hint="--config"
        )
    if (kind := dict(architecture(shape).config.rope).get("rope_type", "default")) != "default":
        raise click.BadParameter(
            f"rope_type is {kind!r}; files are written of the default one alone", param_hint="--config"
        )
    command, limit = None if peer is None else program(peer), bandwidth()
    params, rows = initialise(architecture(shape), 0), []
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.gguf" for kind in TYPES}
        for kind, path in paths.items():
            write_gguf(path, shape, params, kind)
        del params
        sides: dict[str, Ours] = {}
        read: dict[str, int] = {}
        for kind, path in paths.items():
            model = jaxengine.load(path, dtype="float32")
            specs = model.architecture.specs()
            # of the embedding one row is read
            read[kind] = sum(parameter_bytes(model.plan, n, s) for n, s in specs.items() if n != "embedding")
            sides[kind] = Ours(model, 1, PROMPT, NEW)
            sides[kind].round()  # compiles
        times: dict[tuple[str, str], list[float]] = {}
        for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
            for kind, side in sides.items():
                times.setdefault(("jaxengine", kind), []).append((NEW - 1) / side.round()[1])
                if command is not None:
                    times.setdefault(("llama.cpp", kind), []).append(of_peer(command, paths[kind]))
    rate = {which: statistics.median(found) for which, found in times.items()}
    machine = f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    table = Table(
        "file", "by", "tokens/s", "MB a token", "GB/s", "of memory", "to float32", "to llama.cpp",
        title=f"decode, batch 1; {machine}, {limit / 1e9:.1f} GB/s read",
    )  # fmt: skip
    for (side, kind), tokens in rate.items():
        own = rate[side, "F32"]
        other = rate.get(("llama.cpp", kind)) if side == "jaxengine" else None
        # what the peer keeps of a file in memory is its own affair: bytes are of our side
        rows.append({
            "machine": machine, "file": kind, "by": side, "tokens_per_s": tokens, "to_float32": tokens / own,
            "bytes_per_token": read[kind] if side == "jaxengine" else None,
            "to_llama.cpp": None if other is None else tokens / other, "memory_GBs": limit / 1e9,
        })  # fmt: skip
        size = rows[-1]["bytes_per_token"]
        bytes_of = ("", "", "") if size is None else (
            f"{size / 1e6:.0f}", f"{size * tokens / 1e9:.1f}", f"{size * tokens / limit:.2f}"
        )  # fmt: skip
        table.add_row(
            kind,
            side,
            f"{tokens:.1f}",
            *bytes_of,
            f"{tokens / own:.2f}",
            "" if other is None else f"{tokens / other:.2f}",
        )
    Console().print(table)
    if file is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@click.command(**SETTINGS)
@click.option("--kind", type=click.Choice(layout.KINDS), multiple=True, show_default="all", help="Kinds of codes.")
@click.option(
    "--group-size",
    metavar="G",
    type=click.IntRange(16),
    show_default="each kind's own",
    help="Inputs that share a scale.",
)
@click.option("--affine", is_flag=True, help="With a zero for each group.")
@click.option(
    "--rows",
    metavar="M",
    type=click.IntRange(1),
    multiple=True,
    show_default="1, 4, 16, 64, 256; GPU: 4096 too; --table: and 1024",
)
@click.option(
    "--shape",
    metavar="NxK",
    multiple=True,
    show_default=f"{', '.join(CPU_SHAPES)}; GPU: {', '.join(GPU_SHAPES)}",
    help="Outputs and inputs; multiples of 128.",
)
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=5, help="Rounds, whose medians are printed.")
@click.option("--dtype", metavar="DTYPE", show_default="float32; GPU: bfloat16", help="Of the rows.")
@click.option("--table", is_flag=True, help="On a GPU: keep the times as this card's table, which decides what serves.")
@click.option(
    "--compiled",
    is_flag=True,
    help="The kernels as they are compiled for six cards, without one, instead of their speed.",
)
@click.option("--decode", is_flag=True, help="Tokens/s of a whole model from GGUF files, instead of single products.")
@click.option(
    "--peer", metavar="PROGRAM", help="With --decode: llama.cpp's llama-bench, by its path or its name on the PATH."
)
@click.option(
    "--config",
    type=A_FILE,
    metavar="FILE",
    show_default="a Llama of 125 M parameters",
    help="With --decode: a Llama's config.json to take the shapes from.",
)
@click.option("--json", "file", metavar="FILE", type=click.Path(path_type=Path), help="Results, a line each.")
@click.option("--probe", "tried", type=click.Choice(GPU_NAMES), hidden=True)
@reported()
def main(
    kind: tuple[str, ...],
    group_size: int | None,
    affine: bool,
    rows: tuple[int, ...],
    shape: tuple[str, ...],
    rounds: int,
    dtype: str | None,
    table: bool,
    compiled: bool,
    decode: bool,
    peer: str | None,
    config: Path | None,
    file: Path | None,
    tried: str | None,
) -> None:
    """Speed of rows times quantised matrices, beside dense ones, on this machine; with --decode of a whole model, beside
    llama.cpp."""
    if tried is not None:
        probed(tried)
        return
    if (peer is not None or config is not None) and not decode:
        raise click.UsageError(f"{'--config' if peer is None else '--peer'} is of a whole model: say --decode too")
    if decode:
        ours = {
            f"--{n.replace('_', '-')}": n
            for n in ("kind", "group_size", "affine", "rows", "shape", "dtype", "table", "compiled")
        }
        context = click.get_current_context()
        if odd := [n for n, p in ours.items() if context.get_parameter_source(p) is ParameterSource.COMMANDLINE]:
            raise click.UsageError(f"{odd[0]} is of single products: leave it out with --decode")
        decoded(SHAPE_125M if config is None else json.loads(config.read_text()), peer, rounds, file)
        return
    if compiled and (table or dtype is not None):
        raise click.UsageError(f"{'--table' if table else '--dtype'} is of speed: leave it out with --compiled")
    if compiled and (said := aot.missing()):
        raise click.UsageError(f"--compiled: {said}")
    shapes = [parsed(s) for s in shape or (GPU_SHAPES if on_gpu() or compiled else CPU_SHAPES)]
    if group_size is not None and (group_size % 16 or any(K % group_size for _, K in shapes)):
        raise click.BadParameter(
            f"{group_size} is no multiple of 16 that divides the inputs, {', '.join(str(K) for _, K in shapes)}; 32, 64 and"
            f" 128 always do",
            param_hint="--group-size",
        )
    if table and not on_gpu():
        raise click.UsageError("--table is of a GPU, and there is none: on a CPU 'xla' serves every call")
    if compiled:
        those = chosen(kind, group_size, affine, OTHERS) if kind else list(COMPILED_KINDS)
        if without := [str(k) for k in those if k.kind not in CODES]:
            raise click.UsageError(
                f"--compiled: there is no kernel of {', '.join(without)}; there are {', '.join(CODES)}"
            )
        told = ""
        for c in compiled_table(those, shapes, rows or (1, 16, 64)):
            told += json.dumps(c._asdict()) + "\n"
            if file is not None:  # after each: a long run may be stopped
                file.write_text(told)
        return
    kinds = chosen(kind, group_size, affine, OTHERS if table else ())
    Ms = list(rows or (TABLE_ROWS if table else (1, 4, 16, 64, 256) + ((4096,) if on_gpu() else ())))
    limit = bandwidth()
    device = jax.devices()[0]
    machine = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {limit / 1e9:.1f} GB/s read"
    found: list[Row] = []
    kept: Path | None = None
    dropped: list[str] = []
    absent: list[dict[str, Any]] = []
    names = None
    card = dispatch.gpu()
    if on_gpu() and card is not None and card.capability == (9, 0) and (said := probe(PROBED)):  # others it refuses
        names = [n for n in GPU_NAMES if n != PROBED]
        absent.append({"what": "all", "shape": None, "rows": None, "implementation": PROBED, "left_out": said})
    dtype = dtype or ("bfloat16" if on_gpu() else "float32")
    every = measured([(kinds, Ms)], shapes, rounds, jnp.dtype(dtype), limit, names=names)
    progress = track(every, "measuring", len(shapes) * len(Ms) * len(kinds), console=Console(stderr=True))
    for of, row, one in progress:
        found += one.rows
        absent += (
            {"what": str(of), "shape": one.shape, "rows": one.M, "implementation": n, "left_out": said}
            for n, said in one.absent().items()
        )
        if table and row is not None:  # after each: a long run may be stopped
            kept = dispatch.write_table(device.device_kind, [row])
        elif table:
            dropped.append(f"{of}: {one.unchecked or 'nothing served'}")
    console = Console()
    # in a file or a pipe its columns would be cut to those of a terminal of 80
    (console if console.is_terminal else Console(width=200)).print(tabulated(found, machine, absent))
    if kept is not None:
        print(f"wrote {kept}")
    if file is not None:
        file.write_text(
            "".join(json.dumps({"machine": machine, **r}) + "\n" for r in [*map(Row._asdict, found), *absent])
        )
    if dropped:
        raise click.ClickException(f"not written to the table: {'; '.join(dropped)}")


def tabulated(found: list[Row], machine: str, absent: Sequence[Mapping[str, Any]] = ()) -> Table:
    """What has something to say, a row a measurement, and a row for each that should have been one."""
    columns: dict[str, Callable[[Row], Any]] = {
        "kind": lambda r: r.what, "shape": lambda r: "{}x{}".format(*r.shape), "rows": lambda r: str(r.rows),
        "by": lambda r: r.implementation, "ms": lambda r: f"{r.ms:.3f}", "GB/s": lambda r: f"{r.gigabytes:.1f}",
        "of memory": lambda r: f"{r.fraction:.2f}", "to float32": lambda r: r.to_float32 and f"{r.to_float32:.2f}",
        "to bfloat16": lambda r: r.to_bfloat16 and f"{r.to_bfloat16:.2f}", "to xla": lambda r: r.to_xla and f"{r.to_xla:.2f}",
        "aims": lambda r: ", ".join(f"{a:g} {of}".replace("_", " ") for of, a in r.aims.items()),
        "reached": lambda r: ", ".join("yes" if r.reached[of] else "no" for of in r.aims),
    }  # fmt: skip
    told = {name: value for name, value in columns.items() if any(value(r) for r in found)}
    table = Table(*(told or list(columns)[:4]), *(["left out"] if absent else []), title=machine)
    for r in found:
        table.add_row(*(value(r) or "" for value in told.values()))
    for a in absent:
        case = a["what"], "x".join(map(str, a["shape"] or ())), str(a["rows"] or ""), a["implementation"]
        table.add_row(*case, *("" for _ in list(told)[4:]), a["left_out"])
    return table


def chosen(names: tuple[str, ...], group_size: int | None, affine: bool, others: tuple[Kind, ...]) -> list[Kind]:
    """The kinds to measure; UsageError for groups or zeros that one of those named cannot have."""
    kinds = [Kind.usual(n) for n in names or layout.KINDS]
    if group_size is None and not affine:
        return [*kinds, *(o for o in others if not names or o.kind in names)]
    option = "--affine" if group_size is None else "--group-size"
    if not names:
        raise click.UsageError(f"{option} is of some kinds only: say which with --kind")
    for kind in kinds:
        if affine and kind.kind not in layout.MIDDLE:
            raise click.UsageError(f"--affine: {kind.kind} has no zeros; {', '.join(layout.MIDDLE)} have")
        if group_size is not None and kind.kind in layout.FLOATS:
            free = ", ".join(n for n in GROUPS if n not in layout.FLOATS)
            raise click.UsageError(f"--group-size: {kind.kind} has no other groups; {free} have")
    return [Kind(k.kind, k.group_size if group_size is None else group_size, affine) for k in kinds]


def parsed(shape: str) -> tuple[int, int]:
    """NxK as two numbers."""
    N, _, K = shape.partition("x")
    if not (N.isdigit() and K.isdigit() and int(N) > 0 and int(K) % 128 == 0 and int(K) > 0):
        raise click.BadParameter(
            f"{shape!r} is no NxK with K a multiple of 128, as 4096x14336 is", param_hint="--shape"
        )
    return int(N), int(K)


if __name__ == "__main__":
    start_jax()
    main()
