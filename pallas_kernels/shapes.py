"""Matrices and attentions of real models: what tests compile, benchmarks time and tuning tunes.

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


@dataclasses.dataclass(frozen=True)
class Heads:
    """The attention of a model's layers: N query heads, K kv heads of H; what bends and hides scores in some or all of them."""

    model: str
    N: int
    K: int
    H: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.N}/{self.K}x{self.H}"


ATTENTIONS = (
    Heads("Llama 3.1 8B", 32, 8, 128),
    Heads("Llama 3.1 70B", 64, 8, 128),
    Heads("Qwen2.5 0.5B", 14, 2, 64),
    Heads("gpt-oss 20B", 64, 8, 64, window=128, sinks=True),
    Heads("OPT 2.7B", 32, 32, 80),
    Heads("Phi-3 mini", 32, 32, 96, window=2047),
    Heads("Gemma 2 9B", 16, 8, 256, window=4096, softcap=50.0),
    Heads("Gemma 3 27B", 32, 16, 128, window=1024),
)
