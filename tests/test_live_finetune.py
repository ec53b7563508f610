"""A step of ours against torch: transformers with AdamW for every parameter, peft for LoRA and DoRA; twenty steps each.

All in float32. Two float32 programs that sum in other orders drift apart step by step: AdamW divides by the root of a second
moment, so that a parameter whose gradient is all rounding moves by up to the learning rate either way. What is held is
the loss of every step, which such parameters hardly move: 2e-4 relative is some hundred times what was measured (below
2e-6), and a wrong sign, scale, decay, mask, clipping or bias correction is above 1e-2 after five steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jaxengine  # noqa: E402
from jaxengine.finetune import layered  # noqa: E402
from jaxengine.finetune.optimizers.base import Optimizer  # noqa: E402
from jaxengine.finetune.step import Batch, Tuning, begin, step  # noqa: E402
from jaxengine.finetune.trained._lowrank import LowRank  # noqa: E402
from jaxengine.finetune.trained.all import Options as Every  # noqa: E402
from jaxengine.finetune.trained.base import layers, trained  # noqa: E402

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("one_quiet_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, B, T, VOCAB = 20, 4, 24, 96
HOW = Optimizer("adamw", 5e-3, schedule="cosine", warmup=3, steps=STEPS, weight_decay=0.1)
RTOL = 2e-4


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


def batches() -> list[np.ndarray]:
    """Sequences with something to learn: each token follows from the one before it, with a row's own stride."""
    rng = np.random.default_rng(0)
    starts, strides = rng.integers(0, VOCAB, (STEPS, B, 1)), rng.integers(1, 4, (STEPS, B, 1))
    return list(((starts + strides * np.arange(T)) % VOCAB).astype(np.int32))


def batch_of(tokens: np.ndarray, parts: int = 1) -> Batch:
    """The batch that gives the loss that transformers takes: the mean over all tokens but each row's first."""
    targets, weights = np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    cut = lambda x: jnp.asarray(x.reshape(parts, -1, T))  # noqa: E731
    return Batch(*(cut(x) for x in (tokens, targets, weights, positions, np.ones_like(tokens))))


def theirs(model: Any) -> tuple[list[float], list[float]]:
    """Loss and gradient's norm of every step, by torch's AdamW as transformers' Trainer sets it up."""
    chosen = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in chosen if "norm" in n and "lora" not in n]
    groups = [
        {"params": [p for n, p in chosen if not any(p is q for q in plain)], "weight_decay": HOW.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=HOW.learning_rate, betas=(HOW.b1, HOW.b2), eps=HOW.eps)
    rate = HOW.rate()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(rate(i)) / HOW.learning_rate)
    losses, norms = [], []
    model.train()
    for tokens in batches():
        ids = torch.tensor(tokens, dtype=torch.long)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in chosen], 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms


def model_of(folder: Path, **how: Any) -> Any:
    return jaxengine.load(folder, dtype="float32", **how)


def tuning_of(model: Any, train: str, options: Any) -> Tuning:
    return Tuning(dataclasses.replace(model.engine, chunk=0), train, options, HOW)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", [{}, {"home": "host"}, {"home": "split", "resident": 1}], ids=str)
def test_every_parameter(folder: Path, how: dict[str, Any], parts: int) -> None:
    losses, norms = theirs(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = model_of(folder, **how)
    tuning = tuning_of(model, "all", Every())
    made = trained("all").make(Every(), model.architecture, model.plan, model.params, None)
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
    options = LowRank(rank=4, alpha=8.0, rs=rs, targets=("q", "v", "o", "gate", "down"))
    model = model_of(folder, **how)
    made = trained(train).make(options, model.architecture, model.plan, model.params, jax.random.key(3))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=rs, use_dora=train == "dora", lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    )  # fmt: skip
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = peft.get_peft_model(base, config)
    where = {"q": "self_attn", "v": "self_attn", "o": "self_attn", "gate": "mlp", "down": "mlp"}
    for i, layer in layers(model.plan.parts(model.architecture), made["banks"]).items():
        assert layer.keys() == where.keys()
        for name, leaf in layer.items():
            module = other.get_submodule(f"base_model.model.model.layers.{i}.{where[name]}.{name}_proj")
            module.lora_A["default"].weight.data = torch.tensor(np.asarray(leaf["a"]).reshape(4, -1))
            assert not module.lora_B["default"].weight.any()
            assert not np.asarray(leaf["b"]).any()
    losses, norms = theirs(other)
    tuning = tuning_of(model, train, options)
    state, found = begin(tuning, made), []
    for tokens in batches():
        state, measured = step(tuning, model.params, state, batch_of(tokens))
        found.append((float(measured["loss"]), float(measured["gradient_norm"])))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose([loss for loss, _ in found], losses, rtol=RTOL)
    np.testing.assert_allclose([norm for _, norm in found], norms, rtol=20 * RTOL)
