"""Columns in another order, resolved part by part of a row, so that devices that split a row need nothing of each other.

GPTQ's act-order (`desc_act`) sorts a row's columns by importance and gives a scale to every G of that order. Column k may then
belong to any group, and where a mesh splits the inputs, a device's codes ask for inputs that others hold. Of a feed-forward
block the order goes into the matrices before (jaxengine/quantized.py; arXiv:2402.04925). Of an attention's output
matrix it cannot: an order P there would have to be made by the heads before it, y = (W P^T) (P a), and P mixes heads,
whose numbers are weighted sums that belong to one head's probabilities each: P a is no attention of other projections but
where P leaves every head's numbers in that head, alike in all heads that share a value.

So the order is kept, and made of orders inside parts. Part p of P is the columns [p I / P, (p + 1) I / P). Its columns
stand by group, each group filled up to whole blocks of 16, and a block has its group's scale:

    y_o = sum_p sum_b s_o,g(p,b) sum_i (q_o,pbi - z_o,g(p,b)) x_p[column(p, b, i)]        an empty slot reads 0

Codes and scales are the same numbers as without parts, so the matrix is the same, and the permutation of part p reads part p
alone. (vLLM, whose kernel looks up the group of each input, sorts inside a shard in the same way and keeps all scales
everywhere; here the kernels stay those of plain groups.) The price: at most 15 empty slots for a group and part, and
a scale for 16 inputs in the place of G. Room is made for the most that there can be, so that shapes follow from sizes alone:
(I / P + 15 I / G) / 16 blocks a part, and up to a multiple of 8.

For numpy and jax arrays alike. I inputs, G group size, P parts, B blocks of a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

SLOTS = 16  # of a block, the least group that there is
TOGETHER = 8  # blocks: kernels take some at a time, and none across parts


def _numpy(array: Any) -> Any:
    """numpy for numpy arrays, jax.numpy for jax's."""
    return np if isinstance(array, np.ndarray) else jnp


class Places(NamedTuple):
    """Where the numbers of a row come from.

    source: [P B 16], the place in the whole row's order that a slot's code comes from (any for an empty slot). group: [P B], the
    group of the whole row that a block's scale comes from. columns: int32 [P, B 16], the column inside its part that a
    slot reads, one beyond the last for an empty slot. ends: int32 [P, groups], the block after the last of each group.
    """

    source: Array
    group: Array
    columns: Int32[Array, "P slots"]
    ends: Int32[Array, "P groups"]


def width(inputs: int, parts: int) -> int:
    """Inputs of a part; the last may have fewer."""
    return -(-inputs // parts)


def blocks_of(inputs: int, groups: int, parts: int) -> int:
    """Blocks of a part: the sum over groups of ceil(n / SLOTS) is at most this, whatever the order. A multiple of TOGETHER."""
    each = width(inputs, parts)
    most = min((each + (SLOTS - 1) * groups) // SLOTS, each)
    return -(-most // TOGETHER) * TOGETHER


def places(perm: Any, group: int, parts: int) -> Places:
    """perm int32 [I]: place i of the row's order is column perm[i], and groups of so many inputs are of that order."""
    xp = _numpy(perm)
    inputs = len(perm)
    groups, each = -(-inputs // group), width(inputs, parts)
    key = perm // each * groups + xp.arange(inputs) // group
    order = xp.argsort(key, stable=True)  # places by part, then by group
    bounds = xp.searchsorted(key[order], xp.arange(parts * groups + 1))
    starts, counts = bounds[:-1].reshape(parts, groups), xp.diff(bounds).reshape(parts, groups)
    ends = xp.cumsum(-(-counts // SLOTS), axis=1)
    of = _group_of_blocks(ends, blocks_of(inputs, groups, parts))
    at = xp.minimum(of, groups - 1)
    start, count, first = (xp.take_along_axis(a, at, 1)[..., None] for a in (starts, counts, ends + -counts // SLOTS))
    rank = (xp.arange(of.shape[1])[None, :, None] - first) * SLOTS + xp.arange(SLOTS)[None, None]
    there = (of < groups)[..., None] & (rank < count)
    source = order[xp.where(there, start + rank, 0)]
    columns = xp.where(there, perm[source] - (xp.arange(parts) * each)[:, None, None], each)
    columns, ends = columns.reshape(parts, -1).astype(np.int32), ends.astype(np.int32)
    return Places(source.reshape(-1), at.reshape(-1), columns, ends)


def _group_of_blocks(ends: Any, blocks: int) -> Any:
    """The group of each block, [P, B]; of an empty one the number of groups."""
    xp = _numpy(ends)
    return (xp.arange(blocks)[None, :, None] >= ends[:, None, :]).sum(-1)


class Whole(NamedTuple):
    """`Places` undone. perm: int32 [I], the row's order; slot: [I], where its codes stand; block: [groups], where a group's
    scale does."""

    perm: Int32[Array, " I"]
    slot: Array
    block: Array


def whole(columns: Any, ends: Any, inputs: int) -> Whole:
    """Of `Places` of rows of so many inputs. Columns of a group come in the order of the parts."""
    xp = _numpy(columns)
    (parts, slots), groups, each = columns.shape, ends.shape[1], width(inputs, len(columns))
    of = _group_of_blocks(ends, slots // SLOTS)
    by_group = xp.where(columns < each, xp.repeat(of, SLOTS, axis=-1), groups).reshape(-1)
    slot = xp.argsort(by_group, stable=True)[:inputs]
    perm = (columns + (xp.arange(parts) * each)[:, None]).reshape(-1)[slot]
    by_block = xp.argsort(of.reshape(-1), stable=True)
    block = by_block[xp.searchsorted(of.reshape(-1)[by_block], xp.arange(groups))]
    return Whole(perm.astype(np.int32), slot, block)
