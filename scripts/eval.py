"""Measures the demo checkpoint under any plan: bits per byte on held-out Python source, and each task's accuracy.

    python scripts/eval.py [FOLDER] [--weights int8] [--kv int8] [--samples 200] [--json FILE]
    python scripts/eval.py [FOLDER] --table [--of int8 --of "int4 by gptq" ...] [--samples 200] [--markdown FILE]

Bits per byte come from `Model.logits` (the weights alone: no cache is read back); answers come from greedy
`Model.generate`, so they pass through the cache as a user's text does. Every figure stands with its standard error over
the sample: binomial for a task, between windows for the text. Two plans asked with the same samples and seed see the
same questions, so that their difference is finer than these errors say. --table shows it for one weight format after
another: bits per byte above the first one's, window by window, with the error of the difference. "int4 by gptq" is int4 whose
codes are chosen by text (`jaxengine quantize`), the files of Python's library that are not held out: 64 rows of 256 tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from jaxengine.calibration.grid import FORMATS as CHOSEN
from jaxengine.calibration.run import METHODS, quantize
from jaxengine.command import SETTINGS, load, loads, reported, resolve, start_jax
from jaxengine.formats import find
from jaxengine.plan import parameter_bytes

BATCH = 32
TEXT = "bits per byte"
# about from most bytes to fewest; the first is what the others are held against. kquant is what GGUF's K types are held as;
# its codes are chosen here by rounding alone, where llama.cpp searches for steps: a file's are better
FORMATS = (
    "dense", "lossless", "int8:outliers=8", "kquant:bits=6", "int8", "fp8", "fp8:scale=tensor", "fp8:scale=block128",
    "fp8:dtype=e5m2", "kquant:bits=5", "int5", "kquant", "nf4:double=false", "int4:group_size=32", "int4:affine=true", "mxfp4",
    "nf4", "int4:group_size=64", "int4:group_size=64 by gptq", "int4:group_size=64 by awq", "int4", "kquant:bits=3",
    "int3:affine=true", "int3", "int3 by gptq", "int3 by awq", "kquant:bits=2", "int2:affine=true", "int2", "int2 by gptq",
)  # fmt: skip
TRAIN_FILES = 40  # of text that codes are chosen by: rows are drawn from them
BY = " by "  # between a format and the method that chooses its codes by text
# of tasks, by how their names begin
GROUPS = {"recall": "recall", "copy": "copy", "sums": ("addition", "subtraction"), "chat": "chat"}


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
    bits, sizes = text_bits(model, tokenizer, samples, seed)
    return per_byte(bits, sizes)


def text_bits(
    model: jaxengine.Model, tokenizer: Tokenizer, samples: int, seed: int = 0
) -> tuple[list[float], list[int]]:
    """(bits, bytes of text) of each window."""
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
    return bits, [int(size_V[ids].sum()) for ids in windows]


def per_byte(bits: Sequence[float], sizes: Sequence[int]) -> Figure:
    """The sum of these over the sum of bytes; bits may be a difference of two models'."""
    value, n = sum(bits) / sum(sizes), len(sizes)
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


@dataclass(frozen=True)
class Row:
    """A weight format: bits a weight of the matrices in layers, bytes of the model, bits per byte, and those above the first
    row's; accuracies by group of tasks."""

    format: str
    bits: float
    nbytes: int
    text: Figure
    above: Figure
    groups: dict[str, float]


def rows(
    folder: str, formats: Sequence[str], tokenizer: Tokenizer, samples: int, seed: int, loading: dict[str, Any]
) -> Iterator[Row]:
    """A row for each format, the first being what the others are held against."""
    first: list[float] = []
    for text in formats:
        model = loaded(folder, text, seed, loading)
        bits, sizes = text_bits(model, tokenizer, samples, seed)
        first = first or bits
        above = per_byte([b - a for a, b in zip(first, bits, strict=True)], sizes)
        found = {task: accuracy(model, tokenizer, task, samples, seed).value for task in tasks.TASKS}
        each = {g: [v for task, v in found.items() if task.startswith(names)] for g, names in GROUPS.items()}
        groups = {g: sum(values) / len(values) for g, values in each.items()}
        row = Row(text, *weight_size(model), per_byte(bits, sizes), above, groups)
        del model
        jax.clear_caches()  # each program of XLA:CPU holds maps of memory, of which Linux gives a process 65,530
        yield row


