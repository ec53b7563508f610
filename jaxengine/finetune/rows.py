"""A large parameter outside the layers, changed some of its rows at a time.

The embedding and the head of a model with a large vocabulary are several of its layers in size. Changed whole, such a
parameter needs its moments as they came and as they go on the device, beside its gradient. So where an optimizer changes each
element by its own gradient, rows are changed one block after another: their moments come from host memory and go back, in
place. Until then what the head's way back gave waits in host memory, while layers go back through.

V rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.optimizers.base import optimizer as find_optimizer
from jaxengine.homes.base import home

BYTES = 2**25  # of float32 rows that are changed at a time


def blocks(how: Optimizer, shape: Sequence[int], shard: Sequence[int]) -> int:
    """In how many blocks a parameter of this shape is changed, of which a device has `shard`; 1 where it is changed whole: it
    is small, its rows are split over devices, a change depends on all of it, or no equal blocks of rows end where blocks of
    codes do (moments in 8 bits).

    Blocks have V // n rows or one more, and of each size there are none or several: a loop of one turn is none to XLA, and
    what it takes from host memory would be read by a kernel, not copied.
    """
    multiple, V, columns = find_optimizer(how.name).ROWS, shape[0], math.prod(shape[1:])
    if not multiple or len(shape) < 2 or shard[0] < V or 4 * math.prod(shard) < 2 * BYTES:
        return 1
    least = multiple // math.gcd(multiple, columns)
    for n in range(4 * math.prod(shard) // BYTES, V // (2 * least)):
        odd = V % n
        if odd != 1 and n - odd != 1 and (least == 1 or (not odd and V // n % least == 0)):
            return n
    return 1


@dataclasses.dataclass(frozen=True)
class Block:
    """`rows` of V rows, beside each other: number i of those that begin with row `first`."""

    i: Any
    rows: int
    first: int
    whole: int

    def cut(self, x: Array) -> Array:
        """Them of an array [V, ...], or of one whose first dim goes with the rows in proportion."""
        return lax.dynamic_slice_in_dim(x, self._start(x), self._of(x, self.rows))

    def put(self, x: Array, new: Array) -> Array:
        """The array with these in their place."""
        return lax.dynamic_update_slice_in_dim(x, new, self._start(x), 0)

    def _start(self, x: Array) -> Any:
        return self._of(x, self.first) + self.i * self._of(x, self.rows)

    def _of(self, x: Array, rows: int) -> int:
        return rows * len(x) // self.whole


def each_block(f: Callable[[Block, Any], Any], n: int, whole: int, carry: Any) -> Any:
    """carry = f(block, carry), from the first of n blocks to the last."""
    rows, more = divmod(whole, n)
    for size, first, count in ((rows, 0, n - more), (rows + 1, (n - more) * rows, more)):
        if count:
            block = functools.partial(Block, rows=size, first=first, whole=whole)
            carry = lax.fori_loop(0, count, lambda i, carry, block=block: f(block(i), carry), carry)
    return carry


@functools.partial(jax.tree_util.register_dataclass, data_fields=["here", "waits"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Gradient:
    """A parameter's, float32 [V, ...]: the sum of what is `here`, on the device, and what `waits` in host memory, or of the
    one that there is."""

    here: Array | None = None
    waits: Array | None = None

    def of(self, cut: Callable[[Array], Array] = lambda x: x) -> Array:
        """It, or some of its rows, on the device."""
        parts = [cut(x) for x in (self.here,) if x is not None]
        parts += [home("host").fetch(cut(x)) for x in (self.waits,) if x is not None]
        return sum(parts[1:], parts[0])

    def squared(self, n: int) -> Float[Array, ""]:
        """The sum of its squares. n: its blocks."""
        if self.waits is None:
            return optax.tree.norm(self.of(), squared=True)

        def more(block: Block, total: Array) -> Array:
            return total + optax.tree.norm(self.of(block.cut), squared=True)

        return each_block(more, n, len(self.waits), jnp.float32(0))


def change(use: Any, carry: Any, name: str, n: int, gradient: Gradient, weight: Array, state: Any) -> Any:
    """(carry, weight, state) after `use`, as `layered.backward` has it, was given each block. state: the optimizer's of
    {name: weight}, in host memory but for its counters, which every block is given as they were."""
    before, structure = jax.tree.flatten(state)

    def one(block: Block, loop: Any) -> Any:
        carry, weight, held = loop
        moments = [block.cut(x) if x.ndim else was for x, was in zip(held, before, strict=True)]
        moments = home("host").fetch(jax.tree.unflatten(structure, moments))
        carry, changed, moments = use(carry, {name: gradient.of(block.cut)}, {name: block.cut(weight)}, moments)
        held = [
            block.put(x, jax.device_put(new, jax.typeof(x).memory_space)) if x.ndim else new
            for x, new in zip(held, jax.tree.leaves(moments), strict=True)
        ]
        return carry, block.put(weight, changed[name]), held

    carry, weight, held = each_block(one, n, len(weight), (carry, weight, before))
    return carry, weight, jax.tree.unflatten(structure, held)
