"""Writes tests/golden: tiny random checkpoints of every model family, with the logits and greedy tokens transformers gives.

The idea: the oracle of the model tests is another implementation, run once, whose answers are kept beside the very
folder it read. So the tests need neither torch nor transformers, and read real Hugging Face folders.

A random model is a poor witness unless it is made one: with weights as small as a fresh initialisation, attention is
uniform and a wrong rope or mask is invisible; with norm weights of one and biases of zero, a forgotten one is. So every
parameter is drawn at random, and a draw is kept only if

- the logits are of order one, and attention is neither uniform nor a single key;
- each greedy choice leads by MIN_MARGIN, so that "the same tokens" is a fair demand of another implementation;
- neutralising any one parameter (zero, or the identity for a norm) moves the logits;
- changing any config field named in `seen` (rope base, window +-1, soft-cap, epsilon, ...) moves the logits.

The trade-off: models of some 60,000 weights, so the goldens test arithmetic and names, not scale.

Needs torch and transformers (the `oracle` extra). On one machine with one set of versions, a rerun gives the same
bytes: weights come from numpy's PCG64 seeded by the case's name, torch runs on one thread.

B batch, T tokens of the longest prompt, V vocab, D model, N query heads, K kv heads, H head dim.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

NEW_TOKENS = 16
MIN_MARGIN = 5e-3  # float32 rounding moves these logits by about 1e-6; the tests demand 1e-3 at least
MIN_PARAMETER_EFFECT = 1e-2  # how far a forgotten parameter must move some logit
MIN_FIELD_EFFECT = 3e-4  # how far a misread config field must: the two forms of gelu differ by little
MIN_DISTINCT = 5  # of the 16 greedy tokens: a model that repeats itself tests nothing after the first step
MAX_DRAWS = 400

# No token is special: greedy decoding must not stop early, in transformers or in a reader of config.json.
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# The epsilon is far larger than any real model's, so that reading the wrong one shows.
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    **NO_SPECIAL,
}
EPS = {"rms_norm_eps": 1e-6}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
PHI3 = {**LLAMA, "vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
del PHI3["head_dim"]  # phi3 has none: H = D / N
PHI3_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.6, 2.0],
    "long_factor": [1.5, 1.9, 2.6, 3.4, 5.0, 8.0],
}
GEMMA = {
    **LLAMA,
    "vocab_size": 103,
    "query_pre_attn_scalar": 9,
    "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
OPT = {
    "vocab_size": 109,
    "hidden_size": 52,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 52,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    **NO_SPECIAL,
}


def rope(parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A `rope_parameters` override: `parameters` with some fields changed."""
    return {"rope_parameters": {**parameters, **changes}}


def windows(size: int) -> tuple[dict[str, int], ...]:
    """The three misreadings of a sliding window: one short, one long, none at all."""
    return ({"sliding_window": size - 1}, {"sliding_window": size + 1}, {"sliding_window": 64})


