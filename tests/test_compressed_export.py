"""Models saved with their integer weights packed: compressed-tensors' layout by an oracle, and read back bit for bit.

tests/test_live_compressed_export.py has transformers and compressed-tensors open what is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from oracles import packed
from oracles.golden import GOLDEN

import jaxengine
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import Reader
from jaxengine import placement
from jaxengine.command import app
from jaxengine.export import convert
from jaxengine.plan import Plan

U = 2.0**-24
DEMO = Path(jaxengine.demo_folder())


def stored(model: Any) -> dict[str, Any]:
    found = placement.stored(model.architecture, model.plan, model.params)
    return {name: jax.device_get(get()) for name, get in found.items()}


def same(one: Any, two: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert jax.tree.structure(one) == jax.tree.structure(two)


@pytest.mark.parametrize(
    "text", ["int4:group_size=32,affine=true", "int4:group_size=64,act_order=true", "int8", "int3:group_size=32"]
)
def test_a_saved_model_is_read_back_the_same(text: str, tmp_path: Path) -> None:
    model = jaxengine.load(DEMO, weights=text, home="host")
    model.save(tmp_path / "saved", format="compressed-tensors")
    own, again = stored(model), jaxengine.load(tmp_path / "saved", home="host")
    found = stored(again)
    assert again.plan.dtype == model.plan.dtype
    for name, leaf in own.items():
        if "act_order" in text and name.startswith("layers."):
            # of a feed-forward block the order is taken up by other rows; elsewhere columns of a group keep the file's order
            continue
        same(leaf, found[name])
    if "act_order" not in text:
        assert again.plan.weights == text
    ids = np.random.default_rng(0).integers(0, 2000, (1, 16))
    found, exact = again.logits(ids), model.logits(ids)
    if "act_order" in text:
        np.testing.assert_allclose(found, exact, atol=0.2, rtol=0)  # another order of sums, in bfloat16
    else:
        np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize(
    ("text", "bits"), [("int4:group_size=32,affine=true,scale=float32", 4), ("int8:group_size=64", 8)]
)
def test_the_layout_is_the_oracles(text: str, bits: int, tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "out", to="compressed-tensors", weights=text)
    leaves = stored(jaxengine.load(DEMO, weights=text, home="host"))
    with Reader.open(tmp_path / "out") as reader:
        for theirs, ours in (("mlp.down_proj", "down"), ("self_attn.k_proj", "k"), ("self_attn.o_proj", "o")):
            at, leaf = f"model.layers.2.{theirs}.weight", leaves[f"layers.2.{ours}"]
            local = {
                n.removeprefix(at.removesuffix("weight")): reader.read(n) for n in reader.names if n.startswith(at)
            }
            O = reader.read(f"{at}_shape")[0]  # noqa: E741
            dense = np.asarray(leaf.dense(), np.float64).reshape(O, -1)
            exact = packed.packed_integers(local, *dense.shape, bits, symmetric="affine" not in text)
            assert (abs(dense - exact) <= 8 * U * abs(exact).max()).all()
        assert reader.read("model.layers.0.input_layernorm.weight").dtype.name == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config == json.loads((DEMO / "config.json").read_text()) | {
        "quantization_config": config["quantization_config"]
    }
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


def test_convert_writes_what_save_writes(tmp_path: Path) -> None:
    text = "int4:group_size=64"
    jaxengine.load(DEMO, weights=text, home="host").save(tmp_path / "saved", format="compressed-tensors")
    result = CliRunner().invoke(
        app, ["convert", "demo", str(tmp_path / "made"), "--to", "compressed-tensors", "--weights", text]
    )
    assert result.exit_code == 0, result.output
    convert(tmp_path / "made", tmp_path / "again", to="compressed-tensors")  # of packed weights, as they are
    for name in ("model.safetensors", "config.json"):
        whole = (tmp_path / "saved" / name).read_bytes()
        assert (tmp_path / "made" / name).read_bytes() == whole
        assert (tmp_path / "again" / name).read_bytes() == whole
    plain = (DEMO / "model.safetensors").stat().st_size
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 0.6 * plain  # half of it the embedding


def test_files_of_a_size(tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "out", to="compressed-tensors", weights="int8", max_shard_bytes=300_000)
    convert(DEMO, tmp_path / "one", to="compressed-tensors", weights="int8")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    with Reader.open(tmp_path / "out") as many, Reader.open(tmp_path / "one") as one:
        assert set(many.names) == set(one.names)
        for name in many.names:
            np.testing.assert_array_equal(many.read(name).view(np.uint8), one.read(name).view(np.uint8))


def test_joined_and_plain_matrices(tmp_path: Path) -> None:
    """phi3 joins q, k and v, and gate and up; one layer's down stays dense, and an embedding is written decoded."""
    rules = (("layers.1.down", "dense"), ("embedding", "int8"), ("lm_head", "int8"))
    plan = Plan(dtype="float32", weights="int8", weight_rules=rules)
    model = jaxengine.load(GOLDEN / "phi3", plan=plan)
    model.save(tmp_path / "saved", format="compressed-tensors")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert raw["ignore"] == ["model.layers.1.mlp.down_proj"] + ["lm_head"] * model.config.tie_word_embeddings
    own, found = stored(model), stored(jaxengine.load(tmp_path / "saved"))
    for name, leaf in own.items():
        if name == "embedding":
            np.testing.assert_array_equal(found[name], np.asarray(leaf.dense()))
        else:
            same(leaf, found[name])


