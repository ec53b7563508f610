"""lossless: every bit of a bfloat16 matrix in three quarters of its bytes (the idea of DFloat11, arXiv:2504.11651).

    w = (-1)^s 2^(e - 127) 1.m        s, m: 8 bits, kept as they are        e - base_o: 4 bits, base_o of each row

Signs and mantissas of trained weights are noise; exponents are not. They hold 2.6 bits of the 8 they take, since each step
down from a row's usual size is half as frequent as the last. DFloat11 gives each a Huffman code: 11 bits a weight, of a
length that depends on the data, to be decoded by a kernel of its own. Here every exponent takes the same 4 bits, an index
into a window of 16 neighbouring exponents that begins where the row needs it, so that shapes are known before a weight is
read (`eval_shape`), rows are split over devices and looked up one by one, and decoding is shifts and an addition. Numbers
outside their row's window, the escapes, are listed beside it: position and exponent, in room that is as large for every
row. 12.1 bits a weight: 0.756 of bfloat16.

Zeros lie 100 exponents below the others, and pruned or padded matrices are full of them. A row in which more numbers find
their place so has index 0 for the exponent 0, of zeros and subnormal numbers, and a window that is one narrower.

What a row may hold. Of normal numbers, 1 in 14,000 lies below 16 exponents; of numbers with much heavier tails (Student's t
with 2 degrees of freedom) 1 in 1,100. The room is 4 for each 1,024 inputs, at least 4. A row that has more is told by its
`count`; `check` refuses the matrix, and names the `escapes` that would do. bits=3 is a window of 8: normal numbers need 14 to
22 escapes in 1,024, which has room for 32 then: 11.8 bits, 0.735, and matrices with heavier tails are refused.

What is not bfloat16. The code is of bfloat16 numbers. In a plan of dtype bfloat16 any checkpoint is rounded to it first, as
without this format; under another dtype a checkpoint of another dtype is refused (`refuses`), as it would lose what the
plan keeps. `encode` itself rounds to the nearest, ties to even.

All of it is done in integers, on the numbers' bits: XLA flushes subnormal numbers, and may make one NaN of all.

A small matrix is decoded as a whole, of a large one rows of at most LIMIT numbers at a time, which are contracted and
forgotten. That is memory's gain, not time's: in XLA a block is written before it is read.

O outputs, I inputs, C escapes that a row has room for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8, UInt16

from jaxengine.weights import _codebook, _grouped, _rows
from jaxengine.weights.base import Weight, einsum, split_spec

OPTIONS = {"bits": (4, 3), "escapes": (0, 1, 2, 4, 8, 16, 24, 32, 40, 64)}

ROOM = {4: 4, 3: 32}  # escapes in 1,024 inputs, where nobody says how many
LEAST_ROOM = 4  # of a row
GROUP = 128  # inputs whose indices stand in neighbouring words
LIMIT = 2**21  # numbers that are decoded at a time
ZERO = 256  # beside a base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lossless(Weight):
    """rest: sign and mantissa, uint8 [out..., in...]. index: exponents over their row's base, uint16 [out..., words], of 3
    bits the lower two; high: the third, uint16 [out..., Ip / 16], else None. base: uint16 [out...], and ZERO more in a row
    whose index 0 is the exponent 0 instead. place, exponent: of escapes, [out..., C], unsigned and uint8; places that are
    not used lie beyond the row. count: the escapes that a row has, unsigned [out...]; above C it has lost some.
    """

    rest: UInt8[Array, "..."]
    index: UInt16[Array, "..."]
    high: UInt16[Array, "..."] | None
    base: UInt16[Array, "..."]
    place: Array
    exponent: UInt8[Array, "..."]
    count: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rest.shape

    def _flat(self) -> Lossless:
        """The same with the out dims, and a stack's, as one, and the inputs as one."""
        rows = self.base.size
        return jax.tree.map(lambda a: jnp.asarray(a).reshape(rows, -1), self)

    def bits(self) -> UInt16[Array, "..."]:
        """The matrix as the bits of bfloat16 numbers."""
        return _decoded(self._flat()).reshape(self.shape)

    def dense(self) -> Array:
        return lax.bitcast_convert_type(self.bits().astype(jnp.uint32) << 16, jnp.float32)

    def error_bound(self) -> Array:
        """Of what was not bfloat16: half a step; infinite in a row with more escapes than room."""
        bound = jnp.abs(self.dense()) * 2.0**-8 + 2.0**-126
        lost = (jnp.asarray(self.count) > self.place.shape[-1]).reshape(
            *self.count.shape, *(1,) * (bound.ndim - self.count.ndim)
        )
        return jnp.where(lost, jnp.inf, bound)

    def contract(self, spec: str, x: Array) -> Array:
        batch, _, outs = split_spec(spec)
        lead, out_shape = x.shape[: len(batch)], self.shape[: len(outs)]
        y_OM = _contracted(self._flat(), x.reshape(math.prod(lead), -1))
        return y_OM.T.reshape(*lead, *out_shape)

    def take(self, ids: Array, dtype: Any) -> Array:
        return _codebook.rows(self, ids, dtype)


