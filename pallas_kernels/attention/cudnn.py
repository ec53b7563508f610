"""Attention by cuDNN, through jax.nn.dot_product_attention: the fastest on data-center cards, for one kind of mask.

cuDNN's causal mask knows nothing of positions: query t sees slots 0 .. t. That is attention by positions when queries and
slots are the same tokens, at 0, 1, ... with padding at the end only, and whether they are cannot be known while a program is
traced. So the caller has to say so (`contiguous`), and anything else is refused. Padding comes after every query that is
real, which therefore never sees it; what the padding's own rows give is replaced by zeros, which also keeps their gradient
from the keys.

Refused besides: what cuDNN cannot do (soft-cap, other widths of heads), and what jax does not hand through: sinks, segments
(a packed batch needs the offsets of its texts, which are not known from segment ids without looking), and the log-sum-exp,
which jax rounds to 16 bits. k and v [B, K, S, H] are turned into jax's [B, S, K, H], a copy of each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import CountsTokens, check
from pallas_kernels.dispatch import Refused, gpu

CHUNKED = "the chunked form (xla) serves it"


class NotHere(Refused):
    """The card that is compiled for can, and it is not this machine's, of which jax asks the library and the GPU."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    contiguous: bool = False,
) -> Any:
    """reference.attention, where q_positions and k_positions are both 0, 1, ... and -1 only after them: contiguous=True.

    Raises NotHere, a Refused, where only this machine stands in the way, and the program is for a card that is not here.
    """
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    refuse(q, k, softcap=softcap, sinks=sinks, segments=q_segments, return_lse=return_lse, contiguous=contiguous)
    k, v = (a.astype(q.dtype).swapaxes(1, 2) for a in (k, v))
    # jax counts the tokens before the query, we with it; two-sided windows are no causal masks
    left = None if window is None else (window - 1, 0)
    try:
        out = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
        )
    except (NotImplementedError, RuntimeError) as e:  # a library too old or not there
        card = gpu()
        refused = Refused if card is None or card.name else NotHere
        raise refused(f"{str(e).rstrip('.')}: {CHUNKED}") from e
    return jnp.where((q_positions >= 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def refuse(
    q: Any, k: Any, *, softcap: float | None, sinks: Any, segments: Any, return_lse: bool, contiguous: bool
) -> None:
    """Raise Refused for the first thing that stands in the way."""
    card, H = gpu(), q.shape[3]
    if not contiguous:
        raise CountsTokens(
            "cuDNN's causal mask does not look at positions; say contiguous=True where queries and slots are the same tokens"
            f" at 0, 1, ... with padding at the end only: else {CHUNKED}"
        )
    if q.shape[1] != k.shape[2]:
        raise Refused(
            f"{q.shape[1]} queries and {k.shape[2]} slots cannot be the same tokens (contiguous=True): {CHUNKED}"
        )
    for what, given in (
        ("a soft-cap", softcap is not None), ("sinks", sinks is not None), ("segments", segments is not None),
        ("the log-sum-exp in float32", return_lse),
    ):  # fmt: skip
        if given:
            raise Refused(f"{what} cannot be asked of cuDNN through jax: {CHUNKED}")
    if card is None:
        raise Refused(f"there is no GPU: {CHUNKED}")
    major, minor = card.capability
    if major < 8:
        raise Refused(f"compute capability {major}.{minor} is below 8.0: {CHUNKED}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Refused(f"q is {q.dtype}; cuDNN takes bfloat16 and float16: {CHUNKED}")
    most = 256 if (9, 0) <= card.capability < (12, 0) else 128
    if H % 8 or most < H:
        raise Refused(
            f"head_dim is {H}; cuDNN takes multiples of 8 up to {most} on compute capability {major}.{minor}: {CHUNKED}"
        )
