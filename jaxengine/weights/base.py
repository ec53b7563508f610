"""What a weight is: a leaf that contracts.

A model calls `contract("btd,nhd->btnh", x, w)` and does not know how `w` is stored. `w` is an array, or a Weight: a
pytree that stands for a matrix it need not hold. `dense()` is a Weight's oracle (the matrix itself), `contract` its
fast path. Composition is nesting.

Every matrix is stored [out..., in...], Hugging Face's own order: loading is a reshape, the contracted dims are
contiguous (what a fused kernel wants to read), and a spec always reads

    "<batch><in>, <out><in> -> <batch><out>"

A file in this folder is one format and has
    encode(w, *, out)    -> array or Weight; `out` is the number of leading output dims of w
    leaf_axes(axes, out) -> the same tree with the logical axes of each array in place of the array
so that bytes, placement and checkpoints follow from eval_shape(encode) and need no second description.

Layout on CPU. XLA:CPU reads an [out, in] float32 matrix at full memory bandwidth for one row, but at less than half of
it for 2 to 64 rows (7 against 17 GB/s on two cores, jax 0.10.2 and 0.12.0.1; at 128 rows 162 against 173 GFLOP/s),
whichever way the einsum is written:
it always canonicalises to rows @ W^T. Computed as W @ rows^T, with both transposes held apart from the dot by a
barrier so that they are not folded back into it, it reads at full bandwidth again. `scripts/bench.py --contract`
measures both.
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float

from pallas_kernels.dispatch import below_ampere

CONTRACTED = "contracted"  # the name of every contraction's result, for what is kept for a way back (walk.REMAT)
THIN = 256  # rows or columns of the widest adapters
FEW_ROWS = 128  # above it the plain form is the faster one on CPU (207 against 147 GFLOP/s at 1,024 rows)


class Integers(NamedTuple):
    """A matrix as s (q - z), as others' checkpoints hold one: codes uint8 [out..., I] of so many bits, or int8 [out..., I]; scale
    [out..., groups], or [out...] for one a row; zero as scale, None for the middle code; perm int32 [I], column i of the
    codes is the matrix's column perm[i], None where they are in order; group: inputs that share a scale, the last ones of a
    row perhaps fewer, 0 for all of it."""

    bits: int
    codes: Any
    scale: Any
    zero: Any = None
    perm: Any = None
    group: int = 0


class Weight(abc.ABC):
    """A matrix [out..., in...] that need not be held as an array. Subclasses are frozen dataclasses and pytrees."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """The matrix itself, [out..., in...], float32."""

    @abc.abstractmethod
    def error_bound(self) -> Array:
        """Elementwise bound on |w - dense()| for the w that was encoded; broadcasts against dense()."""

    @abc.abstractmethod
    def contract(self, spec: str, x: Array) -> Array:
        """einsum(spec, x, dense()) in x's dtype, without holding dense() where the format allows."""

    @abc.abstractmethod
    def take(self, ids: Array, dtype: Any) -> Array:
        """Rows of the matrix: dense()[ids] in `dtype`; ids int [...], the result [..., in...]."""

    @property
    def made_bytes(self) -> int:
        """Bytes of arrays that each product makes anew on a device beside what is stored, the rows and their result."""
        return 0

    @property
    def beneath(self) -> Any:
        """The matrix that something trained stands beside, where this is both in one; None: it is a matrix alone."""
        return None

    def integers(self) -> Integers | None:
        """The matrix as integers with a scale a row or a group, numpy where the arrays are; None: it is not that."""
        return None


def value(p: Any) -> Any:
    """The array or Weight inside a Flax variable; anything else as it is."""
    return p.get_value() if isinstance(p, nnx.Variable) else p


def contract(spec: str, x: Float[Array, "..."], w: Any) -> Float[Array, "..."]:
    """Contract activations with a weight: einsum(spec, x, w), the result in x's dtype.

    spec: "<batch><in>,<out><in>-><batch><out>", e.g. "btd,nhd->btnh"; w: an array, a Weight, or a Flax Param of either.
    Raises ValueError for a spec of another form.
    """
    w = value(w)
    y = w.contract(spec, x) if isinstance(w, Weight) else einsum(spec, x, w.astype(x.dtype))
    return checkpoint_name(y, CONTRACTED)


def take(w: Any, ids: Array, dtype: Any) -> Array:
    """Rows of a weight (an embedding look-up): w[ids] in `dtype`."""
    w = value(w)
    if isinstance(w, Weight):
        return w.take(ids, dtype)
    return jnp.take(w, ids, axis=0).astype(dtype)


