"""A plan proved: prefill and decode compiled for a card, here or not, and XLA's own bytes read from them.

Nothing is allocated and no card is needed, only XLA's GPU compiler (pallas_kernels/aot.py). What is compiled is what
`Model.generate` runs, on abstract parameters; the checker (pallas_kernels/audit.py) then reads the program for copies that
are none, slices at wrong places and bytes over the plan. Where layers are programs of their own (form 'python'), each
piece is compiled, and what stands on the device beside it is added to its bytes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxengine import engine, outside, packing, placement, sampling
from jaxengine.architecture import Architecture
from jaxengine.engine import Engine
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.settings import Task
from jaxengine.homes.base import home
from jaxengine.plan import Plan, brought_bytes, cache_bytes, likeness, mesh_of, resident_bytes, weight_bytes
from pallas_kernels import aot
from pallas_kernels.audit import Report, audit
from pallas_kernels.cards import Card
from sharding.rules import named_sharding


@dataclasses.dataclass(frozen=True)
class Proof:
    """What XLA says of one compiled program. device, host: bytes in all, of the device with what stands beside the
    program; temporaries: the device's, as one block."""

    program: str
    device: int
    host: int
    temporaries: int
    seconds: float
    report: Report


@dataclasses.dataclass(frozen=True)
class Called:
    """A program with its static arguments and its abstract ones.

    standing: of a piece, the bytes on the device that stand there whichever piece runs, and `brought` the rest of its
    arguments; None: the program's arguments are all there is.
    """

    program: engine.Program
    static: tuple[Any, ...]
    abstract: tuple[Any, ...]
    standing: int | None = None
    brought: int = 0

    def fitting(self) -> Any:
        """The program under jit with the options that it runs with on the GPU that is compiled for."""
        return self.program.fitting("gpu", *self.static, *self.abstract)

    def device_bytes(self, compiled: Any) -> int:
        """Bytes on the device while the program runs. (XLA's sum of a piece's arguments lacks those it does not use.)"""
        if self.standing is None:
            return aot.device_bytes(compiled)
        m = compiled.memory_analysis()
        return self.standing + self.brought + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def programs(
    architecture: Architecture, plan: Plan, mesh: Any, *, batch: int, length: int, task: Task | None = None
) -> dict[str, Called]:
    """Each program that generating runs, as `Model.generate` calls it for `batch` greedy rows whose prompts fill a cache of
    `length` tokens; or the step of what is fine-tuned, on `batch` rows of `length` tokens a part."""
    if task is not None:
        return {"step": Called(*tuning.program(architecture, plan, task, mesh, batch=batch, context=length))}
    how = Engine(architecture, plan.caching, plan.dtype, plan.sharding_rules(), mesh, plan.chunk, plan.attention)
    params = placement.abstract(architecture, plan, mesh)
    rows = [sampling.Sampling()] * batch
    steps = sampling.Steps.of(rows)
    values = jax.eval_shape(lambda: sampling.values(steps, rows))
    keys = jax.eval_shape(lambda: sampling.row_keys(0, [0] * batch))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    prompts = (ints(batch, length), ints(batch), values, keys, ints(8))
    outer, tokens, lengths = outside.described(params), *prompts[:2]
    fresh = jax.eval_shape(lambda *a: engine.fresh(how, *a), tokens, lengths)
    cache = jax.eval_shape(lambda outer: engine.empty_cache(how, outer, batch, length), outer)
    x = jax.eval_shape(lambda *a: engine.embed(how, *a), outer, tokens, fresh)
    state, _ = jax.eval_shape(lambda *a: engine.first_tokens(how, steps, 1, 0, *a), outer, x, cache, *prompts)
    state = dataclasses.replace(state, cache=_laid_out(how, params["banks"], state.cache))
    if not any(bank.outside for bank in params["banks"]):
        return {
            "prefill": Called(engine.prefill, (how, steps, length, 1, 0), (params, *prompts)),
            "decode": Called(engine.decode, (how, steps, 0), (params, state, values, ints(8), ints())),
        }

    chunk = architecture.chunk(plan.chunk, length)
    first = next(i for i, bank in enumerate(params["banks"]) if bank.outside)
    cache_size = cache_bytes(architecture, plan, batch=batch, length=length)
    standing = weight_bytes(architecture, plan)["outer"] + resident_bytes(architecture, plan) + cache_size
    each = brought_bytes(architecture, plan)
    streamed = max(
        max(each[p.start : p.start + p.num_layers])
        for p in plan.parts(architecture)
        if home(p.home).TIER == "disk" or p.form == "python"
    )
    like = likeness(architecture, plan.weights, plan.weight_rules)
    last = dataclasses.replace(state, cache=())
    following = jax.eval_shape(lambda now: engine.following(how, now), last)
    found: dict[str, Called] = {}

    def add(
        name: str,
        program: engine.Program,
        static: tuple[Any, ...],
        abstract: tuple[Any, ...],
        new: Any,
        layers: int = 1,
    ) -> None:
        """new: those of the arguments that do not stand; layers: the streamed ones that are there meanwhile."""
        found[name] = Called(program, static, abstract, standing + layers * streamed, _size(new))

    for phase, ids, attend, piece in (("prefill", tokens, fresh, chunk), ("decode", ints(batch, 1), following, 0)):
        states = state.cache[:first]
        add(f"{phase}, before", outside.enter, (how, piece), (outer, ids, attend, states), (ids, attend))
        x = jax.eval_shape(lambda *a: engine.embed(how, *a), outer, ids, attend)
        kinds: dict[Any, None] = {}
        parts = plan.parts(architecture)[first:]
        for bank, part, kv in zip(params["banks"][first:], parts, state.cache[first:], strict=True):
            for i, kind in enumerate(bank.kinds * bank.repeats):
                if (key := like[part.start + i]) in kinds:  # its kind and its formats
                    continue
                kinds[key] = None
                weights = packing.abstract_layer(architecture, plan, part.start + i)
                add(
                    f"{phase}, a layer" + ("" if len(set(like)) == 1 else f" like layer {part.start + i}"),
                    outside.layer, (how, kind, piece), (weights, x, attend, kv[i]), (x, attend), 2,
                )  # fmt: skip
        if phase == "prefill":
            after = (outer, x, state.cache, *prompts)
            add("prefill, after", outside.first_tokens, (how, steps, 1, 0), after, (x, *prompts))
        else:
            after = (outer, x, state.cache, last, values, ints(8))
            add("decode, after", outside.next_tokens, (how, steps, 0), after, (x, last, values))
    return found


