"""LISA, BAdam and HiFT against torch: requires_grad switched on and off, and an AdamW for what is trained, in float32.

Tolerances are those of tests/test_live_finetune.py: the loss of each step within 2e-4, where a wrong layer, or a moment that
should have been kept or dropped, is above 1e-2 after a turn.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracles.tuning import HOW, RTOL, STEPS, batch_of, batches  # noqa: E402
from test_live_finetune import folder as folder  # noqa: E402
from test_live_finetune import model_of  # noqa: E402

from jaxengine.finetune import sampled  # noqa: E402
from jaxengine.finetune.data import permutation  # noqa: E402
from jaxengine.finetune.step import Tuning  # noqa: E402
from jaxengine.finetune.trained.base import trained  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

OPTIONS: dict[str, dict[str, Any]] = {
    "lisa": {"layers": 1, "every": 3}, "badam": {"layers": 1, "every": 4, "order": "ascending"}, "hift": {}
}  # fmt: skip
OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")


def active(name: str, step: int) -> tuple[tuple[str, ...], bool, int]:
    """(prefixes of what a step trains, whether its layers' moments begin anew, the step whose rate holds)."""
    if name == "lisa":
        layer = int(permutation(2, 0, 2**62 + step // 3)[0])
        return (*OUTSIDE, f"model.layers.{layer}."), step % 3 == 0, step
    if name == "badam":
        return (f"model.layers.{step // 4 % 2}.",), step % 4 == 0, step
    group = (("model.embed_tokens",), ("model.layers.0.",), ("model.layers.1.",), ("model.norm", "lm_head"))[step % 4]
    return group, False, step - step % 4 + 2


def theirs(folder: Path, name: str) -> list[float]:
    """The loss of every step."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rate, losses = HOW.rate(), []
    optimizers: dict[str, Any] = {}  # one a parameter, so that moments are kept and dropped alone
    for step, tokens in enumerate(batches()):
        prefixes, anew, at = active(name, step)
        chosen = {n: p for n, p in model.named_parameters() if n.startswith(prefixes)}
        for n, p in model.named_parameters():
            p.requires_grad_(n in chosen)
            p.grad = None
            if anew and "layers" in n:
                optimizers.pop(n, None)
        ids = torch.tensor(tokens, dtype=torch.long)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(chosen.values()), 1.0)
        for n, p in chosen.items():
            decay = 0.0 if "norm" in n else HOW.weight_decay
            own = optimizers.setdefault(
                n, torch.optim.AdamW([p], betas=(HOW.b1, HOW.b2), eps=HOW.eps, weight_decay=decay)
            )
            own.param_groups[0]["lr"] = float(np.asarray(rate(min(at, STEPS - 1))))
            own.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "how"), [("lisa", {"home": "host"}), ("badam", {}), ("hift", {"home": "host"})])
def test_some_layers_at_a_time(folder: Path, name: str, how: dict[str, Any]) -> None:
    losses, model = theirs(folder, name), model_of(folder, **how)
    tuning = Tuning(dataclasses.replace(model.engine, chunk=0), name, trained(name).Options(**OPTIONS[name]), HOW)
    made = trained(name).make(tuning.options, model.architecture, model.plan, model.params, None)
    banks = tuple(dataclasses.replace(b, weights=()) for b in model.params["banks"])
    state, found = sampled.initial(tuning, banks, made), []
    for step, tokens in enumerate(batches()):
        state, measured = sampled.advance(tuning, banks, state, batch_of(tokens), seed=0, number=step)
        found.append(float(measured["loss"]))
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(found, losses, rtol=RTOL)
