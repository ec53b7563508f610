"""checkpoints.peft against peft itself: what it saves, we read; what we write, it loads; the logits are the same.

Everything runs in float64 on transformers' own models: on one side peft's adapter layers, on the other the base model with
its weights changed by the papers' formulas, in numpy. Rounding is then 2^-53 relative, some thousand of them, of logits of
order one: 1e-10 is generous, and any slip of name, order, scale or norm is larger than 1e-3, since every adapter is drawn
large enough to move the logits by more than 0.1.

As a program, `python tests/test_live_peft.py` writes tests/golden_adapters, for the tests that have no torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from oracles.adapters import all_adapted  # noqa: E402
from oracles.golden import GOLDEN, golden  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from checkpoints.peft import Adapter, AdapterConfig, read_adapter, uniform, write_adapter  # noqa: E402
from jaxengine.architecture import Architecture, architecture  # noqa: E402
from jaxengine.sources import open_source, read_config  # noqa: E402

# peft 0.21 asks transformers 5 in a way that this one is about to drop
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("one_quiet_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ADAPTERS = GOLDEN.parent / "golden_adapters"
ATOL = 1e-10
MOVED = 0.1  # how far an adapter must move some logit, to be a witness
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> (golden base, LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_lora": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ALL}),
    "llama_rslora": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {r"model\.layers\.0\..*": 5, "lm_head": 1},
        },
    ),
    "llama_dora": ("llama", {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "phi3_lora": ("phi3", {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "phi3_dora": ("phi3", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"}),
    "gpt2_lora": ("gpt2", {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2_dora": (
        "gpt2",
        {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "use_dora": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "opt_lora": ("opt", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "out_proj", "fc1"], "layers_to_transform": [1]}),
    "gemma2_lora": (
        "gemma2",
        {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    ),
    "qwen3_lora": ("qwen3", {"r": 2, "lora_alpha": 4, "target_modules": r".*\.(k|v)_proj"}),
}  # fmt: skip
KEPT = ("llama_lora", "llama_rslora", "llama_dora", "phi3_lora", "gpt2_dora")  # in tests/golden_adapters


def base_model(base: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / base, dtype=torch.float64)


def logits(model: Any, base: str) -> np.ndarray:
    ids = torch.tensor([golden(base)[0][0]])
    with torch.no_grad():
        return model.eval()(ids).logits[0].numpy()


def parts(base: str) -> tuple[Architecture, Any, Any, dict[str, np.ndarray]]:
    """(architecture, its name table, its parameters, their values by our names)."""
    model = architecture(read_config(GOLDEN / base))
    with open_source(GOLDEN / base, model) as source:
        model = source.architecture
        return model, model.name_table(), model.params(), {n: source.read(n) for n in model.params()}


def logits_of(base: str, ours: dict[str, np.ndarray]) -> np.ndarray:
    """transformers' logits with these parameters in place of the base's."""
    model, table, params, _ = parts(base)
    theirs = {
        n: torch.tensor(table.assemble(n, ours.__getitem__, params)) for n in table.theirs(params, model.num_layers)
    }
    made = base_model(base)
    left = made.load_state_dict(theirs, strict=False)
    assert not left.unexpected_keys
    assert all(name == "lm_head.weight" for name in left.missing_keys)  # tied
    return logits(made, base)


def saved_by_peft(case: str, folder: Path) -> np.ndarray:
    """peft's adapter folder with every number random, and its logits, float64."""
    base, options = CASES[case]
    model = base_model(base)
    before = logits(model, base)
    torch.manual_seed(sorted(CASES).index(case))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape).to(torch.float32)
            parameter.data = (
                (parameter.data * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise).float().double()
            )
    moved = logits(model, base)
    assert np.abs(moved - before).max() > MOVED
    model.peft_config["default"].base_model_name_or_path = f"tests/golden/{base}"
    model.float().save_pretrained(folder, save_embedding_layers=False)
    return moved


@pytest.mark.parametrize("case", CASES)
def test_saved_by_peft_read_by_us(case: str, tmp_path: Path) -> None:
    base = CASES[case][0]
    want = saved_by_peft(case, tmp_path)
    model, table, params, values = parts(base)
    adapters, config = read_adapter(tmp_path, table, params, model.num_layers)
    np.testing.assert_allclose(logits_of(base, all_adapted(values, adapters, config, params)), want, atol=ATOL, rtol=0)
    assert config.base_model == f"tests/golden/{base}"

    # and round: written by us, loaded by peft
    write_adapter(tmp_path / "again", adapters, config, table, params, model.num_layers)
    loaded = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "again", autocast_adapter_dtype=False).double()
    np.testing.assert_allclose(logits(loaded, base), want, atol=ATOL, rtol=0)
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert {n: x.tobytes() for n, x in ours.items()} == {
        n: x.tobytes() for n, x in theirs.items() if "base_layer" not in n
    }

    # one rank for all is the same function, but for float32's rounding of b where scales differ
    even, of = uniform(adapters, config)
    assert not of.rank_pattern
    assert not of.alpha_pattern
    exact = not config.alpha_pattern
    found = logits_of(base, all_adapted(values, even, of, params))
    np.testing.assert_allclose(found, want, atol=ATOL if exact else 1e-5, rtol=0)


