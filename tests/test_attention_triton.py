"""The tiled attention kernels as they are written, interpreted on the CPU, against numpy float64.

The oracle computes attention densely and its gradient by the chain rule (finite differences agree), and beside each number how
far an implementation of the kernels' arithmetic may be from it, by running error analysis: inputs are exact; scores, sums
and exponentials are float32; softmax's weights, and their gradients, are rounded to the inputs' dtype once before they are
multiplied, and each result once.

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.attention import over_mesh, reference, sparse_attention, triton
from pallas_kernels.attention import tiles as tiling
from pallas_kernels.attention.tiles import Config, Tiles
from pallas_kernels.cards import LIMITS

U = 2.0**-24  # float32's unit roundoff
FUNCTION = 8 * U  # what an exponential or a logarithm may be off, relatively
QUICK = {"xla_backend_optimization_level": 0}  # half of the seconds
KERNELS: tuple[tiling.Kernel, ...] = ("forward", "keys", "queries")
SMALL = Tiles(Config(16, 32, 4, 2), Config(32, 16, 4, 2), Config(16, 16, 4, 2))


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str
    shape: tuple[int, int, int, int, int, int]  # B T S N K H
    places: str  # how positions lie
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    segments: bool = False

    def __str__(self) -> str:
        how = [f"window{self.window}"] * bool(self.window) + [f"cap{self.softcap}"] * bool(self.softcap)
        how += ["sinks"] * self.sinks + ["segments"] * self.segments
        return "-".join([self.dtype, "x".join(map(str, self.shape)), self.places, *how])


def positions(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    B, T, S, *_ = case.shape
    if case.places == "last":  # the queries are the last of the slots
        return np.tile(np.arange(S - T, S), (B, 1)), np.tile(np.arange(S), (B, 1))
    if case.places == "whole":  # each query sees all slots
        return np.full((B, T), S - 1), np.tile(np.arange(S), (B, 1))
    if case.places == "padded":  # rows of unlike length, one of them empty, filled up at the left and at the right
        at = np.full((B, S), -1)
        for b, length in enumerate(rng.permutation(np.linspace(0, S, B).astype(int))):
            start = (S - length) * (b % 2)
            at[b, start : start + length] = np.arange(length)
        return at[:, S - T :], at
    if case.places == "ring":  # position p stands in slot p mod S, and the buffer has gone round
        now = rng.integers(S + T, 3 * S, B)[:, None]
        slot = np.arange(S)[None]
        return now - T + 1 + np.arange(T)[None], now - (now - slot) % S
    if case.places == "packed":  # several texts one after another, each from position 0
        at, of = np.zeros((B, S), int), segments(case)[1]
        for b in range(B):
            for i in range(1, S):
                at[b, i] = at[b, i - 1] + 1 if of[b, i] == of[b, i - 1] else 0
        return at[:, S - T :], at
    assert case.places == "any"
    return rng.integers(-1, S, (B, T)), rng.integers(-1, S, (B, S))


def segments(case: Case) -> tuple[Any, Any]:
    if not case.segments:
        return None, None
    B, T, S, *_ = case.shape
    of = np.stack([np.arange(S) * (3 + b) // S for b in range(B)])
    return of[:, S - T :], of


@dataclasses.dataclass(frozen=True)
class Inputs:
    q: Any
    k: Any
    v: Any
    q_at: Any
    k_at: Any
    q_of: Any
    k_of: Any
    sinks: Any
    do: Any
    dlse: Any
    scale: float


def inputs(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    B, T, S, N, K, H = case.shape
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.dtype(case.dtype)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    q_at, k_at = positions(case, rng)
    sinks = rng.normal(size=N).astype(np.float32) if case.sinks else None
    dlse = rng.normal(size=(B, T, N)).astype(np.float32)
    of = segments(case)
    q, k, v, do = normal(B, T, N, H), normal(B, K, S, H), normal(B, K, S, H), normal(B, T, N, H)
    return Inputs(q, k, v, q_at.astype(np.int32), k_at.astype(np.int32), *of, sinks, do, dlse, 1.2 / H**0.5)


def oracle(case: Case, x: Inputs, tiles: int, allowed: Any = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (value, bound on the distance of the kernels' from it). tiles: that a row is summed up over."""
    q, do, dlse = (np.asarray(a, np.float64) for a in (x.q, x.do, x.dlse))
    B, T, N, H = q.shape
    K, S = x.k.shape[1:3]
    k, v = (np.repeat(np.asarray(a, np.float64), N // K, 1) for a in (x.k, x.v))
    info = ml_dtypes.finfo(x.q.dtype)
    u, tiny = float(info.eps) / 2, float(info.tiny)

    def product(what: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum of products, and that of their magnitudes."""
        return np.einsum(what, a, b), np.einsum(what, abs(a), abs(b))

    y, e_y = product("btnh,bnsh->bnts", q, k)
    y, e_y = x.scale * y, x.scale * (H + 4) * U * e_y
    slope, e_slope = np.ones_like(y), np.zeros_like(y)
    if case.softcap is not None:
        tanh = np.tanh(y / case.softcap)
        e_tanh = e_y / case.softcap + 2 * FUNCTION
        y, e_y, slope, e_slope = case.softcap * tanh, case.softcap * e_tanh, 1 - tanh**2, 3 * e_tanh
    e_y = e_y + 4 * U * abs(y)  # to the base 2, and back in the exponent
    q_at, k_at = x.q_at[:, :, None], x.k_at[:, None, :]
    seen = (q_at >= 0) & (k_at >= 0) & (k_at <= q_at)
    if case.window is not None:
        seen &= q_at - k_at < case.window
    if x.q_of is not None:
        seen &= x.q_of[:, :, None] == x.k_of[:, None, :]
    seen = seen[:, None] & allowed & np.ones_like(y, bool)
    y, e_y = np.where(seen, y, -np.inf), np.where(seen, e_y, 0)
    sink = np.full((1, N, 1), -np.inf) if x.sinks is None else np.asarray(x.sinks, np.float64)[None, :, None]
    top = np.maximum(y.max(-1), sink)
    found = np.isfinite(top)
    with np.errstate(divide="ignore"):
        lse = np.where(found, np.where(found, top, 0) + np.log(np.exp(y - np.where(found, top, 0)[..., None]).sum(-1)
            + np.exp(sink - np.where(found, top, 0))), -1e30)  # fmt: skip
    w = np.where(seen, np.exp(np.where(seen, y - lse[..., None], 0)), 0)

    spread = np.where(found, e_y.max(-1) + U * abs(np.where(found, lse, 0)), 0)
    relative = np.expm1(2 * spread + (tiles + 3) * (FUNCTION + 4 * U) + (S + 2) * U)
    out, size = product("bnts,bnsh->btnh", w, v)
    by_row = relative.swapaxes(1, 2)[..., None]
    e_out = size * (by_row + u + (S + 1) * U) * (1 + by_row) + tiny * np.einsum("bnts,bnsh->btnh", seen * 1.0, abs(v))
    e_out = e_out + u * (abs(out) + e_out)
    e_lse = relative + FUNCTION + 2 * U * abs(lse)

    r_w = np.expm1(np.where(seen, e_y + (e_lse + 2 * U * abs(lse))[..., None] + FUNCTION, 0))
    e_w = w * (r_w + u) + tiny * seen
    dv, size = product("bnts,btnh->bnsh", w, do)
    e_dv = np.einsum("bnts,btnh->bnsh", e_w, abs(do)) + (N // K * T + 2) * U * size
    dp, size = product("btnh,bnsh->bnts", do, v)
    e_dp = (H + 2) * U * size
    delta = np.einsum("btnh,btnh->bnt", do, out) - dlse.swapaxes(1, 2)
    e_delta = np.einsum("btnh,btnh->bnt", abs(do), e_out + (H + 2) * U * abs(out)) + 2 * U * abs(delta)
    inner = dp - delta[..., None]
    d = w * inner * slope
    e_d = w * (r_w * abs(inner) * slope + (e_dp + e_delta[..., None]) * (1 + r_w) + abs(inner) * e_slope)
    e_d = e_d + (u + 5 * U) * (abs(d) + e_d) + tiny * seen
    dq, size = product("bnts,bnsh->btnh", d, k)
    e_dq = x.scale * (np.einsum("bnts,bnsh->btnh", e_d, abs(k)) + (S + 2) * U * size)
    dk, size = product("bnts,btnh->bnsh", d, q)
    e_dk = x.scale * (np.einsum("bnts,btnh->bnsh", e_d, abs(q)) + (N // K * T + 2) * U * size)
    dq, dk = x.scale * dq, x.scale * dk

    def of_kv(a: np.ndarray) -> np.ndarray:
        return a.reshape(B, K, N // K, S, H).sum(2)

    result = {
        "out": (out, e_out),
        "lse": (lse.swapaxes(1, 2), e_lse.swapaxes(1, 2)),
        "dq": (dq, e_dq + u * (abs(dq) + e_dq)),
        "dk": (of_kv(dk), of_kv(e_dk) + u * (abs(of_kv(dk)) + of_kv(e_dk))),
        "dv": (of_kv(dv), of_kv(e_dv) + u * (abs(of_kv(dv)) + of_kv(e_dv))),
    }
    if x.sinks is not None:
        w_sink = np.exp(sink - lse)
        e_sink = w_sink * (e_delta + abs(delta) * (np.expm1(e_lse + FUNCTION + U * abs(sink - lse)) + B * T * U))
        result["dsinks"] = -(w_sink * delta).sum((0, 2)), e_sink.sum((0, 2))
    return result


def arguments(case: Case, x: Inputs) -> dict[str, Any]:
    return {
        "scale": x.scale, "window": case.window, "softcap": case.softcap, "q_segments": x.q_of, "k_segments": x.k_of,
        "return_lse": True,
    }  # fmt: skip


def agrees(found: Any, wanted: tuple[np.ndarray, np.ndarray], what: str) -> None:
    value, bound = wanted
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all(), f"{what} has {np.count_nonzero(~np.isfinite(found))} numbers that are not finite"
    off = abs(found - value)
    worst = np.unravel_index(np.argmax(off - bound), off.shape)
    assert (off <= bound).all(), (
        f"{what}{list(map(int, worst))} is {found[worst]}, should be {value[worst]} +- {bound[worst]}"
    )


GRADIENTS = [
    Case("bfloat16", (1, 45, 45, 2, 2, 64), "last"),
    Case("float16", (3, 37, 37, 4, 1, 80), "padded", window=9),
    Case("float32", (1, 70, 90, 7, 1, 96), "last", softcap=2.0, sinks=True),
    Case("float32", (2, 65, 65, 4, 2, 16), "packed", window=11, segments=True, sinks=True),
    Case("bfloat16", (1, 20, 33, 2, 1, 256), "ring", window=21, softcap=3.0, sinks=True),
    Case("float32", (2, 66, 47, 2, 2, 128), "any"),
]
FORWARD = [
    Case("float32", (3, 1, 50, 8, 2, 128), "ring", sinks=True),
    Case("bfloat16", (2, 1, 40, 4, 1, 64), "padded", window=7),
    Case("float32", (1, 1, 1, 1, 1, 64), "last"),
    Case("float32", (1, 113, 203, 2, 1, 32), "last", window=40),
    Case("float32", (2, 5, 67, 7, 1, 80), "any", softcap=4.0, sinks=True),
]


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def quickly(f: Any, *arrays: Any) -> tuple[Any, str]:
    """What f gives under jit, and the compiled program's text."""
    program = jax.jit(f).lower(*arrays).compile(compiler_options=QUICK)
    return program(*arrays), str(program.as_text())


def differentiated(case: Case, x: Inputs) -> Any:
    """A function of arrays in the fields of Inputs to NAMES."""

    def run(x: Inputs) -> Any:
        def f(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            how = arguments(case, x)
            return triton.attention(q, k, v, x.q_at, x.k_at, sinks=sinks, interpret=True, tiles=SMALL, **how)

        out, pull = jax.vjp(f, x.q, x.k, x.v, x.sinks)
        return *out, *pull((x.do, x.dlse))

    return lambda arrays: run(dataclasses.replace(x, **arrays))


def arrays(x: Inputs) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name != "scale"}


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.some_rows
def test_forward_and_gradients(case: Case) -> None:
    """What sees nothing (an empty row, a query at -1, one before all keys) is zero, and its gradients, exactly."""
    x = inputs(case)
    found: dict[str, Any] = dict(zip(NAMES, quickly(differentiated(case, x), arrays(x))[0], strict=True))
    assert (found["out"].dtype, found["dq"].dtype, found["dk"].dtype) == (x.q.dtype,) * 3
    wanted = oracle(case, x, tiles=-(-case.shape[2] // 16))
    for name, what in wanted.items():
        agrees(found[name], what, name)
    assert (found["dsinks"] is None) == (x.sinks is None)


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case: Case) -> None:
    """With the tiles that are chosen, so that the heads of a kv head share one where queries are few."""
    x = inputs(case)
    how = arguments(case, x) | {"sinks": x.sinks, "interpret": True}
    found, _ = quickly(functools.partial(triton.attention, **how), x.q, x.k, x.v, x.q_at, x.k_at)
    wanted = oracle(case, x, tiles=-(-case.shape[2] // 16))
    for name, value in zip(("out", "lse"), found, strict=True):
        agrees(value, wanted[name], name)


ANY = [
    Case("float32", (2, 21, 40, 4, 2, 16), "any", window=7, softcap=2.0, sinks=True, segments=True),
    pytest.param(Case("bfloat16", (2, 33, 35, 2, 1, 16), "any", sinks=True, segments=True), marks=pytest.mark.thorough),
    pytest.param(Case("float16", (1, 17, 50, 3, 3, 16), "any", softcap=3.0, segments=True), marks=pytest.mark.thorough),
]


@functools.cache
def program(case: Case) -> Any:
    """Compiled once for all positions and segments of its shapes."""
    x = inputs(case)
    return jax.jit(differentiated(case, x)).lower(arrays(x)).compile(compiler_options=QUICK)


def drawn(data: st.DataObject, case: Case) -> Inputs:
    """Any positions and segments, in any order, and numbers of any seed."""
    B, T, S, *_ = case.shape
    x = inputs(case, data.draw(st.integers(0, 99)))

    def whole(n: int, least: int, most: int) -> np.ndarray:
        numbers = data.draw(st.lists(st.integers(least, most), min_size=B * n, max_size=B * n))
        return np.array(numbers, np.int32).reshape(B, n)

    x = dataclasses.replace(x, q_at=whole(T, -1, 12), k_at=whole(S, -1, 12))
    return dataclasses.replace(x, q_of=whole(T, 0, 1), k_of=whole(S, 0, 1)) if case.segments else x


@pytest.mark.parametrize("case", ANY, ids=str)
def test_any_mask(case: Case) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        x = drawn(data, case)
        found = dict(zip(NAMES, program(case)(arrays(x)), strict=True))
        for name, what in oracle(case, x, tiles=-(-case.shape[2] // 16)).items():
            agrees(found[name], what, name)

    check()


def test_a_gradient_is_that_of_the_reference() -> None:
    case = Case("float32", (1, 20, 20, 2, 1, 16), "last", window=7, softcap=3.0)
    x = inputs(case)
    how = {"scale": x.scale, "window": case.window, "softcap": case.softcap}

    def loss(attention: Any, *arrays: Any) -> Any:
        return (attention(*arrays, x.q_at, x.k_at, **how) * x.do).sum()

    ours = functools.partial(triton.attention, interpret=True, tiles=SMALL)
    found, wanted = (
        quickly(jax.grad(functools.partial(loss, f), (0, 1, 2)), x.q, x.k, x.v)[0] for f in (ours, reference.attention)
    )
    without_lse = dataclasses.replace(x, dlse=np.zeros_like(x.dlse))
    bounds = oracle(case, without_lse, tiles=3)
    for name, ours_, theirs in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        assert (abs(np.asarray(ours_) - np.asarray(theirs)) <= 2 * bounds[name][1]).all()


def test_the_oracles_gradient_is_its_values_difference() -> None:
    case = Case("float32", (1, 6, 8, 2, 1, 4), "any", window=6, softcap=2.0, sinks=True)
    x = inputs(case)
    wanted = oracle(case, x, tiles=1)

    def loss(**changed: Any) -> float:
        y = oracle(case, dataclasses.replace(x, **changed), tiles=1)
        finite = y["lse"][0] > -1e29
        return float((y["out"][0] * np.asarray(x.do, np.float64)).sum() + (y["lse"][0] * x.dlse)[finite].sum())

    for name in ("q", "k", "v", "sinks"):
        whole = np.asarray(getattr(x, name), np.float64)
        difference, step = np.zeros_like(whole), 1e-5
        for i in np.ndindex(whole.shape):
            ends = []
            for sign in (1, -1):
                moved = whole.copy()
                moved[i] += sign * step
                ends.append(loss(**{name: moved}))
            difference[i] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(wanted[f"d{name}"][0], difference, rtol=1e-6, atol=1e-8)


def within(blocks: np.ndarray, T: int, S: int, size: int) -> np.ndarray:
    """[B, N, T, S]: the pairs of blocks of `size` that the lists hold."""
    allowed = np.zeros((*blocks.shape[:2], T, S), bool)
    for b, n, i, m in np.ndindex(blocks.shape):
        j = int(blocks[b, n, i, m])
        if 0 <= j * size < S:
            allowed[b, n, size * i : size * i + size, size * j : size * j + size] = True
    return allowed


@pytest.mark.parametrize("by", ["interpreted", "reference", "xla", "what serves here"])
@pytest.mark.parametrize(
    ("dtype", "how"),
    [("float32", {}), ("float32", {"sinks": True}), ("float16", {"segments": True, "softcap": 2.0}), ("bfloat16", {})],
    ids=["", "sinks", "float16-segments-cap", "bfloat16"],
)
@pytest.mark.some_rows
def test_sparse(dtype: str, how: dict[str, Any], by: str) -> None:
    """Lists with a block twice, none, and one that is no block; a last block that S and T do not fill; tiles below both."""
    case = Case(dtype, (2, 70, 90, 4, 2, 48), "last", window=60, **how)
    x, rng = inputs(case), np.random.default_rng(1)
    B, T, S, N, *_ = case.shape
    blocks = rng.integers(-1, 4, (B, N, 3, 3)).astype(np.int32)  # there are blocks 0 to 2
    blocks[0, 0, 0], blocks[0, 1, 1], blocks[1, 2, 0, 0] = -1, 2, 10**6
    allowed = within(blocks, T, S, 32)
    given = arguments(case, x) | {"block_q": 32, "block_k": 32, "sinks": x.sinks}
    tiles = dataclasses.replace(SMALL, forward=Config(16, 16, 4, 2))

    def sparse(blocks: Any, *arrays: Any) -> Any:
        if by == "interpreted":
            return triton.sparse_attention(*arrays, blocks=blocks, tiles=tiles, interpret=True, **given)
        name = by if by in ("reference", "xla") else None
        return sparse_attention(*arrays, blocks=blocks, implementation=name, **given)

    found, _ = quickly(sparse, blocks, x.q, x.k, x.v, x.q_at, x.k_at)
    wanted = oracle(case, x, tiles=6, allowed=allowed)
    for name, value in zip(("out", "lse"), found, strict=True):
        agrees(value, wanted[name], name)


@functools.cache
def sparse_program(case: Case, entries: int) -> Any:
    """Interpreted, by blocks of 16, compiled once for all lists of so many entries, positions and segments."""
    x = inputs(case)
    B, T, _, N, *_ = case.shape
    blocks = np.zeros((B, N, -(-T // 16), entries), np.int32)

    def run(blocks: Any, given: Any) -> Any:
        y = dataclasses.replace(x, **given)
        how = arguments(case, y) | {"block_q": 16, "block_k": 16, "sinks": y.sinks, "interpret": True, "tiles": SMALL}
        return triton.sparse_attention(y.q, y.k, y.v, y.q_at, y.k_at, blocks=blocks, **how)

    return jax.jit(run).lower(blocks, arrays(x)).compile(compiler_options=QUICK)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.thorough)])
def test_sparse_by_any_lists_and_any_mask(dtype: str) -> None:
    case = Case(dtype, (2, 21, 40, 4, 2, 16), "any", window=9, softcap=3.0, sinks=True, segments=True)
    B, T, S, N, *_ = case.shape

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        x, many = drawn(data, case), B * N * 2 * 2
        blocks = np.array(data.draw(st.lists(st.integers(-1, 4), min_size=many, max_size=many)), np.int32)
        blocks = blocks.reshape(B, N, 2, 2)
        found = sparse_program(case, 2)(blocks, arrays(x))
        wanted = oracle(case, x, tiles=3, allowed=within(blocks, T, S, 16))
        for name, value in zip(("out", "lse"), found, strict=True):
            agrees(value, wanted[name], name)

    check()


def test_sparse_refuses_what_is_no_list() -> None:
    case = Case("float32", (1, 40, 40, 2, 1, 16), "last")
    x = inputs(case)
    call = functools.partial(
        triton.sparse_attention, x.q, x.k, x.v, x.q_at, x.k_at, scale=1.0, interpret=True, block_k=32
    )
    with pytest.raises(ValueError, match=r"block_q is 24.*16"):
        call(blocks=jnp.zeros((1, 2, 2, 1), jnp.int32), block_q=24)
    with pytest.raises(ValueError, match=r"it is \[1, 2, 3, M\]"):
        call(blocks=jnp.zeros((1, 2, 2, 1), jnp.int32), block_q=16)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: triton.sparse_attention(
            q, x.k, x.v, x.q_at, x.k_at, scale=1.0, interpret=True, blocks=jnp.zeros((1, 2, 3, 1), jnp.int32),
            block_q=16, block_k=16).sum())(x.q)  # fmt: skip


def test_sparse_takes_memory_of_its_lists() -> None:
    """A prompt of 32k by lists of 8 blocks of 64: all scores of a head would be 4.3 GB, and booleans of them 1.1."""
    T, N, H, M = 32768, 2, 64, 8
    like, at = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((1, T), jnp.int32)
    kv, lists = like((1, 1, T, H), jnp.float32), like((1, N, T // 64, M), jnp.int32)

    def f(q: Any, k: Any, v: Any, at: Any, blocks: Any) -> Any:
        return sparse_attention(q, k, v, at, at, blocks=blocks, block_q=64, block_k=64, scale=0.1)

    program = jax.jit(f).lower(like((1, T, N, H), jnp.float32), kv, kv, at, lists).compile()
    queries = T * N * H * 4
    assert program.memory_analysis().temp_size_in_bytes < queries + 2**21
    assert not re.search(rf"\[[\d,]*{T},{T}[\d,]*\]", program.as_text())


# ---- over a mesh


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


def placed(x: Inputs, q: P, k: P) -> dict[str, Any]:
    """The arrays of x: queries [B, T, N, H] and keys [B, K, S, H] as said, the others along with them."""
    (b, t, n, h), (b_k, _, s, _) = ((*spec, *(None,) * (4 - len(spec))) for spec in (q, k))
    specs = {
        "q": q, "k": k, "v": k, "do": P(b, t, n, h), "dlse": P(b, t, n), "sinks": P(n), "q_at": P(b, t), "q_of": P(b, t),
        "k_at": P(b_k, s), "k_of": P(b_k, s),
    }  # fmt: skip
    there = mesh()
    return {
        name: None if a is None else jax.device_put(a, NamedSharding(there, specs[name]))
        for name, a in arrays(x).items()
    }


def told(text: str) -> dict[str, list[str]]:
    """Each collective in a program, and the shapes of what it gives."""
    found: dict[str, list[str]] = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for shape, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found.setdefault(kind, []).append(shape)
    return found


# kv heads, how queries [B, T, N, H] and keys [B, K, S, H] are split, and collectives
MESHES = {
    "batch and heads": (4, P("data", None, "tensor"), P("data", "tensor"), {"all-reduce"}),
    "2 kv heads over 4 devices": (2, P("data", None, "tensor"), P("data"), {"all-reduce", "all-gather"}),
    "lengths and head_dim": (1, P(None, "tensor", None, "data"), P(None, None, "tensor"), None),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.some_rows
def test_split_over_a_mesh(name: str) -> None:
    """Nothing is sent but the sum of the sinks' gradient over the batch; what cannot be split is gathered."""
    K, q, k, collectives = MESHES[name]
    case = Case("float32", (2, 20, 36, 8, K, 16), "packed", window=11, segments=True, sinks=collectives is not None)
    x = inputs(case)
    found, text = quickly(differentiated(case, x), placed(x, q, k))
    wanted = oracle(case, x, tiles=3)
    for name, value in zip(NAMES, found, strict=True):
        if value is not None:
            agrees(value, wanted[name], name)
    if collectives is None:
        return
    heard = told(text)
    assert set(heard) == collectives
    assert heard["all-reduce"] == ["f32[2]{0}"]
    assert not [shape for shape in heard.get("all-gather", ()) if "36" in shape]  # neither keys nor values
    for name, value in zip(NAMES, found, strict=True):
        like = P("data", None, "tensor") if name in ("out", "lse", "dq") else P("tensor") if name == "dsinks" else k
        assert value.sharding.is_equivalent_to(NamedSharding(mesh(), like), value.ndim), name


def test_one_token_and_lists_over_a_mesh() -> None:
    """With the heads of a kv head in one tile, and with lists of blocks, which go with heads: nothing is sent."""
    case = Case("float32", (2, 1, 36, 8, 4, 16), "last", sinks=True)
    x = inputs(case)
    blocks = np.random.default_rng(0).integers(-1, 3, (2, 8, 1, 2)).astype(np.int32)
    allowed = (np.arange(36) // 16 == blocks[..., None]).any(-2)
    there = placed(x, P("data", None, "tensor"), P("data", "tensor"))
    names = ("q", "k", "v", "q_at", "k_at")

    def both(blocks: Any, sinks: Any, *given: Any) -> Any:
        how = arguments(case, x) | {"interpret": True, "sinks": sinks, "tiles": SMALL}
        return triton.attention(*given, **how), triton.sparse_attention(
            *given, blocks=blocks, block_q=16, block_k=16, **how
        )

    lists = jax.device_put(blocks, NamedSharding(mesh(), P("data", "tensor")))
    found, text = quickly(both, lists, there["sinks"], *(there[n] for n in names))
    assert not told(text)
    for value, mask in zip(found, (True, allowed), strict=True):
        wanted = oracle(case, x, tiles=3, allowed=mask)
        agrees(value[0], wanted["out"], "out")
        agrees(value[1], wanted["lse"], "lse")


@pytest.mark.parametrize(
    ("shape", "q", "k", "wanted"),
    [
        ((8, 4), P(("data", "tensor")), P("data"), (("data", "tensor"), ())),  # keys are cut further
        ((8, 4), P(), P("data", "tensor"), (("data",), ("tensor",))),
        ((8, 4), P("data", None, "tensor"), P(), (("data",), ("tensor",))),
        ((2, 4), P(("data", "tensor")), P(), (("data",), ())),  # as far as it divides
        ((3, 4), P("data", None, "tensor"), P("data", "tensor"), ((), ("tensor",))),
        ((8, 2), P("data", None, "tensor"), P("data"), (("data",), ())),
        ((8, 4), P("tensor", None, "data"), P("data", "tensor"), (("data",), ("tensor",))),  # queries are moved
        ((8, 4), P(None, "data", None, "tensor"), P(None, None, "tensor", "data"), ((), ())),
    ],
)
def test_what_is_split(shape: tuple[int, int], q: P, k: P, wanted: Any) -> None:
    """Batch and kv heads over the mesh data=2, tensor=4."""
    B, K = shape
    there = AbstractMesh((2, 4), ("data", "tensor"))
    given = {
        name: SimpleNamespace(shape=(B, K, 16, 16), sharding=NamedSharding(there, spec))
        for name, spec in (("q", q), ("k", k), ("v", k))
    }
    assert over_mesh._split(there, given) == wanted


# ---- which tiles are walked over

_bounds = functools.lru_cache(
    lambda window, segments, of_keys: jax.jit(
        lambda q_at, k_at, q_of, k_of: triton._bounds(
            triton.Call(1.0, window, None, SMALL, True), dataclasses.replace(SMALL.forward, block_q=16, block_k=16),
            q_at, k_at, q_of if segments else None, k_of if segments else None, of_keys=of_keys,
        )
    )
)  # fmt: skip


def visible(q_at: np.ndarray, k_at: np.ndarray, q_of: Any, k_of: Any, window: int | None) -> np.ndarray:
    seen = (k_at[None] >= 0) & (k_at[None] <= q_at[:, None])
    if window is not None:
        seen &= q_at[:, None] - k_at[None] < window
    return seen if q_of is None else seen & (q_of[:, None] == k_of[None])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_tile_that_can_be_seen_is_left_out(data: st.DataObject) -> None:
    """For any positions, sorted or not: [lo, hi) holds every tile with something to see, [a, b) only those seen throughout."""
    T, S, tile = 70, 100, 16
    kind = data.draw(st.sampled_from(["any", "runs", "sorted"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))

    def drawn(n: int) -> np.ndarray:
        if kind == "sorted":
            return np.arange(n) + (S - n)
        if kind == "runs":  # as a ring buffer's, with rows that hold nothing
            return np.roll(np.where(rng.random(n) < 0.05, -1, np.arange(n)), rng.integers(n))
        return rng.integers(-1, 40, n)

    q_at, k_at = drawn(T).astype(np.int32), drawn(S).astype(np.int32)
    window = data.draw(st.sampled_from([None, 25]))
    segmented, of_keys = data.draw(st.booleans()), data.draw(st.booleans())
    q_of, k_of = np.sort(rng.integers(0, 3, T)).astype(np.int32), np.sort(rng.integers(0, 3, S)).astype(np.int32)
    bounds = _bounds(window, segmented, of_keys)(*(x[None] for x in (q_at, k_at, q_of, k_of)))
    lo, a, b, hi = (np.asarray(x)[0] for x in bounds)
    lo, a, b = (np.minimum(x, hi) for x in (lo, a, b))
    seen = visible(q_at, k_at, q_of if segmented else None, k_of if segmented else None, window)
    rows, columns = -(-T // tile), -(-S // tile)
    some, every = np.zeros((rows, columns), bool), np.zeros((rows, columns), bool)
    for i, j in np.ndindex(rows, columns):
        part = seen[i * tile : i * tile + tile, j * tile : j * tile + tile]
        some[i, j], every[i, j] = part.any(), part.all() and (j + 1) * tile <= S
    if of_keys:
        some, every = some.T, every.T
    for i in range(len(some)):
        assert lo[i] <= a[i] <= b[i] <= hi[i]
        assert not some[i, : lo[i]].any()
        assert not some[i, hi[i] :].any()
        assert every[i, a[i] : b[i]].all()
        if kind == "sorted" and not segmented:  # then they are exact
            assert hi[i] - lo[i] == some[i].sum()
            assert b[i] - a[i] == every[i].sum()


# ---- what is refused


def on(device_kind: str) -> Any:
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=100, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def call(H: int = 64, dtype: Any = jnp.bfloat16, scale: float = 1.0, k_dtype: Any = None) -> Any:
    def like(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    k = like((1, 2, 32, H), k_dtype or dtype)
    at = like((1, 32), jnp.int32)
    return jax.eval_shape(functools.partial(triton.attention, scale=scale), like((1, 32, 4, H), dtype), k, k, at, at)


def test_refusals_say_why() -> None:
    with pytest.raises(dispatch.Refused, match="there is no GPU"):
        call()
    with on("Tesla T4"), pytest.raises(dispatch.Refused, match=r"7\.5 is below 8\.0"):
        call()
    with on("NVIDIA A100"):
        assert call().shape == (1, 32, 4, 64)
        assert call(k_dtype=jnp.float16).dtype == jnp.bfloat16
        refused: tuple[tuple[dict[str, Any], str], ...] = (
            ({"dtype": jnp.float32}, "q is float32"), ({"k_dtype": jnp.int8}, "k is int8"),
            ({"H": 264}, "head_dim is 264"), ({"scale": 0.0}, "scale is 0.0"),
        )  # fmt: skip
        for how, reason in refused:
            with pytest.raises(dispatch.Refused, match=reason):
                call(**how)


# ---- tiles


@pytest.mark.parametrize("capability", [c for c in LIMITS if c >= (8, 0)], ids=str)
def test_every_tile_fits_the_card(capability: tuple[int, int]) -> None:
    room = LIMITS[capability].shared_memory_block
    for H in (8, 16, 64, 80, 96, 128, 192, 256):
        for rows in (1, 7, 16, 40, 64, 4096):
            tiles = tiling.choose(capability, H, rows)
            for kernel in KERNELS:
                config = getattr(tiles, kernel)
                assert tiling.shared_bytes(kernel, config, H, capability, segments=True) <= room
            assert tiles.forward.block_q <= max(16, 2 * rows)
            sums = tiles.forward.block_q * tiling.padded(H)
            assert sums <= 128 * 32 * tiles.forward.warps  # 128 registers of a thread's 255


def test_a_tile_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match=r"block_k is 48.*32"):
        Config(64, 48, 4, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 300])
def test_bytes_moved_are_those_of_the_walk(window: int | None, kernel: tiling.Kernel) -> None:
    """The closed form against a count of the tiles that the kernel's own bounds let it visit."""
    T, S, N, K, H, config = 500, 900, 4, 2, 64, Config(64, 32, 4, 2)
    q_at, k_at = jnp.arange(S - T, S)[None], jnp.arange(S)[None]
    call = triton.Call(1.0, window, None, SMALL, True)
    of_keys = kernel == "keys"
    bounds = jax.jit(functools.partial(triton._bounds, call, config, of_keys=of_keys, q_of=None, k_of=None))
    lo, _, _, hi = bounds(q_at=q_at, k_at=k_at)
    tile, rows = (config.block_q, T) if of_keys else (config.block_k, S)
    walked = 0
    for start, end in zip(np.asarray(lo)[0], np.asarray(hi)[0], strict=True):
        walked += max(0, min(int(end) * tile, rows) - int(start) * tile)
    row = 2 * H
    wanted = {
        "forward": N * (T * (2 * row + 4) + walked * 2 * row),
        "queries": N * (T * (3 * row + 8) + walked * 2 * row),
        "keys": K * S * 4 * row + N * walked * (2 * row + 8),
    }[kernel]
    assert tiling.bytes_moved(1, T, S, N, K, H, config, kernel=kernel, window=window) == wanted


WIDTHS = (64, 80, 96, 128, 256)
# bytes moved to the least: a causal text of 64k, 8 heads on 2, by capability and width; forward, keys, queries
RATIOS = {
    (8, 0): ((52.8, 54.3, 52.9), (42.2, 43.2, 42.3), (35.2, 35.9, 35.3), (26.4, 26.8, 26.5), (26.3, 53.0, 26.4)),
    (8, 6): ((44.8, 46.1, 44.9), (35.8, 36.6, 35.9), (29.8, 30.4, 29.9), (22.4, 22.7, 22.4), (22.3, 44.9, 44.6)),
    (8, 9): ((44.8, 46.1, 44.9), (35.8, 36.6, 35.9), (29.8, 30.4, 29.9), (22.4, 22.7, 22.4), (22.3, 44.9, 44.6)),
    (9, 0): ((60.9, 62.6, 61.0), (48.7, 49.8, 48.8), (40.6, 41.3, 40.7), (30.4, 30.8, 30.5), (15.2, 61.0, 15.2)),
    (10, 0): ((60.9, 62.6, 61.0), (48.7, 49.8, 48.8), (40.6, 41.3, 40.7), (30.4, 30.8, 30.5), (15.2, 61.0, 30.4)),
    (12, 0): ((44.8, 46.1, 44.9), (35.8, 36.6, 35.9), (29.8, 30.4, 29.9), (22.4, 22.7, 22.4), (22.3, 44.9, 44.6)),
}  # fmt: skip


@pytest.mark.parametrize("capability", RATIOS, ids=str)
def test_bytes_moved_beside_the_least(capability: tuple[int, int]) -> None:
    """FlashAttention's bound: forward, keys and queries are within a tenth of what was recorded. Nearer it are larger tiles."""
    T, N, K, fast = 65536, 8, 2, tiling.fast_memory(LIMITS[capability])
    for H, recorded in zip(WIDTHS, RATIOS[capability], strict=True):
        tiles, found = tiling.choose(capability, H, T), []
        for kernel in KERNELS:
            moved = tiling.bytes_moved(1, T, T, N, K, H, getattr(tiles, kernel), kernel=kernel)
            found.append(moved / tiling.least_bytes(1, T, T, N, K, H, fast, kernel=kernel))
        print(capability, H, [round(x, 1) for x in found])
        assert all(1 <= x <= 1.1 * r for x, r in zip(found, recorded, strict=True))


def test_every_capability_has_its_ratios() -> None:
    assert set(RATIOS) == {c for c in LIMITS if c >= (8, 0)}
