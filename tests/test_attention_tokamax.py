"""tokamax behind our call: what is refused, and, where it is installed, its form for the CPU against our reference.

Tolerance: both are float32; sums of some 70 products of order one, in another order, and two exponentials.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import attention, reference

THERE = importlib.util.find_spec("tokamax") is not None
by_name = functools.partial(attention, scale=0.2, implementation="tokamax")


def inputs(B: int, T: int, N: int, K: int, H: int, lengths: list[int]) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    at = jnp.arange(T, dtype=jnp.int32)[None]
    at = jnp.where(at < jnp.asarray(lengths, jnp.int32)[:, None], at, -1)
    return q, k, v, at, at


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "does not look at positions; say contiguous=True"),
        ({"contiguous": True, "sinks": np.zeros(4, np.float32)}, "sinks cannot be asked of tokamax"),
        ({"contiguous": True, "return_lse": True}, "the log-sum-exp cannot be asked of tokamax"),
        (
            {"contiguous": True, "q_segments": np.zeros((1, 8), np.int32), "k_segments": np.zeros((1, 8), np.int32)},
            "segments without an array",
        ),
    ],
)
def test_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(dispatch.Refused, match=said):
        by_name(*inputs(1, 8, 4, 2, 16, [8]), **how)


@pytest.mark.skipif(THERE, reason="it is installed")
def test_what_to_install_is_said() -> None:
    with pytest.raises(dispatch.Refused, match=r"tokamax is not installed .*pip install tokamax==.*'xla' serves it"):
        by_name(*inputs(1, 8, 4, 2, 16, [8]), contiguous=True)


@pytest.mark.skipif(not THERE, reason="tokamax is not installed")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0), (20, 3.0)])
def test_it_gives_what_the_reference_gives(window: int | None, softcap: float | None) -> None:
    """Rows of unlike length, two query heads a kv head; forwards, and the gradients of q, k and v."""
    *arrays, q_at, k_at = inputs(3, 67, 4, 2, 32, [67, 40, 1])
    how = {"scale": 0.2, "window": window, "softcap": softcap}

    def run(f: Any, *arrays: Any) -> Any:
        out, pull = jax.vjp(lambda *a: f(*a, q_at, k_at), *arrays)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    found = run(functools.partial(attention, **how, contiguous=True, implementation="tokamax"), *arrays)
    wanted = run(functools.partial(reference.attention, **how), *arrays)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
