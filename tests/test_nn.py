"""What model files share, against numpy float64 written from the papers' equations.

Tolerances are counted roundings: u = 2^-24 for float32's arithmetic, u_x for the dtype that the result is rounded to.
A library function of float32 (exp, tanh, erf, cos, rsqrt) may be 8 u off, relative to one.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxengine import nn
from jaxengine.nn import Rope, rope_from_config

U = 2.0**-24
FUNCTION = 8 * U
DTYPES = ("float32", "bfloat16", "float16")


def roundoff(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


def f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def normal(*shape: int, seed: int = 0, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --- norms --------------------------------------------------------------------------------------------------------


def norm_bound(D: int, magnitude: np.ndarray, dtype: Any, roundings: int) -> np.ndarray:
    """A mean of D squares, rsqrt and two products in float32, `roundings` to the dtype."""
    return magnitude * ((D + 4) * U + FUNCTION + roundings * roundoff(dtype) * 1.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-3])
def test_rms_norm(offset: float, dtype: str, scale: float) -> None:
    """arXiv:1910.07467, equation 4, with Gemma's 1 + w as a second convention. The mean of squares is float32's:
    100^2 times 16 would already be far from float16's precision, 1000^2 above its range."""
    x, w = scale * normal(2, 3, 16, dtype=dtype), normal(16, seed=1)
    eps = 1e-6
    wide = f64(x)
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    exact = wide / rms * (offset + f64(w))
    found = nn.rms_norm(x, w, eps, offset=offset)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    # Llama's convention rounds x / rms, w and their product; Gemma's rounds once
    bound = norm_bound(16, abs(wide / rms) * (offset + abs(f64(w))), dtype, 1 if offset else 3)
    assert (abs(f64(found) - exact) <= bound).all()


def test_rms_norm_of_large_numbers_in_float16() -> None:
    x = jnp.full((1, 1, 8), 30000, jnp.float16)  # its square is not a float16
    assert (f64(nn.rms_norm(x, jnp.ones(8), 1e-6)) == 1).all()


