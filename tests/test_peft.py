"""checkpoints.peft without peft: its own files and logits (tests/golden_adapters), the rules of fused modules, refusals.

The golden adapters were made and run by peft (tests/test_live_peft.py). Here they are read, applied to the base model's
weights by the papers' formulas in float64, and run by jaxengine in float32: 2e-4 as in test_models.py.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.adapters import adapted, all_adapted
from oracles.golden import GOLDEN, golden

import jaxengine
from checkpoints import CheckpointError
from checkpoints.peft import CONFIG, TENSORS, Adapter, AdapterConfig, read_adapter, uniform, write_adapter
from checkpoints.safetensors import Reader, write_file
from checkpoints.table import Param, Row, Table
from jaxengine.architecture import Architecture, architecture
from jaxengine.sources import open_source, read_config

ADAPTERS = GOLDEN.parent / "golden_adapters"
CASES = sorted(folder.name for folder in ADAPTERS.iterdir())
ATOL = 2e-4


def base_of(case: str) -> tuple[Architecture, dict[str, np.ndarray]]:
    folder = GOLDEN / case.partition("_")[0]
    with open_source(folder, architecture(read_config(folder))) as source:
        return source.architecture, {n: source.read(n) for n in source.architecture.params()}


def write_model(folder: Path, model: Architecture, values: dict[str, Any], config: Path) -> None:
    table, params = model.name_table(), model.params()
    values = {n: x.astype(np.float32) for n, x in values.items()}
    made = {n: table.assemble(n, values.__getitem__, params) for n in table.theirs(params, model.num_layers)}
    shutil.copy(config, folder / "config.json")
    write_file(folder / "model.safetensors", {n: (x.dtype, x.shape) for n, x in made.items()}, made.__getitem__)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_pefts_own_adapters(case: str, tmp_path: Path) -> None:
    model, values = base_of(case)
    base = GOLDEN / case.partition("_")[0]
    adapters, config = read_adapter(ADAPTERS / case, model.name_table(), model.params(), model.num_layers)
    write_model(tmp_path, model, all_adapted(values, adapters, config, model.params()), base / "config.json")
    with np.load(ADAPTERS / case / "logits.npz") as file:
        want = file["logits"]
    prompt = golden(base.name)[0][0]
    assert np.abs(jaxengine.load(base, dtype="float32").logits(prompt)[0] - want).max() > 0.1
    found = jaxengine.load(tmp_path, dtype="float32").logits(prompt)[0]
    np.testing.assert_allclose(found, want, atol=ATOL, rtol=0)


def test_what_the_config_says() -> None:
    model, _ = base_of("llama")
    of = {
        case: read_adapter(ADAPTERS / case, model.name_table(), model.params(), 2) for case in CASES if "llama" in case
    }
    adapters, config = of["llama_rslora"]
    assert (config.rank, config.alpha, config.rslora, config.dora) == (4, 3.0, True, False)
    assert config.targets == ("down_proj", "lm_head", "q_proj", "v_proj")
    assert config.base_model == "tests/golden/llama"
    # by hand from the LoraConfig in test_live_peft.py, with peft's rule that a pattern matches the end of a name
    assert {n: x.rank for n, x in adapters.items()} == {
        "layers.0.q": 4, "layers.0.v": 4, "layers.0.down": 6, "layers.1.q": 2, "layers.1.v": 4, "layers.1.down": 6, "lm_head": 4,
    }  # fmt: skip
    for name, want in {
        "layers.0.q": 5 / 4**0.5, "layers.0.v": 5 / 4**0.5, "layers.0.down": 5 / 6**0.5, "layers.1.q": 3 / 2**0.5,
        "layers.1.v": 3 / 4**0.5, "layers.1.down": 3 / 6**0.5, "lm_head": 1 / 4**0.5,
    }.items():  # fmt: skip
        assert config.scale(name) == pytest.approx(want, rel=1e-14)
    assert of["llama_lora"][1].scale("layers.0.q") == 3.0
    assert all(x.magnitude is not None for x in of["llama_dora"][0].values())
    assert of["llama_dora"][0]["layers.0.q"].a.shape == (3, 48)
    assert of["llama_dora"][0]["layers.0.q"].b.shape == (4, 16, 3)
    assert of["llama_dora"][0]["layers.1.o"].a.shape == (3, 4, 16)


# -- a family made for the purpose: a fused module, a transposed fused one, a plain one ----------------------------------

TABLE = Table(
    [
        Row("model.embed_tokens.weight", "embedding"),
        Row("model.layers.{layer}.attn.qkv.weight", *[f"layers.{{layer}}.{n}" for n in "qkv"]),
        Row("model.layers.{layer}.attn.out.weight", "layers.{layer}.o"),
        Row("model.layers.{layer}.mlp.up.weight", "layers.{layer}.gate", "layers.{layer}.up", axis=1, transpose=True),
        Row("model.layers.{layer}.mlp.out.weight", "layers.{layer}.down"),
        Row("model.layers.{layer}.norm.weight", "layers.{layer}.norm"),
    ],
    prefixes=("model.", ""),
)
PARAMS = {
    "embedding": Param((11, 6), 1),
    "layers.{layer}.q": Param((2, 3, 6), 2),
    "layers.{layer}.k": Param((1, 3, 6), 2),
    "layers.{layer}.v": Param((1, 3, 6), 2),
    "layers.{layer}.o": Param((6, 2, 3), 1),
    "layers.{layer}.gate": Param((5, 6), 1),
    "layers.{layer}.up": Param((5, 6), 1),
    "layers.{layer}.down": Param((6, 5), 1),
    "layers.{layer}.norm": Param((6,)),
}
LAYERS = 12
MATRICES = "q k v o gate up down".split()
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "o": "o", "down": "down"}


def draw(name: str, rank: int, seed: int, dtype: Any = np.float32, *, dora: bool = False) -> Adapter:
    param = PARAMS["layers.{layer}." + name.rpartition(".")[2]]
    assert param.out is not None
    rng = np.random.default_rng([seed, *name.encode()])
    shapes = (rank, *param.shape[param.out :]), (*param.shape[: param.out], rank), param.shape[: param.out]
    a, b, m = (rng.normal(size=s).astype(dtype) for s in shapes)
    return Adapter(a, b, m if dora else None)


def same(x: dict[str, Adapter], y: dict[str, Adapter]) -> None:
    assert x.keys() == y.keys()
    for name in x:
        for kind in ("a", "b", "magnitude"):
            u, v = getattr(x[name], kind), getattr(y[name], kind)
            assert (u is None) == (v is None)
            if u is not None:
                assert (u.dtype, u.shape, u.tobytes()) == (v.dtype, v.shape, v.tobytes()), (name, kind)


def there_and_back(folder: Path, adapters: dict[str, Adapter], config: AdapterConfig) -> dict[str, Adapter]:
    write_adapter(folder, adapters, config, TABLE, PARAMS, LAYERS)
    found, of = read_adapter(folder, TABLE, PARAMS, LAYERS)
    assert all(of.scale(n) == pytest.approx(config.scale(n), rel=1e-14) for n in adapters)
    return found


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.sets(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(MATRICES)), min_size=1, max_size=20),
    ranks=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    alpha=st.sampled_from([1, 8, 0.5, 3.7]),
    rslora=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_any_adapters_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, chosen: Any, ranks: Any, alpha: float, rslora: bool, dtype: Any
) -> None:
    kinds = sorted(set(FUSED.values()))
    of = {f"layers.{i}.{n}": ranks[kinds.index(FUSED[n])] for i, n in chosen}
    adapters = {n: draw(n, r, seed=0, dtype=dtype) for n, r in of.items()}
    config = AdapterConfig(2, alpha, rslora=rslora, rank_pattern={n: r for n, r in of.items() if r != 2})
    same(there_and_back(tmp_path_factory.mktemp("a") / "out", adapters, config), adapters)


def test_a_shared_a_is_written_once(tmp_path: Path) -> None:
    a = draw("layers.0.q", 4, 0).a
    adapters = {f"layers.0.{n}": Adapter(a, draw(f"layers.0.{n}", 4, 1).b) for n in "qkv"}
    same(there_and_back(tmp_path / "out", adapters, AdapterConfig(4, 8)), adapters)
    with Reader.open(tmp_path / "out" / TENSORS) as reader:
        assert reader.info("base_model.model.model.layers.0.attn.qkv.lora_A.weight").shape == (4, 6)
        assert reader.info("base_model.model.model.layers.0.attn.qkv.lora_B.weight").shape == (12, 4)


@pytest.mark.parametrize("rslora", [False, True])
def test_blocks_are_the_same_matrix(tmp_path: Path, rslora: bool) -> None:
    """Read with nothing but numpy: s B A of the file is each of ours, one above the other, zero where none is."""
    adapters = {n: draw(n, 3, 0) for n in ("layers.7.q", "layers.7.v", "layers.7.up")}
    config = AdapterConfig(3, 6, rslora=rslora)
    write_adapter(tmp_path / "out", adapters, config, TABLE, PARAMS, LAYERS)
    raw = json.loads((tmp_path / "out" / CONFIG).read_text())
    for module, names in (("attn.qkv", "qkv"), ("mlp.up", ("gate", "up"))):
        with Reader.open(tmp_path / "out" / TENSORS) as reader:
            a, b = (reader.read(f"base_model.model.model.layers.7.{module}.lora_{x}.weight") for x in "AB")
        r, alpha = (raw[f"{x}_pattern"].get(f"7.{module}", raw[y]) for x, y in (("rank", "r"), ("alpha", "lora_alpha")))
        assert a.shape[0] == r == 3 * sum(f"layers.7.{n}" in adapters for n in names)
        got = alpha / (math.sqrt(r) if rslora else r) * b.astype(np.float64) @ a.astype(np.float64)
        want = []
        for n in names:
            param, one = PARAMS[f"layers.{{layer}}.{n}"], adapters.get(f"layers.7.{n}")
            zero = np.zeros(param.shape)
            s = 6 / (math.sqrt(3) if rslora else 3)
            delta = zero if one is None or param.out is None else adapted(zero, one.a, one.b, None, s, param.out)
            want.append(delta.reshape(param.flat))
        np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-12, atol=1e-12)
    assert raw["fan_in_fan_out"] is True


def test_dora_of_a_fused_module(tmp_path: Path) -> None:
    adapters = {f"layers.3.{n}": draw(f"layers.3.{n}", 2, 0, dora=True) for n in "qkvo"}
    config = AdapterConfig(2, 4, dora=True)
    same(there_and_back(tmp_path / "out", adapters, config), adapters)
    with Reader.open(tmp_path / "out" / TENSORS) as reader:
        m = reader.read("base_model.model.model.layers.3.attn.qkv.lora_magnitude_vector")
    magnitudes = [adapters[f"layers.3.{n}"].magnitude for n in "qkv"]
    assert m.tolist() == [float(x) for part in magnitudes if part is not None for x in part.reshape(-1)]
    del adapters["layers.3.k"]
    with pytest.raises(CheckpointError, match=r"layers\.3\.k too, or none"):
        write_adapter(tmp_path / "other", adapters, config, TABLE, PARAMS, LAYERS)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        ([f"layers.{i}.o" for i in range(LAYERS)], ["attn.out"]),  # "out" alone would mean mlp.out as well
        ([f"layers.{i}.{n}" for i in range(LAYERS) for n in ("o", "down")], ["out"]),
        (["layers.1.o"], ["1.attn.out"]),  # and not layer 11
        ([f"layers.{i}.q" for i in range(LAYERS)], ["qkv"]),
    ],
)
def test_targets_mean_these_modules_and_no_others(tmp_path: Path, names: list[str], targets: list[str]) -> None:
    write_adapter(tmp_path / "out", {n: draw(n, 2, 0) for n in names}, AdapterConfig(2, 4), TABLE, PARAMS, LAYERS)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == targets


def test_one_rank_for_all_is_the_same_function() -> None:
    adapters = {"layers.0.q": draw("layers.0.q", 2, 0), "layers.1.o": draw("layers.1.o", 5, 0)}
    config = AdapterConfig(2, 4, rank_pattern={"layers.1.o": 5})
    even, of = uniform(adapters, config)
    assert {x.rank for x in even.values()} == {5}
    assert not of.rank_pattern
    assert not of.alpha_pattern
    for name, one in adapters.items():
        param = PARAMS["layers.{layer}" + name[-2:]]
        assert param.out is not None
        zero = np.zeros(param.shape)
        want = adapted(zero, one.a, one.b, None, config.scale(name), param.out)
        found = adapted(zero, even[name].a, even[name].b, None, of.scale(name), param.out)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * np.abs(want).max())  # one float32 rounding of b
    same(uniform(even, of)[0], even)


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_adapter(
        tmp_path / "good", {f"layers.{i}.o": draw(f"layers.{i}.o", 2, 0) for i in range(LAYERS)}, AdapterConfig(2, 4),
        TABLE, PARAMS, LAYERS,
    )  # fmt: skip
    return tmp_path / "good"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "lora_only"}, "bias is 'lora_only'.*only 'none'"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save is \['embed_tokens'\].*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*path_initial_model"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"layer_replication": [[0, 3]]}, "layer_replication is"),
        ({"something_of_next_year": {"x": 1}}, "something_of_next_year is"),
        ({"r": 0}, "r is 0; it must be a whole number"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 3}, r"lora_A.weight is \[2, 6\]; the model and r=3 make it \[3, 6\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_dropout": "a"}, "lora_dropout is 'a'"),
        ({"rank_pattern": {"out": 0}}, "rank_pattern is"),
        ({"rank_pattern": {"attn.out": 4}}, "r=4 make it"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"alpha_pattern": {"*": 1}}, r"alpha_pattern has '\*', which is no regular expression"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": ["out"]}, r"layers\.0\.mlp\.out: target_modules asks for it"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
)
def test_configs_refused(good: Path, change: dict[str, Any], said: str) -> None:
    raw = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=said):
        read_adapter(good, TABLE, PARAMS, LAYERS)


@pytest.mark.parametrize(
    "change",
    [
        {"use_qalora": False, "something_of_next_year": None, "kasa_config": {}, "target_parameters": []},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "revision": "main", "peft_version": "0.9"},
        {"bias": "none", "modules_to_save": [], "rank_pattern": None, "target_modules": None},
        {"target_modules": "all-linear"},
        # a pattern means whole words at the end of a name
        {"rank_pattern": {"model.layers.1": 7, "attn": 7, "ut": 7, "1.attn": 7, "out.weight": 7}},
    ],
)
def test_configs_that_change_nothing(good: Path, change: dict[str, Any]) -> None:
    raw = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps(raw | change))
    assert len(read_adapter(good, TABLE, PARAMS, LAYERS)[0]) == LAYERS


O = "base_model.model.model.layers.0.attn.out."  # noqa: E741


def tensors(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {name: np.ones(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensors({O + "lora_A.weight": (2, 6)}), r"layers\.0\.attn\.out has no lora_B"),
        (tensors({O + "lora_A.weight": (2, 5), O + "lora_B.weight": (6, 2)}), r"is \[2, 5\].*\[2, 6\]"),
        (tensors({O + "lora_A.weight": (2, 6), O + "lora_B.weight": (6, 2)}, np.int32), "is int32; an adapter is"),
        (tensors({O + "lora_A.default.weight": (2, 6)}), r"lora_A\.weight, lora_B\.weight and"),
        (tensors({O + "lora_magnitude_vector": (6,)}), "use_dora is false"),
        (
            tensors({O.replace("attn.out", "attn.outt") + "lora_A.weight": (2, 6)}),
            r"no module 'model\.layers\.0\.attn\.outt' to adapt \(the nearest is 'model\.layers\.0\.attn\.out'\)",
        ),
        (
            tensors({O.replace("layers.0", "layers.12") + "lora_A.weight": (2, 6)}),
            r"no module 'model\.layers\.12\.attn",
        ),
        (tensors({O.replace("attn.out", "norm") + "lora_A.weight": (2, 6)}), r"no module 'model\.layers\.0\.norm'"),
        (tensors({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 11)}), "an embedding's adapter"),
        (tensors({O + "base_layer.weight": (7, 6)}), r"base_layer\.weight is \[7, 6\], the model has \[6, 6\]"),
        ({}, "no adapter at all"),
    ],
)
def test_tensors_refused(good: Path, content: dict[str, np.ndarray], said: str) -> None:
    (good / TENSORS).unlink()
    write_file(good / TENSORS, {n: (x.dtype, x.shape) for n, x in content.items()}, content.__getitem__)
    raw = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps(raw | {"target_modules": None}))
    with pytest.raises(CheckpointError, match=said):
        read_adapter(good, TABLE, PARAMS, LAYERS)


def test_an_adapter_of_the_bare_model_and_of_one_layer(good: Path) -> None:
    """Names without the outer `model.`, and without PEFT's own prefix."""
    content = tensors({"layers.11.attn.out.lora_A.weight": (2, 6), "layers.11.attn.out.lora_B.weight": (6, 2)})
    (good / TENSORS).unlink()
    write_file(good / TENSORS, {n: (x.dtype, x.shape) for n, x in content.items()}, content.__getitem__)
    raw = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps(raw | {"layers_to_transform": [11]}))
    assert list(read_adapter(good, TABLE, PARAMS, LAYERS)[0]) == ["layers.11.o"]


