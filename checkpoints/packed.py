"""A store of layers on disk that is made to be streamed, and the reader that streams it.

safetensors is made for exchange: tensors of any length at any offset, a layer's spread over files. Here a layer is one
record: its arrays one after another, the record's start and length multiples of 4096 and so is the start of every array
of a page or more (smaller ones begin at 64 bytes). So a layer is one long read, which can go past the page cache
(O_DIRECT), straight into memory that is used again and again; nothing is mapped, since a map's page faults come one at
a time, and no array is allocated for a layer, since new memory costs page faults too. The memory is numpy's, which asks
the system for huge pages (direct reads into small ones were a quarter to a third slower). `scripts/bench_disk.py`
measures the disk, the ring, a map and small pages in one run.

    bytes 0 to 24    magic, version, crc32 of the index, its length (little-endian)
    the index        JSON: fingerprint, the kinds of layer (their arrays' names, dtypes, shapes, places), and for each
                     layer its kind, its place, and the crc32 of each block of its record
    the records      in the order of the layers, each padded with zeros to whole pages

Reading past the page cache is the right trade for weights that do not fit in memory: passes over all layers evict each
page before its next use, and the cache would take its copy of every byte. What does fit is said instead, as `keep`:
the first layers then stay in memory of ours and are read once.

Two traps for who hands the arrays to jax. Both give wrong numbers without an error:
- On the CPU backend `jax.device_put` takes a 64-byte-aligned numpy array as it is, without copying, even under
  may_alias=False; the ring would then write the next layer over the last one's weights. Open the reader with
  `copy_out=True`: every layer comes in memory of its own, which jax may keep, and the one copy is made here.
- On other backends `device_put` returns before it has read the array. Call `jax.block_until_ready` on what it gave
  before the layer is released.
Kept layers are never written again, and need neither.

Writing takes as long as reading and encoding a whole model, so what was interrupted goes on: a store is written in a
hidden folder beside its place, `.NAME.partial`, where `done` has a line for each layer that is whole, after one that
says of which store; its name comes last, by a rename. What is left there is continued only by a writer of the same head
(fingerprint, arrays, places), and after every finished layer was read again and has its checksum. The folder's `lock` is
held (flock) by whoever writes, so that a second writer waits, and one that was killed holds nothing. A reader holds a
shared lock on the store itself: `remove_store` leaves what any process has open. To ask whether a lock is held is to hold
it for a moment: who is refused one tries again for `_MOMENT` before it believes that somebody works there.

A disk without locks has a folder for each writer, and in it `owner`: the process. The next writer of the store removes
those whose process has ended.
"""

import bisect
import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import socket
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors import TensorInfo, aligned_empty

Spec = Mapping[str, tuple[Sequence[int], Any]]  # name -> (shape, dtype)

_log = logging.getLogger(__name__)

_DTYPES: dict[str, np.dtype] = {
    np.dtype(t).name: np.dtype(t)
    for t in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e3m4, ml_dtypes.float8_e4m3),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float8_e5m2),
        *(ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
    )
}

_MAGIC = b"JAXLAYER"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")  # magic, version, crc32 of the index, its length
_MAX_INDEX = 1 << 30
_PAGE = 4096
_LINE = 64  # bytes: what jax's CPU backend wants of an array it takes as it is
_BLOCK = 8 << 20  # bytes: what one thread reads at a time, and what one checksum covers
_NEAR = 64 << 10  # bytes between two arrays that are read in one go, and not skipped
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # a lock that another process holds; other errors: there are no locks
_MOMENT, _TRY = 0.2, 0.005  # seconds: longer than a listing holds a lock; between two attempts to get one
_SILENT = 86400  # seconds in which a process that cannot be asked has written nothing: it is taken to have ended
_PARTIAL = ".partial"


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class _Array:
    """An array of a record; `start` counts from the record's."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Kind:
    """What the records of like layers look like."""

    arrays: tuple[_Array, ...]

    @property
    def length(self) -> int:
        return _up(max(a.start + a.nbytes for a in self.arrays), _PAGE)


def _kind(layer: int, spec: Spec) -> _Kind:
    """The layout of a layer's record, or the reason why there is none."""
    if not spec:
        raise CheckpointError(f"Layer {layer} has no arrays: every layer of a store needs at least one.")
    arrays, position = [], 0
    for name, (shape, dtype) in spec.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(
                f"Layer {layer} has an array named {name!r}; a name is a string of at least a letter."
            )
        dtype, shape = np.dtype(dtype), tuple(operator.index(n) for n in shape)
        if _DTYPES.get(dtype.name) != dtype:
            raise CheckpointError(
                f"{name} of layer {layer} is {dtype}, which a packed store does not keep; it "
                f"keeps {', '.join(_DTYPES)}. Pack codes of less than a byte in uint8."
            )
        if any(n < 0 for n in shape):
            raise CheckpointError(f"{name} of layer {layer} has the shape {list(shape)}; no size can be below 0.")
        nbytes = math.prod(shape) * dtype.itemsize
        position = _up(position, _PAGE if nbytes >= _PAGE else _LINE)
        arrays.append(_Array(name, dtype, shape, position))
        position += nbytes
    if not position:
        raise CheckpointError(f"Layer {layer} has only arrays without elements; there is nothing to store.")
    return _Kind(tuple(arrays))


