"""From one tensor on disk to one weight in its place. Host memory holds one tensor at a time.

`read(name)` gives a parameter as a numpy array in our shape; it is cast and encoded on the device it will be used on and
put where the plan says: an array (or the arrays of a Weight) under a NamedSharding with a memory kind. Layers that are
scanned stand in stacks (homes/base.py: `Bank`); a stack is made once, empty, and each layer is written into it in place
(donated), so that no second copy of a stack is ever held.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxengine import formats, packing
from jaxengine.architecture import Architecture, Spec
from jaxengine.homes.base import Bank, Part, check_platform, home, place_in
from jaxengine.plan import Plan, abstract_leaf
from jaxengine.weights.base import Weight
from sharding.rules import Rules, check, named_sharding

Read = Callable[[str], Any]
Track = Callable[[str, int], None]  # (name, bytes read), after each parameter


def check_sharding(architecture: Architecture, plan: Plan, mesh: Mesh) -> None:
    """Refuse, before anything is read, what cannot be split as the plan's rules say."""
    specs = architecture.specs()
    check(plan.sharding_rules(), mesh, {name: (s.shape, s.axes) for name, s in specs.items()})


def place(
    architecture: Architecture,
    plan: Plan,
    mesh: Mesh,
    read: Read,
    track: Track = lambda name, size: None,
    disk: packing.Place | None = None,
) -> Any:
    """All parameters in their places: {'outer': {name: weight}, 'banks': (Bank, ...)}.

    disk: where a store of layers is written and found again, for a plan that reads some from there.
    """
    for where in {part.home for part in plan.parts(architecture)}:
        check_platform(where, mesh.devices.flat[0].platform)
    check_sharding(architecture, plan, mesh)
    rules, parts, read = plan.sharding_rules(), plan.parts(architecture), _trimmed(read)
    last: Any = ()

    def one(name: str, spec: Spec, memory: str | None) -> Any:
        nonlocal last
        array = read(name)
        size = sum(a.nbytes for a in jax.tree.leaves(array))
        jax.block_until_ready(last)  # a copy to a card may still have been reading the array before this one
        last = _encoded(plan, name, array, spec, rules, mesh, memory)
        track(name, size)
        return last

    layers = _on_disk(architecture, plan, mesh, read, parts, disk)
    outer = {name: one(name, spec, None) for name, spec in architecture.outer()[1].items()}
    banks = []
    for part in parts:
        if home(part.home).TIER == "disk":
            run = packing.Run(layers, part.start, part.num_layers)
            banks.append(Bank((), part.kinds, part.repeats, part.home, part.form, run))
            continue
        memory = home(part.home).MEMORY
        weights: list[Any] = [{} for _ in (part.kinds if part.stacked else range(part.num_layers))]
        for i, name, spec in _in_turn(architecture, part):
            turn, j = divmod(i, len(part.kinds))
            place, at = place_in(part.form, part.repeats, j, turn)
            full = f"layers.{part.start + i}.{name}"
            into = weights[j if part.stacked else i]
            into = into.setdefault(place, {}) if place else into
            if at is None:
                into[name] = one(full, spec, memory)
                continue
            leaf = one(full, spec, None)
            if name not in into:
                count = part.repeats - (place == "rest")
                places = _places(plan, full, spec, rules, mesh, memory, count)
                into[name] = jax.tree.map(
                    lambda x, where, count=count: _empty_stack((count, *x.shape), x.dtype, where), leaf, places
                )
            into[name] = jax.block_until_ready(jax.tree.map(lambda s, x, at=at: _put(s, x, at), into[name], leaf))
            leaf = last = ()  # or it, and those whose turn has not come, stand beside the next one
        banks.append(Bank(tuple(weights), part.kinds, part.repeats, part.home, part.form))
    last = jax.block_until_ready(last)
    _malloc_trim()(0)
    return {"outer": outer, "banks": tuple(banks)}


