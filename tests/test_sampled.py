"""Training some layers at a time, against whole-model autodiff with optax beside it, and runs of it.

The oracle takes the gradient of every parameter through the model's own scoring and gives it to one AdamW a layer, which is
made anew, kept or left out as the papers say; nothing of it is from sampled.py. AdamW's eps is 1e-2 here, so that an update
differs by at most rate x (the gradients' difference) / eps. Gradients of two forms of one program differ by some 64 roundings
of float32 (tests/test_finetune.py), at norms clipped to 1: 0.02 x 6 steps x 64 x 2^-24 / 1e-2 = 5e-5, of losses that move by 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from oracles.golden import GOLDEN
from test_finetune import CLOSE, HOW, llama, losses, run_of
from test_planning import SMALL

import jaxengine
from jaxengine import command
from jaxengine.architecture import architecture
from jaxengine.engine import score
from jaxengine.finetune import planning, sampled
from jaxengine.finetune.data import permutation
from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.run import Run, Settings, check
from jaxengine.finetune.step import Batch, Tuning
from jaxengine.finetune.trained.base import layers, trained
from jaxengine.homes.base import Bank
from jaxengine.model import Model
from jaxengine.plan import Plan
from pallas_kernels import aot
from sharding.mesh import make_mesh

STEPS, B, T, V = 6, 2, 8, 101
ADAM = Optimizer("adamw", 0.02, "linear", 0, 2 * STEPS, weight_decay=0.1, eps=1e-2)
ATOL = 5e-5
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a model of four layers in two kinds, and one whose head is its own
    "lisa": ("gemma2", {"layers": 2, "every": 2}),
    "badam": ("gemma2", {"layers": 3, "every": 2, "order": "descending"}),  # blocks of three and of one
    "hift": ("llama", {"layers": 1, "order": "descending"}),
}


def model_of(family: str, **how: Any) -> Model:
    given: dict[str, Any] = {"dtype": "float32"} | how
    return jaxengine.load(GOLDEN / family, **given)


def tokens_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, V, (B, T)).astype(np.int32)


def batch_of(step: int, parts: int) -> Batch:
    """Each token's loss but a row's last."""
    tokens = tokens_of(step)
    weights = np.ones((B, T), np.float32)
    weights[:, -1] = 0
    given = (
        tokens,
        np.roll(tokens, -1, 1),
        weights,
        np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        np.ones_like(tokens),
    )
    return Batch(*(jnp.asarray(x.reshape(parts, -1, T)) for x in given))


def expected(name: str) -> list[list[str]]:
    """What is trained in each step, as the papers say for CASES: names outside the layers, and numbers of layers."""
    if name == "badam":
        return [["3"], ["3"], ["0", "1", "2"], ["0", "1", "2"], ["3"], ["3"]]
    if name == "hift":
        return [["lm_head", "final_norm"], ["1"], ["0"], ["embedding"], ["lm_head", "final_norm"], ["1"]]
    drawn = [permutation(4, 0, 2**62 + step // 2)[:2] for step in range(STEPS)]
    assert len({tuple(d) for d in drawn}) == 3
    return [["embedding", "final_norm", *map(str, d)] for d in drawn]


def values_of(model: Model, params: Any) -> dict[str, Any]:
    """By name outside the layers, and by number each layer's."""
    held = layers(model.plan.parts(model.architecture), [bank.weights for bank in params["banks"]])
    return dict(params["outer"]) | {str(i): layer for i, layer in held.items()}


@functools.cache
def differentiated(family: str) -> Any:
    """(values, tokens) -> the loss and the gradient of every parameter."""
    model = model_of(family)
    kinds = model.architecture.kinds

    def loss_of(values: dict[str, Any], tokens: Any) -> Any:
        bank = Bank(tuple(values[str(i)] for i in range(len(kinds))), kinds, 1, "device", "unrolled")
        params = {"outer": {n: x for n, x in values.items() if not n.isdecimal()}, "banks": (bank,)}
        logits = score.function(model.engine, params, tokens, jnp.full(B, T, jnp.int32))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss_of))


