"""GGUF files against what ggml's blocks mean (tests/oracles/packed.py) and against the same model as a plain folder.

Files are written here, byte by byte. What llama.cpp's converter does to q and k is done here with its own expression.

O outputs, I inputs.
"""

# ruff: noqa: E741

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracles import packed

import jaxengine
from checkpoints.errors import CheckpointError
from checkpoints.gguf import ROPE, Gguf, hugging_face_name
from checkpoints.safetensors import write_file
from jaxengine.architecture import architecture
from jaxengine.sources import open_source, read_config
from jaxengine.weights.base import Weight

U = 2.0**-24
ATOL = 2e-4
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
D, F, N, K, V, L = 256, 512, 4, 2, 48, 2
H = D // N
BLOCK = {"Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}
PLAIN = {"F32": (0, np.float32), "F16": (1, np.float16)}
DENSE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": packed.q4_0, "Q8_0": packed.q8_0, "Q4_K": packed.q4_k, "Q6_K": packed.q6_k,
}  # fmt: skip
FORMAT = {
    "Q4_0": "int4:group_size=32,scale=float16", "Q8_0": "int8:group_size=32",
    "Q4_K": "kquant", "Q6_K": "kquant:bits=6",
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "general.architecture": "llama", "general.name": "tiny", "llama.block_count": L, "llama.context_length": 64,
    "llama.embedding_length": D, "llama.feed_forward_length": F, "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": H, "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
THEIRS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]  # {name: (type, dims, bytes)}


# --- writing -----------------------------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(given: Any) -> bytes:
    if isinstance(given, str):
        return struct.pack("<I", 8) + string(given)
    if isinstance(given, list):
        return struct.pack("<IIQ", 9, 8, len(given)) + b"".join(map(string, given))
    return struct.pack("<If", 6, given) if isinstance(given, float) else struct.pack("<II", 4, given)


