"""scripts/bench_quant.py: what stands beside a product's time, and of --decode that its files are what they say, and what is
done with a peer's answers.

No time is asserted: those of products are made up. The peer is a program of two lines which checks what it is told.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import packed
from rich.console import Console

import jaxengine
from jaxengine.architecture import architecture, initialise
from jaxengine.weights.base import Weight
from pallas_kernels import aot, cards
from pallas_kernels.quant_matmul import reference

ROOT = Path(__file__).parent.parent
SHAPE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
PEER = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert (given["-p"], given["-n"], given["-d"], given["-o"]) == ("0", "63", "128", "json"), given
assert open(given["-m"], "rb").read(4) == b"GGUF"
print({answer})
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "bench_quant.py"))


def run(monkeypatch: pytest.MonkeyPatch, *given: str) -> tuple[Any, str, str]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench_quant.py", *given])
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "bench_quant.py"), run_name="__main__")
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "shape.json")


def peer(folder: Path, answer: str) -> str:
    path = folder / "llama-bench"
    path.write_text(PEER.format(python=sys.executable, answer=answer))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("kind", "step"), [("F32", 0), ("Q8_0", 0.5 / 127), ("Q4_0", 1 / 8)])
def test_the_files_hold_the_model(kind: str, step: float, script: dict[str, Any], tmp_path: Path) -> None:
    """Each number within half a step of its group's largest; Q4_0 cuts the other end off by up to a whole one."""
    arch = architecture(SHAPE)
    params = initialise(arch, 0)
    script["write_gguf"](tmp_path / "m.gguf", SHAPE, params, kind)
    model = jaxengine.load(tmp_path / "m.gguf")
    assert model.config == architecture(SHAPE | {"rms_norm_eps": model.config.rms_norm_eps}).config
    [bank] = model.params["banks"]
    found = model.params["outer"] | {f"layers.0.{n}": w for n, w in bank.weights[0].items()}
    assert found.keys() == params.keys()
    for name, leaf in found.items():
        exact = np.asarray(params[name])
        dense = np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf)
        if name.endswith((".q", ".k")):  # llama.cpp has the halves of a head in turns, and it was not written so
            exact = np.sort(exact.reshape(exact.shape[0], -1), 1)
            dense = np.sort(dense.reshape(dense.shape[0], -1), 1)
            largest = np.abs(exact).max()
        else:
            largest = np.abs(exact).max(-1, keepdims=True) if exact.ndim > 1 else 0.0
        assert (np.abs(dense - exact) <= 1.01 * step * largest + 1e-9).all(), name


def test_blocks_are_ggmls(script: dict[str, Any]) -> None:
    w = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    w[0, :32] = 0
    for make, dense, steps in ((script["q8_0"], packed.q8_0, 127), (script["q4_0"], packed.q4_0, 8)):
        found = dense(make(w)).reshape(w.shape)
        largest = np.abs(w.reshape(-1, 32)).max(1).repeat(32).reshape(w.shape)
        assert (np.abs(found - w) <= largest / steps * (1.01 if steps == 8 else 0.51)).all()
        assert (found[0, :32] == 0).all()


