"""Every optimizer of the folder: what the steps rely on; and those that optax has not, against numbers from elsewhere."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon
from test_finetune import HOW, LLAMA, llama, losses, moved_by, run_of

import jaxengine
from jaxengine import technique
from jaxengine.finetune.optimizers import adamw8bit
from jaxengine.finetune.optimizers.base import OPTIMIZERS, Matrix, Optimizer, optimizer

NAMES = [name for name in technique.names(OPTIMIZERS) if optimizer(name).ORDER]
# bytes of state for each of parameters in layers (float32, so AdamW's is 2); k and v are too small for 8 bits here, and all
# matrices for Adafactor's rows and columns
SHARES = {
    "adafactor": (1, 1.1), "adamw": (2, 2.01), "adamw8bit": (0.5, 1.2), "lion": (1, 1.01), "muon": (0.9, 1.1), "sgd": (1, 1.01),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    """State before the first step is zeros, which layered.initial takes for granted; and steps go downhill."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((256, 96), (256, 64)))
    params = {"w": jnp.zeros((64, 96)), "b": jnp.zeros(64)}
    transformation = Optimizer(
        name, 1.0 if name == "sgd" else 0.03, schedule="linear", steps=60, weight_decay=1e-3
    ).make(lambda tree: {"w": True, "b": False} if tree.keys() == {"w", "b"} else tree)

    def loss(params: Any) -> jax.Array:
        return jnp.square(x @ params["w"].T + params["b"][None] - y).mean()

    state = transformation.init(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = jax.tree.map(np.shape, state)
    for _ in range(60):
        params, state = step(params, state)
    assert jax.tree.map(np.shape, state) == before
    design = np.c_[np.asarray(x, np.float64), np.ones(len(x))]
    least = np.square(design @ np.linalg.lstsq(design, np.asarray(y, np.float64))[0] - np.asarray(y)).mean()
    assert least < float(loss(params)) < (1 + least) / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.some_rows
def test_each_layer_alone_in_host_memory_is_all_of_them_on_the_device(name: str) -> None:
    """And a stack of them. Closer than a parameter whose gradient is all rounding could move the loss
    (tests/test_live_finetune.py)."""
    rate = {"sgd": 0.3}.get(name, 5e-3)
    settings = dataclasses.replace(HOW, train="all", optimizer=name, learning_rate=rate, steps=4, weight_decay=0.1)
    wanted = losses(run_of(llama(), settings))
    assert moved_by(wanted) > 0.1
    run = run_of(llama(home="host"), settings)
    np.testing.assert_allclose(losses(run), wanted, rtol=2e-4)
    np.testing.assert_allclose(losses(run_of(llama(form="scan"), settings)), wanted, rtol=2e-4)
    layers, state = (
        sum(x.nbytes for x in jax.tree.leaves(t["banks"])) for t in (run._state.trained, run._state.optimizer)
    )
    least, most = SHARES[name]
    assert least <= state / layers <= most


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gemma3_text", marks=pytest.mark.thorough)])
def test_unlike_layers_in_host_memory_are_those_on_the_device(family: str) -> None:
    """That alternate, two of a turn, or are written out: every parameter, each layer changed before the next one's gradient."""
    settings = dataclasses.replace(HOW, train="all", optimizer="sgd", learning_rate=0.3, steps=4, accumulate=2, batch=1)

    def of(remat: str = "full", **how: Any) -> list[float]:
        model = jaxengine.load(LLAMA.parent / family, dtype="float32", **how)
        return losses(run_of(model, dataclasses.replace(settings, remat=remat)))

    wanted = of()
    assert moved_by(wanted) > 0.1
    np.testing.assert_allclose(of(home="host"), wanted, rtol=2e-4)
    np.testing.assert_allclose(of(home="host", remat="offload"), wanted, rtol=2e-4)
    np.testing.assert_allclose(of(home="split", resident=1), wanted, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.some_rows
def test_a_stack_changes_as_its_layers_alone(name: str) -> None:
    """Matrices large enough for every way of keeping state (of 8 bits in whole blocks), heads, vectors; gradients of unlike
    sizes, so that what is taken over all of a stack would be another number."""
    rng, L = np.random.default_rng(5), 3
    kinds = {"down": Matrix(0, 1), "q": Matrix(0, 2), "norm": Matrix(0, 0)}
    shapes = {"down": (128, 144), "q": (2, 128, 144), "norm": (144,)}
    how = Optimizer(name, 0.05, weight_decay=0.1)

    def made(stacked: int) -> Any:
        return how.make(
            lambda tree: {n: n != "norm" for n in tree},
            lambda tree: {n: dataclasses.replace(kinds[n], stacked=stacked) for n in tree},
        )

    def drawn() -> dict[str, np.ndarray]:
        sizes = 10.0 ** rng.uniform(-3, 1, L)
        return {n: np.stack([x * rng.normal(size=s) for x in sizes]).astype(np.float32) for n, s in shapes.items()}

    one, all_of = made(0), made(1)
    params = drawn()
    alone = [{n: jnp.asarray(x[i]) for n, x in params.items()} for i in range(L)]
    stack = {n: jnp.asarray(x) for n, x in params.items()}
    states, state = [one.init(p) for p in alone], all_of.init(stack)
    for _ in range(3):
        g = drawn()
        changes, state = cast(Any, all_of.update({n: jnp.asarray(x) for n, x in g.items()}, state, stack))
        for i in range(L):
            wanted, states[i] = cast(Any, one.update({n: jnp.asarray(x[i]) for n, x in g.items()}, states[i], alone[i]))
            for n in shapes:
                # muon's factor goes through five products of up to 264 numbers; the rest are a few roundings
                atol = (1e-4 if name == "muon" else 1e-6) * float(np.abs(wanted[n]).max())
                np.testing.assert_allclose(changes[n][i], wanted[n], rtol=1e-5, atol=atol, err_msg=f"{n} {i}")


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_seven_decades(signed: bool) -> None:
    """Of Dettmers (arXiv:1511.04561): a decade with k bits for the fraction has 2^k numbers, the middles of equal parts."""
    found = adamw8bit.numbers(signed)
    assert found.shape == (256,)
    assert (np.diff(found) > 0).all()
    assert found[-1] == 1
    positive = found[(found > 0) & (found < 1)].astype(np.float64)
    assert (0 in found, (found < 0).any()) == (True, signed)
    if signed:
        np.testing.assert_array_equal(found[found < 0], -positive.astype(np.float32)[::-1])
    for k in range(7):
        count = 2 ** (k if signed else k + 1)
        decade = positive[(positive > 10.0 ** (k - 7)) & (positive < 10.0 ** (k - 6))]
        wanted = (0.1 + 0.9 * (np.arange(count) + 0.5) / count) * 10.0 ** (k - 6)
        np.testing.assert_allclose(decade, wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 72), (3, 1500)])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(shape: tuple[int, ...], signed: bool) -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 2, shape)).astype(np.float32)
    x.reshape(-1)[:300] = 0  # a whole block
    x = x if signed else np.abs(x)
    codes, scales = jax.jit(lambda x: adamw8bit.encode(x, signed=signed))(x)
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.uint8, shape, (math.ceil(x.size / 256),))
    made = np.asarray(adamw8bit.decode(codes, scales, signed=signed), np.float64).reshape(-1)
    flat, table = x.reshape(-1).astype(np.float64), adamw8bit.numbers(signed).astype(np.float64)
    for start in range(0, flat.size, 256):
        block = flat[start : start + 256]
        nearest = np.abs(np.abs(block).max() * table[None] - block[:, None]).min(1)
        assert (np.abs(made[start : start + 256] - block) <= nearest + 1e-6 * np.abs(block)).all()
    np.testing.assert_array_equal(made[:256], 0)


