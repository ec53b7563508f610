"""Everything that only a card can say, in one command of under ten minutes, into one JSON file.

    python scripts/gpu_suite.py                          scripts/results/<card>-<date>.json
    python scripts/gpu_suite.py --only transfers,passes  a part of it
    python scripts/gpu_suite.py --only attention         attention's three, which have more time then, and more rows
    python scripts/gpu_suite.py --only quant_matmul      the same of quantised matrices, a measurement a shape
    python scripts/gpu_suite.py --keep-tables            measures, and leaves the card's table as it is
    python scripts/gpu_suite.py --tiny --out FILE        the same on tiny sizes, here on a CPU: no measurement

Each measurement is a function that yields rows, run in a process of its own: a crash or a hang costs only the rows that
would have come after it, and the highest use of memory, which a process cannot set back, is that measurement's own. A
child that a measurement needs compiled without the card runs without it.

Times end when the result is there (block_until_ready), after warm-up; a time or rate is a median over rounds and stands
beside its lowest and highest, and beside the limit that was measured in the same process: pinned copies for what is
streamed, reads of the card's own memory, and a large matmul.

What it measures of attention and of quant_matmul becomes the card's table, by which pallas_kernels/dispatch.py orders
implementations from then on, as --table of bench_attention.py and bench_quant.py does with more cases and more time; with
--keep-tables it does not, and rows that were measured with more care stay. No row is kept of a kernel whose numbers are not
those of the form in XLA (of quant_matmul: of the reference): `wrong` says by how much, in times of what rounding allows. Both
have more rows than time, what is asked first coming first: they divide what is left of it, and what they had when it was over
counts. `aims` at the end of the file is every number that something is asked of, and whether it is reached (an H200's).

B batch, L layers, MiB 2**20 bytes, GB 10**9 bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from checkpoints.output import output_file
from jaxengine import engine, outside, proof, sampling, selftest
from jaxengine.architecture import Architecture, architecture
from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.finetune.data import Documents, pack
from jaxengine.finetune.run import Run, Settings
from jaxengine.loading import from_arrays, load
from jaxengine.model import Model
from jaxengine.plan import Plan, layer_bytes, need
from jaxengine.walk import lay_out
from pallas_kernels import aot, cards, dispatch
from sharding.mesh import make_mesh

MiB = 2**20
ROOT = Path(__file__).parent.parent
Row = dict[str, Any]

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
NARROW = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
NARROWEST = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PERIODIC = {
    "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64,
    "max_position_embeddings": 1024,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is."""

    copies: tuple[int, ...] = (8 * MiB, 64 * MiB, 256 * MiB)
    rounds: int = 9
    width: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # of the layers that are timed, over Llama 3 8B's
    layers: int = 8  # that are timed
    batches: tuple[int, ...] = (1, 32, 256)
    widest: int = 4096  # rows of the pass whose compute is not small beside its copy
    steps: int = 6  # of a call of decode
    tuned: tuple[tuple[int, int], ...] = ((4, 4096), (16, 4096), (1, 4096))  # rows and tokens of a step of fine-tuning
    tuned_steps: int = 3  # that are timed
    tuned_tokens: int = 16384  # of a step, from which on streamed layers are to keep the resident rate
    memory_layers: int = 12
    memory_batch: int = 8
    memory_length: int = 1024
    vocabulary: int = 128256
    narrow: Mapping[str, int] = dataclasses.field(default_factory=lambda: NARROW)
    matmul: int = 8192
    read: int = 2048 * MiB
    slots: int = 64  # turns of the loop with a condition in it
    # of attention, what is asked most first: tokens of prompts and of those that cuDNN refuses, slots of caches, heads
    table_tokens: tuple[int, ...] = (4096, 8192, 16384, 32768, 1024, 2048)
    table_refused: tuple[int, ...] = (8192,)
    table_slots: tuple[int, ...] = (32768, 131072, 8192)
    table_heads: tuple[int, ...] = (128, 64, 256)
    table_rounds: int = 7
    probed: tuple[int, ...] = (256, 4096)  # tokens of a kernel's first calls
    # of quantised matrices [outputs, inputs], each a measurement of its own: few rows, where codes save time, more, and more yet
    table_matrices: tuple[tuple[int, int], ...] = ((4096, 14336), (8192, 28672), (4096, 4096))
    table_rows: tuple[tuple[int, ...], ...] = ((16, 1, 4), (64, 256, 4096), (1024,))
    table_bytes: int | None = None  # of a turn's matrices; None: more than four times the last-level cache
    probed_rows: tuple[int, ...] = (16, 256)
    tables: bool = True  # whether they are kept: what decides what serves


FULL = Size()
TINY = Size(
    copies=(2**12, 2**14), rounds=2, width=NARROWEST, layers=3, batches=(1,), widest=2, steps=2, tuned=((2, 16),), tuned_steps=2,
    tuned_tokens=32, memory_layers=3, memory_batch=1, memory_length=64, vocabulary=96, narrow=NARROWEST, matmul=32, read=2**16,
    slots=8, table_tokens=(32,), table_refused=(32,), table_slots=(64,), table_heads=(16,), table_rounds=2, probed=(32,),
    table_matrices=((128, 256), (256, 128), (128, 128)), table_rows=((1,), (), ()), table_bytes=0, probed_rows=(2,), tables=False,
)  # fmt: skip

# --- what measurements share ----------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], rounds: int, warm: int = 2) -> list[float]:
    """Of each of `rounds` calls, the result waited for."""
    times = []
    for i in range(warm + rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if i >= warm:
            times.append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> Row:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "rounds": len(values)}


def rate(nbytes: float, times: list[float]) -> Row:
    """GB/s."""
    return spread([nbytes / s / 1e9 for s in times])


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def kind(memory: str | None = None) -> NamedSharding:
    """One device's own memory, or its host's."""
    return NamedSharding(make_mesh(), PartitionSpec(), memory_kind=memory)


def pinned(x: Any) -> jax.Array:
    return jax.device_put(x, kind("pinned_host"))


def fetched(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), tree)


