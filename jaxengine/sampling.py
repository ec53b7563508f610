"""From logits to a token: pure functions that a compiled decode loop calls at each step.

A request says what it wants in a `Sampling`. A batch of requests is split in two: `Steps`, the static and hashable
question "which processors does any row need", and `values`, the numbers themselves as arrays of shape [B]. A program
is compiled per `Steps` and never per number: temperature 0.7 or 0.8, top-k 10 or 40 run the same code, greedy decoding
compiles to an argmax without a sort, without random bits and without a [B, V] table of counts. Rows with different
settings share a batch: a row that does not use a processor gets that processor's neutral number, so that a greedy row
among sampled ones is exactly greedy.

The order is that of transformers' `generate`: repetition penalty (CTRL, arXiv:1909.05858), presence and frequency
penalties (OpenAI's definition; vLLM applies them at the same place), temperature, top-k, top-p (arXiv:1904.09751),
min-p (arXiv:2407.01082). Top-k and top-p share one ascending sort of the logits' values; no index travels with it and
nothing is scattered back. What the sort yields is a threshold and how many of the tokens that equal it stay, and those
are found again in the order of their ids. The price is one more cumulative sum over V; the gain is a sort of half the
bytes. Min-p is a comparison with the largest logit and needs no sort.

Tokens are drawn with Gumbel noise from each row's own key, so a row's text depends neither on its neighbours nor on its
place in the batch. Everything is computed in float32. A row whose logits hold NaN yields some token in [0, V) and
the log-probability NaN, and leaves the other rows alone.

Legend: B batch, T prompt positions, V vocab.
"""

import math
import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

# Temperatures and repetition penalties are clipped to this range on their way to float32, where 1e-50 would be 0 and
# 1e300 infinite. Beyond it nothing changes any more: one is greedy, the other uniform.
_SMALLEST, _LARGEST = 1e-30, 1e30

# A seed gives the same text whatever `jax_default_prng_impl` says; and a row's draw must not depend on its neighbours,
# which "rbg" keys do not promise under vmap.
_PRNG = "threefry2x32"


