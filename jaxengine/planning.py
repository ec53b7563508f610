"""Which plan fits a card and a budget, what it costs, and why each nearer choice does not: `jaxengine plan`.

Arithmetic on abstract parameters, nothing allocated. A choice is nearer the more of the model stands on the device; the
nearest that fits is chosen. Speed is bytes over bandwidth: a decoding step reads every weight once, those on the device at
its memory's rate and the streamed ones at the link's, and the slowest of the two, or the matmuls, is the limit named. It
is what the hardware allows, not a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxengine.architecture import Architecture
from jaxengine.engine import bucket
from jaxengine.plan import (
    CHUNK,
    Plan,
    activation_bytes,
    cache_bytes,
    parameter_bytes,
    resident_bytes,
    show_bytes,
    streamed_bytes,
    weight_bytes,
)
from pallas_kernels.cards import Card

POOL = 64 * 10**9  # XLA's pool of pinned memory stops here unless it is told otherwise
TASKS = ("generate",)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes by what they are for. Device: embeddings and head, resident layers, streamed layers while they are there, KV
    cache, activations (of reading a prompt). Host: streamed layers, pinned."""

    outer: int
    resident: int
    streaming: int
    cache: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        return self.outer + self.resident + self.streaming + self.cache + self.activations


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan with its bytes, whether it fits and why not, and what a decoding step is limited by.

    seconds: of one step at least, of each of its limits; steps/s is 1 / the largest.
    """

    plan: Plan
    need: Need
    refused: str
    seconds: tuple[tuple[str, float], ...]
    batch: int

    @property
    def fits(self) -> bool:
        return not self.refused

    @property
    def limit(self) -> str:
        return max(self.seconds, key=lambda item: item[1])[0]

    @property
    def passes_per_second(self) -> float:
        return 1 / max(s for _, s in self.seconds)

    def label(self) -> str:
        """'split, 12 resident, ahead, chunk 512, int8'."""
        p = self.plan
        said = [p.home, f"{p.resident} resident" if p.resident else "", p.resolved_form if p.home != "device" else ""]
        said += [f"chunk {p.chunk}" if p.chunk else "", p.weights if p.weights != "dense" else ""]
        said += [f"kv {p.kv_codec}" if p.kv_codec != "raw" else ""]
        return ", ".join(s for s in said if s)


def need(architecture: Architecture, plan: Plan, *, batch: int, context: int) -> Need:
    """What a plan needs to generate: `batch` rows of up to `context` tokens, their prompts as long as that."""
    w, resident = weight_bytes(architecture, plan), resident_bytes(architecture, plan)
    return Need(
        outer=w["outer"],
        resident=resident,
        streaming=streamed_bytes(architecture, plan),
        cache=cache_bytes(architecture, plan, batch=batch, length=context),
        activations=activation_bytes(architecture, plan, batch=batch, tokens=context, length=context),
        host=w["layers"] - resident,
    )


def judge(
    architecture: Architecture, plan: Plan, card: Card, *, memory: int, ram: int | None, batch: int, context: int
) -> Candidate:
    """One plan on one card: its bytes, whether they fit, its limits."""
    n = need(architecture, plan, batch=batch, context=context)
    refused = ""
    if n.device > memory:
        refused = f"{show_bytes(n.device)} on the device, {show_bytes(n.device - memory)} over"
    elif ram is not None and n.host > ram:
        refused = f"{show_bytes(n.host)} of pinned host memory, {show_bytes(n.host - ram)} over"
    weights = n.resident + n.host + _head_bytes(architecture, plan)
    # every stored weight is used once a row; two operations for each, whatever its format
    layers = sum(math.prod(s.shape) for n, s in architecture.specs().items() if n.startswith("layers.") and s.out)
    elements = layers + math.prod(architecture.specs()["embedding"].shape)
    seconds = [
        ("device memory", (weights - n.host + n.cache) / card.bandwidth),
        ("matmuls", 2 * elements * batch / card.tensor),
    ]
    if n.host:
        seconds.append(("host link", n.host / card.link))
    return Candidate(plan, n, refused, tuple(seconds), batch)


def _head_bytes(architecture: Architecture, plan: Plan) -> int:
    """Of what stands outside the layers a step reads the head whole, and one row of the rest."""
    outer = architecture.outer()[1]
    name = "lm_head" if "lm_head" in outer else "embedding"
    return parameter_bytes(plan, name, outer[name])


def candidates(
    architecture: Architecture, plan: Plan, card: Card, *, memory: int, ram: int | None, batch: int, context: int
) -> list[Candidate]:
    """From the nearest to the farthest: all on the device, as many layers as fit, all streamed; each in one piece and in
    chunks. A split home stands for the most resident layers that fit, or one if none do."""

    def of(**given: Any) -> Candidate:
        made = dataclasses.replace(plan, **given)
        return judge(architecture, made, card, memory=memory, ram=ram, batch=batch, context=context)

    found = []
    chunks = [0, CHUNK] if plan.chunk == 0 and context > CHUNK else [plan.chunk]
    for chunk in chunks:
        found.append(of(home="device", form="", resident=0, chunk=chunk))
    splits = []
    for chunk in chunks:
        split = None
        low, high = 1, architecture.num_layers - 1
        while low <= high:  # more resident layers never need less
            middle = (low + high) // 2
            tried = of(home="split", form="", resident=middle, chunk=chunk)
            if tried.need.device <= memory:
                split, low = tried, middle + 1
            else:
                split, high = split if split and split.need.device <= memory else tried, middle - 1
        if split is not None:
            splits.append(split)
    found += sorted(splits, key=lambda c: -c.plan.resident)
    for chunk in chunks:
        found.append(of(home="host", form="", resident=0, chunk=chunk))
    return found


def changes(
    architecture: Architecture, plan: Plan, card: Card, *, memory: int, ram: int | None, batch: int, context: int
) -> list[tuple[str, Candidate]]:
    """What would make it fit, where nothing does: each change alone, then two together, the first three that fit."""
    single: list[tuple[str, dict[str, Any], dict[str, int]]] = []
    if plan.weights == "dense":
        single.append(("weights int8", {"weights": "int8"}, {}))
    if plan.kv_codec == "raw":
        single.append(("kv int8", {"kv_codec": "int8"}, {}))
    for divisor in (2, 4, 8, 16):
        if batch % divisor == 0:
            single.append((f"batch {batch // divisor}", {}, {"batch": batch // divisor}))
        if context // divisor >= 64:
            single.append((f"context {context // divisor}", {}, {"context": context // divisor}))
    pairs = [
        (f"{a[0]} and {b[0]}", a[1] | b[1], a[2] | b[2])
        for i, a in enumerate(single)
        for b in single[i + 1 :]
        if not a[2].keys() & b[2].keys()
    ]
    found = []
    for said, given, sizes in (*single, *pairs):
        if len(found) == 3:
            break
        asked = {"memory": memory, "ram": ram, "batch": batch, "context": context} | sizes
        fit = [c for c in candidates(architecture, dataclasses.replace(plan, **given), card, **asked) if c.fits]
        if fit:
            found.append((said, fit[0]))
    return found


def traps(candidate: Candidate, card: Card) -> list[str]:
    """What to know before running it on this card."""
    said = []
    if candidate.need.host > POOL:
        said.append(
            f"{show_bytes(candidate.need.host)} of pinned host memory: XLA's pool stops at 64 GB unless"
            f" XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={-(-candidate.need.host * 5 // 4 // 10**9)} is set before jax starts"
        )
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
    """What `plan` found: every candidate in order, the chosen one (None: nothing fits) and then what would fit."""

    card: Card
    memory: int
    ram: int | None
    batch: int
    context: int
    candidates: tuple[Candidate, ...]
    changes: tuple[tuple[str, Candidate], ...]

    @property
    def chosen(self) -> Candidate | None:
        return next((c for c in self.candidates if c.fits), None)

    @property
    def short(self) -> int:
        """Bytes of device memory that the smallest candidate lacks; 0 where something fits."""
        return 0 if self.chosen else max(0, min(c.need.device for c in self.candidates) - self.memory)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: bytes and seconds."""

        def one(c: Candidate) -> dict[str, Any]:
            return {
                "plan": dataclasses.asdict(c.plan), "bytes": dataclasses.asdict(c.need) | {"device": c.need.device},
                "fits": c.fits, "refused": c.refused, "seconds_per_step": dict(c.seconds), "limit": c.limit,
                "steps_per_second": c.passes_per_second, "tokens_per_second": c.passes_per_second * c.batch,
            }  # fmt: skip

        chosen = self.chosen
        return {
            "card": self.card.name, "card_notes": self.card.notes, "memory": self.memory, "ram": self.ram,
            "batch": self.batch, "context": self.context, "chosen": None if chosen is None else one(chosen),
            "candidates": [one(c) for c in self.candidates], "short": self.short,
            "changes": [{"change": said, **one(c)} for said, c in self.changes],
            "traps": [] if chosen is None else traps(chosen, self.card),
        }  # fmt: skip


