"""A step that trains a few layers out of all, and which ones is data: one program for every choice (LISA, BAdam, HiFT).

    x_1 ... x_L                    forward through the banks as they are; what comes into each layer is kept
    g_i = dL/dx_{i+1}              back through x alone, each layer run again: no gradient of a frozen weight is made.
                                   Where slot[i] says that layer i is trained, (x_i, g_i) is put there
    dL/dw_i                        for each slot: its layer run once more from x_i, gone back through for its weights

So the way back through the layers is the same whoever is trained, gradients are as many as there are slots, and layers are
brought from host memory as in `layered`, with their loop's own index. What is trained of the layers stands in float32 as a
slice of the bank, [slots, ...] for each parameter, beside it the optimizer's states. The price is that the trained layers
are run once more, `slots` in L of a pass, and that remat is 'full' or 'offload'.

Where what enters the layers is frozen, the way back ends at the lowest trained layer: each layer is in a branch. Layers in
host memory are brought all the same, as a copy engine takes them from a loop of a known length alone. What is outside the
layers and trained is part of the program's form: HiFT has three programs (embedding, layers, head), the others one.

**Between steps** the trained layers are rounded to the banks' dtype and written to their places, so that the banks are the
model at every time: held-out losses, checkpoints and exports know nothing of this file. At a new turn the slots are filled
anew from the banks, with new states; or, where states are kept, from host memory (`KEPT`, trained/hift.py). Layers that are
scanned are read and written by a program each, whose index is data too.

A accumulated parts, B batch, T tokens, D model, L layers, M slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxengine.cache.base import PlainAttend
from jaxengine.engine import embed, head, program
from jaxengine.finetune import tiles
from jaxengine.finetune.layered import Place, _each_part, at, forward, put
from jaxengine.finetune.loss import cross_entropy
from jaxengine.finetune.mezo import rounded
from jaxengine.finetune.step import Batch, State, Tuning, head_names
from jaxengine.finetune.trained._sampled import Turn, entering
from jaxengine.finetune.trained.base import trained as find_trained
from jaxengine.homes.base import Bank, home

SAMPLED = ("lisa", "badam", "hift")
REMATS = ("full", "offload")
HOST = "pinned_host"
Layer = Callable[[Hashable, Any, Array, Any], Array]  # (kind, weights, x [B, T, D], attend) -> x


def check_remat(train: str, remat: str) -> None:
    """Refuse what is not kept."""
    if remat not in REMATS:
        raise ValueError(
            f"remat is {remat!r}; train={train!r} runs each layer again on its way back: say {' or '.join(map(repr, REMATS))}"
        )


def transformation(tuning: Tuning) -> optax.GradientTransformation:
    """The optimizer's, at a learning rate of 1: states begin anew, and the schedule goes on."""
    unit = dataclasses.replace(tuning.optimizer, learning_rate=1.0, schedule="constant", warmup=0, steps=0)
    return dataclasses.replace(tuning, optimizer=unit).optax()


def turn_of(tuning: Tuning, seed: int, step: int) -> Turn:
    """What is trained in this step."""
    return find_trained(tuning.train).turn(tuning.options, tuning.engine.architecture, seed, step)


