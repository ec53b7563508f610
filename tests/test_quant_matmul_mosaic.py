"""The Hopper kernel of quant_matmul in jax's interpreter for Mosaic GPU, against numpy float64; what it refuses; and compiled
for an H200.

The interpreter runs each warpgroup as a thread, with the copies and barriers as they are written: a barrier too few or too
many hangs or is an error, a slot that is overwritten too early gives other numbers. Matrices and bounds are those of
tests/test_quant_matmul.py. What the interpreter replaces is checked apart: inline PTX by what its instructions mean, and
wgmma by its being in the program. Registers and shared memory are ptxas's own words, from a process of its own, since this
backend compiles for one architecture in a process.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant_matmul import Case, assert_near, f64, how, matrix, rows
from test_quant_matmul_triton import OPERATIONS, OTHERS, WORDS, fma_of, halves, ptx

from pallas_kernels import aot, disassembly, dispatch
from pallas_kernels.quant_matmul import IMPLEMENTATIONS, layout, quant_matmul

mosaic_gpu = pytest.importorskip("pallas_kernels.quant_matmul.mosaic_gpu")

OLD = tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3]) < mosaic_gpu.OLDEST
new_jax = pytest.mark.skipif(OLD, reason=f"jax {jax.__version__} is refused")
E4M3 = "float8_e4m3fn"

# kind, M, N, K, dtype of the result: more turns than tiles under way, inputs in parts, several blocks of rows or outputs
RUNS = [
    (Case("int4", 128, zero=True, scale="bfloat16"), 70, 256, 768, "bfloat16"),
    (Case("int4", 64), 5, 128, 1024, "bfloat16"),  # two groups in a turn, two parts
    (Case("int4", 64, zero=True), 9, 128, 256, "float32"),
    (Case("int4", 256, scale="float16"), 70, 128, 1536, "float16"),
    (Case("int8"), 130, 128, 512, "bfloat16"),
    (Case("int8", 32, scale="float16"), 3, 256, 128, "bfloat16"),  # GGUF's Q8_0
    (Case("int8", 256), 20, 128, 512, "float32"),  # two turns in a group
    (Case("fp8", codes=E4M3), 17, 128, 384, "float32"),
    (Case("fp8", codes="float8_e5m2"), 8, 128, 256, "bfloat16"),
    (Case("fp8_block", 128, codes=E4M3), 20, 256, 384, "bfloat16"),
]


def named(run: Any) -> str:
    return "-".join(map(str, (run[0].name, *run[1:])))


@new_jax
@pytest.mark.parametrize("run", RUNS, ids=map(named, RUNS))
def test_forward(run: Any) -> None:
    case, M, N, K, dtype = run
    m, x = matrix(case, N, K), rows(M, K, "bfloat16")
    y = mosaic_gpu.quant_matmul(x, m.codes, m.scale, m.zero, dtype=dtype, interpret=True, **how(case))
    assert_near(y, x, m.dense, dtype=dtype)
    assert (f64(y)[:, 0] == 0).all()  # its weights are zero


@new_jax
def test_few_tiles_under_way() -> None:
    """Each slot is filled four times, and parts of three and two turns."""
    case = Case("int4", 128, zero=True)
    m, x = matrix(case, 128, 1024), rows(8, 1024, "bfloat16")
    for splits in (1, 3):
        tiles = mosaic_gpu.Config(block_m=8, block_k=128, stages=2, splits=splits)
        y = mosaic_gpu.quant_matmul(
            x, m.codes, m.scale, m.zero, dtype="float32", interpret=True, config=tiles, **how(case)
        )
        assert_near(y, x, m.dense, dtype="float32")


@new_jax
def test_the_gradient_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op's own rule, asked for by name."""
    interpreted = functools.partial(mosaic_gpu.quant_matmul, interpret=True)
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", interpreted)
    case = Case("int4", 64)
    m, x = matrix(case, 128, 128), rows(4, 128, "bfloat16")
    g = rows(4, 128, "float32", seed=2)

    def product(x: Any) -> jax.Array:
        return quant_matmul(x, *m[:3], dtype="float32", implementation="mosaic_gpu", **how(case))

    y, back = jax.vjp(product, x)
    assert_near(y, x, m.dense, dtype="float32")
    assert_near(back(g)[0], g, m.dense.T, dtype="bfloat16")


