"""What is trained: a part of the parameter tree, or something small beside it.

A file in this folder is one choice and has
    Options               a frozen dataclass of what a user may say of it (rank, targets, ...)
    make(options, architecture, plan, params, key) -> the trained tree, laid out as the banks are, float32
    combine(options, params, trained)              -> the parameters that the model runs with
    matrices(options, architecture)                -> names of the matrices that it acts on

The trained tree is {'outer': {name: leaf}, 'banks': (weights of a bank, ...)}, where a bank's weights hold only the names
that are trained and have the bank's own form (homes/base.py): what is scanned is stacked. Gradients, optimizer states and
checkpoints have the same tree. `layers` and `lay` go from one to the other: by name a layer, and by bank.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine import technique
from jaxengine.architecture import Architecture
from jaxengine.homes.base import Bank, Part, place_in

TRAINED = "jaxengine.finetune.trained"


def trained(name: str) -> ModuleType:
    """The choice of this name; ValueError names those there are."""
    return technique.find(TRAINED, name)


def targets(architecture: Architecture, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the matrices inside layers that the patterns match: 'q' or 'layers.3.q', with * and ? as in file names.

    Raises ValueError for a pattern that matches none, with the nearest names.
    """
    matrices = [n for n, s in architecture.specs().items() if s.out is not None and n.startswith("layers.")]
    found: dict[str, None] = {}
    for pattern in patterns:
        full = pattern if pattern.startswith("layers.") else f"layers.*.{pattern}"
        hit = fnmatch.filter(matrices, full)
        if not hit:
            kinds = sorted({re.sub(r"^layers\.\d+\.", "", n) for n in matrices})
            near = difflib.get_close_matches(pattern, kinds, n=1, cutoff=0.0)
            raise ValueError(
                f"targets: {pattern!r} matches no matrix of this {architecture.family} of {architecture.num_layers} layers;"
                f" a layer's are {', '.join(kinds)}. Nearest: {near[0]!r}"
            )
        found |= dict.fromkeys(hit)
    return tuple(n for n in matrices if n in found)


def lay(parts: Sequence[Part], of: Callable[[int], Mapping[str, Any]]) -> tuple[Any, ...]:
    """Banks' weights from each layer's {name: tree}: of(i) for layer i, stacked where its bank is.

    The layers of one stack must have the same names.
    """

    def bank(part: Part) -> Any:
        if not part.stacked:
            return tuple(dict(of(part.start + i)) for i in range(part.num_layers))
        made: list[Any] = []
        for j in range(len(part.kinds)):
            held: dict[str, list[Any]] = {}
            for turn in range(part.repeats):
                place, _ = place_in(part.form, part.repeats, j, turn)
                held.setdefault(place, []).append(dict(of(part.start + turn * len(part.kinds) + j)))
            stacked = {p: jax.tree.map(_stack, *rows) if p != "one" else rows[0] for p, rows in held.items()}
            made.append(stacked.get("", stacked))
        return tuple(made)

    return tuple(bank(part) for part in parts)


def _stack(*xs: Any) -> Any:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)


def layers(parts: Sequence[Part], banks: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """The inverse of `lay`: each layer's {name: tree}, slices of the stacks."""
    found: dict[int, dict[str, Any]] = {}
    for part, bank in zip(parts, banks, strict=True):
        for i in range(part.num_layers):
            turn, j = divmod(i, len(part.kinds))
            place, at = place_in(part.form, part.repeats, j, turn)
            held = bank[j if part.stacked else i]
            held = held[place] if place else held
            found[part.start + i] = held if at is None else jax.tree.map(lambda s, at=at: s[at], held)
    return dict(sorted(found.items()))


def beside(bank: Bank, extra: Any, join: Callable[[Any, Any], Any]) -> Bank:
    """The bank with join(weight, extra's leaf) in place of each weight that `extra` has one for."""

    def merged(weights: Any, extra: Any) -> Any:
        if isinstance(weights, tuple):
            return tuple(merged(w, e) for w, e in zip(weights, extra, strict=True))
        if weights.keys() == {"one", "rest"}:
            return {place: merged(weights[place], extra[place]) for place in weights}
        return {n: join(w, extra[n]) if n in extra else w for n, w in weights.items()}

    return dataclasses.replace(bank, weights=merged(bank.weights, extra))