def split_spec(spec: str) -> tuple[str, str, str]:
    """The letters of (batch, in, out) of a contraction spec."""
    left, _, result = spec.replace(" ", "").partition("->")
    x_dims, _, w_dims = left.partition(",")
    ins = "".join(c for c in w_dims if c in x_dims)
    outs = "".join(c for c in w_dims if c not in x_dims)
    batch = x_dims[: len(x_dims) - len(ins)]
    if not (ins and outs and x_dims == batch + ins and w_dims == outs + ins and result == batch + outs):
        raise ValueError(f"A weight is contracted as '<batch><in>,<out><in>-><batch><out>'; the spec is {spec!r}")
    return batch, ins, outs


@jax.custom_vjp
def _narrow(x: Float[Array, "B I"], w: Float[Array, "O I"]) -> Float[Array, "B O"]:
    """x W^T of 16 bits, and ways back of 16 bits, each summed in float32. (Autodiff would go back from the sum before it is
    rounded: with float32 copies of g and W, at a float32 dot's speed.) Derivatives going forward (jax.jvp) there are none."""
    return _rounded("bi,oi->bo", x, w)


def _narrow_forward(x: CustomVJPPrimal, w: CustomVJPPrimal) -> tuple[Array, tuple[Array | None, Array | None]]:
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None  # what nobody asks for is not made
    return _rounded("bi,oi->bo", x.value, w.value), kept


def _narrow_backward(kept: tuple[Array | None, Array | None], g: Array) -> tuple[Array | None, Array | None]:
    # XLA:CPU sees to it that it can run each dot of 16 bits, and takes transpositions into them afterwards: some it cannot run
    (x, w), g = lax.platform_dependent(kept, g, cpu=lambda *a: lax.optimization_barrier(a), default=lambda *a: a)
    of_x = None if w is None else _rounded("bo,oi->bi", g, w)
    if x is None:
        return of_x, None
    if min(g.shape[1], x.shape[1]) > THIN:
        # one after the other, or XLA:GPU holds what both ways back of a wide block read beside what was changed since
        of_x, x, g = lax.optimization_barrier((of_x, x, g))
    return of_x, _rounded("bo,bi->oi", g, x)


_narrow.defvjp(_narrow_forward, _narrow_backward, symbolic_zeros=True)


def _rounded(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def einsum(spec: str, x: Array, w: Array, dtype: Any = None) -> Array:
    """einsum of x and a dense matrix of its dtype; accumulates in float32, the result in `dtype` (None: x's)."""
    batch, _, outs = split_spec(spec)
    rows = math.prod(x.shape[: len(batch)])
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    wanted = x.shape[: len(batch)] + w.shape[: len(outs)]
    # as two-dimensional matrices: left with more dims, XLA:CPU transposes the whole weight at every call
    x_bi = x.reshape(rows, -1)
    w_oi = w.reshape(-1, x_bi.shape[1])

    def plain(x_bi: Array, w_oi: Array) -> Array:
        if x_bi.dtype == w_oi.dtype == dtype and dtype.itemsize == 2:
            return _narrow(x_bi, w_oi)
        return jnp.einsum("bi,oi->bo", x_bi, w_oi, preferred_element_type=jnp.float32).astype(dtype)

    def columns(x_bi: Array, w_oi: Array) -> Array:
        x_ib = lax.optimization_barrier(x_bi.T)
        return lax.optimization_barrier(w_oi @ x_ib).T.astype(dtype)

    def reduced(x_bi: Array, w_oi: Array) -> Array:
        # one row in 16 bits: XLA's dot converts the whole matrix first, on a CPU (1.4 GB/s) and on GPUs below sm_80; a fused
        # multiply-add reads it once
        return (w_oi.astype(jnp.float32) * x_bi.astype(jnp.float32)).sum(-1)[None].astype(dtype)

    if x.dtype == jnp.float32 and 1 < rows <= FEW_ROWS:
        y_bo = lax.platform_dependent(x_bi, w_oi, cpu=columns, default=plain)
    elif x.dtype.itemsize == 2 and rows == 1:
        y_bo = lax.platform_dependent(x_bi, w_oi, cpu=reduced, default=reduced if below_ampere() else plain)
    else:
        y_bo = plain(x_bi, w_oi)
    return y_bo.reshape(wanted)
