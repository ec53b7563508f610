"""A model's layers packed on disk, to be read in every pass: the home disk.

A checkpoint's own files are made for exchange: a layer's tensors are spread over them, at any offset, in a dtype and a
layout of their own. All layers are therefore written once more, encoded in the plan's formats, into one store
(checkpoints/packed.py). It is found again by what it was made of, so that a second load, with another budget too, only
opens it. It takes the place of the whole model on disk, layers that this plan keeps in memory included.

Where the plan keeps every layer as the checkpoint has it (dense, in the checkpoint's dtype, rows in the same order), there is
nothing to write: the layers are read from the checkpoint's own safetensors, page by page, unless a folder is named for a
store, on a faster disk, say. What a store has beyond that is a checksum of all it holds.

Packing that was interrupted goes on after the layers that are there, and of several processes that want one store one
writes it. A store holds what it was made of, so that `stores` can tell those that no load will find again: their
checkpoint was changed or is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoints.errors import CheckpointError
from checkpoints.packed import PackedReader, ReaderStats, StoreFile, list_stores, remove_store, write_packed
from checkpoints.safetensors import TensorInfo
from jaxengine.architecture import Architecture
from jaxengine.plan import RING, Plan, abstract_leaf, show_bytes
from jaxengine.sources import ORBAX
from jaxengine.weights.base import Weight

log = logging.getLogger("jaxengine")

Track = Callable[[str, int, int], None]  # (name, bytes packed, bytes in all)
SUFFIX = ".layers"


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder that stores stand in, and the checkpoint that this one is made of: whatever tells it from others (of the
    folder or file `source`, `files_of` it). where: of a parameter's bytes in that checkpoint's own files, where it may be
    read from there."""

    folder: Path
    checkpoint: str
    track: Track = lambda name, done, total: None
    source: Path | None = None
    where: Callable[[str], TensorInfo | None] = lambda name: None


