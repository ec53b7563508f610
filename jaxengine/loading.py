"""From a folder to a Model: read config.json, choose a plan, check everything, then read one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors import Reader
from jaxengine import placement
from jaxengine.architecture import Architecture, architecture
from jaxengine.config import ConfigError
from jaxengine.model import Model, Source
from jaxengine.plan import DTYPES, Plan, choose
from jaxengine.text import Tokenizer
from sharding.mesh import make_mesh

ORBAX = "orbax"  # the sub-folder of a saved model that holds its arrays
PLAN = "jaxengine_plan.json"


def load(
    folder: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    memory: str | int | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
    sharding: str | None = None,
    home: str | None = None,
    form: str | None = None,
    kv: str | None = None,
    kv_layout: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Load a Hugging Face checkpoint folder, or one that `Model.save` wrote, ready to generate.

    plan: every choice at once; the other arguments go before its fields. memory: a budget such as '16GB', which chooses
    the home. weights: the format of matrices ('dense', 'int8'). dtype: 'float32', 'bfloat16' or 'float16' (the
    checkpoint's own if not given). mesh: e.g. 'data=2,tensor=4' over the devices there are; sharding: the table of
    rules. home: 'device' or 'host'; form: 'unrolled' or 'scan'. kv: the cache's codec ('raw', 'int8'); kv_layout: the
    layout of sliding-window layers ('window', 'full'). progress: called with (name, bytes read, bytes in all).

    Raises ConfigError for a config that asks for what is not done, CheckpointError for missing, unexpected, misshapen,
    truncated or corrupt tensors, ValueError for a plan that cannot be; all before anything is allocated.
    """
    folder = Path(folder)
    raw = read_config(folder)
    arch = architecture(raw)
    with open_source(folder, arch) as source:
        given = {
            "weights": weights, "dtype": dtype, "mesh": mesh, "sharding": sharding, "home": home, "form": form,
            "kv_codec": kv, "kv_layout": kv_layout,
        }  # fmt: skip
        start = plan or saved_plan(folder) or Plan(dtype=checkpoint_dtype(raw, source))
        chosen = dataclasses.replace(start, **{k: v for k, v in given.items() if v is not None})
        if memory is not None:
            if home is not None:
                raise ValueError(
                    f"memory={memory!r} chooses the home, and home={home!r} was given too: give one of them"
                )
            chosen = choose(arch, chosen, memory)
        over = make_mesh(chosen.mesh or None)
        placement.check_sharding(arch, chosen, over)
        done = 0

        def track(name: str, size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(name, done, source.nbytes)

        params = placement.place(arch, chosen, over, source.read, track)
    return Model(arch, chosen, over, params, Source(raw, folder, source.weight_map, source.metadata), tokenizer(folder))


def tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None where it has none at all (a checkpoint of ids alone)."""
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return Tokenizer.from_folder(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands; CheckpointError if there is none or it is no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a Hugging Face checkpoint folder (config.json, *.safetensors)"
        )
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; a Hugging Face checkpoint folder has one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {type(raw).__name__}, not an object")
    return raw


def saved_plan(folder: Path) -> Plan | None:
    """The plan stored beside a checkpoint, if there is one."""
    path = folder / PLAN
    return Plan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclasses.dataclass
class HuggingFace:
    """A Hugging Face folder as a source of our parameters."""

    reader: Reader
    arch: Architecture

    def __enter__(self) -> HuggingFace:
        self._params = self.arch.params()
        self._table = self.arch.name_table()
        try:
            self.prefix = self._table.check(self.reader, self._params, self.arch.num_layers)
        except BaseException:
            self.reader.close()
            raise
        return self

    def __exit__(self, *stopped: object) -> None:
        self.reader.close()

    def read(self, name: str) -> np.ndarray:
        """One parameter in our shape and the file's dtype."""
        return self._table.read(self.reader, name, self._params)

    @property
    def nbytes(self) -> int:
        return sum(self.reader.info(n).nbytes for n in self.reader.names)

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of its matrices."""
        return {np.dtype(i.dtype).name for n in self.reader.names if len((i := self.reader.info(n)).shape) > 1}

    @property
    def weight_map(self) -> dict[str, str]:
        return dict(self.reader.weight_map)

    @property
    def metadata(self) -> dict[str, Any]:
        return {"files": dict(self.reader.metadata), "index": self.reader.index_metadata, "prefix": self.prefix}


def open_source(folder: Path, arch: Architecture) -> Any:
    """What the folder's arrays are read from: orbax where `Model.save(..., format='orbax')` wrote, else safetensors."""
    if (folder / ORBAX).is_dir():
        from jaxengine.orbax_source import Orbax

        return Orbax(folder / ORBAX, arch)
    return HuggingFace(Reader.open(folder), arch)


def checkpoint_dtype(raw: dict[str, Any], source: Any) -> str:
    """The dtype that a checkpoint is used in if nobody says: that of its matrices, or what config.json names."""
    stored = source.dtypes & set(DTYPES)
    if len(stored) == 1:
        return stored.pop()
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named in DTYPES:
        return named
    raise ConfigError(
        f"config.json names no dtype and the tensors are {', '.join(sorted(source.dtypes))}: say dtype='bfloat16',"
        f" 'float16' or 'float32'"
    )


def from_arrays(arch: Architecture, plan: Plan, arrays: dict[str, Any], raw: dict[str, Any] | None = None) -> Model:
    """A Model of parameters that are in memory ({name: array}), e.g. freshly initialised or trained ones."""
    over = make_mesh(plan.mesh or None)
    params = placement.place(arch, plan, over, lambda name: np.asarray(jax.device_get(arrays[name])))
    return Model(arch, plan, over, params, Source(raw or {}, None, {}, {}), None)
