"""What a quantised matrix of somebody else's checkpoint is, once its file layout is taken away.

Every method packs the same few things in its own way: small codes, the scale that a run of inputs shares, sometimes a
zero point, sometimes an order of the columns. `Stored` says which of them a matrix has and how they are shaped, from
the headers alone, so that a whole checkpoint is planned and refused before a byte of data is read. `Matrix` holds them,
unpacked and laid out [out, in] (O outputs, I inputs), for one matrix at a time:

    int2 to int5   codes uint8   w = scale (code - zero), zero the middle code (2, 4, 8, 16) where there is none
    int8           codes int8    w = scale code
    nf4            codes uint8   w = scale NF4[code]
    mxfp4          codes uint8   w = 2^(scale - 127) E2M1[code]
    fp8            codes float8  w = scale code
    kquant2 to 6   codes uint8   w = (units scale) code - units' zero, or (units scale) (code - middle): GGUF's K types

Column i of the codes is column perm[i] of the matrix. No number is computed here that the checkpoint does not hold:
codes stay the codes that they were, so what is read is exactly what was quantised.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors import TensorInfo

WEIGHT = ".weight"  # a module's matrix, as it is called where it is not quantised


class Tensors(Protocol):
    """A folder's tensors: what `safetensors.Reader` offers."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """One matrix as the files hold it.

    name: of the plain tensor that it stands in place of. tensors: {what it is: the tensor's name}. kind: the format of its
    codes (see above). group: inputs that share a scale; 0: all of a row, or of a block. block: rows and columns that share
    a scale, of fp8 in blocks. per_tensor: all share one. affine: it has zero points. scale: the dtype that its scales and
    zero points are exact in. order: its columns may stand in another order. codes: the dtype of fp8 codes. by_rows: some rows
    are read for the bytes of those alone.
    """

    name: str
    tensors: Mapping[str, str]
    kind: str
    outputs: int
    inputs: int
    group: int = 0
    block: tuple[int, int] | None = None
    per_tensor: bool = False
    affine: bool = False
    scale: str = "float32"
    order: bool = False
    codes: str = ""
    by_rows: bool = False
    detail: Any = None  # the method's own


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Rows of a matrix, unpacked: codes [O, I], scale [O, I / group], [O] where a row has one, or [O / block, I / block];
    zero as scale; perm int32 [I]; units float16 [O, sections, 1 or 2], what the codes in scale, and in zero, count."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    perm: np.ndarray | None = None
    units: np.ndarray | None = None

    def rows(self, order: np.ndarray) -> Matrix:
        """These rows in this order; not of a matrix whose scales belong to blocks of rows."""
        if self.scale.shape[0] != self.codes.shape[0]:
            raise ValueError(f"the scales {self.scale.shape} of {self.codes.shape} do not belong to single rows")
        zero, units = (None if a is None else a[order] for a in (self.zero, self.units))
        return Matrix(self.codes[order], self.scale[order], zero, self.perm, units)


class Method(Protocol):
    """A way of packing, made of config.json's quantization_config."""

    def owner(self, name: str, info: TensorInfo) -> str | None:
        """The plain tensor's name that this one belongs to; None for a plain tensor."""
        ...

    def excepted(self, module: str) -> str | None:
        """The entry of quantization_config that leaves this module plain, if one does."""
        ...

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        """The matrix [outputs, inputs] that stands in place of `name`; CheckpointError for what does not fit together."""
        ...

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        """These rows (start and stop given) of it."""
        ...


# --- quantization_config -------------------------------------------------------------------------------------------------


def setting(config: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """A field of quantization_config; CheckpointError where it lacks, or is of another type."""
    found = config.get(name)
    method = config.get("quant_method")
    if found is None:
        if default is ...:
            raise CheckpointError(f"quantization_config: quant_method {method!r} needs {name}, and there is none")
        return default
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise CheckpointError(f"quantization_config: {name} is {found!r}; it is {wanted}")
    return found


def one_of(config: Mapping[str, Any], name: str, found: Any, allowed: Sequence[Any], nearest: str) -> Any:
    """`found` if it is allowed; CheckpointError with what is, and what to do."""
    if found not in allowed:
        raise CheckpointError(
            f"quantization_config: quant_method {config.get('quant_method')!r} has {name} {found!r}; read are"
            f" {', '.join(map(repr, allowed))}. {nearest}"
        )
    return found


def left_plain(module: str, patterns: Iterable[str]) -> str | None:
    """The entry of modules_to_not_convert that holds for a module, as transformers reads such lists: a name or a regular
    expression from the start up to a dot, or the name's end."""
    for pattern in patterns:
        if module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
            return pattern
    return None


def group_count(name: str, inputs: int, group: int, said: str = "group_size") -> int:
    """How many scales a row has; CheckpointError where the group does not divide it."""
    if group <= 0:
        return 1
    if inputs % group:
        near = math.gcd(inputs, group)
        raise CheckpointError(
            f"{name} has {inputs} inputs, and {said} {group} does not divide them; {near} would, and -1 is one group"
        )
    return inputs // group


# --- tensors -------------------------------------------------------------------------------------------------------------


def module_of(name: str) -> str:
    """'model.layers.0.self_attn.q_proj' of its weight's name."""
    return name.removesuffix(WEIGHT)


def tensor(
    tensors: Tensors,
    name: str,
    what: str,
    shapes: Sequence[Sequence[int]],
    of: str,
    dtypes: Sequence[Any],
    *,
    like: Callable[[tuple[int, ...]], str | None] = lambda shape: None,
) -> TensorInfo:
    """A packed matrix's part; CheckpointError where it is not there, has another dtype, or none of the shapes.

    of: what decides the shape, for the message. like: the setting that another shape would fit, if there is one.
    """
    if name not in tensors:
        raise CheckpointError(
            f"{name} is not in {tensors.source}: {of} needs {what} of that name. Download the checkpoint again"
        )
    info = tensors.info(name)
    allowed = [np.dtype(d) for d in dtypes]
    if info.dtype not in allowed:
        raise CheckpointError(f"{name} is {info.dtype}; {what} is {' or '.join(d.name for d in allowed)}")
    if info.shape not in [tuple(s) for s in shapes]:
        near = like(info.shape)
        raise CheckpointError(
            f"{name} is {list(info.shape)}; {of} needs {' or '.join(str(list(s)) for s in shapes)}: "
            + (
                "it does not belong to the model of config.json, or its quantization_config is another one's"
                if near is None
                else f"{near} would fit; is quantization_config another one's?"
            )
        )
    return info


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [R, count] out of int32 [R, W]: codes of 2, 3, 4 or 8 bits, the first in the lowest bits, without gaps."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return raw[:, :count]
    if 8 % bits == 0:
        per = 8 // bits
        out = np.empty((*raw.shape, per), np.uint8)
        for i in range(per):
            np.bitwise_and(raw >> (bits * i), (1 << bits) - 1, out=out[..., i])
        return out.reshape(len(raw), -1)[:, :count]
    stream = np.unpackbits(raw, axis=1, count=bits * count, bitorder="little").reshape(len(raw), count, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, W] of uint8 codes [R, C]: `unpack`'s inverse, the last word filled up with zeros."""
    R, C = codes.shape
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    W = -(-C * bits // 32)
    raw = np.zeros((R, W * 32), np.uint8)
    raw[:, : C * bits] = stream.reshape(R, C * bits)
    return np.packbits(raw, axis=1, bitorder="little").view(np.int32)


def column_order(tensors: Tensors, stored: Stored) -> np.ndarray | None:
    """The order of columns, int32 [I], that makes neighbours of each group of an act-order matrix; None: they are already.

    Its g_idx [I] names the group of each column. They are sorted stably: columns of one group keep their order.
    """
    if not stored.order:
        return None
    name, group, inputs = stored.tensors["g_idx"], stored.group, stored.inputs
    g_idx, groups = tensors.read(name), inputs // group
    if (g_idx == -1).all():  # as compressed-tensors' own buffer begins: there is no order
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{name} names groups {g_idx.min()} to {g_idx.max()}; there are scales of groups 0 to {groups - 1}"
        )
    counts = np.bincount(g_idx, minlength=groups)
    if (counts != group).any():
        odd = int(np.argmax(counts != group))
        raise CheckpointError(
            f"{name} puts {counts[odd]} inputs into group {odd}; a group of this checkpoint has {group} (group_size)"
        )
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(inputs)) else order
