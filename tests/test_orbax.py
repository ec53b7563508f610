"""checkpoints.orbax against orbax itself: what is saved here is restored with plain orbax and no code of ours (v0's
checkpointers and v1's load, other meshes, pinned host memory), and what plain orbax saves is read here.

L layers, N query heads, H head dim, D model, V vocab.
"""

import asyncio
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints import CheckpointError
from checkpoints.orbax import OrbaxReader, Stored, save
from checkpoints.output import output_folder

L, N, H, D, V = 4, 8, 2, 48, 16  # a layer of q is over the 1024 bytes up to which the container keeps values inline
BF16 = np.dtype(ml_dtypes.bfloat16)
TENSORS = {
    "layers.attention.q": Stored((N, H, D), BF16, L),
    "layers.mlp.codes": Stored((D, 4), np.dtype(np.uint8), L),
    "layers.mlp.signed": Stored((D, 4), np.dtype(np.int8), L),
    "layers.norm": Stored((D,), np.dtype(np.float32), L),
    "layers.scale": Stored((), np.dtype(np.float16), L),
    "embedding": Stored((V, D), BF16),
    "step": Stored((), np.dtype(np.int32)),
}
SPECS = {
    "layers.attention.q": P(None, "x", "y"),
    "layers.mlp.codes": P("x"),
    "embedding": P(("x", "y")),
}


def values() -> dict[str, np.ndarray]:
    """Random bits' worth of small numbers, and all zeros in one: a chunk of zeros must be on disk too."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 100, stored.full).astype(stored.dtype) for name, stored in TENSORS.items()}
    arrays["layers.mlp.signed"][1] = 0
    return arrays


ARRAYS = values()


def read(name: str, layer: int | None) -> np.ndarray:
    return ARRAYS[name] if layer is None else ARRAYS[name][layer]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    with output_folder(folder) as work:
        save(work, TENSORS, read)
        (work / "config.json").write_text("{}")  # what stands beside the arrays must not disturb orbax
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, (*path, key)) if isinstance(value, Mapping) else {".".join((*path, key)): value}
    return result


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def targets(shape: tuple[int, int], kind: str) -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("x", "y"))
    return nested(
        {
            name: jax.ShapeDtypeStruct(
                stored.full, stored.dtype, sharding=NamedSharding(mesh, SPECS.get(name, P()), memory_kind=kind)
            )
            for name, stored in TENSORS.items()
        }
    )


def same(tree: Mapping[str, Any]) -> None:
    found = flat(tree)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, strict=True)


# -- plain orbax restores it


def test_plain_orbax_restores_to_numpy(saved: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(saved))
    with ocp.PyTreeCheckpointer() as checkpointer:
        same(checkpointer.restore(saved))


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
@pytest.mark.parametrize("shape", [(4, 2), (2, 1), (1, 1)])
def test_plain_orbax_restores_onto_a_mesh(saved: Path, shape: tuple[int, int], kind: str) -> None:
    wanted = targets(shape, kind)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved, wanted)
    same(tree)
    for name, leaf in flat(tree).items():
        assert leaf.sharding == flat(wanted)[name].sharding
        assert leaf.sharding.memory_kind == kind
        assert ("<host>" in str(jax.typeof(leaf))) == (kind == "pinned_host")


def test_the_next_generation_of_orbax_restores_it(saved: Path) -> None:
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    same(v1.load(saved))
    same(v1.load(saved, targets((2, 2), "pinned_host")))


def test_one_chunk_per_layer_by_orbax_own_word(saved: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = flat(checkpointer.metadata(saved).item_metadata.tree)
    for name, stored in TENSORS.items():
        assert found[name].shape == stored.full
        assert found[name].dtype == stored.dtype
        if stored.layers is not None:
            assert found[name].storage.chunk_shape == (1, *stored.shape)


def test_one_layer_is_read_alone(saved: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all other layers may be destroyed: chunk l is in the file that holds its bytes, and nowhere else."""
    chunk = ARRAYS["layers.attention.q"][2].tobytes()
    holding = [file for file in (copy / "d").iterdir() if chunk in file.read_bytes()]
    assert len(holding) == 1
    for layer in (0, 1, 3):
        other = ARRAYS["layers.attention.q"][layer].tobytes()
        for file in (copy / "d").iterdir():
            data = file.read_bytes()
            if other in data:
                file.write_bytes(data.replace(other, b"\xff" * len(other)))
    with OrbaxReader.open(copy) as reader:
        np.testing.assert_array_equal(reader.read("layers.attention.q", 2), ARRAYS["layers.attention.q"][2])
        for layer in (0, 1, 3):
            with pytest.raises(CheckpointError, match=rf"'layers\.attention\.q', layer {layer}, is damaged"):
                reader.read("layers.attention.q", layer)


