"""The papers' claims as rows of data: the models are those that were published, the figures those that the papers give
where they give one, and what is said to fit does.

From outside: parameter counts (FlexGen's OPT-175B: arXiv:2205.01068, table 1; MT-NLG: arXiv:2201.11990; Llama 3 8B:
8.03e9, its model card; Llama 2 70B: 68.98e9, the sum over its files), HeadInfer's KV cache of 128 GB for 1M tokens
(arXiv:2502.12574, abstract), LLaMA 65B's 65.2e9 (arXiv:2302.13971, table 2), Llama 2 7B's 6.74e9 and Qwen2 1.5B's 1.54e9 (their
model cards), and "from 1TB to 10GB" for MT-NLG in half precision (DeepSpeed, "ZeRO-Inference:
Democratizing massive model inference", 2022).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from jaxengine.architecture import architecture
from pallas_kernels import aot

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
headlines = importlib.import_module("headlines")

PARAMETERS = {
    "OPT-175B": 175e9, "MT-NLG 530B": 530e9, "Llama 3 8B": 8.03e9, "Llama 2 70B": 68.98e9, "LLaMA 65B": 65.2e9,
    "Llama 2 7B": 6.74e9, "Qwen2 1.5B": 1.54e9,
}  # fmt: skip

# bytes of the device, in the words of the claims
BOUNDS = {
    "flexgen": 16 * 2**30,
    "superpipeline": 0.4 * 2 * (8.03e9 + 2 * 32 * 8 * 128 * 1024) * 1.05,  # weights and cache; temporaries are few
    "mom": 80 * 2**30,
    "deepspeed-inference": 48 * 2**30,
    "tpi-llm": 3.1e9,
    "qlora-65b": 48 * 2**30,
    "qlora-4gb": 4e9,
    "zo2": 18e9,
    "hift": 48 * 2**30,
    "alst": 80 * 2**30,
}

NAMES = [h.name for h in headlines.HEADLINES]


@pytest.fixture(scope="module")
def claims() -> dict[str, Any]:
    """The command's own JSON by name, by arithmetic alone."""
    found = CliRunner().invoke(headlines.main, ["--no-compile", "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert "arithmetic alone" in said["made_by"]
    return {c["name"]: c for c in said["claims"]}


def test_every_paper_is_there(claims: dict[str, Any]) -> None:
    assert list(claims) == NAMES
    assert len(set(NAMES)) == len(NAMES)
    papers = {"2303.06865", "2410.08791", "2207.00032", "2504.12526", "2502.12574", "2410.00531"}
    papers |= {"2305.14314", "2412.17548", "2503.12668", "2401.15207", "2403.17919", "2506.13996"}
    assert {c["arxiv"] for c in claims.values()} == papers


@pytest.mark.parametrize("headline", headlines.HEADLINES, ids=NAMES)
def test_models_are_the_published_ones(headline: Any) -> None:
    found = sum(math.prod(s.shape) for s in architecture(headline.model).specs().values())
    assert found == pytest.approx(PARAMETERS[headline.model_name], rel=0.02)
    assert headline.model.get("max_position_embeddings", 2048) >= headline.context


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_waits_for_nothing_and_the_rest_says_for_what(name: str, claims: dict[str, Any]) -> None:
    c = claims[name]
    assert c["fits"] == (not c["needs"])
    assert c["fits_device"] == (c["arithmetic"]["device"] <= c["budget"])
    assert c["fits_host"] == (c["ram"] is None or c["arithmetic"]["host"] <= c["ram"])
    assert not re.search(r"[{}]", c["note"])
    assert c["compiled"] == []


def test_what_fits_is_within_the_words_of_the_claim(claims: dict[str, Any]) -> None:
    assert {n for n, c in claims.items() if c["fits"]} == set(BOUNDS)
    for name, bound in BOUNDS.items():
        assert claims[name]["arithmetic"]["device"] <= bound
        assert claims[name]["budget"] <= bound
    # 175e9 weights of a byte, in the RAM of the paper's machine
    assert claims["flexgen"]["arithmetic"]["host"] == pytest.approx(175e9, rel=0.02)


def test_figures_that_the_papers_give(claims: dict[str, Any]) -> None:
    assert claims["headinfer-1m"]["arithmetic"]["cache"] == 128 * 2**30
    assert claims["headinfer-4m"]["arithmetic"]["cache"] == 4 * 128 * 2**30
    deepspeed = claims["deepspeed-inference"]["arithmetic"]
    # of the 1060 GB of layers in float16 three stand in RAM twice: where they are kept, or on the way from disk
    assert deepspeed["host"] + deepspeed["disk"] - 3 * 10e9 == pytest.approx(2 * 530e9, rel=0.02)
    assert deepspeed["streaming"] == pytest.approx(2 * 10e9, rel=0.02)  # "1TB to 10GB", and one ahead
    # half a byte a weight of the layers, and a scale of a byte for each 64
    assert claims["qlora-65b"]["arithmetic"]["resident"] == pytest.approx(
        (65.2e9 - 2 * 32000 * 8192) * 33 / 64, rel=0.01
    )
    assert claims["zo2"]["arithmetic"]["host"] == pytest.approx(2 * 175e9, rel=0.02)
    assert claims["hift"]["arithmetic"]["resident"] == pytest.approx(4 * 6.74e9, rel=0.05)
    # keys and values, layers, kv heads, dims, bytes, tokens as they are padded
    assert claims["mom"]["arithmetic"]["cache"] == 2 * 32 * 8 * 128 * 2 * (-(-455_000 // 2048) * 2048)


def test_how_much_larger_than_what_the_card_holds_alone(claims: dict[str, Any]) -> None:
    """ "25x": of 530 B, over the two bytes that each weight of a model takes on the card, and over what a model of whole layers
    has there, each 12 D^2 beside the vocabulary's V D; the paper's own 20 B makes 26.5."""
    D, V, usable = 20480, 50257, headlines.find("RTX A6000").usable
    layers = (usable / 2 - V * D) // (12 * D * D)
    whole = V * D + layers * 12 * D * D
    note = claims["deepspeed-inference"]["note"]
    said = re.search(r"holds ([\d.]+) B .* is ([\d.]+) times .* it holds ([\d.]+) B, .* is ([\d.]+) times", note)
    assert said is not None
    held, times, held_whole, times_whole = map(float, said.groups())
    assert 2e9 * held <= usable <= 48 * 2**30
    assert held == pytest.approx(usable / 2e9, abs=0.05)
    assert held_whole == pytest.approx(whole / 1e9, rel=0.005)  # and biases, norms and positions
    assert times == pytest.approx(530e9 / (usable / 2), rel=0.01)
    assert times_whole == pytest.approx(530e9 / whole, rel=0.01)
    assert times_whole == pytest.approx(25, rel=0.01)
    assert claims["deepspeed-inference"]["fits"]


def test_the_table() -> None:
    shown = CliRunner().invoke(headlines.main, ["--no-compile", "--only", "headinfer-1m", "--only", "flexgen"])
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    assert "2502.12574" in said
    assert "2303.06865" in said
    assert "Needs a KV cache on the host" in said
    assert "MOM" not in said


def test_the_answer_is_in_the_table_however_narrow() -> None:
    """At 80 columns, which is what rich takes for a pipe, and at its own width, where nothing is cut."""
    asked = ["--no-compile", "--only", "headinfer-1m", "--only", "tpi-llm"]
    for width in ("80", None):
        shown = CliRunner().invoke(headlines.main, asked, env={"COLUMNS": width})
        assert shown.exit_code == 0, shown.output
        table = shown.stdout[: shown.stdout.index("\nheadinfer-1m: HeadInfer")].splitlines()
        assert max(map(len, table)) <= int(width or 120)
        assert any(re.search(r"\bfits\b", line) for line in table)
        for name, answer in (("headinfer-1m", "no"), ("tpi-llm", "yes")):
            (row,) = (line for line in table if line.strip().startswith(f"{name}:"))
            assert re.search(rf" {answer} ", row), row
        assert any("(3.1 GB)" in line for line in table) == (width is None)


def test_where_xla_and_arithmetic_are_apart_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """By more than the 5 % of a plan, in either direction."""
    (found,) = (headlines.figures(h, compiled=False) for h in headlines.HEADLINES if h.name == "tpi-llm")
    assert (found.off, found.apart, found.to_dict()["off"]) == (None, False, None)
    proof = SimpleNamespace(program="decode", host=0, temporaries=0, seconds=0.0, report=SimpleNamespace(problems=()))
    for part, said in ((1.06, "6.0% more"), (0.94, "6.0% less"), (1.04, ""), (0.96, "")):
        proof.device = round(part * found.need.device)
        row = dataclasses.replace(found, proofs=(proof,))
        assert row.to_dict()["off"] == pytest.approx(part - 1, abs=1e-6)
        headlines.show(Console(width=120), [row])
        shown = capsys.readouterr().out
        assert (f"{said} than the arithmetic's" in shown) == bool(said)
        assert (" !" in shown) == bool(said)


def test_a_claim_that_is_not_there() -> None:
    refused = CliRunner().invoke(headlines.main, ["--no-compile", "--only", "headinfer-2m"])
    assert refused.exit_code == 2
    assert "the nearest is 'headinfer-" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_a_claim_compiled() -> None:
    """The arithmetic against XLA's bytes, within the 5 % that a plan promises."""
    found = CliRunner().invoke(headlines.main, ["--json", "--only", "tpi-llm"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert "nothing run on a GPU" in said["made_by"]
    (claim,) = said["claims"]
    pieces = [f"{phase}, {piece}" for phase in ("prefill", "decode") for piece in ("before", "a layer", "after")]
    assert [p["program"] for p in claim["compiled"]] == pieces
    most = max(p["device"] for p in claim["compiled"])
    assert most == pytest.approx(claim["arithmetic"]["device"], rel=0.05)
    assert all(p["host"] == 0 for p in claim["compiled"])  # of host memory only the buffers that a disk is read into
    assert claim["fits_device"] == (most <= claim["budget"] == 3.1e9)
    assert claim["problems"] == []


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_a_step_of_fine_tuning_compiled() -> None:
    found = CliRunner().invoke(headlines.main, ["--json", "--only", "hift"])
    assert found.exit_code == 0, found.output
    (claim,) = json.loads(found.stdout)["claims"]
    assert [p["program"] for p in claim["compiled"]] == ["step"]
    assert claim["compiled"][0]["device"] == pytest.approx(claim["arithmetic"]["device"], rel=0.05)
    assert (claim["fits"], claim["problems"]) == (True, [])
    # two float32 moments of every parameter wait in host memory, whoever's turn it is
    assert claim["arithmetic"]["host"] == pytest.approx(8 * 6.74e9, rel=0.01)


def compiled(name: str) -> dict[str, Any]:
    """A row of the command's JSON, compiled, with what every such row must say."""
    found = CliRunner().invoke(headlines.main, ["--json", "--only", name])
    assert found.exit_code == 0, found.output
    (claim,) = json.loads(found.stdout)["claims"]
    most = max(p["device"] for p in claim["compiled"])
    assert claim["off"] == pytest.approx(most / claim["arithmetic"]["device"] - 1)
    assert (claim["fits_device"], claim["problems"]) == (most <= claim["budget"], [])
    return claim | {"most": most}


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    "name",
    [
        "qlora-65b",
        "alst",
        *(
            pytest.param(n, marks=pytest.mark.thorough)
            for n in ("qlora-4gb", "zo2", "superpipeline", "deepspeed-inference")
        ),
    ],
)
@pytest.mark.some_rows
def test_a_claim_that_fits_does_by_xlas_bytes(name: str) -> None:
    """Within the words of the paper, and not by the arithmetic alone."""
    claim = compiled(name)
    assert claim["fits"]
    assert claim["most"] <= BOUNDS[name]
    assert abs(claim["off"]) <= 0.05


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("name", ["flexgen", "mom"])
def test_a_claim_on_generating_that_fits_does_by_xlas_bytes(name: str) -> None:
    """As above, in every run: what the papers on streaming are known for."""
    claim = compiled(name)
    assert claim["fits"]
    assert claim["most"] <= BOUNDS[name]
    assert abs(claim["off"]) <= 0.05


@pytest.mark.thorough
@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("name", ["headinfer-1m", "headinfer-4m", "flexgen-144"])
def test_a_claim_that_does_not_fit_does_not_by_xlas_bytes(name: str) -> None:
    claim = compiled(name)
    assert not claim["fits"]
    assert claim["most"] > claim["budget"]
    assert abs(claim["off"]) <= 0.05


def test_the_ranks_from_which_lora_needs_more_than_lisa(claims: dict[str, Any]) -> None:
    """That the row names: there, and not one below. A LoRA's bytes are 16 for each of its numbers, and the rest stays."""
    claim = claims["lisa"]
    (row,) = headlines.chosen(("lisa",))
    small = headlines.tuning.task("lisa", optimizer="adafactor")
    small = headlines.tuning.need(architecture(row.model), row.plan, small, batch=row.batch, context=row.context).device
    (rank,) = map(int, re.findall(r"a LoRA of rank (\d+) or more", claim["needs"]))
    said = tuple(map(int, re.findall(r"from rank (\d+) on", claim["note"])))
    beside = [
        (n - claim["baseline"]) / (4 * 4) / lora_numbers(claim["config"]) + 8
        for n in (claim["arithmetic"]["device"], small)
    ]
    assert said == tuple(map(math.ceil, beside))
    assert rank == said[0]


def lora_numbers(config: dict[str, Any]) -> int:
    """Numbers of a LoRA of rank 1 beside the seven matrices of each of Llama's layers."""
    D, F, L = (config[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return L * (4 * (D + D) + 3 * (D + F))


@pytest.mark.thorough
@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_lisa_against_lora_by_xlas_bytes(claims: dict[str, Any]) -> None:
    claim = compiled("lisa")
    assert (claim["fits"], claim["most"] > claim["budget"]) == (False, True)
    (rank,) = map(int, re.findall(r"a LoRA of rank (\d+) or more", claims["lisa"]["needs"]))
    (row,) = headlines.chosen(("lisa",))
    larger = headlines.prove(
        architecture(row.model), row.baseline, headlines.find(row.card), batch=row.batch, length=row.context,
        task=headlines.tuning.task("lora", rank=rank),
    )  # fmt: skip
    assert claim["most"] <= max(p.device for p in larger)
