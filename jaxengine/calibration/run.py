"""Choosing the codes of a model by text: layer by layer, so that a model larger than the device is calibrated on it.

    x <- embedding of all samples, [S, T, D]
    for each layer:  read it;  H of what its matrices read;  round them (gptq.py, awq.py);  x <- the rounded layer of x;  write it

On the device stand one layer (two with AWQ), two batches of rows and one H with what is made of it; in host memory one
layer and x, which is a mapped file. With GPTQ the
matrices of a layer are rounded in the order in which they run, each group from what the rounded ones before it give it.

The body is the one that `walk` runs; the loop is not `walk.drive`, in which a layer is brought once, gone through once, and
the next one comes meanwhile. Here each is gone through once for every group of matrices, with weights that change in between
(and AWQ tries several); a run begins at any layer; and a second layer that waits would be a layer more in memory.

**Where it stands.** Beside OUT is a hidden folder of finished layers, of the samples as they come into the next one, and of
what was asked for. A run that was killed goes on after the last finished layer, with the same bytes as an unbroken one on
the same machine. OUT appears at the end, whole (checkpoints/output.py), and the folder is gone.

**What comes out** is a Hugging Face folder in compressed-tensors' form (pack-quantized), a file a layer, which jaxengine
loads in its own formats without rounding anything, and transformers and vLLM open for families whose matrices are linear
layers there (GPT-2's are not).

S samples, T tokens of a sample, D model, B rows of a batch, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import compressed
from checkpoints.errors import CheckpointError
from checkpoints.output import output_folder
from checkpoints.quantized.base import WEIGHT, Matrix
from checkpoints.safetensors import write_file, write_index
from jaxengine.architecture import Architecture, architecture
from jaxengine.calibration import awq, gptq
from jaxengine.calibration.capture import Group, enter, gather, groups, through
from jaxengine.calibration.grid import Grid
from jaxengine.engine import Engine
from jaxengine.export import one_dtype, write_beside
from jaxengine.finetune.data import Rows, blank, pack, permutation, read
from jaxengine.loading import tokenizer
from jaxengine.packing import files_of
from jaxengine.plan import DTYPES, Plan, parse_bytes, show_bytes
from jaxengine.sources import Source, layer_of, open_source, read_config
from sharding.mesh import make_mesh

log = logging.getLogger("jaxengine")

METHODS = ("gptq", "awq")
ROWS = 8  # of a batch, where memory does not say fewer
CONTEXT = 512  # tokens of a row, where nobody says how many and the model takes as many
ASKED, DONE = "asked.json", "done.json"  # of the folder of a run that is not finished

Track = Callable[[int, int, str], None]  # (layers done, layers in all, what is being done)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Rows of text as tokens, positions (-1: padding) and segments (of the document that a token is of), int32 [S, T]."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray

    @classmethod
    def of(cls, tokens: Any) -> Samples:
        """Of token ids [S, T], each row one text."""
        tokens = np.asarray(tokens, np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
        return cls(tokens, np.ascontiguousarray(positions), np.ones_like(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        made = hashlib.sha256()
        for array in (self.tokens, self.positions, self.segments):
            made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Held:
    """A matrix that was rounded: what stands in its place, in the dtype of activations; what is written of it; and the part of
    its output's power that is lost."""

    dense: Any
    matrix: Matrix
    lost: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """lost: {parameter: the part of its output's power that rounding took, over the samples}; refused: {parameters: why their
    inputs were not scaled}, of AWQ."""

    lost: dict[str, float]
    refused: dict[str, str]


