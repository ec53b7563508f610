"""checkpoints.safetensors against the safetensors library, huggingface_hub's split and transformers' own folders."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import CheckpointError  # noqa: E402
from checkpoints.safetensors import INDEX, Reader, plan_shards, write_file, write_index  # noqa: E402
from checkpoints.table import Param, Row, Table  # noqa: E402

pytestmark = pytest.mark.oracle

TORCH = {
    "F64": (torch.float64, np.float64),
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, ml_dtypes.bfloat16),
    "F8_E4M3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    "F8_E5M2": (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    "F8_E8M0": (torch.float8_e8m0fnu, ml_dtypes.float8_e8m0fnu),
    "I64": (torch.int64, np.int64),
    "I32": (torch.int32, np.int32),
    "I16": (torch.int16, np.int16),
    "I8": (torch.int8, np.int8),
    "U8": (torch.uint8, np.uint8),
    "U16": (torch.uint16, np.uint16),
    "U32": (torch.uint32, np.uint32),
    "U64": (torch.uint64, np.uint64),
    "BOOL": (torch.bool, np.bool_),
}


def bits(code: str, shape: tuple[int, ...], seed: int) -> tuple[Any, np.ndarray]:
    """The same random bits as a torch tensor and as a numpy array."""
    kind, dtype = TORCH[code]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    tensor = torch.from_numpy(raw.copy()).view(kind).reshape(shape)
    return tensor, raw.view(dtype).reshape(shape)


def everything() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every dtype, several sizes of each, a scalar and an empty tensor, names that sort and spell awkwardly."""
    theirs: dict[str, Any] = {}
    ours: dict[str, np.ndarray] = {}
    for i, code in enumerate(TORCH):
        for j, (name, shape) in enumerate({"b.10": (3, 5), "b.9": (7,), "B": (2, 2, 2), 'a_é"\\\n\x7f': (1,)}.items()):
            key = f"{name}.{code.lower() if j % 2 else code}"
            theirs[key], ours[key] = bits(code, shape, 10 * i + j)
    theirs["scalar"], ours["scalar"] = bits("F32", (), 999)
    theirs["empty"], ours["empty"] = torch.zeros((0, 4), dtype=torch.bfloat16), np.zeros((0, 4), ml_dtypes.bfloat16)
    return theirs, ours


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None], ids=["format", "none"])
def test_the_same_bytes_as_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    theirs, ours = everything()
    save_file(theirs, tmp_path / "theirs.safetensors", metadata)
    specs = {name: (array.dtype, array.shape) for name, array in ours.items()}
    write_file(tmp_path / "ours.safetensors", specs, ours.__getitem__, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("length", range(1, 10))
def test_the_same_padding_as_the_library(tmp_path: Path, length: int) -> None:
    name = "n" * length
    save_file({name: torch.ones(3, dtype=torch.int8)}, tmp_path / "theirs.safetensors")
    write_file(tmp_path / "ours.safetensors", {name: (np.dtype(np.int8), (3,))}, lambda n: np.ones(3, np.int8))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_library_s_files_are_read(tmp_path: Path) -> None:
    theirs, ours = everything()
    save_file(theirs, tmp_path / "model.safetensors", {"format": "pt"})
    with Reader.open(tmp_path) as reader:
        assert set(reader.names) == ours.keys()
        assert reader.metadata == {"model.safetensors": {"format": "pt"}}
        for name, array in ours.items():
            got = reader.read(name)
            assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_the_library_reads_ours(tmp_path: Path) -> None:
    theirs, ours = everything()
    path = tmp_path / "x.safetensors"
    write_file(path, {n: (a.dtype, a.shape) for n, a in ours.items()}, ours.__getitem__, {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes(loaded[name].reshape(-1).view(torch.uint8).numpy()) == bytes(
            tensor.reshape(-1).view(torch.uint8).numpy()
        )


def test_every_single_change_of_a_header_byte_is_judged_alike(tmp_path: Path) -> None:
    """Where the library refuses a damaged file, so do we; where it reads one, we read the same names or refuse."""
    tensors = {"ab": torch.arange(4, dtype=torch.int16), "c": torch.ones((2, 1), dtype=torch.float32)}
    save_file(tensors, tmp_path / "good.safetensors", {"format": "pt"})
    good = (tmp_path / "good.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "bad.safetensors"
    refusals = 0
    for i in range(end):
        for change in (1, 16, 128):
            path.write_bytes(good[:i] + bytes([good[i] ^ change]) + good[i + 1 :])
            try:
                with library.safe_open(path, framework="numpy") as file:
                    accepted = set(file.keys())
            except library.SafetensorError:
                accepted = None
            try:
                with Reader.open(path) as reader:
                    ours = set(reader.names)
            except CheckpointError:
                refusals += 1
                continue
            assert accepted == ours, f"byte {i} ^ {change}"
    assert refusals > end


def test_shards_of_huggingface_hub() -> None:
    rng = np.random.default_rng(0)
    for trial in range(50):
        # no empty tensors: the hub takes all of them for one shared storage
        sizes = {f"t{i}": int(n) for i, n in enumerate(rng.integers(1, 40, rng.integers(1, 30)))}
        state = {name: torch.zeros(n, dtype=torch.int8) for name, n in sizes.items()}
        split = hub.split_torch_state_dict_into_shards(
            state, filename_pattern="model{suffix}.safetensors", max_shard_size=30 + trial
        )
        tensors = {name: (np.dtype(np.int8), (n,)) for name, n in sizes.items()}
        assert plan_shards(tensors, 30 + trial) == split.filename_to_tensors


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    shared = {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    if kind == "phi3":
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**shared, pad_token_id=0))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared)).to(torch.bfloat16)


def described(kind: str) -> tuple[Table, dict[str, Param]]:
    at, ours = "model.layers.{layer}.", "layers.{layer}."
    if kind == "gpt2":
        at = "transformer.h.{layer}."
        vectors = {"ln_1.weight": 16, "ln_1.bias": 16, "attn.c_proj.bias": 16, "ln_2.weight": 16, "ln_2.bias": 16}
        vectors |= {"mlp.c_fc.bias": 64, "mlp.c_proj.bias": 16}
        table = Table(
            [
                Row("transformer.wte.weight", "wte"),
                Row("transformer.wpe.weight", "wpe"),
                *[Row(at + name, ours + name) for name in vectors],
                Row(f"{at}attn.c_attn.weight", *[f"{ours}{n}" for n in "qkv"], axis=1, transpose=True),
                Row(f"{at}attn.c_attn.bias", *[f"{ours}{n}_bias" for n in "qkv"]),
                Row(f"{at}attn.c_proj.weight", f"{ours}o", transpose=True),
                Row(f"{at}mlp.c_fc.weight", f"{ours}up", transpose=True),
                Row(f"{at}mlp.c_proj.weight", f"{ours}down", transpose=True),
                Row("transformer.ln_f.weight", "ln_f"),
                Row("transformer.ln_f.bias", "ln_f_bias"),
            ],
            prefixes=("transformer.", ""),
        )
        params = {"wte": Param((40, 16), 1), "wpe": Param((16, 16), 1), "ln_f": Param((16,)), "ln_f_bias": Param((16,))}
        params |= {ours + name: Param((size,)) for name, size in vectors.items()}
        params |= {f"{ours}{n}": Param((2, 8, 16), 2) for n in "qkv"} | {
            f"{ours}{n}_bias": Param((2, 8)) for n in "qkv"
        }
        params |= {f"{ours}o": Param((16, 2, 8), 1), f"{ours}up": Param((64, 16), 1), f"{ours}down": Param((16, 64), 1)}
        return table, params
    norms = ["input_layernorm", "post_attention_layernorm"]
    rows = [
        Row("model.embed_tokens.weight", "embedding"),
        Row("model.norm.weight", "norm"),
        Row("lm_head.weight", "head"),
    ]
    rows += [Row(f"{at}{name}.weight", ours + name) for name in norms]
    rows += [Row(f"{at}self_attn.o_proj.weight", f"{ours}o"), Row(f"{at}mlp.down_proj.weight", f"{ours}down")]
    if kind == "phi3":
        rows += [Row(f"{at}self_attn.qkv_proj.weight", *[f"{ours}{n}" for n in "qkv"])]
        rows += [Row(f"{at}mlp.gate_up_proj.weight", f"{ours}gate", f"{ours}up")]
    else:
        rows += [Row(f"{at}self_attn.{n}_proj.weight", f"{ours}{n}") for n in "qkv"]
        rows += [Row(f"{at}mlp.{n}_proj.weight", f"{ours}{n}") for n in ("gate", "up")]
    params = {"embedding": Param((40, 16), 1), "norm": Param((16,)), "head": Param((40, 16), 1)}
    params |= {ours + name: Param((16,)) for name in norms}
    params |= {f"{ours}q": Param((4, 4, 16), 2), f"{ours}k": Param((2, 4, 16), 2), f"{ours}v": Param((2, 4, 16), 2)}
    params |= {f"{ours}o": Param((16, 4, 4), 1), f"{ours}down": Param((16, 24), 1)}
    params |= {f"{ours}{n}": Param((24, 16), 1) for n in ("gate", "up")}
    return Table(rows, prefixes=("model.", "")), params


@pytest.mark.parametrize("shard", ["6KB", "5GB"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_transformers_folders_go_in_and_come_out(tmp_path: Path, kind: str, shard: str) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    table, params = described(kind)
    num_layers = model.config.num_hidden_layers
    out = tmp_path / "ours"
    out.mkdir()
    with Reader.open(tmp_path / "theirs") as reader:
        prefix = table.check(reader, params, num_layers)
        for name, tensor in model.state_dict().items():
            if name in reader:
                made = table.assemble(name, lambda ours: table.read(reader, ours, params), params)
                np.testing.assert_array_equal(made.astype(np.float32), tensor.float().numpy(), strict=True)
        theirs = table.theirs(params, num_layers, prefix)
        tensors = {name: (reader.info(name).dtype, shape) for name, shape in theirs.items()}
        shards = plan_shards(tensors, like=reader.weight_map)
        assert (len(shards) > 1) == (shard == "6KB")
        for file, names in shards.items():
            write_file(
                out / file,
                {n: tensors[n] for n in names},
                lambda n: table.assemble(n, lambda ours: table.read(reader, ours, params), params),
                reader.metadata[file],
            )
        if len(shards) > 1:
            write_index(out, shards, tensors)  # computed, not copied: the same numbers as transformers'
            assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] > 0
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir() if "safetensors" in p.name}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save(tiny("gpt2").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)pickles.*save_pretrained"):
        Reader.open(tmp_path)
