"""Where what a step changes stands: over a mesh each trained array is split as the matrix that it is of or beside, and each
moment of an optimizer as its array. A run places its state so, and a plan counts and compiles it so."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path

from jaxengine.architecture import Architecture
from jaxengine.finetune import layered, mezo, sampled
from jaxengine.finetune.settings import Task
from jaxengine.finetune.step import Batch, State, Tuning
from jaxengine.finetune.trained.base import trained
from jaxengine.plan import Plan
from sharding.rules import named_sharding


def adapter_places(train: str, architecture: Architecture, plan: Plan, mesh: Any, tree: Any) -> Any:
    """The trained tree with a sharding for each array of matrices' A and B: split as the matrix itself."""
    of, rules, parts = trained(train).leaf_axes, plan.sharding_rules(), plan.parts(architecture)

    def one(path: Any, leaf: Any) -> NamedSharding:
        _, bank, place, *_, name, array = path  # banks, bank, kind or layer, (one or rest), matrix, a or b
        kinds = parts[bank.idx].kinds
        axes = of(architecture.block(kinds[place.idx % len(kinds)])[1][name.key])[array.key]
        stacked = ("layers",) * (leaf.ndim - len(axes))
        return named_sharding(rules, mesh, (*stacked, *axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def optimizer_places(state: Any, places: Any, mesh: Any) -> Any:
    """A sharding for each leaf of an optimizer's state: a moment is split as its parameter, the rest is whole everywhere."""
    flat, _ = tree_flatten_with_path(places)
    own = {tuple(map(str, path)): place for path, place in flat}

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        place = next((own[names[i:]] for i in range(len(names)) if names[i:] in own), None)
        if place is None or len(place.spec) > leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        with contextlib.suppress(ValueError):  # a row's or a column's mean, of another shape
            place.shard_shape(leaf.shape)
            return place
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def state(tuning: Tuning, task: Task, architecture: Architecture, plan: Plan, made: Any, banks: Any) -> State:
    """The state's shapes, dtypes and places. made: what is trained, abstract; banks: the parameters', without weights."""
    mesh = tuning.mesh
    if task.layered(plan):
        return layered.abstract(tuning, banks, made)
    if task.sampled:
        return sampled.abstract(tuning, banks, made)
    if task.beside:
        places = adapter_places(task.train, architecture, plan, mesh, made)
    else:
        places = jax.tree.map(lambda s: s.sharding, made)

    def placed(s: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)

    if not task.optimizer.order:
        return mezo.abstract(tuning, jax.tree.map(placed, made, places))
    optimizer = jax.eval_shape(tuning.optax().init, made)
    places = places, optimizer_places(optimizer, places, mesh), NamedSharding(mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return State(*(jax.tree.map(placed, x, place) for x, place in zip((made, optimizer, step), places, strict=True)))


def batch(plan: Plan, mesh: Any, shape: tuple[int, ...]) -> Batch:
    """A batch [..., B, T]'s shapes, dtypes and places: rows split as the rules say."""
    axes = (None,) * (len(shape) - 2) + ("batch", "sequence")
    place = named_sharding(plan.sharding_rules(), mesh, axes, shape=shape)
    ints: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    floats: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Batch(ints, ints, floats, ints, ints)
