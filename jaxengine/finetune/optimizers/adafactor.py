"""Adafactor: the second moment of a matrix from its rows' and columns' means (Shazeer & Stern, arXiv:1804.04235).

Next to no state for matrices. Updates are clipped by their root mean square (1, the paper's) and there is no momentum; the
learning rate is the schedule's own, not scaled by the parameter.
"""

from __future__ import annotations

from typing import Any

import optax

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """None: a change is made as it is used."""
    del shape, matrix
    return 0


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """A row and a column of state for each matrix whose two longest dims have at least 128 elements, else one moment."""
    del matrices
    scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return how.finish(scale, decayed)
