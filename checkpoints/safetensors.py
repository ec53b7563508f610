"""Hugging Face safetensors, read and written one tensor (or a part of one) at a time.

A safetensors file is eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, padded with
spaces, and the tensors' bytes without gaps. A checkpoint is a folder with model.safetensors, or with several files
and model.safetensors.index.json saying which tensor is in which.

The format is small enough to own, and owning it buys three things. Reads are `preadv` into page-aligned memory that
the caller may reuse: on a cold disk that is two to three times faster than a memory map (whose page faults come one at
a time) and than building a new array for every tensor; jax's CPU backend can use 64-byte-aligned memory as it is. The
narrow floats become ml_dtypes arrays of the same bits (numpy alone has no bfloat16 and no fp8). And a part of a tensor
(rows of its first dim) costs that part only, which is what fused projections and shards need.

Headers are checked in full when a folder is opened, before a byte of data is read: each tensor's bytes must be inside
the file, have the size its shape says, and tile the data with neither overlap nor hole.

The writer makes the same bytes as the safetensors library for the same content: tensors by dtype (wide first), then by
name; `__metadata__` first; serde_json's compact spelling. So a checkpoint that goes in and comes out is the same files.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError, listing

# In the order of the safetensors library's own enumeration: its writer sorts by it, backwards.
_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANK = {code: i for i, code in enumerate(_DTYPES)}

_LENGTH = 8  # bytes of the header's length
_MAX_HEADER = 100_000_000  # the library's own limit
_PAGE = 4096
_ONE_CALL = 1 << 30  # Linux reads at most 2 GiB - 4 KiB per call
_LFS = b"version https://git-lfs"

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: bytes `start` to `end` of `file` (offsets in the file, not in its data part)."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a page: jax's CPU backend adopts it, direct I/O could read into it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _PAGE, np.uint8)
    skip = -raw.ctypes.data % _PAGE
    return raw[skip : skip + nbytes].view(dtype).reshape(tuple(shape))


class Reader:
    """The tensors of one checkpoint folder. Threads may share it; it holds one open descriptor per file.

    `names` in the order of the files, `weight_map` (name -> file name), `metadata` (file name -> its `__metadata__`),
    and `index_metadata` (what model.safetensors.index.json says beside the weight map; None without an index) are what
    an export needs in order to write the same folder again.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        metadata: dict[str, dict[str, str] | None],
        index_metadata: dict[str, Any] | None,
        descriptors: dict[Path, int],
    ) -> None:
        self.folder = folder
        self.metadata = metadata
        self.index_metadata = index_metadata
        self.weight_map = {name: info.file.name for name, info in tensors.items()}
        self._tensors = tensors
        self._descriptors = descriptors
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Find the files of `folder` (or take the one .safetensors file given), parse and check their headers.

        Raises CheckpointError, naming the file and the tensor, for anything that would make a later read wrong.
        """
        folder = Path(folder)
        files, listed, index_metadata = _find(folder)
        descriptors: dict[Path, int] = {}
        try:
            metadata: dict[str, dict[str, str] | None] = {}
            found: dict[Path, dict[str, TensorInfo]] = {}
            for file in files:
                descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                found[file], metadata[file.name] = _read_header(file, descriptors[file])
            tensors = _merge(found, listed, folder)
        except BaseException:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise
        return cls(folder, tensors, metadata, index_metadata, descriptors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def source(self) -> str:
        """The file whose word counts for which tensors there are: what an error about a missing one names."""
        if self.index_metadata is not None:
            return str(self.folder / INDEX)
        return ", ".join(str(file) for file in sorted({info.file for info in self._tensors.values()})) or str(
            self.folder
        )

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"There is no tensor {name!r} in {self.source}.")
        return self._tensors[name]

    def read(self, name: str, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor, or `rows` of its first dim: only those bytes are read.

        Into `out` (C-contiguous, of exactly the dtype and shape asked for) when given, else into new page-aligned
        memory.
        """
        info = self.info(name)
        start, shape = info.start, info.shape
        if rows is not None:
            if not shape:
                raise ValueError(f"{name} is a scalar: it has no rows to read a part of.")
            first, last, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows={rows} of {name}: only consecutive rows (step 1) lie together in the file.")
            shape = (max(0, last - first), *shape[1:])
            start += first * (info.nbytes // info.shape[0] if info.shape[0] else 0)
        if out is None:
            out = aligned_empty(shape, info.dtype)
        elif out.dtype != info.dtype or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"out for {name} is {out.dtype}{list(out.shape)}{'' if out.flags.c_contiguous else ', not contiguous'}"
                f"{'' if out.flags.writeable else ', read-only'}; it must be a writable, C-contiguous "
                f"{info.dtype}{list(shape)}."
            )
        self._fill(info, start, out)
        return out

    def _fill(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        if not self._descriptors:
            raise ValueError(f"The reader of {self.folder} is closed.")
        descriptor = self._descriptors[info.file]
        view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + _ONE_CALL]], start + done)
            if not got:
                raise CheckpointError(
                    f"{info.file} ended inside tensor {info.name!r}: it became shorter since it was opened."
                )
            done += got

    def close(self) -> None:
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find(folder: Path) -> tuple[list[Path], dict[str, str] | None, dict[str, Any] | None]:
    """The files to open, the index's weight map and the index's metadata (both None when there is no index)."""
    if folder.is_file():
        if folder.name.endswith(".safetensors"):
            return [folder], None, None
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder (or one file ending in .safetensors).")
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}. Give the local folder that holds config.json and *.safetensors "
            f"(`hf download <repository> --local-dir <folder>` makes one)."
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None, None
    if (folder / INDEX).is_file():
        listed, index_metadata = _read_index(folder / INDEX)
        files = [folder / name for name in sorted(set(listed.values()))]
        if missing := [file for file in files if not file.is_file()]:
            needs = [f"{file.name} ({sum(v == file.name for v in listed.values())} tensors)" for file in missing]
            raise CheckpointError(
                f"{folder / INDEX} names {len(files)} files, of which {len(missing)} are not in the folder; "
                f"download them:{listing(needs)}"
            )
        return files, listed, index_metadata
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files, None, None
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files but neither {SINGLE} nor {INDEX}, so which of them belong "
            f"together is not known. Add the index, or give one file:{listing([file.name for file in files])}"
        )
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles[:3])}{', ...' if len(pickles) > 3 else ''} and no safetensors. Such "
            f"files are pickles, which can run any code when opened, and are refused. Convert them where you trust "
            f'them: AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("<new folder>") with transformers.'
        )
    raise CheckpointError(
        f"{folder} holds no safetensors: neither {SINGLE}, nor {INDEX} with its files, nor any *.safetensors."
    )


