"""A step of ours against torch: transformers with AdamW for every parameter, peft for LoRA and DoRA; twenty steps each.

All in float32. Two float32 programs that sum in other orders drift apart step by step: AdamW divides by the root of a second
moment, so that a parameter whose gradient is all rounding moves by up to the learning rate either way. What is held is
the loss of every step, which such parameters hardly move: 2e-4 relative is some hundred times what was measured (below
2e-6), and a wrong sign, scale, decay, mask, clipping or bias correction is above 1e-2 after five steps. Of the first
step each parameter's gradient is held as well (tests/oracles/tuning.py).

As a program, `python tests/test_live_finetune.py` writes tests/golden_finetune, for the tests that have no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
from oracles.golden import GOLDEN  # noqa: E402
from oracles.tuning import (  # noqa: E402
    ALPHA,
    HOW,
    PARTS,
    RANK,
    RTOL,
    VOCAB,
    WHERE,
    assert_gradients,
    batch_of,
    batches,
    first_gradients,
    module,
)

import jaxengine  # noqa: E402
from jaxengine.finetune import layered  # noqa: E402
from jaxengine.finetune.step import Tuning, begin, step  # noqa: E402
from jaxengine.finetune.trained._lowrank import LowRank  # noqa: E402
from jaxengine.finetune.trained.all import Options as Every  # noqa: E402
from jaxengine.finetune.trained.base import lay, layers, trained  # noqa: E402

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("one_quiet_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

GOLDENS = GOLDEN.parent / "golden_finetune"
CASES = {"all": ("all", False), "lora": ("lora", False), "rslora": ("lora", True), "dora": ("dora", False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with grouped heads and random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def theirs(model: Any) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Loss and gradient's norm of every step, by torch's AdamW as transformers' Trainer sets it up; and of the first step the
    gradients."""
    chosen = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in chosen if "norm" in n and "lora" not in n]
    groups = [
        {"params": [p for n, p in chosen if not any(p is q for q in plain)], "weight_decay": HOW.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=HOW.learning_rate, betas=(HOW.b1, HOW.b2), eps=HOW.eps)
    rate = HOW.rate()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(rate(i)) / HOW.learning_rate)
    losses, norms, first = [], [], {}
    model.train()
    for tokens in batches():
        ids = torch.tensor(tokens, dtype=torch.long)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        first = first or {n.removeprefix("base_model.model."): p.grad.numpy().copy() for n, p in chosen}
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in chosen], 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms, first


