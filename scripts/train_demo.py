"""Trains the demo checkpoint: a 1 M parameter Llama, on two CPU cores, in less than an hour.

The checkpoint exists so that every weight format and cache policy can be judged by what it does to a model which has
really learned something, on any machine and offline. `demo_tasks.py` says what it learns.

Three choices buy the speed. Half of a batch are tasks, and the loss on them is taken on the answers alone: the keys,
strings and numbers asked about are random, and predicting them teaches nothing. Muon (Jordan et al., 2024; Liu et al.,
arXiv:2502.16982) takes the matrices, Adam the embedding and the norms. The learning rate is constant and then falls
linearly to zero (Hägele et al., arXiv:2405.18392), so that an interrupted run can be resumed with fewer or more steps.
The forward pass is plain jnp on a flat {Hugging Face name: array} tree, so that what is trained can be saved as it is;
attention goes over blocks of queries, each against the keys before its end, which halves its cost on a CPU. The
first steps have many short rows, in which looking back is learned sooner (an induction head; Olsson et al.,
arXiv:2209.11895), the others rows as long as the context. float32, because bfloat16 products are slow on a CPU; the
file is rounded to bfloat16 at the end.

    python scripts/train_demo.py OUT [--work FOLDER] [--steps 2600]

B batch, T queries, S slots, D model, F mlp, N query heads, K kv heads, G heads per kv head, H head dim, V vocab.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import demo_tasks as tasks
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from checkpoints.output import output_folder
from checkpoints.safetensors import write_file
from jaxengine.command import SETTINGS, reported, start_jax

Parameters = dict[str, Array]
State = tuple[Parameters, optax.OptState]


@dataclass(frozen=True)
class Shape:
    """The demo model's sizes: multiples of 128, so that every usual group size of a weight format divides them."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Stage:
    """A part of the training: so many rows of so many tokens a step, the first ones of them text."""

    rows: int
    text_rows: int
    length: int