def _read_index(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    raw = file.read_bytes()
    if raw.startswith(_LFS):
        raise CheckpointError(_lfs_message(file))
    try:
        index = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from None
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f'{file} has no "weight_map" of tensor names to file names. Download it again.')
    for name, target in listed.items():
        if not isinstance(target, str) or Path(target).name != target or not target.endswith(".safetensors"):
            raise CheckpointError(
                f"{file} places tensor {name!r} in {target!r}; it must be the plain name of a .safetensors file in the "
                f"same folder."
            )
    metadata = index.get("metadata")
    return listed, metadata if isinstance(metadata, dict) else {}


def _read_header(file: Path, descriptor: int) -> tuple[dict[str, TensorInfo], dict[str, str] | None]:
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, max(_LENGTH, len(_LFS)), 0)
    if head.startswith(_LFS):
        raise CheckpointError(_lfs_message(file))
    if size < _LENGTH:
        raise CheckpointError(f"{file} has {size} bytes: too few for a safetensors file. Download it again.")
    length = int.from_bytes(head[:_LENGTH], "little")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{file} says its header has {length} bytes, more than the format's limit of {_MAX_HEADER}: "
            f"it is not a safetensors file."
        )
    if length > size - _LENGTH:
        raise CheckpointError(
            f"{file} says its header has {length} bytes, but the whole file has {size}: it is cut off, or not a "
            f"safetensors file. Download it again."
        )
    raw = b""
    while len(raw) < length:
        more = os.pread(descriptor, length - len(raw), _LENGTH + len(raw))
        if not more:
            raise CheckpointError(f"{file} ended inside its header: it became shorter since it was opened.")
        raw += more
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKeyError as error:
        raise CheckpointError(
            f"{file}: the header has the key {error.key!r} twice, so which counts is unknown."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}). It is not a safetensors file.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(header).__name__}, not an object.")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings, not {metadata!r}.")
    data = _LENGTH + length
    tensors = {name: _tensor_info(file, data, name, entry) for name, entry in header.items()}
    _check_tiling(file, data, size, list(tensors.values()))
    return tensors, metadata


def _tensor_info(file: Path, data: int, name: str, entry: object) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets in the header; it has {entry!r}.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{where} has the dtype {code!r}; known are {', '.join(_DTYPES)}.")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where} has the shape {shape!r}; it must be a list of sizes, none below 0.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; they must be [start, end], none below 0.")
    start, end = offsets
    if start > end:
        raise CheckpointError(f"{where} ends (byte {end}) before it starts (byte {start}).")
    dtype = _DTYPES[code]
    if end - start != (need := math.prod(shape) * dtype.itemsize):
        raise CheckpointError(f"{where} has {end - start} bytes, but {code}{shape} needs {need}.")
    return TensorInfo(name, dtype, tuple(shape), file, data + start, data + end)


def _check_tiling(file: Path, data: int, size: int, tensors: list[TensorInfo]) -> None:
    """The tensors must cover the data part exactly: anything else is damage, or two names for the same bytes."""
    position, before = data, "the header"
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.end > size:
            raise CheckpointError(
                f"{file}: tensor {info.name!r} is in bytes {info.start} to {info.end}, but the file ends at {size}: "
                f"it is cut off. Download it again."
            )
        if info.start != position:
            kind = "overlaps" if info.start < position else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {info.name!r} starts at byte {info.start} and so {kind} {before}, which ends at "
                f"{position}; tensors must follow each other without gaps."
            )
        position, before = info.end, f"tensor {info.name!r}"
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes after {before} belong to no tensor. Download it again.")


