"""The `jaxengine` command: parse, call, print. `scripts/generate.py` and `scripts/convert.py` are these same functions.

A sub-command is one function under `@app.command()` and `@reported()`; one that loads a model takes `@loads` for the
options of `jaxengine.load`, which are declared here once, and hands them on with `load`.

An error is shown as one line only where the reader can mend what it says. A ValueError says that if a `raise` of ours
made it. One that jax or numpy raise inside our code is a fault of ours, and keeps its trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from jaxengine import machine
from jaxengine.calibration.command import quantize
from jaxengine.finetune.command import PLANNED, finetune, options
from jaxengine.paths import cache_folder

if TYPE_CHECKING:
    from jaxengine.model import Model
    from jaxengine.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS: dict[str, Any] = {"context_settings": {"show_default": True, "max_content_width": 100}}
PACKAGES = ("jaxengine", "sharding", "checkpoints", "pallas_kernels")
MENDED_OUTSIDE = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)

# ---------------------------------------------------------------------------------------------------------------------
# What commands share


def start_jax() -> None:
    """Settings of a process that we start: programs compiled once are kept for the next time, and XLA's pools of pinned host
    memory and of a card's may grow to most of what there is (`within` has the latter end where a budget does)."""
    kept = {
        "jax_compilation_cache_dir": str(cache_folder() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": "0.2",
    }
    for name, value in kept.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = value
            if "jax" in sys.modules:  # it reads its environment when it is imported
                sys.modules["jax"].config.update(name, float(value) if name.endswith("secs") else value)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in ("jaxengine", "pallas_kernels"):  # what takes long, or is done for the user, is said
        logging.getLogger(name).setLevel(logging.INFO)
    if machine.set_share(os.environ):
        OURS.add(machine.SHARE)
    given = machine.POOL in os.environ
    with contextlib.suppress(ValueError):  # a system that does not say how much memory it has
        said = machine.set_pool(
            os.environ, machine.available_ram()
        )  # what was set is said where it is used: loading.py
        if given and said:
            logging.getLogger("jaxengine").warning(said)


OURS: set[str] = set()  # of the environment, what this process set for itself


def within(memory: str | int | None) -> None:
    """Before jax's backend starts: XLA's pool of a card's memory ends at what --memory says and some for compiling, where nobody
    else says where. A process that we did not start is left alone."""
    from jaxengine.plan import parse_bytes
    from pallas_kernels.cards import context_bytes

    if memory is None or machine.SHARE not in OURS or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    size, ours = parse_bytes(memory), os.environ.pop(machine.SHARE)
    cards = [(total, total - context_bytes(cores)) for total, cores in machine.card_memories()]
    if not machine.set_share(os.environ, size, cards):
        os.environ[machine.SHARE] = ours  # no card, or a driver that does not answer


ANEW = "jaxengine_started_anew"  # an option of the interpreter, which outlives launchers that clear the environment


def start_anew_with_large_pages() -> None:
    """Before `start_jax`, in a process that we start for long steps: where malloc could ask for large pages and does not, the
    process begins again, under its own number, and does."""
    before = os.environ.get(machine.TUNABLES)
    read_from_stdin = sys.argv[0] in ("", "-")  # which would be at its end
    if read_from_stdin or not sys.executable or ANEW in sys._xoptions or not machine.ask_for_large_pages(os.environ):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # no interpreter of that name any more: the pages stay small
        os.execv(sys.executable, [sys.executable, "-X", ANEW, *sys.orig_argv[1:]])
    if before is None:
        del os.environ[machine.TUNABLES]
    else:
        os.environ[machine.TUNABLES] = before


class reported(contextlib.ContextDecorator):  # noqa: N801  (used as a statement)
    """Errors that are the user's to mend become one line and exit status 2; others keep their trace.

    Ctrl-C ends with status 130, as a shell says it.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        if error is not None and is_the_users(error):
            print(f"error: {said(error)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None


def is_the_users(error: BaseException) -> bool:
    """Whether what an error says is for the user to mend: a file, a checkpoint, a value that our code refused."""
    from checkpoints.output import NO_ROOM

    if isinstance(error, MENDED_OUTSIDE) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        return True
    if not isinstance(error, ValueError):
        return False
    from checkpoints.errors import CheckpointError
    from jaxengine.config import ConfigError

    return isinstance(error, CheckpointError | ConfigError) or raised_here(error)


def raised_here(error: BaseException) -> bool:
    """Whether the innermost frame of an error's traceback is in one of our packages, at a `raise`.

    The frame alone does not tell: jax takes its own frames out of tracebacks, so that one of ours is the last where jax
    has raised, and code in C has no frames. Nor does the frame's last instruction, which jax does not keep.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in PACKAGES:
        return False
    found = dis.get_instructions(trace.tb_frame.f_code)
    return any(
        i.opname == "RAISE_VARARGS" and i.positions is not None and i.positions.lineno == trace.tb_lineno for i in found
    )


def said(error: BaseException) -> str:
    """An error's message; the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class Reading:
    """A progress bar of bytes, on standard error, where that is a terminal.

    with Reading() as bar: load(progress=bar). However the block ends, the terminal is left as it was.
    """

    def __init__(self, what: str = "reading weights") -> None:
        self._what = what
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        """`done` bytes of `total` are there; drawn from the first call on."""
        if self._bar is None:
            if not sys.stderr.isatty():
                return
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
        self._bar.update(self._task, completed=done, total=total)  # a total of its own for layers that are packed first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def resolve(folder: str) -> str:
    """'demo' is the embedded checkpoint, unless a folder of that name is there."""
    if folder == "demo" and not Path("demo").is_dir():
        import jaxengine

        return jaxengine.demo_folder()
    return folder


A_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

LOADING = (
    click.option("--plan", type=A_FILE, metavar="FILE", help="A plan as JSON; other options go before its fields."),
    click.option("--memory", metavar="SIZE", help="Device memory to use, e.g. 16GB; chooses where layers live."),
    click.option(
        "--ram", metavar="SIZE", show_default="what is free",
        help="Host memory for layers that do not fit --memory; the rest is read from disk.",
    ),
    click.option("--batch", metavar="N", type=click.IntRange(1), show_default="1", help="Rows that --memory is to hold."),
    click.option(
        "--context", metavar="N", type=click.IntRange(1), show_default="2048",
        help="Tokens of a row that --memory is to hold.",
    ),
    click.option(
        "--weights", metavar="FORMAT", show_default="dense",
        help="Format of the weights: int8, int4, nf4, fp8, mxfp4, int4:group_size=64.",
    ),
    click.option(
        "--rule", "weight_rules", metavar="PATTERN=FORMAT", multiple=True, show_default="--weights alone",
        help="Format of some weights, e.g. lm_head=int8 or 'layers.*.down=dense'; several times.",
    ),
    click.option(
        "--dtype", metavar="DTYPE", show_default="the checkpoint's", help="Compute in float32, bfloat16 or float16."
    ),
    click.option("--home", metavar="HOME", show_default="device", help="Where layers live: device, host, split, disk."),
    click.option(
        "--form", metavar="FORM", show_default="the home's own", help="How layers run: unrolled, scan, ahead, python."
    ),
    click.option("--resident", metavar="N", type=int, help="Layers of a split or disk home that stay on the device."),
    click.option("--kept", metavar="N", type=int, help="Layers of a disk home that stay in host memory."),
    click.option(
        "--stay", metavar="PATTERN", multiple=True, show_default="vectors",
        help="Parameters of layers on the host to keep on the device, e.g. k; several times.",
    ),
    click.option(
        "--disk", metavar="FOLDER", show_default="the checkpoint's own files if dense, else ~/.cache/jaxengine/layers",
        help="Folder for the packed layers of a disk home, as large as the model.",
    ),
    click.option("--kv", metavar="CODEC", show_default="raw", help="How the KV cache is stored: raw, int8, int4."),
    click.option(
        "--kv-layout", metavar="LAYOUT", show_default="window", help="Cache of sliding-window layers: window, full."
    ),
    click.option(
        "--attention", metavar="NAME", show_default="auto",
        help="Its implementation: xla, triton, cudnn, mosaic_gpu, tokamax, reference.",
    ),
    click.option("--adapter", metavar="FOLDER", help="A PEFT folder, LoRA or DoRA, to stand beside the weights."),
    click.option("--mesh", metavar="AXES", show_default="one device", help="Several devices, e.g. data=2,tensor=4."),
    click.option(
        "--sharding", metavar="TABLE", show_default="as --mesh",
        help="How parameters are split over them: single, data, fsdp, tensor, fsdp+tensor.",
    ),
)  # fmt: skip


def loads(command: F) -> F:
    """The options of `jaxengine.load`, which the command takes as **loading and gives to `load`."""
    for option in reversed(LOADING):
        command = option(command)
    return command


def load(folder: str, *, plan: Path | None = None, **chosen: Any) -> Model:
    """The model of a folder under what LOADING's options say, with a progress bar."""
    import jaxengine

    within(chosen.get("memory"))
    given = None if plan is None else read_plan(plan)
    for several in ("stay", "weight_rules"):
        chosen[several] = chosen.get(several) or None  # click has () where nothing is said
    with Reading() as bar:
        return jaxengine.load(resolve(folder), plan=given, progress=bar, **chosen)


def read_plan(path: Path) -> Plan:
    """The plan in a file that `Plan.to_json` wrote, or a part of one."""
    from jaxengine.plan import Plan

    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except ValueError as error:  # of the encoding or of the JSON
        raise click.BadParameter(f"{path} is not JSON: {error}", param_hint="--plan") from None
    if not isinstance(raw, dict):
        raise click.BadParameter(
            f'{path} holds {text.strip()[:40]}; a plan is an object, e.g. {{"weights": "int8"}}', param_hint="--plan"
        )
    return Plan.from_json(text)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@click.group(**SETTINGS)
def app() -> None:
    """Runs language models that do not fit the GPU, in JAX."""


@app.command(**SETTINGS)
@click.argument("folder")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, through the chat template.")
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(1), default=128, help="Stop after so many tokens.")
@click.option("--temperature", type=float, default=0.0, help="How freely to draw; 0 takes the likeliest token.")
@click.option("--top-k", metavar="K", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", metavar="P", type=float, help="Draw from the likeliest tokens that hold P of the probability.")
@click.option("--min-p", metavar="P", type=float, help="Drop tokens less than P times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1, tokens seen before become less likely.")
@click.option("--presence-penalty", type=float, default=0.0, help="Taken once from the logit of each generated token.")
@click.option("--frequency-penalty", type=float, default=0.0, help="Taken each time that a token was generated.")
@click.option("--stop", metavar="TEXT", multiple=True, help="Stop at this text; may be given several times.")
@click.option(
    "--stop-id",
    metavar="ID",
    type=click.IntRange(0),
    multiple=True,
    show_default="the checkpoint's",
    help="Stop at this token id; may be given several times.",
)
@click.option("--seed", type=int, show_default="drawn", help="The same seed gives the same text.")
@click.option("-n", "n", metavar="N", type=click.IntRange(1), default=1, help="So many completions of the prompt.")
@loads
@click.option("--show-plan", is_flag=True, help="Print the plan to standard error first.")
@click.option("--json", "json_lines", is_flag=True, help="Print one JSON object for each completion.")
@click.option(
    "--logprobs",
    metavar="N",
    type=click.IntRange(0),
    help="Into the JSON, each token's log-probability and those of the N likeliest.",
)
@reported()
def generate(
    folder: str,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    stop: tuple[str, ...],
    stop_id: tuple[int, ...],
    seed: int | None,
    n: int,
    show_plan: bool,
    json_lines: bool,
    logprobs: int | None,
    **loading: Any,
) -> None:
    """Continue a prompt, printing the text as it comes.

    FOLDER is a Hugging Face checkpoint folder; 'demo' is the small model that comes along. PROMPT is what to continue;
    '-' reads it from standard input.
    """
    if logprobs is not None and not json_lines:
        raise click.UsageError("--logprobs goes into the JSON: give --json too, or leave it out.")
    from jaxengine.sampling import Sampling

    sampling = Sampling(  # refuses a number out of its range before anything is loaded
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "stop": stop, "stop_ids": stop_id or None, "seed": seed,
        **dataclasses.asdict(sampling),
    }  # fmt: skip
    text = from_stdin() if prompt == "-" else prompt
    given: Any = [{"role": "user", "content": text}] if chat else text
    model = load(folder, **loading)
    if show_plan:
        print(model.plan, file=sys.stderr)
    # a flush at each print: if the reader has gone, it is told here, where click ends quietly, and not at exit
    if json_lines:
        for c in model.generate(given, n=n, logprobs=logprobs, **options):
            row: dict[str, Any] = {"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason}
            if logprobs is not None:
                row["logprobs"] = c.logprobs
            if logprobs:
                row["top_logprobs"] = c.top_logprobs
            print(json.dumps(row), flush=True)
    elif n > 1:
        for i, c in enumerate(model.generate(given, n=n, **options)):
            print(f"--- {i + 1}\n{'' if chat else text}{c.text}", flush=True)
    else:
        pieces = model.stream(given, **options)  # refuses a bad request before anything is printed
        print("" if chat else text, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    if (stats := model.disk_stats) is not None:
        from jaxengine.packing import read_line

        logging.getLogger("jaxengine").info("%s", read_line(stats))


def from_stdin() -> str:
    """All of standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not {error.encoding} text: {error.reason}") from None


@app.command(**SETTINGS)
@click.argument("folder")
@click.option("--gpu", required=True, metavar="CARD", help="The card: rtx4090, h200, ... or its numbers.")
@click.option("--memory", metavar="SIZE", show_default="all of the card", help="Device memory to use, e.g. 16GB.")
@click.option(
    "--ram",
    metavar="SIZE",
    show_default="no limit",
    help="Host memory for streamed layers, e.g. 64GB; the rest is read from disk.",
)
@click.option(
    "--disk-rate",
    metavar="SIZE",
    default="3GB",
    help="What the disk gives in a second (scripts/bench_disk.py measures it).",
)
@click.option(
    "--task",
    default="generate",
    help="What to plan for: generate; or training: lora, dora, full, lisa, badam, hift, mezo.",
)
@options(PLANNED)
@click.option(
    "--adapter",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Of lora, dora: a PEFT folder that a run starts from; its rank and targets are kept.",
)
@click.option(
    "--context", metavar="N", type=click.IntRange(1), show_default="2048", help="Tokens of a row, prompt included."
)
@click.option("--batch", metavar="N", type=click.IntRange(1), default=1, help="Rows at a time.")
@click.option(
    "--weights",
    metavar="FORMAT",
    show_default="the checkpoint's",
    help="Format of the weights: int8, int4, nf4, fp8, ...",
)
@click.option(
    "--rule",
    "weight_rules",
    metavar="PATTERN=FORMAT",
    multiple=True,
    show_default="--weights alone",
    help="Format of some weights, e.g. lm_head=int8 or 'layers.*.down=dense'; several times.",
)
@click.option("--dtype", metavar="DTYPE", show_default="the config's", help="Plan for float32, bfloat16 or float16.")
@click.option("--kv", metavar="CODEC", default="raw", help="How the KV cache is stored: raw, int8, int4.")
@click.option(
    "--stay",
    metavar="PATTERN",
    multiple=True,
    show_default="vectors",
    help="Parameters of layers on the host to keep on the device, e.g. k; several times.",
)
@click.option(
    "--attention", metavar="NAME", default="auto", help="Its implementation: xla, triton, cudnn, mosaic_gpu, ..."
)
@click.option("--mesh", metavar="AXES", default="", show_default="one card", help="Several such cards, e.g. tensor=2.")
@click.option(
    "--sharding",
    metavar="TABLE",
    default="",
    show_default="as --mesh",
    help="How the model is split over them: data, fsdp, tensor, fsdp+tensor.",
)
@click.option("--compile/--no-compile", "proved", default=True, help="Compile the chosen plan for the card as a proof.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw every plan's bytes into FILE.svg or FILE.png."
)
@reported()
def plan(
    folder: str,
    gpu: str,
    memory: str | None,
    ram: str | None,
    disk_rate: str,
    task: str,
    target: tuple[str, ...],
    adapter: Path | None,
    remat: str | None,
    context: int | None,
    batch: int,
    weights: str | None,
    weight_rules: tuple[str, ...],
    dtype: str | None,
    kv: str,
    stay: tuple[str, ...],
    attention: str,
    mesh: str,
    sharding: str,
    proved: bool,
    as_json: bool,
    plot: Path | None,
    **of_task: Any,
) -> None:
    """Say what runs in a card's memory, how, and how fast at best.

    FOLDER needs a config.json and no weights. No card is needed and nothing is allocated. With XLA's GPU compiler
    installed, the chosen plan is compiled for the card, and XLA's own bytes stand beside the arithmetic. --rank to
    --loss-chunk are of a --task that trains, and mean what they mean to `jaxengine finetune`.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from jaxengine import picture
    from jaxengine.planning import plan_folder
    from pallas_kernels import aot

    if plot is not None:
        picture.check(plot)
    outcome = plan_folder(
        resolve(folder), gpu=gpu, memory=memory, ram=ram, batch=batch, context=context, task=task,
        targets=target, adapter=adapter, remat=remat or "", weights=weights, weight_rules=weight_rules, dtype=dtype, kv=kv,
        stay=stay, attention=attention, mesh=mesh, sharding=sharding, disk_rate=disk_rate, **of_task,
    )  # fmt: skip
    if plot is not None:
        picture.draw(outcome, plot)
    # what is compiled for another machine cannot be loaded here
    jax.config.update("jax_enable_compilation_cache", False)
    proofs, why, refuted = (), aot.missing(), []
    if outcome.chosen is not None and proved and why is None:
        from pallas_kernels.attention.cudnn import NotHere

        try:
            outcome, proofs, refuted = _proved(outcome)
        except NotHere as e:
            why = f"for attention 'cudnn' jax asks this machine's cuDNN and GPU: {e}"
    if as_json:
        found = outcome.to_dict()
        found["compiled"] = [
            {"program": p.program, "device": p.device, "host": p.host, "temporaries": p.temporaries,
             "seconds": p.seconds, "problems": list(p.report.problems)}
            for p in proofs
        ]  # fmt: skip
        found["agreement"] = _agreement(outcome, proofs)
        found["refuted"] = [{"plan": c.label(), "problems": problems} for c, problems in refuted]
        print(json.dumps(found, indent=2))
    else:
        _show_outcome(outcome, proofs, why if proved else None, refuted)
    if outcome.chosen is None or any(p.report.problems for p in proofs):
        raise SystemExit(1)


def _proved(outcome: Any) -> tuple[Any, Any, list[tuple[Any, list[str]]]]:
    """The nearest candidate that fits compiled too, of the first four: (outcome, its proofs, those refuted before it and by
    what). If there is none, the first of them as it is."""
    from jaxengine.proof import prove

    first, refuted = None, []
    for _ in range(4):
        proofs = prove(
            outcome.architecture, outcome.chosen.plan, outcome.card, batch=outcome.batch, length=outcome.context,
            memory=outcome.memory, task=outcome.task,
        )  # fmt: skip
        problems = [problem for p in proofs for problem in p.report.problems]
        if not problems:
            return outcome, proofs, refuted
        first = first or (outcome, proofs)
        refuted.append((outcome.chosen, problems))
        outcome = outcome.refuted(max(p.device for p in proofs))
        if outcome.chosen is None:
            break
    assert first is not None
    return *first, refuted[1:]


def _agreement(outcome: Any, proofs: Any) -> dict[str, Any] | None:
    """The arithmetic's bytes of the device beside the most that XLA says of a program; None where nothing was compiled."""
    from jaxengine.planning import PROMISED

    if not proofs:
        return None
    counted, most = outcome.chosen.need.device, max(p.device for p in proofs)
    off = counted / most - 1
    return {"arithmetic": counted, "compiled": most, "off": off, "within": PROMISED, "agrees": abs(off) <= PROMISED}


def _rate(x: float) -> str:
    """Three digits, without an exponent: 3,430."""
    return f"{float(f'{x:.3g}'):,.10g}"


def _show_outcome(outcome: Any, proofs: Any, why: str | None, refuted: Any = ()) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from jaxengine.plan import show_bytes
    from jaxengine.planning import devices, traps

    console, o = Console(), outcome
    host = "" if o.ram is None else f" and {show_bytes(o.ram)} of host memory"
    each = f" each of {devices(o.candidates[0].plan)}" if devices(o.candidates[0].plan) > 1 else ""
    console.print(
        f"{o.card.name}: {show_bytes(o.memory)}{each}{host} for {o.batch} x {o.context} tokens{o.of_task}",
        highlight=False,
    )
    if o.card.notes:
        console.print(f"({o.card.notes})", highlight=False)
    table = Table("plan", box=SIMPLE_HEAD, padding=(0, 1))
    for tier in ("device", "host", "disk", "tokens/s"):
        table.add_column(tier, justify="right", no_wrap=True)
    table.add_column("")
    for c in o.candidates:
        verdict = "chosen" if c is o.chosen else c.refused or "fits, farther"
        speed = _rate(c.tokens_per_second)
        table.add_row(c.label(), *(show_bytes(x) for x in (c.need.device, c.need.host, c.need.disk)), speed, verdict)
    console.print(table, highlight=False)
    if o.chosen is None:
        what = "What would:" if o.changes else "Nothing that could be changed would, nor another card that is known."
        console.print(f"Nothing fits: {o.shortage}{'. ' if o.shortage else ''}{what}", highlight=False)
        for said, c in o.changes:
            tiers = [
                f"{show_bytes(c.need.device)} on the device",
                *([f"{show_bytes(c.need.host)} in host memory"] if c.need.host else []),
            ]
            console.print(f"  {said}: {c.label()}, {', '.join(tiers)}", highlight=False)
        return
    c, n = o.chosen, o.chosen.need
    console.print(f"chosen: {c.label()}", highlight=False)
    streamed = "streamed layers" if n.host_weights or n.disk else "a copy of the layer that is used"
    parts = {
        "embeddings and head": n.outer, "layers that stay": n.resident, streamed: n.streaming,
        "KV cache": n.cache, "activations": n.activations, "of what is trained": n.trained, "gradients": n.gradients,
        "optimizer state": n.optimizer, "kept of layers for their way back": n.kept,
    }  # fmt: skip
    held = ", ".join(f"{show_bytes(x)} {what}" for what, x in parts.items() if x)
    console.print(f"on the device: {held}", highlight=False)
    parts = {
        "weights": n.host_weights, "optimizer state": n.host_optimizer, "kept for the way back": n.host_kept,
        "buffers that the disk is read into": n.host_buffers,
    }  # fmt: skip
    if n.host:
        held = ", ".join(f"{show_bytes(x)} {what}" for what, x in parts.items() if x)
        console.print(f"in host memory: {held}", highlight=False)
    what = "decoding steps" if o.task is None else f"a step of {c.tokens} tokens"
    console.print(
        f"{what}: at most {_rate(c.passes_per_second)} a second, {_rate(c.tokens_per_second)} tokens/s, by the {c.limit}:"
        f" {', '.join(f'{what} {_rate(s * 1000)} ms' for what, s in c.seconds)} a step",
        highlight=False,
    )
    for said in traps(o.architecture, o.chosen, o.card, o.task):
        console.print(f"note: {said}", highlight=False)
    for p in proofs:
        console.print(
            f"compiled {p.program}: {show_bytes(p.device)} on the device ({show_bytes(p.temporaries)} of temporaries),"
            f" {show_bytes(p.host)} on the host{' for each card' if each and p.host else ''}, {p.seconds:.0f} s;"
            f" {len(p.report.problems)} problems",
            highlight=False,
        )  # fmt: skip
        for problem in p.report.problems:
            console.print(f"  {problem}", highlight=False)
    if (agreed := _agreement(o, proofs)) is not None:
        off = 100 * agreed["off"]
        said = "" if agreed["agrees"] else ", which is more than the 5 % that it is held to: what was compiled holds"
        console.print(
            f"arithmetic: {show_bytes(n.device)}, {abs(off):.1f} % {'over' if off > 0 else 'under'} XLA's{said}",
            highlight=False,
        )
    for other, problems in refuted:
        console.print(f"refuted by compiling: {other.label()}: {problems[0]}", highlight=False)
    if why is not None:
        console.print(f"not compiled: {why}", highlight=False)


@app.command(**SETTINGS)
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    metavar="FORMAT",
    required=True,
    help="hf, a Hugging Face folder; compressed-tensors, one of packed integers; or orbax.",
)
@click.option(
    "--weights",
    metavar="FORMAT",
    show_default="as they are",
    help="For orbax: nf4, int8, ...; for compressed-tensors integers: int4:group_size=64, ...",
)
@click.option("--dtype", metavar="DTYPE", show_default="as it is", help="Cast to float32, bfloat16 or float16.")
@click.option("--adapter", metavar="FOLDER", help="A PEFT folder, LoRA or DoRA, to merge into the weights.")
@click.option("--overwrite", is_flag=True, help="Replace a target that is there.")
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    show_default="split as the source, or by 5GB",
    help="Split what hf writes into files of at most this size.",
)
@reported()
def convert(
    source: str,
    target: Path,
    to: str,
    weights: str | None,
    dtype: str | None,
    adapter: str | None,
    overwrite: bool,
    max_shard_size: str | None,
) -> None:
    """Convert a checkpoint folder, one tensor at a time.

    SOURCE is a Hugging Face checkpoint folder, or one that was converted; 'demo' is the small model that comes along.
    TARGET is the folder to write, which must not exist, or be empty; it appears whole or not at all.
    """
    from jaxengine import export
    from jaxengine.plan import parse_bytes

    size = None if max_shard_size is None else parse_bytes(max_shard_size, "max-shard-size")
    with Reading("converting") as bar:
        export.convert(
            resolve(source), target, to=to, weights=weights, dtype=dtype, adapter=adapter, overwrite=overwrite,
            max_shard_bytes=size, track=bar,
        )  # fmt: skip
    print(f"wrote {target}", flush=True)


@app.command(**SETTINGS)
@click.option(
    "--disk",
    metavar="FOLDER",
    show_default="~/.cache/jaxengine/layers",
    help="The folder, as generate's --disk names it.",
)
@click.option(
    "--remove",
    type=click.Choice(["old", "all"]),
    help="Remove those that no load finds again (old), or all; never one that is in use.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reported()
def layers(disk: str | None, remove: str | None, as_json: bool) -> None:
    """Show the packed layers of disk homes, and remove those that no checkpoint needs.

    A store is current if loading its checkpoint with the same formats finds it. It is old if the checkpoint has changed
    since or is gone, or if the store is damaged. What an interrupted packing has left is gone on with by the next load.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxengine import packing
    from jaxengine.plan import show_bytes

    folder = cache_folder() / "layers" if disk is None else Path(disk).expanduser()
    if disk is not None and not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), disk)
    found = packing.stores(folder)
    chosen = [s for s in found if remove == "all" or (remove == "old" and s.old)]
    removed, in_use = packing.remove(chosen)
    if as_json:
        rows = [s.to_dict() | {"removed": s in removed} for s in found]
        print(json.dumps({"folder": str(folder), "stores": rows}, indent=2))
        return
    for s in found:
        said = s.state if s.file.whole or s.state == "left over" else f"{s.state}, unfinished"
        said += ", in use" if s.file.used else ""
        said += (
            ", removed"
            if s in removed
            else ", kept: a process uses it (or its disk has no locks that would tell)"
            if s in in_use
            else ""
        )
        print(f"{s.file.path.name}  {show_bytes(s.file.nbytes)}  {said}")
        if s.source:
            print(f"    {s.source} ({s.formats})")
    freed, rest = (sum(s.file.nbytes for s in part) for part in (removed, [s for s in found if s not in removed]))
    print(f"{folder}: {show_bytes(rest)}" + (f"; {show_bytes(freed)} removed" if remove else ""), flush=True)


app.add_command(finetune)
app.add_command(quantize)


def main() -> None:
    """The `jaxengine` command."""
    if sys.argv[1:2] == ["finetune"]:
        start_anew_with_large_pages()
    start_jax()
    app()


if __name__ == "__main__":
    main()
