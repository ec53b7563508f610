"""GPTQ (Frantar et al., arXiv:2210.17323): a matrix is rounded column by column, and what a column's rounding did to the
output is made good in the columns that are still to come.

    U^T U = (H + d mean(diag H))^-1, U upper triangular            H = sum_t x_t x_t^T
    for each column i:    q_i = round(w_i)     w_j -= (w_i - q_i) U_ij / U_ii   for j > i

Columns are taken in blocks: inside a block each is brought up to date by those before it, and what lies beyond the block
once for all of them, as a product of matrices (section 3.3, step 2). U comes from one Cholesky factor and one triangular
inverse: with J the reversal of rows, J H J = L L^T makes H^-1 = U^T U for U = J L^-1 J.

A group's step is chosen when its first column's turn comes, of what its columns have become by then. Formats with an order
of columns (act_order) take the columns with the most input first, and groups are of that order.

d is 0.01, the paper's, and ten times more where float32 finds H + d singular. An input that no sample has ever moved has
H_ii = 0: its column is rounded to nearest, not dropped, for other texts may move it.

O outputs, I inputs, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt8

from jaxengine.calibration.capture import EXACT
from jaxengine.calibration.grid import Grid
from jaxengine.engine import Engine, program

BLOCK = 128
DAMPING = (0.01, 0.1, 1.0)
LEAST = 1e-30  # of a power that is divided by


@program(0, 1)
def factor(
    engine: Engine, ordered: bool, H: Float[Array, "I I"], damping: Float[Array, ""]
) -> tuple[Float[Array, "I I"], Int32[Array, "I"], Bool[Array, ""]]:
    """(U, the order of columns that it is of, whether it is finite)."""
    del engine
    diagonal = jnp.diagonal(H)
    perm = jnp.arange(len(H), dtype=jnp.int32)
    if ordered:
        perm = jnp.argsort(diagonal, descending=True, stable=True).astype(jnp.int32)
    mean = jnp.mean(diagonal)
    added = jnp.where(mean > 0, damping * mean, 1.0)
    back = perm[::-1]
    reversed_ = H[back][:, back] + added * jnp.eye(len(H), dtype=H.dtype)
    L = jnp.linalg.cholesky(reversed_)
    U = lax.linalg.triangular_solve(L, jnp.eye(len(H), dtype=H.dtype), left_side=True, lower=True)[::-1, ::-1]
    return U, perm, jnp.isfinite(U).all()


@program(0, 1)
def solve(
    engine: Engine,
    grid: Grid,
    matrices: tuple[Array, ...],
    H: Float[Array, "I I"],
    U: Float[Array, "I I"],
    perm: Int32[Array, "I"],
) -> tuple[tuple[Array, ...], UInt8[Array, "O I"], Float[Array, "O NG"], Float[Array, "O NG"], Float[Array, "M"]]:
    """(what is held in place of each matrix; of all their rows, the codes in the order of perm, steps and zeros; the part of each
    one's output's power that is lost)."""
    del engine
    W = grid.joined(matrices)
    codes, s, z = columns(grid, jnp.take(W, perm, axis=1, mode="clip"), U)
    held = jnp.take(grid.held(codes, s, z), jnp.argsort(perm), axis=1, mode="clip")
    dense, parts = outcome(grid, matrices, held, W, jnp.ones(len(W)), H)
    return dense, codes, s, z, parts


def outcome(
    grid: Grid, matrices: Sequence[Array], held: Array, W: Array, rows: Array, H: Array
) -> tuple[tuple[Array, ...], Float[Array, "M"]]:
    """(what is held in place of each matrix, in its shape and dtype; the part of each one's output's power that is lost) of all
    their rows as they are held and as they were; rows: what these count for."""
    wrong, right = ((a * rows[:, None]) for a in (held - W, W))
    parts = [
        power(e, H) / jnp.maximum(power(r, H), LEAST)
        for e, r in zip(grid.apart(wrong, matrices), grid.apart(right, matrices), strict=True)
    ]
    made = zip(grid.apart(held, matrices), matrices, strict=True)
    return tuple(a.reshape(w.shape).astype(w.dtype) for a, w in made), jnp.stack(parts)


def power(A: Float[Array, "O I"], H: Float[Array, "I I"]) -> Float[Array, ""]:
    """tr(A H A^T): of what A makes of the samples."""
    return (jnp.einsum("oi,ij->oj", A, H, precision=EXACT) * A).sum()


def columns(
    grid: Grid, W: Float[Array, "O I"], U: Float[Array, "I I"]
) -> tuple[UInt8[Array, "O I"], Float[Array, "O NG"], Float[Array, "O NG"]]:
    """The codes of W, whose columns stand in U's order, with steps and zeros."""
    O, I = W.shape  # noqa: E741
    G = grid.group
    shared = None
    if grid.whole:
        shared, G = grid.steps(W), min(BLOCK, 1 << (I - 1).bit_length())
    size = max(BLOCK, G) if I > BLOCK else max(G, 1 << (I - 1).bit_length())
    total = -(-I // size) * size
    # transposed, so that a column is contiguous; columns of the padding are zeros that weigh on nothing
    V = jnp.pad(W.T, ((0, total - I), (0, 0)))
    U = jnp.pad(U, ((0, total - I), (0, total - I)))
    U = U + jnp.diag((jnp.arange(total) >= I).astype(U.dtype))
    at = jnp.arange(total)

    def block(b: Array, state: Any) -> Any:
        V, Q, s, z = state
        first = b * size
        V_b = lax.dynamic_slice_in_dim(V, first, size)
        U_b = lax.dynamic_slice_in_dim(U, first, size)
        own = lax.dynamic_slice_in_dim(U_b, first, size, axis=1)

        def column(i: Array, state: Any) -> Any:
            V_b, Q, E, s_g, z_g = state
            v = V_b[i]
            q = grid.codes(v, s_g, z_g)
            e = (v - s_g * (q - z_g)) / own[i, i]
            beyond = jnp.where(jnp.arange(size) > i, own[i], 0.0)
            return V_b - beyond[:, None] * e[None], Q.at[first + i].set(q.astype(jnp.uint8)), E.at[i].set(e), s_g, z_g

        E = jnp.zeros_like(V_b)

        def group(g: Array, state: Any) -> Any:
            V_b, Q, E, s, z = state
            s_g, z_g = shared or grid.steps(lax.dynamic_slice_in_dim(V_b, g * G, G).T)
            nth = first // G + g
            s, z = s.at[nth].set(s_g), z.at[nth].set(z_g)
            V_b, Q, E, _, _ = lax.fori_loop(g * G, (g + 1) * G, column, (V_b, Q, E, s_g, z_g))
            return V_b, Q, E, s, z

        _, Q, E, s, z = lax.fori_loop(0, size // G, group, (V_b, Q, E, s, z))
        beyond = jnp.where((at >= first + size)[None], U_b, 0.0)
        return V - jnp.einsum("bi,bo->io", beyond, E, precision=EXACT), Q, s, z

    Q = jnp.zeros((total, O), jnp.uint8)
    each = jnp.ones((total // G, O), jnp.float32), jnp.zeros((total // G, O), jnp.float32)
    _, Q, s, z = lax.fori_loop(0, total // size, block, (V, Q, *each))
    count = 1 if grid.whole else I // G if I > G else 1
    return Q[:I].T, s[:count].T, z[:count].T


def solved_factor(engine: Engine, H: Array, *, ordered: bool) -> tuple[Array, Array]:
    """`factor` with as little damping as float32 takes; FloatingPointError where H itself is not finite."""
    for damping in DAMPING:
        U, perm, finite = factor(engine, ordered, H, jnp.float32(damping))
        if bool(jax.device_get(finite)):
            return U, perm
    raise FloatingPointError(
        f"the Hessian of {len(H)} inputs has no Cholesky factor with damping up to {DAMPING[-1]}: activations are not finite;"
        f" calibrate with dtype='float32' or other text"
    )
