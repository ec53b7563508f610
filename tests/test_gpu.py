"""On a card: every family's golden checkpoint from every home, forward, tokens and gradients; where its bytes really are.

Matmuls run in full float32 here (a card's default rounds their inputs to 11 bits), so that the bounds are those that the
same checks have on a CPU (tests/test_homes.py). What is fast, and by how much, is scripts/gpu_suite.py's to say.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN, golden

import jaxengine
from jaxengine import engine, selftest, technique
from jaxengine.homes.base import HOMES, home
from jaxengine.placement import stored
from pallas_kernels.aot import OPTIONS

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
ATOL = 2e-4  # as tests/test_models.py derives it
FAMILIES = technique.names("jaxengine.models")
# homes that a compiled program can reach, in each of their forms
PLACES: list[dict[str, Any]] = [
    {"home": name, "form": form, **({"resident": 1} if name == "split" else {})}
    for name in technique.names(HOMES)
    for form in home(name).FORMS
    if form != "python"
]
NAMES = ["-".join(map(str, place.values())) for place in PLACES]


@pytest.fixture(autouse=True)
def card() -> Iterator[Any]:
    device = jax.devices()[0]
    if device.platform != "gpu":
        pytest.skip(f"there is no GPU: jax.devices() are {device.device_kind!r}")
    with jax.default_matmul_precision("highest"):
        yield device


def load(case: str, **place: Any) -> jaxengine.Model:
    return jaxengine.load(GOLDEN / case, dtype="float32", **place)


def gradients(model: jaxengine.Model, ids: list[int]) -> dict[str, np.ndarray]:
    """d sum(logits * seed) / d every parameter, by name."""
    tokens, lengths = jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    shape = (1, len(ids), model.config.vocab_size)
    seed = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))

    @functools.partial(jax.jit, compiler_options=dict(OPTIONS))
    def gradient(params: Any) -> Any:
        return jax.grad(lambda p: (engine.score.function(model.engine, p, tokens, lengths) * seed).sum())(params)

    found = gradient(model.params)
    return {n: np.asarray(jax.device_get(f())) for n, f in stored(model.architecture, model.plan, found).items()}


@pytest.mark.parametrize("place", PLACES, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_transformers_own(family: str, place: dict[str, Any]) -> None:
    prompts, data = golden(family)
    model = load(family, **place)
    np.testing.assert_allclose(model.logits(prompts[0])[0], data["logits_0"], atol=ATOL, rtol=0)
    found = [c.tokens for c in model.generate(prompts, max_new_tokens=16, stop_ids=())]
    assert found == [data[f"generated_{i}"].tolist() for i in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_resident_layers(family: str) -> None:
    ids = golden(family)[0][0][:6]
    wanted = gradients(load(family), ids)
    assert any(abs(w).max() > 1e-3 for n, w in wanted.items() if n.startswith("layers."))
    for place, name in zip(PLACES, NAMES, strict=True):
        found = gradients(load(family, **place), ids)
        assert found.keys() == wanted.keys()
        for n, w in wanted.items():
            # sums of some hundred products in another order: 2^-24 each of the largest, with room for a few layers
            np.testing.assert_allclose(found[n], w, rtol=0, atol=2e-5 * abs(w).max() + 1e-6, err_msg=f"{name} {n}")


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_layers_are_in_pinned_memory(family: str) -> None:
    """By their shardings, their types, and the memory that each buffer says it is in."""
    for place in PLACES:
        model = load(family, **place)
        for bank in model.params["banks"]:
            wanted = "device" if bank.home == "device" else "pinned_host"
            for leaf in jax.tree.leaves(bank.weights):
                assert leaf.sharding.memory_kind == wanted
                assert ("<host>" in str(jax.typeof(leaf))) == (wanted == "pinned_host")
                assert {s.data.sharding.memory_kind for s in leaf.addressable_shards} == {wanted}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(model.params["outer"])} == {"device"}
        streamed = {bank.home for bank in model.params["banks"]} - {"device"}
        assert streamed == ({"host"} if place["home"] in ("host", "split") else set())


def test_pinned_memory_takes_none_of_the_cards() -> None:
    device, size = jax.devices()[0], 64 * 2**20
    before = device.memory_stats()["bytes_in_use"]
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    held = jax.block_until_ready(jax.device_put(np.ones(size, np.uint8), sharding))
    assert device.memory_stats()["bytes_in_use"] - before < size // 8
    there = jax.block_until_ready(jax.device_put(held, jax.memory.Space.Device))
    assert device.memory_stats()["bytes_in_use"] - before >= size
    del there


def test_the_self_test_passes_and_is_remembered(card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selftest.check_streaming(card, folder=tmp_path)
    (marker,) = tmp_path.iterdir()
    assert json.loads(marker.read_text())["card"] == card.device_kind
    monkeypatch.setattr(selftest, "walk", lambda *args: pytest.fail("it ran again"))
    selftest.check_streaming(card, folder=tmp_path)


# A process of its own: the highest use of memory is its process's, and cannot be set back. 8 layers of 122 MB.
PEAK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jaxengine.architecture import architecture
from jaxengine.loading import from_arrays
from jaxengine.plan import Plan, need, weight_bytes
raw = dict(
    model_type="llama", vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False,
)
arch = architecture(raw)
plan = Plan(dtype="bfloat16", **json.loads(sys.argv[1]))
class Ones(dict):
    def __missing__(self, name):
        return np.full(arch.specs()[name].shape, 0.01, jnp.bfloat16)
model = from_arrays(arch, plan, Ones(), raw)
model.generate([[1] * 400] * 4, max_new_tokens=100, stop_ids=())
stats = jax.devices()[0].memory_stats()
planned = need(arch, plan, batch=4, context=512)
print(json.dumps(dict(
    peak=stats["peak_bytes_in_use"], planned=planned.device, layers=weight_bytes(arch, plan)["layers"], host=planned.host,
)))
"""