def test_folders_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        read_adapter(tmp_path / "nowhere", TABLE, PARAMS, LAYERS)
    with pytest.raises(CheckpointError, match="a model's folder, not an adapter's"):
        read_adapter(GOLDEN / "llama", TABLE, PARAMS, LAYERS)
    (good / TENSORS).rename(good / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(good, TABLE, PARAMS, LAYERS)
    (good / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"no {TENSORS}"):
        read_adapter(good, TABLE, PARAMS, LAYERS)
    (good / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list, not an object"):
        read_adapter(good, TABLE, PARAMS, LAYERS)
    (good / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_adapter(good, TABLE, PARAMS, LAYERS)


q, k, o = (draw(f"layers.0.{n}", 2, 0) for n in "qko")


@pytest.mark.parametrize(
    ("adapters", "config", "said"),
    [
        ({}, AdapterConfig(2, 4), "no adapters to write"),
        ({"layers.0.oo": o}, AdapterConfig(2, 4), r"layers\.0\.oo is no matrix.*the nearest is 'layers\.0\.o'"),
        ({"embedding": o}, AdapterConfig(2, 4), "embedding is no matrix of the model that an adapter can stand beside"),
        ({"layers.0.norm": o}, AdapterConfig(2, 4), "norm is no matrix"),
        ({"layers.0.o": o}, AdapterConfig(3, 4), r"a is \[2, 2, 3\]; the model and rank 3 make it \[3, 2, 3\]"),
        ({"layers.0.o": q}, AdapterConfig(2, 4), r"a is \[2, 6\]"),
        ({"layers.0.o": o}, AdapterConfig(2, 4, dora=True), "has no magnitude, and the config says dora=True"),
        ({"layers.0.o": Adapter(o.a, o.b, np.ones(6, np.float32))}, AdapterConfig(2, 4), "has a magnitude"),
        ({"layers.0.o": Adapter(o.a, o.b.astype(np.float16))}, AdapterConfig(2, 4), "b is float16 and a is float32"),
        ({"layers.0.q": q, "layers.0.k": k}, AdapterConfig(2, 4, alpha_pattern={"layers.0.k": 8}), "has one scale"),
        (
            {"layers.0.q": q, "layers.0.k": Adapter(k.a.astype(np.float16), k.b.astype(np.float16))},
            AdapterConfig(2, 4),
            "of different dtypes",
        ),
    ],
)
def test_adapters_refused(tmp_path: Path, adapters: Any, config: AdapterConfig, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        write_adapter(tmp_path / "out", adapters, config, TABLE, PARAMS, LAYERS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"rank": 0}, {"rank": 2.0}, {"alpha": math.inf}, {"rank_pattern": {"x": -1}}])
def test_values_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdapterConfig(**{"rank": 2, "alpha": 4, **values})


def test_a_folder_with_something_in_it_is_left_alone(good: Path) -> None:
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    one = {"layers.0.o": o}
    with pytest.raises(CheckpointError, match="not empty"):
        write_adapter(good, one, AdapterConfig(2, 4), TABLE, PARAMS, LAYERS)
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before
    write_adapter(good, one, AdapterConfig(2, 4), TABLE, PARAMS, LAYERS, overwrite=True)
    assert len(read_adapter(good, TABLE, PARAMS, LAYERS)[0]) == 1
