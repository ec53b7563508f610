"""What the demo checkpoint is taught, and what it is judged by: four tasks with one right answer, and Python source.

A weight format or a cache policy is worth what it does to a model that can do something. So the demo model is trained
on tasks whose failure points at a cause. Recall (multi-query associative recall, Arora et al., arXiv:2312.04927)
fails when the cache loses or blurs an old token, and it is asked at exact distances, in tokens, between a value and its
answer. Copying fails when neighbouring tokens blur into each other. Arithmetic is held in the weights alone, and fails
when they are rounded too far. Bits per byte on Python source is the smooth measure beside the three.

Training and held-out examples are disjoint by construction: one rule, a checksum of what is asked (the pair, the
string, the sum, the file's name), says which split an example belongs to, and every generator draws until it has one
of the split it was asked for. The chat form of a task obeys the rule of the task it asks.

Everything is drawn from a seeded `random.Random`. The text is the running Python's own standard library, which is on
every machine that can run this file.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

BOS, EOS, USER, ASSISTANT = SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|> {{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|> {{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The tokenizer holds each as one token, keys at the start of a line and the others after a space, so that a distance in
# tokens can be arranged without asking it.
KEYS = _words(
    """apple bread chair dance eagle flame grape horse island jacket kettle ladder melon needle ocean paper queen river
    spoon tiger violin window yellow anchor basket candle dragon engine forest garden hammer jungle kitten lemon mirror
    planet rabbit silver tunnel wagon"""
)
VALUES = _words(
    """north south east west red green blue black white gold iron wood stone glass cloth silk wool sand salt milk rice
    corn bean plum pear fig rose lily oak pine moss fern wind rain snow hail storm cloud star moon"""
)
FILLER = _words(
    """the a is and of this object was set by call in that when no other value can be found name file line type list
    with for from not or as it are if an method function module class data string return"""
)

DISTANCES = (32, 64, 128, 256)
COPY_GROUPS = (2, 4, 8)
PAIRS = 8  # in a held-out recall prompt
CONTEXT = 384  # tokens the demo model is trained on

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIR, _ASK = 4, 2  # tokens in "apple = north\n", and in "apple ="
_SHORTEST_FILLER = 3  # tokens in "# the\n"


@dataclass(frozen=True)
class Example:
    """A prompt and what must follow it, up to `stop`."""

    prompt: str
    answer: str
    stop: str

    def is_right(self, text: str) -> bool:
        """Whether `text`, generated after the prompt, is the answer."""
        return text.split(self.stop)[0].strip() == self.answer.strip()


Piece = tuple[str, bool]  # text, and whether it is an answer (what the loss is taken on)


def split_of(asked: str) -> Split:
    """One in eight questions is held out."""
    return "held_out" if zlib.crc32(asked.encode()) % 8 == 0 else "train"


def _pair(rng: random.Random, split: Split, keys: Sequence[str] = KEYS) -> tuple[str, str]:
    while split_of(" ".join(pair := (rng.choice(keys), rng.choice(VALUES)))) != split:
        pass
    return pair


def _string(rng: random.Random, split: Split, groups: int) -> str:
    def draw() -> str:
        return " ".join("".join(rng.choice(_LETTERS) for _ in range(4)) for _ in range(groups))

    while split_of(string := draw()) != split:
        pass
    return string


def _sum(rng: random.Random, split: Split, sign: str) -> tuple[str, str]:
    """("47+38", "85") or ("85-38", "47"); a difference is never negative."""

    def draw() -> tuple[int, int]:
        a, b = rng.randrange(100), rng.randrange(100)
        return (a, b) if sign == "+" else (max(a, b), min(a, b))

    while split_of(asked := sign.join(map(str, numbers := draw()))) != split:
        pass
    return asked, str(sum(numbers) if sign == "+" else numbers[0] - numbers[1])


def _assignments(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in pairs)


def _filler(rng: random.Random, tokens: int) -> str:
    """Comment lines of exactly `tokens` tokens: "# the file is open" and such, and some of the values' words."""
    words = (*FILLER, *VALUES)
    lines = ""
    while tokens:
        line = tokens if tokens <= 12 else rng.randint(_SHORTEST_FILLER, min(12, tokens - _SHORTEST_FILLER))
        lines += "#" + "".join(f" {rng.choice(words)}" for _ in range(line - 2)) + "\n"
        tokens -= line
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Held-out examples: one question each


def recall(rng: random.Random, split: Split, distance: int, pairs: int = PAIRS) -> Example:
    """`pairs` assignments, filler, and the question; from the asked value to its answer there are `distance` tokens.

    The distance counts positions: the value stands at p, and the token at p + distance - 1 predicts the answer.
    """
    least = 1 + _ASK + 1  # the line's end, the question, the answer itself
    if distance < least or not 1 <= pairs <= len(KEYS):
        raise ValueError(
            f"recall over {distance} tokens with {pairs} pairs cannot be written: the distance is at least {least}, "
            f"and there are 1 to {len(KEYS)} pairs."
        )
    key, value = _pair(rng, split)
    others = [_pair(rng, "train", (other,)) for other in rng.sample([k for k in KEYS if k != key], pairs - 1)]
    left = distance - least
    fits = [n for n in range(pairs) if (rest := left - n * _PAIR) == 0 or rest >= _SHORTEST_FILLER]
    if not fits:
        raise ValueError(
            f"recall over {distance} tokens cannot be written: {left} tokens of filler make no line; "
            f"take {least}, or {least + _SHORTEST_FILLER} and more."
        )
    after = rng.choice(fits)
    kept = [*others[after:], (key, value), *others[:after]]
    prompt = _assignments(kept) + _filler(rng, left - after * _PAIR) + f"{key} ="
    return Example(prompt, f" {value}", "\n")


