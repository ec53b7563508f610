"""Quantised Hugging Face checkpoints: config.json's quantization_config says how matrices are packed, and what packs them.

One file is one method (`base.Method`): how its tensors are called, which matrix they belong to, what they are shaped as
for a given matrix, and how they are taken apart. Nothing is dequantised here: codes come out as codes. Adding a method is a
file and a line in METHODS, whose keys are the quant_method that config.json names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.quantized.auto_round import auto_round
from checkpoints.quantized.awq import AWQ
from checkpoints.quantized.base import Matrix, Method, Stored, Tensors, column_order
from checkpoints.quantized.bitsandbytes import BitsAndBytes
from checkpoints.quantized.compressed_tensors import CompressedTensors
from checkpoints.quantized.fp8 import Fp8
from checkpoints.quantized.gptq import GPTQ
from checkpoints.quantized.mxfp4 import Mxfp4

__all__ = ["METHODS", "Matrix", "Method", "Stored", "Tensors", "column_order", "method"]

METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "auto-round": auto_round,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fp8,
    "fp8": Fp8,
    "gptq": GPTQ,
    "intel/auto-round": auto_round,
    "mxfp4": Mxfp4,
}

# fields of a quantization_config that one method alone has
FIELDS = {
    "checkpoint_format": "gptq", "desc_act": "gptq", "zero_point": "awq", "config_groups": "compressed-tensors",
    "weight_block_size": "fp8",
}  # fmt: skip


def method(config: Any) -> Method:
    """The method that a quantization_config names, made of it; CheckpointError for one that is not read."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config is {config!r}; it is an object with a quant_method")
    name = config.get("quant_method")
    if name is None and ("load_in_4bit" in config or "load_in_8bit" in config):
        name = "bitsandbytes"  # what older transformers wrote had no quant_method
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        if name is None:
            hint = " None is named: " + next(
                (f"{like!r} has {field}." for field, like in FIELDS.items() if field in config),
                "say which one packed it.",
            )
        raise CheckpointError(
            f"quantization_config: quant_method {name!r} is not read; read are {', '.join(METHODS)}.{hint} Take such a"
            f" checkpoint, or the unquantized one, which weights='int8' or 'int4' quantizes while it is read"
        )
    return METHODS[name]({**config, "quant_method": name})
