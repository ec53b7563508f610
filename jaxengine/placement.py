"""From one tensor on disk to one weight in its place. Host memory holds one tensor at a time.

`read(name)` gives a parameter as a numpy array in our shape; it is cast and encoded on the device it will be used on and
put where the plan says: an array (or the arrays of a Weight) under a NamedSharding with a memory kind. Layers that are
scanned stand in stacks [repeats, ...]; a stack is made once, empty, and each layer is written into it in place (donated),
so that no second copy of a stack is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxengine import technique
from jaxengine.architecture import Architecture, Segment, Spec
from jaxengine.homes.base import Bank, check_platform, home
from jaxengine.plan import WEIGHTS, Plan, abstract_leaf
from jaxengine.weights.base import Weight
from sharding.rules import Rules, check, named_sharding

Read = Callable[[str], Any]
Track = Callable[[str, int], None]  # (name, bytes read), after each parameter


def check_sharding(architecture: Architecture, plan: Plan, mesh: Mesh) -> None:
    """Refuse, before anything is read, what cannot be split as the plan's rules say."""
    specs = architecture.specs()
    check(plan.sharding_rules(), mesh, {name: (s.shape, s.axes) for name, s in specs.items()})


def place(
    architecture: Architecture, plan: Plan, mesh: Mesh, read: Read, track: Track = lambda name, size: None
) -> Any:
    """All parameters in their places: {'outer': {name: weight}, 'banks': (Bank, ...)}."""
    check_platform(plan.home, mesh.devices.flat[0].platform)
    check_sharding(architecture, plan, mesh)
    rules = plan.sharding_rules()
    memory, form = home(plan.home).MEMORY, plan.resolved_form

    def one(name: str, spec: Spec, memory: str | None) -> Any:
        array = read(name)
        size = sum(a.nbytes for a in jax.tree.leaves(array))
        leaf = _encoded(array, plan.format_of(name, spec), spec, plan.dtype, rules, mesh, memory)
        track(name, size)
        return leaf

    outer = {name: one(name, spec, None) for name, spec in architecture.outer()[1].items()}
    banks = []
    for segment in architecture.segments:
        if form == "unrolled":
            weights = tuple(
                {n: one(f"layers.{i}.{n}", s, memory) for n, s in architecture.block(kind)[1].items()}
                for i, kind in _layers(segment)
            )
        else:
            weights = _stacked(architecture, plan, segment, mesh, memory, one)
        banks.append(Bank(weights, segment.kinds, segment.repeats, plan.home, form))
    return {"outer": outer, "banks": tuple(banks)}


def _layers(segment: Segment) -> Iterator[tuple[int, Any]]:
    for i, kind in enumerate(segment.kinds * segment.repeats):
        yield segment.start + i, kind


def _stacked(
    architecture: Architecture, plan: Plan, segment: Segment, mesh: Mesh, memory: str | None, one: Any
) -> tuple[dict[str, Any], ...]:
    rules, period = plan.sharding_rules(), len(segment.kinds)
    weights: tuple[dict[str, Any], ...] = tuple({} for _ in segment.kinds)
    for j, kind in enumerate(segment.kinds):
        for name, spec in architecture.block(kind)[1].items():
            full = [f"layers.{segment.start + r * period + j}.{name}" for r in range(segment.repeats)]
            formats = {plan.format_of(n, spec) for n in full}
            if len(formats) > 1:
                raise ValueError(
                    f"Plan: layers that are scanned share one format; {name} has {', '.join(sorted(formats))} in different"
                    f" layers. Give the same format to all of {full[0]} ... {full[-1]}, or use form='unrolled'"
                )
            axes = _leaf_axes(formats.pop(), ("layers", *spec.axes), spec, stacked=True)
            stack = None
            for r, layer_name in enumerate(full):
                leaf = one(layer_name, spec, None)
                if stack is None:
                    stack = jax.tree.map(
                        lambda x, a: _empty_stack(
                            (segment.repeats, *x.shape), x.dtype, named_sharding(rules, mesh, a, memory_kind=memory)
                        ),
                        leaf,
                        axes,
                    )
                stack = jax.tree.map(lambda s, x, r=r: _put(s, x, r), stack, leaf)
            weights[j][name] = stack
    return weights


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


def _leaf_axes(format_name: str, axes: tuple[str | None, ...], spec: Spec, *, stacked: bool = False) -> Any:
    """The tree of logical axes of a stored parameter; each leaf an `Axes`, which is no pytree node."""
    if spec.out is None:
        return _Axes(axes)
    leading = axes[:1] if stacked else ()
    inner = technique.find(WEIGHTS, format_name).leaf_axes(spec.axes, spec.out)
    return jax.tree.map(lambda a: _Axes((*leading, *a)), inner, is_leaf=lambda a: isinstance(a, tuple))