def test_a_step_in_8_bits_is_adams_on_what_the_codes_stand_for() -> None:
    rng = np.random.default_rng(2)
    how, params = Optimizer("adamw8bit", 0.1), {"w": jnp.zeros((64, 80)), "b": jnp.zeros(80)}
    transformation, gradients = how.make(), [rng.normal(size=(2, 64, 80)).astype(np.float32) for _ in range(3)]
    state: Any = transformation.init(params)
    held = state[0]
    assert (held.first["w"].dtype, held.first["b"].dtype, held.first_scales["b"]) == (jnp.uint8, jnp.float32, None)
    for n, g in enumerate(gradients, 1):
        held = state[0]
        read = [
            np.asarray(adamw8bit.decode(c["w"], s["w"], signed=signed), np.float64)
            for c, s, signed in ((held.first, held.first_scales, True), (held.second, held.second_scales, False))
        ]
        m, v = (
            how.b1 * read[0] + (1 - how.b1) * g[0],
            how.b2 * read[1] + (1 - how.b2) * np.square(g[0], dtype=np.float64),
        )
        updates, state = cast(Any, transformation.update({"w": g[0], "b": g[1][0]}, state, params))
        wanted = -0.1 * (m / (1 - how.b1**n)) / (np.sqrt(v / (1 - how.b2**n)) + how.eps)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4, atol=1e-7)
    plain, state = dataclasses.replace(how, name="adamw").make(), None
    for g in gradients:
        state = plain.init({"b": g[1][0]}) if state is None else state
        wanted, state = cast(Any, plain.update({"b": g[1][0]}, state))
    np.testing.assert_allclose(updates["b"], wanted["b"], rtol=1e-6)


