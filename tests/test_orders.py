"""Orders of columns (act-order) over a mesh: resolved in the parts of a row that devices hold, with the same numbers.

Rounding of a contraction over I inputs in float32 (u): |y - W x| <= (I + 8) u sum |W x|, as in tests/test_weights.py; how sums
are grouped does not matter to it, so it bounds what one device gives and what several give alike.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_finetune import CLOSE, HOW, llama, losses, moved_by, run_of
from test_finetune_sharded import WHOLE_VOCAB
from test_quantized_checkpoints import CASES, folders, gptq

import jaxengine
from checkpoints.safetensors import Reader
from jaxengine import formats, orders, placement
from jaxengine.architecture import architecture
from jaxengine.plan import Plan, abstract_leaf, layer_bytes
from jaxengine.planning import plan_folder
from jaxengine.proof import programs
from jaxengine.weights import _parts
from pallas_kernels import aot
from sharding.mesh import abstract_mesh, make_mesh

U = 2.0**-24
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
RAW = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


def random_leaf(
    inputs: int, G: int, *, outputs: int = 6, affine: bool = True, perm: Any = None, seed: int = 0, bits: int = 4
) -> Any:
    """A matrix of random codes in a random order of columns, in numpy."""
    rng = np.random.default_rng(seed)
    groups = -(-inputs // G)
    codes = rng.integers(0, 2**bits, (outputs, inputs)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (outputs, groups)).astype(np.float32)
    zero = rng.integers(0, 2**bits, (outputs, groups)).astype(np.float32) if affine else None
    perm = (rng.permutation(inputs) if perm is None else perm).astype(np.int32)
    return formats.find(f"int{bits}").module.pack(codes, scale, zero, in_shape=(inputs,), perm=perm)


def exact_of(leaf: Any) -> np.ndarray:
    """float64 [O, I] of a leaf that is not in parts: a loop over columns."""
    codes, perm = leaf.unpacked().astype(np.float64), leaf.perm
    found = np.empty(codes.shape)
    for i, column in enumerate(perm):
        g = i // leaf.group_size
        zero = 2 ** (leaf.bits - 1) if leaf.zero is None else leaf.zero[:, g].astype(np.float64)
        found[:, column] = leaf.scale[:, g].astype(np.float64) * (codes[:, i] - zero)
    return found


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize(("inputs", "G"), [(512, 128), (512, 16), (300, 32), (7, 16)])
def test_parts_hold_the_same_numbers(inputs: int, G: int, parts: int) -> None:
    """And each is put together again of them: the same scale and the same codes for every column."""
    leaf = random_leaf(inputs, G)
    split = leaf.in_parts(parts)
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(split))
    np.testing.assert_array_equal(np.asarray(split.dense()), exact_of(leaf).astype(np.float32))
    whole = split.joined()
    assert jax.tree.structure(whole) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(exact_of(whole), exact_of(leaf))
    # in the groups that there were: an export tells each column's
    g, h = (np.argsort(w.perm, kind="stable") // w.group_size for w in (leaf, whole))
    np.testing.assert_array_equal(g, h)


@pytest.mark.parametrize(("bits", "parts"), [(8, 4), (3, 2), (2, 4)])
def test_codes_of_other_bits_in_parts(bits: int, parts: int) -> None:
    """The same numbers and products, and what a plan expects of the format."""
    leaf = random_leaf(512, 64, bits=bits, affine=bits < 8)
    said = f"int{bits}:group_size=64," + ("" if bits == 8 else "affine=true,scale=float32,") + f"act_order={parts}"
    split = formats.find(said).refit(leaf)
    exact = exact_of(leaf)
    np.testing.assert_array_equal(np.asarray(split.dense()), exact.astype(np.float32))
    np.testing.assert_array_equal(exact_of(split.joined()), exact)
    planned = abstract_leaf(said, (6, 512), 1, "float32")
    assert jax.tree.structure(planned) == jax.tree.structure(split)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(planned)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(split)
    ]
    x = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    y = np.asarray(jax.tree.map(jnp.asarray, split).contract("bi,oi->bo", jnp.asarray(x)))
    assert (abs(y - x @ exact.T) <= (split.perm.size + 8) * U * (abs(x) @ abs(exact.T))).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_there_is_room_for_the_worst_order(parts: int) -> None:
    """One column of a block of 16 for as many groups of a part as there can be."""
    inputs, G = 1024, 32
    first, rest = list(range(inputs // parts)), list(range(inputs // parts, inputs))
    perm: list[int] = []
    for end in range(G, inputs + 1, G):  # 17 columns of the first part in each group, as long as there are
        perm += [first.pop() for _ in range(min(17, len(first)))]
        perm += [(rest or first).pop() for _ in range(end - len(perm))]
    leaf = random_leaf(inputs, G, perm=np.array(perm))
    split = leaf.in_parts(parts)
    np.testing.assert_array_equal(np.asarray(split.dense()), exact_of(leaf).astype(np.float32))


def test_a_part_reads_itself_alone() -> None:
    leaf = random_leaf(512, 64).in_parts(4)
    blocks = _parts.blocks_of(512, 8, 4)
    assert leaf.perm.shape == (4, 16 * blocks)
    for row in leaf.perm:
        there = row[row < 128]
        np.testing.assert_array_equal(np.sort(there), np.arange(128))
    x = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    read = np.asarray(leaf._as_they_stand(jnp.asarray(x))).reshape(3, 4, -1)
    for p in range(4):
        other = x.copy()
        other[:, [k for k in range(512) if k // 128 != p]] = np.nan
        np.testing.assert_array_equal(
            np.asarray(leaf._as_they_stand(jnp.asarray(other))).reshape(3, 4, -1)[:, p], read[:, p]
        )


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("parts", [2, 8])
def test_products_and_gradients(parts: int, rows: int) -> None:
    leaf = random_leaf(300, 32, outputs=20)
    exact, split = exact_of(leaf), jax.tree.map(jnp.asarray, leaf.in_parts(parts))
    rng = np.random.default_rng(2)
    x, g = (rng.normal(size=(rows, n)).astype(np.float32) for n in (300, 20))
    y, back = jax.vjp(lambda x: split.contract("bi,oi->bo", x), jnp.asarray(x))
    slots = split.perm.size
    assert (abs(np.asarray(y) - x @ exact.T) <= (slots + 8) * U * (abs(x) @ abs(exact.T))).all()
    (dx,) = back(jnp.asarray(g))
    assert (abs(np.asarray(dx) - g @ exact) <= (20 + 8) * U * (abs(g) @ abs(exact))).all()


def test_encode_and_the_plan_agree() -> None:
    """What is encoded in parts is what is encoded whole and split afterwards, and a plan's bytes follow from its shape."""
    w = jnp.asarray(np.random.default_rng(3).normal(size=(12, 8, 32)), jnp.float32)
    whole, split = (formats.find(f"int4:group_size=64,act_order={n}") for n in ("true", "4"))
    assert str(split) == "int4:group_size=64,act_order=4"
    found, other = split.encode(w, out=1), split.refit(jax.tree.map(np.asarray, whole.encode(w, out=1)))
    jax.tree.map(np.testing.assert_array_equal, found, other)
    assert jax.tree.structure(found) == jax.tree.structure(other)
    np.testing.assert_array_equal(found.dense(), whole.encode(w, out=1).dense())
    assert split.refit(found) is found


