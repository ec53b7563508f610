"""checkpoints.safetensors against files built here by hand from the format's description, and against transformers'
own files in tests/golden. The safetensors library itself is the oracle in test_live_safetensors.py.

A file: eight bytes of header length (little-endian), a JSON header, the tensors' bytes without gaps.
"""

import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints import CheckpointError
from checkpoints.safetensors import INDEX, Reader, aligned_empty, plan_shards, write_file, write_index

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()) if GOLDEN.is_dir() else []

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
}


def build(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def f32(name: str, n: int, start: int = 0) -> dict[str, Any]:
    return {name: entry("F32", [n], start, start + 4 * n)}


@pytest.fixture
def matrix(tmp_path: Path) -> np.ndarray:
    """A [6, 4] float32 matrix `w` behind a vector `a`, in tmp_path/model.safetensors."""
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    header = f32("a", 3) | {"w": entry("F32", [6, 4], 12, 108)}
    build(tmp_path / "model.safetensors", header, np.ones(3, np.float32).tobytes() + values.tobytes())
    return values


# -- reading


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_keeps_its_bits(tmp_path: Path, code: str) -> None:
    dtype = np.dtype(DTYPES[code])
    bits = np.random.default_rng(0).integers(0, 2 if code == "BOOL" else 256, 5 * dtype.itemsize, np.uint8).tobytes()
    build(tmp_path / "model.safetensors", {"x": entry(code, [5], 0, len(bits))}, bits)
    with Reader.open(tmp_path) as reader:
        got = reader.read("x")
    assert got.dtype == dtype
    assert got.shape == (5,)
    assert got.tobytes() == bits


def test_known_values_of_the_narrow_floats(tmp_path: Path) -> None:
    # 1.0 and -2.0, from the definitions of the formats (sign, exponent with its bias, mantissa)
    data = b"\x80\x3f\x00\xc0" + b"\x38\xc0" + b"\x3c\xc0"
    header = {"b": entry("BF16", [2], 0, 4), "e4": entry("F8_E4M3", [2], 4, 6), "e5": entry("F8_E5M2", [2], 6, 8)}
    build(tmp_path / "model.safetensors", header, data)
    with Reader.open(tmp_path) as reader:
        for name in ("b", "e4", "e5"):
            assert reader.read(name).astype(np.float32).tolist() == [1.0, -2.0]


def test_info_and_layout(tmp_path: Path, matrix: np.ndarray) -> None:
    with Reader.open(tmp_path) as reader:
        assert reader.names == ("a", "w")
        info = reader.info("w")
        assert (info.name, info.dtype, info.shape, info.nbytes) == ("w", np.float32, (6, 4), 96)
        assert info.file.read_bytes()[info.start : info.end] == matrix.tobytes()
        assert reader.weight_map == {"a": "model.safetensors", "w": "model.safetensors"}
        assert reader.metadata == {"model.safetensors": None}
        assert reader.index_metadata is None
        assert "w" in reader
        assert "v" not in reader
        with pytest.raises(CheckpointError, match=r"no tensor 'v'.*model\.safetensors"):
            reader.read("v")


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 5), slice(4, None), slice(-1, None), slice(3, 3), slice(5, 2)])
def test_rows_are_those_of_numpy(tmp_path: Path, matrix: np.ndarray, rows: slice) -> None:
    with Reader.open(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("w", rows=rows), matrix[rows])


