"""Integer codes of 8, 5, 4, 3 or 2 bits, with a scale for each group of inputs: what int8, int5, int4, int3 and int2 share.

    w_ok ~ s_og (q_ok - z_og)        q = 0 .. 2^bits - 1,  g = k // G

The in dims of a matrix are flattened to I inputs and padded to whole groups, Ip inputs. Symmetric: z is the middle code
2^(bits-1) and is not stored; s may be negative. Affine: z is stored beside s, in units of a code.

How a step is chosen. Codes reach half a step beyond the first and the last of them, so a group whose numbers lie between
-a and b is held within s / 2 by every s with

    a <= (z + 1/2) s        b <= (2^bits - 1/2 - z) s

and `encode` takes the least such s: at the fixed middle z of a symmetric format with the sign that gives the wider side
of the codes to the larger of a and b, and over all z of a grid in an affine one. That is the least bound which the codes
allow, and less error than the usual rules too: mean square error of normal numbers in 4 bits and groups of 32, relative to
max|w| / 7: 0.76; llama.cpp's Q4_0 (the largest to -8, at the price of a whole step at the other end) 0.78; max|w| / 7.5
(qwix, AQT) 0.95. In 2 bits and groups of 32 it is 0.31, 0.30 and 0.52 (tests/test_integer_formats.py: `RULES`).

Scales are rounded up to their dtype before codes are chosen, so that the bound is of the scale that is stored. They
are never subnormal, which XLA flushes to zero: 2^-120 at least in float32 and bfloat16, 2^-14 in float16, where 4-bit groups
of numbers all below 0.00045 are therefore held more coarsely. A scale at the largest that there is (65504 in float16, for 4-bit
numbers beyond half a million) may have cut numbers off, and no bound is promised: it is infinite.

Codes lie in memory as pallas_kernels/quant_matmul/layout.py says. `packed` and `Grouped.unpacked` are numpy where they
are given numpy, so that a checkpoint in another layout is read without a device.

I inputs, G group size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8, UInt16

from jaxengine.weights import _parts, _rows
from jaxengine.weights._codebook import LEAST_GROUP, InShape, group_of
from jaxengine.weights.base import Integers, Weight, split_spec
from pallas_kernels.quant_matmul import quant_matmul

SCALES = ("bfloat16", "float16", "float32")
ORDERS = (False, True, 2, 4, 8, 16)  # act_order: none, whole, or in so many parts of a row (_parts.py)
LARGEST_GROUP = 256
PLANES = {5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # bits of the planes that codes of so many bits stand in
LEAST = {"bfloat16": 2.0**-120, "float16": 2.0**-14, "float32": 2.0**-120}  # of a scale


# --- groups and planes --------------------------------------------------------------------------------------------


def _numpy(array: Any) -> Any:
    """numpy for numpy arrays, jax.numpy for jax's."""
    return np if isinstance(array, np.ndarray) else jnp


def padded(array: Any, multiple: int) -> Any:
    """The last dim filled with zeros to a multiple."""
    short = -array.shape[-1] % multiple
    return _numpy(array).pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)]) if short else array


def _shifts(bits: int, dims: int) -> np.ndarray:
    """How far up in a word the codes of a plane stand: [1, ..., codes in a word, 1]."""
    return np.arange(0, 16, bits, dtype=np.uint16).reshape(*(1,) * (dims - 2), -1, 1)