def choice(tuning: Tuning, now: Turn) -> dict[str, Any]:
    """What a program is told of a turn: each layer's slot (M: none), each slot's kind and whether a layer is in it, the
    lowest layer that a way back is gone to, and the step whose learning rate holds."""
    arch, M = tuning.engine.architecture, now.slots
    kinds = list(dict.fromkeys(arch.kinds))
    slot, kind, valid = np.full(arch.num_layers, M, np.int32), np.zeros(M, np.int32), np.zeros(M, bool)
    for s, i in enumerate(now.layers):
        slot[i], kind[s], valid[s] = s, kinds.index(arch.kinds[i]), True
    last = max(tuning.optimizer.steps - 1, 0) if tuning.optimizer.steps else now.rate_at
    return {
        "slot": slot, "kind": kind, "valid": valid, "lowest": np.int32(min(now.layers, default=0)),
        "rate_at": np.int32(min(now.rate_at, last)),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The step


@program(0, donate=(2, 3))
def step(
    tuning: Tuning, params: Any, masters: Any, states: Any, batch: Batch, chosen: dict[str, Array]
) -> tuple[Any, Any, dict[str, Array]]:
    """One step: (masters, states, what was measured).

    params: the banks, and what is outside the layers and frozen. masters: {'outer': {name: array}, 'layers': {name: stack
    [M, ...]} (M > 0) or ()}, float32; states: the optimizer's, laid out so, those of layers one a slot. chosen: see `choice`.
    """
    engine, offload = tuning.engine, tuning.remat == "offload"
    banks, frozen, held = params["banks"], params["outer"], masters["outer"]
    total = jnp.maximum(batch.weights.sum(), 1)
    attends = PlainAttend(batch.positions, batch.segments)
    enters = {n: held[n] for n in entering(engine.architecture) if n in held}
    leaves = {n: held[n] for n in head_names(frozen | held) if n in held}
    M = jax.tree.leaves(masters["layers"])[0].shape[0] if masters["layers"] else 0

    def layer(kind: Hashable, weights: Any, x: Array, attend: PlainAttend) -> Array:
        return tiles.body(engine, attend, tuning.tile)(kind, weights, x, ())[0]

    def enter(enters: Any) -> Array:
        outer = frozen | held | enters
        return _each_part(lambda r: embed(engine, {"outer": outer}, *r), (batch.tokens, attends))

    def leave(leaves: Any, x: Array) -> Array:
        def logits(leaves: Any, x: Array) -> Array:
            return head(engine, {"outer": frozen | held | leaves}, x)

        A, B, T, D = x.shape
        rows = (x.reshape(A * B, T, D), *(a.reshape(A * B, T) for a in (batch.targets, batch.weights)))
        return cross_entropy(logits, leaves, *rows, chunk=tuning.chunk(A * B, T)) / total

    x, entered = jax.vjp(enter, enters)
    kept = []
    for bank in banks:
        x, of_bank = forward(bank, layer, attends, x, offload)
        kept.append(of_bank)
    loss, (of_outer, g) = jax.value_and_grad(leave, (0, 1))(leaves, x)
    of_layers: Any = ()
    if leaves.keys() & enters.keys():  # or the logits' gradient stands until the embedding's is there, to be added to
        of_outer, g = lax.optimization_barrier((of_outer, g))
    if M or enters:
        saved = tuple(jnp.zeros((M + 1, *x.shape), x.dtype) for _ in range(2)) if M else ()
        start = engine.architecture.num_layers
        for bank, of_bank in reversed(list(zip(banks, kept, strict=True))):
            start -= len(bank.kinds) * bank.repeats
            g, saved = back(bank, start, layer, attends, of_bank, g, saved, chosen, offload, stops=not enters)
        if M:
            of_layers = weight_gradients(tuning, banks, layer, attends, masters["layers"], saved, chosen)
            g, of_layers = lax.optimization_barrier((g, of_layers))  # the embedding's stands after what makes these
        for n, v in entered(g)[0].items():
            of_outer[n] = of_outer[n] + v if n in of_outer else v
    gradient = {"outer": of_outer, "layers": of_layers}
    norm = optax.tree.norm(gradient)
    if tuning.clip:
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1, tuning.clip / (norm + 1e-6)), gradient)
    rate = jnp.asarray(tuning.optimizer.rate()(chosen["rate_at"]), jnp.float32)

    def update(gradient: Any, state: Any, master: Any) -> tuple[Any, Any]:
        made, state = transformation(tuning).update(gradient, state, master)
        return jax.tree.map(lambda w, u: w + rate * u, master, made), state

    outer = update(gradient["outer"], states["outer"], held) if held else ({}, states["outer"])
    layers = jax.vmap(update)(gradient["layers"], states["layers"], masters["layers"]) if M else ((), states["layers"])
    new, after = ({"outer": o, "layers": w} for o, w in zip(outer, layers, strict=True))
    measured = {"loss": loss, "gradient_norm": norm, "tokens": batch.weights.sum(), "learning_rate": rate}
    return new, after, measured


