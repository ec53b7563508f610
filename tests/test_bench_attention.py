"""scripts/bench_attention.py: which numbers pass for the same, what stands beside a time, and what comes into a card's table.

Times are made up, by a clock that sides move; what is computed is small, on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cards, dispatch

ROOT = Path(__file__).parent.parent
CARD = "NVIDIA H200"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_attention")


# ---- which numbers are the same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_wrong_row_of_small_values_shows(bench: Any, dtype: str) -> None:
    """A hundredth of the others, which a bound of the whole array's largest would let pass."""
    meant = jax.random.normal(jax.random.key(0), (2, 50, 4, 64), jnp.float32).at[1, 7, 2].multiply(0.01)
    meant = meant.astype(dtype)
    again = meant + (jnp.finfo(dtype).eps / 2 * jnp.abs(meant)).astype(dtype)
    assert bench.alike(meant, meant, (64, 50)) == 0
    assert 0 < bench.alike(again, meant, (64, 50)) < 1
    wrong = meant.at[1, 7, 2].set(0)
    assert float(jnp.abs(wrong - meant).max()) < 64 * float(jnp.finfo("bfloat16").eps) * float(jnp.abs(meant).max())
    assert bench.alike(wrong, meant, (64, 50)) > 1
    assert bench.alike(meant.at[0, 0, 0, 0].set(jnp.nan), meant, (64, 50)) == 1e30
    assert bench.alike((meant, wrong), (meant, meant), (64, 50)) > 1
    # what stands beside rounding is room for its own rows alone
    room = jnp.zeros(meant.shape[:3]).at[1, 7, 2].set(1.0)
    assert bench.alike(wrong, meant, (64, 50), room) < 1
    assert bench.alike(meant.at[0, 0, 0].set(0), meant, (64, 50), room) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_the_same_where_the_rest_cancels(bench: Any, dtype: str) -> None:
    """The first queries of a causal prompt see a key or two, and their gradient is what rounding leaves of it."""
    T = 50
    cases = list(bench.prefills([T], [16], jnp.dtype(dtype), ["xla", "reference"], ["backward"]))
    ready, gave, left_out = bench.made_ready(
        cases[0]._replace(sides={n: s for n, s in cases[0].sides.items() if n != "ours"})
    )
    assert not left_out
    floors = ready["ours, xla"].floors()
    for name in ("ours, reference", "jax, xla"):
        found = gave[name]
        assert bench.alike(found, gave["ours, xla"], cases[0].lengths, floors) < 1
        for i in range(3):
            wrong = [x.at[0, T // 2, 1].multiply(1.5) if i == j else x for j, x in enumerate(found)]
            assert bench.alike(tuple(wrong), gave["ours, xla"], cases[0].lengths, floors) > 1, (name, "qkv"[i])


def test_the_pullback_is_the_gradient(bench: Any) -> None:
    """Alone, from what its forward kept."""
    q, k, v, do = (bench.normal(i, (1, 20, 4, 8), jnp.float32) for i in range(4))

    def f(q: Any, k: Any, v: Any, more: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, scale=more, is_causal=True)

    side = bench.pulled_back(f, q, k, v, jnp.float32(0.3), do, 0.3)()
    wanted = jax.grad(lambda q, k, v: (f(q, k, v, jnp.float32(0.3)) * do).sum(), (0, 1, 2))(q, k, v)
    for found, meant in zip(side.run(), wanted, strict=True):
        np.testing.assert_allclose(found, meant, rtol=1e-5, atol=1e-6)
    out, _ = side.before()
    np.testing.assert_allclose(out, f(q, k, v, jnp.float32(0.3)), rtol=1e-6)


# ---- what stands beside a time, on a card that is said to be there


@pytest.fixture
def card(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Cases of the benchmark whose sides take made-up milliseconds and give made-up numbers, or fail."""
    now = [0.0]

    def side(ms: float, before: float | None, gives: Any) -> Any:
        def take(ms: float) -> Any:
            now[0] += ms / 1e3
            return gives

        return bench.Side(
            functools.partial(take, ms), 1, 0, None if before is None else functools.partial(take, before)
        )

    def taking(case: Any, times: dict[str, Any], gives: dict[str, Any]) -> Any:
        back = case.what.startswith("backward")

        def make(name: str) -> Any:
            told = times.get(name, times.get("others", 9.0))
            if isinstance(told, str):
                raise dispatch.Refused(told)
            return lambda: side(told, told / 2 if back else None, gives.get(name, jnp.ones((2, 3))))

        return case._replace(sides={n: functools.partial(make, n) for n in case.sides})

    like = jax.ShapeDtypeStruct
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "normal", lambda seed, shape, dtype: like(shape, dtype))  # nothing is computed
    monkeypatch.setattr(bench, "made", lambda *given: {})
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    monkeypatch.setattr(bench, "clock", lambda: now[0])
    monkeypatch.setattr(bench, "bandwidth", lambda: 4e12)
    monkeypatch.setattr(bench, "matmul_rate", lambda n, dtype: 8e14)
    monkeypatch.setattr(bench.jax, "devices", lambda: [type("Device", (), {"device_kind": CARD})])
    makers = bench.prefills, bench.refused, bench.decodes

    def set_up(times: dict[str, Any], gives: dict[str, Any] | None = None) -> None:
        for name, make in zip(("prefills", "refused", "decodes"), makers, strict=True):
            cases = lambda *given, make=make, **how: (taking(c, times, gives or {}) for c in make(*given, **how))  # noqa: E731
            monkeypatch.setattr(bench, name, cases)

    return set_up


def told(bench: Any, folder: Path, *given: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    """(rows of the JSON file, what was printed)."""
    file = folder / "rows"
    ran = click.testing.CliRunner().invoke(bench.main, ["--rounds", "2", "--json", str(file), *given])
    assert ran.exit_code == code, ran.output
    return [json.loads(line) for line in file.read_text().splitlines()], ran.output


def test_prompts_beside_cudnn_and_xla(bench: Any, card: Any, tmp_path: Path) -> None:
    card({"ours": 2.0, "ours, triton": 2.0, "ours, mosaic_gpu": 1.0, "ours, xla": 6.0, "jax, cudnn": 0.95, "jax, xla": 5.0,
          "ours, tokamax": "not installed"})  # fmt: skip
    rows, output = told(bench, tmp_path, "--only", "prefill", "--tokens", "4096", "--head-dim", "128")
    by = {(r["what"], r["by"]): r for r in rows}
    flops = 4 * 4 * 16 * 128 * 4096 * 4097 / 2  # B4 N16
    ours = by["forward", "ours, triton"]
    assert ours["teraflops"] == pytest.approx(flops / 2e-3 / 1e12)
    assert ours["fraction"] == pytest.approx(flops / 2e-3 / 8e14)
    assert (ours["to_cudnn"], ours["to_xla"]) == (pytest.approx(0.475), pytest.approx(2.5))
    assert (ours["aim"], ours["aim_of"], ours["reached"]) == (0.55, "to_cudnn", False)
    assert by["forward", "ours, mosaic_gpu"]["reached"] is True
    back = by["backward", "ours, triton"]
    assert back["teraflops"] == pytest.approx(2.5 * flops / 2e-3 / 1e12)
    assert (back["ms"], back["both_ms"]) == (pytest.approx(2.0), pytest.approx(3.0))
    assert (back["aim"], back["aim_of"], back["reached"]) == (330, "teraflops", back["teraflops"] >= 330)
    assert by["forward, sinks", "ours"]["aim_of"] == "to_xla"
    assert by["forward, sinks", "ours"]["reached"] is True
    what = {w for w, _ in by}
    assert what >= {f"{d}, {m}" for d in bench.DIRECTIONS for m in ("a soft-cap", "sinks", "packed texts", "a window")}
    # jax hands neither caps nor sinks on, and texts only as an array of all pairs, which is no time of cuDNN's
    assert {w for w, b in by if b == "jax, cudnn"} == {"forward", "backward", "forward, a window", "backward, a window"}
    assert {w.split(", ")[-1] for w, b in by if b == "jax, xla"} == {"forward", "backward", "a window", "packed texts"}
    assert "0.55 to cudnn" in output
    assert not list(tmp_path.glob("pallas_kernels/*"))


def test_no_aim_where_none_is_asked(bench: Any, card: Any, tmp_path: Path) -> None:
    card({})
    given = ("--only", "prefill", "--tokens", "2048", "--tokens", "8192", "--head-dim", "64")
    rows, _ = told(bench, tmp_path, *given)
    assert all(r["aim"] is None for r in rows if "," not in r["what"])


def test_caches_beside_raw_ones(bench: Any, card: Any, tmp_path: Path) -> None:
    card({"ours, triton": 0.01})
    rows, _ = told(bench, tmp_path, "--only", "decode", "--slots", "8192", "--head-dim", "128")
    by = {r["what"]: r for r in rows if r["by"] == "ours, triton"}
    assert by["raw"]["gigabytes"] == pytest.approx(8 * 8192 * 2 * 256 / 1e-5 / 1e9)
    assert by["raw"]["fraction"] == pytest.approx(by["raw"]["gigabytes"] / 4000)
    aims = {w: (r["aim"], r["aim_of"]) for w, r in by.items()}
    assert aims == {
        "raw": (0.80, "fraction"), "raw, pages of 64": (0.78, "fraction"), "raw, pages of 16": (0.72, "fraction"),
        "int8": (1.5, "to_raw"), "int8, pages of 64": (1.5, "to_raw"), "int4": (None, None),
    }  # fmt: skip
    assert by["raw"]["to_raw"] is None
    assert [by[n]["to_raw"] for n in ("int8", "int8, pages of 64", "int4")] == [pytest.approx(1.0)] * 3
    assert by["int8"]["reached"] is False


def test_caches_exceed_four_times_the_cards_cache(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's own L2, and the largest where the card is not known."""
    assert max(c.l2 for c in cards.CARDS.values()) == bench.LARGEST_L2
    made: list[int] = []
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    monkeypatch.setattr(bench, "made", lambda i, *given: made.append(i) or {})
    for name, l2 in (("NVIDIA H200", 50 << 20), ("NVIDIA B200", 253 << 19), ("NVIDIA Z9", 128 << 20)):
        monkeypatch.setattr(bench.jax, "devices", lambda name=name: [type("Device", (), {"device_kind": name})])
        for slots, codec in ((8192, "raw"), (65536, "raw"), (8192, "int8")):
            made.clear()
            next(iter(bench.decodes([slots], [128], [codec], np.dtype("bfloat16"), [])))
            size = 8 * slots * bench.tiles.slot_bytes(128, codec)
            assert len(made) >= 2
            assert len(made) * size > 4 * l2
            assert len(made) == 2 or (len(made) - 1) * size <= 4 * l2


# ---- what comes into the table

ONE = ("--only", "prefill", "--tokens", "1024", "--head-dim", "128", "--table")


def table() -> list[dict[str, Any]]:
    file = dispatch.table_file(CARD)
    return json.loads(file.read_text())["rows"] if file.exists() else []


def test_what_is_wrong_is_told_and_stands_in_no_table(bench: Any, card: Any, tmp_path: Path) -> None:
    card({"ours, triton": 1.0, "ours, xla": 8.0}, {"ours, triton": jnp.asarray([[1.0, 1, 1], [0, 1, 1]])})
    rows, output = told(bench, tmp_path, *ONE)
    wrong = [r for r in rows if "wrong" in r]
    assert {(r["what"].split(",")[0], r["by"]) for r in wrong} == {(d, "ours, triton") for d in bench.DIRECTIONS}
    assert all(r["wrong"] > 1 for r in wrong)
    assert not [r for r in rows if r["by"] == "ours, triton" and "wrong" not in r]
    times = {r["what"]: r["milliseconds"] for r in table()}
    assert set(times) == {"forward", "forward and backward"}
    assert all("triton" not in t for t in times.values())
    assert times["forward"]["xla"] == pytest.approx(8.0)
    assert times["forward and backward"]["xla"] == pytest.approx(12.0)
    assert "wrote" in output


@pytest.mark.parametrize("how", ["it fails", "its numbers are not finite"])
def test_what_is_held_against_nothing_stands_in_no_table(how: str, bench: Any, card: Any, tmp_path: Path) -> None:
    if how == "it fails":
        card({"ours, xla": "not today", "others": 1.0})
    else:
        card({"others": 1.0}, {"ours, xla": jnp.full((2, 3), jnp.nan)})
    rows, output = told(bench, tmp_path, *ONE, code=1)
    assert {r["by"] for r in rows} >= {"ours, triton"}  # which was measured all the same
    assert table() == []
    output = " ".join(output.split())
    assert "not written to the table: forward, B16 T1024 N16 H128" in output
    assert ("not today" if how == "it fails" else "not finite") in output


def test_scores_that_do_not_fit_are_not_asked_for(bench: Any, card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little memory XLA waits before it fails; a twelfth or a sixth of it is what its scores may take."""
    monkeypatch.setattr(bench, "room", lambda: 10**9)
    monkeypatch.setattr(bench, "compiled", lambda *given: "made")
    forward, backward = bench.prefills([2048], [128], jnp.dtype(jnp.bfloat16))
    assert forward.sides["ours, xla"]() == "made"
    for case in (forward, backward):
        with pytest.raises(dispatch.Refused, match=r"all scores in float32 are 2 GB"):  # B8 N16
            case.sides["jax, xla"]()
    monkeypatch.setattr(bench, "room", lambda: 10**11)
    assert forward.sides["jax, xla"]() == "made"