SHAPE = Shape()
SHORT, LONG = Stage(rows=24, text_rows=8, length=128), Stage(rows=8, text_rows=5, length=tasks.CONTEXT)
SHORT_STEPS = 600
TASK_SHARES = {"recall": 6, "copy": 4, "arithmetic": 6, "chat": 4}
QUERY_BLOCK = 64  # measured at width 256: one block of 384 3900 tokens/s, 128 4390, 64 4620 (two Xeon cores)
ANSWER_WEIGHT = 2.0
EMBEDDING_STD, OUTPUT_SCALE, SHIFT_SCALE = 0.06, 0.1, 8.0  # at the start
MATRIX_RATE, VECTOR_RATE, WEIGHT_DECAY = 0.01, 1e-3, 0.05
WARMUP, DECAY = 50, 0.35  # steps; the last part of them all
WORD_REPEATS = 4000  # of the tasks' words in the tokenizer's text, so that each becomes one token


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, which arithmetic needs, and the tasks' words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    words = "\n".join(tasks.KEYS) + "\n#" + "".join(f" {word}" for word in (*tasks.VALUES, *tasks.FILLER)) + "\n"
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size,
        special_tokens=list(tasks.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[words] * WORD_REPEATS], trainer)
    bos = tokenizer.token_to_id(tasks.BOS)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{tasks.BOS} $A", pair=f"{tasks.BOS} $A $B", special_tokens=[(tasks.BOS, bos)]
    )
    for word in (*tasks.KEYS, *(f" {word}" for word in (*tasks.VALUES, *tasks.FILLER))):
        if len(ids := tokenizer.encode(word, add_special_tokens=False).ids) != 1:
            raise ValueError(f"The word {word!r} became {len(ids)} tokens and must be one: raise WORD_REPEATS.")
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the beginning and the end of a document."""
    bos, eos = (tokenizer.token_to_id(token) for token in (tasks.BOS, tasks.EOS))
    if bos is None or eos is None:
        raise ValueError(
            f"the tokenizer has no {tasks.BOS} or no {tasks.EOS}; give a --work folder of this script's own"
        )
    return bos, eos


# ---------------------------------------------------------------------------------------------------------------------
# Model


def initial_parameters(shape: Shape, seed: int) -> Parameters:
    """By Hugging Face name; matrices are [out, in].

    A head starts as what it would take long to become. Queries are keys, and a head writes what it reads (W_o is a
    little of W_v's transpose), so that like attends to like and repeats it (mimetic initialisation, Trockman & Kolter,
    arXiv:2305.09828). The embeddings have a part in common, from which the first layer's heads make fixed queries and
    keys, turned against each other so that they look one token back, and two: the first half of an induction head.
    The MLPs start at zero.
    """
    D, F, H = shape.hidden_size, shape.intermediate_size, shape.head_dim
    N, K, G = shape.num_heads, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 4 * shape.num_layers))
    common_D = jax.random.rademacher(next(keys), (D,), jnp.float32)
    embedding_VD = EMBEDDING_STD * (jax.random.normal(next(keys), (shape.vocab_size, D)) + common_D[None])
    parameters = {"model.embed_tokens.weight": embedding_VD, "model.norm.weight": jnp.ones(D)}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}."
        k_KHD, v_KHD = (D**-0.5 * jax.random.normal(next(keys), (K, H, D)) for _ in range(2))
        q_NHD, v_NHD = jnp.repeat(k_KHD, G, axis=0), jnp.repeat(v_KHD, G, axis=0)
        if layer == 0:
            fixed_H, turned_NH = shifted_keys(shape)
            q_NHD = q_NHD / 4 + turned_NH[:, :, None] * common_D[None, None] / D
            k_KHD = k_KHD / 4 + fixed_H[None, :, None] * common_D[None, None] / D
        parameters |= {
            f"{at}input_layernorm.weight": jnp.ones(D),
            f"{at}self_attn.q_proj.weight": q_NHD.reshape(N * H, D),
            f"{at}self_attn.k_proj.weight": k_KHD.reshape(K * H, D),
            f"{at}self_attn.v_proj.weight": v_KHD.reshape(K * H, D),
            f"{at}self_attn.o_proj.weight": OUTPUT_SCALE * v_NHD.reshape(N * H, D).T,
            f"{at}post_attention_layernorm.weight": jnp.ones(D),
            f"{at}mlp.gate_proj.weight": D**-0.5 * jax.random.normal(next(keys), (F, D)),
            f"{at}mlp.up_proj.weight": D**-0.5 * jax.random.normal(next(keys), (F, D)),
            f"{at}mlp.down_proj.weight": jnp.zeros((D, F)),
        }
    return parameters


def shifted_keys(shape: Shape) -> tuple[Float[Array, " H"], Float[Array, "N H"]]:
    """A key, and for each head a query that rope turns onto it at one token's distance, or at two, by turns."""
    frequency = shape.rope_theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    size = SHIFT_SCALE * (frequency > 0.05)  # slower ones do not tell neighbours apart
    key = np.concatenate([size, 0 * size])
    back = 1 + np.arange(shape.num_heads)[:, None] % 2
    query = np.concatenate([size * np.cos(back * frequency), -size * np.sin(back * frequency)], axis=1)
    return jnp.asarray(key, jnp.float32), jnp.asarray(query, jnp.float32)


