"""The lossless code against the bits themselves: numpy's and ml_dtypes' view of bfloat16 is the oracle, and equality the bar.

tests/test_weights.py holds it to what every format promises.

I inputs, O outputs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles.golden import GOLDEN

import jaxengine
from checkpoints.safetensors import Reader, write_file
from jaxengine import formats, placement
from jaxengine.weights import _rows, lossless
from jaxengine.weights.base import contract, take
from sharding.mesh import make_mesh
from sharding.rules import Rules, named_sharding

U = 2.0**-24
CODES = ["lossless", "lossless:bits=3,escapes=64", "lossless:escapes=1"]
contract_jit = jax.jit(contract, static_argnums=0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """bfloat16 rows of different sizes."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0],) + (1,) * (len(shape) - 1)))
    return w.astype(ml_dtypes.bfloat16)


def as_bits(array: Any) -> np.ndarray:
    """Of bfloat16 numbers, or of float32 numbers that hold them."""
    found = np.asarray(array)
    if found.dtype != np.float32:
        return found.view(np.uint16)
    assert not (found.view(np.uint32) & 0xFFFF).any()
    return (found.view(np.uint32) >> 16).astype(np.uint16)


def outside(w: np.ndarray, window: int) -> np.ndarray:
    """How many numbers of each row have an exponent outside the fullest window, by trying each, also one narrower beside zero."""
    exponents = ((w.view(np.uint16) >> 7) & 0xFF).astype(int)
    inside = [((exponents >= b) & (exponents < b + window)).sum(1) for b in range(257 - window)]
    inside += [((exponents == 0) | ((exponents > b) & (exponents < b + window))).sum(1) for b in range(257 - window)]
    return exponents.shape[1] - np.max(inside, axis=0)


# --- every bit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lossless", "lossless:bits=3"])
def test_all_patterns_come_back(text: str) -> None:
    """The 65,536 of them, four to a row of ones: NaN's payloads, infinities, subnormal numbers, -0; few are in a window."""
    patterns = np.arange(2**16, dtype=np.uint16)
    np.random.default_rng(0).shuffle(patterns)
    w = np.full((2**14, 48), 0x3F80, np.uint16)
    w[:, 5:49:11] = patterns.reshape(-1, 4)
    fmt = formats.find(text)
    leaf = jax.jit(lambda w: fmt.encode(w, out=1))(jnp.asarray(w.view(ml_dtypes.bfloat16)))
    lossless.check(leaf)
    assert int(leaf.count.max()) == 4
    np.testing.assert_array_equal(jax.jit(lambda w: w.bits())(leaf), w)
    np.testing.assert_array_equal(as_bits(jax.jit(lambda w: w.dense())(leaf)), w)
    ids = np.arange(0, 2**14, 3)
    np.testing.assert_array_equal(as_bits(take(leaf, jnp.asarray(ids), jnp.float32)), w[ids])


@pytest.mark.parametrize("bits", [4, 3])
def test_a_row_of_one_exponent_needs_no_escape(bits: int) -> None:
    w = np.arange(2**16, dtype=np.uint16).reshape(2, 256, 128).transpose(1, 0, 2)  # [exponent, sign, mantissa]
    leaf = lossless.encode(jnp.asarray(w.view(ml_dtypes.bfloat16)), out=1, bits=bits)
    assert not np.asarray(leaf.count).any()
    np.testing.assert_array_equal(leaf.bits(), w)


