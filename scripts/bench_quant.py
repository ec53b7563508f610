"""Speed of rows times a quantised matrix, beside the same matrix in float32 or bfloat16, in one run.

    python scripts/bench_quant.py                          every kind, shapes of models of 7B (on a GPU of 70B too)
    python scripts/bench_quant.py --kind int4 --rows 1     one of them
    python scripts/bench_quant.py --kind int4 --group-size 32 --affine    of other groups, with zeros
    python scripts/bench_quant.py --table                  on a GPU: what was fastest serves from now on
    python scripts/bench_quant.py --json FILE              a row of results a line
    python scripts/bench_quant.py --decode                 tokens/s of a whole model, from GGUF files
    python scripts/bench_quant.py --decode --peer PROGRAM  the same files in llama.cpp's llama-bench, in turns

A few rows are bounded by the bytes of codes and scales: GB/s of those is reported, and its fraction of the memory
bandwidth that is measured in the same run. `to float32` and `to bfloat16` are a dense matrix's time over this one's: above 1 the
codes are faster. Every call takes another matrix than the last, of enough to exceed four times the last-level cache;
implementations take turns, round by round, and medians are compared. On a GPU every implementation that serves is
measured, and a program is one pass over all matrices, so that launches from Python do not count. One whose results are not
the reference's is told, and left out.

Aims of an H200 are multiples of bfloat16's speed at 16 rows or fewer (int4: Marlin's on an A100, github.com/IST-DASLab/marlin).

With --table the times become the card's table, by which pallas_kernels/dispatch.py orders implementations from then on; all
kinds are measured, and beside them what checkpoints bring (OTHERS: groups of 32, zeros).

--decode: a random Llama of 125 M parameters is written as three GGUF files, F32, Q8_0 and Q4_0, all matrices of one type. Every
round decodes from each of them once, on each side: batch 1, 63 tokens after a prompt of 128, greedy. The peer is told the
same (`llama-bench -p 0 -n 63 -d 128`) with as many threads as there are cores.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import case, layout, quant_matmul

GROUPS = {
    "int8": 0, "int5": 64, "int4": 128, "int3": 128, "int2": 64, "nf4": 64, "mxfp4": 32, "fp8": 0, "fp8_block": layout.BLOCK,
}  # fmt: skip
CPU_BYTES = 160 << 20  # of matrices, in turn: four times the last-level cache of most
GPU_BYTES = 4 * (64 << 20)  # four times the largest L2
TABLE_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
CPU_SHAPES, GPU_SHAPES = ("4096x4096", "14336x4096"), ("4096x4096", "4096x14336", "8192x28672")
AIMS = {"int4": dict(zip(GPU_SHAPES, (1.4, 2.4, 3.0), strict=True)), "int8": dict.fromkeys(GPU_SHAPES, 1.7),
        "nf4": dict.fromkeys(GPU_SHAPES, 1.6)}  # fmt: skip


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
    aim: float | None  # of to_bfloat16


def aim(kind: str, shape: tuple[int, int], rows: int) -> float | None:
    """What a GPU is to reach of bfloat16's speed, where something is asked."""
    return AIMS.get(kind, {}).get("x".join(map(str, shape))) if on_gpu() and rows <= 16 else None


