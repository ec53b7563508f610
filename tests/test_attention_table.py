"""A card's table: what scripts/bench_attention.py measured is the order in which the dispatcher tries implementations.

The times here are made up. What follows them is read from which implementation is called while a call is traced for a card
that is said to be there.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import pytest

from jaxengine.cache import base
from pallas_kernels import aot, cards, dispatch
from pallas_kernels import attention as prefill
from pallas_kernels import decode_attention as decode

CARD = "NVIDIA H200"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_attention")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H200 that is there as far as the dispatcher knows, and a cache folder with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "gpu", lambda: dispatch.Gpu((9, 0), 132, CARD))
    dispatch.measured.cache_clear()
    yield dispatch.table_file(CARD)
    dispatch.measured.cache_clear()


def like(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The implementations that a call comes to, in turn, when the first `refusing` of them refuse."""

    def run(op: Any, call: Any, *arguments: Any, refusing: int = 0) -> list[str]:
        heard: list[str] = []

        def standing_for(name: str) -> Any:
            def implementation(q: Any, *rest: Any, **how: Any) -> Any:
                heard.append(name)
                if len(heard) <= refusing:
                    raise dispatch.Refused("not today")
                return q

            return implementation

        with monkeypatch.context() as patch:
            patch.setattr(op, "IMPLEMENTATIONS", {n: standing_for(n) for n in op.IMPLEMENTATIONS})
            # the arm for a CPU is traced too
            patch.setattr(dispatch.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
            jax.eval_shape(call, *arguments)
        return heard

    return run


def of_prompt(asked: Any, T: int, H: int = 128, refusing: int = 0, **how: Any) -> list[str]:
    at = like(1, T, dtype=jnp.int32)
    q, k = like(1, T, 16, H, dtype=how.pop("dtype", jnp.bfloat16)), like(1, 16, T, H)
    return asked(
        prefill, lambda *a: prefill.attention(*a, scale=0.1, contiguous=True, **how), q, k, k, at, at, refusing=refusing
    )


def of_step(asked: Any, S: int, page: int | None = None, dtype: Any = jnp.bfloat16) -> list[str]:
    q, at = like(1, 1, 32, 128, dtype=dtype), like(1, 1, dtype=jnp.int32)
    if page is None:
        k, slots = like(1, 8, S, 128, dtype=dtype), like(1, S, dtype=jnp.int32)
        return asked(decode, lambda *a: decode.decode_attention(*a, scale=0.1), q, k, k, at, slots)
    k, table, n = (
        like(S // page, 8, page, 128, dtype=dtype),
        like(1, S // page, dtype=jnp.int32),
        like(1, dtype=jnp.int32),
    )
    call = lambda q, k, at, t, n: decode.decode_attention(q, k, k, at, page_table=t, lengths=n, scale=0.1)  # noqa: E731
    return asked(decode, call, q, k, at, table, n)


def row(op: str, times: dict[str, float], **case: Any) -> dict[str, Any]:
    return {"op": op, "dtype": "bfloat16", "head_dim": 128, **case, "milliseconds": times}


def test_without_a_table_the_order_is_derived(asked: Any) -> None:
    assert of_prompt(asked, 4096, refusing=2) == list(prefill.ORDER)
    assert of_prompt(asked, 8, refusing=2) == list(prefill.ORDER)  # however few they are
    assert of_prompt(asked, 1, refusing=2) == list(prefill.ORDER)
    assert of_step(asked, 8192) == [decode.ORDER[0]]


def test_a_refusal_is_logged_once(asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert len(of_prompt(asked, 4096, refusing=1)) == len(of_prompt(asked, 2048, refusing=1)) == 2
    assert [r.getMessage() for r in caplog.records] == ["attention: cudnn does not serve: not today"]


def test_the_order_is_that_of_the_times(asked: Any, here: Path) -> None:
    """By length, head_dim, direction and kind of cache; what was not measured comes after, as derived."""
    times = {"xla": 9.0, "mosaic_gpu": 1.0, "triton": 2.0}
    forward = row("attention", times, what="forward", tokens=4096)
    short = row("attention", {"triton": 0.1, "cudnn": 0.2, "xla": 3.0}, what="forward", tokens=1024)
    both = row("attention", {"triton": 5.0, "cudnn": 6.0}, what="forward and backward", tokens=4096)
    narrow = row("attention", {"xla": 1.0, "triton": 2.0}, what="forward", tokens=4096) | {"head_dim": 64}
    paged = row("decode_attention", {"xla": 1.0, "triton": 2.0}, cache="raw, pages of 16", slots=8192)
    assert dispatch.write_table(CARD, [forward, short, both, narrow, paged]) == here
    assert of_prompt(asked, 8192, refusing=3) == ["mosaic_gpu", "triton", "xla", "cudnn"]
    assert of_prompt(asked, 512, refusing=2) == ["triton", "cudnn", "xla"]
    assert of_prompt(asked, 4096, training=True) == ["triton"]
    assert of_prompt(asked, 4096, H=80) == ["xla"]  # 64 is nearer than 128
    assert of_prompt(asked, 4096, dtype=jnp.float32, refusing=2) == list(prefill.ORDER)  # not measured
    assert of_step(asked, 8192) == ["triton"]
    assert of_step(asked, 8192, page=16) == ["xla"]


def test_a_page_or_a_dtype_that_was_not_measured_takes_the_nearest(asked: Any) -> None:
    """Pages by their ratio; float16 as bfloat16, where it has no row of its own; nothing of another width or kind of cache."""
    times = {"xla": 1.0, "triton": 2.0}
    small = row("decode_attention", times, cache="raw, pages of 16", slots=65536)
    large = row("decode_attention", {"xla": 2.0, "triton": 1.0}, cache="raw, pages of 256", slots=8192)
    codes = row("decode_attention", times, cache="int8, pages of 64", slots=8192)
    dispatch.write_table(CARD, [small, large, codes])
    assert [of_step(asked, 8192, page=p)[0] for p in (8, 16, 32, 128)] == ["xla", "xla", "xla", "triton"]
    assert of_step(asked, 8192, page=32, dtype=jnp.float16) == ["xla"]
    assert of_step(asked, 8192, page=32, dtype=jnp.float32) == [decode.ORDER[0]]
    assert of_step(asked, 8192) == [decode.ORDER[0]]
    dispatch.write_table(CARD, [large | {"dtype": "float16", "milliseconds": times, "head_dim": 64}])
    assert of_step(asked, 8192, page=128, dtype=jnp.float16) == ["xla"]  # its own, though of another head_dim
    assert of_step(asked, 8192, page=128) == ["triton"]
    prompt = row("attention", {"xla": 1.0}, what="forward", tokens=4096)
    dispatch.write_table(CARD, [prompt])
    assert of_prompt(asked, 4096, dtype=jnp.float16) == ["xla"]


def test_a_name_goes_before_the_table(asked: Any) -> None:
    dispatch.write_table(CARD, [row("attention", {"triton": 1.0}, what="forward", tokens=4096)])
    assert of_prompt(asked, 4096, implementation="cudnn") == ["cudnn"]


def test_packed_rows_ask_for_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's rows have segments; a prompt that is only scored has none."""
    heard: list[bool] = []
    monkeypatch.setattr(base.kernel, "attention", lambda q, *a, training, **how: heard.append(training) or q)
    attention = base.Attention(4, 2, 16, scale=0.1)
    q, k, at = jnp.zeros((1, 8, 4, 16)), jnp.zeros((1, 8, 2, 16)), jnp.zeros((1, 8), jnp.int32)
    base.PlainAttend(at, at)(attention, q, k, k, ())
    base.PlainAttend(at)(attention, q, k, k, ())
    assert heard == [True, False]


def test_measured_again_it_is_replaced(here: Path) -> None:
    case = {"what": "forward", "tokens": 4096}
    dispatch.write_table(CARD, [row("attention", {"triton": 1.0, "cudnn": 2.0}, **case)])
    other = row("attention", {"xla": 3.0}, what="forward", tokens=1024)
    dispatch.write_table(CARD, [row("attention", {"triton": 2.0, "cudnn": 1.0}, **case), other])
    kept = json.loads(here.read_text())
    assert kept["card"] == CARD
    assert [r["milliseconds"] for r in kept["rows"]] == [{"triton": 2.0, "cudnn": 1.0}, {"xla": 3.0}]
    how = {"what": "forward", "dtype": "bfloat16", "head_dim": 128, "tokens": 4096}
    assert dispatch.by_measure("attention", prefill.ORDER, prefill.NAMES, **how) == ("cudnn", "triton", "xla")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"rows": [{"op": "attention"}]}', '{"rows": [{"op": "a", "milliseconds": {"x": 0}}]}']
)
def test_a_damaged_table_is_left_aside(asked: Any, here: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    here.parent.mkdir(parents=True)
    here.write_text(text)
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        assert of_prompt(asked, 4096, refusing=2) == list(prefill.ORDER)
    assert [f"{here} is left aside" in r.getMessage() for r in caplog.records] == [True]  # once
    with pytest.raises(ValueError, match="is no row of a table"):
        dispatch.write_table(CARD, [{"op": "attention", "milliseconds": {"triton": -1.0}}])


def test_a_program_for_a_card_elsewhere_takes_the_derived_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not hang on what stands in the folder of whoever compiles it."""
    dispatch.write_table(CARD, [row("attention", {"xla": 1.0}, what="forward", tokens=4096)])
    monkeypatch.undo()
    spec = cards.CARDS["H200"]
    device = jax.sharding.AbstractDevice(device_kind=spec.limits.lowers_as, num_cores=spec.cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), aot.AXES, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        card = dispatch.gpu()
        assert card is not None
        assert card.name == ""


def test_what_the_benchmark_measures_is_what_serves(
    bench: Any, asked: Any, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """The benchmark's own cases for a GPU, with sides that take a made-up time, through `--table` to the dispatcher."""
    made_up = {"ours, cudnn": 4.0, "ours, triton": 3.0, "ours, xla": 8.0, "ours, mosaic_gpu": 2.0, "ours": 4.0}
    now = [0.0]

    def taking(case: Any) -> Any:
        def side(name: str) -> Any:
            if "tokamax" in name:
                raise dispatch.Refused("not installed")

            def run() -> None:
                now[0] += made_up.get(name, 9.0) / 1e3

            return lambda: bench.Side(run, 1, 0)

        return case._replace(sides={n: lambda n=n: side(n) for n in case.sides})

    def cases(make: Any) -> Any:
        return lambda *given, **how: map(taking, list(make(*given, **how)))

    # arrays of no bytes to speak of: nothing is computed
    monkeypatch.setattr(bench, "normal", lambda seed, shape, dtype: like(*shape, dtype=dtype))
    monkeypatch.setattr(bench, "made", lambda *given: {})
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    monkeypatch.setattr(bench, "clock", lambda: now[0])
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench, "matmul_rate", lambda n, dtype: 1e15)
    monkeypatch.setattr(bench, "prefills", cases(bench.prefills))
    monkeypatch.setattr(bench, "refused", cases(bench.refused))
    monkeypatch.setattr(bench, "decodes", cases(bench.decodes))
    kind = type("Device", (), {"device_kind": CARD})
    monkeypatch.setattr(bench.jax, "devices", lambda: [kind])
    ran = click.testing.CliRunner().invoke(
        bench.main, ["--tokens", "1024", "--slots", "8192", "--head-dim", "128", "--rounds", "2", "--table"]
    )
    assert ran.exit_code == 0, ran.output
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(here.parent.parent))
    monkeypatch.setattr(dispatch, "gpu", lambda: dispatch.Gpu((9, 0), 132, CARD))
    rows = json.loads(here.read_text())["rows"]
    assert {(r["op"], r.get("what"), r.get("cache")) for r in rows} == {
        ("attention", "forward", None), ("attention", "forward and backward", None),
        *(("decode_attention", None, kind) for kind in bench.KINDS),
    }  # fmt: skip
    assert rows[0]["milliseconds"] == pytest.approx({"cudnn": 4.0, "triton": 3.0, "xla": 8.0, "mosaic_gpu": 2.0})
    assert of_prompt(asked, 1024, refusing=3) == ["mosaic_gpu", "triton", "cudnn", "xla"]
    assert of_step(asked, 8192) == ["triton"]


def test_a_table_is_of_a_gpu(bench: Any) -> None:
    ran = click.testing.CliRunner().invoke(bench.main, ["--table"])
    assert ran.exit_code == 2
    assert "--table is of a GPU" in ran.output
