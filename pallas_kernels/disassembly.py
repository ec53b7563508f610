"""What the compiler made of a kernel: registers, stack, shared memory, and the instructions of its innermost loop.

    for kernel in kernels(compiled):
        print(kernel.name, kernel.registers, kernel.stack, kernel.shared_memory)
        loop = innermost_loop(instructions(kernel))
        print(len(loop), Counter(i.opcode.split(".")[0] for i in loop))

A kernel that is to read weights at the speed of memory has a budget of a few instructions a weight (NVIDIA H200: 3.1 for
one of 4 bits), and whether it keeps to it does not show in its source: a conversion that the compiler does not know is
ten instructions, a register too many is a store and a load of memory. All of it can be read out of a program that was
compiled for a card that is not there (`pallas_kernels.aot`).

A serialised executable of jaxlib is a Riegeli file (github.com/google/riegeli, doc/riegeli_records_file_format.md) in a
Riegeli file, of protocol buffers in Snappy's compression, and each kernel is a cubin in one of them, beside its grid. A
cubin is an ELF file whose `.nv.info` sections hold what ptxas says with -v. All that is read here with no tool and no
schema: a kernel is found by its shape (a message with a name, a cubin of the same name, a grid and threads). Only the
instructions need a tool, nvdisasm: of the CUDA toolkit, or of the package nvidia-cuda-nvdisasm.

What it trusts: that a backward branch is a loop. A loop that ptxas has unrolled is longer than one turn of the source; the
matrix instructions in it say how many turns it holds.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_RIEGELI = bytes.fromhex("83af70d10d884a3f0000000000000000")  # the header of a file's first block
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 65536, 24, 40
_ELF = b"\x7fELF"

# attributes of .nv.info (cuobjdump --dump-elf prints their names)
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program. Bytes and counts."""

    name: str
    grid: tuple[int, ...]
    threads: int  # of a block
    shared_memory: int  # of a block, as it is launched
    registers: int  # of a thread
    stack: int  # of a thread: what did not stay in registers
    cubin: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One SASS instruction: its address in the kernel, opcode with modifiers ("HMMA.16816.F32.BF16"), operands as text."""

    address: int
    opcode: str
    operands: str


def kernels(compiled: Any) -> tuple[Kernel, ...]:
    """The kernels of a program that was compiled for an NVIDIA GPU (a jax.stages.Compiled), libraries' own not among them.

    Raises ValueError where none can be read from it.
    """
    found = tuple(k for record in _records(bytes(compiled.runtime_executable().serialize())) for k in _kernels(record))
    if not found:
        raise ValueError(
            "the executable holds no kernel: it was compiled for another platform, or jaxlib's format is new"
        )
    return found


# -- protocol buffers of unknown schema


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Field number -> values of a message: ints, or bytes. ValueError where it is none."""
    at, found = 0, {}
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            wire = tag & 7
            if wire == 0:
                value, at = _varint(data, at)
            else:
                if wire == 2:
                    size, at = _varint(data, at)
                elif wire in (1, 5):
                    size = 8 if wire == 1 else 4
                else:
                    raise ValueError(f"wire type {wire}")
                value, at = data[at : at + size], at + size
            found.setdefault(tag >> 3, []).append(value)
    except IndexError as e:
        raise ValueError("the message is cut short") from e
    if at != len(data):
        raise ValueError("the message is cut short")
    return found


def _message(fields: dict[int, list[int | bytes]], number: int) -> dict[int, list[int | bytes]]:
    value = fields.get(number, [b""])[0]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is a number")
    return _fields(value)


def _numbers(message: dict[int, list[int | bytes]]) -> tuple[int, ...]:
    return tuple(v[0] for _, v in sorted(message.items()) if isinstance(v[0], int))


