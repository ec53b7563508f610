"""What fine-tuning needs: trained parameters of published sizes, and the arithmetic against XLA's own bytes.

From outside: peft says of rank 8 beside all linear layers of Llama 3 8B "trainable params: 20,971,520"; AdamW in float32 is
16 bytes a parameter with its gradient (Rajbhandari et al., arXiv:1910.02054, section 3.1: 4 of weights, 4 of gradients, 8 of
state), of which a gradient that is made in bfloat16 takes 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from oracles.golden import GOLDEN
from test_planning import BF16, LLAMA_3_8B, SMALL

import jaxengine
from checkpoints.safetensors import write_file
from jaxengine.architecture import architecture
from jaxengine.command import app
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.command import KEPT, chosen_plan, finetune
from jaxengine.finetune.optimizers.base import Matrix, Optimizer
from jaxengine.finetune.settings import Settings
from jaxengine.plan import Plan
from jaxengine.planning import plan_folder, plan_for
from jaxengine.proof import prove
from pallas_kernels import aot
from pallas_kernels.audit import Report, audit
from pallas_kernels.cards import find

F32 = Plan(dtype="float32")
FEW: dict[str, Any] = {"batch": 4, "context": 64}
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
    assert all(c.need.device <= 25 * 10**8 or "memory " in said for said, c in short.changes)


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
    assert (chosen.plan.resident > 1, chosen.plan.resident_form) == (True, "scan")
    assert f"{chosen.plan.resident} resident in a loop" in chosen.label()
    assert chosen.fits


def test_resident_layers_of_one_kind_go_through_a_loop() -> None:
    """Beside adapters, where a GPU is planned for. A CPU's run asks for it where layers are run again alone."""
    card, rows = find("rtx4090"), {"batch": 1, "context": 64}

    def forms(family: str, task: str, **more: Any) -> set[str]:
        raw = json.loads((GOLDEN / family / "config.json").read_text())
        found = plan_for(architecture(raw), BF16, card, task=task, **rows, **more).candidates
        return {c.plan.form for c in found if c.plan.home == "device"}

    assert forms("llama", "lora") == forms("qwen3", "lora") == {"scan"}
    assert forms("llama", "dora") == {"", "scan"}  # under 'full'; where matrices' results are kept it holds more
    wanted = {"": {"none", "dots"}, "scan": {"full"}}
    by_name = plan_for(ARCH_8B, dataclasses.replace(BF16, attention="xla"), card, task="lora", **rows).candidates
    for form, remats in wanted.items():
        assert {c.plan.remat for c in by_name if c.plan.home == "device" and c.plan.form == form} == remats
    assert forms("gemma2", "lora") == {""}  # two kinds, of which a loop would hold a turn
    assert forms("llama", "full") == {""}
    assert forms("llama", "lora", targets=("layers.0.q",)) == {""}  # a stack's layers have the same ones
    how: dict[str, Any] = {"memory": 10**12, "ram": None, "scanned": ("full",), **rows}
    found = tuning.variants(ARCH_8B, BF16, tuning.task("lora"), **how)
    there = {v.plan.remat: v.plan.form for v in found if v.plan.home == "device"}
    assert there == {"none": "", "dots": "", "full": "scan"}
    codes = dataclasses.replace(BF16, weights="nf4")
    chosen = plan_for(ARCH_8B, codes, card, memory=16 * 10**9, context=2048, task="lora").chosen
    assert chosen is not None
    assert (chosen.plan.home, chosen.plan.form, chosen.plan.remat) == ("device", "scan", "none")


@pytest.mark.parametrize("home", ["device", "host"])
def test_what_is_kept_is_not_computed_again(home: str) -> None:
    """Of the three passes of a layer that is run again one goes, of the products: forward, again, and back."""

    def seconds(remat: str) -> float:
        plan = dataclasses.replace(BF16, home=home, remat=remat)
        return tuning.seconds(ARCH_8B, plan, tuning.task("lora"), find("h200"), batch=1, context=2048)["matmuls"]

    assert seconds("dots") == pytest.approx(seconds("full") * 2 / 3)
    assert seconds("none") == pytest.approx(seconds("full") * (1 if home == "host" else 2 / 3))
    assert seconds("offload") == seconds("full")


