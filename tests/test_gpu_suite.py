"""scripts/gpu_suite.py on tiny sizes: every measurement gives its rows, and one that fails costs no other.

Numbers are not looked at, but for those that are right or wrong whatever the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aims stand in rows as on a card."""
    aim = lambda of, least, got: {"aim": least, "aim_of": of, "reached": got >= least}  # noqa: E731
    monkeypatch.setattr(gpu_suite, "aim", aim)


def aims_of(name: str, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(case, what, how much) of everything that is asked, each of a number that was measured and rightly judged."""
    found = gpu_suite.aims({name: {"rows": rows}})
    assert all(a["reached"] == (a["got"] >= a["aim"]) for a in found)
    return [(a["case"], a["of"], a["aim"]) for a in found]


def test_an_aim_is_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_suite.aim("rate", 0.9, 1.0) == {}
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    assert gpu_suite.aim("rate", 0.9, 0.89) == {"aim": 0.9, "aim_of": "rate", "reached": False}
    assert gpu_suite.aim("rate", 0.9, 0.9)["reached"]


def test_short_measurements_have_their_time_however_slow_the_card() -> None:
    """Those of which nothing else tells, and all before them, may take their most: the total is not over."""
    (minutes,) = (option.default for option in gpu_suite.main.params if option.name == "minutes")
    until = list(itertools.accumulate(m.limit for m in MEASUREMENTS))
    ends = {m.name: end for m, end in zip(MEASUREMENTS, until, strict=True)}
    for name in ("transfers", "slices", "overlap", "views", "program", "serialised", "conditional"):
        assert ends[name] <= 60 * minutes == 570, name
    assert ends["program"] < ends["serialised"]  # which loads it


def test_what_is_asked_of_a_card_is_measured() -> None:
    assert [m.name for m in MEASUREMENTS] == [
        "machine", "transfers", "slices", "overlap", "views", "program", "serialised", "conditional", "passes", "plans",
        "memory: host, scan", "memory: host, ahead", "memory: split, scan", "decoding", "finetuning", "identity",
        "attention: mosaic_gpu", "attention: forward", "attention: backward", "attention: decode",
        "quant_matmul: mosaic_gpu", "quant_matmul: 4096x14336", "quant_matmul: 8192x28672", "quant_matmul: 4096x4096",
    ]  # fmt: skip
    # of all kinds, what has an aim of bfloat16's speed comes first
    import bench_quant as bench  # pyright: ignore[reportMissingImports]

    groups = gpu_suite.product_groups(FULL, bench)
    kinds = [[str(k) for k in kinds] for kinds, _ in groups]
    assert (kinds[0], set(groups[0][1])) == (["int4", "int8", "nf4"], {1, 4, 16})
    assert (kinds[1], set(groups[1][1])) == (kinds[0], {64, 256, 4096})
    every: dict[str, set[int]] = {}
    for names, (_, rows) in zip(kinds, groups, strict=True):
        for name in names:
            every.setdefault(name, set()).update(rows)
    assert set(every) == {*map(str, bench.OTHERS), *bench.GROUPS}
    assert all(rows >= {1, 4, 16, 64, 256, 4096} for rows in every.values())
    assert {"{}x{}".format(*shape) for shape in FULL.table_matrices} == set(bench.GPU_SHAPES)
    assert set(FULL.table_tokens) == {1024 * 2**i for i in range(6)}
    assert set(FULL.table_heads) == {64, 128, 256}
    assert (min(FULL.table_slots), max(FULL.table_slots)) == (8192, 131072)
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


def test_passes(tmp_path: Path, asked: None) -> None:
    limits, *rows = rows_of("passes", tmp_path)
    assert set(limits["limits"]) == {"link_GBps", "memory_GBps", "matmul_TFLOPs"}
    forms = {
        "device, unrolled",
        "host, scan",
        "host, scan, read by a kernel",
        "host, ahead",
        "host, ahead, double buffering",
        "host, python",
    }
    assert {(r["form"], r["batch"]) for r in rows} == {(f, b) for f in forms for b in (*TINY.batches, TINY.widest)}
    check_spreads(rows)
    for row in rows:
        assert row["streamed_bytes"] == (0 if row["form"].startswith("device") else TINY.layers * row["layer_bytes"])
        assert row["fraction_of_limit"] == pytest.approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        at_limit = row["limits_ms_per_layer"][row["limit"]]
        assert at_limit == max(row["limits_ms_per_layer"].values())
        assert row["fraction_of_limit"] == pytest.approx(at_limit / row["ms_per_layer"]["median"])
    # of what serves, at the numbers of rows that the link limits
    assert aims_of("passes", rows) == [
        (f"{form}, {batch}", "fraction_of_limit", 0.9)
        for form in ("host, scan", "host, ahead", "host, python")
        for batch in TINY.batches
    ]


def test_all_ways_of_a_pass_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a pass over all layers, in order."""
    raw = gpu_suite.shape_8b(TINY, 3, 64)
    tokens, found = jax.numpy.arange(5, dtype=jax.numpy.int32)[:, None], []
    model = gpu_suite.random_model(raw, dataclasses.replace(gpu_suite.PYTHON_PLAN, dtype="float32"))
    found.append(gpu_suite.pass_from_python(model.engine, model.params, tokens))
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


def test_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: None) -> None:
    places = gpu_suite.places
    monkeypatch.setattr(gpu_suite, "places", lambda resident: {"host, scan": places(resident)["host, scan"]})
    limits, *rows = rows_of("decoding", tmp_path)
    assert set(limits["limits"]) == {"link_GBps", "memory_GBps", "matmul_TFLOPs"}
    forms = [(f, b) for f in ("host, scan", "host, python", "host, scan, int4") for b in TINY.batches]
    assert [(r["form"], r["batch"]) for r in rows] == forms
    check_spreads(rows)
    plain, coded = rows[0], rows[2 * len(TINY.batches)]
    assert coded["over_bfloat16"] == pytest.approx(coded["tokens_per_s"] / plain["tokens_per_s"])
    # 4 bits and a bfloat16 scale a group, whose least is of 32 inputs here; vectors stay as they are
    assert coded["streamed_bytes"] < 0.5 * plain["streamed_bytes"]
    assert (TINY.batches, gpu_suite.OF_LINK) == ((1,), 0.9)
    assert aims_of("decoding", rows) == [
        ("host, scan, 1", "fraction_of_limit", 0.9), ("host, python, 1", "fraction_of_limit", 0.9),
        ("host, scan, int4, 1", "over_bfloat16", 3.4),
    ]  # fmt: skip


