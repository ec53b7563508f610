"""Eight simulated devices give the losses of one, in every way of fine-tuning, under rules that split rows, weights or both.

Gradients are the same sums in another order, which moves a loss by at most 64 roundings of float32 (tests/test_finetune.py).
What a step makes of that is linear under plain descent and MeZO; AdamW's eps is 1e-2 where layers are trained in turn
(tests/test_sampled.py). Muon's factor and 8-bit moments are not: a gradient that differs by r = 64 x 2^-24 of itself takes
another code where it is within r of the middle of two, for one in 1/(2^7 r) = 2000 elements, whose moment then differs by up
to a seventh. So does a change by that much of its part of it: 1/14000 of how far the loss moves, 2 at most, of losses of 5.
Lion's sign, and the first steps of AdamW and Adafactor, which are signs, turn for one in 1/r elements, which is far less.

Every case moves the loss by 100 times as much as its bound, so that a device's rows or a shard's update that were lost would
be seen, and each array that is to be split is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from test_finetune import CLOSE, HOW, llama, losses, moved_by, run_of
from test_mezo import hashed, hashed_chance

from jaxengine.finetune import mezo
from jaxengine.finetune.run import Run, Settings
from jaxengine.plan import Plan

# no axis divides the tiny Llama's vocabulary of 101, which stays whole
WHOLE_VOCAB = Plan(rules=(("vocab", None),))
MESHES = {"data": "data=8", "fsdp": "fsdp=8", "tensor": "data=4,tensor=2", "fsdp+tensor": "fsdp=4,tensor=2"}
SPLIT = {"data": 1, "fsdp": 8, "tensor": 2, "fsdp+tensor": 8}  # of a matrix inside layers
TURNS = {"optimizer": "adamw", "eps": 1e-2, "learning_rate": 0.02}
CODES = 2 / 14000 / 5  # see above
ZEROTH: dict[str, Any] = {"optimizer": "mezo", "clip": None, "eps": 1e-2, "learning_rate": 2e-3}
HOST, PARTLY = {"home": "host"}, {"home": "split", "resident": 1}


def case(
    sharding: str, train: str, how: dict[str, Any], bound: float = CLOSE, *, also: bool = False, **given: Any
) -> Any:
    name = "-".join(
        [train, *(str(v) for n, v in given.items() if n == "optimizer"), how.get("home", "device"), sharding]
    )
    return pytest.param(
        sharding, {"train": train} | given, how, bound, id=name, marks=[pytest.mark.thorough] if also else []
    )


CASES = [
    case("fsdp+tensor", "all", HOST),
    case("data", "all", PARTLY, also=True),
    case("fsdp", "all", HOST, CODES, optimizer="adamw8bit", learning_rate=5e-3),
    case("fsdp+tensor", "all", {"form": "scan"}, CODES, optimizer="muon", learning_rate=5e-3),
    case("fsdp+tensor", "all", HOST, CODES, optimizer="adafactor", learning_rate=5e-3),
    case("fsdp", "all", {"form": "scan"}, CODES, optimizer="adafactor", learning_rate=5e-3),
    case("fsdp+tensor", "all", {"form": "scan"}, CODES, optimizer="lion", learning_rate=5e-3),
    case("tensor", "all", HOST, CODES, optimizer="lion", learning_rate=5e-3, also=True),
    case("fsdp+tensor", "all", {"form": "scan"}, CODES, optimizer="adamw", learning_rate=5e-3),
    case("fsdp", "all", HOST, CODES, optimizer="adamw", learning_rate=5e-3, also=True),
    case("data", "all", {"form": "scan"}, optimizer="sgd", also=True),
    case("fsdp", "all", {"form": "scan"}, CODES, optimizer="adamw8bit", learning_rate=5e-3, also=True),
    case("tensor", "all", HOST, CODES, optimizer="muon", learning_rate=5e-3, also=True),
    case("tensor", "lora", HOST, also=True),
    case("fsdp+tensor", "dora", HOST),
    case("fsdp+tensor", "lisa", HOST, layers=1, every=2, **TURNS),
    case("data", "lisa", {"form": "scan"}, layers=1, every=2, **TURNS, also=True),
    case("tensor", "badam", PARTLY, layers=1, every=2, **TURNS),
    case("fsdp", "hift", HOST, **TURNS),
    case("fsdp+tensor", "all", HOST, **ZEROTH),
    case("data", "lora", HOST, **(ZEROTH | {"learning_rate": 2e-2}), also=True),
]


def split_of(x: jax.Array) -> int:
    return x.size // x.addressable_shards[0].data.size


@pytest.mark.parametrize(("sharding", "given", "how", "bound"), CASES)
def test_eight_devices_are_one(
    sharding: str, given: dict[str, Any], how: dict[str, Any], bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given.get("optimizer") == "mezo":
        monkeypatch.setattr(mezo, "draw", hashed)  # threefry's takes a minute to compile for eight devices
        monkeypatch.setattr(mezo, "chance", hashed_chance)
    settings = dataclasses.replace(HOW, batch=8, steps=4, **given)
    wanted = losses(run_of(llama(**how), settings))
    assert moved_by(wanted) > 100 * bound * max(wanted)
    run = run_of(llama(plan=WHOLE_VOCAB, sharding=sharding, mesh=MESHES[sharding], **how), settings)
    batch = run._put(next(run._feed), 1, 8)
    assert split_of(batch.tokens) == {"tensor": 4, "fsdp+tensor": 4}.get(sharding, 8)
    run._feed = run._batches(state=None)
    np.testing.assert_allclose(losses(run), wanted, rtol=bound)
    looked_at(run, settings, SPLIT[sharding])


def looked_at(run: Run, settings: Settings, split: int) -> None:
    """Each layer's down-projection, and what an optimizer keeps of it, is on so many devices in parts, in its home."""
    for bank in run.model.params["banks"]:
        for layer in bank.weights:
            assert split_of(layer["down"]) == split
            assert layer["down"].sharding.memory_kind == ("pinned_host" if bank.home == "host" else "device")
    shape = run.model.architecture.block(run.model.architecture.kinds[0])[1]["down"].shape
    states = run._state.optimizer
    held = [x for x in jax.tree.leaves(states) if x.ndim >= 2 and x.shape[-2:] == shape]
    if settings.train in ("all", "lisa", "badam", "hift") and settings.optimizer not in ("sgd", "mezo"):
        assert held
    for x in held:
        assert split_of(x) == split
