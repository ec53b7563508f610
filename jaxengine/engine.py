"""The compiled functions: a forward pass, prefill, and a number of decode steps. Pure functions of (params, cache, tokens).

Each is what comes before the layers, the layers, and what comes after. Here the three are one program; `outside.py` has
the same functions for layers that a program cannot reach.

What is compiled is keyed on an Engine (family, config, cache, dtype, sharding), which is frozen and hashes, and on shapes.
What goes from one call to the next is laid out over the mesh by name in each of them: left to the compiler, a cache comes
out of prefill split in one way and out of decode in another, and the next call compiles again.

B batch, T queries, D model, V vocab, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxengine import sampling
from jaxengine.architecture import Architecture, merge
from jaxengine.cache.base import CachedAttend, Caching, PlainAttend, empty, split_alike
from jaxengine.homes.base import Bank, home
from jaxengine.nn import Attention
from jaxengine.walk import Body, lay_out, walk
from pallas_kernels.aot import OPTIONS
from pallas_kernels.dispatch import below_ampere
from sharding.rules import Rules, constrain, named_sharding

CHUNK = 64  # steps that one call of `decode` can make; more tokens are more calls of the same program

# Two turns of a loop are written out as one, so that what a turn brings for the next stays where it was put; else XLA copies
# it on the device once more (openxla/xla: DoubleBufferLoopUnrolling; right from jax 0.11.1 on, as homes.base.LEAST_JAX)
DOUBLED = {"xla_gpu_enable_while_loop_double_buffering": True}


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a program is compiled for, apart from shapes."""

    architecture: Architecture
    caching: Caching
    dtype: str
    rules: Rules
    mesh: jax.sharding.Mesh
    chunk: int = 0  # tokens of a prompt that a layer reads at a time; 0: all
    attention: str = "auto"  # the implementation of attention, of cache.base.ATTENTION


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a batch stands between steps. `token` was chosen last and is not in the cache yet.

    lengths: tokens in the cache; done: rows that have met a stop id; counts: what penalties need.
    """

    cache: Any
    token: Int[Array, "B"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Any
    keys: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens with their log-probabilities under the model, and the `top` most likely ones beside them."""

    token: Int[Array, "..."]
    logprob: Float[Array, "..."]
    top_ids: Int[Array, "..."]
    top_logprobs: Float[Array, "..."]


