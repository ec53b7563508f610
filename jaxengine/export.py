"""Writing a model: a Hugging Face folder that transformers opens, plain or packed (compressed.py), or an orbax checkpoint.
One parameter at a time.

Both writers ask `get(name)` for one parameter of ours at a time and write into a folder that is not yet under its final
name (checkpoints.output). An export of what was imported unchanged is byte for byte what was read: each tensor in its own
dtype, in the same file, a tied head that was written out written out again. Where anything is changed, config.json says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.output import output_folder
from checkpoints.safetensors import plan_shards, write_file, write_index
from jaxengine import formats
from jaxengine.architecture import Architecture, Spec, architecture
from jaxengine.plan import DTYPES, Plan
from jaxengine.sources import (
    ORBAX,
    PLAN,
    Origin,
    Source,
    check_numbers,
    dtypes_of,
    open_source,
    read_config,
    stored_names,
    stored_tensors,
)
from jaxengine.weights.base import Weight

FORMATS = ("hf", "orbax", "compressed-tensors")
MAX_SHARD_BYTES = 5_000_000_000  # of a file, where the source was not split
BESIDE = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".md",
)  # tokenizer, templates, generation settings, the model's own notes
Get = Callable[[str], Any]
DtypeOf = Callable[[str], np.dtype]
Track = Callable[[str, int, int], None]


def dense(leaf: Any, dtype: np.dtype) -> np.ndarray:
    """A parameter as a numpy array in `dtype`; a Weight is decoded."""
    if isinstance(leaf, Weight):
        # a matrix in host memory and what is trained beside it may stand apart
        leaf = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), leaf).dense()
    return np.asarray(jax.device_get(leaf)).astype(dtype, copy=False)


def encoded(plan: Plan, name: str, spec: Spec, w: Any) -> Any:
    """A matrix in its plan's format and dtype; ValueError for numbers that the format does not hold."""
    assert spec.out is not None
    text = plan.format_of(name, spec)
    leaf = _encoder(text, spec.out, plan.dtype)(w)
    formats.find(text).check(name, leaf)
    return leaf


@functools.cache
def _encoder(text: str, out: int, dtype: str) -> Callable[[Any], Any]:
    return jax.jit(lambda w: formats.find(text).encode(w.astype(dtype), out=out))


def merged(plan: Plan, arch: Architecture, get: Get) -> Get:
    """`get`, where a matrix with an adapter beside it becomes one matrix, in the format that its plan says (W + s B A, rounded
    anew to that; float32 where it is dense)."""
    specs = arch.specs()

    def one(name: str) -> Any:
        leaf = get(name)
        if not isinstance(leaf, Weight) or leaf.beneath is None:
            return leaf
        w, spec = dense(leaf, np.dtype("float32")), specs[name]
        return w if plan.format_of(name, spec) == "dense" else encoded(plan, name, spec, w)

    return one


def in_formats(source: Source, chosen: Plan | None, dtype: str, read: Get) -> tuple[Plan, Get]:
    """The plan of what is written of this source, and its parameters in the plan's formats.

    chosen: the formats of a plain source (None: as it is), encoded in `dtype`, as `load` would; read: its parameters, or those
    that something was merged into. Raises ValueError for a source in formats already where others are chosen, and for a format
    that does not hold the source's numbers.
    """
    own, specs = source.plan, source.architecture.specs()
    if own is not None:
        if chosen is not None and chosen.weights != own.weights:
            raise ValueError(
                f"convert: the source's weights are {own.weights!r} already, and weights={chosen.weights!r}: leave weights out,"
                f" or start from the checkpoint that it was made from"
            )
        return own, read
    plan = dataclasses.replace(chosen or Plan(), dtype=dtype)
    check_numbers(source, plan)

    def get(name: str) -> Any:
        array, spec = read(name), specs[name]
        plain = spec.out is None or plan.format_of(name, spec) == "dense"
        return array if plain else encoded(plan, name, spec, array)

    return plan, get


