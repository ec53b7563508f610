"""MeZO: fine-tuning by two losses, without a gradient (Malladi et al., arXiv:2305.17333).

    z ~ N(0, 1),   g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps),   theta <- theta - lr (g z + decay theta)

There is no way back: nothing is kept of a layer, there are no gradients and no optimizer's state, and a step stands in the
memory that scoring two batches takes. What it costs is steps: g z is right in one direction out of as many as there are
parameters, so that it serves for adapting a model that nearly does what it should, with prompts, at learning rates of 1e-6.

**Streamed** (ZO2, Wang et al., arXiv:2503.12668). g is known when the last layer has been passed. It is used in the next
step, where each layer is brought in once, changed by what the last step found, run for theta + eps z and for theta - eps z,
and taken back in place: one trip a layer and step, whatever the home. `settle` makes the change that is due; before it,
the parameters in `State` are those of the last step but one, and `State.optimizer` holds what is missing.

**Noise** is never stored. That of array j of a layer's parameter i in step t is

    z = normal(fold_in(fold_in(fold_in(fold_in(key(seed), t), layer), i), j)),      float32

where steps and layers count from 0, what is outside the layers counts as layer L, i is the parameter's place in the
architecture's own order and j is 0, but for what stands beside a matrix (LoRA's a and b: in the order of their names). It is
the same in every home, form and mesh.

**Rounding.** theta + eps z is made in float32 and rounded to the parameter's own dtype, to the nearest, before it is used:
of a norm near 1 in bfloat16 that may leave nothing of eps z. theta itself is not moved to and fro, so it does not drift as in
the paper's code. A change lr g z is far smaller than the last digit of most bfloat16 parameters (1/256 of one), so that
rounded to the nearest, as the paper's code and ZO2's do in float16, it would be lost in every step. It is therefore rounded up
or down by chance, as likely as it is near to each: in the mean nothing is lost (Gupta et al., arXiv:1502.02551). The chance is
a number of the step and the parameter like the noise, with 2^16 + j in the place of j, so that streamed and resident runs
still agree update for update. It costs one more draw of a parameter's four in a step, and is not made of float32 ones.

What is trained may also be LoRA's or DoRA's beside frozen matrices in any format.

A accumulated parts, B batch, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Float, UInt32

from jaxengine.architecture import Spec
from jaxengine.cache.base import PlainAttend
from jaxengine.engine import embed, head, program
from jaxengine.finetune import tiles
from jaxengine.finetune.layered import Place, at, put
from jaxengine.finetune.loss import cross_entropy
from jaxengine.finetune.step import Batch, State, Tuning
from jaxengine.finetune.trained.base import trained as find_trained
from jaxengine.homes.base import Bank, home
from jaxengine.walk import walk

PRNG = "threefry2x32"  # jax's own since it has been; another default would give other noise
CHANCE = 2**16  # added to an array's number: of what it is rounded by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Due:
    """The change that the last step found and that is not made yet: theta (1 - decay) - scale z. Zeros: none is.

    key: the raw data of key(seed), which never changes.
    """

    scale: Float[Array, ""]
    decay: Float[Array, ""]
    key: UInt32[Array, "2"]


def abstract(tuning: Tuning, trained: Any) -> State:
    """The state's shapes, dtypes and places; trained: arrays or ShapeDtypeStructs with shardings."""
    place = NamedSharding(tuning.mesh, PartitionSpec())

    def of(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    due = Due(of((), jnp.float32), of((), jnp.float32), of((2,), jnp.uint32))
    return State(trained, due, of((), jnp.int32))


def initial(tuning: Tuning, trained: Any, seed: int) -> State:
    """The state before the first step."""
    key = np.asarray(jax.random.key_data(jax.random.key(seed, impl=PRNG)))
    begun = Due(*cast(Any, (np.float32(0), np.float32(0), key)))
    places = jax.tree.map(lambda s: s.sharding, dataclasses.replace(abstract(tuning, trained), trained=None))
    return dataclasses.replace(jax.device_put(State(None, begun, cast(Any, np.int32(0))), places), trained=trained)


def is_due(state: State) -> bool:
    """Whether a change is."""
    return bool(state.optimizer.scale != 0) or bool(state.optimizer.decay != 0)


How = Callable[[Array, Array, bool], Array]  # (theta, z, of a matrix) -> theta, all float32


@dataclasses.dataclass(frozen=True)
class Noise:
    """Of one step. key: fold_in(key(seed), t)."""

    tuning: Tuning
    key: Array

    def change(
        self, specs: Mapping[str, Spec], layer: Array, held: Mapping[str, Any], how: How, *, by_chance: bool = False
    ) -> dict[str, Any]:
        """What is trained of a layer, or outside, with how(theta, z) in the place of each theta, rounded to its dtype: to the
        nearest, or up or down by chance. specs: of all in there."""
        frozen, names = find_trained(self.tuning.train).FROZEN, list(specs)
        leaves = {name: tree_flatten_with_path(leaf) for name, leaf in held.items()}
        arrays = [(name, j, path, theta) for name, (of, _) in leaves.items() for j, (path, theta) in enumerate(of)]
        moving = [k for k, (*_, path, _) in enumerate(arrays) if not (path and path[-1].key in frozen)]
        narrow = [k for k in moving if by_chance and arrays[k][-1].dtype != jnp.float32]
        if not moving:
            return dict(held)
        places = [(names.index(name), j) for name, j, *_ in (arrays[k] for k in moving)]
        places += [(names.index(name), CHANCE + j) for name, j, *_ in (arrays[k] for k in narrow)]
        keys = iter(_keys(jax.random.fold_in(self.key, layer), *np.array(places, np.int32).T))
        made = [theta for *_, theta in arrays]
        for k in moving:
            name, _, _, theta = arrays[k]
            made[k] = how(theta.astype(jnp.float32), draw(next(keys), theta.shape), specs[name].out is not None)
        for k in narrow:
            made[k] = rounded(made[k], chance(next(keys), made[k].shape), arrays[k][-1].dtype)
        new = iter(x.astype(theta.dtype) for x, (*_, theta) in zip(made, arrays, strict=True))
        return {name: jax.tree.unflatten(tree, [next(new) for _ in of]) for name, (of, tree) in leaves.items()}


def draw(key: Array, shape: tuple[int, ...]) -> Array:
    """z of one array, which XLA makes where it is used: it never stands (fusions of integers and one erf_inv)."""
    return jax.random.normal(key, shape, jnp.float32)


def chance(key: Array, shape: tuple[int, ...]) -> Array:
    """Numbers in [0, 1), as `draw`."""
    return jax.random.uniform(key, shape, jnp.float32)


def rounded(x: Float[Array, "..."], chance: Float[Array, "..."], dtype: Any) -> Array:
    """x in a narrower dtype: the nearest number of it, or the one beyond x where chance is below x's way towards that; at
    a chance of 1 always the nearest."""
    # digits by arithmetic: XLA:GPU takes a cast there and back for the number itself (xla_allow_excess_precision)
    info = jnp.finfo(dtype)
    least = np.float32(info.tiny).view(np.uint32)
    exponent = jnp.maximum(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000), least)
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    digits = x * lax.bitcast_convert_type(jnp.uint32(254 << 23) - exponent, jnp.float32) * 2.0**info.nmant
    near = jnp.round(digits)
    off = digits - near  # exact
    taken = near + jnp.where(chance < jnp.abs(off), jnp.sign(off), 0)
    rounded = taken * (2.0**-info.nmant * power)
    # the power's inverse would be no normal number: infinity and what is near it, which has no change to lose
    return jnp.where(exponent >= jnp.uint32(254 << 23), x, rounded).astype(dtype)


