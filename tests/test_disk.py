"""Layers that a program cannot reach: the walk driven from Python, and the home that reads them from disk.

That every family gives what resident layers give is in tests/test_homes.py; here: order, what is held, what is written to
disk and found again, what is chosen under limits of memory, and what happens when files are damaged or space runs out.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from oracles.golden import GOLDEN, golden

import jaxengine
from checkpoints.errors import CheckpointError
from jaxengine import engine as inside
from jaxengine import loading, outside, placement
from jaxengine import walk as walking
from jaxengine.command import app
from jaxengine.homes.base import Bank
from jaxengine.loading import from_arrays
from jaxengine.packing import stores as stored
from jaxengine.plan import RING, Plan, choose, layer_bytes, need, show_bytes
from jaxengine.walk import drive

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
ROOT = Path(__file__).parent.parent


def copied(tmp_path: Path, case: str = "gemma2") -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def load(folder: Path, tmp_path: Path, **given: Any) -> jaxengine.Model:
    given = {"dtype": "float32", "home": "disk"} | given
    return jaxengine.load(folder, **given, **({"disk": tmp_path / "disk"} if given["home"] == "disk" else {}))


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "disk").iterdir())


# --- the walk driven from Python --------------------------------------------------------------------------------------


class Weight:
    """What a layer's weights are here: a thing that can be seen to be gone."""

    def __init__(self, value: int):
        self.value = value


class Started:
    """The outcome of a program that was started: it holds what it computes with until it is waited for."""

    def __init__(self, said: tuple[str, ...], before: Started | None, weights: Weight | None):
        self.said, self._held = said, (before, weights)

    def block_until_ready(self) -> Started:
        if self._held[0] is not None:
            self._held[0].block_until_ready()
        self._held = (None, None)
        return self


def test_a_driven_walk_holds_two_layers_and_keeps_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Weight]] = []
    counts: list[int] = []

    def stream(bank: Bank) -> Iterator[Weight]:
        for i in range(len(bank.kinds) * bank.repeats):
            made = Weight(10 * len(bank.kinds) + i)
            alive.append(weakref.ref(made))
            counts.append(sum(w() is not None for w in alive))
            yield made
            del made

    monkeypatch.setattr(walking, "home", lambda name: SimpleNamespace(stream=stream))
    banks = [Bank((), ("a",), 5, "disk", "python"), Bank((), ("b", "c"), 2, "disk", "python")]

    def run(kind: Any, weights: Weight, carry: Started, state: int) -> tuple[Started, str]:
        return Started((*carry.said, f"{kind}{weights.value}"), carry, weights), f"{kind}{state}"

    last, states = drive(run, Started((), None, None), banks, [(0, 1, 2, 3, 4), (5, 6, 7, 8)])
    assert last.said == ("a10", "a11", "a12", "a13", "a14", "b20", "c21", "b22", "c23")
    assert states == (("a0", "a1", "a2", "a3", "a4"), ("b5", "c6", "b7", "c8"))
    assert counts == [1, *[2] * 8]  # each is brought while the one before it is computed, and no earlier


def test_the_next_calls_compile_nothing(tmp_path: Path) -> None:
    model = load(GOLDEN / "gemma2", tmp_path)
    model.generate([IDS], max_new_tokens=3, stop_ids=())
    programs = [p.on("cpu") for p in (outside.enter, outside.layer, outside.first_tokens, outside.next_tokens)]
    before = [p._cache_size() for p in programs]
    model.generate([IDS[:5]], max_new_tokens=9, stop_ids=())
    assert [p._cache_size() for p in programs] == before


