"""A budget of device memory: XLA's pool ends where it does, and on a GPU what was chosen by counting is held against what is
compiled before anything is placed.

What a GPU would do here stands in: the driver's answers, and the bytes that compiled programs take. That a card gives as much
is for tests/test_gpu.py; that the count and XLA's bytes agree, for the tests of planning.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
from oracles.golden import GOLDEN
from test_planning import BF16, LLAMA_3_8B, SMALL, outcome

import jaxengine
from jaxengine import command, loading, machine, placement, proof
from jaxengine.architecture import architecture
from jaxengine.finetune import command as tuning_command
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.command import KEPT, chosen_plan
from jaxengine.plan import Plan, choose, need, settled
from jaxengine.planning import PROMISED, traps
from pallas_kernels import aot
from pallas_kernels.cards import context_bytes, find
from sharding.mesh import make_mesh

ARCH = architecture(LLAMA_3_8B)
LLAMA = GOLDEN / "llama"

# ---------------------------------------------------------------------------------------------------------------------
# XLA's pool of a card's memory


GB = 10**9
SMALL_CARD, LARGE_CARD = (24 * GB, 23 * GB), (80 * GB, 79 * GB)


@pytest.mark.parametrize(
    ("environ", "memory", "cards", "share"),
    [
        ({}, None, (), 0.9),
        ({}, 8 * GB, (SMALL_CARD,), (8.4 * GB + 2**31) / (24 * GB)),
        ({}, 8 * GB, (LARGE_CARD, SMALL_CARD), (8.4 * GB + 2**31) / (24 * GB)),  # the smallest card holds it too
        ({}, 22 * GB, (SMALL_CARD,), 23 / 24),  # what a process can have
        ({}, 70 * GB, (LARGE_CARD, SMALL_CARD), 23 / 24),
        ({}, 8 * GB, (), None),  # of what is not known
        ({machine.SHARE: "0.5"}, 8 * GB, (SMALL_CARD,), 0.5),
        ({machine.OLD_SHARE: "0.5"}, None, (), None),
    ],
)
def test_the_pool_ends_where_a_budget_does(
    environ: dict[str, str], memory: int | None, cards: tuple[tuple[int, int], ...], share: float | None
) -> None:
    """And what compiling takes beside it; never beyond what a process can have, as XLA would step down from that by tenths."""
    before = dict(environ)
    assert machine.set_share(environ, memory, cards) == (environ != before)
    assert (machine.SHARE in environ) == (share is not None)
    if share is not None:
        assert share - 1e-4 < machine.pool_share(environ) <= share


def test_where_xlas_pool_ends_if_nobody_says() -> None:
    assert machine.pool_share({}) == 0.75  # GpuAllocatorConfig's memory_fraction
    assert machine.pool_share({machine.OLD_SHARE: "0.3"}) == 0.3
    assert machine.pool_share({machine.SHARE: "half"}) == 0.75


class Driver:
    """libcuda of two cards, of 24 and 80 GB; `fails`: the call that returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.asked = fails, -1

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            if name == "cuDeviceGetCount":
                given[0]._obj.value = 2
            if name == "cuDeviceGet":
                given[0]._obj.value = 10 + given[1]
            if name == "cuDeviceTotalMem_v2":
                given[0]._obj.value = {10: 24 * GB, 11: 80 * GB}[given[1].value]
            if name == "cuDeviceGetAttribute":
                given[0]._obj.value = {(16, 10): 128, (16, 11): 108}[given[1], given[2].value]
            return int(name == self.fails)

        return call


@pytest.mark.parametrize(
    "fails", ["", "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"]
)
def test_memory_of_each_card_by_its_driver(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(fails))
    assert machine.card_memories() == (() if fails else ((24 * GB, 128), (80 * GB, 108)))


def test_no_driver_no_cards() -> None:
    assert machine.card_memories("libnosuchdriver.so.1") == ()


