"""Decode and prefill compiled for real cards, without a card: where bytes stand, and that streamed layers are streamed.

A Llama of 6 layers of 72 MiB in bfloat16; with layers on the host the device holds embedding, head, cache and about one
layer. XLA's own buffer assignment is the oracle.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxengine import engine, placement, proof, sampling
from jaxengine.architecture import architecture
from jaxengine.engine import Engine
from jaxengine.plan import Plan, cache_bytes, need, tier_bytes, weight_bytes
from pallas_kernels import aot
from pallas_kernels.audit import audit

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

RAW = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
BATCH, LENGTH = 4, 1024
GENERATIONS = ["A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"]  # sm_80, 86, 89, 90, 100, 120
CARDS = ["A100", "RTX 4090", "H200"]


# windows in five layers of six, as Gemma 3: two periods and two layers more
PERIODIC = {
    "model_type": "gemma3_text", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 14, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 4096, "sliding_window": 512, "sliding_window_pattern": 6,
}  # fmt: skip


def compiled_decode(card: str, plan: Plan, raw: dict = RAW) -> tuple[object, object]:
    """(the compiled decode loop, the architecture)."""
    arch = architecture(raw)
    with aot.target(aot.CARDS[card]) as target:
        how = Engine(arch, plan.caching, plan.dtype, plan.sharding_rules(), target.mesh)  # pyright: ignore[reportArgumentType]
        params = placement.abstract(arch, plan, target.mesh)  # pyright: ignore[reportArgumentType]
        rows = [sampling.Sampling()] * BATCH
        steps = sampling.Steps.of(rows)
        ints = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
        one = jnp.zeros((BATCH, 1), jnp.int32)

        def fresh(params: object) -> engine.Decoding:
            cache = engine.empty_cache(how, params, BATCH, LENGTH)
            counts = sampling.init_counts(steps, one, one > 0, raw["vocab_size"])
            return engine.Decoding(cache, one[:, 0], one[:, 0], one[:, 0] > 0, counts, keys)

        keys = sampling.row_keys(0, [0] * BATCH)
        values = jax.eval_shape(lambda: sampling.values(steps, rows))
        state = jax.eval_shape(fresh, params)
        args = (params, state, values, ints, jax.ShapeDtypeStruct((), jnp.int32))
        fitting = engine.decode.fitting("gpu", how, steps, 0, *args)
        return target.compile(fitting, how, steps, 0, *target.place(args)), arch


def test_generations_are_six() -> None:
    found = [aot.CARDS[card].capability for card in GENERATIONS]
    assert found == [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("card", GENERATIONS)
def test_streamed_decode_holds_about_one_layer(card: str) -> None:
    plan = Plan(dtype="bfloat16", home="host")
    compiled, arch = compiled_decode(card, plan)
    size = weight_bytes(arch, plan)
    cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
    memory = compiled.memory_analysis()
    norms = 6 * 2 * 2048 * 2
    assert memory.host_argument_size_in_bytes == size["layers"] - norms
    assert memory.host_temp_size_in_bytes == 0
    known = size["outer"] + cache + norms
    assert memory.argument_size_in_bytes == pytest.approx(known, rel=0.01)
    assert memory.alias_size_in_bytes >= cache  # the cache is written where it stands
    # a layer brought in, one layer's cache out of its stack and back, and small things
    assert memory.temp_size_in_bytes < 1.1 * size["largest_layer"] + 2 * cache / 6 + 64 * 2**20
    assert aot.device_bytes(compiled) < known + 2 * size["largest_layer"]
    report = audit(compiled, in_place=True, streamed=size["layers"] - norms).check()
    assert {c.dma for c in report.copies} == {True}
    assert len(report.copies) == 7  # one for each matrix


@pytest.mark.parametrize(
    ("card", "place", "of"),
    [
        ("RTX 3090", {"home": "host"}, "the layers"), ("H200", {"home": "host"}, "what stands before the layers"),
        ("RTX 3090", {"home": "split", "resident": 2}, "what stands before the layers"),
        ("H200", {"home": "split", "resident": 2}, "the layers"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.some_rows
def test_a_gradient_brings_each_layer_again(card: str, place: dict, of: str) -> None:
    """Forwards and backwards by DMA from the right places, about two layers on the device; kept from the forward pass they
    would be all eight. Gradients of the layers go to host memory one by one."""
    arch, plan = architecture(RAW | {"num_hidden_layers": 8}), Plan(dtype="bfloat16", **place)
    with aot.target(aot.CARDS[card]) as target:
        how = Engine(arch, plan.caching, plan.dtype, plan.sharding_rules(), target.mesh)  # pyright: ignore[reportArgumentType]
        params = placement.abstract(arch, plan, target.mesh)  # pyright: ignore[reportArgumentType]

        def loss(layers: object, scale: jax.Array, outer: dict, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            outer = outer | {"embedding": outer["embedding"] * scale}
            return engine.score.function(how, {"outer": outer, "banks": layers}, tokens, lengths).sum()

        ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 128), (1,))]
        args = (params["banks"], jax.ShapeDtypeStruct((), jnp.bfloat16), params["outer"], *ints)
        compiled = target.compile(jax.jit(jax.grad(loss, int(of != "the layers"))), *target.place(args))
    memory, size = compiled.memory_analysis(), weight_bytes(arch, plan)
    logits = 4 * 128 * RAW["vocab_size"]
    assert memory.temp_size_in_bytes < 2 * size["largest_layer"] + 2 * logits + 64 * 2**20
    assert memory.host_temp_size_in_bytes == 0
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} == {True}
    times = {c.turns for c in report.copies}
    assert times == {8 - plan.resident}
    # seven matrices a layer, brought twice; of gradients they go back once
    assert len(report.copies) == (21 if of == "the layers" else 14)


@pytest.mark.parametrize("card", ["RTX 4090", "H200"])
def test_resident_decode_holds_the_weights_once(card: str) -> None:
    plan = Plan(dtype="bfloat16")
    compiled, arch = compiled_decode(card, plan)
    size = weight_bytes(arch, plan)
    cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes == 0
    assert memory.argument_size_in_bytes == pytest.approx(size["outer"] + size["layers"] + cache, rel=0.01)
    assert memory.temp_size_in_bytes < 0.5 * size["largest_layer"] + 2 * cache / 6 + 64 * 2**20


def test_int8_streams_half_the_bytes() -> None:
    plan = Plan(dtype="bfloat16", weights="int8", home="host")
    compiled, arch = compiled_decode("H200", plan)
    dense = weight_bytes(arch, Plan(dtype="bfloat16"))["layers"]
    norms = 6 * 2 * 2048 * 2
    assert compiled.memory_analysis().host_argument_size_in_bytes == (dense - norms) / 2
    assert np.isclose(weight_bytes(arch, plan)["layers"], dense / 2, rtol=0.01)
    assert len(audit(compiled, in_place=True).check().copies) == 7  # codes; scales by row stay on the device


def test_what_is_to_stay_is_not_streamed() -> None:
    """Two of seven matrices more: five copies a layer, the bytes on the device that the plan counts, in a split home."""
    given = {"dtype": "bfloat16", "home": "split", "resident": 2}
    found = {}
    for stay in ((), ("k", "layers.*.v")):
        plan = Plan(**given, stay=stay)
        compiled, arch = compiled_decode("RTX 3090", plan)
        tiers, size = tier_bytes(arch, plan), weight_bytes(arch, plan)
        cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
        memory = compiled.memory_analysis()
        assert memory.host_argument_size_in_bytes == tiers["host"]
        assert memory.argument_size_in_bytes == pytest.approx(size["outer"] + tiers["device"] + cache, rel=1e-4)
        found[stay] = len(audit(compiled, in_place=True, streamed=tiers["host"]).check().copies)
    assert list(found.values()) == [7, 5]


@pytest.mark.parametrize("card", ["RTX 4090", "H200"])
def test_a_period_of_unlike_layers_is_streamed_two_at_a_time(card: str) -> None:
    plan = Plan(dtype="bfloat16", home="host")
    compiled, arch = compiled_decode(card, plan, PERIODIC)
    assert [len(s.kinds) for s in arch.segments] == [6, 1]
    memory, size = compiled.memory_analysis(), weight_bytes(arch, plan)
    cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
    assert memory.host_temp_size_in_bytes == 0
    assert memory.host_argument_size_in_bytes == pytest.approx(size["layers"], rel=0.01)
    # without an order among the copies of a period all its six layers stand there
    assert memory.temp_size_in_bytes < 2.1 * size["largest_layer"] + 2 * cache / 14 + 64 * 2**20


@pytest.mark.parametrize("card", CARDS)
def test_a_layer_is_written_into_its_stack_in_place(card: str) -> None:
    """How `place` fills a stack in pinned memory, and how a layer of one is fetched again: no second stack anywhere."""
    with aot.target(aot.CARDS[card]) as target:
        host = NamedSharding(target.mesh, P(), memory_kind="pinned_host")
        stack = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.bfloat16, sharding=host)
        layer = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
        size = 2048 * 2048 * 2
        put = target.compile(
            placement._put_at(host), *target.place((stack, layer, jax.ShapeDtypeStruct((), jnp.uint32)))
        )
        memory = put.memory_analysis()
        assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes == 8 * size
        assert memory.host_temp_size_in_bytes == 0
        assert memory.temp_size_in_bytes <= size
        with jax.sharding.use_abstract_mesh(target.mesh):
            taken = target.compile(
                jax.jit(lambda s, x: placement._take_at(host).__wrapped__(s, 3) + x), *target.place((stack, layer))
            )
        assert taken.memory_analysis().host_temp_size_in_bytes == 0
        assert taken.memory_analysis().temp_size_in_bytes <= 1.1 * size


@pytest.mark.parametrize(
    ("card", "raw", "layers"),
    [("RTX 4090", RAW, 6), ("H200", PERIODIC | {"num_hidden_layers": 20}, 20)],
    ids=["alike", "unlike"],
)
def test_one_ahead_holds_two_layers_and_a_split_home_its_resident_ones(card: str, raw: dict, layers: int) -> None:
    plan = Plan(dtype="bfloat16", home="split", form="ahead", resident=2)
    compiled, arch = compiled_decode(card, plan, raw)
    assert [p.form for p in plan.parts(arch)][-1] == "ahead"
    memory, size = compiled.memory_analysis(), weight_bytes(arch, plan)
    cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
    streamed = size["layers"] * (layers - 2) / layers
    assert memory.host_temp_size_in_bytes == 0
    assert memory.host_argument_size_in_bytes == pytest.approx(streamed, rel=0.01)
    assert memory.argument_size_in_bytes == pytest.approx(size["outer"] + size["layers"] - streamed + cache, rel=0.01)
    assert memory.temp_size_in_bytes < 2.1 * size["largest_layer"] + 2 * cache / layers + 64 * 2**20


AHEAD = Plan(dtype="bfloat16", home="host", form="ahead")


@functools.cache
def decode_ahead(card: str, layers: int, plan: Plan = AHEAD) -> tuple[Any, Any]:
    """(of decoding short rows as it runs, of the same without DOUBLED), compiled."""
    arch = architecture(RAW | {"num_hidden_layers": layers})
    with aot.target(aot.CARDS[card]) as target:
        called = proof.programs(arch, plan, target.mesh, batch=1, length=64)["decode"]  # pyright: ignore[reportArgumentType]
        args = target.place(called.abstract)
        return tuple(target.compile(p, *called.static, *args) for p in (called.fitting(), called.program.on("gpu")))


def copies_of_a_layer(compiled: Any) -> int:
    """Copies on the device of a whole feed-forward matrix."""
    found = re.findall(r"= bf16\[(?:1,)?(?:2048,5632|5632,2048)\](\S*) copy\(", compiled.as_text())
    return sum("S(5)" not in layout for layout in found)


SPLIT_AHEAD = dataclasses.replace(AHEAD, home="split", resident=2)


@pytest.mark.parametrize(
    ("card", "layers", "plan"),
    [
        ("RTX 4090", 7, AHEAD), ("H200", 6, AHEAD), ("RTX 5090", 4, AHEAD),
        ("RTX 3090", 8, SPLIT_AHEAD), pytest.param("H200", 9, SPLIT_AHEAD, marks=pytest.mark.thorough),
    ],
    ids=["4090-7", "H200-6", "5090-4", "3090-8-split", "H200-9-split"],
)  # fmt: skip
@pytest.mark.some_rows
def test_a_layer_that_was_fetched_ahead_stays_where_it_was_put(card: str, layers: int, plan: Plan) -> None:
    """In a loop of even length, in one of odd length, of which XLA takes one turn out, and in one of which no loop is left;
    after resident layers too: each layer once, by DMA, from its own place, beside products; two layers on the device, as
    counted."""
    doubled, plain = decode_ahead(card, layers, plan)
    assert copies_of_a_layer(plain) >= 1
    assert copies_of_a_layer(doubled) == 0
    arch = architecture(RAW | {"num_hidden_layers": layers})
    report = audit(doubled, in_place=True, streamed=tier_bytes(arch, plan)["host"]).check()
    assert {c.dma for c in report.copies} == {True}
    assert proof.exposed(report) == []
    counted = need(arch, plan, batch=1, context=64).device
    assert 0.95 * counted <= aot.device_bytes(doubled) <= 1.01 * counted


def test_a_turn_that_was_taken_out_of_a_loop_is_held_to_overlap() -> None:
    report = audit(decode_ahead("H200", 6)[0])
    taken = [c for c in report.copies if c.offset == 0 and c.bytes >= 2**20 and not c.stride]
    assert len(taken) == 7
    alone = tuple(dataclasses.replace(c, matmuls=0) if c in taken else c for c in report.copies)
    assert len(proof.exposed(dataclasses.replace(report, copies=alone))) == 7


@pytest.mark.parametrize(
    ("card", "plan", "raw", "name", "axes", "doubled"),
    [
        ("RTX 4090", AHEAD, RAW, "decode", {}, True),
        ("RTX 3090", SPLIT_AHEAD, RAW, "decode", {}, True),
        ("RTX 4090", AHEAD, RAW, "prefill", {}, False),
        ("RTX 4090", Plan(dtype="bfloat16", home="host"), RAW, "decode", {}, False),
        ("RTX 4090", Plan(dtype="bfloat16"), RAW, "decode", {}, False),
        ("RTX 4090", AHEAD, PERIODIC, "decode", {}, False),
        ("T4", dataclasses.replace(AHEAD, dtype="float16"), RAW, "decode", {}, False),
        ("H200", dataclasses.replace(AHEAD, mesh="tensor=2", sharding="tensor"), RAW, "decode", {"tensor": 2}, False),
    ],
    ids=["ahead", "split", "prompts", "scan", "resident", "unlike", "T4", "two cards"],
)
def test_two_turns_are_one_where_that_is_better(
    card: str, plan: Plan, raw: dict, name: str, axes: dict, doubled: bool
) -> None:
    """For one card from sm_80 on, in decoding, where like layers are fetched ahead: what is proved is what runs."""
    with aot.target(aot.CARDS[card], **axes) as target:
        called = proof.programs(architecture(raw), plan, target.mesh, batch=1, length=64)[name]  # pyright: ignore[reportArgumentType]
        assert (called.fitting() is called.program.on("gpu", doubled=True)) is doubled
        assert (called.fitting() is called.program.on("gpu")) is not doubled


def test_single_layers_are_streamed_one_after_another() -> None:
    """Banks of one layer each: alternating windows with an odd number of layers before them resident."""
    raw = PERIODIC | {"model_type": "gemma2", "num_hidden_layers": 5, "query_pre_attn_scalar": 128}
    raw.pop("sliding_window_pattern")
    plan = Plan(dtype="bfloat16", home="split", resident=2)
    compiled, arch = compiled_decode("H200", plan, raw)
    assert [(len(p.kinds), p.repeats) for p in plan.parts(arch)] == [(1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    cache = cache_bytes(arch, plan, batch=BATCH, length=LENGTH)
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 1.1 * weight_bytes(arch, plan)["largest_layer"] + 2 * cache / 5 + 64 * 2**20


ALTERNATING = PERIODIC | {"model_type": "gemma2", "num_hidden_layers": 8, "query_pre_attn_scalar": 128}
ALTERNATING.pop("sliding_window_pattern")


@pytest.mark.parametrize(
    ("card", "raw", "form", "of"),
    [
        ("RTX 3090", ALTERNATING, "scan", "what stands before the layers"), ("H200", ALTERNATING, "scan", "the layers"),
        ("RTX 3090", RAW, "ahead", "the layers"), ("H200", ALTERNATING, "ahead", "what stands before the layers"),
    ],
    ids=["windows-3090", "windows-H200", "ahead-3090", "windows-ahead-H200"],
)  # fmt: skip
@pytest.mark.some_rows
def test_unlike_layers_and_those_ahead_are_brought_again(card: str, raw: dict, form: str, of: str) -> None:
    """Forwards and backwards every layer of either kind by DMA, from the right places, and about two on the device."""
    arch, plan = architecture(raw), Plan(dtype="bfloat16", home="host", form=form)
    with aot.target(aot.CARDS[card]) as target:
        how = Engine(arch, plan.caching, plan.dtype, plan.sharding_rules(), target.mesh)  # pyright: ignore[reportArgumentType]
        params = placement.abstract(arch, plan, target.mesh)  # pyright: ignore[reportArgumentType]

        def loss(layers: object, scale: jax.Array, outer: dict, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            outer = outer | {"embedding": outer["embedding"] * scale}
            return engine.score.function(how, {"outer": outer, "banks": layers}, tokens, lengths).sum()

        ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 128), (1,))]
        args = (params["banks"], jax.ShapeDtypeStruct((), jnp.bfloat16), params["outer"], *ints)
        compiled = target.compile(jax.jit(jax.grad(loss, int(of != "the layers"))), *target.place(args))
    memory, size = compiled.memory_analysis(), weight_bytes(arch, plan)
    logits = 4 * 128 * raw["vocab_size"]
    assert memory.temp_size_in_bytes < 2.6 * size["largest_layer"] + 2 * logits
    assert memory.host_temp_size_in_bytes == 0
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} == {True}
