"""Read from disk in every pass: for the part of a model that fits neither the device nor host memory.

The plan's first `resident` layers stand on the device, the next `kept` ones in pinned host memory, and the rest in a store
on disk (jaxengine/packing.py), from which threads read ahead into a ring of buffers. A disk is some ten times slower than
the link to the device, so that tokens/s grow as 1 / (bytes read from it) and nothing else matters: what fits into memory
should be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxengine.homes.base import Bank

MEMORY = None
TIER = "disk"
FORM = "python"
FORMS = ("python",)
REST = "disk"
RESIDENT = 0
KEPT = "host"


def stream(bank: Bank) -> Iterator[dict[str, Any]]:
    """Each layer's weights, read and copied as they are asked for; the disk is some layers ahead of that."""
    return bank.source.stream()
