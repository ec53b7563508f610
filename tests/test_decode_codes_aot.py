"""The decode step of a whole model with coded weights, compiled for cards that are not there: no matrix stands in it as numbers.

Read from the program: of every array that is written, its dtype and size.
"""

from __future__ import annotations

import math
import re

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


def numbers(card: str, plan: Plan) -> int:
    """Of the largest array of 16 or 32 bits that are a number, in any computation of the decode program but its arguments."""
    with aot.target(aot.CARDS[card]) as target:
        called = programs(ARCH, plan, target.mesh, batch=1, length=32)["decode"]
        text = target.compile(called.program.on("gpu"), *called.static, *target.place(called.abstract)).as_text()
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
    ],
)
def test_no_matrix_is_unpacked_as_a_whole(weights: str, card: str, home: str) -> None:
    assert numbers(card, Plan(dtype="bfloat16", weights=weights, home=home, form="scan")) < LEAST // 2


def test_what_is_read_from_the_program_sees_one() -> None:
    """What no kernel reads, XLA's form unpacks: five bits, in matrices of less than a chunk."""
    assert numbers("H200", Plan(dtype="bfloat16", weights="int5", form="scan")) >= LEAST
