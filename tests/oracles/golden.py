"""The golden files: tiny checkpoints with transformers' own numbers beside them (scripts/make_goldens.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(case: str) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """(the ragged prompts, everything in the file)."""
    with np.load(GOLDEN / case / "golden.npz") as file:
        data = dict(file)
    return [row[:n].tolist() for row, n in zip(data["ids"], data["lengths"], strict=True)], data
