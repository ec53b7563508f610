"""OPT (Zhang et al., arXiv:2205.01068): GPT-3's architecture with open weights, and Galactica (arXiv:2211.09085) on it.

    x <- x + W_o attend(W_q h, W_k h, W_v h) + b_o        h = layer_norm(x)
    x <- x + W_2 relu(W_1 h + b_1) + b_2                  h = layer_norm(x)

Positions are learned, so there are only as many as were trained. One size (350M) differs: it norms after each residual
sum instead of before, x <- layer_norm(x + f(x)), has no last norm, and embeds in a narrower space that two matrices
connect with the model's.

B batch, T queries, D model, E embedding width (word_embed_proj_dim), F mlp, N heads, H head dim, V vocab, P positions.
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

EPS = 1e-5  # of every norm; config.json has no field for it
OFFSET = 2  # the position table begins with two rows that belong to no position


@dataclasses.dataclass(frozen=True)
class Config:
    """Hugging Face's OPTConfig, as far as the arithmetic needs it."""

    word_embed_proj_dim: int
    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """From config.json's fields; ConfigError names what is not supported."""
        return read_fields(
            cls,
            raw,
            only={
                "activation_function": tuple(ACTIVATIONS),
                "learned_embeddings": (True, None),  # Galactica's files say so
                "scale_embeddings": (False, None),
            },
            also={
                "word_embed_proj_dim": raw.get("word_embed_proj_dim") or raw.get("hidden_size", cls.hidden_size),
                "remove_final_layer_norm": bool(raw.get("_remove_final_layer_norm")),
            },
            used=("_remove_final_layer_norm", "activation_dropout"),
        )

    def kinds(self) -> tuple[None, ...]:
        """All layers are alike."""
        return (None,) * self.num_hidden_layers


class Block(nnx.Module):
    """One layer: attention, then the MLP, each normed before (on the residual stream) or after (the stream itself)."""

    def __init__(self, config: Config, kind: None, rngs: nnx.Rngs):
        c = config
        D, F, N, H = c.hidden_size, c.ffn_dim, c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.attention = Attention(N, N, H, scale=H**-0.5)
        self.act, self.norm_first = c.activation_function, c.do_layer_norm_before
        affine, bias = c.layer_norm_elementwise_affine, c.enable_bias
        self.attention_norm = vector((D,), ("norm",), fill=1.0) if affine else None
        self.attention_norm_bias = vector((D,), ("norm",)) if affine else None
        self.q = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), out=2)
        self.k = matrix(rngs, (N, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.v = matrix(rngs, (N, H, D), ("kv_heads", "head_dim", "embed"), out=2)
        self.o = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), out=1)
        self.mlp_norm = vector((D,), ("norm",), fill=1.0) if affine else None
        self.mlp_norm_bias = vector((D,), ("norm",)) if affine else None
        self.up = matrix(rngs, (F, D), ("mlp", "embed"), out=1)
        self.down = matrix(rngs, (D, F), ("embed", "mlp"), out=1)
        self.q_bias = vector((N, H), ("heads", "head_dim")) if bias else None
        self.k_bias = vector((N, H), ("kv_heads", "head_dim")) if bias else None
        self.v_bias = vector((N, H), ("kv_heads", "head_dim")) if bias else None
        self.o_bias = vector((D,), ("norm",)) if bias else None
        self.up_bias = vector((F,), ("mlp",)) if bias else None
        self.down_bias = vector((D,), ("norm",)) if bias else None

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        del positions
        h = layer_norm(x, self.attention_norm, self.attention_norm_bias, EPS) if self.norm_first else x
        q = plus(contract("btd,nhd->btnh", h, self.q), self.q_bias)
        k = plus(contract("btd,nhd->btnh", h, self.k), self.k_bias)
        v = plus(contract("btd,nhd->btnh", h, self.v), self.v_bias)
        y, kv = attend(self.attention, q, k, v, kv)
        x = x + plus(contract("btnh,dnh->btd", y, self.o), self.o_bias)
        if not self.norm_first:
            x = layer_norm(x, self.attention_norm, self.attention_norm_bias, EPS)
        h = layer_norm(x, self.mlp_norm, self.mlp_norm_bias, EPS) if self.norm_first else x
        h = ACTIVATIONS[self.act](plus(contract("btd,fd->btf", h, self.up), self.up_bias))
        x = x + plus(contract("btf,df->btd", h, self.down), self.down_bias)
        return x if self.norm_first else layer_norm(x, self.mlp_norm, self.mlp_norm_bias, EPS), kv


