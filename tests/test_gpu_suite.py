"""scripts/gpu_suite.py on tiny sizes: every measurement gives its rows, and one that fails costs no other.

Numbers are not looked at, but for those that are right or wrong whatever the machine.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_suite  # noqa: E402  # pyright: ignore[reportMissingImports]
from gpu_suite import FULL, MEASUREMENTS, TINY, Measurement  # noqa: E402  # pyright: ignore[reportMissingImports]

from pallas_kernels import aot, dispatch  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="GPUs are supported from Python 3.12 on, and so is this"
)

WAYS = {"eager", "program"}


def rows_of(name: str, folder: Path, **changed: Any) -> list[dict[str, Any]]:
    (found,) = (m for m in MEASUREMENTS if m.name == name)
    rows = list(found.rows(dataclasses.replace(TINY, **changed), folder))
    return json.loads(json.dumps(rows))  # as the file has them


def spreads(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for value in row.values():
        if isinstance(value, dict):
            if "median" in value:
                yield value
            yield from spreads(value)


def check_spreads(rows: list[dict[str, Any]]) -> None:
    found = [s for row in rows for s in spreads(row)]
    assert found
    for s in found:
        assert s["least"] <= s["median"] <= s["most"]
        assert s["rounds"] == TINY.rounds


def test_what_is_asked_of_a_card_is_measured() -> None:
    assert [m.name for m in MEASUREMENTS] == [
        "machine", "transfers", "slices", "passes", "plans", "memory: host, scan", "memory: host, ahead",
        "memory: split, scan", "decoding", "identity", "tables: attention", "tables: quant_matmul", "overlap", "views",
        "serialised", "conditional",
    ]  # fmt: skip
    assert FULL.copies == (8 << 20, 64 << 20, 256 << 20)
    assert FULL.batches == (1, 32, 256)
    layer = gpu_suite.architecture(gpu_suite.shape_8b(FULL, 2, 2048))
    assert gpu_suite.layer_bytes(layer, gpu_suite.Plan(dtype="bfloat16")) == [436224000] * 2


def test_transfers(tmp_path: Path) -> None:
    rows = rows_of("transfers", tmp_path)
    check_spreads(rows)
    for nbytes in TINY.copies:
        of = [r for r in rows if r["bytes"] == nbytes and r["at_once"] == 1 and "numpy" not in r["way"]]
        assert {(r["by"], r["way"]) for r in of} == {(b, w) for b in WAYS for w in ("to device", "to host", "both")}


def test_slices_are_right(tmp_path: Path) -> None:
    rows = rows_of("slices", tmp_path)
    assert len(rows) == 10
    assert all(r["right"] for r in rows), rows


def test_a_wrong_slice_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of openxla/xla#46231: whatever the index, layer 0, 1, 2, ..."""

    def forwards(function: Any, **given: Any) -> Any:
        return lambda stack, order: jax.jit(function)(gpu_suite.pinned(np.asarray(stack)[::-1]), order)

    monkeypatch.setattr(gpu_suite, "compiled_here", forwards)
    monkeypatch.setattr(gpu_suite.selftest, "check_streaming", lambda *args, **given: None)
    rows = rows_of("slices", tmp_path)[:-1]
    assert [r["right"] for r in rows] == [False] * 9


def test_passes(tmp_path: Path) -> None:
    limits, *rows = rows_of("passes", tmp_path)
    assert set(limits["limits"]) == {"link_GBps", "memory_GBps", "matmul_TFLOPs"}
    forms = {
        "device, unrolled",
        "host, scan",
        "host, scan, read by a kernel",
        "host, ahead",
        "host, ahead, double buffering",
    }
    assert {(r["form"], r["batch"]) for r in rows} == {(f, b) for f in forms for b in (*TINY.batches, TINY.widest)}
    check_spreads(rows)
    for row in rows:
        assert row["streamed_bytes"] == (0 if row["form"].startswith("device") else TINY.layers * row["layer_bytes"])
        assert row["fraction_of_limit"] == pytest.approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        at_limit = row["limits_ms_per_layer"][row["limit"]]
        assert at_limit == max(row["limits_ms_per_layer"].values())
        assert row["fraction_of_limit"] == pytest.approx(at_limit / row["ms_per_layer"]["median"])


