"""Folders as sources of parameters: a Hugging Face folder, one whose matrices are packed (quantized.py), a GGUF file
(checkpoints/gguf.py), or one that was written with orbax.

A source is opened after config.json has become an Architecture, is checked whole against it before a byte of data is
read, and then gives one parameter at a time, in our shape and its own dtype, as a numpy array (or, where a
checkpoint holds it quantised, as a Weight of numpy arrays).

Whether the head is tied to the embedding is said twice, by config.json and by the tensors, and the two may disagree: a
config that ties (for several families the default) stands beside an lm_head of its own that was trained. Then the tensors
are right, as they are for transformers 5, and the source's architecture is the untied one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import jax
import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.safetensors import Reader, TensorInfo, aligned_empty
from jaxengine import formats
from jaxengine.architecture import Architecture
from jaxengine.plan import Plan, abstract_leaf

if TYPE_CHECKING:
    from checkpoints.orbax import Stored

log = logging.getLogger("jaxengine")

ORBAX = "orbax"  # the sub-folder of a saved model that holds its arrays
PLAN = "jaxengine_plan.json"
PIECE = 4 * 2**20  # bytes of each of two tensors that are compared


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from, as far as an export needs it: its config.json, its folder, and how its files were split.

    dtypes: of each parameter of ours, as it was stored. copies: {their name: their name}, tensors that repeat another one.
    """

    config: dict[str, Any]
    folder: Path | None = None
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    weight_map: dict[str, str] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Parameters by our names."""

    nbytes: int
    architecture: Architecture  # what the tensors make of the one it was opened with: the head may turn out untied
    plan: Plan | None  # the plan whose formats the stored weights are in; None: all are plain arrays

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def read(self, name: str) -> Any:
        """One parameter, in our shape and its own dtype."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype it is stored in; of a quantised one, the plan's."""
        ...

    def where(self, name: str) -> TensorInfo | None:
        """Where the bytes of one parameter stand in a file, in our shape and order; None where they do not."""
        ...

    def origin(self, config: dict[str, Any]) -> Origin:
        """What an export needs to know."""
        ...


