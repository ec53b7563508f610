"""Cross-entropy in chunks against numpy in float64: values, gradients, and what is made on the way.

A logit is a sum of D products and a gradient one of V, each at most u = 2^-24 of its terms off: bounds are 8 sqrt(n) u of the
largest value, n the longer of the two. Where the head computes in bfloat16, logits have 2^-9 of their size instead.

B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampled import shapes_in

from jaxengine.finetune.loss import cross_entropy

B, T, D, V = 2, 11, 24, 67
U = 2.0**-24
BOUND = 8 * V**0.5 * U
SCALE = 0.37  # what the loss is multiplied by afterwards: gradients are made before it is known


def given() -> tuple[np.ndarray, ...]:
    """W, x, targets, weights; some targets do not count."""
    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(V, D)).astype(np.float32), rng.normal(size=(B, T, D)).astype(np.float32)
    weights = (rng.random((B, T)) > 0.3).astype(np.float32) * rng.integers(1, 3, (B, T)).astype(np.float32)
    return W, x, rng.integers(0, V, (B, T)).astype(np.int32), weights


def oracle(W: np.ndarray, x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[float, Any, Any]:
    """(loss, its gradient for W and for x), float64."""
    W, x = W.astype(np.float64), x.astype(np.float64)
    z = np.einsum("btd,vd->btv", x, W)
    log_sum = np.log(np.exp(z).sum(-1))
    loss = (weights * (log_sum - np.take_along_axis(z, targets[..., None], -1)[..., 0])).sum()
    g = (np.exp(z - log_sum[..., None]) - np.eye(V)[targets]) * weights[..., None]
    return SCALE * loss, SCALE * np.einsum("btv,btd->vd", g, x), SCALE * np.einsum("btv,vd->btd", g, W)


def ours(chunk: int, *, trained: bool, dtype: Any = jnp.float32) -> Any:
    """A function of (W, x): the same loss, W trained or frozen."""
    targets, weights = map(jnp.asarray, given()[2:])

    def loss(W: Any, x: Any) -> Any:
        def head(of: Any, x: Any) -> Any:
            w = of["w"] if trained else W
            return jnp.einsum("btd,vd->btv", x.astype(dtype), w.astype(dtype)).astype(jnp.float32)

        return SCALE * cross_entropy(head, {"w": W} if trained else (), x, targets, weights, chunk=chunk)

    return loss


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients(chunk: int, trained: bool) -> None:
    """Chunks that do and do not divide the row; one token, and all."""
    W, x, targets, weights = given()
    wanted = oracle(W, x, targets, weights)
    args = (0, 1) if trained else (1,)
    value, found = jax.jit(jax.value_and_grad(ours(chunk, trained=trained), args))(W, x)
    np.testing.assert_allclose(value, wanted[0], rtol=BOUND)
    for g, w in zip(found, [wanted[1 + i] for i in args], strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_allclose(g, w, atol=BOUND * np.abs(w).max(), rtol=0)


def test_a_heads_gradient_is_added_in_float32() -> None:
    """In bfloat16 the sum over eleven chunks would be off by as much as the products are, eleven times; and it is float32."""
    W, x, targets, weights = given()
    wanted = oracle(W, x, targets, weights)[1]
    found = jax.jit(jax.grad(ours(1, trained=True, dtype=jnp.bfloat16)))(W, x)
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 4 * 2.0**-9 * np.abs(wanted).max()
    assert (np.asarray(found.astype(jnp.bfloat16), np.float32) != np.asarray(found)).mean() > 0.5


def products(jaxpr: Any) -> int:
    """Matrix products in a program's text, loops included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "dot_general"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                found += products(inner)
    return found


@pytest.mark.parametrize(("trained", "count"), [(False, 2), (True, 3)])
def test_logits_are_made_once_and_never_all_of_them(trained: bool, count: int) -> None:
    """Two products where the head is frozen: logits, and the gradient of x; a third for the head's own."""
    W, x, *_ = given()
    made = jax.make_jaxpr(jax.value_and_grad(ours(4, trained=trained), (0, 1) if trained else (1,)))(W, x)
    assert products(made.jaxpr) == count
    shapes = shapes_in(made.jaxpr)
    assert (B, 4, V) in shapes
    assert not {s for s in shapes if V in s and s not in ((B, 4, V), (V, D), (V,)) and np.prod(s) >= B * T * V}
