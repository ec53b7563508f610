"""Packed checkpoints against what their layouts mean in float64 (tests/oracles/packed.py).

Words are drawn at random, so that every bit of every tensor matters; the oracle unpacks them one element at a time. Two
things are held: each matrix that is read is the oracle's, within the roundings of one product in float32, and a tiny
model's logits are those of a plain folder with the oracle's matrices (2e-4 on logits of order one: another order of
summation, as in test_models.py).

B batch, T queries, D model, F mlp, O outputs, I inputs, G groups of a row.
"""

# ruff: noqa: E741

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from oracles import packed

import jaxengine
from checkpoints import compressed
from checkpoints.errors import CheckpointError
from checkpoints.quantized import METHODS, base, method
from checkpoints.safetensors import Reader, write_file
from jaxengine import formats
from jaxengine.architecture import architecture
from jaxengine.config import ConfigError
from jaxengine.export import convert
from jaxengine.plan import Plan, abstract_leaf
from jaxengine.sources import open_source, read_config
from jaxengine.weights.base import Weight

U = 2.0**-24
ATOL = 2e-4
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
E4M3, E8M0, BF16 = (np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16))
LLAMA = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "dtype": "float32",
}  # fmt: skip
PHI3 = LLAMA | {"model_type": "phi3", "sliding_window": None}
Parts = Mapping[str, np.ndarray]


# --- random matrices in each layout -----------------------------------------------------------------------------------


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-(2**31), 2**31, shape, np.int32, endpoint=False)


def scales(rng: np.random.Generator, *shape: int, dtype: Any = np.float16, size: float = 0.015) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) * size).astype(dtype)


