"""What a plan says of cards and machines: those that multiply no bfloat16, traps, bytes of each tier, and a plan that is refuted
when it is compiled.

From outside: XLA's own bytes of the programs compiled for a T4; the defaults that openxla/xla has (a pool of 64 GiB, the
latency-hiding scheduler on for Hopper and the Blackwell of data centres alone, as its debug options say); AdamW's 8 bytes a
parameter (Rajbhandari et al., arXiv:1910.02054).
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.golden import GOLDEN
from test_planning import BF16, LLAMA_3_8B, SMALL, outcome

import jaxengine
from jaxengine import loading, machine, planning
from jaxengine.architecture import architecture
from jaxengine.command import app
from jaxengine.homes.base import check_platform
from jaxengine.plan import Plan, choose, need, parse_bytes
from jaxengine.planning import plan_for, traps
from pallas_kernels import aot
from pallas_kernels.cards import find

FULL = Plan(dtype="float32")
F16 = dataclasses.replace(BF16, dtype="float16")


# --- a card below sm_80 -------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    ("given", "batch", "context"),
    [
        ({"home": "host"}, 4, 512), ({"home": "host"}, 1, 512), ({}, 1, 2048),
        ({"home": "host", "weights": "int8", "chunk": 512, "kv_codec": "int8"}, 4, 2048),
        ({"home": "host", "weights": "nf4"}, 1, 512),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.some_rows
def test_bytes_on_a_t4(given: dict[str, Any], batch: int, context: int) -> None:
    """Products of float16 are written in float32 before they are narrowed; of one row nothing is widened."""
    from jaxengine.proof import prove

    arch, plan, card = architecture(SMALL), dataclasses.replace(F16, **given), find("t4")
    counted = need(arch, plan, batch=batch, context=context, wide=card.wide)
    prefill, decode = prove(arch, plan, card, batch=batch, length=context)
    assert prefill.device == pytest.approx(counted.device, rel=0.05)
    assert prefill.report.problems == decode.report.problems == ()
    assert decode.temporaries < 4 * 32000 * 2048 / 2  # half of the head in float32


@pytest.mark.parametrize(("task", "said"), [("generate", "--dtype float16"), ("full", "'full' computes in 'bfloat16'")])
def test_bfloat16_on_a_t4_is_refused(task: str, said: str) -> None:
    with pytest.raises(ValueError, match="a T4 does not multiply") as error:
        plan_for(architecture(SMALL), BF16, find("t4"), task=task)
    assert said in str(error.value)
    assert plan_for(architecture(SMALL), F16, find("t4")).chosen is not None


# --- traps --------------------------------------------------------------------------------------------------------------


def test_the_pool_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, unless more is asked for; gradients' states count, the buffers that a disk is read into do not."""
    monkeypatch.setattr(machine, "ram_limits", lambda: [("free", 2**50)])

    def pools(**given: Any) -> list[str]:
        found = outcome(**given)
        assert found.chosen is not None
        return [t for t in traps(found.architecture, found.chosen, found.card) if "pool stops at 64 GiB" in t]

    [full] = pools(card="h200", plan=FULL, task="full", memory=10**10)
    assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=" in full
    found = outcome("h200", plan=FULL, task="full", memory=10**10).chosen
    assert found is not None
    assert found.need.host_weights < 64 * 2**30 < found.need.pinned
    assert found.need.host_optimizer == pytest.approx(8 * 8.03e9, rel=0.06)  # but for what is of the device
    layer = 4 * (8.03e9 - 2 * 128256 * 4096) / 32
    assert found.need.host_weights == pytest.approx((32 - found.plan.resident) * layer, rel=0.001)
    assert pools(memory=8 * 10**9) == []
    disk = outcome(memory=8 * 10**9, ram=4 * 10**9).chosen
    assert disk is not None
    assert disk.need.host - disk.need.pinned == disk.need.host_buffers > 0


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ([("memory.max of the control group /job", 10**9), ("free", 10**10)], True),
        ([("free", 10**8), ("memory.max of the control group /job", 10**9)], True),
        ([("free", 10**8), ("memory.max of the control group /job", 10**12)], False),
        ([("free", 10**8)], False),
    ],
)
def test_a_control_group(limits: list[tuple[str, int]], said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ram_limits", lambda: limits)
    found = outcome(memory=8 * 10**9)
    assert found.chosen is not None
    notes = [t for t in traps(found.architecture, found.chosen, found.card) if "here host memory ends at" in t]
    assert notes == (["here host memory ends at 1 GB: memory.max of the control group /job"] if said else [])


@pytest.mark.parametrize(("card", "off"), [("4090", True), ("a100-80", True), ("h100", False), ("b200", False)])
def test_the_scheduler_that_is_off(card: str, off: bool) -> None:
    found = outcome(card, memory=8 * 10**9)
    assert found.chosen is not None
    notes = [t for t in traps(found.architecture, found.chosen, found.card) if "off by default on this card" in t]
    assert bool(notes) == off
    near = outcome("h200")
    assert near.chosen is not None
    assert not any("scheduler" in t for t in traps(near.architecture, near.chosen, near.card))  # nothing is streamed


def test_temporaries_are_one_block() -> None:
    large, small = (outcome("h200", batch=batch, context=8192) for batch in (32, 1))
    notes = []
    for found in (large, small):
        assert found.chosen is not None
        said = traps(found.architecture, found.chosen, found.card)
        notes.append([t for t in said if "must be free in one piece" in t])
        assert bool(notes[-1]) == (found.chosen.need.activations > found.chosen.need.device / 10)
    assert (len(notes[0]), len(notes[1])) == (1, 0)


@pytest.mark.parametrize(
    ("card", "task", "given", "noted"),
    [
        ("t4", "lora", {"dtype": "float16", "remat": "full"}, False),
        ("t4", "lora", {"dtype": "float16", "remat": "dots"}, True),
        ("t4", "dora", {"dtype": "float16"}, True),
        ("t4", "full", {"dtype": "float32"}, False),
        ("t4", "lisa", {"dtype": "float16"}, True),
        ("t4", "generate", {"dtype": "float16"}, False),
        ("4090", "lora", {"attention": "xla"}, False),
        ("4090", "lisa", {"attention": "xla"}, True),
        ("4090", "lisa", {}, False),
        ("4090", "full", {"attention": "xla", "dtype": "float32"}, False),
        ("4090", "mezo", {"attention": "xla"}, False),
    ],
    ids=str,
)
def test_steps_that_are_not_counted_closely(card: str, task: str, given: dict[str, Any], noted: bool) -> None:
    """Those whose rows tests/test_finetune_bytes.py does not hold to 5 %; float32 arithmetic is not of 16 bits."""
    compute: dict[str, Any] = {"compute": "float32"} if card == "t4" and task != "generate" else {}
    plan = dataclasses.replace(BF16, **given)
    found = plan_for(architecture(SMALL), plan, find(card), memory=10 * 10**9, task=task, **compute)
    assert found.chosen is not None
    said = traps(found.architecture, found.chosen, found.card, found.task)
    assert any("not counted closely" in t for t in said) == noted


@pytest.mark.parametrize(
    ("raw", "mesh", "given", "noted"),
    [
        (SMALL, "fsdp=4", {}, True),
        (LLAMA_3_8B, "fsdp=4", {}, False),  # half a layer is little beside the rest
        (SMALL, "tensor=4", {}, False),
        (SMALL, "fsdp=4", {"home": "host"}, False),
        (SMALL, "fsdp=4", {"task": "lora"}, False),
    ],
    ids=["small", "8B", "tensor", "streamed", "trained"],
)
def test_layers_that_cards_without_fast_links_bring_together(
    raw: dict[str, Any], mesh: str, given: dict[str, Any], noted: bool
) -> None:
    """tests/test_planning.py has the row that XLA takes 0.91 times of what is counted for."""
    plan = dataclasses.replace(BF16, mesh=mesh, sharding=mesh.partition("=")[0])
    asked: dict[str, Any] = {"batch": 4, "context": 512, "memory": 20 * 10**9} | given
    where = asked.pop("home", "device")
    found = plan_for(architecture(raw), plan, find("4090"), **asked)
    assert found.chosen is not None
    candidate = dataclasses.replace(found.chosen, plan=dataclasses.replace(found.chosen.plan, home=where))
    said = traps(found.architecture, candidate, found.card, found.task)
    assert any("one and a half" in t for t in said) == noted


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        ({"context": 1024}, True),
        ({"context": 1024, "accumulate": 4}, True),
        ({"context": 256, "batch": 4, "task": "dora"}, True),
        ({"context": 512}, False),
        ({"context": 1024, "batch": 2}, False),
        ({"context": 1024, "memory": 20 * 10**9}, False),
        ({"context": 1024, "task": "mezo"}, False),
    ],
    ids=str,
)
def test_steps_of_about_a_thousand_tokens(given: dict[str, Any], noted: bool) -> None:
    """Beside streamed layers; XLA has 266 MB for 288 of SMALL's, and at half and at twice as many tokens what is counted."""
    asked: dict[str, Any] = {"memory": 5 * 10**9, "task": "lora", "remat": "full"} | given
    plan = dataclasses.replace(BF16, home="host", remat=asked.pop("remat"))
    found = plan_for(architecture(LLAMA_3_8B), plan, find("4090"), **asked)
    assert found.chosen is not None
    said = traps(found.architecture, found.chosen, found.card, found.task)
    assert any("about a thousand tokens" in t for t in said) == noted


