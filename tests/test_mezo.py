"""MeZO: against the whole tree at once, the streamed step against the resident one, going on, and the bytes it stands in.

The oracle holds every parameter and its noise in float64, takes the two losses by the engine's own scoring, and knows of
layers only what the noise's keys say. g is a difference of two float32 losses over 2 eps. Each loss is held to 64 roundings
of u = 2^-24 (tests/test_finetune.py), so that g is off by at most 64 u loss / eps =: delta, and a parameter by lr delta |z|
a step, |z| < 6. Parameters that are off by a lr delta z each move the loss by lr delta times its slope along z.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN
from test_finetune import CLOSE, ROOT, documents, invoke, rows
from test_finetune_bytes import of
from test_planning import BF16, LLAMA_3_8B, SMALL

import jaxengine
from jaxengine.architecture import architecture
from jaxengine.finetune import mezo
from jaxengine.finetune import planning as tuning
from jaxengine.finetune import step as whole
from jaxengine.finetune.data import pack
from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.run import Record, Run, Settings
from jaxengine.finetune.step import Batch, Tuning
from jaxengine.finetune.trained.all import Options
from jaxengine.finetune.trained.base import layers
from jaxengine.model import Model
from jaxengine.plan import Plan
from jaxengine.planning import plan_for
from pallas_kernels import aot
from pallas_kernels.audit import audit
from pallas_kernels.cards import find
from sharding.mesh import make_mesh

STEPS, SEED = 5, 7
HOW = Settings(
    train="all", optimizer="mezo", context=16, batch=2, steps=STEPS, compute="float32", learning_rate=2e-3, eps=1e-2,
    schedule="linear", warmup=0, weight_decay=0.5, seed=SEED,
)  # fmt: skip
LORA = dataclasses.replace(HOW, train="lora", targets=("q", "down"), learning_rate=2e-2, rank=4, alpha=8.0)
PLACES: dict[str, dict[str, Any]] = {
    "device": {"form": "scan"}, "host": {"home": "host"}, "split": {"home": "split", "resident": 1},
}  # fmt: skip
Made = tuple[list[Record], dict[tuple[int, str], Any]]


def load(family: str = "llama", **how: Any) -> Model:
    given: dict[str, Any] = {"dtype": "float32"} | how
    return jaxengine.load(GOLDEN / family, **given)


def by_name(model: Model, tree: Any) -> dict[tuple[int, str], Any]:
    """{(layer, name): leaf}, on numpy; layer L: outside of them."""
    arch, found = model.architecture, {}
    for i, held in layers(model.plan.parts(arch), tree["banks"]).items():
        found |= {(i, n): x for n, x in held.items()}
    found |= {(arch.num_layers, n): x for n, x in tree["outer"].items()}
    return jax.tree.map(np.array, found)


def run_of(model: Model, settings: Settings = HOW, **given: Any) -> Run:
    return Run(model, settings, rows(), **given)


def ran(run: Run) -> Made:
    records = list(run)
    return records, by_name(run.model, run._state.trained)


def losses(records: list[Record]) -> list[tuple[float, float]]:
    return [(r.loss, r.gradient_norm) for r in records]


def same(one: Made, other: Made) -> None:
    """To the bit."""
    assert losses(one[0]) == losses(other[0])
    assert one[1].keys() == other[1].keys()
    for k, leaf in one[1].items():
        jax.tree.map(lambda a, b, k=k: np.testing.assert_array_equal(a, b, err_msg=str(k)), leaf, other[1][k])


# ---------------------------------------------------------------------------------------------------------------------
# Against the whole tree


def noise(model: Model, step: int, layer: int, name: str, j: int, shape: tuple[int, ...]) -> np.ndarray:
    """By the rule that mezo.py's head states."""
    arch = model.architecture
    specs = arch.outer()[1] if layer == arch.num_layers else arch.block(arch.kinds[layer])[1]
    key = jax.random.key(SEED, impl="threefry2x32")
    for number in (step, layer, list(specs).index(name), j):
        key = jax.random.fold_in(key, number)
    return np.asarray(jax.random.normal(key, shape, jnp.float32), np.float64)