@functools.cache
def oracle(name: str) -> tuple[list[float], dict[str, Any]]:
    """(the loss of each step, the parameters after all)."""
    model = model_of(CASES[name][0])
    values, both, found, states = values_of(model, model.params), differentiated(CASES[name][0]), [], {}

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    adam = optax.adamw(1.0, b1=ADAM.b1, b2=ADAM.b2, eps=ADAM.eps, weight_decay=ADAM.weight_decay, mask=matrices)
    for step, active in enumerate(expected(name)):
        loss, gradient = both(values, tokens_of(step))
        found.append(float(loss))
        scale = min(1, 1 / (float(optax.tree.norm({n: gradient[n] for n in active})) + 1e-6))
        at = step - step % 4 + 2 if name == "hift" else step  # a sweep of four groups has one rate
        rate = ADAM.learning_rate * (1 - at / ADAM.steps)
        if step % 2 == 0 and name != "hift":  # a turn begins: what is outside goes on, layers begin anew
            states = {n: s for n, s in states.items() if not n.isdecimal()}
        for n in active:
            own = {n: values[n]}
            clipped = jax.tree.map(lambda g, scale=scale: g * scale, {n: gradient[n]})
            with jax.numpy_dtype_promotion("standard"):
                updates, states[n] = adam.update(clipped, states.get(n, adam.init(own)), own)
            values = values | jax.tree.map(lambda w, u, rate=rate: w + rate * u, own, updates)
    return found, values


def tuning_of(model: Model, name: str, **options: Any) -> Tuning:
    return Tuning(dataclasses.replace(model.engine, chunk=0), name, trained(name).Options(**options), ADAM)


def begun(model: Model, tuning: Tuning) -> tuple[tuple[Bank, ...], Any]:
    """The banks without weights, and the state before the first step."""
    made = trained(tuning.train).make(tuning.options, model.architecture, model.plan, model.params, None)
    banks = tuple(dataclasses.replace(b, weights=()) for b in model.params["banks"])
    return banks, sampled.initial(tuning, banks, made)