def back(
    bank: Bank, start: int, layer: Layer, attends: Any, kept: Any, g: Array, saved: Any, chosen: Any, offload: bool,
    *, stops: bool,
) -> tuple[Array, Any]:  # fmt: skip
    """Back through a bank whose first layer is layer `start`, for x alone: (gradient of what came into it, saved), with
    (x, g) of trained layers in their slots of `saved`. stops: below the lowest of them g is what it may be."""
    place, bring = Place.of(bank), home("host").fetch if offload else (lambda a: a)

    def keep(saved: Any, i: Any, x: Array, g: Array) -> Any:
        if not saved:
            return saved
        slot = lax.dynamic_index_in_dim(chosen["slot"], i, keepdims=False)
        return tuple(put(s, a, slot) for s, a in zip(saved, (x, g), strict=True))

    def through(kind: Hashable, i: Any, weights: Any, x: Array, g: Array) -> Array:
        def run(weights: Any, x: Array, g: Array) -> Array:
            def part(row: Any) -> Array:
                x, g, attend = row
                return jax.vjp(lambda x: layer(kind, weights, x, attend), x)[1](g)[0]

            return _each_part(part, (x, g, attends))

        if not stops:
            return run(weights, x, g)
        return lax.cond(i > chosen["lowest"], run, lambda weights, x, g: g, weights, x, g)

    if not bank.stacked:
        streamed = home(bank.home).TIER != "device"
        for i, kind in reversed(list(enumerate(bank.kinds * bank.repeats))):
            weights, x = bank.weights[i], kept[i]
            if streamed:  # after g, or all copies start with the program
                weights, x, g = lax.optimization_barrier((weights, x, g))
            else:  # or XLA takes the layer's second run for its first and keeps all that it made
                x, g = lax.optimization_barrier((x, g))
            x = bring(x)
            saved = keep(saved, jnp.int32(start + i), x, g)
            g = through(kind, start + i, place.fetch(weights), x, g)
        return g, saved

    def period(j: Array, loop: Any) -> Any:
        g, saved = loop
        i = bank.repeats - 1 - j
        for k, kind in reversed(list(enumerate(bank.kinds))):
            x, number = bring(at(kept[k], i)), start + i * len(bank.kinds) + k
            saved = keep(saved, number, x, g)
            g = through(kind, number, place.fetch(at(bank.weights[k], i)), x, g)
        return g, saved

    return lax.fori_loop(0, bank.repeats, period, (g, saved))


def as_stored(w: Array, dtype: Any) -> Array:
    """The value that a bank of this dtype has of w, but float32, so that its gradient is."""
    if dtype == jnp.float32:
        return w
    # not a cast there and back, which XLA:GPU leaves out (AOT, sm_86 and sm_90)
    return rounded(w, jnp.float32(1), dtype).astype(jnp.float32)