def _on_disk(
    architecture: Architecture, plan: Plan, mesh: Mesh, read: Read, parts: tuple[Part, ...], disk: packing.Place | None
) -> Any:
    """The layers that are read from disk; None where none are."""
    first = next((part.start for part in parts if home(part.home).TIER == "disk"), None)
    if first is None:
        return None
    if disk is None:
        raise ValueError(
            f"home={plan.home!r} reads layers from a store on disk, which is made of a checkpoint folder: use"
            f" jaxengine.load, or home='host'"
        )
    rules = plan.sharding_rules()

    def encoded(name: str) -> Any:
        spec = architecture.specs()[name]
        return _encoded(plan, name, read(name), spec, rules, mesh, None)

    @functools.cache  # asked for in every pass
    def shardings(i: int) -> Any:
        return layer_shardings(architecture, plan, mesh, i)

    return packing.open_layers(architecture, plan, mesh, first, disk, encoded, shardings)


def _trimmed(read: Read) -> Read:
    """`read` after what was freed is given back: glibc keeps blocks of up to 32 MiB for the next one who asks, so that tensors of
    many sizes leave several times the largest of them behind."""
    trim = _malloc_trim()

    def trimmed(name: str) -> Any:
        trim(0)  # one or two milliseconds
        return read(name)

    return trimmed


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's malloc_trim; elsewhere nothing is done."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return lambda _: 0


def layer_shardings(architecture: Architecture, plan: Plan, mesh: Mesh, i: int) -> dict[str, Any]:
    """{name: tree of NamedShardings} of layer i on the device, standing alone."""
    rules, found = plan.sharding_rules(), {}
    for name, spec in architecture.block(architecture.kinds[i])[1].items():
        found[name] = _places(plan, f"layers.{i}.{name}", spec, rules, mesh, None)
    return found


def _in_turn(architecture: Architecture, part: Part) -> Iterator[tuple[int, str, Spec]]:
    """A part's parameters as they are read: layer by layer, and one whole stack after another where there are stacks, so
    that no stack stands before its time."""
    if not part.stacked:
        for i, kind in enumerate(part.kinds * part.repeats):
            for name, spec in architecture.block(kind)[1].items():
                yield i, name, spec
        return
    for j, kind in enumerate(part.kinds):
        for name, spec in architecture.block(kind)[1].items():
            for turn in range(part.repeats):
                yield turn * len(part.kinds) + j, name, spec


