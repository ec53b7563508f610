"""fp8 checkpoints: a matrix in float8 beside scales that it is multiplied with.

DeepSeek-V3's way (arXiv:2412.19437, section 3.3; quant_method 'fp8' with weight_block_size), used by Qwen3 and others:

    weight            float8_e4m3fn [O, I]
    weight_scale_inv  float32 (or bfloat16, or e8m0 under scale_fmt 'ue8m0') [O / 128, I / 128]; multiplied with, whatever
                      its name says

Without weight_block_size one weight_scale or weight_scale_inv is for the whole matrix. FBGEMM's way ('fbgemm_fp8') has one
weight_scale [O, 1] for each row. Scales of activations are passed over: those keep the plan's dtype here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import WEIGHT, Matrix, Stored, Tensors, left_plain, tensor
from checkpoints.safetensors import TensorInfo

FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
PASSED_OVER = (".input_scale", ".activation_scale", ".input_scale_ub")


class Fp8:
    """quant_method 'fp8' and 'fbgemm_fp8'."""

    def __init__(self, config: Mapping[str, Any]):
        self._rows = config["quant_method"] == "fbgemm_fp8"
        block = config.get("weight_block_size")
        good = isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        if block is not None and not good:
            raise CheckpointError(
                f"quantization_config: weight_block_size is {block!r}; it is two sizes, e.g. [128, 128]"
            )
        self._block = None if block is None else (block[0], block[1])
        self._plain: list[str] = config.get("modules_to_not_convert") or config.get("ignored_layers") or []

    def owner(self, name: str, info: TensorInfo) -> str | None:
        for part in ("_scale_inv", "_scale"):
            if name.endswith(WEIGHT + part):
                return name.removesuffix(part)
        if any(name.endswith(part) for part in PASSED_OVER):
            return name.rpartition(".")[0] + WEIGHT
        return name if name.endswith(WEIGHT) and info.dtype in FP8 else None

    def excepted(self, module: str) -> str | None:
        found = left_plain(module, self._plain)
        return None if found is None else f"modules_to_not_convert {found!r}"

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        of = f"a matrix of {outputs} outputs and {inputs} inputs in fp8"
        if self._block is not None:
            of += f" in blocks of {list(self._block)}"
        weight = tensor(tensors, name, "an fp8 matrix", [(outputs, inputs)], of, FP8)
        scale = f"{name}_scale_inv" if f"{name}_scale_inv" in tensors or self._block else f"{name}_scale"
        if self._rows:
            shapes = [(outputs, 1), (outputs,)]
        elif self._block is None:
            shapes = [(), (1,), (1, 1)]
        else:
            shapes = [(-(-outputs // self._block[0]), -(-inputs // self._block[1]))]
        tensor(tensors, scale, "an fp8 scale", shapes, of, ("float32", "bfloat16", "float16", np.uint8, E8M0))
        return Stored(
            name, {"weight": name, "scale": scale}, "fp8", outputs, inputs, block=self._block,
            per_tensor=self._block is None and not self._rows, codes=weight.dtype.name,
        )  # fmt: skip

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        codes, scale = tensors.read(stored.tensors["weight"], rows=rows), tensors.read(stored.tensors["scale"])
        scale = (scale.view(E8M0) if scale.dtype == np.uint8 else scale).astype(np.float32)
        if stored.per_tensor:
            return Matrix(codes, np.full(len(codes), scale.reshape(()), np.float32))
        if stored.block is None:
            return Matrix(codes, scale.reshape(-1)[rows])
        return Matrix(codes, scale[rows.start // stored.block[0] : -(-rows.stop // stored.block[0])])
