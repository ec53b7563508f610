"""Layers in tiles against the same layers whole: values and losses, and what stands in the compiled program.

Bounds are those of tests/test_finetune.py: 64 roundings of float32, of losses that training moves by a thousand times as much.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.golden import GOLDEN
from test_finetune import CLOSE, HOW, T, llama, losses, moved_by, run_of
from test_homes import FAMILIES

import jaxengine
from jaxengine.cache.base import PlainAttend
from jaxengine.engine import layer_body
from jaxengine.finetune import step as whole
from jaxengine.finetune import tiles
from jaxengine.finetune.run import Settings

TILE = 6  # of 16: the last tile is not full


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some_rows
def test_a_layer_of_every_family(family: str) -> None:
    """Two documents and padding in a row, and a row of one document."""
    model = jaxengine.load(GOLDEN / family, dtype="float32", form="unrolled")
    bank = model.params["banks"][0]
    positions = jnp.asarray([[*range(9), *range(5), -1, -1], [*range(16)]], jnp.int32)
    segments = jnp.asarray([[1] * 9 + [2] * 5 + [0] * 2, [1] * 16], jnp.int32)
    attend = PlainAttend(positions, segments)
    D = model.params["outer"]["embedding"].shape[-1] if family != "opt" else None
    x = np.random.default_rng(0).normal(size=(2, T, D or bank.weights[0]["q"].shape[-1])).astype(np.float32)
    wanted, found = (
        jax.jit(lambda x, body=body: body(bank.kinds[0], bank.weights[0], x, ())[0])(x)
        for body in (layer_body(model.engine, attend), tiles.body(model.engine, attend, TILE))
    )
    there = np.asarray(positions) >= 0
    assert np.abs(np.asarray(wanted) - x).max() > 0.01
    np.testing.assert_allclose(np.asarray(found)[there], np.asarray(wanted)[there], atol=CLOSE * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {"form": "scan"}),
        ({"train": "all"}, {"home": "host"}),
        ({"train": "lisa", "layers": 1, "every": 2, "accumulate": 2, "batch": 1}, {"home": "host"}),
    ],
    ids=str,
)
@pytest.mark.thorough
def test_steps(given: dict[str, Any], how: dict[str, Any]) -> None:
    settings = dataclasses.replace(HOW, steps=3, **given)
    wanted, found = (losses(run_of(llama(**how), s)) for s in (settings, dataclasses.replace(settings, tile=TILE)))
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)


def test_no_feed_forward_block_of_all_tokens_stands() -> None:
    model = llama(form="scan")
    F = model.config.intermediate_size
    seen = {}
    for tile in (0, TILE):
        run = run_of(model, dataclasses.replace(HOW, tile=tile))
        batch = run._next_batch()[0]
        text = whole.step.on("cpu").lower(run.tuning, run._frozen, run._state, batch).compile().as_text()
        seen[tile] = {n for n in (TILE, T) if f"f32[2,{n},{F}]" in text or f"f32[{2 * n},{F}]" in text}
    assert seen[0] == {T}
    assert seen[TILE] == {TILE}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile is 8 and remat 'dots'.*say remat='full' or 'offload'"):
        Settings(tile=8, remat="dots")
    with pytest.raises(ValueError, match="tile is -1; it is a whole number, at least 0"):
        Settings(tile=-1)
