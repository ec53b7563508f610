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
from jaxengine.architecture import Architecture, Spec
from jaxengine.cache.base import Caching, empty
from jaxengine.homes.base import HOMES, home
from sharding.rules import RULES, Rules

WEIGHTS = "jaxengine.weights"
DTYPES = ("float32", "bfloat16", "float16")
# A wide matrix that decides every token's logits and is read by row at the other end: full precision unless asked for.
KEPT_DENSE = ("embedding", "lm_head", "*positions")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done, by name.

    dtype: of activations and unquantised weights ('' is the checkpoint's own, which `load` fills in). weights: the
    format of matrices inside layers; weight_rules: (name pattern, format) pairs that go before it, first match wins,
    e.g. (("lm_head", "int8"), ("layers.*.down", "dense")).
    home: where layers live; form: 'unrolled' or 'scan' ('' is the home's own). kv_layout, kv_codec, kv_store: the cache.
    sharding: a named table of rules; rules: (logical axis, mesh axis or None) pairs that go before it.
    mesh: e.g. 'data=2,tensor=4' ('' is one device).
    """

    dtype: str = ""
    weights: str = "dense"
    weight_rules: tuple[tuple[str, str], ...] = ()
    home: str = "device"
    form: str = ""
    kv_layout: str = "window"
    kv_codec: str = "raw"
    kv_store: str = "device"
    sharding: str = "single"
    rules: tuple[Any, ...] = ()
    mesh: str = ""

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"Plan: dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        for _, name in (*self.weight_rules, ("*", self.weights)):
            technique.find(WEIGHTS, name)
        forms = home(self.home).FORMS
        if self.form and self.form not in forms:
            raise ValueError(f"Plan: home {self.home!r} takes the form {' or '.join(forms)}, not {self.form!r}")
        if self.sharding not in RULES:
            raise ValueError(f"Plan: sharding is {self.sharding!r}; the tables are {', '.join(RULES)}")
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
        """The form that layers take."""
        return self.form or home(self.home).FORM

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
            if not rows and not isinstance(given, str):
                raise ValueError(f"Plan: {name} is {given!r}; it is a string")
            raw[name] = tuple(tuple(r) for r in given) if rows else given
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


def weight_bytes(architecture: Architecture, plan: Plan) -> dict[str, int]:
    """Bytes of the stored parameters, by part: 'outer' (before and after the layers), 'layers', 'largest_layer'."""

    def size(name: str, spec: Spec) -> int:
        leaf = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, plan.dtype)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf))

    outer = sum(size(n, s) for n, s in architecture.outer()[1].items())
    each = [
        sum(size(f"layers.{i}.{n}", s) for n, s in architecture.block(kind)[1].items())
        for i, kind in enumerate(architecture.kinds)
    ]
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
    w = weight_bytes(architecture, plan)
    at_once = 1 if all(len(s.kinds) == 1 for s in architecture.segments) else 2
    layers = w["layers"] if home(plan.home).MEMORY is None else min(w["layers"], at_once * w["largest_layer"])
    return w["outer"] + layers + cache_bytes(architecture, plan, batch=batch, length=length)


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
    """The plan with the home that fits `memory`: the device if all of it fits, else the host.

    Counts parameters, one streamed layer and the cache (see `device_bytes`). Raises ValueError, before anything is
    allocated, if neither fits, with the bytes that are short and what would help.
    """
    budget = parse_bytes(memory)
    found = {}
    for name in technique.names(HOMES):
        candidate = dataclasses.replace(plan, home=name, form="")
        found[name] = device_bytes(architecture, candidate, batch=batch, length=length)
        if found[name] <= budget:
            return candidate
    home_name, least = min(found.items(), key=lambda item: item[1])
    cache = cache_bytes(architecture, plan, batch=batch, length=length)
    w = weight_bytes(architecture, plan)
    raise ValueError(
        f"memory={memory!r} is {show_bytes(budget)}; the smallest plan, home {home_name!r}, needs {show_bytes(least)}:"
        f" {show_bytes(w['outer'])} of embeddings and head, {show_bytes(w['largest_layer'])} for one streamed layer,"
        f" {show_bytes(cache)} of KV cache for {batch} x {length} tokens. {show_bytes(least - budget)} short."
        f" Nearest: weights='int8', kv='int8', a shorter context, or memory={show_bytes(least).replace(' ', '')!r}"
    )
