"""A Plan names every choice: which format, which home, which cache, which sharding. It holds no array.

It is frozen and comparable, prints as a table, and goes to JSON and back without loss; it is stored beside every
checkpoint and result. `choose` makes one for a config and a memory budget, by arithmetic on abstract parameters alone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine import technique
from jaxengine.architecture import Architecture, Segment, Spec, segments
from jaxengine.cache.base import Caching, empty
from jaxengine.engine import bucket
from jaxengine.homes.base import Part, home
from sharding.rules import RULES, Rules

WEIGHTS = "jaxengine.weights"
CHUNK = 512  # tokens in which long prompts are read where one piece does not fit
DTYPES = ("float32", "bfloat16", "float16")
# A wide matrix that decides every token's logits and is read by row at the other end: full precision unless asked for.
KEPT_DENSE = ("embedding", "lm_head", "*positions")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done, by name.

    dtype: of activations and unquantised weights ('' is the checkpoint's own, which `load` fills in). weights: the
    format of matrices inside layers; weight_rules: (name pattern, format) pairs that go before it, first match wins,
    e.g. (("lm_head", "int8"), ("layers.*.down", "dense")).
    home: where layers live; form: 'unrolled', 'scan' or 'ahead' ('' is the home's own); resident: under the home 'split',
    the number of layers, from the first on, that stand on the device. kv_layout, kv_codec, kv_store: the cache.
    sharding: a named table of rules; rules: (logical axis, mesh axis or None) pairs that go before it.
    mesh: e.g. 'data=2,tensor=4' ('' is one device). chunk: tokens of a prompt that each layer reads at a time, a power of
    two (0 is all of them): what is held while reading then grows with chunk x context, not with context x context.
    """

    dtype: str = ""
    weights: str = "dense"
    weight_rules: tuple[tuple[str, str], ...] = ()
    home: str = "device"
    form: str = ""
    resident: int = 0
    kv_layout: str = "window"
    kv_codec: str = "raw"
    kv_store: str = "device"
    sharding: str = "single"
    rules: tuple[Any, ...] = ()
    mesh: str = ""
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"Plan: dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        for _, name in (*self.weight_rules, ("*", self.weights)):
            technique.find(WEIGHTS, name)
        forms = home(self.home).FORMS
        if self.form and self.form not in forms:
            raise ValueError(f"Plan: home {self.home!r} takes the form {' or '.join(forms)}, not {self.form!r}")
        if (self.resident > 0) != home(self.home).PARTIAL:
            raise ValueError(
                f"Plan: home is {self.home!r} and resident is {self.resident}; home='split' takes at least 1 resident layer,"
                f" and no other home takes any"
            )
        if self.sharding not in RULES:
            raise ValueError(f"Plan: sharding is {self.sharding!r}; the tables are {', '.join(RULES)}")
        if self.chunk and (self.chunk < 16 or self.chunk > 2048 or self.chunk & (self.chunk - 1)):
            raise ValueError(f"Plan: chunk is {self.chunk}; it can be 0 or a power of two from 16 to 2048")
        for row in self.rules:
            memory = row[2] if len(row) > 2 else None
            if memory is not None:
                raise ValueError(
                    f"Plan: the rule {tuple(row)!r} names a memory kind; where layers live is the home's to say"
                    f" (home='host'), and a rule says how a dim is split: {tuple(row[:2])!r}"
                )
        _ = self.caching

    @property
    def caching(self) -> Caching:
        """The cache that these choices make."""
        return Caching(self.kv_layout, self.kv_codec, self.kv_store)

    @property
    def resolved_form(self) -> str:
        """The form that layers take, resident ones of a split home apart."""
        return self.form or home(self.home).FORM

    def parts(self, architecture: Architecture) -> tuple[Part, ...]:
        """The banks that the layers make, in order: runs of like layers of one home.

        Raises ValueError where more layers are to be resident than there are others beside them.
        """
        kinds, r = architecture.kinds, self.resident
        if r and r >= len(kinds):
            raise ValueError(
                f"Plan: {r} of {len(kinds)} layers are resident, which leaves none to stream: say home='device', or at most"
                f" resident={len(kinds) - 1}"
            )
        rest = home(self.home).REST

        def part(segment: Segment, offset: int, name: str, form: str) -> Part:
            # a loop of one turn XLA takes apart, and then it cannot place its slices of host memory; 'ahead' loops over
            # one turn less than there are
            if segment.repeats == 1:
                form = "unrolled"
            elif segment.repeats == 2 and form == "ahead":
                form = "scan"
            return Part(segment.kinds, segment.repeats, offset + segment.start, name, form)

        resident = [part(s, 0, "device", home("device").FORM) for s in segments(kinds[:r])]
        streamed = [part(s, r, rest, self.resolved_form) for s in segments(kinds[r:])]
        return (*resident, *streamed)

    def sharding_rules(self) -> Rules:
        """The named table with this plan's own rules before it."""
        return RULES[self.sharding].override(*self.rules) if self.rules else RULES[self.sharding]

    def format_of(self, name: str, spec: Spec) -> str:
        """The weight format of one parameter: 'embedding', 'layers.3.q'."""
        if spec.out is None:
            return "dense"
        for pattern, chosen in self.weight_rules:
            if fnmatch.fnmatchcase(name, pattern):
                return chosen
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT_DENSE):
            return "dense"
        return self.weights

    def to_json(self) -> str:
        """As JSON text, every field written out."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """From `to_json`'s text; a field that is not known is refused by name."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError(f"Plan: the JSON text holds {type(raw).__name__}, not an object of a plan's fields")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"Plan: unknown field {', '.join(unknown)}; a plan has {', '.join(sorted(known))}")
        for name, given in raw.items():
            rows = name in ("weight_rules", "rules")
            if rows and not (isinstance(given, list) and all(isinstance(r, list) for r in given)):
                raise ValueError(f"Plan: {name} is {given!r}; it is a list of lists, e.g. [['lm_head', 'int8']]")
            number = name in ("resident", "chunk")
            if number and (not isinstance(given, int) or isinstance(given, bool) or given < 0):
                raise ValueError(f"Plan: {name} is {given!r}; it is a whole number")
            if not rows and not number and not isinstance(given, str):
                raise ValueError(f"Plan: {name} is {given!r}; it is a string")
            raw[name] = tuple(tuple(r) for r in given) if isinstance(given, list) else given
        return cls(**raw)

    def __str__(self) -> str:
        rows = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        rows = [(n, self.resolved_form if n == "form" else v if v != "" and v != () else "-") for n, v in rows]
        width = max(len(n) for n, _ in rows)
        return "\n".join(f"{n:<{width}}  {v}" for n, v in rows)


