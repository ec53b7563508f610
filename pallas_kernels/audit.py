"""Reading a compiled program: which bytes stand where, what is copied from and to host memory, and what is wrong with it.

    report = audit(compiled, device_limit=8 * 2**30, overlap=True)
    print(report)
    report.check()                             # ProgramError lists every problem

Streaming weights from pinned host memory is one way of writing a loop among ten that give the same numbers: the others
copy the whole stack, read it over PCIe from a kernel, compute on the host, or overlap nothing. None of them fails, and a
CPU shows none of it, so the compiled program is read: the optimised HLO in schedule order (host memory is `S(5)` in a
layout), and XLA's own count of bytes. It works on what `pallas_kernels.aot` compiles for a card that is not there.

The addresses of host slices get most of the care. XLA writes them into the program as an offset and a stride, apart from
the index that they stand for, and has done so wrongly (openxla/xla#46231: L-1-i and i+1 walked as 0, 1, 2, ...; no
error, wrong layers). So the index is worked out here from the loop's counter, turn by turn, and every address is held
against it; only where an index comes from something that the program does not know are offset and stride judged by form.

What it trusts: the text. Whether a copy that could overlap does, and how fast it is, only a card can say.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

HOST_SPACE = "S(5)"
DEVICE, HOST = "device", "host"

# Turns of a loop whose addresses are worked out: more than any model has layers
MOST_TURNS = 1024


class ProgramError(RuntimeError):
    """A compiled program does not do what it was written for. The text lists every problem."""


@dataclasses.dataclass(frozen=True)
class Tier:
    """Bytes of one program in one memory, on each device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of donated arguments
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Copy:
    """One instruction that reads or writes host memory.

    bytes: of one run of the instruction. dma: a copy engine does it; else a kernel does, with loads and stores over the bus.
    offset, stride: bytes into its stack in turn 0 and from turn to turn, as compiled (None: not known to the compiler).
    loop, turns: the innermost loop around it and how often that turns (None: the program alone does not say).
    runs: how often it runs in one run of the program; a loop whose turns are not known counts once.
    matmuls: matrix products that are scheduled while it runs.
    """

    name: str
    source: str
    target: str
    bytes: int
    dma: bool
    offset: int | None
    stride: int | None
    loop: str | None
    turns: int | None
    runs: int
    matmuls: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `audit` found. device, host: None where only text was read."""

    name: str
    device: Tier | None
    host: Tier | None
    copies: tuple[Copy, ...]
    problems: tuple[str, ...]

    @property
    def streamed(self) -> int:
        """Bytes brought from host to device in one run; a loop whose turns are not known counts once."""
        return sum(c.bytes * c.runs for c in self.copies if (c.source, c.target) == (HOST, DEVICE))

    def check(self) -> Report:
        """Itself, or ProgramError with all problems."""
        if self.problems:
            listed = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
            raise ProgramError(f"{self.name}: {len(self.problems)} problem(s) in the compiled program\n{listed}")
        return self

    def __str__(self) -> str:
        lines = [self.name]
        if self.device is not None and self.host is not None:
            rows: list[tuple[str, ...]] = [("memory", "arguments", "outputs", "aliased", "temporaries", "total")]
            for name, tier in ((DEVICE, self.device), (HOST, self.host)):
                rows.append((name, *map(_size, (*dataclasses.astuple(tier), tier.total))))
            lines += _table(rows)
        if self.copies:
            listed: list[tuple[str, ...]] = [
                ("copy", "way", "by", "bytes", "offset", "stride", "loop", "turns", "matmuls")
            ]
            for c in self.copies:
                by = "DMA" if c.dma else "kernel"
                rest = (c.offset, c.stride, c.loop, c.turns, c.matmuls)
                way = f"{c.source} to {c.target}"
                listed.append((c.name, way, by, _size(c.bytes), *("-" if x is None else str(x) for x in rest)))
            lines += _table(listed)
        lines.append(f"streamed to the device: {_size(self.streamed)}")
        lines += [f"problem: {p}" for p in self.problems] or ["no problem found"]
        return "\n".join(lines)


def audit(
    compiled: Any,
    *,
    device_limit: int | None = None,
    in_place: bool = False,
    overlap: bool = False,
    streamed: int | None = None,
    waits: int = 0,
) -> Report:
    """Read a program compiled for a GPU: a jax.stages.Compiled, or the text of one (without bytes then).

    Always a problem: a host slice at other addresses than its index says; a kernel that reads or writes host memory in a
    loop, or reads a layer of a stack outside one; a whole stack copied, to the device to be sliced there or from host to
    host; compute on the host.
    device_limit: bytes on each device that the program must not pass.
    in_place: host memory beside the arguments, beyond what `waits` there (bytes), is a problem.
    overlap: a host copy in a loop with no matrix product beside it is a problem.
    streamed: bytes that one run must bring from host to device, as Report.streamed counts them.
    Raises ValueError where the program cannot be read for what is asked.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    memory = None if isinstance(compiled, str) else compiled.memory_analysis()
    if memory is None and (device_limit is not None or in_place):
        asked = "device_limit" if device_limit is not None else "in_place"
        raise ValueError(
            f"{asked} needs the bytes of a compiled program, and this has none: pass the compiled program, not text"
        )
    module = _Module(text)
    device = host = None
    if memory is not None:
        device, host = (
            Tier(
                *(getattr(memory, f"{prefix}{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp"))
            )
            for prefix in ("", "host_")
        )
    copies, problems = _Reader(module, overlap).read()
    report = Report(module.name, device, host, copies, ())
    if device_limit is not None and device is not None and device.total > device_limit:
        problems.append(
            f"the program needs {_size(device.total)} on the device and the limit is {_size(device_limit)}: arguments"
            f" {_size(device.arguments)}, temporaries {_size(device.temporaries)}. Leave more layers on the host; copies of an"
            f" unrolled list of layers must be ordered with optimization_barrier, or they all stand there at once"
        )
    if in_place and host is not None and host.temporaries > waits:
        problems.append(
            f"the program takes {_size(host.temporaries)} of host memory for itself: donate the stack that is written, do not"
            f" prefetch from it in the loop that writes it, and slice it only to device_put the slice"
        )
    if in_place and host is not None and host.aliased != host.outputs:
        problems.append(
            f"only {_size(host.aliased)} of {_size(host.outputs)} of outputs in host memory take the place of an argument:"
            f" donate the argument that each stands for, with the same shape, dtype and sharding"
        )
    if streamed is not None and report.streamed != streamed:
        problems.append(
            f"one run brings {report.streamed} bytes from host to device and {streamed} were expected: each layer should"
            f" come once; see the copies"
        )
    return dataclasses.replace(report, problems=tuple(problems))


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# HLO's text