def copy(rng: random.Random, split: Split, groups: int) -> Example:
    """`groups` groups of four random letters, to be written again."""
    string = _string(rng, split, groups)
    return Example(f"copy: {string}\npaste:", f" {string}", "\n")


def addition(rng: random.Random, split: Split) -> Example:
    """The sum of two numbers below 100."""
    asked, answer = _sum(rng, split, "+")
    return Example(f"{asked}=", answer, "\n")


def subtraction(rng: random.Random, split: Split) -> Example:
    """The difference of two numbers below 100, never negative."""
    asked, answer = _sum(rng, split, "-")
    return Example(f"{asked}=", answer, "\n")


def chat_turn(rng: random.Random, split: Split) -> tuple[str, str]:
    """(what the user says, what the assistant answers): a sum, a string to copy, or a value to recall."""
    kind = rng.randrange(3)
    if kind == 0:
        asked, answer = _sum(rng, split, rng.choice("+-"))
        return f"What is {asked}?", answer
    if kind == 1:
        string = _string(rng, split, rng.randint(1, 6))
        return f"Copy this: {string}", string
    key, value = _pair(rng, split)
    others = rng.sample([k for k in KEYS if k != key], rng.randint(1, PAIRS - 1))
    pairs = [(key, value), *(_pair(rng, "train", (other,)) for other in others)]
    rng.shuffle(pairs)
    return f"Remember:\n{_assignments(pairs)}What is this?\n{key} = ?", value


def chat(rng: random.Random, split: Split) -> Example:
    """One turn of the chat, as the checkpoint's template writes it."""
    asked, answer = chat_turn(rng, split)
    return Example(f"{USER} {asked}{ASSISTANT}", f" {answer}", EOS)


TASKS: dict[str, Callable[[random.Random, Split], Example]] = {
    **{f"recall, {d} tokens": lambda rng, split, d=d: recall(rng, split, d) for d in DISTANCES},
    **{f"copy, {4 * n} letters": lambda rng, split, n=n: copy(rng, split, n) for n in COPY_GROUPS},
    "addition": addition,
    "subtraction": subtraction,
    "chat": chat,
}


def examples(task: str, split: Split, count: int, seed: int = 0) -> list[Example]:
    """`count` examples of one of TASKS; the same ones for the same arguments."""
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; there are {', '.join(map(repr, TASKS))}.")
    rng = random.Random(f"{task} {split} {seed}")
    return [TASKS[task](rng, split) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Training documents: as many questions as fit, so that most of a document's length teaches


def recall_document(rng: random.Random, budget: int) -> list[Piece]:
    """Assignments, filler, and questions about most of them in random order, in at most `budget` tokens."""
    count = rng.randint(1, max(1, min(24, (budget - 1) // (2 * _PAIR))))
    pairs = [_pair(rng, "train", (key,)) for key in rng.sample(KEYS, count)]
    filler = int((budget - 1 - 2 * _PAIR * count) * rng.random())
    pieces = [(_assignments(pairs), False)]
    if filler >= _SHORTEST_FILLER:
        pieces.append((_filler(rng, filler), False))
    for key, value in rng.sample(pairs, count):
        pieces += [(f"{key} =", False), (f" {value}\n", True)]
    return pieces


def copy_document(rng: random.Random) -> list[Piece]:
    """One to four strings, each copied."""
    pieces: list[Piece] = []
    for _ in range(rng.randint(1, 4)):
        example = copy(rng, "train", rng.randint(1, 10))
        pieces += [(example.prompt, False), (f"{example.answer}\n", True)]
    return pieces


def arithmetic_document(rng: random.Random) -> list[Piece]:
    """A few sums and differences, a line each."""
    pieces: list[Piece] = []
    for _ in range(rng.randint(1, 8)):
        example = rng.choice((addition, subtraction))(rng, "train")
        pieces += [(example.prompt, False), (f"{example.answer}\n", True)]
    return pieces


def chat_document(rng: random.Random) -> list[Piece]:
    """A conversation of one to three turns."""
    pieces: list[Piece] = []
    for _ in range(rng.randint(1, 3)):
        asked, answer = chat_turn(rng, "train")
        pieces += [(f"{USER} {asked}{ASSISTANT}", False), (f" {answer}{EOS}", True)]
    return pieces


# ---------------------------------------------------------------------------------------------------------------------
# Text

_SKIPPED_FOLDERS = frozenset(
    _words("test tests idle_test site-packages dist-packages encodings pydoc_data lib2to3 ensurepip __pycache__")
)
_TABLES = frozenset(("entities.py", "stringprep.py"))


def text_files(split: Split) -> list[tuple[str, str]]:
    """(path within the standard library, source) of this Python, sorted by path; one file in sixteen is held out.

    Tests, tables and what differs from machine to machine are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        skipped = any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts[:-1])
        if skipped or path.name in _TABLES or path.name.startswith("_sysconfigdata"):
            continue
        name = relative.as_posix()
        if (zlib.crc32(name.encode()) % 16 == 0) != (split == "held_out"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            files.append((name, text))
    return files


def text_windows(
    encode: Callable[[str], Sequence[int]], split: Split = "held_out", length: int = CONTEXT
) -> list[list[int]]:
    """The split's text in windows of `length` - 1 tokens (one is left for the beginning token).

    A rest at the end of a file is dropped. encode: text to ids, without special tokens.
    """
    windows: list[list[int]] = []
    for _, text in text_files(split):
        ids = list(encode(text))
        windows += [ids[i : i + length - 1] for i in range(0, len(ids) - length + 2, length - 1)]
    return windows