def write_hf(
    folder: Path,
    arch: Architecture,
    get: Get,
    dtype_of: DtypeOf,
    origin: Origin,
    *,
    max_shard_bytes: int | None = None,
    track: Track | None = None,
) -> None:
    """Safetensors under Hugging Face's names, with config.json and whatever text files stood beside it.

    max_shard_bytes: of a file; None splits as the source was split, and by MAX_SHARD_BYTES where it was not.
    """
    params, table = arch.params(), arch.name_table()
    theirs = table.theirs(params, arch.num_layers, origin.metadata.get("prefix"))
    tensors = {name: (dtype_of(table.parts(name, params)[0]), shape) for name, shape in theirs.items()}
    tensors |= {copy: tensors[name] for copy, name in origin.copies.items()}
    # without what was passed over in the source's files, such as the rope frequencies of old checkpoints
    split = {name: origin.weight_map[name] for name in tensors if name in origin.weight_map}
    if max_shard_bytes is None:
        shards = plan_shards(tensors, MAX_SHARD_BYTES, split)
    else:
        shards = plan_shards(tensors, max_shard_bytes)
    total = sum(int(np.prod(shape)) * d.itemsize for d, shape in tensors.values())
    done = 0

    def tensor(name: str) -> np.ndarray:
        nonlocal done
        whole = origin.copies.get(name, name)
        made = table.assemble(whole, lambda ours: dense(get(ours), tensors[name][0]), params)
        done += made.nbytes
        if track is not None:
            track(name, done, total)
        return made

    for file, names in shards.items():
        metadata = origin.metadata.get("files", {}).get(file, {"format": "pt"})
        write_file(folder / file, {n: tensors[n] for n in names}, tensor, metadata)
    if len(shards) > 1:
        write_index(folder, shards, tensors, origin.metadata.get("index"))
    write_beside(folder, origin, named_dtype(arch, dtype_of, origin))


