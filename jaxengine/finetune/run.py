"""A run of fine-tuning: steps over data, their losses, checkpoints, and what comes out at the end.

    model = jaxengine.load(folder)
    rows = pack(read("data.jsonl", Rows(model.tokenizer)), 1024)
    run = Run(model, Settings(epochs=2), rows, out="out")
    run.run()                                    # or: with run: for record in run: print(record.loss)
    run.tuned().generate("...")

**Going on.** In `out` stand settings.json (what decides the losses), checkpoints/ (orbax: what is trained, the optimizer's
state and the position in the data), events/ (TensorBoard) and, at the end, adapter/ (PEFT) or model/ (Hugging Face). A Run
over a folder that holds an unfinished one goes on from its last checkpoint. A step is a pure function of state and batch,
and a batch of seed and position: so the losses are those of an unbroken run, bit for bit, wherever it was killed, on the
same machine and versions. Other settings are refused.

**Saving** is asynchronous: orbax copies the state to host memory before the next step may write over it, and to disk
beside the next steps. A checkpoint appears under its name when it is whole. The last `keep` stay, and the one with the
lowest held-out loss. The trade-off is host memory for one more copy of the state while it is written.

**Ctrl-C** waits for the step in hand, whose state would be half written over otherwise. A held-out loss that was due then is
taken when the run goes on.

A accumulated parts, B rows of a part, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from checkpoints.output import in_the_making, output_file, output_folder, room_is_said
from checkpoints.peft import Adapter, AdapterConfig, read_adapter, uniform, write_adapter
from jaxengine import export, placement
from jaxengine.architecture import Architecture
from jaxengine.finetune import average, layered, mezo, places, sampled
from jaxengine.finetune import step as whole
from jaxengine.finetune.data import Batches, Packed
from jaxengine.finetune.events import EventWriter
from jaxengine.finetune.planning import abstract_trained, check_joined, same_targets
from jaxengine.finetune.sampled import SAMPLED
from jaxengine.finetune.settings import ADAPTERS, Settings
from jaxengine.finetune.step import Batch, State, Tuning
from jaxengine.finetune.trained import base
from jaxengine.finetune.trained.base import targets, trained
from jaxengine.homes.base import home
from jaxengine.model import Model
from jaxengine.plan import Plan, check_attention, check_stay, show_bytes
from jaxengine.weights.base import Weight

log = logging.getLogger("jaxengine")

SETTINGS, CHECKPOINTS, EVENTS, ADAPTER, MODEL = "settings.json", "checkpoints", "events", "adapter", "model"
EVAL_LOSS = "eval_loss"
BESIDE = 2**20  # bytes of a checkpoint that are not of its arrays, at most


def check(settings: Settings, architecture: Architecture, plan: Plan, mesh: jax.sharding.Mesh) -> None:
    """Refuse, before anything is allocated, settings that this model under this plan cannot be trained with.

    Raises ValueError with what was given, the rule, and what can be given in its place.
    """
    if settings.context > (most := architecture.config.max_position_embeddings):
        raise ValueError(
            f"context is {settings.context}, and the model has positions for {most} tokens: at most {most}"
        )
    forms = {part.form for part in plan.parts(architecture)}
    if "python" in forms or any(home(part.home).TIER == "disk" for part in plan.parts(architecture)):
        raise ValueError(
            f"home is {plan.home!r} and form {plan.resolved_form!r}: no run trains through layers that are read from disk or"
            f" brought from outside of a program. Say home='host', or home='split' with resident=, and leave form out (the"
            f" weights of a quantised format take less room: weights='nf4', train='lora')"
        )
    if "ahead" in forms and (why := _not_ahead(settings)):
        raise ValueError(f"form is 'ahead', and {why}: say form='scan', or leave form out")
    check_stay(architecture, plan)
    check_attention(architecture, plan, training=True, dtype=settings.compute)
    if jax.process_count() > 1:
        raise ValueError(f"a run is of one process, and there are {jax.process_count()}")
    over = plan.sharding_rules().spec(("batch",))[0]
    split = math.prod(mesh.shape[a] for a in ((over,) if isinstance(over, str) else over or ()))
    if settings.batch % split:
        fits = max(1, round(settings.batch / split)) * split
        raise ValueError(
            f"batch is {settings.batch}, and the mesh splits rows over {split} devices: say batch={fits}, or any multiple"
        )
    abstract_trained(architecture, plan, settings.task, placement.abstract(architecture, plan, mesh))
    if settings.train == "dora":
        check_joined(architecture, settings.targets)


def _not_ahead(settings: Settings) -> str:
    """Why layers could not each be fetched while the one before it is computed: '' where they can."""
    if settings.train not in ADAPTERS:
        return f"train={settings.train!r} changes layers in host memory in a loop of its own, a layer at a time"
    if not settings.backward:
        return f"optimizer={settings.optimizer!r} changes what stands beside each layer while that is there"
    if settings.remat == "dots":
        return "on its way back it keeps of a layer what comes into it alone, and remat is 'dots'"
    return ""


def run_too_early(settings: Settings, model: Model) -> str:
    """What to know, on a CPU, of layers that are run again on the way back and are written out: '' where none are. What is
    advised is what this model takes: where a budget has chosen homes, no form and no more memory are."""
    arch, plan = model.architecture, model.plan

    def listed(plan: Plan) -> bool:
        return any(part.home == "device" and part.form == "unrolled" for part in plan.parts(arch))

    if not settings.backward or settings.remat != "full" or not listed(plan):
        return ""
    said = "remat='full' saves little memory on a CPU where layers are written out, as XLA runs them again too early"
    if model.budget is not None:
        return f"{said}: a step may take more than memory="
    looped = dataclasses.replace(plan, form="scan")
    scanned = plan.home == "device" and same_targets(arch, looped, settings.task) and not listed(looped)
    advice = "load the model with form='scan', or say remat='none'" if scanned else "say remat='none'"
    return f"{said}: {advice}, which runs nothing again"


# ---------------------------------------------------------------------------------------------------------------------
# What a folder says of its run


def said(settings: Settings, architecture: Architecture, plan: Plan, begun: Begun | None = None) -> dict[str, Any]:
    """What settings.json holds: what decides the losses, in plain numbers and text. begun: the adapter that it starts from."""
    deciding = (
        "dtype", "weights", "weight_rules", "home", "form", "resident", "resident_form", "stay",
        "attention", "sharding", "rules", "mesh",
    )  # fmt: skip
    config = hashlib.sha256(repr((architecture.family, architecture.config)).encode()).hexdigest()[:16]
    made = {
        **dataclasses.asdict(settings),
        "plan": {n: getattr(plan, n) for n in deciding}
        | {"form": plan.resolved_form, "resident_form": plan.resident_form.replace("unrolled", "")},
        "model": {"config": config} | ({} if begun is None else {"adapter": begun.digest}),
        "jax": {"version": jax.__version__, "device": jax.devices()[0].device_kind},
    }
    return json.loads(json.dumps(made))


def check_out(out: str | os.PathLike[str], wanted: Mapping[str, Any]) -> None:
    """Refuse a folder of another run, naming what differs; one that is not there or empty is taken."""
    out = Path(out)
    if not out.exists():
        return
    path = out / SETTINGS
    if not path.is_file():
        # a process that ended while it first wrote the settings leaves what it wrote them in
        if not out.is_dir() or not all(in_the_making(entry, path) for entry in out.iterdir()):
            raise ValueError(f"{out} holds something and no {SETTINGS}: it is no run's folder. Give a new one")
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give another folder") from None
    if not isinstance(held, dict) or not isinstance(held.get("plan", {}), dict):
        raise ValueError(f"{path} does not hold a run's settings: give another folder")
    was, now = _flat(_filled(held, wanted)), _flat(wanted)
    # a constant rate, after a warmup of so many steps, does not ask how long the run will be
    longer = was.get("schedule") == "constant" and was.get("steps") and (now["warmup"] == 0 or now["warmup"] >= 1)
    grown = {"steps"} if longer else set()
    elsewhere = any(was.get(n) != now[n] for n in ("jax.version", "jax.device"))
    unsaid = {"model.weights", "model.layers"} - now.keys()  # the command asks before it loads them
    if "model.layers" not in was or (elsewhere and (now["plan.weights"] != "dense" or now["plan.weight_rules"])):
        unsaid.add("model.layers")  # of an older version; and in a format, codes may round differently there
    known = (was.keys() | now.keys()) - unsaid
    odd = [n for n in sorted(known) if n not in grown and not n.startswith("jax.") and was.get(n) != now.get(n)]
    if odd:
        listed = ", ".join(f"{n.removeprefix('plan.')} was {was.get(n)!r} and is {now.get(n)!r}" for n in odd)
        raise ValueError(
            f"{out} is of another run, and going on with it would not give the losses of an unbroken one: {listed}. Say the"
            f" same again to go on, or give another folder"
        )
    for n in ("jax.version", "jax.device"):
        if was.get(n) != now[n]:
            log.warning(
                "%s: began with %s %s, and this is %s: the losses may round differently", out, n, was[n], now[n]
            )


def _filled(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a run of an older version does not say of itself is as where nobody says it."""
    known, usual = {f.name for f in dataclasses.fields(Settings)}, Plan()
    plan = json.loads(json.dumps({n: getattr(usual, n) for n in wanted["plan"]})) | held.get("plan", {})
    try:
        settings = Settings.from_json(json.dumps({n: x for n, x in held.items() if n in known}))
    except ValueError:  # nothing that a run of this version can be: what differs is said
        return {**held, "plan": plan}
    return json.loads(settings.to_json()) | {**held, "plan": plan}


