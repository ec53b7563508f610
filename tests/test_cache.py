"""The KV cache as a product: every layout x codec x store, found by file name, against a python dict.

The dict holds what a row has been told, position -> (key, value), and nothing else. A run writes a ragged prompt, single
tokens (some rows done: padding), and several tokens at once, which may be more than the window. At every step two things are
held against the dict, through the attend that the engine hands to a block:
- which positions each query saw, how often: exactly those that the window allows, once each. Queries and keys of zero
  make all weights equal, and values that are one-hot in their position spell them out;
- what came out, against float64 attention over the dict's tokens, with the codec's own round trip applied to keys and
  values, new ones too: what a row gives does not hang on how many tokens are read at a time.

B batch, T new tokens, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle
from oracles.quantisation import symmetric, tie_width

from jaxengine import technique
from jaxengine.cache.base import CODECS, LAYOUTS, STORES, CachedAttend, Caching, PlainAttend, empty
from jaxengine.nn import Attention

U = 2.0**-24
LENGTH = 16  # tokens that a row may come to; also H, so that a one-hot value can spell any position
B, N, K, H = 3, 4, 2, LENGTH
WINDOWS = (2, 5, 100)
# tokens of each row, step by step: prompts, then decoding with rows that are done, then several at once
STEPS = ((8, 1, 3), (1, 1, 1), (1, 1, 0), (3, 2, 0), (1, 1, 1), (2, 3, 3))
WIDTHS = (8, 1, 1, 3, 1, 3)

CODEC_NAMES, LAYOUT_NAMES = technique.names(CODECS), technique.names(LAYOUTS)
# what an element may be off, of the largest magnitude that shares its scale
HALF_STEP = {"raw": 0.0, "int8": 1 / 254, "int4": 1 / 14}
products = [
    (Caching(layout, codec, store), window)
    for layout in LAYOUT_NAMES
    for codec in CODEC_NAMES
    for store in technique.names(STORES)
    for window in (None, *WINDOWS)
    if window is not None or layout == LAYOUT_NAMES[0]  # without a window the choice of layout has no say
    if window in (None, WINDOWS[0]) or codec == "raw"  # how a token is stored does not know the window
]
IDS = [f"{c.layout}-{c.codec}-{c.store}-{window}" for c, window in products]


layouts = [
    (layout, window)
    for layout in LAYOUT_NAMES
    for window in (None, 1, *WINDOWS)
    if window is not None or layout == "full"
]


def attending(window: int | None) -> Attention:
    return Attention(N, K, H, scale=0.3, window=window, softcap=3.0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(caching: Caching, attention: Attention, fresh: bool, positions: Any, lengths: Any, qkv: Any, kv: Any) -> Any:
    return CachedAttend(caching, positions, lengths, fresh)(attention, *qkv, kv)


def tokens(seed: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))  # type: ignore[return-value]


def spelled(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zero queries and keys, values one-hot in their position."""
    T = positions.shape[1]
    v = (positions[:, :, None] == np.arange(H)).astype(np.float32)
    return np.zeros((B, T, N, H), np.float32), np.zeros((B, T, K, H), np.float32), np.repeat(v[:, :, None], K, axis=2)


@functools.partial(jax.jit, static_argnums=0)
def round_trip(codec: str, x: Any) -> Any:
    """Tokens [B, T, K, H] as they are read back."""
    module = technique.find(CODECS, codec)
    return module.decode(module.encode(x.swapaxes(1, 2)), x.dtype).swapaxes(1, 2)


