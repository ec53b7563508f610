"""checkpoints.table: what a name table reads and writes is held against arrays arranged by hand with numpy, and against
what the layers compute (a projection gives the same numbers through either layout).

D model, F mlp, N query heads, K kv heads, H head dim, V vocab, L layers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointError
from checkpoints.safetensors import INDEX, Reader, plan_shards, write_file, write_index
from checkpoints.table import Param, Row, Table

GOLDEN = Path(__file__).parent / "golden"
L, D, F, N, K, H, V = 3, 6, 10, 4, 2, 3, 11

SPLIT = Table(
    [
        Row("model.embed_tokens.weight", "embedding"),
        Row("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.norm"),
        Row("model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.q"),
        Row("model.layers.{layer}.self_attn.k_proj.weight", "layers.{layer}.k"),
        Row("model.layers.{layer}.self_attn.k_proj.bias", "layers.{layer}.k_bias"),
        Row("model.layers.{layer}.self_attn.o_proj.weight", "layers.{layer}.o"),
        Row("model.norm.weight", "final_norm"),
        Row("lm_head.weight", "lm_head"),
    ],
    ignore=("*.rotary_emb.inv_freq",),
    prefixes=("model.", ""),
)
PARAMS = {
    "embedding": Param((V, D), 1),
    "layers.{layer}.norm": Param((D,)),
    "layers.{layer}.q": Param((N, H, D), 2),
    "layers.{layer}.k": Param((K, H, D), 2),
    "layers.{layer}.k_bias": Param((K, H)),
    "layers.{layer}.o": Param((D, N, H), 1),
    "final_norm": Param((D,)),
    "lm_head": Param((V, D), 1),
}
SHAPES = {
    "model.embed_tokens.weight": (V, D),
    **{f"model.layers.{i}.input_layernorm.weight": (D,) for i in range(L)},
    **{f"model.layers.{i}.self_attn.q_proj.weight": (N * H, D) for i in range(L)},
    **{f"model.layers.{i}.self_attn.k_proj.weight": (K * H, D) for i in range(L)},
    **{f"model.layers.{i}.self_attn.k_proj.bias": (K * H,) for i in range(L)},
    **{f"model.layers.{i}.self_attn.o_proj.weight": (D, N * H) for i in range(L)},
    "model.norm.weight": (D,),
    "lm_head.weight": (V, D),
}
FUSED = Table(
    [
        Row("h.{layer}.qkv.weight", "layers.{layer}.q", "layers.{layer}.k", "layers.{layer}.v"),
        Row("h.{layer}.qkv.bias", "layers.{layer}.q_bias", "layers.{layer}.k_bias", "layers.{layer}.v_bias"),
    ]
)
CONV = Table(
    [
        Row(
            "h.{layer}.c_attn.weight",
            "layers.{layer}.q",
            "layers.{layer}.k",
            "layers.{layer}.v",
            axis=1,
            transpose=True,
        ),
        Row("h.{layer}.c_proj.weight", "layers.{layer}.o", transpose=True),
    ]
)
QKV = {
    "layers.0.q": Param((N, H, D), 2),
    "layers.0.k": Param((K, H, D), 2),
    "layers.0.v": Param((K, H, D), 2),
}
QKV_BIAS = {"layers.0.q_bias": Param((N, H)), "layers.0.k_bias": Param((K, H)), "layers.0.v_bias": Param((K, H))}


def random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> Reader:
    folder.mkdir(exist_ok=True)
    file = folder / "model.safetensors"
    file.unlink(missing_ok=True)
    write_file(file, {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.__getitem__, {"format": "pt"})
    return Reader.open(folder)


# -- one row, one direction and the other


def test_shapes_on_disk() -> None:
    assert SPLIT.theirs(PARAMS, L) == SHAPES
    assert list(SPLIT.theirs(PARAMS, L))[:3] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert list(SPLIT.theirs(PARAMS, L))[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert FUSED.theirs(QKV | QKV_BIAS, 1) == {
        "h.0.qkv.weight": ((N + 2 * K) * H, D),
        "h.0.qkv.bias": ((N + 2 * K) * H,),
    }
    assert CONV.theirs(QKV | {"layers.0.o": Param((D, N, H), 1)}, 1) == {
        "h.0.c_attn.weight": (D, (N + 2 * K) * H),
        "h.0.c_proj.weight": (N * H, D),
    }


def test_matrices_and_vectors_keep_their_order(tmp_path: Path) -> None:
    theirs = random(SHAPES)
    with write(tmp_path, theirs) as reader:
        assert SPLIT.check(reader, PARAMS, L) == "model."
        q = SPLIT.read(reader, "layers.2.q", PARAMS)
        np.testing.assert_array_equal(q, theirs["model.layers.2.self_attn.q_proj.weight"].reshape(N, H, D), strict=True)
        bias = SPLIT.read(reader, "layers.1.k_bias", PARAMS)
        np.testing.assert_array_equal(bias, theirs["model.layers.1.self_attn.k_proj.bias"].reshape(K, H), strict=True)
        # what the layers compute: head n, channel h of the query is row n*H + h of x @ W.T
        x = np.random.default_rng(2).standard_normal(D)
        queries = x @ theirs["model.layers.2.self_attn.q_proj.weight"].astype(np.float64).T
        np.testing.assert_allclose(
            np.einsum("nhd,d->nh", q.astype(np.float64), x)[1, 2], queries[1 * H + 2], rtol=1e-12
        )
        o = SPLIT.read(reader, "layers.0.o", PARAMS).astype(np.float64)
        mixed = np.random.default_rng(3).standard_normal((N, H))
        expected = theirs["model.layers.0.self_attn.o_proj.weight"].astype(np.float64) @ mixed.reshape(N * H)
        np.testing.assert_allclose(np.einsum("dnh,nh->d", o, mixed), expected, rtol=1e-12)


def test_fused_rows_are_cut_in_order(tmp_path: Path) -> None:
    theirs = random({"h.0.qkv.weight": ((N + 2 * K) * H, D), "h.0.qkv.bias": ((N + 2 * K) * H,)})
    params = QKV | QKV_BIAS
    with write(tmp_path, theirs) as reader:
        FUSED.check(reader, params, 1)
        got = {name: FUSED.read(reader, name, params) for name in params}
    weight, bias = theirs["h.0.qkv.weight"], theirs["h.0.qkv.bias"]
    np.testing.assert_array_equal(got["layers.0.q"], weight[: N * H].reshape(N, H, D))
    np.testing.assert_array_equal(got["layers.0.k"], weight[N * H : (N + K) * H].reshape(K, H, D))
    np.testing.assert_array_equal(got["layers.0.v"], weight[(N + K) * H :].reshape(K, H, D))
    np.testing.assert_array_equal(got["layers.0.v_bias"], bias[(N + K) * H :].reshape(K, H))
    for name, array in theirs.items():
        np.testing.assert_array_equal(FUSED.assemble(name, got.__getitem__, params), array, strict=True)


def test_a_fused_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random({"h.0.qkv.weight": ((N + 2 * K) * H, D), "h.0.qkv.bias": ((N + 2 * K) * H,)})
    asked: list[slice | None] = []
    with write(tmp_path, theirs) as reader:
        whole = reader.read
        monkeypatch.setattr(
            reader, "read", lambda name, rows=None, out=None: asked.append(rows) or whole(name, rows, out)
        )
        FUSED.read(reader, "layers.0.k", QKV | QKV_BIAS)
    assert asked == [slice(N * H, (N + K) * H)]


def test_conv1d_is_transposed_and_joined_along_its_columns(tmp_path: Path) -> None:
    params = QKV | {"layers.0.o": Param((D, N, H), 1)}
    theirs = random({"h.0.c_attn.weight": (D, (N + 2 * K) * H), "h.0.c_proj.weight": (N * H, D)})
    with write(tmp_path, theirs) as reader:
        CONV.check(reader, params, 1)
        got = {name: CONV.read(reader, name, params) for name in params}
    assert all(array.flags.c_contiguous and array.shape == params[name].shape for name, array in got.items())
    # GPT-2's layer: x @ W, the columns split into q, k, v
    x = np.random.default_rng(2).standard_normal(D)
    y = x @ theirs["h.0.c_attn.weight"].astype(np.float64)
    for name, part in zip("qkv", np.split(y, [N * H, (N + K) * H]), strict=True):
        ours = np.einsum("nhd,d->nh", got[f"layers.0.{name}"].astype(np.float64), x)
        np.testing.assert_allclose(ours.reshape(-1), part, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(got["layers.0.o"], theirs["h.0.c_proj.weight"].T.reshape(D, N, H))
    for name, array in theirs.items():
        made = CONV.assemble(name, got.__getitem__, params)
        assert made.flags.c_contiguous
        np.testing.assert_array_equal(made, array, strict=True)


def test_transposed_rows_joined_along_their_rows(tmp_path: Path) -> None:
    """[in, out] matrices whose inputs are joined: the part is contiguous on disk, and still to be transposed."""
    table = Table([Row("w", "left", "right", transpose=True)])
    params = {"left": Param((D, F), 1), "right": Param((D, K), 1)}
    theirs = random({"w": (F + K, D)})
    with write(tmp_path, theirs) as reader:
        table.check(reader, params, 0)
        got = {name: table.read(reader, name, params) for name in params}
    np.testing.assert_array_equal(got["right"], theirs["w"][F:].T)
    np.testing.assert_array_equal(table.assemble("w", got.__getitem__, params), theirs["w"])


@pytest.mark.parametrize("table", [FUSED, CONV], ids=["fused", "conv"])
def test_read_into_a_stack(tmp_path: Path, table: Table) -> None:
    params = QKV | (QKV_BIAS if table is FUSED else {"layers.0.o": Param((D, N, H), 1)})
    theirs = random(table.theirs(params, 1))
    with write(tmp_path, theirs) as reader:
        stack = np.full((2, K, H, D), -1, np.float32)
        assert np.shares_memory(table.read(reader, "layers.0.v", params, out=stack[1]), stack)
        np.testing.assert_array_equal(stack[1], table.read(reader, "layers.0.v", params))
        assert (stack[0] == -1).all()
        with pytest.raises(ValueError, match=r"out for layers\.0\.v is float64"):
            table.read(reader, "layers.0.v", params, out=np.zeros((K, H, D)))


def test_everything_goes_back_as_it_came(tmp_path: Path) -> None:
    theirs = random(SHAPES)
    with write(tmp_path, theirs) as reader:
        for name, array in theirs.items():
            parts = SPLIT.parts(name, PARAMS)
            made = SPLIT.assemble(name, lambda ours: SPLIT.read(reader, ours, PARAMS), PARAMS)
            assert len(parts) == 1
            np.testing.assert_array_equal(made, array, strict=True)


# -- names


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_prefixes_are_seen_from_the_names(tmp_path: Path, prefix: str) -> None:
    theirs = {re.sub(r"^model\.", prefix, name): array for name, array in random(SHAPES).items()}
    with write(tmp_path, theirs) as reader:
        assert SPLIT.check(reader, PARAMS, L) == prefix
        np.testing.assert_array_equal(
            SPLIT.read(reader, "layers.1.norm", PARAMS), theirs[f"{prefix}layers.1.input_layernorm.weight"]
        )
        assert SPLIT.theirs(PARAMS, L, prefix).keys() == theirs.keys()
        for name, array in theirs.items():
            made = SPLIT.assemble(name, lambda ours: SPLIT.read(reader, ours, PARAMS), PARAMS)
            np.testing.assert_array_equal(made, array)


def test_a_prefix_can_be_added_to_every_row(tmp_path: Path) -> None:
    table = Table(
        [Row("h.{layer}.ln.weight", "layers.{layer}.norm")], ignore=("h.*.bias",), prefixes=("", "transformer.")
    )
    arrays = {"transformer.h.0.ln.weight": np.ones(D, np.float32), "transformer.h.0.attn.bias": np.ones(1, np.float32)}
    with write(tmp_path, arrays) as reader:
        assert table.check(reader, {"layers.{layer}.norm": Param((D,))}, 1) == "transformer."


def test_rows_of_absent_parameters_do_not_count(tmp_path: Path) -> None:
    params = {name: param for name, param in PARAMS.items() if name not in ("lm_head", "layers.{layer}.k_bias")}
    theirs = {name: array for name, array in random(SHAPES).items() if "lm_head" not in name and "bias" not in name}
    assert SPLIT.theirs(params, L).keys() == theirs.keys()
    with write(tmp_path / "fits", theirs) as reader:
        SPLIT.check(reader, params, L)
    with write(tmp_path / "more", random(SHAPES)) as reader, pytest.raises(CheckpointError) as error:
        SPLIT.check(reader, params, L)
    assert "Unexpected (4)" in str(error.value)
    assert "lm_head.weight" in str(error.value)
    tied = Table(SPLIT.rows, ignore=("lm_head.weight", "*.k_proj.bias"), prefixes=SPLIT.prefixes)
    with write(tmp_path / "tied", random(SHAPES)) as reader:
        tied.check(reader, params, L)


def test_layers_that_differ() -> None:
    """Full names say which layers have a parameter."""
    table = Table([Row("h.{layer}.a", "layers.{layer}.a"), Row("h.{layer}.b", "layers.{layer}.b")])
    params = {"layers.0.a": Param((2,)), "layers.1.b": Param((3,)), "layers.2.a": Param((4,))}
    assert table.theirs(params, 3) == {"h.0.a": (2,), "h.1.b": (3,), "h.2.a": (4,)}


def test_ten_layers_are_not_one(tmp_path: Path) -> None:
    arrays = {f"h.{i}.a": np.full(1, i, np.float32) for i in range(12)}
    table = Table([Row("h.{layer}.a", "layers.{layer}.a")])
    with write(tmp_path, arrays) as reader:
        assert table.read(reader, "layers.11.a", {"layers.{layer}.a": Param((1,))}).item() == 11
        assert (
            table.assemble("h.10.a", lambda n: np.full(1, float(n.split(".")[1])), {"layers.{layer}.a": Param((1,))})
            == 10
        )


# -- the check


def complaint(reader: Reader, table: Table = SPLIT, params: Mapping[str, Param] = PARAMS, num_layers: int = L) -> str:
    with pytest.raises(CheckpointError) as error:
        table.check(reader, params, num_layers)
    return str(error.value)


def test_all_complaints_at_once(tmp_path: Path) -> None:
    arrays = random(SHAPES)
    for layer in range(L):
        del arrays[f"model.layers.{layer}.self_attn.q_proj.weight"]
        arrays[f"model.layers.{layer}.self_attn.o_proj.weight"] = np.zeros((D, N * H + 1), np.float32)
    arrays["model.layers.7.mlp.weight"] = arrays.pop("model.norm.weight")
    arrays["model.layers.0.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    with write(tmp_path, arrays) as reader:
        said = complaint(reader)
    assert str(tmp_path / "model.safetensors") in said
    assert "(3 layers)" in said
    assert "Missing (4):" in said
    assert "model.layers.{layer}.self_attn.q_proj.weight (layers 0-2)" in said
    assert "model.norm.weight" in said
    assert "Unexpected (1):\n  model.layers.7.mlp.weight" in said
    assert "Of another shape (3):" in said
    assert (
        f"model.layers.{{layer}}.self_attn.o_proj.weight (layers 0-2): [{D}, {N * H + 1}] in model.safetensors, "
        f"the model needs [{D}, {N * H}]"
    ) in said
    assert "inv_freq" not in said


def test_a_model_of_fewer_layers(tmp_path: Path) -> None:
    with write(tmp_path, random(SHAPES)) as reader:
        said = complaint(reader, num_layers=1)
    assert "(1 layers)" in said
    assert "input_layernorm.weight (layers 1-2)" in said
    assert "Missing" not in said


def test_missing_names_the_index(tmp_path: Path) -> None:
    theirs = random(SHAPES)
    del theirs["model.norm.weight"]
    tensors = {name: (array.dtype, array.shape) for name, array in theirs.items()}
    shards = plan_shards(tensors, 600)
    assert len(shards) > 2
    for file, names in shards.items():
        write_file(tmp_path / file, {n: tensors[n] for n in names}, theirs.__getitem__)
    write_index(tmp_path, shards, tensors)
    with Reader.open(tmp_path) as reader:
        said = complaint(reader)
    assert str(tmp_path / INDEX) in said
    assert "Missing (1):\n  model.norm.weight" in said


def test_quantised_checkpoints_are_named_as_such(tmp_path: Path) -> None:
    arrays = random(SHAPES)
    arrays["model.layers.0.self_attn.q_proj.qweight"] = arrays.pop("model.layers.0.self_attn.q_proj.weight")
    with write(tmp_path, arrays) as reader:
        assert "are of packed matrices" in complaint(reader)


def test_a_vector_is_not_a_matrix(tmp_path: Path) -> None:
    """The same number of elements is not enough."""
    arrays = random(SHAPES)
    arrays["model.norm.weight"] = arrays["model.norm.weight"].reshape(1, D)
    arrays["lm_head.weight"] = arrays["lm_head.weight"].reshape(D, V)
    with write(tmp_path, arrays) as reader:
        said = complaint(reader)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight in .*model\.safetensors is \[6, 11\]"):
            SPLIT.read(reader, "lm_head", PARAMS)
    assert "model.norm.weight: [1, 6] in model.safetensors, the model needs [6]" in said


# -- tables that are wrong themselves


def test_rows_are_checked_when_made() -> None:
    for make in (
        lambda: Row("a"),
        lambda: Row("h.{layer}.a", "a"),
        lambda: Row("a", "layers.{layer}.a"),
        lambda: Row("h.{expert}.a", "b"),
        lambda: Table([Row("a", "x"), Row("a", "y")]),
        lambda: Table([Row("a", "x"), Row("b", "x")]),
        lambda: Table([Row("a", "x")], prefixes=()),
        lambda: Table([Row("a", "x")], prefixes="model."),
        lambda: Table([Row("a", "x", "y", axis=1)]).theirs({"x": Param((2,)), "y": Param((2,))}, 0),
        lambda: Table([Row("a", "x", "y")]).theirs({"x": Param((2, 3), 1), "y": Param((2, 4), 1)}, 0),
        lambda: Table([Row("a", "x", "y")]).theirs({"x": Param((2,))}, 0),
        lambda: Table([Row("a", "x")]).theirs({"x": Param((2,)), "z": Param((2,))}, 0),
    ):
        with pytest.raises(ValueError, match=r".{20}"):
            make()


def test_parts_that_do_not_fit_are_refused() -> None:
    wrong = {
        "layers.0.q": np.zeros((N, H, D), np.float32),
        "layers.0.k": np.zeros((K, H, D)),
        "layers.0.v": np.zeros((K, H, D)),
    }
    with pytest.raises(ValueError, match="different dtypes"):
        FUSED.assemble("h.0.qkv.weight", wrong.__getitem__, QKV)
    wrong["layers.0.q"] = np.zeros((N * H, D))
    with pytest.raises(ValueError, match=r"layers\.0\.q came as \[12, 6\]"):
        FUSED.assemble("h.0.qkv.weight", wrong.__getitem__, QKV)
    with pytest.raises(ValueError, match="no row"):
        FUSED.assemble("h.0.mlp.weight", wrong.__getitem__, QKV)
    with pytest.raises(ValueError, match="no row"):
        FUSED.assemble("h.00.qkv.weight", wrong.__getitem__, QKV)


# -- real folders

LLAMA = Table(
    [
        Row("model.embed_tokens.weight", "embedding"),
        *[
            Row(f"model.layers.{{layer}}.{theirs}.weight", f"layers.{{layer}}.{ours}")
            for theirs, ours in {
                "input_layernorm": "norm",
                "self_attn.q_proj": "q",
                "self_attn.k_proj": "k",
                "self_attn.v_proj": "v",
                "self_attn.o_proj": "o",
                "post_attention_layernorm": "mlp_norm",
                "mlp.gate_proj": "gate",
                "mlp.up_proj": "up",
                "mlp.down_proj": "down",
            }.items()
        ],
        Row("model.norm.weight", "final_norm"),
        Row("lm_head.weight", "lm_head"),
    ],
    prefixes=("model.", ""),
)


def llama_params(config: dict[str, int]) -> dict[str, Param]:
    d, f, n, h = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"))
    k, v = config["num_key_value_heads"], config["vocab_size"]
    layer = {
        "norm": Param((d,)),
        "q": Param((n, h, d), 2),
        "k": Param((k, h, d), 2),
        "v": Param((k, h, d), 2),
        "o": Param((d, n, h), 1),
        "mlp_norm": Param((d,)),
        "gate": Param((f, d), 1),
        "up": Param((f, d), 1),
        "down": Param((d, f), 1),
    }
    tops = {"embedding": Param((v, d), 1), "final_norm": Param((d,)), "lm_head": Param((v, d), 1)}
    return tops | {f"layers.{{layer}}.{name}": param for name, param in layer.items()}


def test_a_sharded_folder_goes_in_and_comes_out_byte_for_byte(tmp_path: Path) -> None:
    folder = GOLDEN / "llama_sharded"
    config = json.loads((folder / "config.json").read_text())
    params, num_layers = llama_params(config), config["num_hidden_layers"]
    with Reader.open(folder) as reader:
        prefix = LLAMA.check(reader, params, num_layers)
        theirs = LLAMA.theirs(params, num_layers, prefix)
        names = {ours for name in theirs for ours in LLAMA.parts(name, params)}
        ours = {name: LLAMA.read(reader, name, params) for name in names}
        tensors = {name: (reader.info(name).dtype, shape) for name, shape in theirs.items()}
        shards = plan_shards(tensors, like=reader.weight_map)
        for file, inside in shards.items():
            write_file(
                tmp_path / file,
                {n: tensors[n] for n in inside},
                lambda n: LLAMA.assemble(n, ours.__getitem__, params),
                reader.metadata[file],
            )
        write_index(tmp_path, shards, tensors, reader.index_metadata)
    assert ours["layers.1.q"].ndim == 3
    wanted = {p.name: p.read_bytes() for p in folder.iterdir() if "safetensors" in p.name}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == wanted
