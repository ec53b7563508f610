"""Text in and out of a Hugging Face folder: encode, chat templates, decoding a stream, stop strings.

The byte-pair merging itself is the Rust library `tokenizers`; this file reads what lies around it (which token ends a
text, which template turns a conversation into a prompt) and answers as transformers 5 does for the same folder.

**Chat templates are programs from strangers.** They run in jinja2's immutable sandbox, on plain copies of the caller's
data (strings, numbers, lists, dicts): a template can neither change a message nor meet an object with methods.

**A stream is decoded exactly.** The usual recipe decodes a window of ids twice for every token and holds text back
while it ends in U+FFFD. It is wrong where U+FFFD is the text, and where a later token changes an earlier one:
byte-fallback decoders (Llama 2, Gemma) turn a whole run of byte tokens into U+FFFD if any part of it is not UTF-8. Here
the decoder of tokenizer.json, a chain of steps from list of strings to list of strings, is run as a chain of streaming
steps, each of which lets go of a piece once no later token can change it. Concatenating the pieces is `decode` of all
ids, for every sequence of ids, at O(1) work a token. The price: text spelt in byte-fallback tokens appears when its
run ends (at the next ordinary token, often a space), and a decoder with a step of unknown kind appears at the flush.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, Protocol, final

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes
    import jinja2.parser
    import tokenizers
    import tokenizers.decoders

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# The classes and model types whose vocab.json + merges.txt mean plain GPT-2 byte-level BPE; others (Qwen2, CLIP, ...)
# split text by rules that these two files do not hold.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_MODEL_TYPES = ("gpt2", "opt", "gpt_neo", "gptj")


class ChatTemplateError(ValueError):
    """A chat template is missing, does not parse, refuses the messages, or tries what the sandbox forbids."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading the folder
# ---------------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); fetch it again.") from error
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` in {path.parent}.")
    return text


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error.msg}, line {error.lineno} column {error.colno}); fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must be an object with named entries.")
    return value


def _conversion(folder: Path) -> str:
    return (
        "Make a tokenizer.json once, where transformers is installed: "
        f'`python -c "from transformers import AutoTokenizer; f={str(folder)!r}; '
        'AutoTokenizer.from_pretrained(f).save_pretrained(f)"`.'
    )


def _backend(folder: Path, settings: Mapping[str, Any], model_type: Any) -> tuple[tokenizers.Tokenizer, Path]:
    """The library's tokenizer, and the file that says which ids there are."""
    import tokenizers

    path = folder / "tokenizer.json"
    if path.is_file():
        text = _read_text(path)
        try:
            return tokenizers.Tokenizer.from_str(text), path
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read ({error}); fetch the "
                "file again, or upgrade tokenizers if the file was written by a newer one."
            ) from error
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        named = settings.get("tokenizer_class")
        if not (named in GPT2_CLASSES or (named is None and model_type in GPT2_MODEL_TYPES)):
            raise ValueError(
                f"{folder} has vocab.json and merges.txt but no tokenizer.json, and its tokenizer class is {named!r} "
                f"(model type {model_type!r}). These two files say how to split text only for {GPT2_CLASSES[0]}. "
                + _conversion(folder)
            )
        return _gpt2_backend(vocab, merges, bool(settings.get("add_prefix_space", False))), vocab
    for pattern in ("*.model", "*.tiktoken", "tekken.json"):
        found = sorted(folder.glob(pattern))
        if found:
            raise ValueError(
                f"{folder} has {found[0].name} but no tokenizer.json, and only tokenizer.json is read here. "
                + _conversion(folder)
            )
    raise FileNotFoundError(
        f"{folder} has no tokenizer: there is no tokenizer.json, and no vocab.json with merges.txt. Copy "
        "tokenizer.json and tokenizer_config.json from the checkpoint that this model comes from."
    )


def _gpt2_backend(vocab: Path, merges: Path, add_prefix_space: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    _read_object(vocab)  # names the file in its error; the library's own says only "BPE files"
    _read_text(merges)
    try:
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocab} and {merges} do not fit together ({error}); fetch both again.") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _content(token: Any, where: str) -> str:
    """A token as the folder's files write it: a string, or an object with its flags."""
    value = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {token!r}; a token is a string, or an object with a string `content`.")
    return value


