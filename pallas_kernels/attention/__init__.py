"""Attention by positions: one call for prefill, decode and training, and which implementation serves it.

`reference.py` is the meaning. On a GPU the first that serves of cuDNN, our Triton kernel and `xla.py` is taken, or in the order
that was measured on that card (`dispatch.by_measure`), with as many keys as queries, causal: windows, grouped heads and packed
rows follow the order of that case. Each needs memory linear in length, however few the queries are, for
pieces of a long prompt are few queries too. On a CPU `xla.py` serves: in blocks, or, where scores are few, with all of them
written out, which is the faster: a query or two for each kv head over any number of slots, where they take less than the keys
do, or rows of up to a MiB. A refusal is logged once, with its reason; `implementation` asks for one by name, and then a
refusal is the caller's error. By name, or where a table has it, only: `mosaic_gpu.py`, our kernel for Hopper, which has not
run on a card yet, and `tokamax.py`, the library of that name, where it is installed.

Two cores of a Xeon at 2.5 GHz, jax 0.12, 12 heads of 64, float32, CPU milliseconds, few against blocks: one query over
2,048 slots 1.8 and 3.0, 8 such rows 12 and 33; with 4 kv heads 8 queries 1.7 and 1.4, 16 queries 3.6 and 2.9, 64 queries over
8,192 slots 119 and 40; 512 tokens 31 and 20, 2,048 tokens 1220 and 197. In bfloat16 one query over 2,048 slots of 4 kv heads
0.8 and 0.3 to 0.8, 8 such rows 3.7 and 7.6; of 12 kv heads 2.3 and 1.8, 68 and 26, for there few makes a copy in float32.

`sparse_attention` is the same over lists of key blocks, forwards, by our Triton kernel or `xla.py`.

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import cudnn, reference, xla

__all__ = ["NAMES", "ORDER", "attention", "on_cpu", "sparse_attention"]

ORDER = ("cudnn", "triton", "xla")  # on a GPU
FEW = 32  # queries of a kv head, T N / K: their scores take no more than half of the bytes of float32 keys of 64
SMALL = 2**20  # bytes of a row's scores


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
    training: bool = False,
    implementation: str | None = None,
) -> Any:
    """Grouped-query attention [B, T, N, H] in q's dtype, differentiable in q, k, v and sinks; see `reference.attention`.

    return_lse: beside it the natural logarithm of the softmax's denominator, [B, T, N] in float32. contiguous: the caller
    knows that both positions are 0, 1, ... and -1 only after them; what it says is not checked, and is what cuDNN needs.
    training: a gradient will be asked for, so that what was measured forwards and backwards decides the order.
    implementation: by name, 'reference', 'xla', 'cudnn', 'triton', 'mosaic_gpu' or 'tokamax'; None chooses.

    Raises ValueError for shapes that do not belong together, and dispatch.Refused where the implementation asked for cannot
    serve.
    """
    reference.check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    what = "forward and backward" if training else "forward"
    known = NAMES if jax.device_count() == 1 else tuple(n for n in NAMES if n != "tokamax")  # which would be gathered
    order = dispatch.by_measure(
        "attention", ORDER, known, what=what, dtype=q.dtype.name, head_dim=q.shape[3], tokens=q.shape[1]
    )
    return dispatch.choose(
        "attention", IMPLEMENTATIONS, order, on_cpu(q, k), implementation,
        (q, k, v, q_positions, k_positions, sinks, q_segments, k_segments),
        scale=scale, window=window, softcap=softcap, return_lse=return_lse, contiguous=contiguous,
    )  # fmt: skip


def on_cpu(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"]) -> str:
    """Which implementation serves on a CPU: 'few' or 'xla'."""
    (_, T, N, _), (K, S) = q.shape, k.shape[1:3]
    return "few" if T == 1 or T * N // K <= FEW or 4 * N * T * S <= SMALL else "xla"


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    blocks: Int[Array, "B N I M"],
    block_q: int,
    block_k: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """attention in which each block of queries of a head sees the key blocks of a list only: `reference.sparse_attention`.

    On a GPU our Triton kernel serves, and what it refuses, or a CPU, `xla.py`. No table decides between them: what is read
    follows from the lists and not from the call's shape, so that a time measured of one call says nothing of another, and
    there is nothing else that reads lists on a GPU. implementation: 'reference', 'xla' or 'triton'. Forward only: it is for
    reading prompts and for selection.
    """
    reference.check(q, k, v, q_positions, k_positions, window, softcap, sinks, q_segments, k_segments)
    reference.check_blocks(q, blocks, block_q, block_k)
    return dispatch.choose(
        "sparse_attention", SPARSE, ("triton", "xla"), "xla", implementation,
        (q, k, v, q_positions, k_positions, sinks, q_segments, k_segments, blocks),
        block_q=block_q, block_k=block_k, scale=scale, window=window, softcap=softcap, return_lse=return_lse,
    )  # fmt: skip


def _named(*arguments: Any, contiguous: bool, **how: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, by name), for implementations that look at positions and need not be told about them."""
    *first, sinks, q_segments, k_segments = arguments
    return tuple(first), how | {"sinks": sinks, "q_segments": q_segments, "k_segments": k_segments}