def rms_norm(x: Float[Array, "M D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "M D"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight[None]


def rope(x: Float[Array, "B T K H"], theta: float) -> Float[Array, "B T K H"]:
    """Positions from 0; the halves of a head rotate against each other (Hugging Face's order)."""
    T, H = x.shape[1], x.shape[3]
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, H, 2) / H)[None]
    cos, sin = (jnp.asarray(f(angle)[None, :, None], jnp.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "M Z"]:
    """Causal attention, [B*T, N*H]: a block of queries sees only the keys up to its own end."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = q.reshape(B, T, K, G, H) * H**-0.5
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, T, H) for x in (k, v))
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        queries = q[:, start:end].transpose(0, 2, 3, 1, 4).reshape(B * K, G * (end - start), H)
        scores = jnp.einsum("xth,xsh->xts", queries, k[:, :end])
        seen = np.tile(np.arange(start, end)[:, None] >= np.arange(end)[None], (G, 1))
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -1e9), axis=-1)
        out = jnp.einsum("xts,xsh->xth", weights, v[:, :end])
        blocks.append(out.reshape(B, K, G, end - start, H).transpose(0, 3, 1, 2, 4))
    return jnp.concatenate(blocks, axis=1).reshape(B * T, N * H)


def forward(parameters: Parameters, tokens: Int[Array, "B T"], shape: Shape) -> Float[Array, "B T V"]:
    """Logits. The residual stream is [B*T, D]: one large product a matrix is what a CPU does best."""
    B, T = tokens.shape
    heads = {"q": shape.num_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads}
    embedding = parameters["model.embed_tokens.weight"]
    x = embedding[tokens].reshape(B * T, shape.hidden_size)
    for layer in range(shape.num_layers):
        p = {
            name.split(".")[-2].removesuffix("_proj"): w
            for name, w in parameters.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        h = rms_norm(x, p["input_layernorm"], shape.rms_norm_eps)
        q, k, v = ((h @ p[name].T).reshape(B, T, n, shape.head_dim) for name, n in heads.items())
        x = x + attention(rope(q, shape.rope_theta), rope(k, shape.rope_theta), v) @ p["o"].T
        h = rms_norm(x, p["post_attention_layernorm"], shape.rms_norm_eps)
        x = x + (jax.nn.silu(h @ p["gate"].T) * (h @ p["up"].T)) @ p["down"].T
    logits = rms_norm(x, parameters["model.norm.weight"], shape.rms_norm_eps) @ embedding.T
    return logits.reshape(B, T, shape.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def optimizer(parameters: Parameters, steps: int) -> optax.GradientTransformation:
    """Muon on the matrices, Adam on the embedding and the norms; both rates follow one trapezoid."""
    decay = int(steps * DECAY)

    def trapezoid(peak: float) -> optax.Schedule:
        parts = (optax.linear_schedule(peak / WARMUP, peak, WARMUP), optax.linear_schedule(peak, 0.0, decay))
        return optax.join_schedules(parts, [steps - decay])

    rows_and_columns = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    numbers: Any = {
        name: rows_and_columns if w.ndim == 2 and "embed" not in name else None for name, w in parameters.items()
    }
    return muon(
        trapezoid(MATRIX_RATE),
        weight_decay=WEIGHT_DECAY,
        adam_learning_rate=trapezoid(VECTOR_RATE),
        adam_b2=0.98,
        muon_weight_dimension_numbers=numbers,
    )


def loss(
    parameters: Parameters, tokens: Int[Array, "B T1"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Weighted cross-entropy in nats a token, and its two parts: text, and answers."""
    logits = forward(parameters, tokens[:, :-1], SHAPE)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def mean(w: Float[Array, "B T"]) -> Float[Array, ""]:
        return jnp.sum(nats * w) / jnp.maximum(jnp.sum(w), 1.0)

    text, answers = weights == 1.0, weights == ANSWER_WEIGHT
    return mean(weights), (mean(text.astype(jnp.float32)), mean(answers.astype(jnp.float32)))


class Batches:
    """batch(step) -> (tokens [B, T+1], loss weights [B, T]): a function of the step, so that a run resumes exactly."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.bos, self.eos = special_ids(tokenizer)
        texts = [text for _, text in tasks.text_files("train")]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        self.text = np.concatenate([np.array([self.bos, *e.ids, self.eos], np.int32) for e in encoded])
        self.text_bytes = sum(len(text.encode()) for text in texts)

    def text_row(self, number: int, length: int) -> np.ndarray:
        """Windows in random order, each of them once before any comes again, with other edges the next time."""
        windows = len(self.text) // length - 1
        epoch, at = divmod(number, windows)
        rng = np.random.default_rng((self.seed, length, epoch))
        phase, order = rng.integers(length), rng.permutation(windows)
        start = phase + order[at] * length
        return np.append(np.int32(self.bos), self.text[start : start + length])

    def task_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of one task until the row is full; the last one is cut."""
        kind = rng.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
        documents: dict[str, Callable[[random.Random, int], list[tasks.Piece]]] = {
            "recall": tasks.recall_document,
            "copy": lambda rng, left: tasks.copy_document(rng),
            "arithmetic": lambda rng, left: tasks.arithmetic_document(rng),
            "chat": lambda rng, left: tasks.chat_document(rng),
        }
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            pieces = documents[kind](rng, length - len(ids))
            ids.append(self.bos)
            weights.append(0.0)
            encoded = self.tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
            for piece, (_, answer) in zip(encoded, pieces, strict=True):
                ids += piece.ids
                weights += [ANSWER_WEIGHT * answer] * len(piece.ids)
        return np.array(ids[: length + 1]), np.array(weights[1 : length + 1])

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(f"{self.seed} {step}")
        stage = SHORT if step < SHORT_STEPS else LONG
        first = stage.text_rows * (step if stage is SHORT else step - SHORT_STEPS)
        rows = [(self.text_row(first + i, stage.length), np.ones(stage.length)) for i in range(stage.text_rows)]
        rows += [self.task_row(rng, stage.length) for _ in range(stage.rows - stage.text_rows)]
        tokens, weights = (np.stack(x) for x in zip(*rows, strict=True))
        return tokens.astype(np.int32), weights.astype(np.float32)


@partial(jax.jit, static_argnames="steps", donate_argnums=0)
def train_step(state: State, tokens: Array, weights: Array, steps: int) -> tuple[State, tuple[Array, Array]]:
    parameters, memory = state
    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, tokens, weights)
    update, memory = optimizer(parameters, steps).update(gradient, memory, parameters)
    return (optax.apply_updates(parameters, update), memory), parts  # pyright: ignore[reportReturnType]