def _number(name: str, value: float) -> float:
    """`value` as a float, refused if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number; leave it out for its default")
    return number


def _whole(name: str, value: int, rule: str, nearest: str) -> int:
    """`value` as an int, refused if it is a bool or not a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be {rule}; {nearest}") from None


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen. The defaults are greedy decoding.

    temperature: logits are divided by it; 0 means greedy, and then top_k, top_p and min_p have nothing to do.
    top_k: keep the k largest logits and whatever equals the k-th; None keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p, at least one; None or 1 keeps all.
    min_p: keep the tokens at least min_p times as likely as the likeliest; None or 0 keeps all.
    repetition_penalty: tokens in the prompt or generated so far: positive logits divided by it, negative multiplied.
    presence_penalty: subtracted from the logit of each token generated so far.
    frequency_penalty: subtracted once for every time that the token was generated.

    Raises ValueError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        if _number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature={self.temperature!r} must be 0 or more; use 0.0 for greedy decoding")
        if self.top_k is not None:
            nearest = "use 1 for the likeliest token only, or None to keep all"
            if _whole("top_k", self.top_k, "a whole number, 1 or more", nearest) < 1:
                raise ValueError(f"top_k={self.top_k!r} must be 1 or more; {nearest}")
        if self.top_p is not None and not 0 < _number("top_p", self.top_p) <= 1:
            nearest = "use 1.0 or None to keep all" if self.top_p > 1 else "use top_k=1 for the likeliest token only"
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1; {nearest}")
        if self.min_p is not None and not 0 <= _number("min_p", self.min_p) <= 1:
            nearest = "1.0 for the likeliest token only" if self.min_p > 1 else "0.0 or None to keep all"
            raise ValueError(f"min_p={self.min_p!r} must be at least 0 and at most 1; use {nearest}")
        if _number("repetition_penalty", self.repetition_penalty) <= 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty!r} must be above 0; use 1.0 for none, more to discourage"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = _number(name, getattr(self, name))
            if not -2 <= value <= 2:
                raise ValueError(f"{name}={value!r} must be at least -2 and at most 2; use {math.copysign(2.0, value)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Steps:
    """Which processors any row of a batch needs: the static argument that compiled programs are keyed on.

    It holds no number that a user can turn, so turning one does not compile again.
    """

    sampled: bool = False  # some row draws at random; without it there are neither random bits nor a temperature
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    repetition: bool = False
    counted: bool = False  # presence or frequency penalty

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Steps":
        """The smallest Steps that serve all `samplings`; larger ones serve them too, with the same result."""
        drawn = [s for s in samplings if not s.greedy]
        return cls(
            sampled=bool(drawn),
            top_k=any(s.top_k is not None for s in drawn),
            top_p=any(s.top_p is not None and s.top_p < 1 for s in drawn),
            min_p=any(s.min_p is not None and s.min_p > 0 for s in drawn),
            repetition=any(s.repetition_penalty != 1 for s in samplings),
            counted=any(s.presence_penalty != 0 or s.frequency_penalty != 0 for s in samplings),
        )


def values(steps: Steps, samplings: Sequence[Sampling]) -> dict[str, Array]:
    """The numbers of a batch, one array [B] each, and only those that `steps` reads: the dynamic half of `samplings`.

    Top-p travels as its tail 1 - p and min-p as its logarithm, both taken in float64 here: p = 0.999999 rounded to
    float32 first would be off by over 1% of its tail.

    Raises ValueError if a row asks for a processor that `steps` leaves out.
    """
    needed = Steps.of(samplings)
    missing = [f.name for f in fields(Steps) if getattr(needed, f.name) and not getattr(steps, f.name)]
    if missing:
        raise ValueError(
            f"steps={steps} leave out {', '.join(missing)}, which a row of this batch needs; every processor in use "
            f"must be compiled in; use Steps.of(samplings), here {needed}"
        )

    def each(of_row, dtype: type = np.float32) -> Array:
        return jnp.asarray(np.array([of_row(s) for s in samplings], dtype))

    out: dict[str, Array] = {}
    if steps.repetition:
        out["repetition_penalty"] = each(lambda s: min(max(s.repetition_penalty, _SMALLEST), _LARGEST))
    if steps.counted:
        out["presence_penalty"] = each(lambda s: s.presence_penalty)
        out["frequency_penalty"] = each(lambda s: s.frequency_penalty)
    if steps.sampled:
        out["sampled"] = each(lambda s: not s.greedy, np.bool_)
        out["temperature"] = each(lambda s: 1.0 if s.greedy else min(max(s.temperature, _SMALLEST), _LARGEST))
    if steps.top_k:
        everything = np.iinfo(np.int32).max
        out["top_k"] = each(lambda s: everything if s.greedy or s.top_k is None else min(s.top_k, everything), np.int32)
    if steps.top_p:
        out["tail"] = each(lambda s: 0.0 if s.greedy or s.top_p is None else 1.0 - s.top_p)
    if steps.min_p:
        out["log_min_p"] = each(lambda s: -math.inf if s.greedy or not s.min_p else math.log(s.min_p))
    return out


class Counts(NamedTuple):
    """What the penalties know of a batch's text. A field that no penalty reads is None: no leaf, no memory."""

    prompt: Bool[Array, "B V"] | None = None  # the token occurs in the prompt
    generated: Int[Array, "B V"] | None = None  # how often it was generated


def init_counts(steps: Steps, ids: Int[Array, "B T"], valid: Bool[Array, "B T"], vocab_size: int) -> Counts:
    """Counts before the first token. Padding (`valid` False) and ids outside [0, vocab_size) count for nothing."""
    prompt = generated = None
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    if steps.repetition:
        # a negative index would count from the end; one past the end is dropped
        ids = jnp.where(valid & (ids >= 0), ids, vocab_size)
        prompt = jnp.zeros((ids.shape[0], vocab_size), jnp.bool_).at[rows, ids].set(True, mode="drop")
    if steps.repetition or steps.counted:
        generated = jnp.zeros((ids.shape[0], vocab_size), jnp.int32)
    return Counts(prompt, generated)


def update_counts(steps: Steps, counts: Counts, token: Int[Array, "B"]) -> Counts:
    """Counts after each row was given `token`; a token outside [0, V), say -1 for a finished row, is not counted."""
    if not (steps.repetition or steps.counted):
        return counts
    generated = _generated(counts)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    token = jnp.where(token >= 0, token, generated.shape[1])
    return counts._replace(generated=generated.at[rows, token].add(1, mode="drop"))


def _generated(counts: Counts) -> Int[Array, "B V"]:
    if counts.generated is None:
        raise ValueError("counts hold no generated tokens but steps have a penalty; make both from the same Steps")
    return counts.generated


def _prompt(counts: Counts) -> Bool[Array, "B V"]:
    if counts.prompt is None:
        raise ValueError("counts hold no prompt but steps have a repetition penalty; make both from the same Steps")
    return counts.prompt


def _float32(logits: Array) -> None:
    if logits.dtype != jnp.float32:
        raise TypeError(f"logits are {logits.dtype}, sampling is done in float32; pass logits.astype(jnp.float32)")


def process(steps: Steps, values: dict[str, Array], logits: Float[Array, "B V"], counts: Counts) -> Float[Array, "B V"]:
    """Penalised, tempered and filtered logits, -inf where a token is removed.

    Equal logits are treated as transformers treats them: top-k keeps everything that equals the k-th. Top-p keeps the
    smallest set, so it may have to choose among equals; transformers leaves that to an unstable sort, here the smaller
    id stays, which makes top-p near 0 agree with argmax. A greedy row takes the penalties and nothing else.
    """
    _float32(logits)
    z = logits
    if steps.repetition:
        r = values["repetition_penalty"][:, None]
        z = jnp.where(_prompt(counts) | (_generated(counts) > 0), jnp.where(z < 0, z * r, z / r), z)
    if steps.counted:
        n = _generated(counts)
        z = z - values["frequency_penalty"][:, None] * n.astype(jnp.float32)
        z = z - jnp.where(n > 0, values["presence_penalty"][:, None], 0.0)
    if steps.sampled:
        z = z / values["temperature"][:, None]
    if steps.top_k or steps.top_p:
        z = _largest(steps, values, z)
    if steps.min_p:
        # p_i < min_p * p_max, with the normaliser cancelled and the logarithm taken: nothing underflows
        z = jnp.where(z < jnp.max(z, axis=1, keepdims=True) + values["log_min_p"][:, None], -jnp.inf, z)
    return z


def _largest(steps: Steps, values: dict[str, Array], z: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Top-k, then top-p over what it left, from one sort. Comparisons ask what goes, so that NaN stays to be seen."""
    V = z.shape[1]
    s = lax.sort(z, dimension=1)
    if steps.top_k:
        kth = jnp.take_along_axis(s, V - jnp.minimum(values["top_k"], V)[:, None], axis=1)
        z, s = jnp.where(z < kth, -jnp.inf, z), jnp.where(s < kth, -jnp.inf, s)
    if steps.top_p:
        # summed from the small end, as transformers does: the tail is what is compared, and it keeps its digits
        mass = jnp.cumsum(jnp.exp(s - s[:, -1:]), axis=1)
        tail = values["tail"][:, None]
        gone = (tail > 0) & (mass <= tail * mass[:, -1:])
        first = jnp.minimum(jnp.sum(gone, axis=1, keepdims=True, dtype=jnp.int32), V - 1)
        edge = jnp.take_along_axis(s, first, axis=1)
        place = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        room = jnp.sum((s == edge) & (place >= first), axis=1, keepdims=True, dtype=jnp.int32)
        level = z == edge
        z = jnp.where((z < edge) | (level & (jnp.cumsum(level, axis=1, dtype=jnp.int32) > room)), -jnp.inf, z)
    return z


def sample(
    steps: Steps, values: dict[str, Array], logits: Float[Array, "B V"], counts: Counts, keys: Key[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token per row, int32, and its log-probability, float32.

    The log-probability is that of the model: log_softmax of `logits` as they came, before penalties, temperature and
    filters, as OpenAI and vLLM report it. So it is comparable between settings, and a token drawn under top_k=1 does
    not report 0. `keys` are one typed PRNG key per row for this step, from `step_keys`; greedy rows do not use theirs.
    """
    z = process(steps, values, logits, counts)
    if steps.sampled:
        V = logits.shape[1]
        # mode "high": with 23 random bits a token and V = 150000 equal logits, about one step in a hundred ends in a
        # tie for the largest, which argmax gives to the smaller id
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32, mode="high"))(keys)
        z = z + jnp.where(values["sampled"][:, None], noise, 0.0)
    token = lax.argmax(z, 1, jnp.int32)
    return token, _logprobs(logits, jnp.take_along_axis(logits, token[:, None], axis=1))[:, 0]