def oracle(run: Run) -> tuple[list[dict[str, float]], dict[tuple[int, str], Any]]:
    """MeZO over all arrays at once, float64; the run has its layers unrolled on the device, and is not run."""
    model, settings, arch = run.model, run.settings, run.model.architecture
    assert settings.eps is not None
    assert settings.learning_rate is not None
    start, eps = by_name(model, run._state.trained), settings.eps
    theta = jax.tree.map(lambda a: a.astype(np.float64), start)
    plain = {n.rpartition(".")[2] for n, s in arch.specs().items() if s.out is None}
    found = []

    def loss(theta: Any, batch: Batch) -> float:
        narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theta)
        (bank,), L = run._state.trained["banks"], arch.num_layers
        layers = tuple({n: narrow[i, n] for n in held} for i, held in enumerate(bank))
        tree = {"outer": {n: narrow[L, n] for n in run._state.trained["outer"]}, "banks": (layers,)}
        total, count = whole.evaluate(run.tuning, run._frozen, tree, jax.tree.map(lambda a: a[0], batch))
        return float(total) / float(count)

    def of_leaves(how: Any, tree: Any, *others: Any) -> Any:
        return {k: jax.tree.map(how, tree[k], *(o[k] for o in others)) for k in tree}

    for t in range(STEPS):
        batch, _, _ = run._next_batch()
        z = {}
        for (layer, name), leaf in theta.items():
            arrays, structure = jax.tree.flatten(leaf)
            drawn = [noise(model, t, layer, name, j, a.shape) for j, a in enumerate(arrays)]
            z[layer, name] = jax.tree.unflatten(structure, drawn)
        plus, minus = (loss(of_leaves(lambda a, z, s=s: a + s * eps * z, theta, z), batch) for s in (1, -1))
        g, rate = (plus - minus) / (2 * eps), settings.learning_rate * (1 - t / STEPS)
        decay = {
            k: jax.tree.map(lambda a, k=k: 0.0 if k[1] in plain else settings.weight_decay, theta[k]) for k in theta
        }
        theta = of_leaves(lambda a, z, d, g=g, rate=rate: a - rate * (g * z + d * a), theta, z, decay)
        found.append({"loss": (plus + minus) / 2, "g": g, "rate": rate})
    return found, theta


def held_to(found: Made, wanted: Any, settings: Settings) -> None:
    """Losses, g, the rate and the parameters at the end, as the head of this file derives."""
    assert settings.eps is not None
    assert settings.learning_rate is not None
    slope, most = (max(abs(w[n]) for w in wanted[0]) for n in ("g", "loss"))
    delta = CLOSE * most / settings.eps
    off = STEPS * settings.learning_rate * delta
    assert min(abs(w["g"]) for w in wanted[0]) > 5 * delta
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one.learning_rate == pytest.approx(other["rate"], rel=1e-6)
        assert one.loss == pytest.approx(other["loss"], abs=CLOSE * most + off * slope)
        # of a slope that is of the order of itself along z
        assert one.gradient_norm == pytest.approx(abs(other["g"]), abs=2 * delta + off * slope / settings.eps)
    assert found[1].keys() == wanted[1].keys()
    for k, leaf in found[1].items():
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(wanted[1][k]), strict=True):
            np.testing.assert_allclose(one, other, atol=6 * off, rtol=STEPS * 2.0**-23, err_msg=str(k))


def test_every_parameter_moves_as_the_whole_tree_does() -> None:
    """In every step the rate, decay of matrices alone, both signs of the noise; at the end the last step's change too."""
    run = run_of(load())
    before, wanted = by_name(run.model, run._state.trained), oracle(run)
    found = ran(run_of(load(home="host")))
    held_to(found, wanted, HOW)
    assert min(np.abs(x - before[k]).max() for k, x in found[1].items()) > 1e-4


def test_beside_quantised_matrices_in_host_memory() -> None:
    """And of a batch in parts, which go through a layer one after another."""
    wanted = oracle(run_of(load(weights="int8"), LORA))
    for settings in (LORA, dataclasses.replace(LORA, batch=1, accumulate=2)):
        run = run_of(load(weights="int8", home="host"), settings)
        held_to(ran(run), wanted, settings)
    assert run.memory()["host"] > run.memory()["device"] / 2


