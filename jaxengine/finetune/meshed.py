"""What a step needs of each device of a mesh: the arithmetic of one device (planning.py) over the shapes that each has.

    data     a part of the rows; all that is trained, its gradient and state, on every device
    tensor   some heads and columns of each feed-forward block, of what is trained beside them too; all of the residual stream
    fsdp     of each matrix a part of its inputs, brought together to be used; of what is trained, its gradient and its state
             that part; and of the rows one

Counted are the ways that were held against XLA's own bytes over a mesh (`check`); the others are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, cast

import jax.numpy as jnp

from jaxengine import formats
from jaxengine.architecture import Architecture, Spec
from jaxengine.finetune import step
from jaxengine.finetune.settings import Task
from jaxengine.plan import Need, Plan, gathered, layer_bytes, mesh_of, on_one, shard_bytes, width


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """An Architecture whose parameters have the shapes that one device of a plan's mesh has of them."""

    whole: Architecture
    plan: Plan

    @property
    def family(self) -> str:
        return self.whole.family

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        return self.whole.kinds

    @property
    def num_layers(self) -> int:
        return self.whole.num_layers

    @functools.cached_property
    def config(self) -> Any:
        V = self.whole.config.vocab_size
        return dataclasses.replace(self.whole.config, vocab_size=on_one(self.plan, ("act_vocab",), (V,))[0])

    def attention(self, kind: Hashable) -> Any:
        attention = self.whole.attention(kind)
        (N,), (K,) = (
            on_one(self.plan, (axis,), (n,))
            for axis, n in (("act_heads", attention.num_heads), ("act_kv_heads", attention.num_kv_heads))
        )
        return dataclasses.replace(attention, num_heads=N, num_kv_heads=K)

    def _on_one(self, specs: dict[str, Spec]) -> dict[str, Spec]:
        return {n: dataclasses.replace(s, shape=on_one(self.plan, s.axes, s.shape)) for n, s in specs.items()}

    def outer(self) -> tuple[Any, dict[str, Spec]]:
        return self.whole.outer()[0], self._on_one(self.whole.outer()[1])

    def block(self, kind: Hashable) -> tuple[Any, dict[str, Spec]]:
        return self.whole.block(kind)[0], self._on_one(self.whole.block(kind)[1])

    def specs(self) -> dict[str, Spec]:
        return self._on_one(self.whole.specs())


COMBINED = 30 * 2**20  # bytes that XLA brings together, or sums, in one go (its own thresholds, jax 0.12)
TRAINED, OPTIMIZERS, REMATS = ("lora", "all"), ("adamw", "lion", "sgd"), ("full",)
FROZEN = ("dense", "int8", "int4", "nf4")  # formats below what is trained beside them; those of 4 bits not over tensor
SAID = "leave the mesh out (a run without --memory goes over it all the same)"


