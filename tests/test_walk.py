"""The walk over layers, wherever they live, against a float64 loop; segments of layers; techniques by name.

The toy layer tells order and kind apart and keeps a state:

    z = W x + b        x' = tanh(z) (kind 'a'), z / 2 + tanh(z) (kind 'b')        state' = 2 state + x'

Tolerances are running error analysis: the float64 loop carries beside each number a bound on a float32 program's distance
from it, forwards and backwards, so that forms which XLA fuses differently are held to what rounding allows.

L layers, B batch, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine import technique
from jaxengine.architecture import Segment, segments
from jaxengine.homes.base import HOMES, Bank, check_platform, home
from jaxengine.walk import lay_out, walk
from jaxengine.weights.base import Weight, contract
from sharding.mesh import make_mesh

U = 2.0**-24
B, D = 2, 4
PLACES = [  # those of one home inside a compiled program; tests/test_disk.py drives the others
    (name, form)
    for name in technique.names(HOMES)
    for form in home(name).FORMS
    if name == home(name).REST and form != "python"
]
KINDS = {
    "one": "a",
    "like": "aaaa",
    "alternating": "ababa",  # a period of two and a remainder: two banks
    "five to one": "aaab" * 2 + "aa",  # here three to one
    "no period": "abb",
}

places = pytest.mark.parametrize(("where", "form"), PLACES, ids=[f"{n}-{f}" for n, f in PLACES])


def layers_of(kinds: str, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (D, D), "b": (D,)}
    return [{n: (rng.normal(size=s) / 2).astype(np.float32) for n, s in shapes.items()} for _ in kinds]


def put(x: Any, memory: str | None) -> jax.Array:
    sharding = jax.sharding.NamedSharding(make_mesh(None), jax.sharding.PartitionSpec(), memory_kind=memory)
    return jax.device_put(x, sharding)


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def bank(layers: Sequence[Any], kinds: Sequence[Any], repeats: int, where: str, form: str) -> Bank:
    """The layers, in order, as a bank of this home and form."""
    memory = home(where).MEMORY
    if form == "ahead" and repeats == 1:
        form = "scan"  # there is no turn before it to fetch it in
    if form == "scan":
        layers = [stack(layers[j :: len(kinds)]) for j in range(len(kinds))]
    elif form == "ahead":
        of = [layers[j :: len(kinds)] for j in range(len(kinds))]
        alone = [0, *[repeats - 1] * (len(kinds) - 1)]
        layers = [{"one": ls[i], "rest": stack([*ls[:i], *ls[i + 1 :]])} for ls, i in zip(of, alone, strict=True)]
    weights = tuple(jax.tree.map(lambda x: put(x, memory), layer) for layer in layers)
    return Bank(weights, tuple(kinds), repeats, where, form)


def banks_of(layers: Sequence[Any], kinds: str, *chosen: tuple[str, str]) -> tuple[Bank, ...]:
    """A bank for each segment, the places taken in turn."""
    made = []
    for i, s in enumerate(segments(kinds)):
        mine = layers[s.start : s.start + s.num_layers]
        made.append(bank(mine, s.kinds, s.repeats, *chosen[i % len(chosen)]))
    return tuple(made)


def body(kind: str, weights: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = contract("bd,ed->be", x, weights["w"]) + weights["b"][None]
    x = jnp.tanh(z) if kind == "a" else z / 2 + jnp.tanh(z)
    return x, 2 * state + x


@jax.jit
def run(x: jax.Array, banks: Any, states: Any) -> Any:
    return walk(body, x, banks, states)


def states_of(banks: Sequence[Bank]) -> tuple[Any, ...]:
    """States as `lay_out` lays them out, with another number for each layer: layer i starts from i."""
    counter = 0
    states = []
    for one, made in zip(banks, lay_out(banks, lambda kind: jnp.zeros((B, D))), strict=True):
        numbers = counter + np.arange(len(one.kinds) * one.repeats)
        counter += len(numbers)
        if one.form != "unrolled":
            states.append(
                tuple(
                    s + jnp.asarray(numbers[j :: len(one.kinds), None, None], jnp.float32) for j, s in enumerate(made)
                )
            )
        else:
            states.append(tuple(s + jnp.float32(i) for s, i in zip(made, numbers, strict=True)))
    return tuple(states)


def by_layer(banks: Sequence[Bank], laid_out: Sequence[Any]) -> list[Any]:
    """States, or weights, of each layer in order."""
    found = []
    for one, states in zip(banks, laid_out, strict=True):
        for i in range(len(one.kinds) * one.repeats):
            r, j = divmod(i, len(one.kinds))
            if one.form == "ahead" and isinstance(states[j], dict) and "one" in states[j]:
                alone = r == (0 if j == 0 else one.repeats - 1)
                at = r - (j == 0)
                held = states[j]["one"] if alone else jax.tree.map(lambda s, at=at: s[at], states[j]["rest"])
                found.append(jax.tree.map(np.asarray, held))
                continue
            found.append(
                jax.tree.map(np.asarray, states[i])
                if one.form == "unrolled"
                else jax.tree.map(lambda s, r=r: np.asarray(s)[r], states[j])
            )
    return found


class Loop:
    """The same layers as a float64 loop, with bounds (see the head of the file); `grad` goes back through it."""

    def __init__(self, kinds: str, layers: Sequence[Any], x: Any) -> None:
        self.kinds = kinds
        self.layers = [{n: np.asarray(v, np.float64) for n, v in layer.items()} for layer in layers]
        self.xs = [(np.asarray(x, np.float64), np.zeros(np.shape(x)))]  # (value, bound) before each layer, and last
        self.states = []
        for i, (kind, p) in enumerate(zip(kinds, self.layers, strict=True)):
            x, ex = self.xs[-1]
            z = x @ p["w"].T + p["b"]
            ez = ex @ abs(p["w"].T) + (D + 2) * U * ((abs(x) + ex) @ abs(p["w"].T) + abs(p["b"]))
            y, ey = np.tanh(z), ez + 8 * U
            if kind == "b":
                y, ey = z / 2 + y, ez / 2 + ey + U * (abs(z) + 2)
            self.xs.append((y, ey))
            self.states.append((2.0 * i + y, ey + U * (2 * i + abs(y) + ey)))

    def grad(self, seed: np.ndarray) -> tuple[list[dict[str, Any]], Any]:
        """Of sum(seed * x_L): ({name: (value, bound)} for each layer, and (value, bound) for x_0)."""
        g, eg = np.asarray(seed, np.float64), np.zeros(seed.shape)
        found = []
        for kind, p, (x, ex) in reversed(list(zip(self.kinds, self.layers, self.xs[:-1], strict=True))):
            z = x @ p["w"].T + p["b"]
            t = np.tanh(z)
            ez = ex @ abs(p["w"].T) + (D + 2) * U * ((abs(x) + ex) @ abs(p["w"].T) + abs(p["b"]))
            et = ez + 8 * U
            slope, eslope = 1 - t**2, 2 * abs(t) * et + et**2 + 4 * U
            if kind == "b":
                slope, eslope = slope + 0.5, eslope + 2 * U
            dz = g * slope
            edz = eg * (slope + eslope) + abs(g) * eslope + 2 * U * (abs(g) + eg) * (slope + eslope)
            adz = abs(dz) + edz
            dw, edw = dz.T @ x, edz.T @ (abs(x) + ex) + abs(dz).T @ ex + (B + 2) * U * adz.T @ (abs(x) + ex)
            db, edb = dz.sum(0), edz.sum(0) + (B + 2) * U * adz.sum(0)
            found.append({"w": (dw, edw), "b": (db, edb)})
            g, eg = dz @ p["w"], edz @ abs(p["w"]) + (D + 2) * U * adz @ abs(p["w"])
        return found[::-1], (g, eg)


def close(found: Any, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    value, bound = wanted
    found = np.asarray(found, np.float64)
    assert found.shape == value.shape
    assert (abs(found - value) <= bound).all()


X = np.random.default_rng(9).normal(size=(B, D)).astype(np.float32)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@places
def test_walks_every_layer_in_order(where: str, form: str, kinds: str) -> None:
    layers = layers_of(kinds)
    banks = banks_of(layers, kinds, (where, form))
    states = states_of(banks)
    x, new = run(jnp.asarray(X), banks, states)
    assert jax.tree.structure(new) == jax.tree.structure(states)
    loop = Loop(kinds, layers, X)
    close(x, loop.xs[-1])
    for found, wanted in zip(by_layer(banks, new), loop.states, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_layers_that_are_brought_together_in_turn(kinds: str) -> None:
    """Resident ones, each held back until the one before it begins: forwards and backwards, whatever is kept."""
    layers = layers_of(kinds)
    banks = banks_of(layers, kinds, ("device", "unrolled"), ("host", "scan"))
    loop = Loop(kinds, layers, X)

    def total(x: Any, banks: Any, remat: str) -> Any:
        x, states = walk(body, x, banks, states_of(banks), remat=remat, gathers=True)
        return x.sum(), (x, states)

    for remat in ("none", "full"):
        (_, (x, new)), of_x = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)(X, banks, remat)
        close(x, loop.xs[-1])
        for found, wanted in zip(by_layer(banks, new), loop.states, strict=True):
            close(found, wanted)
        close(of_x, loop.grad(np.ones_like(X))[1])
    banks = banks_of(layers, kinds, ("device", "unrolled"))
    counts = []
    for gathers in (False, True):
        once = functools.partial(walk, body, X, banks, states_of(banks), gathers=gathers)
        counts.append(str(jax.make_jaxpr(once)()).count("optimization_barrier"))
    assert counts[1] - counts[0] == len(layers)


def test_the_loop_would_tell() -> None:
    """Two layers exchanged, or a kind, or a layer left out, are further apart than the bound."""
    layers, kinds = layers_of("ababa"), "ababa"
    value, bound = Loop(kinds, layers, X).xs[-1]
    swapped = [layers[0], layers[3], layers[2], layers[1], layers[4]]
    for other in (Loop(kinds, swapped, X), Loop("abaaa", layers, X), Loop("abab", layers[:4], X)):
        assert (abs(other.xs[-1][0] - value) > 100 * bound).any()


@pytest.mark.parametrize("first", PLACES, ids=["-".join(p) for p in PLACES])
@pytest.mark.parametrize("second", PLACES, ids=["-".join(p) for p in PLACES])
def test_banks_of_different_homes_in_one_walk(first: tuple[str, str], second: tuple[str, str]) -> None:
    kinds = "ababa"
    layers = layers_of(kinds, seed=1)
    banks = banks_of(layers, kinds, first, second)
    assert len(banks) == 2
    x, new = run(jnp.asarray(X), banks, states_of(banks))
    loop = Loop(kinds, layers, X)
    close(x, loop.xs[-1])
    for found, wanted in zip(by_layer(banks, new), loop.states, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("form", ["scan", "unrolled"])
def test_homes_of_one_form_give_the_same_bits(form: str) -> None:
    kinds, found = "ababa", []
    for name in (n for n, f in PLACES if f == form):
        banks = banks_of(layers_of(kinds), kinds, (name, form))
        found.append(run(jnp.asarray(X), banks, states_of(banks)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    assert len(found) >= (2 if form == "scan" else 1)


@places
def test_weights_stand_where_the_home_says(where: str, form: str) -> None:
    """And the body is given them on the device, whatever the home."""
    banks = banks_of(layers_of("ababa"), "ababa", (where, form))
    memory = home(where).MEMORY or jax.devices()[0].default_memory().kind
    types = []

    def watching(kind: str, weights: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        types.extend(str(jax.typeof(a)) for a in jax.tree.leaves(weights))
        return body(kind, weights, x, state)

    def traced(x: jax.Array, banks: Any, states: Any) -> Any:
        for a in jax.tree.leaves(banks):
            assert ("<host>" in str(jax.typeof(a))) == (where == "host")
        return walk(watching, x, banks, states)

    for a in jax.tree.leaves(banks):
        assert a.sharding.memory_kind == memory
    jax.jit(traced)(jnp.asarray(X), banks, states_of(banks))
    assert types
    assert not any("<host>" in t for t in types)
    if where == "host":
        assert memory == "pinned_host"


def test_a_scan_holds_its_states_once() -> None:
    """Stacked states are carried and written in place: a donated stack needs no second one."""
    L, size = 8, 4096
    kinds = "a" * L
    layers = [{"w": w["w"], "b": w["b"]} for w in layers_of(kinds)]
    banks = banks_of(layers, kinds, ("device", "scan"))

    def wide(kind: str, weights: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, _ = body(kind, weights, x, jnp.zeros_like(x))
        return x, state.at[0].set(x[0, 0])

    states = lay_out(banks, lambda kind: jnp.zeros((size,)))
    program = jax.jit(lambda x, banks, states: walk(wide, x, banks, states), donate_argnums=2)
    memory = program.lower(jnp.asarray(X), banks, states).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= L * size * 4
    assert memory.temp_size_in_bytes < L * size * 4


@pytest.mark.parametrize("name", technique.names("jaxengine.weights"))
@pytest.mark.some_rows
def test_a_weight_of_any_format_walks(name: str) -> None:
    """A Weight is a pytree: stacked, on the host, it is fetched and contracted like an array."""
    kinds = "aba"
    encode = technique.find("jaxengine.weights", name).encode
    encoded = [{"w": encode(jnp.asarray(p["w"]), out=1), "b": p["b"]} for p in layers_of(kinds)]
    dense = [{"w": p["w"].dense() if isinstance(p["w"], Weight) else p["w"], "b": p["b"]} for p in encoded]
    value, bound = Loop(kinds, dense, X).xs[-1]
    for place in PLACES:
        banks = banks_of(encoded, kinds, place)
        x, _ = run(jnp.asarray(X), banks, states_of(banks))
        close(x, (value, 2 * bound))  # a rounding for a scale in each product: D + 2 becomes D + 3


def test_no_state_is_a_state() -> None:
    """Scoring a text keeps nothing: the states are empty tuples."""

    def stateless(kind: str, weights: Any, x: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return body(kind, weights, x, jnp.zeros_like(x))[0], state

    layers, kinds = layers_of("ababa"), "ababa"
    for place in PLACES:
        banks = banks_of(layers, kinds, place)
        nothing = lay_out(banks, lambda kind: ())
        x, new = jax.jit(lambda x, banks, states: walk(stateless, x, banks, states))(jnp.asarray(X), banks, nothing)
        assert new == nothing
        close(x, Loop(kinds, layers, X).xs[-1])


@places
def test_gradients(where: str, form: str) -> None:
    """With respect to every layer's weights and to what goes in, as the float64 loop has them."""
    kinds = "ababa"
    layers = layers_of(kinds)
    banks = banks_of(layers, kinds, (where, form))
    seed = np.random.default_rng(5).normal(size=(B, D)).astype(np.float32)

    @jax.jit
    def gradient(weights: Any, x: jax.Array) -> Any:
        def loss(weights: Any, x: jax.Array) -> jax.Array:
            used = [Bank(w, b.kinds, b.repeats, b.home, b.form) for w, b in zip(weights, banks, strict=True)]
            return (jnp.asarray(seed) * walk(body, x, used, states_of(used))[0]).sum()

        return jax.grad(loss, argnums=(0, 1))(weights, x)

    dw, dx = gradient(tuple(b.weights for b in banks), jnp.asarray(X))
    wanted, wanted_dx = Loop(kinds, layers, X).grad(seed)
    close(dx, wanted_dx)
    for found, layer in zip(by_layer(banks, dw), wanted, strict=True):
        for name, one in layer.items():
            close(found[name], one)


