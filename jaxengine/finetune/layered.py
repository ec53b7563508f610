"""Training every parameter of a model that does not fit: no gradient of it ever stands as a whole.

Going forward, what comes into each layer is kept. On the way back each layer is brought in with its optimizer's state, its
gradient is made, used and forgotten, and layer and state go back to where they live, in place (LOMO, Lv et al.,
arXiv:2306.09782, for an optimizer with a state). On the device stand about three layers in float32, what comes into the
layers ('offload': in host memory), and what is outside them; the optimizer's state of that is in host memory too, and comes
after all layers, one parameter at a time and of a large one some rows (rows.py).

A gradient's global norm is known only after all of it has been made. With clipping, the way back is therefore gone twice:
once for the norm, once for the updates, with the same numbers. With clip=0 it is gone once.

**Copies** go both ways at a time, beside matrix products, and in place (host_temp is what waits there, of the layers and of
the head; tests/test_tuning_plan.py reads it from the program that XLA makes for a card): a matrix's gradient is used as soon
as it is there, and the changed matrix goes out with its state while the next one's state comes in and the gradients of those
before it are made. XLA lets what goes out wait until the layer's end, so that at most all of one layer, weights and state,
stands changed on the device. Nothing is under way from one layer to the next: a layer's matrices come in first, and alone.
With AdamW that is 4 of 12 bytes a parameter, so that a step that waits for the link alone takes at least 16/12 of what a full
duplex would. Writing each layer a turn later would hide that too (AOT, two matrices of 64 MB a layer, H2D and D2H each 6
copies a turn: also in place, each copy out beside all of the next layer's products), but holds a layer and its state more
(7.1 in place of 4.6 layers), and is not done.

The parts of an accumulated batch go through a layer one after another while it is there, so that layers are brought once
in a step however many parts there are.

A accumulated parts, B batch, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxengine.cache.base import PlainAttend
from jaxengine.engine import embed, head, program
from jaxengine.finetune import rows, tiles
from jaxengine.finetune.loss import cross_entropy
from jaxengine.finetune.step import Batch, State, Tuning, head_names
from jaxengine.finetune.trained._sampled import entering
from jaxengine.homes.base import Bank, home
from sharding.rules import constrain, named_sharding

Layer = Callable[[Hashable, Any, Array, Any], Array]  # (kind, weights, x [B, T, D], attend) -> x


def host(tree: Any) -> Any:
    """A tree's arrays, to pinned host memory; inside a program."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Host), tree)


def at(stacks: Any, i: Any) -> Any:
    """Layer i of a stack."""
    return jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, keepdims=False), stacks)


def put(stacks: Any, layer: Any, i: Any) -> Any:
    """A stack with layer i replaced."""
    return jax.tree.map(lambda s, x: lax.dynamic_update_index_in_dim(s, x, i, 0), stacks, layer)


@dataclasses.dataclass(frozen=True)
class Place:
    """How a bank's arrays are brought, and taken back to where those `held` before stood: back(tree, held). States'
    counters, one number a layer, stand on the device, and so does what of a layer stays there (`Plan.stays`)."""

    fetch: Callable[[Any], Any]
    back: Callable[[Any, Any], Any]

    @classmethod
    def on_host(cls) -> Place:
        """Of what stands in host memory between its uses."""

        def back(tree: Any, held: Any) -> Any:
            return jax.tree.map(lambda a, h: jax.device_put(a, jax.typeof(h).memory_space), tree, held)

        return cls(home("host").fetch, back)

    @classmethod
    def of(cls, bank: Bank) -> Place:
        """Of a bank of the homes that a program reaches; ValueError for the others."""
        if bank.outside or bank.form == "ahead":
            raise ValueError(
                f"train='all' goes through layers of home {bank.home!r} in the form 'scan' or 'unrolled', not {bank.form!r}:"
                f" say home='host' or home='split', with form='scan'"
            )
        if home(bank.home).TIER == "device":
            return cls(lambda tree: tree, lambda tree, held: tree)
        return cls.on_host()


