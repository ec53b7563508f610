"""Attention of few queries over a long cache: its meaning against numpy float64 loops, and the form in blocks against it.

`tests/oracles/attention.py` is loops over rows, queries and heads. What it does not know (sinks, the log-sum-exp) is a
matrix of scores for each row and head in float64. Codes are made into numbers by loops of their own, from the bytes; pages
are followed by a loop over slots.

Tolerances are derived: the oracle's own bound for inputs that are exact in float32, with the result rounded once to its dtype
(u), where numbers stand for the codes exactly: a code times a scale is one rounding more of a key and a value (U each), and the
scale multiplied after the product is as many. A log-sum-exp is within the scores' bound and a few roundings.

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attention as oracle

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import decode_attention, tiles, xla

U, F = oracle.U, oracle.FUNCTION
NEVER = float(np.float32(-1e30))
QUICK = {"xla_backend_optimization_level": 0}  # half of the seconds


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int, int]  # B T S N K H
    kind: str = "raw"
    page: int | None = None
    dtype: str = "float32"
    places: str = "ragged"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        how = [f"page{self.page}"] * bool(self.page) + [f"window{self.window}"] * bool(self.window)
        how += [f"cap{self.softcap}"] * bool(self.softcap) + ["sinks"] * self.sinks
        return "-".join([self.dtype, self.kind, "x".join(map(str, self.shape)), self.places, *how])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a call by name, and what they mean: keys and values in float64 by row, and where they stand."""

    arrays: dict[str, Any]
    k: np.ndarray
    v: np.ndarray
    k_at: np.ndarray
    how: dict[str, Any]


