"""The tiled attention kernels compiled for cards that are not here: registers, shared memory, and memory linear in length.

Causal, two query heads a kv head, at 4096 tokens. Each card and each head_dim occur, not each pair: ATTENTION_AOT=all in the
environment compiles every one.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot, disassembly
from pallas_kernels.attention import attention, triton
from pallas_kernels.attention import tiles as tiling
from pallas_kernels.attention.tiles import Config, Tiles
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shapes import ATTENTIONS, Heads

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

T, N, K = 4096, 4, 2
CARDS = ["A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"]  # sm_80, 86, 89, 90, 100, 120
SOME = [
    ("A100", 64), ("RTX 3090", 256), ("RTX 4090", 128), ("H200", 128), ("H200", 256), ("B200", 128), ("RTX 5090", 64),
]  # fmt: skip
CASES = [(c, H) for c in CARDS for H in (64, 128, 256)] if os.environ.get("ATTENTION_AOT") == "all" else SOME

# Bytes of a thread's stack, the most that was seen: what does not stay in registers, where masks are laid over a length that no
# tile divides and a tile that it stays in would cost more. sm_80: ptxas takes 255 registers for what sm_86 keeps in 219, and
# half of the keys at a time is a pass over the sums for each half. sm_100: half of the keys reads twice the bytes on the way
# back (62 times the least and not 31); forwards a thread has 128 registers at head_dim 64, so that two blocks of threads stand
# on a core, and at 256 the sums go to the tensor memory and back for each tile of keys.
STACK_WITH_MASKS = {
    ("attention_forward", 128, (8, 0)): 32, ("attention_forward", 64, (10, 0)): 8, ("attention_forward", 256, (10, 0)): 24,
    ("attention_backward_keys", 64, (10, 0)): 8, ("attention_backward_keys", 128, (10, 0)): 32,
}  # fmt: skip
KERNELS: dict[str, tiling.Kernel] = {
    "attention_forward": "forward",
    "attention_backward_keys": "keys",
    "attention_backward_queries": "queries",
}


def shapes(H: int, T: int = T, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    def like(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    at = like(1, T, dtype=jnp.int32)
    return like(1, T, N, H), like(1, K, T, H), like(1, K, T, H), at, at


def gradients(**how: Any) -> Any:
    def loss(q: Any, k: Any, v: Any, q_at: Any, k_at: Any) -> Any:
        out = triton.attention(q, k, v, q_at, k_at, scale=q.shape[3] ** -0.5, **how)
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def compiled(target: Any, jitted: Any, arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the backend's deprecation is not told to who compiles
        return target.compile(jitted, *target.place(arguments), **options)


def held_to_the_card(program: Any, card: str, H: int, tiles: Tiles, *, masks: bool = False) -> set[str]:
    """The kernels that were found: each within the closed form of shared memory and the card's, and in registers.

    masks: all of them, with a length that no tile divides; then but for STACK_WITH_MASKS.
    """
    spec, found = aot.CARDS[card], set()
    for kernel in disassembly.kernels(program):
        if kernel.name not in KERNELS:
            continue
        found.add(kernel.name)
        config: Config = getattr(tiles, KERNELS[kernel.name])
        bound = tiling.shared_bytes(KERNELS[kernel.name], config, H, spec.capability, segments=masks)
        print(card, "H", H, kernel.name, "every mask" if masks else "causal", config, "registers", kernel.registers,
              "stack", kernel.stack, "shared", kernel.shared_memory, "of", bound, "grid", kernel.grid)  # fmt: skip
        assert 0.5 * bound <= kernel.shared_memory <= bound <= spec.limits.shared_memory_block
        assert kernel.threads == 32 * config.warps
        assert kernel.registers * kernel.threads <= 2**16
        assert kernel.stack <= (STACK_WITH_MASKS if masks else {}).get(
            (kernel.name, tiling.padded(H), spec.capability), 0
        )
    return found


@pytest.mark.parametrize(("card", "H"), CASES)
@pytest.mark.some_rows
def test_kernels_fit_the_card(card: str, H: int) -> None:
    """Forward and backward: within the closed form of shared memory and the card's, and in registers."""
    spec = aot.CARDS[card]
    with aot.target(spec) as target:
        program = compiled(target, gradients(), shapes(H))
    tiles = tiling.choose(spec.capability, H, T)
    assert held_to_the_card(program, card, H, tiles) == set(KERNELS)
    [forward] = [k for k in disassembly.kernels(program) if k.name == "attention_forward"]
    assert forward.grid[:2] == (T // tiles.forward.block_q, N)
    # what is kept and passed on is of a row or a token: out, its gradient, log-sum-exp and delta, once more each for turning
    rows = T * N
    assert program.memory_analysis().temp_size_in_bytes <= 2 * (2 * rows * H * 2 + 4 * rows * 4) + 2**20


# real models' heads, each on a card, so that each card occurs; ATTENTION_AOT=all: each on each
MODELS = [(CARDS[i % len(CARDS)], heads) for i, heads in enumerate(ATTENTIONS)]
QUICK = ("gpt-oss 20B", "Gemma 2 9B")  # every kind of mask
EACH = [
    pytest.param(card, heads, marks=[] if heads.model in QUICK else pytest.mark.thorough, id=f"{card}-{heads.model}")
    for card, heads in (itertools.product(CARDS, ATTENTIONS) if os.environ.get("ATTENTION_AOT") == "all" else MODELS)
]


@pytest.mark.parametrize(("card", "heads"), EACH)
def test_a_models_prompt_fits_the_card(card: str, heads: Heads) -> None:
    """Forward, 4096 tokens, with the model's window, cap and sinks: the same bounds."""
    spec, like = aot.CARDS[card], jax.ShapeDtypeStruct
    q, kv = like((1, T, heads.N, heads.H), jnp.bfloat16), like((1, heads.K, T, heads.H), jnp.bfloat16)
    at = like((1, T), jnp.int32)
    sinks = [like((heads.N,), jnp.float32)] * heads.sinks

    def prompt(q: Any, k: Any, v: Any, at: Any, *sinks: Any) -> Any:
        how = {"window": heads.window, "softcap": heads.softcap, "sinks": sinks[0] if sinks else None}
        return triton.attention(q, k, v, at, at, scale=heads.H**-0.5, **how)

    with aot.target(spec) as target:
        program = compiled(target, jax.jit(prompt), (q, kv, kv, at, *sinks))
    [kernel] = [x for x in disassembly.kernels(program) if x.name == "attention_forward"]
    config = tiling.choose(spec.capability, heads.H, T).forward
    bound = tiling.shared_bytes("forward", config, heads.H, spec.capability)
    print(card, heads, config, "registers", kernel.registers, "stack", kernel.stack, "shared", kernel.shared_memory, "of",
          bound, "grid", kernel.grid)  # fmt: skip
    assert kernel.shared_memory <= bound <= spec.limits.shared_memory_block
    assert kernel.registers * kernel.threads <= 2**16
    masks = heads.window or heads.softcap or heads.sinks
    stack = STACK_WITH_MASKS.get((kernel.name, tiling.padded(heads.H), spec.capability), 0) if masks else 0
    assert kernel.stack <= stack
    assert kernel.grid[:2] == (T // config.block_q, heads.N)


def test_memory_is_linear_in_length() -> None:
    """At 32k tokens a boolean for each pair alone would be 1 GiB a head; this is q, k, v and out about twice."""
    length = 32768
    with aot.target(aot.CARDS["RTX 4090"]) as target:
        program = compiled(target, gradients(window=1000), shapes(64, length))
    assert program.memory_analysis().temp_size_in_bytes <= 2 * (2 * N + 2 * K) * length * 64 * 2


# all masks at once: each card and each width every time
WIDTHS = (64, 80, 96, 128, 256)
QUICKLY = {
    ("A100", 80), ("A100", 128), ("RTX 3090", 96), ("RTX 3090", 256), ("RTX 4090", 64), ("RTX 4090", 128), ("H200", 96),
    ("H200", 256), ("B200", 64), ("B200", 128), ("B200", 256), ("RTX 5090", 80), ("RTX 5090", 256),
}  # fmt: skip
MASKS = [
    pytest.param(card, H, marks=[] if (card, H) in QUICKLY else pytest.mark.thorough, id=f"{card}-{H}")
    for card, H in itertools.product(CARDS, WIDTHS)
]


@pytest.mark.parametrize(("card", "H"), MASKS)
@pytest.mark.some_rows
def test_every_kind_of_mask_fits_the_card(card: str, H: int) -> None:
    """Window, cap, sinks and segments at once, on a length that no tile divides, forward and backward: what passes when
    interpreted need not lower, and masks take registers and shared memory."""
    length = 1000
    q, k, v, at, _ = shapes(H, length, jnp.float16 if H == 80 else jnp.bfloat16)
    sinks = jax.ShapeDtypeStruct((N,), jnp.float32)

    def loss(q: Any, k: Any, v: Any, sinks: Any, at: Any, of: Any) -> Any:
        how = {"window": 300, "softcap": 30.0, "sinks": sinks, "q_segments": of, "k_segments": of}
        out, lse = triton.attention(q, k, v, at, at, scale=0.1, return_lse=True, **how)
        return out.astype(jnp.float32).sum() + lse.sum()

    spec = aot.CARDS[card]
    with aot.target(spec) as target:
        program = compiled(target, jax.jit(jax.grad(loss, (0, 1, 2, 3))), (q, k, v, sinks, at, at))
    assert held_to_the_card(program, card, H, tiling.choose(spec.capability, H, length), masks=True) == set(KERNELS)


@pytest.mark.parametrize(
    ("card", "H"),
    [("RTX 3090", 128), *(pytest.param(c, 256, marks=pytest.mark.thorough) for c in CARDS if c != "RTX 3090")],
)
def test_few_queries_and_lists_of_blocks(card: str, H: int) -> None:
    """One token a row, with the heads of a kv head in one tile; 32, as a piece of a prompt; and a block-sparse prefill."""
    spec = aot.CARDS[card]
    q, k, v, at, _ = shapes(H)
    one, now = jax.ShapeDtypeStruct((1, 1, N, H), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    piece, there = jax.ShapeDtypeStruct((1, 32, N, H), jnp.bfloat16), jax.ShapeDtypeStruct((1, 32), jnp.int32)
    lists = jax.ShapeDtypeStruct((1, N, T // 128, 8), jnp.int32)

    def all_three(one: Any, now: Any, piece: Any, there: Any, q: Any, k: Any, v: Any, at: Any, lists: Any) -> Any:
        sparse = triton.sparse_attention(q, k, v, at, at, blocks=lists, block_q=128, block_k=128, scale=0.1)
        few = (triton.attention(x, k, v, x_at, at, scale=0.1) for x, x_at in ((one, now), (piece, there)))
        return *few, sparse

    with aot.target(spec) as target:
        program = compiled(target, jax.jit(all_three), (one, now, piece, there, q, k, v, at, lists))
    found = [x for x in disassembly.kernels(program) if x.name.startswith("attention_forward")]
    blocks = T // tiling.choose(spec.capability, H, T).forward.block_q
    assert sorted(x.grid[:2] for x in found) == [(1, K), (1, K), (blocks, N)]
    for kernel in found:
        assert kernel.shared_memory <= spec.limits.shared_memory_block
        assert kernel.stack == 0


def test_split_over_two_cards() -> None:
    """Each card compiles the kernels of its kv heads and of their queries', and nothing goes between them."""
    length, H = 1024, 64
    how = P(None, None, "tensor"), P(None, "tensor"), P(None, "tensor"), P(), P()
    with aot.target(aot.CARDS["H200"], tensor=2) as target:
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(target.mesh, spec))
            for x, spec in zip(shapes(H, length), how, strict=True)
        ]
        program = compiled(target, gradients(), given)
    text = program.as_text()
    told = set(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))
    assert told <= {"all-reduce"}  # of the loss
    assert all("f32[]" in line for line in text.splitlines() if re.search(r" all-reduce(?:-start)?\(", line))
    found = {k.name: k.grid for k in disassembly.kernels(program) if k.name in KERNELS}
    tiles = tiling.choose(aot.CARDS["H200"].capability, H, length)
    assert found["attention_forward"][:2] == (length // tiles.forward.block_q, N // 2)
    assert found["attention_backward_keys"][:2] == (length // tiles.keys.block_k, K // 2)
    assert found["attention_backward_queries"][:2] == (length // tiles.queries.block_q, N // 2)


def test_hoppers_own_kernel_split_over_two_cards() -> None:
    """As Triton's: a table may choose it there."""
    H = 128
    how = P(None, None, "tensor"), P(None, "tensor"), P(None, "tensor"), P(), P()
    with aot.target(aot.CARDS["H200"], tensor=2) as target:
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(target.mesh, spec))
            for x, spec in zip(shapes(H, 1024), how, strict=True)
        ]
        program = compiled(target, jax.jit(functools.partial(attention, scale=0.1, implementation="mosaic_gpu")), given)
    text = program.as_text()
    assert "mosaic_gpu" in text
    assert not re.search(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


def test_float32_is_not_rounded_by_tensor_cores() -> None:
    """No kernel of ours takes it: the forms in jnp serve, with products of float32 (a card's default would be TF32, 10 bits)."""
    like, S = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32), 4096
    calls = {
        "attention": (attention, shapes(64, 1024, jnp.float32)),
        "decode": (
            decode_attention,
            (*shapes(128, 16, jnp.float32)[:1], *shapes(128, S, jnp.float32)[1:3], like((1, 16)), like((1, S))),
        ),
    }
    with aot.target(aot.CARDS["A100"]) as target:
        for name, (function, arguments) in calls.items():
            program = compiled(target, jax.jit(functools.partial(function, scale=0.1)), arguments)
            opcodes = {i.opcode for kernel in disassembly.kernels(program) for i in disassembly.instructions(kernel)}
            assert any(o.startswith("FFMA") for o in opcodes), name
            assert not [o for o in opcodes if o.startswith("HMMA")], name


def test_a_tile_too_large_is_told_by_the_compiler_and_by_the_form() -> None:
    """The form is not only an upper bound: what it refuses the compiler refuses too."""
    large = Config(128, 64, 8, 2)
    spec = aot.CARDS["RTX 4090"]
    bound = tiling.shared_bytes("forward", large, 256, spec.capability)
    assert bound > spec.limits.shared_memory_block
    run = jax.jit(functools.partial(triton.attention, scale=0.1, tiles=Tiles(large, large, large)))
    with aot.target(spec) as target, pytest.raises(Exception, match="Shared memory size limit exceeded") as said:
        compiled(target, run, shapes(256))
    asked = re.search(r"requested (\d+)", str(said.value))
    assert asked is not None
    assert 0.9 * bound <= int(asked[1]) <= bound
