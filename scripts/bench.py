"""Speed of prefill and decode beside what else runs on this machine, in one run, with the physical limit.

    python scripts/bench.py                      our engine alone
    python scripts/bench.py --peer transformers  the same weights in transformers (eager), runs interleaved
    python scripts/bench.py --contract           the forms of one matmul that weights/base.py chooses between

The model is random: only its shapes matter. Every round runs each side once, and medians over rounds are compared, so
that a machine whose speed drifts slows both. Decode reads every weight once a step: its limit is bytes of weights over
the memory bandwidth that is measured in the same run (a parallel read of an array far larger than the caches). Prefill's
limit is the matmul rate that is measured in the same run.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxengine import engine, sampling
from jaxengine.architecture import architecture, initialise
from jaxengine.command import A_FILE, SETTINGS, reported, start_jax
from jaxengine.loading import from_arrays
from jaxengine.model import Model
from jaxengine.plan import Plan, weight_bytes
from jaxengine.weights import base

SHAPE_125M = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 768,
    "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "dtype": "float32",
}  # fmt: skip


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def memory_bandwidth() -> float:
    """Bytes/s of reading 512 MiB with all cores: the best of a row maximum, a sum, and a matrix times a vector."""
    x, v = jnp.ones((2**15, 2**12), jnp.float32), jnp.ones((2**12,), jnp.float32)
    reads = [jax.jit(lambda x: x.max(-1)), jax.jit(lambda x: x.sum()), jax.jit(lambda x: x @ v)]
    for read in reads:
        read(x).block_until_ready()
    return x.nbytes / min(seconds(functools.partial(read, x)) for _ in range(7) for read in reads)


def matmul_rate() -> float:
    """Float32 multiply-adds x 2 per second of a 2048^3 matmul, the best of several."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * 2048**3 / min(seconds(lambda: product(x, x)) for _ in range(5))


class Ours:
    """Prefill and decode as `Model.generate` calls them, greedy."""

    def __init__(self, model: Model, batch: int, prompt: int, new: int):
        how = [sampling.Sampling()] * batch
        self.model, self.steps = model, sampling.Steps.of(how)
        self.values = sampling.values(self.steps, how)
        self.length, self.new = engine.bucket(prompt + new, least=64), new
        rng = np.random.default_rng(0)
        self.ids = rng.integers(3, model.config.vocab_size, (batch, prompt))
        self.lengths = model._put(np.full(batch, prompt, np.int32))
        self.keys = sampling.row_keys(0, [0] * batch)
        self.stop_ids = model._put(np.asarray([-1], np.int32))

    def prefill(self) -> Any:
        m, padded = self.model, np.zeros((len(self.ids), engine.bucket(self.ids.shape[1])), np.int32)
        padded[:, : self.ids.shape[1]] = self.ids
        return engine.prefill(
            m.engine, self.steps, self.length, 1, 0, m.params, m._put(padded), self.lengths, self.values, self.keys,
            self.stop_ids,
        )  # fmt: skip

    def decode(self, now: Any) -> list[int]:
        """`new` - 1 more tokens after prefill's first."""
        m, left, tokens = self.model, self.new - 1, []
        while left > 0:
            limit = min(left, engine.CHUNK)
            now, chosen, _ = engine.decode(
                m.engine, self.steps, 0, m.params, now, self.values, self.stop_ids, jnp.int32(limit)
            )
            tokens += np.asarray(chosen.token)[0, :limit].tolist()
            left -= limit
        return tokens

    def round(self) -> tuple[float, float, list[int]]:
        """(seconds of prefill, seconds of decode, the first row's tokens)."""
        start = time.perf_counter()
        now, first = jax.block_until_ready(self.prefill())
        middle = time.perf_counter()
        head = np.asarray(first.token).tolist()[:1]  # before decode, which is given the state to write over
        tokens = head + self.decode(now)
        return middle - start, time.perf_counter() - middle, tokens


class Transformers:
    """The same weights in transformers, eager: one forward for the prompt, one for each token, with its own cache."""

    def __init__(self, folder: str, ids: np.ndarray, new: int):
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

        self.torch, self.new = torch, new
        torch.set_num_threads(os.cpu_count() or 1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids = torch.tensor(ids)

    def round(self) -> tuple[float, float, list[int]]:
        """(seconds of prefill, seconds of decode, the first row's tokens)."""
        with self.torch.no_grad():
            start = time.perf_counter()
            out = self.model(self.ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)
            middle = time.perf_counter()
            tokens = [int(token[0])]
            for _ in range(self.new - 1):
                out = self.model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1)
                tokens.append(int(token[0]))
            return middle - start, time.perf_counter() - middle, tokens