def _kernels(data: bytes) -> Iterator[Kernel]:
    """Those in a message and all messages in it."""
    if _ELF not in data or data.startswith(_ELF):
        return
    try:
        fields = _fields(data)
    except ValueError:
        return
    if (kernel := _kernel(fields)) is not None:
        yield kernel
        return
    for values in fields.values():
        for value in values:
            if isinstance(value, bytes):
                yield from _kernels(value)


def _kernel(fields: dict[int, list[int | bytes]]) -> Kernel | None:
    """xla.gpu.CustomKernelProto: name = 1, the cubin's message = 2, blocks = 3, threads = 4, then shared memory."""
    try:
        name, spec = fields[1][0], _message(fields, 2)
        [cubin] = [v[0] for f in spec for v in _inner(spec, f) if isinstance(v[0], bytes) and v[0].startswith(_ELF)]
        grid, threads = (_numbers(_message(_message(fields, f), i)) for f, i in ((3, 2), (4, 1)))
    except (KeyError, ValueError):
        return None
    if not (isinstance(name, bytes) and isinstance(cubin, bytes) and grid and threads):
        return None
    count = 1
    for n in threads:
        count *= n
    shared = next((v[0] for f, v in sorted(fields.items()) if f > 4 and isinstance(v[0], int)), 0)
    assert isinstance(shared, int)
    return Kernel(
        name.decode(), grid, count, shared, _attribute(cubin, _REGISTERS), _attribute(cubin, _FRAME_SIZE), cubin
    )


def _inner(fields: dict[int, list[int | bytes]], number: int) -> Iterator[list[int | bytes]]:
    try:
        yield from _message(fields, number).values()
    except ValueError:
        return


# -- Riegeli and Snappy


def _records(data: bytes) -> Iterator[bytes]:
    """Records of the Riegeli file in `data`, and of those in its records; `data` itself where there is none."""
    start = data.find(_RIEGELI)
    if start < 0:
        yield data
        return
    data = data[start:]

    def take(at: int, size: int) -> tuple[bytes, int]:
        parts = []
        while size > 0 and at < len(data):
            if at % _BLOCK == 0:
                at += _BLOCK_HEADER
            part = data[at : at + min(size, _BLOCK - at % _BLOCK)]
            if not part:
                break
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return b"".join(parts), at

    at = 0
    while at < len(data):
        header, at = take(at, _CHUNK_HEADER)
        if len(header) < _CHUNK_HEADER:
            return
        _, size, _, kind, _ = struct.unpack("<5Q", header)
        chunk, at = take(at, size)
        if kind & 255 == ord("r"):
            for record in _chunk(chunk):
                yield from _records(record)


def _chunk(chunk: bytes) -> Iterator[bytes]:
    """Records of a simple chunk: the compression, the sizes' size, sizes, values."""
    length, at = _varint(chunk, 1)
    parts = [chunk[at : at + length], chunk[at + length :]]
    if chunk[:1] == b"s":
        parts = [_uncompressed(part[_varint(part, 0)[1] :]) for part in parts]
    elif chunk[:1] != b"\0":
        raise ValueError(f"the executable is compressed by {chunk[:1]!r}; only Snappy can be read here")
    sizes, values = parts
    at = start = 0
    while at < len(sizes):
        length, at = _varint(sizes, at)
        yield values[start : start + length]
        start += length


def _uncompressed(data: bytes) -> bytes:
    """github.com/google/snappy, format_description.txt."""
    length, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            size = (tag >> 2) + 1
            if size > 60:
                width = size - 60
                size = int.from_bytes(data[at : at + width], "little") + 1
                at += width
            out += data[at : at + size]
            at += size
            continue
        if tag & 3 == 1:
            size, back = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at]
            at += 1
        else:
            width = 2 if tag & 3 == 2 else 4
            size, back = 1 + (tag >> 2), int.from_bytes(data[at : at + width], "little")
            at += width
        for _ in range(size):  # what is copied may overlap with what is written
            out.append(out[-back])
    if len(out) != length:
        raise ValueError(f"{len(out)} bytes of {length} were compressed")
    return bytes(out)


