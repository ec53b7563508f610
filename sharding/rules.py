"""Where an array lives, said once: logical axis names -> mesh axes and a memory kind, in one table.

A model names the dims of its arrays by what they are ("mlp", "kv_heads", "layers") and knows nothing of devices. A
table of rules says what each name means on a mesh: ("mlp", "tensor") splits that dim over the mesh axis "tensor",
("layers", None, "pinned_host") leaves it whole and puts the array in pinned host memory. To shard a model in another
way is to exchange the table; no model file changes. The idea is GSPMD's annotation of a few arrays from which the
compiler derives the rest (arXiv:2105.04663) with the named dims that Mesh TensorFlow (arXiv:1811.02084) introduced.
The named tables are data parallelism, fully sharded weights (ZeRO-3, arXiv:1910.02054) and the tensor parallelism of
Megatron-LM (arXiv:1909.08053): the first matrix of a block is split over its outputs, the second over its inputs, and
one sum over devices follows.

How a table is read, always from the top:
- The first rule for a name is the rule for that name; later ones are shadowed. `override` writes rules on top.
- A mesh axis splits at most one dim of an array. Where two dims ask for the same one, the dim whose rule stands higher
  has it (the left dim if the rule is the same) and the other does without. This is what t5x does; refusing would forbid
  every square [embed, embed] matrix under fully sharded weights.
- The memory kind of an array is that of the highest rule which names one for any of its dims. So ("layers", None,
  "pinned_host") moves all stacked layers to the host, and ("norm", None, "device") above it keeps the norms.
- A dim named None is never split. A name without a rule is an error.

The trade-off: a name has one meaning for all arrays of a model. Two matrices that must be split differently need two
names. In return the table fits on one screen.

Weights must divide: `check` refuses otherwise, before anything is allocated. Activations need not: `constrain` leaves a
dim whole where it does not divide, so that batch 1 runs under every table.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sharding.mesh import host_memory_kind, memory_kinds

MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]
AnyMesh = Mesh | AbstractMesh
Param = tuple[Sequence[int], Axes] | tuple[Sequence[int], Axes, DTypeLike]

# unpinned_host is left out: transfers from it have corrupted bfloat16 elsewhere (sglang-jax)
MEMORY_KINDS = ("device", "pinned_host")

WEIGHT_AXES: Mapping[str, str] = MappingProxyType(
    {
        "layers": "L, the stacking dim of a bank of like layers; a scan or a walk goes along it",
        "vocab": "V, rows of the embedding and of the output head",
        "heads": "N, query heads of a projection (q, o, and their biases)",
        "kv_heads": "K, key and value heads of a projection (k, v, and their biases)",
        "mlp": "F, the wide dim of a feed-forward block (intermediate_size)",
        "experts": "E, experts of a mixture, and the outputs of its router",
        "embed": "D, the width of the residual stream (hidden_size)",
        "latent": "rank of a low-rank projection that belongs to the model (MLA's q and kv ranks)",
        "head_dim": "H, the width of one head",
        "positions": "rows of a learned position table",
        "norm": "scale and bias of a normalisation, whatever its width",
        "lora_rank": "rank of an adapter",
        "group": "quantisation groups along a contracted dim (scales, zero points)",
    }
)

ACTIVATION_AXES: Mapping[str, str] = MappingProxyType(
    {
        "batch": "B, sequences of a batch",
        "sequence": "T, tokens of a sequence in the pass under way",
        "act_vocab": "V of logits",
        "act_heads": "N of queries and of attention's output",
        "act_kv_heads": "K of keys and values before they are cached",
        "act_embed": "D of the residual stream",
        "act_head_dim": "H of queries, keys, values",
        "cache_layers": "L of a stacked KV cache",
        "cache_batch": "B of a KV cache: one row a sequence",
        "cache_slots": "S, slots of a KV cache (or of one of its pages)",
        "cache_kv_heads": "K of a KV cache",
        "cache_head_dim": "H of a KV cache",
    }
)


@dataclass(frozen=True)
class Rule:
    """One row: the dim called `logical` is split over `mesh`, and an array that has it lives in `memory`.

    mesh: a mesh axis, several (major to minor), or None: not split.
    memory: "device", "pinned_host", or None: this rule says nothing about memory.
    """

    logical: str
    mesh: MeshAxes = None
    memory: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.logical, str) or not self.logical:
            raise ValueError(f"a rule starts with a logical axis name, got {self.logical!r}")
        axes = (self.mesh,) if isinstance(self.mesh, str) else self.mesh
        if axes is not None:
            if not isinstance(axes, tuple | list) or not all(isinstance(axis, str) and axis for axis in axes):
                raise ValueError(
                    f"rule {self.logical!r}: mesh must be a mesh axis, a tuple of them or None, got {self.mesh!r}"
                )
            if len(set(axes)) != len(axes):
                raise ValueError(f"rule {self.logical!r}: a mesh axis stands twice in {self.mesh!r}; name it once")
            # one spelling each, so that equal tables are equal, hash alike and survive JSON
            object.__setattr__(self, "mesh", None if not axes else axes[0] if len(axes) == 1 else tuple(axes))
        if self.memory is not None and self.memory not in MEMORY_KINDS:
            raise ValueError(
                f"rule {self.logical!r}: memory {self.memory!r} is not one of {', '.join(MEMORY_KINDS)} or None"
            )

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """`mesh` as a tuple, empty where nothing is split."""
        if self.mesh is None:
            return ()
        return (self.mesh,) if isinstance(self.mesh, str) else self.mesh

    def to_row(self) -> list[Any]:
        """[logical, mesh] or [logical, mesh, memory]: the row as JSON holds it."""
        mesh = list(self.mesh) if isinstance(self.mesh, tuple) else self.mesh
        return [self.logical, mesh] if self.memory is None else [self.logical, mesh, self.memory]


RuleLike = Rule | tuple[str, MeshAxes] | tuple[str, MeshAxes, str | None]


def _as_rule(row: RuleLike | Sequence[Any]) -> Rule:
    if isinstance(row, Rule):
        return row
    if isinstance(row, str) or not isinstance(row, Sequence) or not 2 <= len(row) <= 3:
        raise ValueError(f"a rule is (logical, mesh) or (logical, mesh, memory), got {row!r}")
    return Rule(*cast(Any, row))


@dataclass(frozen=True, init=False)
class Rules:
    """A table of rules in two parts, which share no name: `weights`, which `check` holds to, and `activations`.

    Frozen and hashable: fit for a static argument of jit. Rows may be given as plain tuples.
    """

    weights: tuple[Rule, ...]
    activations: tuple[Rule, ...]

    def __init__(self, weights: Iterable[RuleLike], activations: Iterable[RuleLike] = ()) -> None:
        object.__setattr__(self, "weights", tuple(_as_rule(row) for row in weights))
        object.__setattr__(self, "activations", tuple(_as_rule(row) for row in activations))
        both = {rule.logical for rule in self.weights} & {rule.logical for rule in self.activations}
        if both:
            raise ValueError(
                f"{sorted(both)} stand in both parts of the table; a name is a weight's or an activation's"
            )

    def names(self) -> tuple[str, ...]:
        """Every logical axis the table covers, weights first."""
        return tuple(dict.fromkeys(rule.logical for rule in (*self.weights, *self.activations)))

    def effective(self) -> tuple[Rule, ...]:
        """The rules that count: the first for each name, in table order, weights first."""
        first: dict[str, Rule] = {}
        for rule in (*self.weights, *self.activations):
            first.setdefault(rule.logical, rule)
        return tuple(first.values())

    def spec(self, axes: Axes) -> PartitionSpec:
        """One entry per dim: the mesh axes it is split over, or None.

        Raises ValueError for a name without a rule. Knows no mesh: whether the mesh has the axes and the sizes divide
        is for `check` (weights) and `constrain` (activations) to say.
        """
        order = self._order(axes)
        taken: set[str] = set()
        entries: list[MeshAxes] = [None] * len(axes)
        for _, dim, rule in order:
            free = tuple(axis for axis in rule.mesh_axes if axis not in taken)
            taken.update(free)
            entries[dim] = None if not free else free[0] if len(free) == 1 else free
        return PartitionSpec(*entries)

    def memory(self, axes: Axes) -> str | None:
        """The memory kind of an array with these dims; None where the table leaves it to the default, the device."""
        return next((rule.memory for _, _, rule in self._order(axes) if rule.memory is not None), None)

    def override(self, *rows: RuleLike) -> "Rules":
        """The same table with `rows` written on top. Only names the table has: a misspelt one would change nothing."""
        weights = {rule.logical for rule in self.weights}
        rules = [_as_rule(row) for row in rows]
        for rule in rules:
            if rule.logical not in self.names():
                raise ValueError(
                    f"override: {_unknown(rule.logical, self.names())}. A new name is added with rules.extend(...)"
                )
        return Rules(
            (*(rule for rule in rules if rule.logical in weights), *self.weights),
            (*(rule for rule in rules if rule.logical not in weights), *self.activations),
        )

    def extend(self, weights: Iterable[RuleLike] = (), activations: Iterable[RuleLike] = ()) -> "Rules":
        """The same table with new names below: for a model whose arrays have dims that no name here describes."""
        added = Rules(weights, activations)
        known = sorted(set(added.names()) & set(self.names()))
        if known:
            raise ValueError(f"extend: {known} are in the table already; change them with rules.override(...)")
        return Rules((*self.weights, *added.weights), (*self.activations, *added.activations))

    def to_json(self) -> str:
        """{"weights": [[logical, mesh], [logical, mesh, memory], ...], "activations": [...]} as text."""
        return json.dumps(
            {
                "weights": [rule.to_row() for rule in self.weights],
                "activations": [rule.to_row() for rule in self.activations],
            }
        )

    @classmethod
    def from_json(cls, text: "str | Mapping[str, Any]") -> "Rules":
        """What `to_json` wrote, as text or already decoded."""
        table = json.loads(text) if isinstance(text, str) else text
        if not isinstance(table, Mapping) or set(table) != {"weights", "activations"}:
            keys = sorted(table) if isinstance(table, Mapping) else type(table).__name__
            raise ValueError(f'rules in JSON are {{"weights": [...], "activations": [...]}}, got {keys}')
        return cls(table["weights"], table["activations"])

    def __str__(self) -> str:
        rows = [("logical axis", "mesh axis", "memory", "meaning")]
        for rule in self.effective():
            meaning = WEIGHT_AXES.get(rule.logical, ACTIVATION_AXES.get(rule.logical, ""))
            rows.append((rule.logical, ", ".join(rule.mesh_axes) or "-", rule.memory or "-", meaning))
        return _columns(rows)

    def _order(self, axes: Axes) -> list[tuple[int, int, Rule]]:
        """(place of the rule in the table, dim, rule) for each named dim, highest rule first, then from the left."""
        if isinstance(axes, str):
            raise ValueError(f"axes are a tuple with one name or None per dim, got the string {axes!r}")
        place = {rule.logical: (i, rule) for i, rule in enumerate(self.effective())}
        order = []
        for dim, name in enumerate(axes):
            if name is None:
                continue
            if name not in place:
                raise ValueError(f"dim {dim} of {axes}: {_unknown(name, self.names())}")
            order.append((place[name][0], dim, place[name][1]))
        return sorted(order, key=lambda item: item[:2])


def _table(**split: MeshAxes) -> Rules:
    """All documented names in their order, split as said and whole otherwise."""
    return Rules(
        [(name, split.get(name)) for name in WEIGHT_AXES],
        [(name, split.get(name)) for name in ACTIVATION_AXES],
    )


# A mesh axis of size 1 splits nothing, so a table serves every mesh that has its axes: "fsdp+tensor" on the mesh data=8
# does what "data" does.
RULES: Mapping[str, Rules] = MappingProxyType(
    {
        # one device: nothing is split
        "single": _table(),
        # every device has all weights and a part of the batch
        "data": _table(batch="data", cache_batch="data"),
        # every device has a part of each matrix, gathered when used, and a part of the batch
        "fsdp": _table(embed="fsdp", latent="fsdp", batch=("data", "fsdp"), cache_batch=("data", "fsdp")),
        # every device has some heads and some columns of the mlp, for all of its batch
        "tensor": _table(
            vocab="tensor",
            heads="tensor",
            kv_heads="tensor",
            mlp="tensor",
            act_vocab="tensor",
            act_heads="tensor",
            act_kv_heads="tensor",
            cache_kv_heads="tensor",
            batch="data",
            cache_batch="data",
        ),
        "fsdp+tensor": _table(
            embed="fsdp",
            latent="fsdp",
            vocab="tensor",
            heads="tensor",
            kv_heads="tensor",
            mlp="tensor",
            act_vocab="tensor",
            act_heads="tensor",
            act_kv_heads="tensor",
            cache_kv_heads="tensor",
            batch=("data", "fsdp"),
            cache_batch=("data", "fsdp"),
        ),
    }
)


def named_sharding(
    rules: Rules,
    mesh: AnyMesh,
    axes: Axes,
    *,
    memory_kind: str | None = None,
    shape: Sequence[int] | None = None,
) -> NamedSharding:
    """The placement of an array with these dims: split and memory kind as the table says.

    memory_kind: overrules the table ("device", "pinned_host").
    shape: given for an activation or a cache: dims that do not divide are left whole. Without it they are split as the
        table says, and placing an array that does not divide is an error (`check` says it better, and earlier).

    The spec is written in its shortest form (no mesh axis of size 1, no None at the end), so that equal placements are
    equal shardings and a step that returns what it was given is compiled once.
    """
    _require_axes(mesh, rules, axes)
    spec = _on_mesh(rules.spec(axes), mesh, shape)
    kind = memory_kind if memory_kind is not None else rules.memory(axes)
    if kind is not None and kind not in MEMORY_KINDS:
        raise ValueError(f"memory kind {kind!r} is not one of {', '.join(MEMORY_KINDS)}")
    if kind == "pinned_host":
        return NamedSharding(mesh, spec, memory_kind=host_memory_kind(mesh))
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, rules: Rules, mesh: AnyMesh, axes: Axes) -> jax.Array:
    """Tell the compiler how an activation is split: with_sharding_constraint by logical names.

    A dim whose size the mesh axes do not divide is split over the longest leading part of them that does, often none:
    batch 1 is left whole under ("batch", "data"). On a mesh of one device `x` is returned as it is. The values never
    change, and neither does the memory `x` is in: memory kinds in the table are for `named_sharding`.

    Raises ValueError if `axes` has not one name per dim, a name has no rule, or the mesh lacks a rule's axis.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {axes} names {len(axes)} dims and the array has {x.ndim}: {tuple(x.shape)}")
    _require_axes(mesh, rules, axes)
    if mesh.size == 1:
        return x
    spec = _on_mesh(rules.spec(axes), mesh, x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def check(rules: Rules, mesh: AnyMesh, params: Mapping[str, Param]) -> None:
    """Refuse a table that does not fit this mesh and these weights. All problems come in one ValueError.

    params: name -> (shape, axes) or (shape, axes, dtype); abstract, nothing is allocated.
    Every axis must be covered by a rule of the weights' part, every split dim must divide, every mesh axis and memory
    kind of the table must exist. The error names the parameter, dim, logical axis, sizes, and a choice that works.
    """
    problems = _problems(rules, mesh, params, tuple(dict.fromkeys(rule.logical for rule in rules.weights)))
    if problems:
        raise ValueError(_numbered("the rules do not fit", problems))


def describe(rules: Rules, mesh: AnyMesh, params: Mapping[str, Param], dtype: DTypeLike = jnp.bfloat16) -> str:
    """A plain-text table: each array's shape, split, shape and bytes on one device, and memory kind; sums at the end.

    params as for `check`, and caches or activations too; `dtype` counts for those that give none. A weight in a packed
    format is given by the arrays it is stored in.
    """
    problems = _problems(rules, mesh, params, rules.names())
    if problems:
        raise ValueError(_numbered("the rules do not fit", problems))
    rows = [("parameter", "shape", "spec", "on one device", "memory", "bytes per device")]
    total: dict[str, int] = {}
    for name, param in params.items():
        shape, axes, own = _unpack(param)
        sharding = named_sharding(rules, mesh, axes)
        part = sharding.shard_shape(shape)
        size = math.prod(part) * jnp.dtype(own if own is not None else dtype).itemsize
        memory = rules.memory(axes) or "device"
        total[memory] = total.get(memory, 0) + size
        entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        split = ", ".join("+".join(e) if isinstance(e, tuple) else str(e or "-") for e in entries)
        rows.append((name, _sizes(shape), f"[{split}]", _sizes(part), memory, f"{size:,}"))
    lines = [_columns(rows, right=(5,))]
    for memory in sorted(total):
        lines.append(
            f"{memory}: {total[memory]:,} bytes ({total[memory] / 2**30:.3f} GiB) for each of {mesh.size} devices"
        )
    return "\n".join(lines)


def _unpack(param: Param) -> tuple[tuple[int, ...], Axes, DTypeLike | None]:
    dtype = param[2] if len(param) == 3 else None
    return tuple(param[0]), tuple(param[1]), cast("DTypeLike | None", dtype)


def _problems(rules: Rules, mesh: AnyMesh, params: Mapping[str, Param], covered: tuple[str, ...]) -> list[str]:
    """Everything wrong, in words. First the table against the mesh, then each parameter against the table."""
    problems = []
    kinds = memory_kinds(mesh)
    for rule in rules.effective():
        missing = [axis for axis in rule.mesh_axes if axis not in mesh.shape]
        if missing:
            problems.append(_no_mesh_axis(rule, missing, mesh))
        if rule.memory is not None and kinds and rule.memory not in kinds:
            problems.append(
                f"rule {rule.logical!r} names the memory kind {rule.memory!r}; these devices have {', '.join(kinds)}: "
                f"rules.override(({rule.logical!r}, {rule.mesh!r}, 'device'))"
            )
    split: list[tuple[str, int, str, int, tuple[str, ...]]] = []
    for name, param in params.items():
        shape, axes, _ = _unpack(param)
        if len(shape) != len(axes):
            problems.append(f"{name}: {len(shape)} dims {shape} and {len(axes)} logical axes {axes}; give one per dim")
            continue
        unknown = [(dim, axis) for dim, axis in enumerate(axes) if axis is not None and axis not in covered]
        for dim, axis in unknown:
            wrong_part = axis in rules.names()
            what = f"{axis!r} is an activation's axis, not a weight's" if wrong_part else ""
            problems.append(f"{name}: dim {dim} of size {shape[dim]}: {_unknown(axis, covered, what)}")
        if unknown:
            continue
        for dim, entry in enumerate(rules.spec(axes)):
            over = _tuple(entry)
            if over and all(axis in mesh.shape for axis in over):
                split.append((name, dim, cast("str", axes[dim]), shape[dim], over))
    for name, dim, logical, size, over in split:
        if size % math.prod(mesh.shape[axis] for axis in over):
            rule = next(rule for rule in rules.effective() if rule.logical == logical)
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in over)
            choices = [
                f"{axis}={fits} divides {logical} {size} and every other dim split over {axis!r}"
                for axis in reversed(over)
                if (fits := _nearest(axis, mesh, [(s, o) for *_, s, o in split if axis in o])) is not None
            ][:1]
            choices.append(f"{_left_whole(rule)} leaves it whole")
            problems.append(
                f"{name}: dim {dim}, {logical!r}, has size {size}, which {sizes} does not divide. "
                f"What works: {'; or '.join(choices)}"
            )
    return problems