def weight_gradients(
    tuning: Tuning, banks: Sequence[Bank], layer: Layer, attends: Any, masters: Any, saved: Any, chosen: Any
) -> Any:
    """The gradient of every slot's weights, float32 [M, ...]; of a slot without a layer zero."""
    arch = tuning.engine.architecture
    dtype = jax.tree.leaves(banks[0].weights)[0].dtype
    kinds = list(dict.fromkeys(arch.kinds))
    matrices = {n for kind in kinds for n, spec in arch.block(kind)[1].items() if spec.out is not None}
    # a product takes its matrix in 16 bits, and gives its gradient so: float32 of them would stand for nothing
    narrow = matrices if dtype.itemsize < 4 and dtype == tuning.engine.dtype else set()
    M = saved[0].shape[0] - 1

    def of(s: Array, total: Any, add: Callable[[Any, Any], Any]) -> Any:
        """total after add(total, gradient) for each part."""
        weights = {n: as_stored(w, dtype) for n, w in at(masters, s).items()}
        weights = {n: w.astype(dtype) if n in narrow else w for n, w in weights.items()}

        def part(total: Any, row: Any) -> tuple[Any, None]:
            x, g, attend = row
            found = [lambda w, kind=kind: jax.vjp(lambda w: layer(kind, w, x, attend), w)[1](g)[0] for kind in kinds]
            gradient = found[0](weights) if len(kinds) == 1 else lax.switch(chosen["kind"][s], found, weights)
            return add(total, jax.tree.map(lambda g: jnp.where(chosen["valid"][s], g, 0), gradient)), None

        x, g = (at(a, s) for a in saved)
        if x.shape[0] == 1:
            return part(total, jax.tree.map(lambda a: a[0], (x, g, attends)))[0]
        return lax.scan(part, total, (x, g, attends))[0]

    def zeros(shape: Callable[[Any], Any], zero: Any = 0) -> Any:
        return jax.tree.map(lambda w: jnp.full(shape(w), zero, jnp.float32), masters)

    def plus(total: Any, g: Any) -> Any:
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, g)

    if M == 1:
        total = of(jnp.int32(0), zeros(lambda w: w.shape[1:]), plus)
        return jax.tree.map(lambda g: g[None], total)
    # or they stand from long before
    zero, saved = lax.optimization_barrier((jnp.float32(0), saved))

    alone = saved[0].shape[1] == 1

    def slot(s: Array, totals: Any) -> Any:
        def add(totals: Any, g: Any) -> Any:
            if alone:
                return put(totals, jax.tree.map(lambda g: g.astype(jnp.float32), g), s)
            # parts are added up where the slot's gradient will be, and read there when there is something to add
            totals, g = lax.optimization_barrier((totals, g))
            return put(totals, plus(at(totals, s), g), s)

        return of(s, totals, add)

    return lax.fori_loop(0, M, slot, zeros(lambda w: w.shape, zero))


# ---------------------------------------------------------------------------------------------------------------------
# Layers in and out of the banks


def found_at(banks: Sequence[Bank], i: int) -> tuple[int, int, int | None]:
    """Where layer i stands: (bank, place in its weights, index in the stack or None)."""
    for b, bank in enumerate(banks):
        count = len(bank.kinds) * bank.repeats
        if i < count:
            turn, k = divmod(i, len(bank.kinds))
            return (b, k, turn) if bank.stacked else (b, i, None)
        i -= count
    raise IndexError(i)


def read(banks: Sequence[Bank], weights: Sequence[Any], i: int) -> dict[str, Array]:
    """Layer i's weights on the device, in the banks' dtype."""
    b, k, turn = found_at(banks, i)
    held = weights[b][k]
    if turn is None:
        return jax.tree.map(lambda a: jax.device_put(a, _on(a.sharding, None)), held)
    return _reader(_flat(held))(held, jnp.int32(turn))


def write(banks: Sequence[Bank], weights: Sequence[Any], i: int, layer: dict[str, Array]) -> tuple[Any, ...]:
    """The banks' weights with layer i replaced; a stack is written over in place."""
    b, k, turn = found_at(banks, i)
    held = weights[b][k]
    if turn is None:
        new = jax.device_put(layer, jax.tree.map(lambda a: a.sharding, held))
    else:  # split as the stack is: in host memory nothing could be exchanged
        layer = jax.device_put(layer, jax.tree.map(lambda a: _on(a.sharding, None, drop=1), held))
        new = _writer(_flat(held))(held, layer, jnp.uint32(turn))
    bank = (*weights[b][:k], new, *weights[b][k + 1 :])
    return (*weights[:b], bank, *weights[b + 1 :])


Flat = tuple[Any, tuple[NamedSharding, ...]]  # a tree's structure and its arrays' shardings, to key programs on