def _added(token: Any, where: str, special: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    content = _content(token, where)
    flags = token if isinstance(token, Mapping) else {}
    special = special or bool(flags.get("special", False))
    return AddedToken(
        content,
        special=special,
        normalized=bool(flags.get("normalized", not special)),
        **{key: bool(flags.get(key, False)) for key in ("lstrip", "rstrip", "single_word")},
    )


def _special_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, over it the older special_tokens_map.json where the former does not list added tokens."""
    if "added_tokens_decoder" in settings:
        return dict(settings)
    return {**settings, **_read_object(folder / "special_tokens_map.json")}


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], source: Path) -> None:
    """Tokens that tokenizer_config.json (or the older added_tokens.json) lists, each of which must get its own id."""
    if "added_tokens_decoder" in settings:
        path = folder / "tokenizer_config.json"
        listed = settings["added_tokens_decoder"]
    else:
        path = folder / "added_tokens.json"
        listed = {index: token for token, index in _read_object(path).items()}
    if not isinstance(listed, Mapping) or not all(str(index).isdecimal() for index in listed):
        raise ValueError(f"{path}: the added tokens must map ids to tokens, and some id is not a number.")
    for index, token in sorted((int(index), token) for index, token in listed.items()):
        known = backend.token_to_id(_content(token, f"{path}, added token {index}"))
        if known is None or isinstance(token, Mapping):  # a bare string has no flags to set on a known token
            backend.add_tokens([_added(token, f"{path}, added token {index}", special=False)])
        found = backend.token_to_id(_content(token, path.name))
        if found != index:
            raise ValueError(
                f"{path} gives the added token {_content(token, path.name)!r} id {index}, but after {source.name} it "
                f"is {found}: the two files are from different versions of this tokenizer. Fetch both again."
            )


def _special_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """name -> token of the special tokens; marks those in the vocabulary as special, which skips them in decode."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {key: settings[key] for key in NAMED_TOKENS if settings.get(key) is not None}
    # Multimodal folders name more (image_token, ...), as entries or as one object.
    named |= {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, Mapping) and "content" in value))
    }
    if isinstance(extra, Mapping):
        named, extra = named | {str(key): value for key, value in extra.items()}, []
    if not isinstance(extra, Sequence) or isinstance(extra, str):
        raise ValueError(f"{folder}: extra_special_tokens is {extra!r}; it must be a list or an object of tokens.")

    listed = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted = [(key, value) for key, value in named.items()] + [("extra_special_tokens", value) for value in extra]
    for key, value in wanted:
        token = _added(value, f"{folder}: {key}", special=True)
        if token.content in listed:
            # The flags of the file that lists the token win over those beside its name.
            token = listed[token.content]
            token.special = True
        # A token the vocabulary lacks has no row in the model's embedding: it gets no id here (see Tokenizer.bos_id).
        if backend.token_to_id(token.content) is not None:
            backend.add_special_tokens([token])
    return {key: _content(value, f"{folder}: {key}") for key, value in named.items()}


def _add_bos_eos(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """The post-processor that add_bos_token and add_eos_token ask for, in a folder without tokenizer.json."""
    from tokenizers.processors import TemplateProcessing

    pieces, ids = ["$A:0"], []
    for setting, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        token = special_tokens.get(name)
        if not settings.get(setting, False) or token is None:
            continue
        index = backend.token_to_id(token)
        if index is None:
            raise ValueError(f"tokenizer_config.json sets {setting}, but {name} {token!r} is not in the vocabulary.")
        piece = f"{token}:0"
        pieces = [piece, *pieces] if name == "bos_token" else [*pieces, piece]
        ids.append((token, index))
    if ids:
        backend.post_processor = TemplateProcessing(single=pieces, pair=[*pieces, "$B:1"], special_tokens=ids)


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """name -> chat template: the .jinja files, else tokenizer_config.json, else the processor's chat_template.json."""
    templates = {}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.name.removesuffix(".jinja")] = _read_text(path)
    if templates:
        return templates
    # chat_template.json is the multimodal processor's; transformers' tokenizers do not read it, so it comes last.
    for path, source in (
        (folder / "tokenizer_config.json", settings),
        (folder / "chat_template.json", _read_object(folder / "chat_template.json")),
    ):
        value = source.get("chat_template")
        if value is None:
            continue
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise ValueError(f"{path}: chat_template must be a string or a list of {{name, template}} of strings.")
        return dict(value)
    return {}


