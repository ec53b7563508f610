"""The `jaxengine finetune` command: parse, call, print. `scripts/finetune.py` is this same function.

What is used of jax and of our own is imported when the command runs: `--help` should not wait for a compiler.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from jaxengine.architecture import Architecture
    from jaxengine.finetune.data import Documents
    from jaxengine.finetune.run import Record
    from jaxengine.finetune.settings import Settings
    from jaxengine.plan import Plan
    from pallas_kernels.cards import Card

A_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
A_FOLDER = click.Path(file_okay=False, path_type=Path)
CONTEXT = 1024  # tokens of a row, where nobody says how many and the model takes as many

KEPT = ("held_out", "eval_every", "save_every", "keep", "best", "live", "merge", "skip_bad")  # of KEEPING, by name

# None where nothing is said, and Settings has what is usual: so they are the options of `jaxengine plan --task` too
RANK = click.option("--rank", metavar="R", type=click.IntRange(1), show_default="8", help="Rank of LoRA and DoRA.")
TARGET = click.option(
    "--target", metavar="PATTERN", multiple=True, show_default="*",
    help="Matrices that have one beside them: q, layers.3.*; may be given several times.",
)  # fmt: skip
LAYERS = click.option(
    "--layers", metavar="M", type=click.IntRange(1), show_default="2, 1, 1",
    help="Of lisa, badam, hift: layers at a time.",
)  # fmt: skip
ACCUMULATE = click.option(
    "--accumulate", metavar="N", type=click.IntRange(1), show_default="1", help="Times --batch rows in a step."
)
OPTIMIZER = click.option(
    "--optimizer", metavar="NAME", show_default="adamw",
    help="adamw, adamw8bit, muon, lion, sgd, adafactor; or mezo, without a gradient.",
)  # fmt: skip
CLIP = click.option(
    "--clip", metavar="NORM", type=float, show_default="1; mezo none", help="The largest norm of a gradient; 0 for any."
)
EMA = click.option(
    "--ema", metavar="DECAY", type=float, show_default="none",
    help="Keep an average over about 1/(1-DECAY) steps, such as 0.99, and write that.",
)  # fmt: skip
COMPUTE = click.option("--compute", metavar="DTYPE", show_default="bfloat16", help="Arithmetic in bfloat16 or float32.")
TILE = click.option(
    "--tile", metavar="N", type=click.IntRange(1), show_default="all",
    help="Tokens of a row that a layer's feed-forward block takes at a time.",
)  # fmt: skip
LOSS_CHUNK = click.option(
    "--loss-chunk", metavar="N", type=click.IntRange(1), show_default="as fit 256 MB",
    help="Tokens of a row whose logits stand at a time.",
)  # fmt: skip


def remat(usual: str) -> Any:
    """The option --remat; usual: what is kept where nothing is said."""
    return click.option(
        "--remat", metavar="WHAT", show_default=usual,
        help="Kept of a layer for its way back: none (all), dots, full (nothing), offload.",
    )  # fmt: skip


PLANNED = (RANK, TARGET, LAYERS, OPTIMIZER, CLIP, EMA, COMPUTE, ACCUMULATE, remat("as fits"), TILE, LOSS_CHUNK)

WHAT = (
    click.option(
        "--train", metavar="WHAT", show_default="lora",
        help="What is trained: lora, dora, all parameters, or some layers at a time: lisa, badam, hift.",
    ),
    RANK,
    click.option("--alpha", metavar="A", type=float, show_default="16", help="Their scale times the rank."),
    click.option("--rs", is_flag=True, help="Their scale as alpha by the root of the rank (rsLoRA)."),
    TARGET,
    click.option(
        "--adapter", metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="A PEFT folder, LoRA or DoRA, to start from: its rank, alpha, scale and targets are kept.",
    ),
    LAYERS,
    click.option(
        "--every", metavar="K", type=click.IntRange(1), show_default="20, 100", help="Of lisa, badam: steps of a turn."
    ),
    click.option(
        "--order", metavar="ORDER", show_default="random, ascending",
        help="Of badam, hift: ascending, descending or random.",
    ),
)  # fmt: skip
HOW = (
    click.option("--batch", metavar="N", type=click.IntRange(1), default=4, help="Rows at a time."),
    ACCUMULATE,
    click.option(
        "--context", metavar="N", type=click.IntRange(1), show_default=f"{CONTEXT} or the model's", help="Tokens of a row."
    ),
    click.option("--steps", metavar="N", type=click.IntRange(1), help="Stop after so many steps."),
    click.option(
        "--epochs", metavar="N", type=click.IntRange(1), show_default="1", help="Stop after the data were read N times."
    ),
    OPTIMIZER,
    click.option(
        "--learning-rate", metavar="RATE", type=float,
        show_default="2e-4, of all parameters 1e-5; lion a third; mezo 5e-5, 1e-6",
        help="The highest learning rate.",
    ),
    click.option("--schedule", metavar="NAME", default="cosine", help="After the warmup: constant, linear or cosine to 0."),
    click.option(
        "--warmup", metavar="N", type=float, default=0.03, help="Steps of a linear rise; below 1 the part of all steps."
    ),
    click.option("--weight-decay", metavar="D", type=float, default=0.0, help="Decay of matrices, times the rate."),
    click.option(
        "--eps", metavar="EPS", type=float, show_default="1e-8; mezo 1e-2, of all parameters 1e-3",
        help="Of the optimizer: beside a root, or of mezo the size of the noise.",
    ),
    CLIP,
    EMA,
    COMPUTE,
    remat("full, with --memory as fits"),
    TILE,
    LOSS_CHUNK,
    click.option("--seed", metavar="N", type=click.IntRange(0), default=0, help="The same seed gives the same losses."),
)  # fmt: skip
LOADING = (
    click.option("--plan", type=A_FILE, metavar="FILE", help="A plan as JSON; other options go before its fields."),
    click.option("--memory", metavar="SIZE", help="Device memory to use, e.g. 16GB; chooses where layers live."),
    click.option(
        "--ram", metavar="SIZE", show_default="what is free", help="Host memory for layers that do not fit --memory."
    ),
    click.option(
        "--weights", metavar="FORMAT", show_default="the checkpoint's",
        help="Format of frozen weights: int8, int4, nf4, fp8, ...",
    ),
    click.option(
        "--rule", "weight_rules", metavar="PATTERN=FORMAT", multiple=True, show_default="--weights alone",
        help="Format of some frozen weights, e.g. lm_head=int8 or 'layers.*.down=dense'; several times.",
    ),
    click.option(
        "--dtype", metavar="DTYPE", show_default="the checkpoint's; with --train all float32, but for mezo",
        help="Dtype of dense weights.",
    ),
    click.option("--home", metavar="HOME", show_default="device", help="Where layers live: device, host, split."),
    click.option(
        "--form", metavar="FORM", show_default="the home's own; scan of adapters on a GPU, or where a CPU runs layers again",
        help="How layers run: unrolled, scan, ahead; of a split home those that are streamed.",
    ),
    click.option("--resident", metavar="N", type=int, help="Layers of a split home that stay on the device."),
    click.option(
        "--stay", metavar="PATTERN", multiple=True, show_default="vectors",
        help="Parameters of layers on the host to keep on the device, e.g. k; several times.",
    ),
    click.option(
        "--attention", metavar="NAME", show_default="auto",
        help="Its implementation: xla, triton, mosaic_gpu, reference.",
    ),
    click.option("--mesh", metavar="AXES", show_default="one device", help="Several devices, e.g. data=2,tensor=4."),
    click.option(
        "--sharding", metavar="TABLE", show_default="as --mesh",
        help="How parameters are split over them: single, data, fsdp, tensor, fsdp+tensor.",
    ),
)  # fmt: skip
KEEPING = (
    click.option(
        "--eval", "held_out", metavar="FILE", help="Held-out data: a file, or the part of DATA to hold out, e.g. 0.05."
    ),
    click.option(
        "--eval-every", metavar="N", type=click.IntRange(1), show_default="as --save-every",
        help="Steps between held-out losses.",
    ),
    click.option("--save-every", metavar="N", type=click.IntRange(1), default=100, help="Steps between checkpoints."),
    click.option("--keep", metavar="N", type=click.IntRange(1), default=2, help="Checkpoints that stay, and the best one."),
    click.option("--best", is_flag=True, help="Write what the best held-out loss had, not the last step."),
    click.option("--live", is_flag=True, help="Write what the step itself had, not the average that --ema keeps."),
    click.option("--merge", metavar="FOLDER", type=A_FOLDER, help="Write the merged model, a Hugging Face folder, too."),
    click.option("--skip-bad", is_flag=True, help="Leave rows out that cannot be read."),
)  # fmt: skip


def options(*groups: tuple[Any, ...]) -> Any:
    """A decorator of all these options, in order."""

    def add(command: Any) -> Any:
        for option in reversed([o for group in groups for o in group]):
            command = option(command)
        return command

    return add


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("folder")
@click.argument("data", nargs=-1, required=True, type=A_FILE)
@click.option(
    "--out", metavar="OUT", type=A_FOLDER, show_default="FOLDER-DATA-lora, here",
    help="Folder of the run: goes on where it stands.",
)  # fmt: skip
@options(WHAT, HOW, LOADING, KEEPING)
def finetune(folder: str, data: tuple[Path, ...], out: Path | None, **given: Any) -> None:
    """Fine-tune a model that need not fit the device, on text, prompts with completions, or chats.

    FOLDER is a Hugging Face checkpoint folder; 'demo' is the small model that comes along. DATA are jsonl files of rows
    {"text"}, {"prompt", "completion"} or {"messages"}, or plain text. OUT takes checkpoints, TensorBoard events, and at
    the end adapter/ (PEFT), or model/ (Hugging Face) where all parameters were trained. After Ctrl-C or a kill the same
    command goes on as if nothing had been.
    """
    from jaxengine.command import Reading, read_plan, reported, resolve, within

    with reported():
        within(given["memory"])
        folder = resolve(folder)
        given["plan"] = None if given["plan"] is None else read_plan(given["plan"])
        _finetune(folder, data, out, Reading, **given)


def _finetune(folder: str, data: tuple[Path, ...], out: Path | None, reading: Any, **given: Any) -> None:
    keeping = {o: given.pop(o) for o in KEPT}
    merge_into, held_out, adapter = keeping["merge"], keeping["held_out"], given["adapter"]
    if (what := given["train"]) in ("all", "lisa", "badam", "hift"):
        for name in ("rank", "alpha", "rs", "target"):
            if given[name]:
                raise click.UsageError(f"--{name} is of lora and dora: leave it out with --train {what}.")
        if merge_into is not None:
            raise click.UsageError(f"--merge is of lora and dora: with --train {what}, OUT/model is the whole model.")
        if adapter is not None:
            raise click.UsageError(
                f"--adapter starts from lora or dora: leave --train {what} out, or merge the adapter into the model first"
                f" (jaxengine convert --adapter)."
            )
    if held_out is None and (keeping["best"] or keeping["eval_every"]):
        raise click.UsageError("--best and --eval-every ask for held-out data: give --eval too.")
    if keeping["live"] and not given["ema"]:
        raise click.UsageError("--live is of a run with --ema: without one, what a step had is what is written.")
    fraction = _fraction(held_out)
    if merge_into is not None and merge_into.exists() and any(merge_into.iterdir()):
        raise click.UsageError(f"--merge: {merge_into} is not empty: give a new folder.")

    import dataclasses

    import jaxengine
    from jaxengine.finetune.data import Packed, Rows, pack, read
    from jaxengine.finetune.run import SETTINGS, Run, begun, check_out, merge, said
    from jaxengine.loading import tokenizer
    from jaxengine.paths import cache_folder
    from jaxengine.plan import parse_bytes

    arch, plan, settings = chosen_plan(folder, given)
    if out is None:
        model = Path(os.path.abspath(folder))  # as it is called here, links included
        out = Path(f"{model.stem if model.is_file() else model.name}-{data[0].stem}-{settings.train}")
        print(f"--out is not given: the run is in {out}", file=sys.stderr, flush=True)
    planned = (plan, settings)
    if given["memory"] is not None:
        plan, settings = as_begun(out, plan, settings, remat=given["remat"])
    else:  # what goes without saying is what the run began with
        held, _ = as_begun(out, plan, settings, remat=settings.remat)
        like = (held.home, held.resident) == (plan.home, plan.resident) and plan.resolved_form != "python"
        if like and given["form"] is None and given["plan"] is None:
            plan = dataclasses.replace(plan, form=held.form)
        if like and not (given["plan"] is not None and given["plan"].resident_form):
            plan = dataclasses.replace(plan, resident_form=held.resident_form)
    if merge_into is not None:
        _check_apart(merge_into, out)
    check_out(out, said(settings, arch, plan, None if adapter is None else begun(adapter, arch)))
    if given["memory"] is not None and (out / SETTINGS).exists():
        _check_fits(out, arch, plan, settings, given)
        if (plan, settings) != planned:
            print(
                f"{out} goes on as it began, {_homes(plan)}; --memory counts on {_homes(planned[0])} now",
                file=sys.stderr,
                flush=True,
            )
    elif given["memory"] is not None:  # only now that nothing else is to be refused, as it may take a minute
        arch, plan, settings = chosen_plan(folder, given, proved=True)
    words = tokenizer(Path(folder))
    if words is None:
        raise click.UsageError(f"{folder} has no tokenizer: add the tokenizer.json that the model was made with.")
    rows = Rows(words, vocab_size=arch.config.vocab_size)

    def documents(files: tuple[Path, ...]) -> Documents:
        with reading("reading data") as bar:
            return read(
                files, rows, skip_bad=keeping["skip_bad"], cache=cache_folder() / "tokens",
                progress=lambda done, total: bar("", done, total),
            )  # fmt: skip

    def packed(found: Documents) -> Packed:
        return pack(found, settings.context, seed=settings.seed)

    found, held = documents(data), None
    if fraction is not None:
        found, held = found.split(fraction)
    elif held_out is not None:
        held = documents((Path(held_out),))
    held = None if held is None else packed(held)
    trained_on = packed(found)
    settings.make_optimizer(settings.steps_over(len(trained_on)))  # refuses a warmup of all steps before loading
    with reading() as bar:
        model = jaxengine.load(folder, plan=plan, progress=bar)
    model.budget = None if given["memory"] is None else parse_bytes(given["memory"])  # its homes were chosen for it
    run = Run(
        model, settings, trained_on, held, out=out, save_every=keeping["save_every"],
        eval_every=keeping["eval_every"], keep=keeping["keep"], adapter=adapter,
    )  # fmt: skip
    with run:
        try:
            with Steps(run) as shown:
                made = run.run(progress=shown, live=keeping["live"])
        except KeyboardInterrupt:
            print(f"{run.stopped}. To go on, type the same again:\n  {typed()}", file=sys.stderr, flush=True)
            raise
        if run.best is not None and run.best[0] != run.step:
            print(f"the best held-out loss was {run.best[1]:.4f}, after step {run.best[0]}", flush=True)
            if keeping["best"]:
                run.take_best()
                run.export(live=keeping["live"])
        if made:
            print(f"{made[-1].step} steps; the last loss was {made[-1].loss:.4f}", flush=True)
        print(f"wrote {out / ('adapter' if settings.train in ('lora', 'dora') else 'model')}", flush=True)
        if merge_into is not None:
            merge(run.tuned(live=keeping["live"]), merge_into)
            print(f"wrote {merge_into}", flush=True)


def _check_apart(merge_into: Path, out: Path) -> None:
    """Refuse to merge into what the run itself writes, which is found out only after it."""
    from jaxengine.finetune.run import ADAPTER, CHECKPOINTS, EVENTS, SETTINGS

    into, own = merge_into.expanduser().resolve(), out.expanduser().resolve()
    taken = [own / name for name in (ADAPTER, CHECKPOINTS, EVENTS, SETTINGS)]
    if into == own or into in own.parents or any(path == into or path in into.parents for path in taken):
        raise click.UsageError(f"--merge: {merge_into} is where the run in {out} is written: give another folder.")


def typed() -> str:
    """What was typed to start this process, as a shell takes it."""
    program, main = Path(sys.argv[0]), sys.modules["__main__"].__spec__
    if main is not None:
        return shlex.join(["python", "-m", main.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join([*(["python", sys.argv[0]] if program.suffix == ".py" else [program.name]), *sys.argv[1:]])


def _fraction(held_out: str | None) -> float | None:
    """The part of the data that is held out; None where a file is, or nothing."""
    if held_out is None or Path(held_out).is_file():
        return None
    try:
        found = float(held_out)
    except ValueError:
        raise click.UsageError(
            f"--eval: there is no file {held_out}; give a file, or a number between 0 and 1, such as 0.05."
        ) from None
    if not 0 < found < 1:
        raise click.UsageError(
            f"--eval: {held_out} is no part of the data; give a number between 0 and 1, such as 0.05."
        )
    return found


class NothingFitsError(ValueError):
    """No home holds a step. settings, plan: what was asked for; enough: options of more memory that would hold it."""

    def __init__(self, said: str, settings: Settings, plan: Plan, enough: dict[str, str]) -> None:
        super().__init__(said)
        self.settings, self.plan, self.enough = settings, plan, enough


def chosen_plan(folder: str, given: dict[str, Any], *, proved: bool = False) -> tuple[Architecture, Plan, Settings]:
    """What these options make of a folder, checked against each other before anything is loaded.

    With --memory: the nearest home in which a step fits, and what is kept for the way back unless --remat says it; proved: by
    what is compiled, on a GPU. Raises ValueError where nothing fits, with what would.
    """
    if given["memory"] is not None:  # of this process; what would fit may ask for more of another
        import jax

        from jaxengine.loading import check_pool
        from jaxengine.plan import parse_bytes

        check_pool(jax.devices()[0], parse_bytes(given["memory"]))
    try:
        return _chosen_plan(folder, given, proved=proved)
    except NothingFitsError as error:
        found = _would_fit(folder, given, error)
        near = (
            f"Nearest: {', or '.join(found)}"
            if found
            else "No single one of memory, batch, context, weights and train is enough"
        )
        raise ValueError(f"{error}. {near}") from None


def _would_fit(folder: str, given: dict[str, Any], refused: NothingFitsError) -> list[str]:
    """Options with which a step fits, each set alone: those that keep what is learned first, more memory last."""
    from bisect import bisect_left

    from jaxengine.finetune.settings import ADAPTERS
    from jaxengine.plan import on_one

    settings, plan = refused.settings, refused.plan
    B, T, beside = settings.batch, settings.context, settings.train in ADAPTERS

    def fits(changed: dict[str, Any]) -> bool:
        try:
            _chosen_plan(folder, {**given, **changed})
        except ValueError:  # too large still, or no run of these options
            return False
        return True

    share = on_one(plan, ("batch",), (B,))[0]
    rows = [B >> i for i in range(1, B.bit_length())]
    rows = [b for b in rows if on_one(plan, ("batch",), (b,))[0] * (B // share) == b]
    tries: list[list[dict[str, Any]]] = [[{"remat": None}]] if given["remat"] is not None else []
    tries += [[{"ema": None}]] if given["ema"] else []
    tries.append([{"batch": b, "accumulate": settings.accumulate * (B // b)} for b in rows])
    if beside and plan.weights == "dense" and not plan.weight_rules:
        tries.append([{"weights": name} for name in ("int8", "nf4")])
    if beside and settings.rank > 8 and given["adapter"] is None:
        tries.append([{"rank": 8}])
    tries.append([{"context": T >> i} for i in range(1, 12) if T >> i >= 64])
    if not beside:
        lora: dict[str, Any] = {"train": "lora", "layers": None, "every": None, "order": None}
        tries.append([lora, lora | {"weights": "int8"}, lora | {"weights": "nf4"}])
    tries.append([refused.enough])
    said = []
    for values in tries:
        if values and fits(values[-1]):  # the mildest, where what follows one that fits does too
            said.append(_as_options(values[min(bisect_left(values, True, key=fits), len(values) - 1)]))
    return said


def _as_options(changed: dict[str, Any]) -> str:
    """'--batch 2 --accumulate 4', as they are typed; None: left out."""
    typed = " ".join(f"--{name} {value}" for name, value in changed.items() if value is not None)
    return typed or f"without {', '.join(f'--{name}' for name in changed)}"


def _chosen_plan(folder: str, given: dict[str, Any], *, proved: bool = False) -> tuple[Architecture, Plan, Settings]:
    """`chosen_plan`, which says what would fit where nothing does."""
    import dataclasses
    import functools

    from jaxengine.architecture import architecture
    from jaxengine.export import one_dtype
    from jaxengine.finetune import meshed
    from jaxengine.finetune.planning import variants
    from jaxengine.finetune.run import begun, check
    from jaxengine.finetune.settings import Settings
    from jaxengine.plan import (
        Plan,
        check_mesh,
        lacking,
        refuted_by_compiling,
        rounded_up,
        settled,
        show_bytes,
        with_rules,
        with_table,
    )
    from jaxengine.planning import worth_ahead
    from jaxengine.sources import open_source, read_config
    from sharding.mesh import make_mesh

    loading = {n: given[n] for n in ("weights", "dtype", "home", "form", "resident", "attention", "mesh", "sharding")}
    loading["stay"] = given["stay"] or None  # click has () where nothing is said
    beside = {*loading, "plan", "memory", "ram", "target", "adapter", "weight_rules"}
    chosen = {k: v for k, v in given.items() if v is not None and k not in beside}
    if given["target"]:
        chosen["targets"] = given["target"]
    raw, memory = read_config(Path(folder)), given["memory"]
    with open_source(Path(folder), architecture(raw)) as source:
        arch = source.architecture
        chosen.setdefault("context", min(CONTEXT, arch.config.max_position_embeddings))
        plan = given["plan"] or Plan()
        if plan.remat and memory is None:
            chosen.setdefault("remat", plan.remat)
        if given["adapter"] is not None:
            start = begun(given["adapter"], arch)
            named = {n: x for n, x in chosen.items() if n != "rs" or x}  # a flag that is not given says nothing
            start.check(named, arch)
            chosen = {**chosen, **start.settings}
        settings = Settings(**chosen)
        if given["plan"] is None and source.plan is not None:
            plan = Plan(dtype=source.plan.dtype, weights=source.plan.weights, weight_rules=source.plan.weight_rules)
        said = {k: v for k, v in loading.items() if v is not None}
        if said.get("home", "split") != "split":
            said["resident_form"] = ""
        plan = with_table(dataclasses.replace(plan, **said), mesh=given["mesh"], sharding=given["sharding"])
        plan = with_rules(arch, plan, given["weight_rules"])
        if plan.kv_codec != "raw":
            raise ValueError(f"kv_codec is {plan.kv_codec!r}; fine-tuning keeps no cache: leave it out of the plan")
        if not plan.dtype:
            own = "float32" if settings.train == "all" and settings.backward else one_dtype(arch, source.dtype, raw)
            plan = dataclasses.replace(plan, dtype=own)
    if memory is None:
        if given["ram"] is not None:
            raise click.UsageError("--ram is for layers that do not fit --memory: give --memory too.")
        mesh = make_mesh(plan.mesh or None)
        plan = _with_loops(arch, plan, settings)
        check(settings, arch, plan, mesh)
        return arch, plan, settings
    if odd := [n for n in ("home", "form", "resident") if n in said]:
        raise click.UsageError(f"--memory chooses the home: leave --{odd[0]} out, or --memory.")
    budget, room = _limits(given)
    plan = dataclasses.replace(
        plan, home="device", form="", resident=0, kept=0, resident_form="", remat=given["remat"] or ""
    )
    check_mesh(arch, plan)
    mesh = make_mesh(plan.mesh or None)
    check(settings, arch, plan, mesh)
    if plan.mesh:
        meshed.check(arch, plan, settings.task, batch=settings.batch)
    rows: dict[str, Any] = {"batch": settings.batch, "context": settings.context}
    card = _card()
    # as `jaxengine plan` asks of that card; of one that is not in its table, and on a CPU, nothing is known or gained
    ahead = card is not None and worth_ahead(arch, plan, settings.task, card, **rows)
    how: dict[str, Any] = {"ahead": ahead, "scanned": _scanned_remats(), **_on_card(card)}
    under = functools.partial(variants, arch, plan, settings.task, ram=room, **how, **rows)
    found = under(memory=budget)
    fits = next((v for v in found if not v.refused), None)
    if fits is None:
        least = min(found, key=lambda v: (v.barred, v.need.device > budget, v.need.device))
        over, beyond = lacking(least.need, budget, room)
        enough = {"memory": rounded_up(least.need.device, 2**62)[0].replace(" ", "")} if over else {}
        enough |= {"ram": rounded_up(least.need.host, 2**62)[0].replace(" ", "")} if beyond else {}
        raise NothingFitsError(
            f"memory={memory!r}: a step on {settings.batch} x {settings.context} tokens needs at least"
            f" {show_bytes(least.need.device)} of the device and {show_bytes(least.need.host)} of host memory (home"
            f" {least.plan.home!r}, remat {least.plan.remat!r}): {least.refused}",
            settings, plan, enough,
        )  # fmt: skip
    if proved and (compiled := _holds(arch, settings, budget, mesh)) is not None:
        fits, refuted = settled(found, lambda tight: under(memory=tight), compiled, budget)
        if fits is None:
            raise ValueError(refuted_by_compiling(memory, refuted))
    settings, plan = dataclasses.replace(settings, remat=fits.plan.remat), fits.plan
    plan = _with_loops(arch, plan, settings)
    check(settings, arch, plan, mesh)
    return arch, plan, settings


def _holds(arch: Architecture, settings: Settings, memory: int, mesh: Any) -> Any:
    """`proof.holds` of a step."""
    from jaxengine.paths import cache_folder
    from jaxengine.proof import holds

    return holds(
        arch,
        mesh,
        batch=settings.batch,
        length=settings.context,
        memory=memory,
        folder=cache_folder(),
        task=settings.task,
    )


def _limits(given: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the device and of host memory that --memory and --ram, or what is free, leave to a run."""
    import jax

    from jaxengine.machine import available_ram, pool_limit_bytes
    from jaxengine.plan import parse_bytes

    room = available_ram() if given["ram"] is None else parse_bytes(given["ram"], "ram")
    if jax.devices()[0].platform == "gpu":
        room = min(room, pool_limit_bytes())
    return parse_bytes(given["memory"]), room


