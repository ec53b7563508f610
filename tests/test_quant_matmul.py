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
BITS = {"int5": 5, "int4": 4, "int3": 3, "int2": 2, "nf4": 4, "mxfp4": 4}
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
    Case("int8", 48, scale="bfloat16"),
    Case("int4", 32, scale="bfloat16"),
    Case("int4", 16, zero=True),
    Case("int4", 64, zero=True, scale="float16"),
    Case("int5", 32, zero=True),
    Case("int3", 16, zero=True),
    Case("int2", 64, zero=True, scale="bfloat16"),
    Case("int2", 32),
    Case("nf4", 64),
    Case("mxfp4", 32, scale="uint8"),
    Case("fp8", codes="float8_e4m3fn"),
    Case("fp8", codes="float8_e5m2"),
    Case("fp8_block", 128, codes="float8_e4m3fn"),
]


def each(*cases: Case) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


each_kind = each(*{c.kind: c for c in CASES}.values())


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
        bytes_ = {"int8": 127, "int5": 16, "int4": 8, "int3": 4, "int2": 2, "nf4": 1}.get(kind, 400)
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
        nothing = {"int5": 16, "int4": 8, "int3": 4, "int2": 2, "nf4": 7, "mxfp4": 0}[kind]
        q[0] = nothing
        if kind in ("int5", "int3"):
            low = BITS[kind] - 1
            codes = (jnp.asarray(packed(q % 2**low, low, G)), jnp.asarray(packed(q >> low, 1, G)))
        else:
            codes = jnp.asarray(packed(q, BITS[kind], G))
        table = {"nf4": np.asarray(layout.NF4), "mxfp4": np.asarray(E2M1)}.get(kind)
        w = q.astype(np.float64) if table is None else table[q]
    zero = None
    if kind in ("int5", "int4", "int3", "int2"):
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


@each(*CASES, Case("int8", 32), Case("int5", 16, scale="float16"), Case("int3", 32, scale="bfloat16"))
def test_the_reference_is_the_matrix_of_the_description(case: Case) -> None:
    m = matrix(case)
    found = f64(reference.dense(m.codes, m.scale, m.zero, **how(case)))
    np.testing.assert_allclose(found, m.dense, rtol=4 * U, atol=4 * U * (8 if case.zero else 0))
    assert (found[0] == 0).all()


def test_nf4_is_the_normal_float_of_four_bits() -> None:
    np.testing.assert_allclose(layout.NF4, normal_float(), atol=1e-6)  # the paper's own table is of float32 arithmetic


# --- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(CASES)), ids=[c.name for c in CASES])
@pytest.mark.some_rows
def test_every_form(i: int) -> None:
    """One row, rows in one reduction, rows in chunks; the dtypes in turn. The first output's bound is zero."""
    case, dtype = CASES[i], ("float32", "bfloat16", "float16")[i % 3]
    m = matrix(case)
    for M in (1, 3, xla.FEW_ROWS + 1):
        x = rows(M, 192, dtype)
        y = run(x, m.codes, m.scale, m.zero, dtype=dtype, implementation=None, **how(case))
        assert_near(y, x, m.dense, dtype=dtype, err_msg=f"{M} rows")


def test_every_number_of_rows() -> None:
    case = Case("int4", 32, zero=True)
    m = matrix(case, 5, 64)
    for M in (0, 2, xla.FEW_ROWS, 40):
        x = rows(M, 64, "float32")
        y = run(x, m.codes, m.scale, m.zero, dtype="bfloat16", implementation=None, **how(case))
        assert_near(y, x, m.dense, dtype="bfloat16", err_msg=f"{M} rows")


@pytest.mark.parametrize("K", [1, 13, 257])
def test_inputs_that_are_no_multiple_of_anything(K: int) -> None:
    """Where a scale is an output's, nothing is padded."""
    for case in (Case("int8"), Case("fp8", codes="float8_e5m2")):
        m = matrix(case, 7, K)
        for M in (1, 2, 9):
            x = rows(M, K, "float32")
            y = run(x, m.codes, m.scale, m.zero, dtype="float32", implementation=None, **how(case))
            assert_near(y, x, m.dense, dtype="float32", err_msg=f"{case.name}, {M} rows")


