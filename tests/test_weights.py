"""Every weight format in `jaxengine/weights`, found by file name, against numpy float64.

`dense()` is a format's own oracle, so two things are held: `dense()` is near the matrix that was encoded (within the
format's own `error_bound`), and everything else is near `dense()`, within rounding.

Rounding of a contraction over I inputs, u_x being x's unit roundoff and u float32's: a format may round its matrix to
x's dtype once, accumulates in float32, and rounds the result to x's dtype once:

    |y - x . W| <= (u_x + (I + 8) u) sum_i |x_i W_i| (1 + u_x) + u_x |x . W|

8 leaves room for a scale's product, a bias of half an ulp, and such. Magnitudes stay clear of subnormal numbers, but in
the test that is about them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.quantisation import symmetric, tie_width

import jaxengine
from checkpoints.safetensors import write_file
from jaxengine import formats, technique
from jaxengine.architecture import architecture
from jaxengine.finetune.trained.lora import Lora
from jaxengine.placement import stored
from jaxengine.weights import base
from jaxengine.weights.base import Weight, contract, split_spec, take
from sharding.mesh import make_mesh
from sharding.rules import Rules, named_sharding

WEIGHTS = "jaxengine.weights"


WITH = {("int8", "act_order"): "group_size=32,"}  # without which an option is refused


def variants(name: str) -> list[str]:
    """A format as it is, and with each other value of each of its options."""
    options = getattr(technique.find(WEIGHTS, name), "OPTIONS", {})
    found = [
        f"{name}:{WITH.get((name, option), '')}{option}={value}"
        for option, values in options.items()
        for value in values
    ]
    return list(dict.fromkeys([name, *(str(formats.find(text)) for text in found)]))


# every file takes every test; each other value of its options, what an option can break
FORMATS = list(technique.names(WEIGHTS))
VARIANTS = [text for name in FORMATS for text in variants(name)[1:]]
U = 2.0**-24

each_format = pytest.mark.parametrize("name", FORMATS)


class Case(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    out: int
    spec: str


GATE = Case((6, 8), ("mlp", "embed"), 1, "btd,fd->btf")
QUERY = Case((2, 3, 8), ("heads", "head_dim", "embed"), 2, "btd,nhd->btnh")
OUTPUT = Case((8, 2, 3), ("embed", "heads", "head_dim"), 1, "btnh,dnh->btd")
ODD = Case((7, 13), ("mlp", "embed"), 1, "btd,fd->btf")
ONE = Case((1, 1), ("mlp", "embed"), 1, "btd,fd->btf")
CASES = [GATE, QUERY, OUTPUT, ODD, ONE]
IDS = ["gate", "query", "output", "odd", "one"]


def fmt(name: str) -> formats.Format:
    return formats.find(name)


def matrix(case: Case, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal numbers, the first channel all zero where there are several."""
    w = np.random.default_rng(seed).normal(size=case.shape) * scale
    if case.shape[0] > 1:
        w[0] = 0
    return w.astype(np.float32)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def dense_of(leaf: Any) -> np.ndarray:
    return f64(leaf.dense() if isinstance(leaf, Weight) else leaf)


