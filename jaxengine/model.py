"""A loaded model: logits, generation, streaming, saving. The Python surface that users hold.

    model = jaxengine.load("Llama-3.2-1B")
    model.generate("The capital of France is", max_new_tokens=20)[0].text
    for piece in model.stream([{"role": "user", "content": "Hello"}]): print(piece, end="")

Prompts are strings, chats (lists of {"role", "content"}) or lists of token ids, one or many. All prompts of a call make
one batch, right-padded to a bucket of lengths; every row gives what it gives alone, sampled rows too.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from checkpoints.output import output_folder
from checkpoints.packed import ReaderStats
from jaxengine import compressed, engine, export, outside, placement, sampling
from jaxengine.architecture import Architecture
from jaxengine.plan import DTYPES, Plan, activation_bytes, cache_bytes, device_bytes, need, show_bytes, weight_bytes
from jaxengine.sources import Origin
from jaxengine.text import Detokenizer, StopStrings, Tokenizer
from pallas_kernels.dispatch import below_ampere
from sharding.mesh import processes

log = logging.getLogger("jaxengine")

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt gave, once.

    text: without the stop id or stop string. tokens: the ids generated, a stop id included. finish_reason: 'stop' (a
    stop id or string was met) or 'length'. logprobs: natural log of the model's probability of each token (before
    temperature and filters), if asked for; top_logprobs: for each token the most likely ids with theirs.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt: int
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


class Model:
    """A model in its place, ready to run. Made by `jaxengine.load`."""

    def __init__(
        self,
        architecture: Architecture,
        plan: Plan,
        mesh: Mesh,
        params: Any,
        origin: Origin,
        tokenizer: Tokenizer | None,
        budget: int | None = None,
    ):
        self.architecture, self.plan, self.mesh, self._params = architecture, plan, mesh, params
        # the layers that are read from disk, which all banks there share
        self._on_disk: Any = next((bank.source.layers for bank in params["banks"] if bank.source is not None), None)
        self.budget = budget  # bytes of device memory that no call may need more than
        self.origin, self.tokenizer = origin, tokenizer
        self.engine = engine.Engine(
            architecture, plan.caching, plan.dtype, plan.sharding_rules(), mesh, plan.chunk, plan.attention
        )
        # the module whose functions run it: compiled as a whole, or driven from Python layer by layer
        self.runs: Any = outside if any(bank.outside for bank in params["banks"]) else engine

    def __repr__(self) -> str:
        c = self.architecture
        plain = dataclasses.replace(self.plan, weights="dense", weight_rules=())
        held, whole = ((b := weight_bytes(c, plan))["outer"] + b["layers"] for plan in (self.plan, plain))
        disk = need(c, self.plan, batch=0, context=1).disk
        share = "" if held == whole else f" ({held / whole:.3f} of {self.plan.dtype}'s)"
        return (
            f"Model({c.family}, {c.num_layers} layers, {show_bytes(held)} of weights{share}, weights={self.plan.weights!r},"
            f" home={self.plan.home!r}" + (f", {show_bytes(disk)} read from disk in a pass)" if disk else ")")
        )

    @property
    def params(self) -> Any:
        """{'outer': {name: weight}, 'banks': (Bank, ...)}; ValueError after `close`."""
        if self._params is None:
            raise ValueError("the model is closed: load it again")
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params

    @property
    def disk_stats(self) -> ReaderStats | None:
        """What has been read from the disk since the model was loaded, and waited for, `close` or not; None where no layer
        is there."""
        return None if (layers := self._on_disk) is None else layers.stats

    def close(self) -> None:
        """Let go of the arrays, and end the threads that read layers from disk. A call after it is an error."""
        if self._on_disk is not None:
            self._on_disk.close()
        self._params = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def config(self) -> Any:
        """The family's Config, in Hugging Face's field names."""
        return self.architecture.config

    # --- scoring ---------------------------------------------------------------------------------------------------

    def logits(self, ids: Any, *, lengths: Sequence[int] | None = None) -> Float[Array, "B T V"]:
        """Next-token logits at every position, float32 [B, T, V].

        ids: [T] or [B, T] token ids. lengths: for rows padded on the right, how many of each are its own (positions past
        it give arbitrary numbers). Raises ValueError for ids that are no tokens, or rows of unequal length.
        """
        try:
            rows = np.atleast_2d(np.asarray(ids))
        except ValueError:
            raise ValueError("logits: rows of unequal length; pad them on the right and give lengths=[...]") from None
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or rows.shape[1] == 0:
            raise ValueError(
                f"logits: ids are {rows.dtype} of shape {rows.shape}; they must be integers [T] or [B, T], T > 0"
            )
        B, T = rows.shape
        self._check_score_budget(B, engine.bucket(T))
        own = np.full(B, T) if lengths is None else np.asarray(lengths)
        if own.shape != (B,) or own.min() < 1 or own.max() > T:
            raise ValueError(f"logits: lengths are {lengths!r}; they must be {B} numbers from 1 to {T}")
        self._check_ids([row[:n].tolist() for row, n in zip(rows, own, strict=True)], 0)
        padded = np.zeros((B, engine.bucket(T)), np.int32)
        padded[:, :T] = np.where(np.arange(T) < own[:, None], rows, 0)
        found = self.runs.score(self.engine, self.params, self._put(padded), self._put(own.astype(np.int32)))
        return found[:, :T]

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        stop: str | Sequence[str] = (),
        stop_ids: int | Sequence[int] | None = None,
        seed: int | None = None,
        n: int = 1,
        logprobs: int | None = None,
    ) -> list[Completion]:
        """Continue each prompt: n completions for each, those of one prompt next to each other.

        temperature 0 is greedy. stop: strings that end a completion; stop_ids: token ids that do (the checkpoint's own
        end-of-text ids if not given; () for none). seed: the same seed gives the same text for a prompt whatever stands
        beside it in the batch; None draws one. logprobs: None for none, 0 for each token's own, k for the k most likely
        beside it. Raises ValueError for a prompt that is empty, too long, or has ids that are no tokens.
        """
        how = sampling.Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        )  # fmt: skip
        ids = self._encode_all(prompts)
        run = _Run(self, ids, how, max_new_tokens, stop, stop_ids, seed, n, logprobs)
        while not run.finished:
            run.advance(engine.CHUNK if not run.stop else 8)
        return run.completions()

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 128, **options: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it becomes final: never half a character, never a part of a stop string.

        Takes `generate`'s options but n and logprobs. Joined together, the pieces are `generate`'s text. Over a mesh of several
        processes each of them takes the same pieces.
        """
        for refused in ("n", "logprobs"):
            if refused in options:
                raise ValueError(f"stream gives one text and nothing beside it; for {refused} use generate")
        if self.tokenizer is None:
            raise ValueError("stream needs a tokenizer, and the checkpoint folder has none; generate gives token ids")
        stop, stop_ids, seed = options.pop("stop", ()), options.pop("stop_ids", None), options.pop("seed", None)
        ids = self._encode_all(prompt)
        if len(ids) != 1:
            raise ValueError(f"stream takes one prompt; it was given {len(ids)}")
        run = _Run(self, ids, sampling.Sampling(**options), max_new_tokens, stop, stop_ids, seed, 1, None)
        return self._pieces(run)

    def _pieces(self, run: _Run) -> Iterator[str]:
        together = processes(self.mesh) > 1  # all make the same calls, whatever each one's clock says
        steps = 8 if together else 1
        while True:
            if piece := run.rows[0].take_text():
                yield piece
            if run.finished:
                return
            start = time.perf_counter()
            run.advance(steps)
            # a call for every token costs a fast model more than its steps; a slow one should be seen token by token
            if not together:
                steps = min(2 * steps, 16) if time.perf_counter() - start < 0.05 else max(steps // 2, 1)

    def _check_budget(self, prompts: int, rows: int, tokens: int, length: int) -> None:
        """Refuse a call that needs more device memory than the model was loaded for."""
        if self.budget is None:
            return

        arch, plan, at, wide = self.architecture, self.plan, self.architecture.reread_at, below_ampere()

        def needs(prompts: int, rows: int, tokens: int, length: int) -> int:
            working = activation_bytes(arch, plan, batch=prompts, tokens=tokens, length=length, wide=wide)
            if rows > prompts:  # the prompts' cache stands until each has been copied to its samples
                working += cache_bytes(arch, plan, batch=prompts, length=length)
            if at is not None and length > at:  # every row read anew, in one piece
                again = activation_bytes(arch, plan, batch=rows, tokens=engine.bucket(at + 1), length=length, wide=wide)
                working = max(working, again)
            return device_bytes(arch, plan, batch=rows, length=length) + working

        if (asked := needs(prompts, rows, tokens, length)) > self.budget:
            each = rows // prompts
            fits = next((n for n in range(prompts - 1, 0, -1) if needs(n, n * each, tokens, length) <= self.budget), 0)
            nearest = (
                f"at most {fits} prompts of this length at a time" if fits else "a shorter prompt or fewer new tokens"
            )
            raise ValueError(
                f"{rows} rows of {length} tokens need {show_bytes(asked)} of device memory, and the model was loaded for"
                f" memory={show_bytes(self.budget)}: {nearest}, or load it with a larger batch or context"
            )

    def _check_score_budget(self, rows: int, tokens: int) -> None:
        """The same for `logits`, which keeps no cache, reads in one piece, and gives all logits in float32."""
        if self.budget is None:
            return
        whole = dataclasses.replace(self.plan, chunk=0)
        standing = device_bytes(self.architecture, self.plan, batch=0, length=1)
        working = activation_bytes(
            self.architecture, whole, batch=rows, tokens=tokens, length=tokens, wide=below_ampere()
        )
        asked = standing + working + 8 * rows * tokens * self.config.vocab_size
        if asked > self.budget:
            raise ValueError(
                f"logits of {rows} rows of {tokens} tokens need {show_bytes(asked)} of device memory, and the model was"
                f" loaded for memory={show_bytes(self.budget)}: score fewer or shorter rows at a time"
            )

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        format: str = "hf",
        dtype: str | None = None,
        overwrite: bool = False,
        max_shard_bytes: int | None = None,
    ) -> None:
        """Write the model to a folder, which appears whole or not at all.

        format 'hf': safetensors under Hugging Face's names, in `dtype` (the plan's if not given), quantised weights
        decoded, in files of at most `max_shard_bytes` (if not given, split as the folder it came from, or by 5 GB).
        'orbax': one chunk per layer, weights in the formats they are in, to be loaded by `load` or by plain orbax, with
        the plan beside them. 'compressed-tensors': as 'hf', with weights in integer formats (int8, int4, int3, int2) packed as
        they are, for transformers and vLLM. An adapter beside a matrix is merged into it: in 'hf' into the decoded matrix, in
        the others the sum is rounded to the matrix's format. Config and tokenizer go along.

        What is written is what is in memory. `load` has cast it to the plan's dtype: parameters that were stored wider
        (float32 norms beside bfloat16 matrices) have lost those digits for good, and a warning says so.
        `jaxengine.export.convert`, which reads the checkpoint itself, keeps each parameter's own dtype.

        Raises CheckpointError for a folder that is not empty, unless `overwrite`, and ValueError for a choice there is
        not.
        """
        if format not in export.FORMATS:
            raise ValueError(f"save: format is {format!r}; it can be {' or '.join(export.FORMATS)}")
        if dtype is not None and (format == "orbax" or dtype not in DTYPES):
            raise ValueError(f"save: dtype is {dtype!r}; it goes with format='hf' and can be {', '.join(DTYPES)}")
        if max_shard_bytes is not None and format == "orbax":
            raise ValueError(
                f"save: max_shard_bytes goes with format='hf'; {format!r} is not split into files of a size"
            )
        if processes(self.mesh) > 1:
            raise ValueError(
                f"save: one process writes a model, and the mesh {self.plan.mesh!r} is of {processes(self.mesh)}: load it on"
                f" devices of one and save it there, or convert the checkpoint itself (jaxengine.export.convert)"
            )
        if format == "orbax" and jax.process_count() > 1:
            raise ValueError(
                f"save: orbax writes with all {jax.process_count()} processes, and this model is in one of them: say format='hf',"
                f" or save it where there is one process"
            )
        if not self.origin.config:
            raise ValueError("save: this model was made without a config.json; give from_arrays its fields")
        lost = [name for name, was in self.origin.dtypes.items() if export.loses(was, self.plan.dtype)]
        parts, stored = placement.stored(self.architecture, self.plan, self.params), np.dtype(dtype or self.plan.dtype)
        one = export.merged(self.plan, self.architecture, lambda n: parts[n]())
        with output_folder(folder, overwrite=overwrite) as temporary:
            if lost:
                log.warning(
                    "save: %d of %d parameters were cast to %s when they were loaded, e.g. %s from %s, and are saved with"
                    " what is left of them; `jaxengine convert` keeps each parameter's own dtype",
                    len(lost), len(parts), self.plan.dtype, lost[0], self.origin.dtypes[lost[0]],
                )  # fmt: skip
            if format == "orbax":
                export.write_orbax(temporary, self.architecture, self.plan, one, lambda n: stored, self.origin)
            elif format == "compressed-tensors":
                compressed.write(
                    temporary, self.architecture, self.plan, one, lambda n: stored, self.origin,
                    max_shard_bytes=max_shard_bytes,
                )  # fmt: skip
            else:
                export.write_hf(
                    temporary, self.architecture, lambda n: parts[n](), lambda n: stored, self.origin,
                    max_shard_bytes=max_shard_bytes,
                )  # fmt: skip

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _put(self, x: np.ndarray) -> Array:
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))

    def _encode_all(self, prompts: Any) -> list[list[int]]:
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer | Mapping))
        if not one and len(prompts) == 0:
            raise ValueError("There is no prompt: give a string, a chat, a list of token ids, or a list of these")
        return [self._encode(p) for p in ([prompts] if one else prompts)]

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping)):
            if self.tokenizer is None:
                raise ValueError("The checkpoint folder has no tokenizer: give prompts as lists of token ids")
            return self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        if not all(isinstance(i, int | np.integer) for i in prompt):
            raise ValueError(f"A prompt is a string, a list of {{'role', 'content'}} or a list of ids, not {prompt!r}")
        return [int(i) for i in prompt]

    def _check_ids(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        V, most = self.config.vocab_size, self.config.max_position_embeddings
        for i, row in enumerate(ids):
            if not row:
                raise ValueError(f"Prompt {i} is empty: generation needs at least one token to start from")
            if bad := [t for t in row if not 0 <= t < V]:
                raise ValueError(f"Prompt {i} has token id {bad[0]}; ids are 0 to {V - 1}")
            length = len(row) + max_new_tokens
            if length > most:
                grown = f"; with max_new_tokens={max_new_tokens} that is {length}," if max_new_tokens else ""
                said = f"Prompt {i} has {len(row)} tokens{grown} and max_position_embeddings is {most}"
                if any(n.endswith("positions") for n in self.architecture.outer()[1]):
                    fits = f"max_new_tokens={max(0, most - len(row))}" if max_new_tokens else f"{most} tokens"
                    raise ValueError(f"{said}: this model has no position beyond it. At most {fits}")
                log.warning("%s: the model was not trained beyond it", said)


class _Row:
    """One completion in the making: its tokens, its text as far as it is final, and whether it has ended."""

    def __init__(
        self,
        prompt: int,
        ids: Sequence[int],
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        stop_ids: frozenset[int],
    ):
        self.prompt, self.stop_ids = prompt, stop_ids
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self.text = ""
        self._taken = 0
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, context=[t for t in ids[-32:] if t < tokenizer.vocab_size])
        )
        self._known = 0 if tokenizer is None else tokenizer.vocab_size
        self._stopper = StopStrings(stop) if stop else None

    def add(self, token: int, logprob: float, top: dict[int, float]) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        if token in self.stop_ids:
            return self.end("stop")
        # an embedding may have more rows than the tokenizer has tokens (padded for speed): such an id has no text
        known = self._detokenizer is not None and token < self._known
        if known and self._emit(self._detokenizer.push(token)):  # pyright: ignore[reportOptionalMemberAccess]
            self.finish_reason = "stop"
        return None

    def end(self, reason: str) -> None:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        if self._emit(rest):
            reason = "stop"
        elif self._stopper is not None:
            self.text += self._stopper.flush()
        self.finish_reason = reason

    def _emit(self, text: str) -> bool:
        if self._stopper is None:
            self.text += text
            return False
        emitted, stopped = self._stopper.push(text)
        self.text += emitted
        return stopped

    def take_text(self) -> str:
        piece, self._taken = self.text[self._taken :], len(self.text)
        return piece


