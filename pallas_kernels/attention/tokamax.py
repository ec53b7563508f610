"""Attention by tokamax, DeepMind's library of kernels, where it is installed; by name, or where a card's table has it first.

On Hopper and Blackwell its kernels on Mosaic GPU are the fastest that JAX has beside cuDNN (by the timings it ships, 0.92 to
0.99 of cuDNN forwards on an H100), on other cards Triton's serve; on a CPU its form in chunks. It is no requirement: it needs
Python 3.12 and brings many packages with it.

Over a mesh its kernels do not say how they split, so that XLA gathers what they read: no table chooses it where there are
several devices.

Its masks are causal by index, as cuDNN's are, and any other is an array [T, S]. So the caller has to say that queries and slots
are the same tokens (`contiguous`; see `cudnn.py`), and what would need an array is refused: segments, positions that are not
0, 1, .... It has no sinks and does not give the log-sum-exp. Soft-caps and windows it has. k and v [B, K, S, H] are turned into
its [B, S, K, H], a copy of each.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import CountsTokens, check
from pallas_kernels.dispatch import Refused, gpu

INSTEAD = "'triton' or 'xla' serves it"
LINEAR = ("mosaic_gpu", "triton")  # on a GPU: those that write no scores
VERSION = "0.0.17"  # what this was tested with


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
    """reference.attention, where q_positions and k_positions are both 0, 1, ... and -1 only after them: contiguous=True."""
    check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    refuse(q, k, sinks=sinks, segments=q_segments, return_lse=return_lse, contiguous=contiguous)
    try:
        library = importlib.import_module("tokamax")
    except ImportError as e:
        raise Refused(
            f"tokamax is not installed ({e}): pip install tokamax=={VERSION}, on Python 3.12 or later; or {INSTEAD}"
        ) from e
    k, v = (a.astype(q.dtype).swapaxes(1, 2) for a in (k, v))
    try:
        out = library.dot_product_attention(
            q, k, v, scale=scale, is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),  # it counts the tokens before the query
            logits_soft_cap=softcap, implementation=("xla_chunked",) if gpu() is None else LINEAR,
        )  # fmt: skip
    except (NotImplementedError, ExceptionGroup) as e:
        said = "; ".join(map(str, e.exceptions)) if isinstance(e, ExceptionGroup) else str(e)
        raise Refused(f"{said.rstrip('.')}: {INSTEAD}") from e
    # padding comes after every query that is real, which therefore never sees it
    return jnp.where((q_positions >= 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def refuse(q: Any, k: Any, *, sinks: Any, segments: Any, return_lse: bool, contiguous: bool) -> None:
    """Raise Refused for the first thing that stands in the way."""
    if not contiguous:
        raise CountsTokens(
            "tokamax's causal mask does not look at positions; say contiguous=True where queries and slots are the same"
            f" tokens at 0, 1, ... with padding at the end only: else {INSTEAD}"
        )
    if q.shape[1] != k.shape[2]:
        raise Refused(
            f"{q.shape[1]} queries and {k.shape[2]} slots cannot be the same tokens (contiguous=True): {INSTEAD}"
        )
    for what, given in (
        ("sinks", sinks is not None), ("segments without an array [T, S]", segments is not None),
        ("the log-sum-exp", return_lse),
    ):  # fmt: skip
        if given:
            raise Refused(f"{what} cannot be asked of tokamax: {INSTEAD}")
