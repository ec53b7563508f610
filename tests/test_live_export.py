"""Exports whose source is out of the ordinary, opened by transformers: heads beside tied embeddings, other splits, dtypes.

transformers is the oracle twice: it reads the same source as we do, and it reads what we write. The sources are written
with the safetensors library.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import jaxengine  # noqa: E402
from jaxengine.export import convert  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

GOLDEN = Path(__file__).parent / "golden"
ATOL = 2e-4  # on logits of order one, see test_models.py
HEAD = "lm_head.weight"
# every family has a case with a tied head; those that are untied by default are tied here
CASES = {
    "gemma2": "model.embed_tokens.weight",
    "gemma3_text": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "mistral": "model.embed_tokens.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "opt_350m_like": "model.decoder.embed_tokens.weight",
    "phi3": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def tied(case: str, to: Path, *, differs: bool) -> Path:
    """The golden folder in float32 with a config that ties, and a head in the file: the embedding's, or one of its own."""
    shutil.copytree(GOLDEN / case, to, ignore=shutil.ignore_patterns("golden.npz"))
    raw = json.loads((to / "config.json").read_text()) | {"tie_word_embeddings": True, "dtype": "float32"}
    (to / "config.json").write_text(json.dumps(raw))
    tensors = {n: t.float() for n, t in safetensors_torch.load_file(to / "model.safetensors").items()}
    tensors[HEAD] = tensors[CASES[case]].clone()
    if differs:
        tensors[HEAD] += 0.3 * torch.randn(tensors[HEAD].shape, generator=torch.Generator().manual_seed(0))
    safetensors_torch.save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def oracle(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("differs", [False, True], ids=["same", "differs"])
@pytest.mark.parametrize("case", CASES)
def test_a_head_beside_a_tied_embedding(case: str, differs: bool, tmp_path: Path) -> None:
    source = tied(case, tmp_path / "in", differs=differs)
    reference = oracle(source)
    assert is_tied(reference) == (not differs)
    logits = their_logits(reference)
    model = jaxengine.load(source)
    assert model.config.tie_word_embeddings == is_tied(reference)
    np.testing.assert_allclose(model.logits(IDS)[0], logits, rtol=0, atol=ATOL)
    if differs:  # as a tied model it would be far from this
        reference.lm_head.weight = reference.get_input_embeddings().weight
        assert np.abs(their_logits(reference) - logits).max() > 100 * ATOL
    model.save(tmp_path / "saved")
    saved = oracle(tmp_path / "saved")
    assert is_tied(saved) == saved.config.tie_word_embeddings == (not differs)
    np.testing.assert_array_equal(their_logits(saved), logits)


@pytest.mark.parametrize("case", ["gemma2", "gpt2", "opt_350m_like"])
def test_an_untied_head_comes_through_orbax_and_small_files(case: str, tmp_path: Path) -> None:
    source = tied(case, tmp_path / "in", differs=True)
    logits = their_logits(oracle(source))
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf", max_shard_bytes=60_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    back = oracle(tmp_path / "back")
    assert not back.config.tie_word_embeddings
    np.testing.assert_array_equal(their_logits(back), logits)
    convert(tmp_path / "back", tmp_path / "joined", to="hf", max_shard_bytes=10**9)
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    np.testing.assert_array_equal(their_logits(oracle(tmp_path / "joined")), logits)


def test_norms_stay_wide_through_orbax(tmp_path: Path) -> None:
    """Each tensor of a mixed checkpoint is, for the safetensors library, what it was."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "in", ignore=shutil.ignore_patterns("golden.npz"))
    file = tmp_path / "in" / "model.safetensors"
    tensors = {
        n: t.bfloat16() if t.ndim > 1 else t * (1 + 2**-12) for n, t in safetensors_torch.load_file(file).items()
    }
    safetensors_torch.save_file(tensors, file, {"format": "pt"})
    convert(tmp_path / "in", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    found = safetensors_torch.load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert {t.dtype for t in found.values()} == {torch.float32, torch.bfloat16}
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype
        assert torch.equal(found[name], t), name
