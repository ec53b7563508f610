"""A Plan names every choice: which format, which home, which cache, which sharding. It holds no array.

It is frozen and comparable, prints as a table, and goes to JSON and back without loss; it is stored beside every
checkpoint and result. `choose` makes one for a config and a memory budget, by arithmetic on abstract parameters alone.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from checkpoints.errors import CheckpointError
from jaxengine import formats
from jaxengine.architecture import Architecture, Spec, segments
from jaxengine.cache.base import ATTENTION, CachedAttend, Caching, PlainAttend, empty, split_alike
from jaxengine.engine import bucket
from jaxengine.homes.base import LISTED, Part, home
from jaxengine.nn import Attention
from jaxengine.walk import REMAT
from jaxengine.weights.base import Weight
from pallas_kernels.attention.cudnn import NotHere
from pallas_kernels.attention.reference import CountsTokens
from pallas_kernels.attention.xla import blocks as attention_blocks
from pallas_kernels.dispatch import Refused
from pallas_kernels.quant_matmul.config import MOST_ROWS
from pallas_kernels.quant_matmul.xla import chunk_bytes, forward_chunk
from sharding.mesh import abstract_mesh
from sharding.rules import RULES, Rules, check, named_sharding

RING = 3  # buffers that layers are read into from disk: one is used, one is copied, one is being filled
PADDED = 8  # numbers in 16 bits that tensor cores below sm_80 take at a time
WORKSPACE = 2**22  # bytes that a product by cuBLAS has for itself below sm_90
SCORES = 2**27  # bytes of attention's scores and weights that stand at a time where it runs in XLA
CHUNK = 512  # tokens in which long prompts are read where one piece does not fit
DTYPES = ("float32", "bfloat16", "float16")
# A wide matrix that decides every token's logits and is read by row at the other end: full precision unless asked for.
KEPT_DENSE = ("embedding", "lm_head", "*positions")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done, by name.

    dtype: of activations and unquantised weights ('' is the checkpoint's own, which `load` fills in). weights: the
    format of matrices inside layers, e.g. 'int4:group_size=64'; weight_rules: (name pattern, format) pairs that go before
    it, first match wins, e.g. (("lm_head", "int8"), ("layers.*.down", "dense")).
    home: where layers live; form: 'unrolled', 'scan', 'ahead' or 'python' ('' is the home's own); resident: under the homes
    'split' and 'disk', the number of layers, from the first on, that stand on the device; kept: under the home 'disk', the
    number of layers after those that stand in host memory. resident_form: how those of a split home go that stand on the
    device, 'unrolled' ('' is that; where adapters are trained, or by MeZO, what is better) or 'scan'. stay: name patterns,
    e.g. 'k' or 'layers.*.k', of parameters that stand on the device although their layers are streamed from host memory,
    besides those that always do (`stays`).
    kv_layout, kv_codec, kv_store: the cache.
    sharding: a named table of rules; rules: (logical axis, mesh axis or None) pairs that go before it.
    mesh: e.g. 'data=2,tensor=4' ('' is one device). remat: when fine-tuning, what is kept of a layer for its way back
    ('' is 'full'; walk.REMAT). chunk: tokens of a prompt that each layer reads at a time, a power of
    two (0 is all of them): what is held while reading then grows with chunk x context, not with context x context.
    attention: the implementation that reads prompts, decodes and trains, by name ('xla', 'triton', 'cudnn', ...;
    cache.base.ATTENTION), where it has the form that is needed: those without one for decoding leave that to 'auto', the
    fastest that serves.
    """

    dtype: str = ""
    weights: str = "dense"
    weight_rules: tuple[tuple[str, str], ...] = ()
    home: str = "device"
    form: str = ""
    resident: int = 0
    kept: int = 0
    stay: tuple[str, ...] = ()
    kv_layout: str = "window"
    kv_codec: str = "raw"
    kv_store: str = "device"
    sharding: str = "single"
    rules: tuple[Any, ...] = ()
    mesh: str = ""
    chunk: int = 0
    remat: str = ""
    attention: str = "auto"
    resident_form: str = ""

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"Plan: dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        # as `formats` writes them, so that equal choices are equal plans
        object.__setattr__(self, "weights", str(formats.find(self.weights)))
        object.__setattr__(self, "weight_rules", tuple(formats.rule(*r) for r in self.weight_rules))
        forms = home(self.home).FORMS
        if self.form and self.form not in forms:
            raise ValueError(f"Plan: home {self.home!r} takes the form {' or '.join(forms)}, not {self.form!r}")
        least = home(self.home).RESIDENT
        if self.resident < (least or 0) or (least is None and self.resident):
            raise ValueError(
                f"Plan: home is {self.home!r} and resident is {self.resident}; home='split' takes at least 1 resident layer,"
                f" home='disk' any number, and no other home takes any"
            )
        taken = self.home == "split" and self.resolved_form != "python"
        if self.resident_form and not (taken and self.resident_form in home("device").FORMS):
            raise ValueError(
                f"Plan: home is {self.home!r}, form {self.resolved_form!r} and resident_form {self.resident_form!r}; it is"
                f" 'unrolled' or 'scan' under home='split' with form 'scan' or 'ahead', and else left out"
            )
        if self.kept < 0 or (self.kept and home(self.home).KEPT is None):
            raise ValueError(
                f"Plan: home is {self.home!r} and kept is {self.kept}; layers are kept in host memory under home='disk', and"
                f" under home='host' all are"
            )
        if isinstance(self.stay, str) or not all(isinstance(p, str) and p for p in self.stay):
            raise ValueError(f"Plan: stay is {self.stay!r}; it is a tuple of name patterns, e.g. ('k', 'v')")
        object.__setattr__(self, "stay", tuple(self.stay))
        if self.sharding not in RULES:
            raise ValueError(f"Plan: sharding is {self.sharding!r}; the tables are {', '.join(RULES)}")
        if self.chunk and (self.chunk < 16 or self.chunk > 2048 or self.chunk & (self.chunk - 1)):
            raise ValueError(f"Plan: chunk is {self.chunk}; it can be 0 or a power of two from 16 to 2048")
        if self.attention not in ATTENTION:
            near = difflib.get_close_matches(self.attention, ATTENTION, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Plan: attention is {self.attention!r}; it can be {', '.join(ATTENTION)}. Did you mean {near!r}?"
            )
        if self.remat and self.remat not in REMAT:
            raise ValueError(f"Plan: remat is {self.remat!r}; it can be {', '.join(REMAT)}")
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
        """The banks that the layers make, in order: runs of like layers of one home. Where layers are stacked, those whose
        matrices stand in different formats are as unlike as those of different kinds.

        Raises ValueError where more layers are to be resident or kept than there are others beside them.
        """
        kinds, r, k = architecture.kinds, self.resident, self.kept
        like = likeness(architecture, self.weights, self.weight_rules)
        if r + k and r + k >= len(kinds):
            said = f"{r} of {len(kinds)} layers are resident" + (f" and {k} kept in host memory" if k else "")
            raise ValueError(
                f"Plan: {said}, which leaves none to stream: say home={'host' if k else 'device'!r}, or at most"
                f" {f'kept={len(kinds) - 1 - r}' if k and r < len(kinds) - 1 else f'resident={len(kinds) - 1}'}"
            )

        def parts(first: int, last: int, name: str, form: str) -> Iterator[Part]:
            stacked = form not in LISTED
            for s in segments((like if stacked else kinds)[first:last]):
                # a loop of one turn XLA takes apart, and then it cannot place its slices of host memory; 'ahead' loops
                # over one turn less than there are
                alone = s.repeats == 1 and form != "python"
                taken = "unrolled" if alone else "scan" if s.repeats == 2 and form == "ahead" else form
                period = kinds[first + s.start :][: len(s.kinds)]
                yield Part(period, s.repeats, first + s.start, name, taken)

        rest, kept = home(self.home).REST, home(self.home).KEPT
        return (
            *parts(0, r, "device", self.resident_form or home("device").FORM),
            *(parts(r, r + k, kept, home(kept).FORM) if k else ()),
            *parts(r + k, len(kinds), rest, self.resolved_form),
        )

    def sharding_rules(self) -> Rules:
        """The named table with this plan's own rules before it."""
        return RULES[self.sharding].override(*self.rules) if self.rules else RULES[self.sharding]

    def format_of(self, name: str, spec: Spec) -> str:
        """The weight format of one parameter ('embedding', 'layers.3.q'), as `formats.find` takes it."""
        if spec.out is None:
            return "dense"
        for pattern, chosen in self.weight_rules:
            if fnmatch.fnmatchcase(name, pattern):
                return chosen
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT_DENSE):
            return "dense"
        return self.weights

    def stays(self, name: str, spec: Spec) -> Any:
        """For each array of a layer's parameter, whether it stands on the device where the layer is streamed from host
        memory: a tree of bools. (A layer that is read from disk comes in one piece, and nothing of it stays.)

        What has at most one number for each row of a matrix stays: norms, biases, and the scales of formats that have one a
        row. Each such array would be a copy of its own in every pass, a few KB long, where starting one takes as long as
        moving some 200 KB; on the device they are a thousandth of the layers. Of the rest, what `stay` names does.
        """
        leaf = abstract_leaf(self.format_of(name, spec), spec.shape, spec.out, self.dtype)
        if spec.out is None or any(_names(pattern, name) for pattern in self.stay):
            return jax.tree.map(lambda _: True, leaf)
        rows = math.prod(spec.shape[: spec.out])
        return jax.tree.map(lambda x: x.size <= rows, leaf)

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
            if name == "stay" and not (isinstance(given, list) and all(isinstance(p, str) for p in given)):
                raise ValueError(f"Plan: stay is {given!r}; it is a list of name patterns, e.g. ['k', 'v']")
            number = name in ("resident", "kept", "chunk")
            if number and (not isinstance(given, int) or isinstance(given, bool) or given < 0):
                raise ValueError(f"Plan: {name} is {given!r}; it is a whole number")
            if not rows and not number and name != "stay" and not isinstance(given, str):
                raise ValueError(f"Plan: {name} is {given!r}; it is a string")
            if isinstance(given, list):
                raw[name] = tuple(tuple(r) if rows else r for r in given)
        return cls(**raw)

    def __str__(self) -> str:
        rows = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        rows = [(n, self.resolved_form if n == "form" else v if v != "" and v != () else "-") for n, v in rows]
        width = max(len(n) for n, _ in rows)
        return "\n".join(f"{n:<{width}}  {v}" for n, v in rows)


