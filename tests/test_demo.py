"""The demo checkpoint and its tasks: small, disjoint, exactly what their names say, and as good as the README says.

A figure of the README is held against a small sample through the binomial distribution itself: the count of right
answers must not be one that the README's rate would give less than once in 10^5 samples.
"""

import importlib
import json
import math
import random
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

import jaxengine
from checkpoints.safetensors import Reader
from jaxengine import technique
from jaxengine.formats import WEIGHTS

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
tasks = importlib.import_module("demo_tasks")
evaluation = importlib.import_module("eval")
training = importlib.import_module("train_demo")

FOLDER = Path(jaxengine.demo_folder())
ONCE_IN = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> jaxengine.Model:
    return jaxengine.load(FOLDER, dtype="float32")


def readme_figures() -> dict[str, tuple[float, float, int]]:
    """The README's table: name -> value, standard error, samples."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", (FOLDER / "README.md").read_text(), re.M)
    return {name: (float(value), float(error), int(n)) for name, value, error, n in rows}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000
    with Reader.open(FOLDER) as reader:
        assert sum(math.prod(reader.info(name).shape) for name in reader.names) <= 4_000_000


def test_the_tokenizer_holds_the_tasks_words_as_one_token_each(tokenizer):
    for word in (*tasks.KEYS, *(f" {word}" for word in (*tasks.VALUES, *tasks.FILLER)), *"0123456789"):
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    assert tokenizer.encode("1234", add_special_tokens=False).tokens == list("1234")


def test_config_tokenizer_and_generation_agree(tokenizer):
    config, generation = (json.loads((FOLDER / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["max_position_embeddings"] == tasks.CONTEXT
    for name, token in (("bos_token_id", tasks.BOS), ("eos_token_id", tasks.EOS)):
        assert config[name] == generation[name] == tokenizer.token_to_id(token)
    assert tokenizer.encode("x").tokens[0] == tasks.BOS


def test_text_survives_the_tokenizer(tokenizer):
    text = "def f(x):\n\treturn 'naïve 日本 🙂'  # 3.14\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---------------------------------------------------------------------------------------------------------------------
# The tasks


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_generators_are_deterministic(task, split):
    drawn = tasks.examples(task, split, 20)
    assert drawn == tasks.examples(task, split, 20)
    assert drawn[:5] == tasks.examples(task, split, 5)
    assert drawn != tasks.examples(task, split, 20, seed=1)


def test_generators_are_pinned():
    """The README's figures are of these very questions, on every Python."""
    assert tasks.examples("addition", "held_out", 3)[0] == tasks.Example("16+49=", "65", "\n")
    copied = tasks.examples("copy, 8 letters", "held_out", 3)[0]
    assert copied == tasks.Example("copy: usjk dwij\npaste:", " usjk dwij", "\n")


def asked(text: str) -> set[str]:
    """Everything the disjointness rule speaks of, found in a text by its form alone."""
    pairs = {f"{key} {value}" for key, value in re.findall(r"^(\w+) = (\w+)$", text, re.M)}
    strings = set(re.findall(r"(?:copy:|Copy this:) ((?:[a-z]{4} ?)+)(?=\n|<)", text))
    return pairs | strings | set(re.findall(r"\d+[+-]\d+", text))


def test_training_documents_hold_nothing_that_is_held_out():
    rng = random.Random(0)
    documents = [
        tasks.recall_document(rng, 383),
        *(draw(rng) for draw in (tasks.copy_document, tasks.arithmetic_document, tasks.chat_document)),
    ]
    for _ in range(300):
        documents += [tasks.recall_document(rng, rng.randint(9, 383)), tasks.copy_document(rng)]
        documents += [tasks.arithmetic_document(rng), tasks.chat_document(rng)]
    found = set().union(*(asked("".join(text for text, _ in pieces)) for pieces in documents))
    assert len(found) > 3000
    assert {tasks.split_of(question) for question in found} == {"train"}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_questions_are_held_out(task):
    for example in tasks.examples(task, "held_out", 50):
        if "recall" in task:  # the pair asked about; the others are distractors and may be of training
            key = example.prompt.splitlines()[-1].removesuffix(" =")
            found = {f"{key}{example.answer}"} & asked(example.prompt)
        elif "What is this?" in example.prompt:
            key = example.prompt.splitlines()[-1].split(" = ?")[0]
            found = {f"{key}{example.answer}"} & asked(example.prompt)
        else:
            found = asked(example.prompt)
        assert len(found) == 1, example
        assert {tasks.split_of(question) for question in found} == {"held_out"}


