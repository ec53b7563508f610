"""Twenty steps of a tiny Llama against numbers that torch and peft wrote down (tests/test_live_finetune.py, which also says how
close): the loss and the gradient's norm of every step, and each parameter's gradient at the first."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN
from oracles.tuning import (
    ALPHA,
    HOW,
    PARTS,
    RANK,
    RTOL,
    STEPS,
    WHERE,
    assert_gradients,
    batch_of,
    batches,
    first_gradients,
    module,
)

import jaxengine
from jaxengine.finetune.step import Tuning, begin, step
from jaxengine.finetune.trained._lowrank import LowRank
from jaxengine.finetune.trained.all import Options as Every
from jaxengine.finetune.trained.base import lay, layers, trained

CASES = {"all": ("all", False), "lora": ("lora", False), "rslora": ("lora", True), "dora": ("dora", False)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.some_rows
def test_twenty_steps_are_torchs(case: str) -> None:
    with np.load(GOLDEN.parent / "golden_finetune" / f"{case}.npz") as file:
        held = dict(file)
    train, rs = CASES[case]
    model = jaxengine.load(GOLDEN / "llama", dtype="float32")
    options: Any = Every() if train == "all" else LowRank(rank=RANK, alpha=ALPHA, rs=rs, targets=tuple(WHERE))
    made = trained(train).make(options, model.architecture, model.plan, model.params, jax.random.key(0))
    if train != "all":
        parts = model.plan.parts(model.architecture)
        fresh = layers(parts, made["banks"])

        def given(i: int, name: str, part: str, x: Any) -> Any:
            if part not in PARTS:
                return x
            begun = held[f"begun.{module(i, name)}.{PARTS[part]}"].reshape(x.shape)
            if part == "magnitude":  # peft takes the rows' norms itself
                np.testing.assert_allclose(x, begun, rtol=1e-6)
            return jnp.asarray(begun)

        made["banks"] = lay(
            parts,
            lambda i: {n: {p: given(i, n, p, x) for p, x in leaf.items()} for n, leaf in fresh[i].items()},
        )
    tuning: Any = Tuning(dataclasses.replace(model.engine, chunk=0), train, options, HOW)
    gradients = {n.removeprefix("gradient."): g for n, g in held.items() if n.startswith("gradient.")}
    assert_gradients(first_gradients(tuning, model, made, batches()[0]), gradients)
    state, found = begin(tuning, made), []
    for tokens in batches():
        state, measured = step(tuning, model.params, state, batch_of(tokens))
        found.append((float(measured["loss"]), float(measured["gradient_norm"])))
    assert len(held["losses"]) == STEPS
    assert held["losses"][-1] < held["losses"][0] - 100 * RTOL
    np.testing.assert_allclose([loss for loss, _ in found], held["losses"], rtol=RTOL)
    np.testing.assert_allclose([norm for _, norm in found], held["norms"], rtol=20 * RTOL)
