"""jaxengine.finetune.data: what of a row is learned, that packing loses and mixes nothing, that resuming changes nothing.

The oracles: chat masks spelt out by hand as pieces of text (the tokenizer here has one token a byte, so that a piece's
tokens are its bytes); a Philox in plain Python with the known answer of Random123; a best fit that looks at every row.
In the property tests every token of the data set has its own number, so that nothing can be lost or swapped unseen.
"""

from __future__ import annotations

import itertools
import json
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxengine.finetune import data
from jaxengine.finetune.data import Batches, DataError, Documents, Rows, blank, pack, permutation, read
from jaxengine.text import Tokenizer

START, END, EOS, BOS = "<|im_start|>", "<|im_end|>", "<|eos|>", "<|bos|>"

CHATML = (
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
MARKED = (
    "{% for message in messages %}\n"
    "{% if message.role == 'assistant' %}\n"
    "    {{- '<|im_start|>assistant' }}\n"
    "    {% generation %}\n"
    "    {%- set shown = message.content | trim %}\n"
    "{{ shown }}<|im_end|>\n"
    "    {%- endgeneration +%}\n"
    "{% else %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}\n"
    "{# {% generation %} in a comment #}"
)


def byte_level(
    folder: Path, *, template: str | None = None, merges: Sequence[tuple[str, str]] = (), bos: bool = False
) -> Tokenizer:
    """One token a byte, but for merges and specials; ids 0 to 255 are letters of GPT-2's alphabet in its order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, *(x + y for x, y in merges)])}
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (START, END, EOS, BOS)])
    index = backend.token_to_id(BOS)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        template_ = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, index)])
        backend.post_processor = processors.Sequence([backend.post_processor, template_])
    folder.mkdir(exist_ok=True, parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOS, **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte, a special token one: from the alphabet, not from encode."""
    from tokenizers.pre_tokenizers import ByteLevel

    found: list[int] = []
    while text:
        special = next((s for s in (START, END, EOS, BOS) if text.startswith(s)), None)
        if special:
            found.append(tokenizer.token_to_id(special) or -1)
            text = text[len(special) :]
            continue
        ((letters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text[0])
        found += [tokenizer.token_to_id(letter) or 0 for letter in letters]
        text = text[1:]
    return found


def told(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]]) -> tuple[array, bytearray]:
    """Pieces of text and whether each is learned, as tokens."""
    tokens, learned = [], []
    for text, mask in pieces:
        tokens += ids(tokenizer, text)
        learned += [mask] * len(ids(tokenizer, text))
    return array("i", tokens), bytearray(learned)


# -- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_text_and_completion(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_level(tmp_path, bos=bos)
    rows, first = Rows(tokenizer), BOS if bos else ""
    # the first token of a document follows nothing and cannot be learned
    want = told(
        tokenizer, [(BOS, False), ("né\n", True), (EOS, True)] if bos else [("n", False), ("é\n", True), (EOS, True)]
    )
    assert rows.document({"text": "né\n", "id": 7}) == want
    assert rows.document({"text": f"né\n{EOS}"}) == want  # it ends once
    want = told(tokenizer, [(first + "2+2=", False), (" 4", True), (EOS, True)])
    assert rows.document({"prompt": "2+2=", "completion": " 4", "source": "x"}) == want
    assert rows.document({"prompt": "2+2=", "completion": f" 4{EOS}"}) == want
    want = told(tokenizer, [(first, False), (" 4", True), (EOS, True)])
    want[1][0] = 0
    assert rows.document({"prompt": "", "completion": " 4"}) == want


