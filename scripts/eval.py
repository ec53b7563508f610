"""Measures the demo checkpoint under any plan: bits per byte on held-out Python source, and each task's accuracy.

    python scripts/eval.py [FOLDER] [--weights int8] [--kv int8] [--samples 200] [--json FILE]

Bits per byte come from `Model.logits` (the weights alone: no cache is read back); answers come from greedy
`Model.generate`, so they pass through the cache as a user's text does. Every figure stands with its standard error over
the sample: binomial for a task, between windows for the text. Two plans asked with the same samples and seed see the
same questions, so that their difference is finer than these errors say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import demo_tasks as tasks
import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

import jaxengine
from jaxengine.command import SETTINGS, load, loads, reported, resolve, start_jax

BATCH = 32
TEXT = "bits per byte"


@dataclass(frozen=True)
class Figure:
    """A mean over `samples` windows or questions, and its standard error."""

    value: float
    error: float
    samples: int


def evaluate(
    model: jaxengine.Model,
    tokenizer: Tokenizer,
    samples: int,
    seed: int = 0,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Figure]:
    """Figures by name: TEXT, then every task of demo_tasks. `done` is called with each name as it is finished."""
    figures = {TEXT: bits_per_byte(model, tokenizer, samples, seed)}
    done(TEXT)
    for task in tasks.TASKS:
        figures[task] = accuracy(model, tokenizer, task, samples, seed)
        done(task)
    return figures


def bits_per_byte(model: jaxengine.Model, tokenizer: Tokenizer, samples: int, seed: int = 0) -> Figure:
    """Cross-entropy of at most `samples` held-out windows, each with nothing before it, in bits per byte of text."""
    windows = tasks.text_windows(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    windows = random.Random(seed).sample(windows, min(samples, len(windows)))
    bos = tokenizer.token_to_id(tasks.BOS)
    # byte-level BPE spells each byte as one character
    size_V = np.array([len(str(tokenizer.id_to_token(i))) for i in range(tokenizer.get_vocab_size())])
    bits: list[float] = []
    for start in range(0, len(windows), BATCH):
        ids_BT = np.array([[bos, *ids] for ids in windows[start : start + BATCH]])
        logits_BTV = np.asarray(model.logits(ids_BT[:, :-1]), np.float64)
        top_BT = logits_BTV.max(axis=-1)
        total_BT = top_BT + np.log(np.exp(logits_BTV - top_BT[..., None]).sum(axis=-1))
        chosen_BT = np.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
        bits += ((total_BT - chosen_BT).sum(axis=-1) / math.log(2)).tolist()
    sizes = [int(size_V[ids].sum()) for ids in windows]
    value, n = sum(bits) / sum(sizes), len(windows)
    # of a ratio of sums: the residuals' spread over the mean size
    residuals = [b - value * s for b, s in zip(bits, sizes, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / max(1, n - 1) / n) / (sum(sizes) / n)
    return Figure(value, error, n)


def accuracy(model: jaxengine.Model, tokenizer: Tokenizer, task: str, samples: int, seed: int = 0) -> Figure:
    """The share of held-out questions whose greedy continuation is the answer, exactly."""
    examples = tasks.examples(task, "held_out", samples, seed)
    prompts = [tokenizer.encode(example.prompt).ids for example in examples]
    longest = max(len(tokenizer.encode(e.answer + e.stop, add_special_tokens=False).ids) for e in examples)
    right = 0
    for start in range(0, samples, BATCH):
        completions = model.generate(prompts[start : start + BATCH], max_new_tokens=longest, temperature=0.0)
        batch = examples[start : start + BATCH]
        right += sum(e.is_right(c.text) for e, c in zip(batch, completions, strict=True))
    value = right / samples
    return Figure(value, math.sqrt(value * (1 - value) / samples), samples)


@click.command(**SETTINGS)
@click.argument("folder", default="demo")
@loads
@click.option(
    "--samples",
    metavar="N",
    type=click.IntRange(2),
    default=200,
    help="Questions of each task, and at most so many windows of text.",
)
@click.option("--seed", type=int, default=0, help="Chooses the questions and the windows.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the figures to this file.",
)
@reported()
def main(folder: str, samples: int, seed: int, json_file: Path | None, **loading: Any) -> None:
    """Print the table of figures of a checkpoint under a plan.

    FOLDER is the demo model if not given, else a checkpoint folder that was trained on the same tasks.
    """
    path = Path(resolve(folder))
    vocabulary = path / "tokenizer.json"
    if not vocabulary.is_file():
        raise click.BadParameter(
            f"{vocabulary} is not there; the tasks need the tokenizer of the demo checkpoint", param_hint="FOLDER"
        )
    tokenizer = Tokenizer.from_file(str(vocabulary))
    missing = [token for token in tasks.SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise click.BadParameter(
            f"{vocabulary} has no {', '.join(missing)}: its model was not trained on these tasks; "
            "give a folder made by scripts/train_demo.py or converted from one",
            param_hint="FOLDER",
        )
    model = load(folder, **loading)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("evaluating", total=1 + len(tasks.TASKS))
        figures = evaluate(model, tokenizer, samples, seed, lambda name: progress.advance(bar))

    device = f"{jax.devices()[0].device_kind} ({len(jax.devices())}), Python {platform.python_version()}"
    table = Table("figure", "value", "standard error", "samples", title=f"{path}\n{device}", title_justify="left")
    for name, figure in figures.items():
        table.add_row(name, f"{figure.value:.4f}", f"{figure.error:.4f}", str(figure.samples))
    console.print(table)
    console.print(str(model.plan), highlight=False, markup=False)
    if json_file is not None:
        written: dict[str, Any] = {
            "folder": str(path),
            "plan": json.loads(model.plan.to_json()),
            "device": device,
            "jax": jax.__version__,
            "seed": seed,
            "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        }
        json_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start_jax()
    main()
