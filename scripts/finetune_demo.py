"""The demo checkpoint taught something it cannot do, in every way of fine-tuning: accuracy, loss, time.

    python scripts/finetune_demo.py                                  the table
    python scripts/finetune_demo.py --only lora --only lisa --plot losses.svg

The task is to write four words in reverse order ("reverse: north gold rice\\n= rice gold north"). The demo model can copy, and
cannot do this: every word of the answer is further from its source than the one before it. Questions are drawn at random
from 40 words; those of the training file and those it is judged by are disjoint, by a checksum as in demo_tasks.py. The loss is
taken on the answers alone. All ways see the same rows in the same order, for as many steps; learning rates differ by what is
trained, and are in the table.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import jax
from demo_tasks import VALUES, split_of
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import jaxengine
from checkpoints.output import output_file
from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.finetune import data
from jaxengine.finetune.run import Run, Settings

WORDS, CONTEXT = 4, 128
# of Okabe and Ito (2008), and one of Tol (2021)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288")
SHARED: dict[str, Any] = {"batch": 16, "context": CONTEXT, "compute": "float32", "warmup": 0.05}


@dataclasses.dataclass(frozen=True)
class Way:
    """What is trained, over weights of which format and in which home."""

    settings: Settings
    loading: dict[str, Any]


WAYS = {
    "full": Way(Settings(train="all", learning_rate=1e-3, **SHARED), {}),
    "full, layers on the host": Way(Settings(train="all", learning_rate=1e-3, **SHARED), {"home": "host"}),
    "lora": Way(Settings(rank=16, alpha=32.0, learning_rate=5e-3, **SHARED), {}),
    "dora": Way(Settings(train="dora", rank=16, alpha=32.0, learning_rate=5e-3, **SHARED), {}),
    "qlora (nf4)": Way(Settings(rank=16, alpha=32.0, learning_rate=5e-3, **SHARED), {"weights": "nf4"}),
    "lisa": Way(Settings(train="lisa", layers=2, every=10, learning_rate=1e-3, **SHARED), {"form": "scan"}),
    "badam": Way(Settings(train="badam", layers=1, every=10, learning_rate=1e-3, **SHARED), {"form": "scan"}),
}


def questions(split: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, none twice."""
    rng, found = random.Random(f"reverse {split} {seed}"), {}
    while len(found) < count:
        words = rng.sample(VALUES, WORDS)
        if split_of(asked := " ".join(words)) == split:
            found[f"reverse: {asked}\n="] = f" {' '.join(reversed(words))}\n"
    return list(found.items())


def accuracy(model: jaxengine.Model, count: int) -> float:
    """The share of held-out questions whose greedy continuation begins with the answer."""
    asked = questions("held_out", count)
    given = model.generate([prompt for prompt, _ in asked], max_new_tokens=WORDS + 2, stop="\n")
    return sum(c.text.strip() == answer.strip() for c, (_, answer) in zip(given, asked, strict=True)) / count


def learn(way: Way, file: Path, steps: int, judged: int) -> dict[str, Any]:
    """One way: what it trained, how long it took, what came out."""
    model = jaxengine.load(jaxengine.demo_folder(), dtype="float32", **way.loading)
    before = accuracy(model, judged)
    assert model.tokenizer is not None
    rows = data.pack(data.read(file, data.Rows(model.tokenizer)), CONTEXT)
    settings = dataclasses.replace(way.settings, steps=steps, epochs=0)
    start, worked = time.perf_counter(), time.process_time()
    with Run(model, settings, rows) as run:
        made = run.run()
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        after = accuracy(run.tuned(), judged)
        memory = run.memory()
    last = [r.loss for r in made[-10:]]
    return {
        "before": before, "after": after, "loss": sum(last) / len(last), "losses": [r.loss for r in made],
        "seconds": seconds, "cpu_seconds": worked, "steps": steps, "learning_rate": settings.learning_rate, "bytes": memory,
    }  # fmt: skip


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Losses over steps, each the mean of the ten before it, and the accuracies afterwards."""
    from matplotlib import rc_context  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token of the answer", yscale="log")
    axes.set_title("the demo checkpoint learns to write four words in reverse order", loc="left", fontsize=11)
    for i, (name, row) in enumerate(sorted(found.items(), key=lambda f: -f[1]["after"])):
        losses = row["losses"]
        smooth = [sum(losses[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(losses))]
        label = f"{name}: {row['after']:.1%}"
        # every other line is broken and lies above the rest: two that are the same are both seen
        how: dict[str, Any] = {"ls": "--", "zorder": 3} if i % 2 == 0 else {"ls": "-", "zorder": 2}
        axes.plot(range(1, len(losses) + 1), smooth, COLOURS[i % len(COLOURS)], label=label, **how)
    axes.legend(frameon=False, title="right afterwards", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else None  # the same losses give the same file
    with output_file(path, overwrite=True) as work, rc_context({"svg.hashsalt": "jaxengine"}):
        figure.savefig(work, format=path.suffix[1:], metadata=metadata, dpi=150)


@click.command(**SETTINGS)
@click.option("--only", metavar="WAY", multiple=True, type=click.Choice(list(WAYS)), help="A way; several times.")
@click.option("--steps", metavar="N", type=click.IntRange(1), default=150, help="Steps of each.")
@click.option("--judged", metavar="N", type=click.IntRange(1), default=200, help="Held-out questions.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the losses into FILE.svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reported()
def main(only: tuple[str, ...], steps: int, judged: int, plot: Path | None, as_json: bool) -> None:
    """Teach the demo checkpoint to write words in reverse order, in every way of fine-tuning."""
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise click.BadParameter(f"{plot} ends neither in .svg nor in .png", param_hint="--plot")
    console = Console(stderr=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reverse.jsonl"
        rows = ({"prompt": p, "completion": a} for p, a in questions("train", 20_000))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in only or WAYS:
            with console.status(name):
                found[name] = learn(WAYS[name], file, steps, judged)
    if plot is not None:
        draw(found, plot)
    where = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}"
    if as_json:
        print(json.dumps({"made_by": where, "ways": found}, indent=2))
        return
    table = Table(box=SIMPLE_HEAD)
    for column in ("way", "right before", "after", "loss at the end", "rate", "seconds", "of CPUs"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in found.items():
        table.add_row(
            name, f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['loss']:.4f}", f"{row['learning_rate']:g}",
            f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}",
        )  # fmt: skip
    Console().print(
        f"{where}; {steps} steps of 16 rows of {CONTEXT} tokens; {judged} questions", table, highlight=False
    )


if __name__ == "__main__":
    start_jax()
    main()