class HuggingFace:
    """A Hugging Face folder: safetensors under the family's names."""

    plan: Plan | None = None

    def __init__(self, folder: Path, architecture: Architecture, reader: Reader | None = None):
        """reader: of the folder, if it is open already; closed with the source."""
        self.folder = folder
        self._copies: dict[str, str] = {}
        self._mended: dict[str, Any] = {}  # fields of config.json of which the tensors say something else
        self._reader = Reader.open(folder) if reader is None else reader
        try:
            self._fit(architecture)
            if architecture.config.tie_word_embeddings:
                self._tie_or_untie()
        except BaseException:
            self._reader.close()
            raise
        self.nbytes = sum(self._reader.info(n).nbytes for n in set(self._theirs.values()))

    def _fit(self, architecture: Architecture) -> None:
        """Take this architecture as the source's, if the tensors fit it."""
        self.architecture, params, table = architecture, architecture.params(), architecture.name_table()
        self._params, self._table = params, table
        self._prefix = table.check(self._reader, params, architecture.num_layers)
        theirs = table.theirs(params, architecture.num_layers, self._prefix)
        self._theirs = {ours: name for name in theirs for ours in table.parts(name, params)}

    def _tie_or_untie(self) -> None:
        """The config ties: take the head, if the files hold one too, as the embedding's copy or as one of its own."""
        tied = self.architecture
        untied = dataclasses.replace(tied, config=dataclasses.replace(tied.config, tie_word_embeddings=False))
        params, table = untied.params(), untied.name_table()
        theirs = table.theirs(params, untied.num_layers, self._prefix)
        head = next(name for name in theirs if table.parts(name, params) == ("lm_head",))
        embedding = self._theirs["embedding"]
        if head not in self._reader:
            return
        if same_bytes(self._reader, head, embedding):
            self._copies = {head: embedding}
            return
        self._fit(untied)
        self._mended = {"tie_word_embeddings": False}
        log.warning(
            "%s: config.json ties the head to the embedding, but %s is there and differs from %s: loaded untied",
            self.folder, head, embedding,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def theirs(self, name: str) -> str:
        """The name of the tensor that a parameter of ours is, or is a part of."""
        return self._theirs[name]

    def read(self, name: str) -> np.ndarray:
        """One parameter, in our shape and the file's dtype."""
        return self._table.read(self._reader, name, self._params)

    def dtype(self, name: str) -> np.dtype:
        """The file's dtype."""
        return np.dtype(self._reader.info(self._theirs[name]).dtype)

    def where(self, name: str) -> TensorInfo | None:
        """Where its bytes stand in a safetensors file, unless they are transposed or scattered there."""
        if not isinstance(self._reader, Reader):  # GGUF's own, which gives some rows in another order
            return None
        return self._table.where(self._reader, name, self._params)

    def origin(self, config: dict[str, Any]) -> Origin:
        """With the split into files, so that an export can be the same."""
        meta = {"files": dict(self._reader.metadata), "index": self._reader.index_metadata, "prefix": self._prefix}
        # a GGUF file may stand alone, or among other models' files
        folder = self.folder if any((self.folder / n).is_file() for n in ("config.json", "tokenizer.json")) else None
        return Origin(
            config | self._mended, folder, dtypes_of(self.architecture, self.dtype), self._copies,
            dict(self._reader.weight_map), meta,
        )  # fmt: skip


def same_bytes(reader: Reader, a: str, b: str) -> bool:
    """Whether two tensors are the same dtype, shape and bytes; a few rows of each are held at a time."""
    one, other = reader.info(a), reader.info(b)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.shape or not one.nbytes:
        return reader.read(a).tobytes() == reader.read(b).tobytes()
    step = max(1, PIECE * one.shape[0] // one.nbytes)
    held = [aligned_empty((min(step, one.shape[0]), *one.shape[1:]), one.dtype) for _ in range(2)]
    for start in range(0, one.shape[0], step):
        rows = slice(start, min(start + step, one.shape[0]))
        # as bytes: as numbers NaN is not itself, and -0.0 is 0.0
        x, y = (
            reader.read(name, rows, out=buffer[: rows.stop - start]).reshape(-1).view(np.uint8)
            for name, buffer in zip((a, b), held, strict=True)
        )
        if not np.array_equal(x, y):
            return False
    return True


def dtypes_of(architecture: Architecture, dtype_of: Callable[[str], np.dtype]) -> dict[str, str]:
    """The name of each parameter's dtype, as `Origin.dtypes` has them."""
    return {name: np.dtype(dtype_of(name)).name for name in architecture.params()}


class Orbax:
    """A folder that `Model.save(folder, format='orbax')` or `convert` wrote: config.json, the plan, and orbax/."""

    def __init__(self, folder: Path, architecture: Architecture):
        self.folder, self.architecture = folder, architecture
        self.plan: Plan | None = saved_plan(folder)
        if self.plan is None:
            raise CheckpointError(f"{folder} has {ORBAX}/ but no {PLAN}, which says in which formats its weights are")
        from checkpoints.orbax import OrbaxReader  # two seconds of import, for those who use it

        self._names = stored_names(architecture, self.plan)
        self._reader = OrbaxReader.open(folder / ORBAX)
        try:
            self._check(architecture)
        except BaseException:
            self._reader.close()
            raise
        self.nbytes = sum(
            int(np.prod(i.shape)) * np.dtype(i.dtype).itemsize for i in map(self._reader.info, self._reader.names)
        )

    def _check(self, architecture: Architecture) -> None:
        assert self.plan is not None
        wanted = stored_tensors(architecture, self.plan)
        found = set(self._reader.names)
        said = [f"missing: {n}" for n in wanted if n not in found] + [f"unexpected: {n}" for n in found - set(wanted)]
        for name, stored in wanted.items():
            if name in found and self._reader.info(name).shape != stored.full:
                said.append(f"{name} is {list(self._reader.info(name).shape)}, the model needs {list(stored.full)}")
        if said:
            raise CheckpointError(f"{self.folder / ORBAX} does not fit the model of its config.json:{listing(said)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def read(self, name: str) -> Any:
        """One parameter: an array, or a Weight of numpy arrays."""
        leaf, place = self._names[name]
        return jax.tree.map(lambda n: self._reader.read(n, place), leaf)

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype; of a quantised weight, the plan's."""
        leaf, _ = self._names[name]
        assert self.plan is not None
        return np.dtype(self._reader.info(leaf).dtype if isinstance(leaf, str) else self.plan.dtype)

    def where(self, name: str) -> TensorInfo | None:
        """None: orbax keeps stacks, in chunks that are compressed."""
        return None

    def origin(self, config: dict[str, Any]) -> Origin:
        """The folder; its files were never split."""
        return Origin(config, self.folder, dtypes_of(self.architecture, self.dtype))


def check_numbers(source: Source, plan: Plan) -> None:
    """Refuse a format for a checkpoint whose numbers it does not hold."""
    for name, spec in source.architecture.specs().items():
        wanted = plan.format_of(name, spec)
        if source.plan is not None and source.plan.format_of(name, spec) == wanted:
            continue
        if (why := formats.find(wanted).refuses(source.dtype(name).name, plan.dtype)) is not None:
            raise ValueError(f"weights={wanted!r} for {name}: {why}")


def open_source(folder: Path, architecture: Architecture) -> Source:
    """orbax where that is what the folder holds, packed matrices where config.json has a quantization_config or a GGUF file
    stands in its place, else plain safetensors. Raises CheckpointError for what does not fit."""
    if (folder / ORBAX).is_dir():
        return Orbax(folder, architecture)
    if (path := gguf_file(folder)) is not None:
        return _open_gguf(path, architecture)
    raw = read_config(folder) if (folder / "config.json").is_file() else {}
    if not raw.get("quantization_config"):
        return HuggingFace(folder, architecture)
    from checkpoints.quantized import method  # it and what it needs, for those who use it
    from jaxengine.quantized import Quantized

    packing = method(raw["quantization_config"])
    return Quantized(folder, architecture, raw, Reader.open(folder), packing)


def _open_gguf(path: Path, architecture: Architecture) -> Source:
    from checkpoints.gguf import Blocks, Gguf
    from jaxengine.quantized import Quantized

    file = Gguf(path)
    if any(kind.dtype is None for kind in file.kinds.values()):
        return Quantized(path.parent, architecture, file.config, file, Blocks(file))
    return HuggingFace(path.parent, architecture, cast(Reader, file))


def gguf_file(folder: Path) -> Path | None:
    """What is a GGUF file itself; the folder's, where it has one and no config.json; CheckpointError for several."""
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not folder.is_dir() or (folder / "config.json").is_file() or not (found := sorted(folder.glob("*.gguf"))):
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has no config.json and {len(found)} GGUF files; give the path of the one to load:"
            f"{listing([p.name for p in found])}"
        )
    return found[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands, or what a GGUF file in its place says; CheckpointError if there is neither or it is no
    JSON object."""
    if (gguf := gguf_file(folder)) is not None:
        from checkpoints.gguf import Gguf

        with Gguf(gguf) as file:
            return file.config
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a Hugging Face checkpoint folder (config.json and *.safetensors), or a .gguf file"
        )
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; a Hugging Face checkpoint folder has one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {type(raw).__name__}, not an object")
    return raw


def saved_plan(folder: Path) -> Plan | None:
    """The plan stored beside a checkpoint, if there is one."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None


# --- how parameters are called in an orbax checkpoint: layers stacked, the arrays of a Weight by their field ------------


def layer_of(name: str) -> int | None:
    """3 of 'layers.3.q'; None for what stands outside the layers."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


def stacked_name(name: str) -> str:
    """'layers.q' of 'layers.3.q': the stack that a layer's parameter stands in."""
    return name if layer_of(name) is None else "layers." + name.split(".", 2)[2]


def stored_names(architecture: Architecture, plan: Plan) -> dict[str, tuple[Any, int | None]]:
    """{parameter: (the tree of its leaves with each one's name on disk, its place in the stack of that name)}.

    'layers.q', or 'layers.q.codes' and '.scale'. Layers of one format are one stack; where a parameter has several, a stack
    is named after its own: 'layers.down.int4-group_size-32.codes'. The place is None for what stands outside the layers.
    """
    specs = architecture.specs()
    stacks: dict[str, dict[str, list[str]]] = {}
    for name, spec in specs.items():
        stacks.setdefault(stacked_name(name), {}).setdefault(plan.format_of(name, spec), []).append(name)
    found: dict[str, tuple[Any, int | None]] = {}
    for stack, held in stacks.items():
        for text, names in held.items():
            spec = specs[names[0]]
            leaf = abstract_leaf(text, spec.shape, spec.out, plan.dtype)
            called = stack if len(held) == 1 else f"{stack}.{re.sub('[:,=]', '-', text)}"
            paths, tree = jax.tree.flatten_with_path(leaf)
            leaves = jax.tree.unflatten(
                tree, [called + "".join(f".{getattr(k, 'name', k)}" for k in p) for p, _ in paths]
            )
            found |= {name: (leaves, None if layer_of(name) is None else i) for i, name in enumerate(names)}
    return {name: found[name] for name in specs}


def stored_tensors(
    architecture: Architecture, plan: Plan, dtype_of: Callable[[str], np.dtype] | None = None
) -> dict[str, Stored]:
    """Every array of an orbax checkpoint of this model under this plan's formats; dtype_of: the plan's if not given.

    Raises ValueError where layers cannot be stacked because they have different dtypes.
    """
    from checkpoints.orbax import Stored

    found: dict[str, Stored] = {}
    specs = architecture.specs()
    dtypes = dict.fromkeys(specs, plan.dtype)
    if dtype_of is not None:
        dtypes = dtypes_of(architecture, dtype_of)
        _check_stacks(dtypes)
    for name, (names, place) in stored_names(architecture, plan).items():
        spec = specs[name]
        leaf = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, dtypes[name])
        for n, x in zip(jax.tree.leaves(names), jax.tree.leaves(leaf), strict=True):
            found[n] = Stored(x.shape, np.dtype(x.dtype), None if place is None else place + 1)
    return found


def _check_stacks(dtypes: dict[str, str]) -> None:
    """Refuse layers that cannot be stacked because one parameter has another dtype in some of them."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for name, dtype in dtypes.items():
        if (layer := layer_of(name)) is not None:
            stacks.setdefault(stacked_name(name), {}).setdefault(dtype, []).append(str(layer))
    mixed = [
        f"{name} is " + " and ".join(f"{d} in layer{'s' * (len(at) > 1)} {', '.join(at)}" for d, at in found.items())
        for name, found in stacks.items()
        if len(found) > 1
    ]
    if mixed:
        raise ValueError(
            f"orbax: layers are stacked, and a stack has one dtype; dtype='float32' or another casts all parameters to"
            f" one:{listing(mixed)}"
        )