def check(architecture: Architecture, plan: Plan, task: Task, *, batch: int) -> None:
    """Refuse what is not counted over a mesh: every way that is not held against XLA's bytes (tests/test_finetune_sharded.py)."""

    def refuse(name: str, given: Any, works: str) -> None:
        raise ValueError(
            f"{name} is {given!r}, and over the mesh {plan.mesh!r} a step's bytes are counted with {works}: say that, or"
            f" {SAID}"
        )

    if task.train not in TRAINED or not task.optimizer.order:
        refuse("task", task.name, "task 'lora' or 'full'")
    if task.optimizer.name not in OPTIMIZERS:
        refuse("optimizer", task.optimizer.name, f"optimizer {', '.join(OPTIMIZERS)}")
    if plan.remat not in ("", *REMATS):
        refuse("remat", plan.remat, "remat 'full'")
    if task.tile:
        refuse("tile", task.tile, "all tokens of a row at a time")
    if plan.stay:
        refuse("stay", plan.stay, "vectors alone staying, no stay")
    if plan.weight_rules:
        refuse("weight_rules", dict(plan.weight_rules), "one format of all matrices, no rule")
    if (task.compute or plan.dtype) != "bfloat16":
        refuse("compute", task.compute or plan.dtype, "arithmetic in bfloat16")
    if plan.attention == "reference":
        refuse("attention", plan.attention, "attention 'auto'")
    mesh = mesh_of(plan)
    assert mesh is not None
    if len(many := [a for a, n in mesh.shape.items() if n > 1]) > 1 and (
        set(many) != {"data", "tensor"} or not task.beside
    ):
        alone = ", ".join(f"{a}={mesh.size}" for a in many)
        refuse("mesh", plan.mesh, f"one axis alone ({alone}), or task 'lora' over data and tensor")
    if task.accumulate > 1 and (not task.beside or "fsdp" in many):
        refuse("accumulate", task.accumulate, "one part, accumulate 1, or task 'lora' over data or tensor")
    held = formats.find(plan.weights)
    if held.name not in FROZEN or (held.name == "int8" and held.options):
        refuse("weights", plan.weights, f"weights {', '.join(FROZEN)}, of int8 one scale a row")
    if held.name in ("int4", "nf4") and "tensor" in many:
        refuse("weights", plan.weights, "weights 'dense' or 'int8', or any of 4 bits over data or fsdp")
    if task.train == "all" and max(mesh.shape.get(axis, 1) for axis in ("data", "fsdp")) > 2:
        refuse("task", task.name, "data=2, fsdp=2 or tensor, or task 'lora'")
    if plan.rules:
        refuse("rules", plan.rules, "the tables data, fsdp and tensor as they are")
    split = batch // on_one(plan, ("batch",), (batch,))[0]
    rows = math.prod(mesh.shape[a] for a in mesh.shape if a in ("data", "fsdp"))
    if split != rows:
        raise ValueError(
            f"batch is {batch}, and the mesh {plan.mesh!r} splits rows over {rows} devices: say batch"
            f" {max(1, round(batch / rows)) * rows}, or any multiple of {rows}"
        )


def listed(plan: Plan) -> bool:
    """Whether layers on the devices are written out: on one device, and where each is brought together in its turn (fsdp).
    Elsewhere they are scanned: written out over several, XLA lets sums over devices wait, and keeps what they are made of."""
    return not plan.mesh or (gathered(plan).sharding_rules() != plan.sharding_rules() and "fsdp" in plan.mesh)