# --- over a mesh ------------------------------------------------------------------------------------------------------

SHAPE = r"[a-z]+\d+\[[\d,]*\]"
COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("devices", [2, 4])
def test_a_split_row_is_summed_and_nothing_else(devices: int, rows: int) -> None:
    """Forward one sum over devices, back none: each device makes the gradient of its inputs. Not so with the order whole."""
    mesh = make_mesh(f"data={8 // devices},tensor={devices}")
    leaf = random_leaf(512, 64, outputs=16)
    exact = exact_of(leaf)
    rng = np.random.default_rng(4)
    x, g = (rng.normal(size=(rows, n)).astype(np.float32) for n in (512, 16))

    def compiled(leaf: Any, axes: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
        axes = jax.tree.map(lambda a: _Spec("tensor" if n == "i" else None for n in a), axes, is_leaf=_is_axes)
        w = jax.tree.map(put, leaf, axes)
        given = w, put(x, (None, "tensor")), put(g, ())

        def forward(w: Any, x: Any) -> Any:
            return jax.lax.with_sharding_constraint(w.contract("bi,oi->bo", x), NamedSharding(mesh, P()))

        def backward(w: Any, x: Any, g: Any) -> Any:
            return jax.vjp(lambda x: forward(w, x), x)[1](g)[0]

        out = NamedSharding(mesh, P(None, "tensor"))
        return (
            jax.jit(forward).lower(*given[:2]).compile(),
            jax.jit(backward, out_shardings=out).lower(*given).compile(),
            given,
        )

    f = formats.find(f"int4:group_size=64,affine=true,act_order={devices}")
    split = f.refit(leaf)
    forward, backward, given = compiled(split, f.leaf_axes(("o", "i"), 1))
    assert {k for k in re.findall(COLLECTIVES, forward.as_text())} == {"all-reduce"}
    assert not re.findall(COLLECTIVES, backward.as_text())
    y, dx = forward(*given[:2]), backward(*given)
    assert (abs(np.asarray(y) - x @ exact.T) <= (split.perm.size + 8) * U * (abs(x) @ abs(exact.T))).all()
    assert (abs(np.asarray(dx) - g @ exact) <= (16 + 8) * U * (abs(g) @ abs(exact))).all()
    whole = formats.find("int4:group_size=64,affine=true,act_order=true").leaf_axes(("o", "i"), 1)
    told = Counter(re.findall(COLLECTIVES, compiled(leaf, whole)[0].as_text()))
    assert told.total() > told["all-reduce"] or told["all-reduce"] > 1  # rows are brought together


class _Spec(tuple):
    """One leaf."""


def _is_axes(a: Any) -> bool:
    return type(a) is tuple


def gathers(plan: Plan, mesh: Any, kind: str) -> list[str]:
    """What is moved between devices in a step's layers, but for one sum of a result [1, D] a matrix that is split by inputs."""
    found = programs(architecture(RAW), plan, mesh, batch=1, length=32)[kind]
    text = found.program.on("cpu").lower(*found.static, *found.abstract).compile().as_text()
    lines = [line for line in text.splitlines() if re.search(COLLECTIVES, line)]
    of = [(re.search(r'op_name="([^"]*)"', line + ' op_name=""'), line) for line in lines]
    # sums, but one that is a gather over a mesh, inside a layer; and the largest of the parts of logits
    summed = [(name, line) for name, line in of if "all-reduce" not in line or ("/layer/" in line and "take" in line)]
    return [line for name, line in summed if name is not None and not name[1].endswith("/reduce")]


@pytest.mark.parametrize(
    ("devices", "form", "kind"), [(2, "unrolled", "decode"), (4, "scan", "decode"), (4, "unrolled", "prefill")]
)
def test_no_step_brings_activations_together(devices: int, form: str, kind: str) -> None:
    """`o` and `down` of a compiled step: of an imported act-order checkpoint, whose down is absorbed. With o's order whole
    there are collectives."""
    said = f"data={8 // devices},tensor={devices}"
    rules = (("layers.*.down", "int4:group_size=32"), ("lm_head", "dense"))
    plan = Plan(
        dtype="float32",
        weights="int4:group_size=32,act_order=true",
        weight_rules=rules,
        mesh=said,
        sharding="tensor",
        form=form,
    )
    mesh = make_mesh(said)
    split = orders.over_mesh(architecture(RAW), plan, mesh)
    assert split.weight_rules == (("layers.*.o", f"int4:group_size=32,act_order={devices}"), *rules)
    assert not gathers(split, mesh, kind)
    assert gathers(plan, mesh, kind)


def in_layers(plan: Plan, target: aot.Target, kind: str) -> Counter[str]:
    """What a step that is compiled for cards moves between them in its layers: 'all-reduce f32[1,256]' and how often."""
    step = programs(architecture(RAW), plan, target.mesh, batch=1, length=32)[kind]
    text = target.compile(step.program.on("gpu"), *step.static, *target.place(step.abstract)).as_text()
    found = Counter[str]()
    for line in text.splitlines():
        if (made := re.search(COLLECTIVES, line)) and "/layer/" in line:
            # the last of a tuple: one that is started has its operands before its result
            found[f"{made[1]} {re.findall(SHAPE, line[: made.start()])[-1]}"] += 1
    return found


@pytest.mark.parametrize(
    ("devices", "card", "kind", "rows", "form"),
    [
        (2, "H200", "decode", 1, "unrolled"),
        (4, "RTX 4090", "prefill", 32, "unrolled"),
        (2, "RTX 4090", "prefill", 32, "scan"),
    ],
)
@pytest.mark.aot
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_cards_sum_o_and_down_and_bring_nothing_together(
    devices: int, card: str, kind: str, rows: int, form: str
) -> None:
    """Of each layer two sums of a result [rows, D], and no gather; with the orders whole, the same two and a gather of the
    inputs of each: of 256 and of 512."""
    text = "int4:group_size=64,act_order=true"
    rules = (("lm_head", "dense"),)
    plan = Plan(
        dtype="bfloat16", weights=text, weight_rules=rules, mesh=f"tensor={devices}", sharding="tensor", form=form
    )
    layers = 1 if form == "scan" else 2  # in the program
    with aot.target(aot.CARDS[card], tensor=devices) as target:
        split = orders.over_mesh(architecture(RAW), plan, target.mesh)
        now = text.replace("true", str(devices))
        assert split.weight_rules == (("layers.*.down", now), ("layers.*.o", now), *rules)
        assert in_layers(split, target, kind) == {f"all-reduce f32[{rows},256]": 2 * layers}
        told = in_layers(plan, target, kind)
    of = "{}" if rows == 1 else f"{rows},{{}}"
    gathered = {f"all-gather bf16[{of.format(inputs)}]": layers for inputs in (256, 512)}
    assert told == {f"all-reduce f32[{rows},256]": 2 * layers} | gathered


@pytest.mark.parametrize(("mesh", "bits"), [("data=4,tensor=2", 4), ("data=2,tensor=4", 4), ("data=4,tensor=2", 8)])
def test_an_imported_checkpoint_over_a_mesh(mesh: str, bits: int, tmp_path: Path) -> None:
    """GPTQ with desc_act: logits of the matrices that it means, tokens of one device, and the same file when it is written."""
    theirs, plain = folders(gptq(bits, act_order=True, sym=bits == 8), tmp_path, RAW)
    one, split = jaxengine.load(theirs), jaxengine.load(theirs, mesh=mesh, sharding="tensor")
    devices = int(mesh[-1])
    assert dict(split.plan.weight_rules)["layers.*.o"].endswith(f"act_order={devices}")
    o = split.params["banks"][0].weights[0]["o"]
    assert o.perm.sharding.shard_shape(o.perm.shape)[0] == 1
    assert o.codes.sharding.shard_shape(o.codes.shape)[-1] * devices == o.codes.shape[-1]
    said = f"tensor={devices}"  # of cards that are not here: the bytes that each of those here has
    planned = plan_folder(theirs, gpu="rtx4090", mesh=said, sharding="tensor", context=32).candidates[0].plan
    assert planned.weight_rules == split.plan.weight_rules
    assert sum(layer_bytes(split.architecture, planned)) == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(split.params["banks"])
    )
    # the bound against transformers (tests/test_quantized_checkpoints.py); and between two orders of the same sums
    expected = jaxengine.load(plain).logits(TOKENS)
    np.testing.assert_allclose(split.logits(TOKENS), expected, atol=2e-4, rtol=0)
    np.testing.assert_allclose(split.logits(TOKENS), one.logits(TOKENS), atol=2e-4, rtol=0)
    given = [TOKENS, TOKENS[:3]]
    assert [c.tokens for c in split.generate(given, max_new_tokens=6)] == [
        c.tokens for c in one.generate(given, max_new_tokens=6)
    ]
    for name, model in (("one", one), ("split", split)):
        model.save(tmp_path / name, format="compressed-tensors")
    with Reader.open(tmp_path / "one") as a, Reader.open(tmp_path / "split") as b:
        assert a.names == b.names
        for n in a.names:
            np.testing.assert_array_equal(a.read(n), b.read(n), err_msg=n)