def test_finetuning(tmp_path: Path, asked: None) -> None:
    """The same losses from every place; what is kept of the resident rate stands beside the aim where there is one."""
    limits, *rows = rows_of("finetuning", tmp_path)
    assert set(limits["limits"]) == {"link_GBps", "memory_GBps", "matmul_TFLOPs"}
    forms = ("device, unrolled", "host, scan", "host, ahead")
    assert [(r["form"], r["tokens_a_step"]) for r in rows] == [(f, b * t) for b, t in TINY.tuned for f in forms]
    check_spreads([r | {"seconds": r["seconds"] | {"rounds": TINY.rounds}} for r in rows])
    assert {b * t for b, t in FULL.tuned} == {4096, 16384, 65536}
    assert rows[0]["of_resident"] == 1
    for r in rows:
        assert r["loss"] == pytest.approx(rows[0]["loss"], rel=2**-8)  # of bfloat16
        assert r["of_resident"] == pytest.approx(r["tokens_per_s"] / rows[0]["tokens_per_s"])
        assert r["hfu"] == pytest.approx(1.5 * r["mfu"])
        assert (r["link_limit_s"] > 0) == ("host" in r["form"])
    assert (FULL.tuned_tokens, TINY.tuned_tokens) == (16384, 32)
    assert aims_of("finetuning", rows) == [
        (f"{form}, {b}", "of_resident", 0.9) for b, _ in TINY.tuned for form in ("host, scan", "host, ahead")
    ]