def loaded(folder: str, text: str, seed: int, loading: dict[str, Any]) -> jaxengine.Model:
    """The checkpoint in a format, rounded to nearest, or by the method that is named with it."""
    weights, by, method = text.partition(BY)
    if not by:
        given: dict[str, Any] = loading | {"weights": weights}
        return load(folder, **given)
    with tempfile.TemporaryDirectory() as temporary:
        written, out = Path(temporary) / "train.txt", Path(temporary) / "quantized"
        written.write_text("\n".join(itertools.islice((t for _, t in tasks.text_files("train")), TRAIN_FILES)))
        quantize(resolve(folder), written, weights=weights, method=method, out=out, samples=64, context=256, seed=seed,
                 dtype=loading.get("dtype"))  # fmt: skip
        return load(str(out), **loading)


def check_format(text: str) -> None:
    """An error for a format, or a method of choosing its codes, that there is not."""
    weights, by, method = text.partition(BY)
    found = find(weights)
    if by and method not in METHODS:
        raise click.BadParameter(f"{text!r}: codes are chosen by {' or '.join(METHODS)}", param_hint="--of")
    if by and found.name not in CHOSEN:
        said = f"{text!r}: codes are chosen by text in {', '.join(CHOSEN)}; others are rounded to nearest"
        raise click.BadParameter(said, param_hint="--of")


def weight_size(model: jaxengine.Model) -> tuple[float, int]:
    """(bits a weight of the layers' matrices, bytes of all parameters), what is not quantised in the checkpoint's own dtype."""
    specs = model.architecture.specs()
    plan = dataclasses.replace(model.plan, dtype=model.origin.dtypes["embedding"])
    sizes = {name: parameter_bytes(plan, name, spec) for name, spec in specs.items()}
    matrices = [n for n, s in specs.items() if n.startswith("layers.") and s.out is not None]
    weights = sum(math.prod(specs[n].shape) for n in matrices)
    return 8 * sum(sizes[n] for n in matrices) / weights, sum(sizes.values())


def cells(row: Row) -> list[str]:
    """A row as it is shown."""
    above = "" if row.above.error == row.above.value == 0 else f"{row.above.value:+.4f} ± {row.above.error:.4f}"
    shares = [f"{share:.3f}" for share in row.groups.values()]
    return [row.format, f"{row.bits:.2f}", f"{row.nbytes / 1e6:.2f}", f"{row.text.value:.4f}", above, *shares]


HEAD = ("weights", "bits", "MB", TEXT, "above the first", *GROUPS)


def markdown(found: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [list(HEAD), ["---", *["---:"] * (len(HEAD) - 1)], *map(cells, found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
@click.option("--table", "as_table", is_flag=True, help="One row a weight format, each held against the first.")
@click.option("--of", "formats", metavar="FORMAT", multiple=True, help="With --table: these formats, in this order.")
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --table: also write it to this file.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the figures to this file.",
)
@reported()
def main(
    folder: str,
    samples: int,
    seed: int,
    as_table: bool,
    formats: tuple[str, ...],
    markdown_file: Path | None,
    json_file: Path | None,
    **loading: Any,
) -> None:
    """Print the table of figures of a checkpoint under a plan.

    FOLDER is the demo model if not given, else a checkpoint folder that was trained on the same tasks.
    """
    if as_table and loading["weights"] is not None:
        raise click.UsageError(f"--table takes its formats from --of: say --of {loading['weights']}")
    if not as_table and (formats or markdown_file is not None):
        raise click.UsageError("--of and --markdown belong to --table: say --table too.")
    for text in formats:
        check_format(text)  # before the first is measured
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
    device = f"{jax.devices()[0].device_kind} ({len(jax.devices())}), Python {platform.python_version()}"
    console = Console()
    if as_table:
        kept = {"folder": str(path), "device": device, "jax": jax.__version__, "seed": seed, "samples": samples}
        found: list[Row] = []
        show = lambda line: print("  ".join(f"{cell:<26}" for cell in line).rstrip(), flush=True)  # noqa: E731
        print(f"{path}, {samples} samples, {device}")
        show(HEAD)
        for row in rows(folder, formats or FORMATS, tokenizer, samples, seed, loading):
            found.append(row)
            show(cells(row))
            if json_file is not None:  # after every row: a long run may be stopped
                made = kept | {"rows": [dataclasses.asdict(r) for r in found]}
                json_file.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
            if markdown_file is not None:
                markdown_file.write_text(markdown(found), encoding="utf-8")
        return
    model = load(folder, **loading)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("evaluating", total=1 + len(tasks.TASKS))
        figures = evaluate(model, tokenizer, samples, seed, lambda name: progress.advance(bar))

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
