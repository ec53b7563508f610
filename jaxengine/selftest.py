"""Whether this device, under this compiler, reads layers in host memory from the right places.

XLA has put the slices of a host stack at wrong places before: a loop that goes backwards read its layers forwards
(openxla/xla#46231), without an error, and the gradients were those of other layers. So before layers are streamed on a
GPU for the first time, a few tiny ones are streamed through the walk that models use, forwards and backwards, and held
against the same layers on the device. What compiles the same programs was tested already: a marker file says so.

The layers are affine maps whose matrices are signed permutations, all different: x keeps its size, every number on the
way is a whole one below 256, exact in any matmul precision, so that the two must agree to the last bit, while no layer can
stand in for another. Three turns of one kind and three of two that alternate, in both streamed forms.

What it cannot tell: whether a copy that is right for a layer of a kilobyte is right for one of 400 MB. The program is the
same but for its sizes.

B batch, D model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints.errors import CheckpointError
from checkpoints.output import output_file
from jaxengine.homes.base import LEAST_JAX, Bank, home, place_in
from jaxengine.walk import walk
from pallas_kernels.aot import OPTIONS
from sharding.mesh import make_mesh

log = logging.getLogger("jaxengine")

B, D = 2, 16
RUNS = ((("a",), 3), (("a", "b"), 3))  # kinds in a row, and turns
HOME, FORMS = "host", ("scan", "ahead")

Layer = dict[str, np.ndarray]


def check_streaming(device: Any, *, folder: Path) -> None:
    """Stream a few layers on this device, forwards and backwards; RuntimeError where it gives what other layers would.

    On success a marker is left in `folder`, and while it is there this returns at once: it is of one jax and jaxlib, kind
    of device and XLA_FLAGS. A folder that cannot be written makes the test run every time.
    """
    what = _what(device)
    marker = folder / f"streaming-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if _marked(marker, what):
        return
    wanted = _run(device, "device", "scan")
    for form in FORMS:
        try:
            wrong = _difference(_run(device, HOME, form), wanted)
        except RuntimeError as error:  # what the compiler and the driver raise
            wrong = f"does not run: {error}"
        if wrong:
            raise RuntimeError(
                f"Streaming layers from host memory is wrong here: jaxlib {what['jaxlib']} on {what['card']}"
                f" ({what['platform']}), home={HOME!r}, form={form!r}: {wrong}. A model streamed like this would give other"
                f" numbers without an error. Use home='device', or another jax and jaxlib"
                f" ({'.'.join(map(str, LEAST_JAX))} or newer)"
            )
    try:
        with output_file(marker, overwrite=True) as path:
            path.write_text(json.dumps(what), encoding="utf-8")
    except (OSError, CheckpointError) as error:
        log.info("the self-test of streaming passed, and will run again: its marker cannot be kept (%s)", error)


def _what(device: Any) -> dict[str, str]:
    """What a compiled program depends on: the test need not be repeated while this stays."""
    return {
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "card": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "options": repr(sorted(OPTIONS.items())),
    }


def _marked(marker: Path, what: dict[str, str]) -> bool:
    try:
        return json.loads(marker.read_text(encoding="utf-8")) == what
    except (OSError, ValueError):
        return False


def _difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
    """The first of the results that are not equal, in words; empty: all are."""
    for name, right in wanted.items():
        if count := int((found[name] != right).sum()):
            return f"{name} differs from that of the same layers on the device, in {count} of {right.size} numbers"
    return ""


def _run(device: Any, where: str, form: str) -> dict[str, np.ndarray]:
    """Forward and gradient with the layers in this home and form: {what it is: numbers}."""
    x, seed, _ = _problem()
    options = dict(OPTIONS) if device.platform == "gpu" else None
    program = jax.jit(lambda *given: _results(*given), compiler_options=options)  # of this run, not of an earlier one
    given = (_banks(device, where, form), *jax.device_put((x, seed), _place(device)))
    (dbanks, dx), out = jax.device_get(program(*given))
    found = {"the forward pass": out}
    held = [layer_of(bank, i) for bank in dbanks for i in range(len(bank.kinds) * bank.repeats)]
    for i, layer in reversed(list(enumerate(held))):  # as a backward pass comes to them
        found |= {f"the gradient of layer {i}'s {name}": g for name, g in layer.items()}
    return found | {"the gradient of the input": dx}


def _results(banks: tuple[Bank, ...], x: jax.Array, seed: jax.Array) -> Any:
    def loss(banks: tuple[Bank, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing = tuple(((),) * len(b.kinds if b.stacked else b.weights) for b in banks)
        out, _ = walk(_body, x, banks, nothing)
        return (seed * out).sum(), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(banks, x)


def _body(kind: Any, weights: dict[str, jax.Array], x: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
    z = x @ weights["w"].T
    return (z + weights["b"] if kind == "a" else z - weights["b"]), state


@functools.cache
def _problem() -> tuple[np.ndarray, np.ndarray, tuple[Layer, ...]]:
    """x, the gradient of what comes out, and the layers in order."""
    rng = np.random.default_rng(0)

    def small(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape).astype(np.float32)

    def layer() -> Layer:
        signs = rng.choice(np.asarray([-1, 1], np.float32), (D, 1))
        return {"w": signs * np.eye(D, dtype=np.float32)[rng.permutation(D)], "b": small(1, D)}

    count = sum(len(kinds) * repeats for kinds, repeats in RUNS)
    return small(B, D), small(B, D), tuple(layer() for _ in range(count))


def _place(device: Any, memory: str | None = None) -> NamedSharding:
    return NamedSharding(make_mesh(None, devices=[device]), PartitionSpec(), memory_kind=memory)


def _banks(device: Any, where: str, form: str) -> tuple[Bank, ...]:
    """The layers in this home and form."""
    made, rest = [], _problem()[2]
    for kinds, repeats in RUNS:
        size = len(kinds) * repeats
        made.append(_bank(rest[:size], kinds, repeats, where, form, device))
        rest = rest[size:]
    return tuple(made)


def _bank(layers: Sequence[Layer], kinds: tuple[str, ...], repeats: int, where: str, form: str, device: Any) -> Bank:
    """The layers, in order, as a bank of this home and form."""
    groups: list[dict[str, list[Layer]]] = [{} for _ in (layers if form == "unrolled" else kinds)]
    for i, layer in enumerate(layers):
        turn, j = divmod(i, len(kinds))
        groups[i if form == "unrolled" else j].setdefault(place_in(form, repeats, j, turn)[0], []).append(layer)

    def held(name: str, group: list[Layer]) -> Layer:
        alone = form == "unrolled" or name == "one"
        return group[0] if alone else {n: np.stack([layer[n] for layer in group]) for n in group[0]}

    made = [{name: held(name, group) for name, group in one.items()} for one in groups]
    weights = tuple(one.get("", one) for one in made)
    return Bank(jax.device_put(weights, _place(device, home(where).MEMORY)), kinds, repeats, where, form)


def layer_of(bank: Bank, i: int) -> Layer:
    """Layer i out of a bank of numpy arrays."""
    turn, j = divmod(i, len(bank.kinds))
    name, at = place_in(bank.form, bank.repeats, j, turn)
    held = bank.weights[j if bank.stacked else i]
    held = held[name] if name else held
    return {n: x if at is None else x[at] for n, x in held.items()}