def test_all_ways_of_a_pass_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a pass over all layers, in order."""
    raw = gpu_suite.shape_8b(TINY, 3, 64)
    tokens, found = jax.numpy.arange(5, dtype=jax.numpy.int32)[:, None], []
    for name in ("device, unrolled", "host, scan", "host, ahead"):
        plan = dataclasses.replace(gpu_suite.places(1)[name], dtype="float32")
        model = gpu_suite.random_model(raw, plan)
        found.append(gpu_suite.one_pass(model.engine, model.params, tokens))
        if name == "host, scan":
            order = jax.numpy.arange(3, dtype=jax.numpy.int32)
            found.append(jax.jit(gpu_suite.pass_by_data, static_argnums=0)(model.engine, model.params, tokens, order))
            back = jax.jit(gpu_suite.pass_by_data, static_argnums=0)(model.engine, model.params, tokens, order[::-1])
    for x in found[1:]:
        np.testing.assert_allclose(x, found[0], atol=1e-5, rtol=0)
    assert abs(np.asarray(back) - np.asarray(found[0])).max() > 1e-3


def test_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = gpu_suite.places
    monkeypatch.setattr(gpu_suite, "places", lambda resident: {"host, scan": places(resident)["host, scan"]})
    limits, *rows = rows_of("decoding", tmp_path)
    assert set(limits["limits"]) == {"link_GBps", "memory_GBps", "matmul_TFLOPs"}
    forms = [("host, scan", b) for b in TINY.batches] + [("host, scan, int4", b) for b in TINY.batches]
    assert [(r["form"], r["batch"]) for r in rows] == forms
    check_spreads(rows)
    plain, coded = rows[0], rows[len(TINY.batches)]
    assert coded["over_bfloat16"] == pytest.approx(coded["tokens_per_s"] / plain["tokens_per_s"])
    # 4 bits and a bfloat16 scale a group, whose least is of 32 inputs here; vectors stay as they are
    assert coded["streamed_bytes"] < 0.5 * plain["streamed_bytes"]


def test_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = {"like layers": gpu_suite.identity_cases(TINY)["like layers"] | {"num_hidden_layers": 3}}
    monkeypatch.setattr(gpu_suite, "IDENTITY", ("device, scan", "host, scan"))
    monkeypatch.setattr(gpu_suite, "identity_cases", lambda size: like)
    rows = rows_of("identity", tmp_path)
    assert [(r["case"], r["form"]) for r in rows] == [("like layers", f) for f in gpu_suite.IDENTITY]
    assert all(r["logits_off"] < 1e-5 and r["gradient_off"] < 1e-4 for r in rows)


def test_memory(tmp_path: Path) -> None:
    rows = rows_of("memory: split, scan", tmp_path)
    assert [r["program"] for r in rows] == ["loading", "decode", "prefill"]
    assert all(r["compiled_here"] > 0 for r in rows[1:])


def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GiB is read, and of each kind there are two matrices."""
    import bench_quant  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(bench_quant, "bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench_quant, "CPU_BYTES", 1)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case once; nothing is kept of tiny sizes, nor of a CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small_products(monkeypatch)
    rows = rows_of("tables: attention", tmp_path) + rows_of("tables: quant_matmul", tmp_path)
    assert [(r["op"], r.get("cache") or r.get("what") or (r["kind"], r["scales"], r["group_size"])) for r in rows] == [
        ("attention", "forward"),
        *(("decode_attention", kind) for kind in ("raw", "int8", "raw, pages of 16", "int4")),
        *(("quant_matmul", of) for of in (
            ("int4", "of groups", 128), ("int4", "of groups, zeros", 128), ("int8", "of outputs", 256),
            ("nf4", "of groups", 64), ("fp8", "of outputs", 256), ("mxfp4", "of groups", 32),
            ("fp8_block", "of groups", 128), ("int4", "of groups", 32), ("int4", "of groups, zeros", 32),
            ("int8", "of groups", 32),
        )),
    ]  # fmt: skip
    assert all(r["dtype"] == "bfloat16" for r in rows)
    assert [list(r["milliseconds"]) for r in rows if r["op"] == "quant_matmul"] == [["xla"]] * 10
    assert not list(tmp_path.iterdir())


def test_what_a_card_measures_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is said to be there: row by row, so that what is cut off costs only the rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = "NVIDIA H200"
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_suite.jax, "devices", lambda: [type("Device", (), {"device_kind": card})])
    row = {"op": "quant_matmul", "kind": "int4", "rows": 1, "milliseconds": {"triton": 1.0, "xla": 2.0}}
    file = dispatch.table_file(card)
    assert "table" not in gpu_suite.kept(TINY, row)
    assert not file.exists()
    first, second = (gpu_suite.kept(FULL, row | {"rows": M}) for M in (1, 16))
    assert first["table"] == second["table"] == str(file)
    assert [r["rows"] for r in json.loads(file.read_text())["rows"]] == [1, 16]