@pytest.mark.parametrize(("family", "kept"), [("gemma2", 128 + 64), ("llama", 0)])
def test_what_gelu_made_is_counted_on_cards_that_keep_it(family: str, kept: int) -> None:
    """Bytes of a step's way back on an H200 beyond those on an RTX 4090: of all tokens the feed-forward block's width and the
    stream's. Which cards do was read from programs compiled for them (scripts/LOG.md)."""
    raw = json.loads((GOLDEN / family / "config.json").read_text()) | {"intermediate_size": 128, "hidden_size": 64}
    there, here = (
        {c.plan: c.need.device for c in plan_for(architecture(raw), BF16, find(n), **FEW, task="lora").candidates}
        for n in ("h200", "rtx4090")
    )
    same = [p for p in there if p in here and p.remat == "full" and p.home in ("device", "host")]
    assert len(same) >= 2
    assert {there[p] - here[p] for p in same} == {FEW["batch"] * FEW["context"] * 2 * kept}
    writes = {
        n
        for n in ("a100 80gb", "h100 pcie", "h200", "b200", "rtx3090", "rtx4090", "rtx5090")
        if tuning.keeps_gelu(find(n))
    }
    assert writes == {"a100 80gb", "h100 pcie", "h200", "b200"}


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
        ({"rank": 64}, "rank is 64, and task 'generate' trains nothing: leave it out, or say a task .* 'lora'"),
        ({"layers": 2}, "layers is 2, and task 'generate' trains nothing: .* such as 'lisa'"),
        ({"clip": 0.0}, "clip is 0.0, and task 'generate' trains nothing"),
        ({"compute": "float32"}, "task 'generate' computes in its dtype: leave it out"),
        (
            {"plan": Plan(dtype="bfloat16", remat="dots")},
            "remat is 'dots', and task 'generate' goes back through no layer",
        ),
        (
            {"task": "full", "rank": 8},
            "rank is 8, and task 'full' puts nothing beside a matrix: it goes with lora, dora",
        ),
        ({"task": "mezo", "targets": ["q"]}, "targets is .*q.*, and task 'mezo' puts nothing beside a matrix"),
        (
            {"task": "lora", "layers": 2},
            "layers is 2, and task 'lora' trains no layers in turn: it goes with lisa, badam",
        ),
        (
            {"task": "mezo", "optimizer": "lion"},
            "optimizer is 'lion', and task 'mezo' .*: say task 'full', or leave it out",
        ),
        ({"task": "lisa", "optimizer": "mezo"}, "train is 'lisa' and optimizer 'mezo', which trains lora, dora, all"),
        ({"task": "lora", "optimizer": "mezo", "tile": 512}, "tile is 512; bytes of optimizer 'mezo'"),
        ({"task": "mezo", "clip": 1.0}, "clip is 1.0, and 'mezo' makes no gradient"),
        (
            {"task": "mezo", "plan": Plan(dtype="bfloat16", remat="dots")},
            "remat is 'dots', and 'mezo' makes no gradient",
        ),
        ({"task": "hift", "plan": Plan(dtype="bfloat16", remat="dots")}, "say 'full' or 'offload'"),
        ({"task": "lora", "tile": 512, "plan": Plan(dtype="bfloat16", remat="dots")}, "tile is 512 and remat 'dots'"),
        ({"task": "lora", "optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"task": "lora", "compute": "float16"}, "it can be bfloat16 or float32; gradients in float16"),
        ({"task": "lora", "rank": 0}, "rank is 0; it is a whole number, at least 1"),
        ({"task": "lora", "accumulate": 0}, "accumulate is 0; it is a whole number, at least 1"),
        ({"task": "lora", "targets": ["query"]}, "'query' matches no matrix .* Nearest: "),
        ({"task": "badam", "layers": 33}, "layers is 33, and this llama has 32"),
        ({"task": Settings().task, "rank": 64}, "rank beside a Task, which says them itself"),
    ],
)
def test_what_is_not_done_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_for(ARCH_8B, given.pop("plan", BF16), find("rtx4090"), **given)


# ---------------------------------------------------------------------------------------------------------------------
# Options of a task

SAID: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 64, "optimizer": "adamw8bit", "ema": 0.99, "targets": ["q", "down"]}),
    ("dora", {"rank": 16, "optimizer": "lion", "accumulate": 2, "remat": "offload"}),
    ("lora", {"optimizer": "mezo", "accumulate": 2}),
    ("full", {"optimizer": "adafactor", "compute": "float32", "clip": 0.0}),
    ("full", {"optimizer": "lion", "ema": 0.9, "tile": 16, "loss_chunk": 8}),
    ("lisa", {"layers": 3, "optimizer": "sgd"}),
    ("hift", {"layers": 2, "optimizer": "muon", "remat": "offload"}),
    ("mezo", {"compute": "float32", "loss_chunk": 16}),
]


