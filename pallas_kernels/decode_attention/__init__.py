"""Attention of few queries over a long cache, read as it is stored: one call for decoding, and which implementation serves it.

A decode step reads the whole cache for one query, so its time is that of the bytes. Here codes and scales are read as they
are, slots that a row cannot see are passed over, pages are followed in place, and no scores are written.

`reference.py` is the meaning, and says how a cache may stand in memory: contiguous or in pages, raw or as codes of 8 or 4
bits. On a GPU our Triton kernel serves, split over the slots (Flash-Decoding), and what it refuses `xla.py`, block by block;
where a card was measured, the faster goes first (`dispatch.by_measure`).
On a CPU raw contiguous keys and values go to the form for a CPU of `pallas_kernels.attention`, which is the faster there, and
the rest to `xla.py`. A refusal is logged once, with its reason; `implementation` asks for one by name, and then a refusal is the
caller's error.

Two busy cores of a Xeon at 2.5 GHz, jax 0.12, one query of 32 heads over 8,192 slots of 8 kv heads of 128, float32, CPU
milliseconds: raw 11, and 17 in blocks; int8 16 in blocks, and 48 where it is decoded first; int4 25 and 61. In bfloat16 13 and
16, 13 and 34, 21 and 34. Of 2,048 slots of 4 kv heads of 64 int8 takes 1.2 either way, int4 2.1 and 3.0, in bfloat16 2.9 and
1.4.

B batch, T queries, S slots, N query heads, K kv heads, H head dim; P pages, M pages of a row.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import attention as plain
from pallas_kernels import dispatch
from pallas_kernels.decode_attention import reference, xla

__all__ = ["MOST_QUERIES", "NAMES", "ORDER", "decode_attention"]

ORDER = ("triton", "xla")  # on a GPU
MOST_QUERIES = 16  # of a row: above, `pallas_kernels.attention` is made for it


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    *,
    scale: float,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    page_table: Int[Array, "B M"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Grouped-query attention [B, T, N, H] in q's dtype, of a query at p over the slots that hold positions up to p.

    k, v, k_scale, v_scale: the cache, as `reference.py` lists. Where its tokens are: k_positions (-1: an empty slot), or, in
    pages, page_table and lengths. A query at -1 sees nothing and gives zeros. window, softcap, sinks: see
    `pallas_kernels.attention`. return_lse: beside it the natural logarithm of the softmax's denominator, [B, T, N] in
    float32, -1e30 where there is nothing to sum.
    implementation: 'reference', 'xla' or 'triton'; None chooses. No gradient is promised: the Triton kernel has none.

    Raises ValueError for arguments that do not belong together, dispatch.Refused where the implementation asked for cannot
    serve.
    """
    reference.check(
        q, k, v, q_positions, k_positions, k_scale, v_scale, page_table, lengths, sinks, window, softcap
    )  # fmt: skip
    raw = k_scale is None and page_table is None
    order = dispatch.by_measure(
        "decode_attention", ORDER, NAMES, cache=stored(k, k_scale, page_table), dtype=q.dtype.name, head_dim=q.shape[3],
        slots=k.shape[2] * (1 if page_table is None else page_table.shape[1]),
    )  # fmt: skip
    return dispatch.choose(
        "decode_attention", IMPLEMENTATIONS, order, "plain" if raw else "xla", implementation,
        (q, k, v, q_positions, k_positions, k_scale, v_scale, page_table, lengths, sinks),
        scale=scale, window=window, softcap=softcap, return_lse=return_lse,
    )  # fmt: skip


def stored(k: Array, k_scale: Array | None, page_table: Array | None) -> str:
    """How a cache stands in memory, as a table of what was measured calls it: 'raw', 'int8, pages of 64'."""
    kind = reference.kind(k, k_scale)
    return kind if page_table is None else f"{kind}, pages of {k.shape[2]}"


def _plain(
    q: Any, k: Any, v: Any, q_at: Any, k_at: Any, k_scale: Any, v_scale: Any, table: Any, lengths: Any, sinks: Any,
    **how: Any,
) -> Any:  # fmt: skip
    if k_scale is not None or table is not None:
        raise dispatch.Refused("'plain' takes raw contiguous keys and values; 'xla' serves codes and pages")
    # by name: this is traced for a CPU, whatever card there is beside it
    by = plain.on_cpu(q, k)
    return plain.attention(q, k.astype(q.dtype), v.astype(q.dtype), q_at, k_at, sinks=sinks, implementation=by, **how)


def _triton(*arguments: Any, **how: Any) -> Any:
    try:  # deprecated since jax 0.11; a jax without it has the other implementations
        from pallas_kernels.decode_attention import triton
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Triton ({e}); the form in blocks (xla) serves") from e
    return triton.decode_attention(*arguments, **how)


IMPLEMENTATIONS = {
    "reference": reference.decode_attention, "xla": xla.decode_attention, "plain": _plain, "triton": _triton,
}  # fmt: skip
NAMES = tuple(n for n in IMPLEMENTATIONS if n != "plain")  # which is the other op, for a CPU
