"""Time and memory of a LoRA step beside peft, on the same weights and rows, in one run.

    python scripts/bench_finetune.py                     our engine alone
    python scripts/bench_finetune.py --peer peft         peft and torch too, steps interleaved

The model is random: only its shapes matter. Each side is a process of its own, so that the most memory that it ever held (VmHWM,
which the system counts) is its own; what it held before its first step, weights and programs among it, is said apart.
Both adapt every matrix of the layers, with AdamW, clipping at norm 1 and a constant rate; float32 adapters, and everything
else in --dtype. Of a round each side makes two steps, of which the second counts: in the first a process comes back from having
waited, when the system may have taken its memory away. Medians over rounds are compared. The first losses are printed: B is zero
then, and they agree where both sides compute the same thing.

A step of LoRA takes 4 multiply-adds a weight and token (forward, and back to what came in), 6 where layers are run again
(remat 'full'); the limit is the float32 matmul rate that is measured in the same run.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from bench import SHAPE_125M, matmul_rate
from rich.console import Console
from rich.table import Table

from jaxengine.architecture import architecture, initialise
from jaxengine.command import A_FILE, SETTINGS, reported, start_anew_with_large_pages, start_jax
from jaxengine.finetune.data import Batches, Documents, Packed, pack
from jaxengine.finetune.run import Run, Settings
from jaxengine.loading import from_arrays, load
from jaxengine.plan import Plan
from jaxengine.walk import REMAT

RANK, ALPHA, RATE = 8, 16.0, 1e-4


def held(most: bool = False) -> int:
    """Bytes of this process that stand in memory, or the most that ever did."""
    name = "VmHWM:" if most else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise click.ClickException("this system has no /proc/self/status, which says what a process holds")


def rows(vocab: int, batch: int, context: int, steps: int) -> Packed:
    """Rows of random tokens for so many steps, all of them learned but each row's first."""
    made = np.random.default_rng(0).integers(3, vocab, (steps * batch, context + 1))
    return pack(Documents.of([(row.tolist(), [True] * (context + 1)) for row in made]), context)


def model_of(shape: dict[str, Any], dtype: str) -> Any:
    """The random model, the same each time."""
    arch = architecture(shape)
    return from_arrays(arch, Plan(dtype=dtype), initialise(arch, 0), shape)


class Ours:
    """`Run`, without a folder of its own."""

    def __init__(
        self, shape: dict[str, Any], folder: str, packed: Packed, batch: int, dtype: str, remat: str, form: str
    ):
        del shape
        settings = Settings(
            rank=RANK, alpha=ALPHA, learning_rate=RATE, schedule="constant", warmup=0, compute=dtype, remat=remat,
            batch=batch, context=packed.context, epochs=1,
        )  # fmt: skip
        self.run = Run(load(folder, dtype=dtype, form=form), settings, packed)

    def step(self) -> float:
        return next(self.run).loss


class Peft:
    """The loop that peft's documentation shows, with gradient checkpointing where ours runs layers again."""

    def __init__(
        self, shape: dict[str, Any], folder: str, packed: Packed, batch: int, dtype: str, remat: str, form: str
    ):
        import torch  # pyright: ignore[reportMissingImports]
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

        del shape, form
        torch.set_num_threads(os.cpu_count() or 1)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        base.config.use_cache = False
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).train()
        if remat != "none":
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, RATE, weight_decay=0.0)
        self.torch, self.batches = torch, Batches(packed, batch)

    def step(self) -> float:
        given = next(self.batches)
        ids = self.torch.from_numpy(np.concatenate([given["tokens"], given["targets"][:, -1:]], 1).astype(np.int64))
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


SIDES = {"jaxengine": Ours, "peft": Peft}


def child(pipe: Any, side: str, *given: Any) -> None:
    """A side's process: asked for a 'first' or 'second' step, it makes one and says (loss, seconds); for '', what it held."""
    made = SIDES[side](*given)
    before = held()
    pipe.send(before)
    while what := pipe.recv():
        if what == "first":
            time.sleep(0.5)  # threads of the other side may wait for more work, by turning round
        start = time.perf_counter()
        loss = made.step()
        pipe.send((loss, time.perf_counter() - start))
    pipe.send(held(most=True))


