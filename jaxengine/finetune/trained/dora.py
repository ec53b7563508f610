"""DoRA: the size and the direction of each output's row are trained apart (Liu et al., arXiv:2402.09353).

    y = m / |W + s B A|  (W x + s B (A x))          m [out], the norms over each row; at first m = |W|

The norm is taken without holding W + s B A: with n = |W|^2 of each row kept from the start,

    |W + s B A|^2 = n + 2 s sum_r B_r (W A_r) + s^2 B (A A^T) B^T

which contracts W, in whatever format it is, with A's few rows. As in the paper (section 4.3) no gradient goes through the
norm.
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
from jaxengine.finetune.trained._lowrank import leaf_axes as thin_axes
from jaxengine.plan import Plan
from jaxengine.weights.base import Weight, contract, take

Options = LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora(Weight):
    """m / |W + s B A| (W + s B A). base [out..., in...]; a [r, in...]; b [out..., r]; magnitude, square [out...]: m and n."""

    base: Any
    a: Float[Array, "R ..."]
    b: Float[Array, "... R"]
    magnitude: Float[Array, "..."]
    square: Float[Array, "..."]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def beneath(self) -> Any:
        return self.base

    def size(self) -> Float[Array, "..."]:
        """m / |W + s B A| of each output, float32."""
        a, b = jax.lax.stop_gradient((self.a.astype(jnp.float32), self.b.astype(jnp.float32)))
        outs, ins = "nhk"[: b.ndim - 1], "def"[: a.ndim - 1]
        crossed = contract(f"r{ins},{outs}{ins}->r{outs}", a, self.base)  # W A_r, [r, out...]
        within = jnp.einsum(f"r{ins},q{ins}->rq", a, a)
        square = (
            self.square
            + 2 * self.scale * jnp.einsum(f"{outs}r,r{outs}->{outs}", b, crossed)
            + self.scale**2 * jnp.einsum(f"{outs}r,rq,{outs}q->{outs}", b, within, b)
        )
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)))
        return self.magnitude.astype(jnp.float32) / norm

    def dense(self) -> Array:
        held = self.base.dense() if isinstance(self.base, Weight) else self.base.astype(jnp.float32)
        whole = held + self.scale * jnp.tensordot(self.b.astype(jnp.float32), self.a.astype(jnp.float32), 1)
        size = self.size()
        return size.reshape(size.shape + (1,) * (whole.ndim - size.ndim)) * whole

    def error_bound(self) -> Array:
        raise ValueError("A matrix with DoRA beside it has no bound of its own: its base has")

    def contract(self, spec: str, x: Array) -> Array:
        y = contract(spec, x, self.base) + product(spec, x, self.a, self.b, self.scale)
        size = self.size()
        size = size.reshape((1,) * (y.ndim - size.ndim) + size.shape)
        return (y.astype(jnp.float32) * size).astype(x.dtype)

    def take(self, ids: Array, dtype: Any) -> Array:
        rows = jnp.take(self.b, ids, axis=0).astype(jnp.float32)
        whole = take(self.base, ids, jnp.float32) + self.scale * jnp.tensordot(rows, self.a, 1)
        size = jnp.take(self.size(), ids, axis=0)
        return (size.reshape(size.shape + (1,) * (whole.ndim - size.ndim)) * whole).astype(dtype)


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of the matrices that have one beside them."""
    return base.targets(architecture, options.targets)


def leaf_axes(spec: Spec) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of each array of one matrix."""
    outs = spec.axes[: spec.out]
    return thin_axes(spec) | {"magnitude": outs, "square": outs}


FROZEN = ("square",)  # leaves that no optimizer sees


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """As LoRA's, and each row's norm from the matrix itself, one layer's at a time. float32."""
    from jaxengine.placement import stored

    held = stored(architecture, plan, params)

    @jax.jit
    def squares(w: Any) -> Array:
        w = jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), w)  # of layers in host memory
        dense = w.dense() if isinstance(w, Weight) else w.astype(jnp.float32)
        return jnp.square(dense)

    def one(i: int, name: str, spec: Spec, number: int) -> dict[str, Array]:
        assert spec.out is not None
        square = squares(held[f"layers.{i}.{name}"]()).sum(tuple(range(spec.out, len(spec.shape))))
        thin = fresh(options.rank, spec, jax.random.fold_in(key, number))
        return thin | {"magnitude": jnp.sqrt(square), "square": square}

    return each(architecture, plan, options.targets, one)


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The model's parameters with what is trained beside their matrices."""

    def join(w: Any, leaf: dict[str, Array]) -> Dora:
        square = jax.lax.stop_gradient(leaf["square"])
        return Dora(jax.lax.stop_gradient(w), leaf["a"], leaf["b"], leaf["magnitude"], square, options.scale)

    banks = tuple(base.beside(b, e, join) for b, e in zip(params["banks"], trained["banks"], strict=True))
    return params | {"banks": banks}
