"""Notebooks are run, not only parsed: every cell, in a kernel of its own. Needs the `notebook` extra."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "scripts" / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings(
    "default"
)  # the kernel's own machinery (zmq, asyncio) warns; the notebook's code runs elsewhere
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    printed = [o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])]
    assert any("home" in text for text in printed)
    assert any("pinned_host" in text for text in printed)
    assert any("temporary" in text for text in printed)
