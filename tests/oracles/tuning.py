"""Twenty steps of fine-tuning as torch makes them and as we do: the data, the optimizer, and whose gradient is whose.

No torch here: what is compared with numbers that are written down (tests/golden_finetune) needs none.

A gradient is a sum over the n = B T tokens. In float32 each of its terms is off by some 64 roundings of u = 2^-24 (as losses
are, tests/test_finetune.py) in each of two programs, and the sum of the terms' sizes is some sqrt(n) times the largest entry of
a matrix's gradient, terms having either sign: entries differ by at most 2 x 64 u sqrt(n) of the largest, 7e-5 of it. A wrong
sign, scale or mask, or a layer's gradient in another's place, is of the size of the entries themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.step import Batch, Tuning, gradients
from jaxengine.finetune.trained.base import layers
from jaxengine.model import Model

STEPS, B, T, VOCAB = 20, 4, 24, 96
HOW = Optimizer("adamw", 5e-3, schedule="cosine", warmup=3, steps=STEPS, weight_decay=0.1)
RTOL = 2e-4
WHERE = {"q": "self_attn", "v": "self_attn", "o": "self_attn", "gate": "mlp", "down": "mlp"}  # what has an adapter
RANK, ALPHA = 4, 8.0
PARTS = {
    "a": "lora_A.default.weight",
    "b": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}
GRADIENT = 2 * 64 * 2.0**-24 * math.sqrt(B * T)


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


def module(i: int, name: str) -> str:
    """The linear layer that one of our matrices is, by its name inside transformers' model."""
    return f"model.layers.{i}.{WHERE[name]}.{name}_proj"


def first_gradients(tuning: Tuning, model: Model, trained: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Each parameter's gradient by its name in transformers, or for adapters `module.PART`, in their shapes."""
    gradient = jax.jit(lambda trained: gradients(tuning, model.params, trained, batch_of(tokens))[1])(trained)
    return theirs_of(model, gradient)


def theirs_of(model: Model, tree: Any) -> dict[str, np.ndarray]:
    """A trained tree's arrays by their names; DoRA's squares are not trained."""
    arch = model.architecture
    held = layers(model.plan.parts(arch), tree["banks"])
    if not tree["outer"]:
        return {
            f"{module(i, name)}.{PARTS[part]}": _flat(part, np.asarray(x))
            for i, layer in held.items()
            for name, leaf in layer.items()
            for part, x in leaf.items()
            if part in PARTS
        }
    ours = dict(tree["outer"]) | {f"layers.{i}.{n}": x for i, layer in held.items() for n, x in layer.items()}
    table, params = arch.name_table(), arch.params()
    return {
        name: table.assemble(name, lambda n: np.asarray(ours[n]), params)
        for name in table.theirs(params, arch.num_layers)
    }


def _flat(part: str, x: np.ndarray) -> np.ndarray:
    return {
        "a": lambda: x.reshape(len(x), -1),
        "b": lambda: x.reshape(-1, x.shape[-1]),
        "magnitude": lambda: x.reshape(-1),
    }[part]()


def assert_gradients(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Of every parameter, within the bound at the head of the file."""
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        most = float(np.abs(g).max())
        assert most > 0, name
        assert found[name].shape == g.shape, name
        np.testing.assert_allclose(found[name], g, atol=GRADIENT * most, rtol=0, err_msg=name)
