"""Rows of text as packed batches of tokens: read, masked, packed, shuffled, resumed.

**Rows.** A jsonl file has one object a line: {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}
(with "tools", if the template takes them); other entries are not looked at. A file of another name is plain text, one
document. Each row becomes a document: its tokens, and for each token whether it is to be learned (all of a text with its
end-of-text; of a completion and its end-of-text, not of the prompt; of what the assistant says, and nothing else).

**What the assistant says** is found in the template's own rendering, never guessed from its words. A template with
{% generation %} marks says it itself: it is rendered a second time with a noncharacter of Unicode printed at each mark, and
must be the same text without them. For any other, the conversation is rendered up to each assistant message (with the
generation prompt: what the model is given) and to its end (what it must have made of it); both must be the beginning of the
whole, token by token. A template that renders an earlier turn differently once another follows has no such beginning, and
the row is refused.

**Packing** (Krell et al., arXiv:2107.02027: best fit, longest first). A document of n tokens is n - 1 pairs of a token and
the next one; the pairs, not the tokens, are packed, so that no place is spent on a token without a target, and each learned
token is a target exactly once an epoch. Documents keep apart by segment ids, and positions begin anew in each. One longer
than a row is cut into pieces, each of its own segment: what follows a cut does not see what stood before it, and a piece
in which nothing is learned is left out. Documents are packed once, in an order drawn from the seed, so that all epochs have
as many rows; the trade-off is that documents which share a row share it in every epoch (they do not see each other).

**Order.** An epoch's permutation of the rows is argsort of Philox's raw numbers (Salmon et al., SC 2011) with key (seed,
epoch): nothing but (seed, epoch, index) is needed to go on, and numpy promises that the raw stream of a bit generator stays
what it is. The rows of all epochs form one sequence, of which batches are cut: shapes are constant and no row is dropped.

B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import hashlib
import itertools
import json
import logging
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np

from checkpoints.errors import listing
from checkpoints.output import output_folder
from jaxengine.text import Tokenizer

log = logging.getLogger("jaxengine")

JSONL = (".jsonl", ".ndjson", ".json")
NOT_TEXT = (
    ".parquet",
    ".arrow",
    ".feather",
    ".csv",
    ".tsv",
    ".gz",
    ".zst",
    ".xz",
    ".bz2",
    ".zip",
    ".npy",
    ".npz",
    ".pdf",
)
LAYOUT = 1  # of the cache; another number makes older caches void
WINDOW = 4096  # pieces that are packed together
SHOWN = 20  # bad rows after which reading ends
TOKENS, LEARNED, STARTS, ABOUT = "tokens.i32", "learned.u8", "starts.i64", "about.json"

# What other tools call the same things.
OTHERS = {
    "conversations": 'rename it to "messages", with "role" and "content" for "from" and "value"',
    "instruction": 'give "prompt" and "completion" (the instruction with its input, and the output)',
    "question": 'give "prompt" and "completion"',
    "content": 'rename it to "text"',
    "chosen": 'preference pairs are not read; give "prompt" and "completion"',
}

Progress = Callable[[int, int], None]
Document = tuple[array, bytearray]  # ids, 4 bytes each; 1 where learned

# A text longer than a window is encoded window by window, see Rows._encode_long.
ENCODED = 2**18  # characters of a window
OVERLAP = 2**12  # of two windows
AGREED = 32  # tokens that both must have there


class DataError(ValueError):
    """Data that cannot be trained on: the message names file, line, rule and way out."""


# ---------------------------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------------------------


@final
class Rows:
    """Rows as documents: (ids, learned), an array("i") and a bytearray of one length.

    End-of-text is the tokenizer's eos_token, else the first eos_token_id of the model's configs; where neither is, texts and
    completions have no end that could be learned. A conversation ends as its template ends it.

    chat_template: the name or the text of a template in place of the folder's own; vocab_size: the rows of the model's
    embedding, where it may have fewer than the tokenizer has ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, chat_template: str | None = None, vocab_size: int | None = None
    ) -> None:
        self.tokenizer, self.chat_template, self.vocab_size = tokenizer, chat_template, vocab_size
        named = tokenizer.special_tokens.get("eos_token")
        found = None if named is None else tokenizer.token_to_id(named)
        self.end: int | None = next(iter(tokenizer.eos_ids), None) if found is None else found
        # what the tokenizer itself puts around a text
        letter = next((c for c in "a0A. " if tokenizer.encode(c, add_special_tokens=False)), "a")
        plain, whole = tokenizer.encode(letter, add_special_tokens=False), tokenizer.encode(letter)
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        self.before, self.after = whole[:at], whole[at + len(plain) :]

    def document(self, row: Any) -> Document:
        """One row of any kind. Raises DataError, which says why but not where."""
        if not isinstance(row, Mapping):
            raise DataError(f'the row is a JSON {_json_type(row)}; it must be an object, such as {{"text": "..."}}')
        kinds = [k for k in (("messages",), ("prompt", "completion"), ("text",)) if all(n in row for n in k)]
        if len(kinds) > 1:
            raise DataError(f"the row has both {_quoted(kinds[0])} and {_quoted(kinds[1])}; leave one of them out")
        if not kinds:
            raise DataError(_no_kind(row))
        for key in kinds[0]:
            want = (list,) if key == "messages" else (str,)
            if not isinstance(row[key], want):
                hint = '; a conversation goes into "messages"' if isinstance(row[key], list) else ""
                raise DataError(f'"{key}" is a JSON {_json_type(row[key])}; it must be a {_json_type(want[0]())}{hint}')
        match kinds[0]:
            case ("text",):
                made = self.text(row["text"])
            case ("messages",):
                made = self.chat(row["messages"], row.get("tools"))
            case _:
                made = self.completion(row["prompt"], row["completion"])
        return self._checked(*made)

    def _checked(self, ids: array, learned: bytearray) -> Document:
        if self.vocab_size is not None and (largest := max(ids)) >= self.vocab_size:
            raise DataError(
                f"it has the token id {largest} ({self.tokenizer.id_to_token(largest)!r}), and the model's embedding has"
                f" {self.vocab_size} rows; take the tokenizer of the same folder"
            )
        learned[0] = 0  # nothing stands before it
        if not any(learned):
            raise DataError(
                "nothing in it would be learned: no token that follows another is of a completion, of an assistant's"
                " message or of a text"
            )
        return ids, learned

    def text(self, text: str) -> Document:
        """All is learned, and that it ends."""
        if not text.strip():
            raise DataError('"text" is empty')
        ids = self._ended(array("i", self.before) + self._encode(text))
        return ids, bytearray(b"\1" * len(ids))

    def completion(self, prompt: str, completion: str) -> Document:
        """The completion and its end are learned. The prompt has the tokens it has when it stands alone."""
        if not completion:
            raise DataError('"completion" is empty')
        given = array("i", self.before) + self._encode(prompt)
        whole = array("i", self.before) + self._encode(prompt + completion)
        if whole[: len(given)] != given:
            # The two were merged across the border, as the model, given the prompt alone, could never have done.
            apart = given + self._encode(completion)
            decode = self.tokenizer.decode
            if decode(apart, skip_special_tokens=False) != decode(whole, skip_special_tokens=False):
                raise DataError(
                    f"the prompt's end {prompt[-12:]!r} and the completion's beginning {completion[:12]!r} share a token;"
                    " move the space between them to the beginning of the completion"
                )
            whole = apart
        ids = self._ended(whole)
        return ids, bytearray(len(given)) + b"\1" * (len(ids) - len(given))

    def _encode(self, text: str) -> array:
        try:
            if len(text) <= ENCODED + OVERLAP or (found := self._encode_long(text)) is None:
                found = array("i", self.tokenizer.encode(text, add_special_tokens=False))
        except (TypeError, ValueError) as error:  # half of a surrogate pair, which JSON can spell
            raise DataError(f"it is not Unicode text: {error}") from None
        return found

    def _encode_long(self, text: str) -> array | None:
        """The same ids from windows that overlap: the library takes some 200 bytes a token while it encodes.

        Two windows are joined where both have the same AGREED tokens at the same characters, away from the ends of both;
        None where there is no such place (a long run of one letter, cut at another beat).
        """
        found, held = array("i"), list[tuple[int, int, int]]()  # (id, first character, end) not yet given out
        for start in range(0, len(text), ENCODED):
            encoding = self.tokenizer.backend.encode(text[start : start + ENCODED + OVERLAP], add_special_tokens=False)
            tokens = [(x, a + start, b + start) for x, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)]
            if start:
                at = {token: i for i, token in enumerate(tokens[: OVERLAP * 4]) if i >= AGREED}
                ahead = ((j, held[j : j + AGREED], at.get(token)) for j, token in enumerate(held))
                joint = next(
                    ((j, i) for j, own, i in ahead if i and len(own) == AGREED and own == tokens[i : i + AGREED]), None
                )
                if joint is None:
                    return None
                found.extend(token[0] for token in held[: joint[0]])
                tokens = tokens[joint[1] :]
            if start + ENCODED + OVERLAP >= len(text):
                found.extend(token[0] for token in tokens)
                break
            first = next((i for i, token in enumerate(tokens) if token[1] >= start + ENCODED), len(tokens))
            found.extend(token[0] for token in tokens[:first])
            held = tokens[first:]
        return found

    def _ended(self, ids: array) -> array:
        """With what the tokenizer puts after a text, and end-of-text, if there is one and it is not there yet."""
        ids = ids + array("i", self.after)
        if self.end is not None and (not ids or ids[-1] != self.end):
            ids.append(self.end)
        return ids

    def chat(self, messages: list[Any], tools: Any = None) -> Document:
        """What the assistant says is learned, with what the template makes it say to end its turn."""
        spoken = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "assistant"]
        text = self._render(messages, tools)
        if not spoken:
            raise DataError('none of the "messages" has the role "assistant", so there is nothing to learn')
        template = self._template(with_tools=tools is not None)
        if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
            return self._by_marks(template, text, messages, tools)
        return self._by_prefixes(text, spoken, messages, tools)

    def _render(self, messages: Any, tools: Any, template: str | None = None, *, prompt: bool = False) -> str:
        try:
            return self.tokenizer.render_chat(
                messages, tools=tools, chat_template=template or self.chat_template, add_generation_prompt=prompt
            )
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from None

    def _template(self, *, with_tools: bool) -> str:
        """The template's text, chosen as render_chat does."""
        templates, wanted = self.tokenizer.chat_templates, self.chat_template
        if wanted is None:
            wanted = "tool_use" if with_tools and "tool_use" in templates else "default"
        return templates.get(wanted, wanted)

    def _by_marks(self, template: str, text: str, messages: Any, tools: Any) -> Document:
        start, end = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
        if start in text or end in text:
            raise DataError("it has U+FDD0 or U+FDD1, which Unicode keeps from being characters; take them out")

        def marked(tag: re.Match[str]) -> str:
            left, closing, right = tag.groups()
            # `print` is a statement, as the mark is: space around it is kept or cut in the same way
            if closing:
                return f"{{%{left} print '{end}' %}}{{% endgeneration {right}%}}"
            return f"{{%{left} generation %}}{{% print '{start}' {right}%}}"

        tags = r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}"
        rendered = self._render(messages, tools, re.sub(tags, marked, template))
        pieces = re.split(f"([{start}{end}])", rendered)
        if "".join(pieces[::2]) != text or pieces[1::2] != [start, end] * (len(pieces) // 4):
            raise DataError("the chat template's {% generation %} marks are not in pairs around what it prints")
        spans, at = [], 0
        for piece, mark in itertools.zip_longest(pieces[::2], pieces[1::2]):
            spans += [(at, at + len(piece))] if mark == end and piece else []
            at += len(piece)
        ids, offsets = self._offsets(text)
        return ids, bytearray(any(first < end and last > start for start, end in spans) for first, last in offsets)

    def _offsets(self, text: str) -> tuple[array, list[tuple[int, int]]]:
        """(ids, each one's characters). The library may leave spaces out of a token's; they are its own again here."""
        try:
            encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise DataError(f"it is not Unicode text: {error}") from None
        offsets, last = [], 0
        for first, end in encoding.offsets:
            offsets.append((min(last, first), end))
            last = end
        return array("i", encoding.ids), offsets

    def _by_prefixes(self, text: str, spoken: Sequence[int], messages: Any, tools: Any) -> Document:
        ids = self._encode(text)
        learned = bytearray(len(ids))
        for i in spoken:
            if i == 0:
                raise DataError(
                    "the first message is the assistant's, and no prompt stands before it to tell where it begins: put a"
                    " user's message first, or give a chat template with {% generation %} marks"
                )
            given = self._encode(self._render(messages[:i], tools, prompt=True))
            made = self._encode(self._render(messages[: i + 1], tools))
            for what, part in (("up to", given), ("to the end of", made)):
                if ids[: len(part)] != part:
                    j = next((j for j, (x, y) in enumerate(zip(ids, part, strict=False)) if x != y), len(ids))
                    decode = self.tokenizer.decode
                    raise DataError(
                        f"the chat template renders messages[0] {what} messages[{i}] in another way when more follow (token"
                        f" {j}: {decode(part[j : j + 8], skip_special_tokens=False)!r} against"
                        f" {decode(ids[j : j + 8], skip_special_tokens=False)!r}), so what the assistant said cannot be"
                        " told from the rest: give a chat template with {% generation %} marks, or rows that end with"
                        " their first assistant message"
                    )
            learned[len(given) : len(made)] = b"\1" * (len(made) - len(given))
        return ids, learned


def _quoted(keys: Sequence[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _no_kind(row: Mapping[str, Any]) -> str:
    known = ("text", "prompt", "completion", "messages")
    if half := [key for key in ("prompt", "completion") if key in row]:
        other = "completion" if half == ["prompt"] else "prompt"
        near = difflib.get_close_matches(other, [key for key in row if key not in known], n=1)
        return f'the row has "{half[0]}" and no "{other}"' + (f" (did you mean {near[0]!r}?)" if near else "")
    said = f"the row has {', '.join(map(repr, row)) or 'no entry'}; it must have " + (
        '"text", "prompt" and "completion", or "messages"'
    )
    for key in row:
        if key in OTHERS:
            return f"{said}. For {key!r}: {OTHERS[key]}"
        if near := difflib.get_close_matches(key, known, n=1):
            return f"{said}. Is {key!r} meant to be {near[0]!r}?"
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents one after the other: tokens int32 [N], learned uint8 [N] (1: to be learned; 0 at each beginning), and
    starts int64 [D + 1], where each begins. The arrays may be memory maps."""

    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, weights float32) of document i."""
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.tokens[part], self.learned[part].astype(np.float32)

    @property
    def num_learned(self) -> int:
        """Tokens that are learned in an epoch."""
        return int(sum(int(piece.sum(dtype=np.int64)) for piece in _chunks(self.learned)))

    @classmethod
    def of(cls, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Self:
        """From (ids, learned) pairs."""
        lengths = [len(ids) for ids, _ in documents]
        tokens = np.fromiter(itertools.chain.from_iterable(ids for ids, _ in documents), np.int32, sum(lengths))
        learned = np.fromiter(itertools.chain.from_iterable(m for _, m in documents), np.uint8, sum(lengths))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        learned[starts[:-1][np.diff(starts) > 0]] = 0
        return cls(tokens, learned, starts)

    def split(self, fraction: float) -> tuple[Documents, Documents]:
        """(the first, the last `fraction` of the documents), at least one of each; of a single one, of its tokens."""
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction is {fraction}; it lies between 0 and 1, such as 0.05")
        if len(self) == 1:
            at = len(self.tokens) - max(2, round(fraction * len(self.tokens)))
            if at < 2:
                raise DataError(f"a document of {len(self.tokens)} tokens cannot be split; give a held-out file")
            return self._part(0, at, np.array([0, at])), self._part(
                at, len(self.tokens), np.array([at, len(self.tokens)])
            )
        first = len(self) - min(len(self) - 1, max(1, round(fraction * len(self))))
        at = int(self.starts[first])
        return self._part(0, at, self.starts[: first + 1]), self._part(at, len(self.tokens), self.starts[first:])

    def _part(self, start: int, end: int, starts: np.ndarray) -> Documents:
        learned = self.learned[start:end]
        if end > start and learned[0]:  # a cut within a document: its first token has nothing before it any more
            learned = learned.copy()
            learned[0] = 0
        return Documents(self.tokens[start:end], learned, (starts - start).astype(np.int64))

    def digest(self) -> str:
        """Sixteen hex digits that other documents would not have."""
        made = hashlib.sha256()
        for whole in (self.starts, self.tokens, self.learned):
            for piece in _chunks(whole):
                made.update(np.ascontiguousarray(piece).data)
        return made.hexdigest()[:16]


def _chunks(whole: np.ndarray, size: int = 2**22) -> Iterator[np.ndarray]:
    return (whole[i : i + size] for i in range(0, len(whole), size))


def read(
    paths: Sequence[str | Path] | str | Path,
    rows: Rows,
    *,
    skip_bad: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Documents:
    """The documents of these files, in order.

    skip_bad: leave rows out that cannot be read, and say how many in the log; else they are an error that names file and
    line. cache: a folder in which the tokens are kept, as memory-mapped files, for the next time the same files are read
    with the same tokenizer; without it they are in memory, 5 bytes each. progress(done, total) in bytes, now and then.

    Raises DataError for files and rows that cannot be read.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    _check_files(files)
    if cache is None:
        tokens, learned, starts = array("i"), array("B"), array("q", [0])

        def keep(ids: array, mask: bytearray) -> None:
            tokens.extend(ids)
            learned.extend(mask)
            starts.append(len(tokens))

        _read_into(keep, files, rows, skip_bad=skip_bad, progress=progress)
        return Documents(
            np.frombuffer(tokens, np.int32), np.frombuffer(learned, np.uint8), np.frombuffer(starts, np.int64)
        )
    folder = Path(cache) / _key(files, rows, skip_bad=skip_bad)
    if not (folder / ABOUT).is_file():
        with output_folder(folder) as work:
            said = _read_into_files(work, files, rows, skip_bad=skip_bad, progress=progress)
            (work / ABOUT).write_text(json.dumps({"files": [str(f) for f in files], **said}, indent=2) + "\n")
    starts = np.memmap(folder / STARTS, np.int64, "r")
    return Documents(np.memmap(folder / TOKENS, np.int32, "r"), np.memmap(folder / LEARNED, np.uint8, "r"), starts)


def _read_into_files(
    work: Path, files: list[Path], rows: Rows, *, skip_bad: bool, progress: Progress | None
) -> dict[str, int]:
    end = 0
    with (
        (work / TOKENS).open("wb") as tokens,
        (work / LEARNED).open("wb") as learned,
        (work / STARTS).open("wb") as starts,
    ):
        starts.write(np.int64(0).tobytes())

        def keep(ids: array, mask: bytearray) -> None:
            nonlocal end
            end += len(ids)
            tokens.write(ids.tobytes())
            learned.write(mask)
            starts.write(np.int64(end).tobytes())

        documents = _read_into(keep, files, rows, skip_bad=skip_bad, progress=progress)
    return {"documents": documents, "tokens": end}


def _read_into(
    keep: Callable[[array, bytearray], None], files: list[Path], rows: Rows, *, skip_bad: bool, progress: Progress | None
) -> int:  # fmt: skip
    """Hand every document to `keep`; how many there were. All bad rows up to SHOWN are in one error."""
    total, before, kept, count = sum(file.stat().st_size for file in files), 0, 0, 0
    bad: list[str] = []
    for file in files:
        for line, done, content in _contents(file):
            try:
                keep(*rows.document(_parsed(content, line)))
                kept += 1
            except DataError as error:
                count += 1
                if len(bad) < SHOWN:
                    bad.append(f"{file}:{line}: {error}" if line else f"{file}: {error}")
                if count == SHOWN and not skip_bad:
                    raise DataError(f"{_many(count)} and reading ended there:{listing(bad, SHOWN)}") from None
            if progress is not None and (line % 256 == 0):
                progress(before + done, total)
        before += file.stat().st_size
        if progress is not None:
            progress(before, total)
    if bad and not skip_bad:
        raise DataError(f"{_many(count)}; skip_bad leaves them out:{listing(bad, SHOWN)}")
    if not kept:
        raise DataError(f"there is no row in {', '.join(map(str, files))}{listing(bad, 5)}")
    if bad:
        log.warning("%s left out of %d:%s", _many(count), kept + count, listing(bad, 5))
    return kept


def _many(count: int) -> str:
    return f"{count} rows cannot be trained on" if count > 1 else "one row cannot be trained on"


def _check_files(files: list[Path]) -> None:
    if not files:
        raise DataError("no file is given; give at least one .jsonl or text file")
    for file in files:
        if file.is_dir():
            inside = sorted(f.name for f in file.iterdir() if f.suffix in (*JSONL, ".txt"))
            raise DataError(f"{file} is a folder; give its files, such as {', '.join(inside[:3]) or 'a .jsonl file'}")
        if not file.is_file():
            beside = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
            near = difflib.get_close_matches(file.name, beside, n=1)
            raise DataError(f"there is no file {file}" + (f"; beside it is {near[0]}" if near else ""))
        if file.suffix.lower() in NOT_TEXT:
            raise DataError(f"{file} is not read; write its rows as jsonl (an object a line) or as plain text")
        if not file.stat().st_size:
            raise DataError(f"{file} is empty")


def _contents(file: Path) -> Iterator[tuple[int, int, str | DataError]]:
    """(line from 1 on, bytes up to its end, its text or what is wrong with it); line 0 is a whole text file."""
    if file.suffix.lower() not in JSONL:
        raw = file.read_bytes()
        if b"\0" in raw:
            raise DataError(f"{file} has a zero byte and is no text; give jsonl or UTF-8 text")
        yield 0, len(raw), _decoded(raw)
        return
    done = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            done += len(raw)
            if raw.strip():
                yield number, done, _decoded(raw)


def _decoded(raw: bytes) -> str | DataError:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return DataError(f"it is not UTF-8 ({error.reason} at byte {error.start}); convert it, for example with iconv")


def _parsed(content: str | DataError, line: int) -> Any:
    if isinstance(content, DataError):
        raise content
    if not line:
        return {"text": content}
    try:
        return json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        said = "one list over several lines; " if content.lstrip().startswith("[") else ""
        raise DataError(f"it is not JSON ({error}); {said}write one object on each line") from None
    except ValueError:  # JSON it is, and Python reads no whole number that is so long
        most = sys.get_int_max_str_digits()
        raise DataError(
            f"a whole number in it has more than {most} digits: leave it out, or write it as text"
        ) from None


def _key(files: list[Path], rows: Rows, *, skip_bad: bool) -> str:
    """Another one for other files, another tokenizer, or other rules."""
    tokenizer = rows.tokenizer
    made = hashlib.sha256()
    settings = (
        LAYOUT, skip_bad, rows.chat_template, rows.vocab_size, rows.end, tokenizer.special_tokens, tokenizer.chat_templates,
    )  # fmt: skip
    made.update(json.dumps([*map(_plain, settings)], sort_keys=True).encode())
    made.update(tokenizer.backend.to_str().encode())
    for file in files:
        made.update(f"\0{file.suffix.lower()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while piece := content.read(2**22):
                made.update(piece)
    return made.hexdigest()[:32]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `context` tokens. Piece p is the pairs that begin at tokens[first[p]], length[p] of them; row r has the
    pieces row_starts[r] to row_starts[r + 1]."""

    documents: Documents
    context: int
    first: np.ndarray
    length: np.ndarray
    row_starts: np.ndarray
    num_cut: int
    num_dropped: int

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def density(self) -> float:
        """The part of the places that hold tokens."""
        return float(self.length.sum(dtype=np.int64) / (len(self) * self.context))

    def digest(self) -> str:
        """Sixteen hex digits that other documents, or these packed otherwise, would not have."""
        made = hashlib.sha256(self.documents.digest().encode())
        for whole in (self.first, self.row_starts):
            made.update(np.ascontiguousarray(whole).data)
        return made.hexdigest()[:16]

    def fill(self, row: int, out: Mapping[str, np.ndarray]) -> None:
        """Write row `row` into arrays [T] that are blank (see `blank`)."""
        of, at = self.documents, 0
        for segment, p in enumerate(range(self.row_starts[row], self.row_starts[row + 1]), 1):
            start, n = int(self.first[p]), int(self.length[p])
            here = slice(at, at + n)
            out["tokens"][here] = of.tokens[start : start + n]
            out["targets"][here] = of.tokens[start + 1 : start + n + 1]
            out["weights"][here] = of.learned[start + 1 : start + n + 1]
            out["positions"][here] = np.arange(n)
            out["segments"][here] = segment
            at += n


def blank(rows: int, context: int) -> dict[str, np.ndarray]:
    """A batch of padding: tokens, targets, segments 0, weights 0, positions -1; each [B, T]."""
    batch = {name: np.zeros((rows, context), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["positions"] -= 1
    return {**batch, "weights": np.zeros((rows, context), np.float32)}


def pack(documents: Documents, context: int, *, seed: int = 0, window: int = WINDOW) -> Packed:
    """Pack into rows of `context` tokens. window: pieces packed together; more fill rows better, and take longer."""
    if context < 1:
        raise DataError(f"the context is {context}; it is at least 1 token, such as 1024")
    if window < 1:
        raise DataError(f"the packing window is {window}; it is at least 1 piece, such as {WINDOW}")
    _check_seed(seed)
    pairs = np.maximum(np.diff(documents.starts) - 1, 0)
    pieces = -(-pairs // context)
    owner = np.repeat(np.arange(len(documents)), pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = documents.starts[owner] + nth * context
    length = np.minimum(pairs[owner] - nth * context, context)
    if len(first):
        # targets of a piece are the tokens first + 1 to first + length; up to the next piece comes at most a document's
        # first token besides, which is never learned
        useful = np.maximum.reduceat(documents.learned, first + 1) > 0
    else:
        useful = np.zeros(0, bool)
    if not useful.any():
        raise DataError("no document has a token that is learned; there is nothing to train on")
    num_cut, num_dropped = int((pieces > 1).sum()), int((~useful).sum())
    if num_cut:
        log.info(
            "%d of %d documents are longer than the context of %d tokens and are cut; what follows a cut does not see what"
            " stood before it%s", num_cut, len(documents), context,
            f"; {num_dropped} pieces in which nothing is learned are left out" if num_dropped else "",
        )  # fmt: skip
    first, length = first[useful], length[useful]
    order = permutation(len(first), seed, PACKING)
    first, length = first[order], length[order]
    rows = [row for at in range(0, len(first), window) for row in _best_fit(length[at : at + window], at, context)]
    placed = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(first))
    row_starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Packed(documents, context, first[placed], length[placed].astype(np.int32), row_starts, num_cut, num_dropped)


def _best_fit(length: np.ndarray, offset: int, context: int) -> list[list[int]]:
    """Rows of piece numbers (`offset` added): each piece, longest first, goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for piece in np.argsort(-length, kind="stable").tolist():
        n = int(length[piece])
        at = bisect.bisect_left(room, (n, 0))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = context, len(rows)
            rows.append([])
        rows[row].append(offset + piece)
        if free > n:
            bisect.insort(room, (free - n, row))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

PACKING = 2**63  # in the place of an epoch: the order in which documents are packed


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 to n - 1 in an order that (seed, epoch) alone decides, the same on every machine and in every numpy."""
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(raw, kind="stable")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise DataError(f"the seed is {seed}; it is a whole number from 0 to 2^63 - 1")


@final
class Batches:
    """Batches for ever, or for some epochs: dicts of tokens, targets, weights, positions, segments, each [B, T].

        batches = Batches(packed, 32, seed=0)
        batch = next(batches)
        ...
        batches = Batches(packed, 32, seed=0, state=saved)     # the batch after the one at which `batches.state` was taken

    batch_size: rows over all processes, of which this one, `process` of `processes`, gets its equal part; `state` is the
    same in all of them. epochs: stop after so many, the last batch filled up with padding (None: never stop). shuffle:
    False takes the rows as they are packed, as for evaluation. Another batch size after a resume goes on at the same row.
    """

    def __init__(
        self,
        packed: Packed,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        process: int = 0,
        processes: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        _check_seed(seed)
        if batch_size < 1 or processes < 1 or batch_size % processes:
            raise DataError(
                f"a batch of {batch_size} rows cannot be shared equally by {processes} processes; the nearest that can has"
                f" {max(1, round(batch_size / max(1, processes))) * max(1, processes)}"
            )
        if not 0 <= process < processes:
            raise DataError(f"this is process {process} of {processes}; they are counted from 0 to {processes - 1}")
        if not len(packed):
            raise DataError("there is no row to make batches of")
        self.packed, self.batch_size, self.seed, self.shuffle, self.epochs = packed, batch_size, seed, shuffle, epochs
        self.process, self.processes = process, processes
        self._about = {
            "seed": seed, "shuffle": shuffle, "rows": len(packed), "context": packed.context, "data": packed.digest(),
        }  # fmt: skip
        self._epoch, self._index = 0, 0
        self._order: tuple[int, np.ndarray] | None = None
        if state is not None:
            self._resume(state)

    @property
    def state(self) -> dict[str, Any]:
        """Where the next batch begins: row `index` of epoch `epoch`; and what it is a position in. Plain numbers and text."""
        return {"epoch": self._epoch, "index": self._index, **self._about}

    def _resume(self, state: Mapping[str, Any]) -> None:
        if odd := [f"{k} was {state.get(k)!r} and is {v!r}" for k, v in self._about.items() if state.get(k) != v]:
            raise DataError(
                "the saved position is one in other data, and the batches after it would not be those of an unbroken run:"
                f" {', '.join(odd)}. Give the same data, context and seed, or start without the saved position"
            )
        epoch, index = state.get("epoch"), state.get("index")
        for name, value, end in (("epoch", epoch, 2**62), ("index", index, len(self.packed))):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
                raise DataError(f"the saved position has {name} {value!r}; it lies between 0 and {end - 1}")
        assert isinstance(epoch, int)
        assert isinstance(index, int)
        self._epoch, self._index = epoch, index

    @property
    def batches_per_epoch(self) -> float:
        """Rows over batch size; batches may span two epochs."""
        return len(self.packed) / self.batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.epochs is not None and self._epoch >= self.epochs:
            raise StopIteration
        share = self.batch_size // self.processes
        batch = blank(share, self.packed.context)
        for i in range(self.batch_size):
            if self.epochs is not None and self._epoch >= self.epochs:
                break
            mine = i - self.process * share
            if 0 <= mine < share:
                self.packed.fill(self._row(), {name: x[mine] for name, x in batch.items()})
            self._index += 1
            if self._index == len(self.packed):
                self._epoch, self._index = self._epoch + 1, 0
        return batch

    def _row(self) -> int:
        if not self.shuffle:
            return self._index
        if self._order is None or self._order[0] != self._epoch:
            self._order = (self._epoch, permutation(len(self.packed), self.seed, self._epoch))
        return int(self._order[1][self._index])