def _reference(*arguments: Any, **how: Any) -> Any:
    first, by_name = _named(*arguments, **how)
    return reference.attention(*first, **by_name)


def _xla(*arguments: Any, **how: Any) -> Any:
    first, by_name = _named(*arguments, **how)
    return xla.attention(*first, **by_name)


def _few(*arguments: Any, **how: Any) -> Any:
    first, by_name = _named(*arguments, **how)
    return xla.few(*first, **by_name)


def _cudnn(*arguments: Any, **how: Any) -> Any:
    first, by_name = _named(*arguments, **how)
    return cudnn.attention(*first, **by_name, contiguous=how["contiguous"])


def _triton(*arguments: Any, **how: Any) -> Any:
    try:  # deprecated since jax 0.11; a jax without it has the other implementations
        from pallas_kernels.attention import triton
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Triton ({e}); the chunked form (xla) serves") from e
    first, by_name = _named(*arguments, **how)
    return triton.attention(*first, **by_name)


def _mosaic_gpu(*arguments: Any, **how: Any) -> Any:
    try:
        from pallas_kernels.attention import mosaic_gpu
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Mosaic GPU ({e}); the chunked form (xla) serves") from e
    first, by_name = _named(*arguments, **how)
    return mosaic_gpu.attention(*first, **by_name)


def _tokamax(*arguments: Any, **how: Any) -> Any:
    from pallas_kernels.attention import tokamax  # it asks for the library only when called

    first, by_name = _named(*arguments, **how)
    return tokamax.attention(*first, **by_name, contiguous=how["contiguous"])


IMPLEMENTATIONS = {
    "reference": _reference, "xla": _xla, "cudnn": _cudnn, "triton": _triton, "mosaic_gpu": _mosaic_gpu,
    "tokamax": _tokamax, "few": _few,
}  # fmt: skip
NAMES = tuple(n for n in IMPLEMENTATIONS if n != "few")  # which is for a CPU, and taken there where it is right


def _sparse(function: Any, *arguments: Any, **how: Any) -> Any:
    *first, sinks, q_segments, k_segments, blocks = arguments
    return function(*first, sinks=sinks, q_segments=q_segments, k_segments=k_segments, blocks=blocks, **how)


def _sparse_triton(*arguments: Any, **how: Any) -> Any:
    try:
        from pallas_kernels.attention import triton
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Triton ({e}); the chunked form (xla) serves") from e
    return _sparse(triton.sparse_attention, *arguments, **how)


SPARSE = {
    "reference": functools.partial(_sparse, reference.sparse_attention),
    "xla": functools.partial(_sparse, xla.sparse_attention), "triton": _sparse_triton,
}  # fmt: skip