def _logprobs(logits: Float[Array, "B V"], chosen: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """log_softmax at the `chosen` logits, without writing it for all of V."""
    top = jnp.max(logits, axis=1, keepdims=True)
    return (chosen - top) - jnp.log(jnp.sum(jnp.exp(logits - top), axis=1, keepdims=True))


def top_logprobs(logits: Float[Array, "B V"], n: int) -> tuple[Int[Array, "B N"], Float[Array, "B N"]]:
    """The `n` likeliest tokens of each row, likeliest first, and their log-probabilities, of the raw logits as in
    `sample`; among equals the smaller id comes first.

    Raises ValueError if n is not in [0, V].
    """
    _float32(logits)
    V = logits.shape[1]
    if not 0 <= _whole("logprobs", n, "a whole number", "use 0 for none") <= V:
        raise ValueError(f"logprobs={n} must be at least 0 and at most the vocabulary's size; use {0 if n < 0 else V}")
    largest, ids = lax.top_k(logits, n)
    return ids, _logprobs(logits, largest)


def row_keys(
    seed: int | None, samples: Sequence[int], agree: Callable[[np.ndarray], np.ndarray] | None = None
) -> Key[Array, "B"]:
    """One key per row of a batch; samples[b] = j says that row b is the j-th continuation of its prompt.

    The key depends on (seed, j) and not on b: a prompt gives the same text alone and in any batch. Without a seed each
    row draws its own key from the operating system; agree: takes such words, uint32 [B, 2], that each process of several drew,
    to those that all of them use. `jax.random.key` keeps 32 bits of a seed; here 64 count, and below 2**32 the keys are the
    same.

    Raises ValueError for a seed outside [0, 2**64) or a sample index outside [0, 2**32).
    """
    js = [_whole("sample index", j, "a whole number", "number the samples 0, 1, ...") for j in samples]
    for j in js:
        if not 0 <= j < 2**32:
            raise ValueError(f"sample index {j} must be at least 0 and below 2**32; number the samples 0, 1, ...")
    if seed is None:
        words = np.frombuffer(secrets.token_bytes(8 * len(js)), np.uint32).reshape(len(js), 2)
        if agree is not None:
            words = agree(words)
        return jax.random.wrap_key_data(jnp.asarray(words), impl=_PRNG)
    number = _whole("seed", seed, "a whole number or None", "use None for a fresh one")
    if not 0 <= number < 2**64:
        raise ValueError(
            f"seed={seed} must be at least 0 and below 2**64; use {number % 2**64}, or None for a fresh one"
        )
    words = np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)
    root = jax.random.wrap_key_data(jnp.asarray(words), impl=_PRNG)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, jnp.asarray(np.array(js, np.uint32)))


def step_keys(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """This step's keys: each row's key folded with the position that its new token takes in its own text.

    Count positions without padding; then neither padding nor the number of tokens decoded per call changes the text.
    """
    return jax.vmap(jax.random.fold_in)(keys, positions)