def peft_model(folder: Path, train: str, *, rs: bool) -> Any:
    """transformers' model with peft's adapters beside some of its matrices, before any step."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), use_rslora=rs, use_dora=train == "dora", lora_dropout=0.0,
        target_modules=[f"{n}_proj" for n in WHERE],
    )  # fmt: skip
    return peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config)


def model_of(folder: Path, **how: Any) -> Any:
    return jaxengine.load(folder, dtype="float32", **how)


def tuning_of(model: Any, train: str, options: Any) -> Tuning:
    return Tuning(dataclasses.replace(model.engine, chunk=0), train, options, HOW)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", [{}, {"home": "host"}, {"home": "split", "resident": 1}], ids=str)
def test_every_parameter(folder: Path, how: dict[str, Any], parts: int) -> None:
    losses, norms, gradients = theirs(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = model_of(folder, **how)
    tuning = tuning_of(model, "all", Every())
    made = trained("all").make(Every(), model.architecture, model.plan, model.params, None)
    assert_gradients(first_gradients(tuning, model, made, batches()[0]), gradients)
    if how:
        banks = tuple(dataclasses.replace(b, weights=()) for b in model.params["banks"])
        state, run = layered.initial(tuning, banks, made), lambda state, rows: layered.step(tuning, banks, state, rows)
    else:
        state, run = begin(tuning, made), lambda state, rows: step(tuning, model.params, state, rows)
    found = []
    for tokens in batches():
        state, measured = run(state, batch_of(tokens, parts))
        found.append((float(measured["loss"]), float(measured["gradient_norm"])))
    assert losses[-1] < losses[0] - 0.3
    assert max(norms) > 1  # clipping is at work
    np.testing.assert_allclose([loss for loss, _ in found], losses, rtol=RTOL)
    np.testing.assert_allclose([norm for _, norm in found], norms, rtol=20 * RTOL)


@pytest.mark.parametrize("how", [{}, {"home": "host"}], ids=str)
@pytest.mark.parametrize(("train", "rs"), [("lora", False), ("lora", True), ("dora", False)])
def test_beside_frozen_weights(folder: Path, train: str, rs: bool, how: dict[str, Any]) -> None:
    options = LowRank(rank=RANK, alpha=ALPHA, rs=rs, targets=tuple(WHERE))
    model = model_of(folder, **how)
    made = trained(train).make(options, model.architecture, model.plan, model.params, jax.random.key(3))
    other = peft_model(folder, train, rs=rs)
    parts = model.plan.parts(model.architecture)
    begun = layers(parts, made["banks"])
    for i, layer in begun.items():
        assert layer.keys() == WHERE.keys()
        for name, leaf in layer.items():
            held = other.get_submodule(f"base_model.model.{module(i, name)}")
            held.lora_A["default"].weight.data = torch.tensor(np.asarray(leaf["a"]).reshape(4, -1))
            assert not held.lora_B["default"].weight.any()
            # both begin from zero; what follows begins from something, or A would have no gradient
            leaf["b"] = (
                np.random.default_rng([i, *name.encode()]).normal(size=leaf["b"].shape, scale=0.05).astype(np.float32)
            )
            held.lora_B["default"].weight.data = torch.tensor(leaf["b"].reshape(-1, 4))
    made = made | {"banks": lay(parts, begun.__getitem__)}
    losses, norms, gradients = theirs(other)
    tuning = tuning_of(model, train, options)
    assert_gradients(first_gradients(tuning, model, made, batches()[0]), gradients)
    state, found = begin(tuning, made), []
    for tokens in batches():
        state, measured = step(tuning, model.params, state, batch_of(tokens))
        found.append((float(measured["loss"]), float(measured["gradient_norm"])))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose([loss for loss, _ in found], losses, rtol=RTOL)
    np.testing.assert_allclose([norm for _, norm in found], norms, rtol=20 * RTOL)


def made_by_torch(case: str) -> dict[str, np.ndarray]:
    """losses, norms, each parameter's first gradient, and what A, B and magnitudes were before the first step."""
    (train, rs), base = CASES[case], GOLDEN / "llama"
    if train == "all":
        begun, model = {}, transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        model, begun = peft_model(base, train, rs=rs), {}
        rng = np.random.default_rng(sorted(CASES).index(case))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if any(name.endswith(PARTS[part]) for part in ("a", "b")):
                    drawn = rng.normal(size=parameter.shape, scale=0.05).astype(np.float32)
                    parameter.data = torch.tensor(drawn)
                begun["begun." + name.removeprefix("base_model.model.")] = parameter.detach().numpy().copy()
    losses, norms, gradients = theirs(model)
    numbers = {"losses": np.asarray(losses), "norms": np.asarray(norms)}
    return numbers | begun | {f"gradient.{n}": g for n, g in gradients.items()}


@pytest.mark.parametrize("case", CASES)
def test_golden_files_are_what_torch_says_today(case: str) -> None:
    with np.load(GOLDENS / f"{case}.npz") as file:
        held = dict(file)
    made = made_by_torch(case)
    assert made.keys() == held.keys()
    for name, x in made.items():
        rtol = RTOL if name == "losses" else 20 * RTOL if name == "norms" else 0
        most = float(np.abs(held[name]).max())
        np.testing.assert_allclose(x, held[name], rtol=rtol, atol=0 if rtol else 7e-5 * most, err_msg=name)


def main() -> None:
    """Write tests/golden_finetune."""
    torch.set_num_threads(1)
    GOLDENS.mkdir(exist_ok=True)
    for case in CASES:
        path = GOLDENS / f"{case}.npz"
        np.savez_compressed(path, **made_by_torch(case))
        print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