def forward(bank: Bank, layer: Layer, attends: Any, x: Float[Array, "A B T D"], offload: bool) -> tuple[Array, Any]:
    """x after the bank's layers, and what came into each. attends: of the parts, stacked."""
    place, keep = Place.of(bank), host if offload else (lambda a: a)

    def parts(kind: Hashable, weights: Any, x: Array) -> Array:
        return _each_part(lambda row: layer(kind, weights, *row), (x, attends))

    if not bank.stacked:
        kept = []
        for kind, weights in zip(bank.kinds * bank.repeats, bank.weights, strict=True):
            kept.append(keep(x))
            if home(bank.home).TIER != "device":
                weights, x = lax.optimization_barrier((weights, x))  # or all copies start with the program
            x = parts(kind, place.fetch(weights), x)
        return x, tuple(kept)

    def period(loop: Any, slices: Any) -> tuple[Any, Any]:
        kept = []
        i, x = loop
        for k, kind in enumerate(bank.kinds):
            kept.append(keep(x))
            weights = slices[k]
            if k:  # or all of a turn are brought at once; see walk._ordered for why the order is on the stack
                stack, x = lax.optimization_barrier((bank.weights[k], x))
                weights = at(stack, i)
            x = parts(kind, place.fetch(weights), x)
        return (i + 1, x), tuple(kept)

    (_, x), kept = lax.scan(period, (jnp.int32(0), x), bank.weights, length=bank.repeats)
    return x, kept


def _each_part(f: Callable[[Any], Array], rows: Any) -> Array:
    """f of each part, stacked; a single one without a loop."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return f(jax.tree.map(lambda a: a[0], rows))[None]
    return lax.map(f, rows)


def _sum_of_parts(f: Callable[[Any], Any], like: Any, rows: Any) -> Any:
    """The sum of f of each part, as `like` is; it stands from when the parts are there."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return f(jax.tree.map(lambda a: a[0], rows))
    zeros, rows = lax.optimization_barrier((jax.tree.map(jnp.zeros_like, like), rows))
    return lax.scan(lambda total, row: (jax.tree.map(jnp.add, total, f(row)), None), zeros, rows)[0]


Use = Callable[
    [Any, Any, Any, Any], tuple[Any, Any, Any]
]  # (carry, gradient, weights, state) -> (carry, weights, state)


def backward(
    bank: Bank, layer: Layer, attends: Any, kept: Any, states: Any, g: Array, carry: Any, use: Use, offload: bool,
    *, write: bool,
) -> tuple[Array, Any, Any, Any]:  # fmt: skip
    """Back through a bank: (gradient of what came into it, carry, weights, states), where `use` makes of each layer's
    gradient a new carry, new weights and a new state.

    write: False where nothing but the carry changes, so that nothing goes back.
    """
    place, bring = Place.of(bank), home("host").fetch if offload else (lambda a: a)

    def one(kind: Hashable, weights: Any, state: Any, x: Array, g: Array, carry: Any) -> Any:
        def part(total: Any, row: Any) -> Any:
            x, g, attend = row
            _, pull = jax.vjp(lambda w, x: layer(kind, w, x, attend), weights, x)
            of_weights, of_x = pull(g)
            return jax.tree.map(jnp.add, total, of_weights), of_x

        zeros = jax.tree.map(jnp.zeros_like, weights)
        if x.shape[0] == 1:
            gradient, of_x = part(zeros, jax.tree.map(lambda a: a[0], (x, g, attends)))
            of_x = of_x[None]
        else:
            gradient, of_x = lax.scan(part, zeros, (x, g, attends))
        return of_x, *use(carry, gradient, weights, state)

    if not bank.stacked:
        new_weights, new_states = list(bank.weights), list(states)
        for i, kind in reversed(list(enumerate(bank.kinds * bank.repeats))):
            held, x = (bank.weights[i], states[i]), kept[i]
            # after g, or XLA takes the layer's second run for its first and keeps all that it made
            if home(bank.home).TIER != "device":
                held, x, g = lax.optimization_barrier((held, x, g))
            else:
                x, g = lax.optimization_barrier((x, g))
            weights, state = (place.fetch(t) for t in held)
            g, carry, weights, state = one(kind, weights, state, bring(x), g, carry)
            # this layer's gradient is used before the next one's is made
            g, carry, weights, state = lax.optimization_barrier((g, carry, weights, state))
            if write:
                new_weights[i], new_states[i] = (place.back(t, h) for t, h in zip((weights, state), held, strict=True))
        return g, carry, tuple(new_weights), tuple(new_states)

    def period(j: Array, loop: Any) -> Any:
        g, carry, stacks, states = loop
        i = bank.repeats - 1 - j
        stacks, states = list(stacks), list(states)
        for k, kind in reversed(list(enumerate(bank.kinds))):
            x = at(kept[k], i)
            if len(bank.kinds) > 1:  # one after the other, and what was changed has gone back
                stacks, states, x, g = lax.optimization_barrier((stacks, states, x, g))
            held = [at(t, i) for t in (stacks[k], states[k])]
            weights, state = (place.fetch(t) for t in held)
            g, carry, weights, state = one(kind, weights, state, bring(x), g, carry)
            if len(bank.kinds) > 1:
                g, carry, weights, state = lax.optimization_barrier((g, carry, weights, state))
            if write:
                new = [place.back(t, h) for t, h in zip((weights, state), held, strict=True)]
                stacks[k], states[k] = put(stacks[k], new[0], i), put(states[k], new[1], i)
        return g, carry, tuple(stacks), tuple(states)

    return lax.fori_loop(0, bank.repeats, period, (g, carry, tuple(bank.weights), tuple(states)))


