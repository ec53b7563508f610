"""What fine-tuning needs: trained parameters of published sizes, and the arithmetic against XLA's own bytes.

From outside: peft says of rank 8 beside all linear layers of Llama 3 8B "trainable params: 20,971,520"; AdamW in float32 is
16 bytes a parameter with its gradient (Rajbhandari et al., arXiv:1910.02054, section 3.1: 4 of weights, 4 of gradients, 8 of
state), of which a gradient that is made in bfloat16 takes 2.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import pytest
from oracles.golden import GOLDEN
from test_planning import BF16, LLAMA_3_8B, SMALL

from jaxengine.architecture import architecture
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.optimizers.base import Matrix, Optimizer
from jaxengine.plan import Plan
from jaxengine.planning import plan_for
from pallas_kernels import aot
from pallas_kernels.audit import Report, audit
from pallas_kernels.cards import find

F32 = Plan(dtype="float32")
ARCH_8B = architecture(LLAMA_3_8B)


def test_adapters_of_a_published_size() -> None:
    assert tuning.adapter_bytes(ARCH_8B, tuning.task("lora")) == 4 * 20_971_520
    made = tuning.abstract_trained(ARCH_8B, BF16, tuning.task("lora"), None)
    assert tuning.size_of(made) == 4 * 20_971_520
    need = tuning.need(ARCH_8B, BF16, tuning.task("lora"), batch=1, context=512)
    assert (need.trained, need.gradients) == (4 * 20_971_520, 4 * 20_971_520)
    assert need.optimizer == pytest.approx(8 * 20_971_520, rel=1e-5)  # and counters
    assert need.outer + need.resident == pytest.approx(2 * 8.03e9, rel=1e-3)


def test_every_parameter_on_the_device_is_14_bytes_of_it() -> None:
    need = tuning.need(ARCH_8B, F32, tuning.task("full"), batch=1, context=64)
    standing = need.outer + need.resident + need.gradients + need.optimizer
    assert standing == pytest.approx(14 * 8.03e9, rel=1e-3)
    in_parts = dataclasses.replace(tuning.task("full"), accumulate=2)
    need = tuning.need(ARCH_8B, F32, in_parts, batch=1, context=64)
    assert need.outer + need.resident + need.gradients + need.optimizer == pytest.approx(16 * 8.03e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "matrix", "other", "thin"),
    [
        ("adamw", 2, 2, 2),
        ("lion", 1, 1, 1),
        ("sgd", 1, 1, 1),
        ("muon", 1, 2, 1),  # what is no matrix has two moments, as AdamW
        ("adamw8bit", 2 * (1 + 4 / 256) / 4, 2 * (1 + 4 / 256) / 4, 2 * (1 + 4 / 256) / 4),
        ("adafactor", 0, 0, 1),  # rows and columns; but of a thin matrix every element
    ],
)
def test_state_of_an_optimizer(name: str, matrix: float, other: float, thin: float) -> None:
    """Bytes for each of the parameter's, as the papers have it."""
    how = Optimizer(name)
    for shape, kind, share in (
        ((4096, 1024), Matrix(), matrix),
        ((4096, 1024), None, other),
        ((8, 4096), Matrix(), thin),
    ):
        assert tuning.state_of(how, shape, kind) / (4 * shape[0] * shape[1]) == pytest.approx(share, abs=0.002)
    assert tuning.state_of(Optimizer("mezo"), (8, 8)) == 0


def test_a_model_larger_than_the_card_is_tuned_beside_streamed_weights() -> None:
    found = plan_for(ARCH_8B, BF16, find("rtx4090"), memory=8 * 10**9, context=2048, task="lora")
    chosen = found.chosen
    assert chosen is not None
    assert chosen.plan.home == "split"
    assert chosen.need.device <= 8 * 10**9
    assert chosen.tokens == 2048
    # matrices read forwards, run again, and gone back through without a gradient of their own: three products
    elements = 8.03e9 - 128256 * 4096
    assert dict(chosen.seconds)["matmuls"] == pytest.approx(3 * 2 * elements * 2048 / find("rtx4090").tensor, rel=0.1)
    assert dict(chosen.seconds)["host link"] == pytest.approx(2 * chosen.need.host / find("rtx4090").link)
    short = plan_for(ARCH_8B, BF16, find("rtx4090"), memory=25 * 10**8, context=2048, task="lora")
    assert short.chosen is None
    assert short.short > 0
    assert len(short.changes) == 3
    assert all(c.need.device <= 25 * 10**8 or said.startswith("memory") for said, c in short.changes)


