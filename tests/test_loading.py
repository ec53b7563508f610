"""Loading holds one tensor at a time, refuses what does not fit before it allocates, and saving gives back what was read."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jaxengine
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import Reader, write_file
from jaxengine import loading, machine, placement, technique
from jaxengine.architecture import architecture
from jaxengine.config import ConfigError
from jaxengine.export import convert
from jaxengine.homes.base import check_platform
from jaxengine.loading import from_arrays
from jaxengine.placement import stored
from jaxengine.plan import Plan
from jaxengine.sources import layer_of, read_config, stacked_name
from jaxengine.weights.base import Weight
from sharding.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/golden.npz"))


def copy(case: str, to: Path, **config: object) -> Path:
    shutil.copytree(GOLDEN / case, to)
    raw = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(raw))
    return to


def same_files(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.iterdir() if p.name != "golden.npz")
    assert names == sorted(p.name for p in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# --- out again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.some_rows
def test_import_export_is_byte_identical(case: str, tmp_path: Path) -> None:
    jaxengine.load(GOLDEN / case).save(tmp_path / "out")
    same_files(GOLDEN / case, tmp_path / "out")


@pytest.mark.parametrize("case", ["gemma3_text", "phi3", "gpt2"])
@pytest.mark.some_rows
def test_streamed_layers_export_the_same(case: str, tmp_path: Path) -> None:
    jaxengine.load(GOLDEN / case, home="host").save(tmp_path / "out")
    same_files(GOLDEN / case, tmp_path / "out")


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2", "gemma2"])
def test_through_orbax_and_back(case: str, tmp_path: Path) -> None:
    convert(GOLDEN / case, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    same_files(GOLDEN / case, tmp_path / "hf")
    direct, again = jaxengine.load(GOLDEN / case), jaxengine.load(tmp_path / "orbax")
    np.testing.assert_array_equal(again.logits([3, 1, 4, 1, 5]), direct.logits([3, 1, 4, 1, 5]))
    sharded = jaxengine.load(tmp_path / "orbax", sharding="data", mesh="data=8", home="host")
    specs = sharded.architecture.specs()
    for path, x in jax.tree_util.tree_leaves_with_path([bank.weights for bank in sharded.params["banks"]]):
        name = next(p.key for p in reversed(path) if isinstance(p, jax.tree_util.DictKey))
        vector = next(s.out is None for n, s in specs.items() if n.endswith(f".{name}"))
        assert x.sharding.num_devices == 8
        assert (x.sharding.memory_kind == "pinned_host") is not vector, name
    elsewhere = stored(sharded.architecture, sharded.plan, sharded.params)
    for name, fetch in stored(direct.architecture, direct.plan, direct.params).items():
        np.testing.assert_array_equal(fetch(), elsewhere[name](), err_msg=name)


def test_quantised_weights_stay_as_they_are_in_orbax(tmp_path: Path) -> None:
    model = jaxengine.load(GOLDEN / "llama", weights="int8")
    model.save(tmp_path / "q", format="orbax")
    again = jaxengine.load(tmp_path / "q")
    assert again.plan == model.plan
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="stored as 'int8' and the plan asks for 'dense'"):
        jaxengine.load(tmp_path / "q", weights="dense")
    again.save(tmp_path / "hf")  # decoded: what the int8 model computes with, as plain float32
    np.testing.assert_allclose(jaxengine.load(tmp_path / "hf").logits([1, 2, 3]), again.logits([1, 2, 3]), atol=2e-4)


def test_of_a_stored_plan_only_what_the_bytes_decide_is_taken(tmp_path: Path) -> None:
    rules = (("layers.*.down", "dense"),)
    plan = Plan(
        dtype="bfloat16", weights="int8", weight_rules=rules, home="host", form="scan", kv_codec="int8",
        kv_layout="full", sharding="fsdp", mesh="data=8", rules=(("norm", None),),
    )  # fmt: skip
    jaxengine.load(GOLDEN / "gemma2", plan=plan).save(tmp_path / "q", format="orbax")
    again = jaxengine.load(tmp_path / "q")
    assert again.plan == Plan(dtype="bfloat16", weights="int8", weight_rules=rules)
    assert again.mesh.size == 1
    assert {x.sharding.memory_kind for x in jax.tree.leaves(again.params)} == {"device"}
    small = jaxengine.load(tmp_path / "q", memory="1GB", kv="int8")
    assert small.plan == dataclasses.replace(again.plan, kv_codec="int8")
    own = jaxengine.load(tmp_path / "q", home="host", sharding="data", mesh="data=8")
    assert (own.plan.home, own.plan.sharding, own.plan.rules) == ("host", "data", ())
    own.save(tmp_path / "q", format="orbax", overwrite=True)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(jaxengine.load(tmp_path / "q").params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match=r"(?s)stored as 'int8' and the plan asks for 'dense'.*same weights"):
        jaxengine.load(tmp_path / "q", plan=Plan(home="host"))
    assert jaxengine.load(tmp_path / "q", plan=plan).plan == plan


def test_dtype_casts(tmp_path: Path) -> None:
    convert(GOLDEN / "llama", tmp_path / "bf16", to="hf", dtype="bfloat16")
    assert read_config(tmp_path / "bf16")["dtype"] == "bfloat16"
    with Reader.open(GOLDEN / "llama") as source, Reader.open(tmp_path / "bf16") as cast:
        for name in source.names:
            np.testing.assert_array_equal(cast.read(name), source.read(name).astype(jax.numpy.bfloat16))


def test_nothing_is_overwritten_or_left_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="taken is not empty"):
        convert(GOLDEN / "llama", tmp_path / "taken", to="hf")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"
    model = jaxengine.load(GOLDEN / "llama")

    def fails(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxengine.export.write_beside", fails)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    refused: list[dict[str, Any]] = [{"format": "gguf"}, {"dtype": "float8"}, {"format": "orbax", "dtype": "float16"}]
    for bad in refused:
        with pytest.raises(ValueError, match="save"):
            model.save(tmp_path / "out", **bad)


# --- what is refused ---------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Write the folder's one file anew with its tensors changed."""
    with Reader.open(folder) as reader:
        tensors = {n: reader.read(n) for n in reader.names}
    change(tensors)
    (folder / "model.safetensors").unlink()
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(folder / "model.safetensors", described, lambda n: tensors[n], {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q), r"(?s)Missing \(1\).*layers.*q_proj"),
        (lambda t: t.update({"extra.weight": np.zeros(3, np.float32)}), r"(?s)Unexpected \(1\).*extra\.weight"),
        (lambda t: t.update({Q: t[Q][:-1]}), r"(?s)Of another shape.*q_proj.*the model needs"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_tensors_that_do_not_fit(change: Callable, said: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=said):
        jaxengine.load(folder)


def test_truncated_and_corrupt_files(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        jaxengine.load(folder)
    file.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        jaxengine.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=str(folder)):
        jaxengine.load(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "mamba", "model_type is 'mamba'; the families are"),
        ("hidden_act", "swish7", "hidden_act is 'swish7'"),
        ("flux_capacitor", 1.21, "flux_capacitor = 1.21 is not known"),
        ("quantization_config", {"quant_method": "gptq"}, "quant_method 'gptq'"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "'dynamic'"),
        ("pretraining_tp", 2, "pretraining_tp is 2"),
    ],
)
def test_configs_that_ask_for_more(field: str, value: object, said: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        jaxengine.load(copy("llama", tmp_path / "m", **{field: value}))


@pytest.mark.parametrize(
    ("case", "pattern", "said"),
    [
        ("llama", "layers.*.attention.q", r"matches no parameter\. Nearest .*2 layers \(0 to 1\): .*layers\.\*\.q\b"),
        ("llama", "layers.7.down", r"matches no parameter.*: layers\.\*\.down"),
        ("llama", "lmhead", r"matches no parameter.*: lm_head"),
        ("llama", "Layers.*.up", r"matches no parameter.*layers\.\*\.up"),
        ("llama", "*_norm", r"matches only final_norm, layers\.\*\.input_norm, layers\.\*\.mlp_norm: vectors"),
        ("gemma2", "lm_head", r"the head is tied, and is 'embedding'"),
        ("gpt2", "", "matches no parameter"),
    ],
)
def test_weight_rules_that_choose_nothing(case: str, pattern: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(dtype="float32", weight_rules=(("embedding", "dense"), (pattern, "int8")))
    monkeypatch.setattr(Reader, "read", lambda *given, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=said) as refused:
        jaxengine.load(GOLDEN / case, plan=plan)
    assert str(refused.value).startswith(f"weight_rules: {pattern!r} ")
    with pytest.raises(ValueError, match=said):
        from_arrays(architecture(read_config(GOLDEN / case)), plan, {})


# --- what a card cannot do ----------------------------------------------------------------------------------------------


def by_load(**given: Any) -> Any:
    return jaxengine.load(GOLDEN / "llama", dtype="float32", **given)


def by_arrays(**given: Any) -> Any:
    return from_arrays(architecture(read_config(GOLDEN / "llama")), Plan(dtype="float32", **given), {})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A mesh of one GPU, as far as checks look at it; what is placed there is refused."""
    real, abstract = make_mesh(), placement.abstract
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    mesh = SimpleNamespace(devices=np.asarray([device], object), local_devices=[device], size=1, shape={"data": 1})
    monkeypatch.setattr(loading, "make_mesh", lambda *given: mesh)
    monkeypatch.setattr(loading, "check_platform", lambda name, platform: check_platform(name, platform, (0, 12, 0)))
    monkeypatch.setattr(placement, "abstract", lambda arch, plan, over: abstract(arch, plan, real))

    def place(*given: Any) -> None:
        raise RuntimeError("it went on to place")

    monkeypatch.setattr(placement, "place", place)
    return device


@pytest.mark.parametrize("way", [by_load, by_arrays])
def test_a_card_that_streams_wrongly_is_refused_first(
    way: Callable[..., Any], card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test is of this device, before anything is placed, and only where layers stand in host memory."""
    seen: list[Any] = []

    def wrong(device: Any, *, folder: Path) -> None:
        seen.append(device)
        raise RuntimeError(f"Streaming layers from host memory is wrong here: {folder.name}")

    monkeypatch.setattr(loading, "check_streaming", wrong)
    with pytest.raises(RuntimeError, match="Streaming layers from host memory is wrong here: jaxengine"):
        way(home="host")
    assert seen == [card]
    with pytest.raises(RuntimeError, match="it went on to place"):
        way(home="device")
    assert seen == [card]


@pytest.mark.parametrize("way", [by_load, by_arrays])
def test_more_pinned_memory_than_xla_gives_is_refused_first(
    way: Callable[..., Any], card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_streaming", lambda device, folder: pytest.fail("it went on"))
    monkeypatch.setattr(loading, "pool_limit_bytes", lambda *given: 1000)
    with pytest.raises(
        ValueError, match=r"home='host' keeps .* in pinned host memory, and XLA's pool stops at 1 kB: set"
    ):
        way(home="host")


@pytest.mark.parametrize("way", [by_load, by_arrays])
def test_a_pool_that_was_made_larger_is_said_where_it_is_used(
    way: Callable[..., Any], card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever loads what XLA's own pool would not hold, and by nobody else."""
    monkeypatch.setattr(loading, "check_streaming", lambda device, folder: None)
    for own, said in ((1000, 1), (10**12, 0)):
        caplog.clear()
        monkeypatch.setattr(
            loading, "pool_limit_bytes", lambda environ=None, own=own: 10**12 if environ is None else own
        )
        with (
            caplog.at_level(logging.INFO, logger="jaxengine"),
            pytest.raises(RuntimeError, match="it went on to place"),
        ):
            way(home="host")
        lines = [
            r.getMessage() for r in caplog.records if "XLA's pool of pinned memory may grow to 1 TB" in r.getMessage()
        ]
        assert len(lines) == said
        assert all(f"({machine.POOL})" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory": "100KB"}, r"needs 231 kB: .* 131 kB short\. Nearest: "),
        ({"memory": "150KB", "ram": "1KB"}, r"kB of device memory and .* of host memory short\. Nearest: "),
    ],
)  # fmt: skip
def test_what_fits_no_budget_is_refused_before_a_weight_is_read(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "place", lambda *given: pytest.fail("it was placed"))
    monkeypatch.setattr(Reader, "read", lambda *given, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=said):
        by_load(**given)


@pytest.mark.parametrize("way", [by_load, by_arrays])
def test_a_jax_that_streams_wrongly_is_refused_first(
    way: Callable[..., Any], card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_platform", lambda name, platform: check_platform(name, platform, (0, 11, 0)))
    monkeypatch.setattr(loading, "available_ram", lambda: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=r"home=.host. on a GPU needs jax 0\.11\.1 or newer, and this is 0\.11\.0"):
        way(home="host")


def test_weight_rules_that_choose_something() -> None:
    rules = (("layers.1.*", "int8"), ("lm_head", "int8"), ("layers.?.down", "dense"))
    model = jaxengine.load(GOLDEN / "llama", plan=Plan(weight_rules=rules))
    formats = {
        n: isinstance(fetch(), Weight) for n, fetch in stored(model.architecture, model.plan, model.params).items()
    }
    assert formats["layers.1.q"]
    assert formats["layers.1.down"]
    assert formats["lm_head"]
    assert not formats["layers.0.q"]
    assert not formats["layers.1.input_norm"]


def test_weight_rules_of_load_go_before_the_plans(tmp_path: Path) -> None:
    plan = Plan(weights="int4", weight_rules=(("lm_head", "int4"), ("layers.0.*", "dense")))
    given = {"lm_head": "int8:group_size=0", "*.down": "nf4"}
    model = jaxengine.load(GOLDEN / "llama", plan=plan, weight_rules=given)
    assert model.plan.weight_rules == (("lm_head", "int8"), ("*.down", "nf4"), *plan.weight_rules)
    specs = model.architecture.specs()
    formats = {n: model.plan.format_of(n, specs[n]) for n in ("lm_head", "layers.0.down", "layers.0.up", "layers.1.up")}
    assert list(formats.values()) == ["int8", "nf4", "dense", "int4"]
    pairs: list[Any] = list(given.items())
    for same in (pairs, [f"{p}={f}" for p, f in pairs]):
        assert jaxengine.load(GOLDEN / "llama", plan=plan, weight_rules=same).plan == model.plan
    model.save(tmp_path / "q", format="orbax")
    assert jaxengine.load(tmp_path / "q", weight_rules={"embedding": "int8"}).plan.weights == "int4"
    with pytest.raises(CheckpointError, match=r"lm_head is stored as 'int8' and the plan asks for 'dense'"):
        jaxengine.load(tmp_path / "q", weight_rules={"lm_head": "dense"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lmhead": "int8"}, r"weight_rules: 'lmhead' matches no parameter.*: lm_head"),
        ({"*_norm": "int8"}, r"weight_rules: '\*_norm' matches only final_norm, .*: vectors"),
        (["lm_head=int9"], r"rule 'lm_head=int9': There is no 'int9' .*Did you mean 'int8'\?"),
        (["lm_head=int4:group_size=65"], r"rule 'lm_head=int4:group_size=65': .*group_size is '65'; it can be 16, 32"),
        (["lm_head"], r"rule 'lm_head': it is PATTERN=FORMAT"),
        (["=int8"], r"rule '=int8': it is PATTERN=FORMAT"),
        ([("lm_head", "int8", "nf4")], r"it is PATTERN=FORMAT"),
        ("lm_head=int8", r"weight_rules is 'lm_head=int8'; it is a mapping or a list"),
        (["*=int8", "lm_head=nf4"], r"'lm_head' changes nothing: .*'\*' stands before it\. Give 'lm_head' first"),
        (["lm_head=int8", "lm_head=nf4"], r"'lm_head' changes nothing"),
    ],
)
def test_weight_rules_that_are_refused(given: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "read", lambda *given, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=said):
        jaxengine.load(GOLDEN / "llama", weight_rules=given)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        jaxengine.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        jaxengine.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        jaxengine.load(tmp_path)


def test_names_in_stacks() -> None:
    assert (layer_of("layers.12.q"), layer_of("embedding")) == (12, None)
    assert (stacked_name("layers.12.q"), stacked_name("embedding")) == ("layers.q", "embedding")
    raw = read_config(GOLDEN / "llama")
    assert "layers.0.q" in architecture(raw).specs()


# --- host memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
folder, given = sys.argv[1], json.loads(sys.argv[2])
import jax, jaxengine

def kilobytes(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

jaxengine.load(sys.argv[3], **given)  # imports, backend, and the compiler's own memory are there before we measure
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
model = jaxengine.load(folder, **given)
placed = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"peak": 1024 * (kilobytes("VmHWM") - before), "placed": placed}))
"""


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A Llama of 512 MiB in float32, and the bytes of its largest tensor (64 MiB)."""
    folder = tmp_path_factory.mktemp("large")
    raw = {
        "model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096, "dtype": "float32",
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    arch = architecture(raw)
    shapes = arch.name_table().theirs(arch.params(), arch.num_layers)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2**20, np.float32)
    write_file(
        folder / "model.safetensors",
        {n: (np.dtype(np.float32), s) for n, s in shapes.items()},
        lambda n: np.resize(noise, shapes[n]),
        {"format": "pt"},
    )
    return folder, max(int(np.prod(s)) for s in shapes.values()) * 4


def coded(text: str, **given: Any) -> dict[str, Any]:
    """Every matrix in a format, the largest one, which is the embedding, too."""
    dtype = {"dtype": "bfloat16"} if text.startswith("lossless") else {}
    return {"weights": text, "weight_rules": {"embedding": text, "lm_head": text}, **dtype, **given}


FORMATS = [n for n in technique.names("jaxengine.weights") if n != "dense"]
OTHERS = ("fp8:scale=tensor", "int8:outliers=128", "nf4:double=false")
MEASURED = [
    {}, {"home": "host"}, {"dtype": "bfloat16"}, {"weights": "int8"},
    *(coded(text) for text in ("nf4", "fp8:scale=block128", "int4:act_order=true")),
    *(pytest.param(coded(text), marks=pytest.mark.thorough) for text in (*FORMATS, *OTHERS) if text != "nf4"),
    *(pytest.param(coded(text, home="host"), marks=pytest.mark.thorough) for text in ("nf4", "int4:act_order=true")),
]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("given", MEASURED, ids=str)
@pytest.mark.some_rows
def test_host_memory_while_loading(given: dict, half_a_gigabyte: tuple[Path, int]) -> None:
    """At most the placed parameters and twice the largest tensor, in a process of its own."""
    folder, largest = half_a_gigabyte
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(given), str(GOLDEN / "llama")]
    flags = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")  # memory as users have it
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["placed"] + 2 * largest, found


@pytest.mark.parametrize(
    ("given", "streamed"),
    [
        ({}, False),
        ({"home": "host"}, True),
        ({"home": "host", "form": "ahead"}, True),
        ({"home": "split", "resident": 1}, True),
    ],
    ids=str,
)
def test_types_say_in_which_memory_a_layer_is(given: dict[str, Any], streamed: bool) -> None:
    """As a program that is traced with it reads them, on any backend; vectors of streamed layers stay on the device."""
    model = jaxengine.load(GOLDEN / "llama", dtype="float32", **given)
    assert model.architecture.num_layers == 2
    found = False
    for bank in model.params["banks"]:
        for path, x in jax.tree.leaves_with_path(bank.weights):
            there = jax.typeof(x).memory_space == jax.memory.Space.Host
            first = "'one'" in jax.tree_util.keystr(path)  # of the form 'ahead', whose first layer enters by itself
            matrix = x.ndim - (bank.stacked and not first) >= 2
            assert there == (bank.home == "host" and matrix), (jax.tree_util.keystr(path), jax.typeof(x))
            found |= there
    assert found == streamed
    assert all(jax.typeof(x).memory_space == jax.memory.Space.Device for x in jax.tree.leaves(model.params["outer"]))
