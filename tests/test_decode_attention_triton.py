"""The flash-decoding kernel as it is written, interpreted on the CPU, and compiled for cards that are not here.

Interpreted, it is held against the float64 of tests/test_decode_attention.py, with weights rounded to the inputs' dtype once.
Compiled, over real models' heads: registers, no stack, shared memory within the closed form and the card's, programs for the
grid, and no copy of the cache in another dtype. Each card, each kind of cache and each model occur, not every combination:
DECODE_AOT=all in the environment compiles them all.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_decode_attention import QUICK, Case, agrees, inputs, poisoned, served

from jaxengine.cache.base import CachedAttend, Caching, empty
from jaxengine.nn import Attention
from pallas_kernels import aot, disassembly, dispatch
from pallas_kernels.cards import LIMITS
from pallas_kernels.decode_attention import tiles, triton
from pallas_kernels.decode_attention.tiles import Config
from pallas_kernels.shapes import ATTENTIONS

SMALL = Config(16, 8, 4, 2)
CASES = [
    (Case((5, 1, 83, 4, 2, 64)), 2),
    (Case((2, 3, 70, 12, 2, 80), window=30, softcap=2.0, sinks=True), 3),
    (Case((3, 1, 40, 2, 1, 16), "int8", places="ring", window=33, dtype="bfloat16"), 1),
    (Case((2, 2, 83, 4, 2, 40), "int4", dtype="float16", sinks=True), 4),
    (Case((3, 1, 75, 4, 1, 16), page=4, dtype="bfloat16"), 2),
    (Case((3, 2, 90, 4, 2, 24), "int8", page=32, window=40), 2),
    (Case((3, 1, 90, 2, 2, 32), "int4", page=8), 2),
    # pages that are no power of two: in which each slot finds its own, and of whole blocks
    (Case((3, 1, 75, 4, 2, 32), page=12), 2),
    (Case((3, 2, 75, 4, 2, 32), "int4", page=20, window=30), 3),
    (Case((3, 1, 150, 4, 2, 32), "int8", page=48, sinks=True), 2),
    # pages as they are served: each kind of cache, lengths that end inside of a page
    *((Case((3, 1, 150, 4, 2, 32), kind, page=page), 2) for kind in ("raw", "int8", "int4") for page in (16, 64)),
]


@pytest.mark.parametrize(("case", "splits"), CASES, ids=str)
@pytest.mark.some_rows
def test_interpreted(case: Case, splits: int) -> None:
    x = inputs(case)
    found = served(x, triton.decode_attention, interpret=True, config=SMALL, splits=splits)
    u = float(ml_dtypes.finfo(x.arrays["q"].dtype).eps) / 2
    agrees(found, x, blocks=-(-x.k.shape[2] // SMALL.block_k) + splits, u=u)


ANY = [
    Case((2, 2, 45, 4, 2, 16), "int8", places="any", window=13, softcap=2.0, sinks=True),
    Case((3, 1, 60, 4, 2, 16), "int4", page=8, dtype="bfloat16", places="any lengths", window=11),
    *(
        pytest.param(case, marks=pytest.mark.thorough)
        for case in (
            Case((2, 3, 45, 2, 1, 16), places="any", dtype="float16", sinks=True),
            Case((3, 1, 60, 4, 2, 16), page=16, places="any lengths", softcap=3.0),
            Case((2, 1, 45, 6, 2, 16), "int4", places="any", dtype="float16"),
        )
    ),
]


@functools.cache
def program(case: Case) -> Any:
    """Compiled once for all positions, lengths and tables of its shapes."""
    x = inputs(case)
    run = functools.partial(triton.decode_attention, **x.how, return_lse=True, interpret=True, config=SMALL, splits=2)
    return jax.jit(lambda arrays: run(**arrays)).lower(x.arrays).compile(compiler_options=QUICK)


@pytest.mark.parametrize("case", ANY, ids=str)
def test_any_call(case: Case) -> None:
    """Positions in any order, or rows of any lengths in pages of any order."""
    u = float(ml_dtypes.finfo(inputs(case).arrays["q"].dtype).eps) / 2

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 10**6))
    def check(seed: int) -> None:
        x = inputs(case, seed)
        agrees(program(case)(x.arrays), x, blocks=-(-x.k.shape[2] // SMALL.block_k) + 2, u=u)

    check()


def test_what_a_split_does_not_own_it_does_not_read() -> None:
    """Blocks past a row's length, before its window, and all of an empty row hold NaN; so they do where there is no split."""
    x = inputs(Case((3, 1, 100, 4, 2, 16), window=20))
    span = tiles.spans(jnp.asarray(x.arrays["q_positions"]), jnp.asarray(x.k_at, jnp.int32), 20, SMALL.block_k)
    first, end = map(np.asarray, span)
    assert (first[0], end[0]) == (5, 7)
    assert (first[1], end[1]) == (0, 0)
    bad = poisoned(x, SMALL.block_k, first, end)
    assert np.isnan(bad.arrays["k"][1]).all()
    agrees(served(bad, triton.decode_attention, interpret=True, config=SMALL, splits=3), x, blocks=10)


