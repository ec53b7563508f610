"""The Hopper kernel in jax's interpreter for Mosaic GPU, against numpy float64; what it refuses; and compiled for an H200.

The interpreter runs each warpgroup as a thread, with the copies and barriers as they are written: a barrier too few or too
many hangs or is an error, a slot that is overwritten too early gives other numbers. The oracle and its bounds are those of
tests/test_attention_triton.py. Registers and shared memory are ptxas's own words, from a process of its own, since this
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
from test_attention_triton import Case, agrees, arguments, inputs, oracle

from pallas_kernels import aot, dispatch
from pallas_kernels.attention import attention

mosaic_gpu = pytest.importorskip("pallas_kernels.attention.mosaic_gpu")

OLD = tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3]) < mosaic_gpu.OLDEST
new_jax = pytest.mark.skipif(OLD, reason=f"jax {jax.__version__} is refused")

CASES = [
    Case("bfloat16", (1, 150, 400, 2, 1, 64), "last", sinks=True),  # tiles with a mask and without
    Case("float16", (2, 60, 60, 2, 2, 80), "padded", softcap=2.0),  # an empty row
    Case("bfloat16", (1, 70, 130, 1, 1, 256), "packed", window=50, segments=True),
    Case("bfloat16", (1, 20, 300, 2, 1, 128), "ring", window=200, softcap=3.0, sinks=True),
    Case("float16", (1, 40, 140, 2, 1, 96), "any"),
    # the last rows see nothing of the first tile; with this head_dim -1e30 times the scale is rounded upwards
    Case("bfloat16", (1, 70, 260, 1, 1, 72), "last", window=100),
    Case("bfloat16", (3, 60, 60, 1, 1, 72), "padded"),  # rows that see nothing of a tile that others see
]


def run(case: Case, x: Any) -> Any:
    def f(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        how = arguments(case, x) | {"sinks": sinks, "interpret": True}
        return mosaic_gpu.attention(q, k, v, jnp.asarray(x.q_at), jnp.asarray(x.k_at), **how)

    return f


@new_jax
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.some_rows
def test_forward(case: Case) -> None:
    x = inputs(case)
    found = jax.jit(run(case, x))(x.q, x.k, x.v, x.sinks)
    wanted = oracle(case, x, tiles=-(-case.shape[2] // 64))
    assert found[0].dtype == x.q.dtype
    for name, value in zip(("out", "lse"), found, strict=True):
        agrees(value, wanted[name], name)


@new_jax
def test_gradients() -> None:
    """Through the log-sum-exp that the kernel gives, by Triton's backward."""
    case = Case("bfloat16", (1, 90, 150, 2, 1, 64), "last", window=70, sinks=True)
    x = inputs(case)
    found, pull = jax.vjp(run(case, x), x.q, x.k, x.v, x.sinks)
    wanted = oracle(case, x, tiles=3)
    gradients = pull((jnp.asarray(x.do), jnp.asarray(x.dlse)))
    assert [g.dtype for g in gradients] == [a.dtype for a in (x.q, x.k, x.v, x.sinks)]
    for name, value in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (*found, *gradients), strict=True):
        right, bound = wanted[name]
        off = abs(np.asarray(value, np.float64) - right)
        assert (off <= bound).all(), f"{name}: {(off - bound).max()} over"
        assert bound.max() < abs(right).max(), name  # zeros would not pass