def activations(case: Case, rows: int, dtype: Any, seed: int = 1) -> jax.Array:
    """[rows / T, T, in...]: two queries where the number of rows is even."""
    T = 2 if rows % 2 == 0 else 1
    x = np.random.default_rng(seed).normal(size=(rows // T, T, *case.shape[case.out :]))
    return jnp.asarray(x, dtype)


def roundoff(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


def assert_contracts(y: Any, case: Case, x: Any, w: np.ndarray, *, err_msg: str = "") -> None:
    """y is x . w within the bound at the head of the file; w is float64."""
    u_x, inputs = roundoff(y.dtype), math.prod(case.shape[case.out :])
    exact = np.einsum(case.spec, f64(x), w)
    magnitude = np.einsum(case.spec, abs(f64(x)), abs(w))
    bound = (u_x + (inputs + 8) * U) * magnitude * (1 + u_x) + u_x * abs(exact)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    worst = np.max(abs(f64(y) - exact) - bound, initial=-1)
    assert worst <= 0, f"{err_msg}: {worst} above the bound"  # a NaN is not <= 0 either


# --- encode and dense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-37, 1e-42, 1e38])
@pytest.mark.parametrize("case", CASES, ids=IDS)
@each_format
@pytest.mark.some_rows
def test_dense_is_within_the_formats_own_bound(name: str, case: Case, scale: float) -> None:
    w = np.clip(matrix(case), -3, 3) * np.float32(scale)
    leaf = fmt(name).encode(jnp.asarray(w), out=case.out)
    assert leaf.shape == case.shape
    dense = dense_of(leaf)
    assert dense.shape == case.shape
    assert np.isfinite(dense).all()
    bound = f64(leaf.error_bound()) if isinstance(leaf, Weight) else 0.0
    assert np.broadcast_shapes(np.shape(bound), case.shape) == case.shape
    assert (abs(w.astype(np.float64) - dense) <= bound).all()
    if case.shape[0] > 1:
        assert (dense[0] == 0).all()  # every format holds zero


@each_format
def test_a_bound_is_worth_something(name: str) -> None:
    """A bound as large as the matrix would let anything pass."""
    leaf = fmt(name).encode(jnp.asarray(matrix(GATE)), out=1)
    if isinstance(leaf, Weight):
        assert np.broadcast_to(f64(leaf.error_bound()), GATE.shape)[1:].max() < abs(matrix(GATE)).max() / 2


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12), st.sampled_from(FORMATS))
def test_dense_is_within_bound_for_any_numbers(numbers: list[float], name: str) -> None:
    w = np.array(numbers, np.float32).reshape(3, 4)
    leaf = fmt(name).encode(jnp.asarray(w), out=1)
    bound = f64(leaf.error_bound()) if isinstance(leaf, Weight) else 0.0
    assert (abs(w.astype(np.float64) - dense_of(leaf)) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_format
@pytest.mark.some_rows
def test_encodes_what_the_plan_has_cast(name: str, dtype: str) -> None:
    w = jnp.asarray(matrix(QUERY), dtype)
    leaf = fmt(name).encode(w, out=2)
    bound = f64(leaf.error_bound()) if isinstance(leaf, Weight) else 0.0
    assert (abs(f64(w) - dense_of(leaf)) <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=IDS)
@each_format
def test_the_abstract_form_is_what_encode_makes(name: str, case: Case) -> None:
    def encode(w: jax.Array) -> Any:
        return fmt(name).encode(w, out=case.out)

    w = jnp.asarray(matrix(case))
    planned, made = jax.eval_shape(encode, w), jax.jit(encode)(w)
    assert jax.tree.structure(planned) == jax.tree.structure(made)
    for p, m in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert (p.shape, p.dtype) == (m.shape, m.dtype)
        assert m.ndim > 0  # a scalar has no dim to stack or split
    assert planned.shape == case.shape  # known without an array


@pytest.mark.parametrize("case", CASES, ids=IDS)
@each_format
def test_every_array_has_a_name_for_each_dim(name: str, case: Case) -> None:
    leaf = jax.eval_shape(lambda w: fmt(name).encode(w, out=case.out), jnp.zeros(case.shape))
    axes = fmt(name).leaf_axes(case.axes, case.out)
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(leaf)
    for a, x in zip(jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(leaf), strict=True):
        assert len(a) == x.ndim
        assert all(n is None or n in case.axes for n in a)
        assert [n for n in case.axes if n in a] == [n for n in a if n is not None]  # in the matrix's own order


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.some_rows
def test_an_options_value_changes_no_promise(name: str) -> None:
    """The bound, the abstract form, the axes, a contraction and its gradient, and rows."""
    for case, scale in ((QUERY, 1.0), (ODD, 1.0), (GATE, 1e-42), (GATE, 1e38)):
        w = np.clip(matrix(case), -3, 3) * np.float32(scale)
        leaf = fmt(name).encode(jnp.asarray(w), out=case.out)
        assert leaf.shape == case.shape
        dense = dense_of(leaf)
        assert np.isfinite(dense).all()
        assert (abs(w.astype(np.float64) - dense) <= f64(leaf.error_bound())).all()
    leaf = fmt(name).encode(jnp.asarray(matrix(QUERY)), out=2)
    planned = jax.eval_shape(lambda w: fmt(name).encode(w, out=2), jnp.zeros(QUERY.shape))
    assert jax.tree.structure(planned) == jax.tree.structure(leaf)
    axes = fmt(name).leaf_axes(QUERY.axes, 2)
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(leaf)
    leaves = zip(jax.tree.leaves(planned), jax.tree.leaves(leaf), jax.tree.leaves(axes, is_leaf=is_axes), strict=True)
    assert all((p.shape, p.dtype, len(a)) == (m.shape, m.dtype, m.ndim) for p, m, a in leaves)
    x, dense = activations(QUERY, 6, "bfloat16"), dense_of(leaf)
    y, pull = jax.vjp(jax.jit(lambda x: contract(QUERY.spec, x, leaf)), x)
    assert_contracts(y, QUERY, x, dense)
    g = jnp.asarray(np.random.default_rng(2).normal(size=y.shape), "bfloat16")
    exact = np.einsum("btnh,nhd->btd", f64(g), dense)
    magnitude = np.einsum("btnh,nhd->btd", abs(f64(g)), abs(dense))
    u = roundoff("bfloat16")
    assert (abs(f64(pull(g)[0]) - exact) <= (u + (6 + 8) * U) * magnitude * (1 + u) + u * abs(exact)).all()
    leaf = fmt(name).encode(jnp.asarray(matrix(ODD)), out=1)
    found = take(leaf, jnp.array([3, 0]), jnp.float32)
    assert (abs(f64(found) - dense_of(leaf)[[3, 0]]) <= 4 * U * abs(dense_of(leaf)[[3, 0]])).all()


# --- contract -----------------------------------------------------------------------------------------------------

contract_jit = jax.jit(contract, static_argnums=0)
ROWS = (1, 2, 8, 64, base.FEW_ROWS, base.FEW_ROWS + 1)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@each_format
@pytest.mark.some_rows
def test_contract_for_every_number_of_rows(name: str, dtype: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(ODD)), out=1)
    for rows in ROWS:
        x = activations(ODD, rows, dtype)
        assert_contracts(contract_jit(ODD.spec, x, leaf), ODD, x, dense_of(leaf), err_msg=f"{rows} rows")


@pytest.mark.parametrize("case", [GATE, QUERY, OUTPUT, ONE], ids=["gate", "query", "output", "one"])
@each_format
@pytest.mark.some_rows
def test_contract_for_every_shape(name: str, case: Case) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(case)), out=case.out)
    for rows, dtype in ((1, "float32"), (6, "float32"), (65, "float32"), (1, "bfloat16"), (4, "bfloat16")):
        x = activations(case, rows, dtype)
        assert_contracts(contract_jit(case.spec, x, leaf), case, x, dense_of(leaf), err_msg=f"{rows} rows, {dtype}")


