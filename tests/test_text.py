"""jaxengine.text against the tokenizers library itself: folders are written here, and read back by both.

The oracle of every stream is the library's own decode of the whole sequence, taken from a second, untouched copy of the
tokenizer; of the stop strings, a scan that looks at one character at a time.
"""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxengine.text import ChatTemplateError, Detokenizer, StopStrings, Tokenizer

# -- tokenizers of every kind, made by hand ---------------------------------------------------------------------------


def byte_level() -> Backend:
    """GPT-2, Llama 3, Qwen: every byte is a token; some merges end inside a character."""
    alphabet = LETTERS
    merges = [(alphabet[0xE2], alphabet[0x82]), (alphabet[0xF0], alphabet[0x9F]), ("Ġ", "t"), ("Ġt", "h"), ("a", "b")]
    pieces = [alphabet[byte] for byte in range(256)] + [left + right for left, right in merges]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|é €|>", AddedToken("<|bos|>", special=True)])
    backend.add_tokens(["two words", "€uro"])
    return backend


def byte_letters() -> dict[int, str]:
    """byte -> its letter, asked of the library: it encodes U+0000..U+07FF, whose UTF-8 bytes are known."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters: dict[int, str] = {}
    for code in [*range(0x800), 0x800, *range(0x1000, 0xD000, 0x1000), 0xD000, 0xE000, 0xF000, 0x10000, 0x50000]:
        text = chr(code)
        ((pieces, _),) = split.pre_tokenize_str(text)
        letters |= dict(zip(text.encode(), pieces, strict=True))
    for code in (0x90000, 0xD0000, 0x10FFFF):
        ((pieces, _),) = split.pre_tokenize_str(chr(code))
        letters |= dict(zip(chr(code).encode(), pieces, strict=True))
    # C0, C1 and F5..FF are in no valid text; they take the letters left over, in order.
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters.values()))
    missing = [byte for byte in range(256) if byte not in letters]
    return letters | dict(zip(missing, others, strict=True))


LETTERS = byte_letters()


def byte_fallback(decoder: decoders.Decoder) -> Backend:
    """Llama 2: SentencePiece BPE, unknown characters spelt in byte tokens."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁▁", "h", "e", "▁h", "▁he", "é", "\ufffd", " ", "<0x+F>", "<0xG1>", "▁a▁b", "w"]
    merges = [("▁", "h"), ("▁h", "e"), ("▁", "▁")]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> Backend:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁a", -1.0),
        ("b", -1.5),
        ("▁▁", -3.0),
        ("c▁d", -3.0),
        ("\ufffd", -4.0),
        ("e", -1),
    ]
    backend = Backend(models.Unigram([(piece, float(score)) for piece, score in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return backend


def word_level(decoder: decoders.Decoder | None) -> Backend:
    words = ["[UNK]", "the", "##ing", "##", "n't", ".", "a", "  b", "do", "é", "x</w>", "y</w>", " ", "'", "##'s"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return backend


def llama_decoder(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


BACKENDS = {
    "byte level": byte_level(),
    "llama 2": byte_fallback(llama_decoder(decoders.Strip(" ", 1, 0))),
    "strips three": byte_fallback(llama_decoder(decoders.Strip(" ", 3, 0))),
    "gemma": byte_fallback(llama_decoder()),
    "byte fallback, metaspace": byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace never": byte_fallback(decoders.Metaspace(prepend_scheme="never")),
    "nested, regex": byte_fallback(
        decoders.Sequence(
            [
                decoders.Sequence([decoders.Replace(Regex("▁+|h$"), "_"), decoders.Strip("_", 1, 0)]),
                decoders.ByteFallback(),
            ]
        )
    ),
    "unigram": unigram(),
    "no decoder": word_level(None),
    "wordpiece": word_level(decoders.WordPiece(prefix="##", cleanup=True)),
    "wordpiece as it is": word_level(decoders.WordPiece(prefix="##", cleanup=False)),
    "bpe suffix": word_level(decoders.BPEDecoder(suffix="</w>")),
    "strip at the end": byte_fallback(llama_decoder(decoders.Replace("  ", "-"), decoders.Replace("-", "+"))),
}
AT_ONCE = ("bpe suffix", "strip at the end")


def write_folder(folder: Path, backend: Backend, **files: object) -> Path:
    """tokenizer.json, and each keyword as a file: a dict as NAME.json, a str as NAME.jinja."""
    folder.mkdir(exist_ok=True, parents=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        if isinstance(value, str):
            (folder / f"{name}.jinja").write_text(value, encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: Tokenizer.from_folder(write_folder(root / kind, backend)) for kind, backend in BACKENDS.items()}


def known(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(index) for index in ids] + [detokenizer.flush()]


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_stream_is_the_decode_of_the_whole(opened: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer, backend = opened[kind], BACKENDS[kind]
    everything = st.integers(0, backend.get_vocab_size() - 1)
    # Byte tokens alone seldom spell UTF-8 by chance, so real characters are mixed in.
    spelt = st.text(alphabet="aé€😀\ufffd \u0800the", max_size=4).map(
        lambda text: backend.encode(text, add_special_tokens=False).ids
    )
    parts = data.draw(st.lists(st.one_of(st.lists(everything, max_size=4), spelt), max_size=8))
    ids = [index for part in parts for index in part]
    skip = data.draw(st.booleans())

    got = stream(Detokenizer(tokenizer, skip_special_tokens=skip), ids)
    want = backend.decode(ids, skip_special_tokens=skip)
    assert "".join(got) == want
    assert tokenizer.decode(ids, skip_special_tokens=skip) == want

    cut = data.draw(st.integers(0, len(ids)))
    told, detokenizer = [], Detokenizer(tokenizer, skip_special_tokens=skip, context=ids[:cut])
    told = stream(detokenizer, ids[cut:])
    assert want.endswith("".join(told))
    assert "".join(got[:cut]) + "".join(told) == want
    assert "".join(stream(detokenizer, ids)) == want, "after a flush a new text begins"


@settings(max_examples=300, deadline=None)
@given(
    raw=st.lists(
        st.sampled_from([0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0x82, 0xED, 0xF0, 0xF4, 0xF8]),
        max_size=9,
    )
)
def test_bytes_that_are_not_utf8(opened: dict[str, Tokenizer], raw: list[int]) -> None:
    for kind, spelling in (("byte level", lambda byte: LETTERS[byte]), ("gemma", lambda byte: f"<0x{byte:02X}>")):
        ids = [known(opened[kind], spelling(byte)) for byte in raw]
        assert "".join(stream(Detokenizer(opened[kind]), ids)) == BACKENDS[kind].decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "llama 2", "gemma"])
def test_no_half_of_a_character_is_printed(opened: dict[str, Tokenizer], kind: str) -> None:
    text = "the 😀€é naïve 中文 👩‍👩‍👧 end"
    tokenizer = opened[kind]
    ids = tokenizer.encode(text)
    got = stream(Detokenizer(tokenizer), ids)
    assert len(ids) > 30
    assert "".join(got) == BACKENDS[kind].decode(ids)
    assert "".join(got).strip() == text
    assert not any("\ufffd" in piece for piece in got)
    assert sum(map(bool, got)) > 8, "it is a stream, not one answer at the end"


def test_text_appears_as_soon_as_it_is_settled(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte level"]
    ids = tokenizer.encode("ab the€ü")
    assert [tokenizer.id_to_token(i) for i in ids] == ["ab", "Ġth", "e", "âĤ", "¬", "Ã", "¼"]
    assert stream(Detokenizer(tokenizer), ids) == ["ab", " th", "e", "", "€", "", "ü", ""]

    # The U+FFFD that stands for a stray byte is settled as soon as the next byte cannot complete it.
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(known(tokenizer, LETTERS[b])) for b in (0xE2, 0x82, 0x41, 0xFF, 0xC3)] == [
        "", "", "\ufffdA", "\ufffd", "",
    ]  # fmt: skip
    assert detokenizer.flush() == "\ufffd"

    # A U+FFFD that the text really has is no unfinished character.
    assert stream(Detokenizer(tokenizer), tokenizer.encode("\ufffd")) == ["", "", "\ufffd", ""]
    fallback = opened["gemma"]
    assert stream(Detokenizer(fallback), [known(fallback, "\ufffd"), known(fallback, "h")]) == [
        "\ufffd",
        "h",
        "",
    ]


def test_a_byte_run_waits_for_its_end(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["llama 2"]
    euro = [known(tokenizer, f"<0x{byte:02X}>") for byte in "€".encode()]
    stray, he = known(tokenizer, "<0xFF>"), known(tokenizer, "▁he")
    assert stream(Detokenizer(tokenizer), [*euro, he]) == ["", "", "", "€ he", ""]
    # The library makes four U+FFFD of these four bytes: had the € been shown, it would have been wrong.
    assert stream(Detokenizer(tokenizer), [*euro, stray, stray, he]) == ["", "", "", "\ufffd" * 4, "\ufffd", " he", ""]
    assert stream(Detokenizer(tokenizer), euro) == ["", "", "", "€"]
    assert stream(Detokenizer(tokenizer), euro[:2]) == ["", "", "\ufffd\ufffd"]


def test_leading_spaces(opened: dict[str, Tokenizer]) -> None:
    for kind in ("llama 2", "byte fallback, metaspace"):
        tokenizer = opened[kind]
        bos, he, w = (known(tokenizer, token) for token in ("<s>", "▁he", "w"))
        assert stream(Detokenizer(tokenizer), [bos, he, he]) == ["", "he", " he", ""]
        # A continuation keeps the space between it and its prompt.
        assert stream(Detokenizer(tokenizer, context=[bos, w]), [he, w]) == [" he", "w", ""]
    llama = opened["llama 2"]
    bos, two, he = (known(llama, token) for token in ("<s>", "▁▁", "▁he"))
    assert stream(Detokenizer(llama), [two, he]) == [" ", " he", ""]
    assert stream(Detokenizer(llama, skip_special_tokens=False), [bos, he]) == ["<s>", " he", ""]


@pytest.mark.parametrize("kind", AT_ONCE)
def test_an_unknown_step_waits_for_the_flush(opened: dict[str, Tokenizer], kind: str) -> None:
    got = stream(Detokenizer(opened[kind]), [5, 6, 7])
    assert got[:-1] == ["", "", ""]
    assert got[-1] == BACKENDS[kind].decode([5, 6, 7])


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**40])
def test_ids_without_a_token_are_named(opened: dict[str, Tokenizer], wrong: int) -> None:
    tokenizer = opened["llama 2"]
    last = BACKENDS["llama 2"].get_vocab_size() - 1
    detokenizer = Detokenizer(tokenizer)
    for call in (lambda: tokenizer.decode([3, wrong, 4]), lambda: detokenizer.push(wrong)):
        with pytest.raises(ValueError, match=rf"token id {wrong} has no token.*ids 0 to {last}"):
            call()
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # type: ignore[list-item]
    assert detokenizer.push(known(tokenizer, "▁he")) == "he", "a refused id leaves no trace"


# -- stop strings -----------------------------------------------------------------------------------------------------


def cut_before_stop(text: str, strings: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        for string in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], True
    return text, False


def could_begin(text: str, strings: list[str]) -> int:
    """Length of the longest end of `text` which is a beginning, but not the whole, of a stop string."""
    return max(
        n for n in range(len(text) + 1) for s in [*strings, "x"] if n < len(s) and text[len(text) - n :] == s[:n]
    )


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=8),
    strings=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings(pieces: list[str], strings: list[str]) -> None:
    stop = StopStrings(strings)
    shown, whole = "", ""
    for piece in pieces:
        emit, stopped = stop.push(piece)
        shown, whole = shown + emit, whole + piece
        want, found = cut_before_stop(whole, strings)
        assert stopped == found == stop.stopped
        assert shown == (want if found else whole[: len(whole) - could_begin(whole, strings)])
    shown += stop.flush()
    assert shown == cut_before_stop(whole, strings)[0]
    assert stop.flush() == ""


def test_stop_strings_by_hand() -> None:
    stop = StopStrings(["</s>", "\nUser:"])
    assert stop.push("Hi <") == ("Hi ", False)
    assert stop.push("b>\nUs") == ("<b>", False)
    assert stop.push("er: no") == ("", True)
    assert stop.push("more") == ("", True)
    assert stop.flush() == ""
    one = StopStrings(["abcd", "bc"])
    assert one.push("xabcd") == ("xa", True), "as it would have been, one character at a time"
    unfinished = StopStrings(["END"])
    assert unfinished.push("the EN") == ("the ", False)
    assert unfinished.flush() == "EN"


def test_stop_strings_refused() -> None:
    with pytest.raises(ValueError, match="stop string 1 is empty"):
        StopStrings(["a", ""])
    with pytest.raises(TypeError, match=r"write \['END'\]"):
        StopStrings("END")
    with pytest.raises(TypeError, match="stop string 0 is a int"):
        StopStrings([3])  # type: ignore[list-item]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_encode_is_the_librarys(opened: dict[str, Tokenizer]) -> None:
    for kind, backend in BACKENDS.items():
        for text in ("", "he the ab", " 中文</s><|end|>two words", "\n\n  x"):
            for special in (True, False):
                want = backend.encode(text, add_special_tokens=special).ids
                assert opened[kind].encode(text, add_special_tokens=special) == want
    assert opened["llama 2"].encode("he")[0] == 1
    with pytest.raises(TypeError, match="text is a list"):
        opened["gemma"].encode(["he"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        opened["gemma"].encode("a\ud83d")


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert (
        Tokenizer.from_folder(write_folder(tmp_path, backend)).encode("abcdefgh") == byte_level().encode("abcdefgh").ids
    )


def test_vocab_size_counts_to_the_largest_id(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode([0, 7]) == "a b"
    with pytest.raises(ValueError, match=r"token id 3 has no token.*0 to 7 with gaps"):
        tokenizer.decode([3])


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 5}}, (7, 9)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 5}}, (5,)),
        ({"generation_config": {}, "config": {"text_config": {"eos_token_id": [4]}}}, (4,)),
        ({"config": {"eos_token_id": 0}, "tokenizer_config": {"eos_token": "</s>"}}, (0,)),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (2,)),
        ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "</s>"}}}, (2,)),
        ({"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}}, (2,)),
        ({"tokenizer_config": {"eos_token": None}}, ()),
        ({}, ()),
    ],
)
def test_eos_ids(tmp_path: Path, files: dict[str, object], want: tuple[int, ...]) -> None:
    assert Tokenizer.from_folder(write_folder(tmp_path, BACKENDS["llama 2"], **files)).eos_ids == want