# ---- over a mesh


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))


@pytest.mark.parametrize("page", [None, 8])
def test_split_over_a_mesh(page: int | None) -> None:
    """Batch and kv heads, nothing sent; the pages of a pool belong to no row and are whole over the batch."""
    x = inputs(Case((2, 1, 40, 8, 2, 8), "int8", page=page, sinks=True))
    kv = P(None if page else "data", "tensor")
    specs = {"q": P("data", None, "tensor"), "k": kv, "v": kv, "k_scale": kv, "v_scale": kv, "sinks": P("tensor")}
    there = {n: jax.device_put(a, NamedSharding(mesh(), specs.get(n, P("data")))) for n, a in x.arrays.items()}
    call = jax.jit(
        lambda a: triton.decode_attention(**a, **x.how, return_lse=True, interpret=True, config=SMALL, splits=2)
    )
    program = call.lower(there).compile(compiler_options=QUICK)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program.as_text())
    found = program(there)
    agrees(found, x, blocks=5)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh(), P("data", None, "tensor")), 4)


@pytest.mark.parametrize(
    ("shape", "q", "k", "wanted"),
    [
        ((8, 4), P(("data", "tensor")), P("data"), (("data", "tensor"), ())),
        ((8, 4), P(), P("data", "tensor"), (("data",), ("tensor",))),
        ((3, 4), P("data", None, "tensor"), P("data", "tensor"), ((), ("tensor",))),
        ((8, 2), P("data", None, "tensor"), P("data"), (("data",), ())),  # 2 kv heads over 4
    ],
)
def test_what_is_split(shape: tuple[int, int], q: P, k: P, wanted: Any) -> None:
    B, K = shape
    there = AbstractMesh((2, 4), ("data", "tensor"))
    given = {
        "q": SimpleNamespace(shape=(B, 1, 16, 16), sharding=NamedSharding(there, q)),
        "k": SimpleNamespace(shape=(B, K, 16, 16), sharding=NamedSharding(there, k)),
    }
    assert triton._split(there, given, triton.DIMS) == wanted


# ---- refusals, tiles


