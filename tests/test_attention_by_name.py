"""`attention=` above the op: what a plan names is what runs, and what cuDNN is told of positions holds.

What runs is read from the jaxpr of the programs that generation and fine-tuning compile: the reference is the one form
without a loop of its own, the chunked form is loops, kernels are primitives of their own names. For a GPU programs are
traced on an abstract mesh, which needs neither a card nor its compiler.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click.testing
import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh
from oracles.golden import GOLDEN

import jaxengine
from jaxengine.architecture import Architecture, architecture, initialise
from jaxengine.cache import base
from jaxengine.command import app
from jaxengine.finetune import planning as tuning
from jaxengine.loading import from_arrays
from jaxengine.plan import Plan, activation_bytes, check_attention
from jaxengine.planning import plan_folder
from jaxengine.proof import programs
from pallas_kernels import aot
from pallas_kernels.dispatch import Refused

T = 64
RAW = json.loads((GOLDEN / "llama" / "config.json").read_text()) | {"head_dim": 64, "max_position_embeddings": 4096}
ARCH = architecture(RAW)
CPU = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), aot.AXES)
TASKS = ("lora", "full", "lisa", "mezo")


def on_a(card: str) -> AbstractMesh:
    """A mesh of one such card, to trace for."""
    spec = aot.CARDS[card]
    device = jax.sharding.AbstractDevice(device_kind=spec.limits.lowers_as, num_cores=spec.cores, platform="gpu")
    return AbstractMesh((1, 1, 1), aot.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All of a program, inside of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for given in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(given, ClosedJaxpr | Jaxpr):
                yield from equations(given.jaxpr if isinstance(given, ClosedJaxpr) else given)


def traced(what: str, plan: Plan, mesh: Any = CPU, tokens: int = T, arch: Architecture = ARCH) -> Counter[str]:
    """How often each primitive is in a program: 'prefill', 'decode', or the step of a way of fine-tuning."""
    if what in TASKS:
        program, static, abstract = tuning.program(arch, plan, tuning.task(what), mesh, batch=1, context=tokens)
    else:
        found = programs(arch, plan, mesh, batch=1, length=tokens)[what]
        program, static, abstract = found.program, found.static, found.abstract
    traced = jax.make_jaxpr(lambda *given: program.function(*static, *given))(*abstract)
    return Counter(str(e.primitive) for e in equations(traced.jaxpr))


def loops(counted: Counter[str]) -> int:
    return counted["while"] + counted["scan"]


@pytest.mark.parametrize("what", ["prefill", "decode", *TASKS])
@pytest.mark.some_rows
def test_what_is_named_is_what_runs(what: str) -> None:
    """On a CPU 'auto' writes out the few scores of this program; 'xla' has loops of its own in each layer."""
    auto, xla, reference = (
        loops(traced(what, Plan(dtype="float32", attention=name))) for name in ("auto", "xla", "reference")
    )
    assert auto == reference
    assert xla >= reference + ARCH.num_layers


@pytest.mark.parametrize("chunk", [0, 16])
def test_what_is_named_is_what_reads_a_long_prompt(chunk: int) -> None:
    """Where 'auto' is the chunked form, 'reference' is not."""
    auto, xla, reference = (
        loops(traced("prefill", Plan(dtype="float32", attention=name, chunk=chunk), tokens=1024))
        for name in ("auto", "xla", "reference")
    )
    assert auto == xla if chunk == 0 else auto == reference  # pieces of 16 are few queries
    assert xla > reference


@pytest.mark.parametrize("name", ["triton", "xla", "mosaic_gpu", "reference"])
@pytest.mark.parametrize("what", ["prefill", "decode", "lora"])
def test_what_is_named_is_what_runs_on_a_card(what: str, name: str) -> None:
    if name == "mosaic_gpu" and jax.__version_info__ < (0, 11, 1):
        pytest.skip("the kernel is written for jax 0.11.1 and later")
    mesh, plan = on_a("H200"), Plan(dtype="bfloat16", attention=name)
    with jax.sharding.use_abstract_mesh(mesh):
        counted = traced(what, plan, mesh, tokens=1024)
    triton, mosaic = counted["pallas_triton_call"], counted["wgmma_ref"]
    if name == "mosaic_gpu" and what != "decode":
        assert mosaic
        assert bool(triton) == (what == "lora")  # whose way back is Triton's
    else:  # for decoding there is no such kernel, and 'auto' takes Triton's
        assert bool(triton) == (name in ("triton", "mosaic_gpu"))
        assert not mosaic


def test_a_name_survives_json() -> None:
    plan = Plan(dtype="bfloat16", attention="triton")
    assert Plan.from_json(plan.to_json()) == plan
    assert "triton" in str(plan)
    old = json.loads(plan.to_json())
    del old["attention"]
    assert Plan.from_json(json.dumps(old)) == Plan(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"attention is 'tritn'; it can be auto, .*Did you mean 'triton'"):
        Plan(attention="tritn")
    with pytest.raises(ValueError, match="attention is 3; it is a string"):
        Plan.from_json('{"attention": 3}')


def test_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the kernel says; nothing of the files is read for it."""

    def read(*given: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("jaxengine.placement.place", read)
    for name, said in (
        ("triton", "attention is 'triton', for reading prompts: there is no GPU"),
        ("cudnn", "attention is 'cudnn', for reading prompts: there is no GPU"),
        ("flash", "it can be auto, reference, xla"),
    ):
        with pytest.raises(ValueError, match=said):
            jaxengine.load(GOLDEN / "llama", attention=name)
    with pytest.raises(AssertionError, match="weights were read"):
        jaxengine.load(GOLDEN / "llama", attention="xla")


def test_from_the_command_line() -> None:
    run = click.testing.CliRunner().invoke
    given = ["generate", "demo", "The cat", "--max-new-tokens", "1"]
    named = run(app, [*given, "--attention", "xla", "--show-plan"])
    assert named.exit_code == 0
    assert re.search("^attention +xla$", named.output, re.MULTILINE)
    refused = run(app, [*given, "--attention", "triton"])
    assert refused.exit_code == 2
    assert "attention is 'triton', for reading prompts: there is no GPU" in refused.output


@pytest.mark.parametrize(
    ("card", "how", "said"),
    [
        ("rtx4090", {"attention": "mosaic_gpu"}, "mosaic_gpu"),
        ("t4", {"attention": "triton", "dtype": "float16"}, "compute capability 7.5 is below 8.0"),
        ("h200", {"attention": "triton", "dtype": "float32"}, "q is float32"),
    ],
)
def test_a_plan_for_a_card_is_refused_as_on_the_card(card: str, how: dict[str, str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        plan_folder(GOLDEN / "llama", gpu=card, **how)  # pyright: ignore[reportArgumentType]


def test_a_plan_for_a_card_takes_a_name() -> None:
    outcome = plan_folder(GOLDEN / "llama", gpu="h200", attention="triton", dtype="bfloat16")
    assert outcome.chosen is not None
    assert outcome.chosen.plan.attention == "triton"


def test_a_name_that_cannot_train_is_refused_for_training() -> None:
    """tokamax and cuDNN do not look at packed rows' positions: a run of fine-tuning is refused, and not only generation."""
    with pytest.raises(
        Refused, match=r"for training on packed rows: its mask counts tokens .*a packed row holds several"
    ):
        check_attention(ARCH, Plan(dtype="float32", attention="tokamax"), training=True)


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"chunk": 64}, "for reading prompts in pieces of 64: .*chunk=0 reads prompts whole"),
        (
            {"mesh": "tensor=4", "sharding": "tensor", "rules": (("kv_heads", None),)},
            "over the mesh 'tensor=4' 4 query heads and 2 kv heads are not split alike",
        ),
        (
            {"mesh": "tensor=2", "sharding": "tensor", "rules": (("sequence", "tensor"), ("act_heads", None))},
            "over the mesh 'tensor=2' 4 query heads and 2 kv heads are not split alike with all their tokens",
        ),
    ],
    ids=["pieces", "heads", "tokens"],
)
def test_a_mask_that_counts_tokens_is_refused_where_it_would_be(name: str, how: dict[str, Any], said: str) -> None:
    """Before weights are read, for an H200, in terms that a plan has."""
    plan = Plan(dtype="bfloat16", attention=name, **how)
    with jax.sharding.use_abstract_mesh(on_a("H200")), pytest.raises(Refused, match=said) as e:
        check_attention(ARCH, plan)
    assert "contiguous" not in str(e.value)


