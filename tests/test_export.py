"""What goes in comes out: tied heads that are written out too, mixed dtypes through orbax, and how files are split.

The oracle of every export here is the folder that it was made from, byte for byte.
"""

from __future__ import annotations

import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import jaxengine
from checkpoints import orbax
from checkpoints.errors import CheckpointError
from checkpoints.orbax import OrbaxReader
from checkpoints.safetensors import Reader, write_file
from jaxengine import formats, sources, technique
from jaxengine.architecture import architecture
from jaxengine.command import app
from jaxengine.export import convert, loses
from jaxengine.placement import stored
from jaxengine.weights.base import Weight

GOLDEN = Path(__file__).parent / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
# families whose head is tied, and what their embedding is called
TIED = {
    "gemma2": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt_350m_like": "model.decoder.embed_tokens.weight",
    "llama_tied_f16": "model.embed_tokens.weight",
}
HEAD = "lm_head.weight"
IDS = [3, 1, 4, 1, 5]

Change = Callable[[dict[str, np.ndarray]], None]


def folder_of(case: str, to: Path, change: Change | None = None, **config: object) -> Path:
    """A golden folder of one file with its tensors and its config changed."""
    shutil.copytree(GOLDEN / case, to, ignore=shutil.ignore_patterns("golden.npz"))
    if config:
        raw = json.loads((to / "config.json").read_text()) | config
        (to / "config.json").write_text(json.dumps(raw))
    if change is not None:
        with Reader.open(to) as reader:
            tensors = {n: reader.read(n) for n in reader.names}
        change(tensors)
        (to / "model.safetensors").unlink()
        described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
        write_file(to / "model.safetensors", described, lambda n: tensors[n], {"format": "pt"})
    return to


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "golden.npz"}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with Reader.open(folder) as reader:
        return {n: reader.read(n) for n in reader.names}


# --- tied heads that are in the file too -----------------------------------------------------------------------------


def same_head(embedding: str) -> Change:
    return lambda t: t.update({HEAD: t[embedding].copy()})


def other_head(embedding: str, row: int = 3) -> Change:
    def change(t: dict[str, np.ndarray]) -> None:
        t[HEAD] = t[embedding].copy()
        t[HEAD][row, -1] += t[HEAD].dtype.type(0.5)

    return change


