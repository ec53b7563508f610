"""Speed and memory of attention, prefill and decode, beside jax's own and torch's, in one run.

    python scripts/bench_attention.py                              what suits this machine, below
    python scripts/bench_attention.py --only decode --slots 8192   one of the two, one length
    python scripts/bench_attention.py --json FILE                  a row of results a line
    python scripts/bench_attention.py --table                      on a GPU: what was fastest serves from now on
    python scripts/bench_attention.py --model-prompt 32768         a Llama of 125 M parameters reads a prompt, alone

On a CPU: a causal prompt of 2k and 8k tokens forwards, and one token over 8k slots, raw and coded. On a GPU: prompts from 1k
to 32k tokens with heads of 64, 128 and 256, forwards and with gradients, 16k tokens at a time (the benchmark of
FlashAttention-3, arXiv:2407.08608, section 4.1), in TFLOP/s; one token over 8k to 128k slots, contiguous, in pages and coded, in
bytes/s of codes and scales and as a fraction of the read bandwidth measured in the same run.

On a GPU each of our implementations is asked for by name, too. With --table their times become the card's table, by which
pallas_kernels/dispatch.py orders them from then on (`ours` was taken in the order that there was before).

Beside ours, in the same run: jax.nn.dot_product_attention (xla; on a GPU cudnn) and, where it is installed, torch's
scaled_dot_product_attention on the CPU. For coded caches jax's has the whole cache decoded first, which is the alternative. Sides
take turns, round by round, and medians are compared; `beside ours` is a side's time over ours: above 1 ours is faster.
Times on a CPU are of all its cores together (CPU time), which other processes disturb least. Peak: on a CPU how far the process
grew during a call, its arguments and what is compiled apart; on a GPU temporaries and results of the compiled program.
A GPU's decode goes over several caches in one program, of enough to exceed four times the largest L2.

The prompt of a model: prefill as `Model.generate` calls it, in float32 with dense weights, one row, random weights and ids; how
far the process grew, beside the most that it may (temporaries and results of the compiled program, and what glibc may keep of
freed blocks) and what the plan counts for cache and activations. All scores of a layer would be 12 heads x T x T x 4 bytes: 52 GB
at 32,768 tokens.

B sequences, T tokens, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
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
from bench import SHAPE_125M, Ours
from click.core import ParameterSource
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxengine import engine, technique
from jaxengine.architecture import architecture, initialise
from jaxengine.cache.base import CODECS
from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.loading import from_arrays
from jaxengine.plan import Plan, need
from pallas_kernels import dispatch
from pallas_kernels.attention import NAMES, attention
from pallas_kernels.decode_attention import NAMES as DECODE_NAMES
from pallas_kernels.decode_attention import decode_attention, tiles

GPU_BYTES = 4 * (64 << 20)  # four times the largest L2
TOKENS = 16384  # of all prompts of a call on a GPU
KINDS = ("raw", "raw, pages of 64", "raw, pages of 16", "int8", "int8, pages of 64", "int4")


class Row(NamedTuple):
    """One measurement, as it is printed and stored."""

    what: str
    shape: str
    by: str
    ms: float
    beside_ours: float
    teraflops: float | None
    gigabytes: float | None
    fraction: float | None
    peak: int | None


KEPT = 32 * 2**20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX. Larger blocks go back to the system when they are freed
OURS = "ours, "  # and an implementation's name: a side of a case


class Side(NamedTuple):
    """One implementation of a case: a call that waits for its result, how many cases it is, and the bytes it needs."""

    run: Callable[[], Any]
    count: int
    temporary: int | None


class Case(NamedTuple):
    """What is measured, with the work of it; ours is the first of the sides."""

    what: str
    shape: str
    sides: dict[str, Callable[[], Side]]
    flops: float | None
    bytes: float | None
    key: dict[str, Any]  # what the dispatcher tells cases by: see `dispatch.by_measure`


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def clock() -> float:
    return time.perf_counter() if on_gpu() else time.process_time()


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def compiled(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Side:
    """function over all inputs, one after another in one program."""

    def all_of_them(inputs: Any) -> Any:
        out = None
        for q, *rest in inputs:
            out = function(q if out is None else lax.optimization_barrier((q, out))[0], *rest)
        return out

    program = jax.jit(all_of_them).lower(inputs).compile()
    memory = program.memory_analysis()
    need = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Side(lambda: jax.block_until_ready(program(inputs)), len(inputs), need)


# -- cases


def prefills(lengths: list[int], widths: list[int], dtype: Any) -> Iterator[Case]:
    """Causal, all heads with keys of their own, 2048 wide together (on a CPU 8 heads)."""
    for H in widths:
        for T in lengths:
            B, N = (max(1, TOKENS // T), 2048 // H) if on_gpu() else (1, 8)
            q, k, v, do = (normal(i, (B, T, N, H), dtype) for i in range(4))
            at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            flops = 4 * B * N * H * T * (T + 1) / 2
            scale = H**-0.5

            def ours(q: Any, k: Any, v: Any, at: Any, name: str | None = None, scale: float = scale) -> Any:
                return attention(
                    q, k.swapaxes(1, 2), v.swapaxes(1, 2), at, at, scale=scale, contiguous=True, implementation=name
                )

            def jaxs(q: Any, k: Any, v: Any, at: Any, name: Any, scale: float = scale) -> Any:
                return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=name)

            names = [n for n in NAMES if n != "reference"] if on_gpu() else ()
            functions = {"ours": ours} | {f"ours, {n}": functools.partial(ours, name=n) for n in names}
            key = {"op": "attention", "what": "forward", "dtype": q.dtype.name, "head_dim": H, "tokens": T}
            functions |= {f"jax, {n}": functools.partial(jaxs, name=n) for n in (["cudnn"] * on_gpu() + ["xla"])}

            def gradient(f: Any, q: Any, k: Any, v: Any, at: Any, do: Any) -> Any:
                out, pull = jax.vjp(lambda *a: f(*a, at), q, k, v)
                return out, pull(do)

            shape = f"B{B} T{T} N{N} H{H}"
            sides = {n: functools.partial(compiled, f, [(q, k, v, at)]) for n, f in functions.items()}
            if not on_gpu() and importlib.util.find_spec("torch"):
                sides["torch"] = functools.partial(torch_side, q, k, v, scale, causal=True)
            yield Case("forward", shape, sides, flops, None, key)
            if on_gpu():
                sides = {
                    n: functools.partial(compiled, functools.partial(gradient, f), [(q, k, v, at, do)])
                    for n, f in functions.items()
                }
                what = "forward and backward"
                yield Case(what, shape, sides, 3.5 * flops, None, key | {"what": what})


def decodes(lengths: list[int], widths: list[int], kinds: list[str], dtype: Any) -> Iterator[Case]:
    """One token of 4 query heads for each of 8 kv heads, one sequence, all slots held."""
    K, G, B = 8, 4, 1
    for H in widths:
        for S in lengths:
            scale = H**-0.5
            for kind in kinds:
                codec, _, pages = kind.partition(", pages of ")
                page = int(pages) if pages else None
                size = B * K * S * tiles.slot_bytes(H, codec)
                size *= jnp.dtype(dtype).itemsize // 2 if codec == "raw" else 1
                count = max(2, math.ceil(GPU_BYTES / size)) if on_gpu() else 2
                caches = [made(i, B, K, S, H, codec, page, dtype) for i in range(count)]
                q, q_at = normal(9, (B, 1, K * G, H), dtype), jnp.full((B, 1), S - 1, jnp.int32)
                inputs = [(q, q_at, cache) for cache in caches]

                def ours(q: Any, q_at: Any, cache: Any, name: str | None = None, scale: float = scale) -> Any:
                    return decode_attention(q=q, q_positions=q_at, **cache, scale=scale, implementation=name)

                def jaxs(q: Any, q_at: Any, cache: Any, codec: str = codec, scale: float = scale) -> Any:
                    k, v = (as_numbers(cache, n, codec, q.dtype).swapaxes(1, 2) for n in ("k", "v"))
                    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="xla")

                sides = {"ours": functools.partial(compiled, ours, inputs)}
                for name in [n for n in DECODE_NAMES if n != "reference"] if on_gpu() else ():
                    sides[f"ours, {name}"] = functools.partial(compiled, functools.partial(ours, name=name), inputs)
                if page is None:
                    sides["jax, xla"] = functools.partial(compiled, jaxs, inputs)
                if page is None and codec == "raw" and not on_gpu() and importlib.util.find_spec("torch"):
                    k, v = (caches[0][n].swapaxes(1, 2) for n in ("k", "v"))
                    sides["torch"] = functools.partial(torch_side, q, k, v, scale, causal=False)
                key = {"op": "decode_attention", "cache": kind, "dtype": q.dtype.name, "head_dim": H, "slots": S}
                yield Case(kind, f"B{B} S{S} N{K * G} K{K} H{H}", sides, None, size, key)


def made(seed: int, B: int, K: int, S: int, H: int, codec: str, page: int | None, dtype: Any) -> dict[str, Any]:
    """A full cache of random tokens, as the arguments of decode_attention."""
    module, cache = technique.find(CODECS, codec), {}
    for i, n in enumerate(("k", "v")):
        codes, scale = module.coded(module.encode(normal(2 * seed + i, (B, K, S, H), dtype)))
        cache |= {n: codes} | ({} if scale is None else {f"{n}_scale": scale})
    if page is None:
        return cache | {"k_positions": jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))}
    M = S // page
    table = np.random.default_rng(seed).permutation(B * M).reshape(B, M)
    order = jnp.asarray(np.argsort(table.reshape(-1)), jnp.int32)

    def paged(a: jax.Array) -> jax.Array:
        rows = a.reshape(B, K, M, page, *a.shape[3:]).swapaxes(1, 2)
        return rows.reshape(B * M, K, page, *a.shape[3:])[order]

    lengths = jnp.full((B,), S, jnp.int32)
    return {n: paged(a) for n, a in cache.items()} | {"page_table": jnp.asarray(table, jnp.int32), "lengths": lengths}


def as_numbers(cache: dict[str, Any], n: str, codec: str, dtype: Any) -> jax.Array:
    if codec == "raw":
        return cache[n]
    return technique.find(CODECS, codec).decode({"codes": cache[n], "scale": cache[f"{n}_scale"]}, dtype)


def torch_side(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> Side:
    """scaled_dot_product_attention of [B, T, N, H] and [B, S, K, H], on the CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    def turned(a: jax.Array) -> Any:
        made = torch.from_numpy(np.array(a, np.float32)).transpose(1, 2).contiguous()
        return made.to(getattr(torch, a.dtype.name))

    arrays = [turned(a) for a in (q, k, v)]

    def run() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(
                *arrays, is_causal=causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
            )

    return Side(run, 1, None)