@pytest.mark.parametrize("how", [{"form": "scan"}, pytest.param({"home": "host"}, marks=pytest.mark.thorough)], ids=str)
def test_lora_steps_over_a_base_in_parts(how: dict[str, Any]) -> None:
    """Beside o and down in parts, on eight devices, the factors and losses of one with the orders whole. Losses within the
    64 roundings of tests/test_finetune_sharded.py; the factors of the first step, which is the gradient, within twice that of
    the largest of each (37 measured)."""
    plan = dataclasses.replace(WHOLE_VOCAB, dtype="float32", weights="int4:group_size=16,act_order=true")
    settings = dataclasses.replace(HOW, batch=8, steps=4)
    one = run_of(llama(plan=plan, **how), settings)
    split = run_of(llama(plan=plan, mesh="data=4,tensor=2", sharding="tensor", **how), settings)
    for name in ("o", "down"):
        leaf = split.model.params["banks"][0].weights[0][name]
        assert leaf.perm.shape[-2:-1] == (2,)
        assert leaf.perm.sharding.shard_shape(leaf.perm.shape)[-2] == 1
    first = losses(one, 1), losses(split, 1)
    factors = (jax.tree.map(np.asarray, run._state.trained) for run in (one, split))
    changed = 0
    for a, b in zip(*(jax.tree.leaves(f) for f in factors), strict=True):
        assert (abs(a - b) <= 2 * CLOSE * abs(a).max()).all()
        changed += bool(a.max() > 0) and a.shape[-1] == settings.rank
    assert changed >= 7
    wanted, found = (begun + losses(run) for begun, run in zip(first, (one, split), strict=True))
    assert moved_by(wanted) > 1000 * CLOSE * max(wanted)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)


