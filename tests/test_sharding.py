"""The placement table: what it says, where arrays then are, that numbers do not depend on it, and every refusal.

The numbers are exact. All inputs are small integers and all partial sums stay below 2**24, where float32 adds integers
without rounding in any order, so that every placement must give the integers that numpy's int64 gives: tolerance zero.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from sharding.mesh import AXES, host_memory_kind, initialize_distributed, make_mesh, memory_kinds
from sharding.rules import (
    ACTIVATION_AXES,
    RULES,
    WEIGHT_AXES,
    Rule,
    Rules,
    check,
    constrain,
    describe,
    named_sharding,
)

# B batch, T queries, D model, F mlp, N query heads, K kv heads, H head dim, L layers
B, T, D, F, N, K, H, L = 8, 4, 16, 32, 8, 4, 2, 2
SHAPES = {
    "norm": ((L, D), ("layers", "norm")),
    "q": ((L, N, H, D), ("layers", "heads", "head_dim", "embed")),
    "k": ((L, K, H, D), ("layers", "kv_heads", "head_dim", "embed")),
    "v": ((L, K, H, D), ("layers", "kv_heads", "head_dim", "embed")),
    "o": ((L, D, N, H), ("layers", "embed", "heads", "head_dim")),
    "up": ((L, F, D), ("layers", "mlp", "embed")),
    "down": ((L, D, F), ("layers", "embed", "mlp")),
}
MESHES = {
    "single": None,
    "data": "data=8",
    "fsdp": "data=2,fsdp=4",
    "tensor": "data=2,tensor=4",
    "fsdp+tensor": "data=2,fsdp=2,tensor=2",
}
# what one device holds of q, up, down and of x [B, T, D], worked out by hand
PARTS = {
    "single": ((2, 8, 2, 16), (2, 32, 16), (2, 16, 32), (8, 4, 16)),
    "data": ((2, 8, 2, 16), (2, 32, 16), (2, 16, 32), (1, 4, 16)),
    "fsdp": ((2, 8, 2, 4), (2, 32, 4), (2, 4, 32), (1, 4, 16)),
    "tensor": ((2, 2, 2, 16), (2, 8, 16), (2, 16, 8), (4, 4, 16)),
    "fsdp+tensor": ((2, 4, 2, 8), (2, 16, 8), (2, 8, 16), (2, 4, 16)),
}
# the collectives each way of splitting must come with, and the ways that need none
COLLECTIVES = {"single": None, "data": None, "fsdp": "all-gather", "tensor": "all-reduce", "fsdp+tensor": "all-"}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(-1, 2, shape) for name, (shape, _) in SHAPES.items()}


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(-2, 3, (B, T, D))


def layer(xp, x, w, split=lambda x, axes: x):
    """Attention with clipped scores in place of a softmax and a two-layer mlp; xp is numpy or jax.numpy."""
    h = xp.clip(x * w["norm"][None, None, :], -3, 3)
    q = split(xp.einsum("btd,nhd->btnh", h, w["q"]), ("batch", "sequence", "act_heads", "act_head_dim"))
    k = split(xp.einsum("btd,khd->btkh", h, w["k"]), ("batch", "sequence", "act_kv_heads", "act_head_dim"))
    v = split(xp.einsum("btd,khd->btkh", h, w["v"]), ("batch", "sequence", "act_kv_heads", "act_head_dim"))
    scores = xp.clip(xp.einsum("btkgh,bskh->bkgts", q.reshape(*q.shape[:2], K, N // K, H), k), -1, 1)
    y = xp.einsum("bkgts,bskh->btkgh", scores, v).reshape(q.shape)
    x = split(x + xp.einsum("btnh,dnh->btd", y, w["o"]), ("batch", "sequence", "act_embed"))
    f = xp.clip(xp.einsum("btd,fd->btf", x, w["up"]), 0, 50)
    return split(x + xp.einsum("btf,df->btd", f, w["down"]), ("batch", "sequence", "act_embed"))


def oracle(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    for i in range(L):
        x = layer(np, x, {name: a[i] for name, a in w.items()})
    return x


def place(rules: Rules, mesh: Mesh, w: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {
        name: jax.device_put(a.astype(np.float32), named_sharding(rules, mesh, SHAPES[name][1]))
        for name, a in w.items()
    }


def place_tokens(rules: Rules, mesh: Mesh) -> jax.Array:
    return jax.device_put(tokens().astype(np.float32), named_sharding(rules, mesh, ("batch", "sequence", "act_embed")))


def constrained(rules, mesh, x, axes):
    return constrain(x, rules, mesh, axes)


@partial(jax.jit, static_argnames=("rules", "mesh"))
def forward(x, w, rules, mesh):
    for i in range(L):
        x = layer(jnp, x, {name: a[i] for name, a in w.items()}, partial(constrained, rules, mesh))
    return x


@partial(jax.jit, static_argnames=("rules", "mesh"))
def streamed(x, w, rules, mesh):
    def fetch(x, w):
        w = jax.device_put(w, jax.memory.Space.Device)
        return layer(jnp, x, w, partial(constrained, rules, mesh)), None

    return jax.lax.scan(fetch, x, w)[0]


# --- numbers and places


def test_sums_are_exact_in_float32():
    """On absolute values no term cancels, so this run bounds every partial sum of the real one."""
    bound = oracle(np.abs(tokens()), {name: np.abs(a) for name, a in weights().items()})
    assert bound.max() < 2**24
    assert len(np.unique(oracle(tokens(), weights()))) > 100  # and the result says something


@pytest.mark.parametrize("name", RULES)
def test_every_table_gives_the_same_numbers(name):
    rules, mesh = RULES[name], make_mesh(MESHES[name])
    check(rules, mesh, SHAPES)
    w, x = place(rules, mesh, weights()), place_tokens(rules, mesh)
    program = forward.lower(x, w, rules, mesh).compile()
    y = program(x, w)
    np.testing.assert_array_equal(np.asarray(y), oracle(tokens(), weights()))

    parts = [a.addressable_shards[0].data.shape for a in (w["q"], w["up"], w["down"], x)]
    assert tuple(parts) == PARTS[name]
    assert len(w["q"].sharding.device_set) == mesh.size == (1 if name == "single" else 8)

    found = re.findall(r"all-(?:gather|reduce|to-all)|reduce-scatter|collective-permute", program.as_text() or "")
    wanted = COLLECTIVES[name]
    if wanted is None:
        assert not found
    else:
        assert any(op.startswith(wanted) for op in found)


@pytest.mark.parametrize("name", RULES)
def test_layers_on_the_host_by_rule(name):
    rules = RULES[name].override(("norm", None, "device"), ("layers", None, "pinned_host"))
    mesh = make_mesh(MESHES[name])
    check(rules, mesh, SHAPES)
    w, x = place(rules, mesh, weights()), place_tokens(rules, mesh)
    for key, a in w.items():
        host = key != "norm"  # the norm's rule stands above the layers' rule
        assert a.sharding.memory_kind == ("pinned_host" if host else "device")
        assert ("<host>" in str(jax.typeof(a))) == host
    assert w["q"].addressable_shards[0].data.shape == PARTS[name][0]
    np.testing.assert_array_equal(np.asarray(streamed(x, w, rules, mesh)), oracle(tokens(), weights()))


def test_equal_placements_are_equal_shardings():
    mesh = make_mesh("data=8")
    assert named_sharding(RULES["fsdp+tensor"], mesh, ("mlp", "embed")).spec == PartitionSpec()
    assert named_sharding(RULES["fsdp+tensor"], mesh, ("batch", None)) == named_sharding(
        RULES["data"], mesh, ("batch", "act_embed")
    )


def test_named_sharding_takes_a_memory_kind_over_the_table():
    mesh = make_mesh("tensor=8")
    rules = RULES["tensor"].override(("layers", None, "pinned_host"))
    assert named_sharding(rules, mesh, ("layers", "mlp")).memory_kind == "pinned_host"
    assert named_sharding(rules, mesh, ("layers", "mlp"), memory_kind="device").memory_kind == "device"
    assert named_sharding(rules, mesh, ("mlp",), memory_kind="pinned_host").memory_kind == "pinned_host"
    with pytest.raises(ValueError, match="'unpinned_host' is not one of device, pinned_host"):
        named_sharding(rules, mesh, ("mlp",), memory_kind="unpinned_host")


def test_named_sharding_with_a_shape_splits_as_far_as_it_divides():
    mesh = make_mesh("data=2,fsdp=4")
    axes = ("cache_batch", "cache_slots")
    specs = [named_sharding(RULES["fsdp"], mesh, axes, shape=(size, 5)).spec for size in (16, 8, 6, 4, 1)]
    assert specs == [
        PartitionSpec(("data", "fsdp")),
        PartitionSpec(("data", "fsdp")),
        PartitionSpec("data"),
        PartitionSpec("data"),
        PartitionSpec(),
    ]
    with pytest.raises(ValueError, match="2 logical axes for the 1 dims"):
        named_sharding(RULES["fsdp"], mesh, axes, shape=(8,))


@pytest.mark.parametrize(("size", "part"), [(8, 2), (4, 1), (2, 2), (1, 1), (6, 6)])
def test_constrain_splits_what_divides(size, part):
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    y = jax.jit(lambda x: constrain(x * 2, RULES["data"], mesh, ("batch", "act_embed")))(jnp.ones((size, 3)))
    assert y.sharding.shard_shape(y.shape) == (part, 3)
    np.testing.assert_array_equal(np.asarray(y), np.full((size, 3), 2.0))


def test_constrain_on_one_device_changes_nothing_but_reads_its_names():
    mesh, x = make_mesh(), jnp.ones((2, 3))
    assert constrain(x, RULES["tensor"], mesh, ("batch", "act_heads")) is x
    with pytest.raises(ValueError, match="did you mean 'act_heads'"):
        constrain(x, RULES["tensor"], mesh, ("batch", "act_haeds"))
    with pytest.raises(ValueError, match=r"names 1 dims and the array has 2: \(2, 3\)"):
        constrain(x, RULES["tensor"], mesh, ("batch",))


# --- how a table is read


def test_first_match_wins():
    rules = Rules([("mlp", "tensor"), ("mlp", "fsdp", "pinned_host"), ("embed", None)])
    assert rules.spec(("mlp", "embed")) == PartitionSpec("tensor", None)
    assert rules.memory(("mlp", "embed")) is None  # the memory of a shadowed rule does not count either
    assert rules.effective() == (Rule("mlp", "tensor"), Rule("embed"))


def test_a_mesh_axis_splits_one_dim_and_the_higher_rule_has_it():
    rules = Rules([("experts", "tensor"), ("mlp", "tensor"), ("embed", "fsdp")])
    assert rules.spec(("mlp", "experts")) == PartitionSpec(None, "tensor")
    assert rules.spec(("embed", "embed")) == PartitionSpec("fsdp", None)
    both = Rules([("mlp", "tensor"), ("vocab", ("fsdp", "tensor"))])
    assert both.spec(("vocab", "mlp")) == PartitionSpec("fsdp", "tensor")
    assert both.spec(("vocab", None)) == PartitionSpec(("fsdp", "tensor"), None)


def test_the_highest_rule_that_names_a_memory_decides():
    rules = Rules([("norm", None, "device"), ("layers", None, "pinned_host"), ("mlp", "tensor")])
    assert rules.memory(("layers", "mlp")) == rules.memory(("mlp", "layers")) == "pinned_host"
    assert rules.memory(("layers", "norm")) == "device"
    assert rules.memory(("mlp", None)) is None


def test_override_writes_on_top_and_leaves_the_original():
    rules = RULES["tensor"].override(("mlp", None), ("batch", ("data", "tensor")))
    assert rules.spec(("mlp", "heads")) == PartitionSpec(None, "tensor")
    assert rules.spec(("batch",)) == PartitionSpec(("data", "tensor"))
    assert rules.weights[0] == Rule("mlp")
    assert rules.activations[0] == Rule("batch", ("data", "tensor"))
    assert RULES["tensor"].spec(("mlp",)) == PartitionSpec("tensor")
    with pytest.raises(ValueError, match=r"did you mean 'mlp'\?.*rules\.extend"):
        rules.override(("mpl", None))


def test_extend_adds_new_names_only():
    rules = RULES["tensor"].extend(weights=[("state", "tensor")], activations=[("act_state", "tensor")])
    assert rules.spec(("state",)) == rules.spec(("act_state",)) == PartitionSpec("tensor")
    check(rules, make_mesh("tensor=8"), {"ssm": ((8,), ("state",))})
    with pytest.raises(ValueError, match=r"\['mlp'\] are in the table already; change them with rules.override"):
        rules.extend(weights=[("mlp", None)])


def test_named_tables_cover_every_documented_name():
    for rules in RULES.values():
        assert rules.names() == (*WEIGHT_AXES, *ACTIVATION_AXES)
        assert {axis for rule in rules.effective() for axis in rule.mesh_axes} <= set(AXES)
    assert not set(WEIGHT_AXES) & set(ACTIVATION_AXES)
    assert all(meaning in str(RULES["single"]) for meaning in (*WEIGHT_AXES.values(), *ACTIVATION_AXES.values()))


def test_json_both_ways():
    rules = RULES["fsdp+tensor"].override(("layers", None, "pinned_host"))
    text = rules.to_json()
    assert json.loads(text)["weights"][0] == ["layers", None, "pinned_host"]
    assert ["batch", ["data", "fsdp"]] in json.loads(text)["activations"]
    for again in (Rules.from_json(text), Rules.from_json(json.loads(text))):
        assert again == rules
        assert hash(again) == hash(rules)
    with pytest.raises(ValueError, match=r"got \['wieghts'\]"):
        Rules.from_json('{"wieghts": []}')
    with pytest.raises(ValueError, match="got list"):
        Rules.from_json("[]")


def test_equal_rules_trace_once():
    traced = []

    @partial(jax.jit, static_argnames="rules")
    def f(x, rules):
        traced.append(rules)
        return x + 1

    x = jnp.zeros(())
    f(x, RULES["tensor"].override(("mlp", None)))
    f(x, Rules.from_json(RULES["tensor"].override(Rule("mlp")).to_json()))
    assert len(traced) == 1
    f(x, RULES["tensor"])
    assert len(traced) == 2


def test_rules_are_spelt_one_way():
    assert Rule("mlp", ("tensor",)) == Rule("mlp", "tensor")
    assert Rule("mlp", ()) == Rule("mlp", None)
    assert Rules([("mlp", "tensor")]) == Rules((Rule("mlp", "tensor"),))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rule("layers", None, "unpinned_host"), "'unpinned_host' is not one of device, pinned_host or None"),
        (lambda: Rule("mlp", ("tensor", "tensor")), "stands twice"),
        (lambda: Rule("mlp", cast(Any, 3)), "must be a mesh axis, a tuple of them or None, got 3"),
        (lambda: Rule(""), "starts with a logical axis name"),
        (
            lambda: Rules(cast(Any, [("mlp",)])),
            r"a rule is \(logical, mesh\) or \(logical, mesh, memory\), got \('mlp',\)",
        ),
        (lambda: Rules(cast(Any, ["mlp"])), "a rule is"),
        (lambda: Rules([("batch", None)], [("batch", None)]), r"\['batch'\] stand in both parts"),
        (lambda: RULES["data"].spec(cast(Any, "mlp")), "got the string 'mlp'"),
        (lambda: RULES["data"].spec(("mpl",)), "did you mean 'mlp'"),
    ],
)
def test_bad_tables_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- check and describe


def refusal(rules: Rules, mesh: Mesh | AbstractMesh, params) -> str:
    with pytest.raises(ValueError, match="the rules do not fit") as caught:
        check(rules, mesh, params)
    return str(caught.value)


def test_check_refuses_a_dim_that_does_not_divide():
    params = {"layers.k": ((L, 6, H, D), ("layers", "kv_heads", "head_dim", "embed"))}
    text = refusal(RULES["tensor"], make_mesh("data=2,tensor=4"), params)
    assert "layers.k: dim 1, 'kv_heads', has size 6, which tensor=4 does not divide" in text
    assert "tensor=2 divides kv_heads 6" in text
    assert "rules.override(('kv_heads', None)) leaves it whole" in text
    # both choices are true
    check(RULES["tensor"], make_mesh("data=4,tensor=2"), params)
    check(RULES["tensor"].override(("kv_heads", None)), make_mesh("data=2,tensor=4"), params)


def test_check_names_a_choice_that_works_for_all_parameters():
    params = {"k": ((4, D), ("kv_heads", "embed")), "up": ((6, D), ("mlp", "embed")), "o": ((8,), ("heads",))}
    text = refusal(RULES["tensor"], make_mesh("tensor=8"), params)
    assert "1. k: dim 0, 'kv_heads', has size 4" in text
    assert "2. up: dim 0, 'mlp', has size 6" in text
    assert text.count("tensor=2 divides") == 2  # 4 would do for k, but not for up
    check(RULES["tensor"], make_mesh("data=4,tensor=2"), params)


def test_check_on_two_mesh_axes_and_the_kept_memory():
    rules = RULES["single"].override(("vocab", ("fsdp", "tensor"), "pinned_host"))
    text = refusal(rules, make_mesh("fsdp=2,tensor=4"), {"embed": ((12, D), ("vocab", "embed"))})
    assert "has size 12, which fsdp=2 x tensor=4 does not divide" in text
    assert "tensor=2 divides vocab 12" in text
    assert "rules.override(('vocab', None, 'pinned_host'))" in text


def test_check_collects_all_problems():
    rules = RULES["tensor"].override(("heads", "expert"))
    params = {
        "a": ((3, D), ("mpl", "embed")),
        "b": ((3, D), ("batch", "embed")),
        "c": ((3, D), ("mlp",)),
        "d": ((3, D), ("mlp", "embed")),
        "fine": ((8, D), ("mlp", None)),
    }
    text = refusal(rules, make_mesh("tensor=8"), params)
    assert "5 problems" in text
    assert (
        "rule 'heads' splits over the mesh axis 'expert', which this mesh lacks; it has data=1, fsdp=1, tensor=8"
        in text
    )
    assert (
        "a: dim 0 of size 3: no rule covers the logical axis 'mpl'; did you mean 'mlp'? Known: heads, layers, vocab"
        in text
    )
    assert "b: dim 0 of size 3: 'batch' is an activation's axis, not a weight's" in text
    assert "c: 2 dims (3, 16) and 1 logical axes ('mlp',)" in text
    assert "d: dim 0, 'mlp', has size 3, which tensor=8 does not divide" in text
    assert "fine" not in text
    check(RULES["tensor"], make_mesh("tensor=8"), {"fine": params["fine"]})


def test_a_rule_for_an_axis_the_mesh_lacks_is_refused_everywhere():
    rules, mesh = RULES["tensor"].override(("batch", "replica")), make_mesh("data=8")
    for use in (
        lambda: check(rules, mesh, {}),
        lambda: named_sharding(rules, mesh, ("batch",)),
        lambda: constrain(jnp.ones(8), rules, mesh, ("batch",)),
    ):
        with pytest.raises(ValueError, match="the mesh axis 'replica', which this mesh lacks; it has data=8"):
            use()
    check(rules, make_mesh("replica=8"), {})


def test_describe_counts_the_bytes_of_one_device():
    rules = RULES["fsdp+tensor"].override(("layers", None, "pinned_host"))
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    params = {
        "up": (*SHAPES["up"], np.float32),
        "final_norm": ((D,), ("norm",)),
        "cache": ((B, 64, K, H), ("cache_batch", "cache_slots", "cache_kv_heads", "cache_head_dim"), np.int8),
    }
    lines = describe(rules, mesh, params).splitlines()
    cells = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines}
    assert cells["up"] == ["[2, 32, 16]", "[-, tensor, fsdp]", "[2, 16, 8]", "pinned_host", "1,024"]
    assert cells["final_norm"] == ["[16]", "[-]", "[16]", "device", "32"]
    assert cells["cache"] == ["[8, 64, 4, 2]", "[data+fsdp, -, tensor, -]", "[2, 64, 2, 2]", "device", "512"]
    assert lines[-2].startswith("device: 544 bytes")
    assert lines[-1].startswith("pinned_host: 1,024 bytes")
    w = place(rules, mesh, weights())["up"]  # the table's bytes are an array's bytes
    assert w.addressable_shards[0].data.nbytes == 1024
    with pytest.raises(ValueError, match="has size 3, which tensor=2 does not divide"):
        describe(rules, mesh, {"up": ((3,), ("mlp",))})


def test_an_abstract_mesh_serves_check_and_keeps_the_memory_kind():
    mesh = AbstractMesh((1, 1, 4), AXES, axis_types=(AxisType.Auto,) * 3)
    rules = RULES["tensor"].override(("layers", None, "pinned_host"))
    check(rules, mesh, SHAPES)
    sharding = named_sharding(rules, mesh, SHAPES["up"][1])
    assert sharding.memory_kind == "pinned_host"
    assert sharding.shard_shape(SHAPES["up"][0]) == (2, 8, 16)
    assert memory_kinds(mesh) == ()
    assert "has size 6, which tensor=4" in refusal(rules, mesh, {"k": ((6,), ("kv_heads",))})


# --- the mesh


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("data=2,tensor=4", {"data": 2, "fsdp": 1, "tensor": 4}),
        ("tensor=4, data=2", {"data": 2, "fsdp": 1, "tensor": 4}),
        ("tensor=-1", {"data": 1, "fsdp": 1, "tensor": 8}),
        ("fsdp=2,tensor=-1", {"data": 1, "fsdp": 2, "tensor": 4}),
        ({"fsdp": np.int64(8)}, {"data": 1, "fsdp": 8, "tensor": 1}),
        ("tensor=4,expert=2", {"expert": 2, "data": 1, "fsdp": 1, "tensor": 4}),
        (None, {"data": 1, "fsdp": 1, "tensor": 1}),
    ],
)
def test_make_mesh(spec, shape):
    mesh = make_mesh(spec)
    assert list(mesh.shape.items()) == list(shape.items())
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


def test_make_mesh_takes_a_mesh():
    given = jax.make_mesh((4, 2), ("model", "data"), (AxisType.Explicit, AxisType.Explicit))
    mesh = make_mesh(given)
    assert dict(mesh.shape) == {"model": 4, "data": 2, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert list(mesh.devices.flat) == list(given.devices.flat)
    assert make_mesh(mesh) == mesh
    with pytest.raises(ValueError, match="a Mesh has its devices"):
        make_mesh(given, jax.devices())


def test_make_mesh_over_chosen_devices():
    assert list(make_mesh("tensor=2", jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]
    assert list(make_mesh(None, jax.devices()[5:]).devices.flat) == jax.devices()[5:6]
    with pytest.raises(ValueError, match="devices is empty"):
        make_mesh("tensor=2", [])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tensor=2", r"needs 2 devices and there are 8. What fits: 'tensor=8' or 'tensor=2,data=4', or pass devices="),
        ("tensor=16", r"needs 16 devices and there are 8. What fits: 'tensor=8'$"),
        ("data=2,tensor=3", r"needs 6 devices and there are 8. What fits: 'data=2,tensor=4', or"),
        ("data=3,tensor=-1", r"needs a multiple of 3 devices and there are 8. What fits: 'data=2,tensor=-1'"),
        ("data=3,fsdp=3,tensor=3", r"needs 27 devices and there are 8. What fits: 'data=8'$"),
        ("data=-1,tensor=-1", "two axes are -1"),
        ("data=0", "data=0 is not a size; use 1 or more, or -1"),
        ("data=-2", "data=-2 is not a size"),
        ("data", "'data' is not axis=size; write it like 'data=2,tensor=4'"),
        ("data=two", "'data=two' is not axis=size"),
        ("tensor=--4", "'tensor=--4' is not axis=size"),
        ("", "'' is not axis=size"),
        ("data=2,data=4", "axis 'data' stands twice"),
        ("my-axis=8", "'my-axis' is not an axis name"),
        ({"data": 2.0}, "data=2.0 is not a size"),
        ({"data": True}, "data=True is not a size"),
        ({}, "names no axis"),
    ],
)
def test_bad_meshes_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


def suggestions() -> Iterator[str]:
    for spec in ("tensor=2", "tensor=16", "data=2,tensor=3", "data=3,tensor=-1", "fsdp=-1,data=6,tensor=2", "expert=3"):
        with pytest.raises(ValueError, match="What fits") as caught:
            make_mesh(spec)
        fits = re.findall(r"'([^']*)'", str(caught.value).partition("What fits")[2])
        assert fits
        yield from fits


def test_what_is_said_to_fit_fits():
    for spec in suggestions():
        assert make_mesh(spec).size == 8


def test_memory_kinds():
    mesh = make_mesh("data=8")
    assert {"device", "pinned_host"} <= set(memory_kinds(mesh))
    assert host_memory_kind(mesh) == "pinned_host"


@pytest.mark.parametrize(
    ("kinds", "message"), [((), "list no memories"), (("device",), "no pinned_host memory, only device")]
)
def test_no_host_memory_is_an_error_and_not_the_device(monkeypatch, kinds, message):
    monkeypatch.setattr("sharding.mesh.memory_kinds", lambda mesh: kinds)
    with pytest.raises(ValueError, match=message):
        named_sharding(RULES["single"], make_mesh(), ("mlp",), memory_kind="pinned_host")


def test_check_refuses_a_memory_the_devices_lack(monkeypatch):
    monkeypatch.setattr("sharding.rules.memory_kinds", lambda mesh: ("device",))
    text = refusal(RULES["single"].override(("layers", None, "pinned_host")), make_mesh(), {})
    assert "rule 'layers' names the memory kind 'pinned_host'; these devices have device" in text


# --- several processes


def test_distributed_arguments_are_refused_before_anything_starts(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"process_id missing.*JAX_PROCESS_ID"):
        initialize_distributed("localhost:1234", 2)
    with pytest.raises(ValueError, match=r"'localhost' is not host:port"):
        initialize_distributed("localhost", 2, 0)
    with pytest.raises(ValueError, match=r"process_id 2 is not in 0\.\.1"):
        initialize_distributed("localhost:1234", 2, 2)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES='two' in the environment is not a number"):
        initialize_distributed("localhost:1234", None, 0)


def test_distributed_after_the_backend_started_is_refused():
    jax.devices()
    with pytest.raises(RuntimeError, match="JAX has started its devices already"):
        initialize_distributed("localhost:1234", 2, 0)


TWO_PROCESSES = """
import sys
from sharding.mesh import initialize_distributed, make_mesh
initialize_distributed(**({"process_id": int(sys.argv[1])} if sys.argv[1:] else {}))
import jax, numpy as np
from sharding.rules import RULES, named_sharding
mesh = make_mesh("data=2,tensor=2")
assert len(jax.local_devices()) == 2 and jax.process_count() == 2
assert make_mesh().devices.flat[0] in jax.local_devices()
x = np.arange(32.0, dtype=np.float32).reshape(4, 8)
w = np.arange(64.0, dtype=np.float32).reshape(8, 8)
put = lambda a, axes: jax.make_array_from_callback(a.shape, named_sharding(RULES["tensor"], mesh, axes), lambda i: a[i])
y = jax.jit(lambda x, w: (x @ w).sum())(put(x, ("batch", "act_heads")), put(w, ("mlp", "embed")))
assert float(y) == (x.astype(np.float64) @ w).sum(), y
try:
    initialize_distributed("localhost:1", 2, 0)
except RuntimeError as error:
    print(jax.process_index(), "sums to", float(y), "and:", error)
"""


def test_two_processes_share_a_mesh():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs = [
        start([sys.executable, "-c", TWO_PROCESSES, "0"], env=env),
        start([sys.executable, "-c", TWO_PROCESSES], env={**env, "JAX_PROCESS_ID": "1"}),
    ]
    try:
        for index, job in enumerate(jobs):
            out, err = job.communicate(timeout=120)
            assert job.returncode == 0, err
            assert (f"{index} sums to 135744.0 and: initialize_distributed: the processes are joined") in out
    finally:
        for job in jobs:
            job.kill()
            job.wait()