# --- decoding -----------------------------------------------------------------------------------------------------------


def _decoded(flat: Lossless) -> UInt16[Array, "O I"]:
    """The bits of the numbers of a matrix with one out and one in dim."""
    I, rows = flat.rest.shape[1], flat.rest.shape[0]  # noqa: E741
    G = _codebook.group_of(I, GROUP)
    index = _grouped.unpack_plane(flat.index, 4 if flat.high is None else 2, G)[:, :I]
    if flat.high is not None:
        index |= _grouped.unpack_plane(flat.high, 1, G)[:, :I] << 2
    exponent = index + (flat.base & 0xFF).astype(jnp.uint8)
    exponent = jnp.where((index == 0) & (flat.base >= ZERO), jnp.uint8(0), exponent)
    places = flat.place.astype(jnp.int32)
    exponent = exponent.at[jnp.arange(rows)[:, None], places].set(flat.exponent, mode="drop", unique_indices=True)
    rest = flat.rest.astype(jnp.uint16)
    return ((rest & 0x80) << 8) | (exponent.astype(jnp.uint16) << 7) | (rest & 0x7F)


def _contracted(flat: Lossless, x: Array) -> Array:
    """The matrix times the rows of x [M, I]: [O, M] in x's dtype, a block of outputs at a time."""
    O, I = flat.rest.shape  # noqa: E741
    dtype, wide = x.dtype, x.astype(jnp.float32)  # the gradients of blocks are summed in float32

    def product(flat: Lossless, wide: Array) -> Array:
        w = lax.bitcast_convert_type(_decoded(flat), jnp.bfloat16).astype(dtype)
        return einsum("mi,oi->mo", wide.astype(dtype), w).T

    # or the way back would keep every block as it was decoded, and every block's codes
    @jax.checkpoint
    def block(main: Lossless, wide: Array, i: Array) -> Array:
        return product(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 1, keepdims=False), main), wide)

    blocks, each = _rows.blocks_of(O, I, LIMIT)
    if blocks == 1:
        return jax.checkpoint(product)(flat, wide)
    main = jax.tree.map(lambda a: a[: each * blocks].reshape(each, blocks, -1), flat)
    y = lax.map(lambda i: block(main, wide, i), jnp.arange(blocks))
    y = y.transpose(1, 0, 2).reshape(each * blocks, len(x))
    if each * blocks == O:
        return y
    left = jax.tree.map(lambda a: a[each * blocks :], flat)
    return jnp.concatenate([y, jax.checkpoint(product)(left, wide)])


# --- making one ---------------------------------------------------------------------------------------------------------


