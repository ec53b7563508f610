"""Integer weights written in compressed-tensors' form (pack-quantized), which transformers and vLLM open.

The way back of quantized/compressed_tensors.py: codes, scales and zero points as they are, nothing is rounded. For a folder:

    parts = tensors(name, matrix, bits, group)  of every packed matrix, beside the plain tensors
    config["quantization_config"] = quantization_config({module: scheme(matrix, bits, group), ...}, ignore=[plain modules])

An order of columns (act-order) becomes weight_g_idx, with actorder "group": vLLM reads it, and compressed-tensors did until
it took that out in 0.20.

O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import WEIGHT, Matrix, pack

BITS = (2, 3, 4, 8)
FLOATS = ("bfloat16", "float16", "float32")


def join(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of the same inputs as one, row after row: q, k and v of a family that stores them together."""
    first = parts[0]
    for part in parts[1:]:
        alike = (part.zero is None) == (first.zero is None) and part.scale.shape[1:] == first.scale.shape[1:]
        order = (part.perm is None) == (first.perm is None) and (
            part.perm is None or first.perm is None or np.array_equal(part.perm, first.perm)
        )
        if not alike or not order or part.scale.dtype != first.scale.dtype:
            raise CheckpointError(
                "compressed-tensors: matrices that are stored as one tensor must have one format and one order of columns;"
                " give them the same weight rule"
            )
    zeros = [p.zero for p in parts if p.zero is not None]
    return Matrix(
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scale for p in parts]),
        np.concatenate(zeros) if zeros else None,
        first.perm,
    )


def scheme(matrix: Matrix, bits: int, group: int = 0) -> dict[str, Any]:
    """How a matrix is packed, as a group of quantization_config says it; CheckpointError for what the form cannot hold.

    group: inputs that share a scale; 0: as the number of scales says, which of a row whose last group is not whole it does not.
    """
    O, I = matrix.codes.shape  # noqa: E741
    if bits not in BITS:
        raise CheckpointError(f"compressed-tensors: codes of {bits} bits; written are {', '.join(map(str, BITS))}")
    channel = matrix.scale.ndim == 1 or matrix.scale.shape[1] == 1
    groups = 1 if channel else matrix.scale.shape[1]
    if not channel and group and (I % group or I // group != groups):
        raise CheckpointError(
            f"compressed-tensors: {groups} scales a row for {I} inputs in groups of {group}, which {-(-I // group)} groups would"
            f" hold{', the last of them not whole' if I % group else ''}: the form has whole groups, of a group_size that"
            f" divides {I}"
        )
    if matrix.scale.shape[0] != O or I % groups:
        raise CheckpointError(
            f"compressed-tensors: scales {list(matrix.scale.shape)} for [{O}, {I}] codes; {groups} groups must divide the"
            f" inputs, and a group_size that divides {I} would"
        )
    if matrix.scale.dtype.name not in FLOATS:
        raise CheckpointError(f"compressed-tensors: scales are {matrix.scale.dtype}; they are {', '.join(FLOATS)}")
    order = matrix.perm is not None and groups > 1
    return {
        "num_bits": bits, "type": "int", "symmetric": matrix.zero is None, "strategy": "channel" if channel else "group",
        "group_size": None if channel else I // groups, "dynamic": False, **({"actorder": "group"} if order else {}),
    }  # fmt: skip


def layout(name: str, matrix: Any, bits: int, group: int = 0) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{tensor name: (dtype, shape)} of what `tensors` makes, of arrays' shapes and dtypes alone."""
    said = scheme(matrix, bits, group)
    O, I = matrix.codes.shape  # noqa: E741
    groups, words = 1 if said["group_size"] is None else I // said["group_size"], lambda n: -(-n * bits // 32)
    found = {
        f"{name}_packed": (np.dtype(np.int32), (O, words(I))),
        f"{name}_scale": (np.dtype(matrix.scale.dtype), (O, groups)),
        f"{name}_shape": (np.dtype(np.int64), (2,)),
    }
    if matrix.zero is not None:
        found[f"{name}_zero_point"] = (np.dtype(np.int32), (words(O), groups))
    if "actorder" in said:
        found[f"{name}_g_idx"] = (np.dtype(np.int32), (I,))
    return found


def tensors(name: str, matrix: Matrix, bits: int, group: int = 0) -> dict[str, np.ndarray]:
    """{tensor name: array} of the matrix that `name` ('....q_proj.weight') stands for.

    matrix: codes uint8 [O, I], 0 .. 2^bits - 1, or int8; scale [O, G] or [O]; zero [O, G] of whole numbers; perm int32 [I].
    group: as `scheme` takes it.
    """
    said, middle = scheme(matrix, bits, group), 1 << (bits - 1)
    O, I = matrix.codes.shape  # noqa: E741
    codes = matrix.codes
    if codes.dtype == np.int8:
        codes = codes.view(np.uint8) + np.uint8(middle)  # modulo 256, which brings -128 .. 127 to 0 .. 255
    if codes.dtype != np.uint8 or (codes.size and codes.max() >= 2**bits):
        raise CheckpointError(
            f"{name}: codes are {codes.dtype} up to {codes.max()}; of {bits} bits they are 0 to {2**bits - 1}"
        )
    if matrix.perm is not None:
        codes = codes[:, np.argsort(matrix.perm)]
    found = {
        f"{name}_packed": pack(codes, bits),
        f"{name}_scale": matrix.scale.reshape(O, -1),
        f"{name}_shape": np.array([O, I], np.int64),
    }
    if matrix.zero is not None:
        zero = matrix.zero.astype(np.float32)
        whole = (zero == np.round(zero)) & (zero >= 0) & (zero < 2**bits)
        if not whole.all():
            raise CheckpointError(
                f"{name}: a zero point is {zero[~whole][0]}; compressed-tensors holds whole ones, 0 to {2**bits - 1}. Export"
                f" it as plain weights"
            )
        packed = pack(np.ascontiguousarray(zero.astype(np.uint8).reshape(O, -1).T), bits)
        found[f"{name}_zero_point"] = np.ascontiguousarray(packed.T)
    if "actorder" in said and matrix.perm is not None:
        g_idx = np.empty(I, np.int32)
        g_idx[matrix.perm] = np.arange(I, dtype=np.int32) // said["group_size"]
        found[f"{name}_g_idx"] = g_idx
    return found


def quantization_config(schemes: Mapping[str, Mapping[str, Any]], ignore: Iterable[str] = ()) -> dict[str, Any]:
    """config.json's quantization_config of packed modules {name: scheme}; ignore: the plain modules that are linear layers.

    One scheme is of all linear layers but those ignored; of several, each names its modules.
    """
    if not schemes:
        raise CheckpointError("compressed-tensors: no module is packed, so there is no quantization_config to write")
    if several := [n for n in schemes if n.endswith(WEIGHT)]:
        raise CheckpointError(f"compressed-tensors: {several[0]} is a tensor's name; a module's has no {WEIGHT!r}")
    kinds: dict[str, list[str]] = {}
    for module, said in schemes.items():
        kinds.setdefault(json.dumps(said), []).append(module)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else modules, "weights": json.loads(said), "input_activations": None,
            "output_activations": None, "format": "pack-quantized",
        }
        for i, (said, modules) in enumerate(kinds.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": list(ignore), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