def _flat(tree: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{lead}{name}.") if isinstance(value, Mapping) else {lead + name: value}
    return found


def _weights_of(params: Any) -> list[Any]:
    """Each array or Weight."""
    return jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, Weight))


def _weights_digest(params: Any) -> str:
    """Sixteen hex digits of the first rows of what stands outside the layers: another model's differ."""
    made = hashlib.sha256()
    for leaf in jax.tree.leaves(params["outer"]):
        made.update(np.asarray(jax.device_get(leaf[:64] if leaf.ndim else leaf)).tobytes())
    return made.hexdigest()[:16]


def _layers_digest(model: Model) -> str:
    """Sixteen hex digits of some rows of each matrix of each layer: those of a model that has something merged into it differ."""
    made = hashlib.sha256()
    for name, few in sorted(placement.few_numbers(model.architecture, model.plan, model.params).items()):
        made.update(name.encode() + b"".join(x.tobytes() for x in few))
    return made.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# An adapter to start from


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a run starts from in the place of a fresh A and B: a PEFT folder's adapters, all of one rank and scale, and what
    settings say of them (train, rank, alpha, rs, targets)."""

    folder: Path
    adapters: Mapping[str, Adapter]
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the numbers."""
        made = hashlib.sha256()
        for name, one in sorted(self.adapters.items()):
            arrays = (one.a, one.b) if one.magnitude is None else (one.a, one.b, one.magnitude)
            made.update(name.encode() + b"".join(np.asarray(x, np.float32).tobytes() for x in arrays))
        return made.hexdigest()[:16]

    def check(self, given: Mapping[str, Any], architecture: Architecture) -> None:
        """Refuse settings of which the folder says something else."""
        for name in (n for n in self.settings if n in given):
            was, now = self.settings[name], given[name]
            same = was == now
            if name == "targets":
                same = same or set(targets(architecture, was)) == set(targets(architecture, now))
            if not same:
                raise ValueError(
                    f"{name} is {now!r}, and that of the adapter in {self.folder} is {was!r}, which a run that starts from it"
                    f" keeps: say {name}={was!r}, or start without an adapter"
                )

    def fill(self, name: str, leaf: Mapping[str, Any]) -> dict[str, Any]:
        """One matrix's trained arrays, with the folder's in the place of fresh ones."""
        return {**leaf, **_arrays(self.adapters.get(name))}


