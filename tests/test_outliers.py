"""Columns kept in full precision beside int8, against numpy float64.

tests/test_weights.py holds the option to what every format promises.

I inputs, O outputs, N columns kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN
from oracles.quantisation import symmetric, tie_width

import jaxengine
from jaxengine import formats, placement
from jaxengine.weights.base import contract, take
from sharding.mesh import make_mesh
from sharding.rules import Rules, named_sharding

U = 2.0**-24
COLUMNS = [3, 40, 41, 77, 100, 180, 181, 190]
contract_jit = jax.jit(contract, static_argnums=0)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def spoilt(rows: int = 6, inputs: int = 200, seed: int = 0) -> np.ndarray:
    """Normal numbers, and COLUMNS a hundred times as large; another two times, which are not to be kept."""
    w = np.random.default_rng(seed).normal(size=(rows, inputs))
    w[:, COLUMNS] += np.sign(w[:, COLUMNS])
    w[:, COLUMNS] *= 100
    w[:, 11] *= 2
    return w.astype(np.float32)


def encode(text: str, w: Any, out: int = 1) -> Any:
    return jax.jit(lambda w: formats.find(text).encode(w, out=out))(jnp.asarray(w))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_columns_are_as_they_were_and_the_others_as_without_them(dtype: str) -> None:
    w = jnp.asarray(spoilt(), dtype)
    leaf = encode("int8:outliers=8", w)
    np.testing.assert_array_equal(leaf.index, COLUMNS)
    assert leaf.columns.dtype == w.dtype
    dense, rest = f64(leaf.dense()), f64(w)
    np.testing.assert_array_equal(dense[:, COLUMNS], rest[:, COLUMNS])
    rest[:, COLUMNS] = 0
    wanted = symmetric(rest, (1,))
    decided = wanted.slack > tie_width()
    decided[:, COLUMNS] = True
    np.testing.assert_array_equal(f64(leaf.rest.codes)[decided], wanted.codes[decided])
    error = lambda text: np.square(f64(encode(text, w).dense()) - f64(w)).mean()  # noqa: E731
    # 190 normal numbers' largest is about 3, of the columns' 400
    assert error("int8:outliers=8") < error("int8") / 1000
    assert error("int8:outliers=8,group_size=32") < error("int8:group_size=32") / 100
    bound = np.broadcast_to(f64(leaf.error_bound()), w.shape)
    assert not bound[:, COLUMNS].any()
    assert (abs(dense - f64(w)) <= bound).all()


@pytest.mark.parametrize("text", ["int8:outliers=8", "int8:outliers=8,group_size=64"])
def test_contract_and_take(text: str) -> None:
    w = spoilt(4 * 6).reshape(4, 6, 8, 25)
    leaf = encode(text, w, out=2)
    dense = f64(leaf.dense())
    for rows, dtype in ((1, "bfloat16"), (9, "float32")):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 1, 8, 25)), dtype)
        y, pull = jax.vjp(jax.jit(lambda x: contract("btij,nhij->btnh", x, leaf)), x)
        u = float(jnp.finfo(dtype).eps) / 2
        reach = np.einsum("btij,nhij->btnh", abs(f64(x)), abs(dense))
        assert (abs(f64(y) - np.einsum("btij,nhij->btnh", f64(x), dense)) <= (2 * u + 220 * U) * reach).all()
        g = jnp.asarray(np.random.default_rng(2).normal(size=y.shape), dtype)
        reach = np.einsum("btnh,nhij->btij", abs(f64(g)), abs(dense))
        error = abs(f64(pull(g)[0]) - np.einsum("btnh,nhij->btij", f64(g), dense))
        assert (error <= (2 * u + 40 * U) * reach).all()
    found = take(leaf, jnp.array([[3, 0], [3, 1]]), jnp.float32)
    np.testing.assert_allclose(f64(found), dense[[[3, 0], [3, 1]]], rtol=2 * U, atol=0)


def test_a_stack_is_dense_too() -> None:
    """Each layer has columns of its own."""
    layers = [encode("int8:outliers=8", np.roll(spoilt(seed=s), s, 1).reshape(6, 8, 25)) for s in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    assert stacked.shape == (2, 6, 8, 25)
    np.testing.assert_array_equal(stacked.dense(), np.stack([np.asarray(leaf.dense()) for leaf in layers]))
    np.testing.assert_array_equal(stacked.error_bound(), np.stack([np.asarray(leaf.error_bound()) for leaf in layers]))


@pytest.mark.parametrize(("split", "parts"), [("mlp", (4, 1)), ("embed", (1, 4))])
def test_split_over_a_mesh_along_either_dim(split: str, parts: tuple[int, int]) -> None:
    fmt, w, mesh = formats.find("int8:outliers=8"), spoilt(8, 512), make_mesh("data=2,tensor=4")
    rules = Rules([("mlp", "tensor" if split == "mlp" else None), ("embed", "tensor" if split == "embed" else None)])
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    places = jax.tree.map(lambda a: named_sharding(rules, mesh, a), fmt.leaf_axes(("mlp", "embed"), 1), is_leaf=is_axes)
    leaf = jax.jit(lambda w: fmt.encode(w, out=1), out_shardings=places)(jnp.asarray(w))
    shard = leaf.rest.codes.addressable_shards[0].data.shape
    assert (8 // shard[0], 512 // shard[1]) == parts
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 512)), jnp.float32)
    dense = f64(leaf.dense())
    reach = np.einsum("btd,fd->btf", abs(f64(x)), abs(dense))
    error = abs(f64(contract_jit("btd,fd->btf", x, leaf)) - np.einsum("btd,fd->btf", f64(x), dense))
    assert (error <= 530 * U * reach).all()


@pytest.mark.parametrize(("inputs", "kept"), [(1024, 64), (200, 25), (8, 1), (1, 1)])
def test_bytes(inputs: int, kept: int) -> None:
    """At most an eighth of the columns is kept, and a code stays for each."""
    leaf = jax.eval_shape(
        lambda w: formats.find("int8:outliers=64").encode(w, out=1), jax.ShapeDtypeStruct((32, inputs), jnp.bfloat16)
    )
    stored = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    assert stored == 32 * (inputs + 4) + kept * (32 * 2 + 4)


def test_a_model_is_saved_and_read_back(tmp_path: Any) -> None:
    model = jaxengine.load(GOLDEN / "llama", weights="int8:outliers=8", home="host")
    model.save(tmp_path / "saved", format="orbax")
    again = jaxengine.load(tmp_path / "saved")
    assert again.plan.weights == "int8:outliers=8"
    of = lambda m: placement.stored(m.architecture, m.plan, m.params)  # noqa: E731
    for one, two in zip(of(model).values(), of(again).values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one(), two())