@functools.cache
def likeness(
    architecture: Architecture, weights: str, weight_rules: tuple[tuple[str, str], ...]
) -> tuple[Hashable, ...]:
    """Of each layer what it must have in common with another to stand in one stack with it: its kind, and its formats."""
    if not weight_rules:
        return architecture.kinds
    plan = Plan(weights=weights, weight_rules=weight_rules)
    return tuple(
        (kind, tuple(plan.format_of(f"layers.{i}.{n}", s) for n, s in architecture.block(kind)[1].items()))
        for i, kind in enumerate(architecture.kinds)
    )


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern names a layer's parameter: by 'layers.3.q', or by 'q' alone."""
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, re.sub(r"^layers\.\d+\.", "", name)))


def check_stay(architecture: Architecture, plan: Plan) -> None:
    """Refuse patterns of what stays on the device that name nothing, or not the same in all layers."""
    names = [n for n in architecture.specs() if n.startswith("layers.")]
    every = sorted({re.sub(r"^layers\.\d+\.", "", n) for n in names})
    for pattern in plan.stay:
        if not any(_names(pattern, n) for n in names):
            outer = [n for n in architecture.outer()[1] if fnmatch.fnmatchcase(n, pattern)]
            said = f"matches only {', '.join(outer)}, outside the layers, where all is on the device" if outer else ""
            last = re.sub(r"^layers\.[^.]*\.", "", pattern)
            near = difflib.get_close_matches(last, every, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"stay: {pattern!r} {said or 'matches no parameter of a layer'}; a layer's are {', '.join(every)}. Nearest:"
                f" {near!r}"
            )
        if not any(_names(pattern, n) and architecture.specs()[n].out is not None for n in names):
            raise ValueError(f"stay: {pattern!r} names vectors alone, which stay on the device anyway: leave it out")
        for kind in set(architecture.kinds):
            layers = [i for i, k in enumerate(architecture.kinds) if k == kind]
            for name in architecture.block(kind)[1]:
                chosen = [i for i in layers if _names(pattern, f"layers.{i}.{name}")]
                if chosen and chosen != layers:
                    raise ValueError(
                        f"stay: {pattern!r} names {name} in {len(chosen)} of {len(layers)} like layers, and like layers stand"
                        f" together: say {name!r} for all of them, or home='split' with resident= for whole layers"
                    )
    if why := _idle_stay(plan):
        raise ValueError(f"stay is {plan.stay!r}, and {why}: leave it out, or say kept= or home='host'")


def with_rules(
    architecture: Architecture, plan: Plan, given: Mapping[str, str] | Sequence[str | tuple[str, str]]
) -> Plan:
    """The plan with weight rules (`formats.rules`) before its own. Refuses those that choose nothing."""
    rules = formats.rules(given)
    check_rules(architecture, rules)
    taken, specs = set(), architecture.specs()
    for pattern, _ in rules:
        names = {n for n in fnmatch.filter(specs, pattern) if specs[n].out is not None}
        if names <= taken:
            first = next(p for p, _ in rules if names & set(fnmatch.filter(specs, p)))
            raise ValueError(
                f"weight_rules: {pattern!r} changes nothing: the first rule that matches counts, and {first!r} stands before it."
                f" Give {pattern!r} first, or leave it out"
            )
        taken |= names
    return dataclasses.replace(plan, weight_rules=(*rules, *plan.weight_rules))


def check_rules(architecture: Architecture, rules: Sequence[tuple[str, str]]) -> None:
    """Refuse a weight rule that chooses no matrix's format: it is a slip of the pen."""
    specs = architecture.specs()
    every = lambda names: sorted({re.sub(r"^layers\.\d+\.", "layers.*.", n) for n in names})  # noqa: E731
    for pattern, _ in rules:
        found = fnmatch.filter(specs, pattern)
        if any(specs[name].out is not None for name in found):
            continue
        matrices = every(name for name, spec in specs.items() if spec.out is not None)
        if found:
            said = f"matches only {', '.join(every(found))}: vectors, which are never quantised"
        elif fnmatch.fnmatchcase("lm_head", pattern):
            said = "matches no parameter: the head is tied, and is 'embedding'"
        else:
            said = "matches no parameter"
        near = difflib.get_close_matches(re.sub(r"^layers\.\d+\.", "layers.*.", pattern), matrices, n=3, cutoff=0.0)
        raise ValueError(
            f"weight_rules: {pattern!r} {said}. Nearest of this {architecture.family} of {architecture.num_layers} layers (0 to"
            f" {architecture.num_layers - 1}): {', '.join(near)}"
        )