class Program:
    """A pure function of an Engine and arrays, compiled with the options of the platform that the Engine's mesh is of."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static: tuple[int, ...],
        donate: tuple[int, ...] = (),
        doubles: bool = False,
    ):
        self.function, self._static, self._donate, self._doubles = function, static, donate, doubles
        functools.update_wrapper(self, function)

    @functools.cache  # noqa: B019  (programs live as long as the module)
    def on(self, platform: str, *, doubled: bool = False) -> Any:
        """The function under jit: on a GPU with the scheduler that overlaps copies with compute. doubled: under DOUBLED."""
        options = OPTIONS | (DOUBLED if doubled else {}) if platform == "gpu" else None
        return jax.jit(
            self.function, static_argnums=self._static, donate_argnums=self._donate, compiler_options=options
        )

    def fitting(self, platform: str, engine: Engine, *args: Any) -> Any:
        """The function under jit with the options of a call with these arguments, which may be abstract."""
        if platform == "gpu" and self._doubles and carries_a_layer(engine, args):
            return self.on(platform, doubled=True)
        return self.on(platform)

    def __call__(self, engine: Engine, *args: Any) -> Any:
        return self.fitting(engine.mesh.devices.flat[0].platform, engine, *args)(engine, *args)

    def lower(self, engine: Engine, *args: Any) -> Any:
        """What a call would run, to be compiled and looked at."""
        return self.fitting(engine.mesh.devices.flat[0].platform, engine, *args).lower(engine, *args)


def program(
    *static: int, donate: tuple[int, ...] = (), doubles: bool = False
) -> Callable[[Callable[..., Any]], Program]:
    """Make a Program of a function: the places of its static arguments, and of those it may write over. doubles: whether it
    is compiled under DOUBLED where `carries_a_layer`."""
    return lambda function: Program(function, static=static, donate=donate, doubles=doubles)


def carries_a_layer(engine: Engine, args: Any) -> bool:
    """Whether a program has one loop of like layers that are fetched one ahead, for one card from sm_80 on: where DOUBLED was
    found to be better for decoding. (Elsewhere XLA's scheduler starts copies of the second of two turns late, which costs more
    than is saved: on a T4, over several cards, in programs that read prompts, and in steps of fine-tuning. Of unlike layers
    nothing is copied: a turn leaves each kind where it came.)"""
    banks = [x for x in jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, Bank)) if isinstance(x, Bank)]
    ahead = [len(bank.kinds) for bank in banks if bank.form == "ahead"]
    return ahead == [1] and engine.mesh.size == 1 and not below_ampere()


def placed_cache(engine: Engine, banks: Any, cache: Any) -> Any:
    """The cache, laid out over the mesh as the rules for its dims say."""

    return tuple(placed_slots(engine, kv, stacked=bank.stacked) for bank, kv in zip(banks, cache, strict=True))


def placed_slots(engine: Engine, kv: Any, *, stacked: bool) -> Any:
    """The cache of a layer, or of several, or a stack of them."""

    return jax.tree.map(lambda x: constrain(x, engine.rules, engine.mesh, slot_axes(x.ndim, stacked=stacked)), kv)


def slot_axes(ndim: int, *, stacked: bool) -> tuple[str | None, ...]:
    """The logical axes of an array of a layer's cache, or of a stack of them."""
    lead = ("cache_layers",) if stacked else ()
    axes = (*lead, "cache_batch", "cache_kv_heads", "cache_slots", "cache_head_dim")[:ndim]
    return (*axes, *((None,) * (ndim - len(axes))))


def placed_state(engine: Engine, banks: Any, now: Decoding) -> Decoding:
    """A batch's state between calls: the cache as the rules say, counts as logits are, the rest whole everywhere."""

    def rows(x: Array) -> Array:
        return constrain(x, engine.rules, engine.mesh, (None,) * x.ndim)

    return Decoding(
        placed_cache(engine, banks, now.cache), rows(now.token), rows(now.lengths), rows(now.done),
        jax.tree.map(lambda c: constrain(c, engine.rules, engine.mesh, ("batch", "act_vocab")), now.counts),
        rows(now.keys),
    )  # fmt: skip


def forward(
    engine: Engine, params: Any, tokens: Int[Array, "B T"], attend: Any, layers: Any, chunk: int = 0
) -> tuple[Float[Array, "B T D"], Any]:
    """Tokens through the embedding and every layer; gives the residual stream and the layers' new caches.

    attend: how a layer sees the tokens, and the positions that they stand at. chunk: tokens are taken so many at a time
    into the (empty) caches, so that temporaries are those of a chunk; T must be a multiple. Where layers are streamed the
    chunks are inside the layer, not the layers inside a chunk: weights are fetched once.
    """
    x = embed(engine, params, tokens, attend)
    return through(engine, params["banks"], x, attend, layers, chunk)


def through(
    engine: Engine, banks: Any, x: Float[Array, "B T D"], attend: Any, layers: Any, chunk: int
) -> tuple[Float[Array, "B T D"], Any]:
    """The residual stream through banks inside a program: see `forward`."""

    def listed(bank: Bank) -> bool:
        return bank.form == "unrolled" and home(bank.home).TIER == "device"

    first = len(list(itertools.takewhile(listed, banks))) if chunk else 0
    done: tuple[Any, ...] = ()
    if first:  # one loop over chunks through all of them: a loop in each layer takes XLA minutes for 40 layers

        def body(x: Array, attend: Any, states: Any) -> tuple[Array, Any]:
            return walk(layer_body(engine, attend), x, banks[:first], states, gathers=gathers(engine))

        x, done = in_chunks(engine, attend.positions, chunk, body, x, tuple(layers[:first]))
    x, rest = walk(layer_body(engine, attend, chunk), x, banks[first:], layers[first:], gathers=gathers(engine))
    return x, (*done, *rest)