def files_of(folder: Path) -> str:
    """What tells the checkpoint in a folder, or a GGUF file, from others, and from itself after it was changed: the paths,
    lengths and times (of their change too, which copies do not keep) of the files that hold its arrays."""
    arrays = [p for end in ("*.safetensors", "*.safetensors.index.json", "*.gguf") for p in folder.glob(end)]
    arrays += (folder / ORBAX).rglob("*")
    arrays += [folder] if folder.is_file() else []
    found = [
        (str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for p in sorted(arrays)
        if p.is_file() and (s := p.stat())
    ]
    return json.dumps(found)


def fingerprint(architecture: Architecture, plan: Plan, checkpoint: str) -> str:
    """Of all that decides a store's bytes."""
    formats = {n: plan.format_of(n, s) for n, s in architecture.specs().items() if n.startswith("layers.")}
    said = json.dumps(
        [1, architecture.family, dataclasses.asdict(architecture.config), plan.dtype, formats, checkpoint],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(said.encode()).hexdigest()


def _family(checkpoint: str) -> str:
    """What stores of the checkpoints at one place have in common: of their files' paths alone."""
    return hashlib.sha256(json.dumps([row[0] for row in json.loads(checkpoint)]).encode()).hexdigest()[:12]


def abstract_layer(architecture: Architecture, plan: Plan, i: int) -> dict[str, Any]:
    """{name: tree of ShapeDtypeStructs} of layer i in the plan's formats."""
    specs = architecture.block(architecture.kinds[i])[1]
    return {
        n: abstract_leaf(plan.format_of(f"layers.{i}.{n}", s), s.shape, s.out, plan.dtype) for n, s in specs.items()
    }


def arrays_of(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's arrays by a name each: 'q' where that is one array, 'q.codes' where it is several."""
    flat, _ = jax.tree_util.tree_flatten_with_path(dict(layer))
    return {path[0].key + "".join(map(str, path[1:])): leaf for path, leaf in flat}


class Layers:
    """The layers on disk, from layer `first` on, taken in order, pass after pass."""

    def __init__(self, reader: PackedReader, architecture: Architecture, plan: Plan, first: int, shardings: Any):
        self._reader, self._first, self._shardings = reader, first, shardings
        self._abstract = [abstract_layer(architecture, plan, i) for i in range(reader.layers)]
        self._trees = [jax.tree.structure(layer) for layer in self._abstract]
        self._names = [list(arrays_of(layer)) for layer in self._abstract]
        self._following: int | None = None  # the layer that the reader gives next
        self._lock = threading.Lock()

    def take(self, i: int) -> dict[str, Any]:
        """Layer i on the device."""
        with self._lock:
            if i != self._following:
                again = itertools.cycle(range(self._first, self._reader.layers))
                self._reader.order(itertools.chain(range(i, self._reader.layers), again))
            self._following = None  # if this one fails, the next pass begins anew
            with self._told(), contextlib.ExitStack() as taken:
                with jax.profiler.TraceAnnotation("wait for the disk"):
                    arrays = taken.enter_context(self._reader.layer())
                leaves = [arrays[name] for name in self._names[i]]
                with jax.profiler.TraceAnnotation("copy to the device"):
                    weights = jax.device_put(jax.tree.unflatten(self._trees[i], leaves), self._shardings(i))
                    jax.block_until_ready(weights)  # the buffer is filled anew
            self._following = i + 1 if i + 1 < self._reader.layers else self._first
            return weights

    @property
    def stats(self) -> ReaderStats:
        """What has been read from the disk and waited for."""
        return self._reader.stats

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What to do about layers that cannot be read."""
        try:
            yield
        except CheckpointError as error:
            if self._reader.fingerprint:  # of a store, which is ours
                raise CheckpointError(
                    f"{error} Delete {self._reader.path}: the next load of the checkpoint packs it anew."
                ) from error
            raise CheckpointError(f"{error} Load the checkpoint again once its files are whole.") from error

    def close(self) -> None:
        """End the reading threads; a layer that is asked for later is an error."""
        self._reader.close()

    def read(self, i: int, name: str) -> Any:
        """One parameter of layer i: an array, or a Weight of numpy arrays."""
        tree = self._abstract[i][name]
        with self._told():
            leaves = [self._reader.array(i, n) for n in arrays_of({name: tree})]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def read_line(stats: ReaderStats) -> str:
    """What a reader has read from the disk and waited for, as a line to show. (Bytes are ahead of the layers taken.)"""
    rate = f", {show_bytes(round(stats.bytes_read / stats.read_seconds))}/s a thread" if stats.read_seconds else ""
    return (
        f"{show_bytes(stats.bytes_read)} read from disk{rate}; {stats.layers} layers taken, of which {stats.waits} were"
        f" waited for, {stats.wait_seconds:.3g} s in all"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The layers of one bank: a bank's `source`."""

    layers: Layers
    start: int
    count: int

    def stream(self) -> Iterator[dict[str, Any]]:
        """Each layer on the device, in turn."""
        return map(self.layers.take, range(self.start, self.start + self.count))

    def read(self, i: int, name: str) -> Any:
        """One parameter of the bank's layer i."""
        return self.layers.read(self.start + i, name)


def open_layers(
    architecture: Architecture,
    plan: Plan,
    mesh: Mesh,
    first: int,
    place: Place,
    encoded: Callable[[str], Any],
    shardings: Callable[[int], Any],
) -> Layers:
    """This model's layers where their checkpoint has them, if it may be read and has them as the plan does, or their store,
    written if there is none yet; read from layer `first` on.

    encoded(name): a parameter in its format, as `arrays_of` takes it apart; shardings(i): of layer i on the device.
    Raises CheckpointError where the disk has too little room.
    """
    wanted = fingerprint(architecture, plan, place.checkpoint)
    path = place.folder / f"{_family(place.checkpoint)}-{wanted[:32]}{SUFFIX}"

    # on CPU jax takes an aligned array as it is, and the ring would be written over what it computes with
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if (found := _in_place(architecture, plan, place.where)) is not None:
        reader = PackedReader(found, depth=RING, copy_out=on_cpu)
        log.info("layers are read from the checkpoint's own files: %s", reader.path)
        return Layers(reader, architecture, plan, first, shardings)

    def opened() -> PackedReader:
        return PackedReader(path, fingerprint=wanted, depth=RING, copy_out=on_cpu)

    try:
        reader = opened()
    except CheckpointError as error:
        if path.exists():
            log.warning("%s; it is written anew", error)
        _pack(architecture, plan, path, wanted, encoded, place)
        reader = opened()
    return Layers(reader, architecture, plan, first, shardings)


def _in_place(
    architecture: Architecture, plan: Plan, where: Callable[[str], TensorInfo | None]
) -> list[dict[str, TensorInfo]] | None:
    """Of each layer where its arrays' bytes are; None unless all are as the plan has them."""
    found = []
    for i in range(architecture.num_layers):
        found.append({})
        for name, leaf in abstract_layer(architecture, plan, i).items():
            info = where(f"layers.{i}.{name}")
            if isinstance(leaf, Weight) or info is None or (info.shape, info.dtype) != (leaf.shape, leaf.dtype):
                return None
            found[-1][name] = info
    return found


def _pack(
    architecture: Architecture, plan: Plan, path: Path, wanted: str, encoded: Callable[[str], Any], place: Place
) -> None:
    layers = [abstract_layer(architecture, plan, i) for i in range(architecture.num_layers)]
    specs = [{n: (x.shape, x.dtype) for n, x in arrays_of(layer).items()} for layer in layers]
    total = sum(x.size * np.dtype(x.dtype).itemsize for layer in layers for x in jax.tree.leaves(layer))
    log.info("packing %s of layers into %s, once", show_bytes(total), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [p for p in path.parent.glob(f"{path.name.partition('-')[0]}-*{SUFFIX}") if p != path]
    if others:
        log.info(
            "%s of other packed layers of this checkpoint are there, of other formats or of files that have changed since"
            " (`jaxengine layers --remove old` removes the latter); delete those that are not needed: %s",
            show_bytes(sum(p.stat().st_size for p in others)), ", ".join(map(str, others)),
        )  # fmt: skip
    held: dict[str, Any] = {}  # the arrays of one parameter
    done, now = 0, ""

    def read(i: int, array: str) -> np.ndarray:
        nonlocal held, now
        if array not in held:
            name = next(n for n in layers[i] if array in arrays_of({n: layers[i][n]}))
            now = f"layers.{i}.{name}"
            held = {n: np.asarray(x) for n, x in arrays_of({name: encoded(now)}).items()}
        return held.pop(array)

    def progress(size: int) -> None:
        nonlocal done
        done += size
        place.track(now, done, total)

    made_of = None if place.source is None else str(place.source.resolve())
    formats = plan.weights + ("" if not plan.weight_rules else f" and {len(plan.weight_rules)} rules")
    about = {"source": made_of, "checkpoint": place.checkpoint, "formats": f"{formats}, {plan.dtype}"}
    write_packed(
        path, len(layers), specs, read, fingerprint=wanted, about=json.dumps(about), overwrite=True, keep=True,
        progress=progress,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is there


@dataclasses.dataclass(frozen=True)
class Store:
    """Packed layers on disk, or what an interrupted packing has left of some.

    source: the checkpoint; formats: of its matrices, and the dtype; '' where the store does not say.
    state: 'current', a load of the checkpoint finds it; 'changed', the checkpoint's files have changed since; 'gone', it is
    not there any more; 'damaged'; 'left over', of a store that is there whole; 'unknown', it was written before stores
    said what they are made of.
    """

    file: StoreFile
    source: str
    formats: str
    state: Literal["current", "changed", "gone", "damaged", "left over", "unknown"]

    @property
    def old(self) -> bool:
        """Whether no load will find it again."""
        return self.state in ("changed", "gone", "damaged", "left over")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        f = self.file
        return {"path": str(f.path), "bytes": f.nbytes, "finished": f.whole, "in_use": f.used, "source": self.source,
                "formats": self.formats, "state": self.state}  # fmt: skip


def stores(folder: Path) -> list[Store]:
    """The packed layers in a folder. One that was renamed or copied elsewhere is as good: it is told by its checkpoint."""
    found = []
    files = list_stores(folder, SUFFIX)
    whole = {f.path for f in files if f.whole}
    for file in files:
        source = formats = checkpoint = ""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(file.about)
            source, formats, checkpoint = said["source"] or "", said["formats"], said["checkpoint"]
        state: Any = "unknown"
        if file.damage:
            state = "damaged"
        elif not file.whole and file.path in whole:
            state = "left over"
        elif source:
            now = files_of(Path(source))
            state = "current" if now == checkpoint else "gone" if now == "[]" else "changed"
        found.append(Store(file, source, formats, state))
    return found


def remove(found: list[Store]) -> tuple[list[Store], list[Store]]:
    """Remove these; gives those that are removed, and those that stay because a process uses them."""
    gone: list[Store] = []
    stay: list[Store] = []
    for store in found:
        (gone if remove_store(store.file) else stay).append(store)
    return gone, stay
