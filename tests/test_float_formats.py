"""NF4, fp8 and MXFP4 against their papers and specifications: tables, scales, rounding, layout, bytes.

The oracles: the quantiles of the normal distribution in float64 (statistics.NormalDist), a search for the nearest entry
over whole tables in numpy float64, and ml_dtypes for what a bit pattern of fp8, E2M1 or e8m0 stands for. float32 may take
the other of two entries where a number is within a few roundings of half-way: those are left out, and are few.
"""

from __future__ import annotations

import copy
import itertools
import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxengine import formats
from jaxengine.weights import fp8, mxfp4, nf4
from jaxengine.weights._codebook import InShape, group_of
from jaxengine.weights.base import Weight, contract, take
from sharding.mesh import make_mesh

U = 2.0**-24
# QLoRA (arXiv:2305.14314), appendix E
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
FP8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wild(*shape: int, seed: int = 0) -> np.ndarray:
    """Magnitudes over many powers of two, zeros among them."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.exp2(rng.integers(-30, 30, size=shape).astype(np.float64))
    return np.where(rng.random(shape) < 0.05, 0, w).astype(np.float32)


def encoded(module: Any, w: np.ndarray, out: int = 1, **options: Any) -> Any:
    return jax.jit(lambda w: module.encode(w, out=out, **options))(jnp.asarray(w))


_dense = jax.jit(lambda leaf: leaf.dense())
_bound = jax.jit(lambda leaf: leaf.error_bound())


def dense(leaf: Any) -> np.ndarray:
    return f64(_dense(leaf))


def bound_of(leaf: Any) -> np.ndarray:
    return f64(_bound(leaf))


def nearest(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the entry of the table that is nearest to each x, how much nearer it is than any other); float64."""
    distances = np.abs(x[..., None] - np.unique(table))
    two = np.sort(distances, axis=-1)[..., :2]
    return np.unique(table)[distances.argmin(-1)], two[..., 1] - two[..., 0]


