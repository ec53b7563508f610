"""A run of fine-tuning: what it learns and writes, that it goes on after any end as if nothing had been, and what it refuses.

Losses of two forms of one program are held to 64 roundings of float32, u = 2^-24 each: a token's loss goes through some 30
contractions and sums here, whose rounding is random but never aligned for so many. With plain gradient descent, which is
linear in the gradient, the same holds after some steps; and every case moves the loss by a thousand times as much, so that a
gradient of another layer, a lost part of a batch or an update that was not made would be seen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracles.golden import GOLDEN, golden
from test_events import read as read_events

import jaxengine
from checkpoints.peft import read_adapter
from checkpoints.safetensors import Reader
from jaxengine import command, export, placement
from jaxengine.architecture import architecture, initialise
from jaxengine.finetune import command as finetune_command
from jaxengine.finetune import layered
from jaxengine.finetune import run as runs
from jaxengine.finetune.data import DataError, Documents, Packed, pack
from jaxengine.finetune.run import Run, Settings, check_out, merge, said, with_adapter
from jaxengine.loading import from_arrays
from jaxengine.model import Model
from jaxengine.plan import Plan
from jaxengine.weights.base import contract
from pallas_kernels import dispatch
from sharding.mesh import make_mesh

ROOT = Path(__file__).parent.parent
LLAMA = GOLDEN / "llama"
ADAPTERS = GOLDEN.parent / "golden_adapters"
CASES = sorted(folder.name for folder in ADAPTERS.iterdir())
T, V = 16, 101
CLOSE = 64 * 2.0**-24
SPLIT = pytest.param("lora", {"home": "split", "resident": 1}, id="lora-split")  # one layer alone is streamed
HOW = Settings(
    context=T, batch=2, steps=6, compute="float32", optimizer="sgd", learning_rate=0.3, schedule="linear", warmup=0,
)  # fmt: skip


def documents(n: int = 24, first: int = 0) -> Documents:
    """Sequences that count up by threes, of different lengths: a rule that is quickly learned."""
    lengths = np.random.default_rng(first).integers(3, 24, n)
    return Documents.of([(((np.arange(k) * 3 + i) % V).tolist(), [True] * k) for i, k in enumerate(lengths, first)])


def rows(n: int = 24, first: int = 0) -> Packed:
    return pack(documents(n, first), T)


def llama(**how: Any) -> Model:
    given: dict[str, Any] = {"dtype": "float32"} | how
    return jaxengine.load(LLAMA, **given)


def losses(run: Run, steps: int | None = None) -> list[float]:
    return [record.loss for record in itertools.islice(run, steps)]


def run_of(model: Model, settings: Settings = HOW, **given: Any) -> Run:
    return Run(model, settings, rows(), **given)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_settings_go_to_json_and_back() -> None:
    for settings in (Settings(), HOW, Settings(train="dora", targets=("q", "layers.0.*"), rs=True, epochs=3)):
        assert Settings.from_json(settings.to_json()) == settings
    assert Settings().epochs == 1
    assert Settings().learning_rate == 2e-4
    assert (Settings(optimizer="lion").b2, Settings().b2) == (0.99, 0.999)
    assert Settings(train="all").learning_rate == 1e-5
    with pytest.raises(ValueError, match="unknown field raank"):
        Settings.from_json('{"raank": 8}')


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 8.0}, "rank is 8.0; it is a whole number"),
        ({"batch": 0}, "batch is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 3, "epochs": 1}, "leave one out"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"optimizer": "sgd"}, "none is usual with sgd"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"train": "lorra"}, "Did you mean 'lora'"),
        ({"schedule": "cosin"}, "schedule is 'cosin'"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"compute": "float16"}, "float16 would need a loss scale"),
        ({"warmup": 2.5}, "warmup is 2.5"),
        ({"seed": 2**32}, "below 2\\^32"),
        ({"clip": math.inf}, "clip is inf"),
        ({"targets": "q"}, "targets is 'q'"),
        ({"b2": 1.0}, "below 1"),
        ({"eps": 0.0}, "eps is 0.0, and 'adamw' divides by it where a gradient is 0: at least 1.2e-38"),
        ({"eps": 1e-50, "optimizer": "muon"}, "eps is 1e-50, and 'muon' divides by it"),
        ({"eps": -1e-8}, "eps is -1e-08; it is a number, at least 0"),
        ({"steps": 5, "warmup": 5}, "at most 4 steps of warmup, or schedule='constant'"),
        ({"train": "all", "rank": 4}, "rank is 4, and train is 'all'.* goes with lora, dora"),
        ({"train": "lisa", "targets": ("q",)}, "targets is .*, and train is 'lisa'"),
    ],
)
def test_settings_refuse_what_cannot_be(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(**given)


def test_a_schedule_is_as_long_as_the_run() -> None:
    rate = Settings(learning_rate=1.0, warmup=0.25, schedule="linear").make_optimizer(8).rate()
    np.testing.assert_allclose(
        np.array([rate(i) for i in range(9)]), [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], atol=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.fixture(scope="module")
def resident() -> dict[str, list[float]]:
    """The losses of all layers on one device, by what is trained."""
    return {train: losses(run_of(llama(), dataclasses.replace(HOW, train=train))) for train in ("lora", "all")}


def moved_by(found: Sequence[float]) -> float:
    """How far training has moved the loss, beside what rounding could."""
    return max(found) - min(found)


@pytest.mark.parametrize(
    ("train", "how"),
    [("lora", {"home": "host"}), SPLIT, ("all", {"home": "host"})],
)
def test_streamed_layers_give_the_losses_of_resident_ones(
    train: str, how: dict[str, Any], resident: dict[str, list[float]]
) -> None:
    run = run_of(llama(**how), dataclasses.replace(HOW, train=train))
    found, wanted = losses(run), resident[train]
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)
    assert run.memory()["host"] > 0


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({}, "dense"),
        ({"train": "dora"}, "dense"),
        ({"accumulate": 2, "batch": 1}, "nf4"),
        ({"remat": "offload"}, "int8"),
    ],
    ids=str,
)
@pytest.mark.some_rows
def test_streamed_layers_beside_adapters_give_the_bits_of_resident_ones(how: dict[str, Any], weights: str) -> None:
    """The same program form: a scan."""
    settings = dataclasses.replace(HOW, **how)
    runs_of = [run_of(llama(form="scan", weights=weights, home=home), settings) for home in ("device", "host")]
    wanted, found = (losses(run) for run in runs_of)
    assert found == wanted
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    for one, other in zip(*(jax.tree.leaves(run._state) for run in runs_of), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.thorough
def test_a_loop_of_resident_layers_before_streamed_ones(remat: str) -> None:
    """As one loop over all of them, and as they are written out."""
    settings = dataclasses.replace(HOW, remat=remat)
    plans = {
        "whole": Plan(dtype="float32", form="scan"),
        "looped": Plan(dtype="float32", home="split", resident=2, resident_form="scan"),
        "written out": Plan(dtype="float32", home="split", resident=2),
    }
    runs_of = {
        name: run_of(jaxengine.load(jaxengine.demo_folder(), plan=plan), settings) for name, plan in plans.items()
    }
    assert [b.form for b in runs_of["looped"].model.params["banks"]] == ["scan", "scan"]
    found = {name: losses(run) for name, run in runs_of.items()}
    np.testing.assert_allclose(found["looped"], found["whole"], rtol=CLOSE)
    np.testing.assert_allclose(found["looped"], found["written out"], rtol=CLOSE)
    assert moved_by(found["whole"]) > 1000 * CLOSE * max(found["whole"])


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {"home": "host"}),
        ({"optimizer": "adamw", "learning_rate": 5e-3, "accumulate": 2, "batch": 1}, {"home": "host"}),
        ({"optimizer": "adafactor", "learning_rate": 5e-3}, {"home": "split", "resident": 1}),
    ],
    ids=str,
)
def test_streamed_layers_that_are_trained_give_the_bits_of_resident_ones(
    given: dict[str, Any], how: dict[str, Any]
) -> None:
    """The same step over the same banks, none of them in host memory."""
    settings = dataclasses.replace(HOW, train="all", **given)
    streamed, resident = run_of(llama(**how), settings), moved_to_the_device(llama(**how))
    assert any(b.home == "host" for b in streamed.model.params["banks"])
    held = {"outer": resident.params["outer"], "banks": tuple(b.weights for b in resident.params["banks"])}
    banks = tuple(dataclasses.replace(b, weights=()) for b in resident.params["banks"])
    state, found = layered.initial(streamed.tuning, banks, held), []
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer["banks"])} <= {"device"}
    feed = run_of(llama(), settings)
    for _ in range(HOW.steps):
        state, measured = layered.step(streamed.tuning, banks, state, feed._next_batch()[0])
        found.append(float(measured["loss"]))
    wanted = losses(streamed)
    assert found == wanted
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    for one, other in zip(jax.tree.leaves(streamed._state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def moved_to_the_device(model: Model) -> Model:
    """The same banks in the same forms, none of them streamed."""

    def here(x: Any) -> Any:
        return jax.device_put(x, x.sharding.with_memory_kind("device"))

    banks = tuple(
        dataclasses.replace(b, home="device", weights=jax.tree.map(here, b.weights)) for b in model.params["banks"]
    )
    model.params = model.params | {"banks": banks}
    return model


def longer(**how: Any) -> Model:
    """Five layers of a llama of the golden one's shape, so that in the form 'ahead' a loop is left of them."""
    raw = json.loads((LLAMA / "config.json").read_text()) | {"num_hidden_layers": 5}
    arch = architecture(raw)
    given: dict[str, Any] = {"dtype": "float32"} | how
    return from_arrays(arch, Plan(**given), initialise(arch, 0), raw)


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {"home": "host"}),
        ({"train": "dora", "accumulate": 2, "batch": 1}, {"home": "split", "resident": 2, "stay": ("k", "v")}),
        ({"remat": "offload"}, {"home": "split", "resident": 2}),
        ({"remat": "offload"}, {"home": "host", "weights": "nf4"}),
        ({"train": "dora"}, {"home": "host", "weights": "nf4"}),
    ],
    ids=str,
)
@pytest.mark.some_rows
@pytest.mark.thorough
def test_layers_fetched_ahead_give_the_losses_of_the_others(given: dict[str, Any], how: dict[str, Any]) -> None:
    """Of a plain scan, and of layers on the device."""
    settings, found = dataclasses.replace(HOW, steps=3, **given), {}
    resident = {"home": "device", "form": "scan"} | {n: x for n, x in how.items() if n == "weights"}
    for name, place in (("ahead", how | {"form": "ahead"}), ("scan", how), ("resident", resident)):
        model = longer(**place)
        assert {part.form for part in model.plan.parts(model.architecture)} >= {place.get("form", "scan")}
        found[name] = losses(run_of(model, settings))
    assert moved_by(found["scan"]) > 1000 * CLOSE * max(found["scan"])
    np.testing.assert_allclose(found["ahead"], found["scan"], rtol=CLOSE)
    np.testing.assert_allclose(found["ahead"], found["resident"], rtol=CLOSE)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"train": "all"}, "train='all' changes layers in host memory in a loop of its own"),
        ({"train": "hift"}, "train='hift' changes layers in host memory in a loop of its own"),
        (
            {"optimizer": "mezo", "learning_rate": None, "eps": None, "clip": None},
            "optimizer='mezo' changes what stands beside each layer",
        ),
        ({"remat": "dots"}, "what comes into it alone, and remat is 'dots'"),
    ],
    ids=str,
)
def test_layers_fetched_ahead_are_refused_where_they_have_no_way_back(given: dict[str, Any], why: str) -> None:
    model = longer(home="host", form="ahead")
    with pytest.raises(ValueError, match=f"form is 'ahead', and .*{why}.*: say form='scan'"):
        run_of(model, dataclasses.replace(HOW, **given))


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("remat", ["none", "dots", "offload"])
@pytest.mark.some_rows
def test_what_is_kept_for_the_way_back_changes_no_loss(
    train: str, remat: str, resident: dict[str, list[float]]
) -> None:
    found, wanted = losses(run_of(llama(), dataclasses.replace(HOW, train=train, remat=remat))), resident[train]
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)