@dataclass
class _Layout:
    """Where everything is in a file; `sums` are the crc32s of each layer's blocks."""

    fingerprint: str
    block: int
    kinds: list[_Kind]
    kind_of: list[int]
    about: str = ""
    sums: list[list[int]] = field(default_factory=list)

    def kind(self, layer: int) -> _Kind:
        return self.kinds[self.kind_of[layer]]

    def blocks(self, layer: int) -> int:
        return -(-self.kind(layer).length // self.block)

    def head(self) -> bytes:
        """Everything before the first record. As long before the sums are known (zeros stand for them) as after."""
        sums = self.sums or [[0] * self.blocks(i) for i in range(len(self.kind_of))]
        text = json.dumps(
            {
                "fingerprint": self.fingerprint,
                **({"about": self.about} if self.about else {}),
                "block": self.block,
                "kinds": [[[a.name, a.dtype.name, list(a.shape), a.start] for a in k.arrays] for k in self.kinds],
                "layers": [
                    {"kind": k, "crc32": "".join(f"{crc:08x}" for crc in crcs)}
                    for k, crcs in zip(self.kind_of, sums, strict=True)
                ],
            },
            separators=(",", ":"),
        ).encode()
        head = _HEAD.pack(_MAGIC, _VERSION, zlib.crc32(text), len(text)) + text
        return head.ljust(_up(len(head), _PAGE), b"\0")

    def starts(self, data: int) -> list[int]:
        """Where each record starts, and where the last ends, when the first starts at `data`."""
        return list(itertools.accumulate((self.kind(i).length for i in range(len(self.kind_of))), initial=data))


def _lay_out(layers: int, specs: Sequence[Spec] | Callable[[int], Spec], fingerprint: str, about: str) -> _Layout:
    if layers < 1:
        raise ValueError(f"layers={layers}: a store has at least one layer.")
    if not callable(specs) and len(specs) != layers:
        raise ValueError(f"layers={layers}, but there are specs for {len(specs)}; give one for each.")
    kinds: dict[_Kind, int] = {}
    kind_of = [kinds.setdefault(_kind(i, specs(i) if callable(specs) else specs[i]), len(kinds)) for i in range(layers)]
    return _Layout(fingerprint, _BLOCK, list(kinds), kind_of, about)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def packed_bytes(
    layers: int, specs: Sequence[Spec] | Callable[[int], Spec], *, fingerprint: str = "", about: str = ""
) -> int:
    """The length of the file that write_packed makes of this."""
    layout = _lay_out(layers, specs, fingerprint, about)
    return layout.starts(len(layout.head()))[-1]


def write_packed(
    path: str | os.PathLike[str],
    layers: int,
    specs: Sequence[Spec] | Callable[[int], Spec],
    read: Callable[[int, str], np.ndarray],
    *,
    fingerprint: str,
    about: str = "",
    overwrite: bool = False,
    keep: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a store of `layers` layers to `path`; it appears there whole or not at all.

    specs[i] (or specs(i)) gives layer i's {name: (shape, dtype)}; layers may differ. `read(layer, name)` is asked for
    one array at a time, in order, and nothing of it is kept. `fingerprint` says what the content is (which model, in
    which format): a reader that expects another refuses the file. `about` is a text for who lists stores. `progress` is
    told the bytes of each array written. keep: a store of this fingerprint and these arrays that is there already, as
    after another process has written it, stays, and nothing is written.

    Layers that an interrupted writer of the same store has finished are not asked for again. While another process
    writes the store, this waits for it, which a warning in the log says.

    CheckpointError if `path` exists and neither `overwrite` nor `keep` is given, if an array is not as announced, and if
    the disk has too little space, which is asked before the first byte.
    """
    layout = _lay_out(layers, specs, fingerprint, about)
    head = layout.head()
    if len(head) > _MAX_INDEX:
        raise CheckpointError(f"The index of {path} would have {len(head)} bytes; the limit is {_MAX_INDEX}.")
    # links are followed: the place a link points to is what gets replaced, never the link
    target = Path(path).expanduser().resolve()

    def there() -> bool:
        if target.is_dir():
            raise CheckpointError(f"{target} is a folder; a file is to be written there. Give another path.")
        if keep and _same(target, layout):
            return True
        if target.exists() and not overwrite:
            raise CheckpointError(f"{target} exists. Give a new file name, or allow overwriting it.")
        return False

    if there():
        return
    with _claimed(target) as folder:
        if not there():
            _Writer(target, folder, layout, head).write(read, progress)


def _same(path: Path, layout: _Layout) -> bool:
    """Whether a store of the same arrays under the same fingerprint is there."""
    try:
        with open(path, "rb") as file:
            found, _ = _parse(path, file.fileno())
    except (OSError, CheckpointError):
        return False
    return (found.fingerprint, found.kinds, found.kind_of) == (layout.fingerprint, layout.kinds, layout.kind_of)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}{_PARTIAL}")


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[Path]:
    """The folder that `target` is written in, for this writer alone; waits for the one that is at it."""
    folder, lock = _partial(target), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while lock is None:
            folder.mkdir(exist_ok=True)
            lock = _take_lock(folder, target)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{target} cannot be made: a folder in its path is a file. Give another path.") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        # some network disks have no locks: nothing that another may be at is gone on with
        for left in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
            if _ended(left):
                _drop(left)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        with contextlib.suppress(OSError):  # the disk may be full
            (folder / "owner").write_text(json.dumps(_process(os.getpid())), encoding="utf-8")
    try:
        yield folder
    finally:
        if lock is None or not (folder / "done").exists():
            _drop(folder)
        if lock is not None:
            os.close(lock)


def _take_lock(folder: Path, target: Path) -> int | None:
    """The lock of a folder, held until it is closed; None: the folder went away meanwhile, as its writer came to an end."""
    path = folder / "lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        try:
            mine = _locked(lock, fcntl.LOCK_EX)
        except OSError:
            if not any(
                (folder / name).exists() for name in ("done", "records")
            ):  # another's layers are not ours to drop
                _drop(folder)
            raise
        if not mine:
            who = os.pread(lock, 100, 0).decode(errors="replace").strip() or "another process"
            _log.warning("%s is being written by %s: waiting until it has ended", target, who)
            fcntl.flock(lock, fcntl.LOCK_EX)
        held = os.fstat(lock)
        try:
            there = path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            os.close(lock)
            return None
        with contextlib.suppress(OSError):  # it is only told to others; the disk may be full
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(lock)
        raise
    return lock


def _locked(descriptor: int, kind: int) -> bool:
    """Whether this kind of lock is had; False: somebody holds another for longer than to ask. OSError: there are none."""
    end = time.monotonic() + _MOMENT
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_TRY)


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from all others there ever are, on this machine or another; {} where the system does not say, or
    if it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        # of the fields after the name, which may hold anything: the state, and the 20th is when it began
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        # a number means nothing in another container
        where = os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    if state in "ZX":
        return {}
    return {"pid": pid, "boot": boot, "namespace": where, "began": fields[18], "host": socket.gethostname()}


def _ended(folder: Path) -> bool:
    """Whether the process that writes into a folder without a lock has ended: it is not among this machine's any more, or
    it is another machine's (or this one's before it was started anew) and has written nothing for a day."""
    if (folder / "lock").exists():
        return False
    try:
        owner = json.loads((folder / "owner").read_bytes())
        if (here := _process(os.getpid())) and all(owner[n] == here[n] for n in ("boot", "namespace", "host")):
            return _process(int(owner["pid"])).get("began") != owner["began"]
    except (OSError, ValueError, TypeError, KeyError):  # as a kill or a full disk left it
        pass
    try:
        last = max(p.stat().st_mtime for p in (folder, *folder.iterdir()))
    except OSError:
        return False
    return time.time() - last > _SILENT


def _drop(folder: Path) -> None:
    """Remove a partial folder: its lock last, since who holds a new one has begun anew."""
    for name in ("done", "records", "owner", "lock"):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


class _UnlikeError(CheckpointError):
    """An array is not what was announced."""


class _Writer:
    """The records of a store into a folder that is its own, and the whole file into its place."""

    def __init__(self, target: Path, folder: Path, layout: _Layout, head: bytes) -> None:
        self._target, self._layout, self._starts = target, layout, layout.starts(len(head))
        self._records, self._done = folder / "records", folder / "done"
        of = {"head": hashlib.sha256(head).hexdigest(), "fingerprint": layout.fingerprint, "about": layout.about}
        self._title = json.dumps(of) + "\n"

    def write(self, read: Callable[[int, str], np.ndarray], progress: Callable[[int], object] | None) -> None:
        layout, size = self._layout, self._starts[-1]
        finished = self._finished()
        begun = self._records.stat().st_blocks * 512 if finished else 0
        system = os.statvfs(self._target.parent)
        if (free := system.f_bavail * system.f_frsize) < size - begun:
            raise CheckpointError(
                f"{self._target} needs {size - begun} bytes and its disk has {free} free: {size - begun - free} too "
                f"few. Free as much there, or give a path on another disk."
            )
        try:
            self._fill(finished, read, progress)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._forget()
            raise CheckpointError(
                f"{self._target} needs {size} bytes, and its disk took no more of them while it was written "
                f"({error.strerror}). Nothing is left of it. Free space there, or give a path on another disk."
            ) from error
        except _UnlikeError:  # what cannot be read now is read at the next attempt; this would come again
            self._forget()
            raise
        finally:
            if self._done.exists() and len(layout.sums) < len(layout.kind_of):
                kept = f"{len(layout.sums)} of {len(layout.kind_of)} layers"
                _log.warning("%s: %s are kept; the next attempt goes on from there", self._target, kept)

    def _forget(self) -> None:
        for file in (self._done, self._records):
            file.unlink(missing_ok=True)

    def _finished(self) -> int:
        """How many first layers an earlier writer of this very store has left whole; their checksums into the layout."""
        layout = self._layout
        try:
            title, _, rest = self._done.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return 0
        try:
            if title.decode() + "\n" != self._title:
                raise ValueError("it is of another store")
            lines = rest.split(b"\n")[:-1]  # what a kill has torn off in the middle has no end of line
            if len(lines) > len(layout.kind_of):
                raise ValueError(f"it has {len(lines)} layers")
            sums = [self._sums(i, line.decode()) for i, line in enumerate(lines)]
            with open(self._records, "rb") as file:
                for i, crcs in enumerate(sums):
                    self._check(file.fileno(), i, crcs)
        except (ValueError, OSError, EOFError) as error:
            _log.warning("%s: what was left of an earlier attempt is not used: %s", self._target, error)
            self._forget()
            return 0
        layout.sums.extend(sums)
        if sums:
            _log.warning(
                "%s: going on after %d of %d layers, which an earlier attempt has left",
                self._target, len(sums), len(layout.kind_of),
            )  # fmt: skip
        return len(sums)

    def _sums(self, layer: int, line: str) -> list[int]:
        text, _, crc = line.partition(" ")
        crcs = bytes.fromhex(text)
        if int(crc, 16) != zlib.crc32(text.encode()) or len(crcs) != 4 * self._layout.blocks(layer):
            raise ValueError(f"the line of layer {layer} is damaged")
        return [int.from_bytes(crcs[j : j + 4], "big") for j in range(0, len(crcs), 4)]

    def _check(self, descriptor: int, layer: int, sums: list[int]) -> None:
        start, end, block = *self._starts[layer : layer + 2], self._layout.block
        for at, said in zip(range(start, end, block), sums, strict=True):
            crc, place = 0, at
            while place < min(at + block, end):
                piece = os.pread(descriptor, min(at + block, end) - place, place)
                if not piece:
                    raise EOFError(f"layer {layer} is cut off")
                crc, place = zlib.crc32(piece, crc), place + len(piece)
            if crc != said:
                raise ValueError(f"layer {layer} is damaged")

    def _fill(
        self, finished: int, read: Callable[[int, str], np.ndarray], progress: Callable[[int], object] | None
    ) -> None:
        """The records, and at last the head, whose checksums are known only then."""
        layout = self._layout
        if finished:  # without the line that a kill has torn off
            os.truncate(self._done, len(self._title.encode()) + sum(len(self._line(crcs)) for crcs in layout.sums))
        descriptor = os.open(self._records, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            if not finished:
                os.ftruncate(descriptor, 0)  # of a layer that was not finished
            with open(self._done, "a" if finished else "w", encoding="utf-8") as done:
                done.write("" if finished else self._title)
                done.flush()
                for layer, start in enumerate(self._starts[:-1]):
                    if layer < finished:
                        if progress is not None:
                            for a in layout.kind(layer).arrays:
                                progress(a.nbytes)
                        continue
                    layout.sums.append(self._record(descriptor, layer, start, read, progress))
                    done.write(self._line(layout.sums[-1]))
                    done.flush()
            _Record(descriptor, 0, layout.block).put(layout.head())
            os.fsync(descriptor)  # some file systems find out only now that the disk is full
        except BaseException:
            if not layout.sums:
                self._forget()
            raise
        finally:
            os.close(descriptor)
        self._records.replace(self._target)
        self._done.unlink()
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # file systems that cannot sync a folder
                os.fsync(folder)
        finally:
            os.close(folder)

    @staticmethod
    def _line(sums: Sequence[int]) -> str:
        text = "".join(f"{crc:08x}" for crc in sums)
        return f"{text} {zlib.crc32(text.encode()):08x}\n"

    def _record(
        self,
        descriptor: int,
        layer: int,
        start: int,
        read: Callable[[int, str], np.ndarray],
        progress: Callable[[int], object] | None,
    ) -> list[int]:
        """One layer; gives its checksums."""
        record, kind = _Record(descriptor, start, self._layout.block), self._layout.kind(layer)
        for a in kind.arrays:
            array = np.asarray(read(layer, a.name))
            if array.dtype != a.dtype or array.shape != a.shape:
                raise _UnlikeError(
                    f"{a.name} of layer {layer} was announced as {a.dtype}{list(a.shape)} and came as "
                    f"{array.dtype}{list(array.shape)}."
                )
            record.put(bytes(a.start - record.length))
            if array.size:
                record.put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress(array.nbytes)
            del array
        record.put(bytes(kind.length - record.length))
        return record.sums


class _Record:
    """Bytes put one after another into a file from `start` on, and the crc32 of each block of them."""

    def __init__(self, descriptor: int, start: int, block: int) -> None:
        self.length = 0
        self.sums: list[int] = []
        self._descriptor, self._start, self._block = descriptor, start, block

    def put(self, what: bytes | memoryview) -> None:
        view = memoryview(what)
        while view:
            room = self._block - self.length % self._block
            if room == self._block:
                self.sums.append(0)
            done = os.pwrite(self._descriptor, view[:room], self._start + self.length)
            self.sums[-1] = zlib.crc32(view[:done], self.sums[-1])
            self.length += done
            view = view[done:]


# ---------------------------------------------------------------------------------------------------------------------
# What is there


@dataclass(frozen=True)
class StoreFile:
    """A store in a folder, or (not `whole`) what an interrupted writer has left of one, under the name it would have.

    nbytes: of disk; used: a process reads or writes it, or the disk has no locks and nothing else tells; about: as it was
    written, '' for a store that says nothing, and for a damaged one, of which `damage` says what is wrong.
    """

    path: Path
    nbytes: int
    whole: bool
    used: bool
    about: str
    damage: str = ""
    mark: tuple[int, ...] = ()


def _mark(path: Path) -> tuple[int, ...]:
    """What tells a file from another that has taken its place; () where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def list_stores(folder: str | os.PathLike[str], suffix: str) -> list[StoreFile]:
    """The stores of a folder, those whose names end so, finished or not, by name."""
    found = []
    for entry in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if entry.name.startswith(".") and entry.name.endswith(_PARTIAL) and entry.is_dir():
            target = entry.with_name(entry.name[1 : -len(_PARTIAL)])
            if suffix not in target.name:
                continue
            about, nbytes = "", 0
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                about = str(json.loads((entry / "done").read_bytes().partition(b"\n")[0])["about"])
            with contextlib.suppress(OSError):
                nbytes = (entry / "records").stat().st_blocks * 512
            lock = entry / "lock"
            used = (
                _used(lock, fcntl.LOCK_SH) if lock.exists() else not _ended(entry)
            )  # without one on disks that have none
            found.append(StoreFile(target, nbytes, False, used, about))
        elif entry.name.endswith(suffix) and entry.is_file():
            about, damage, nbytes, mark = "", "", 0, _mark(entry)
            try:
                nbytes = entry.stat().st_size
                with open(entry, "rb") as file:
                    about = _parse(entry, file.fileno())[0].about
            except FileNotFoundError:
                continue
            except (OSError, CheckpointError) as error:
                damage = str(error)
            found.append(StoreFile(entry, nbytes, True, _used(entry), about, damage, mark))
    return found


def remove_store(store: StoreFile) -> bool:
    """Remove it, unless a process uses it now, or another store stands in its place since it was listed: False."""
    if store.whole:
        with _alone(store.path) as mine:
            mine = mine and _mark(store.path) in ((), store.mark)
            if mine:
                store.path.unlink(missing_ok=True)
            return mine
    folder = _partial(store.path)
    with _alone(folder / "lock") as mine:
        if mine and ((folder / "lock").exists() or _ended(folder)):
            _drop(folder)
        return mine and not folder.exists()


def _used(path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether a process holds a lock on this file that this kind does not go with."""
    with _alone(path, kind) as mine:
        return not mine


def _opened(path: Path) -> int:
    """To be locked: NFS locks alone only what is open for writing (flock(2))."""
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise
    except OSError:  # a file or a disk that is only read
        return os.open(path, os.O_RDONLY)


@contextlib.contextmanager
def _alone(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody else holds a lock on this file (of a shared kind: none that is not), nor gets one before the block
    ends. (Of a file that is not there nobody does.)"""
    try:
        held = _opened(path)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        try:
            mine = _locked(held, kind)
        except OSError:
            mine = False
        yield mine
    finally:
        os.close(held)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Bytes:
    """The bytes of an open file, past the page cache where that works. Threads share it."""

    _FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cached = os.open(path, self._FLAGS)
        self._direct: int | None = None
        self._lock = threading.Lock()
        self._fast = self.cached  # for reads that begin at a page

    def go_direct(self) -> None:
        """Past the page cache from now on, if that works."""
        try:
            self._fast = self._direct = _again(self.path, self.cached, self._FLAGS | os.O_DIRECT)
        except (OSError, AttributeError) as error:  # AttributeError: a system without O_DIRECT (macOS)
            self._say_cached(error)

    def _say_cached(self, error: Exception) -> None:
        _log.warning("%s is read through the page cache, since direct reads do not work there (%s)", self.path, error)

    def fill(self, view: memoryview, start: int, least: int | None = None) -> None:
        """Read len(view) bytes from `start` on; EOFError, which names the file, where it ends before (of `least` of them, if
        given: what comes after is of no use)."""
        done, least = 0, len(view) if least is None else least
        while done < len(view):
            # after a short read the rest may begin anywhere, which a direct read cannot
            descriptor = self.cached if (start + done) % _PAGE else self._fast
            try:
                got = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                if descriptor == self.cached or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                with self._lock:
                    if self._fast != self.cached:  # no other thread has said it
                        self._fast = self.cached
                        self._say_cached(error)
                continue
            if not got:
                if done >= least:
                    return
                raise EOFError(self.path)
            done += got

    def close(self) -> None:
        for descriptor in (self.cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)


class _File:
    """An open store: what is in it, and its bytes."""

    again = " Write the store again."  # what helps where a layer cannot be read

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; a packed store is one file.")
        try:
            self._bytes = _Bytes(path)
        except FileNotFoundError:
            raise CheckpointError(f"There is no file {path}; write_packed makes one.") from None
        try:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(self._bytes.cached, fcntl.LOCK_SH)  # see remove_store, which holds its own for a moment
            if not os.fstat(self._bytes.cached).st_nlink:
                raise CheckpointError(f"There is no file {path}: it has just been removed. Write the store again.")
            self.layout, self.starts = _parse(path, self._bytes.cached)
            if direct:
                self._bytes.go_direct()
        except BaseException:
            self.close()
            raise

    def fill(self, view: memoryview, start: int) -> None:
        """Read len(view) bytes from `start` on; EOFError where the file ends before."""
        self._bytes.fill(view, start)

    def close(self) -> None:
        self._bytes.close()


class _Piece(NamedTuple):
    """Whole pages of a checkpoint's file, `start` on, that stand in a record from `at` on; of `length` bytes `needed` are of
    use, and the file may end after them."""

    file: _Bytes
    start: int
    at: int
    length: int
    needed: int


class _InPlace:
    """Layers where a checkpoint's own files have them: a record is the pages that a layer's arrays stand in, those of one
    file that are near each other in one piece. There are no checksums."""

    again = ""

    def __init__(self, layers: Sequence[Mapping[str, TensorInfo]], direct: bool) -> None:
        if not layers or not all(layers):
            raise ValueError("There are layers without arrays; each needs at least one.")
        paths = sorted({info.file for layer in layers for info in layer.values()})
        self.path = paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
        self._files: dict[Path, _Bytes] = {}
        try:
            for path in paths:
                try:
                    self._files[path] = _Bytes(path)
                except FileNotFoundError:
                    raise CheckpointError(f"There is no file {path}: it was removed since it was opened.") from None
                size = os.fstat(self._files[path].cached).st_size
                if size < (end := max(i.end for layer in layers for i in layer.values() if i.file == path)):
                    raise CheckpointError(f"{path} has {size} bytes, and its header says {end}: it is cut off.")
                if direct:
                    self._files[path].go_direct()
        except BaseException:
            self.close()
            raise
        kinds: dict[_Kind, int] = {}
        kind_of, self._pieces = [], []
        for layer in layers:
            kind, pieces = self._record(layer)
            kind_of.append(kinds.setdefault(kind, len(kinds)))
            self._pieces.append(pieces)
        self.layout = _Layout("", _BLOCK, list(kinds), kind_of)
        self.starts = self.layout.starts(0)

    def _record(self, layer: Mapping[str, TensorInfo]) -> tuple[_Kind, list[_Piece]]:
        """What a layer's record looks like, and what it is made of."""
        pieces: list[_Piece] = []
        starts: dict[str, int] = {}
        for name, info in sorted(layer.items(), key=lambda item: (item[1].file, item[1].start)):
            first, file = info.start // _PAGE * _PAGE, self._files[info.file]
            last = pieces[-1] if pieces else None
            if last is None or last.file is not file or first - (last.start + last.length) > _NEAR:
                last = _Piece(file, first, last.at + last.length if last else 0, 0, 0)
                pieces.append(last)
            needed = max(last.needed, info.end - last.start)
            pieces[-1] = last._replace(length=max(_up(needed, _PAGE), _PAGE), needed=needed)
            starts[name] = last.at + info.start - last.start
        return _Kind(tuple(_Array(n, i.dtype, i.shape, starts[n]) for n, i in layer.items())), pieces

    def fill(self, view: memoryview, start: int) -> None:
        """Read len(view) bytes of the records, one after another, from `start` on; EOFError where a file ends before."""
        layer = bisect.bisect_right(self.starts, start) - 1
        begin = start - self.starts[layer]
        end = begin + len(view)
        for piece in self._pieces[layer]:
            lo, hi = max(piece.at, begin), min(piece.at + piece.length, end)
            if lo < hi:
                least = max(0, min(hi - lo, piece.at + piece.needed - lo))
                piece.file.fill(view[lo - begin : hi - begin], piece.start + lo - piece.at, least)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _again(path: Path, descriptor: int, flags: int) -> int:
    """A further descriptor of an open file, which another may have taken the place of; OSError where none can be had."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    except FileNotFoundError:  # a system without it
        found = os.open(path, flags)
    if os.path.samestat(os.fstat(found), os.fstat(descriptor)):
        return found
    os.close(found)
    raise OSError("another file has taken its place meanwhile")


def _parse(path: Path, descriptor: int) -> tuple[_Layout, list[int]]:
    """The layout, checked against the file's length, and where each record starts."""
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _HEAD.size, 0)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a packed store: it does not begin with {_MAGIC.decode()}.")
    _, version, crc, length = _HEAD.unpack(head)
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is a packed store of version {version}, and this reads version {_VERSION}. Write it again."
        )
    data = _up(_HEAD.size + length, _PAGE)
    if length > _MAX_INDEX or data > size:
        raise CheckpointError(
            f"{path} says its index has {length} bytes, but the whole file has {size}: it is cut off. Write it again."
        )
    text = b""
    while len(text) < length and (more := os.pread(descriptor, length - len(text), _HEAD.size + len(text))):
        text += more
    if zlib.crc32(text) != crc:
        raise CheckpointError(f"{path} is damaged: its index does not have the crc32 {crc:08x}. Write it again.")
    try:
        layout = _understand(json.loads(text))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has an index that makes no sense ({error}). Write it again.") from None
    starts = layout.starts(data)
    if starts[-1] != size:
        raise CheckpointError(
            f"{path} has {size} bytes, and its {len(layout.kind_of)} layers need {starts[-1]}: it "
            f"{'is cut off' if size < starts[-1] else 'has grown'}. Write it again."
        )
    return layout, starts