# ---------------------------------------------------------------------------------------------------------------------
# Quick figures while it trains (scripts/eval.py makes the real ones)


@jax.jit
def _score(parameters: Parameters, tokens: Array) -> tuple[Array, Array]:
    """Bits of each next token, and whether it was the most likely one."""
    logits = forward(parameters, tokens[:, :-1], SHAPE)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return nats / np.log(2.0), jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def quick_figures(parameters: Parameters, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Held-out bits per byte, and each task's share of answers that are right token by token."""
    bos, T = special_ids(tokenizer)[0], tasks.CONTEXT
    sizes = [1 if token in tasks.SPECIAL_TOKENS else len(token) for token in _vocabulary(tokenizer)]

    def score(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((-(-len(rows) // LONG.rows) * LONG.rows, T + 1), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        parts = [
            jax.device_get(_score(parameters, padded[i : i + LONG.rows])) for i in range(0, len(padded), LONG.rows)
        ]
        bits, right = (np.concatenate(x) for x in zip(*parts, strict=True))
        return bits, right

    windows = tasks.text_windows(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    chosen = random.Random(0).sample(windows, 48)
    bits, _ = score([[bos, *ids] for ids in chosen])
    text_bits = sum(float(row[: len(ids)].sum()) for row, ids in zip(bits, chosen, strict=True))
    figures = {"bits per byte": text_bits / sum(sizes[i] for ids in chosen for i in ids)}
    for task in tasks.TASKS:
        rows, spans = [], []
        for example in tasks.examples(task, "held_out", count):
            prompt = tokenizer.encode(example.prompt).ids
            answer = tokenizer.encode(example.answer + example.stop, add_special_tokens=False).ids
            rows.append(prompt + answer)
            spans.append(slice(len(prompt) - 1, len(prompt) - 1 + len(answer)))
        _, right = score(rows)
        figures[task] = float(np.mean([right[i, span].all() for i, span in enumerate(spans)]))
    return figures


def _vocabulary(tokenizer: Tokenizer) -> list[str]:
    return [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save_state(path: Path, state: State, step: int, seconds: float) -> None:
    """Whole or not at all: the old file stands until the new one is complete."""
    arrays: dict[str, Any] = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    partial_path = path.with_suffix(".partial.npz")
    np.savez(partial_path, step=step, seconds=seconds, **arrays)
    os.replace(partial_path, path)


def load_state(path: Path, like: State) -> tuple[State, int, float]:
    """What save_state wrote, in the tree of `like`."""
    with np.load(path) as file:
        leaves, tree = jax.tree.flatten(like)
        read = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
        if [x.shape for x in read] != [x.shape for x in leaves]:
            raise ValueError(f"{path} holds another model's training state; give another --work folder.")
        return jax.tree.unflatten(tree, read), int(file["step"]), float(file["seconds"])


def save_folder(out: Path, parameters: Parameters, tokenizer: Tokenizer) -> None:
    """The checkpoint as transformers writes one; the folder appears whole or not at all."""
    bos, eos = special_ids(tokenizer)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SHAPE.vocab_size,
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": SHAPE.num_layers,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": SHAPE.num_kv_heads,
        "head_dim": SHAPE.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": tasks.CONTEXT,
        "rms_norm_eps": SHAPE.rms_norm_eps,
        "rope_theta": SHAPE.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tasks.BOS,
        "eos_token": tasks.EOS,
        "pad_token": tasks.EOS,
        "additional_special_tokens": [tasks.USER, tasks.ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": tasks.CONTEXT,
        "chat_template": tasks.CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, "do_sample": False}
    arrays = {name: np.asarray(w).astype(ml_dtypes.bfloat16) for name, w in parameters.items()}
    with output_folder(out) as folder:
        for name, content in {
            "config.json": config,
            "tokenizer_config.json": tokenizer_config,
            "generation_config.json": generation_config,
        }.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))
        write_file(
            folder / "model.safetensors",
            {name: (x.dtype, x.shape) for name, x in arrays.items()},
            arrays.__getitem__,
            {"format": "pt"},
        )


@click.command(**SETTINGS)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    default=Path(tempfile.gettempdir(), "jaxengine_demo"),
    help="Tokenizer and training state; an interrupted run resumes from here.",
)
@click.option("--steps", metavar="N", type=click.IntRange(2 * WARMUP), default=2600, help="Steps of 3072 tokens.")
@click.option("--save-every", metavar="N", type=click.IntRange(1), default=100, help="Steps between saved states.")
@click.option("--figures-every", metavar="N", type=click.IntRange(1), default=250, help="Steps between quick figures.")
@click.option("--seed", type=int, default=0, help="Draws the first parameters and the order of the data.")
@reported()
def main(out: Path, work: Path, steps: int, save_every: int, figures_every: int, seed: int) -> None:
    """Train the demo checkpoint and write it to OUT, a folder that does not exist, in Hugging Face's layout."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise click.BadParameter(f"{out} exists; give a folder that does not, or move it away", param_hint="OUT")
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    if (path := work / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = train_tokenizer([text for _, text in tasks.text_files("train")])
        tokenizer.save(str(path))
    batches = Batches(tokenizer, seed)
    console.print(f"text: {len(batches.text)} tokens, {batches.text_bytes / len(batches.text):.2f} bytes a token")

    parameters = initial_parameters(SHAPE, seed)
    state: State = (parameters, optimizer(parameters, steps).init(parameters))
    first, before = 0, 0.0
    if (path := work / "state.npz").exists():
        state, first, before = load_state(path, state)
    console.print(f"{sum(w.size for w in parameters.values())} parameters, from step {first} to {steps}")
    started = time.monotonic() - before

    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=first)
        batch = batches(first)
        for step in range(first, steps):
            state, parts = train_step(state, *batch, steps=steps)
            batch = batches(step + 1)  # while the step is being computed
            progress.update(bar, completed=step + 1)
            seconds = time.monotonic() - started
            if (step + 1) % 50 == 0:
                text, answers = (float(x) for x in parts)
                console.print(f"step {step + 1}  {seconds:.0f} s  text {text:.3f}  answers {answers:.3f} nats a token")
            if (step + 1) % save_every == 0:
                save_state(path, state, step + 1, seconds)
            if (step + 1) % figures_every == 0 or step + 1 == steps:
                figures = quick_figures(state[0], tokenizer, 32)
                console.print("   ".join(f"{name} {value:.3f}" for name, value in figures.items()), soft_wrap=True)
    save_folder(out, state[0], tokenizer)
    console.print(f"{out} written after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    start_jax()
    main()
