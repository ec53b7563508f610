"""Who may know whom: pallas_kernels and sharding know nothing of ours, checkpoints knows sharding, jaxengine knows the
three, scripts and tests know everything. And `import jaxengine` waits for nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"jaxengine", "pallas_kernels", "sharding", "checkpoints", "scripts", "tests"}
MAY_KNOW = {
    "pallas_kernels": set(),
    "sharding": set(),
    "checkpoints": {"sharding"},
    "jaxengine": {"pallas_kernels", "sharding", "checkpoints"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(MAY_KNOW))
def test_rooms_know_only_whom_they_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        strangers = (imported(path) & OURS) - MAY_KNOW[room] - {room}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


@pytest.mark.parametrize("folder", ["models", "weights", "homes", "cache/layouts", "cache/codecs", "cache/stores"])
def test_no_technique_imports_a_sibling(folder: str) -> None:
    package = "jaxengine." + folder.replace("/", ".")
    techniques = {p.stem for p in (ROOT / "jaxengine" / folder).glob("*.py") if not p.stem.startswith("_")} - {"base"}
    assert techniques
    for path in (ROOT / "jaxengine" / folder).glob("*.py"):
        if path.stem == "base":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module} | {f"{node.module}.{a.name}" for a in node.names}
                siblings = {f"{package}.{t}" for t in techniques if t != path.stem}
                assert not names & siblings, f"{path.relative_to(ROOT)} imports {names & siblings}"


def test_import_is_light() -> None:
    code = "import sys, jaxengine; heavy = {'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_reader_of_text_does_not_wait_for_a_compiler() -> None:
    code = "import sys, jaxengine.text; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