@pytest.mark.parametrize("remat", ["none", "full", "offload"])
@pytest.mark.parametrize(
    ("resident", "near"), [(1, "unrolled"), (2, "unrolled"), (3, "unrolled"), (2, "scan"), (3, "scan")]
)
@pytest.mark.some_rows
def test_gradients_through_resident_layers_and_then_one_ahead(resident: int, near: str, remat: str) -> None:
    """Against all layers on the device without a walk of ours back; what goes along counts the layers, an integer."""

    def body(scale: Any, kind: Any, w: Any, carry: Any, state: Any) -> Any:
        x, n = carry
        return (jnp.tanh(scale * x @ w["w"].T + w["b"][None]) + x / 2 + n.astype(jnp.float32) / 64, n + 1), state

    held = [{n: jnp.asarray(a) for n, a in w.items()} for w in layers_of("a" * 7)]

    def loss(scale: Any, x: Any, held: Any, form: str) -> Any:
        first, (one, *rest) = held[:resident], held[resident:]
        looped = near == "scan" and form == "ahead"
        stack: Any = (jax.tree.map(lambda *a: jnp.stack(a), *first),)
        banks = [Bank(stack if looped else tuple(first), ("a",), resident, "device", near if looped else "unrolled")]
        if form == "ahead":
            weights: Any = {"one": one, "rest": jax.tree.map(lambda *a: jnp.stack(a), *rest)}
            banks.append(Bank((weights,), ("a",), len(rest) + 1, "host", "ahead"))
        else:
            banks.append(Bank((one, *rest), ("a",), len(rest) + 1, "device", "unrolled"))
        states = lay_out(banks, lambda kind: ())
        (y, n), _ = walk(
            jax.tree_util.Partial(body, scale),
            (x, jnp.int32(0)),
            banks,
            states,
            remat=remat if form == "ahead" else "none",
        )
        return jnp.square(y).sum() * (n == 7).astype(jnp.float32)

    args = (jnp.float32(0.7), jnp.asarray(np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)), held)
    made = (jax.jit(jax.value_and_grad(functools.partial(loss, form=f), (0, 1, 2)))(*args) for f in ("ahead", "plain"))
    for one, other in zip(*(jax.tree.leaves(m) for m in made), strict=True):
        np.testing.assert_allclose(one, other, rtol=2**-18, atol=2**-18)
        assert np.abs(other).max() > 2**-6


