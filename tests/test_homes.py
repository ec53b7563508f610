"""Every home and form gives what resident layers give, for every family: logits, greedy tokens and gradients.

The same program form is held to the same bits; another one, which XLA may fuse otherwise, to the bound that the golden
files are held to, and to the same tokens.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN, golden

import jaxengine
from jaxengine import engine, technique
from jaxengine.homes.base import HOMES, home
from jaxengine.plan import Plan

ATOL = 2e-4  # as tests/test_models.py derives it
FAMILIES = ["gemma2", "gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"]
PLACES: list[dict[str, Any]] = [
    {"home": name, "form": form, **({} if home(name).RESIDENT is None else {"resident": 1})}
    for name in technique.names(HOMES)
    for form in home(name).FORMS
    if name != "device"
]
DISK = tempfile.TemporaryDirectory()
# every place for two families, one of like layers and one of unlike ones; of the others the two that hold most kinds of bank
CASES = [
    (family, place)
    for family in FAMILIES
    for place in PLACES
    if family in ("llama", "gemma2") or place["form"] == ("ahead" if place["home"] == "host" else "scan")
]


def load(case: str, **place: Any) -> jaxengine.Model:
    disk = {"disk": DISK.name} if place.get("home") == "disk" else {}
    return jaxengine.load(GOLDEN / case, dtype="float32", **disk, **place)


def test_families_are_all_of_them() -> None:
    assert tuple(FAMILIES) == technique.names("jaxengine.models")


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.some_rows
def test_the_same_form_gives_the_same_bits(case: str) -> None:
    prompts, data = golden(case)
    one, other = load(case, form="scan"), load(case, home="host", form="scan")
    np.testing.assert_array_equal(one.logits(prompts[0]), other.logits(prompts[0]))
    found = [[c.tokens for c in m.generate(prompts, max_new_tokens=16, stop_ids=())] for m in (one, other)]
    assert found[0] == found[1] == [data[f"generated_{i}"].tolist() for i in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some_rows
def test_driven_from_python_every_home_gives_the_same_bits(family: str) -> None:
    """The form has a program for each piece, which is the same wherever its layer comes from; and they are the right bits."""
    prompts, data = golden(family)
    host, disk = (load(family, home=name, form="python").logits(prompts[0]) for name in ("host", "disk"))
    np.testing.assert_array_equal(disk, host)
    np.testing.assert_allclose(disk[0], data["logits_0"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "place"), CASES, ids=[f"{f}-{'-'.join(map(str, p.values()))}" for f, p in CASES])
@pytest.mark.some_rows
def test_tokens_and_logits(family: str, place: dict[str, Any]) -> None:
    prompts, data = golden(family)
    model = load(family, **place)
    np.testing.assert_allclose(model.logits(prompts[0])[0], data["logits_0"], atol=ATOL, rtol=0)
    found = [c.tokens for c in model.generate(prompts, max_new_tokens=16, stop_ids=())]
    assert found == [data[f"generated_{i}"].tolist() for i in range(len(prompts))]


def gradients(model: jaxengine.Model, ids: list[int]) -> dict[str, np.ndarray]:
    """d sum(logits * seed) / d every parameter, by name."""
    from jaxengine.placement import stored

    tokens, lengths = jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    seed = np.random.default_rng(0).normal(size=(1, len(ids), model.config.vocab_size)).astype(np.float32)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return (engine.score.function(model.engine, params, tokens, lengths) * jnp.asarray(seed)).sum()

        return jax.grad(loss)(params)

    found = gradient(model.params)
    return {n: np.asarray(jax.device_get(f())) for n, f in stored(model.architecture, model.plan, found).items()}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma2", "gemma3_text")])
def test_gradients_in_the_same_form_have_the_same_bits(family: str) -> None:
    """Of like layers; of alternating ones those that are streamed have a loop of their own on the way back."""
    ids = golden(family)[0][0][:6]
    wanted, found = (
        gradients(load(family, **place), ids) for place in ({"form": "scan"}, {"home": "host", "form": "scan"})
    )
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        np.testing.assert_array_equal(found[name], w, err_msg=name)


INSIDE = [p for p in PLACES if p["form"] != "python"]  # gradients are of one program
SPLIT_AHEAD = {"home": "split", "form": "ahead", "resident": 1}
# every place for a family whose layers alternate; of Gemma 3, whose layers are a period and a rest, also the two scans; of the
# others split, one ahead: the rest of theirs is `thorough`
GRADIENTS: list[Any] = [
    *(("gemma2", place) for place in INSIDE),
    ("gemma3_text", {"home": "split", "form": "scan", "resident": 1}),
    *((family, SPLIT_AHEAD) for family in FAMILIES if family != "gemma2"),
    *(
        pytest.param(family, place, marks=pytest.mark.thorough)
        for family in ("gemma3_text", "llama")
        for place in INSIDE
        if place != SPLIT_AHEAD and (family, place["home"], place["form"]) != ("gemma3_text", "split", "scan")
    ),
]


@functools.cache
def resident_gradients(family: str) -> dict[str, np.ndarray]:
    wanted = gradients(load(family), golden(family)[0][0][:6])
    assert any(abs(w).max() > 1e-3 for n, w in wanted.items() if n.startswith("layers."))
    return wanted


@pytest.mark.parametrize(
    ("family", "place"), GRADIENTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
@pytest.mark.some_rows
def test_gradients(family: str, place: dict[str, Any]) -> None:
    """Of every parameter, through streamed layers in both forms, against the resident, unrolled layers."""
    wanted, found = resident_gradients(family), gradients(load(family, **place), golden(family)[0][0][:6])
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        # sums of some hundred products in another order: 2^-24 each of the largest, with room for a few layers
        np.testing.assert_allclose(found[name], w, rtol=0, atol=2e-5 * abs(w).max() + 1e-6, err_msg=name)


def test_gemma_3_is_streamed_as_a_run_a_layer_alone_and_a_run() -> None:
    """What its gradients are held against: the golden file has a period of six, and the two layers after it."""
    arch = load("gemma3_text").architecture
    found = [(p.home, p.form, p.num_layers) for p in Plan(dtype="float32", home="host", form="scan").parts(arch)]
    assert found == [("host", "scan", 5), ("host", "unrolled", 1), ("host", "scan", 2)]


def test_as_many_resident_layers_as_there_are_is_told() -> None:
    layers = load("llama").architecture.num_layers
    with pytest.raises(ValueError, match=rf"{layers} of {layers} layers are resident.*at most resident={layers - 1}"):
        load("llama", home="split", resident=layers)
    with pytest.raises(ValueError, match=r"home is 'split' and resident is 0"):
        load("llama", home="split")
    split: dict[str, Any] = {"home": "split", "resident": 1, "resident_form": "scan"}
    for wrong in ({"home": "host", "resident": 0}, {"form": "python"}, {"resident_form": "ahead"}):
        with pytest.raises(ValueError, match=r"resident_form .*; it is 'unrolled' or 'scan' under home='split'"):
            Plan(**(split | wrong))
    assert Plan.from_json(Plan(**split).to_json()) == Plan(**split)
    assert load("llama", plan=Plan(dtype="float32", **split), home="host", resident=0).plan.resident_form == ""
    with pytest.raises(ValueError, match=r"home is 'host' and resident is 2"):
        load("llama", home="host", resident=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [{}, {"kv_layout": "full", "home": "host"}], ids=["window", "full"])
@pytest.mark.some_rows
def test_a_prompt_read_in_chunks(family: str, given: dict[str, Any]) -> None:
    """Longer than a chunk and than the windows, ragged: the logits after it and the tokens, as read in one piece."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 90, n).tolist() for n in (57, 16, 3, 33)]
    whole, chunked = load(family), load(family, plan=Plan(chunk=16), **given)
    for a, b in zip(
        *(m.generate(prompts, max_new_tokens=4, stop_ids=(), logprobs=5) for m in (whole, chunked)), strict=True
    ):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2 * ATOL, rtol=0)


def test_int8_keys_give_a_row_what_it_gives_alone_however_its_neighbours_are_read() -> None:
    """A short row beside a long one is read in chunks, alone in one piece."""
    rng = np.random.default_rng(5)
    short, long = rng.integers(3, 90, 16).tolist(), rng.integers(3, 90, 50).tolist()
    model = load("llama", plan=Plan(chunk=16, kv_codec="int8"))
    beside = model.generate([short, long], max_new_tokens=4, stop_ids=(), logprobs=0)[0]
    alone = model.generate(short, max_new_tokens=4, stop_ids=(), logprobs=0)[0]
    assert beside.tokens == alone.tokens
    np.testing.assert_allclose(beside.logprobs, alone.logprobs, atol=2 * ATOL, rtol=0)