@pytest.mark.parametrize("cards", [((24 * GB, 128),), ()])
@pytest.mark.parametrize("own", ["", "0.5"])
def test_what_we_start_has_a_pool_of_its_budget(
    cards: tuple[int, ...], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"XDG_CACHE_HOME": "/cache", **({machine.SHARE: own} if own else {})}
    monkeypatch.setattr(os, "environ", said)
    monkeypatch.setattr(command, "OURS", set())
    monkeypatch.setattr(machine, "card_memories", lambda: cards)
    command.within("8GB")
    assert said.get(machine.SHARE, "") == own  # a process that we did not start
    command.start_jax()
    assert said[machine.SHARE] == (own or "0.9000")
    command.within(None)
    assert said[machine.SHARE] == (own or "0.9000")
    command.within("8GB")
    assert said[machine.SHARE] == (own or ("0.4394" if cards else "0.9000"))  # (8.4e9 + 2**31) / 24e9
    command.within("23.9GB")  # more than a process can have beside its context
    most = (24 * GB - context_bytes(128)) / (24 * GB)
    assert float(said[machine.SHARE]) == pytest.approx(float(own or (0.9 if not cards else most)), abs=1e-4)


ASKED = """
import sys
from jax._src import xla_bridge  # whether a backend runs yet, which jax does not say outwardly
from jaxengine import command
def within(memory):
    print(memory, xla_bridge.backends_are_initialized())
    raise SystemExit(3)
command.within = within
command.app(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["generate", "finetune", "quantize"])
def test_the_pool_is_set_before_jax_starts(name: str) -> None:
    words = [
        name,
        str(LLAMA),
        __file__,
        *(["--out", "/no/such/folder"] if name == "quantize" else []),
        "--memory",
        "7GB",
    ]
    done = subprocess.run([sys.executable, "-c", ASKED, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (3, ["7GB", "False"]), done.stderr


def card(limit: int | None) -> Any:
    stats = None if limit is None else {"bytes_limit": limit}
    return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


def test_a_budget_above_the_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.SHARE, raising=False)
    monkeypatch.delenv(machine.OLD_SHARE, raising=False)
    pool = 18_900_000_000  # of 25.2 GB
    loading.check_pool(card(pool), pool)
    loading.check_pool(card(None), 2**50)  # an allocator that tells none
    with pytest.raises(
        ValueError, match=r"22 GB.*ends at 18\.9 GB: set XLA_CLIENT_MEM_FRACTION=0\.88 .*or give 18\.9GB"
    ):
        loading.check_pool(card(pool), 22 * 10**9)
    with pytest.raises(ValueError, match=r"ends at 18\.9 GB: give 18\.9GB or less"):
        loading.check_pool(card(pool), 26 * 10**9)
    loading.check_pool(jax.devices()[0], 2**50)  # no GPU


def test_plan_says_where_the_pool_ends() -> None:
    for memory, said in (("12GB", False), ("23GB", True)):
        found = outcome(memory=int(memory[:-2]) * 10**9, context=8192, batch=4)
        assert found.chosen is not None
        notes = [t for t in traps(found.architecture, found.chosen, found.card) if machine.SHARE in t]
        assert bool(notes) == said
        if notes:
            share = float(notes[0].partition(f"{machine.SHARE}=")[2][:4])
            assert share * found.card.reported >= found.chosen.need.device > 0.75 * found.card.reported
            assert (share - 0.01) * found.card.reported < found.chosen.need.device


# ---------------------------------------------------------------------------------------------------------------------
# What was counted, held against what is compiled


def taking(times: float, memory: int, tried: list[Plan], batch: int = 1, context: int = 2048) -> Any:
    """Programs that take so many times what is counted."""

    def compiled(plan: Plan) -> tuple[int, Sequence[str]]:
        tried.append(plan)
        device = int(times * need(ARCH, plan, batch=batch, context=context).device)
        return device, (f"{device} on the device",) if device > memory else ()

    return compiled


def test_what_takes_a_little_more_has_fewer_resident_layers() -> None:
    """Not another home, which would stream them all."""
    counted, tried = choose(ARCH, BF16, 8 * 10**9), list[Plan]()
    memory = need(ARCH, counted, batch=1, context=2048).device
    chosen = choose(ARCH, BF16, memory, compiled=taking(1.04, memory, tried))
    assert counted.home == chosen.home == "split"
    assert tried == [counted, chosen]
    assert 1.04 * need(ARCH, chosen, batch=1, context=2048).device <= memory
    more = dataclasses.replace(chosen, resident=chosen.resident + 1)  # the most that do
    assert 1.04 * need(ARCH, more, batch=1, context=2048).device > memory
    assert choose(ARCH, BF16, memory, compiled=taking(1.0, memory, [])) == counted


def test_what_never_holds_is_refused_with_what_was_compiled() -> None:
    memory, tried = 8 * 10**9, list[Plan]()

    def compiled(plan: Plan) -> tuple[int, Sequence[str]]:
        tried.append(plan)
        return 0, ("a slice at a wrong place",)

    with pytest.raises(
        ValueError, match=r"not when they are compiled: home 'split', \d+ resident: a slice at a wrong place"
    ):
        choose(ARCH, BF16, memory, compiled=compiled)
    assert len(tried) == len(set(tried)) == 4


def test_what_is_wrong_with_a_form_is_so_in_every_home() -> None:
    """Of layers that are fetched ahead without compute beside them the plain scan is tried next, with as many resident ones."""
    counted = choose(ARCH, BF16, 8 * GB, form="ahead")
    memory, tried = need(ARCH, counted, batch=1, context=2048).device, list[Plan]()

    def compiled(plan: Plan) -> tuple[int, Sequence[str]]:
        tried.append(plan)
        device = int(1.04 * need(ARCH, plan, batch=1, context=2048).device)
        wrong = ["over"] if device > memory else []
        return device, [*wrong, *(["nothing beside its copies"] if plan.form == "ahead" else [])]

    chosen = choose(ARCH, BF16, memory, form="ahead", compiled=compiled)
    assert [(p.home, p.form) for p in tried[:2]] == [("split", "ahead")] * 2
    assert (chosen.home, chosen.form) == ("split", "")
    full = dataclasses.replace(BF16, remat="full")
    found = outcome(
        plan=full, memory=9 * GB, task="lora", context=2048
    )  # whose streamed layers are worth fetching ahead
    assert found.chosen is not None
    assert found.chosen.plan.form == "ahead"
    left = found.refuted().candidates
    assert {c.plan.form for c in left if c.fits} == {""}
    assert {c.plan.form for c in found.refuted(10 * GB).candidates if c.fits} == {"", "ahead"}


def test_a_plan_that_is_refuted_by_bytes_is_followed_by_fewer_resident_layers() -> None:
    found = outcome(memory=8 * 10**9)
    assert found.chosen is not None
    found = outcome(memory=found.chosen.need.device)
    assert found.chosen is not None
    next_one = found.refuted(int(1.04 * found.chosen.need.device)).chosen
    assert next_one is not None
    same: dict[str, Any] = {"resident": 1}
    assert dataclasses.replace(next_one.plan, **same) == dataclasses.replace(found.chosen.plan, **same)
    assert 0 < found.chosen.plan.resident - next_one.plan.resident <= 3
    # as load chooses
    wrong = iter([(int(1.04 * found.chosen.need.device), ("over",)), (0, ())])
    assert (
        choose(ARCH, BF16, found.memory, form=found.chosen.plan.form, compiled=lambda plan: next(wrong))
        == next_one.plan
    )
    other = found.refuted().chosen  # for something else than bytes
    assert other is not None
    assert other.plan.resident in (0, found.chosen.plan.resident)


def test_a_step_of_fine_tuning_that_takes_more_has_fewer_resident_layers() -> None:
    how: Any = {"ram": None, "batch": 1, "context": 2048}
    what = tuning.task("lora")
    sized: Any = {"batch": 1, "context": 2048}
    plan = dataclasses.replace(BF16, remat="full")
    found = tuning.variants(ARCH, plan, what, memory=9 * 10**9, **how)
    memory = next(v for v in found if not v.refused).need.device

    def compiled(plan: Plan) -> tuple[int, Sequence[str]]:
        device = int(1.04 * tuning.need(ARCH, plan, what, **sized).device)
        return device, ("over",) if device > memory else ()

    def under(tight: int) -> Any:
        return tuning.variants(ARCH, plan, what, memory=tight, **how)

    first = next(v for v in under(memory) if not v.refused)
    chosen, refuted = settled(under(memory), under, compiled, memory)
    assert chosen is not None
    assert [v for v, _ in refuted] == [first]
    assert first.plan.home == chosen.plan.home == "split"
    assert (first.plan.remat, first.plan.form) == (chosen.plan.remat, chosen.plan.form)
    assert chosen.plan.resident < first.plan.resident


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_what_a_budget_chooses_takes_no_more_by_xlas_bytes() -> None:
    """Whose count is under XLA's, so that without compiling it would take more."""
    arch, rows = architecture(SMALL | {"num_hidden_layers": 8}), {"batch": 1, "length": 64}
    sized: Any = {"batch": 1, "context": 64}
    split = dataclasses.replace(BF16, home="split", resident=4)
    memory = need(arch, split, **sized).device + 100
    tried: list[tuple[Plan, int]] = []

    def compiled(plan: Plan) -> tuple[int, Sequence[str]]:
        proofs = proof.prove(arch, plan, find("rtx4090"), memory=memory, **rows)  # pyright: ignore[reportArgumentType]
        tried.append((plan, max(p.device for p in proofs)))
        return tried[-1][1], [x for p in proofs for x in p.report.problems]

    chosen = choose(arch, BF16, memory, batch=1, length=64, compiled=compiled)
    assert tried[-1][0] == chosen
    assert tried[-1][1] <= memory
    assert tried[0][1] > memory * (1 - PROMISED)
    assert all(device > memory for _, device in tried[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# In load and finetune, before anything is placed


def stand_in(monkeypatch: pytest.MonkeyPatch, module: Any, verdicts: list[tuple[int, tuple[str, ...]]]) -> list[Plan]:
    """This CPU as a GPU whose programs give these verdicts, one after the other."""
    tried: list[Plan] = []

    def holds(arch: Any, mesh: Any, **how: Any) -> Any:
        assert how["memory"] > 0

        def compiled(plan: Plan) -> tuple[int, tuple[str, ...]]:
            tried.append(plan)
            return verdicts[len(tried) - 1]

        return compiled

    monkeypatch.setattr(module, "holds", holds)
    return tried


def test_load_takes_the_next_plan_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = stand_in(monkeypatch, loading, [(0, ("wrong",)), (0, ())])
    model = jaxengine.load(LLAMA, memory="64MB", dtype="float32")
    assert len(tried) == 2
    assert model.plan == tried[1] != tried[0]


def test_load_places_nothing_where_none_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, loading, [(0, ("wrong",))] * 4)

    def place(*given: Any) -> Any:
        raise AssertionError("placed")

    monkeypatch.setattr(placement, "place", place)
    with pytest.raises(
        ValueError, match=r"memory='64MB' holds these plans by what is counted, .*: wrong\. Give more memory"
    ):
        jaxengine.load(LLAMA, memory="64MB", dtype="float32")


def test_finetune_takes_the_next_plan_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(LLAMA), __file__, "--memory", "64MB", "--dtype", "float32", "--context", "64", "--batch", "2"]
    params = tuning_command.finetune.make_context("finetune", words).params
    beside = ("folder", "data", "out", *KEPT)
    given = {n: x for n, x in params.items() if n not in beside}
    tried = stand_in(monkeypatch, proof, [(0, ("wrong",)), (0, ())])
    _, plan, settings = chosen_plan(str(LLAMA), given, proved=True)
    assert len(tried) == 2
    assert (plan.home, plan.remat) == (tried[1].home, tried[1].remat)
    assert settings.remat == plan.remat
    stand_in(monkeypatch, proof, [(0, ("wrong",))] * 4)
    with pytest.raises(
        ValueError, match=r"memory='64MB' holds these plans by what is counted, .*: wrong\. Give more memory"
    ):
        chosen_plan(str(LLAMA), given, proved=True)
    # of this process the pool is asked once; more memory, which another would have, is still what would fit
    pools: list[int] = []
    monkeypatch.setattr(loading, "check_pool", lambda device, memory: pools.append(memory))
    with pytest.raises(ValueError, match=r"Nearest: .*--memory"):
        chosen_plan(str(LLAMA), given | {"memory": "100kB"}, proved=True)
    assert pools == [100_000]


