"""LISA: what is outside the layers, and a few layers drawn anew every so many steps (Pan et al., arXiv:2403.17919).

LoRA changes embedding and head far more than the layers between them. LISA does as much with full matrices: embedding,
final norm and head are trained in every step, and of the L layers `layers`, drawn uniformly without replacement for
`every` steps each. Moments of what is outside go on from draw to draw; those of layers begin from zero at every draw, a
layer's that is drawn twice in a row too (as in the paper's code).

**Rounding.** What is outside is held in float32. A layer is float32 while it is trained, and after every step it is
rounded to the plan's dtype, to the nearest, in the bank that the model runs with; what a draw had not added up beyond half
a digit of that is lost at its end (of bfloat16 1/512 of a weight). The paper trains in bfloat16 or in mixed precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxengine.architecture import Architecture
from jaxengine.finetune.data import permutation
from jaxengine.finetune.trained._sampled import DRAWS, Turn, check, combine_all, make_all, matrices_of
from jaxengine.plan import Plan


@dataclasses.dataclass(frozen=True)
class Options:
    """layers: trained at a time (gamma; the paper has 2 and 4); every: steps between draws (K)."""

    layers: int = 2
    every: int = 20

    def __post_init__(self) -> None:
        check("lisa", self.layers, self.every)


FROZEN: tuple[str, ...] = ()
KEPT = False


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of all matrices."""
    del options
    return matrices_of(architecture)


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """The parameters themselves, what is outside the layers in float32."""
    del key
    return make_all("lisa", options.layers, architecture, plan, params, wide=tuple(architecture.outer()[1]))


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The trained parameters in the banks' places."""
    del options
    return combine_all(params, trained)


def outer(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Groups of names outside the layers that are trained."""
    return (tuple(architecture.outer()[1]),)


def turn(options: Options, architecture: Architecture, seed: int, step: int) -> Turn:
    """The layers of a step, and all that is outside."""
    number = step // options.every
    drawn = permutation(architecture.num_layers, seed, DRAWS + number)[: options.layers]
    (everything,) = outer(architecture)
    return Turn(number, tuple(sorted(map(int, drawn))), options.layers, everything, step)
