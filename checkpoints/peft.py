"""Adapters in the layout of PEFT: a folder with adapter_config.json and adapter_model.safetensors, read and written.

LoRA (Hu et al., arXiv:2106.09685), its rank-stabilised scale (Kalajdzievski, arXiv:2312.03732) and DoRA (Liu et al.,
arXiv:2402.09353), of a matrix W [out, in]:

    W' = W + s B A                      s = alpha / r, or alpha / sqrt(r) where rank-stabilised
    W' = m (W + s B A) / |W + s B A|    DoRA: the norm of each row, one magnitude m for each output

Theirs are named by module: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r] and
.lora_magnitude_vector [out]; they are [out, r] also where the module stores its own matrix as [in, out] (GPT-2), so a
transposed row of the name table changes nothing here but one flag of their config. Ours have the matrix's own dims: a
[r, in...], b [out..., r], magnitude [out...].

**A module of theirs that is several matrices of ours** (Phi-3's qkv_proj). Reading: one A serves them all, B and the
magnitudes are cut along the outputs. Writing: matrices that share A become one adapter again. Those that do not are laid
out in blocks, A one above the other and B along a diagonal,

    [B_q A_q; B_k A_k] = diag(B_q, B_k) [A_q; A_k]

which is the same matrix exactly, with the ranks added; alpha grows with the rank so that s stays. (In PEFT the zeros
would train, too.) A B in such blocks is cut into them again when it is read, so a round trip gives back what went in. A
matrix without an adapter beside ones that have one gets zeros, except under DoRA, where it would need a magnitude that
only the base weights know: refused. Refused, too, are parts with different s, of which a module has one.

What is refused when reading is what would change the model in a way that a, b and the magnitude do not say: trained
biases and whole modules, adapters of embeddings (which act on look-ups only, not on a tied head), initialisations that
change the base weights (PiSSA and its like, unless saved as plain LoRA), and every option not known here.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.errors import CheckpointError, listing
from checkpoints.output import output_folder
from checkpoints.safetensors import Reader, write_file
from checkpoints.table import Param, Row, Table

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_OUTER = "base_model.model."  # PEFT's own wrappers around the causal-lm class
_LAYER = "{layer}"

# Modules that are look-up tables, whatever the family.
_LOOKUPS = ("embed_tokens", "embed_positions", "wte", "wpe")

# Entries of adapter_config.json that say how it was made or where it came from, and nothing of what it computes.
_HISTORY = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora",
    "use_rslora", "velora_config",
}  # fmt: skip
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # initialisations that leave W as it is
_PLAIN = "make a plain LoRA without it, or merge it into the model with PEFT (merge_and_unload) and load that"


@dataclass(frozen=True)
class Adapter:
    """One matrix's: a [r, in...], b [out..., r], and DoRA's magnitude [out...] (None: LoRA)."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterConfig:
    """What all adapters of a folder have in common.

    rank_pattern, alpha_pattern: {our full name: value} of the matrices that differ from `rank` and `alpha`. targets: the
    module names that adapter_config.json lists (or its one pattern); writing makes them anew from the adapters. dropout
    is for whoever trains on.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    targets: tuple[str, ...] = ()
    base_model: str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for what, ranks in (("rank", [self.rank]), ("rank_pattern", self.rank_pattern.values())):
            if bad := [r for r in ranks if not _is_rank(r)]:
                raise ValueError(f"{what} has {bad[0]!r}; a rank is a whole number from 1 on, such as 8")
        for what, alphas in (("alpha", [self.alpha]), ("alpha_pattern", self.alpha_pattern.values())):
            if bad := [a for a in alphas if not _is_number(a)]:
                raise ValueError(f"{what} has {bad[0]!r}; it is a finite number, often twice the rank")

    def scale(self, name: str) -> float:
        """s of our matrix `name`."""
        return _scale(
            self.alpha_pattern.get(name, self.alpha), self.rank_pattern.get(name, self.rank), rslora=self.rslora
        )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _scale(alpha: float, rank: int, *, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _alpha(scale: float, rank: int, *, rslora: bool) -> float:
    """The alpha that makes this scale; 15 digits, so that what was 16 is 16 again."""
    return float(f"{scale * (math.sqrt(rank) if rslora else rank):.15g}")


# ---------------------------------------------------------------------------------------------------------------------
# Modules of theirs


class _Module(NamedTuple):
    """A matrix module of theirs: the names and parameters of ours that it is, in order along its outputs."""

    name: str
    ours: tuple[str, ...]
    params: tuple[Param, ...]
    transposed: bool

    @property
    def outs(self) -> list[int]:
        return [param.flat[0] for param in self.params]


def _modules(table: Table, params: Mapping[str, Param], num_layers: int, prefix: str) -> dict[str, _Module]:
    """Every module of the model that can have an adapter, by their name, spelt with `prefix`."""
    found: dict[str, _Module] = {}
    for theirs in table.theirs(params, num_layers, prefix):
        name, dot, kind = theirs.rpartition(".")
        if not dot or kind != "weight" or name.rpartition(".")[2] in _LOOKUPS:
            continue
        ours = table.parts(theirs, params)
        rows = [_row(table, one) for one in ours]
        own = tuple(params.get(one, params.get(pattern)) for one, (_, pattern) in zip(ours, rows, strict=True))
        row, present = rows[0][0], tuple(param for param in own if param is not None and param.out is not None)
        if len(present) < len(own) or (len(own) > 1 and row.axis != int(row.transpose)):
            continue  # vectors, and matrices joined along their inputs
        found[name] = _Module(name, ours, present, row.transpose)
    return found


def _row(table: Table, ours: str) -> tuple[Row, str]:
    """The row of our parameter, and its name there."""
    for row in table.rows:
        for pattern in row.ours:
            if re.fullmatch(re.escape(pattern).replace(re.escape(_LAYER), "[0-9]+"), ours):
                return row, pattern
    raise ValueError(f"The table has no row for {ours!r}.")


def _near(name: str, known: Iterable[str]) -> str:
    """' (the nearest is ...)': compared by the last words first, which say what a module is."""
    known = list(known)
    if not known:
        return ""
    near = max(known, key=lambda other: difflib.SequenceMatcher(None, name[::-1], other[::-1]).ratio())
    return f" (the nearest is {near!r})"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_adapter(
    folder: str | os.PathLike[str], table: Table, params: Mapping[str, Param], num_layers: int
) -> tuple[dict[str, Adapter], AdapterConfig]:
    """The adapters in a PEFT folder by our matrices' names, in the file's dtype.

    table, params, num_layers: of the base model's architecture. Raises CheckpointError, naming the file, the value seen
    and the rule, for everything that could not be computed exactly as PEFT does.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    config = _config(folder / CONFIG, raw)
    file = folder / TENSORS
    if not file.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.is_file():
            raise CheckpointError(
                f"{pickle} is a pickle, which can run any code when opened, and is refused. Convert it where you trust "
                f"it: PeftModel.from_pretrained(model, {str(folder)!r}).save_pretrained(<new folder>)."
            )
        raise CheckpointError(f"{folder} has {CONFIG} but no {TENSORS}; fetch the folder again.")
    with Reader.open(file) as reader:
        return _read(reader, file, raw, config, table, params, num_layers)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a PEFT adapter folder ({CONFIG} and {TENSORS}).")
    path = folder / CONFIG
    if not path.is_file():
        said = "; it is a model's folder, not an adapter's" if (folder / "config.json").is_file() else ""
        raise CheckpointError(f"{folder} has no {CONFIG}{said}. A PEFT adapter folder has one beside {TENSORS}.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Fetch it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a JSON {type(raw).__name__}, not an object. Fetch it again.")
    return raw