def check_formats(architecture: Architecture, stored: Plan | None, chosen: Plan) -> None:
    """Weights that were stored quantised stay in their format; refuse another one by name."""
    if stored is None:
        return
    for name, spec in architecture.specs().items():
        was, wanted = stored.format_of(name, spec), chosen.format_of(name, spec)
        if was not in ("dense", wanted):
            raise CheckpointError(
                f"{name} is stored as {was!r} and the plan asks for {wanted!r}: load it as it is stored (give no weights"
                f" argument, and a plan only with the same weights and weight_rules), or start from the checkpoint that it"
                f" was made from"
            )


def check_attention(architecture: Architecture, plan: Plan, *, training: bool = False, dtype: str = "") -> None:
    """Refuse an implementation of attention that cannot serve this model on this device, or over this mesh: for reading
    prompts and decoding as the plan does both, or for training on packed rows. dtype: of the arithmetic ('': the plan's).

    Each kind of layer's attention is traced on abstract arrays; nothing is allocated or compiled. What only this machine
    lacks, where the plan is for another's card, is no reason to refuse: `planning.traps` says it. Raises dispatch.Refused, a
    ValueError, with what the implementation itself says.
    """
    if plan.attention == "auto":
        return
    T, kind, mesh = plan.chunk or CHUNK, jnp.dtype(dtype or plan.dtype), mesh_of(plan)
    length = 2 * T

    def attended(what: str, a: Attention, attend: Any, at: Any, cached: bool) -> None:
        """at: positions, and segments or the cache's lengths."""

        def call(q: Any, k: Any, v: Any, at: Any, kv: Any) -> Any:
            return attend(*at)(a, q, k, v, kv, by=plan.attention, alike=alike)[0]

        B, T = at[0].shape
        q, k = (jax.ShapeDtypeStruct((B, T, n, a.head_dim), kind) for n in (a.num_heads, a.num_kv_heads))
        kv = jax.eval_shape(lambda: empty(plan.caching, a, B, length, kind)) if cached else ()
        alike = mesh is None or split_alike(plan.sharding_rules(), mesh, q.shape, k.shape)
        try:
            jax.eval_shape(call, q, k, k, at, kv)
        except CountsTokens as e:
            if training:
                why = "a packed row holds several texts, each of which begins anew"
            elif plan.chunk:
                why = "a piece sees the tokens of those before it too (chunk=0 reads prompts whole)"
            else:
                why = (
                    f"over the mesh {plan.mesh!r} {a.num_heads} query heads and {a.num_kv_heads} kv heads are not split alike"
                    f" with all their tokens, which it needs (a mesh that divides {a.num_kv_heads} kv heads does)"
                )
            raise Refused(
                f"attention is {plan.attention!r}, for {what}: its mask counts tokens and does not look at positions, and"
                f" {why}: take attention 'triton' or 'xla', or 'auto' for the fastest that serves"
            ) from e
        except NotHere:  # of a plan for a card that is not here
            return
        except Refused as e:
            raise Refused(f"attention is {plan.attention!r}, for {what}: {e}") from e

    tokens, one, row = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, T), (2, 1), (2,)))
    for attention in dict.fromkeys(map(architecture.attention, architecture.kinds)):
        if training:
            attended("training on packed rows", attention, PlainAttend, (tokens, tokens), cached=False)
            continue
        first = functools.partial(CachedAttend, plan.caching, fresh=not plan.chunk)
        pieces = f"reading prompts in pieces of {T}" if plan.chunk else "reading prompts"
        attended(pieces, attention, first, (tokens, row), cached=True)
        attended(
            "decoding", attention, functools.partial(CachedAttend, plan.caching, fresh=False), (one, row), cached=True
        )


def _idle_stay(plan: Plan) -> str:
    """Why what is to stay could not: '' where it can."""
    if plan.stay and home(plan.home).TIER == "disk" and not plan.kept:
        return "layers come from disk in one piece, none being kept in host memory"
    return ""


@functools.cache
def abstract_leaf(format_name: str, shape: tuple[int, ...], out: int | None, dtype: str) -> Any:
    """The tree of ShapeDtypeStructs that a format makes of one parameter: eval_shape(encode)."""
    w = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    if out is None:
        return w
    encode = formats.find(format_name).encode
    return jax.eval_shape(lambda w: encode(w, out=out), w)


def parameter_bytes(plan: Plan, name: str, spec: Spec) -> int:
    """Bytes of one parameter in the format that the plan stores it in."""
    leaf = abstract_leaf(plan.format_of(name, spec), spec.shape, spec.out, plan.dtype)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf))


@functools.cache
def mesh_of(plan: Plan) -> AbstractMesh | None:
    """The mesh that a plan names, without its devices; None: one device. ValueError for one that is none."""
    return abstract_mesh(plan.mesh) if plan.mesh else None


def _split_over(rules: Rules) -> list[str]:
    """The mesh axes that a table splits something over."""
    said = (r.mesh for r in rules.effective() if r.mesh is not None)
    return sorted({axis for axes in said for axis in ((axes,) if isinstance(axes, str) else axes)})


def table_over(mesh: str) -> str:
    """The table of rules that splits over just the axes of a mesh, where nobody says one: 'fsdp' for 'data=2,fsdp=4'."""
    said = (part.replace(" ", "").partition("=") for part in mesh.split(","))
    many = {axis for axis, _, size in said if size != "1"}
    return "+".join(axis for axis in ("fsdp", "tensor") if axis in many) or ("data" if "data" in many else "single")


def with_table(plan: Plan, *, mesh: str | None, sharding: str | None) -> Plan:
    """A mesh alone names its table (`table_over`), where the plan has no table or rules of its own. mesh, sharding: what was
    said of them (None or '': nothing), which the plan has already."""
    if not mesh or sharding or plan.sharding != "single" or plan.rules:
        return plan
    return dataclasses.replace(plan, sharding=table_over(plan.mesh))


def check_mesh(architecture: Architecture, plan: Plan) -> None:
    """Refuse, before anything is read, a mesh that the plan's rules do not go with or do not divide the model over."""
    mesh = mesh_of(plan)
    if mesh is not None and mesh.size > 1 and plan.sharding == "single" and not plan.rules:
        raise ValueError(
            f"mesh is {plan.mesh!r} and sharding 'single', which would put a whole copy on each of {mesh.size} devices:"
            f" say sharding='data', 'fsdp', 'tensor' or 'fsdp+tensor'"
        )
    if (mesh is None or mesh.size == 1) and plan.sharding != "single":
        raise ValueError(
            f"sharding is {plan.sharding!r} and there is one device in the mesh: say mesh='tensor=4' or the like"
        )
    if mesh is not None:
        used, many = _split_over(plan.sharding_rules()), {axis for axis, n in mesh.shape.items() if n > 1}
        if idle := [axis for axis, n in mesh.shape.items() if n > 1 and axis not in used]:
            near = difflib.get_close_matches(idle[0], sorted(set(used) - many), n=1)
            tables = [name for name, rules in RULES.items() if many <= set(_split_over(rules))]
            said = f"it splits over {', '.join(used)}" if used else "it splits nothing"
            if near or tables:
                said += f". Did you mean {near[0]!r}?" if near else f"; sharding={tables[0]!r} splits over them all"
            raise ValueError(
                f"mesh is {plan.mesh!r}, and the table {plan.sharding!r} splits nothing over {idle[0]!r}, so that"
                f" {mesh.shape[idle[0]]} devices would do the same: {said}"
            )
        specs = architecture.specs().items()
        check(plan.sharding_rules(), mesh, {name: (s.shape, s.axes) for name, s in specs})


