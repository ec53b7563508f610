"""Gemma 3, the text model (Gemma Team, arXiv:2503.19786).

    x <- x + norm(W_o attend(rope(norm(W_q h)), rope(norm(W_k h)), W_v h))     h = norm(x)
    x <- x + norm(W_down (gelu(W_gate h) * W_up h))                            h = norm(x)

Every sub-layer is normed on its way in and on its way out, norm(x) = x / rms(x) * (1 + w), and queries and keys are
normed per head. Five layers with a short sliding window stand before each one that sees everything, so that
nearly all of a long text's KV cache is bounded; the two sorts turn at different bases of rope, and only the global one
is stretched for long texts.

B batch, T queries, D model, F mlp, N query heads, K kv heads, H head dim, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.table import Row, Table
from jaxengine.config import FULL, SLIDING, ConfigError, freeze, layer_types, read_fields, sliding_window
from jaxengine.nn import (
    ACTIVATIONS,
    Attend,
    Attention,
    gated_mlp,
    matrix,
    plus,
    rms_norm,
    rope,
    rope_from_config,
    softcap,
    vector,
)
from jaxengine.weights.base import contract, take


@dataclasses.dataclass(frozen=True)
class Config:
    """Hugging Face's Gemma3TextConfig, as far as the arithmetic needs it. `rope` holds one set for each type of layer."""

    layer_types: tuple[str, ...]
    rope: tuple[tuple[str, Any], ...]
    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096
    query_pre_attn_scalar: float = 256
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """From config.json's fields; ConfigError names what is not supported."""
        window = sliding_window(raw, cls.sliding_window)
        layers = raw.get("num_hidden_layers", cls.num_hidden_layers)
        every = raw.get("sliding_window_pattern", 6)
        if not isinstance(every, int) or every < 1:
            raise ConfigError(
                f"config.json: sliding_window_pattern is {every!r}; it must be a whole number from 1, e.g. 6"
            )
        pattern = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
        return read_fields(
            cls,
            raw,
            only={
                "hidden_activation": tuple(ACTIVATIONS),
                "use_bidirectional_attention": (False, None),
                "attn_logit_softcapping": (None,),  # transformers has the field and leaves the scores as they are
            },
            also={
                "layer_types": layer_types(raw, window, pattern),
                "rope": freeze(_ropes(raw)),
                "sliding_window": window,  # null means none here, not the default
            },
            used=("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern"),
        )

    def kinds(self) -> tuple[str, ...]:
        """SLIDING or FULL for each layer."""
        return self.layer_types


