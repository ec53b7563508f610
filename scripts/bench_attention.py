"""Speed and memory of attention, prefill and decode, beside jax's own and torch's, in one run.

    python scripts/bench_attention.py                              what suits this machine, below
    python scripts/bench_attention.py --only decode --slots 8192   one of the two, one length
    python scripts/bench_attention.py --json FILE                  a row of results a line
    python scripts/bench_attention.py --table                      on a GPU: what was fastest serves from now on
    python scripts/bench_attention.py --model-prompt 32768         a Llama of 125 M parameters reads a prompt, alone

On a CPU: a causal prompt of 2k and 8k tokens forwards, and one token over 8k slots, raw and coded. On a GPU: prompts from 1k
to 32k tokens with heads of 64, 128 and 256, forwards and backwards, 16k tokens at a time (the benchmark of FlashAttention-3,
arXiv:2407.08608, section 4.1), in FLOP/s; prompts that cuDNN refuses, or jax does not hand to it: a soft-cap, sinks, packed
texts, a window over grouped heads; one token over 8k to 128k slots, contiguous, in pages and coded, in bytes/s of codes and
scales. Each as a fraction of what the same run measures: a large matrix product of the same dtype for prompts, reads of memory
for caches.

`backward` is the pullback alone, of what a forward before it kept, with 2.5 of its products; `with forward` adds that forward,
timed beside it.

On a GPU each of our implementations is asked for by name, too. With --table their times become the card's table, by which
pallas_kernels/dispatch.py orders them from then on (`ours` was taken in the order that there was before). Ours are held against
our form in XLA, row by row (`alike`): one with other numbers is told and left out, and of a case in which XLA's did not run
nothing is written to the table. What each implementation is to reach of an H200 stands beside it (KERNELS.md, section 4).

Beside ours, in the same run: jax.nn.dot_product_attention (xla; on a GPU cudnn) and, where it is installed, torch's
scaled_dot_product_attention on the CPU. For coded caches jax's has the whole cache decoded first, which is the alternative. Sides
take turns, round by round, and medians are compared; `beside ours` is a side's time over ours: above 1 ours is faster. `to cudnn`
is the time of jax's cuDNN over a side's, `to xla` the least of XLA's other forms, `to raw` that of the same side over the raw
cache: above 1 the side is faster. Times on a CPU are of all its cores together (CPU time), which other processes disturb least;
on a GPU a short program is called several times before it is waited for, so that launches from Python do not count. Peak: on a
CPU how far the process grew during a call, its arguments and what is compiled apart; on a GPU temporaries and results of the
compiled program. A GPU's decode goes over several caches in one program, of enough to exceed four times the largest L2.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from jaxengine import engine, technique
from jaxengine.architecture import architecture, initialise
from jaxengine.cache.base import CODECS
from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.loading import from_arrays
from jaxengine.plan import Plan, need
from pallas_kernels import cards, dispatch
from pallas_kernels.attention import NAMES, attention
from pallas_kernels.decode_attention import NAMES as DECODE_NAMES
from pallas_kernels.decode_attention import decode_attention, tiles

LARGEST_L2 = 128 << 20  # of the cards in pallas_kernels/cards.py; what one that is not there is taken to have
TOKENS = 16384  # of all prompts of a call on a GPU
KINDS = ("raw", "raw, pages of 64", "raw, pages of 16", "int8", "int8, pages of 64", "int4")
LONG, MOST = 5e-3, 30  # seconds that calls of a GPU take before they are waited for, and how many they are at most
DIRECTIONS = ("forward", "backward")
KEPT = 32 * 2**20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX. Larger blocks go back to the system when they are freed
OURS = "ours, "  # and an implementation's name: a side of a case
XLA = "ours, xla"  # what the others are held against


class Aim(NamedTuple):
    """What a side is to reach, on an H200: at least so much of a row's field."""

    least: float
    of: str


# of heads of 128 and prompts from 4k on; of caches; of what cuDNN refuses
AIMS = {
    "forward": {"ours, mosaic_gpu": Aim(0.92, "to_cudnn"), "ours, triton": Aim(0.55, "to_cudnn")},
    "backward": {"ours, triton": Aim(330, "teraflops")},
    "raw": Aim(0.80, "fraction"), "raw, pages of 64": Aim(0.78, "fraction"), "raw, pages of 16": Aim(0.72, "fraction"),
    "int8": Aim(1.5, "to_raw"), "int8, pages of 64": Aim(1.5, "to_raw"),
    "refused": {"ours": Aim(1.0, "to_xla")},
}  # fmt: skip


