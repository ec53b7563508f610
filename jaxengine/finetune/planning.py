"""What a step of fine-tuning needs, by arithmetic on abstract parameters, and the program that it is, to be compiled.

Device bytes are those of the moment when most stands there: on the way back through a layer, or when the loss is made.

    frozen layers     as generating has them: resident, or one (two) at a time
    what is trained   float32, its gradient and the optimizer's state; where every parameter is trained in another home than
                      the device's, one layer's at a time
    kept              what comes into each layer (remat 'full'), or that and what its matrices gave ('dots'), or all; in a loop
                      'none' keeps what 'dots' does and what attention gave
    activations       one layer run again and gone back through; or some tokens' logits and their gradient
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp

from jaxengine import placement
from jaxengine.architecture import Architecture, Spec
from jaxengine.engine import Program
from jaxengine.finetune import layered, meshed, mezo, places, sampled, tiles
from jaxengine.finetune import step as whole
from jaxengine.finetune.optimizers.base import Matrix, Optimizer
from jaxengine.finetune.optimizers.base import optimizer as find_optimizer
from jaxengine.finetune.rows import blocks as row_blocks
from jaxengine.finetune.settings import ADAPTERS, TASKS, Settings, Task
from jaxengine.finetune.trained._lowrank import each as each_target
from jaxengine.finetune.trained.base import targets, trained
from jaxengine.homes.base import home
from jaxengine.plan import (
    SCORES,
    Need,
    Plan,
    Variant,
    decoded_bytes,
    layer_bytes,
    mesh_of,
    on_one,
    show_bytes,
    streamed_bytes,
    tier_bytes,
    weight_bytes,
    width,
)  # fmt: skip
from jaxengine.walk import REMAT
from pallas_kernels.attention.xla import Blocks, blocks
from pallas_kernels.cards import CARDS, Card
from pallas_kernels.quant_matmul.xla import forward_chunk

GAPS = 0.04  # between buffers of unlike sizes that copies hold for a while, of their bytes


class Options(TypedDict, total=False):
    """What may be said of a task, named and meant as in Settings; None or nothing: as usual."""

    rank: int | None
    targets: Sequence[str] | None
    layers: int | None
    optimizer: str | None
    clip: float | None
    ema: float | None
    compute: str | None
    accumulate: int | None
    loss_chunk: int | None
    tile: int | None


def task(name: str, **options: Unpack[Options]) -> Task:
    """The task of this name with these options: that of a run's Settings which say the same, so that both count the same.

    Raises ValueError for a name that is none of TASKS, for an option that means nothing for the task, and for what no run
    takes; of each with what can be said instead.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; what is planned for is generate, {', '.join(TASKS)}")
    train, usual = TASKS[name]
    given: dict[str, Any] = {n: x for n, x in options.items() if x is not None and x != ()}
    kinds = {"rank": ADAPTERS, "targets": ADAPTERS, "layers": sampled.SAMPLED}
    why = {"rank": "puts nothing beside a matrix", "layers": "trains no layers in turn"}
    why["targets"] = why["rank"]
    for n, names in kinds.items():
        if n in given and train not in names:
            raise ValueError(
                f"{n} is {given[n]!r}, and task {name!r} {why[n]}: it goes with {', '.join(names)}; leave it out"
            )
    optimizer = given.pop("optimizer", usual)
    if usual == "mezo" and optimizer != usual:
        raise ValueError(
            f"optimizer is {optimizer!r}, and task 'mezo' is every parameter without a gradient: say task 'full', or leave it out"
        )
    if "targets" in given:
        given["targets"] = (given["targets"],) if isinstance(given["targets"], str) else tuple(given["targets"])
    tiles.check(given.get("tile", 0), "full")
    rate = {"learning_rate": 0.1} if optimizer == "sgd" else {}  # of which nothing here depends
    return Settings(train=train, optimizer=optimizer, **rate, **given).task


def asked(what: str | Task, **options: Unpack[Options]) -> Task | None:
    """The task that is planned for: one as it is, or by name with its options; None for 'generate', which has none."""
    whole = ("tile", "loss_chunk", "ema")  # of which 0 is none
    given = {n: x for n, x in options.items() if x is not None and x != () and (x != 0 or n not in whole)}
    if isinstance(what, Task):
        if given:
            raise ValueError(f"{', '.join(given)} beside a Task, which says them itself: give a name, or a Task alone")
        return what
    if what != "generate":
        return task(what, **options)
    for n, x in given.items():
        does = {"tile": "takes a prompt in chunks, which are chosen", "compute": "computes in its dtype"}
        raise ValueError(
            f"{n} is {x!r}, and task 'generate' {does.get(n, 'trains nothing')}: leave it out, or say a task that trains, such"
            f" as {'lisa' if n == 'layers' else 'lora'!r}"
        )
    return None


def differs(what: Task) -> str:
    """What of a task is not as usual: 'rank 64, optimizer lion'; '' where all is."""
    usual = task(what.name).said
    shown = {
        n: ", ".join(x) if isinstance(x, tuple) else f"{x:g}" if isinstance(x, float) else x
        for n, x in what.said.items()
    }
    return ", ".join(f"{n} {shown[n]}" for n, x in what.said.items() if x != usual[n])


def check(architecture: Architecture, plan: Plan, task: Task) -> None:
    """Refuse what no plan for this task and model can be, wherever layers live, as a run does."""
    if task.optimizer.order == 0 and plan.remat not in ("", "full"):
        raise ValueError(
            f"remat is {plan.remat!r}, and {task.optimizer.name!r} makes no gradient and keeps nothing of a layer: leave it out"
        )
    if task.optimizer.order == 0 and task.tile:
        said = "task 'mezo'" if task.name == "mezo" else f"optimizer {task.optimizer.name!r}"
        raise ValueError(
            f"tile is {task.tile}; bytes of {said}, which makes no gradient, are not counted in tiles: leave it out"
        )
    if task.sampled and plan.remat:
        sampled.check_remat(task.train, plan.remat)
    tiles.check(task.tile, plan.remat or "full")
    if task.beside:
        targets(architecture, task.options.targets)
        if task.train == "dora":
            check_joined(architecture, task.options.targets)
    else:
        trained(task.train).make(task.options, architecture, plan, {"outer": {}, "banks": ()}, None)


def check_joined(architecture: Architecture, patterns: tuple[str, ...]) -> None:
    """Refuse DoRA beside a part of a matrix that PEFT sees as one: it could not be written (checkpoints/peft.py)."""
    table, params, chosen = architecture.name_table(), architecture.params(), set(targets(architecture, patterns))
    for theirs in table.theirs(params, architecture.num_layers):
        ours = table.parts(theirs, params)
        if chosen & set(ours) and (lack := [n for n in ours if n not in chosen]):
            raise ValueError(
                f"targets: {theirs} is {', '.join(ours)} in one, and DoRA needs a magnitude for all of its outputs: target"
                f" {', '.join(n.rpartition('.')[2] for n in lack)} too, or train='lora'"
            )


def abstract_trained(architecture: Architecture, plan: Plan, task: Task, params: Any) -> Any:
    """What is trained, as ShapeDtypeStructs; params: abstract."""
    if task.train == "all" or task.sampled:
        return trained(task.train).make(task.options, architecture, plan, params, None)
    thin = trained("lora" if task.train == "dora" else task.train)
    made = jax.eval_shape(lambda: thin.make(task.options, architecture, plan, None, jax.random.key(0)))
    if task.train != "dora":
        return made

    def with_sizes(leaf: dict[str, Any]) -> dict[str, Any]:
        rows = jax.ShapeDtypeStruct(leaf["b"].shape[:-1], jnp.float32)
        return leaf | {"magnitude": rows, "square": rows}

    is_leaf = lambda x: isinstance(x, dict) and x.keys() == {"a", "b"}  # noqa: E731
    return jax.tree.map(with_sizes, made, is_leaf=is_leaf)


