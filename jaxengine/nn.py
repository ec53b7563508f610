"""What model files share: parameters with their axes, norms, rotary positions. Pure functions and two constructors.

B batch, T queries, D model, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxengine.config import ConfigError
from jaxengine.weights.base import contract, value


def matrix(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], *, out: int, scale: float = 0.02
) -> nnx.Param[Any]:
    """A matrix [out..., in...]: `out` of its dims are outputs, `axes` names each dim. Drawn from N(0, scale^2)."""
    drawn = scale * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(drawn, axes=tuple(axes), out=out)


def vector(shape: Sequence[int], axes: Sequence[str], *, fill: float = 0.0) -> nnx.Param[Any]:
    """A norm's weight or a bias: never contracted, never quantised."""
    filled = jnp.full(tuple(shape), fill, jnp.float32)
    return nnx.Param(filled, axes=tuple(axes), out=None)


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a block's attention is, apart from its weights.

    `window` tokens are seen (None: all before). A row that grows past `reread_at` tokens is read anew from its first
    one (Phi-3's longrope, where other frequencies then hold for all positions); None: never.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    reread_at: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: {self.num_heads} query heads do not divide into {self.num_kv_heads} kv heads; each kv head"
                f" serves the same number of query heads"
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"config.json: a sliding window of {self.window} tokens; it is at least 1, or null for none"
            )


class Attend(Protocol):
    """How a block reaches the keys and values of other tokens; the engine supplies it, the block does not know which.

    Takes q [B, T, N, H], k and v [B, T, K, H] of the new tokens and the layer's cache (None where there is none), gives
    the attention output [B, T, N, H] and the cache that now holds the new tokens.
    """

    def __call__(
        self, attention: Attention, q: Array, k: Array, v: Array, kv: Any
    ) -> tuple[Float[Array, "B T N H"], Any]: ...


def rms_norm(x: Float[Array, "... D"], weight: Any, eps: float, *, offset: float = 0.0) -> Float[Array, "... D"]:
    """x / rms(x) * (offset + weight), computed in float32 (Zhang & Sennrich, arXiv:1910.07467).

    Gemma stores weight - 1 (offset 1) and multiplies before rounding; Llama rounds x / rms(x) to x's dtype first.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    w = value(weight)
    w = w.reshape((1,) * (x.ndim - w.ndim) + w.shape)
    if offset:
        return (wide * (offset + w.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * w.astype(x.dtype)


def layer_norm(x: Float[Array, "... D"], weight: Any, bias: Any, eps: float) -> Float[Array, "... D"]:
    """(x - mean) / std * weight + bias, computed in float32 (Ba et al., arXiv:1607.06450); either may be None."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    if (w := value(weight)) is not None:
        wide = wide * w.astype(jnp.float32).reshape(shape)
    if (b := value(bias)) is not None:
        wide = wide + b.astype(jnp.float32).reshape(shape)
    return wide.astype(x.dtype)


