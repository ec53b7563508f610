"""A plan proved: prefill and decode compiled for a card, here or not, and XLA's own bytes read from them.

Nothing is allocated and no card is needed, only XLA's GPU compiler (pallas_kernels/aot.py). What is compiled is what
`Model.generate` runs, on abstract parameters; the checker (pallas_kernels/audit.py) then reads the program for copies that
are none, slices at wrong places and bytes over the plan. Where layers are programs of their own (form 'python'), each
piece is compiled, and what stands on the device beside it is added to its bytes.

On a GPU a budget (`memory=`) is held against what is compiled for that very card before anything is placed on it: `Here`. What
came of it is kept in a file, so that the same plan is not compiled for it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
from checkpoints.errors import CheckpointError
from checkpoints.output import output_file
from jaxengine import engine, outside, packing, placement, sampling
from jaxengine.architecture import Architecture
from jaxengine.engine import Engine
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.settings import Task
from jaxengine.homes.base import home
from jaxengine.plan import (
    Plan,
    brought_bytes,
    cache_bytes,
    likeness,
    mesh_of,
    resident_bytes,
    show_bytes,
    weight_bytes,
)
from pallas_kernels import aot
from pallas_kernels.audit import Report, audit
from pallas_kernels.cards import Card
from pallas_kernels.dispatch import table_file
from sharding.rules import named_sharding

log = logging.getLogger("jaxengine")


class Compiles(Protocol):
    """What programs are compiled for: a card that is not there (aot.Target), or this machine's devices (Here)."""

    @property
    def mesh(self) -> Any: ...
    def place(self, tree: Any) -> Any: ...
    def compile(self, jitted: Any, *args: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Here:
    """This machine's own devices, as an aot.Target."""

    mesh: Mesh

    def place(self, tree: Any) -> Any:
        def one(x: Any) -> Any:
            if x.sharding is not None or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

        return jax.tree.map(one, tree)

    def compile(self, jitted: Any, *args: Any) -> Any:
        compiled = jitted.trace(*args).lower().compile()
        if compiled.memory_analysis() is None:
            raise UntoldError("XLA tells no bytes of them")
        return compiled


class UntoldError(RuntimeError):
    """XLA does not say how many bytes a program takes, such as one that comes from a cache."""


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
    card: Card | None,
    *,
    batch: int,
    length: int,
    memory: int | None = None,
    task: Task | None = None,
    here: Mesh | None = None,
) -> tuple[Proof, ...]:
    """Compile what generating, or a step of fine-tuning, runs for one such card; a program over `memory` bytes has that
    among its problems. here: devices of this machine to compile for, in the place of the card.

    Raises RuntimeError where XLA's GPU compiler is not installed."""
    proofs, mesh = [], mesh_of(plan)
    axes = {} if mesh is None else dict(mesh.shape)
    further = {} if here is not None else {a: n for a, n in axes.items() if a not in aot.AXES and n > 1}
    if further:
        raise ValueError(
            f"mesh is {plan.mesh!r}; programs are compiled ahead for the axes {', '.join(aot.AXES)}, not {further}"
        )
    waits = 0  # of the head's gradient, while layers go back through
    if task is not None:
        kept = tuning.need(architecture, plan, task, batch=batch, context=length).host_kept
        waits = kept // (1 if mesh is None else mesh.size)
    with _compiler(card, axes, here) as target:
        found = programs(architecture, plan, target.mesh, batch=batch, length=length, task=task)
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


@contextlib.contextmanager
def _compiler(card: Card | None, axes: dict[str, int], here: Mesh | None) -> Iterator[Compiles]:
    if here is not None:
        yield Here(here)
        return
    assert card is not None
    with aot.target(card, **axes) as target:
        yield target


def holds(
    architecture: Architecture,
    mesh: Mesh,
    *,
    batch: int,
    length: int,
    memory: int,
    folder: Path,
    task: Task | None = None,
) -> Callable[[Plan], tuple[int, tuple[str, ...]]] | None:
    """What compiles a plan for these devices, as `plan.settled` asks: the most bytes that a program takes of each, and what is
    wrong, programs of more than `memory` bytes among it. None where they are no GPUs: of a CPU's programs XLA tells no bytes
    that would stand for a card's.

    What was found is kept in `folder`, for the same plan, sizes, device, jax and code. task: what is fine-tuned.
    """
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return None

    def compiled(plan: Plan) -> tuple[int, tuple[str, ...]]:
        what = _asked(architecture, plan, device, batch=batch, length=length, memory=memory, task=task)
        kept = folder / f"proof-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["of"] == what:
                return found["device"], tuple(found["problems"])
        log.info("compiling what runs on this %s, to hold it against the budget", device.device_kind)
        start = time.perf_counter()
        try:
            proofs = prove(architecture, plan, None, batch=batch, length=length, memory=memory, task=task, here=mesh)
        except (UntoldError, ValueError) as error:  # nor, of a text that is not as it was, what they do
            log.warning("what these programs take of the device cannot be read, and what is counted decides. %s", error)
            return 0, ()
        except jax.errors.JaxRuntimeError as error:
            return 0, (f"it does not compile: {str(error).partition(chr(10))[0]}",)
        most, problems = max(p.device for p in proofs), tuple(x for p in proofs for x in p.report.problems)
        took = time.perf_counter() - start
        log.info("%s of %s by XLA's own bytes (%.0f s)", show_bytes(most), show_bytes(memory), took)
        try:
            with output_file(kept, overwrite=True) as path:
                path.write_text(json.dumps({"of": what, "device": most, "problems": problems}), encoding="utf-8")
        except (OSError, CheckpointError) as error:
            log.info("what was found cannot be kept, and will be compiled again: %s", error)
        return most, problems

    return compiled


PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "tokamax")


def _asked(architecture: Architecture, plan: Plan, device: Any, **sizes: Any) -> dict[str, Any]:
    """What the bytes of compiled programs depend on."""
    measured = table_file(device.device_kind)  # by which kernels are chosen
    return {
        "packages": {name: version(name) for name in PACKAGES if _installed(name)},
        "card": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "precision": str(jax.config.jax_default_matmul_precision),
        "measured": hashlib.sha256(measured.read_bytes()).hexdigest() if measured.is_file() else "",
        "code": _code(),
        "model": repr(architecture.config),
        "plan": plan.to_json(),
        "sizes": repr(sorted(sizes.items())),
    }


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _code() -> str:
    """Of this package's own files, and those of the packages that it is of."""
    found = hashlib.sha256()
    for package in (Path(__file__).parent, Path(aot.__file__).parent, Path(sharding.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
