"""A product of two thin matrices beside each chosen matrix: what LoRA and its relatives share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxengine.architecture import Architecture, Spec
from jaxengine.finetune.trained import base
from jaxengine.plan import Plan
from jaxengine.weights.base import einsum, split_spec


@dataclasses.dataclass(frozen=True)
class LowRank:
    """rank r, alpha (s = alpha / r), rs (s = alpha / sqrt r), and the matrices by pattern: 'q', 'layers.0.*'."""

    rank: int = 8
    alpha: float = 16.0
    rs: bool = False
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it is at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}; it is a number above 0, often twice the rank")
        if not self.targets:
            raise ValueError("targets is empty; name at least one matrix, such as 'q' or '*'")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


def product(spec: str, x: Array, a: Array, b: Array, scale: float) -> Array:
    """s B (A x), in x's dtype; spec: the matrix's own."""
    batch, ins, outs = split_spec(spec)
    r = next(c for c in "rqpmgz" if c not in batch + ins + outs)
    h = einsum(f"{batch}{ins},{r}{ins}->{batch}{r}", x, a.astype(x.dtype))
    return einsum(f"{batch}{r},{outs}{r}->{batch}{outs}", h, (scale * b).astype(x.dtype))


def shapes(rank: int, spec: Spec) -> dict[str, tuple[int, ...]]:
    """{'a': ..., 'b': ...} of one matrix."""
    assert spec.out is not None
    return {"a": (rank, *spec.shape[spec.out :]), "b": (*spec.shape[: spec.out], rank)}


def leaf_axes(spec: Spec) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of each."""
    return {"a": (None, *spec.axes[spec.out :]), "b": (*spec.axes[: spec.out], None)}


def fresh(rank: int, spec: Spec, key: Array) -> dict[str, Array]:
    """One matrix's A and B before any step: A from U(-1/sqrt(in), 1/sqrt(in)), B zero, float32."""
    of = shapes(rank, spec)
    bound = math.prod(of["a"][1:]) ** -0.5
    return {"a": jax.random.uniform(key, of["a"], jnp.float32, -bound, bound), "b": jnp.zeros(of["b"], jnp.float32)}


def each(
    architecture: Architecture, plan: Plan, patterns: tuple[str, ...], one: Callable[[int, str, Spec, int], Any]
) -> Any:
    """The trained tree with one(layer, name, spec, number) for each target; `number` is the same in every home.

    Raises ValueError where layers that stand in one stack have different targets.
    """
    chosen = set(base.targets(architecture, patterns))

    def names(i: int) -> list[str]:
        return [n for n in architecture.block(architecture.kinds[i])[1] if f"layers.{i}.{n}" in chosen]

    for part in plan.parts(architecture):
        for i in range(part.num_layers if part.stacked else 0):
            if names(part.start + i) != (first := names(part.start + i % len(part.kinds))):
                raise ValueError(
                    f"targets: layers that are scanned have the same ones, and layer {part.start + i} has"
                    f" {names(part.start + i) or 'none'} where layer {part.start + i % len(part.kinds)} has"
                    f" {first or 'none'}: name the same matrices in all layers, or use home='device'"
                )

    def layer(i: int) -> dict[str, Any]:
        specs = architecture.block(architecture.kinds[i])[1]
        return {n: one(i, n, specs[n], 1000 * i + list(specs).index(n)) for n in names(i)}

    return {"outer": {}, "banks": base.lay(plan.parts(architecture), layer)}
