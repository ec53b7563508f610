"""A card's table for quant_matmul: what scripts/bench_quant.py measured is the order in which implementations are tried.

The times here are made up, as in test_attention_table.py, which has what is the same of every op (a table that is replaced, a
card elsewhere). What follows them is read from which implementation is called while a call is traced for a card that is said
to be there.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels import quant_matmul as op
from pallas_kernels.quant_matmul import layout

CARD = "NVIDIA H200"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_quant")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H200 that is there as far as the dispatcher knows, and a cache folder with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "gpu", lambda: dispatch.Gpu((9, 0), 132, CARD))
    dispatch.measured.cache_clear()
    yield dispatch.table_file(CARD)
    dispatch.measured.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The implementations that a product of M rows comes to, in turn, when the first `refusing` of them refuse."""

    def run(M: int, kind: str = "int4", G: int = 128, affine: bool = False, refusing: int = 0, **how: Any) -> list[str]:
        heard: list[str] = []
        N, K = how.pop("N", 4096), how.pop("K", 4096)

        def standing_for(name: str) -> Any:
            def implementation(x: Any, *rest: Any, **_: Any) -> Any:
                heard.append(name)
                if len(heard) <= refusing:
                    raise dispatch.Refused("not today")
                return x

            return implementation

        like = jax.ShapeDtypeStruct
        x = like((M, K), how.pop("dtype", jnp.bfloat16))
        codes = like((N, K // 4), jnp.uint16) if layout.planes(kind) else like((N, K), jnp.int8)
        scale = like((N, K // G) if G else (N,), jnp.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(op, "IMPLEMENTATIONS", {n: standing_for(n) for n in op.IMPLEMENTATIONS})
            # the arm for a CPU is traced too
            patch.setattr(dispatch.lax, "platform_dependent", lambda *a, cpu, default: default(*a))

            def call(*given: Any) -> Any:
                return op.quant_matmul(*given, kind=kind, group_size=G, dtype=x.dtype, **how)

            jax.eval_shape(call, x, codes, scale, *([scale] if affine else []))
        return heard

    return run


def row(times: dict[str, float], rows: int, **case: Any) -> dict[str, Any]:
    usual = {
        "kind": "int4",
        "scales": "of groups",
        "dtype": "bfloat16",
        "group_size": 128,
        "outputs": 4096,
        "inputs": 4096,
    }
    return {"op": "quant_matmul", **usual, "rows": rows, **case, "milliseconds": times}


def test_without_a_table_the_order_is_derived(asked: Any) -> None:
    assert asked(1, refusing=1) == list(op.ORDER)
    assert asked(4096, refusing=1) == list(op.ORDER)


def test_the_order_is_that_of_the_times(asked: Any) -> None:
    """By kind, zeros, rows, groups and shape; what was not measured comes after, as derived."""
    dispatch.write_table(
        CARD,
        [
            row({"triton": 1.0, "xla": 2.0}, 1),
            row({"triton": 3.0, "xla": 2.0, "mosaic_gpu": 1.0}, 256),
            row({"triton": 9.0, "xla": 2.0}, 4096),
            row({"triton": 3.0, "xla": 2.0}, 1, group_size=32),
            row({"triton": 3.0, "xla": 2.0}, 1, outputs=65536),
            row({"xla": 1.0, "triton": 2.0}, 1, scales="of groups, zeros"),
            row({"xla": 1.0, "triton": 2.0}, 1, kind="int8", scales="of outputs", group_size=4096),
        ],
    )
    assert asked(1) == asked(3) == ["triton"]
    assert asked(100, refusing=2) == ["mosaic_gpu", "xla", "triton"]
    assert asked(4096) == asked(2048) == ["xla"]
    assert asked(1, G=32) == asked(1, G=16) == ["xla"]  # 32 is nearer than 128
    assert asked(1, G=64, N=65536) == ["xla"]  # of two as near the first stays, then the shape decides
    assert asked(1, affine=True) == ["xla"]
    assert asked(1, kind="int8", G=0) == ["xla"]
    assert asked(1, kind="int8", G=64) == ["triton"]  # one scale an output is another case
    assert asked(1, kind="nf4", G=64) == ["triton"]
    assert asked(1, dtype=jnp.float16) == ["triton"]  # not measured


def test_a_name_goes_before_the_table(asked: Any) -> None:
    dispatch.write_table(CARD, [row({"xla": 1.0, "triton": 2.0}, 1)])
    assert asked(1, implementation="triton") == ["triton"]


@pytest.mark.parametrize(("M", "N", "K"), [(0, 16, 64), (3, 0, 64), (3, 16, 0)])
def test_what_is_empty_is_zeros(M: int, N: int, K: int) -> None:
    """Nothing is asked for it, which has no ratio to what was measured."""
    words, scale = jnp.ones((N, K // 4), jnp.uint16), jnp.ones((N, K // 32))
    y = op.quant_matmul(jnp.ones((M, K)), words, scale, kind="int4", group_size=32, dtype="float32")
    assert y.shape == (M, N)
    assert not y.any()


@pytest.mark.parametrize("text", ["", '{"rows": [{"op": "quant_matmul"}]}', '{"card": "NVIDIA A100", "rows": []}'])
def test_a_table_that_is_damaged_or_anothers_is_left_aside(
    asked: Any, here: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    here.parent.mkdir(parents=True)
    here.write_text(text)
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        assert asked(1, refusing=1) == list(op.ORDER)
    [said] = [r.getMessage() for r in caplog.records]
    assert f"{here} is left aside" in said
    assert "bench_quant.py" in said


def timed(bench: Any, monkeypatch: pytest.MonkeyPatch, times: dict[str, float], wrong: str = "") -> None:
    """The benchmark on a card that is said to be there, with implementations that take a made-up time, as does the whole matrix
    ('whole') and a dense one (''); `wrong` gives other numbers than the reference."""

    heard = [""]

    def product(x: Any, codes: Any, scale: Any, zero: Any = None, *, implementation: str, **how: Any) -> Any:
        heard.append(implementation)
        if implementation not in (*times, "reference"):
            raise dispatch.Refused("not today")
        y = op.quant_matmul(x, codes, scale, zero, implementation="reference", **how)
        return y * y.dtype.type(1.25) if implementation == wrong else y

    def turns(function: Any, x: Any, weights: list[Any], options: Any = None) -> Any:
        heard.append("")  # what is dense asks for none
        made = plain(function, x, weights)
        took = times.get(heard[-1], 9.0) / 1e3
        made.time = lambda: took
        return made

    def written_out(*given: Any, **how: Any) -> Any:
        heard.append("whole")
        return whole(*given, **how)

    plain, whole = bench.Turns, bench.whole
    monkeypatch.setattr(bench, "whole", written_out)
    monkeypatch.setattr(bench, "quant_matmul", product)
    monkeypatch.setattr(bench, "Turns", turns)
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    monkeypatch.setattr(bench, "distinct_bytes", lambda: 1)
    monkeypatch.setattr(bench, "often", lambda run: 1)
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench.jax, "devices", lambda: [type("Device", (), {"device_kind": CARD})])


def ran(bench: Any, *given: str, code: int = 0) -> Any:
    found = click.testing.CliRunner().invoke(
        bench.main, ["--shape", "128x256", "--rounds", "1", "--dtype", "float32", *given]
    )
    assert found.exit_code == code, found.output
    return found


def test_what_the_benchmark_measures_is_what_serves(
    bench: Any, asked: Any, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """The benchmark's own cases through `--table` to the dispatcher."""
    with monkeypatch.context() as patch:
        timed(bench, patch, {"triton": 3.0, "xla": 2.0})
        given = [a for kind in ("int4", "int8", "int5") for a in ("--kind", kind)]
        ran(bench, *given, "--rows", "2", "--rows", "64", "--table")
    rows = json.loads(here.read_text())["rows"]
    assert {(r["kind"], r["scales"], r["group_size"], r["rows"]) for r in rows} == {
        (*case, M) for M in (2, 64) for case in (
            ("int4", "of groups", 128), ("int4", "of groups", 32), ("int4", "of groups, zeros", 128),
            ("int4", "of groups, zeros", 32), ("int8", "of outputs", 256), ("int8", "of groups", 32), ("int5", "of groups", 64),
        )
    }  # fmt: skip
    assert rows[0]["milliseconds"] == pytest.approx({"triton": 3.0, "xla": 2.0})
    how: dict[str, Any] = {"N": 128, "K": 256, "dtype": jnp.float32}
    assert asked(2, **how) == ["xla"]
    assert asked(2, affine=True, G=32, **how) == ["xla"]
    assert asked(2, kind="int8", G=0, **how) == ["xla"]
    assert asked(2, kind="nf4", G=64, **how) == ["triton"]  # not measured


def test_what_stands_beside_a_time(bench: Any, monkeypatch: pytest.MonkeyPatch, here: Path, tmp_path: Path) -> None:
    """Ratios to cuBLAS and to the best of XLA's other forms, and aims of what serves: in the table a form nobody is served by
    has no place."""
    with monkeypatch.context() as patch:
        patch.setattr(bench, "AIMS", {"int4": {"128x256": 5.0}})
        timed(bench, patch, {"triton": 2.0, "xla": 4.0, "whole": 1.0, "": 8.0})
        given = ("--kind", "int4", "--rows", "2", "--json", str(tmp_path / "rows"))
        told = ran(bench, *given, "--dtype", "bfloat16", "--table")
    every = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    rows = {r["implementation"]: r for r in every if r["what"] == "int4"}
    assert set(rows) == {"triton", "xla", "xla, whole"}
    assert {n: r["to_bfloat16"] for n, r in rows.items()} == pytest.approx({"triton": 4, "xla": 2, "xla, whole": 8})
    assert {n: r["to_xla"] for n, r in rows.items()} == pytest.approx({"triton": 0.5, "xla": 0.25, "xla, whole": 4})
    triton = rows["triton"]
    assert [n for n, r in rows.items() if r["serves"]] == ["triton"]
    assert triton["aims"] == {"to_bfloat16": 5.0, "to_xla": 1.0}
    assert triton["reached"] == {"to_bfloat16": False, "to_xla": False}
    assert not rows["xla"]["aims"]
    assert not rows["xla, whole"]["aims"]
    nbytes = 128 * 256 / 2 + 128 * 2 * 2  # codes and scales
    assert triton["gigabytes"] == pytest.approx(nbytes / 2e-3 / 1e9)
    assert triton["fraction"] == pytest.approx(nbytes / 2e-3 / 1e12)
    kept = json.loads(here.read_text())["rows"][0]["milliseconds"]
    assert kept == pytest.approx({"triton": 2, "xla": 4})
    assert "5 to bfloat16, 1 to xla" in " ".join(told.output.split())


def test_what_gives_other_numbers_is_left_out(bench: Any, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    with monkeypatch.context() as patch:
        timed(bench, patch, {"triton": 1.0, "xla": 2.0}, wrong="triton")
        told = ran(bench, "--kind", "int4", "--affine", "--rows", "2", "--table")
    [kept] = json.loads(here.read_text())["rows"]
    assert (kept["milliseconds"], kept["scales"]) == ({"xla": pytest.approx(2.0)}, "of groups, zeros")
    assert re.search(
        r"triton: other numbers than the reference's, by \d\S* of the bound; left out", " ".join(told.output.split())
    )


def test_what_is_held_against_nothing_stands_in_no_table(
    bench: Any, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """It is measured all the same, and told."""

    def failing(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        timed(bench, patch, {"triton": 1.0, "xla": 2.0})
        patch.setattr(bench, "exact", failing)
        told = ran(bench, "--kind", "nf4", "--rows", "2", "--table", code=1)
    assert not here.exists()
    said = " ".join(told.output.split())
    assert (
        "not written to the table: nf4: the reference, against which numbers are held, did not run: RuntimeError"
        in said
    )
    assert "triton" in said


def test_aims_are_of_a_gpu_and_few_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.aims_of("int4", (4096, 14336), 1) == {}
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    found = [bench.aims_of("int4", bench.parsed(s), 16) for s in bench.GPU_SHAPES]
    assert found == [{"to_bfloat16": of, "to_xla": 1.0} for of in (1.4, 2.4, 3.0)]
    for kind, shape, rows in (("int4", (4096, 14336), 17), ("int4", (128, 256), 1), ("fp8", (4096, 4096), 1)):
        assert bench.aims_of(kind, shape, rows) == {"to_xla": 1.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_no_other_number(bench: Any, dtype: str) -> None:
    """A weight rounded to bfloat16 with its scale on is; scales that are two in a hundred off, or one that is lost, are not."""
    kind = bench.Kind("int4", 32, True)
    codes, scale, zero = bench.matrix(kind, 64, 512, 0)
    x = jax.random.normal(jax.random.key(0), (4, 512), dtype)

    def product(scale: Any, name: str) -> Any:
        how: dict[str, Any] = {"kind": "int4", "group_size": 32, "dtype": x.dtype, "implementation": name}
        return op.quant_matmul(x, codes, scale, zero, **how)

    meant = product(scale, "reference")
    assert bench.alike(product(scale, "xla"), meant, 512)
    dense = op.reference.dense(codes, scale, zero, kind="int4", group_size=32).astype(dtype).astype(jnp.float32)
    assert bench.alike((x.astype(jnp.float32) @ dense.T).astype(dtype), meant, 512)
    assert not bench.alike(product(scale.astype(jnp.float32) * jnp.float32(1.02), "reference"), meant, 512)
    assert not bench.alike(product(scale.at[:, 3].set(0), "reference"), meant, 512)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--table"], "--table is of a GPU"),
        (["--affine"], "say which with --kind"),
        (["--kind", "nf4", "--affine"], "nf4 has no zeros; int5, int4, int3, int2 have"),
        (["--kind", "fp8", "--group-size", "32"], "fp8 has no other groups; int8, int5"),
        (["--kind", "int4", "--group-size", "96"], "96 is no multiple of 16 that divides the inputs, 4096, 4096"),
        (["--decode", "--table"], "--table is of single products"),
        (["--decode", "--compiled"], "--compiled is of single products"),
        (["--compiled", "--table"], "--table is of speed: leave it out with --compiled"),
    ],
)
def test_slips_are_refused(bench: Any, given: list[str], said: str) -> None:
    found = click.testing.CliRunner().invoke(bench.main, given)
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())