def test_the_loops_own_gradient_is_the_slope() -> None:
    """The oracle's backward pass against central differences of its forward pass."""
    kinds = "aba"
    layers = layers_of(kinds)
    seed = np.random.default_rng(5).normal(size=(B, D))
    found, dx = Loop(kinds, layers, X).grad(seed)

    def loss(layers: Any, x: Any) -> float:
        return float((seed * Loop(kinds, layers, x).xs[-1][0]).sum())

    h = 1e-6
    for i, name, at in ((0, "w", (1, 2)), (1, "b", (3,)), (1, "w", (0, 3)), (2, "w", (2, 2))):
        sides = []
        for sign in (1, -1):
            moved = [{n: v.astype(np.float64) for n, v in p.items()} for p in layers]
            moved[i][name][at] += sign * h
            sides.append(loss(moved, X))
        assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(found[i][name][0][at], rel=1e-6, abs=1e-8)
    step = np.zeros((B, D))
    step[1, 2] = h
    slope = (loss(layers, X + step) - loss(layers, X - step)) / (2 * h)
    assert slope == pytest.approx(dx[0][1, 2], rel=1e-6, abs=1e-8)


def test_states_must_fit_the_banks() -> None:
    banks = banks_of(layers_of("ababa"), "ababa", ("device", "unrolled"))
    states = states_of(banks)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        walk(body, jnp.asarray(X), banks, states[:1])
    with pytest.raises(ValueError, match=r"zip\(\)"):
        walk(body, jnp.asarray(X), banks, (states[0][:-1], states[1]))


