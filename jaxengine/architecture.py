"""A checkpoint's config as abstract parameters: every shape, dtype and logical axis, and no array.

Layers of one kind run the same program and have like parameters. They are grouped into segments: a period of kinds,
repeated. Llama is one segment of period one; Gemma 2, whose windows alternate, is one of period two; Gemma 3's five to
one is one of period six and a remainder. A segment's repeats can be stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from checkpoints import quantized
from checkpoints.errors import CheckpointError
from checkpoints.table import Param
from jaxengine import technique
from jaxengine.config import ConfigError
from jaxengine.nn import Attention

MODELS = "jaxengine.models"


@dataclasses.dataclass(frozen=True)
class Spec:
    """An abstract parameter: shape, logical axes, and the number of leading output dims (None: not a matrix)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    out: int | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """`kinds` layers in a row, `repeats` times, the first of all being layer `start`."""

    kinds: tuple[Hashable, ...]
    repeats: int
    start: int

    @property
    def num_layers(self) -> int:
        return len(self.kinds) * self.repeats


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family and one of its configs. Hashable: what is compiled is keyed on it."""

    family: str
    config: Any

    @property
    def module(self) -> ModuleType:
        return technique.find(MODELS, self.family)

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        return self.config.kinds()

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(segments(self.kinds))

    def outer(self) -> tuple[Any, dict[str, Spec]]:
        """(graphdef, parameters) of what stands before and after the layers."""
        return _abstract(self, None, outer=True)

    def block(self, kind: Hashable) -> tuple[Any, dict[str, Spec]]:
        """(graphdef, parameters) of a layer of this kind."""
        return _abstract(self, kind, outer=False)

    def attention(self, kind: Hashable) -> Attention:
        """What a layer of this kind attends with."""
        return _attention(self, kind)

    @property
    def reread_at(self) -> int | None:
        """The number of tokens past which a row is read anew; None where that never happens."""
        found = [a.reread_at for a in map(self.attention, set(self.kinds)) if a.reread_at is not None]
        return min(found, default=None)

    def chunk(self, chunk: int, tokens: int) -> int:
        """The chunk in which a prompt padded to `tokens` is read; 0: in one piece. Where frequencies depend on the whole
        row's length (longrope), a row that may be a long one is."""
        turns = self.reread_at is not None and tokens > self.reread_at
        return 0 if not chunk or tokens <= chunk or tokens % chunk or turns else chunk

    def name_table(self) -> Any:
        """This family's names against Hugging Face's."""
        return self.module.name_table(self.config)

    def params(self) -> dict[str, Param]:
        """All parameters by name, as checkpoints know them: 'embedding', 'layers.3.q'."""
        found = {n: Param(s.shape, s.out) for n, s in self.outer()[1].items()}
        for i, kind in enumerate(self.kinds):
            found |= {f"layers.{i}.{n}": Param(s.shape, s.out) for n, s in self.block(kind)[1].items()}
        return found

    def specs(self) -> dict[str, Spec]:
        """All parameters by name with their logical axes."""
        found = dict(self.outer()[1])
        for i, kind in enumerate(self.kinds):
            found |= {f"layers.{i}.{n}": s for n, s in self.block(kind)[1].items()}
        return found


def architecture(raw: Mapping[str, Any]) -> Architecture:
    """The architecture that config.json describes; ConfigError names the field that is not supported."""
    model_type = raw.get("model_type")
    known = technique.names(MODELS)
    if model_type not in known:
        raise ConfigError(f"config.json: model_type is {model_type!r}; the families are {', '.join(known)}")
    packed = raw.get("quantization_config")
    if packed:
        try:
            quantized.method(packed)
        except CheckpointError as error:
            raise ConfigError(f"config.json: {error}") from None
    fields = {name: given for name, given in raw.items() if name != "quantization_config"}
    config = technique.find(MODELS, model_type).Config.from_dict(fields)
    return Architecture(model_type, config)


def segments(kinds: Sequence[Hashable]) -> Iterator[Segment]:
    """Cut a sequence of kinds into periods that repeat, each time the one that covers most layers."""
    start = 0
    while start < len(kinds):
        rest = kinds[start:]
        best = (1, 1)  # (layers covered, period)
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and repeats * period > best[0]:
                best = (repeats * period, period)
        covered, period = best
        yield Segment(tuple(rest[:period]), covered // period, start)
        start += covered


@functools.cache
def _abstract(architecture: Architecture, kind: Hashable, *, outer: bool) -> tuple[Any, dict[str, Spec]]:
    module, config = architecture.module, architecture.config
    if outer:
        made = nnx.eval_shape(lambda: module.Model(config, nnx.Rngs(0)))
    else:
        made = nnx.eval_shape(lambda: module.Block(config, kind, nnx.Rngs(0)))
    graphdef, state = nnx.split(made)
    specs = {}
    for path, variable in nnx.to_flat_state(state):
        meta = variable.get_metadata()
        name = ".".join(map(str, path))
        shape = tuple(variable.get_value().shape)
        specs[name] = Spec(shape, meta["axes"], meta["out"])
        if len(shape) != len(specs[name].axes):
            raise TypeError(f"{architecture.family}: {name} has shape {shape} and axes {specs[name].axes}")
    return graphdef, specs


@functools.cache
def _attention(architecture: Architecture, kind: Hashable) -> Attention:
    module, config = architecture.module, architecture.config
    return nnx.eval_shape(lambda: module.Block(config, kind, nnx.Rngs(0))).attention


def merge(graphdef: Any, weights: Mapping[str, Any]) -> Any:
    """The Flax module with these weights in it: {dotted name: array or Weight}."""
    flat = [(tuple(name.split(".")), nnx.Param(leaf)) for name, leaf in sorted(weights.items())]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def initialise(architecture: Architecture, seed: int) -> dict[str, jax.Array]:
    """Random parameters by name, float32, as the family draws them: for tests, benchmarks and training from scratch."""
    module, config = architecture.module, architecture.config
    found = _values(module.Model(config, nnx.Rngs(seed)))
    for i, kind in enumerate(architecture.kinds):
        block = _values(module.Block(config, kind, nnx.Rngs(seed + 1 + i)))
        found |= {f"layers.{i}.{n}": v for n, v in block.items()}
    return found


def _values(module: Any) -> dict[str, jax.Array]:
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(module))}