def test_the_rows_above_select_every_form() -> None:
    """The forms of base.einsum are told by what only they hold: columns a barrier, reduced a sum, plain neither."""

    def form(rows: int, dtype: str) -> str:
        x, w = activations(ODD, rows, dtype), jnp.zeros(ODD.shape, dtype)
        text = str(jax.make_jaxpr(lambda x, w: contract(ODD.spec, x, w))(x, w))
        return "columns" if "optimization_barrier" in text else "reduced" if "reduce_sum" in text else "plain"

    found = {(rows, dtype): form(rows, dtype) for rows in ROWS for dtype in DTYPES}
    for (rows, dtype), used in found.items():
        if dtype == "float32":
            assert used == ("columns" if 1 < rows <= base.FEW_ROWS else "plain")
        else:
            assert used == ("reduced" if rows == 1 else "plain")
    assert base.FEW_ROWS in ROWS
    assert base.FEW_ROWS + 1 in ROWS


@pytest.mark.parametrize("case", [GATE, QUERY, OUTPUT], ids=["gate", "query", "output"])
@pytest.mark.parametrize("rows", [1, 6])
@each_format
@pytest.mark.some_rows
def test_nothing_overflows_where_the_result_fits(name: str, case: Case, rows: int) -> None:
    """In float16, whose largest number is 65504: y is 12000 at most, sums of a format's codes may be far above."""
    w = np.ones(case.shape, np.float32)
    inputs = math.prod(case.shape[case.out :])
    leaf = fmt(name).encode(jnp.asarray(w), out=case.out)
    x = jnp.full(activations(case, rows, "float16").shape, 12000 / inputs, "float16")
    assert_contracts(contract(case.spec, x, leaf), case, x, dense_of(leaf))


