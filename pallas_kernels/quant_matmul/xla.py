"""A matrix held as codes, times rows, in XLA's own operations: on a CPU, and where no kernel serves on a GPU.

XLA fuses no dequantisation into a dot: it writes the matrix out first, and codes have saved no time. Two forms.

A few rows, on CPU: a sum of products, written such that LLVM makes vectors of it. Inputs are P blocks of C units, a unit
J vectors of r lanes, and the codes of the J vectors are shifts of the same words. Partial sums for each lane,

    a_mnpr = sum_c s_npc sum_j q_npcjr x_mpcjr            y_mn = sum_pr a_mnpr

have r as their innermost loop, over outputs, which are vectors; a sum over the innermost loop is none, as float32
additions are not reordered. All rows stand in one reduction with M operands: a code is read and converted once, and
multiplied M times. Two traps. A reduction of one operand XLA:CPU hands to YNNPACK, which passes over the data once for each
operation in it: one row is therefore written out as C sums. And C units must cost less than what LLVM unrolls as a whole:
above that, the loop over c is the innermost one, and nothing is a vector (5 to 10 times slower; jax 0.10.2 and 0.12.0.1).
Partial sums are 4 M / (C J) bytes for each weight, so that few rows are few.

More rows on CPU: a loop over chunks of the outputs; one chunk is dequantised, and goes into plain dots. A chunk is
every n-th output, so that outputs which are split over devices are split in each chunk.

On GPU: a loop over chunks of what the result has in its columns, outputs going forward and inputs going back. One kernel
writes a chunk in the dtype of the dot, whose result goes to its place at once: beside the result stand one chunk of the
matrix and one of the columns, and no float32 of all rows.

A sum is float32, and a scale for each output is applied to it, not to the codes.

M rows, N outputs, K inputs, G group size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import layout

FEW_ROWS = 4  # in one reduction, at most
UNROLLED = 320  # operations of a loop that LLVM unrolls as a whole, as counted here
WRITTEN_OUT = 96  # the same, of one row's sums that are written out: more of them only take longer to compile
# to make a number; others 5
OPERATIONS = {"int8": 2, "nf4": 22, "fp8": 12, "fp8_block": 12, "mxfp4": 9, "int5": 10, "int3": 10}
# XLA:CPU of jax 0.10 fuses a written out sum with the reshape behind it, in spite of the barrier, and makes no vectors of it:
# there a row of zeros goes with the one
ONE_ALONE = jax.__version_info__ >= (0, 11)
LANES = 16  # of a unit where no group says so
MANY_ROWS = 512  # from which on a CPU has a chunk as one matrix
CPU_CHUNK = 2**20  # weights of a chunk: 4 MiB in float32, which caches hold
GPU_CHUNK = 2**24  # 32 MiB in 16 bits
BYTES = ("int8", *layout.FLOATS)  # kinds of one code in a byte

# Traced once for each shape: a model's layers written out ask for the same hundreds of times
_traced_once = functools.partial(jax.jit, static_argnames=("kind", "group_size", "dtype"), inline=True)


@_traced_once
def quant_matmul(
    x: Float[Array, "M K"],
    codes: Any,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
) -> Float[Array, "M N"]:
    """x times the transpose of the matrix, in `dtype`."""

    def few(x: Array, *w: Any) -> Array:
        rows = x.astype(jnp.float32)
        if len(x) == 1 and not ONE_ALONE:
            rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
        return _reduced(rows, *_matrix(w, kind, group_size))[: len(x)].astype(dtype)

    def many(x: Array, *w: Any) -> Array:
        y = _chunked(x.astype(jnp.float32), *_matrix(w, kind, group_size), CPU_CHUNK, _cpu_form(len(x)), dtype)
        return lax.optimization_barrier(y)  # or each that uses it adds up the parts anew

    def gpu(x: Array, *w: Any) -> Array:
        if kind == "int8" and not group_size and (len(x) == 1 or not dispatch.below_ampere()):  # read inside the dot
            return (_dot("mk,nk->mn", x, w[0]) * w[1].astype(jnp.float32)[None]).astype(dtype)
        return _by_outputs(x, *_matrix(w, kind, group_size), GPU_CHUNK, dtype)

    M, K = x.shape
    cpu = few if _few(M, K, _How(kind, group_size)) else many
    return lax.platform_dependent(x, codes, scale, *_present(zero), cpu=cpu, default=gpu)


@_traced_once
def transposed(
    g: Float[Array, "M N"],
    codes: Any,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
) -> Float[Array, "M K"]:
    """g times the matrix itself, in `dtype`: the gradient of x."""

    def cpu(g: Array, *w: Any) -> Array:
        dx = _transposed(g.astype(jnp.float32), *_matrix(w, kind, group_size), CPU_CHUNK, _cpu_form(len(g)))
        return lax.optimization_barrier(dx).astype(dtype)

    def gpu(g: Array, *w: Any) -> Array:
        if kind == "int8" and not group_size and g.dtype != jnp.float16:  # whose range g s may leave
            scaled = (g.astype(jnp.float32) * w[1].astype(jnp.float32)[None]).astype(g.dtype)
            return _dot("mn,nk->mk", scaled, w[0]).astype(dtype)
        return _by_inputs(g, *_matrix(w, kind, group_size), GPU_CHUNK, dtype)

    return lax.platform_dependent(g, codes, scale, *_present(zero), cpu=cpu, default=gpu)


def _present(zero: Array | None) -> tuple[Array, ...]:
    return () if zero is None else (zero,)


# --- the matrix -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static of a matrix. G: group size, 0 where a scale is an output's; e5m2: which of the two float8."""

    kind: str
    G: int
    e5m2: bool = False

    @property
    def bits(self) -> int:
        """Of a code in its (first) plane."""
        return max(layout.planes(self.kind), default=8)

    @property
    def J(self) -> int:  # noqa: N802
        """Vectors of a unit."""
        unit = self.G or LANES
        return 16 // min(planes) if (planes := layout.planes(self.kind)) else 4 if unit % 32 == 0 else 1

    @property
    def r(self) -> int:
        """Inputs of a vector."""
        return (self.G or LANES) // self.J


