"""Attention of few queries over a long cache: the meaning of the op, in float32.

It is attention by positions (`pallas_kernels/attention/reference.py`) after the cache has been written out as numbers. What
is its own is how a cache may stand in memory. Each of k and v is an array, and where it is codes, scales beside it:

    kind    codes                    scale                    element h of a slot
    raw     float [B, K, S, H]       none                     itself
    int8    int8  [B, K, S, H]       float32 [B, K, S]        s q_h
    int4    uint8 [B, K, S, H/2]     float32 [B, K, S, 2]     s_0 (q_h & 15 - 8), and from h = H/2 on s_1 (q_(h - H/2) >> 4 - 8)

so that a plane of codes (int4 has two) is one operand of a product, with one scale for each slot, and nothing is interleaved.

Paged (vLLM, arXiv:2309.06180): [P, K, page, ...] in place of [B, K, S, ...]. Slot s of row b is slot s % page of page
page_table[b, s // page], and holds position s, for s < lengths[b]. Rows may share pages; what the table says of slots beyond a
row's length is not looked at.

B batch, T queries, S slots, N query heads, K kv heads, H head dim; P pages, M pages of a row.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference

FLOATS = ("bfloat16", "float16", "float32")
MIDDLE = 8  # of int4's codes: what stands for zero


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"] | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    page_table: Int[Array, "B M"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Grouped-query attention [B, T, N, H] in q's dtype; with return_lse beside it the log-sum-exp [B, T, N] in float32."""
    if page_table is not None:
        assert lengths is not None
        k_positions = held(page_table, lengths, k.shape[2])
        k, v = gathered(k, page_table), gathered(v, page_table)
        k_scale, v_scale = (None if a is None else gathered(a, page_table) for a in (k_scale, v_scale))
    assert k_positions is not None
    made = reference.attention(
        q.astype(jnp.float32), dense(k, k_scale), dense(v, v_scale), q_positions, k_positions,
        scale=scale, window=window, softcap=softcap, sinks=sinks, return_lse=return_lse,
    )  # fmt: skip
    return (made[0].astype(q.dtype), made[1]) if return_lse else made.astype(q.dtype)


def kind(codes: Any, scale: Any) -> str:
    """How keys or values are coded: 'raw', 'int8' or 'int4'."""
    return "raw" if scale is None else {"int8": "int8", "uint8": "int4"}[codes.dtype.name]


def planes(codes: Array, scale: Array | None) -> list[tuple[Array, Array | None]]:
    """Numbers in float32 (raw: as they are) and their scales, by the parts of head_dim that share one."""
    if scale is None:
        return [(codes, None)]
    if kind(codes, scale) == "int8":
        return [(codes.astype(jnp.float32), scale)]
    parts = codes & jnp.uint8(15), codes >> jnp.uint8(4)
    return [((x.astype(jnp.int8) - jnp.int8(MIDDLE)).astype(jnp.float32), scale[..., i]) for i, x in enumerate(parts)]


def dense(codes: Array, scale: Array | None) -> Float[Array, "... H"]:
    """What the codes stand for, in float32."""
    made = [x.astype(jnp.float32) if s is None else x * s[..., None] for x, s in planes(codes, scale)]
    return jnp.concatenate(made, -1)


def gathered(pages: Array, page_table: Int[Array, "B M"]) -> Array:
    """[P, K, page, ...] by rows: [B, K, M page, ...]. Entries that are no pages give any page's slots."""
    rows = jnp.take(pages, page_table, axis=0, mode="clip").swapaxes(1, 2)  # [B, K, M, page, ...]
    return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])


def held(page_table: Int[Array, "B M"], lengths: Int[Array, "B"], page: int) -> Int[Array, "B S"]:
    """The position that each slot of a paged cache holds, -1 where none."""
    at = jnp.arange(page_table.shape[1] * page, dtype=jnp.int32)[None]
    return jnp.where(at < lengths.astype(jnp.int32)[:, None], at, -1)


def check(
    q: Any, k: Any, v: Any, q_positions: Any, k_positions: Any, k_scale: Any, v_scale: Any, page_table: Any, lengths: Any,
    sinks: Any, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """ValueError where shapes, dtypes or options are not those of one call."""
    if q.ndim != 4 or k.ndim != 4 or q.dtype.name not in FLOATS:
        raise ValueError(
            f"q is {_said(q)} and k {_said(k)}; q is {', '.join(FLOATS)} [B, T, N, H], k and v are [B, K, S, H], or paged"
            " [P, K, page, H]; codes of int4 are H / 2 wide"
        )
    B, T, N, H = q.shape
    if (k_scale is None) != (v_scale is None):
        there, absent = ("v", "k") if k_scale is None else ("k", "v")
        raise ValueError(f"{there}_scale is given without {absent}_scale; keys and values are coded alike: give both")
    if k_scale is None and k.dtype.name not in FLOATS:
        raise ValueError(
            f"k is {_said(k)} without k_scale; codes come with their scales, raw keys are {', '.join(FLOATS)}"
        )
    if k_scale is not None and k.dtype.name not in ("int8", "uint8"):
        raise ValueError(
            f"k is {_said(k)} with k_scale; codes are int8, or uint8 for two of 4 bits; raw keys have no scale"
        )
    how = kind(k, k_scale)
    outer, K, slots = k.shape[:3]
    if how == "int4" and H % 2:
        raise ValueError(f"head_dim is {H}; int4 puts two elements in a byte: it is even, or take int8")
    codes = (outer, K, slots, H // 2 if how == "int4" else H)
    scales = (outer, K, slots, 2) if how == "int4" else (outer, K, slots)
    wanted = [("k", k, codes), ("v", v, codes), ("k_scale", k_scale, scales), ("v_scale", v_scale, scales)]
    if (page_table is None) != (lengths is None) or (page_table is None) == (k_positions is None):
        raise ValueError(
            "a cache says where its tokens are in one of two ways: k_positions, or page_table and lengths (pages);"
            f" k_positions is {_given(k_positions)}, page_table {_given(page_table)}, lengths {_given(lengths)}"
        )
    wanted += [("q_positions", q_positions, (B, T)), ("sinks", sinks, (N,))]
    if page_table is None:
        wanted += [("k_positions", k_positions, (B, slots)), ("k", k, (B, *codes[1:]))]
    else:
        wanted += [("lengths", lengths, (B,)), ("page_table", page_table, (B, *(page_table.shape[1:2] or (1,))))]
    for name, x, shape in wanted:
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {_said(x)}; with q {list(q.shape)} and k {_said(k)} it is {list(shape)}")
    for name, x, like in (("v", v, k), ("v_scale", v_scale, k_scale)):
        if x is not None and like is not None and x.dtype != like.dtype:
            raise ValueError(f"{name} is {_said(x)}; it is {like.dtype.name} as the keys' is")
    if N % K:
        raise ValueError(f"{N} query heads do not divide into {K} kv heads; each kv head serves N / K query heads")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it is at least 1 (a query sees itself), or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it is greater than 0, or None for no cap")


def _said(x: Any) -> str:
    return f"{x.dtype.name} {list(x.shape)}"


def _given(x: Any) -> str:
    return "None" if x is None else _said(x)
