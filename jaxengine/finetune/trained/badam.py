"""BAdam: one block of layers after another, each with some steps of Adam (Luo et al., arXiv:2404.02827).

Block coordinate descent. `layers` layers are a block; it is trained for `every` steps, whose Adam begins with moments of
zero and its own bias correction, and what they added up stays when the next block's turn comes. Embedding, final norm and
head stay as they are (as in the paper's code unless asked). A random order is drawn anew for each round through all
blocks, as the paper has it.

**Rounding.** As in the paper's code: a block is float32 while it is trained, and after every step it is rounded to the
plan's dtype, to the nearest, in the bank that the model runs with; the next turn of the block begins from there. What a
turn had not added up beyond half a digit is lost at its end (of bfloat16 1/512 of a weight): `every` should be long enough.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxengine.architecture import Architecture
from jaxengine.finetune.trained._sampled import Turn, blocks, check, combine_all, make_all, matrices_of, nth
from jaxengine.plan import Plan


@dataclasses.dataclass(frozen=True)
class Options:
    """layers: of a block (the paper: 1); every: steps of its turn (K; the paper: 100); order: of blocks, from the first
    layer up ('ascending'), down ('descending') or 'random'."""

    layers: int = 1
    every: int = 100
    order: str = "random"

    def __post_init__(self) -> None:
        check("badam", self.layers, self.every, self.order)


FROZEN: tuple[str, ...] = ()
KEPT = False


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of all matrices."""
    del options
    return matrices_of(architecture)


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """The parameters themselves, in the plan's dtype."""
    del key
    return make_all("badam", options.layers, architecture, plan, params)


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The trained parameters in the banks' places."""
    del options
    return combine_all(params, trained)


def outer(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Groups of names outside the layers that are trained: none."""
    del architecture
    return ()


def turn(options: Options, architecture: Architecture, seed: int, step: int) -> Turn:
    """The block of a step."""
    number, found = step // options.every, blocks(architecture, options.layers)
    block = found[nth(options.order, len(found), number, seed, anew=True)]
    return Turn(number, block, options.layers, (), step)
