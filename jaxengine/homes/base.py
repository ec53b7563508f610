"""Where a bank of layers lives, and how one layer is brought to the device.

A file in this folder is one home and has
    MEMORY    the memory kind that its weights are placed in (None: the device's own, once they are there)
    TIER      where their bytes are: device, host or disk; from the latter two they are brought layer by layer, in every pass
    FORM      the form it takes unless the plan says otherwise
    FORMS     the forms it can take
    REST      the home of its banks: its own name, or another's where it is made of several (split)
    RESIDENT  the least number of first layers that stand on the device beside it (None: none do)
    KEPT      the home that the layers after those may be kept in (None: none are)
    fetch(weights) -> the same weights on the device; called inside the compiled program, once a layer (of REST)
    stream(bank)   -> the weights of each layer on the device, in turn; called outside of it, once a pass (form 'python')

Forms, and what XLA:GPU makes of them:
    unrolled  each layer's weights are arrays of their own and the loop over layers is written out in the program. For
              resident layers: a scan copies each layer's slice before using it.
    scan      each weight is one stack [repeats, ...] and the loop is one `lax.scan`, which fetches a layer and uses it:
              one layer on the device (two where unlike layers alternate). A streamed layer that no other is like stands
              alone, as in 'unrolled', and waits for the one before it: otherwise XLA hoists every fetch.
    python    each layer's weights are arrays of their own and each layer is a program of its own, called from Python: for
              weights that a program cannot reach (a file's). Two layers on the device. No gradient goes through it.
    ahead     as scan, and each layer is fetched while the one before it is computed: two layers on the device, and all
              of a layer's matmuls beside the copy. For passes whose compute is not small beside the copy; on the way back
              each layer is fetched again, as in a scan. XLA copies a layer that a turn hands to the next once more on the
              device, but where two turns are written out as one (engine.DOUBLED).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import jax

from jaxengine import technique

HOMES = "jaxengine.homes"


def home(name: str) -> ModuleType:
    """The home of this name; ValueError names the ones there are."""
    return technique.find(HOMES, name)


# openxla/xla#46231: below it, a slice of a host stack at any index but the loop's own (every backward pass) is read at the
# wrong place, without an error
LEAST_JAX = (0, 11, 1)


LISTED = ("unrolled", "python")  # forms in which each layer stands alone; the others have stacks


def check_platform(name: str, platform: str, version: tuple[int, ...] = jax.__version_info__) -> None:
    """Refuse a home that this version of jax would get wrong on this platform."""
    if platform == "gpu" and home(name).MEMORY is not None and version < LEAST_JAX:
        raise ValueError(
            f"home={name!r} on a GPU needs jax {'.'.join(map(str, LEAST_JAX))} or newer, and this is"
            f" {'.'.join(map(str, version))}: older ones read some layers of a stack in host memory from the wrong place,"
            f" without an error (openxla/xla#46231). Update jax (Python 3.12 or newer), or use home='device'"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """A run of layers of one home: `kinds` in a row, `repeats` times.

    weights: unrolled and python, a tuple with one {name: weight} for each layer, in order; scan, a tuple with one {name: stacked
    weight [repeats, ...]} for each kind; ahead, a tuple with one {'one': {name: weight}, 'rest': {name: stacked weight
    [repeats - 1, ...]}} for each kind, where the one is the first layer of the first kind and the last of the others.
    source: where the layers are read from in every pass, if `weights` has none of them (home disk).
    """

    weights: tuple[dict[str, Any], ...]
    kinds: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})
    repeats: int = dataclasses.field(metadata={"static": True})
    home: str = dataclasses.field(metadata={"static": True})
    form: str = dataclasses.field(metadata={"static": True})
    source: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def stacked(self) -> bool:
        """Whether states are stacks, one for each kind, or one for each layer."""
        return self.form not in LISTED

    @property
    def outside(self) -> bool:
        """Whether its layers are brought from outside of compiled programs."""
        return self.form == "python"


def place_in(form: str, repeats: int, kind: int, turn: int) -> tuple[str, int | None]:
    """Where the layer of this kind (its number in the period) and turn stands in a bank's weights: ('', None) alone,
    ('', i) in a stack, and under form 'ahead' ('one', None) or ('rest', i)."""
    if form in LISTED:
        return "", None
    if form == "scan":
        return "", turn
    if turn == (0 if kind == 0 else repeats - 1):
        return "one", None
    return "rest", turn - 1 if kind == 0 else turn


@dataclasses.dataclass(frozen=True)
class Part:
    """A bank before it has weights: `kinds` in a row, `repeats` times, from layer `start` on."""

    kinds: tuple[Hashable, ...]
    repeats: int
    start: int
    home: str
    form: str

    @property
    def num_layers(self) -> int:
        return len(self.kinds) * self.repeats

    @property
    def stacked(self) -> bool:
        """Whether its weights are stacks."""
        return self.form not in LISTED