def test_of_a_stack_a_layers_elements_decide_what_is_coded() -> None:
    """As of each layer alone: 16 layers of 2048 keep float32 moments, two of 4096 do not."""
    params = {"few": jnp.zeros((16, 8, 256)), "many": jnp.zeros((2, 16, 256)), "outside": jnp.zeros((16, 8, 256))}
    stacked = {"few": Matrix(1, 1), "many": Matrix(1, 1), "outside": None}
    held: Any = Optimizer("adamw8bit", 0.1).make(None, lambda tree: stacked).init(params)
    assert {n: x.dtype for n, x in held[0].first.items()} == {
        "few": jnp.float32,
        "many": jnp.uint8,
        "outside": jnp.uint8,
    }
    assert {n for n, x in held[0].second_scales.items() if x is not None} == {"many", "outside"}
    alone: Any = (
        Optimizer("adamw8bit", 0.1).make(None, lambda tree: {"few": Matrix(0, 1)}).init({"few": params["few"][0]})
    )
    assert alone[0].first["few"].dtype == jnp.float32


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def test_muon_is_optaxs() -> None:
    """Tall, wide, [out, out, in], stacked; and AdamW for the rest."""
    rng = np.random.default_rng(3)
    shapes = {
        "wide": (8, 24),
        "tall": (24, 8),
        "heads": (3, 4, 20),
        "stack": (2, 6, 10),
        "embedding": (16, 8),
        "norm": (8,),
    }
    kinds = {
        "wide": Matrix(),
        "tall": Matrix(),
        "heads": Matrix(0, 2),
        "stack": Matrix(1, 1),
        "embedding": None,
        "norm": None,
    }
    theirs = {
        "wide": MuonDimensionNumbers(1, 0), "tall": MuonDimensionNumbers(1, 0), "heads": MuonDimensionNumbers(2, (0, 1)),
        "stack": MuonDimensionNumbers(2, 1),
    }  # fmt: skip
    how = Optimizer("muon", 0.05, weight_decay=0.1, b1=0.95)
    decayed = {n: n != "norm" for n in shapes}
    ours = how.make(lambda tree: {n: decayed[n] for n in tree}, lambda tree: {n: kinds[n] for n in tree})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        matrix = muon(
            0.05, beta=0.95, eps=how.eps, weight_decay=0.1, muon_weight_dimension_numbers=theirs, consistent_rms=0.2
        )
        rest = optax.adamw(0.05, 0.95, how.b2, how.eps, weight_decay=0.1, mask={"embedding": True, "norm": False})
        one = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
        held, updates = ours.init(one), cast(Any, None)
        others: list[Any] = [({n: one[n] for n in names}, how.init({n: one[n] for n in names}), how)
                  for names, how in ((tuple(theirs), matrix), (("embedding", "norm"), rest))]  # fmt: skip
        for _ in range(4):
            g = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
            updates, held = cast(Any, ours.update(g, held, one))
            one = optax.apply_updates(one, updates)
            for i, (two, state, other) in enumerate(others):
                wanted, state = other.update({n: g[n] for n in two}, state, two)
                for n in two:
                    np.testing.assert_allclose(updates[n], wanted[n], atol=2e-5, err_msg=n)
                others[i] = (optax.apply_updates(two, wanted), state, other)


def test_what_muon_is_for_follows_from_the_model() -> None:
    for train, names in (("all", ("q", "down")), ("lora", ("a", "b"))):
        run = run_of(llama(form="scan"), dataclasses.replace(HOW, train=train, optimizer="muon", learning_rate=1e-3))
        found: dict[str, set[Any]] = {}
        tree = run._state.trained
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        for (path, leaf), how in zip(leaves, structure.flatten_up_to(run.tuning._matrices(tree)), strict=True):
            found.setdefault(path[-1].key, set()).add((leaf.ndim, how))
        if train == "all":
            assert found["q"] == {(4, Matrix(1, 2))}  # stacked, heads and head dim out
            assert found["o"] == {(4, Matrix(1, 1))}
            assert found["embedding"] == {(2, None)}
            assert {how for n in found if "norm" in n for _, how in found[n]} == {None, Matrix(1, 0)}
        else:
            assert found["a"] == {(3, Matrix(1, 1)), (4, Matrix(1, 1))}
            assert found["b"] == {(3, Matrix(1, 1)), (4, Matrix(1, 2))}
        assert set(names) <= found.keys()
