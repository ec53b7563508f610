"""Muon (Jordan, kellerjordan.github.io/posts/muon): a matrix changes along its momentum with all singular values made one.

    M <- b1 M + (1 - b1) G,   dW = -lr 0.2 sqrt(max(in, out)) orthogonal(b1 M / (1 - b1^(n+1)) + (1 - b1) G / (1 - b1^n))

so that rare directions are learned as fast as common ones. One moment for each matrix, half of Adam's state. The orthogonal
factor is made by five turns of a polynomial of odd degree, X <- a X + b (X X^T) X + c (X X^T)^2 X, which drives every
singular value into about [0.7, 1.2] and needs matrix products alone. 0.2 sqrt(max(in, out)) gives a change the size that
AdamW's has, so that its learning rates and decay serve (Liu et al., arXiv:2502.16982). b1 is 0.95 in both.

It is for matrices inside layers, and for A and B beside them; embedding, head, norms and biases change by AdamW with the same
b1 and b2. A parameter [out..., in...] counts as one matrix: all heads of q together.

optax.contrib.muon makes the factors of all layers of a stack at a time, and nothing orders those of several parameters: what
they are made of would stand beside a model that hardly fits. Here so many are made together as `AT_ONCE` says, and one
parameter's after another's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1
ROWS = 1
TOGETHER = False
DIVIDES = True
TURNS, POLYNOMIAL = 5, (3.4445, -4.7750, 2.0315)
AT_ONCE = 2**25  # elements of matrices whose factors are made together, at least one matrix
SIZE = 0.2  # the root mean square of AdamW's changes, as measured by Liu et al.


class Momenta(NamedTuple):
    """count: steps made. first: of every parameter; second: of those that are no matrices, None of the others."""

    count: Int[Array, ""]
    first: Any
    second: Any


def orthogonal(x: Float[Array, "R C"], eps: float) -> Float[Array, "R C"]:
    """Close to U V^T, where x = U S V^T."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T, eps).T
    x = x / (jnp.linalg.norm(x) + eps)
    a, b, c = POLYNOMIAL
    for _ in range(TURNS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def _each_of(stack: Float[Array, "n R C"], eps: float) -> Float[Array, "n R C"]:
    """The same of each, in its place, as many together as AT_ONCE says: of a bank's whole stack the intermediate ones would
    stand too."""
    at_once = _together(*stack.shape)

    def some(i: Array, stack: Array) -> Array:
        taken = lax.dynamic_slice_in_dim(stack, i * at_once, at_once)
        return lax.dynamic_update_slice_in_dim(stack, jax.vmap(lambda x: orthogonal(x, eps))(taken), i * at_once, 0)

    if at_once == len(stack):
        return jax.vmap(lambda x: orthogonal(x, eps))(stack)
    return lax.fori_loop(0, len(stack) // at_once, some, stack)


def _together(count: int, rows: int, columns: int) -> int:
    """How many of so many matrices: a divisor."""
    most = max(1, AT_ONCE // (rows * columns))
    return max(n for n in range(1, min(count, most) + 1) if count % n == 0)


def scale_by_muon(b1: float, b2: float, eps: float, matrices: Any = None) -> optax.GradientTransformation:
    """matrices: see optimizers/base.py."""

    def of_leaves(tree: Any) -> list[Matrix | None]:
        leaves, structure = jax.tree.flatten(tree)
        if matrices is None:
            return [Matrix() if x.ndim == 2 else None for x in leaves]
        return [m if m is not None and m.out else None for m in structure.flatten_up_to(matrices(tree))]

    def init(params: Any) -> Momenta:
        leaves, tree = jax.tree.flatten(params)
        second = [jnp.zeros_like(x) if m is None else None for x, m in zip(leaves, of_leaves(params), strict=True)]
        first = jax.tree.map(jnp.zeros_like, params)
        return Momenta(jnp.zeros((), jnp.int32), first, jax.tree.unflatten(tree, second))

    def update(updates: Any, state: Momenta, params: Any = None) -> tuple[Any, Momenta]:
        del params
        gradients, tree = jax.tree.flatten(updates)
        count = state.count + 1
        n = count.astype(jnp.float32)
        held, made, before = (tree.flatten_up_to(t) for t in state[1:]), [], None
        for g, how, m, v in zip(gradients, of_leaves(updates), *held, strict=True):
            if how is not None and before is not None:  # one after another, or what goes into all factors stands first
                g, m, before = lax.optimization_barrier((g, m, before))
            m = b1 * m + (1 - b1) * g
            if how is None:
                v = b2 * v + (1 - b2) * g * g
                made.append((m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps), m, v))
                continue
            outs, ins = g.shape[how.stacked : how.stacked + how.out], g.shape[how.stacked + how.out :]
            rows, columns = math.prod(outs), math.prod(ins)
            ahead = b1 * m / (1 - b1 ** (n + 1)) + (1 - b1) * g / (1 - b1**n)  # Nesterov's, as Adam's (Dozat, 2016)
            ahead = ahead.reshape(-1, rows, columns)
            before = change = _each_of(ahead, eps).reshape(g.shape)
            made.append((SIZE * math.sqrt(max(rows, columns)) * change, m, None))
        change, *trees = (
            (jax.tree.unflatten(tree, column) for column in zip(*made, strict=True)) if made else (updates, *state[1:])
        )
        return change, Momenta(count, *trees)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """Bytes that stand while such a parameter is changed: what its factors are made of, in whose place they come; and of those
    that are made together their own and the products."""
    if matrix is None:
        return 0
    each, count = math.prod(shape[matrix.stacked :]), math.prod(shape[: matrix.stacked])
    return 4 * each * (count + 4 * _together(count, 1, each))


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """4 bytes of state for each element of a matrix, 8 for the others."""
    return how.finish(scale_by_muon(how.b1, how.b2, how.eps, matrices), decayed)