def on_one(plan: Plan, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one device of the plan's mesh has of an array with these logical axes."""
    mesh = mesh_of(plan)
    if mesh is None:
        return shape
    return named_sharding(plan.sharding_rules(), mesh, axes, shape=shape).shard_shape(shape)


def shard_bytes(plan: Plan, name: str, spec: Spec) -> int:
    """Bytes that one device of the plan's mesh has of a parameter."""
    return sum(_array_bytes(plan, name, spec))


def _array_bytes(plan: Plan, name: str, spec: Spec) -> list[int]:
    """The same, array by array."""
    stored = plan.format_of(name, spec)
    leaf, axes = abstract_leaf(stored, spec.shape, spec.out, plan.dtype), spec.axes
    if not plan.mesh:
        return [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaf)]
    if spec.out is not None:
        axes = formats.find(stored).leaf_axes(spec.axes, spec.out)
    is_axes = lambda a: isinstance(a, tuple) and all(n is None or isinstance(n, str) for n in a)  # noqa: E731
    each = zip(jax.tree.leaves(leaf), jax.tree.leaves(axes, is_leaf=is_axes), strict=True)
    return [math.prod(on_one(plan, a, x.shape)) * x.dtype.itemsize for x, a in each]


def layer_bytes(architecture: Architecture, plan: Plan) -> list[int]:
    """Bytes of each layer's stored parameters, on one device where the plan has a mesh."""
    return list(_stored_bytes(architecture, _formats_alone(plan))[1])


def staying_bytes(architecture: Architecture, plan: Plan) -> list[int]:
    """Of `layer_bytes`, those that stand on the device where a layer is streamed from host memory: see `Plan.stays`."""
    return list(_stored_bytes(architecture, _formats_alone(plan))[2])


def brought_bytes(architecture: Architecture, plan: Plan) -> list[int]:
    """Of `layer_bytes`, those that are brought to the device in every pass; of resident layers none."""
    found: list[int] = []
    for part in plan.parts(architecture):
        tier, here = home(part.home).TIER, slice(part.start, part.start + part.num_layers)
        each = zip(layer_bytes(architecture, plan)[here], staying_bytes(architecture, plan)[here], strict=True)
        found += [{"device": 0, "host": whole - stays, "disk": whole}[tier] for whole, stays in each]
    return found


def weight_bytes(architecture: Architecture, plan: Plan) -> dict[str, int]:
    """Bytes of the stored parameters, by part: 'outer' (before and after the layers), 'layers', 'largest_layer'; those of
    one device where the plan has a mesh."""
    outer, each, _ = _stored_bytes(architecture, _formats_alone(plan))
    return {"outer": outer, "layers": sum(each), "largest_layer": max(each, default=0)}


def _formats_alone(plan: Plan) -> Plan:
    """What of a plan decides the bytes that are stored."""
    names = ("dtype", "weights", "weight_rules", "sharding", "rules", "mesh", "stay")
    return Plan(**{name: getattr(plan, name) for name in names})


