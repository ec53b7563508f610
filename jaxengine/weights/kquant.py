"""GGUF's K types, scales in two steps as llama.cpp's files have them: a code for each group, a float16 unit for 256 inputs.

    w = d sc q - dmin m            affine: 2, 4 and 5 bits
    w = d sc (q - 2^(bits-1))      symmetric: 3 and 6 bits, sc of both signs

    bits  inputs of a group  sc, m        bits a weight: here, in the file, and with scales in float32
    2     16                 0 to 15      3.125   2.625   6
    3     16                 -32 to 31    3.5625  3.4375  5
    4     32                 0 to 63      4.625   4.5     6
    5     32                 0 to 63      5.625   5.5     7
    6     16                 int8         8.5625  6.5625  10

Codes sc and m are bytes here, and 6-bit codes are held as bytes too, which every kernel reads. Products d sc are exact in
float32. A contraction makes the float32 scales of the whole matrix first, one for each group, and z = dmin m / (d sc) of
s (q - z) to one rounding: few numbers beside the codes, and what is kept, loaded and streamed are the bytes above. On a GPU
they are written and read again each time, 2 bits a weight each way at 32 inputs a group with minima.

`encode` rounds minima, then steps, up to what their codes can say, so that all of a group is within its codes; it searches for
nothing (llama.cpp weighs the error over several steps). Units are at least 2^-14, float16's least normal number, and numbers
so large that a unit of 65504 cuts them off have no bound. checkpoints/gguf.py gives what a file holds, to the bit.

I inputs, G group size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, UInt8

from jaxengine.weights import _codebook, _grouped
from jaxengine.weights._codebook import InShape, group_of
from jaxengine.weights.base import Integers, Weight

OPTIONS = {"bits": (2, 3, 4, 5, 6)}
SECTION = 256  # inputs that share a unit
LEAST_UNIT, MOST_UNIT = 2.0**-14, 65504.0


class Type(NamedTuple):
    """held: bits that a code stands in. group: inputs of a step. affine: has minima. most: of a step's code."""

    held: int
    group: int
    affine: bool
    most: int


TYPES = {2: Type(2, 16, True, 15), 3: Type(3, 16, False, 31), 4: Type(4, 32, True, 63), 5: Type(5, 32, True, 63),
         6: Type(8, 16, False, 127)}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KQuant(Weight):
    """Codes as _grouped.Grouped has them (of 6 bits int8, q - 32), and in place of scales and zeros: step uint8, of a symmetric
    type int8, and least uint8 [out..., Ip / G]; unit and least_unit float16 [out..., ceil(Ip / 256)]; None where symmetric."""

    codes: Array
    high: Array | None
    step: Array
    unit: Float16[Array, "..."]
    least: UInt8[Array, "..."] | None
    least_unit: Float16[Array, "..."] | None
    in_shape: InShape = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], *self.in_shape)

    @property
    def group_size(self) -> int:
        """Inputs that share a step."""
        held = TYPES[self.bits].held
        per = 1 if held == 8 else 16 // _grouped.PLANES[held][0]
        return self.codes.shape[-1] * per // self.step.shape[-1]

    @property
    def made_bytes(self) -> int:
        return 4 * math.prod(self.step.shape) * (1 if self.least is None else 2)  # scales and zeros in float32

    def grouped(self) -> _grouped.Grouped:
        """The same with scales and zeros in float32; numpy where the arrays are."""
        array: Any = np if isinstance(self.step, np.ndarray) else jnp

        def product(codes: Any, unit: Any) -> Any:
            codes, unit, each = codes.astype(np.float32), unit.astype(np.float32), SECTION // self.group_size
            if codes.shape[-1] % each == 0:  # XLA makes a look-up of a repetition
                return (codes.reshape(*unit.shape, each) * unit[..., None]).reshape(codes.shape)
            return codes * array.repeat(unit, each, axis=-1)[..., : codes.shape[-1]]

        scale, zero = product(self.step, self.unit), None
        if self.least is not None:
            offset = product(self.least, self.least_unit)
            # a group without a step is all -offset: s (q - z) with s = offset, z = 1 and codes of zero
            scale = array.where((scale == 0) & (offset != 0), offset, scale)
            zero = offset / array.where(scale == 0, np.float32(1), scale)
        if array is jnp:
            scale, zero = lax.optimization_barrier((scale, zero))  # or each product makes its own anew
        return _grouped.Grouped(self.codes, self.high, scale, zero, None, self.in_shape, TYPES[self.bits].held)

    def integers(self) -> Integers:
        return self.grouped().integers()

    def dense(self) -> Array:
        return self.grouped().dense()

    def error_bound(self) -> Array:
        # numbers whose steps are subnormal, which may be read as zero: below 2^bits of them
        bound = self.grouped().error_bound() + 2.0 ** (self.bits - 126)
        units = jnp.asarray(self.unit, jnp.float32)
        if self.least_unit is not None:
            units = jnp.maximum(units, jnp.asarray(self.least_unit, jnp.float32))
        cut = jnp.repeat(units >= MOST_UNIT, SECTION, axis=-1)[..., : math.prod(self.in_shape)].reshape(self.shape)
        return jnp.where(cut, jnp.inf, bound)

    def contract(self, spec: str, x: Array) -> Array:
        return self.grouped().contract(spec, x)

    def take(self, ids: Array, dtype: Any) -> Array:
        return _codebook.rows(self, ids, dtype)


