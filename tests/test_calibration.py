"""Codes chosen by text: GPTQ against its paper's algorithm in float64, AWQ's folding against the model itself, and the way
through a model: what is written, that it goes on after any end with the same bytes, and what it refuses.

Codes are compared exactly: the oracle says how near a tie each w / s came, and cases are taken that are so far from one that
float32 (sums of some hundred terms, 2^-20 of a w / s of up to 2^bits) cannot choose otherwise.
"""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from oracles import calibration as oracle
from oracles.golden import GOLDEN, golden
from oracles.grouped import least

import jaxengine
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import Reader, write_file
from jaxengine import command, formats
from jaxengine.architecture import Architecture, architecture
from jaxengine.calibration import awq, gptq, run
from jaxengine.calibration.grid import Grid
from jaxengine.calibration.run import Samples, quantize
from jaxengine.engine import Engine
from jaxengine.loading import from_arrays, tokenizer
from jaxengine.plan import Plan
from jaxengine.sources import open_source, read_config
from jaxengine.weights.base import Weight
from sharding.mesh import make_mesh

O, I, N = 12, 160, 400  # noqa: E741
DEMO = Path(jaxengine.demo_folder())


def engine_of(arch: Any, dtype: str = "float32") -> Engine:
    plan = Plan(dtype=dtype)
    return Engine(arch, plan.caching, dtype, plan.sharding_rules(), make_mesh(None))


def arch_of(case: str) -> Architecture:
    return architecture(read_config(GOLDEN / case))


ENGINE = engine_of(arch_of("llama"))


def logits_of(arch: Architecture, arrays: Any, ids: Any) -> np.ndarray:
    """Of a model of dense arrays, float32."""
    dense = {n: np.asarray(a, np.float32) for n, a in arrays.items()}
    return np.asarray(from_arrays(arch, Plan(dtype="float32", form="scan"), dense).logits(ids))


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """A folder's parameters, those that are held quantised as what they stand for."""
    with open_source(folder, architecture(read_config(folder))) as source:
        read = {n: source.read(n) for n in source.architecture.params()}
    return {n: np.asarray(a.dense() if isinstance(a, Weight) else a) for n, a in read.items()}


