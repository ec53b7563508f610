"""Large parameters outside the layers, changed by rows: the same numbers as whole, by optax, and less on the device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_finetune import CLOSE, GOLDEN, HOW, losses, moved_by, run_of

import jaxengine
from jaxengine.finetune import layered, rows
from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.rows import Gradient

VOCABULARIES = (
    32000, 32001, 32003, 32064, 49152, 50257, 50272, 65537, 100352, 128256, 128259, 151936, 152064, 250880, 256000, 262144,
    262145,
)  # fmt: skip


@pytest.mark.parametrize("whole", VOCABULARIES)
@pytest.mark.parametrize("columns", [768, 2048, 4096, 4100])
def test_blocks_are_all_rows_once_and_a_loop_of_each_size_turns(whole: int, columns: int) -> None:
    """A loop of one turn is none to XLA, and outside a loop a kernel would read what is in host memory."""
    n = rows.blocks(Optimizer(), (whole, columns), (whole, columns))
    size = 4 * whole * columns
    assert (n > 1) == (size >= 2 * rows.BYTES)
    if n == 1:
        return
    more, few = whole % n, n - whole % n
    assert 1 not in (more, few)
    assert size / n <= 1.5 * rows.BYTES  # and a block is what was meant
    everything = jnp.zeros(whole, jnp.int32)
    found = rows.each_block(lambda block, x: block.put(x, block.cut(x) + 1), n, whole, everything)
    np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize("columns", [64, 96, 100, 2048])
@pytest.mark.parametrize("whole", [2**20, 3 * 2**19, 2**20 + 2])
def test_blocks_of_eight_bits_end_where_scales_do(whole: int, columns: int) -> None:
    n = rows.blocks(Optimizer("adamw8bit"), (whole, columns), (whole, columns))
    at_once = whole // n, whole // n + (whole % n > 0)
    assert n == 1 or all(size * columns % 256 == 0 for size in at_once)
    assert (n > 1) == (whole % (256 // math.gcd(256, columns)) == 0)
    scales = jax.ShapeDtypeStruct((-(-whole * columns // 256),), jnp.float32)
    block = rows.Block(1, at_once[0], 0, whole)
    cut = jax.eval_shape(block.cut, scales)
    assert n == 1 or cut.shape == (at_once[0] * columns // 256,)


def test_what_is_changed_whole() -> None:
    shape = (128256, 4096)
    assert rows.blocks(Optimizer(), shape, shape) > 1
    assert rows.blocks(Optimizer("adafactor"), shape, shape) == 1  # by means of all rows
    assert rows.blocks(Optimizer(), shape, (64128, 4096)) == 1  # rows of several devices
    assert rows.blocks(Optimizer(), shape, (128256, 1024)) > 1
    assert rows.blocks(Optimizer(), shape, (128256, 1024)) < rows.blocks(Optimizer(), shape, shape)
    assert rows.blocks(Optimizer(), (4096,), (4096,)) == 1


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adamw8bit"])
@pytest.mark.parametrize("whole", [448, 450])  # seven blocks of 64, or five and two of one more
def test_rows_change_as_the_whole_does(name: str, whole: int) -> None:
    """Against optax's update of all of it, state too, in two steps: within 16 roundings of numbers of size 1 to 4, as a
    compiler may contract the one and not the other; every number moves by some 0.01 a step. Codes of 8 bits: to the next
    one, of few."""
    how = Optimizer(name, 1e-2, weight_decay=0.1)
    made = how.make(lambda tree: jax.tree.map(lambda _: True, tree), lambda tree: jax.tree.map(lambda _: None, tree))
    rng = np.random.default_rng(0)
    weight, *gradients = (jnp.asarray(rng.standard_normal((whole, 256)), jnp.float32) for _ in range(4))
    state = made.init({"embedding": weight})
    host = gradients[2] / 3

    def use(carry: Any, gradient: Any, weights: Any, held: Any) -> Any:
        updates, held = made.update(gradient, held, weights)
        return carry + optax.tree.norm(gradient, squared=True), optax.apply_updates(weights, updates), held

    @jax.jit
    def by_rows(weight: Any, state: Any, here: Any) -> Any:
        return rows.change(use, jnp.float32(0), "embedding", 7, Gradient(here, host), weight, state)

    @jax.jit
    def at_once(weight: Any, state: Any, here: Any) -> Any:
        squares, changed, state = use(jnp.float32(0), {"embedding": here + host}, {"embedding": weight}, state)
        return squares, changed["embedding"], state

    wanted = weight, state
    for gradient in gradients[:2]:
        squares, *now = by_rows(weight, state, gradient)
        total, *wanted = at_once(*wanted, gradient)
        weight, state = now
        np.testing.assert_allclose(squares, total, rtol=2**-20)
        for one, other in zip(jax.tree.leaves(now), jax.tree.leaves(wanted), strict=True):
            if one.dtype == jnp.uint8:
                assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
                assert np.mean(one != other) < 1e-3
            else:
                np.testing.assert_allclose(one, other, rtol=0, atol=2**-20)


def test_a_gradient_is_the_sum_of_its_parts() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((450, 8)).astype(np.float32) for _ in range(2))
    for gradient, wanted in ((Gradient(a, None), a), (Gradient(None, b), b), (Gradient(a, b), a + b)):
        np.testing.assert_array_equal(gradient.of(), wanted)
        found = float(gradient.squared(7))
        assert found == pytest.approx(float(np.square(wanted, dtype=np.float64).sum()), rel=2**-20)


@pytest.mark.parametrize(
    ("tied", "given"),
    [
        (False, {"clip": 0.1}),
        (True, {"accumulate": 2, "batch": 1, "clip": 0.0}),
        (True, {"clip": 1.0, "compute": "bfloat16"}),
    ],
    ids=str,
)
@pytest.mark.some_rows
def test_a_run_by_rows_is_one_that_changes_them_whole(
    tied: bool, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The clipped norm is summed in another order, and a CPU's vectors end elsewhere in fewer rows: within some roundings."""
    settings = dataclasses.replace(HOW, train="all", optimizer="adamw", learning_rate=5e-3, **given)
    folder = GOLDEN / ("llama_tied_f16" if tied else "llama")

    def run() -> Any:
        jax.clear_caches()
        return run_of(jaxengine.load(folder, dtype="float32", home="host"), settings)

    wanted = losses(whole := run())
    request.addfinalizer(jax.clear_caches)  # of programs that are traced with this
    monkeypatch.setattr(rows, "BYTES", 4 * 20 * whole.model.params["outer"]["embedding"].shape[1])
    several = {n for n in whole.model.params["outer"] if layered.blocks(whole.tuning, n) > 1}
    assert several == {"embedding"} | ({"lm_head"} if not tied else set())
    found = losses(by_rows := run())
    rtol = CLOSE if settings.compute == "float32" else 2**-9
    np.testing.assert_allclose(found, wanted, rtol=rtol)
    assert moved_by(wanted) > 100 * rtol * max(wanted)
    for one, other in zip(jax.tree.leaves(by_rows._state), jax.tree.leaves(whole._state), strict=True):
        assert one.sharding == other.sharding
        assert one.dtype == other.dtype