@pytest.mark.parametrize("rows", [1, 8, 65])
@each_format
def test_the_gradient_of_the_activations_is_denses(name: str, rows: int) -> None:
    """d/dx sum(g * (x . W)) = g . W^T; over O outputs, the same rounding as contracting the other way."""
    leaf = fmt(name).encode(jnp.asarray(matrix(QUERY)), out=2)
    x = activations(QUERY, rows, "float32")
    g = jnp.asarray(np.random.default_rng(2).normal(size=(*x.shape[:2], 2, 3)), "float32")
    found = jax.grad(lambda x: (g * contract(QUERY.spec, x, leaf)).sum())(x)
    dense = dense_of(leaf)
    exact = np.einsum("btnh,nhd->btd", f64(g), dense)
    bound = (6 + 8) * U * np.einsum("btnh,nhd->btd", abs(f64(g)), abs(dense))
    assert (abs(f64(found) - exact) <= bound).all()


@each_format
def test_stacked_layers_scan(name: str) -> None:
    """Layers stand in stacks [L, ...]: a scan's slice of one is that layer's weight."""
    layers = [matrix(QUERY, seed) for seed in range(3)]
    leaves = [fmt(name).encode(jnp.asarray(w), out=2) for w in layers]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)
    for rows, dtype in ((1, "bfloat16"), (6, "float32")):
        x = activations(QUERY, rows, dtype)

        @jax.jit
        def run(x: jax.Array, stacked: Any) -> jax.Array:
            return jax.lax.scan(lambda x, w: (x, contract(QUERY.spec, x, w)), x, stacked)[1]

        for y, leaf in zip(run(x, stacked), leaves, strict=True):
            assert_contracts(y, QUERY, x, dense_of(leaf))


@each_format
def test_a_donated_weight_comes_back_whole(name: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(GATE)), out=1)
    dense, x = dense_of(leaf), activations(GATE, 6, "float32")
    step = jax.jit(lambda w, x: (w, contract(GATE.spec, x, w)), donate_argnums=0)
    new, y = step(leaf, x)
    assert all(a.is_deleted() for a in jax.tree.leaves(leaf))
    np.testing.assert_array_equal(dense_of(new), dense)
    assert_contracts(y, GATE, x, dense)


@each_format
def test_a_flax_param_holds_it(name: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(GATE)), out=1)
    x = activations(GATE, 6, "float32")

    class Layer(nnx.Module):
        def __init__(self, w: Any) -> None:
            self.w = nnx.Param(w)

    graphdef, state = nnx.split(Layer(leaf))

    @jax.jit
    def run(state: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = nnx.merge(graphdef, state)
        return contract(GATE.spec, x, layer.w), take(layer.w, jnp.array([2, 1]), jnp.float32)

    y, rows = run(state, x)
    assert_contracts(y, GATE, x, dense_of(leaf))
    np.testing.assert_array_equal(rows, jax.jit(lambda w: take(w, jnp.array([2, 1]), jnp.float32))(leaf))


@pytest.mark.parametrize("dtype", DTYPES)
@each_format
@pytest.mark.some_rows
def test_take_is_denses_rows(name: str, dtype: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(ODD)), out=1)
    dense = dense_of(leaf)
    for ids in (3, [6, 0, 6], [[1, 2, 3], [4, 5, 6]]):
        found = take(leaf, jnp.array(ids), jnp.dtype(dtype))
        exact = dense[np.array(ids)]
        assert (found.shape, found.dtype) == (exact.shape, jnp.dtype(dtype))
        assert (abs(f64(found) - exact) <= (roundoff(dtype) + 4 * U) * abs(exact)).all()