def test_programs_are_compiled_for_the_devices_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone, once for the same plan, sizes and code."""
    arch, mesh = architecture(json.loads((LLAMA / "config.json").read_text())), make_mesh(None)
    how: Any = {"batch": 2, "length": 64, "memory": 10**6, "folder": tmp_path}
    assert proof.holds(arch, mesh, **how) is None  # a CPU's
    gpu: Any = types.SimpleNamespace(platform="gpu", device_kind="A card", client=jax.devices()[0].client)
    card: Any = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[gpu]))
    compiled: list[int] = []

    def audit(program: Any, *, device_limit: int, **given: Any) -> Any:
        compiled.append(aot.device_bytes(program))
        return types.SimpleNamespace(problems=("over",) if compiled[-1] > device_limit else ())

    monkeypatch.setattr(proof, "audit", audit)
    monkeypatch.setattr(proof, "prove", lambda *a, here, prove=proof.prove, **k: prove(*a, here=mesh, **k))
    plan = Plan(dtype="float32")
    for memory, over in ((10**9, ()), (10**3, ("over", "over"))):
        holds = proof.holds(arch, card, **(how | {"memory": memory}))
        assert holds is not None
        found = holds(plan)
        assert found == (max(compiled), over)
        assert len(compiled) == 2
        assert holds(plan) == found  # from the file
        assert len(compiled) == 2
        holds(dataclasses.replace(plan, home="host"))
        assert len(compiled) == 4
        compiled.clear()
    monkeypatch.setattr(
        proof, "table_file", lambda kind: LLAMA / "config.json"
    )  # kernels are chosen by what was measured
    holds(plan)
    assert len(compiled) == 2
    compiled.clear()
    monkeypatch.setattr(proof, "_code", lambda: "other")
    holds = proof.holds(arch, card, **how)
    assert holds is not None
    holds(plan)
    assert len(compiled) == 2
    for file in tmp_path.iterdir():
        file.write_text("{")
    holds(plan)  # what cannot be read is made anew
    assert len(compiled) == 4
    how["memory"] = 10**6 + 1
    holds = proof.holds(arch, card, **how)
    assert holds is not None
    for error, said in (
        (proof.UntoldError("no bytes"), ()),
        (ValueError("a text that is not as it was"), ()),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory\nmore"), ("it does not compile: RESOURCE_EXHAUSTED: memory",)),
    ):  # fmt: skip
        count = len(list(tmp_path.iterdir()))
        monkeypatch.setattr(proof, "prove", mock.Mock(side_effect=error))
        assert holds(plan) == (0, said)
        assert len(list(tmp_path.iterdir())) == count  # nothing is kept of it