# ---------------------------------------------------------------------------------------------------------------------
# Wherever the layers are. Noise of another rule, which compiles in no time: its own is held to above


def hashed(key: Any, shape: tuple[int, ...]) -> Any:
    """Numbers in (-2, 2) that are exact in float32."""
    k = jax.random.key_data(key)
    i = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    mixed = ((i * jnp.uint32(2654435761) ^ k[0]) * jnp.uint32(2246822519)) ^ k[1]
    return (mixed >> 12).astype(jnp.float32) * jnp.float32(2.0**-18) - 2


HASHED = dataclasses.replace(HOW, eps=0.5**7, steps=6)  # of its own, or programs with the other noise would serve


def hashed_chance(key: Any, shape: tuple[int, ...]) -> Any:
    """In [0, 1)."""
    return (hashed(key, shape) + 2) / 4


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mezo, "draw", hashed)
    monkeypatch.setattr(mezo, "chance", hashed_chance)


def moved_to_the_device(model: Model) -> Model:
    """The same banks in the same forms, none of them streamed."""

    def here(x: Any) -> Any:
        return jax.device_put(x, x.sharding.with_memory_kind("device"))

    banks = tuple(
        dataclasses.replace(b, home="device", weights=jax.tree.map(here, b.weights)) for b in model.params["banks"]
    )
    model.params = model.params | {"banks": banks}
    return model


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    "how",
    [
        {"home": "host"}, {"home": "split", "resident": 1}, {"home": "host", "dtype": "bfloat16"},
        {"home": "host", "family": "gemma2"},  # whose layers alternate
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.some_rows
def test_streamed_layers_give_the_bits_of_resident_ones(how: dict[str, Any]) -> None:
    streamed = run_of(load(**how), HASHED)
    assert any(b.home == "host" for b in streamed.model.params["banks"])
    resident = moved_to_the_device(load(**how))
    frozen, state = jax.tree.map(lambda a: None, resident.params), streamed._state
    held = {"outer": resident.params["outer"], "banks": tuple(b.weights for b in resident.params["banks"])}
    state, found = mezo.initial(streamed.tuning, held, SEED), []
    feed = run_of(load(), HASHED)
    for _ in range(HASHED.steps):
        state, measured = mezo.step(streamed.tuning, frozen, state, feed._next_batch()[0])
        found.append((float(measured["loss"]), float(measured["gradient_norm"])))
    records, trained = ran(streamed)
    assert losses(records) == found
    settled = mezo.settle(streamed.tuning, frozen, state).trained
    for k, x in by_name(resident, settled).items():
        np.testing.assert_array_equal(x, trained[k], err_msg=str(k))
    assert max(found)[0] - min(found)[0] > 1e-3


@pytest.mark.usefixtures("cheap")
def test_adapters_of_alternating_layers_take_the_noise_of_their_own() -> None:
    """Changed before the first layer is run, against layers written out on the device, each changed as it is run: other sums
    of the same numbers, as far from each other as losses are times the rate by eps, 64 roundings of float32."""
    settings = dataclasses.replace(HASHED, train="lora", weight_decay=0.0)
    wanted, found = (
        ran(run_of(load("gemma2", **how), settings))
        for how in ({"home": "device", "form": "unrolled"}, {"home": "host"})
    )
    for one, other in zip(losses(found[0]), losses(wanted[0]), strict=True):
        assert one[0] == pytest.approx(other[0], rel=2**-18)
    named = {(k, n): x for k, leaf in wanted[1].items() for n, x in leaf.items()}
    moved = max(np.abs(x).max() for (_, n), x in named.items() if n == "b")  # which begins with zeros
    for (k, n), x in named.items():
        np.testing.assert_allclose(found[1][k][n], x, rtol=0, atol=moved / 1000, err_msg=str((k, n)))
    assert moved > 1e-3


@pytest.mark.usefixtures("cheap")
def test_layers_that_alternate_are_changed_in_their_turn() -> None:
    """On the device in a loop, against layers written out there, as above: each takes its own noise, decay and place."""
    wanted, found = (ran(run_of(load("gemma2", form=form), HASHED)) for form in ("unrolled", "scan"))
    for one, other in zip(losses(found[0]), losses(wanted[0]), strict=True):
        assert one[0] == pytest.approx(other[0], rel=2**-18)
    fresh = load("gemma2")
    before = by_name(fresh, {"outer": fresh.params["outer"], "banks": tuple(b.weights for b in fresh.params["banks"])})
    for k, x in wanted[1].items():
        moved = np.abs(x - before[k]).max()
        np.testing.assert_allclose(found[1][k], x, rtol=0, atol=moved / 1000, err_msg=str(k))
        assert moved > 1e-4


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("train", ["all", "dora"])
def test_it_goes_on_bit_for_bit(train: str, tmp_path: Path) -> None:
    """After ends at different places, with what was due: the losses, the state and what is written are those of an unbroken
    run; nor is the run another where the change that is due is asked for before its time."""
    settings = dataclasses.replace(HASHED, train=train, targets=("q",) if train == "dora" else ("*",))
    with run_of(load(home="host"), settings, out=tmp_path / "whole", save_every=3) as unbroken:
        wanted = unbroken.run()
    found: dict[int, Record] = {}
    for steps in (4, 1, None):
        with run_of(load(home="host"), settings, out=tmp_path / "parts", save_every=3) as run:
            assert run.step == {4: 0, 1: 3, None: 3}[steps]
            assert bool(run.step) == mezo.is_due(run._state)
            for record in itertools.islice(run, steps):
                assert losses([found.setdefault(record.step, record)]) == losses([record])
            last = run
    with run_of(load(home="host"), settings, out=tmp_path / "parts") as again:  # of a run that is over: what comes out
        assert again.run() == []
    same(
        (list(found.values()), by_name(last.model, last._state.trained)),
        (wanted, by_name(unbroken.model, unbroken._state.trained)),
    )
    name = "model/model.safetensors" if train == "all" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    asked = run_of(load(home="host"), settings)
    records = []
    for record in asked:
        records.append(record)
        tuned = asked.tuned()
        assert not mezo.is_due(asked._state)
        assert tuned.logits(np.arange(9)).shape == (1, 9, 101)
    assert losses(records) == losses(wanted)


@pytest.mark.usefixtures("cheap")
def test_what_is_held_out_is_scored_with_the_change_made() -> None:
    """As by the model that the run hands out."""
    settings = dataclasses.replace(LORA, steps=2, learning_rate=2.0, eps=HASHED.eps)
    held = documents(4, 60)
    run = Run(load(), settings, rows(), pack(held, 16), eval_every=2)
    *_, last = list(run)
    model, total, tokens = run.tuned(), 0.0, 0
    for ids, _ in (held[i] for i in range(len(held))):
        for start in range(0, len(ids) - 1, 16):
            part = ids[start : start + 17]
            z = np.asarray(model.logits(part[:-1])[0], np.float64)
            total += float((np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, part[1:, None], 1)[:, 0]).sum())
            tokens += len(part) - 1
    assert last.eval_loss == pytest.approx(total / tokens, rel=CLOSE)
    due, _ = Run(load(), settings, rows()), None
    next(due)
    before = np.asarray(due._combined()["banks"][0].weights[0]["q"].b)
    assert np.abs(before - np.asarray(due.tuned().params["banks"][0].weights[0]["q"].b)).max() > 1e-3


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_mezo import HASHED, hashed, hashed_chance, load, mezo, run_of
mezo.draw, mezo.chance = hashed, hashed_chance
with run_of(load(home="host", dtype="bfloat16"), HASHED, out=sys.argv[1], save_every=1) as run:
    for record in run:
        print(record.step, record.loss.hex(), record.gradient_norm.hex(), flush=True)