@functools.cache  # a search for what fits asks for hundreds of plans of the same formats
def _stored_bytes(architecture: Architecture, plan: Plan) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Of what stands outside the layers, of each layer, and of that what may stay."""
    outer = sum(shard_bytes(plan, n, s) for n, s in architecture.outer()[1].items())
    each, staying = [], []
    for i, kind in enumerate(architecture.kinds):
        specs = [(f"layers.{i}.{n}", s) for n, s in architecture.block(kind)[1].items()]
        sizes = [b for name, s in specs for b in _array_bytes(plan, name, s)]
        stays = [b for name, s in specs for b in jax.tree.leaves(plan.stays(name, s))]
        each.append(sum(sizes))
        staying.append(sum(b for b, there in zip(sizes, stays, strict=True) if there))
    return outer, tuple(each), tuple(staying)


def cache_bytes(architecture: Architecture, plan: Plan, *, batch: int, length: int) -> int:
    """Bytes of a KV cache for `batch` sequences of up to `length` tokens, on one device where the plan has a mesh."""
    axes = ("cache_batch", "cache_kv_heads", "cache_slots", "cache_head_dim")
    total = 0
    for kind, layers in collections.Counter(architecture.kinds).items():
        attention = architecture.attention(kind)
        made = jax.eval_shape(lambda a=attention: empty(plan.caching, a, batch, length, jnp.dtype(plan.dtype)))
        for x in jax.tree.leaves(made):
            held = on_one(plan, (*axes, *(None,) * x.ndim)[: x.ndim], x.shape)
            total += layers * math.prod(held) * x.dtype.itemsize
    return total


def device_bytes(architecture: Architecture, plan: Plan, *, batch: int, length: int) -> int:
    """Bytes that stand on the device between steps, plus what a streamed home brings in at a time: one layer, or two
    where unlike layers alternate and the next one's copy runs beside this one.

    Activations and temporaries are not counted: they are the compiler's to say.
    """
    w, cache = weight_bytes(architecture, plan), cache_bytes(architecture, plan, batch=batch, length=length)
    return w["outer"] + resident_bytes(architecture, plan) + streamed_bytes(architecture, plan) + cache


def resident_bytes(architecture: Architecture, plan: Plan) -> int:
    """Bytes of the layers that stand on the device, what stays of streamed ones included."""
    return tier_bytes(architecture, plan)["device"]


def tier_bytes(architecture: Architecture, plan: Plan) -> dict[str, int]:
    """Bytes of the layers by where they stand between passes: on the device, in host memory, on disk."""
    each, brought = layer_bytes(architecture, plan), brought_bytes(architecture, plan)
    found = {"device": sum(each) - sum(brought), "host": 0, "disk": 0}
    for part in plan.parts(architecture):
        found[home(part.home).TIER] += sum(brought[part.start : part.start + part.num_layers])
    return found


def streamed_bytes(architecture: Architecture, plan: Plan) -> int:
    """Bytes of streamed layers that stand on the device at a time: see `device_bytes`."""
    whole, brought, most = layer_bytes(architecture, plan), brought_bytes(architecture, plan), 0
    for part in plan.parts(architecture):
        if home(part.home).TIER != "device":
            here = slice(part.start, part.start + part.num_layers)
            at_once = 2 if part.form in ("ahead", "python") or (part.form == "scan" and len(part.kinds) > 1) else 1
            # a scan copies its slice of what stays, too, when it is used
            sliced = max(w - b for w, b in zip(whole[here], brought[here], strict=True)) if part.stacked else 0
            most = max(most, min(at_once * max(brought[here]) + sliced, sum(whole[here])))
    return most


def activation_bytes(
    architecture: Architecture, plan: Plan, *, batch: int, tokens: int, length: int, wide: bool = False
) -> int:
    """Bytes of temporaries while `batch` prompts of `tokens` tokens are read into a cache of `length`.

    What one layer holds at its widest: queries, keys, values and what attention makes of them, or the two halves of the
    feed-forward block; the residual stream twice. A matrix that is scanned goes when it has been used, so that attention's are
    not there beside the halves. Attention keeps no scores but those of some blocks where it runs in XLA
    (float32; a card below sm_80). Under a chunk, T is the chunk, the stream of all tokens stands once, and attention takes a
    copy of the slots where the cache is in codes or a layer's is a slice of many. A loop over layers on the device takes a
    period's as slices. The compiler's own figure differs with the card.

    wide: whether a product's result is written in float32 before it is narrowed, as on cards below sm_80.
    """
    size = jnp.dtype(plan.dtype).itemsize
    made = 4 if wide else size
    chunk = architecture.chunk(plan.chunk, tokens)
    T, widest = chunk or tokens, 0
    batch = on_one(plan, ("batch",), (batch,))[0]
    rows = batch * T
    if wide and _scanned_codes(architecture, plan):
        return _decoded_in_turn(architecture, plan, batch=batch, tokens=tokens, length=length) + 16 * rows
    parts = plan.parts(architecture)
    beside = streamed_bytes(architecture, plan)  # not there yet while resident layers run
    listed = any(home(p.home).TIER == "device" and not p.stacked for p in parts)
    looped = [p for p in parts if p.stacked and p.repeats > 1]
    sliced = (max(layer_bytes(architecture, plan)) * len(p.kinds) for p in looped if home(p.home).TIER == "device")
    slices = max(0, max(sliced, default=0) - beside)
    for kind in set(architecture.kinds):
        attention = architecture.attention(kind)
        N, K, H = attention.num_heads, attention.num_kv_heads, attention.head_dim
        dims = {
            a: n for spec in architecture.block(kind)[1].values() for a, n in zip(spec.axes, spec.shape, strict=True)
        }
        D, F = dims["embed"], on_one(plan, ("mlp",), (dims["mlp"],))[0]
        (N,), (K,) = (on_one(plan, (a,), (n,)) for a, n in (("act_heads", N), ("act_kv_heads", K)))
        layout = plan.caching.layout_for(attention)
        S = layout.num_slots(length, attention.window) if chunk else T
        if chunk and not layout.holds(T, S, attention.window):
            S += T
        in_blocks = plan.dtype == "float32" or plan.attention == "xla"
        # as arrays of their own; the form in XLA turns keys
        taken = wide or in_blocks or plan.kv_codec != "raw" or any(kind in p.kinds for p in looped)
        read_again = batch * S * 2 * K * H * size if chunk and taken else 0  # slots as attention takes them
        scores = (4 + size) * rows * S * N
        if plan.attention != "reference":  # which writes all of them
            scores = min(scores, SCORES) if in_blocks else 0
        attending = scores + read_again + rows * (3 * N + 2 * K) * H * size
        if _scanned_alone(architecture, plan):
            # keys' and values' matrices go when those are there; angles stand meanwhile
            gone, least = _matrices_bytes(architecture, plan, kind, "kv_heads")[0], rows * (2 * N + 3 * K) * H * size
            attending = max(least, attending - sum(gone))
            if N * H > D:  # wider than the stream: queries' matrix is large too, and few rows are less than it
                gone += _matrices_bytes(architecture, plan, kind, "heads")[0]
                turning = rows * (N + 3 * K) * H * size  # keys before and after, all matrices being there
                attending = max(turning, min(least, rows * (3 * N + 2 * K) * H * size - sum(gone)))
            attending += 4 * rows * H
        # of layers that are written out more stands than one needs: XLA runs one's products beside another's
        halves = max(
            _halves_bytes(architecture, plan, kind, rows, made), 2 * rows * F * (size + made) - beside if listed else 0
        )
        # partial products of a matrix that is split along what it contracts, summed over devices in float32
        sums = (1 if beside else 3) * rows * D * 4 if dims["mlp"] > F else 0
        stream = (batch * tokens + 2 * rows if chunk else 2 * rows) * D * size
        widest = max(widest, stream + max(attending, halves) + sums)
    prompt, step = _gathered_bytes(architecture, plan)
    anew = _made_bytes(architecture, _formats_alone(plan))
    step = max(step, _padded_head_bytes(architecture, plan, batch) if wide else 0)
    if wide:  # where no kernel reads codes
        anew = max(anew, decoded_bytes(architecture, plan, rows, size))
    elif rows > MOST_ROWS and not plan.mesh and (decoded := decoded_bytes(architecture, plan, rows, size, alone=True)):
        anew = max(anew, decoded + rows * width(architecture) * size)  # beside the normed stream, which all chunks read
    ints = (24 if chunk else 16) * batch * tokens  # ids, positions, and in chunks those of slots
    return max(widest + slices + ints + prompt, step) + anew


def _padded_head_bytes(architecture: Architecture, plan: Plan, rows: int) -> int:
    """Bytes of a head in 16 bits that XLA copies to as many rows as cores multiply at a time, and of logits so many wide, where
    a vocabulary is no multiple of it: on cards below sm_80, for several rows (CublasPadForGemms)."""
    outer, V = architecture.outer()[1], architecture.config.vocab_size
    head = "lm_head" if "lm_head" in outer else "embedding"
    size = jnp.dtype(plan.dtype).itemsize
    if rows == 1 or size != 2 or plan.mesh or V % PADDED == 0 or plan.format_of(head, outer[head]) != "dense":
        return 0
    return -(-V // PADDED) * PADDED * (width(architecture) * size + rows * (size + 4)) + WORKSPACE


@functools.cache
def _made_bytes(architecture: Architecture, plan: Plan) -> int:
    """The most that a product makes of a matrix anew: `Weight.made_bytes`, whole on each device of a mesh."""
    leaves = (
        abstract_leaf(plan.format_of(n, s), s.shape, s.out, plan.dtype)
        for n, s in architecture.specs().items()
        if s.out is not None
    )
    return max((w.made_bytes for w in leaves if isinstance(w, Weight)), default=0)


@functools.cache
def decoded_bytes(architecture: Architecture, plan: Plan, rows: int, itemsize: int, *, alone: bool = False) -> int:
    """The most that products of so many rows make at a time of one of the layers' matrices that are held in a format, where
    XLA decodes it. alone: but for formats that a product reads as they are, or makes a whole matrix of."""
    found = [0]
    for name, spec in architecture.specs().items():
        if spec.out is not None and name.startswith("layers."):
            held = plan.format_of(name, spec)
            leaf = abstract_leaf(held, spec.shape, spec.out, plan.dtype)
            if isinstance(leaf, Weight) and not (alone and (leaf.made_bytes or _read_in_dot(held))):
                N, K = math.prod(spec.shape[: spec.out]), math.prod(spec.shape[spec.out :])
                found.append(chunk_bytes(N, K, rows, itemsize))
    return max(found)


def _read_in_dot(held: str) -> bool:
    """Whether XLA widens a format's codes inside of a product: those of int8 with one scale a row."""
    found = formats.find(held)
    return found.name == "int8" and not found.options


def width(architecture: Architecture) -> int:
    """Of the residual stream, D: a family's config may have another name for it."""
    specs = architecture.block(architecture.kinds[0])[1].values()
    return next(n for s in specs for a, n in zip(s.axes, s.shape, strict=True) if a == "embed")


def _halves_bytes(architecture: Architecture, plan: Plan, kind: Any, rows: int, made: int) -> int:
    """Bytes at the widest of a feed-forward block, beyond those of its streamed layer (`streamed_bytes`). made: of a number
    that a product gives.

    Both halves, the matrices being all there; or, where like layers are scanned, read in one piece and in no format, the
    block's matrices and one half, and then its last two and both halves, with the normed stream that they are made of.
    """
    specs, size = architecture.block(kind)[1], jnp.dtype(plan.dtype).itemsize
    F = next(n for s in specs.values() for a, n in zip(s.axes, s.shape, strict=True) if a == "mlp")
    half = rows * on_one(plan, ("mlp",), (F,))[0] * made
    if not _scanned_alone(architecture, plan):
        return 2 * half
    ins, outs = _matrices_bytes(architecture, plan, kind, "mlp")
    normed = rows * width(architecture) * size
    peak = max(sum(ins) + sum(outs) + half, max(ins) + sum(outs) + 2 * half) + normed
    return max(peak - streamed_bytes(architecture, plan), 0)


