"""Reading config.json: Hugging Face's field names, and a refusal for every field that would change the arithmetic.

A family's Config is a frozen dataclass whose fields are the ones its arithmetic needs. What else stands in config.json
is one of three things: bookkeeping that changes no number (ignored, listed here), a field that is only supported at one
value (`only`), or something this family does not know (refused by name, unless it is empty or false).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

C = TypeVar("C")

# Training-time settings, ids that the tokenizer and generation settings own, versions, and switches of other programs.
BOOKKEEPING = frozenset(
    """_name_or_path _attn_implementation_autoset architectures attention_dropout attn_implementation auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size cache_implementation decoder_start_token_id dropout dtype early_stopping embd_pdrop
    attn_pdrop resid_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout_prob id2label init_std
    initializer_range label2id layerdrop length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_past output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    _sliding_window_pattern""".split()
)


class ConfigError(ValueError):
    """config.json asks for something that is not done here, or lacks something that is needed."""


def read_fields(
    cls: type[C],
    raw: Mapping[str, Any],
    *,
    only: Mapping[str, Sequence[Any]] | None = None,
    also: Mapping[str, Any] | None = None,
    used: Sequence[str] = (),
) -> C:
    """Make the dataclass `cls` from config.json's fields.

    only: fields supported at the listed values alone; also: values worked out by the family, in place of the file's;
    used: fields that the family has read itself. Raises ConfigError naming the field, its value and what works.
    """
    # transformers sees both ways where it is false; absent, it is true
    only, also = {"is_causal": (True, None), **(only or {})}, also or {}
    wanted = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name, allowed in only.items():
        if name in raw and raw[name] not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise ConfigError(
                f"config.json: {name} is {raw[name]!r}; {raw.get('model_type')} is supported with {choices}"
            )
    known = BOOKKEEPING | set(wanted) | set(only) | set(also) | set(used)
    for name, given in raw.items():
        if name not in known and given not in (None, False, [], {}, ""):
            raise ConfigError(
                f"config.json: {name} = {given!r} is not known for model_type {raw.get('model_type')!r}, so its effect on the"
                f" numbers cannot be honoured. If it has none, take it out of config.json. Known: {', '.join(sorted(wanted))}"
            )
    values = {name: raw[name] for name in wanted if raw.get(name) is not None} | dict(also)
    missing = [
        name
        for name, f in wanted.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}, which model_type {raw.get('model_type')!r} needs")
    return cls(**values)


def rope_fields(raw: Mapping[str, Any], *, theta: float = 10000.0, partial: bool = False) -> dict[str, Any]:
    """The rope parameters as one mapping, from either spelling.

    transformers >= 5 writes `rope_parameters`; before, `rope_theta`, `partial_rotary_factor` and `rope_scaling` stood
    apart, with `type` for rope_type. `theta` is the family's default base; `partial` families rotate a part of each
    head where `partial_rotary_factor` says so, and ConfigError refuses it in the others.
    """
    merged: dict[str, Any] = {"rope_theta": raw.get("rope_theta") or theta}
    if raw.get("partial_rotary_factor") is not None:
        merged["partial_rotary_factor"] = raw["partial_rotary_factor"]
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {given!r}; it must be a mapping with rope_type")
    merged.update({k: v for k, v in given.items() if v is not None})
    if not partial and merged.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {merged['partial_rotary_factor']!r}; model_type"
            f" {raw.get('model_type')!r} rotates whole heads, 1.0"
        )
    if nested := [k for k, v in merged.items() if isinstance(v, Mapping)]:
        raise ConfigError(
            f"config.json: rope_parameters has its own parameters for {', '.join(nested)}; model_type"
            f" {raw.get('model_type')!r} has one rope for all layers"
        )
    merged["rope_type"] = merged.pop("rope_type", merged.pop("type", "default"))
    original = raw.get("original_max_position_embeddings")
    if original and merged["rope_type"] in ("llama3", "longrope", "su", "yarn"):
        merged["original_max_position_embeddings"] = original  # the outer one goes first, as in transformers
    return merged


ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


SLIDING, FULL = "sliding_attention", "full_attention"  # the entries of layer_types


def sliding_window(raw: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window`, where an explicit null means none and only an absent one is `default`."""
    window = raw.get("sliding_window", default)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigError(
            f"config.json: sliding_window is {window!r}; it must be a number of tokens, at least 1, or null"
        )
    return window


def layer_types(raw: Mapping[str, Any], window: int | None, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, one of SLIDING and FULL for each layer; `default` where it is absent or null.

    Raises ConfigError for another entry, another number of layers, or a sliding layer where `window` is None.
    """
    given, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    types = tuple(default if given is None else given)
    if given is not None and len(types) != layers:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries; num_hidden_layers is {layers!r}")
    for i, entry in enumerate(types):
        if entry not in (SLIDING, FULL):
            raise ConfigError(f"config.json: layer_types[{i}] is {entry!r}; there are {SLIDING!r} and {FULL!r}")
        if entry == SLIDING and window is None:
            raise ConfigError(
                f"config.json: layer_types[{i}] is {SLIDING!r}, and no sliding_window is in use; give one (and"
                f" use_sliding_window true, where the family has that), or make the layer {FULL!r}"
            )
    return types


def freeze(x: Any) -> Any:
    """Lists and mappings as nested tuples, so that a Config hashes."""
    if isinstance(x, Mapping):
        return tuple(sorted((k, freeze(v)) for k, v in x.items()))
    if isinstance(x, list | tuple):
        return tuple(freeze(v) for v in x)
    return x