def test_rms_norm_rounds_as_its_family_does() -> None:
    """In bfloat16: Llama's product is of two bfloat16 numbers; Gemma's is of float32 ones, rounded once."""
    x, w = normal(1, 64, 32, dtype="bfloat16"), normal(32, seed=1)
    y = f64(x) / np.sqrt((f64(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    bf16 = lambda a: a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)  # noqa: E731
    llama, gemma = bf16(bf16(y) * bf16(f64(w))), bf16(y * (1 + f64(w)))
    shifted = bf16(bf16(y) * bf16(1 + f64(w)))
    # float32 rounding may turn a bfloat16 tie: rare, where the wrong convention differs in a tenth of the elements
    assert (f64(nn.rms_norm(x, w, 1e-6)) != llama).mean() < 0.005
    assert (f64(nn.rms_norm(x, w, 1e-6, offset=1.0)) != gemma).mean() < 0.005
    assert (shifted != gemma).mean() > 0.1


def test_rms_norm_takes_a_param_over_more_dims() -> None:
    """A norm over each head, and a Flax Param as it stands in a module."""
    x = normal(2, 3, 4, 8)
    w = nn.vector((8,), ("head_dim",), fill=2.0)
    np.testing.assert_array_equal(nn.rms_norm(x, w, 1e-6), 2 * nn.rms_norm(x, jnp.ones(8), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_layer_norm(weight: bool, bias: bool, dtype: str) -> None:
    """arXiv:1607.06450, equation 4. A mean well away from zero: the variance is of the centred numbers."""
    x = normal(2, 3, 16, dtype=dtype) + 5
    w, b = normal(16, seed=1) if weight else None, normal(16, seed=2) if bias else None
    wide, eps = f64(x), 1e-5
    centred = wide - wide.mean(-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    std = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    size = np.ones(16) if w is None else abs(f64(w))
    # centring is off by (D + 2) u of the largest, which moves the variance at most twice as much, relative to std
    centring = 18 * U * abs(wide).max(-1, keepdims=True) / std
    bound = (centring * (1 + 2 * abs(exact)) + norm_bound(16, abs(exact), "float32", 0)) * size
    exact = exact * (1 if w is None else f64(w)) + (0 if b is None else f64(b))
    bound = bound + 2 * U * abs(exact) + roundoff(dtype) * abs(exact) + roundoff(dtype) * bound
    found = nn.layer_norm(x, w, b, eps)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert (abs(f64(found) - exact) <= bound).all()


# --- activations --------------------------------------------------------------------------------------------------


def gelu(x: float) -> float:
    """x Phi(x), arXiv:1606.08415."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    """The same paper's approximation, section 2."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


WRITTEN = {
    "silu": lambda x: x / (1 + math.exp(-x)),  # arXiv:1702.03118
    "relu": lambda x: max(x, 0.0),
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
}


@pytest.mark.parametrize("name", nn.ACTIVATIONS)
def test_activations(name: str) -> None:
    """x times something in [0, 1] which is at most two functions off."""
    x = np.concatenate([np.linspace(-8, 8, 161), [-30.0, 30.0, 0.0, 1e-6, -1e-6]]).astype(np.float32)
    exact = np.array([WRITTEN[name](float(v)) for v in x])
    found = f64(nn.ACTIVATIONS[name](jnp.asarray(x)))
    assert (abs(found - exact) <= 2 * FUNCTION * abs(x)).all()


def test_the_two_gelus_differ() -> None:
    x = jnp.linspace(-3, 3, 61)
    assert abs(nn.ACTIVATIONS["gelu"](x) - nn.ACTIVATIONS["gelu_new"](x)).max() > 1e-4


def test_softcap() -> None:
    x = np.linspace(-200, 200, 101).astype(np.float32)
    found = f64(nn.softcap(jnp.asarray(x), 30.0))
    exact = np.array([30 * math.tanh(float(v) / 30) for v in x])
    assert (abs(found - exact) <= 30 * (FUNCTION + 3 * U)).all()
    assert nn.softcap(x, None) is x  # type: ignore[arg-type]
    for dtype in DTYPES:
        assert nn.softcap(jnp.ones(2, dtype), 30.0).dtype == jnp.dtype(dtype)


def test_plus_adds_over_trailing_dims() -> None:
    x = normal(2, 3, 4, 8, dtype="bfloat16")
    assert nn.plus(x, None) is x
    b = normal(4, 8, seed=1)
    found = nn.plus(x, nnx.Param(b))
    assert found.dtype == x.dtype
    rounded = f64(b.astype(jnp.bfloat16))[None, None]
    assert (abs(f64(found) - (f64(x) + rounded)) <= roundoff("bfloat16") * 1.01 * abs(f64(x) + rounded)).all()


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gated_mlp(act: str) -> None:
    """down (act(gate h) * up h), arXiv:2002.05202, equation 6."""
    D, F = 8, 12
    h, gate, up, down = normal(2, 3, D), normal(F, D, seed=1), normal(F, D, seed=2), normal(D, F, seed=3)
    wide_h, wide_gate, wide_up, wide_down = map(f64, (h, gate, up, down))
    z, u = wide_h @ wide_gate.T, wide_h @ wide_up.T
    ez, eu = ((D + 1) * U * (abs(wide_h) @ abs(w).T) for w in (wide_gate, wide_up))
    a = np.vectorize(WRITTEN[act])(z)
    ea = 1.13 * ez + 2 * FUNCTION * abs(z)  # both activations' slopes are below 1.13
    hidden = a * u
    ehidden = (abs(a) + ea) * eu + ea * abs(u) + U * abs(hidden)
    bound = (ehidden + (F + 1) * U * (abs(hidden) + ehidden)) @ abs(wide_down).T
    found = nn.gated_mlp(h, gate, up, down, act)
    assert (abs(f64(found) - hidden @ wide_down.T) <= bound).all()


# --- parameters ---------------------------------------------------------------------------------------------------


def test_parameters_carry_their_axes() -> None:
    p = nn.matrix(nnx.Rngs(0), (400, 300), ("mlp", "embed"), out=1, scale=0.5)
    meta = p.get_metadata()
    assert (meta["axes"], meta["out"]) == (("mlp", "embed"), 1)
    w = f64(p.get_value())
    assert w.shape == (400, 300)
    assert p.get_value().dtype == jnp.float32
    # 120000 draws: mean and deviation within five of their own standard deviations
    assert abs(w.mean()) < 5 * 0.5 / math.sqrt(w.size)
    assert abs(w.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * w.size)
    v = nn.vector((7,), ("embed",), fill=1.0)
    assert (v.get_metadata()["axes"], v.get_metadata()["out"]) == (("embed",), None)
    np.testing.assert_array_equal(v.get_value(), np.ones(7))


# --- rotary positions: frequencies --------------------------------------------------------------------------------


def angles(head_dim: int, base: float) -> list[float]:
    """theta_i = base^(-2 i / d), arXiv:2104.09864, section 3.2.2."""
    return [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def assert_frequencies(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)


def test_default_frequencies() -> None:
    found = rope_from_config({"rope_theta": 10000.0}, 16, max_positions=2048)
    assert_frequencies(found.frequencies, angles(16, 10000.0))
    assert found == rope_from_config({"rope_type": "default", "rope_theta": 10000.0}, 16, max_positions=1)
    assert found.factor == 1.0
    assert found.long_frequencies is None
    assert hash(found) == hash(rope_from_config({"rope_theta": 10000.0}, 16, max_positions=2048))


def test_partial_frequencies() -> None:
    found = rope_from_config({"rope_theta": 500.0, "partial_rotary_factor": 0.25}, 32, max_positions=64)
    assert_frequencies(found.frequencies, angles(8, 500.0))


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_linear_frequencies(name: str) -> None:
    """Positions divided by the factor, arXiv:2306.15595."""
    found = rope_from_config({name: "linear", "rope_theta": 10000.0, "factor": 4.0}, 16, max_positions=2048)
    assert_frequencies(found.frequencies, [a / 4 for a in angles(16, 10000.0)])
    assert found.factor == 1.0


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_llama3_frequencies() -> None:
    """By wavelength: short ones as trained, long ones divided by the factor, in between by the number of turns."""
    context, wanted = 8192, []
    for a in angles(128, 500000.0):
        wavelength = 2 * math.pi / a
        if wavelength < context / 4:
            wanted.append(a)
        elif wavelength > context / 1:
            wanted.append(a / 8)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * a / 8 + smooth * a)
    found = rope_from_config(LLAMA3, 128, max_positions=131072)
    assert_frequencies(found.frequencies, wanted)
    plain = angles(128, 500000.0)
    kinds = [f == p for f, p in zip(found.frequencies, plain, strict=True)]
    assert kinds[0]
    assert not kinds[-1]
    assert found.frequencies[-1] == pytest.approx(plain[-1] / 8, rel=1e-12)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 4096}


def turns(i: float, head_dim: int, base: float, context: int) -> float:
    """Of pair i over the trained context, arXiv:2309.00071, equation 15: r = L / wavelength."""
    return context * base ** (-2 * i / head_dim) / (2 * math.pi)


def pair_with(wanted: float, head_dim: int, base: float, context: int) -> float:
    """The real i whose pair would make so many turns, by bisection: turns fall as i grows."""
    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if turns(middle, head_dim, base, context) > wanted else (low, middle)
    return low


@pytest.mark.parametrize("extra", [{}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 2.0}])
@pytest.mark.parametrize(("head_dim", "base"), [(128, 10000.0), (64, 1e6)])
def test_yarn_frequencies(extra: dict[str, Any], head_dim: int, base: float) -> None:
    """NTK by parts: pairs of many turns as trained, pairs of few divided by the factor, and between them a ramp over the
    pair's number (as the authors' code has it, from the pair at beta_fast turns, floored, to that at beta_slow, ceiled).
    """
    context, factor = 4096, 16.0
    fast, slow = extra.get("beta_fast", 32.0), extra.get("beta_slow", 1.0)
    first, last = (pair_with(n, head_dim, base, context) for n in (fast, slow))
    if extra.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    wanted = []
    for i, a in enumerate(angles(head_dim, base)):
        ramp = min(max((i - first) / (last - first), 0.0), 1.0)
        wanted.append(ramp * a / factor + (1 - ramp) * a)
    found = rope_from_config({**YARN, "rope_theta": base, **extra}, head_dim, max_positions=65536)
    np.testing.assert_allclose(found.frequencies, wanted, rtol=1e-9, atol=0)
    for i, (f, a) in enumerate(zip(found.frequencies, angles(head_dim, base), strict=True)):
        if turns(i, head_dim, base, context) > fast:  # equation 18's two outer cases hold whatever the ramp
            assert f == pytest.approx(a, rel=1e-12)
        if turns(i, head_dim, base, context) < slow:
            assert f == pytest.approx(a / factor, rel=1e-12)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({}, 0.1 * math.log(16) + 1),  # the paper's equation 22, sqrt(1/t) on both q and k
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": None}, 0.1 * math.log(16) + 1),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(16) + 1) / (0.1 * math.log(16) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707}, 0.1 * math.log(16) + 1),
    ],
)
def test_yarn_factor(extra: dict[str, Any], wanted: float) -> None:
    assert rope_from_config({**YARN, **extra}, 64, max_positions=65536).factor == pytest.approx(wanted, rel=1e-12)


def test_yarn_stretches_to_what_the_config_can() -> None:
    """Without a factor it is the ratio of the two lengths."""
    explicit = rope_from_config(YARN, 64, max_positions=1)
    p = {n: v for n, v in YARN.items() if n != "factor"}
    assert rope_from_config(p, 64, max_positions=65536) == explicit
    del p["original_max_position_embeddings"]
    same = rope_from_config({**p, "factor": 16.0}, 64, max_positions=4096)
    assert same == explicit


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
    "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 8.0, 32.0],
}  # fmt: skip


