"""Tiles of the attention kernels, and what follows from them by arithmetic: shared memory, and bytes moved.

A tile must fit the shared memory that one block of threads can have (99 KiB on compute capability 8.6, 8.9 and 12.0, 163
on 8.0, 227 on 9.0 and 10.0), and its sums must fit registers: 255 a thread, beyond which they are kept in memory. The first
has a closed form, `shared_bytes`, held against the compiler's own word in tests/test_attention_aot.py, and a tile that
does not fit by it is never taken. The second has none, so `PREFERRED` lists per way of multiplying and head_dim what the
compiler was seen to keep in registers, best first; with every mask at once up to 32 bytes a thread do not stay there on 8.0 and
10.0, where a tile that they stay with would move more (`STACK_WITH_MASKS` in that test).

    mma     8.0 to 8.9 and 12.0: a warp multiplies 16 rows out of registers; more warps than rows / 16 repeat each other
    wgmma   9.0: four warps multiply 64 rows out of shared memory
    tcgen05 10.0: sums stand in the tensor memory beside the registers

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pallas_kernels.cards import LIMITS, Limits

Kernel = Literal["forward", "keys", "queries"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of queries and of keys, warps of a block, and how many tiles deep the walk is pipelined. Powers of two."""

    block_q: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            x = getattr(self, name)
            if x < 16 or x & (x - 1):
                raise ValueError(
                    f"{name} is {x}; a tile is a power of two from 16 on: {max(16, 1 << x.bit_length() - 1)}"
                )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What the three kernels run with: forward, the gradients of keys and values, the gradient of queries."""

    forward: Config
    keys: Config
    queries: Config


def padded(H: int) -> int:
    """head_dim as the kernels hold it: a power of two, 16 at least."""
    return max(16, 1 << (H - 1).bit_length())


REGISTERS = 256 * 2**10  # bytes of a core's register file, of every capability from 8.0 on


def _instruction(capability: tuple[int, int]) -> str:
    return {9: "wgmma", 10: "tcgen05"}.get(capability[0], "mma")


# (instruction, head_dim up to) -> per kernel, best first; the first that fits the card is taken
PREFERRED: dict[tuple[str, int], dict[Kernel, tuple[Config, ...]]] = {
    ("mma", 64): {
        "forward": (Config(128, 64, 8, 3),),
        "keys": (Config(32, 128, 8, 3),),
        "queries": (Config(128, 64, 8, 3),),
    },
    ("mma", 128): {
        "forward": (Config(128, 64, 8, 3),),
        "keys": (Config(16, 128, 8, 2),),
        "queries": (Config(128, 32, 8, 2),),
    },
    ("mma", 256): {
        "forward": (Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        "keys": (Config(32, 32, 8, 3),),
        "queries": (Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    },
    ("wgmma", 64): {
        "forward": (Config(128, 128, 8, 2),),
        "keys": (Config(64, 128, 8, 2),),
        "queries": (Config(128, 64, 8, 2),),
    },
    ("wgmma", 128): {
        "forward": (Config(128, 128, 8, 2),),
        "keys": (Config(32, 128, 8, 2),),
        "queries": (Config(128, 64, 8, 2),),
    },
    ("wgmma", 256): {
        "forward": (Config(128, 64, 8, 2),),
        "keys": (Config(32, 32, 8, 3),),  # on mma: with 64 keys and more on wgmma the sums do not stay in registers
        "queries": (Config(128, 32, 8, 2),),
    },
    ("tcgen05", 64): {
        "forward": (Config(128, 64, 8, 3),),
        "keys": (Config(32, 128, 8, 2),),
        "queries": (Config(128, 64, 8, 2),),
    },
    ("tcgen05", 128): {
        "forward": (Config(128, 64, 8, 3),),
        "keys": (Config(16, 128, 8, 2),),
        "queries": (Config(128, 32, 8, 2),),
    },
    ("tcgen05", 256): {
        "forward": (Config(128, 64, 8, 2),),
        "keys": (Config(32, 32, 8, 3),),  # on mma, for the same reason
        "queries": (Config(64, 32, 8, 2),),
    },
}


def choose(capability: tuple[int, int], H: int, rows: int) -> Tiles:
    """Tiles for a card of this capability; rows: of one head (or of the heads that share a tile), at most 256 wide each."""
    limits = LIMITS[max(c for c in LIMITS if c <= capability)]
    listed = PREFERRED[_instruction(capability), max(64, padded(H))]

    def first(kernel: Kernel) -> Config:
        for config in listed[kernel]:
            if shared_bytes(kernel, config, H, capability, segments=True) <= limits.shared_memory_block:
                return config
        raise AssertionError(f"no tile of {kernel} for head_dim {H} fits {limits.shared_memory_block} bytes")

    forward = first("forward")
    few = max(16, 1 << (max(rows, 1) - 1).bit_length())
    if few < forward.block_q:
        # fewer rows than a tile: four warps side by side over the keys
        forward = Config(few, min(forward.block_k, 64), 4, 2)
    return Tiles(forward, first("keys"), first("queries"))


def shared_bytes(
    kernel: Kernel, config: Config, H: int, capability: tuple[int, int], *, segments: bool = False, itemsize: int = 2
) -> int:
    """Bytes of shared memory that a block takes, from above: what Triton stages there.

    The tiles that a program owns stand there throughout, one (forward: q) or two (k and v; q and do). Of the two that it
    walks over, and of the numbers per row beside them, there are as many as the walk is deep; one less where a tile goes
    from there to registers before the next arrives. Weights pass through where the second product's warps divide its
    result along the head; on 10.0 they and what they multiply are turned there, beside barriers, and of the numbers there
    are up to twice as many.
    """
    instruction, wide = _instruction(capability), padded(H)
    own, walked = (config.block_k, config.block_q) if kernel == "keys" else (config.block_q, config.block_k)
    held = own * wide * itemsize * (1 if kernel == "forward" else 2)
    vectors = (3 if kernel == "keys" else 1) + segments
    deep = max(1, config.stages - (instruction == "mma"))
    copies = 2 * config.stages if instruction == "tcgen05" else max(1, config.stages - 1)
    total = held + deep * 2 * walked * wide * itemsize + copies * vectors * 4 * walked
    turned = own * walked * itemsize
    if instruction == "tcgen05":
        return total + 2048 + 32 + (0 if kernel == "forward" else 2 * turned + own * wide * itemsize)
    if instruction == "wgmma" or own < max(wide, walked):
        return total + turned
    return total


# ---- bytes to and from memory


def bytes_moved(
    B: int, T: int, S: int, N: int, K: int, H: int, config: Config, *, kernel: Kernel = "forward", window: int | None = None,
    itemsize: int = 2,
) -> int:  # fmt: skip
    """What the programs of a kernel read and write together, causal, the T queries being the last of S slots.

    What a program owns and makes once: forward q, out and the log-sum-exp, queries q, do, dq and two numbers a row, keys k, v,
    dk and dv. And the tiles that it walks over: of k and v for each tile of queries of each head, of q, do and two numbers a
    row for each tile of keys and each of its query heads. Of these the programs that run at the same time share what the L2
    cache holds. Positions are not counted: 4 bytes of a row's hundreds.
    """
    BQ, BK, row = config.block_q, config.block_k, H * itemsize
    walked = 0
    if kernel == "keys":
        for start in range(0, S, BK):
            # query t stands at S - T + t; it sees slots up to its own, and not before the window
            first = max(0, start - (S - T))
            end = T if window is None else min(T, min(start + BK, S) - 1 + window - (S - T))
            if first < end:
                walked += min(-(-end // BQ) * BQ, T) - first // BQ * BQ
        return B * (K * 4 * S * row + N * walked * (2 * row + 8))
    for start in range(0, T, BQ):
        first, last = S - T + start, S - T + min(start + BQ, T) - 1
        lo = 0 if window is None else max(0, first - window + 1) // BK * BK
        walked += min((last // BK + 1) * BK, S) - lo
    once = {"forward": 2 * row + 4, "queries": 3 * row + 8}[kernel]
    return B * N * (T * once + 2 * walked * row)


def fast_memory(limits: Limits) -> int:
    """Bytes of a core that can hold a tile: registers and shared memory."""
    return REGISTERS + limits.shared_memory


def least_bytes(
    B: int, T: int, S: int, N: int, K: int, H: int, fast: int, *, kernel: Kernel = "forward", itemsize: int = 2
) -> float:
    """What any schedule of whole rows through a fast memory of `fast` bytes moves, causal, the queries being the last slots.

    With M elements of fast memory, between one load of M elements and the next at most M / H rows of q and of k each were
    there, hence (M / H)**2 scores made: M loads for each so many, T S H**2 / M in all. That is the order of
    FlashAttention's Theorem 2 and Proposition 3 (arXiv:2205.14135), and its order is the least there is where M >= H**2
    (Saha and Ye, arXiv:2402.07443). A kernel of the way back makes every score again, of the same q and k. And everything has
    to be read or written once.
    """
    pairs = T * (S - T) + T * (T + 1) // 2
    queries, keys = {"forward": (2, 2), "keys": (2, 4), "queries": (3, 2)}[kernel]
    once = B * (queries * T * N + keys * S * K) * H * itemsize
    return max(once, B * N * pairs * H**2 / (fast / itemsize) * itemsize)
