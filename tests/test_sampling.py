"""Sampling against numpy float64: each processor and their combinations, the draw's distribution, rows and traces.

Tolerances are derived from float32's unit roundoff u = 2**-24, in the oracle's `logit_error` and `decided`.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import sampling as oracle
from oracles.sampling import decided, logit_error

from jaxengine.sampling import (
    Counts,
    Sampling,
    Steps,
    init_counts,
    process,
    row_keys,
    sample,
    step_keys,
    top_logprobs,
    update_counts,
    values,
)

U = 2.0**-24
B, V, T = 4, 24, 6
ALL = Steps(sampled=True, top_k=True, top_p=True, min_p=True, repetition=True, counted=True)

process_jit = jax.jit(process, static_argnums=0)
sample_jit = jax.jit(sample, static_argnums=0)
init_jit = jax.jit(init_counts, static_argnums=(0, 3))
update_jit = jax.jit(update_counts, static_argnums=0)


def assert_row(got, outcome, s):
    got, want = np.asarray(got, np.float64), outcome.logits
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=str(s))
    kept = ~np.isneginf(want)
    np.testing.assert_allclose(got[kept], want[kept], rtol=0, atol=logit_error(outcome, s) + 1e-37, err_msg=str(s))


def batch_counts(steps, prompts, generated, vocab_size=V):
    """Counts through the public functions: prompts padded at the front, generated tokens one step at a time."""
    width = max([1, *map(len, prompts)])
    ids = np.full((len(prompts), width), 1, np.int32)
    valid = np.zeros((len(prompts), width), bool)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :], valid[b, width - len(prompt) :] = prompt, True
    counts = init_jit(steps, jnp.asarray(ids), jnp.asarray(valid), vocab_size)
    for t in range(max(map(len, generated), default=0)):
        token = [row[t] if t < len(row) else -1 for row in generated]
        counts = update_jit(steps, counts, jnp.asarray(np.array(token, np.int32)))
    return counts


def random_logits(seed, shape=(B, V), scale=3.0, grid=None):
    z = np.random.default_rng(seed).normal(size=shape) * scale
    return (z if grid is None else np.round(z / grid) * grid).astype(np.float32)


temperatures = st.one_of(st.just(0.0), st.sampled_from([1e-4, 0.5, 1.0, 2.0]), st.floats(0.05, 3.0))
maybe = lambda strategy: st.one_of(st.none(), strategy)  # noqa: E731
samplings = st.builds(
    Sampling,
    temperature=temperatures,
    top_k=maybe(st.integers(1, 2 * V)),
    top_p=maybe(st.one_of(st.just(1.0), st.floats(1e-6, 1.0))),
    min_p=maybe(st.one_of(st.sampled_from([0.0, 1.0, 1e-300]), st.floats(0.001, 1.0))),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
)
texts = st.lists(st.integers(0, V // 3), max_size=T)  # few ids, so that tokens come twice
quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


# ------------------------------------------------------------------------------------------------ the processors


@quick
@given(
    rows=st.lists(samplings, min_size=B, max_size=B),
    prompts=st.lists(texts, min_size=B, max_size=B),
    generated=st.lists(texts, min_size=B, max_size=B),
    seed=st.integers(0, 2**32 - 1),
    grid=st.sampled_from([None, 0.5]),
)
def test_any_batch_is_the_oracles(rows, prompts, generated, seed, grid):
    """Four rows with unrelated settings, every processor compiled in: the neutral values are tested with it."""
    logits = random_logits(seed, grid=grid)
    outcomes = [oracle.process(s, z, p, g) for s, z, p, g in zip(rows, logits, prompts, generated, strict=True)]
    counts = batch_counts(ALL, prompts, generated)
    got = np.asarray(process_jit(ALL, values(ALL, rows), jnp.asarray(logits), counts))
    keys = step_keys(row_keys(seed, range(B)), jnp.arange(B, dtype=jnp.int32))
    token, logprob = map(np.asarray, sample_jit(ALL, values(ALL, rows), jnp.asarray(logits), counts, keys))
    checked = [b for b in range(B) if decided(outcomes[b], rows[b])]
    assume(checked)
    for b in checked:
        assert_row(got[b], outcomes[b], rows[b])
        assert not np.isneginf(outcomes[b].logits[token[b]]), "drew a removed token"
        if rows[b].greedy:
            best = np.flatnonzero(outcomes[b].logits > outcomes[b].logits.max() - 2 * logit_error(outcomes[b], rows[b]))
            assert token[b] in best
    raw = np.array([oracle.log_softmax(z)[t] for z, t in zip(logits, token, strict=True)])
    # the sum of V exponentials is off by (V + 4) u, its logarithm and two subtractions by u each of what they hold
    np.testing.assert_allclose(logprob, raw, rtol=0, atol=U * (V + 8 + 4 * np.abs(logits).max()))


ONE_EACH = [
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7),
    Sampling(presence_penalty=0.9),
    Sampling(frequency_penalty=-0.4),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, min_p=0.0),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1e-4, top_k=9, top_p=0.95, min_p=0.05),
    Sampling(temperature=0.8, top_k=9, top_p=0.9),
    Sampling(temperature=1.5, top_p=0.95, min_p=0.1),
    Sampling(temperature=1.2, top_k=12, min_p=0.2, repetition_penalty=1.1, presence_penalty=0.3),
]


@pytest.mark.parametrize("s", ONE_EACH, ids=str)
def test_alone_with_the_smallest_steps(s):
    """Each processor with nothing else compiled in, and with everything compiled in."""
    n = B
    logits, rng = random_logits(7, (n, V)), np.random.default_rng(8)
    prompts, generated = rng.integers(0, V, (n, T)).tolist(), rng.integers(0, V, (n, T)).tolist()
    outcomes = [oracle.process(s, z, p, g) for z, p, g in zip(logits, prompts, generated, strict=True)]
    assert all(decided(o, s) for o in outcomes)
    for steps in (Steps.of([s]), ALL):
        out = process_jit(steps, values(steps, [s] * n), jnp.asarray(logits), batch_counts(steps, prompts, generated))
        for b in range(n):
            assert_row(out[b], outcomes[b], s)


def test_top_p_near_one_keeps_the_digits_of_its_tail():
    """p = 1 - 1e-6 over one likely token and many of probability 4.03e-8: 24 of them are within the tail, 25 are not.
    Were p rounded to float32 first (1 - 1.013e-6) or the mass summed from the large end, in steps of 6e-8, the count
    would differ."""
    n, tail, each = 1024, 1e-6, 1.008e-6 / 25
    logits = np.full((1, n), math.log(each / (1 - (n - 1) * each)), np.float32)
    logits[0, 0] = 0.0
    s = Sampling(temperature=1.0, top_p=1 - tail)
    steps, outcome = Steps.of([s]), oracle.process(s, logits[0])
    got = np.isneginf(np.asarray(process_jit(steps, values(steps, [s]), jnp.asarray(logits), Counts())))[0]
    want = np.isneginf(outcome.logits)
    assert decided(outcome, s)
    assert want.sum() == 24
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------------------------------------------------- ties


def kept(s, logits):
    """Ids that survive, one row."""
    steps = Steps.of([s])
    z = jnp.asarray(np.array([logits], np.float32))
    return np.flatnonzero(~np.isneginf(np.asarray(process_jit(steps, values(steps, [s]), z, Counts())))[0]).tolist()


def test_top_k_keeps_everything_equal_to_the_kth():
    assert kept(Sampling(1.0, top_k=2), [0.0, 3.0, 1.0, 1.0, 1.0, -2.0]) == [1, 2, 3, 4]
    assert kept(Sampling(1.0, top_k=4), [0.0, 3.0, 1.0, 1.0, 1.0, -2.0]) == [1, 2, 3, 4]
    assert kept(Sampling(1.0, top_k=5), [0.0, 3.0, 1.0, 1.0, 1.0, -2.0]) == [0, 1, 2, 3, 4]
    assert kept(Sampling(1.0, top_k=1), [2.0] * 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("p", "count"), [(0.124, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1, 8)])
def test_top_p_of_equals_is_the_smallest_set(p, count):
    """Eight equal logits: every probability is exactly 1/8, so p = 1/2 is reached by four, not five."""
    assert kept(Sampling(1.0, top_p=p), [5.0] * 8) == list(range(count))


def test_top_p_chooses_among_equals_at_its_edge_only():
    # probabilities 1/2, 1/8 x 4: exact in float32 because exp(log 4) is compared with slack on both sides
    logits = [0.0, math.log(4), 0.0, 0.0, 0.0]
    assert kept(Sampling(1.0, top_p=0.49), logits) == [1]
    assert kept(Sampling(1.0, top_p=0.6), logits) == [0, 1]
    assert kept(Sampling(1.0, top_p=0.8), logits) == [0, 1, 2, 3]
    # top-k's ties are part of what top-p renormalises: of 4, 1, 1, 1, 1 all stay, and 0.8 asks for the same
    assert kept(Sampling(1.0, top_k=2, top_p=0.8), logits) == [0, 1, 2, 3]
    # without the ties the renormalised 4/5, 1/5 would have stopped at two


def test_top_p_renormalises_what_top_k_left():
    logits = np.log([8, 4, 2, 1, 1])  # of 16; top-k 2 leaves 8/12 and 4/12
    assert kept(Sampling(1.0, top_p=0.6), logits) == [0, 1]
    assert kept(Sampling(1.0, top_k=2, top_p=0.6), logits) == [0]


def test_min_p_one_keeps_the_largest_and_its_equals():
    assert kept(Sampling(1.0, min_p=1.0), [1.0, 2.0, 2.0, 0.0]) == [1, 2]
    assert kept(Sampling(1.0, min_p=0.0), [1.0, 2.0, 2.0, -1e30]) == [0, 1, 2, 3]


def test_filters_at_their_limit_agree_with_greedy_on_ties():
    logits = [0.0, 2.0, 1.0, 2.0]
    z = jnp.asarray(np.array([logits], np.float32))
    token, _ = sample_jit(Steps(), {}, z, Counts(), row_keys(0, [0]))
    assert kept(Sampling(1.0, top_p=1e-300), logits) == token.tolist() == [1]


# ------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("s", ONE_EACH, ids=str)
def test_a_vocabulary_of_one(s):
    z = jnp.asarray(np.array([[-3.5]], np.float32))
    token, logprob = sample_jit(ALL, values(ALL, [s]), z, batch_counts(ALL, [[0]], [[0]], 1), row_keys(3, [0]))
    assert token.tolist() == [0]
    assert logprob.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [1e-4, 1e-50, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    s = Sampling(temperature, top_k=5, top_p=0.9, min_p=0.1)
    logits = random_logits(11, (64, V), grid=0.01)
    logits[np.arange(64), np.arange(64) % V] = 30.0  # no ties at the top
    counts = batch_counts(ALL, [[]] * 64, [[]] * 64)
    token, logprob = sample_jit(ALL, values(ALL, [s] * 64), jnp.asarray(logits), counts, row_keys(0, range(64)))
    assert token.tolist() == [b % V for b in range(64)]
    assert np.isfinite(logprob).all()


def test_extreme_parameters_stay_finite():
    rows = [
        Sampling(1e300, top_k=2**40, top_p=5e-324, min_p=5e-324, repetition_penalty=1e300),
        Sampling(1.0, repetition_penalty=5e-324, top_p=1 - 2**-53),
        Sampling(1e300),
        Sampling(0.0, top_k=1, top_p=1e-9, min_p=1.0),
    ]
    logits = random_logits(12)
    out = process_jit(ALL, values(ALL, rows), jnp.asarray(logits), batch_counts(ALL, [[0]] * B, [[1]] * B))
    assert not np.isnan(out).any()
    assert (~np.isneginf(out)).any(axis=1).all()
    np.testing.assert_array_equal(out[3], logits[3])  # greedy: no filter


def test_masked_logits_stay_masked():
    """-inf on the way in (a grammar, a padded vocabulary) is -inf on the way out and is never drawn."""
    s = Sampling(
        0.9, top_k=20, top_p=0.99, min_p=0.01, repetition_penalty=1.2, presence_penalty=-2, frequency_penalty=1
    )
    logits = random_logits(13, (64, V))
    logits[:, 3:] = -np.inf
    counts = batch_counts(ALL, [[1, 10]] * 64, [[2, 11, 11]] * 64)
    out = np.asarray(process_jit(ALL, values(ALL, [s] * 64), jnp.asarray(logits), counts))
    assert np.isneginf(out[:, 3:]).all()
    assert not np.isnan(out).any()
    token, logprob = sample_jit(ALL, values(ALL, [s] * 64), jnp.asarray(logits), counts, row_keys(1, range(64)))
    assert set(token.tolist()) <= {0, 1, 2}
    assert np.isfinite(logprob).all()


@pytest.mark.parametrize("bad", [[np.nan], [np.nan] * V, [np.inf, -np.inf], [-np.inf] * V], ids=str)
@pytest.mark.parametrize("s", [Sampling(), Sampling(0.8, top_k=5, top_p=0.9, min_p=0.1)], ids=["greedy", "sampled"])
def test_a_broken_row_harms_no_other(bad, s):
    logits = random_logits(14)
    broken = logits.copy()
    broken[1, : len(bad)] = bad
    steps, keys = Steps() if s.greedy else ALL, row_keys(5, range(B))
    counts = batch_counts(steps, [[0]] * B, [[1]] * B)
    token, logprob = sample_jit(steps, values(steps, [s] * B), jnp.asarray(logits), counts, keys)
    got, got_logprob = sample_jit(steps, values(steps, [s] * B), jnp.asarray(broken), counts, keys)
    assert 0 <= int(got[1]) < V
    assert np.isnan(got_logprob[1]), "a broken row must show in its log-probability"
    if np.isnan(bad).any():
        out = process_jit(steps, values(steps, [s] * B), jnp.asarray(broken), counts)
        assert np.isnan(out[1]).any(), "a filter must not hide it"
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(token)[others])
    np.testing.assert_array_equal(np.asarray(got_logprob)[others], np.asarray(logprob)[others])


# ------------------------------------------------------------------------------------------------------- the draw


def far(draws, probs, false_alarm=1e-9):
    """Whether the frequencies are further from `probs` than chance allows: P(|f - p|_1 >= e) <= 2^K exp(-n e^2 / 2)
    for K outcomes and n independent draws (Bretagnolle, Huber, Carol)."""
    n, K = len(draws), len(probs)
    bound = math.sqrt(2 * (K * math.log(2) - math.log(false_alarm)) / n)
    return np.abs(np.bincount(draws, minlength=K) / n - probs).sum() > bound


N, K = 20_000, 8  # the bound is then 0.051 in L1
LOGITS = np.array([1.5, 0.2, -0.7, 0.9, 0.0, -2.0, 1.1, 0.3], np.float32)
DRAWN = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.7),
    Sampling(1.0, top_k=3),
    Sampling(0.8, top_p=0.7),
    Sampling(1.3, min_p=0.3),
    Sampling(0.9, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.4),
]


def draws_of(s, keys, n=N):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (n, K))
    counts = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, K)), batch_counts(ALL, [[0, 1]], [[3, 3, 4]], K))
    return np.asarray(sample_jit(ALL, values(ALL, [s] * n), logits, counts, keys)[0])


@pytest.mark.parametrize("over", ["samples", "positions"])
@pytest.mark.parametrize("s", DRAWN, ids=str)
def test_draws_follow_the_filtered_distribution(s, over):
    """Over the samples of one seed at one position, and over the positions of one row."""
    if over == "samples":
        keys = step_keys(row_keys(2024, range(N)), jnp.full((N,), 17, jnp.int32))
    else:
        keys = step_keys(row_keys(2025, [0] * N), jnp.arange(N, dtype=jnp.int32))
    probs = oracle.probabilities(oracle.process(s, LOGITS, [0, 1], [3, 3, 4]).logits)
    draws = draws_of(s, keys)
    assert not far(draws, probs)
    assert (probs[draws] > 0).all()
    # the bound tells these settings from one another
    others = [o for o in DRAWN if o != s]
    assert all(far(draws, oracle.probabilities(oracle.process(o, LOGITS, [0, 1], [3, 3, 4]).logits)) for o in others)


def test_successive_draws_of_a_row_are_independent():
    s = Sampling(1.0)
    keys = row_keys(77, range(N))
    first, second = (draws_of(s, step_keys(keys, jnp.full((N,), t, jnp.int32))) for t in (5, 6))
    half = lambda draw: (draw >= 3).astype(int) + (draw >= 6)  # noqa: E731  (three outcomes keep the bound small)
    probs = oracle.probabilities(LOGITS.astype(np.float64))
    p = np.bincount(half(np.arange(K)), weights=probs)
    assert not far(3 * half(first) + half(second), np.outer(p, p).ravel())
    assert far(3 * half(first) + half(first), np.outer(p, p).ravel())


# ----------------------------------------------------------------------------------------------------- rows, keys

MIXED = [
    Sampling(),
    Sampling(1.5, top_k=7, repetition_penalty=1.4),
    Sampling(2.0, top_p=0.9, presence_penalty=0.5),
    Sampling(1.8, min_p=0.05, frequency_penalty=0.6),
]


def test_a_row_is_the_same_alone_and_in_any_batch():
    """Alone, with the program that only it needs; in a mixed batch; in that batch turned round: same tokens."""
    n = len(MIXED)
    logits, rng = random_logits(20, (n, V)), np.random.default_rng(21)
    prompts, generated = rng.integers(0, V, (n, T)).tolist(), rng.integers(0, V, (n, T)).tolist()
    steps = Steps.of(MIXED)

    def draw(rows, steps, t):
        keys = step_keys(row_keys(9, [0] * len(rows)), jnp.full((len(rows),), t, jnp.int32))
        counts = batch_counts(steps, [prompts[b] for b in rows], [generated[b] for b in rows])
        v = values(steps, [MIXED[b] for b in rows])
        return sample_jit(steps, v, jnp.asarray(logits[rows]), counts, keys)

    seen = set()
    for t in range(8):
        token, logprob = map(np.asarray, draw(list(range(n)), steps, t))
        back, _ = draw(list(range(n))[::-1], steps, t)
        np.testing.assert_array_equal(np.asarray(back)[::-1], token)
        for b in range(n):
            alone, alone_logprob = draw([b], Steps.of([MIXED[b]]), t)
            assert alone.tolist() == [token[b]]
            np.testing.assert_allclose(alone_logprob, [logprob[b]], rtol=0, atol=2 * U * (V + 8 + 4 * 12))
        seen.add(tuple(token.tolist()))
    assert len(seen) > 4, "the positions must change the draw"


def test_a_greedy_row_among_sampled_ones_is_exactly_greedy():
    n = 64
    logits = random_logits(22, (n, V))
    greedy, hot = Sampling(top_k=3, top_p=0.5, min_p=0.5), Sampling(1.5, top_k=5, top_p=0.9, min_p=0.1)
    rows = [greedy if b % 2 else hot for b in range(n)]
    counts = batch_counts(ALL, [[0, 1, 2]] * n, [[3, 3]] * n)
    out = process_jit(ALL, values(ALL, rows), jnp.asarray(logits), counts)
    np.testing.assert_array_equal(out[1::2], logits[1::2])
    token, _ = sample_jit(ALL, values(ALL, rows), jnp.asarray(logits), counts, row_keys(1, range(n)))
    np.testing.assert_array_equal(np.asarray(token)[1::2], logits[1::2].argmax(axis=1))
    assert (np.asarray(token)[::2] != logits[::2].argmax(axis=1)).any()


def test_keys_depend_on_seed_and_sample_only():
    data = lambda keys: np.asarray(jax.random.key_data(keys)).tolist()  # noqa: E731
    assert data(row_keys(4, [2, 0, 2])) == [data(row_keys(4, [j]))[0] for j in (2, 0, 2)]
    assert len({tuple(k) for k in data(row_keys(4, range(100)))}) == 100
    assert data(row_keys(4, [0])) != data(row_keys(5, [0]))
    with jax.default_prng_impl("rbg"):
        assert data(row_keys(4, [1])) == data(jax.random.fold_in(jax.random.key(4, impl="threefry2x32"), 1)[None])
    # all 64 bits of a seed count
    assert len({tuple(data(row_keys(seed, [0]))[0]) for seed in (5, 2**32 + 5, 2**40 + 5, 2**64 - 1)}) == 4
    assert row_keys(1, []).shape == (0,)


def test_without_a_seed_every_row_is_fresh():
    keys = jnp.concatenate([jax.random.key_data(row_keys(None, [0] * 50)) for _ in range(2)])
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 100
    assert step_keys(row_keys(None, [0, 0]), jnp.zeros((2,), jnp.int32)).shape == (2,)


# --------------------------------------------------------------------------------------------------- what compiles


def test_numbers_do_not_trace_again_and_steps_do():
    traces = 0

    def count(steps, v, logits, counts, keys):
        nonlocal traces
        traces += 1
        return sample(steps, v, logits, counts, keys)

    run = jax.jit(count, static_argnums=0)
    logits, keys = jnp.asarray(random_logits(30)), row_keys(0, range(B))

    def call(rows):
        steps = Steps.of(rows)
        return run(steps, values(steps, rows), logits, batch_counts(steps, [[1]] * B, [[2]] * B), keys)

    base = Sampling(0.7, top_k=10, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.1)
    for s in [
        base,
        replace(base, temperature=0.8),
        replace(base, top_k=40),
        replace(base, top_p=0.2),
        replace(base, min_p=0.5),
        replace(base, repetition_penalty=1.7),
        replace(base, presence_penalty=0.0, frequency_penalty=-1.0),
    ]:
        call([s] * B)
    call([base, Sampling(), Sampling(2.0), Sampling(top_k=3)])
    assert traces == 1
    for s in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.5, min_p=0.5)):
        call([s] * B)
    assert traces == 2, "all greedy programs are one"
    call([replace(base, top_k=None)] * B)
    assert traces == 3


def lowered(s):
    steps = Steps.of([s])
    args = values(steps, [s] * B), jnp.zeros((B, V), jnp.float32), batch_counts(steps, [[]] * B, [[]] * B)
    return sample_jit.lower(steps, *args, row_keys(0, range(B)))


@pytest.mark.parametrize(
    ("s", "sorts"),
    [
        (Sampling(top_k=5, top_p=0.5), 0),
        (Sampling(repetition_penalty=1.2), 0),
        (Sampling(0.7), 0),
        (Sampling(0.7, min_p=0.1), 0),
        (Sampling(0.7, top_p=1.0, min_p=0.0), 0),
        (Sampling(0.7, top_k=5), 1),
        (Sampling(0.7, top_p=0.5), 1),
        (Sampling(0.7, top_k=5, top_p=0.5, min_p=0.1), 1),
    ],
    ids=str,
)
def test_sorts_and_random_bits_only_where_asked_for(s, sorts):
    text = lowered(s).as_text()
    assert text.count("stablehlo.sort") == sorts
    assert "top_k" not in text
    assert "stablehlo.scatter" not in text
    assert ("stablehlo.xor" in text) == (not s.greedy)  # threefry


def test_xla_adds_no_second_sort():
    everything = Sampling(0.7, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.1, presence_penalty=1)
    assert str(lowered(everything).compile().as_text()).count(" sort(") == 1


def test_counts_hold_only_what_the_steps_read():
    ids, valid = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)
    assert jax.tree.leaves(init_counts(Steps.of([Sampling(0.7, top_k=5)]), ids, valid, V)) == []
    counted = init_counts(Steps.of([Sampling(presence_penalty=1.0)]), ids, valid, V)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(counted)] == [((B, V), jnp.int32)]
    both = init_counts(Steps.of([Sampling(repetition_penalty=1.1)]), ids, valid, V)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(both)] == [((B, V), jnp.bool_), ((B, V), jnp.int32)]


def test_counts_skip_padding_and_ids_out_of_range():
    ids = jnp.asarray(np.array([[0, 0, 5, 7], [3, -1, V, 3]], np.int32))
    valid = jnp.asarray(np.array([[False, False, True, True], [True] * 4]))
    counts = init_jit(ALL, ids, valid, V)
    assert [np.flatnonzero(row).tolist() for row in counts.prompt] == [[5, 7], [3]]
    for token in ([4, -1], [4, V], [6, V - 1]):
        counts = update_jit(ALL, counts, jnp.asarray(np.array(token, np.int32)))
    want = np.zeros((2, V), np.int32)
    want[0, 4], want[0, 6], want[1, V - 1] = 2, 1, 1
    np.testing.assert_array_equal(counts.generated, want)


def test_a_compiled_loop_is_the_oracle_step_by_step():
    """Twelve greedy steps under all three penalties in one scan: the counts steer the text."""
    n_steps = 12
    rows = [
        Sampling(repetition_penalty=1.3),
        Sampling(presence_penalty=1.5, frequency_penalty=0.7),
        Sampling(repetition_penalty=1.1, presence_penalty=-0.3, frequency_penalty=0.5),
        Sampling(),
    ]
    table = random_logits(40, (n_steps, V), scale=0.5)[:, None, :] + random_logits(41, (B, V))[None]
    table = table.astype(np.float32)
    prompts = np.random.default_rng(42).integers(0, V, (B, T)).tolist()
    steps = Steps.of(rows)
    v = values(steps, rows)

    @jax.jit
    def decode(counts, keys, table):
        def body(carry, z):
            counts, position = carry
            token, logprob = sample(steps, v, z, counts, step_keys(keys, position))
            return (update_counts(steps, counts, token), position + 1), (token, logprob)

        return jax.lax.scan(body, (counts, jnp.full((B,), T, jnp.int32)), table)[1]

    token, logprob = decode(batch_counts(steps, prompts, [[]] * B), row_keys(0, [0] * B), jnp.asarray(table))
    assert token.dtype == jnp.int32
    assert logprob.dtype == jnp.float32
    for b, s in enumerate(rows):
        text = []
        for z in table[:, b]:
            text.append(int(np.argmax(oracle.process(s, z, prompts[b], text).logits)))
        assert token[:, b].tolist() == text
    assert len(set(token[:, 1].tolist())) > len(set(token[:, 3].tolist()))


# -------------------------------------------------------------------------------------------------- log-probabilities


def test_logprob_is_of_the_raw_logits():
    """With one token left the filtered distribution says 0; what is reported is what the model said."""
    logits = random_logits(50)
    s = Sampling(0.1, top_k=1, repetition_penalty=2.0)
    counts = batch_counts(ALL, [[0]] * B, [[1]] * B)
    token, logprob = sample_jit(ALL, values(ALL, [s] * B), jnp.asarray(logits), counts, row_keys(0, range(B)))
    want = [oracle.log_softmax(z)[t] for z, t in zip(logits, token.tolist(), strict=True)]
    np.testing.assert_allclose(logprob, want, rtol=0, atol=U * (V + 8 + 4 * np.abs(logits).max()))
    assert (np.asarray(logprob) < -0.01).all()


@pytest.mark.parametrize("n", [0, 1, 5, V])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_top_logprobs(n, shift):
    """A common shift of 1e4 must not cost digits: it is a multiple of the grid, so the oracle has the same logits."""
    logits = random_logits(51, grid=2.0**-6) + np.float32(shift)
    ids, logprobs = jax.jit(top_logprobs, static_argnums=1)(jnp.asarray(logits), n)
    assert ids.shape == logprobs.shape == (B, n)
    for b in range(B):
        want = oracle.log_softmax(logits[b])
        order = sorted(range(V), key=lambda v: (-want[v], v))[:n]
        assert ids[b].tolist() == order
        np.testing.assert_allclose(logprobs[b], want[order], rtol=0, atol=U * (V + 8 + 4 * 12))


def test_top_logprobs_holds_what_greedy_reports():
    logits = jnp.asarray(random_logits(52))
    token, logprob = sample_jit(Steps(), {}, logits, Counts(), row_keys(0, range(B)))
    ids, logprobs = top_logprobs(logits, 3)
    assert ids[:, 0].tolist() == token.tolist()
    np.testing.assert_array_equal(logprobs[:, 0], logprob)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"temperature": -0.1}, "use 0.0 for greedy"),
        ({"temperature": math.nan}, "finite"),
        ({"temperature": math.inf}, "finite"),
        ({"temperature": "warm"}, "finite"),
        ({"top_k": 0}, "None to keep all"),
        ({"top_k": -1}, "use 1"),
        ({"top_k": 2.5}, "whole number"),
        ({"top_k": True}, "whole number"),
        ({"top_p": 0.0}, "top_k=1"),
        ({"top_p": 1.01}, "use 1.0"),
        ({"top_p": math.nan}, "finite"),
        ({"min_p": -0.1}, "use 0.0"),
        ({"min_p": 1.1}, "use 1.0"),
        ({"min_p": math.nan}, "finite"),
        ({"repetition_penalty": 0.0}, "use 1.0"),
        ({"repetition_penalty": -1.0}, "use 1.0"),
        ({"repetition_penalty": math.nan}, "finite"),
        ({"presence_penalty": 2.1}, "use 2.0"),
        ({"presence_penalty": -2.1}, "use -2.0"),
        ({"frequency_penalty": 3}, "use 2.0"),
        ({"frequency_penalty": math.nan}, "finite"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_a_choice_that_works(wrong, advice):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name) as raised:
        Sampling(**wrong)
    assert str(value) in str(raised.value)
    assert advice in str(raised.value)


def test_the_limits_themselves_are_accepted():
    Sampling(0, top_k=1, top_p=1, min_p=0, presence_penalty=-2, frequency_penalty=2)
    numpy: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float64(0.5)}
    assert Steps.of([Sampling(**numpy)]) == Steps(sampled=True, top_k=True, top_p=True)


def test_steps_are_the_union_of_the_rows():
    assert Steps.of([]) == Steps.of([Sampling(), Sampling(top_k=3, top_p=0.1, min_p=0.5)]) == Steps()
    assert Steps.of(MIXED) == ALL
    assert Steps.of([Sampling(0.5, top_p=1.0, min_p=0.0)]) == Steps(sampled=True)
    assert hash(Steps.of(MIXED)) == hash(ALL)


def test_misuse_is_named():
    row, steps = Sampling(0.7, top_k=3), Steps.of([Sampling(0.7)])
    with pytest.raises(ValueError, match="leave out top_k"):
        values(steps, [row])
    z, penalised = jnp.zeros((1, V), jnp.float32), Sampling(repetition_penalty=1.5)
    needs = Steps.of([penalised])
    with pytest.raises(ValueError, match="same Steps"):
        process(needs, values(needs, [penalised]), z, Counts())
    with pytest.raises(ValueError, match="same Steps"):
        update_counts(needs, Counts(), jnp.zeros((1,), jnp.int32))
    with pytest.raises(TypeError, match="float32"):
        process(Steps(), {}, z.astype(jnp.bfloat16), Counts())
    with pytest.raises(TypeError, match="float32"):
        top_logprobs(z.astype(jnp.bfloat16), 1)
    for n in (-1, V + 1):
        with pytest.raises(ValueError, match=f"logprobs={n}.*use"):
            top_logprobs(z, n)
    bad: Any  # the annotations refuse some of these already
    for bad in (-1, 2**64, 1.5, True):
        with pytest.raises(ValueError, match=r"seed=.*use"):
            row_keys(bad, [0])
    for bad in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match="sample index"):
            row_keys(0, [bad])