def test_longrope_frequencies() -> None:
    """Each pair divided by its own factor, one list for each length; arXiv:2402.13753, section 4 and Phi-3's factor."""
    found = rope_from_config(LONGROPE, 8, max_positions=131072)
    plain = angles(8, 10000.0)
    assert_frequencies(found.frequencies, [a / f for a, f in zip(plain, LONGROPE["short_factor"], strict=True)])
    assert_frequencies(found.long_frequencies, [a / f for a, f in zip(plain, LONGROPE["long_factor"], strict=True)])
    assert found.original_length == 4096
    assert found.factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-12)
    assert rope_from_config({**LONGROPE, "attention_factor": 1.5}, 8, max_positions=131072).factor == 1.5
    assert rope_from_config(LONGROPE, 8, max_positions=4096).factor == 1.0  # nothing is stretched


def test_longrope_of_a_part() -> None:
    partial = {**LONGROPE, "partial_rotary_factor": 0.5}
    found = rope_from_config(partial, 16, max_positions=131072)
    assert_frequencies(
        found.frequencies, [a / f for a, f in zip(angles(8, 1e4), LONGROPE["short_factor"], strict=True)]
    )


def without(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    return {n: v for n, v in parameters.items() if n != name}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, r"'dynamic'.*default, linear, llama3, yarn"),
        ({"rope_type": "Linear", "rope_theta": 1e4, "factor": 2.0}, r"'Linear'.*default, linear"),
        ({"rope_type": "linear", "rope_theta": 1e4}, r"'linear' needs 'factor'"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": None}, r"'linear' needs 'factor'"),
        ({"rope_type": "linear", "factor": 2.0}, r"needs 'rope_theta'.*\['factor', 'rope_type'\]"),
        ({}, r"needs 'rope_theta'"),
        *((without(LLAMA3, n), f"'llama3' needs '{n}'") for n in LLAMA3 if n != "rope_type"),
        *((without(LONGROPE, n), f"'longrope' needs '{n}'") for n in ("short_factor", "long_factor")),
        ({**LONGROPE, "short_factor": [1.0] * 3}, r"short_factor has 3 numbers; head_dim 8 needs 4"),
        ({**LONGROPE, "long_factor": [1.0] * 5}, r"long_factor has 5 numbers; head_dim 8 needs 4"),
        ({**LONGROPE, "partial_rotary_factor": 0.5}, r"short_factor has 4 numbers; .*needs 2"),
    ],
)
def test_rope_parameters_that_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rope_from_config(parameters, 8, max_positions=131072, where="rope_parameters.full_attention")
    assert str(error.value).startswith("config.json: rope_parameters.full_attention")