def _flat(tree: Any) -> Flat:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(x.sharding for x in leaves)


def _on(sharding: Any, memory: str | None, drop: int = 0, lead: int = 0) -> NamedSharding:
    """The sharding in this memory (None: the device's), without its first dims, or with others before them."""
    axes = [*(None,) * lead, *sharding.spec[drop:]]
    while axes and axes[-1] is None:  # as programs' own results have it: another spelling would be another program
        axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=memory)


@functools.cache
def _reader(held: Flat) -> Any:
    structure, shardings = held

    def take(stack: Any, i: Array) -> Any:
        return jax.tree.map(lambda s: jax.device_put(at(s, i), jax.memory.Space.Device), stack)

    return jax.jit(take, out_shardings=jax.tree.unflatten(structure, [_on(s, None, drop=1) for s in shardings]))


@functools.cache
def _writer(held: Flat) -> Any:
    structure, shardings = held

    def write(stack: Any, layer: Any, i: Array) -> Any:
        def one(stack: Array, x: Array, where: NamedSharding) -> Array:
            # the index too, and unsigned: jax would compute with a signed one, on the host
            return put(stack, *(jax.device_put((x, i), jax.memory.Space.Host) if where.memory_kind == HOST else (x, i)))

        return jax.tree.map(one, stack, layer, jax.tree.unflatten(structure, shardings))

    return jax.jit(write, donate_argnums=0, out_shardings=jax.tree.unflatten(structure, shardings))


def stacked(trees: Sequence[Any]) -> Any:
    """Trees on the device as one, each leaf with a first dim."""
    return _stacker(_flat(trees[0]), len(trees))(tuple(trees))


@functools.cache
def _stacker(held: Flat, count: int) -> Any:
    structure, shardings = held
    places = jax.tree.unflatten(structure, [_on(s, None, lead=1) for s in shardings])
    del count
    return jax.jit(lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees), out_shardings=places)


def one_of(stack: Any, s: int, dtype: Any = None) -> Any:
    """One tree of those that are stacked, in `dtype` (None: as they are)."""
    return _taker(_flat(stack), None if dtype is None else jnp.dtype(dtype))(stack, jnp.int32(s))


@functools.cache
def _taker(held: Flat, dtype: Any) -> Any:
    structure, shardings = held
    places = jax.tree.unflatten(structure, [_on(s, None, drop=1) for s in shardings])

    def take(stack: Any, s: Array) -> Any:
        return jax.tree.map(lambda a: a if dtype is None else a.astype(dtype), at(stack, s))

    return jax.jit(take, out_shardings=places)


# ---------------------------------------------------------------------------------------------------------------------
# States, and a step from outside


def abstract(tuning: Any, banks: Sequence[Bank], made: Any) -> State:
    """The state's shapes, dtypes and places. made: what trained/ makes, abstract or arrays.

    optimizer: 'outer', by a group's first name {'master': float32 values where the trained tree's are narrower, 'state'};
    'slots', {'masters', 'states'} of the layers that are trained; 'layers', of kept states one a layer, as in 'outer'.
    """
    kind, arch = find_trained(tuning.train), tuning.engine.architecture
    memory = HOST if kind.KEPT else None
    init = transformation(tuning).init

    def states(weights: Any, memory: str | None, make: Any = init) -> Any:
        """A moment of a parameter's shape is split as the parameter; the rest is whole everywhere."""
        splits = {w.shape: w.sharding.spec for w in jax.tree.leaves(weights)}

        def one(s: Any) -> jax.ShapeDtypeStruct:
            kind = memory if s.ndim else None
            place = NamedSharding(tuning.mesh, splits.get(s.shape, PartitionSpec()), memory_kind=kind)
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)

        return jax.tree.map(one, jax.eval_shape(make, weights))

    def group(weights: Any, drop: int) -> Any:
        narrow = any(w.dtype != jnp.float32 for w in jax.tree.leaves(weights))
        held = jax.tree.map(lambda x: _wide(x, memory, drop), weights)
        return {"master": held if narrow else (), "state": states(held, memory)}

    for bank in banks:
        Place.of(bank)
    outer = {names[0]: group({n: made["outer"][n] for n in names}, 0) for names in kind.outer(arch)}
    slots: Any = ()
    layers: Any = ()
    if kind.KEPT:
        layers = tuple(group(*_stored(banks, made["banks"], i)) for i in range(arch.num_layers))
    else:
        weights, drop = _stored(banks, made["banks"], 0)
        masters = jax.tree.map(lambda x: _wide(x, None, drop, (tuning.options.layers,)), weights)
        slots = {"masters": masters, "states": states(masters, None, jax.vmap(init))}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(tuning.mesh, PartitionSpec()))
    return State(made, {"outer": outer, "slots": slots, "layers": layers}, cast(Any, count))


