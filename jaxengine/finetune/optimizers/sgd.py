"""Stochastic gradient descent, with momentum b1 (0: none, and no state)."""

from __future__ import annotations

from typing import Any

import optax

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1
ROWS = 1
TOGETHER = False
DIVIDES = False


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """None: a change is made as it is used."""
    del shape, matrix
    return 0


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """4 bytes of state for each parameter with momentum, none without."""
    del matrices
    return how.finish(optax.trace(how.b1) if how.b1 else optax.identity(), decayed)