def bench_model(
    config: dict[str, Any], batches: list[int], prompt: int, new: int, rounds: int, peer: bool, plan: Plan
) -> None:
    """Print the table of prefill and decode for each batch size, and one JSON line for each."""
    console = Console()
    arch = architecture(config)
    bandwidth, flops = memory_bandwidth(), matmul_rate()
    model = from_arrays(arch, plan, initialise(arch, 0), config)
    size = sum(weight_bytes(arch, plan)[k] for k in ("outer", "layers"))
    embedding = config["vocab_size"] * config["hidden_size"] * np.dtype(plan.dtype).itemsize
    read = size - (0 if config.get("tie_word_embeddings") else embedding)  # an untied embedding is read one row a token
    weights = read / np.dtype(plan.dtype).itemsize
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    console.print(f"jax {jax.__version__} on {jax.devices()[0].device_kind} ({cores}), {read / 1e6:.0f} MB read a step")
    console.print(f"memory {bandwidth / 1e9:.1f} GB/s, float32 matmul {flops / 1e9:.0f} GFLOP/s, measured in this run")
    table = Table("batch", "phase", "side", "tokens/s", "GB/s or GFLOP/s", "of limit", "ratio to peer")
    with tempfile.TemporaryDirectory() as folder:
        if peer:
            model.save(folder, overwrite=True)
        for batch in batches:
            ours = Ours(model, batch, prompt, new)
            sides: dict[str, Any] = {"jaxengine": ours}
            if peer:
                sides["transformers"] = Transformers(folder, ours.ids, new)
            first = {name: side.round() for name, side in sides.items()}  # compiles, warms up
            if peer and first["jaxengine"][2] != first["transformers"][2]:
                console.print("[red]the two sides chose different tokens[/red]")
            times: dict[str, list[Any]] = {name: [] for name in sides}
            for _ in range(rounds):
                for name, side in sides.items():
                    times[name].append(side.round()[:2])
            for i, phase in enumerate(("prefill", "decode")):
                tokens = batch * (prompt if i == 0 else new - 1)
                median = {n: statistics.median(t[i] for t in ts) for n, ts in times.items()}
                for name, s in median.items():
                    rate, limit = (2 * weights * tokens / s, flops) if i == 0 else (read * (new - 1) / s, bandwidth)
                    ratio = median.get("transformers", float("nan")) / s if name == "jaxengine" else 1.0
                    shown = f"{rate / 1e9:.1f}"
                    table.add_row(
                        str(batch), phase, name, f"{tokens / s:.0f}", shown, f"{rate / limit:.0%}", f"{ratio:.2f}"
                    )
                    row = {
                        "batch": batch, "phase": phase, "side": name, "tokens_per_s": tokens / s, "rate": rate,
                        "limit": limit, "rounds": rounds, "plan": json.loads(plan.to_json()), "jax": jax.__version__,
                    }  # fmt: skip
                    print(json.dumps(row))
    console.print(table)


def bench_contract(rounds: int) -> None:
    """The forms of one matmul: GB/s of weights read, for a 2048 x 768 matrix at several numbers of rows."""
    table = Table("dtype", "rows", "einsum GB/s", "contract GB/s", title="24 matrices of 2048 x 768, one after another")
    for dtype in (jnp.float32, jnp.bfloat16):
        keys = jax.random.split(jax.random.key(0), 24)
        up = [(0.03 * jax.random.normal(k, (2048, 768), jnp.float32)).astype(dtype) for k in keys]
        down = [w.T.copy() for w in up]
        size = sum(w.nbytes for w in up + down)
        for rows in (1, 2, 8, 16, 64, 256):
            x = jnp.ones((rows, 768), dtype)

            found = []
            for dot in (jnp.einsum, base.contract):
                run = _chain(dot)
                run(x, up, down).block_until_ready()
                times = [_timed(run, x, up, down) for _ in range(rounds)]
                found.append(size / statistics.median(times) / 1e9)
            table.add_row(jnp.dtype(dtype).name, str(rows), *(f"{f:.1f}" for f in found))
    Console().print(table)


def _chain(dot: Callable[..., Any]) -> Callable[..., Any]:
    """Rows through matrices up and down, each result the next one's input."""

    def run(x: Any, up: Any, down: Any) -> Any:
        for u, d in zip(up, down, strict=True):
            x = x + dot("bi,oi->bo", jax.nn.relu(dot("bi,oi->bo", x, u)), d)
        return x

    return jax.jit(run)


def _timed(run: Callable[..., Any], *given: Any) -> float:
    return seconds(lambda: run(*given))


@click.command(**SETTINGS)
@click.option("--peer", type=click.Choice(["transformers"]), help="Run the same weights there too, interleaved.")
@click.option("--batch", metavar="B", type=click.IntRange(1), multiple=True, default=(1, 8), help="Batch sizes.")
@click.option("--prompt", metavar="N", type=click.IntRange(1), default=128, help="Tokens of prompt.")
@click.option(
    "--new", metavar="N", type=click.IntRange(2), default=64, help="Tokens generated, prefill's first among them."
)
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=7, help="Rounds, whose medians are printed.")
@click.option(
    "--config",
    type=A_FILE,
    metavar="FILE",
    show_default="a Llama of 125 M parameters",
    help="A config.json to take the shapes from.",
)
@click.option("--contract", is_flag=True, help="Measure only the forms of one matmul.")
@click.option("--dtype", metavar="DTYPE", default="float32", help="Compute in float32, bfloat16 or float16.")
@click.option("--weights", metavar="FORMAT", default="dense", help="Format of the weights: dense, int8.")
@click.option("--home", metavar="HOME", default="device", help="Where layers live: device, host.")
@click.option(
    "--form", metavar="FORM", default="", show_default="the home's own", help="How layers run: unrolled, scan."
)
@reported()
def main(
    peer: str | None,
    batch: tuple[int, ...],
    prompt: int,
    new: int,
    rounds: int,
    config: Path | None,
    contract: bool,
    dtype: str,
    weights: str,
    home: str,
    form: str,
) -> None:
    """Speed of prefill and decode on this machine, with its limits, and beside transformers."""
    if contract:
        bench_contract(rounds)
        return
    shape = json.loads(config.read_text()) if config else SHAPE_125M
    plan = Plan(dtype=dtype, weights=weights, home=home, form=form)
    bench_model(shape, list(batch), prompt, new, rounds, peer is not None, plan)


if __name__ == "__main__":
    start_jax()
    main()
