"""Eight simulated devices give what one gives, under every named table of rules, for resident and for streamed layers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_finetune import longer
from test_homes import gradients, load

import jaxengine
from jaxengine import engine
from jaxengine.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[5, 9, 33, 2], [7, 8, 9, 10, 11, 12, 13], [40, 41], [3]]
# the tensor axis must divide the tiny Llama's two kv heads; no axis divides its vocabulary of 101, which stays whole
WHOLE_VOCAB = Plan(rules=(("vocab", None),))
TABLES = [("data", "data=8"), ("fsdp", "fsdp=8"), ("tensor", "data=4,tensor=2"), ("fsdp+tensor", "fsdp=4,tensor=2")]


@pytest.fixture(scope="module")
def single() -> tuple[np.ndarray, list[list[int]]]:
    model = jaxengine.load(GOLDEN / "llama")
    return np.asarray(model.logits(PROMPTS[1])), [c.tokens for c in model.generate(PROMPTS, max_new_tokens=8)]


@pytest.mark.parametrize(
    "given",
    [{}, {"home": "host"}, {"home": "split", "resident": 1, "form": "ahead"}, {"kv": "int8", "kv_layout": "full"}],
    ids=["device", "host", "split", "int8kv"],
)
@pytest.mark.parametrize(("sharding", "mesh"), TABLES)
@pytest.mark.some_rows
def test_equal_to_one_device(sharding: str, mesh: str, given: dict, single: tuple) -> None:
    model = jaxengine.load(GOLDEN / "llama", plan=WHOLE_VOCAB, sharding=sharding, mesh=mesh, **given)
    # the sums over a split dim are made in another order: the same bound as against transformers
    np.testing.assert_allclose(np.asarray(model.logits(PROMPTS[1])), single[0], atol=2e-4, rtol=0)
    if "kv" not in given:
        assert [c.tokens for c in model.generate(PROMPTS, max_new_tokens=8)] == single[1]
    q = jax.tree.leaves(model.params["banks"][0].weights[0]["q"])[0]  # of a split home a resident one
    split = q.size // q.addressable_shards[0].data.size
    assert split == {"data": 1, "fsdp": 8, "tensor": 2, "fsdp+tensor": 8}[sharding]
    assert q.sharding.memory_kind == ("pinned_host" if given.get("home") == "host" else "device")


def test_quantised_weights_are_split_too() -> None:
    one = jaxengine.load(GOLDEN / "llama", weights="int8")
    many = jaxengine.load(
        GOLDEN / "llama", plan=WHOLE_VOCAB, weights="int8", sharding="fsdp+tensor", mesh="fsdp=4,tensor=2"
    )
    np.testing.assert_allclose(many.logits(PROMPTS[1]), one.logits(PROMPTS[1]), atol=2e-4, rtol=0)
    q = many.params["banks"][0].weights[0]["q"]
    assert q.codes.size == 8 * q.codes.addressable_shards[0].data.size
    assert (
        q.scale.size == 2 * q.scale.addressable_shards[0].data.size
    )  # its dims are the outputs: heads alone are split


def test_a_vocabulary_that_does_not_divide_is_told() -> None:
    with pytest.raises(ValueError, match=r"embedding: dim 0, 'vocab', has size 101, which tensor=2 does not divide"):
        jaxengine.load(GOLDEN / "llama", sharding="tensor", mesh="data=4,tensor=2")


@pytest.mark.parametrize(("sharding", "mesh"), TABLES)
@pytest.mark.parametrize("given", [{}, {"home": "host", "kv": "int8"}], ids=["device", "host"])
@pytest.mark.some_rows
def test_the_second_call_of_decode_compiles_nothing(
    sharding: str, mesh: str, given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decode gives is laid out as what prefill gave it, and the cache as the rules say."""
    model = jaxengine.load(GOLDEN / "llama", plan=WHOLE_VOCAB, sharding=sharding, mesh=mesh, **given)
    compiled: list[int] = []
    made = 0

    def count(name: str, seconds: float, **kwargs: object) -> None:
        nonlocal made
        made += "backend_compile" in name

    class Counted:
        def __call__(self, *args: object) -> object:
            before = made
            found = jax.block_until_ready(decode(*args))
            compiled.append(made - before)
            return found

    decode = engine.decode
    monkeypatch.setattr(engine, "decode", Counted())
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        model.generate(PROMPTS + PROMPTS, max_new_tokens=2 * engine.CHUNK + 5)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled[0] >= 1
    assert compiled[1:] == [0, 0]
    cache = engine.empty_cache(model.engine, model.params, 8, 64)
    batch, heads = {"data": (8, 1), "fsdp": (8, 1), "tensor": (4, 2), "fsdp+tensor": (4, 2)}[sharding]
    for x in jax.tree.leaves(cache):
        lead = () if model.plan.resolved_form == "unrolled" else (x.shape[0],)
        rows = x.shape[len(lead) :]
        assert x.sharding.shard_shape(x.shape) == (*lead, rows[0] // batch, rows[1] // heads, *rows[2:])


def test_a_rule_does_not_say_where_layers_live() -> None:
    with pytest.raises(ValueError, match=r"names a memory kind.*home='host'.*\('layers', None\)"):
        Plan(rules=(("layers", None, "pinned_host"),))


MORE = [("gemma2", "scan", "fsdp"), ("gemma3_text", "ahead", "fsdp+tensor"), ("five", "ahead", "fsdp")]


@pytest.mark.parametrize(
    ("family", "form", "sharding"),
    [
        ("gemma2", "scan", "fsdp+tensor"), ("five", "ahead", "fsdp+tensor"),
        *(pytest.param(*row, marks=pytest.mark.thorough) for row in MORE),
    ],
)  # fmt: skip
@pytest.mark.some_rows
def test_streamed_layers_and_their_gradients(family: str, form: str, sharding: str) -> None:
    """Of unlike layers that alternate, and of like ones one ahead, against one device with resident ones: the parts of a
    layer that each device has, brought in the loops of both ways."""
    made = longer if family == "five" else functools.partial(load, family)
    rules: dict[str, Any] = {"rules": WHOLE_VOCAB.rules} if family == "five" else {"plan": WHOLE_VOCAB}
    one, many = made(), made(home="host", form=form, sharding=sharding, mesh=dict(TABLES)[sharding], **rules)
    ids = PROMPTS[1]
    np.testing.assert_allclose(many.logits(ids), one.logits(ids), atol=2e-4, rtol=0)
    wanted, found = gradients(one, ids), gradients(many, ids)
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        # as tests/test_homes.py bounds sums in another order
        np.testing.assert_allclose(found[name], w, rtol=0, atol=2e-5 * abs(w).max() + 1e-6, err_msg=name)
    bank = next(b for b in many.params["banks"] if b.form == form)
    down = bank.weights[0]["rest"]["down"] if form == "ahead" else bank.weights[0]["down"]
    assert down.sharding.memory_kind == "pinned_host"
    assert down.size == 8 * down.addressable_shards[0].data.size