def test_a_mesh_that_splits_heads_alike_is_not_refused() -> None:
    with jax.sharding.use_abstract_mesh(on_a("H200")):
        check_attention(ARCH, Plan(dtype="bfloat16", attention="cudnn", mesh="data=2,tensor=2", sharding="tensor"))


def test_a_model_over_a_mesh_is_refused_before_its_weights_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of the mesh comes before what is said of this machine, which has no GPU."""

    def read(*given: Any) -> Any:
        raise AssertionError("weights were placed")

    monkeypatch.setattr("jaxengine.placement.place", read)
    mesh = "data=2,tensor=4"
    plan = Plan(dtype="bfloat16", attention="cudnn", mesh=mesh, sharding="tensor", rules=(("kv_heads", None),))
    with pytest.raises(Refused, match=f"over the mesh '{mesh}' 4 query heads and 2 kv heads are not split alike"):
        from_arrays(architecture(RAW | {"vocab_size": 104}), plan, {})


@pytest.mark.parametrize(
    ("card", "H", "said"),
    [
        ("h200", 256, ""), ("a100 80gb", 128, ""), ("rtx4090", 128, ""),
        ("rtx4090", 256, "multiples of 8 up to 128 on compute capability 8.9"),
        ("rtx5090", 256, "up to 128 on compute capability 12.0"), ("t4", 64, "compute capability 7.5 is below 8.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("library", [None, 91000])
def test_a_plan_answers_for_the_card_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, card: str, H: int, said: str, library: int | None
) -> None:
    """With cuDNN on this machine and without; what this machine's GPU takes, of which there is none, decides nothing either."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version() -> int:
        if library is None:
            raise RuntimeError("cuDNN is not detected.")
        return library

    monkeypatch.setattr(fused, "check_cudnn_version", version)
    jax.clear_caches()
    dtype = "float16" if card == "t4" else "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"head_dim": H}))
    if said:
        with pytest.raises(Refused, match=f"attention is 'cudnn', for reading prompts: .*{said}"):
            plan_folder(tmp_path, gpu=card, attention="cudnn", dtype=dtype)
    else:
        outcome = plan_folder(tmp_path, gpu=card, attention="cudnn", dtype=dtype)
        assert any("needs the cuDNN library where this runs" in s for s in outcome.to_dict()["traps"])
    jax.clear_caches()