def as_words(said: dict[str, Any]) -> list[str]:
    """As they are typed."""
    found = []
    for name, value in said.items():
        if name == "targets":
            found += [word for target in value for word in ("--target", target)]
        else:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


@pytest.mark.parametrize(("task", "said"), SAID, ids=str)
@pytest.mark.parametrize("memory", ["64MB", "5.5MB"])
def test_a_run_counts_the_same_and_chooses_the_same(
    task: str, said: dict[str, Any], memory: str, tmp_path: Path
) -> None:
    """What `jaxengine finetune --memory` decides, and what `jaxengine plan --task` says beforehand, of the same words."""
    (data := tmp_path / "data.txt").write_text("x")
    train = {"full": "all", "mezo": "all"}.get(task, task)
    rows = ["--batch", "2", "--context", "64", "--memory", memory]
    words = ["--train", train, *as_words(said), *rows, *(["--optimizer", "mezo"] if task == "mezo" else [])]
    words += ["--learning-rate", "0.1"]
    given = finetune.make_context("finetune", ["demo", str(data), "--out", "x", *words]).params
    beside = {"folder", "data", "out", *KEPT}
    folder, chosen = jaxengine.demo_folder(), None
    with contextlib.suppress(ValueError):  # what needs least is over it
        chosen = chosen_plan(folder, {n: x for n, x in given.items() if n not in beside})
    typed = ["plan", folder, "--gpu", "4090", "--task", task, *as_words(said), *rows, "--json", "--no-compile"]
    shown = CliRunner().invoke(app, typed)
    outcome = plan_folder(folder, gpu="4090", memory=memory, task=task, batch=2, context=64, **said)
    found = json.loads(shown.output)
    assert found["candidates"] == json.loads(json.dumps(outcome.to_dict()))["candidates"]
    assert (found["task"], shown.exit_code) == (task, 1 if chosen is None else 0)
    assert {n: found[n] for n in said} == said
    assert (outcome.chosen is None) == (chosen is None)
    if outcome.chosen is None or chosen is None:
        return
    arch, plan, settings = chosen
    assert settings.task.said == {n: outcome.to_dict()[n] for n in settings.task.said}
    wanted = tuning.need(arch, plan, settings.task, batch=2, context=64)
    alike = ("home", "resident", "remat", "stay", "dtype")  # on a CPU layers are scanned that a card has written out
    same = {tuple(getattr(c.plan, n) for n in alike): c.need for c in outcome.candidates if c.plan.form != "ahead"}
    key = tuple(getattr(plan, n) for n in alike)
    assert (same[key].trained, same[key].optimizer) == (wanted.trained, wanted.optimizer)
    if plan.home != "device":
        assert same[key] == wanted
        assert tuple(getattr(outcome.chosen.plan, n) for n in alike) == key


def test_sizes_of_options() -> None:
    """Rank 64 is eight times rank 8 (peft: 20,971,520), and AdamW's two moments, Lion's one, bytes of the papers."""
    elements = 8 * 20_971_520

    def need(name: str, **said: Any) -> Any:
        return tuning.need(ARCH_8B, BF16, tuning.task(name, **said), batch=1, context=512)

    for optimizer, each in (("adamw", 8), ("lion", 4), ("adamw8bit", 2 * (1 + 4 / 256))):
        found = need("lora", rank=64, optimizer=optimizer)
        assert (found.trained, found.gradients) == (4 * elements, 4 * elements)
        assert found.optimizer == pytest.approx(each * elements, rel=1e-3)
    assert need("lora", rank=64, optimizer="mezo").optimizer == 0
    # q and v: 32 layers of (4096 + 4096) and (4096 + 1024) numbers a rank
    assert need("lora", rank=16, targets=["q", "v"]).trained == 4 * 16 * 32 * (8192 + 5120)
    layer = (8.03e9 - 2 * 128256 * 4096) / 32
    assert need("badam", layers=4).trained == pytest.approx(16 * layer, rel=1e-3)