def test_what_was_saved_over_a_mesh_is_loaded_anywhere(tmp_path: Path) -> None:
    """In parts on one device, and whole on one over a mesh: the same numbers."""
    theirs, _ = folders(gptq(act_order=True), tmp_path, RAW)
    one = jaxengine.load(theirs)
    split = jaxengine.load(theirs, mesh="data=4,tensor=2", sharding="tensor")
    one.save(tmp_path / "one", format="orbax")
    split.save(tmp_path / "split", format="orbax")
    alone = jaxengine.load(tmp_path / "split")
    assert dict(alone.plan.weight_rules)["layers.*.o"].endswith("act_order=2")
    over = jaxengine.load(tmp_path / "one", mesh="data=2,tensor=4", sharding="tensor")
    assert dict(over.plan.weight_rules)["layers.*.o"].endswith("act_order=4")
    anew = jaxengine.load(tmp_path / "split", mesh="data=2,tensor=4", sharding="tensor")
    specs = anew.architecture.specs()
    assert anew.plan.format_of("layers.1.o", specs["layers.1.o"]).endswith("act_order=4")
    assert anew.params["banks"][0].weights[0]["o"].perm.shape[0] == 4
    whole = jaxengine.load(tmp_path / "split", plan=one.plan)
    assert whole.plan == one.plan
    of = lambda m: np.asarray(placement.stored(m.architecture, m.plan, m.params)["layers.1.o"]().dense())  # noqa: E731
    for model in (alone, over, anew, whole):
        np.testing.assert_array_equal(of(model), of(one))
    other = jaxengine.load(theirs, plan=split.plan, mesh="data=4,tensor=2")  # the same plan again
    np.testing.assert_array_equal(of(other), of(one))


