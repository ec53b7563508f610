"""Adapters and every format of weights: losses over it, and merging into it, for each file of jaxengine/weights.

**Merged.** A matrix with an adapter beside it becomes encode(W + s B A), which is within the format's own bound of the sum, and
u |W + s B A| more where the plan's dtype is narrower than float32 (u its unit roundoff). A model of these matrices gives the
logits of the same numbers without a format: 2e-4 in float32 as in test_models.py. So much is held of every one; how far the
logits then are from those before is the format's affair.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from test_finetune import ADAPTERS, CLOSE, HOW, LLAMA, llama, losses, moved_by, run_of

import jaxengine
from checkpoints.errors import CheckpointError
from jaxengine import command, formats, placement, technique
from jaxengine.finetune.run import with_adapter
from jaxengine.loading import from_arrays
from jaxengine.model import Model
from jaxengine.plan import Plan
from jaxengine.weights.base import Weight

FORMATS = technique.names("jaxengine.weights")
PACKED = ("int2", "int3", "int4", "int8")  # that compressed-tensors has a place for
IDS, ATOL = np.arange(3, 40), 2e-4
each_format = pytest.mark.parametrize("name", FORMATS)


def dtype_for(name: str) -> str:
    """float32, where the format holds such numbers."""
    return "float32" if formats.find(name).refuses("float32", "float32") is None else "bfloat16"


def leaves(model: Model) -> dict[str, Any]:
    """Every parameter by name, on the device."""
    held = placement.stored(model.architecture, model.plan, model.params)
    return {n: jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), get()) for n, get in held.items()}


def numbers(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf).astype(np.float64)


def plain(model: Model) -> Model:
    """The same numbers in no format, float32."""
    values = {n: numbers(leaf).astype(np.float32) for n, leaf in leaves(model).items()}
    return from_arrays(model.architecture, Plan(dtype="float32", form="scan"), values, model.origin.config)


def assert_merged(merged: Model, tuned: Model) -> None:
    """Each matrix is the sum in its format; all others are as they were; and the logits are those of these matrices."""
    found, before = leaves(merged), leaves(tuned)
    u = float(ml_dtypes.finfo(tuned.plan.dtype).eps) / 2 if tuned.plan.dtype != "float32" else 2.0**-24
    beside = 0
    for name, was in before.items():
        now, sum_ = found[name], numbers(was)
        if not (isinstance(was, Weight) and was.beneath is not None):
            np.testing.assert_array_equal(numbers(now), sum_, err_msg=name)
            continue
        beside += 1
        assert type(now) is type(was.beneath)
        bound = np.asarray(now.error_bound(), np.float64) if isinstance(now, Weight) else 0.0
        assert (np.abs(numbers(now) - sum_) <= bound + u * np.abs(sum_)).all(), name
        assert np.abs(sum_ - numbers(was.beneath)).max() > 0.01
    assert beside
    if merged.plan.dtype == "float32":
        np.testing.assert_allclose(merged.logits(IDS), plain(merged).logits(IDS), atol=ATOL, rtol=0)


@each_format
@pytest.mark.some_rows
def test_an_adapter_is_merged_into_the_format_of_its_matrix(name: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"dtype": dtype_for(name), "weights": name, "home": "host"}
    tuned = with_adapter(llama(**how), ADAPTERS / ("llama_dora" if name in ("nf4", "int8") else "llama_lora"))
    tuned.save(tmp_path / "orbax", format="orbax")
    merged = jaxengine.load(tmp_path / "orbax")
    assert merged.plan.weights == name
    assert_merged(merged, tuned)


@each_format
@pytest.mark.some_rows
def test_an_adapter_is_merged_into_packed_integers(name: str, tmp_path: Path) -> None:
    """The same codes as without packing; down has 88 inputs, which no group divides, and is dense."""
    text = "int2:group_size=16" if name == "int2" else name  # q has 48 inputs
    plan = Plan(dtype=dtype_for(name), weights=text, weight_rules=(("layers.*.down", "dense"),))
    tuned = with_adapter(llama(dtype=None, plan=plan), ADAPTERS / "llama_lora")
    if name not in PACKED:
        with pytest.raises(
            CheckpointError, match=r"compressed-tensors: (model\.layers\.0\.self_attn\.q_proj|no linear layer)"
        ):
            tuned.save(tmp_path / "packed", format="compressed-tensors")
        assert not (tmp_path / "packed").exists()
        return
    tuned.save(tmp_path / "packed", format="compressed-tensors")
    tuned.save(tmp_path / "orbax", format="orbax")
    packed, stored = (jaxengine.load(tmp_path / n) for n in ("packed", "orbax"))
    assert_merged(stored, tuned)
    held = leaves(packed)
    assert isinstance(held["layers.0.q"], Weight)
    for n, leaf in leaves(stored).items():
        np.testing.assert_array_equal(numbers(held[n]), numbers(leaf), err_msg=n)


@pytest.mark.parametrize("case", ["llama_lora", "llama_dora", "llama_rslora"])
@pytest.mark.some_rows
def test_an_adapter_is_merged_while_a_folder_is_converted(case: str, tmp_path: Path) -> None:
    """Into plain files, orbax, packed integers, and what is quantised already; as a model with it beside is saved."""

    def convert(source: Path, name: str, *words: str) -> Path:
        done = CliRunner().invoke(
            command.app, ["convert", str(source), str(tmp_path / name), "--adapter", str(ADAPTERS / case), *words]
        )
        assert done.exit_code == 0, done.output
        return tmp_path / name

    beside = llama(adapter=ADAPTERS / case)
    for name in ("hf", "orbax"):
        whole = leaves(jaxengine.load(convert(LLAMA, name, "--to", name)))
        for n, leaf in leaves(beside).items():
            # a sum in another order, and its rounding to float32
            np.testing.assert_allclose(numbers(whole[n]), numbers(leaf), rtol=1e-6, atol=1e-6, err_msg=n)
    for text, to, words in (("int8", "compressed-tensors", ("--weights", "int8")), ("nf4", "orbax", ())):
        source = LLAMA
        if to == "orbax":
            llama(weights=text).save(source := tmp_path / text, format="orbax")
        found = jaxengine.load(convert(source, f"{text}-merged", "--to", to, *words))
        tuned = llama(adapter=ADAPTERS / case, weights=text if to == "orbax" else "dense")
        for n, leaf in leaves(tuned).items():
            made = leaves(found)[n]
            bound = np.asarray(made.error_bound(), np.float64) if isinstance(made, Weight) else 0.0
            sum_ = numbers(leaf)
            assert (np.abs(numbers(made) - sum_) <= bound + 1e-6 * (1 + np.abs(sum_))).all(), n
    done = CliRunner().invoke(
        command.app, ["convert", str(LLAMA), str(tmp_path / "no"), "--to", "hf", "--adapter", str(tmp_path / "none")]
    )
    assert done.exit_code == 2
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Losses

SGD = dataclasses.replace(HOW, steps=3, remat="none", targets=("q", "down"))


@pytest.mark.parametrize(
    ("train", "name"),
    [
        pytest.param(t, n, marks=[pytest.mark.thorough] if t == "dora" else [])
        for t in ("lora", "dora")
        for n in FORMATS
    ],
)
@pytest.mark.some_rows
def test_losses_over_a_format_are_those_over_its_numbers(name: str, train: str) -> None:
    """A base in a format is the decoded one without it: as another form of one program, whose products are summed in another
    order (test_finetune.py)."""
    over = llama(dtype=dtype_for(name), weights=name, form="scan")
    settings = dataclasses.replace(SGD, train=train)
    found, wanted = losses(run_of(over, settings)), losses(run_of(plain(over), settings))
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)