def _bits(w: Array) -> UInt16[Array, "..."]:
    """The bits of w rounded to bfloat16: to the nearest, ties to even; a NaN stays one. Bits are returned as they are."""
    if w.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(w, jnp.uint16)
    if w.dtype == jnp.uint16:
        return w
    bits = lax.bitcast_convert_type(w.astype(jnp.float32), jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return jnp.where(nan, (bits >> 16) | 0x40, rounded).astype(jnp.uint16)


def room(inputs: int, bits: int, escapes: int) -> int:
    """C, the escapes that a row of so many inputs has room for."""
    return min(inputs, max(LEAST_ROOM, -(-inputs * (escapes or ROOM[bits]) // 1024)))


@functools.partial(jax.jit, static_argnames=("out", "bits", "escapes"))
def encode(w: Array, *, out: int, bits: int = 4, escapes: int = 0) -> Lossless:
    """w [out..., in...] as bfloat16, losslessly. bits: of an exponent's index; escapes: room for so many in 1,024 inputs (0:
    4, or 32 of 3 bits). `check` tells whether that was enough."""
    flat = w.reshape(*w.shape[:out], -1)
    if flat.dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11):
        # its XLA:CPU slices bfloat16 as float32, which quiets NaNs; with later ones the bits would be a copy of w
        flat = _bits(flat)
    rows = functools.partial(_encoded, bits=bits, C=room(flat.shape[-1], bits, escapes))
    made = _rows.in_blocks(rows, flat, out)  # what is made on the way is eight times the bytes of what is kept
    return dataclasses.replace(made, rest=made.rest.reshape(w.shape))


def _encoded(w: Array, *, bits: int, C: int) -> Lossless:
    """Rows [O, I] of a matrix."""
    window, numbers = 1 << bits, _bits(w)
    O, I = numbers.shape  # noqa: E741
    exponent = ((numbers >> 7) & 0xFF).astype(jnp.int32)
    rest = (((numbers >> 8) & 0x80) | (numbers & 0x7F)).astype(jnp.uint8)

    counts = jnp.zeros((O, 256), jnp.int32).at[jnp.arange(O)[:, None], exponent].add(1)
    upto = jnp.pad(jnp.cumsum(counts, axis=1), ((0, 0), (1, 0)))
    held = upto[:, window:] - upto[:, :-window]
    beside = upto[:, window:] - upto[:, 1 : 1 - window] + counts[:, :1]  # the zeros, and the window without its first
    zero = (beside.max(axis=1) > held.max(axis=1))[:, None]
    base = jnp.argmax(jnp.where(zero, beside, held), axis=1).astype(jnp.int32)
    index = exponent - base[:, None]
    index = jnp.where(zero, jnp.where(exponent == 0, 0, jnp.where(index == 0, -1, index)), index)
    escaped = (index < 0) | (index >= window)
    index = jnp.where(escaped, 0, index).astype(jnp.uint8)

    at = jnp.arange(I, dtype=jnp.int32)
    # the first ones: the largest of what falls from I on
    found = I - lax.top_k(jnp.where(escaped, I - at, 0), C)[0]
    place = jnp.where(found < I, found, I + jnp.arange(C, dtype=jnp.int32))
    kept = jnp.take_along_axis(exponent, jnp.minimum(place, I - 1), axis=1)

    index = _grouped.padded(index, G := _codebook.group_of(I, GROUP))
    planes = [_grouped.pack_plane(index, 4, G)] if bits == 4 else [
        _grouped.pack_plane(index & 3, 2, G), _grouped.pack_plane(index >> 2, 1, G)
    ]  # fmt: skip
    return Lossless(
        rest=rest,
        index=planes[0],
        high=planes[1] if bits == 3 else None,
        base=(base + jnp.where(zero[:, 0], ZERO, 0)).astype(jnp.uint16),
        place=place.astype(_unsigned(I + C)),
        exponent=kept.astype(jnp.uint8),
        count=escaped.sum(axis=1).astype(_unsigned(I)),
    )


def _unsigned(most: int) -> Any:
    return np.min_scalar_type(most)


def leaf_axes(axes: tuple[str | None, ...], out: int, bits: int = 4, escapes: int = 0) -> Lossless:
    """Signs and mantissas are laid out as w; indices have the inputs as one dim; of escapes a row's are together."""
    del escapes
    flat, rows, own = axes[: out + 1], axes[:out], (*axes[:out], None)
    return Lossless(axes, flat, flat if bits == 3 else None, rows, own, own, rows)  # pyright: ignore[reportArgumentType]


# --- what is refused ----------------------------------------------------------------------------------------------------


def refuses(stored: str, dtype: str) -> str | None:
    """Why a checkpoint of dtype `stored` is not held under a plan of dtype `dtype`; None if it is."""
    if "bfloat16" in (stored, dtype):
        return None
    return (
        f"it is {stored}, and lossless holds bfloat16 numbers: say dtype='bfloat16', which rounds the checkpoint to it once,"
        f" or weights='dense'"
    )


def check(leaf: Lossless) -> None:
    """Raises ValueError for a matrix of which a row has more escapes than room, with what would hold it."""
    most, inputs = int(jnp.asarray(leaf.count).max()), math.prod(leaf.shape[leaf.count.ndim :])
    bits, C = 4 if leaf.high is None else 3, leaf.place.shape[-1]
    if most <= C:
        return
    would = next((n for n in sorted(OPTIONS["escapes"]) if n and room(inputs, bits, n) >= most), None)
    near = "weights='lossless', whose window is wider" if bits == 3 else "weights='dense' for it (weight_rules)"
    if would is not None and (bits == 4 or 24 * would <= 1024):  # or they take more than the bit that they save
        near = f"lossless:{'bits=3,' if bits == 3 else ''}escapes={would}, or {near}"
    raise ValueError(
        f"a row of {inputs} numbers has {most} outside its {1 << bits} commonest neighbouring exponents, and lossless"
        f"{':bits=3' if bits == 3 else ''} has room for {C}: say {near}"
    )
