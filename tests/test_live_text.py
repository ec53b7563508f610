"""jaxengine.text against transformers on the same folders: chat templates, ids, special tokens, decoding, streaming.

The templates are written here in the manner of the families' own (ChatML with a default system prompt, Llama 3's
headers with a date, Mistral's alternation and tool lists, thinking blocks), with the same jinja means.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402

from jaxengine.text import ChatTemplateError, Detokenizer, Tokenizer  # noqa: E402

pytestmark = pytest.mark.oracle

CORPUS = [
    "You are a helpful assistant. The user asks what the weather is like in Paris today; naïve café €5 中文 😀.",
    "def weather(city: str) -> dict:\n    return {'temperature': 21, 'unit': 'celsius'}\n",
    "system user assistant tool function name description parameters type object properties",
] * 3
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|start_header|>",
    "<|end_header|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(MARKS)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    return backend


def llama_2() -> Backend:
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(
        {letter for text in CORPUS for letter in text.replace(" ", "▁") if letter.isascii() or letter == "▁"}
    )
    pieces += [*letters, "g", "▁a", "er", "th", "▁th", "▁the", "in", "ing"]
    merges = [("▁", "a"), ("e", "r"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n"), ("in", "g")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


KINDS = {"byte level": byte_level(), "llama 2": llama_2()}
NAMES = {
    "byte level": {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|eot|>"},
    "llama 2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None},
}


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


def both(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TEMPLATES = {
    "chatml": """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "chatml with tools": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, tool=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.tool and message.role == 'tool' %}{% set ns.tool = true %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson(indent=2)) ~ '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ ('!' if loop.index0 == ns.last) ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}
""",
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%Y') if strftime_now is defined else '2024' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header|>system<|end_header|>\\n\\nToday: ' + date_string + '\\n\\n' + system + '<|eot|>' }}
{%- if documents %}{{ documents[0].title }}{% endif %}
{% for message in messages %}
  {{ '<|start_header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'].strip() + eos_token }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header|>assistant<|end_header|>\\n\\n' }}
{%- endif -%}
""",
    "inst": """{%- macro turn(text) %}[INST] {{ text }} [/INST]{% endmacro %}
{{- bos_token }}
{%- for message in messages if message.role not in ['system', 'tool'] %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message.role == 'user' %}{{ turn(message.content) }}
{%- else %}
{%- generation %}{% set x = 'inner' %} {{ message.content }}{{ eos_token }}{% endgeneration %}{{ x }}
{%- endif %}
{%- if loop.index > 6 %}{% break %}{% endif %}
{%- endfor %}

""",
    "plain": "{% for m in messages %}\n{{ loop.index }}. {{ m.role | upper }}: {{ m.content }}\n{% endfor %}\n"
    "{{ {'z': messages, 'é': [1.5, none, true]} | tojson(ensure_ascii=true, sort_keys=true) }}\n"
    "{{ dict(a=1) }}{{ unk_token | default('no unk') }}{{ pad_token }}",
}

USER = {"role": "user", "content": " What's the weather like in <Paris> & naïve 中文 😀?\n"}
TURNS = [USER, {"role": "assistant", "content": "It is 21 °C."}, {"role": "user", "content": "Thanks </s><|im_end|>!"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "note": "<é>"}}}
CONVERSATIONS = {
    "one": [USER],
    "turns": TURNS,
    "system": [{"role": "system", "content": "  Be brief.  "}, *TURNS],
    "calls": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"temperature": 21}'},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "21 and sunny."},
        {"role": "user", "content": "Good."},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather, in °C & <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "date_string": "26 Jul 2024"},
    {"tools": TOOLS},
    {"documents": [{"title": "T", "text": "x"}]},
    {"bos_token": "<|begin|>"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(tmp_path: Path, kind: str, template: str) -> None:
    ours, theirs = both(
        write_folder(tmp_path, KINDS[kind], tokenizer_config=NAMES[kind], chat_template=TEMPLATES[template])
    )
    rendered = 0
    for messages in CONVERSATIONS.values():
        for variables in VARIABLES:
            for prompt in (True, False):
                say = {"add_generation_prompt": prompt, **variables}
                try:
                    want = theirs.apply_chat_template(messages, tokenize=False, **say)
                except Exception as error:
                    # What their template refuses, ours refuses with the same words.
                    with pytest.raises(ChatTemplateError, match=re.escape(str(error))):
                        ours.render_chat(messages, **say)
                    continue
                rendered += 1
                assert ours.render_chat(messages, **say) == want
                ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **say)
                assert ours.encode_chat(messages, **say) == ids
    assert rendered >= 20


def test_several_templates(tmp_path: Path) -> None:
    entries = [
        {"name": "default", "template": "D{{ bos_token }}"},
        {"name": "tool_use", "template": "T{{ tools | tojson }}"},
    ]
    config = {**NAMES["llama 2"], "chat_template": entries}
    folder = write_folder(tmp_path, KINDS["llama 2"], tokenizer_config=config)
    cases: list[dict[str, Any]] = [
        {},
        {"tools": TOOLS},
        {"tools": []},
        {"chat_template": "tool_use"},
        {"chat_template": "{{ 1 }}"},
    ]
    for _ in range(2):
        ours, theirs = both(folder)
        for variables in cases:
            assert ours.render_chat([USER], **variables) == theirs.apply_chat_template(
                [USER], tokenize=False, **variables
            )
        # Once more with files, of which additional_chat_templates alone sets the entries of the config aside.
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("F")
        (folder / "chat_template.jinja").write_text("\n{{ 'J' }}\n\n")