def plus(x: Array, bias: Any) -> Array:
    """x + bias over x's trailing dims; x unchanged where bias is None."""
    b = value(bias)
    return x if b is None else x + b.reshape((1,) * (x.ndim - b.ndim) + b.shape).astype(x.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    """cap tanh(x / cap); x unchanged where cap is None (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}


def gated_mlp(h: Float[Array, "B T D"], gate: Any, up: Any, down: Any, act: str) -> Float[Array, "B T D"]:
    """down (act(gate h) * up h), without biases; SwiGLU where act is silu (Shazeer, arXiv:2002.05202)."""
    hidden = ACTIVATIONS[act](contract("btd,fd->btf", h, gate)) * contract("btd,fd->btf", h, up)
    return contract("btf,df->btd", hidden, down)


# --- rotary positions (Su et al., arXiv:2104.09864) ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding as numbers: a frequency for each rotated pair, and a factor on cos and sin.

    frequencies: radians per position, float, [rotated dims / 2] (a tuple, so that a Rope hashes). Where a row of
    tokens reaches past `original_length` positions, `long_frequencies` are used for it instead (longrope).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    original_length: int = 0


def rope(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], how: Rope) -> Float[Array, "B T N H"]:
    """Rotate the first 2 len(frequencies) dims of every head by position; dims i and i + half make a pair.

    The angles, cos and sin are float32; the result is in x's dtype.
    """
    half = len(how.frequencies)
    frequencies = jnp.asarray(how.frequencies, jnp.float32)[None, None]
    if how.long_frequencies is not None:
        is_long = positions.max(-1) >= how.original_length
        long = jnp.asarray(how.long_frequencies, jnp.float32)[None, None]
        frequencies = jnp.where(is_long[:, None, None], long, frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = (how.factor * f(angles) for f in (jnp.cos, jnp.sin))
    if x.shape[1] > 1:
        cos, sin = (jax.lax.platform_dependent(a, cpu=_through_identity, default=lambda a: a) for a in (cos, sin))
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _through_identity(x: Array) -> Array:
    """x itself, as a product that XLA:CPU does not fuse into what follows: fused, cos and sin are computed again for every
    head (a tenth of a prefill). No other thing that was tried holds: barriers are gone before the fusion."""
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype))


def rope_from_config(
    parameters: Mapping[str, Any], head_dim: int, *, max_positions: int, where: str = "rope_scaling"
) -> Rope:
    """A Rope from Hugging Face's rope parameters (`rope_theta`, `rope_type` and that type's own fields).

    Types: default; linear (position interpolation, arXiv:2306.15595); llama3 (Llama 3.1, arXiv:2407.21783); yarn
    (arXiv:2309.00071); longrope (arXiv:2402.13753). Raises ConfigError naming `where` for any other, or a missing field.
    """
    p = dict(parameters)
    kind = p.get("rope_type", p.get("type", "default"))
    rotated = int(head_dim * p.get("partial_rotary_factor", 1.0))

    if rotated < 2 or rotated % 2:
        raise ConfigError(
            f"config.json: {rotated} of head_dim {head_dim} are to be rotated, and rope turns pairs: an even number, at"
            f" least 2"
        )

    def need(field: str) -> Any:
        if p.get(field) is None:
            raise ConfigError(f"config.json: {where} of type {kind!r} needs {field!r}; it has {sorted(p)}")
        return p[field]

    pairs = np.arange(0, rotated, 2, dtype=np.float64) / rotated
    base = float(need("rope_theta"))
    plain = base**-pairs
    if kind == "default":
        return Rope(tuple(plain))
    if kind == "linear":
        return Rope(tuple(plain / need("factor")))
    if kind == "llama3":
        low, high, factor = need("low_freq_factor"), need("high_freq_factor"), need("factor")
        turns = need("original_max_position_embeddings") * plain / (2 * np.pi)  # full turns over the trained context
        blend = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow dims, interpolated; 1: fast dims, as trained
        return Rope(tuple(blend * plain + (1 - blend) * plain / factor))
    if kind == "yarn":
        original = p.get("original_max_position_embeddings") or max_positions
        factor = p.get("factor") or max_positions / original
        fast, slow = p.get("beta_fast") or 32, p.get("beta_slow") or 1

        def dim_of(turns: float) -> float:  # the pair that makes `turns` full turns over the trained context
            return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = dim_of(fast), dim_of(slow)
        if p.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        ramp = np.clip((np.arange(rotated // 2) - first) / max(last - first, 0.001), 0, 1)
        return Rope(tuple((1 - ramp) * plain + ramp * plain / factor), _yarn_factor(p, factor))
    if kind == "longrope":
        original = p.get("original_max_position_embeddings") or max_positions
        factor = p.get("factor") or max_positions / original
        attention_factor = p.get("attention_factor")
        if attention_factor is None:
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (np.asarray(need(f), np.float64) for f in ("short_factor", "long_factor"))
        for name, given in (("short_factor", short), ("long_factor", long)):
            if given.shape != plain.shape:
                raise ConfigError(
                    f"config.json: {where}.{name} has {given.size} numbers; head_dim {head_dim} needs {plain.size}"
                )
        return Rope(tuple(plain / short), float(attention_factor), tuple(plain / long), int(original))
    raise ConfigError(
        f"config.json: {where} asks for type {kind!r}; there are default, linear, llama3, yarn and longrope"
    )


def _yarn_factor(p: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on the attention logits, given to cos and sin (arXiv:2309.00071, section 3.4; DeepSeek's mscale)."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)