def correlated(seed: int = 0, inputs: int = I) -> tuple[np.ndarray, np.ndarray]:
    """(w [O, I], x [N, I]) with inputs that a fourth as many numbers make, and some of their own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, inputs // 4)) @ rng.normal(size=(inputs // 4, inputs)) + 0.5 * rng.normal(size=(N, inputs))
    return rng.normal(size=(O, inputs)).astype(np.float32), x.astype(np.float32)


def steps_of(grid: Grid) -> oracle.Steps:
    """The formats' rule for a group, by its own oracle."""

    def steps(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if grid.whole:
            return np.abs(group).max(1) / 127, np.full(len(group), 128.0)
        zeros = range(2**grid.bits) if grid.affine else None
        found = [least(row, grid.bits, zeros, grid.scale) for row in group]
        middle = 2.0 ** (grid.bits - 1)
        z = [min(f.bounds, key=lambda z: f.bounds[z]) if grid.affine else middle for f in found]
        return np.array([f.step for f in found]), np.array(z)

    return steps


# --- GPTQ ----------------------------------------------------------------------------------------------------------------


GRIDS = [
    "int4:group_size=16,act_order=true", "int3:group_size=32,affine=true,scale=float16",
    "int2:group_size=16,affine=true", "int8", "int8:group_size=32",
]  # fmt: skip


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.some_rows
def test_gptq_chooses_the_codes_of_the_paper(text: str) -> None:
    grid = Grid.of(text, I)
    for seed in range(20):
        w, x = correlated(seed)
        H = x.T.astype(np.float64) @ x
        wanted = oracle.gptq(
            w, H, steps_of(grid), group=I if grid.whole else grid.group, bits=grid.bits, ordered=grid.ordered
        )
        if wanted.slack > 2.0**-19 * 2**grid.bits:  # or a code could be either
            break
    else:
        raise AssertionError("all cases come too near a tie")
    U, perm = gptq.solved_factor(ENGINE, jnp.asarray(H, jnp.float32), ordered=grid.ordered)
    (held,), codes, s, _, (lost,) = gptq.solve(ENGINE, grid, (jnp.asarray(w),), jnp.asarray(H, jnp.float32), U, perm)
    np.testing.assert_array_equal(perm, wanted.order)
    np.testing.assert_array_equal(codes, wanted.codes)
    np.testing.assert_allclose(s, wanted.steps, rtol=2.0**-18)
    np.testing.assert_allclose(held, wanted.held, rtol=2.0**-18, atol=1e-6)
    np.testing.assert_allclose(lost, oracle.lost(w, wanted.held, x), rtol=1e-3)


def test_the_factor_is_the_inverses() -> None:
    _, x = correlated()
    H = x.T @ x
    U, _ = gptq.solved_factor(ENGINE, jnp.asarray(H), ordered=False)
    wanted = np.linalg.inv(H.astype(np.float64) + 0.01 * np.mean(np.diagonal(H)) * np.eye(I))
    assert (np.tril(U, -1) == 0).all()
    np.testing.assert_allclose(np.asarray(U, np.float64).T @ U, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_gptq_loses_less_than_rounding_to_nearest() -> None:
    """On inputs that hang together; on inputs that do not there is nothing to make good."""
    w, x = correlated(1)
    for text in ("int8:group_size=32", "int2:group_size=16,affine=true"):
        grid = Grid.of(text, I)
        nearest = oracle.lost(w, awq.rounded(grid, jnp.asarray(w))[3], x)
        U, perm = gptq.solved_factor(ENGINE, jnp.asarray(x.T @ x), ordered=False)
        held = gptq.solve(ENGINE, grid, (jnp.asarray(w),), jnp.asarray(x.T @ x), U, perm)[0][0]
        assert oracle.lost(w, held, x) < 0.5 * nearest


def test_inputs_that_never_come_are_rounded_to_nearest() -> None:
    w, x = correlated()
    x[:, 5] = 0
    grid, H = Grid.of("int4:group_size=32", I), jnp.asarray(x.T @ x)
    held = gptq.solve(ENGINE, grid, (jnp.asarray(w),), H, *gptq.solved_factor(ENGINE, H, ordered=False))[0][0]
    assert (np.abs(np.asarray(held)[:, 5] - w[:, 5]) <= 0.51 * np.abs(w).max() / 7).all()
    silent = jnp.zeros((I, I))
    plain = gptq.solve(ENGINE, grid, (jnp.asarray(w),), silent, *gptq.solved_factor(ENGINE, silent, ordered=False))[0][
        0
    ]
    np.testing.assert_array_equal(plain, awq.rounded(grid, jnp.asarray(w))[3])
    with pytest.raises(FloatingPointError, match="not finite"):
        gptq.solved_factor(ENGINE, silent + jnp.nan, ordered=False)


# --- AWQ -----------------------------------------------------------------------------------------------------------------


def test_awq_loses_less_than_rounding_to_nearest() -> None:
    """On inputs of which a few are large; the scales go into a norm here."""
    w, _ = correlated(2)
    x = np.random.default_rng(3).normal(size=(N, I)).astype(np.float32)
    x[:, ::40] *= 30
    H, a = jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0))
    ones = jnp.ones(O)
    for text in ("int3:group_size=32", "int8"):
        grid = Grid.of(text, I)
        nearest = oracle.lost(w, awq.rounded(grid, jnp.asarray(w))[3], x)
        s, ratio = awq.search(ENGINE, grid, awq.Fold("norm"), (jnp.asarray(w),), ones, H, a)
        assert ratio > 0
        (held,), *_, (lost,) = awq.settle(ENGINE, grid, (jnp.asarray(w),), ones, s, H)
        made = oracle.lost(w, np.asarray(held) / np.asarray(s), x)
        assert made < 0.5 * nearest
        np.testing.assert_allclose(lost, made, rtol=1e-3)