def plan_for(
    architecture: Architecture,
    plan: Plan,
    card: Card,
    *,
    memory: int | None = None,
    ram: int | None = None,
    batch: int = 1,
    context: int | None = None,
    task: str = "generate",
) -> Outcome:
    """The nearest plan that fits, every one that was looked at, and what would fit where none does.

    plan: the choices that stand (dtype, weights, cache; a chunk if it has one); home, form and resident layers are chosen.
    memory: bytes of the card to use (all that a process can have, if not given); ram: bytes of host memory for layers;
    context: tokens of a row (2048, or what the model can at most), padded as a call pads them.
    Raises ValueError for a task that is not done, or a budget larger than the card.
    """
    if task not in TASKS:
        raise ValueError(
            f"task is {task!r}; what is planned for is {', '.join(TASKS)}: jaxengine does not fine-tune yet"
        )
    if plan.mesh:
        raise ValueError(f"mesh is {plan.mesh!r}; a plan is made for one card")
    if memory is not None and memory > card.usable:
        raise ValueError(
            f"memory is {show_bytes(memory)}, and a process can have {show_bytes(card.usable)} of a {card.name}: give that"
            f" or less"
        )
    most = architecture.config.max_position_embeddings
    context = min(2048, most) if context is None else context
    if batch < 1 or not 1 <= context <= most:
        raise ValueError(
            f"batch {batch} and context {context}; they are at least 1, and this model's context at most {most}"
        )
    asked: dict[str, Any] = {
        "memory": card.usable if memory is None else memory, "ram": ram, "batch": batch,
        "context": bucket(context, least=64),  # as a call pads it
    }  # fmt: skip
    found = tuple(candidates(architecture, plan, card, **asked))
    fits = any(c.fits for c in found)
    return Outcome(
        card, **asked, candidates=found, changes=() if fits else tuple(changes(architecture, plan, card, **asked))
    )
