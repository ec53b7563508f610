"""Attention by positions against float64, forward and gradients, and what a mask never passed has to mean.

Forward, `tests/oracles/attention.py` is loops over rows, queries and heads. Gradients, and what that oracle does not know (sinks,
segments, the log-sum-exp), come from `differentiated` below: a matrix of scores for each row and head in float64 and the chain
rule, held against the loops where they overlap and against central differences.

Tolerances are derived, elementwise, from the dtype of the inputs (unit roundoff u; 2^-9 in bfloat16, 2^-12 in float16, 2^-24
in float32) and from float32's U = 2^-24, in which all is accumulated. A function (exp, tanh, log) may be off by F = 8 U.
Inputs are exact. To first order, with 2 % for what is of second order:

    scores    e_x = (H + 3) U scale |q|.|k|, and under a cap c  e_x + 3 U |x| + (F + 3 U) c
    lse       e_l = max e_x + U range(x) + F + (S + 2) U + J (F + 2 U) + (F + 2 U) (1 + |lse|)
    weights   r = e_x + e_l + U (|x| + |lse|) + F, relative; they are rounded to u before they meet v or do
    out       sum w (r + u + (S + 1) U) |v|, and rounded to u
    dv        sum w (r + u + (N T + 2) U) |do|, and u
    dp        (H + 2) U |do|.|v|, and u: the gradient of the form for few queries rounds it
    delta     |do|.e_out + H U |do|.|out| + sum w (e_dp + r |dp|)      (blocks sum do.out, the others sum w dp)
    dx        w (e_dp + e_delta + r |dp - delta|) + 2 U |dx|, times the cap's slope, 3 (F + e_x / c) off; and u
    dq, dk    scale sum (e_dx + (S or N T + 2) U |dx|) times |k| or |q|, and u
    dsink     sum w_0 (e_delta + (r + B T U) |delta|), and u

The reference is float32 throughout: what it has between its inputs and its results is off by U where that table says u. J is
the number of blocks that a row is summed over: each may scale what was summed before. Numbers below the least normal
one of the dtype may be flushed. Results must not depend on how many tokens are read at a time but for these bounds.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import attention as oracle

from pallas_kernels import aot, dispatch
from pallas_kernels.attention import attention, cudnn, reference, xla

attention_jit = jax.jit(attention, static_argnames=("scale", "window", "softcap"))
blocks_jit = jax.jit(xla.attention, static_argnames=("scale", "window", "softcap", "at_once"))
U, F = oracle.U, oracle.FUNCTION
NEVER = float(np.float32(-1e30))


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array


def inputs(B: int, T: int, S: int, N: int, K: int, H: int = 4, *, dtype: str = "float32", seed: int = 0) -> Inputs:
    """Large enough that the softmax is neither flat nor one-hot, and that a soft-cap of 2 bends the scores."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, K, S, H), (B, K, S, H))
    return Inputs(*(jnp.asarray(1.5 * rng.normal(size=shape), dtype) for shape in shapes))


def check(
    given: Inputs, q_positions: Any, k_positions: Any, *, scale: float = 0.5, small: bool = True, **how: Any
) -> np.ndarray:
    """The result, held against the oracle wherever a query sees something, zeros elsewhere, and finite everywhere.

    small: that of several blocks of each kind too.
    """
    at = [np.asarray(p, np.int32) for p in (q_positions, k_positions)]
    arrays = [np.asarray(x).astype(np.float64) for x in given]
    S, results = given.k.shape[2], []
    for blocks in (None, *([xla.Blocks(2, 3)] * small)):
        if blocks is None:
            found = attention_jit(*given, *map(jnp.asarray, at), scale=scale, **how)
        else:
            found = blocks_jit(*given, *map(jnp.asarray, at), scale=scale, at_once=blocks, **how)
        assert (found.shape, found.dtype) == (given.q.shape, given.q.dtype)
        wide = np.asarray(found).astype(np.float64)
        assert np.isfinite(wide).all()
        # scaling what was summed before is two exponentials and four roundings more for each block of keys
        summed = S if blocks is None else S + -(-S // blocks.keys) * round((2 * F + 4 * U) / U)
        wanted = oracle.attention(*arrays, *at, scale=scale, dtype=np.asarray(found).dtype, summed=summed, **how)
        defined = ~np.isnan(wanted.out)
        assert (abs(wide - wanted.out)[defined] <= wanted.bound[defined]).all()
        assert (wide[~defined] == 0).all()
        results.append(wide)
    return results[0]


def rows(*lengths: int, width: int) -> np.ndarray:
    """0, 1, ... to each length, then -1."""
    at = np.arange(width)[None, :]
    return np.where(at < np.array(lengths)[:, None], at, -1)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prefill_of_ragged_rows(window: int | None, softcap: float | None) -> None:
    at = rows(6, 2, width=6)
    check(inputs(2, 6, 6, 4, 2), at, at, small=window == 3 and softcap is None, window=window, softcap=softcap)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 3), (3, 1), (6, 2), (8, 1), (16, 2)])
def test_query_heads_share_key_heads(N: int, K: int) -> None:
    at = rows(4, 3, width=4)
    check(inputs(2, 4, 4, N, K), at, at, small=False)


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
        check(inputs(B, T, 5, K * G, K, dtype="bfloat16"), at[:, 5 - T :], at, small=False)