def test_parts_make_a_step_of_more_tokens() -> None:
    card = find("rtx4090")
    for task in ("lora", "full", "lisa", "mezo"):
        one, two = (
            plan_for(ARCH_8B, BF16, card, context=512, task=task, accumulate=n).candidates[-1] for n in (None, 2)
        )
        assert two.tokens == 2 * one.tokens
        assert dict(two.seconds)["matmuls"] == pytest.approx(2 * dict(one.seconds)["matmuls"])


def test_what_would_fit_keeps_what_was_asked() -> None:
    asked: dict[str, Any] = {"memory": 3 * 10**9, "context": 4096, "task": "lora", "rank": 256}
    plan = dataclasses.replace(BF16, remat="full")
    found = plan_for(ARCH_8B, plan, find("rtx4090"), **asked)
    assert found.chosen is None
    assert found.changes
    for said, c in found.changes:
        assert c.need.trained == 4 * 32 * 20_971_520
        assert c.plan.remat == "full" or "remat as fits" in said
    # of the model's own parameters 8 bytes each go where 2 would do
    asked = {"memory": 24 * 10**9, "ram": 60 * 10**9, "context": 512, "task": "full", "tile": 64}
    found = plan_for(ARCH_8B, BF16, find("rtx4090"), **asked)
    assert found.chosen is None
    assert "optimizer adamw8bit" in {said for said, _ in found.changes}
    again = plan_for(ARCH_8B, BF16, find("rtx4090"), optimizer="adamw8bit", **asked)
    assert again.chosen is not None
    assert again.chosen.need == dict(found.changes)["optimizer adamw8bit"].need


def test_targets_that_differ_between_layers_are_of_layers_that_are_written_out() -> None:
    """As no step scans them: what cannot be is not chosen."""
    found = plan_for(ARCH_8B, BF16, find("rtx4090"), memory=6 * 10**9, context=512, task="lora", targets=["layers.3.q"])
    refused = {c.plan.home for c in found.candidates if c.refused == "layers that are scanned have the same targets"}
    assert refused >= {"host"}
    assert found.chosen is not None
    assert found.chosen.plan.home == "split"
    assert found.chosen.plan.resident > 3


def test_dora_beside_a_part_of_a_joined_matrix_is_refused() -> None:
    arch = architecture(json.loads((GOLDEN / "phi3" / "config.json").read_text()))
    with pytest.raises(ValueError, match="DoRA needs a magnitude for all of its outputs: target k, v too"):
        plan_for(arch, Plan(dtype="float32"), find("rtx4090"), context=16, task="dora", targets=["q"])


def test_options_as_they_are_typed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    words = ["plan", str(tmp_path), "--gpu", "4090", "--memory", "12GB", "--no-compile"]
    said = [
        "--task",
        "lora",
        "--rank",
        "64",
        "--target",
        "q",
        "--target",
        "v",
        "--optimizer",
        "lion",
        "--remat",
        "offload",
    ]
    shown = " ".join(CliRunner().invoke(app, [*words, *said, "--accumulate", "2"]).output.split())
    assert "1 x 2048 tokens of task lora (rank 64, targets q, v, optimizer lion, accumulate 2, remat offload)" in shown
    assert "a step of 4096 tokens" in shown
    assert "of task lora plan" in " ".join(CliRunner().invoke(app, [*words, "--task", "lora"]).output.split())
    found = json.loads(CliRunner().invoke(app, [*words, *said, "--json"]).output)
    asked = {
        "task": "lora",
        "rank": 64,
        "targets": ["q", "v"],
        "optimizer": "lion",
        "compute": "bfloat16",
        "remat": "offload",
    }
    assert {n: found[n] for n in asked} == asked
    assert {c["plan"]["remat"] for c in found["candidates"]} == {"offload"}
    # (4096 + 4096) and (4096 + 1024) numbers a layer and rank; of Lion one moment
    assert found["chosen"]["bytes"]["trained"] == found["chosen"]["bytes"]["optimizer"] == 4 * 64 * 32 * (8192 + 5120)
    for odd, why in (
        (["--rank", "8"], "rank is 8, and task 'generate' trains nothing"),
        (["--task", "full", "--dtype", "bfloat16"], "task 'full' keeps parameters in float32: leave it out"),
        (["--task", "lora", "--remat", "some"], "remat is 'some'; it can be none, full, dots, offload"),
    ):
        refused = CliRunner().invoke(app, [*words, *odd])
        assert (refused.exit_code, why in refused.output) == (2, True), refused.output


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_the_proof_is_of_these_options(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 8192, "num_hidden_layers": 3}))
    words = ["plan", str(tmp_path), "--gpu", "4090", "--task", "lora", "--json", "--batch", "2", "--context", "512"]
    words += ["--memory", "500MB", "--remat", "full"]
    plain, said = (
        json.loads(CliRunner().invoke(app, [*words, *more]).output)
        for more in ([], ["--rank", "32", "--optimizer", "lion", "--accumulate", "2"])
    )
    for found in (plain, said):
        [step] = found["compiled"]
        assert step["device"] == pytest.approx(found["chosen"]["bytes"]["device"], rel=0.05)
        assert step["problems"] == []
    assert said["compiled"][0]["device"] != plain["compiled"][0]["device"]


