"""HiFT: all parameters by turns, a group in each step, with an optimizer's state each (Liu et al., arXiv:2401.15207).

Groups are what is read before the layers (embedding, positions), `layers` layers at a time, and the rest (final norm and
head). Each step trains the next one, `order` saying from which end; a random order is drawn once. A group's moments and,
where the plan's dtype is narrower, its float32 values wait in pinned host memory until its next turn, so that on the device
stand those of one group. All groups of a sweep have one learning rate: that of the sweep's middle step by the schedule of
steps. (The paper's code lets its scheduler go on once a sweep, but by the length of all steps, so that a decay would not end.)

**Rounding.** No step is lost: the model runs with values that are rounded to the plan's dtype (the nearest), and a group is
trained in float32, as the paper's mixed precision has it. The price is host memory: 12 bytes a parameter with AdamW, or 8
where the plan's dtype is float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxengine.architecture import Architecture
from jaxengine.finetune.trained._sampled import Turn, blocks, check, combine_all, entering, make_all, matrices_of, nth
from jaxengine.plan import Plan


@dataclasses.dataclass(frozen=True)
class Options:
    """layers: of a group (m; the paper: 1); order: 'ascending' (its bottom2up), 'descending' (top2down) or 'random'."""

    layers: int = 1
    order: str = "ascending"

    def __post_init__(self) -> None:
        check("hift", self.layers, 1, self.order)


FROZEN: tuple[str, ...] = ()
KEPT = True


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of all matrices."""
    del options
    return matrices_of(architecture)


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """The parameters themselves, in the plan's dtype."""
    del key
    return make_all("hift", options.layers, architecture, plan, params)


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The trained parameters in the banks' places."""
    del options
    return combine_all(params, trained)


def outer(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Groups of names outside the layers: what is read before them, and the rest."""
    before = entering(architecture)
    after = tuple(n for n in architecture.outer()[1] if n not in before)
    return (before, after) if after else (before,)


def turn(options: Options, architecture: Architecture, seed: int, step: int) -> Turn:
    """The group of a step."""
    before, *after = outer(architecture)
    found = [((), before), *((block, ()) for block in blocks(architecture, options.layers)), *(((), n) for n in after)]
    layers, names = found[nth(options.order, len(found), step, seed, anew=False)]
    middle = step - step % len(found) + len(found) // 2
    return Turn(step, layers, options.layers if layers else 0, names, middle)
