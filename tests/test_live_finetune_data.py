"""What of a conversation is learned, against transformers' own assistant mask for templates with {% generation %} marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from jaxengine.finetune.data import Rows  # noqa: E402
from jaxengine.text import Tokenizer  # noqa: E402

pytestmark = pytest.mark.oracle

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATES = {
    "lines": """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
<|assistant|>
{% generation %}
{{ message.content }}{{ eos_token }}
{% endgeneration %}
{%- else %}
<|user|>
{{ message.content | trim }}
{%- endif %}
{%- endfor %}
""",
    "tight": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}",
    "macro": """{%- macro turn(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        assistant: {%+ generation -%} {{ m.content }}. {%- set a = 1 %}
        {%- endgeneration %} ;
    {%- else -%} {{ turn(m) }} ;
    {%- endif -%}
{%- endfor -%}""",
}
CONVERSATIONS = [
    [
        ("user", "Hi there"),
        ("assistant", "Hello, world!"),
        ("user", "Hello, world!"),
        ("assistant", " 21 °C 😀 中文\n\n"),
    ],
    [("assistant", "first"), ("user", "then"), ("assistant", "last ")],
    [("system", "Be brief."), ("user", "a\nassistant: b"), ("assistant", "c"), ("assistant", "d")],
]
TEXT = ["hello world, the assistant: says hi there to the user; then last first 21 C brief\n\n a b c d"] * 20


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def byte_fallback() -> Backend:
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    merges = [tuple(m) for m in model["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(SPECIAL)
    return backend


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistant_mask(tmp_path: Path, make: Any, template: str) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATES[template]}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rows = Rows(Tokenizer.from_folder(tmp_path))
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = rows.document({"messages": messages})
        assert ids.tolist() == want["input_ids"]
        mask = [bool(m) for m in want["assistant_masks"]]
        # theirs ends at the first token of the last character, which may be spelt in several
        text = theirs.apply_chat_template(messages, tokenize=False)
        offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for i in range(1, len(mask)):
            mask[i] |= mask[i - 1] and offsets[i] == offsets[i - 1]
        assert 0 < sum(mask) < len(mask)
        assert list(learned) == mask
