"""From a folder to a Model: read config.json, choose a plan, check everything, then read one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoints.peft import read_adapter
from jaxengine import orders, placement
from jaxengine.architecture import Architecture, architecture
from jaxengine.engine import bucket
from jaxengine.export import one_dtype
from jaxengine.homes.base import check_platform
from jaxengine.homes.base import home as find_home
from jaxengine.machine import POOL, POOL_SHARE, SHARE, available_ram, pool_limit_bytes, pool_share
from jaxengine.model import Model
from jaxengine.packing import Place, files_of
from jaxengine.paths import cache_folder
from jaxengine.plan import (
    Plan,
    check_attention,
    check_formats,
    check_mesh,
    check_rules,
    check_stay,
    choose,
    parameter_bytes,
    parse_bytes,
    show_bytes,
    with_rules,
    with_table,
)
from jaxengine.planning import check_rows, streamed_form
from jaxengine.proof import holds
from jaxengine.selftest import check_streaming
from jaxengine.sources import Origin, Source, check_numbers, open_source, read_config
from jaxengine.text import Tokenizer
from pallas_kernels.cards import CARDS
from pallas_kernels.dispatch import Refused, below_ampere
from sharding.mesh import make_mesh, processes

log = logging.getLogger("jaxengine")


def load(
    folder: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    memory: str | int | None = None,
    batch: int | None = None,
    context: int | None = None,
    weights: str | None = None,
    weight_rules: Mapping[str, str] | Sequence[str | tuple[str, str]] | None = None,
    dtype: str | None = None,
    mesh: str | Mesh | None = None,
    sharding: str | None = None,
    home: str | None = None,
    form: str | None = None,
    resident: int | None = None,
    kept: int | None = None,
    ram: str | int | None = None,
    stay: Sequence[str] | None = None,
    disk: str | os.PathLike[str] | None = None,
    kv: str | None = None,
    kv_layout: str | None = None,
    attention: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Load a Hugging Face checkpoint folder, one that `Model.save` wrote, or a GGUF file, ready to generate.

    plan: every choice at once; the other arguments go before its fields. memory: a budget of device memory such as
    '16GB' (of each device of a mesh), which chooses the home for `batch` rows (1) of up to `context` tokens each (2048, or
    what the model can at most); a call that would need more is refused. On a GPU what it chooses is compiled first, and
    taken only if XLA's own bytes are within it (proof.py); of an adapter beside it the bytes are set aside. ram: host memory
    for layers that do not fit there (what is free, if not given); what fits neither is read from disk in every pass. disk:
    the folder for such layers, packed once (~/.cache/jaxengine/layers); without it they are read from the checkpoint's own
    safetensors where these have them as the plan does: dense, in its dtype.
    weights: the format of matrices ('dense', 'int8', ...); weight_rules: of
    some by the pattern of their names, {'lm_head': 'int8', 'layers.*.down': 'dense'}, the first that matches, before the
    plan's own. dtype: 'float32', 'bfloat16' or 'float16' (the checkpoint's own if not given). mesh: e.g. 'data=2,tensor=4'
    over all devices, or a jax Mesh; sharding: the table of rules (that of the mesh's axes, if not given). home: 'device',
    'host', 'split', of which the first `resident` layers are on the device, or 'disk', of which the first `resident` are
    there and the next `kept` in host memory; form: 'unrolled', 'scan', 'ahead' or 'python'. stay: name patterns of
    parameters ('k', 'layers.*.v') that stand on the device though their layers are streamed from host memory, as
    vectors always do. kv: the cache's codec ('raw', 'int8', 'int4'); kv_layout: the layout of sliding-window layers
    ('window', 'full'). attention: the implementation by name ('auto', 'xla', 'triton', 'cudnn', 'mosaic_gpu',
    'tokamax', 'reference'). adapter: a PEFT folder, whose LoRA or DoRA stands beside the weights, in whatever format
    and home they are but on disk. progress: called with (name, bytes
    read, bytes in all), and for layers that are packed first in the same way, from zero.

    Of the plan that an orbax folder was saved with, only what its bytes are decides here too, where no plan is given:
    weights, weight_rules and dtype. Home, form, cache, sharding and mesh were that machine's; here they are the defaults
    or what is given. A head that config.json ties to the embedding, and that differs from it in the files, is loaded
    untied, as transformers does.

    Raises ConfigError for a config that asks for what is not done, CheckpointError for missing, unexpected, misshapen,
    truncated or corrupt tensors, ValueError for a plan that cannot be or whose patterns name what is not there; all
    before anything is allocated.
    """
    folder = Path(folder)
    raw = read_config(folder)
    with open_source(folder, architecture(raw)) as source:
        arch = source.architecture
        named = mesh if mesh is None or isinstance(mesh, str) else ",".join(f"{k}={v}" for k, v in mesh.shape.items())
        given = {
            "weights": weights, "dtype": dtype, "mesh": named, "sharding": sharding, "home": home, "form": form,
            "resident": resident, "kept": kept, "stay": stay if stay is None or isinstance(stay, str) else tuple(stay),
            "kv_codec": kv, "kv_layout": kv_layout, "attention": attention,
        }  # fmt: skip
        if home not in (None, "split"):
            given["resident_form"] = ""
        start = plan or _as_stored(source.plan)
        chosen = dataclasses.replace(start, **{k: v for k, v in given.items() if v is not None})
        if not chosen.dtype:
            chosen = dataclasses.replace(chosen, dtype=one_dtype(arch, source.dtype, raw))
        if weight_rules is not None:
            chosen = with_rules(arch, chosen, weight_rules)
        over = mesh if isinstance(mesh, Mesh) else make_mesh(chosen.mesh or None)
        chosen = with_table(_counted(chosen, over), mesh=named, sharding=sharding)
        check_mesh(arch, chosen)
        chosen = orders.over_mesh(arch, chosen, over)
        check_stay(arch, chosen)
        if chosen.stay and memory is None and find_home(chosen.home).TIER == "device":
            raise ValueError(
                f"stay is {chosen.stay!r} and home is {chosen.home!r}, where every layer stands on the device: say home='host',"
                f" home='split' with resident=, or memory="
            )
        begun = chosen
        _check_attention(arch, chosen)
        check_rules(arch, chosen.weight_rules)
        check_formats(arch, orders.as_chosen(arch, source.plan, chosen), chosen)
        check_numbers(source, chosen)
        beside = 0 if adapter is None else _adapter_bytes(arch, adapter)
        budget = None if memory is None else parse_bytes(memory) - beside
        if memory is not None and budget is not None:
            if budget <= 0:
                raise ValueError(
                    f"memory is {memory!r}, and the adapter alone takes {show_bytes(beside)}: give more than that, or merge"
                    f" the adapter into the model once and load that"
                )
            if any(x is not None for x in (home, form, resident, kept)):
                raise ValueError(
                    f"memory={memory!r} chooses the home, its form and how many layers are resident or kept, and one of"
                    f" these was given too: give one or the other"
                )
            for what, size in (("batch", batch), ("context", context)):
                if size is not None and size < 1:
                    raise ValueError(f"{what} is {size}; it is at least 1")
            longest = min(2048, arch.config.max_position_embeddings) if context is None else context
            if ram is None and processes(over) > 1:
                raise ValueError(
                    f"memory is {memory!r}, and the mesh {chosen.mesh!r} is of {processes(over)} processes, of which each may"
                    f" count other free host memory and plan otherwise: say ram= too, what there is for all of them"
                )
            room = _room(budget, over.size) if ram is None else parse_bytes(ram, "ram")
            rows, device = 1 if batch is None else batch, over.devices.flat[0]
            check_rows(arch, rows, longest)
            card = next((c for c in CARDS.values() if c.kind == device.device_kind), None)
            streamed = "" if card is None else streamed_form(arch, chosen, card, rows)
            check_pool(device, parse_bytes(memory))
            padded = bucket(longest, least=64)  # as a call pads it
            chosen = choose(
                arch, chosen, memory if not beside else budget, batch=rows, length=longest, ram=room, form=streamed,
                wide=below_ampere(),
                compiled=holds(arch, over, batch=rows, length=padded, memory=budget, folder=cache_folder()),
            )  # fmt: skip
        elif context is not None or batch is not None or ram is not None:
            raise ValueError(
                "batch, context and ram say what memory= is to hold and where the rest may stand, and no memory is given;"
                " generate takes any number of prompts of any length without them"
            )
        if disk is not None and memory is None and find_home(chosen.home).TIER != "disk":
            raise ValueError(
                f"disk is {os.fspath(disk)!r} and home {chosen.home!r}; only home='disk' reads layers from there"
            )
        if adapter is not None and any(find_home(part.home).TIER == "disk" for part in chosen.parts(arch)):
            raise ValueError(
                f"adapter is {os.fspath(adapter)!r} and home {chosen.home!r}: layers read from disk have nothing beside them;"
                f" say home='host' or 'split', or merge the adapter into the model once"
            )
        if any(find_home(part.home).TIER == "disk" for part in chosen.parts(arch)) and processes(over) > 1:
            raise ValueError(
                f"home is {chosen.home!r}, and the mesh {chosen.mesh!r} is of {processes(over)} processes: layers are read"
                f" from disk by one; say home='host' or 'split', or take the devices of one process"
            )
        if chosen.dtype == "bfloat16" and below_ampere():
            log.warning("this GPU multiplies no bfloat16: XLA widens each matrix to float32 first. Say dtype='float16'")
        if chosen.chunk != begun.chunk:
            _check_attention(arch, chosen)
        _check_host(arch, chosen, over)
        done, total = 0, source.nbytes - _left_on_disk(arch, chosen, source)

        def track(name: str, size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(name, done, total)

        place = Place(
            cache_folder() / "layers" if disk is None else Path(disk).expanduser(),
            files_of(folder),
            progress or _untracked,
            folder,
            source.where if disk is None else _nowhere,
        )
        params = placement.place(arch, chosen, over, source.read, track, place)
        origin = source.origin(raw)
    model = Model(arch, chosen, over, params, origin, tokenizer(folder), budget)
    if adapter is None:
        return model
    from jaxengine.finetune.run import with_adapter  # which loads models itself

    return with_adapter(model, adapter)


def check_pool(device: Any, memory: int) -> None:
    """Refuse a budget that XLA's pool of this device's memory does not hold."""
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    if limit is None or memory <= limit:
        return
    share = -(-100 * memory * pool_share() / limit // 1) / 100
    more = f"set {SHARE}={share:.2f} in the environment before jax starts (the jaxengine command does), or "
    raise ValueError(
        f"memory is {show_bytes(memory)}, and XLA's pool of this device's memory ends at {show_bytes(limit)}:"
        f" {more if share < 1 else ''}give {limit // 10**7 / 100:g}GB or less"
    )


def _nowhere(name: str) -> None:
    """The layers of a folder that was named are packed there, wherever else they are."""


def _counted(plan: Plan, mesh: Mesh) -> Plan:
    """The plan with the number of devices in the place of -1."""
    if "-1" not in plan.mesh:
        return plan
    return dataclasses.replace(plan, mesh=",".join(f"{k}={v}" for k, v in mesh.shape.items()))


def _adapter_bytes(arch: Architecture, folder: str | os.PathLike[str]) -> int:
    """Of an adapter on the device: float32, and for DoRA a second number a row. Refuses, before the model is read, one that
    does not fit it."""
    adapters, _ = read_adapter(folder, arch.name_table(), arch.params(), arch.num_layers)
    rows = (0 if a.magnitude is None else 2 * a.magnitude.size for a in adapters.values())
    return 4 * sum(a.a.size + a.b.size + r for a, r in zip(adapters.values(), rows, strict=True))


def _room(memory: int, devices: int = 1) -> int:
    """Bytes of host memory for layers where nobody says how many: four fifths of what is free, at most XLA's pools of
    pinned memory on GPUs, of which each device has one, and on CPU without what each device is given of it."""
    room = int(POOL_SHARE * available_ram())
    if jax.devices()[0].platform == "gpu":
        return min(room, devices * pool_limit_bytes())
    return max(room - devices * memory, 0)


def _check_host(arch: Architecture, plan: Plan, mesh: Mesh) -> None:
    """Refuse more pinned memory than XLA will give, a jax that streams wrongly on GPUs, and a card on which streaming goes
    wrong; say where memory lacks."""
    for where in {part.home for part in plan.parts(arch)}:
        check_platform(where, mesh.devices.flat[0].platform)
    leaves, device = jax.tree.leaves(placement.abstract(arch, plan, mesh)), mesh.devices.flat[0]
    pinned = sum(  # each device has a pool of its own
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in leaves
        if x.sharding.memory_kind == "pinned_host"
    )
    if not pinned:
        return
    whole = pinned * len(mesh.local_devices)
    try:
        room = available_ram()
    except ValueError:  # a system that does not say
        room = whole
    if whole > room:
        log.warning(
            "home=%r keeps %s of layers in host memory, and %s are free: memory= leaves on disk what does not fit, and so"
            " does home='disk' with kept=", plan.home, show_bytes(whole), show_bytes(room),
        )  # fmt: skip
    if device.platform != "gpu":
        return
    if pinned > (limit := pool_limit_bytes()):
        raise ValueError(
            f"home={plan.home!r} keeps {show_bytes(pinned)} of layers in pinned host memory, and XLA's pool stops at"
            f" {show_bytes(limit)}: set {POOL}={-(-pinned * 5 // 4 // 2**30)} (GiB) in the environment before jax starts"
        )
    if pinned > pool_limit_bytes({}):
        log.info("%s: XLA's pool of pinned memory may grow to %s (%s)", show_bytes(pinned), show_bytes(limit), POOL)
    check_streaming(device, folder=cache_folder())


def _check_attention(arch: Architecture, plan: Plan) -> None:
    """Refuse an implementation of attention that serves nothing that the model can do. Weights in float32 can be fine-tuned
    in bfloat16, which more of them take than generation in float32."""
    try:
        check_attention(arch, plan)
    except Refused as e:
        if plan.dtype != "float32":
            raise
        try:
            check_attention(arch, plan, training=True, dtype="bfloat16")
        except Refused:
            raise e from None
        log.warning("attention=%r serves fine-tuning in bfloat16, and not generation: %s", plan.attention, e)


def _left_on_disk(arch: Architecture, plan: Plan, source: Source) -> int:
    """Bytes of the parameters that are not read into memory."""
    left = 0
    for part in plan.parts(arch):
        if find_home(part.home).TIER == "disk":
            for i in range(part.start, part.start + part.num_layers):
                for n, spec in arch.block(arch.kinds[i])[1].items():
                    name = f"layers.{i}.{n}"
                    stored = source.dtype(name)
                    left += (
                        math.prod(spec.shape) * stored.itemsize
                        if source.plan is None
                        else parameter_bytes(source.plan, name, spec)
                    )
    return left


def _untracked(name: str, done: int, total: int) -> None:
    """Nobody asked."""


def _as_stored(plan: Plan | None) -> Plan:
    """What the stored bytes decide of the plan they were stored with."""
    return Plan() if plan is None else Plan(dtype=plan.dtype, weights=plan.weights, weight_rules=plan.weight_rules)


def tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or that beside a GGUF file; None where there is none at all (a checkpoint of ids alone)."""
    folder = folder.parent if folder.is_file() else folder
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return Tokenizer.from_folder(folder)


def from_arrays(
    arch: Architecture, plan: Plan, arrays: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Model:
    """A Model of parameters that are in memory ({name: array}), e.g. freshly initialised or trained ones.

    config: the raw config.json fields, needed for `save`. Checks what `load` does of home and device: the version of jax,
    the pool of pinned memory, and that a card streams layers rightly.
    """
    if not plan.dtype:
        raise ValueError(
            "from_arrays: the plan names no dtype, and there is no checkpoint to take it from: Plan(dtype='float32')"
        )
    check_rules(arch, plan.weight_rules)
    check_stay(arch, plan)
    over = make_mesh(plan.mesh or None)
    plan = _counted(plan, over)
    check_mesh(arch, plan)
    plan = orders.over_mesh(arch, plan, over)
    _check_attention(arch, plan)
    _check_host(arch, plan, over)
    params = placement.place(arch, plan, over, lambda name: np.asarray(jax.device_get(arrays[name])))
    return Model(arch, plan, over, params, Origin(dict(config or {})), None)