def test_decode_beside_a_peer(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "rows.json"
    given = ("--decode", "--rounds", "1", "--config", shape, "--peer", peer(tmp_path, "json.dumps([{'avg_ts': 8.0}])"))
    code, out, _ = run(monkeypatch, *given, "--json", str(found))
    assert not code
    assert "decode, batch 1" in out
    rows = {(r["by"], r["file"]): r for r in map(json.loads, found.read_text().splitlines())}
    assert rows.keys() == {(side, kind) for side in ("jaxengine", "llama.cpp") for kind in ("F32", "Q8_0", "Q4_0")}
    ours = rows["jaxengine", "Q4_0"]
    assert ours["to_llama.cpp"] == pytest.approx(ours["tokens_per_s"] / 8)
    assert ours["to_float32"] == pytest.approx(ours["tokens_per_s"] / rows["jaxengine", "F32"]["tokens_per_s"])
    matrices = 96 * 64 + 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96  # all but the embedding
    assert ours["bytes_per_token"] == matrices * 4.5 / 8 + 3 * 64 * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--peer", "llama-bench"), "say --decode too"),
        (("--decode", "--peer", "/nowhere/llama-bench"), "is no program here: give the path of llama.cpp"),
    ],
)
def test_what_is_refused(given: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(monkeypatch, *given)
    assert code
    assert said in " ".join(err.replace("│", " ").split())


def test_a_peer_that_fails(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--decode", "--rounds", "1", "--config", shape, "--peer", peer(tmp_path, "sys.exit('no such device')"))
    code, _, err = run(monkeypatch, *given)
    assert code
    assert "no such device" in err


# ---- products


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_quant")


def test_matrices_exceed_four_times_the_cache(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's own, and that of the largest where it is not known."""
    assert max(c.l2 for c in cards.CARDS.values()) == bench.LARGEST_L2
    assert bench.distinct_bytes() == bench.CPU_BYTES
    monkeypatch.setattr(bench, "on_gpu", lambda: True)
    for name, l2 in (("NVIDIA H200", 50 << 20), ("NVIDIA B200", 253 << 19), ("NVIDIA Z9", 128 << 20)):
        monkeypatch.setattr(bench.jax, "devices", lambda name=name: [type("Device", (), {"device_kind": name})])
        assert bench.distinct_bytes() == 4 * l2
        made = bench.some(lambda seed: np.broadcast_to(np.uint8(seed % 256), (2**20,)))
        assert 4 * l2 < bench.size(made) <= 4 * l2 + 2**20
        assert made[3][0] == 3
    assert len(bench.some(lambda seed: np.broadcast_to(np.uint8(0), (2**30,)))) == 2  # at least


# what ends a process that compiles it, as LLVM does, and what waits for a barrier that nobody reaches
ENDS = [
    (
        subprocess.CompletedProcess([], -6, "", "compiling\nLLVM ERROR: Cannot select\n"),
        "ended .* with -6: LLVM ERROR: Cannot",
    ),
    (subprocess.CompletedProcess([], -11, "", ""), "ended .* with -11: nothing was said"),
    (subprocess.TimeoutExpired([], 9), "did not come back within 9 s"),
]


@pytest.mark.parametrize(("end", "said"), ENDS, ids=["aborts", "crashes", "hangs"])
def test_what_ends_its_process_is_a_row(end: Any, said: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: Any, **how: Any) -> Any:
        assert how["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(bench.subprocess, "run", run)
    told = bench.probe("mosaic_gpu", 9)
    assert re.search(said, told)
    row = {"what": "all", "shape": None, "rows": None, "implementation": "mosaic_gpu", "left_out": told}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bench.tabulated([], "here", [row]))
    assert re.search(rf"all .*mosaic_gpu .*{said}", console.export_text())


def test_what_comes_back_is_tried(bench: Any) -> None:
    """In a process of its own, where it refuses for want of a card: no reason to leave it out."""
    assert not bench.probe("mosaic_gpu")


def test_what_fails_is_a_row_and_what_refuses_is_not(bench: Any) -> None:
    names, kinds = ["nonesuch", "triton", "xla"], [bench.Kind.usual("int4")]
    [(_, row, found)] = bench.measured([(kinds, (2,))], [(128, 256)], 1, np.dtype(np.float32), 1.0, (), names, 0)
    assert set(found.left_out) == {"nonesuch", "triton"}
    assert set(found.absent()) == {"nonesuch"}
    assert "no implementation 'nonesuch'" in found.absent()["nonesuch"]
    assert (found.shape, found.M) == ((128, 256), 2)
    assert set(row["milliseconds"]) == {"xla"}
    wrong = found._replace(wrong={"xla": 3.0}).absent()
    assert wrong["xla"] == "other numbers than the reference's, by 3 of the bound"


def test_matrices_are_distinct_and_finite(bench: Any) -> None:
    usual = (bench.Kind.usual(n) for n in ("int8", "int5", "int2", "nf4", "mxfp4", "fp8", "fp8_block"))
    for kind in (*usual, bench.Kind("int4", 32, True)):
        a, b = (bench.matrix(kind, 128, 256, seed) for seed in (0, 1))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert not np.array_equal(np.asarray(x), np.asarray(y)), kind
        dense = bench.exact_matrix(a, kind)
        assert np.isfinite(dense).all(), kind
        assert len(np.unique(np.asarray(dense))) > 16, kind
        codes, scale, *zero = a
        how = {"kind": kind.kind, "group_size": kind.group_size}
        np.testing.assert_array_equal(dense, reference.dense(codes, scale, zero[0] if zero else None, **how))
        assert bool(zero) == kind.affine


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("M", [1, 16, 4096])
def test_dense_is_cublas_on_a_card(bench: Any, M: int) -> None:
    """What int4 is held against is the library's product, and not one that XLA writes itself."""
    like = jax.ShapeDtypeStruct
    given = like((M, 4096), jnp.bfloat16), like((4096, 4096), jnp.bfloat16)
    product = jax.jit(bench.functools.partial(bench.base.einsum, "bi,oi->bo"))
    with aot.target(aot.CARDS["H200"]) as target:
        text = target.compile(product, *target.place(given), **bench.CUBLAS).as_text()
    assert "__cublas$lt$matmul" in text
    assert "__triton" not in text


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_the_whole_matrix_is_written_out_once(bench: Any) -> None:
    """XLA's form that the issue names: beside the result one matrix in 16 bits."""
    N, K, kind = 4096, 4096, bench.Kind.usual("int4")
    with aot.target(aot.CARDS["H200"]) as target:
        x, *w = target.place(bench.abstract(kind, 16, N, K, jnp.bfloat16))
        compiled = target.compile(jax.jit(lambda x, *w: bench.whole(x, w, kind)), x, *w)
    assert 2 * N * K <= compiled.memory_analysis().temp_size_in_bytes < 2.2 * N * K


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_kernels_are_told_as_they_are_compiled(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both unpacks on one line each, a card a column; the file has what the table has."""
    monkeypatch.setattr(bench, "GENERATIONS", ("RTX 4090", "H200"))
    lines = list(bench.compiled_table([bench.Kind.usual("mxfp4")], [(1024, 1024)], [1]))
    out = capsys.readouterr().out.splitlines()
    assert [(c.implementation, c.card) for c in lines] == [
        (n, c) for n in ("triton", "triton_plain") for c in ("RTX 4090", "H200")
    ]
    assert out[2].endswith("| RTX 4090 | H200 |")
    for line, first in zip(out[-2:], (lines[0], lines[2]), strict=True):
        assert line.startswith(
            f"| mxfp4 | 1 | 1024x1024 | {first.implementation} | {first.registers}, {first.shared_memory}"
        )
    assert all(c.shared_memory <= c.limit and c.registers <= 255 for c in lines)