TEXTS = [
    "",
    " the cat",
    "The  weather\n in 中文 😀 is naïve",
    "<s>a</s> <|im_end|>  x<|eot|>  \n",
    "ther ing\ufffd\x00",
    "mark  <m>  y",
]


def agree(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name, token in theirs.special_tokens_map.items():
        assert ours.special_tokens[name] == token


MARK = {"content": "<m>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}


def settings(size: int, eos: str, eos_id: int) -> dict[str, dict[str, dict[str, Any]]]:
    """case -> files, for a tokenizer of `size` ids."""
    flagged = {**MARK, "content": eos, "lstrip": True, "special": True}
    return {
        "named": {},
        # transformers 5 reads neither of the two where there is a tokenizer.json: its post-processor decides.
        "no bos": {"tokenizer_config": {"add_bos_token": False, "add_eos_token": True}},
        "a new token": {"tokenizer_config": {"added_tokens_decoder": {str(size): {**MARK, "rstrip": True}}}},
        "a known token gets flags": {"tokenizer_config": {"added_tokens_decoder": {str(eos_id): flagged}}},
        "extra list": {"tokenizer_config": {"extra_special_tokens": ["er", "a"]}},
        "older extra list": {"tokenizer_config": {"additional_special_tokens": ["in"]}},
        "extra object": {"tokenizer_config": {"extra_special_tokens": {"image_token": "in"}}},
        "split": {"tokenizer_config": {"split_special_tokens": True}},
        "special_tokens_map": {
            "special_tokens_map": {"eos_token": {**MARK, "content": "in", "lstrip": True}, "cls_token": "er"}
        },
        "special_tokens_map unread": {
            "tokenizer_config": {"added_tokens_decoder": {}},
            "special_tokens_map": {"eos_token": "in"},
        },
        "added_tokens": {"added_tokens": {"<m>": size}},
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", settings(0, "", 0))
def test_settings(tmp_path: Path, kind: str, case: str) -> None:
    backend, eos = KINDS[kind], str(NAMES[kind]["eos_token"])
    eos_id = backend.token_to_id(eos)
    assert eos_id is not None
    files = settings(backend.get_vocab_size(), eos, eos_id)[case]
    files["tokenizer_config"] = {**NAMES[kind], **files.get("tokenizer_config", {})}
    ours, theirs = both(write_folder(tmp_path, backend, **files))
    agree(ours, theirs)
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("case", ["gpt2", "gpt2 with settings", "opt", "added tokens", "eos"])
def test_vocab_and_merges(tmp_path: Path, case: str) -> None:
    (tmp_path / "trained").mkdir()
    model = KINDS["byte level"].model
    model.save(str(tmp_path / "trained"))
    vocab = json.loads((tmp_path / "trained" / "vocab.json").read_text(encoding="utf-8"))
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(("<|endoftext|>", "</s>", "<pad>"))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((tmp_path / "trained" / "merges.txt").read_bytes())
    end = {
        "content": "</s>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "__type": "AddedToken",
    }
    opt = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": {**end, "content": "<pad>"}}
    config, entries = {
        "gpt2": ("gpt2", {}),
        "gpt2 with settings": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        "opt": ("opt", {**opt, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}),
        "added tokens": ("gpt2", {"added_tokens_decoder": {str(len(vocab)): MARK}}),
        "eos": ("opt", {**opt, "add_bos_token": True, "add_eos_token": True}),
    }[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2Tokenizer"
    agree(ours, theirs)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (
        theirs.bos_token_id,
        (theirs.eos_token_id,),
        theirs.pad_token_id,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_streams(tmp_path: Path, kind: str, skip: bool) -> None:
    ours, theirs = both(write_folder(tmp_path, KINDS[kind], tokenizer_config=NAMES[kind]))
    ids = theirs.encode("The naïve user asks:\n中文 😀😀 what's the weather</s><|im_end|> \n  in Paris €5")
    streamer = transformers.TextIteratorStreamer(theirs, skip_special_tokens=skip)
    detokenizer = Detokenizer(ours, skip_special_tokens=skip)
    got = ""
    for index in ids:
        streamer.put(torch.tensor([index]))
        got += detokenizer.push(index)
    streamer.end()
    got += detokenizer.flush()
    whole = theirs.decode(ids, skip_special_tokens=skip)
    assert got == whole
    if kind == "byte level":
        # (Theirs forgets its ids at a line's end, and so loses a SentencePiece line's first space.)
        assert "".join(streamer) == whole


def test_an_added_token_keeps_its_flags_when_it_is_named(tmp_path: Path) -> None:
    """Phi-3 and others: the token that ends a turn takes the white space after it, as tokenizer.json says."""
    backend = llama_2()
    backend.add_tokens([AddedToken("<m>", rstrip=True, special=False)])
    ours, theirs = both(write_folder(tmp_path, backend, tokenizer_config={**NAMES["llama 2"], "eos_token": "<m>"}))
    agree(ours, theirs)
    assert ours.decode(ours.encode("x<m>  y")) == theirs.decode(theirs.encode("x<m>  y"), skip_special_tokens=True)
