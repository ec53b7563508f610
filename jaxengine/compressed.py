"""A model's integer weights written as they are: a Hugging Face folder in compressed-tensors' form (pack-quantized), which
transformers and vLLM open, and which is read back with the same codes (quantized.py).

A linear layer's matrix whose format is integers (`Weight.integers`) is packed; one that is dense stays plain; another format
is refused, since the form has no place for it. Embeddings are no linear layers, and are written decoded. Tensors have the
names that the family's own class gives them, because quantization_config names modules of that class.

Zero points (affine=true) are packed, as compressed-tensors packs them and vLLM reads them; transformers 5 with compressed-tensors
0.20 refuses such folders, its own too: it makes room for unpacked ones (PackedQuantizationCompressor.compress on the meta
device). Symmetric formats it opens.

O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import compressed
from checkpoints.errors import CheckpointError
from checkpoints.quantized import Matrix
from checkpoints.safetensors import plan_shards, write_file, write_index
from jaxengine import formats
from jaxengine.architecture import Architecture, Spec
from jaxengine.export import MAX_SHARD_BYTES, DtypeOf, Get, Track, dense, named_dtype, write_beside
from jaxengine.plan import Plan
from jaxengine.sources import Origin
from jaxengine.weights.base import Integers, Weight

WEIGHT = ".weight"


def write(
    folder: Path,
    arch: Architecture,
    plan: Plan,
    get: Get,
    dtype_of: DtypeOf,
    origin: Origin,
    *,
    max_shard_bytes: int | None = None,
    track: Track | None = None,
) -> None:
    """Safetensors and config.json of a model whose parameters `get` gives in the plan's formats.

    Raises, before anything is written, CheckpointError for a linear layer that the form does not hold; and where it only shows
    in the numbers (a zero point that is not whole), then.
    """
    params, table, specs = arch.params(), arch.name_table(), arch.specs()
    theirs = table.theirs(params, arch.num_layers)
    parts: dict[str, tuple[str, ...]] = {name: table.parts(name, params) for name in theirs}
    schemes, ignored, owner = {}, [], {}
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, shape in theirs.items():
        found = {plan.format_of(n, specs[n]) for n in parts[name]}
        linear = specs[parts[name][0]].out is not None and not _is_embedding(parts[name][0])
        if found == {"dense"} or not linear:
            tensors[name] = (dtype_of(parts[name][0]), shape)
            ignored += [name.removesuffix(WEIGHT)] if linear else []
            continue
        bits, group, matrix = _abstract(name, parts[name], found, specs, plan, table.transposed(name, params))
        made = compressed.layout(name, matrix, bits, group)
        tensors |= made
        owner |= dict.fromkeys(made, name)
        schemes[name.removesuffix(WEIGHT)] = compressed.scheme(matrix, bits, group)
    if not schemes:
        raise CheckpointError(
            f"compressed-tensors: no linear layer of this plan is in an integer format (weights={plan.weights!r}); int8, int4,"
            f" int3 and int2 are, and plain weights are saved as 'hf'"
        )
    # where it is tied, the class has a layer of its own all the same
    head = [] if "lm_head" in schemes else ["lm_head"]
    config = compressed.quantization_config(schemes, ignore=list(dict.fromkeys([*ignored, *head])))
    total, done = sum(math.prod(shape) * d.itemsize for d, shape in tensors.values()), 0
    held: dict[str, np.ndarray] = {}  # the small tensors of matrices whose codes have been asked for

    def tensor(name: str) -> np.ndarray:
        nonlocal done
        if name not in owner:
            made = table.assemble(name, lambda ours: dense(get(ours), tensors[name][0]), params)
        elif name in held:
            made = held.pop(name)
        else:
            whole = owner[name]
            one = [_matrix(n, get(n), specs[n]) for n in parts[whole]]
            bits, group, _ = one[0]
            found = compressed.tensors(whole, compressed.join([m for *_, m in one]), bits, group)
            made = found.pop(name)
            held.update((n, a) for n, a in found.items() if not n.endswith("_packed"))
        done += made.nbytes
        if track is not None:
            track(name, done, total)
        return made

    shards = plan_shards(tensors, MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    for file, names in shards.items():
        write_file(folder / file, {n: tensors[n] for n in names}, tensor, {"format": "pt"})
    if len(shards) > 1:
        write_index(folder, shards, tensors)
    packed = dataclasses.replace(origin, config=origin.config | {"quantization_config": config})
    write_beside(folder, packed, named_dtype(arch, dtype_of, origin))


def _is_embedding(name: str) -> bool:
    return name == "embedding" or name.endswith("positions")


def _abstract(
    name: str, parts: Sequence[str], found: set[str], specs: dict[str, Spec], plan: Plan, transposed: bool
) -> tuple[int, int, Matrix]:
    """(bits, group, the matrix's shapes and dtypes) of what is packed in `name`'s place; CheckpointError where nothing can be."""
    said = ", ".join(sorted(found))
    if transposed:
        raise CheckpointError(
            f"compressed-tensors: {name} is stored [in, out], by a layer that is not torch's Linear, and is {said} here; save"
            f" it as 'hf', decoded, or as 'orbax'"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"compressed-tensors: {name} is one tensor of {', '.join(parts)}, which are {said}; give them the same weight rule"
        )
    fmt, bits, group = formats.find(said), 0, 0

    def arrays(w: Any, out: int) -> Any:
        nonlocal bits, group
        leaf = fmt.encode(w, out=out)
        integers = leaf.integers() if isinstance(leaf, Weight) else None
        if integers is None:
            raise CheckpointError(
                f"compressed-tensors: {name} is {said}, which is not integers with a scale a row or a group; int8, int4, int3"
                f" and int2 are. Save it as 'hf', decoded, or as 'orbax'"
            )
        inputs, bits, group = math.prod(w.shape[out:]), integers.bits, integers.group
        if bits not in compressed.BITS:
            known = ", ".join(map(str, compressed.BITS))
            raise CheckpointError(
                f"compressed-tensors: {name} is {said}, codes of {bits} bits; the form has {known}. Give it a format of those, or"
                f" save it as 'orbax' (as it is) or 'hf' (decoded)"
            )
        if integers.scale.shape[-1] > 1 and integers.group and inputs % integers.group:
            raise CheckpointError(
                f"compressed-tensors: {name} has {inputs} inputs, which its groups of {integers.group} do not divide;"
                f" group_size={math.gcd(inputs, integers.group)} would, if {said} has it, and int8 has one scale a row"
            )
        return integers.codes, integers.scale, integers.zero, integers.perm

    outputs, first = 0, None
    for part in parts:
        spec = specs[part]
        assert spec.out is not None
        w = jax.ShapeDtypeStruct(spec.shape, jnp.dtype(plan.dtype))
        first = jax.eval_shape(functools.partial(arrays, out=spec.out), w)
        outputs += math.prod(spec.shape[: spec.out])
    assert first is not None
    codes, scale, zero, perm = first
    row: Any = lambda a: jax.ShapeDtypeStruct((outputs, *a.shape[codes.ndim - 1 :]), a.dtype)  # noqa: E731
    return bits, group, Matrix(row(codes), row(scale), None if zero is None else row(zero), perm)


def _matrix(name: str, leaf: Any, spec: Spec) -> tuple[int, int, Matrix]:
    """(bits, group, the matrix in numpy) of a parameter."""
    assert spec.out is not None
    outputs = math.prod(spec.shape[: spec.out])
    found = jax.device_get(leaf).integers() if isinstance(leaf, Weight) else None
    if found is None:
        raise CheckpointError(f"compressed-tensors: {name} is {type(leaf).__name__}; the plan says that it is integers")
    integers: Integers = found
    flat = lambda a: np.asarray(a).reshape(outputs, *np.shape(a)[spec.out :])  # noqa: E731
    zero = None if integers.zero is None else flat(integers.zero)
    return integers.bits, integers.group, Matrix(flat(integers.codes), flat(integers.scale), zero, integers.perm)
