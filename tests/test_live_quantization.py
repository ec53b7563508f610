"""Our quantisers beside those of other libraries, on the same numbers: qwix, torchao and bitsandbytes.

Where the recipe is the same the result is the same number for number; where ours searches, or rounds its scales, the error of
theirs is the bound.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.weights import fp8, int4, int8, nf4

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    qarray = pytest.importorskip("qwix._src.core.qarray")
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")

W = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
U = 2.0**-24


def of_qwix(kind: Any, group_size: int = 0, method: str = "absmax") -> np.ndarray:
    tiles = {1: group_size} if group_size else {}
    how = qarray.HowToQuantize(qtype=kind, channelwise_axes=(0,), tiled_axes=tiles, calibration_method=method)
    return np.asarray(qarray.dequantize(qarray.quantize(jnp.asarray(W), how)))


def of_torchao(affine: bool, group_size: int, low: int, high: int) -> np.ndarray:
    kind = primitives.MappingType.ASYMMETRIC if affine else primitives.MappingType.SYMMETRIC
    block, dtype, w = (1, group_size), torch.uint8 if affine else torch.int8, torch.tensor(W)
    scale, zero = primitives.choose_qparams_affine(w, kind, block, dtype, low, high, eps=1e-12)
    codes = primitives.quantize_affine(w, block, scale, zero, dtype, low, high)
    return primitives.dequantize_affine(codes, block, scale, zero, dtype, low, high).numpy()


def dense(weight: Any) -> np.ndarray:
    return np.asarray(weight.dense())


def rms(found: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(found.astype(np.float64) - W))))


def test_int8_per_channel_is_that_of_torchao() -> None:
    np.testing.assert_allclose(dense(int8.encode(jnp.asarray(W), out=1)), of_torchao(False, 256, -127, 127), rtol=4 * U)


def test_nf4_is_that_of_qwix() -> None:
    ours = nf4.encode(jnp.asarray(W), out=1, group_size=64, double=False)
    np.testing.assert_allclose(dense(ours), of_qwix("nf4", 64), rtol=4 * U)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_per_channel_is_that_of_qwix(kind: str) -> None:
    theirs = of_qwix(jnp.float8_e4m3fn if kind == "e4m3" else jnp.float8_e5m2)
    np.testing.assert_allclose(dense(fp8.encode(jnp.asarray(W), out=1, dtype=kind)), theirs, rtol=4 * U)


@pytest.mark.parametrize("group_size", [0, 32, 128])
def test_int8_loses_no_more_than_qwix(group_size: int) -> None:
    assert rms(dense(int8.encode(jnp.asarray(W), out=1, group_size=group_size))) <= rms(of_qwix(jnp.int8, group_size))


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("affine", [False, True])
def test_int4_loses_no_more_than_others(group_size: int, affine: bool) -> None:
    ours = int4.encode(jnp.asarray(W), out=1, group_size=group_size, affine=affine, scale="float32")
    assert rms(dense(ours)) <= rms(of_qwix(jnp.int4, group_size, "minmax" if affine else "absmax"))
    if affine:
        assert rms(dense(ours)) <= rms(of_torchao(True, group_size, 0, 15))


def test_nf4_with_scales_in_8_bits_loses_what_bitsandbytes_loses() -> None:
    """Both hold scales in 8 bits, by other codes: the two errors are within what such a scale's rounding adds."""
    codes, state = bitsandbytes.quantize_4bit(torch.tensor(W), blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs, ours = bitsandbytes.dequantize_4bit(codes, state).numpy(), dense(nf4.encode(jnp.asarray(W), out=1))
    plain = rms(of_qwix("nf4", 64))
    assert abs(rms(theirs) - plain) < 0.01 * plain
    assert abs(rms(ours) - plain) < 0.01 * plain