class Rows:
    """What each row was told: position -> (key [K, H], value [K, H])."""

    def __init__(self) -> None:
        self.told: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(B)]

    def positions(self, counts: tuple[int, ...], T: int, *, left: bool = False) -> np.ndarray:
        """Of the next tokens of each row, -1 for padding on the right, or on the left."""
        n = np.array(counts)[:, None]
        i = np.arange(T) - (T - n) * left
        start = np.array([len(row) for row in self.told])[:, None]
        return np.where((i >= 0) & (i < n), start + i, -1).astype(np.int32)

    def tell(self, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        for b, t in zip(*np.nonzero(positions >= 0), strict=True):
            self.told[b][int(positions[b, t])] = (k[b, t], v[b, t])

    def check_attended(self, out: Any, attention: Attention, q: np.ndarray, positions: np.ndarray) -> None:
        """float64 attention over all that each row was told; an implementation may sum over 2 LENGTH slots."""
        assert np.isfinite(out).all()
        how: dict[str, Any] = {"scale": attention.scale, "window": attention.window, "softcap": attention.softcap}
        for b, row in enumerate(self.told):
            at = sorted(row)
            k, v = (np.stack([row[p][i] for p in at], axis=1)[None] for i in (0, 1))
            one = slice(b, b + 1)
            wanted = oracle.attention(q[one], k, v, positions[one], [at], summed=2 * LENGTH, **how)
            defined = ~np.isnan(wanted.out[0])
            assert defined.any(axis=(1, 2)).tolist() == (positions[b] >= 0).tolist()
            assert (abs(np.asarray(out)[b] - wanted.out[0])[defined] <= wanted.bound[0][defined]).all(), f"row {b}"

    def check_seen(self, out: Any, positions: np.ndarray, window: int | None) -> None:
        """Each query saw what the window allows of what its row was told, once each: all weights are 1 / (how many)."""
        for b, t in zip(*np.nonzero(positions >= 0), strict=True):
            p = int(positions[b, t])
            allowed = [r for r in self.told[b] if oracle.sees(p, r, window)]
            assert p in allowed
            wanted = np.broadcast_to(np.isin(np.arange(H), allowed) / len(allowed), (N, H))
            # a division, and a codec's two roundings of 1; a position seen twice would be off by 1 / 17 at least
            np.testing.assert_allclose(out[b, t], wanted, rtol=0, atol=8 * U, err_msg=f"row {b}, query {p}")


@pytest.mark.parametrize(("caching", "window"), products, ids=IDS)
@pytest.mark.some_rows
def test_attends_to_what_was_told(caching: Caching, window: int | None) -> None:
    attention = attending(window)
    rows, spelled_rows = Rows(), Rows()
    kv, spelled_kv = (empty(caching, attention, B, LENGTH, jnp.float32) for _ in range(2))
    lengths = jnp.zeros(B, jnp.int32)
    for i, (counts, T) in enumerate(zip(STEPS, WIDTHS, strict=True)):
        positions = rows.positions(counts, T, left=i % 2 == 1)
        go = functools.partial(run, caching, attention, i == 0, jnp.asarray(positions), lengths)

        q, k, v = tokens(i, T)
        back = [np.asarray(round_trip(caching.codec, jnp.asarray(x))) for x in (k, v)]
        rows.tell(positions, *back)
        out, kv = go((q, k, v), kv)
        rows.check_attended(out, attention, q, positions)

        q, k, v = spelled(positions)
        spelled_rows.tell(positions, k, v)
        out, spelled_kv = go((q, k, v), spelled_kv)
        spelled_rows.check_seen(out, positions, window)
        lengths = lengths + jnp.asarray(counts, jnp.int32)


@pytest.mark.parametrize(("name", "window"), layouts)
def test_a_layout_answers_with_positions(name: str, window: int | None) -> None:
    """Slots and positions alone, written one token or several at a time: a slot that claims position p holds token p,
    no position stands twice, and the window before the next token is there."""
    layout = technique.find(LAYOUTS, name)
    S = layout.num_slots(LENGTH, window)
    assert 0 < S <= LENGTH
    for sizes in ((1,) * LENGTH, (9, 1, 1, 5), (LENGTH,), (3,) * 5):
        held = np.full(S, -1)
        length = 0
        assert (np.asarray(layout.positions(jnp.array([0], jnp.int32), S)) == -1).all()
        for size in sizes:
            new = np.arange(length, length + size, dtype=np.int32)
            length += size
            padded = jnp.asarray(np.concatenate([new, [-1, -1]])[None], jnp.int32)
            where = np.asarray(layout.slots(padded, jnp.array([length], jnp.int32), S))[0]
            assert (where[-2:] >= S).all()
            taken = where[:-2][where[:-2] < S]
            assert len(set(taken.tolist())) == len(taken)
            assert (where >= 0).all()
            held[taken] = new[where[:-2] < S]
            claimed = np.asarray(layout.positions(jnp.array([length], jnp.int32), S))
            assert (claimed.shape, claimed.dtype) == ((1, S), np.int32)
            there = claimed[0] >= 0
            np.testing.assert_array_equal(held[there], claimed[0][there])
            assert len(set(claimed[0][there].tolist())) == there.sum()
            needed = range(max(0, length - (window or LENGTH)), length)
            assert set(needed) <= set(claimed[0].tolist())
            if layout.CAN_REWIND:  # nothing that a shorter row would need has gone
                assert set(range(length)) <= set(claimed[0].tolist())


@pytest.mark.parametrize(("name", "window"), layouts)
def test_holds_is_true(name: str, window: int | None) -> None:
    """Where a layout says that T tokens can be written before they are read, their windows are all there afterwards."""
    layout = technique.find(LAYOUTS, name)
    S = layout.num_slots(LENGTH, window)
    assert layout.holds(1, S, window)  # decoding reads what it has written: one pass over the cache, not a copy of it
    for T in range(1, 8):
        if not layout.holds(T, S, window):
            continue
        for before in range(LENGTH - T + 1):
            there = set(np.asarray(layout.positions(jnp.array([before + T], jnp.int32), S))[0].tolist())
            first = before - (window or LENGTH) + 1
            assert set(range(max(0, first), before + T)) <= there, f"{T} tokens after {before}"


@pytest.mark.parametrize(("caching", "window"), products, ids=IDS)
def test_padding_writes_nothing(caching: Caching, window: int | None) -> None:
    attention = attending(window)
    kv = empty(caching, attention, B, LENGTH, jnp.float32)
    rows = Rows()
    positions = rows.positions(STEPS[0], 8)
    _, kv = run(caching, attention, True, positions, jnp.zeros(B, jnp.int32), tokens(0, 8), kv)
    for T in (1, 3):
        nothing = np.full((B, T), -1, np.int32)
        out, after = run(caching, attention, False, nothing, jnp.asarray(STEPS[0], jnp.int32), tokens(1, T), kv)
        assert np.isfinite(out).all()
        for x, y in zip(jax.tree.leaves(kv), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(x, y)


rewinding = [(c, window) for c, window in products if c.layout_for(attending(window)).CAN_REWIND]


@pytest.mark.parametrize(("caching", "window"), rewinding, ids=[f"{c.layout}-{c.codec}-{w}" for c, w in rewinding])
def test_what_can_rewind_forgets(caching: Caching, window: int | None) -> None:
    """Write on, set `lengths` back, write something else: the same bits as never having written."""
    attention = attending(window)
    start = jnp.asarray(STEPS[0], jnp.int32)
    kv = empty(caching, attention, B, LENGTH, jnp.float32)
    _, kv = run(caching, attention, True, Rows().positions(STEPS[0], 8), jnp.zeros(B, jnp.int32), tokens(0, 8), kv)

    def on(kv: Any, T: int, seed: int) -> Any:
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        return run(caching, attention, False, positions, start, tokens(seed, T), kv)

    rejected = on(kv, 3, seed=1)[1]
    for T in (1, 3):
        found, wanted = on(rejected, T, seed=2)[0], on(kv, T, seed=2)[0]
        np.testing.assert_array_equal(found, wanted)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(rejected), jax.tree.leaves(kv), strict=True))