def _understand(index: Any) -> _Layout:
    """The index as a layout that could have been written: ValueError, or what Python raises, for any other."""
    kind_of = [entry["kind"] for entry in index["layers"]]
    layout = _Layout(index["fingerprint"], index["block"], [], kind_of, index.get("about", ""))
    for i, arrays in enumerate(index["kinds"]):
        kind = _kind(i, {name: (shape, _DTYPES[dtype]) for name, dtype, shape, _ in arrays})
        if len(kind.arrays) != len(arrays) or [a.start for a in kind.arrays] != [start for *_, start in arrays]:
            raise ValueError(f"arrays of kind {i} are not where they belong")
        layout.kinds.append(kind)
    if not isinstance(layout.fingerprint, str) or not isinstance(layout.about, str) or not layout.kind_of:
        raise ValueError("no fingerprint or no layers")
    if type(layout.block) is not int or layout.block < _PAGE or layout.block % _PAGE:
        raise ValueError(f"blocks of {layout.block} bytes")
    for i, entry in enumerate(index["layers"]):
        if type(layout.kind_of[i]) is not int or not 0 <= layout.kind_of[i] < len(layout.kinds):
            raise ValueError(f"layer {i} is of kind {layout.kind_of[i]}")
        crcs = bytes.fromhex(entry["crc32"])
        if len(crcs) != 4 * layout.blocks(i):
            raise ValueError(f"layer {i} has {len(crcs) // 4} checksums for {layout.blocks(i)} blocks")
        layout.sums.append([int.from_bytes(crcs[j : j + 4], "big") for j in range(0, len(crcs), 4)])
    return layout