def pack_plane(codes: UInt8[Array, "... I"], bits: int, group_size: int) -> UInt16[Array, "... W"]:
    """Codes below 2^bits, whole groups of them, as 16-bit words (quant_matmul's layout.py)."""
    parts = codes.reshape(*codes.shape[:-1], -1, 16 // bits, group_size * bits // 16).astype(np.uint16)
    return (parts << _shifts(bits, parts.ndim)).sum(-2, dtype=np.uint16).reshape(*codes.shape[:-1], -1)


def unpack_plane(words: UInt16[Array, "... W"], bits: int, group_size: int) -> UInt8[Array, "... I"]:
    """The codes that `pack_plane` was given."""
    grouped = words.reshape(*words.shape[:-1], -1, 1, group_size * bits // 16)
    parts = (grouped >> _shifts(bits, grouped.ndim)) & np.uint16(2**bits - 1)
    return parts.astype(np.uint8).reshape(*words.shape[:-1], -1)


# --- the matrix ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped(Weight):
    """Codes with a scale a group. All arrays have the out dims first; a stack of layers has one more before them.

    codes: uint16 [out..., words], of 5 and 3 bits all but the highest; of 8 bits int8 [out..., Ip], q - 128.
    high: the highest bit of 5-bit and 3-bit codes, uint16 [out..., Ip / 16]; else None.
    scale, zero: [out..., Ip / G] in one dtype; zero None where symmetric.
    perm: int32 [I], the codes' column i is the matrix's column perm[i]; None where they are in order.

    Of rows in parts (_parts.py) codes and scales are of slots: perm is int32 [P, slots], the column in its part that a slot
    reads; ends: int32 [P, groups], the block after the last of each group of the whole row. Else None.
    """

    codes: Array
    high: Array | None
    scale: Float[Array, "..."]
    zero: Float[Array, "..."] | None
    perm: Int32[Array, "..."] | None
    in_shape: InShape = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    ends: Int32[Array, "..."] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], *self.in_shape)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        per = 1 if self.bits == 8 else 16 // PLANES[self.bits][0]
        return self.codes.shape[-1] * per // self.scale.shape[-1]

    def _padded_codes(self) -> UInt8[Array, "..."]:
        if self.bits == 8:
            return self.codes.view(np.uint8) ^ np.uint8(128)
        width = PLANES[self.bits][0]
        found = unpack_plane(self.codes, width, self.group_size)
        if self.high is None:
            return found
        return found | (unpack_plane(self.high, 1, self.group_size) << width)

    def unpacked(self) -> UInt8[Array, "..."]:
        """The codes [out..., I], unsigned, in the order of `perm`; numpy where the arrays are. Not of rows in parts."""
        return self._padded_codes()[..., : math.prod(self.in_shape)]

    def integers(self) -> Integers:
        w = self if self.ends is None else self.joined()
        return Integers(w.bits, w.unpacked(), w.scale, w.zero, w.perm, w.group_size)

    def in_parts(self, parts: int) -> Grouped:
        """The same numbers, of a matrix with an order of columns, resolved in so many parts of a row."""
        assert self.perm is not None
        assert self.ends is None
        found = _parts.places(self.perm, self.group_size, parts)
        return dataclasses.replace(_placed(self, found), perm=found.columns, ends=found.ends)

    def joined(self) -> Grouped:
        """`in_parts` undone. Columns of a group may come in another order than before."""
        inputs, xp = math.prod(self.in_shape), _numpy(self.codes)
        perm, slot, block = _parts.whole(self.perm, self.ends, inputs)
        group = _group_told(f"int{self.bits}", inputs, len(block))
        scale, zero = (None if a is None else xp.take(a, block, axis=-1) for a in (self.scale, self.zero))
        codes = xp.take(self._padded_codes(), slot, axis=-1)
        low, high = _planes(self.bits, padded(codes, group), group)
        return dataclasses.replace(self, codes=low, high=high, scale=scale, zero=zero, perm=perm, ends=None)

    def _spread(self, each: Float[Array, "..."]) -> Float[Array, "..."]:
        """A number of each group, [out..., Ip / G] -> the matrix's shape."""
        return self._in_order(jnp.repeat(each, self.group_size, axis=-1)).reshape(self.shape)

    def _in_order(self, flat: Array) -> Array:
        """Numbers of codes as they stand [out..., Ip] -> of the matrix's columns [out..., I]."""
        inputs = math.prod(self.in_shape)
        if self.ends is not None:
            return _out_of_parts(flat, jnp.asarray(self.perm), inputs)
        flat = flat[..., :inputs]
        return flat if self.perm is None else _unpermuted(flat, jnp.asarray(self.perm))

    def _as_they_stand(self, rows: Float[Array, "M I"]) -> Float[Array, "M Ip"]:
        """The inputs that the codes' columns read."""
        if self.ends is not None:
            assert self.perm is not None
            parts, slots = self.perm.shape
            each = padded(rows, parts).reshape(len(rows), parts, -1)
            # a part's slots read that part alone, and a mesh that splits the parts brings nothing together
            found = jnp.take_along_axis(each, self.perm[None], axis=-1, mode="fill", fill_value=0)
            return found.reshape(len(rows), parts * slots)
        return padded(rows if self.perm is None else jnp.take(rows, self.perm, axis=-1, mode="clip"), self.group_size)

    def dense(self) -> Array:
        codes = jnp.asarray(self._padded_codes()).astype(jnp.float32)
        codes = codes.reshape(*self.scale.shape, self.group_size)
        zero = 2.0 ** (self.bits - 1) if self.zero is None else jnp.asarray(self.zero, jnp.float32)[..., None]
        flat = (codes - zero) * jnp.asarray(self.scale, jnp.float32)[..., None]
        return self._in_order(flat.reshape(*self.scale.shape[:-1], -1)).reshape(self.shape)

    def error_bound(self) -> Array:
        """Of what `encode` made; codes that were chosen otherwise (GPTQ's) may be further off."""
        s = jnp.abs(jnp.asarray(self.scale, jnp.float32))
        # half a step, and float32's roundings of s itself, w / s + z and s (q - z), each relative to at most 2^bits steps
        # (2^-24); subnormal numbers may have been read as zero (2^-126)
        bound = s * (0.5 + 4 * 2**self.bits * 2.0**-24) + 2.0**-126
        return self._spread(jnp.where(s < _most(self.scale.dtype, self.bits), bound, jnp.inf))

    def contract(self, spec: str, x: Array) -> Array:
        split_spec(spec)
        lead = x.shape[: x.ndim - len(self.in_shape)]
        if x.shape[len(lead) :] != self.in_shape:
            raise ValueError(
                f"contract {spec!r}: x is {list(x.shape)}; its last dims are contracted with the matrix's in dims,"
                f" {list(self.in_shape)}"
            )
        rows = x.reshape(math.prod(lead), math.prod(self.in_shape))
        planes = [a.reshape(-1, a.shape[-1]) for a in (self.codes, self.high) if a is not None]
        y = quant_matmul(
            self._as_they_stand(rows),
            planes[0] if len(planes) == 1 else tuple(planes),
            self.scale.reshape(-1, self.scale.shape[-1]),
            None if self.zero is None else self.zero.reshape(-1, self.zero.shape[-1]),
            kind=f"int{self.bits}",
            group_size=self.group_size,
            dtype=x.dtype,
        )
        return y.reshape(*lead, *self.codes.shape[:-1])

    def take(self, ids: Array, dtype: Any) -> Array:
        codes, high, scale, zero = (
            None if a is None else jnp.take(a, ids, axis=0) for a in (self.codes, self.high, self.scale, self.zero)
        )
        return dataclasses.replace(self, codes=codes, high=high, scale=scale, zero=zero).dense().astype(dtype)


