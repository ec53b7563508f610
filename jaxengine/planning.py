"""Which plan fits a card and a budget, what it costs, and why each nearer choice does not: `jaxengine plan`.

Arithmetic on abstract parameters, nothing allocated. A choice is nearer the more of the model stands on the device; the
nearest that fits is chosen. Speed is bytes over bandwidth: a decoding step reads every weight once, those on the device at
its memory's rate and the streamed ones at the link's, and the slowest of the two, or the matmuls, is the limit named. It
is what the hardware allows, not a measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
from jax.sharding import AbstractMesh

from jaxengine import machine, orders
from jaxengine.architecture import Architecture, architecture
from jaxengine.engine import bucket
from jaxengine.finetune import meshed
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.planning import Options
from jaxengine.finetune.settings import Task
from jaxengine.homes.base import home as find_home
from jaxengine.plan import (
    DTYPES,
    Need,
    Plan,
    Variant,
    brings_together,
    brought_bytes,
    check_attention,
    check_formats,
    check_mesh,
    check_stay,
    eased,
    gathered,
    lacking,
    lacks,
    layer_bytes,
    mesh_of,
    on_one,
    parse_bytes,
    rounded_up,
    shard_bytes,
    shares_form,
    show_bytes,
    tier_bytes,
    tightened,
    variants,
    weight_bytes,
    with_rules,
    with_table,
)
from jaxengine.sources import ORBAX, gguf_file, open_source, read_config
from pallas_kernels.cards import CARDS, Card, find

PROMISED = 0.05  # of XLA's bytes: what the arithmetic's differ by at most
DISK_RATE = 3e9  # bytes/s: a PCIe 3 x4 NVMe drive reading in sequence, where nothing is said
# copy over compute: outside, a scan that fetches each layer just before its use loses a tenth at most
AHEAD = (0.3, 10)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan with its bytes, whether it fits and why not, and what a step (of decoding, or of fine-tuning) is limited by.

    barred: it is refused for something else than bytes. seconds: of one step at least, of each of its limits; steps/s is 1 /
    the largest. tokens: of a step.
    """

    plan: Plan
    need: Need
    refused: str
    seconds: tuple[tuple[str, float], ...]
    tokens: int
    barred: bool = False

    @property
    def fits(self) -> bool:
        return not self.refused

    @property
    def limit(self) -> str:
        return max(self.seconds, key=lambda item: item[1])[0]

    @property
    def passes_per_second(self) -> float:
        return 1 / max(s for _, s in self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.passes_per_second * self.tokens

    def label(self) -> str:
        """'split, 12 resident, ahead, chunk 512, int8'."""
        p = self.plan
        said = [p.home, f"{p.resident} resident" if p.resident else "", p.form]
        said[1] += " in a loop" if p.resident_form == "scan" else ""
        said += [
            f"{p.kept} kept" if p.kept else "",
            f"{' and '.join(p.stay)} stay" if p.stay and p.home != "device" else "",
        ]
        said += [f"chunk {p.chunk}" if p.chunk else "", p.weights if p.weights != "dense" else ""]
        said += [f"kv {p.kv_codec}" if p.kv_codec != "raw" else "", f"remat {p.remat}" if p.remat else ""]
        return ", ".join(s for s in said if s)


def judge(
    architecture: Architecture, variant: Variant, card: Card, *, batch: int, disk_rate: float = DISK_RATE
) -> Candidate:
    """One plan on one card: its bytes, whether they fit, its limits."""
    plan, n = variant.plan, variant.need
    tiers, read = tier_bytes(architecture, plan), tier_bytes(architecture, gathered(plan))
    # every stored weight is used once a row; two operations for each, whatever its format
    layers = sum(math.prod(s.shape) for name, s in architecture.specs().items() if name.startswith("layers.") and s.out)
    elements = (layers + math.prod(architecture.specs()["embedding"].shape)) * share(architecture, plan)
    rows = on_one(plan, ("batch",), (batch,))[0]
    seconds = [
        ("device memory", (sum(read.values()) + _head_bytes(architecture, gathered(plan)) + n.cache) / card.bandwidth),
        ("matmuls", 2 * elements * rows / card.tensor),
    ]
    if streamed := tiers["host"] + tiers["disk"]:
        seconds.append(("host link", streamed / card.link))
    if n.disk:
        seconds.append(("disk", n.disk / disk_rate))
    return Candidate(plan, n, variant.refused, tuple(seconds), batch, variant.barred)  # a token a row


def _head_bytes(architecture: Architecture, plan: Plan) -> int:
    """Of what stands outside the layers a step reads the head whole, and one row of the rest."""
    outer = architecture.outer()[1]
    name = "lm_head" if "lm_head" in outer else "embedding"
    return shard_bytes(plan, name, outer[name])


def share(architecture: Architecture, plan: Plan) -> float:
    """Of a matrix product, the part that one device of the mesh makes for the rows that it has."""
    mlp = max(s.shape[s.axes.index("mlp")] for s in architecture.specs().values() if "mlp" in s.axes)
    return on_one(plan, ("mlp",), (mlp,))[0] / mlp


def devices(plan: Plan) -> int:
    """Devices of the plan's mesh."""
    mesh = mesh_of(plan)
    return 1 if mesh is None else mesh.size


def streamed_form(architecture: Architecture, plan: Plan, card: Card, batch: int) -> str:
    """'ahead' where a decoding step's compute is worth hiding behind the copies, at the price of a second layer on the
    device; '' (a plain scan) where either is so much longer than the other that there is nothing to gain."""
    size = weight_bytes(architecture, plan)["layers"]
    moved = sum(
        brought_bytes(
            architecture, dataclasses.replace(plan, home="host", form="", resident=0, kept=0, resident_form="")
        )
    )
    elements = sum(
        math.prod(s.shape) for name, s in architecture.specs().items() if name.startswith("layers.") and s.out
    )
    rows = on_one(plan, ("batch",), (batch,))[0]
    compute = max(2 * elements * share(architecture, plan) * rows / card.tensor, size / card.bandwidth)
    return "ahead" if AHEAD[0] < moved / card.link / compute < AHEAD[1] else ""


def worth_ahead(architecture: Architecture, plan: Plan, what: Task, card: Card, *, batch: int, context: int) -> bool:
    """Whether a step can fetch layers one ahead, and its copies and compute are near enough to each other for it, as
    `streamed_form` asks of decoding."""
    if plan.mesh or not what.runs_ahead(plan.remat):
        return False
    streamed = dataclasses.replace(
        plan, home="host", form="", resident=0, kept=0, resident_form="", remat=plan.remat or "full"
    )
    times = tuning.seconds(architecture, streamed, what, card, batch=batch, context=context)
    return AHEAD[0] < times["host link"] / max(times["matmuls"], times["device memory"]) < AHEAD[1]


def candidates(
    architecture: Architecture,
    plan: Plan,
    card: Card,
    *,
    memory: int,
    ram: int | None,
    batch: int,
    context: int,
    disk_rate: float = DISK_RATE,
    task: Task | None = None,
) -> list[Candidate]:
    """The plan's variants on a card, from the nearest to the farthest. task: what is fine-tuned; None: text is generated."""
    if task is not None:
        rows: dict[str, Any] = {"batch": batch, "context": context}
        ahead = worth_ahead(architecture, plan, task, card, **rows)
        how: Any = {"memory": memory, "ram": ram, "wide": card.wide, "keeps_gelu": tuning.keeps_gelu(card)}
        made = tuning.variants(architecture, plan, task, ahead=ahead, **how, **rows)
        times = [tuning.seconds(architecture, v.plan, task, card, **rows) for v in made]
        count = task.accumulate * batch * context
        # of what is over, both tiers
        said = [v.refused if v.barred else lacks(v.need, memory, ram) for v in made]
        return [
            Candidate(v.plan, v.need, refused, tuple(t.items()), count, v.barred)
            for v, refused, t in zip(made, said, times, strict=True)
        ]
    form = streamed_form(architecture, plan, card, batch)
    found = variants(
        architecture, plan, memory=memory, ram=ram, batch=batch, context=context, form=form, wide=card.wide
    )
    return [judge(architecture, v, card, batch=batch, disk_rate=disk_rate) for v in found]


@dataclasses.dataclass(frozen=True)
class _Change:
    """One change of what was asked: in words, of the plan, and of sizes and the task."""

    said: str
    plan: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[tuple[str, Any], ...] = ()


def _kinds(plan: Plan, *, batch: int, context: int, task: Task | None) -> dict[str, list[_Change]]:
    """What can be changed, each kind with its values, the mildest first."""
    kinds: dict[str, list[_Change]] = {}
    if plan.stay:  # it costs only the time of copies that it saved
        kinds["stay"] = [_Change("without stay", plan=(("stay", ()),))]
    over = bool(plan.mesh) and task is not None  # of what is counted over a mesh
    if plan.remat and task is not None and len(tuning.remats(task)) > 1 and not over:
        kinds["remat"] = [_Change("remat as fits", plan=(("remat", ""),))]
    if task is not None:
        less = [("without ema", {"ema": 0.0})] if task.optimizer.ema else []
        if task.optimizer.name == "adamw" and not over:
            less += [("optimizer adamw8bit", {"name": "adamw8bit"})]
        both = [(" ".join(said for said, _ in reversed(less)), {n: x for _, d in less for n, x in d.items()})]
        changed = [(said, dataclasses.replace(task.optimizer, **d)) for said, d in less + both * (len(less) > 1)]
        kinds["optimizer"] = [
            _Change(said, sizes=(("task", dataclasses.replace(task, optimizer=how)),)) for said, how in changed
        ]
    if plan.kv_codec == "raw" and task is None:
        kinds["kv"] = [_Change("kv int8", plan=(("kv_codec", "int8"),))]
    if plan.weights == "dense" and not _as_they_are(task) and not over:
        kinds["weights"] = [_Change(f"weights {name}", plan=(("weights", name),)) for name in ("int8", "int4")]
    split = batch // on_one(plan, ("batch",), (batch,))[0]
    rows = [batch >> i for i in range(1, batch.bit_length())]
    rows = [b for b in rows if on_one(plan, ("batch",), (b,))[0] * split == b]
    lengths = [context >> i for i in range(1, 12) if context >> i >= 64]
    kinds["batch"] = [_Change(f"batch {b}", sizes=(("batch", b),)) for b in rows]
    kinds["context"] = [_Change(f"context {n}", sizes=(("context", n),)) for n in lengths]
    return {name: values for name, values in kinds.items() if values}


def _first(values: Sequence[Any], fits: Callable[[Any], bool]) -> int | None:
    """The index of the first that fits, of those where what follows one that fits does too; None if none does."""
    if not values or not fits(values[-1]):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle + 1, high)
    return low