def _config(path: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    """The common part of adapter_config.json; refuses what a and b alone do not say."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; 'LORA' (with or without use_dora, use_rslora) is read.")
    said: list[str] = []
    if (bias := raw.get("bias", "none")) != "none":
        said.append(f"bias is {bias!r}, which trained the base model's biases; only 'none' is read: {_PLAIN}")
    if modules := raw.get("modules_to_save"):
        said.append(f"modules_to_save is {modules!r}, modules trained whole, not as adapters: {_PLAIN}")
    if raw.get("init_lora_weights", True) not in _KEEPS_BASE:
        said.append(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base weights, so that this adapter does"
            " not fit the model as it is: save it from PEFT with path_initial_model_for_weight_conversion, which writes"
            " a plain LoRA"
        )
    known = {*_HISTORY, "bias", "modules_to_save", "init_lora_weights"}
    # an option that is off has no bearing, whichever it is
    said += [
        f"{key} is {value!r}, which is not read: {_PLAIN}" for key, value in raw.items() if key not in known and value
    ]
    for key, valid, rule in (
        ("r", _is_rank, "a whole number from 1 on"),
        ("lora_alpha", _is_number, "a finite number"),
        ("lora_dropout", _is_number, "a number from 0 to 1"),
    ):
        if not valid(raw.get(key, 8)):  # PEFT's default of the first two, and as good as any for the third
            said.append(f"{key} is {raw[key]!r}; it must be {rule}")
    for key, valid, rule in (("rank_pattern", _is_rank, "ranks"), ("alpha_pattern", _is_number, "finite numbers")):
        patterns = raw.get(key) or {}
        if not isinstance(patterns, dict) or not all(valid(value) for value in patterns.values()):
            said.append(f"{key} is {patterns!r}; it must be an object of module names, or patterns of them, and {rule}")
            continue
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                said.append(f"{key} has {pattern!r}, which is no regular expression ({error})")
    targets = raw.get("target_modules") or ()
    listed = isinstance(targets, (list, tuple)) and all(isinstance(target, str) for target in targets)
    if not isinstance(targets, str) and not listed:
        said.append(f"target_modules is {targets!r}; it must be a list of module names, or one pattern")
    if said:
        raise CheckpointError(f"{path} asks for what is not read:{listing(said)}")
    return AdapterConfig(
        rank=raw.get("r", 8),
        alpha=float(raw.get("lora_alpha", 8)),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base_model=raw.get("base_model_name_or_path") or None,
        dropout=float(raw.get("lora_dropout") or 0.0),
    )


def _read(
    reader: Reader, file: Path, raw: Mapping[str, Any], config: AdapterConfig, table: Table,
    params: Mapping[str, Param], num_layers: int,
) -> tuple[dict[str, Adapter], AdapterConfig]:  # fmt: skip
    spellings = [_modules(table, params, num_layers, prefix) for prefix in table.prefixes]
    seen = {name.removeprefix(_OUTER).partition(".lora_")[0] for name in reader.names}
    modules = max(spellings, key=lambda modules: len(seen & modules.keys()))  # the first of equals
    found, said = _sorted_out(reader, modules)
    for name, tensors in found.items():
        said += _misfits(reader, modules[name], tensors, config, _rank(raw, config, name))
    said += _missing(raw, found, modules)
    if not found and not said:
        said = ["it holds no adapter at all"]
    if said:
        raise CheckpointError(
            f"{file} does not fit the model ({num_layers} layers) and its {CONFIG}:{listing(sorted(said))}"
        )
    adapters: dict[str, Adapter] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensors in found.items():
        rank = _rank(raw, config, name)
        scale = _scale(float(_matching(raw.get("alpha_pattern"), name, config.alpha)), rank, rslora=config.rslora)
        a, b = reader.read(tensors["lora_A"]), reader.read(tensors["lora_B"])
        m = reader.read(tensors["magnitude"]) if config.dora else None
        for ours, adapter in _cut(modules[name], a, b, m):
            adapters[ours] = adapter
            alpha = _alpha(scale, adapter.rank, rslora=config.rslora)
            ranks |= {ours: adapter.rank} if adapter.rank != config.rank else {}
            alphas |= {ours: alpha} if alpha != config.alpha else {}
    return adapters, replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _sorted_out(reader: Reader, modules: Mapping[str, _Module]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({module: {lora_A, lora_B, magnitude: tensor name}}, complaints)."""
    found: dict[str, dict[str, str]] = {}
    said: list[str] = []
    for tensor in reader.names:
        matched = re.fullmatch(r"(.+?)\.(lora_[A-Za-z_]+|base_layer)((?:\.[a-z]+)?)", tensor.removeprefix(_OUTER))
        module, kind, rest = matched.groups() if matched else (tensor, "", "")
        if kind == "base_layer" and rest == ".weight" and module in modules:
            # the base model's own head, which PEFT adds where the head is a target
            info, one = reader.info(tensor), modules[module]
            wanted = (sum(one.outs), one.params[0].flat[1])
            if info.shape != (wanted[::-1] if one.transposed else wanted):
                said.append(f"{tensor} is {list(info.shape)}, the model has {list(wanted)}: a vocabulary was resized")
        elif kind in ("lora_embedding_A", "lora_embedding_B") or module.rpartition(".")[2] in _LOOKUPS:
            said.append(f"{tensor}: an embedding's adapter, which is not read: leave {module} out of target_modules")
        elif kind in ("lora_A", "lora_B") and rest == ".weight" and module in modules:
            found.setdefault(module, {})[kind] = tensor
        elif kind == "lora_magnitude_vector" and rest in ("", ".weight") and module in modules:
            found.setdefault(module, {})["magnitude"] = tensor
        elif kind.startswith("lora_") and module not in modules:
            said.append(f"{tensor}: the model has no module {module!r} to adapt{_near(module, modules)}")
        else:
            said.append(f"{tensor}: lora_A.weight, lora_B.weight and lora_magnitude_vector of a module are read")
    return found, said


def _misfits(
    reader: Reader, module: _Module, tensors: Mapping[str, str], config: AdapterConfig, rank: int
) -> Iterable[str]:
    wanted: dict[str, tuple[int, ...]] = {
        "lora_A": (rank, module.params[0].flat[1]),
        "lora_B": (sum(module.outs), rank),
    }
    if config.dora:
        wanted["magnitude"] = (sum(module.outs),)
    elif "magnitude" in tensors:
        yield f"{tensors['magnitude']} is there, but use_dora is false: set it to true if this is DoRA"
    for kind, shape in wanted.items():
        if kind not in tensors:
            yield f"{module.name} has no {'lora_magnitude_vector' if kind == 'magnitude' else kind}, and the config needs it"
        elif (info := reader.info(tensors[kind])).shape != shape:
            yield f"{tensors[kind]} is {list(info.shape)}; the model and r={rank} make it {list(shape)}"
        elif info.dtype.kind not in "fV" or info.dtype.itemsize < 2:
            yield f"{tensors[kind]} is {info.dtype}; an adapter is float16, bfloat16, float32 or float64"


def _missing(raw: Mapping[str, Any], found: Iterable[str], modules: Mapping[str, _Module]) -> list[str]:
    """Modules that target_modules asks for and the file lacks: PEFT would leave them without effect, silently."""
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or raw.get("layers_to_transform") is not None or raw.get("exclude_modules"):
        return []
    have = set(found)
    return [
        f"{name}: target_modules asks for it, and the file has no adapter of it"
        for name in modules
        if name not in have and any(name == t or name.endswith(f".{t}") for t in targets)
    ]


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _rank(raw: Mapping[str, Any], config: AdapterConfig, module: str) -> int:
    return _matching(raw.get("rank_pattern"), module, config.rank)


def _cut(module: _Module, a: np.ndarray, b: np.ndarray, m: np.ndarray | None) -> Iterable[tuple[str, Adapter]]:
    """Their adapter as those of our matrices."""
    ends = np.cumsum(module.outs)[:-1]
    bs = np.split(b, ends)
    ms = [None] * len(bs) if m is None else np.split(m, ends)
    used = np.stack([(part != 0).any(0) for part in bs])
    in_blocks = len(bs) > 1 and bool((used.sum(0) == 1).all())
    for ours, param, part, magnitude, mine in zip(module.ours, module.params, bs, ms, used, strict=True):
        own_a, own_b = (a[mine], part[:, mine]) if in_blocks else (a, part)
        if not len(own_a):
            continue  # in blocks, and none of them this matrix's
        out = param.out or 0
        yield (
            ours,
            Adapter(
                np.ascontiguousarray(own_a).reshape(len(own_a), *param.shape[out:]),
                np.ascontiguousarray(own_b).reshape(*param.shape[:out], len(own_a)),
                None if magnitude is None else np.ascontiguousarray(magnitude).reshape(param.shape[:out]),
            ),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_adapter(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    config: AdapterConfig,
    table: Table,
    params: Mapping[str, Param],
    num_layers: int,
    *,
    overwrite: bool = False,
) -> None:
    """Write {our matrix's full name: Adapter} as a PEFT folder, which appears whole or not at all.

    Raises CheckpointError, before anything is written, for adapters that PEFT's layout cannot hold or that do not agree
    with `config`; each complaint names the matrix.
    """
    modules = _modules(table, params, num_layers, table.prefixes[0])
    places = {ours: (module, i) for module in modules.values() for i, ours in enumerate(module.ours)}
    said = [complaint for name, adapter in adapters.items() for complaint in _wrong(name, adapter, config, places)]
    joined: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
    scales: dict[str, float] = {}
    if not adapters:
        said.append("there are no adapters to write")
    for module in modules.values() if not said else ():
        own = [adapters.get(ours) for ours in module.ours]
        if not any(own):
            continue
        said += _inseparable(module, own, config)
        if not said:
            joined[module.name] = _join(module, own)
            scales[module.name] = config.scale(next(n for n, one in zip(module.ours, own, strict=True) if one))
    if said:
        raise CheckpointError(f"These adapters cannot be written in PEFT's layout:{listing(said)}")

    def suffixes(of: Iterable[str]) -> list[str]:
        return _suffixes(set(of), table, params, num_layers)

    ranks = {name: a.shape[0] for name, (a, _, _) in joined.items()}
    alphas = {name: _alpha(scales[name], ranks[name], rslora=config.rslora) for name in joined}
    raw = {
        "alpha_pattern": {
            key: _number(alpha)
            for alpha in sorted(set(alphas.values()) - {float(config.alpha)})
            for key in suffixes(n for n, x in alphas.items() if x == alpha)
        },
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model,
        "bias": "none",
        "fan_in_fan_out": any(modules[name].transposed for name in joined),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(config.alpha),
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {
            key: rank
            for rank in sorted(set(ranks.values()) - {config.rank})
            for key in suffixes(n for n, x in ranks.items() if x == rank)
        },
        "revision": None,
        "target_modules": suffixes(joined),
        "task_type": "CAUSAL_LM",
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b, m) in joined.items():
        tensors[f"{_OUTER}{name}.lora_A.weight"] = a
        tensors[f"{_OUTER}{name}.lora_B.weight"] = b
        if m is not None:
            tensors[f"{_OUTER}{name}.lora_magnitude_vector"] = m
    with output_folder(folder, overwrite=overwrite) as work:
        (work / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
        write_file(work / TENSORS, shapes, tensors.__getitem__, {"format": "pt"})


def _number(value: float) -> float | int:
    """Whole numbers without a point: PEFT declares alpha an int."""
    return int(value) if float(value).is_integer() else float(value)


def _wrong(
    name: str, adapter: Adapter, config: AdapterConfig, places: Mapping[str, tuple[_Module, int]]
) -> Iterable[str]:
    if name not in places:
        yield f"{name} is no matrix of the model that an adapter can stand beside{_near(name, places)}"
        return
    module, i = places[name]
    param, rank = module.params[i], config.rank_pattern.get(name, config.rank)
    out = param.out or 0
    wanted = {"a": (rank, *param.shape[out:]), "b": (*param.shape[:out], rank), "magnitude": param.shape[:out]}
    if config.dora != (adapter.magnitude is not None):
        yield f"{name} has {'a' if adapter.magnitude is not None else 'no'} magnitude, and the config says dora={config.dora}"
    for kind, shape in wanted.items():
        array = getattr(adapter, kind)
        if array is None:
            continue
        if array.shape != shape:
            yield f"{name}: {kind} is {list(array.shape)}; the model and rank {rank} make it {list(shape)}"
        elif array.dtype != adapter.a.dtype:
            yield f"{name}: {kind} is {array.dtype} and a is {adapter.a.dtype}; make them one dtype"


def _inseparable(module: _Module, own: Sequence[Adapter | None], config: AdapterConfig) -> Iterable[str]:
    """Why our matrices' adapters cannot be one of their module."""
    have = [ours for ours, one in zip(module.ours, own, strict=True) if one is not None]
    lack = [ours for ours, one in zip(module.ours, own, strict=True) if one is None]
    if config.dora and lack:
        yield (
            f"{module.name} is {', '.join(module.ours)} in one, and DoRA needs a magnitude for all of its outputs: adapt"
            f" {', '.join(lack)} too, or none of them"
        )
    scales = {ours: config.scale(ours) for ours in have}
    if max(scales.values()) - min(scales.values()) > 1e-12 * max(map(abs, scales.values())):
        yield (
            f"{module.name} has one scale, and {', '.join(f'{n} has {s:g}' for n, s in scales.items())}: give them one"
            " alpha and rank"
        )
    if len({one.a.dtype for one in own if one is not None}) > 1:
        yield f"{module.name} joins {', '.join(have)}, which are of different dtypes: make them one dtype"


def _join(module: _Module, own: Sequence[Adapter | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Our matrices' adapters as their module's (A, B, magnitude)."""
    present = [one for one in own if one is not None]
    ins = module.params[0].flat[1]
    first = present[0].a
    shared = len(present) == len(own) and all(
        one.a.shape == first.shape and one.a.tobytes() == first.tobytes() for one in present
    )
    flat = [np.asarray(one.a).reshape(one.rank, ins) for one in present]
    a = flat[0] if shared else np.concatenate(flat)
    b = np.zeros((sum(module.outs), len(a)), first.dtype)
    row = column = 0
    for one, out in zip(own, module.outs, strict=True):
        if one is not None:
            b[row : row + out, column : column + one.rank] = np.asarray(one.b).reshape(out, one.rank)
            column += 0 if shared else one.rank
        row += out
    magnitudes = [np.asarray(one.magnitude).reshape(-1) for one in present if one.magnitude is not None]
    return a, b, np.concatenate(magnitudes) if magnitudes else None


def _suffixes(chosen: set[str], table: Table, params: Mapping[str, Param], num_layers: int) -> list[str]:
    """The shortest ends of module names that mean these modules and no others: how PEFT names targets and patterns."""
    every = {theirs.rpartition(".")[0] for theirs in table.theirs(params, num_layers)}

    def means(end: str) -> set[str]:
        return {name for name in every if name == end or name.endswith(f".{end}")}

    ends: set[str] = set()
    for name in chosen:
        words = name.split(".")
        ends.add(next(e for n in range(1, len(words) + 1) if means(e := ".".join(words[-n:])) <= chosen))
    return sorted(ends)


# ---------------------------------------------------------------------------------------------------------------------
# One rank for all


def uniform(adapters: Mapping[str, Adapter], config: AdapterConfig) -> tuple[dict[str, Adapter], AdapterConfig]:
    """The same function with one rank and one scale for all: what is stacked and scanned needs no pattern.

    Ranks grow to the largest, with zeros in both a and b (which get no gradient, so they stay zero in training). Where
    the scales differ, b takes up the difference, in float32.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return dict(adapters), config
    rank = max(one.rank for one in adapters.values())
    scales = {name: config.scale(name) for name in adapters}
    scale = max(scales.values(), key=lambda s: (list(scales.values()).count(s), s))
    made: dict[str, Adapter] = {}
    for name, one in adapters.items():
        grow = rank - one.rank
        if scales[name] != scale:
            m = None if one.magnitude is None else one.magnitude.astype(np.float32)
            b = one.b.astype(np.float32) * np.float32(scales[name] / scale)
            one = Adapter(one.a.astype(np.float32), b, m)
        made[name] = Adapter(
            np.pad(one.a, [(0, grow)] + [(0, 0)] * (one.a.ndim - 1)),
            np.pad(one.b, [(0, 0)] * (one.b.ndim - 1) + [(0, grow)]),
            one.magnitude,
        )
    alpha = _alpha(scale, rank, rslora=config.rslora)
    return made, replace(config, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