@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_a_plan_with_cudnn_says_why_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version() -> int:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused, "check_cudnn_version", version)
    found = click.testing.CliRunner().invoke(
        app, ["plan", str(GOLDEN / "llama"), "--gpu", "h200", "--dtype", "bfloat16", "--attention", "cudnn"]
    )
    assert found.exit_code == 0
    said = " ".join(found.output.split())
    assert "note: attention 'cudnn' needs the cuDNN library where this runs" in said
    assert "not compiled: for attention 'cudnn' jax asks this machine's cuDNN and GPU: cuDNN is not detected" in said


def test_the_reference_is_counted_with_all_its_scores() -> None:
    auto, named = (
        activation_bytes(ARCH, Plan(dtype="float32", attention=n), batch=1, tokens=4096, length=4096)
        for n in ("auto", "reference")
    )
    assert named >= 2 * 4 * ARCH.attention(ARCH.kinds[0]).num_heads * 4096**2 > auto


@pytest.mark.parametrize("task", TASKS)
def test_steps_count_the_scores_of_the_reference(task: str) -> None:
    auto, named = (
        tuning.need(ARCH, Plan(dtype="float32", attention=n), tuning.task(task), batch=1, context=4096).device
        for n in ("auto", "reference")
    )
    assert named - auto >= (4 + 2) * ARCH.attention(ARCH.kinds[0]).num_heads * 4096**2


# -- what cuDNN is told


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, np.ndarray, np.ndarray]]]:
    """Of each call of attention that is not decoding: whether it was said to be contiguous, and both positions."""
    heard: list[tuple[bool, np.ndarray, np.ndarray]] = []
    real = base.kernel.attention

    def listening(q: Any, k: Any, v: Any, q_at: Any, k_at: Any, *, contiguous: bool, **how: Any) -> Any:
        jax.debug.callback(lambda a, b: heard.append((contiguous, np.asarray(a), np.asarray(b))), q_at, k_at)
        return real(q, k, v, q_at, k_at, contiguous=contiguous, **how)

    jax.clear_caches()  # programs of other tests do not listen, nor those of this one anywhere else
    monkeypatch.setattr(base.kernel, "attention", listening)
    yield heard
    jax.clear_caches()


