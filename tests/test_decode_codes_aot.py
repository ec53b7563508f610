"""A whole model with coded weights, compiled for cards that are not there: in the decode step no matrix stands as numbers, and
many rows are multiplied by XLA's matmul, which is cuBLAS or its own Triton kernel.

Read from the program: of every array that is written, its dtype and size; and what multiplies.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from jaxengine.architecture import architecture
from jaxengine.plan import Plan
from jaxengine.proof import programs
from pallas_kernels import aot

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

D, F, V = 1024, 4096, 64  # embedding and head are not coded, and here small
ARCH = architecture({
    "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
})  # fmt: skip
LEAST = D * D  # numbers of a matrix in a layer


def compiled(card: str, plan: Plan, program: str, length: int, **options: Any) -> str:
    with aot.target(aot.CARDS[card]) as target:
        called = programs(ARCH, plan, target.mesh, batch=1, length=length)[program]
        return target.compile(
            called.program.on("gpu"), *called.static, *target.place(called.abstract), **options
        ).as_text()


def numbers(card: str, plan: Plan) -> int:
    """Of the largest array of 16 or 32 bits that are a number, in any computation of the decode program but its arguments."""
    text = compiled(card, plan, "decode", 32)
    made = re.findall(r"= \(?(?:bf16|f16|f32|s32)\[([\d,]+)\]\S* (?!parameter)\w", text)
    assert made
    return max(math.prod(map(int, shape.split(","))) for shape in made)


@pytest.mark.parametrize("home", ["device", "host"])
@pytest.mark.parametrize(
    ("weights", "card"),
    [
        ("int8", "RTX 4090"),
        ("int4", "H200"),
        ("int4:group_size=32,affine=true", "A100"),
        ("mxfp4", "B200"),
        ("fp8", "H200"),
        ("fp8:scale=block128", "H200"),
        ("nf4", "RTX 4090"),
        ("nf4:double=false", "A100"),
    ],
)
@pytest.mark.some_rows
def test_no_matrix_is_unpacked_as_a_whole(weights: str, card: str, home: str) -> None:
    assert numbers(card, Plan(dtype="bfloat16", weights=weights, home=home, form="scan")) < LEAST // 2


def test_what_is_read_from_the_program_sees_one() -> None:
    """What no kernel reads, XLA's form unpacks: five bits, in matrices of less than a chunk."""
    assert numbers("H200", Plan(dtype="bfloat16", weights="int5", form="scan")) >= LEAST


MATRICES = 7  # of a layer, in a loop over layers
CUBLAS = r'custom_call_target="__cublas\$(?:lt\$matmul|gemm)"'
XLAS_TRITON = r'"kind":"__triton_nested_gemm_fusion"'
OURS = 'custom_call_target="__gpu$xla.gpu.triton"'  # a Pallas kernel


@pytest.mark.parametrize(
    ("weights", "card"), [("nf4", "H200"), ("int4", "A100"), ("fp8:scale=block128", "RTX 4090"), ("mxfp4", "B200")]
)
@pytest.mark.some_rows
def test_many_rows_are_dequantised_for_xlas_matmul(weights: str, card: str) -> None:
    """A prompt of 2,048 tokens. On a card XLA measures cuBLAS and its own Triton kernel and takes the faster; here, where nothing
    can be measured, it takes Triton, and told to leave that out, cuBLAS. Either way no kernel of ours multiplies: the one left
    is attention's."""
    plan = Plan(dtype="bfloat16", weights=weights, form="scan")
    for left_out, used, other in ((False, XLAS_TRITON, CUBLAS), (True, CUBLAS, XLAS_TRITON)):
        text = compiled(card, plan, "prefill", 2048, xla_gpu_enable_triton_gemm=not left_out)
        assert len(re.findall(used, text)) == MATRICES
        assert not re.findall(other, text)
        assert text.count(OURS) == 1


def test_fewer_rows_are_our_kernels() -> None:
    text = compiled("H200", Plan(dtype="bfloat16", weights="int4", form="scan"), "prefill", 256)
    assert not re.findall(f"{CUBLAS}|{XLAS_TRITON}", text)
    assert text.count(OURS) == MATRICES + 1