U = 2.0**-8  # the unit roundoff of bfloat16


@pytest.mark.parametrize(("train", "how"), [("lora", {}), ("all", {}), ("all", {"home": "host"})], ids=str)
def test_arithmetic_in_bfloat16_follows_float32(
    train: str, how: dict[str, Any], resident: dict[str, list[float]]
) -> None:
    """Some 30 roundings of u each, of random sign: a root of 30 u. Training moves the loss by several times of that."""
    found, wanted = (
        losses(run_of(llama(**how), dataclasses.replace(HOW, train=train, compute="bfloat16"))),
        resident[train],
    )
    close = math.sqrt(30) * U
    assert moved_by(wanted) > 4 * close * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=close)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > 100 * CLOSE  # in bfloat16 indeed


@pytest.mark.parametrize("how", [{}, {"home": "host"}], ids=str)
def test_under_arithmetic_in_bfloat16_float32_parameters_take_changes_that_bfloat16_would_lose(
    how: dict[str, Any],
) -> None:
    """A step changes nearly every parameter by less than half of what is between two numbers of bfloat16. All steps' changes are
    those of float32 but for 64 roundings; of parameters rounded after each step most never change."""
    settings = dataclasses.replace(HOW, train="all", learning_rate=1e-4, schedule="constant")

    def narrow(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.device_put(np.asarray(x).astype(jnp.bfloat16).astype(np.float32), x.sharding), tree
        )

    def change(compute: str, after: Any = None) -> np.ndarray:
        model = llama(**how)
        model.params = narrow(model.params)
        run = run_of(model, dataclasses.replace(settings, compute=compute))

        def numbers() -> np.ndarray:
            return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(run._state.trained)])

        before = numbers()
        for _ in run:
            if after is not None:
                run._take(dataclasses.replace(run._state, trained=after(run._state.trained)))
        return numbers() - before

    def off(found: np.ndarray) -> float:
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    wanted, rounded = change("float32"), change("bfloat16", narrow)
    assert off(change("bfloat16")) < 64 * U
    assert (rounded == 0).mean() > 0.9
    assert off(rounded) > 3 * 64 * U


def test_parts_of_a_batch_are_one_batch(resident: dict[str, list[float]]) -> None:
    found = losses(run_of(llama(), dataclasses.replace(HOW, batch=1, accumulate=2)))
    np.testing.assert_allclose(found, resident["lora"], rtol=CLOSE)


