"""What of streamed layers stands on the device: vectors always, and what `Plan.stay` names; nothing else changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest
from oracles.golden import GOLDEN, golden

import jaxengine
from jaxengine import placement, technique
from jaxengine.architecture import architecture
from jaxengine.config import ConfigError
from jaxengine.finetune.data import Documents, pack
from jaxengine.finetune.run import Run, Settings
from jaxengine.loading import from_arrays
from jaxengine.plan import (
    Plan,
    brought_bytes,
    check_stay,
    choose,
    layer_bytes,
    need,
    show_bytes,
    staying_bytes,
    tier_bytes,
)
from jaxengine.planning import plan_for
from jaxengine.sources import read_config
from pallas_kernels.cards import find
from sharding.mesh import make_mesh

FAMILIES = technique.names("jaxengine.models")


def arch_of(case: str) -> Any:
    return architecture(read_config(GOLDEN / case))


def kinds_of(params: Any) -> dict[str, set[str]]:
    """{parameter of a layer: the memory kinds that its arrays are in}."""
    found: dict[str, set[str]] = {}
    for bank in params["banks"]:
        for held in bank.weights:
            for layer in held.values() if held.keys() == {"one", "rest"} else [held]:
                for name, leaf in layer.items():
                    found.setdefault(name, set()).update(x.sharding.memory_kind for x in jax.tree.leaves(leaf))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["scan", "ahead", "python"])
def test_vectors_and_what_is_named_stand_on_the_device(family: str, form: str) -> None:
    """And the plan counts, and `abstract` promises, what then stands there."""
    arch, mesh = arch_of(family), make_mesh(None, devices=jax.devices()[:1])
    specs = {n: s for kind in set(arch.kinds) for n, s in arch.block(kind)[1].items()}
    first, *others = [n for n, s in specs.items() if s.out is not None]
    rng = np.random.default_rng(0)
    for stay in ((), (first,), ("*",)):
        plan = Plan(dtype="float32", home="host", form=form, stay=stay)
        params = placement.place(arch, plan, mesh, lambda name: rng.normal(size=arch.specs()[name].shape))
        found = kinds_of(params)
        assert found.keys() == specs.keys()
        for name, spec in specs.items():
            stays = spec.out is None or stay == ("*",) or name in stay
            assert found[name] == {"device" if stays else "pinned_host"}, name
        assert others
        tiers, leaves = tier_bytes(arch, plan), jax.tree.leaves(params["banks"])
        for tier, memory in (("device", "device"), ("host", "pinned_host")):
            assert tiers[tier] == sum(x.nbytes for x in leaves if x.sharding.memory_kind == memory)
        promised = jax.tree.leaves(placement.abstract(arch, plan, mesh))
        assert [x.sharding for x in promised] == [x.sharding for x in jax.tree.leaves(params)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some_rows
def test_the_same_bits(family: str) -> None:
    """As resident layers in the same form, whatever stays; and the checkpoint's numbers come out again."""
    prompts, data = golden(family)
    wanted = jaxengine.load(GOLDEN / family, dtype="float32", form="scan")
    first = next(n for n, s in wanted.architecture.block(wanted.architecture.kinds[0])[1].items() if s.out is not None)
    model = jaxengine.load(GOLDEN / family, dtype="float32", home="host", form="scan", stay=[f"layers.*.{first}"])
    assert model.plan.stay == (f"layers.*.{first}",)
    np.testing.assert_array_equal(model.logits(prompts[0]), wanted.logits(prompts[0]))
    tokens = model.generate(prompts[:1], max_new_tokens=16, stop_ids=())[0].tokens
    assert tokens == data["generated_0"].tolist()
    one, other = (placement.stored(m.architecture, m.plan, m.params) for m in (model, wanted))
    for name, get in one.items():
        np.testing.assert_array_equal(jax.device_get(get()), jax.device_get(other[name]()))


@pytest.mark.parametrize(
    "place",
    [
        {"home": "split", "resident": 1}, {"home": "host", "form": "ahead"}, {"home": "host", "form": "python"},
        {"home": "host", "mesh": "fsdp=8", "sharding": "fsdp"}, {"home": "host", "weights": "int8"},
    ],
    ids=str,
)  # fmt: skip
def test_in_every_place(place: dict[str, Any]) -> None:
    """Forms, a mesh and a quantised format: the numbers of the same place where only vectors stay."""
    prompts, _ = golden("gemma2")
    given: dict[str, Any] = {"dtype": "float32"} | place
    one, other = (jaxengine.load(GOLDEN / "gemma2", stay=stay, **given) for stay in ((), ("q", "down")))
    # another program: what was copied is sliced
    np.testing.assert_allclose(other.logits(prompts[0]), one.logits(prompts[0]), atol=1e-5, rtol=0)
    assert tier_bytes(other.architecture, other.plan)["host"] < tier_bytes(one.architecture, one.plan)["host"]


def test_scales_by_row_stay_and_those_of_groups_do_not() -> None:
    arch = arch_of("llama")
    spec = arch.specs()["layers.0.gate"]
    for weights, wanted in (("int8", 1), ("int4:group_size=16", 0)):
        stays = jax.tree.leaves(Plan(dtype="float32", weights=weights).stays("layers.0.gate", spec))
        assert (sum(stays), len(stays)) == (wanted, 2)