def _empty_stack(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    zeros = np.zeros(shape, dtype)  # calloc: pages that are never touched take no memory, so this costs none
    return jax.device_put(zeros, sharding)


def _put(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    """stack[i] = layer, in place."""
    return _put_at(stack.sharding)(stack, layer, jnp.uint32(i))


@functools.cache
def _put_at(sharding: NamedSharding) -> Any:
    host = sharding.memory_kind not in (None, "device")

    def put(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        if host:
            layer = jax.device_put(layer, jax.memory.Space.Host)
            i = jax.device_put(i, jax.memory.Space.Host)  # unsigned: jax would compute with a signed one, on the host
        return lax.dynamic_update_index_in_dim(stack, layer, i, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _places(
    plan: Plan, name: str, spec: Spec, rules: Rules, mesh: Mesh, memory: str | None, stack: int | None = None
) -> Any:
    """The tree of NamedShardings of a stored parameter, or of a stack of so many of them. memory: that of its layer; what
    `Plan.stays` is on the device all the same.

    A matrix that is held as an array is split as the rules say (`check_sharding` has seen that it can be). Of a Weight's
    arrays a dim that does not divide, such as 76 groups over 8 devices, is left whole.
    """
    format_name, lead = plan.format_of(name, spec), () if stack is None else (stack,)
    leaf = abstract_leaf(format_name, spec.shape, spec.out, plan.dtype)

    def one(x: Any, a: tuple[str | None, ...], stays: bool) -> NamedSharding:
        shape = (*lead, *x.shape) if isinstance(leaf, Weight) else None
        return named_sharding(rules, mesh, a, memory_kind=None if stays else memory, shape=shape)

    return jax.tree.map(one, leaf, _leaf_axes(format_name, spec, stacked=stack is not None), plan.stays(name, spec))


def _leaf_axes(format_name: str, spec: Spec, *, stacked: bool) -> Any:
    """The tree of logical axes of a stored parameter; each leaf an `Axes`, which is no pytree node."""
    leading = ("layers",) if stacked else ()
    if spec.out is None:
        return _Axes((*leading, *spec.axes))
    inner = formats.find(format_name).leaf_axes(spec.axes, spec.out)
    return jax.tree.map(lambda a: _Axes((*leading, *a)), inner, is_leaf=lambda a: isinstance(a, tuple))


class _Axes(tuple):
    """Axes names as one leaf: a subclass of tuple is not taken apart by tree.map."""


def _encoded(plan: Plan, name: str, array: Any, spec: Spec, rules: Rules, mesh: Mesh, memory: str | None) -> Any:
    """One parameter in its format and place; `array` is numpy, or a Weight of numpy arrays that is in its format already, or in
    one that the format takes as it is (`Format.refit`).
    Raises ValueError for numbers that the format does not hold."""
    places, format_name, dtype = _places(plan, name, spec, rules, mesh, memory), plan.format_of(name, spec), plan.dtype
    plain = spec.out is None or format_name == "dense"
    if isinstance(array, Weight):
        return jax.device_put(formats.find(format_name).refit(array), places)
    if plain and array.dtype == jnp.dtype(dtype):
        return jax.device_put(array, places)
    on_device = _places(plan, name, spec, rules, mesh, None)
    raw = jax.device_put(array, named_sharding(rules, mesh, spec.axes))
    leaf = _encoder(format_name, spec.out, dtype, jax.tree.structure(on_device), tuple(jax.tree.leaves(on_device)))(raw)
    if not plain:
        formats.find(format_name).check(name, leaf)
    # a program that is still running holds what it reads: the next tensor would be read beside it, and the one after
    return jax.block_until_ready(leaf if memory is None else jax.device_put(leaf, places))


@functools.cache
def _encoder(format_name: str, out: int | None, dtype: str, tree: Any, shardings: tuple[NamedSharding, ...]) -> Any:
    def encode(raw: jax.Array) -> Any:
        w = raw.astype(dtype)
        return w if out is None else formats.find(format_name).encode(w, out=out)

    return jax.jit(encode, out_shardings=jax.tree.unflatten(tree, shardings))


def abstract(architecture: Architecture, plan: Plan, mesh: Mesh) -> Any:
    """What `place` would make, as ShapeDtypeStructs with shardings: for planning, compiling and restoring."""
    rules = plan.sharding_rules()

    def leaf(name: str, spec: Spec, memory: str | None, stack: int | None = None) -> Any:
        made = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, plan.dtype)
        lead = () if stack is None else (stack,)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=where),
            made,
            _places(plan, name, spec, rules, mesh, memory, stack),
        )

    outer = {name: leaf(name, spec, None) for name, spec in architecture.outer()[1].items()}
    banks = []
    for part in plan.parts(architecture):

        def layer(i: int, stack: int | None = None, part: Part = part) -> dict[str, Any]:
            specs = architecture.block((part.kinds * part.repeats)[i])[1]
            memory = home(part.home).MEMORY
            return {n: leaf(f"layers.{part.start + i}.{n}", s, memory, stack) for n, s in specs.items()}

        if home(part.home).TIER == "disk":
            weights = ()
        elif not part.stacked:
            weights = tuple(layer(i) for i in range(part.num_layers))
        elif part.form == "scan":
            weights = tuple(layer(j, part.repeats) for j in range(len(part.kinds)))
        else:
            weights = tuple({"one": layer(j), "rest": layer(j, part.repeats - 1)} for j in range(len(part.kinds)))
        banks.append(Bank(weights, part.kinds, part.repeats, part.home, part.form))
    return {"outer": outer, "banks": tuple(banks)}


def stored(architecture: Architecture, plan: Plan, params: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each parameter by name as a function that fetches it: an array or a Weight, of one layer where it is a layer's."""
    found: dict[str, Callable[[], Any]] = {n: (lambda w=w: w) for n, w in params["outer"].items()}
    for part, bank in zip(plan.parts(architecture), params["banks"], strict=True):
        for i, kind in enumerate(part.kinds * part.repeats):
            for name in architecture.block(kind)[1]:
                found[f"layers.{part.start + i}.{name}"] = functools.partial(_fetch, bank, i, name)
    return found


def few_numbers(architecture: Architecture, plan: Plan, params: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Of each parameter of each layer, by name, some numbers of each array that it is stored in: `FEW`, of each of its shards.
    What else there is stays where it is."""
    found: dict[str, list[np.ndarray]] = {}
    for part, bank in zip(plan.parts(architecture), params["banks"], strict=True):
        seen: dict[tuple[int, str, str], list[Any]] = {}  # of a stack the numbers of all its layers
        for i, kind in enumerate(part.kinds * part.repeats):
            turn, j = divmod(i, len(bank.kinds))
            place, at = place_in(bank.form, bank.repeats, j, turn)
            number = j if bank.stacked else i
            held = bank.weights[number][place] if place else bank.weights[number]
            for name in architecture.block(kind)[1]:
                key = (number, place, name)
                if key not in seen:
                    seen[key] = _few_of(held[name], stacked=at is not None)
                found[f"layers.{part.start + i}.{name}"] = [
                    x if at is None else x[at - first]
                    for first, x in seen[key]
                    if at is None or first <= at < first + len(x)
                ]
    return found


FEW = (4, 2**14)  # rows, and elements of each


def _few_of(leaf: Any, *, stacked: bool) -> list[tuple[int, np.ndarray]]:
    """(the first layer of a stack that a shard has, some numbers of each of its layers), shard after shard."""
    found = []
    for array in jax.tree.leaves(leaf):
        shards = sorted(
            (s for s in array.addressable_shards if s.replica_id == 0), key=lambda s: [d.start or 0 for d in s.index]
        )
        for shard in shards:
            first = (shard.index[0].start or 0) if stacked else 0
            found.append((first, _first_rows(shard.data, stacked)))
    return [(first, np.asarray(x)) for first, x in found]


@functools.partial(jax.jit, static_argnums=1)
def _first_rows(array: jax.Array, stacked: bool) -> jax.Array:
    """The first rows of an array, or of each in a stack, on the device: of a stack in host memory a loop takes them one by one,
    as of no other slice XLA copies that alone."""
    lead = 1 if stacked else 0
    sizes = [1] * (array.ndim - 2) + [*map(min, array.shape[-2:], FEW[max(0, 2 - array.ndim) :])]
    if jax.typeof(array).memory_space == jax.memory.Space.Device:
        return array[(slice(None),) * lead + tuple(slice(n) for n in sizes[lead:])]
    sizes[:lead] = [1] * lead
    zero = jnp.uint32(0)

    def of(*i: jax.Array) -> jax.Array:
        part = lax.dynamic_slice(array, [*i, *[zero] * (array.ndim - lead)], sizes)
        return jax.device_put(part, jax.memory.Space.Device)

    return lax.map(lambda i: of(i)[0], jnp.arange(len(array), dtype=jnp.uint32)) if stacked else of()


def is_finite(tree: Any) -> bool:
    """Whether all numbers of a tree's arrays are. What is in host memory comes to the device a layer's matrix at a time."""
    shards = [
        shard.data
        for array in jax.tree.leaves(tree)
        if jnp.issubdtype(array.dtype, jnp.floating)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    return all(jax.device_get([_is_finite(x) for x in shards]))


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        return jnp.isfinite(jax.device_put(x, jax.memory.Space.Device)).all()

    streamed = jax.typeof(array).memory_space != jax.memory.Space.Device and array.ndim > 2
    return lax.map(of, array).all() if streamed else of(array)


def _fetch(bank: Bank, i: int, name: str) -> Any:
    """One parameter of the bank's layer i, out of whatever it stands in."""
    if bank.source is not None:
        return bank.source.read(i, name)
    turn, j = divmod(i, len(bank.kinds))
    place, at = place_in(bank.form, bank.repeats, j, turn)
    held = bank.weights[j if bank.stacked else i]
    leaf = (held[place] if place else held)[name]
    return leaf if at is None else jax.tree.map(lambda s: _take_at(s.sharding)(s, at), leaf)


@functools.cache
def _take_at(sharding: NamedSharding) -> Any:
    """stack[i] on the device: the slice is taken inside a program, where a host stack may be sliced by a scan only."""

    def take(stack: jax.Array, i: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(stack, i, 1, 0)
        if sharding.memory_kind not in (None, "device"):
            part = jax.device_put(part, jax.memory.Space.Device)
        return part[0]

    return jax.jit(take, static_argnums=1)