def _keys(key: Array, i: Any, j: Any) -> Array:
    """fold_in(fold_in(key, i), j) for all pairs: made one by one, each would be a kernel of its own to compile."""
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(i, j)
    data = lax.optimization_barrier(jax.random.key_data(keys))  # or each is made anew where it is used
    return jax.random.wrap_key_data(data, impl=PRNG)


def _due(tuning: Tuning, state: State) -> Callable[[Mapping[str, Spec], Array, Any], Any]:
    """The change that is due, as a function of (specs, layer, what is trained of it)."""
    due = state.optimizer
    noise = Noise(tuning, jax.random.fold_in(_key(state), state.step - 1))

    def how(theta: Array, z: Array, matrix: bool) -> Array:
        return (theta * (1 - due.decay) if matrix and tuning.optimizer.weight_decay else theta) - due.scale * z

    return lambda specs, layer, held: noise.change(specs, layer, held, how, by_chance=True)


def _key(state: State) -> Array:
    return jax.random.wrap_key_data(state.optimizer.key, impl=PRNG)


def _place(tuning: Tuning, bank: Bank) -> Place:
    """How what is trained of a layer is brought and taken back: what stands beside frozen matrices is on the device."""
    return Place.of(bank) if tuning.train == "all" else Place(lambda tree: tree, lambda tree, held: tree)