@pytest.mark.parametrize(
    ("sharding", "mesh", "wanted"),
    [
        ("fsdp", "fsdp=8", 0),
        ("data", "data=8", 0),
        ("tensor", "data=4,tensor=2", 2),
        ("fsdp+tensor", "fsdp=2,tensor=4", 4),
    ],
)
def test_only_inputs_that_are_split_have_parts(sharding: str, mesh: str, wanted: int) -> None:
    """Under fully sharded weights a matrix is brought together before it is used, and its inputs are whole."""
    text = "int4:group_size=32,act_order=true"
    plan = Plan(weights=text, dtype="float32", mesh=mesh, sharding=sharding)
    arch = architecture(RAW)
    found = orders.over_mesh(arch, plan, make_mesh(mesh))
    for name, spec in arch.specs().items():
        if spec.out is not None:
            parts = wanted if name.endswith((".o", ".down")) else 0
            given = plan.format_of(name, spec)
            assert found.format_of(name, spec) == (given.replace("true", str(parts)) if parts else given)
    assert (found is plan) == (not wanted)
    # layers of their own formats
    mixed = Plan(weights="int8", dtype="float32", weight_rules=(("layers.1.o", text),), mesh=mesh, sharding=sharding)
    rules = orders.over_mesh(arch, mixed, make_mesh(mesh)).weight_rules
    new = (("layers.1.o", text.replace("true", str(wanted))),) if wanted else ()
    assert rules == (*new, ("layers.1.o", text))