def _ropes(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rope parameters of either type of layer: nested in `rope_parameters` since transformers 5; before, `rope_theta`
    and `rope_scaling` were the global layers', `rope_local_base_freq` the sliding ones'."""
    nested = raw.get("rope_parameters") or {}
    if unknown := sorted(set(nested) - {FULL, SLIDING}):
        raise ConfigError(f"config.json: rope_parameters has {unknown[0]!r}; it must nest {FULL} and {SLIDING}")
    full, sliding = (nested.get(kind) or {} for kind in (FULL, SLIDING))
    for kind, given in ((FULL, full), (SLIDING, sliding)):
        if given.get("partial_rotary_factor", 1) != 1:
            raise ConfigError(
                f"config.json: rope_parameters.{kind} has partial_rotary_factor {given['partial_rotary_factor']!r};"
                f" gemma3_text rotates whole heads, 1.0"
            )
    return {
        FULL: {
            "rope_theta": raw.get("rope_theta") or 1_000_000.0,
            **full,
            **(raw.get("rope_scaling") or {}),
        },
        SLIDING: {"rope_theta": raw.get("rope_local_base_freq") or 10_000.0, **sliding},
    }


class Block(nnx.Module):
    """One layer: attention, then the gated MLP, each between two norms."""

    def __init__(self, config: Config, kind: str, rngs: nnx.Rngs):
        c = config
        D, F, N, K, H = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        window = c.sliding_window if kind == SLIDING else None
        self.attention = Attention(N, K, H, scale=c.query_pre_attn_scalar**-0.5, window=window)
        self.rope = rope_from_config(
            dict(dict(c.rope)[kind]), H, max_positions=c.max_position_embeddings, where=f"rope_parameters.{kind}"
        )
        self.eps, self.act = c.rms_norm_eps, c.hidden_activation
        self.pre_attention_norm = vector((D,), ("norm",))
        self.q = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), out=2)
        self.k = matrix(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.v = matrix(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.q_norm = vector((H,), ("norm",))
        self.k_norm = vector((H,), ("norm",))
        self.o = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), out=1)
        self.post_attention_norm = vector((D,), ("norm",))
        self.pre_mlp_norm = vector((D,), ("norm",))
        self.gate = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.up = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.down = matrix(rngs, (D, F), ("embed", "mlp"), out=1)
        self.post_mlp_norm = vector((D,), ("norm",))
        self.q_bias = vector((N, H), ("heads", "head_dim")) if c.attention_bias else None
        self.k_bias = vector((K, H), ("kv_heads", "head_dim")) if c.attention_bias else None
        self.v_bias = vector((K, H), ("kv_heads", "head_dim")) if c.attention_bias else None
        self.o_bias = vector((D,), ("norm",)) if c.attention_bias else None

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        h = rms_norm(x, self.pre_attention_norm, self.eps, offset=1.0)
        q = plus(contract("btd,nhd->btnh", h, self.q), self.q_bias)
        k = plus(contract("btd,khd->btkh", h, self.k), self.k_bias)
        v = plus(contract("btd,khd->btkh", h, self.v), self.v_bias)
        q = rope(rms_norm(q, self.q_norm, self.eps, offset=1.0), positions, self.rope)
        k = rope(rms_norm(k, self.k_norm, self.eps, offset=1.0), positions, self.rope)
        y, kv = attend(self.attention, q, k, v, kv)
        y = plus(contract("btnh,dnh->btd", y, self.o), self.o_bias)
        x = x + rms_norm(y, self.post_attention_norm, self.eps, offset=1.0)
        h = rms_norm(x, self.pre_mlp_norm, self.eps, offset=1.0)
        y = gated_mlp(h, self.gate, self.up, self.down, self.act)
        return x + rms_norm(y, self.post_mlp_norm, self.eps, offset=1.0), kv


class Model(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.eps, self.cap = config.rms_norm_eps, config.final_logit_softcapping
        self.embedding = matrix(rngs, (V, D), ("vocab", "embed"), out=1)
        self.final_norm = vector((D,), ("norm",))
        self.lm_head = None if config.tie_word_embeddings else matrix(rngs, (V, D), ("vocab", "embed"), out=1)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Tokens to the residual stream, in `dtype`."""
        del positions
        x = take(self.embedding, tokens, dtype)
        return x * jnp.asarray(x.shape[-1] ** 0.5, dtype)  # sqrt(D) itself is rounded to dtype, as it was in training

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The residual stream to logits, in x's dtype."""
        h = rms_norm(x, self.final_norm, self.eps, offset=1.0)
        logits = contract("btd,vd->btv", h, self.embedding if self.lm_head is None else self.lm_head)
        return softcap(logits, self.cap)


def name_table(config: Config) -> Table:
    """Hugging Face's names for these parameters."""
    at = "model.layers.{layer}."
    return Table(
        [
            Row("model.embed_tokens.weight", "embedding"),
            Row(f"{at}input_layernorm.weight", "layers.{layer}.pre_attention_norm"),
            *[Row(f"{at}self_attn.{n}_proj.weight", f"layers.{{layer}}.{n}") for n in "qkvo"],
            *[Row(f"{at}self_attn.{n}_proj.bias", f"layers.{{layer}}.{n}_bias") for n in "qkvo"],
            *[Row(f"{at}self_attn.{n}_norm.weight", f"layers.{{layer}}.{n}_norm") for n in "qk"],
            Row(f"{at}post_attention_layernorm.weight", "layers.{layer}.post_attention_norm"),
            Row(f"{at}pre_feedforward_layernorm.weight", "layers.{layer}.pre_mlp_norm"),
            *[Row(f"{at}mlp.{n}_proj.weight", f"layers.{{layer}}.{n}") for n in ("gate", "up", "down")],
            Row(f"{at}post_feedforward_layernorm.weight", "layers.{layer}.post_mlp_norm"),
            Row("model.norm.weight", "final_norm"),
            Row("lm_head.weight", "lm_head"),
        ],
        ignore=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ())),
        prefixes=("model.", ""),
    )
