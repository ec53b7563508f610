"""Attention by positions against float64 loops, and what a mask never passed has to mean.

Tolerances are the oracle's own: running error analysis, elementwise, in the dtype of the inputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attention as oracle

from pallas_kernels.attention import attention

attention_jit = jax.jit(attention, static_argnames=("scale", "window", "softcap"))


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array


def inputs(B: int, T: int, S: int, N: int, K: int, H: int = 4, *, dtype: str = "float32", seed: int = 0) -> Inputs:
    """Large enough that the softmax is neither flat nor one-hot, and that a soft-cap of 2 bends the scores."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, K, S, H), (B, K, S, H))
    return Inputs(*(jnp.asarray(1.5 * rng.normal(size=shape), dtype) for shape in shapes))


def check(given: Inputs, q_positions: Any, k_positions: Any, *, scale: float = 0.5, **how: Any) -> np.ndarray:
    """The result, held against the oracle wherever a query sees something, and finite everywhere."""
    at = [np.asarray(p, np.int32) for p in (q_positions, k_positions)]
    found = attention_jit(*given, *map(jnp.asarray, at), scale=scale, **how)
    assert (found.shape, found.dtype) == (given.q.shape, given.q.dtype)
    wide = np.asarray(found).astype(np.float64)
    assert np.isfinite(wide).all()
    arrays = (np.asarray(x).astype(np.float64) for x in given)
    wanted = oracle.attention(*arrays, *at, scale=scale, dtype=np.asarray(found).dtype, **how)
    defined = ~np.isnan(wanted.out)
    assert (abs(wide - wanted.out)[defined] <= wanted.bound[defined]).all()
    return wide


def rows(*lengths: int, width: int) -> np.ndarray:
    """0, 1, ... to each length, then -1."""
    at = np.arange(width)[None, :]
    return np.where(at < np.array(lengths)[:, None], at, -1)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prefill_of_ragged_rows(window: int | None, softcap: float | None) -> None:
    at = rows(6, 2, width=6)
    check(inputs(2, 6, 6, 4, 2), at, at, window=window, softcap=softcap)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 3), (3, 1), (6, 2), (8, 1), (16, 2)])
def test_query_heads_share_key_heads(N: int, K: int) -> None:
    at = rows(4, 3, width=4)
    check(inputs(2, 4, 4, N, K), at, at)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 2.0)])
def test_sixteen_bits(dtype: str, window: int | None, softcap: float | None) -> None:
    at = rows(6, 4, width=6)
    check(inputs(2, 6, 6, 4, 2, H=8, dtype=dtype), at, at, window=window, softcap=softcap)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("T", [1, 3])
def test_sixteen_bits_for_every_shape_of_group(T: int, K: int) -> None:
    """XLA:CPU refuses some batched bfloat16 dots at run time, by which dims are of size one."""
    for B, G in ((1, 1), (1, 3), (2, 1), (2, 3)):
        at = np.broadcast_to(np.arange(5), (B, 5))
        check(inputs(B, T, 5, K * G, K, dtype="bfloat16"), at[:, 5 - T :], at)


def test_sixteen_bits_are_accumulated_in_32() -> None:
    """1024 keys of equal score: each weight is 2^-10, exact, and a sum of them kept in bfloat16 would stick at 1/4."""
    k, v = (jnp.full((1, 1, 1024, 4), x, jnp.bfloat16) for x in (0, 1))
    found = check(Inputs(jnp.ones((1, 1, 2, 4), jnp.bfloat16), k, v), [[1023]], [range(1024)])
    assert (found == 1).all()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_decode_over_slots_in_any_order(window: int | None) -> None:
    """A ring: five slots of which the first row's hold positions 5..9 turned about, the second's 0..2 and two nothing."""
    slots = [[5, 6, 7, 8, 9], [0, 1, 2, -1, -1], [-1, 0, -1, -1, -1]]
    given = inputs(3, 1, 5, 4, 2)
    at = [[9], [2], [0]]
    found = check(given, at, slots, window=window)
    order = np.array([3, 0, 4, 2, 1])
    turned = Inputs(given.q, given.k[:, :, order], given.v[:, :, order])
    again = check(turned, at, np.array(slots)[:, order], window=window)
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-5)