def _ids_of(value: Any, where: str) -> tuple[int, ...]:
    """An entry such as eos_token_id: a number, a list of numbers, or null."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"{where} is {value!r}; it must be a token id (0 or more), a list of them, or null.")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _sandbox() -> jinja2.Environment:
    """The environment of transformers' chat templates, with every use of what the sandbox forbids an error."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils
    from jinja2.exceptions import SecurityError

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
            # jinja2's own answer prints as nothing, which hides the attempt.
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the model writes, for training masks; here its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own protocol)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        # An underscored attribute on an object that the template made could pose as one of jinja2's own markers.
        def __init__(*args: Any, **entries: Any) -> None:  # a template may name an entry `self`
            self, *rest = args
            checked = dict(*rest, **entries)
            for name in checked:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, checked)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"{name!r} as a name in a namespace")

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes < > & for web pages; models were trained on these characters as they are.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.globals["namespace"] = Namespace
    return sandbox


def _plain(value: Any, where: str) -> Any:
    """A copy made of plain types only: nothing that the template meets has a method that could do harm."""
    if value is None or isinstance(value, bool):
        return value
    # A subclass (an enum, a numpy float) may carry methods of its own, so its base's conversion is called.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, f"a key of {where}"): _plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}; a chat template takes strings, numbers, lists and dicts. "
        "Give a tool as its JSON schema (a dict), an object as its dict."
    )


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked and copied, without entries that are None (templates print those as text)."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages is a {type(messages).__name__}; give a list of dicts, such as "
            '[{"role": "user", "content": "Hello"}].'
        )
    if not messages:
        raise ValueError('messages is empty; give at least one, such as {"role": "user", "content": "Hello"}.')
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f'messages[{i}] is a {type(message).__name__}; each is a dict with "role" and "content".')
        entries = {key: entry for key, entry in message.items() if entry is not None}
        role = entries.get("role")
        if not isinstance(role, str) or not role:
            raise ValueError(f'messages[{i}] has role {role!r}; it must be a string such as "user" or "assistant".')
        if "content" not in entries and not entries.get("tool_calls"):
            raise ValueError(
                f'messages[{i}] (role {role!r}) has no "content"; only a message with "tool_calls" may go without.'
            )
        if not isinstance(entries.get("content", ""), str):
            raise TypeError(
                f"messages[{i}]['content'] is a {type(entries['content']).__name__}; it must be a string "
                "(text only: join the text parts of a list, images and sound are not read)."
            )
        plain.append(_plain(entries, f"messages[{i}]"))
    return plain


