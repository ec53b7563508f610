"""Phi-3, Phi-3.5 mini and medium, Phi-4 and Phi-4 mini (Abdin et al., arXiv:2404.14219, arXiv:2412.08905).

    x <- x + W_o attend(rope(W_q h), rope(W_k h), W_v h)       h = rms_norm(x)
    x <- x + W_down (act(W_gate h) * W_up h)                   h = rms_norm(x)

Llama's arithmetic under other names: q, k and v lie in one tensor, gate and up in another, which the name table takes
apart. `partial_rotary_factor` rotates a part of each head. The long-context models use longrope (Ding et al.,
arXiv:2402.13753): a row of tokens within the original context has one set of frequencies, one that reaches past it has
another, for all of its positions.

B batch, T queries, D model, F mlp, N query heads, K kv heads, H head dim, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.table import Row, Table
from jaxengine.config import ROPE_FIELDS, ConfigError, freeze, read_fields, rope_fields, sliding_window
from jaxengine.nn import ACTIVATIONS, Attend, Attention, gated_mlp, matrix, rms_norm, rope, rope_from_config, vector
from jaxengine.weights.base import contract, take


@dataclasses.dataclass(frozen=True)
class Config:
    """Hugging Face's Phi3Config, as far as the arithmetic needs it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: tuple[tuple[str, Any], ...]
    sliding_window: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """From config.json's fields; ConfigError names what is not supported."""
        heads = raw.get("num_attention_heads") or 1
        return read_fields(
            cls,
            raw,
            only={"hidden_act": tuple(ACTIVATIONS), "full_attn_mod": (1, None), "interpolate_factor": (1, None)},
            also={
                "rope": freeze(_rope_fields(raw)),
                "num_key_value_heads": raw.get("num_key_value_heads") or heads,
                "head_dim": raw.get("head_dim") or raw.get("hidden_size", 0) // heads,
                "sliding_window": sliding_window(raw, None),
            },
            used=ROPE_FIELDS,
        )

    def kinds(self) -> tuple[None, ...]:
        """All layers are alike."""
        return (None,) * self.num_hidden_layers


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters; 'su' and 'yarn' are what early Phi-3 files call longrope."""
    found = rope_fields({"original_max_position_embeddings": 4096, **raw}, partial=True)
    if found["rope_type"] not in ("default", "longrope", "su", "yarn"):
        raise ConfigError(
            f"config.json: rope_scaling asks for type {found['rope_type']!r}; phi3 has default and longrope"
        )
    return {**found, "rope_type": "default" if found["rope_type"] == "default" else "longrope"}


class Block(nnx.Module):
    """One layer: attention, then the gated MLP, each on the normed residual stream."""

    def __init__(self, config: Config, kind: None, rngs: nnx.Rngs):
        c = config
        D, F, N, K, H = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.rope = rope_from_config(dict(c.rope), H, max_positions=c.max_position_embeddings)
        reread_at = None if self.rope.long_frequencies is None else self.rope.original_length
        self.attention = Attention(N, K, H, scale=H**-0.5, window=c.sliding_window, reread_at=reread_at)
        self.eps, self.act = c.rms_norm_eps, c.hidden_act
        self.input_norm = vector((D,), ("norm",), fill=1.0)
        self.q = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), out=2)
        self.k = matrix(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.v = matrix(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.o = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), out=1)
        self.mlp_norm = vector((D,), ("norm",), fill=1.0)
        self.gate = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.up = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.down = matrix(rngs, (D, F), ("embed", "mlp"), out=1)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        h = rms_norm(x, self.input_norm, self.eps)
        q = rope(contract("btd,nhd->btnh", h, self.q), positions, self.rope)
        k = rope(contract("btd,khd->btkh", h, self.k), positions, self.rope)
        v = contract("btd,khd->btkh", h, self.v)
        y, kv = attend(self.attention, q, k, v, kv)
        x = x + contract("btnh,dnh->btd", y, self.o)
        h = rms_norm(x, self.mlp_norm, self.eps)
        return x + gated_mlp(h, self.gate, self.up, self.down, self.act), kv


class Model(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.eps = config.rms_norm_eps
        self.embedding = matrix(rngs, (V, D), ("vocab", "embed"), out=1)
        self.final_norm = vector((D,), ("norm",), fill=1.0)
        self.lm_head = None if config.tie_word_embeddings else matrix(rngs, (V, D), ("vocab", "embed"), out=1)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Tokens to the residual stream, in `dtype`."""
        del positions
        return take(self.embedding, tokens, dtype)

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The residual stream to logits, in x's dtype."""
        h = rms_norm(x, self.final_norm, self.eps)
        return contract("btd,vd->btv", h, self.embedding if self.lm_head is None else self.lm_head)


def name_table(config: Config) -> Table:
    """Hugging Face's names for these parameters."""
    at = "model.layers.{layer}."
    return Table(
        [
            Row("model.embed_tokens.weight", "embedding"),
            Row(f"{at}input_layernorm.weight", "layers.{layer}.input_norm"),
            Row(f"{at}self_attn.qkv_proj.weight", *[f"layers.{{layer}}.{n}" for n in "qkv"]),
            Row(f"{at}self_attn.o_proj.weight", "layers.{layer}.o"),
            Row(f"{at}post_attention_layernorm.weight", "layers.{layer}.mlp_norm"),
            Row(f"{at}mlp.gate_up_proj.weight", "layers.{layer}.gate", "layers.{layer}.up"),
            Row(f"{at}mlp.down_proj.weight", "layers.{layer}.down"),
            Row("model.norm.weight", "final_norm"),
            *([] if config.tie_word_embeddings else [Row("lm_head.weight", "lm_head")]),
        ],
        ignore=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ())),
        prefixes=("model.", ""),
    )
