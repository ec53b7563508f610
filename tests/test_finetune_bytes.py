"""The arithmetic of a step against XLA's own bytes, on more shapes than those it was made on, and on models of real size.

tests/test_tuning_plan.py and tests/test_mezo.py have the rows that the parts for gaps and for copies under way were made on.
These differ from them in width, depth, key heads, rows, card or what is trained. The parts for tiles, for the form 'ahead',
for DoRA, for codes, for targets, for optimizers of 8 bits and adafactor, for attention in XLA, for a T4, for float32 beside 16
bits, for feed-forward blocks without a gate or with gelu, and for layers that alternate were corrected on the rows here. All
are held to the 5 % that a plan promises.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, cast

import pytest
from oracles.golden import GOLDEN
from test_planning import LLAMA_3_8B, SMALL
from test_tuning_plan import BF16, F32

from jaxengine.architecture import architecture
from jaxengine.finetune import planning as tuning
from jaxengine.finetune.optimizers.base import Optimizer
from jaxengine.finetune.trained._lowrank import LowRank
from jaxengine.finetune.trained.base import trained
from jaxengine.plan import layer_bytes
from jaxengine.planning import plan_for, traps
from pallas_kernels import aot
from pallas_kernels.audit import audit
from pallas_kernels.cards import CARDS

pytestmark = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

LONG = {"max_position_embeddings": 2**19}
THIN = SMALL | LONG | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_key_value_heads": 16, "num_hidden_layers": 14, "vocab_size": 8192,
}  # fmt: skip
WIDE = SMALL | {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "num_hidden_layers": 4, "vocab_size": 16000,
}  # fmt: skip
LESS = SMALL | {"vocab_size": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "small": LESS, "long": LESS | LONG, "thin": THIN, "wide": WIDE, "8B": LLAMA_3_8B, "8B, long": LLAMA_3_8B | LONG,
    "three thin": THIN | {"num_hidden_layers": 3}, "two of 8B": LLAMA_3_8B | LONG | {"num_hidden_layers": 2, "vocab_size": 4096},
}  # fmt: skip


def of(family: str) -> dict[str, Any]:
    """The family's golden config as wide as "small", with four layers, which alternate where the family's do."""
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    if family == "gpt2":
        return raw | {
            "n_embd": 2048,
            "n_head": 16,
            "n_positions": 4096,
            "n_inner": 8192,
            "n_layer": 4,
            "vocab_size": 8192,
        }
    raw |= {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 4,
        "vocab_size": 8192,
    }
    if family == "opt":
        return raw | {"ffn_dim": 8192, "word_embed_proj_dim": 2048}
    raw |= {"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5632}
    if "layer_types" in raw:
        raw["layer_types"] = (
            ["sliding_attention", "full_attention"] if "gemma" in family else ["full_attention"] * 2
        ) * 2
    if raw.get("sliding_window"):
        raw["sliding_window"] = 512
    return raw


FAMILIES = ("gemma2", "gemma3_text", "gpt2", "opt", "qwen3")
SHAPES |= {family: of(family) for family in FAMILIES} | {"tied": LESS | {"tie_word_embeddings": True}}
SHAPES |= {
    "vocab": SMALL | {"vocab_size": 128256},
    "tied vocab": SMALL | {"vocab_size": 128256, "tie_word_embeddings": True},
}
HOST = {"home": "host"}
AHEAD = {"home": "host", "form": "ahead"}
LOOP = {"home": "split", "resident_form": "scan"}
SPLIT = {"home": "split", "resident": 2}
XLA, HALF, WIDENED = {"attention": "xla"}, {"dtype": "float16"}, {"compute": "float32"}
Row = tuple[str, str, str, dict[str, Any], int, int, dict[str, Any]]
RANK_64 = {"options": LowRank(rank=64)}
ADAFACTOR = Optimizer("adafactor")
TWO_CARDS = {"mesh": "data=2", "sharding": "data"}
HALVES = {"mesh": "tensor=2", "sharding": "tensor"}
AVERAGED = Optimizer(ema=0.99)
EIGHT_BITS, MEZO = Optimizer("adamw8bit"), Optimizer("mezo", 1e-6, eps=1e-3)
ROWS: list[Row] = [
    ("small", "RTX 4090", "lora", AHEAD, 4, 1024, {}),
    ("small", "RTX 4090", "lora", HOST | {"stay": ("k", "v")}, 4, 1024, {}),
    ("thin", "RTX 4090", "lora", AHEAD | {"home": "split", "resident": 6}, 2, 1024, {}),
    ("long", "RTX 4090", "full", HOST | {"remat": "offload"}, 1, 2**14, {"tile": 1024}),
    ("long", "H200", "lora", HOST, 1, 2**15, {"tile": 2048}),
    ("thin", "H200", "full", HOST, 2, 2**14, {"tile": 512}),
    ("small", "RTX 4090", "dora", HOST, 4, 1024, {}),
    ("small", "H200", "dora", {}, 4, 1024, {}),
    ("small", "H200", "dora", {"remat": "none"}, 4, 1024, {}),
    ("small", "H200", "lora", {}, 4, 1024, {}),
    ("wide", "RTX 4090", "lora", HOST | {"weights": "nf4"}, 2, 1024, {}),
    ("small", "H200", "lora", HOST | {"weights": "int4"}, 4, 1024, {}),
    ("8B", "H200", "lora", HOST | {"weights": "int8"}, 2, 2048, {}),
    ("8B", "RTX 4090", "lora", HOST | {"weights": "nf4"}, 1, 2048, {}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, RANK_64 | {"optimizer": Optimizer("lion")}),
    ("small", "H200", "lora", {}, 4, 1024, RANK_64),
    ("8B", "RTX 4090", "lora", {"weights": "nf4", "form": "scan", "remat": "none"}, 1, 2048, {}),
    ("small", "RTX 4090", "lora", {"form": "scan", "remat": "dots"}, 4, 1024, {}),
    ("gpt2", "RTX 4090", "lora", {"form": "scan", "remat": "full"}, 4, 1024, {}),
    ("wide", "H200", "lora", LOOP | {"resident": 3, "form": "ahead", "weights": "nf4"}, 2, 1024, {}),
    ("small", "RTX 4090", "lora", LOOP | {"resident": 2, "remat": "dots", "weights": "int8"}, 4, 1024, {}),
    ("thin", "RTX 4090", "lora", LOOP | {"resident": 6, "remat": "none"}, 2, 1024, {}),
    ("thin", "RTX 4090", "lora", HOST, 2, 1024, {"options": LowRank(targets=("q", "v"))}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"options": LowRank(rank=32, targets=("gate", "up"))}),
    ("small", "T4", "lora", LOOP | {"resident": 2, "remat": "none"} | HALF, 4, 1024, {}),
    ("small", "RTX 4090", "dora", HOST, 4, 1024, RANK_64),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"compute": "float32"}),
    ("small", "RTX 4090", "full", HOST, 4, 1024, {"optimizer": Optimizer("lion")}),
    ("small", "H200", "full", {}, 2, 1024, {"optimizer": Optimizer("lion")}),
    ("small", "RTX 4090", "full", HOST, 4, 1024, {"optimizer": AVERAGED}),
    ("vocab", "RTX 4090", "full", HOST, 2, 1024, {}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"optimizer": MEZO, "clip": 0.0, "accumulate": 2}),
    ("small", "RTX 4090", "full", HOST, 4, 1024, {"optimizer": ADAFACTOR}),
    ("small", "RTX 4090", "lora", HOST | {"dtype": "float32"}, 4, 1024, {}),
    ("small", "RTX 4090", "lora", HOST | XLA, 4, 1024, {}),
    ("three thin", "RTX 4090", "lora", XLA, 2, 1024, {}),
    ("small", "T4", "lora", HOST | HALF, 4, 1024, WIDENED),
    ("wide", "T4", "lora", {"dtype": "float32"} | HOST, 2, 1024, WIDENED),
    ("gemma2", "H200", "lora", HOST, 4, 1024, {}),
    ("gemma3_text", "RTX 4090", "lora", HOST, 4, 1024, {}),
    ("gpt2", "RTX 4090", "lora", {}, 4, 1024, {}),
    ("opt", "RTX 4090", "lora", HOST, 4, 1024, {}),
    ("tied", "RTX 4090", "lisa", HOST, 4, 1024, {}),
]
MISSED = {
    ("opt", "H200", "lora", "host"): "7 % over: 524 MB for 564, of the sums that XLA makes again while attention goes back",
}  # fmt: skip


def each_family() -> list[Any]:
    """Adapters through layers in host memory and on the device, and every parameter in host memory; those of ROWS left out."""
    found = []
    for family in FAMILIES:
        for card in ("RTX 4090", "H200"):
            for task, plan in (("lora", HOST), ("lora", {}), ("full", HOST)):
                row = (family, card, task, plan, 4, 1024, {})
                why = MISSED.get((family, card, task, plan.get("home", "device")))
                marks = [pytest.mark.xfail(raises=AssertionError, strict=True, reason=why)] if why else []
                found += [pytest.param(*row, marks=marks)] if row not in ROWS else []
    return found


FURTHER: list[Any] = [
    *each_family(),
    # the noise of every parameter takes long to compile
    ("thin", "RTX 3090", "mezo", HOST, 8, 512, {}),
    ("wide", "RTX 3090", "mezo", HOST, 1, 512, {}),
    ("thin", "RTX 3090", "mezo", HOST, 2, 1024, {"accumulate": 2}),
    ("gemma2", "RTX 4090", "mezo", HOST, 4, 1024, {}),
    ("gemma3_text", "H200", "mezo", HOST, 4, 1024, {}),
    ("gemma2", "RTX 4090", "mezo", HOST, 2, 1024, {"accumulate": 2}),
    ("gemma2", "RTX 4090", "mezo", HOST, 1, 1024, {}),
    ("gemma2", "RTX 4090", "mezo", {"home": "split", "resident": 2}, 4, 1024, {}),  # two written out
    ("gpt2", "RTX 4090", "mezo", HOST, 4, 1024, {}),
    ("wide", "RTX 4090", "mezo", HOST, 1, 2048, {}),
    ("small", "RTX 4090", "mezo", {"form": "scan"}, 1, 1024, {}),
    ("gemma2", "H200", "mezo", {"form": "scan"}, 4, 1024, {}),
    ("8B", "RTX 4090", "mezo", LOOP | {"resident": 19}, 1, 2048, {}),
    ("small", "RTX 4090", "mezo", LOOP | {"resident": 2}, 2, 1024, {"accumulate": 2}),
    ("small", "RTX 4090", "lora", LOOP | {"resident": 2}, 4, 1024, {"optimizer": MEZO, "clip": 0.0}),
    ("gpt2", "RTX 4090", "mezo", LOOP | {"resident": 2}, 4, 1024, {}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"optimizer": MEZO, "clip": 0.0}),
    ("gemma2", "RTX 4090", "lora", HOST, 4, 1024, {"optimizer": MEZO, "clip": 0.0}),
    ("gemma2", "H200", "lora", HOST, 4, 1024, {"optimizer": MEZO, "clip": 0.0}),
    ("gemma3_text", "H200", "lora", HOST, 4, 1024, {"optimizer": MEZO, "clip": 0.0}),
    ("tied", "H200", "lisa", {}, 4, 1024, {}),
    ("tied", "RTX 4090", "badam", HOST, 4, 1024, {}),
    ("tied", "RTX 4090", "hift", HOST, 4, 1024, {}),
    ("gpt2", "RTX 4090", "lisa", HOST, 4, 1024, {}),
    ("gpt2", "H200", "lisa", HOST, 4, 1024, {}),
    ("small", "RTX 4090", "lisa", HOST, 2, 1024, {"accumulate": 2}),
    ("gemma2", "RTX 4090", "lisa", HOST, 2, 1024, {"accumulate": 2}),
    ("gemma2", "RTX 4090", "lisa", HOST, 1, 3072, {"tile": 512}),
    ("gemma2", "RTX 4090", "lisa", {}, 4, 1024, {}),
    ("gemma3_text", "RTX 4090", "lisa", HOST, 4, 1024, {}),
    ("gemma2", "H200", "lisa", HOST, 4, 1024, {}),
    ("gemma2", "RTX 4090", "badam", HOST, 4, 1024, {}),
    ("gemma2", "RTX 4090", "hift", HOST, 4, 1024, {}),
    ("8B", "H200", "full", HOST, 1, 2048, {}),  # whose embedding and head are changed by rows, as of the next two
    ("tied vocab", "RTX 4090", "full", HOST, 2, 1024, {}),
    ("vocab", "H200", "full", HOST, 2, 1024, {"accumulate": 2}),
    ("vocab", "RTX 4090", "full", HOST, 2, 1024, {"optimizer": AVERAGED}),
    ("thin", "H200", "full", HOST, 2, 1024, {"optimizer": AVERAGED}),
    ("small", "RTX 4090", "full", HOST, 4, 1024, {"optimizer": Optimizer("adafactor", ema=0.99)}),
    ("small", "RTX 4090", "full", HOST | {"remat": "offload"}, 4, 1024, {"optimizer": Optimizer("muon", ema=0.99)}),
    ("small", "H200", "full", {}, 2, 1024, {"optimizer": AVERAGED}),
    (
        "wide",
        "RTX 4090",
        "full",
        {"home": "split", "resident": 2},
        2,
        1024,
        {"optimizer": Optimizer("adamw8bit", ema=0.99)},
    ),
    ("small", "H200", "lora", {}, 4, 1024, RANK_64 | {"optimizer": AVERAGED}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, RANK_64 | {"optimizer": AVERAGED}),
    ("vocab", "H200", "full", HOST, 2, 1024, {"optimizer": ADAFACTOR}),  # changed whole
    ("8B, long", "H200", "full", HOST | {"remat": "offload"}, 1, 500_000, {"tile": 8192}),
    ("thin", "RTX 4090", "full", HOST | {"remat": "offload"}, 1, 2**14, {"tile": 1024}),
    ("small", "RTX 4090", "full", HOST | {"remat": "offload"}, 4, 1024, {}),
    ("small", "RTX 4090", "full", HOST, 4, 1024, {"clip": 0.0}),
    ("wide", "H200", "dora", {"remat": "none"}, 2, 1024, {}),
    ("thin", "H200", "dora", {"remat": "none"}, 2, 1024, {}),
    ("small", "RTX 4090", "lora", {}, 4, 1024, {}),
    ("thin", "H200", "lora", {}, 2, 1024, {}),
    ("8B", "RTX 4090", "lora", AHEAD, 2, 2048, {}),
    ("thin", "H200", "lora", {"home": "split", "resident": 6, "form": "ahead", "weights": "int4"}, 2, 1024, {}),
    ("8B", "RTX 4090", "lora", {"home": "split", "resident": 12, "form": "ahead", "weights": "nf4"}, 1, 2048, {}),
    # resident layers in a loop, as plans have them
    *(
        (name, card, "lora", plan | {"form": "scan", "remat": remat}, batch, 1024, {})
        for name, card, plan, batch in (
            ("small", "H200", {}, 4),
            ("thin", "RTX 4090", {}, 2),
            ("wide", "RTX 4090", {}, 2),
            ("wide", "RTX 4090", {"weights": "nf4"}, 2),
            ("small", "A100", {"weights": "fp8"}, 4),
            ("gpt2", "H200", {}, 4),
            ("opt", "RTX 4090", {}, 4),
            ("qwen3", "RTX 4090", {}, 4),
        )
        for remat in ("none", "dots", "full")
    ),
    ("small", "T4", "lora", HALF | {"form": "scan", "remat": "none"}, 4, 1024, WIDENED),
    ("small", "H200", "dora", {"form": "scan"}, 4, 1024, {}),
    # which a loop makes again
    ("small", "H200", "lora", {"form": "scan", "remat": "none", "attention": "reference"}, 2, 1024, {}),
    ("small", "H200", "dora", {"remat": "dots"}, 4, 1024, {}),
    ("small", "RTX 4090", "lora", {"form": "scan", "remat": "none"}, 4, 1024, {"accumulate": 2}),
    ("thin", "RTX 4090", "lora", {"form": "scan", "remat": "none"}, 2, 1024, {"options": LowRank(targets=("q", "v"))}),
    ("wide", "H200", "lora", {"form": "scan", "remat": "full", "weights": "int8"}, 1, 4096, {}),
    ("8B", "H200", "lora", {"weights": "nf4", "form": "scan", "remat": "none"}, 2, 2048, {}),
    # all that a layer made is kept, or what its matrices gave
    ("small", "RTX 4090", "lora", {"remat": "none"}, 4, 1024, {}),
    ("gemma2", "RTX 3090", "lora", {"remat": "none"}, 2, 2048, {}),
    ("gemma2", "H200", "lora", {"remat": "none"}, 4, 1024, {}),
    ("gemma3_text", "H200", "lora", {"remat": "none"}, 4, 1024, {}),
    ("qwen3", "RTX 4090", "lora", {"remat": "none"}, 4, 1024, {}),
    ("gpt2", "H200", "lora", {"remat": "none"}, 4, 1024, {}),
    ("opt", "RTX 4090", "lora", {"remat": "none"}, 4, 1024, {}),
    ("gemma2", "RTX 4090", "lora", {"remat": "dots"}, 4, 1024, {}),
    ("gpt2", "RTX 4090", "lora", HOST | {"remat": "dots"}, 4, 1024, {}),
    ("gpt2", "A100", "lora", HOST | {"remat": "dots"}, 2, 512, {}),
    ("opt", "H200", "lora", HOST | {"remat": "dots"}, 4, 1024, {}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"tile": 256}),  # several rows, which are cut in copies
    ("thin", "H200", "lora", HOST, 2, 4096, {"tile": 512}),
    ("thin", "RTX 3090", "lora", HOST | {"weights": "nf4"}, 8, 512, {}),
    ("wide", "RTX 4090", "dora", HOST | {"weights": "nf4"}, 2, 1024, {}),
    ("wide", "RTX 4090", "lora", HOST | {"weights": "nf4", "remat": "dots"}, 2, 1024, {}),
    ("small", "A100", "lora", {"weights": "fp8"}, 4, 1024, {}),
    ("8B", "RTX 4090", "lora", HOST, 2, 2048, {}),
    ("small", "H200", "lora", {}, 4, 1024, {"options": LowRank(targets=("down",))}),
    ("small", "H200", "lora", {}, 4, 1024, {"options": LowRank(targets=("q", "k", "v", "o"))}),
    ("wide", "RTX 4090", "lora", HOST, 2, 1024, {"options": LowRank(targets=("q", "v"))}),
    ("small", "RTX 4090", "lora", HOST, 4, 1024, {"options": LowRank(targets=("gate", "down"))}),
    ("small", "H200", "full", {}, 2, 1024, {"optimizer": EIGHT_BITS}),
    (
        "small",
        "RTX 4090",
        "badam",
        HOST,
        4,
        1024,
        {"options": trained("badam").Options(layers=2), "optimizer": EIGHT_BITS},
    ),
    ("wide", "RTX 4090", "full", HOST, 2, 1024, {"optimizer": ADAFACTOR}),
    ("thin", "RTX 4090", "full", HOST, 2, 1024, {"optimizer": ADAFACTOR}),
    ("small", "RTX 4090", "full", HOST | {"remat": "offload"}, 2, 1024, {"optimizer": ADAFACTOR}),
    ("small", "RTX 4090", "lisa", HOST, 4, 1024, {"compute": "float32"}),
    ("wide", "RTX 4090", "lisa", HOST, 2, 1024, {"compute": "float32"}),
    ("thin", "RTX 4090", "lisa", HOST, 2, 1024, {"compute": "float32"}),
    ("wide", "RTX 4090", "lora", {"dtype": "float32"}, 2, 1024, {}),
    ("small", "H200", "lora", {"dtype": "float32"}, 4, 1024, {}),
    ("thin", "RTX 4090", "lora", {"dtype": "float32"}, 2, 1024, {}),
    ("small", "RTX 4090", "mezo", HOST | {"dtype": "float32"}, 4, 1024, {"compute": "bfloat16"}),
    ("wide", "RTX 4090", "mezo", HOST | {"dtype": "float32"}, 2, 1024, {"compute": "bfloat16"}),
    ("small", "RTX 4090", "mezo", LOOP | {"resident": 3, "dtype": "float32"}, 4, 1024, {"compute": "bfloat16"}),
    ("small", "RTX 4090", "lora", XLA, 4, 1024, {}),
    ("wide", "RTX 4090", "lora", HOST | XLA, 2, 1024, {}),
    ("two of 8B", "RTX 4090", "lora", HOST | XLA, 1, 2**15, {}),
    ("two of 8B", "RTX 4090", "lora", XLA, 1, 2**15, {}),
    ("small", "T4", "lora", HALF, 4, 1024, WIDENED),
    ("small", "T4", "lora", {"dtype": "float32"}, 4, 1024, WIDENED),
    ("two of 8B", "T4", "lora", HALF, 1, 4096, WIDENED),
    ("thin", "T4", "lora", HOST | HALF, 2, 1024, WIDENED),
    ("small", "T4", "lora", HOST | HALF | {"remat": "offload"}, 1, 2048, WIDENED),
    ("small", "T4", "lora", HOST | HALF, 4, 1024, WIDENED | {"options": LowRank(targets=("q", "v"))}),
    *(
        pytest.param(*row, marks=pytest.mark.xfail(raises=AssertionError, strict=True, reason=reason))
        for reason, *row in (
            # XLA puts all of the block's adapters' gradients off until attention has gone back, and with 3 layers does not
            ("7 % under", "thin", "RTX 4090", "lora", HOST | XLA, 2, 1024, {}),
            ("11 % under", "small", "RTX 4090", "lora", XLA | {"form": "scan", "remat": "none"}, 4, 1024, {}),
            ("10 % under", "small", "H200", "dora", {"form": "scan", "remat": "none"}, 4, 1024, {}),
            # live are 5.04 GB, of the 5.07 that are counted
            ("7 % under: XLA's heap has gaps", "small", "H200", "full", {}, 2, 1024, {"accumulate": 2}),
        )
    ),
]


def on_device(
    name: str, card: str, task: str, plan: dict[str, Any], batch: int, context: int, how: dict[str, Any]
) -> tuple[int, int]:
    """(XLA's bytes, those counted) of the device; what else holds of every row is checked on the way."""
    arch, what = architecture(SHAPES[name]), dataclasses.replace(tuning.task(task), **how)
    chosen = dataclasses.replace(F32 if task == "full" else BF16, **plan)
    with aot.target(aot.CARDS[card]) as target:
        program, static, abstract = tuning.program(
            arch, chosen, what, cast(Any, target.mesh), batch=batch, context=context
        )
        compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
    there: dict[str, Any] = {"wide": aot.CARDS[card].wide, "keeps_gelu": tuning.keeps_gelu(aot.CARDS[card])}
    need = tuning.need(arch, chosen, what, batch=batch, context=context, **there)
    if task != "hift":  # whose moments wait outside of the program
        assert aot.host_bytes(compiled) == pytest.approx(need.host, rel=0.05)
    report = audit(compiled).check()
    assert {c.dma for c in report.copies} <= {True}
    assert report.copies or "home" not in plan
    if what.tile:  # no feed-forward block of all tokens: neither its width nor both halves
        F = arch.config.intermediate_size
        assert not re.search(rf"\[(\d+,)*({context}|{batch * context}),({F}|{2 * F})\]", compiled.as_text())
    return aot.device_bytes(compiled), need.device


@pytest.mark.parametrize(
    ("remat", "attention"), [("none", "auto"), ("dots", "auto"), ("full", "auto"), ("none", "mosaic_gpu")]
)
def test_what_a_loop_over_resident_layers_makes_again(remat: str, attention: str) -> None:
    """On the way back: attention under 'dots' and 'full', and what a matrix of the model gives under 'full' alone. (Adapters'
    first halves, of rank 8, are made again in any case.)"""
    arch, what = architecture(SHAPES["small"]), tuning.task("lora")
    plan = dataclasses.replace(BF16, form="scan", remat=remat, attention=attention)
    with aot.target(aot.CARDS["H200"]) as target:
        program, static, abstract = tuning.program(arch, plan, what, cast(Any, target.mesh), batch=4, context=1024)
        text = target.compile(program.on("gpu"), *static, *target.place(abstract)).as_text()
    kernels = [line for line in text.splitlines() if "custom-call(" in line and "attention_forward" in line]
    assert len(kernels) == (1 if remat == "none" else 2)
    again = [line for line in text.splitlines() if " dot(" in line and "rematted_computation" in line]
    shapes = [[int(n) for n in re.findall(r"\d+", line.partition("{")[0].partition("[")[2])] for line in again]
    wide = [s for s in shapes if s[-1] != what.options.rank]
    assert len(shapes) - len(wide) == 7
    assert bool(wide) == (remat == "full")


@pytest.mark.parametrize(("name", "card", "task", "plan", "batch", "context", "how"), ROWS, ids=str)
@pytest.mark.some_rows
def test_more_shapes(
    name: str, card: str, task: str, plan: dict[str, Any], batch: int, context: int, how: dict[str, Any]
) -> None:
    found, counted = on_device(name, card, task, plan, batch, context, how)
    assert found == pytest.approx(counted, rel=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "card", "task", "plan", "batch", "context", "how"), FURTHER, ids=str)