def test_what_is_read_is_counted_and_a_closed_model_says_so(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    with load(GOLDEN / "llama", tmp_path) as model:
        sizes = layer_bytes(model.architecture, model.plan)
        before = model.disk_stats
        assert before is not None
        model.logits(IDS)
        after = model.disk_stats
        assert after is not None
        assert after.layers - before.layers == len(sizes)
        assert after.bytes_read >= sum(sizes)
        assert after.bytes_read % 4096 == 0  # whole pages of each layer, and what is read ahead for the next pass
        assert after.read_seconds > 0
        assert 0 <= after.waits <= after.layers
        assert (after.wait_seconds > 0) == (after.waits > 0)
        assert f"{show_bytes(sum(sizes))} read from disk in a pass" in repr(model)
        threads = [t for t in threading.enumerate() if t not in others and t.name.startswith("packed-")]
        assert threads
    assert not any(t.is_alive() for t in threads)
    calls = (lambda: model.logits(IDS), lambda: model.generate([IDS]))
    for call in calls:
        with pytest.raises(ValueError, match="closed: load it again"):
            call()
    assert model.disk_stats is not None
    assert model.disk_stats.layers == after.layers
    model.close()
    with jaxengine.load(GOLDEN / "llama", dtype="float32") as resident:
        assert resident.disk_stats is None


def test_the_command_says_what_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["generate", "demo", "a", "--home", "disk", "--disk", str(tmp_path), "--max-new-tokens", "2"]
    with caplog.at_level(logging.INFO, logger="jaxengine"):
        assert CliRunner().invoke(app, words).exit_code == 0
    said = [r.message for r in caplog.records if "read from disk" in r.message]
    assert len(said) == 1
    raw = json.loads((Path(jaxengine.demo_folder()) / "config.json").read_text())
    assert re.search(
        rf"; {2 * raw['num_hidden_layers']} layers taken, of which \d+ were waited for, [\d.e-]+ s in all", said[0]
    )


def test_a_trace_names_fetch_and_layer(tmp_path: Path) -> None:
    """In compiled programs every operation, and outside of them the time on the host's side."""
    for form in ("scan", "ahead"):
        plan = Plan(dtype="float32", home="host", form=form)
        held = jaxengine.load(GOLDEN / "gemma2", plan=plan)
        tokens, lengths = np.zeros((1, 8), np.int32), np.full(1, 8, np.int32)
        traced = jax.make_jaxpr(functools.partial(inside.score.function, held.engine))(held.params, tokens, lengths)
        text = traced.pretty_print(name_stack=True, use_color=False)
        assert re.search(r"device_put.*fetch|fetch.*device_put", text), form
        assert re.search(r"tanh.*layer|layer.*tanh", text), form
    disk = load(GOLDEN / "gemma2", tmp_path)
    disk.logits(IDS)
    with jax.profiler.trace(tmp_path / "trace"):
        disk.logits(IDS)
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(trace))
    names = {event.name for plane in found.planes for line in plane.lines for event in line.events}
    assert names >= {"fetch", "layer", "wait for the disk", "copy to the device"}


@pytest.mark.parametrize(
    "place", [{"home": "disk"}, {"home": "host", "form": "python"}, {"home": "disk", "kept": 1, "resident": 1}]
)
@pytest.mark.some_rows
def test_over_a_mesh(place: dict[str, Any], tmp_path: Path) -> None:
    prompts, data = golden("gemma2")
    whole = Plan(rules=(("vocab", None),))  # 103 tokens
    model = load(GOLDEN / "gemma2", tmp_path, plan=whole, **place, mesh="data=4,tensor=2", sharding="tensor")
    found = [c.tokens for c in model.generate(prompts, max_new_tokens=16, stop_ids=())]
    assert found == [data[f"generated_{i}"].tolist() for i in range(len(prompts))]
    layer = next(iter(model.params["banks"][-1].source.stream())) if place["home"] == "disk" else None
    if layer is not None:
        assert layer["gate"].sharding.spec == jax.sharding.PartitionSpec("tensor")


def test_samples_penalties_and_logprobs(tmp_path: Path) -> None:
    """What comes after the layers is the same program text; what goes into it must be too."""
    prompts, _ = golden("llama")
    asked: dict[str, Any] = {"max_new_tokens": 6, "n": 3, "temperature": 0.7, "top_k": 9, "seed": 5, "logprobs": 2,
                             "repetition_penalty": 1.2, "stop_ids": (7,)}  # fmt: skip
    wanted = jaxengine.load(GOLDEN / "llama", dtype="float32").generate(prompts, **asked)
    found = load(GOLDEN / "llama", tmp_path).generate(prompts, **asked)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=4e-4, rtol=0)


# --- the store ----------------------------------------------------------------------------------------------------


def test_a_store_is_written_once_and_made_anew_when_its_checkpoint_changes(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    wanted = load(folder, tmp_path).logits(IDS)
    (store,) = stores(tmp_path)
    written = store.stat().st_mtime_ns
    # another budget's division of the layers reads the same store
    np.testing.assert_allclose(load(folder, tmp_path, resident=1, kept=2).logits(IDS), wanted, atol=1e-5)
    assert stores(tmp_path) == [store]
    assert store.stat().st_mtime_ns == written
    load(folder, tmp_path, weights="int8")
    assert len(stores(tmp_path)) == 2
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    np.testing.assert_array_equal(load(folder, tmp_path).logits(IDS), wanted)
    assert len(stores(tmp_path)) == 3


def test_a_damaged_index_is_written_anew_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied(tmp_path)
    wanted = load(folder, tmp_path).logits(IDS)
    (store,) = stores(tmp_path)
    store.write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load(folder, tmp_path).logits(IDS), wanted)
    assert str(store) in caplog.text
    assert "written anew" in caplog.text


