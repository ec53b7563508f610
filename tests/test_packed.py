"""checkpoints.packed: what comes out of the ring is what went into the file, whatever the order, the disk and the thread
that fails. The format is read here a second time, with struct, json and numpy alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import io
import itertools
import json
import logging
import math
import os
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoints import CheckpointError, packed
from checkpoints.packed import PackedReader, Spec, list_stores, packed_bytes, remove_store, write_packed
from checkpoints.safetensors import TensorInfo

ROOT = Path(__file__).parent.parent
PAGE = 4096
LAYERS = 6
FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
EIGHT_BITS = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu, np.int8, np.uint8, np.bool_)
SPEC: Spec = {
    "q": ((33, 40), ml_dtypes.bfloat16),
    "norm": ((40,), np.float32),
    "codes": ((3, 5000), np.uint8),
    "scale": ((), np.float16),
}


def value(layer: int, name: str, spec: Spec = SPEC) -> np.ndarray:
    """An array whose every bit is a matter of layer and name."""
    shape, dtype = spec[name]
    rng = np.random.default_rng([layer, *name.encode()])
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return rng.integers(0, 256, n, dtype=np.uint8).view(dtype).reshape(shape)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def right(arrays: dict[str, np.ndarray], layer: int, spec: Spec = SPEC) -> bool:
    """The arrays are the layer's, to the bit (numbers would not do: there are NaNs among them)."""
    return list(arrays) == list(spec) and all(
        a.dtype == np.dtype(spec[n][1]) and a.shape == tuple(spec[n][0]) and bits(a) == bits(value(layer, n, spec))
        for n, a in arrays.items()
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of six like layers, of several blocks each."""
    monkeypatch.setattr(packed, "_BLOCK", 2 * PAGE)
    write_packed(tmp_path / "store", LAYERS, [SPEC] * LAYERS, value, fingerprint="a model")
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """After each test: no thread of ours, no open file of ours."""
    before = open_files()
    yield
    assert not ours(), "threads are left"
    assert open_files() <= before


def ours() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("packed-")]


def open_files() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(entry))
    return {f for f in found if f.endswith("/store")}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets that are read from now on."""
    offsets: list[int] = []
    preadv = os.preadv

    def count(descriptor: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    return offsets


# ---------------------------------------------------------------------------------------------------------------------
# The file


def by_hand(path: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """The index and the layers, by what the head of packed.py says of the format."""
    raw = path.read_bytes()
    magic, version, crc, length = struct.unpack_from("<8sIIQ", raw)
    assert (magic, version) == (b"JAXLAYER", 1)
    assert zlib.crc32(raw[24 : 24 + length]) == crc
    index = json.loads(raw[24 : 24 + length])
    position = -(-(24 + length) // PAGE) * PAGE
    assert not any(raw[24 + length : position])
    layers = []
    for entry in index["layers"]:
        arrays, used = {}, []
        for name, dtype, shape, start in index["kinds"][entry["kind"]]:
            dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(raw, dtype, count, position + start).reshape(shape)
            used.append((start, start + arrays[name].nbytes))
            assert start % (PAGE if arrays[name].nbytes >= PAGE else 64) == 0
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
        end = position + -(-used[-1][1] // PAGE) * PAGE
        sums = [zlib.crc32(raw[i : min(i + index["block"], end)]) for i in range(position, end, index["block"])]
        assert entry["crc32"] == "".join(f"{s:08x}" for s in sums)
        layers.append(arrays)
        position = end
    assert position == len(raw)
    return index, layers


def test_the_file_is_what_its_head_says(path: Path) -> None:
    index, layers = by_hand(path)
    assert index["fingerprint"] == "a model"
    assert len(index["kinds"]) == 1
    assert len(index["layers"][0]["crc32"]) > 8  # more than one block, or the tests below show little
    for i, arrays in enumerate(layers):
        assert right(arrays, i)
    assert path.stat().st_size == packed_bytes(LAYERS, [SPEC] * LAYERS, fingerprint="a model")
    with PackedReader(path) as reader:
        assert reader.fingerprint == "a model"
        assert reader.spec(2) == {n: (tuple(s), np.dtype(d)) for n, (s, d) in SPEC.items()}


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_every_dtype_comes_back(tmp_path: Path, direct: bool, verify: Any) -> None:
    spec: Spec = {f"{np.dtype(d).name}.{len(s)}": (s, d) for d in FLOATS + EIGHT_BITS for s in ((), (7,), (2, 3, 1000))}
    spec = {**spec, "long": ((1, 1), np.int64), "none": ((0, 4), np.float32), "ä b/c": ((3,), np.uint16)}
    write_packed(tmp_path / "store", 2, [spec] * 2, lambda i, n: value(i, n, spec), fingerprint="x")
    by_hand(tmp_path / "store")
    with PackedReader(tmp_path / "store", direct=direct, verify=verify) as reader:
        reader.order([1, 0])
        for i in (1, 0):
            with reader.layer() as arrays:
                assert right(arrays, i, spec)
                assert all(a.ctypes.data % (PAGE if a.nbytes >= PAGE else 64) == 0 for a in arrays.values() if a.size)
                assert not any(a.flags.writeable for a in arrays.values())


def test_unlike_layers(tmp_path: Path) -> None:
    big: Spec = {"experts": ((4, 70, 64), ml_dtypes.float8_e4m3fn), "router": ((4, 64), np.float32)}
    small: Spec = {"gate": ((10, 64), np.int8)}
    kinds = [small, big, small, small, big]
    for name, specs in (("listed", kinds), ("asked", kinds.__getitem__)):
        write_packed(tmp_path / name, 5, specs, lambda i, n: value(i, n, kinds[i]), fingerprint="x")
    assert (tmp_path / "listed").read_bytes() == (tmp_path / "asked").read_bytes()
    index, _ = by_hand(tmp_path / "asked")
    assert [entry["kind"] for entry in index["layers"]] == [0, 1, 0, 0, 1]
    with PackedReader(tmp_path / "asked", depth=2, keep=1) as reader:
        assert [reader.nbytes(i) for i in range(5)] == [PAGE, 5 * PAGE, PAGE, PAGE, 5 * PAGE]
        assert reader.buffer_bytes == 2 * 5 * PAGE
        assert reader.resident_bytes == reader.buffer_bytes + PAGE
        reader.order([*range(5), *reversed(range(5))])
        for i in (*range(5), *reversed(range(5))):
            with reader.layer() as arrays:
                assert right(arrays, i, kinds[i])


def test_what_read_gives_need_not_be_contiguous(tmp_path: Path, path: Path) -> None:
    def strided(layer: int, name: str) -> Any:
        array = value(layer, name)
        return np.asfortranarray(array) if array.ndim == 2 else array

    write_packed(tmp_path / "other", LAYERS, [SPEC] * LAYERS, strided, fingerprint="a model")
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_one_array_at_a_time_and_progress(tmp_path: Path) -> None:
    told: list[int] = []
    given: list[weakref.ref[np.ndarray]] = []

    def read(layer: int, name: str) -> np.ndarray:
        assert not any(ref() is not None for ref in given), "an array is kept after it was written"
        array = value(layer, name)
        given.append(weakref.ref(array))
        return array

    write_packed(tmp_path / "store", 2, [SPEC] * 2, read, fingerprint="x", progress=told.append)
    assert len(given) == 2 * len(SPEC)
    assert told == [value(0, name).nbytes for name in SPEC] * 2


@pytest.mark.parametrize(
    ("layers", "specs", "message"),
    [
        (0, [], "layers=0"),
        (2, [SPEC], "specs for 1"),
        (1, [{}], "Layer 0 has no arrays"),
        (1, [{"": ((2,), np.int8)}], "named ''"),
        (2, [SPEC, {"x": ((2, -1), np.int8)}], r"x of layer 1 has the shape \[2, -1\]"),
        (1, [{"x": ((2,), ml_dtypes.int4)}], "int4, which .* uint8"),
        (1, [{"x": ((2,), ">f4")}], ">f4, which"),
        (1, [{"x": ((2,), object)}], "object, which"),
        (1, [{"x": ((2, 0), np.int8)}], "without elements"),
    ],
)
def test_refused_before_anything_is_read(tmp_path: Path, layers: int, specs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_packed(tmp_path / "store", layers, specs, lambda i, n: pytest.fail("it was read"), fingerprint="x")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_loses_no_finished_layer(tmp_path: Path) -> None:
    def gone(i: int, n: str) -> np.ndarray:
        if i == 1:
            raise CheckpointError("the source was cut off")
        return value(i, n)

    read: list[int] = []
    with pytest.raises(CheckpointError, match="cut off"):
        write_packed(tmp_path / "store", 2, [SPEC] * 2, gone, fingerprint="x", keep=True)
    write_packed(
        tmp_path / "store", 2, [SPEC] * 2, lambda i, n: read.append(i) or value(i, n), fingerprint="x", keep=True
    )
    assert set(read) == {1}


def test_a_disk_that_loses_its_locks_keeps_what_another_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(i: int, n: str) -> np.ndarray:
        if i == 1:
            raise KeyboardInterrupt
        return value(i, n)

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "store", 2, [SPEC] * 2, gone, fingerprint="x", keep=True)
    [left] = tmp_path.iterdir()
    before = (left / "records").read_bytes()

    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patched:
        patched.setattr(packed.fcntl, "flock", no_locks)
        write_packed(tmp_path / "store", 2, [SPEC] * 2, value, fingerprint="another", keep=True)
    assert (left / "records").read_bytes() == before


def test_a_store_written_since_it_was_listed_is_not_removed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_bytes(b"no store")
    [listed] = packed.list_stores(tmp_path, "store")
    write_packed(store, 2, [SPEC] * 2, value, fingerprint="x", overwrite=True)
    assert not packed.remove_store(listed)
    assert store.exists()


def test_not_what_was_announced(tmp_path: Path) -> None:
    for wrong in (np.zeros((33, 41), ml_dtypes.bfloat16), np.zeros((33, 40), np.float32)):
        with pytest.raises(CheckpointError, match=r"q of layer 1 was announced as bfloat16\[33, 40\] and came as"):
            write_packed(
                tmp_path / "store",
                2,
                [SPEC] * 2,
                lambda i, n, wrong=wrong: wrong if (i, n) == (1, "q") else value(i, n),
                fingerprint="x",
            )
        assert not list(tmp_path.iterdir())


def test_a_file_is_overwritten_only_when_allowed(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        write_packed(path, 1, [SPEC], lambda i, n: pytest.fail("it was read"), fingerprint="x")
    assert path.read_bytes() == before
    write_packed(path, 1, [SPEC], value, fingerprint="x", overwrite=True)
    assert len(by_hand(path)[1]) == 1


def test_too_little_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = packed_bytes(2, [SPEC] * 2, fingerprint="x")

    class Disk:
        f_frsize, f_bavail = 512, need // 512 - 1

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(CheckpointError, match=f"needs {need} bytes and its disk has {need - 512} free"):
        write_packed(tmp_path / "store", 2, [SPEC] * 2, lambda i, n: pytest.fail("it was read"), fingerprint="x")
    assert not list(tmp_path.iterdir())
    Disk.f_bavail += 1
    write_packed(tmp_path / "store", 2, [SPEC] * 2, value, fingerprint="x")


@pytest.mark.parametrize("where", ["pwrite", "fsync"])
@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, old: bool) -> None:
    if old:
        (tmp_path / "store").write_text("old")
    calls, real = itertools.count(), getattr(os, where)

    def full(*given: Any) -> Any:
        if where == "pwrite" and next(calls) < 5:
            return real(*given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes.*No space left"):
        write_packed(tmp_path / "store", 2, [SPEC] * 2, value, fingerprint="x", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["store"] * old
    assert not old or (tmp_path / "store").read_text() == "old"


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="broken"):
        write_packed(tmp_path / "store", 2, [SPEC] * 2, value, fingerprint="x")
    assert not list(tmp_path.iterdir())


def test_writes_that_do_less_than_asked(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, what, at: pwrite(descriptor, what[:1000], at))
    write_packed(tmp_path / "other", LAYERS, [SPEC] * LAYERS, value, fingerprint="a model")
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, numpy as np\n"
        "from checkpoints.packed import write_packed\n"
        "def read(layer, name):\n"
        "    if layer == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return np.zeros((100000,), np.uint8)\n"
        "write_packed(sys.argv[1], 3, [{'x': ((100000,), np.uint8)}] * 3, read, fingerprint='x')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name != "store"
    write_packed(tmp_path / "store", 1, [SPEC], value, fingerprint="x")  # and clears away what was left
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


# ---------------------------------------------------------------------------------------------------------------------
# Writers that are interrupted, and several of them

WRITER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from checkpoints import packed
from checkpoints.packed import write_packed

packed._BLOCK = 8192
place, out, how, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def read(layer, name):
    with open(out / f"read-{os.getpid()}", "a") as said:
        print(layer, file=said)
    if layer == at and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if layer == at and how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    while layer == at and how == "wait" and not (out / "go").exists():
        (out / "waits").touch()
        time.sleep(0.01)
    return np.random.default_rng(layer).integers(0, 256, (20000 + layer,), dtype=np.uint8)

specs = [{"x": ((20000 + i,), np.uint8)} for i in range(5)]
write_packed(place, 5, specs, read, fingerprint=sys.argv[5], keep=True)
"""


def writer(
    tmp_path: Path, how: str = "", at: int = -1, fingerprint: str = "x", place: str = "stores/store"
) -> subprocess.Popen[str]:
    out = tmp_path / "said"
    out.mkdir(exist_ok=True)
    words = [sys.executable, "-c", WRITER, str(tmp_path / place), str(out), how, str(at), fingerprint]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def reads(tmp_path: Path, process: subprocess.Popen[str]) -> list[int]:
    file = tmp_path / "said" / f"read-{process.pid}"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def until_it_waits(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    while not (tmp_path / "said/waits").exists():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of a writer that nothing happens to."""
    process = writer(tmp_path, place="elsewhere/store")
    assert ended(process)[0] == 0
    assert reads(tmp_path, process) == [0, 1, 2, 3, 4]
    return (tmp_path / "elsewhere/store").read_bytes()


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_writer_is_gone_on_with(tmp_path: Path, whole: bytes, how: str) -> None:
    for at, begins in ((2, 0), (4, 2)):
        process = writer(tmp_path, how, at)
        code, said = ended(process)
        assert code == (-signal.SIGKILL if how == "kill" else -signal.SIGINT), said
        assert reads(tmp_path, process) == list(range(begins, at + 1))
        assert not (tmp_path / "stores/store").exists()
        if how == "interrupt":
            assert f"{at} of 5 layers are kept" in said
    process = writer(tmp_path)
    code, said = ended(process)
    assert code == 0, said
    assert "going on after 4 of 5 layers" in said
    assert reads(tmp_path, process) == [4]
    assert (tmp_path / "stores/store").read_bytes() == whole
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("file", "change", "again"),
    [
        ("records", lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:], True),
        ("records", lambda raw: raw[:-30000], True),
        ("done", lambda raw: raw.replace(b"\n", b"0\n"), True),
        ("done", lambda raw: raw[:-12] + b"\xff" + raw[-11:], True),
        ("done", lambda raw: raw + raw.splitlines(keepends=True)[-1] * 3, True),
        ("done", lambda raw: raw[:-3], False),  # torn off by the kill: the layer before it is the last
        ("done", lambda raw: b"", True),
    ],
)
def test_what_is_damaged_is_not_gone_on_with(
    tmp_path: Path, whole: bytes, file: str, change: Callable[[bytes], bytes], again: bool
) -> None:
    assert ended(writer(tmp_path, "kill", 3))[0] == -signal.SIGKILL
    left = tmp_path / "stores/.store.partial" / file
    left.write_bytes(change(left.read_bytes()))
    process = writer(tmp_path)
    code, said = ended(process)
    assert code == 0, said
    assert reads(tmp_path, process) == ([0, 1, 2, 3, 4] if again else [2, 3, 4])
    assert ("is not used" in said) == again
    assert (tmp_path / "stores/store").read_bytes() == whole


def test_what_is_of_another_store_is_not_gone_on_with(tmp_path: Path, whole: bytes) -> None:
    assert ended(writer(tmp_path, "kill", 3, "y"))[0] == -signal.SIGKILL
    process = writer(tmp_path)
    code, said = ended(process)
    assert code == 0, said
    assert "of another store" in said
    assert reads(tmp_path, process) == [0, 1, 2, 3, 4]
    assert (tmp_path / "stores/store").read_bytes() == whole


@pytest.mark.parametrize("first", ["ends", "is killed"])
def test_of_two_writers_one_waits(tmp_path: Path, whole: bytes, first: str) -> None:
    """And takes what the other has written; of one that is killed, what it has finished: a dead process holds no lock."""
    one = writer(tmp_path, "wait", 3)
    until_it_waits(tmp_path, one)
    other = writer(tmp_path)
    assert other.stderr is not None
    line = other.stderr.readline()
    assert f"is being written by process {one.pid} on " in line
    assert other.poll() is None
    if first == "ends":
        (tmp_path / "said/go").touch()
    else:
        one.kill()
    assert ended(one)[0] == (0 if first == "ends" else -signal.SIGKILL)
    code, said = ended(other)
    assert code == 0, said
    assert reads(tmp_path, other) == ([] if first == "ends" else [3, 4])
    assert (tmp_path / "stores/store").read_bytes() == whole
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["store"]


@pytest.mark.usefixtures("ctrl_c")
def test_a_wait_can_be_interrupted(tmp_path: Path) -> None:
    one = writer(tmp_path, "wait", 3)
    until_it_waits(tmp_path, one)
    other = writer(tmp_path)
    assert other.stderr is not None
    other.stderr.readline()
    other.send_signal(signal.SIGINT)
    assert ended(other)[0] == -signal.SIGINT
    (tmp_path / "said/go").touch()
    assert ended(one)[0] == 0
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["store"]


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_listing_disturbs_nobody(tmp_path: Path, path: Path, kind: int, caplog: pytest.LogCaptureFixture) -> None:
    """While one holds the locks that it asks with, for longer than it does, a reader reads, a writer writes without
    a word of waiting, and another listing sees what nobody uses."""
    assert ended(writer(tmp_path, "kill", 3, place="stores/b.store"))[0] == -signal.SIGKILL
    lock = tmp_path / "stores/.b.store.partial/lock"
    (tmp_path / "stores/a.store").write_bytes(path.read_bytes())

    @contextlib.contextmanager
    def listing(file: Path) -> Iterator[None]:
        with open(file, "rb") as held:
            fcntl.flock(held, kind)
            end = threading.Timer(0.05, fcntl.flock, (held, fcntl.LOCK_UN))
            end.start()
            yield
            end.join()

    with listing(lock), listing(tmp_path / "stores/a.store"):
        found = list_stores(tmp_path / "stores", ".store")
    assert [(s.path.name, s.used) for s in found] == [("b.store", False), ("a.store", False)]
    with listing(path), PackedReader(path) as reader:
        assert bits(reader.array(1, "q")) == bits(value(1, "q"))
    caplog.clear()
    with listing(lock):
        write_packed(tmp_path / "stores/b.store", 2, [SPEC] * 2, value, fingerprint="x")
    assert not [r for r in caplog.records if "waiting" in r.getMessage()]
    with listing(tmp_path / "stores/a.store"):
        assert remove_store(found[1])


def test_a_listing_asks_for_a_partial_store_with_a_lock_that_goes_with_its_own(tmp_path: Path) -> None:
    assert ended(writer(tmp_path, "kill", 3, place="stores/b.store"))[0] == -signal.SIGKILL
    with open(tmp_path / "stores/.b.store.partial/lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a listing that does not come to its end
        (found,) = list_stores(tmp_path / "stores", ".store")
        assert not found.used
        fcntl.flock(held, fcntl.LOCK_EX)
        (found,) = list_stores(tmp_path / "stores", ".store")
        assert found.used


UNLOCKED = """
import errno, fcntl
def none(*given): raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = none
"""


def test_what_a_killed_writer_leaves_on_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told from what one that lives is at, is removed by hand, and by the next writer of the store."""

    def none(*given: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(packed.fcntl, "flock", none)
    monkeypatch.setattr(sys.modules[__name__], "WRITER", UNLOCKED + WRITER)
    dead = writer(tmp_path, "kill", 3, place="stores/a.store")
    lives = writer(tmp_path, "wait", 3, place="stores/b.store")
    until_it_waits(tmp_path, lives)
    assert ended(dead)[0] == -signal.SIGKILL
    by_name = {s.path.name[0]: s for s in list_stores(tmp_path / "stores", ".store")}
    assert {n: (s.whole, s.used) for n, s in by_name.items()} == {"a": (False, False), "b": (False, True)}
    assert not remove_store(by_name["b"])
    folder = by_name["a"].path
    assert remove_store(by_name["a"])
    assert len(list((tmp_path / "stores").iterdir())) == 1
    for how in ("kill", ""):  # the first leaves a folder, the second takes it away
        ended(writer(tmp_path, how, 3, place="stores/a.store"))
    left = sorted(p.name for p in (tmp_path / "stores").iterdir())
    assert left[1:] == ["a.store"]
    assert left[0].startswith(".b.store.")
    (tmp_path / "said/go").touch()
    assert ended(lives)[0] == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "silent", "gone"),
    [
        ({}, 10**6, False),  # this very process
        ({"began": "1"}, 0, True),  # its number is another process's now
        ({"boot": "another machine's"}, 0, False), ({"boot": "another machine's"}, 86300, False),
        ({"boot": "another machine's"}, 86500, True), ({"namespace": "another container's"}, 0, False),
        ({"host": "a twin, woken from the same image", "began": "1"}, 0, False),
        ({"pid": "?"}, 0, False), (None, 0, False), (None, 86500, True),
    ],
)  # fmt: skip
def test_whose_process_has_ended(tmp_path: Path, change: dict[str, Any] | None, silent: int, gone: bool) -> None:
    folder = tmp_path / ".a.store.1234.partial"
    folder.mkdir()
    (folder / "records").write_bytes(b"x")
    if change is not None:
        (folder / "owner").write_text(json.dumps(packed._process(os.getpid()) | change))
    for file in (*folder.iterdir(), folder):
        os.utime(file, (time.time() - silent, time.time() - silent))
    (found,) = list_stores(tmp_path, ".store")
    assert found.used is not gone
    assert remove_store(found) is gone
    assert folder.exists() is not gone


def test_a_file_system_without_locks(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is written and read, nothing is gone on with, and nothing is removed: who uses it cannot be known."""

    def none(*given: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(packed.fcntl, "flock", none)

    def stops(layer: int, name: str) -> np.ndarray:
        if layer == 2:
            raise KeyboardInterrupt
        return value(layer, name)

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "other", LAYERS, [SPEC] * LAYERS, stops, fingerprint="a model")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    write_packed(tmp_path / "other", LAYERS, [SPEC] * LAYERS, value, fingerprint="a model")
    assert (tmp_path / "other").read_bytes() == path.read_bytes()
    (found,) = list_stores(tmp_path, "other")
    assert found.used
    assert not remove_store(found)
    assert found.path.exists()


def test_space_is_asked_for_what_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted writer has left counts, and stays where there is too little for the rest."""
    assert ended(writer(tmp_path, "kill", 3))[0] == -signal.SIGKILL
    records = tmp_path / "stores/.store.partial/records"
    need = 5 * 20480 + PAGE  # each layer five pages, the index one
    specs = [{"x": ((20000 + i,), np.uint8)} for i in range(5)]
    monkeypatch.setattr(packed, "_BLOCK", 8192)

    def read(layer: int, name: str) -> np.ndarray:
        return np.random.default_rng(layer).integers(0, 256, (20000 + layer,), dtype=np.uint8)

    lacking = need - records.stat().st_blocks * 512
    assert lacking < need

    class Disk:
        f_frsize, f_bavail = 1, lacking - 1

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(CheckpointError, match=f"needs {lacking} bytes and its disk has {lacking - 1} free: 1 too few"):
        write_packed(tmp_path / "stores/store", 5, specs, read, fingerprint="x")
    assert records.exists()
    Disk.f_bavail += 1
    write_packed(tmp_path / "stores/store", 5, specs, read, fingerprint="x")
    assert (tmp_path / "stores/store").stat().st_size == need


def test_what_is_used_is_not_removed(tmp_path: Path) -> None:
    assert ended(writer(tmp_path, place="stores/a.store"))[0] == 0
    assert ended(writer(tmp_path, "kill", 2, place="stores/b.store"))[0] == -signal.SIGKILL
    working = writer(tmp_path, "wait", 3, place="stores/c.store")
    until_it_waits(tmp_path, working)
    (tmp_path / "stores/d.store").write_bytes(b"no store")
    (tmp_path / "stores/else.txt").touch()
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys; from checkpoints.packed import PackedReader; r = PackedReader(sys.argv[1]);"
         "print('open', flush=True); sys.stdin.read(); print(len(next(iter([r.array(3, 'x')]))))",
         str(tmp_path / "stores/a.store")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    found = {s.path.name: s for s in list_stores(tmp_path / "stores", ".store")}
    assert {n: (s.whole, s.used) for n, s in found.items()} == {
        "a.store": (True, True), "b.store": (False, False), "c.store": (False, True), "d.store": (True, False)
    }  # fmt: skip
    assert "not a packed store" in found["d.store"].damage
    assert found["b.store"].nbytes > 0
    assert {n: remove_store(s) for n, s in found.items()} == {
        "a.store": False, "b.store": True, "c.store": False, "d.store": True
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "stores").iterdir()) == [".c.store.partial", "a.store", "else.txt"]
    assert reader.communicate("")[0] == "20003\n"
    (tmp_path / "said/go").touch()
    assert ended(working)[0] == 0
    for store in list_stores(tmp_path / "stores", ".store"):
        assert remove_store(store)
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["else.txt"]
    assert list_stores(tmp_path / "nowhere", ".store") == []


def test_what_a_store_is_about(tmp_path: Path) -> None:
    write_packed(tmp_path / "store", 1, [SPEC], value, fingerprint="x", about="said")
    assert by_hand(tmp_path / "store")[0]["about"] == "said"
    assert (tmp_path / "store").stat().st_size == packed_bytes(1, [SPEC], fingerprint="x", about="said")
    assert [s.about for s in list_stores(tmp_path, "store")] == ["said"]


def test_a_store_that_is_there_is_kept_where_it_is_the_same(path: Path) -> None:
    before = path.read_bytes()
    write_packed(path, LAYERS, [SPEC] * LAYERS, lambda i, n: pytest.fail("read"), fingerprint="a model", keep=True)
    for layers, fingerprint in ((LAYERS, "another"), (2, "a model")):
        with pytest.raises(CheckpointError, match="exists"):
            write_packed(path, layers, [SPEC] * layers, value, fingerprint=fingerprint, keep=True)
        assert path.read_bytes() == before
    write_packed(path, 2, [SPEC] * 2, value, fingerprint="a model", keep=True, overwrite=True)
    assert len(by_hand(path)[1]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def damaged(path: Path, change: Callable[[bytearray], object]) -> Path:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    return path


def with_index(change: Callable[[Any], object]) -> Callable[[bytearray], None]:
    """The index changed, and its checksum and length made to fit: what only a wrong writer could make."""

    def run(raw: bytearray) -> None:
        (length,) = struct.unpack_from("<Q", raw, 16)
        index = json.loads(raw[24 : 24 + length])
        change(index)
        text = json.dumps(index).encode()
        raw[: -(-(24 + length) // PAGE) * PAGE] = (
            struct.pack("<8sIIQ", b"JAXLAYER", 1, zlib.crc32(text), len(text)) + text
        ).ljust(-(-(24 + len(text)) // PAGE) * PAGE, b"\0")

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.__setitem__(0, 0), "not a packed store"),
        (lambda raw: raw.clear(), "not a packed store"),
        (lambda raw: raw.__delitem__(slice(20, None)), "not a packed store"),
        (lambda raw: raw.__setitem__(8, 2), "version 2, and this reads version 1"),
        (lambda raw: raw.__setitem__(50, raw[50] ^ 1), "damaged: its index"),
        (lambda raw: raw.__setitem__(16, raw[16] ^ 1), "damaged: its index"),
        (lambda raw: raw.__setitem__(22, 1), r"says its index has \d+ bytes, but the whole file has"),
        (lambda raw: raw.__delitem__(slice(2000, None)), r"the whole file has 2000: it is cut off"),
        (lambda raw: raw.__delitem__(slice(-1, None)), r"its 6 layers need \d+: it is cut off"),
        (lambda raw: raw.extend(bytes(PAGE)), "has grown"),
        (with_index(lambda index: index.pop("kinds")), "makes no sense"),
        (with_index(lambda index: index["kinds"][0][0].__setitem__(3, 1 << 40)), "not where they belong"),
        (with_index(lambda index: index["kinds"][0][0].__setitem__(1, "float99")), "makes no sense"),
        (with_index(lambda index: index["kinds"][0].append(index["kinds"][0][0])), "not where they belong"),
        (with_index(lambda index: index["layers"][1].__setitem__("kind", -1)), "layer 1 is of kind -1"),
        (with_index(lambda index: index["layers"][1].__setitem__("crc32", "00")), "layer 1 has 0 checksums"),
        (with_index(lambda index: index.__setitem__("block", 100)), "blocks of 100 bytes"),
        (with_index(lambda index: index.__setitem__("layers", [])), "no layers"),
        (with_index(lambda index: index["layers"].pop()), "has grown"),
    ],
)
def test_files_that_are_not_stores(path: Path, change: Callable[[bytearray], object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        PackedReader(damaged(path, change))
    assert str(path) in str(error.value)


def test_wrong_use_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="fingerprint is 'a model', and 'another' is expected"):
        PackedReader(path, fingerprint="another")
    PackedReader(path, fingerprint="a model").close()
    with pytest.raises(CheckpointError, match="There is no file"):
        PackedReader(path.parent / "not there")
    with pytest.raises(CheckpointError, match="is a folder"):
        PackedReader(path.parent)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep": 7}, "keep=7.*0 to 6"),
        ({"keep": -1}, "keep=-1"),
        ({"depth": 0}, "depth=0"),
        ({"threads": 0}, "threads=0"),
        ({"verify": "no"}, "verify='no'"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            PackedReader(path, **given)
    with PackedReader(path, depth=2) as reader:
        for layer in (6, -1):
            with pytest.raises(ValueError, match=f"no layer {layer} .* layers 0 to 5"):
                reader.order([layer])
            with pytest.raises(ValueError, match=f"no layer {layer}"):
                reader.nbytes(layer)
        with pytest.raises(RuntimeError, match="order"):
            reader.next()
        with pytest.raises(RuntimeError, match="without a layer"):
            reader.release()
        reader.order(range(LAYERS))
        assert right(reader.next(), 0)
        assert right(reader.next(), 1)
        with pytest.raises(RuntimeError, match=r"All 2 buffers .* layer 2"):
            reader.next()
        reader.release()
        assert right(reader.next(), 2)
    with pytest.raises(ValueError, match="is closed"):
        reader.next()
    with pytest.raises(ValueError, match="is closed"):
        reader.order([0])
    reader.release()  # a consumer may clean up after the end
    reader.close()


# ---------------------------------------------------------------------------------------------------------------------
# The ring


@pytest.mark.parametrize("copy_out", [False, True])
@pytest.mark.parametrize(("depth", "threads", "keep"), [(1, 1, 0), (2, 3, 0), (3, 2, 2), (5, 2, 5), (3, 2, 6)])
def test_any_order(path: Path, depth: int, threads: int, keep: int, copy_out: bool) -> None:
    rng = np.random.default_rng(0)
    orders = [
        [*range(LAYERS)] * 3,
        [*range(LAYERS), *reversed(range(LAYERS))],
        [5, 5, 5, 0, 0, 1, 5],
        rng.integers(0, LAYERS, 40).tolist(),
    ]
    with PackedReader(path, depth=depth, threads=threads, keep=keep, copy_out=copy_out) as reader:
        for order in orders:
            reader.order(order)
            for i in order:
                with reader.layer() as arrays:
                    assert right(arrays, i)
            with pytest.raises(RuntimeError, match="have been taken"), reader.layer():
                pass
        reader.order(itertools.cycle(range(LAYERS)))
        for i in [*range(LAYERS)] * 3:
            with reader.layer() as arrays:
                assert right(arrays, i)


def test_an_order_replaces_what_is_not_taken(path: Path) -> None:
    drawn: list[threading.Thread] = []

    def forever(start: int) -> Iterator[int]:
        for i in itertools.count(start):
            drawn.append(threading.current_thread())
            yield i % LAYERS

    with PackedReader(path, depth=3, keep=1) as reader:
        for start in (0, 4, 1, 3, 5, 2) * 5:
            reader.order(forever(start))
            with reader.layer() as held:  # in its buffer while the order changes
                reader.order(forever(start + 1))
                for i in range(start + 1, start + 4):
                    with reader.layer() as arrays:
                        assert right(arrays, i % LAYERS)
                assert right(held, start)
    assert set(drawn) == {threading.current_thread()}


def test_buffers_are_used_again_and_only_after_the_release(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = counting(monkeypatch)
    places: dict[str, set[int]] = {name: set() for name in SPEC}
    with PackedReader(path, depth=3) as reader:
        assert reader.buffer_bytes == reader.resident_bytes == 3 * reader.nbytes(0)
        blocks = -(-reader.nbytes(0) // (2 * PAGE))
        reader.order(itertools.cycle(range(LAYERS)))
        for fill in reader._line:
            reader._threads.wait(fill)
        assert len(offsets) == 3 * blocks, "not all buffers are filled ahead"
        assert right(reader.next(), 0)
        for turn in range(1, 4 * LAYERS):
            before = reader._leases[0].arrays
            arrays = reader.next()  # two of three are held, and the third is being filled
            assert right(before, (turn - 1) % LAYERS)
            reader.release()
            assert right(arrays, turn % LAYERS)
            assert len(offsets) <= (turn + 3) * blocks, "more is read than there are buffers"
            for name, array in arrays.items():
                places[name].add(array.ctypes.data)
    assert [len(p) for p in places.values()] == [3] * len(SPEC)


def test_layers_that_are_kept_are_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = counting(monkeypatch)
    with PackedReader(path, depth=2, keep=4) as reader:
        starts = [path.stat().st_size - sum(reader.nbytes(j) for j in range(i, LAYERS)) for i in range(LAYERS)]
        places: list[set[int]] = [set() for _ in range(LAYERS)]
        reader.order([*range(LAYERS)] * 5)
        for _ in range(5):
            for i in range(LAYERS):
                with reader.layer() as arrays:
                    assert right(arrays, i)
                    places[i].add(arrays["q"].ctypes.data)
    assert [offsets.count(start) for start in starts] == [1, 1, 1, 1, 5, 5]
    assert [len(p) for p in places[:4]] == [1] * 4
    with PackedReader(path, depth=2, keep=4) as reader:  # reading goes on beyond the kept layers, pass after pass
        reader.order(itertools.cycle(range(LAYERS)))
        assert [fill.layer for fill in reader._line] == [0, 1, 2, 3, 4, 5]
        for _ in range(LAYERS):
            with reader.layer():
                pass
        assert [fill.layer for fill in reader._line] == [0, 1, 2, 3, 4, 5]
    with PackedReader(path, keep=LAYERS) as reader:
        assert reader.buffer_bytes == 0
        assert reader.resident_bytes == LAYERS * reader.nbytes(0)
        offsets.clear()
        reader.order(itertools.cycle(range(LAYERS)))
        for i in [*range(LAYERS)] * 3:
            with reader.layer() as arrays:
                assert right(arrays, i)
        assert [offsets.count(start) for start in starts] == [1] * LAYERS


def test_a_held_layer_outlives_the_reader(path: Path) -> None:
    with PackedReader(path) as reader:
        reader.order(range(LAYERS))
        arrays = reader.next()
    del reader
    gc.collect()
    assert right(arrays, 0)


def test_jax_on_cpu_keeps_the_right_numbers_with_copy_out(path: Path) -> None:
    """And loses them without: device_put takes the ring's memory as it is."""
    cpu = jax.devices("cpu")[0]

    def passes(**options: Any) -> list[dict[str, jax.Array]]:
        with PackedReader(path, depth=2, keep=1, **options) as reader:
            kept = []
            reader.order([*range(LAYERS)] * 2)
            for _ in range(2 * LAYERS):
                with reader.layer() as arrays:
                    kept.append({n: jax.device_put(a, cpu) for n, a in arrays.items()})
                    assert not options or all(
                        kept[-1][n].unsafe_buffer_pointer() == a.ctypes.data for n, a in arrays.items()
                    ), "the copy made here is to be the only one"
            return kept

    for i, arrays in enumerate(passes(copy_out=True)):
        assert right({n: np.asarray(a) for n, a in arrays.items()}, i % LAYERS)
    wrong = [not right({n: np.asarray(a) for n, a in arrays.items()}, i % LAYERS) for i, arrays in enumerate(passes())]
    assert sum(wrong) == 2 * (LAYERS - 1) - 2, "all but the kept layer and the last two"
    assert not wrong[0]


def test_a_donated_array_of_a_kept_layer_leaves_it_alone(path: Path) -> None:
    clear = jax.jit(lambda x: x * np.asarray(0, x.dtype), donate_argnums=0)
    with PackedReader(path, keep=LAYERS) as reader:
        reader.order([0, 0])
        with reader.layer() as arrays:
            clear(jax.device_put(arrays["norm"])).block_until_ready()
        with reader.layer() as arrays:
            assert right(arrays, 0)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong while it runs


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cut", [1, PAGE, 5000])
def test_a_file_that_shrinks(path: Path, direct: bool, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    with PackedReader(path, depth=2, direct=direct) as reader:
        caplog.clear()  # of a temporary folder without direct reads
        reader.order(itertools.cycle(range(LAYERS)))
        for i in range(3):
            with reader.layer() as arrays:
                assert right(arrays, i)
        os.truncate(path, path.stat().st_size - cut)
        reader.order([0, 5, 1])
        with reader.layer() as arrays:
            assert right(arrays, 0)
        with (
            pytest.raises(CheckpointError, match=r"store: layer 5 is cut off: the file became shorter"),
            reader.layer(),
        ):
            pytest.fail("it was given")
        with reader.layer() as arrays:
            assert right(arrays, 1)
    assert not caplog.records


@pytest.mark.parametrize("place", ["weights", "padding"])
def test_a_corrupted_byte(path: Path, place: str) -> None:
    with PackedReader(path) as reader:
        start = path.stat().st_size - 3 * reader.nbytes(0)  # of layer 3
        at = start + (3 * PAGE + 17 if place == "weights" else reader.nbytes(0) - 1)
    damaged(path, lambda raw: raw.__setitem__(at, raw[at] ^ 4))
    for keep in (0, LAYERS):
        with PackedReader(path, keep=keep) as reader:
            for _ in range(5):  # it is found again by who tries again, and takes no buffer away
                reader.order(range(LAYERS))
                for i in range(LAYERS):
                    if i == 3:
                        with pytest.raises(CheckpointError, match=r"store: layer 3 is damaged: bytes \d+ to"):
                            reader.next()
                    else:
                        with reader.layer() as arrays:
                            assert right(arrays, i)
    with PackedReader(path, verify="never") as reader:
        reader.order([3])
        with reader.layer() as arrays:
            assert right(arrays, 3) == (place == "padding")


def test_when_checksums_are_looked_at(path: Path) -> None:
    """A byte that changes after the first pass is seen by 'always' only."""
    for verify, seen in (("always", True), ("first", False)):
        with PackedReader(path, verify=verify) as reader:  # pyright: ignore[reportArgumentType]
            reader.order(range(LAYERS))
            for _ in range(LAYERS):
                with reader.layer():
                    pass
            damaged(path, lambda raw: raw.__setitem__(-1, raw[-1] ^ 1))
            reader.order([5])
            with pytest.raises(CheckpointError, match="damaged") if seen else contextlib.nullcontext():
                reader.next()
        damaged(path, lambda raw: raw.__setitem__(-1, raw[-1] ^ 1))


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_an_error_of_the_disk_is_the_consumers(path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    with PackedReader(path, keep=keep, depth=2) as reader:
        start = path.stat().st_size - 4 * reader.nbytes(0)  # of layer 2
        preadv, bad = os.preadv, [True]

        def read(descriptor: int, buffers: Any, offset: int) -> int:
            if bad[0] and offset >= start:
                raise OSError(errno.EIO, "Input/output error")
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", read)
        reader.order(itertools.cycle(range(LAYERS)))
        for i in range(2):
            with reader.layer() as arrays:
                assert right(arrays, i)
        with pytest.raises(CheckpointError, match="store: layer 2 cannot be read: Input/output error") as error:
            reader.next()
        assert isinstance(error.value.__cause__, OSError)
        for fill in reader._kept.values():
            reader._threads.wait(fill)
        bad[0] = False
        reader.order(range(2, LAYERS))  # it was the disk's fault and not the reader's
        for i in range(2, LAYERS):
            with reader.layer() as arrays:
                assert right(arrays, i)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_that_do_less_than_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, direct: bool
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: min(1000, preadv(descriptor, buffers, at)))
    with PackedReader(path, direct=direct) as reader:
        caplog.clear()  # of a temporary folder without direct reads
        reader.order(range(LAYERS))
        for i in range(LAYERS):
            with reader.layer() as arrays:
                assert right(arrays, i)
    assert not caplog.records, "the rest of a read was asked of O_DIRECT, at a place that it refuses"


@pytest.mark.parametrize("at", ["open", "read"])
def test_file_systems_without_direct_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    direct: list[int] = []
    os_open, preadv = os.open, os.preadv

    def opened(name: Any, flags: int, *mode: Any, **given: Any) -> int:
        if not flags & os.O_DIRECT:
            return os_open(name, flags, *mode, **given)
        if at == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        direct.append(os_open(name, flags & ~os.O_DIRECT, *mode, **given))
        return direct[-1]

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    with caplog.at_level(logging.INFO), PackedReader(path, threads=4) as reader:
        reader.order(range(LAYERS))
        for i in range(LAYERS):
            with reader.layer() as arrays:
                assert right(arrays, i)
    assert [r.getMessage().count("page cache") for r in caplog.records] == [1]
    assert bool(direct) == (at == "read")


@pytest.mark.parametrize("proc", [True, False])
def test_another_file_in_its_place_while_it_is_opened(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, proc: bool
) -> None:
    """Every byte comes from the file that the index was read from, though its name is another's meanwhile."""
    write_packed(tmp_path / "new", LAYERS, [SPEC] * LAYERS, lambda i, n: value(i + 1, n), fingerprint="another model")
    os_open = os.open

    def opened(name: Any, flags: int, *mode: Any, **given: Any) -> int:
        if flags & os.O_DIRECT:
            if (tmp_path / "new").exists():
                (tmp_path / "new").replace(path)
            if not proc and str(name).startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, "none", name)
        return os_open(name, flags & ~os.O_DIRECT, *mode, **given)

    monkeypatch.setattr(os, "open", opened)
    with PackedReader(path, verify="never") as reader:
        assert not (tmp_path / "new").exists()
        assert reader.fingerprint == "a model"
        reader.order(range(LAYERS))
        for i in range(LAYERS):
            with reader.layer() as arrays:
                assert right(arrays, i)


def test_direct_reads_are_aligned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What O_DIRECT asks for: place in the file, place in memory and length are whole pages."""
    asked: list[tuple[int, int, int]] = []
    preadv = os.preadv

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        (view,) = buffers
        asked.append((offset % PAGE, np.frombuffer(view, np.uint8).ctypes.data % PAGE, len(view) % PAGE))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with PackedReader(path, keep=2) as reader:
        reader.order(range(LAYERS))
        for _ in range(LAYERS):
            with reader.layer():
                pass
    assert set(asked) == {(0, 0, 0)}


class Gate:
    """preadv that waits at a gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        preadv = os.preadv

        def read(descriptor: int, buffers: Any, offset: int) -> int:
            self.reached.set()
            assert self.open.wait(30)
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", read)


def test_a_read_under_way_ends_before_its_buffer_is_used_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0's first block is still being read when the order changes, and there is one buffer."""
    preadv, begun, late, done = os.preadv, threading.Event(), threading.Event(), threading.Event()
    with PackedReader(path, depth=1) as reader:
        start = path.stat().st_size - LAYERS * reader.nbytes(0)

        def read(descriptor: int, buffers: Any, offset: int) -> int:
            if offset != start:
                return preadv(descriptor, buffers, offset)
            begun.set()
            assert late.wait(30)
            got = preadv(descriptor, buffers, offset)
            done.set()
            return got

        monkeypatch.setattr(os, "preadv", read)
        reader.order([0])
        assert begun.wait(30)
        timer = threading.Timer(0.2, late.set)
        timer.start()
        reader.order([1])
        with reader.layer() as arrays:
            assert done.wait(30)
            assert right(arrays, 1)
        timer.join()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with PackedReader(path) as reader:
        reader.order(range(LAYERS))
        assert gate.reached.wait(30)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            reader.next()
        timer.join()
        gate.open.set()
        for i in range(LAYERS):  # and whoever wants to may go on
            with reader.layer() as arrays:
                assert right(arrays, i)


def test_closed_by_another_thread_while_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    reader = PackedReader(path)
    reader.order(range(LAYERS))
    assert gate.reached.wait(30)
    closer = threading.Timer(0.1, reader.close)
    closer.start()
    with pytest.raises(ValueError, match="is closed"):
        reader.next()
    gate.open.set()
    closer.join()


@pytest.mark.parametrize("end", ["close", "raise", "collect", "never began"])
def test_threads_end(path: Path, end: str) -> None:
    if end == "raise":

        def consume() -> None:
            with PackedReader(path) as reader:
                reader.order(itertools.cycle(range(LAYERS)))
                with reader.layer():
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            consume()
    else:
        reader = PackedReader(path)
        assert not ours()  # a plan may open stores by the dozen
        if end != "never began":
            reader.order(itertools.cycle(range(LAYERS)))
            reader.next()
            assert len(ours()) == 2
        if end != "collect":
            reader.close()
        del reader
        gc.collect()
    assert not ours()
    assert not open_files()


def test_a_process_ends_with_a_reader_that_is_open(path: Path) -> None:
    code = (
        "import itertools, sys\n"
        "from checkpoints.packed import PackedReader\n"
        "reader = PackedReader(sys.argv[1])\n"
        "reader.order(itertools.cycle(range(reader.layers)))\n"
        "reader.next()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def peak_growth(code: str, path: Path) -> int:
    """Bytes by which the process's peak of resident memory grows in `code`, whose arrays are of 16 MiB."""
    start = (
        "import itertools, sys, numpy as np\n"
        "from checkpoints.packed import PackedReader, write_packed\n"
        "assert 'jax' not in sys.modules\n"
        "N, M, path = 16, 16 << 20, sys.argv[1]\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) << 10\n"
        "before = peak()\n"
    )
    command = [sys.executable, "-c", f"{start}{code}\nprint(peak() - before)", str(path)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_host_memory_is_bounded(tmp_path: Path) -> None:
    """A store of 256 MiB, written and read by processes of their own."""
    write = (
        "spec = {'x': ((M,), np.uint8)}\n"
        "write_packed(path, N, [spec] * N, lambda i, n: np.full(M, i, np.uint8), fingerprint='x')"
    )
    small = 6 << 20
    assert peak_growth(write, tmp_path / "store") < (16 << 20) + small
    for direct in (True, False):
        read = (
            f"with PackedReader(path, depth=3, keep=2, direct={direct}) as reader:\n"
            "    reader.order(itertools.cycle(range(N)))\n"
            "    for i in [*range(N)] * 2:\n"
            "        with reader.layer() as arrays:\n"
            "            assert arrays['x'][0] == arrays['x'][-1] == i\n"
            "    assert reader.resident_bytes == 5 * M"
        )
        growth = peak_growth(read, tmp_path / "store")
        assert 5 * (16 << 20) - small < growth < 5 * (16 << 20) + small


def test_the_benchmark_runs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_disk.py", "--gb", "0.004", "--folder", str(tmp_path), "--rounds", "1"])
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "bench_disk.py"), run_name="__main__")
    assert not end.value.code
    rows = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
    assert {row["way"] for row in rows} == {
        "raw",
        "raw, 4 KiB pages",
        "ring",
        "ring, in place",
        "ring, first pass",
        "memmap",
    }
    assert all(row["cold_GBs"] > 0 and row["warm_GBs"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())


# --- layers where a checkpoint's own files have them ----------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("copy_out", [True, False])
def test_layers_in_place(direct: bool, copy_out: bool, tmp_path: Path) -> None:
    """Arrays at any byte of two files, near and far, as long as a block and more, the last one to the end of its file."""
    rng = np.random.default_rng(0)
    files = [tmp_path / "a", tmp_path / "b"]
    held = [rng.integers(0, 256, size, dtype=np.uint8) for size in (5 * 2**20 + 77, 19 * 2**20 + 4097)]
    for file, data in zip(files, held, strict=True):
        file.write_bytes(data.tobytes())

    def info(name: str, file: int, start: int, dtype: Any, *shape: int) -> TensorInfo:
        dtype = np.dtype(dtype)
        return TensorInfo(name, dtype, shape, files[file], start, start + math.prod(shape) * dtype.itemsize)

    rows = [
        (("q", 0, 8, np.float32, 100, 3), ("k", 0, 1208, np.uint8, 5), ("v", 0, 5 * 2**20, np.uint8, 77)),
        (("q", 1, 13, np.float32, 4096, 1100), ("k", 0, 4095, np.uint8, 2), ("v", 0, 0, np.uint8, 1)),
        (("q", 1, 4096, np.uint16, 2, 4096), ("k", 1, 19 * 2**20 + 4096, np.uint8, 1), ("v", 1, 20480, np.uint8, 9)),
    ]
    layers = [{row[0]: info(*row) for row in layer} for layer in rows]
    with PackedReader(layers, depth=2, direct=direct, copy_out=copy_out) as reader:
        reader.order([0, 1, 2, 1, 0])
        for i in (0, 1, 2, 1, 0):
            with reader.layer() as arrays:
                for name, where in layers[i].items():
                    wanted = held[files.index(where.file)][where.start : where.end].tobytes()
                    assert arrays[name].tobytes() == wanted
                    assert (arrays[name].shape, arrays[name].dtype) == (where.shape, where.dtype)
                    assert arrays[name].flags.aligned
        assert reader.array(1, "k").tobytes() == held[0][4095:4097].tobytes()
        assert reader.nbytes(0) == 2 * 4096  # a page near the beginning of a file, and one at its end
    with pytest.raises(ValueError, match="no checksums"):
        PackedReader(layers, verify="always")
    os.truncate(files[1], 19 * 2**20)
    with pytest.raises(CheckpointError, match=r"b has \d+ bytes, and its header says \d+: it is cut off"):
        PackedReader(layers)
    files[0].unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        PackedReader(layers)
