"""The name table: one description of how a family's tensors are called and laid out, used in both directions.

A row says that a tensor of theirs (a Hugging Face name, `{layer}` standing for the layer's number) is one parameter of
ours, or several joined along an axis:

    Row("model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.q")
    Row("model.layers.{layer}.mlp.gate_up_proj.weight", "layers.{layer}.mlp.gate", "layers.{layer}.mlp.up")
    Row("h.{layer}.attn.c_attn.weight", "layers.{layer}.attention.q", "...k", "...v", axis=1, transpose=True)

Shapes need no description here. Our matrices keep the order of theirs, [out..., in...], and only have more dims (q is
[N, H, D], their q_proj [N*H, D]), so `Param(shape, out)`, the shape of ours and how many of its dims are outputs, gives
the shape on disk: vectors flat, matrices two-dimensional, transposed for the few families that store [in, out].

A row of which the model has no parameter (biases a config turns off, a tied lm_head) does not count. So one table
serves all configs of a family, import, export and the check that stands before both: every missing, unexpected and
misshapen tensor in one message, before a byte of data is read.

The same weights are saved with and without an outer name ("model.layers.0..." by a causal-lm class, "layers.0..." by
the bare model). `prefixes` lists the spellings, first the one the rows are written in; which one a folder uses is seen
from its names, and an export can keep it. A row that does not begin with the first prefix (lm_head) never changes.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.safetensors import Reader, TensorInfo

_LAYER = "{layer}"

# What other tools' already quantised checkpoints carry beside, or instead of, `weight`.
_QUANTISED = ("qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map")


@dataclass(frozen=True)
class Param:
    """One parameter of ours: its shape, and how many leading dims are outputs (None: a vector, flat on disk)."""

    shape: tuple[int, ...]
    out: int | None = None

    @property
    def flat(self) -> tuple[int, ...]:
        """Its shape on disk before any transposition: (size,), or (outputs, inputs)."""
        if self.out is None:
            return (math.prod(self.shape),)
        return (math.prod(self.shape[: self.out]), math.prod(self.shape[self.out :]))


@dataclass(frozen=True, init=False)
class Row:
    """Their tensor is ours, or ours joined along `axis` of theirs. `transpose`: they store matrices as [in, out]."""

    theirs: str
    ours: tuple[str, ...]
    axis: int
    transpose: bool

    def __init__(self, theirs: str, *ours: str, axis: int = 0, transpose: bool = False) -> None:
        if not ours:
            raise ValueError(f"Row({theirs!r}) names no parameter of ours; what carries nothing goes into `ignore`.")
        if uneven := [name for name in ours if (_LAYER in name) != (_LAYER in theirs)]:
            raise ValueError(f"Row({theirs!r}, {uneven[0]!r}): {_LAYER} must be in both names or in neither.")
        for name in (theirs, *ours):
            if name.count(_LAYER) > 1 or "{" in name.replace(_LAYER, ""):
                raise ValueError(f"Row name {name!r}: the only placeholder is {_LAYER}, at most once.")
        object.__setattr__(self, "theirs", theirs)
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "axis", axis)
        object.__setattr__(self, "transpose", transpose)

    def part(self, param: Param) -> tuple[int, ...]:
        """The shape of one of ours inside theirs."""
        flat = param.flat
        return flat[::-1] if self.transpose else flat

    def whole(self, params: Sequence[Param]) -> tuple[int, ...]:
        """The shape of theirs."""
        parts = [self.part(param) for param in params]
        for part in parts:
            if self.axis >= len(part) or len(part) != len(parts[0]):
                raise ValueError(f"Row({self.theirs!r}, axis={self.axis}) cannot join parts of the shapes {parts}.")
            if [n for i, n in enumerate(part) if i != self.axis] != [
                n for i, n in enumerate(parts[0]) if i != self.axis
            ]:
                raise ValueError(f"Row({self.theirs!r}, axis={self.axis}) cannot join parts of the shapes {parts}.")
        joined = list(parts[0])
        joined[self.axis] = sum(part[self.axis] for part in parts)
        return tuple(joined)


class _Use(NamedTuple):
    """A row at one layer (None: a row without layers), with the names and the parameters it joins there."""

    row: Row
    layer: int | None
    theirs: str
    ours: tuple[str, ...]
    params: tuple[Param, ...]


@dataclass(frozen=True)
class Table:
    """The rows of one family. Everywhere below `params` maps our names to Param; a key may be a full name
    ("layers.3.attention.q") or, for parameters every layer has alike, the row's ("layers.{layer}.attention.q")."""

    rows: tuple[Row, ...]
    ignore: tuple[str, ...]
    prefixes: tuple[str, ...]

    def __init__(self, rows: Iterable[Row], ignore: Iterable[str] = (), prefixes: Sequence[str] = ("",)) -> None:
        rows = tuple(rows)
        for names, whose in (([r.theirs for r in rows], "theirs"), ([n for r in rows for n in r.ours], "ours")):
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise ValueError(f"The table has {twice[0]!r} of {whose} in two rows; each tensor has one place.")
        if isinstance(prefixes, str) or not prefixes:
            raise ValueError(f'prefixes={prefixes!r} must list at least the one the rows are written in, e.g. ("",).')
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "ignore", tuple(ignore))
        object.__setattr__(self, "prefixes", tuple(prefixes))

    # -- names ----------------------------------------------------------------------------------------------------

    def prefix(self, names: Container[str]) -> str:
        """The prefix `names` (a Reader, a set) are spelt with; the first of the table's where none fits better."""

        def fits(prefix: str) -> int:
            return sum(self._theirs(row.theirs, prefix).replace(_LAYER, "0") in names for row in self.rows)

        return max(self.prefixes, key=fits)  # max keeps the first of equals

    def _theirs(self, pattern: str, prefix: str) -> str:
        first = self.prefixes[0]
        return prefix + pattern[len(first) :] if pattern.startswith(first) else pattern

    def _ignored(self, name: str, prefix: str) -> bool:
        return any(
            fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, self._theirs(pattern, prefix))
            for pattern in self.ignore
        )

    def _use(self, row: Row, layer: int | None, params: Mapping[str, Param], prefix: str) -> _Use | None:
        """The row at this layer, or None where the model has none of its parameters."""
        filled = tuple(_fill(name, layer) for name in row.ours)
        found = [params.get(full, params.get(name)) for full, name in zip(filled, row.ours, strict=True)]
        present = tuple(param for param in found if param is not None)
        if not present:
            return None
        if len(present) < len(found):
            lacking = filled[found.index(None)]
            raise ValueError(
                f"The model has a part of {row.theirs!r} but not {lacking!r}; the table needs {', '.join(filled)}."
            )
        return _Use(row, layer, _fill(self._theirs(row.theirs, prefix), layer), filled, present)

    def _uses(self, params: Mapping[str, Param], num_layers: int, prefix: str) -> list[_Use]:
        """All rows that count, in the order a checkpoint has them: neighbouring rows with layers go layer by layer."""
        uses: list[_Use | None] = []
        i = 0
        while i < len(self.rows):
            j = i
            while j < len(self.rows) and _LAYER in self.rows[j].theirs:
                j += 1
            if j == i:
                uses.append(self._use(self.rows[i], None, params, prefix))
                i += 1
            else:
                uses += [self._use(row, layer, params, prefix) for layer in range(num_layers) for row in self.rows[i:j]]
                i = j
        kept = [use for use in uses if use is not None]
        served = {name for use in kept for name in use.ours} | {name for use in kept for name in use.row.ours}
        if homeless := [name for name in params if name not in served]:
            raise ValueError(
                f"The table has no row for {len(homeless)} of the model's parameters ({num_layers} layers):"
                f"{listing(homeless)}"
            )
        return kept

    def _by_ours(self, name: str, params: Mapping[str, Param], prefix: str) -> tuple[_Use, int]:
        for row in self.rows:
            for i, pattern in enumerate(row.ours):
                matched, layer = _match(pattern, name)
                if matched and (use := self._use(row, layer, params, prefix)) is not None:
                    return use, i
        raise ValueError(f"The table has no row for {name!r}, or the model has no such parameter.")

    # -- reading --------------------------------------------------------------------------------------------------

    def check(self, reader: Reader, params: Mapping[str, Param], num_layers: int) -> str:
        """Hold the whole checkpoint against the whole model, from the headers alone; the prefix it is spelt with.

        Raises one CheckpointError with all missing, unexpected and misshapen tensors.
        """
        prefix = self.prefix(reader)
        uses = self._uses(params, num_layers, prefix)
        wanted = {use.theirs for use in uses}
        missing = [(self._theirs(use.row.theirs, prefix), use.layer) for use in uses if use.theirs not in reader]
        unexpected = [name for name in reader.names if name not in wanted and not self._ignored(name, prefix)]
        misshapen: dict[tuple[str, str], list[int | None]] = {}
        for use in uses:
            if use.theirs not in reader:
                continue
            info, needed = reader.info(use.theirs), use.row.whole(use.params)
            if info.shape != needed:
                complaint = f"{list(info.shape)} in {info.file.name}, the model needs {list(needed)}"
                misshapen.setdefault((self._theirs(use.row.theirs, prefix), complaint), []).append(use.layer)
        if not (missing or unexpected or misshapen):
            return prefix
        said = [f"{reader.source} does not fit the model of its config.json ({num_layers} layers)."]
        if missing:
            said.append(f"Missing ({len(missing)}):{listing(_grouped(missing))}")
        if unexpected:
            split = [_generalise(name) for name in unexpected]
            said.append(f"Unexpected ({len(unexpected)}):{listing(_grouped(split))}")
        if misshapen:
            lines = [f"{_with_layers(name, layers)}: {complaint}" for (name, complaint), layers in misshapen.items()]
            said.append(f"Of another shape ({sum(map(len, misshapen.values()))}):{listing(lines)}")
        if any(name.rsplit(".", 1)[-1] in _QUANTISED for name in unexpected):
            said.append(
                "Tensors of such names are of packed matrices, and config.json has no quantization_config that says how they "
                "are packed, or one that leaves these out: add what they were made with (AutoGPTQ's quantize_config.json "
                'has its fields; "quant_method": "gptq" goes with them), or take the unquantised checkpoint.'
            )
        raise CheckpointError("\n".join(said))

    def read(self, reader: Reader, name: str, params: Mapping[str, Param], out: np.ndarray | None = None) -> np.ndarray:
        """Our parameter `name` (a full name) in our shape and the checkpoint's dtype.

        Of a fused tensor only its own part is read where that part is contiguous (axis 0); otherwise all of it is read
        and cut. `out` (C-contiguous, our shape, the checkpoint's dtype) is filled in place of new memory.
        """
        use, i = self._by_ours(name, params, self.prefix(reader))
        row, param = use.row, use.params[i]
        info, needed = reader.info(use.theirs), row.whole(use.params)
        if info.shape != needed:
            raise CheckpointError(f"{use.theirs} in {info.file} is {list(info.shape)}, the model needs {list(needed)}.")
        if out is not None and (out.dtype != info.dtype or out.shape != param.shape or not out.flags.c_contiguous):
            raise ValueError(
                f"out for {name} is {out.dtype}{list(out.shape)}; it must be a C-contiguous {info.dtype}"
                f"{list(param.shape)}."
            )
        start = sum(row.part(before)[row.axis] for before in use.params[:i])
        size = row.part(param)[row.axis]
        own = slice(start, start + size)
        if row.axis == 0 and not row.transpose:
            into = None if out is None else out.reshape(param.flat)
            return reader.read(use.theirs, rows=own, out=into).reshape(param.shape)
        part = reader.read(use.theirs, rows=own) if row.axis == 0 else reader.read(use.theirs)
        if row.axis != 0:
            part = part[(slice(None),) * row.axis + (own,)]
        part = part.T if row.transpose else part
        if out is None:
            return np.ascontiguousarray(part).reshape(param.shape)
        np.copyto(out.reshape(param.flat), part)
        return out

    def where(self, reader: Reader, name: str, params: Mapping[str, Param]) -> TensorInfo | None:
        """Where the bytes of our parameter `name` stand in a file as they are in memory, under our name and shape; None where
        they do not lie together in that order: transposed, or a part of a tensor that is joined along another axis."""
        use, i = self._by_ours(name, params, self.prefix(reader))
        row, param, info = use.row, use.params[i], reader.info(use.theirs)
        if row.transpose or (row.axis and len(use.ours) > 1):
            return None
        rows = sum(p.flat[0] for p in use.params[:i]) if len(use.ours) > 1 else 0
        start = info.start + (rows * (info.nbytes // info.shape[0]) if rows else 0)
        return TensorInfo(
            name, info.dtype, param.shape, info.file, start, start + math.prod(param.shape) * info.dtype.itemsize
        )

    # -- writing --------------------------------------------------------------------------------------------------

    def theirs(
        self, params: Mapping[str, Param], num_layers: int, prefix: str | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this model holds: {their name: shape}, in the order of the table."""
        prefix = self.prefixes[0] if prefix is None else prefix
        return {use.theirs: use.row.whole(use.params) for use in self._uses(params, num_layers, prefix)}

    def parts(self, theirs_name: str, params: Mapping[str, Param]) -> tuple[str, ...]:
        """The names of ours that make up their tensor, in order (in whichever of the prefixes it is spelt)."""
        return self._by_theirs(theirs_name, params).ours

    def transposed(self, theirs_name: str, params: Mapping[str, Param]) -> bool:
        """Whether their tensor is stored [in, out]."""
        return self._by_theirs(theirs_name, params).row.transpose

    def assemble(self, theirs_name: str, get: Callable[[str], np.ndarray], params: Mapping[str, Param]) -> np.ndarray:
        """Their tensor, C-contiguous, from ours: `get(full name)` is asked for each part in turn."""
        use = self._by_theirs(theirs_name, params)
        parts: list[np.ndarray] = []
        for name, param in zip(use.ours, use.params, strict=True):
            array = get(name)
            if array.shape != param.shape:
                raise ValueError(f"{name} came as {list(array.shape)}, but the model says {list(param.shape)}.")
            flat = array.reshape(param.flat)
            parts.append(flat.T if use.row.transpose else flat)
        if len({part.dtype for part in parts}) > 1:
            dtypes = ", ".join(f"{name} {part.dtype}" for name, part in zip(use.ours, parts, strict=True))
            raise ValueError(f"{theirs_name} joins parts of different dtypes ({dtypes}); make them one dtype first.")
        if len(parts) == 1:
            return np.ascontiguousarray(parts[0])
        joined = np.empty(use.row.whole(use.params), parts[0].dtype)  # concatenate alone would keep transposed memory
        return np.concatenate(parts, axis=use.row.axis, out=joined)

    def _by_theirs(self, name: str, params: Mapping[str, Param]) -> _Use:
        for prefix in self.prefixes:
            for row in self.rows:
                matched, layer = _match(self._theirs(row.theirs, prefix), name)
                if matched and (use := self._use(row, layer, params, prefix)) is not None:
                    return use
        raise ValueError(f"The table has no row that makes {name!r} from the model's parameters.")


def _fill(pattern: str, layer: int | None) -> str:
    return pattern if layer is None else pattern.replace(_LAYER, str(layer))


def _match(pattern: str, name: str) -> tuple[bool, int | None]:
    if _LAYER not in pattern:
        return pattern == name, None
    before, after = pattern.split(_LAYER)
    if not (name.startswith(before) and name.endswith(after)):
        return False, None
    number = name[len(before) : len(name) - len(after)]
    return (True, int(number)) if re.fullmatch(r"0|[1-9][0-9]*", number) else (False, None)


def _generalise(name: str) -> tuple[str, int | None]:
    """A name with its first whole number taken out, so that a complaint about 80 layers is one line."""
    found = re.search(r"(?<=\.)(\d+)(?=\.)|^(\d+)(?=\.)", name)
    if found is None:
        return name, None
    return name[: found.start()] + _LAYER + name[found.end() :], int(found.group())


def _grouped(names: Iterable[tuple[str, int | None]]) -> list[str]:
    groups: dict[str, list[int | None]] = {}
    for pattern, layer in names:
        groups.setdefault(pattern, []).append(layer)
    return [_with_layers(pattern, layers) for pattern, layers in groups.items()]


def _with_layers(pattern: str, layers: Sequence[int | None]) -> str:
    numbers = sorted(layer for layer in layers if layer is not None)
    if not numbers:
        return pattern
    if len(numbers) == 1:
        return pattern.replace(_LAYER, str(numbers[0]))
    runs: list[str] = []
    for n in numbers:
        if runs and int(runs[-1].split("-")[-1]) == n - 1:
            runs[-1] = f"{runs[-1].split('-')[0]}-{n}"
        else:
            runs.append(str(n))
    return f"{pattern} (layers {', '.join(runs)})"