def test_several_queries_over_old_slots_and_new() -> None:
    """What a cache that cannot hold all hands over: a ring's slots, then the new tokens, some of them padding."""
    q_positions = [[7, 8, 9], [3, 4, -1]]
    slots = [[4, 5, 6, 3], [0, 1, 2, -1]]
    check(inputs(2, 3, 7, 4, 2), q_positions, np.concatenate([slots, q_positions], axis=1), window=4)


def test_what_is_not_seen_changes_no_bit() -> None:
    """Empty slots, later tokens and tokens outside the window: whatever finite numbers stand there."""
    given = inputs(1, 2, 6, 4, 2)
    q_positions, k_positions = np.array([[4, 5]]), np.array([[5, 4, 3, -1, 1, 6]])
    found = check(given, q_positions, k_positions, window=3)
    unseen = np.array([False, False, False, True, True, True])[None, None, :, None]
    other = Inputs(given.q, jnp.where(unseen, 1e4, given.k), jnp.where(unseen, -3e4, given.v))
    np.testing.assert_array_equal(check(other, q_positions, k_positions, window=3), found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_query_that_sees_nothing_stays_finite(dtype: str) -> None:
    """Padding, an empty cache, keys that are all later, or all outside the window; and its gradient."""
    given = inputs(2, 2, 4, 4, 2, dtype=dtype)
    q_positions = jnp.array([[-1, 3], [5, -1]])
    k_positions = jnp.array([[-1, -1, -1, -1], [0, 1, 6, -1]])

    def total(given: Inputs) -> jax.Array:
        out = attention(*given, q_positions, k_positions, scale=0.5, window=2, softcap=2.0)
        return out.astype(jnp.float32).sum()

    check(given, q_positions, k_positions, window=2, softcap=2.0)
    for g in jax.jit(jax.grad(total))(given):
        assert np.isfinite(np.asarray(g, np.float64)).all()


def test_large_scores_do_not_overflow() -> None:
    given = inputs(1, 3, 3, 2, 1)
    check(Inputs(given.q * 100, given.k * 100, given.v), rows(3, width=3), rows(3, width=3))


def test_padding_has_no_part_in_the_gradient() -> None:
    """A loss over the real queries only: nothing flows to keys and values of padding, and all that does is finite."""
    at = jnp.asarray(rows(3, 1, width=4))
    given = inputs(2, 4, 4, 4, 2)

    def total(given: Inputs) -> jax.Array:
        out = attention(*given, at, at, scale=0.5)
        return jnp.where((at >= 0)[:, :, None, None], out, 0.0).sum()

    g = jax.jit(jax.grad(total))(given)
    assert all(np.isfinite(x).all() for x in g)
    for x in (g.k, g.v):
        padding = np.asarray(x).swapaxes(1, 2)[np.asarray(at) < 0]
        assert (padding == 0).all()
    assert (np.asarray(g.v).swapaxes(1, 2)[np.asarray(at) >= 0] != 0).all()


positions = functools.partial(st.lists, st.integers(-1, 7))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    q_positions=st.tuples(positions(min_size=3, max_size=3), positions(min_size=3, max_size=3)),
    k_positions=st.tuples(positions(min_size=5, max_size=5), positions(min_size=5, max_size=5)),
    window=st.sampled_from([None, 1, 4]),
    softcap=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 9),
)
def test_any_positions(
    q_positions: Any, k_positions: Any, window: int | None, softcap: float | None, seed: int
) -> None:
    check(inputs(2, 3, 5, 4, 2, seed=seed), q_positions, k_positions, window=window, softcap=softcap)
