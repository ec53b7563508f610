"""AWQ (Lin et al., arXiv:2306.00978) as AutoAWQ writes it, version "gemm".

    qweight  int32 [I, O / 8]      codes along the outputs: nibble j of a word is output ORDER[j] of its eight
    qzeros   int32 [I / G, O / 8]  zero points, in the same way
    scales   float [I / G, O]

The order within a word suits one kernel, which takes two halves of it apart at a time; here it is undone.
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
    one_of,
    setting,
    tensor,
    unpack,
)
from checkpoints.safetensors import TensorInfo

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = (".qweight", ".scales", ".qzeros")


class AWQ:
    """quant_method 'awq'."""

    def __init__(self, config: Mapping[str, Any]):
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        nearest = "AutoAWQ's version='gemm' is what most checkpoints have"
        one_of(config, "version", version, ("gemm",), nearest)
        one_of(config, "bits", setting(config, "bits", int), (4,), nearest)
        self._group = setting(config, "group_size", int)
        if self._group == 0 or self._group < -1:
            raise CheckpointError(
                f"quantization_config: group_size is {self._group}; it is -1 (one group) or at least 1"
            )
        self._plain: list[str] = setting(config, "modules_to_not_convert", list, [])

    def owner(self, name: str, info: TensorInfo) -> str | None:
        del info
        part = next((p for p in PARTS if name.endswith(p)), None)
        return None if part is None else name.removesuffix(part) + WEIGHT

    def excepted(self, module: str) -> str | None:
        found = left_plain(module, self._plain)
        return None if found is None else f"modules_to_not_convert {found!r}"

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        module = module_of(name)
        G = group_count(module, inputs, self._group)
        if outputs % 8:
            raise CheckpointError(f"{module} has {outputs} outputs; AWQ packs them by eight")
        of = f"a matrix of {outputs} outputs and {inputs} inputs in 4 bits with group_size {self._group}"
        gptq = "quant_method 'gptq'"
        tensor(
            tensors, f"{module}.qweight", "an AWQ matrix", [(inputs, outputs // 8)], of, [np.int32],
            like=lambda shape: gptq if shape == (inputs // 8, outputs) else None,
        )  # fmt: skip
        tensor(tensors, f"{module}.qzeros", "an AWQ zero point", [(G, outputs // 8)], of, [np.int32])
        floats = ("float16", "bfloat16", "float32")
        scales = tensor(tensors, f"{module}.scales", "an AWQ scale", [(G, outputs)], of, floats)
        return Stored(
            name, {p[1:]: module + p for p in PARTS}, "int4", outputs, inputs, group=max(self._group, 0), affine=True,
            scale=scales.dtype.name,
        )  # fmt: skip

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        def outputs_of(name: str) -> np.ndarray:
            nibbles = unpack(tensors.read(stored.tensors[name]), 4, stored.outputs)
            eights = nibbles.reshape(len(nibbles), -1, 8)[:, :, np.argsort(ORDER)]
            return np.ascontiguousarray(eights.reshape(len(nibbles), -1)[:, rows].T)

        scale = np.ascontiguousarray(tensors.read(stored.tensors["scales"])[:, rows].T)
        return Matrix(outputs_of("qweight"), scale, outputs_of("qzeros"))
