"""Published lists of attention shapes, as data, through the form in blocks and, shorter, through the tiled kernels interpreted:
forwards and backwards against float64. And which implementation takes which of them on a card, traced and not run.

FLASH is the matrix of `test_flash_attn_output` in Dao-AILab/flash-attention (tests/test_flash_attn.py): every combination of
lengths, widths, heads, causal, local and soft-cap in two dtypes; its dropout and ALiBi have no counterpart here. TOKAMAX is the
list of openxla/tokamax (tokamax/_src/ops/attention/arg_specs.py): Mixtral, DeepSeek 2, AlphaFold, and the benchmark of
FlashAttention-3 (arXiv:2407.08608, section 4.1).

How they are said here. Causal is by positions, aligned at the end as there: query t of T stands at t + S - T, before the first
slot if that is negative, and then sees nothing. Not causal is every query at the last slot. Local is a window of a third of the
slots, and causal, which is what positions can say. AlphaFold masks keys, which are slots that hold nothing here; the bias it
adds to scores has no counterpart and is left out. DeepSeek 2's values are narrower than its keys, which is refused.

How they are scaled and sampled, so that two cores take seconds. FLASH: one row of four; heads as published, 6 (4 under a
soft-cap) over 6, 1 or 2, up to 512 tokens, and one kv head's from there on. Of the 5760 combinations, in the order of
`COMBINATIONS`, numbers 0, STEP, 2 STEP, ... modulo 5760, with which STEP has no divisor in common; a test holds that every value
of every parameter is among them, and every pair of booleans. TOKAMAX: one row; one kv head with its queries (two where each has
one); lengths by 16, from 24 on; of each project the first, and each STRIDE-th after it. Blocks of 64 queries and 96 slots, which
divide few of these lengths.

Through the kernels lengths are an eighth, and the tiles of 16 to 32 rows those of tests/test_attention_triton.py.

Tolerances: the heads of tests/test_attention.py and tests/test_attention_triton.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention_triton as tiled
from test_attention import FORMS, Case, case, compare

from pallas_kernels import attention as op
from pallas_kernels import dispatch
from pallas_kernels.attention import attention, xla

FORMS["blocks of 64 and 96"] = (xla.attention, lambda S: -(-S // 96), {"at_once": xla.Blocks(64, 96)})

FLASH: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "bfloat16"),
    "heads": ("mha", "mqa", "gqa"),
    "local": (False, True),
    "causal": (False, True),
    "width": (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256),
    "lengths": (
        (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
        (2048, 2048),
    ),
    "softcap": (None, 50.0),
}  # fmt: skip
COMBINATIONS = list(itertools.product(*FLASH.values()))
STEP = 1237
SAMPLE = [COMBINATIONS[STEP * i % len(COMBINATIONS)] for i in range(14)]


def places(T: int, S: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    at = np.maximum(np.arange(T) + S - T, -1) if causal else np.full(T, S - 1)
    return at[None], np.arange(S)[None]


def test_the_sample_has_every_value() -> None:
    assert math.gcd(STEP, len(COMBINATIONS)) == 1
    assert len(COMBINATIONS) == 5760
    for i, values in enumerate(FLASH.values()):
        assert {c[i] for c in SAMPLE} == set(values)
    for i, j in itertools.combinations((0, 2, 3, 6), 2):
        assert len({(c[i], c[j]) for c in SAMPLE}) == 4


def named(c: Any) -> str:
    dtype, heads, local, causal, width, (T, S), softcap = c
    return f"{dtype}-{heads}-{'local-' * local}{'causal-' * causal}{width}-{T}x{S}{'-cap' * bool(softcap)}"


@pytest.mark.parametrize("combination", SAMPLE, ids=named)
@pytest.mark.some_rows
def test_flash_attention(combination: Any) -> None:
    dtype, heads, local, causal, H, (T, S), softcap = combination
    N = 6 if softcap is None else 4
    K = {"mha": N, "mqa": 1, "gqa": 2}[heads]
    if max(T, S) > 512:
        N, K = N // K, 1
    x = case(1, T, S, N, K, H, *places(T, S, causal or local), dtype=dtype)
    if softcap is not None:  # as there: scores that the cap bends
        x = x._replace(q=(x.q.astype(np.float32) * 8).astype(x.q.dtype))
    compare(x, "blocks of 64 and 96", scale=H**-0.5, window=S // 3 if local else None, softcap=softcap)


# of the sample: between them both dtypes, causal and not, local, a cap, and a width that is no power of two
QUICK = (1, 4, 8)


def in_tiles(combination: Any, by: int = 1) -> tuple[tiled.Case, Any]:
    """What the kernels' own tests take: the case, its lengths `by` times shorter, and the numbers."""
    dtype, heads, local, causal, H, lengths, softcap = combination
    T, S = (-(-n // by) for n in lengths)
    N = 6 if softcap is None else 4
    K = {"mha": N, "mqa": 1, "gqa": 2}[heads]
    if max(T, S) > 512:
        N, K = N // K, 1
    how: dict[str, Any] = {"window": S // 3 if local else None, "softcap": softcap}
    c = tiled.Case(dtype, (1, T, S, N, K, H), "last" if causal or local else "whole", **how)
    x = tiled.inputs(c)
    if softcap is not None:
        x = dataclasses.replace(x, q=(x.q.astype(np.float32) * 8).astype(x.q.dtype))
    return c, x


@pytest.mark.parametrize(
    "combination",
    [pytest.param(c, marks=[] if i in QUICK else pytest.mark.thorough, id=named(c)) for i, c in enumerate(SAMPLE)],
)
@pytest.mark.some_rows
def test_flash_attention_in_tiles(combination: Any) -> None:
    """The kernels as they are written, forwards and backwards."""
    c, x = in_tiles(combination, 8)
    found = dict(zip(tiled.NAMES, tiled.quickly(tiled.differentiated(c, x), tiled.arrays(x))[0], strict=True))
    for name, wanted in tiled.oracle(c, x, tiles=-(-c.shape[2] // 16)).items():
        tiled.agrees(found[name], wanted, name)


class Spec(NamedTuple):
    """q [B, T, N, H]; k [B, T, K, H]; v [B, T, K, V]."""

    project: str
    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    V: int
    dtype: str = "bfloat16"
    causal: bool = False
    masked: bool = False  # keys are


def tokamax() -> list[Spec]:
    out = [
        Spec("mixtral", "8x7b_bf16", 32, 4096, 32, 8, 128, 128, causal=True),
        Spec("deepseek2", "16b_bf16", 512, 1024, 16, 16, 192, 128, causal=True),
        Spec("alphafold", "384x384x4x32", 384, 384, 4, 4, 32, 32, masked=True),
        Spec("alphafold", "384x384x4x64", 384, 384, 4, 4, 64, 64, masked=True),
        Spec("alphafold", "768x768x4x64", 768, 768, 4, 4, 64, 64, masked=True),
    ]
    for T, H, causal, dtype in itertools.product(
        (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256), (True, False), ("bfloat16", "float16")
    ):
        name = f"seq_len={T}_head_dim={H}_causal={causal}_dtype={dtype}"
        out.append(
            Spec("flash_attention_v3", name, 16384 // T, T, 2048 // H, 2048 // H, H, H, dtype=dtype, causal=causal)
        )
    for B, lengths in ((32, range(512, 1537, 256)), (128, range(1792, 5121, 256))):
        for T, (H, vmap) in itertools.product(lengths, ((16, False), (32, True), (32, False))):
            name = f"batch_size={B}_seq_len={T}_head_dim={H}_vmap={vmap}"
            out.append(Spec("alphafold_3", name, B, T, 4, 4, H, H, masked=True))
    return out


TOKAMAX = tokamax()
STRIDE = {"alphafold": 3, "flash_attention_v3": 17, "alphafold_3": 40}
SCALED = [
    spec
    for project in dict.fromkeys(s.project for s in TOKAMAX)
    for spec in [s for s in TOKAMAX if s.project == project][:: STRIDE.get(project, 1)]
]


@pytest.mark.parametrize("spec", SCALED, ids=lambda s: f"{s.project}-{s.name}")
def test_tokamax(spec: Spec) -> None:
    T, H, G = max(24, spec.T // 16), spec.H, spec.N // spec.K
    N, K = (2, 2) if G == 1 else (G, 1)
    x: Case = case(1, T, T, N, K, H, *places(T, T, spec.causal), dtype=spec.dtype)
    if spec.masked:
        x = x._replace(k_at=np.where(np.random.default_rng(0).random((1, T)) < 0.3, -1, x.k_at))
    if spec.V != H:
        with pytest.raises(ValueError, match=r"k and v are both"):
            attention(x.q, x.k, x.v[..., : spec.V], x.q_at, x.k_at, scale=H**-0.5)
        return
    compare(x, "blocks of 64 and 96", scale=H**-0.5)


@pytest.mark.parametrize("spec", TOKAMAX, ids=lambda s: f"{s.project}-{s.name}")
def test_tokamax_is_traced_as_it_is(spec: Spec) -> None:
    """Every row of the list at its own size, traced and not run: what the dispatcher takes gives the shapes asked for."""
    if spec.V != spec.H:
        pytest.skip("values of another width than the keys are refused; see above")
    like = jax.ShapeDtypeStruct
    kv, at = like((spec.B, spec.K, spec.T, spec.H), spec.dtype), like((spec.B, spec.T), jnp.int32)
    q = like((spec.B, spec.T, spec.N, spec.H), spec.dtype)
    out, lse = jax.eval_shape(lambda *a: attention(*a, scale=0.1, return_lse=True), q, kv, kv, at, at)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], jnp.float32)


@pytest.mark.parametrize("library", [None, 91000], ids=["no-cuDNN", "cuDNN"])
@pytest.mark.parametrize(
    ("kind", "capability", "widest"),
    [("NVIDIA H100", (9, 0), 256), ("NVIDIA L4", (8, 9), 128)],
    ids=["H200", "RTX 4090"],
)
def test_what_serves_the_list_on_a_card(
    monkeypatch: pytest.MonkeyPatch, library: int | None, kind: str, capability: tuple[int, int], widest: int
) -> None:
    """cuDNN what is causal and not too wide, where it is there; our kernel the rest; nothing is left to the form in blocks.

    Queries and slots are the same tokens here, which is said of the causal ones: of the others it would not be true."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version() -> int:
        if library is None:
            raise RuntimeError("cuDNN is not detected.")
        return library

    # jax asks this machine for both
    monkeypatch.setattr(fused, "check_cudnn_version", version)
    monkeypatch.setattr(
        fused, "check_compute_capability", lambda least: capability >= tuple(map(int, least.split(".")))
    )
    heard: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            made = function(*arguments, **how)
            heard.append(name)
            return made

        return call

    monkeypatch.setattr(op, "IMPLEMENTATIONS", {n: noted(n, f) for n, f in op.IMPLEMENTATIONS.items()})
    # only the arm for a GPU
    monkeypatch.setattr(dispatch.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    like, found, wanted = jax.ShapeDtypeStruct, {}, {}
    with tiled.on(kind):
        for spec in TOKAMAX:
            kv, at = like((spec.B, spec.K, spec.T, spec.H), spec.dtype), like((spec.B, spec.T), jnp.int32)
            q, v = (
                like((spec.B, spec.T, spec.N, spec.H), spec.dtype),
                like((spec.B, spec.K, spec.T, spec.V), spec.dtype),
            )
            call = functools.partial(attention, scale=0.1, contiguous=spec.causal)
            name = f"{spec.project} {spec.name}"
            if spec.V != spec.H:
                with pytest.raises(ValueError, match="k and v are both"):
                    jax.eval_shape(call, q, kv, v, at, at)
                continue
            heard.clear()
            assert jax.eval_shape(call, q, kv, v, at, at).shape == q.shape
            [found[name]] = heard
            wanted[name] = "cudnn" if library and spec.causal and widest >= spec.H else "triton"
    assert found == wanted
    assert set(found.values()) == ({"cudnn", "triton"} if library else {"triton"})