def test_sixteen_bits_are_accumulated_in_32() -> None:
    """1024 keys of equal score: each weight is 2^-10, exact, and a sum of them kept in bfloat16 would stick at 1/4."""
    k, v = (jnp.full((1, 1, 1024, 4), x, jnp.bfloat16) for x in (0, 1))
    found = check(Inputs(jnp.ones((1, 1, 2, 4), jnp.bfloat16), k, v), [[1023]], [range(1024)])
    assert (found == 1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_rounds_nothing_but_its_result(dtype: str) -> None:
    """Of 16 bits it gives, bit for bit, what it gives of the same numbers in float32, rounded; keys in another dtype too."""
    given, at = inputs(2, 6, 6, 4, 2, H=8, dtype=dtype), jnp.asarray(rows(6, 4, width=6))
    wide = Inputs(*(x.astype(jnp.float32) for x in given))
    call = functools.partial(reference.attention, scale=0.5, window=4, softcap=2.0, return_lse=True)
    found, wanted = call(*given, at, at), call(*wide, at, at)
    np.testing.assert_array_equal(found[0], wanted[0].astype(dtype))
    np.testing.assert_array_equal(found[1], wanted[1])
    mixed = call(wide.q, given.k, given.v, at, at)[0]
    np.testing.assert_array_equal(mixed, wanted[0])


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


@pytest.mark.parametrize("blocks", [None, xla.Blocks(1, 2), xla.Blocks(2, 4)])
def test_what_is_not_seen_changes_no_bit(blocks: xla.Blocks | None) -> None:
    """Empty slots, later tokens and tokens outside the window: whatever finite numbers stand there."""
    given = inputs(1, 2, 6, 4, 2)
    q_positions, k_positions = np.array([[4, 5]]), np.array([[5, 4, 3, -1, 1, 6]])
    unseen = np.array([False, False, False, True, True, True])[None, None, :, None]
    other = Inputs(given.q, jnp.where(unseen, 1e4, given.k), jnp.where(unseen, -3e4, given.v))
    at, how = (jnp.asarray(q_positions), jnp.asarray(k_positions)), {"scale": 0.5, "window": 3}
    call = (
        functools.partial(attention_jit, **how)
        if blocks is None
        else functools.partial(blocks_jit, at_once=blocks, **how)
    )
    np.testing.assert_array_equal(call(*other, *at), call(*given, *at))
    check(other, q_positions, k_positions, window=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_query_that_sees_nothing_stays_finite(dtype: str) -> None:
    """Padding, an empty cache, keys that are all later, or all outside the window; and its gradient."""
    given = inputs(2, 2, 4, 4, 2, dtype=dtype)
    q_positions = jnp.array([[-1, 3], [5, -1]])
    k_positions = jnp.array([[-1, -1, -1, -1], [0, 1, 6, -1]])

    def total(given: Inputs, implementation: str) -> jax.Array:
        out = attention(
            *given, q_positions, k_positions, scale=0.5, window=2, softcap=2.0, implementation=implementation
        )
        return out.astype(jnp.float32).sum()

    check(given, q_positions, k_positions, window=2, softcap=2.0)
    for implementation in ("reference", "few", "xla"):
        for g in jax.jit(jax.grad(total), static_argnums=1)(given, implementation):
            assert (np.asarray(g, np.float64) == 0).all()


def test_large_scores_do_not_overflow() -> None:
    given = inputs(1, 3, 3, 2, 1)
    check(Inputs(given.q * 100, given.k * 100, given.v), rows(3, width=3), rows(3, width=3))


@pytest.mark.parametrize("implementation", ["reference", "few", "xla"])
def test_padding_has_no_part_in_the_gradient(implementation: str) -> None:
    """A loss over the real queries only: nothing flows to keys and values of padding, and all that does is finite."""
    at = jnp.asarray(rows(3, 1, width=4))
    given = inputs(2, 4, 4, 4, 2)

    def total(given: Inputs) -> jax.Array:
        out = attention(*given, at, at, scale=0.5, implementation=implementation)
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


# -- gradients, sinks, segments, log-sum-exp


class Case(NamedTuple):
    """All that a call is given, in numpy, with what comes back from its results (dout, dlse)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_at: np.ndarray
    k_at: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    sinks: np.ndarray | None = None
    q_of: np.ndarray | None = None
    k_of: np.ndarray | None = None


def case(
    B: int, T: int, S: int, N: int, K: int, H: int, q_at: Any, k_at: Any, *, dtype: str = "float32", seed: int = 0,
    sinks: bool = False, segments: tuple[Any, Any] | None = None,
) -> Case:  # fmt: skip
    """Drawn as `inputs` draws; scores have a spread of about 2 under a scale of 1 / sqrt(H)."""
    rng = np.random.default_rng(seed)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)

    def normal(*shape: int) -> np.ndarray:
        return (1.5 * rng.normal(size=shape)).astype(kind)

    q, k, v, dout = normal(B, T, N, H), normal(B, K, S, H), normal(B, K, S, H), normal(B, T, N, H)
    dlse = rng.normal(size=(B, T, N)).astype(np.float32)
    at = (np.broadcast_to(np.asarray(x, np.int32), (B, n)) for x, n in ((q_at, T), (k_at, S)))
    of = (None, None) if segments is None else tuple(np.asarray(x, np.int32) for x in segments)
    return Case(q, k, v, *at, dout, dlse, rng.normal(size=N).astype(np.float32) if sinks else None, *of)


Bounded = dict[str, tuple[np.ndarray, np.ndarray]]


def differentiated(
    x: Case, *, scale: float, window: int | None = None, softcap: float | None = None, blocks: int = 1,
    between: float | None = None,
) -> Bounded:  # fmt: skip
    """Name -> (value in float64, how far an implementation may be from it): see the head of this file.

    between: what weights, dp and dx are rounded to; None: the inputs' dtype.
    """
    (B, T, N, H), (K, S) = x.q.shape, x.k.shape[1:3]
    info, G = ml_dtypes.finfo(x.q.dtype), N // K
    rounded, tiny = float(info.eps) / 2, float(info.tiny)
    u = rounded if between is None else between
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    shapes = ((B, T, N, H), (B, T, N), (B, T, N, H), (B, K, S, H), (B, K, S, H), (N,))
    value = {n: np.zeros(shape) for n, shape in zip(names, shapes, strict=True)}
    error = {n: np.zeros(shape) for n, shape in zip(names, shapes, strict=True)}
    for b in range(B):
        q_at, k_at = x.q_at[b][:, None], x.k_at[b][None, :]
        seen = (q_at >= 0) & (k_at >= 0) & (k_at <= q_at)
        if window is not None:
            seen &= k_at > q_at - window
        if x.q_of is not None and x.k_of is not None:
            seen &= x.q_of[b][:, None] == x.k_of[b][None, :]
        for n in range(N):
            q, k, v, do = (
                a.astype(np.float64) for a in (x.q[b, :, n], x.k[b, n // G], x.v[b, n // G], x.dout[b, :, n])
            )
            dlse = x.dlse[b, :, n].astype(np.float64)
            y, e_y = scale * q @ k.T, scale * (H + 3) * U * (abs(q) @ abs(k.T))
            slope, e_slope = np.ones_like(y), np.zeros_like(y)
            if softcap is not None:
                bent = np.tanh(y / softcap)
                e_slope = 3 * (F + e_y / softcap)
                y, e_y, slope = softcap * bent, e_y + 3 * U * abs(y) + (F + 3 * U) * softcap, 1 - bent**2
            sink = -np.inf if x.sinks is None else float(x.sinks[n])
            top = np.maximum(np.where(seen, y, -np.inf).max(1), sink)
            some = np.isfinite(top)
            top = np.where(some, top, 0)
            mass = np.where(seen, np.exp(np.where(seen, y - top[:, None], 0)), 0)
            total = mass.sum(1) + np.exp(sink - top)
            lse = np.where(some, top + np.log(np.where(some, total, 1)), NEVER)
            far = np.where(seen, top[:, None] - y, 0).max(1)
            if x.sinks is not None:
                far = np.maximum(far, top - sink)
            e_lse = np.where(seen, e_y, 0).max(1) + U * far + F + (S + 2) * U + blocks * (F + 2 * U)
            e_lse = e_lse + (F + 2 * U) * (1 + abs(lse))
            reach = np.where(some, lse, 0)[:, None]
            w = np.where(seen, np.exp(np.where(seen, y - reach, 0)), 0)
            r = np.where(seen, np.expm1(np.where(seen, e_y + e_lse[:, None] + U * (abs(y) + abs(reach)) + F, 0)), 0)
            e_w = w * (r + u) + tiny * seen
            out, e_out = w @ v, (e_w + (S + 1) * U * w) @ abs(v)
            e_out = e_out + rounded * abs(out)
            dp, e_dp = do @ v.T, (H + 2) * U * (abs(do) @ abs(v.T))
            e_dp = e_dp + u * abs(dp)
            delta = (do * out).sum(1) - dlse
            e_delta = (
                (abs(do) * (e_out + H * U * abs(out))).sum(1) + (w * (e_dp + r * abs(dp))).sum(1) + 2 * U * abs(dlse)
            )
            inner = dp - delta[:, None]
            dx = w * inner * slope
            e_dx = w * ((e_dp + e_delta[:, None] + r * abs(inner)) * slope + abs(inner) * e_slope)
            e_dx = e_dx + (u + 2 * U) * abs(dx) + tiny * seen
            many = N * T + 2
            value["out"][b, :, n], error["out"][b, :, n] = out, e_out
            value["lse"][b, :, n], error["lse"][b, :, n] = lse, np.where(some, e_lse, 0)
            value["dq"][b, :, n], error["dq"][b, :, n] = scale * dx @ k, scale * (e_dx + (S + 2) * U * abs(dx)) @ abs(k)
            value["dk"][b, n // G] += scale * dx.T @ q
            error["dk"][b, n // G] += scale * (e_dx + many * U * abs(dx)).T @ abs(q)
            value["dv"][b, n // G] += w.T @ do
            error["dv"][b, n // G] += (e_w + many * U * w).T @ abs(do)
            if x.sinks is not None:
                w_0 = np.exp(sink - lse)
                value["dsinks"][n] -= (w_0 * delta).sum()
                error["dsinks"][n] += (w_0 * (e_delta + (e_lse + F + B * T * U) * abs(delta))).sum()
    for n in ("dq", "dk", "dv"):
        error[n] += rounded * abs(value[n]) + tiny
    if x.sinks is None:
        del value["dsinks"]
    return {n: (value[n], 1.02 * error[n]) for n in value}


def results(function: Callable[..., Any], x: Case, **how: Any) -> dict[str, np.ndarray]:
    """What an implementation gives for a case: out, lse and gradients, compiled as one program."""
    given = {"q": x.q, "k": x.k, "v": x.v} | ({} if x.sinks is None else {"sinks": x.sinks})
    of = {} if x.q_of is None else {"q_segments": x.q_of, "k_segments": x.k_of}
    found = _results(function, tuple(sorted(how.items())), given, x.q_at, x.k_at, of, x.dout, x.dlse)
    return {n: np.asarray(a).astype(np.float64) for n, a in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _results(
    function: Callable[..., Any], how: Any, given: Any, q_at: Any, k_at: Any, of: Any, dout: Any, dlse: Any
) -> dict[str, jax.Array]:
    def call(given: Any) -> Any:
        sinks = {"sinks": given["sinks"]} if "sinks" in given else {}
        return function(given["q"], given["k"], given["v"], q_at, k_at, **dict(how), **of, **sinks, return_lse=True)

    (out, lse), back = jax.vjp(call, given)
    (gradient,) = back((dout, dlse))
    return {"out": out, "lse": lse} | {f"d{n}": g for n, g in gradient.items()}


FORMS: dict[str, tuple[Callable[..., Any], Callable[[int], int], dict[str, Any]]] = {
    # the function, how many blocks it sums S slots over, and how it is called
    "reference": (reference.attention, lambda S: 1, {}),
    "few": (xla.few, lambda S: 1, {}),
    "blocks": (xla.attention, lambda S: -(-S // 256), {}),
    "small blocks": (xla.attention, lambda S: -(-S // 3), {"at_once": xla.Blocks(2, 3)}),
    "blocks of 16 and 48": (xla.attention, lambda S: -(-S // 48), {"at_once": xla.Blocks(16, 48)}),
}


def compare(x: Case, *forms: str, **how: Any) -> None:
    """Each form's results within the bounds, zeros where a query sees nothing, and everything finite."""
    for form in forms:
        function, count, more = FORMS[form]
        between = U if form == "reference" else None
        wanted = differentiated(x, **how, blocks=count(x.k.shape[2]), between=between)
        found = results(function, x, **how, **more)
        assert found.keys() == wanted.keys()
        for name, (value, bound) in wanted.items():
            assert np.isfinite(found[name]).all(), (form, name)
            away = abs(found[name] - value)
            assert (away <= bound).all(), (form, name, away.max(), bound.max())
        nothing = wanted["lse"][0] <= -1e29
        assert (found["out"][nothing] == 0).all()
        assert (found["dq"][nothing] == 0).all()


def test_the_oracle_is_the_loops_and_its_gradients_are_differences() -> None:
    """Against tests/oracles/attention.py, and against central differences in float64 with a sink and segments."""
    how = {"scale": 0.4, "window": 4, "softcap": 2.0}
    x = case(2, 3, 6, 4, 2, 4, [[5, 0, -1], [3, 4, 6]], [[0, 1, 2, 3, 4, 5], [1, 2, 5, 6, -1, 0]])
    wanted = oracle.attention(x.q, x.k, x.v, x.q_at, x.k_at, **how)
    defined = ~np.isnan(wanted.out)
    np.testing.assert_allclose(differentiated(x, **how)["out"][0][defined], wanted.out[defined], rtol=1e-12, atol=1e-12)

    of = np.array([[0, 1, 1], [0, 0, 1]]), np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    x = case(2, 3, 6, 4, 2, 4, x.q_at, x.k_at, sinks=True, segments=of)
    exact = x._replace(**{n: getattr(x, n).astype(np.float64) for n in ("q", "k", "v", "sinks")})
    assert exact.sinks is not None

    def total(x: Case) -> float:
        found = differentiated(x._replace(q=x.q, dout=x.dout), **how)
        return float((found["out"][0] * x.dout).sum() + (found["lse"][0] * x.dlse).sum())

    gradients, rng = differentiated(exact, **how), np.random.default_rng(1)
    for name in ("q", "k", "v", "sinks"):
        whole = getattr(exact, name)
        for _ in range(6):
            at = tuple(rng.integers(0, d) for d in whole.shape)
            step = np.zeros_like(whole)
            step[at] = 1e-6
            difference = (
                total(exact._replace(**{name: whole + step})) - total(exact._replace(**{name: whole - step}))
            ) / 2e-6
            assert difference == pytest.approx(gradients["d" + name][0][at], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("N", "K", "dtype"),
    [(3, 3, "float32"), (4, 1, "bfloat16"), (7, 1, "float32"), (8, 1, "float16"), (14, 2, "bfloat16")],
)
@pytest.mark.some_rows
def test_gradients_of_grouped_queries(N: int, K: int, dtype: str) -> None:
    x = case(2, 5, 7, N, K, 8, rows(5, 2, width=5), rows(7, 3, width=7), dtype=dtype)
    compare(x, "reference", "few", "small blocks", scale=0.35)


@pytest.mark.parametrize(
    ("H", "dtype"), [(64, "float32"), (80, "bfloat16"), (96, "float16"), (128, "bfloat16"), (256, "float16")]
)
def test_widths_of_heads(H: int, dtype: str) -> None:
    """Lengths that no block divides; a row that is full, and one with padding."""
    at = rows(70, 33, width=70)
    x = case(2, 70, 70, 2, 1, H, at, at, dtype=dtype, sinks=H == 64)
    compare(x, "blocks of 16 and 48", scale=H**-0.5, window=40 if H == 96 else None, softcap=5.0 if H == 80 else None)


PLACES = {  # name -> (5 queries, 9 slots)
    "plain": (range(5), [0, 1, 2, 3, 4, -1, -1, -1, -1]),
    "the last of all": (range(4, 9), range(9)),
    "no queries": ([-1] * 5, range(9)),
    "an empty cache": (range(5), [-1] * 9),
    "all see all": ([8] * 5, range(9)),
    "one token": ([0, -1, -1, -1, -1], [0, *[-1] * 8]),
    "a ring that has gone round": (range(16, 21), [18, 19, 20, 12, 13, 14, 15, 16, 17]),
    "in no order": ([8, 2, 6, 0, 4], [3, 1, 4, 0, 5, 8, 2, 6, 7]),
    "all later": (range(5), range(5, 14)),
}


@pytest.mark.parametrize(
    ("how", "sinks"),
    [({}, False), ({"window": 2, "softcap": 1.5}, True), ({"window": 1000}, True)],
    ids=["", "2", "1000"],
)
def test_places(how: dict[str, Any], sinks: bool) -> None:
    q_at, k_at = ([list(pair[i]) for pair in PLACES.values()] for i in (0, 1))
    x = case(len(PLACES), 5, 9, 4, 2, 8, q_at, k_at, sinks=sinks)
    compare(x, "reference", "few", "small blocks", scale=0.35, **how)


@pytest.mark.parametrize("module", ["xla", "triton"])  # mosaic_gpu's: tests/test_finetune_bytes.py
def test_what_a_way_back_takes_has_a_name(module: str) -> None:
    """Kept by it, attention is not made again: a way back has as many loops and kernels as where all is kept. Where nothing is,
    it has more."""
    try:
        found = importlib.import_module(f"pallas_kernels.attention.{module}").attention
    except ImportError as error:
        pytest.skip(f"this jax has no Pallas for it: {error}")
    q, k, v = inputs(1, 64, 64, 2, 1, 64, dtype="bfloat16")
    at, how = jnp.arange(64, dtype=jnp.int32)[None], {} if module == "xla" else {"interpret": True}
    one = functools.partial(found, q_positions=at, k_positions=at, scale=0.1, **how)

    def parts(policy: Any) -> int:
        made = one if policy is None else jax.checkpoint(one, policy=policy)
        # squares, or the result's gradient asks for nothing that was made
        told = str(
            jax.make_jaxpr(jax.grad(lambda *x: jnp.square(made(*x).astype(jnp.float32)).sum(), (0, 1, 2)))(q, k, v)
        )
        return sum(told.count(f" {name}[") for name in ("while", "scan", "pallas_call", "custom_partitioning"))

    named = jax.checkpoint_policies.save_only_these_names(reference.ATTENDED)
    assert parts(named) == parts(None)
    assert parts(jax.checkpoint_policies.nothing_saveable) > parts(None) > 0


def test_one_query_over_many_slots() -> None:
    x = case(3, 1, 130, 4, 2, 8, [[129], [64], [0]], rows(130, 65, 1, width=130))
    compare(x, "reference", "few", "blocks of 16 and 48", scale=0.35, window=70)


def test_packed_texts_see_their_own_tokens() -> None:
    """Five texts in two rows, each from position 0, with padding at the end: as each alone, forwards and backwards."""
    of, at = np.full((2, 60), -1), np.full((2, 60), -1)
    texts = [(0, slice(0, 20)), (0, slice(20, 21)), (0, slice(21, 51)), (1, slice(0, 3)), (1, slice(3, 47))]
    for i, (b, cut) in enumerate(texts):
        of[b, cut], at[b, cut] = i, range(cut.stop - cut.start)
    x = case(2, 60, 60, 4, 2, 8, at, at, dtype="bfloat16", segments=(of, of))
    compare(x, "reference", "few", "blocks of 16 and 48", scale=0.35)
    whole = differentiated(x, scale=0.35)
    for b, cut in texts:
        places = at[b : b + 1, cut]
        q, dout, dlse, k, v = (a[b : b + 1, cut] for a in (x.q, x.dout, x.dlse, x.k.swapaxes(1, 2), x.v.swapaxes(1, 2)))
        alone = differentiated(Case(q, k.swapaxes(1, 2), v.swapaxes(1, 2), places, places, dout, dlse), scale=0.35)
        for name in ("out", "dq"):
            np.testing.assert_allclose(whole[name][0][b, cut], alone[name][0][0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(whole["dk"][0][b, :, cut], alone["dk"][0][0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("serves", ["reference", "few", "blocks", "lists"])
def test_a_sink_of_minus_infinity_is_none(serves: str) -> None:
    """Of one head; in rows that see nothing too, which are zeros there."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8)))
    at = np.array([[-1, 0, 1, 2, 3], [-1, -1, -1, 8, 8]], np.int32), np.array([[*range(9)], [*range(9)]], np.int32)
    sinks = np.array([-np.inf, 0.3, -1e35, 1], np.float32)
    call: Any = {"reference": reference.attention, "few": xla.few, "blocks": xla.attention}.get(serves)
    if call is None:
        blocks = np.zeros((2, 4, 1, 1), np.int32)
        call = functools.partial(xla.sparse_attention, blocks=blocks, block_q=16, block_k=16)
    bare, found = (
        call(q, k, v, *at, scale=0.35, return_lse=True, **given) for given in ({}, {"sinks": jnp.asarray(sinks)})
    )
    for head in (0, 2):
        np.testing.assert_allclose(found[0][:, :, head], bare[0][:, :, head], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1][..., 0], bare[1][..., 0], rtol=1e-6)
    assert not np.asarray(found[0])[[0, 1, 1, 1], [0, 0, 1, 2]].any()
    assert abs(np.asarray(found[0] - bare[0]))[..., 1, :].max() > 1e-2


def test_a_sink_takes_its_part() -> None:
    """A sink as one more key with the score s and the value 0."""
    x = case(1, 3, 5, 2, 1, 8, [[2, 3, 4]], [range(5)], sinks=True)
    assert x.sinks is not None
    found = differentiated(x, scale=0.35)["out"][0]
    bare = differentiated(x._replace(sinks=None), scale=0.35)
    mass = np.exp(bare["lse"][0])
    np.testing.assert_allclose(
        found, bare["out"][0] * (mass / (mass + np.exp(x.sinks.astype(np.float64))))[..., None], rtol=1e-12
    )
    compare(x, "reference", "few", "blocks", scale=0.35)


def test_halves_merge_by_their_log_sum_exp() -> None:
    """What a cache split over devices does: out = sum e^(lse_i - lse) out_i."""
    x = case(2, 3, 10, 4, 2, 8, [[7, 8, 9], [1, -1, 3]], [range(10)])
    whole = xla.attention(*x[:5], scale=0.35, return_lse=True)
    parts = [
        attention(x.q, x.k[:, :, c], x.v[:, :, c], x.q_at, x.k_at[:, c], scale=0.35, return_lse=True)
        for c in (slice(0, 4), slice(4, 10))
    ]
    lse = np.stack([np.asarray(p[1], np.float64) for p in parts])
    total = np.logaddexp(*lse)
    share = np.exp(lse - total)
    merged = sum(s[..., None] * np.asarray(p[0], np.float64) for s, p in zip(share, parts, strict=True))
    sees = x.q_at >= 0
    np.testing.assert_allclose(np.asarray(whole[0])[sees], merged[sees], atol=2e-6)
    np.testing.assert_allclose(np.asarray(whole[1])[sees], total[sees], atol=2e-6)
    assert (np.asarray(whole[1])[~sees] == NEVER).all()


def test_nothing_hangs_on_how_many_tokens_are_read_at_a_time() -> None:
    """A prompt of 150 read whole, by 64, by 1, and under other blocks: the same to float32's rounding."""
    at = np.arange(150, dtype=np.int32)[None]
    x = case(1, 150, 150, 4, 2, 16, at, at)
    how = {"scale": 0.25, "window": 37}
    wanted = differentiated(x, **how, blocks=150)["out"]
    whole = {"reference": reference.attention(*x[:5], **how), "few": xla.few(*x[:5], **how)}
    for blocks in (None, xla.Blocks(64, 11)):
        whole[str(blocks)] = blocks_jit(*x[:5], at_once=blocks, **how)
    for chunk in (64, 1):
        parts = [
            attention_jit(x.q[:, i : i + chunk], x.k, x.v, x.q_at[:, i : i + chunk], x.k_at, **how)
            for i in range(0, 150, chunk)
        ]
        whole[f"by {chunk}"] = jnp.concatenate(parts, axis=1)
    for name, found in whole.items():
        assert (abs(np.asarray(found, np.float64) - wanted[0]) <= wanted[1]).all(), name


def test_a_row_of_a_batch_gives_what_it_gives_alone() -> None:
    """Other rows move where the loops begin and end, and how many queries meet at a time; not what a row's sums are of."""
    at = rows(90, 41, 3, width=90)
    x = case(3, 90, 90, 4, 2, 16, at, at)
    together = np.asarray(blocks_jit(*x[:5], scale=0.25, at_once=xla.Blocks(16, 32)), np.float64)
    value, bound = differentiated(x, scale=0.25, blocks=3)["out"]
    assert (abs(together - value) <= bound).all()
    for b in range(3):
        alone = np.asarray(blocks_jit(*(a[b : b + 1] for a in x[:5]), scale=0.25, at_once=xla.Blocks(32, 32)))
        np.testing.assert_allclose(together[b], alone[0], rtol=0, atol=4e-6)
        assert xla.blocks(1, 4096, 4096, 4).keys == xla.blocks(64, 4096, 4096, 4).keys


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    q_at=st.lists(positions(min_size=5, max_size=5), min_size=2, max_size=2),
    k_at=st.lists(positions(min_size=8, max_size=8), min_size=2, max_size=2),
    of=st.lists(st.lists(st.integers(0, 2), min_size=13, max_size=13), min_size=2, max_size=2),
    how=st.sampled_from(
        [
            (None, None, False, "float32"),
            (3, None, True, "bfloat16"),
            (3, 1.5, False, "float32"),
            (None, 1.5, True, "float16"),
        ]
    ),
    seed=st.integers(0, 9),
)
def test_any_places_forwards_and_backwards(
    q_at: Any, k_at: Any, of: Any, how: tuple[int | None, float | None, bool, str], seed: int
) -> None:
    """Segments too: any mask that positions can say."""
    window, softcap, sinks, dtype = how
    segments = np.array(of)[:, :5], np.array(of)[:, 5:]
    x = case(2, 5, 8, 4, 2, 8, q_at, k_at, dtype=dtype, seed=seed, sinks=sinks, segments=segments)
    compare(x, "reference", "few", "small blocks", scale=0.35, window=window, softcap=softcap)


# -- memory, sharding, dispatch


def abstract(T: int, S: int, N: int = 4, K: int = 2, H: int = 64, B: int = 1, dtype: Any = jnp.float32) -> list[Any]:
    like = jax.ShapeDtypeStruct
    kv, ints = like((B, K, S, H), dtype), jnp.int32
    return [like((B, T, N, H), dtype), kv, kv, like((B, T), ints), like((B, S), ints)]


def with_gradient(**how: Any) -> Any:
    def loss(q: Any, k: Any, v: Any, *at: Any) -> jax.Array:
        return attention(q, k, v, *at, scale=0.125, **how).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def widest(text: str) -> int:
    """Elements of the largest array in a program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return max(int(np.prod([int(d) for d in s.split(",")])) for s in shapes)


# Forwards the queries by blocks, which the results take the place of. Backwards q, do and, in float32,
# dq by blocks, and the forward's result. The rest is what a pair of blocks needs.
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear(gradient: bool) -> None:
    """32,768 tokens in float32, four heads of 64: 33.6 MB of queries; all scores would be 17 GB."""
    T = 32768
    forward = jax.jit(functools.partial(attention, scale=0.125))
    compiled = (with_gradient() if gradient else forward).lower(*abstract(T, T)).compile()
    queries = T * 4 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < (4 if gradient else 1) * queries + 2**22
    text = compiled.as_text()
    assert not re.search(rf"\[[\d,]*{T},{T}[\d,]*\]", text)
    assert widest(text) <= T * 4 * 64


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA:CPU keeps eight arrays a layer there, whatever begins as zeros"
)
def test_layers_on_the_way_back_share_their_gradients() -> None:
    """Layers that are written out and run again: each more adds its input, and no array of gradients that stands from the first
    layer on (three more, seen before)."""
    T, N, H = 4096, 2, 64
    at = jnp.arange(T, dtype=jnp.int32)[None]

    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[i]) for i in range(3))
        return x + xla.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), at, at, scale=0.125).reshape(x.shape)

    def temporaries(layers: int) -> int:
        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return (functools.reduce(layer, [w[i] for i in range(layers)], x) ** 2).sum()

        w = jax.ShapeDtypeStruct((layers, 3, N * H, N, H), jnp.float32)
        x = jax.ShapeDtypeStruct((1, T, N * H), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(w, x).compile({"xla_backend_optimization_level": 0})
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4) - temporaries(2) < 2 * 2 * T * N * H * 4


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    ("card", "how", "gradient"),
    [("T4", {}, True), ("H200", {"implementation": "xla"}, False), ("H200", {"implementation": "xla"}, True)],
    ids=["T4-gradient", "H200", "H200-gradient"],
)
@pytest.mark.some_rows
def test_memory_is_linear_on_a_card(card: str, how: dict[str, Any], gradient: bool) -> None:
    """The chunked form, which is what serves a T4 (no kernel of ours does), in float16."""
    T = 32768
    with aot.target(aot.CARDS[card]) as target:
        forward = jax.jit(functools.partial(attention, scale=0.125, **how))
        args = target.place(abstract(T, T, dtype=jnp.float16))
        compiled = target.compile(with_gradient(**how) if gradient else forward, *args)
    queries = T * 4 * 64 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < (8 if gradient else 4) * queries
    assert widest(compiled.as_text()) <= T * 4 * 64


@pytest.mark.parametrize("gradient", [False, True])
def test_rows_and_heads_over_devices_need_nothing_of_each_other(gradient: bool) -> None:
    """Two by four devices: no key, value or query is moved; only which blocks meet in any row is agreed upon."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, kv, ints = P("data", None, "tensor"), P("data", "tensor"), P("data")
    args = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(abstract(512, 512, N=8, K=4, B=2), (heads, kv, kv, ints, ints), strict=True)
    ]
    forward = jax.jit(functools.partial(attention, scale=0.125))
    text = (with_gradient() if gradient else forward).lower(*args).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    moved = [int(np.prod([int(d) for d in s.split(",")])) for s in re.findall(r"= \w+\[([\d,]*)\]\S* all-reduce", text)]
    assert all(n <= 64 for n in moved)


def test_sharded_is_whole() -> None:
    """Eight devices give what one gives, to rounding."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    at = rows(60, 33, width=60)
    x = case(2, 60, 60, 8, 4, 16, at, at)
    specs = (P("data", None, "tensor"), P("data", "tensor"), P("data", "tensor"), P("data"), P("data"))
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(x[:5], specs, strict=True)]
    how = {"scale": 0.25, "at_once": xla.Blocks(16, 32)}
    np.testing.assert_allclose(blocks_jit(*placed, **how), blocks_jit(*x[:5], **how), rtol=0, atol=4e-6)


def test_no_branch_for_other_platforms_is_left() -> None:
    """The form for 16 bits on a GPU, which XLA:CPU refuses for some shapes, is not in a program for the CPU."""
    text = with_gradient().lower(*abstract(600, 600, dtype=jnp.bfloat16)).compile().as_text()
    assert "conditional" not in text
    assert not re.search(r"dot\(bf16", text)


def test_which_implementation_serves() -> None:
    """On a CPU: all scores where they are few, blocks where they are many; seen in the program."""

    def loops(T: int, S: int, N: int = 4) -> bool:
        return "while" in jax.jit(functools.partial(attention, scale=0.125)).lower(*abstract(T, S, N=N)).as_text()

    assert not loops(1, 2**20)
    assert not loops(16, 4096)
    assert not loops(256, 256)
    assert loops(257, 257)
    assert loops(32, 4096)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 0}, "window is 0; it is at least 1"),
        ({"softcap": -1.0}, "softcap is -1.0; it is greater than 0"),
        ({"q_segments": np.zeros((1, 3), np.int32)}, "q_segments is given without k_segments"),
        (
            {"sinks": np.zeros(3, np.float32)},
            r"sinks is \(3,\); with q \(1, 3, 4, 8\) and k \(1, 2, 5, 8\) it is \(4,\)",
        ),
        (
            {"implementation": "flash"},
            "there is no implementation 'flash'; there are reference, xla, cudnn, triton, mosaic_gpu, tokamax",
        ),
    ],
)
def test_what_does_not_belong_together_is_said(change: dict[str, Any], said: str) -> None:
    x = case(1, 3, 5, 4, 2, 8, [range(3)], [range(5)])
    with pytest.raises(ValueError, match=said):
        attention(*x[:5], scale=0.35, **change)


def test_shapes_that_do_not_belong_together_are_said() -> None:
    x = case(1, 3, 5, 4, 2, 8, [range(3)], [range(5)])
    for bad, said in (
        ((*x[:2], x.v[..., :4], *x[3:5]), "k and v are both"),
        ((x.q[:, :, :3], *x[1:5]), "3 query heads do not divide into 2 kv heads"),
        ((*x[:3], x.q_at[:, :2], x.k_at), r"q_positions is \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=said):
            attention(*bad, scale=0.35)


def test_cudnn_serves_only_what_it_can_know() -> None:
    """What is refused before cuDNN is asked, and by jax where there is none."""
    bf16 = abstract(64, 64, dtype=jnp.bfloat16)

    def refused(args: Any = bf16, contiguous: bool = True, **how: Any) -> str:
        with pytest.raises(dispatch.Refused) as e:
            jax.eval_shape(functools.partial(cudnn.attention, scale=0.125, contiguous=contiguous, **how), *args)
        return str(e.value)

    assert "does not look at positions; say contiguous=True" in refused(contiguous=False)
    assert "64 queries and 65 slots" in refused(abstract(64, 65, dtype=jnp.bfloat16))
    assert "a soft-cap" in refused(softcap=2.0)
    assert "the log-sum-exp" in refused(return_lse=True)
    assert "there is no GPU" in refused()
    x = case(1, 3, 3, 4, 2, 8, [range(3)], [range(3)])
    with pytest.raises(dispatch.Refused, match="there is no GPU"):
        attention(*x[:5], scale=0.35, contiguous=True, implementation="cudnn")


@pytest.mark.parametrize(
    ("capability", "H", "dtype", "said"),
    [
        ((7, 5), 64, "float16", "compute capability 7.5 is below 8.0"),
        ((8, 9), 64, "float32", "q is float32"),
        ((8, 9), 256, "bfloat16", "multiples of 8 up to 128 on compute capability 8.9"),
        ((12, 0), 256, "bfloat16", "up to 128 on compute capability 12.0"),
        ((9, 0), 60, "bfloat16", "head_dim is 60"),
        ((9, 0), 264, "bfloat16", "up to 256"),
    ],
)
def test_what_cudnn_refuses_by_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], H: int, dtype: str, said: str
) -> None:
    monkeypatch.setattr(cudnn, "gpu", lambda: dispatch.Gpu(capability, 100))
    with pytest.raises(dispatch.Refused, match=said):
        jax.eval_shape(
            functools.partial(cudnn.attention, scale=0.1, contiguous=True), *abstract(64, 64, H=H, dtype=dtype)
        )


@pytest.mark.parametrize("window", [None, 20])
def test_what_cudnn_is_asked(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """The call that jax lowers to, on a machine without the library: causal, the window with the token itself."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(cudnn, "gpu", lambda: dispatch.Gpu((9, 0), 132))
    args = abstract(64, 64, dtype=jnp.bfloat16)
    call = jax.jit(functools.partial(cudnn.attention, scale=0.125, contiguous=True, window=window))
    with pytest.raises(dispatch.Refused, match=r"cuDNN .*: the chunked form"):
        call.trace(*args)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    text = call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in text
    assert f"\\22sliding_window_length\\22: {window or 0}" in text