NO_LIMIT = 2**62  # bytes; a number, so that what a disk would hold may stand in memory too
NEAR = 100  # bytes are searched for to a part in so many


@dataclasses.dataclass
class _Search:
    """What would make a plan fit that does not. Each look at candidates takes tenths of a second for a large model, so that
    none is made twice, and none where a farther change does not fit."""

    architecture: Architecture
    plan: Plan
    asked: dict[str, Any]
    disk_rate: float
    looks: dict[Any, list[Candidate]] = dataclasses.field(default_factory=dict)

    def look(self, card: Card, changed: tuple[_Change, ...] = (), **budget: int) -> list[Candidate]:
        """The candidates after these changes, on this card within this budget."""
        key = (card.name, tuple(c.said for c in changed), tuple(sorted(budget.items())))
        if key not in self.looks:
            plan = dataclasses.replace(self.plan, **dict(p for c in changed for p in c.plan))
            how: dict[str, Any] = self.asked | budget | dict(s for c in changed for s in c.sizes)
            self.looks[key] = candidates(self.architecture, plan, card, disk_rate=self.disk_rate, **how)
        return self.looks[key]

    def fits(self, card: Card, changed: tuple[_Change, ...] = (), **budget: int) -> bool:
        return any(c.fits for c in self.look(card, changed, **budget))

    def least(self, tier: str, card: Card, changed: tuple[_Change, ...] = (), **budget: int) -> int | None:
        """The bytes of a tier with which something fits where nothing does; None if no number of them is enough."""
        asked = self.asked | budget
        memory, ram = asked["memory"], asked["ram"]
        tried = [c.need for c in self.look(card, changed, **budget) if not c.barred]
        if tier == "ram":  # which layers stand on the device is memory's to say
            return min((n.host for n in tried if n.device <= memory), default=None)

        def fitting(size: int) -> int | None:
            found = self.look(card, changed, **(budget | {"memory": size}))
            return min((c.need.device for c in found if c.fits), default=None)

        low = max(memory, min((n.device for n in tried), default=0) - 1)  # nothing stands in less
        would = [n.device for n in tried if n.device <= card.usable and (ram is None or n.host <= ram)]
        high = min(would) if would else None if low >= card.usable else fitting(card.usable)
        while high is not None and (high - low) * NEAR > high:
            found = fitting(middle := (low + high) // 2)
            low, high = (middle, high) if found is None else (low, max(found, low + 1))
        return high

    def budgets(self, card: Card, changed: tuple[_Change, ...] = ()) -> list[dict[str, int]]:
        """More memory of the card, more of the host, each by itself where it does, or else both."""
        ram = self.asked["ram"]
        found = [
            {tier: self.least(tier, card, changed)} for tier in (("memory",) if ram is None else ("memory", "ram"))
        ]
        alone = [{tier: size for tier, size in each.items() if size is not None} for each in found]
        if any(alone) or ram is None:
            return [each for each in alone if each]
        tried = self.look(card, changed)
        would = [c for c in tried if not c.barred and c.need.device <= card.usable]
        if would:
            best = min(would, key=lambda c: c.need.device + max(0, c.need.host - ram))
            return [{"memory": best.need.device, "ram": best.need.host}]
        if (more := self.least("ram", card, changed, memory=card.usable)) is None:
            return []
        return [{"memory": card.usable, "ram": more}]

    def pair(self, card: Card, one: Sequence[_Change], other: Sequence[_Change]) -> tuple[_Change, ...] | None:
        """The mildest of each of two kinds that fit together."""
        if not one or not other or not self.fits(card, (one[-1], other[-1])):
            return None
        if len(one) <= 2:  # formats: the first that does
            i = _first(one, lambda a: self.fits(card, (a, other[-1]))) or 0
            return one[i], other[_first(other, lambda b: self.fits(card, (one[i], b))) or 0]
        steps = range(len(one) + len(other) - 1)  # both by turns
        pairs = [(one[min((n + 1) // 2, len(one) - 1)], other[min(n // 2, len(other) - 1)]) for n in steps]
        pairs.append((one[-1], other[-1]))
        a, b = pairs[_first(pairs, lambda p: self.fits(card, p)) or 0]
        a = one[_first(one[: one.index(a) + 1], lambda a: self.fits(card, (a, b))) or 0]
        return a, other[_first(other[: other.index(b) + 1], lambda b: self.fits(card, (a, b))) or 0]


def changes(
    architecture: Architecture,
    plan: Plan,
    card: Card,
    *,
    memory: int,
    ram: int | None,
    batch: int,
    context: int,
    disk_rate: float = DISK_RATE,
    task: Task | None = None,
) -> list[tuple[str, Candidate]]:
    """What would make it fit, where nothing does: at most three, none with more changed than another that fits.

    More memory of either kind wherever the card has it, which changes nothing else, and each kind of change by itself, at its
    mildest; then two kinds together, and a kind with less of more memory; then, where this card cannot hold what was asked,
    the smallest of the table that can, and everything at its smallest with the memory that then does. Empty where nothing
    does. Memory is rounded up to what is said of it.
    """
    asked: dict[str, Any] = {"memory": memory, "ram": ram, "batch": batch, "context": context, "task": task}
    search = _Search(architecture, plan, asked, disk_rate)
    kinds = _kinds(plan, batch=batch, context=context, task=task)
    smallest = tuple(values[-1] for values in kinds.values())
    rows: list[tuple[str, Candidate]] = []

    def add(changed: tuple[_Change, ...], budget: Mapping[str, int], on: Card = card, *before: str) -> None:
        given: dict[str, int] = {}
        said = [*before, *(c.said for c in changed)]
        for tier, size in budget.items():
            words, given[tier] = rounded_up(size, on.usable if tier == "memory" else NO_LIMIT)
            said.append(f"{tier} {words}")
        if on is not card:
            given["memory"] = on.usable
        rows.append((" and ".join(said), next(c for c in search.look(on, changed, **given) if c.fits)))

    more = search.budgets(card)
    single: dict[str, int] = {}
    by_itself = search.fits(card, smallest)  # or nothing less does
    for name, values in kinds.items() if by_itself else ():
        if len(single) < 3 - len(more):
            found = _first(values, lambda change: search.fits(card, (change,)))
            single |= {} if found is None else {name: found}
    for name, i in single.items():
        add((kinds[name][i],), {})
    for budget in more:
        add((), budget)
    milder = {name: values[: single.get(name, len(values))] for name, values in kinds.items()}
    pairs = sorted(itertools.combinations(kinds, 2), key=lambda pair: sum(name in single for name in pair))
    taken: set[str] = set()
    for one, other in pairs if by_itself else ():
        if len(rows) < 3 and not {one, other} & taken:
            found = search.pair(card, milder[one], milder[other])
            if found is not None:
                add(found, {})
                taken |= {one, other}
    if len(rows) == 3:
        return rows
    for name, values in kinds.items():
        if len(rows) < 3 and name not in single and name not in taken:
            found = _with_less(search, card, values, more, ram)
            if found is not None:
                add(*found)
    if len(rows) < 3 and not more:
        if not rows:
            for budget in search.budgets(card, smallest)[:1]:
                add(smallest, budget)
        larger = None
        for changed in ((), *((values[-1],) for name, values in kinds.items() if name not in single), smallest):
            if len(rows) < 3 and not (changed == smallest and rows):
                for other, budget in _on_another(search, card, larger, changed):
                    add(changed, budget, other, f"card {other.name}")
                    larger = other
    return rows


def _with_less(
    search: _Search, card: Card, values: Sequence[_Change], more: Sequence[Mapping[str, int]], ram: int | None
) -> tuple[tuple[_Change, ...], dict[str, int]] | None:
    """The mildest value of a kind of change, and the budget it takes: a twentieth less at least than the same memory takes
    without it (more: those budgets), or any that this card has where without it none does."""
    rooms: list[dict[str, int]] = [
        {"memory": card.usable},
        *([] if ram is None else [{"memory": card.usable, "ram": NO_LIMIT}]),
    ]
    if more:
        rooms = [{"memory": more[0]["memory"]}] if len(more[0]) > 1 else [{t: n * 19 // 20 for t, n in more[0].items()}]
    for room in rooms:
        i = _first(values, functools.partial(lambda room, change: search.fits(card, (change,), **room), room))
        if i is None:
            continue
        for budget in search.budgets(card, (values[i],)):
            if budget.keys() <= room.keys():
                return (values[i],), budget
    return None


def _on_another(
    search: _Search, card: Card, below: Card | None, changed: tuple[_Change, ...]
) -> list[tuple[Card, dict[str, int]]]:
    """The smallest card of the table that is larger than this one (and smaller than `below`) and holds it, and the host
    memory that it then takes."""
    task, ram = search.asked["task"], search.asked["ram"]
    computed = search.plan.dtype if task is None else task.compute or search.plan.dtype
    for other in sorted(CARDS.values(), key=operator.attrgetter("usable")):
        outside = other.usable <= card.usable or (below is not None and other.usable >= below.usable)
        if outside or (other.wide and computed == "bfloat16"):
            continue
        if search.fits(other, changed, memory=other.usable):
            return [(other, {})]
        if ram is not None and (more := search.least("ram", other, changed, memory=other.usable)) is not None:
            return [(other, {"ram": more})]
    return []


def _as_they_are(task: Task | None) -> bool:
    """Whether a task changes the model's own parameters, which are then in no other format."""
    return task is not None and not task.beside


def _alternates(plan: Plan, architecture: Architecture) -> bool:
    """Whether unlike layers follow each other in a bank that is streamed."""
    return any(len(p.kinds) > 1 and find_home(p.home).TIER != "device" for p in plan.parts(architecture))


def traps(architecture: Architecture, candidate: Candidate, card: Card, task: Task | None = None) -> list[str]:
    """What to know before running it on this card. task: what is fine-tuned; None: text is generated."""
    said = []
    tiers = tier_bytes(architecture, candidate.plan)
    whole = weight_bytes(architecture, dataclasses.replace(candidate.plan, mesh="", sharding="single", rules=()))[
        "layers"
    ]
    if devices(candidate.plan) > 1:
        said.append("what goes from card to card within a step is not in these speeds")
    here = any(find_home(p.home).TIER == "device" and not p.stacked for p in candidate.plan.parts(architecture))
    gathers = task is None and here and brings_together(architecture, candidate.plan)
    if gathers and max(layer_bytes(architecture, gathered(candidate.plan))) > candidate.need.device / 10:
        said.append(
            "layers that are split by their inputs are brought together to be used, two at a time as counted here; on cards"
            " without fast links XLA was seen to have one and a half, and to take 0.9 to 1 times as much as is counted"
        )
    if candidate.plan.attention == "cudnn":
        said.append(
            "attention 'cudnn' needs the cuDNN library where this runs ('jax[cuda13]' brings it); whether it is there was not"
            " looked at, and without it loading the model is refused"
        )
    if candidate.need.device > (pool := int(machine.DEFAULT_SHARE * card.reported)):
        share = -(-100 * candidate.need.device / card.reported // 1) / 100
        said.append(
            f"XLA's pool of a card's memory ends at three quarters of it, {show_bytes(pool)}, unless {machine.SHARE}={share:.2f}"
            f" is set before jax starts; the `jaxengine` command sets what --memory asks for where it is not"
        )
    pinned = -(-candidate.need.pinned // devices(candidate.plan))  # a pool is one card's
    if pinned > machine.pool_limit_bytes({}):
        said.append(
            f"{show_bytes(pinned)} of pinned host memory: XLA's pool stops at 64 GiB unless"
            f" {machine.POOL}={-(-pinned * 5 // 4 // 2**30)} (GiB) is set before jax starts; the `jaxengine` command"
            f" sets four fifths of the machine's memory where it is not"
        )
    if task is not None and not tuning.counted_closely(candidate.plan, task, wide=card.wide):
        said.append(
            "this step is not counted closely"
            + (" on a card below compute capability 8.0" if card.wide else " with attention 'xla' in 16 bits")
            + ": XLA was seen to take up to 1.5 times as much. Leave room, compile the plan, or train 'lora' with remat 'full'"
        )
    added = task is not None and task.optimizer.order and task.train == "all" and (task.tile or task.accumulate > 1)
    if added and _alternates(candidate.plan, architecture):
        said.append(
            "of a step through streamed layers that alternate, where gradients are added up, XLA was seen to take up to 1.15"
            " times as much as is counted: leave room, or compile the plan"
        )
    strays = (
        [] if task is None else tuning.strays(architecture, candidate.plan, task, candidate.tokens // task.accumulate)
    )
    for what, times in strays:
        room = "" if times.endswith("to 1") else "leave room, or "
        said.append(
            f"of a step {what}, XLA was seen to take {times} times as much as is counted: {room}compile the plan"
        )
    if tiers["disk"]:
        plain = candidate.plan.weights == "dense" and not candidate.plan.weight_rules
        own = (
            f"stay in the checkpoint's own files where these have them in {candidate.plan.dtype}, and else "
            if plain
            else ""
        )
        said.append(
            f"layers on disk {own}are packed into {show_bytes(whole)} of it, those that are kept in memory included; a step reads"
            f" {show_bytes(candidate.need.disk)} of them"
        )
    with contextlib.suppress(ValueError):  # a system that does not say
        groups = [(name, left) for name, left in machine.ram_limits() if "control group" in name]
        if groups and candidate.need.host > groups[0][1]:
            name, left = groups[0]
            said.append(f"here host memory ends at {show_bytes(left)}: {name}")
    if candidate.need.host and card.capability not in ((9, 0), (10, 0)):
        said.append(
            "XLA's latency-hiding scheduler is off by default on this card, and without it no copy runs beside compute;"
            " jaxengine's programs turn it on"
        )
    if candidate.need.activations > candidate.need.device / 10:
        said.append(
            f"temporaries are one block of {show_bytes(candidate.need.activations)}: it must be free in one piece"
        )
    return said


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `plan` found: every candidate in order, the chosen one (None: nothing fits) and then what would fit. task: what
    is fine-tuned (None: text is generated); remat: what was asked to be kept of layers ('': as fits)."""

    architecture: Architecture
    card: Card
    memory: int
    ram: int | None
    batch: int
    context: int
    candidates: tuple[Candidate, ...]
    changes: tuple[tuple[str, Candidate], ...]
    task: Task | None = None
    remat: str = ""
    plan: Plan = dataclasses.field(default_factory=Plan)  # as it was asked for
    disk_rate: float = DISK_RATE

    @property
    def of_task(self) -> str:
        """' of task lora (rank 64, optimizer lion)': what is not as usual in brackets; '' where text is generated."""
        if self.task is None:
            return ""
        said = ", ".join(s for s in (tuning.differs(self.task), f"remat {self.remat}" if self.remat else "") if s)
        return f" of task {self.task.name}" + (f" ({said})" if said else "")

    @property
    def chosen(self) -> Candidate | None:
        return next((c for c in self.candidates if c.fits), None)

    def refuted(self, device: int = 0) -> Outcome:
        """The same without the candidate that was chosen: compiled, it was not what it was to be, or took `device` bytes of the
        device. Where those are more than there are, the same home with fewer resident layers comes after it; else no other with
        its form is left (as `plan.settled` does for a run)."""
        if (chosen := self.chosen) is None:
            return self
        found: list[Candidate] = []
        for c in self.candidates:
            alike = device <= self.memory and c.fits and shares_form(c.plan, chosen.plan)
            if c is not chosen and not alike:
                found.append(c)
                continue
            found.append(dataclasses.replace(c, refused="refuted by compiling it", barred=True))
            if c is not chosen:
                continue
            if device > self.memory and c.plan.resident:
                again = candidates(
                    self.architecture, self.plan, self.card, memory=tightened(c.need, self.memory, device), ram=self.ram,
                    batch=self.batch, context=self.context, disk_rate=self.disk_rate, task=self.task,
                )  # fmt: skip
                if (fewer := eased(again, c)) is not None:
                    found.append(fewer)
        return dataclasses.replace(self, candidates=tuple(found))

    @property
    def _nearest(self) -> Need | None:
        """Of the candidate that lacks the fewest bytes in all; None where something fits, or bytes are not what is lacking."""
        would = [c.need for c in self.candidates if not c.barred]
        if self.chosen is not None or not would:
            return None
        return min(would, key=lambda n: sum(lacking(n, self.memory, self.ram)))

    @property
    def short(self) -> int:
        """Bytes of device memory that are lacking: with these and `short_of_ram` more, it fits. 0 where something does."""
        return 0 if self._nearest is None else lacking(self._nearest, self.memory, self.ram)[0]

    @property
    def short_of_ram(self) -> int:
        """Bytes of host memory that are lacking beside `short`; 0 where something fits."""
        return 0 if self._nearest is None else lacking(self._nearest, self.memory, self.ram)[1]

    @property
    def shortage(self) -> str:
        """'697 MB (696,812,544 bytes) of device memory and ... of host memory short'; '' where nothing is lacking."""
        tiers = (("device", self.short), ("host", self.short_of_ram))
        said = [f"{show_bytes(n)} ({n:,} bytes) of {tier} memory" for tier, n in tiers if n]
        return f"{' and '.join(said)} short" if said else ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: bytes and seconds."""

        def one(c: Candidate) -> dict[str, Any]:
            return {
                "plan": dataclasses.asdict(c.plan),
                "bytes": dataclasses.asdict(c.need) | {"device": c.need.device, "host": c.need.host},
                "fits": c.fits, "refused": c.refused, "seconds_per_step": dict(c.seconds), "limit": c.limit,
                "steps_per_second": c.passes_per_second, "tokens_per_second": c.tokens_per_second,
            }  # fmt: skip

        chosen, what = self.chosen, self.task
        said = {"task": "generate"} if what is None else {"task": what.name, **what.said, "remat": self.remat}
        return {
            **said, "mesh": self.candidates[0].plan.mesh, "card": self.card.name,
            "card_notes": self.card.notes, "memory": self.memory, "ram": self.ram,
            "batch": self.batch, "context": self.context, "chosen": None if chosen is None else one(chosen),
            "candidates": [one(c) for c in self.candidates], "short": self.short,
            "short_of_ram": self.short_of_ram,
            "changes": [{"change": said, **one(c)} for said, c in self.changes],
            "traps": [] if chosen is None else traps(self.architecture, chosen, self.card, self.task),
        }  # fmt: skip


def check_rows(architecture: Architecture, batch: int, context: int) -> None:
    """Refuse fewer rows or tokens than one, and more tokens than the model has positions for."""
    most = architecture.config.max_position_embeddings
    if batch < 1 or not 1 <= context <= most:
        raise ValueError(
            f"batch {batch} and context {context}; they are at least 1, and this model's context at most {most}"
        )


def plan_for(
    architecture: Architecture,
    plan: Plan,
    card: Card,
    *,
    memory: int | None = None,
    ram: int | None = None,
    batch: int = 1,
    context: int | None = None,
    task: str | Task = "generate",
    disk_rate: float = DISK_RATE,
    **options: Unpack[Options],
) -> Outcome:
    """The nearest plan that fits, every one that was looked at, and what would fit where none does.

    task: 'generate', or what is fine-tuned: 'lora' or 'dora' (rank 8 beside every matrix of a layer, AdamW), 'full' (every
    parameter in float32, AdamW), 'lisa', 'badam' or 'hift' (some layers at a time, as their papers say, AdamW) or 'mezo' (every
    parameter, without a gradient), each on `batch` rows of `context` tokens a part, with arithmetic in bfloat16. options: what
    is said of it, as of a run's Settings: rank, targets, layers, optimizer, clip, ema, compute, accumulate, loss_chunk, tile; or
    task is a Task, such as a run's own (`Settings(...).task`). What is kept of layers for their way back is chosen, unless
    the plan has a remat.
    plan: the choices that stand (dtype, weights, cache; a chunk if it has one); home, form and resident layers are chosen.
    memory: bytes of the card to use (all that a process can have, if not given); ram: bytes of host memory for layers, the
    rest being read from a disk that gives disk_rate bytes a second (no limit, and no disk, if not given); context: tokens
    of a row (2048, or what the model can at most), padded as a call pads them. A plan with a mesh is for so many such cards
    in one machine: memory is that of each, ram that of the machine, and what goes between cards is not in the speeds.
    Raises ValueError for a task that is not done, an option that means nothing for it, or a budget larger than the card.
    """
    what = tuning.asked(task, **options)
    if what is None and plan.remat:
        raise ValueError(
            f"remat is {plan.remat!r}, and task 'generate' goes back through no layer: leave it out, or say a task that trains,"
            f" such as 'lora'"
        )
    if what is not None:
        if not what.beside and (plan.weights != "dense" or plan.weight_rules):
            raise ValueError(
                f"task {what.name!r} trains parameters as they are, and weights is {plan.weights!r}"
                f"{' with rules for some' if plan.weight_rules else ''}: task 'lora' trains beside quantised ones"
            )
        if what.name == "full":
            plan = dataclasses.replace(plan, dtype="float32")
        if plan.kv_codec != "raw":
            raise ValueError(f"kv is {plan.kv_codec!r}; fine-tuning keeps no cache: leave it out")
        tuning.check(architecture, plan, what)
    check_mesh(architecture, plan)
    if what is not None and plan.mesh:
        meshed.check(architecture, plan, what, batch=batch)
    check_stay(architecture, plan)
    computed = plan.dtype if what is None else what.compute or plan.dtype
    if card.wide and computed == "bfloat16":
        raise ValueError(
            f"{'dtype is' if what is None else f'task {what.name!r} computes in'} 'bfloat16', which a {card.name} does not"
            f" multiply: XLA widens each matrix to float32 first, and no count of bytes here holds. Say"
            f" {'--dtype float16' if what is None else '--compute float32'}"
        )
    if memory is not None and memory > card.usable:
        raise ValueError(
            f"memory is {show_bytes(memory)}, and a process can have {show_bytes(card.usable)} of a {card.name}: give that"
            f" or less"
        )
    most = architecture.config.max_position_embeddings
    context = min(2048, most) if context is None else context
    check_rows(architecture, batch, context)
    if what is not None and what.tile >= context:  # all of a row, as without
        what = dataclasses.replace(what, tile=0)
    asked: dict[str, Any] = {
        "memory": card.usable if memory is None else memory, "ram": ram, "batch": batch,
        "context": bucket(context, least=64) if what is None else context,  # as a call pads it
        "task": what,
    }  # fmt: skip
    how: dict[str, Any] = {"disk_rate": disk_rate}
    found = tuple(candidates(architecture, plan, card, **how, **asked))
    fits = any(c.fits for c in found)
    others = () if fits else tuple(changes(architecture, plan, card, **how, **asked))
    return Outcome(
        architecture, card, **asked, candidates=found, changes=others, remat=plan.remat, plan=plan, disk_rate=disk_rate
    )


def _of_adapter(
    folder: str | os.PathLike[str], architecture: Architecture, task: str | Task, options: Options
) -> Options:
    """Options with the rank and the targets of a PEFT folder, refused where they say something else, as a run's are."""
    from jaxengine.finetune.run import begun

    start = begun(folder, architecture)
    if task != start.settings["train"]:
        named = task if isinstance(task, str) else task.name
        raise ValueError(
            f"task is {named!r}, and the adapter in {os.fspath(folder)} is of {start.settings['train']!r}: say"
            f" task={start.settings['train']!r}, or leave the adapter out"
        )
    given = {n: x for n, x in options.items() if x is not None and x != () and n in ("rank", "targets")}
    if isinstance(given.get("targets"), str):
        given["targets"] = (given["targets"],)
    start.check(given, architecture)
    return {**options, "rank": start.settings["rank"], "targets": start.settings["targets"]}


def plan_folder(
    folder: str | os.PathLike[str],
    *,
    gpu: str,
    memory: str | int | None = None,
    ram: str | int | None = None,
    batch: int = 1,
    context: int | None = None,
    task: str | Task = "generate",
    adapter: str | os.PathLike[str] | None = None,
    remat: str = "",
    weights: str | None = None,
    weight_rules: Mapping[str, str] | Sequence[str | tuple[str, str]] = (),
    dtype: str | None = None,
    kv: str = "raw",
    stay: Sequence[str] = (),
    attention: str = "auto",
    mesh: str = "",
    sharding: str = "",
    disk_rate: str | int = int(DISK_RATE),
    **options: Unpack[Options],
) -> Outcome:
    """`plan_for` a checkpoint folder and a card by its name or numbers ('rtx4090').

    plan_folder(folder, gpu="rtx4090", memory="8GB", task="lora", rank=64, optimizer="lion", accumulate=2)

    Of the folder config.json is read, and where its weights are stored quantised their formats. Sizes as `jaxengine.load`
    takes them, and `stay` and weight_rules; weights: the format of the others (dense); dtype: the config's, if not given;
    mesh: 'tensor=2' for two such cards, split as the table `sharding` says ('': that of the mesh's axes); attention: its
    implementation by name, refused where it does not serve on the card; remat: what is kept of layers for a task's way back
    ('': as fits); adapter: a PEFT folder that a run starts from, whose rank and targets it keeps; options: what is said of a
    task. `picture.figure` draws the outcome, and `proof.prove` compiles what was chosen.
    Raises ValueError for what `plan_for` refuses and for an unknown card.
    """
    at, card = Path(folder), find(gpu)
    raw = read_config(at)
    named, found, stored = dtype or raw.get("dtype") or raw.get("torch_dtype"), architecture(raw), None
    if raw.get("quantization_config") or (at / ORBAX).is_dir() or gguf_file(at) is not None:
        with open_source(at, found) as source:
            found, stored = source.architecture, source.plan
    if adapter is not None:
        options = _of_adapter(adapter, found, task, options)
    what = tuning.asked(task, **options)
    if what is not None and what.name == "full" and dtype not in (None, "float32"):
        raise ValueError(
            f"dtype is {dtype!r}, and task 'full' keeps parameters in float32: leave it out (compute says the arithmetic's)"
        )
    if stored is not None and weights is not None:
        raise ValueError(f"weights is {weights!r}, and the folder's are stored in formats of their own: leave it out")
    named = named or (stored.dtype if stored is not None else None)
    if named not in DTYPES:
        said = "" if dtype else " in config.json and none is given"
        raise ValueError(f"dtype is {named!r}{said}; it can be {', '.join(DTYPES)}")
    start = Plan(weights=weights or "dense") if stored is None else stored
    named_to_stay: Any = stay if isinstance(stay, str) else tuple(stay)  # a string, which Plan refuses
    plan = Plan(
        dtype=named, weights=start.weights, weight_rules=start.weight_rules, kv_codec=kv, mesh=mesh,
        sharding=sharding or "single", stay=named_to_stay, attention=attention, remat=remat,
    )  # fmt: skip
    plan = with_rules(found, with_table(plan, mesh=mesh, sharding=sharding), weight_rules)
    if (over := mesh_of(plan)) is not None:
        check_mesh(found, plan)
        plan = orders.over_mesh(found, plan, over)
    check_formats(found, orders.as_chosen(found, stored, plan), plan)
    outcome = plan_for(
        found, plan, card, batch=batch, context=context, task=what or "generate",
        memory=None if memory is None else parse_bytes(memory), ram=None if ram is None else parse_bytes(ram, "ram"),
        disk_rate=parse_bytes(disk_rate, "disk-rate"),
    )  # fmt: skip
    chosen = plan if outcome.chosen is None else outcome.chosen.plan
    device = jax.sharding.AbstractDevice(device_kind=card.limits.lowers_as, num_cores=card.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        check_attention(found, chosen, training=what is not None, dtype="" if what is None else what.compute)
    return outcome