def on(device_kind: str) -> Any:
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=100, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def like(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_refusals_say_why() -> None:
    def call(B: int = 1, T: int = 1, S: int = 64, H: int = 64, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> Any:
        k = like(B, 1, S, H, dtype=dtype)
        at = like(B, T, dtype=jnp.int32), like(B, S, dtype=jnp.int32)
        return jax.eval_shape(
            functools.partial(triton.decode_attention, scale=scale), like(B, T, 4, H, dtype=dtype), k, k, *at
        )

    with pytest.raises(dispatch.Refused, match="there is no GPU"):
        call()
    with on("Tesla T4"), pytest.raises(dispatch.Refused, match=r"7\.5 is below 8\.0"):
        call()
    with on("NVIDIA A100"):
        assert call().shape == (1, 1, 4, 64)
        refused: tuple[tuple[dict[str, Any], str], ...] = (
            ({"dtype": jnp.float32}, "q is float32"), ({"H": 264}, "head_dim is 264"), ({"T": 65}, "260 rows"),
            ({"scale": 0.0}, "scale is 0.0"),
        )  # fmt: skip
        for how, reason in refused:
            with pytest.raises(dispatch.Refused, match=reason):
                call(**how)
        # 2**31 bytes: past 32-bit signed counts, and not yet counted in 64
        codes = like(64, 8, 2**16, 64, dtype=jnp.int8)
        said = triton.refusal(like(64, 1, 8, 64), codes, dispatch.Gpu((8, 0), 108), 1.0, False)
        assert said is not None
        assert "32-bit" in said


@pytest.mark.parametrize("capability", [c for c in LIMITS if c >= (8, 0)], ids=str)
def test_every_tile_fits_the_card(capability: tuple[int, int]) -> None:
    gpu = dispatch.Gpu(capability, 100)
    for H in (16, 64, 80, 96, 128, 192, 256):
        for rows in (1, 8, 9, 40, 256):
            for kind in ("raw", "int8", "int4"):
                made = tiles.config(rows, kind, H, gpu)
                assert tiles.shared_bytes(made, kind, H, capability) <= gpu.limits.shared_memory_block
                assert made.block_k >= 16
                assert made.block_r <= max(8, 2 * rows)
    with pytest.raises(ValueError, match=r"block_k is 48.*64"):
        Config(48, 8, 4, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("plane", [0, 1])
def test_the_ptx_of_int4_makes_the_numbers(plane: int, dtype: str) -> None:
    """Its few instructions, emulated in numpy, over all bytes."""
    text = triton.int4_ptx(plane, dtype)
    codes = np.arange(256, dtype=np.uint8)
    made = emulated(text, codes.view(np.uint32), dtype)
    np.testing.assert_array_equal(made, (codes >> 4 if plane else codes & 15).astype(np.float32) - 8)


def emulated(text: str, words: np.ndarray, dtype: str) -> np.ndarray:
    """Four numbers of each word, in float32."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    registers: dict[str, np.ndarray] = {"$2": words}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(words, int(name, 0))

    for line in text.strip("{} ").split(";"):
        if not (line := line.strip()) or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        out, *given = [x.strip() for x in rest.split(",")]
        a = [value(x) for x in given]
        if op == "mov.b32":
            made = a[0]
        elif op == "shr.b32":
            made = a[0] >> a[1]
        elif op == "and.b32":
            made = a[0] & a[1]
        elif op == "prmt.b32":
            pool = np.concatenate([a[0][:, None].view(np.uint8), a[1][:, None].view(np.uint8)], 1)
            picked = [pool[:, int(given[2], 16) >> 4 * i & 7] for i in range(4)]
            made = np.ascontiguousarray(np.stack(picked, 1)).view(np.uint32)[:, 0]
        else:
            assert op.startswith("fma.rn.")
            x, y, z = (v[:, None].view(kind).astype(np.float64) for v in a)
            made = np.ascontiguousarray((x * y + z).astype(kind)).view(np.uint32)[:, 0]
        registers[out] = made
    both = np.stack([registers["$0"], registers["$1"]], 1)
    return np.ascontiguousarray(both).view(kind).astype(np.float32).reshape(-1)


# ---- compiled

compiles = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
CARDS = ["A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"]  # sm_80, 86, 89, 90, 100, 120
SLOTS = 8192
# card, which of ATTENTIONS, kind, page, batch, queries
SOME = [
    ("RTX 4090", 0, "raw", None, 1, 1), ("A100", 1, "raw", 64, 4, 1), ("H200", 0, "int8", None, 8, 1),
    ("RTX 3090", 6, "raw", None, 1, 4), ("RTX 5090", 3, "int8", 16, 1, 1), ("B200", 7, "int4", None, 2, 1),
    ("H200", 1, "raw", None, 1, 16), ("RTX 3090", 4, "int4", 16, 1, 1), ("RTX 4090", 6, "int4", None, 1, 16),
    ("RTX 4090", 0, "raw", 16, 1, 1), ("H200", 0, "int8", 64, 4, 1), ("A100", 0, "int4", 64, 1, 1),
    ("RTX 5090", 0, "int8", 48, 2, 1), ("A100", 1, "raw", 256, 1, 1),
]  # fmt: skip
FEW, MORE = (
    [("RTX 4090", 0, "raw", None, 1, 1), ("H200", 0, "int8", None, 8, 1)],
    [
        ("A100", 1, "int8", 64, 4, 1), ("RTX 3090", 6, "raw", None, 1, 4), ("RTX 5090", 3, "int4", 16, 1, 1),
        ("B200", 7, "int4", None, 2, 1), ("H200", 1, "raw", 64, 1, 16), ("B200", 0, "raw", None, 1, 1),
        ("RTX 5090", 2, "raw", None, 1, 1), ("A100", 4, "int4", None, 1, 1),
    ],
)  # fmt: skip
IN_FLOAT16 = [*FEW, *(pytest.param(how, marks=pytest.mark.thorough) for how in MORE)]
ALL = [
    (card, i, kind, page, 1, T)
    for card in CARDS for i in range(len(ATTENTIONS)) for kind in ("raw", "int8", "int4") for page in (None, 16, 64)
    for T in (1, 8)
]  # fmt: skip


def arguments(i: int, kind: str, page: int | None, B: int, T: int, float_: Any = jnp.bfloat16) -> dict[str, Any]:
    heads = ATTENTIONS[i]
    slots = (B, heads.K, SLOTS) if page is None else (B * SLOTS // page + 1, heads.K, page)
    dtype = {"raw": float_, "int8": jnp.int8, "int4": jnp.uint8}[kind]
    width = heads.H // 2 if kind == "int4" else heads.H
    made = {"q": like(B, T, heads.N, heads.H, dtype=float_), "q_positions": like(B, T, dtype=jnp.int32)}
    made |= {n: like(*slots, width, dtype=dtype) for n in ("k", "v")}
    if kind != "raw":
        last = () if kind == "int8" else (2,)
        made |= {n: like(*slots, *last, dtype=jnp.float32) for n in ("k_scale", "v_scale")}
    if page is None:
        made["k_positions"] = like(B, SLOTS, dtype=jnp.int32)
    else:
        made |= {"page_table": like(B, SLOTS // page, dtype=jnp.int32), "lengths": like(B, dtype=jnp.int32)}
    return made | ({"sinks": like(heads.N, dtype=jnp.float32)} if heads.sinks else {})


def compiled(card: str, function: Any, given: Any) -> Any:
    with aot.target(aot.CARDS[card]) as target, warnings.catch_warnings():
        warnings.simplefilter("error")  # the backend's deprecation is not told to who compiles
        return target.compile(jax.jit(function), target.place(given))


@compiles
@pytest.mark.aot
@pytest.mark.parametrize(
    ("card", "i", "kind", "page", "B", "T"), ALL if os.environ.get("DECODE_AOT") == "all" else SOME
)
@pytest.mark.some_rows
def test_the_kernel_fits_the_card(card: str, i: int, kind: str, page: int | None, B: int, T: int) -> None:
    fits(card, i, kind, page, B, T, jnp.bfloat16)


@compiles
@pytest.mark.aot
@pytest.mark.parametrize("how", IN_FLOAT16)
def test_the_kernel_fits_the_card_in_float16(how: Any) -> None:
    fits(*how, jnp.float16)


def fits(card: str, i: int, kind: str, page: int | None, B: int, T: int, float_: Any) -> None:
    spec, heads = aot.CARDS[card], ATTENTIONS[i]
    gpu = dispatch.Gpu(spec.capability, spec.cores)

    def step(given: Any) -> Any:
        how = {"scale": heads.H**-0.5, "window": heads.window, "softcap": heads.softcap}
        return triton.decode_attention(**given, **how)

    program = compiled(card, step, arguments(i, kind, page, B, T, float_))
    [kernel] = [k for k in disassembly.kernels(program) if k.name == f"decode_attention_{kind}"]
    R = T * heads.N // heads.K
    config = tiles.config(R, kind, heads.H, gpu)
    bound = tiles.shared_bytes(config, kind, heads.H, spec.capability)
    print(card, heads, kind, page, "B", B, "T", T, config, "registers", kernel.registers, "stack", kernel.stack, "shared",
          kernel.shared_memory, "of", bound, "grid", kernel.grid)  # fmt: skip
    assert kernel.shared_memory <= bound <= spec.limits.shared_memory_block
    assert kernel.stack == 0
    assert kernel.threads == 32 * config.warps
    assert kernel.registers * kernel.threads * (tiles.RESIDENT if config.warps == 4 else 1) <= 2**16
    tiled = -(-R // config.block_r)
    splits = tiles.splits(SLOTS, B * heads.K * tiled, config, gpu.cores)
    assert kernel.grid == (splits, heads.K * tiled, B)
    # partial results in float32 and what is turned over of rows: nothing of the cache's size
    parts = B * heads.K * splits * tiled * config.block_r * (2 * tiles.padded(heads.H) + 2) * 4
    assert program.memory_analysis().temp_size_in_bytes <= 2 * parts + 8 * B * SLOTS + 2**20


CACHE = re.compile(rf"(?:bf16|f32|f16)\[[\d,]*\b{SLOTS}\b[\d,]*\]")  # the type of an array of floats over all slots


@compiles
@pytest.mark.aot
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_step_of_the_coded_cache_never_writes_it_out(codec: str) -> None:
    """What the engine hands to a block, compiled: codes are written and read in place; of 8192 slots nothing stands in bfloat16
    and nothing in float32 but scales."""
    attention, caching = Attention(32, 8, 128, scale=0.1), Caching("full", codec)
    kv = jax.eval_shape(lambda: empty(caching, attention, 1, SLOTS, jnp.bfloat16))

    def step(kv: Any, given: Any) -> Any:
        q, k, v, positions, lengths = given
        return CachedAttend(caching, positions, lengths, False)(attention, q, k, v, kv)

    new = like(1, 1, 8, 128)
    given = like(1, 1, 32, 128), new, new, like(1, 1, dtype=jnp.int32), like(1, dtype=jnp.int32)
    with aot.target(aot.CARDS["RTX 4090"]) as target:
        program = target.compile(jax.jit(step, donate_argnums=0), *target.place((kv, given)))
    scales = {f"f32[1,8,{SLOTS}]", f"f32[1,8,{SLOTS},2]"}
    assert "decode_attention_" + codec in program.as_text()
    assert set(CACHE.findall(program.as_text())) <= scales
    codes = sum(x.size for x in jax.tree.leaves(kv) if x.dtype.itemsize == 1)
    assert program.memory_analysis().temp_size_in_bytes < codes / 2  # raw it is four or eight times the codes of k