class Row(NamedTuple):
    """One measurement, as it is printed and stored; None where a field says nothing of it."""

    what: str
    shape: str
    by: str
    ms: float
    both_ms: float | None  # with the forward before it
    beside_ours: float | None
    teraflops: float | None
    gigabytes: float | None
    fraction: float | None  # of the limit, measured in the same run
    to_cudnn: float | None
    to_xla: float | None
    to_raw: float | None
    aim: float | None
    aim_of: str | None
    reached: bool | None
    off: float | None  # the largest error over its bound, beside our form in XLA
    peak: int | None


class Side(NamedTuple):
    """One implementation of a case: a call whose result is not waited for, how many cases it is, and the bytes it needs.

    before: the forward that keeps what a pullback needs. floors: what errors of a gradient's rows may be beside rounding.
    """

    run: Callable[[], Any]
    count: int
    temporary: int | None
    before: Callable[[], Any] | None = None
    floors: Callable[[], Any] | None = None


class Case(NamedTuple):
    """What is measured, with the work of it; ours is the first of the sides, each of which is traced, and then compiled."""

    what: str
    shape: str
    sides: dict[str, Callable[[], Callable[[], Side]]]
    flops: float | None
    bytes: float | None
    key: dict[str, Any] | None  # what the dispatcher tells cases by (`dispatch.by_measure`); None: of no table
    lengths: tuple[int, int]  # what products are summed over: H, slots
    aims: dict[str, Aim]


class Limits(NamedTuple):
    """Measured in this run: bytes/s of memory and FLOP/s of a matrix product; None where nothing is held against them."""

    memory: float | None
    matmul: float | None


class Found(NamedTuple):
    """What was measured of a case.

    wrong: sides of ours with other numbers than XLA's, and their largest error over its bound. left_out: sides that did not
    run, and why. unchecked: why nothing was held against anything; then no row is for a table.
    """

    rows: list[Row]
    wrong: dict[str, float]
    left_out: dict[str, str]
    unchecked: str


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def distinct_bytes() -> int:
    """Of caches that a GPU's calls go through, to be exceeded: four times the card's L2."""
    try:
        return 4 * cards.find(jax.devices()[0].device_kind).l2
    except ValueError:
        return 4 * LARGEST_L2


