"""Keys and values as they are, in the plan's dtype."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array


def encode(x: Array) -> dict[str, Array]:
    """x itself."""
    return {"raw": x}


def decode(stored: dict[str, Array], dtype: Any) -> Array:
    """x itself."""
    return stored["raw"].astype(dtype)


def coded(stored: dict[str, Array]) -> tuple[Array, Array | None]:
    """x itself, which has no scales."""
    return stored["raw"], None