def gathers(engine: Engine) -> bool:
    """Whether layers are split over devices by their inputs (fsdp), and so brought together to be used."""
    return bool(named_sharding(engine.rules, engine.mesh, ("embed",)).spec)


def in_chunks(
    engine: Engine, positions: Int[Array, "B T"], chunk: int, body: Any, x: Float[Array, "B T D"], states: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """body(x, attend, states) for each `chunk` tokens of x in turn, into caches that are empty before."""
    before = (positions >= 0).sum(-1, dtype=jnp.int32)

    def part(i: Array, loop: Any) -> Any:
        x, states = loop
        here, at = (lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1) for a in (x, positions))
        here = constrain(here, engine.rules, engine.mesh, ("batch", "sequence", "act_embed"))
        attend = CachedAttend(engine.caching, at, jnp.minimum(before, i * chunk), fresh=False)
        here, states = body(here, attend, states)
        return lax.dynamic_update_slice_in_dim(x, here, i * chunk, axis=1), states

    return lax.fori_loop(0, x.shape[1] // chunk, part, (x, states))


def embed(engine: Engine, params: Any, tokens: Int[Array, "B T"], attend: Any) -> Float[Array, "B T D"]:
    """Tokens to the residual stream."""
    outer = merge(engine.architecture.outer()[0], params["outer"])
    x = outer.embed(tokens, attend.positions, jnp.dtype(engine.dtype))
    return constrain(x, engine.rules, engine.mesh, ("batch", "sequence", "act_embed"))


def layer_body(engine: Engine, attend: Any, chunk: int = 0) -> Body:
    """The body of the walk over layers, with `attend` for its leaves: see `forward`."""
    return jax.tree_util.Partial(functools.partial(_layer, engine, chunk), attend)


def _layer(engine: Engine, chunk: int, attend: Any, kind: Any, weights: Any, x: Array, kv: Any) -> tuple[Array, Any]:
    """One layer."""

    def on_mesh(x: Array, *axes: str) -> Array:
        return constrain(x, engine.rules, engine.mesh, ("batch", "sequence", *axes))

    def placed_attend(attend: Any, attention: Attention, q: Array, k: Array, v: Array, kv: Any) -> tuple[Array, Any]:
        q = on_mesh(q, "act_heads", "act_head_dim")
        k, v = (on_mesh(a, "act_kv_heads", "act_head_dim") for a in (k, v))
        alike = split_alike(engine.rules, engine.mesh, q.shape, k.shape)
        out, kv = attend(attention, q, k, v, kv, by=engine.attention, alike=alike)
        return on_mesh(out, "act_heads", "act_head_dim"), kv

    block = merge(engine.architecture.block(kind)[0], weights)

    def whole(x: Array, attend: Any, kv: Any) -> tuple[Array, Any]:
        return block(x, attend.positions, functools.partial(placed_attend, attend), kv)

    x, kv = in_chunks(engine, attend.positions, chunk, whole, x, kv) if chunk else whole(x, attend, kv)
    return on_mesh(x, "act_embed"), kv


def head(engine: Engine, params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The residual stream to float32 logits."""
    outer = params["outer"]
    if gathers(engine):  # as the layers in `walk`: not brought together before its turn
        outer, x = lax.optimization_barrier((outer, x))
    logits = merge(engine.architecture.outer()[0], outer).head(x).astype(jnp.float32)
    return constrain(logits, engine.rules, engine.mesh, ("batch", "sequence", "act_vocab"))


def empty_cache(engine: Engine, params: Any, batch: int, length: int) -> Any:
    """Every layer's cache, empty, laid out as the layers' weights are."""

    def make(kind: Any) -> Any:
        return empty(engine.caching, engine.architecture.attention(kind), batch, length, jnp.dtype(engine.dtype))

    return placed_cache(engine, params["banks"], lay_out(params["banks"], make))


def plain(tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> PlainAttend:
    """For rows that are scored: each token sees those before it, and nothing is kept."""
    return PlainAttend(row_positions(tokens.shape[1], lengths), whole=True)


def fresh(engine: Engine, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> CachedAttend:
    """For rows that are read from their first token on, right-padded to T, into an empty cache."""
    return CachedAttend(engine.caching, row_positions(tokens.shape[1], lengths), jnp.zeros_like(lengths), fresh=True)


def following(engine: Engine, now: Decoding) -> CachedAttend:
    """For one token further: each row's last token goes into the cache; rows that are done write nothing."""
    return CachedAttend(engine.caching, jnp.where(now.done, -1, now.lengths)[:, None], now.lengths, fresh=False)


@program(0)
def score(engine: Engine, params: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T V"]:
    """Logits of every position, float32, keeping no cache; rows are padded on the right to T."""
    nothing = lay_out(params["banks"], lambda kind: ())
    x, _ = forward(engine, params, tokens, plain(tokens, lengths), nothing)
    return head(engine, params, x)


@program(0, 1, 2, 3, 4)
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
    """Read the prompts, right-padded to T, into a new cache of `length` tokens, and choose each row's first token.

    Each prompt becomes `samples` rows next to each other; `values` and `keys` are of those B * samples rows.
    """
    B, T = tokens.shape
    empty = empty_cache(engine, params, B, length)
    chunk = engine.architecture.chunk(engine.chunk, T)
    x, cache = forward(engine, params, tokens, fresh(engine, tokens, lengths), empty, chunk)
    return first_tokens(engine, steps, samples, top, params, x, cache, tokens, lengths, values, keys, stop_ids)


def first_tokens(
    engine: Engine,
    steps: sampling.Steps,
    samples: int,
    top: int,
    params: Any,
    x: Float[Array, "B T D"],
    cache: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    values: Any,
    keys: Array,
    stop_ids: Int[Array, "E"],
) -> tuple[Decoding, Chosen]:
    """What comes after the layers in `prefill`."""
    B, T = tokens.shape
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    logits = head(engine, params, last)[:, 0]
    rows = jnp.repeat(jnp.arange(B, dtype=jnp.int32), samples)
    counts = sampling.init_counts(steps, tokens[rows], row_positions(T, lengths)[rows] >= 0, logits.shape[-1])
    batch_dim = [1 if bank.stacked else 0 for bank in params["banks"]]
    cache = tuple(
        jax.tree.map(lambda a, d=d: jnp.take(a, rows, axis=d), c) for c, d in zip(cache, batch_dim, strict=True)
    ) if samples > 1 else cache  # fmt: skip
    chosen, counts = choose(steps, top, values, logits[rows], counts, keys, lengths[rows])
    done = (chosen.token[:, None] == stop_ids[None, :]).any(-1)
    now = Decoding(cache, chosen.token, lengths[rows], done, counts, keys)
    return placed_state(engine, params["banks"], now), chosen


@program(0, donate=(2,))
def reread(engine: Engine, params: Any, now: Decoding, tokens: Int[Array, "B T"], rows: Bool[Array, "B"]) -> Decoding:
    """Read the given rows anew, each from its first token to `now.token`, and put what they now give into the cache.

    For models whose keys and values of all tokens change when a row grows past `architecture.reread_at`: as the last
    token stands at that position, every token is turned as in a long row. `now.token` is written ahead of its step,
    which writes it again.
    """
    _, cache = forward(engine, params, tokens, anew(engine, now, tokens, rows), now.cache)
    return placed_state(engine, params["banks"], dataclasses.replace(now, cache=cache))


def anew(engine: Engine, now: Decoding, tokens: Int[Array, "B T"], rows: Bool[Array, "B"]) -> CachedAttend:
    """For rows that are read anew; the others have no tokens."""
    return fresh(engine, tokens, jnp.where(rows, now.lengths + 1, 0))


@program(0, 1, 2, donate=(4,), doubles=True)
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
    """Up to `limit` (at most CHUNK) steps in one compiled loop; ends early when every row is done.

    Gives the new state, the tokens chosen [B, CHUNK] and the number of steps made. A row that is done repeats its last
    token and writes nothing.
    """
    B = now.token.shape[0]

    def slot(x: Array) -> Array:
        return jnp.zeros((CHUNK, *x.shape), x.dtype)

    blank = Chosen(
        jnp.zeros((B,), jnp.int32), jnp.zeros((B,)), jnp.zeros((B, top), jnp.int32), jnp.zeros((B, top), jnp.float32)
    )

    def going(loop: Any) -> Array:
        i, now, _ = loop
        return (i < limit) & ~now.done.all()

    def once(loop: Any) -> Any:
        i, now, out = loop
        weights, now = read_each_step(engine, params, now)
        x, cache = forward(engine, weights, now.token[:, None], following(engine, now), now.cache)
        now, chosen = next_tokens(engine, steps, top, weights, x, cache, now, values, stop_ids)
        out = jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 0), out, chosen)
        return i + 1, now, out

    made, now, out = lax.while_loop(going, once, (jnp.int32(0), now, jax.tree.map(slot, blank)))
    return placed_state(engine, params["banks"], now), jax.tree.map(lambda a: a.swapaxes(0, 1), out), made


def read_each_step(engine: Engine, params: Any, now: Decoding) -> tuple[Any, Decoding]:
    """The parameters, on a CPU as something that each step of a loop makes anew.

    XLA:CPU moves what does not change out of a loop though it be larger than what it is made of: all codes would be turned into
    float32 before the loop, which then reads four to eight times their bytes.
    """
    mesh = engine.mesh
    device = mesh.abstract_device if isinstance(mesh, jax.sharding.AbstractMesh) else mesh.devices.flat[0]
    if device is None or device.platform != "cpu":  # an abstract mesh: compiled for a card that is not there
        return params, now
    params, token = lax.optimization_barrier((params, now.token))
    return params, dataclasses.replace(now, token=token)


def next_tokens(
    engine: Engine,
    steps: sampling.Steps,
    top: int,
    params: Any,
    x: Float[Array, "B 1 D"],
    cache: Any,
    now: Decoding,
    values: Any,
    stop_ids: Int[Array, "E"],
) -> tuple[Decoding, Chosen]:
    """What comes after the layers in a step of `decode`."""
    logits = head(engine, params, x)[:, 0]
    lengths = jnp.where(now.done, now.lengths, now.lengths + 1)
    chosen, counts = choose(steps, top, values, logits, now.counts, now.keys, lengths)
    chosen = dataclasses.replace(chosen, token=jnp.where(now.done, now.token, chosen.token))
    done = now.done | (chosen.token[:, None] == stop_ids[None, :]).any(-1)
    now = Decoding(cache, chosen.token, lengths, done, counts, now.keys)
    return placed_state(engine, params["banks"], now), chosen


def choose(
    steps: sampling.Steps, top: int, values: Any, logits: Float[Array, "B V"], counts: Any, keys: Array, lengths: Array
) -> tuple[Chosen, Any]:
    """A token for each row from its logits; its key is folded with its length, so that neighbours change nothing."""
    token, logprob = sampling.sample(steps, values, logits, counts, sampling.step_keys(keys, lengths))
    if top:
        top_ids, top_logprobs = sampling.top_logprobs(logits, top)
    else:
        top_ids, top_logprobs = jnp.zeros((len(token), 0), jnp.int32), jnp.zeros((len(token), 0), jnp.float32)
    return Chosen(token, logprob, top_ids, top_logprobs), sampling.update_counts(steps, counts, token)


def row_positions(T: int, lengths: Int[Array, "B"]) -> Int[Array, "B T"]:
    """0, 1, ... for each row's own tokens, -1 for the padding on its right."""
    at = jnp.arange(T, dtype=jnp.int32)[None, :]
    return jnp.where(at < lengths[:, None], at, -1)


def bucket(n: int, *, least: int = 16, most: int = 2048) -> int:
    """n rounded up so that few lengths are ever compiled: to a power of two from `least` to `most`, then to multiples."""
    size = least
    while size < n and size < most:
        size *= 2
    return size if n <= size else -(-n // most) * most