def test_eight_devices_are_one() -> None:
    """Rows split over all of them; the frozen matrices in host memory, A, B and their moments over four."""
    settings = dataclasses.replace(HOW, batch=8, steps=3)
    one, eight = (
        run_of(llama(home="host", **how), settings) for how in ({}, {"mesh": "data=2,fsdp=4", "sharding": "fsdp"})
    )
    wanted = losses(one)
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    batch = eight._put(next(eight._feed), 1, 8)
    assert batch.tokens.sharding.shard_shape((1, 8, T)) == (1, 1, T)
    eight._feed = eight._batches(state=None)
    np.testing.assert_allclose(losses(eight), wanted, rtol=CLOSE)
    a = eight._state.trained["banks"][0][0]["q"]["a"]
    assert a.sharding.shard_shape(a.shape) == (2, 8, 48 // 4)
    shapes = [(x.shape, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(eight._state.optimizer)]
    assert ((2, 8, 48), (2, 8, 12)) in shapes


def test_held_out_loss_is_that_of_each_document_alone() -> None:
    model, held = llama(), documents(5, 50)
    run = Run(model, HOW, rows(), pack(held, T))
    total = tokens = 0.0
    for ids, _ in (held[i] for i in range(len(held))):
        for start in range(0, len(ids) - 1, T):  # as long documents are cut
            part = ids[start : start + T + 1]
            z = np.asarray(model.logits(part[:-1])[0], np.float64)
            total += float((np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, part[1:, None], 1)[:, 0]).sum())
            tokens += len(part) - 1
    assert run.evaluate() == pytest.approx(total / tokens, rel=CLOSE)
    with pytest.raises(ValueError, match="no held-out rows"):
        Run(model, HOW, rows()).evaluate()


def test_all_leaves_the_trained_parameters_in_the_model(tmp_path: Path) -> None:
    """At every step, and in what is written, in the checkpoint's own dtype."""
    model, settings, ids = llama(home="host"), dataclasses.replace(HOW, train="all"), np.arange(12)
    run = run_of(model, settings, out=tmp_path / "out")
    before = np.asarray(llama().logits(ids))
    first = losses(run, 1)
    assert np.abs(np.asarray(model.logits(ids)) - before).max() > 0.01
    assert len(first + [record.loss for record in run.run()]) == 6
    after = np.asarray(run.tuned().logits(ids))
    np.testing.assert_allclose(jaxengine.load(tmp_path / "out" / "model").logits(ids), after, atol=1e-5)
    run.close()


@pytest.mark.parametrize(("what", "said"), [("loss", "loss"), ("gradient_norm", "gradient's norm")])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(
    what: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = run_of(llama(), out=tmp_path / "out", save_every=1)
    advance = run._advance

    def lost(batch: Any) -> Any:
        state, measured = advance(batch)
        return state, measured | {what: jnp.float32(jnp.nan)} if run.step else measured

    monkeypatch.setattr(run, "_advance", lost)
    with pytest.raises(ValueError, match=f"the {said} of step 2 is nan: a smaller learning_rate"):
        run.run()
    run.wait()
    assert run._manager.latest_step() == 1
    run.close()


@pytest.mark.parametrize(
    ("train", "how"), [("lora", {}), ("all", {}), ("all", {"home": "host"}), ("all", {"mesh": "fsdp=8"})], ids=str
)
def test_what_the_last_step_has_lost_is_not_written(
    train: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step's loss and gradient are from before its change."""
    settings = dataclasses.replace(HOW, train=train, steps=2, batch=8 if how.get("mesh") else 2)
    run = run_of(llama(**how), settings, out=tmp_path / "out", save_every=1)
    advance = run._advance

    def infinite(x: jax.Array) -> jax.Array:
        made = np.asarray(x).copy()
        made.flat[-1] = np.inf  # one number of the last layer's last matrix
        return jax.device_put(made, x.sharding)

    def lost(batch: Any) -> Any:
        state, measured = advance(batch)
        if not run.step:
            return state, measured
        *others, last = jax.tree.leaves(state.trained)
        trained = jax.tree.unflatten(jax.tree.structure(state.trained), [*others, infinite(last)])
        return dataclasses.replace(state, trained=trained), measured

    monkeypatch.setattr(run, "_advance", lost)
    with pytest.raises(ValueError, match="is trained is nan or infinite after step 2: a smaller learning_rate"):
        run.run()
    run.wait()
    assert run._manager.latest_step() == 1
    with pytest.raises(ValueError, match="nan or infinite after step 2"):
        run.export(tmp_path / "elsewhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not {"adapter", "model"} & {p.name for p in (tmp_path / "out").iterdir()}
    run.close()


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_an_async_save_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    """Steps that follow at once write over the arrays that were saved, on the device and in pinned memory."""
    import orbax.checkpoint as ocp

    mesh, n = make_mesh(None), 2**21
    places = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind=k) for k in (None, "pinned_host")
    ]
    step = jax.jit(lambda state: [x + 1 for x in state], donate_argnums=0, out_shardings=places)
    state = step([jax.device_put(np.arange(n, dtype=np.float32), place) for place in places])
    manager, args = runs._manager(tmp_path / "kept", 2, best=False), ocp.args
    manager.save(1, args=args.Composite(state=args.StandardSave(dict(zip("ab", state, strict=True)))))
    for _ in range(5):
        state = step(state)
    manager.wait_until_finished()
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in zip("ab", state, strict=True)}
    found = manager.restore(1, args=args.Composite(state=args.StandardRestore(wanted))).state
    for name, now in zip("ab", state, strict=True):
        assert found[name].sharding == now.sharding
        np.testing.assert_array_equal(found[name], np.arange(n) + 1)
        assert np.asarray(now)[0] == 6
    manager.close()


def test_a_save_returns_before_the_checkpoint_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And steps are made meanwhile: its folder has its name when all of it is written, and not before."""
    from orbax.checkpoint._src.path import async_path

    named, rename = threading.Event(), async_path.rename

    async def held(source: Any, target: Any) -> None:
        assert await asyncio.to_thread(named.wait, 300)
        await rename(source, target)

    monkeypatch.setattr(async_path, "rename", held)
    folder = tmp_path / "out" / "checkpoints" / "1"
    with run_of(llama(), out=tmp_path / "out") as run:
        try:
            losses(run, 1)
            run.save()
            assert not folder.exists()
            losses(run, 2)
            assert not folder.exists()
        finally:
            named.set()
        run.wait()
        assert folder.is_dir()
        assert run._manager.latest_step() == 1


@pytest.mark.parametrize(("train", "how"), [("lora", {}), SPLIT, ("all", {}), ("all", {"home": "host"})])
@pytest.mark.some_rows
def test_a_run_goes_on_from_its_folder_bit_for_bit(train: str, how: dict[str, Any], tmp_path: Path) -> None:
    """After ends at different places: the losses, the state and what is written are those of an unbroken run."""
    settings = dataclasses.replace(HOW, train=train)
    unbroken = run_of(llama(**how), settings, out=tmp_path / "whole", save_every=3)
    wanted = [record.loss for record in unbroken.run()]
    found: dict[int, float] = {}
    for steps in (4, 1, None):  # ends after the 4th, again the 4th (3 + 1) and the last
        with run_of(llama(**how), settings, out=tmp_path / "parts", save_every=3) as run:
            assert run.step == {4: 0, 1: 3, None: 3}[steps]
            for record in itertools.islice(run, steps):
                assert found.setdefault(record.step, record.loss) == record.loss
            last = run
    assert [found[i] for i in range(1, 7)] == wanted
    assert last.memory() == unbroken.memory()
    for one, other in zip(jax.tree.leaves(unbroken._state), jax.tree.leaves(last._state), strict=True):
        assert one.sharding.memory_kind == other.sharding.memory_kind
        np.testing.assert_array_equal(one, other)
    with run_of(llama(**how), settings, out=tmp_path / "parts") as again:  # of a run that is over: what comes out
        assert again.run() == []
    name = "model/model.safetensors" if train == "all" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    unbroken.close()


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_finetune import HOW, dataclasses, llama, run_of
with run_of(llama(home="host"), dataclasses.replace(HOW, train="all"), out=sys.argv[1], save_every=1) as run:
    for record in run:
        print(record.step, record.loss.hex(), flush=True)
"""


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 while steps are made and checkpoints are written beside them, at moments drawn anew in every test run."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    draw, seed = random.Random(), time.time_ns()
    draw.seed(seed)
    found: dict[int, str] = {}
    ends = []
    for kill_at in (draw.randrange(1, 4), draw.randrange(1, 3), None):
        words = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "out")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
            assert process.stdout is not None
            for count, line in enumerate(process.stdout, 1):
                step, loss = line.split()
                assert found.setdefault(int(step), loss) == loss, f"step {step}, seed {seed}"
                if count == kill_at:
                    time.sleep(draw.random() * 0.1)
                    process.kill()  # what it had said by then is read still
            ends.append(process.wait())
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
    unbroken = losses(run_of(llama(home="host"), dataclasses.replace(HOW, train="all")))
    wanted = {i: loss.hex() for i, loss in enumerate(unbroken, 1)}
    assert found.items() <= wanted.items(), f"seed {seed}"
    assert len(wanted.keys() - found.keys()) <= 2, f"seed {seed}"  # one a kill, saved and not said yet
    assert found[6] == wanted[6]


def test_what_a_folder_of_an_older_version_does_not_say_is_as_usual(tmp_path: Path) -> None:
    model = llama()
    wanted = said(HOW, model.architecture, model.plan)
    older = {n: x for n, x in wanted.items() if n not in ("layers", "every", "order", "b1", "eps", "remat")}
    older["plan"] = {n: x for n, x in wanted["plan"].items() if n not in ("rules", "mesh")}
    (tmp_path / "settings.json").write_text(json.dumps(older))
    check_out(tmp_path, wanted)
    (tmp_path / "settings.json").write_text(json.dumps(older | {"b2": 0.5}))
    with pytest.raises(ValueError, match=r"b2 was 0\.5 and is 0\.999"):
        check_out(tmp_path, wanted)
    with pytest.raises(ValueError, match=r"remat was 'full' and is 'dots'"):
        check_out(tmp_path, wanted | {"b2": 0.5, "remat": "dots"})


