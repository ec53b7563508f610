"""What formats of 4-bit codes into a table share: the layout of the codes, the search for the nearest entry, the matmul.

    w_oi ~ table[q_oi] s_og        g = i // G, one scale s for each group of G inputs

The in dims are flattened and padded to whole groups, with the code of zero. Four codes stand in a 16-bit word, those of
inputs a quarter of a group apart (pallas_kernels/quant_matmul/layout.py says why). The number of inputs is then no longer
in the arrays' shapes, so that a Weight carries it: `InShape`.

Functions are written for numpy and jax alike where an importer packs on the host what `encode` packs on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxengine.weights.base import split_spec
from pallas_kernels.quant_matmul import layout, quant_matmul

LEAST_GROUP = 16


class InShape(tuple):
    """The sizes of a matrix's in dims. -1 is any size: names of axes are known before a size is, and `leaf_axes` has to make
    the tree that `encode` makes, whose structure this is part of. No Weight that holds arrays has a -1."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple) or len(self) != len(other):
            return False
        return all(a == b or -1 in (a, b) for a, b in zip(self, other, strict=True))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(len(self))  # what is equal has one hash

    @classmethod
    def any(cls, dims: int) -> InShape:
        return cls((-1,) * dims)


def group_of(inputs: int, group_size: int) -> int:
    """Inputs that share a scale: group_size, but of a row that is shorter the least power of two that holds it, from 16 on."""
    return min(group_size, max(LEAST_GROUP, 1 << (inputs - 1).bit_length()))


def grouped(w: Array, out: int, group_size: int) -> Float[Array, "... NG G"]:
    """w [out..., in...] as float32 groups of inputs, zeros where the last one is padded."""
    inputs = math.prod(w.shape[out:])
    G = group_of(inputs, group_size)
    wide = w.astype(jnp.float32).reshape(*w.shape[:out], inputs)
    wide = jnp.pad(wide, ((0, 0),) * out + ((0, -inputs % G),))
    return wide.reshape(*w.shape[:out], -1, G)


def nearest(
    groups: Float[Array, "... NG G"],
    scale: Float[Array, "... NG"],
    thresholds: Sequence[float],
    ties_up: Sequence[bool] | None = None,
) -> UInt8[Array, "... NG G"]:
    """How many thresholds, times the scale, each number is above: the index of the nearest entry of a sorted table.

    ties_up: of each threshold, whether what is at it counts too; None: nowhere.
    """
    count, scale = jnp.zeros(groups.shape, jnp.uint8), scale[..., None]
    # nothing is divided: XLA takes a quotient by a broadcast as a product, and the inverse of 2^126 and above is flushed to 0
    for t, at in zip(thresholds, ties_up or (False,) * len(thresholds), strict=True):
        count += ((groups >= t * scale) if at else (groups > t * scale)).astype(jnp.uint8)
    return count


def to_words(codes: Any) -> Any:
    """uint8 codes below 16 [..., NG, G] as uint16 [..., NG G / 4], a word's four codes a quarter of a group apart."""
    *lead, groups, G = codes.shape
    q = codes.reshape(*lead, groups, 4, G // 4).astype(np.uint16)
    words = q[..., 0, :] | (q[..., 1, :] << 4) | (q[..., 2, :] << 8) | (q[..., 3, :] << 12)
    return words.reshape(*lead, groups * G // 4)


def codes_of(words: Array, groups: int) -> Array:
    """uint16 [..., K/4] in `groups` groups -> codes [..., K]."""
    return layout.unpack(words, 4, 4 * words.shape[-1] // groups)


def look_up(table: Sequence[float], codes: Array) -> Float[Array, "..."]:
    """table[codes], float32."""
    return jnp.take(jnp.array(table, jnp.float32), codes.astype(jnp.int32), axis=0)


def scaled(values: Float[Array, "... K"], scale: Float[Array, "... NG"], in_shape: InShape) -> Float[Array, "..."]:
    """values, each times its group's scale, without the padding: [..., in...]."""
    *lead, K = values.shape
    product = values.reshape(*lead, scale.shape[-1], -1) * scale[..., None]
    return product.reshape(*lead, K)[..., : math.prod(in_shape)].reshape(*lead, *in_shape)


def contract(spec: str, x: Array, words: Array, scale: Array, kind: str, in_shape: InShape) -> Array:
    """einsum(spec, x, the matrix) in x's dtype; scale [out..., NG] as quant_matmul takes it for `kind`."""
    batch, _, _ = split_spec(spec)
    lead, inputs, K = x.shape[: len(batch)], math.prod(in_shape), 4 * words.shape[-1]
    x_MK = jnp.pad(x.reshape(math.prod(lead), inputs), ((0, 0), (0, K - inputs)))
    groups = scale.shape[-1]
    y_MN = quant_matmul(
        x_MK,
        words.reshape(-1, words.shape[-1]),
        scale.reshape(-1, groups),
        kind=kind,
        group_size=K // groups,
        dtype=x.dtype,
    )
    return y_MN.reshape(*lead, *words.shape[:-1])


def rows(weight: Any, ids: Array, dtype: Any) -> Array:
    """weight.dense()[ids] of a Weight whose arrays all begin with its out dims."""
    return jax.tree.map(lambda a: jnp.take(a, ids, axis=0), weight).dense().astype(dtype)


def packed(name: str, codes: np.ndarray, groups: tuple[int, ...], in_shape: Sequence[int], pad: int) -> np.ndarray:
    """The words of unpacked codes uint8 [out..., I] whose scales have the shape `groups`; the padding has the code `pad`.

    The group size is the power of two, 16 or more, that gives as many groups. Raises ValueError for arrays that disagree.
    """
    if codes.dtype != np.uint8 or codes.ndim < 2:
        raise ValueError(f"{name}: codes are uint8 [out..., inputs], one a byte; got {codes.dtype} {list(codes.shape)}")
    if codes.size and codes.max() > 15:
        raise ValueError(f"{name}: a code is {codes.max()}; 4 bits hold 0 to 15. Unpack two to a byte first")
    inputs = codes.shape[-1]
    if math.prod(in_shape) != inputs:
        raise ValueError(
            f"{name}: codes {list(codes.shape)} have {inputs} inputs, in_shape {tuple(in_shape)} has"
            f" {math.prod(in_shape)}; the product of in_shape is the codes' last dim"
        )
    if groups[:-1] != codes.shape[:-1]:
        raise ValueError(
            f"{name}: codes {list(codes.shape)} and scales {list(groups)} differ in their out dims; scales are"
            f" [{', '.join(map(str, codes.shape[:-1]))}, groups]"
        )
    sizes = [1 << b for b in range(4, 32) if -(-inputs // (1 << b)) == groups[-1]]
    if not sizes:
        near = {-(-inputs // G): G for G in (128, 64, 32)}
        choice = ", ".join(f"{n} (groups of {G})" for n, G in near.items())
        raise ValueError(
            f"{name}: {groups[-1]} scales for {inputs} inputs is no group size that is a power of two from 16 on;"
            f" {choice} would do"
        )
    padded = np.pad(codes, ((0, 0),) * (codes.ndim - 1) + ((0, -inputs % sizes[0]),), constant_values=pad)
    return to_words(padded.reshape(*codes.shape[:-1], -1, sizes[0]))
