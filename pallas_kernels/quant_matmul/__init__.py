"""Rows times a matrix that is held as codes of 8 bits or fewer, and scales.

    y = x W^T        W [N, K] the matrix that codes, scales and zeros stand for (layout.py says how, for each kind)

The matrix is frozen: the gradient is that of x alone, dx = g W, and asked for any other argument's it is zero.
`reference.py` is the meaning; `xla.py` serves everywhere; `triton.py` reads the codes once for few rows on a GPU;
`mosaic_gpu.py` for more on Hopper. By name, or where a table has it, only: that one, which has not run on a card yet, and
"triton_plain", the kernel of `triton.py` without inline PTX, should that be wrong or slow somewhere. On a GPU the order
is ORDER, or where `scripts/bench_quant.py --table` measured the card the fastest first (`dispatch.by_measure`).

M rows, N outputs, K inputs, G group size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import layout, reference, xla

__all__ = ["NAMES", "ORDER", "case", "quant_matmul"]

ORDER = ("triton", "xla")  # on a GPU
X_DTYPES = ("bfloat16", "float16", "float32")


def quant_matmul(
    x: Float[Array, "M K"],
    codes: Any,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    group_size: int,
    dtype: Any,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """x [M, K] times the transpose of a quantised matrix [N, K]; the result [M, N] in `dtype`.

    x: bfloat16, float16 or float32; K counts the padding of the last group (x zero there). codes, scale, zero: see the table
    in layout.py; codes of int5 and int3 are a tuple of two arrays. kind: one of layout.KINDS. group_size: the number of inputs
    that share a scale; 0 for one scale per output (int8, fp8), 128 for fp8_block. Sums, scales and zeros are float32.
    implementation: one of NAMES; None takes what the card's table has as the fastest that
    serves, without one Triton's where it serves, else XLA's.

    Differentiable in x only. Raises ValueError for arguments that disagree, dispatch.Refused where an implementation
    that was asked for by name cannot serve.
    """
    _check(x, codes, scale, zero, kind, group_size, dtype)
    M, N = len(x), layout.outputs(codes)
    if 0 in (*x.shape, N):  # no implementation is to think of it
        return jnp.zeros((M, N), dtype)
    return _quant_matmul(kind, group_size, jnp.dtype(dtype), implementation, x, codes, scale, zero)


def _triton(*arguments: Any, **how: Any) -> Array:
    try:
        from pallas_kernels.quant_matmul import triton
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Triton ({e}); 'xla' serves every call") from e
    return triton.quant_matmul(*arguments, **how)


def _triton_plain(*arguments: Any, **how: Any) -> Array:
    return _triton(*arguments, **how, packed=False)


def _mosaic_gpu(*arguments: Any, **how: Any) -> Array:
    try:
        from pallas_kernels.quant_matmul import mosaic_gpu
    except ImportError as e:
        raise dispatch.Refused(f"this jax has no Pallas for Mosaic GPU ({e}); 'xla' serves every call") from e
    return mosaic_gpu.quant_matmul(*arguments, **how)


IMPLEMENTATIONS = {
    "triton": _triton, "triton_plain": _triton_plain, "xla": xla.quant_matmul, "mosaic_gpu": _mosaic_gpu,
    "reference": reference.quant_matmul,
}  # fmt: skip
NAMES = tuple(IMPLEMENTATIONS)


def case(x: Any, codes: Any, zero: Any, kind: str, group_size: int) -> dict[str, str | int]:
    """What a card's table tells calls by. Numbers in the order in which they decide: rows, inputs of a group (all of a row
    where a scale is an output's), outputs, inputs."""
    M, K = x.shape
    scales = "of groups" if group_size else "of outputs"
    return {
        "kind": kind, "scales": scales if zero is None else f"{scales}, zeros", "dtype": x.dtype.name, "rows": M,
        "group_size": group_size or K, "outputs": layout.outputs(codes), "inputs": K,
    }  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _quant_matmul(
    kind: str,
    group_size: int,
    dtype: Any,
    implementation: str | None,
    x: Array,
    codes: Any,
    scale: Array,
    zero: Array | None,
) -> Array:
    order = dispatch.by_measure("quant_matmul", ORDER, IMPLEMENTATIONS, **case(x, codes, zero, kind, group_size))
    return dispatch.choose(
        "quant_matmul",
        IMPLEMENTATIONS,
        order,
        "xla",
        implementation,
        (x, codes, scale, zero),
        kind=kind,
        group_size=group_size,
        dtype=dtype,
    )


