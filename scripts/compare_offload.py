"""What running a model larger than memory takes here, and in transformers with accelerate: steps, bytes, seconds, answers.

    python scripts/compare_offload.py --folder /where/there/is/room --size 1GB

A random Llama is made, and every side runs on it in a process of its own: the lines that a user would type are the data
below, counted and executed. Every round runs each side twice: a load with nothing left from before (here packing is paid),
then a second load and greedy decoding. Medians over rounds are shown. All of it holds for a CPU only, where the device and
the host have one memory, so that home='host' is no more than a label.

    peak     resident memory (VmHWM) above what the imports took; `anonymous`, of it, is what the system cannot drop again:
             the rest are pages of mapped files. Compiling is in it
    pass     one new token with the page cache of the model's files dropped (posix_fadvise) before, and the bytes that it
             had read from disk (/proc/self/io; layers that jaxengine had read ahead are not in it): what each token costs
             once the model is larger than free memory. Mapped pages in use, as plain transformers' are, cannot be dropped
    tokens/s decoding with whatever the page cache keeps, which is all of a model that fits. jaxengine reads a store past
             the page cache and takes nothing from it, so that of a model that fits it shows the worse side of that trade

All of accelerate's map on disk is embedding and head too, which jaxengine keeps. The last table asks each for less than can
work, and says whether an answer comes before weights are read. Needs Linux, torch, transformers and accelerate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jaxengine.command import SETTINGS, reported
from jaxengine.machine import free_disk

PROMPT = [1, 17, 4, 99, 3, 250, 8, 31]
VOCAB = 8192
A_FOLDER = click.Path(exists=True, file_okay=False, writable=True, path_type=Path)


@dataclasses.dataclass(frozen=True)
class Side:
    """What a user types; `folder`, `scratch`, `ids`, `new`, `half`, `layers`, `small` and `config` are given."""

    name: str
    imports: str
    load: str
    answer: str = ""

    @property
    def lines(self) -> list[str]:
        return "\n".join((self.imports, self.load, self.answer)).strip().splitlines()

    def begin(self, given: dict[str, Any]) -> dict[str, Any]:
        """The names that its lines see, all that is imported late imported now, before memory is counted."""
        space, theirs = dict(given), "import accelerate, torch, transformers.models.llama.modeling_llama"
        exec("import jax, jaxengine; jax.devices(); jaxengine.load" if "jaxengine" in self.imports else theirs, space)
        exec(self.imports, space)
        return space


OURS, LOAD = "import jaxengine", "model = jaxengine.load(folder"
SAID = "tokens = model.generate(ids, max_new_tokens=new)[0].tokens"
MODEL, OFFLOAD = "from transformers import AutoModelForCausalLM", "from accelerate import disk_offload"
THEIRS, READ = f"import torch\n{MODEL}", "model = AutoModelForCausalLM.from_pretrained(folder"
AUTO = f"{READ}, device_map='auto', offload_folder=scratch"
GIVEN = "tokens = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids):].tolist()"
SIDES = [
    Side("jaxengine, disk", OURS, f"{LOAD}, home='disk')", SAID),
    Side("accelerate, all on disk", THEIRS, f"{READ}, device_map={{'': 'disk'}}, offload_folder=scratch)", GIVEN),
    Side("accelerate, disk_offload", f"{THEIRS}\n{OFFLOAD}", f"{READ})\nmodel = disk_offload(model, scratch)", GIVEN),
    Side("jaxengine, half kept", OURS, f"{LOAD}, home='disk', kept=layers // 2)", SAID),
    Side("accelerate, half on cpu", THEIRS, f"{AUTO}, max_memory={{'cpu': half}})", GIVEN),
    Side("jaxengine, host", OURS, f"{LOAD}, home='host')", SAID),
    Side("transformers", THEIRS, f"{READ})", GIVEN),
]
COMMAND = "app(f'plan {config} --gpu t4 --memory {small} --no-compile'.split(), standalone_mode=False)"
EMPTY = "from accelerate import infer_auto_device_map, init_empty_weights"
MAP = """with init_empty_weights():
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
print(infer_auto_device_map(model, {'cpu': small}, no_split_module_classes=['LlamaDecoderLayer']))"""
BASE, ORACLE = SIDES[0].name, SIDES[-1].name
TOO_SMALL = [
    Side("jaxengine, load(memory=)", OURS, f"{LOAD}, memory=small)", SAID),
    Side("jaxengine plan (of config.json alone)", "from jaxengine.command import app", COMMAND),
    Side("accelerate, max_memory=", THEIRS, f"{AUTO}, max_memory={{'cpu': small}})", GIVEN),
    Side("accelerate, infer_auto_device_map (the same)", f"{EMPTY}\n{MODEL}, AutoConfig", MAP),
]


def make(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of random weights."""
    from jaxengine.architecture import architecture, initialise
    from jaxengine.loading import from_arrays
    from jaxengine.plan import Plan

    arch = architecture(config)
    from_arrays(arch, Plan(dtype="float32"), initialise(arch, 0), config).save(folder)


