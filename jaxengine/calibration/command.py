"""The `jaxengine quantize` command: parse, call, print. `scripts/quantize.py` is this same function.

What is used of jax and of our own is imported when the command runs: `--help` should not wait for a compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

A_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
A_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("folder")
@click.argument("text", nargs=-1, required=True, type=A_FILE)
@click.option(
    "--out", required=True, metavar="OUT", type=A_FOLDER, help="Folder to write; goes on where a run was killed."
)
@click.option(
    "--weights", metavar="FORMAT", default="int4:group_size=64", help="Integer format: int8, int4, int3, int2."
)
@click.option("--method", metavar="METHOD", default="gptq", help="gptq or awq.")
@click.option("--memory", metavar="SIZE", show_default="any", help="Device memory to use, e.g. 8GB.")
@click.option("--samples", metavar="N", type=click.IntRange(1), default=128, help="Rows of text.")
@click.option(
    "--context", metavar="N", type=click.IntRange(1), show_default="512, or the model's", help="Tokens of a row."
)
@click.option(
    "--dtype", metavar="DTYPE", show_default="the checkpoint's", help="Compute in float32, bfloat16 or float16."
)
@click.option("--seed", metavar="N", type=click.IntRange(0), default=0, help="Draws the rows.")
def quantize(folder: str, text: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Quantise a model that need not fit the device, by text that it is to be good at.

    FOLDER is a Hugging Face checkpoint folder; 'demo' is the small model that comes along. TEXT are jsonl files of rows
    {"text"}, {"prompt", "completion"} or {"messages"}, or plain text. OUT becomes a Hugging Face folder in
    compressed-tensors' form, which jaxengine, transformers and vLLM load; it appears whole or not at all. After Ctrl-C or a
    kill the same command goes on after the last finished layer.
    """
    from jaxengine.command import reported, resolve, within

    with reported():
        within(given["memory"])
        from jaxengine.calibration import run

        with Layers() as shown:
            outcome = run.quantize(resolve(folder), text, out=out, progress=shown, **given)
        kinds: dict[str, list[float]] = {}
        for name, lost in outcome.lost.items():
            kinds.setdefault(name.split(".", 2)[2], []).append(lost)
        print("of each matrix's output, the part of its power that is lost: mean over layers, most in a layer")
        for kind, lost in kinds.items():
            print(f"  {kind:<8} {sum(lost) / len(lost):.2e}  {max(lost):.2e}")
        print(f"wrote {out}", flush=True)


class Layers:
    """A progress bar of layers, on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            if not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("layers"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, description=what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