def test_bytes_of_a_layer_are_those_that_stay_and_those_that_are_brought() -> None:
    arch = arch_of("gemma2")
    plan = Plan(dtype="bfloat16", home="split", resident=1, stay=("o",))
    each, stays, brought = (f(arch, plan) for f in (layer_bytes, staying_bytes, brought_bytes))
    assert brought[0] == 0
    assert [b + s for b, s in zip(brought[1:], stays[1:], strict=True)] == each[1:]
    vectors = {n: s for n, s in arch.block(arch.kinds[1])[1].items() if s.out is None or n == "o"}
    assert stays[1] == sum(2 * int(np.prod(s.shape)) for s in vectors.values())


def test_a_budget_is_for_what_stays_too() -> None:
    arch, plan = arch_of("gemma2"), Plan(dtype="float32")
    wanted = need(arch, dataclasses.replace(plan, home="host", stay=("o",)), batch=1, context=64)
    assert choose(arch, dataclasses.replace(plan, stay=("o",)), wanted.device, length=64).stay == ("o",)
    without = need(arch, dataclasses.replace(plan, home="host"), batch=1, context=64)
    assert wanted.resident > without.resident > 0
    assert wanted.host < without.host


def test_without_what_stays_is_the_first_change_that_is_offered() -> None:
    """By `plan`, and in memory='s refusal, with its bytes."""
    arch, plan = arch_of("gemma2"), Plan(dtype="float32")
    kept, bare = (dataclasses.replace(plan, home="host", stay=s) for s in (("gate", "up", "down"), ()))
    budget = need(arch, bare, batch=1, context=64).device
    assert budget < need(arch, kept, batch=1, context=64).device
    found = plan_for(arch, kept, find("rtx4090"), memory=budget, batch=1, context=64)
    assert found.chosen is None
    said, offered = found.changes[0]
    assert said == "without stay"
    assert offered.plan.stay == ()
    assert offered.need.device <= budget
    with pytest.raises(
        ValueError, match=r"stay=\('gate', 'up', 'down'\) keeps .*Without stay, home 'split' fits, with"
    ) as e:
        choose(arch, kept, budget, length=64)
    assert f"{show_bytes(offered.need.device)} on the device and {show_bytes(offered.need.host)} in host" in str(
        e.value
    )
    with pytest.raises(ValueError, match="the smallest plan") as e:  # where it would not help it is not said
        choose(arch, kept, budget // 20, length=64)
    assert "Without stay" not in str(e.value)


def test_arrays_in_memory_are_checked_as_a_folder_is() -> None:
    arch = arch_of("gemma2")
    arrays = {n: np.zeros(s.shape, np.float32) for n, s in arch.specs().items()}
    plans = {
        "mesh is 'tensor=8' and sharding 'single'": {"mesh": "tensor=8", "sharding": "single"},
        "sharding is 'fsdp' and there is one device": {"sharding": "fsdp"},
        "does not divide": {"mesh": "tensor=8", "sharding": "tensor"},
    }
    for said, given in plans.items():
        with pytest.raises(ValueError, match=said):
            jaxengine.load(GOLDEN / "gemma2", dtype="float32", **given)
        with pytest.raises(ValueError, match=said):
            from_arrays(arch, Plan(dtype="float32", **given), arrays)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("stay", "said"),
    [
        (("qq",), r"'qq' matches no parameter of a layer; a layer's are .*Nearest: 'q'"),
        (("layers.*.gat",), "Nearest: 'gate'"),
        (("embedding",), "matches only embedding, outside the layers"),
        (("input_norm",), "'input_norm' names vectors alone"),
        (("layers.1.q",), "names q in 1 of 2 like layers.*say 'q' for all of them"),
    ],
)
def test_patterns_that_name_nothing_are_refused(stay: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jaxengine.load(GOLDEN / "llama", home="host", stay=stay)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="it is a tuple of name patterns"):
        Plan(home="host", stay="q")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="layers come from disk in one piece"):
        check_stay(arch_of("llama"), Plan(home="disk", stay=("q",)))
    check_stay(arch_of("gemma2"), Plan(home="disk", kept=1, stay=("q",)))
    for bad in ("q", 5, ["q", 5]):
        with pytest.raises((ValueError, ConfigError), match="stay is"):
            Plan.from_json(json.dumps({"stay": bad}))
    plan = Plan(home="host", stay=("q", "layers.*.k"))
    assert Plan.from_json(plan.to_json()) == plan


LENGTHS = np.random.default_rng(0).integers(3, 24, 24)
ROWS = pack(
    Documents.of([(((np.arange(k) * 3 + i) % 101).tolist(), [True] * int(k)) for i, k in enumerate(LENGTHS)]), 16
)


@pytest.mark.parametrize("train", ["all", "lora", "lisa", "mezo"])
@pytest.mark.some_rows
def test_fine_tuning(train: str) -> None:
    """Each way of going through streamed layers gives the losses of layers of which only vectors stay, and parameters and
    their optimizer's states are after a step where they were before it."""
    how: dict[str, Any] = {"train": train, "optimizer": "adamw", "learning_rate": 1e-2}
    if train == "mezo":
        how = {"train": "all", "optimizer": "mezo", "learning_rate": 1e-3, "clip": 0.0}
    settings = Settings(context=16, batch=2, steps=3, compute="float32", **how)
    found = []
    for stay in ((), ("q", "down")):
        model = jaxengine.load(GOLDEN / "gemma2", dtype="float32", home="host", stay=stay)
        with Run(model, settings, ROWS) as run:
            before = [x.sharding.memory_kind for x in jax.tree.leaves(run._state)]
            found.append([r.loss for r in itertools.islice(run, 3)])
            assert [x.sharding.memory_kind for x in jax.tree.leaves(run._state)] == before
    np.testing.assert_allclose(found[1], found[0], rtol=64 * 2.0**-24)
    assert len(set(found[0])) == 3