def test_no_end_of_text_where_there_is_none(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert Rows(tokenizer).document({"text": "ab"}) == told(tokenizer, [("a", False), ("b", True)])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Rows(Tokenizer.from_folder(tmp_path)).document({"text": "a"})[0][1:].tolist() == [3]


def test_a_prompt_has_the_tokens_it_has_alone(tmp_path: Path) -> None:
    """ "ab" is one token, and must not be where the model will be given "a"."""
    tokenizer = byte_level(tmp_path, merges=[("a", "b")])
    assert tokenizer.encode("ab") == [256]
    tokens, learned = Rows(tokenizer).document({"prompt": "xa", "completion": "bab"})
    assert tokens.tolist() == [*ids(tokenizer, "xab"), 256, *ids(tokenizer, EOS)]
    assert list(learned) == [0, 0, 1, 1, 1]


def test_a_space_that_belongs_to_the_completion(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text cannot encode a completion alone: refused where it would have to."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "a": 3, "b": 4, "▁b": 5, ":": 6, "</s>": 7}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    rows = Rows(Tokenizer.from_folder(tmp_path))
    assert rows.document({"prompt": "a:", "completion": " b"}) == (array("i", [2, 6, 5, 7]), bytearray([0, 0, 1, 1]))
    with pytest.raises(DataError, match="move the space between them to the beginning of the completion"):
        rows.document({"prompt": "a: ", "completion": "b"})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["the", " ", "  ", "\n", "é", "€", "th", "ab", "a", "x.", "'s", EOS]), max_size=300),
    st.integers(20, 60),
)
def test_a_long_text_in_windows(tmp_path_factory: pytest.TempPathFactory, words: list[str], window: int) -> None:
    """The ids of windows, joined, are those of the whole; where windows never agree, the whole is encoded."""
    merges = [("t", "h"), ("Ġ", "th"), ("a", "b"), ("Ġ", "Ġ"), ("Ġth", "e"), ("x", ".")]
    tokenizer, text = byte_level(tmp_path_factory.mktemp("m"), merges=merges), "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENCODED": window, "OVERLAP": 30, "AGREED": 3}.items():
            patch.setattr(data, name, value)
        rows = Rows(tokenizer)
        assert rows._encode(text).tolist() == tokenizer.encode(text)
        joined = rows._encode_long(text)
        assert joined is None or joined.tolist() == tokenizer.encode(text)
        sure = "".join(f"word{i} " for i in range(60))
        joined = rows._encode_long(sure)
        assert joined is not None
        assert joined.tolist() == tokenizer.encode(sure)