# ---------------------------------------------------------------------------------------------------------------------
# The compiled step


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
@pytest.mark.some_rows
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
    there: dict[str, Any] = {"wide": aot.CARDS[card].wide, "keeps_gelu": tuning.keeps_gelu(aot.CARDS[card])}
    need = tuning.need(arch, chosen, what, batch=batch, context=context, **there)
    assert aot.device_bytes(compiled) == pytest.approx(need.device, rel=0.05)
    if task != "hift":  # whose moments wait outside of the program
        assert aot.host_bytes(compiled) == pytest.approx(need.host, rel=0.05)
    memory = compiled.memory_analysis()
    # states and weights are changed where they stand; what waits for the way back, or to be used after it, is as counted
    assert memory.host_temp_size_in_bytes == pytest.approx(need.host_kept, rel=0.05)
    if task == "full":
        assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    # frozen layers never stand on the device beyond those that are resident and the one in use
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} <= {True}
    if jax.tree.leaves(plan) and "home" in plan:
        assert report.copies
    if task == "full" and plan.get("home") == "host":  # what was changed goes out while the next one's state comes in
        assert both_ways(report, compiled.as_text())


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_a_plan_that_is_proved_lets_the_heads_gradient_wait() -> None:
    """In host memory, while layers go back through; nothing else of a step stands there beside its arguments."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    arch = architecture(SMALL | wide | {"vocab_size": 65536, "num_hidden_layers": 3})
    plan, what = dataclasses.replace(F32, home="host", remat="full"), tuning.task("full")
    (proof,) = prove(arch, plan, find("rtx4090"), batch=1, length=256, task=what)
    assert proof.report.problems == ()
    assert proof.report.host is not None
    assert proof.report.host.temporaries == 4 * 65536 * 512


def test_an_adapter_to_start_from_says_its_rank_and_targets(tmp_path: Path) -> None:
    """As `jaxengine finetune --adapter` takes it; the folder is written here as PEFT does, not by a run."""
    raw = json.loads((Path(jaxengine.demo_folder()) / "config.json").read_text())
    shapes = {"q_proj": (raw["hidden_size"],) * 2, "down_proj": (raw["hidden_size"], raw["intermediate_size"])}
    arrays = {}
    for i in range(raw["num_hidden_layers"]):
        for name, (outs, ins) in shapes.items():
            of = f"base_model.model.model.layers.{i}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
            arrays[f"{of}.lora_A.weight"] = np.ones((4, ins), np.float32)
            arrays[f"{of}.lora_B.weight"] = np.zeros((outs, 4), np.float32)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(shapes), "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    about = {n: (x.dtype, x.shape) for n, x in arrays.items()}
    write_file(tmp_path / "adapter_model.safetensors", about, arrays.__getitem__)
    asked: dict[str, Any] = {"gpu": "4090", "context": 64}
    found = plan_folder(jaxengine.demo_folder(), task="lora", adapter=tmp_path, **asked)
    assert found.to_dict()["rank"] == 4
    assert set(found.to_dict()["targets"]) == {"q", "down"}
    assert found.chosen is not None
    assert found.chosen.need.trained == sum(x.nbytes for x in arrays.values())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"task": "dora"}, "task is 'dora', and the adapter in .* is of 'lora': say task='lora'"),
        ({}, "task is 'generate', and the adapter in .* is of 'lora'"),
        ({"task": "lora", "rank": 8}, "rank is 8, and that of the adapter .* is 4, .*: say rank=4"),
        ({"task": "lora", "targets": ["q"]}, "targets is .*'q'.*, and that of the adapter"),
    ]
    for given, said in wrong:
        with pytest.raises(ValueError, match=said):
            plan_folder(jaxengine.demo_folder(), adapter=tmp_path, **asked, **given)