def _on_card(card: Card | None) -> dict[str, Any]:
    """What the count of bytes asks of this device; card: None where it is not in the table."""
    from jaxengine.finetune.planning import keeps_gelu
    from pallas_kernels.dispatch import below_ampere

    return {"wide": below_ampere(), "keeps_gelu": card is not None and keeps_gelu(card)}


def _card() -> Card | None:
    """This device, where the table of cards has it."""
    import jax

    from pallas_kernels.cards import CARDS

    return next((c for c in CARDS.values() if c.kind == jax.devices()[0].device_kind), None)


def as_begun(out: Path, plan: Plan, settings: Settings, *, remat: str | None = None) -> tuple[Plan, Settings]:
    """The plan and settings with the homes, form and remat (but for one that is given) of the run that stands in `out`, if one
    does. What --memory chooses depends on the host memory that is free as it starts; a run that goes on has what it began with,
    or its losses would round differently."""
    import dataclasses
    import json

    from jaxengine.finetune.run import SETTINGS

    try:
        held = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        home, form, resident = (held["plan"][n] for n in ("home", "form", "resident"))
        near = held["plan"].get("resident_form", "")
        remat = held["remat"] if remat is None else remat
    except (OSError, ValueError, TypeError, KeyError):  # none, or no run's: said where it is checked
        return plan, settings
    now = (plan.home, plan.resolved_form, plan.resident, plan.resident_form, settings.remat)
    if (home, form, resident, near, remat) == now:
        return plan, settings
    try:
        begun = dataclasses.replace(plan, home=home, form=form, resident=resident, resident_form=near, remat=remat)
        settings = dataclasses.replace(settings, remat=remat)
    except (TypeError, ValueError):  # no plan: what differs is said
        return plan, settings
    return begun, settings