def write_orbax(
    folder: Path,
    arch: Architecture,
    plan: Plan,
    get: Get,
    dtype_of: DtypeOf,
    origin: Origin,
    *,
    track: Track | None = None,
) -> None:
    """orbax/ with the weights in the plan's formats, the plan, and config.json and the rest beside it."""
    from checkpoints import orbax  # two seconds of import, for those who use it

    tensors, names = stored_tensors(arch, plan, dtype_of), stored_names(arch, plan)
    owner = {(n, place): name for name, (leaves, place) in names.items() for n in jax.tree.leaves(leaves)}
    total, done = sum(t.nbytes for t in tensors.values()), 0
    held: tuple[str, Any] = ("", None)  # the arrays of one Weight are asked for one after another

    def read(stored: str, layer: int | None) -> np.ndarray:
        nonlocal held
        name = owner[stored, layer]
        if held[0] != name:
            held = (name, get(name))
        leaf = held[1] if isinstance(held[1], Weight) else dense(held[1], tensors[stored].dtype)
        leaves = dict(zip(jax.tree.leaves(names[name][0]), jax.tree.leaves(leaf), strict=True))
        return np.asarray(jax.device_get(leaves[stored]))

    def progress(size: int) -> None:
        nonlocal done
        done += size
        if track is not None:
            track("", done, total)

    orbax.save(folder / ORBAX, tensors, read, progress=progress)
    (folder / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
    write_beside(folder, origin, named_dtype(arch, dtype_of, origin))


def loses(source: str, target: str) -> bool:
    """Whether a cast from one dtype to the other rounds, or has no room for, some of its numbers."""
    one, other = np.dtype(source), np.dtype(target)
    return one.itemsize >= other.itemsize and not np.can_cast(one, other)  # of 8-bit floats numpy does not know it


def named_dtype(arch: Architecture, dtype_of: DtypeOf, origin: Origin) -> str | None:
    """What config.json has to name: the matrices' dtype; None where each parameter has the dtype it came with."""
    if dtypes_of(arch, dtype_of) == origin.dtypes:
        return None
    matrices = {dtype_of(name).name for name, spec in arch.specs().items() if spec.out is not None}
    return matrices.pop() if len(matrices) == 1 else None


def write_beside(folder: Path, origin: Origin, dtype: str | None) -> None:
    """config.json, as it was unless something has changed, and the other text files of the folder it came from."""
    named = "torch_dtype" if "torch_dtype" in origin.config and "dtype" not in origin.config else "dtype"
    raw = origin.config | ({named: dtype} if dtype else {})
    alone = origin.folder is None or not (origin.folder / "config.json").is_file()  # a GGUF file
    if origin.folder is not None and not alone and raw == read_config(origin.folder):
        shutil.copyfile(origin.folder / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(origin.folder.iterdir()) if origin.folder is not None else ():
        own = path.name in ("config.json", PLAN) or path.name.endswith(".index.json")
        own |= alone and not path.name.startswith(("tokenizer", "special_tokens_map"))
        if path.is_file() and path.suffix in BESIDE and not own:
            shutil.copyfile(path, folder / path.name)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    weights: str | None = None,
    dtype: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    track: Track | None = None,
) -> None:
    """Read one folder, write another, one parameter at a time; no more than that is placed on a device.

    to: 'hf', 'orbax', or 'compressed-tensors', a Hugging Face folder whose integer weights stay packed. weights: the format
    that a plain source is encoded in for the last two, e.g. 'nf4' or 'int4:group_size=32'; the codes are those of `load` with
    these weights.
    dtype: cast all parameters (each keeps its own if not given). adapter: a PEFT folder of LoRA or DoRA to merge into them;
    what the source holds in a format is rounded to it anew. max_shard_bytes: split what is
    written to safetensors into files of at most this size (if not given, as the source is split, or 5 GB where it is not).
    Raises, before anything is written: ValueError for a choice there is not, for a format that does not hold the source's
    numbers or divide its matrices, and for layers that orbax cannot stack,
    CheckpointError for a target that is not empty or a source that cannot be read, ConfigError for a model that is not
    done.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: to is {to!r}; it can be {' or '.join(FORMATS)}")
    if weights is not None and to == "hf":
        raise ValueError(
            f"convert: weights={weights!r} goes with to='orbax' or to='compressed-tensors' (integers alone); what to='hf'"
            f" writes is plain"
        )
    chosen = None if weights is None else Plan(weights=weights)  # refuses a format that there is not
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"convert: dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    if max_shard_bytes is not None and to == "orbax":
        raise ValueError(f"convert: max_shard_bytes goes with to='hf'; to={to!r} is not split into files of a size")
    source = Path(source)
    raw = read_config(source)
    with open_source(source, architecture(raw)) as parameters, output_folder(target, overwrite=overwrite) as folder:
        arch, origin, plan = parameters.architecture, parameters.origin(raw), parameters.plan

        def dtype_of(name: str) -> np.dtype:
            return np.dtype(dtype) if dtype else parameters.dtype(name)

        read = parameters.read
        if adapter is not None:
            from jaxengine.finetune.run import adapted  # which loads models itself

            read = merged(plan or Plan(dtype="float32"), arch, adapted(arch, parameters.read, adapter))
        if to == "hf":
            write_hf(
                folder, arch, read, dtype_of, origin, max_shard_bytes=max_shard_bytes, track=track
            )  # fmt: skip
            return
        if to == "compressed-tensors" and chosen is None and plan is None:
            raise ValueError(
                "convert: to='compressed-tensors' packs integer weights, and the source's are plain: say weights='int8' or"
                " weights='int4:group_size=32', or to='hf'"
            )
        own = dtype or (plan.dtype if plan is not None else one_dtype(arch, parameters.dtype, raw))
        plan, get = in_formats(parameters, chosen, own, read)
        if to == "compressed-tensors":
            from jaxengine import compressed

            compressed.write(
                folder, arch, plan, get, dtype_of, origin, max_shard_bytes=max_shard_bytes, track=track
            )  # fmt: skip
            return
        if dtype is not None and dtype != plan.dtype:
            if any(plan.format_of(name, spec) != "dense" for name, spec in arch.specs().items()):
                raise ValueError(
                    f"convert: {source} holds weights of a plan in {plan.dtype}; go through to='hf' to cast them"
                )
            plan = dataclasses.replace(plan, dtype=dtype)
        made, specs = plan, arch.specs()

        def stored_in(name: str) -> np.dtype:  # what a format holds is of the plan's dtype; the rest keeps its own
            return dtype_of(name) if made.format_of(name, specs[name]) == "dense" else np.dtype(made.dtype)

        write_orbax(folder, arch, plan, get, stored_in, origin, track=track)


def one_dtype(arch: Architecture, dtype_of: DtypeOf, raw: Mapping[str, Any]) -> str:
    """The dtype that a checkpoint is used in if nobody says: that of its matrices, or what config.json names."""
    stored = {dtype_of(name).name for name, spec in arch.specs().items() if spec.out is not None}
    if len(stored) == 1 and stored <= set(DTYPES):
        return stored.pop()
    named = raw.get("dtype") or raw.get("torch_dtype")
    if isinstance(named, str) and named in DTYPES:
        return named
    raise ValueError(
        f"The tensors are {', '.join(sorted(stored))} and config.json names no dtype of {', '.join(DTYPES)}: say which,"
        f" e.g. dtype='bfloat16'"
    )