@functools.cache
def abstract_leaf(format_name: str, shape: tuple[int, ...], out: int | None, dtype: str) -> Any:
    """The tree of ShapeDtypeStructs that a format makes of one parameter: eval_shape(encode)."""
    w = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if out is None:
        return w
    encode = technique.find(WEIGHTS, format_name).encode
    return jax.eval_shape(lambda w: encode(w, out=out), w)


def parameter_bytes(plan: Plan, name: str, spec: Spec) -> int:
    """Bytes of one parameter in the format that the plan stores it in."""
    leaf = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, plan.dtype)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def layer_bytes(architecture: Architecture, plan: Plan) -> list[int]:
    """Bytes of each layer's stored parameters."""
    return [
        sum(parameter_bytes(plan, f"layers.{i}.{n}", s) for n, s in architecture.block(kind)[1].items())
        for i, kind in enumerate(architecture.kinds)
    ]


def weight_bytes(architecture: Architecture, plan: Plan) -> dict[str, int]:
    """Bytes of the stored parameters, by part: 'outer' (before and after the layers), 'layers', 'largest_layer'."""
    outer = sum(parameter_bytes(plan, n, s) for n, s in architecture.outer()[1].items())
    each = layer_bytes(architecture, plan)
    return {"outer": outer, "layers": sum(each), "largest_layer": max(each, default=0)}


def cache_bytes(architecture: Architecture, plan: Plan, *, batch: int, length: int) -> int:
    """Bytes of a KV cache for `batch` sequences of up to `length` tokens."""
    total = 0
    for kind in architecture.kinds:
        attention = architecture.attention(kind)
        made = jax.eval_shape(lambda a=attention: empty(plan.caching, a, batch, length, jnp.dtype(plan.dtype)))
        total += sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made))
    return total


def device_bytes(architecture: Architecture, plan: Plan, *, batch: int, length: int) -> int:
    """Bytes that stand on the device between steps, plus what a streamed home brings in at a time: one layer, or two
    where unlike layers alternate and the next one's copy runs beside this one.

    Activations and temporaries are not counted: they are the compiler's to say.
    """
    w, cache = weight_bytes(architecture, plan), cache_bytes(architecture, plan, batch=batch, length=length)
    return w["outer"] + resident_bytes(architecture, plan) + streamed_bytes(architecture, plan) + cache


def resident_bytes(architecture: Architecture, plan: Plan) -> int:
    """Bytes of the layers that stand on the device."""
    each, parts = layer_bytes(architecture, plan), plan.parts(architecture)
    return sum(sum(each[p.start : p.start + p.num_layers]) for p in parts if home(p.home).MEMORY is None)


