"""Every family against transformers' own numbers: golden files of tiny random checkpoints (scripts/make_goldens.py).

Logits are of order one and float32 throughout; the bound 2e-4 leaves room for another order of summation: some hundred
roundings of 2^-24 relative on the way, of numbers up to a few tens. Greedy tokens must be the same: the golden files hold
no step whose two best logits are closer than 1e-3.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from oracles.golden import GOLDEN, golden

import jaxengine
from jaxengine import technique

CASES = sorted(p.parent.name for p in GOLDEN.glob("*/golden.npz"))
ATOL = 2e-4


def test_every_family_has_a_golden_case() -> None:
    covered = {json.loads((GOLDEN / c / "config.json").read_text())["model_type"] for c in CASES}
    assert covered == set(technique.names("jaxengine.models"))


@pytest.mark.parametrize("case", CASES)
def test_prefill_logits(case: str) -> None:
    prompts, data = golden(case)
    model = jaxengine.load(GOLDEN / case, dtype="float32")
    ragged = model.logits(data["ids"], lengths=data["lengths"].tolist())
    for i, ids in enumerate(prompts):
        np.testing.assert_allclose(
            ragged[i, : len(ids)], data[f"logits_{i}"], atol=ATOL, rtol=0, err_msg=f"row {i} in a batch"
        )
    alone = model.logits(prompts[0])
    np.testing.assert_allclose(alone[0], data["logits_0"], atol=ATOL, rtol=0, err_msg="row 0 alone")


@pytest.mark.parametrize("kv_layout", ["window", "full"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.some_rows
def test_greedy_tokens(case: str, kv_layout: str) -> None:
    prompts, data = golden(case)
    model = jaxengine.load(GOLDEN / case, dtype="float32", kv_layout=kv_layout)
    found = model.generate(prompts, max_new_tokens=16, stop_ids=(), logprobs=0)
    for i, completion in enumerate(found):
        assert completion.tokens == data[f"generated_{i}"].tolist(), f"row {i}"
        z = data[f"step_logits_{i}"].astype(np.float64)
        expected = -np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))  # greedy: the chosen logit is the largest
        np.testing.assert_allclose(completion.logprobs or [], expected, atol=2 * ATOL, rtol=0)