def coded(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: Any) -> tuple[Any, Any, np.ndarray]:
    """Codes, scales, and the numbers that they stand for, in float64; from random bytes, not from an encoder."""
    *outer, H = shape
    if kind == "raw":
        x = rng.normal(size=shape).astype(dtype)
        return x, None, x.astype(np.float64)
    if kind == "int8":
        codes = rng.integers(-127, 128, shape).astype(np.int8)
        scale = rng.uniform(0.004, 0.03, outer).astype(np.float32)
        return codes, scale, codes * scale[..., None].astype(np.float64)
    codes = rng.integers(0, 256, (*outer, H // 2)).astype(np.uint8)
    scale = rng.uniform(0.08, 0.4, (*outer, 2)).astype(np.float32)
    numbers = np.empty(shape)
    for h in range(H):
        byte = codes[..., h % (H // 2)]
        numbers[..., h] = ((byte >> 4 if h >= H // 2 else byte & 15) - 8.0) * scale[..., h // (H // 2)]
    return codes, scale, numbers


def inputs(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    B, T, S, N, K, H = case.shape
    dtype = np.dtype(ml_dtypes.bfloat16) if case.dtype == "bfloat16" else np.dtype(case.dtype)
    lengths = np.array([S, 0, 1, S // 2, S - 1])[np.arange(B) % 5]
    at = np.where(np.arange(S) < lengths[:, None], np.arange(S), -1)
    q_at = np.maximum(lengths[:, None] - T + np.arange(T), -1)
    if case.places == "ring":  # position p stands in slot p mod S, and some rows have gone round
        lengths = rng.integers(S, 3 * S, B)
        last = lengths[:, None] - 1
        at = last - (last - np.arange(S)) % S
        q_at = last - T + 1 + np.arange(T)
    elif case.places == "any lengths":
        lengths = rng.integers(0, S + 1, B)
        at = np.where(np.arange(S) < lengths[:, None], np.arange(S), -1)
        q_at = np.maximum(lengths[:, None] - T + np.arange(T), -1)
    elif case.places == "any":
        at, q_at = rng.integers(-1, S, (B, S)), rng.integers(-1, S, (B, T))
    shape: tuple[int, ...] = (B, K, S, H)
    if case.page is not None:
        assert case.places in ("ragged", "any lengths")
        M = -(-S // case.page)
        shape = (B * M + 1, K, case.page, H)
    (k, ks, k_means), (v, vs, v_means) = (coded(rng, shape, case.kind, dtype) for _ in range(2))
    arrays: dict[str, Any] = {"q": rng.normal(size=(B, T, N, H)).astype(dtype), "k": k, "v": v}
    arrays |= {"q_positions": q_at.astype(np.int32)} | ({} if ks is None else {"k_scale": ks, "v_scale": vs})
    if case.page is None:
        arrays["k_positions"] = at.astype(np.int32)
    else:
        table = rng.permutation(B * M + 1)[: B * M].reshape(B, M)
        by_row = np.zeros((2, B, K, S, H))
        for b in range(B):
            for s in range(S):
                by_row[:, b, :, s] = [a[table[b, s // case.page], :, s % case.page] for a in (k_means, v_means)]
            table[b, -(-lengths[b] // case.page) :] = rng.choice([-1, 10**6])  # what is not looked at
        k_means, v_means = by_row
        arrays |= {"page_table": table.astype(np.int32), "lengths": lengths.astype(np.int32)}
    if case.sinks:
        arrays["sinks"] = rng.normal(size=N).astype(np.float32)
    how = {"scale": 1.3 / H**0.5, "window": case.window, "softcap": case.softcap}
    return Inputs(arrays, k_means, v_means, at, how)


def wanted(x: Inputs, blocks: int, u: float = U) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out and lse in float64, with sinks, and how far each may be off; zeros and -1e30 where a query sees nothing.

    blocks: that a row is summed over, each of which scales what was summed before; u: what weights are rounded to.
    """
    q = np.asarray(x.arrays["q"], np.float64)
    B, _, N, H = q.shape
    S, G = x.k.shape[2], N // x.k.shape[1]
    k, v = (np.repeat(a, G, 1) for a in (x.k, x.v))
    y, size = (np.einsum("btnh,bnsh->btns", f(q), f(k)) * x.how["scale"] for f in (lambda a: a, abs))
    e = (H + 6) * U * size
    if (cap := x.how["softcap"]) is not None:
        y, e = cap * np.tanh(y / cap), e + 3 * U * abs(y) + (2 * F + 3 * U) * cap
    e = e + 4 * U * abs(y)  # to the base 2, and back in the exponent
    q_at, k_at = x.arrays["q_positions"], x.k_at
    pairs = [[[oracle.sees(p, r, x.how["window"]) for r in k_at[b]] for p in q_at[b]] for b in range(B)]
    seen = np.array(pairs)[:, :, None]
    y, e = np.where(seen, y, -np.inf), np.where(seen, e, 0)
    sink = np.asarray(x.arrays.get("sinks", np.full(N, -np.inf)), np.float64)[None, None]
    top = np.maximum(y.max(-1), sink)
    some = np.isfinite(top)
    top = np.where(some, top, 0)
    mass = np.exp(y - top[..., None])
    total = np.where(some, mass.sum(-1) + np.exp(sink - top), 1)
    w = mass / total[..., None]
    out = np.einsum("btns,bnsh->btnh", w, v)
    lse = np.where(some, top + np.log(total), NEVER)
    spread = e.max(-1) + U * np.where(seen, abs(y - top[..., None]), 0).max(-1, initial=0, where=seen)
    relative = np.expm1(2 * spread + (blocks + 3) * (F + 4 * U) + (S + 2) * U)
    magnitude = np.einsum("btns,bnsh->btnh", w, abs(v))
    e_out = magnitude * (relative[..., None] + u + (S + 4) * U) * (1 + relative[..., None])
    info = ml_dtypes.finfo(x.arrays["q"].dtype)
    e_out = e_out + float(info.eps) / 2 * (abs(out) + e_out)
    e_out = e_out + float(info.tiny) * (1 + np.einsum("btns,bnsh->btnh", seen * np.ones_like(w), abs(v)))
    return out, np.where(some, lse, NEVER), e_out, np.where(some, relative + F + 4 * U * (1 + abs(lse)), 0)


def agrees(found: Any, x: Inputs, blocks: int, u: float = U) -> None:
    out, lse, e_out, e_lse = wanted(x, blocks, u)
    assert (found[0].shape, found[0].dtype) == (x.arrays["q"].shape, x.arrays["q"].dtype)
    assert (found[1].shape, found[1].dtype) == (out.shape[:3], np.float32)
    for name, got, value, bound in (("out", found[0], out, e_out), ("lse", found[1], lse, e_lse)):
        got = np.asarray(got, np.float64)
        assert np.isfinite(got).all(), name
        off = abs(got - value) - bound
        at = np.unravel_index(np.argmax(off), off.shape)
        assert (off <= 0).all(), f"{name}{list(map(int, at))} is {got[at]}, should be {value[at]} +- {bound[at]}"
        blind = lse == NEVER
        assert (got[blind] == (0 if name == "out" else NEVER)).all()


def served(x: Inputs, function: Any, **how: Any) -> Any:
    names, values = list(x.arrays), list(x.arrays.values())
    call = jax.jit(lambda *a: function(**dict(zip(names, a, strict=True)), **x.how, return_lse=True, **how))
    return call.lower(*values).compile(compiler_options=QUICK)(*values)


CASES = [
    Case((5, 1, 37, 4, 2, 8)),
    Case((2, 3, 20, 6, 3, 8), window=5, softcap=2.0),
    Case((3, 2, 16, 4, 4, 4), places="ring", window=16, sinks=True),
    Case((2, 4, 24, 4, 1, 4), places="any", softcap=3.0, sinks=True),
    Case((5, 1, 1, 2, 1, 4)),
    Case((5, 1, 37, 4, 2, 8), "int8"),
    Case((4, 2, 30, 4, 2, 10), "int4", window=9),
    Case((3, 2, 16, 2, 1, 8), "int8", places="ring", window=12, sinks=True),
    Case((5, 1, 40, 4, 2, 8), page=16),
    Case((4, 3, 37, 4, 2, 8), "int8", page=4, window=7, softcap=2.0),
    Case((5, 2, 21, 4, 2, 8), "int4", page=8, sinks=True),
    Case((2, 1, 33, 8, 2, 16), dtype="bfloat16"),
    Case((2, 2, 33, 4, 2, 16), "int8", dtype="bfloat16", softcap=3.0),
    Case((2, 1, 33, 4, 2, 16), "int4", page=16, dtype="float16", window=20),
    *(Case((3, 1, 150, 4, 2, 16), kind, page=64) for kind in ("raw", "int8", "int4")),
    Case((3, 2, 75, 4, 2, 8), "int8", page=12, window=20),
    Case((2, 1, 700, 2, 1, 8), page=600),  # wider than a block
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.some_rows
def test_the_meaning_and_the_form_in_blocks(case: Case) -> None:
    """Both against float64; blocks of a few slots, which do not divide, so that rows are summed over several."""
    x = inputs(case)
    agrees(served(x, decode_attention, implementation="reference"), x, blocks=1)
    at_once = case.page or 7
    agrees(served(x, xla.decode_attention, at_once=at_once), x, blocks=-(-x.k.shape[2] // at_once))


@pytest.mark.parametrize("case", CASES[:1] + CASES[5:6] + CASES[9:10] + CASES[-1:], ids=str)
def test_what_serves_here_is_one_of_them(case: Case) -> None:
    x = inputs(case)
    u = float(ml_dtypes.finfo(x.arrays["q"].dtype).eps) / 2
    agrees(served(x, decode_attention), x, blocks=2, u=u)


def test_the_oracles_agree() -> None:
    """Loops, and scores as a matrix."""
    case = Case((3, 2, 12, 4, 2, 4), window=5, softcap=2.0)
    x = inputs(case)
    at = x.arrays["q_positions"], x.k_at
    loops = oracle.attention(x.arrays["q"], x.k, x.v, *at, **x.how).out
    out, lse, *_ = wanted(x, 1)
    defined = ~np.isnan(loops)
    assert (defined[..., 0] == (lse != NEVER)).all()
    np.testing.assert_allclose(out[defined], loops[defined], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_sink_of_minus_infinity_is_none(implementation: str) -> None:
    """Of one head, in a row that sees nothing too."""
    x = inputs(Case((3, 2, 24, 4, 2, 4), places="any", sinks=True))
    x.arrays["sinks"][0] = -np.inf
    x.arrays["q_positions"][0] = -1
    agrees(served(x, decode_attention, implementation=implementation), x, blocks=3)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["raw", "int8", "int4"]))
    page = data.draw(st.sampled_from([None, 4, 16]))
    K, G = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)), K * G, K, 4)
    places = "ragged" if page else data.draw(st.sampled_from(["ragged", "ring", "any"]))
    case = Case(
        shape, kind, page, places=places, window=data.draw(st.sampled_from([None, 1, 6])),
        softcap=data.draw(st.sampled_from([None, 2.0])), sinks=data.draw(st.booleans()),
    )  # fmt: skip
    x = inputs(case, data.draw(st.integers(0, 1000)))
    at_once = page or 5
    agrees(served(x, xla.decode_attention, at_once=at_once), x, blocks=-(-x.k.shape[2] // at_once))


def poisoned(x: Inputs, block: int, first: np.ndarray, end: np.ndarray) -> Inputs:
    """NaN in every slot of a raw contiguous cache outside of blocks [first, end) of its row."""
    slot = np.arange(x.k.shape[2]) // block
    outside = ((slot < first[:, None]) | (slot >= end[:, None]))[:, None, :, None]
    arrays = x.arrays | {n: np.where(outside, np.nan, x.arrays[n]).astype(np.float32) for n in ("k", "v")}
    return dataclasses.replace(x, arrays=arrays)


def test_blocks_that_no_row_sees_are_not_read() -> None:
    case = Case((2, 1, 64, 2, 1, 4), window=9)
    x = inputs(case)
    for name in ("k_positions", "q_positions"):  # both rows hold 20 tokens
        x.arrays[name] = np.minimum(x.arrays[name][:1].repeat(2, 0), 19 if name[0] == "q" else 10**6)
    x.arrays["k_positions"] = np.where(x.arrays["k_positions"] < 20, x.arrays["k_positions"], -1)
    x = dataclasses.replace(x, k_at=x.arrays["k_positions"])
    span = tiles.spans(jnp.asarray(x.arrays["q_positions"]), jnp.asarray(x.k_at), 9, 8)
    assert np.asarray(span.first).tolist() == [1, 1]
    assert np.asarray(span.end).tolist() == [3, 3]
    agrees(served(poisoned(x, 8, *map(np.asarray, span)), xla.decode_attention, at_once=8), x, blocks=8)


def test_a_step_of_the_coded_cache_makes_no_copy_of_it() -> None:
    """The form in blocks, compiled for what runs here: temporaries of a block, not of the cache."""
    B, T, S, N, K, H = 1, 1, 16384, 4, 2, 64
    like = jax.ShapeDtypeStruct
    codes, scales = like((B, K, S, H), jnp.int8), like((B, K, S), jnp.float32)
    call = jax.jit(lambda q, k, v, ks, vs, q_at, k_at: decode_attention(
        q, k, v, q_at, k_at, k_scale=ks, v_scale=vs, scale=0.1))  # fmt: skip
    at = like((B, T), jnp.int32), like((B, S), jnp.int32)
    program = call.lower(like((B, T, N, H), jnp.float32), codes, codes, scales, scales, *at).compile()
    assert program.memory_analysis().temp_size_in_bytes < codes.size  # a decoded k or v is four times this


# ---- spans, splits, and bytes


def test_spans_and_parts_cover_what_is_seen_once() -> None:
    rng = np.random.default_rng(0)
    for window in (None, 10):
        for _ in range(20):
            B, T, S, block = 3, int(rng.integers(1, 3)), 50, 8
            k_at, q_at = rng.integers(-1, 40, (B, S)), rng.integers(-1, 40, (B, T))
            ordered = rng.random() < 0.5
            if ordered:
                k_at = np.sort(k_at)
            span = tiles.spans(jnp.asarray(q_at, jnp.int32), jnp.asarray(k_at, jnp.int32), window, block)
            splits = int(rng.integers(1, 6))
            first, end = (np.asarray(a) for a in tiles.parts(span, splits))
            for b in range(B):
                seen = [any(oracle.sees(int(p), int(r), window) for p in q_at[b]) for r in k_at[b]]
                blocks = sorted({s // block for s in range(S) if seen[s]})
                walked = [j for s in range(splits) for j in range(first[b, s], end[b, s])]
                assert walked == sorted(set(walked))
                assert set(blocks) <= set(walked)
                if ordered and (window is None or T == 1):  # then they are exact
                    assert walked == (list(range(blocks[0], blocks[-1] + 1)) if blocks else [])


def test_bytes_read_are_the_least_but_for_ends_of_blocks() -> None:
    """Codes and scales once, of what each row sees; positions beside them are 4 bytes of hundreds."""
    lengths, K, H, block, window = np.array([8192, 3000, 100, 0]), 8, 128, 64, 1024
    S = 8192
    at = jnp.asarray(np.where(np.arange(S) < lengths[:, None], np.arange(S), -1), jnp.int32)
    q_at = jnp.asarray(lengths[:, None] - 1, jnp.int32)
    for w in (None, window):
        first, end = tiles.parts(tiles.spans(q_at, at, w, block), 16)
        for kind in ("raw", "int8", "int4"):
            held = np.minimum(lengths, w or S)
            least = int(held.sum()) * K * tiles.slot_bytes(H, kind)
            read = tiles.bytes_read(first, end, K=K, H=H, kind=kind, block=block)
            assert least <= read
            assert read <= least * (1 + 4 / tiles.slot_bytes(H, kind)) + 2 * len(lengths) * block * K * (
                tiles.slot_bytes(H, kind) + 4
            )
        assert int(np.asarray(end - first)[3].sum()) == 0
    assert tiles.slot_bytes(128, "int8") == 2 * (128 + 4)
    assert tiles.slot_bytes(128, "int4") == 2 * (64 + 8)


def test_splits_fill_the_card() -> None:
    """The longest of the programs, in waves of all that stand on 132 cores at a time, is near what dividing evenly would give."""
    config, at_once = tiles.Config(64, 8, 4, 2), 132 * tiles.RESIDENT
    assert tiles.splits(64, 8, config, 132) == 1  # one block
    for programs in (1, 8, 32, 100, 270, 1000):
        for S in (8192, 2**17):
            n, blocks = tiles.splits(S, programs, config, 132), S // 64
            assert blocks // n >= tiles.FEWEST
            waves = -(-n * programs // at_once)
            even = max(blocks * programs / at_once, tiles.FEWEST)
            assert n == tiles.MOST_SPLITS or waves * -(-blocks // n) <= 1.35 * even


# ---- what is refused


def test_refusals_and_errors_say_what_to_do() -> None:
    x = inputs(Case((2, 1, 8, 4, 2, 8), "int8")).arrays
    call = functools.partial(decode_attention, scale=1.0)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"v_scale": None}, "k_scale is given without v_scale"),
        ({"k_scale": None, "v_scale": None}, r"k is int8 \[2, 2, 8, 8\] without k_scale"),
        ({"k_positions": None}, "two ways"),
        ({"lengths": np.zeros(2, np.int32)}, "two ways"),
        ({"k_scale": np.zeros((2, 2, 7), np.float32)}, r"k_scale is float32 \[2, 2, 7\].*it is \[2, 2, 8\]"),
        ({"q": np.zeros((2, 1, 3, 8), np.float32)}, "3 query heads do not divide into 2"),
        ({"q_positions": np.zeros((2, 2), np.int32)}, "q_positions"),
        ({"window": 0}, "window is 0"), ({"softcap": 0.0}, "softcap is 0.0"),
        ({"implementation": "tritn"}, "there is no implementation 'tritn'"),
    )  # fmt: skip
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(**(x | changed))
    with pytest.raises(dispatch.Refused, match="'xla' serves codes"):
        call(**x, implementation="plain")
    with pytest.raises(dispatch.Refused, match="there is no GPU"):
        call(**x, implementation="triton")
    odd = inputs(Case((1, 1, 8, 2, 1, 8), "int4")).arrays
    with pytest.raises(ValueError, match="head_dim is 7"):
        call(**(odd | {"q": np.zeros((1, 1, 2, 7), np.float32)}))