def streamed_bytes(architecture: Architecture, plan: Plan) -> int:
    """Bytes of streamed layers that stand on the device at a time: see `device_bytes`."""
    each, most = layer_bytes(architecture, plan), 0
    for part in plan.parts(architecture):
        if home(part.home).MEMORY is not None:
            sizes = each[part.start : part.start + part.num_layers]
            at_once = 2 if part.form == "ahead" or (part.form == "scan" and len(part.kinds) > 1) else 1
            most = max(most, min(at_once * max(sizes), sum(sizes)))
    return most


def activation_bytes(architecture: Architecture, plan: Plan, *, batch: int, tokens: int, length: int) -> int:
    """Bytes of temporaries while `batch` prompts of `tokens` tokens are read into a cache of `length`.

    What one layer holds at its widest: the scores of attention, [B, N, T, S] in float32, and its weights in the plan's
    dtype, beside queries, keys and values, or the two halves of the feed-forward block; the residual stream twice. Under a
    chunk, T is the
    chunk and S the slots of the cache. The compiler's own figure differs with the card.
    """
    size = jnp.dtype(plan.dtype).itemsize
    chunk = architecture.chunk(plan.chunk, tokens)
    T, widest = chunk or tokens, 0
    rows = batch * T
    for kind in set(architecture.kinds):
        attention = architecture.attention(kind)
        N, K, H = attention.num_heads, attention.num_kv_heads, attention.head_dim
        dims = {
            a: n for spec in architecture.block(kind)[1].values() for a, n in zip(spec.axes, spec.shape, strict=True)
        }
        D, F = dims["embed"], dims["mlp"]
        layout = plan.caching.layout_for(attention)
        S = layout.num_slots(length, attention.window) if chunk else T
        if chunk and not layout.holds(T, S, attention.window):
            S += T
        attending = (4 + size) * rows * S * N + rows * (2 * N + 2 * K) * H * size
        widest = max(widest, 2 * batch * tokens * D * size + max(attending, 3 * rows * F * size))
    return widest


def parse_bytes(memory: str | int) -> int:
    """'16GB' -> 16 * 10**9, '16GiB' -> 16 * 2**30; an int is bytes."""
    if isinstance(memory, int):
        if memory <= 0:
            raise ValueError(f"memory is {memory}; it must be more than 0 bytes")
        return memory
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
    if not found or found[1].count(".") > 1 or found[1] == "." or float(found[1]) <= 0:
        raise ValueError(
            f"memory is {memory!r}; write a size such as '16GB' (10^9 bytes), '15.5GiB' (2^30), or a number of bytes"
        )
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def show_bytes(n: int) -> str:
    """12.3 GB, in powers of ten as a card's memory is sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def choose(architecture: Architecture, plan: Plan, memory: str | int, *, batch: int = 1, length: int = 2048) -> Plan:
    """The plan with the home that fits `memory`: the device if all of it fits, else as many layers of it as do, else none;
    each with prompts read in one piece, or in chunks if only that fits.

    Counts parameters, streamed layers, the cache (`device_bytes`) and what reading a prompt of `length` tokens holds.
    Raises ValueError, before anything is allocated, if nothing fits, with the bytes that are short and what would help.
    """
    budget, length = parse_bytes(memory), bucket(length, least=64)  # as a call pads it

    def needs(candidate: Plan) -> int:
        working = activation_bytes(architecture, candidate, batch=batch, tokens=length, length=length)
        return device_bytes(architecture, candidate, batch=batch, length=length) + working

    plan = dataclasses.replace(plan, home="device", form="", resident=0)
    chunks = [plan.chunk] if plan.chunk or length <= CHUNK else [0, CHUNK]
    counts = range(architecture.num_layers - 1, 0, -1)
    homes = [plan, *(dataclasses.replace(plan, home="split", resident=r) for r in counts)]
    for candidate in (*homes, dataclasses.replace(plan, home="host")):
        for chunk in chunks:
            candidate = dataclasses.replace(candidate, chunk=chunk)
            if needs(candidate) <= budget:
                return candidate
    host = dataclasses.replace(plan, home="host", chunk=chunks[-1])
    least, working = needs(host), activation_bytes(architecture, host, batch=batch, tokens=length, length=length)
    cache = cache_bytes(architecture, plan, batch=batch, length=length)
    w = weight_bytes(architecture, plan)
    raise ValueError(
        f"memory={memory!r} is {show_bytes(budget)}; the smallest plan, home 'host', needs {show_bytes(least)}:"
        f" {show_bytes(w['outer'])} of embeddings and head, {show_bytes(least - w['outer'] - cache - working)} for layers as"
        f" they are streamed, {show_bytes(cache)} of KV cache for {batch} x {length} tokens and {show_bytes(working)} to read"
        f" so many at once. {show_bytes(least - budget)} short. Nearest: weights='int8', kv='int8', a smaller context or"
        f" batch, or memory={show_bytes(least).replace(' ', '')!r}"
    )