@dataclasses.dataclass(frozen=True)
class _Array:
    """A shape with its layout."""

    bits: int  # of an element
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    host: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * self.bits // 8

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index of each dim to the next."""
        out, step = [0] * len(self.dims), self.bits
        for d in self.minor_to_major:
            out[d] = step // 8
            step *= self.dims[d]
        return tuple(out)


_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


@functools.cache
def _arrays(shape: str) -> tuple[_Array, ...]:
    """The arrays of a shape, those of a tuple in order."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        order, _, tiles = layout.partition(":")
        packed = re.search(r"E\((\d+)\)", tiles)
        digits = packed or re.search(r"(\d+)", dtype)
        bits = int(digits.group(1)) if digits else 8 if dtype == "pred" else 0
        minor = tuple(int(d) for d in order.split(",") if d) or tuple(reversed(range(len(sizes))))
        out.append(_Array(bits, sizes, minor, HOST_SPACE in tiles))
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    inside: str  # what stands in the operands' parentheses
    rest: str  # the attributes
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.inside)) if self.op not in ("constant", "parameter") else ()

    def attribute(self, key: str) -> str | None:
        """A computation's name, a number or a word."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def index(self) -> int:
        return int(self.attribute("index") or 0)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """XLA's backend_config, where it is JSON."""
        at = self.rest.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.rest, at + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}