def unpacked(words: Any, group: int) -> np.ndarray:
    """Codes [O, K] of words [O, K/4]: word r of group g, bits 4j to 4j + 3, is the code of input g G + r + j G/4."""
    words = np.asarray(words)
    codes = np.zeros((words.shape[0], words.shape[1] * 4), np.uint8)
    for g in range(words.shape[1] * 4 // group):
        for r in range(group // 4):
            for j in range(4):
                codes[:, g * group + r + j * (group // 4)] = (words[:, g * group // 4 + r] >> (4 * j)) & 15
    return codes


def size(leaf: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))


# --- NF4 ----------------------------------------------------------------------------------------------------------


def test_nf4s_table_is_the_papers_and_of_the_normal_distribution() -> None:
    codes = np.arange(16, dtype=np.uint8)[None]
    table = dense(nf4.pack(codes, np.ones((1, 1), np.float32), in_shape=(16,)))[0]
    np.testing.assert_array_equal(table, PUBLISHED)
    # eight positive and seven negative quantiles, evenly spaced in probability up to the mean of 1 - 1/30 and 1 - 1/32,
    # zero, and all of it over the largest
    last, quantile = (1 - 1 / 30 + 1 - 1 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(last, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(last, 0.5, 8)[:-1]]
    exact = np.sort([*above, 0.0, *below]) / max(above)
    # the paper's were computed from probabilities in float32: off by U at most, over the density at the last, 0.072
    np.testing.assert_allclose(table, exact, rtol=0, atol=2 * U / 0.072)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nf4_takes_the_nearest_entry(group_size: int, double: bool) -> None:
    w = np.concatenate([normal(5, 300), wild(5, 300)])
    leaf = encoded(nf4, w, group_size=group_size, double=double)
    groups = np.pad(w, ((0, 0), (0, -300 % group_size))).reshape(10, -1, group_size).astype(np.float64)
    scale = f64(leaf.scale())
    if not double:
        np.testing.assert_array_equal(scale, np.abs(groups).max(-1))
    wanted, slack = nearest(groups / scale[..., None], np.array(PUBLISHED))
    decided = slack > 16 * U
    assert decided.mean() > 0.99
    found = np.array(PUBLISHED)[unpacked(leaf.codes, group_size)].reshape(groups.shape)
    np.testing.assert_array_equal(found[decided], wanted[decided])
    # a scale of 8 bits is read back with one rounding or two, as XLA fuses it, and each number has one more
    np.testing.assert_allclose(dense(leaf), (found * scale[..., None]).reshape(10, -1)[:, :300], rtol=5 * U)


def test_a_tie_goes_to_the_lower_entry() -> None:
    """As in bitsandbytes' quantiser. The largest is 1, so the scale is, and thresholds are their own float32 numbers."""
    between = [(np.float64(a) + b) / 2 for a, b in itertools.pairwise(PUBLISHED)]
    ties = np.array([1.0, *between], np.float32)[None]
    exact = ties[0, 1:].astype(np.float64) == between
    assert exact.sum() >= 3  # some of them are float32 numbers
    codes = unpacked(encoded(nf4, ties, double=False).codes, 16)[0, 1:]
    np.testing.assert_array_equal(codes[exact], np.arange(15)[exact])
    up = unpacked(encoded(nf4, np.nextafter(ties, np.float32(2)).clip(max=1), double=False).codes, 16)[0, 1:]
    np.testing.assert_array_equal(up, np.arange(1, 16))


def test_double_quantisation_is_the_float64_affine_one() -> None:
    """600 groups a row: two whole sections of 256 and a ragged one."""
    w = normal(3, 600 * 32) * np.repeat(np.exp(normal(3, 600, seed=1)), 32, axis=1)
    leaf = encoded(nf4, w, group_size=32)
    assert leaf.absmax.shape == (3, 600)
    assert leaf.step.shape == leaf.least.shape == (3, 3)
    absmax = np.abs(w.reshape(3, 600, 32)).max(-1).astype(np.float64)
    for s in range(3):
        section = absmax[:, 256 * s : 256 * (s + 1)]
        least, step = section.min(-1, keepdims=True), np.ptp(section, axis=-1, keepdims=True) / 255
        np.testing.assert_array_equal(f64(leaf.least)[:, s], least[:, 0])
        np.testing.assert_allclose(f64(leaf.step)[:, s], step[:, 0], rtol=2.0**-19)
        steps = (section - least) / step
        codes = f64(leaf.absmax)[:, 256 * s : 256 * (s + 1)]
        decided = abs(steps % 1 - 0.5) > 255 * 2.0**-19
        assert decided.mean() > 0.99
        np.testing.assert_array_equal(codes[decided], np.round(steps)[decided])
        assert (codes.min(), codes.max()) == (0, 255)
        read = f64(leaf.scale())[:, 256 * s : 256 * (s + 1)]
        assert (abs(read - section) <= step * (0.5 + 2.0**-10)).all()


def test_scales_up_to_float32s_largest_are_read_back_finite() -> None:
    w = np.zeros((1, 64 * 300), np.float32)
    w[0, ::64] = np.linspace(0, 1, 300) * np.finfo(np.float32).max
    leaf = encoded(nf4, w)
    assert np.isfinite(f64(leaf.scale())).all()
    assert np.isfinite(dense(leaf)).all()
    assert (abs(f64(w) - dense(leaf)) <= bound_of(leaf)).all()


def test_double_quantisations_bound_holds_where_scales_differ_most() -> None:
    """Groups of 2^-9 to 1 beside each other: small scales are off by much of themselves, and the bound says so."""
    w = normal(4, 64 * 64) * np.repeat(np.exp2(-np.arange(64) % 10), 64).astype(np.float32)[None]
    leaf = encoded(nf4, w)
    error, bound = abs(f64(w) - dense(leaf)), bound_of(leaf)
    assert (error <= bound).all()
    beyond = abs(w) > abs(dense(leaf)) + 0.2 * bound_of(leaf)
    assert (error[beyond] > 0.5 * bound[beyond]).any()
    alone = without_double(leaf)
    assert (error > bound_of(alone)).any()  # half of what lies between entries would not do


def without_double(leaf: Any) -> Any:
    """The same matrix with its scales read back: without what double quantisation adds to the bound."""
    return nf4.NF4(leaf.codes, leaf.scale(), None, None, leaf.in_shape)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nf4s_error_is_below_int4s(group_size: int) -> None:
    """Mean squared error on normal numbers; int4 rounds to the nearest of steps of max / 7, and of max / 8 clipped."""
    w = normal(64, 4096)
    groups = w.reshape(64, -1, group_size).astype(np.float64)
    largest = np.abs(groups).max(-1, keepdims=True)
    error = {}
    for levels in (7, 8):
        step = largest / levels
        error[levels] = np.square(np.clip(np.round(groups / step), -8, 7) * step - groups).mean()
    found = {d: np.square(dense(encoded(nf4, w, group_size=group_size, double=d)) - w).mean() for d in (True, False)}
    assert found[True] < 0.9 * error[8] < 0.9 * error[7]
    assert abs(found[True] / found[False] - 1) < 1e-3  # the second quantisation costs next to nothing
    if group_size == 64:
        assert abs(found[True] / error[7] - 0.73) < 0.01  # what the file's head says
        assert abs(found[True] / error[8] - 0.86) < 0.01


@pytest.mark.parametrize(
    ("nf", "integer", "wins"),
    [
        ("nf4", "int4", True),  # 4.14 and 4.125 bits
        ("nf4:group_size=32", "int4:group_size=64", True),  # 4.27 and 4.25
        ("nf4:group_size=128,double=false", "int4:group_size=64", False),  # 4.25 each
        ("nf4:double=false", "int4:group_size=32", False),  # 4.5 each
    ],
)
def test_nf4_beside_our_int4_in_equal_bytes(nf: str, integer: str, wins: bool) -> None:
    """The published order is of int4 by max / 7; our steps reach half a code further. Bytes within half a hundredth."""
    w = normal(64, 4096)
    leaves = [formats.find(text).encode(jnp.asarray(w), out=1) for text in (nf, integer)]
    held, other = (sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf)) for leaf in leaves)
    assert abs(held / other - 1) < 0.005
    one, two = (np.square(dense(leaf) - w).mean() for leaf in leaves)
    assert (one < 0.9 * two) if wins else (two < 0.95 * one)


# --- MXFP4 --------------------------------------------------------------------------------------------------------


def exponents(groups: np.ndarray) -> np.ndarray:
    """floor(log2 max) - 2, from frexp's exact parts, clamped to -120."""
    _, e = np.frexp(np.abs(groups).max(-1).astype(np.float64))  # max = m 2^e, m in [0.5, 1)
    return np.maximum(np.where(np.abs(groups).max(-1) > 0, e - 1, -1000) - 2, -120)


def test_mxfp4_is_the_specifications() -> None:
    w = np.concatenate([normal(6, 200), wild(6, 200), normal(2, 200) * np.float32(1e-38)])
    w[0, :32] = np.exp2(np.arange(32) - 20.0)  # a largest that is a power of two
    w[1, 0], w[1, 1:32] = np.nextafter(np.float32(8), np.float32(0)), 0.1  # and one just below
    w[2, :32] = np.array([*E2M1, 0.25, -0.25, 0.75, -0.75, 1.25, 1.75, 2.5, -2.5, 3.5, 5.0, -5.0, 7, -7, 7.99, -0.0, 6])
    leaf = encoded(mxfp4, w)
    groups = np.pad(w, ((0, 0), (0, 24))).reshape(14, 7, 32)
    e = exponents(groups)
    np.testing.assert_array_equal(np.asarray(leaf.scale).astype(int) - 127, e)
    with np.errstate(under="ignore"):
        x = groups.astype(np.float64) * np.exp2(-e[..., None].astype(np.float64))
    assert (abs(x) < 8).all()
    wanted = np.clip(x, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    # subnormal numbers of w are flushed to zero, of no sign
    kept = abs(groups) >= np.finfo(np.float32).tiny
    codes = unpacked(leaf.codes, 32).reshape(groups.shape)
    np.testing.assert_array_equal(codes[kept], wanted.view(np.uint8)[kept])
    assert (E2M1[codes[~kept]] == 0).all()
    scale = np.asarray(leaf.scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(dense(leaf), (E2M1[codes] * scale[..., None]).reshape(14, -1)[:, :200])


def test_mxfp4s_shared_exponent_is_clamped() -> None:
    w = np.array([[3e38] * 32, [-1e-45] * 32, [0] * 32, [2.0**-119] * 32], np.float32)
    leaf = encoded(mxfp4, w)
    np.testing.assert_array_equal(leaf.scale[:, 0], [252, 7, 7, 7])
    np.testing.assert_array_equal(dense(leaf)[:, 0], [6 * 2.0**125, 0, 0, 2.0**-119])


def test_every_e8m0_scale_is_read_as_ml_dtypes_reads_it() -> None:
    scale = np.arange(255, dtype=np.uint8)[:, None]
    leaf = mxfp4.pack(np.full((255, 32), 2, np.uint8), scale, in_shape=(32,))
    wanted = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(dense(leaf)[1:, :1], wanted[1:])
    assert dense(leaf)[0, 0] in (0, 2.0**-127)  # a subnormal number may be flushed


def test_mxfp4s_error_is_above_nf4s() -> None:
    w = normal(64, 2048)
    mx, nf = (np.square(dense(leaf) - w).mean() for leaf in (encoded(mxfp4, w), encoded(nf4, w, group_size=64)))
    assert mx > 1.2 * nf


# --- fp8 ----------------------------------------------------------------------------------------------------------

fp8_options = pytest.mark.parametrize("scale", ["channel", "tensor", "block128"])
fp8_dtypes = pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])


def shared(w: np.ndarray, scale: str) -> np.ndarray:
    """The largest magnitude among those that share w's scale, for each element, in a loop over blocks."""
    rows, columns = {"channel": (1, w.shape[1]), "tensor": w.shape, "block128": (128, 128)}[scale]
    largest = np.zeros(w.shape)
    for o in range(0, w.shape[0], rows):
        for i in range(0, w.shape[1], columns):
            largest[o : o + rows, i : i + columns] = np.abs(w[o : o + rows, i : i + columns]).max()
    return largest


@fp8_options
@fp8_dtypes
def test_fp8_is_the_nearest_float_of_its_dtype(dtype: str, scale: str) -> None:
    """200 x 260: both dims end in a ragged block."""
    w = np.concatenate([normal(100, 260), wild(100, 260)])
    leaf = encoded(fp8, w, dtype=dtype, scale=scale)
    table = np.arange(256, dtype=np.uint8).view(FP8[dtype]).astype(np.float64)
    table = table[np.isfinite(table)]
    s = shared(w, scale) / table.max()
    wanted, slack = nearest(w / s, table)
    decided = slack > 16 * U * abs(wanted) + 1e-12
    assert decided.mean() > 0.99
    found = np.asarray(leaf.codes)
    assert found.dtype == FP8[dtype]
    np.testing.assert_array_equal(f64(found)[decided], wanted[decided])
    np.testing.assert_allclose(dense(leaf), f64(found) * s, rtol=4 * U)
    assert leaf.scale.shape == ((2, 3) if scale == "block128" else (200,))


@fp8_dtypes
def test_fp8_saturates(dtype: str) -> None:
    """A quotient that is rounded above the largest number, and numbers of any size, give no NaN and no infinity."""
    rng = np.random.default_rng(0)
    w = np.exp2(rng.uniform(-90, 128, size=(20000, 1))).astype(np.float32) * np.array([[1, -1, 0.3]], np.float32)
    codes = f64(encoded(fp8, w, dtype=dtype).codes)
    assert np.isfinite(codes).all()
    assert set(abs(codes[:, 0])) == {float(ml_dtypes.finfo(FP8[dtype]).max)}


@fp8_dtypes
def test_casts_from_fp8_are_exact(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(FP8[dtype])
    codes = codes[np.isfinite(codes.astype(np.float32))]
    for wide in ("float32", "bfloat16", "float16"):
        for f in (lambda c, d=wide: c.astype(d), jax.jit(lambda c, d=wide: c.astype(d))):
            np.testing.assert_array_equal(f64(f(jnp.asarray(codes))), codes.astype(np.float64))


def test_a_block_is_of_the_flattened_matrix() -> None:
    """Three heads of 50 outputs, inputs of 2 x 70: blocks end within heads."""
    w = wild(3, 50, 2, 70)
    leaf = encoded(fp8, w, out=2, scale="block128")
    assert leaf.scale.shape == (2, 2)
    flat = encoded(fp8, w.reshape(150, 140), scale="block128")
    np.testing.assert_array_equal(dense(leaf).reshape(150, 140), dense(flat))
    rows = jax.jit(lambda leaf, ids: take(leaf, ids, jnp.float32))
    for ids in ([2, 0], 2, [[1], [2]]):
        np.testing.assert_array_equal(rows(leaf, jnp.array(ids)), dense(leaf)[np.array(ids)])
    x = normal(2, 3, 2, 70)
    y = contract("btij,nhij->btnh", jnp.asarray(x), leaf)
    bound = 160 * U * np.einsum("btij,nhij->btnh", abs(f64(x)), abs(dense(leaf)))
    assert (abs(f64(y) - np.einsum("btij,nhij->btnh", f64(x), dense(leaf))) <= bound).all()


def test_fp8_has_a_bound_relative_to_each_number() -> None:
    """Where int8's is the channel's. A tenth of a thousandth beside 1 is held within a sixteenth, in e4m3."""
    w = np.array([[1.0, 1e-4, 0.0]], np.float32)
    for dtype, relative in (("e4m3", 2.0**-4), ("e5m2", 2.0**-3)):
        leaf = encoded(fp8, w, dtype=dtype)
        error, bound = abs(f64(w) - dense(leaf)), bound_of(leaf)
        assert (error <= bound).all()
        assert (bound[0, :2] <= relative * w[0, :2] * (1 + relative) * 1.001).all()


def test_int8_is_the_more_exact_on_normal_numbers_and_fp8_beside_outliers() -> None:
    """What the head of fp8.py says; int8 is rounding to the nearest of 127 steps up to the row's largest."""
    w = normal(16, 2048)
    beside = w.copy()
    beside[:, 0] = 1000
    error = {}
    for name, m in (("normal", w), ("beside", beside)):
        step = f64(m).max(-1, keepdims=True, initial=-f64(m).min()) / 127
        error[name] = np.square(np.round(f64(m) / step) * step - m)[:, 1:].mean()
        error["fp8 " + name] = np.square(dense(encoded(fp8, m)) - m)[:, 1:].mean()
    assert error["normal"] < 0.3 * error["fp8 normal"]
    assert error["fp8 beside"] < 0.01 * error["beside"]


# --- what is in a format already ----------------------------------------------------------------------------------


def test_packed_codes_are_what_encode_makes() -> None:
    """Numpy in, numpy out, the same tree and the same bytes."""
    w = normal(6, 2, 50)
    for leaf, module, group in (
        (encoded(nf4, w, group_size=32, double=False), nf4, 32),
        (encoded(mxfp4, w), mxfp4, 32),
    ):
        codes = unpacked(leaf.codes, group)[:, :100]
        scale = np.asarray(leaf.absmax if module is nf4 else leaf.scale)
        again = module.pack(codes, scale, in_shape=(2, 50))
        assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(again))
        assert jax.tree.structure(again) == jax.tree.structure(leaf)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert again.shape == (6, 2, 50)
        np.testing.assert_array_equal(dense(again), dense(leaf))


def test_bytes_viewed_as_e8m0_pack_as_well() -> None:
    codes = np.random.default_rng(0).integers(0, 16, size=(4, 64)).astype(np.uint8)
    scale = np.random.default_rng(1).integers(100, 140, size=(4, 2)).astype(np.uint8)
    leaf = mxfp4.pack(codes, scale.view(ml_dtypes.float8_e8m0fnu), in_shape=(64,))
    np.testing.assert_array_equal(dense(leaf), E2M1[codes] * np.exp2(np.repeat(scale, 32, 1) - 127.0))


def test_nf4_of_any_power_of_two_packs() -> None:
    """bitsandbytes has groups of 64 to 4,096; how many scales there are tells which."""
    for group, inputs in ((16, 40), (64, 130), (256, 512), (4096, 8192)):
        codes = np.random.default_rng(0).integers(0, 16, size=(3, inputs)).astype(np.uint8)
        scale = np.abs(normal(3, -(-inputs // group)))
        leaf = nf4.pack(codes, scale, in_shape=(inputs,))
        wanted = np.array(PUBLISHED)[codes] * np.repeat(scale.astype(np.float64), group, 1)[:, :inputs]
        np.testing.assert_allclose(dense(leaf), wanted, rtol=2 * U)


@fp8_dtypes
def test_fp8_packs_with_every_scale(dtype: str) -> None:
    """DeepSeek's weight_scale_inv: element [o, i] is its code times scale[o // 128, i // 128]."""
    codes = wild(130, 300).clip(-400, 400).astype(FP8[dtype])
    for scale in (
        np.float32([0.5]),
        np.array(0.5, np.float32),
        np.abs(normal(130)),
        np.abs(normal(130, 1)),
        np.abs(normal(2, 3)),
    ):
        leaf = fp8.pack(codes, scale, in_shape=(3, 100))
        assert leaf.shape == (130, 3, 100)
        assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(leaf))
        wanted = np.zeros((130, 300))
        for o in range(130):
            for i in range(300):
                s = (
                    scale[o // 128, i // 128]
                    if scale.shape == (2, 3)
                    else scale.reshape(-1)[o if scale.size > 1 else 0]
                )
                wanted[o, i] = codes[o, i].astype(np.float64) * np.float64(s)
        np.testing.assert_allclose(dense(leaf).reshape(130, 300), wanted, rtol=2 * U)
        kind = "block128" if scale.shape == (2, 3) else "channel"
        made = jax.eval_shape(
            lambda w, k=kind: fp8.encode(w, out=1, dtype=dtype, scale=k), np.zeros((130, 3, 100), "f")
        )
        assert jax.tree.structure(made) == jax.tree.structure(leaf)
        assert [a.shape for a in jax.tree.leaves(made)] == [a.shape for a in jax.tree.leaves(leaf)]


C, S = np.zeros((4, 64), np.uint8), np.ones((4, 1), np.float32)
E = np.full((4, 2), 127, np.uint8)
F = np.zeros((4, 64), FP8["e4m3"])


@pytest.mark.parametrize(
    ("pack", "arguments", "in_shape", "said"),
    [
        (nf4.pack, (C.astype(np.int8), S), (64,), "uint8 .* got int8"),
        (nf4.pack, (C + np.uint8(17), S), (64,), "a code is 17; 4 bits hold 0 to 15"),
        (nf4.pack, (C, S), (8, 9), "64 inputs, in_shape .* has 72"),
        (nf4.pack, (C, S[:3]), (64,), "differ in their out dims"),
        (nf4.pack, (C, np.ones((4, 3), np.float32)), (64,), "1 .groups of 64., 2 .groups of 32."),
        (nf4.pack, (C, S.astype(np.float16)), (64,), "absmax is float16"),
        (nf4.pack, (C, S * np.float32(np.inf)), (64,), "inf; it is float32 and finite"),
        (mxfp4.pack, (C, E[:, :1]), (64,), "1 scales for 64 inputs; groups are of 32, which needs 2"),
        (mxfp4.pack, (C, E + np.uint8(128)), (64,), "largest 255; .* below 255"),
        (mxfp4.pack, (C, E.astype(np.float32)), (64,), "scales are float32"),
        (fp8.pack, (C, S), (64,), "codes are uint8; .* View bytes"),
        (fp8.pack, (np.full((4, 64), 127, np.uint8).view(FP8["e4m3"]), S), (64,), "NaN or infinity"),
        (fp8.pack, (np.full((4, 64), 0xFC, np.uint8).view(FP8["e5m2"]), S), (64,), "NaN or infinity"),
        (fp8.pack, (F, S), (63,), "nor in their product"),
        (fp8.pack, (F, S.astype(ml_dtypes.bfloat16)), (64,), "bfloat16 and it is float32"),
        (fp8.pack, (F, np.ones((5,), np.float32)), (64,), r"scale \[5\] .* output \[4\]"),
        (fp8.pack, (F.reshape(2, 1, 128), np.ones((2, 1), np.float32).repeat(3, 1)), (128,), r"scale \[2, 3\]"),
    ],
)
def test_pack_refuses_arrays_that_disagree(pack: Any, arguments: Any, in_shape: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(*arguments, in_shape=in_shape)


def test_a_scale_of_outputs_or_of_blocks_is_asked_for() -> None:
    """Two heads of 128 outputs: two blocks of outputs, and 128 of inputs."""
    codes, scale = np.zeros((2, 128, 128 * 128), FP8["e4m3"]), np.abs(normal(2, 128)) + 1
    with pytest.raises(ValueError, match="fits both"):
        fp8.pack(codes, scale, in_shape=(128 * 128,))
    assert not fp8.pack(codes, scale, in_shape=(128 * 128,), blocks=False).blocks
    assert fp8.pack(codes, scale, in_shape=(128 * 128,), blocks=True).blocks
    with pytest.raises(ValueError, match="one for each block"):
        fp8.pack(codes, scale[:, 0], in_shape=(128 * 128,), blocks=True)


# --- bytes and places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options", "shape", "bits"),
    [
        (nf4, {}, (8, 4096), 4 + 8 / 64 + 64 / 4096),
        (nf4, {}, (8, 16384), 4 + 8 / 64 + 64 / 16384),
        (nf4, {"group_size": 32}, (8, 32, 128), 4 + 8 / 32 + 64 / 4096),
        (nf4, {"double": False}, (8, 4096), 4.5),
        (nf4, {"double": False, "group_size": 128}, (8, 4096), 4.25),
        (mxfp4, {}, (8, 4096), 4.25),
        (fp8, {}, (8, 4096), 8 + 32 / 4096),
        (fp8, {"dtype": "e5m2", "scale": "tensor"}, (8, 4096), 8 + 32 / 4096),
        (fp8, {"scale": "block128"}, (256, 4096), 8 + 32 / 128**2),
    ],
)
def test_bits_per_weight(module: Any, options: dict[str, Any], shape: tuple[int, ...], bits: float) -> None:
    leaf = jax.eval_shape(lambda w: module.encode(w, out=1, **options), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert 8 * size(leaf) / math.prod(shape) == bits


@pytest.mark.parametrize(("inputs", "group"), [(1, 16), (16, 16), (17, 32), (33, 64), (63, 64), (64, 64), (65, 64)])
def test_a_short_row_has_a_short_group(inputs: int, group: int) -> None:
    assert group_of(inputs, 64) == group
    leaf = jax.eval_shape(lambda w: nf4.encode(w, out=1, double=False), np.zeros((2, inputs), np.float32))
    assert leaf.codes.shape == (2, -(-inputs // group) * group // 4)
    assert leaf.absmax.shape == (2, -(-inputs // group))


ALL = [(nf4, {}), (nf4, {"double": False}), (mxfp4, {}), (fp8, {}), (fp8, {"scale": "block128"})]


@pytest.mark.parametrize("split", ["out", "in"])
@pytest.mark.parametrize(("module", "options"), ALL)
def test_a_matrix_split_over_devices_contracts_as_one(module: Any, options: dict[str, Any], split: str) -> None:
    """Every array under the sharding that its axes say, over four devices."""
    w, x = normal(16, 4, 64), jnp.asarray(normal(2, 3, 4, 64, seed=1))
    leaf = encoded(module, w, **options)
    axes = module.leaf_axes(("embed", "heads", "head_dim"), 1, **options)
    mesh = make_mesh("tensor=4", devices=jax.devices()[:4])
    name = {"out": "embed", "in": "heads"}[split]

    def put(a: tuple[str | None, ...], array: jax.Array) -> jax.Array:
        spec = PartitionSpec(*("tensor" if n == name else None for n in a))
        return jax.device_put(array, NamedSharding(mesh, spec))

    placed = jax.tree.map(lambda array, a: put(a, array), leaf, Axes.of(axes))
    assert not placed.codes.sharding.is_fully_replicated
    run = jax.jit(lambda x, w: contract("btnh,dnh->btd", x, w))
    exact = np.einsum("btnh,dnh->btd", f64(x), dense(leaf))
    bound = 280 * U * np.einsum("btnh,dnh->btd", abs(f64(x)), abs(dense(leaf)))
    assert (abs(f64(run(x, placed)) - exact) <= bound).all()


class Axes(tuple):
    """A leaf's names, which tree.map does not take apart."""

    @staticmethod
    def of(tree: Any) -> Any:
        return jax.tree.map(Axes, tree, is_leaf=lambda a: isinstance(a, tuple))


@pytest.mark.parametrize(("module", "options"), ALL)
def test_a_stack_is_a_matrix_for_each_layer(module: Any, options: dict[str, Any]) -> None:
    leaves = [encoded(module, normal(3, 5, 7, seed=s), out=2, **options) for s in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *leaves)
    assert isinstance(stack, Weight)
    assert stack.shape == (2, 3, 5, 7)
    np.testing.assert_allclose(dense(stack), np.stack([dense(leaf) for leaf in leaves]), rtol=4 * U)
    bounds = np.stack([np.broadcast_to(bound_of(leaf), leaf.shape) for leaf in leaves])
    np.testing.assert_allclose(np.broadcast_to(bound_of(stack), stack.shape), bounds, rtol=4 * U)


def test_in_shapes_are_equal_where_a_size_is_not_known_yet() -> None:
    known, other, unknown = InShape((2, 3)), InShape((3, 2)), InShape.any(2)
    assert known == InShape((2, 3))
    assert known != other
    assert known == unknown
    assert unknown == other
    assert known != InShape.any(1)
    assert hash(known) == hash(unknown) == hash(copy.copy(known))
    assert known != 6
    trees = [jax.tree.structure(encoded(mxfp4, normal(1, *s))) for s in ((2, 12), (3, 8))]
    assert trees[0] != trees[1]  # the same arrays, and not the same matrix: jit must not take one for the other