def need(
    architecture: Architecture, plan: Plan, task: Task, *, batch: int, context: int, alone: Any, loss: Any
) -> Need:
    """What a step needs of each device, and of the machine's host memory. alone, loss: planning's need and loss_activations, of
    one device, given its shapes."""
    used, held = (cast(Architecture, OneDevice(architecture, p)) for p in (gathered(plan), plan))
    mesh, bare = mesh_of(plan), dataclasses.replace(plan, mesh="", sharding="single", rules=())
    assert mesh is not None
    parts = task.accumulate if task.layered(plan) else 1
    chunk = task.loss_chunk or max(1, step.LOGITS // (4 * parts * batch * architecture.config.vocab_size))
    (rows,) = on_one(plan, ("batch",), (batch,))
    one = dataclasses.replace(task, loss_chunk=chunk)
    itemsize = jnp.dtype(task.compute or plan.dtype).itemsize
    layer, shard = max(layer_bytes(used, bare)), max(layer_bytes(held, bare))
    largest = itemsize * max(
        math.prod(s.shape) for k in set(used.kinds) for s in used.block(k)[1].values() if s.out is not None
    )
    (F,) = {s.shape[s.axes.index("mlp")] for s in architecture.specs().values() if "mlp" in s.axes}
    most, within = 0, 0
    if on_one(plan, ("mlp",), (F,)) < (F,):
        most, within = _sums(used, rows * context, itemsize, beside=task.beside)
    sums = max(0, most - within)
    if layer > shard:
        sums += largest  # brought together, beside what is changed
    elif rows < batch and 4 * largest // itemsize > COMBINED:
        sums += 4 * largest // itemsize  # of a gradient that is summed alone
    n = alone(
        used, bare, one, batch=rows, context=context, held=held, sums=sums, summed=rows < batch and layer == shard
    )
    found, streamed = dataclasses.asdict(n), n.streaming > 0
    if task.beside and streamed and layer > shard:
        # of two, the shards and what is brought together of them at a time; of more all of a layer was seen to be
        found["streaming"] = min(layer, shard + max(COMBINED, largest)) if mesh.size == 2 else layer
    elif task.beside and not streamed:  # a layer that is brought together, or the slice of a stack
        found["streaming"] = layer  # and is gone while the loss is made
        short = dataclasses.replace(one, loss_chunk=1)
        back = alone(used, bare, short, batch=rows, context=context, held=held).activations
        found["activations"] = max(back, loss(used, one, rows, context, itemsize) - layer)
    elif layer > shard and not streamed:  # sums over devices are float32
        found["activations"] += largest
        found["gradients"] = found["outer"] + found["resident"]
    if task.beside:
        found["activations"] = max(found["activations"], most - found["streaming"])
    if layer > shard:  # the head is brought together too
        names = step.head_names(used.outer()[1])
        whole, part = (sum(shard_bytes(bare, n, a.outer()[1][n]) for n in names) for a in (used, held))
        entering, pieces = rows * context * width(used) * itemsize, loss(used, one, rows, context, itemsize)
        if task.beside:  # from a second form of its shard, and used
            most = max(whole + part + 2 * entering, whole + pieces) - found["streaming"]
            found["activations"] = max(found["activations"], most)
        elif streamed and context > chunk:
            # of a loop over tokens its gradient is whole in float32, and then a shard; beside it the shard as it is used, and
            # the head as it was, beside which the loop's logits were
            most = whole + part + whole * itemsize // 4 + max(part, pieces) + 3 * entering
            found["activations"] = max(found["activations"], most - found["streaming"] - found["gradients"])
    for name in ("host_weights", "host_optimizer", "host_kept"):
        found[name] *= mesh.size
    return Need(**found)


def _sums(used: Architecture, rows: int, itemsize: int, *, beside: bool) -> tuple[int, int]:
    """Bytes on the way back where what devices found of the residual stream's gradient is summed, in float32: before the two
    halves of the feed-forward block, or before queries, keys and values."""
    found = []
    for kind in set(used.kinds):
        specs = used.block(kind)[1]
        dims = {a: n for s in specs.values() for a, n in zip(s.axes, s.shape, strict=True)}
        D, F = dims["embed"], dims["mlp"]
        attends = [s for s in specs.values() if s.out is not None and "mlp" not in s.axes]
        weights = sum(math.prod(s.shape) for s in attends) * itemsize
        made = sum(math.prod(s.shape[: s.out]) for s in attends) - D
        heads = max(math.prod(s.shape[s.out :]) for s in attends if s.out and "heads" in s.axes[s.out :])
        each, u = 4 * rows * D, rows * D * itemsize

        def sums(count: int, each: int = each) -> int:
            """Of so many products, those that are summed in one go stand twice; what adapters give goes with one."""
            several = min(count, COMBINED // each)
            return (count + (several if several > 1 or beside else 0)) * each

        mlp = sums(2) + 6 * u + rows * itemsize * (4 * F + made + heads) + weights
        qkv = sums(3) + 5 * u + rows * itemsize * (3 * F + 4 * heads)
        outs = sum(math.prod(s.shape[: s.out]) for s in specs.values() if s.out is not None)
        found.append((max(mlp, qkv), rows * itemsize * (4 * D + outs + 2 * F)))
    return max(found)


def seconds(
    architecture: Architecture, plan: Plan, task: Task, card: Any, *, batch: int, context: int, alone: Any
) -> dict[str, float]:
    """What a step takes at least of each resource of each card; what goes between cards is not in it."""
    bare = dataclasses.replace(plan, mesh="", sharding="single", rules=())
    (rows,) = on_one(plan, ("batch",), (batch,))
    used, held = (cast(Architecture, OneDevice(architecture, p)) for p in (gathered(plan), plan))
    times = alone(used, bare, task, card, batch=rows, context=context)
    shards = alone(held, bare, task, card, batch=rows, context=context)  # each card's link brings its own
    return times | {n: s for n, s in shards.items() if n == "host link"}