def sampled(folder: Path, text: Sequence[Path], arch: Architecture, samples: int, context: int, seed: int) -> Samples:
    """At most `samples` rows of `context` tokens of these files, drawn from the seed."""
    words = tokenizer(folder)
    if words is None:
        raise CheckpointError(f"{folder} has no tokenizer: add the tokenizer.json that the model was made with")
    packed = pack(read(list(text), Rows(words, vocab_size=arch.config.vocab_size)), context, seed=seed)
    chosen = permutation(len(packed), seed, 0)[:samples]
    if len(chosen) < samples:
        log.warning(
            "the text makes %d rows of %d tokens, and samples is %d: all are taken", len(packed), context, samples
        )
    rows = blank(len(chosen), context)
    for i, row in enumerate(chosen):
        packed.fill(int(row), {name: array[i] for name, array in rows.items()})
    return Samples(rows["tokens"], rows["positions"], rows["segments"])


def quantize(
    folder: str | os.PathLike[str],
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Samples,
    *,
    weights: str,
    out: str | os.PathLike[str],
    method: str = "gptq",
    memory: str | int | None = None,
    samples: int = 128,
    context: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Track | None = None,
) -> Outcome:
    """Choose the codes of a checkpoint's matrices by text, and write a Hugging Face folder of them.

    folder: a Hugging Face checkpoint. text: plain text or jsonl files, as `jaxengine finetune` reads them, or rows of tokens,
    which `samples` and `context` then say nothing about. weights: an integer format: 'int4:group_size=64', 'int3:affine=true',
    'int8'. method: 'gptq' or 'awq'. memory: device memory that is not to be exceeded, '8GB'; rows are taken fewer at a time until
    it is enough. samples: rows of `context` tokens (512, or what the model takes at most). dtype: of activations (the
    checkpoint's own if not given). The embedding and the head stay as they are. progress: called with (layers done, layers in
    all, what is being done).

    The same call goes on with what an interrupted one left, with another memory too: how many rows are taken at a time decides
    in which order sums are made, and nothing else. Raises, before anything is allocated or written:
    CheckpointError for a folder that cannot be read or written, ValueError for a choice there is not, or memory that does not
    hold a layer, with what would fit.
    """
    folder, target = Path(folder), Path(out).expanduser().resolve()
    raw = read_config(folder)
    if isinstance(text, Samples):
        samples, context = text.tokens.shape
    _check(target, method, samples, CONTEXT if context is None else context, dtype)
    with open_source(folder, architecture(raw)) as source:
        arch = source.architecture
        if source.plan is not None:
            raise CheckpointError(
                f"{folder} is quantized already ({source.plan.weights}): start from the checkpoint that it was made from"
            )
        longest = arch.config.max_position_embeddings
        context = min(CONTEXT, longest) if context is None else context
        if context > longest:
            raise ValueError(f"context is {context}, and the model takes at most {longest} tokens: give {longest}")
        dtype = dtype or one_dtype(arch, source.dtype, raw)
        run = _Run(arch, source, Plan(dtype=dtype, weights=weights), method)
        found = text
        if not isinstance(found, Samples):
            files = [Path(found)] if isinstance(found, str | os.PathLike) else [Path(t) for t in found]
            found = sampled(folder, files, arch, samples, context, seed)
        rows = min(ROWS, len(found))
        if memory is not None:
            rows = run.fitting(parse_bytes(memory), rows, context)
        asked = {
            "checkpoint": hashlib.sha256(files_of(folder).encode()).hexdigest()[:16], "weights": run.plan.weights,
            "method": method, "dtype": dtype, "text": found.digest(), "samples": len(found), "context": context,
        }  # fmt: skip
        with _workplace(target, asked) as work:
            outcome = run.run(work, found, rows, progress or (lambda done, total, what: None))
            with output_folder(target) as made:
                run.export(work, made, source.origin(raw))
    return outcome