class _Run:
    """A batch on its way: the compiled state, and what has come out of it."""

    def __init__(
        self,
        model: Model,
        ids: list[list[int]],
        how: sampling.Sampling,
        max_new_tokens: int,
        stop: str | Sequence[str],
        stop_ids: int | Sequence[int] | None,
        seed: int | None,
        n: int,
        logprobs: int | None,
    ):
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        for name, given, least in (("max_new_tokens", max_new_tokens, 1), ("n", n, 1), ("logprobs", logprobs or 0, 0)):
            if not isinstance(given, int | np.integer) or given < least:
                raise ValueError(f"{name} is {given!r}; it must be a whole number, at least {least}")
        if self.stop and model.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer, and the checkpoint folder has none; use stop_ids")
        if isinstance(stop_ids, int):
            stop_ids = (stop_ids,)
        elif stop_ids is not None:
            stop_ids = tuple(stop_ids)
        V = model.config.vocab_size
        if bad := [i for i in stop_ids or () if not 0 <= i < V]:
            raise ValueError(f"stop_ids: {bad[0]} is no token; ids are 0 to {V - 1}")
        if stop_ids is None:
            stop_ids = model.tokenizer.eos_ids if model.tokenizer is not None else _config_eos(model.origin.config)
        model._check_ids(ids, max_new_tokens)
        self.model, self.limit, self.top, self.wants_logprobs = (
            model,
            max_new_tokens,
            logprobs or 0,
            logprobs is not None,
        )
        if self.top > V:
            raise ValueError(f"logprobs is {logprobs}; the vocabulary has {V} tokens")
        owners = [i for i in range(len(ids)) for _ in range(n)]
        self.rows = [_Row(i, ids[i], model.tokenizer, self.stop, frozenset(stop_ids)) for i in owners]
        self.ids = ids
        self.steps = sampling.Steps.of([how])
        self.values = sampling.values(self.steps, [how] * len(owners))
        agree = functools.partial(_of_first, model.mesh) if processes(model.mesh) > 1 else None
        padded = np.full(engine.bucket(len(stop_ids), least=8), -1, np.int32)  # their number must not compile anew
        padded[: len(stop_ids)] = sorted(stop_ids)
        self.stop_ids = model._put(padded)
        longest = max(map(len, ids))
        tokens = np.zeros((len(ids), engine.bucket(longest)), np.int32)
        length = engine.bucket(longest + max_new_tokens, least=64)
        model._check_budget(len(ids), len(owners), tokens.shape[1], length)
        for row, given in zip(tokens, ids, strict=True):
            row[: len(given)] = given
        self.now, chosen = model.runs.prefill(
            model.engine, self.steps, length, n, self.top, model.params,
            model._put(tokens), model._put(np.asarray([len(i) for i in ids], np.int32)), self.values,
            sampling.row_keys(seed, [j for _ in ids for j in range(n)], agree), self.stop_ids,
        )  # fmt: skip
        self.made = 1
        self._keep(jax.tree.map(lambda a: a[:, None], chosen), 1)

    @property
    def finished(self) -> bool:
        return all(r.finish_reason is not None for r in self.rows)

    def advance(self, steps: int) -> None:
        """Make up to `steps` more tokens in each row that has not ended."""
        limit = min(steps, self.limit - self.made, engine.CHUNK, self._steps_before_reread())
        m = self.model
        self.now, chosen, made = m.runs.decode(
            m.engine, self.steps, self.top, m.params, self.now, self.values, self.stop_ids, jnp.int32(limit)
        )
        self.made += limit
        self._keep(chosen, int(made))

    def _steps_before_reread(self) -> int:
        """How many steps until a row has to be read anew; rows for which that time has come are read anew now."""
        at = self.model.architecture.reread_at
        if at is None:
            return engine.CHUNK
        rows: list[list[int]] = [[] if r.finish_reason else self.ids[r.prompt] + r.tokens for r in self.rows]
        turning = np.asarray([len(row) == at + 1 for row in rows])
        if turning.any():
            tokens = np.zeros((len(rows), engine.bucket(at + 1)), np.int32)
            for i in np.flatnonzero(turning):
                tokens[i, : at + 1] = rows[i]
            m = self.model
            self.now = m.runs.reread(m.engine, m.params, self.now, m._put(tokens), m._put(turning))
        return min((at + 1 - len(row) for row in rows if 0 < len(row) <= at), default=engine.CHUNK)

    def _keep(self, chosen: engine.Chosen, made: int) -> None:
        tokens, logprobs, top_ids, top_logprobs = (
            _whole(a) for a in (chosen.token, chosen.logprob, chosen.top_ids, chosen.top_logprobs)
        )
        for b, row in enumerate(self.rows):
            for t in range(made):
                if row.finish_reason is None:
                    top = dict(zip(top_ids[b, t].tolist(), top_logprobs[b, t].tolist(), strict=True))
                    row.add(int(tokens[b, t]), float(logprobs[b, t]), top)
            if row.finish_reason is None and self.made >= self.limit:
                row.end("length")
        done = [r.finish_reason is not None for r in self.rows]
        if self.stop and any(done):  # the device knows of stop ids alone
            self.now = dataclasses.replace(self.now, done=self.model._put(np.asarray(done)))

    def completions(self) -> list[Completion]:
        """What every row gave, in the order of the prompts."""
        return [
            Completion(
                r.text, r.tokens, r.finish_reason or "length", r.prompt,
                r.logprobs if self.wants_logprobs else None, r.top if self.wants_logprobs and self.top else None,
            )
            for r in self.rows
        ]  # fmt: skip


def _whole(x: Array) -> np.ndarray:
    """All of an array, in each process that has some of it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _of_first(mesh: Mesh, x: np.ndarray) -> np.ndarray:
    """What the process of a mesh's first device gave, in each of the mesh's processes."""
    along = Mesh(mesh.devices.reshape(-1), ("all",))
    each = jax.make_array_from_callback(
        (along.size, *x.shape), NamedSharding(along, PartitionSpec("all")), lambda index: x[None]
    )
    return _whole(each)[0]


def _config_eos(config: Mapping[str, Any]) -> tuple[int, ...]:
    found = config.get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)
