"""MXFP4 (OCP Microscaling Formats v1.0) as gpt-oss packs a matrix, for models that are dense.

    <matrix>_blocks  uint8 [O, I / 32, 16]   two codes a byte, the first in the low bits
    <matrix>_scales  uint8 [O, I / 32]       exponents: 2^(scale - 127)

<matrix> is the plain tensor's name, with or without '.weight' at its end. gpt-oss's own tensors hold all of a layer's experts,
[E, O, I / 32, 16]; no family of ours has experts, and they are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import (
    WEIGHT,
    Matrix,
    Stored,
    Tensors,
    group_count,
    left_plain,
    module_of,
    setting,
    tensor,
    unpack,
)
from checkpoints.safetensors import TensorInfo

BLOCK = 32


class Mxfp4:
    """quant_method 'mxfp4'."""

    def __init__(self, config: Mapping[str, Any]):
        self._plain: list[str] = setting(config, "modules_to_not_convert", list, [])

    def owner(self, name: str, info: TensorInfo) -> str | None:
        for part in ("_blocks", "_scales"):
            if name.endswith(part):
                if part == "_blocks" and len(info.shape) == 4:
                    raise CheckpointError(
                        f"{name} is {list(info.shape)}, the matrices of {info.shape[0]} experts: no family that is read here has"
                        f" experts. One matrix is [outputs, inputs / {BLOCK}, {BLOCK // 2}]"
                    )
                stem = name.removesuffix(part)
                return stem if stem.endswith(WEIGHT) else stem + WEIGHT
        return None

    def excepted(self, module: str) -> str | None:
        found = left_plain(module, self._plain)
        return None if found is None else f"modules_to_not_convert {found!r}"

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        of = f"a matrix of {outputs} outputs and {inputs} inputs in MXFP4"
        G = group_count(module_of(name), inputs, BLOCK, "MXFP4's group of")
        stem = name if f"{name}_blocks" in tensors else module_of(name)
        tensor(tensors, f"{stem}_blocks", "an MXFP4 matrix", [(outputs, G, BLOCK // 2)], of, [np.uint8])
        tensor(tensors, f"{stem}_scales", "an MXFP4 scale", [(outputs, G)], of, [np.uint8])
        found = {"blocks": f"{stem}_blocks", "scales": f"{stem}_scales"}
        return Stored(name, found, "mxfp4", outputs, inputs, group=BLOCK, scale="uint8")

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        blocks = tensors.read(stored.tensors["blocks"], rows=rows)
        return Matrix(
            unpack(blocks.reshape(len(blocks), -1), 4, stored.inputs), tensors.read(stored.tensors["scales"], rows=rows)
        )