def counted(file: str, *names: str) -> list[int]:
    """Numbers of /proc/self/FILE by name, in bytes."""
    found = dict(line.split(":", 1) for line in Path("/proc/self", file).read_text().splitlines())
    return [int(found[n].split()[0]) * (1024 if "kB" in found[n] else 1) for n in names]


class Peak:
    """Bytes above what is resident now: peak of all, by the system; of anonymous memory, looked at every few ms."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # where it is not allowed, the highest so far counts
            Path("/proc/self/clear_refs").write_text("5")
        self._was = counted("status", "VmRSS", "RssAnon")
        self._highest = self._was[1]
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._highest = max(self._highest, *counted("status", "RssAnon"))
            time.sleep(0.005)

    def read(self) -> dict[str, int]:
        return {"peak": counted("status", "VmHWM")[0] - self._was[0], "peak_anonymous": self._highest - self._was[1]}


def drop_cache(*folders: str) -> None:
    """Give up the cached pages of all files in these folders."""
    for path in (p for folder in folders for p in Path(folder).rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(side: Side, given: dict[str, Any], answers: bool) -> dict[str, Any]:
    """Run a side's lines: its load alone, or its answers too."""
    space, new, peak = side.begin(given), given["new"], Peak()

    def timed(code: str, tokens: int = 1, cold: bool = False) -> float:
        if cold:
            drop_cache(given["folder"], given["scratch"])
        space["new"], start = tokens, time.perf_counter()
        exec(code, space)
        return time.perf_counter() - start

    found: dict[str, Any] = {"load_s": timed(side.load, cold=True)}
    if answers:
        found["first_answer_s"] = timed(side.answer, new)  # programs are compiled here
        found["tokens"] = space["tokens"]
        (before,) = counted("io", "read_bytes")
        found["pass_s"] = timed(side.answer, cold=True)
        found["pass_read"] = counted("io", "read_bytes")[0] - before
        one = timed(side.answer)
        found["tokens_per_s"] = (new - 1) / (timed(side.answer, new) - one)
    return found | peak.read()


def ask(side: Side, given: dict[str, Any]) -> dict[str, Any]:
    """What comes of a budget that is too small: an answer, or else a load and tokens all the same."""
    space = side.begin(given | {"new": 2})
    peak, printed, refused, start = Peak(), io.StringIO(), False, time.perf_counter()
    try:
        with contextlib.redirect_stdout(printed):
            exec(side.load, space)
    except (Exception, SystemExit) as error:  # exit status 1 is `jaxengine plan` saying that nothing fits
        refused = True
        print(error if isinstance(error, Exception) else "", file=printed)
    found = {"refused": refused, "said": printed.getvalue().strip(), "seconds": time.perf_counter() - start}
    if runs := not refused and bool(side.answer):
        exec(side.answer, space)
    return found | {"runs": runs} | peak.read()


