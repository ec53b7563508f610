"""What papers on small memory claim, beside what our programs for the same model, card and context need.

    python scripts/headlines.py                         every claim; compiles for the card that the paper used
    python scripts/headlines.py --only flexgen --only mom
    python scripts/headlines.py --no-compile --json     the arithmetic alone

A claim is a row of data: the paper, the model as its config.json would say it, the card, the bytes it is said to fit in,
and the plan that comes nearest to it here. For each, the bytes of `jaxengine plan`'s arithmetic and, with XLA's GPU
compiler installed, those that XLA gives to the compiled prefill and decode, of which the larger counts. All of it happens
on the CPU of this machine: nothing is allocated, and nothing runs on a GPU, even if there is one.

Where XLA's bytes are more than 5 % away from the arithmetic's, the row has a mark (!) and a line that says by how much.
A row that is not reached is not bent until it is: it shows what is needed today and names what it waits for. A claim on
the card's memory is also one on the machine's, so host memory is held against what the paper's machine had, where the
paper says it. Papers that name no card, or none of NVIDIA's, get one that is named as a stand-in. Memory is all that is
looked at; how fast a paper is, and on what quality it insists, is another question.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

# of a claim that does not fit XLA says at length that its scheduler cannot make it fit; read when jax is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Column, Table

from jaxengine.architecture import Architecture, architecture
from jaxengine.command import SETTINGS, reported, start_jax
from jaxengine.engine import bucket
from jaxengine.finetune import planning as tuning
from jaxengine.plan import Need, Plan, need, show_bytes, weight_bytes
from jaxengine.planning import PROMISED
from jaxengine.proof import Proof, prove
from pallas_kernels import aot
from pallas_kernels.cards import Card, find

# ---------------------------------------------------------------------------------------------------------------------
# The models, in the fields of their families

# arXiv:2205.01068, table 1; vocabulary and four times the width in the feed-forward block as in the smaller sizes' files
OPT_175B = {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96,
    "num_attention_heads": 96, "max_position_embeddings": 2048,
}  # fmt: skip
# arXiv:2201.11990: GPT-2's architecture and vocabulary; no weights were published
MT_NLG_530B = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 20480, "n_layer": 105, "n_head": 128, "n_positions": 2048,
}  # fmt: skip
# arXiv:2407.21783, table 3
LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}  # fmt: skip
# arXiv:2302.13971, table 2
LLAMA_65B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016,
    "num_hidden_layers": 80, "num_attention_heads": 64, "max_position_embeddings": 2048,
}  # fmt: skip
# arXiv:2307.09288, and the files' config.json
LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
# arXiv:2407.10671, table 1
QWEN2_1_5B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_2_70B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Headline:
    """One claim. Sizes in bytes.

    task, tile: what `jaxengine plan` takes: 'generate', or a step of fine-tuning, and the tokens of its feed-forward block
    at a time; like: the task of `baseline`.
    model: a config.json; card: as `cards.find` knows it; machine: what the paper says of its hardware. budget: device
    memory that it must fit in (None: all that a process has of the card, or of `baseline`). baseline, share: where the
    claim is relative, the plan it is relative to, and the share of its bytes that may be used. ram: host memory of the
    paper's machine (None: not said). note, needs: what to know, and what it waits for ('' where nothing); fields in
    braces are those of `quantities`, and of `against_lora` where that is the baseline.
    """

    name: str
    claim: str
    paper: str
    arxiv: str
    model_name: str
    model: Mapping[str, Any]
    card: str
    machine: str
    batch: int
    context: int
    plan: Plan
    note: str
    task: str = "generate"
    tile: int = 0
    like: str = ""
    needs: str = ""
    budget: int | None = None
    baseline: Plan | None = None
    share: float = 1.0
    ram: int | None = None


HEADLINES = (
    Headline(
        name="flexgen",
        claim="OPT-175B on a single 16 GB GPU",
        paper="FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
        arxiv="2303.06865",
        model_name="OPT-175B",
        model=OPT_175B,
        card="T4",
        machine="a T4 with 208 GB of RAM and 1.5 TB of disk; prompts of 512 tokens, 32 generated",
        batch=1,
        context=544,
        plan=Plan(dtype="float16", weights="int8", home="host"),
        ram=208 * 10**9,
        note="Layers in float16 are {dense}, over the RAM, and FlexGen puts a part of them on disk; in int8 they are"
        " {host}. A T4 knows no bfloat16 (XLA widens it to float32), so it computes in float16.",
    ),
    Headline(
        name="flexgen-144",
        claim="the same with an effective batch of 144, for 1 token/s",
        paper="FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
        arxiv="2303.06865",
        model_name="OPT-175B",
        model=OPT_175B,
        card="T4",
        machine="a T4 with 208 GB of RAM, weights and cache in 4 bits and in RAM; prompts of 512 tokens, 32 generated",
        batch=144,
        context=544,
        plan=Plan(dtype="float16", weights="int8", home="host", kv_codec="int8", chunk=16),
        ram=208 * 10**9,
        note="The KV cache in int8 is {cache}, padded to {length} tokens a row. The residual stream of all prompts is"
        " {stream}: a layer reads all of them before the next one does.",
        needs="a KV cache on the host, weights and cache in 4 bits, and a large batch that goes through the layers in parts",
    ),
    Headline(
        name="superpipeline",
        claim="up to 60 % less GPU memory",
        paper="Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models",
        arxiv="2410.08791",
        model_name="Llama 3 8B",
        model=LLAMA_3_8B,
        card="RTX 3090",
        machine="its abstract names neither card nor model, and these stand in",
        batch=1,
        context=1024,
        plan=Plan(dtype="bfloat16", home="split", resident=7),
        baseline=Plan(dtype="bfloat16"),
        share=0.4,
        note="{resident} of {layers} layers stay on the card; home='host' keeps none there and needs {least}.",
    ),
    Headline(
        name="deepspeed-inference",
        claim="25x larger models than GPU-only: 530 B where 20 B fit",
        paper="DeepSpeed Inference: Enabling Efficient Inference of Transformer Models at Unprecedented Scale",
        arxiv="2207.00032",
        model_name="MT-NLG 530B",
        model=MT_NLG_530B,
        card="RTX A6000",
        machine="a workstation with A6000 cards of 48 GB, 256 GB of RAM and 2 TB of NVMe",
        batch=1,
        context=2048,
        plan=Plan(dtype="float16", home="disk", kept=22),
        ram=256 * 10**9,
        note="The card holds two layers of {layer} at a time; {kept} of {layers} are kept in RAM beside the buffers that the"
        " others, {disk}, are read into in every pass. GPU-only, weights alone, the card holds {alone} parameters in"
        " {dtype}, and this model is {times} times as large; in whole layers of this width it holds {alone_whole}, and this"
        " model is {times_whole} times as large (the paper: 20 B).",
    ),
    Headline(
        name="mom",
        claim="455k tokens of context for an 8 B Llama on one A100 80GB",
        paper="MOM: Memory-Efficient Offloaded Mini-Sequence Inference for Long Context Language Models",
        arxiv="2504.12526",
        model_name="Llama 3 8B",
        model=LLAMA_3_8B | {"max_position_embeddings": 2**19},
        card="A100 80GB",
        machine="one A100 80GB; the paper's 'Meta-Llama-3.2-8B' is taken for the shape of Llama 3 8B",
        batch=1,
        context=455_000,
        plan=Plan(dtype="bfloat16", home="host", chunk=64),
        note="The other way round: MOM moves the KV cache to the host, this plan the layers ({host}), and the cache of"
        " {cache} stays on the card, with the residual stream of the whole prompt, {stream}.",
    ),
    Headline(
        name="headinfer-1m",
        claim="1M tokens with an 8 B Llama: KV 128 -> 1 GB on the card, 207 -> 17 GB in all",
        paper="HeadInfer: Memory-Efficient LLM Inference by Head-wise Offloading",
        arxiv="2502.12574",
        model_name="Llama 3 8B",
        model=LLAMA_3_8B | {"max_position_embeddings": 2**20},
        card="RTX 4090",
        machine="a consumer card with 24 GB, e.g. an RTX 4090",
        batch=1,
        context=2**20,
        plan=Plan(dtype="bfloat16", home="host", chunk=64),
        budget=17 * 10**9,
        note="On the card stand a KV cache of {cache} and twice the residual stream of the whole prompt, {stream}, because"
        " chunks of {chunk} are read inside each layer.",
        needs="a KV cache on the host, and chunks that go through all layers",
    ),
    Headline(
        name="headinfer-4m",
        claim="4M tokens with an 8 B Llama on one card with 24 GB",
        paper="HeadInfer: Memory-Efficient LLM Inference by Head-wise Offloading",
        arxiv="2502.12574",
        model_name="Llama 3 8B",
        model=LLAMA_3_8B | {"max_position_embeddings": 2**22},
        card="RTX 4090",
        machine="a consumer card with 24 GB, e.g. an RTX 4090",
        batch=1,
        context=2**22,
        plan=Plan(dtype="bfloat16", home="host", chunk=64),
        note="On the card stand a KV cache of {cache} and twice the residual stream of the whole prompt, {stream}, because"
        " chunks of {chunk} are read inside each layer.",
        needs="a KV cache on the host, and chunks that go through all layers",
    ),
    Headline(
        name="tpi-llm",
        claim="Llama 2 70B in 3.1 GB",
        paper="TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices",
        arxiv="2410.00531",
        model_name="Llama 2 70B",
        model=LLAMA_2_70B,
        card="RTX 3060 12GB",
        machine="several edge devices, each with a part of every layer and that much memory; one card stands in for all",
        batch=1,
        context=512,
        plan=Plan(dtype="bfloat16", weights="int8", home="disk"),
        budget=31 * 10**8,
        # the paper's 3.1 GB are all the memory that a device uses
        ram=31 * 10**8,
        note="Reached by one card without splitting a layer, with embeddings and head of {outer} beside two layers of"
        " {layer} in int8 (in bfloat16 they would be over it), and three more in RAM; {disk} are read in every pass. The"
        " paper's weights are not quantised, and its 3.1 GB are of a device whose RAM is the GPU's.",
    ),
    Headline(
        name="qlora-65b",
        claim="65 B fine-tuned on one card of 48 GB",
        paper="QLoRA: Efficient Finetuning of Quantized LLMs",
        arxiv="2305.14314",
        model_name="LLaMA 65B",
        model=LLAMA_65B,
        card="RTX A6000",
        machine="a card of 48 GB, NF4 with double quantisation, paged optimizer states",
        batch=1,
        context=512,
        plan=Plan(dtype="bfloat16", weights="nf4", form="scan", remat="full"),
        task="lora",
        note="All layers stand on the card, {resident_bytes}; rank 8 beside every matrix of a layer (the paper: 64), nothing is"
        " paged. With home='host' a step needs {least}.",
    ),
    Headline(
        name="qlora-4gb",
        claim="QLoRA of a 1.5 B model in 4 GB",
        paper="Resource-Aware Arabic LLM Creation: Model Adaptation, Integration, and Multi-Domain Testing",
        arxiv="2412.17548",
        model_name="Qwen2 1.5B",
        model=QWEN2_1_5B,
        card="RTX 3060 12GB",
        machine="a system with 4 GB of VRAM; a 3060 with that budget stands in",
        batch=1,
        context=512,
        plan=Plan(dtype="bfloat16", weights="nf4", form="scan", remat="full"),
        task="lora",
        budget=4 * 10**9,
        note="Of it {outer} are the embedding, in bfloat16, and {resident_bytes} the layers.",
    ),
    Headline(
        name="zo2",
        claim="OPT-175B fine-tuned in 18 GB",
        paper="ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU Memory",
        arxiv="2503.12668",
        model_name="OPT-175B",
        model=OPT_175B,
        card="A100 40GB",
        machine="a GPU of 18 GB, in the abstract's words; an A100 with that budget stands in",
        batch=1,
        context=2048,
        plan=Plan(dtype="float16", home="host"),
        task="mezo",
        budget=18 * 10**9,
        note="Layers of {layer}, {host} in host memory, go to the card and back once a step. Noise and updates are made where"
        " they are used.",
    ),
    Headline(
        name="hift",
        claim="7 B, every parameter in float32 with AdamW, on one card of 48 GB",
        paper="HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy",
        arxiv="2401.15207",
        model_name="Llama 2 7B",
        model=LLAMA_2_7B,
        card="RTX A6000",
        machine="an RTX A6000 of 48 GB",
        batch=1,
        context=512,
        plan=Plan(dtype="float32", home="device", form="scan", remat="full"),
        task="hift",
        note="One layer at a time has a gradient and moments; those of the others wait in host memory, {host}.",
    ),
    Headline(
        name="lisa",
        claim="7 B, two layers at a time, for no more than LoRA needs",
        paper="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        arxiv="2403.17919",
        model_name="Llama 2 7B",
        model=LLAMA_2_7B,
        card="RTX 4090",
        machine="its abstract names no card, and this one stands in",
        batch=1,
        context=1024,
        plan=Plan(dtype="bfloat16", home="device", form="scan", remat="full"),
        task="lisa",
        baseline=Plan(dtype="bfloat16", form="scan", remat="full"),
        like="lora",
        note="LoRA of rank 8 beside every matrix is what it is held against; from rank {rank} on LoRA needs more than LISA."
        " Embedding and head are trained in every step: with the two layers {trained} in float32, {gradients} of gradients and"
        " {optimizer} of moments. With adafactor, which has no moments of a matrix, it is {adafactor}, less than LoRA with AdamW"
        " from rank {adafactor_rank} on.",
        needs="a LoRA of rank {rank} or more to be held against",
    ),
    Headline(
        name="alst",
        claim="500k tokens of context in training, Llama 8B, one card of 80 GB",
        paper="Arctic Long Sequence Training: Scalable And Efficient Training For Multi-Million Token Sequences",
        arxiv="2506.13996",
        model_name="Llama 3 8B",
        model=LLAMA_3_8B | {"max_position_embeddings": 2**19},
        card="H100 80GB",
        machine="one H100 of 80 GB",
        batch=1,
        context=500_000,
        plan=Plan(dtype="float32", home="host", remat="offload"),
        task="full",
        tile=8192,
        note="What a layer makes of so many tokens while it is gone back through is {activations}: its feed-forward block and the"
        " logits are made in parts.",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What they need here


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a claim needs here: by arithmetic, and, where it was compiled, by XLA. baseline: bytes of what it is relative
    to (0: it is not)."""

    headline: Headline
    card: Card
    need: Need
    proofs: tuple[Proof, ...]
    baseline: int
    baseline_proofs: tuple[Proof, ...]
    said: Mapping[str, str]  # the note's fields
    seconds: float

    @property
    def compiled(self) -> int | None:
        """XLA's bytes on the device, of the larger program; None where nothing was compiled."""
        return max((p.device for p in self.proofs), default=None)

    @property
    def device(self) -> int:
        """XLA's bytes on the device, or else the arithmetic's."""
        return self.need.device if self.compiled is None else self.compiled

    @property
    def host(self) -> int:
        """XLA's bytes on the host, or else the arithmetic's."""
        # the buffers that a disk is read into are no compiler's business, nor are moments that wait for their layers' turn
        if self.need.disk or (self.headline.task != "generate" and tuning.task(self.headline.task).sampled):
            return self.need.host
        return max((p.host for p in self.proofs), default=self.need.host)

    @property
    def off(self) -> float | None:
        """By what part of the arithmetic's bytes XLA's are more; None where nothing was compiled."""
        return None if self.compiled is None else self.compiled / self.need.device - 1

    @property
    def apart(self) -> bool:
        """Whether the two differ by more than a plan promises."""
        return self.off is not None and abs(self.off) > PROMISED

    @property
    def budget(self) -> int:
        """Bytes of the device that may be used."""
        whole = max((p.device for p in self.baseline_proofs), default=self.baseline)
        if whole:
            return int(self.headline.share * whole)
        return self.card.usable if self.headline.budget is None else self.headline.budget

    @property
    def fits_device(self) -> bool:
        return self.device <= self.budget

    @property
    def fits_host(self) -> bool:
        return self.headline.ram is None or self.host <= self.headline.ram

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the compiled programs."""
        return tuple(
            f"{p.program}: {said}" for p in (*self.proofs, *self.baseline_proofs) for said in p.report.problems
        )

    def note(self) -> str:
        return self.headline.note.format(**self.said)

    def needs(self) -> str:
        return self.headline.needs.format(**self.said)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: bytes and seconds."""
        h = self.headline
        return {
            "name": h.name, "claim": h.claim, "paper": h.paper, "arxiv": h.arxiv, "model": h.model_name,
            "config": dict(h.model), "task": h.task, "tile": h.tile, "card": self.card.name, "machine": h.machine,
            "batch": h.batch, "context": h.context, "plan": dataclasses.asdict(h.plan), "budget": self.budget, "ram": h.ram,
            "arithmetic": dataclasses.asdict(self.need) | {"device": self.need.device, "host": self.need.host},
            "compiled": [
                {"program": p.program, "device": p.device, "host": p.host, "temporaries": p.temporaries,
                 "seconds": p.seconds}
                for p in self.proofs
            ],
            "off": self.off,
            "baseline": max((p.device for p in self.baseline_proofs), default=self.baseline) or None,
            "fits": self.fits, "fits_device": self.fits_device, "fits_host": self.fits_host, "note": self.note(),
            "needs": self.needs(), "problems": list(self.problems), "seconds": self.seconds,
        }  # fmt: skip