@pytest.mark.parametrize("layers", ["like layers", "unlike layers"])
def test_identity(layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every home, from disk too, in a form that each family is streamed in, and what is asked of it on a card."""
    cases = {layers: gpu_suite.identity_cases(TINY)[layers] | {"num_hidden_layers": 4}}
    homes = ("device, scan", "host, scan", "host, python", "disk, python")
    assert set(homes) < set(gpu_suite.IDENTITY)
    monkeypatch.setattr(gpu_suite, "IDENTITY", homes)
    monkeypatch.setattr(gpu_suite, "identity_cases", lambda size: cases)
    rows = rows_of("identity", tmp_path)
    assert [(r["layers"], r["form"]) for r in rows] == [(layers, f) for f in homes]
    assert all(r["logits_off"] < 1e-5 and (r["gradient_off"] or 0) < 1e-4 for r in rows)
    assert [r["gradient_off"] is None for r in rows] == [False, False, True, True]
    assert [r.get("like") for r in rows] == [None, "device, scan", None, "host, python"]
    assert not any("aims" in r for r in rows)
    both = {"logits_of_like": 1, "within_rounding": 1}
    of = [{}, both, {"within_rounding": 1}, both]
    found = aims_of("identity", [r | {"aims": a} for r, a in zip(rows, of, strict=True)])
    assert [a[0] for a in found] == [f"{layers}, {homes[i]}" for i in (1, 1, 2, 3, 3)]
    assert all(r["within_rounding"] and r["logits_of_like"] for r in rows if "like" in r), rows


def test_other_numbers_are_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of the checkpoint on disk is another one: neither the same bits nor within rounding."""
    cases = {"like layers": gpu_suite.identity_cases(TINY)["like layers"] | {"num_hidden_layers": 2}}
    monkeypatch.setattr(gpu_suite, "IDENTITY", ("host, python", "disk, python"))
    monkeypatch.setattr(gpu_suite, "identity_cases", lambda size: cases)
    load = gpu_suite.load

    def other(folder: Path, **given: Any) -> Any:
        file = next(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-64:] = bytes(64)  # numbers of the last tensor
        file.write_bytes(content)
        return load(folder, **given)

    monkeypatch.setattr(gpu_suite, "load", other)
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    rows = rows_of("identity", tmp_path)
    assert [r.get("aims") for r in rows] == [None, {"logits_of_like": 1, "within_rounding": 1}]
    found = gpu_suite.aims({"identity": {"rows": rows}})
    assert [(a["case"], a["of"], a["got"], a["reached"]) for a in found] == [
        ("like layers, disk, python", "logits_of_like", False, False),
        ("like layers, disk, python", "within_rounding", False, False),
    ]


def test_memory(tmp_path: Path) -> None:
    rows = rows_of("memory: split, scan", tmp_path)
    assert [r["program"] for r in rows] == ["loading", "decode", "prefill"]
    assert all(r["compiled_here"] > 0 for r in rows[1:])


KINDS = (
    "int4", "int8", "nf4", "int4, groups of 128, zeros", "mxfp4", "fp8", "fp8_block", "int4, groups of 32",
    "int4, groups of 32, zeros", "int8, groups of 32", "int5", "int3", "int2",
)  # fmt: skip


def test_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case once, beside the whole matrix written out and a dense one; nothing is kept of tiny sizes, nor of a CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limits, *rows = rows_of("quant_matmul: 4096x14336", tmp_path)
    assert limits["limits"]["memory_GBps"] > 0
    assert FULL.table_bytes is None  # what the card's cache asks for
    assert [r["case"] for r in rows] == list(KINDS)
    assert [(r["op"], r["kind"], r["scales"], r["group_size"]) for r in rows[:4]] == [("quant_matmul", *of) for of in (
        ("int4", "of groups", 128), ("int8", "of outputs", 256), ("nf4", "of groups", 64),
        ("int4", "of groups, zeros", 128),
    )]  # fmt: skip
    for row in rows:
        assert not {"wrong", "left_out", "unchecked"} & set(row), row
        assert (row["outputs"], row["inputs"], row["rows"], row["dtype"]) == (128, 256, 1, "bfloat16")
        sides = {s["implementation"]: s for s in row["sides"]}
        assert list(sides) == ["xla", "xla, whole"]
        ours, whole = sides.values()
        # what nobody is served by is in no table
        assert row["milliseconds"] == {"xla": ours["ms"]}
        assert (ours["serves"], whole["serves"]) == (True, False)
        assert ours["to_xla"] == pytest.approx(whole["ms"] / ours["ms"])
        assert ours["to_bfloat16"] == pytest.approx(row["dense_milliseconds"]["bfloat16"] / ours["ms"])
        assert ours["fraction"] == pytest.approx(ours["gigabytes"] / limits["limits"]["memory_GBps"])
        assert "aims" not in ours  # which are of a GPU
    int4 = {s["implementation"]: s for s in rows[0]["sides"]}["xla"]
    assert int4["gigabytes"] * int4["ms"] * 1e6 == pytest.approx(128 * 256 / 2 + 128 * 2 * 2)
    assert not list(tmp_path.iterdir())


def test_products_ask_for_a_kernel_that_may_hang_only_after_it_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = rows_of("quant_matmul: mosaic_gpu", tmp_path)
    assert set(first["left_out"]) == {"mosaic_gpu"}  # on a CPU, which is an answer
    assert list(first["ms"]) == ["xla"]
    assert not gpu_suite.aims({"quant_matmul: mosaic_gpu": {"rows": [first]}})
    assert (tmp_path / gpu_suite.PRODUCTS_PROBED).exists()
    import bench_quant as bench  # pyright: ignore[reportMissingImports]

    seen: list[list[str]] = []

    def measured(groups: Any, shapes: Any, rounds: int, dtype: Any, limit: float, *more: Any) -> Any:
        names = more[1]
        seen.append(list(names))
        yield bench.Kind.usual("int4"), None, bench.Found([], {}, {}, {"triton": "not today"}, "")

    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    _, row = gpu_suite.products(TINY, tmp_path, 0)
    assert row["left_out"] == {"triton": "not today"}
    (tmp_path / gpu_suite.PRODUCTS_PROBED).unlink()
    _, row = gpu_suite.products(TINY, tmp_path, 0)
    assert row["left_out"] == {"triton": "not today", "mosaic_gpu": "it did not come back from its first calls"}
    assert seen == [list(bench.GPU_NAMES), [n for n in bench.GPU_NAMES if n != "mosaic_gpu"]]


def test_a_wrong_product_is_a_row_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and in no table."""
    import bench_quant as bench  # pyright: ignore[reportMissingImports]

    whole = bench.whole
    monkeypatch.setattr(bench, "whole", lambda x, w, kind: whole(x, w, kind) * x.dtype.type(1.25))
    monkeypatch.setattr(gpu_suite, "product_groups", lambda size, bench: [([bench.Kind.usual("int4")], (1,))])
    _, row = rows_of("quant_matmul: 8192x28672", tmp_path)
    assert (row["outputs"], row["inputs"]) == TINY.table_matrices[1]
    assert set(row["wrong"]) == {"xla, whole"}
    assert row["wrong"]["xla, whole"] == pytest.approx(0.25 / (2 * 2**-7), rel=0.1)
    assert [s["implementation"] for s in row["sides"]] == ["xla"]


REFUSED = ["a soft-cap", "sinks", "packed texts", "a window"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_of_prompts(direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ones are rows of a table, the way back with its forward; rates and fractions stand beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits, *rows = rows_of(f"attention: {direction}", tmp_path)
    assert set(limits["limits"]) == {"memory_GBps", "matmul_TFLOPs"}
    assert [r["case"] for r in rows] == [direction, *(f"{direction}, {n}" for n in REFUSED)]
    assert [r.get("what") for r in rows] == [
        "forward" if direction == "forward" else "forward and backward",
        *[None] * 4,
    ]
    for row in rows:
        assert not {"wrong", "left_out", "unchecked"} & set(row), row
        sides = {s["by"]: s for s in row["sides"]}
        assert set(sides) >= {"ours", "ours, xla"}
        for s in sides.values():
            assert s["off"] <= 1
            assert s["fraction"] == pytest.approx(s["teraflops"] / limits["limits"]["matmul_TFLOPs"])
        least = min(s["ms"] for n, s in sides.items() if n.endswith("xla"))
        assert sides["ours"]["to_xla"] == pytest.approx(least / sides["ours"]["ms"])
    plain = {s["by"]: s for s in rows[0]["sides"]}["ours, xla"]
    assert rows[0]["milliseconds"] == {"xla": plain["ms" if direction == "forward" else "both_ms"]}
    assert (direction == "backward") == ("both_ms" in plain and plain["both_ms"] > plain["ms"])
    pairs = 32 * 33 / 2  # of queries and keys; B1 N8 H16, a multiplication and an addition, two products, or five
    assert plain["teraflops"] * 1e9 * plain["ms"] == pytest.approx(
        4 * 8 * 16 * pairs * (1 if direction == "forward" else 2.5)
    )
    assert not list(tmp_path.iterdir())


def test_attention_of_caches(tmp_path: Path) -> None:
    limits, *rows = rows_of("attention: decode", tmp_path)
    kinds = ["raw", "int8", "raw, pages of 64", "raw, pages of 16", "int8, pages of 64", "int4"]
    assert [r["cache"] for r in rows] == kinds
    times = {r["cache"]: r["milliseconds"]["xla"] for r in rows}
    for row in rows:
        assert not {"wrong", "left_out", "unchecked"} & set(row), row
        side = {s["by"]: s for s in row["sides"]}["ours, xla"]
        assert side["fraction"] == pytest.approx(side["gigabytes"] / limits["limits"]["memory_GBps"])
        codec, _, pages = row["cache"].partition(", ")
        raw = f"raw, {pages}" if pages else "raw"
        wanted = None if codec == "raw" else pytest.approx(times[raw] / times[row["cache"]])
        assert side.get("to_raw") == wanted


def attention_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with caches that are read by our form in XLA alone, one kind of them."""
    import bench_attention as bench  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(bench, "KINDS", ("raw",))
    decodes = bench.decodes

    def raw(lengths: Any, widths: Any, kinds: Any, *rest: Any) -> Any:
        return decodes(lengths, widths, ["raw"], *rest)

    monkeypatch.setattr(bench, "decodes", raw)
    monkeypatch.setattr(
        gpu_suite, "caches_of", lambda size, bench, dtype: bench.decodes((64,), (16,), (), dtype, ["xla"])
    )
    return bench


def test_a_wrong_kernel_is_a_row_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much, and not in the table."""
    bench = attention_bench(monkeypatch)
    right = bench.decode_attention

    def broken(implementation: Any, **how: Any) -> Any:
        out = right(**how, implementation=implementation or "xla")
        return out if implementation else out.at[0, 0, 3].multiply(1.25)  # one head of 32

    monkeypatch.setattr(bench, "decode_attention", broken)
    _, row = rows_of("attention: decode", tmp_path)
    assert set(row["wrong"]) == {"ours"}
    # a quarter of a row beside twice of two epsilons, for there is little else
    assert row["wrong"]["ours"] == pytest.approx(0.25 / (4 * 2**-7), rel=0.1)
    assert "ours" not in {s["by"] for s in row["sides"]}


def test_without_the_form_in_xla_nothing_is_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = attention_bench(monkeypatch)
    right = bench.decode_attention

    def failing(implementation: Any, **how: Any) -> Any:
        if implementation == "xla":
            raise RuntimeError("out of memory\nand more")
        return right(**how, implementation=implementation)

    monkeypatch.setattr(bench, "decode_attention", failing)
    monkeypatch.setattr(gpu_suite, "kept", lambda *given: pytest.fail("it was kept"))
    _, row = rows_of("attention: decode", tmp_path)
    assert row["left_out"] == {"ours, xla": "RuntimeError: out of memory"}
    assert "did not run: RuntimeError: out of memory" in row["unchecked"]
    assert "milliseconds" not in row
    assert "ours" in {s["by"] for s in row["sides"]}


def test_a_kernel_that_may_hang_is_asked_for_only_after_it_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it refuses, which is an answer; on a card nothing asks for it before there was one."""
    (row,) = rows_of("attention: mosaic_gpu", tmp_path)
    assert row["off"] is None
    assert set(row["left_out"]) == {"ours, mosaic_gpu"}
    assert (tmp_path / "mosaic_gpu").exists()
    import bench_attention as bench  # pyright: ignore[reportMissingImports]

    seen: list[set[str]] = []

    def measured(cases: Any, rounds: int, limits: Any) -> Any:
        for case in cases:
            seen.append(set(case.sides))
            yield case, bench.Found([], {}, {}, "")

    sides = dict.fromkeys(("ours", "ours, mosaic_gpu", "ours, xla"))
    plain = bench.Case("forward", "", sides, 1.0, None, {}, (1, 1), {})
    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_suite, "prompts_of", lambda *given: iter((plain, plain._replace(key=None))))
    rows = list(gpu_suite.attention_forward(TINY, tmp_path))
    # what serves without being named is one of the others, where it has no aim of its own
    assert seen == [{"ours, mosaic_gpu", "ours, xla"}, set(sides)]
    (tmp_path / "mosaic_gpu").unlink()
    rows = list(gpu_suite.attention_forward(TINY, tmp_path))
    assert seen[2:] == [{"ours, xla"}, {"ours", "ours, xla"}]
    assert all("did not come back" in r["left_out"]["ours, mosaic_gpu"] for r in rows[1:])


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