def _wide(x: Any, memory: str | None, drop: int = 0, lead: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
    """The float32 values of x, as `_on` places them."""
    place = _on(x.sharding, memory, drop, len(lead))
    return jax.ShapeDtypeStruct((*lead, *x.shape[drop:]), jnp.float32, sharding=place)


def _stored(banks: Sequence[Bank], weights: Sequence[Any], i: int) -> tuple[Any, int]:
    """What layer i stands in, and how many dims that has before the layer's."""
    b, k, turn = found_at(banks, i)
    return weights[b][k], int(turn is not None)


def arguments(tuning: Any, banks: Sequence[Bank], made: Any, now: Turn) -> tuple[Any, Any, Any, Any]:
    """What `step` is given in this turn, as ShapeDtypeStructs: (params, masters, states, chosen). made: abstract."""
    held = abstract(tuning, banks, made).optimizer

    def device(x: Any, lead: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=_on(x.sharding, None, lead=len(lead)))

    group = held["outer"][now.outer[0]] if now.outer else {"master": (), "state": ()}
    outer, slots = jax.tree.map(device, group), held["slots"]
    if not slots and now.slots:  # a kept layer's, as often as there are slots
        slots = jax.tree.map(lambda x: device(x, (now.slots,)), held["layers"][0])
        weights, drop = _stored(banks, made["banks"], 0)
        masters = slots["master"] or jax.tree.map(lambda x: _wide(x, None, drop, (now.slots,)), weights)
        slots = {"masters": masters, "states": slots["state"]}
    masters = {
        "outer": outer["master"] or {n: made["outer"][n] for n in now.outer},
        "layers": slots["masters"] if now.slots else (),
    }
    states = {"outer": outer["state"], "layers": slots["states"] if now.slots else ()}
    params = {
        "outer": {n: x for n, x in made["outer"].items() if n not in now.outer},
        "banks": tuple(dataclasses.replace(b, weights=w) for b, w in zip(banks, made["banks"], strict=True)),
    }
    chosen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), choice(tuning, now))
    return params, masters, states, chosen


def initial(tuning: Any, banks: Sequence[Bank], made: Any) -> State:
    """The state before the first step; see `abstract`."""
    wanted = abstract(tuning, banks, made)
    places = wanted.optimizer

    def group(weights: Callable[[], Any], where: Any) -> Any:
        master: Any = ()
        if where["master"]:
            master = _like(jax.tree.map(lambda w: w.astype(jnp.float32), weights()), where["master"])
        return {"master": master, "state": blank(where["state"])}

    outer = {
        names[0]: group(lambda names=names: {n: made["outer"][n] for n in names}, places["outer"][names[0]])
        for names in find_trained(tuning.train).outer(tuning.engine.architecture)
    }
    layers = tuple(group(lambda i=i: read(banks, made["banks"], i), where) for i, where in enumerate(places["layers"]))
    slots = blank(places["slots"])
    optimizer = {"outer": outer, "slots": slots, "layers": layers}
    return State(made, optimizer, jax.device_put(np.int32(0), wanted.step.sharding))