def matrices(kind: Kind, N: int, K: int, count: int) -> list[tuple[Any, ...]]:
    """Random codes and scales of a kind, and zeros where it has them."""
    rng, (name, G, affine) = np.random.default_rng(0), kind

    def words(per: int) -> jax.Array:
        return jnp.asarray(rng.integers(0, 1 << 16, (N, K // per), np.uint16))

    def one() -> tuple[Any, jax.Array]:
        scale = jnp.asarray(rng.uniform(0.5, 1, (N, K // G) if G else (N,)), jnp.float32) / 100
        if name == "int8":
            return jnp.asarray(rng.integers(-127, 128, (N, K), np.int8)), scale
        if name in layout.FLOATS:
            codes = rng.integers(0, 127, (N, K), np.uint8) | rng.integers(0, 2, (N, K), np.uint8) << 7  # never a NaN
            codes = lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
            return codes, scale if name == "fp8" else scale[: -(-N // G)]
        if name == "mxfp4":
            return words(4), jnp.asarray(rng.integers(118, 122, (N, K // G), np.uint8))
        if name in ("int5", "int3"):
            return (words(4 if name == "int5" else 8), words(16)), scale.astype(jnp.bfloat16)
        return words(8 if name == "int2" else 4), scale if name == "nf4" else scale.astype(jnp.bfloat16)

    def zeros() -> tuple[jax.Array, ...]:
        made = jnp.asarray(rng.integers(0, 2 ** layout.BITS[name], (N, K // G)) if affine else 0, jnp.float32)
        return (made.astype(jnp.bfloat16),) if affine else ()

    return [(*one(), *zeros()) for _ in range(count)]


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
    """One product for each of several matrices; `time` is that of one product, `gave` the first program's last result."""

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
        self.gave = self.run(x, self.each[0]).block_until_ready()

    def time(self) -> float:
        return statistics.median(seconds(lambda g=g: self.run(self.x, g)) for g in self.each) / len(self.each[0])


def some(make: Callable[[int], list[Any]]) -> list[Any]:
    """As many as do not fit the caches."""
    return make(max(2, -(-(GPU_BYTES if on_gpu() else CPU_BYTES) // size(make(1)))))


def dense_matrices(dtype: Any, N: int, K: int) -> list[jax.Array]:
    return some(lambda n: [0.01 * jax.random.normal(jax.random.key(i), (N, K), dtype) for i in range(n)])


def alike(found: jax.Array, meant: jax.Array, K: int) -> bool:
    """Whether results are the reference's but for rounding: what is fast and wrong is to stand in no table.

    The sum of squared differences, of random numbers: a weight and a result rounded to the result's dtype, each to half an
    epsilon at most, and float32 sums of K products; twice of all that.
    """
    a, b = (np.asarray(y, np.float64) for y in (found, meant))
    allowed = 2 * float(jnp.finfo(meant.dtype).eps) + 2.0**-24 * K**0.5
    return bool(np.linalg.norm(a - b) <= allowed * np.linalg.norm(b))


def coded_turns(kind: Kind, x: jax.Array, weights: list[tuple[Any, ...]]) -> dict[str, Turns]:
    """By implementation: on a GPU all that serve this call, and whose results are the reference's."""
    found: dict[str, Turns] = {}

    def product_by(name: str) -> Callable[[jax.Array, Any], jax.Array]:
        product = functools.partial(
            quant_matmul, kind=kind.kind, group_size=kind.group_size, dtype=x.dtype, implementation=name
        )
        return lambda x, w: product(x, *w)

    def say(name: str, what: object, style: str | None = None) -> None:
        Console(stderr=True).print(f"{kind}, {len(x)} rows, {name}: {what}", style=style)

    for name in ("triton", "mosaic_gpu", "xla") if on_gpu() else ("xla",):
        try:
            found[name] = Turns(product_by(name), x, weights)
        except dispatch.Refused as e:
            say(name, e)
        except (ValueError, RuntimeError, NotImplementedError) as e:  # the compiler's word: the others are measured
            say(name, str(e).splitlines()[0][:160], "red")
    for name, turns in list(found.items()):
        if not alike(turns.gave, jax.jit(product_by("reference"))(x, turns.each[0][-1]), x.shape[1]):
            say(name, "other numbers than the reference's; left out", "red")
            del found[name]
    return found


def measured(
    kinds: list[Kind], shapes: list[tuple[int, int]], rows: list[int], rounds: int, dtype: Any, limit: float
) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """For each shape, kind and number of rows: the row of a card's table, and what each implementation takes."""
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
                found = compared(str(kind), (N, K), x, beside, coded_turns(kind, x, weights), rounds, limit)
                yield table_row(kind, x, weights[0], found), found


def table_row(kind: Kind, x: jax.Array, weight: tuple[Any, ...], found: list[Row]) -> dict[str, Any]:
    """A row of the card's table: what each implementation that served took."""
    codes, _, *zero = weight
    told = case(x, codes, zero[0] if zero else None, kind.kind, kind.group_size)
    return {"op": "quant_matmul", **told, "milliseconds": {r.implementation: r.ms for r in found}}


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
        row = Row(
            kind, shape, len(x), name, 1e3 * median[name], rate / 1e9, rate / limit, *ratios, aim(kind, shape, len(x))
        )
        found.append(row)
    return found


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
    decode: bool,
    peer: str | None,
    config: Path | None,
    file: Path | None,
) -> None:
    """Speed of rows times quantised matrices, beside dense ones, on this machine; with --decode of a whole model, beside
    llama.cpp."""
    if (peer is not None or config is not None) and not decode:
        raise click.UsageError(f"{'--config' if peer is None else '--peer'} is of a whole model: say --decode too")
    if decode:
        ours = {
            f"--{n.replace('_', '-')}": n for n in ("kind", "group_size", "affine", "rows", "shape", "dtype", "table")
        }
        context = click.get_current_context()
        if odd := [n for n, p in ours.items() if context.get_parameter_source(p) is ParameterSource.COMMANDLINE]:
            raise click.UsageError(f"{odd[0]} is of single products: leave it out with --decode")
        decoded(SHAPE_125M if config is None else json.loads(config.read_text()), peer, rounds, file)
        return
    shapes = [parsed(s) for s in shape or (GPU_SHAPES if on_gpu() else CPU_SHAPES)]
    if group_size is not None and (group_size % 16 or any(K % group_size for _, K in shapes)):
        raise click.BadParameter(
            f"{group_size} is no multiple of 16 that divides the inputs, {', '.join(str(K) for _, K in shapes)}; 32, 64 and"
            f" 128 always do",
            param_hint="--group-size",
        )
    if table and not on_gpu():
        raise click.UsageError("--table is of a GPU, and there is none: on a CPU 'xla' serves every call")
    kinds = chosen(kind, group_size, affine, OTHERS if table else ())
    Ms = list(rows or (TABLE_ROWS if table else (1, 4, 16, 64, 256) + ((4096,) if on_gpu() else ())))
    limit = bandwidth()
    device = jax.devices()[0]
    machine = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {limit / 1e9:.1f} GB/s read"
    shown = Table("kind", "shape", "rows", "by", "ms", "GB/s", "of memory", "to float32", "to bfloat16", title=machine)
    if on_gpu():
        shown.add_column("aim")
    found: list[Row] = []
    kept: Path | None = None
    every = measured(kinds, shapes, Ms, rounds, jnp.dtype(dtype or ("bfloat16" if on_gpu() else "float32")), limit)
    for row, rows_of_one in track(every, "measuring", len(shapes) * len(Ms) * len(kinds), console=Console(stderr=True)):
        found += rows_of_one
        kept = (
            dispatch.write_table(device.device_kind, [row]) if table else None
        )  # after each: a long run may be stopped
    for r in found:
        N, K = r.shape
        numbers = (
            f"{r.ms:.3f}",
            f"{r.gigabytes:.1f}",
            f"{r.fraction:.2f}",
            f"{r.to_float32:.2f}",
            f"{r.to_bfloat16:.2f}",
        )
        numbers += (f"{r.aim or ''}",) if on_gpu() else ()
        shown.add_row(r.what, f"{N}x{K}", str(r.rows), r.implementation, *numbers)
    Console().print(shown)
    if kept is not None:
        print(f"wrote {kept}")
    if file is not None:
        file.write_text("".join(json.dumps({"machine": machine, **r._asdict()}) + "\n" for r in found))


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