def _unpermuted(flat: Array, perm: Array) -> Array:
    if perm.ndim > 1:  # a stack
        return jax.vmap(_unpermuted)(flat, perm)
    return jnp.take(flat, jnp.argsort(perm), axis=-1, mode="clip")


def _out_of_parts(flat: Array, perm: Array, inputs: int) -> Array:
    if perm.ndim > 2:  # a stack
        return jax.vmap(functools.partial(_out_of_parts, inputs=inputs))(flat, perm)
    parts, slots = perm.shape
    # empty slots come after all others, those of a part that is not whole in the place of its last columns
    at = jnp.argsort(perm, axis=-1, stable=True)[:, : _parts.width(inputs, parts)]
    lead = flat.shape[:-1]
    found = jnp.take_along_axis(
        flat.reshape(*lead, parts, slots), at.reshape(*(1,) * len(lead), *at.shape), axis=-1, mode="clip"
    )
    return found.reshape(*lead, -1)[..., :inputs]


def _placed(leaf: Grouped, found: _parts.Places) -> Grouped:
    """Codes and scales of a whole row's order where parts have them."""
    xp = _numpy(leaf.codes)
    scale, zero = (None if a is None else xp.take(a, found.group, axis=-1) for a in (leaf.scale, leaf.zero))
    low, high = _planes(leaf.bits, xp.take(leaf.unpacked(), found.source, axis=-1), _parts.SLOTS)
    return dataclasses.replace(leaf, codes=low, high=high, scale=scale, zero=zero)


def _planes(bits: int, codes: Any, group: int) -> tuple[Any, Any]:
    """(codes, high) of codes of whole groups as they are stored."""
    if bits == 8:
        return (codes ^ np.uint8(128)).view(np.int8), None
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(pack_plane((codes >> shift) & (2**width - 1), width, group))
        shift += width
    return planes[0], planes[1] if len(planes) > 1 else None


# --- making one ---------------------------------------------------------------------------------------------------


