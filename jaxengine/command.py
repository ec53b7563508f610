"""The `jaxengine` command: parse, call, print. `scripts/generate.py` and `scripts/convert.py` are these same functions."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def _program() -> typer.Typer:
    # rich's markup stays off: help texts hold square brackets and are to be read as they stand
    return typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
    )


app = _program()

Folder = Annotated[
    str, typer.Argument(help="A Hugging Face checkpoint folder; 'demo' is the small model that comes along.")
]


@app.callback()
def _command() -> None:
    """Runs language models that do not fit the GPU, in JAX."""


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue; '-' reads it from standard input.")],
    chat: Annotated[
        bool, typer.Option(help="Take the prompt as a user's message, through the checkpoint's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that have occurred become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken once from the logit of a token that was generated.")
    ] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken for each time that a token was generated.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="So many completions of the prompt.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Device memory to use, e.g. 16GB: chooses where layers live.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Format of the weights: dense, int8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")] = None,
    home: Annotated[str | None, typer.Option(help="Where layers live: device, host.")] = None,
    kv: Annotated[str | None, typer.Option(help="How the KV cache is stored: raw, int8.")] = None,
    kv_layout: Annotated[str | None, typer.Option(help="Cache of sliding-window layers: window, full.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Several devices, e.g. data=2,tensor=4.")] = None,
    sharding: Annotated[
        str | None, typer.Option(help="How parameters are split over them: single, data, fsdp, tensor.")
    ] = None,
    show_plan: Annotated[bool, typer.Option(help="Print the plan to standard error first.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object for each completion.")] = False,
) -> None:
    """Continue a prompt, printing the text as it comes."""
    start_jax()
    import jaxengine

    with reported():
        model = jaxengine.load(
            resolve(folder), memory=memory, weights=weights, dtype=dtype, home=home, kv=kv,
            kv_layout=kv_layout, mesh=mesh, sharding=sharding,
            progress=Reading(),
        )  # fmt: skip
        if show_plan:
            print(model.plan, file=sys.stderr)
        text = sys.stdin.read() if prompt == "-" else prompt
        given: Any = [{"role": "user", "content": text}] if chat else text
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty, "stop": stop or (), "seed": seed,
        }  # fmt: skip
        if json_lines:
            for c in model.generate(given, n=n, **options):
                print(json.dumps({"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason}))
        elif n > 1:
            for i, c in enumerate(model.generate(given, n=n, **options)):
                print(f"--- {i + 1}\n{'' if chat else text}{c.text}")
        else:
            pieces = model.stream(given, **options)  # refuses a bad request before anything is printed
            print("" if chat else text, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()


@app.command()
def convert(
    source: Folder,
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
    to: Annotated[str, typer.Option(help="hf: a Hugging Face folder; orbax: one chunk per layer.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast to float32, bfloat16 or float16 (as it is, if not given).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a target that is there.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="hf: split into files of at most this size.")] = "5GB",
) -> None:
    """Convert a checkpoint folder, one tensor at a time; the target appears whole or not at all."""
    start_jax()
    from jaxengine import export
    from jaxengine.plan import parse_bytes

    with reported():
        bar = Reading("converting")
        export.convert(
            resolve(source), target, to=to, dtype=dtype, overwrite=overwrite, max_shard_bytes=parse_bytes(max_shard_size),
            track=bar,
        )  # fmt: skip
        print(f"wrote {target}")


def convert_script() -> None:
    """`scripts/convert.py`."""
    _alone(convert)


def generate_script() -> None:
    """`scripts/generate.py`."""
    _alone(generate)


def _alone(command: Any) -> None:
    program = _program()
    program.command()(command)
    program()


def main() -> None:
    """The `jaxengine` command."""
    app()


def resolve(folder: str) -> str:
    """'demo' is the embedded checkpoint, unless a folder of that name is there."""
    if folder == "demo" and not Path("demo").is_dir():
        import jaxengine

        return jaxengine.demo_folder()
    return folder


def start_jax() -> None:
    """Settings of a process that we start: programs compiled once are kept for the next time."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/jaxengine, ~/.cache/jaxengine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxengine"


class reported:  # noqa: N801  (used as a statement)
    """Errors that are the user's to mend become one line and exit status 2; others keep their trace."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | FileNotFoundError | FileExistsError | NotADirectoryError | PermissionError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None


class Reading:
    """A progress bar of bytes read, on standard error, where that is a terminal."""

    def __init__(self, what: str = "reading weights") -> None:
        self._bar: Any = None
        self._what = what

    def __call__(self, name: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn(self._what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=total)
        self._bar.update(self._task, completed=done)
        if done >= total:
            self._bar.stop()


if __name__ == "__main__":
    main()