# -- cubins


def _attribute(cubin: bytes, wanted: int) -> int:
    """The most that any function of the cubin says of an attribute in `.nv.info`."""
    sections, count, names_at = struct.unpack_from("<Q", cubin, 0x28)[0], *struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + 64 * i) for i in range(count)]
    names = headers[names_at][4]
    found = []
    for name, _, _, _, offset, size in headers:
        if cubin[names + name : cubin.index(b"\0", names + name)] != b".nv.info":
            continue
        at = offset
        while at < offset + size:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # the value is a size, and that many bytes follow: here a symbol and a number
                if attribute == wanted:
                    found.append(struct.unpack_from("<II", cubin, at)[1])
                at += value
    if not found:
        raise ValueError(f"the cubin has no attribute {wanted:#x} in .nv.info")
    return max(found)


# -- instructions


def nvdisasm() -> str | None:
    """The path of nvdisasm: on PATH, or in the package nvidia-cuda-nvdisasm; None where there is neither."""
    if found := shutil.which("nvdisasm"):
        return found
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    return next((str(p) for p in sorted(packages.glob("*/bin/nvdisasm"))), None)


def missing() -> str | None:
    """Why instructions cannot be read here; None if they can."""
    return None if nvdisasm() else "nvdisasm is not installed: pip install nvidia-cuda-nvdisasm"


def instructions(kernel: Kernel) -> tuple[Instruction, ...]:
    """All instructions of a kernel in the order of their addresses. RuntimeError where nvdisasm is missing or fails."""
    tool = nvdisasm()
    if tool is None:
        raise RuntimeError(missing())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.cubin)
        said = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"nvdisasm: {said.stderr.strip()}")
    return _parsed(said.stdout)


_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")


def _parsed(text: str) -> tuple[Instruction, ...]:
    found, labels, waiting = [], {}, []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _LINE.search(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append(Instruction(address, match[3], match[4].strip()))

    def resolved(i: Instruction) -> Instruction:
        target = re.search(r"`\((\.L_\w+)\)", i.operands)
        if target is None or target[1] not in labels:
            return i
        return dataclasses.replace(i, operands=i.operands.replace(target[0], f"{labels[target[1]]:#x}"))

    return tuple(map(resolved, found))


def innermost_loop(listing: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The instructions of the loop that has no other in it; of several, the one with the most matrix instructions, of as many
    the shortest. Where any loop has matrix instructions, those without (they wait for a barrier) do not count; where none has,
    it is the longest. What waits may stand behind the kernel's end (sm_100): a branch back from there is none. ValueError where
    there is no loop."""
    spans = []
    for i in listing:
        if i.opcode.split(".")[0] == "BRA" and (target := re.search(r"0x([0-9a-f]+)\s*$", i.operands)):
            start = int(target[1], 16)
            if start < i.address:  # a branch to itself is the padding behind a kernel's end
                spans.append((start, i.address))
    if not spans:
        raise ValueError("the kernel has no loop")
    bodies = {(start, end): tuple(i for i in listing if start <= i.address <= end) for start, end in spans}
    spans = [a for a in spans if not any(i.opcode == "EXIT" for i in bodies[a])] or spans
    spans = [a for a in spans if matrix_instructions(bodies[a])] or spans
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]

    def rank(body: Sequence[Instruction]) -> tuple[int, int]:
        count = matrix_instructions(body)
        return count, -len(body) if count else len(body)

    return max((bodies[a] for a in inner), key=rank)


def matrix_instructions(listing: Sequence[Instruction]) -> int:
    """Those that run on the tensor cores."""
    return sum(bool(re.match(r"[HIQDO]?G?MMA\b|UTC\w*MMA\b", i.opcode.split(".")[0])) for i in listing)


def counts(listing: Sequence[Instruction]) -> Counter[str]:
    """Opcode without modifiers -> how often."""
    return Counter(i.opcode.split(".")[0] for i in listing)
