"""What comes into each matrix of a layer, found without a word of the model's.

A weight is a leaf that contracts, so a leaf that also tells what it was contracted with stands in for it: `Heard`. It lives
for one trace. What was heard leaves the traced function as its results, and nothing is kept beside them: the function stays
pure, and what nobody asked for (all that comes after the matrix in question) the compiler drops.

Matrices that are handed one and the same array (q, k and v; gate and up) make a group: their statistics are made once.

    H = sum_t x_t x_t^T      a = sum_t |x_t|        over the tokens t of all samples, in float32

B rows, T tokens, I inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.cache.base import PlainAttend
from jaxengine.engine import Engine, embed, layer_body, program
from jaxengine.weights.base import Weight, contract, split_spec, take, value

Note = Callable[[str, str, Array], None]  # (name, spec, x)
EXACT = lax.Precision.HIGHEST  # a GPU would take float32 for TF32


@dataclasses.dataclass(frozen=True, eq=False)
class Heard(Weight):
    """A weight that tells what it is contracted with."""

    weight: Any
    name: str
    note: Note

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dense(self) -> Array:
        return self.weight.dense() if isinstance(self.weight, Weight) else self.weight.astype(jnp.float32)

    def error_bound(self) -> Array:
        return self.weight.error_bound() if isinstance(self.weight, Weight) else jnp.zeros(())

    def contract(self, spec: str, x: Array) -> Array:
        self.note(self.name, spec, x)
        return contract(spec, x, self.weight)

    def take(self, ids: Array, dtype: Any) -> Array:
        return take(self.weight, ids, dtype)


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices of a layer that read one array, in the order in which they do, and the in dims that they have."""

    names: tuple[str, ...]
    in_shape: tuple[int, ...]

    @property
    def inputs(self) -> int:
        return math.prod(self.in_shape)


def listened(
    engine: Engine, kind: Hashable, weights: Mapping[str, Any], x: Array, positions: Array, segments: Any
) -> tuple[Array, list[tuple[str, str, Array]]]:
    """The layer's result, and (name, spec, x) of each contraction in it, in turn."""
    heard: list[tuple[str, str, Array]] = []
    specs = engine.architecture.block(kind)[1]

    def note(name: str, spec: str, x: Array) -> None:
        heard.append((name, spec, x))

    wrapped = {n: w if specs[n].out is None else Heard(value(w), n, note) for n, w in weights.items()}
    y, _ = layer_body(engine, PlainAttend(positions, segments))(kind, wrapped, x, ())
    return y, heard


def inputs_of(spec: str, x: Array) -> Float[Array, "N I"]:
    """What a matrix read, a row for each token."""
    batch = len(split_spec(spec)[0])
    return x.reshape(math.prod(x.shape[:batch]), -1)


def groups(engine: Engine, kind: Hashable, hidden_size: int) -> tuple[Group, ...]:
    """The groups of a layer of this kind, in the order in which it runs. TypeError for a matrix that is never contracted."""
    specs = engine.architecture.block(kind)[1]
    found: dict[int, list[tuple[str, str, Array]]] = {}

    def run(weights: Any, x: Array, positions: Array) -> Array:
        y, heard = listened(engine, kind, weights, x, positions, None)
        for name, spec, seen in heard:
            found.setdefault(id(seen), []).append((name, spec, seen))  # which keeps it, so that its id is its own
        return y

    dtype = jnp.dtype(engine.dtype)
    weights = {n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in specs.items()}
    abstract = jax.ShapeDtypeStruct((1, 2, hidden_size), dtype), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    jax.eval_shape(run, weights, *abstract)
    made = tuple(
        Group(tuple(dict.fromkeys(name for name, _, _ in seen)), specs[seen[0][0]].shape[specs[seen[0][0]].out :])
        for seen in found.values()
    )
    met = [name for group in made for name in group.names]
    if odd := [n for n, s in specs.items() if s.out is not None and met.count(n) != 1]:
        raise TypeError(
            f"{engine.architecture.family}: {odd[0]} is contracted {met.count(odd[0])} times, and it is one time"
        )
    return made


@program(0, 1, 2, donate=(7, 8))
def gather(
    engine: Engine,
    kind: Hashable,
    name: str,
    weights: Any,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    H: Float[Array, "I I"],
    a: Float[Array, "I"],
) -> tuple[Float[Array, "I I"], Float[Array, "I"]]:
    """H and a with what these rows bring into matrix `name`; padding brings nothing."""
    _, heard = listened(engine, kind, weights, x, positions, segments)
    own = (positions >= 0).reshape(-1, 1)
    for matrix, spec, seen in heard:
        if matrix == name:
            rows = inputs_of(spec, seen)
            rows = jnp.where(own, rows, jnp.zeros((), rows.dtype))
            H = H + jnp.einsum("ni,nj->ij", rows, rows, preferred_element_type=jnp.float32, precision=EXACT)
            a = a + jnp.abs(rows.astype(jnp.float32)).sum(0)
    return H, a


@program(0, 1)
def through(
    engine: Engine,
    kind: Hashable,
    weights: Any,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """What the layer makes of these rows."""
    return layer_body(engine, PlainAttend(positions, segments))(kind, weights, x, ())[0]


@program(0)
def enter(engine: Engine, outer: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Tokens to what comes into the first layer."""
    return embed(engine, {"outer": outer}, tokens, PlainAttend(positions, None))
