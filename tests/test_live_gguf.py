"""GGUF files that the `gguf` library writes, against its own dequantisation and against transformers over those numbers.

The types that it quantises it makes of normal numbers; of the others, which it takes apart only, blocks are random bits with
small float16 numbers in their places.

Bounds. A scale, a code and, where there is none, the zero are the file's own: the float32 number is exact. A minimum is s z
with z in float32, which is a rounding of z, one of the difference and one of the product: of the largest number at most 16 u.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import jaxengine  # noqa: E402
from checkpoints.gguf import KINDS, Gguf  # noqa: E402
from jaxengine.architecture import architecture  # noqa: E402
from jaxengine.sources import open_source, read_config  # noqa: E402
from jaxengine.weights.base import Weight  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]

U = 2.0**-24
ATOL = 2e-4
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
D, F, N, K, V = 256, 512, 4, 2, 48
# {type: {where in a block a float16 number is: its size}}
SMALL: dict[str, dict[int, float]] = {
    "Q2_K": {80: 0.0025, 82: 0.003}, "Q3_K": {108: 0.0006}, "Q4_K": {0: 0.0002, 2: 0.0015}, "Q5_K": {0: 0.0001, 2: 0.0015},
    "Q6_K": {208: 0.00003}, "IQ4_NL": {0: 0.0005}, "IQ4_XS": {0: 0.00002},
}  # fmt: skip
MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
PACKED = [kind.name for kind in KINDS.values() if kind.dtype is None]


def packed(kind: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the bytes of each row, the numbers that the library makes of them)."""
    rng, qtype = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    if kind not in SMALL:
        raw = gguf.quants.quantize(rng.normal(0, 0.04, shape).astype(np.float32), qtype)
    else:
        inputs, size = gguf.GGML_QUANT_SIZES[qtype]
        raw = rng.integers(0, 256, (shape[0], shape[1] // inputs, size), np.uint8)
        for at, much in SMALL[kind].items():
            drawn = (rng.uniform(0.5, 1.5, (*raw.shape[:2], 1)) * much).astype(np.float16)
            raw[..., at : at + 2] = drawn.view(np.uint8)
        raw = raw.reshape(shape[0], -1)
    return raw, gguf.quants.dequantize(raw, qtype)


def written(path: Path, layers: int, kind_of: Any) -> Any:
    """A llama in a file whose matrices are of the types that kind_of(name, layer) says; transformers' model of its numbers."""
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=N,
        num_key_value_heads=K, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    state = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            state[name] = tensor
            writer.add_tensor(theirs, tensor.numpy())
            continue
        kind = kind_of(theirs.rpartition(".")[0].rpartition(".")[2], seed)
        raw, numbers = packed(kind, tuple(tensor.shape), seed)
        writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        heads = {"q_proj": N, "k_proj": K}.get(name.split(".")[-2])
        if heads:  # the file has the two halves of each head in turns: transformers' own way back
            numbers = numbers.reshape(heads, -1, 2, D).swapaxes(2, 1).reshape(tensor.shape)
        state[name] = torch.from_numpy(np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state)
    return model


def test_every_matrix_is_the_librarys(tmp_path: Path) -> None:
    """All types in one file, each in several places."""
    kinds: dict[str, str] = {}

    def kind_of(name: str, seed: int) -> str:
        del name
        return PACKED[seed % len(PACKED)]

    model = written(tmp_path / "m.gguf", 4, kind_of)
    arch = architecture(read_config(tmp_path / "m.gguf"))
    numbers, table = model.state_dict(), arch.name_table()
    with Gguf(tmp_path / "m.gguf") as file:
        for theirs in table.theirs(arch.params(), 4):
            kinds |= dict.fromkeys(table.parts(theirs, arch.params()), file.kinds[theirs].name)
    assert set(kinds.values()) >= set(PACKED)
    ours = {n: t for t in table.theirs(arch.params(), 4) for n in table.parts(t, arch.params())}
    with open_source(tmp_path / "m.gguf", arch) as source:
        for name, spec in arch.specs().items():
            leaf, exact = source.read(name), numbers[ours[name]].numpy().reshape(spec.shape).astype(np.float64)
            assert isinstance(leaf, Weight) == (spec.out is not None)
            found = np.asarray(leaf.dense() if isinstance(leaf, Weight) else leaf, np.float64)
            bound = 16 * U * np.abs(exact).max() if kinds[name] in MINIMA else 0.0
            assert np.abs(found - exact).max() <= bound, (name, kinds[name])


@pytest.mark.parametrize("given", [{}, {"home": "host"}], ids=str)
def test_mixtures_of_llama_quantize_give_transformers_logits(given: dict[str, Any], tmp_path: Path) -> None:
    """As Q3_K_M and Q4_K_M mix them: half of the layers have more bits for v and down; and a matrix of Q5_0, as where 256
    does not divide the inputs."""

    def kind_of(name: str, seed: int) -> str:
        more = (seed // 9) % 2 == 0
        return {
            "attn_v": "Q6_K" if more else "Q5_K", "ffn_down": "Q6_K" if more else "Q4_K", "attn_output": "Q3_K",
            "attn_k": "Q5_0", "output": "Q6_K",
        }.get(name, "Q4_K")  # fmt: skip

    model = written(tmp_path / "m.gguf", 4, kind_of)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
        wanted = model.generate(torch.tensor([TOKENS]), max_new_tokens=6, do_sample=False)[0, len(TOKENS) :].tolist()
    assert np.abs(expected).max() > 0.1
    ours = jaxengine.load(tmp_path / "m.gguf", dtype="float32", **given)
    np.testing.assert_allclose(ours.logits(TOKENS)[0], expected, atol=ATOL, rtol=0)
    [found] = ours.generate([TOKENS], max_new_tokens=6, stop_ids=())
    assert list(found.tokens) == wanted