def _matrix(w: tuple[Any, ...], kind: str, group_size: int) -> tuple[Any, Array, Array | None, _How]:
    """Codes; scales in float32, [N] or [N, groups]; zeros."""
    codes, scale, *zero = w
    if kind == "mxfp4":
        scale = layout.e8m0(scale)
    if kind == "fp8_block":
        scale = jnp.repeat(scale, group_size, 0, total_repeat_length=len(scale) * group_size)[: len(codes)]
        scale = lax.optimization_barrier(scale)  # or each product looks its scale up
    how = _How(kind, group_size, codes.dtype == jnp.float8_e5m2 if kind in layout.FLOATS else False)
    if kind in layout.FLOATS:
        codes = lax.bitcast_convert_type(codes, jnp.int8)
    return codes, scale.astype(jnp.float32), zero[0] if zero else None, how


def _vector(codes: Any, how: _How, j: int, zero: Array | None) -> Float[Array, "... r"]:
    """What the j-th vector of each unit stands for, before its scale; codes [..., words of a unit]."""
    if how.kind in BYTES:
        return _number(codes[..., j * how.r : (j + 1) * how.r], how)
    if how.kind in layout.MIDDLE:
        return _counted(codes, how, j, zero)
    return _number((codes.astype(jnp.int32) >> (how.bits * j)) & (2**how.bits - 1), how)


