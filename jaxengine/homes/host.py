"""Streamed: the weights stand in pinned host memory and each layer is copied to the device just before it is used.

The copy is inside the compiled program: a scan over the stacked layers whose body starts with the copy. XLA:GPU makes a
DMA of it (the slice's offset is affine in the loop's own index) and holds one layer at a time. Vectors, and what else
`Plan.stays`, stand on the device, so that what is copied is matrices: `fetch` leaves them where they are. On the CPU backend the
memory kind is a type only, which is how the placement is tested there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from jaxengine.homes.base import Bank

MEMORY = "pinned_host"
FORM = "scan"
FORMS = ("scan", "ahead", "python")
REST = "host"
TIER = "host"
RESIDENT = None
KEPT = None


def fetch(weights: Any) -> Any:
    """Copy one layer's weights to the device; 'fetch' in a profile."""
    with jax.named_scope("fetch"):
        return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), weights)


def stream(bank: Bank) -> Iterator[dict[str, Any]]:
    """Each layer's weights, copied as they are asked for."""
    for weights in bank.weights:
        yield jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind("device")), weights)