def _render(template: str, name: str, variables: Mapping[str, Any]) -> str:
    import jinja2
    from jinja2.exceptions import SecurityError

    try:
        compiled = _sandbox().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"{name} does not parse: {error.message} (line {error.lineno}).") from error
    try:
        return compiled.render(variables)
    except Exception as error:  # the template is a program: it may fail in any way
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == "<template>"]
        line = f" (line {lines[-1]})" if lines else ""
        if isinstance(error, SecurityError):
            text = f"{name} tries what the sandbox forbids{line}: {error}. Do not trust this folder's template."
        elif type(error) is jinja2.TemplateError:
            text = f"{name} refuses these messages{line}: {error}"
        else:
            text = (
                f"{name} failed{line}: {type(error).__name__}: {error}. Check that the messages, the tools and the "
                "template variables have the form that this template reads."
            )
        raise ChatTemplateError(text) from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of one folder. Make it with `Tokenizer.from_folder`.

    `special_tokens` maps names to tokens ("bos_token" -> "<s>"), `chat_templates` names to jinja text, and `declared`
    holds the ids that generation_config.json or config.json give for "eos", "bos" and "pad" (() where they give none).
    """

    folder: Path
    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    declared: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json (or GPT-2's vocab.json and merges.txt) and the settings beside it.

        As in transformers 5, whether a BOS token is put before the text is said by tokenizer.json alone; the settings
        add_bos_token and add_eos_token count only in a folder that has none.

        Raises: FileNotFoundError for a missing folder or tokenizer, ValueError for a file that is not what it should
        be; each names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder. Give the local folder of a checkpoint; a model on the hub must be "
                "downloaded first."
            )
        settings = _read_object(folder / "tokenizer_config.json")
        config = _read_object(folder / "config.json")
        backend, source = _backend(folder, settings, config.get("model_type"))
        # A file may carry the padding and truncation of its training run; a prompt must come through whole.
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))

        _add_tokens(backend, folder, settings, source)
        settings = _special_settings(folder, settings)
        if source.name == "vocab.json" and backend.token_to_id("<|endoftext|>") is not None:
            for name in ("bos_token", "eos_token", "unk_token"):
                settings.setdefault(name, "<|endoftext|>")
        special_tokens = _special_tokens(backend, folder, settings)
        if source.name == "vocab.json":
            _add_bos_eos(backend, settings, special_tokens)

        text_config = config.get("text_config")  # multimodal folders keep the language model's entries there
        sources = (
            ("generation_config.json", _read_object(folder / "generation_config.json")),
            ("config.json", config),
            ("config.json, text_config", text_config if isinstance(text_config, Mapping) else {}),
        )
        declared: dict[str, tuple[int, ...]] = {}
        for name in ("eos", "bos", "pad"):
            key = f"{name}_token_id"
            found = (_ids_of(entries.get(key), f"{folder / where}: {key}") for where, entries in sources)
            declared[name] = next((ids for ids in found if ids), ())
        return cls(folder, backend, special_tokens, _read_templates(folder, settings), declared)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.folder)!r}, vocab_size={self.vocab_size}, eos_ids={self.eos_ids})"

    # -- ids ----------------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs for every id `encode` can return."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def _special(self) -> frozenset[str]:
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json's, else config.json's, else the tokenizer's eos_token."""
        if self.declared["eos"]:
            return self.declared["eos"]
        index = self._named_id("eos_token")
        return () if index is None else (index,)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text: the tokenizer's bos_token, else the one in the model's configs, else None."""
        index = self._named_id("bos_token")
        return next(iter(self.declared["bos"]), None) if index is None else index

    @property
    def pad_id(self) -> int | None:
        """The id that fills a batch: the tokenizer's pad_token, else the one in the model's configs, else None."""
        index = self._named_id("pad_token")
        return next(iter(self.declared["pad"]), None) if index is None else index

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        index = self.token_to_id(token)
        if index is None:
            raise ValueError(
                f"{self.folder} names {token!r} as {name}, but no token of its vocabulary ({self.vocab_size} ids) is "
                f"spelt so, and the model has no embedding for it. Set {name} in tokenizer_config.json to a token that "
                "exists, or fetch the tokenizer.json that has it."
            )
        return index

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary ("▁the", "<|eot_id|>"), or None."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The spelling of an id in the vocabulary. Any integer type will do. Raises ValueError for an unknown id."""
        index = operator.index(token_id)
        token = self.backend.id_to_token(index) if 0 <= index < self.vocab_size else None
        if token is None:
            raise ValueError(
                f"token id {index} has no token: the tokenizer in {self.folder} has ids 0 to {self.vocab_size - 1}"
                f"{' with gaps' if 0 <= index < self.vocab_size else ''}. An embedding may have more rows than that; "
                "do not sample from them, and check that the model and the tokenizer are from the same folder."
            )
        return token

    # -- text ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with the special tokens that tokenizer.json puts around it (often BOS) unless told not to.

        A special token spelt out in `text` becomes its id, as everywhere; never encode a stranger's words together
        with a prompt's markers without knowing that.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; encode takes one str.")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # a str that is not Unicode text cannot cross into Rust
            raise ValueError(
                "text holds half of a surrogate pair and so is not Unicode text; repair it with "
                "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids` (any iterable of integers). Raises ValueError, with the id, for an id without a token.

        Bytes that are not UTF-8 become U+FFFD. clean_up_tokenization_spaces, a repair for WordPiece, is not applied.
        """
        checked = [operator.index(index) for index in ids]
        for index in checked:
            self.id_to_token(index)
        return self.backend.decode(checked, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> str:
        """The prompt that the folder's chat template makes of a conversation.

        messages: dicts with "role" and "content", both str; other entries ("tool_calls", "name") go to the template.
        tools: JSON schemas. chat_template: the name of one of the folder's templates, or the jinja text of another;
        unsaid, "tool_use" if there are tools and the folder has one, else "default". The remaining keywords are the
        template's variables (enable_thinking=False, ...). Raises ChatTemplateError where the template does.
        """
        plain = _plain_messages(messages)
        if tools is not None:
            if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
                raise TypeError(f"tools is a {type(tools).__name__}; give a list of JSON schemas (dicts).")
            for i, tool in enumerate(tools):
                if not isinstance(tool, Mapping):
                    raise TypeError(f"tools[{i}] is a {type(tool).__name__}; give its JSON schema, a dict.")
            tools = _plain(list(tools), "tools")
        name, template = self._template(chat_template, tools is not None)
        variables = {
            **self.special_tokens,
            "documents": None,
            **{key: _plain(value, key) for key, value in template_variables.items()},
            "messages": plain,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return _render(template, name, variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """The ids of `render_chat`. The template writes the special tokens itself, so none is added."""
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            **template_variables,
        )
        return self.encode(text, add_special_tokens=False)

    def _template(self, wanted: str | None, with_tools: bool) -> tuple[str, str]:
        """(what to call it in an error, the jinja text)."""
        templates = self.chat_templates
        if wanted is None:
            if not templates:
                raise ChatTemplateError(
                    f"{self.folder} has no chat template (no chat_template.jinja, none in tokenizer_config.json), as "
                    "is usual for a base model. Encode a plain prompt instead, take the folder of the -Instruct or "
                    "-Chat model, or pass chat_template='...' with the jinja text."
                )
            wanted = "tool_use" if with_tools and "tool_use" in templates else "default"
        if wanted in templates:
            return f"the chat template {wanted!r} of {self.folder}", templates[wanted]
        if "{" in wanted:
            return "the given chat template", wanted
        raise ChatTemplateError(
            f"{self.folder} has no chat template named {wanted!r}; it has {sorted(templates) or 'none'}. Pass "
            "chat_template= with one of these names, or with the jinja text."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------


class _Step(Protocol):
    """One step of a decoder, a function from list to list, fed one piece at a time.

    `feed` returns the pieces that no later input can change, `end` the rest.
    """

    def feed(self, piece: str) -> list[str]: ...

    def end(self) -> list[str]: ...


@final
class _EachAlone:
    """Replace, Strip: every piece by itself."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self.decode = decode

    def feed(self, piece: str) -> list[str]:
        return [self.decode([piece])]

    def end(self) -> list[str]:
        return []


@final
class _FirstDiffers:
    """Metaspace, WordPiece, no decoder at all: every piece by itself, but the first one loses (or lacks) its space."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self.decode, self.first = decode, True

    def feed(self, piece: str) -> list[str]:
        if self.first:
            self.first = False
            return [self.decode([piece])]
        return [self.decode(["a", piece])[1:]]

    def end(self) -> list[str]:
        return []


@final
class _ByteFallback:
    """<0xE2> <0x82> <0xAC> is one character; a run of such tokens that is not UTF-8 is U+FFFD for each of its bytes."""

    # A sign is let through by the library's number reading, and so here.
    TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self.text: list[str] = []
        self.length, self.broken = 0, False

    def _byte(self, byte: bytes, final: bool) -> None:
        try:
            self.text.append(self.utf8.decode(byte, final))
        except UnicodeDecodeError:
            self.broken = True

    def feed(self, piece: str) -> list[str]:
        found = self.TOKEN.fullmatch(piece)
        if found is None:
            return [*self.end(), piece]
        self.length += 1
        if not self.broken:
            self._byte(bytes([int(found[1], 16)]), final=False)
        if not self.broken:
            return []
        # Nothing can mend the run: what it holds is settled, and so is every further byte.
        settled, self.length = ["\ufffd"] * self.length, 0
        return settled

    def end(self) -> list[str]:
        if self.length and not self.broken:
            self._byte(b"", final=True)
        pieces = ["\ufffd"] * self.length if self.broken else ["".join(self.text)] if self.length else []
        self._start()
        return pieces


@final
class _ByteLevel:
    """GPT-2's alphabet: every character of a piece stands for one byte; all bytes together are UTF-8."""

    def __init__(self) -> None:
        self.bytes = _byte_alphabet()
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: str) -> list[str]:
        try:
            raw = bytes(self.bytes[letter] for letter in piece)
        except KeyError:  # an added token is written as itself
            raw = piece.encode()
        text = self.utf8.decode(raw)
        return [text] if text else []

    def end(self) -> list[str]:
        text = self.utf8.decode(b"", final=True)
        return [text] if text else []


