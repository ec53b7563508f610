"""AdamW (Kingma & Ba, arXiv:1412.6980; Loshchilov & Hutter, arXiv:1711.05101): two float32 moments for each parameter."""

from __future__ import annotations

from typing import Any

import optax

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1
ROWS = 1
TOGETHER = False
DIVIDES = True


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """None: a change is made as it is used."""
    del shape, matrix
    return 0


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """8 bytes of state for each parameter."""
    del matrices
    return how.finish(optax.scale_by_adam(how.b1, how.b2, how.eps), decayed)