def clock() -> float:
    return time.perf_counter() if on_gpu() else time.process_time()


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def room() -> int | None:
    """Bytes that programs may have of a GPU; None where nobody says."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if on_gpu() else None


def needed(program: Any) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes


def compiled(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[[], Side]:
    """function over all inputs, one after another in one program."""

    def all_of_them(inputs: Any) -> Any:
        out = None
        for q, *rest in inputs:
            out = function(q if out is None else lax.optimization_barrier((q, out))[0], *rest)
        return out

    lowered = jax.jit(all_of_them).lower(inputs)

    def finish() -> Side:
        program = lowered.compile()
        return Side(lambda: program(inputs), len(inputs), needed(program))

    return finish


def loosely(make: Callable[[], Any]) -> Any:
    """Traced as jax is by itself: its own attention mixes dtypes, which tests do not let pass."""
    with jax.numpy_dtype_promotion("standard"):
        return make()


def pulled_back(function: Callable[..., Any], q: Any, k: Any, v: Any, more: Any, do: Any, scale: float) -> Any:
    """The gradients of function(q, k, v, more) from what its forward kept, in a program of their own."""
    forward = jax.jit(lambda q, k, v, more: jax.vjp(lambda *a: function(*a, more), q, k, v)).lower(q, k, v, more)
    backward = jax.jit(lambda pull, do: pull(do)).lower(forward.out_info[1], do)

    def finish() -> Side:
        there, back, kept = forward.compile(), backward.compile(), []

        def first() -> Any:
            return there(q, k, v, more)

        def after() -> Any:
            if not kept:
                kept.append(first())
            return kept[0]

        def floors() -> Any:
            """What rounding the result does to its product with `do`, and so to rows of dq and dk: each number by half an
            epsilon at most, in each of two implementations. Rows in which the rest cancels have no more than this."""
            out, pull = after()
            wide = [a.astype(jnp.float32) for a in (q, k, do, out)]
            e = float(jnp.finfo(q.dtype).eps) * jnp.linalg.norm(wide[2] * wide[3], axis=-1)  # [B, T, N]
            longest = [jnp.linalg.norm(a, axis=-1).max() for a in wide[:2]]
            # over queries, of signs by chance: the root of sum_t w^2 e^2, which is at most that of sum_t w e^2, a gradient of v
            top = jnp.maximum(jnp.square(e).max(), 1e-30)
            squares = jnp.broadcast_to((jnp.square(e) / top)[..., None], do.shape).astype(do.dtype)
            summed = back(pull, squares)[2][..., 0].astype(jnp.float32)  # [B, T, K]
            of_keys = scale * longest[0] * jnp.sqrt(top * jnp.maximum(summed, 0.0))
            return scale * longest[1] * e, of_keys, jnp.zeros_like(of_keys)

        return Side(lambda: back(after()[1], do), 1, needed(back), first, floors)

    return finish


# -- cases


class Mask(NamedTuple):
    """What bends and hides scores of a causal prompt. texts: that are packed in a row. grouped: query heads of a kv head."""

    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    texts: int = 1
    grouped: int = 1


def by_name(names: Sequence[str] | None, every: Sequence[str]) -> list[str]:
    """Implementations to ask for by name: where nothing is said all of them on a GPU, and none elsewhere."""
    return list(names if names is not None else [n for n in every if n != "reference"] if on_gpu() else ())


def prefills(
    lengths: Sequence[int],
    widths: Sequence[int],
    dtype: Any,
    names: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Causal, all heads with keys of their own, 2048 wide together (on a CPU 8 heads).

    names: what is asked for by name; None: on a GPU all that there are. directions: of DIRECTIONS; None: on a GPU both.
    """
    for H in widths:
        for T in lengths:
            yield from prompts("", T, H, dtype, names, directions, Mask())