@each_format
@pytest.mark.some_rows
def test_take_from_a_matrix_of_more_dims(name: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(OUTPUT)), out=1)
    found = take(leaf, jnp.array([5, 1]), jnp.float32)
    exact = dense_of(leaf)[[5, 1]]
    assert (abs(f64(found) - exact) <= 4 * U * abs(exact)).all()


# --- split over devices -------------------------------------------------------------------------------------------

WIDE = Case((16, 512), ("mlp", "embed"), 1, "btd,fd->btf")
SPLITS = {"out": {"mlp": "tensor"}, "in": {"embed": "tensor"}, "both": {"mlp": "data", "embed": "tensor"}}


def every_split() -> list[Any]:
    """Each file split along one dim and along the other; every other value of its options, along both at once."""
    alone = [pytest.param(name, along, id=f"{name}-{along}") for name in FORMATS for along in ("out", "in")]
    both = [pytest.param(text, "both", id=f"{text}-both", marks=pytest.mark.thorough) for text in VARIANTS]
    return alone + both


@pytest.mark.parametrize(("text", "along"), every_split())
@pytest.mark.some_rows
def test_a_shard_each(text: str, along: str) -> None:
    """Encoded where its shards are: the same bits as whole, the codes in as many parts as there are, and the product's bound."""
    mesh, over = make_mesh("data=2,tensor=4"), SPLITS[along]
    rules = Rules([(axis, over.get(axis)) for axis in WIDE.axes])
    w = jnp.asarray(matrix(WIDE), "bfloat16")

    def encode(w: jax.Array) -> Any:
        return fmt(text).encode(w, out=1)

    whole = jax.jit(encode)(w)
    axes = jax.tree.leaves(fmt(text).leaf_axes(WIDE.axes, 1), is_leaf=lambda a: isinstance(a, tuple))
    leaves, tree = jax.tree.flatten(whole)
    places = [named_sharding(rules, mesh, a, shape=x.shape) for a, x in zip(axes, leaves, strict=True)]
    placed = jax.device_put(w, named_sharding(rules, mesh, WIDE.axes))
    made = jax.jit(encode, out_shardings=jax.tree.unflatten(tree, places))(placed)
    jax.tree.map(np.testing.assert_array_equal, made, whole)
    largest = max(jax.tree.leaves(made), key=lambda a: a.nbytes)
    parts = {axis: mesh.shape[name] for axis, name in over.items()}
    shard = largest.addressable_shards[0].data.shape
    assert [n // s for n, s in zip(largest.shape, shard, strict=True)] == [parts.get(a, 1) for a in WIDE.axes]
    x = activations(WIDE, 6, "float32")
    y = contract_jit(WIDE.spec, x, made)
    # partial sums of each shard, then of shards: as many additions
    assert_contracts(y, WIDE, x, dense_of(whole))


# --- beneath an adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [QUERY, OUTPUT], ids=["query", "output"])
@each_format
def test_an_adapter_over_it_has_denses_gradients(name: str, case: Case) -> None:
    """L = sum(g * (x . (W + s B A))): d/dx = g . (W + s B A), d/dA = s B^T g^T x, d/dB = s g^T x A^T, in float32.

    A number of each is a sum of products over at most two dims after each other, of n and m terms, each partial result
    rounded: within (n + m + 8) u of the same sum of magnitudes.
    """
    rank, scale, rng = 3, 0.5, np.random.default_rng(5)
    leaf, dense = fmt(name).encode(jnp.asarray(matrix(case)), out=case.out), None
    outs, ins = case.shape[: case.out], case.shape[case.out :]
    a, b = (jnp.asarray(rng.normal(size=s), "float32") for s in ((rank, *ins), (*outs, rank)))
    x = activations(case, 6, "float32")
    g = jnp.asarray(rng.normal(size=(*x.shape[:2], *outs)), "float32")

    @jax.jit
    def gradients(leaf: Any, x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
        def loss(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return (g * contract(case.spec, x, Lora(jax.lax.stop_gradient(leaf), a, b, scale))).sum()

        return jax.grad(loss, (0, 1, 2))(x, a, b)

    dense = dense_of(leaf).reshape(math.prod(outs), -1)
    O, I = dense.shape  # noqa: E741
    x_MI, g_MO, a_RI, b_OR = (f64(t).reshape(n, -1) for t, n in ((x, 6), (g, 6), (a, rank), (b, O)))
    found = [f64(t).reshape(n, -1) for t, n in zip(gradients(leaf, x, a, b), (6, rank, O), strict=True)]
    exact = [g_MO @ (dense + scale * b_OR @ a_RI), scale * b_OR.T @ g_MO.T @ x_MI, scale * g_MO.T @ x_MI @ a_RI.T]
    p, q, r, t, w = (abs(m) for m in (x_MI, g_MO, a_RI, b_OR, dense))
    reach = [q @ (w + scale * t @ r), scale * t.T @ q.T @ p, scale * q.T @ p @ r.T]
    for what, d, e, m, n in zip("xab", found, exact, reach, (O + rank, O + 6, 6 + I), strict=True):
        assert (abs(d - e) <= (n + 8) * U * m).all(), what


# --- in a model ---------------------------------------------------------------------------------------------------

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
TEXTS = [name for name in FORMATS if name != "dense"]


def sevens(texts: list[str], *marks: Any) -> list[Any]:
    groups = [texts[i : i + len(MATRICES)] for i in range(0, len(texts), len(MATRICES))]
    return [pytest.param(group, id=f"{group[0]}-to-{group[-1]}", marks=marks) for group in groups]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three like layers in bfloat16; its numbers have six exponents, which all formats hold."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    raw = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    arch = architecture(raw)
    tensors = {
        name: (rng.choice([-1, 1], shape) * rng.uniform(0.02, 0.3, shape)).astype(ml_dtypes.bfloat16)
        for name, shape in arch.name_table().theirs(arch.params(), arch.num_layers).items()
    }
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(folder / "model.safetensors", described, lambda n: tensors[n], {"format": "pt"})
    return folder


@pytest.mark.parametrize("texts", [*sevens(TEXTS), *sevens(VARIANTS, pytest.mark.thorough)])
@pytest.mark.some_rows
def test_banks_in_every_home_and_orbax_hold_it(texts: list[str], small: Path, tmp_path: Path) -> None:
    """A format for each of a layer's matrices, and the first one for the embedding: the same bits in stacks on the device, in
    host memory and on disk, as in orbax and out of it; and the same logits from programs of one form."""
    chosen = dict(zip(MATRICES, texts, strict=False))
    rules = {f"layers.*.{name}": text for name, text in chosen.items()} | {"embedding": texts[0]}

    def load(folder: Path, **given: Any) -> jaxengine.Model:
        return jaxengine.load(folder, weight_rules=None if folder != small else rules, **given)

    def same(one: jaxengine.Model, other: jaxengine.Model) -> None:
        a, b = (stored(m.architecture, m.plan, m.params) for m in (one, other))
        assert a.keys() == b.keys()
        for name, get in a.items():
            held, again = get(), b[name]()
            assert jax.tree.structure(held) == jax.tree.structure(again), name
            for x, y in zip(jax.tree.leaves(held), jax.tree.leaves(again), strict=True):
                assert x.dtype == y.dtype, name
                np.testing.assert_array_equal(bits(x), bits(y), err_msg=name)

    device = load(small, form="scan")
    specs = device.architecture.specs()
    for name, text in chosen.items():
        assert device.plan.format_of(f"layers.1.{name}", specs[f"layers.1.{name}"]) == text
    assert [part.repeats for part in device.plan.parts(device.architecture)] == [3]  # one bank of three
    host, disk = load(small, home="host", form="scan"), load(small, home="disk", disk=tmp_path / "layers")
    same(device, host)
    same(device, disk)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    np.testing.assert_array_equal(device.logits(ids), host.logits(ids))
    assert np.isfinite(np.asarray(disk.logits(ids), np.float32)).all()
    device.save(tmp_path / "orbax", format="orbax")
    again = load(tmp_path / "orbax", form="scan")
    assert again.plan == device.plan
    same(device, again)
    np.testing.assert_array_equal(device.logits(ids), again.logits(ids))


def bits(array: Any) -> np.ndarray:
    """The bytes of each number: NaN is itself, and -0.0 is not 0.0."""
    found = np.asarray(jax.device_get(array))
    return found.view(f"u{found.dtype.itemsize}")


# --- one format's own arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GATE, QUERY, OUTPUT, ODD], ids=["gate", "query", "output", "odd"])
def test_int8_is_the_float64_quantisers(case: Case) -> None:
    w = matrix(case, seed=3) * np.exp(
        np.random.default_rng(4).normal(size=(case.shape[0],) + (1,) * (len(case.shape) - 1))
    )
    w = w.astype(np.float32)
    leaf = fmt("int8").encode(jnp.asarray(w), out=case.out)
    wanted = symmetric(w, tuple(range(case.out, w.ndim)))
    decided = wanted.slack > tie_width()
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(f64(leaf.codes)[decided], wanted.codes[decided])
    assert abs(f64(leaf.codes)).max() == 127
    scale = f64(leaf.scale).reshape(wanted.scale.shape)
    used = abs(wanted.codes).max(axis=tuple(range(case.out, w.ndim)), keepdims=True) > 0
    np.testing.assert_allclose(scale[used], wanted.scale[used], rtol=4 * U, atol=0)


def test_int8_takes_a_quarter_of_float32() -> None:
    leaf = jax.eval_shape(lambda w: fmt("int8").encode(w, out=1), jnp.zeros((64, 256)))
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf)) == 64 * 256 + 64 * 4


def test_dense_keeps_the_array_and_its_dtype() -> None:
    w = jnp.asarray(matrix(GATE), jnp.bfloat16)
    assert fmt("dense").encode(w, out=1) is w


# --- specs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("btd,fd->btf", ("bt", "d", "f")),
        ("btd, nhd -> btnh", ("bt", "d", "nh")),
        ("btnh,dnh->btd", ("bt", "nh", "d")),
        ("d,fd->f", ("", "d", "f")),
    ],
)
def test_split_spec(spec: str, parts: tuple[str, str, str]) -> None:
    assert split_spec(spec) == parts


@pytest.mark.parametrize(
    "spec",
    [
        "btd,df->btf",  # [in, out]
        "btd,fd->bft",  # the result in another order
        "btnh,dhn->btd",  # in dims in another order
        "btd,nhd->bthn",
        "dbt,fd->btf",  # in dims first
        "btd,fd->bt",  # a sum over the outputs
        "btd,f->btdf",  # nothing contracted
        "btd,d->bt",  # no outputs
        "btd,bfd->btf",  # a batch of matrices
        "btd,fd",
        "btd->btd",
        "",
    ],
)
def test_split_spec_refuses_another_form(spec: str) -> None:
    with pytest.raises(ValueError, match="contracted as") as error:
        split_spec(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_contract_refuses_another_form(name: str) -> None:
    leaf = fmt(name).encode(jnp.asarray(matrix(GATE)), out=1)
    with pytest.raises(ValueError, match="contracted as"):
        contract("btd,df->btf", activations(GATE, 2, "float32"), leaf)
