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
from typing import Annotated, Any

import demo_tasks as tasks
import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

import jaxengine
from jaxengine.plan import Plan

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


def main(
    folder: Annotated[Path | None, typer.Argument(help="a checkpoint folder; the demo model if not given")] = None,
    weights: Annotated[str | None, typer.Option(help="weight format: dense, int8")] = None,
    kv: Annotated[str | None, typer.Option(help="how the KV cache is stored: raw, int8")] = None,
    kv_layout: Annotated[str | None, typer.Option(help="which tokens sliding-window layers keep: window, full")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the file's)")] = None,
    home: Annotated[str | None, typer.Option(help="where layers live: device, host")] = None,
    form: Annotated[str | None, typer.Option(help="the form of the walk: unrolled, scan")] = None,
    memory: Annotated[str | None, typer.Option(help="a budget such as 16GB, which chooses the home")] = None,
    mesh: Annotated[str | None, typer.Option(help="several devices, such as data=2,tensor=4")] = None,
    sharding: Annotated[str | None, typer.Option(help="the table of sharding rules")] = None,
    plan: Annotated[Path | None, typer.Option(help="a plan as JSON; the options above go before its fields")] = None,
    samples: Annotated[int, typer.Option(help="questions a task, and at most so many windows of text", min=2)] = 200,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Print the table of figures of a checkpoint under a plan."""
    path = folder or Path(jaxengine.demo_folder())
    vocabulary = path / "tokenizer.json"
    if not vocabulary.is_file():
        raise typer.BadParameter(f"{vocabulary} is not there; the tasks need the tokenizer of the demo checkpoint")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    missing = [token for token in tasks.SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise typer.BadParameter(
            f"{vocabulary} has no {', '.join(missing)}: its model was not trained on these tasks; "
            "give a folder made by scripts/train_demo.py or converted from one"
        )
    given = None if plan is None else Plan.from_json(plan.read_text(encoding="utf-8"))
    model = jaxengine.load(
        path, plan=given, memory=memory, weights=weights, dtype=dtype, mesh=mesh, sharding=sharding, home=home,
        form=form, kv=kv, kv_layout=kv_layout,
    )  # fmt: skip
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
    typer.run(main)