@pytest.mark.parametrize(
    ("name", "how", "parts"),
    [
        ("lisa", {"home": "host"}, 2),
        ("badam", {"home": "split", "resident": 2}, 1),
        ("hift", {}, 1),
    ],
    ids=str,
)
@pytest.mark.some_rows
def test_whole_model_autodiff_and_an_adamw_a_layer(name: str, how: dict[str, Any], parts: int) -> None:
    """Losses and parameters after switches, frozen ones to the bit; one program for every choice of layers."""
    family, options = CASES[name]
    model, (wanted, values) = model_of(family, **how), oracle(name)
    tuning = tuning_of(model, name, **options)
    banks, state = begun(model, tuning)
    programs, found = sampled.step.on("cpu"), []
    before = programs._cache_size()
    first = jax.tree.map(np.asarray, values_of(model, model_of(family, **how).params))
    for step in range(STEPS):
        state, measured = sampled.advance(tuning, banks, state, batch_of(step, parts), seed=0, number=step)
        found.append(float(measured["loss"]))
        if step == 1 and name != "lisa":  # what has had no turn yet
            now = values_of(model, trained(name).combine(tuning.options, model.params, state.trained))
            for n in now.keys() - {n for active in expected(name)[:2] for n in active}:
                jax.tree.map(np.testing.assert_array_equal, now[n], first[n])
    assert programs._cache_size() - before == (3 if name == "hift" else 1)  # embedding, layers, head; or one
    assert max(wanted) - min(wanted) > 0.5
    np.testing.assert_allclose(found, wanted, atol=ATOL)
    now = values_of(model, trained(name).combine(tuning.options, model.params, state.trained))
    assert now.keys() == values.keys()
    for n, one in values.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), now[n], one)


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """Of everything that a program makes, loops and branches included. A barrier makes nothing: it hands on what it is given."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name != "optimization_barrier":
            found |= {v.aval.shape for v in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.parametrize("how", [{"form": "scan"}, {"home": "host"}], ids=str)
def test_no_gradient_of_frozen_layers_is_made(how: dict[str, Any]) -> None:
    """Nothing in the program has a stack's shape, and of a matrix's own there is one gradient for each slot, not for each
    layer: the program is no longer for a model of twice the repeats."""
    model = model_of("gemma2", **how)
    tuning = tuning_of(model, "lisa", layers=3)
    _, state = begun(model, tuning)
    now = sampled.turn_of(tuning, 0, 0)
    held = sampled.arguments(tuning, model.params["banks"], state.trained, now)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(0, 1))
    made = jax.make_jaxpr(sampled.step.function, static_argnums=0)(tuning, *held[:3], batch, held[3])
    stacks = {x.shape for b in model.params["banks"] for x in jax.tree.leaves(b.weights) if x.ndim > 2}
    assert len(stacks) > 3
    assert {s[0] for s in stacks} == {2}
    made_shapes = shapes_in(made.jaxpr)
    assert not stacks & made_shapes
    assert {(3, *s[1:]) for s in stacks} <= made_shapes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slots_are_run_at_the_values_that_banks_have(dtype: str) -> None:
    """As numpy casts there and back, subnormal numbers and ties among them."""
    rng = np.random.default_rng(0)
    digits = {"bfloat16": 7, "float16": 10}[dtype]
    x = rng.normal(size=4096) * 2.0 ** rng.integers(-20, 8, 4096)
    ties = (1 + (np.arange(64) + 0.5) * 2.0**-digits) * 2.0 ** rng.integers(-9, 9, 64)
    given = np.concatenate([x, ties, -ties, [0.0, 2.0**-16 * 1.375, 2.0**-24 * 1.5]]).astype(np.float32)
    found = jax.jit(sampled.as_stored, static_argnums=1)(given, jnp.dtype(dtype))
    np.testing.assert_array_equal(found, given.astype(jnp.dtype(dtype)).astype(np.float32))
    assert (found != given).mean() > 0.9


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("card", ["H200", "RTX 3090"])
def test_a_card_runs_slots_at_the_values_that_banks_have(card: str) -> None:
    """XLA:GPU takes a cast there and back for the number itself: of such a program nothing narrower is left."""

    def product(w: Any, x: Any) -> Any:
        return x @ sampled.as_stored(w, jnp.dtype(jnp.bfloat16))

    def cast(w: Any, x: Any) -> Any:
        return x @ w.astype(jnp.bfloat16).astype(jnp.float32)

    square = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    with aot.target(aot.CARDS[card]) as target:
        ours, lost = (target.compile(jax.jit(f), *target.place((square, square))).as_text() for f in (product, cast))
    assert "round-nearest-even" in ours
    assert "bf16" not in lost
    arch = architecture(SMALL | {"vocab_size": 512, "num_hidden_layers": 2})
    what = dataclasses.replace(planning.task("lisa"), compute="float32")
    plan = Plan(dtype="bfloat16", form="scan")
    with aot.target(aot.CARDS[card]) as target:
        program, static, abstract = planning.program(arch, plan, what, target.mesh, batch=1, context=64)
        text = target.compile(program.on("gpu"), *static, *target.place(abstract)).as_text()
    D, F = arch.config.hidden_size, arch.config.intermediate_size
    assert re.search(rf"f32\[(1,)?{F},{D}\]\S* round-nearest-even", text)


def test_all_layers_at_once_are_full_fine_tuning() -> None:
    how = {"steps": 4, "batch": 2}
    wanted = losses(run_of(llama(home="host"), dataclasses.replace(HOW, train="all", **how)))
    found = losses(run_of(llama(home="host"), dataclasses.replace(HOW, train="lisa", layers=2, every=9, **how)))
    assert max(wanted) - min(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({"train": "lisa", "layers": 1, "every": 2}, {"home": "host", "dtype": "bfloat16"}),
        ({"train": "hift", "order": "random"}, {"home": "host", "dtype": "bfloat16"}),
    ],
    ids=["lisa", "hift"],
)
@pytest.mark.thorough
def test_a_run_goes_on_over_a_switch_bit_for_bit(given: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    """Ends within a turn and at its end. Layers are bfloat16, and what is kept of them beside is float32."""
    settings = dataclasses.replace(HOW, optimizer="adamw", learning_rate=3e-3, **given)
    unbroken = run_of(llama(**how), settings, out=tmp_path / "whole", save_every=3)
    wanted = [record.loss for record in unbroken.run()]
    found: dict[int, float] = {}
    for steps in (5, 1, None):  # ends after the 5th, again the 4th (3 + 1) and the last
        with run_of(llama(**how), settings, out=tmp_path / "parts", save_every=3) as run:
            for record in itertools.islice(run, steps):
                assert found.setdefault(record.step, record.loss) == record.loss
            last = run
    assert [found[i] for i in range(1, 7)] == wanted
    assert min(wanted) < wanted[0] - 0.1
    assert last.memory() == unbroken.memory()
    for one, other in zip(jax.tree.leaves(unbroken._state), jax.tree.leaves(last._state), strict=True):
        assert one.sharding.memory_kind == other.sharding.memory_kind
        np.testing.assert_array_equal(one, other)
    now = values_of(last.model, last.model.params)
    assert {x.dtype for x in jax.tree.leaves(now["1"])} == {jnp.dtype("bfloat16")}
    held = last._state.optimizer
    if settings.train == "hift":  # rounded to what the model runs with, and not lost
        for i, layer in enumerate(held["layers"]):
            rounded = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16")), layer["master"])
            jax.tree.map(np.testing.assert_array_equal, rounded, now[str(i)])
            assert any((np.asarray(x) != x.astype("bfloat16")).any() for x in map(np.asarray, layer["master"].values()))
        assert {x.sharding.memory_kind for x in jax.tree.leaves(held) if x.ndim} == {"pinned_host"}
    else:
        assert now["lm_head"].dtype == jnp.float32
        assert {x.shape[0] for x in jax.tree.leaves(held["slots"])} == {1}
    with run_of(llama(**how), settings, out=tmp_path / "parts") as again:  # of a run that is over: what comes out
        assert again.run() == []
        logits = again.tuned().logits(np.arange(9))
    written = "model/model.safetensors"
    assert (tmp_path / "parts" / written).read_bytes() == (tmp_path / "whole" / written).read_bytes()
    folder = jaxengine.load(tmp_path / "parts" / "model", dtype="float32")
    np.testing.assert_allclose(folder.logits(np.arange(9)), logits, atol=0.1)  # of bfloat16 arithmetic
    unbroken.close()


def test_a_sweep_has_one_learning_rate() -> None:
    tuning = tuning_of(llama(), "hift")
    of = [sampled.choice(tuning, sampled.turn_of(tuning, 0, step))["rate_at"] for step in range(12)]
    np.testing.assert_array_equal(of, np.repeat([2, 6, 10], 4))
    ended = dataclasses.replace(tuning, optimizer=dataclasses.replace(ADAM, steps=10))
    assert sampled.choice(ended, sampled.turn_of(tuning, 0, 9))["rate_at"] == 9  # not beyond the schedule


@pytest.mark.parametrize(
    ("given", "how", "why"),
    [
        ({"train": "lisa", "layers": 3}, {}, "layers is 3, and this llama has 2"),
        ({"train": "lisa", "layers": 0}, {}, "at least 1"),
        ({"train": "lisa", "order": "random"}, {}, "order is 'random', and train is 'lisa': it goes with badam, hift"),
        ({"train": "lora", "every": 3}, {}, "it goes with lisa, badam"),
        ({"train": "badam", "order": "up"}, {}, "order is 'up'; it can be ascending, descending, random"),
        ({"train": "hift", "remat": "dots"}, {}, "say 'full' or 'offload'"),
        ({"train": "badam"}, {"weights": "int8"}, "train='badam' changes layers as they are"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], how: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        run_of(llama(**how), dataclasses.replace(HOW, **given))


@pytest.mark.parametrize(
    ("how", "why"),
    [({"home": "host", "form": "ahead"}, "say form='scan'"), ({"home": "disk"}, "Say home='host', or home='split'")],
    ids=str,
)
def test_homes_without_a_way_back_are_refused(how: dict[str, Any], why: str) -> None:
    arch, plan = model_of("gemma3_text").architecture, Plan(dtype="float32", **how)
    with pytest.raises(ValueError, match=why):
        check(Settings(train="lisa", context=T), arch, plan, make_mesh(None))


def test_settings_are_as_in_the_papers_unless_said() -> None:
    found = {n: Settings(train=n) for n in sampled.SAMPLED}
    assert [(s.layers, s.every, s.order) for s in found.values()] == [
        (2, 20, None), (1, 100, "random"), (1, None, "ascending")
    ]  # fmt: skip
    for settings in found.values():
        assert Settings.from_json(settings.to_json()) == settings


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FoundError(Exception): ...

    def of(self: Run, model: Any, settings: Settings, *args: Any, **given: Any) -> None:
        chosen.append((settings, model.plan.dtype))
        raise FoundError

    chosen: list[Any] = []
    monkeypatch.setattr(Run, "__init__", of)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three four"}\n' * 9)
    words = ["finetune", "demo", str(rows), "--out", str(tmp_path / "out"), "--context", "32", "--train"]
    done = CliRunner().invoke(command.app, [*words, "badam", "--layers", "2", "--every", "5", "--order", "ascending"])
    assert isinstance(done.exception, FoundError), done.output
    ((settings, dtype),) = chosen
    assert (settings.options, dtype) == (trained("badam").Options(2, 5, "ascending"), "bfloat16")
    for given, why in (
        (["hift", "--every", "5"], "it goes with lisa, badam"),
        (["lisa", "--rank", "4"], "leave it out with --train lisa"),
        (["lisa", "--layers", "99"], "at most so many"),
    ):
        done = CliRunner().invoke(command.app, [*words, *given])
        assert done.exit_code == 2
        assert why in " ".join(done.output.split())