def test_models_of_real_size_and_what_compiles_long(
    name: str, card: str, task: str, plan: dict[str, Any], batch: int, context: int, how: dict[str, Any]
) -> None:
    found, counted = on_device(name, card, task, plan, batch, context, how)
    assert found == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("name", "card", "task", "plan", "how", "said"),
    [
        ("thin", "RTX 4090", "lora", HOST | XLA, {}, "attention 'xla' in 16 bits"),
        ("thin", "RTX 4090", "lora", HOST, {}, ""),
        ("thin", "RTX 4090", "lora", XLA, {}, ""),
        ("opt", "H200", "lora", HOST, {}, "has no gate"),
        ("opt", "H200", "lora", {}, {}, ""),
        ("small", "H200", "full", {}, {"accumulate": 2}, "adds up the gradients of resident layers"),
        ("small", "RTX 4090", "lora", XLA | {"form": "scan", "remat": "none"}, {}, "with attention 'xla'"),
        ("small", "RTX 4090", "lora", XLA | {"form": "scan"}, {}, ""),
        ("small", "H200", "dora", {"form": "scan", "remat": "dots"}, {}, "beside DoRA in a loop"),
        ("gemma2", "H200", "lora", {"form": "scan"}, {}, "unlike resident layers in a loop"),
        (
            "small",
            "H200",
            "lora",
            {"form": "scan", "remat": "none", "weight_rules": (("layers.0.*", "int8"),)},
            {},
            "some in a loop and some written out",
        ),
        ("small", "H200", "dora", {"form": "scan"}, {}, ""),
        ("small", "H200", "lora", LOOP | {"resident": 2, "remat": "none"}, {}, ""),
        (
            "small",
            "H200",
            "lora",
            LOOP | {"resident": 2, "remat": "none", "attention": "reference"},
            {},
            "with all scores",
        ),
        ("small", "H200", "lora", SPLIT | {"remat": "dots", "weights": "int8"}, {}, "resident and written out"),
        ("small", "H200", "lora", SPLIT | {"remat": "dots"}, {}, ""),
        ("small", "H200", "full", {}, {}, ""),
        ("small", "H200", "full", HOST, {"accumulate": 2}, ""),
        ("gemma2", "H200", "lora", HOST, {"optimizer": MEZO, "clip": 0.0}, ""),
        ("small", "RTX 4090", "lora", HOST | TWO_CARDS, {}, "of about a thousand tokens on each card"),
        ("thin", "H200", "full", HOST | HALVES, {}, "of every parameter over tensor, with many tokens"),
        ("wide", "H200", "full", HOST | HALVES, {}, ""),
        ("thin", "H200", "full", HOST | TWO_CARDS, {}, ""),
        ("thin", "H200", "full", HOST | TWO_CARDS, {"optimizer": AVERAGED}, "every parameter and its average over"),
        ("thin", "H200", "full", HOST, {"optimizer": AVERAGED}, ""),
        ("wide", "RTX 4090", "hift", HOST, {"optimizer": ADAFACTOR}, "in which adafactor changes some layers"),
        ("wide", "RTX 4090", "hift", HOST, {}, ""),
    ],
    ids=str,
)
def test_a_plan_says_of_rows_that_are_missed_by_how_much(
    name: str, card: str, task: str, plan: dict[str, Any], how: dict[str, Any], said: str
) -> None:
    """Those that are expected to fail above; none of the others."""
    what = dataclasses.replace(tuning.task(task), **how)
    chosen = dataclasses.replace(F32 if task == "full" else BF16, **plan)
    found = plan_for(architecture(SHAPES[name]), chosen, CARDS[card], batch=2, context=1024, task=what)
    assert found.chosen is not None
    candidate = dataclasses.replace(found.chosen, plan=chosen)  # where it is asked for, not where all fits
    notes = [t for t in traps(found.architecture, candidate, found.card, what) if "times as much as is" in t]
    assert [said in t for t in notes] == ([True] if said else [])


def test_layers_that_are_brought_together_to_be_trained_go_again() -> None:
    """Over several cards (fsdp), written out: XLA alone would bring them together long before their turn, and keep them."""
    plan = dataclasses.replace(BF16, mesh="fsdp=2", sharding="fsdp", form="unrolled")

    def temporaries(layers: int) -> int:
        arch = architecture(LESS | {"num_hidden_layers": layers, "vocab_size": 512})
        with aot.target(aot.CARDS["RTX 4090"], fsdp=2) as target:
            program, static, abstract = tuning.program(
                arch, plan, tuning.task("lora"), cast(Any, target.mesh), batch=2, context=256
            )
            compiled = target.compile(program.on("gpu"), *static, *target.place(abstract))
        return compiled.memory_analysis().temp_size_in_bytes

    layer = layer_bytes(architecture(LESS), BF16)[0]
    assert temporaries(8) - temporaries(4) < layer / 2