def test_attends_in_the_plans_dtype() -> None:
    attention = attending(5)
    for codec in CODEC_NAMES:
        caching = Caching("window", codec)
        kv = empty(caching, attention, B, LENGTH, jnp.bfloat16)
        lengths = jnp.zeros(B, jnp.int32)
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in tokens(0, 1))
        out, after = run(caching, attention, False, jnp.zeros((B, 1), jnp.int32), lengths, (q, k, v), kv)
        assert out.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, kv)
        # one token is all there is to see: its value comes back, rounded by the codec and to bfloat16
        wanted = np.repeat(np.asarray(v, np.float64), N // K, axis=2)
        error = abs(np.asarray(out, np.float64) - wanted)
        assert (error <= abs(wanted).max(-1, keepdims=True) * (HALF_STEP[codec] + 2.0**-7)).all()


@pytest.mark.parametrize("window", [None, 3])
def test_plain_attend_is_attention_among_the_tokens(window: int | None) -> None:
    attention, rows = attending(window), Rows()
    positions = rows.positions((5, 1, 3), 5)
    q, k, v = tokens(0, 5)
    rows.tell(positions, k, v)
    out, kept = PlainAttend(jnp.asarray(positions))(attention, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ())
    assert kept == ()
    rows.check_attended(out, attention, q, positions)


# --- shapes, and what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("caching", "window"), products, ids=IDS)
def test_an_empty_cache_is_known_without_arrays(caching: Caching, window: int | None) -> None:
    attention = attending(window)
    make = functools.partial(empty, caching, attention, B, LENGTH, jnp.bfloat16)
    planned, made = jax.eval_shape(make), make()
    assert jax.tree.structure(planned) == jax.tree.structure(made)
    S = caching.layout_for(attention).num_slots(LENGTH, window)
    for p, m in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert (p.shape, p.dtype) == (m.shape, m.dtype)
        assert p.shape[:3] == (B, K, S)
    assert set(made) == {"k", "v"}
    assert not any(np.asarray(x).astype(np.float32).any() for x in jax.tree.leaves(made))


def test_bytes_of_a_cache() -> None:
    def size(caching: Caching, window: int | None) -> int:
        shapes = jax.eval_shape(lambda: empty(caching, attending(window), B, 1000, jnp.bfloat16))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    slots = 2 * B * K
    assert size(Caching(), None) == slots * 1000 * H * 2
    assert size(Caching("full"), 50) == slots * 1000 * H * 2
    assert size(Caching("window"), 50) == slots * 50 * H * 2
    assert size(Caching("window"), 5000) == slots * 1000 * H * 2  # no more slots than tokens
    assert size(Caching("window", "int8"), 50) == slots * 50 * (H + 4)
    assert size(Caching("window", "int4"), 50) == slots * 50 * (H // 2 + 8)


def test_layers_that_see_all_tokens_keep_all() -> None:
    full = technique.find(LAYOUTS, "full")
    assert Caching("window").layout_for(attending(None)) is full
    assert Caching("full").layout_for(attending(4)) is full
    assert Caching("window").layout_for(attending(4)) is technique.find(LAYOUTS, "window")


def test_a_window_layout_needs_a_window() -> None:
    with pytest.raises(ValueError, match=r"sliding window.*'full'"):
        technique.find(LAYOUTS, "window").num_slots(10, None)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [({"layout": "windw"}, "window"), ({"codec": "int88"}, "int8"), ({"store": "devices"}, "device")],
)
def test_an_unknown_choice_is_refused_with_the_nearest(wrong: dict[str, str], near: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean {near!r}"):
        Caching(**wrong)


# --- codecs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_codec_keeps_each_token_apart(name: str, dtype: str) -> None:
    codec = technique.find(CODECS, name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), dtype).at[1, 2, 3].set(0)
    stored = codec.encode(x)
    back = codec.decode(stored, x.dtype)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert (back[1, 2, 3] == 0).all()
    for leaf in jax.tree.leaves(stored):
        assert leaf.shape[:3] == (2, 3, 5)
    alone = codec.encode(x[1:, 1:2, 2:4])
    part = jax.tree.map(lambda a: a[1:, 1:2, 2:4], stored)
    jax.tree.map(np.testing.assert_array_equal, alone, part)


def test_the_raw_codec_is_exact() -> None:
    raw = technique.find(CODECS, "raw")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), jnp.bfloat16)
    np.testing.assert_array_equal(raw.decode(raw.encode(x), jnp.bfloat16), x)