# what can take the scales of what comes after it, as the families' papers have their layers
QKV, GATED = ("q", "k", "v"), ("gate", "up")
FOLDS: dict[str, dict[tuple[str, ...], tuple[str, bool] | None]] = {
    "gemma3_text": {
        QKV: ("pre_attention_norm", True), ("o",): ("v", False), GATED: ("pre_mlp_norm", True), ("down",): ("up", False)
    },
    # gelu is not linear, so that nothing before `down` can be divided
    "gpt2": {QKV: ("attention_norm", False), ("o",): ("v", False), ("up",): ("mlp_norm", False), ("down",): None},
    # normed after: what a layer's matrices read is the residual stream itself; relu lets a factor through
    "opt_350m_like": {QKV: None, ("o",): ("v", False), ("up",): None, ("down",): ("up", False)},
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
@pytest.mark.some_rows
def test_folding_changes_nothing_before_rounding(case: str) -> None:
    """The logits, to float32's rounding, with scales from 1/4 to 4 in every place that takes them."""
    arch = arch_of(case)
    engine = engine_of(arch)
    ids, _ = golden(case)
    with open_source(GOLDEN / case, arch) as source:
        arrays = {n: np.asarray(source.read(n), np.float32) for n in arch.params()}
    changed, rng = dict(arrays), np.random.default_rng(0)
    hidden = next(s.shape[-1] for n, s in arch.block(arch.kinds[0])[1].items() if n == "q")
    for i, kind in enumerate(arch.kinds):
        found = awq.folds(engine, kind, hidden)
        assert {g.names: f and (f.name, f.offset) for g, f in found} == FOLDS[case]
        specs, at = arch.block(kind)[1], f"layers.{i}."
        for group, fold in found:
            if fold is None:
                continue
            own, spec = {n: changed[at + n] for n in specs}, specs[fold.name]
            outputs = spec.shape[: spec.out]
            s = np.exp2(rng.uniform(-2, 2, math.prod(outputs))).astype(np.float32)
            made, s = awq.folded(fold, own, s, vector=spec.out is None)
            changed |= {at + n: a for n, a in made.items()}
            if spec.out is not None:
                w = own[fold.name]
                changed[at + fold.name] = w / s.reshape(*outputs, *(1,) * (w.ndim - spec.out))
            for n in group.names:
                changed[at + n] = changed[at + n] * fold.spread(s).reshape(group.in_shape).astype(np.float32)
    assert any((changed[n] != a).any() for n, a in arrays.items())
    logits = [logits_of(arch, held, ids[0]) for held in (arrays, changed)]
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5 * np.abs(logits[0]).max(), rtol=0)


def test_what_a_norms_dtype_makes_of_a_scale_is_what_matrices_take() -> None:
    w = np.linspace(0, 2, 9).astype(jnp.bfloat16)
    made, s = awq.folded(awq.Fold("n"), {"n": w}, np.full(9, 1.3, np.float32), vector=True)
    np.testing.assert_allclose(made["n"].astype(np.float64) * s, w.astype(np.float64), rtol=2.0**-23)
    assert s[0] == 1  # nothing comes through, and nothing is divided by
    made, s = awq.folded(awq.Fold("n", offset=True), {"n": w}, np.full(9, 1.3, np.float32), vector=True)
    np.testing.assert_allclose((1 + made["n"].astype(np.float64)) * s, 1 + w.astype(np.float64), rtol=2.0**-23)


# --- through a model -----------------------------------------------------------------------------------------------------


FORMAT, NEAREST = "int4:group_size=64,act_order=true", "int4:group_size=64"
CONTEXT = 96
HOW: dict[str, Any] = {"weights": FORMAT, "dtype": "float32"}


@pytest.fixture(autouse=True)
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled once for all of these tests."""
    monkeypatch.setattr(run, "ROWS", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without its last two layers."""
    folder = tmp_path_factory.mktemp("calibration") / "two"
    shutil.copytree(DEMO, folder)
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"num_hidden_layers": 2}))
    (folder / "model.safetensors").unlink()
    with Reader.open(DEMO) as reader:
        kept = {n: reader.info(n) for n in reader.names if ".2." not in n and ".3." not in n}
        described = {n: (info.dtype, info.shape) for n, info in kept.items()}
        write_file(folder / "model.safetensors", described, reader.read, {"format": "pt"})
    return folder


def tokens(vocab: int, rows: int, context: int) -> Samples:
    return Samples.of(np.random.default_rng(0).integers(0, vocab, (rows, context)))


