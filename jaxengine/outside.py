"""The engine's functions for layers that a compiled program cannot reach: those of a bank of the form 'python'.

What comes before such layers is one program (the embedding, and all banks that are inside), each of them is one, and what
comes after is one; Python calls them in turn (`walk.drive`). Between two steps it asks whether all rows are done: one
wait in a pass that brings every layer from a file costs nothing.

B batch, T queries, D model, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine import engine as inside
from jaxengine import sampling
from jaxengine.engine import Chosen, Decoding, Engine, program
from jaxengine.walk import drive, lay_out


@program(0, 1, donate=(5,))
def enter(
    engine: Engine, chunk: int, params: Any, tokens: Int[Array, "B T"], attend: Any, states: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """Tokens through the embedding and the banks that are inside, which stand before those that are not."""
    x = inside.embed(engine, params, tokens, attend)
    banks = tuple(bank for bank in params["banks"] if not bank.outside)
    x, states = inside.through(engine, banks, x, attend, states, chunk)
    return x, inside.placed_cache(engine, banks, states)


@program(0, 1, 2, donate=(6,))
def layer(
    engine: Engine, kind: Hashable, chunk: int, weights: Any, x: Float[Array, "B T D"], attend: Any, kv: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer."""
    x, kv = inside.layer_body(engine, attend, chunk)(kind, weights, x, kv)
    return x, inside.placed_slots(engine, kv, stacked=False)


@program(0, 1)
def empty_cache(engine: Engine, length: int, params: Any, tokens: Int[Array, "B T"]) -> Any:
    """Every layer's cache, empty."""
    return inside.empty_cache(engine, params, tokens.shape[0], length)


fresh = program(0)(inside.fresh)
following = program(0)(inside.following)
anew = program(0)(inside.anew)
plain = program(0)(lambda engine, tokens, lengths: inside.plain(tokens, lengths))
head = program(0)(inside.head)
first_tokens = program(0, 1, 2, 3, donate=(6,))(inside.first_tokens)
copied_tokens = program(0, 1, 2, 3)(inside.first_tokens)  # several samples of a prompt: the cache is not written over
next_tokens = program(0, 1, 2, donate=(5, 6))(inside.next_tokens)


def described(params: Any) -> Any:
    """The parameters that programs take: of banks outside, only how many layers of which kinds there are."""
    banks = tuple(dataclasses.replace(b, weights=(), source=None) if b.outside else b for b in params["banks"])
    return {"outer": params["outer"], "banks": banks}


def forward(
    engine: Engine, params: Any, tokens: Int[Array, "B T"], attend: Any, states: Any, chunk: int = 0
) -> tuple[Float[Array, "B T D"], Any]:
    """Tokens through the embedding and every layer, as `engine.forward`; `states` are written over."""
    banks = params["banks"]
    first = next(i for i, bank in enumerate(banks) if bank.outside)
    x, done = enter(engine, chunk, described(params), tokens, attend, states[:first])

    def run(kind: Hashable, weights: Any, x: Array, kv: Any) -> tuple[Array, Any]:
        return layer(engine, kind, chunk, weights, x, attend, kv)

    x, rest = drive(run, x, banks[first:], states[first:])
    return x, (*done, *rest)


def score(engine: Engine, params: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T V"]:
    """As `engine.score`."""
    nothing = lay_out(params["banks"], lambda kind: ())
    x, _ = forward(engine, params, tokens, plain(engine, tokens, lengths), nothing)
    return head(engine, described(params), x)


def prefill(
    engine: Engine,
    steps: sampling.Steps,
    length: int,
    samples: int,
    top: int,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    values: Any,
    keys: Array,
    stop_ids: Int[Array, "E"],
) -> tuple[Decoding, Chosen]:
    """As `engine.prefill`."""
    outer = described(params)
    empty = empty_cache(engine, length, outer, tokens)
    chunk = engine.architecture.chunk(engine.chunk, tokens.shape[1])
    x, cache = forward(engine, params, tokens, fresh(engine, tokens, lengths), empty, chunk)
    end = first_tokens if samples == 1 else copied_tokens
    return end(engine, steps, samples, top, outer, x, cache, tokens, lengths, values, keys, stop_ids)


def reread(engine: Engine, params: Any, now: Decoding, tokens: Int[Array, "B T"], rows: Bool[Array, "B"]) -> Decoding:
    """As `engine.reread`."""
    _, cache = forward(engine, params, tokens, anew(engine, now, tokens, rows), now.cache)
    return dataclasses.replace(now, cache=cache)


def decode(
    engine: Engine,
    steps: sampling.Steps,
    top: int,
    params: Any,
    now: Decoding,
    values: Any,
    stop_ids: Int[Array, "E"],
    limit: Int[Array, ""],
) -> tuple[Decoding, Chosen, Int[Array, ""]]:
    """As `engine.decode`; the tokens chosen are [B, steps made]."""
    outer, out = described(params), []
    while len(out) < int(limit) and not bool(now.done.all()):
        x, cache = forward(engine, params, now.token[:, None], following(engine, now), now.cache)
        # the old cache has been written over
        now, chosen = next_tokens(
            engine, steps, top, outer, x, cache, dataclasses.replace(now, cache=()), values, stop_ids
        )
        out.append(chosen)
    if not out:
        raise ValueError(f"decode: no step to make; limit is {int(limit)} and rows done are {now.done.tolist()}")
    return now, jax.tree.map(lambda *a: jnp.stack(a, axis=1), *out), jnp.int32(len(out))