def _scanned_alone(architecture: Architecture, plan: Plan) -> bool:
    """Whether streamed layers are alike and scanned, hold plain matrices, whole on each device, and read a prompt in one
    piece: each matrix of a layer is then there from the layer's beginning to its own use."""
    parts = plan.parts(architecture)
    streamed = [p for p in parts if home(p.home).TIER != "device"]
    plain = not (plan.chunk or plan.weights != "dense" or plan.weight_rules or plan.stay)
    bare = dataclasses.replace(plan, mesh="", sharding="single", rules=())
    whole = not plan.mesh or layer_bytes(architecture, plan) == layer_bytes(architecture, bare)
    alike = all((p.home, p.form, len(p.kinds)) == ("host", "scan", 1) for p in streamed)
    return plain and whole and bool(streamed) and alike


def _scanned_codes(architecture: Architecture, plan: Plan) -> bool:
    """Whether all layers are streamed, alike and scanned, hold every matrix in codes that XLA decodes, and read a prompt in one
    piece."""
    if plan.weights == "dense" or plan.chunk or plan.weight_rules or plan.stay or plan.mesh or plan.kv_codec != "raw":
        return False
    if plan.attention == "reference":  # which writes all scores
        return False
    specs = architecture.specs().items()
    leaves = [
        abstract_leaf(plan.weights, s.shape, s.out, plan.dtype)
        for n, s in specs
        if n.startswith("layers.") and s.out is not None
    ]
    alone = all(isinstance(w, Weight) and not w.made_bytes for w in leaves)
    return alone and [(p.home, p.form, len(p.kinds)) for p in plan.parts(architecture)] == [("host", "scan", 1)]


def _decoded_in_turn(architecture: Architecture, plan: Plan, *, batch: int, tokens: int, length: int) -> int:
    """Bytes at the widest of `_scanned_codes` where no kernel reads codes, beyond those of the streamed layer.

    Beside each product stand one chunk of its matrix, what that gives in float32, and the whole results of all that are made
    of the same rows. All of the layer's codes are there while queries are made; those of the feed-forward block and of
    attention's output while attention is computed, and when a token is decoded; those of the block alone while its halves are.
    """
    size, kind = jnp.dtype(plan.dtype).itemsize, architecture.kinds[0]
    attention, rows = architecture.attention(kind), batch * tokens
    specs = {n: s for n, s in architecture.block(kind)[1].items() if s.out is not None}
    stream = rows * width(architecture) * size

    def of(axis: str, *, gives: bool) -> list[str]:
        return [n for n, s in specs.items() if axis in (s.axes[: s.out] if gives else s.axes[s.out :])]

    def codes(names: list[str]) -> int:
        return sum(parameter_bytes(plan, f"layers.0.{n}", specs[n]) for n in names)

    def products(names: list[str], rows: int) -> int:
        beside, results = 0, 0
        for s in (specs[n] for n in names):
            N, K = math.prod(s.shape[: s.out]), math.prod(s.shape[s.out :])
            chunks, each = forward_chunk(N, K)
            beside = max(beside, each * K * size + (rows * each * 4 if chunks > 1 else 0))
            results += rows * N * (size if chunks > 1 else 4)
        return beside + results + WORKSPACE

    queries, keys = of("heads", gives=True), of("kv_heads", gives=True)
    ins, late = of("mlp", gives=True), of("mlp", gives=False)
    later = codes(ins + late + of("heads", gives=False))
    N, KH, NH = (
        attention.num_heads,
        attention.num_kv_heads * attention.head_dim,
        attention.num_heads * attention.head_dim,
    )
    slots = cache_bytes(architecture, plan, batch=batch, length=length) // architecture.num_layers
    whole = streamed_bytes(architecture, plan)
    first = whole + 2 * stream + products([*queries, *keys], rows)
    at_once = attention_blocks(batch, tokens, tokens, N, on_gpu=True)
    scores = (4 + size) * batch * N * at_once.queries * at_once.keys
    attending = later + scores + stream + rows * (NH * (size + 4) + 2 * KH * size)
    halves = codes(ins + late) + 3 * stream + rows * 2 * KH * size + products(ins, rows)
    step = later + slots + (products(ins, batch) + slots if batch > 1 else 0)
    return max(first, attending, halves, step) - whole


def _matrices_bytes(architecture: Architecture, plan: Plan, kind: Any, axis: str) -> tuple[list[int], list[int]]:
    """Bytes of a layer's plain matrices that give this axis, and of those that take it."""
    size = jnp.dtype(plan.dtype).itemsize
    found = [s for s in architecture.block(kind)[1].values() if s.out is not None]
    gives = [math.prod(s.shape) * size for s in found if axis in s.axes[: s.out]]
    return gives, [math.prod(s.shape) * size for s in found if axis in s.axes[s.out :]]


def gathered(plan: Plan) -> Plan:
    """The plan with parameters as a device has them while it uses them: not split by their inputs (fsdp)."""
    split = ("embed", "latent")
    rules = (*((name, None) for name in split), *(r for r in plan.rules if r[0] not in split))
    return dataclasses.replace(plan, rules=rules) if plan.mesh else plan


def brings_together(architecture: Architecture, plan: Plan) -> bool:
    """Whether layers are split over devices by their inputs, and are brought together to be used (fsdp)."""
    D = width(architecture)
    return plan.mesh != "" and on_one(plan, ("embed",), (D,)) != (D,)


def _gathered_bytes(architecture: Architecture, plan: Plan) -> tuple[int, int]:
    """Of layers that are split over devices by their inputs (fsdp), what is brought together to be used: while a prompt is
    read and while a step is made.

    At the widest of reading a prompt a layer, the next one where they are resident, and of a streamed one the matrix that is
    used last, the others being gone. In a step two resident ones (walk._gathered; XLA's scheduler has 1.5 to 2 of them at
    a time, as it takes a card's links to be), or one that is streamed and the last of its shards, or then the head; and
    beside them a second form of all shards that are resident and cut along a matrix's second dim, the head's too: XLA
    brings them together along the first, and turns them once, before its loop over steps. What is streamed is not there
    beside resident layers, nor beside the head.
    """
    if not brings_together(architecture, plan):
        return 0, 0
    # a quantised layer is decoded before it is brought together, as XLA has it
    whole = dataclasses.replace(gathered(plan), weights="dense", weight_rules=())
    outer = architecture.outer()[1]
    head = "lm_head" if "lm_head" in outer else "embedding"
    beside, turned = streamed_bytes(architecture, plan), _turned_bytes(plan, head, outer[head])
    each, prompt, step = layer_bytes(architecture, whole), 0, shard_bytes(whole, head, outer[head]) - beside
    for part in plan.parts(architecture):
        sizes = each[part.start : part.start + part.num_layers]
        resident = home(part.home).TIER == "device" and not part.stacked
        shards = layer_bytes(architecture, plan)[part.start : part.start + part.num_layers]
        # each shard goes when it has been brought together, unless it came in a turn before, or from outside
        goes = 0 if part.form in ("ahead", "python") else max(shards)
        one = max(sizes) + _largest_matrix(architecture, plan, part) - goes
        step = max(step, min(sum(sizes), 2 * max(sizes)) - beside if resident else one)
        prompt = max(prompt, max(sizes) if resident else _largest_matrix(architecture, whole, part))
        for i in range(part.start, part.start + part.num_layers) if resident else ():
            specs = architecture.block(architecture.kinds[i])[1].items()
            turned += sum(_turned_bytes(plan, f"layers.{i}.{n}", s) for n, s in specs)
    return prompt, max(step, 0) + turned


def _largest_matrix(architecture: Architecture, plan: Plan, part: Part) -> int:
    specs = [(f"layers.{part.start}.{n}", s) for kind in part.kinds for n, s in architecture.block(kind)[1].items()]
    return max(shard_bytes(plan, name, s) for name, s in specs)