@pytest.mark.parametrize("j", range(4))
def test_ptx(j: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All words, each beside another: their codes less 8, which bfloat16 holds."""
    fma = fma_of(jnp.bfloat16)
    one, sign = np.uint32(0x3F803F80), np.uint32(0x80008000)
    monkeypatch.setitem(OPERATIONS, "sub.rn.bf16x2", lambda a, b: fma(a, one, b ^ sign))
    [found] = ptx(mosaic_gpu.unpack_ptx(j), WORDS | OTHERS << np.uint32(16))
    for half, words in zip(halves(found, "bfloat16"), (WORDS, OTHERS), strict=True):
        np.testing.assert_array_equal(half.astype(np.int64), (words >> np.uint32(4 * j) & 15).astype(np.int64) - 8)


# --- what is refused ------------------------------------------------------------------------------------------------


def abstract(
    M: int = 64, N: int = 128, K: int = 256, kind: str = "int4", group_size: int = 128, dtype: Any = jnp.bfloat16
) -> tuple[Any, ...]:
    """x, codes and scale."""
    like = jax.ShapeDtypeStruct
    scales = (-(-N // 128), -(-K // 128)) if kind == "fp8_block" else (N, K // group_size) if group_size else (N,)
    codes = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "fp8_block": jnp.float8_e4m3fn}.get(kind)
    of_codes = like((N, K // 4), jnp.uint16) if codes is None else like((N, K), codes)
    return like((M, K), dtype), of_codes, like(scales, jnp.float32)


def asked(arrays: Any, kind: str = "int4", group_size: int = 128) -> Any:
    call = functools.partial(
        quant_matmul, kind=kind, group_size=group_size, dtype="bfloat16", implementation="mosaic_gpu"
    )
    return jax.eval_shape(call, *arrays)


@pytest.mark.skipif(not OLD, reason="this jax is new enough")
def test_an_old_jax_is_refused() -> None:
    with pytest.raises(dispatch.Refused, match=r"written for 0\.11\.1 and later"):
        asked(abstract())


HOPPER = (9, 0)


@new_jax
@pytest.mark.parametrize(
    ("capability", "given", "said"),
    [
        (None, {}, "there is no GPU"),
        ((8, 9), {}, "compute capability is 8.9; wgmma is Hopper's alone"),
        ((10, 0), {}, "compute capability is 10.0"),
        (HOPPER, {"kind": "nf4"}, "no kernel of nf4 here; there are int4, int8, fp8, fp8_block"),
        (HOPPER, {"group_size": 32}, "group_size of int4 is 32; here it is one of 64, 128, 256"),
        (HOPPER, {"dtype": jnp.float16}, "x is float16"),
        (HOPPER, {"M": 1025}, "1025 rows; the kernel serves 1 to 1024"),
        (HOPPER, {"N": 192}, "192 outputs, not a multiple of its tile's 128"),
        (HOPPER, {"K": 192, "group_size": 64}, "192 inputs, not a multiple of its tile's 128"),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, capability: Any, given: Any, said: str) -> None:
    monkeypatch.setattr(dispatch, "gpu", lambda: None if capability is None else dispatch.Gpu(capability, 132))
    of_call = {name: given[name] for name in ("kind", "group_size") if name in given}
    with pytest.raises(dispatch.Refused, match=re.escape(said)):
        asked(abstract(**given), **of_call)


@new_jax
def test_it_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "gpu", lambda: dispatch.Gpu(HOPPER, 132))
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", lambda *a, **k: pytest.fail("it was"))
    call = functools.partial(quant_matmul, kind="int4", group_size=128, dtype="bfloat16")
    assert jax.eval_shape(call, *abstract()).shape == (64, 128)


@pytest.mark.parametrize("kind", list(mosaic_gpu.SERVED))
def test_tiles_fit_and_fill_the_card(kind: str) -> None:
    for group_size in mosaic_gpu.SERVED[kind]:
        for M in (1, 16, 100, 1024):
            for N, K in ((4096, 4096), (128, 28672), (8192, 28672)):
                made = mosaic_gpu.choose(M, N, K, kind, group_size, 132)
                assert mosaic_gpu.shared_bytes(made, kind) + 4096 <= mosaic_gpu.SHARED
                assert made.stages >= 3
                blocks = made.splits * (N // 128) * -(-M // made.block_m)
                assert made.splits == 1 or blocks <= 132
                turns = K // made.block_k
                assert (made.splits - 1) * -(-turns // made.splits) < turns  # none has nothing to do


# --- compiled -------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from pallas_kernels import aot
from pallas_kernels.quant_matmul import quant_matmul

like = jax.ShapeDtypeStruct
kind, group_size, affine, *shapes = json.loads(sys.argv[1])
dtypes = {"int4": jnp.uint16, "int8": jnp.int8}
temporaries = []
with aot.target(aot.CARDS["H200"]) as target:
    for M, N, K in shapes:
        codes = like((N, K // 4 if kind == "int4" else K), dtypes.get(kind, jnp.float8_e4m3fn))
        scales = (N // 128, K // 128) if kind == "fp8_block" else (N, K // group_size) if group_size else (N,)
        scale = like(scales, jnp.bfloat16)
        more = (scale,) if affine else ()

        def f(x, codes, scale, zero=None):
            return quant_matmul(
                x, codes, scale, zero, kind=kind, group_size=group_size, dtype="bfloat16", implementation="mosaic_gpu"
            )

        done = target.compile(jax.jit(f), *target.place((like((M, K), jnp.bfloat16), codes, scale, *more)))
        temporaries.append(done.memory_analysis().temp_size_in_bytes)
print(json.dumps(temporaries))
"""

# kind, group_size, affine, (M, N, K) ...: 7B, 8B and 70B models'; prompts, and a row or a few
COMPILED = [
    ("int4", 128, False, (64, 4096, 4096), (1024, 8192, 28672), (1, 4096, 14336)),
    ("int4", 64, True, (1024, 4096, 4096), (128, 8192, 28672)),
    ("int4", 256, True, (512, 4096, 4096),),
    ("int8", 0, False, (64, 4096, 4096), (1024, 8192, 28672)),
    ("int8", 32, False, (256, 4096, 4096),),
    ("fp8", 0, False, (256, 4096, 14336), (16, 4096, 4096)),
    ("fp8_block", 128, False, (128, 4096, 7168),),
]  # fmt: skip


@new_jax
@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(g, id=f"{g[0]}-{g[1]}", marks=[] if i in (0, 3, 5) else pytest.mark.thorough)
        for i, g in enumerate(COMPILED)
    ],
)
def test_compiled_for_an_h200(given: Any, tmp_path: Path) -> None:
    """On wgmma, out of registers, nothing spilled or put in a row by the compiler; at launch a thread has its third of the
    registers, and then the computing ones take 232; shared memory within the closed form; no copy of the matrix."""
    import json

    kind, group_size, _, *shapes = given
    dump = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "RESOURCES")}
    env = os.environ | dump | {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [p.read_text() for p in tmp_path.glob("*.ptxas")]
    assert len(said) == len(shapes)
    for text in said:
        assert "sm_90a" in text
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        assert "Used 168 registers" in text  # 65,536 / 384 threads, in steps of 8
        assert "serialize" not in text
    for p in tmp_path.glob("*.ptx"):
        text = p.read_text()
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16 \{[^}]*\}, (.)", text)
        assert len(products) == (16 if group_size == 256 else 8)
        assert {what for _, what in products} == {"{"}  # the matrix is in registers: no descriptor of shared memory
        assert "cp.async.bulk.tensor" in text
        assert "setmaxnreg.inc.sync.aligned.u32 232" in text
    names = tmp_path.glob("*.resources.txt")
    asked = sorted(int(n) for p in names for n in re.findall(r"smem_scratch_bytes=(\d+)", p.read_text()))
    tiles = [mosaic_gpu.choose(M, N, K, kind, group_size, aot.CARDS["H200"].cores) for M, N, K in shapes]
    bounds = sorted(mosaic_gpu.shared_bytes(t, kind) + 4096 for t in tiles)
    assert len(asked) == len(bounds)
    for bytes_, bound in zip(asked, bounds, strict=True):
        assert bytes_ <= bound <= mosaic_gpu.SHARED
    written = json.loads(done.stdout.splitlines()[-1])
    for (M, N, K), t, temporary in zip(shapes, tiles, written, strict=True):
        padded = M + -M % t.block_m
        assert temporary <= 4 * t.splits * N * padded + 2 * padded * K + 4 * padded * K // 64 + 2**16