FEW = tokens(2048, 2, CONTEXT)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_command_makes_a_model_that_is_nearer_than_rounding_to_nearest(two: Path, tmp_path: Path) -> None:
    """Text in; by the distance of the logits from the model's own, on other text."""
    text = tmp_path / "text.txt"
    text.write_text(Path(run.__file__).read_text())
    given = ["--weights", FORMAT, "--samples", "24", "--context", str(CONTEXT), "--dtype", "float32"]
    done = CliRunner().invoke(command.app, ["quantize", str(two), str(text), "--out", str(tmp_path / "out"), *given])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    arch, exact = architecture(read_config(two)), decoded(two)
    words = tokenizer(two)
    assert words is not None
    ids = words.encode(Path(awq.__file__).read_text())[:CONTEXT]
    nearest = {
        n: np.asarray(formats.find(NEAREST).encode(jnp.asarray(a), out=s.out).dense())
        if (s := arch.specs()[n]).out is not None and n.startswith("layers.") else a
        for n, a in exact.items()
    }  # fmt: skip
    wanted = logits_of(arch, exact, ids)
    away = [((logits_of(arch, a, ids) - wanted) ** 2).mean() for a in (decoded(tmp_path / "out"), nearest)]
    assert away[0] < 0.85 * away[1]


def test_rows_are_no_longer_than_the_model_takes_where_nobody_says(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sampled(folder: Path, text: Any, arch: Any, samples: int, context: int, seed: int) -> Any:
        asked.append(context)
        raise Killed

    monkeypatch.setattr(run, "sampled", sampled)
    cases: tuple[tuple[int, dict[str, Any]], ...] = ((384, {}), (4096, {}), (4096, {"context": 400}))
    for longest, given in cases:
        raw = read_config(two) | {"max_position_embeddings": longest}
        monkeypatch.setattr(run, "read_config", lambda folder, raw=raw: raw)
        with pytest.raises(Killed):
            quantize(two, tmp_path / "no.txt", out=tmp_path / "out", **HOW | given)
    assert asked == [384, 512, 400]


class Killed(Exception):  # noqa: N818
    pass


def test_a_killed_run_goes_on_with_the_same_bytes(two: Path, tmp_path: Path) -> None:
    quantize(two, FEW, out=tmp_path / "whole", **HOW)
    began: list[tuple[int, str]] = []
    out = tmp_path / "broken"

    def broken(layer: int, what: str) -> None:
        def track(done: int, total: int, now: str) -> None:
            began.append((done, now))
            if (done, now) == (layer, what):
                raise Killed

        began.clear()
        with pytest.raises(Killed):
            quantize(two, FEW, out=out, progress=track, **HOW)
        assert not out.exists()

    broken(0, "rounding o")
    broken(1, "inputs of gate, up")  # after all of the first layer
    with pytest.raises(CheckpointError, match=r"another run for broken, .*weights was 'int4:.*' and is 'int2'"):
        quantize(two, FEW, out=out, **(HOW | {"weights": "int2"}))
    broken(1, "writing")
    assert began[0] == (1, "reading")
    broken(2, "writing")  # after the last
    assert began[0] == (1, "reading")
    broken(2, "writing")
    assert began == [(2, "writing")]
    quantize(two, FEW, out=out, **HOW)
    assert files(out) == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "whole"]