@pytest.mark.parametrize(
    ("group_size", "devices", "whole"), [(128, 2, False), (32, 4, False), (32, 8, True), (32, 3, True)]
)
def test_an_order_stays_whole_where_parts_would_take_more_than_no_format(
    group_size: int, devices: int, whole: bool
) -> None:
    """o of an 8B model: 4.5 bits a number whole in groups of 32, 14.4 in 4 parts, 23.8 in 8; 16 in bfloat16."""
    raw = RAW | {"hidden_size": 4096, "num_attention_heads": 48, "num_key_value_heads": 48, "head_dim": 128}
    plan = Plan(weights=f"int4:group_size={group_size},act_order=true", dtype="bfloat16", sharding="tensor")
    found = orders.over_mesh(architecture(raw), plan, abstract_mesh(f"tensor={devices}"))
    o = found.format_of("layers.0.o", architecture(raw).specs()["layers.0.o"])
    assert o.endswith("act_order=true") == whole


@pytest.mark.parametrize(
    ("devices", "near"), [(3, "2 devices (tensor=2)"), (5, "2 or 4 devices (tensor=4)"), (6, ""), (2, None)]
)
def test_orders_that_stay_whole_are_told_once(devices: int, near: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Of all layers in one line: which matrices, why, and what would split them."""
    plan = Plan(weights="int4:group_size=128,act_order=true", dtype="bfloat16", sharding="tensor")
    found = orders.over_mesh(architecture(RAW | {"num_hidden_layers": 8}), plan, abstract_mesh(f"tensor={devices}"))
    if near is None:
        assert not caplog.messages
        return
    assert found == plan
    (told,) = caplog.messages
    assert told.startswith(
        "layers.*.down, layers.*.o: orders of columns (act_order) stay whole, and each device gathers"
    )
    assert f"over {devices} devices, and an order is resolved in 2, 4, 8, 16 parts. Split over {near}" in told


def test_parts_that_take_too_much_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(weights="int4:group_size=16,act_order=true", dtype="bfloat16", sharding="tensor")
    orders.over_mesh(architecture(RAW), plan, abstract_mesh("tensor=4"))
    (told,) = caplog.messages
    assert re.match(
        r"layers\.\*\.down, layers\.\*\.o: .*: in 4 parts they would take more bytes than in bfloat16; larger groups",
        told,
    )


IMPORTED = "int4:group_size=32,affine=true,scale=float16"


@pytest.mark.parametrize(
    ("matrix", "text", "said"),
    [
        ("o", f"{IMPORTED},act_order=3", r"act_order is '3'; it can be false, true, 2, 4, 8, 16\. Nearest: 2 or 4"),
        ("o", f"{IMPORTED},act_order=yes", r"act_order is 'yes'; .*Nearest: true"),
        ("o", f"{IMPORTED},actorder=2", r"no option 'actorder'; .*Did you mean 'act_order'"),
        ("o", IMPORTED, rf"codes are in an order.* Nearest: 'layers\.\*\.o={IMPORTED},act_order=true'; or leave it out"),
        ("o", "int4:act_order=2", rf"layers\.0\.o is stored as .*nothing else\. Nearest: 'layers\.\*\.o={IMPORTED},act_order=2'"),
        ("down", f"{IMPORTED},act_order=2", rf"stands in the rows .* Nearest: 'layers\.\*\.down={IMPORTED}'"),
    ],
)  # fmt: skip
def test_a_rule_that_spells_an_order_otherwise_is_refused_with_the_nearest(
    matrix: str, text: str, said: str, tmp_path: Path
) -> None:
    theirs, _ = folders(gptq(act_order=True), tmp_path, RAW)
    rule = f"layers.*.{matrix}"
    with pytest.raises(ValueError, match=f"^rule '{re.escape(rule)}={text}': .*{said}"):
        jaxengine.load(theirs, weight_rules={rule: text})
    (tmp_path / "plan.json").write_text(json.dumps({"dtype": "float32", "weight_rules": [[rule, text]]}))
    with pytest.raises(ValueError, match=f"^rule '{re.escape(rule)}={text}': "):
        jaxengine.load(theirs, plan=Plan.from_json((tmp_path / "plan.json").read_text()))


def test_the_case_is_one_with_an_order() -> None:
    assert CASES["gptq-act-order"][1].endswith("act_order=true")