def test_held_out_files_are_not_trained_on():
    train, held_out = ({name for name, _ in tasks.text_files(split)} for split in ("train", "held_out"))
    assert train
    assert held_out
    assert not train & held_out


@pytest.mark.parametrize("distance", tasks.DISTANCES)
def test_recall_distances_are_exact_in_tokens(tokenizer, distance):
    for example in tasks.examples(f"recall, {distance} tokens", "held_out", 30):
        question = example.prompt.splitlines()[-1]
        line = question + example.answer + "\n"
        assert example.prompt.count(line) == example.prompt.count(question + " ") == 1
        before = len(tokenizer.encode(example.prompt[: example.prompt.index(line)] + question).ids)
        assert len(tokenizer.encode(example.prompt).ids) - before == distance
        assert len(tokenizer.encode(example.answer, add_special_tokens=False).ids) == 1


def test_sums_are_right():
    for task, sign in (("addition", 1), ("subtraction", -1)):
        for example in tasks.examples(task, "held_out", 100):
            a, b = map(int, re.findall(r"\d+", example.prompt))
            assert int(example.answer) == a + sign * b >= 0


def test_an_answer_must_be_whole():
    example = tasks.Example("1+1=", "2", "\n")
    assert example.is_right("2\n3+3=6")
    assert not example.is_right("21\n")
    assert not example.is_right("\n2")


@pytest.mark.parametrize(("distance", "pairs"), [(3, 8), (5, 1), (32, 0), (32, 41)])
def test_recall_that_cannot_be_written_is_refused(distance, pairs):
    with pytest.raises(ValueError, match="cannot be written"):
        tasks.recall(random.Random(0), "train", distance, pairs)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_chats_are_written_as_they_were_trained(model, tokenizer):
    for example in tasks.examples("chat", "held_out", 20):
        said = example.prompt.removeprefix(f"{tasks.USER} ").removesuffix(tasks.ASSISTANT)
        chat = [{"role": "user", "content": said}]
        assert model.tokenizer.encode_chat(chat) == tokenizer.encode(example.prompt).ids


def test_text_figure_reproduces(model, tokenizer):
    value, error, _ = readme_figures()[evaluation.TEXT]
    figure = evaluation.bits_per_byte(model, tokenizer, 32)
    assert abs(figure.value - value) < 4.4 * math.hypot(figure.error, error)  # a normal's once in 10^5
    assert figure.value < 2.0


def tail(count: int, n: int, rate: float) -> float:
    """The probability of a count at least as far out, on its own side."""
    p = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
    return min(sum(p[: count + 1]), sum(p[count:]))


@pytest.mark.parametrize("task", ["recall, 256 tokens", "copy, 16 letters", "addition", "chat"])
@pytest.mark.some_rows
def test_task_figures_reproduce(model, tokenizer, task):
    value, _, n = readme_figures()[task]
    rate = (value * n + 1) / (n + 2)  # Laplace's: n right of n is not a rate of 1
    figure = evaluation.accuracy(model, tokenizer, task, 32, seed=1)
    assert tail(round(figure.value * figure.samples), figure.samples, rate) > ONCE_IN


def test_readme_has_every_figure():
    assert list(readme_figures()) == [evaluation.TEXT, *tasks.TASKS]


def test_bits_per_byte_of_a_uniform_model_is_its_vocabularys(tokenizer, monkeypatch):
    class Uniform:
        def logits(self, ids: np.ndarray) -> np.ndarray:
            return np.full((*ids.shape, tokenizer.get_vocab_size()), 3.0, np.float32)

    text = "def naïve(日本):\n    return 'spam🙂' * 12\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tasks, "text_windows", lambda encode: [ids, ids])
    figure = evaluation.bits_per_byte(Uniform(), tokenizer, 5)
    expected = len(ids) * math.log2(tokenizer.get_vocab_size()) / len(text.encode())
    assert (figure.value, figure.error, figure.samples) == (pytest.approx(expected, rel=1e-12), pytest.approx(0.0), 2)