class _Computation(dict[str, _Instruction]):
    """Instructions by name, in schedule order."""

    root: _Instruction


_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in HLO: {text[start : start + 60]!r}")


class _Module:
    """The computations of a program's text."""

    def __init__(self, text: str) -> None:
        header = re.search(r"^HloModule ([\w.\-]+)(.*)$", text, re.M)
        if header is None:
            raise ValueError(f"this is not the text of a compiled program (no HloModule): {text[:60]!r}")
        self.name = header.group(1)
        self.computations: dict[str, _Computation] = {}
        self.entry = _Computation()
        computation = None
        for line in text.splitlines():
            if computation is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(line, found)
                computation[instruction.name] = instruction
                if instruction.root:
                    computation.root = instruction
            elif found := _COMPUTATION.match(line):
                computation = self.computations[found.group(2)] = _Computation()
                if found.group(1):
                    self.entry = computation
        if not self.entry:
            raise ValueError(f"no ENTRY computation in the text of {self.name}")
        if HOST_SPACE in header.group(2) and not any(HOST_SPACE in i.shape for i in self.entry.values()):
            raise ValueError(
                f"{self.name} has arguments or outputs in host memory, but its backend has only one memory (the CPU's):"
                f" compile it for a card with pallas_kernels.aot"
            )

    def called(self, i: _Instruction) -> _Computation | None:
        """A fusion's computation."""
        return self.computations.get(i.attribute("calls") or "")

    def run_by(self, i: _Instruction) -> list[_Computation]:
        """The computations that a loop, a call or a condition runs instruction by instruction."""
        keys = {
            "while": ("body",),
            "call": ("to_apply",),
            "conditional": ("true_computation", "false_computation"),
        }.get(i.op, ())
        names = [i.attribute(key) or "" for key in keys]
        if i.op == "conditional" and (branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest)):
            names = re.findall(r"%([\w.\-]+)", branches.group(1))
        return [self.computations[n] for n in names if n in self.computations]