def test_stores_of_other_formats_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(GOLDEN / "llama", tmp_path)
    (store,) = stores(tmp_path)
    load(GOLDEN / "gemma2", tmp_path)
    with caplog.at_level(logging.INFO, logger="jaxengine"):
        load(GOLDEN / "llama", tmp_path, weights="int8")
    (said,) = [r.message for r in caplog.records if "other packed layers" in r.message]
    assert said.endswith(f"not needed: {store}")


def test_a_damaged_layer_is_named_and_a_mended_one_read_again(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    wanted = load(folder, tmp_path).logits(IDS)
    (store,) = stores(tmp_path)
    good = store.read_bytes()
    bad = bytearray(good)
    bad[-2000] ^= 1  # in the last layer's last array
    model = load(folder, tmp_path)
    store.write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"layer 3 is damaged"):
        model.logits(IDS)
    store.write_bytes(good)
    np.testing.assert_array_equal(model.logits(IDS), wanted)


def test_a_store_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    model = load(copied(tmp_path), tmp_path)
    wanted = model.logits(IDS)
    (store,) = stores(tmp_path)
    good = store.read_bytes()
    os.truncate(store, len(good) // 2)
    with pytest.raises(CheckpointError, match=r"layer \d is cut off: the file became shorter"):
        model.generate([IDS], max_new_tokens=2 + RING, stop_ids=())  # those read ahead already are good
    store.write_bytes(good)
    np.testing.assert_array_equal(model.logits(IDS), wanted)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda p: SimpleNamespace(f_bavail=3, f_frsize=real(p).f_frsize))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes and its disk has \d+ free: \d+ too few"):
        load(GOLDEN / "gemma2", tmp_path)
    assert stores(tmp_path) == []


def test_what_was_interrupted_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(GOLDEN / "gemma2", tmp_path)
    wanted = model.generate([IDS], max_new_tokens=4, stop_ids=())[0].tokens
    layers, taken = model.params["banks"][-1].source.layers, 0
    real = layers.take

    def take(i: int) -> Any:
        nonlocal taken
        taken += 1
        if taken == 7:
            raise KeyboardInterrupt
        return real(i)

    monkeypatch.setattr(layers, "take", take)
    with pytest.raises(KeyboardInterrupt):
        model.generate([IDS], max_new_tokens=4, stop_ids=())
    assert model.generate([IDS], max_new_tokens=4, stop_ids=())[0].tokens == wanted


@pytest.mark.parametrize("weights", ["dense", "int8"])
def test_saved_from_disk(weights: str, tmp_path: Path) -> None:
    """What is read back from a store is what was put there: a dense model goes out byte for byte as it came in."""
    model = load(GOLDEN / "llama", tmp_path, weights=weights)
    model.save(tmp_path / "saved", format="hf" if weights == "dense" else "orbax")
    if weights == "dense":
        for file in GOLDEN.glob("llama/*.safetensors"):
            assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    again = jaxengine.load(tmp_path / "saved", dtype="float32")
    resident = jaxengine.load(GOLDEN / "llama", dtype="float32", weights=weights)
    np.testing.assert_array_equal(again.logits(IDS), resident.logits(IDS))


def test_arrays_in_memory_have_no_store() -> None:
    model = jaxengine.load(GOLDEN / "llama", dtype="float32")
    arrays = {n: np.zeros(s.shape, np.float32) for n, s in model.architecture.specs().items()}
    with pytest.raises(
        ValueError, match=r"home='disk' reads layers from a store .* use jaxengine.load, or home='host'"
    ):
        from_arrays(model.architecture, Plan(dtype="float32", home="disk"), arrays)


# --- packing that is interrupted, by several at once, and what is old ----------------------------------------------

PACKING = """
    import os, signal, sys, time
    from pathlib import Path
    import jaxengine
    how, wait = sys.argv[3], Path(sys.argv[2]).with_name("go")

    def progress(name, done, total):
        if not name.startswith("layers.2."):
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if how == "wait":
            wait.with_name("waits").touch()
            while not wait.exists():
                time.sleep(0.01)

    model = jaxengine.load(sys.argv[1], dtype="float32", home="disk", disk=sys.argv[2], progress=progress)
    print(model.logits([3, 1, 4]).sum())
    sys.stdin.read()
"""