def _merge(
    found: dict[Path, dict[str, TensorInfo]], listed: dict[str, str] | None, folder: Path
) -> dict[str, TensorInfo]:
    """All files' tensors together. The index decides where it speaks; elsewhere a name in two files is refused."""
    tensors: dict[str, TensorInfo] = {}
    for file, infos in found.items():
        for name, info in infos.items():
            target = listed.get(name) if listed else None
            if target is not None and target != file.name:
                continue
            if name in tensors:
                raise CheckpointError(
                    f"Tensor {name!r} is in both {tensors[name].file} and {file}, and {folder / INDEX} does not say "
                    f"which one counts."
                )
            tensors[name] = info
    if listed and (missing := [name for name in listed if name not in tensors]):
        raise CheckpointError(
            f"{folder / INDEX} lists {len(missing)} tensors that are not in the file it names; the files and the index "
            f"do not belong together:{listing([f'{name} (in {listed[name]})' for name in missing])}"
        )
    return tensors


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} is there twice")
        self.key = key


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _lfs_message(file: Path) -> str:
    return (
        f"{file} is a Git LFS pointer, a few lines standing for the real file. Fetch it: `git lfs pull` in the "
        f"repository, or `hf download`."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def dtype_code(dtype: np.dtype) -> str:
    """The format's name of a numpy dtype."""
    dtype = np.dtype(dtype)
    if dtype not in _CODES:
        raise CheckpointError(f"safetensors cannot hold {dtype}; it holds {', '.join(str(d) for d in _CODES)}.")
    return _CODES[dtype]


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[np.dtype, Sequence[int]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` (name -> dtype, shape) to `path`, asking `read(name)` for one array at a time.

    The bytes are those of the safetensors library. `path` must not exist: wrap in `output_file` or `output_folder` so
    that a half-written file is never seen under its final name. transformers reads only files whose metadata says
    {"format": "pt"}.
    """
    codes = {name: dtype_code(np.dtype(dtype)) for name, (dtype, _) in tensors.items()}
    if "__metadata__" in codes:
        raise CheckpointError("A tensor cannot be named '__metadata__': the format keeps that key for itself.")
    order = sorted(tensors, key=lambda name: (-_RANK[codes[name]], name.encode()))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": codes[name], "shape": [int(n) for n in shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"The header of {path} would have {len(text)} bytes; the format's limit is {_MAX_HEADER}."
        )
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name in order:
            dtype, shape = tensors[name]
            array = read(name)
            if array.dtype != np.dtype(dtype) or array.shape != tuple(shape):
                raise CheckpointError(
                    f"Tensor {name!r} of {path} was announced as {np.dtype(dtype)}{list(shape)} and came as "
                    f"{array.dtype}{list(array.shape)}."
                )
            if array.size:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def plan_shards(
    tensors: Mapping[str, tuple[np.dtype, Sequence[int]]],
    max_shard_bytes: int = 50_000_000_000,
    like: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Which tensors go into which file: {file name: [tensor names]}.

    Hugging Face's rule: in the order given, a file is closed when the next tensor would take it past `max_shard_bytes`;
    a tensor larger than that has a file of its own. With `like` (the weight map of the folder the model came from) the
    files are the source's, as long as they hold the same tensors; a model with other tensors is split anew.
    """
    if max_shard_bytes <= 0:
        raise ValueError(
            f"max_shard_bytes={max_shard_bytes}: a file must be allowed at least one byte, e.g. 5_000_000_000."
        )
    if like is not None and like.keys() == tensors.keys():
        plan: dict[str, list[str]] = {file: [] for file in sorted(set(like.values()))}
        for name in tensors:
            plan[like[name]].append(name)
        return plan
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes > max_shard_bytes:
            shards.append([name])
            continue
        if filled + nbytes > max_shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += nbytes
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_index(
    folder: str | os.PathLike[str],
    shards: Mapping[str, Sequence[str]],
    tensors: Mapping[str, tuple[np.dtype, Sequence[int]]],
    like: Mapping[str, Any] | None = None,
) -> None:
    """Write model.safetensors.index.json for `shards` (what plan_shards gave), as transformers does.

    `like` is the source folder's `index_metadata`: kept while its total_size is still true (some tools count the
    parameters differently, or note more).
    """
    sizes = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    total = sum(sizes[name] * np.dtype(dtype).itemsize for name, (dtype, _) in tensors.items())
    metadata = {"total_parameters": sum(sizes.values()), "total_size": total}
    if like is not None and like.get("total_size") == total:
        metadata = dict(like)
    index = {"metadata": metadata, "weight_map": {name: file for file, names in shards.items() for name in names}}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    Path(folder, INDEX).write_text(text, encoding="utf-8")