@dataclass(eq=False)
class _Fill:
    """One layer on its way from the file into `buffer`; there when no block is `left`, unless there is an error."""

    layer: int
    buffer: np.ndarray
    check: bool
    left: int
    slot: int | None  # which buffer of the ring; None for a kept layer's own
    first: int = 0  # the block that the buffer begins with
    unwanted: bool = False
    error: BaseException | None = None


@dataclass(frozen=True)
class ReaderStats:
    """What a reader has done since it was opened.

    layers: taken in turn; waits: of those, how many were not there yet; bytes_read: from the file; read_seconds: of all
    threads together, checksums included; wait_seconds: of the consumer, for layers that were not there yet.
    """

    layers: int
    waits: int
    bytes_read: int
    read_seconds: float
    wait_seconds: float


class _Threads:
    """Threads that fill buffers, block by block, in the order they are asked to.

    They know the file and not the reader, so that a reader which is dropped without being closed can be collected, and
    ends them.
    """

    def __init__(self, file: _File | _InPlace, count: int) -> None:
        self.lock = threading.RLock()
        self._file, self._count, self._alive = file, count, 0
        self._asked, self._filled = threading.Condition(self.lock), threading.Condition(self.lock)
        self._blocks: deque[tuple[_Fill, int]] = deque()
        self._threads: list[threading.Thread] = []
        self.closed = False
        self.bytes_read, self.seconds = 0, 0.0

    def ask(self, fill: _Fill) -> None:
        with self.lock:
            if self.closed:  # by another thread: the consumer is told when it waits
                return
            while len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, name=f"packed-{len(self._threads)}", daemon=True)
                thread.start()
                self._alive += 1
                self._threads.append(thread)
            self._blocks.extend((fill, i) for i in range(fill.left))
            self._asked.notify_all()

    def wait(self, fill: _Fill) -> None:
        """Until the last block is there; Ctrl-C interrupts it."""
        with self.lock:
            while fill.left and not self.closed:
                self._filled.wait()

    def _work(self) -> None:
        try:
            while True:
                with self.lock:
                    while not self._blocks and not self.closed:
                        self._asked.wait()
                    if self.closed:
                        return
                    fill, block = self._blocks.popleft()
                if not fill.unwanted and fill.error is None:
                    try:
                        self.read(fill, block)
                    except BaseException as error:
                        fill.error = fill.error or error  # for the consumer: take() raises it
                with self.lock:
                    fill.left -= 1
                    if not fill.left:
                        self._filled.notify_all()
                del fill  # while it waits a thread holds no buffer
        finally:
            with self.lock:
                self._alive -= 1
                if not self._alive:
                    self._file.close()

    def read(self, fill: _Fill, block: int) -> None:
        """One block into its place, checked if it is to be."""
        file, layout = self._file, self._file.layout
        at = (block - fill.first) * layout.block
        view = fill.buffer.data[at : at + layout.block]
        start = file.starts[fill.layer] + block * layout.block
        where, begun = f"{file.path}: layer {fill.layer}", time.perf_counter()
        try:
            file.fill(view, start)
        except EOFError as ended:
            raise CheckpointError(
                f"{ended}: layer {fill.layer} is cut off: the file became shorter since it was opened."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror}.") from error
        if fill.check and (crc := zlib.crc32(view)) != (said := layout.sums[fill.layer][block]):
            raise CheckpointError(
                f"{where} is damaged: bytes {start} to {start + len(view)} have the crc32 {crc:08x}, and the index says "
                f"{said:08x}.{file.again}"
            )
        with self.lock:
            self.bytes_read += len(view)
            self.seconds += time.perf_counter() - begun

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self._blocks.clear()
            self._asked.notify_all()
            self._filled.notify_all()
            if not self._threads:
                self._file.close()
        for thread in self._threads:
            if (
                thread is not threading.current_thread()
            ):  # a collected reader is closed by any thread, even one of these
                thread.join()