def _laid_out(how: Engine, banks: Any, cache: Any) -> Any:
    """An abstract cache as `engine.placed_cache` leaves it on the mesh, of which eval_shape says nothing."""

    def one(x: Any, stacked: bool) -> jax.ShapeDtypeStruct:
        where = named_sharding(how.rules, how.mesh, engine.slot_axes(x.ndim, stacked=stacked), shape=x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    each = zip(banks, cache, strict=True)
    return tuple(jax.tree.map(lambda x, stacked=bank.stacked: one(x, stacked), kv) for bank, kv in each)


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def exposed(report: Report) -> list[str]:
    """The problems of a program that is to copy each layer beside the computation of the one before it: slices of a stack
    that nothing runs beside, in its loop or in the turn that XLA takes out of a loop of odd length to write two as one. (The
    first layer of a pass is no slice, and norms are too short to matter.)"""
    return [
        f"no matrix product runs while {c.name} copies {c.bytes} bytes of a layer, which form='ahead' promises"
        for c in report.copies
        if c.offset is not None and c.bytes >= 2**20 and not c.matmuls
    ]


def prove(
    architecture: Architecture,
    plan: Plan,
    card: Card,
    *,
    batch: int,
    length: int,
    memory: int | None = None,
    task: Task | None = None,
) -> tuple[Proof, ...]:
    """Compile what generating, or a step of fine-tuning, runs for one such card; a program over `memory` bytes has that
    among its problems.

    Raises RuntimeError where XLA's GPU compiler is not installed."""
    proofs, mesh = [], mesh_of(plan)
    axes = {} if mesh is None else dict(mesh.shape)
    if further := {a: n for a, n in axes.items() if a not in aot.AXES and n > 1}:
        raise ValueError(
            f"mesh is {plan.mesh!r}; programs are compiled ahead for the axes {', '.join(aot.AXES)}, not {further}"
        )
    waits = 0  # of the head's gradient, while layers go back through
    if task is not None:
        kept = tuning.need(architecture, plan, task, batch=batch, context=length).host_kept
        waits = kept // (1 if mesh is None else mesh.size)
    with aot.target(card, **axes) as target:
        found = programs(architecture, plan, cast(Any, target.mesh), batch=batch, length=length, task=task)
        for name, called in found.items():
            start = time.perf_counter()
            compiled = target.compile(called.fitting(), *called.static, *target.place(called.abstract))
            device = called.device_bytes(compiled)
            limit = None if memory is None else memory - (device - aot.device_bytes(compiled))
            # what comes into layers is kept in host memory under remat 'offload', and is no argument
            in_place = home(plan.home).TIER != "device" and not (task is not None and plan.remat == "offload")
            report = audit(compiled, device_limit=limit, in_place=in_place, waits=waits)
            if "ahead" in {part.form for part in plan.parts(architecture)}:
                report = dataclasses.replace(report, problems=(*report.problems, *exposed(report)))
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            seconds = time.perf_counter() - start
            proofs.append(Proof(name, device, aot.host_bytes(compiled), temporaries, seconds, report))
    return tuple(proofs)