def packing(folder: Path, tmp_path: Path, how: str) -> subprocess.Popen[str]:
    words = [folder, tmp_path / "disk", how]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PACKING), *map(str, words)], text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.usefixtures("ctrl_c")
def test_packing_goes_on_after_an_interrupt(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path)
    ended = packing(folder, tmp_path, how)
    said = ended.communicate("", timeout=120)[1]
    assert ended.returncode == (-signal.SIGKILL if how == "kill" else -signal.SIGINT), said
    (left,) = stores(tmp_path)
    assert left.name.endswith(".layers.partial")
    encoded: list[str] = []
    real = placement._encoded

    def count(plan: Plan, name: str, *given: Any) -> Any:
        encoded.append(name)
        return real(plan, name, *given)

    monkeypatch.setattr(placement, "_encoded", count)
    told: list[int] = []
    model = load(folder, tmp_path, progress=lambda name, done, total: told.append(done))
    assert {n.split(".")[1] for n in encoded if n.startswith("layers.")} == {"2", "3"}
    assert told[0] > 0
    (store,) = stores(tmp_path)
    assert store.suffix == ".layers"
    # as one that nothing happened to, and as resident layers
    whole = jaxengine.load(folder, dtype="float32", home="disk", disk=tmp_path / "whole")
    assert store.read_bytes() == next((tmp_path / "whole").iterdir()).read_bytes()
    np.testing.assert_array_equal(model.logits(IDS), whole.logits(IDS))


def test_what_was_left_of_a_checkpoint_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    killed = packing(folder, tmp_path, "kill")
    said = killed.communicate("", timeout=120)[1]
    assert killed.returncode == -signal.SIGKILL, said
    (left,) = stores(tmp_path)
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    found = load(folder, tmp_path).logits(IDS)
    store = next(p for p in stores(tmp_path) if p.suffix == ".layers")
    assert store.name not in left.name
    np.testing.assert_allclose(found, jaxengine.load(folder, dtype="float32").logits(IDS), atol=1e-5)
    assert [(s.state, s.file.whole) for s in stored(tmp_path / "disk")] == [("changed", False), ("current", True)]


def test_two_processes_pack_one_store(tmp_path: Path) -> None:
    """The second waits, says so, and opens what the first has written."""
    folder = copied(tmp_path)
    one = packing(folder, tmp_path, "wait")
    while not (tmp_path / "waits").exists():
        assert one.poll() is None
        time.sleep(0.01)
    other = packing(folder, tmp_path, "wait")
    assert other.stderr is not None
    line = other.stderr.readline()
    assert f"is being written by process {one.pid} on " in line
    (tmp_path / "go").touch()
    said = [p.communicate("", timeout=120) for p in (one, other)]
    assert [p.returncode for p in (one, other)] == [0, 0], said
    assert said[0][0] == said[1][0]
    (store,) = stores(tmp_path)
    assert store.suffix == ".layers"