@dataclass(frozen=True)
class Case:
    """One golden folder: a config, how the file is stored, and the changed config fields which must be visible."""

    model_type: str
    options: dict[str, Any]
    seen: tuple[dict[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 11, 17)
    max_shard_size: str = "5GB"
    legacy: bool = False  # config.json as transformers 4 wrote it


CASES: dict[str, Case] = {
    "gemma2": Case(
        "gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "intermediate_size": 64,
            "attn_logit_softcapping": 2.5,
            "final_logit_softcapping": 3.0,
        },
        (
            *windows(8),
            EPS,
            THETA,
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"hidden_activation": "gelu"},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ),
    ),
    "llama": Case("llama", LLAMA, (EPS, THETA)),
    "gemma3_text": Case(
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 8,
            "head_dim": 8,
            "intermediate_size": 32,
            "rope_parameters": GEMMA3_ROPE,
        },
        (
            *windows(8),
            EPS,
            {"query_pre_attn_scalar": 8},
            {"hidden_activation": "gelu"},
            rope(GEMMA3_ROPE, sliding_attention={"rope_type": "default", "rope_theta": 5000.0}),
            rope(GEMMA3_ROPE, full_attention={"rope_type": "default", "rope_theta": 5000.0}),
            rope(GEMMA3_ROPE, full_attention={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
            {"layer_types": ["sliding_attention"] * 8},
            {"layer_types": (["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 3)},
        ),
    ),
    "gpt2": Case(
        "gpt2",
        {
            "vocab_size": 97,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-2,
            **NO_SPECIAL,
        },
        ({"layer_norm_epsilon": 1e-5}, {"activation_function": "gelu"}, {"scale_attn_weights": False}),
    ),
    "llama_tied_f16": Case("llama", {**LLAMA, "tie_word_embeddings": True}, (EPS, THETA), torch.float16),
    "llama3_rope": Case(
        "llama",
        {**LLAMA, "rope_parameters": LLAMA3_ROPE},
        (
            rope({"rope_type": "default", "rope_theta": 1000.0}),
            rope(LLAMA3_ROPE, factor=4.0),
            rope(LLAMA3_ROPE, low_freq_factor=2.0),
            rope(LLAMA3_ROPE, high_freq_factor=8.0),
            rope(LLAMA3_ROPE, original_max_position_embeddings=64),
        ),
    ),
    "llama_linear": Case(
        "llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
        (rope({"rope_type": "default", "rope_theta": 500.0}),),
    ),
    "llama_yarn": Case(
        "llama",
        {**LLAMA, "max_position_embeddings": 128, "rope_parameters": YARN_ROPE},
        (
            rope({"rope_type": "default", "rope_theta": 100.0}),
            rope(YARN_ROPE, attention_factor=1.0),
            rope(YARN_ROPE, beta_fast=32.0),
            rope(YARN_ROPE, beta_slow=1.0),
            rope(YARN_ROPE, factor=2.0, attention_factor=0.1 * math.log(4.0) + 1.0),
            rope(YARN_ROPE, original_max_position_embeddings=128),
        ),
    ),
    "llama_bias": Case("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}, (EPS, THETA)),
    "mistral": Case("mistral", {**LLAMA, "vocab_size": 107, "sliding_window": 8}, (*windows(8), EPS, THETA)),
    "qwen2": Case("qwen2", {**LLAMA, "hidden_size": 56, "head_dim": 14}, (EPS, THETA), torch.bfloat16),
    "qwen3": Case("qwen3", {**LLAMA, "vocab_size": 127}, (EPS, THETA)),
    "phi3": Case("phi3", {**PHI3, "rope_parameters": PHI3_ROPE, "sliding_window": 8}, (*windows(8), EPS, THETA)),
    # The original length is 20 = 5 + 15: the first row stays short in every forward, the second turns long while
    # decoding (transformers then recomputes its whole cache with the long factors), the third is long from the start.
    "phi3_longrope": Case(
        "phi3",
        {**PHI3, "rope_parameters": LONGROPE, "original_max_position_embeddings": 20},
        (
            rope(LONGROPE, short_factor=LONGROPE["long_factor"]),
            rope(LONGROPE, long_factor=LONGROPE["short_factor"]),
            rope(LONGROPE, attention_factor=1.0),
        ),
        lengths=(5, 11, 25),
    ),
    "phi3_partial": Case(
        "phi3",
        {**PHI3, "hidden_size": 64, "intermediate_size": 64, **rope(PHI3_ROPE, partial_rotary_factor=0.5)},
        (rope(PHI3_ROPE, partial_rotary_factor=1.0), rope(PHI3_ROPE, partial_rotary_factor=0.25)),
    ),
    "opt": Case("opt", OPT, ({"activation_function": "gelu"},)),
    "opt_350m_like": Case(
        "opt",
        {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        ({"activation_function": "gelu"},),
    ),
    "llama_sharded": Case("llama", LLAMA, (EPS, THETA), max_shard_size="90KB"),
    "llama_legacy_rope": Case(
        "llama",
        {**LLAMA, "rope_parameters": LLAMA3_ROPE},
        (rope({"rope_type": "default", "rope_theta": 1000.0}),),
        legacy=True,
    ),
}


class RejectedDrawError(Exception):
    """This draw of weights and ids would make a poor witness; the next one may not."""


def build(case: Case, **changes: Any) -> Any:
    options = copy.deepcopy({**case.options, **changes})  # transformers fills in the dicts it is given
    config = AutoConfig.for_model(case.model_type, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def norm_identity(case: Case) -> float:
    """The stored weight with which a norm only normalises: gemma multiplies by 1 + w."""
    return 0.0 if case.model_type.startswith("gemma") else 1.0


def draw_parameter(case: Case, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random values, float32, of a size that keeps activations of order one and makes attention choose."""
    x = rng.standard_normal(shape)
    if name.endswith("bias"):
        return 0.3 * x
    if is_norm(name):
        # with a qk-norm the attention scores are as large as these weights say, whatever the projections are
        lift = 0.4 if "q_norm" in name or "k_norm" in name else 0.0
        if case.model_type.startswith("gemma") and ".post_" in name:
            lift = (
                0.8  # the layers must outweigh the embedding in the residual, or the tied head repeats the last token
            )
        return norm_identity(case) + lift + 0.25 * x
    if name.endswith(("wpe.weight", "embed_positions.weight")):
        return 0.5 * x
    if name.endswith(("embed_tokens.weight", "wte.weight")):
        # a tied embedding is also the head, where D products are summed; gemma scales it up by sqrt(D) on the way in
        return x / math.sqrt(shape[1])
    fan_in = shape[0] if case.model_type == "gpt2" else shape[1]  # GPT-2 stores [in, out]
    x = x / math.sqrt(fan_in)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        x = x * 1.6
    elif name.endswith("qkv_proj.weight"):
        x[: 3 * shape[0] // 4] *= 1.6  # N = 2 K: the first three quarters are q and k
    elif name.endswith("c_attn.weight"):
        x[:, : 2 * shape[1] // 3] *= 1.6
    return x


def stored_parameters(case: Case, rng: np.random.Generator) -> Any:
    """The model with every parameter drawn, in the dtype of the file."""
    model = build(case)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = draw_parameter(case, name, tuple(parameter.shape), rng)
            parameter.copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return model.to(case.dtype)


def write_legacy_config(folder: Path) -> None:
    """Rewrites config.json as transformers 4 had it: rope_theta and rope_scaling at the top, torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def prompts(case: Case, ids_BT: np.ndarray) -> Iterator[torch.Tensor]:
    for row, length in enumerate(case.lengths):
        yield torch.from_numpy(ids_BT[row : row + 1, :length].astype(np.int64))


def logits_of(model: Any, ids_1T: torch.Tensor) -> np.ndarray:
    """[T, V] float32: every position's logits, without a cache."""
    with torch.no_grad():
        return model(ids_1T, use_cache=False).logits[0].numpy()


def check_attention(model: Any, ids_1T: torch.Tensor) -> None:
    """Refuses attention near uniform or near one-hot: mean entropy over queries, relative to that of the visible keys."""
    with torch.no_grad():
        maps = model(ids_1T, use_cache=False, output_attentions=True).attentions
    for layer, p in enumerate(maps):
        p = p[0].double()  # [N, T, T]
        visible = (p > 0).sum(-1)
        entropy = -(p * torch.log(torch.where(p > 0, p, 1.0))).sum(-1)
        relative = (entropy / torch.log(visible.double()))[visible >= 4].mean().item()
        if not 0.3 < relative < 0.93:
            raise RejectedDrawError(f"attention entropy of layer {layer} is {relative:.2f} of uniform")


def answers(case: Case, model: Any, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """What golden.npz holds, or RejectedDrawError."""
    arrays: dict[str, np.ndarray] = {"ids": ids_BT, "lengths": np.asarray(case.lengths, np.int32)}
    for row, ids_1T in enumerate(prompts(case, ids_BT)):
        logits_TV = logits_of(model, ids_1T)
        if not 0.4 < logits_TV.std() < 2.5:
            raise RejectedDrawError(f"logits of row {row} have standard deviation {logits_TV.std():.2f}")
        with torch.no_grad():
            out = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        generated = out.sequences[0, ids_1T.shape[1] :]
        step_logits = torch.cat(out.logits).float()  # [16, V]
        best = step_logits.topk(2).values
        if (margin := (best[:, 0] - best[:, 1]).min().item()) < MIN_MARGIN:
            raise RejectedDrawError(f"row {row} has a greedy margin of {margin:.1e}")
        if len(set(generated.tolist())) < MIN_DISTINCT:
            raise RejectedDrawError(f"row {row} repeats itself: {generated.tolist()}")
        if not torch.equal(step_logits.argmax(-1), generated):
            raise RuntimeError(f"row {row}: generate() did not take the largest logit")
        # decoding with a cache must say what a forward over the whole prefix says, or one of the two is no oracle
        for step in range(NEW_TOKENS):
            whole = logits_of(model, torch.cat([ids_1T, generated[None, :step]], 1))[-1]
            if (error := np.abs(whole - step_logits[step].numpy()).max()) > 5e-5:
                raise RuntimeError(f"row {row}, step {step}: the cached logits differ from the uncached by {error:.1e}")
        arrays[f"logits_{row}"] = logits_TV
        arrays[f"generated_{row}"] = generated.numpy().astype(np.int32)
        arrays[f"step_logits_{row}"] = step_logits.numpy()
    return arrays


def check_every_parameter_is_seen(case: Case, model: Any, arrays: dict[str, np.ndarray]) -> None:
    """Neutralises one parameter at a time; some logit of some row must move by MIN_PARAMETER_EFFECT."""
    positional = case.model_type in ("gpt2", "opt")
    for name, parameter in sorted(model.named_parameters()):
        if positional and name.endswith("k_proj.bias"):
            continue  # without rope a key bias adds one constant to all of a query's scores: softmax drops it
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(norm_identity(case) if is_norm(name) and name.endswith("weight") else 0.0)
            effect = largest_change(case, model, arrays)
            parameter.copy_(kept)
        if effect < MIN_PARAMETER_EFFECT:
            raise RejectedDrawError(f"without {name} the logits move by {effect:.1e} only")


def check_every_field_is_seen(case: Case, model: Any, arrays: dict[str, np.ndarray]) -> None:
    """Misreads the config in each way listed; some logit of some row must move by MIN_FIELD_EFFECT."""
    for changes in case.seen:
        misread = build(case, **changes)
        misread.load_state_dict(model.state_dict())
        if (effect := largest_change(case, misread, arrays)) < MIN_FIELD_EFFECT:
            raise RejectedDrawError(f"with {changes} the logits move by {effect:.1e} only")


def largest_change(case: Case, model: Any, arrays: dict[str, np.ndarray]) -> float:
    rows = enumerate(prompts(case, arrays["ids"]))
    return max(float(np.abs(logits_of(model, ids) - arrays[f"logits_{row}"]).max()) for row, ids in rows)


def write_draw(name: str, case: Case, draw: int, folder: Path) -> None:
    """Fills `folder` with one draw of the case, or raises RejectedDrawError."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), draw])
    ids_BT = np.zeros((len(case.lengths), max(case.lengths)), np.int32)
    for row, length in enumerate(case.lengths):
        ids_BT[row, :length] = rng.integers(0, case.options["vocab_size"], length)
    stored_parameters(case, rng).save_pretrained(folder, max_shard_size=case.max_shard_size)
    # the oracle reads the folder as the tests will: rounded weights, rewritten config and all
    before = logits_of(load(folder), next(prompts(case, ids_BT)))
    if case.legacy:
        write_legacy_config(folder)
    model = load(folder)
    if not np.array_equal(before, logits_of(model, next(prompts(case, ids_BT)))):
        raise RuntimeError(f"{name}: the rewritten config.json means something else than the one transformers wrote")
    arrays = answers(case, model, ids_BT)
    for ids_1T in prompts(case, ids_BT):
        check_attention(model, ids_1T)
    check_every_field_is_seen(case, model, arrays)
    check_every_parameter_is_seen(case, model, arrays)
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def write_case(name: str, out: Path) -> int:
    """Writes the folder out/name whole or not at all; returns the number of the draw that was kept."""
    reasons: list[str] = []
    for draw in range(MAX_DRAWS):
        partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
        partial.chmod(0o755)
        try:
            write_draw(name, CASES[name], draw, partial)
        except RejectedDrawError as reason:
            reasons.append(str(reason))
            shutil.rmtree(partial)
            continue
        except BaseException:
            shutil.rmtree(partial)
            raise
        target = out / name
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
            os.replace(target, old / name)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
        return draw
    raise SystemExit(f"{name}: none of {MAX_DRAWS} draws is a good witness; the last reasons: {reasons[-5:]}")


def record_versions(out: Path, name: str, draw: int) -> None:
    """Notes in VERSIONS.json what made this case; the other cases' entries stay."""
    path = out / "VERSIONS.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    record["command"] = "python scripts/make_goldens.py --out tests/golden"
    record["cases"][name] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "draw": draw,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden checkpoints and transformers' answers to them.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="folder of the cases (tests/golden)")
    parser.add_argument(
        "--only", action="append", metavar="CASE", help=f"one case; may be repeated: {', '.join(CASES)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace cases that are there already")
    options = parser.parse_args()
    names = options.only or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case is called {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if not options.overwrite and (present := [name for name in names if (options.out / name).exists()]):
        parser.error(f"{options.out} already holds {', '.join(present)}; pass --overwrite to replace, or another --out")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # one order of summation
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        draw = write_case(name, options.out)
        record_versions(options.out, name, draw)
        size = sum(path.stat().st_size for path in (options.out / name).iterdir())
        print(f"{name}: draw {draw}, {size / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
