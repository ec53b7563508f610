"""How a kernel of attention splits over a mesh.

GSPMD cannot see into a kernel, and would gather its arguments to every device: so each says itself how it splits
(`custom_partitioning`). Batch and kv heads, the latter with their queries' heads, are split with no communication: each device
runs the kernel on its part. Lengths and head dim are not: what is split there is gathered. Where kv heads do not divide over a
mesh axis (2 of them over 4 devices) heads are whole, those of the queries too: they are gathered if they were split, and the
devices of that axis all do the same work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

# b batch, t queries, s slots, n query heads, k kv heads, h head dim; of lists i blocks of queries, m entries
DIMS = {
    "q": "btnh", "k": "bksh", "v": "bksh", "sinks": "n", "q_at": "bt", "k_at": "bs", "q_of": "bt", "k_of": "bs",
    "lists": "bnim", "do": "btnh", "lse": "bnt", "delta": "bnt", "out": "btnh", "dq": "btnh", "dk": "bksh", "dv": "bksh",
}  # fmt: skip


def _split(mesh: Any, arrays: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that batch and kv heads are split over: those of keys, which are the most to move, and what others are
    split over further, since a whole or a part is cut with no communication; as many, from the first, as divide."""

    def over(of: dict[str, Any], dims: str, size: int, taken: tuple[str, ...]) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        for name, x in of.items():
            spec = () if x.sharding is None else x.sharding.spec  # without Shardy there are some that are not known yet
            for dim, entry in zip(DIMS[name], spec, strict=False):
                if dim not in dims or entry is None:
                    continue
                axes = (entry,) if isinstance(entry, str) else tuple(entry)
                while axes and (size % math.prod(mesh.shape[a] for a in axes) or set(axes) & set(taken)):
                    axes = axes[:-1]
                if axes[: len(found)] == found:
                    found = axes
        return found

    keys = {"k": arrays["k"]}
    B, K = arrays["k"].shape[:2]
    batch = over(keys | arrays, "b", B, over(keys, "k", K, ()))
    return batch, over(keys | arrays, "kn", K, batch)


@functools.cache
def _partitioned(
    function: Callable[..., Any], static: tuple[Any, ...], there: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., Any]:
    """function(*static, **arrays) as an op that says how it splits, from a dict of arrays, those `there` and None, to a tuple."""

    def run(arrays: dict[str, Any]) -> Any:
        return function(*static, **arrays)

    def shardings(mesh: Any, arrays: dict[str, Any], made: Any) -> tuple[Any, Any]:
        batch, heads = _split(mesh, {name: arrays[name] for name in there} | dict(zip(results, made, strict=False)))
        axes = {"b": batch or None, "n": heads or None, "k": heads or None}

        def of(name: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(dim) for dim in DIMS[name])))

        return tuple(map(of, results)), {name: of(name) if name in there else None for name in arrays}

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:
        return shardings(mesh, arguments[0], ())[0]

    def partition(mesh: Any, arguments: Any, made: Any) -> Any:
        result, operands = shardings(mesh, arguments[0], made)
        return mesh, run, result, (operands,)

    # heads of queries and of keys are two factors here: of one, Shardy would give 2 kv heads half of a mesh axis of 4, which
    # jax cannot name
    operands, outcome = (", ".join(" ".join(DIMS[name]) for name in names) for names in (sorted(there), results))
    whole = dict.fromkeys(f for f in operands if f in "tshim")
    op = custom_partitioning(run)
    op.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{operands} -> {outcome}",
        need_replication_factors=tuple(whole),
    )
    return jax.jit(op)  # where the caller has no jit, arrays on several devices are split all the same


def over_mesh(
    function: Callable[..., Any], static: tuple[Any, ...], results: tuple[str, ...], arrays: dict[str, Any]
) -> Any:
    """function(*static, **arrays), each array named as in DIMS or None, to a tuple of arrays named `results`."""
    there = tuple(name for name, x in arrays.items() if x is not None)
    return _partitioned(function, static, there, results)(arrays)
