"""The average of what is trained: its numbers, where it lives, that nothing else changes, and what comes out.

The oracle is the definition in float64, sum_i d^(t-i) theta_i / sum_i d^(t-i), of what was trained after each step. What is kept
is made step by step in float32: each step rounds the average three times (the difference, its share, the sum), and what earlier
steps rounded shrinks by d, so that at most 3 / (1 - d) roundings of u = 2^-24 stand, of the largest number that was averaged.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.tree_util import tree_flatten_with_path
from test_events import read as read_events
from test_finetune import CLOSE, HOW, llama, losses, rows, run_of
from test_finetune_sharded import MESHES, WHOLE_VOCAB

import jaxengine
from jaxengine.command import app
from jaxengine.finetune import average, layered
from jaxengine.finetune import rows as row_blocks
from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.run import Run, Settings
from jaxengine.planning import plan_folder

D = 0.7
EMA = dataclasses.replace(HOW, ema=D)
U = 2.0**-24
WAYS = [
    ("lora", {}, {}),
    ("lora", {"home": "host"}, {}),
    ("dora", {"home": "host"}, {}),
    ("all", {}, {}),
    ("all", {"form": "scan"}, {"optimizer": "muon", "learning_rate": 5e-3}),
    ("all", {"home": "host"}, {}),
    ("all", {"home": "host", "stay": ("k",)}, {"optimizer": "adamw", "learning_rate": 5e-3, "weight_decay": 0.1}),
    ("all", {"home": "split", "resident": 1}, {"optimizer": "adafactor", "learning_rate": 5e-3}),
    ("all", {"home": "host", "mesh": "fsdp=8"}, {"optimizer": "adamw8bit", "learning_rate": 5e-3, "batch": 8}),
    ("lora", {"home": "host", "plan": WHOLE_VOCAB, "sharding": "tensor", "mesh": MESHES["tensor"]}, {"batch": 8}),
]  # fmt: skip


def numbers(tree: Any) -> dict[str, np.ndarray]:
    """By path, copied."""
    return {jax.tree_util.keystr(path): np.array(x) for path, x in tree_flatten_with_path(tree)[0]}


def places(run: Run) -> list[Any]:
    return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(run._state)]


def weighted(seen: list[np.ndarray]) -> np.ndarray:
    """The definition."""
    shares = np.array([D ** (len(seen) - i) for i in range(1, len(seen) + 1)])
    return np.tensordot(shares / shares.sum(), np.stack(seen).astype(np.float64), 1)


@pytest.mark.parametrize(("train", "how", "given"), WAYS, ids=str)
@pytest.mark.some_rows
def test_it_is_the_weighted_mean_of_all_steps(train: str, how: dict[str, Any], given: dict[str, Any]) -> None:
    """And stands where what is trained does: what is evaluated and tuned is it, while steps go on from their own numbers."""
    settings = dataclasses.replace(EMA, train=train, **given)
    wanted = losses(run_of(llama(**how), dataclasses.replace(settings, ema=0.0)))
    run, seen = Run(llama(**how), settings, rows(), rows(6, 60)), []
    before, found = places(run), []
    for record in run:
        run._show(live=True)  # at the last step the held-out loss was taken
        seen.append(numbers(run._state.trained))
        found.append(record.loss)
        run.evaluate()
        assert places(run) == before
    # in bfloat16 or of signs a last bit could do more; here the program is the same but for what it also adds up
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)
    live, tuned = run.tuned(live=True).params, None
    assert all(np.array_equal(x, seen[-1][name]) for name, x in numbers(run._state.trained).items())
    live, tuned = numbers(live), numbers(run.tuned().params)
    averages = numbers(run._state.trained)
    changed = [name for name in averages if np.ptp(np.stack([s[name] for s in seen]), axis=0).max() > 0]
    assert len(changed) > len(averages) / 2
    for name, mean in averages.items():
        each = [s[name] for s in seen]
        size = np.abs(np.stack(each)).max()
        np.testing.assert_allclose(mean, weighted(each), rtol=0, atol=3 / (1 - D) * U * size, err_msg=name)
    assert sum(not np.array_equal(live[name], tuned[name]) for name in live) >= len(changed)


def test_of_a_long_run_the_last_steps_count() -> None:
    """Of 400 steps under decay 0.9999, whose first share is 1 to a few roundings: 1 - d^t for small t is not rounded away."""
    decay, steps = 0.9999, 400
    kept, made = average.averaging(decay), []
    params = {"w": np.float32(0)}
    state = kept.init(params)
    step = jax.jit(kept.update)
    for n in range(steps):
        updates = {"w": np.float32(np.sin(n) + 2)}
        updates, state = step(updates, state, params)
        params = {"w": np.float32(params["w"] + updates["w"])}
        made.append(params["w"])
        if n == 0:
            assert float(state.mean["w"]) == pytest.approx(float(params["w"]), rel=4 * U)
    shares = np.array([decay ** (steps - i) for i in range(1, steps + 1)])
    wanted = float((shares / shares.sum()) @ np.array(made, np.float64))
    # a rounding of the mean is kept for all that follow: at most so many halves of one
    assert float(state.mean["w"]) == pytest.approx(wanted, rel=3 * steps * U)


def test_averages_come_in_the_order_of_what_they_are_of() -> None:
    """By their names, layer by layer in host memory too."""
    for how in ({}, {"home": "host"}, {"home": "split", "resident": 1}):
        run = run_of(llama(**how), dataclasses.replace(EMA, train="all"))
        trained = [p[-1] for p, _ in tree_flatten_with_path(run._state.trained)[0]]
        held = tree_flatten_with_path(run._state.optimizer)[0]
        assert [p[-1] for p, _ in held if any(getattr(k, "name", "") == "mean" for k in p)] == trained


def test_rows_of_a_large_parameter_are_averaged_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(EMA, train="all", optimizer="adamw", learning_rate=5e-3, steps=4)
    whole = run_of(llama(home="host"), settings)
    losses(whole)
    jax.clear_caches()
    run = run_of(llama(home="host"), settings)
    monkeypatch.setattr(row_blocks, "BYTES", 4 * 20 * 48)
    assert {n for n in run.model.params["outer"] if layered.blocks(run.tuning, n) > 1} == {"embedding", "lm_head"}
    losses(run)
    jax.clear_caches()
    for name in ("embedding", "lm_head"):
        found, wanted = (np.asarray(r.tuned().params["outer"][name]) for r in (run, whole))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        assert np.abs(found - np.asarray(run.tuned(live=True).params["outer"][name])).max() > 1e-3


@pytest.mark.parametrize(("train", "how"), [("lora", {}), ("all", {"home": "host"})], ids=str)
def test_a_run_goes_on_with_its_average(train: str, how: dict[str, Any], tmp_path: Path) -> None:
    """After it ended in the middle, the average and all losses are those of an unbroken run, to the last bit; a held-out loss
    on the way, for which the average was put in place, is no part of what is saved."""
    settings = dataclasses.replace(EMA, train=train)

    def opened(name: str) -> Run:
        return Run(llama(**how), settings, rows(), rows(6, 60), out=tmp_path / name, save_every=3, eval_every=1)

    with opened("whole") as whole:
        wanted = [(r.loss, r.eval_loss) for r in whole.run()]
        averages = numbers(whole._state.trained)
    with opened("cut") as run:
        found = [(r.loss, r.eval_loss) for r, _ in zip(run, range(3), strict=False)]
    with opened("cut") as run:
        assert run.step == 3
        found += [(r.loss, r.eval_loss) for r in run.run()]
        assert found == wanted
        assert {n: x.tobytes() for n, x in numbers(run._state.trained).items()} == {
            n: x.tobytes() for n, x in averages.items()
        }
    with pytest.raises(ValueError, match=r"another run, .*: ema was 0\.7 and is 0\.0\. Say the same"):
        Run(llama(**how), dataclasses.replace(settings, ema=0.0), rows(), rows(6, 60), out=tmp_path / "cut")


def test_what_is_exchanged_stands_once() -> None:
    """Where an average lives elsewhere, in host memory: what it and its parameter were in is free."""
    run = run_of(llama(home="host"), dataclasses.replace(EMA, train="all"))
    next(run)
    run._show(live=True)
    before = jax.tree.leaves(run._state)
    run._show(live=False)
    gone = [x for x in before if all(x is not y for y in jax.tree.leaves(run._state))]
    assert len(gone) == 2 * len(run.model.params["outer"])
    assert all(x.is_deleted() for x in gone)


def test_what_is_saved_is_not_the_average_when_interrupted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C, which waits for nothing, comes while the average is put in place."""
    settings = dataclasses.replace(EMA, train="all")

    def opened(name: str) -> Run:
        return Run(llama(), settings, rows(), rows(6, 60), out=tmp_path / name, save_every=9, eval_every=2)

    with opened("whole") as whole:
        wanted = [(r.loss, r.eval_loss) for r in whole.run()]
    combined, met = Run._combined, []

    def stops(run: Run) -> Any:
        if run._averaged and not met:
            met.append(run.step)
            raise KeyboardInterrupt
        return combined(run)

    with opened("cut") as run, monkeypatch.context() as patched:
        patched.setattr(Run, "_combined", stops)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert met == [2]
    with opened("cut") as run:
        assert run.step == 2
        assert [(r.loss, r.eval_loss) for r in run.run()] == wanted[2:]