def _turned_bytes(plan: Plan, name: str, spec: Spec) -> int:
    """Bytes of a plain matrix's shard if it is cut along a dim that is not its first."""
    if spec.out is None or plan.format_of(name, spec) != "dense" or spec.axes[0] == "embed":
        return 0
    return shard_bytes(plan, name, spec)


def parse_bytes(size: str | int, name: str = "memory") -> int:
    """'16GB' -> 16 * 10**9, '16GiB' -> 16 * 2**30; an int is bytes. name: what an error calls it."""
    if isinstance(size, bool):
        raise ValueError(f"{name} is {size}; it is bytes, or a size such as '16GB'")
    if isinstance(size, int):
        if size <= 0:
            raise ValueError(f"{name} is {size}; it must be more than 0 bytes")
        return size
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
    if not found or found[1].count(".") > 1 or found[1] == "." or float(found[1]) <= 0:
        raise ValueError(
            f"{name} is {size!r}; write a size such as '16GB' (10^9 bytes), '15.5GiB' (2^30), or a number of bytes"
        )
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def show_bytes(n: int) -> str:
    """12.3 GB, in powers of ten as a card's memory is sold."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def rounded_up(n: int, most: int) -> tuple[str, int]:
    """As `show_bytes`, but never less, nor more than `most` (which n is not): the words, and the bytes that they stand for."""
    unit, size = next(
        (u, s) for u, s in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1)) if n >= s
    )
    for digits in range(max(0, 3 - len(str(n // size))), 13):
        words = f"{-(-n * 10**digits // size) / 10**digits:.{digits}f} {unit}"
        if n <= parse_bytes(words) <= most:
            return words, parse_bytes(words)
    return f"{n} B", n


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes by what they are for. Device (each of a mesh): embeddings and head, resident layers and what stays of streamed
    ones, streamed layers while they are there, KV cache, activations (of reading a prompt, or of a step). Host: weights of
    streamed layers, pinned, and the buffers that a disk is read into. Disk: the layers that are read from it.

    When fine-tuning, also on the device: what is trained beside those, its gradient, the optimizer's state, and what is
    kept of each layer for its way back; and of the last two what stands in host memory.
    """

    outer: int
    resident: int
    streaming: int
    cache: int
    activations: int
    host_weights: int
    disk: int
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    host_buffers: int = 0
    host_optimizer: int = 0
    host_kept: int = 0

    @property
    def device(self) -> int:
        standing = self.outer + self.resident + self.streaming + self.cache
        return standing + self.activations + self.trained + self.gradients + self.optimizer + self.kept

    @property
    def pinned(self) -> int:
        """Of host memory, what a GPU's copies go to and from: all but what a disk is read into, which is not XLA's."""
        return self.host_weights + self.host_optimizer + self.host_kept

    @property
    def host(self) -> int:
        return self.pinned + self.host_buffers


def need(architecture: Architecture, plan: Plan, *, batch: int, context: int, wide: bool = False) -> Need:
    """What a plan needs to generate: `batch` rows of up to `context` tokens, their prompts as long as that. wide: see
    `activation_bytes`.

    Over a mesh the device is each of its devices, and host memory and disk are those of the one machine that they are in,
    where each device has its share in pinned memory of its own.
    """
    tiers, mesh = tier_bytes(architecture, plan), mesh_of(plan)
    whole = plan if mesh is None else dataclasses.replace(plan, mesh="")
    disk = tier_bytes(architecture, whole)["disk"] if tiers["disk"] else 0
    ring = RING * max(layer_bytes(architecture, whole)) if disk else 0
    return Need(
        outer=weight_bytes(architecture, plan)["outer"],
        resident=tiers["device"],
        streaming=streamed_bytes(architecture, plan),
        cache=cache_bytes(architecture, plan, batch=batch, length=context),
        activations=activation_bytes(architecture, plan, batch=batch, tokens=context, length=context, wide=wide),
        host_weights=tiers["host"] * (1 if mesh is None else mesh.size),
        disk=disk,
        host_buffers=ring,
    )


def lacking(n: Need, memory: int, ram: int | None) -> tuple[int, int]:
    """Bytes of the device and of the host that are needed beyond these."""
    return max(0, n.device - memory), 0 if ram is None else max(0, n.host - ram)


def lacks(n: Need, memory: int, ram: int | None) -> str:
    """'1.2 GB over on the device and 3 GB over in host memory'; '' where it fits."""
    tiers = zip(lacking(n, memory, ram), ("on the device", "in host memory"), strict=True)
    return " and ".join(f"{show_bytes(size)} over {where}" for size, where in tiers if size)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A plan, what it needs, and why that is too much ('': it fits). barred: it is refused for something else than bytes, and
    more of them are no help."""

    plan: Plan
    need: Need
    refused: str
    barred: bool = False


class Counted(Protocol):
    """A Variant, or what else has a plan, its bytes, and why not."""

    @property
    def plan(self) -> Plan: ...
    @property
    def need(self) -> Need: ...
    @property
    def refused(self) -> str: ...


C = TypeVar("C", bound=Counted)


def tightened(counted: Need, memory: int, device: int) -> int:
    """A budget under which what is counted like `counted`, and takes `device` bytes when it is compiled, takes `memory`."""
    return int(memory * counted.device / device)


def eased(again: Iterable[C], over: C) -> C | None:
    """Of what was found under a tighter budget, that which differs from `over` by fewer resident layers alone; None: nothing."""

    def of(plan: Plan) -> dict[str, Any]:
        found = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
        return found | {"resident": 0, "kept": 0, "resident_form": ""}

    fewer = (c for c in again if not c.refused and c.plan.resident < over.plan.resident)
    return next((c for c in fewer if of(c.plan) == of(over.plan)), None)


def shares_form(plan: Plan, refuted: Plan) -> bool:
    """Whether it streams layers in the same form, where that is not the plain one."""
    return bool(refuted.form) and plan.form == refuted.form


def settled(
    found: Sequence[C],
    under: Callable[[int], Sequence[C]],
    compiled: Callable[[Plan], tuple[int, Sequence[str]]],
    memory: int,
    *,
    tries: int = 4,
) -> tuple[C | None, list[tuple[C, Sequence[str]]]]:
    """(the first of `found` that holds when it is compiled, those before it with what was wrong). What takes more than `memory`
    bytes is followed by itself with fewer resident layers; what is wrong with a form otherwise is so in another home too.

    under: what is found under another budget; compiled: the most bytes of the device that a plan's programs take, and problems,
    those bytes among them. After so many tries, or if nothing is left, None.
    """
    left, refuted = [c for c in found if not c.refused], []
    while left and len(refuted) < tries:
        c = left.pop(0)
        device, problems = compiled(c.plan)
        if not problems:
            return c, refuted
        refuted.append((c, problems))
        if device <= memory:
            left = [other for other in left if not shares_form(other.plan, c.plan)]
        elif c.plan.resident and (e := eased(under(tightened(c.need, memory, device)), c)) is not None:
            left.insert(0, e)
    return None, refuted


def variants(
    architecture: Architecture,
    plan: Plan,
    *,
    memory: int,
    ram: int | None,
    batch: int,
    context: int,
    form: str = "",
    wide: bool = False,
) -> list[Variant]:
    """A plan with its layers in other homes, from the nearest to the farthest: all on the device, as many as fit, all
    streamed from host memory and, under a limit on that, from disk what does not fit there; each with prompts read in one
    piece and in chunks.

    form: that streamed layers take inside a program where it fits, before the home's own. Where layers are divided, it
    stands for the most resident layers that fit, or the fewest if none do, and then for the most that `ram` keeps.
    """

    def of(**given: Any) -> Variant:
        made = dataclasses.replace(plan, **({"form": "", "resident": 0, "kept": 0, "resident_form": ""} | given))
        n = need(architecture, made, batch=batch, context=context, wide=wide)
        idle = _idle_stay(made)
        return Variant(made, n, idle or lacks(n, memory, ram), barred=bool(idle))

    def most(fits: Callable[[int], bool], low: int, high: int) -> int:
        """The largest number that fits, of those where larger ones never need less; `low` if none does."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    L, chunks = architecture.num_layers, [plan.chunk] if plan.chunk or context <= CHUNK else [0, CHUNK]
    on_device = [of(home="device", chunk=c) for c in chunks]
    split, disk = [], []
    forms = [form, ""] if form else [""]
    for f, c in itertools.product(forms, chunks if L > 1 else []):
        r = most(lambda r, c=c, f=f: of(home="split", form=f, resident=r, chunk=c).need.device <= memory, 1, L - 1)
        split.append(of(home="split", form=f, resident=r, chunk=c))
    for c in [] if ram is None else chunks:
        r = most(lambda r, c=c: of(home="disk", resident=r, chunk=c).need.device <= memory, 0, L - 1)
        k = most(lambda k, c=c, r=r: of(home="disk", resident=r, kept=k, chunk=c).need.host <= (ram or 0), 0, L - 1 - r)
        disk.append(of(home="disk", resident=r, kept=k, chunk=c))
    split.sort(key=lambda v: (v.plan.form != form, -v.plan.resident))
    disk.sort(key=lambda v: -v.plan.resident)
    return [*on_device, *split, *(of(home="host", form=f, chunk=c) for f in forms for c in chunks), *disk]