U1, A1 = {"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello €!"}
U2, A2 = {"role": "user", "content": "assistant\nHello €!"}, {"role": "assistant", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_chat_by_prefixes(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, template=CHATML)
    want = told(
        tokenizer,
        [
            (f"{START}system\nBe brief.{END}\n{START}user\nHi é{END}\n{START}assistant\n", False),
            (f"Hello €!{END}\n", True),
            (f"{START}user\nassistant\nHello €!{END}\n{START}assistant\n", False),
            (f"Bye{END}\n", True),
        ],
    )
    assert Rows(tokenizer).document({"messages": [SYSTEM, U1, A1, U2, A2]}) == want
    tokens, learned = Rows(tokenizer).document({"messages": [U1, A1, U2]})
    assert sum(learned) == len(ids(tokenizer, f"Hello €!{END}\n"))
    assert tokens.tolist() == tokenizer.encode_chat([U1, A1, U2], add_generation_prompt=False)


@pytest.mark.parametrize("merges", [(), (("a", "n"), ("Ġ", "t"), ("e", "r")), (("Ċ", "H"), ("Ċ", "Ċ"))])
def test_chat_by_marks(tmp_path: Path, merges: Any) -> None:
    tokenizer = byte_level(tmp_path, template=MARKED)
    pieces = [
        (f"{START}user\nHi é{END}\n{START}assistant\n", False),
        (f"Hello €!{END}", True),
        (f"\n{START}user\nassistant\nHello €!{END}\n{START}assistant\n", False),
        (f"Bye{END}", True),
        ("\n", False),
    ]
    padded = [U1, {**A1, "content": "  Hello €! "}, U2, A2]
    assert tokenizer.render_chat(padded, add_generation_prompt=False) == "".join(text for text, _ in pieces)
    assert Rows(tokenizer).document({"messages": padded}) == told(tokenizer, pieces)
    if merges:  # a token that reaches into what the assistant says is learned, and no other outside of it
        merged = byte_level(tmp_path / "merged", template=MARKED, merges=merges)
        tokens, learned = Rows(merged).document({"messages": padded})
        text, at = "".join(text for text, _ in pieces), 0
        wanted = [mask for piece, mask in pieces for _ in piece.encode()]
        for token, mask in zip(tokens, learned, strict=True):
            length = len(merged.decode([token], skip_special_tokens=False).encode()) if token >= 256 else 1
            assert mask == any(wanted[at : at + length]), (at, merged.id_to_token(token))
            at += length
        assert at == len(text.encode())


def test_marks_find_spaces_that_offsets_leave_out(tmp_path: Path) -> None:
    """trim_offsets takes a token's leading spaces out of its offsets; they are said by the assistant all the same."""
    template = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    tokenizer = byte_level(tmp_path, template=template, merges=[("Ġ", "h"), ("Ġ", "Ġ")])
    encoding = tokenizer.backend.encode("u:   h  ;", add_special_tokens=False)
    assert encoding.tokens == ["u", ":", "ĠĠ", "Ġh", "Ġ", "Ġ", ";"]
    assert encoding.offsets[2] == (4, 4)  # empty: what this test is about
    found = Rows(tokenizer).document({"messages": [{"role": "assistant", "content": "   h  "}]})
    want = [(x, i > 9 and x != ";") for i, x in enumerate([*"assistant:", "ĠĠ", "Ġh", "Ġ", "Ġ", ";"])]
    assert [(tokenizer.id_to_token(t), m) for t, m in zip(*found, strict=True)] == want


def test_another_template_and_tools(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, template=CHATML)
    given = (
        "{{ tools | tojson if tools else '' }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    rows = Rows(tokenizer, chat_template=given)
    tools = [{"name": "f"}]
    want = told(tokenizer, [('[{"name": "f"}]', False), ("Bye", True)])
    assert rows.document({"messages": [A2], "tools": tools}) == want


def test_a_template_that_changes_earlier_turns(tmp_path: Path) -> None:
    template = CHATML.replace("message.content +", "(message.content if loop.last else 'cut') +")
    rows = Rows(byte_level(tmp_path, template=template))
    with pytest.raises(DataError, match=r"up to messages\[1\] in another way.*'Hi é.*against 'cut"):
        rows.document({"messages": [U1, A1]})
    template = template.replace("if loop.last", "if loop.last or message.role == 'user'")
    rows = Rows(byte_level(tmp_path / "b", template=template))
    assert sum(rows.document({"messages": [U1, A1]})[1]) == len("Hello €!".encode()) + 2
    with pytest.raises(DataError, match=r"to the end of messages\[1\].*'Hello .*against 'cut.*generation %} marks"):
        rows.document({"messages": [U1, A1, U2, A2]})


def test_marks_that_cannot_be_told(tmp_path: Path) -> None:
    rows = Rows(byte_level(tmp_path, template="{% generation %}{{ messages[0].content }}{% endgeneration %}"))
    with pytest.raises(DataError, match=r"U\+FDD0"):
        rows.document({"messages": [{"role": "assistant", "content": "a\ufdd0"}]})
    template = "{% set x %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ x | length }}"
    rows = Rows(byte_level(tmp_path / "b", template=template))
    with pytest.raises(DataError, match="not in pairs around what it prints"):
        rows.document({"messages": [A1]})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "the row is a JSON list"),
        (3.5, "the row is a JSON number"),
        (None, "the row is a JSON null"),
        ({}, "the row has no entry; it must have"),
        ({"txt": "a"}, "has 'txt'; it must have .*Is 'txt' meant to be 'text'"),
        ({"id": 1, "conversations": []}, "For 'conversations': rename it to \"messages\""),
        ({"instruction": "a", "output": "b"}, "For 'instruction': give"),
        ({"prompt": "a", "completions": "b"}, 'has "prompt" and no "completion" .did you mean \'completions\''),
        ({"completion": "a"}, 'has "completion" and no "prompt"'),
        ({"text": "a", "messages": []}, 'both "messages" and "text"'),
        ({"text": 3}, '"text" is a JSON number; it must be a string'),
        ({"text": None}, '"text" is a JSON null'),
        ({"text": " \n"}, '"text" is empty'),
        (
            {"prompt": [U1], "completion": [A1]},
            '"prompt" is a JSON list; it must be a string; a conversation goes into',
        ),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"messages": "hi"}, '"messages" is a JSON string; it must be a list'),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str"),
        ({"messages": [U1, {"role": "assistant"}]}, r"messages\[1\] .* has no \"content\""),
        ({"messages": [U1, {"content": "a"}]}, r"messages\[1\] has role None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be a string"),
        ({"messages": [U1, SYSTEM]}, 'none of the "messages" has the role "assistant"'),
        ({"messages": [A1, U1]}, "the first message is the assistant's"),
        ({"messages": [U1, A1], "tools": "f"}, "tools is a str"),
        ({"text": "a\ud800"}, "surrogate"),
        ({"prompt": "\ud800", "completion": "a"}, "surrogate"),
        ({"messages": [U1, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Rows(byte_level(tmp_path, template=CHATML)).document(row)


def test_rows_that_the_folder_cannot_take(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base")
    with pytest.raises(DataError, match="has no chat template"):
        Rows(base).document({"messages": [U1, A1]})
    with pytest.raises(DataError, match=r"the token id 258 .'<.eos.>'., and the model's embedding has 256 rows"):
        Rows(base, vocab_size=256).document({"text": "ab"})
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="nothing in it would be learned"):
        Rows(Tokenizer.from_folder(tmp_path / "base")).document({"text": "a"})


# -- files --------------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_files_in_order(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "model")
    rows = Rows(tokenizer)
    one = write_lines(tmp_path / "one.jsonl", {"text": "ab"}, "", {"prompt": "a", "completion": "b"})
    two = tmp_path / "two.txt"
    two.write_text("\ufeffc\n\nd", encoding="utf-8")  # a byte order mark is no text
    seen: list[tuple[int, int]] = []
    found = read([one, two], rows, progress=lambda done, total: seen.append((done, total)))
    want = [rows.document(r) for r in ({"text": "ab"}, {"prompt": "a", "completion": "b"}, {"text": "c\n\nd"})]
    assert len(found) == 3
    for i, (tokens, learned) in enumerate(want):
        assert found[i][0].tolist() == tokens.tolist()
        assert found[i][1].tolist() == list(learned)
        assert (found[i][0].dtype, found[i][1].dtype) == (np.int32, np.float32)
    assert found.num_learned == sum(sum(m) for _, m in want)
    total = one.stat().st_size + two.stat().st_size
    assert seen[-1] == (total, total)
    assert len(read(str(two), rows)) == 1


def test_the_cache_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(byte_level(tmp_path / "model", template=CHATML))
    file = write_lines(tmp_path / "a.jsonl", {"text": "ab"}, {"messages": [U1, A1]})
    plain = read(file, rows)

    def folders() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    first = read(file, rows, cache=tmp_path / "cache")
    assert isinstance(first.tokens, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "document", None)  # the second time nothing is tokenized
        second = read(file, rows, cache=tmp_path / "cache")
    for found in (first, second):
        assert found.digest() == plain.digest()
        assert [x.dtype for x in (found.tokens, found.learned, found.starts)] == [np.int32, np.uint8, np.int64]
    assert folders() == 1
    write_lines(file, {"text": "ac"}, {"messages": [U1, A1]})  # as many bytes
    assert read(file, rows, cache=tmp_path / "cache").digest() != plain.digest()
    other = Rows(byte_level(tmp_path / "other", template=MARKED))
    read(file, other, cache=tmp_path / "cache")
    read(file, Rows(rows.tokenizer, chat_template=MARKED), cache=tmp_path / "cache")
    assert folders() == 4
    write_lines(file, {"text": "ad"}, "{")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read(file, rows, cache=tmp_path / "cache")
    assert folders() == 4  # nothing of a failed reading stays


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows(byte_level(tmp_path / "model"))
    file = tmp_path / "a.jsonl"
    long = b'{"text": "ab", "id": ' + b"7" * 5000 + b"}\n"
    file.write_bytes(b'{"text": "ab"}\n\n{"text": 3}\n{"text": "a\xff"}\n{"text": \n["x"]\n' + long)
    with pytest.raises(DataError) as caught:
        read(file, rows)
    said = str(caught.value).splitlines()
    assert said[0].startswith("5 rows cannot be trained on; skip_bad leaves them out")
    assert [line.strip().partition(": ")[0] for line in said[1:]] == [f"{file}:{n}" for n in (3, 4, 5, 6, 7)]
    why = ("JSON number", "not UTF-8", "not JSON", "a JSON list", "a whole number in it has more than 4300 digits")
    for line, words in zip(said[1:], why, strict=True):
        assert words in line
    with caplog.at_level(logging.WARNING, "jaxengine"):
        assert len(read(file, rows, skip_bad=True)) == 1
    assert [r.getMessage().splitlines()[0] for r in caplog.records] == ["5 rows cannot be trained on left out of 6:"]


def test_reading_ends_after_many_bad_rows(tmp_path: Path) -> None:
    rows = Rows(byte_level(tmp_path / "model"))
    file = write_lines(tmp_path / "a.jsonl", *["{"] * 100, {"text": "ab"})
    with pytest.raises(DataError, match="20 rows cannot be trained on and reading ended there") as caught:
        read(file, rows)
    assert str(caught.value).count("a.jsonl:") == 20
    assert len(read(file, rows, skip_bad=True)) == 1
    with pytest.raises(DataError, match="there is no row in"):
        read(write_lines(tmp_path / "b.jsonl", "{"), rows, skip_bad=True)


def test_files_refused(tmp_path: Path) -> None:
    rows = Rows(byte_level(tmp_path / "model"))
    write_lines(tmp_path / "train.jsonl", {"text": "ab"})
    for name, said in {
        "trian.jsonl": "there is no file .*; beside it is train.jsonl",
        "model": "is a folder; give its files",
        "a.parquet": "write its rows as jsonl",
        "empty.txt": "is empty",
        "zero.txt": "has a zero byte",
        "latin.txt": "latin.txt: it is not UTF-8",
        "list.json": r"list.json:1: it is not JSON .*one list over several lines",
    }.items():
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        (tmp_path / "empty.txt").touch()
        (tmp_path / "zero.txt").write_bytes(b"a\0b")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        (tmp_path / "list.json").write_text('[\n{"text": "a"}]')
        with pytest.raises(DataError, match=said):
            read(tmp_path / name, rows)
    with pytest.raises(DataError, match="no file is given"):
        read([], rows)


# -- held out -----------------------------------------------------------------------------------------------------------


def numbered(lengths: Sequence[int], learned: Sequence[bool] | None = None) -> Documents:
    """Documents whose tokens are 0, 1, 2, ..., each once."""
    count = itertools.count()
    masks = iter(learned if learned is not None else [True] * sum(lengths))
    return Documents.of([([next(count) for _ in range(n)], [next(masks) for _ in range(n)]) for n in lengths])


@pytest.mark.parametrize(
    ("lengths", "fraction", "held"),
    [
        ([3, 4, 5, 2], 0.25, [12, 13]),
        ([3, 4], 0.01, [3, 4, 5, 6]),
        ([3, 4], 0.99, [3, 4, 5, 6]),
        ([10], 0.3, [7, 8, 9]),
    ],
)
def test_the_last_part_is_held_out(lengths: list[int], fraction: float, held: list[int]) -> None:
    train, test = numbered(lengths).split(fraction)
    assert test.tokens.tolist() == held
    assert train.tokens.tolist() == list(range(held[0]))
    for part in (train, test):
        assert part.starts[0] == 0
        assert part.starts[-1] == len(part.tokens)
        assert not part.learned[part.starts[:-1]].any()
    assert [len(x[0]) for x in (*train, *test)] == ([7, 3] if lengths == [10] else lengths)


def test_splits_refused() -> None:
    for fraction in (0, 1, -0.5, 2):
        with pytest.raises(DataError, match="lies between 0 and 1"):
            numbered([3, 3]).split(fraction)
    with pytest.raises(DataError, match="a document of 3 tokens cannot be split"):
        numbered([3]).split(0.5)


# -- packing ------------------------------------------------------------------------------------------------------------

documents = st.lists(st.integers(1, 40), min_size=1, max_size=25).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.lists(st.sampled_from([True, True, False]), min_size=sum(lengths), max_size=sum(lengths))
    )
)


@settings(max_examples=80, deadline=None)
@given(documents, st.integers(1, 24), st.integers(0, 5), st.sampled_from([1, 3, 4096]))
def test_packing(drawn: Any, context: int, seed: int, window: int) -> None:
    """Every learned token is a target exactly once, next to the token before it, in a segment of its own document."""
    lengths, masks = drawn
    docs = numbered(lengths, masks)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum([0, *lengths])
    wanted = {t for t in range(sum(lengths)) if masks[t] and t not in starts}
    if not wanted:
        with pytest.raises(DataError, match="nothing to train on"):
            pack(docs, context, seed=seed, window=window)
        return
    packed = pack(docs, context, seed=seed, window=window)
    found: list[int] = []
    seen: list[tuple[int, int]] = []
    for r in range(len(packed)):
        row = {name: x[0] for name, x in blank(1, context).items()}
        packed.fill(r, row)
        used = row["segments"] > 0
        assert used.any()
        assert (np.diff(used.astype(int)) <= 0).all()  # padding is at the end
        for name, filler in {"tokens": 0, "targets": 0, "weights": 0, "positions": -1}.items():
            assert (row[name][~used] == filler).all()
        assert sorted(set(row["segments"][used])) == list(range(1, row["segments"].max() + 1))
        assert (np.diff(row["segments"][used]) >= 0).all()
        assert (row["targets"][used] == row["tokens"][used] + 1).all()
        assert (owner[row["targets"][used]] == owner[row["tokens"][used]]).all()  # no target crosses a document
        for s in range(1, row["segments"].max() + 1):
            here = row["segments"] == s
            assert row["positions"][here].tolist() == list(range(here.sum()))
            first = row["tokens"][here][0]
            assert row["tokens"][here].tolist() == list(range(first, first + here.sum()))
            assert (first - starts[owner[first]]) % context == 0  # a document's beginning, or a cut
            assert here.sum() == min(context, starts[owner[first] + 1] - 1 - first)
            assert row["weights"][here].any()
            seen.append((int(first), int(here.sum())))
        assert set(np.unique(row["weights"])) <= {0.0, 1.0}
        found += row["targets"][row["weights"] > 0].tolist()
        assert all(masks[t] for t in row["targets"][row["weights"] > 0])
    assert sorted(found) == sorted(wanted)
    assert len(set(seen)) == len(seen)
    assert packed.density == pytest.approx(sum(n for _, n in seen) / (context * len(packed)))
    cut = [-(-(n - 1) // context) for n in lengths]
    assert packed.num_cut == sum(n > 1 for n in cut)
    assert packed.num_dropped == sum(cut) - len(seen)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(29, 40))
def test_best_fit(lengths: list[int], context: int) -> None:
    """Against a loop over all rows; of rows with equally little room either may take it, so rooms are compared."""
    packed = pack(numbered(lengths), context)
    rows: list[int] = []
    for n in sorted((n - 1 for n in lengths), reverse=True):
        fits = [i for i, free in enumerate(rows) if free >= n]
        if fits:
            rows[min(fits, key=lambda i: rows[i])] -= n
        else:
            rows.append(context - n)
    ends = packed.row_starts
    found = [context - int(packed.length[ends[r] : ends[r + 1]].sum()) for r in range(len(packed))]
    assert sorted(found) == sorted(rows)


def test_packing_depends_on_the_seed_alone() -> None:
    docs = numbered([5] * 50)
    a, b, c = pack(docs, 16, seed=1), pack(docs, 16, seed=1), pack(docs, 16, seed=2)
    assert a.first.tolist() == b.first.tolist() != c.first.tolist()
    assert a.digest() == b.digest() != c.digest()


def test_cuts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jaxengine"):
        pack(numbered([30, 4], [False] * 16 + [True] * 18), 8)
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 2 documents are longer than the context of 8 tokens and are cut; what follows a cut does not see what stood"
        " before it; 1 pieces in which nothing is learned are left out"
    ]


@pytest.mark.parametrize("arguments", [{"context": 0}, {"context": 8, "window": 0}, {"context": 8, "seed": -1}])
def test_packing_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(DataError, match=list(arguments)[-1]):
        pack(numbered([4]), **arguments)


# -- order --------------------------------------------------------------------------------------------------------------


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011, section 3.3)."""
    mask = 2**64 - 1
    c = [counter >> 64 * i & mask for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


def test_the_order_is_philox() -> None:
    # Random123's known answer
    assert philox(0, (0, 0)) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    for n, seed, epoch in ((1, 0, 0), (10, 3, 7), (4, 2**63 - 1, 2**63), (101, 5, 0)):
        raw = [x for block in range(1, -(-n // 4) + 1) for x in philox(block, (seed, epoch))][:n]
        assert permutation(n, seed, epoch).tolist() == sorted(range(n), key=raw.__getitem__)


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(permutation(20, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(20)) for order in orders)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(1, 12), st.integers(1, 7), st.integers(0, 30), st.integers(1, 7), st.booleans())
def test_resumed_is_unbroken(
    drawn: Any, context: int, batch_size: int, stop: int, other_size: int, shuffle: bool
) -> None:
    docs = numbered(drawn[0])
    if max(drawn[0]) == 1:
        return
    packed = pack(docs, context)
    unbroken = Batches(packed, batch_size, seed=3, shuffle=shuffle)
    for _ in range(stop):
        next(unbroken)
    saved = json.loads(json.dumps(unbroken.state))
    after = [next(unbroken) for _ in range(8)]
    resumed = Batches(pack(numbered(drawn[0]), context), batch_size, seed=3, shuffle=shuffle, state=saved)
    assert resumed.state == saved
    assert all(equal(next(resumed), batch) for batch in after)
    assert resumed.state == unbroken.state
    # with another batch size it goes on at the same row
    other = Batches(packed, other_size, seed=3, shuffle=shuffle, state=saved)
    rows = np.concatenate([next(other)["tokens"] for _ in range(-(-8 * batch_size // other_size))])
    assert np.array_equal(rows[: 8 * batch_size], np.concatenate([batch["tokens"] for batch in after]))


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_has_each_learned_token_once(
    drawn: Any, context: int, share: int, processes: int, epochs: int
) -> None:
    docs = numbered(drawn[0], drawn[1])
    if not docs.learned.any():
        return
    packed = pack(docs, context)
    every = [
        list(Batches(packed, share * processes, seed=1, epochs=epochs, process=p, processes=processes))
        for p in range(processes)
    ]
    whole = list(Batches(packed, share * processes, seed=1, epochs=epochs))
    assert len({len(batches) for batches in (*every, whole)}) == 1
    for i, batch in enumerate(whole):
        assert all(x.shape == (share * processes, context) for x in batch.values())
        assert equal(batch, {name: np.concatenate([mine[i][name] for mine in every]) for name in batch})
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in whole])
    want = np.flatnonzero(docs.learned)
    assert sorted(targets.tolist()) == sorted([*want] * epochs)
    rows = len(packed)
    flat = np.concatenate([b["tokens"] for b in whole])[: rows * epochs]
    for epoch in range(epochs):  # each epoch has all the rows, in its own order
        own = flat[epoch * rows : (epoch + 1) * rows]
        assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, flat[:rows].tolist()))


def test_batches_refused() -> None:
    packed = pack(numbered([9, 5, 7]), 8)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "a batch of 0 rows"),
        ({"batch_size": 5, "processes": 3}, "the nearest that can has 6"),
        ({"batch_size": 4, "processes": 2, "process": 2}, "this is process 2 of 2"),
        ({"batch_size": 4, "seed": -1}, "the seed is -1"),
    ]
    for arguments, said in refused:
        with pytest.raises(DataError, match=said):
            Batches(packed, **arguments)
    state = Batches(packed, 2).state
    assert (state["epoch"], state["index"]) == (0, 0)
    for changed, said in (
        ({"seed": 1}, "seed was 1 and is 0"),
        ({"data": "x"}, "data was 'x'"),
        ({"context": 9}, "context was 9 and is 8"),
        ({"index": 99}, "has index 99"),
        ({"epoch": -1}, "has epoch -1"),
        ({"epoch": None}, "has epoch None"),
    ):
        with pytest.raises(DataError, match=said):
            Batches(packed, 2, state=state | changed)
    with pytest.raises(DataError, match="data was"):
        Batches(pack(numbered([9, 7, 5]), 8), 2, state=state)
    many = [numbered([9, 5, 7] * 9)] * 2
    state = Batches(pack(many[0], 8), 2).state
    with pytest.raises(DataError, match="data was"):
        Batches(pack(many[1], 8, seed=5), 2, state=state)


def test_the_module_says_what_a_batch_is() -> None:
    batch = next(Batches(pack(numbered([4, 3]), 8), 1))
    assert {name: x.dtype.name for name, x in batch.items()} == {
        "tokens": "int32", "targets": "int32", "weights": "float32", "positions": "int32", "segments": "int32",
    }  # fmt: skip
    assert {name: x[0].tolist() for name, x in batch.items()} == {
        "tokens": [0, 1, 2, 4, 5, 0, 0, 0],
        "targets": [1, 2, 3, 5, 6, 0, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, -1, -1, -1],
        "segments": [1, 1, 1, 2, 2, 0, 0, 0],
    }
    assert data.__doc__