@pytest.mark.parametrize(
    ("case", "weights", "said"),
    [
        ("llama", "nf4", r"q_proj\.weight is nf4, which is not integers .* int8, int4, int3 and int2 are"),
        ("llama", "int8:outliers=8", r"is int8:outliers=8, which is not integers"),
        ("llama", "dense", r"no linear layer of this plan is in an integer format \(weights='dense'\)"),
        ("llama", "int4:group_size=32", r"q_proj\.weight has 48 inputs, .* groups of 32 do not divide; .*=16"),
        ("gpt2", "int8", r"c_attn\.weight is stored \[in, out\], .* save it as 'hf', decoded"),
    ],
)
def test_what_has_no_place_in_the_form(case: str, weights: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        convert(GOLDEN / case, tmp_path / "out", to="compressed-tensors", weights=weights)
    assert not (tmp_path / "out").exists()


def test_choices_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the source's are plain: say weights='int8'"):
        convert(DEMO, tmp_path / "out", to="compressed-tensors")
    with pytest.raises(ValueError, match=r"weights='int8' goes with to='orbax' or to='compressed-tensors'"):
        convert(DEMO, tmp_path / "out", to="hf", weights="int8")
    with pytest.raises(ValueError, match="There is no 'int9'"):
        convert(DEMO, tmp_path / "out", to="compressed-tensors", weights="int9")
    convert(DEMO, tmp_path / "int8", to="compressed-tensors", weights="int8")
    with pytest.raises(ValueError, match=r"weights are 'int8' already, and weights='int4'"):
        convert(tmp_path / "int8", tmp_path / "out", to="compressed-tensors", weights="int4")
    assert not (tmp_path / "out").exists()


def test_a_cast_of_what_is_packed_already_is_of_the_rest(tmp_path: Path) -> None:
    """dtype=: codes and scales are what they were, to the bit; embeddings and norms are cast, and config.json says so."""
    convert(DEMO, tmp_path / "one", to="compressed-tensors", weights="int4:group_size=32")
    convert(tmp_path / "one", tmp_path / "two", to="compressed-tensors", dtype="float32")
    with Reader.open(tmp_path / "one") as one, Reader.open(tmp_path / "two") as two:
        assert set(one.names) == set(two.names)
        for name in one.names:
            if any(name.endswith(end) for end in ("_packed", "_scale", "_shape")):
                assert one.info(name).dtype == two.info(name).dtype
                np.testing.assert_array_equal(one.read(name), two.read(name))
            else:
                assert (one.info(name).dtype.name, two.info(name).dtype.name) == ("bfloat16", "float32")
                np.testing.assert_array_equal(one.read(name).astype(np.float32), two.read(name))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float32"
    found, again = (jaxengine.load(tmp_path / n, home="host") for n in ("one", "two"))
    assert (found.plan.dtype, again.plan.dtype) == ("bfloat16", "float32")
    assert again.plan.weights == found.plan.weights
