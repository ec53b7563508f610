"""Tiles of the Triton kernel: how a product is cut so that it fits a core's shared memory and fills the card.

A block of threads takes block_n outputs and block_m rows, and turns over `columns` codes of each output at a time, which
is one group where scales are by group. Rows are few: what bounds the speed is how many bytes are on their way from memory,
that is resident blocks times (stages - 1) tiles, and how many instructions each weight costs. Two warps of 32 outputs each
spend the fewest instructions (the rows, which every warp reads, are spread over more outputs), and small blocks split the
work finely. Where there are too few tiles the inputs are split too, into float32 sums that XLA adds in a fixed order.

M rows, N outputs, K inputs, G group size.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.dispatch import Gpu

MOST_ROWS = 1024  # above, a matrix dequantised once and multiplied by the library's kernel is faster
# of a core: resident blocks that keep memory busy with three tiles of 4 KiB each on their way
BLOCKS_PER_CORE = 4
INPUTS_OF_A_TURN = 128  # at least: below, the loop itself is most of the instructions
FEWEST_TURNS = 4  # of a split: below, filling the pipeline is most of the work
MOST_SPLITS = 16
NARROWEST_DOT = 16  # inputs of one tensor core product


@dataclasses.dataclass(frozen=True)
class Config:
    """block_m, block_n: rows and outputs of a block of threads. columns: of the array of codes, in one tile. unroll: tiles in
    one turn of the loop. splits: of the inputs. fold: scales are multiplied into the weights, not into the products.
    copies: of the rows, one for each group of a tile with the others' inputs zero. beside: they are rows of one block, and one
    product has all of a tile's groups. sums: the rows' sums of each group come
    from outside; else tensor core products make them."""

    block_m: int
    block_n: int
    columns: int
    unroll: int
    splits: int
    warps: int
    stages: int
    fold: bool
    copies: int
    beside: bool
    sums: bool

    def shared_memory(self, kind: str) -> int:
        """Bytes, from above. One stage of the codes is in registers; the rows are read from where they stand by the tensor
        cores of compute capability 9.0 on, all stages. The block of results is turned over on its way out, when the
        stages are gone. Beside them one plane of weights on the way to the tensor cores, all four where scales
        are multiplied into them, and what the compiler aligns."""
        bits, _ = CODES[kind]
        codes = self.block_n * self.columns * (2 if bits == 4 else 1)
        x = self.block_m * self.columns * (4 * (1 if self.beside else self.copies) if bits == 4 else 1) * 2
        unpacked = self.block_n * self.columns * (4 if self.fold else 1) * 2
        loop = self.unroll * ((self.stages - 1) * codes + self.stages * x)
        return max(loop, 4 * (self.block_m + 4) * self.block_n) + unpacked + 1024


# bits of a code, and the width of a turn where scales do not decide it
CODES = {"int8": (8, 128), "int4": (4, 32), "nf4": (4, 32), "mxfp4": (4, 32), "fp8": (8, 128), "fp8_block": (8, 128)}


def columns(kind: str, group_size: int) -> int:
    """Columns of the array of codes in one turn: a group's, but never fewer than a tensor core product takes."""
    bits, free = CODES[kind]
    if bits == 8:
        return group_size or free
    return max(group_size // 4, NARROWEST_DOT)


def config(
    M: int, N: int, K: int, kind: str, group_size: int, gpu: Gpu, *, bfloat16: bool = True, affine: bool = False
) -> Config:
    """The tiles of x [M, K] times a matrix [N, K] on a card. ValueError where no tile fits its shared memory.

    It gives every core BLOCKS_PER_CORE blocks of two warps (half as many of four warps) where the matrix is long enough.
    bfloat16: whether rows are of it; else float16, whose range is too small for weights with their scales on. affine: with a
    zero of each group.
    """
    bits, _ = CODES[kind]
    width = columns(kind, group_size)
    inputs = width * (4 if bits == 4 else 1)
    block_m = next(b for b in (8, 16, 32, 64) if b >= min(M, 64))
    # several groups in one product need a product for each of them; with many rows rounding the weight costs less
    narrow = bits == 4 and group_size // 4 < NARROWEST_DOT
    fold = narrow and block_m >= 32 and bfloat16 and not affine
    copies = inputs // group_size if narrow and not fold else 1
    beside = copies > 1 and M * copies <= 16
    block_m = 8 << (M * copies > 8) if beside else block_m
    # where registers are short, smaller blocks and no second tile a turn: the compiler is asked to spill nothing
    warps, block_n = (2, 64) if block_m <= 16 else (4, 64 if block_m == 32 or copies > 1 or affine else 128)
    if beside and affine and copies == 2 and block_m == 8:
        # one warp with as many outputs: fewer instructions for a weight, and no address of two warps' that is spilled
        warps, block_n = 1, 32
    # (and where each group has its product, a second tile takes Triton four times as long to compile, for a tenth fewer
    # instructions)
    second = (copies == 1 or (beside and copies == 2)) and (block_m == 8 or (block_m == 16 and kind != "nf4"))
    made = Config(
        block_m=block_m,
        block_n=block_n,
        columns=width,
        unroll=max(1, INPUTS_OF_A_TURN // inputs) if second else 1,
        splits=1,
        warps=warps,
        stages=4 if block_m < 64 else 3,
        fold=fold,
        copies=copies,
        beside=beside,
        sums=kind == "int4" and block_m >= 32 and not fold,
    )
    while made.shared_memory(kind) > gpu.limits.shared_memory_block:
        if made.stages > 2:
            made = dataclasses.replace(made, stages=made.stages - 1)
        elif made.block_n > 32:
            made = dataclasses.replace(made, block_n=made.block_n // 2)
        else:
            raise ValueError(
                f"{kind} with group_size {group_size}: {made.shared_memory(kind)} bytes of shared memory in the smallest"
                f" tile, and the card has {gpu.limits.shared_memory_block}; take a smaller group_size"
            )
    turns = -(-K // (inputs * made.unroll))
    tiles = -(-N // made.block_n) * -(-M // made.block_m)

    def blocks(each_core: int) -> int:
        """Splits that give every core so many blocks."""
        return 1 << (-(-each_core * gpu.cores // tiles) - 1).bit_length()

    # what is written and read again of an output's parts is no more than its codes, but no core goes without a block
    cheap = max(K * bits // 8 // (8 * M), blocks(1))
    splits = max(1, min(blocks(BLOCKS_PER_CORE * 2 // made.warps), cheap, turns // FEWEST_TURNS, MOST_SPLITS))
    each = -(-turns // splits)
    return dataclasses.replace(made, splits=-(-turns // each))