def _homes(plan: Plan) -> str:
    """'with home 'split', 12 resident, form 'scan', remat 'full''."""
    how = f" ({plan.resident_form})" if plan.resident_form else ""
    resident = f" {plan.resident} resident{how}," if plan.resident else ""
    return f"with home {plan.home!r},{resident} form {plan.resolved_form!r}, remat {plan.remat!r}"


def _check_fits(out: Path, arch: Architecture, plan: Plan, settings: Settings, given: dict[str, Any]) -> None:
    """Refuse to go on with a run whose plan is more than there is now."""
    from jaxengine.finetune.planning import need
    from jaxengine.plan import lacks, show_bytes
    from sharding.mesh import make_mesh

    rows: dict[str, Any] = {"batch": settings.batch, "context": settings.context}
    n, (budget, room) = need(arch, plan, settings.task, **_on_card(_card()), **rows), _limits(given)
    lacking = lacks(n, budget, room)
    if not lacking and (compiled := _holds(arch, settings, budget, make_mesh(plan.mesh or None))) is not None:
        device, _ = compiled(plan)
        lacking = "" if device <= budget else f"{show_bytes(device - budget)} over on the device, compiled"
    if lacking:
        raise ValueError(
            f"{out} is of a run with home {plan.home!r} and remat {plan.remat!r}, which takes {show_bytes(n.device)} of the"
            f" device and {show_bytes(n.host)} of host memory: {lacking}. Another plan would not give the losses of an unbroken"
            f" run: make so much free (or say it with --memory and --ram), or give another folder"
        )