def compiled_here(function: Callable[..., Any], **given: Any) -> Any:
    """Under jit with the options that the engine's own programs have; `options` go on top of them."""
    options = dict(aot.OPTIONS) | given.pop("options", {})
    return jax.jit(function, compiler_options=options if on_gpu() else None, **given)


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(seed: Any, shape: tuple[int, ...], dtype: str, mean: Any) -> jax.Array:
    return (mean + 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


class Random(Mapping[str, Any]):
    """A model's parameters by name, each drawn on the device when it is asked for, and kept by nobody."""

    def __init__(self, arch: Architecture, dtype: str):
        self.specs, self.dtype = arch.specs(), dtype

    def __getitem__(self, name: str) -> jax.Array:
        spec = self.specs[name]
        return drawn(np.uint32(zlib.crc32(name.encode())), spec.shape, self.dtype, 0.0 if spec.out is not None else 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def random_model(raw: Mapping[str, Any], plan: Plan) -> Model:
    arch = architecture(raw)
    return from_arrays(arch, plan, Random(arch, plan.dtype), raw)


def random_matrix(n: int) -> jax.Array:
    """[n, n] in bfloat16, whose powers stay in range; of zeros a card makes products faster than of numbers."""
    drawn = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    return (drawn / np.float32(n**0.5)).astype(jnp.bfloat16)


def shape_8b(size: Size, layers: int, vocabulary: int) -> dict[str, Any]:
    return LLAMA_8B | {"num_hidden_layers": layers, "vocab_size": vocabulary} | dict(size.width)


def greedy(batch: int) -> tuple[sampling.Steps, Any, jax.Array, jax.Array]:
    """(steps, values, keys, stop ids) of `batch` greedy rows that never end."""
    rows = [sampling.Sampling()] * batch
    steps = sampling.Steps.of(rows)
    return steps, sampling.values(steps, rows), sampling.row_keys(0, [0] * batch), jnp.full((8,), -1, jnp.int32)


def begun(model: Model, batch: int, length: int) -> engine.Decoding:
    """A batch that decode can go on with: an empty cache of `length` tokens."""
    steps, _, keys, _ = greedy(batch)
    one = jnp.zeros((batch, 1), jnp.int32)

    def make(params: Any) -> engine.Decoding:
        cache = engine.empty_cache(model.engine, params, batch, length)
        counts = sampling.init_counts(steps, one, one > 0, model.config.vocab_size)
        now = engine.Decoding(cache, one[:, 0], one[:, 0], one[:, 0] > 0, counts, keys)
        return engine.placed_state(model.engine, params["banks"], now)

    return jax.jit(make)(model.params)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured in this process: bytes/s from pinned memory, bytes/s of the card's own, FLOP/s in bfloat16."""

    link: float
    memory: float
    matmul: float

    @classmethod
    def measured(cls, size: Size) -> Limits:
        host = pinned(np.zeros(size.copies[-1], np.uint8))
        link = statistics.median(seconds(lambda: jax.device_put(host, kind()), size.rounds))
        x = jnp.zeros((size.read // 2,), jnp.bfloat16)
        read = jax.jit(lambda x: x.max())
        memory = statistics.median(seconds(lambda: read(x), size.rounds))
        m = random_matrix(size.matmul)
        product = jax.jit(jnp.matmul)
        matmul = statistics.median(seconds(lambda: product(m, m), size.rounds))
        return cls(host.nbytes / link, x.nbytes / memory, 2 * size.matmul**3 / matmul)

    def row(self) -> Row:
        return {"link_GBps": self.link / 1e9, "memory_GBps": self.memory / 1e9, "matmul_TFLOPs": self.matmul / 1e12}

    def of_pass(self, model: Model, batch: int, times: list[float]) -> Row:
        """Seconds of passes over all layers, beside what each limit alone would take."""
        arch, plan = model.architecture, model.plan
        each = layer_bytes(arch, plan)
        streamed = sum(each[plan.resident :]) if plan.home != "device" else 0
        elements = sum(int(np.prod(s.shape)) for n, s in arch.specs().items() if n.startswith("layers.") and s.out)
        limits = {
            "link": streamed / self.link,
            "memory": sum(each) / self.memory,
            "matmul": 2 * elements * batch / self.matmul,
        }
        first, middle = max(limits, key=lambda n: limits[n]), statistics.median(times)
        return {
            "batch": batch, "layers": len(each), "layer_bytes": each[0], "streamed_bytes": streamed,
            "ms_per_layer": spread([1e3 * s / len(each) for s in times]),
            "ms_per_streamed_layer_at_link_limit": 1e3 * each[0] / self.link,
            "tokens_per_s": batch / middle, "limit": first, "limit_tokens_per_s": batch / limits[first],
            "fraction_of_limit": limits[first] / middle,
            "limits_ms_per_layer": {n: 1e3 * s / len(each) for n, s in limits.items()},
        }  # fmt: skip


# --- the measurements, in the order of what hangs on them -------------------------------------------------------------


def machine(size: Size, folder: Path) -> Iterator[Row]:
    """What this runs on."""
    del size, folder
    device = jax.devices()[0]
    row: Row = {
        "card": device.device_kind, "gpu": on_gpu(), "platform": " ".join(device.client.platform_version.split()),
        "memory": device.memory_stats(), "jax": jax.__version__, "jaxlib": version("jaxlib"),
        "python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "ram": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "environment": {n: v for n, v in os.environ.items() if n.startswith(("XLA_", "JAX_", "CUDA_VISIBLE"))},
    }  # fmt: skip
    asked = "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,clocks.sm,power.limit"
    commands = {
        "nvidia-smi": ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"],
        "commit": ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
    }
    for name, command in commands.items():
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            row[name] = said.strip().splitlines()
        except (OSError, subprocess.SubprocessError) as error:
            row[name] = f"not told: {type(error).__name__}"
    yield row


def transfers(size: Size, folder: Path) -> Iterator[Row]:
    """Pinned memory to the card and back, alone and both ways at once: eagerly, and by a compiled program."""
    del folder
    down = compiled_here(lambda h: jax.device_put(h, jax.memory.Space.Device), out_shardings=kind())
    up = compiled_here(lambda d: jax.device_put(d, jax.memory.Space.Host), out_shardings=kind("pinned_host"))
    both = compiled_here(
        lambda h, d: (jax.device_put(h, jax.memory.Space.Device), jax.device_put(d, jax.memory.Space.Host)),
        out_shardings=(kind(), kind("pinned_host")),
    )
    for nbytes in size.copies:
        for count in (1, 8):
            hosts = [pinned(np.full(nbytes, i, np.uint8)) for i in range(count)]
            devices = jax.block_until_ready([jax.device_put(h, kind()) for h in hosts])
            ways: dict[tuple[str, str], Callable[[], Any]] = {
                ("eager", "to device"): lambda h=hosts: jax.device_put(h, kind()),
                ("eager", "to host"): lambda d=devices: jax.device_put(d, kind("pinned_host")),
                ("eager", "both"): lambda h=hosts, d=devices: (
                    jax.device_put(h, kind()),
                    jax.device_put(d, kind("pinned_host")),
                ),
            }
            if count == 1:
                ways |= {
                    ("program", "to device"): lambda h=hosts: down(h[0]),
                    ("program", "to host"): lambda d=devices: up(d[0]),
                    ("program", "both"): lambda h=hosts, d=devices: both(h[0], d[0]),
                }
            for (by, way), run in ways.items():
                moved = nbytes * count * (2 if way == "both" else 1)
                yield {
                    "by": by, "way": way, "bytes": nbytes, "at_once": count, "GBps": rate(moved, seconds(run, size.rounds))
                }  # fmt: skip
    pageable = np.zeros(size.copies[-1], np.uint8)
    times = seconds(lambda: jax.device_put(pageable, kind()), size.rounds)
    yield {
        "by": "eager", "way": "to device, from numpy", "bytes": pageable.nbytes, "at_once": 1,
        "GBps": rate(pageable.nbytes, times),
    }  # fmt: skip


def slices(size: Size, folder: Path) -> Iterator[Row]:
    """Whether each way of indexing a stack in host memory reads, or writes, the layer it says."""
    del folder
    L, N = 8, size.copies[0] // 32
    numbers = np.stack([1001 * i + np.arange(N) % 89 for i in range(L)]).astype(np.float32)
    order = np.asarray([3, 0, 7, 1, 1, 6, 2, 5], np.int32)

    def at(stack: jax.Array, i: Any) -> jax.Array:
        return fetched(lax.dynamic_index_in_dim(stack, i, keepdims=False))

    def looped(index: Callable[[Any], Any], count: int = L) -> Callable[..., Any]:
        def run(stack: jax.Array, order: jax.Array) -> jax.Array:
            def turn(i: Any, out: jax.Array) -> jax.Array:
                return lax.dynamic_update_index_in_dim(out, at(stack, index(i)), i, 0)

            return lax.fori_loop(0, count, turn, jnp.zeros((count, N), jnp.float32))

        return run

    def written(stack: jax.Array, order: jax.Array) -> jax.Array:
        def turn(i: Any, stack: jax.Array) -> jax.Array:
            there = L - 1 - i
            row = jax.device_put(at(stack, there) + jnp.float32(1), jax.memory.Space.Host)
            return lax.dynamic_update_index_in_dim(stack, row, there, 0)

        return lax.fori_loop(0, L, turn, stack)

    def gradient(stack: jax.Array, order: jax.Array) -> Any:
        """Through a scan whose layers are fetched anew in the backward pass: x becomes +-x + w."""

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            w = fetched(w)
            return x * jnp.where(w % 2 == 0, 1.0, -1.0) + w, None

        def loss(stack: jax.Array, x: jax.Array) -> jax.Array:
            return (lax.scan(layer, x, stack)[0] * (jnp.arange(N) % 7).astype(jnp.float32)).sum()

        dw, dx = jax.grad(loss, argnums=(0, 1))(stack, jnp.ones((N,), jnp.float32))
        return jnp.concatenate([fetched(dw), dx[None]])

    g, expected = (np.arange(N) % 7).astype(np.float32), []
    for w in reversed(numbers):
        expected.append(g)
        g = g * np.where(w % 2 == 0, 1, -1)
    ways: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
        "scan": (lambda s, o: lax.scan(lambda c, x: (c, fetched(x)), None, s)[1], numbers),
        "scan in reverse": (lambda s, o: lax.scan(lambda c, x: (c, fetched(x)), None, s, reverse=True)[1], numbers),
        "loop, i": (looped(lambda i: i), numbers),
        "loop, L-1-i": (looped(lambda i: L - 1 - i), numbers[::-1]),
        "loop, i+1": (looped(lambda i: i + 1, L - 1), numbers[1:]),
        "loop, (i+1) mod L": (looped(lambda i: (i + 1) % L), np.roll(numbers, -1, 0)),
        "an index that is data": (lambda s, o: lax.scan(lambda c, i: (c, at(s, i)), None, o)[1], numbers[order]),
        "written at L-1-i": (written, numbers + 1),
        "gradient, fetched again": (gradient, np.stack([*expected[::-1], g])),
    }
    for name, (function, wanted) in ways.items():
        found = jax.device_get(compiled_here(function)(pinned(numbers), jnp.asarray(order)))
        yield {"way": name, "right": bool(np.array_equal(found, wanted)), "wrong_numbers": int((found != wanted).sum())}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as kept:
        selftest.check_streaming(jax.devices()[0], folder=Path(kept))
    yield {"way": "the engine's self-test", "right": True, "wrong_numbers": 0, "seconds": time.perf_counter() - start}


def places(resident: int) -> dict[str, Plan]:
    """Homes and forms as plans of bfloat16."""
    return {
        "device, unrolled": Plan(dtype="bfloat16"),
        "host, scan": Plan(dtype="bfloat16", home="host", form="scan"),
        "host, ahead": Plan(dtype="bfloat16", home="host", form="ahead"),
        "split, scan": Plan(dtype="bfloat16", home="split", form="scan", resident=resident),
    }


OF_LINK = 0.9  # of what the link alone would allow: asked of each streamed form that serves, at every number of rows
FROM_PYTHON = (
    "host, python"  # the walk over layers is Python's: a program a layer, its weights copied beside the one before
)
PYTHON_PLAN = Plan(dtype="bfloat16", home="host", form="python")


def one_pass(how: engine.Engine, params: Any, tokens: jax.Array) -> jax.Array:
    """One token of each row through all layers, keeping no cache."""
    attend = engine.plain(tokens, jnp.ones((tokens.shape[0],), jnp.int32))
    return engine.forward(how, params, tokens, attend, lay_out(params["banks"], lambda kind: ()))[0]


def pass_from_python(how: engine.Engine, params: Any, tokens: jax.Array) -> jax.Array:
    """The same from outside of compiled programs, as such a model's logits are computed."""
    attend = outside.plain(how, tokens, jnp.ones((tokens.shape[0],), jnp.int32))
    return outside.forward(how, params, tokens, attend, lay_out(params["banks"], lambda kind: ()))[0]


def pass_by_data(how: engine.Engine, params: Any, tokens: jax.Array, order: jax.Array) -> jax.Array:
    """The same with an index that is data, so that a kernel reads host memory in place of a copy engine."""
    attend = engine.plain(tokens, jnp.ones((tokens.shape[0],), jnp.int32))
    body, (bank,) = engine.layer_body(how, attend), params["banks"]

    def turn(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        weights = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), bank.weights[0])
        return body(bank.kinds[0], fetched(weights), x, ())[0], None

    return lax.scan(turn, engine.embed(how, params, tokens, attend), order)[0]


def passes(size: Size, folder: Path) -> Iterator[Row]:
    """ms for each layer in each form, at several numbers of rows, beside the limit; layers of Llama 3 8B."""
    del folder
    limits = Limits.measured(size)
    yield {"limits": limits.row()}
    raw, order = shape_8b(size, size.layers, 2048), jnp.arange(size.layers, dtype=jnp.int32)
    variants: dict[str, list[tuple[str, Any, tuple[Any, ...]]]] = {
        "device, unrolled": [("", compiled_here(one_pass, static_argnums=0), ())],
        "host, scan": [
            ("", compiled_here(one_pass, static_argnums=0), ()),
            (", read by a kernel", compiled_here(pass_by_data, static_argnums=0), (order,)),
        ],
        "host, ahead": [
            ("", compiled_here(one_pass, static_argnums=0), ()),
            (", double buffering", compiled_here(one_pass, static_argnums=0, options=engine.DOUBLED), ()),
        ],
        FROM_PYTHON: [("", pass_from_python, ())],
    }
    made = places(1) | {FROM_PYTHON: PYTHON_PLAN}
    for name, ways in variants.items():
        model = random_model(raw, made[name])
        for said, run, more in ways:
            for batch in (*size.batches, size.widest):
                tokens = jnp.zeros((batch, 1), jnp.int32)
                call = functools.partial(run, model.engine, model.params, tokens, *more)
                times = seconds(call, size.rounds)
                row = limits.of_pass(model, batch, times)
                asked = not said and row["streamed_bytes"] and batch in size.batches
                row |= aim("fraction_of_limit", OF_LINK, row["fraction_of_limit"]) if asked else {}
                yield {"form": name + said, **row}
        del model


def decoding(size: Size, folder: Path) -> Iterator[Row]:
    """tokens/s of the engine's own decode, beside the limit; layers of Llama 3 8B, a cache of a few hundred tokens. What int4
    gains where layers are streamed stands in its rows, beside what is asked of it at one row."""
    del folder
    limits = Limits.measured(size)
    yield {"limits": limits.row()}
    raw, streamed = shape_8b(size, size.layers, 2048), "host, scan"
    rates: dict[int, float] = {}
    made = places(max(1, size.layers // 4)) | {FROM_PYTHON: PYTHON_PLAN}
    for name, plan in (made | {f"{streamed}, int4": dataclasses.replace(made[streamed], weights="int4")}).items():
        model = random_model(raw, plan)
        for batch in size.batches:
            steps, values, _, stop_ids = greedy(batch)
            now, limit = begun(model, batch, 256), jnp.int32(size.steps)

            def run(model: Model = model, steps: Any = steps, values: Any = values, stop_ids: Any = stop_ids) -> Any:
                nonlocal now
                now, chosen, _ = model.runs.decode(
                    model.engine, steps, 0, model.params, now, values, stop_ids, limit  # noqa: B023
                )  # fmt: skip
                return chosen

            times = seconds(run, size.rounds)
            row = limits.of_pass(model, batch, [s / size.steps for s in times])
            if name == streamed:
                rates[batch] = row["tokens_per_s"]
            beside: Row = {}
            if "int4" in name:
                beside = {"over_bfloat16": row["tokens_per_s"] / rates[batch]}
                beside |= aim("over_bfloat16", STREAMED_INT4, beside["over_bfloat16"]) if batch == 1 else {}
            elif row["streamed_bytes"]:
                beside = aim("fraction_of_limit", OF_LINK, row["fraction_of_limit"])
            yield {"form": name, "steps_a_call": size.steps, **row, **beside}
        del model


OF_RESIDENT = 0.9  # of the resident rate, kept by steps whose layers are streamed
STREAMED_INT4 = 3.4  # times the tokens/s of streamed bfloat16: of bytes it is 3.9


def aim(of: str, least: float, got: float) -> Row:
    """What is asked of a row's field, and whether it is reached; nothing where there is no card."""
    return {"aim": least, "aim_of": of, "reached": got >= least} if on_gpu() else {}


def finetuning(size: Size, folder: Path) -> Iterator[Row]:
    """Steps of LoRA (rank 8 beside every matrix, AdamW, layers run again) over layers of Llama 3 8B: tokens/s, what part of the
    rate of a large product the step's own products are (mfu: forward and back to what came in, 4 operations a weight and
    token; hfu: with what is run again, 6), and of streamed layers the part of the resident rate that is kept."""
    del folder
    limits = Limits.measured(size)
    yield {"limits": limits.row()}
    raw, made = shape_8b(size, size.layers, 2048), places(1)
    for batch, context in size.tuned:
        vocabulary = raw["vocab_size"]
        drawn = np.random.default_rng(0).integers(3, vocabulary, ((2 + size.tuned_steps) * batch, context + 1))
        packed = pack(Documents.of([(row.tolist(), [True] * (context + 1)) for row in drawn]), context)
        resident = 0.0
        for name in ("device, unrolled", "host, scan", "host, ahead"):
            model = random_model(raw, made[name])
            settings = Settings(schedule="constant", warmup=0, batch=batch, context=context, epochs=1)
            run = Run(model, settings, packed)
            times = []
            for i in range(2 + size.tuned_steps):
                start = time.perf_counter()
                loss = next(run).loss
                if i >= 2:
                    times.append(time.perf_counter() - start)
            tokens, middle = batch * context, statistics.median(times)
            elements = sum(int(np.prod(s.shape)) for n, s in model.architecture.specs().items() if s.out is not None)
            elements -= vocabulary * model.config.hidden_size  # the embedding is looked up
            streamed = sum(layer_bytes(model.architecture, model.plan)) if model.plan.home != "device" else 0
            resident = resident or tokens / middle
            of_resident = tokens / middle / resident
            asked = streamed and tokens >= size.tuned_tokens
            yield {
                "form": name, "batch": batch, "context": context, "tokens_a_step": tokens, "loss": loss,
                "seconds": spread(times), "tokens_per_s": tokens / middle,
                "mfu": 4 * elements * tokens / middle / limits.matmul, "hfu": 6 * elements * tokens / middle / limits.matmul,
                "of_resident": of_resident, **(aim("of_resident", OF_RESIDENT, of_resident) if asked else {}),
                "link_limit_s": 2 * streamed / limits.link, "of_link_limit": 2 * streamed / limits.link / middle,
            }  # fmt: skip
            del model, run


IDENTITY = (
    "device, scan", "device, unrolled", "host, scan", "host, ahead", "split, scan", "split, ahead", "host, python",
    "disk, python",
)  # fmt: skip
SAME_BITS = {"host, scan": "device, scan", "disk, python": "host, python"}  # of the same programs


def by_name(plan: Plan, arch: Architecture, params: Any) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by name: numpy arrays."""
    found = dict(params["outer"])
    for part, bank in zip(plan.parts(arch), params["banks"], strict=True):
        for i in range(part.num_layers):
            found |= {f"layers.{part.start + i}.{n}": x for n, x in selftest.layer_of(bank, i).items()}
    return found


def identity_cases(size: Size) -> dict[str, dict[str, Any]]:
    """Configs by what their layers are."""
    more = {"vocab_size": 512} | dict(size.narrow)
    return {
        "like layers": LLAMA_8B | {"num_hidden_layers": 4} | more,
        "unlike layers": PERIODIC | {"num_hidden_layers": 8} | more,
    }


def identity(size: Size, folder: Path) -> Iterator[Row]:
    """Logits and gradients of streamed layers against resident ones, float32: the largest difference, and whether none. Of
    logits that come from the same programs (SAME_BITS) the same bits are asked; of all others, and of gradients, whose way
    back through streamed layers is a program of its own, that they are within what summing in another order gives: 2^-24 a
    term of the longest sum and layer, of the largest number. Layers on disk are those of a checkpoint of the same
    parameters; what Python drives has no gradients."""
    tokens, lengths = jnp.arange(64, dtype=jnp.int32).reshape(2, 32), jnp.asarray([32, 21], jnp.int32)

    def loss(params: Any, how: engine.Engine, seed: jax.Array) -> jax.Array:
        return (engine.score.function(how, params, tokens, lengths) * seed).sum()

    for case, raw in identity_cases(size).items():
        arch = architecture(raw)
        seed = jax.random.normal(jax.random.key(1), (2, 32, 512), jnp.float32)
        rounding, saved = 2.0**-24 * raw["intermediate_size"] * arch.num_layers, folder / case
        results: dict[str, dict[str, np.ndarray]] = {}
        for name in IDENTITY:
            where, form = name.split(", ")
            plan = Plan(
                dtype="float32", home=where, form=form, resident=arch.num_layers // 4 if where == "split" else 0
            )
            with jax.default_matmul_precision("highest"):
                if where == "disk":
                    if not saved.exists():
                        from_arrays(arch, Plan(dtype="float32"), Random(arch, "float32"), raw).save(saved)
                    model = load(saved, plan=plan)
                else:
                    model = from_arrays(arch, plan, Random(arch, "float32"), raw)
                logits = model.runs.score(model.engine, model.params, tokens, lengths)
                found = {"logits": np.asarray(jax.device_get(logits))}
                if form != "python":
                    grads = compiled_here(jax.grad(loss), static_argnums=1)(model.params, model.engine, seed)
                    found |= by_name(plan, arch, jax.device_get(grads))
            del model
            results[name] = found
            wanted = results[IDENTITY[0]]
            off = {n: float(abs(x - wanted[n]).max() / max(abs(wanted[n]).max(), 1e-30)) for n, x in found.items()}
            worst = max((n for n in off if n != "logits"), key=lambda n: off[n], default=None)
            row: Row = {
                "case": f"{case}, {name}", "layers": case, "form": name, "logits_off": off["logits"],
                "gradient_off": None if worst is None else off[worst], "worst": worst, "rounding": rounding,
                "same_bits": all(np.array_equal(x, wanted[n]) for n, x in found.items()),
            }  # fmt: skip
            asked = {}
            if (like := SAME_BITS.get(name)) in results:
                row |= {"like": like, "logits_of_like": np.array_equal(found["logits"], results[like]["logits"])}
                asked["logits_of_like"] = 1
            if len(results) > 1:
                row["of_rounding"] = max(off.values()) / rounding
                row["within_rounding"] = row["of_rounding"] <= 1
                asked["within_rounding"] = 1
            yield row | ({"aims": asked} if asked and on_gpu() else {})


def memory_plans(size: Size) -> tuple[dict[str, Any], dict[str, Plan]]:
    """(config, plans) whose bytes are planned, compiled and measured."""
    streamed = {n: p for n, p in places(size.memory_layers // 3).items() if p.home != "device"}
    return shape_8b(size, size.memory_layers, size.vocabulary), streamed


def card_here(folder: Path) -> cards.Card:
    """The card that `machine` has found, for who runs without it."""
    return cards.find((folder / "card").read_text()) if (folder / "card").exists() else cards.CARDS["H200"]


def program(size: Size, folder: Path) -> Iterator[Row]:
    """A small program compiled for this card without it, left for `serialised`. Runs without the card."""
    del size
    card = card_here(folder)
    with aot.target(card) as target:
        stack, x = small_program_arguments()
        place = functools.partial(NamedSharding, target.mesh, PartitionSpec())
        given = (
            jax.ShapeDtypeStruct(stack.shape, stack.dtype, sharding=place(memory_kind="pinned_host")),
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place()),
        )
        compiled = target.compile(jax.jit(small_program), *target.place(given))
        payload, _, _ = serialize_executable.serialize(compiled)
    (folder / "program").write_bytes(payload)
    yield {"program": "a scan over host memory", "serialised_bytes": len(payload), "card": card.name}


def plans(size: Size, folder: Path) -> Iterator[Row]:
    """Bytes of prefill and decode by arithmetic, and as XLA compiles them for this card without it. Runs without the card."""
    raw, made = memory_plans(size)
    arch, batch, length, card = architecture(raw), size.memory_batch, size.memory_length, card_here(folder)
    for name, plan in made.items():
        n = need(arch, plan, batch=batch, context=length)
        yield {"form": name, "program": "prefill", "arithmetic": n.device, "parts": dataclasses.asdict(n)}
    for name, plan in made.items():
        for p in proof.prove(arch, plan, card, batch=batch, length=length):
            yield {
                "form": name, "program": p.program, "compiled": p.device, "compiled_host": p.host,
                "temporaries": p.temporaries, "compile_seconds": p.seconds, "problems": list(p.report.problems),
                "card": card.name,
            }  # fmt: skip


def memory(size: Size, folder: Path, name: str) -> Iterator[Row]:
    """What the card's allocator says was used at most, after decode and then after prefill, which needs more."""
    del folder
    raw, made = memory_plans(size)
    device, batch, length = jax.devices()[0], size.memory_batch, size.memory_length

    def used() -> dict[str, int]:
        return device.memory_stats() or {}

    start = time.perf_counter()
    model = random_model(raw, made[name])
    jax.block_until_ready(model.params)
    before = used().get("peak_bytes_in_use")
    yield {"form": name, "program": "loading", "peak": before, "standing": used().get("bytes_in_use"),
           "seconds": time.perf_counter() - start}  # fmt: skip
    steps, values, keys, stop_ids = greedy(batch)
    tokens, lengths = jnp.zeros((batch, length), jnp.int32), jnp.full((batch,), length - 8, jnp.int32)

    def measured(program: str, run: Callable[..., Any], how: tuple[Any, ...], given: tuple[Any, ...]) -> Row:
        nonlocal before
        compiled = run.lower(model.engine, *how, *given).compile()  # pyright: ignore[reportFunctionMemberAccess]
        jax.block_until_ready(compiled(*given))
        peak = used().get("peak_bytes_in_use")
        row = {"form": name, "program": program, "peak": peak, "compiled_here": aot.device_bytes(compiled)}
        if peak is not None and peak == before:
            row["hidden"] = "no more than what was used before it: this program's own peak is not known"
        before = peak
        return row

    # the last reference to what is donated must not be ours
    state = [begun(model, batch, length)]
    yield measured("decode", engine.decode, (steps, 0), (model.params, state.pop(), values, stop_ids, jnp.int32(4)))
    prompts = (model.params, tokens, lengths, values, keys, stop_ids)
    yield measured("prefill", engine.prefill, (steps, length, 1, 0), prompts)


def overlap(size: Size, folder: Path) -> Iterator[Row]:
    """Whether an eager copy from pinned memory runs beside an executable that was started before it, or after it."""
    del folder
    host, m = pinned(np.zeros(size.copies[-1], np.uint8)), random_matrix(size.matmul)
    product = compiled_here(lambda m, n: lax.fori_loop(0, n, lambda _, y: y @ m, m))
    copy = functools.partial(jax.device_put, host, kind())
    copying = statistics.median(seconds(copy, size.rounds))
    each = statistics.median(seconds(lambda: product(m, jnp.int32(4)), size.rounds)) / 4
    n = jnp.int32(min(max(1, round(3 * copying / each)), 10**5))
    computing = statistics.median(seconds(lambda: product(m, n), size.rounds))
    ways: dict[str, Callable[[], Any]] = {
        "copy started after": lambda: (product(m, n), copy()),
        "copy started before": lambda: (copy(), product(m, n)),
    }
    for name, run in ways.items():
        times = seconds(run, size.rounds)
        hidden = (computing + copying - statistics.median(times)) / copying
        yield {
            "way": name, "copy_s": copying, "compute_s": computing, "both_s": spread(times),
            "part_of_the_copy_that_was_hidden": hidden,
        }  # fmt: skip


def views(size: Size, folder: Path) -> Iterator[Row]:
    """Whether a file can be read straight into an array in pinned memory, and what that saves."""
    nbytes = size.copies[-1]
    numbers, path = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8), folder / "bytes"
    path.write_bytes(numbers.tobytes())
    descriptor = os.open(path, os.O_RDONLY)

    def pointer(x: jax.Array) -> np.ndarray:
        address = x.addressable_data(0).unsafe_buffer_pointer()
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def read(into: np.ndarray) -> None:
        view, done = memoryview(into), 0
        while done < nbytes:
            done += os.preadv(descriptor, [view[done : done + 64 * MiB]], done)

    ways: dict[str, Callable[[Any], np.ndarray]] = {"dlpack": np.from_dlpack, "pointer": pointer}
    try:
        for name, view_of in ways.items():
            row: Row = {"way": name, "bytes": nbytes}
            try:
                array = jax.block_until_ready(pinned(np.zeros(nbytes, np.uint8)))
                view = view_of(array)
                row["writable"] = view.flags.writeable
                row["same_memory"] = view.ctypes.data == array.addressable_data(0).unsafe_buffer_pointer()
                if view.flags.writeable:
                    times = seconds(lambda view=view: read(view), size.rounds)
                    row["read_GBps"] = rate(nbytes, times)
                    row["right_on_device"] = bool(np.array_equal(jax.device_put(array, kind()), numbers))
                    copy = functools.partial(jax.device_put, array, kind())
                    row["to_device_GBps"] = rate(nbytes, seconds(copy, size.rounds))
            except Exception as error:  # the next way may do
                row["error"] = f"{type(error).__name__}: {error}"
            yield row
        buffer = np.zeros(nbytes, np.uint8)

        def staged() -> jax.Array:
            read(buffer)
            return pinned(buffer)

        yield {
            "way": "numpy, copied to pinned",
            "bytes": nbytes,
            "read_GBps": rate(nbytes, seconds(staged, size.rounds)),
        }
        yield {"way": "numpy alone", "bytes": nbytes,
               "read_GBps": rate(nbytes, seconds(lambda: read(buffer), size.rounds))}  # fmt: skip
    finally:
        os.close(descriptor)


def small_program(stack: jax.Array, x: jax.Array) -> jax.Array:
    """A scan that streams four matrices from host memory."""
    return lax.scan(lambda x, w: (fetched(w) @ x, None), x, stack)[0]


def small_program_arguments() -> tuple[np.ndarray, np.ndarray]:
    stack = np.stack([np.roll(np.eye(256, dtype=np.float32), i + 1, 0) for i in range(4)])
    return stack, np.arange(256, dtype=np.float32)[:, None]


def serialised(size: Size, folder: Path) -> Iterator[Row]:
    """Executables stored as bytes: compiled on this card, and compiled without one."""
    del size
    stack, x = small_program_arguments()
    given = (pinned(stack), jax.device_put(x, kind()))
    wanted = np.roll(x, 10, 0)
    jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    compiled = compiled_here(small_program).lower(*given).compile()
    compiling = time.perf_counter() - start
    trees = jax.tree.structure((given, {})), jax.tree.structure(given[1])

    def loaded(payload: bytes) -> Row:
        start = time.perf_counter()
        program = serialize_executable.deserialize_and_load(payload, *trees, execution_devices=jax.devices()[:1])
        loading = time.perf_counter() - start
        right = bool(np.array_equal(program(*given), wanted))
        return {"bytes": len(payload), "compile_seconds": compiling, "load_seconds": loading, "right": right}

    yield {"compiled": "on this device", **loaded(serialize_executable.serialize(compiled)[0])}
    stored = folder / "program"
    if not on_gpu():
        yield {"compiled": "without the card", "left_out": "there is no GPU to load it on"}
    elif not stored.exists():
        yield {"compiled": "without the card", "left_out": "`program` left none: see its error"}
    else:
        yield {"compiled": "without the card", **loaded(stored.read_bytes())}


def conditional(size: Size, folder: Path) -> Iterator[Row]:
    """What a condition in a loop costs that fetches from host memory what is not on the device: every turn, or never."""
    del folder
    E, S, N = 16, 4, size.copies[0] // 4
    experts = pinned(np.arange(E, dtype=np.float32)[:, None] * np.ones((1, N), np.float32))

    def run(experts: jax.Array, slots: jax.Array, held: jax.Array, ids: jax.Array, *, ask: bool) -> Any:
        def fetch(slots: jax.Array, slot: jax.Array, i: jax.Array) -> jax.Array:
            found = fetched(lax.dynamic_index_in_dim(experts, i, keepdims=False))
            return lax.dynamic_update_index_in_dim(slots, found, slot, 0)

        def turn(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            slots, held = carry
            slot = i % S
            if ask:
                slots = lax.cond(held[slot] == i, lambda s, *_: s, fetch, slots, slot, i)
            held = held.at[slot].set(i)
            return (slots, held), lax.dynamic_index_in_dim(slots, slot, keepdims=False)[0]

        (slots, held), out = lax.scan(turn, (slots, held), ids)
        return slots, held, out

    first = np.arange(S, dtype=np.int32)
    ids = {
        "never": np.resize(first, size.slots),
        "every turn": np.resize(np.concatenate([first + S, first]), size.slots),
    }
    found: dict[str, float] = {}
    for name, ask, misses in (
        ("no condition", False, "never"),
        ("no miss", True, "never"),
        ("all misses", True, "every turn"),
    ):
        program = compiled_here(functools.partial(run, ask=ask), donate_argnums=(1, 2))
        chosen, held = jnp.asarray(ids[misses]), jnp.asarray(first)
        slots = jax.device_put(np.arange(S, dtype=np.float32)[:, None] * np.ones((1, N), np.float32), kind())

        def call(program: Any = program, chosen: jax.Array = chosen) -> Any:
            nonlocal slots, held
            slots, held, out = program(experts, slots, held, chosen)
            return out

        times = seconds(call, size.rounds)
        right = bool(np.array_equal(call(), ids[misses].astype(np.float32)))
        found[name] = statistics.median(times) / size.slots
        row: Row = {"way": name, "right": right, "us_a_turn": spread([1e6 * s / size.slots for s in times])}
        if misses == "every turn":
            row["fetched_GBps"] = 4 * N / found[name] / 1e9
            row["us_a_miss"] = 1e6 * (found[name] - found["no miss"])
        elif ask:
            row["us_a_condition"] = 1e6 * (found[name] - found["no condition"])
        yield row


def kept(size: Size, row: Row) -> Row:
    """A row of the card's table, which has it from now on."""
    if not (size.tables and on_gpu()):
        return row
    return row | {"table": str(dispatch.write_table(jax.devices()[0].device_kind, [row]))}


def names_of(every: Iterable[str]) -> list[str]:
    """Implementations to ask for by name: without a card the one that is there too."""
    return [n for n in every if n != "reference"] if on_gpu() else ["xla"]


PROBED = "mosaic_gpu"  # waits for barriers: one too many, and it never comes back, nor does the process


def probe(size: Size, folder: Path) -> Iterator[Row]:
    """Whether the kernel that has barriers of its own comes back, and with which numbers: apart from all that would hang with
    it. Leaves a file for `attention_rows`."""
    import bench_attention as bench  # here: it is a script, and asks for all that models need

    for case in bench.prefills(size.probed, size.table_heads, jnp.dtype(jnp.bfloat16), [PROBED, "xla"], ["forward"]):
        sides = {n: side for n, side in case.sides.items() if n in (bench.XLA, bench.OURS + PROBED)}
        found = bench.compared(case._replace(sides=sides), 1, bench.Limits(None, None), {})
        off = {r.by: r.off for r in found.rows} | found.wrong
        yield told(case, found) | {"off": off.get(bench.OURS + PROBED)}
    (folder / PROBED).touch()


def told(case: Any, found: Any) -> Row:
    """What goes wrong in a case stands beside what goes well."""
    row: Row = {"case": case.what, "shape": case.shape}
    row |= {n: v for n, v in (("wrong", found.wrong), ("left_out", found.left_out)) if v}
    return row | ({"unchecked": found.unchecked} if found.unchecked else {})


def attention_rows(size: Size, folder: Path, cases: Callable[[Any, Any], Iterator[Any]]) -> Iterator[Row]:
    """A row a case: of each implementation its milliseconds, beside cuDNN and XLA, rate, fraction of the limit and aim."""
    import bench_attention as bench

    memory, matmul = bench.bandwidth(size.read), bench.matmul_rate(size.matmul, jnp.dtype(jnp.bfloat16))
    yield {"limits": {"memory_GBps": memory / 1e9, "matmul_TFLOPs": matmul / 1e12}}
    hangs = on_gpu() and not (folder / PROBED).exists()

    def chosen(case: Any) -> Any:
        """Without the kernel that does not come back, and without `ours`, which is one of the others, where those stand."""
        spared = {"ours"} if on_gpu() and case.key is not None else set()
        spared |= {bench.OURS + PROBED} if hangs else set()
        return case._replace(sides={n: side for n, side in case.sides.items() if n not in spared})

    every = (chosen(case) for case in cases(bench, jnp.dtype(jnp.bfloat16)))
    for case, found in bench.measured(every, size.table_rounds, bench.Limits(memory, matmul)):
        if hangs and case.flops is not None:
            found.left_out[bench.OURS + PROBED] = f"`attention: {PROBED}` did not come back from its first calls"
        row = bench.measured_row(case, found)
        sides = [{n: v for n, v in r._asdict().items() if v is not None} for r in found.rows]
        yield ({} if row is None else kept(size, row)) | told(case, found) | {"sides": sides}


def prompts_of(size: Size, direction: str, bench: Any, dtype: Any) -> Iterator[Any]:
    """The width that is asked for most in all lengths, what cuDNN refuses, and the other widths."""
    (first, *others), how = size.table_heads, (names_of(bench.NAMES), [direction])
    yield from bench.prefills(size.table_tokens, [first], dtype, *how)
    yield from bench.refused(size.table_refused, dtype, *how, H=first)
    yield from bench.prefills(size.table_tokens, others, dtype, *how)


def caches_of(size: Size, bench: Any, dtype: Any) -> Iterator[Any]:
    """All kinds of the width that is asked for most, in the order in which they are."""
    kinds = ("raw", "int8", "raw, pages of 64", "raw, pages of 16", "int8, pages of 64", "int4")
    assert set(kinds) == set(bench.KINDS)
    yield from bench.decodes(size.table_slots, size.table_heads, kinds, dtype, names_of(bench.DECODE_NAMES))


def attention_forward(size: Size, folder: Path) -> Iterator[Row]:
    """Prompts, forwards: fractions of a large product's rate, and of cuDNN's."""
    return attention_rows(size, folder, functools.partial(prompts_of, size, "forward"))


def attention_backward(size: Size, folder: Path) -> Iterator[Row]:
    """The pullback alone, and with the forward before it, which is what the card's table has."""
    return attention_rows(size, folder, functools.partial(prompts_of, size, "backward"))


def decode_attention(size: Size, folder: Path) -> Iterator[Row]:
    """One token over caches of all kinds: fractions of the memory's rate, and of raw caches' times."""
    return attention_rows(size, folder, functools.partial(caches_of, size))


PRODUCTS_PROBED = f"products, {PROBED}"  # the file that says that this op's came back


def product_groups(size: Size, bench: Any) -> list[tuple[list[Any], tuple[int, ...]]]:
    """(kinds, numbers of rows), what is asked most first: kinds with aims at few rows, which is where the aims are."""
    usual = {n: bench.Kind.usual(n) for n in bench.GROUPS}
    aimed = [usual.pop(n) for n in bench.AIMS]
    bare = [usual.pop(n) for n in ("int5", "int3", "int2")]  # of which there is no kernel
    affine, *others = bench.OTHERS
    others, (few, more, most) = [*others, *bare], size.table_rows
    served = [affine, *usual.values()]
    groups = [(aimed, few), (aimed, more), (served, few), (served, more), (others, few), (others, more), (aimed, most)]
    return [(kinds, rows) for kinds, rows in groups if rows]


def product_rows(size: Size, cases: Iterable[Any]) -> Iterator[Row]:
    """A row a case: of each implementation its milliseconds, GB/s of codes and scales, fraction of the memory's rate, and ratios
    to bfloat16 in cuBLAS and to XLA's best form; of what serves the aims."""
    for kind, row, found in cases:
        sides = [{n: v for n, v in r._asdict().items() if v not in (None, {})} for r in found.rows]
        known = {n: v for n in ("wrong", "left_out", "unchecked") if (v := getattr(found, n))}
        case = {"case": str(kind), "dense_milliseconds": found.beside}
        yield ({} if row is None else kept(size, row)) | case | known | {"sides": sides}


def probe_products(size: Size, folder: Path) -> Iterator[Row]:
    """As `probe`, of quantised matrices."""
    import bench_quant as bench

    groups = [([bench.Kind.usual(n) for n in ("int4", "int8", "fp8")], size.probed_rows)]
    shapes, names = size.table_matrices[:1], (PROBED, *names_of(("xla",)))
    untold, dtype = dataclasses.replace(size, tables=False), jnp.dtype(jnp.bfloat16)
    for row in product_rows(untold, bench.measured(groups, shapes, 1, dtype, 1.0, (), names, size.table_bytes)):
        times = {s["implementation"]: s["ms"] for s in row["sides"]}  # of one round: no more is said of them
        yield {n: v for n, v in row.items() if n in ("case", "rows", "wrong", "left_out", "unchecked")} | {"ms": times}
    (folder / PRODUCTS_PROBED).touch()


def products(size: Size, folder: Path, which: int) -> Iterator[Row]:
    """Rows times quantised matrices of one shape, of every kind."""
    import bench_quant as bench

    limit = bench.bandwidth(size.read)
    distinct = bench.distinct_bytes() if size.table_bytes is None else size.table_bytes
    yield {"limits": {"memory_GBps": limit / 1e9}, "distinct_bytes": distinct}
    hangs = on_gpu() and not (folder / PRODUCTS_PROBED).exists()
    asked = bench.GPU_NAMES if on_gpu() else bench.XLA
    names, shapes = [n for n in asked if not (hangs and n == PROBED)], [size.table_matrices[which]]
    dtype = jnp.dtype(jnp.bfloat16)
    cases = bench.measured(
        product_groups(size, bench), shapes, size.rounds, dtype, limit, ("bfloat16",), names, distinct
    )
    for row in product_rows(size, cases):
        if hangs:
            row["left_out"] = row.get("left_out", {}) | {PROBED: "it did not come back from its first calls"}
        yield row


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A name, what yields its rows, the most seconds it may take, and whether it needs the card.

    shares: it has more rows than time, the first first: it takes its part, by its limit, of what is left for it and those
    after it, and no error that it was not done.
    """

    name: str
    rows: Callable[[Size, Path], Iterator[Row]]
    limit: int
    on_card: bool = True
    shares: bool = False


MEASUREMENTS = (
    Measurement("machine", machine, 60),
    Measurement("transfers", transfers, 60),
    Measurement("slices", slices, 90),
    # short, and before what may take all that is left on a slow card
    Measurement("overlap", overlap, 45),
    Measurement("views", views, 45),
    Measurement("program", program, 45, on_card=False),
    Measurement("serialised", serialised, 45),
    Measurement("conditional", conditional, 60),
    Measurement("passes", passes, 180),
    Measurement("plans", plans, 150, on_card=False),
    *(Measurement(f"memory: {name}", functools.partial(memory, name=name), 90) for name in memory_plans(TINY)[1]),
    Measurement("decoding", decoding, 150),
    Measurement("finetuning", finetuning, 120),
    Measurement("identity", identity, 150),
    # what takes what is left
    Measurement(f"attention: {PROBED}", probe, 60),
    Measurement("attention: forward", attention_forward, 200, shares=True),
    Measurement("attention: backward", attention_backward, 200, shares=True),
    Measurement("attention: decode", decode_attention, 160, shares=True),
    Measurement(f"quant_matmul: {PROBED}", probe_products, 45),
    *(
        Measurement(f"quant_matmul: {N}x{K}", functools.partial(products, which=i), 160, shares=True)
        for i, (N, K) in enumerate(FULL.table_matrices)
    ),
)
FEWEST = 40  # seconds below which one that shares has hardly started


def seconds_for(measurement: Measurement, after: Iterable[Measurement], left: float) -> float:
    """How long it may take where so many seconds are left."""
    most = min(measurement.limit, left)
    if not measurement.shares:
        return most
    part = left * measurement.limit / (measurement.limit + sum(m.limit for m in after))
    return min(most, max(part, FEWEST))


# --- running them ---------------------------------------------------------------------------------------------------


def measure(name: str, size: Size, folder: Path, rows: Path) -> None:
    """One measurement in this process: each row is a line of the file `rows` as soon as it is known."""
    (found,) = (m for m in MEASUREMENTS if m.name == name)
    with rows.open("a", encoding="utf-8") as file:
        for row in found.rows(size, folder):
            file.write(json.dumps(row) + "\n")
            file.flush()


def apart(measurement: Measurement, given: Sequence[str], folder: Path, limit: float) -> Row:
    """One measurement in a process of its own, which is given these options too: its rows, its seconds, and its error if it
    had one; `cut` where it shares the time and had more to do."""
    rows = folder / f"{re.sub('[^a-z]+', '-', measurement.name)}.rows"
    command = [sys.executable, __file__, "--child", measurement.name, "--out", str(rows), *given]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    if not measurement.on_card:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    start, error, cut = time.perf_counter(), "", False
    with (folder / "said").open("w+", encoding="utf-8", errors="replace") as said:
        try:
            ended = subprocess.run(command, env=environment, stdout=said, stderr=said, timeout=limit).returncode
            if ended:
                said.seek(0)
                error = f"ended with {ended}: {said.read()[-3000:]}"
        except subprocess.TimeoutExpired:
            error, cut = f"not done after {limit:.0f} s", measurement.shares
    text = rows.read_text(encoding="utf-8") if rows.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # a process may be ended in the middle of one
    found: Row = {"seconds": time.perf_counter() - start, "rows": [json.loads(line) for line in lines]}
    if cut and lines:
        return found | {"cut": error}
    return found | ({"error": error} if error else {})


PLANNED = ("compiled", "arithmetic")  # without the card
AGREES = 0.95  # the peak is within 5 % of each, whichever is more


def against_plan(results: Mapping[str, Row]) -> list[Row]:
    """The bytes measured, beside those that were planned and compiled without the card."""
    planned: dict[tuple[str, str], Row] = {}
    for row in results.get("plans", {}).get("rows", []):
        if "form" in row:
            planned.setdefault((row["form"], row["program"]), {}).update(row)
    joined = []
    for name, result in results.items():
        for row in result["rows"] if name.startswith("memory: ") else []:
            known = planned.get((row["form"], row["program"]), {})
            sizes = {n: known[n] for n in ("compiled", "arithmetic") if n in known}
            sizes |= {n: row[n] for n in ("compiled_here",) if n in row}
            if row.get("peak") and sizes:
                more = {f"peak_of_{n}": row["peak"] / size for n, size in sizes.items()}
                # a program that needs less than one before it has a peak that is not known
                known = {n: size for n, size in sizes.items() if n in PLANNED and "hidden" not in row}
                more |= {f"agrees_with_{n}": 1 - abs(row["peak"] / size - 1) for n, size in known.items()}
                said = {k: row[k] for k in ("form", "program", "peak", "hidden") if k in row} | sizes | more
                joined.append(said | {"aims": {f"agrees_with_{n}": AGREES for n in sizes if n in PLANNED}})
    return joined


def aims(results: Mapping[str, Row]) -> list[Row]:
    """Everything that something is asked of, in rows, in their sides, and in the bytes beside the plan's: what, how much,
    what it is, whether it is reached."""
    found: list[Row] = []
    for name, result in (dict(results) | {"memory against plan": {"rows": against_plan(results)}}).items():
        for row in result["rows"]:
            for side in (row, *row.get("sides", ())):
                asked = side.get("aims") or ({side["aim_of"]: side["aim"]} if "aim_of" in side else {})
                what = row.get("case", row.get("form"))
                case = [what, side.get("program"), side.get("shape"), side.get("rows", side.get("batch"))]
                for of, least in asked.items():
                    found.append({
                        "measurement": name, "case": ", ".join(str(c) for c in case if c is not None),
                        "by": side.get("by") or side.get("implementation"), "of": of, "aim": least, "got": side.get(of),
                        "reached": None if side.get(of) is None else side[of] >= least,
                    })  # fmt: skip
    return found


def write(path: Path, report: Row) -> None:
    with output_file(path, overwrite=True) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def chosen_measurements(only: str) -> list[Measurement]:
    """Those named, in full or by what stands before the colon, and `machine` before them, and before attention's and those of
    quantised matrices the probe that they look at; UsageError for a name that there is not."""
    names = [n.strip() for n in only.split(",") if n.strip()]
    whole, known = {m.name for m in MEASUREMENTS}, {m.name.partition(":")[0] for m in MEASUREMENTS}
    for op in ("attention", "quant_matmul"):
        if any(n.startswith(f"{op}: ") for n in names):
            names.append(f"{op}: {PROBED}")
    known |= whole
    if unknown := [n for n in names if n not in known]:
        raise click.UsageError(f"--only: there is no {unknown[0]!r}; the measurements are {', '.join(sorted(known))}")
    wanted = {*names, "machine"} if names else known
    return [m for m in MEASUREMENTS if {m.name, m.name.partition(":")[0]} & wanted]


def run_all(out: Path | None, tiny: bool, only: str, minutes: float, keep_tables: bool = False) -> Path:
    """All measurements, one after another; the file is written anew after each. Gives its path.

    keep_tables: the card's table stays as it is.
    """
    console, start = Console(stderr=True), time.perf_counter()
    chosen = chosen_measurements(only)
    if out is not None and out.exists():
        raise click.UsageError(f"--out: {out} is there already, and results are not written over; give another name")
    note = "tiny sizes, to see that it runs: no measurement" if tiny else ""
    given = ["--tiny"] * tiny + ["--keep-tables"] * keep_tables
    results: dict[str, Row] = {}
    report: Row = {
        "suite": "scripts/gpu_suite.py", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tiny": tiny, "note": note, "measurements": results,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gpu_suite.") as temporary:
        folder = Path(temporary)
        for i, measurement in enumerate(chosen, 1):
            left = 60 * minutes - (time.perf_counter() - start)
            console.print(f"{i}/{len(chosen)} {measurement.name}, {left:.0f} s left", highlight=False)
            if left < 10:
                found: Row = {"seconds": 0.0, "rows": [], "error": f"left out: {minutes:g} minutes are over"}
            else:
                found = apart(measurement, given, folder, seconds_for(measurement, chosen[i:], left))
            results[measurement.name] = found
            for row in found["rows"]:
                line = json.dumps(row)
                console.print(f"    {line[:200]}", highlight=False, markup=False, soft_wrap=True)
            if said := found.get("error") or found.get("cut"):
                style = "red" if "error" in found else "dim"
                console.print(f"    {said[-400:]}", style=style, highlight=False, markup=False, soft_wrap=True)
            if measurement.name == "machine":
                here = found["rows"][0] if found["rows"] else {}
                if not here.get("gpu") and not tiny:
                    why = found.get("error") or f"jax sees {here.get('card')!r}"
                    raise click.UsageError(
                        f"There is no GPU here ({why}); --tiny runs the same on tiny sizes, which measures nothing"
                    )
                if here.get("gpu"):
                    (folder / "card").write_text(here["card"], encoding="utf-8")
                if out is None:
                    card = re.sub(r"[^a-z0-9]+", "-", str(here.get("card", "unknown")).lower()).strip("-")
                    moment = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M%S")
                    out = ROOT / "scripts" / "results" / f"{card}-{moment}.json"
            report["memory_against_plan"] = against_plan(results)
            report["aims"] = aims(results)
            report["seconds"] = time.perf_counter() - start
            if out is not None:
                write(out, report)
    assert out is not None
    failed = [n for n, r in results.items() if "error" in r or "cut" in r]
    console.print(f"{out}: {len(results) - len(failed)} of {len(results)} measurements whole", highlight=False)
    if asked := report["aims"]:
        for missed in (a for a in asked if a["reached"] is not True):
            got = "not measured" if missed["got"] is None else f"{missed['got']:.3g}"
            said = f"    {missed['measurement']}, {missed['case']}, {missed['by']}: {got} {missed['of']}, of {missed['aim']:g}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        console.print(f"{sum(a['reached'] is True for a in asked)} of {len(asked)} aims reached", highlight=False)
    return out


@click.command(**SETTINGS)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="scripts/results/<card>-<date>.json",
    help="Where results go: a new file.",
)
@click.option("--tiny", is_flag=True, help="Tiny sizes, on whatever device there is: to see that it runs.")
@click.option(
    "--only", metavar="NAMES", default="", show_default="all", help="Some measurements, by name, with commas."
)
@click.option("--minutes", metavar="N", type=click.FloatRange(0, min_open=True), default=9.5, help="When to stop.")
@click.option(
    "--keep-tables",
    is_flag=True,
    help="Leave the card's table, which decides what serves, as it is: --table of bench_attention.py and bench_quant.py"
    " measures it with more care, and without this option its rows of the same cases are written over.",
)
@click.option("--child", hidden=True, default="", help="Run this one here, and write its rows to --out.")
@reported()
def main(out: Path | None, tiny: bool, only: str, minutes: float, keep_tables: bool, child: str) -> None:
    """Everything that only a card can say."""
    if not child:
        run_all(out, tiny, only, minutes, keep_tables)
        return
    assert out is not None
    start_jax()
    try:
        size = TINY if tiny else FULL
        measure(child, dataclasses.replace(size, tables=size.tables and not keep_tables), out.parent, out)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