def test_tables_are_left_alone_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line through the process of a measurement, which is run here, to what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_suite, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_suite, "start_jax", lambda: None)
    case = {"op": "quant_matmul", "kind": "int4", "rows": 1, "milliseconds": {"triton": 1.0}}

    def rows(size: Any, folder: Path) -> Any:
        yield gpu_suite.kept(size, case)

    monkeypatch.setattr(gpu_suite, "MEASUREMENTS", (Measurement("machine", rows, 60),))
    monkeypatch.setattr(gpu_suite, "FULL", dataclasses.replace(TINY, tables=True))
    card = gpu_suite.jax.devices()[0].device_kind
    careful = dispatch.write_table(card, [case | {"milliseconds": {"xla": 0.5}}])
    asked: list[tuple[str, ...]] = []

    def run(command: list[str], **how: Any) -> Any:
        asked.append(tuple(command[2:]))
        ended = CliRunner().invoke(gpu_suite.main, command[2:])
        return type("Ended", (), {"returncode": ended.exit_code})

    monkeypatch.setattr(gpu_suite.subprocess, "run", run)
    for more, times in ((["--keep-tables"], {"xla": 0.5}), ([], {"triton": 1.0})):
        out = tmp_path / f"{len(more)}.json"
        # the measurement says nothing of a card, which is told after it was written
        ended = CliRunner().invoke(gpu_suite.main, ["--out", str(out), *more])
        assert "There is no GPU here" in ended.output
        assert ("--keep-tables" in asked[-1]) == bool(more)
        assert json.loads(careful.read_text())["rows"] == [case | {"milliseconds": times}]
    shown = " ".join(CliRunner().invoke(gpu_suite.main, ["--help"]).output.split())
    assert "Leave the card's table, which decides what serves, as it is" in shown


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
    (program,) = rows_of("program", tmp_path)
    arithmetic, prefill, decode = rows_of("plans", tmp_path, **size)
    assert [prefill["program"], decode["program"]] == ["prefill", "decode"]
    assert prefill["card"] == program["card"] == "RTX 4090"
    assert prefill["compiled"] > decode["compiled"]
    assert prefill["compiled"] <= arithmetic["arithmetic"] <= 1.05 * prefill["compiled"]
    assert (tmp_path / "program").stat().st_size == program["serialised_bytes"]


