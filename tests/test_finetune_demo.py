"""The demo checkpoint, taught what it cannot do, reaches the accuracy that scripts/finetune_demo.py's table states.

Of 100 held-out questions none is answered before; each answer is four words out of 40 in an order of their own, so that guessing
gets none either. 95 of them afterwards leave room for rounding that differs from machine to machine.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

demo = importlib.import_module("finetune_demo")

STATED, STEPS, JUDGED = 0.95, 100, 100


def test_questions_of_training_and_held_out_ones_are_apart() -> None:
    train, held = (demo.questions(split, 300) for split in ("train", "held_out"))
    assert len({p for p, _ in train} | {p for p, _ in held}) == 600
    for prompt, answer in held:
        asked = prompt.removeprefix("reverse: ").removesuffix("\n=").split()
        assert answer.split() == asked[::-1]
        assert len(set(asked)) == demo.WORDS


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["full", "lora", "qlora (nf4)", "lisa"])
def test_the_stated_accuracy_is_reached(way: str, tmp_path: Path) -> None:
    file = tmp_path / "reverse.jsonl"
    rows = ({"prompt": p, "completion": a} for p, a in demo.questions("train", 20_000))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = demo.learn(demo.WAYS[way], file, STEPS, JUDGED)
    assert found["before"] <= 0.01
    assert found["after"] >= STATED
    assert len(found["losses"]) == STEPS


def test_the_picture_has_a_line_and_a_name_for_each_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found: dict[str, dict[str, Any]] = {
        name: {"losses": [2.0 / (i + 1) for i in range(30)], "after": i / 10} for i, name in enumerate(demo.WAYS)
    }
    for file in ("a.svg", "b.svg"):
        demo.draw(found, tmp_path / file)
    text = (tmp_path / "a.svg").read_text()
    assert all(f"{name}: {row['after']:.1%}" in text for name, row in found.items())
    assert text == (tmp_path / "b.svg").read_text()  # the same losses are the same file
