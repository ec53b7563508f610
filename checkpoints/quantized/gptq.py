"""GPTQ (Frantar et al., arXiv:2210.17323) as AutoGPTQ, GPTQModel and optimum write it.

    qweight  int32 [I bits / 32, O]    codes along the inputs, the first in the lowest bits
    scales   float [I / G, O]
    qzeros   int32 [I / G, O bits / 32]   zero points along the outputs, in the same way
    g_idx    int32 [I]                 the group of each input, where desc_act quantised them in another order

checkpoint_format "gptq" holds zero points less one, "gptq_v2" as they are. One is added to whole words, carries and all,
as transformers' loader does: the writer subtracted it from whole words, so that what borrowed comes back. (3-bit fields
straddle words, and there the fields are counted up.)

Of symmetric codes (sym) the zero point is the middle one, and qzeros can but say so: less one, or as it is whatever
checkpoint_format says (GPTQModel 5 writes 8 beside "gptq": vllm-project/vllm#38966), or, of 3 bits, with the number that
GPTQModel took from the third word of three taken from the first and the other way round (until its pull request 2763).

act-order (desc_act) leaves the inputs of one group all over the row. They are sorted by group when they are read, once,
and the order is kept beside the codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
    pack,
    setting,
    tensor,
    unpack,
)
from checkpoints.safetensors import TensorInfo

KINDS = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
FLOATS = ("float16", "bfloat16", "float32")
PARTS = (".qweight", ".scales", ".qzeros", ".g_idx")


class GPTQ:
    """quant_method 'gptq'."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("is_marlin_format"):
            layout = "marlin"
        other = (
            "Marlin, BitBLAS, planar ('gptq_p') and the like are kernels' own layouts: take the checkpoint that they were made"
            " from"
        )
        self._minus_one = one_of(config, "checkpoint_format", layout, ("gptq", "gptq_v2"), other) == "gptq"
        self._of("")
        self._dynamic: Mapping[str, Any] = setting(config, "dynamic", Mapping, {})

    def _of(self, module: str) -> tuple[int, int, bool]:
        """(bits, group_size, sym) of a module: GPTQModel's `dynamic` may have its own, by the first pattern that fits."""
        config = self._config
        for pattern, given in (config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                config = {**config, **given}
                break
        bits, group = setting(config, "bits", int), setting(config, "group_size", int)
        one_of(config, "bits", bits, tuple(KINDS), "4 is what most checkpoints have")
        if group == 0 or group < -1:
            raise CheckpointError(f"quantization_config: group_size is {group}; it is -1 (one group) or at least 1")
        return bits, group, setting(config, "sym", bool, True)

    def _writer(self) -> tuple[int, ...] | None:
        """GPTQModel's version, where the config says that it wrote the checkpoint."""
        said = (self._config.get("meta") or {}).get("quantizer") or ()
        for one in [said] if isinstance(said, str) else said:
            if (found := re.match(r"gptqmodel:(\d+)\.(\d+)", str(one))) is not None:
                return int(found[1]), int(found[2])
        return None

    def owner(self, name: str, info: TensorInfo) -> str | None:
        del info
        part = next((p for p in PARTS if name.endswith(p)), None)
        return None if part is None else name.removesuffix(part) + WEIGHT

    def excepted(self, module: str) -> str | None:
        for pattern in self._dynamic:
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                return f"dynamic[{pattern!r}]" if pattern.startswith("-:") else None
        return None

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        module = module_of(name)
        bits, group, sym = self._of(module)
        of = f"a matrix of {outputs} outputs and {inputs} inputs in {bits} bits with group_size {group}"
        G = group_count(module, inputs, group)
        for what, size in (("inputs", inputs), ("outputs", outputs)):
            if size * bits % 32:
                raise CheckpointError(f"{module} has {size} {what}, and {bits}-bit codes of as many do not fill words")

        def other_bits(shape: tuple[int, ...]) -> str | None:
            if (name := f"{module}.scales") not in tensors or tensors.info(name).shape != (G, outputs):
                return None  # of other sizes altogether
            found = (f"bits {b}" for b in KINDS if shape == (inputs * b // 32, outputs))
            return next(found, "quant_method 'awq'" if shape == (inputs, outputs // 8) else None)

        def other_group(shape: tuple[int, ...]) -> str | None:
            fits = len(shape) == 2 and shape[1] == outputs and shape[0] and inputs % shape[0] == 0
            return f"group_size {inputs // shape[0] if shape[0] > 1 else -1}" if fits else None

        words = [(inputs * bits // 32, outputs)]
        tensor(tensors, f"{module}.qweight", "a GPTQ matrix", words, of, [np.int32], like=other_bits)
        scales = tensor(tensors, f"{module}.scales", "a GPTQ scale", [(G, outputs)], of, FLOATS, like=other_group)
        tensor(tensors, f"{module}.qzeros", "a GPTQ zero point", [(G, outputs * bits // 32)], of, [np.int32])
        found = {p[1:]: module + p for p in PARTS[:3]}
        if (g_idx := f"{module}.g_idx") in tensors:
            tensor(tensors, g_idx, "a GPTQ group index", [(inputs,)], of, [np.int32])
            if G > 1:
                found["g_idx"] = g_idx
        if bits == 8 and not sym:
            raise CheckpointError(
                f"{module} has 8-bit codes with zero points (sym is false), which no format here holds: with zero points codes"
                f" of 4, 3 and 2 bits are read, and 8-bit codes with sym: true. Quantise again with sym=true, or in 4 bits"
            )
        if bits == 3 and not sym and self._minus_one and (by := self._writer()) is not None and by < (6, 1):
            raise CheckpointError(
                f"{module} has 3-bit zero points of GPTQModel {'.'.join(map(str, by))}, which interchanged numbers of their words"
                f" where it took one from each (mended in 6.1): write the checkpoint again with GPTQModel 6.1, or quantise"
                f" again with sym=true"
            )
        return Stored(
            name, found, KINDS[bits], outputs, inputs, group=max(group, 0), affine=not sym, scale=scales.dtype.name,
            order="g_idx" in found,
        )  # fmt: skip

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        bits, middle = int(stored.kind[3:]), 1 << (int(stored.kind[3:]) - 1)
        words = tensors.read(stored.tensors["qweight"])[:, rows]
        codes = unpack(words.T, bits, stored.inputs)
        scale = np.ascontiguousarray(tensors.read(stored.tensors["scales"])[:, rows].T)
        packed = tensors.read(stored.tensors["qzeros"])
        zero = None
        if stored.affine:
            zero = np.ascontiguousarray(self._zero_points(packed, bits, stored.outputs)[:, rows].T)
        elif not any(np.array_equal(packed, np.broadcast_to(w, packed.shape)) for w in _middles(bits, stored.outputs)):
            found = np.unique(self._zero_points(packed, bits, stored.outputs))
            raise CheckpointError(
                f"{stored.tensors['qzeros']} has zero points other than {middle}, {found.min()} to {found.max()}, and"
                f" quantization_config says sym: true of {bits} bits; "
                + (
                    "8-bit codes are read symmetric: quantise again with sym=true, or in 4 bits"
                    if bits == 8
                    else "if they were made with zero points, say sym: false there, and else download it again"
                )
            )
        perm = column_order(tensors, stored)
        if perm is not None:
            codes = codes[:, perm]
        if bits == 8:
            codes = (codes ^ np.uint8(128)).view(np.int8)
        return Matrix(codes, scale, zero, perm)

    def _zero_points(self, packed: np.ndarray, bits: int, outputs: int) -> np.ndarray:
        """uint8 [G, O]."""
        if self._minus_one and 32 % bits == 0:
            packed = (packed.view(np.uint32) + np.uint32(sum(1 << i for i in range(0, 32, bits)))).view(np.int32)
        zero = unpack(packed, bits, outputs)
        return (zero + np.uint8(1)) & np.uint8((1 << bits) - 1) if self._minus_one and 32 % bits else zero


def _middles(bits: int, outputs: int) -> list[np.ndarray]:
    """The words [O bits / 32] in which files have the middle code as each zero point."""
    half = 1 << (bits - 1)
    one, less, middle = (pack(np.full((1, outputs), q, np.uint8), bits)[0].view(np.uint32) for q in (1, half - 1, half))
    found = [middle, less]
    if bits == 3:  # from words: what a field borrowed of the next word is lost
        found += [middle - one, middle - one.reshape(-1, 3)[:, ::-1].reshape(-1)]
    return [words.view(np.int32) for words in found]
