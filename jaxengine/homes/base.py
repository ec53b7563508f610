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


# openxla/xla#46231: below it, a slice of a host stack at any index but the loop's own (every backward pass) is read at the
# wrong place, without an error
LEAST_JAX = (0, 11, 1)


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

    weights: unrolled, a tuple with one {name: weight} for each layer, in order; scanned, a tuple with one {name: stacked
    weight [repeats, ...]} for each kind.
    """

    weights: tuple[dict[str, Any], ...]
    kinds: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})
    repeats: int = dataclasses.field(metadata={"static": True})
    home: str = dataclasses.field(metadata={"static": True})
    form: str = dataclasses.field(metadata={"static": True})
