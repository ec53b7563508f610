"""A plan proved: prefill and decode compiled for a card, here or not, and XLA's own bytes read from them.

Nothing is allocated and no card is needed, only XLA's GPU compiler (pallas_kernels/aot.py). What is compiled is what
`Model.generate` runs, on abstract parameters; the checker (pallas_kernels/audit.py) then reads the program for copies that
are none, slices at wrong places and bytes over the plan.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxengine import engine, placement, sampling
from jaxengine.architecture import Architecture
from jaxengine.engine import Engine
from jaxengine.homes.base import home
from jaxengine.plan import Plan
from pallas_kernels import aot
from pallas_kernels.audit import Report, audit
from pallas_kernels.cards import Card


@dataclasses.dataclass(frozen=True)
class Proof:
    """What XLA says of one compiled program. device, host: bytes in all; temporaries: the device's, as one block."""

    program: str
    device: int
    host: int
    temporaries: int
    seconds: float
    report: Report


def programs(
    architecture: Architecture, plan: Plan, mesh: Any, *, batch: int, length: int
) -> dict[str, tuple[engine.Program, tuple[Any, ...], tuple[Any, ...]]]:
    """Each program that generating runs, with its static arguments and its abstract ones, as `Model.generate` calls it
    for `batch` greedy rows whose prompts fill a cache of `length` tokens."""
    how = Engine(architecture, plan.caching, plan.dtype, plan.sharding_rules(), mesh, plan.chunk)
    params = placement.abstract(architecture, plan, mesh)
    rows = [sampling.Sampling()] * batch
    steps = sampling.Steps.of(rows)
    values = jax.eval_shape(lambda: sampling.values(steps, rows))
    keys = jax.eval_shape(lambda: sampling.row_keys(0, [0] * batch))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    prompts = (params, ints(batch, length), ints(batch), values, keys, ints(8))
    state, _ = jax.eval_shape(lambda *a: engine.prefill.function(how, steps, length, 1, 0, *a), *prompts)
    return {
        "prefill": (engine.prefill, (how, steps, length, 1, 0), prompts),
        "decode": (engine.decode, (how, steps, 0), (params, state, values, ints(8), ints())),
    }


def prove(
    architecture: Architecture, plan: Plan, card: Card, *, batch: int, length: int, memory: int | None = None
) -> tuple[Proof, ...]:
    """Compile what generating runs for one such card; a program over `memory` bytes has that among its problems.

    Raises RuntimeError where XLA's GPU compiler is not installed."""
    proofs = []
    with aot.target(card) as target:
        found = programs(architecture, plan, cast(Any, target.mesh), batch=batch, length=length)
        for name, (program, static, abstract) in found.items():
            start = time.perf_counter()
            compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
            report = audit(compiled, device_limit=memory, in_place=home(plan.home).MEMORY is not None)
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            proofs.append(
                Proof(
                    name, aot.device_bytes(compiled), aot.host_bytes(compiled), temporaries, time.perf_counter() - start,
                    report,
                )
            )  # fmt: skip
    return tuple(proofs)