def test_a_table_holds_formats_against_the_first(tokenizer, monkeypatch, tmp_path):
    """Each window costs a tenth of a bit a byte more in the second format, so that the error of the difference is none."""
    sizes = [100, 250, 60]
    bits = {"dense": [150.0, 300.0, 99.0]}
    bits["int8"] = [b + n / 10 for b, n in zip(bits["dense"], sizes, strict=True)]
    monkeypatch.setattr(evaluation, "text_bits", lambda model, *rest: (bits[model.plan.weights], sizes))
    monkeypatch.setattr(
        evaluation, "accuracy", lambda model, tokenizer, task, n, seed: evaluation.Figure(len(task) / 20, 0, n)
    )
    options = ["--table", "--of", "dense", "--of", "int8", "--markdown", str(tmp_path / "table.md")]
    found = CliRunner().invoke(evaluation.main, [str(FOLDER), *options])
    assert found.exit_code == 0, found.output
    head, _, dense, int8 = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "table.md").read_text().splitlines()
    )
    assert head[:5] == ["weights", "bits", "MB", "bits per byte", "above the first"]
    assert dense[:5] == ["dense", "16.00", "2.10", f"{549 / 410:.4f}", ""]
    # a float32 scale for each of 1,280 rows of 196,608 weights
    assert int8[1:5] == [f"{8 + 32 * 1280 / 196608:.2f}", "1.33", f"{549 / 410 + 0.1:.4f}", "+0.1000 ± 0.0000"]
    named = [len(task) / 20 for task in tasks.TASKS if task.startswith("copy")]
    assert int8[head.index("copy")] == f"{sum(named) / len(named):.3f}"


def test_programs_of_a_row_go_before_the_next(tokenizer, monkeypatch):
    """Each holds maps of memory, of which a process may have some 65,000: the table did not end without."""
    program, held = jax.jit(lambda x: x + 1), []

    def text_bits(*given):
        held.append(program._cache_size())
        program(1.0)
        return [100.0, 200.0], [50, 60]

    monkeypatch.setattr(evaluation, "text_bits", text_bits)
    monkeypatch.setattr(evaluation, "accuracy", lambda *given: evaluation.Figure(0.0, 0, 1))
    assert len(list(evaluation.rows("demo", ["dense", "int8", "int4"], tokenizer, 2, 0, {}))) == 3
    assert held == [0, 0, 0]


def test_the_table_has_every_format():
    """And each choice that is no size, and what is rounded with text beside what is rounded to nearest."""
    plain = [text for text in evaluation.FORMATS if evaluation.BY not in text]
    assert {text.partition(":")[0] for text in plain} == set(technique.names(WEIGHTS))
    assert {"fp8:dtype=e5m2", "fp8:scale=tensor", "fp8:scale=block128", "nf4:double=false"} < set(plain)
    by_text = [text.split(evaluation.BY) for text in evaluation.FORMATS if evaluation.BY in text]
    assert {method for _, method in by_text} == set(evaluation.METHODS)
    assert {weights for weights, _ in by_text} <= set(plain)
    for text in evaluation.FORMATS:
        evaluation.check_format(text)