class _Axes(tuple):
    """Axes names as one leaf: a subclass of tuple is not taken apart by tree.map."""


def _encoded(array: Any, format_name: str, spec: Spec, dtype: str, rules: Rules, mesh: Mesh, memory: str | None) -> Any:
    """One parameter in its format and place; `array` is numpy, or a Weight of numpy arrays that is in its format already."""
    axes = _leaf_axes(format_name, spec.axes, spec)
    places = jax.tree.map(lambda a: named_sharding(rules, mesh, a, memory_kind=memory), axes)
    plain = spec.out is None or format_name == "dense"
    if isinstance(array, Weight) or (plain and array.dtype == jnp.dtype(dtype)):
        return jax.device_put(array, places)
    on_device = jax.tree.map(lambda a: named_sharding(rules, mesh, a), axes)
    raw = jax.device_put(array, named_sharding(rules, mesh, spec.axes))
    leaf = _encoder(format_name, spec.out, dtype, jax.tree.structure(on_device), tuple(jax.tree.leaves(on_device)))(raw)
    return leaf if memory is None else jax.device_put(leaf, places)


@functools.cache
def _encoder(format_name: str, out: int | None, dtype: str, tree: Any, shardings: tuple[NamedSharding, ...]) -> Any:
    def encode(raw: jax.Array) -> Any:
        w = raw.astype(dtype)
        return w if out is None else technique.find(WEIGHTS, format_name).encode(w, out=out)

    return jax.jit(encode, out_shardings=jax.tree.unflatten(tree, shardings))


def abstract(architecture: Architecture, plan: Plan, mesh: Mesh) -> Any:
    """What `place` would make, as ShapeDtypeStructs with shardings: for planning, compiling and restoring."""
    rules = plan.sharding_rules()
    memory, form = home(plan.home).MEMORY, plan.resolved_form

    def leaf(name: str, spec: Spec, memory: str | None, stack: int | None = None) -> Any:
        made = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, plan.dtype)
        lead_axes, lead = (("layers",), (stack,)) if stack is not None else ((), ())
        axes = _leaf_axes(plan.format_of(name, spec), (*lead_axes, *spec.axes), spec, stacked=stack is not None)
        return jax.tree.map(
            lambda x, a: jax.ShapeDtypeStruct(
                (*lead, *x.shape), x.dtype, sharding=named_sharding(rules, mesh, a, memory_kind=memory)
            ),
            made,
            axes,
        )

    outer = {name: leaf(name, spec, None) for name, spec in architecture.outer()[1].items()}
    banks = []
    for segment in architecture.segments:
        if form == "unrolled":
            weights = tuple(
                {n: leaf(f"layers.{i}.{n}", s, memory) for n, s in architecture.block(kind)[1].items()}
                for i, kind in _layers(segment)
            )
        else:
            weights = tuple(
                {
                    n: leaf(f"layers.{segment.start + j}.{n}", s, memory, segment.repeats)
                    for n, s in architecture.block(kind)[1].items()
                }
                for j, kind in enumerate(segment.kinds)
            )
        banks.append(Bank(weights, segment.kinds, segment.repeats, plan.home, form))
    return {"outer": outer, "banks": tuple(banks)}


def stored(architecture: Architecture, params: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each parameter by name as a function that fetches it: an array or a Weight, of one layer where it is a layer's."""
    found: dict[str, Callable[[], Any]] = {n: (lambda w=w: w) for n, w in params["outer"].items()}
    for segment, bank in zip(architecture.segments, params["banks"], strict=True):
        for i, kind in enumerate(segment.kinds * segment.repeats):
            r, j = divmod(i, len(segment.kinds))
            for name in architecture.block(kind)[1]:
                if bank.form == "unrolled":
                    fetch = lambda i=i, name=name, bank=bank: bank.weights[i][name]  # noqa: E731
                else:
                    fetch = lambda r=r, j=j, name=name, bank=bank: jax.tree.map(  # noqa: E731
                        lambda s: _take_at(s.sharding)(s, r), bank.weights[j][name]
                    )
                found[f"layers.{segment.start + i}.{name}"] = fetch
    return found


@functools.cache
def _take_at(sharding: NamedSharding) -> Any:
    """stack[i] on the device: the slice is taken inside a program, where a host stack may be sliced by a scan only."""

    def take(stack: jax.Array, i: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(stack, i, 1, 0)
        if sharding.memory_kind not in (None, "device"):
            part = jax.device_put(part, jax.memory.Space.Device)
        return part[0]

    return jax.jit(take, static_argnums=1)