def run(side: Side, scratch: Path, given: dict[str, Any], **how: Any) -> dict[str, Any]:
    """`measure` or `ask` in a process of its own, without GPU and network. Caches are kept in `scratch`."""
    own = {"XDG_CACHE_HOME": str(scratch), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--task", json.dumps([side.name, {"given": given, **how}])]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side.name} failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("said") == "":  # what was logged
        found["said"] = "\n".join(line for line in done.stderr.splitlines() if "%|" not in line)
    return found


def shape(size: int) -> dict[str, Any]:
    """A Llama's config of about `size` bytes in float32, of at least 8 layers."""
    for D in (4096, 2048, 1024, 512, 256, 128, 64):
        F, outer = D * 11 // 4, 8 * VOCAB * D
        layer = 4 * (5 * D * D // 2 + 3 * F * D)
        if (layers := round((size - outer) / layer)) >= 8:
            return {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": D,
                "intermediate_size": F, "num_hidden_layers": layers, "num_attention_heads": D // 64, "head_dim": 64,
                "num_key_value_heads": max(1, D // 256), "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32",
                "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
            }  # fmt: skip
    raise click.UsageError(f"--size is {size} bytes; the smallest model made here takes {outer + 8 * layer}")


def compare(place: Path, config: dict[str, Any], new: int, rounds: int) -> dict[str, Any]:
    """All that is measured; 'sides' and 'too_small' by name."""
    folder, alone, scratch = place / "model", place / "config", place / "scratch"
    make(folder, config)
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    size = sum(p.stat().st_size for p in folder.iterdir())
    small = 4 * VOCAB * config["hidden_size"]  # the embedding, without a head or any layer
    given = {"folder": str(folder), "config": str(alone), "scratch": str(scratch), "ids": PROMPT, "new": new}
    given |= {"half": size // 2, "small": small, "layers": config["num_hidden_layers"]}
    rows: dict[str, list[dict[str, Any]]] = {side.name: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            found = {f"first_{k}": v for k, v in run(side, scratch, given, answers=False).items()}
            found["written"] = sum(p.stat().st_size for p in scratch.rglob("*") if p.is_file())
            rows[side.name].append(found | run(side, scratch, given, answers=True))
    sides: dict[str, Any] = {}
    for side, found in zip(SIDES, rows.values(), strict=True):
        base = [r["tokens_per_s"] for r in rows[BASE]]
        sides[side.name] = {k: statistics.median(r[k] for r in found) for k in found[0] if k != "tokens"} | {
            "of_base": statistics.median(r["tokens_per_s"] / b for r, b in zip(found, base, strict=True)),
            "same_tokens": all(r["tokens"] == rows[ORACLE][0]["tokens"] for r in found),
            "lines": side.lines,
            "rounds": found,
        }
    asked = {s.name: run(s, scratch, given) | {"lines": s.lines} for s in TOO_SMALL}
    machine = f"{os.uname().machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    about = {"bytes": size, "config": config, "small": small, "machine": machine, "rounds": rounds}
    return about | {"sides": sides, "too_small": asked}


def show(found: dict[str, Any]) -> None:
    """Three tables: what a side needs, how fast it is, what it answers; then what is typed, and what is said."""
    console, many = Console(), f"medians of {found['rounds']} rounds"
    console.print(f"{found['bytes'] / 1e9:.2f} GB of float32; {found['machine']}; {many}; CPU only")
    needs = Table("side", "lines", "first load s", "load s", "MB written", "first peak MB", "peak MB", "anonymous MB")
    speed = Table("side", "first answer s", "pass s", "MB read", "tokens/s", f"of {BASE}", f"as {ORACLE}")
    for name, r in found["sides"].items():
        sizes = [f"{r[k] / 1e6:.0f}" for k in ("written", "first_peak", "peak", "peak_anonymous", "pass_read")]
        needs.add_row(name, str(len(r["lines"])), f"{r['first_load_s']:.1f}", f"{r['load_s']:.1f}", *sizes[:4])
        rates = [f"{r[k]:.2f}" for k in ("tokens_per_s", "of_base")]
        same = "yes" if r["same_tokens"] else "[red]no[/red]"
        speed.add_row(name, f"{r['first_answer_s']:.1f}", f"{r['pass_s']:.2f}", sizes[4], *rates, same)
    asked = Table("asked for too little", "lines", "what comes", "s", "peak MB", "anonymous MB")
    for name, r in found["too_small"].items():
        comes = "refused" if r["refused"] else "it runs" if r["runs"] else "an answer, no refusal"
        held = f"{r['peak'] / 1e6:.0f}", f"{r['peak_anonymous'] / 1e6:.0f}"
        asked.add_row(name, str(len(r["lines"])), comes, f"{r['seconds']:.1f}", *held)
    console.print(needs, speed, f"A budget of {found['small'] / 1e6:.1f} MB:", asked)
    for name, r in (found["sides"] | found["too_small"]).items():
        console.print(f"{name}:", *(f"    {line}" for line in r["lines"]), sep="\n", highlight=False, markup=False)
        console.print(f"{r['said']}\n" if "said" in r else "", highlight=False, markup=False, style="italic")


@click.command(**SETTINGS)
@click.option("--size", metavar="SIZE", default="1GB", help="Bytes of the checkpoint, about, in float32.")
@click.option(
    "--folder",
    type=A_FOLDER,
    metavar="FOLDER",
    default=tempfile.gettempdir(),
    help="Where files are made, then removed.",
)
@click.option("--new", metavar="N", type=click.IntRange(2, 40), default=8, help="Tokens decoded.")
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=3, help="Rounds, whose medians are printed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--task", hidden=True, help="One measurement, in this process.")
@reported()
def main(size: str, folder: Path, new: int, rounds: int, as_json: bool, task: str | None) -> None:
    """jaxengine's homes beside accelerate's offload: what each needs, how fast it is, and whether it answers first."""
    if task is not None:
        named, how = json.loads(task)
        side = next(s for s in SIDES + TOO_SMALL if s.name == named)
        print("\n" + json.dumps(ask(side, **how) if side in TOO_SMALL else measure(side, **how)))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxengine.plan import parse_bytes

    if missing := " ".join(m for m in ("torch", "transformers", "accelerate") if importlib.util.find_spec(m) is None):
        raise click.UsageError(f"what it compares with is not installed here: pip install {missing}")
    if not Path("/proc/self/io").exists():
        raise click.UsageError("memory and reads are counted in /proc, which this system has not: run it on Linux")
    config, room = shape(parse_bytes(size)), int(2.2 * parse_bytes(size))  # the checkpoint, and one side's copy of it
    if (free := free_disk(folder)) < room:
        raise click.UsageError(f"{folder} has {free} bytes free, and --size {size} takes {room} there")
    with tempfile.TemporaryDirectory(prefix=".compare_offload.", dir=folder) as place:
        found = compare(Path(place).absolute(), config, new, rounds)
    print(json.dumps(found, indent=2)) if as_json else show(found)


if __name__ == "__main__":
    main()