def blank(wanted: Any) -> Any:
    """What every optimizer's state is before the first step (optimizers/base.py), each array where it will stand."""

    def one(s: Any) -> Array:
        if s.sharding.memory_kind == HOST:  # calloc: pages that are not touched take no memory
            return jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)
        return jnp.zeros(s.shape, s.dtype, device=s.sharding)

    return jax.tree.map(one, wanted)


def _like(tree: Any, wanted: Any) -> Any:
    """A tree's arrays where another's are."""
    return jax.tree.map(lambda x, w: jax.device_put(x, w.sharding), tree, wanted)


def _brought(tree: Any) -> Any:
    """A tree's arrays on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, _on(x.sharding, None)), tree)


def advance(
    tuning: Any, banks: Sequence[Bank], state: State, batch: Batch, *, seed: int, number: int
) -> tuple[State, dict[str, Array]]:
    """Step `number` of a run, from 0 on. banks: those of the parameters, without weights. The state's arrays are written
    over."""
    kept, now = find_trained(tuning.train).KEPT, turn_of(tuning, seed, number)
    held, outer, weights = dict(state.optimizer), state.trained["outer"], state.trained["banks"]
    dtype, dtypes = jax.tree.leaves(weights)[0].dtype, {n: x.dtype for n, x in outer.items()}
    group = held["outer"][now.outer[0]] if now.outer else {"master": (), "state": ()}
    mine = _brought(group) if kept else group
    slots = held["slots"]
    if now.slots and (kept or number == 0 or turn_of(tuning, seed, number - 1).number != now.number):
        slots = _filled(banks, weights, held["layers"], slots, now)
    masters = {
        "outer": mine["master"] or {n: outer[n] for n in now.outer}, "layers": slots["masters"] if now.slots else ()
    }  # fmt: skip
    states = {"outer": mine["state"], "layers": slots["states"] if now.slots else ()}
    params = {
        "outer": {n: x for n, x in outer.items() if n not in now.outer},
        "banks": tuple(dataclasses.replace(b, weights=w) for b, w in zip(banks, weights, strict=True)),
    }
    masters, states, measured = step(tuning, params, masters, states, batch, choice(tuning, now))
    del params
    if now.outer:
        own = {"master": masters["outer"] if group["master"] else (), "state": states["outer"]}
        held["outer"] = held["outer"] | {now.outer[0]: _like(own, group) if kept else own}
        outer = outer | {n: w.astype(dtypes[n]) for n, w in masters["outer"].items()}
    layers = list(held["layers"])
    for s, i in enumerate(now.layers):
        weights = write(banks, weights, i, one_of(masters["layers"], s, dtype))
        if kept:
            own = one_of({"master": masters["layers"] if layers[i]["master"] else (), "state": states["layers"]}, s)
            layers[i] = _like(own, layers[i])
    held["layers"] = tuple(layers)
    if now.slots and not kept:
        held["slots"] = {"masters": masters["layers"], "states": states["layers"]}
    after = jax.device_put(np.int32(number + 1), state.step.sharding)
    return State({"outer": outer, "banks": weights}, held, after), measured


def _filled(banks: Sequence[Bank], weights: Any, layers: Any, before: Any, now: Turn) -> Any:
    """The slots of a turn at its beginning. layers: kept states, if they are; before: the slots that were, which are gone."""
    jax.tree.map(lambda x: x.delete(), before)  # or those of two turns would stand
    each = []
    for i in now.layers:
        own = _brought(layers[i]) if layers else {"master": (), "state": ()}
        master = own["master"] or jax.tree.map(lambda w: w.astype(jnp.float32), read(banks, weights, i))
        each.append({"masters": master, "states": own["state"]})
    slots = stacked(each + each[-1:] * (now.slots - len(each)))
    if layers:
        return slots
    del each
    return {"masters": _like(slots["masters"], before["masters"]), "states": blank(before["states"])}