def begun(folder: str | os.PathLike[str], architecture: Architecture) -> Begun:
    """A PEFT folder as a run starts from it: `Settings(**begun(...).settings)`.

    Raises CheckpointError for a folder that does not fit the model, ValueError for an adapter that no run trains.
    """
    adapters, config = uniform(
        *read_adapter(folder, architecture.name_table(), architecture.params(), architecture.num_layers)
    )
    if outside := next((n for n in adapters if not n.startswith("layers.")), None):
        raise ValueError(
            f"adapter: {os.fspath(folder)} has one beside {outside}, and a run trains beside matrices inside layers alone: merge"
            f" it into the model (`jaxengine convert FOLDER NEW --to hf --adapter {os.fspath(folder)}`) and train that"
        )
    found: list[str] = []
    for short in dict.fromkeys(n.split(".", 2)[2] for n in adapters):
        full = targets(architecture, (short,))
        found += [short] if adapters.keys() >= set(full) else [n for n in full if n in adapters]
    settings = {
        "train": "dora" if config.dora else "lora", "rank": config.rank, "alpha": config.alpha, "rs": config.rslora,
        "targets": tuple(found),
    }  # fmt: skip
    return Begun(Path(folder), adapters, settings)


def _arrays(one: Adapter | None) -> dict[str, np.ndarray]:
    """An adapter's arrays by the names that they are trained under, float32; none of none."""
    found = {} if one is None else {"a": one.a, "b": one.b, "magnitude": one.magnitude}
    return {n: np.asarray(x, np.float32) for n, x in found.items() if x is not None}


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass(frozen=True)
class Record:
    """A step that was made. loss: before it, mean nats of a learned token; step: from 1 on; tokens: learned ones;
    tokens_per_second: of all tokens in the rows; eval_loss: after it, held-out, where that was due."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    eval_loss: float | None = None


class Run:
    """Steps of fine-tuning over packed rows; an iterator of Records, one a step.

    rows, held_out: packed with the settings' context. out: the folder (None: nothing is written); save_every, eval_every:
    steps between checkpoints and held-out losses (eval_every None: as save_every; both are always made at the end); keep:
    checkpoints that stay, the best one apart. adapter: a PEFT folder of LoRA or DoRA to start from; what the settings say of
    rank, alpha, rs and targets is the folder's own (`begun`).

    With 'lora' and 'dora' the model stays as it is, and `tuned()` is the model with what is trained beside it. With the
    others the model's own arrays are trained: it holds the trained parameters at every time (of 'mezo', but for the last
    step's change, which `tuned`, `evaluate`, `export` and the end of the run make). With `ema` the average of what is trained
    is evaluated, written and `tuned()`, unless live=True is said; where the model itself is trained, it holds the average from
    then to the next step.

    Raises ValueError, before anything is allocated, for settings that do not fit the model, and for an `out` of another
    run; and when a loss, a gradient or what is trained is no number any more, which is then neither saved nor written.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        rows: Packed,
        held_out: Packed | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        save_every: int = 100,
        eval_every: int | None = None,
        keep: int = 2,
        adapter: str | os.PathLike[str] | None = None,
    ):
        eval_every = save_every if eval_every is None else eval_every
        for name, given in (("save_every", save_every), ("eval_every", eval_every), ("keep", keep)):
            if not isinstance(given, int) or given < 1:
                raise ValueError(f"{name} is {given!r}; it is a whole number, at least 1")
        for name, packed in (("rows", rows), ("held_out", held_out)):
            if packed is not None and packed.context != settings.context:
                raise ValueError(
                    f"{name} are packed for {packed.context} tokens, and the context is {settings.context}"
                )
        if any(isinstance(w, Weight) and w.beneath is not None for w in _weights_of(model.params)):
            raise ValueError(
                "the model has an adapter beside its matrices, and what a run trains would stand beside it and be written"
                " without it: load the model without adapter= and say Run(..., adapter=FOLDER) to start from it, or merge it"
                " first (jaxengine.finetune.run.merge) and load what that wrote"
            )
        self._begun = None if adapter is None else begun(adapter, model.architecture)
        if self._begun is not None:
            self._begun.check({n: getattr(settings, n) for n in self._begun.settings}, model.architecture)
        check(settings, model.architecture, model.plan, model.mesh)
        if settings.train not in ADAPTERS and out is not None and not model.origin.config:
            raise ValueError(
                "the model was made without a config.json, which out/model needs: give from_arrays its fields"
            )
        self.model, self.settings, self.held_out = model, settings, held_out
        self.save_every, self.eval_every, self.keep = save_every, eval_every, keep
        self.step, each = 0, settings.batch * settings.accumulate
        self.steps = settings.steps_over(len(rows))
        engine = dataclasses.replace(model.engine, dtype=settings.compute, chunk=0)
        self.tuning: Any = Tuning(  # in the place of a Program's Engine
            engine, settings.train, settings.options, settings.make_optimizer(self.steps), settings.remat,
            settings.task.clip, settings.loss_chunk, settings.tile,
        )  # fmt: skip
        self.out = None if out is None else Path(out).expanduser().resolve()
        self._batches = functools.partial(Batches, rows, each, seed=settings.seed, epochs=settings.epochs or None)
        self._every = settings.train not in ADAPTERS
        self._layered = settings.task.layered(model.plan)
        self._eval_loss = (-1, math.nan)  # (step, loss)
        self._averaged = False  # whether the average stands where what is trained does, and that where the average did
        self._events: EventWriter | None = None
        self._ahead: tuple[Batch, int, dict[str, Any]] | None = None
        self._manager: Any = None
        self._open()

    def _open(self) -> None:
        """The state at the beginning, or where the folder's run stands."""
        model, settings = self.model, self.settings
        if self.out is not None:
            wanted = said(self.settings, model.architecture, model.plan, self._begun)
            if not self._every:
                wanted["model"] |= {"weights": _weights_digest(model.params), "layers": _layers_digest(model)}
            check_out(self.out, wanted)
            self.out.mkdir(parents=True, exist_ok=True)
            with output_file(self.out / SETTINGS, overwrite=True) as path:
                path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            self._manager = _manager(self.out / CHECKPOINTS, self.keep, best=self.held_out is not None)
        self._frozen = jax.tree.map(lambda a: None, model.params) if self._every else model.params
        self._banks = tuple(dataclasses.replace(bank, weights=()) for bank in model.params["banks"])
        self._abstract = self._abstract_state()
        latest = None if self._manager is None else self._manager.latest_step()
        if self._manager is not None and latest != self.steps:
            try:
                self._check_room()
            except OSError:
                self._manager.close()  # its threads would tell of the end of the process
                raise
        if latest is not None:
            self._check_whole(latest)
        self._feed = self._batches(state=None if latest is None else self._saved_position(latest))
        self._position = self._feed.state
        if latest is None:
            self._state = self._first_state()
        else:
            self._restore(latest)
            log.info("%s: going on after step %d of %d", self.out, self.step, self.steps)
        if self.settings.train in SAMPLED:  # float32 in the place of what was loaded narrower
            model.params = self._combined()
        self._first = self.step + 1
        self._standing = self._count()
        if jax.default_backend() == "cpu" and (why := run_too_early(settings, model)):
            log.info("%s", why)

    def _abstract_state(self) -> State:
        """The state's shapes, dtypes and places."""
        arch, plan, mesh, task = self.model.architecture, self.model.plan, self.model.mesh, self.settings.task
        made = abstract_trained(arch, plan, task, placement.abstract(arch, plan, mesh))
        return places.state(self.tuning, task, arch, plan, made, self._banks)

    def _first_state(self) -> State:
        model, settings, wanted = self.model, self.settings, self._abstract
        key = jax.random.key(settings.seed)
        made = trained(settings.train).make(settings.options, model.architecture, model.plan, model.params, key)
        if self._begun is not None:
            made = _filled_in(model, made, self._begun)
        if self._layered:
            return layered.initial(self.tuning, self._banks, made)
        if settings.train in SAMPLED:
            return sampled.initial(self.tuning, self._banks, made)
        if not settings.backward:
            made = jax.device_put(made, jax.tree.map(lambda s: s.sharding, wanted.trained))
            return mezo.initial(self.tuning, made, settings.seed)
        where = jax.tree.map(lambda s: s.sharding, (wanted.trained, wanted.optimizer, wanted.step))
        made = jax.device_put(made, where[0])
        optimizer = jax.jit(self.tuning.optax().init, out_shardings=where[1])(made)  # each moment where it will stand
        return State(made, optimizer, jax.device_put(np.int32(0), where[2]))

    # --- steps -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Record:
        if self.step == self._first - 1:
            self._score_again()
        if self.step >= self.steps:
            raise StopIteration
        self._show(live=True)
        with interrupts_deferred():
            start = time.perf_counter()
            batch, seen, position = self._ahead or self._next_batch()
            self._ahead = None
            state, measured = self._advance(batch)
            self._take(state)
            self.step, self._position = self.step + 1, position
            if self.step < self.steps:
                self._ahead = self._next_batch()  # read while the device computes
            numbers = {name: float(value) for name, value in jax.device_get(measured).items()}
            seconds = time.perf_counter() - start
            record = Record(
                self.step, self.steps, numbers["loss"], numbers["gradient_norm"], numbers["learning_rate"],
                int(numbers["tokens"]), seen / seconds, seconds,
            )  # fmt: skip
            self._tell(record)
        for what, number in (("loss", record.loss), ("gradient's norm", record.gradient_norm)):
            if not math.isfinite(number):
                raise self._lost(f"the {what} of step {record.step} is {number}")
        last = self.step == self.steps
        if self._is_scored:
            record = dataclasses.replace(record, eval_loss=self.evaluate())
        if self.step % self.save_every == 0 or last:
            self._save()
        if last:
            self._settle()
            self.wait()
        return record

    def _lost(self, said: str) -> ValueError:
        """What to do about numbers that are none any more."""
        rate = self.settings.learning_rate
        return ValueError(
            f"{said}: a smaller learning_rate (it is {rate:g}), more warmup, or compute='float32', in another folder"
        )

    def _check_finite(self) -> None:
        """Refuse to write what is no number any more: a step's loss and gradient are from before its change."""
        if not placement.is_finite(self._state.trained):
            raise self._lost(f"some of what is trained is nan or infinite after step {self.step}")

    def run(self, progress: Callable[[Record], None] | None = None, *, live: bool = False) -> list[Record]:
        """Make all steps that are left, save, and write what came out (`export(live=live)`); the Records of these steps. A model
        that is trained itself holds the same then.

        progress: called with each. Ctrl-C saves, and is raised again: the next run over the same folder goes on there.
        """
        made = []
        try:
            for record in self:
                made.append(record)
                if progress is not None:
                    progress(record)
        except KeyboardInterrupt:
            if not any(x.is_deleted() for x in jax.tree.leaves(self._state)):  # by a step that was not waited for
                self._save()
                self.wait()
            raise
        self.wait()
        if self.out is not None:
            self.export(live=live)
        self._show(live=live)
        return made

    def _next_batch(self) -> tuple[Batch, int, dict[str, Any]]:
        """(the next batch on the device, its tokens, the position after it)."""
        rows = next(self._feed)
        s = self.settings
        return self._put(rows, s.accumulate, s.batch), int((rows["segments"] > 0).sum()), self._feed.state

    def _put(self, rows: dict[str, np.ndarray], *lead: int) -> Batch:
        """Rows [..., T] as a Batch [*lead, T] on the mesh, rows split as its rules say."""
        shape = (*lead, self.settings.context)
        where = places.batch(self.model.plan, self.model.mesh, shape)
        return Batch(**{n: jax.device_put(x.reshape(shape), getattr(where, n).sharding) for n, x in rows.items()})

    def _advance(self, batch: Batch) -> tuple[State, dict[str, Any]]:
        if self._layered:
            return layered.step(self.tuning, self._banks, self._state, batch)
        if self.settings.train in SAMPLED:
            return sampled.advance(
                self.tuning, self._banks, self._state, batch, seed=self.settings.seed, number=self.step
            )
        if not self.settings.backward:
            return mezo.step(self.tuning, self._frozen, self._state, batch)
        return whole.step(self.tuning, self._frozen, self._state, batch)

    def _take(self, state: State) -> None:
        """The state after a step, where it will be expected: so each step is the same program, after a resume too."""
        if self.model.mesh.size > 1:
            state = jax.device_put(state, jax.tree.map(lambda s: s.sharding, self._abstract))
        self._state = state
        if self._every:  # whose own arrays the step has written over
            self.model.params = self._combined()

    def _settle(self) -> None:
        """Make the change that the last step left for the next one (mezo.py)."""
        if not self.settings.backward and mezo.is_due(self._state):
            with interrupts_deferred():
                self._take(mezo.settle(self.tuning, self._frozen, self._state))

    def _show(self, *, live: bool) -> None:
        """Put the average where what is trained stands, if one is kept, or that back."""
        averaged = bool(self.settings.ema) and self.step > 0 and not live
        if averaged == self._averaged:
            return
        with interrupts_deferred():
            try:
                trained, optimizer = average.exchanged(self._state.trained, self._state.optimizer)
            except RuntimeError as error:  # XLA's, of memory that is not there
                raise RuntimeError(
                    f"the average could not be put where what is trained stands ({error}), which ends this run: {self.stopped}."
                    f" Run again, it goes on from what is saved, or begins anew"
                ) from error
            changed = dataclasses.replace(self._state, trained=trained, optimizer=optimizer)
            # at once: a second Ctrl-C may come next, and what is saved is live
            self._state, self._averaged = changed, averaged
            self._take(changed)

    def _combined(self) -> Any:
        return trained(self.settings.train).combine(self.settings.options, self._frozen, self._state.trained)

    def evaluate(self) -> float:
        """The mean loss of a held-out token, nats; with `ema` under the average. Also told to the events, and kept with this
        step's checkpoint."""
        if self.held_out is None:
            raise ValueError("there are no held-out rows to evaluate: Run(..., held_out=pack(...))")
        self._settle()
        self._show(live=False)
        total = tokens = 0.0
        B = self.settings.batch
        for rows in Batches(self.held_out, B, shuffle=False, epochs=1):
            found = whole.evaluate(self.tuning, self._frozen, self._state.trained, self._put(rows, B))
            total, tokens = total + float(found[0]), tokens + float(found[1])
        loss = total / tokens
        self._eval_loss = (self.step, loss)
        if self.out is not None:
            self._writer().scalars(self.step, {"eval/loss": loss})
        return loss

    @property
    def _is_scored(self) -> bool:
        """Whether this step's held-out loss is due."""
        return self.held_out is not None and (self.step % self.eval_every == 0 or self.step == self.steps)

    def _score_again(self) -> None:
        """Take the held-out loss that is due at the step of the checkpoint that the run goes on from, and is not beside it: the
        run was stopped before it was there."""
        if self._manager is None or not self.step or not self._is_scored:
            return
        if math.isfinite((self._manager.metrics(self.step) or {}).get(EVAL_LOSS, math.inf)):
            return
        step, loss = self._eval_loss
        loss = loss if step == self.step else self.evaluate()
        if not math.isfinite(loss):
            return
        # orbax has no call for it; the file is replaced in one go, and orbax reads it anew
        with output_file(self._folder / str(self.step) / "metrics" / "metrics", overwrite=True) as path:
            path.write_text(json.dumps({EVAL_LOSS: loss}), encoding="utf-8")
        self._manager.reload()
        log.info("%s: the held-out loss after step %d, before which it was stopped, is %.4f", self.out, self.step, loss)

    def _tell(self, record: Record) -> None:
        if self.out is None:
            return
        names = ("loss", "gradient_norm", "learning_rate", "tokens_per_second")
        numbers = {f"train/{n}": getattr(record, n) for n in names}
        numbers |= {f"bytes/{tier}": float(n) for tier, n in self.memory().items()}
        self._writer().scalars(record.step, numbers)

    def _writer(self) -> EventWriter:
        if self._events is None:
            assert self.out is not None
            self._events = EventWriter(self.out / EVENTS, first_step=self._first)
        return self._events

    def memory(self) -> dict[str, int]:
        """Bytes of one device by tier: 'device' and 'host', what stands there between steps; 'peak', the most that stood
        on the device, where it says so."""
        stats = self.model.mesh.local_devices[0].memory_stats() or {}
        return self._standing | ({"peak": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})

    def _count(self) -> dict[str, int]:
        found = {"device": 0, "host": 0}
        for leaf in jax.tree.leaves((self._frozen, self._state)):
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            found["host" if leaf.sharding.memory_kind == "pinned_host" else "device"] += size
        return found

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the last step made, beside the next steps; nothing where it is there already."""
        averaged = self._averaged
        self._save()
        self._show(live=not averaged)

    def _save(self) -> None:
        if self._manager is None or not self.step or self.step in self._manager.all_steps():
            return
        import orbax.checkpoint as ocp

        self._show(live=True)
        self._check_finite()
        self._check_room()
        step, loss = self._eval_loss
        parts = {"state": ocp.args.StandardSave(_named(self._state)), "position": ocp.args.JsonSave(self._position)}
        known = step == self.step and math.isfinite(loss)
        metrics = None if self.held_out is None else {EVAL_LOSS: loss if known else math.inf}
        with interrupts_deferred(), room_is_said(self._folder):
            self._manager.save(self.step, args=ocp.args.Composite(**parts), metrics=metrics, force=True)

    def wait(self) -> None:
        """Until what was saved is on disk."""
        if self._manager is not None:
            with room_is_said(self._folder):
                self._manager.wait_until_finished()

    @property
    def _folder(self) -> Path:
        assert self.out is not None
        return self.out / CHECKPOINTS

    def _check_room(self) -> None:
        """Refuse to save where the disk has no room for the next checkpoint: what orbax's threads leave then is half of one."""
        self.wait()
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._abstract)) + BESIDE
        free = shutil.disk_usage(self._folder).free
        if size > free:
            last = self._manager.latest_step()
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint takes up to {show_bytes(size)}, and the disk has {show_bytes(free)} free; "
                + (f"step {last} is the last saved. " if last else "no step is saved. ")
                + "Make room there, and go on with the same again, or give another folder",
                str(self._folder),
            )  # fmt: skip

    def _check_whole(self, step: int) -> None:
        """Refuse a checkpoint of which a part was taken away."""
        folder = self._folder / str(step)
        if lacks := next((name for name in ("state", "position") if not (folder / name).is_dir()), None):
            before = max((s for s in self._manager.all_steps() if s < step), default=0)
            self._manager.close()
            raise ValueError(
                f"{folder} is a checkpoint without its {lacks}, and nothing goes on from it: put that back, or remove the folder"
                f" to {f'go on from step {before}' if before else 'begin anew'}, or give another folder"
            )

    def _saved_position(self, step: int) -> dict[str, Any]:
        """A checkpoint's position in the data."""
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position

    def _restore(self, step: int) -> None:
        """Take the state of a checkpoint, each array to its place, host memory included."""
        import orbax.checkpoint as ocp

        wanted = _named(self._abstract)
        self._state, self._averaged = self._abstract, False  # no second copy while it is read
        if self._every:
            self.model.params = self._frozen
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))).state
        self._state = jax.tree.unflatten(jax.tree.structure(self._abstract), [found[name] for name in wanted])
        self.step = step
        if self._every:
            self.model.params = self._combined()

    @property
    def stopped(self) -> str:
        """Where a run that was interrupted stands, in words: the last step made, and the last that is on disk."""
        saved = 0 if self._manager is None else self._manager.latest_step() or 0
        said = (
            f"stopped after step {self.step} of {self.steps}" if self.step else f"stopped before step 1 of {self.steps}"
        )
        if self.out is None:
            return f"{said}; nothing is saved without out"
        if saved and saved == self.step:
            return f"{said}, which is saved in {self.out}"
        return f"{said}; " + (
            f"the last saved in {self.out} is step {saved}" if saved else f"none is saved in {self.out}"
        )

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, held-out loss) of the best checkpoint there is; None where no loss was taken."""
        if self._manager is None or self.held_out is None:
            return None
        self.wait()
        step = self._manager.best_step()
        loss = math.inf if step is None else float((self._manager.metrics(step) or {}).get(EVAL_LOSS, math.inf))
        return None if step is None or math.isinf(loss) else (step, loss)

    def take_best(self) -> None:
        """Put the best checkpoint's state in the place of the last one's, to be exported or looked at."""
        if self.best is None:
            raise ValueError("no checkpoint has a held-out loss: Run(..., held_out=pack(...), out=...)")
        step = self.best[0]
        if step != self.step:
            self._restore(step)
        self.steps = step  # nothing goes on from here

    def close(self) -> None:
        """Wait for what is being written, and end. A process that ends before loses the checkpoint in the making."""
        if self._manager is not None:
            with room_is_said(self._folder):
                self._manager.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what comes out --------------------------------------------------------------------------------------------

    def tuned(self, *, live: bool = False) -> Model:
        """The model with what is trained in or beside it, ready to generate; until the next step, which writes over it. With
        `ema` it is the average; live: what the last step had."""
        self._settle()
        self._show(live=live)
        m = self.model
        return m if self._every else Model(
            m.architecture, m.plan, m.mesh, self._combined(), m.origin, m.tokenizer, m.budget
        )  # fmt: skip

    def export(self, folder: str | os.PathLike[str] | None = None, *, live: bool = False) -> Path:
        """Write what was trained: a PEFT folder (`out`/adapter), or a Hugging Face folder (`out`/model) of all parameters. With
        `ema` it is the average; live: what the last step had.

        A folder of an earlier export is replaced.
        """
        if folder is None and self.out is None:
            raise ValueError("export: there is no folder; say export('folder'), or Run(..., out='folder')")
        own = None if self.out is None else self.out / (MODEL if self._every else ADAPTER)
        target = own if folder is None else Path(folder)
        assert target is not None
        self._settle()
        self._show(live=live)
        self._check_finite()
        if self._every:
            merge(self.model, target, overwrite=target == own)
        else:
            write_trained(self.model, self.settings, self._state.trained, target, overwrite=target == own)
        return target


def _named(state: Any) -> dict[str, Any]:
    """A state's leaves by the names that they have in a checkpoint."""
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in tree_flatten_with_path(state)[0]}