def test_only_the_rows_are_read(tmp_path: Path, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((offset, sum(len(buffer) for buffer in buffers)))
        return preadv(descriptor, buffers, offset)

    with Reader.open(tmp_path) as reader:
        start = reader.info("w").start
        monkeypatch.setattr(os, "preadv", counted)
        reader.read("w", rows=slice(2, 4))
    assert asked == [(start + 2 * 16, 2 * 16)]


def test_short_reads_are_continued(tmp_path: Path, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: preadv(d, [buffers[0][:7]], offset))
    with Reader.open(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("w"), matrix)


def test_out_is_filled_in_place(tmp_path: Path, matrix: np.ndarray) -> None:
    stack = np.zeros((3, 6, 4), np.float32)
    with Reader.open(tmp_path) as reader:
        assert reader.read("w", out=stack[1]).base is stack
        np.testing.assert_array_equal(stack[1], matrix)
        assert not stack[0].any()
        assert not stack[2].any()
        for wrong in (np.zeros((4, 6), np.float32), np.zeros((6, 4)), np.zeros((4, 6), np.float32).T):
            with pytest.raises(ValueError, match=r"out for w .*float32\[6, 4\]"):
                reader.read("w", out=wrong)
        frozen = np.zeros((6, 4), np.float32)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            reader.read("w", out=frozen)


def test_memory_is_page_aligned(tmp_path: Path, matrix: np.ndarray) -> None:
    with Reader.open(tmp_path) as reader:
        assert reader.read("w").ctypes.data % 4096 == 0
        assert reader.read("w", rows=slice(1, 3)).ctypes.data % 4096 == 0
    assert aligned_empty((0, 3), np.dtype(np.float32)).shape == (0, 3)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {"s": entry("I32", [], 0, 4), "e": entry("F32", [0, 3], 4, 4), "t": entry("I32", [], 4, 8)}
    build(tmp_path / "model.safetensors", header, struct.pack("<ii", -5, 7))
    with Reader.open(tmp_path) as reader:
        assert reader.read("s") == -5
        assert reader.read("t").shape == ()
        assert reader.read("e").shape == (0, 3)
        assert reader.read("e", rows=slice(0, 2)).shape == (0, 3)
        with pytest.raises(ValueError, match="s is a scalar"):
            reader.read("s", rows=slice(0, 1))


def test_strided_rows_are_refused(tmp_path: Path, matrix: np.ndarray) -> None:
    with Reader.open(tmp_path) as reader, pytest.raises(ValueError, match="consecutive rows"):
        reader.read("w", rows=slice(0, 6, 2))


def test_threads_share_a_reader(tmp_path: Path) -> None:
    big = np.arange(400_000, dtype=np.int64).reshape(400, 1000)
    build(tmp_path / "model.safetensors", {"x": entry("I64", [400, 1000], 0, big.nbytes)}, big.tobytes())
    gate = threading.Barrier(8)
    with Reader.open(tmp_path) as reader, ThreadPoolExecutor(8) as pool:

        def part(i: int) -> np.ndarray:
            gate.wait()
            return np.concatenate([reader.read("x", rows=slice(50 * i + j, 50 * i + j + 10)) for j in range(0, 50, 10)])

        np.testing.assert_array_equal(np.concatenate(list(pool.map(part, range(8)))), big)


def test_a_closed_reader_says_so(tmp_path: Path, matrix: np.ndarray) -> None:
    reader = Reader.open(tmp_path)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read("w")


def test_no_descriptor_is_left_open(tmp_path: Path, matrix: np.ndarray) -> None:
    build(tmp_path / "x.safetensors", b"not json", b"")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("counts descriptors in /proc")
    with Reader.open(tmp_path):
        pass
    with pytest.raises(CheckpointError):
        Reader.open(tmp_path / "x.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before


# -- which files


def sharded(folder: Path) -> None:
    build(folder / "model-00001-of-00002.safetensors", f32("a", 2), np.array([1, 2], np.float32).tobytes())
    build(folder / "model-00002-of-00002.safetensors", f32("b", 2), np.array([3, 4], np.float32).tobytes())
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))


