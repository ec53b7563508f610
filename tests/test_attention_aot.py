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
from pallas_kernels.attention import tiles as tiling
from pallas_kernels.attention import triton
from pallas_kernels.attention.tiles import Config, Tiles
from pallas_kernels.shapes import ATTENTIONS, Heads

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

T, N, K = 4096, 4, 2
CARDS = ["A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"]  # sm_80, 86, 89, 90, 100, 120
SOME = [
    ("A100", 64), ("RTX 3090", 256), ("RTX 4090", 128), ("H200", 128), ("H200", 256), ("B200", 128), ("RTX 5090", 64),
]  # fmt: skip
CASES = [(c, H) for c in CARDS for H in (64, 128, 256)] if os.environ.get("ATTENTION_AOT") == "all" else SOME

# bytes of a thread's stack: what does not stay in 255 registers, where no tile of use was found that does
STACK = {("attention_forward", 256, c): 48 for c in ((8, 6), (8, 9), (12, 0))}
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


@pytest.mark.parametrize(("card", "H"), CASES)
def test_kernels_fit_the_card(card: str, H: int) -> None:
    """Forward and backward: within the closed form of shared memory and the card's, in registers but where `STACK` tells."""
    spec = aot.CARDS[card]
    with aot.target(spec) as target:
        program = compiled(target, gradients(), shapes(H))
    found = {k.name: k for k in disassembly.kernels(program) if k.name in KERNELS}
    assert set(found) == set(KERNELS)
    tiles = tiling.choose(spec.capability, H, T)
    for name, kernel in found.items():
        config: Config = getattr(tiles, KERNELS[name])
        bound = tiling.shared_bytes(KERNELS[name], config, H, spec.capability)
        print(card, "H", H, name, config, "registers", kernel.registers, "stack", kernel.stack, "shared",
              kernel.shared_memory, "of", bound, "grid", kernel.grid)  # fmt: skip
        assert 0.5 * bound <= kernel.shared_memory <= bound <= spec.limits.shared_memory_block
        assert kernel.threads == 32 * config.warps
        assert kernel.registers * kernel.threads <= 2**16
        assert kernel.stack <= STACK.get((name, H, spec.capability), 0)
    blocks = T // tiles.forward.block_q
    assert found["attention_forward"].grid[:2] == (blocks, N)
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
    assert kernel.stack <= STACK.get((kernel.name, tiling.padded(heads.H), spec.capability), 0)
    assert kernel.grid[:2] == (T // config.block_q, heads.N)


def test_memory_is_linear_in_length() -> None:
    """At 32k tokens a boolean for each pair alone would be 1 GiB a head; this is q, k, v and out about twice."""
    length = 32768
    with aot.target(aot.CARDS["RTX 4090"]) as target:
        program = compiled(target, gradients(window=1000), shapes(64, length))
    assert program.memory_analysis().temp_size_in_bytes <= 2 * (2 * N + 2 * K) * length * 64 * 2


def test_every_kind_of_mask_compiles() -> None:
    """What passes when interpreted need not lower: a head_dim that is no power of two, ragged lengths, cap, sinks, segments."""
    length, H = 1000, 80
    q, k, v, at, _ = shapes(H, length, jnp.float16)
    sinks = jax.ShapeDtypeStruct((N,), jnp.float32)

    def loss(q: Any, k: Any, v: Any, sinks: Any, at: Any, of: Any) -> Any:
        how = {"window": 300, "softcap": 30.0, "sinks": sinks, "q_segments": of, "k_segments": of}
        out, lse = triton.attention(q, k, v, at, at, scale=0.1, return_lse=True, **how)
        return out.astype(jnp.float32).sum() + lse.sum()

    spec = aot.CARDS["RTX 4090"]
    with aot.target(spec) as target:
        program = compiled(target, jax.jit(jax.grad(loss, (0, 1, 2, 3))), (q, k, v, sinks, at, at))
    tiles, found = tiling.choose(spec.capability, H, length), set()
    for kernel in disassembly.kernels(program):
        if (name := KERNELS.get(kernel.name)) is not None:
            found.add(name)
            bound = tiling.shared_bytes(name, getattr(tiles, name), H, spec.capability, segments=True)
            assert kernel.shared_memory <= bound <= spec.limits.shared_memory_block
    assert found == {"forward", "keys", "queries"}


def test_few_queries_and_lists_of_blocks() -> None:
    """One token a row, with the heads of a kv head in one tile, and a block-sparse prefill."""
    spec, H = aot.CARDS["RTX 3090"], 128
    q, k, v, at, _ = shapes(H)
    one, now = jax.ShapeDtypeStruct((1, 1, N, H), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    lists = jax.ShapeDtypeStruct((1, N, T // 128, 8), jnp.int32)

    def both(one: Any, now: Any, q: Any, k: Any, v: Any, at: Any, lists: Any) -> Any:
        sparse = triton.sparse_attention(q, k, v, at, at, blocks=lists, block_q=128, block_k=128, scale=0.1)
        return triton.attention(one, k, v, now, at, scale=0.1), sparse

    with aot.target(spec) as target:
        program = compiled(target, jax.jit(both), (one, now, q, k, v, at, lists))
    found = [x for x in disassembly.kernels(program) if x.name.startswith("attention_forward")]
    blocks = T // tiling.choose(spec.capability, H, T).forward.block_q
    assert sorted(x.grid[:2] for x in found) == [(1, K), (blocks, N)]
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