def test_overlap(tmp_path: Path) -> None:
    rows = rows_of("overlap", tmp_path)
    assert [r["way"] for r in rows] == ["copy started after", "copy started before"]
    check_spreads(rows)


def test_views(tmp_path: Path) -> None:
    rows = {r["way"]: r for r in rows_of("views", tmp_path)}
    assert set(rows) == {"dlpack", "pointer", "numpy, copied to pinned", "numpy alone"}
    assert rows["pointer"]["right_on_device"]
    assert rows["pointer"]["same_memory"]


def test_serialised(tmp_path: Path) -> None:
    here, there = rows_of("serialised", tmp_path)
    assert here["right"]
    assert there["left_out"] == "there is no GPU to load it on"


def test_conditional(tmp_path: Path) -> None:
    rows = rows_of("conditional", tmp_path)
    assert [r["way"] for r in rows] == ["no condition", "no miss", "all misses"]
    assert all(r["right"] for r in rows), "a slot does not hold the expert that was asked for"
    check_spreads(rows)


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # large enough that what XLA keeps beside a layer, padding and small tables, is small beside it
    size: dict[str, Any] = {"width": {}, "memory_batch": 4, "memory_length": 512}
    raw, made = gpu_suite.memory_plans(dataclasses.replace(TINY, **size))
    monkeypatch.setattr(gpu_suite, "memory_plans", lambda size: (raw, {"host, scan": made["host, scan"]}))
    (tmp_path / "card").write_text("NVIDIA GeForce RTX 4090")
    program, arithmetic, prefill, decode = rows_of("plans", tmp_path, **size)
    assert [prefill["program"], decode["program"]] == ["prefill", "decode"]
    assert prefill["card"] == program["card"] == "RTX 4090"
    assert prefill["compiled"] > decode["compiled"]
    assert prefill["compiled"] <= arithmetic["arithmetic"] <= 1.05 * prefill["compiled"]
    assert (tmp_path / "program").stat().st_size == program["serialised_bytes"]


def test_bytes_used_stand_beside_those_planned() -> None:
    results = {
        "plans": {
            "rows": [
                {"form": "host, scan", "program": "prefill", "arithmetic": 90},
                {"form": "host, scan", "program": "prefill", "compiled": 80},
                {"form": "host, scan", "program": "decode", "compiled": 50},
                {"program": "a scan over host memory", "serialised_bytes": 1},
            ]
        },
        "memory: host, scan": {
            "rows": [
                {"form": "host, scan", "program": "loading", "peak": 20},
                {"form": "host, scan", "program": "decode", "peak": 55, "compiled_here": 44},
                {"form": "host, scan", "program": "prefill", "peak": None, "compiled_here": 80},
            ]
        },
    }
    (row,) = gpu_suite.against_plan(results)
    assert row["program"] == "decode"
    assert row["peak_of_compiled"] == pytest.approx(1.1)
    assert row["peak_of_compiled_here"] == pytest.approx(1.25)