def _forward(
    kind: str, group_size: int, dtype: Any, implementation: str | None, x: Array, codes: Any, scale: Array, zero: Any
) -> tuple[Array, Any]:
    y = _quant_matmul(kind, group_size, dtype, implementation, x, codes, scale, zero)
    return y, (jnp.zeros((0,), x.dtype), codes, scale, zero)


def _backward(
    kind: str, group_size: int, dtype: Any, implementation: str | None, kept: Any, g: Array
) -> tuple[Array, None, None, None]:
    like_x, codes, scale, zero = kept
    dx = xla.transposed(g, codes, scale, zero, kind=kind, group_size=group_size, dtype=like_x.dtype)
    return dx, None, None, None


_quant_matmul.defvjp(_forward, _backward)


def _check(x: Any, codes: Any, scale: Any, zero: Any, kind: str, group_size: int, dtype: Any) -> None:
    """ValueError with the value seen, the rule, and what would do."""
    if kind not in layout.KINDS:
        raise ValueError(f"quant_matmul: there is no kind {kind!r}; there are {', '.join(layout.KINDS)}")
    if x.ndim != 2 or x.dtype.name not in X_DTYPES:
        raise ValueError(
            f"quant_matmul: x is {_said(x)}; it has two dims, rows and inputs (flatten others), and is one of "
            f"{', '.join(X_DTYPES)}"
        )
    if jnp.dtype(dtype).name not in X_DTYPES:
        raise ValueError(f"quant_matmul: the result in {jnp.dtype(dtype).name}? It is one of {', '.join(X_DTYPES)}")
    K = x.shape[1]
    _check_group(kind, group_size, K)
    made_of = codes if isinstance(codes, tuple) else (codes,)
    bits = layout.planes(kind)
    if len(made_of) != max(len(bits), 1):
        raise ValueError(
            f"quant_matmul: codes of {kind} are {max(len(bits), 1)} arrays (a tuple where more than one), got {len(made_of)}"
        )
    N = made_of[0].shape[0]
    wanted = [(N, K * b // 16) for b in bits] or [(N, K)]
    dtypes = ("uint16",) if bits else ("int8",) if kind == "int8" else tuple(jnp.dtype(d).name for d in layout.FP8)
    for array, shape in zip(made_of, wanted, strict=True):
        if array.shape != shape or array.dtype.name not in dtypes:
            raise ValueError(
                f"quant_matmul: codes of {kind} for x [{x.shape[0]}, {K}] are {' or '.join(dtypes)} {list(shape)}, "
                f"got {_said(array)}"
            )
    shape = _scales(kind, group_size, N, K)
    dtypes = ("uint8",) if kind == "mxfp4" else X_DTYPES
    if scale.shape != shape or scale.dtype.name not in dtypes:
        raise ValueError(
            f"quant_matmul: scale of {kind} [{N}, {K}] with group_size {group_size} is {' or '.join(dtypes)} {list(shape)}, "
            f"got {_said(scale)}"
        )
    if zero is None:
        return
    if kind not in layout.MIDDLE:
        raise ValueError(f"quant_matmul: {kind} has no zero (pass None); {', '.join(layout.MIDDLE)} may have one")
    if zero.shape != shape or zero.dtype.name not in dtypes:
        raise ValueError(f"quant_matmul: zero is as scale, {' or '.join(dtypes)} {list(shape)}, got {_said(zero)}")


def _check_group(kind: str, group_size: int, K: int) -> None:
    if kind == "fp8" and group_size != 0:
        raise ValueError(
            f"quant_matmul: fp8 has one scale per output, group_size 0, got {group_size}; or kind 'fp8_block'"
        )
    if kind == "fp8_block" and group_size != layout.BLOCK:
        raise ValueError(f"quant_matmul: blocks of fp8_block are {layout.BLOCK} wide, got group_size {group_size}")
    if kind in ("fp8", "fp8_block") or (kind == "int8" and group_size == 0):
        return
    if group_size < 16 or group_size % 16:
        near = max(16, round(group_size / 16) * 16)
        raise ValueError(
            f"quant_matmul: group_size of {kind} is a multiple of 16, got {group_size}; the nearest is {near}"
        )
    if K % group_size:
        raise ValueError(
            f"quant_matmul: x has {K} inputs, which is not a multiple of group_size {group_size}; "
            f"pad x with zeros to {-(-K // group_size) * group_size}"
        )


def _scales(kind: str, group_size: int, N: int, K: int) -> tuple[int, ...]:
    """The shape of a kind's scales."""
    if kind == "fp8_block":
        return -(-N // group_size), -(-K // group_size)
    return (N, K // group_size) if group_size else (N,)


def _said(array: Any) -> str:
    return f"{array.dtype.name} {list(array.shape)}"