def test_a_plan_in_tiles_keeps_nothing_of_a_layer_and_needs_less() -> None:
    arch, card = architecture(LLAMA_3_8B | {"max_position_embeddings": 2**17}), find("H100 SXM")
    asked: dict[str, Any] = {"context": 2**17, "task": "full"}
    tiled, plain = plan_for(arch, BF16, card, tile=8192, **asked), plan_for(arch, BF16, card, **asked)
    assert {c.plan.remat for c in tiled.candidates} == {"full", "offload"}
    assert tiled.to_dict()["tile"] == 8192
    without = {p.plan: p.need.activations for p in plain.candidates}
    same = [(c.need.activations, without[c.plan]) for c in tiled.candidates if c.plan in without]
    assert len(same) >= 2
    assert all(less < more for less, more in same)
    # both halves of the feed-forward block, and their gradients, of all tokens but a tile's
    host, whole = (next(c for c in o.candidates if c.plan.home == "host") for o in (tiled, plain))
    assert whole.need.activations - host.need.activations > 2 * 2**17 * 14336 * 2


def test_layers_are_fetched_one_ahead_where_a_step_can_and_copies_are_worth_hiding() -> None:
    asked: dict[str, Any] = {"memory": 8 * 10**9, "context": 512}
    card = find("rtx4090")

    def forms(task: str, **more: Any) -> set[tuple[str, str]]:
        return {
            (c.plan.form, c.plan.remat) for c in plan_for(ARCH_8B, BF16, card, task=task, **(asked | more)).candidates
        }

    assert {("ahead", "full"), ("ahead", "offload"), ("", "dots")} <= forms("lora")
    assert ("ahead", "dots") not in forms("lora")  # of whose layers more is kept than what comes into them
    for task in ("full", "lisa", "mezo"):  # loops of their own over layers in host memory
        assert "ahead" not in {form for form, _ in forms(task)}
    # 16 rows of 2048 compute for longer than three copies take
    assert "ahead" not in {form for form, _ in forms("lora", batch=16, context=2048)}
    chosen = plan_for(ARCH_8B, BF16, card, task="lora", **asked).chosen
    assert chosen is not None
    assert (chosen.plan.home, chosen.plan.form) in (("split", "ahead"), ("split", ""))
    assert chosen.fits


@pytest.mark.parametrize("family", ["gpt2", "opt_350m_like", "gemma2", "phi3"])
def test_every_family_and_task_is_planned_for(family: str) -> None:
    """Whatever a family's config calls its sizes."""
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    arch = architecture(raw)
    assert tuning.width(arch) == raw.get("hidden_size", raw.get("n_embd"))
    for name in tuning.TASKS:
        for home in ("host", "device"):
            need = tuning.need(arch, Plan(dtype="float32", home=home), tuning.task(name), batch=1, context=16)
            assert need.device > 0
            assert bool(need.host) == (home == "host" or name == "hift")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "loro"}, "task is 'loro'; what is planned for is generate, lora, dora, full"),
        (
            {"task": "full", "plan": Plan(dtype="bfloat16", weights="int8")},
            "weights is 'int8': task 'lora' trains beside",
        ),
        ({"task": "lora", "plan": Plan(dtype="bfloat16", kv_codec="int8")}, "keeps no cache"),
        ({"task": "generate", "tile": 512}, "tile is 512, and task 'generate' takes a prompt in chunks"),
        ({"task": "mezo", "tile": 512}, "tile is 512; bytes of task 'mezo'"),
        ({"task": "full", "tile": -1}, "tile is -1; it is so many tokens of a row, or 0 for all"),
        ({"task": "full:tile=8192"}, "task is 'full:tile=8192'; what is planned for is generate, lora"),
    ],
)
def test_what_is_not_done_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_for(ARCH_8B, given.pop("plan", BF16), find("rtx4090"), **given)