def as_said(heard: list[tuple[bool, np.ndarray, np.ndarray]]) -> set[bool]:
    """What was said, after holding it against the positions: 0, 1, ... and -1 only after them, the same for both."""
    for contiguous, q_at, k_at in heard:
        if contiguous:
            np.testing.assert_array_equal(q_at, k_at)
            at = np.arange(q_at.shape[1])
            np.testing.assert_array_equal(q_at, np.where(at < (q_at >= 0).sum(1, keepdims=True), at, -1))
    return {contiguous for contiguous, _, _ in heard}


@pytest.mark.parametrize(
    ("family", "kv"), [("llama", "raw"), pytest.param("phi3_longrope", "int8", marks=pytest.mark.thorough)]
)
def test_a_new_prompt_is_contiguous(told: Any, family: str, kv: str) -> None:
    """Ragged prompts, several samples, scoring; a row that is read anew is a new prompt again (phi3_longrope)."""
    model = jaxengine.load(GOLDEN / family, kv=kv)
    at = model.architecture.reread_at
    most = 24 if at is None else at - 5
    prompts = [[5, 6, 7], list(range(3, 3 + most)), [9]]
    model.generate(prompts, max_new_tokens=1 if at is None else 8, n=2, temperature=1.0, seed=0, stop_ids=())
    jax.effects_barrier()
    assert as_said(told) == {True}
    layers = model.architecture.num_layers
    assert len(told) >= (layers if at is None else 2 * layers)
    told.clear()
    model.logits([[5, 6, 7, 8], [9, 0, 0, 0]], lengths=[4, 1])
    jax.effects_barrier()
    assert as_said(told) == {True}


def test_pieces_are_not(told: Any) -> None:
    model = from_arrays(ARCH, Plan(dtype="float32", chunk=32), initialise(ARCH, 0), RAW)
    model.generate([list(range(90))], max_new_tokens=1, stop_ids=())
    jax.effects_barrier()
    assert as_said(told) == {False}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call while tracing, whether it was said to be contiguous."""
    flags: list[bool] = []
    real = base.kernel.attention

    def listening(*given: Any, contiguous: bool, **how: Any) -> Any:
        flags.append(contiguous)
        return real(*given, contiguous=contiguous, **how)

    monkeypatch.setattr(base.kernel, "attention", listening)
    return flags


@pytest.mark.parametrize("what", TASKS)
def test_packed_rows_are_not(said: list[bool], what: str) -> None:
    traced(what, Plan(dtype="float32"))
    assert set(said) == {False}


@pytest.mark.parametrize(("axes", "alike"), [("tensor=2", True), ("data=2,tensor=2", True), ("tensor=4", False)])
def test_heads_that_are_split_unlike_are_not(said: list[bool], axes: str, alike: bool) -> None:
    """Four query heads and two kv heads: over four devices the latter are whole, which jax's cuDNN call does not take."""
    names, sizes = zip(*((n, int(s)) for n, s in (a.split("=") for a in axes.split(","))), strict=True)
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names)
    plan = Plan(dtype="float32", mesh=axes, sharding="tensor")
    full = Mesh(mesh.devices.reshape([dict(zip(names, sizes, strict=True)).get(a, 1) for a in aot.AXES]), aot.AXES)
    found = programs(ARCH, plan, full, batch=2, length=T)["prefill"]
    jax.eval_shape(lambda *given: found.program.function(*found.static, *given), *found.abstract)
    assert set(said) == {alike}


@pytest.mark.parametrize("chunk", [0, 128])
def test_cudnn_is_asked_for_a_new_prompt(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """By default, in the program for an H200 where the library is there; never for pieces of a prompt. The call as it is
    lowered: test_attention.py."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()  # which of them serves is kept with what was traced
    mesh, plan = on_a("H200"), Plan(dtype="bfloat16", chunk=chunk)
    with jax.sharding.use_abstract_mesh(mesh):
        counted = traced("prefill", plan, mesh, tokens=1024)
    jax.clear_caches()
    asked = sum(n for name, n in counted.items() if "dot_product_attention" in name)
    assert asked == (0 if chunk else ARCH.num_layers)
    assert bool(counted["pallas_triton_call"]) == bool(chunk)
