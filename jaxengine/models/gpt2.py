"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), and what was trained on its code.

    x <- x + W_o attend(W_q h, W_k h, W_v h) + b_o        h = layer_norm(x)
    x <- x + W_2 gelu(W_1 h + b_1) + b_2                  h = layer_norm(x)

Positions are learned, so there are only as many as were trained. The files store every matrix as [in, out], and q, k, v
as one: the name table transposes and cuts, so that here they stand as everywhere.

B batch, T queries, D model, F mlp, N heads, H head dim, V vocab, P positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.table import Row, Table
from jaxengine.config import read_fields
from jaxengine.nn import ACTIVATIONS, Attend, Attention, layer_norm, matrix, plus, vector
from jaxengine.weights.base import contract, take


@dataclasses.dataclass(frozen=True)
class Config:
    """Hugging Face's GPT2Config, as far as the arithmetic needs it."""

    n_inner: int
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """From config.json's fields; ConfigError names what is not supported."""
        return read_fields(
            cls,
            raw,
            only={
                "activation_function": tuple(ACTIVATIONS),
                "add_cross_attention": (False, None),
                # scores are scaled and accumulated in float32 whatever it says
                "reorder_and_upcast_attn": (False, True, None),
            },
            also={"n_inner": raw.get("n_inner") or 4 * raw.get("n_embd", cls.n_embd)},
            used=("n_ctx", "n_special", "predict_special_tokens"),  # in the first files; nothing ever read them
        )

    @property
    def max_position_embeddings(self) -> int:
        """n_positions, as the other families call it."""
        return self.n_positions

    def kinds(self) -> tuple[int, ...]:
        """What each layer divides its scores by: 1, or the layer's own number."""
        return tuple(i + 1 if self.scale_attn_by_inverse_layer_idx else 1 for i in range(self.n_layer))


class Block(nnx.Module):
    """One layer: attention, then the MLP, each on the normed residual stream."""

    def __init__(self, config: Config, kind: int, rngs: nnx.Rngs):
        c = config
        D, F, N, H = c.n_embd, c.n_inner, c.n_head, c.n_embd // c.n_head
        self.attention = Attention(N, N, H, scale=(H**-0.5 if c.scale_attn_weights else 1.0) / kind)
        self.eps, self.act = c.layer_norm_epsilon, c.activation_function
        self.attention_norm = vector((D,), ("norm",), fill=1.0)
        self.attention_norm_bias = vector((D,), ("norm",))
        self.q = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), out=2)
        self.k = matrix(rngs, (N, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.v = matrix(rngs, (N, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.q_bias = vector((N, H), ("heads", "head_dim"))
        self.k_bias = vector((N, H), ("kv_heads", "head_dim"))
        self.v_bias = vector((N, H), ("kv_heads", "head_dim"))
        self.o = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), out=1)
        self.o_bias = vector((D,), ("norm",))
        self.mlp_norm = vector((D,), ("norm",), fill=1.0)
        self.mlp_norm_bias = vector((D,), ("norm",))
        self.up = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.up_bias = vector((F,), ("mlp",))
        self.down = matrix(rngs, (D, F), ("embed", "mlp"), out=1)
        self.down_bias = vector((D,), ("norm",))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        del positions
        h = layer_norm(x, self.attention_norm, self.attention_norm_bias, self.eps)
        q = plus(contract("btd,nhd->btnh", h, self.q), self.q_bias)
        k = plus(contract("btd,nhd->btnh", h, self.k), self.k_bias)
        v = plus(contract("btd,nhd->btnh", h, self.v), self.v_bias)
        y, kv = attend(self.attention, q, k, v, kv)
        x = x + plus(contract("btnh,dnh->btd", y, self.o), self.o_bias)
        h = layer_norm(x, self.mlp_norm, self.mlp_norm_bias, self.eps)
        h = ACTIVATIONS[self.act](plus(contract("btd,fd->btf", h, self.up), self.up_bias))
        return x + plus(contract("btf,df->btd", h, self.down), self.down_bias), kv


class Model(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        V, D, P = config.vocab_size, config.n_embd, config.n_positions
        self.eps = config.layer_norm_epsilon
        self.embedding = matrix(rngs, (V, D), ("vocab", "embed"), out=1)
        self.positions = matrix(rngs, (P, D), ("positions", "embed"), out=1)
        self.final_norm = vector((D,), ("norm",), fill=1.0)
        self.final_norm_bias = vector((D,), ("norm",))
        self.lm_head = None if config.tie_word_embeddings else matrix(rngs, (V, D), ("vocab", "embed"), out=1)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Tokens to the residual stream, in `dtype`."""
        x = take(self.embedding, tokens, dtype)
        return x + take(self.positions, jnp.maximum(positions, 0), dtype)  # padding is at -1

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The residual stream to logits, in x's dtype."""
        h = layer_norm(x, self.final_norm, self.final_norm_bias, self.eps)
        return contract("btd,vd->btv", h, self.embedding if self.lm_head is None else self.lm_head)


def name_table(config: Config) -> Table:
    """Hugging Face's names for these parameters."""
    at = "transformer.h.{layer}."
    qkv = [f"layers.{{layer}}.{n}" for n in "qkv"]
    return Table(
        [
            Row("transformer.wte.weight", "embedding"),
            Row("transformer.wpe.weight", "positions"),
            Row(f"{at}ln_1.weight", "layers.{layer}.attention_norm"),
            Row(f"{at}ln_1.bias", "layers.{layer}.attention_norm_bias"),
            Row(f"{at}attn.c_attn.weight", *qkv, axis=1, transpose=True),
            Row(f"{at}attn.c_attn.bias", *[f"{n}_bias" for n in qkv]),
            Row(f"{at}attn.c_proj.weight", "layers.{layer}.o", transpose=True),
            Row(f"{at}attn.c_proj.bias", "layers.{layer}.o_bias"),
            Row(f"{at}ln_2.weight", "layers.{layer}.mlp_norm"),
            Row(f"{at}ln_2.bias", "layers.{layer}.mlp_norm_bias"),
            Row(f"{at}mlp.c_fc.weight", "layers.{layer}.up", transpose=True),
            Row(f"{at}mlp.c_fc.bias", "layers.{layer}.up_bias"),
            Row(f"{at}mlp.c_proj.weight", "layers.{layer}.down", transpose=True),
            Row(f"{at}mlp.c_proj.bias", "layers.{layer}.down_bias"),
            Row("transformer.ln_f.weight", "final_norm"),
            Row("transformer.ln_f.bias", "final_norm_bias"),
            Row("lm_head.weight", "lm_head"),
        ],
        # *.attn.bias and *.attn.masked_bias were the causal mask
        ignore=("*.attn.bias", "*.attn.masked_bias", *(("lm_head.weight",) if config.tie_word_embeddings else ())),
        prefixes=("transformer.", ""),
    )
