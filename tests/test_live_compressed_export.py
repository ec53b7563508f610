"""Folders that `save` and `convert` wrote with packed weights, opened by transformers and compressed-tensors.

They are the oracle: their logits, from their own decompression of what we wrote, are ours. Symmetric formats: whole folders
with zero points they do not open (jaxengine/compressed.py); test_live_quantized.py has their compressor read such matrices.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import jaxengine  # noqa: E402
from jaxengine.export import convert  # noqa: E402
from jaxengine.plan import Plan  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

ATOL = 2e-4  # on logits of order one, see test_models.py
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def plain(folder: Path, kind: str) -> Path:
    sizes: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": kind != "llama",
    }  # fmt: skip
    config = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "phi3": "Phi3Config"}[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> tuple[Any, np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model, model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "int4:group_size=32,scale=float32"),
        ("qwen3", "int4:group_size=16,scale=float32"),
        ("phi3", "int8"),
        ("llama", "int8:group_size=64"),
    ],
)
def test_transformers_gives_our_logits(kind: str, text: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "plain", kind)
    ours = jaxengine.load(source, weights=text, form="scan")
    ours.save(tmp_path / "saved", format="compressed-tensors")
    model, logits = theirs(tmp_path / "saved")
    assert any(name.endswith("weight_scale") for name in model.state_dict())
    np.testing.assert_allclose(logits, ours.logits(TOKENS), atol=ATOL, rtol=0)
    _, dense = theirs(source)
    assert np.abs(logits - dense).max() > 10 * ATOL  # it is the quantised model
    # what has one group has none when it is read
    again = jaxengine.load(tmp_path / "saved", form="scan").logits(TOKENS)
    np.testing.assert_allclose(again, ours.logits(TOKENS), atol=ATOL / 10, rtol=0)


def test_several_formats_in_one_folder(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain", "llama")
    rules = (("layers.*.down", "int8"), ("layers.*.o", "dense"), ("lm_head", "int8:group_size=32"))
    plan = Plan(weights="int4:group_size=32,scale=float32", weight_rules=rules)
    ours = jaxengine.load(source, plan=dataclasses.replace(plan, form="scan"))
    ours.save(tmp_path / "saved", format="compressed-tensors")
    groups = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 3
    _, logits = theirs(tmp_path / "saved")
    np.testing.assert_allclose(logits, ours.logits(TOKENS), atol=ATOL, rtol=0)


def test_the_demo_converted(tmp_path: Path) -> None:
    convert(
        jaxengine.demo_folder(), tmp_path / "out", to="compressed-tensors", weights="int4:group_size=32,scale=float32"
    )
    _, logits = theirs(tmp_path / "out")
    ours = jaxengine.load(tmp_path / "out", dtype="float32", form="scan")
    np.testing.assert_allclose(logits, ours.logits(TOKENS), atol=10 * ATOL, rtol=0)  # logits of order ten
