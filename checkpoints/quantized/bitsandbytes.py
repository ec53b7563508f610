"""bitsandbytes: 4-bit NF4 (QLoRA, Dettmers et al., arXiv:2305.14314) and 8-bit (LLM.int8(), arXiv:2208.07339).

NF4, the matrix taken row after row as one run of numbers, in blocks of 64:

    weight             uint8 [O I / 2, 1]   two codes a byte, the first in the HIGH four bits (or the same bytes under
                                            another dtype: quant_storage)
    weight.absmax      float32 [O I / 64], or uint8 where it is quantised once more, and then
    weight.nested_absmax float32 [O I / 64 / 256], weight.nested_quant_map float32 [256]:
                       absmax = nested_quant_map[code] nested_absmax + nested_offset
    weight.quant_map   float32 [16]         the table of the codes
    weight.quant_state.bitsandbytes__nf4    uint8: JSON, with shape, blocksize, nested_blocksize and nested_offset

The second level is undone, in float32 and in its own order of operations, so that the scales are the same bits as
bitsandbytes computes; the codes stay. That costs 0.25 bits a weight more in memory than on disk.

8 bits: weight int8 [O, I] and SCB float32 [O], the largest magnitude of each row; w = code SCB / 127. The outlier columns
of that method are of activations and are not stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import WEIGHT, Matrix, Stored, Tensors, left_plain, module_of, one_of, setting, tensor
from checkpoints.safetensors import TensorInfo

STATE = "quant_state.bitsandbytes__"
# QLoRA's appendix E: quantiles of the normal distribution, with a code for zero
NF4 = np.array(
    """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0""".split(),
    np.float32,
)


class BitsAndBytes:
    """quant_method 'bitsandbytes'."""

    def __init__(self, config: Mapping[str, Any]):
        self._eight = bool(setting(config, "load_in_8bit", bool, False))
        if not self._eight:
            kind = config.get("bnb_4bit_quant_type") or "fp4"
            one_of(config, "bnb_4bit_quant_type", kind, ("nf4",), "Quantise anew with bnb_4bit_quant_type='nf4'")
        self._plain: list[str] = setting(config, "llm_int8_skip_modules", list, [])

    def owner(self, name: str, info: TensorInfo) -> str | None:
        if self._eight:
            for part in (".SCB", ".weight_format"):
                if name.endswith(part):
                    return name.removesuffix(part) + WEIGHT
            return name if name.endswith(WEIGHT) and info.dtype == np.int8 else None
        module, found, _ = name.partition(WEIGHT + ".")
        if found:
            return module + WEIGHT
        packed = name.endswith(WEIGHT) and (info.dtype == np.uint8 or (len(info.shape) == 2 and info.shape[1] == 1))
        return name if packed else None

    def excepted(self, module: str) -> str | None:
        found = left_plain(module, self._plain)
        return None if found is None else f"llm_int8_skip_modules {found!r}"

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        return (self._eight_bits if self._eight else self._four_bits)(tensors, name, outputs, inputs)

    def _eight_bits(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        of = f"a matrix of {outputs} outputs and {inputs} inputs in 8 bits"
        tensor(tensors, name, "an 8-bit matrix", [(outputs, inputs)], of, [np.int8])
        scale = module_of(name) + ".SCB"
        tensor(tensors, scale, "an 8-bit matrix's scale", [(outputs,)], of, [np.float32])
        layout = module_of(name) + ".weight_format"
        if layout in tensors and (found := int(tensors.read(layout).reshape(-1)[0])) != 0:
            raise CheckpointError(f"{layout} is {found}; 0, rows as they are, is what is read")
        return Stored(name, {"weight": name, "scale": scale}, "int8", outputs, inputs)

    def _four_bits(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        states = (
            [n for n in tensors.names if n.startswith(f"{name}.{STATE}")] if f"{name}.{STATE}nf4" not in tensors else []
        )
        if states:
            raise CheckpointError(f"{states[0]}: its codes are not NF4. Quantise anew with bnb_4bit_quant_type='nf4'")
        of = f"a matrix of {outputs} outputs and {inputs} inputs in NF4"
        if f"{name}.{STATE}nf4" not in tensors:
            raise CheckpointError(
                f"{name}.{STATE}nf4 is not in {tensors.source}: {of} needs it. Download the checkpoint again"
            )
        raw = tensors.read(f"{name}.{STATE}nf4").tobytes()
        try:
            state = json.loads(raw)
        except ValueError as error:
            raise CheckpointError(f"{name}.{STATE}nf4 is not JSON: {error}") from None
        if list(state.get("shape") or ()) != [outputs, inputs]:
            raise CheckpointError(
                f"{name} is packed from {state.get('shape')}; the model of config.json needs {[outputs, inputs]}"
            )
        size, block = outputs * inputs, state.get("blocksize")
        if not isinstance(block, int) or block < 1 or size % 2:
            raise CheckpointError(f"{name}.{STATE}nf4 has blocksize {block!r} for {size} numbers; 64 is usual")
        info = tensors.info(name)
        if info.nbytes * 2 != size or len(info.shape) != 2 or info.shape[1] != 1:
            raise CheckpointError(
                f"{name} is {info.dtype}{list(info.shape)}; {of} needs {size // 2} bytes in one column: it does not belong"
                f" to the model of config.json"
            )
        blocks = -(-size // block)
        absmax = tensor(
            tensors, f"{name}.absmax", "an NF4 scale", [(blocks,)], of,
            [np.uint8] if "nested_offset" in state else [np.float32],
        )  # fmt: skip
        tensor(tensors, f"{name}.quant_map", "an NF4 table", [(16,)], of, [np.float32])
        if not np.array_equal(tensors.read(f"{name}.quant_map"), NF4):
            raise CheckpointError(f"{name}.quant_map is another table than NF4's; only that one is read")
        found = {"weight": name, "absmax": absmax.name}
        if "nested_offset" in state:
            nested = state.get("nested_blocksize")
            if not isinstance(nested, int) or nested < 1:
                raise CheckpointError(f"{name}.{STATE}nf4 has nested_blocksize {nested!r}; 256 is usual")
            tensor(tensors, f"{name}.nested_absmax", "an NF4 scale", [(-(-blocks // nested),)], of, [np.float32])
            tensor(tensors, f"{name}.nested_quant_map", "an NF4 table", [(256,)], of, [np.float32])
            found |= {n: f"{name}.{n}" for n in ("nested_absmax", "nested_quant_map")}
        # blocks run over the ends of rows: the longest run that crosses neither
        group = math.gcd(inputs, block)
        return Stored(name, found, "nf4", outputs, inputs, group=group, detail=state)

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        I, count = stored.inputs, rows.stop - rows.start  # noqa: E741
        if stored.kind == "int8":
            scale = tensors.read(stored.tensors["scale"])[rows] / np.float32(127)
            return Matrix(tensors.read(stored.tensors["weight"], rows=rows), scale)
        name, state = stored.tensors["weight"], stored.detail
        item = tensors.info(name).dtype.itemsize
        first, last = rows.start * I // 2, -(-rows.stop * I // 2)
        raw = tensors.read(name, rows=slice(first // item, -(-last // item))).reshape(-1).view(np.uint8)
        codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)
        skip = rows.start * I - first // item * item * 2
        codes = codes[skip : skip + count * I].reshape(count, I)
        absmax = tensors.read(stored.tensors["absmax"])
        if "nested_absmax" in stored.tensors:
            table = tensors.read(stored.tensors["nested_quant_map"])
            outer = np.repeat(tensors.read(stored.tensors["nested_absmax"]), state["nested_blocksize"])[: len(absmax)]
            absmax = table[absmax] * outer + np.float32(state["nested_offset"])
        start = np.arange(rows.start * I, rows.stop * I, stored.group)  # the first number that each scale is for
        return Matrix(codes, absmax[start // state["blocksize"]].reshape(count, -1))