def _check(target: Path, method: str, samples: int, context: int, dtype: str | None) -> None:
    if method not in METHODS:
        raise ValueError(f"quantize: method is {method!r}; it can be {' or '.join(METHODS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"quantize: dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    for what, size in (("samples", samples), ("context", context)):
        if size < 1:
            raise ValueError(f"quantize: {what} is {size}; it is at least 1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there and not an empty folder. Give a new one.")


@contextlib.contextmanager
def _workplace(target: Path, asked: Mapping[str, Any]) -> Iterator[Path]:
    """The hidden folder of a run for `target`, made or found again; removed when the block ends well."""
    work = target.with_name(f".{target.name}.calibration")
    path = work / ASKED
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{target} is being made by another process: wait for it, or give another output"
            ) from None
        if not (work.is_dir() and os.path.samestat(os.fstat(lock), work.stat())):
            raise CheckpointError(f"{target} has just been made by another process: give another output")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):  # since `_check`
            with contextlib.suppress(OSError):
                work.rmdir()
            raise CheckpointError(f"{target} has just been made by another process: give another output")
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if odd := [f"{n} was {before.get(n)!r} and is {now!r}" for n, now in asked.items() if before.get(n) != now]:
                raise CheckpointError(
                    f"{work} is of another run for {target.name}, which was not finished: {', '.join(odd)}. Say the same again to"
                    f" go on, delete it, or give another output"
                )
        _replaced(path, json.dumps(asked, indent=2) + "\n")
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _replaced(path: Path, text: str) -> None:
    """A small file that is there whole or not at all."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    _synced(aside)
    aside.replace(path)


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Run:
    """One calibration: its programs, and its way through the layers."""

    def __init__(self, arch: Architecture, source: Source, plan: Plan, method: str):
        self.arch, self.source, self.plan, self.method = arch, source, plan, method
        self.mesh = make_mesh(None)
        self.device = self.mesh.devices.flat[0]
        self.engine = Engine(arch, plan.caching, plan.dtype, plan.sharding_rules(), self.mesh, attention=plan.attention)
        self.hidden_size: int = jax.eval_shape(self._embed_abstract, *self._abstract_tokens(1, 1)).shape[-1]
        self._check_formats()

    def _abstract_tokens(self, rows: int, context: int) -> tuple[Any, Any]:
        ids = jax.ShapeDtypeStruct((rows, context), jnp.int32)
        return ids, ids

    def _embed_abstract(self, tokens: Any, positions: Any) -> Any:
        specs, dtype = self.arch.outer()[1], jnp.dtype(self.plan.dtype)
        outer = {n: jnp.zeros(s.shape, dtype) for n, s in specs.items()}
        return enter.function(self.engine, outer, tokens, positions)

    # -- what is rounded ----------------------------------------------------------------------------------------------

    def grid(self, group: Group) -> Grid:
        """How the matrices of a group are rounded."""
        return Grid.of(self.plan.weights, group.inputs)

    @property
    def _bits(self) -> int:
        return Grid.of(self.plan.weights, self.hidden_size).bits

    def _check_formats(self) -> None:
        for kind in dict.fromkeys(self.arch.kinds):
            for group in groups(self.engine, kind, self.hidden_size):
                if self.grid(group).ordered and self.method == "awq":
                    raise ValueError(
                        f"weights={self.plan.weights!r}: act_order is GPTQ's, and method='awq' leaves columns where they are:"
                        f" leave it out"
                    )

    # -- what it takes ------------------------------------------------------------------------------------------------

    def fitting(self, memory: int, rows: int, context: int) -> int:
        """How many rows are taken at a time within `memory` bytes of the device, by what the compiler says."""
        first, firsts = rows, 0
        while True:
            need = self.needs(rows, context, memory)
            worst = max(need, key=lambda what: need[what])
            if need[worst] <= memory:
                return rows
            firsts = firsts or need[worst]
            if rows == 1:
                break
            rows = max(rows // 2, 1)
        fewer = f" ({show_bytes(firsts)} with {first} rows)" if firsts > need[worst] else ""
        nearest = f"memory={show_bytes(need[worst] * 101 // 100).replace(' ', '')!r}"
        if need[worst] > self.needs(1, max(context // 2, 1), memory)[worst]:
            nearest += f", or a context below {context}"
        raise ValueError(
            f"memory is {show_bytes(memory)}, and {worst} takes {show_bytes(need[worst])} of the device with one row of"
            f" {context} tokens at a time{fewer}. Nearest: {nearest}"
        )

    def needs(self, rows: int, context: int, memory: int | None = None) -> dict[str, int]:
        """Bytes of device memory by what is being done: what stands there, and what each program adds as it is compiled.
        It may end where `memory` is not enough."""
        found: dict[str, int] = {}

        def add(what: str, standing: int, program: Any, *args: Any) -> None:
            m = program.lower(self.engine, *args).compile().memory_analysis()
            made = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            found[what] = max(found.get(what, 0), standing + made)

        dtype = jnp.dtype(self.plan.dtype)
        tokens, positions = self._abstract_tokens(rows, context)
        x = jax.ShapeDtypeStruct((rows, context, self.hidden_size), dtype)
        batch = 2 * _size((x, positions, positions))  # the next one is on its way
        outer = {n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in self.arch.outer()[1].items()}
        add("the embedding", _size({n: outer[n] for n in self._entering()}) + batch, enter, outer, tokens, positions)
        for kind in dict.fromkeys(self.arch.kinds):
            specs = self.arch.block(kind)[1]
            layer = {n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in specs.items()}
            standing = _size(layer)
            fold_of: dict[Group, Any] = {}
            add("a layer's results", standing + batch + _size(x), through, kind, layer, x, positions, positions)
            if self.method == "awq":
                args = awq.abstract(self.engine, kind, self.hidden_size)
                add("a layer's proof", _size(args), awq.probe, kind, *args)
                if memory is not None and max(found.values()) > memory:
                    return found  # before it is made
                fold_of = dict(awq.folds(self.engine, kind, self.hidden_size))
                standing *= 2  # what is rounded is kept beside what is heard through
            for group in groups(self.engine, kind, self.hidden_size):
                of, I = f"a layer's {', '.join(group.names)}", group.inputs  # noqa: E741
                H, a = _float32(I, I), _float32(I)
                here = standing + _size((H, a))
                add(f"{of} (H)", here + batch, gather, kind, group.names[0], layer, x, positions, positions, H, a)
                grid, matrices = self.grid(group), tuple(layer[n] for n in group.names)
                if self.method == "gptq":
                    perm = jax.ShapeDtypeStruct((I,), jnp.int32)
                    add(f"{of} (the factor of H)", here, gptq.factor, grid.ordered, H, _float32())
                    add(f"{of} (rounding)", here + _size((H, perm)), gptq.solve, grid, matrices, H, H, perm)
                    continue
                over = _float32(sum(w.size for w in matrices) // I)
                here += _size((over, a))
                if (fold := fold_of[group]) is not None:
                    add(f"{of} (scales)", here, awq.search, grid, fold, matrices, over, H, a)
                add(f"{of} (rounding)", here, awq.settle, grid, matrices, over, a, H)
        return found

    def _entering(self) -> set[str]:
        """The parameters outside the layers that `embed` reads; the others stay where they are."""
        specs, dtype = self.arch.outer()[1], jnp.dtype(self.plan.dtype)
        outer = {n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in specs.items()}
        made = jax.make_jaxpr(lambda o, t, p: enter.function(self.engine, o, t, p))(outer, *self._abstract_tokens(1, 2))
        used = {id(v) for equation in made.jaxpr.eqns for v in equation.invars}
        return {n for n, v in zip(sorted(outer), made.jaxpr.invars, strict=False) if id(v) in used}

    # -- the way through ----------------------------------------------------------------------------------------------

    def run(self, work: Path, samples: Samples, rows: int, track: Track) -> Outcome:
        """Every layer that is not finished yet; what all of them lost."""
        L, shape = self.arch.num_layers, (len(samples), samples.tokens.shape[1], self.hidden_size)
        first = next((i for i in range(L) if not (work / f"{i:05d}.{DONE}").is_file()), L)
        if first:
            log.info("%s: going on after layer %d of %d", work, first, L)
        for stray in set(work.glob("*.samples")) - {work / f"{first:05d}.samples"}:
            stray.unlink()
        with jax.default_device(self.device):
            if first == 0 and L:
                track(0, L, "embedding")
                self._embed(work / "00000.samples", samples, shape, rows)
            for i in range(first, L):
                self._layer(work, i, samples, shape, rows, lambda what, i=i: track(i, L, what))
        track(L, L, "writing")
        lost, refused = {}, {}
        for i in range(L):
            said = json.loads((work / f"{i:05d}.{DONE}").read_text(encoding="utf-8"))
            lost |= said["lost"]
            refused |= said["refused"]
        for names, why in refused.items():
            log.info("awq: the inputs of %s are not scaled: %s", names, why)
        return Outcome(lost, refused)

    def _embed(self, path: Path, samples: Samples, shape: tuple[int, ...], rows: int) -> None:
        read, dtype = self._entering(), np.dtype(self.plan.dtype)
        outer = {
            n: self._put(self.source.read(n).astype(dtype, copy=False))
            if n in read else np.broadcast_to(np.zeros((), dtype), s.shape)  # never looked at
            for n, s in self.arch.outer()[1].items()
        }  # fmt: skip
        with _written(path, shape, dtype) as into:
            for at, _, (tokens, positions, _) in self._batches(samples, rows):
                into[at] = np.asarray(enter(self.engine, outer, tokens, positions))[: at.stop - at.start]

    def _batches(self, samples: Samples, rows: int, x: np.ndarray | None = None) -> Iterator[tuple[slice, Any, Any]]:
        """(which samples, what comes in of them, (tokens, positions, segments)); the last filled with rows of padding."""
        for start in range(0, len(samples), rows):
            at = slice(start, min(start + rows, len(samples)))
            short = rows - (at.stop - at.start)

            def filled(a: np.ndarray, empty: int, at: slice = at, short: int = short) -> Any:
                rest = np.full((short, *a.shape[1:]), empty, a.dtype) if short else None
                return self._put(a[at] if rest is None else np.concatenate([a[at], rest]))

            own = tuple(filled(a, e) for a, e in ((samples.tokens, 0), (samples.positions, -1), (samples.segments, 0)))
            yield at, None if x is None else filled(x, 0), own

    def _put(self, array: np.ndarray) -> Any:
        return jax.device_put(np.ascontiguousarray(array), self.device)

    def _layer(
        self, work: Path, i: int, samples: Samples, shape: tuple[int, ...], rows: int, track: Callable[[str], None]
    ) -> None:
        kind, dtype = self.arch.kinds[i], np.dtype(self.plan.dtype)
        track("reading")
        own = {n: self.source.read(f"layers.{i}.{n}") for n in self.arch.block(kind)[1]}
        weights = {n: self._put(a.astype(dtype, copy=False)) for n, a in own.items()}
        x = np.memmap(work / f"{i:05d}.samples", dtype, "r", shape=shape)

        def hear(group: Group, weights: Mapping[str, Any]) -> tuple[Any, Any]:
            track(f"inputs of {', '.join(group.names)}")
            H, a = jnp.zeros((group.inputs,) * 2, jnp.float32), jnp.zeros((group.inputs,), jnp.float32)
            for _, part, (_, positions, segments) in self._batches(samples, rows, x):
                jax.block_until_ready(H)  # or all batches would be on their way
                H, a = gather(self.engine, kind, group.names[0], weights, part, positions, segments, H, a)
            return H, a

        if self.method == "gptq":
            held, changed, refused = self._gptq(kind, weights, hear, track)
        else:
            held, changed, refused = self._awq(kind, own, weights, hear, track)
        track("writing")
        self._write(work, i, own | changed, held)
        if i + 1 < self.arch.num_layers:
            track("results")
            weights |= {n: self._put(a.astype(dtype, copy=False)) for n, a in changed.items()}
            weights |= {n: h.dense for n, h in held.items()}
            with _written(work / f"{i + 1:05d}.samples", shape, dtype) as into:
                before: tuple[slice, Any] | None = None
                for at, part, (_, positions, segments) in self._batches(samples, rows, x):
                    y = through(self.engine, kind, weights, part, positions, segments)
                    if before is not None:
                        into[before[0]] = np.asarray(before[1])[: before[0].stop - before[0].start]
                    before = at, y
                if before is not None:
                    into[before[0]] = np.asarray(before[1])[: before[0].stop - before[0].start]
        names = {n: f"layers.{i}.{n}" for n in held}
        said = {
            "lost": {names[n]: h.lost for n, h in held.items()},
            "refused": {", ".join(names[n] for n in group): why for group, why in refused.items()},
            "schemes": self._schemes(i, held),
        }
        _replaced(work / f"{i:05d}.{DONE}", json.dumps(said))
        del x
        (work / f"{i:05d}.samples").unlink()

    def _gptq(
        self, kind: Hashable, weights: dict[str, Any], hear: Any, track: Any
    ) -> tuple[dict[str, Held], dict, dict]:
        def rounded(group: Group) -> dict[str, Held]:
            # in a frame of its own: its arrays are gone by the next group's turn
            H, _ = hear(group, weights)
            track(f"rounding {', '.join(group.names)}")
            grid, matrices = self.grid(group), tuple(weights[n] for n in group.names)
            U, perm = gptq.solved_factor(self.engine, H, ordered=grid.ordered)
            made = gptq.solve(self.engine, grid, matrices, H, U, perm)
            return _held(grid, group, made, perm)

        held: dict[str, Held] = {}
        for group in groups(self.engine, kind, self.hidden_size):
            held |= rounded(group)
            weights |= {n: held[n].dense for n in group.names}
        return held, {}, {}

    def _awq(
        self, kind: Hashable, own: Mapping[str, np.ndarray], weights: Mapping[str, Any], hear: Any, track: Any
    ) -> tuple[dict[str, Held], dict[str, np.ndarray], dict[tuple[str, ...], str]]:
        """From the last group to the first: what a matrix's rows are divided by is known when its turn comes."""
        specs, changed, refused = self.arch.block(kind)[1], {}, {}
        held: dict[str, Held] = {}
        rows: dict[str, np.ndarray] = {}
        for group, fold in reversed(awq.folds(self.engine, kind, self.hidden_size)):
            H, a = hear(group, weights)
            grid, matrices = self.grid(group), tuple(weights[n] for n in group.names)
            counts = [w.size // group.inputs for w in matrices]
            over = [rows.get(n, np.ones(count, np.float32)) for n, count in zip(group.names, counts, strict=True)]
            over = self._put(np.concatenate(over))
            s = np.ones(group.inputs, np.float32)
            if fold is None:
                refused[group.names] = (
                    "no parameter before them can take the scales: what they read is not linear in it, or is read by something"
                    " else too"
                )
            else:
                track(f"scales of {', '.join(group.names)}")
                best, _ = awq.search(self.engine, grid, fold, matrices, over, H, a)
                vector = specs[fold.name].out is None
                fit, each = awq.folded(fold, own, np.asarray(best), vector=vector)
                changed |= fit
                if not vector:
                    rows[fold.name] = each
                s = fold.spread(each)
            track(f"rounding {', '.join(group.names)}")
            held |= _held(grid, group, awq.settle(self.engine, grid, matrices, over, self._put(s), H), None)
            del H, a  # before the next group's are made
        return held, changed, refused

    # -- what is written ----------------------------------------------------------------------------------------------

    def _names(self, layer: int | None) -> dict[str, tuple[str, ...]]:
        """{tensor: the parameters of ours that it is made of} of a layer, or of what is outside them."""
        params, table = self.arch.params(), self.arch.name_table()
        prefix = self._prefix()
        theirs = table.theirs(params, self.arch.num_layers, prefix)
        parts = {name: table.parts(name, params) for name in theirs}
        return {name: ours for name, ours in parts.items() if layer_of(ours[0]) == layer}

    def _prefix(self) -> str | None:
        return self.source.origin({}).metadata.get("prefix")

    def _file(self, layer: int | None) -> str:
        number = 1 if layer is None else layer + 2
        return f"model-{number:05d}-of-{self.arch.num_layers + 1:05d}.safetensors"

    def _joined(self, i: int, held: Mapping[str, Held]) -> dict[str, Matrix]:
        """{tensor: the matrix that stands in its place} of layer i."""
        found = {}
        for name, ours in self._names(i).items():
            own = [n.split(".", 2)[2] for n in ours]
            if own[0] in held:
                found[name] = compressed.join([held[n].matrix for n in own])
        return found

    def _schemes(self, i: int, held: Mapping[str, Held]) -> dict[str, Any]:
        bits = self._bits
        return {n.removesuffix(WEIGHT): compressed.scheme(m, bits) for n, m in self._joined(i, held).items()}

    def _write(self, work: Path, i: int, own: Mapping[str, np.ndarray], held: Mapping[str, Held]) -> None:
        joined, made, params = self._joined(i, held), {}, self.arch.params()
        for name in self._names(i):
            if name in joined:
                made |= compressed.tensors(name, joined[name], self._bits)
            else:
                made[name] = self.arch.name_table().assemble(name, lambda n: own[n.split(".", 2)[2]], params)
        path = work / self._file(i)
        path.unlink(missing_ok=True)
        write_file(path, {n: (t.dtype, t.shape) for n, t in made.items()}, made.__getitem__, {"format": "pt"})
        _synced(path)

    def export(self, work: Path, folder: Path, origin: Any) -> None:
        """The finished layers, with what is outside them, as a Hugging Face folder."""
        params, table = self.arch.params(), self.arch.name_table()
        outer = self._names(None)
        copies = {copy: outer[name] for copy, name in origin.copies.items()}
        shapes = table.theirs(params, self.arch.num_layers, self._prefix())
        whole = {
            n: (self.source.dtype(ours[0]), shapes[origin.copies.get(n, n)]) for n, ours in (outer | copies).items()
        }
        write_file(
            folder / self._file(None), whole,
            lambda n: table.assemble(origin.copies.get(n, n), self.source.read, params), {"format": "pt"},
        )  # fmt: skip
        shards, tensors, schemes = {self._file(None): list(whole)}, dict(whole), {}
        for i in range(self.arch.num_layers):
            file = self._file(i)
            _linked(work / file, folder / file)
            found = _header(folder / file)
            tensors |= found
            shards[file] = list(found)
            schemes |= json.loads((work / f"{i:05d}.{DONE}").read_text(encoding="utf-8"))["schemes"]
        write_index(folder, shards, tensors)
        specs = self.arch.specs()
        plain = [n.removesuffix(WEIGHT) for n, ours in outer.items() if specs[ours[0]].out is not None]
        ignored = dict.fromkeys([*plain, "lm_head"])
        config = {"quantization_config": compressed.quantization_config(schemes, ignore=list(ignored))}
        write_beside(folder, dataclasses.replace(origin, config=origin.config | config), None)


def _float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _held(grid: Grid, group: Group, made: Any, perm: Any) -> dict[str, Held]:
    """What was made of a group's matrices, each by its own; what is written of them as numpy."""
    dense, codes, s, z, lost = made
    scale = np.asarray(s).astype(grid.scale)
    rows = [grid.apart(a, dense) for a in (np.asarray(codes), scale, np.asarray(z))]
    order = np.asarray(perm) if grid.ordered else None
    return {
        n: Held(w, Matrix(q, scale, zero if grid.affine else None, order), float(part))
        for n, w, q, scale, zero, part in zip(group.names, dense, *rows, np.asarray(lost), strict=True)
    }


def _header(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    from checkpoints.safetensors import Reader

    with Reader.open(path) as reader:
        return {n: (reader.info(n).dtype, reader.info(n).shape) for n in reader.names}


def _linked(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def _written(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array to be filled, in a file that has its name only when it is whole."""
    aside = path.with_name(path.name + ".new")
    made = np.memmap(aside, dtype, "w+", shape=shape)
    yield made
    made.flush()
    _synced(aside)
    aside.replace(path)