def packed(
    bits: int, codes: Any, scale: Any, zero: Any = None, *, in_shape: Sequence[int], perm: Any = None
) -> Grouped:
    """The Weight of codes that were chosen elsewhere; numpy arrays in, numpy arrays out.

    codes: uint8 [out..., I], 0 .. 2^bits - 1, in the order of perm. scale, and zero if any: [out..., groups] in one of
    SCALES; their number tells the group size, a power of two from 16 to 256. perm: int32 [I].
    Raises ValueError for shapes and dtypes that disagree and, of numpy arrays, for codes and perm out of range.
    """
    inputs, in_shape = math.prod(in_shape), InShape(in_shape)
    name = f"int{bits}"
    if codes.shape[-1] != inputs or codes.dtype != np.uint8:
        raise ValueError(
            f"{name}: codes are uint8 [out..., {inputs}] for in dims {list(in_shape)}, got {codes.dtype} {list(codes.shape)}"
        )
    if isinstance(codes, np.ndarray) and codes.size and codes.max() >= 2**bits:
        raise ValueError(f"{name}: the largest code is {codes.max()}; codes of {bits} bits are 0 to {2**bits - 1}")
    for what, array in (("scale", scale), ("zero", zero)):
        if array is None:
            continue
        if array.shape != (*codes.shape[:-1], scale.shape[-1]) or array.dtype.name not in SCALES:
            raise ValueError(
                f"{name}: {what} is {array.dtype.name} {list(array.shape)}; it is one of {', '.join(SCALES)} and has the"
                f" codes' out dims and one number a group, {[*codes.shape[:-1], scale.shape[-1]]}"
            )
        if array.dtype != scale.dtype:
            raise ValueError(f"{name}: scale is {scale.dtype.name} and zero {array.dtype.name}; they have one dtype")
    group = _group_told(name, inputs, scale.shape[-1])
    if perm is not None:
        _check_perm(name, perm, inputs)
    low, high = _planes(bits, padded(codes, group), group)
    return Grouped(low, high, scale, zero, perm, in_shape, bits)