def refused(
    lengths: Sequence[int],
    dtype: Any,
    names: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    H: int = 128,
) -> Iterator[Case]:
    """What cuDNN refuses, or jax does not hand to it, four query heads to a kv head; what it serves of it stands beside."""
    for T in lengths:
        masks = {
            "a soft-cap": Mask(softcap=50.0, grouped=4), "sinks": Mask(sinks=True, grouped=4),
            "packed texts": Mask(texts=4, grouped=4), "a window": Mask(window=max(16, T // 8), grouped=4),
        }  # fmt: skip
        for name, mask in masks.items():
            yield from prompts(name, T, H, dtype, names, directions, mask)


def prompts(
    name: str, T: int, H: int, dtype: Any, names: Sequence[str] | None, directions: Sequence[str] | None, mask: Mask
) -> Iterator[Case]:
    """Prompts of T tokens in each direction. name: what is told of the mask; '': a plain one, whose times are a table's."""
    B, N = (max(1, TOKENS // T), 2048 // H) if on_gpu() else (1, 8)
    K, scale = N // mask.grouped, H**-0.5
    q, k, v, do = (normal(i, (B, T, heads, H), dtype) for i, heads in enumerate((N, K, K, N)))
    slots, each = np.arange(T, dtype=np.int32), -(-T // mask.texts)
    at, of = (jnp.broadcast_to(jnp.asarray(a), (B, T)) for a in (slots % each, slots // each))
    more = {
        "at": at,
        "of": of if mask.texts > 1 else None,
        "sinks": normal(4, (N,), jnp.float32) if mask.sinks else None,
    }
    seen = np.minimum(slots % each + 1, mask.window or T).sum(dtype=np.float64)
    flops = 4 * B * N * H * float(seen)

    def ours(q: Any, k: Any, v: Any, more: Any, name: str | None = None, training: bool = False) -> Any:
        return attention(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), more["at"], more["at"], scale=scale, window=mask.window,
            softcap=mask.softcap, sinks=more["sinks"], q_segments=more["of"], k_segments=more["of"],
            contiguous=mask.texts == 1, training=training, implementation=name,
        )  # fmt: skip

    def jaxs(q: Any, k: Any, v: Any, more: Any, name: Any) -> Any:
        of = more["of"]
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation=name,
            mask=None if of is None else (of[:, :, None] == of[:, None, :])[:, None],
            local_window_size=None if mask.window is None else (mask.window - 1, 0),  # it counts those before the query
        )  # fmt: skip

    def written_out(make: Callable[..., Any], part: int, *given: Any) -> Any:
        """jax's XLA form where its scores are no more than a part of the memory: with less it waits, and fails."""
        size, there = 4 * B * N * T * T, room()
        if there is not None and size * part > there:
            raise dispatch.Refused(f"all scores in float32 are {size / 1e9:.0f} GB")
        return make(*given)

    asked = by_name(names, NAMES)
    for direction in directions or (DIRECTIONS if on_gpu() else DIRECTIONS[:1]):
        back = direction == "backward"
        functions = {"ours": functools.partial(ours, training=back)}
        functions |= {f"{OURS}{n}": functools.partial(ours, name=n) for n in asked}
        if mask.softcap is None and not mask.sinks:  # jax has neither
            alone = on_gpu() and mask.texts == 1  # for cuDNN the texts would be an array [T, T] of its own
            functions |= {f"jax, {n}": functools.partial(jaxs, name=n) for n in (["cudnn"] * alone + ["xla"])}
        sides: dict[str, Callable[[], Any]] = {}
        for n, f in functions.items():
            if back:
                make = functools.partial(pulled_back, f, q, k, v, more, do, scale)
            else:
                make = functools.partial(compiled, f, [(q, k, v, more)])
            if n == "jax, xla":
                make = functools.partial(written_out, make, 12 if back else 6)
            sides[n] = functools.partial(loosely, make) if n.startswith("jax") else make
        if not on_gpu() and not back and not name and names is None and importlib.util.find_spec("torch"):
            sides["torch"] = functools.partial(torch_side, q, k, v, scale, causal=True)
        key: dict[str, Any] | None = None
        if not name:
            what = "forward and backward" if back else "forward"
            key = {"op": "attention", "what": what, "dtype": q.dtype.name, "head_dim": H, "tokens": T}
        kind = "refused" if name else direction if H == 128 and T >= 4096 else ""
        aims: Any = AIMS.get(kind, {}) if on_gpu() else {}
        shape = f"B{B} T{T} N{N} " + (f"K{K} " if K != N else "") + f"H{H}"
        told = f"{direction}, {name}" if name else direction
        yield Case(told, shape, sides, flops * (2.5 if back else 1), None, key, (H, T), aims)


def decodes(
    lengths: Sequence[int], widths: Sequence[int], kinds: Sequence[str], dtype: Any, names: Sequence[str] | None = None
) -> Iterator[Case]:
    """One token of 4 query heads for each of 8 kv heads, one sequence, all slots held. names: as of `prefills`."""
    K, G, B = 8, 4, 1
    for H in widths:
        for S in lengths:
            scale = H**-0.5
            for kind in kinds:
                codec, _, pages = kind.partition(", pages of ")
                page = int(pages) if pages else None
                size = B * K * S * tiles.slot_bytes(H, codec)
                size *= jnp.dtype(dtype).itemsize // 2 if codec == "raw" else 1
                count = max(2, distinct_bytes() // size + 1) if on_gpu() else 2
                caches = [made(i, B, K, S, H, codec, page, dtype) for i in range(count)]
                q, q_at = normal(9, (B, 1, K * G, H), dtype), jnp.full((B, 1), S - 1, jnp.int32)
                inputs = [(q, q_at, cache) for cache in caches]

                def ours(q: Any, q_at: Any, cache: Any, name: str | None = None, scale: float = scale) -> Any:
                    return decode_attention(q=q, q_positions=q_at, **cache, scale=scale, implementation=name)

                def jaxs(q: Any, q_at: Any, cache: Any, name: Any, codec: str = codec, scale: float = scale) -> Any:
                    k, v = (as_numbers(cache, n, codec, q.dtype).swapaxes(1, 2) for n in ("k", "v"))
                    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=name)

                sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(compiled, ours, inputs)}
                for name in by_name(names, DECODE_NAMES):
                    sides[f"{OURS}{name}"] = functools.partial(compiled, functools.partial(ours, name=name), inputs)
                if page is None:
                    for name in ["cudnn"] * on_gpu() + ["xla"]:
                        make = functools.partial(compiled, functools.partial(jaxs, name=name), inputs)
                        sides[f"jax, {name}"] = functools.partial(loosely, make)
                plain = page is None and codec == "raw" and names is None
                if plain and not on_gpu() and importlib.util.find_spec("torch"):
                    k, v = (caches[0][n].swapaxes(1, 2) for n in ("k", "v"))
                    sides["torch"] = functools.partial(torch_side, q, k, v, scale, causal=False)
                key = {"op": "decode_attention", "cache": kind, "dtype": q.dtype.name, "head_dim": H, "slots": S}
                aim: Any = AIMS.get(kind) if on_gpu() else None
                aims = {} if aim is None else {"ours": aim, "ours, triton": aim}
                yield Case(kind, f"B{B} S{S} N{K * G} K{K} H{H}", sides, None, size, key, (H, S), aims)


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


def torch_side(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> Callable[[], Side]:
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

    return lambda: Side(run, 1, None)


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


def seconds(side: Side, calls: int = 1, before: bool = False) -> float:
    """Of one case; of the forward before it."""
    run = side.before if before else side.run
    assert run is not None
    start, out = clock(), None
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (clock() - start) / (side.count * calls)


def calls(side: Side) -> int:
    """How often a side is called before it is waited for; it has run before."""
    if not on_gpu():
        return 1
    start = clock()
    jax.block_until_ready(side.run())
    return min(MOST, max(1, math.ceil(LONG / max(clock() - start, 1e-9))))


def alike(found: Any, meant: Any, lengths: tuple[int, int], floors: Any = None) -> float:
    """The largest error of a row (the last axis) over its bound; above 1 numbers are other than by rounding.

    The length of the difference of two rows, of random numbers: in each implementation weights and the result are rounded to
    the result's dtype, to half an epsilon at most; sums of H products in scores, and of as many as there are slots after them,
    in float32; weights below the dtype's normal numbers to steps of its least. Twice of all that, since a row may be shorter by
    chance than its terms are. floors: see `pulled_back`. What is fast and wrong is to stand in no table, nor one row of it.
    """
    if floors is None:
        floors = jax.tree.map(lambda _: None, meant)
    a, b, beside = (jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in (found, meant, floors))
    return max((_off(x, y, z, lengths) for x, y, z in zip(a, b, beside, strict=True)), default=0.0)


def _off(found: Any, meant: Any, floor: Any, lengths: tuple[int, int]) -> float:
    if found is None and meant is None:  # a side that computes nothing
        return 0.0
    return min(float(_worst(found, meant, floor, lengths)), 1e30)  # JSON has no infinity


@functools.partial(jax.jit, static_argnums=3)
def _worst(found: Any, meant: Any, floor: Any, lengths: tuple[int, int]) -> jax.Array:
    (H, S), info = lengths, jnp.finfo(meant.dtype)
    a, b = (x.astype(jnp.float32) for x in (found, meant))
    error, size = jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(b, axis=-1)
    relative = 2 * float(info.eps) + 2.0**-24 * (H + S**0.5)
    bound = relative * size + float(info.smallest_subnormal) * (S * H) ** 0.5
    bound = 2 * (bound if floor is None else bound + floor)
    off = jnp.where(error > 0, error / bound, 0.0)
    return jnp.where(jnp.isfinite(error), off, jnp.inf).max()


def reason(e: Exception) -> str:
    said = next(iter(str(e).splitlines()), "")[:300]
    return said if isinstance(e, dispatch.Refused) else f"{type(e).__name__}: {said}"


def made_ready(case: Case) -> tuple[dict[str, Side], dict[str, Any], dict[str, str]]:
    """(sides that ran once, what they gave, why the others did not): traced one by one, and compiled at the same time."""
    traced: dict[str, Callable[[], Side]] = {}
    ready: dict[str, Side] = {}
    gave: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    # whatever goes wrong in one, and kernels go wrong in many ways, the others are measured
    for name, make in case.sides.items():
        try:
            traced[name] = make()
        except Exception as e:
            left_out[name] = reason(e)
    with ThreadPoolExecutor(max(1, len(traced))) as pool:
        finished = {name: pool.submit(finish) for name, finish in traced.items()}
    for name, side in finished.items():
        try:
            gave[name] = jax.block_until_ready(side.result().run())
            ready[name] = side.result()
        except Exception as e:
            left_out[name] = reason(e)
    return ready, gave, left_out


def compared(case: Case, rounds: int, limits: Limits, raw: dict[tuple[str, ...], float]) -> Found:
    """All sides that serve, in turns, round by round. raw: milliseconds of raw caches, which are kept there."""

    def say(name: str, what: str, style: str) -> None:
        Console(stderr=True).print(f"{case.what}, {case.shape}, {name}: {what}", style=style, highlight=False)

    ready, gave, left_out = made_ready(case)
    for name, why in left_out.items():
        say(name, why, "dim")
    off, wrong, unchecked = {}, {}, ""
    if XLA in ready:
        make_floors = ready[XLA].floors
        floors = None if make_floors is None else make_floors()
        off = {name: alike(gave[name], gave[XLA], case.lengths, floors) for name in ready if name != "torch"}
        if off[XLA] > 0:  # beside itself: a number that is not finite
            unchecked = "our form in XLA gave numbers that are not finite"
        else:
            wrong = {n: o for n, o in off.items() if o > 1 and (n == "ours" or n.startswith(OURS))}
    elif any(name.startswith(OURS) for name in case.sides):
        unchecked = (
            f"our form in XLA, against which numbers are held, did not run: {left_out.get(XLA, 'not asked for')}"
        )
    if unchecked:
        say(XLA, f"{unchecked}; nothing of this case is written to a table", "red")
    for name, o in wrong.items():
        say(name, f"other numbers than xla's, by {o:.3g} of the bound; left out", "red")
        del ready[name]
    del gave
    peaks = {
        n: s.temporary if on_gpu() else grown(lambda s=s: jax.block_until_ready(s.run())) for n, s in ready.items()
    }
    often = {name: calls(side) for name, side in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    befores: dict[str, list[float]] = {name: [] for name, side in ready.items() if side.before is not None}
    for _ in range(rounds):
        for name, side in ready.items():
            times[name].append(seconds(side, often[name]))
            if name in befores:
                befores[name].append(seconds(side, often[name], before=True))
    median = {name: statistics.median(t) for name, t in times.items()}
    before = {name: statistics.median(t) for name, t in befores.items()}
    codec, _, pages = case.what.partition(", ")
    if codec == "raw":
        raw.update({(case.shape, pages, name): t for name, t in median.items()})
    rows = []
    for name, t in median.items():
        xla = min((s for n, s in median.items() if n in (XLA, "jax, xla") and n != name), default=None)
        work, limit = (case.bytes, limits.memory) if case.flops is None else (case.flops, limits.matmul)
        row = Row(
            what=case.what, shape=case.shape, by=name, ms=1e3 * t,
            both_ms=1e3 * (t + before[name]) if name in before else None,
            beside_ours=over(t, median.get("ours")), teraflops=over(case.flops, 1e12 * t), gigabytes=over(case.bytes, 1e9 * t),
            fraction=None if work is None else over(work / t, limit), to_cudnn=over(median.get("jax, cudnn"), t),
            to_xla=over(xla, t), to_raw=None if codec == "raw" else over(raw.get((case.shape, pages, name)), t),
            aim=None, aim_of=None, reached=None, off=off.get(name), peak=peaks[name],
        )  # fmt: skip
        if (aim := case.aims.get(name)) is not None:
            got = getattr(row, aim.of)
            row = row._replace(aim=aim.least, aim_of=aim.of, reached=None if got is None else got >= aim.least)
        rows.append(row)
    return Found(rows, wrong, left_out, unchecked)


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def measured(cases: Iterable[Case], rounds: int, limits: Limits) -> Iterator[tuple[Case, Found]]:
    """One after another; a coded cache comes after the raw one that it is held against."""
    raw: dict[tuple[str, ...], float] = {}
    for case in cases:
        yield case, compared(case, rounds, limits, raw)


def measured_row(case: Case, found: Found) -> dict[str, Any] | None:
    """A row of the card's table: what each of ours that served took, with the forward where the case is both; None where
    there is none, or numbers were held against nothing."""
    times = {r.by.removeprefix(OURS): r.both_ms or r.ms for r in found.rows if r.by.startswith(OURS)}
    return None if case.key is None or found.unchecked or not times else case.key | {"milliseconds": times}


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


def best(*runs: Callable[[], Any]) -> float:
    """Seconds of the fastest of some programs, of ten rounds."""
    sides = [Side(run, 1, None) for run in runs]
    for side in sides:
        jax.block_until_ready(side.run())
    often = [calls(side) for side in sides]
    return min(seconds(side, n) for _ in range(10) for side, n in zip(sides, often, strict=True))


def bandwidth(nbytes: int = 2**30) -> float:
    """Bytes/s of reading so many, the best of a row maximum and a sum."""
    x = jnp.ones((max(1, nbytes // 2**15), 2**13), jnp.float32)
    reads = [jax.jit(lambda x: x.max(-1)), jax.jit(lambda x: x.sum())]
    return x.nbytes / best(*(functools.partial(read, x) for read in reads))


def matmul_rate(n: int, dtype: Any) -> float:
    """FLOP/s of a product of two matrices [n, n]; of zeros a card makes them faster than of numbers."""
    x, product = normal(0, (n, n), dtype), jax.jit(jnp.matmul)
    return 2 * n**3 / best(lambda: product(x, x))


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
    prompt, step = (not only or name in only for name in ("prefill", "decode"))
    # a CPU's caches are read faster than its memory
    limits = Limits(bandwidth() if gpu and step else None, matmul_rate(8192 if gpu else 2048, kind) if prompt else None)
    device = jax.devices()[0]
    machine = f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {kind.name}"
    machine += "" if limits.memory is None else f", {limits.memory / 1e9:.0f} GB/s read"
    machine += "" if limits.matmul is None else f", {limits.matmul / 1e9:.0f} GFLOP/s of a matrix product"
    every: list[Iterator[Case]] = []
    if prompt:
        every.append(prefills(lengths, list(head_dim or ((64, 128, 256) if gpu else (64,))), kind))
        if gpu:
            every += [refused(lengths, kind, H=H) for H in head_dim or (128,)]
    if step:
        kinds = list(cache or (KINDS if gpu else ("raw", "int8", "int4")))
        every.append(decodes(caches, list(head_dim or ((64, 128, 256) if gpu else (128,))), kinds, kind))
    found: list[Row] = []
    told: list[dict[str, Any]] = []  # what is stored
    kept: list[Path] = []
    dropped: list[str] = []
    cases = measured((c for cases in every for c in cases), rounds, limits)
    for case, one in track(cases, "measuring", console=Console(stderr=True)):
        found += one.rows
        told += [r._asdict() for r in one.rows]
        told += [{"what": case.what, "shape": case.shape, "by": n, "wrong": o} for n, o in one.wrong.items()]
        row = measured_row(case, one)
        if table and row is not None:  # after each: a long run may be stopped
            kept.append(dispatch.write_table(device.device_kind, [row]))
        elif table and case.key is not None:
            dropped.append(f"{case.what}, {case.shape}: {one.unchecked or 'nothing of ours ran'}")
    console = Console()
    # in a file or a pipe its columns would be cut to those of a terminal of 80
    (console if console.is_terminal else Console(width=240)).print(tabulated(found, machine))
    if file is not None:
        file.write_text("".join(json.dumps({"machine": machine, **r}) + "\n" for r in told))
    if kept:
        print(f"wrote {kept[-1]}")
    if dropped:
        raise click.ClickException(f"not written to the table: {'; '.join(dropped)}")


def tabulated(found: list[Row], machine: str) -> Table:
    """Columns that have something to say."""
    columns: dict[str, Callable[[Row], Any]] = {
        "what": lambda r: r.what, "shape": lambda r: r.shape, "by": lambda r: r.by, "ms": lambda r: r.ms,
        "with forward": lambda r: r.both_ms, "beside ours": lambda r: r.beside_ours,
        "GFLOP/s": lambda r: r.teraflops and 1e3 * r.teraflops, "GB/s": lambda r: r.gigabytes,
        "of limit": lambda r: r.fraction, "to cudnn": lambda r: r.to_cudnn, "to xla": lambda r: r.to_xla,
        "to raw": lambda r: r.to_raw, "aim": lambda r: r.aim and f"{r.aim:g} {r.aim_of}".replace("_", " "),
        "reached": lambda r: r.reached if r.reached is None else "yes" if r.reached else "no",
        "peak MB": lambda r: r.peak and r.peak / 1e6,
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
