"""The golden folders are well-formed: what scripts/make_goldens.py promises of them, checked without torch.

The model tests trust these files blindly; a damaged or half-regenerated one should fail here, by name, and not as a
wrong logit somewhere else. Safetensors headers are parsed by hand from the format's description (eight bytes of
length, JSON, then the data without gaps), so that our own reader is not its own judge.

B batch, T tokens of the longest prompt, V vocab.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
NEW_TOKENS = 16
MAX_CASE_BYTES = 400_000
MAX_TOTAL_BYTES = 6_000_000
BYTES_PER_ELEMENT = {"F32": 4, "F16": 2, "BF16": 2}

# case -> (model_type, dtype of the file)
CASES = {
    "gemma2": ("gemma2", "F32"),
    "gemma3_text": ("gemma3_text", "F32"),
    "gpt2": ("gpt2", "F32"),
    "llama": ("llama", "F32"),
    "llama3_rope": ("llama", "F32"),
    "llama_bias": ("llama", "F32"),
    "llama_legacy_rope": ("llama", "F32"),
    "llama_linear": ("llama", "F32"),
    "llama_sharded": ("llama", "F32"),
    "llama_tied_f16": ("llama", "F16"),
    "llama_yarn": ("llama", "F32"),
    "mistral": ("mistral", "F32"),
    "opt": ("opt", "F32"),
    "opt_350m_like": ("opt", "F32"),
    "phi3": ("phi3", "F32"),
    "phi3_longrope": ("phi3", "F32"),
    "phi3_partial": ("phi3", "F32"),
    "qwen2": ("qwen2", "BF16"),
    "qwen3": ("qwen3", "F32"),
}

each_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "config.json").read_text())


def arrays_of(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "golden.npz", allow_pickle=False) as stored:
        return dict(stored)


def tensors_in(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header, after checking that its tensors tile the rest of the file exactly."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, next_end = tensor["data_offsets"]
        assert begin == end, f"{path.name}: a gap or an overlap before {name}"
        assert next_end - begin == math.prod(tensor["shape"]) * BYTES_PER_ELEMENT[tensor["dtype"]]
        end = next_end
    assert 8 + size + end == len(data), f"{path.name}: {len(data)} bytes, the header describes {8 + size + end}"
    return header


def tensors_of(case: str) -> dict[str, dict[str, Any]]:
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted((GOLDEN / case).glob("*.safetensors")):
        header = tensors_in(path)
        assert not tensors.keys() & header.keys(), f"{path.name} repeats a tensor of another shard"
        tensors |= header
    return tensors


def test_the_cases_are_all_there_and_no_others() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*CASES, "VERSIONS.json"}
    versions = json.loads((GOLDEN / "VERSIONS.json").read_text())
    assert "scripts/make_goldens.py" in versions["command"]
    assert versions["cases"].keys() == CASES.keys()
    for entry in versions["cases"].values():
        assert entry["torch"]
        assert entry["transformers"]


def test_the_folders_are_small() -> None:
    sizes = {case: sum(path.stat().st_size for path in (GOLDEN / case).iterdir()) for case in CASES}
    assert max(sizes.values()) < MAX_CASE_BYTES
    assert sum(sizes.values()) < MAX_TOTAL_BYTES


@each_case
def test_config_and_weights(case: str) -> None:
    model_type, dtype = CASES[case]
    config, tensors = config_of(case), tensors_of(case)
    assert config["model_type"] == model_type
    assert config["eos_token_id"] is None, "greedy decoding must not stop before 16 tokens"
    assert {tensor["dtype"] for tensor in tensors.values()} == {dtype}
    embeddings = [t for name, t in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
    assert [t["shape"][0] for t in embeddings] == [config["vocab_size"]]
    assert ("lm_head.weight" in tensors) == (not config["tie_word_embeddings"])


@each_case
def test_prompts_are_a_ragged_right_padded_batch(case: str) -> None:
    config, arrays = config_of(case), arrays_of(case)
    ids, lengths = arrays["ids"], arrays["lengths"]
    assert ids.dtype == lengths.dtype == np.int32
    assert ids.shape == (lengths.size, lengths.max())
    assert len(set(lengths.tolist())) == lengths.size == 3
    assert ids.min() >= 0
    assert ids.max() < config["vocab_size"]
    padding = np.arange(ids.shape[1])[None, :] >= lengths[:, None]
    assert (ids[padding] == 0).all()
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    assert lengths.max() + NEW_TOKENS <= positions


@each_case
def test_answers_are_whole_and_fair(case: str) -> None:
    config, arrays = config_of(case), arrays_of(case)
    rows = range(arrays["lengths"].size)
    kinds = ("logits", "generated", "step_logits")
    assert arrays.keys() == {"ids", "lengths", *(f"{kind}_{row}" for kind in kinds for row in rows)}
    for row in rows:
        logits, generated, step_logits = (arrays[f"{kind}_{row}"] for kind in kinds)
        assert logits.dtype == step_logits.dtype == np.float32
        assert generated.dtype == np.int32
        assert logits.shape == (arrays["lengths"][row], config["vocab_size"])
        assert step_logits.shape == (NEW_TOKENS, config["vocab_size"])
        assert np.isfinite(logits).all()
        assert np.isfinite(step_logits).all()
        assert 0.3 < logits.std() < 3
        np.testing.assert_array_equal(generated, step_logits.argmax(-1))
        second, first = np.sort(step_logits, -1)[:, -2:].T
        assert (first - second).min() > 1e-3, "a near-tie: identical greedy tokens would be too much to ask"
        assert len(set(generated.tolist())) >= 5
        # one sum of at most 100 float32 products per logit, in two orders
        np.testing.assert_allclose(step_logits[0], logits[-1], rtol=0, atol=2e-5)


def test_the_sharded_case_has_an_index_that_names_its_files() -> None:
    folder = GOLDEN / "llama_sharded"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: tensors_in(path) for path in folder.glob("*.safetensors")}
    assert len(files) >= 3
    assert index["weight_map"] == {name: file for file, header in files.items() for name in header}
    spans = [tensor["data_offsets"] for header in files.values() for tensor in header.values()]
    assert index["metadata"]["total_size"] == sum(end - begin for begin, end in spans)


@pytest.mark.parametrize("case", [case for case in CASES if case != "llama_sharded"])
def test_the_other_cases_are_one_file(case: str) -> None:
    assert [path.name for path in (GOLDEN / case).glob("*.safetensors*")] == ["model.safetensors"]


def test_the_legacy_config_is_of_the_old_style_alone() -> None:
    config = config_of("llama_legacy_rope")
    assert "rope_parameters" not in config
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" in config
    assert "rope_theta" not in config["rope_scaling"]


def test_windows_are_shorter_than_the_prompts() -> None:
    for case in ("gemma2", "gemma3_text", "mistral", "phi3"):
        window, lengths = config_of(case)["sliding_window"], arrays_of(case)["lengths"]
        assert lengths.min() < window < lengths.max()


def test_longrope_has_a_short_a_switching_and_a_long_row() -> None:
    config, lengths = config_of("phi3_longrope"), arrays_of("phi3_longrope")["lengths"]
    original = config["original_max_position_embeddings"]
    longest_forward = lengths + NEW_TOKENS - 1  # the last token taken is never fed back
    assert longest_forward[0] <= original
    assert lengths[1] <= original < longest_forward[1]
    assert lengths[2] > original