@pytest.mark.parametrize("text", CODES)
def test_zeros_take_no_room(text: str) -> None:
    """Pruned rows, padded ones, rows of zeros alone, with subnormal numbers and -0 among them, and zeros that are escapes."""
    rng, window = np.random.default_rng(0), 8 if "bits=3" in text else 16
    w = (rng.choice([-1, 1], (6, 512)) * 2.0 ** rng.integers(0, window - 1, (6, 512))).astype(ml_dtypes.bfloat16)
    w[0, rng.random(512) < 0.9] = 0
    w[1, 100:] = -0.0
    w[2] = 0
    w.view(np.uint16)[3, ::7] = rng.integers(0, 128, 74)
    w[4, :3] = 0
    w[4, 3:] *= (2.0 ** rng.integers(0, 2, 509)).astype(ml_dtypes.bfloat16)  # the whole window is needed
    leaf = formats.find(text).encode(jnp.asarray(w), out=1)
    lossless.check(leaf)
    np.testing.assert_array_equal(np.asarray(leaf.count), outside(w, window))
    assert not np.asarray(leaf.count)[:4].any()
    assert (np.asarray(leaf.base) >= lossless.ZERO).tolist() == [True, True, False, True, False, False]
    np.testing.assert_array_equal(leaf.bits(), w.view(np.uint16))
    x = jnp.asarray(rng.normal(size=(1, 3, 512)), jnp.float32)
    np.testing.assert_array_equal(contract("btd,fd->btf", x, leaf), contract("btd,fd->btf", x, jnp.asarray(w)))


@pytest.mark.parametrize("text", CODES)
@pytest.mark.parametrize(("shape", "out"), [((16, 1000), 1), ((3, 5, 8, 24), 2), ((7, 1), 1), ((4, 6, 50), 1)])
@pytest.mark.some_rows
def test_any_shape_comes_back(text: str, shape: tuple[int, ...], out: int) -> None:
    w = normal(*shape)
    leaf = formats.find(text).encode(jnp.asarray(w), out=out)
    window = 8 if "bits=3" in text else 16
    flat = w.reshape(int(np.prod(shape[:out])), -1)
    np.testing.assert_array_equal(np.asarray(leaf.count).reshape(-1), outside(flat, window))
    lossless.check(leaf)
    np.testing.assert_array_equal(leaf.bits(), w.view(np.uint16))


def test_what_is_not_bfloat16_is_rounded_as_ml_dtypes_rounds_it() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (2048, 4), dtype=np.uint32)  # rows with room for whatever they hold
    bits[:8] = np.array(
        [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x80000001, 0x3F808000]
    )[:, None]
    w = bits.view(np.float32)
    found = np.asarray(lossless.encode(jnp.asarray(w), out=1).bits())
    nan = np.isnan(w)
    np.testing.assert_array_equal(found[~nan], w[~nan].astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(found.view(ml_dtypes.bfloat16)[nan].astype(np.float32)).all()
    half = rng.normal(size=(8, 64)).astype(np.float16)
    np.testing.assert_array_equal(
        lossless.encode(jnp.asarray(half), out=1).bits(), half.astype(ml_dtypes.bfloat16).view(np.uint16)
    )


# --- contracting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "limit"), [("lossless", lossless.LIMIT), ("lossless:bits=3", 2**13), ("lossless", 1)])
def test_blocks_give_the_same_product_and_gradient(text: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """O is no multiple of the blocks."""
    monkeypatch.setattr(lossless, "LIMIT", limit)
    w = normal(6, 19, 10, 32)
    leaf, exact = formats.find(text).encode(jnp.asarray(w), out=2), w.astype(np.float64)
    for rows, dtype in ((5, "bfloat16"),) if limit == 2**13 else ((1, "bfloat16"), (5, "float32")):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(1, rows, 10, 32)), dtype)
        y, pull = jax.vjp(jax.jit(lambda x: contract("btij,nhij->btnh", x, leaf)), x)
        u, x64 = float(ml_dtypes.finfo(dtype).eps) / 2, np.asarray(x).astype(np.float64)
        reach = np.einsum("btij,nhij->btnh", abs(x64), abs(exact))
        error = abs(np.asarray(y).astype(np.float64) - np.einsum("btij,nhij->btnh", x64, exact))
        assert (error <= (u + 330 * U) * reach).all()
        g = jnp.asarray(np.random.default_rng(2).normal(size=y.shape), dtype)
        g64 = np.asarray(g).astype(np.float64)
        reach = np.einsum("btnh,nhij->btij", abs(g64), abs(exact))
        blocks = min(6 * 19, 6 * 19 * 320 // limit + 1)  # a block's part of a sum is rounded to g's dtype
        error = abs(np.asarray(pull(g)[0]).astype(np.float64) - np.einsum("btnh,nhij->btij", g64, exact))
        assert (error <= (2 * u + (6 * 19 + blocks + 8) * U) * reach).all()


def test_the_product_is_the_dense_ones_bit_for_bit() -> None:
    """In one block it is the same dot of the same numbers."""
    w = jnp.asarray(normal(96, 256))
    leaf = formats.find("lossless").encode(w, out=1)
    for rows, dtype in ((1, "bfloat16"), (7, "float32")):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(1, rows, 256)), dtype)
        np.testing.assert_array_equal(contract_jit("btd,fd->btf", x, leaf), contract_jit("btd,fd->btf", x, w))