@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
@pytest.mark.parametrize("implementation", [None, "reference", "xla", "mosaic_gpu"])
def test_sums_of_nothing(M: int, N: int, K: int, implementation: str | None) -> None:
    """No implementation is asked, so that one that could not run here gives the same."""
    x, codes, scale = jnp.ones((M, K)), jnp.ones((N, K), jnp.int8), jnp.ones((N,))

    def product(x: jax.Array) -> jax.Array:
        return quant_matmul(x, codes, scale, kind="int8", group_size=0, dtype="float32", implementation=implementation)

    y, back = jax.vjp(product, x)
    np.testing.assert_array_equal(y, np.zeros((M, N)))
    np.testing.assert_array_equal(back(y)[0], np.zeros((M, K)))


def test_a_number_of_groups_that_nothing_divides() -> None:
    case = Case("int4", 16)
    m = matrix(case, 3, 7 * 16)
    for M in (1, 2):
        x = rows(M, 7 * 16, "float32")
        assert_near(
            run(x, m.codes, m.scale, m.zero, dtype="float32", implementation=None, **how(case)),
            x,
            m.dense,
            dtype="float32",
        )


@each(Case("int8", 32), Case("int2", 64, zero=True), Case("fp8_block", 128, codes="float8_e4m3fn"))
def test_a_loop_over_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 outputs are not a multiple of the chunks: forward and back."""
    monkeypatch.setattr(xla, "CPU_CHUNK", 4 * 192)
    m, x = matrix(case, 25), rows(9, 192, "float32")
    g = rows(9, 25, "float32", seed=2)

    def both(x: Any, g: Any) -> tuple[Any, Any]:
        y, back = jax.vjp(lambda x: quant_matmul(x, *m[:3], dtype="float32", **how(case)), x)
        return y, back(g)[0]

    traced = jax.jit(both).trace(x, g)
    assert str(traced.jaxpr).count("scan[") >= 2
    y, dx = traced.lower().compile()(x, g)
    assert_near(y, x, m.dense, dtype="float32")
    assert_near(dx, g, m.dense.T, dtype="float32")


ON_GPU = {
    Case("int8"): "bfloat16",
    Case("int8", 32): "float16",
    Case("int4", 16, zero=True): "float16",
    Case("int5", 32, zero=True): "float16",
    Case("int3", 32): "bfloat16",
    Case("fp8_block", 128, codes="float8_e5m2"): "float16",
}


@each(*ON_GPU)
def test_the_form_for_gpus(case: Case) -> None:
    """The arm of the other platform, run here, in chunks and with what is beyond the last: the matrix is rounded to x's
    dtype, whatever its magnitude is."""
    dtype, K = ON_GPU[case], 456 if case.kind == "fp8_block" else 192
    m, x, g = matrix(case, 25, K, size=1e-9), rows(3, K, dtype), rows(3, 25, dtype, seed=2)

    @jax.jit
    def both(x: Any, g: Any, *w: Any) -> tuple[Any, Any]:
        w = xla._matrix(w, case.kind, case.group_size)
        return xla._by_outputs(x, *w, 8 * K, jnp.float32), xla._by_inputs(g, *w, 8 * K, jnp.float32)

    traced = both.trace(x, g, m.codes, m.scale, *xla._present(m.zero))
    assert str(traced.jaxpr).count("scan[") == 2
    y, dx = traced.lower().compile()(x, g, m.codes, m.scale, *xla._present(m.zero))
    for found, a, w in ((y, x, m.dense), (dx, g, m.dense.T)):
        bound = (roundoff(a.dtype) + (w.shape[1] + 8) * U) * (abs(f64(a)) @ abs(w.T)) * (1 + roundoff(a.dtype))
        assert (abs(f64(found) - f64(a) @ w.T) <= bound).all()


@each(*ON_GPU)
def test_the_form_for_gpus_rounds_once(case: Case) -> None:
    """To the dtype that is asked for, inside the dot where that is x's own."""
    dtype = ON_GPU[case]
    m, x, g = matrix(case, 25), rows(3, 192, dtype), rows(3, 25, dtype, seed=2)

    @jax.jit
    def both(x: Any, g: Any, *w: Any) -> tuple[Any, Any]:
        w = xla._matrix(w, case.kind, case.group_size)
        return xla._by_outputs(x, *w, 8 * 192, x.dtype), xla._by_inputs(g, *w, 2**20, g.dtype)

    y, dx = both(x, g, m.codes, m.scale, *xla._present(m.zero))
    assert_near(y, x, m.dense, dtype=dtype)
    assert_near(dx, g, m.dense.T, dtype=dtype)