def size_of(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def program(
    architecture: Architecture, plan: Plan, task: Task, mesh: Any, *, batch: int, context: int
) -> tuple[Program, tuple[Any, ...], tuple[Any, ...]]:
    """(program, static arguments, abstract ones) of a step on `batch` rows of `context` tokens a part."""
    tuning, params = task.tuning(architecture, plan, mesh), placement.abstract(architecture, plan, mesh)
    made = abstract_trained(architecture, plan, task, params)
    rows = places.batch(plan, mesh, (task.accumulate, batch, context))
    banks = tuple(dataclasses.replace(bank, weights=()) for bank in params["banks"])
    if task.layered(plan):
        return layered.step, (tuning,), (banks, places.state(tuning, task, architecture, plan, made, banks), rows)
    if task.sampled:
        turn, _ = largest_turn(architecture, plan, task, batch=batch, context=context)
        *held, chosen = sampled.arguments(tuning, params["banks"], made, turn)
        return sampled.step, (tuning,), (*held, rows, chosen)
    state = places.state(tuning, task, architecture, plan, made, banks)
    if task.train == "all":  # the parameters are those of the state, and stand once
        params = jax.tree.map(lambda a: None, params)
    return whole.step if task.optimizer.order else mezo.step, (tuning,), (params, state, rows)


def need(
    architecture: Architecture,
    plan: Plan,
    task: Task,
    *,
    batch: int,
    context: int,
    held: Architecture | None = None,
    sums: int = 0,
    summed: bool = False,
    wide: bool = False,
    keeps_gelu: bool = False,
) -> Need:
    """What a step needs: `batch` rows of `context` tokens a part; over a mesh each of its devices, and the machine of host
    memory. held: the shapes that parameters and what is trained are held in, where they are used in others; sums: bytes of what
    goes between devices while streamed layers are trained themselves; summed: devices sum whole gradients of theirs.
    wide: on a card below sm_80, where XLA makes nothing inside a product: see `_wide_back`. keeps_gelu: see that of a card."""
    on_card: Any = {"wide": wide, "keeps_gelu": keeps_gelu}
    if plan.mesh:
        how: Any = {"alone": functools.partial(need, **on_card), "loss": loss_activations}
        return meshed.need(architecture, plan, task, batch=batch, context=context, **how)
    if _looped(architecture, plan, task) and plan.home != "device" and plan.remat == "none":
        return _need_of_two_scans(architecture, plan, task, batch=batch, context=context, held=held, **on_card)
    if plan.attention == "reference":
        # a loop keeps nothing of it under 'none' either
        again = plan.remat == "none" and _looped(architecture, plan, task)
        plan = dataclasses.replace(plan, remat="dots") if again else plan
        plain = dataclasses.replace(plan, attention="auto")
        least = need(architecture, plain, task, batch=batch, context=context, held=held, **on_card)
        scores = _score_bytes(architecture, plan, task, batch * context * context)
        return dataclasses.replace(least, activations=least.activations + scores)
    if task.sampled:
        return largest_turn(architecture, plan, task, batch=batch, context=context)[1]
    if not task.optimizer.order:
        return _need_of_losses(architecture, plan, task, batch=batch, context=context)
    if _looped(architecture, plan, task) and plan.home == "device":
        return _need_of_a_scan(architecture, plan, task, batch=batch, context=context, held=held, **on_card)
    held = architecture if held is None else held
    tiers, each = tier_bytes(held, plan), layer_bytes(held, plan)
    outer = weight_bytes(held, plan)["outer"]
    dtype, layered = jnp.dtype(task.compute or plan.dtype), task.layered(plan)
    remat, L = plan.remat or "full", architecture.num_layers
    parts = task.accumulate if layered else 1  # of a batch, whose inputs to layers stand at the same time
    tiled = 0 < task.tile < context
    one = layer_activations(
        architecture,
        batch * context,
        dtype.itemsize,
        batch * task.tile if tiled else 0,
        layered=layered,
        several=batch > 1,
    )
    entering = parts * batch * context * width(architecture) * dtype.itemsize
    streamed = _streamed_layers(architecture, plan)
    kept = {
        "full": L * entering,
        "offload": 0,
        "dots": L * (entering + one.dots),
        "none": (L - streamed) * (entering + one.dots + one.between) + streamed * entering,
    }[remat]
    if remat in ("dots", "none"):
        more = _kept_beside(architecture, remat, dtype.itemsize, keeps_gelu=keeps_gelu)
        kept += (L if remat == "dots" else L - streamed) * batch * context * dtype.itemsize * more
    if task.train == "dora" and remat == "dots":  # before and after the magnitudes
        kept += L * (one.dots + batch * context * width(architecture) * dtype.itemsize)
    loss = loss_activations(architecture, task, parts * batch, context, dtype.itemsize)
    # what a layer's matrices gave is there already where it is kept; so is x, which tiles take as it is
    back = one.within - (one.dots if remat == "dots" or (remat == "none" and not streamed) else 0)
    written_out = task.train == "lora" and not streamed and all(p.form == "unrolled" for p in plan.parts(architecture))
    # of layers that are trained: with a norm to be clipped, what the first way back began with stands for the second
    again = entering if layered and remat == "offload" and task.clip and not tiled else 0
    back += again
    if not layered:
        back -= entering // parts if (tiled or written_out) and remat == "full" else 0
    back += decoded_bytes(architecture, plan, batch * context, dtype.itemsize)
    back += _decoded_whole(architecture, plan, dtype.itemsize)
    # of streamed layers that alternate the next one, which was brought, and what came into it stand; a layer goes back after
    # attention has gone forward, and what that made is not made again
    alternating = any(len(p.kinds) > 1 and home(p.home).TIER != "device" for p in plan.parts(architecture))
    shape = _sizes(architecture)
    if not tiled:
        made_again = remat != "none" or streamed
        each_token = (shape.D + shape.NH) * alternating + _kept_beside_gelu(architecture) * (keeps_gelu and made_again)
        back += batch * context * dtype.itemsize * each_token
    # a magnitude's gradient asks for what each matrix gave before it
    back += one.dots if task.train == "dora" and remat in ("full", "offload") else 0
    if task.train == "dora" and remat == "none":  # which is there already, but for one of the two that are multiplied
        kept += (L - streamed) * (one.between - 3 * entering // parts)
    host_optimizer, host_kept = 0, L * entering if remat == "offload" else 0
    if task.train != "all":
        adapters = adapter_bytes(held, task)
        gradients, optimizer, trained = adapters, adapter_states(held, task), adapters
        streaming = streamed_bytes(held, plan)
        ahead = any(p.form == "ahead" for p in plan.parts(architecture))
        # a matrix goes when it was used, and the next layer's come in the places of this one's
        alone = streaming // 2 if ahead else streaming
        s, stored = _sizes(architecture), jnp.dtype(plan.dtype).itemsize
        # a layer as it is used, beside the one matrix that is being narrowed
        if plan.weights == "dense" and not plan.weight_rules and dtype.itemsize < stored:
            if streamed and not ahead:
                alone = streaming * dtype.itemsize // stored + s.largest * stored
            elif not streamed:
                alone = s.early * dtype.itemsize
        if streamed:
            back += _score_blocks(architecture, plan, task, batch * context * context)
        back -= _not_asked_for(architecture, task, batch * context * dtype.itemsize, streamed=bool(streamed))
        moments = [alone + back, streaming + one.between, loss]
        if remat in ("full", "offload"):
            rows = {"batch": batch, "context": context, "streamed": streamed}
            if wide:
                moments[0] = _wide_back(architecture, plan, task, **rows)
            elif plan.attention == "xla" and dtype.itemsize == 2:
                if written_out:
                    each = 4 * s.D + 3 * s.NH + 2 * s.KH + 3 * s.F
                    moments[0] = alone + batch * context * dtype.itemsize * each
                moments[0] += _zeros_before(architecture, dtype.itemsize, **rows)
                moments.append(_xla_back(architecture, plan, task, dtype.itemsize, **rows))
            elif streamed and not tiled and dtype.itemsize == 2 and s.halves == 1:
                moments.append(s.attending * 2 + batch * context * 2 * _attention_back(architecture, task))
        elif remat == "dots" and streamed and not tiled and not wide and dtype.itemsize == 2 and s.halves == 1:
            # of x, o's result, their sum and its norm two: the first two are slices of what is kept. (XLA's order leaves none of
            # these on an H200, and all four on an RTX 4090.)
            each = _attention_back(architecture, task) - 2 * s.D
            moments.append(s.attending * 2 + batch * context * 2 * each)
        activations = max(moments) - streaming
        if remat == "dots" and 0 < streamed < L and s.halves == 2:  # as in `_need_of_a_scan`
            activations += batch * context * dtype.itemsize * s.F
        if written_out and remat == "full" and task.accumulate == 1:  # as gradients come, what came into layers goes
            most = max(gradients * j // L + (L - j) * entering for j in range(L + 1))
            activations -= min(activations, gradients + kept - most)
    else:
        outside, states = outer_states(held, task.optimizer), layer_states(held, plan, task.optimizer)
        trained, optimizer = 0, sum(outside.values()) + sum(whole for whole, _ in states)
        if layered:
            layer, outside_now = max(each), _outside(held, task)
            streaming = layer if streamed else 0
            # a gradient to which no other is added stays in the arithmetic's dtype until it is used
            narrow, added, s = layer * dtype.itemsize // 4, task.accumulate > 1 or tiled, _sizes(architecture)
            gradients = (layer if added else narrow) + outside_now.beside
            cast = (narrow if dtype.itemsize < 4 else 0) * (1 if task.accumulate == 1 else 2)  # of a part too
            here = [home(p.home).TIER == "device" for p in plan.parts(architecture) for _ in range(p.num_layers)]
            coming = max((w - stay for (w, stay), near in zip(states, here, strict=True) if not near), default=0)
            # copies are under way of some matrices while others are used, but where a gradient is whole after a loop over tiles
            shapes = {s.shape for k in set(held.kinds) for s in held.block(k)[1].values()}
            largest = 4 * max(map(math.prod, shapes))
            under_way = 2 * largest if streamed and not tiled else 0
            update = 0
            if streamed:  # all that was changed waits to go back, beside what one matrix is changed from; and gaps
                update = coming + largest * (streaming + coming) // streaming + 5 * entering // parts + again
                if s.halves == 1 and not tiled:  # what the feed-forward block's last matrix takes waits too
                    update += batch * context * dtype.itemsize * s.F
                if added:  # in the place of the gradient, which is as wide
                    update -= layer
                elif summed:  # in float32, and then used: no others wait
                    update -= max(0, narrow - largest)
                update += int((GAPS / 3 if added else GAPS) * (streaming + gradients + kept + update))
            # with a norm to be clipped, what the first way back began with stands for the second
            begun = entering if remat == "full" and task.clip and not added else 0
            moments = [cast + back + under_way + begun, update]
            if alternating:
                # a layer and its state come at once, before its gradient is made; what came in is widened for a norm
                moments.append(cast - (0 if added else narrow) + coming + back + 2 * entering // parts)
            if streamed and not added and 8 * _state_of_largest(architecture, task.optimizer) < largest:
                # nothing of its size is waited for: a layer's last matrix is changed as soon as its gradient is there, while
                # the others are as they are used, and no gradient of theirs is made
                gradients -= narrow - largest * dtype.itemsize // 4
                within = batch * context * dtype.itemsize * (4 * s.D + 2 * s.NH + 2 * s.KH + 3 * s.F)
                moments = [cast - (largest * dtype.itemsize // 4 if cast else 0) + largest + within]
            # the head's gradient, and what it is made from: in the arithmetic's dtype, or each device's own
            loss += outside_now.head * (2 if summed else 1)
            loss += 0 if summed or dtype.itemsize == 4 else outside_now.head // 4 * dtype.itemsize
            last = outside_now.here + max(outside_now.changing - kept, 0 if task.clip else -kept)
            # layers that are brought together stand while they are changed, and sums over devices are done by then
            together = sums if max(layer_bytes(architecture, plan)) > layer else 0
            moments = [m + (together if m == update else sums) for m in moments]
            activations = max(*moments, loss - streaming - gradients, last - streaming - gradients)
            host_kept += outside_now.waits
            if cast:  # of resident layers one is made going forward, and stays
                activations += tiers["device"] * dtype.itemsize // 4
            optimizer = sum(whole if near else stay for (whole, stay), near in zip(states, here, strict=True))
            host_optimizer = sum(outside.values()) + sum(whole for whole, _ in states) - optimizer
        else:
            # until they are used they are in the arithmetic's dtype, but for sums over parts and stacks
            narrow = dtype.itemsize if task.accumulate == 1 else 4
            stacked = sum(sum(each[p.start : p.start + p.num_layers]) for p in plan.parts(architecture) if p.stacked)
            streaming, gradients = 0, stacked + (outer + tiers["device"] - stacked) * narrow // 4
            activations = max(back, loss, _changing(held, plan, task.optimizer, gradients) - kept)
    return Need(
        outer=outer, resident=tiers["device"], streaming=streaming, cache=0, activations=activations,
        host_weights=tiers["host"], host_optimizer=host_optimizer, host_kept=host_kept,
        disk=tiers["disk"], trained=trained, gradients=gradients, optimizer=optimizer, kept=kept,
    )  # fmt: skip


def _streamed_layers(architecture: Architecture, plan: Plan) -> int:
    """How many layers do not stay on the device."""
    return sum(p.num_layers for p in plan.parts(architecture) if home(p.home).TIER != "device")


def _looped(architecture: Architecture, plan: Plan, task: Task) -> bool:
    """Whether a step for adapters goes through resident layers in loops alone."""
    forms = {p.form for p in plan.parts(architecture) if home(p.home).TIER == "device"}
    return task.beside and task.optimizer.order > 0 and forms == {"scan"}


def _need_of_a_scan(
    architecture: Architecture,
    plan: Plan,
    task: Task,
    *,
    batch: int,
    context: int,
    held: Architecture | None,
    **on_card: bool,
) -> Need:
    """What a step for adapters needs that goes through resident layers in a loop: as much as through streamed ones, and the
    layers, of which XLA copies the one that is used. 'none' keeps beside what matrices gave what attention did, and its sums in
    float32; both have a half of a gated feed-forward block more than streamed layers (read from compiled programs)."""
    kept = plan.remat in ("none", "dots")
    streamed = dataclasses.replace(plan, home="host", stay=(), remat="dots" if kept else plan.remat)
    n = need(architecture, streamed, task, batch=batch, context=context, held=held, **on_card)
    s, itemsize = _sizes(architecture), jnp.dtype(task.compute or plan.dtype).itemsize
    rows = batch * context
    attended = architecture.num_layers * rows * (s.NH * itemsize + 4 * s.heads) if plan.remat == "none" else 0
    half = rows * s.F * itemsize if kept and s.halves == 2 else 0
    tiers = tier_bytes(architecture if held is None else held, plan)
    return dataclasses.replace(
        n, resident=tiers["device"], activations=n.activations + half, host_weights=0, kept=n.kept + attended
    )


def _need_of_two_scans(
    architecture: Architecture,
    plan: Plan,
    task: Task,
    *,
    batch: int,
    context: int,
    held: Architecture | None,
    **on_card: bool,
) -> Need:
    """What a step for adapters needs that keeps of resident layers in a loop what their matrices and attention gave, and of
    streamed ones after them what comes into them: when the streamed ones go back all of that stands, and when the resident ones
    do, no inputs of the others."""
    rows: dict[str, Any] = {"batch": batch, "context": context, "held": held} | on_card
    streamed = need(architecture, dataclasses.replace(plan, remat="full"), task, **rows)
    alone = dataclasses.replace(plan, home="device", form="scan", resident=0, resident_form="")
    near = need(architecture, alone, task, **rows)
    L, entering = architecture.num_layers, streamed.kept // architecture.num_layers  # all that 'full' keeps of a layer
    far = _streamed_layers(architecture, plan)
    kept = far * entering + (L - far) * near.kept // L
    activations = max(streamed.activations, near.activations - far * entering)
    return dataclasses.replace(streamed, activations=activations, kept=kept)


def keeps_gelu(card: Card) -> bool:
    """Whether XLA writes what a gate's gelu made until its way back, and does not make it again there: its cost model takes that
    for cheaper where memory is fast beside float32 arithmetic. (Seen of A100, H100, H200, B200, 9 to 25 operations a byte of
    memory; not of RTX 3090, 4090 and 5090, 38 to 82.)"""
    return card.fp32 < 30 * card.bandwidth


def _decoded_whole(architecture: Architecture, plan: Plan, itemsize: int) -> int:
    """Of a layer's matrices that are held in a format, those that XLA decodes in one piece: when the layer has run again they
    stand, decoded, until it has gone back through them."""
    found = [0]
    for kind in set(architecture.kinds):
        index = architecture.kinds.index(kind)
        each = [(f"layers.{index}.{n}", s) for n, s in architecture.block(kind)[1].items() if s.out is not None]
        held = (s for n, s in each if plan.format_of(n, s) != "dense")
        sizes = ((math.prod(s.shape[: s.out]), math.prod(s.shape[s.out :])) for s in held)
        found.append(sum(N * K * itemsize for N, K in sizes if forward_chunk(N, K)[0] == 1))
    return max(found)


def _activation(architecture: Architecture) -> str:
    """Of the feed-forward block, by its name in the config."""
    config = architecture.config
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((act for n in names if (act := getattr(config, n, None))), "")


def _kept_beside(architecture: Architecture, remat: str, itemsize: int, *, keeps_gelu: bool) -> int:
    """Numbers a token that are kept of each layer under 'dots' or 'none', beyond what a Llama's layer keeps.

    Where attention's and the block's results are normed before they are added, both are asked for, the last too. Of 'none':
    queries and keys as they were before their norms; what a gelu made, where it is not made again, and of a relu nothing
    but what it made; and in 16 bits, where that is made again, the one of a layer's two sums that a norm makes in float32."""
    s, specs, act = _sizes(architecture), architecture.block(architecture.kinds[0])[1], _activation(architecture)
    normed = "post_attention_norm" in specs and "pre_mlp_norm" in specs
    if remat == "dots":
        return s.D * normed
    found = s.NH - s.D + 2 * s.D * normed + s.NH * ("q_norm" in specs) + s.KH * ("k_norm" in specs)
    found += s.D * (itemsize == 2 and not keeps_gelu)
    return found + s.F * (act.startswith("gelu") and keeps_gelu) - s.F * (act == "relu" and s.halves == 1)


def _kept_beside_gelu(architecture: Architecture) -> int:
    """Numbers a token that stand where gelu's result does: that, and where what attention gave is normed before it is added, the
    sum, which is then not made again either."""
    specs = architecture.block(architecture.kinds[0])[1]
    if "gate" not in specs or not _activation(architecture).startswith("gelu"):
        return 0
    s = _sizes(architecture)
    return s.F + s.D * ("post_attention_norm" in specs and "pre_mlp_norm" in specs)


def counted_closely(plan: Plan, task: Task, *, wide: bool) -> bool:
    """Whether what stands in this step, of attention in XLA and on a card below sm_80 (wide), was read from compiled programs."""
    if not task.optimizer.order or task.train == "all":
        return True
    if wide:
        return task.train == "lora" and plan.remat in ("", "full", "offload")
    return not (task.sampled and plan.attention == "xla" and jnp.dtype(task.compute or plan.dtype).itemsize == 2)


def strays(architecture: Architecture, plan: Plan, task: Task, tokens: int) -> list[tuple[str, str]]:
    """Steps that XLA was seen to need more or less than 5 % beside what is counted for: (what, how many times as much). tokens:
    of a part of a batch. tests/test_finetune_bytes.py, test_finetune_sharded.py or scripts/LOG.md has the rows."""
    if not task.optimizer.order:
        return []
    if task.sampled:
        # what adafactor changes a matrix from is counted of all matrices of a layer together
        turned = task.optimizer.name == "adafactor" and not plan.mesh
        return [("in which adafactor changes some layers at a time", "0.92 to 1")] if turned else []
    streamed = any(home(p.home).TIER != "device" for p in plan.parts(architecture))
    narrow = jnp.dtype(task.compute or plan.dtype).itemsize == 2
    found = []
    mesh = mesh_of(plan)
    cards = 1 if mesh is None else mesh.size
    rows = cards // on_one(plan, ("batch",), (cards,))[0]  # parts that a batch is split in
    if task.beside and streamed and plan.remat != "dots" and 700 < tokens / rows < 1400:
        # counted is that all matrices stand beside the widest of what is made; the last one is gone by then (scripts/LOG.md)
        each = " on each card" if rows > 1 else ""
        found.append((f"of about a thousand tokens{each} beside streamed layers", "0.92 to 1"))
    if mesh is not None:
        sums = 4 * tokens * width(architecture)  # in float32
        if not task.beside and streamed and cards > rows and 5 * sums > max(layer_bytes(architecture, plan)):
            # counted is that a layer, its gradient and what devices sum stand at the same time (scripts/LOG.md)
            found.append(("of every parameter over tensor, with many tokens for so small layers,", "0.83 to 1"))
        elif not task.beside and task.optimizer.ema:
            found.append(("of every parameter and its average over several cards", "0.94 to 1.02"))
        return found
    if task.beside and streamed and narrow and plan.attention == "xla":
        found.append(("beside streamed layers with attention 'xla' in 16 bits", "up to 1.08"))
    if task.beside and streamed and narrow and plan.attention != "xla" and _sizes(architecture).halves == 1:
        found.append(("beside streamed layers whose feed-forward block has no gate", "0.92 to 1.05"))
    parts = plan.parts(architecture)
    here = [p for p in parts if home(p.home).TIER == "device"]
    if task.beside and any(p.form == "scan" and len(p.kinds) > 1 for p in here):
        found.append(("beside unlike resident layers in a loop", "1.1 to 1.7"))
    if task.beside and not streamed and len({p.form for p in here}) > 1 and plan.remat == "none":
        found.append(("beside resident layers, some in a loop and some written out, of which all is kept", "0.85 to 1"))
    looped = any(p.form == "scan" for p in here) and plan.remat in ("none", "dots")
    if task.train == "dora" and (looped or (plan.remat == "dots" and any(p.form == "scan" for p in parts))):
        found.append(("beside DoRA in a loop that keeps what matrices gave", "up to 1.14"))
    if task.beside and looped and narrow and plan.attention == "xla":
        found.append(
            ("beside layers in a loop that keeps what matrices gave, with attention 'xla' in 16 bits", "up to 1.13")
        )
    if task.train == "all" and not task.layered(plan) and task.accumulate > 1:
        found.append(("that adds up the gradients of resident layers over parts of a batch", "up to 1.09"))
    if task.beside and streamed and looped and plan.attention == "reference":
        found.append(("beside resident layers in a loop that keeps what matrices gave, with all scores", "up to 1.07"))
    codes = plan.weights != "dense" or bool(plan.weight_rules)
    if task.beside and streamed and codes and plan.remat == "dots" and any(p.form == "unrolled" for p in here):
        found.append(
            ("beside codes, some of them resident and written out, that keeps what matrices gave", "up to 1.06")
        )
    if task.beside and plan.home == "split" and any(len(p.kinds) > 1 for p in plan.parts(architecture)):
        if plan.form == "ahead":
            found.append(("beside unlike layers that are fetched ahead after resident ones", "up to 1.13"))
        elif plan.remat == "none":
            found.append(("beside unlike streamed layers after resident ones of which all is kept", "up to 1.06"))
    return found


def _need_of_losses(architecture: Architecture, plan: Plan, task: Task, *, batch: int, context: int) -> Need:
    """What a step needs that goes forward twice and never back (mezo.py), at the one of five moments when most stands. In each
    are the layer and what enters both passes, which what leaves them is written over.

        changed   what the layer is changed to, all of it
        attends   what it is moved to, x, its norm, queries, keys, values and what attention makes of them
        added     x, what attention made and what its last matrix gives; that and all matrices of the feed-forward block, which
                  are moved together
        widens    these, x, its norm, and what the first that widens x makes; or both, when the first has gone
        scores    what the head reads as it is moved to, and some tokens' logits

    Where attention's result is normed before it is added to x, or has a bias, both stand until the block's is added too."""
    tiers, each = tier_bytes(architecture, plan), layer_bytes(architecture, plan)
    streamed = any(home(p.home).TIER != "device" for p in plan.parts(architecture))
    itemsize, rows = jnp.dtype(task.compute or plan.dtype).itemsize, batch * context
    stored, D = jnp.dtype(plan.dtype).itemsize, width(architecture)
    moved = min(stored, itemsize)  # of a number that it is moved to, as the arithmetic takes it
    both = 2 * task.accumulate * rows * D * itemsize
    adapters = adapter_bytes(architecture, task) if task.beside else 0
    beside = 0 if task.beside else 1
    if task.beside:
        streaming, of_head, changed = streamed_bytes(architecture, plan), 0, 0
    else:
        streaming, of_head = max(each) if streamed else 0, head_bytes(architecture) * stored // 4
        # of layers that are written out each is changed where it stands
        scanned = not streamed and any(p.stacked for p in plan.parts(architecture))
        changed = max(each) if scanned else 0
    all_rows, vocab = task.accumulate * batch, architecture.config.vocab_size
    chunk = task.loss_chunk or max(1, whole.LOGITS // (4 * all_rows * vocab))
    logits = all_rows * min(chunk, context) * vocab * itemsize
    moments = [beside * max(each) + both]
    if moved < stored and not task.beside:  # matrices of attention are changed before those that are wider
        attends = sum(
            math.prod(m.shape) for m in architecture.block(architecture.kinds[0])[1].values() if "mlp" not in m.axes
        )
        moments = [max(each) - attends * stored + both]
    # what parts go through one after another stands for all of them
    in_parts = task.accumulate > 1
    for kind in set(architecture.kinds):
        specs = architecture.block(kind)[1]
        matrices = [s for s in specs.values() if s.out is not None]
        sizes = {"attends": 0, "widens": 0, "narrows": 0}
        made = {"attends": 0, "widens": 0, "narrows": 0}
        for s in matrices:
            assert s.out is not None
            what = "attends" if "mlp" not in s.axes else "widens" if "mlp" in s.axes[: s.out] else "narrows"
            sizes[what] += math.prod(s.shape) * moved
            made[what] += math.prod(s.shape[: s.out])
        n = sum(s.out is not None and "mlp" in s.axes[: s.out] for s in matrices)  # 1 where there is no gate
        last = max(
            (s for s in matrices if s.out and "heads" in s.axes[s.out :]),
            key=lambda s: math.prod(s.shape[s.out or 0 :]),
        )
        heads = math.prod(last.shape[last.out or 0 :])
        wide, block = rows * itemsize * made["widens"], sizes["widens"] + sizes["narrows"]
        entered = 3 if _adds_late(specs) else 2
        every = block + sizes["attends"]
        widening = (
            [(every, wide)] if in_parts else [(block - i * sizes["widens"] // n, (i + 1) * wide // n) for i in range(n)]
        )
        each_token = [
            # queries, keys, values, and o's outputs, as wide as x's norm; and what attention makes, as wide as the queries
            (every if in_parts else sizes["attends"], D + made["attends"] + heads),
            (every if in_parts else block + math.prod(last.shape) * moved, 2 * D + heads),
        ]
        moments += [changed + both + beside * held + rows * itemsize * numbers for held, numbers in each_token]
        moments += [changed + both + beside * held + rows * itemsize * entered * D + new for held, new in widening]
    return Need(
        outer=weight_bytes(architecture, plan)["outer"], resident=tiers["device"], streaming=streaming, cache=0,
        activations=max(*moments, of_head + logits + 2 * both - streaming), host_weights=tiers["host"],
        disk=tiers["disk"], trained=adapters,
    )  # fmt: skip


def _adds_late(specs: Mapping[str, Spec]) -> bool:
    """Whether what attention gave a layer is no product's own result when it is added to x."""
    return "o_bias" in specs or ("post_attention_norm" in specs and "pre_mlp_norm" in specs)


def _score_bytes(architecture: Architecture, plan: Plan, task: Task, pairs: int) -> int:
    """Of scores that are all written: float32, and as probabilities; their gradients, and each layer's where all are kept."""
    itemsize = jnp.dtype(task.compute or plan.dtype).itemsize
    heads = max(architecture.attention(kind).num_heads for kind in architecture.kinds)
    ways = 2 if task.optimizer.order else 1
    layers = architecture.num_layers if ways == 2 and plan.remat == "none" else 1
    return (layers + ways - 1) * pairs * heads * (4 + itemsize)


def _score_blocks(architecture: Architecture, plan: Plan, task: Task, pairs: int) -> int:
    """Of attention's way back where it runs in XLA (float32), for some pairs of tokens at a time: weights and their gradient."""
    if plan.attention == "reference" or (task.compute or plan.dtype) != "float32":
        return 0
    heads = max(architecture.attention(kind).num_heads for kind in architecture.kinds)
    return min(SCORES, 2 * 4 * pairs * heads)


class _Sizes(NamedTuple):
    """Of the widest layer: what each token has of each kind of number, and the elements of its matrices, but for those that take
    the feed-forward block's width, of those of attention that make queries, keys and values, and of the largest; how many make
    that width."""

    D: int
    F: int
    NH: int
    KH: int
    heads: int
    early: int
    attending: int
    largest: int
    halves: int


def _sizes(architecture: Architecture) -> _Sizes:
    found = []
    for kind in set(architecture.kinds):
        specs, a = architecture.block(kind)[1], architecture.attention(kind)
        dims = {x: n for s in specs.values() for x, n in zip(s.axes, s.shape, strict=True)}
        matrices = [s for s in specs.values() if s.out is not None]
        early = sum(math.prod(s.shape) for s in matrices if "mlp" not in s.axes[s.out :])
        attending = sum(math.prod(s.shape) for s in matrices if {"heads", "kv_heads"} & set(s.axes[: s.out]))
        NH, KH = (n * a.head_dim for n in (a.num_heads, a.num_kv_heads))
        found.append(
            _Sizes(
                dims["embed"],
                dims["mlp"],
                NH,
                KH,
                a.num_heads,
                early,
                attending,
                max(math.prod(s.shape) for s in matrices),
                sum("mlp" in s.axes[: s.out] for s in matrices),
            )
        )
    return max(found, key=lambda s: (s.F, s.NH, s.D))


@functools.cache
def _blocks(rows: int, tokens: int, heads: int) -> Blocks:
    """In which attention meets its keys where it runs in XLA on a GPU."""
    card = CARDS["H200"]
    device = jax.sharding.AbstractDevice(device_kind=card.limits.lowers_as, num_cores=card.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        return blocks(rows, tokens, tokens, heads, packed=True)


def _attention_loop(architecture: Architecture, batch: int, context: int, itemsize: int, *, fused: bool = False) -> int:
    """Bytes that attention's way back holds in XLA (pallas_kernels/attention/xla.py) while it makes the scores of a pair of
    blocks, beside queries, keys, values and the result's gradient: scores x and dp in float32, and the weights p and ds that
    products take; the sum dq in float32, dk and dv of the block in float32 and, where there are several, of all; and the
    block's dq, queries and result's gradient, keys and values. fused: x and dp are made inside of what makes p and ds."""
    found = []
    for kind in set(architecture.kinds):
        a = architecture.attention(kind)
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        P, C = dataclasses.astuple(_blocks(batch, context, N))
        several, T = context > C, -(-context // P) * P
        scores = batch * N * P * C * ((0 if fused else 4 + 4) + 2 * itemsize)
        sums = 4 * batch * H * (N * T + 2 * K * C) + (2 * batch * K * context * H * itemsize if several else 0)
        block = batch * H * (N * P * (4 + 2 * itemsize) + (2 * K * C * itemsize if several else 0))
        found.append(scores + sums + block)
    return max(found)


class _Waits(NamedTuple):
    """What a layer's way back keeps for adapters' gradients alone: whether any is beside a matrix that takes what attention made;
    beside how many of those that make the feed-forward block's halves; beside the one that takes them."""

    attended: bool
    halves: int
    last: bool


def _waits(architecture: Architecture, task: Task) -> _Waits:
    names = set(targets(architecture, task.options.targets))
    asked = {n.rpartition(".")[2]: s for n, s in architecture.specs().items() if n in names and n.startswith("layers.")}
    takes = [set(s.axes[s.out :]) for s in asked.values()]
    halves = sum("mlp" in s.axes[: s.out] for s in asked.values())
    return _Waits(any("heads" in t for t in takes), halves, any("mlp" in t for t in takes))


def _zeros_before(architecture: Architecture, itemsize: int, *, batch: int, context: int, streamed: int) -> int:
    """Bytes of the zeros that the sums of attention's way back in XLA begin with, where they are made with its queries, long
    before: of all queries, keys and values where keys come in several blocks; of one block of keys and values, and where layers
    are written out of each layer's."""
    s = _sizes(architecture)
    rows, several = batch * context, _blocks(batch, context, s.heads).keys < context
    if several:
        return rows * (4 * s.NH + 2 * itemsize * s.KH)
    return rows * 2 * 4 * s.KH * (1 if streamed else architecture.num_layers - 1)


def _xla_back(
    architecture: Architecture, plan: Plan, task: Task, itemsize: int, *, batch: int, context: int, streamed: int
) -> int:
    """Bytes of a layer's way back for adapters in 16 bits while attention goes back in XLA, on a card from sm_80 on: x, its two
    norms, the gradient that came in, o's result and its gradient, queries, keys, values, what attention made and its
    gradient; attention's loop; of a scan the matrices that made queries, keys and values, and two of the feed-forward block's
    gradients, which adapters wait for. (XLA's order leaves none to four of these there: two in a scan, none where layers
    are written out, in most that were compiled.)"""
    s, waits = _sizes(architecture), _waits(architecture, task)
    loop = _attention_loop(architecture, batch, context, itemsize)
    each = 4 * s.D + 2 * s.NH + 2 * s.KH
    if not streamed:
        zeros = _zeros_before(architecture, itemsize, batch=batch, context=context, streamed=0)
        return batch * context * itemsize * each + loop + zeros
    each += s.D + s.D * (waits.halves > 0) + s.NH * waits.attended + s.F * min(2, waits.halves)
    return batch * context * itemsize * each + loop + s.attending * itemsize


def _attention_back(architecture: Architecture, task: Task) -> int:
    """Numbers a token of a streamed layer's way back for adapters in 16 bits while attention goes back in a kernel, where the
    feed-forward block has no gate (where it has one, more stands while that goes back): queries, keys, values, what
    attention made, and the gradients of each; x, its two norms, o's result, the gradients that came in and of each of
    these; and what the block's adapters wait for."""
    s, waits = _sizes(architecture), _waits(architecture, task)
    return 8 * s.D + 4 * s.NH + 4 * s.KH + (waits.halves + waits.last) * s.F


def _wide_back(architecture: Architecture, plan: Plan, task: Task, *, batch: int, context: int, streamed: int) -> int:
    """Bytes of a layer's way back for adapters, in float32, where XLA makes nothing inside a product (below sm_80), at the one of
    two moments when most stands. In both are x and its two norms, the gradient that came in, queries, keys, values and what
    attention made of them.

        halves    the block's two halves and the gradient of what they make, and of these in one kernel the gradients of both and
                  what they make; what attention made a second time, in blocks; all matrices but the last, in float32
        attends   attention's loop and its result's gradient; the two gradients, which adapters wait for; the matrices that
                  made queries, keys and values

    What no adapter waits for is not there. A resident matrix that is float32 is there anyway. The zeros that attention's
    sums begin with are made before the halves where layers are written out, or keys come in several blocks."""
    s, waits = _sizes(architecture), _waits(architecture, task)
    rows = 4 * batch * context
    made = 4 if streamed or plan.dtype != "float32" else 0
    several = _blocks(batch, context, s.heads).keys < context
    standing = rows * ((3 + (waits.halves > 0)) * s.D + (1 + waits.attended) * s.NH + 2 * s.KH)
    standing += rows * s.D if plan.remat == "offload" else 0  # and not among what is kept
    zeros = rows * (s.NH * (several or not streamed) + 2 * s.KH * (not streamed))
    halves = standing + rows * ((5 + waits.last) * s.F + s.NH) + zeros + made * s.early
    attends = standing + rows * (min(2, waits.halves) * s.F + s.NH) + made * s.attending
    return max(halves, attends + _attention_loop(architecture, batch, context, 4))


def _not_asked_for(architecture: Architecture, task: Task, each: int, *, streamed: bool) -> int:
    """Bytes of a feed-forward block, of `layer_activations`, that no adapter's gradient asks for: what its last matrix takes, and
    beside it, where layers are scanned, one of the halves that this is made of. each: of a number of all tokens."""
    specs, names = architecture.specs(), set(targets(architecture, task.options.targets))
    wide = {n: s for n, s in specs.items() if n.startswith("layers.") and s.out is not None and "mlp" in s.axes}
    last = {n for n, s in wide.items() if "mlp" in s.axes[s.out :]}
    if names >= wide.keys():
        return 0
    F = max(s.shape[s.axes.index("mlp")] for s in wide.values())
    both = streamed and not last & names and not names >= wide.keys() - last and len(wide) > 2 * len(last)
    return each * F * (2 if both else 1)


def largest_turn(
    architecture: Architecture, plan: Plan, task: Task, *, batch: int, context: int
) -> tuple[sampled.Turn, Need]:
    """Where layers are trained in turn: the turn that needs most of the device, and what."""
    of, steps = trained(task.train).turn, range(architecture.num_layers + 2)
    turns = {(t.outer, t.slots): t for t in (of(task.options, architecture, 0, step) for step in steps)}
    found = ((t, _need_in(architecture, plan, task, t, batch=batch, context=context)) for t in turns.values())
    return max(found, key=lambda f: f[1].device)


def _need_in(
    architecture: Architecture, plan: Plan, task: Task, turn: sampled.Turn, *, batch: int, context: int
) -> Need:
    """What a step of this turn needs (sampled.py)."""
    tiers, each, M = tier_bytes(architecture, plan), layer_bytes(architecture, plan), turn.slots
    specs, kind = architecture.outer()[1], trained(task.train)
    stored, dtype = jnp.dtype(plan.dtype).itemsize, jnp.dtype(task.compute or plan.dtype).itemsize
    elements = {n: math.prod(s.shape) for n, s in specs.items()}
    layer, rows = max(each) // stored, task.accumulate * batch * context  # elements, and tokens whose x stands
    own = sum(elements[n] for n in turn.outer)  # of what is trained outside
    of_head = sum(elements[n] for n in turn.outer if n in whole.head_names(specs))
    # stands in the plan's dtype too, but where the trained tree has it in float32
    outer = stored * (sum(elements.values()) - (own if not kind.KEPT or stored == 4 else 0))
    trained_now = 4 * (M * layer + own)
    entering = rows * width(architecture) * dtype
    offload = entering * architecture.num_layers if plan.remat == "offload" else 0
    kept = 0 if offload else architecture.num_layers * entering
    saved = 2 * (M + 1) * entering if M else 0
    one = layer_activations(architecture, batch * context, dtype, batch * task.tile if 0 < task.tile < context else 0)
    streaming = streamed_bytes(architecture, plan)
    # what the halves make is asked for by no gradient where only x's is made
    s, passing, again = _sizes(architecture), one.within, one.narrow
    passing -= 0 if 0 < task.tile < context or task.accumulate > 1 else batch * context * s.F * dtype
    # a gradient to which no other is added stays in the arithmetic's dtype until it is used
    # but that of a head that is the embedding, which is added to the embedding's own
    tied = bool(set(turn.outer) & set(whole.head_names(specs)) & set(sampled.entering(architecture)))
    alone = loss_pieces(architecture, task, task.accumulate * batch, context) == 1 and not tied
    of_head *= dtype if alone else 4
    of_layers = M * layer * (dtype if M == 1 and task.accumulate == 1 else 4)
    gradients = of_layers + 4 * own
    # a slot's weights, and their gradient where it is added to others
    cast = (2 if M > 1 or task.accumulate > 1 else 1) * layer * dtype if M and dtype < 4 else 0
    loss = loss_activations(architecture, task, task.accumulate * batch, context, dtype)
    waiting_head = of_head
    if dtype == 4 and not 0 < task.tile < context:
        # of float32 no order is asked for (`weights.base.einsum`): a layer's way back has all that it takes there, beside its
        # weights rounded as they are stored and the gradient of one, or attention's with attention's loop, whose products make
        # scores themselves; and that of the head is made last, of what it takes
        numbers = 6 * s.D + 3 * s.NH + 2 * s.KH + 3 * s.F
        rounded = stored if M and stored < 4 else 0
        loop = _attention_loop(architecture, batch, context, 4, fused=True) + s.attending * rounded
        again, cast = 4 * batch * context * numbers + max(4 * s.largest + layer * rounded, loop), 0
        if of_head and alone:
            waiting_head = 4 * rows * (architecture.config.vocab_size + s.D)
    matrices = [s for k in set(architecture.kinds) for s in architecture.block(k)[1].values() if s.out is not None]
    how = find_optimizer(task.optimizer.name)
    changing = [how.temporaries((M, *s.shape), Matrix(1, s.out or 1)) for s in matrices if M]
    # of all together, beside the weights as they will be stored
    update = (
        sum(changing) // len(set(architecture.kinds)) + M * layer * stored if how.TOGETHER else max(changing, default=0)
    )
    moments = {
        "loss": kept + of_head + loss,
        "layers": kept + of_head + saved + streaming + passing,
        "weights": saved + waiting_head + of_layers + cast + again,
        "update": gradients + update,
    }
    unlike = len(set(architecture.kinds)) > 1
    if M and (unlike or s.halves == 1) and dtype == 2 and not 0 < task.tile < context:
        # what the gradient of a layer's last matrix asks for; a branch for each kind keeps all of its weights, too
        # and what a norm of attention's result widens
        late = s.halves == 2 and _adds_late(architecture.block(architecture.kinds[0])[1])
        numbers = (7 if late else 5) * s.D + late * s.D * 4 // dtype + 2 * s.NH + 2 * s.KH + (2 + s.halves) * s.F
        summed = of_layers if M > 1 or task.accumulate > 1 else 0
        last = (layer + unlike * s.largest) * dtype + batch * context * dtype * numbers
        moments["last"] = saved + waiting_head + summed + last
    outside, states = outer_states(architecture, task.optimizer), layer_states(architecture, plan, task.optimizer)
    optimizer, waiting = M * max(w for w, _ in states) + sum(outside[n] for n in turn.outer), 0
    if kind.KEPT:  # moments, and float32 values where those that the model runs with are narrower
        every = sum(elements.values()) + sum(each) // stored
        waiting = sum(outside.values()) + sum(w for w, _ in states) + (4 * every if stored < 4 else 0)
    standing = min(gradients, max(moments.values()))
    return Need(
        outer=outer, resident=tiers["device"], streaming=0, cache=0, activations=max(moments.values()) - standing,
        host_weights=tiers["host"], host_optimizer=waiting, host_kept=offload, disk=tiers["disk"], trained=trained_now,
        gradients=standing, optimizer=optimizer, kept=0,
    )  # fmt: skip


@functools.cache
def state_of(optimizer: Optimizer, shape: tuple[int, ...], matrix: Matrix | None = None) -> int:
    """Bytes of an optimizer's state for one float32 array, but for counters; matrix: how it is one inside a layer, or beside
    one."""
    if not optimizer.order:
        return 0
    how = optimizer.make(None, lambda tree: jax.tree.map(lambda _: matrix, tree))
    held = jax.eval_shape(how.init, jax.ShapeDtypeStruct(shape, jnp.float32))
    return size_of([x for x in jax.tree.leaves(held) if x.ndim])


def outer_states(architecture: Architecture, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the state of each parameter outside the layers."""
    return {n: state_of(optimizer, s.shape) for n, s in architecture.outer()[1].items()}


def _state_of_largest(architecture: Architecture, optimizer: Optimizer) -> int:
    """Bytes of the state of the layers' largest matrix."""
    matrices = (s for k in set(architecture.kinds) for s in architecture.block(k)[1].values() if s.out is not None)
    most = max(matrices, key=lambda s: math.prod(s.shape))
    return state_of(optimizer, most.shape, Matrix(0, most.out or 1))


def layer_states(architecture: Architecture, plan: Plan, optimizer: Optimizer) -> list[tuple[int, int]]:
    """Bytes of each layer's state, and of that what stands on the device with `Plan.stays`."""

    def of(i: int, kind: Any) -> tuple[int, int]:
        found = []
        for n, s in architecture.block(kind)[1].items():
            size = state_of(optimizer, s.shape, None if s.out is None else Matrix(0, s.out))
            found.append((size, size if all(jax.tree.leaves(plan.stays(f"layers.{i}.{n}", s))) else 0))
        whole, stays = zip(*found, strict=True)
        return sum(whole), sum(stays)

    first = {kind: of(i, kind) for i, kind in reversed(list(enumerate(architecture.kinds)))}
    return [first[kind] for kind in architecture.kinds]


def _changing(architecture: Architecture, plan: Plan, how: Optimizer, gradients: int) -> int:
    """Bytes that stand beside all gradients while arrays are changed, where all are on the device: of each of the banks' apart,
    or of all together, in the gradients' places."""
    kind, found = find_optimizer(how.name), [0]
    for part in plan.parts(architecture):
        lead = (part.repeats,) if part.stacked else ()
        for k in part.kinds:
            for spec in architecture.block(k)[1].values():
                matrix = None if spec.out is None else Matrix(len(lead), spec.out)
                found += [kind.temporaries((*lead, *spec.shape), matrix)] * (1 if part.stacked else part.repeats)
    if not kind.TOGETHER:
        return max(found)
    outer = (kind.temporaries(s.shape, None) for s in architecture.outer()[1].values())
    return max(0, sum(found) + sum(outer) - gradients)


class _Outside(NamedTuple):
    """Bytes of gradients of what is outside the layers, where layers come one at a time (layered.py). head: what the loss's way
    back gives, on the device; waits: of that in host memory while layers go back through; beside: on the device. here: those
    that stand after the layers; changing: what stands beside them while parameters are changed."""

    head: int
    waits: int
    beside: int
    here: int
    changing: int


def _outside(architecture: Architecture, task: Task) -> _Outside:
    shapes = {n: s.shape for n, s in architecture.outer()[1].items()}
    whole_shapes = {n: s.shape for n, s in whole_of(architecture).outer()[1].items()}
    size = {n: 4 * math.prod(shape) for n, shape in shapes.items()}
    states = outer_states(architecture, task.optimizer)
    blocks = {n: row_blocks(task.optimizer, whole_shapes[n], shape) for n, shape in shapes.items()}
    several = {n for n, count in blocks.items() if count > 1}
    head = whole.head_names(shapes)
    waits = sum(size[n] for n in head if n in several)
    beside = sum(size[n] for n in head) - waits
    enters = set(sampled.entering(whole_of(architecture)))
    # of one parameter that is changed whole the state that came and what it is changed to; then the next one's, which comes
    # meanwhile, and no gradient of the first; or a block of rows, its gradient and both states
    alone = sorted((states[n], size[n]) for n in shapes if n not in several)
    first, gradient = alone.pop() if alone else (0, 0)
    coming = alone.pop()[0] - gradient if alone else 0
    at_once = max(((size[n] + 2 * states[n]) // blocks[n] for n in several), default=0)
    here = sum(size[n] for n in enters | set(head) if n in enters or n not in several)
    return _Outside(beside + waits, waits, beside, here, max(2 * first + max(0, coming), at_once))


def whole_of(architecture: Architecture) -> Architecture:
    """With the shapes of all devices."""
    return getattr(architecture, "whole", architecture)


def head_bytes(architecture: Architecture) -> int:
    """Of the gradient of what the head reads, float32."""
    outer = architecture.outer()[1]
    return 4 * sum(math.prod(outer[n].shape) for n in whole.head_names(outer))


def adapter_bytes(architecture: Architecture, task: Task) -> int:
    """Bytes of what is trained beside frozen matrices, float32."""
    return sum(4 * math.prod(shape) for shape, _ in _adapters(architecture, task))


def adapter_states(architecture: Architecture, task: Task) -> int:
    """Bytes of an optimizer's state for them."""
    return sum(state_of(task.optimizer, shape, how) for shape, how in _adapters(architecture, task))


def _adapters(architecture: Architecture, task: Task) -> list[tuple[tuple[int, ...], Matrix | None]]:
    """The shape of each, and how it is a matrix."""
    specs, found = architecture.specs(), []
    for name in targets(architecture, task.options.targets):
        spec = specs[name]
        assert spec.out is not None
        ins, outs = spec.shape[spec.out :], spec.shape[: spec.out]
        found += [((task.options.rank, *ins), Matrix(0, 1)), ((*outs, task.options.rank), Matrix(0, len(outs)))]
        if task.train == "dora":
            found += [(outs, None)] * 2
    return found


class OneLayer(NamedTuple):
    """Bytes of one layer's activations. within: while it is gone back through; dots: what its matrices gave, but for the
    last, which nothing on the way back asks for; between: what else a way back asks for; narrow: while it is gone back
    through for its weights alone."""

    within: int
    dots: int
    between: int
    narrow: int


def layer_activations(
    architecture: Architecture, rows: int, itemsize: int, tile: int = 0, *, layered: bool = False, several: bool = False
) -> OneLayer:
    """Of the widest layer, for so many tokens; attention keeps no scores. tile: tokens whose feed-forward block stands at a
    time (0: all). Then attention's part is the most: x, its norm, what comes in and goes out of both, queries, keys, values
    and what attention makes, and the gradient of each; `layered`, where layers' own weights are trained one layer at a time, half
    a number of x's width more, and of keys and values nothing (read from compiled programs). several: rows, which are cut into
    tiles in copies of x and of what attention made; these stand beside both, and x is no slice of what is kept."""
    found = []
    for kind in set(architecture.kinds):
        specs = architecture.block(kind)[1]
        dims = {a: n for s in specs.values() for a, n in zip(s.axes, s.shape, strict=True)}
        D, F = dims["embed"], dims["mlp"]
        outs = sum(math.prod(s.shape[: s.out]) for s in specs.values() if s.out is not None)
        # queries and keys as they were before their norms, where they have some
        normed = sum(math.prod(specs[n].shape[: specs[n].out]) for n in ("q", "k") if f"{n}_norm" in specs)
        halves = sum(s.out is not None and "mlp" in s.axes[: s.out] for s in specs.values())  # 1 where there is no gate
        parts = [rows * itemsize * n for n in (4 * D + outs + normed + halves * F, outs - D, 3 * D + F, outs + 2 * D)]
        if tile:
            attends = [s for s in specs.values() if s.out is not None and "mlp" not in s.axes]
            made = sum(math.prod(s.shape[: s.out]) for s in attends) - D  # queries, keys, values
            heads = max(math.prod(s.shape[s.out :]) for s in attends if s.out and "heads" in s.axes[s.out :])
            block = tile * itemsize * (outs - D - made + halves * F)
            attending = rows * itemsize * (13 * D // 2 + 4 * heads if layered else 5 * D + 2 * (made + heads))
            copied = 2 * D + heads + made if several and not layered else 0
            parts[0] = max(attending, rows * itemsize * (4 * D + heads + copied) + block)
            parts[3] = parts[0]
        found.append(tuple(parts))
    return OneLayer(*max(found))


def loss_pieces(architecture: Architecture, task: Task, batch: int, context: int) -> int:
    """In how many pieces the loss is made."""
    most = max(1, whole.LOGITS // (4 * batch * architecture.config.vocab_size))
    return -(-context // (task.loss_chunk or most))


def loss_activations(architecture: Architecture, task: Task, batch: int, context: int, itemsize: int) -> int:
    """Bytes while the loss is made: some tokens' logits in float32, their gradient, and the gradient of what comes in."""
    V, D = architecture.config.vocab_size, width(architecture)
    each = 4 + itemsize  # float32 logits, and their gradient as the head's way back takes it
    chunk = task.loss_chunk or max(1, min(context, whole.LOGITS // (4 * batch * V)))
    return batch * min(chunk, context) * V * each + 2 * batch * context * D * itemsize


def remats(task: Task) -> tuple[str, ...]:
    """What may be kept of its layers, from the most on: of those that run again and of tiles only what comes in; of what goes
    forward alone nothing."""
    if not task.optimizer.order:
        return ("full",)
    return tiles.REMATS if task.sampled or task.tile else ("none", "dots", "full", "offload")


def same_targets(architecture: Architecture, plan: Plan, task: Task) -> bool:
    """Whether adapters stand beside the same matrices in all layers of a stack, as a step asks."""
    if not task.beside or not any(p.startswith("layers.") for p in task.options.targets):
        return True
    try:
        each_target(architecture, plan, task.options.targets, lambda *_: None)
    except ValueError:
        return False
    return True


def scans(architecture: Architecture, plan: Plan, task: Task) -> bool:
    """Whether adapters' steps, and those without a gradient, go through resident layers in a loop on a GPU, where nobody says: of
    adapters where all layers are of one kind, one format and the same targets. Written out, a program of 32 layers takes some
    five times as long to compile (scripts/LOG.md), and under remat 'none' keeps more. (A loop over kinds that alternate holds
    what is frozen of a whole turn; of DoRA and attention 'xla', one that keeps what matrices gave holds more than is counted.)"""
    if plan.mesh:
        return False
    if not task.beside:
        return not task.optimizer.order
    if plan.remat in ("none", "dots") and (task.train == "dora" or plan.attention == "xla"):
        return False
    made = dataclasses.replace(plan, home="device", form="scan", resident=0, kept=0, resident_form="")
    parts = made.parts(architecture)
    return [len(p.kinds) for p in parts] == [1] and parts[0].form == "scan" and same_targets(architecture, made, task)


def variants(
    architecture: Architecture,
    plan: Plan,
    task: Task,
    *,
    memory: int,
    ram: int | None,
    batch: int,
    context: int,
    ahead: bool = True,
    wide: bool = False,
    keeps_gelu: bool = False,
    scanned: Sequence[str] = tuple(REMAT),
) -> list[Variant]:
    """A plan with its layers in other homes and more or less kept for the way back, from the nearest to the farthest. ahead:
    whether streamed layers are listed as fetched one ahead too, before the plain scan, where a step can run that. wide,
    keeps_gelu: see `need`. scanned: under which remats resident layers go through a loop where they can (`scans`); all on a
    GPU."""
    found = []

    def of(**given: Any) -> Variant:
        made = dataclasses.replace(
            plan, **({"form": "", "resident": 0, "kept": 0, "resident_form": "", "chunk": 0} | given)
        )
        n = need(architecture, made, task, batch=batch, context=context, wide=wide, keeps_gelu=keeps_gelu)
        refused = ""
        if made.remat == "dots" and any(
            home(p.home).TIER != "device" and p.form == "scan" and len(p.kinds) > 1 for p in made.parts(architecture)
        ):
            refused = "unlike layers that alternate are fetched again in copies under remat 'full' and 'offload' alone"
        elif not same_targets(architecture, made, task):
            refused = "layers that are scanned have the same targets"
        if refused:
            return Variant(made, n, refused, barred=True)
        if n.device > memory:
            refused = f"{show_bytes(n.device - memory)} over on the device"
        elif ram is not None and n.host > ram:
            refused = f"{show_bytes(n.host - ram)} over in host memory"
        return Variant(made, n, refused)

    L, known = architecture.num_layers, meshed.REMATS if plan.mesh else remats(task)
    nearest, farther = [r for r in known if r != "offload"], [r for r in known if r != "none"]
    # unrolled, the noise of every layer's parameters would be kernels of its own
    listed = {"form": "scan"} if not task.optimizer.order or not meshed.listed(plan) else {}
    for remat in (plan.remat,) if plan.remat else nearest:
        loop = remat in scanned and scans(architecture, dataclasses.replace(plan, remat=remat), task)
        found.append(of(home="device", remat=remat, **({"form": "scan"} if loop else listed)))
    for remat in (plan.remat,) if plan.remat else farther:
        loop = remat in scanned and scans(architecture, dataclasses.replace(plan, remat=remat), task)
        streamed = dataclasses.replace(plan, home="host", form="", resident=0, kept=0, resident_form="")
        again = task.sampled or task.layered(streamed)
        if again and remat in ("none", "dots"):
            continue  # each layer is run again anyway
        forms = ("ahead", "") if ahead and task.runs_ahead(remat) else ("",)
        near = {"resident_form": "scan"} if loop else {}
        for form in forms if L > 1 and not plan.mesh else ():
            low, high = 1, L - 1
            split: dict[str, Any] = {"home": "split", "remat": remat, "form": form}
            while low < high:
                middle = (low + high + 1) // 2
                fits = of(resident=middle, **split, **near).need.device <= memory
                low, high = (middle, high) if fits else (low, middle - 1)
            found.append(of(resident=low, **split, **(near if low > 1 else {})))
        found += [of(home="host", remat=remat, form=form) for form in forms]
    # too few streamed layers run otherwise, whatever is said
    kept = [v for v in found if v.plan.form != "ahead" or "ahead" in {p.form for p in v.plan.parts(architecture)}]
    return kept


def seconds(
    architecture: Architecture, plan: Plan, task: Task, card: Any, *, batch: int, context: int
) -> dict[str, float]:
    """What a step takes at least of each resource, all parts together."""
    if plan.mesh:
        return meshed.seconds(architecture, plan, task, card, batch=batch, context=context, alone=seconds)
    tokens = task.accumulate * batch * context
    elements = sum(math.prod(s.shape) for s in architecture.specs().values() if s.out is not None)
    if not task.optimizer.order:
        return _seconds_of_losses(architecture, plan, task, card, elements=elements, tokens=tokens)
    if task.sampled:
        return _seconds_of_turns(architecture, plan, task, card, elements=elements, tokens=tokens)
    streamed = _streamed_layers(architecture, plan)
    # of what matrices gave nothing is made again where it is kept; a streamed layer keeps it under 'dots' alone
    again = {"dots": 0, "none": streamed / architecture.num_layers}.get(plan.remat, 1)
    passes = 2 + again + (1 if task.train == "all" else 0)
    tiers, tunes = tier_bytes(architecture, plan), task.train == "all"
    times = {
        "matmuls": 2 * passes * elements * tokens / card.tensor,
        "device memory": passes
        * (sum(tiers.values()))
        * (1 if task.layered(plan) else task.accumulate)
        / card.bandwidth,
    }
    if tiers["host"]:
        if tunes:  # weights twice to the device (with clipping once more), and back; the optimizer's state both ways
            moved = (3 + (1 if task.clip else 0)) * tiers["host"]
            moved += 2 * (need(architecture, plan, task, batch=batch, context=context).host - tiers["host"])
        else:
            moved = 2 * tiers["host"] * task.accumulate
        times["host link"] = moved / card.link
    return times


def _seconds_of_turns(
    architecture: Architecture, plan: Plan, task: Task, card: Any, *, elements: int, tokens: int
) -> dict[str, float]:
    """Of a step that trains some layers: each is read forward, run again and gone back through, and the trained ones run
    once more and gone back through for their weights. Moments that wait in host memory come and go."""
    tiers, M, L = tier_bytes(architecture, plan), task.options.layers, architecture.num_layers
    passes, stored = 3 + 2 * M / L, jnp.dtype(plan.dtype).itemsize
    moved = 2.0 * tiers["host"]
    if trained(task.train).KEPT:
        largest = max(w for w, _ in layer_states(architecture, plan, task.optimizer))
        moved += 2 * M * (largest + (4 * max(layer_bytes(architecture, plan)) // stored if stored < 4 else 0))
    times = {
        "matmuls": 2 * passes * elements * tokens / card.tensor,
        "device memory": passes * sum(tiers.values()) / card.bandwidth,
    }
    return times | ({"host link": moved / card.link} if moved else {})


def _seconds_of_losses(
    architecture: Architecture, plan: Plan, task: Task, card: Any, *, elements: int, tokens: int
) -> dict[str, float]:
    """Of a step that goes forward twice: each layer is brought once, and taken back where it is trained itself."""
    tiers = tier_bytes(architecture, plan)
    trips, reads = (1, 2) if task.beside else (2, 8)  # read and changed; twice read, moved, and the moved one read
    times = {
        "matmuls": 2 * 2 * elements * tokens / card.tensor,
        "device memory": reads * sum(tiers.values()) / card.bandwidth,
    }
    return times | ({"host link": trips * tiers["host"] / card.link} if tiers["host"] else {})