def test_bytes_used_stand_beside_those_planned() -> None:
    results: dict[str, Any] = {
        "plans": {
            "rows": [
                {"form": "host, scan", "program": "prefill", "arithmetic": 90},
                {"form": "host, scan", "program": "prefill", "compiled": 80},
                {"form": "host, scan", "program": "decode", "compiled": 50},
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
    results["plans"]["rows"].append({"form": "split, scan", "program": "prefill", "arithmetic": 96, "compiled": 90})
    results["memory: split, scan"] = {"rows": [{"form": "split, scan", "program": "prefill", "peak": 100}]}
    results["plans"]["rows"].append({"form": "host, ahead", "program": "decode", "compiled": 90})
    hidden = {"form": "host, ahead", "program": "decode", "peak": 90, "hidden": "not known", "compiled_here": 80}
    results["memory: host, ahead"] = {"rows": [hidden]}
    row, other, unknown = gpu_suite.against_plan(results)
    assert row["program"] == "decode"
    assert row["aims"] == {"agrees_with_compiled": 0.95}  # what was compiled on the card itself is no plan
    assert other["agrees_with_arithmetic"] == pytest.approx(1 - 4 / 96)
    assert unknown["peak_of_compiled"] == 1
    found = [tuple(a[k] for k in ("measurement", "case", "of", "reached")) for a in gpu_suite.aims(results)]
    assert found == [
        ("memory against plan", "host, scan, decode", "agrees_with_compiled", False),  # 10 % more
        ("memory against plan", "split, scan, prefill", "agrees_with_compiled", False),  # 11 %
        ("memory against plan", "split, scan, prefill", "agrees_with_arithmetic", True),  # 4 %
        ("memory against plan", "host, ahead, decode", "agrees_with_compiled", None),
    ]
    assert row["peak_of_compiled"] == pytest.approx(1.1)
    assert row["peak_of_compiled_here"] == pytest.approx(1.25)


def test_all_aims_stand_together() -> None:
    """Of rows, of their sides, and of sides with several."""
    results: dict[str, Any] = {
        "decoding": {"rows": [
            {"form": "int4", "batch": 1, "over_bfloat16": 3.5, "aim": 3.4, "aim_of": "over_bfloat16", "reached": True},
        ]},
        "attention": {"rows": [
            {"case": "forward", "sides": [
                {"by": "ours", "shape": "T8", "to_cudnn": 0.5, "aim": 0.92, "aim_of": "to_cudnn", "reached": False},
                {"by": "ours, triton", "aim": 0.55, "aim_of": "to_cudnn"}, {"by": "jax", "to_xla": 3.0},
            ]},
        ]},
        "products": {"rows": [
            {"limits": {}}, {"case": "int4", "sides": [
                {"implementation": "triton", "rows": 16, "shape": [4, 8], "to_bfloat16": 1.6, "to_xla": 0.9,
                 "aims": {"to_bfloat16": 1.4, "to_xla": 1.0}},
            ]},
        ]},
    }  # fmt: skip
    found = [tuple(a[k] for k in ("case", "by", "of", "aim", "got", "reached")) for a in gpu_suite.aims(results)]
    assert found == [
        ("int4, 1", None, "over_bfloat16", 3.4, 3.5, True), ("forward, T8", "ours", "to_cudnn", 0.92, 0.5, False),
        ("forward", "ours, triton", "to_cudnn", 0.55, None, None), ("int4, [4, 8], 16", "triton", "to_bfloat16", 1.4, 1.6, True),
        ("int4, [4, 8], 16", "triton", "to_xla", 1.0, 0.9, False),
    ]  # fmt: skip


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


def test_what_shares_the_time_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off, in the middle of a line too, it is told, and is no error unless there was nothing."""
    script = tmp_path / "suite.py"
    script.write_text(
        "import json, sys, time\n"
        "name, out = sys.argv[2], sys.argv[4]\n"
        "if name != 'slow': open(out, 'a').write(json.dumps({'first': name}) + '\\n' + '{\"second\": ')\n"
        "if name != 'machine': time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_suite, "__file__", str(script))
    made = tuple(Measurement(n, lambda size, folder: iter(()), 1, shares=True) for n in ("machine", "cut", "slow"))
    monkeypatch.setattr(gpu_suite, "MEASUREMENTS", made)
    out = gpu_suite.run_all(tmp_path / "results.json", True, "", 9.0)
    machine, cut, slow = json.loads(out.read_text())["measurements"].values()
    assert machine["rows"] == [{"first": "machine"}]
    assert not {"cut", "error"} & set(machine)
    assert (cut["rows"], cut["cut"]) == ([{"first": "cut"}], "not done after 1 s")
    assert (slow["rows"], slow["error"]) == ([], "not done after 1 s")


def test_the_time_that_is_left_is_divided() -> None:
    """Into parts by their limits where there is less than those, and never so small that nothing would come of it."""
    three = [Measurement(str(n), lambda *given: iter(()), n, shares=True) for n in (200, 200, 100)]
    plain = Measurement("plain", lambda *given: iter(()), 60)
    share = gpu_suite.seconds_for
    assert share(plain, three, 500) == 60
    assert share(plain, three, 20) == 20
    assert share(three[0], three[1:], 250) == 100
    assert share(three[0], three[1:], 2000) == 200
    assert share(three[0], three[1:], 50) == 40
    assert share(three[0], three[1:], 30) == 30
    assert share(three[2], [], 90) == 90


def test_of_attention_one_can_be_asked_for() -> None:
    """In full, and then what it looks at goes before it."""
    names = lambda only: [m.name for m in gpu_suite.chosen_measurements(only)]  # noqa: E731
    assert names("quant_matmul: 4096x4096") == ["machine", "quant_matmul: mosaic_gpu", "quant_matmul: 4096x4096"]
    assert names("attention: decode") == ["machine", "attention: mosaic_gpu", "attention: decode"]
    assert names("attention")[1:] == [m.name for m in MEASUREMENTS if m.name.startswith("attention")]


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