def test_lay_out_makes_one_state_for_each_layer_of_its_kind() -> None:
    layers, kinds = layers_of("ababa"), "ababa"
    for place in PLACES:
        banks = banks_of(layers, kinds, place)
        made = lay_out(banks, lambda kind: {"s": jnp.full((3,), float(ord(kind)))})
        assert [chr(int(s["s"][0])) for s in by_layer(banks, made)] == list(kinds)


# --- homes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", technique.names(HOMES))
def test_a_home_keeps_its_contract(name: str) -> None:
    module = home(name)
    assert module.FORM in module.FORMS
    assert set(module.FORMS) <= {"unrolled", "scan", "ahead", "python"}
    assert home(module.REST).REST == module.REST
    assert module.MEMORY in (None, "pinned_host")
    assert module.TIER in ("device", "host", "disk")
    assert module.RESIDENT in (None, 0, 1)
    assert module.KEPT in (None, *technique.names(HOMES))
    if "python" in module.FORMS:
        assert home(module.REST).stream
    if module.FORMS == ("python",):
        return
    layer = {"w": put(np.ones((2, 2), np.float32), module.MEMORY)}
    fetch = home(module.REST).fetch
    fetched = jax.jit(fetch)(layer)
    np.testing.assert_array_equal(fetched["w"], np.ones((2, 2)))
    assert "<host>" not in str(jax.eval_shape(fetch, layer)["w"])


