"""Packed checkpoints that the libraries themselves write, and what those libraries make of ours.

Each library packs a random matrix (or a tiny model's), dequantises it with its own code, and the importer's matrix is held
against that. bitsandbytes and compressed-tensors also open and write whole folders through transformers; auto-round packs
GPTQ's and AWQ's tensors.

Bounds. A library dequantises in some dtype: in float32 the roundings of two products are allowed, 4 u |w|; in bfloat16 or
float16 its own rounding besides, which is 2^-8 or 2^-11 of |w|.
"""

# ruff: noqa: E741  (O outputs, I inputs)

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_quantized_checkpoints import CASES, folders  # noqa: E402

import jaxengine  # noqa: E402
from checkpoints import compressed  # noqa: E402
from checkpoints.quantized import Stored, method  # noqa: E402
from checkpoints.quantized.base import Matrix  # noqa: E402
from checkpoints.safetensors import Reader, write_file  # noqa: E402
from jaxengine import formats, quantized  # noqa: E402
from jaxengine.architecture import Spec, architecture  # noqa: E402
from jaxengine.sources import open_source, read_config  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

U = 2.0**-24
ATOL = 2e-4
O, I = 96, 256
NAME = "m.weight"
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def weight(seed: int = 0, shape: tuple[int, int] = (O, I)) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def numpy_of(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        import ml_dtypes

        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.detach().numpy()


def imported(folder: Path, tensors: dict[str, Any], config: dict[str, Any]) -> tuple[Stored, Matrix, np.ndarray]:
    """What is read of one packed matrix, and its dense form by our format, of rows 32 on (a part of a joined matrix)."""
    folder.mkdir(exist_ok=True)
    arrays = {n: np.ascontiguousarray(numpy_of(t.contiguous())) for n, t in tensors.items()}
    file = folder / "model.safetensors"
    file.unlink(missing_ok=True)
    write_file(file, {n: (a.dtype, a.shape) for n, a in arrays.items()}, lambda n: arrays[n], {"format": "pt"})
    with Reader.open(folder) as reader:
        how = method(config)
        assert {how.owner(n, reader.info(n)) for n in reader.names} == {NAME}
        stored = how.describe(reader, NAME, O, I)
        start = 0 if stored.block else 32
        matrix = how.read(reader, stored, slice(start, O))
        text = quantized._format(stored, stored.scale, affine=stored.affine, order=matrix.perm is not None)
        spec = Spec((O - start, I), ("mlp", "embed"), 1)
        whole = np.full((O, I), np.nan)
        whole[start:] = quantized._pack(text, stored, matrix, spec).dense()
    assert formats.find(text)
    return stored, matrix, whole


def assert_near(found: np.ndarray, theirs: Any, relative: float) -> None:
    exact = theirs.double().numpy()
    rows = ~np.isnan(found).any(1)
    assert rows.sum() in (O, O - 32)
    assert np.abs(exact).max() > 0.1
    assert (np.abs(found - exact) <= relative * np.abs(exact) + 1e-12)[rows].all()


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 256])
def test_bitsandbytes_nf4(nested: bool, block: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight(), blocksize=block, compress_statistics=nested, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    tensors = {NAME: packed, **{f"{NAME}.{n}": t for n, t in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    _, _, found = imported(tmp_path / "m", tensors, config)
    assert_near(found, theirs, 4 * U)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(weight().half())
    theirs = functional.int8_vectorwise_dequant(codes, scale)
    tensors = {NAME: codes, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    _, _, found = imported(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert_near(found, theirs, 4 * U)


# --- compressed-tensors ----------------------------------------------------------------------------------------------

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "group_size": 64, "strategy": "group"}),
    "int4-affine": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
    "int4-rows": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "int3": ("pack-quantized", {"num_bits": 3, "group_size": 32, "strategy": "group"}),
    "int8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-naive": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    layout, given = SCHEMES[name]
    scheme = args.QuantizationScheme(targets=["Linear"], weights=args.QuantizationArgs(**given))
    w, size = weight(), given.get("group_size") or I
    split = w.reshape(1, -1) if given["strategy"] == "tensor" else w.reshape(O, -1, size)
    scale, zero = calculate_qparams(split.amin(-1), split.amax(-1), scheme.weights)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress(packed, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors", "format": layout, "ignore": [],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}},
    }  # fmt: skip
    _, _, found = imported(tmp_path / "m", {f"m.{n}": t for n, t in packed.items()}, config)
    assert_near(found, theirs, 4 * U)


# --- auto-round's packing of GPTQ's and AWQ's tensors ------------------------------------------------------------------


def scales_and_zeros(group: int, *, sym: bool) -> tuple[Any, Any, Any]:
    w = weight()
    split = w.reshape(O, -1, group)
    if sym:
        return w, split.abs().amax(-1) / 7.5, torch.full(split.shape[:2], 8.0)
    scale = (split.amax(-1) - split.amin(-1)) / 15
    return w, scale, torch.round(-split.amin(-1) / scale).clamp(1, 15)


@pytest.mark.parametrize("sym", [True, False])
def test_gptq_as_auto_round_packs_it(sym: bool, tmp_path: Path) -> None:
    qlinear = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    w, scale, zero = scales_and_zeros(64, sym=sym)
    linear = torch.nn.Linear(I, O, bias=False)
    linear.weight.data = w
    layer = qlinear.QuantLinear(4, 64, I, O, bias=False)
    layer.pack(linear, scale, zero, None, device="cpu")
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 64,
        "sym": sym,
        "packing_format": "auto_round:auto_gptq",
    }
    tensors = {f"m.{n}": getattr(layer, n) for n in ("qweight", "qzeros", "scales")}
    _, _, found = imported(tmp_path / "m", tensors, config)
    layer.post_init()
    theirs = layer(torch.eye(I)).T  # every column of the matrix, through their own product
    assert_near(found, theirs, 2.0**-10)  # scales and result in float16


def test_awq_as_auto_round_packs_it(tmp_path: Path) -> None:
    awq = pytest.importorskip("auto_round.export.export_to_awq.utils")
    w, scale, zero = scales_and_zeros(64, sym=False)
    linear = torch.nn.Linear(I, O, bias=False)
    linear.weight.data = w
    layer = awq.WQLinear_GEMM.from_linear(
        linear, 4, 64, scales=scale.T.contiguous(), zeros=zero.T.contiguous(), device="cpu"
    )
    tensors = {f"m.{n}": getattr(layer, n) for n in ("qweight", "qzeros", "scales")}
    theirs = awq.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 64).T
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    _, _, found = imported(tmp_path / "m", tensors, config)
    assert_near(found, theirs, 2.0**-10)


# --- transformers' own dequantisation ----------------------------------------------------------------------------------


def test_fp8_blocks_as_transformers_dequantises_them(tmp_path: Path) -> None:
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes = (weight() * 300).to(torch.float8_e4m3fn)
    scale = torch.rand(1, 2) * 1e-3 + 1e-3
    theirs = fine._dequantize_fp8_weight(codes, scale, (128, 128), torch.float32)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    _, _, found = imported(tmp_path / "m", {NAME: codes, f"{NAME}_scale_inv": scale}, config)
    assert_near(found, theirs, 4 * U)


def test_mxfp4_as_transformers_dequantises_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (O, I // 32, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(118, 124, (O, I // 32), dtype=torch.uint8, generator=generator)
    theirs = mxfp4.convert_moe_packed_tensors(data[None], exponents[None], dtype=torch.float32)[0].T
    _, _, found = imported(
        tmp_path / "m", {f"{NAME}_blocks": data, f"{NAME}_scales": exponents}, {"quant_method": "mxfp4"}
    )
    assert_near(found, theirs, 0.0)


# --- whole folders -----------------------------------------------------------------------------------------------------


def tiny(folder: Path) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits.float().numpy()


@pytest.mark.parametrize("case", ["gptq-8-order", "gptq-3-order", "gptq-2-order"])
def test_gptq_of_other_bits_says_what_its_matrices_say(case: str, tmp_path: Path) -> None:
    """transformers' dense model with the matrices that the layout means, by tests/oracles/packed.py; codes of random bits."""
    theirs, plain = folders(CASES[case][0], tmp_path)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    expected = logits(model)
    assert 0.3 < np.abs(expected).max() < 30
    np.testing.assert_allclose(jaxengine.load(theirs, form="scan").logits(TOKENS), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("double", [False, True])
def test_a_folder_that_bitsandbytes_saved(double: bool, tmp_path: Path) -> None:
    """Saved before it runs: on CPUs with AVX512-BF16 its first call packs the weights anew, scales in bfloat16, which no other
    machine reads. What it says is that of its matrices, dequantised by its own function, in a plain model."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    plain, count = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32), 0
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.to(torch.float32)
            count += 1
    assert count == 7 * plain.config.num_hidden_layers
    expected = logits(plain)
    ours = jaxengine.load(tmp_path / "nf4", form="scan")
    assert ours.plan.weights == "nf4:double=false"
    np.testing.assert_allclose(ours.logits(TOKENS), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        "int4:group_size=32",
        "int4:group_size=32,affine=true,scale=float16",
        "int3:affine=true",
        "int2:scale=float32",
        "int8",
    ],
)
def test_compressed_tensors_reads_what_is_written(text: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = pytest.importorskip("compressed_tensors.quantization")
    bits, grid = int(text[3]), "affine" in text and text[3] != "4"
    leaf = formats.find(text).encode(weight(shape=(O, I)).numpy(), out=1)
    if grid:  # the zero points of these are not whole
        leaf = dataclasses.replace(
            leaf, zero=np.round(np.clip(leaf.zero.astype(np.float32), 0, 2**bits - 1)).astype(leaf.zero.dtype)
        )
    matrix = matrix_of(leaf, O)
    said = compressed.scheme(matrix, bits)
    tensors = {n.removeprefix("m."): torch_of(t) for n, t in compressed.tensors(NAME, matrix, bits).items()}
    scheme = args.QuantizationScheme(targets=["Linear"], weights=args.QuantizationArgs(**said))
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(tensors, scheme)["weight"]
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 4 * U}  # they compute in the scales' dtype
    assert_near(np.asarray(leaf.dense()), theirs, rounding[matrix.scale.dtype.name])


def torch_of(array: np.ndarray) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


@pytest.mark.parametrize("text", ["int4:group_size=32,scale=float32", "int8"])
def test_transformers_opens_what_is_written_compressed(text: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    tiny(tmp_path / "plain")
    ours = jaxengine.load(tmp_path / "plain", weights=text, form="scan")
    expected = ours.logits(TOKENS)
    raw, bits = read_config(tmp_path / "plain"), int(text[3])
    arch, fmt = architecture(raw), formats.find(text)
    tensors, schemes = {}, {}
    with open_source(tmp_path / "plain", arch) as source:
        for name, params in (
            (n, arch.name_table().parts(n, arch.params())) for n in arch.name_table().theirs(arch.params(), 2)
        ):
            array, spec = source.read(params[0]), arch.specs()[params[0]]
            if not params[0].startswith("layers.") or spec.out is None:
                tensors[name] = array
                continue
            leaf = fmt.encode(array, out=spec.out)
            matrix = matrix_of(leaf, int(np.prod(spec.shape[: spec.out])))
            tensors |= compressed.tensors(name, matrix, bits)
            schemes[name.removesuffix(".weight")] = compressed.scheme(matrix, bits)
    folder = tmp_path / "packed"
    folder.mkdir()
    config = compressed.quantization_config(schemes, ignore=["lm_head"])
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    write_file(
        folder / "model.safetensors",
        {n: (t.dtype, t.shape) for n, t in tensors.items()},
        lambda n: tensors[n],
        {"format": "pt"},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any("weight_scale" in n for n in model.state_dict())
    np.testing.assert_allclose(logits(model), expected, atol=ATOL, rtol=0)
    np.testing.assert_allclose(jaxengine.load(folder, form="scan").logits(TOKENS), expected, atol=ATOL, rtol=0)


def matrix_of(leaf: Any, outputs: int) -> Matrix:
    """A Weight's numbers as an exporter takes them: codes, scales and zero points [O, ...]."""
    flat = lambda a: None if a is None else np.asarray(a).reshape(outputs, -1)  # noqa: E731
    if hasattr(leaf, "zero"):
        scale, codes = flat(leaf.scale), flat(leaf.unpacked())
        assert scale is not None
        assert codes is not None
        return Matrix(codes, scale, flat(leaf.zero))
    codes = flat(leaf.codes)
    assert codes is not None
    return Matrix(codes, np.asarray(leaf.scale).reshape(outputs))
