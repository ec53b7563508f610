"""Where a bank of layers lives, and how one layer is brought to the device.

A file in this folder is one home and has
    MEMORY  the memory kind that its weights are placed in (None: the device's own)
    FORM    the form it takes unless the plan says otherwise: 'unrolled' or 'scan'
    FORMS   the forms it can take
    fetch(weights) -> the same weights on the device; called inside the compiled program, once a layer

Forms. 'unrolled': each layer's weights are arrays of their own and the loop over layers is written out in the program.
'scan': each weight is one stacked array [repeats, ...] and the loop is one `lax.scan`. Resident layers want to be
unrolled (a scan copies each layer's slice before using it); from the host it is the other way round: an unrolled loop
hoists every fetch and then holds all layers, a scan fetches one at a time.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """A run of layers of one home: `kinds` in a row, `repeats` times.

    weights: unrolled, a tuple with one {name: weight} for each layer, in order; scanned, a tuple with one {name: stacked
    weight [repeats, ...]} for each kind.
    """

    weights: tuple[dict[str, Any], ...]
    kinds: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})
    repeats: int = dataclasses.field(metadata={"static": True})
    home: str = dataclasses.field(metadata={"static": True})
    form: str = dataclasses.field(metadata={"static": True})