@pytest.mark.parametrize("case", TIED)
def test_a_head_equal_to_the_embedding_is_tied_and_written_again(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder_of(case, tmp_path / "in", same_head(TIED[case]))
    model = jaxengine.load(source)
    assert model.config.tie_word_embeddings
    assert "lm_head" not in model.params["outer"]
    model.save(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(source)
    convert(source, tmp_path / "converted", to="hf")
    assert files(tmp_path / "converted") == files(source)
    # in several files, and from those again
    convert(source, tmp_path / "small", to="hf", max_shard_bytes=60_000)
    assert HEAD in json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    convert(tmp_path / "small", tmp_path / "again", to="hf")
    assert files(tmp_path / "again") == files(tmp_path / "small")
    convert(source, tmp_path / "cast", to="hf", dtype="bfloat16")
    cast = tensors_of(tmp_path / "cast")
    assert cast[HEAD].dtype == BF16
    np.testing.assert_array_equal(cast[HEAD], cast[TIED[case]])
    assert caplog.records == []


@pytest.mark.parametrize("case", TIED)
@pytest.mark.some_rows
def test_a_head_that_differs_is_loaded_untied(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_of(case, tmp_path / "in", other_head(TIED[case]))
    truth = folder_of(case, tmp_path / "truth", other_head(TIED[case]), tie_word_embeddings=False)
    model = jaxengine.load(source)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert f"{HEAD} is there and differs from {TIED[case]}" in caplog.text
    assert not model.config.tie_word_embeddings
    logits = model.logits(IDS)
    np.testing.assert_array_equal(logits, jaxengine.load(truth).logits(IDS))
    assert np.abs(logits - jaxengine.load(GOLDEN / case).logits(IDS)).max() > 1e-3
    model.save(tmp_path / "saved")
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    expected = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    caplog.clear()
    for made in ("saved", "back"):
        assert (tmp_path / made / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / made / "config.json").read_text()) == expected
    for made in ("saved", "orbax"):
        assert not jaxengine.load(tmp_path / made).config.tie_word_embeddings
    assert caplog.records == []  # config.json says so now


def test_a_head_of_another_shape_or_dtype(tmp_path: Path) -> None:
    embedding = TIED["gemma2"]
    with pytest.raises(CheckpointError, match=r"(?s)Of another shape.*lm_head\.weight"):
        jaxengine.load(folder_of("gemma2", tmp_path / "shape", lambda t: t.update({HEAD: t[embedding][:-1]})))

    def narrow(t: dict[str, np.ndarray]) -> None:
        t[HEAD] = t[embedding].astype(BF16)

    source = folder_of("gemma2", tmp_path / "dtype", narrow)
    assert not jaxengine.load(source).config.tie_word_embeddings
    convert(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("piece", [1, 100, 2**22])
def test_every_byte_counts(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors in pieces of one row, of a few with a rest, or at once; NaN is itself, and -0.0 is not 0.0."""
    monkeypatch.setattr(sources, "PIECE", piece)
    a = np.random.default_rng(0).standard_normal((23, 7)).astype(np.float32)
    a[5, 2] = np.nan
    a[6, 3] = 0.0
    tensors = {"a": a, "same": a.copy(), "none": a[:0], "no": a[:0].copy(), "one": a[0, 0], "uno": a[0, 0].copy()}
    for name, place, value in (("first", (0, 0), 9.0), ("last", (22, 6), 9.0), ("zero", (6, 3), -0.0)):
        tensors[name] = a.copy()
        tensors[name][place] = value
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(tmp_path / "x.safetensors", described, lambda n: np.asarray(tensors[n]))
    with Reader.open(tmp_path / "x.safetensors") as reader:
        for name, same in (("same", True), ("first", False), ("last", False), ("zero", False), ("none", False)):
            assert sources.same_bytes(reader, "a", name) == same, name
        assert sources.same_bytes(reader, "none", "no")
        assert sources.same_bytes(reader, "one", "uno")
        assert not sources.same_bytes(reader, "one", "a")


@pytest.mark.parametrize("row", [None, -1], ids=["same", "other"])
def test_a_head_is_compared_in_pieces(row: int | None, tmp_path: Path) -> None:
    """Opening a source holds two pieces and where they differ, where the head and the embedding have 32 MiB each."""
    raw = {
        "model_type": "llama", "vocab_size": 32768, "hidden_size": 256, "intermediate_size": 16, "dtype": "float32",
        "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    arch = architecture(raw)
    shapes = arch.name_table().theirs(arch.params(), 1)
    shapes[HEAD] = shapes["model.embed_tokens.weight"]

    def read(name: str) -> np.ndarray:
        x = np.ones(shapes[name], np.float32)
        if name == HEAD and row is not None:
            x[row] = 2
        return x

    write_file(tmp_path / "model.safetensors", {n: (np.dtype(np.float32), s) for n, s in shapes.items()}, read)
    tracemalloc.start()
    try:
        with sources.open_source(tmp_path, arch) as source:
            _, peak = tracemalloc.get_traced_memory()
            assert source.architecture.config.tie_word_embeddings == (row is None)
    finally:
        tracemalloc.stop()
    assert 2 * sources.PIECE < peak < 4 * sources.PIECE


# --- each parameter's own dtype --------------------------------------------------------------------------------------


def wide_vectors(t: dict[str, np.ndarray]) -> None:
    """bfloat16 matrices beside float32 norms and biases that bfloat16 cannot hold."""
    for name, x in t.items():
        t[name] = x.astype(BF16) if x.ndim > 1 else x * np.float32(1 + 2**-12)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_mixed_dtypes_go_through_orbax_unchanged(case: str, tmp_path: Path) -> None:
    source = folder_of(case, tmp_path / "in", wide_vectors, dtype="bfloat16")
    convert(source, tmp_path / "orbax", to="orbax")
    with OrbaxReader.open(tmp_path / "orbax" / "orbax") as reader:
        dtypes = {n: reader.info(n).dtype for n in reader.names}
    assert dtypes["final_norm"] == np.float32
    assert dtypes["layers.q"] == BF16
    convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    assert files(tmp_path / "back") == files(source)
    # cast where it is loaded, as from the source itself
    direct, again = jaxengine.load(source), jaxengine.load(tmp_path / "orbax")
    assert again.plan == direct.plan
    assert again.plan.dtype == "bfloat16"
    there = stored(again.architecture, again.plan, again.params)
    for name, fetch in stored(direct.architecture, direct.plan, direct.params).items():
        assert fetch().dtype == BF16
        np.testing.assert_array_equal(fetch(), there[name](), err_msg=name)
    wide = jaxengine.load(tmp_path / "orbax", dtype="float32", home="host")
    np.testing.assert_array_equal(wide.logits(IDS), jaxengine.load(source, dtype="float32", home="host").logits(IDS))


def test_orbax_casts_where_it_is_told(tmp_path: Path) -> None:
    source = folder_of("llama", tmp_path / "in", wide_vectors, dtype="bfloat16")
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "cast", to="orbax", dtype="bfloat16")
    convert(tmp_path / "orbax", tmp_path / "wide", to="orbax", dtype="float32")
    for made, dtype in (("cast", BF16), ("wide", np.dtype(np.float32))):
        with OrbaxReader.open(tmp_path / made / "orbax") as reader:
            assert {reader.info(n).dtype for n in reader.names} == {dtype}
        assert jaxengine.load(tmp_path / made).plan.dtype == dtype.name
        assert json.loads((tmp_path / made / "config.json").read_text())["dtype"] == dtype.name
    jaxengine.load(source, weights="int8").save(tmp_path / "int8", format="orbax")
    with pytest.raises(ValueError, match="holds weights of a plan in bfloat16"):
        convert(tmp_path / "int8", tmp_path / "no", to="orbax", dtype="float32")
    convert(tmp_path / "int8", tmp_path / "int8 again", to="orbax")
    assert jaxengine.load(tmp_path / "int8 again").plan.weights == "int8"


# one a file of jaxengine/weights, with options where they change what is stored
ENCODED = [n for n in technique.names("jaxengine.weights") if n != "dense"]
ENCODED += ["int4:group_size=16,affine=true,act_order=true", "int8:outliers=8"]


@pytest.mark.parametrize("text", ENCODED)
@pytest.mark.some_rows
def test_orbax_in_a_format_has_the_codes_of_load(text: str, tmp_path: Path) -> None:
    """convert encodes what it reads as `load` does, bit for bit; what it wrote is loaded so, and converted once more."""
    made, how = tmp_path / "made", {"weights": text, "dtype": "bfloat16"}
    convert(GOLDEN / "llama", made, to="orbax", **how)
    direct, again = jaxengine.load(GOLDEN / "llama", **how), jaxengine.load(made)
    assert (again.plan.weights, again.plan.dtype) == (str(formats.find(text)), "bfloat16")
    there, coded = stored(again.architecture, again.plan, again.params), 0
    for name, fetch in stored(direct.architecture, direct.plan, direct.params).items():
        one, other = fetch(), there[name]()
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
        coded += isinstance(one, Weight)
    assert coded >= 4 * direct.architecture.num_layers
    convert(made, tmp_path / "twice", to="orbax")
    with OrbaxReader.open(made / "orbax") as one, OrbaxReader.open(tmp_path / "twice" / "orbax") as other:
        assert set(one.names) == set(other.names)
        for name in one.names:
            assert one.read(name).tobytes() == other.read(name).tobytes(), name


def test_orbax_in_a_format_keeps_what_it_does_not_encode(tmp_path: Path) -> None:
    """Beside codes under a plan in bfloat16, vectors in float32 that bfloat16 cannot hold are as they were."""
    source = folder_of("llama", tmp_path / "in", wide_vectors, dtype="bfloat16")
    convert(source, tmp_path / "orbax", to="orbax", weights="int8")
    with Reader.open(source) as plain, OrbaxReader.open(tmp_path / "orbax" / "orbax") as reader:
        assert reader.info("layers.q.codes").dtype == np.int8
        exact = plain.read("model.norm.weight")
        assert (exact.astype(BF16) != exact).any()
        np.testing.assert_array_equal(reader.read("final_norm"), exact)


@pytest.mark.parametrize(
    ("to", "words", "said"),
    [
        ("hf", {"weights": "nf4"}, "to='orbax' or to='compressed-tensors'"),
        ("orbax", {"weights": "nf5"}, "There is no 'nf5'"),
        ("orbax", {"weights": "nf4:size=32"}, "nf4 has no option 'size'"),
        ("orbax", {"weights": "lossless", "dtype": "float16"}, "for .*it is float32, and lossless holds bfloat16"),
    ],
)
def test_a_format_that_cannot_be_is_refused_before_anything_is_written(
    to: str, words: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: object, **__: object) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr(orbax, "_save_tree", written)
    with pytest.raises(ValueError, match=said):
        convert(GOLDEN / "llama", tmp_path / "out", to=to, **words)
    assert not list(tmp_path.iterdir())


def test_codes_are_not_encoded_anew(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["convert", "demo", str(tmp_path / "nf4"), "--to", "orbax", "--weights", "nf4"])
    assert (made.exit_code, made.stdout) == (0, f"wrote {tmp_path / 'nf4'}\n"), made.output
    again = ["convert", str(tmp_path / "nf4"), str(tmp_path / "int8"), "--to", "orbax", "--weights", "int8"]
    refused = CliRunner().invoke(app, again)
    assert refused.exit_code == 2
    assert "the source's weights are 'nf4' already, and weights='int8': leave weights out" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["nf4"]


def test_layers_of_different_dtypes_are_not_stacked(tmp_path: Path) -> None:
    def one_wide_layer(t: dict[str, np.ndarray]) -> None:
        for name, x in t.items():
            t[name] = x.astype(np.float32 if name.startswith("model.layers.1.input") else BF16)

    source = folder_of("llama", tmp_path / "in", one_wide_layer, dtype="bfloat16")
    with pytest.raises(ValueError, match="layers are stacked") as refused:
        convert(source, tmp_path / "out", to="orbax")
    said = str(refused.value)
    assert "dtype='float32'" in said
    assert "layers.input_norm is bfloat16 in layer 0 and float32 in layer 1" in said
    assert "final_norm" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    convert(source, tmp_path / "hf", to="hf")
    assert files(tmp_path / "hf") == files(source)
    convert(source, tmp_path / "out", to="orbax", dtype="float32")
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    back = tensors_of(tmp_path / "back")
    for name, x in tensors_of(source).items():
        np.testing.assert_array_equal(back[name], x.astype(np.float32), err_msg=name)


def test_a_save_that_has_lost_digits_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_of("llama", tmp_path / "in", wide_vectors, dtype="bfloat16")
    model = jaxengine.load(source)
    choices: list[dict[str, Any]] = [{}, {"format": "orbax"}, {"dtype": "float32"}]
    for i, choice in enumerate(choices):
        caplog.clear()
        model.save(tmp_path / f"saved {i}", **choice)
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert "5 of 21 parameters were cast to bfloat16" in caplog.text
        assert "final_norm from float32" in caplog.text
        assert "convert" in caplog.text
    caplog.clear()
    jaxengine.load(source, dtype="float32").save(tmp_path / "wide")
    jaxengine.load(source, dtype="float32").save(tmp_path / "narrowed here", dtype="bfloat16")
    jaxengine.load(GOLDEN / "qwen2").save(tmp_path / "as it was")
    assert caplog.records == []
    with pytest.raises(ValueError, match="save"):
        model.save(tmp_path / "saved 0", format="gguf")
    with pytest.raises(CheckpointError, match="not empty"):
        model.save(tmp_path / "saved 0")
    assert caplog.records == []  # nothing is said of what is not written


def test_which_casts_lose() -> None:
    """Held against every number of the narrow dtypes."""
    for one in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        size = np.dtype(one).itemsize
        every = np.arange(256**size, dtype=f"uint{8 * size}").view(one).astype(np.float32)
        every = every[np.isfinite(every)]
        for other in ("float32", "float16", "bfloat16"):
            with np.errstate(over="ignore"):
                kept = np.array_equal(every.astype(other).astype(np.float32), every)
            assert loses(one, other) == (not kept), (one, other)
    assert loses("float32", "bfloat16")
    assert loses("float64", "float32")
    assert not loses("float32", "float32")


def test_a_config_that_names_no_dtype_stays_as_it_is(tmp_path: Path) -> None:
    source = folder_of("gpt2", tmp_path / "in")
    raw = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if k != "dtype"}
    (source / "config.json").write_text(json.dumps(raw))
    jaxengine.load(source).save(tmp_path / "saved")
    convert(source, tmp_path / "converted", to="hf")
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    for made in ("saved", "converted", "back"):
        assert files(tmp_path / made) == files(source)
    convert(source, tmp_path / "cast", to="hf", dtype="float16")
    assert json.loads((tmp_path / "cast" / "config.json").read_text()) == raw | {"dtype": "float16"}


# --- files -----------------------------------------------------------------------------------------------------------


def save(source: Path, target: Path, size: int | None) -> None:
    jaxengine.load(source).save(target, max_shard_bytes=size)


def convert_hf(source: Path, target: Path, size: int | None) -> None:
    convert(source, target, to="hf", max_shard_bytes=size)


@pytest.mark.parametrize("write", [save, convert_hf])
def test_files_are_split_as_the_source_or_as_told(write: Callable[..., None], tmp_path: Path) -> None:
    source = GOLDEN / "llama_sharded"
    write(source, tmp_path / "same", None)
    assert files(tmp_path / "same") == files(source)
    tensors = tensors_of(source)
    write(source, tmp_path / "small", 40_000)
    names = sorted(p.name for p in (tmp_path / "small").glob("*.safetensors"))
    assert len(names) > len(list(source.glob("*.safetensors")))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    for name in names:
        with Reader.open(tmp_path / "small" / name) as reader:
            assert sum(reader.info(n).nbytes for n in reader.names) <= 40_000
    write(source, tmp_path / "one", 10**9)
    assert sorted(p.name for p in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    for made in ("small", "one"):
        found = tensors_of(tmp_path / made)
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_array_equal(found[name], x)


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    model = jaxengine.load(GOLDEN / "llama")
    for size in (0, -1):
        with pytest.raises(ValueError, match="max_shard_bytes"):
            convert(GOLDEN / "llama", tmp_path / "out", to="hf", max_shard_bytes=size)
        with pytest.raises(ValueError, match="max_shard_bytes"):
            model.save(tmp_path / "out", max_shard_bytes=size)
    with pytest.raises(ValueError, match="max_shard_bytes goes with"):
        convert(GOLDEN / "llama", tmp_path / "out", to="orbax", max_shard_bytes=10**9)
    with pytest.raises(ValueError, match="max_shard_bytes goes with"):
        model.save(tmp_path / "out", format="orbax", max_shard_bytes=10**9)
    assert list(tmp_path.iterdir()) == []


def test_the_split_is_kept_where_old_buffers_are_left_out(tmp_path: Path) -> None:
    """Checkpoints of older versions carry each layer's rope frequencies, which are computed and not read."""
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "llama_sharded", source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first = min(index["weight_map"].values())
    tensors = tensors_of(source / first) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.asarray(jnp.ones(8, jnp.float32))
    }
    (source / first).unlink()
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(source / first, described, lambda n: tensors[n], {"format": "pt"})
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = first
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out", to="hf")
    written, expected = files(tmp_path / "out"), files(GOLDEN / "llama_sharded")
    assert written == expected
