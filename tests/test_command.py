"""The command as it is typed, in processes of its own: what it prints, where, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def run(*words: str, stdin: str = "", cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, input=stdin, env=environment, cwd=ROOT, check=False
    )


def test_help_lists_the_commands() -> None:
    shown = run("-m", "jaxengine.command", "--help")
    assert shown.returncode == 0
    assert "generate" in shown.stdout
    assert "convert" in shown.stdout


def test_scripts_are_the_commands() -> None:
    for name in ("generate", "convert"):
        ours, script = run("-m", "jaxengine.command", name, "--help"), run(f"scripts/{name}.py", "--help")
        assert script.returncode == 0
        assert [line for line in ours.stdout.splitlines() if line.startswith("  -")] == [
            line for line in script.stdout.splitlines() if line.startswith("  -")
        ]


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    for words in (
        ("generate", str(tmp_path), "hello"),
        ("generate", str(GOLDEN / "llama"), "hello"),
        ("generate", str(GOLDEN / "llama"), "hello", "--memory", "1kB"),
        ("convert", str(GOLDEN / "llama"), str(GOLDEN / "llama"), "--to", "hf"),
        ("convert", str(GOLDEN / "llama"), str(tmp_path / "x"), "--to", "gguf"),
    ):
        done = run("-m", "jaxengine.command", *words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_a_folder(tmp_path: Path) -> None:
    done = run("scripts/convert.py", str(GOLDEN / "llama"), str(tmp_path / "out"), "--to", "hf", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.6 * (
        GOLDEN / "llama" / "model.safetensors"
    ).stat().st_size


def test_text_from_the_demo_and_programs_are_kept(tmp_path: Path) -> None:
    """Streamed text, JSON lines from standard input, and a compilation cache that the second run finds."""
    words = ("-m", "jaxengine.command", "generate", "demo", "import ", "--max-new-tokens", "12")
    first = run(*words, cache=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert len(first.stdout.strip()) > len("import ")
    kept = {p.name for p in (tmp_path / "jaxengine" / "xla").iterdir()}
    assert any("jit_decode" in n for n in kept)
    again = run(*words[:4], "-", *words[5:], "--json", stdin="import ", cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert first.stdout == "import " + json.loads(again.stdout)["text"] + "\n"
    assert {n for n in kept if "jit_decode" in n and n.endswith("-cache")} >= {
        p.name
        for p in (tmp_path / "jaxengine" / "xla").iterdir()
        if "jit_decode" in p.name and p.name.endswith("-cache")
    }
