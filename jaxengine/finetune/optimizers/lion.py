"""Lion: the sign of a momentum (Chen et al., arXiv:2302.06675). Half of Adam's state; the learning rate is a third to a
tenth of Adam's, the decay as much larger."""

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
    """4 bytes of state for each parameter. b2 is 0.99 in the paper."""
    del matrices
    return how.finish(optax.scale_by_lion(how.b1, how.b2), decayed)
