"""Orders of columns (act_order of integer formats) over a mesh: each is resolved in the parts of a row that devices hold.

Where a mesh splits the inputs of a matrix, and what it is contracted with alike, each device should gather from the inputs that
it has. weights/_parts.py says what that takes; here it is decided which matrices, and in how many parts.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from checkpoints.errors import CheckpointError
from jaxengine import formats
from jaxengine.architecture import Architecture, Spec
from jaxengine.plan import Plan, abstract_leaf
from jaxengine.sources import stacked_name
from sharding.rules import AnyMesh, Rules

log = logging.getLogger("jaxengine")


def over_mesh(architecture: Architecture, plan: Plan, mesh: AnyMesh) -> Plan:
    """The plan with each order of columns resolved in as many parts of a row as the mesh splits it and its inputs into. An
    order stays whole, and a device gathers, where the mesh splits into a number that has no parts, or where the parts with
    their room take more bytes than the matrix in no format: small groups in many parts. A warning says so."""
    rules = plan.sharding_rules()
    whole: dict[str, dict[str, None]] = {}  # {why: names}

    def one(name: str, spec: Spec, text: str) -> str:
        devices = _devices_of_inputs(spec, rules, mesh)
        made = _in_parts(text, devices)
        if _order(made) is True and devices > 1:
            whole.setdefault(_no_parts(text, devices, mesh.size), {})[_of_all_layers(name)] = None
        if made == text:
            return text
        leaf = abstract_leaf(made, spec.shape, spec.out, plan.dtype)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf))
        if size > math.prod(spec.shape) * jnp.dtype(plan.dtype).itemsize:
            why = (
                f"in {_order(made)} parts they would take more bytes than in {plan.dtype}; larger groups, or inputs over fewer"
                f" devices, take less"
            )
            whole.setdefault(why, {})[_of_all_layers(name)] = None
            return _with_order(text, True)
        return made

    made = _with_formats(architecture, plan, one)
    for why, names in whole.items():
        log.warning(
            "%s: orders of columns (act_order) stay whole, and each device gathers all inputs: %s",
            ", ".join(names),
            why,
        )
    return made


def _no_parts(text: str, devices: int, size: int) -> str:
    """Why a format has no parts for so many devices, of `size`, and what would work."""
    parts = [str(n) for n in formats.find(text).module.OPTIONS["act_order"] if n > 1]
    near = [n for n in parts if int(n) <= size]
    return (
        f"the mesh splits them over {devices} devices, and an order is resolved in {', '.join(parts)} parts. Split over"
        f" {' or '.join(near)} devices (tensor={near[-1]}), nothing is gathered"
    )


def _of_all_layers(name: str) -> str:
    """'layers.*.o' of 'layers.3.o'."""
    return "layers.*." + name.split(".", 2)[2] if name.startswith("layers.") else name


def as_chosen(architecture: Architecture, stored: Plan | None, chosen: Plan) -> Plan | None:
    """The plan of stored weights with the parts that `chosen` resolves their orders in: codes and scales are the same numbers,
    whole or in whatever parts. CheckpointError where it asks for what differs in more than that."""
    if stored is None:
        return None

    def one(name: str, spec: Spec, text: str) -> str:
        wanted = chosen.format_of(name, spec)
        if wanted == text or not (_order(text) or _order(wanted)):
            return text
        if _order(text) and _order(wanted) and _with_order(text, True) == _with_order(wanted, True):
            return wanted
        if formats.find(text).name == formats.find(wanted).name:
            raise CheckpointError(_said(name, text, wanted, chosen))
        return text

    return _with_formats(architecture, stored, one)


def _said(name: str, stored: str, wanted: str, chosen: Plan) -> str:
    """Why a format that differs from the stored one, one of them with an order of columns, is not what is read."""
    pattern = next((p for p, _ in chosen.weight_rules if fnmatch.fnmatchcase(name, p)), None)
    given = f"weights={wanted!r}" if pattern is None else f"rule {pattern + '=' + wanted!r}"
    if not _order(stored):
        why, near = "its columns are in order, or their order stands in the rows of the matrices before it", stored
    elif not _order(wanted):
        why, near = "its codes are in an order of columns that they cannot be read without", stored
    else:
        why, near = "of what is stored the parts that its order is resolved in can be chosen, and nothing else", stored
        near = _with_order(stored, _order(wanted))
    near = near if pattern is None else f"{pattern}={near}"
    return f"{given}: {name} is stored as {stored!r}: {why}. Nearest: {near!r}; or leave it out"


def _with_formats(architecture: Architecture, plan: Plan, choose: Callable[[str, Spec, str], str]) -> Plan:
    """The plan with choose(name, spec, its format now) as each matrix's format."""
    found: dict[str, dict[str, str]] = {}
    specs = architecture.specs()
    for name, spec in specs.items():
        if spec.out is not None:
            found.setdefault(stacked_name(name), {})[name] = choose(name, spec, plan.format_of(name, spec))
    rules = []
    for stack, of in found.items():
        now = {n: text for n, text in of.items() if plan.format_of(n, specs[n]) != text}
        if len(now) == len(of) > 1 and len(set(now.values())) == 1:
            rules.append(("layers.*." + stack.split(".", 1)[1], next(iter(now.values()))))
        else:
            rules += now.items()
    return dataclasses.replace(plan, weight_rules=(*rules, *plan.weight_rules)) if rules else plan


def _in_parts(text: str, devices: int) -> str:
    """The format with its order of columns in parts that so many devices split; as it is where it has no order, or where its
    parts are split by them already; with the order whole where no number of parts is."""
    order = _order(text)
    if devices <= 1 or not order or (order is not True and order % devices == 0):
        return text
    parts = (n for n in formats.find(text).module.OPTIONS["act_order"] if n > 1 and n % devices == 0)
    return _with_order(text, next(parts, True))


def _order(text: str) -> bool | int:
    """False, True for one that is whole, or its parts."""
    return dict(formats.find(text).options).get("act_order", False)


def _with_order(text: str, order: bool | int) -> str:
    fmt = formats.find(text)
    return str(dataclasses.replace(fmt, options=tuple((n, order if n == "act_order" else v) for n, v in fmt.options)))


def _devices_of_inputs(spec: Spec, rules: Rules, mesh: AnyMesh) -> int:
    """Over how many devices a matrix's inputs are split, where what it is contracted with is split alike."""
    if spec.out is None or spec.out >= len(spec.axes):
        return 1
    axis = spec.axes[spec.out]
    split = rules.spec(spec.axes)[spec.out]
    if (of_x := f"act_{axis}") in rules.names() and rules.spec((of_x,))[0] != split:
        return 1  # a part of the matrix alone, which is brought together before it is used
    return math.prod(mesh.shape[a] for a in ((split,) if isinstance(split, str) else split or ()))