def test_other_settings_models_and_data_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_of(llama(), out=out, save_every=2) as run:
        losses(run, 2)
    for change, why in (
        ({"rank": 2}, "rank was 8 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"train": "all"}, "train was 'lora' and is 'all'"),
        ({"steps": 0, "epochs": 1}, "epochs was 0 and is 1"),
    ):
        with pytest.raises(ValueError, match=why):
            run_of(llama(), dataclasses.replace(HOW, **change), out=out)
    with pytest.raises(ValueError, match="home was 'device' and is 'host'"):
        run_of(llama(home="host"), out=out)
    with pytest.raises(ValueError, match=r"model\.config was '\w+' and is"):
        Run(jaxengine.load(GOLDEN / "qwen2", dtype="float32"), HOW, rows(), out=out)
    other = llama()
    outer = other.params["outer"] | {"embedding": other.params["outer"]["embedding"] + 1}
    other.params = other.params | {"outer": outer}
    with pytest.raises(ValueError, match=r"model\.weights was"):
        run_of(other, out=out)
    merged = with_another_q(llama())
    with pytest.raises(ValueError, match=r"is of another run, .*: model\.layers was '\w+' and is '\w+'\. Say"):
        run_of(merged, out=out)
    settings = json.loads((out / "settings.json").read_text())
    del settings["model"]["layers"]  # as an older version wrote it
    (out / "settings.json").write_text(json.dumps(settings))
    run_of(llama(), out=out).close()
    with pytest.raises(ValueError, match=r"model\.layers was"):
        run_of(merged, out=out)
    with pytest.raises(DataError, match="data was"):
        Run(llama(), HOW, rows(first=3), out=out)
    with pytest.raises(ValueError, match="steps was 6 and is 8"):
        run_of(llama(), dataclasses.replace(HOW, steps=8), out=out)
    # at a constant rate a run may become longer
    constant = dataclasses.replace(HOW, schedule="constant")
    run_of(llama(), constant, out=tmp_path / "other").close()
    with run_of(llama(), dataclasses.replace(constant, steps=8), out=tmp_path / "other") as run:
        assert run.steps == 8
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no run's folder"):
        run_of(llama(), out=tmp_path / "mine")


def with_another_q(model: Model, layer: int = 1) -> Model:
    """The model with one layer's q changed by a little in all its arrays, wherever they stand."""

    def changed(w: Any) -> Any:
        return jax.device_put((np.asarray(w) + np.ones((), w.dtype)).astype(w.dtype), w.sharding)

    def of_stack(w: Any, i: int) -> Any:
        made = np.asarray(w).copy()
        made[i] += np.ones((), made.dtype)
        return jax.device_put(made, w.sharding)

    banks, first = [], 0
    for bank in model.params["banks"]:
        weights, at = [dict(w) for w in bank.weights], layer - first
        if 0 <= at < len(bank.kinds) * bank.repeats:
            if bank.form == "ahead":  # two layers
                weights[0]["rest"] = weights[0]["rest"] | {
                    "q": jax.tree.map(lambda w, i=at - 1: of_stack(w, i), weights[0]["rest"]["q"])
                }
            elif bank.stacked:
                weights[0]["q"] = jax.tree.map(lambda w, i=at: of_stack(w, i), weights[0]["q"])
            else:
                weights[at]["q"] = jax.tree.map(changed, weights[at]["q"])
        banks.append(dataclasses.replace(bank, weights=tuple(weights)))
        first += len(bank.kinds) * bank.repeats
    model.params = model.params | {"banks": tuple(banks)}
    return model


@pytest.mark.parametrize(
    "how",
    [
        {"form": "scan"}, {"home": "host"}, {"home": "host", "form": "ahead"}, {"home": "split", "resident": 1},
        {"weights": "int8"}, {"weights": "nf4", "home": "host"}, {"weights": "lossless", "dtype": "bfloat16"},
        {"mesh": "fsdp=8"}, {"mesh": "fsdp=2,data=4", "home": "host"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.some_rows
def test_a_layer_that_differs_is_seen_in_every_home_and_format(how: dict[str, Any]) -> None:
    first = runs._layers_digest(llama(**how))
    assert runs._layers_digest(llama(**how)) == first
    for layer in (1,) if how.get("form") == "ahead" else (0, 1):
        assert runs._layers_digest(with_another_q(llama(**how), layer)) != first


def test_layers_are_told_apart_by_their_numbers_and_not_by_where_they_stand() -> None:
    found = {runs._layers_digest(llama(**how)) for how in ({}, {"form": "scan"}, {"home": "host", "form": "ahead"})}
    assert len(found) == 1


def test_a_checkpoint_of_which_a_part_is_gone_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run_of(llama(), out=out, save_every=2) as run:
        losses(run, 4)
    (out / "checkpoints" / "4" / "state").rename(tmp_path / "state")
    with pytest.raises(
        ValueError, match=r"checkpoints/4 is a checkpoint without its state, .* to go on from step 2, or give"
    ):
        run_of(llama(), out=out)
    (out / "checkpoints" / "4").rename(tmp_path / "4")
    with run_of(llama(), out=out) as run:
        assert run.step == 2


def test_killed_while_its_settings_are_first_written_a_run_begins_anew(tmp_path: Path) -> None:
    """What a killed process leaves in the folder is no other's work; and nothing else is taken for it."""
    out = tmp_path / "out"
    words = (
        "import os, sys; from pathlib import Path; from checkpoints.output import output_file\n"
        "with output_file(Path(sys.argv[1]) / 'settings.json') as path:\n"
        "    path.write_text('{'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", words, str(out)], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (left,) = out.iterdir()
    assert re.fullmatch(r"\.settings\.json\..+\.\d+\.partial", left.name)
    model = llama()
    check_out(out, said(HOW, model.architecture, model.plan))
    with run_of(model, out=out) as run:
        assert len(losses(run)) == 6
    assert not left.exists()
    (tmp_path / "mine" / ".thesis.txt.host.7.partial").mkdir(parents=True)
    with pytest.raises(ValueError, match="no run's folder"):
        run_of(llama(), out=tmp_path / "mine")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_step_saves_and_the_run_goes_on(
    resident: dict[str, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(llama(), out=tmp_path / "out")
    advance = run._advance

    def interrupted(batch: Any) -> Any:
        made = advance(batch)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # Python takes it here, where the old state is written over and the new one not yet kept
        return made

    monkeypatch.setattr(run, "_advance", interrupted)
    found = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run(progress=lambda record: found.append(record.loss))
    assert signal.getsignal(signal.SIGINT) is before
    assert run._manager.all_steps() == [3]
    assert run.stopped == f"stopped after step 3 of 6, which is saved in {tmp_path / 'out'}"
    run.close()
    with run_of(llama(), out=tmp_path / "out") as run:
        assert [*found, *resident["lora"][2:3], *losses(run)] == resident["lora"]


def test_a_run_that_stops_within_a_step_says_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C does not wait: what the step has written over cannot be saved."""
    run = run_of(llama(), out=tmp_path / "out", save_every=2)
    assert run.stopped == f"stopped before step 1 of 6; none is saved in {tmp_path / 'out'}"
    advance = run._advance

    def stopped(batch: Any) -> Any:
        if run.step == 3:
            jax.tree.map(lambda x: x.delete(), run._state)
            raise KeyboardInterrupt
        return advance(batch)

    monkeypatch.setattr(run, "_advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.wait()
    assert run.stopped == f"stopped after step 3 of 6; the last saved in {tmp_path / 'out'} is step 2"
    run.close()


def test_a_disk_without_room_is_said_before_a_checkpoint_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and where others filled it since; what was saved stays, and the same goes on when there is room."""
    out, free = tmp_path / "out", [0]
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free[0]))
    with pytest.raises(OSError, match=r"the disk has 0 B free; no step is saved\. Make room") as refused:
        run_of(llama(), out=out)
    assert command.is_the_users(refused.value)
    free[0] = 10**9
    with run_of(llama(), out=out, save_every=2) as run:
        list(itertools.islice(run, 3))
        free[0] = 1000
        with pytest.raises(
            OSError, match=r"up to 1\.\d+ MB, and the disk has 1 kB free; step 2 is the last saved\. Make"
        ):
            run.run()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["2"]
    free[0] = 10**9
    with run_of(llama(), out=out, save_every=2) as run:
        assert run.step == 2


def test_the_last_checkpoints_and_the_best_one_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [3.0, 1.0, 2.0, math.nan, 4.0, 5.0]
    run = Run(llama(), HOW, rows(), rows(3), out=tmp_path / "out", save_every=1, keep=2)

    def scripted() -> float:
        run._eval_loss = (run.step, held[run.step - 1])
        return held[run.step - 1]

    monkeypatch.setattr(run, "evaluate", scripted)
    states = {record.step: np.asarray(run._state.trained["banks"][0][0]["q"]["b"]) for record in run}
    run.wait()
    assert sorted(run._manager.all_steps()) == [2, 5, 6]
    assert run.best == (2, 1.0)
    run.take_best()
    np.testing.assert_array_equal(run._state.trained["banks"][0][0]["q"]["b"], states[2])
    assert np.abs(states[2] - states[6]).max() > 0
    assert list(run) == []
    run.close()


@pytest.mark.parametrize("at", [2, 4])  # on the way, and the last step
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_held_out_loss_that_ctrl_c_was_before_is_taken_when_the_run_goes_on(
    at: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str) -> Run:
        return Run(
            llama(), dataclasses.replace(HOW, steps=4), rows(), rows(4, 60), out=tmp_path / name, save_every=2, keep=4
        )

    def scores(name: str) -> dict[int, float]:
        files = sorted((tmp_path / name / "events").iterdir())
        return {step: n["eval/loss"] for file in files for step, n in read_events(file) if "eval/loss" in n}

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with opened("whole") as whole:
        whole.run()
    with opened("cut") as run:
        if where == "evaluation":
            evaluate = run.evaluate
            monkeypatch.setattr(run, "evaluate", lambda: (stopped if run.step == at else evaluate)())
        else:  # as where a Ctrl-C waits for the step's end
            tell = run._tell
            monkeypatch.setattr(run, "_tell", lambda record: (stopped if record.step == at else tell)(record))
        with pytest.raises(KeyboardInterrupt):
            run.run()
        assert run._manager.all_steps() == list(range(2, at + 1, 2))
        assert run._manager.metrics(at) == {"eval_loss": math.inf}
    with opened("cut") as run:
        assert run.step == at
        run.run()
    assert run.best == whole.best
    assert {i: run._manager.metrics(i) for i in (2, 4)} == {i: whole._manager.metrics(i) for i in (2, 4)}
    assert scores("cut") == scores("whole")
    (tmp_path / "cut" / "checkpoints" / "4" / "metrics" / "metrics").unlink()  # as of a run without held-out rows
    with opened("cut") as run:
        assert list(run) == []
        assert run.best == whole.best


def test_events(tmp_path: Path, resident: dict[str, list[float]]) -> None:
    with Run(llama(), HOW, rows(), rows(4, 60), out=tmp_path / "out", eval_every=3) as run:
        records = run.run()
    (file,) = (tmp_path / "out" / "events").iterdir()
    told = read_events(file)
    trained = {step: numbers for step, numbers in told if "train/loss" in numbers}
    assert [trained[i]["train/loss"] for i in range(1, 7)] == resident["lora"]
    assert trained[1]["train/learning_rate"] == np.float32(0.3)
    assert trained[1]["bytes/device"] == run.memory()["device"]
    assert {s: n["eval/loss"] for s, n in told if "eval/loss" in n} == {
        r.step: np.float32(r.eval_loss) for r in records if r.eval_loss is not None
    }
    assert [r.step for r in records if r.eval_loss is not None] == [3, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("case", CASES)
@pytest.mark.some_rows
def test_pefts_adapters_beside_and_merged(case: str, tmp_path: Path) -> None:
    """Logits that peft gave, from the adapter beside the matrices, and from a folder that it was merged into."""
    base = case.partition("_")[0]
    with np.load(ADAPTERS / case / "logits.npz") as file:
        wanted = file["logits"]
    ids = golden(base)[0][0]
    how: dict[str, Any] = {"home": "host"} if "rslora" in case or "phi3" in case else {}
    model = jaxengine.load(GOLDEN / base, dtype="float32", adapter=ADAPTERS / case, **how)
    np.testing.assert_allclose(model.logits(ids)[0], wanted, atol=2e-4, rtol=0)
    held = jaxengine.load(GOLDEN / base, dtype="float32", adapter=ADAPTERS / case, memory="1GB")
    extra = [x for x in jax.tree.leaves(held.params) if x.dtype == jnp.float32]
    plain = [
        x for x in jax.tree.leaves(jaxengine.load(GOLDEN / base, dtype="float32").params) if x.dtype == jnp.float32
    ]
    assert held.budget is not None
    assert 10**9 - held.budget <= sum(x.nbytes for x in extra) - sum(x.nbytes for x in plain)
    assert held.budget < 10**9
    with pytest.raises(ValueError, match="adapter alone takes"):
        jaxengine.load(GOLDEN / base, dtype="float32", adapter=ADAPTERS / case, memory=100)
    merge(model, tmp_path / "merged")
    with pytest.raises(ValueError, match="not empty"):
        merge(model, tmp_path / "merged")
    np.testing.assert_allclose(jaxengine.load(tmp_path / "merged").logits(ids)[0], wanted, atol=2e-4, rtol=0)


def test_what_stands_beside_a_layer_in_host_memory_is_added_to_it() -> None:
    """A streamed layer that stands alone is in host memory as it is, A and B are on the device."""
    case = next(c for c in CASES if c.startswith("llama"))
    found = []
    for how in ({}, {"home": "split", "resident": 1}):
        model = llama(adapter=ADAPTERS / case, **how)
        parts = placement.stored(model.architecture, model.plan, model.params)
        found.append({name: export.dense(get(), np.dtype("float32")) for name, get in parts.items()})
    alone = llama()
    plain = placement.stored(alone.architecture, alone.plan, alone.params)
    moved = [n for n in found[0] if (found[0][n] != export.dense(plain[n](), np.dtype("float32"))).any()]
    assert any(n.startswith("layers.1.") for n in moved)
    for name, x in found[0].items():
        np.testing.assert_array_equal(found[1][name], x, err_msg=name)


def test_an_adapter_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        HOW, train="dora", targets=("q", "layers.1.down"), rank=4, alpha=8.0, rs=True, steps=2
    )
    model, ids = llama(), np.arange(9)
    with run_of(model, settings, out=tmp_path / "out") as run:
        run.run()
        tuned, state = np.asarray(run.tuned().logits(ids)), run._state.trained["banks"][0]
    folder = tmp_path / "out" / "adapter"
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["use_dora"]) == (4, 8, True, True)
    assert raw["base_model_name_or_path"] == str(LLAMA)
    lead = "base_model.model.model.layers."
    with Reader.open(folder / "adapter_model.safetensors") as reader:
        assert {name.removeprefix(lead) for name in reader.names} == {
            f"{module}.{part}"
            for module in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        }
        b = reader.read(f"{lead}1.self_attn.q_proj.lora_B.weight")
        np.testing.assert_array_equal(b, np.asarray(state[1]["q"]["b"]).reshape(-1, 4))
        assert np.abs(b).max() > 0
    arch = model.architecture
    adapters, config = read_adapter(folder, arch.name_table(), arch.params(), arch.num_layers)
    assert config.scale("layers.0.q") == 8 / 2
    np.testing.assert_array_equal(adapters["layers.1.down"].magnitude, state[1]["down"]["magnitude"])
    again = with_adapter(llama(home="host"), folder)  # one layer's down has none, in a stack
    np.testing.assert_allclose(again.logits(ids), tuned, atol=1e-5)
    assert np.abs(np.asarray(model.logits(ids)) - tuned).max() > 0.001


def loss_of(model: Model, rows: dict[str, np.ndarray]) -> float:
    """The mean loss of a batch's learned tokens, each document read alone, by the model's logits in float64."""
    total = 0.0
    for tokens, targets, weights, segments in zip(
        *(rows[n] for n in ("tokens", "targets", "weights", "segments")), strict=True
    ):
        for segment in sorted(set(segments[segments > 0].tolist())):
            own = segments == segment
            z = np.asarray(model.logits(tokens[own])[0], np.float64)
            each = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[own][:, None], 1)[:, 0]
            total += float((each * weights[own]).sum())
    return total / float(rows["weights"].sum())


@pytest.mark.parametrize("how", [{}, {"home": "host"}], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c != "llama_rslora"])
@pytest.mark.some_rows
def test_a_run_starts_from_pefts_adapter(case: str, how: dict[str, Any]) -> None:
    """The first loss is that of the model with the adapter beside it, whose logits are peft's (above)."""
    base = GOLDEN / case.partition("_")[0]
    model = jaxengine.load(base, dtype="float32", **how)
    start = runs.begun(ADAPTERS / case, model.architecture)
    settings = dataclasses.replace(HOW, **start.settings)
    run = run_of(model, settings, adapter=ADAPTERS / case)
    first = next(iter(run._batches(state=None)))
    beside = loss_of(jaxengine.load(base, dtype="float32", adapter=ADAPTERS / case), first)
    assert abs(beside - loss_of(jaxengine.load(base, dtype="float32"), first)) > 100 * CLOSE * beside
    (found,) = losses(run, 1)
    assert found == pytest.approx(beside, rel=CLOSE)


@pytest.mark.parametrize("train", ["lora", "dora"])
@pytest.mark.thorough
def test_a_run_from_an_adapter_goes_on_where_that_ended(train: str, tmp_path: Path) -> None:
    """Six steps of one batch are three, and three from what those wrote: losses, and what comes out."""
    settings = dataclasses.replace(
        HOW, train=train, rank=4, alpha=3.0, rs=True, targets=("q", "layers.1.down"), schedule="constant", steps=6,
        b1=0.0,
    )  # fmt: skip
    one = Documents.of([(((np.arange(T + 1) * 3 + i) % V).tolist(), [True] * (T + 1)) for i in range(2)])
    whole = Run(llama(), settings, pack(one, T))
    wanted = losses(whole)
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    half = dataclasses.replace(settings, steps=3)
    with Run(llama(), half, pack(one, T), out=tmp_path / "first") as first:
        found = [r.loss for r in first.run()]
    folder = tmp_path / "first" / "adapter"
    model = llama()
    assert runs.begun(folder, model.architecture).settings == {
        n: getattr(settings, n) for n in ("train", "rank", "alpha", "rs", "targets")
    }
    with Run(model, half, pack(one, T), out=tmp_path / "second", adapter=folder) as second:
        found += [r.loss for r in second.run()]
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)
    ids = np.arange(9)
    sum_of_both = np.asarray(llama(adapter=tmp_path / "second" / "adapter").logits(ids))
    np.testing.assert_allclose(sum_of_both, whole.tuned().logits(ids), atol=1e-4)
    assert np.abs(np.asarray(llama(adapter=folder).logits(ids)) - sum_of_both).max() > 0.01
    others: list[dict[str, Any]] = [{}, {"adapter": tmp_path / "second" / "adapter"}]
    for change in others:
        with pytest.raises(ValueError, match=r"model\.adapter was '\w+' and is"):
            Run(llama(), half, pack(one, T), out=tmp_path / "second", **change)
    with Run(llama(), half, pack(one, T), out=tmp_path / "second", adapter=folder) as again:
        assert again.run() == []