def test_a_compiled_product_never_holds_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    O, I = 1024, 512  # noqa: E741
    monkeypatch.setattr(lossless, "LIMIT", O * I // 64)
    leaf = jax.eval_shape(lambda w: lossless.encode(w, out=1), jax.ShapeDtypeStruct((O, I), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, 16, I), jnp.bfloat16)

    def forward(x: Any, w: Any) -> Any:
        return contract("btd,fd->btf", x, w)

    def both(x: Any, w: Any) -> Any:
        return jax.value_and_grad(lambda x: forward(x, w).astype(jnp.float32).sum())(x)

    for run in (forward, both):
        compiled: Any = jax.jit(run).lower(x, leaf).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < O * I // 2, run
        for dtype in ("bf16", "f32", "u16"):
            assert f"{dtype}[{O},{I}]" not in compiled.as_text(), (run, dtype)
            assert f"{dtype}[64,16,{I}]" not in compiled.as_text(), (run, dtype)  # nor as what a loop has stacked


@pytest.mark.parametrize("text", ["lossless", "lossless:bits=3,escapes=40"])
def test_a_block_of_rows_after_another_is_encoded_as_all_at_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the blocks do not divide, and two out dims."""
    w, options = jnp.asarray(normal(7, 5, 64)), dict(formats.find(text).options)
    encode = lossless.encode.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    whole = encode(w, out=2, **options)
    monkeypatch.setattr(_rows, "ENCODED", 300)
    found = encode(w, out=2, **options)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert jax.tree.structure(found) == jax.tree.structure(whole)


NEWER = jax.__version_info__ >= (0, 11)


def test_encoding_takes_little_beside_what_it_makes() -> None:
    """All at once it is 12 bytes a weight; by blocks, those of a block and the codes once more (jax 0.10.2: 5.7 a weight)."""
    O, I = 8192, 2048  # noqa: E741
    w = jax.ShapeDtypeStruct((O, I), jnp.bfloat16)
    compiled: Any = jax.jit(lambda w: lossless.encode(w, out=1)).lower(w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (1.6 if NEWER else 5.9) * O * I + 14 * _rows.ENCODED


@pytest.mark.parametrize(("split", "parts"), [("mlp", (4, 1)), ("embed", (1, 4))])
def test_split_over_a_mesh_along_either_dim(
    split: str, parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "LIMIT", 1024)
    monkeypatch.setattr(_rows, "ENCODED", 1024)
    fmt, w, mesh = formats.find("lossless:bits=3"), normal(16, 512), make_mesh("data=2,tensor=4")
    rules = Rules([("mlp", "tensor" if split == "mlp" else None), ("embed", "tensor" if split == "embed" else None)])
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    places = jax.tree.map(lambda a: named_sharding(rules, mesh, a), fmt.leaf_axes(("mlp", "embed"), 1), is_leaf=is_axes)
    made = jax.jit(lambda w: fmt.encode(w, out=1), out_shardings=places)(jnp.asarray(w))
    np.testing.assert_array_equal(jax.jit(lambda w: w.bits())(made), w.view(np.uint16))
    for a in (made.rest, made.index):
        shard = a.addressable_shards[0].data.shape
        assert tuple(n // s for n, s in zip(a.shape, shard, strict=True)) == parts
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 512)), jnp.float32)
    x64, exact = np.asarray(x, np.float64), w.astype(np.float64)
    error = abs(np.asarray(contract_jit("btd,fd->btf", x, made), np.float64) - np.einsum("btd,fd->btf", x64, exact))
    assert (error <= 520 * U * np.einsum("btd,fd->btf", abs(x64), abs(exact))).all()


def test_a_stack_is_dense_too() -> None:
    layers = [normal(3, 5, 7, seed=seed) for seed in range(2)]
    leaves = [lossless.encode(jnp.asarray(w), out=2) for w in layers]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)
    assert stacked.shape == (2, 3, 5, 7)
    np.testing.assert_array_equal(stacked.bits(), np.stack([w.view(np.uint16) for w in layers]))


# --- what does not fit --------------------------------------------------------------------------------------------


def with_escapes(count: int, inputs: int = 2048) -> np.ndarray:
    """One row of three has so many numbers 40 powers of two below the others."""
    w = np.ones((3, inputs), ml_dtypes.bfloat16)
    w[1, 7 : 7 + count] = 2.0**-40
    return w


@pytest.mark.parametrize(
    ("text", "count", "near"),
    [
        ("lossless", 9, "lossless:escapes=8, or weights='dense'"),
        ("lossless:escapes=1", 5, "lossless:escapes=4, or weights='dense'"),
        ("lossless", 128, "lossless:escapes=64, or weights='dense'"),
        ("lossless", 129, "weights='dense'"),
        ("lossless:bits=3,escapes=8", 30, "lossless:bits=3,escapes=16, or weights='lossless'"),
        ("lossless:bits=3", 70, "lossless:bits=3,escapes=40, or weights='lossless'"),
        ("lossless:bits=3", 90, "weights='lossless', whose window is wider"),
    ],
)
def test_a_row_with_too_many_escapes_is_refused(text: str, count: int, near: str) -> None:
    fmt = formats.find(text)
    leaf = fmt.encode(jnp.asarray(with_escapes(count)), out=1)
    room = leaf.place.shape[-1]
    assert room < count
    with pytest.raises(ValueError, match=r"layers\.3\.q: a row of 2048 numbers has") as error:
        fmt.check("layers.3.q", leaf)
    assert f"has {count} outside its {8 if 'bits=3' in text else 16} " in str(error.value)
    assert f"has room for {room}: say {near}" in str(error.value)
    assert np.isinf(np.asarray(jax.jit(lambda w: w.error_bound())(leaf))).all(1).tolist() == [False, True, False]
    if "escapes=" in near:
        fits = formats.find(near.split(", or")[0])
        held = fits.encode(jnp.asarray(with_escapes(count)), out=1)
        fits.check("it", held)
        np.testing.assert_array_equal(held.bits(), with_escapes(count).view(np.uint16))


def bfloat16_folder(to: Path, change: Any = None) -> Path:
    shutil.copytree(GOLDEN / "llama", to, ignore=shutil.ignore_patterns("golden.npz", "*.safetensors"))
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | {"dtype": "bfloat16"}))
    with Reader.open(GOLDEN / "llama") as reader:
        tensors = {n: reader.read(n).astype(ml_dtypes.bfloat16) for n in reader.names}
    if change is not None:
        change(tensors)
    specs = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_file(to / "model.safetensors", specs, lambda n: tensors[n], {"format": "pt"})
    return to


@pytest.mark.parametrize("home", ["device", "disk"])
def test_loading_names_the_matrix_that_does_not_fit(home: str, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, :9] *= ml_dtypes.bfloat16(2.0**-60)

    folder = bfloat16_folder(tmp_path / "in", spoil)
    with pytest.raises(
        ValueError, match=r"layers\.1\.up: a row of \d+ numbers has 9 outside .* say weights='dense' for it"
    ):
        jaxengine.load(folder, weights="lossless", home=home, disk=tmp_path / "disk" if home == "disk" else None)


def test_another_dtype_is_refused_where_it_would_be_lost() -> None:
    refused = r"weights='lossless' for layers\.0\.\w+: it is float32, and lossless holds bfloat16 .* dtype='bfloat16'"
    with pytest.raises(ValueError, match=refused):
        jaxengine.load(GOLDEN / "llama", weights="lossless")
    assert lossless.refuses("bfloat16", "float32") is None
    assert lossless.refuses("float16", "bfloat16") is None
    assert "it is float16" in (lossless.refuses("float16", "float16") or "")


# --- whole models -------------------------------------------------------------------------------------------------


def test_a_model_gives_the_same_logits_bit_for_bit_and_is_saved_and_read_back(tmp_path: Path) -> None:
    """Stacked in host memory; out as plain weights; through orbax, and each layer alone again."""
    folder, text = bfloat16_folder(tmp_path / "in"), "lossless:bits=3,escapes=64"
    held = jaxengine.load(folder, weights=text, home="host")
    plain = jaxengine.load(folder, home="host")
    ids = np.random.default_rng(0).integers(0, 100, (2, 16))
    np.testing.assert_array_equal(held.logits(ids), plain.logits(ids))
    held.save(tmp_path / "hf")
    with Reader.open(tmp_path / "hf") as one, Reader.open(folder) as two:
        assert set(one.names) == set(two.names)
        for name in one.names:
            np.testing.assert_array_equal(one.read(name).view(np.uint16), two.read(name).view(np.uint16))
    held.save(tmp_path / "orbax", format="orbax")
    again = jaxengine.load(tmp_path / "orbax")
    assert again.plan.weights == text
    of = lambda m: placement.stored(m.architecture, m.plan, m.params)  # noqa: E731
    for one, two in zip(of(held).values(), of(again).values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one(), two())


def test_a_pruned_and_padded_model_is_held(tmp_path: Path) -> None:
    """Two of four numbers are zero, and of one matrix nine rows of ten."""

    def prune(tensors: dict[str, np.ndarray]) -> None:
        for t in tensors.values():
            if t.ndim == 2:
                t.reshape(-1, 4)[:, 1:3] = 0
        tensors["model.layers.1.mlp.up_proj.weight"][
            np.arange(len(tensors["model.layers.1.mlp.up_proj.weight"])) % 10 > 0
        ] = 0

    folder, ids = bfloat16_folder(tmp_path / "in", prune), [[3, 1, 4, 1, 5]]
    held, plain = (jaxengine.load(folder, weights=text) for text in ("lossless", "dense"))
    np.testing.assert_array_equal(held.logits(ids), plain.logits(ids))


def test_a_model_says_its_share_of_the_dtypes_bytes() -> None:
    text = repr(jaxengine.load(jaxengine.demo_folder(), weights="lossless", home="host"))
    # of each layer 1,152 rows of 128 inputs and 128 of 384; a row's base, count and four escapes are 11 bytes, or 16
    layer = 1152 * (128 + 64 + 11) + 128 * (384 + 192 + 16)
    matrices, others = 1152 * 128 + 128 * 384, 2048 * 128 + 9 * 128
    share = (4 * layer + 2 * others) / (2 * (4 * matrices + others))
    assert f"({share:.3f} of bfloat16's), weights='lossless'" in text


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        # 8 + 4, and a row's base and count (4 bytes) and 16 escapes of 3 bytes
        ("lossless", (8, 4096), 12 + 8 * 52 / 4096),
        ("lossless:escapes=1", (8, 4096), 12 + 8 * 16 / 4096),
        ("lossless:bits=3", (8, 4096), 11 + 8 * (4 + 128 * 3) / 4096),
        ("lossless", (8, 128), 12 + 8 * (3 + 4 * 2) / 128),  # a short row's places and count are bytes
        ("lossless", (2, 70000), 12 + 8 * (6 + 274 * 5 + 0.5 * 16) / 70000),  # 70,016 indices
    ],
)
def test_bits_per_weight(text: str, shape: tuple[int, int], bits: float) -> None:
    leaf = jax.eval_shape(lambda w: formats.find(text).encode(w, out=1), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    stored = sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    np.testing.assert_allclose(stored / (shape[0] * shape[1]), bits, rtol=1e-4)
