"""A folder that calibration wrote, in transformers: it opens, its matrices are packed there, and its logits are ours.

u = 2^-24. Both compute in float32 with the same decoded weights; a token's logits come through some 40 contractions of
both, each with a rounding of the largest term, so that 256 u of the largest logit holds them apart from another model's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

import jaxengine  # noqa: E402
from jaxengine.calibration.run import Samples, quantize  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_quiet_torch_thread")]


def test_transformers_opens_what_was_calibrated(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2048, (3, 32))
    out = tmp_path / "out"
    quantize(
        jaxengine.demo_folder(), Samples.of(ids), weights="int4:group_size=64,scale=float32", out=out, dtype="float32"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert any("weight_scale" in n for n in theirs.state_dict())
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids[:1])).logits.numpy()
    ours = jaxengine.load(out, dtype="float32", form="scan").logits(ids[:1])
    np.testing.assert_allclose(ours, wanted, atol=256 * 2.0**-24 * np.abs(wanted).max(), rtol=0)