"""


@pytest.mark.usefixtures("cheap")
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 while a change is due, and while it and the parameters are written; at moments drawn anew in every test run."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    seed = time.time_ns()
    draw = random.Random(seed)
    found: dict[int, list[str]] = {}
    ends = []
    for kill_at in (draw.randrange(1, 4), draw.randrange(1, 3), None):
        words = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "out")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
            assert process.stdout is not None
            for count, line in enumerate(process.stdout, 1):
                step, *numbers = line.split()
                assert found.setdefault(int(step), numbers) == numbers, f"step {step}, seed {seed}"
                if count == kill_at:
                    time.sleep(draw.random() * 0.1)
                    process.kill()  # what it had said by then is read still
            ends.append(process.wait())
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
    unbroken = list(run_of(load(home="host", dtype="bfloat16"), HASHED))
    wanted = {i: [r.loss.hex(), r.gradient_norm.hex()] for i, r in enumerate(unbroken, 1)}
    assert found.items() <= wanted.items(), f"seed {seed}"
    assert len(wanted.keys() - found.keys()) <= 2, f"seed {seed}"  # one a kill, saved and not said yet
    assert found[6] == wanted[6]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 7), ("float16", 10)])
def test_a_change_is_rounded_once_to_the_dtype_of_the_parameter(dtype: str, digits: int) -> None:
    """theta - scale z in float32, up or down as the chance of this step and parameter says. What to the nearest would all be
    lost is made in the mean: the slope of what was made over what was due is 1, to five of its standard deviations."""
    model = load(dtype=dtype, form="scan")
    engine = dataclasses.replace(model.engine, dtype="float32", chunk=0)
    how: Any = Tuning(engine, "all", Options(narrow=True), Optimizer("mezo", eps=0.125), clip=0.0)
    held = {"outer": model.params["outer"], "banks": tuple(b.weights for b in model.params["banks"])}
    before, arch = by_name(model, held), model.architecture
    state = mezo.initial(how, held, SEED)
    for scale in (1e-3, 2.0**-digits * 4e-4):
        due = dataclasses.replace(state.optimizer, scale=jnp.float32(scale))
        kept = jax.tree.map(jnp.copy, dataclasses.replace(state, optimizer=due, step=jnp.int32(1)))
        after = by_name(model, mezo.settle(how, jax.tree.map(lambda a: None, model.params), kept).trained)
        made = wished = spread = nearest = 0.0
        for (layer, name), x in before.items():
            specs = arch.outer()[1] if layer == arch.num_layers else arch.block(arch.kinds[layer])[1]
            key = jax.random.key(SEED, impl="threefry2x32")
            for number in (0, layer, list(specs).index(name)):
                key = jax.random.fold_in(key, number)
            z = np.asarray(hashed(jax.random.fold_in(key, 0), x.shape), np.float64)
            chance = np.asarray(hashed_chance(jax.random.fold_in(key, 2**16), x.shape), np.float64)
            wanted = x.astype(np.float64) - np.float64(np.float32(scale)) * z
            near = wanted.astype(x.dtype)
            off = wanted - near.astype(np.float64)
            beyond = np.nextafter(near, np.where(off < 0, -np.inf, np.inf).astype(x.dtype))
            way = np.abs(beyond.astype(np.float64) - near.astype(np.float64))
            sure = np.abs(np.abs(off) - chance * way) > 2.0**-22 * np.abs(wanted)  # roundings of float32 before it
            sure &= np.abs(np.abs(off) - way / 2) > 2.0**-22 * np.abs(wanted)
            expected = np.where(chance * way < np.abs(off), beyond, near)
            np.testing.assert_array_equal(after[layer, name][sure], expected[sure], err_msg=f"{layer} {name}")
            assert sure.mean() > 0.9
            change, got = wanted - x.astype(np.float64), after[layer, name].astype(np.float64) - x.astype(np.float64)
            made, wished = made + (got * change).sum(), wished + (change * change).sum()
            nearest += ((near.astype(np.float64) - x.astype(np.float64)) * change).sum()
            spread += (change * change * np.abs(off) * (way - np.abs(off))).sum()
        assert abs(made / wished - 1) < 5 * math.sqrt(spread) / wished < 0.5
    assert nearest / wished < 0.5


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_card_rounds_by_chance_too(dtype: str) -> None:
    """XLA:GPU may take a cast there and back for the number itself, and then nothing is off and nothing is left to chance."""

    def rounded(x: Any, chance: Any) -> Any:
        return mezo.rounded(x, chance, jnp.dtype(dtype))

    number = jax.ShapeDtypeStruct((4096,), jnp.float32)
    with aot.target(aot.CARDS["H200"]) as target:
        text = target.compile(jax.jit(rounded), *target.place((number, number))).as_text()
    differences = re.findall(r"subtract\((%[\w.-]+), (%[\w.-]+)\)", text)
    assert differences
    assert all(a != b for a, b in differences), text


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"clip": 1.0}, "clip is 1.0, and 'mezo' makes no gradient"),
        ({"remat": "dots"}, "remat is 'dots', and 'mezo' makes no gradient"),
        ({"eps": 0.0}, "eps is 0; of 'mezo' it is the size of the noise, such as 0.001"),
        ({"train": "hift"}, "trains lora, dora, all"),
    ],
)
def test_settings_refuse_what_says_how_a_gradient_is_made(given: dict[str, Any], why: str) -> None:
    given = {"train": "all", "optimizer": "mezo"} | given
    with pytest.raises(ValueError, match=why):
        Settings(**given)


def test_what_is_usual() -> None:
    found = [Settings(train=train, optimizer="mezo") for train in ("all", "lora")]
    assert [(s.learning_rate, s.eps, s.clip) for s in found] == [(1e-6, 1e-3, 0.0), (5e-5, 1e-2, 0.0)]
    assert (Settings().eps, Settings().clip) == (1e-8, 1.0)
    with pytest.raises(ValueError, match="given no gradient"):
        Optimizer("mezo").make()
    for settings in found:
        assert Settings.from_json(settings.to_json()) == settings


def test_weights_that_are_not_what_they_stand_for_are_refused() -> None:
    with pytest.raises(ValueError, match="stored as 'int8': load with weights='dense', or train='lora'"):
        run_of(load(weights="int8"))
    with pytest.raises(ValueError, match="load with dtype='float32'"):
        run_of(load(dtype="bfloat16"), dataclasses.replace(HOW, optimizer="adamw", eps=1e-8, clip=1.0))


@pytest.mark.usefixtures("cheap")
def test_the_command_keeps_the_checkpoints_dtype_and_writes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text('{"text": "two and two are four"}\n' * 8)
    words = ("demo", str(data), "--out", str(out), "--train", "all", "--optimizer", "mezo", "--context", "16", "--steps", "2",
             "--batch", "2", "--eps", "0.01", "--learning-rate", "0.001", "--home", "host")  # fmt: skip
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"wrote {out / 'model'}"
    one, other = (jaxengine.load(f) for f in (jaxengine.demo_folder(), out / "model"))
    assert one.plan.dtype == other.plan.dtype == "bfloat16"
    assert np.abs(np.asarray(one.logits(np.arange(8))) - np.asarray(other.logits(np.arange(8)))).max() > 0.01
    done = invoke(*words, "--clip", "1")
    assert (done.exit_code, "clip is 1.0, and 'mezo' makes no gradient" in done.output) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def test_a_model_larger_than_the_card_is_planned_for() -> None:
    """Each layer goes to the card and back once a step; two passes forward are all that is computed."""
    arch, card = architecture(LLAMA_3_8B), find("rtx4090")
    chosen = plan_for(arch, BF16, card, memory=8 * 10**9, context=2048, task="mezo").chosen
    assert chosen is not None
    assert (chosen.plan.home, chosen.plan.dtype) == ("split", "bfloat16")
    elements = 8.03e9 - 128256 * 4096
    assert dict(chosen.seconds)["matmuls"] == pytest.approx(4 * elements * 2048 / card.tensor, rel=0.1)
    assert dict(chosen.seconds)["host link"] == pytest.approx(2 * chosen.need.host / card.link)
    whole = plan_for(arch, BF16, find("h200"), context=2048, task="mezo").candidates[0]
    assert (whole.need.gradients, whole.need.optimizer, whole.need.trained) == (0, 0, 0)
    # a layer, what is outside twice: next to what the same rows need to be scored
    assert whole.need.outer + whole.need.resident == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert whole.need.device < 1.15 * 2 * 8.03e9
    with pytest.raises(ValueError, match="weights is 'int8': task 'lora' trains beside"):
        plan_for(arch, Plan(dtype="bfloat16", weights="int8"), card, task="mezo")


TWELVE_LAYERS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_hidden_layers": 12},
    "gemma2": of("gemma2") | {"num_hidden_layers": 12, "layer_types": ["sliding_attention", "full_attention"] * 6},
}


@pytest.mark.parametrize(
    ("family", "task", "optimizer"), [("llama", "mezo", None), ("gemma2", "mezo", None), ("llama", "lora", "mezo")]
)
def test_a_program_is_no_larger_for_more_resident_layers(family: str, task: str, optimizer: str | None) -> None:
    """Which are planned for in a loop: the noise of each of their arrays would be made by operations of its own."""
    arch, what = architecture(TWELVE_LAYERS[family]), tuning.task(task, optimizer=optimizer)
    rows: dict[str, Any] = {"batch": 1, "context": 64}

    def size(resident: int, **form: str) -> int:
        split = dataclasses.replace(BF16, home="split", resident=resident, remat="full")
        memory = tuning.need(arch, split, what, **rows).device
        variants = tuning.variants(arch, BF16, what, memory=memory, ram=None, **rows)
        (planned,) = {v.plan for v in variants if v.plan.home == "split" and not v.plan.form}
        assert planned.resident == resident
        plan = dataclasses.replace(planned, **form)
        program, static, abstract = tuning.program(arch, plan, what, make_mesh(None), **rows)
        return program.on("cpu").trace(*static, *abstract).lower().as_text().count(" = ")

    assert size(4) == size(8)
    assert size(4) < size(4, resident_form="unrolled") < size(8, resident_form="unrolled")


@pytest.mark.aot
@pytest.mark.usefixtures("cheap")
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("plan", [{"form": "scan"}, {"home": "split", "resident": 4, "resident_form": "scan"}], ids=str)
def test_of_resident_layers_that_alternate_one_is_changed_at_a_time(plan: dict[str, Any]) -> None:
    """As is counted: XLA would bring a whole turn's beside the first."""
    arch, what = architecture(TWELVE_LAYERS["gemma2"]), tuning.task("mezo")
    chosen = dataclasses.replace(BF16, **plan)
    with aot.target(aot.CARDS["RTX 4090"]) as target:
        program, static, abstract = tuning.program(arch, chosen, what, cast(Any, target.mesh), batch=4, context=1024)
        compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
    need = tuning.need(arch, chosen, what, batch=4, context=1024)
    assert aot.device_bytes(compiled) == pytest.approx(need.device, rel=0.05)


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    ("card", "plan", "batch", "context", "vocab"),
    [("RTX 4090", {"home": "host"}, 4, 1024, 8192), ("RTX 4090", {"form": "scan"}, 1, 1024, 128256)],
    ids=str,
)
def test_the_compiled_step_agrees(card: str, plan: dict[str, Any], batch: int, context: int, vocab: int) -> None:
    """And changes each layer where it stands: nothing more in host memory, every copy a DMA."""
    arch, what = architecture(SMALL | {"vocab_size": vocab}), tuning.task("mezo")
    chosen = dataclasses.replace(BF16, **plan)
    with aot.target(aot.CARDS[card]) as target:
        program, static, abstract = tuning.program(
            arch, chosen, what, cast(Any, target.mesh), batch=batch, context=context
        )
        compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
    need, memory = tuning.need(arch, chosen, what, batch=batch, context=context), compiled.memory_analysis()
    assert aot.device_bytes(compiled) == pytest.approx(need.device, rel=0.05)
    assert aot.host_bytes(compiled) == need.host
    assert memory.host_temp_size_in_bytes == 0
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} <= {True}
    ways = [(c.source, c.target) for c in report.copies]
    # nine parameters a layer, in and out
    assert (ways.count(("host", "device")), ways.count(("device", "host"))) == ((7, 7) if "home" in plan else (0, 0))
