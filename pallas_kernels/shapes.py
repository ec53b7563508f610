"""Matrices of real models: what tests compile, benchmarks time and tuning tunes.

A row is a matrix [N, K] as it stands in a decoder layer: N outputs, K inputs. q, k and v, and gate and up, are separate
products. From the models' config.json.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Matrix:
    """model: as it is known; part: which of its layer's products share the shape."""

    model: str
    part: str
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.model} {self.part} {self.N}x{self.K}"


MATRICES = (
    Matrix("Llama 3.1 8B", "q, o", 4096, 4096),
    Matrix("Llama 3.1 8B", "k, v", 1024, 4096),
    Matrix("Llama 3.1 8B", "gate, up", 14336, 4096),
    Matrix("Llama 3.1 8B", "down", 4096, 14336),
    Matrix("Llama 3.1 70B", "q, o", 8192, 8192),
    Matrix("Llama 3.1 70B", "k, v", 1024, 8192),
    Matrix("Llama 3.1 70B", "gate, up", 28672, 8192),
    Matrix("Llama 3.1 70B", "down", 8192, 28672),
    Matrix("Qwen3 4B", "q", 4096, 2560),
    Matrix("Qwen3 4B", "down", 2560, 9728),
    Matrix("Gemma 3 27B", "gate, up", 21504, 5376),
    Matrix("Gemma 3 27B", "down", 5376, 21504),
    Matrix("Llama 2 7B", "down", 4096, 11008),
)

ROWS = (1, 16, 64)  # one sequence, a small batch, and the most that a prompt's tail or a large batch brings