def bytes_of(task: str, arch: Architecture, plan: Plan, card: Card, batch: int, length: int, tile: int = 0) -> Need:
    """What a task needs, by arithmetic."""
    if task == "generate":
        return need(arch, plan, batch=batch, context=length, wide=card.wide)
    return tuning.need(arch, plan, tuning.task(task, tile=tile), batch=batch, context=length)


def held_alone(arch: Architecture, plan: Plan, card: Card) -> tuple[float, float]:
    """Parameters whose weights fill a card: any; those of embeddings, head and as many whole layers as it holds."""
    weights, size = weight_bytes(arch, plan), jnp.dtype(plan.dtype).itemsize
    layers = max(0, card.usable - weights["outer"]) // weights["largest_layer"]
    return card.usable / size, (weights["outer"] + layers * weights["largest_layer"]) / size


def quantities(headline: Headline, arch: Architecture, needed: Need, length: int) -> dict[str, str]:
    """The fields of a note: bytes of its parts, as they are shown."""
    plan, batch = headline.plan, headline.batch
    size = jnp.dtype(plan.dtype).itemsize
    hidden = arch.outer()[1]["embedding"].shape[1]
    tokens = arch.chunk(plan.chunk, length) or length

    on_host = dataclasses.replace(plan, home="host", form="", resident=0, kept=0, resident_form="")
    found = {
        "dense": weight_bytes(arch, dataclasses.replace(plan, weights="dense"))["layers"],
        "layer": weight_bytes(arch, plan)["largest_layer"], "host": needed.host, "disk": needed.disk, "outer": needed.outer,
        "cache": needed.cache, "stream": 2 * batch * length * hidden * size,
        "least": bytes_of(
            headline.task, arch, on_host, find(headline.card), batch, length, headline.tile
        ).device, "resident_bytes": needed.resident,
        "activations": needed.activations, "gradients": needed.gradients, "optimizer": needed.optimizer,
        "trained": needed.trained,
    }  # fmt: skip
    count = sum(math.prod(s.shape) for s in arch.specs().values())
    alone, whole = held_alone(arch, dataclasses.replace(plan, weights="dense"), find(headline.card))
    return {n: show_bytes(b) for n, b in found.items()} | {
        "dtype": plan.dtype, "alone": f"{alone / 1e9:.1f} B", "times": f"{count / alone:.1f}",
        "alone_whole": f"{whole / 1e9:.1f} B", "times_whole": f"{count / whole:.1f}",
        "chunk": str(tokens), "length": str(length),
        "resident": str(plan.resident), "kept": str(plan.kept), "layers": str(arch.num_layers),
    }  # fmt: skip