def steps(codec: str, stored: Any, width: int) -> np.ndarray:
    """The scale of each element."""
    s = np.asarray(stored["scale"], np.float64)
    return s[..., None] if codec == "int8" else np.repeat(s, width // 2, axis=-1)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-37, 1e-42, 1e38])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_are_off_by_half_a_step(codec: str, scale: float) -> None:
    """s / 2, and two roundings relative to at most 127 s: of x / s and of q s."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(2, 3, 5, 8)).astype(np.float32) * np.float32(scale)
    x[..., 4:] *= np.float32(0.01)  # int4's halves each have a scale
    module = technique.find(CODECS, codec)
    stored = module.encode(jnp.asarray(x))
    back = np.asarray(module.decode(stored, jnp.float32), np.float64)
    off, s = abs(x - back), steps(codec, stored, 8)
    assert (off <= s * (0.5 + 2 * 127 * U)).all()
    if scale == 1.0 and codec == "int4":
        assert (off[..., 4:] <= 0.01 * (HALF_STEP[codec] + 2 * 7 * U)).all()


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
def test_codes_are_the_float64_quantisers(codec: str, levels: int) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 50, 8)).astype(np.float32)
    stored = technique.find(CODECS, codec).encode(jnp.asarray(x))
    grouped = x.reshape(2, 3, 50, 1 if codec == "int8" else 2, -1)
    wanted = symmetric(grouped, (4,), levels)
    codes = np.asarray(stored["codes"])
    if codec == "int4":  # a byte holds element h of the first half in its low bits, and of the second in its high ones
        codes = np.concatenate([codes % 16, codes // 16], -1).astype(np.int64) - 8
    decided = wanted.slack > tie_width(levels)
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(codes.reshape(grouped.shape)[decided], wanted.codes[decided])
    np.testing.assert_allclose(
        np.asarray(stored["scale"]).reshape(2, 3, 50, -1), wanted.scale[..., 0], rtol=4 * U, atol=0
    )


def test_int4_takes_an_even_width() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 5.*int8"):
        technique.find(CODECS, "int4").encode(jnp.zeros((1, 1, 1, 5)))


# --- stores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", technique.names(STORES))
def test_a_store_puts_tokens_where_it_is_told(name: str) -> None:
    """Against a loop; a slot outside [0, S), on either side, takes nothing."""
    store = technique.find(STORES, name)
    B, K, S, T = 2, 3, 5, 4
    shapes = {
        "codes": jax.ShapeDtypeStruct((B, K, S, 2), jnp.int8),
        "scale": jax.ShapeDtypeStruct((B, K, S), jnp.float32),
    }
    slots = store.make(shapes)
    expected = {n: np.zeros(s.shape, s.dtype) for n, s in shapes.items()}
    rng = np.random.default_rng(0)
    write = jax.jit(store.write)
    for where in ([[3, 0, 5, 4], [1, 2, 3, 0]], [[-1, 7, 3, -5], [5, 5, 5, 4]], [[5] * 4, [6] * 4]):
        new = {n: rng.integers(1, 100, (B, K, T, *s.shape[3:])).astype(s.dtype) for n, s in shapes.items()}
        slots = write(slots, new, jnp.asarray(where, jnp.int32))
        for b in range(B):
            for t in range(T):
                if 0 <= where[b][t] < S:
                    for n in new:
                        expected[n][b, :, where[b][t]] = new[n][b, :, t]
        jax.tree.map(np.testing.assert_array_equal, store.read(slots), expected)