def test_bos_and_pad(tmp_path: Path) -> None:
    settings_ = {"bos_token": "<s>", "pad_token": None}
    folder = write_folder(tmp_path, BACKENDS["llama 2"], tokenizer_config=settings_, config={"pad_token_id": 4})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 4)
    assert Tokenizer.from_folder(write_folder(tmp_path / "bare", BACKENDS["gemma"])).bos_id is None


def test_a_special_token_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, BACKENDS["llama 2"], tokenizer_config={"pad_token": "[PAD]", "eos_token": "</s>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (2,)
    with pytest.raises(ValueError, match=r"names '\[PAD\]' as pad_token, but no token of its vocabulary"):
        _ = tokenizer.pad_id


def test_a_token_named_special_is_skipped(tmp_path: Path) -> None:
    """It is an ordinary token in tokenizer.json; tokenizer_config.json calls it the EOS token."""
    folder = write_folder(
        tmp_path, BACKENDS["gemma"], tokenizer_config={"eos_token": "▁h", "extra_special_tokens": ["w"]}
    )
    tokenizer = Tokenizer.from_folder(folder)
    ids = [known(tokenizer, token) for token in ("▁he", "▁h", "w", "é")]
    assert tokenizer.decode(ids) == " heé"
    assert "".join(stream(Detokenizer(tokenizer), ids)) == " heé"
    assert BACKENDS["gemma"].decode(ids) == " he hwé"


def test_added_tokens_must_get_their_ids(tmp_path: Path) -> None:
    size = BACKENDS["gemma"].get_vocab_size()
    token = {"content": "<|tool|>", "special": False, "lstrip": False, "rstrip": False}
    for name, value in (
        ("tokenizer_config", lambda index: {"added_tokens_decoder": {str(index): token}}),
        ("added_tokens", lambda index: {"<|tool|>": index}),
    ):
        good = write_folder(tmp_path / f"{name} good", BACKENDS["gemma"], **{name: value(size)})
        assert Tokenizer.from_folder(good).encode("<|tool|>", add_special_tokens=False) == [size]
        wrong = write_folder(tmp_path / f"{name} wrong", BACKENDS["gemma"], **{name: value(size + 5)})
        with pytest.raises(
            ValueError, match=rf"{name}.json gives the added token '<\|tool\|>' id {size + 5}, but after"
        ):
            Tokenizer.from_folder(wrong)


def write_gpt2(folder: Path, **settings_: object) -> Path:
    pieces = ["<s>", "<pad>", "</s>", *LETTERS.values(), "Ġt", "he", "Ġthe", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


def test_vocab_and_merges(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_gpt2(tmp_path, tokenizer_class="GPT2Tokenizer"))
    ids = tokenizer.encode("the the €")
    assert [tokenizer.id_to_token(i) for i in ids] == ["t", "he", "Ġthe", "Ġ", "â", "Ĥ", "¬"]
    assert tokenizer.decode(ids) == "the the €"
    end = known(tokenizer, "<|endoftext|>")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (end, (end,), None)
    assert tokenizer.encode("t<|endoftext|>")[-1] == end


def test_vocab_and_merges_with_bos(tmp_path: Path) -> None:
    opt = {"content": "</s>", "normalized": True, "__type": "AddedToken"}
    folder = write_gpt2(tmp_path, bos_token=opt, eos_token=opt, pad_token="<pad>", add_bos_token=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2}))
    tokenizer = Tokenizer.from_folder(folder)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("the</s>")] == ["</s>", "t", "he", "</s>"]
    assert tokenizer.encode("t", add_special_tokens=False) == [known(tokenizer, "t")]
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2,), 1)