def test_sharded_folder(tmp_path: Path) -> None:
    sharded(tmp_path)
    with Reader.open(tmp_path) as reader:
        assert reader.read("b").tolist() == [3, 4]
        assert reader.weight_map["a"] == "model-00001-of-00002.safetensors"
        assert reader.index_metadata == {"total_size": 16}
        assert reader.source == str(tmp_path / INDEX)


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    build(tmp_path / "adapter.safetensors", f32("a", 1), b"\0" * 4)
    for place in (tmp_path, tmp_path / "adapter.safetensors"):
        with Reader.open(place) as reader:
            assert reader.weight_map == {"a": "adapter.safetensors"}


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    sharded(tmp_path)
    header = f32("b", 2) | f32("a", 1, 8)
    build(tmp_path / "model-00002-of-00002.safetensors", header, np.array([3, 4, 9], np.float32).tobytes())
    with Reader.open(tmp_path) as reader:
        assert reader.read("a").tolist() == [1, 2]


def refused(place: Path, *patterns: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Reader.open(place)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in: {error.value}"


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "There is no folder .*nowhere")
    refused(tmp_path, "holds no safetensors")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is a file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, r"pytorch_model\.bin", "pickle", "save_pretrained")
    for name in ("x.safetensors", "y.safetensors"):
        build(tmp_path / name, f32("a", 1), b"\0" * 4)
    refused(tmp_path, "2 safetensors files but neither", r"x\.safetensors")


def test_broken_indices(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())

    def with_map(**changes: str) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))

    with_map(c="model-00003-of-00003.safetensors")
    refused(tmp_path, "1 are not in the folder", r"model-00003-of-00003\.safetensors \(1 tensors\)")
    with_map(c="model-00001-of-00002.safetensors")
    refused(tmp_path, "do not belong together", r"c \(in model-00001-of-00002\.safetensors\)")
    with_map(a="../model-00001-of-00002.safetensors")
    refused(tmp_path, "plain name", "'a'")
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    refused(tmp_path, "weight_map")
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(tmp_path, "Git LFS pointer")


def test_a_name_in_two_files_that_no_index_tells_apart(tmp_path: Path) -> None:
    sharded(tmp_path)
    for shard in (1, 2):
        header = f32("ab"[shard - 1], 2) | f32("x", 1, 8)
        build(tmp_path / f"model-0000{shard}-of-00002.safetensors", header, b"\0" * 12)
    refused(tmp_path, "'x' is in both")


