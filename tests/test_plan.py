"""A Plan names choices, survives JSON, counts bytes as they are, and refuses what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxengine
from jaxengine import placement
from jaxengine.architecture import architecture
from jaxengine.engine import empty_cache
from jaxengine.homes.base import home
from jaxengine.plan import (
    Plan,
    activation_bytes,
    cache_bytes,
    choose,
    device_bytes,
    need,
    parse_bytes,
    weight_bytes,
    with_table,
)
from jaxengine.sources import read_config
from sharding.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
PLANS = [
    Plan(),
    Plan(dtype="bfloat16", weights="int8", home="host", kv_codec="int8", kv_layout="full"),
    Plan(weight_rules=(("lm_head", "int8"), ("layers.*.down", "dense")), weights="int8"),
    Plan(sharding="tensor", mesh="data=4,tensor=2", rules=(("vocab", None),), form="scan"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_json_and_back(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert all(f.name in str(plan) for f in dataclasses.fields(plan))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "float8"}, "float32, bfloat16, float16"),
        ({"weights": "int9"}, "Did you mean 'int8'"),
        ({"home": "hots"}, "Did you mean 'host'"),
        ({"home": "host", "form": "unrolled"}, "takes the form scan"),
        ({"kv_codec": "int7"}, "int8"),
        ({"kv_layout": "windows"}, "window"),
        ({"sharding": "tensors"}, "tensor"),
        ({"weight_rules": (("lm_head", "nf5"),)}, "nf5"),
    ],
)
def test_choices_that_are_not_there(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(**given)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown field speed"):
        Plan.from_json('{"speed": "fast"}')


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "given", [{}, {"weights": "int8"}, {"home": "host", "dtype": "bfloat16"}, {"kv_codec": "int8"}]
)
@pytest.mark.some_rows
def test_bytes_are_those_of_the_arrays(case: str, given: dict) -> None:
    """The arithmetic on abstract parameters against the nbytes of what is then allocated, weights and cache."""
    raw = read_config(GOLDEN / case)
    model = jaxengine.load(GOLDEN / case, plan=Plan(**given))
    arch = architecture(raw)
    counted = weight_bytes(arch, model.plan)
    assert counted["outer"] == sum(x.nbytes for x in jax.tree.leaves(model.params["outer"]))
    assert counted["layers"] == sum(x.nbytes for x in jax.tree.leaves(model.params["banks"]))
    cache = jax.jit(lambda p: empty_cache(model.engine, p, 3, 40))(model.params)
    assert cache_bytes(arch, model.plan, batch=3, length=40) == sum(x.nbytes for x in jax.tree.leaves(cache))
    promised = placement.abstract(arch, model.plan, model.mesh)
    assert jax.tree.structure(promised) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(promised), jax.tree.leaves(model.params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
        assert a.sharding.memory_kind == b.sharding.memory_kind


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    [("data", "data=8"), ("fsdp", "fsdp=8"), ("tensor", "data=4,tensor=2"), ("fsdp+tensor", "data=2,fsdp=2,tensor=2")],
)
@pytest.mark.parametrize("given", [{}, {"weights": "int8", "home": "host"}, {"weights": "int4:group_size=16"}])
@pytest.mark.some_rows
def test_bytes_of_a_mesh_are_those_that_one_device_has(sharding: str, mesh: str, given: dict) -> None:
    plan = Plan(sharding=sharding, mesh=mesh, rules=(("vocab", None),), **given)
    model = jaxengine.load(GOLDEN / "llama", plan=plan)
    arch, first = model.architecture, model.mesh.devices.flat[0]

    def here(tree: Any) -> int:
        shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
        return sum(s.data.nbytes for s in shards if s.device == first)

    counted = weight_bytes(arch, model.plan)
    assert counted["outer"] == here(model.params["outer"])
    assert counted["layers"] == here(model.params["banks"])
    for batch in (1, 8):
        cache = jax.jit(lambda p, b=batch: empty_cache(model.engine, p, b, 40))(model.params)
        assert cache_bytes(arch, model.plan, batch=batch, length=40) == here(cache)
    if home(model.plan.home).TIER == "host":
        leaves, needs = jax.tree.leaves(model.params["banks"]), need(arch, model.plan, batch=1, context=40)
        pinned = [x for x in leaves if x.sharding.memory_kind == "pinned_host"]
        assert needs.host == sum(s.data.nbytes for x in pinned for s in x.addressable_shards) > 0
        assert needs.resident == here([x for x in leaves if x.sharding.memory_kind == "device"]) > 0


def test_memory_of_each_device_chooses_the_home() -> None:
    arch = architecture(read_config(GOLDEN / "gemma2"))
    alone = Plan(dtype="float32")
    over = dataclasses.replace(alone, mesh="tensor=2,data=4", sharding="tensor", rules=(("vocab", None),))
    budgets = [need(arch, dataclasses.replace(over, **h), batch=1, context=64).device for h in ({}, {"home": "host"})]
    assert choose(arch, over, max(budgets), length=64).home == "device"
    with pytest.raises(ValueError, match="the smallest plan"):
        choose(arch, alone, min(budgets), length=64)
    given = {"max_new_tokens": 8, "stop_ids": ()}
    asked = {"plan": over, "context": 64, "mesh": "tensor=2,data=-1"}
    ids = jaxengine.load(GOLDEN / "gemma2", dtype="float32").generate([[1, 2, 3]], **given)[0].tokens
    for memory in budgets:
        model = jaxengine.load(GOLDEN / "gemma2", memory=memory, **asked)
        assert model.plan.mesh == "data=4,fsdp=1,tensor=2"
        assert model.generate([[1, 2, 3]], **given)[0].tokens == ids
    with pytest.raises(ValueError, match="does not divide"):
        jaxengine.load(GOLDEN / "llama", memory=budgets[0], mesh="data=4,tensor=2", sharding="tensor")


def test_memory_chooses_the_home() -> None:
    """All on the device if it fits, else as many layers as do, else none; and what fits is held in every call."""
    arch = architecture(read_config(GOLDEN / "gemma2"))
    T = 64

    def needs(**given: Any) -> int:
        plan = Plan(dtype="float32", **given)
        working = activation_bytes(arch, plan, batch=1, tokens=T, length=T)
        return device_bytes(arch, plan, batch=1, length=T) + working

    def chosen(memory: int) -> tuple[str, int]:
        plan = choose(arch, Plan(dtype="float32"), memory, batch=1, length=T)
        return plan.home, plan.resident

    resident, split, streamed = needs(), needs(home="split", resident=2), needs(home="host")
    assert streamed < split < resident
    assert chosen(resident) == ("device", 0)
    assert chosen(resident - 1)[0] in ("split", "host")
    assert chosen(split) == ("split", 2)
    # of the four, alternating, layers the host home brings two at a time; one resident leaves three unlike ones, one a time
    assert chosen(split - 1) == chosen(streamed) == ("split", 1)
    least = min(streamed, needs(home="split", resident=1))
    assert chosen(least)[0] in ("split", "host")
    with pytest.raises(ValueError, match=r"1 B short.*int8"):
        chosen(least - 1)
    model = jaxengine.load(GOLDEN / "gemma2", dtype="float32", memory=split, context=T)
    assert (model.plan.home, model.plan.resident) == ("split", 2)
    model.generate([[1, 2, 3]], max_new_tokens=T - 3)
    with pytest.raises(ValueError, match=r"2 rows of 64 tokens need .* at most 1 prompts of this length"):
        model.generate([[1, 2, 3] * 20] * 2, max_new_tokens=T - 60, stop_ids=())
    with pytest.raises(ValueError, match=r"logits of 20 rows of 64 tokens need .* score fewer"):
        model.logits([[1] * 60] * 20)


def test_what_goes_with_a_budget_is_told() -> None:
    with pytest.raises(ValueError, match="give one"):
        jaxengine.load(GOLDEN / "llama", memory="1GB", home="host")
    with pytest.raises(ValueError, match="whole copy on each"):
        jaxengine.load(GOLDEN / "llama", memory="1GB", mesh="data=8", sharding="single")
    with pytest.raises(ValueError, match="no memory is given"):
        jaxengine.load(GOLDEN / "llama", context=512)


def test_a_plan_without_dtype_is_the_checkpoints_own() -> None:
    assert jaxengine.load(GOLDEN / "qwen2", plan=Plan(home="host")).plan.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"mesh": "data=8", "sharding": "single"}, "whole copy on each"), ({"sharding": "tensor"}, "one device")],
)
def test_a_mesh_and_its_rules_go_together(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jaxengine.load(GOLDEN / "llama", **given)


@pytest.mark.parametrize(
    ("mesh", "table"),
    [("data=8", "data"), ("fsdp=4,data=2", "fsdp"), ("data=4,tensor=-1", "tensor"), ("fsdp=4,tensor=2", "fsdp+tensor")],
)
def test_rules_are_those_of_the_meshs_axes_where_none_are_named(mesh: str, table: str) -> None:
    model = jaxengine.load(jaxengine.demo_folder(), mesh=mesh)
    assert model.plan.sharding == table
    assert model.mesh.size == 8
    assert jaxengine.load(jaxengine.demo_folder(), mesh=mesh, sharding=table).plan == model.plan


def test_sizes_as_people_write_them() -> None:
    assert parse_bytes("16GB") == 16 * 10**9
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes(" 500 mb ") == 500 * 10**6
    assert parse_bytes(12345) == 12345
    for bad in ("16 goats", "", "-3GB", "0", 0, "1.2.3GB"):
        with pytest.raises(ValueError, match="memory is"):
            parse_bytes(bad)


def test_rules_that_do_not_divide_are_refused_before_reading() -> None:
    arch = architecture(read_config(GOLDEN / "llama"))
    plan = Plan(sharding="tensor")
    with pytest.raises(ValueError, match="tensor"):
        placement.place(arch, plan, make_mesh("tensor=8"), lambda name: pytest.fail(f"{name} was read"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds list"), ('{"weights": 5}', "weights is 5; it is a string"),
        ('{"rules": 5}', "rules is 5; it is a list of lists"), ('{"weight_rules": ["a"]}', "it is a list of lists"),
        ('{"mesh": null}', "mesh is None"),
    ],
)  # fmt: skip
def test_json_of_another_type_is_told(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("plan", "mesh", "sharding", "table"),
    [
        ({"mesh": "data=2,fsdp=4"}, "data=2,fsdp=4", None, "fsdp"),
        ({"mesh": "data=2,tensor=1"}, "data=2,tensor=1", "", "data"),
        ({"mesh": "tensor=2"}, "tensor=2", "single", "single"),  # which check_mesh refuses
        ({"mesh": "tensor=2"}, None, None, "single"),  # a plan's own mesh, with the table that the plan says
        ({"mesh": "tensor=2", "sharding": "fsdp+tensor"}, "tensor=2", None, "fsdp+tensor"),
        ({"mesh": "tensor=2", "rules": (("mlp", "tensor"),)}, "tensor=2", None, "single"),
        ({}, "", "", "single"),
    ],
)
def test_a_mesh_alone_names_its_table(plan: dict[str, Any], mesh: str | None, sharding: str | None, table: str) -> None:
    """For `load`, `plan` and `finetune` alike."""
    assert with_table(Plan(**plan), mesh=mesh, sharding=sharding) == Plan(**plan | {"sharding": table})
