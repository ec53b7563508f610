"""orbax checkpoints, written and read one layer at a time.

On disk is what orbax itself would have written for a nested dict of arrays, the parameters of all layers stacked:
{"layers": {"attention": {"q": [L, N, H, D], ...}, ...}, "embed": [V, D], ...}. Anyone restores it with plain orbax and
no code of ours, onto any mesh and memory kind.

Two things orbax does not do are needed for models larger than the host's memory. A stacked array is one chunk to orbax
unless told otherwise; here each layer is one chunk, so that one layer costs one read. And orbax takes arrays that
exist; here `read(name, layer)` is asked for one layer, which is written before the next is asked for.

How: orbax saves the tree once with one-element arrays (through its public API: so all of its own metadata is what the
installed version writes), then each array is created anew by tensorstore, in orbax's default container (OCDBT), with
its real shape and one chunk per layer, and is filled layer by layer; at last orbax's own metadata call must find every
array as planned. The other ways were: a custom leaf type with a TypeHandler (its signatures changed with every minor
version, v1 replaces it by another contract), v1's partial.save (holds one whole stack: 37 GB for the gate of a 70B
model, and still experimental), and filling zeros that orbax wrote (writes everything twice). The format on disk is the
one interface orbax must keep, since old checkpoints have to stay readable.

Chunks are not compressed (bfloat16 weights hardly shrink, and zstd would be slower than the disk) and carry a crc32c,
so that a damaged file is an error and not a strange model. Layers are the unit for sharded restores as well: each
process reads the whole layers of which it needs a part.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from checkpoints.errors import CheckpointError, listing
from checkpoints.output import room_is_said

_TREE = "_METADATA"  # orbax's file that says what the tree holds
_MANIFEST = "manifest.ocdbt"
_CHUNK = 256 * 2**20  # bytes: arrays that are not stacked are cut along their first dim into chunks of about this size


@dataclass(frozen=True)
class Stored:
    """An array on disk: `shape` and `dtype` of one layer (or of the whole, when it is not stacked); `layers` how many
    are stacked along a new first dim, None for an array outside the layers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: int | None = None

    @property
    def full(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.full) * np.dtype(self.dtype).itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """One layer; outside the layers, rows of about 256 MiB."""
        if self.layers is not None:
            return (1, *self.shape)
        if not self.shape:
            return ()
        pieces = min(self.shape[0], -(-self.nbytes // _CHUNK))
        return (-(-self.shape[0] // max(1, pieces)), *self.shape[1:])


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Stored],
    read: Callable[[str, int | None], np.ndarray],
    *,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write `tensors` into `folder` (new, or without an orbax checkpoint in it: an `output_folder` gives one).

    A name is a path of dict keys joined by dots ("layers.attention.q"). `read(name, layer)` gives one layer of a
    stacked array, `read(name, None)` all of another; nothing of it is kept, so that host memory is what `read` holds
    and two chunks. `progress` is told the bytes of each piece written.
    """
    folder = Path(folder).absolute()
    tree = _nest(tensors)
    for name, stored in tensors.items():
        _check_storable(name, stored)
    if (folder / _TREE).exists() or (folder / _MANIFEST).exists():
        raise CheckpointError(f"{folder} already holds an orbax checkpoint; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with room_is_said(folder):
        _save_tree(folder, tree)
        for name, stored in tensors.items():
            _fill(_create(folder, name, stored), name, stored, read, progress)
    _confirm(folder, tensors)


def _nest(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    if not tensors:
        raise CheckpointError("There is nothing to save: no tensors were given.")
    tree: dict[str, Any] = {}
    for name, stored in tensors.items():
        *path, leaf = name.split(".")
        if not all(part and "/" not in part for part in (*path, leaf)):
            raise CheckpointError(
                f"{name!r} cannot be an orbax name: each part between dots needs a letter and no '/'."
            )
        node: Any = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or leaf in node:
            raise CheckpointError(f"{name!r} is both an array and a group of arrays (or there twice); rename one.")
        # orbax does not save arrays without elements: one element stands in
        node[leaf] = np.zeros((1,), stored.dtype)
    return tree


def _check_storable(name: str, stored: Stored) -> None:
    dtype = np.dtype(stored.dtype)
    if dtype.name in ("int2", "uint2", "int4", "uint4"):
        raise CheckpointError(
            f"{name} is {dtype}, which orbax does not keep on every version; pack the codes in uint8."
        )
    if 0 in stored.full:
        raise CheckpointError(f"{name} has the shape {list(stored.full)}: orbax does not save arrays without elements.")
    try:
        ts.dtype(dtype)
    except (TypeError, ValueError):
        raise CheckpointError(f"{name} is {dtype}, which tensorstore (orbax's file format) does not know.") from None


def _save_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Let orbax write its metadata for the tree. It wants a folder of its own, so its files move up afterwards."""
    own = folder / ".orbax"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
        checkpointer.save(own, args=ocp.args.PyTreeSave(tree))
    for entry in own.iterdir():
        entry.rename(folder / entry.name)
    own.rmdir()


def _container(root: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{root}/"}
    return {"driver": "ocdbt", "base": base} if (root / _MANIFEST).exists() else base


def _create(folder: Path, name: str, stored: Stored) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"},
        "metadata": {
            "shape": stored.full,
            "data_type": np.dtype(stored.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": stored.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        # orbax treats a chunk that is not there as damage, so zeros are written too
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(ts.Spec(spec), create=True, delete_existing=True).result()  # in place of the stand-in


def _fill(
    store: ts.TensorStore,
    name: str,
    stored: Stored,
    read: Callable[[str, int | None], np.ndarray],
    progress: Callable[[int], object] | None,
) -> None:
    for layer in [None] if stored.layers is None else range(stored.layers):
        _write(
            store, f"{name}{'' if layer is None else f' of layer {layer}'}", stored, layer, read(name, layer), progress
        )


def _write(
    store: ts.TensorStore,
    name: str,
    stored: Stored,
    layer: int | None,
    array: np.ndarray,
    progress: Callable[[int], object] | None,
) -> None:
    if array.shape != stored.shape or array.dtype != np.dtype(stored.dtype):
        raise CheckpointError(
            f"{name} was announced as {np.dtype(stored.dtype)}{list(stored.shape)} and came as "
            f"{array.dtype}{list(array.shape)}."
        )
    for place, piece in _pieces(store, stored, layer, array):
        place.write(piece, can_reference_source_data_indefinitely=True).result()
        if progress is not None:
            progress(piece.nbytes)


def _pieces(
    store: ts.TensorStore, stored: Stored, layer: int | None, array: np.ndarray
) -> Iterator[tuple[ts.TensorStore, np.ndarray]]:
    """The array chunk by chunk: written in one go, all its chunks would be copied before the first is on disk."""
    if layer is not None:
        yield store[layer], array
    elif not stored.shape:
        yield store, array
    else:
        rows = stored.chunk[0]
        for i in range(0, stored.shape[0], rows):
            piece = array[i : i + rows]
            yield store[i : i + len(piece)], piece


def _confirm(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """orbax's own word on what is in the folder: a version that lays its files out otherwise is found out here."""
    with OrbaxReader.open(folder) as reader:
        found = {name: (reader.info(name).shape, reader.info(name).dtype) for name in reader.names}
    planned = {name: (stored.full, np.dtype(stored.dtype)) for name, stored in tensors.items()}
    if found != planned:
        wrong = [name for name in planned if found.get(name) != planned[name]] + [n for n in found if n not in planned]
        raise CheckpointError(
            f"orbax {ocp.__version__} does not read back what was written to {folder}; its layout on disk has changed "
            f"(0.12 is known to work):{listing(wrong)}"
        )


@dataclass(frozen=True)
class ArrayInfo:
    """An array of the checkpoint; `chunk` is what one read from disk brings at least."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class OrbaxReader:
    """The arrays of one orbax checkpoint, ours or anyone's (OCDBT or plain files, zarr 2 or 3)."""

    def __init__(self, folder: Path, stores: dict[str, ts.TensorStore]) -> None:
        self.folder = folder
        self._stores = stores

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Find the checkpoint in `folder`, and check that every array and every chunk of it is there."""
        root = _find(Path(folder).absolute())
        keys = _keys(root)
        listed, complete = _listed(root)
        stores = {name: _open(root, name, keys, complete) for name in listed}
        try:
            with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.metadata(root).item_metadata
            if found is None:
                raise ValueError(f"orbax finds no tree in it ({_TREE} is damaged, or the arrays' data is missing)")
        except Exception as error:
            raise CheckpointError(
                f"{root} is not an orbax checkpoint that can be read: {_first_line(error)}"
            ) from error
        names = [".".join(path) for path, leaf in _leaves(found.tree) if isinstance(leaf, ocp.metadata.ArrayMetadata)]
        for name in names:  # strings and empty nodes are left: orbax keeps them in files of their own
            if names.count(name) > 1:
                raise CheckpointError(
                    f"{root} has two arrays whose path is spelt {name!r}; rename one where it is made."
                )
        stores = {n: stores[n] if n in stores else _open(root, n, keys, complete) for n in names}
        if not stores:
            raise CheckpointError(f"{root} is an orbax checkpoint without any array.")
        return cls(root, stores)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._stores)

    def __contains__(self, name: object) -> bool:
        return name in self._stores

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            raise CheckpointError(f"There is no array {name!r} in {self.folder}.")
        return self._stores[name]

    def info(self, name: str) -> ArrayInfo:
        store = self._store(name)
        return ArrayInfo(name, tuple(store.shape), np.dtype(store.dtype.numpy_dtype), _chunk(store))

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """The whole array, or one index of its first dim: of a stack with a chunk per layer only that chunk is read."""
        store = self._store(name)
        if layer is not None:
            if not store.shape or not 0 <= layer < store.shape[0]:
                raise ValueError(
                    f"layer={layer} of {name}: its shape is {list(store.shape)}, so layers start at 0 and end "
                    f"below {store.shape[0] if store.shape else 0}."
                )
            store = store[layer]
        try:
            return np.asarray(store.read().result())
        except Exception as error:
            where = "" if layer is None else f", layer {layer},"
            raise CheckpointError(f"{self.folder}: array {name!r}{where} is damaged: {_first_line(error)}") from error

    def close(self) -> None:
        self._stores = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find(folder: Path) -> Path:
    """The folder that holds the tree's metadata: the one given, or its only item (orbax's managers make one)."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; an orbax checkpoint is a folder with the file {_TREE}.")
    if ".orbax-checkpoint-tmp" in folder.name:
        raise CheckpointError(
            f"{folder} is what an interrupted orbax save left behind; it is not complete. Save again."
        )
    if (folder / _TREE).is_file():
        return folder
    items = sorted(entry for entry in folder.iterdir() if (entry / _TREE).is_file())
    if len(items) == 1:
        return items[0]
    if items:
        raise CheckpointError(f"{folder} holds several orbax items; give one:{listing([str(item) for item in items])}")
    if steps := sorted(
        (entry for entry in folder.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name)
    ):
        raise CheckpointError(
            f"{folder} holds {len(steps)} steps of a training run; give one of them, e.g. {steps[-1]}."
        )
    raise CheckpointError(
        f"{folder} is not an orbax checkpoint: neither it nor a folder in it has the file {_TREE}, which orbax writes "
        f"when it saves a tree."
    )


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, str(i)))
    else:
        yield path, tree


def _keys(root: Path) -> frozenset[str]:
    """All keys of the container: arrays' metadata and chunks."""
    try:
        return frozenset(key.decode() for key in ts.KvStore.open(_container(root)).result().list().result())
    except Exception as error:
        raise CheckpointError(f"{root} is damaged: its list of arrays cannot be read: {_first_line(error)}") from error


def _listed(root: Path) -> tuple[list[str], bool]:
    """The arrays that the tree names, and whether every chunk of them must be there.

    They are opened here before orbax is asked: it opens all at once and leaves at the first that fails, and the others
    then report to an event loop that is closed, which Python prints as an error that no one can catch.
    """
    try:
        tree = json.loads((root / _TREE).read_text())
        arrays = [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in tree["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray", "scalar")
            and not entry["value_metadata"].get("skip_deserialize")
        ]
        return arrays, bool(tree.get("store_array_data_equal_to_fill_value", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root} is not an orbax checkpoint that can be read: {_TREE} is damaged") from error


def _driver(root: Path, name: str, keys: frozenset[str]) -> str:
    """zarr or zarr3, by the file that says what the array is."""
    for driver, file in (("zarr3", "zarr.json"), ("zarr", ".zarray")):
        if f"{name}/{file}" in keys:
            return driver
    raise CheckpointError(f"{root} lists the array {name!r} but does not hold it: the checkpoint is not complete.")


def _open(root: Path, name: str, keys: frozenset[str], complete: bool) -> ts.TensorStore:
    driver = _driver(root, name, keys)
    container = _container(root)
    container["path"] = f"{container['path']}{name}/" if container["driver"] == "file" else f"{name}/"
    spec = {"driver": driver, "kvstore": container}
    if complete:
        spec["fill_missing_data_reads"] = False
    try:
        store = ts.open(ts.Spec(spec), open=True, read=True).result()
    except Exception as error:
        raise CheckpointError(f"{root}: array {name!r} cannot be opened: {_first_line(error)}") from error
    if complete:
        expected = math.prod(-(-n // c) for n, c in zip(store.shape, _chunk(store), strict=True))
        there = sum(key.startswith(f"{name}/") for key in keys) - 1
        if there < expected:
            raise CheckpointError(
                f"{root}: array {name!r} has {there} of its {expected} chunks: the checkpoint is not complete."
            )
    return store


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    return tuple(n or 1 for n in store.chunk_layout.write_chunk.shape or store.shape)


def _first_line(error: Exception) -> str:
    """tensorstore's messages carry the whole spec and source locations."""
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """orbax warns about files of its own making; what matters is raised here."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
