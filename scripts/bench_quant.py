"""Speed of rows times a quantised matrix, beside the same matrix in float32 or bfloat16, in one run.

    python scripts/bench_quant.py                          every kind, 4096 x 4096 and 14336 x 4096
    python scripts/bench_quant.py --kind int4 --rows 1     one of them
    python scripts/bench_quant.py --json FILE              a row of results a line

A few rows are bounded by the bytes of codes and scales: GB/s of those is reported, and its fraction of the memory
bandwidth that is measured in the same run. `to float32` and `to bfloat16` are a dense matrix's time over this one's: above 1 the
codes are faster. Every call takes another matrix than the last, of enough to exceed four times the last-level cache;
implementations take turns, round by round, and medians are compared. On a GPU every implementation that serves is
measured, and a program is one pass over all matrices, so that launches from Python do not count.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.weights import base
from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import layout, quant_matmul

GROUPS = {"int8": 0, "int4": 128, "int3": 128, "int2": 64, "nf4": 64, "mxfp4": 32, "fp8": 0, "fp8_block": layout.BLOCK}
CPU_BYTES = 160 << 20  # of matrices, in turn: four times the last-level cache of most
GPU_BYTES = 4 * (64 << 20)  # four times the largest L2


class Row(NamedTuple):
    """One measurement, as it is printed and stored."""

    what: str
    shape: tuple[int, int]
    rows: int
    implementation: str
    ms: float
    gigabytes: float
    fraction: float
    to_float32: float
    to_bfloat16: float


def matrices(kind: str, N: int, K: int, count: int) -> list[tuple[Any, jax.Array]]:
    """Random codes and scales of a kind."""
    rng, G = np.random.default_rng(0), GROUPS[kind]

    def words(per: int) -> jax.Array:
        return jnp.asarray(rng.integers(0, 1 << 16, (N, K // per), np.uint16))

    def one() -> tuple[Any, jax.Array]:
        scale = jnp.asarray(rng.uniform(0.5, 1, (N, K // G) if G else (N,)), jnp.float32) / 100
        if kind == "int8":
            return jnp.asarray(rng.integers(-127, 128, (N, K), np.int8)), scale
        if kind in layout.FLOATS:
            codes = rng.integers(0, 127, (N, K), np.uint8) | rng.integers(0, 2, (N, K), np.uint8) << 7  # never a NaN
            codes = lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
            return codes, scale if kind == "fp8" else scale[: -(-N // G)]
        if kind == "mxfp4":
            return words(4), jnp.asarray(rng.integers(118, 122, (N, K // G), np.uint8))
        if kind == "int3":
            return (words(8), words(16)), scale.astype(jnp.bfloat16)
        return words(8 if kind == "int2" else 4), scale if kind == "nf4" else scale.astype(jnp.bfloat16)

    return [one() for _ in range(count)]


def size(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes/s of reading 1 GiB (CPU: 512 MiB), the best of a row maximum, a sum and a matrix times a vector."""
    x = jnp.ones((2**15, 2**13 if on_gpu() else 2**12), jnp.float32)
    v = jnp.ones((x.shape[1],), jnp.float32)
    reads = [jax.jit(lambda x: x.max(-1)), jax.jit(lambda x: x.sum()), jax.jit(lambda x: x @ v)]
    for read in reads:
        read(x).block_until_ready()
    return x.nbytes / min(seconds(functools.partial(read, x)) for _ in range(7) for read in reads)


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class Turns:
    """One product for each of several matrices; `time` is that of one product."""

    def __init__(self, product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, all_of_them: list[Any]):
        self.x, self.matrices = x, all_of_them

        def chained(x: jax.Array, matrices: list[Any]) -> jax.Array:
            y = None
            for w in matrices:
                x, y = lax.optimization_barrier((x, product(x, w)))
            assert y is not None
            return y

        self.run = jax.jit(chained)
        self.each = [all_of_them] if on_gpu() else [[w] for w in all_of_them]
        self.run(x, self.each[0]).block_until_ready()

    def time(self) -> float:
        return statistics.median(seconds(lambda g=g: self.run(self.x, g)) for g in self.each) / len(self.each[0])


