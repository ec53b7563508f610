"""A few layers at a time: what LISA, BAdam and HiFT share.

The trained tree is the parameter tree, as of `all`: banks in the plan's dtype. Which of it is trained in a step is a Turn,
that (seed, step) alone decide; sampled.py makes the step. A file beside this one has, besides base.py's contract,

    outer(architecture)                     groups of names outside the layers that are trained together
    turn(options, architecture, seed, step) -> Turn
    KEPT                                    whether states wait in host memory for their layers' next turn

L layers, M layers that are trained at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.architecture import Architecture, merge
from jaxengine.finetune.data import permutation
from jaxengine.plan import Plan

ORDERS = ("ascending", "descending", "random")
DRAWS = 2**62  # in the place of an epoch: draws of layers, apart from those of rows


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is trained in a step. number: of the turn, from 0 on; steps of one number train the same. layers: at most
    `slots`, the number that a program is compiled for; outer: names outside the layers; rate_at: the step whose learning
    rate holds."""

    number: int
    layers: tuple[int, ...]
    slots: int
    outer: tuple[str, ...]
    rate_at: int


def check(name: str, layers: int, every: int, order: str = ORDERS[0]) -> None:
    """Refuse options that no model can have."""
    for field, given in (("layers", layers), ("every", every)):
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ValueError(f"{field} is {given!r}; of train={name!r} it is a whole number, at least 1")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it can be {', '.join(ORDERS)}")


def blocks(architecture: Architecture, size: int) -> list[tuple[int, ...]]:
    """The layers from the first on, `size` at a time; the last block may be smaller."""
    L = architecture.num_layers
    return [tuple(range(i, min(i + size, L))) for i in range(0, L, size)]


def nth(order: str, count: int, number: int, seed: int, *, anew: bool) -> int:
    """Which of `count` is the one of this number, in rounds through all of them. anew: a random order for each round."""
    sweep, i = divmod(number, count)
    if order == "random":
        return int(permutation(count, seed, DRAWS + (sweep if anew else 0))[i])
    return i if order == "ascending" else count - 1 - i


@functools.cache
def entering(architecture: Architecture) -> tuple[str, ...]:
    """Names of what is read before the layers, a tied embedding included."""
    graphdef, specs = architecture.outer()
    held = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    made = jax.make_jaxpr(lambda held, ids: merge(graphdef, held).embed(ids, ids, jnp.dtype("float32")))(
        held, ids
    ).jaxpr
    read = {id(v) for equation in made.eqns for v in equation.invars}
    return tuple(n for n, v in zip(sorted(held), made.invars, strict=False) if id(v) in read)


def matrices_of(architecture: Architecture) -> tuple[str, ...]:
    """Names of all matrices."""
    return tuple(n for n, s in architecture.specs().items() if s.out is not None)


def make_all(
    name: str, layers: int, architecture: Architecture, plan: Plan, params: Any, *, wide: Sequence[str] = ()
) -> Any:
    """The parameters themselves, those named `wide` in float32. params: arrays or ShapeDtypeStructs.

    ValueError where some are quantised, where there are fewer layers, or where layers are of different shapes.
    """
    specs = architecture.specs()
    if quantised := next((n for n, s in specs.items() if plan.format_of(n, s) != "dense"), None):
        raise ValueError(
            f"train={name!r} changes layers as they are, and {quantised} is stored as"
            f" {plan.format_of(quantised, specs[quantised])!r}, which would be rounded at every turn: load with"
            f" weights='dense', or train='lora' beside the quantised matrices"
        )
    if layers > architecture.num_layers:
        raise ValueError(
            f"layers is {layers}, and this {architecture.family} has {architecture.num_layers}: at most so many are trained"
            f" at a time"
        )
    first = architecture.block(architecture.kinds[0])[1]
    for kind in set(architecture.kinds):
        if (other := architecture.block(kind)[1]) != first:
            odd = next(n for n in sorted({*first, *other}) if first.get(n) != other.get(n))
            raise ValueError(
                f"train={name!r} takes layers of one shape in turn, and in this {architecture.family} {odd} differs between"
                f" layers: train='all', or 'lora'"
            )

    def widened(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return x.astype(jnp.float32)

    outer = {n: widened(x) if n in wide else x for n, x in params["outer"].items()}
    return {"outer": outer, "banks": tuple(bank.weights for bank in params["banks"])}


def combine_all(params: Any, trained: Any) -> Any:
    """The trained parameters in the banks' places."""
    banks = zip(params["banks"], trained["banks"], strict=True)
    return {"outer": trained["outer"], "banks": tuple(dataclasses.replace(b, weights=w) for b, w in banks)}