def _group_told(name: str, inputs: int, groups: int) -> int:
    """The group size of a row with so many scales: the least where several would do, which is with one scale alone."""
    sizes = [1 << b for b in range(LEAST_GROUP.bit_length() - 1, LARGEST_GROUP.bit_length())]
    found = next((G for G in sizes if -(-inputs // G) == groups), None)
    if found is None:
        would = ", ".join(f"{-(-inputs // G)} (groups of {G})" for G in sizes)
        raise ValueError(
            f"{name}: {groups} scales a row for {inputs} inputs; there would be {would}. A scale that is shared by more"
            f" inputs is repeated for each group, and by fewer it is not held"
        )
    return found


def _check_perm(name: str, perm: Any, inputs: int) -> None:
    if perm.shape != (inputs,) or perm.dtype != np.int32:
        raise ValueError(f"{name}: perm is {perm.dtype} {list(perm.shape)}; it is int32 [{inputs}], a column each")
    if isinstance(perm, np.ndarray) and not np.array_equal(np.sort(perm), np.arange(inputs)):
        raise ValueError(f"{name}: perm is no permutation: it must hold each of 0 to {inputs - 1} once")


def encode(
    w: Array,
    *,
    out: int,
    bits: int,
    group_size: int,
    scale: str,
    grid: float | None = None,
    parts: int = 0,
) -> Grouped:
    """Round w [out..., in...] to the nearest codes. grid: the zeros that there are lie so far apart; None is symmetric.
    parts: 1 or more: columns are sorted by their largest magnitude, descending, before they are grouped, and that order is
    resolved in so many parts of a row."""
    flat = w.reshape(*w.shape[:out], -1)
    inputs, in_shape = flat.shape[-1], InShape(w.shape[out:])
    G = group_of(inputs, group_size)

    def rounded(flat: Array) -> Grouped:
        groups = padded(flat.astype(jnp.float32), G).reshape(*flat.shape[:-1], -1, G)
        codes, step, zero = _nearest(groups, bits=bits, scale=scale, grid=grid)
        codes = codes.reshape(*flat.shape[:-1], -1)[..., :inputs]
        return packed(bits, codes, step, zero, in_shape=in_shape)

    if not parts:
        return rounded(flat)
    largest = jnp.abs(flat.astype(jnp.float32)).max(axis=tuple(range(out)))
    perm = jnp.argsort(largest, descending=True, stable=True).astype(jnp.int32)
    found = None if parts == 1 else _parts.places(perm, G, parts)

    def ordered(rows: Array) -> Grouped:
        made = rounded(jnp.take(rows, perm, axis=-1, mode="clip"))
        return made if found is None else _placed(made, found)

    # in blocks, or two matrices in another order would stand beside this one
    made = _rows.in_blocks(ordered, flat, out)
    if found is None:
        return dataclasses.replace(made, perm=perm)
    return dataclasses.replace(made, perm=found.columns, ends=found.ends)


@functools.partial(jax.jit, static_argnames=("bits", "scale", "grid"))
def _nearest(
    groups: Float[Array, "... G"], *, bits: int, scale: str, grid: float | None
) -> tuple[UInt8[Array, "... G"], Float[Array, "..."], Float[Array, "..."] | None]:
    """Codes, scales and zeros of groups; they are of the dtype `scale`."""
    below, above = jnp.maximum(-groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    if grid is None:
        zero = jnp.full_like(below, 2.0 ** (bits - 1))
        step = _step(jnp.maximum(below, above), jnp.minimum(below, above), zero, bits)
    else:
        zero, step = _zero_and_step(below, above, bits, grid)
    step = _rounded_up(jnp.clip(step, LEAST[scale], _most(jnp.dtype(scale), bits)), scale)
    if grid is None:
        step = jnp.where(above > below, -step, step)
    codes = jnp.clip(jnp.round(groups / step[..., None] + zero[..., None]), 0, 2**bits - 1).astype(jnp.uint8)
    return codes, step.astype(scale), None if grid is None else zero.astype(scale)


def _step(below: Array, above: Array, zero: Any, bits: int) -> Array:
    """The least s with below <= (zero + 1/2) s and above <= (2^bits - 1/2 - zero) s."""
    # where there is no room on a side, a huge step, but for no numbers there
    low = below / jnp.maximum(zero + 0.5, 2.0**-30)
    high = above / jnp.maximum(2**bits - 0.5 - zero, 2.0**-30)
    return jnp.maximum(low, high)


def _zero_and_step(below: Array, above: Array, bits: int, grid: float) -> tuple[Array, Array]:
    """The zero on the grid that allows the least step: one of the two beside the point where both sides are tight."""
    whole = 0.5 * below + 0.5 * above  # the sum itself may overflow
    some = whole >= LEAST["float32"]
    tight = 2**bits * (0.5 * below / jnp.where(some, whole, 1.0)) - 0.5
    least, most = (0.0, 2.0**bits - 1) if grid == 1 else (-0.5, 2**bits - 0.5)
    one = jnp.clip(jnp.floor(tight / grid) * grid, least, most - grid)
    # what is all zero is held as zero
    one, other = jnp.where(some, one, 0.0), jnp.where(some, one + grid, 0.0)
    step_one, step_other = _step(below, above, one, bits), _step(below, above, other, bits)
    first = step_one <= step_other
    return jnp.where(first, one, other), jnp.where(first, step_one, step_other)


def _most(dtype: Any, bits: int) -> float:
    """The largest scale: what the dtype holds, its products with codes and its reciprocal (by which XLA may divide) being
    normal float32 numbers."""
    largest = float(jnp.finfo(dtype).max)
    return largest if dtype == jnp.float16 else largest / max(8, 2 ** (bits - 1))


def _rounded_up(s: Array, dtype: str) -> Array:
    """The least number of `dtype` that is s or more, in float32; s is normal in `dtype` and no more than its largest."""
    # by bits: XLA takes a cast there and back for the number itself (xla_allow_excess_precision)
    dropped = jnp.uint32(2 ** (23 - jnp.finfo(dtype).nmant) - 1)
    bits = lax.bitcast_convert_type(s, jnp.uint32)
    return lax.bitcast_convert_type((bits + dropped) & ~dropped, jnp.float32)


def refit(leaf: Grouped, act_order: bool | int) -> Grouped:
    """What was stored without an order of columns, or with one that is whole or in other parts, with this one."""
    held = 1 if leaf.ends is None else len(leaf.ends)
    if not act_order or held == int(act_order):
        return leaf
    whole = leaf if leaf.ends is None else leaf.joined()
    return whole if act_order is True else whole.in_parts(int(act_order))


def leaf_axes(
    axes: tuple[str | None, ...],
    out: int,
    *,
    bits: int,
    affine: bool = False,
    parts: int = 0,
) -> Grouped:
    """The flattened inputs are named as the first in dim: a split of that dim is a split of them, and of the parts of a row."""
    flat: Any = axes[: out + 1]
    by_part: Any = (axes[out], None) if parts > 1 else None
    perm: Any = by_part or ((None,) if parts else None)
    return Grouped(
        codes=flat,
        high=flat if len(PLANES.get(bits, ())) == 2 else None,
        scale=flat,
        zero=flat if affine else None,
        perm=perm,
        in_shape=InShape.any(len(axes) - out),
        bits=bits,
        ends=by_part,
    )
