"""compressed-tensors, which llm-compressor and vLLM write: integers of 2 to 8 bits, fp8 and MXFP4.

config_groups say which modules ("Linear", a name, or 're:' and a regular expression) have which scheme, `ignore` which
have none. A module's tensors, by its group's format:

    pack-quantized        weight_packed int32 [O, I bits / 32], codes plus 2^(bits - 1), the first in the lowest bits;
                          weight_scale [O, I / G] or [O, 1]; weight_shape [2]; weight_zero_point int32
                          [O bits / 32, I / G], packed along the outputs; weight_g_idx int32 [I] under actorder "group"
    int-quantized         weight int8 [O, I]; weight_scale; weight_zero_point int8, shaped as the scale
    float-quantized       weight float8 [O, I]; weight_scale [1], [O, 1] or [O / 128, I / 128]
    naive-quantized       either of the two before
    mxfp4-pack-quantized  weight_packed uint8 [O, I / 2], the first in the low bits; weight_scale uint8 [O, I / 32]

Schemes of inputs, outputs and the KV cache are passed over: activations keep the plan's dtype here, which is nearer to
what was quantised.

checkpoints/compressed.py writes pack-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import (
    WEIGHT,
    Matrix,
    Stored,
    Tensors,
    column_order,
    group_count,
    module_of,
    one_of,
    setting,
    tensor,
    unpack,
)
from checkpoints.safetensors import TensorInfo

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")
FLOATS = ("float16", "bfloat16", "float32")
PARTS = ("packed", "scale", "zero_point", "shape", "g_idx")
PASSED_OVER = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")
KINDS = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


class CompressedTensors:
    """quant_method 'compressed-tensors'."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        for name, harmless in (("sparsity_config", ("dense", None)), ("transform_config", (None,))):
            found = config.get(name) or {}
            if found and (found.get("format") not in harmless or name == "transform_config"):
                raise CheckpointError(
                    f"quantization_config: {name} is {found!r}; only weights as they are, dense and not rotated, are read"
                )
        self._groups = list(setting(config, "config_groups", Mapping).values())
        self._ignore: list[str] = setting(config, "ignore", list, [])
        if not self._groups:
            raise CheckpointError("quantization_config: config_groups is empty, so nothing says how weights are packed")
        for group in self._groups:
            if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
                raise CheckpointError(f"quantization_config: config_groups holds {group!r}; it needs targets, a list")
            if group.get("weights"):
                self._check(group)

    def _check(self, group: Mapping[str, Any]) -> None:
        config, weights = self._config, group["weights"]
        nearest = "Compress anew with 'pack-quantized' (int4, int8) or 'float-quantized' (fp8)"
        layout = one_of(config, "format", self._format(group), FORMATS, nearest)
        bits, kind = setting(weights, "num_bits", int, 8), setting(weights, "type", str, "int")
        if layout == "mxfp4-pack-quantized":
            one_of(config, "num_bits", bits, (4,), nearest)
        elif kind == "float":
            one_of(config, "num_bits", bits, (8,), nearest)
            one_of(config, "strategy", self._strategy(weights), ("tensor", "channel", "block"), nearest)
        else:
            one_of(config, "num_bits", bits, tuple(KINDS), nearest)
            one_of(config, "strategy", self._strategy(weights), ("tensor", "channel", "group"), nearest)
        if bits == 8 and kind == "int" and not setting(weights, "symmetric", bool, True):
            raise CheckpointError(
                "quantization_config: weights are of 8 bits and symmetric is false; 8-bit codes are read symmetric:"
                " compress anew with symmetric=true, or in 4 bits"
            )

    def _format(self, group: Mapping[str, Any]) -> str | None:
        return group.get("format") or self._config.get("format")

    @staticmethod
    def _strategy(weights: Mapping[str, Any]) -> str:
        size = weights.get("group_size")
        inferred = "tensor" if size is None else "channel" if size == -1 else "group"
        return weights.get("strategy") or inferred

    def owner(self, name: str, info: TensorInfo) -> str | None:
        module, _, last = name.rpartition(".")
        if last in PASSED_OVER or (last.startswith("weight_") and last.removeprefix("weight_") in PARTS):
            return module + WEIGHT
        return name if last == "weight" and info.dtype in (np.int8, E4M3) else None

    def excepted(self, module: str) -> str | None:
        found = next((entry for entry in self._ignore if _matches(module, entry)), None)
        return None if found is None else f"ignore {found!r}"

    def _scheme(self, module: str) -> Mapping[str, Any]:
        """Of the group whose targets name the module most closely: by name, by a pattern, as a Linear."""
        found = []
        for group in self._groups:
            for target in group["targets"]:
                rank = 2 if target == module else 1 if target.startswith("re:") else 0
                if _matches(module, target) or target == "Linear":
                    found.append((rank, group))
        if not found or not (group := max(found, key=lambda f: f[0])[1]).get("weights"):
            raise CheckpointError(
                f"{module} is packed, and no group of quantization_config's config_groups is for the weights of it"
            )
        return group

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        module = module_of(name)
        group = self._scheme(module)
        weights, layout = group["weights"], self._format(group)
        bits, strategy = setting(weights, "num_bits", int, 8), self._strategy(weights)
        if layout == "mxfp4-pack-quantized":
            return _mxfp4(tensors, name, outputs, inputs)
        size = setting(weights, "group_size", int) if strategy == "group" else 0
        G = group_count(module, inputs, size)
        of = f"a matrix of {outputs} outputs and {inputs} inputs in {bits} bits by {strategy}"
        if strategy == "group":
            of += f" of {size}"
        found = {"scale": f"{name}_scale"}
        if setting(weights, "type", str, "int") == "float":
            tensor(tensors, name, "an fp8 matrix", [(outputs, inputs)], of, [E4M3])
            block = None
            if strategy == "block":
                block = _pair(weights.get("block_structure"))
                shapes = [(-(-outputs // block[0]), -(-inputs // block[1]))]
            else:
                shapes = [(), (1,), (1, 1)] if strategy == "tensor" else [(outputs, 1), (outputs,)]
            tensor(tensors, f"{name}_scale", "an fp8 scale", shapes, of, FLOATS)
            return Stored(
                name, {"weight": name, **found}, "fp8", outputs, inputs, block=block, per_tensor=strategy == "tensor",
                codes=E4M3.name,
            )  # fmt: skip
        affine = not setting(weights, "symmetric", bool, True)
        shapes = {"group": [(outputs, G)], "channel": [(outputs, 1), (outputs,)], "tensor": [(), (1,), (1, 1)]}[
            strategy
        ]
        scale = tensor(tensors, f"{name}_scale", "a scale", shapes, of, FLOATS)
        if layout == "pack-quantized":
            words = -(-inputs * bits // 32)
            found["packed"] = tensor(
                tensors, f"{name}_packed", "a packed matrix", [(outputs, words)], of, [np.int32]
            ).name
            shape = tensor(tensors, f"{name}_shape", "a packed matrix", [(2,)], of, [np.int32, np.int64]).name
            if (said := tensors.read(shape).tolist()) != [outputs, inputs]:
                raise CheckpointError(f"{shape} says {said}; the model of config.json needs {[outputs, inputs]}")
        else:
            found["weight"] = tensor(tensors, name, "a matrix of int8", [(outputs, inputs)], of, [np.int8]).name
        if affine:
            zero = f"{name}_zero_point"
            if layout == "pack-quantized" and strategy != "tensor":
                tensor(tensors, zero, "a packed zero point", [(-(-outputs * bits // 32), G)], of, [np.int32])
            else:
                tensor(tensors, zero, "a zero point", shapes, of, [np.int8, np.int32])
            found["zero"] = zero
        if (g_idx := f"{name}_g_idx") in tensors and G > 1:
            found["g_idx"] = tensor(tensors, g_idx, "a group index", [(inputs,)], of, [np.int32]).name
        return Stored(
            name, found, KINDS[bits], outputs, inputs, group=size, affine=affine, scale=scale.dtype.name,
            per_tensor=strategy == "tensor", order="g_idx" in found,
        )  # fmt: skip

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        if stored.kind == "mxfp4":
            return Matrix(
                unpack(tensors.read(stored.tensors["packed"], rows=rows), 4, stored.inputs),
                tensors.read(stored.tensors["scale"], rows=rows).view(np.uint8),
            )
        if stored.kind == "fp8":
            codes = tensors.read(stored.tensors["weight"], rows=rows)
            return Matrix(codes, _fp8_scale(tensors.read(stored.tensors["scale"]), stored, rows))
        bits, count = int(stored.kind[3:]), rows.stop - rows.start
        middle = 1 << (bits - 1)
        if "packed" in stored.tensors:
            codes = unpack(tensors.read(stored.tensors["packed"], rows=rows), bits, stored.inputs)
        else:
            codes = tensors.read(stored.tensors["weight"], rows=rows).view(np.uint8) + np.uint8(middle)

        def along(array: np.ndarray) -> np.ndarray:
            if stored.per_tensor:
                return np.full((count, 1), array.reshape(()), array.dtype)
            return array.reshape(stored.outputs, -1)[rows]

        scale, zero = along(tensors.read(stored.tensors["scale"])), None
        if stored.affine:
            held = tensors.read(stored.tensors["zero"])
            if "packed" in stored.tensors and not stored.per_tensor:
                zero = np.ascontiguousarray(unpack(held.T, bits, stored.outputs)[:, rows].T)
            else:
                zero = along((held + middle).astype(np.uint8))
        perm = column_order(tensors, stored)
        if perm is not None:
            codes = codes[:, perm]
        if bits == 8:
            codes = (codes ^ np.uint8(128)).view(np.int8)
        return Matrix(codes, scale, zero, perm)


def _matches(module: str, entry: str) -> bool:
    return re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module


def _pair(found: Any) -> tuple[int, int]:
    if isinstance(found, str) and re.fullmatch(r"\d+x\d+", found):
        found = [int(n) for n in found.split("x")]
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise CheckpointError(f"quantization_config: block_structure is {found!r}; it is two sizes, e.g. [128, 128]")
    return found[0], found[1]


def _mxfp4(tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
    of = f"a matrix of {outputs} outputs and {inputs} inputs in MXFP4"
    G = group_count(module_of(name), inputs, 32, "MXFP4's group of")
    tensor(tensors, f"{name}_packed", "an MXFP4 matrix", [(outputs, inputs // 2)], of, [np.uint8])
    tensor(tensors, f"{name}_scale", "an MXFP4 scale", [(outputs, G)], of, [np.uint8, ml_dtypes.float8_e8m0fnu])
    return Stored(
        name, {"packed": f"{name}_packed", "scale": f"{name}_scale"}, "mxfp4", outputs, inputs, group=32, scale="uint8"
    )


def _fp8_scale(scale: np.ndarray, stored: Stored, rows: slice) -> np.ndarray:
    """float32 [rows], or the blocks' that the rows are in."""
    scale = scale.astype(np.float32)
    if stored.per_tensor:
        return np.full(rows.stop - rows.start, scale.reshape(()), np.float32)
    if stored.block is None:
        return scale.reshape(-1)[rows]
    return scale[rows.start // stored.block[0] : -(-rows.stop // stored.block[0])]