# -- damage

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "0 bytes"),
    "shorter than the length": (lambda p: p.write_bytes(b"\x10\0\0"), "3 bytes"),
    "lfs pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "header past the end": (lambda p: build(p, {}, b"", length=5000), "5000 bytes, but the whole file has 10"),
    "absurd length": (lambda p: build(p, {}, b"", length=1 << 60), "1152921504606846976 bytes.*limit"),
    "not JSON": (lambda p: build(p, b"{'a': 1}", b""), "not JSON"),
    "not UTF-8": (lambda p: build(p, b'{"\xff\xfe": 1}', b""), "not JSON"),
    "too deep": (lambda p: build(p, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "not JSON|'a' needs"),
    "a list": (lambda p: build(p, [1], b""), "list, not an object"),
    "metadata of numbers": (lambda p: build(p, {"__metadata__": {"n": 1}}, b""), "strings to strings"),
    "duplicate key": (
        lambda p: build(p, b'{"w":' + json.dumps(f32("w", 1)["w"]).encode() + b',"w":1}', b"\0" * 4),
        "'w' twice",
    ),
    "no entry": (lambda p: build(p, {"w": 3}, b""), "'w' needs dtype, shape and data_offsets"),
    "unknown dtype": (lambda p: build(p, {"w": entry("F4", [2], 0, 1)}, b"\0"), "'w' has the dtype 'F4'; known are"),
    "negative shape": (lambda p: build(p, {"w": entry("U8", [-1], 0, 1)}, b"\0"), r"'w' has the shape \[-1\]"),
    "shape of a bool": (lambda p: build(p, {"w": entry("U8", [True], 0, 1)}, b"\0"), r"'w' has the shape \[True\]"),
    "three offsets": (
        lambda p: build(p, {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"\0"),
        r"'w' has data_offsets \[0, 1, 2\]",
    ),
    "backward offsets": (lambda p: build(p, {"w": entry("U8", [1], 2, 1)}, b"\0\0"), "'w' ends .* before it starts"),
    "negative offsets": (lambda p: build(p, {"w": entry("U8", [1], -1, 0)}, b"\0"), r"'w' has data_offsets \[-1, 0\]"),
    "wrong size": (
        lambda p: build(p, {"w": entry("F32", [2, 3], 0, 20)}, b"\0" * 20),
        r"'w' has 20 bytes, but F32\[2, 3\] needs 24",
    ),
    "truncated": (lambda p: build(p, f32("w", 10), b"\0" * 39), "'w' is in bytes .* cut off"),
    "all data missing": (lambda p: build(p, f32("w", 10), b""), "'w' is in bytes .* cut off"),
    "hole": (lambda p: build(p, f32("v", 1) | f32("w", 1, 8), b"\0" * 12), "'w' .*leaves a hole after tensor 'v'"),
    "hole at the head": (lambda p: build(p, f32("w", 1, 4), b"\0" * 8), "'w' .*leaves a hole after the header"),
    "overlap": (lambda p: build(p, f32("v", 2) | f32("w", 2, 4), b"\0" * 12), "'w' .*overlaps tensor 'v'"),
    "shared bytes": (lambda p: build(p, f32("v", 2) | f32("w", 2), b"\0" * 8), "'w' .*overlaps tensor 'v'"),
    "trailing bytes": (lambda p: build(p, f32("w", 1), b"\0" * 9), "5 bytes after tensor 'w' belong to no tensor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, message = DAMAGE[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    refused(tmp_path, re.escape(str(path)), message)


def test_a_file_cut_after_opening(tmp_path: Path, matrix: np.ndarray) -> None:
    path = tmp_path / "model.safetensors"
    with Reader.open(tmp_path) as reader:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(CheckpointError, match="ended inside tensor 'w'"):
            reader.read("w")


# -- writing


def test_the_bytes_of_a_small_file(tmp_path: Path) -> None:
    """By hand: 2-byte before 1-byte, names in order, metadata first, header padded with spaces to a multiple of 8."""
    arrays = {
        "b": np.array([1, 2], np.int8),
        "a": np.array([3], np.int8),
        "é": np.array([1.0], ml_dtypes.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    write_file(path, {k: (v.dtype, v.shape) for k, v in arrays.items()}, arrays.__getitem__, {"format": "pt"})
    header = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
        '"a":{"dtype":"I8","shape":[1],"data_offsets":[2,3]},"b":{"dtype":"I8","shape":[2],"data_offsets":[3,5]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(header)) + header + b"\x80\x3f\x03\x01\x02"


@pytest.mark.parametrize("code", DTYPES)
def test_written_dtypes_come_back(tmp_path: Path, code: str) -> None:
    dtype = np.dtype(DTYPES[code])
    array = np.arange(6).reshape(2, 3).astype(dtype)
    write_file(
        tmp_path / "model.safetensors",
        {"x": (dtype, (2, 3)), "s": (dtype, ())},
        lambda n: array if n == "x" else array[1, 1],
    )
    with Reader.open(tmp_path) as reader:
        assert reader.read("x").tobytes() == array.tobytes()
        assert reader.read("s").shape == ()


def test_written_one_at_a_time_and_from_any_memory_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return array.T

    write_file(tmp_path / "model.safetensors", {n: (array.dtype, (4, 3)) for n in "ba"}, read)
    assert asked == ["a", "b"]
    with Reader.open(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("b"), array.T)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot hold complex128"):
        write_file(path, {"x": (np.dtype(complex), (1,))}, lambda n: np.zeros(1, complex))
    with pytest.raises(CheckpointError, match="__metadata__"):
        write_file(path, {"__metadata__": (np.dtype(np.int8), (1,))}, lambda n: np.zeros(1, np.int8))
    assert not path.exists()
    with pytest.raises(CheckpointError, match=r"'x'.*announced as float32\[2\] and came as float64\[2\]"):
        write_file(path, {"x": (np.dtype(np.float32), (2,))}, lambda n: np.zeros(2))
    with pytest.raises(FileExistsError):
        write_file(path, {"x": (np.dtype(np.float32), (2,))}, lambda n: np.zeros(2, np.float32))


def test_shards_by_hand() -> None:
    """Sizes 6, 6, 2, 6, 2, 2 and a limit of 10 give [6], [6, 2], [6, 2, 2]: the example of Hugging Face's own rule."""
    sizes = dict(zip("abcdef", (6, 6, 2, 6, 2, 2), strict=True))
    tensors = {name: (np.dtype(np.int8), (n,)) for name, n in sizes.items()}
    assert plan_shards(tensors, 10) == {
        "model-00001-of-00003.safetensors": ["a"],
        "model-00002-of-00003.safetensors": ["b", "c"],
        "model-00003-of-00003.safetensors": ["d", "e", "f"],
    }
    assert plan_shards(tensors, 24) == {"model.safetensors": list("abcdef")}
    # c is too large for any file: one of its own, while the file that was begun goes on
    large = {name: (np.dtype(np.int8), (n,)) for name, n in zip("abcd", (3, 4, 11, 3), strict=True)}
    assert plan_shards(large, 10) == {
        "model-00001-of-00002.safetensors": ["c"],
        "model-00002-of-00002.safetensors": ["a", "b", "d"],
    }
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        plan_shards(tensors, 0)


def test_shards_like_the_source() -> None:
    tensors = {name: (np.dtype(np.int8), (5,)) for name in "abc"}
    like = {"a": "part2.safetensors", "b": "part1.safetensors", "c": "part2.safetensors"}
    assert plan_shards(tensors, 5, like) == {"part1.safetensors": ["b"], "part2.safetensors": ["a", "c"]}
    # other tensors than the source's: split anew
    assert len(plan_shards(tensors | {"d": (np.dtype(np.int8), (5,))}, 5, like)) == 4


def test_index_metadata_is_kept_while_it_is_true(tmp_path: Path) -> None:
    tensors = {"a": (np.dtype(np.float16), (5,)), "b": (np.dtype(np.float16), (2, 2))}
    shards = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]}

    def metadata(like: dict[str, Any] | None) -> Any:
        write_index(tmp_path, shards, tensors, like)
        return json.loads((tmp_path / INDEX).read_text())["metadata"]

    assert metadata(None) == {"total_parameters": 9, "total_size": 18}
    assert metadata({"total_size": 18, "origin": "elsewhere"}) == {"total_size": 18, "origin": "elsewhere"}
    assert metadata({"total_size": 36}) == {"total_parameters": 9, "total_size": 18}


@pytest.mark.parametrize("case", CASES)
def test_transformers_files_come_out_byte_for_byte(tmp_path: Path, case: str) -> None:
    with Reader.open(GOLDEN / case) as reader:
        tensors = {name: (reader.info(name).dtype, reader.info(name).shape) for name in sorted(reader.names)}
        shards = plan_shards(tensors, like=reader.weight_map)
        for file, names in shards.items():
            write_file(tmp_path / file, {n: tensors[n] for n in names}, reader.read, reader.metadata[file])
        if len(shards) > 1:
            write_index(tmp_path, shards, tensors, reader.index_metadata)
        assert sum(math.prod(shape) for _, shape in tensors.values()) > 1000
    wanted = {p.name: p.read_bytes() for p in (GOLDEN / case).iterdir() if "safetensors" in p.name}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == wanted