def _manager(folder: Path, keep: int, *, best: bool) -> Any:
    """orbax's manager of checkpoints: the last `keep` stay, and with `best` the one of the lowest held-out loss."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

    def loss(metrics: Mapping[str, float]) -> float:
        return metrics[EVAL_LOSS]

    policies: list[Any] = [LatestN(keep)]
    if best:
        policies.append(BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies), best_fn=loss if best else None, best_mode="min",
        cleanup_tmp_directories=True,
    )  # fmt: skip
    return ocp.CheckpointManager(folder, options=options)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a second one does not. In the main thread, where Python takes it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    met = False

    def note(number: int, frame: Any) -> None:
        nonlocal met
        met = True
        signal.signal(signal.SIGINT, before)
        log.warning("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if met:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# Adapters in and out


def write_trained(
    model: Model, settings: Settings, tree: Any, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """What 'lora' or 'dora' trained, as a PEFT folder, float32."""
    arch = model.architecture
    held = base.layers(model.plan.parts(arch), tree["banks"])
    adapters = {
        f"layers.{i}.{name}": Adapter(*(jax.device_get(leaf[n]) for n in ("a", "b", "magnitude") if n in leaf))
        for i, layer in held.items()
        for name, leaf in layer.items()
    }
    config = AdapterConfig(
        settings.rank, settings.alpha, rslora=settings.rs, dora=settings.train == "dora",
        base_model=None if model.origin.folder is None else os.fspath(model.origin.folder),
    )  # fmt: skip
    write_adapter(folder, adapters, config, arch.name_table(), arch.params(), arch.num_layers, overwrite=overwrite)


def with_adapter(model: Model, folder: str | os.PathLike[str]) -> Model:
    """The model with a PEFT folder's LoRA or DoRA beside its matrices, in whatever format and home they are.

    Raises CheckpointError for a folder that does not fit the model, ValueError for layers that are read from disk.
    """
    arch, plan, mesh = model.architecture, model.plan, model.mesh
    parts = plan.parts(arch)
    if any(home(part.home).TIER == "disk" for part in parts):
        raise ValueError(
            f"home is {plan.home!r}, and layers read from disk have nothing beside them: load with home='host' or 'split', or"
            f" merge the adapter into the model once and load that"
        )
    adapters, config = uniform(*read_adapter(folder, arch.name_table(), arch.params(), arch.num_layers))
    kind = trained("dora" if config.dora else "lora")
    # a matrix whose fellow in another layer has an adapter gets one that changes nothing: stacks are of one kind
    names = tuple(dict.fromkeys(n.split(".", 2)[2] for n in adapters if n.startswith("layers.")))
    options = kind.Options(config.rank, config.alpha, config.rslora, names or ("*",))

    params, held = model.params, Begun(Path(folder), adapters, {})
    if names:
        tree = _filled_in(model, kind.make(options, arch, plan, params, jax.random.key(0)), held)
        tree = jax.device_put(tree, places.adapter_places("dora" if config.dora else "lora", arch, plan, mesh, tree))
        params = kind.combine(options, params, tree)
    for name in adapters:
        if not name.startswith("layers."):
            params = params | {
                "outer": params["outer"]
                | {name: _beside(kind, options, params["outer"][name], _arrays(adapters[name]))}
            }
    return Model(arch, plan, mesh, params, model.origin, model.tokenizer, model.budget)


def _filled_in(model: Model, made: Any, held: Begun) -> Any:
    """A trained tree with what an adapter holds in the place of what it began with."""
    parts = model.plan.parts(model.architecture)
    fresh = base.layers(parts, made["banks"])
    banks = base.lay(parts, lambda i: {n: held.fill(f"layers.{i}.{n}", leaf) for n, leaf in fresh[i].items()})
    return {"outer": {}, "banks": banks}


def _beside(kind: Any, options: Any, w: Any, given: dict[str, np.ndarray]) -> Any:
    """One matrix outside the layers with its adapter."""
    leaf = jax.tree.map(jax.numpy.asarray, given)
    if "magnitude" not in leaf:
        return kind.Lora(w, **leaf, scale=options.scale)
    dense = w.dense() if isinstance(w, Weight) else w.astype(np.float32)
    square = jax.numpy.square(dense).sum(tuple(range(leaf["magnitude"].ndim, dense.ndim)))
    return kind.Dora(w, **leaf, square=square, scale=options.scale)


def adapted(
    architecture: Architecture, read: Callable[[str], Any], folder: str | os.PathLike[str]
) -> Callable[[str], Any]:
    """`read`, with a PEFT folder's LoRA or DoRA beside each matrix that it has one for.

    Raises CheckpointError for a folder that does not fit the model.
    """
    table, params = architecture.name_table(), architecture.params()
    adapters, config = uniform(*read_adapter(folder, table, params, architecture.num_layers))
    kind = trained("dora" if config.dora else "lora")
    options = kind.Options(config.rank, config.alpha, config.rslora)

    def one(name: str) -> Any:
        w = read(name)
        return _beside(kind, options, w, _arrays(adapters[name])) if name in adapters else w

    return one


def merge(model: Model, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model, with whatever is beside its matrices added to them (W + s B A, a quantised W decoded), as a Hugging
    Face folder, each parameter in the dtype that it came in. One parameter at a time.

    Raises CheckpointError for a folder that is not empty, unless `overwrite`.
    """
    if not model.origin.config:
        raise ValueError("merge: this model was made without a config.json; give from_arrays its fields")
    parts = placement.stored(model.architecture, model.plan, model.params)
    dtypes = model.origin.dtypes

    def dtype_of(name: str) -> np.dtype:
        return np.dtype(dtypes.get(name, model.plan.dtype))

    def get(name: str) -> Any:
        leaf = parts[name]()
        return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), leaf)  # W and A may stand apart

    with output_folder(folder, overwrite=overwrite) as work:
        export.write_hf(work, model.architecture, get, dtype_of, model.origin)