# --- rotary positions: the rotation -------------------------------------------------------------------------------


def rotated(x: np.ndarray, positions: np.ndarray, frequencies: Any, factor: float = 1.0) -> np.ndarray:
    """Pairs (i, i + half) as complex numbers times factor e^(i p theta), float64; what is left over stays."""
    half = len(frequencies)
    out = f64(x).copy()
    B, T, N, _ = out.shape
    for b, t, n, i in np.ndindex(B, T, N, half):
        pair = complex(out[b, t, n, i], out[b, t, n, i + half])
        turned = pair * factor * cmath.exp(1j * float(positions[b, t]) * frequencies[i])
        out[b, t, n, i], out[b, t, n, i + half] = turned.real, turned.imag
    return out


def rotation_bound(x: np.ndarray, positions: np.ndarray, frequencies: Any, factor: float, dtype: Any) -> np.ndarray:
    """The frequency and the angle are float32: 2 u relative; cos and sin; then two products and a sum, and the dtype."""
    half = len(frequencies)
    wide = abs(f64(x))
    size = factor * (wide[..., :half] + wide[..., half : 2 * half])
    angle = abs(positions)[..., None, None] * np.array(frequencies)
    each = size * (2 * U * angle + FUNCTION + 4 * U + roundoff(dtype))
    return np.concatenate([each, each, np.zeros_like(wide[..., 2 * half :])], axis=-1)