@cache
def _byte_alphabet() -> Mapping[str, int]:
    """Printable Latin-1 characters stand for their own byte; the other bytes, in order, for those from U+0100 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    own = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((letter for letter in letters if ord(letter) >= 256), others, strict=True))


@final
class _StripStart:
    """Strip after Fuse: up to `count` of one character go from the beginning of the whole text."""

    def __init__(self, character: str, count: int) -> None:
        self.character, self.count = character, count

    def feed(self, piece: str) -> list[str]:
        while self.count and piece.startswith(self.character):
            piece, self.count = piece[1:], self.count - 1
        if not piece:
            return []
        self.count = 0
        return [piece]

    def end(self) -> list[str]:
        return []


@final
class _AtTheEnd:
    """A decoder with a step not known here: exact, but all at once."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self.decode, self.pieces = decode, list[str]()

    def feed(self, piece: str) -> list[str]:
        self.pieces.append(piece)
        return []

    def end(self) -> list[str]:
        return [self.decode(self.pieces)]


def _library_step(spec: Mapping[str, Any]) -> Callable[[list[str]], str]:
    """One step of a decoder as the library's own, from its JSON."""
    from tokenizers import Tokenizer as Backend

    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    decoder = Backend.from_str(json.dumps({"version": "1.0", "model": model, "decoder": spec})).decoder
    assert decoder is not None
    return decoder.decode