def _nearest(axis: str, mesh: AnyMesh, dims: list[tuple[int, tuple[str, ...]]]) -> int | None:
    """The size of `axis` nearest to the present one that divides all `dims` and the devices; 1 if there is no other."""

    def works(n: int) -> bool:
        sizes = {**mesh.shape, axis: n}
        return all(size % math.prod(sizes[a] for a in over) == 0 for size, over in dims)

    now = mesh.shape[axis]
    fits = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and works(n)]
    return min(fits, key=lambda n: (n == 1, abs(n - now), n), default=None)


def _on_mesh(spec: PartitionSpec, mesh: AnyMesh, shape: Sequence[int] | None) -> PartitionSpec:
    """The spec in its shortest form on this mesh; with a shape, only as far as each dim divides."""
    if shape is not None and len(shape) != len(spec):
        raise ValueError(f"{len(spec)} logical axes for the {len(shape)} dims of {tuple(shape)}; give one per dim")
    entries: list[MeshAxes] = []
    for dim, entry in enumerate(spec):
        over = [axis for axis in _tuple(entry) if mesh.shape[axis] > 1]
        while shape is not None and over and shape[dim] % math.prod(mesh.shape[axis] for axis in over):
            over.pop()
        entries.append(None if not over else over[0] if len(over) == 1 else tuple(over))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _require_axes(mesh: AnyMesh, rules: Rules, axes: Axes) -> None:
    for _, _, rule in rules._order(axes):
        missing = [axis for axis in rule.mesh_axes if axis not in mesh.shape]
        if missing:
            raise ValueError(_no_mesh_axis(rule, missing, mesh))


def _no_mesh_axis(rule: Rule, missing: list[str], mesh: AnyMesh) -> str:
    return (
        f"rule {rule.logical!r} splits over the mesh axis {', '.join(map(repr, missing))}, which this mesh lacks; "
        f"it has {', '.join(f'{axis}={n}' for axis, n in mesh.shape.items())}. Add it to the mesh "
        f"(make_mesh('{missing[0]}=...')) or {_left_whole(rule)}"
    )


def _left_whole(rule: Rule) -> str:
    """The call that stops a rule from splitting and leaves its memory kind as it is."""
    return f"rules.override({(rule.logical, None) if rule.memory is None else (rule.logical, None, rule.memory)!r})"


def _unknown(name: str, known: Sequence[str], what: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{what or f'no rule covers the logical axis {name!r}'}{hint} Known: {', '.join(known)}"


def _tuple(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _numbered(head: str, problems: list[str]) -> str:
    lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
    return f"{head}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{lines}"


def _sizes(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows under their heads, padded to the widest cell; columns in `right` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
