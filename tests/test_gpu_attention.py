"""On a card: every attention kernel as it is compiled there, on the cases of its own tests, against numpy float64.

    pytest -m gpu tests/test_gpu_attention.py

The cases, the oracles and their bounds are those of tests/test_attention_triton.py, tests/test_attention_mosaic.py and
tests/test_decode_attention.py, where the kernels are interpreted; here in 16 bits, which is what they take on a card, with
the tiles that are chosen there, and with cases of several tiles beside them. Ours give the same bits each time. The
kernel with barriers of its own comes last: with one too many it never comes back.

B batch, T queries, S slots, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_attention_matrix as matrix
import test_attention_mosaic as mosaic
import test_attention_triton as tiled
import test_decode_attention as few
import test_decode_attention_triton as split
from test_attention_triton import NAMES, Case, agrees, arguments, oracle

from pallas_kernels.attention import attention, sparse_attention
from pallas_kernels.decode_attention import decode_attention

pytestmark = pytest.mark.gpu

TIMES = 3  # that a kernel runs, for the same bits
# of several tiles in both directions, whose ends none of them divides
LONGER = [
    Case("bfloat16", (1, 520, 520, 2, 1, 128), "last"),
    Case("float16", (2, 300, 300, 4, 2, 64), "packed", window=150, segments=True),
    Case("bfloat16", (1, 260, 390, 2, 2, 256), "last", softcap=5.0, sinks=True),
]
PLAIN = [
    Case("bfloat16", (1, 520, 520, 2, 1, 128), "last"),
    Case("float16", (2, 260, 260, 4, 4, 64), "last"),
    Case("bfloat16", (1, 130, 130, 2, 2, 256), "last"),
    Case("bfloat16", (1, 300, 300, 4, 1, 128), "last", window=70),
]


@pytest.fixture(autouse=True)
def card() -> Any:
    device = jax.devices()[0]
    if device.platform != "gpu":
        pytest.skip(f"there is no GPU: jax.devices() are {device.device_kind!r}")
    return device


@pytest.fixture
def hopper(card: Any) -> None:
    if int(str(card.compute_capability).partition(".")[0]) != 9:
        pytest.skip(f"wgmma is Hopper's alone, and this is {card.device_kind!r}")


def in_16_bits(cases: Iterable[Any]) -> list[Any]:
    """Those in float32 in one of the two, in turns."""
    turns = itertools.cycle(("bfloat16", "float16"))
    return [dataclasses.replace(c, dtype=next(turns)) if c.dtype == "float32" else c for c in cases]


def repeated(name: str | None, run: Any, *given: Any) -> Any:
    """What it gives; by a kernel of ours the same bits each time."""
    first = jax.block_until_ready(run(*given))
    for _ in range(TIMES - 1 if name in ("triton", "mosaic_gpu") else 0):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(run(*given)), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return first


def near(found: Any, wanted: tuple[np.ndarray, np.ndarray], what: str) -> None:
    """Within the oracle's bound, and half of the least step, where a result is below the dtype's normal numbers."""
    value, bound = wanted
    agrees(found, (value, bound + float(ml_dtypes.finfo(found.dtype).smallest_subnormal) / 2), what)


def called(case: Case, x: Any, name: str | None, **how: Any) -> Any:
    """attention of q, k, v and sinks, by name or by what serves."""

    def f(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        given = arguments(case, x) | {"sinks": sinks, "implementation": name} | how
        return attention(q, k, v, jnp.asarray(x.q_at), jnp.asarray(x.k_at), **given)

    return f


def forward(case: Case, name: str | None) -> None:
    x = tiled.inputs(case)
    found = repeated(name, jax.jit(called(case, x, name)), x.q, x.k, x.v, x.sinks)
    wanted = oracle(case, x, tiles=-(-case.shape[2] // 16))
    for what, value in zip(("out", "lse"), found, strict=True):
        near(value, wanted[what], what)


def both(case: Case, name: str | None, x: Any = None) -> None:
    """With gradients, through the log-sum-exp too. x: the numbers (None: the case's)."""
    x = tiled.inputs(case) if x is None else x

    def run(q: Any, k: Any, v: Any, sinks: Any, do: Any, dlse: Any) -> Any:
        out, pull = jax.vjp(called(case, x, name), q, k, v, sinks)
        return *out, *pull((do, dlse))

    found: dict[str, Any] = dict(
        zip(NAMES, repeated(name, jax.jit(run), x.q, x.k, x.v, x.sinks, x.do, x.dlse), strict=True)
    )
    for what, value in oracle(case, x, tiles=-(-case.shape[2] // 16)).items():
        near(found[what], value, what)


# ---- prompts


@pytest.mark.parametrize("name", ["triton", "xla"])
@pytest.mark.parametrize("case", [*in_16_bits(tiled.GRADIENTS), *LONGER], ids=str)
def test_forward_and_gradients(case: Case, name: str) -> None:
    both(case, name)


@pytest.mark.parametrize("name", ["triton", "xla"])
@pytest.mark.parametrize("combination", matrix.SAMPLE, ids=matrix.named)
def test_published_lengths(combination: Any, name: str) -> None:
    """The sample of FlashAttention's matrix, its lengths as published."""
    case, x = matrix.in_tiles(combination)
    both(case, name, x)


@pytest.mark.parametrize("case", [c for c in tiled.GRADIENTS if c.dtype == "float32"], ids=str)
def test_float32(case: Case) -> None:
    """Which no kernel of ours takes: products of float32, and not of the tensor cores' 10 bits."""
    both(case, None)


@pytest.mark.parametrize("name", ["triton", None], ids=["triton", "what serves"])
@pytest.mark.parametrize("case", in_16_bits(tiled.FORWARD), ids=str)
def test_forward(case: Case, name: str | None) -> None:
    forward(case, name)


@pytest.mark.parametrize("name", ["cudnn", None], ids=["cudnn", "what serves"])
@pytest.mark.parametrize("case", [tiled.GRADIENTS[0], *PLAIN], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_plain_positions(case: Case, padded: bool, name: str | None) -> None:
    """What cuDNN is asked for: positions 0, 1, ..., and nothing after the last. It sums in what order it likes."""
    assert case.places == "last"
    x = tiled.inputs(case)
    B, T, *_ = case.shape
    end = T - T // 3 if padded else T
    at = np.tile(np.where(np.arange(T) < end, np.arange(T), -1).astype(np.int32), (B, 1))
    x = dataclasses.replace(x, q_at=at, k_at=at, dlse=np.zeros_like(x.dlse))

    def run(q: Any, k: Any, v: Any, do: Any) -> Any:
        f = called(case, x, name, contiguous=True, training=True, return_lse=False)
        out, pull = jax.vjp(lambda *a: f(*a, None), q, k, v)
        return out, *pull(do)

    found = jax.jit(run)(x.q, x.k, x.v, x.do)
    wanted = oracle(case, x, tiles=-(-T // 16))
    for what, value in zip(("out", "dq", "dk", "dv"), found, strict=True):
        near(value, wanted[what], what)


@pytest.mark.parametrize("name", ["triton", "xla"])
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", (2, 70, 90, 4, 2, 64), "last", window=60),
        Case("float16", (1, 200, 300, 2, 1, 128), "last", sinks=True),
        Case("bfloat16", (2, 130, 130, 2, 2, 80), "packed", softcap=2.0, segments=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [32, 64])
def test_lists_of_blocks(case: Case, block: int, name: str) -> None:
    """Twice the same, none, and what is no block."""
    x, rng = tiled.inputs(case), np.random.default_rng(1)
    B, T, S, N, *_ = case.shape
    most = -(-S // block)
    blocks = rng.integers(-1, most + 1, (B, N, -(-T // block), 3)).astype(np.int32)
    blocks[0, 0, 0] = -1

    def run(blocks: Any, *given: Any) -> Any:
        how = arguments(case, x) | {"block_q": block, "block_k": block, "sinks": x.sinks, "implementation": name}
        return sparse_attention(*given, blocks=blocks, **how)

    found = repeated(name, jax.jit(run), blocks, x.q, x.k, x.v, x.q_at, x.k_at)
    allowed = tiled.within(blocks, T, S, block)
    wanted = oracle(case, x, tiles=-(-S // 16), allowed=allowed)
    for what, value in zip(("out", "lse"), found, strict=True):
        near(value, wanted[what], what)


# ---- caches


def cached(cases: Iterable[few.Case]) -> list[few.Case]:
    """In 16 bits; codes of 4 bits in both of them, for each has instructions of its own."""
    found = []
    for case in in_16_bits(cases):
        others = ("bfloat16", "float16") if case.kind == "int4" else (case.dtype,)
        found += [dataclasses.replace(case, dtype=dtype) for dtype in others]
    return found


# heads of a model over more slots than a program's share, of which the second row has none, and the third one
LONG = [
    few.Case((3, 1, 2100, 16, 2, 128), kind, page=page, dtype="bfloat16")
    for kind in ("raw", "int8", "int4") for page in (None, 64, 16)
]  # fmt: skip


def decoded(case: few.Case, name: str | None) -> None:
    x = few.inputs(case)

    def run(arrays: Any) -> Any:
        return decode_attention(**arrays, **x.how, return_lse=True, implementation=name)

    found = repeated(name, jax.jit(run), {n: jnp.asarray(a) for n, a in x.arrays.items()})
    u = float(ml_dtypes.finfo(x.arrays["q"].dtype).eps) / 2
    # blocks of 16 slots at least, and no more splits than blocks
    few.agrees(found, x, blocks=2 * -(-x.k.shape[2] // 16), u=u)


@pytest.mark.parametrize("case", cached([*(c for c, _ in split.CASES), *LONG]), ids=str)
def test_caches(case: few.Case) -> None:
    decoded(case, "triton")


@pytest.mark.parametrize("name", ["xla", None], ids=["xla", "what serves"])
@pytest.mark.parametrize("case", in_16_bits([*few.CASES[5:15], LONG[0]]), ids=str)
def test_caches_by_others(case: few.Case, name: str | None) -> None:
    decoded(case, name)


# ---- the kernel with barriers


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*mosaic.CASES, *LONGER], ids=str)
def test_hoppers_forward(case: Case) -> None:
    forward(case, "mosaic_gpu")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", LONGER, ids=str)
def test_gradients_from_hoppers_forward(case: Case) -> None:
    both(case, "mosaic_gpu")