def _streaming(decoder: tokenizers.decoders.Decoder | None) -> list[_Step]:
    """The decoder as streaming steps. After Fuse or ByteLevel there is one string, which comes in chunks."""
    if decoder is None:
        return [_FirstDiffers(" ".join)]
    specs, steps, fused = [json.loads(decoder.__getstate__())], list[_Step](), False
    while specs:
        spec = specs.pop(0)
        match spec["type"], fused:
            case "Sequence", _:
                specs = [*spec["decoders"], *specs]
            case "Fuse", _:
                fused = True
            case "ByteLevel", False:
                steps.append(_ByteLevel())
                fused = True
            case "ByteFallback", False:
                steps.append(_ByteFallback())
            case (("Replace" | "Strip"), False):
                steps.append(_EachAlone(_library_step(spec)))
            case (("Metaspace" | "WordPiece"), False):
                steps.append(_FirstDiffers(_library_step(spec)))
            case "Strip", True if spec["stop"] == 0:
                steps.append(_StripStart(spec["content"], spec["start"]))
            case _:
                return [_AtTheEnd(decoder.decode)]
    return steps


@final
class Detokenizer:
    """Ids in, one at a time; text out as soon as it is settled.

        detokenizer = Detokenizer(tokenizer)
        for token_id in generated:
            print(detokenizer.push(token_id), end="")
        print(detokenizer.flush())

    All that `push` and `flush` return, joined, is `tokenizer.decode` of all ids, for any ids. No half of a character is
    ever returned. `context` are ids that came before (a prompt): their text is not returned, but the text goes on from
    there, so that a continuation that begins with a space keeps it (a SentencePiece decoder takes the first space of a
    text away). `flush` ends the text; a `push` after it begins a new one, without context.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, context: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._steps = _streaming(tokenizer.backend.decoder)
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this id settles, "" if none. An id without a token raises ValueError and changes nothing."""
        token = self.tokenizer.id_to_token(token_id)
        if self.skip_special_tokens and token in self.tokenizer._special:
            return ""
        pieces = [token]
        for step in self._steps:
            pieces = [done for piece in pieces for done in step.feed(piece)]
        return "".join(pieces)

    def flush(self) -> str:
        """The text still held back; an unfinished character becomes U+FFFD, as in `decode`."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = [done for piece in pieces for done in step.feed(piece)] + step.end()
        self._steps = _streaming(self.tokenizer.backend.decoder)
        return "".join(pieces)


@final
class StopStrings:
    """Cuts a stream of text before the first of some stop strings.

    The first is the one that is complete first (of two that end together, the longer), so the cut does not depend on
    how the text was split into pushes. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        if isinstance(strings, str):
            raise TypeError(f"stop strings are a list of str, not one str; write [{strings!r}].")
        self.strings = tuple(strings)
        for i, string in enumerate(self.strings):
            if not isinstance(string, str):
                raise TypeError(f"stop string {i} is a {type(string).__name__}; it must be a str.")
            if not string:
                raise ValueError(f"stop string {i} is empty and would stop before the first character; leave it out.")
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(the text that may be shown now, whether a stop string has been found). After a stop all text is dropped."""
        if self.stopped:
            return "", True
        text = self._held + text
        found = [(at + len(string), at) for string in self.strings if (at := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max((len(string) - 1 for string in self.strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(string.startswith(end) for string in self.strings):
                return length
        return 0

    def flush(self) -> str:
        """The text held back, when no more comes: it began a stop string that was never completed."""
        held, self._held = self._held, ""
        return held