@pytest.mark.parametrize("name", [n for n in NAMES if n != "device-scan"])  # which copies each layer, for tests alone
def test_no_more_memory_is_used_than_planned(name: str) -> None:
    """Planned by arithmetic; temporaries are the compiler's to choose, for which there is one layer's room."""
    place = PLACES[NAMES.index(name)]
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(place)],
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["peak"] <= found["planned"] + found["layers"] / 8
    if place["home"] == "host":
        assert found["host"] == pytest.approx(found["layers"], rel=0.01)
        assert found["peak"] < 0.7 * found["layers"]


# As `jaxengine generate --memory` starts: the pool is a budget's, and what that chooses stays within it
BUDGET = """
import json, sys
from jaxengine import command, machine
cards, memory = machine.card_memories(), int(sys.argv[2])
memory = memory or int(0.92 * min(cards)[0])
command.start_jax()
command.within(memory)
import jax, jax.numpy as jnp
device = jax.devices()[0]
limit = device.memory_stats()["bytes_limit"]
if sys.argv[1]:
    import jaxengine
    model = jaxengine.load(sys.argv[1], memory=memory, batch=4, context=512)
    model.generate([[1] * 400] * 4, max_new_tokens=100, stop_ids=())
    home, peak = model.plan.home, device.memory_stats()["peak_bytes_in_use"]
else:
    home, held = "", jax.block_until_ready(jnp.zeros(int(0.9 * min(cards)[0]), jnp.uint8))
    peak = device.memory_stats()["peak_bytes_in_use"]
print(json.dumps(dict(cards=cards, memory=memory, limit=limit, peak=peak, home=home)))
"""


def within_a_budget(folder: str, memory: int, cache: Path) -> dict[str, Any]:
    environ = {n: x for n, x in os.environ.items() if "MEM_FRACTION" not in n}
    ended = subprocess.run(
        [sys.executable, "-c", BUDGET, folder, str(memory)],
        env=environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_budget_of_nearly_the_whole_card_can_be_had(tmp_path: Path) -> None:
    """XLA's own pool ends at three quarters of it. (Nothing else may be on the card: this process's own pool included.)"""
    jax.clear_caches()
    stats = jax.devices()[0].memory_stats()
    if stats.get("pool_bytes", 0) > 0.02 * stats["bytes_limit"]:
        pytest.skip("this process's own pool is on the card: XLA_PYTHON_CLIENT_PREALLOCATE=false gives it up")
    found = within_a_budget("", 0, tmp_path)
    assert found["limit"] >= found["memory"]
    assert found["peak"] >= 0.9 * min(found["cards"])[0]


@pytest.mark.parametrize("home", ["device", "split"])
def test_what_a_budget_chooses_stays_within_it(home: str, tmp_path: Path) -> None:
    from jaxengine.architecture import architecture
    from jaxengine.loading import from_arrays
    from jaxengine.plan import Plan, need

    raw = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    arch, plan = architecture(raw), Plan(dtype="bfloat16")
    zeros = {name: np.zeros(spec.shape, np.float32) for name, spec in arch.specs().items()}
    from_arrays(arch, plan, zeros, raw).save(tmp_path / "model")
    near = Plan(dtype="bfloat16", home=home, resident=4 if home == "split" else 0)
    memory = int(1.02 * need(arch, near, batch=4, context=512).device)
    found = within_a_budget(str(tmp_path / "model"), memory, tmp_path)
    assert found["home"] == home
    assert memory <= found["limit"] <= 1.06 * memory + 2**31
    assert found["peak"] <= memory
    assert [p.name for p in (tmp_path / "jaxengine").glob("proof-*.json")]
