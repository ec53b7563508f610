"""How a long cache is cut: blocks of slots, which of them a row can see, and splits for different cores.

Few queries make one tile of rows for each kv head, and without splitting no more programs than rows times kv heads: 8 for
one sequence of a model with 8 kv heads, on a card of 132 cores. So each row's blocks are divided among `splits` programs,
whose partial results are merged afterwards (Flash-Decoding, Dao et al., 2023; the merge of arXiv:1805.02867). What is divided
is the span of blocks that the row can see, not the slots of the cache: a short row in a long cache is spread over all
programs too, down to FEWEST blocks each, and what is left over does nothing.

A block must fit the shared memory that one block of threads can have: 99 KiB on 8.6, 8.9 and 12.0. `shared_bytes` is a
closed form from above, held against the compiler's word in tests/test_decode_attention_triton.py.

B batch, T queries, S slots, K kv heads, H head dim; R rows of a kv head: T N / K.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.dispatch import Gpu

FAR = 2**30  # later than every position
FEWEST = 4  # blocks of a split: below, filling the pipeline and merging cost as much as reading
RESIDENT = 2  # blocks of threads that stand on a core at the same time
MOST_SPLITS = 128
MOST_IN_TILE = (
    32  # rows: of 64 the queries and sums do not stay in 255 registers; the cache is then read once for each tile
)
BITS = {"raw": 16, "int8": 8, "int4": 4}


class Spans(NamedTuple):
    """For each row the first block that some query of it can see something in, and one past the last; 0, 0: none."""

    first: Int[Array, "B"]
    end: Int[Array, "B"]


def spans(q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], window: int | None, block: int) -> Spans:
    """Spans of blocks of `block` slots. Positions stand in any order; where they are sorted the spans are exact."""
    B, S = k_positions.shape
    at = jnp.pad(k_positions, ((0, 0), (0, -S % block)), constant_values=-1).reshape(B, -1, block)
    least = jnp.where(at >= 0, at, FAR).min(-1)
    some = least <= q_positions.max(-1, keepdims=True)
    if window is not None:
        earliest = jnp.where(q_positions >= 0, q_positions, FAR).min(-1, keepdims=True)
        some &= earliest - at.max(-1) < window
    n = some.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)[None]
    end = jnp.where(some, index + 1, 0).max(-1)
    return Spans(jnp.minimum(jnp.where(some, index, n).min(-1), end), end)


def parts(span: Spans, splits: int) -> tuple[Int[Array, "B splits"], Int[Array, "B splits"]]:
    """The first block of each split and one past its last; equal where it has nothing to do."""
    count = (span.end - span.first)[:, None]
    each = jnp.maximum((count + (splits - 1)) // splits, FEWEST)
    first = span.first[:, None] + jnp.arange(splits, dtype=jnp.int32)[None] * each
    first = jnp.minimum(first, span.end[:, None])
    return first, jnp.minimum(first + each, span.end[:, None])


@dataclasses.dataclass(frozen=True)
class Config:
    """Slots of a block and rows of a tile (powers of two, rows from 8 on), warps, and how deep the walk is pipelined."""

    block_k: int
    block_r: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, least in (("block_k", 16), ("block_r", 8)):
            x = getattr(self, name)
            if x < least or x & (x - 1):
                near = max(least, 1 << max(x - 1, 0).bit_length())
                raise ValueError(f"{name} is {x}; it is a power of two from {least} on: {near}")


def padded(width: int) -> int:
    """The width of a plane as the kernel holds it."""
    return max(16, 1 << (width - 1).bit_length())


def shared_bytes(config: Config, kind: str, H: int, capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block of threads takes, from above.

    Of the tiles that are walked over, with their scales and positions, there are as many as the walk is deep, less one that
    goes on to registers; the multipliers of 9.0 and 10.0 read raw tiles from where they stand, if there are rows enough. Of
    codes that is the keys alone: values come through registers, and pass through as numbers. The rows stay, and the weights
    pass through, as do the results on their way out, when the rest is gone.
    """
    planes = 2 if kind == "int4" else 1
    wide = padded(H // planes)
    tile = config.block_k * wide * max(BITS[kind], 8) // 8
    # a value's scale stands there twice in float16, where it is divided by the greatest
    numbers = 4 * config.block_k * (1 if kind == "raw" else 1 + 3 * planes)
    held = planes * config.block_r * wide * 2
    weights = config.block_k * config.block_r * 2
    large = capability[0] in (9, 10)
    deep = config.stages if large and kind == "raw" and config.block_r > 8 else config.stages - 1
    slack = (weights * (planes - 1) + 512) if large else 0
    made = 0 if kind == "raw" else planes * config.block_k * wide * 2
    walked = deep * tile * (2 if kind == "raw" else 1) + made + (config.stages - 1) * numbers
    return max(walked + held + weights, 4 * (config.block_r + 4) * wide) + slack


def config(rows: int, kind: str, H: int, gpu: Gpu) -> Config:
    """Tiles for R rows of heads of H on a card: as deep a walk as leaves room for RESIDENT blocks of threads on a core."""
    block_r = next(b for b in (8, 16, MOST_IN_TILE) if b >= min(rows, MOST_IN_TILE))
    room = min(gpu.limits.shared_memory_block, gpu.limits.shared_memory // RESIDENT - 1024)
    made = Config(64, block_r, 8 if block_r * padded(H) > 32 * 128 else 4, 4)
    while shared_bytes(made, kind, H, gpu.capability) > room:
        if made.stages > 2:
            made = dataclasses.replace(made, stages=made.stages - 1)
        else:
            made = dataclasses.replace(made, block_k=made.block_k // 2)
    return made


def splits(S: int, programs: int, config: Config, cores: int) -> int:
    """Among how many programs a row's slots are divided, where `programs` (batch, kv heads, tiles of rows) would run without.

    Programs come in waves of RESIDENT a core. Of all ways to give each at least FEWEST blocks it is the one that is over
    first, where a program takes as long as its blocks and one more; of several the one with the fewest splits.
    """
    blocks, at_once = -(-S // config.block_k), cores * RESIDENT

    def time(n: int) -> int:
        return -(-n * programs // at_once) * (-(-blocks // n) + 1)

    return min(range(1, max(1, min(blocks // FEWEST, MOST_SPLITS)) + 1), key=time)


# ---- bytes from memory


def bytes_read(first: jax.Array, end: jax.Array, *, K: int, H: int, kind: str, block: int, tiles: int = 1) -> int:
    """What the programs of a call read of codes, scales and positions: `first` and `end` are those of `parts`."""
    blocks = int((end - first).sum())
    return blocks * block * K * tiles * (slot_bytes(H, kind) + 4)


def slot_bytes(H: int, kind: str) -> int:
    """Bytes of one slot of one kv head: codes and scales of key and value."""
    return 2 * (H * BITS[kind] // 8 + {"raw": 0, "int8": 4, "int4": 8}[kind])