# --- on a card ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("run", COMPILED, ids=lambda g: f"{g[0]}-{g[1]}")
def test_on_a_card(run: Any) -> None:
    """Real sizes, several times each: no two results differ, and none from numpy's float64."""
    kind, group_size, affine, *shapes = run
    device = jax.devices()[0]
    if device.platform != "gpu" or int(device.compute_capability.partition(".")[0]) != 9:
        pytest.skip(f"there is no Hopper GPU: jax.devices() are {device.device_kind!r}")
    case = Case(kind, group_size, zero=affine, scale="bfloat16", codes=E4M3 if kind in layout.FLOATS else "")
    for M, N, K in shapes:
        # as the whole matrix is cut, of which some outputs are looked at: fewer would be split otherwise
        config = mosaic_gpu.choose(M, N, K, kind, group_size, device.core_count)
        m, x = matrix(case, min(N, 512), K), rows(M, K, "bfloat16")
        product = jax.jit(functools.partial(mosaic_gpu.quant_matmul, dtype=jnp.bfloat16, config=config, **how(case)))
        found = [np.asarray(product(x, *m[:3])) for _ in range(5)]
        assert_near(found[0], x, m.dense, dtype="bfloat16", err_msg=f"{M} rows")
        assert all(np.array_equal(found[0], again) for again in found[1:])


