"""What a compiled loop of decode steps reads at each step: the weights as they are stored."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxengine.architecture import architecture
from jaxengine.plan import Plan, weight_bytes
from jaxengine.proof import programs
from pallas_kernels import aot

# a vocabulary of which few logits are less than the matrices they are made with
ARCH = architecture({
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
})  # fmt: skip


@pytest.mark.parametrize("weights", ["int8", "int8:group_size=32", "int4:group_size=32", "nf4", "fp8", "mxfp4"])
def test_codes_are_not_turned_into_numbers_ahead_of_the_loop(weights: str) -> None:
    """XLA:CPU would: the loop then reads, and the program holds, four bytes and more for each code."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), aot.AXES)
    plan = Plan(dtype="float32", weights=weights)
    found = programs(ARCH, plan, mesh, batch=1, length=32)["decode"]
    compiled = found.program.on("cpu").lower(*found.static, *found.abstract).compile()
    codes = weight_bytes(ARCH, plan)["layers"]
    assert compiled.memory_analysis().temp_size_in_bytes < codes