def check_rope(how: Rope, positions: np.ndarray, frequencies: Any, H: int, dtype: str = "float32") -> None:
    x = normal(*positions.shape, 2, H, dtype=dtype)
    found = nn.rope(x, jnp.asarray(positions, jnp.int32), how)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    exact = rotated(x, positions, frequencies, how.factor)
    assert (abs(f64(found) - exact) <= rotation_bound(x, positions, frequencies, how.factor, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: str) -> None:
    frequencies = angles(8, 10000.0)
    check_rope(Rope(tuple(frequencies)), np.array([[0, 1, 2, 50], [7, 3, 4000, 131071]]), frequencies, 8, dtype)


def test_rope_of_a_part_leaves_the_rest() -> None:
    frequencies = angles(4, 10000.0)
    check_rope(Rope(tuple(frequencies)), np.array([[0, 1, 9]]), frequencies, 10)
    x = normal(1, 3, 2, 10, dtype="bfloat16")
    found = nn.rope(x, jnp.array([[0, 1, 9]]), Rope(tuple(frequencies)))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])


def test_rope_scales_cos_and_sin() -> None:
    how = rope_from_config(YARN, 8, max_positions=65536)
    assert how.factor > 1
    check_rope(how, np.array([[0, 5, 6000]]), how.frequencies, 8)


def test_rope_changes_frequencies_row_by_row() -> None:
    """longrope: a row that reaches past the trained length, position 4096 being the first beyond, takes the long ones."""
    how = rope_from_config(LONGROPE, 8, max_positions=131072)
    short, long = how.frequencies, how.long_frequencies
    assert long is not None
    for last, frequencies in ((4095, short), (4096, long), (100000, long)):
        check_rope(how, np.array([[10, last]]), frequencies, 8)
    x = normal(2, 2, 2, 8)
    both = nn.rope(x, jnp.array([[10, 4095], [10, 4096]]), how)
    for row, frequencies in ((0, short), (1, long)):
        positions = np.array([[10, 4095 + row]])
        exact = rotated(x[row : row + 1], positions, frequencies, how.factor)
        bound = rotation_bound(x[row : row + 1], positions, frequencies, how.factor, "float32")
        assert (abs(f64(both[row : row + 1]) - exact) <= bound).all()


def test_rope_keeps_only_distances() -> None:
    """The paper's equation 16: q_m . k_n depends on n - m."""
    how = Rope(tuple(angles(8, 100.0)))
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(m: int, n: int) -> float:
        left, right = (f64(nn.rope(x, jnp.array([[p]]), how)) for x, p in ((q, m), (k, n)))
        return float((left * right).sum())

    assert score(3, 10) == pytest.approx(score(53, 60), abs=1e-4)
    assert abs(score(3, 10) - score(3, 11)) > 1e-2


def test_padding_stays_finite() -> None:
    how = Rope(tuple(angles(8, 10000.0)))
    assert np.isfinite(nn.rope(normal(1, 2, 1, 8), jnp.array([[-1, -1]]), how)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["rms", "rms, offset", "layer", "layer, no bias"])
def test_gradients_of_norms(name: str, dtype: str) -> None:
    """Against numpy float64, of x as it was rounded to the dtype."""
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.normal(size=(3, 5, 64)), dtype) for _ in range(2))
    w, b = (jnp.asarray(rng.normal(size=64), dtype) for _ in range(2))
    norm = {
        "rms": lambda x, w, b: nn.rms_norm(x, w, 1e-6),
        "rms, offset": lambda x, w, b: nn.rms_norm(x, w, 1e-6, offset=1.0),
        "layer": lambda x, w, b: nn.layer_norm(x, w, b, 1e-6),
        "layer, no bias": lambda x, w, b: nn.layer_norm(x, w, None, 1e-6),
    }[name]
    _, back = jax.vjp(norm, x, w, b)
    found = back(g)
    X, G, W = (np.asarray(a, np.float64) for a in (x, g, w))
    centred = X - X.mean(-1, keepdims=True) * name.startswith("layer")
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    unit, scaled = centred * inverse, G * (W + ("offset" in name))
    wanted = scaled - unit * (scaled * unit).mean(-1, keepdims=True)
    wanted = inverse * (wanted - scaled.mean(-1, keepdims=True) * name.startswith("layer"))
    # some roundings of x's dtype, of the gradient and of the unit vector; of w sums of 15
    bound = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found[0], np.float64), wanted, rtol=0, atol=bound * abs(wanted).max())
    of_w = (G * unit).sum((0, 1))
    np.testing.assert_allclose(np.asarray(found[1], np.float64), of_w, rtol=0, atol=15 * bound * abs(G * unit).max())