class Model(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = config
        V, D, E, P = c.vocab_size, c.hidden_size, c.word_embed_proj_dim, c.max_position_embeddings
        self.has_norm = c.do_layer_norm_before and not c.remove_final_layer_norm
        affine = self.has_norm and c.layer_norm_elementwise_affine
        self.embedding = matrix(rngs, (V, E), ("vocab", "embed"), out=1)
        self.positions = matrix(rngs, (P + OFFSET, D), ("positions", "embed"), out=1)
        self.project_in = None if E == D else matrix(rngs, (D, E), ("embed", "embed"), out=1)
        self.final_norm = vector((D,), ("norm",), fill=1.0) if affine else None
        self.final_norm_bias = vector((D,), ("norm",)) if affine else None
        self.project_out = None if E == D else matrix(rngs, (E, D), ("embed", "embed"), out=1)
        self.lm_head = None if c.tie_word_embeddings else matrix(rngs, (V, E), ("vocab", "embed"), out=1)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Tokens to the residual stream, in `dtype`."""
        x = take(self.embedding, tokens, dtype)
        if self.project_in is not None:
            x = contract("bte,de->btd", x, self.project_in)
        return x + take(self.positions, jnp.maximum(positions, 0) + OFFSET, dtype)  # padding is at -1

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The residual stream to logits, in x's dtype."""
        h = layer_norm(x, self.final_norm, self.final_norm_bias, EPS) if self.has_norm else x
        if self.project_out is not None:
            h = contract("btd,ed->bte", h, self.project_out)
        return contract("bte,ve->btv", h, self.embedding if self.lm_head is None else self.lm_head)


def name_table(config: Config) -> Table:
    """Hugging Face's names for these parameters."""
    at, attention = "model.decoder.layers.{layer}.", "model.decoder.layers.{layer}.self_attn."
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return Table(
        [
            Row("model.decoder.embed_tokens.weight", "embedding"),
            Row("model.decoder.embed_positions.weight", "positions"),
            Row("model.decoder.project_out.weight", "project_out"),
            Row("model.decoder.project_in.weight", "project_in"),
            Row("model.decoder.final_layer_norm.weight", "final_norm"),
            Row("model.decoder.final_layer_norm.bias", "final_norm_bias"),
            *[Row(f"{attention}{theirs}.weight", f"layers.{{layer}}.{n}") for n, theirs in names.items()],
            *[Row(f"{attention}{theirs}.bias", f"layers.{{layer}}.{n}_bias") for n, theirs in names.items()],
            Row(f"{at}self_attn_layer_norm.weight", "layers.{layer}.attention_norm"),
            Row(f"{at}self_attn_layer_norm.bias", "layers.{layer}.attention_norm_bias"),
            Row(f"{at}fc1.weight", "layers.{layer}.up"),
            Row(f"{at}fc1.bias", "layers.{layer}.up_bias"),
            Row(f"{at}fc2.weight", "layers.{layer}.down"),
            Row(f"{at}fc2.bias", "layers.{layer}.down_bias"),
            Row(f"{at}final_layer_norm.weight", "layers.{layer}.mlp_norm"),
            Row(f"{at}final_layer_norm.bias", "layers.{layer}.mlp_norm_bias"),
            Row("lm_head.weight", "lm_head"),
        ],
        ignore=("model.decoder.version", *(("lm_head.weight",) if config.tie_word_embeddings else ())),
        prefixes=("model.decoder.", "decoder."),
    )