@pytest.mark.parametrize(
    ("family", "memory", "task", "accumulate", "noted"),
    [
        ("gemma2", 8, "full", 2, True),
        ("gemma2", 8, "full", 1, False),
        ("gemma2", 6, "lisa", 2, False),
        ("gemma2", 2, "mezo", 2, False),
        ("llama", 8, "full", 2, False),
    ],
)
def test_steps_through_layers_that_alternate_from_host_memory(
    family: str, memory: int, task: str, accumulate: int, noted: bool
) -> None:
    """Of two kinds in turn, every parameter's gradients added up; not where tests/test_finetune_bytes.py has rows."""
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    large = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 26, "num_attention_heads": 16,
             "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096}  # fmt: skip
    if family == "gemma2":
        large |= {"layer_types": ["sliding_attention", "full_attention"] * 13}
    plan = dataclasses.replace(BF16, dtype="float32") if task == "full" else BF16
    given: dict[str, Any] = {"memory": memory * 10**9, "task": task, "context": 512, "accumulate": accumulate}
    found = plan_for(architecture(raw | large), plan, find("4090"), **given)
    assert found.chosen is not None
    said = traps(found.architecture, found.chosen, found.card, found.task)
    assert any(p.repeats > 1 and p.home == "host" for p in found.chosen.plan.parts(found.architecture))
    assert any("layers that alternate" in t for t in said) == noted