def random_adapters(base: str, names: list[str], *, dora: bool, seed: int) -> tuple[dict[str, Adapter], AdapterConfig]:
    _, _, params, values = parts(base)
    rng = np.random.default_rng(seed)
    made, ranks = {}, {}
    for i, name in enumerate(names):
        shape, out, rank = params[name].shape, params[name].out, 4 - (i % 2 if "layers.1" in name else 0)
        ranks |= {name: rank} if rank != 4 else {}
        a, b = (rng.normal(0, 0.3, s).astype(np.float32) for s in ((rank, *shape[out:]), (*shape[:out], rank)))
        norm = np.sqrt((values[name].astype(np.float64) ** 2).sum(tuple(range(out, len(shape)))))
        made[name] = Adapter(a, b, (norm * rng.uniform(0.5, 1.5, norm.shape)).astype(np.float32) if dora else None)
    # one scale: alpha goes with the rank
    return made, AdapterConfig(
        4, 8.0, dora=dora, rank_pattern=ranks, alpha_pattern={n: 2.0 * r for n, r in ranks.items()}
    )


OURS = {
    "llama": ("llama", ["layers.0.q", "layers.1.q", "layers.1.down", "lm_head"], False),
    "llama_dora": ("llama", ["layers.1.k", "layers.0.o"], True),
    "phi3": ("phi3", ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.k", "layers.1.v", "layers.1.up"], False),
    "phi3_dora": ("phi3", ["layers.1.q", "layers.1.k", "layers.1.v", "layers.0.gate", "layers.0.up"], True),
    "gpt2": ("gpt2", ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.k", "layers.1.v", "layers.1.o"], False),
    "opt": ("opt", ["layers.0.q", "layers.1.o", "layers.1.up"], False),
}


@pytest.mark.parametrize("case", OURS)
def test_written_by_us_loaded_by_peft(case: str, tmp_path: Path) -> None:
    base, names, dora = OURS[case]
    model, table, params, values = parts(base)
    adapters, config = random_adapters(base, names, dora=dora, seed=3)
    want = logits_of(base, all_adapted(values, adapters, config, params))
    assert np.abs(want - logits(base_model(base), base)).max() > MOVED
    write_adapter(tmp_path / "made", adapters, config, table, params, model.num_layers)
    loaded = peft.PeftModel.from_pretrained(base_model(base), tmp_path / "made", autocast_adapter_dtype=False)
    assert {n for n, p in loaded.named_parameters() if "lora_" in n and not p.any()} == set()  # all were in the file
    np.testing.assert_allclose(logits(loaded.double(), base), want, atol=ATOL, rtol=0)

    again, config_again = read_adapter(tmp_path / "made", table, params, model.num_layers)
    assert again.keys() == adapters.keys()
    for name, one in adapters.items():
        for kind in ("a", "b", "magnitude"):
            x, y = getattr(one, kind), getattr(again[name], kind)
            assert (x is None) == (y is None)
            assert x is None or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()), (name, kind)
        assert config_again.scale(name) == config.scale(name)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes a trained bias for a broken tensor
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"target_modules": ["embed_tokens"]},
        {"layer_replication": [[0, 2]]},
    ],
)
def test_what_peft_saves_and_we_refuse(options: dict[str, Any], tmp_path: Path) -> None:
    model, table, params, _ = parts("llama_bias")
    made = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **options})
    peft.get_peft_model(base_model("llama_bias").float(), made).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=next(iter(options)) if "target_modules" not in options else "embed_tokens"):
        read_adapter(tmp_path, table, params, model.num_layers)


@pytest.mark.parametrize("case", KEPT)
def test_golden_files_are_what_peft_says_today(case: str) -> None:
    base = CASES[case][0]
    folder = ADAPTERS / case
    loaded = peft.PeftModel.from_pretrained(base_model(base), folder, autocast_adapter_dtype=False).double()
    with np.load(folder / "logits.npz") as file:
        np.testing.assert_allclose(logits(loaded, base), file["logits"], atol=1e-5, rtol=0)


def main() -> None:
    """Write tests/golden_adapters."""
    for case in KEPT:
        folder = ADAPTERS / case
        shutil.rmtree(folder, ignore_errors=True)
        made = saved_by_peft(case, folder)
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "adapter_model.safetensors").chmod(0o644)
        raw = json.loads((folder / "adapter_config.json").read_text())
        if isinstance(raw["target_modules"], list):
            raw["target_modules"] = sorted(raw["target_modules"])  # peft writes a set in any order
        (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        np.savez(folder / "logits.npz", logits=made.astype(np.float32))
        print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir())} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