def against_lora(headline: Headline, arch: Architecture, needed: Need, length: int) -> dict[str, str]:
    """The fields of a note on what LoRA is held against: the rank from which LoRA needs more, with this row's optimizer and
    with adafactor, and the bytes with that."""
    asked: Any = {"batch": headline.batch, "context": length}
    assert headline.baseline is not None
    base = headline.baseline

    def lora(rank: int) -> int:
        return tuning.need(arch, base, tuning.task("lora", rank=rank), **asked).device

    def from_rank(size: int) -> str:
        return str(bisect.bisect_right(range(2**16), size, lo=1, key=lora))

    small = tuning.need(arch, headline.plan, tuning.task(headline.task, optimizer="adafactor"), **asked).device
    return {"rank": from_rank(needed.device), "adafactor": show_bytes(small), "adafactor_rank": from_rank(small)}


def figures(headline: Headline, *, compiled: bool) -> Figures:
    """What one claim needs here. compiled: also by XLA's GPU compiler, which must be installed."""
    start = time.perf_counter()
    arch, card = architecture(headline.model), find(headline.card)
    length = headline.context
    if headline.task == "generate":
        length = bucket(length, least=64)  # as a call pads it
    needed = bytes_of(headline.task, arch, headline.plan, card, headline.batch, length, headline.tile)
    baseline, proofs, baseline_proofs, like = 0, (), (), headline.like or headline.task
    if headline.baseline is not None:
        baseline = bytes_of(like, arch, headline.baseline, card, headline.batch, length).device
    if compiled:
        asked: dict[str, Any] = {"batch": headline.batch, "length": length}
        proofs = prove(arch, headline.plan, card, task=tuning.asked(headline.task, tile=headline.tile), **asked)
        if headline.baseline is not None:
            baseline_proofs = prove(arch, headline.baseline, card, task=tuning.asked(like), **asked)
    said = quantities(headline, arch, needed, length)
    if headline.like == "lora":
        said |= against_lora(headline, arch, needed, length)
    seconds = time.perf_counter() - start
    return Figures(headline, card, needed, proofs, baseline, baseline_proofs, said, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def chosen(names: tuple[str, ...]) -> list[Headline]:
    """The claims of these names, all if there are none."""
    known = {h.name: h for h in HEADLINES}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
            raise click.BadParameter(
                f"there is no claim {name!r}; the nearest is {near!r}, and all are {', '.join(known)}",
                param_hint="--only",
            )
    return [known[name] for name in dict.fromkeys(names)] or list(HEADLINES)


def compiled_where(why: str | None) -> str:
    """On what the figures were made."""
    here = f"jax {jax.__version__} on the CPU of this machine ({platform.machine()})"
    if why is not None:
        return f"{here}: arithmetic alone, {why}"
    return f"{here}: compiled for each card by XLA's GPU compiler, nothing run on a GPU"


def show(console: Console, rows: list[Figures]) -> None:
    """The table, and each claim's note below it. The answer stands beside the claim, and a narrow console cuts the last."""
    claim, fits = Column("claim", min_width=26), Column("fits", min_width=6)
    table = Table(claim, fits, "card", "budget", "arithmetic", "XLA", "host (RAM)", "s", box=box.SIMPLE_HEAD)
    for f in rows:
        xla = "-" if f.compiled is None else show_bytes(f.compiled) + (" !" if f.apart else "")
        host = show_bytes(f.host) + ("" if f.headline.ram is None else f" ({show_bytes(f.headline.ram)})")
        fits = "yes" if f.fits else "device only" if f.fits_device else "no"
        table.add_row(
            f"[bold]{f.headline.name}[/bold]: {f.headline.claim}", fits, f.card.name, show_bytes(f.budget),
            show_bytes(f.need.device), xla, host, f"{f.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    for f in rows:
        h = f.headline
        rules = f"{h.plan.dtype}, weights {h.plan.weights}, home {h.plan.home}"
        rules += (
            f", KV {h.plan.kv_codec}"
            if h.task == "generate"
            else f", task {h.task}{f' in tiles of {h.tile}' if h.tile else ''}, remat {h.plan.remat or 'full'}"
        )
        asked = f"{h.model_name}, {h.batch} x {h.context} tokens, {rules}"
        lines = [f"{h.name}: {h.paper} (arXiv:{h.arxiv})", f"  {asked}. The paper: {h.machine}.", f"  {f.note()}"]
        lines += [f"  Needs {f.needs()}."] if h.needs else []
        if f.apart and f.off is not None:
            more = f"{abs(f.off):.1%} {'more' if f.off > 0 else 'less'}"
            lines += [f"  ! XLA's bytes are {more} than the arithmetic's; a plan promises {PROMISED:.0%}."]
        lines += [f"  Wrong: {problem}" for problem in f.problems]
        console.print("\n".join(lines), highlight=False, markup=False)


@click.command(**SETTINGS)
@click.option("--only", metavar="NAME", multiple=True, show_default="all", help="A claim; may be given several times.")
@click.option(
    "--compile/--no-compile", "proved", default=True, help="Compile for the cards, if XLA's compiler is there."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reported()
def main(only: tuple[str, ...], proved: bool, as_json: bool) -> None:
    """Print what papers claim to fit in small memory, and what it needs here.

    No card is needed, none is used, and nothing is allocated. Ends with status 1 if a compiled program does what it
    should not: copies a whole stack, reads a layer at a wrong address. A claim that is not reached is no error.
    """
    why = aot.missing() if proved else "as asked"
    rows = []
    with Console(stderr=True).status("") as status:
        for headline in chosen(only):
            status.update(f"{headline.name}: {headline.model_name} for a {headline.card}")
            rows.append(figures(headline, compiled=why is None))
    if as_json:
        print(json.dumps({"made_by": compiled_where(why), "claims": [f.to_dict() for f in rows]}, indent=2))
    else:
        # a pipe has no width of its own, and rich takes 80 columns for it
        console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
        console.print(compiled_where(why), highlight=False)
        show(console, rows)
    if any(f.problems for f in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # compiles for a GPU, and leaves one that is here alone
    start_jax()
    main()
