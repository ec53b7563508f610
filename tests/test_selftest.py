"""The self-test of streaming: it passes here, sees every layer that is read from a wrong place, and runs once.

Its problem is worked out in whole numbers by numpy, and the faults are those of real compilers (openxla/xla#46231).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxengine import selftest
from jaxengine.selftest import RUNS, check_streaming
from jaxengine.walk import walk
from pallas_kernels import aot
from pallas_kernels.audit import audit

KINDS = [kind for kinds, repeats in RUNS for kind in kinds * repeats]


@pytest.fixture
def device() -> Any:
    return jax.devices()[0]


def exact(layers: Any) -> tuple[np.ndarray, np.ndarray, list[dict[str, np.ndarray]]]:
    """(what comes out, the gradient of x, of each layer's parameters), int64."""
    x, seed = (a.astype(np.int64) for a in selftest._problem()[:2])
    maps = [
        ({n: v.astype(np.int64) for n, v in p.items()}, 1 if k == "a" else -1)
        for p, k in zip(layers, KINDS, strict=True)
    ]
    xs = [x]
    for p, sign in maps:
        xs.append(xs[-1] @ p["w"].T + sign * p["b"])
    g, found = seed, []
    for (p, sign), before in zip(reversed(maps), reversed(xs[:-1]), strict=True):
        found.append({"w": g.T @ before, "b": sign * g.sum(0, keepdims=True)})
        g = g @ p["w"]
    return xs[-1], g, found[::-1]


@pytest.mark.parametrize(("where", "form"), [("device", "scan"), ("host", "scan"), ("host", "ahead")])
def test_the_numbers_are_the_exact_ones(device: Any, where: str, form: str) -> None:
    out, dx, layers = exact(selftest._problem()[2])
    found = selftest._run(device, where, form)
    np.testing.assert_array_equal(found.pop("the forward pass"), out)
    np.testing.assert_array_equal(found.pop("the gradient of the input"), dx)
    for i, layer in enumerate(layers):
        for name, g in layer.items():
            np.testing.assert_array_equal(found.pop(f"the gradient of layer {i}'s {name}"), g)
    assert not found


def test_no_layer_can_stand_in_for_another() -> None:
    """Forwards by the output, backwards by the gradient: every replacement of a layer shows; and all numbers are exact in
    bfloat16 too, so that no precision of a matmul is at fault."""
    layers = selftest._problem()[2]
    out, dx, grads = exact(layers)
    assert max(abs(a).max() for a in (out, dx, *(g for layer in grads for g in layer.values()))) < 256
    for i in range(len(layers)):
        for j in range(len(layers)):
            if i != j:
                wrong = [*layers[:i], layers[j], *layers[i + 1 :]]
                assert (exact(wrong)[0] != out).any()
                assert (exact(wrong)[1] != dx).any()


def markers(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is run, in turn; all of it gives the same numbers."""
    ran: list[tuple[str, str]] = []

    def run(device: Any, where: str, form: str) -> dict[str, np.ndarray]:
        ran.append((where, form))
        return {"the forward pass": np.zeros(2)}

    monkeypatch.setattr(selftest, "_run", run)
    return ran


WHOLE = [("device", "scan"), ("host", "scan"), ("host", "ahead")]


def test_it_passes_here_and_leaves_a_marker(device: Any, tmp_path: Path) -> None:
    check_streaming(device, folder=tmp_path / "not" / "there")
    (marker,) = markers(tmp_path / "not" / "there")
    assert json.loads(marker.read_text())["jaxlib"] == version("jaxlib")
    assert json.loads(marker.read_text())["card"] == device.device_kind


def test_it_runs_once(device: Any, tmp_path: Path, runs: list[Any]) -> None:
    for _ in range(3):
        check_streaming(device, folder=tmp_path)
    assert runs == WHOLE
    check_streaming(device, folder=tmp_path / "other")
    assert runs == 2 * WHOLE


@pytest.mark.parametrize("what", ["jax", "jaxlib", "flags"])
def test_another_compiler_is_tested_anew(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Any], what: str
) -> None:
    check_streaming(device, folder=tmp_path)
    with monkeypatch.context() as patch:
        if what == "flags":
            patch.setenv("XLA_FLAGS", "--xla_of_another_kind")
        else:
            patch.setattr(selftest, "version", lambda name: "0.99.0" if name == what else version(name))
        for _ in range(2):
            check_streaming(device, folder=tmp_path)
    assert runs == 2 * WHOLE
    check_streaming(device, folder=tmp_path)
    assert runs == 2 * WHOLE
    assert len(markers(tmp_path)) == 2


class Client:
    platform_version = "PJRT C API\ncuda 13000"


@dataclasses.dataclass
class Card:
    device_kind: str
    client: Any = dataclasses.field(default_factory=Client)


def test_a_card_is_part_of_the_key() -> None:
    one, other = (selftest._what(Card(kind)) for kind in ("NVIDIA H200", "NVIDIA GeForce RTX 4090"))
    assert one["platform"] == "PJRT C API cuda 13000"
    assert {k for k in one if one[k] != other[k]} == {"card"}


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"null", b"{}", b'{"jaxlib": "0.0.0"}'])
def test_a_damaged_marker_is_no_marker(device: Any, tmp_path: Path, runs: list[Any], damage: bytes) -> None:
    check_streaming(device, folder=tmp_path)
    (marker,) = markers(tmp_path)
    whole = marker.read_bytes()
    marker.write_bytes(damage)
    check_streaming(device, folder=tmp_path)
    assert runs == 2 * WHOLE
    assert marker.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_failure(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Any]
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        check_streaming(device, folder=tmp_path / "file")
    assert runs == 2 * WHOLE

    def refused(*args: Any, **given: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(selftest, "output_file", refused)
    check_streaming(device, folder=tmp_path / "other")
    assert not markers(tmp_path / "other")


# --- faults ---------------------------------------------------------------------------------------------------------


def rolled(weights: Any) -> Any:
    """Each stack with its layers one further: what a wrong offset or index reads."""
    return jax.tree.map(lambda a: jnp.roll(a, 1, 0), weights)


def forwards_wrong(body: Any, carry: Any, bank: Any, states: Any) -> Any:
    stacks = tuple(w | {"rest": rolled(w["rest"])} if "rest" in w else rolled(w) for w in bank.weights)
    return walk(body, carry, [dataclasses.replace(bank, weights=stacks)], [states])


def one_forgotten(body: Any, carry: Any, bank: Any, states: Any) -> Any:
    """The layer that stands alone read from the stack beside it."""
    if bank.form != "ahead":
        return forwards_wrong(body, carry, bank, states)
    stacks = tuple({"one": jax.tree.map(lambda a: a[0], w["rest"]), "rest": w["rest"]} for w in bank.weights)
    return walk(body, carry, [dataclasses.replace(bank, weights=stacks)], [states])


def backwards_wrong(body: Any, carry: Any, bank: Any, states: Any) -> Any:
    """openxla/xla#46231: right forwards, and in the backward pass slice i of a stack where L-1-i is meant."""

    def mirrored(w: Any) -> Any:
        return jax.tree.map(lambda a: jnp.flip(a, 0), w)

    def with_mirror(w: Any) -> Any:
        if "rest" not in w:
            return {"right": w, "mirror": mirrored(w)}
        return {
            "one": {"right": w["one"], "mirror": w["one"]},
            "rest": {"right": w["rest"], "mirror": mirrored(w["rest"])},
        }

    def layer_of(kind: Any) -> Callable[..., Any]:
        @jax.custom_vjp
        def layer(w: Any, mirror: Any, x: Any) -> Any:
            del mirror
            return body(kind, w, x, ())[0]

        def back(kept: Any, g: Any) -> Any:
            w, mirror, x = kept
            dw = jax.vjp(lambda w: body(kind, w, x, ())[0], w)[1](g)[0]
            dx = jax.vjp(lambda x: body(kind, mirror, x, ())[0], x)[1](g)[0]
            return dw, jax.tree.map(jnp.zeros_like, mirror), dx

        layer.defvjp(lambda w, mirror, x: (body(kind, w, x, ())[0], (w, mirror, x)), back)
        return layer

    made = dataclasses.replace(bank, weights=tuple(map(with_mirror, bank.weights)))
    return walk(lambda k, w, x, s: (layer_of(k)(w["right"], w["mirror"], x), s), carry, [made], [states])


def gradients_mirrored(body: Any, carry: Any, bank: Any, states: Any) -> Any:
    """Right values, and each stack's gradients written from the wrong end."""

    @jax.custom_vjp
    def same(w: Any) -> Any:
        return w

    same.defvjp(lambda w: (w, None), lambda _, g: (jax.tree.map(lambda a: jnp.flip(a, 0), g),))
    stacks = tuple(w | {"rest": same(w["rest"])} if "rest" in w else same(w) for w in bank.weights)
    return walk(body, carry, [dataclasses.replace(bank, weights=stacks)], [states])


FAULTS: list[tuple[Any, str]] = [
    (forwards_wrong, "the forward pass differs"),
    (one_forgotten, "the forward pass differs"),
    (backwards_wrong, "the gradient of "),
    (gradients_mirrored, "the gradient of layer "),
]


@pytest.fixture(scope="module")
def resident() -> dict[str, np.ndarray]:
    return selftest._run(jax.devices()[0], "device", "scan")


@pytest.mark.parametrize(("form", "which"), [("scan", 0), ("ahead", 1)], ids=["scan-like", "ahead-unlike"])
@pytest.mark.parametrize(("wrong", "said"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_a_wrong_walk_is_caught(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: dict[str, np.ndarray], wrong: Any, said: str,
    which: int, form: str,
) -> None:  # fmt: skip
    """In one form and one of the two banks only."""
    run = selftest._run
    sound = {**dict.fromkeys(WHOLE, resident), ("host", form): None}  # compiled for nothing sixteen times otherwise
    monkeypatch.setattr(selftest, "_run", lambda device, *place: sound[place] or run(device, *place))

    def faulty(body: Any, carry: Any, banks: Any, states: Any) -> Any:
        for i, (bank, own) in enumerate(zip(banks, states, strict=True)):
            bad = i == which and (bank.home, bank.form) == ("host", form)
            if bad:  # the memory's type would be in the way of faking its contents
                on_device = jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), bank.weights)
                bank = dataclasses.replace(bank, weights=on_device, home="device")
            carry, _ = (wrong if bad else lambda b, c, k, s: walk(b, c, [k], [s]))(body, carry, bank, own)
        return carry, states

    monkeypatch.setattr(selftest, "walk", faulty)
    with pytest.raises(RuntimeError, match=said) as error:
        check_streaming(device, folder=tmp_path)
    for part in (version("jaxlib"), device.device_kind, f"form={form!r}", "home='device'"):
        assert part in str(error.value)
    assert not markers(tmp_path)


def test_a_compiler_that_gives_up_is_told(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(device: Any, where: str, form: str) -> dict[str, np.ndarray]:
        if where == "host":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such memory")
        return {}

    monkeypatch.setattr(selftest, "_run", run)
    with pytest.raises(RuntimeError, match=r"form='scan': does not run: INTERNAL: no such memory.*home='device'"):
        check_streaming(device, folder=tmp_path)
    assert not markers(tmp_path)


# --- the program that a card would run --------------------------------------------------------------------------------


@pytest.fixture
def target() -> Iterator[aot.Target]:
    if said := aot.missing():
        pytest.skip(said)
    with aot.target(aot.CARDS["RTX 4090"]) as target:
        yield target


@pytest.mark.aot
@pytest.mark.parametrize("form", selftest.FORMS)
def test_what_it_compiles_on_a_card_is_streaming(target: aot.Target, form: str, device: Any) -> None:
    """Every layer comes out of host memory by a copy engine, at the address that a large model's layer would: a test that
    the compiler turned into something else would test nothing."""
    x, seed, _ = selftest._problem()

    def abstract(a: Any, memory: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(target.mesh, P(), memory_kind=memory))

    banks = jax.tree.map(lambda a: abstract(a, "pinned_host"), selftest._banks(device, "host", form))
    given = target.place((banks, abstract(x, None), abstract(seed, None)))
    report = audit(target.compile(jax.jit(selftest._results), *given))
    once = sum(a.nbytes for layer in selftest._problem()[2] for a in layer.values())
    # both fetch again on their way back (what they need there: no bias)
    biases = sum(a.nbytes for layer in selftest._problem()[2] for a in layer.values() if a.shape[0] == 1)
    assert 2 * once - biases <= report.streamed <= 2 * once
    assert not report.problems
    assert all(copy.dma for copy in report.copies)
    assert {copy.turns for copy in report.copies if copy.loop} == {3 if form == "scan" else 2}
