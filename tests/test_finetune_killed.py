"""`jaxengine finetune` killed with SIGKILL, at moments drawn anew in every test run, and given again until it ends: every loss
and gradient norm that any of its processes told, and the folder that comes out, have the bits of an unbroken run.

The moments are of three kinds: some time after the process starts (imports, reading, compiling), some time after a step, and
as soon as a checkpoint is seen being written. Losses are read from the event files by the reader of tests/test_events.py, which
knows nothing of the writer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_events import read
from test_finetune import ROOT

Told = dict[int, tuple[str, str]]  # by step, the loss and the gradient's norm, exactly
WAYS = {
    "lora": ("--rank", "4", "--eval", "0.1", "--best"),
    "all": ("--train", "all", "--home", "host", "--optimizer", "adamw8bit"),
}


class Killed:
    """The command over one folder, a process at a time."""

    def __init__(self, folder: Path, way: str, steps: int) -> None:
        self.data, self.out = folder / "sums.jsonl", folder / "out"
        rows = ({"prompt": f"{i} + {j} =", "completion": f" {i + j}"} for i in range(8) for j in range(8))
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.words = (
            sys.executable, "-W", "ignore", "scripts/finetune.py", "demo", str(self.data), "--context", "16", "--batch", "2",
            "--steps", str(steps), "--learning-rate", "1e-3", "--compute", "float32", "--save-every", "1", *WAYS[way],
        )  # fmt: skip
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        }  # fmt: skip

    def start(self, out: Path) -> subprocess.Popen[str]:
        words = (*self.words, "--out", str(out))
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, cwd=ROOT
        )

    def ends(self, out: Path) -> Told:
        """The command to its end; what it and all before it told."""
        with self.start(out) as process:
            _, said = process.communicate()
        assert process.returncode == 0, said
        return told(out)

    def kill_when(self, ready: Callable[[], bool], wait: float) -> bool:
        """Start it, and kill it so many seconds after it is ready; False where it had ended before."""
        with self.start(self.out) as process:
            while process.poll() is None and not ready():
                time.sleep(0.002)
            time.sleep(wait)
            process.kill()
            process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        return process.returncode != 0

    def written(self) -> set[Path]:
        """Checkpoints that are being written."""
        return set((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def told(out: Path) -> Told:
    """What the event files say, in which a step that was made again is the same."""
    found: Told = {}
    for path in sorted((out / "events").glob("*")):
        for step, numbers in read(path):
            if "train/loss" in numbers:
                exactly = (numbers["train/loss"].hex(), numbers["train/gradient_norm"].hex())
                assert found.setdefault(step, exactly) == exactly, f"step {step} of {path.name}"
    return found


def goes_on(tmp_path: Path, way: str, kinds: str, steps: int) -> str:
    """Kills of these kinds ('t' a time, 's' a step, 'c' a checkpoint), then the end; when they were, in words."""
    seed = time.time_ns()
    draw, run, moments = random.Random(seed), Killed(tmp_path, way, steps), []
    began = time.perf_counter()
    unbroken = run.ends(tmp_path / "unbroken")
    whole = time.perf_counter() - began
    assert sorted(unbroken) == list(range(1, steps + 1))
    for kind in kinds:
        before, held = len(told(run.out)), run.written()

        def stepped(before: int = before, more: int = draw.randrange(1, 3)) -> bool:
            try:
                return len(told(run.out)) >= min(before + more, steps)
            except (AssertionError, IndexError):  # half a record was read
                return False

        def writes(held: set[Path] = held) -> bool:
            return bool(run.written() - held)

        ready: Callable[[], bool] = {"t": lambda: True, "s": stepped, "c": writes}[kind]
        wait = draw.random() * {"t": whole / 2, "s": 0.2, "c": 0.02}[kind]
        killed = run.kill_when(ready, wait)
        moments.append(
            f"{kind} {'killed' if killed else 'ended'}, {len(told(run.out))} steps told, {len(run.written())} halves"
        )
    assert run.ends(run.out) == unbroken, f"seed {seed}: {moments}"
    name = "model/model.safetensors" if way == "all" else "adapter/adapter_model.safetensors"
    assert (run.out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), f"seed {seed}: {moments}"
    return "; ".join(moments)


def test_a_killed_command_goes_on_bit_for_bit(tmp_path: Path) -> None:
    moments = goes_on(tmp_path, "lora", "cs", steps=6)
    assert moments.count("killed") == 2


# a shell's background jobs are started without
TAKES_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("scripts/finetune.py", run_name="__main__")
"""


def test_ctrl_c_says_which_step_is_saved_and_what_to_type(tmp_path: Path) -> None:
    """And what is typed so, by a shell, goes on there. The folder's name is one that a shell has to have quoted."""
    run, out = Killed(tmp_path, "lora", steps=5000), tmp_path / "it's out"
    script = run.words.index("scripts/finetune.py")
    words = (
        *run.words[:script],
        "-c",
        TAKES_CTRL_C,
        *run.words[script + 1 :],
        "--save-every",
        "9999",
        "--out",
        str(out),
    )
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(words, env=run.environment, **streams) as process:
        assert any(line.startswith("step 1 of 5000") for line in process.stderr or ())
        process.send_signal(signal.SIGINT)
        said = process.stderr.read() if process.stderr else ""
        assert process.wait() == 130
    *_, stopped, command = said.splitlines()
    made = max(told(out))
    assert stopped == f"stopped after step {made} of 5000, which is saved in {out}. To go on, type the same again:"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [str(made)]
    assert "Traceback" not in said
    here = run.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(["bash", "-c", f"exec {command.strip()}"], env=here, **streams) as process:
        first = next((line for line in process.stderr or () if line.startswith("step ")), "nothing")
        process.kill()
    assert first.startswith(f"step {made + 1} of 5000: loss ")


@pytest.mark.skipif("MANY_KILLS" not in os.environ, reason="ten minutes: set MANY_KILLS=1 to run it")
@pytest.mark.parametrize("way", list(WAYS))
def test_a_command_that_is_killed_many_times(way: str, tmp_path: Path) -> None:
    moments = goes_on(tmp_path, way, "cscscstcst", steps=20)
    print(moments)
    assert moments.count("killed") >= 5
