"""Streamed: the weights stand in pinned host memory and each layer is copied to the device just before it is used.

The copy is inside the compiled program: a scan over the stacked layers whose body starts with the copy. XLA:GPU makes a
DMA of it (the slice's offset is affine in the loop's own index) and holds one layer at a time. On the CPU backend the
memory kind is a type only, which is how the placement is tested there.
"""

from __future__ import annotations

from typing import Any

import jax

MEMORY = "pinned_host"
FORM = "scan"
FORMS = ("scan", "ahead")
REST = "host"
PARTIAL = False


def fetch(weights: Any) -> Any:
    """Copy one layer's weights to the device."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), weights)