def gguf(path: Path, fields: Mapping[str, Any], tensors: Tensors, version: int = 3) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(string(k) + value(v) for k, v in fields.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += raw
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def blocks(rng: np.random.Generator, kind: str, O: int, I: int) -> np.ndarray:
    """Random blocks of numbers of order 0.05, uint8 [O * I / inputs, bytes]."""
    _, inputs, nbytes = BLOCK[kind]
    raw = rng.integers(0, 256, (O * I // inputs, nbytes), np.uint8)

    def put(at: int, size: float) -> None:
        raw[:, at : at + 2] = (rng.uniform(0.5, 1.5, (len(raw), 1)) * size).astype(np.float16).view(np.uint8)

    put({"Q6_K": 208}.get(kind, 0), {"Q4_0": 0.012, "Q8_0": 0.0007, "Q4_K": 0.0005, "Q6_K": 0.00005}[kind])
    if kind == "Q4_K":
        put(2, 0.003)
        raw[0, 4:8] = raw[0, 12:16] = 0  # eight scales of zero: only minima are left
    return raw


def model(
    kind: str, seed: int = 0, head: bool = True, layers: int = L, other: Mapping[str, str] | None = None
) -> tuple[Tensors, dict[str, np.ndarray], dict[str, Any]]:
    """(GGUF's tensors, the plain folder's, its config) of a random llama with matrices of this kind; other: {tensor: kind}."""
    usual = kind
    raw = {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers,
        "num_attention_heads": N, "num_key_value_heads": K, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "dtype": "float32", "tie_word_embeddings": not head,
    }  # fmt: skip
    arch, rng = architecture(raw), np.random.default_rng(seed)
    theirs: Tensors = {}
    plain: dict[str, np.ndarray] = {}
    outer = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    for name, shape in arch.name_table().theirs(arch.params(), layers).items():
        if name in outer:
            stem = outer[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            stem = f"blk.{layer}.{THEIRS[rest.removesuffix('.weight')]}"
        heads = {"attn_q": N, "attn_k": K}.get(stem.rpartition(".")[2])
        kind = (other or {}).get(stem, usual)
        if len(shape) == 1 or kind in PLAIN:
            number, dtype = PLAIN["F32" if len(shape) == 1 else kind]
            drawn = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape).astype(dtype)
            bytes_of, dense = drawn, drawn.astype(np.float32)
        else:
            number = BLOCK[kind][0]
            bytes_of = blocks(rng, kind, *shape)
            dense = DENSE[kind](bytes_of).reshape(shape)
        if (
            heads
        ):  # what is in the file is the converter's permutation of what the folder has; so undo it on the folder's
            h = dense.reshape(heads, shape[0] // heads // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
            again = h.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)
            np.testing.assert_array_equal(again, dense)  # llama.cpp's `permute`
            dense = h
        theirs[f"{stem}.weight"] = (number, shape, bytes_of.tobytes())
        plain[name] = dense.astype(np.float32)
    return theirs, plain, raw


def plain_folder(folder: Path, tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(folder / "model.safetensors", described, lambda n: tensors[n], {"format": "pt"})
    return folder


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCK)
def test_blocks_mean_what_ggml_means(kind: str, tmp_path: Path) -> None:
    tensors, plain, raw = model(kind)
    gguf(tmp_path / "g" / "tiny.gguf", FIELDS, tensors, version=2 if kind == "Q8_0" else 3)
    arch = architecture(read_config(tmp_path / "g"))
    with (
        open_source(tmp_path / "g", arch) as source,
        open_source(plain_folder(tmp_path / "p", plain, raw), arch) as dense,
    ):
        assert source.plan is not None
        assert source.plan.weights == FORMAT[kind]
        assert dict(source.plan.weight_rules) == dict.fromkeys(("embedding", "lm_head"), FORMAT[kind])
        for name, spec in arch.specs().items():
            leaf, exact = source.read(name), dense.read(name).astype(np.float64)
            assert isinstance(leaf, Weight) == (spec.out is not None)
            found = np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf, np.float64)
            # of K types s z is the minimum to one rounding more
            assert (np.abs(found - exact) <= 16 * U * np.abs(exact).max()).all(), name


# what `llama-quantize` gives more bits in Q4_K_M: the first and last eighth of the layers, and of the others each third
MORE_BITS = {f"blk.{i}.{n}": "Q6_K" for i in (0, 3, 6, 7) for n in ("attn_v", "ffn_down")} | {"output": "Q6_K"}


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file as Q4_K_M makes it, of 8 layers, and the logits of the same numbers as a plain folder."""
    folder = tmp_path_factory.mktemp("mixed")
    tensors, plain, raw = model("Q4_K", layers=8, other=MORE_BITS)
    path = gguf(folder / "g" / "m.gguf", FIELDS | {"llama.block_count": 8}, tensors)
    expected = jaxengine.load(plain_folder(folder / "p", plain, raw), form="scan").logits(TOKENS)
    assert np.abs(expected).max() > 0.1
    return path, expected


@pytest.mark.parametrize(
    "given",
    [
        {}, {"form": "scan"}, {"home": "host"}, {"home": "host", "form": "ahead"}, {"home": "split", "resident": 2},
        {"home": "disk", "resident": 1, "kept": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.some_rows
def test_types_that_differ_over_layers(given: dict[str, Any], q4_k_m: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, expected = q4_k_m
    disk = {"disk": tmp_path} if given.get("home") == "disk" else {}
    ours = jaxengine.load(path, dtype="float32", **given, **disk)
    held = {n: ours.plan.format_of(n, s) for n, s in ours.architecture.specs().items() if s.out is not None}
    six, four = FORMAT["Q6_K"], FORMAT["Q4_K"]
    assert [held[f"layers.{i}.down"] for i in range(8)] == [six, four, four, six, four, four, six, six]
    assert {held[f"layers.{i}.up"] for i in range(8)} == {four}
    assert (held["lm_head"], held["embedding"]) == (six, four)
    np.testing.assert_allclose(ours.logits(TOKENS), expected, atol=ATOL, rtol=0)


def test_stacks_of_layers_of_several_types(q4_k_m: tuple[Path, np.ndarray]) -> None:
    """Nothing is brought to another type: layers 0 to 5 are twice a period of three, and the last two are alike."""
    ours = jaxengine.load(q4_k_m[0], dtype="float32", home="host")
    assert [(len(b.kinds), b.repeats, b.form) for b in ours.params["banks"]] == [(3, 2, "scan"), (1, 2, "scan")]
    [first, last] = ours.params["banks"]
    assert [w["down"].bits for w in first.weights] == [6, 4, 4]
    assert {w["up"].bits for w in first.weights} == {4}
    assert last.weights[0]["down"].codes.shape == (2, D, F)
    stored = sum(x.nbytes for x in jax.tree.leaves(ours.params["banks"]))
    # 4 and 8 bits of codes, two bytes for each 32 inputs and one for each 16, two float16 for each 256 and one
    q6 = 4 * (D * F + D * D // 2)
    matrices = 8 * (2 * D * D + 2 * D * D // 2 + 3 * D * F)
    assert 8 * stored == 4.625 * (matrices - q6) + 8.5625 * q6 + 8 * 8 * 2 * D * 4


def test_types_that_differ_go_through_orbax_and_out_as_plain_weights(
    q4_k_m: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    path, expected = q4_k_m
    ours = jaxengine.load(path, dtype="float32", home="host")
    ours.save(tmp_path / "orbax", format="orbax")
    again = jaxengine.load(tmp_path / "orbax", home="host")
    assert again.plan.weight_rules == ours.plan.weight_rules
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    again.save(tmp_path / "hf")
    dense = jaxengine.load(tmp_path / "hf", form="scan", dtype="float32").logits(TOKENS)
    np.testing.assert_allclose(dense, expected, atol=ATOL, rtol=0)


def test_a_budget_over_layers_of_several_types(q4_k_m: tuple[Path, np.ndarray]) -> None:
    """What fits stands on the device, and the greedy tokens are those of any other home."""
    path, _ = q4_k_m
    ours = jaxengine.load(path, dtype="float32", memory="4MB", context=32)
    assert ours.plan.home in ("split", "host")
    whole = jaxengine.load(path, dtype="float32")
    a, b = (m.generate([TOKENS], max_new_tokens=4) for m in (ours, whole))
    assert a == b


# --- host memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import jax, jaxengine

def kilobytes(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

jaxengine.load(sys.argv[1])  # imports, backend, and the compiler's own memory are there before we measure
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
model = jaxengine.load(sys.argv[2])
each = [x.nbytes for x in jax.tree.leaves(model.params)]
largest = sum(x.nbytes for x in jax.tree.leaves(model.params["outer"]["embedding"]))
print(json.dumps({"peak": 1024 * (kilobytes("VmHWM") - before), "placed": sum(each), "largest": largest}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_host_memory_while_loading(tmp_path: Path) -> None:
    """At most the placed parameters and the largest of them once more, in a process of its own; codes that are unpacked all
    at once, and what is made of them on the way, are some five times as many bytes as it (290 MiB of 48)."""
    tensors, _, _ = model("Q4_K", layers=1)
    small = gguf(tmp_path / "small.gguf", FIELDS | {"llama.block_count": 1}, tensors)
    rows = 2**18
    each = blocks(np.random.default_rng(0), "Q4_K", 2**12, D).tobytes()
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = (BLOCK["Q4_K"][0], (rows, D), each * (rows // 2**12))
    large = gguf(tmp_path / "large.gguf", FIELDS | {"llama.block_count": 1}, tensors)
    flags = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")  # memory as users have it
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["largest"] == rows * D * 4.625 / 8
    assert found["peak"] <= found["placed"] + 2 * found["largest"], found


@pytest.mark.parametrize("kind", ["Q4_K", "F32"])
def test_the_logits_are_the_plain_folders(kind: str, tmp_path: Path) -> None:
    tensors, plain, raw = model(kind, head=kind == "F32")
    gguf(tmp_path / "g" / "tiny.gguf", FIELDS, tensors)
    expected = jaxengine.load(plain_folder(tmp_path / "p", plain, raw), form="scan").logits(TOKENS)
    assert np.abs(expected).max() > 0.1
    ours = jaxengine.load(tmp_path / "g", form="scan", dtype="float32")
    np.testing.assert_allclose(ours.logits(TOKENS), expected, atol=ATOL, rtol=0)
    ours.save(tmp_path / "hf")
    assert read_config(tmp_path / "hf")["tie_word_embeddings"] == (kind != "F32")
    again = jaxengine.load(tmp_path / "hf", form="scan", dtype="float32").logits(TOKENS)
    np.testing.assert_allclose(again, expected, atol=ATOL, rtol=0)


def test_the_config_of_the_entries(tmp_path: Path) -> None:
    tensors, _, raw = model("F16")
    gguf(tmp_path / "m" / "a.gguf", FIELDS, tensors)
    found = read_config(tmp_path / "m")
    assert found == raw | {
        "dtype": "float16", "head_dim": H, "eos_token_id": 2, "rope_theta": 10000.0,
        "rms_norm_eps": struct.unpack("<f", struct.pack("<f", 1e-5))[0],
    }  # fmt: skip
    assert architecture(found).config == architecture(raw | {"rms_norm_eps": found["rms_norm_eps"]}).config


def test_llama_3_1_s_rope_is_known_by_what_it_divides_by(tmp_path: Path) -> None:
    """transformers' formula: wavelengths above 8192 / 1 are stretched by the factor, those below 8192 / 4 are not."""
    tensors, _, _ = model("F16")
    theta, factors = 500000.0, []
    for i in range(0, H, 2):
        wave = 2 * np.pi * theta ** (i / H)
        smooth = (8192 / wave - 1) / 3
        factors.append(1.0 if wave < 2048 else 8.0 if wave > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    tensors[ROPE] = (0, (H // 2,), np.float32(factors).tobytes())
    fields = FIELDS | {"llama.rope.freq_base": theta}
    gguf(tmp_path / "m" / "a.gguf", fields, tensors)
    assert read_config(tmp_path / "m")["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tensors[ROPE] = (0, (H // 2,), np.linspace(1, 8, H // 2, dtype=np.float32).tobytes())
    gguf(tmp_path / "m" / "a.gguf", fields, tensors)
    with pytest.raises(CheckpointError, match="not as Llama 3"):
        read_config(tmp_path / "m")


def test_names() -> None:
    assert hugging_face_name("blk.11.attn_q.bias") == "model.layers.11.self_attn.q_proj.bias"
    assert hugging_face_name("output.weight") == "lm_head.weight"
    assert hugging_face_name("blk.0.ssm_a") == "blk.0.ssm_a"


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "change", "said"),
    [
        ({"general.architecture": "mamba"}, None, "general.architecture is 'mamba'; of GGUF files are read llama, qwen2"),
        ({"llama.block_count": None}, None, r"has no llama\.block_count"),
        ({"llama.rope.scaling.type": "longrope"}, None, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.dimension_count": 32}, None, "rope turns 32 of 64 numbers of a head"),
        ({"split.count": 3}, None, "one of 3 parts; merge them first"),
        ({}, lambda t: t.update({"output.weight": (17, (V, D), b"")}), "is of type IQ2_XS; read are F32, F16, Q4_0"),
        ({}, lambda t: t.pop("token_embd.weight"), r"has no token_embd\.weight"),
        ({}, lambda t: t.pop("blk.1.ffn_up.weight"), r"(?s)Missing \(1\).*up_proj"),
        ({}, lambda t: t.update({"blk.1.extra.weight": t["output_norm.weight"]}), r"(?s)Unexpected \(1\).*extra"),
        ({"llama.feed_forward_length": 768}, None, r"down_proj\.weight is \[256, 512\] in Q4_0; the model needs \[256, 768\]"),
    ],
)  # fmt: skip
def test_files_that_are_not_read(
    fields: dict[str, Any], change: Callable[[Tensors], object] | None, said: str, tmp_path: Path
) -> None:
    tensors, _, _ = model("Q4_0")
    if change is not None:
        change(tensors)
    given = {k: v for k, v in (FIELDS | fields).items() if v is not None}
    gguf(tmp_path / "m" / "a.gguf", given, tensors)
    with pytest.raises(CheckpointError, match=said):
        jaxengine.load(tmp_path / "m")


def test_a_file_that_is_cut_after_opening(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m" / "a.gguf", FIELDS, model("Q4_0")[0])
    with Gguf(path) as file:
        last = max(file.names, key=lambda name: file.info(name).start)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=f"ended inside '{last}': it became shorter") as refused:
            file.read(last)
    assert str(refused.value).startswith(f"{path} ")
    assert "\n" not in str(refused.value)


def test_damage(tmp_path: Path) -> None:
    tensors, _, _ = model("Q4_0")
    path = gguf(tmp_path / "m" / "a.gguf", FIELDS, tensors)
    whole = path.read_bytes()
    for cut, said in (
        (len(whole) - 100, "it is cut off"),
        (200, "ends inside its header"),
        (10, "fewer than 24 bytes"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=said):
            Gguf(path)
    for at, byte, said in (
        (0, b"X", "begins with"),
        (4, b"\1", "GGUF version 1"),
        (15, b"\xff", "tensors: it is damaged"),
    ):
        path.write_bytes(whole[:at] + byte + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=said):
            Gguf(path)
    path.write_bytes(whole)
    (tmp_path / "m" / "b.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"(?s)no config\.json and 2 GGUF files.*a\.gguf.*b\.gguf"):
        jaxengine.load(tmp_path / "m")