def both_ways(report: Report, text: str) -> bool:
    """Whether copies to and from host memory are under way at the same time, in the order that the program has."""
    ways, under_way = {c.name: c.source for c in report.copies}, dict[str, str]()
    for line in text.splitlines():
        if line.startswith("}"):
            under_way.clear()
        elif made := re.match(r"\s*(?:ROOT )?%?(\S+) = ", line):
            name = made.group(1)
            if name in ways:
                under_way[name] = ways[name]
                if len(set(under_way.values())) == 2:
                    return True
            elif "-done" in name:
                for operand in re.findall(r"%([\w.-]+)", line[made.end() :]):
                    under_way.pop(operand, None)
    return False


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    ("card", "task", "plan", "batch", "context", "vocab"),
    [
        ("RTX 4090", "lora", {"home": "host"}, 4, 1024, 32000),
        ("RTX 4090", "lora, in parts", {"home": "host"}, 4, 1024, 8192),
        ("RTX 3090", "lora", {"home": "split", "resident": 3, "remat": "dots"}, 1, 4096, 8192),
        ("H200", "lora", {"remat": "none"}, 4, 1024, 8192),
        ("RTX 4090", "full", {"home": "host"}, 4, 1024, 8192),
        ("RTX 4090", "full, in parts", {"home": "host"}, 2, 1024, 8192),
        ("RTX 4090", "full, muon", {"home": "host"}, 4, 1024, 8192),
        ("RTX 4090", "full, adamw8bit", {"home": "host"}, 4, 1024, 8192),
        ("RTX 4090", "hift, in parts", {"home": "host"}, 4, 1024, 8192),
        ("H200", "full", {"home": "split", "resident": 2, "remat": "offload"}, 1, 2048, 8192),
        ("RTX 4090", "full", {}, 2, 1024, 8192),
        ("RTX 4090", "lisa", {"home": "host"}, 4, 1024, 8192),
        ("H200", "badam", {"home": "split", "resident": 3}, 2, 1024, 8192),
    ],
    ids=str,
)  # fmt: skip
def test_the_compiled_step_agrees(
    card: str, task: str, plan: dict[str, Any], batch: int, context: int, vocab: int
) -> None:
    arch = architecture(SMALL | {"vocab_size": vocab})
    task, _, how = task.partition(", ")
    what, chosen = tuning.task(task), dataclasses.replace(F32 if task == "full" else BF16, **plan)
    if how == "in parts":
        what = dataclasses.replace(what, accumulate=2)
    elif how:
        what = dataclasses.replace(what, optimizer=Optimizer(how))
    with aot.target(aot.CARDS[card]) as target:
        program, static, abstract = tuning.program(arch, chosen, what, target.mesh, batch=batch, context=context)
        compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
    need = tuning.need(arch, chosen, what, batch=batch, context=context)
    assert aot.device_bytes(compiled) == pytest.approx(need.device, rel=0.05)
    if task != "hift":  # whose moments wait outside of the program
        assert aot.host_bytes(compiled) == pytest.approx(need.host, rel=0.05)
    memory = compiled.memory_analysis()
    kept = need.host - (memory.host_argument_size_in_bytes if chosen.remat == "offload" else need.host)
    assert memory.host_temp_size_in_bytes <= 1.05 * kept  # states and weights are changed where they stand
    if task == "full":
        assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    # frozen layers never stand on the device beyond those that are resident and the one in use
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} <= {True}
    if jax.tree.leaves(plan) and "home" in plan:
        assert report.copies
    if task == "full" and plan.get("home") == "host":  # what was changed goes out while the next one's state comes in
        assert both_ways(report, compiled.as_text())