def test_a_killed_run_goes_on_with_other_memory(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows at a time are sums in another order, of what has not been summed yet."""
    whole = quantize(two, FEW, out=tmp_path / "whole", **HOW)
    out = tmp_path / "broken"

    def track(done: int, total: int, now: str) -> None:
        if (done, now) == (1, "inputs of gate, up"):
            raise Killed

    with pytest.raises(Killed):
        quantize(two, FEW, out=out, progress=track, **HOW)
    monkeypatch.setattr(run, "ROWS", 1)
    found = quantize(two, FEW, out=out, **HOW)
    assert found.lost == pytest.approx(whole.lost, rel=1e-3)
    assert {n: v for n, v in found.lost.items() if n.startswith("layers.0.")} == {
        n: v for n, v in whole.lost.items() if n.startswith("layers.0.")
    }
    assert files(out).keys() == files(tmp_path / "whole").keys()


def test_a_run_under_way_is_not_looked_into(two: Path, tmp_path: Path) -> None:
    """What another process is about to write there is no reason to refuse; that it is there is."""
    work = tmp_path / ".out.calibration"
    work.mkdir()
    (work / run.ASKED).write_text('{"weights": "int')  # half of it
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being made by another process"):
            quantize(two, FEW, out=tmp_path / "out", **HOW)
    finally:
        os.close(lock)


def test_memory_is_kept(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands on the device never exceeds it, fewer rows are taken for it, and too little is refused before a byte."""
    with open_source(two, architecture(read_config(two))) as source:
        made = run._Run(source.architecture, source, Plan(dtype="float32", weights=FORMAT), "gptq")
        enough = max(made.needs(1, CONTEXT).values())
        assert made.fitting(enough, 1, CONTEXT) == 1
        monkeypatch.setattr(made, "needs", lambda rows, context, memory: {"a layer's results": 100 * rows + 50})
        assert [made.fitting(m, 8, CONTEXT) for m in (850, 849, 450, 150)] == [8, 4, 4, 1]
        with pytest.raises(
            ValueError, match=r"results takes 150 B .*one row of 96 tokens at a time \(850 B with 8 rows"
        ):
            made.fitting(149, 8, CONTEXT)
    with pytest.raises(
        ValueError, match=r"memory is 1 kB, and .* takes .* with one row of 96 tokens .*Nearest: memory="
    ):
        quantize(two, FEW, out=tmp_path / "out", memory=1000, **HOW)
    assert list(tmp_path.iterdir()) == []
    gc.collect()  # or arrays of earlier tests go meanwhile
    before, most = sum(a.nbytes for a in jax.live_arrays()), 0

    def track(done: int, total: int, what: str) -> None:
        nonlocal most
        most = max(most, sum(a.nbytes for a in jax.live_arrays()) - before)

    quantize(two, FEW, out=tmp_path / "out", memory=enough, progress=track, **HOW)
    layer = 4 * sum(a.size for n, a in decoded(two).items() if n.startswith("layers.0."))
    assert layer < most <= enough


def test_what_is_written_is_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is read with the codes that were chosen, and the rest as it was but for what took scales; q, k and v, and
    gate and up, are one tensor each."""
    chosen: dict[str, run.Held] = {}
    write = run._Run._write

    def spied(self: Any, work: Path, i: int, own: Any, held: Any) -> None:
        chosen.update({f"layers.{i}.{n}": h for n, h in held.items()})
        write(self, work, i, own, held)

    monkeypatch.setattr(run._Run, "_write", spied)
    source, out, text = GOLDEN / "phi3", tmp_path / "out", "int3:group_size=16"
    arch = arch_of("phi3")
    rows = tokens(arch.config.vocab_size, 5, 24)
    outcome = quantize(source, rows, weights=text, method="awq", out=out, dtype="float32")
    made, plain = decoded(out), decoded(source)
    matrices = {n for n, s in arch.specs().items() if s.out is not None and n.startswith("layers.")}
    assert outcome.lost.keys() == chosen.keys() == matrices
    assert not outcome.refused
    assert all(0 < lost < 0.5 for lost in outcome.lost.values())
    assert jaxengine.load(out).plan.weights == text
    took = {n.split(".")[-1] for n in plain if n not in chosen and (made[n] != plain[n]).any()}
    assert took == {"input_norm", "mlp_norm"}
    with open_source(out, architecture(read_config(out))) as opened:
        for name, held in chosen.items():
            codes = opened.read(name).unpacked()
            np.testing.assert_array_equal(codes.reshape(held.matrix.codes.shape), held.matrix.codes)
            np.testing.assert_allclose(made[name], held.dense, rtol=2.0**-20, atol=1e-7)


def test_what_is_refused(two: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = HOW | {"out": tmp_path / "out"}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"weights": "nf4"}, r"codes are chosen of integer formats: int8, int4, int3, int2.*weights='nf4'"),
        ({"weights": "int4:act_order=true", "method": "awq"}, "act_order is GPTQ's"),
        ({"weights": "int8:outliers=8"}, "leave outliers out"),
        ({"weights": "int8:act_order=true"}, "group_size is 0, one scale for all of a row: say group_size=128"),
        ({"method": "rtn"}, "method is 'rtn'; it can be gptq or awq"),
        ({"dtype": "int8"}, "dtype is 'int8'; it can be float32"),
    )
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said):
            quantize(two, FEW, **given | wrong)
    with pytest.raises(ValueError, match=r"not whole groups of 64.*group_size=32 does"):
        Grid.of("int4:group_size=64", 96)
    with pytest.raises(ValueError, match="context is 400, and the model takes at most 384 tokens"):
        quantize(two, Samples.of(np.zeros((1, 400))), **given)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        quantize(GOLDEN / "phi3", tmp_path / "no.txt", context=16, **(given | {"weights": "int4:group_size=16"}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    with pytest.raises(CheckpointError, match="there and not an empty folder"):
        quantize(two, FEW, **given)