# -- measuring


def grown(run: Callable[[], Any]) -> int | None:
    """Bytes by which this process's resident memory rises at most during a call; None where Linux does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        return int(next(x for x in status.read_text().splitlines() if x.startswith(field)).split()[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left is given back, not used again unseen
        clear.write_text("5")  # the highest so far counts from here
        before = kilobytes("VmRSS")
        run()
        return max(0, kilobytes("VmHWM") - before) * 1024
    except (OSError, StopIteration, AttributeError):
        return None


def seconds(side: Side) -> float:
    start = clock()
    side.run()
    return (clock() - start) / side.count


def alike(found: Any, meant: Any) -> bool:
    """Whether two implementations' results are the same but for rounding: what is fast and wrong is to stand in no table."""

    def near(a: Any, b: Any) -> bool:
        wide = [np.asarray(x, np.float64) for x in (a, b)]
        return bool(np.abs(wide[0] - wide[1]).max() <= 64 * float(jnp.finfo(b.dtype).eps) * np.abs(wide[1]).max())

    return all(jax.tree.leaves(jax.tree.map(near, found, meant)))


def compared(case: Case, rounds: int, limit: float | None) -> list[Row]:
    """All sides that serve, in turns, round by round."""
    ready: dict[str, Side] = {}
    gave: dict[str, Any] = {}
    for name, make in case.sides.items():
        try:
            side = make()
            gave[name], ready[name] = side.run(), side
        except (dispatch.Refused, ValueError, RuntimeError, NotImplementedError) as e:
            said = str(e).splitlines()[0][:160]
            Console(stderr=True).print(f"{case.what}, {case.shape}, {name}: {said}", style="dim")
    for name in [
        n for n in ready if n.startswith(OURS) and "ours, xla" in ready and not alike(gave[n], gave["ours, xla"])
    ]:
        Console(stderr=True).print(
            f"{case.what}, {case.shape}, {name}: other numbers than xla's; left out", style="red"
        )
        del ready[name]
    del gave
    peaks = {n: s.temporary if on_gpu() else grown(s.run) for n, s in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, side in ready.items():
            times[name].append(seconds(side))
    median = {name: statistics.median(t) for name, t in times.items()}
    first = median.get("ours", math.nan)
    return [
        Row(
            case.what, case.shape, name, 1e3 * t, t / first,
            None if case.flops is None else case.flops / t / 1e12,
            None if case.bytes is None else case.bytes / t / 1e9,
            None if case.bytes is None or limit is None else case.bytes / t / limit, peaks[name],
        )
        for name, t in median.items()
    ]  # fmt: skip


def measured_row(case: Case, rows: list[Row]) -> dict[str, Any]:
    """A row of the card's table: what each of ours that served took."""
    return case.key | {"milliseconds": {r.by.removeprefix(OURS): r.ms for r in rows if r.by.startswith(OURS)}}


def model_prompt(T: int, shape: dict[str, Any] = SHAPE_125M) -> dict[str, Any]:
    """One prompt of T tokens through the model: seconds, and bytes as they are measured, compiled and counted."""
    config = shape | {"max_position_embeddings": T}
    arch, plan = architecture(config), Plan(dtype="float32")
    model = from_arrays(arch, plan, initialise(arch, 0), config)
    ours = Ours(model, 1, T, 1)
    given = (
        model.params, model._put(ours.ids.astype(np.int32)), ours.lengths, ours.values, ours.keys, ours.stop_ids,
    )  # fmt: skip
    program = engine.prefill.lower(model.engine, ours.steps, T, 1, 0, *given).compile()
    took: list[float] = []

    def run() -> None:
        start = clock()
        jax.block_until_ready(program(*given))
        took.append(clock() - start)

    peak, counted, memory = grown(run), need(arch, plan, batch=1, context=T), program.memory_analysis()
    return {
        "what": "prompt of a model", "tokens": T, "seconds": took[0], "grew": peak,
        "may_grow": memory.temp_size_in_bytes + memory.output_size_in_bytes + KEPT,
        "temporaries": memory.temp_size_in_bytes, "results": memory.output_size_in_bytes,
        "counted_activations": counted.activations, "counted_cache": counted.cache,
        "scores_of_a_layer": 4 * shape["num_attention_heads"] * T * T,
    }  # fmt: skip


def bandwidth() -> float | None:
    """Bytes/s of reading 1 GiB of a GPU's memory, the best of a row maximum and a sum; None on a CPU."""
    if not on_gpu():
        return None
    x = jnp.ones((2**15, 2**13), jnp.float32)
    reads = [jax.jit(lambda x: x.max(-1)), jax.jit(lambda x: x.sum())]
    sides = [Side(lambda read=read: jax.block_until_ready(read(x)), 1, None) for read in reads]
    for side in sides:
        side.run()
    return x.nbytes / min(seconds(side) for _ in range(10) for side in sides)


@click.command(**SETTINGS)
@click.option("--only", type=click.Choice(["prefill", "decode"]), multiple=True, show_default="both")
@click.option(
    "--tokens",
    metavar="T",
    type=click.IntRange(16),
    multiple=True,
    show_default="2048, 8192; GPU: 1k to 32k",
    help="Of a prompt.",
)
@click.option(
    "--slots",
    metavar="S",
    type=click.IntRange(64),
    multiple=True,
    show_default="8192; GPU: 8k to 128k",
    help="Of a cache; multiples of 64.",
)
@click.option(
    "--head-dim", metavar="H", type=click.IntRange(8), multiple=True, show_default="64 and 128; GPU: 64, 128, 256"
)
@click.option(
    "--cache",
    type=click.Choice(KINDS),
    multiple=True,
    show_default="raw, int8, int4; GPU: all",
    help="How a cache stands.",
)
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=5, help="Rounds, whose medians are printed.")
@click.option(
    "--dtype", metavar="DTYPE", show_default="float32; GPU: bfloat16", help="Of queries, raw keys and values."
)
@click.option(
    "--model-prompt",
    "model_prompt_tokens",
    metavar="T",
    type=click.IntRange(16),
    help="Only this: a 125 M model reads T tokens.",
)
@click.option("--table", is_flag=True, help="On a GPU: keep the times as this card's table, which decides what serves.")
@click.option("--json", "file", metavar="FILE", type=click.Path(path_type=Path), help="Results, a line each.")
@reported()
def main(
    only: tuple[str, ...], tokens: tuple[int, ...], slots: tuple[int, ...], head_dim: tuple[int, ...],
    cache: tuple[str, ...], rounds: int, dtype: str | None, model_prompt_tokens: int | None, table: bool,
    file: Path | None,
) -> None:  # fmt: skip
    """Speed and memory of attention on this machine, beside jax's and torch's."""
    for S in slots:
        if S % 64:
            raise click.BadParameter(
                f"{S} is no multiple of 64; the nearest is {round(S / 64) * 64}", param_hint="--slots"
            )
    if model_prompt_tokens is not None:
        context, others = (
            click.get_current_context(),
            ("only", "tokens", "slots", "head_dim", "cache", "rounds", "dtype", "table"),
        )
        if odd := [n for n in others if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]:
            raise click.UsageError(
                f"--{odd[0].replace('_', '-')} is of attention alone: leave it out with --model-prompt"
            )
        line = json.dumps(model_prompt(engine.bucket(model_prompt_tokens)))
        print(line)
        if file is not None:
            file.write_text(line + "\n")
        return
    gpu = on_gpu()
    if table and not gpu:
        raise click.UsageError("--table is of a GPU, and there is none: on a CPU shapes alone decide what serves")
    kind = jnp.dtype(dtype or ("bfloat16" if gpu else "float32"))
    lengths = list(tokens or ((2**i for i in range(10, 16)) if gpu else (2048, 8192)))
    caches = list(slots or ((8192, 32768, 131072) if gpu else (8192,)))
    limit = bandwidth()
    device = jax.devices()[0]
    machine = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {kind.name}"
    machine += "" if limit is None else f", {limit / 1e9:.0f} GB/s read"
    every: list[Iterator[Case]] = []
    if not only or "prefill" in only:
        every.append(prefills(lengths, list(head_dim or ((64, 128, 256) if gpu else (64,))), kind))
    if not only or "decode" in only:
        kinds = list(cache or (KINDS if gpu else ("raw", "int8", "int4")))
        every.append(decodes(caches, list(head_dim or ((64, 128, 256) if gpu else (128,))), kinds, kind))
    found: list[Row] = []
    kept: list[dict[str, Any]] = []
    for case in track((c for cases in every for c in cases), "measuring", console=Console(stderr=True)):
        rows = compared(case, rounds, limit)
        found += rows
        kept.append(measured_row(case, rows))
    Console().print(tabulated(found, machine))
    if table:
        print(f"wrote {dispatch.write_table(device.device_kind, kept)}")
    if file is not None:
        file.write_text("".join(json.dumps({"machine": machine, **r._asdict()}) + "\n" for r in found))


def tabulated(found: list[Row], machine: str) -> Table:
    """Columns that have something to say."""
    columns: dict[str, Callable[[Row], Any]] = {
        "what": lambda r: r.what, "shape": lambda r: r.shape, "by": lambda r: r.by, "ms": lambda r: r.ms,
        "beside ours": lambda r: r.beside_ours, "GFLOP/s": lambda r: r.teraflops and 1e3 * r.teraflops,
        "GB/s": lambda r: r.gigabytes, "of memory": lambda r: r.fraction, "peak MB": lambda r: r.peak and r.peak / 1e6,
    }  # fmt: skip
    told = {name: value for name, value in columns.items() if any(value(r) is not None for r in found)}
    table = Table(title=machine)
    for name in told:
        table.add_column(name, no_wrap=name not in ("what", "shape"))
    for r in found:
        table.add_row(*(number(value(r)) for value in told.values()))
    return table


def number(x: Any) -> str:
    if isinstance(x, str) or x is None:
        return x or ""
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


if __name__ == "__main__":
    start_jax()
    main()