@new_jax
def test_a_kinds_numbers_are_exact_in_bfloat16() -> None:
    """What is said of every number that a code stands for, so that only scales and sums round."""
    for dtype in layout.FP8:
        with np.errstate(invalid="ignore"):
            numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
        finite = numbers[np.isfinite(numbers)]
        np.testing.assert_array_equal(finite, finite.astype(jnp.bfloat16).astype(np.float32))
    every = np.arange(-128, 128, dtype=np.float32)
    np.testing.assert_array_equal(every, every.astype(jnp.bfloat16).astype(np.float32))


def test_a_loop_that_waits_is_not_the_kernels() -> None:
    """A branch back to a barrier's test, inside the loop of the products."""

    def at(address: int, opcode: str, operands: str = "") -> disassembly.Instruction:
        return disassembly.Instruction(address, opcode, operands)

    listing = [
        at(0, "MOV"), at(16, "SYNCS"), at(32, "BRA", "0x10"), at(48, "HGMMA.64x128x16.F32.BF16"), at(64, "BRA", "0x10"),
        at(80, "EXIT"), at(96, "SYNCS"), at(112, "BRA", "0x0"), at(128, "BRA", "0x60"),
    ]  # fmt: skip
    assert [i.address for i in disassembly.innermost_loop(listing)] == [16, 32, 48, 64]
    assert [i.address for i in disassembly.innermost_loop([listing[1], listing[2]])] == [16, 32]


def test_a_wait_behind_the_end_is_no_loop() -> None:
    """On sm_100 one stands there and goes back into the loop; what lies between is shorter than it, and has its products."""

    def at(address: int, opcode: str, operands: str = "") -> disassembly.Instruction:
        return disassembly.Instruction(address, opcode, operands)

    loop = [*(at(16 * i, "LOP3") for i in range(1, 7)), at(112, "UTCHMMA"), at(128, "BRA", "0x10")]
    listing = [at(0, "MOV"), *loop, at(144, "EXIT"), at(160, "SYNCS"), at(176, "BRA", "0xa0"), at(192, "BRA", "0x60")]
    assert list(disassembly.innermost_loop(listing)) == loop
