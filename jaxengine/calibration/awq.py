"""AWQ (Lin et al., arXiv:2306.00978): inputs that carry much are made larger before rounding, so that their weights lose less.

    W x = (W diag(s)) (diag(1/s) x)        s = a^r / sqrt(max a^r min a^r),  a = mean |x|

What stands before x is divided by s once and for all, so that nothing is left to do when the model runs: a norm's weight, or
the rows of the matrix that makes x. r is the best of 20 ratios from 0 on, by the error of the output of all matrices that
read x, which H = sum x x^T gives exactly, without x:  tr(E H E^T), E = round(W diag(s)) diag(1/s) - W.
Each group of weights is then clipped at the part of its largest that loses least of the output (the paper's second step).

Where s can go is not asked of the model's code but proved: `folds` divides each parameter before a group by powers of two,
multiplies the group's matrices by them, and takes the first with which the layer's output and all that its other matrices
read stay as they were, to float32's rounding, at random weights of the same shapes. It finds norms (Gemma's, which store
w - 1, too), v before o (each of a kv head's numbers for all query heads that read it), up before down of gated blocks and of
those with relu, and refuses what is not linear (gelu) or is read by something else (a residual stream).

A norm's new weight is rounded to its dtype first, and what that made of s is what the matrices are multiplied by.

O outputs, I inputs, G group size, NG groups of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jaxengine.architecture import Spec
from jaxengine.calibration.capture import EXACT, Group, groups, inputs_of, listened
from jaxengine.calibration.gptq import LEAST, outcome, power
from jaxengine.calibration.grid import Grid
from jaxengine.engine import Engine, program

RATIOS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 20 for i in range(10))  # parts of a group's largest weight
SAME = 2.0**-12  # of the largest, by which float32 may differ after some hundred roundings; a wrong fold is off by half
TOKENS = 4  # of the probe


@dataclasses.dataclass(frozen=True)
class Fold:
    """A parameter that can take 1 / s of what comes after it. offset: it is stored less one. times: each of its numbers is
    read so many times in a row by heads that share it, of `width` numbers."""

    name: str
    offset: bool = False
    times: int = 1
    width: int = 1

    def spread(self, each: Any) -> Any:
        """Of each of its numbers -> of each input of the matrices after it."""
        if self.times == 1:
            return each
        array = jnp if isinstance(each, jax.Array) else np
        return array.repeat(each.reshape(-1, 1, self.width), self.times, axis=1).reshape(-1)

    def gathered(self, inputs: Array) -> Array:
        """Of each input -> of each of its numbers, the mean of those that share one."""
        return inputs if self.times == 1 else inputs.reshape(-1, self.times, self.width).mean(1).reshape(-1)


# --- where scales can go -----------------------------------------------------------------------------------------------


def candidates(engine: Engine, kind: Hashable, group: Group) -> list[Fold]:
    """Parameters of the layer with as many numbers, or outputs, as the group has inputs, or a part of them for each head."""
    found = []
    attention = engine.architecture.attention(kind)
    shared = attention.num_heads // attention.num_kv_heads
    for name, spec in engine.architecture.block(kind)[1].items():
        if name in group.names or name.endswith("_bias"):
            continue
        size = math.prod(spec.shape if spec.out is None else spec.shape[: spec.out])
        if size == group.inputs:
            found += [Fold(name), Fold(name, offset=True)] if spec.out is None else [Fold(name)]
        elif spec.out is not None and shared > 1 and size * shared == group.inputs:
            found.append(Fold(name, times=shared, width=attention.head_dim))
    return found


@program(0, 1)
def probe(engine: Engine, kind: Hashable, weights: Any, over: Any, times: Any, offset: Any, x: Array) -> Any:
    """({matrix: what it reads}, the layer's result) with each parameter's numbers or rows divided by `over`, each matrix's
    inputs multiplied by `times`; offset: 1 where a vector is stored less one."""
    specs, changed = engine.architecture.block(kind)[1], {}
    for name, w in weights.items():
        wide, out = w.astype(jnp.float32), specs[name].out
        if out is None:
            changed[name] = (wide + offset[name]) / over[name].reshape(wide.shape) - offset[name]
        else:
            rows = wide.reshape(over[name].size, times[name].size) / over[name][:, None] * times[name][None]
            changed[name] = rows.reshape(wide.shape)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    y, heard = listened(engine, kind, changed, x, positions, None)
    return {name: inputs_of(spec, seen) for name, spec, seen in heard}, y


def _exact(engine: Engine) -> Engine:
    return dataclasses.replace(engine, dtype="float32")


def _cut(spec: Spec) -> tuple[int, int]:
    """Outputs and inputs of a matrix; numbers of a vector, and 1."""
    cut = len(spec.shape) if spec.out is None else spec.out
    return math.prod(spec.shape[:cut]), math.prod(spec.shape[cut:])


def abstract(engine: Engine, kind: Hashable, hidden_size: int) -> tuple[Any, ...]:
    """What `probe` is given, without the arrays."""
    specs = engine.architecture.block(kind)[1]
    wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return (
        {n: jax.ShapeDtypeStruct(s.shape, jnp.dtype(engine.dtype)) for n, s in specs.items()},
        {n: wide(_cut(s)[0]) for n, s in specs.items()}, {n: wide(_cut(s)[1]) for n, s in specs.items()},
        {n: wide() for n in specs}, wide(1, TOKENS, hidden_size),
    )  # fmt: skip


@functools.cache
def folds(engine: Engine, kind: Hashable, hidden_size: int) -> tuple[tuple[Group, Fold | None], ...]:
    """Each group of a layer of this kind, with the parameter that takes its scales; None where none can."""
    specs, exact = engine.architecture.block(kind)[1], _exact(engine)
    sizes = {n: _cut(s) for n, s in specs.items()}
    keys = dict(zip(specs, jax.random.split(jax.random.key(0), len(specs)), strict=True))
    weights = {}
    for name, s in specs.items():
        drawn = jax.random.normal(keys[name], s.shape, jnp.dtype(engine.dtype))
        scale = 0.25 if s.out is None else sizes[name][1] ** -0.5
        weights[name] = drawn * jnp.asarray(scale, drawn.dtype) + jnp.asarray(s.out is None, drawn.dtype)
    x = jax.random.normal(jax.random.key(1), (1, TOKENS, hidden_size), jnp.float32)
    drawn = np.random.default_rng(0)

    def run(fold: Fold | None, group: Group | None, s: np.ndarray | None) -> Any:
        over = {n: np.ones(o, np.float32) for n, (o, _) in sizes.items()}
        times = {n: np.ones(i, np.float32) for n, (_, i) in sizes.items()}
        offset = {n: np.float32(0) for n in sizes}
        if fold is not None and group is not None and s is not None:
            over[fold.name], offset[fold.name] = s, np.float32(fold.offset)
            if f"{fold.name}_bias" in over:
                over[f"{fold.name}_bias"] = s
            times |= dict.fromkeys(group.names, fold.spread(s))
        return jax.tree.map(np.asarray, jax.device_get(probe(exact, kind, weights, over, times, offset, x)))

    plain, y = run(None, None, None)

    def proved(fold: Fold, group: Group) -> bool:
        s = 2.0 ** drawn.integers(-2, 3, sizes[fold.name][0]).astype(np.float32)
        inputs, z = run(fold, group, s)
        wanted = {n: r / fold.spread(s) if n in group.names else r for n, r in plain.items()}
        same = lambda a, b: bool(np.abs(a - b).max() <= SAME * np.abs(b).max())  # noqa: E731
        return same(z, y) and all(same(inputs[n], r) for n, r in wanted.items())

    return tuple(
        (group, next((f for f in candidates(engine, kind, group) if proved(f, group)), None))
        for group in groups(engine, kind, hidden_size)
    )


# --- which scales ------------------------------------------------------------------------------------------------------


def rounded(grid: Grid, W: Float[Array, "O I"], clip: Any = None) -> tuple[UInt8[Array, "O I"], Array, Array, Array]:
    """(codes, steps, zeros, what they hold) of W rounded to nearest; clip [O, NG]: the part of a group's largest magnitude at
    which it is cut."""
    O, I = W.shape  # noqa: E741
    G = I if grid.whole else grid.group
    short = -I % G
    groups = jnp.pad(W, ((0, 0), (0, short))).reshape(-1, G)
    if clip is not None:
        largest = jnp.abs(groups).max(-1) * clip.reshape(-1)
        groups = jnp.clip(groups, -largest[:, None], largest[:, None])
    s, z = grid.steps(groups)
    q = grid.codes(groups, s[:, None], z[:, None]).astype(jnp.uint8).reshape(O, -1)[:, :I]
    s, z = s.reshape(O, -1), z.reshape(O, -1)
    return q, s, z, grid.held(q, s, z)


@program(0, 1, 2)
def search(
    engine: Engine,
    grid: Grid,
    fold: Fold,
    matrices: tuple[Array, ...],
    rows: Float[Array, "O"],
    H: Float[Array, "I I"],
    a: Float[Array, "I"],
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """(the best s, of each number of the folding parameter; its ratio) for a group's matrices. rows: what all their rows are
    divided by."""
    del engine
    mean = fold.gathered(a)
    mean = jnp.maximum(mean / jnp.maximum(mean.max(), LEAST), 1e-4)
    W = grid.joined(matrices) / rows[:, None]

    def of(ratio: Array) -> Array:
        s = mean**ratio
        return s / jnp.sqrt(s.max() * s.min())

    def lost(ratio: Array) -> Array:
        s = fold.spread(of(ratio))
        return power((rounded(grid, W * s[None])[3] / s[None] - W) * rows[:, None], H)

    ratios = jnp.asarray(RATIOS, jnp.float32)
    best = ratios[jnp.argmin(lax.map(lost, ratios))]
    return of(best), best


@program(0, 1)
def settle(
    engine: Engine,
    grid: Grid,
    matrices: tuple[Array, ...],
    rows: Float[Array, "O"],
    s: Float[Array, "I"],
    H: Float[Array, "I I"],
) -> tuple[tuple[Array, ...], UInt8[Array, "O I"], Float[Array, "O NG"], Float[Array, "O NG"], Float[Array, "M"]]:
    """(what is held in place of each matrix, its rows divided and its inputs multiplied; of all their rows, codes, steps and
    zeros; the part of each one's output's power that is lost)."""
    del engine
    W = grid.joined(matrices) / rows[:, None] * s[None]
    O, I = W.shape  # noqa: E741
    H = H / s[:, None] / s[None]
    NG = 1 if grid.whole else max(I // grid.group, 1)
    each = jnp.arange(NG)
    blocks = H.reshape(NG, I // NG, NG, I // NG)[each, :, each]

    def lost(clip: Array) -> Array:
        E = rounded(grid, W, jnp.broadcast_to(clip, (O, NG)))[3] - W
        E = E.reshape(O, NG, -1)
        return (jnp.einsum("ogi,gij->ogj", E, blocks, precision=EXACT) * E).sum(-1)

    clips = jnp.asarray(CLIPS, jnp.float32)
    clip = clips[jnp.argmin(lax.map(lost, clips), axis=0)]
    codes, step, zero, held = rounded(grid, W, clip)
    dense, parts = outcome(grid, matrices, held, W, rows, H)
    return dense, codes, step, zero, parts


def folded(
    fold: Fold, own: Mapping[str, np.ndarray], s: np.ndarray, *, vector: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({vector of the layer: what it becomes}, what the folding parameter's numbers are divided by) for s: as near as a norm's
    dtype comes, 1 where it is zero or would become so. A matrix's rows are left to whoever rounds it."""
    made: dict[str, np.ndarray] = {}
    if vector:
        w, off = own[fold.name], np.float64(fold.offset)
        wide = w.astype(np.float64).reshape(-1) + off
        new = (wide / s - off).astype(w.dtype)
        back = new.astype(np.float64) + off
        fine = (wide != 0) & (back != 0)
        made[fold.name] = np.where(fine, new, w.reshape(-1)).astype(w.dtype).reshape(w.shape)
        s = np.where(fine, wide / np.where(fine, back, 1.0), 1.0).astype(np.float32)
    if (bias := own.get(f"{fold.name}_bias")) is not None:
        made[f"{fold.name}_bias"] = (bias.astype(np.float64) / s.reshape(bias.shape)).astype(bias.dtype)
    return made, s