def _with_loops(arch: Architecture, plan: Plan, settings: Settings) -> Plan:
    """The plan with resident layers in a loop, where nobody says and that is better."""
    import dataclasses

    from jaxengine.finetune.planning import scans

    if plan.home == "device" and not plan.form and _better_scanned(arch, plan, settings):
        return dataclasses.replace(plan, form="scan")
    in_turn = settings.remat in _scanned_remats() and plan.resolved_form != "python"
    looped = in_turn and scans(arch, dataclasses.replace(plan, remat=settings.remat), settings.task)
    if looped and plan.home == "split" and plan.resident > 1 and not plan.resident_form:
        return dataclasses.replace(plan, resident_form="scan")
    return plan


def _better_scanned(arch: Architecture, plan: Plan, settings: Settings) -> bool:
    """Whether layers on this device should be scanned, where nobody says: on a GPU where a plan has them so, and on a CPU where
    they are run again, which XLA:CPU does long before they are gone back through where they are written out, or there is no
    gradient (scripts/LOG.md)."""
    import dataclasses

    import jax

    from jaxengine.finetune.planning import same_targets, scans

    if settings.remat not in _scanned_remats():
        return False
    if jax.default_backend() == "gpu":
        return scans(arch, dataclasses.replace(plan, remat=settings.remat), settings.task)
    return same_targets(arch, dataclasses.replace(plan, form="scan"), settings.task)


