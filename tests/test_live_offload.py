"""The disk home beside the peers that users would compare it with: transformers, and accelerate's offload to disk.

They read the same folder, so that the oracle is theirs: logits within the bound that the golden files are held to, and
the same greedy tokens, from layers that are read from disk in every pass on both sides. accelerate may be missing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracles.golden import GOLDEN, golden  # noqa: E402

import jaxengine  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

FOLDER = GOLDEN / "llama"
PROMPTS = golden("llama")[0]
ATOL = 2e-4  # on logits of order one, as tests/test_models.py derives it
NEW = 12

Found = tuple[np.ndarray, list[list[int]]]  # (logits of the first prompt, greedy tokens of all)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Found:
    model = jaxengine.load(FOLDER, dtype="float32", home="disk", disk=tmp_path_factory.mktemp("disk"))
    assert all(bank.source is not None for bank in model.params["banks"])  # no layer is in memory
    tokens = [c.tokens for c in model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=())]
    return np.asarray(model.logits(PROMPTS[0])[0]), tokens


def read(**how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, **how).eval()


def check(ours: Found, reference: Any) -> None:
    """Each prompt alone in the reference, all of them in one batch in ours."""
    logits, tokens = ours
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPTS[0]])).logits[0].numpy()
        how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        found = [reference.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in PROMPTS]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
    assert tokens == found


def test_transformers(ours: Found) -> None:
    check(ours, read())


@pytest.mark.parametrize("way", ["device_map", "disk_offload"])
def test_accelerate(way: str, ours: Found, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    if way == "device_map":
        reference = read(device_map={"": "disk"}, offload_folder=tmp_path)
    else:
        reference = accelerate.disk_offload(read(), tmp_path)
        assert list(tmp_path.glob("*.dat"))
    assert {p.device.type for p in reference.parameters()} == {"meta"}  # none of it is in memory
    check(ours, reference)


def test_the_script_that_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All sides, one after another in this process, on the smallest model that is made: the lines that it counts are those
    that run, all say the same, and budgets that are too small are refused by us alone."""
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    compare = importlib.import_module("compare_offload")
    monkeypatch.setattr(compare.Peak, "_look", lambda self: None)  # for as long as the process lasts

    def run(side: Any, scratch: Path, given: dict[str, Any], **how: Any) -> dict[str, Any]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(scratch))
        return compare.measure(side, given, **how) if how else compare.ask(side, given)

    monkeypatch.setattr(compare, "run", run)
    found = compare.compare(tmp_path, compare.shape(5_700_000), 3, 1)
    assert all(
        r["same_tokens"] and r["pass_s"] > 0 and len(r["rounds"][0]["tokens"]) == 3 for r in found["sides"].values()
    )
    written = {name: r["written"] for name, r in found["sides"].items()}
    assert written["jaxengine, disk"] == written["accelerate, all on disk"] == 0 < written["accelerate, disk_offload"]
    refused = {name for name, r in found["too_small"].items() if r["refused"]}
    assert refused == {"jaxengine, load(memory=)", "jaxengine plan (of config.json alone)"}
    lines = {name: len(r["lines"]) for name, r in (found["sides"] | found["too_small"]).items()}
    assert lines["jaxengine, disk"] == lines["jaxengine, load(memory=)"] == 3
    assert (lines["accelerate, all on disk"], lines["accelerate, disk_offload"]) == (4, 6)
    monkeypatch.setenv("COLUMNS", "160")
    compare.show(found)
    shown = capsys.readouterr().out
    for name, r in (found["sides"] | found["too_small"]).items():
        assert f" {name} " in shown
        assert f"{name}:\n    " + "\n    ".join(r["lines"]) in shown