@pytest.mark.thorough
def test_a_row_of_codes_that_are_chosen_by_text(tokenizer, monkeypatch, tmp_path):
    """The table's own rows: fewer bits a byte are lost than by rounding to nearest."""
    monkeypatch.setattr(evaluation, "accuracy", lambda *given: evaluation.Figure(0.0, 0, 1))
    given = {"dtype": "float32", "form": "scan"}
    dense, near, chosen = evaluation.rows("demo", ["dense", "int2", "int2 by gptq"], tokenizer, 24, 0, given)
    assert (near.bits, near.nbytes) == (chosen.bits, chosen.nbytes)
    assert dense.text.value < chosen.text.value < near.text.value
    assert chosen.above.value + 3 * (chosen.above.error + near.above.error) < near.above.value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--of", "int8"), "--of and --markdown belong to --table"),
        (("--table", "--weights", "int8"), "say --of int8"),
        (("--table", "--of", "int9"), "There is no 'int9'"),
        (("--table", "--of", "int4 by luck"), "codes are chosen by gptq or awq"),
        (("--table", "--of", "nf4 by gptq"), "codes are chosen by text in int8, int4, int3, int2"),
    ],
)
def test_eval_refuses_what_makes_no_table(words, said):
    found = CliRunner().invoke(evaluation.main, [str(FOLDER), *words])
    assert found.exit_code == 2
    assert said in " ".join(found.output.replace("│", " ").split())


def test_eval_refuses_a_folder_of_another_model(tmp_path):
    found = CliRunner().invoke(evaluation.main, [str(tmp_path)])
    assert found.exit_code == 2
    assert "tokenizer" in found.output


# ---------------------------------------------------------------------------------------------------------------------
# Its training


def test_the_training_forward_is_the_engines(model, tokenizer):
    ids = tokenizer.encode("copy: abcd wxyz\npaste: abcd wxyz\n" * 8).ids  # longer than a block of queries
    assert len(ids) > training.QUERY_BLOCK
    with Reader.open(FOLDER) as reader:
        weights = {name: jnp.asarray(reader.read(name)).astype(jnp.float32) for name in reader.names}
    ours = np.asarray(training.forward(weights, jnp.asarray([ids]), training.SHAPE))
    theirs = np.asarray(model.logits([ids]))
    # float32 sums of up to 384 terms in another order, through 4 layers: each adds a few sqrt(384) roundings
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * 4 * math.sqrt(384) * 2.0**-24 * np.abs(theirs).max())


def test_first_heads_start_looking_one_and_two_back():
    shape = training.SHAPE
    key, queries = training.shifted_keys(shape)
    T, N, H = 40, shape.num_heads, shape.head_dim
    k = training.rope(jnp.broadcast_to(key[None, None, None], (1, T, 1, H)), shape.rope_theta)[0, :, 0]
    q = training.rope(jnp.broadcast_to(queries[None, None], (1, T, N, H)), shape.rope_theta)[0]
    scores = np.asarray(jnp.einsum("tnh,sh->nts", q, k))
    for head in range(N):
        best = np.tril(scores[head])[10:].argmax(axis=-1)
        assert (best == np.arange(10, T) - (1 + head % 2)).all()


def test_loss_is_taken_on_answers_alone(tokenizer):
    batches = object.__new__(training.Batches)  # without reading the whole standard library
    batches.tokenizer, batches.seed = tokenizer, 0
    batches.bos, batches.eos = training.special_ids(tokenizer)
    for seed in range(8):
        ids, weights = batches.task_row(random.Random(seed), 128)
        assert len(ids) == len(weights) + 1 == 129
        text = "".join(
            tokenizer.decode([i], skip_special_tokens=False) if w else "\0"
            for i, w in zip(ids[1:], weights, strict=True)
        )
        answers = [part for part in text.split("\0") if part][:-1]  # the row may cut the last one
        assert answers
        for answer in answers:
            assert re.fullmatch(r"( ?\d+| \w+| [a-z]{4}( [a-z]{4})*)(\n|<\|eos\|>)", answer), answer


def test_training_state_comes_back(tmp_path):
    state = ({"w": jnp.arange(6.0).reshape(2, 3)}, (jnp.int32(7),))
    training.save_state(tmp_path / "state.npz", state, 12, 3.5)
    read, step, seconds = training.load_state(tmp_path / "state.npz", jax.tree.map(jnp.zeros_like, state))
    assert (step, seconds) == (12, 3.5)
    jax.tree.map(np.testing.assert_array_equal, read, state)
    with pytest.raises(ValueError, match="another model"):
        training.load_state(tmp_path / "state.npz", ({"w": jnp.zeros((3, 2))}, (jnp.int32(0),)))