# --- segments -----------------------------------------------------------------------------------------------------


def layers_in(found: Sequence[Segment]) -> list[Any]:
    return [kind for s in found for kind in s.kinds * s.repeats]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abc"), max_size=24))
def test_segments_are_the_layers(kinds: list[str]) -> None:
    found = list(segments(kinds))
    assert layers_in(found) == kinds
    assert [s.start for s in found] == [sum(t.num_layers for t in found[:i]) for i in range(len(found))]
    assert all(s.repeats >= 1 and s.kinds for s in found)
    assert all(len(s.kinds) == 1 for s in found if s.repeats == 1)  # what does not repeat is not a period


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.integers(2, 6))
def test_a_period_that_repeats_is_found(period: list[str], repeats: int) -> None:
    """All layers in one segment, so that one scan runs them all; the period may be shorter than the one given."""
    found = list(segments(period * repeats))
    assert len(found) == 1
    assert len(period) % len(found[0].kinds) == 0


def test_segments_of_known_families() -> None:
    assert list(segments(["x"] * 32)) == [Segment(("x",), 32, 0)]  # Llama
    assert list(segments(["w", "f"] * 13)) == [Segment(("w", "f"), 13, 0)]  # Gemma 2 2B: 26 layers
    local = ("w",) * 5 + ("f",)
    # Gemma 3 1B: 26 layers, five windowed to one full
    assert list(segments(local * 4 + ("w", "w"))) == [Segment(local, 4, 0), Segment(("w",), 2, 24)]
    # too few layers for the period to repeat: the run, the odd one, the rest
    assert list(segments((*local, "w", "w"))) == [Segment(("w",), 5, 0), Segment(("f",), 1, 5), Segment(("w",), 2, 6)]
    assert list(segments([])) == []