def test_vocab_and_merges_of_another_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer class is 'Qwen2Tokenizer'.*Make a tokenizer.json once"):
        Tokenizer.from_folder(write_gpt2(tmp_path, tokenizer_class="Qwen2Tokenizer"))


# -- files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", '{"model":', r"tokenizer.json is not a tokenizer that tokenizers"),
        ("tokenizer.json", "version https://git-lfs...\n", r"tokenizer.json is a Git LFS pointer"),
        ("tokenizer_config.json", '{"a": ', r"tokenizer_config.json is not valid JSON \(.*line 1 column 7"),
        ("tokenizer_config.json", b"\xff\xfe{}", r"tokenizer_config.json is not UTF-8"),
        ("generation_config.json", "[1]", r"generation_config.json holds a JSON list"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config.json: eos_token_id is '2'"),
        ("config.json", '{"eos_token_id": [1, -1]}', r"config.json: eos_token_id is \[1, -1\]"),
        ("config.json", '{"pad_token_id": true}', r"config.json: pad_token_id is True"),
        ("special_tokens_map.json", "nope", r"special_tokens_map.json is not valid JSON"),
        ("special_tokens_map.json", '{"eos_token": 5}', r"eos_token is 5; a token is a string"),
        ("chat_template.json", '{"chat_template": 3}', r"chat_template.json: chat_template must be a string or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', r"chat_template must be a string or a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', r"some id is not a number"),
        ("tokenizer_config.json", '{"extra_special_tokens": "abc"}', r"extra_special_tokens is 'abc'"),
    ],
)
def test_corrupt_files_are_named(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    write_folder(tmp_path, BACKENDS["gemma"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        Tokenizer.from_folder(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="org/model is not a folder"):
        Tokenizer.from_folder("org/model")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: there is no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ValueError, match=r"has tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


def test_broken_vocab_and_merges_are_named(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path, tokenizer_class="GPT2Tokenizer")
    (folder / "merges.txt").write_text("Ġ zz\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json and .*merges\.txt do not fit together"):
        Tokenizer.from_folder(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r"vocab\.json is not valid JSON"):
        Tokenizer.from_folder(folder)


def test_the_import_is_light() -> None:
    code = "import sys, jaxengine.text; print(sorted({'jax', 'tokenizers', 'jinja2', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- chat templates ---------------------------------------------------------------------------------------------------

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
HELLO = [{"role": "user", "content": "Hello <b>"}]


def chat(folder: Path, template: str | None = None, **files: object) -> Tokenizer:
    if template is not None:
        files["chat_template"] = template
    files.setdefault("tokenizer_config", {"bos_token": "<s>", "eos_token": "</s>"})
    return Tokenizer.from_folder(write_folder(folder, BACKENDS["llama 2"], **files))


def test_chat(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, CHATML)
    want = "<|im_start|>user\nHello <b><|im_end|>\n"
    assert tokenizer.render_chat(HELLO) == want + "<|im_start|>assistant\n"
    assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == want
    assert (
        tokenizer.encode_chat(HELLO)
        == BACKENDS["llama 2"].encode(want + "<|im_start|>assistant\n", add_special_tokens=False).ids
    )


def test_bos_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert tokenizer.encode("he")[0] == 1
    ids = tokenizer.encode_chat([{"role": "user", "content": "he"}])
    assert (ids.count(1), ids[0], ids[-1]) == (1, 1, 2)


def test_what_templates_may_use(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path)
    render = lambda text, **more: tokenizer.render_chat(HELLO, chat_template=text, **more)  # noqa: E731
    assert render("{{ messages[0].content | tojson }}") == '"Hello <b>"'
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 1,\n "b": "é"\n}'
    assert (
        render(
            "{% for i in range(9) %}{% if i > 1 %}{% break %}{% elif i %}{% continue %}{% endif %}{{ i }}{% endfor %}"
        )
        == "0"
    )
    assert render("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "abuserc"
    assert (
        render(
            "{% set ns = namespace(n=0, self=1) %}{% for m in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        )
        == "3"
    )
    assert (
        render("{{ documents is none }}{{ tools is none }}{{ enable_thinking }}", enable_thinking=False)
        == "TrueTrueFalse"
    )
    assert render("{{ bos_token }}{{ eos_token }}", bos_token="B") == "B</s>"
    assert render("{% if true %}\n  x\n  {% endif %}\ny") == "  x\ny", "blocks take their line with them"
    before, now, after = datetime.now(), render("{{ strftime_now('%d %b %Y') }}"), datetime.now()
    assert now in (before.strftime("%d %b %Y"), after.strftime("%d %b %Y"))


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ range(99999999) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ (messages | map(attribute='__class__') | list) }}",
    ],
)
def test_the_sandbox_holds(tmp_path: Path, attempt: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(
        ChatTemplateError, match=r"given chat template (tries what the sandbox forbids|failed) \(line 2\)"
    ):
        chat(tmp_path).render_chat(messages, chat_template="{# #}\n" + attempt)
    assert messages == [{"role": "user", "content": "x"}]


def test_template_errors_say_what_happened(tmp_path: Path) -> None:
    tokenizer = chat(
        tmp_path, "{% if messages[0].role == 'system' %}\n{{ raise_exception('No system here!') }}{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match=r"'default' of .* refuses these messages \(line 2\): No system here!"):
        tokenizer.render_chat([{"role": "system", "content": ""}])
    with pytest.raises(ChatTemplateError, match=r"failed \(line 1\): TypeError: can only concatenate str"):
        tokenizer.render_chat(HELLO, chat_template="{{ 'a' + 1 }}")
    with pytest.raises(
        ChatTemplateError, match=r"failed \(line 2\): UndefinedError: 'dict object' has no attribute 'x'"
    ):
        tokenizer.render_chat(HELLO, chat_template="\n{{ messages[0].x.y }}")
    with pytest.raises(ChatTemplateError, match=r"does not parse: .*endfor.*\(line 1\)"):
        tokenizer.render_chat(HELLO, chat_template="{% for m in messages %}")
    with pytest.raises(ChatTemplateError, match=r"no chat template named 'rag'; it has \['default'\]"):
        tokenizer.render_chat(HELLO, chat_template="rag")
    with pytest.raises(ChatTemplateError, match=r"has no chat template .*base model.*pass chat_template="):
        chat(tmp_path / "none").render_chat(HELLO)


@pytest.mark.parametrize(
    ("messages", "kind", "says"),
    [
        ("Hello", TypeError, r"messages is a str; give a list of dicts"),
        ({"role": "user", "content": "x"}, TypeError, r"messages is a dict"),
        ([], ValueError, r"messages is empty"),
        (["Hello"], TypeError, r"messages\[0\] is a str"),
        ([*HELLO, {"content": "x"}], ValueError, r"messages\[1\] has role None"),
        ([{"role": "", "content": "x"}], ValueError, r"messages\[0\] has role ''"),
        ([{"role": "user"}], ValueError, r"messages\[0\] \(role 'user'\) has no \"content\""),
        ([{"role": "user", "content": None}], ValueError, r"has no \"content\""),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"messages\[0\]\['content'\] is a list"),
        (
            [{"role": "user", "content": "x", "when": datetime.now()}],
            TypeError,
            r"messages\[0\]\['when'\] is a datetime",
        ),
    ],
)
def test_messages_are_checked(tmp_path: Path, messages: object, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        chat(tmp_path, CHATML).render_chat(messages)  # type: ignore[arg-type]


def test_tools_are_checked(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path, CHATML)
    with pytest.raises(TypeError, match=r"tools\[0\] is a builtin_function_or_method; give its JSON schema"):
        tokenizer.render_chat(HELLO, tools=[print])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"tools is a dict"):
        tokenizer.render_chat(HELLO, tools={"name": "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"flag\['k'\]\[0\] is a function"):
        tokenizer.render_chat(HELLO, flag={"k": [lambda: 1]})
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert tokenizer.render_chat(called, chat_template="{{ messages[0].content is defined }}") == "False"


def test_which_template(tmp_path: Path) -> None:
    entry = lambda *pairs: {"chat_template": [{"name": n, "template": t} for n, t in pairs]}  # noqa: E731
    several = chat(tmp_path / "list", tokenizer_config=entry(("default", "D{{ x }}"), ("tool_use", "T"), ("rag", "R")))
    assert several.render_chat(HELLO, x=1) == "D1"
    assert several.render_chat(HELLO, tools=[{"name": "f"}]) == "T"
    assert several.render_chat(HELLO, chat_template="rag") == "R"

    plain = {"chat_template": "C"}
    assert chat(tmp_path / "config", tokenizer_config=plain).render_chat(HELLO) == "C"
    assert chat(tmp_path / "jinja", "J", tokenizer_config=plain).render_chat(HELLO) == "J"
    folder = write_folder(tmp_path / "processor", BACKENDS["gemma"], tokenizer_config={})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    assert Tokenizer.from_folder(folder).render_chat(HELLO) == "P"
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    assert Tokenizer.from_folder(folder).render_chat(HELLO) == "C"

    folder = write_folder(tmp_path / "more", BACKENDS["gemma"], chat_template="J")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    assert Tokenizer.from_folder(folder).render_chat(HELLO, tools=[]) == "A"
    assert Tokenizer.from_folder(folder).render_chat(HELLO) == "J"