def _counted(codes: Any, how: _How, j: int, zero: Array | None) -> Float[Array, "... r"]:
    """q - z, without a shift or a conversion: as the bits from s on of the mantissa of 2^(23-s), a code q adds q to it."""
    low, *high = codes if isinstance(codes, tuple) else (codes,)
    turn, at = divmod(j, how.bits) if high else (j, 0)  # the lower plane has as many vectors in a row as bits
    low = low[..., at * how.r : (at + 1) * how.r] if high else low
    s = how.bits * turn
    power = np.float32(2.0 ** (23 - s))
    word = (low.astype(jnp.uint32) & jnp.uint32((2**how.bits - 1) << s)) | jnp.uint32(power.view(np.uint32))
    less = jnp.float32(power + (layout.MIDDLE[how.kind] if zero is None else 0))
    if high:
        set_ = (high[0].astype(jnp.uint32) & jnp.uint32(1 << j)) != 0
        less = jnp.where(set_, less - jnp.float32(2**how.bits), less)
    count = lax.bitcast_convert_type(word, jnp.float32) - less
    return count if zero is None else count - zero.astype(jnp.float32)


def _number(raw: Array, how: _How) -> Float[Array, "..."]:
    """What a code stands for, before its scale."""
    if how.kind == "nf4":
        return _nf4(raw)
    if how.kind == "mxfp4":
        # E2M1's bits are those at the top of a float16; its subnormal number too, which a CPU may flush in float32 alone
        half = ((raw & 7) << 9 | (raw & 8) << 12).astype(jnp.uint16)
        return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2**14
    return _float8(raw, how.e5m2) if how.kind in layout.FLOATS else raw.astype(jnp.float32)


def _float8(codes: Int[Array, "..."], e5m2: bool) -> Float[Array, "..."]:
    """float8 as float32, by way of a float16 of the same bits: XLA:CPU's own conversion takes twice the time."""
    bits = codes.astype(jnp.int16)
    if e5m2:
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    # one bit less of exponent: the sign's copy makes room for it
    half = lax.bitcast_convert_type((bits << 7) & jnp.int16(~(1 << 14)), jnp.float16).astype(jnp.float32)
    return jnp.where((bits & 127) == 127, jnp.float32(jnp.nan), half * 256)


