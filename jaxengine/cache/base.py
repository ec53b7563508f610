"""A KV cache is a product: which slot a token takes (layout) x how it is stored there (codec) x where slots are (store).

The three know nothing of each other. A file in `layouts/` has
    num_slots(length, window)                  -> slots for sequences of up to `length` tokens
    slots(positions [B, T], lengths [B], S)    -> the slot of each new token, S where it takes none
    positions(lengths [B], S)                  -> the position that stands in each slot, -1 where none does, [B, S]
    holds(T, S, window)                        -> whether T new tokens can be written before they are read
    CAN_REWIND                                 whether the last tokens can be taken back (speculative decoding needs it)
a file in `codecs/` has
    encode(x [B, K, T, H]) -> a tree of arrays [B, K, T, ...]
    decode(tree, dtype)    -> [B, K, T, H]
    coded(tree)            -> (codes, scale or None), as pallas_kernels/decode_attention/reference.py lists them: decoding
                              attends to these, and the cache is never decoded as a whole
and a file in `stores/` has
    make(tree of shapes [B, K, S, ...])        -> the empty slots
    write(slots, tree, where [B, T])           -> the slots with the new tokens in them
    read(slots)                                -> the whole tree

A layout answers with positions, never with masks; attention masks by positions. Batch is an explicit dim.

B batch, T new tokens, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxengine import technique
from jaxengine.nn import Attention
from pallas_kernels import attention as kernel
from pallas_kernels import decode_attention as decode_kernel
from sharding.rules import AnyMesh, Rules, named_sharding

LAYOUTS, CODECS, STORES = "jaxengine.cache.layouts", "jaxengine.cache.codecs", "jaxengine.cache.stores"
# what can be asked for by name; 'auto' is the fastest that serves, for decoding and for the rest apart
ATTENTION = ("auto", *dict.fromkeys((*kernel.NAMES, *decode_kernel.NAMES)))


@dataclasses.dataclass(frozen=True)
class Caching:
    """The plan's choice of layout, codec and store, by name. `layout` is for layers with a sliding window; layers that
    see all tokens keep all of them."""

    layout: str = "window"
    codec: str = "raw"
    store: str = "device"

    def __post_init__(self) -> None:
        technique.find(LAYOUTS, self.layout)
        technique.find(CODECS, self.codec)
        technique.find(STORES, self.store)

    def layout_for(self, attention: Attention) -> ModuleType:
        """The layout of a layer that attends so."""
        return technique.find(LAYOUTS, "full" if attention.window is None else self.layout)


def split_alike(rules: Rules, mesh: AnyMesh, q: tuple[int, ...], k: tuple[int, ...]) -> bool:
    """Whether a mesh splits queries [B, T, N, H] and keys [B, T, K, H] in the same way, and not along their tokens.

    cuDNN takes no other, and says so when the program is compiled, too late for another implementation to serve.
    """
    if mesh.size == 1:
        return True

    def split(shape: tuple[int, ...], heads: str) -> list[Any]:
        spec = named_sharding(rules, mesh, ("batch", "sequence", heads, "act_head_dim"), shape=shape).spec
        return [*spec, *[None] * (len(shape) - len(spec))]

    of_q = split(q, "act_heads")
    return of_q == split(k, "act_kv_heads") and of_q[1] is None


def empty(caching: Caching, attention: Attention, batch: int, length: int, dtype: Any) -> Any:
    """One layer's cache with nothing in it, for `batch` sequences of up to `length` tokens: {'k': ..., 'v': ...}."""
    slots = caching.layout_for(attention).num_slots(length, attention.window)
    token = jax.ShapeDtypeStruct((batch, attention.num_kv_heads, slots, attention.head_dim), dtype)
    stored = jax.eval_shape(technique.find(CODECS, caching.codec).encode, token)
    store = technique.find(STORES, caching.store)
    return {"k": store.make(stored), "v": store.make(stored)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedAttend:
    """Attend over the cache and the new tokens, and keep the new tokens: what the engine hands to a block.

    positions [B, T]: of the new tokens, -1 for padding; lengths [B]: tokens in the cache before; fresh: the cache is
    known to be empty, so that the new tokens see only each other, and stand at 0, 1, ... with padding at the end only.
    """

    caching: Caching = dataclasses.field(metadata={"static": True})
    positions: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    fresh: bool = dataclasses.field(metadata={"static": True})

    def __call__(
        self, attention: Attention, q: Array, k: Array, v: Array, kv: Any, *, by: str = "auto", alike: bool = True
    ) -> tuple[Array, Any]:
        """by: one of ATTENTION, which serves where it has the form that is needed (cuDNN has none for decoding). alike:
        over a mesh queries, keys and values are split in the same way, and not along their tokens."""
        layout = self.caching.layout_for(attention)
        codec = technique.find(CODECS, self.caching.codec)
        store = technique.find(STORES, self.caching.store)
        new = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
        T, S = q.shape[1], jax.tree.leaves(kv)[0].shape[2]
        after = self.lengths + (self.positions >= 0).sum(-1, dtype=jnp.int32)
        where = layout.slots(self.positions, after, S)
        written = {n: store.write(kv[n], codec.encode(new[n]), where) for n in new}

        def stored(slots: Any) -> dict[str, Array]:
            return {n: codec.decode(store.read(slots[n]), q.dtype) for n in slots}

        # new tokens as they will be read back: what a row gives must not hang on how many are read at a time
        read_back = {n: codec.decode(codec.encode(new[n]), q.dtype) for n in new}
        holds = layout.holds(T, S, attention.window)
        if holds and T <= decode_kernel.MOST_QUERIES and not self.fresh:
            (k_codes, k_scale), (v_codes, v_scale) = (codec.coded(store.read(written[n])) for n in ("k", "v"))
            out = decode_kernel.decode_attention(
                q, k_codes, v_codes, self.positions, layout.positions(after, S), k_scale=k_scale, v_scale=v_scale,
                scale=attention.scale, window=attention.window, softcap=attention.softcap,
                implementation=by if by in decode_kernel.NAMES else None,
            )  # fmt: skip
            return out, written
        if self.fresh:
            seen, at = read_back, self.positions
        elif holds:
            seen, at = stored(written), layout.positions(after, S)
        else:
            old = stored(kv)
            seen = {n: jnp.concatenate([old[n], read_back[n]], axis=2) for n in new}
            at = jnp.concatenate([layout.positions(self.lengths, S), self.positions], axis=1)
        out = kernel.attention(
            q, seen["k"], seen["v"], self.positions, at,
            scale=attention.scale, window=attention.window, softcap=attention.softcap,
            contiguous=self.fresh and alike, implementation=by if by in kernel.NAMES else None,
        )  # fmt: skip
        return out, written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainAttend:
    """Attend among the given tokens alone, and keep nothing: scoring a text, training.

    segments: where rows are packed, the document that each token is of; it sees its own alone. whole: each row is known to
    be one text from its first token on, at 0, 1, ... with padding at the end only.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    whole: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(
        self, attention: Attention, q: Array, k: Array, v: Array, kv: Any, *, by: str = "auto", alike: bool = True
    ) -> tuple[Array, Any]:
        """by, alike: as of CachedAttend."""
        out = kernel.attention(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), self.positions, self.positions,
            scale=attention.scale, window=attention.window, softcap=attention.softcap,
            q_segments=self.segments, k_segments=self.segments,
            contiguous=self.whole and alike, training=self.segments is not None,
            implementation=by if by in kernel.NAMES else None,
        )  # fmt: skip
        return out, kv
