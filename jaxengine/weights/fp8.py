"""fp8: 8-bit floats (arXiv:2209.05433) and a scale, for each output, for the matrix, or for each block of 128 by 128.

    s = max |w| / M        q_oi = w_oi / s, rounded to fp8        w_oi ~ q_oi s        M = 448 (e4m3), 57344 (e5m2)

A float's error is relative, at most 2^-4 (e4m3, 3 bits of mantissa) or 2^-3 (e5m2, 2 bits), down to 2^-6 / 448 of the
largest, or 2^-14 / 57344; an int8's is absolute. With a scale for each output int8 is the more exact of the two on normal
numbers; fp8 keeps small numbers beside outliers, which is why one scale for the whole matrix will do. Values above M
saturate: e4m3fn has no infinity, and a cast would give NaN.

scale="block128" is DeepSeek-V3's (arXiv:2412.19437, section 3.3): out and in dims each flattened, cut in 128 from the
start, the last block what is left. A scale for the output alone is applied after the matmul. "tensor" keeps one number
for each output all the same, all equal, so that it is stacked and split like the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from jaxengine.weights.base import Weight, split_spec
from pallas_kernels.quant_matmul import quant_matmul

OPTIONS = {"dtype": ("e4m3", "e5m2"), "scale": ("channel", "tensor", "block128")}

BLOCK = 128
DTYPES: dict[str, Any] = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def _limits(dtype: Any) -> tuple[float, float, float]:
    """(the largest number, half a step relative to a number, half a step among subnormal numbers) of an fp8 dtype."""
    info = ml_dtypes.finfo(dtype)
    return float(info.max), float(info.eps) / 2, float(info.smallest_subnormal) / 2


def _spread(scale: Array, outputs: int, inputs: int) -> Array:
    """A scale for each block [OB, IB] -> for each element [O, I]."""
    return jnp.repeat(jnp.repeat(scale, BLOCK, -2)[..., :outputs, :], BLOCK, -1)[..., :inputs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8(Weight):
    """codes float8 [out..., in...]; scale float32 [out...], or where `blocks` [ceil(O / 128), ceil(I / 128)]."""

    codes: Float[Array, "..."]
    scale: Float[Array, "..."]
    in_dims: int = dataclasses.field(metadata={"static": True})
    blocks: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def _wide_scale(self) -> Array:
        """The scale with the codes' number of dims; broadcasts against them."""
        if not self.blocks:
            return self.scale.reshape(*self.scale.shape, *(1,) * self.in_dims)
        lead, shape = self.scale.shape[:-2], self.codes.shape
        outputs, inputs = math.prod(shape[len(lead) : -self.in_dims]), math.prod(shape[-self.in_dims :])
        return _spread(self.scale, outputs, inputs).reshape(shape)

    def dense(self) -> Array:
        return self.codes.astype(jnp.float32) * self._wide_scale()

    def error_bound(self) -> Array:
        _, relative, absolute = _limits(self.codes.dtype)
        magnitude = jnp.abs(self.codes.astype(jnp.float32))
        # half a step, and in float32 the roundings of scale, quotient and product
        return jnp.maximum(magnitude * (relative + 4 * 2.0**-24), absolute * (1 + 2.0**-12)) * self._wide_scale()

    def contract(self, spec: str, x: Array) -> Array:
        batch, _, _ = split_spec(spec)
        lead, out_shape = x.shape[: len(batch)], self.codes.shape[: -self.in_dims]
        outputs, inputs = math.prod(out_shape), math.prod(self.codes.shape[-self.in_dims :])
        y_MN = quant_matmul(
            x.reshape(math.prod(lead), inputs),
            self.codes.reshape(outputs, inputs),
            self.scale if self.blocks else self.scale.reshape(outputs),
            kind="fp8_block" if self.blocks else "fp8",
            group_size=BLOCK if self.blocks else 0,
            dtype=x.dtype,
        )
        return y_MN.reshape(*lead, *out_shape)

    def take(self, ids: Array, dtype: Any) -> Array:
        codes = jnp.take(self.codes, ids, axis=0).astype(jnp.float32)
        if not self.blocks:
            scale = jnp.take(self.scale, ids, axis=0)
            return (codes * scale.reshape(*scale.shape, *(1,) * (codes.ndim - scale.ndim))).astype(dtype)
        # a row of the first dim is several of the flattened matrix
        each = math.prod(self.codes.shape[1 : -self.in_dims])
        inputs = math.prod(self.codes.shape[-self.in_dims :])
        flat = jnp.expand_dims(ids, -1) * each + jnp.arange(each, dtype=ids.dtype).reshape((1,) * ids.ndim + (each,))
        scale = jnp.repeat(jnp.take(self.scale, flat // BLOCK, axis=0), BLOCK, -1)[..., :inputs]
        return (codes * scale.reshape(codes.shape)).astype(dtype)


def encode(w: Array, *, out: int, dtype: str = "e4m3", scale: str = "channel") -> FP8:
    """Quantise w [out..., in...] to fp8; scale: what shares one, "channel", "tensor" or "block128"."""
    largest, _, absolute = _limits(DTYPES[dtype])
    # of a scale: the least code's product with it, and half of that, are normal float32 numbers
    least = 2.0**-126 / absolute
    O, I = math.prod(w.shape[:out]), math.prod(w.shape[out:])  # noqa: E741
    flat = w.astype(jnp.float32).reshape(O, I)
    magnitude = jnp.abs(flat)
    if scale == "block128":
        tiles = jnp.pad(magnitude, ((0, -O % BLOCK), (0, -I % BLOCK)))
        amax = tiles.reshape(-(-O // BLOCK), BLOCK, -(-I // BLOCK), BLOCK).max(axis=(1, 3))
    else:
        amax = jnp.broadcast_to(magnitude.max(axis=1 if scale == "channel" else None, keepdims=True), (O, 1))
    s = jnp.maximum(amax / largest, least)
    codes = flat / (_spread(s, O, I) if scale == "block128" else s)
    codes = jnp.clip(codes, -largest, largest).astype(DTYPES[dtype]).reshape(w.shape)
    return FP8(codes, s if scale == "block128" else s.reshape(w.shape[:out]), w.ndim - out, scale == "block128")


def leaf_axes(axes: tuple[str | None, ...], out: int, dtype: str = "e4m3", scale: str = "channel") -> FP8:
    """Codes are laid out as w; the scale as its output dims, or blocks' whole on every device: a part of a matrix need not
    end where a block does."""
    del dtype
    blocks = scale == "block128"
    return FP8(axes, (None, None) if blocks else axes[:out], len(axes) - out, blocks)  # pyright: ignore[reportArgumentType]


def pack(codes: np.ndarray, scale: np.ndarray, *, in_shape: Sequence[int], blocks: bool | None = None) -> FP8:
    """What is in fp8 already, in numpy: codes float8_e4m3fn or float8_e5m2 [out..., in...] or [out..., I]; scale float32,
    what a code is multiplied with (DeepSeek's weight_scale_inv): one number, [out...] or [out..., 1], or of blocks
    [ceil(O / 128), ceil(I / 128)].

    blocks: whether the scale is of blocks; None: told by its shape. Raises ValueError for arrays that disagree.
    """
    if codes.dtype not in [np.dtype(d) for d in DTYPES.values()]:
        raise ValueError(
            f"fp8: codes are {codes.dtype}; they are float8_e4m3fn or float8_e5m2 of ml_dtypes. View bytes as one of them"
        )
    inputs = math.prod(in_shape)
    flat = codes.shape[-1:] == (inputs,)
    out_shape = codes.shape[: -1 if flat else -len(in_shape)]
    if not out_shape or codes.shape not in ((*out_shape, inputs), (*out_shape, *in_shape)):
        raise ValueError(
            f"fp8: codes {list(codes.shape)} do not end in the in dims {list(in_shape)}, nor in their product"
        )
    top = codes.view(np.uint8) & 0x7F
    if (top >= (0x7F if codes.dtype == ml_dtypes.float8_e4m3fn else 0x7C)).any():
        raise ValueError(
            "fp8: codes hold NaN or infinity; a weight is finite, so the file is damaged or of another dtype"
        )
    if scale.dtype != np.float32 or not np.isfinite(scale).all():
        raise ValueError(f"fp8: the scale is {scale.dtype} and it is float32 and finite; cast bfloat16 scales first")
    tiles = (-(-math.prod(out_shape) // BLOCK), -(-inputs // BLOCK))
    channels = scale.size == 1 or scale.shape in (out_shape, (*out_shape, 1))
    if blocks is None:
        blocks = not channels
        if channels and scale.shape == tiles and scale.size > 1:
            raise ValueError(f"fp8: a scale {list(scale.shape)} fits both outputs and blocks; say blocks=True or False")
    if (scale.shape != tiles) if blocks else not channels:
        raise ValueError(
            f"fp8: scale {list(scale.shape)} for codes {list(codes.shape)}; it is one number, one for each output"
            f" {list(out_shape)}, or one for each block of {BLOCK} by {BLOCK} {list(tiles)}"
        )
    whole = (
        scale
        if blocks
        else np.ascontiguousarray(
            np.broadcast_to(scale.reshape(-1) if scale.size == 1 else scale.reshape(out_shape), out_shape)
        )
    )
    shaped = codes.reshape(*out_shape, *in_shape)
    return FP8(shaped, whole, len(in_shape), blocks)  # pyright: ignore[reportArgumentType]
