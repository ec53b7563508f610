"""MeZO (Malladi et al., arXiv:2305.17333): by two losses beside the parameters, without a gradient; see finetune/mezo.py.

eps is the size of the noise that the losses are taken at (the paper: 1e-3, of LoRA 1e-2), and the learning rate is small:
1e-6, of LoRA 5e-5.
"""

from __future__ import annotations

from typing import Any

import optax

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 0
ROWS = 0
TOGETHER = False
DIVIDES = False


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """None: a change is made as it is used."""
    del shape, matrix
    return 0


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """ValueError: it is given no gradient."""
    del how, decayed, matrices
    raise ValueError("optimizer is 'mezo', which is given no gradient: its steps are jaxengine.finetune.mezo.step's")