# --- the runner -----------------------------------------------------------------------------------------------------


def test_one_command_writes_one_file(tmp_path: Path) -> None:
    """With real processes."""
    out = tmp_path / "new" / "results.json"
    ended = CliRunner().invoke(gpu_suite.main, ["--tiny", "--only", "views,serialised", "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    report = json.loads(out.read_text())
    assert report["tiny"] is True
    assert "no measurement" in report["note"]
    assert list(report["measurements"]) == ["machine", "views", "serialised"]
    for found in report["measurements"].values():
        assert found["rows"]
        assert found["seconds"] > 0
        assert "error" not in found
    (here,) = report["measurements"]["machine"]["rows"]
    assert here["jax"] == jax.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert [p.name for p in out.parent.iterdir()] == ["results.json"]


def test_what_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception after a row, a death, and too little time; each is told, and what comes after runs."""
    script = tmp_path / "suite.py"
    script.write_text(
        "import json, os, sys, time\n"
        "name, out = sys.argv[2], sys.argv[4]\n"
        "open(out, 'a').write(json.dumps({'card': 'x', 'first': name}) + '\\n')\n"
        "if name == 'raises': raise ValueError('said so')\n"
        "if name == 'dies': os.abort()\n"
        "if name == 'hangs': time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_suite, "__file__", str(script))
    names = ("machine", "raises", "dies", "hangs", "well")
    made = tuple(Measurement(n, lambda size, folder: iter(()), 1 if n == "hangs" else 60) for n in names)
    monkeypatch.setattr(gpu_suite, "MEASUREMENTS", made)
    out = gpu_suite.run_all(tmp_path / "results.json", True, "", 9.0)
    found = json.loads(out.read_text())["measurements"]
    assert [r["rows"] for r in found.values()] == [[{"card": "x", "first": n}] for n in names]
    assert {n for n in names if "error" in found[n]} == {"raises", "dies", "hangs"}
    assert "said so" in found["raises"]["error"]
    assert "ended with -6" in found["dies"]["error"]
    assert "not done after 1 s" in found["hangs"]["error"]


def test_what_there_is_no_time_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "apart", lambda *given: pytest.fail("it ran"))
    out = gpu_suite.run_all(tmp_path / "results.json", True, "views", 0.1)
    found = json.loads(out.read_text())["measurements"]
    assert {n: r["error"] for n, r in found.items()} == dict.fromkeys(found, "left out: 0.1 minutes are over")


def test_without_a_gpu_only_tiny_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "apart", lambda *given: {"seconds": 1.0, "rows": [{"card": "cpu", "gpu": False}]})
    with pytest.raises(click.UsageError, match=r"There is no GPU here \(jax sees 'cpu'\); --tiny"):
        gpu_suite.run_all(tmp_path / "results.json", False, "", 9.0)
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_result_is_its_card_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    rows = [{"card": "NVIDIA H200", "gpu": True}]
    monkeypatch.setattr(gpu_suite, "apart", lambda *given: {"seconds": 1.0, "rows": rows})
    out = gpu_suite.run_all(None, False, "views", 9.0)
    assert out.parent == tmp_path / "scripts" / "results"
    assert out.name.startswith("nvidia-h200-20")
    assert json.loads(out.read_text())["note"] == ""


def test_slips_are_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "apart", lambda *given: pytest.fail("it ran"))
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    for given, said in (
        (["--only", "transfer", "--out", str(tmp_path / "a.json")], "there is no 'transfer'; the measurements are"),
        (["--out", str(kept)], "is there already"),
        (["--minutes", "0"], "0"),
    ):
        ended = CliRunner().invoke(gpu_suite.main, ["--tiny", *given])
        assert ended.exit_code == 2
        assert said in " ".join(ended.output.split())
    assert kept.read_text() == "kept"