def _nf4(raw: Int[Array, "..."]) -> Float[Array, "..."]:
    """The table by halving: 15 choices, which are vectors everywhere, where a look-up is not."""
    found: list[Any] = [jnp.float32(v) for v in layout.NF4]
    for bit in range(4):
        on = (raw & (1 << bit)) != 0
        found = [jnp.where(on, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


# --- a few rows -------------------------------------------------------------------------------------------------------


def _few(M: int, K: int, how: _How) -> bool:
    """Whether the partial sums, which are written and read again, are no more bytes than the codes would be as int8."""
    return 0 < M <= FEW_ROWS and how.J * _together(M, K // (how.J * how.r), how) >= 4 * M


def _reduced(x: Array, codes: Any, scale: Array, zero: Array | None, how: _How) -> Float[Array, "M N"]:
    """One pass over the codes for all rows of x, which is float32."""
    M, K = x.shape
    units = K // (how.J * how.r)
    C = _together(M, units, how)
    P = units // C
    used = P * C * how.J * how.r
    y = jnp.zeros((M, layout.outputs(codes)), jnp.float32)
    if used:
        y = _sums(x[:, :used], codes, scale, zero, how, P, C)
    if used < K:  # inputs beyond the last whole unit, in kinds of bytes
        rest = jnp.einsum("mk,nk->mn", x[:, used:], lax.optimization_barrier(_number(codes[:, used:], how)))
        y = y + (rest * scale[None, :, -1] if how.G else rest)
    return y if how.G else y * scale[None]


def _together(M: int, units: int, how: _How) -> int:
    """C: units in one sum."""
    work = how.J * OPERATIONS.get(how.kind, 5)
    most = UNROLLED // (work + 3 * M * (how.J + bool(how.G))) if M > 1 else max(2, WRITTEN_OUT // work)
    most = max(1, min(most, 16, units))
    if not how.G:
        return 1 << (most.bit_length() - 1)
    return next(C for C in range(most, 0, -1) if units % C == 0)


def _sums(x: Array, codes: Any, scale: Array, zero: Array | None, how: _How, P: int, C: int) -> Float[Array, "M N"]:
    """sum_pr a_mnpr of the head of the file; scales are in it where they are a group's."""
    M, N, J, r = len(x), layout.outputs(codes), how.J, how.r
    x_mpcjr = x.reshape(M, 1, P, C, J, r)
    if how.kind in BYTES:
        codes = codes[:, : P * C * J * r]
    codes = jax.tree.map(lambda a: a.reshape(N, P, C, -1), codes)
    s = scale[:, : P * C].reshape(N, P, C, 1) if how.G else None
    z = None if zero is None else zero.reshape(N, P, C, 1)

    def terms(m: int, codes: Any, s: Array | None, z: Array | None, x_mp_jr: Array) -> Array:
        total = _total([_vector(codes, how, j, z) * x_mp_jr[m, ..., j, :] for j in range(J)])
        return total if s is None else total * s

    if M > 1 and C > 1:
        zeros = (jnp.zeros((), jnp.float32),) * M
        sums = lax.reduce(tuple(terms(m, codes, s, z, x_mpcjr) for m in range(M)), zeros, _added, (2,))
    else:  # slices of what is in memory: XLA does not move one through a sum of products
        units = [jax.tree.map(lambda a, c=c: a[:, :, c], (codes, s, z)) for c in range(C)]
        sums = tuple(
            _total([terms(m, q, s, z, x_mpcjr[:, :, :, c]) for c, (q, s, z) in enumerate(units)]) for m in range(M)
        )
    ones = jnp.ones((P * r, 1), jnp.float32)
    # a dot sums the lanes: a second reduction would be fused with the first
    return jnp.concatenate([(a.reshape(N, -1) @ ones).T for a in lax.optimization_barrier(tuple(sums))])


def _total(terms: Sequence[Array]) -> Array:
    """Their sum, as two chains: one addition need not wait for the last."""
    chains = [sum(terms[i + 2 :: 2], terms[i]) for i in range(min(2, len(terms)))]
    return sum(chains[1:], chains[0])


def _added(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(i + j for i, j in zip(a, b, strict=True))


# --- more rows, on CPU -------------------------------------------------------------------------------------------------

Matrices = Callable[[Any, Array | None, Array | None, _How], list[Array]]


def _apart(codes: Any, scale: Array | None, zero: Array | None, how: _How) -> list[Float[Array, "N k"]]:
    """The matrix, float32, as one for each of the J vectors: XLA:CPU makes vectors of each, and not of them in one."""
    N = layout.outputs(codes)
    if how.kind in BYTES:
        w = _number(codes, how)
        if scale is not None and w.shape[1] % how.G == 0:
            w = w.reshape(N, -1, how.G) * scale[:, :, None]
        elif scale is not None:
            w = w * jnp.repeat(scale, how.G, 1, total_repeat_length=scale.shape[1] * how.G)[:, : w.shape[1]]
        return [lax.optimization_barrier(w).reshape(N, -1)]
    groups = scale.shape[1] if scale is not None else 1
    codes = jax.tree.map(lambda a: a.reshape(N, groups, -1), codes)
    z = None if zero is None else zero[:, :, None]
    parts = [_vector(codes, how, j, z) for j in range(how.J)]
    return [lax.optimization_barrier(w if scale is None else w * scale[:, :, None]).reshape(N, -1) for w in parts]


def _joined(codes: Any, scale: Array | None, zero: Array | None, how: _How) -> list[Float[Array, "N K"]]:
    """The matrix, float32, as one."""
    if how.kind in BYTES:
        return _apart(codes, scale, zero, how)
    parts = _apart(codes, scale, zero, how)
    return [jnp.stack([w.reshape(len(w), -1, how.r) for w in parts], 2).reshape(len(parts[0]), -1)]


def _whole(codes: Any, scale: Array | None, zero: Array | None, how: _How) -> list[Float[Array, "N K"]]:
    """The matrix, float32, as one, written out: its vectors are made one by one, and then laid side by side."""
    return [lax.optimization_barrier(w) for w in _joined(codes, scale, zero, how)]


def _cpu_form(M: int) -> Matrices:
    """What a chunk is on a CPU: for many rows, one large product pays for writing the matrix once more."""
    return _whole if M >= MANY_ROWS else _apart


def _vectors(x: Array, n: int, how: _How) -> list[Array]:
    """x [M, K] as the n matrices have their inputs."""
    if n == 1:
        return [x]
    M, K = x.shape
    x_MgJr = x.reshape(M, K // (how.J * how.r), how.J, how.r)
    return [x_MgJr[:, :, j].reshape(M, K // n) for j in range(n)]


def _loop(N: int, K: int, limit: int, least: int = 1) -> tuple[int, int]:
    """(chunks, outputs of each), of about `limit` weights at most; a power of two, which divides most N."""
    chunks = least
    while chunks * limit < N * K and 2 * chunks <= N:
        chunks *= 2
    return chunks, N // chunks


def _split(operands: Any, chunks: int, each: int) -> tuple[Any, Any]:
    """Arrays [N, ...] as [each, chunks, ...], and what is left of them at their end."""
    n = chunks * each
    main = jax.tree.map(lambda a: a[:n].reshape(each, chunks, *a.shape[1:]), operands)
    return main, jax.tree.map(lambda a: a[n:], operands)


def _at(operands: Any, i: Array) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 1, keepdims=False), operands)


def _chunked(
    x: Array, codes: Any, scale: Array, zero: Array | None, how: _How, limit: int, matrices: Matrices, dtype: Any
) -> Float[Array, "M N"]:
    """Chunk after chunk of the outputs, each of which is narrowed to `dtype` in its turn."""
    N = layout.outputs(codes)
    chunks, each = _loop(N, x.shape[1], limit)

    def product(operands: Any) -> Float[Array, "n M"]:
        codes, scale, zero = operands
        parts = matrices(codes, scale if how.G else None, zero, how)
        y = _total([_dot("mk,nk->nm", v, w) for v, w in zip(_vectors(x, len(parts), how), parts, strict=True)])
        return (y if how.G else y * scale[:, None]).astype(dtype)

    operands = (codes, scale, zero)
    if chunks == 1:
        return product(operands).T
    main, rest = _split(operands, chunks, each)
    y = lax.map(lambda i: product(_at(main, i)), jnp.arange(chunks))
    y = y.transpose(2, 1, 0).reshape(len(x), chunks * each)
    return y if chunks * each == N else jnp.concatenate([y, product(rest).T], 1)


def _dot(spec: str, a: Array, w: Array) -> Array:
    """In a's dtype, summed in float32; float32 itself is not to lose bits on its way into a GPU's dot."""
    if len(a) == 1 and spec == "mk,nk->mn" and dispatch.below_ampere():
        # XLA writes all of w in float32 for a row of float16 there; a sum reads it once
        return (w.astype(jnp.float32) * a.astype(jnp.float32)).sum(-1)[None]
    exact = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, w.astype(a.dtype), precision=exact, preferred_element_type=jnp.float32)


def _transposed(
    g: Array, codes: Any, scale: Array, zero: Array | None, how: _How, limit: int, matrices: Matrices
) -> Float[Array, "M K"]:
    """g times the matrix, chunk after chunk of its outputs; the result is float32."""
    N, M = layout.outputs(codes), len(g)
    plane = jax.tree.leaves(codes)[0]
    K = plane.shape[1] * (1 if how.kind in BYTES else 16 // how.bits)
    chunks, each = _loop(N, K, limit)

    def product(g: Array, operands: Any) -> list[Float[Array, "M k"]]:
        codes, scale, zero = operands
        parts = matrices(codes, scale if how.G else None, zero, how)
        if not how.G:
            parts = [w * scale[:, None] for w in parts]
        return [_dot("mn,nk->mk", g, w) for w in parts]

    operands = (codes, scale, zero)
    if chunks == 1:
        dx = product(g, operands)
    else:
        (g_main, main), (g_rest, rest) = _split((g.T, operands), chunks, each)
        J = how.J if matrices is _apart and how.kind not in BYTES else 1
        none = [jnp.zeros((M, K // J), jnp.float32)] * J
        dx = lax.fori_loop(0, chunks, lambda i, dx: _sum_of(dx, product(_at(g_main, i).T, _at(main, i))), none)
        if chunks * each < N:
            dx = _sum_of(dx, product(g_rest.T, rest))
    if len(dx) == 1:
        return dx[0]
    return jnp.stack([d.reshape(M, K // (how.J * how.r), how.r) for d in dx], 2).reshape(M, K)


def _sum_of(a: list[Array], b: list[Array]) -> list[Array]:
    return [i + j for i, j in zip(a, b, strict=True)]


# --- more rows, on GPU ------------------------------------------------------------------------------------------------

SMALL = 2**20  # weights of a matrix that is one chunk: 2 MiB in 16 bits
BLOCKS = 8  # a chunk is a part of each, so that what is split over so many devices is split in each chunk


def chunk_bytes(N: int, K: int, M: int, itemsize: int) -> int:
    """What stands on a GPU beside M rows, their result and the codes, going forward or back: one chunk of the matrix, and the
    columns that it gives, both in the dtype of the rows."""
    by_outputs, by_inputs = _loop(N, K, GPU_CHUNK, _least(N, K)), _loop(K, N, GPU_CHUNK, _least(K, N))
    return itemsize * max(
        each * (other + M * (chunks > 1)) for (chunks, each), other in ((by_outputs, K), (by_inputs, N))
    )


def forward_chunk(N: int, K: int) -> tuple[int, int]:
    """Of a matrix on a GPU, going forward: (chunks, outputs of each)."""
    return _loop(N, K, GPU_CHUNK, _least(N, K))


def _by_outputs(
    x: Array, codes: Any, scale: Array, zero: Array | None, how: _How, limit: int, dtype: Any
) -> Float[Array, "M N"]:
    """x times the transpose, chunk after chunk of the outputs."""
    N, K = layout.outputs(codes), x.shape[1]

    def product(operands: Any) -> Float[Array, "M n"]:
        codes, scale, zero = operands
        w = _dense(codes, scale if how.G else None, zero, how)
        factor = None if how.G else scale[None]
        if x.dtype == jnp.float16 and how.G:
            w, factor = _within_half(w, (1,))
            factor = factor.T
        return _narrowed(_dot("mk,nk->mn", x, w), factor, dtype)

    operands = (codes, scale, zero)
    return _in_place(product, x, operands, jax.tree.map(lambda _: 1, operands), 0, *_loop(N, K, limit, _least(N, K)))


def _by_inputs(
    g: Array, codes: Any, scale: Array, zero: Array | None, how: _How, limit: int, dtype: Any
) -> Float[Array, "M K"]:
    """g times the matrix, chunk after chunk of its inputs: no sums that wait for the next chunk, as by outputs."""
    N, plane = layout.outputs(codes), jax.tree.leaves(codes)[0]
    K = plane.shape[1] * (1 if how.kind in BYTES else 16 // how.bits)
    unit = how.G or (1 if how.kind in BYTES else how.J * how.r)

    def product(operands: Any) -> Float[Array, "M k"]:
        codes, of_groups = operands
        of_group, zero = of_groups or (None, None)
        w = _dense(codes, of_group, zero, how)
        w, factor = w if how.G else w * scale[:, None], None
        if g.dtype == jnp.float16:
            w, factor = _within_half(w, (0, 1))
        return _narrowed(_dot("mn,nk->mk", g, w), factor, dtype)

    operands = (codes, (scale, zero) if how.G else ())
    of_codes = jax.tree.map(lambda a: a.shape[1] * unit // K, codes)
    per = (of_codes, jax.tree.map(lambda _: 1, operands[1]))
    return _in_place(product, g, operands, per, 1, *_loop(K // unit, N * unit, limit, _least(K // unit, N * unit)))


def _least(N: int, K: int) -> int:
    """Chunks at least: XLA writes a matrix that needs no loop long before the rows are there, as many as there are of them."""
    return 2 if N > 1 and N * K > SMALL else 1


def _dense(codes: Any, scale: Array | None, zero: Array | None, how: _How) -> Float[Array, "N K"]:
    """The matrix, float32, by operations of one element each: XLA:GPU writes what a dot reads in one kernel, narrowed."""
    if how.kind in BYTES:
        w = _number(codes, how)
    else:
        planes = zip(codes if isinstance(codes, tuple) else (codes,), layout.planes(how.kind), strict=True)
        low, *high = (layout.unpack(words, bits, how.G or how.J * how.r) for words, bits in planes)
        q = (low | high[0] << how.bits if high else low).astype(jnp.int32)
        if how.kind == "nf4":  # looked up: XLA moves the constants of choices out of a loop, and each is a whole chunk
            w = jnp.array(layout.NF4, jnp.float32).at[q].get(mode="promise_in_bounds")
        else:
            w = _number(q, how)
        if how.kind in layout.MIDDLE and zero is None:
            w = w - layout.MIDDLE[how.kind]
    if zero is not None:
        w = w - _repeated(zero.astype(jnp.float32), how.G, w.shape[1])
    return w if scale is None else w * _repeated(scale, how.G, w.shape[1])


def _repeated(a: Float[Array, "N groups"], G: int, K: int) -> Float[Array, "N K"]:
    return jnp.broadcast_to(a[:, :, None], (*a.shape, G)).reshape(len(a), -1)[:, :K]


def _within_half(w: Array, dims: tuple[int, ...]) -> tuple[Array, Array]:
    """A matrix over powers of two, so that float16 holds it, and the powers: of the largest magnitudes over `dims`."""
    largest = jnp.maximum(jnp.abs(w).max(dims, keepdims=True), 2.0**-100)
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    return w / power, power


def _narrowed(y: Array, factor: Array | None, dtype: Any) -> Array:
    """Rounded once: over a mesh, sums of several devices are added before."""
    return (y if factor is None else y * factor).astype(dtype)


def _in_place(
    product: Callable[[Any], Array], rows: Array, operands: Any, per: Any, dim: int, chunks: int, each: int
) -> Float[Array, "M n"]:
    """What `product` makes of operands, whose dim `dim` is units of so many elements (`per`), as is the last of the result:
    `each` units at a time, every chunk written to its place; and of what is beyond the last whole chunk."""
    if chunks == 1:
        return product(operands)
    B = math.gcd(each, BLOCKS)
    beyond = jax.tree.map(lambda n: n * chunks * each, per)
    main = jax.tree.map(lambda a, n: lax.slice_in_dim(a, 0, n, axis=dim), operands, beyond)
    apart = jax.tree.map(lambda a: a.reshape(*a.shape[:dim], B, chunks, -1, *a.shape[dim + 1 :]), main)

    def chunk(i: Any) -> Float[Array, "M B n"]:
        def at(a: Array, of: Array) -> Array:
            part = lax.dynamic_index_in_dim(of, i, dim + 1, keepdims=False)
            return part.reshape(*a.shape[:dim], -1, *a.shape[dim + 1 :])

        y = product(jax.tree.map(at, main, apart))
        return y.reshape(len(y), B, -1)

    made = jax.eval_shape(chunk, 0)
    M, _, n = made.shape
    # what it begins with is of no account, but constants would be written long before the rows are there (one number a row
    # goes between devices where they split the inputs)
    y = lax.fori_loop(
        0,
        chunks,
        lambda i, y: lax.dynamic_update_index_in_dim(y, chunk(i), i, 2),
        jnp.broadcast_to(rows[:, :1, None, None].astype(made.dtype), (M, B, chunks, n)),
    ).reshape(M, -1)
    rest = jax.tree.map(lambda a, n: lax.slice_in_dim(a, n, a.shape[dim], axis=dim), operands, beyond)
    if not jax.tree.leaves(rest)[0].size:
        return y
    return jnp.concatenate([y, product(rest)], 1)