@each(Case("int8"), Case("int4", 64), Case("mxfp4", 32, scale="uint8"), Case("fp8", codes="float8_e5m2"))
def test_nothing_overflows_where_the_result_fits(case: Case) -> None:
    """In float16, whose largest number is 65504: sums of codes are far above."""
    m = matrix(case, 8, size=1e-3)
    for M in (1, 9):
        x = jnp.full((M, 192), 6e4, "float16") * jnp.asarray(np.resize([1, -1], (M, 192)), "float16")
        y = run(x, m.codes, m.scale, m.zero, dtype="float16", implementation=None, **how(case))
        assert_near(y, x, m.dense, dtype="float16", err_msg=f"{M} rows")


def test_a_code_that_is_not_a_number_is_none() -> None:
    codes = jnp.zeros((3, 32), jnp.float8_e4m3fn).at[1, 5].set(jnp.nan)
    for implementation in IMPLEMENTATIONS:
        for M in (1, 2, 9):
            given = how(Case("fp8"), dtype="float32", implementation=implementation)
            y = run(jnp.ones((M, 32)), codes, jnp.ones(3), None, **given)
            np.testing.assert_array_equal(np.isnan(y), np.tile([False, True, False], (M, 1)))


def test_every_number_of_eight_bits() -> None:
    """float8 is read through another format's bits: each of its 256 codes, with subnormal numbers."""
    for dtype in layout.FP8:
        bits = np.arange(256, dtype=np.uint8)
        numbers = bits.view(dtype).astype(np.float32)
        finite = np.isfinite(numbers)
        found = jax.jit(xla._float8, static_argnums=1)(
            jnp.asarray(bits[finite].view(np.int8)), dtype == jnp.float8_e5m2
        )
        np.testing.assert_array_equal(found, numbers[finite])


@each(Case("int8"), Case("int4", 64), Case("nf4", 64), Case("fp8", codes="float8_e4m3fn"))
@pytest.mark.parametrize("M", [1, 2])
def test_few_rows_never_hold_the_matrix(case: Case, M: int) -> None:
    """Written out in float32 it would take four times the bytes of int8's codes."""
    N, K = 256, 2048
    m = matrix(Case(case.kind, case.group_size, codes=case.codes), 8, K)
    wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct((N, *a.shape[1:]), a.dtype), (m.codes, m.scale))
    x = jax.ShapeDtypeStruct((M, K), jnp.float32)
    lowered = run.lower(x, *wide, None, dtype="float32", implementation="xla", **how(case))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < N * K * 4 // 2


# --- gradient -----------------------------------------------------------------------------------------------------


@each_kind
def test_the_gradient_of_x(case: Case) -> None:
    m = matrix(case)
    x, g = rows(6, 192, "float32"), rows(6, 24, "float32", seed=2)

    def loss(x: Any, implementation: str | None) -> jax.Array:
        return (
            g * quant_matmul(x, m.codes, m.scale, m.zero, dtype="float32", implementation=implementation, **how(case))
        ).sum()

    found = jax.jit(jax.grad(loss), static_argnums=1)(x, None)
    assert_near(found, g, m.dense.T, dtype="float32")

    def dense(x: Any) -> jax.Array:
        return (g * reference.quant_matmul(x, m.codes, m.scale, m.zero, dtype="float32", **how(case))).sum()

    np.testing.assert_allclose(found, jax.grad(dense)(x), rtol=1e-4, atol=1e-4 * abs(m.dense).max())


def test_the_gradient_is_in_the_dtype_of_x() -> None:
    case = Case("int4", 64)
    m, x = matrix(case), rows(2, 192, "bfloat16")
    found = jax.jit(jax.grad(lambda x: quant_matmul(x, m.codes, m.scale, dtype="float32", **how(case)).sum()))(x)
    assert_near(found, jnp.ones((2, 24), "float32"), m.dense.T, dtype="bfloat16")


def test_the_matrix_is_frozen() -> None:
    case = Case("int4", 64, zero=True)
    m, x = matrix(case), rows(2, 192, "float32")
    y, back = jax.vjp(functools.partial(quant_matmul, dtype="float32", **how(case)), x, m.codes, m.scale, m.zero)
    _, codes, scale, zero = back(y)
    assert codes.dtype == jax.dtypes.float0
    assert not np.any(scale)
    assert not np.any(zero)


# --- how it is used -----------------------------------------------------------------------------------------------


