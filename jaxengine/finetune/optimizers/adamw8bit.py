"""AdamW with its two moments in 8 bits (Dettmers et al., arXiv:2110.02861): 2 bytes for each parameter in place of 8.

A moment is cut into blocks of 256 in the order of its elements; a block is its largest size and 256 codes into a map of
numbers in [-1, 1] (or [0, 1]: a second moment has no sign). The map is dynamic (Dettmers, arXiv:1511.04561): seven decades,
and in each decade twice as many numbers as in the one below it, so that a block's large numbers are told apart finely and its
small ones are not lost. A step makes the moments in float32, changes the parameters by these, and rounds them to the nearest
code. What has fewer than 4096 elements keeps float32 moments, as in bitsandbytes, whose numbers these are; of a stack of
layers one layer's count. (Blocks go on from layer to layer where a layer's elements are no multiple of 256.)
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from jaxengine.finetune.optimizers.base import Matrix, Optimizer

ORDER = 1
TOGETHER = True  # XLA makes the moments of all parameters before it rounds any
DIVIDES = True
BLOCK = 256  # elements with a scale of their own
ROWS = BLOCK
LEAST = 4096  # elements: what has fewer stays in float32
DECADES = 7


class Moments(NamedTuple):
    """count: steps made. The trees are the parameters': codes are a uint8 array of the parameter's shape, and scales one
    float32 for each block; where a parameter is small, codes are the moment itself and there are no scales."""

    count: Int[Array, ""]
    first: Any
    first_scales: Any
    second: Any
    second_scales: Any


@functools.cache
def numbers(signed: bool) -> np.ndarray:
    """The 256 numbers that codes stand for, float32, ascending: the middles of equal parts of each decade, 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1)
        found += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(found, np.float32))


def encode(moment: Float[Array, "..."], *, signed: bool) -> tuple[UInt8[Array, "..."], Float[Array, "blocks"]]:
    """(codes of the moment's shape, scales)."""
    blocks = _blocks(moment)
    scales = jnp.abs(blocks).max(-1)
    scaled = blocks / jnp.where(scales > 0, scales, 1)[:, None]
    table = numbers(signed)
    middles = jnp.asarray(np.append((table[:-1] + table[1:]) / 2, np.float32(np.inf)))
    # a search by halves: as a chain of look-ups it is one kernel, which holds nothing. The first half is that of one number: a
    # look-up of the same everywhere XLA would make when it compiles, in seconds
    code = jnp.where(scaled > middles[127], 128, 0)
    for bit in reversed(range(7)):
        code = jnp.where(scaled > middles[code + (2**bit - 1)], code + 2**bit, code)
    return code.astype(jnp.uint8).reshape(-1)[: moment.size].reshape(moment.shape), scales


def decode(codes: UInt8[Array, "..."], scales: Float[Array, "blocks"], *, signed: bool) -> Float[Array, "..."]:
    """The moment, float32."""
    values = jnp.asarray(numbers(signed))[_blocks(codes).astype(jnp.int32)] * scales[:, None]
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


def _blocks(x: Array) -> Array:
    """[blocks, BLOCK], filled with zeros at the end."""
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def scale_by_adam8bit(b1: float, b2: float, eps: float, matrices: Any = None) -> optax.GradientTransformation:
    """As optax.scale_by_adam, with moments in 8 bits. matrices: see optimizers/base.py."""

    def init(params: Any) -> Moments:
        leaves, tree = jax.tree.flatten(params)
        how = [None] * len(leaves) if matrices is None else tree.flatten_up_to(matrices(params))
        codes, scales = [], []
        for p, matrix in zip(leaves, how, strict=True):
            coded = math.prod(p.shape[matrix.stacked if matrix is not None else 0 :]) >= LEAST
            codes.append(jnp.zeros(p.shape, jnp.uint8 if coded else jnp.float32))
            scales.append(jnp.zeros(-(-p.size // BLOCK), jnp.float32) if coded else None)
        trees = [jax.tree.unflatten(tree, of) for of in (codes, scales, codes, scales)]
        return Moments(jnp.zeros((), jnp.int32), *trees)

    def update(updates: Any, state: Moments, params: Any = None) -> tuple[Any, Moments]:
        del params
        gradients, tree = jax.tree.flatten(updates)
        count = state.count + 1
        steps = count.astype(jnp.float32)
        made = []
        for g, *held in zip(gradients, *(tree.flatten_up_to(t) for t in state[1:]), strict=True):
            m, v = _read(held[0], held[1], signed=True), _read(held[2], held[3], signed=False)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            change = m / (1 - b1**steps) / (jnp.sqrt(v / (1 - b2**steps)) + eps)
            made.append((change, *_write(m, held[1], signed=True), *_write(v, held[3], signed=False)))
        change, *trees = (
            (jax.tree.unflatten(tree, column) for column in zip(*made, strict=True)) if made else (updates, *state[1:])
        )
        return change, Moments(count, *trees)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _read(codes: Array, scales: Array | None, *, signed: bool) -> Array:
    return codes if scales is None else decode(codes, scales, signed=signed)


def _write(moment: Array, scales: Array | None, *, signed: bool) -> tuple[Array, Array | None]:
    return (moment, None) if scales is None else encode(moment, signed=signed)


def temporaries(shape: tuple[int, ...], matrix: Matrix | None) -> int:
    """Both moments in float32."""
    del matrix
    return 8 * math.prod(shape)


def make(how: Optimizer, decayed: Any, matrices: Any) -> optax.GradientTransformation:
    """2 bytes of state for each parameter, and 8 for a block of 256."""
    return how.finish(scale_by_adam8bit(how.b1, how.b2, how.eps, matrices), decayed)