def gptq(bits: int = 4, group: int = 32, *, sym: bool = False, act_order: bool = False, v2: bool = False) -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        G = I // (group if group > 0 else I)
        qzeros = words(rng, G, O * bits // 32)
        if sym:  # the middle code, less one in the first version
            nibbles = np.full((G, O), 2 ** (bits - 1) - (not v2), np.uint8)
            qzeros = base.pack(nibbles, bits)
        elif not v2 and bits != 3:
            qzeros &= {2: 0x55555555, 4: 0x77777777}[
                bits
            ]  # the largest would be one more, and carry into its neighbour
        parts = {
            "qweight": words(rng, I * bits // 32, O), "qzeros": qzeros, "scales": scales(rng, G, O, size=0.06 / 2**bits * 4)
        }  # fmt: skip
        g_idx = np.arange(I, dtype=np.int32) // (group if group > 0 else I)
        return parts | {"g_idx": rng.permutation(g_idx) if act_order else g_idx}

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    return Case(config, make, lambda p, O, I: packed.gptq(p, O, I, bits, group, v2=v2))


def awq(group: int = 32) -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        G = I // (group if group > 0 else I)
        return {
            "qweight": words(rng, I, O // 8), "qzeros": words(rng, G, O // 8), "scales": scales(rng, G, O)
        }  # fmt: skip

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Case(config, make, lambda p, O, I: packed.awq(p, O, I, group))


def nf4(*, double: bool = False, block: int = 64, storage: Any = np.uint8) -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [O, I]}
        blocks = -(-O * I // block)
        data = rng.integers(0, 256, O * I // 2, np.uint8)
        parts = {"weight": data.view(storage)[:, None], "weight.quant_map": np.float32(packed.NF4)}
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.11}
            table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            parts |= {
                "weight.absmax": rng.integers(0, 256, blocks, np.uint8), "weight.nested_quant_map": table,
                "weight.nested_absmax": scales(rng, -(-blocks // 256), dtype=np.float32, size=0.05),
            }  # fmt: skip
        else:
            parts |= {"weight.absmax": scales(rng, blocks, dtype=np.float32, size=0.12)}
        return parts | {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)}

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Case(config, make, packed.nf4)


def llm_int8() -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        return {
            "weight": rng.integers(-127, 128, (O, I), np.int8), "SCB": scales(rng, O, dtype=np.float32, size=0.12),
            "weight_format": np.array(0, np.uint8),
        }  # fmt: skip

    return Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, make, lambda p, O, I: packed.int8_rows(p))


def ct_integers(
    layout: str,
    bits: int,
    strategy: str,
    *,
    symmetric: bool = True,
    group: int = 32,
    dtype: Any = BF16,
    order: bool = False,
) -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        G = {"group": I // group, "channel": 1, "tensor": 1}[strategy]
        shape = (1,) if strategy == "tensor" else (O, G)
        parts = {"weight_scale": scales(rng, *shape, dtype=dtype, size=0.24 / 2**bits)}
        if layout == "pack-quantized":
            parts |= {"weight_packed": words(rng, O, I * bits // 32), "weight_shape": np.array([O, I], np.int64)}
            zero = words(rng, O * bits // 32, G)
        else:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
            parts |= {"weight": rng.integers(low, high, (O, I), np.int8)}
            zero = rng.integers(low, high, shape, np.int8)
        if order:
            parts |= {"weight_g_idx": rng.permutation(np.arange(I, dtype=np.int32) // group)}
        return parts if symmetric else parts | {"weight_zero_point": zero}

    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False,
        "group_size": group if strategy == "group" else None, "actorder": "group" if order else None,
    }  # fmt: skip
    return Case(
        ct_config(layout, weights), make, lambda p, O, I: packed.packed_integers(p, O, I, bits, symmetric=symmetric)
    )


def ct_config(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }  # fmt: skip


def float8(rng: np.random.Generator, O: int, I: int) -> np.ndarray:
    raw = rng.integers(0, 256, (O, I), np.uint8)
    raw[raw & 0x7F == 0x7F] = 0  # NaN
    return raw.view(E4M3)


def fp8_of(
    shape: Callable[[int, int], tuple[int, ...]], config: dict[str, Any], scale: str, dtype: Any = np.float32
) -> Case:
    block = config.get("weight_block_size") or config.get("block_structure")

    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        size = scales(rng, *shape(O, I), dtype=np.float32, size=0.0006).astype(dtype)
        return {"weight": float8(rng, O, I), scale: size, "input_scale": np.ones((), np.float32)}

    def dense(parts: Parts, O: int, I: int) -> np.ndarray:
        return packed.fp8(parts["weight"], parts[scale].astype(np.float32), tuple(block) if block else None)

    if "block_structure" in config or "strategy" in config:
        return Case(
            ct_config("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, **config}), make, dense
        )
    return Case(config, make, dense)


def blocks(size: int = 128) -> Callable[[int, int], tuple[int, ...]]:
    return lambda O, I: (-(-O // size), -(-I // size))


def mxfp4(*, ct: bool = False) -> Case:
    def make(rng: np.random.Generator, O: int, I: int) -> Parts:
        data = rng.integers(0, 256, (O, I // 2), np.uint8)
        e = rng.integers(119, 123, (O, I // 32), np.uint8)
        if ct:
            return {"weight_packed": data, "weight_scale": e}
        return {"weight_blocks": data.reshape(O, I // 32, 16), "weight_scales": e}

    def dense(parts: Parts, O: int, I: int) -> np.ndarray:
        data, e = parts.values()
        return packed.mxfp4(data.reshape(O, -1), e, I)

    if ct:
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
        return Case(ct_config("mxfp4-pack-quantized", weights), make, dense)
    return Case({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}, make, dense)


class Case(NamedTuple):
    config: dict[str, Any]
    make: Callable[[np.random.Generator, int, int], Parts]
    dense: Callable[[Parts, int, int], np.ndarray]


# {id: (case, the plan's format of matrices in layers)}
CASES: dict[str, tuple[Case, str]] = {
    "gptq": (gptq(), "int4:group_size=32,affine=true,scale=float16"),
    "gptq-sym": (gptq(sym=True), "int4:group_size=32,scale=float16"),
    "gptq-rows": (gptq(group=-1), "int4:affine=true,scale=float16"),
    "gptq-act-order": (gptq(act_order=True), "int4:group_size=32,affine=true,scale=float16,act_order=true"),
    "gptq-v2": (gptq(v2=True), "int4:group_size=32,affine=true,scale=float16"),
    "gptq-8": (gptq(bits=8, sym=True), "int8:group_size=32"),
    "gptq-8-rows": (gptq(bits=8, sym=True, group=-1, v2=True), "int8"),
    "gptq-8-order": (gptq(bits=8, sym=True, act_order=True), "int8:group_size=32,act_order=true"),
    "gptq-3": (gptq(bits=3, v2=True), "int3:group_size=32,affine=true,scale=float16"),
    "gptq-3-sym": (gptq(bits=3, sym=True), "int3:group_size=32,scale=float16"),
    "gptq-3-order": (gptq(bits=3, act_order=True), "int3:group_size=32,affine=true,scale=float16,act_order=true"),
    "gptq-2": (gptq(bits=2, v2=True, group=64), "int2:group_size=64,affine=true,scale=float16"),
    "gptq-2-sym-order": (
        gptq(bits=2, sym=True, act_order=True, group=64), "int2:group_size=64,scale=float16,act_order=true",
    ),
    "gptq-2-order": (
        gptq(bits=2, act_order=True, group=64), "int2:group_size=64,affine=true,scale=float16,act_order=true",
    ),
    "awq": (awq(), "int4:group_size=32,affine=true,scale=float16"),
    "awq-128": (awq(128), "int4:affine=true,scale=float16"),
    "nf4": (nf4(), "nf4:double=false"),
    "nf4-double": (nf4(double=True), "nf4:double=false"),
    "nf4-256-bf16": (nf4(block=256, storage=BF16), "nf4:group_size=128,double=false"),
    "llm-int8": (llm_int8(), "int8"),
    "ct-int4": (ct_integers("pack-quantized", 4, "group"), "int4:group_size=32"),
    "ct-int4-affine": (ct_integers("pack-quantized", 4, "group", symmetric=False), "int4:group_size=32,affine=true"),
    "ct-int4-rows": (ct_integers("pack-quantized", 4, "channel", symmetric=False), "int4:affine=true"),
    "ct-int4-order": (ct_integers("pack-quantized", 4, "group", order=True), "int4:group_size=32,act_order=true"),
    "ct-int8-order": (ct_integers("pack-quantized", 8, "group", order=True), "int8:group_size=32,act_order=true"),
    "ct-int3": (ct_integers("pack-quantized", 3, "group", dtype=np.float32), "int3:group_size=32,scale=float32"),
    "ct-int8-packed": (ct_integers("pack-quantized", 8, "group", group=64), "int8:group_size=64"),
    "ct-int8": (ct_integers("int-quantized", 8, "channel", dtype=np.float32), "int8"),
    "ct-int8-tensor": (ct_integers("int-quantized", 8, "tensor"), "int8"),
    "ct-naive-4": (ct_integers("naive-quantized", 4, "channel", symmetric=False), "int4:affine=true"),
    "ct-fp8": (fp8_of(lambda O, I: (O, 1), {"strategy": "channel"}, "weight_scale", BF16), "fp8"),
    "ct-fp8-tensor": (fp8_of(lambda O, I: (1,), {"strategy": "tensor"}, "weight_scale"), "fp8:scale=tensor"),
    "ct-fp8-block": (
        fp8_of(blocks(), {"strategy": "block", "block_structure": [128, 128]}, "weight_scale"), "fp8:scale=block128",
    ),
    "ct-mxfp4": (mxfp4(ct=True), "mxfp4"),
    "fp8-block": (
        fp8_of(blocks(), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv"),
        "fp8:scale=block128",
    ),
    "fp8-block-256": (
        fp8_of(blocks(256), {"quant_method": "fp8", "weight_block_size": [256, 256]}, "weight_scale_inv"),
        "fp8:scale=block128",
    ),
    "fp8-block-e8m0": (
        fp8_of(blocks(), {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
               "weight_scale_inv", E8M0),
        "fp8:scale=block128",
    ),
    "fp8": (fp8_of(lambda O, I: (), {"quant_method": "fp8"}, "weight_scale"), "fp8:scale=tensor"),
    "fbgemm": (fp8_of(lambda O, I: (O, 1), {"quant_method": "fbgemm_fp8"}, "weight_scale"), "fp8"),
    "mxfp4": (mxfp4(), "mxfp4"),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


# --- folders ---------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    described = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(folder / "model.safetensors", described, lambda n: np.asarray(tensors[n]), {"format": "pt"})
    return folder


def packed_in_layers(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def tensors_of(
    case: Case, raw: Mapping[str, Any], seed: int = 0, which: Callable[[str], bool] = packed_in_layers
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(the packed folder's tensors, the plain folder's) of a random model."""
    arch, rng = architecture(raw), np.random.default_rng(seed)
    theirs, plain = {}, {}
    for name, shape in arch.name_table().theirs(arch.params(), arch.num_layers).items():
        if which(name):
            parts = case.make(rng, *shape)
            theirs |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
            plain[name] = case.dense(parts, *shape).astype(np.float32)
        else:
            drawn = rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)
            theirs[name] = plain[name] = drawn
    return theirs, plain


def folders(
    case: Case, to: Path, raw: Mapping[str, Any] = LLAMA, which: Callable[[str], bool] = packed_in_layers
) -> tuple[Path, Path]:
    theirs, plain = tensors_of(case, raw, which=which)
    return write(to / "packed", theirs, {**raw, "quantization_config": case.config}), write(to / "plain", plain, raw)


def sources(packed_folder: Path, plain_folder: Path) -> tuple[Any, Any]:
    arch = architecture(read_config(plain_folder))
    return open_source(packed_folder, arch), open_source(plain_folder, arch)


# --- every layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "gptq-act-order",
        "gptq-8-order",
        "gptq-3-order",
        "gptq-2-sym-order",
        "awq",
        "nf4-double",
        "llm-int8",
        "ct-int4-affine",
        "ct-fp8-block",
        "fp8-block",
        "mxfp4",
    ],
)
@pytest.mark.some_rows
def test_the_logits_are_those_of_the_matrices_that_the_layout_means(case: str, tmp_path: Path) -> None:
    """Of each method, layers in stacks."""
    theirs, plain = folders(CASES[case][0], tmp_path)
    expected = jaxengine.load(plain, form="scan").logits(TOKENS)
    assert 0.3 < np.abs(expected).max() < 30
    model = jaxengine.load(theirs, form="scan")
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=ATOL, rtol=0)


def orders_of(folder: Path) -> dict[str, np.ndarray]:
    """{module: the order of columns that puts each of its groups together}."""
    with Reader.open(folder) as reader:
        found = {n: reader.read(n) for n in reader.names if n.endswith("g_idx")}
    orders = {n.rpartition(".")[0]: np.argsort(g, kind="stable") for n, g in found.items()}
    return {n: o for n, o in orders.items() if (np.diff(o) != 1).any()}


@each_case
@pytest.mark.some_rows
def test_every_matrix_is_the_layouts_own(case: str, tmp_path: Path) -> None:
    """In float32, of what the layout means in float64: roundings of scale and product alone."""
    this, wanted = CASES[case]
    orders = orders_of(folders(this, tmp_path)[0])
    quantised, plain = sources(tmp_path / "packed", tmp_path / "plain")
    with quantised, plain:
        for name, spec in quantised.architecture.specs().items():
            leaf, exact = quantised.read(name), plain.read(name).astype(np.float64)
            if orders and name.endswith((".gate", ".up", ".down")):
                # what `down` reads is made in the order of its columns
                order = orders[f"model.{name.rpartition('.')[0]}.mlp.down_proj"]
                exact = exact[:, order] if name.endswith("down") else exact[order]
            text = quantised.plan.format_of(name, spec)
            if name.startswith("layers.") and spec.out is not None and not (orders and name.endswith("down")):
                assert text == wanted
            if not isinstance(leaf, Weight):
                np.testing.assert_array_equal(leaf, exact.astype(np.float32), err_msg=name)
                continue
            assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(leaf))
            planned = abstract_leaf(text, spec.shape, spec.out, quantised.plan.dtype)
            assert jax.tree.structure(planned) == jax.tree.structure(leaf)
            for p, a in zip(jax.tree.leaves(planned), jax.tree.leaves(leaf), strict=True):
                assert (p.shape, p.dtype) == (a.shape, a.dtype)
            assert (np.abs(np.asarray(leaf.dense(), np.float64) - exact) <= 8 * U * np.abs(exact).max()).all(), name


# --- joined rows, orders, groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gptq-act-order", "awq", "nf4-double", "ct-int4-affine", "fp8-block"])
def test_parts_of_a_joined_matrix(case: str, tmp_path: Path) -> None:
    """phi3 stores q, k and v as one tensor, gate and up as another: each part is its own rows."""
    raw = PHI3 | {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 128}
    orders = orders_of(folders(CASES[case][0], tmp_path, raw)[0])
    quantised, plain = sources(tmp_path / "packed", tmp_path / "plain")
    with quantised, plain:
        for part in ("q", "k", "v", "gate", "up", "o"):
            leaf, exact = quantised.read(f"layers.1.{part}"), plain.read(f"layers.1.{part}").astype(np.float64)
            if orders and part in ("gate", "up"):
                exact = exact[orders["model.layers.1.mlp.down_proj"]]
            assert (np.abs(np.asarray(leaf.dense(), np.float64) - exact) <= 8 * U * np.abs(exact).max()).all(), part


def test_a_part_that_begins_inside_a_block_is_refused(tmp_path: Path) -> None:
    theirs, plain = folders(CASES["fp8-block"][0], tmp_path, PHI3)  # k is 64 rows
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.k is rows 128 to 192 of .*qkv_proj\.weight, which has one scale"
    ):
        open_source(theirs, architecture(read_config(plain)))


def test_the_order_of_a_feed_forward_block_is_absorbed(tmp_path: Path) -> None:
    """Biases of gate and up are put in the order of down's columns too, and down has no gather; q, k, v and o keep theirs."""
    raw = LLAMA | {"mlp_bias": True, "attention_bias": True}
    theirs, plain = folders(CASES["gptq-act-order"][0], tmp_path, raw)
    model = jaxengine.load(theirs, form="scan")
    np.testing.assert_allclose(
        model.logits(TOKENS), jaxengine.load(plain, form="scan").logits(TOKENS), atol=ATOL, rtol=0
    )
    ordered = dict(model.plan.weight_rules)
    assert model.plan.weights.endswith("act_order=true")
    assert {n for n, f in ordered.items() if "act_order" not in f} == {f"layers.*.{n}" for n in ("down",)}
    with open_source(theirs, architecture(raw)) as source:
        assert source.read("layers.0.down").perm is None
        assert source.read("layers.0.q").perm is not None


def test_a_mesh_splits_an_absorbed_order(tmp_path: Path) -> None:
    """Rows of gate and up, and columns and groups of down, each to the device that has the other."""
    theirs, plain = folders(CASES["gptq-act-order"][0], tmp_path)
    split = jaxengine.load(theirs, form="scan", mesh="data=4,tensor=2", sharding="tensor")
    down, gate = (split.params["banks"][0].weights[0][n] for n in ("down", "gate"))
    assert down.perm is None
    assert down.codes.sharding.shard_shape(down.codes.shape)[-1] * 2 == down.codes.shape[-1]
    assert gate.codes.sharding.shard_shape(gate.codes.shape)[1] * 2 == gate.codes.shape[1]
    expected = jaxengine.load(plain, form="scan").logits(TOKENS)
    np.testing.assert_allclose(split.logits(TOKENS), expected, atol=ATOL, rtol=0)


def test_an_order_in_one_layer_is_one_in_all_of_the_stack(tmp_path: Path) -> None:
    tensors, plain = tensors_of(CASES["gptq-act-order"][0], LLAMA)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.g_idx"] = np.arange(128, dtype=np.int32) // 32
    plain[f"{name}.weight"] = packed.gptq(
        {n: tensors[f"{name}.{n}"] for n in ("qweight", "qzeros", "scales")}, 128, 128, 4, 32
    )
    config = CASES["gptq-act-order"][0].config
    with open_source(
        write(tmp_path / "m", tensors, LLAMA | {"quantization_config": config}), architecture(LLAMA)
    ) as source:
        leaf = source.read("layers.0.q")
        np.testing.assert_array_equal(leaf.perm, np.arange(128))
        np.testing.assert_allclose(leaf.dense().reshape(128, 128), plain[f"{name}.weight"], rtol=1e-6, atol=0)
        assert source.plan.weights.endswith("act_order=true")


def test_gptq_without_an_order_has_no_gather(tmp_path: Path) -> None:
    """A g_idx that says what is so without it."""
    theirs, plain = folders(CASES["gptq"][0], tmp_path)
    with open_source(theirs, architecture(read_config(plain))) as source:
        assert "act_order" not in source.plan.weights
        assert source.plan.weight_rules == ()


def test_gptqs_first_version_borrows_and_carries(tmp_path: Path) -> None:
    """One was taken from whole words when it was written, so a zero point of 0 borrowed from its neighbour."""
    second = CASES["gptq-v2"][0]
    tensors, _ = tensors_of(second, LLAMA)
    first = {
        n: (t.view(np.uint32) - np.uint32(0x11111111)).view(np.int32) if n.endswith("qzeros") else t
        for n, t in tensors.items()
    }
    assert any(((t.view(np.uint32) & 15) == 0).any() for n, t in tensors.items() if n.endswith("qzeros"))
    arch = architecture(LLAMA)
    a = write(tmp_path / "v2", tensors, LLAMA | {"quantization_config": second.config})
    b = write(tmp_path / "v1", first, LLAMA | {"quantization_config": CASES["gptq"][0].config})
    with open_source(a, arch) as new, open_source(b, arch) as old:
        for name in arch.specs():
            for x, y in zip(jax.tree.leaves(new.read(name)), jax.tree.leaves(old.read(name)), strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize(("group", "ours"), [(96, 32), (512, 256), (384, 128), (48, 16)])
def test_groups_that_are_no_power_of_two(group: int, ours: int, tmp_path: Path) -> None:
    raw = LLAMA | {"hidden_size": group, "intermediate_size": 2 * group, "num_attention_heads": 2, "head_dim": 48}
    raw |= {"num_key_value_heads": 2}

    def which(name: str) -> bool:
        return name.endswith("down_proj.weight")

    theirs, plain = folders(gptq(group=group), tmp_path, raw, which)
    quantised, dense = sources(theirs, plain)
    with quantised, dense:
        leaf, exact = quantised.read("layers.0.down"), dense.read("layers.0.down")
        assert leaf.group_size == ours
        np.testing.assert_allclose(leaf.dense(), exact, rtol=4 * U, atol=0)


# --- what else stands in such folders ----------------------------------------------------------------------------------


def test_a_module_of_its_own_bits_and_a_plain_one(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`; and lm_head packed too."""
    eight, four = gptq(8, 64, sym=True), gptq(4, 32, sym=True)
    tensors, plain = tensors_of(four, LLAMA, which=lambda n: packed_in_layers(n) or n == "lm_head.weight")
    rng = np.random.default_rng(5)
    for layer in range(2):
        name, shape = f"model.layers.{layer}.mlp.down_proj", (128, 256)
        parts = eight.make(rng, *shape)
        tensors |= {f"{name}.{part}": t for part, t in parts.items()}
        plain[f"{name}.weight"] = eight.dense(parts, *shape).astype(np.float32)
        name = f"model.layers.{layer}.self_attn.k_proj"
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = plain[f"{name}.weight"]
    dynamic = {r"-:.*k_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    config = four.config | {"dynamic": dynamic, "lm_head": True}
    theirs = write(tmp_path / "packed", tensors, LLAMA | {"quantization_config": config})
    expected = jaxengine.load(write(tmp_path / "plain", plain, LLAMA), form="scan").logits(TOKENS)
    model = jaxengine.load(theirs, form="scan")
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=ATOL, rtol=0)
    four_bits = "int4:group_size=32,scale=float16"
    assert model.plan == Plan(
        dtype="float32", weights=four_bits, form="scan",
        weight_rules=(("lm_head", four_bits), ("layers.*.down", "int8:group_size=64"), ("layers.*.k", "dense")),
    )  # fmt: skip


def test_biases_that_only_the_packed_form_has(tmp_path: Path) -> None:
    tensors, _ = tensors_of(CASES["gptq"][0], LLAMA)
    raw = LLAMA | {"quantization_config": CASES["gptq"][0].config}
    bias = "model.layers.0.mlp.up_proj.bias"
    tensors[bias] = np.zeros(256, np.float16)
    open_source(write(tmp_path / "zeros", tensors, raw), architecture(raw)).__exit__(None, None, None)
    tensors[bias] = np.ones(256, np.float16)
    with pytest.raises(CheckpointError, match=r"(?s)Unexpected \(1\).*up_proj\.bias"):
        open_source(write(tmp_path / "ones", tensors, raw), architecture(raw))


def test_through_orbax_and_out_as_plain_weights(tmp_path: Path) -> None:
    theirs, plain = folders(CASES["gptq-act-order"][0], tmp_path)
    model = jaxengine.load(theirs, home="host")
    expected = model.logits(TOKENS)
    new = [m.generate([TOKENS], max_new_tokens=4)[0].tokens for m in (model, jaxengine.load(plain, home="host"))]
    assert new[0] == new[1]
    model.save(tmp_path / "orbax", format="orbax")
    again = jaxengine.load(tmp_path / "orbax", home="host")
    assert again.plan == model.plan
    np.testing.assert_array_equal(again.logits(TOKENS), expected)
    convert(theirs, tmp_path / "hf", to="hf")
    assert "quantization_config" not in read_config(tmp_path / "hf")
    np.testing.assert_allclose(jaxengine.load(tmp_path / "hf", home="host").logits(TOKENS), expected, atol=ATOL, rtol=0)


def test_the_packed_format_is_kept(tmp_path: Path) -> None:
    theirs, _ = folders(CASES["awq"][0], tmp_path)
    with pytest.raises(CheckpointError, match=r"stored as 'int4.*and the plan asks for 'int8'"):
        jaxengine.load(theirs, weights="int8")


def test_the_dtype_is_configs_or_the_scales(tmp_path: Path) -> None:
    raw = {k: v for k, v in LLAMA.items() if k != "dtype"}
    theirs, plain = folders(CASES["awq"][0], tmp_path, raw)
    arch = architecture(read_config(plain))
    with open_source(theirs, arch) as source:
        assert source.plan.dtype == "float16"
        assert source.dtype("layers.0.q") == np.float16
        assert source.dtype("embedding") == np.float32


# --- what is refused ---------------------------------------------------------------------------------------------------

GPTQ, AWQ, CT = (CASES[n][0].config for n in ("gptq", "awq", "ct-int4"))
WEIGHTS = CT["config_groups"]["group_0"]["weights"]


def ct(**changed: Any) -> dict[str, Any]:
    return ct_config("pack-quantized", WEIGHTS | changed)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "aqlm"}, r"quant_method 'aqlm' is not read; read are auto-round, awq, .*, mxfp4"),
        ({"quant_method": "gtpq"}, r"Nearest: 'gptq'"),
        ({"bits": 4}, "quant_method None is not read.*None is named: say which one packed it"),
        ({"bits": 4, "desc_act": False}, "quant_method None is not read.*None is named: 'gptq' has desc_act"),
        ("int4", "it is an object with a quant_method"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' needs group_size"),
        (GPTQ | {"bits": 5}, "bits 5; read are 2, 3, 4, 8"),
        (GPTQ | {"bits": "4"}, "bits is '4'; it is int"),
        (GPTQ | {"group_size": 0}, "group_size is 0; it is -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin'; read are 'gptq', 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "'marlin'"),
        (AWQ | {"version": "gemv"}, "version 'gemv'; read are 'gemm'"),
        (AWQ | {"bits": 8}, "bits 8; read are 4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4'; read are 'nf4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; it is two sizes"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}, "'mx_fp'; read are 'int'"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "act_bits": 8}, "act_bits is 8; only weights are read"),
        (ct(num_bits=5), "num_bits 5; read are 2, 3, 4, 8"),
        (ct(num_bits=8, symmetric=False), "of 8 bits and symmetric is false"),
        (ct(strategy="block"), "strategy 'block'"),
        (CT | {"format": "marlin-24"}, "format 'marlin-24'; read are 'pack-quantized'"),
        (CT | {"config_groups": {}}, "config_groups is empty"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (CT | {"transform_config": {"config_groups": {}}}, "transform_config"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_not_read(config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: quantization_config.*{said}"):
        architecture(LLAMA | {"quantization_config": config})


DOWN = "model.layers.1.mlp.down_proj"
Tensors = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("gptq", lambda t: t.pop(f"{DOWN}.scales"),
         r": one matrix does not fit (?s:.*)down_proj\.scales is not in .*: a matrix of 128 outputs and 256 inputs in 4 bits"
         r" with group_size 32 needs a GPTQ scale of that name"),
        ("gptq", lambda t: t.pop(f"{DOWN}.qzeros"), r"down_proj\.qzeros is not in"),
        ("gptq", lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:-1]}),
         r"down_proj\.qweight is \[31, 128\]; a matrix of 128 outputs and 256 inputs in 4 bits .* needs \[32, 128\]"),
        ("gptq", lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].astype(np.float64)}), r"scales is float64"),
        ("gptq-act-order", lambda t: t.update({f"{DOWN}.g_idx": np.zeros(256, np.int32)}), "puts 256 inputs into group 0"),
        ("gptq-act-order", lambda t: t.update({f"{DOWN}.g_idx": np.full(256, 99, np.int32)}), "names groups 99 to 99"),
        ("awq", lambda t: t.pop(f"{DOWN}.qzeros"), r"down_proj\.qzeros is not in"),
        ("awq", lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:, :-1]}),
         r"down_proj\.qweight is \[256, 15\]; a matrix of 128 outputs and 256 inputs in 4 bits .* needs \[256, 16\]"),
        ("awq", lambda t: t.update({f"{DOWN}.qweight": np.ascontiguousarray(t[f"{DOWN}.qweight"].T)}),
         r"down_proj\.qweight is \[16, 256\]; .* needs \[256, 16\]"),
        ("nf4", lambda t: t.pop(f"{DOWN}.weight.absmax"), r"down_proj\.weight\.absmax is not in"),
        ("nf4", lambda t: t.pop(f"{DOWN}.weight.quant_state.bitsandbytes__nf4"), r"bitsandbytes__nf4 is not in"),
        ("nf4", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:-1]}), "needs 16384 bytes in one column"),
        ("nf4", lambda t: t.update({f"{DOWN}.weight.quant_map": np.zeros(16, np.float32)}), "another table than NF4"),
        ("llm-int8", lambda t: t.pop(f"{DOWN}.SCB"), r"down_proj\.SCB is not in"),
        ("ct-int4", lambda t: t.update({f"{DOWN}.weight_shape": np.array([128, 255])}), r"says \[128, 255\]"),
        ("ct-int4", lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"][:, 1:]}),
         r"weight_packed is \[128, 31\]; a matrix of 128 outputs and 256 inputs in 4 bits .* needs \[128, 32\]"),
        ("ct-int4", lambda t: t.pop(f"{DOWN}.weight_scale"), r"weight_scale is not in .*: a matrix of 128 .* needs a scale"),
        ("ct-int4-affine", lambda t: t.pop(f"{DOWN}.weight_zero_point"), r"weight_zero_point is not in"),
        ("ct-int8", lambda t: t.pop(f"{DOWN}.weight_scale"), r"weight_scale is not in"),
        ("fp8-block", lambda t: t.pop(f"{DOWN}.weight_scale_inv"), r"weight_scale_inv is not in"),
        ("fp8-block", lambda t: t.update({f"{DOWN}.weight_scale_inv": np.ones((2, 2), np.float32)}),
         r"is \[2, 2\]; .*needs \[1, 2\]"),
        ("mxfp4", lambda t: t.pop(f"{DOWN}.weight_scales"), r"weight_scales is not in"),
        ("mxfp4", lambda t: t.update({f"{DOWN}.weight_blocks": t[f"{DOWN}.weight_blocks"][:, :-1]}),
         r"weight_blocks is \[128, 7, 16\]; a matrix of 128 outputs and 256 inputs in MXFP4 needs \[128, 8, 16\]"),
        ("mxfp4", lambda t: t.update({f"{DOWN}.weight_blocks": t[f"{DOWN}.weight_blocks"].reshape(128, 128)}),
         r"weight_blocks is \[128, 128\]; .* needs \[128, 8, 16\]"),
        ("mxfp4", lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj_blocks": np.zeros((4, 256, 4, 16), np.uint8)}),
         r"gate_up_proj_blocks is \[4, 256, 4, 16\], the matrices of 4 experts: no family that is read here has experts"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    case: str, change: Callable[[Tensors], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = CASES[case][0]
    tensors, _ = tensors_of(this, LLAMA)
    change(tensors)
    theirs = write(tmp_path / "m", tensors, LLAMA | {"quantization_config": this.config})
    monkeypatch.setattr(jax, "device_put", lambda *given, **how: pytest.fail("something was placed"))
    with pytest.raises(CheckpointError, match=said):
        jaxengine.load(theirs)


@pytest.mark.parametrize(
    ("raw", "config", "said"),
    [
        (LLAMA | {"hidden_size": 96, "head_dim": 32}, gptq(group=64).config, r"96 inputs, and group_size 64 does not divide"),
        (LLAMA, awq(48).config, r"128 inputs, and group_size 48 does not divide them; 16 would"),
    ],
)  # fmt: skip
def test_a_group_that_does_not_divide(raw: dict[str, Any], config: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors, _ = tensors_of(gptq(), raw)
    with pytest.raises(CheckpointError, match=said):
        jaxengine.load(write(tmp_path / "m", tensors, raw | {"quantization_config": config}))


@pytest.mark.parametrize(
    ("case", "config", "said"),
    [
        ("gptq", gptq(8, sym=True).config, r"qweight is \[16, 128\]; .* in 8 bits .* needs \[32, 128\]: bits 4 would fit"),
        ("gptq", gptq(group=64).config, r"scales is \[4, 128\]; .* needs \[2, 128\]: group_size 32 would fit"),
        ("gptq", gptq(group=-1).config, r"scales is \[4, 128\]; .* needs \[1, 128\]: group_size 32 would fit"),
        ("gptq", awq().config, r"qweight is \[16, 128\]; .* needs \[128, 16\]: quant_method 'gptq' would fit"),
        ("awq", gptq().config, r"qweight is \[128, 16\]; .* needs \[16, 128\]: quant_method 'awq' would fit"),
    ],
)  # fmt: skip
def test_a_config_of_another_checkpoint_is_told_what_would_fit(
    case: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tensors, _ = tensors_of(CASES[case][0], LLAMA)
    with pytest.raises(CheckpointError, match=rf"14 matrices do not fit (?s:.*)q_proj\.{said}; is quantization_config"):
        jaxengine.load(write(tmp_path / "m", tensors, LLAMA | {"quantization_config": config}))


def test_packed_matrices_of_another_size_are_told_no_bits(tmp_path: Path) -> None:
    """Of twice the inputs the words of 4 bits are as many as those of 2 would be."""
    tensors, _ = tensors_of(CASES["gptq"][0], LLAMA)
    raw = LLAMA | {"hidden_size": 256, "head_dim": 32, "quantization_config": CASES["gptq"][0].config}
    with pytest.raises(
        CheckpointError, match=r"q_proj\.qweight is \[16, 128\]; .*: it does not belong to the model of config"
    ):
        jaxengine.load(write(tmp_path / "m", tensors, raw))


def test_packed_matrices_without_a_config_are_told_what_lacks(tmp_path: Path) -> None:
    tensors, _ = tensors_of(CASES["gptq"][0], LLAMA)
    with pytest.raises(
        CheckpointError, match=r"(?s)Missing.*are of packed matrices, and config\.json has no quantization_config"
    ):
        jaxengine.load(write(tmp_path / "m", tensors, LLAMA))


def test_a_matrix_that_is_packed_and_should_not_be(tmp_path: Path) -> None:
    for case, key, entry in (
        ("awq", "modules_to_not_convert", "down_proj"),
        ("ct-int4", "ignore", r"re:.*layers\.1\.mlp\..*"),
        ("gptq", "dynamic", None),
    ):
        this = CASES[case][0]
        tensors, _ = tensors_of(this, LLAMA)
        config = this.config | {key: [entry] if entry else {"-:.*down_proj": {}}}
        with pytest.raises(
            CheckpointError, match=r"down_proj\.weight is packed, and .*quantization_config says that it is not"
        ):
            jaxengine.load(write(tmp_path / case, tensors, LLAMA | {"quantization_config": config}))


def test_nothing_is_packed(tmp_path: Path) -> None:
    _, plain = tensors_of(CASES["gptq"][0], LLAMA)
    with pytest.raises(CheckpointError, match=r"quant_method 'gptq', and no tensor is packed in that way: take"):
        jaxengine.load(write(tmp_path / "m", plain, LLAMA | {"quantization_config": CASES["gptq"][0].config}))


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (
            4,
            "zero points other than 8, 1 to 8, and quantization_config says sym: true of 4 bits; if .* say sym: false there",
        ),
        (
            8,
            "zero points other than 128, 0 to 25[0-9], .* sym: true of 8 bits; 8-bit codes are read symmetric: quantise again",
        ),
    ],
)
def test_zero_points_that_are_not_symmetric(bits: int, said: str, tmp_path: Path) -> None:
    this = gptq(bits, v2=bits == 8)
    tensors, _ = tensors_of(this, LLAMA)
    config = this.config | {"sym": True}
    with pytest.raises(CheckpointError, match=said):
        jaxengine.load(write(tmp_path / "m", tensors, LLAMA | {"quantization_config": config}))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_are_the_middle_however_they_are_written(bits: int, tmp_path: Path) -> None:
    """Less one or as they are beside either checkpoint_format; of 3 bits also as GPTQModel made them from whole words, with
    its numbers in their places and with two of them interchanged."""
    this, O = gptq(bits, sym=True), 128
    half = 2 ** (bits - 1)
    words = [base.pack(np.full((1, O), q, np.uint8), bits)[0] for q in (half, half - 1)]
    if bits == 3:
        at = [
            0b01001001001001001001001001001001,
            0b10010010010010010010010010010010,
            0b00100100100100100100100100100100,
        ]
        middle = words[0].view(np.uint32).reshape(-1, 3)
        words += [(middle - np.array(c, np.uint32)).reshape(-1).view(np.int32) for c in (at, at[::-1])]
    rng = np.random.default_rng(0)
    parts = this.make(rng, O, O)
    exact = this.dense(parts, O, O)
    for n, qzeros in enumerate(words):
        stored = {f"m.{k}": v for k, v in (parts | {"qzeros": np.tile(qzeros, (O // 32, 1))}).items()}
        with Reader.open(write(tmp_path / f"{n}", stored, {})) as reader:
            for version in ("gptq", "gptq_v2"):
                how = method(this.config | {"checkpoint_format": version})
                matrix = how.read(reader, how.describe(reader, "m.weight", O, O), slice(0, O))
                codes = matrix.codes.astype(np.float64) - (0 if bits == 8 else half)
                np.testing.assert_array_equal(codes * np.repeat(matrix.scale.astype(np.float64), 32, 1), exact)


@pytest.mark.parametrize(
    ("quantizer", "refused"),
    [
        (["gptqmodel:5.6.0"], True),
        ("gptqmodel:6.0.3", True),
        (["gptqmodel:6.1.0"], False),
        (["other:1.0"], False),
        (None, False),
    ],
)
def test_3_bit_zero_points_of_a_writer_that_interchanged_them_are_refused(
    quantizer: Any, refused: bool, tmp_path: Path
) -> None:
    """Before GPTQModel's pull request 2763; what it wrote beside 'gptq_v2', or with sym, is right."""
    for v2, sym in ((False, False), (True, False), (False, True)):
        this = gptq(3, sym=sym, v2=v2)
        config = this.config | ({} if quantizer is None else {"meta": {"quantizer": quantizer}})
        stored = {f"m.{k}": v for k, v in this.make(np.random.default_rng(0), 128, 128).items()}
        with Reader.open(write(tmp_path / f"{v2}-{sym}", stored, {})) as reader:
            how, wrong = method(config), refused and not (v2 or sym)
            with pytest.raises(CheckpointError, match=r"interchanged .* GPTQModel 6\.1") if wrong else nullcontext():
                assert how.describe(reader, "m.weight", 128, 128).kind == "int3"


def test_8_bit_codes_with_zero_points_are_refused(tmp_path: Path) -> None:
    this = gptq(8, v2=True)
    tensors, _ = tensors_of(this, LLAMA)
    with pytest.raises(
        CheckpointError, match=r"8-bit codes with zero points \(sym is false\).*of 4, 3 and 2 bits are read"
    ):
        jaxengine.load(write(tmp_path / "m", tensors, LLAMA | {"quantization_config": this.config}))


@pytest.mark.parametrize(
    ("layout", "like"),
    [("auto_round:auto_gptq", "gptq"), ("auto_round:gptqmodel", "gptq-v2"), ("auto_round:auto_awq", "awq")],
)
def test_auto_round_packs_as_others_do(layout: str, like: str, tmp_path: Path) -> None:
    this = CASES[like][0]
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": layout}
    tensors, plain = tensors_of(this, LLAMA)
    for part in [n for n in tensors if n.startswith(f"{DOWN}.")]:
        del tensors[part]
    tensors[f"{DOWN}.weight"] = plain[f"{DOWN}.weight"]
    config |= {"extra_config": {DOWN: {"bits": 16}}}
    with open_source(
        write(tmp_path / "m", tensors, LLAMA | {"quantization_config": config}), architecture(LLAMA)
    ) as source:
        np.testing.assert_array_equal(source.read("layers.1.down"), plain[f"{DOWN}.weight"])
        up = plain["model.layers.0.mlp.up_proj.weight"]
        np.testing.assert_allclose(source.read("layers.0.up").dense(), up, rtol=4 * U, atol=0)


def test_every_method_has_a_case() -> None:
    covered = {c.config["quant_method"] for c, _ in CASES.values()}
    assert covered | {"auto-round", "intel/auto-round"} == set(METHODS)
    assert method({"load_in_8bit": True})  # as older files have it


# --- written compressed ------------------------------------------------------------------------------------------------


def matrix_of(leaf: Any) -> base.Matrix:
    if leaf.codes.ndim == leaf.scale.ndim:
        return base.Matrix(np.asarray(leaf.unpacked()), leaf.scale, leaf.zero, leaf.perm)
    return base.Matrix(leaf.codes, leaf.scale)


WRITTEN = ["int4", "int4:group_size=32,affine=true,act_order=true", "int8", "int8:group_size=64", "int3:group_size=32"]


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_compressed_means_the_same(text: str, tmp_path: Path) -> None:
    """By the oracle, and read again: the same arrays."""
    O, I, bits, rng = 96, 128, int(text[3]), np.random.default_rng(0)
    leaf = jax.tree.map(np.asarray, formats.find(text).encode(rng.normal(size=(O, I)).astype(np.float32), out=1))
    matrix, name = matrix_of(leaf), "m.weight"
    parts = compressed.tensors(name, matrix, bits)
    local = {n.removeprefix("m."): t for n, t in parts.items()}
    exact = packed.packed_integers(local, O, I, bits, symmetric=matrix.zero is None)
    assert (np.abs(np.asarray(leaf.dense(), np.float64) - exact) <= 8 * U * np.abs(exact).max()).all()
    config = compressed.quantization_config({"m": compressed.scheme(matrix, bits)}, ignore=["lm_head"])
    with Reader.open(write(tmp_path / "m", parts, {})) as reader:
        how = method(config)
        again = how.read(reader, how.describe(reader, name, O, I), slice(0, O))
    codes = matrix.codes if bits != 8 or matrix.codes.dtype == np.int8 else (matrix.codes ^ np.uint8(128)).view(np.int8)
    in_order = [m if p is None else m[:, np.argsort(p)] for m, p in ((again.codes, again.perm), (codes, matrix.perm))]
    np.testing.assert_array_equal(*in_order)
    np.testing.assert_array_equal(again.scale.reshape(matrix.scale.shape), matrix.scale)
    assert (again.zero is None) == (matrix.zero is None)
    if again.zero is not None and matrix.zero is not None:
        np.testing.assert_array_equal(again.zero, matrix.zero.astype(np.uint8))


def test_what_cannot_be_written_compressed() -> None:
    codes, scale = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float32)
    with pytest.raises(
        CheckpointError, match=r"m\.weight: a zero point is 7\.5; .*whole ones, 0 to 15\. Export it as plain"
    ):
        compressed.tensors("m.weight", base.Matrix(codes, scale, np.full((4, 2), 7.5)), 4)
    with pytest.raises(CheckpointError, match=r"m\.weight: codes are uint8 up to 16; of 4 bits they are 0 to 15"):
        compressed.tensors("m.weight", base.Matrix(codes + np.uint8(16), scale), 4)
    with pytest.raises(CheckpointError, match=r"scales \[4, 3\] for \[4, 64\] codes; 3 groups must divide"):
        compressed.scheme(base.Matrix(codes, np.ones((4, 3), np.float32)), 4)
    padded = base.Matrix(np.zeros((4, 96), np.uint8), scale)  # of groups of 64, the second half full: not groups of 48
    with pytest.raises(
        CheckpointError, match=r"2 scales a row for 96 inputs in groups of 64.*the last of them not whole"
    ):
        compressed.scheme(padded, 4, 64)
    with pytest.raises(
        CheckpointError, match=r"2 scales a row for 64 inputs in groups of 16, which 4 groups would hold:"
    ):
        compressed.layout("m.weight", base.Matrix(codes, scale), 4, 16)
    assert compressed.scheme(base.Matrix(codes, scale), 4, 32)["group_size"] == 32
    with pytest.raises(CheckpointError, match="no module is packed"):
        compressed.quantization_config({})
    with pytest.raises(CheckpointError, match="one format and one order of columns"):
        compressed.join([base.Matrix(codes, scale), base.Matrix(codes, scale, scale)])
    joined = compressed.join([base.Matrix(codes, scale), base.Matrix(codes, scale)])
    assert (joined.codes.shape, joined.scale.shape, joined.zero) == ((8, 64), (8, 2), None)


def test_schemes_that_differ_name_their_modules() -> None:
    matrix = base.Matrix(np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float32))
    config = compressed.quantization_config({"a": compressed.scheme(matrix, 4), "b": compressed.scheme(matrix, 8)})
    assert [g["targets"] for g in config["config_groups"].values()] == [["a"], ["b"]]