def abstract(tuning: Tuning, banks: Any, trained: Any) -> State:
    """The state's shapes, dtypes and places: each layer has an optimizer's state of its own, laid out as its weights are
    and where they are (counters on the device), and each parameter outside them one in host memory. trained: arrays or
    ShapeDtypeStructs with shardings."""
    transformation = tuning.optax()

    def placed(state: Any, weights: Any, memory: str | None, counters: int, stay: Sequence[str] = ()) -> Any:
        """A moment of a parameter's shape is split as the parameter; the rest is whole everywhere. stay: names of parameters
        whose moments are on the device."""
        splits = {w.shape: w.sharding.spec for w in jax.tree.leaves(weights)}

        def one(path: Any, s: Any) -> jax.ShapeDtypeStruct:
            here = s.ndim <= counters or any(getattr(key, "key", None) in stay for key in path)
            place = NamedSharding(
                tuning.mesh, splits.get(s.shape, PartitionSpec()), memory_kind=None if here else memory
            )
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)

        return jax.tree_util.tree_map_with_path(one, state)

    def of(bank: Bank, weights: Any) -> Any:
        Place.of(bank)
        make = jax.vmap(transformation.init) if bank.stacked else transformation.init
        stay = [n for n, w in weights.items() if w.sharding.memory_kind in (None, "device")]
        return placed(jax.eval_shape(make, weights), weights, home(bank.home).MEMORY, int(bank.stacked), stay)

    states = tuple(tuple(of(b, weights) for weights in held) for b, held in zip(banks, trained["banks"], strict=True))
    alone = ({n: w} for n, w in trained["outer"].items())
    outer = {n: placed(jax.eval_shape(transformation.init, w), w, home("host").MEMORY, 0) for w in alone for n in w}
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(tuning.mesh, PartitionSpec()))
    return State(trained, {"outer": outer, "banks": states}, cast(Any, step))


def initial(tuning: Tuning, banks: Any, trained: Any) -> State:
    """The state before the first step; see `abstract`. Every moment starts from zero, as optax's own do."""
    wanted = abstract(tuning, banks, trained)
    optimizer = jax.tree.map(
        lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), wanted.optimizer
    )  # calloc: pages that are not touched take no memory
    return State(trained, optimizer, jax.device_put(np.int32(0), wanted.step.sharding))


def blocks(tuning: Tuning, name: str) -> int:
    """In how many blocks of rows a parameter outside the layers is changed; see rows.py."""
    spec, engine = tuning.engine.architecture.outer()[1][name], tuning.engine
    place = named_sharding(engine.rules, engine.mesh, spec.axes)
    return rows.blocks(tuning.optimizer, spec.shape, place.shard_shape(spec.shape))