# --- what is shown ------------------------------------------------------------------------------------------------------


def test_bytes_of_each_tier_are_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    words = ["plan", str(tmp_path), "--gpu", "h200", "--memory", "22GB", "--task", "full", "--no-compile"]
    shown = CliRunner().invoke(app, words).output.replace("\n", " ")
    assert "in host memory: " in shown
    assert "GB weights, " in shown
    assert "optimizer state" in shown.partition("in host memory: ")[2]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["chosen"]["bytes"]
    parts = ("host_weights", "host_optimizer", "host_kept", "host_buffers")
    assert found["host"] == sum(found[p] for p in parts) > 0
    assert " a second, " in CliRunner().invoke(app, ["plan", str(tmp_path), "--gpu", "h200", "--no-compile"]).output


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_plan_that_compiling_refutes(all_of_them: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next that fits is taken and proved, and it is said what was wrong with the first."""
    from jaxengine import proof

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    tried: list[Plan] = []

    def prove(arch: Any, plan: Plan, card: Any, *, batch: int, length: int, **how: Any) -> Any:
        tried.append(plan)
        problems = ("11.3 GB on the device, over the plan's 8 GB",) if all_of_them or len(tried) == 1 else ()
        report: Any = type("Report", (), {"problems": problems})()
        device = int(1.08 * need(arch, plan, batch=batch, context=length).device)
        return (proof.Proof("prefill", device, 0, 0, 0.0, report),)

    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr(aot, "missing", lambda: None)
    words = ["plan", str(tmp_path), "--gpu", "4090", "--memory", "8GB"]
    shown = CliRunner().invoke(app, words)
    said = " ".join(shown.output.split())
    assert len(tried) == (4 if all_of_them else 2)
    assert len(set(tried)) == len(tried)
    assert shown.exit_code == (1 if all_of_them else 0)
    found = outcome(memory=8 * 10**9)
    assert found.chosen is not None
    easier = found.refuted(int(1.08 * found.chosen.need.device)).chosen  # with fewer resident layers
    assert easier is not None
    assert f"chosen: {found.chosen.label() if all_of_them else easier.label()}" in said
    assert all(p.home == "split" for p in tried[:2])
    assert tried[1].resident < tried[0].resident
    assert "11.3 GB on the device, over the plan's 8 GB" in said
    assert "7.4 % under XLA's, which is more than the 5 %" in said  # 1 / 1.08
    if not all_of_them:
        assert f"refuted by compiling: {found.chosen.label()}: 11.3 GB" in said


@pytest.mark.parametrize(("times", "agrees"), [(1.04, True), (1.06, False), (0.96, True), (0.94, False)])
def test_whether_arithmetic_and_xla_agree_is_in_the_json(
    times: float, agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 % of XLA's bytes, as the text says it."""
    from jaxengine import proof

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    words = ["plan", str(tmp_path), "--gpu", "4090", "--memory", "8GB"]
    counted = outcome(memory=8 * 10**9).chosen
    assert counted is not None
    compiled = int(counted.need.device / times)

    def prove(*_: Any, **__: Any) -> Any:
        report: Any = type("Report", (), {"problems": ()})()
        return (proof.Proof("prefill", compiled, 0, 0, 0.0, report), proof.Proof("decode", 10**9, 0, 0, 0.0, report))

    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr(aot, "missing", lambda: None)
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["agreement"]
    assert found["agrees"] == agrees
    assert (found["arithmetic"], found["compiled"]) == (counted.need.device, compiled)
    assert found["off"] == pytest.approx(times - 1, abs=1e-6)
    assert ("more than the 5 %" in CliRunner().invoke(app, words).output.replace("\n", " ")) != agrees
    assert json.loads(CliRunner().invoke(app, [*words, "--no-compile", "--json"]).output)["agreement"] is None


def test_a_context_beyond_the_model_is_refused_by_load_as_by_plan() -> None:
    folder = jaxengine.demo_folder()
    most = json.loads((Path(folder) / "config.json").read_text())["max_position_embeddings"]
    said = f"batch 1 and context {most + 1}; they are at least 1, and this model's context at most {most}"
    with pytest.raises(ValueError, match=said):
        jaxengine.load(folder, memory="1GB", context=most + 1)
    with pytest.raises(ValueError, match=said):
        planning.plan_folder(folder, gpu="4090", context=most + 1)


def test_changes_that_contradict_each_other_are_no_pair() -> None:
    found = outcome(memory=4 * 10**9, ram=6 * 10**9, task="lora")
    assert found.chosen is None
    assert found.changes
    assert not any("weights int8 and weights int4" in said for said, _ in found.changes)


def test_only_what_would_fit_is_advised() -> None:
    """`load(memory=)`: each change by itself makes it fit, and one that is made already is not named."""
    arch = architecture(LLAMA_3_8B)
    with pytest.raises(ValueError, match=r"Nearest: weights='int8', kv='int8', batch=.*, context=") as error:
        choose(arch, BF16, 5 * 10**9, batch=8, length=2048)
    given: list[dict[str, Any]] = [{"weights": "int8"}, {"kv_codec": "int8"}]
    for one in given:
        choose(arch, dataclasses.replace(BF16, **one), 5 * 10**9, batch=8, length=2048)
    words = str(error.value)
    rows, length = (int(words.partition(f" {said}=")[2].partition(",")[0]) for said in ("batch", "context"))
    choose(arch, BF16, 5 * 10**9, batch=rows, length=2048)
    choose(arch, BF16, 5 * 10**9, batch=8, length=length)
    coded = dataclasses.replace(BF16, weights="int4", kv_codec="int8")
    with pytest.raises(
        ValueError, match=r"Nearest: memory=.* \(no single one of weights, kv, batch and context is enough\)"
    ):
        choose(arch, coded, 200_000)


@pytest.mark.parametrize("ram", [None, 4 * 10**9, 10**9])
def test_the_memory_that_a_refusal_names_is_enough(ram: int | None) -> None:
    """Of both kinds where both are short; what is said is rounded up."""
    arch = architecture(LLAMA_3_8B)
    with pytest.raises(ValueError, match=r" short\. Nearest: ") as error:
        choose(arch, BF16, 2 * 10**9, ram=ram)
    named = dict(re.findall(r"(memory|ram)='([0-9.]+[GM]B)'", str(error.value).rpartition(", or ")[2]))
    assert ("ram" in named) == ("of host memory short" in str(error.value)) == (ram == 10**9)
    more = ram if "ram" not in named else parse_bytes(named["ram"])
    assert choose(arch, BF16, named["memory"], ram=more).home in ("host", "disk", "split")


def test_a_size_is_no_boolean() -> None:
    with pytest.raises(ValueError, match="memory is True; it is bytes"):
        parse_bytes(True)


def test_the_form_that_is_loaded_is_the_form_that_is_planned() -> None:
    arch, card = architecture(LLAMA_3_8B), find("4090")
    found = outcome(memory=18 * 10**9, batch=768, context=64).chosen
    assert found is not None
    form = planning.streamed_form(arch, BF16, card, 768)
    assert form == found.plan.form == "ahead"
    assert choose(arch, BF16, 18 * 10**9, batch=768, length=64, form=form) == found.plan


# --- what a machine cannot do -------------------------------------------------------------------------------------------


def test_loading_with_a_jax_that_streams_wrongly_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the test on the card, and before anything is read."""
    monkeypatch.setattr(loading, "check_platform", lambda name, platform: check_platform(name, "gpu", (0, 11, 0)))
    monkeypatch.setattr(loading, "available_ram", lambda: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=r"home=.host. on a GPU needs jax 0\.11\.1 or newer, and this is 0\.11\.0"):
        jaxengine.load(jaxengine.demo_folder(), home="host")


CONVERTED = """
import resource, signal, sys
from jaxengine import command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the system ends the process
resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
sys.argv = ["jaxengine", "convert", "demo", *sys.argv[1:]]
command.main()
"""


@pytest.mark.parametrize("words", [["hf"], ["orbax"], ["compressed-tensors", "--weights", "int8"]], ids=lambda w: w[0])
def test_converting_where_there_is_no_room(words: list[str], tmp_path: Path) -> None:
    """A limit on files stands for a full disk: one line, and nothing is left."""
    command = [sys.executable, "-c", CONVERTED, str(tmp_path / "out"), "--to", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == f"error: {tmp_path / 'out'}: File too large; nothing of it was left"
    assert list(tmp_path.iterdir()) == []