# -- reading


def test_reading_it_back(saved: Path) -> None:
    with OrbaxReader.open(saved) as reader:
        assert set(reader.names) == TENSORS.keys()
        for name, stored in TENSORS.items():
            info = reader.info(name)
            assert (info.shape, info.dtype) == (stored.full, stored.dtype)
            np.testing.assert_array_equal(reader.read(name), ARRAYS[name], strict=True)
            for layer in range(stored.layers or 0):
                np.testing.assert_array_equal(reader.read(name, layer), ARRAYS[name][layer], strict=True)
        assert "step" in reader
        with pytest.raises(CheckpointError, match="no array 'steps'"):
            reader.read("steps")
        for layer in (-1, L):
            with pytest.raises(ValueError, match=f"layer={layer} of layers.norm"):
                reader.read("layers.norm", layer)
        with pytest.raises(ValueError, match="layer=0 of step"):
            reader.read("step", 0)


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_what_plain_orbax_saves_is_read(tmp_path: Path, use_ocdbt: bool, use_zarr3: bool) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    q = ARRAYS["layers.attention.q"]
    tree = {
        "layers": {"q": jax.device_put(q, NamedSharding(mesh, P(None, "x", "y")))},
        "list": [np.arange(3, dtype=np.int8), {"x": np.ones((2, 2), np.float32)}],
        "step": 3,
        "name": "a string",
        "empty": {},
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", args=ocp.args.PyTreeSave(tree))
    with OrbaxReader.open(tmp_path / "theirs") as reader:
        assert set(reader.names) == {"layers.q", "list.0", "list.1.x", "step"}
        np.testing.assert_array_equal(reader.read("layers.q"), q, strict=True)
        np.testing.assert_array_equal(reader.read("layers.q", 3), q[3], strict=True)
        np.testing.assert_array_equal(reader.read("list.0"), np.arange(3, dtype=np.int8), strict=True)
        assert reader.read("step") == 3


def test_items_and_steps_of_a_training_run(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": np.arange(4)}))
        manager.wait_until_finished()
    with OrbaxReader.open(tmp_path / "run" / "5") as reader:
        assert reader.read("w").tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match=r"1 steps of a training run.*run/5"):
        OrbaxReader.open(tmp_path / "run")


# -- streaming


def test_nothing_that_was_read_is_kept(tmp_path: Path) -> None:
    """When a layer is asked for, the ones before are gone: what bounds host memory is one piece, not one stack."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    order: list[tuple[str, int | None]] = []

    def fresh(name: str, layer: int | None) -> np.ndarray:
        nonlocal most
        order.append((name, layer))
        most = max(most, sum(ref() is not None for ref in alive))
        array = np.full(tensors[name].shape, layer or 0, np.uint8)
        alive.append(weakref.ref(array))
        return array

    tensors = {"layers.a": Stored((64, 1024), np.dtype(np.uint8), 12), "b": Stored((32, 1024), np.dtype(np.uint8))}
    written: list[int] = []
    save(tmp_path / "x", tensors, fresh, progress=written.append)
    assert most == 0
    assert order == [("layers.a", layer) for layer in range(12)] + [("b", None)]
    assert sum(written) == sum(stored.nbytes for stored in tensors.values())
    assert len(written) == 13


def test_inside_a_running_event_loop(tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell() -> np.ndarray:
        save(tmp_path / "x", {"layers.norm": TENSORS["layers.norm"]}, read)
        with OrbaxReader.open(tmp_path / "x") as reader:
            return reader.read("layers.norm")

    np.testing.assert_array_equal(asyncio.run(cell()), ARRAYS["layers.norm"])


def test_large_arrays_outside_the_layers_are_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.orbax._CHUNK", 1000)
    array = np.arange(103 * 7, dtype=np.int32).reshape(103, 7)
    save(tmp_path / "x", {"embedding": Stored(array.shape, array.dtype)}, lambda name, layer: array)
    with OrbaxReader.open(tmp_path / "x") as reader:
        assert reader.info("embedding").chunk == (35, 7)  # 2884 bytes in 3 pieces
        np.testing.assert_array_equal(reader.read("embedding"), array, strict=True)
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / "x")["embedding"], array)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.bool_, np.float64, np.int64])
def test_other_dtypes(tmp_path: Path, dtype: type) -> None:
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    save(tmp_path / "x", {"layers.a": Stored((3,), array.dtype, 2)}, lambda name, layer: array[layer])
    with OrbaxReader.open(tmp_path / "x") as reader:
        np.testing.assert_array_equal(reader.read("layers.a"), array, strict=True)
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / "x")["layers"]["a"], array, strict=True)


# -- what cannot be saved


def test_refused_before_anything_is_written(tmp_path: Path, saved: Path) -> None:
    i8 = np.dtype(np.int8)
    for tensors, message in (
        ({}, "nothing to save"),
        ({"a": Stored((2,), i8), "a.b": Stored((2,), i8)}, r"'a\.b' is both"),
        ({"a.b": Stored((2,), i8), "a": Stored((2,), i8)}, "'a' is both"),
        ({"a..b": Stored((2,), i8)}, r"'a\.\.b' cannot be an orbax name"),
        ({"a/b": Stored((2,), i8)}, "'a/b' cannot be an orbax name"),
        ({"a": Stored((2,), np.dtype(ml_dtypes.int4))}, "a is int4.*pack the codes in uint8"),
        ({"a": Stored((0, 2), i8)}, r"a has the shape \[0, 2\]"),
        ({"a": Stored((2,), i8, 0)}, r"a has the shape \[0, 2\]"),
        ({"a": Stored((2,), np.dtype("datetime64[s]"))}, "tensorstore"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "x", tensors, lambda name, layer: pytest.fail("read"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(CheckpointError, match="already holds an orbax checkpoint"):
        save(saved, TENSORS, lambda name, layer: pytest.fail("read"))


def test_an_array_that_is_not_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.a of layer 0 was announced as int8\[2\] and came as int8\[3\]"):
        save(tmp_path / "x", {"layers.a": Stored((2,), np.dtype(np.int8), 2)}, lambda n, i: np.zeros(3, np.int8))


# -- damage


def refused(place: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        OrbaxReader.open(place)


def test_places_without_a_checkpoint(tmp_path: Path, copy: Path) -> None:
    refused(tmp_path / "nowhere", "There is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not an orbax checkpoint")
    (copy / "_METADATA").unlink()
    refused(copy, "is not an orbax checkpoint")
    left = tmp_path / "a.orbax-checkpoint-tmp"
    left.mkdir()
    refused(left, "interrupted")


def test_several_items(tmp_path: Path, saved: Path) -> None:
    for item in ("a", "b"):
        shutil.copytree(saved, tmp_path / "both" / item)
    refused(tmp_path / "both", "several orbax items")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_metadata(copy: Path, text: str) -> None:
    (copy / "_METADATA").write_text(text)
    refused(copy, "orbax checkpoint|without any array")


def test_a_missing_container(copy: Path) -> None:
    (copy / "manifest.ocdbt").unlink()
    refused(copy, str(copy))


def test_a_damaged_container(copy: Path) -> None:
    (copy / "manifest.ocdbt").write_bytes(b"x" * 100)
    refused(copy, str(copy))


def test_missing_data(copy: Path) -> None:
    chunk = ARRAYS["layers.attention.q"][2].tobytes()
    (holding,) = [file for file in (copy / "d").iterdir() if chunk in file.read_bytes()]
    holding.unlink()
    with OrbaxReader.open(copy) as reader, pytest.raises(CheckpointError, match=r"'layers\.attention\.q', layer 2"):
        reader.read("layers.attention.q", 2)


def test_files_that_are_cut_after_opening(copy: Path) -> None:
    with OrbaxReader.open(copy) as reader:
        files = [p for p in copy.rglob("*") if p.is_file() and "d" in p.parts and p.stat().st_size > 1000]
        assert files
        for file in files:
            os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"array 'layers\.attention\.q', layer 3, is damaged: ") as refused:
            reader.read("layers.attention.q", 3)
    assert str(refused.value).startswith(f"{copy}: ")
    assert "\n" not in str(refused.value)


def test_a_flipped_bit_is_found(copy: Path) -> None:
    chunk = ARRAYS["layers.attention.q"][2].tobytes()
    (holding,) = [file for file in (copy / "d").iterdir() if chunk in file.read_bytes()]
    data = bytearray(holding.read_bytes())
    data[bytes(data).index(chunk) + 5] ^= 1
    holding.write_bytes(data)
    with OrbaxReader.open(copy) as reader:
        with pytest.raises(CheckpointError, match="is damaged"):
            reader.read("layers.attention.q", 2)
        reader.read("layers.attention.q", 1)


def test_chunks_that_were_never_written(tmp_path: Path) -> None:
    """A plain-file checkpoint from which a layer was deleted is refused when it is opened, not half-way through."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "x", args=ocp.args.PyTreeSave({"w": np.ones((2, 2)), "v": np.ones(2)}))
    (tmp_path / "x" / "w" / "0.0").unlink()
    refused(tmp_path / "x", "array 'w' has 0 of its 1 chunks")
    shutil.rmtree(tmp_path / "x" / "w")
    refused(tmp_path / "x", "w")