def _instruction(line: str, found: re.Match[str]) -> _Instruction:
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return _Instruction(
        name=found.group(2),
        shape=line[start:end],
        op=line[end:opening].strip(),
        inside=line[opening + 1 : closing],
        rest=line[closing + 1 :],
        root=bool(found.group(1)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    """A computation as it is reached: from the instruction `call` of `parent`."""

    computation: _Computation
    parent: _Frame | None = None
    call: _Instruction | None = None

    @property
    def is_loop(self) -> bool:
        return self.call is not None and self.call.op == "while"

    @property
    def loops(self) -> tuple[_Frame, ...]:
        """The loops around it, the innermost first."""
        outer = self.parent.loops if self.parent is not None else ()
        return (self, *outer) if self.is_loop else outer

    @property
    def name(self) -> str:
        return self.call.name if self.call is not None else "entry"

    @property
    def turns(self) -> int | None:
        known = self.call.config.get("known_trip_count", {}).get("n") if self.call is not None else None
        return None if known is None else int(known)

    @property
    def step(self) -> int:
        """By how much the counter grows: two where the loop was unrolled by two."""
        known = self.call.config.get("known_init_step", {}).get("step", 1) if self.call is not None else 1
        return int(known)


def _frames(module: _Module, frame: _Frame) -> Iterator[_Frame]:
    """All computations that are run as a schedule; fusions and reducers are not."""
    yield frame
    for i in frame.computation.values():
        for computation in module.run_by(i):
            yield from _frames(module, _Frame(computation, frame, i))


# ---------------------------------------------------------------------------------------------------------------------
# Whole numbers


@dataclasses.dataclass(frozen=True)
class _State:
    """A loop's state as its body is given it."""

    frame: _Frame
    turn: int


_Value = int | tuple | _State | None
_SAME = {"copy", "bitcast", "reshape", "convert", "broadcast", "optimization-barrier", "opt-barrier"}
_FOLDS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "negate": lambda a: -a,
    "minimum": min,
    "maximum": max,
    "clamp": lambda low, x, high: max(low, min(x, high)),
    "select": lambda p, a, b: a if p else b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARES: dict[str, Callable[[int, int], int]] = {
    "LT": lambda a, b: int(a < b),
    "LE": lambda a, b: int(a <= b),
    "GT": lambda a, b: int(a > b),
    "GE": lambda a, b: int(a >= b),
    "EQ": lambda a, b: int(a == b),
    "NE": lambda a, b: int(a != b),
}


class _UnknownError(Exception):
    """What is asked of an instruction that was not read yet: (frame, name, turn)."""

    def __init__(self, key: tuple[_Frame, str, int]) -> None:
        super().__init__(key)
        self.key = key


class _Numbers:
    """What a program computes from constants and from the turn of `loop`; None for what it takes from elsewhere.

    Of another loop's state only what that loop leaves as it is is known.
    """

    def __init__(self, module: _Module, loop: _Frame | None) -> None:
        self.module, self.loop = module, loop
        self.known: dict[tuple[_Frame, str, int], _Value] = {}

    def at(self, frame: _Frame, name: str, turn: int) -> _Value:
        """What an instruction computes; without recursion, for an index may come through all of a model's layers."""
        wanted = [(frame, name, turn)]
        while wanted:
            try:
                self.known[wanted[-1]] = self._made(*wanted[-1])
                wanted.pop()
            except _UnknownError as unknown:
                wanted.append(unknown.key)
        return self.known[frame, name, turn]

    def _made(self, frame: _Frame, name: str, turn: int) -> _Value:
        i = frame.computation[name]
        if i.op == "parameter":
            return _State(frame, turn) if frame.is_loop else None
        return self.fold(i, lambda o: self._at(frame, o, turn))

    def _at(self, frame: _Frame, name: str, turn: int) -> _Value:
        if (key := (frame, name, turn)) not in self.known:
            raise _UnknownError(key)
        return self.known[key]

    def inside(self, computation: _Computation, name: str, arguments: Callable[[int], _Value]) -> _Value:
        """In a fusion."""
        i = computation[name]
        if i.op == "parameter":
            return arguments(int(i.inside))
        return self.fold(i, lambda o: self.inside(computation, o, arguments))

    def fold(self, i: _Instruction, value: Callable[[str], _Value]) -> _Value:
        if i.op == "constant":
            word = {"true": "1", "false": "0"}.get(i.inside, i.inside)
            return int(word) if re.fullmatch(r"-?\d+", word) else None
        if i.op == "tuple":
            return tuple(map(value, i.operands))
        if i.op == "get-tuple-element":
            whole = value(i.operands[0])
            if isinstance(whole, _State):
                return self.element(whole.frame, i.index, whole.turn)
            return whole[i.index] if isinstance(whole, tuple) else None
        if i.op in _SAME and i.operands:
            return value(i.operands[0])
        if i.op == "fusion" and (computation := self.module.called(i)) is not None:
            return self.inside(computation, computation.root.name, lambda n: value(i.operands[n]))
        fold = _COMPARES.get(i.attribute("direction") or "") if i.op == "compare" else _FOLDS.get(i.op)
        if fold is None:
            return None
        numbers = [n for n in map(value, i.operands) if isinstance(n, int)]
        return fold(*numbers) if len(numbers) == len(i.operands) else None

    def element(self, frame: _Frame, index: int, turn: int) -> _Value:
        """One element of a loop's state in a turn of `loop`."""
        root = frame.computation.root
        assert frame.parent is not None
        assert frame.call is not None
        if root.op != "tuple":
            return None
        if frame is self.loop and turn > 0:
            return self._at(frame, root.operands[index], turn - 1)
        kept = frame.computation[root.operands[index]]
        kept_as_is = (
            kept.op == "get-tuple-element"
            and kept.index == index
            and frame.computation[kept.operands[0]].op == "parameter"
        )
        if frame is not self.loop and not kept_as_is:
            return None
        first = self._at(frame.parent, frame.call.operands[0], turn)
        if isinstance(first, _State):
            return self.element(first.frame, index, first.turn)
        return first[index] if isinstance(first, tuple) else None


# ---------------------------------------------------------------------------------------------------------------------
# Copies


# they move no bytes, or what they call is read by itself
_SILENT = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "optimization-barrier",
    "opt-barrier", "after-all", "partition-id", "replica-id",
}  # fmt: skip
_MATMUL_CALLS = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|cudnn|triton|mosaic)')
_DOT_NAME = re.compile(r'op_name="[^"]*\bdot_general"')