def _scanned_remats() -> tuple[str, ...]:
    """Under which resident layers are better scanned on this machine."""
    import jax

    from jaxengine.walk import REMAT

    return {"gpu": tuple(REMAT), "cpu": ("full",)}.get(jax.default_backend(), ())


LINES = 40  # about so many of a run, where standard error is no terminal


class Steps:
    """Steps, loss, tokens/s and bytes by tier on standard error: one line that changes where that is a terminal, elsewhere (a
    file, a batch system's log) a line at the first and the last step and at every `every`th. Held-out losses are printed in
    any case."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._bar: Any = None
        self._first = True
        self.every = max(1, math.ceil(run.steps / LINES))

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("steps"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True, redirect_stdout=False,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=self._run.steps, completed=self._run.step)
        return self

    def __call__(self, record: Record) -> None:
        """A step was made."""
        from jaxengine.plan import show_bytes

        memory = ", ".join(f"{tier} {show_bytes(n)}" for tier, n in self._run.memory().items() if n)
        what = f"loss {record.loss:.4f}, {record.tokens_per_second:,.0f} tokens/s, {memory}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=what)
        elif self._first or record.step % self.every == 0 or record.step == record.steps:
            print(f"step {record.step} of {record.steps}: {what}", file=sys.stderr, flush=True)
        self._first = False
        if record.eval_loss is not None:
            if self._bar is not None:
                self._bar.stop()
            print(f"step {record.step}: held-out loss {record.eval_loss:.4f}", flush=True)
            if self._bar is not None:
                self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
