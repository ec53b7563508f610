"""Adafactor: the second moment of a matrix from its rows' and columns' means (Shazeer & Stern, arXiv:1804.04235).

Next to no state for matrices. Updates are clipped by their root mean square (1, the paper's) and there is no momentum; the
learning rate is the schedule's own, not scaled by the parameter. Both are of one layer's matrix or vector, in a stack of
layers too: a stack changes as its layers would alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1
ROWS = 0
TOGETHER = False
DIVIDES = False


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """None: a change is made as it is used."""
    del shape, matrix
    return 0


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """A row and a column of state for each matrix whose two longest dims have at least 128 elements, else one moment."""
    return how.finish(_each(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), matrices), decayed)


def _each(scale: Any, clip: Any, matrices: Any) -> optax.GradientTransformation:
    """optax's two, of each layer's part of a stack."""

    def leaves(tree: Any) -> tuple[list[Any], list[int], Any]:
        found, structure = jax.tree.flatten(tree)
        if matrices is None:
            return found, [0] * len(found), structure
        kinds = structure.flatten_up_to(matrices(tree))
        return found, [0 if kind is None else kind.stacked for kind in kinds], structure

    def over(f: Callable[..., Any], stacked: int) -> Callable[..., Any]:
        return f if not stacked else jax.vmap(over(f, stacked - 1))

    def joined(count: Any, structure: Any, made: list[Any]) -> optax.FactoredState:
        return optax.FactoredState(count, *(jax.tree.unflatten(structure, [m[i] for m in made]) for i in range(3)))

    def init(params: Any) -> optax.FactoredState:
        found, stacks, structure = leaves(params)
        made = [over(lambda x: tuple(scale.init(x))[1:], k)(x) for x, k in zip(found, stacks, strict=True)]
        return joined(jnp.zeros((), jnp.int32), structure, made)

    def update(updates: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, optax.FactoredState]:
        found, stacks, structure = leaves(updates)
        held = (structure.flatten_up_to(t) for t in (state.v_row, state.v_col, state.v, params))

        def one(g: Any, row: Any, column: Any, whole: Any, x: Any) -> Any:
            change, new = scale.update(g, optax.FactoredState(state.count, row, column, whole), x)
            return clip.update(change, optax.EmptyState())[0], *tuple(new)[1:]

        made = [over(one, k)(*x) for k, *x in zip(stacks, found, *held, strict=True)]
        changes = jax.tree.unflatten(structure, [m[0] for m in made])
        return changes, joined(optax.safe_increment(state.count), structure, [m[1:] for m in made])

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