def some(make: Callable[[int], list[Any]]) -> list[Any]:
    """As many as do not fit the caches."""
    return make(max(2, -(-(GPU_BYTES if on_gpu() else CPU_BYTES) // size(make(1)))))


def dense_matrices(dtype: Any, N: int, K: int) -> list[jax.Array]:
    return some(lambda n: [0.01 * jax.random.normal(jax.random.key(i), (N, K), dtype) for i in range(n)])


def coded_turns(kind: str, x: jax.Array, weights: list[Any]) -> dict[str, Turns]:
    """By implementation: on a GPU all that serve this call."""
    found = {}
    for implementation in ("triton", "xla") if on_gpu() else ("xla",):
        product = functools.partial(
            quant_matmul, kind=kind, group_size=GROUPS[kind], dtype=x.dtype, implementation=implementation
        )
        try:
            found[implementation] = Turns(lambda x, w, product=product: product(x, *w), x, weights)
        except dispatch.Refused as e:
            Console(stderr=True).print(f"{kind}, {len(x)} rows, {implementation}: {e}")
    return found


def measured(
    kinds: list[str], shapes: list[tuple[int, int]], rows: list[int], rounds: int, dtype: Any, limit: float
) -> Iterator[list[Row]]:
    """For each shape, kind and number of rows: what each implementation takes."""
    for N, K in shapes:
        xs = [jax.random.normal(jax.random.key(1), (M, K), dtype) for M in rows]
        stored = {name: dense_matrices(name, N, K) for name in ("float32", "bfloat16")}
        dense = [
            {name: Turns(functools.partial(base.einsum, "bi,oi->bo"), x.astype(name), w) for name, w in stored.items()}
            for x in xs
        ]
        for kind in kinds:
            weights = some(functools.partial(matrices, kind, N, K))
            for x, beside in zip(xs, dense, strict=True):
                yield compared(kind, (N, K), x, beside, coded_turns(kind, x, weights), rounds, limit)


def compared(
    kind: str,
    shape: tuple[int, int],
    x: jax.Array,
    dense: dict[str, Turns],
    coded: dict[str, Turns],
    rounds: int,
    limit: float,
) -> list[Row]:
    """All take turns, round by round."""
    turns = {**dense, **coded}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn.time())
    median = {name: statistics.median(t) for name, t in times.items()}
    found = []
    for name, turn in coded.items():
        rate = size(turn.matrices[0]) / median[name]
        ratios = (median["float32"] / median[name], median["bfloat16"] / median[name])
        found.append(Row(kind, shape, len(x), name, 1e3 * median[name], rate / 1e9, rate / limit, *ratios))
    return found


@click.command(**SETTINGS)
@click.option("--kind", type=click.Choice(layout.KINDS), multiple=True, show_default="all", help="Kinds of codes.")
@click.option(
    "--rows", metavar="M", type=click.IntRange(1), multiple=True, show_default="1, 4, 16, 64, 256; GPU: 4096 too"
)
@click.option(
    "--shape",
    metavar="NxK",
    multiple=True,
    default=("4096x4096", "14336x4096"),
    help="Outputs and inputs; multiples of 128.",
)
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=5, help="Rounds, whose medians are printed.")
@click.option("--dtype", metavar="DTYPE", show_default="float32; GPU: bfloat16", help="Of the rows.")
@click.option("--json", "file", metavar="FILE", type=click.Path(path_type=Path), help="Results, a line each.")
@reported()
def main(
    kind: tuple[str, ...],
    rows: tuple[int, ...],
    shape: tuple[str, ...],
    rounds: int,
    dtype: str | None,
    file: Path | None,
) -> None:
    """Speed of rows times quantised matrices, beside dense ones, on this machine."""
    shapes = [parsed(s) for s in shape]
    kinds = list(kind or layout.KINDS)
    Ms = list(rows or (1, 4, 16, 64, 256) + ((4096,) if on_gpu() else ()))
    limit = bandwidth()
    device = jax.devices()[0]
    machine = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {limit / 1e9:.1f} GB/s read"
    table = Table("kind", "shape", "rows", "by", "ms", "GB/s", "of memory", "to float32", "to bfloat16", title=machine)
    found: list[Row] = []
    every = measured(kinds, shapes, Ms, rounds, jnp.dtype(dtype or ("bfloat16" if on_gpu() else "float32")), limit)
    for rows_of_one in track(every, "measuring", len(shapes) * len(Ms) * len(kinds), console=Console(stderr=True)):
        found += rows_of_one
    for r in found:
        N, K = r.shape
        numbers = (
            f"{r.ms:.3f}",
            f"{r.gigabytes:.1f}",
            f"{r.fraction:.2f}",
            f"{r.to_float32:.2f}",
            f"{r.to_bfloat16:.2f}",
        )
        table.add_row(r.what, f"{N}x{K}", str(r.rows), r.implementation, *numbers)
    Console().print(table)
    if file is not None:
        file.write_text("".join(json.dumps({"machine": machine, **r._asdict()}) + "\n" for r in found))


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