Run = Callable[[Hashable, Any, Any, Array, Any], Any]  # (kind, weights, trained, layer, x) -> x


def _through(tuning: Tuning, params: Any, state: State, x: Any, run: Run) -> tuple[Any, Any]:
    """All layers in turn, each with the change made that is due: (x, new trained banks)."""
    layer, new, due, architecture = jnp.int32(0), [], _due(tuning, state), tuning.engine.architecture

    def change(kind: Hashable, layer: Array, held: Any) -> Any:
        return due(architecture.block(kind)[1], layer, held)

    for bank, held in zip(params["banks"], state.trained["banks"], strict=True):
        place = _place(tuning, bank)
        before = len(bank.kinds) > 1 and bank.stacked and tuning.train != "all"
        if before:
            held = _changed(bank, held, layer, change)
        streamed = home(bank.home).TIER != "device"
        if tuning.train == "all" and len(bank.kinds) > 1 and bank.stacked:
            layer, x, of_bank = _in_turn(bank, place, held, layer, x, change, run)
            new.append(of_bank)
            continue

        def body(
            kind: Hashable, weights: Any, carry: Any, held: Any, place: Any = place, streamed: bool = streamed,
            stacked: bool = bank.stacked, before: bool = before,
        ) -> Any:  # fmt: skip
            if streamed:
                held, carry = lax.optimization_barrier((held, carry))  # or all copies start with the program
            layer, x = carry
            # made once: not anew for the loop, and for what goes back
            new = place.fetch(held) if before else lax.optimization_barrier(change(kind, layer, place.fetch(held)))
            x = run(kind, weights, new, layer, x)
            new = place.back(new, held)
            if streamed and not stacked:  # or what was changed stands until the last layer was passed
                new, x = lax.optimization_barrier((new, x))
            return (layer + 1, x), new

        (layer, x), (of_bank,) = walk(body, (layer, x), (bank,), (held,))
        new.append(of_bank)
    return x, tuple(new)


Change = Callable[[Hashable, Array, Any], Any]  # (kind, layer, trained) -> trained


def _changed(bank: Bank, held: Any, layer: Array, change: Change) -> Any:
    """What stands beside a bank's unlike layers, changed before the first is run. (Changed between two layers, it would be
    what XLA's scheduler brings the second beside, in the place of the first.)"""

    def period(i: Array, stacks: Any) -> Any:
        stacks, K = list(stacks), len(bank.kinds)
        for k, kind in enumerate(bank.kinds):
            stacks[k] = put(stacks[k], change(kind, layer + i * K + k, at(stacks[k], i)), i)
        return tuple(stacks)

    return lax.fori_loop(0, bank.repeats, period, tuple(held))


def _in_turn(
    bank: Bank, place: Place, held: Any, layer: Array, x: Any, change: Change, run: Run
) -> tuple[Array, Any, Any]:
    """(layer, x, trained) after a bank whose unlike layers follow each other and are trained themselves: each is brought, or
    changed where it stands, when the one before it was used and has gone back. (`walk` takes slices of all of a turn's states
    at its beginning.)"""

    def period(i: Array, loop: Any) -> Any:
        layer, x, stacks = loop
        stacks = list(stacks)
        for k, kind in enumerate(bank.kinds):
            stacks, x = lax.optimization_barrier((stacks, x))
            held = at(stacks[k], i)
            new = lax.optimization_barrier(change(kind, layer, place.fetch(held)))
            x = run(kind, bank.weights[k], new, layer, x)
            stacks[k], layer = put(stacks[k], place.back(new, held), i), layer + 1
        return layer, x, tuple(stacks)

    return lax.fori_loop(0, bank.repeats, period, (layer, x, tuple(held)))