# --- techniques ---------------------------------------------------------------------------------------------------

FOLDERS = ["weights", "homes", "models", "cache.layouts", "cache.codecs", "cache.stores"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_techniques_are_the_files(folder: str) -> None:
    package = f"jaxengine.{folder}"
    known = technique.names(package)
    assert known == tuple(sorted(known))
    assert known
    assert "base" not in known
    assert not any(name.startswith("_") for name in known)
    for name in known:
        assert technique.find(package, name).__name__ == f"{package}.{name}"


@pytest.mark.parametrize(
    ("package", "name", "near"),
    [
        ("jaxengine.weights", "int9", "int8"),
        ("jaxengine.homes", "hosts", "host"),
        ("jaxengine.cache.layouts", "windowed", "window"),
        ("jaxengine.models", "llama3", "llama"),
    ],
)
def test_an_unknown_technique_is_refused_with_the_nearest(package: str, name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"There is no {name!r}") as error:
        technique.find(package, name)
    message = str(error.value)
    assert f"Did you mean {near!r}?" in message
    assert all(known in message for known in technique.names(package))


@pytest.mark.parametrize("name", ["zzzzzz", "", "base", "__init__", "../weights/int8"])
def test_what_is_no_technique_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"there are: .*dense.*int8"):
        technique.find("jaxengine.weights", name)


@pytest.mark.parametrize("name", technique.names(HOMES))
def test_a_jax_that_reads_host_stacks_wrongly_is_refused(name: str) -> None:
    check_platform(name, "gpu", (0, 11, 1))
    check_platform(name, "cpu", (0, 10, 2))
    if home(name).MEMORY is None:
        check_platform(name, "gpu", (0, 10, 2))
    else:
        with pytest.raises(ValueError, match=r"needs jax 0\.11\.1 or newer, and this is 0\.11\.0"):
            check_platform(name, "gpu", (0, 11, 0))