def refuted_by_compiling(memory: str | int, refuted: Sequence[tuple[Counted, Sequence[str]]]) -> str:
    """What to say where nothing that was compiled holds."""
    homes = (f"home {c.plan.home!r}, {c.plan.resident} resident: {problems[0]}" for c, problems in refuted)
    return (
        f"memory={memory!r} holds these plans by what is counted, and not when they are compiled: {'; '.join(homes)}. Give more"
        f" memory, or fewer rows or tokens; a home that is named is not compiled first"
    )


def choose(
    architecture: Architecture,
    plan: Plan,
    memory: str | int,
    *,
    batch: int = 1,
    length: int = 2048,
    ram: int | None = None,
    form: str = "",
    wide: bool = False,
    compiled: Callable[[Plan], tuple[int, Sequence[str]]] | None = None,
) -> Plan:
    """The nearest of a plan's `variants` that fits `memory` bytes of the device and `ram` bytes of the host (None: any),
    streamed in this form ('': the home's own).

    Counts parameters, streamed layers, the cache (`device_bytes`) and what reading a prompt of `length` tokens holds; wide:
    see `activation_bytes`. compiled: what holds a plan against its programs (see `settled`); None: what is counted decides.
    Raises ValueError, before anything is allocated, if nothing fits, with the bytes that are short and what would help.
    """
    budget, length = parse_bytes(memory), bucket(length, least=64)  # as a call pads it
    rows: Any = {"batch": batch, "context": length, "form": form, "wide": wide}
    found = variants(architecture, plan, memory=budget, ram=ram, **rows)
    fits = next((variant for variant in found if not variant.refused), None)
    if fits is not None and compiled is None:
        return fits.plan
    if fits is not None and compiled is not None:
        under = functools.partial(variants, architecture, plan, ram=ram, **rows)
        holds, refuted = settled(found, lambda tight: under(memory=tight), compiled, budget)
        if holds is not None:
            return holds.plan
        raise ValueError(refuted_by_compiling(memory, refuted))
    least = min(found, key=lambda v: v.need.device)
    if plan.stay:
        bare = dataclasses.replace(plan, stay=())
        others = variants(architecture, bare, memory=budget, ram=ram, **rows)
        if (fits := next((v for v in others if not v.refused), None)) is not None:
            least = next((v for v in sorted(found, key=lambda v: v.need.device) if v.plan.home != "device"), least)
            raise ValueError(
                f"memory={memory!r} does not hold what stay={plan.stay!r} keeps on the device: home {least.plan.home!r} is"
                f" {least.refused}. Without stay, home {fits.plan.home!r} fits, with {show_bytes(fits.need.device)} on the"
                f" device and {show_bytes(fits.need.host)} in host memory"
            )
    nearest = functools.partial(
        _nearest, architecture, plan, memory=budget, ram=ram, batch=batch, context=length, wide=wide
    )
    if least.need.device <= budget and ram is not None:
        streamed = min((v for v in found if v.need.device <= budget), key=lambda v: v.need.host)
        disk = min((v for v in found if v.plan.home == "disk"), key=lambda v: v.need.device)
        takes = show_bytes(streamed.need.host)
        said = f"home {streamed.plan.home!r} takes {takes} of host memory, where there are {show_bytes(ram)}"
        if disk.need.device > budget:
            said += (
                f", and home 'disk', which has two layers on the device, takes {show_bytes(disk.need.device)} there,"
                f" {show_bytes(disk.need.device - budget)} more than memory={memory!r}"
            )
        raise ValueError(
            f"Layers that do not fit {show_bytes(budget)} of device memory are streamed: {said}. Nearest:"
            f" {nearest('more memory of either kind')}"
        )
    # of all, with the fewest bytes lacking: with these it fits
    would = [v for v in found if not v.barred]
    least = min(would or found, key=lambda v: sum(lacking(v.need, budget, ram)))
    n, (over, beyond) = least.need, lacking(least.need, budget, ram)
    short, enough = show_bytes(over), f"memory={rounded_up(n.device, 2**62)[0].replace(' ', '')!r}"
    if beyond:
        short += f" of device memory and {show_bytes(beyond)} of host memory"
        enough += f" and ram={rounded_up(n.host, 2**62)[0].replace(' ', '')!r}"
    raise ValueError(
        f"memory={memory!r} is {show_bytes(budget)}; the smallest plan, home {least.plan.home!r}, needs"
        f" {show_bytes(n.device)}: {show_bytes(n.outer)} of embeddings and head, {show_bytes(n.resident + n.streaming)} for"
        f" layers as they are streamed, {show_bytes(n.cache)} of KV cache for {batch} x {length} tokens and"
        f" {show_bytes(n.activations)} to read so many at once. {short} short. Nearest: {nearest(enough)}"
    )


def _nearest(
    architecture: Architecture,
    plan: Plan,
    more: str,
    *,
    memory: int,
    ram: int | None,
    batch: int,
    context: int,
    wide: bool,
) -> str:
    """What would make a plan fit that does not, each alone, and more memory last; that nothing else does is said."""
    tries: list[tuple[str, dict[str, Any], int, int]] = []
    if plan.weights == "dense" and not plan.weight_rules:
        tries += [(f"weights={name!r}", {"weights": name}, batch, context) for name in ("int8", "int4")]
    if plan.kv_codec == "raw":
        tries.append(("kv='int8'", {"kv_codec": "int8"}, batch, context))
    halves = [2**i for i in range(1, 12)]
    tries += [(f"batch={batch // d}", {}, batch // d, context) for d in halves if batch // d]
    tries += [(f"context={context // d}", {}, batch, context // d) for d in halves if context // d >= 64]
    found: dict[str, str] = {}
    for said, given, rows, length in tries:
        kind = said.partition("=")[0]
        if kind in found:
            continue
        made = dataclasses.replace(plan, **given)
        tried = variants(architecture, made, memory=memory, ram=ram, batch=rows, context=length, wide=wide)
        if any(not v.refused for v in tried):
            found[kind] = said
    if not found:
        return f"{more} (no single one of weights, kv, batch and context is enough)"
    return f"{', '.join(found.values())}, or {more}"