def test_what_an_adapter_says_is_not_said_otherwise(tmp_path: Path) -> None:
    case, model = ADAPTERS / "llama_lora", llama()
    settings = dataclasses.replace(HOW, **runs.begun(case, model.architecture).settings)
    for change, why in (
        ({"rank": 8}, "rank is 8, and that of the adapter in .* is 4"),
        ({"alpha": 4.0}, "alpha is 4.0, .* is 12"),
        ({"rs": True}, "rs is True"),
        ({"targets": ("q", "v")}, "targets is .* say targets="),
        ({"train": "dora"}, "train is 'dora', .* is 'lora'"),
        ({"train": "all", "rank": 8, "alpha": 16.0, "targets": ("*",)}, "train is 'all', .* is 'lora'"),
    ):
        with pytest.raises(ValueError, match=why):
            run_of(model, dataclasses.replace(settings, **change), adapter=case)
    run_of(model, dataclasses.replace(settings, targets=("*",)), adapter=case)  # the same matrices
    with pytest.raises(ValueError, match="beside lm_head, and a run trains beside matrices inside layers alone"):
        run_of(model, settings, adapter=ADAPTERS / "llama_rslora")
    for name in ("llama_lora", "llama_dora"):
        with pytest.raises(ValueError, match=r"the model has an adapter beside .* Run\(\.\.\., adapter=FOLDER\)"):
            run_of(llama(adapter=ADAPTERS / name), HOW, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def invoke(*words: str) -> Result:
    return CliRunner().invoke(command.app, ["finetune", *words])


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows of a task that the demo does not know."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = ({"prompt": f"{i} + {j} =", "completion": f" {i + j}"} for i in range(12) for j in range(12))
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_a_run_without_a_folder_is_told_where_it_is(sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's name, whole, the data's and what is trained: said at once, and gone on with by the same command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Demo-0.1B").symlink_to(jaxengine.demo_folder())
    words = ("Demo-0.1B", sums, "--context", "32", "--steps", "1", "--memory", "1GB")
    for _ in range(2):
        done = invoke(*words)
        assert done.exit_code == 0, done.output
        assert "--out is not given: the run is in Demo-0.1B-sums-lora\n" in done.stderr
    assert (tmp_path / "Demo-0.1B-sums-lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert "wrote Demo-0.1B-sums-lora/adapter" in done.stdout


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.thorough
def test_the_demo_learns_goes_on_after_ctrl_c_and_is_merged(
    sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (
        "demo", sums, "--out", str(out), "--context", "48", "--batch", "8", "--steps", "12", "--learning-rate", "3e-3",
        "--compute", "float32", "--eval", "0.1", "--save-every", "4",
        "--weights", "int8", "--home", "host", "--merge", str(tmp_path / "merged"),
    )  # fmt: skip
    told: list[runs.Record] = []

    def show(self: Any, record: runs.Record) -> None:
        told.append(record)
        if len(told) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_command.Steps, "__call__", show)
        done = invoke(*words)
    assert (done.exit_code, done.stdout) == (130, "")
    assert (
        f"\nstopped after step 6 of 12, which is saved in {out}. To go on, type the same again:\n" in "\n" + done.stderr
    )
    assert len(told) == 6
    assert not (out / "adapter").exists()
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    said = done.stdout.splitlines()
    assert said[0].startswith("step 8: held-out loss ")
    assert said[-2:] == [f"wrote {out / 'adapter'}", f"wrote {tmp_path / 'merged'}"]
    last = float(next(line for line in said if line.startswith("12 steps")).rpartition(" ")[2])
    assert last < 0.7 * told[0].loss
    assert told[3].eval_loss is not None
    assert float(said[1].rpartition(" ")[2]) < told[3].eval_loss
    # the merged folder is bfloat16, as the demo is: 2^-9 of each weight
    quantised = jaxengine.load(jaxengine.demo_folder(), dtype="float32", weights="int8", home="host")
    beside = with_adapter(quantised, out / "adapter")
    merged = jaxengine.load(tmp_path / "merged", dtype="float32", home="host")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    ids = merged.tokenizer.encode("7 + 4 =") if merged.tokenizer else []
    plain = np.asarray(quantised.logits(ids))
    apart = np.abs(np.asarray(beside.logits(ids)) - np.asarray(merged.logits(ids))).max()
    assert apart < 0.02 * np.abs(np.asarray(beside.logits(ids)) - plain).max()
    # the same again makes nothing new, but for the folder that is there
    done = invoke(*words)
    assert done.exit_code == 2
    assert "is not empty" in done.output
    done = invoke(*words[:-2])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"wrote {out / 'adapter'}")


class Told(io.StringIO):
    """Standard error, a terminal or none."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Stepping:
    """A run as what shows its steps sees it."""

    def __init__(self, steps: int, step: int = 0) -> None:
        self.steps, self.step = steps, step

    def memory(self) -> dict[str, int]:
        return {"device": 12_300_000, "host": 4_560_000_000}

    def records(self) -> list[runs.Record]:
        return [
            runs.Record(i, self.steps, 1000 / i, 1.0, 1e-4, 7, 1234.4 + i, 0.1)
            for i in range(self.step + 1, self.steps + 1)
        ]


@pytest.mark.parametrize("terminal", [True, False])
def test_loss_tokens_a_second_and_bytes_by_tier_are_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told, run = Told(terminal=terminal), Stepping(3)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "160")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", told)
    with finetune_command.Steps(run) as shown:
        for record in run.records():
            shown(record)
    monkeypatch.undo()
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.getvalue())
    last = "loss 333.3333, 1,237 tokens/s, device 12.3 MB, host 4.56 GB"
    assert last in said
    if terminal:
        assert "3/3" in said
    else:
        assert said == told.getvalue()  # no codes of a terminal in a log
        assert said.splitlines() == [
            "step 1 of 3: loss 1000.0000, 1,235 tokens/s, device 12.3 MB, host 4.56 GB",
            "step 2 of 3: loss 500.0000, 1,236 tokens/s, device 12.3 MB, host 4.56 GB",
            f"step 3 of 3: {last}",
        ]


@pytest.mark.parametrize(("steps", "step"), [(1, 0), (40, 0), (41, 0), (999, 0), (100_003, 0), (1000, 700)])
def test_a_log_has_some_dozens_of_lines(steps: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told, run = Told(terminal=False), Stepping(steps, step)
    monkeypatch.setattr(sys, "stderr", told)
    with finetune_command.Steps(run) as shown:
        for record in run.records():
            shown(record)
    monkeypatch.undo()
    found = [int(line.split()[1]) for line in told.getvalue().splitlines()]
    assert (found[0], found[-1]) == (step + 1, steps)
    assert len(set(found)) == len(found) <= 50
    assert len(found) >= min(steps - step, 20 if not step else 10)


class FoundError(Exception):
    """A command came to where it loads the model."""


def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that models are to be loaded with from now on, where commands end with FoundError."""

    def load(folder: str, *, plan: Any, progress: Any) -> None:
        chosen.append(plan)
        raise FoundError

    chosen: list[Any] = []
    monkeypatch.setattr(jaxengine, "load", load)
    return chosen


def test_memory_chooses_where_layers_stand(sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = loaded(monkeypatch)
    words = ("demo", sums, "--out", str(tmp_path / "out"), "--context", "64", "--memory")
    for memory in ("64MB", "5.5MB"):
        assert isinstance(invoke(*words, memory).exception, FoundError)
    assert [plan.home for plan in chosen] == ["device", "host"]
    assert chosen[0].remat == "none"
    done = invoke(*words, "1MB")
    assert done.exit_code == 2
    assert "memory='1MB': a step on 4 x 64 tokens needs at least 5.05 MB of the device" in done.output


@pytest.mark.thorough
def test_a_run_goes_on_in_the_homes_that_it_began_in(
    sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever --memory would choose now, where other memory is free."""
    plans: list[Any] = []
    original = jaxengine.load
    monkeypatch.setattr(jaxengine, "load", lambda *a, **how: plans.append(how["plan"]) or original(*a, **how))

    def words(out: str, steps: int, memory: str) -> tuple[str, ...]:
        how = f"--context 64 --schedule constant --warmup 0 --steps {steps} --save-every 1 --memory {memory}"
        return ("demo", sums, "--out", str(tmp_path / out), *how.split())

    def lost(out: str) -> list[float]:
        found = [each for file in (tmp_path / out / "events").iterdir() for each in read_events(file)]
        return [v["train/loss"] for _, v in sorted(found, key=lambda each: each[0]) if "train/loss" in v]

    for each in (words("whole", 4, "5.5MB"), words("parted", 2, "5.5MB"), words("parted", 4, "64MB")):
        done = invoke(*each)
        assert done.exit_code == 0, done.output
        assert ("goes on as it began, with home 'host'" in done.output) == ("64MB" in each)
    assert [(p.home, p.resolved_form, p.remat) for p in plans] == 3 * [(plans[0].home, "scan", plans[0].remat)]
    assert plans[0].home == "host"
    assert lost("parted") == lost("whole")
    assert len(lost("whole")) == 4
    for more in ((*words("parted", 6, "64MB"), "--ram", "1MB"), words("parted", 6, "5.2MB")):
        done = invoke(*more)
        assert done.exit_code == 2
        assert re.search(r"of a run with home 'host' .* of host memory: [0-9.]+ .B over", done.output)
    done = invoke(*words("parted", 6, "64MB"), "--remat", "dots")
    assert "remat was 'full' and is 'dots'" in done.output
    done = invoke(*words("parted", 6, "64MB"), "--batch", "2")  # what differs is said, and not that it is large
    assert "batch was 4 and is 2" in done.output
    assert "home was" not in done.output


@pytest.mark.thorough
def test_a_run_goes_on_in_the_form_that_it_began_in(sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is said, whatever would be taken now; one that is said is another run's."""
    plans: list[Any] = []
    original = jaxengine.load
    monkeypatch.setattr(jaxengine, "load", lambda *a, **how: plans.append(how["plan"]) or original(*a, **how))

    def done(steps: int, *more: str) -> Any:
        how = f"--context 64 --schedule constant --warmup 0 --save-every 1 --steps {steps}"
        return invoke("demo", sums, "--out", str(tmp_path / "out"), *how.split(), *more)

    assert done(1, "--form", "unrolled").exit_code == 0
    assert done(2).exit_code == 0
    assert [plan.resolved_form for plan in plans] == ["unrolled", "unrolled"]
    again = done(3, "--form", "scan")
    assert again.exit_code == 2
    assert "form was 'unrolled' and is 'scan'" in again.output


@pytest.mark.parametrize(
    ("how", "targets", "advice"),
    [
        ({}, ("*",), ["form='scan'", "remat='none'"]),
        ({}, ("layers.0.q",), ["remat='none'"]),  # a stack's layers have the same ones
        ({"home": "split", "resident": 1}, ("*",), ["remat='none'"]),
        ({"memory": "30MB"}, ("*",), []),
        ({"form": "scan"}, ("*",), None),
    ],
    ids=str,
)
def test_on_a_cpu_what_is_advised_where_layers_are_written_out_is_taken(
    how: dict[str, Any], targets: tuple[str, ...], advice: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxengine")
    settings = dataclasses.replace(HOW, targets=targets, remat="full")
    run_of(llama(**how), settings)
    told = [m for m in caplog.messages if "remat='full' saves little" in m]
    assert len(told) == (advice is not None)
    assert re.findall(r"(?:form|remat)='\w+'", told[0])[1:] == advice if told else advice is None
    caplog.clear()
    for one in advice or ():
        taken = {"form": "scan"} if "form" in one else {}
        run_of(llama(**how | taken), settings if taken else dataclasses.replace(settings, remat="none"))
    assert not any("saves little" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--memory 4.5MB --context 64", ("--batch 2 --accumulate 2", "--memory ")),
        (
            "--memory 4.5MB --context 64 --batch 32 --mesh data=8",
            ("--batch 16 --accumulate 2", "--memory "),
        ),
        ("--memory 3MB --context 128 --batch 1", ("--context 64", "--memory ")),
        ("--memory 6MB --context 64 --remat dots", ("without --remat", "--batch ", "--memory ")),
        ("--memory 12MB --context 64 --rank 64 --remat none", ("--batch ", "--rank 8", "--memory ")),
        ("--memory 5.5MB --context 64 --batch 1 --train all", ("--train lora", "--memory ")),
        ("--memory 12MB --ram 1MB --context 64 --batch 1 --train all", ("--train lora", "--ram ")),
        ("--memory 1MB --context 64 --batch 1", ("--memory ",)),
    ],
)
def test_what_a_refusal_of_memory_advises_is_taken(
    words: str, said: tuple[str, ...], sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself, in the place of what was said of it; and none of it is so already."""

    loaded(monkeypatch)
    first = ("demo", sums, "--out", str(tmp_path / "out"), *words.split())
    done = invoke(*first)
    assert done.exit_code == 2, done.exception
    advised = done.stderr.strip().rpartition(". Nearest: ")[2].split(", or ")
    assert len(advised) == len(said), advised
    for one, begins in zip(advised, said, strict=True):
        assert one.startswith(begins)
        if one.startswith("without "):
            at = first.index(one.removeprefix("without "))
            again = (*first[:at], *first[at + 2 :])
        else:
            again = (*first, *one.split())  # of options given twice the last counts
        assert isinstance(invoke(*again).exception, FoundError), one


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ((), "scan"),
        (("--form", "unrolled"), "unrolled"),
        (("--remat", "none"), "unrolled"),
        (("--optimizer", "mezo"), "scan"),
        (("--train", "all", "--optimizer", "mezo"), "scan"),
        (("--target", "layers.0.q"), "unrolled"),  # a stack's layers have the same ones
        (("--home", "host", "--stay", "k"), "scan"),
    ],
    ids=str,
)
def test_on_a_cpu_layers_that_are_run_again_are_scanned(
    words: tuple[str, ...], form: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = loaded(monkeypatch)
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), "--context", "64", *words)
    assert isinstance(done.exception, FoundError), done.output
    assert (chosen[0].resolved_form, chosen[0].stay) == (form, ("k",) if "--stay" in words else ())


@pytest.mark.parametrize(
    ("words", "form", "remat"),
    [
        ((), "scan", "full"),
        (("--remat", "none"), "scan", "none"),
        (("--memory", "64MB"), "scan", "none"),
        (("--memory", "64MB", "--train", "dora", "--remat", "dots"), "unrolled", "dots"),
        (("--train", "dora"), "scan", "full"),
        (("--target", "layers.*.q"), "scan", "full"),
        (("--memory", "64MB", "--target", "layers.*.q"), "scan", "none"),
        (("--form", "unrolled"), "unrolled", "full"),
        (("--train", "all"), "unrolled", "full"),
        (("--optimizer", "mezo"), "scan", "full"),
        (("--train", "all", "--optimizer", "mezo"), "scan", "full"),
        (("--memory", "64MB", "--target", "layers.0.q"), "unrolled", "none"),
        (("--rule", "layers.1.*=int8"), "unrolled", "full"),  # two stacks of one layer
    ],
    ids=str,
)
def test_on_a_gpu_resident_layers_beside_adapters_are_scanned(
    words: tuple[str, ...], form: str, remat: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = loaded(monkeypatch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "gpu", lambda: None)
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), "--context", "64", *words)
    assert isinstance(done.exception, FoundError), done.output
    assert chosen[0].resolved_form == form
    assert chosen[0].remat == (remat if "--memory" in words else "")


@pytest.mark.parametrize(
    ("words", "on", "form"),
    [
        ((), "gpu", "scan"),
        ((), "cpu", "scan"),
        (("--remat", "none"), "gpu", "scan"),
        (("--remat", "none"), "cpu", ""),
        (("--train", "dora", "--remat", "none"), "gpu", ""),
        (("--train", "all"), "gpu", ""),
        (("--train", "all", "--optimizer", "mezo"), "gpu", "scan"),
        (("--optimizer", "mezo"), "cpu", "scan"),
        (("--target", "layers.0.q"), "gpu", ""),
        (("--resident", "1"), "gpu", ""),
    ],
    ids=str,
)
def test_resident_layers_before_streamed_ones_beside_adapters_are_scanned(
    words: tuple[str, ...], on: str, form: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = loaded(monkeypatch)
    monkeypatch.setattr(jax, "default_backend", lambda: on)
    monkeypatch.setattr(dispatch, "gpu", lambda: None)
    split = ("--home", "split", "--resident", "2", "--context", "64")
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), *split, *words)
    assert isinstance(done.exception, FoundError), done.output
    assert (chosen[0].home, chosen[0].resident_form) == ("split", form)


@pytest.mark.thorough
def test_a_run_with_written_out_layers_before_streamed_ones_goes_on_so(
    sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs of older versions have them, whose settings do not name their form."""
    how = "--home split --resident 2 --context 64 --schedule constant --warmup 0 --save-every 1 --steps".split()
    out, original, plans = tmp_path / "out", finetune_command._with_loops, []
    monkeypatch.setattr(finetune_command, "_with_loops", lambda arch, plan, settings: plan)
    done = invoke("demo", sums, "--out", str(out), *how, "1")
    assert done.exit_code == 0, done.output
    held = json.loads((out / "settings.json").read_text())
    assert held["plan"].pop("resident_form") == ""
    (out / "settings.json").write_text(json.dumps(held))
    monkeypatch.setattr(finetune_command, "_with_loops", original)
    real = jaxengine.load
    monkeypatch.setattr(jaxengine, "load", lambda *a, **given: plans.append(given["plan"]) or real(*a, **given))
    for steps, more in (("2", ()), ("3", ("--form", "scan"))):
        done = invoke("demo", sums, "--out", str(out), *how, steps, *more)
        assert done.exit_code == 0, done.output
    assert [p.resident_form for p in plans] == ["", ""]
    said_so = tmp_path / "plan.json"
    said_so.write_text(Plan(home="split", resident=2, resident_form="unrolled").to_json())
    done = invoke("demo", sums, "--out", str(out), *how, "4", "--plan", str(said_so))
    assert done.exit_code == 0, done.output
    done = invoke("demo", sums, "--out", str(tmp_path / "other"), *how, "1", "--form", "python")
    assert done.exit_code == 2
    assert "resident_form" not in done.output


def test_rules_of_frozen_weights_are_the_plans(sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = loaded(monkeypatch)
    (tmp_path / "plan.json").write_text('{"weights": "int4", "weight_rules": [["layers.0.*", "dense"]]}')
    words = (
        "--plan",
        str(tmp_path / "plan.json"),
        "--rule",
        "*.down=nf4",
        "--rule",
        "embedding=int8",
        "--memory",
        "1GB",
    )
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), "--context", "64", *words)
    assert isinstance(done.exception, FoundError), done.output
    assert chosen[0].weights == "int4"
    assert chosen[0].weight_rules == (("*.down", "nf4"), ("embedding", "int8"), ("layers.0.*", "dense"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--context", "4096"), "the model has positions for 384 tokens"),
        (("--home", "disk"), "Say home='host', or home='split'"),
        (("--home", "host", "--form", "ahead", "--train", "all"), "say form='scan'"),
        (("--home", "host", "--form", "ahead", "--remat", "dots"), "say form='scan'"),
        (("--home", "host", "--form", "python"), "Say home='host', or home='split'"),
        (("--home", "host", "--stay", "kk"), "stay: 'kk' matches no parameter of a layer"),
        (("--train", "all", "--weights", "int8"), "train='lora' beside the quantised matrices"),
        (("--train", "all", "--dtype", "bfloat16"), "load with dtype='float32'"),
        (("--train", "al"), "Did you mean 'all'"),
        (("--train", "all", "--rank", "4"), "--rank is of lora and dora"),
        (("--train", "all", "--merge", "x"), "OUT/model is the whole model"),
        (("--target", "query"), "Nearest: "),
        (("--weights", "nf5"), "There is no 'nf5'"),
        (("--rule", "embedding=nf5"), "rule 'embedding=nf5': There is no 'nf5'"),
        (("--rule", "layers.4.q=nf4"), "weight_rules: 'layers.4.q' matches no parameter"),
        (("--train", "all", "--rule", "layers.*.q=nf4"), "train='lora' beside the quantised matrices"),
        (("--optimizer", "adam"), "Did you mean 'adamw'"),
        (("--steps", "3", "--epochs", "1"), "leave one out"),
        (("--rank", "0"), "--rank"),
        (("--steps", "5", "--warmup", "5"), "at most 4 steps of warmup"),
        (("--context", "48", "--warmup", "99"), "at most 6 steps of warmup"),
        (("--eval", "1.5"), "between 0 and 1"),
        (("--eval", "none.jsonl"), "there is no file none.jsonl"),
        (("--best",), "give --eval too"),
        (("--ram", "1GB"), "give --memory too"),
        (("--memory", "1GB", "--home", "host"), "leave --home out"),
        (("--mesh", "data=8", "--sharding", "data"), "say batch=8"),
        (("--merge", "."), "--merge: . is not empty"),
        (("--merge", "OUT"), "out is where the run in "),
        (("--merge", "OUT/../new/../out/adapter"), "adapter is where the run in "),
        (("--merge", "OUT/checkpoints/x"), "x is where the run in "),
        (("--merge", "OUT/events"), "events is where the run in "),
        (("--merge", "OUT/.."), ".. is where the run in "),
        (("--plan", "TMP/int8.json"), "kv_codec is 'int8'; fine-tuning keeps no cache: leave it out of the plan"),
        (
            ("--mesh", "foo=2"),
            "there is no axis 'foo' but for rules of your own that name it: there are data, fsdp, tensor",
        ),
        (("--train", "all", "--adapter", "."), "--adapter starts from lora or dora"),
        (("--adapter", "."), "adapter_config.json"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    words: tuple[str, ...], why: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxengine, "load", None)
    (tmp_path / "int8.json").write_text(Plan(kv_codec="int8").to_json())
    words = tuple(word.replace("OUT", "TMP/out").replace("TMP", str(tmp_path)) for word in words)
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), *words)
    assert done.exit_code == 2, (done.output, done.exception)
    assert why in done.output
    assert not (tmp_path / "out").exists()


def test_dora_beside_a_part_of_a_joined_matrix_is_refused_before_it_is_trained() -> None:
    model = jaxengine.load(GOLDEN / "phi3", dtype="float32")
    with pytest.raises(ValueError, match=r"qkv_proj.* target k, v too, or train='lora'"):
        Run(model, dataclasses.replace(HOW, train="dora", targets=("q",)), rows())
    with pytest.raises(ValueError, match="packed for 16 tokens, and the context is 8"):
        Run(model, dataclasses.replace(HOW, context=8), rows())


def test_bad_rows_are_named_by_line(sums: str, tmp_path: Path) -> None:
    with open(sums, "a") as file:
        file.write('{"promt": "x"}\n')
    done = invoke("demo", sums, "--out", str(tmp_path / "out"), "--context", "48")
    assert done.exit_code == 2
    assert f"{sums}:145:" in done.output
    assert not (tmp_path / "out").exists()


def test_the_script_is_the_command() -> None:
    words = [sys.executable, "scripts/finetune.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    script, ours = (" ".join(text.split()) for text in (done.stdout, invoke("--help").output))
    assert script.partition("DATA...")[2] == ours.partition("DATA...")[2] != ""


@pytest.mark.parametrize("spec", ["btd,nhd->btnh", "btnh,dnh->btd"])
def test_ways_back_through_a_matrix_of_16_bits_are_products_of_16_bits_summed_in_float32(spec: str) -> None:
    """Autodiff of a rounded float32 sum widens the matrix and the gradient, and multiplies them in float32."""
    rng = np.random.default_rng(0)
    shapes = {"btd,nhd->btnh": ((2, 3, 512), (4, 8, 512)), "btnh,dnh->btd": ((2, 3, 4, 128), (24, 4, 128))}[spec]
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    y = jax.eval_shape(lambda: contract(spec, x, w))
    g = jnp.asarray(rng.standard_normal(y.shape), y.dtype)

    def back(g: Any) -> Any:
        return jax.vjp(lambda x, w: contract(spec, x, w), x, w)[1](g)

    dots = re.findall(r"stablehlo\.dot_general .* : \((.*)\) -> (\S+)", jax.jit(back).lower(g).as_text())
    assert len(dots) >= 2
    for operands, result in dots:
        assert (operands.count("xbf16>"), operands.count("xf32>")) == (2, 0)
        assert result.endswith("xf32>")
    left, right = spec.split("->")[0].split(",")
    out = spec.split("->")[1]
    wide = {n: np.asarray(a, np.float64) for n, a in (("x", x), ("w", w), ("g", g))}
    for found, want in zip(
        back(g),
        (
            np.einsum(f"{out},{right}->{left}", wide["g"], wide["w"]),
            np.einsum(f"{out},{left}->{right}", wide["g"], wide["x"]),
        ),
        strict=True,
    ):
        # rounded once to 8 bits; the sum's own error is far below
        np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=2**-8, atol=1e-4)