def answer(name: str, process: Any, pipe: Any) -> Any:
    """What a side's process says next."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        raise click.ClickException(f"{name}'s process ended ({process.exitcode}); what it said is above") from None


def measure(
    shape: dict[str, Any], batch: int, context: int, dtype: str, remat: str, form: str, rounds: int, peer: bool
) -> dict[str, dict[str, Any]]:
    """{side: losses, seconds of the steps that count, bytes before and at most}."""
    spawn, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        model_of(shape, dtype).save(folder, overwrite=True)
        given = shape, folder, rows(shape["vocab_size"], batch, context, 2 * rounds + 2), batch, dtype, remat, form
        sides = {}
        for name in ("jaxengine", "peft") if peer else ("jaxengine",):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=child, args=(theirs, name, *given), daemon=True)
            process.start()
            theirs.close()
            found[name] = {"before": answer(name, process, ours), "losses": [], "seconds": []}
            sides[name] = process, ours
        for turn in range(rounds + 1):  # the first compiles
            for name, (process, pipe) in sides.items():
                for what in ("first", "second"):
                    pipe.send(what)
                    loss, seconds = answer(name, process, pipe)
                    found[name]["losses"].append(loss)
                    if turn and what == "second":
                        found[name]["seconds"].append(seconds)
        for name, (process, pipe) in sides.items():
            pipe.send("")
            found[name]["most"] = answer(name, process, pipe)
            process.join()
    return found


@click.command(**SETTINGS)
@click.option("--peer", type=click.Choice(["peft"]), help="Make the same steps there too, interleaved.")
@click.option("--batch", metavar="B", type=click.IntRange(1), default=4, help="Rows of a step.")
@click.option("--context", metavar="T", type=click.IntRange(2), default=256, help="Tokens of a row.")
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=7, help="Steps, whose medians are printed.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), multiple=True, default=("float32", "bfloat16"))
@click.option(
    "--remat", type=click.Choice([r for r in REMAT if r != "offload"]), multiple=True, default=("none", "full"),
    help="What is kept of a layer for its way back.",
)  # fmt: skip
@click.option(
    "--form", "given", type=click.Choice(["scan", "unrolled"]), show_default="as `jaxengine finetune` takes it on a CPU",
    help="How our layers run.",
)  # fmt: skip
@click.option(
    "--config",
    type=A_FILE,
    metavar="FILE",
    show_default="a Llama of 125 M parameters",
    help="A config.json to take the shapes from.",
)
@reported()
def main(
    peer: str | None,
    batch: int,
    context: int,
    rounds: int,
    dtype: tuple[str, ...],
    remat: tuple[str, ...],
    given: str | None,
    config: Path | None,
) -> None:
    """Time and memory of a LoRA step, and beside peft's."""
    if peer and (lack := [n for n in ("peft", "torch", "transformers") if importlib.util.find_spec(n) is None]):
        raise click.BadParameter(f"{', '.join(lack)} is not installed: pip install '.[oracle]'", param_hint="--peer")
    shape = json.loads(config.read_text()) if config else SHAPE_125M
    console, rate = Console(), matmul_rate()
    arch = architecture(shape)
    matrices = sum(int(np.prod(s.shape)) for n, s in arch.params().items() if s.out is not None and n != "embedding")
    console.print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores); float32"
        f" matmul {rate / 1e9:.0f} GFLOP/s in this run; {batch} x {context} tokens, rank {RANK}"
    )
    table = Table(
        "dtype", "remat", "side", "s a step", "GFLOP/s", "of limit", "ratio to peer", "MB before", "MB at most"
    )
    for kind in dtype:
        for kept in remat:
            form = given or ("scan" if kept == "full" else "unrolled")
            found = measure(shape, batch, context, kind, kept, form, rounds, peer is not None)
            median = {name: statistics.median(side["seconds"]) for name, side in found.items()}
            for name, side in found.items():
                flops = (4 if kept == "none" else 6) * matrices * batch * context / median[name]
                ratio = f"{median['peft'] / median[name]:.2f}" if peer else ""
                table.add_row(
                    kind, kept, name, f"{median[name]:.2f}", f"{flops / 1e9:.0f}", f"{flops / rate:.0%}", ratio,
                    f"{side['before'] / 1e6:.0f}", f"{side['most'] / 1e6:.0f}",
                )  # fmt: skip
                print(
                    json.dumps({"dtype": kind, "remat": kept, "side": name, "loss": side["losses"][0], **side}),
                    flush=True,
                )
    console.print(table)


if __name__ == "__main__":
    start_anew_with_large_pages()  # both sides' processes then have them
    start_jax()
    main()