@program(0, donate=(2,))
def step(tuning: Tuning, params: Any, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
    """One step, as `jaxengine.finetune.step.step`: makes the change that is due, and finds the next.

    params: what is frozen; with train='all' its tree with None for each array. The loss is the mean of the two; the
    gradient's norm is |g|, that of its part along z.
    """
    engine, choice, eps = tuning.engine, find_trained(tuning.train), tuning.optimizer.eps
    attends = PlainAttend(batch.positions, batch.segments)
    total = jnp.maximum(batch.weights.sum(), 1)
    due, noise = _due(tuning, state), Noise(tuning, jax.random.fold_in(_key(state), state.step))
    architecture, outside = engine.architecture, jnp.int32(engine.architecture.num_layers)

    signs = jnp.array([eps, -eps], jnp.float32)

    def both(one: Callable[[Array, Any], Array], rows: Any) -> Array:
        """one(eps, row) and one(-eps, row), stacked; a loop: then the parameters of one of the two stand at a time."""
        return lax.map(lambda r: one(*r), (signs, rows))

    def moved(by: Array, specs: Mapping[str, Spec], layer: Array, held: Any) -> Any:
        return noise.change(specs, layer, held, lambda theta, z, _: theta + by * z)

    def outer(by: Array, held: Any) -> Any:
        """What stands outside the layers; held: what is trained of it."""
        frozen, held = {"outer": params["outer"], "banks": ()}, moved(by, architecture.outer()[1], outside, held)
        return choice.combine(tuning.options, frozen, {"outer": held, "banks": ()})

    def whole(kind: Hashable, weights: Any, held: Any) -> Any:
        """A layer's parameters with what is trained of them."""
        alone = {"outer": {}, "banks": (Bank((weights,), (kind,), 1, "device", "unrolled"),)}
        return choice.combine(tuning.options, alone, {"outer": {}, "banks": ((held,),)})["banks"][0].weights[0]

    def run(kind: Hashable, weights: Any, held: Any, layer: Array, x: Array) -> Array:
        specs = architecture.block(kind)[1]

        def one(i: Array, x: Array) -> Array:
            there = whole(kind, weights, moved(signs[i], specs, layer, held))

            def part(a: Array, x: Array) -> Array:
                out = tiles.body(engine, at(attends, a), tuning.tile)(kind, there, x[i, a], ())[0]
                return lax.dynamic_update_slice(x, out[None, None], (i, a, 0, 0, 0))

            return part(jnp.int32(0), x) if x.shape[1] == 1 else lax.fori_loop(0, x.shape[1], part, x)

        # as `both`, and what goes out is written over what came in: else the one stands beside the other
        return lax.fori_loop(0, 2, one, x)

    def enter(by: Array, rows: Any) -> Array:
        there = outer(by, rest)
        return _each_part(lambda r: embed(engine, there, *r), rows)

    def leave(by: Array, x: Array) -> Array:
        there, (A, B, T, D) = outer(by, rest), x.shape
        rows = (x.reshape(A * B, T, D), *(a.reshape(A * B, T) for a in (batch.targets, batch.weights)))
        read = lambda _, x: head(engine, there, x)  # noqa: E731
        return cross_entropy(read, (), *rows, chunk=tuning.chunk(A * B, T), differentiate=False) / total

    rest = lax.optimization_barrier(due(architecture.outer()[1], outside, state.trained["outer"]))
    x = both(enter, jax.tree.map(lambda a: jnp.broadcast_to(a, (2, *a.shape)), (batch.tokens, attends)))
    x, banks = _through(tuning, params, state, x, run)
    plus, minus = both(leave, x)
    g = (plus - minus) / (2 * eps)
    rate = jnp.asarray(tuning.optimizer.rate()(state.step), jnp.float32)
    found = Due(rate * g, rate * tuning.optimizer.weight_decay, state.optimizer.key)
    measured = {
        "loss": (plus + minus) / 2, "gradient_norm": jnp.abs(g), "tokens": batch.weights.sum(), "learning_rate": rate,
    }  # fmt: skip
    return State({"outer": rest, "banks": banks}, found, state.step + 1), measured


@program(0, donate=(2,))
def settle(tuning: Tuning, params: Any, state: State) -> State:
    """The state with the change that is due made, and none due: what `step` gives next is the same."""
    due, architecture = _due(tuning, state), tuning.engine.architecture
    outside = jnp.int32(architecture.num_layers)
    outer = due(architecture.outer()[1], outside, state.trained["outer"])

    _, banks = _through(tuning, params, state, (), lambda kind, weights, held, layer, x: x)
    nothing = dataclasses.replace(state.optimizer, scale=jnp.float32(0), decay=jnp.float32(0))
    return State({"outer": outer, "banks": banks}, nothing, state.step)


def _each_part(f: Callable[[Any], Array], rows: Any) -> Array:
    """f of each part, stacked; a single one without a loop."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return f(jax.tree.map(lambda a: a[0], rows))[None]
    return lax.map(f, rows)
