"""LoRA: a frozen matrix and a product of two thin ones beside it (Hu et al., arXiv:2106.09685).

    y = W x + s B (A x)          A [r, in], B [out, r], s = alpha / r

W may be in any format and live anywhere: it is contracted as it is, and no gradient is taken of it. B is zero at first, A
is drawn from U(-1/sqrt(in), 1/sqrt(in)) (as peft draws it). rsLoRA: s = alpha / sqrt(r), which keeps the size of the
update as r grows (Kalajdzievski, arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.architecture import Architecture, Spec
from jaxengine.finetune.trained import base
from jaxengine.finetune.trained._lowrank import LowRank, each, fresh, product
from jaxengine.finetune.trained._lowrank import leaf_axes as leaf_axes
from jaxengine.plan import Plan
from jaxengine.weights.base import Weight, contract, take

Options = LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora(Weight):
    """W + s B A without holding it. base: [out..., in...], an array or a Weight; a [r, in...]; b [out..., r]."""

    base: Any
    a: Float[Array, "R ..."]
    b: Float[Array, "... R"]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def beneath(self) -> Any:
        return self.base

    def dense(self) -> Array:
        held = self.base.dense() if isinstance(self.base, Weight) else self.base.astype(jnp.float32)
        return held + self.scale * jnp.tensordot(self.b.astype(jnp.float32), self.a.astype(jnp.float32), 1)

    def error_bound(self) -> Array:
        return self.base.error_bound() if isinstance(self.base, Weight) else jnp.zeros((1,) * len(self.shape))

    def contract(self, spec: str, x: Array) -> Array:
        return contract(spec, x, self.base) + product(spec, x, self.a, self.b, self.scale)

    def take(self, ids: Array, dtype: Any) -> Array:
        rows = jnp.take(self.b, ids, axis=0).astype(jnp.float32)
        return take(self.base, ids, dtype) + (self.scale * jnp.tensordot(rows, self.a, 1)).astype(dtype)


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of the matrices that have one beside them."""
    return base.targets(architecture, options.targets)


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """A drawn, B zero, for every target; the same key gives the same A in every home. float32."""
    del params

    def one(i: int, name: str, spec: Spec, number: int) -> dict[str, Array]:
        del i, name
        return fresh(options.rank, spec, jax.random.fold_in(key, number))

    return each(architecture, plan, options.targets, one)


FROZEN: tuple[str, ...] = ()


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The model's parameters with A and B beside their matrices."""

    def join(w: Any, leaf: dict[str, Array]) -> Lora:
        return Lora(jax.lax.stop_gradient(w), leaf["a"], leaf["b"], options.scale)

    banks = tuple(base.beside(b, e, join) for b, e in zip(params["banks"], trained["banks"], strict=True))
    return params | {"banks": banks}