def test_old_stores_are_told_and_removed(tmp_path: Path) -> None:
    """Those of a checkpoint that changed or is gone; not those that a load finds, nor one that a process has open."""
    for name in ("gemma2", "llama", "gpt2", "mistral"):
        copied(tmp_path, name)
    load(tmp_path / "gemma2", tmp_path)
    load(tmp_path / "llama", tmp_path)
    load(tmp_path / "mistral", tmp_path, weights="int8")
    reading = packing(tmp_path / "gpt2", tmp_path, "read")
    assert reading.stdout is not None
    assert reading.stdout.readline()
    for name in ("llama", "gpt2"):
        shutil.rmtree(tmp_path / name)
    os.utime(tmp_path / "mistral/model.safetensors", ns=(0, 0))
    (tmp_path / "disk" / "torn.layers").write_bytes(b"\0" * 100)
    said = {Path(s.source).name: (s.state, s.formats, s.file.used) for s in stored(tmp_path / "disk")}
    assert said == {
        "gemma2": ("current", "dense, float32", False), "llama": ("gone", "dense, float32", False),
        "mistral": ("changed", "int8, float32", False), "gpt2": ("gone", "dense, float32", True), "": ("damaged", "", False),
    }  # fmt: skip
    words = ["layers", "--disk", str(tmp_path / "disk")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert len(stores(tmp_path)) == 5
    found = json.loads(CliRunner().invoke(app, [*words, "--remove", "old", "--json"]).output)
    removed = {Path(s["source"]).name: s["removed"] for s in found["stores"]}
    assert removed == {"gemma2": False, "llama": True, "mistral": True, "gpt2": False, "": True}
    assert len(stores(tmp_path)) == 2
    shown = CliRunner().invoke(app, [*words, "--remove", "all"])
    assert "kept: a process uses it" in shown.output
    assert reading.communicate("", timeout=60)[1] == ""
    assert reading.returncode == 0
    assert [Path(s.source).name for s in stored(tmp_path / "disk")] == ["gpt2"]
    assert CliRunner().invoke(app, [*words, "--remove", "old"]).exit_code == 0
    assert stores(tmp_path) == []
    refused = CliRunner().invoke(app, ["layers", "--disk", str(tmp_path / "nowhere")])
    assert (refused.exit_code, refused.exception.__class__) == (2, SystemExit)


# --- where the checkpoint has them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gemma2", "llama_sharded", "phi3", "opt", "qwen2", "llama_tied_f16"])
@pytest.mark.some_rows
def test_layers_as_the_checkpoint_has_them_are_not_packed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused matrices are slices of rows; the numbers are those of the same program over layers in host memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with jaxengine.load(GOLDEN / case, home="disk") as model:
        sizes = layer_bytes(model.architecture, model.plan)
        found = model.logits(IDS)
        tokens = model.generate([IDS], max_new_tokens=4, stop_ids=())[0].tokens
        stats = model.disk_stats
        read = model.params["banks"][0].source.read(0, "q")
    assert stats is not None
    assert stats.bytes_read >= sum(sizes)
    assert list(tmp_path.rglob("*")) == []
    host = jaxengine.load(GOLDEN / case, home="host", form="python")
    np.testing.assert_array_equal(found, host.logits(IDS))
    assert tokens == host.generate([IDS], max_new_tokens=4, stop_ids=())[0].tokens
    np.testing.assert_array_equal(read, host.params["banks"][0].weights[0]["q"])


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("gpt2", {}),  # which stores its matrices [in, out]
        ("qwen2", {"dtype": "float32"}),
        ("llama", {"weights": "int8"}),
        ("llama", {"weight_rules": {"layers.1.down": "int8"}}),
        ("llama", {"disk": "named"}),
    ],
    ids=str,
)
def test_what_is_not_as_the_plan_has_it_is_packed(
    case: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / given["disk"] if "disk" in given else tmp_path / "jaxengine" / "layers"
    named: dict[str, Any] = given | ({"disk": folder} if "disk" in given else {})
    jaxengine.load(GOLDEN / case, home="disk", **named).close()
    assert [p.suffix for p in folder.iterdir()] == [".layers"]


def test_over_a_mesh_from_the_checkpoints_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts, data = golden("gemma2")
    whole = Plan(rules=(("vocab", None),))  # 103 tokens
    how: dict[str, Any] = {"mesh": "data=4,tensor=2", "sharding": "tensor", "resident": 1, "kept": 1}
    with jaxengine.load(GOLDEN / "gemma2", plan=whole, home="disk", **how) as model:
        found = [c.tokens for c in model.generate(prompts, max_new_tokens=16, stop_ids=())]
    assert found == [data[f"generated_{i}"].tolist() for i in range(len(prompts))]
    assert list(tmp_path.rglob("*")) == []


def test_a_checkpoint_that_shrinks_while_it_is_read_or_was_cut_off(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with jaxengine.load(folder, home="disk") as model:
        os.truncate(file, 3 * size // 4)
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: layer \d is cut off: .* Load the checkpoint again"
        ):
            model.logits(IDS)
        assert file.exists()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        jaxengine.load(folder, home="disk")


# --- what is chosen -----------------------------------------------------------------------------------------------


def test_under_limits_of_both_kinds_of_memory_the_rest_is_on_disk() -> None:
    arch = jaxengine.load(GOLDEN / "gemma3_text", dtype="float32").architecture
    base = Plan(dtype="float32")
    layer = max(layer_bytes(arch, base))
    host = need(arch, Plan(dtype="float32", home="host"), batch=1, context=64)
    wide = choose(arch, base, host.device + layer, length=64, ram=host.host)
    assert wide.home in ("host", "split")
    room = (RING + 2) * layer
    chosen = choose(arch, base, host.device + layer, length=64, ram=room)
    assert (chosen.home, chosen.kept) == ("disk", 2)
    n = need(arch, chosen, batch=1, context=64)
    assert n.device <= host.device + layer
    assert n.host <= room
    assert n.disk == sum(layer_bytes(arch, base)[chosen.resident + chosen.kept :])
    ring = show_bytes(RING * layer)
    there = rf"home 'disk' takes {ring} of host memory, where there are {show_bytes(layer)}\. Nearest: weights='int8', or more"
    with pytest.raises(ValueError, match=there):
        choose(arch, base, host.device + layer, length=64, ram=layer)
    with pytest.raises(
        ValueError, match=r"home 'host' takes .* home 'disk', which has two layers on the device, takes"
    ):
        choose(arch, base, host.device, length=64, ram=room)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"home": "host", "kept": 1}, "home is 'host' and kept is 1"), ({"home": "disk", "kept": -1}, "kept is -1"),
        ({"home": "disk", "form": "scan"}, "takes the form python, not 'scan'"),
        ({"home": "disk", "resident": 1, "kept": 3}, r"1 of 4 layers are resident and 3 kept .* at most kept=2"),
        ({"ram": "1GB"}, "no memory is given"), ({"ram": "much", "memory": "1GB"}, "ram is 'much'"),
        ({"home": "host", "disk": "here"}, "disk is 'here' and home 'host'; only home='disk'"),
    ],
)  # fmt: skip
def test_refused(given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=said):
        jaxengine.load(GOLDEN / "gemma2", **given)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_users_own_home_where_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jaxengine.load(GOLDEN / "llama", home="disk", disk="~/layers")
    assert [p.suffix for p in (tmp_path / "layers").iterdir()] == [".layers"]