@dataclasses.dataclass(frozen=True)
class _Slice:
    """An instruction that reads or writes one slice of a stack in host memory."""

    instruction: _Instruction
    computation: _Computation | None  # the fusion's; None where it stands alone
    stack: _Array
    sizes: tuple[int, ...]
    indices: tuple[str, ...]
    writes: bool
    source: str | None  # where what it moves is; None where its fusion makes it first

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.stack.bits // 8

    @property
    def config(self) -> dict[str, Any] | None:
        return self.instruction.config.get("dynamic_slice_config")

    @property
    def layer(self) -> int:
        """Bytes from one layer of the stack to the next: along its first dim that is sliced."""
        sliced = [d for d, (all_, some) in enumerate(zip(self.stack.dims, self.sizes, strict=True)) if some < all_]
        return self.stack.strides[sliced[0]] * self.sizes[sliced[0]] if sliced else self.stack.bytes


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The addresses of a slice as they are compiled: bytes, in each turn of `loop` loops outwards (None: always the same)."""

    offset: int
    stride: int
    offsets: tuple[int, ...]  # one by one, in place of a line
    loop: int | None

    def at(self, turn: int) -> int:
        if self.loop is None:
            return self.offset
        if self.offsets:
            return self.offsets[min(turn, len(self.offsets) - 1)]
        return self.offset + self.stride * turn


def _walk(config: dict[str, Any]) -> _Walk:
    """jax 0.10.2 writes the line beside the loop's number, newer ones below `linear` or as a table."""
    line = config.get("linear", config)
    loop = config.get("loop_index")
    return _Walk(
        offset=int(line.get("byte_offset", 0)),
        stride=int(line.get("byte_stride", 0)),
        offsets=tuple(int(x) for x in config.get("table", {}).get("offsets", ())),
        loop=None if loop is None else int(loop),
    )