def abstract(H: int = 64, T: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    like = jax.ShapeDtypeStruct
    at = like((1, T), jnp.int32)
    return like((1, T, 2, H), dtype), like((1, 1, T, H), dtype), like((1, 1, T, H), dtype), at, at


@pytest.mark.skipif(not OLD, reason="this jax is new enough")
def test_an_old_jax_is_refused() -> None:
    with pytest.raises(dispatch.Refused, match=r"written for 0\.11\.1 and later"):
        jax.eval_shape(functools.partial(attention, scale=0.1, implementation="mosaic_gpu"), *abstract())


@new_jax
@pytest.mark.parametrize(
    ("capability", "arguments", "how", "said"),
    [
        (None, {}, {}, "there is no GPU"),
        ((8, 9), {}, {}, "compute capability is 8.9; wgmma is Hopper's alone"),
        ((10, 0), {}, {}, "compute capability is 10.0"),
        ((9, 0), {"dtype": jnp.float32}, {}, "q is float32; the tensor cores take bfloat16 and float16"),
        ((9, 0), {"H": 320}, {}, "head_dim is 320"),
        ((9, 0), {}, {"scale": -1.0}, "scale is -1.0"),
    ],
)  # fmt: skip
def test_refused(monkeypatch: pytest.MonkeyPatch, capability: Any, arguments: Any, how: Any, said: str) -> None:
    monkeypatch.setattr(dispatch, "gpu", lambda: None if capability is None else dispatch.Gpu(capability, 100))
    asked = functools.partial(attention, implementation="mosaic_gpu", **({"scale": 0.1} | how))
    with pytest.raises(dispatch.Refused, match=re.escape(said)):
        jax.eval_shape(asked, *abstract(**arguments))


@pytest.mark.parametrize("H", [64, 128, 192, 256])
def test_tiles_fit_shared_memory(H: int) -> None:
    assert mosaic_gpu.shared_bytes(mosaic_gpu.choose(H), H, segments=True) + 4096 <= mosaic_gpu.SHARED


PROGRAM = """
import functools, sys
import jax, jax.numpy as jnp
from pallas_kernels import aot
from pallas_kernels.attention import attention

T, N, K, H = 4096, 4, 2, int(sys.argv[1])
like = jax.ShapeDtypeStruct
kv, at, sinks = like((1, K, T, H), jnp.bfloat16), like((1, T), jnp.int32), like((N,), jnp.float32)

def bare(q, k, v, at, sinks):
    return attention(q, k, v, at, at, scale=0.1, implementation="mosaic_gpu")

def every(q, k, v, at, sinks):
    how = {"window": 1000, "softcap": 30.0, "sinks": sinks, "q_segments": at, "k_segments": at}
    return attention(q, k, v, at, at, scale=0.1, return_lse=True, implementation="mosaic_gpu", **how)

with aot.target(aot.CARDS["H200"]) as target:
    for f in (bare, every):
        target.compile(jax.jit(f), *target.place((like((1, T, N, H), jnp.bfloat16), kv, kv, at, sinks)))
"""


@new_jax
@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("H", [128, pytest.param(64, marks=pytest.mark.thorough), 256])
@pytest.mark.some_rows
def test_compiled_for_an_h200(H: int, tmp_path: Path) -> None:
    """Bare, and with every kind of mask: on wgmma, nothing spilled; at launch a thread has its third of the registers, and
    then the computing ones take 232; shared memory within the closed form but for alignment and barriers."""
    dump = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "RESOURCES")}
    env = os.environ | dump | {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(H)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [p.read_text() for p in sorted(tmp_path.glob("*.ptxas"))]
    assert len(said) == 2
    for text in said:
        assert "sm_90a" in text
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        assert "Used 168 registers" in text  # 65,536 / 384 threads, in steps of 8
    for p in tmp_path.glob("*.ptx"):
        text = p.read_text()
        assert "wgmma.mma_async" in text
        assert "cp.async.bulk.tensor" in text
        assert "setmaxnreg.inc.sync.aligned.u32 232" in text
    config = mosaic_gpu.choose(H)
    for p, segments in zip(sorted(tmp_path.glob("*.resources.txt")), (False, True), strict=True):
        asked = re.search(r"smem_scratch_bytes=(\d+)", p.read_text())
        assert asked is not None
        bound = mosaic_gpu.shared_bytes(config, H, segments=segments) + 4096
        assert bound - 8192 <= int(asked[1]) <= bound <= mosaic_gpu.SHARED