@program(0, donate=(2,))
def step(tuning: Tuning, banks: tuple[Bank, ...], state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
    """One step, as `jaxengine.finetune.step.step`. banks: those of the parameters, without weights."""
    engine, offload, outer = tuning.engine, tuning.remat == "offload", state.trained["outer"]
    banks = tuple(dataclasses.replace(b, weights=w) for b, w in zip(banks, state.trained["banks"], strict=True))
    # here and not of the loss, or the head's gradient would stand twice
    shares = batch.weights / jnp.maximum(batch.weights.sum(), 1)
    attends = PlainAttend(batch.positions, batch.segments)
    transformation = tuning.optax()

    def layer(kind: Hashable, weights: Any, x: Array, attend: PlainAttend) -> Array:
        return tiles.body(engine, attend, tuning.tile)(kind, weights, x, ())[0]

    def enter(enters: Any, part: Any) -> Array:
        return embed(engine, {"outer": outer | enters}, *part)

    def leave(of_head: Any, x: Array) -> Array:
        def logits(of_head: Any, x: Array) -> Array:
            return head(engine, {"outer": outer | of_head}, x)

        A, B, T, D = x.shape
        tokens = (x.reshape(A * B, T, D), *(a.reshape(A * B, T) for a in (batch.targets, shares)))
        return cross_entropy(logits, of_head, *tokens, chunk=tuning.chunk(A * B, T))

    several = {n: k for n in outer if (k := blocks(tuning, n)) > 1}
    enters, texts = {n: outer[n] for n in entering(engine.architecture)}, (batch.tokens, attends)
    x = _each_part(lambda part: enter(enters, part), texts)
    kept = []
    for bank in banks:
        x, of_bank = forward(bank, layer, attends, x, offload)
        kept.append(of_bank)
    loss, (of_head, last) = jax.value_and_grad(leave, (0, 1))({n: outer[n] for n in head_names(outer)}, x)

    axes = {n: s.axes for n, s in engine.architecture.outer()[1].items()}
    waits = {n: constrain(of_head.pop(n), engine.rules, engine.mesh, axes[n]) for n in tuple(of_head) if n in several}
    waits, last = lax.optimization_barrier((host(waits), last))  # out before layers are gone back through

    def back(use: Use, carry: Any, *, write: bool) -> tuple[dict[str, rows.Gradient], Any, Any]:
        """The whole way back: (gradients of what is outside, carry, new weights and states by bank)."""
        g, new = last, []
        for bank, of_bank, states in reversed(list(zip(banks, kept, state.optimizer["banks"], strict=True))):
            g, carry, weights, states = backward(
                bank, layer, attends, of_bank, states, g, carry, use, offload, write=write
            )
            new.append((weights, states))
        here = _sum_of_parts(
            lambda part: jax.vjp(lambda w: enter(w, part[1]), enters)[1](part[0])[0], enters, (g, texts)
        )
        here |= {n: here[n] + v if n in here else v for n, v in of_head.items()}
        return {n: rows.Gradient(here.get(n), waits.get(n)) for n in outer}, carry, new[::-1]

    def squared(tree: Any) -> Array:
        return optax.tree.norm(tree, squared=True)

    factor = jnp.float32(1)
    if tuning.clip:
        of_outer, squares, _ = back(
            lambda carry, gradient, weights, held: (carry + squared(gradient), weights, held),
            jnp.float32(0),
            write=False,
        )
        norm = jnp.sqrt(squares + sum(g.squared(several.get(n, 1)) for n, g in of_outer.items()))
        factor = jnp.minimum(1, tuning.clip / (norm + 1e-6))

    def use(carry: Any, gradient: Any, weights: Any, held: Any) -> Any:
        carry = carry + squared(gradient)
        updates, held = transformation.update(jax.tree.map(lambda g: g * factor, gradient), held, weights)
        return carry, optax.apply_updates(weights, updates), held

    of_outer, squares, new = back(use, jnp.float32(0), write=True)
    # what is outside goes one by one, and a large one by rows, so that the state of little is here at a time
    place, new_outer, outer_states = Place.on_host(), {}, {}
    for name, was in state.optimizer["outer"].items():
        held, gradient, squares = lax.optimization_barrier((was, of_outer[name], squares))  # after the last one
        if name in several:
            changed = rows.change(use, squares, name, several[name], gradient, outer[name], held)
            squares, new_outer[name], outer_states[name] = changed
            continue
        squares, changed, held = use(squares, {name: gradient.of()}, {name: outer[name]}, place.fetch(held))
        changed, held, squares = lax.optimization_barrier((changed, held, squares))
        new_outer |= changed
        outer_states[name] = place.back(held, was)
    trained = {"outer": new_outer, "banks": tuple(weights for weights, _ in new)}
    optimizer = {"outer": outer_states, "banks": tuple(states for _, states in new)}
    measured = {
        "loss": loss, "gradient_norm": jnp.sqrt(squares), "tokens": batch.weights.sum(),
        "learning_rate": jnp.asarray(tuning.optimizer.rate()(state.step)),
    }  # fmt: skip
    return State(trained, optimizer, state.step + 1), measured