class _Reader:
    """Finds the copies of a program, and what is wrong with each."""

    def __init__(self, module: _Module, overlap: bool) -> None:
        self.module, self.overlap = module, overlap
        self.frames = tuple(_frames(module, _Frame(module.entry)))
        self.sliced_there = self._sliced_on_the_device()

    def read(self) -> tuple[tuple[Copy, ...], list[str]]:
        copies: list[Copy] = []
        problems: list[str] = []
        for frame in self.frames:
            for i in frame.computation.values():
                on_host = 'execution_thread="host"' in i.rest or '_xla_compute_type="host"' in i.rest
                if (i.op in _SILENT and not (on_host and i.op == "call")) or i.op.endswith(("-done", "-update")):
                    continue
                done = self._done(frame, i)
                reads = self._host_operands(frame, i)
                writes = any(a.host for a in _arrays(done.shape if done is not None else i.shape))
                where = f"%{i.name} in " + (f"loop %{frame.loops[0].name}" if frame.loops else "the entry")
                if on_host:
                    problems.append(
                        f"{where} computes on arrays in host memory ({i.op}; XLA's host compute): bring its operands to the"
                        f" device with device_put first, and slice a stack in host memory only to device_put the slice"
                    )
                elif reads or (writes and i.operands):
                    copy, said = self._copy(frame, i, done, reads, where)
                    copies.append(copy)
                    problems += said
        return tuple(copies), problems

    def _copy(
        self, frame: _Frame, i: _Instruction, done: _Instruction | None, reads: list[str], where: str
    ) -> tuple[Copy, list[str]]:
        result = (done or i).shape
        said: list[str] = []
        offset = stride = None
        base = i.op.removesuffix("-start")
        slice_ = self._slice(frame, i)
        if slice_ is not None:
            moved, dma = slice_.bytes, slice_.config is not None and slice_.source is not None
            source = slice_.source or DEVICE
            target = HOST if any(a.host for a in _arrays(result)) else DEVICE
            if slice_.config is not None:
                walk = _walk(slice_.config)
                offset, stride = walk.offset, walk.stride
                if walk.offsets:
                    offset, stride = walk.offsets[0], None
                said += self._addresses(frame, i, slice_, walk, where)
        else:
            dma = base == "copy"
            arrays = [a for o in reads for a in self._read(frame, i, o)] or [a for a in _arrays(result) if a.host]
            moved = sum(a.bytes for a in arrays)
            source = HOST if reads else DEVICE
            target = HOST if any(a.host for a in _arrays(result)) else DEVICE
            if (source, target) == (HOST, HOST):
                said.append(
                    f"{where} copies {_size(moved)} from host memory to host memory: donate the stack that is written, do not"
                    f" prefetch from it in the loop that writes it, and do not slice a stack outside a loop"
                )
            elif (frame, i.name) in self.sliced_there:
                said.append(
                    f"{where} brings a whole stack of {_size(moved)} to the device, and loop"
                    f" %{self.sliced_there[frame, i.name]} slices it there: device_put each layer's slice in the loop"
                )
        if frame.loops and not dma:
            verb = "reads" if source == HOST else "writes"
            said.append(
                f"{where} {verb} {_size(moved)} of host memory from a kernel, not by DMA: index the stack by the loop's own"
                f" counter alone (the xs of a scan, or i, i + k, n - 1 - i of a fori_loop), not by an array, a clamp or a modulo"
            )
        elif slice_ is not None and source == HOST and not dma:
            said.append(
                f"{where} reads {_size(moved)} of a stack in host memory from a kernel, not by DMA: outside a loop keep each"
                f" layer in an array of its own"
            )
        matmuls = self._matmuls_between(frame, i, done)
        if self.overlap and frame.loops and matmuls == 0:
            said.append(
                f"no matrix product runs while {where} copies {_size(moved)}: bring each layer one turn ahead (carry it), and"
                f" compile with xla_gpu_enable_latency_hiding_scheduler=True"
            )
        loop = frame.loops[0] if frame.loops else None
        copy = Copy(
            name=i.name,
            source=source,
            target=target,
            bytes=moved,
            dma=dma,
            offset=offset,
            stride=stride,
            loop=loop.name if loop is not None else None,
            turns=loop.turns if loop is not None else None,
            runs=math.prod(x.turns if x.turns is not None else 1 for x in frame.loops),
            matmuls=matmuls,
        )
        return copy, said

    def _host_operands(self, frame: _Frame, i: _Instruction) -> list[str]:
        return [
            o for o in i.operands if o in frame.computation and any(a.host for a in _arrays(frame.computation[o].shape))
        ]

    def _done(self, frame: _Frame, i: _Instruction) -> _Instruction | None:
        """The end of what `i` starts."""
        if not i.op.endswith("-start"):
            return None
        names = {i.name}
        for other in frame.computation.values():
            if names.intersection(other.operands):
                if other.op.endswith("-done"):
                    return other
                if other.op.endswith("-update"):
                    names.add(other.name)
        return None

    def _slice(self, frame: _Frame, i: _Instruction) -> _Slice | None:
        """The one slice that `i` is, of an array in host memory; None if it is something else, or more."""
        computation = self.module.called(i) if i.op.removesuffix("-start") == "fusion" else None
        hero = i
        if computation is not None:
            hero = computation.root
            while hero.op in ("bitcast", "reshape"):
                hero = computation[hero.operands[0]]
        if hero.op.removesuffix("-start") not in ("dynamic-slice", "dynamic-update-slice"):
            return None
        stack = self._given(frame, i, computation, hero.operands[0])
        array = _arrays(stack.shape)[0] if stack is not None else None
        if array is None or not array.host:
            return None
        if hero.op.startswith("dynamic-slice"):
            sizes = re.search(r"dynamic_slice_sizes=\{([\d,]*)\}", hero.rest)
            dims = tuple(int(x) for x in sizes.group(1).split(",")) if sizes else ()
            return _Slice(hero, computation, array, dims, hero.operands[1:], False, HOST)
        inner = (frame.computation if computation is None else computation)[hero.operands[1]]
        update = self._given(frame, i, computation, hero.operands[1])
        source = None if update is None else HOST if any(a.host for a in _arrays(update.shape)) else DEVICE
        return _Slice(hero, computation, array, _arrays(inner.shape)[0].dims, hero.operands[2:], True, source)

    def _given(
        self, frame: _Frame, i: _Instruction, computation: _Computation | None, name: str
    ) -> _Instruction | None:
        """What `i` is given as `name` of its fusion; None for what the fusion makes itself."""
        if computation is None:
            return frame.computation[name]
        inner = computation[name]
        while inner.op in ("bitcast", "reshape"):
            inner = computation[inner.operands[0]]
        return frame.computation[i.operands[int(inner.inside)]] if inner.op == "parameter" else None

    def _read(self, frame: _Frame, i: _Instruction, operand: str) -> tuple[_Array, ...]:
        """What `i` reads of an operand: its slices, where its fusion takes only slices of it."""
        computation = self.module.called(i)
        if computation is not None:
            at = str(i.operands.index(operand))
            inner = next((x for x in computation.values() if x.op == "parameter" and x.inside == at), None)
            users = [x for x in computation.values() if inner is not None and inner.name in x.operands]
            if users and all(x.op in ("slice", "dynamic-slice", "gather") for x in users):
                return tuple(a for x in users for a in _arrays(x.shape))
        return _arrays(frame.computation[operand].shape)

    # -- addresses

    def _addresses(self, frame: _Frame, i: _Instruction, slice_: _Slice, walk: _Walk, where: str) -> list[str]:
        """A sentence if a slice's compiled addresses are not those of its index."""
        loops = frame.loops
        if walk.loop is not None and walk.loop >= len(loops):
            return [
                f"{where} takes its addresses from loop {walk.loop} outwards, and only {len(loops)} are around it: do not run it"
            ]
        loop = loops[walk.loop or 0] if loops else None
        numbers = _Numbers(self.module, loop)
        turns = 1 if loop is None else min(loop.turns, MOST_TURNS) if loop.turns is not None else 3
        for turn in range(turns):
            wanted = self._address(numbers, frame, i, slice_, turn)
            if wanted is None:
                return self._by_form(loop, slice_, walk, where)
            if wanted != walk.at(turn):
                verb = "writes" if slice_.writes else "reads"
                return [
                    f"{where} {verb} at byte {walk.at(turn)} of its stack in turn {turn}, and its index there says byte {wanted}"
                    f" (layer {wanted // slice_.layer}): XLA compiled a wrong offset or stride (openxla/xla#46231). Use"
                    f" jax 0.11.1 or newer, or compile with xla_disable_hlo_passes=dynamic-slice-annotator"
                ]
        return []

    def _address(self, numbers: _Numbers, frame: _Frame, i: _Instruction, slice_: _Slice, turn: int) -> int | None:
        """Bytes into the stack by its indices, clamped as XLA clamps them; None if one is not known."""
        out = 0
        for d, name in enumerate(slice_.indices):
            if slice_.computation is None:
                index = numbers.at(frame, name, turn)
            else:
                index = numbers.inside(slice_.computation, name, lambda n: numbers.at(frame, i.operands[n], turn))
            if not isinstance(index, int):
                return None
            out += max(0, min(index, slice_.stack.dims[d] - slice_.sizes[d])) * slice_.stack.strides[d]
        return out

    def _by_form(self, loop: _Frame | None, slice_: _Slice, walk: _Walk, where: str) -> list[str]:
        """For an index that is not known: one layer a turn, forwards or backwards, inside the stack."""
        layer, last = slice_.layer, slice_.stack.bytes - slice_.bytes
        step = layer * (loop.step if loop is not None else 1)
        addresses = [walk.at(0)]
        if loop is not None and loop.turns:
            addresses.append(walk.at(loop.turns - 1))
        if loop is not None and not walk.offsets and abs(walk.stride) != step:
            return [
                f"{where} goes {walk.stride} bytes a turn, and a layer of its stack has {layer}: every layer must be read once;"
                f" do not run it, use jax 0.11.1 or newer"
            ]
        for address in addresses:
            if address % layer or not 0 <= address <= last:
                return [
                    f"{where} is at byte {address} of its stack, which is no layer's: layers of {layer} bytes start at 0 to"
                    f" {last}; do not run it, use jax 0.11.1 or newer"
                ]
        return []

    # -- stacks that are brought whole

    def _sliced_on_the_device(self) -> dict[tuple[_Frame, str], str]:
        """Copies of a host array whose result a loop slices on the device, and that loop's name."""
        out: dict[tuple[_Frame, str], str] = {}
        for frame in self.frames:
            for i in frame.computation.values() if frame.loops else ():
                for operand in self._sliced(frame, i):
                    origin = self._origin(frame, operand)
                    if origin is not None:
                        out[origin] = frame.loops[0].name
        return out

    def _sliced(self, frame: _Frame, i: _Instruction) -> list[str]:
        """Values that `i` takes one layer of: an index of their first dim."""
        computation = self.module.called(i) if i.op.removesuffix("-start") == "fusion" else None
        out = []
        for s in [i] if computation is None else computation.values():
            if s.op.removesuffix("-start") == "dynamic-slice" and "dynamic_slice_sizes={1," in s.rest:
                given = self._given(frame, i, computation, s.operands[0])
                out += [given.name] if given is not None else []
        return out

    def _origin(self, frame: _Frame, name: str) -> tuple[_Frame, str] | None:
        """The copy out of host memory that a value is; None if it is something else."""
        i = frame.computation[name]
        if i.op in ("copy", "copy-start") and self._host_operands(frame, i):
            return frame, i.name
        if i.op in ("copy", "copy-done", "bitcast", "reshape"):
            return self._origin(frame, i.operands[0])
        if i.op == "get-tuple-element":
            return self._element_origin(frame, i.operands[0], i.index)
        return None

    def _element_origin(self, frame: _Frame, name: str, index: int) -> tuple[_Frame, str] | None:
        i = frame.computation[name]
        if i.op == "tuple":
            return self._origin(frame, i.operands[index])
        if i.op == "parameter" and frame.is_loop and frame.parent is not None and frame.call is not None:
            return self._element_origin(frame.parent, frame.call.operands[0], index)
        if i.op in ("while", "optimization-barrier", "opt-barrier"):
            return self._element_origin(frame, i.operands[0], index)
        return None

    # -- matrix products

    def _matmuls_between(self, frame: _Frame, start: _Instruction, done: _Instruction | None) -> int:
        if done is None:
            return 0
        names = list(frame.computation)
        return sum(
            self._matmuls(frame.computation[n]) for n in names[names.index(start.name) + 1 : names.index(done.name)]
        )

    def _matmuls(self, i: _Instruction) -> int:
        """Matrix products that an instruction is: a fusion with one or more counts once; kernels of our own are counted."""
        base = i.op.removesuffix("-start")
        if base in ("dot", "convolution", "ragged-dot"):
            return 1
        if base == "custom-call":
            return int(bool(_MATMUL_CALLS.search(i.rest)))
        if base == "fusion" and (computation := self.module.called(i)) is not None:
            # a product with one row is a multiplication and a sum by now, and keeps its name
            dots = (x.op == "dot" or (x.op == "multiply" and _DOT_NAME.search(x.rest)) for x in computation.values())
            return int(any(dots))
        inner = [sum(map(self._matmuls, c.values())) for c in self.module.run_by(i)]
        return max(inner, default=0)