def pack(
    bits: int, codes: Any, step: Any, unit: Any, least: Any = None, least_unit: Any = None, *, in_shape: Sequence[int]
) -> KQuant:
    """The Weight of codes that were chosen elsewhere; numpy in, numpy out.

    codes: uint8 [out..., I], 0 .. 2^bits - 1. step, least, unit, least_unit: as KQuant has them. Raises ValueError for arrays
    that disagree.
    """
    made, inputs = TYPES[bits], math.prod(in_shape)
    name, groups = f"kquant:bits={bits}", -(-inputs // group_of(inputs, made.group))
    lead, sections = codes.shape[:-1], -(-inputs // SECTION)
    wanted = {
        "step": (step, np.uint8 if made.affine else np.int8, groups), "unit": (unit, np.float16, sections),
        "least": (least, np.uint8, groups), "least_unit": (least_unit, np.float16, sections),
    }  # fmt: skip
    for what, (array, dtype, count) in wanted.items():
        there = made.affine or not what.startswith("least")
        if there != (array is not None):
            raise ValueError(f"{name}: {what} is {'missing' if there else 'given'}; types of 2, 4 and 5 bits have one")
        if array is not None and (array.shape != (*lead, count) or array.dtype != dtype):
            raise ValueError(
                f"{name}: {what} is {array.dtype} {list(array.shape)}; for codes {list(codes.shape)} it is"
                f" {np.dtype(dtype)} {[*lead, count]}"
            )
    if isinstance(codes, np.ndarray) and codes.size and codes.max() >= 2**bits:
        raise ValueError(f"{name}: the largest code is {codes.max()}; codes of {bits} bits are 0 to {2**bits - 1}")
    held = codes + np.uint8(2 ** (made.held - 1) - 2 ** (bits - 1)) if made.held != bits else codes
    found = _grouped.packed(made.held, held, step.astype(np.float32), in_shape=in_shape)
    return KQuant(found.codes, found.high, step, unit, least, least_unit, InShape(in_shape), bits)


def encode(w: Array, *, out: int, bits: int = 4) -> KQuant:
    """Quantise w [out..., in...] to codes of so many bits."""
    flat = w.reshape(*w.shape[:out], -1).astype(jnp.float32)
    inputs = flat.shape[-1]
    G = group_of(inputs, TYPES[bits].group)
    groups = _grouped.padded(flat, G).reshape(*w.shape[:out], -1, G)
    codes, *rest = _chosen(groups, bits=bits)
    return pack(bits, codes.reshape(*w.shape[:out], -1)[..., :inputs], *rest, in_shape=w.shape[out:])


@functools.partial(jax.jit, static_argnames="bits")
def _chosen(groups: Float[Array, "... NG G"], *, bits: int) -> tuple[Any, ...]:
    """Codes, and step, unit, least and least_unit."""
    made, count, G = TYPES[bits], groups.shape[-2], groups.shape[-1]
    below, above = jnp.maximum(-groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)

    def in_units(numbers: Array) -> tuple[Array, Array, Array]:
        """Numbers of 0 and more, rounded up, as codes times a unit; codes, units, and their products."""
        each = SECTION // G
        wide = _grouped.padded(numbers, each).reshape(*numbers.shape[:-1], -1, each)
        unit = jnp.clip(wide.max(-1) / made.most, LEAST_UNIT, MOST_UNIT)
        unit = jnp.minimum(_grouped._rounded_up(unit, "float16"), MOST_UNIT)
        spread = jnp.repeat(unit, each, axis=-1)[..., :count]
        codes = jnp.clip(jnp.ceil(numbers / spread), 0, made.most)
        return codes, unit.astype(jnp.float16), codes * spread

    if made.affine:
        least, least_unit, offset = in_units(below)
        step, unit, size = in_units(above / (2**bits - 1) + offset / (2**bits - 1))
        zero = offset / jnp.where(size == 0, 1, size)
        rest = step.astype(jnp.uint8), unit, least.astype(jnp.uint8), least_unit
    else:
        zero = jnp.full_like(below, 2.0 ** (bits - 1))
        step, unit, size = in_units(_grouped._step(jnp.maximum(below, above), jnp.minimum(below, above), zero, bits))
        sign = jnp.where(above > below, -1.0, 1.0)
        rest, size = ((sign * step).astype(jnp.int8), unit, None, None), sign * size
    codes = jnp.round(groups / jnp.where(size == 0, 1, size)[..., None] + zero[..., None])
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8), *rest


def leaf_axes(axes: tuple[str | None, ...], out: int, bits: int = 4) -> KQuant:
    """The flattened inputs are named as the first in dim; units are whole on every device."""
    made, flat, sections = TYPES[bits], axes[: out + 1], (*axes[:out], None)
    return KQuant(
        codes=flat,  # pyright: ignore[reportArgumentType]
        high=flat if len(_grouped.PLANES.get(made.held, ())) == 2 else None,  # pyright: ignore[reportArgumentType]
        step=flat,  # pyright: ignore[reportArgumentType]
        unit=sections,  # pyright: ignore[reportArgumentType]
        least=flat if made.affine else None,  # pyright: ignore[reportArgumentType]
        least_unit=sections if made.affine else None,  # pyright: ignore[reportArgumentType]
        in_shape=InShape.any(len(axes) - out),
        bits=bits,
    )
