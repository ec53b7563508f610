"""Quantised checkpoints of others as a source of parameters: their codes in our formats, without dequantising.

checkpoints/quantized/ says what each packed matrix holds; here it is decided which of our formats holds the same, what the
plan therefore says (weights and weight_rules), and each matrix is repacked as it is read. Numbers are those that the
checkpoint holds; where one scale is for more inputs than a group of ours may have, or for a number of them that is no
power of two, it is repeated for smaller groups.

act-order (GPTQ's desc_act). The columns of such a matrix are sorted by group, and whoever contracts with it must gather its
input in that order. Of a feed-forward block no gather is left: what its last matrix reads is made by the rows of the matrices
before it, one row a number, so these rows are put in that order instead, once, while they are read (TP-aware
dequantisation, arXiv:2402.04925). Neighbouring rows then belong to neighbouring columns, and a mesh splits both alike.
It is exact: only the order of a sum changes. Elsewhere the order stays beside the codes (a format's act_order), and where a mesh
splits the inputs, as of an attention's output matrix, it is resolved in each device's part of a row as the matrix is read
(orders.py, weights/_parts.py): a device gathers from the inputs that it has.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import jax
import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.quantized import Matrix, Method, Stored, column_order
from checkpoints.safetensors import Reader, TensorInfo
from jaxengine import formats
from jaxengine.architecture import Architecture, Spec
from jaxengine.plan import DTYPES, Plan, parameter_bytes
from jaxengine.sources import HuggingFace, Origin, dtypes_of, layer_of, stacked_name

ELEMENTWISE = "mlp"  # the dim inside a feed-forward block, of which each number is made and read on its own
LARGEST_GROUP = {"int8": 128, "nf4": 128}  # inputs; 256 in the other integer formats
SMALLEST_GROUP = {"nf4": 32}  # 16 in the others
FP8 = {np.dtype(ml_dtypes.float8_e4m3fn).name: "e4m3", np.dtype(ml_dtypes.float8_e5m2).name: "e5m2"}
BLOCK = 128  # of fp8 in blocks
PIECE = 2**21  # weights that are unpacked at a time


class View:
    """A reader in which a packed matrix is one tensor under its plain name, of the shape that the model needs."""

    def __init__(self, tensors: Any, method: Method):
        self._tensors = tensors
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.packed: dict[str, list[str]] = {}
        self._names: dict[str, None] = {}
        for name in tensors.names:
            owner = method.owner(name, tensors.info(name))
            self._names[name if owner is None else owner] = None
            if owner is not None:
                self.packed.setdefault(owner, []).append(name)

    def hide(self, name: str) -> None:
        """Take a tensor out of the view."""
        del self._names[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        if name not in self.packed:
            return self._tensors.info(name)
        parts: list[TensorInfo] = [self._tensors.info(n) for n in self.packed[name]]
        widest = max(parts, key=lambda info: info.nbytes)
        shape = self.shapes.get(name, widest.shape)
        return TensorInfo(name, widest.dtype, shape, widest.file, 0, sum(info.nbytes for info in parts))

    def read(self, name: str, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray:
        return self._tensors.read(name, rows=rows, out=out)

    def __getattr__(self, name: str) -> Any:
        # what belongs to the folder: source, metadata, weight_map, index_metadata, close
        return getattr(self._tensors, name)


class Quantized:
    """A folder whose matrices are packed in somebody else's way. `plan` says the formats that they are given in."""

    def __init__(self, folder: Path, architecture: Architecture, raw: Mapping[str, Any], tensors: Any, method: Method):
        self.folder, self._raw, self._method, self._tensors = folder, raw, method, tensors
        self._said = f"quant_method {(raw.get('quantization_config') or {}).get('quant_method', 'gguf')!r}"
        try:
            view = View(tensors, method)
            self._describe(view, architecture)
            self._plain = HuggingFace(folder, architecture, cast(Reader, view))
            self.architecture = self._plain.architecture
            self._specs, self._params = self.architecture.specs(), self.architecture.params()
            self._absorbed = self._find_absorbed()
            self.plan: Plan | None = self._make_plan()
        except BaseException:
            tensors.close()
            raise
        plain = {self._plain.theirs(n) for n in self._specs} - self._stored.keys()
        self.nbytes = sum(view.info(n).nbytes for n in plain) + sum(
            parameter_bytes(self.plan, n, self._specs[n]) for n in self._specs if self._stored_of(n) is not None
        )

    # -- what there is ------------------------------------------------------------------------------------------------

    def _describe(self, view: View, architecture: Architecture) -> None:
        """self._stored: {their name: Stored} of every packed matrix of the model; raises CheckpointError for all that do
        not fit."""
        # a tied head that is there all the same is looked at as well: it may turn out to be one of its own
        whole = dataclasses.replace(
            architecture, config=dataclasses.replace(architecture.config, tie_word_embeddings=False)
        )
        params, table = whole.params(), whole.name_table()
        theirs = table.theirs(params, whole.num_layers, table.prefix(view))
        self._stored: dict[str, Stored] = {}
        self._ordered: set[str] = set()  # those whose columns have to be sorted
        wrong: list[str] = []
        for name, shape in theirs.items():
            if name not in view.packed:
                continue
            flats = [params[n].flat for n in table.parts(name, params)]
            try:
                excepted = self._method.excepted(name.removesuffix(".weight"))
                if excepted is not None:
                    raise CheckpointError(
                        f"{name} is packed, and {excepted} of quantization_config says that it is not"
                    )
                if len(flats[0]) != 2 or len({flat[-1] for flat in flats}) > 1:
                    raise CheckpointError(
                        f"{name} is packed; of this model it is {list(shape)}, which is not one matrix"
                    )
                outputs, inputs = sum(flat[0] for flat in flats), flats[0][1]
                self._stored[name] = stored = self._method.describe(self._tensors, name, outputs, inputs)
                if self._order(stored) is not None:
                    self._ordered.add(name)
            except CheckpointError as error:
                wrong.append(str(error))
            view.shapes[name] = shape
        if wrong:
            raise CheckpointError(
                f"{self.folder}: {_matrices(len(wrong))} not fit quantization_config ({self._said}):{listing(wrong)}"
            )
        if not view.packed:
            raise CheckpointError(
                f"{self.folder}: quantization_config names {self._said}, and no tensor is packed in that way: take"
                f" quantization_config out of config.json if the weights are plain, or download the checkpoint again"
            )
        for name in self._stored:
            # some writers give every packed matrix a bias, of zeros where the model has none
            bias = name.removesuffix("weight") + "bias"
            if bias in view and bias not in theirs and not np.any(view.read(bias)):
                view.hide(bias)

    def _stored_of(self, name: str) -> Stored | None:
        return self._stored.get(self._plain.theirs(name))

    def _find_absorbed(self) -> dict[str, str]:
        """{parameter: the matrix whose order of columns its rows are put in}, for every act-order matrix whose inputs are
        made inside the same block."""
        found: dict[str, str] = {}
        for i, kind in enumerate(self.architecture.kinds):
            specs = self.architecture.block(kind)[1]
            readers = [n for n, s in specs.items() if s.out is not None and ELEMENTWISE in s.axes[s.out :]]
            makers = [n for n, s in specs.items() if ELEMENTWISE in s.axes and n not in readers]
            if len(readers) != 1 or len(specs[readers[0]].shape) != 2 or any(not _by_row(specs[n]) for n in makers):
                continue
            reader = f"layers.{i}.{readers[0]}"
            stored = self._stored_of(reader)
            if stored is None or stored.name not in self._ordered:
                continue
            makers = [f"layers.{i}.{n}" for n in makers]
            if any((s := self._stored_of(n)) is not None and s.block is not None for n in makers):
                continue
            found |= dict.fromkeys(makers, reader)
        return found

    # -- the formats --------------------------------------------------------------------------------------------------

    def _make_plan(self) -> Plan:
        absorbing = set(self._absorbed.values())
        self._formats: dict[str, str] = {}
        wrong: list[str] = []
        stacks: dict[str, list[str]] = {}
        for name in self._specs:
            stacks.setdefault(stacked_name(name), []).append(name)
        for names in stacks.values():
            held = {n: s for n in names if (s := self._stored_of(n)) is not None}
            if not held:
                continue
            for name, stored in held.items():
                # layers that differ in no more than this can stand in one stack
                like = {n: s for n, s in held.items() if (s.kind, s.group) == (stored.kind, stored.group)}
                affine = any(s.affine for s in like.values())
                scales = {s.scale for s in like.values()}
                scale = scales.pop() if len(scales) == 1 else "float32"
                order = any(s.name in self._ordered and n not in absorbing for n, s in like.items())
                try:
                    self._check_rows(name, stored)
                    self._formats[name] = _format(stored, scale, affine=affine, order=order)
                except CheckpointError as error:
                    wrong.append(str(error))
        if wrong:
            raise CheckpointError(
                f"{self.folder}: {len(wrong)} matrices ({self._said}) have no format here:{listing(wrong)}"
            )
        layers = collections.Counter(f for n, f in self._formats.items() if layer_of(n) is not None)
        weights = layers.most_common(1)[0][0] if layers else "dense"
        rules = []
        for stack, names in stacks.items():
            if self._specs[names[0]].out is None:
                continue
            chosen = [self._formats.get(n, "dense") for n in names]
            usual = "dense" if layer_of(names[0]) is None else weights
            # the layers that differ come first: the first match wins
            most = collections.Counter(chosen).most_common(1)[0][0]
            rules += [(n, f) for n, f in zip(names, chosen, strict=True) if f != most]
            if most != usual:
                rules.append((stack if layer_of(names[0]) is None else "layers.*." + stack.split(".", 1)[1], most))
        return Plan(dtype=self._dtype(), weights=weights, weight_rules=tuple(rules))

    def _order(self, stored: Stored) -> np.ndarray | None:
        return column_order(self._tensors, stored)

    def _check_rows(self, name: str, stored: Stored) -> None:
        """Refuse a part of a joined matrix that begins inside a block of rows with one scale."""
        rows = self._rows(name)
        if stored.block is not None and (rows.start % BLOCK or (rows.stop % BLOCK and rows.stop != stored.outputs)):
            raise CheckpointError(
                f"{name} is rows {rows.start} to {rows.stop} of {stored.name}, which has one scale for each {BLOCK} rows;"
                f" a part must begin and end with a block"
            )

    def _dtype(self) -> str:
        """Of activations: what config.json names; else what scales or plain tensors are in."""
        named = self._raw.get("dtype") or self._raw.get("torch_dtype")
        if isinstance(named, str) and named in DTYPES:
            return named
        found = [s.scale for s in self._stored.values() if s.scale in ("float16", "bfloat16")]
        return found[0] if found else "float32"

    # -- the source ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.close()

    def read(self, name: str) -> Any:
        """One parameter: an array, or a Weight of numpy arrays."""
        stored, order = self._stored_of(name), self._rows_order(name)
        if stored is None:
            array = self._plain.read(name)
            return array if order is None else np.ascontiguousarray(array[order])
        spec, rows = self._specs[name], self._rows(name)
        try:
            if stored.by_rows and order is None:
                return self._by_rows(name, stored, spec, rows)
            matrix = self._method.read(self._tensors, stored, rows)
            if name in self._absorbed.values():
                matrix = dataclasses.replace(matrix, perm=None)
            if order is not None:
                matrix = matrix.rows(order)
            return _pack(self._formats[name], stored, matrix, spec)
        except ValueError as error:
            raise CheckpointError(f"{stored.name} in {self.folder}: {error}") from error

    def _by_rows(self, name: str, stored: Stored, spec: Spec, rows: slice) -> Any:
        """A few rows after others: unpacked codes, and what is made on the way, are several times the bytes of packed ones."""
        assert spec.out is not None
        whole: Any = None
        for start in range(rows.start, rows.stop, step := max(1, PIECE // stored.inputs)):
            some = slice(start, min(start + step, rows.stop))
            matrix = self._method.read(self._tensors, stored, some)
            shape = (some.stop - some.start, *spec.shape[spec.out :])
            part = _pack(self._formats[name], stored, matrix, dataclasses.replace(spec, shape=shape, out=1))
            if whole is None:
                count = rows.stop - rows.start
                whole = jax.tree.map(lambda a, n=count: np.empty((n, *a.shape[1:]), a.dtype), part)
            at = slice(some.start - rows.start, some.stop - rows.start)
            jax.tree.map(lambda w, p, at=at: w.__setitem__(at, p), whole, part)
        return jax.tree.map(lambda a: a.reshape(*spec.shape[: spec.out], *a.shape[1:]), whole)

    def dtype(self, name: str) -> np.dtype:
        """The file's dtype; of a packed matrix, the plan's."""
        assert self.plan is not None
        return np.dtype(self.plan.dtype) if self._stored_of(name) is not None else self._plain.dtype(name)

    def where(self, name: str) -> TensorInfo | None:
        """None: codes are arranged as they are read."""
        return None

    def origin(self, config: dict[str, Any]) -> Origin:
        """As a plain folder's, without quantization_config: an export holds plain weights."""
        plain = self._plain.origin({k: v for k, v in config.items() if k != "quantization_config"})
        return dataclasses.replace(plain, dtypes=dtypes_of(self.architecture, self.dtype))

    def _rows(self, name: str) -> slice:
        """The rows of their matrix that are this parameter's."""
        start = 0
        for part in self.architecture.name_table().parts(self._plain.theirs(name), self._params):
            size = self._params[part].flat[0]
            if part == name:
                return slice(start, start + size)
            start += size
        raise KeyError(name)

    def _rows_order(self, name: str) -> np.ndarray | None:
        """The order that rows are put in for the matrix that reads them."""
        reader = self._absorbed.get(name)
        stored = None if reader is None else self._stored_of(reader)
        return None if stored is None else self._order(stored)


def _matrices(count: int) -> str:
    return f"{count} matrices do" if count > 1 else "one matrix does"


def _by_row(spec: Spec) -> bool:
    """Whether each number of the dim inside the block is a row: a vector of them, or a matrix with them as its outputs."""
    return spec.axes == (ELEMENTWISE,) or (spec.out == 1 and spec.axes[0] == ELEMENTWISE)


def _group(stored: Stored) -> int:
    """The inputs that share a scale in our format, of what `stored` has: its own, or a part of it. 0: all of a row."""
    kind, theirs = stored.kind, stored.group
    largest = LARGEST_GROUP.get(kind, 256)
    if theirs in (0, stored.inputs):
        if kind == "int8":
            return 0
        return min(max(SMALLEST_GROUP.get(kind, 16), 1 << (stored.inputs - 1).bit_length()), 128)
    ours = min(theirs & -theirs, largest)  # the largest power of two that divides it
    if ours < SMALLEST_GROUP.get(kind, 16):
        raise CheckpointError(
            f"{stored.name} shares scales among {theirs} inputs; {kind} here has groups of a power of two, at least"
            f" {SMALLEST_GROUP.get(kind, 16)}, and the nearest that divides {theirs} is {ours}"
        )
    return ours


def _format(stored: Stored, scale: str, *, affine: bool, order: bool) -> str:
    """Our format with what `stored` has, as a plan names it."""
    kind = stored.kind
    if kind == "mxfp4":
        return kind
    if kind.startswith("kquant"):
        return str(formats.find(f"kquant:bits={kind.removeprefix('kquant')}"))
    if kind == "fp8":
        if stored.block is not None and any(n % BLOCK for n in stored.block):
            raise CheckpointError(
                f"{stored.name} has scales for blocks of {list(stored.block)}; read are multiples of {BLOCK} each way"
            )
        shared = "block128" if stored.block is not None else "tensor" if stored.per_tensor else "channel"
        return str(formats.find(f"fp8:dtype={FP8[stored.codes]},scale={shared}"))
    if kind == "nf4":
        return str(formats.find(f"nf4:group_size={_group(stored)},double=false"))
    said = f"{kind}:group_size={_group(stored)}"
    if kind != "int8":
        said += f",affine={affine},scale={scale}"
    return str(formats.find(f"{said},act_order=true" if order else said))


def _pack(text: str, stored: Stored, matrix: Matrix, spec: Spec) -> Any:
    """The Weight of numpy arrays that `encode` of this format would have made of the same numbers."""
    fmt = formats.find(text)
    options, module = dict(fmt.options), fmt.module
    assert spec.out is not None
    out_shape, in_shape = spec.shape[: spec.out], spec.shape[spec.out :]
    codes = matrix.codes.reshape(*out_shape, -1)
    scale, zero = matrix.scale, matrix.zero
    if matrix.units is not None:
        units = [np.ascontiguousarray(matrix.units[..., i]) for i in range(matrix.units.shape[-1])]
        # units of scales, and zeros with theirs where there are any
        parts = [scale, units[0], *(() if zero is None else (zero, units[1]))]
        bits = options.get("bits", 4)
        return module.pack(bits, codes, *(a.reshape(*out_shape, a.shape[-1]) for a in parts), in_shape=in_shape)
    if stored.kind == "fp8":
        if stored.block is not None:
            times = [n // BLOCK for n in stored.block]
            tiles = -(-codes.size // codes.shape[-1] // BLOCK), -(-codes.shape[-1] // BLOCK)
            scale = scale.repeat(times[0], 0).repeat(times[1], 1)[: tiles[0], : tiles[1]]
            return module.pack(codes, np.ascontiguousarray(scale), in_shape=in_shape, blocks=True)
        return module.pack(codes, scale.reshape(out_shape), in_shape=in_shape, blocks=False)
    if stored.kind != "mxfp4" and (group := _group(stored)):
        each = -(-stored.inputs // (group * scale.shape[-1]))  # groups of ours in one of theirs
        scale, zero = scale.repeat(each, -1), None if zero is None else zero.repeat(each, -1)
    scale = scale.reshape(*out_shape, -1)
    if stored.kind in ("mxfp4", "nf4"):
        return module.pack(codes, scale, in_shape=in_shape)
    perm = matrix.perm
    if options.get("act_order") and perm is None:
        perm = np.arange(math.prod(in_shape), dtype=np.int32)
    if stored.kind == "int8":
        scale = scale.astype(np.float32)
        return module.pack(codes, scale if options.get("group_size") else scale[..., 0], in_shape=in_shape, perm=perm)
    dtype = np.dtype(options.get("scale", "bfloat16"))
    if options.get("affine"):
        middle = np.uint8(1 << (int(stored.kind[3:]) - 1))
        zero = (np.full(scale.shape, middle) if zero is None else zero.reshape(scale.shape)).astype(dtype)
    return module.pack(np.ascontiguousarray(codes), scale.astype(dtype), zero, in_shape=in_shape, perm=perm)