def test_room_is_what_is_free_less_a_fifth_and_less_than_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_ram", lambda: 100 * 2**30)
    assert loading._room(30 * 2**30) == 50 * 2**30  # on CPU the device's memory is out of the same
    assert loading._room(90 * 2**30) == 0
    assert loading._room(30 * 2**30, 2) == 20 * 2**30
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    assert loading._room(30 * 2**30) == 64 * 2**30
    assert loading._room(30 * 2**30, 2) == 80 * 2**30  # each card has a pool
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "90")
    assert loading._room(30 * 2**30) == 80 * 2**30


# --- memory -------------------------------------------------------------------------------------------------------

UNDER_A_LIMIT = """
    import json, resource, sys
    import jax, jax.numpy as jnp
    import jaxengine
    jaxengine.load(sys.argv[2], dtype="float32", home="disk", disk=sys.argv[3]).generate([1, 2], max_new_tokens=2, stop_ids=())
    held = {l.split(":")[0]: int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData")}["VmData"]
    limit = held + int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    given = {"packed": {"home": "disk", "disk": sys.argv[3]}}.get(sys.argv[5], {"home": sys.argv[5]})
    model = jaxengine.load(sys.argv[1], **given)
    print(json.dumps(model.generate([1, 2, 3], max_new_tokens=3, stop_ids=())[0].tokens))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory are Linux's")
@pytest.mark.thorough
def test_a_checkpoint_larger_than_the_memory_there_is(tmp_path: Path) -> None:
    """Under a limit on what the process may hold, half of the layers' bytes, disk generates, from the checkpoint's own files
    and from a store that it packs first, and host cannot."""
    raw = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 512,
        "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 256, "torch_dtype": "float32",
    }  # fmt: skip
    from jaxengine.architecture import architecture

    arch, rng = architecture(raw), np.random.default_rng(0)

    class Drawn(dict[str, Any]):
        def __missing__(self, name: str) -> np.ndarray:
            return rng.standard_normal(arch.specs()[name].shape, dtype=np.float32) * np.float32(0.02)

    model = from_arrays(arch, Plan(dtype="float32"), Drawn(), raw)
    model.save(tmp_path / "large")
    wanted = model.generate([1, 2, 3], max_new_tokens=3, stop_ids=())[0].tokens
    sizes = layer_bytes(arch, model.plan)
    del model
    limit = sum(sizes) // 2
    assert (RING + 3) * max(sizes) < limit  # the ring, two layers and room for what jax holds besides

    def run(home: str) -> subprocess.CompletedProcess[str]:
        words = [tmp_path / "large", GOLDEN / "llama", tmp_path / "disk", limit, home]
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(UNDER_A_LIMIT), *map(str, words)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    for how in ("disk", "packed"):
        done = run(how)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == wanted
    assert run("host").returncode != 0