@each(Case("int3", 32, zero=True), Case("fp8", codes="float8_e4m3fn"))
def test_stacked_layers_scan(case: Case) -> None:
    layers = [matrix(case, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *[(m.codes, m.scale, m.zero) for m in layers])
    for M in (1, 9):
        x = rows(M, 192, "float32")

        @jax.jit
        def scanned(x: Any, stack: Any) -> jax.Array:
            return jax.lax.scan(lambda x, w: (x, quant_matmul(x, *w, dtype="float32", **how(case))), x, stack)[1]

        for y, m in zip(scanned(x, stack), layers, strict=True):
            assert_near(y, x, m.dense, dtype="float32")


@pytest.mark.parametrize("dim", ["outputs", "inputs"])
@each(Case("int8"), Case("int4", 32, zero=True))
def test_split_over_a_mesh(case: Case, dim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 8 devices; codes are not brought together, in a loop over chunks neither."""
    N, K = 64, 512
    monkeypatch.setattr(xla, "CPU_CHUNK", 32 * K)
    m = matrix(case, N, K)
    mesh = Mesh(np.array(jax.devices()[:8]), ("model",))
    spec = PartitionSpec("model") if dim == "outputs" else PartitionSpec(None, "model")

    def put(a: jax.Array) -> jax.Array:
        return jax.device_put(a, NamedSharding(mesh, spec if a.ndim == 2 or dim == "outputs" else PartitionSpec()))

    w = jax.tree.map(put, (m.codes, m.scale, m.zero))
    xs = [jax.device_put(rows(M, K, "float32"), NamedSharding(mesh, PartitionSpec())) for M in (1, 3, 9)]
    together = jax.jit(lambda xs, w: [quant_matmul(x, *w, dtype="float32", **how(case)) for x in xs])
    for x, y in zip(xs, together(xs, w), strict=True):
        assert_near(y, x, m.dense, dtype="float32", err_msg=f"{len(x)} rows")
    text = together.lower(xs, w).compile().as_text()
    assert not re.findall(r"= (?:u16|s8|s32)\[[\d,]*\][^=]* all-(?:gather|to-all)", text)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "kind": ({"kind": "int6"}, "no kind 'int6'.*int5"),
    "implementation": ({"implementation": "cuda"}, "no implementation 'cuda'.*xla"),
    "dims of x": ({"x": jnp.ones((1, 2, 192))}, r"float32 \[1, 2, 192\].*two dims"),
    "dtype of x": ({"x": jnp.ones((2, 192), jnp.int32)}, "int32.*bfloat16, float16, float32"),
    "dtype": ({"dtype": "int8"}, "int8.*bfloat16, float16, float32"),
    "inputs": ({"x": jnp.ones((2, 190))}, "190 inputs.*multiple of group_size 64.*to 192"),
    "group size": ({"group_size": 24}, "multiple of 16, got 24.*nearest is 32"),
    "no group size": ({"group_size": 0}, "multiple of 16, got 0.*nearest is 16"),
    "one of two planes": ({"kind": "int3"}, "2 arrays.*got 1"),
    "codes": ({"codes": jnp.ones((24, 96), jnp.uint16)}, r"uint16 \[24, 48\], got uint16 \[24, 96\]"),
    "dtype of codes": ({"codes": jnp.ones((24, 48), jnp.int16)}, r"uint16 \[24, 48\], got int16"),
    "scale": ({"scale": jnp.ones((24, 6))}, r"\[24, 3\], got float32 \[24, 6\]"),
    "dtype of scale": ({"scale": jnp.ones((24, 3), jnp.uint8)}, "float32.*got uint8"),
    "zero": ({"zero": jnp.ones((24, 1))}, r"\[24, 3\], got float32 \[24, 1\]"),
    "zero of nf4": ({"kind": "nf4", "zero": jnp.ones((24, 3))}, "nf4 has no zero.*int4"),
    "scale of mxfp4": ({"kind": "mxfp4"}, "uint8.*got float32"),
    "groups of fp8": ({"kind": "fp8"}, "group_size 0, got 64.*fp8_block"),
    "blocks": ({"kind": "fp8_block"}, "128 wide, got group_size 64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    changed, message = REFUSED[what]
    good = {"x": jnp.ones((2, 192)), "codes": jnp.ones((24, 48), jnp.uint16), "scale": jnp.ones((24, 3)), "zero": None}
    given = {**good, "kind": "int4", "group_size": 64, "dtype": "float32", **changed}
    arrays = [given.pop(name) for name in good]
    with pytest.raises(ValueError, match=message) as error:
        quant_matmul(*arrays, **given)
    assert not isinstance(error.value, dispatch.Refused)