@dataclass
class _Lease:
    arrays: dict[str, np.ndarray]
    slot: int | None


class PackedReader:
    """The layers of a store, one after another in an order announced, read ahead of their use.

        with PackedReader(path, keep=8) as reader:
            reader.order(itertools.cycle(range(reader.layers)))
            while ...:
                with reader.layer() as arrays:
                    ...

    `depth` buffers, each as long as the longest layer that is not kept, are filled by `threads` threads; one is filled
    again only after its layer is released, so that the ring holds at most `depth` layers whatever the order. The first
    `keep` layers stay in memory from their first reading on. One thread consumes.

    fingerprint  what the store must be of; None takes any.
    verify       check each layer's crc32: when it is first read, always or never.
    direct       read past the page cache where the file system can; else through it, and one log line says so.
    copy_out     give each layer in memory of its own, which the consumer may keep (the head of this file says who must).

    In the place of a path `layers` may stand, {name: where its bytes are} of each (Table.where): they are then read where a
    checkpoint's own safetensors have them. Those hold no checksums: nothing is verified, and there is no fingerprint.

    CheckpointError, naming the file (and the layer, where one is at fault), for all that is wrong with the store: at
    once where the index tells, and otherwise from `next` or `layer`, in the turn of the layer that could not be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[Mapping[str, TensorInfo]],
        *,
        fingerprint: str | None = None,
        keep: int = 0,
        depth: int = 3,
        threads: int = 2,
        verify: Literal["first", "always", "never"] = "first",
        direct: bool = True,
        copy_out: bool = False,
    ) -> None:
        if depth < 1 or threads < 1:
            raise ValueError(f"depth={depth}, threads={threads}: a reader needs at least one of each.")
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify={verify!r}: choose 'first', 'always' or 'never'.")
        if isinstance(path, (str, os.PathLike)):
            file = _File(Path(path), direct)
        elif fingerprint is not None or verify == "always":
            raise ValueError("layers that are read where a checkpoint has them have no fingerprint and no checksums.")
        else:
            file, verify = _InPlace(path, direct), "never"
        self.path, self.keep, self.depth = file.path, keep, depth
        try:
            self._layout = file.layout
            self.layers = len(file.layout.kind_of)
            self.fingerprint = file.layout.fingerprint
            if fingerprint not in (None, self.fingerprint):
                raise CheckpointError(
                    f"{self.path} holds other layers than it should: its fingerprint is {self.fingerprint!r}, and "
                    f"{fingerprint!r} is expected. Write the store again."
                )
            if not 0 <= keep <= self.layers:
                raise ValueError(
                    f"keep={keep}: {self.path} has {self.layers} layers, so 0 to {self.layers} can be kept."
                )
            self._longest = max((self.nbytes(i) for i in range(keep, self.layers)), default=0)
            self._ring = [
                aligned_empty((self._longest,), np.dtype(np.uint8)) for _ in range(depth if self._longest else 0)
            ]
        except BaseException:
            file.close()
            raise
        self._verify, self._copy_out = verify, copy_out
        self._checked: set[int] = set()
        self._free = list(range(len(self._ring)))
        self._kept: dict[int, _Fill] = {}
        self._source: Iterator[int] = iter(())
        self._following: int | None = None  # the next of `_source`, for which there is no buffer yet
        self._line: deque[_Fill] = deque()  # what is asked for and not yet taken
        self._dropped: list[tuple[_Fill, int]] = []  # asked for, not to be taken: their buffers are not free yet
        self._leases: deque[_Lease] = deque()
        self._threads, self._taken, self._waits, self._waited = _Threads(file, threads), 0, 0, 0.0
        self._end = weakref.finalize(self, self._threads.close)

    def spec(self, layer: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{name: (shape, dtype)} of a layer's arrays."""
        return {a.name: (a.shape, a.dtype) for a in self._layout.kind(self._index(layer)).arrays}

    def nbytes(self, layer: int) -> int:
        """The bytes that reading this layer brings from disk: its arrays and their padding."""
        return self._layout.kind(self._index(layer)).length

    @property
    def buffer_bytes(self) -> int:
        """The memory of the ring."""
        return len(self._ring) * self._longest

    @property
    def resident_bytes(self) -> int:
        """The memory of the ring and of the kept layers, once they have all been read."""
        return self.buffer_bytes + sum(self.nbytes(i) for i in range(self.keep))

    @property
    def stats(self) -> ReaderStats:
        """What has been read and waited for; the same after `close`."""
        with self._threads.lock:
            read, seconds = self._threads.bytes_read, self._threads.seconds
        return ReaderStats(self._taken, self._waits, read, seconds, self._waited)

    def array(self, layer: int, name: str) -> np.ndarray:
        """One array of a layer, in memory of its own, read now and out of turn: the blocks that it stands in, checked."""
        self._refuse_closed()
        layer, block = self._index(layer), self._layout.block
        a = next((a for a in self._layout.kind(layer).arrays if a.name == name), None)
        if a is None:
            raise ValueError(f"Layer {layer} of {self.path} has no {name!r}; it has {', '.join(self.spec(layer))}.")
        first, last = a.start // block, max(a.start, a.start + a.nbytes - 1) // block
        length = min((last + 1) * block, self.nbytes(layer)) - first * block
        fill = _Fill(layer, aligned_empty((length,), np.dtype(np.uint8)), self._verify != "never", 1, None, first=first)
        for i in range(first, last + 1):
            self._threads.read(fill, i)
        start = a.start - first * block
        return _own(fill.buffer[start : start + a.nbytes].view(a.dtype).reshape(a.shape))

    def _index(self, layer: int) -> int:
        layer = operator.index(layer)
        if not 0 <= layer < self.layers:
            raise ValueError(f"There is no layer {layer} in {self.path}; it has layers 0 to {self.layers - 1}.")
        return layer

    def order(self, layers: Iterable[int]) -> None:
        """Announce the layers that will be taken, and begin to read them. Endless is best: reading then goes on from
        pass to pass.

        It replaces what was announced before and is not taken yet. `layers` is drawn from in the calls of this object,
        never in another thread.
        """
        self._refuse_closed()
        for fill in self._line:
            if fill.slot is not None:  # a kept layer, once begun, is read to its end
                fill.unwanted = True
                self._dropped.append((fill, fill.slot))
        self._line.clear()
        self._source, self._following = iter(layers), None
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._dropped:  # at most one block for each thread is still being read
            self._threads.wait(self._dropped[-1][0])
            self._free.append(self._dropped.pop()[1])
        while len(self._line) < self.depth + self.keep:
            if self._following is None:
                layer = next(self._source, None)
                if layer is None:
                    return
                self._following = self._index(layer)
            layer = self._following
            if layer < self.keep:
                fill = self._kept.get(layer)
                if fill is None or fill.error is not None:
                    fill = self._kept[layer] = self._ask(
                        layer, aligned_empty((self.nbytes(layer),), np.dtype(np.uint8))
                    )
            elif self._free:
                slot = self._free.pop(0)
                fill = self._ask(layer, self._ring[slot][: self.nbytes(layer)], slot)
            else:
                return
            self._line.append(fill)
            self._following = None

    def _ask(self, layer: int, buffer: np.ndarray, slot: int | None = None) -> _Fill:
        check = self._verify == "always" or (self._verify == "first" and layer not in self._checked)
        fill = _Fill(layer, buffer, check, self._layout.blocks(layer), slot)
        self._threads.ask(fill)
        return fill

    def _take(self) -> _Lease:
        self._refuse_closed()
        self._read_ahead()
        if not self._line:
            if self._following is not None:
                raise RuntimeError(
                    f"All {self.depth} buffers hold layers that are not released, so layer {self._following} cannot be "
                    f"read. Release one first, or open the reader with a larger depth."
                )
            raise RuntimeError("All layers that order() announced have been taken. Call order() again.")
        fill, begun = self._line[0], time.perf_counter()
        waited = bool(fill.left)
        self._threads.wait(fill)
        took = time.perf_counter() - begun
        self._refuse_closed()
        self._line.popleft()
        if fill.error is not None:
            if fill.slot is not None:
                self._free.append(fill.slot)
            raise fill.error
        self._taken, self._waits, self._waited = self._taken + 1, self._waits + waited, self._waited + waited * took
        self._checked.add(fill.layer)
        arrays = self._views(fill)
        if fill.slot is not None and self._copy_out:
            arrays = {name: _own(array) for name, array in arrays.items()}
            self._free.append(fill.slot)
            self._read_ahead()
            return _Lease(arrays, None)
        return _Lease(arrays, fill.slot)

    def _views(self, fill: _Fill) -> dict[str, np.ndarray]:
        views = {}
        for a in self._layout.kind(fill.layer).arrays:
            view = fill.buffer[a.start : a.start + a.nbytes].view(a.dtype).reshape(a.shape)
            # a safetensors file may begin at any byte, and an array that does is not what all of its readers take
            views[a.name] = view if view.flags.aligned else _own(view)
            views[a.name].flags.writeable = False
        return views

    def _give_back(self, lease: _Lease) -> None:
        if lease.slot is not None:
            self._free.append(lease.slot)
            lease.slot = None
        if not self._threads.closed:
            self._read_ahead()

    def next(self) -> dict[str, np.ndarray]:
        """The arrays of the next layer in order; waits until they are there. They are read-only views of a buffer, right
        until `release`."""
        lease = self._take()
        self._leases.append(lease)
        return lease.arrays

    def release(self) -> None:
        """The layer that `next` gave longest ago is done with: its buffer is filled anew."""
        if not self._leases:
            raise RuntimeError("release() without a layer that next() gave.")
        self._give_back(self._leases.popleft())

    @contextlib.contextmanager
    def layer(self) -> Iterator[dict[str, np.ndarray]]:
        """`next`, and the release when the block ends."""
        lease = self._take()
        try:
            yield lease.arrays
        finally:
            self._give_back(lease)

    def _refuse_closed(self) -> None:
        if self._threads.closed:
            raise ValueError(f"The reader of {self.path} is closed.")

    def close(self) -> None:
        """Stop reading and end the threads. Arrays that were given out stay as they are."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _own(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