def test_an_average_that_finds_no_place_ends_the_run_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(llama(home="host"), dataclasses.replace(EMA, train="all"))
    next(run)

    def full(*given: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(average, "_exchanged", full)
    with pytest.raises(
        RuntimeError,
        match=r"the average could not be put .* \(RESOURCE_EXHAUSTED\), .*; nothing is saved without out",
    ):
        run.tuned()


@pytest.mark.parametrize("scored", [False, True])
def test_a_model_that_is_trained_itself_holds_what_was_asked(scored: bool, tmp_path: Path) -> None:
    """At the end of a run that writes nothing, whether or not held-out rows were looked at; and after a checkpoint what it held
    before."""
    settings = dataclasses.replace(EMA, train="all")
    held: dict[bool, dict[str, np.ndarray]] = {}
    for live in (False, True):
        run = Run(llama(), settings, rows(), rows(6, 60) if scored else None)
        run.run(live=live)
        held[live] = numbers(run.model.params)
        assert all(np.array_equal(x, held[live][n]) for n, x in numbers(run.tuned(live=live).params).items())
    assert any(not np.array_equal(x, held[True][n]) for n, x in held[False].items())
    with Run(llama(), settings, rows(), out=tmp_path / "out") as run:
        next(run), next(run)
        for live in (False, True):
            model = run.tuned(live=live)
            before = numbers(model.params)
            run.save()
            assert all(np.array_equal(x, before[n]) for n, x in numbers(model.params).items())


@pytest.mark.parametrize("train", ["lora", "all"])
def test_what_is_written_is_the_average_and_what_the_step_had_when_asked(train: str, tmp_path: Path) -> None:
    """The held-out loss of the written folder, by a run of no average, is that of the average; live, of a run without one."""
    settings = dataclasses.replace(EMA, train=train)
    plain = dataclasses.replace(settings, ema=0.0)

    def scored(folder: Path) -> float:
        model = llama() if train == "lora" else jaxengine.load(folder, dtype="float32")
        given = {"adapter": folder} if train == "lora" else {}
        return Run(model, plain, rows(), rows(6, 60), **given).evaluate()

    with Run(llama(), settings, rows(), rows(6, 60), out=tmp_path / "out") as run:
        last = run.run()[-1].eval_loss
        run.export(tmp_path / "live", live=True)
        run.export(tmp_path / "average")
    with Run(llama(), plain, rows(), rows(6, 60), out=tmp_path / "plain") as without:
        alone = without.run()[-1].eval_loss
    assert last is not None
    assert alone is not None
    name = "adapter" if train == "lora" else "model"
    assert abs(last - alone) > 100 * CLOSE * alone
    assert scored(tmp_path / "out" / name) == pytest.approx(last, rel=CLOSE)
    assert scored(tmp_path / "average") == pytest.approx(last, rel=CLOSE)
    assert scored(tmp_path / "live") == pytest.approx(alone, rel=CLOSE)


def test_the_best_checkpoint_is_that_of_the_best_average(tmp_path: Path) -> None:
    """What it holds is put in place again, with its own average."""
    with Run(llama(), EMA, rows(), rows(6, 60), out=tmp_path / "out", save_every=2, keep=6) as run:
        scores = {r.step: r.eval_loss for r in run if r.eval_loss is not None}
        best = min(scores, key=scores.__getitem__)
        run.wait()
        for step in scores:
            run._restore(step)
            assert run.evaluate() == scores[step]
        run.take_best()
        assert run.step == best
        assert run.evaluate() == scores[best]


def test_before_the_first_step_there_is_nothing_to_average() -> None:
    model = llama()
    run = Run(model, dataclasses.replace(EMA, train="all"), rows(), rows(6, 60))
    before = numbers(model.params)
    Run(llama(), HOW, rows(), rows(6, 60)).evaluate()
    assert run.evaluate() == pytest.approx(Run(llama(), HOW, rows(), rows(6, 60)).evaluate(), rel=CLOSE)
    after = numbers(run.tuned().params)
    assert all(np.array_equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ema": 1.0}, "ema is 1.0; it is at least 0, which keeps no average, and below 1, such as 0.99"),
        ({"ema": -0.1}, "ema is -0.1; it is a number, at least 0"),
        ({"ema": True}, "ema is True; it is a number"),
        (
            {"ema": 0.9, "train": "lisa"},
            "ema is 0.9, and train is 'lisa', which keeps .* goes with lora, dora, all; leave",
        ),
        (
            {"ema": 0.9, "optimizer": "mezo"},
            "ema is 0.9, and 'mezo' makes no gradient and keeps nothing .* leave it out",
        ),
    ],
    ids=str,
)
def test_what_keeps_no_average_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(**given)


