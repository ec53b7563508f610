"""A matrix held as codes, times rows: against numpy float64, whose matrix is made code by code from its description.

Rounding, u_x being the unit roundoff of x's dtype and u float32's: an implementation may round the matrix to x's dtype
once, accumulates in float32, and rounds the result once, as tests/test_weights.py derives:

    |y - x . W| <= (u_x + (K + 8) u) sum_k |x_k W_k| (1 + u_y) + u_y |x . W|
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import layout, quant_matmul, reference, xla

U = 2.0**-24
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # OCP MX v1.0, table of FP4
BITS = {"int4": 4, "int3": 3, "int2": 2, "nf4": 4, "mxfp4": 4}
IMPLEMENTATIONS = ("reference", "xla")


def normal_float(bits: int = 4) -> np.ndarray:
    """NF4 from its definition (arXiv:2305.14314, appendix E): quantiles of a normal, 8 above zero and 7 below, zero itself."""
    from statistics import NormalDist

    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 2 ** (bits - 1) + 1)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 2 ** (bits - 1))[:-1]]
    table = np.sort([*above, 0.0, *below])
    return table / table.max()


class Case(NamedTuple):
    """A kind and how it is used; `name` for pytest."""

    kind: str
    group_size: int = 0
    zero: bool = False
    scale: str = "float32"
    codes: str = ""

    @property
    def name(self) -> str:
        return "-".join(str(p) for p in (self.kind, self.group_size, "zero" * self.zero, self.scale, self.codes) if p)


CASES = [
    Case("int8"),
    Case("int8", 32),
    Case("int8", 48, scale="bfloat16"),
    Case("int4", 32, scale="bfloat16"),
    Case("int4", 64, zero=True, scale="float16"),
    Case("int4", 16, zero=True),
    Case("int3", 32, scale="bfloat16"),
    Case("int3", 16, zero=True),
    Case("int2", 32),
    Case("int2", 64, zero=True, scale="bfloat16"),
    Case("nf4", 64),
    Case("mxfp4", 32, scale="uint8"),
    Case("fp8", codes="float8_e4m3fn"),
    Case("fp8", codes="float8_e5m2"),
    Case("fp8_block", 128, codes="float8_e4m3fn"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
each_kind = pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 7, 9, 10, 11, 12, 14)], ids=lambda c: c.name)


class Matrix(NamedTuple):
    codes: Any
    scale: jax.Array
    zero: jax.Array | None
    dense: np.ndarray  # float64 [N, K]


def packed(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Each code put where the description says, one at a time."""
    N, K = codes.shape
    per = group * bits // 16
    words = np.zeros((N, K * bits // 16), np.uint16)
    for k in range(K):
        g, within = divmod(k, group)
        j, r = divmod(within, per)
        words[:, g * per + r] |= (codes[:, k] << (bits * j)).astype(np.uint16)
    return words


def matrix(case: Case, N: int = 24, K: int = 192, seed: int = 0, size: float = 1.0) -> Matrix:
    """Random codes and scales; the matrix is of magnitude `size`, the first output all zero."""
    rng = np.random.default_rng(seed)
    kind, G = case.kind, case.group_size
    blocks = (-(-N // 128), -(-K // 128)) if kind == "fp8_block" else (N, K // G) if G else (N,)
    s = size * np.exp(rng.normal(size=blocks))
    if kind == "mxfp4":
        s_codes = (127 + np.round(np.log2(s))).astype(np.uint8)
        scale, s = jnp.asarray(s_codes), 2.0 ** (s_codes.astype(np.float64) - 127)
    else:
        bytes_ = {"int8": 127, "int4": 8, "int3": 4, "int2": 2, "nf4": 1, "fp8": 400, "fp8_block": 400}[kind]
        scale = jnp.asarray(s / bytes_, case.scale)
        s = np.asarray(scale).astype(np.float64)
    if kind == "int8":
        q = rng.integers(-127, 128, (N, K)).astype(np.int8)
        q[0] = 0
        codes, w = jnp.asarray(q), q.astype(np.float64)
    elif kind in ("fp8", "fp8_block"):
        numbers = np.clip(rng.normal(size=(N, K)) * 120, -448, 448)
        numbers[0] = 0
        codes = jnp.asarray(numbers.astype(case.codes))
        w = np.asarray(codes).astype(np.float64)
    else:
        q = rng.integers(0, 2 ** BITS[kind], (N, K))
        nothing = {"int4": 8, "int3": 4, "int2": 2, "nf4": 7, "mxfp4": 0}[kind]
        q[0] = nothing
        if kind == "int3":
            codes = (jnp.asarray(packed(q & 3, 2, G)), jnp.asarray(packed(q >> 2, 1, G)))
        else:
            codes = jnp.asarray(packed(q, BITS[kind], G))
        table = {"nf4": np.asarray(layout.NF4), "mxfp4": np.asarray(E2M1)}.get(kind)
        w = q.astype(np.float64) if table is None else table[q]
    zero = None
    if kind in ("int4", "int3", "int2"):
        z = np.full(blocks, float(2 ** (BITS[kind] - 1)))
        if case.zero:
            z[1:] = rng.uniform(0, 2 ** BITS[kind], blocks)[1:]
            zero = jnp.asarray(z, case.scale)
            z = np.asarray(zero).astype(np.float64)
        w = w - np.repeat(z, G, 1)
    if kind == "fp8_block":
        wide = np.repeat(np.repeat(s, 128, 0)[:N], 128, 1)[:, :K]
    else:
        wide = np.repeat(s, G, 1) if G else s[:, None]
    return Matrix(codes, scale, zero, wide * w)


def rows(M: int, K: int, dtype: str, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(M, K)), dtype)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def roundoff(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


def assert_near(y: Any, x: Any, w: np.ndarray, *, dtype: str, err_msg: str = "") -> None:
    """y is x . w^T within the bound at the head of the file; w [N, K] is float64."""
    u_x, u_y = roundoff(x.dtype), roundoff(dtype)
    exact, magnitude = f64(x) @ w.T, abs(f64(x)) @ abs(w.T)
    bound = (u_x + (w.shape[1] + 8) * U) * magnitude * (1 + u_y) + u_y * abs(exact)
    assert (y.shape, y.dtype) == (exact.shape, jnp.dtype(dtype))
    worst = np.max(abs(f64(y) - exact) - bound, initial=-1)
    assert worst <= 0, f"{err_msg}: {worst} above the bound"  # a NaN is not <= 0 either


@functools.partial(jax.jit, static_argnames=("kind", "group_size", "dtype", "implementation"))
def run(x: Any, codes: Any, scale: Any, zero: Any, **how: Any) -> jax.Array:
    return quant_matmul(x, codes, scale, zero, **how)


def how(case: Case, **more: Any) -> dict[str, Any]:
    return {"kind": case.kind, "group_size": case.group_size, **more}


# --- meaning ------------------------------------------------------------------------------------------------------


@each_case
def test_the_reference_is_the_matrix_of_the_description(case: Case) -> None:
    m = matrix(case)
    found = f64(reference.dense(m.codes, m.scale, m.zero, **how(case)))
    np.testing.assert_allclose(found, m.dense, rtol=4 * U, atol=4 * U * (8 if case.zero else 0))
    assert (found[0] == 0).all()


def test_nf4_is_the_normal_float_of_four_bits() -> None:
    np.testing.assert_allclose(layout.NF4, normal_float(), atol=1e-6)  # the paper's own table is of float32 arithmetic


# --- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@each_case
def test_every_number_of_rows(case: Case, dtype: str) -> None:
    m = matrix(case)
    for M in (1, 2, 3, xla.FEW_ROWS, xla.FEW_ROWS + 1, 40):
        x = rows(M, 192, dtype)
        y = run(x, m.codes, m.scale, m.zero, dtype=dtype, implementation=None, **how(case))
        assert_near(y, x, m.dense, dtype=dtype, err_msg=f"{M} rows")