def test_a_plan_counts_it() -> None:
    """Four bytes for each trained number, with the moments: of 8 that AdamW's take, half as much again."""
    asked: dict[str, Any] = {"gpu": "h200", "context": 64, "batch": 1}
    for task, share in (("lora", 1.5), ("full", 1.5), ("dora", 1.5)):
        without, found = (plan_folder(jaxengine.demo_folder(), task=task, ema=d, **asked) for d in (0.0, 0.99))
        pairs = list(zip(without.candidates, found.candidates, strict=True))
        assert pairs
        for a, b in pairs:
            kept = [c.need.optimizer + c.need.host_optimizer for c in (a, b)]
            assert kept[1] / kept[0] == pytest.approx(share, rel=1e-3)
        assert (without.to_dict()["ema"], found.to_dict()["ema"]) == (0.0, 0.99)
    with pytest.raises(ValueError, match=r"ema is 0\.99, and task 'generate' trains nothing"):
        plan_folder(jaxengine.demo_folder(), ema=0.99, **asked)
    with pytest.raises(ValueError, match=r"optimizer: ema is 2"):
        plan_folder(jaxengine.demo_folder(), task="full", ema=2, **asked)
    assert Optimizer(ema=0.5) != Optimizer()


def test_what_would_fit_without_it_is_said(tmp_path: Path) -> None:
    """By a plan, and by the command that trains."""
    demo, asked = jaxengine.demo_folder(), {"gpu": "h200", "context": 64, "batch": 1, "task": "full"}
    least = [min(c.need.device for c in plan_folder(demo, ema=d, **asked).candidates) for d in (0.0, 0.99)]
    assert least[0] < least[1]
    between = str(sum(least) // 2)
    said = [words for words, _ in plan_folder(demo, memory=between, ema=0.99, **asked).changes]
    assert "without ema" in said
    (data := tmp_path / "data.txt").write_text("one two three\n" * 200)
    words = ["demo", str(data), "--train", "all", "--context", "64", "--batch", "1", "--ema", "0.99"]
    done = CliRunner().invoke(app, ["finetune", *words, "--memory", between, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "Nearest: without --ema, or " in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed again with --live, the same run writes what its last step had; --merge follows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, out = tmp_path / "sums.jsonl", tmp_path / "out"
    made = ({"prompt": f"{i} + {j} =", "completion": f" {i + j}"} for i in range(9) for j in range(9))
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    words = (
        "finetune", "demo", str(path), "--out", str(out), "--context", "48", "--batch", "4", "--steps", "5", "--eval", "0.2",
        "--learning-rate", "1e-2", "--warmup", "0", "--ema", "0.9", "--compute", "float32",
    )  # fmt: skip
    written: dict[str, list[bytes]] = {}
    for more in ("", "--live", "--best", "--best --live"):
        merged = tmp_path / f"merged{more}"
        done = CliRunner().invoke(app, [*words, "--merge", str(merged), *more.split()])
        assert done.exit_code == 0, done.output
        files = (out / "adapter" / "adapter_model.safetensors", merged / "model.safetensors")
        written[more] = [file.read_bytes() for file in files]
    assert all(a != b for a, b in zip(written[""], written["--live"], strict=True))
    assert (written["--best"], written["--best --live"]) == (written[""], written["--live"])  # it is the last
    scores = [n["eval/loss"] for f in (out / "events").iterdir() for _, n in read_events(f) if "eval/loss" in n]
    assert len(scores) == 1
    done = CliRunner().invoke(app, [*words, "--live", "--ema", "0"])
    assert done.exit_code == 2
    assert "--live is of a run with --ema" in done.stderr
