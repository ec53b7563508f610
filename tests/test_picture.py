"""The picture of a plan: every byte of every candidate is drawn, at its length, and words do not cover each other."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from checkpoints import CheckpointError
from jaxengine import picture
from jaxengine.architecture import architecture
from jaxengine.plan import Plan, show_bytes
from jaxengine.planning import Outcome, plan_for
from pallas_kernels.cards import find

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}  # fmt: skip
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip
TINY = LLAMA_3_8B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
DENSE, INT8 = Plan(dtype="bfloat16"), Plan(dtype="bfloat16", weights="int8", kv_codec="int8")
BY_NUMBERS = "sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128"
GB = 10**9

GIVEN: dict[str, tuple[dict[str, Any], Plan, str, dict[str, Any]]] = {
    "8B split": (LLAMA_3_8B, DENSE, "rtx4090", {"memory": 12 * GB, "ram": 64 * GB, "batch": 4, "context": 8192}),
    "8B all of the card": (LLAMA_3_8B, DENSE, "rtx4090", {}),
    "70B compressed": (LLAMA_3_70B, INT8, "rtx4090", {"ram": 64 * GB, "context": 4096}),
    "nothing fits": (LLAMA_3_8B, DENSE, "rtx4090", {"memory": 3 * GB, "ram": 8 * GB, "context": 4096}),
    "far below": (LLAMA_3_8B, DENSE, "h200", {"ram": 512 * GB, "batch": 8, "context": 8192}),
    "small": (TINY, DENSE, BY_NUMBERS, {"memory": GB}),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {
        name: plan_for(architecture(raw), plan, find(card), **given) for name, (raw, plan, card, given) in GIVEN.items()
    }


@pytest.fixture(params=GIVEN)
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Outcome]) -> Outcome:
    return outcomes[request.param]


def bars(figure: Figure) -> dict[tuple[str, int, str], Rectangle]:
    """By (tier, row, field)."""
    found = {}
    for axes in figure.axes:
        for patch in axes.patches:
            if isinstance(patch, Rectangle) and (gid := patch.get_gid()):
                tier, row, field = gid.split(":")
                found[tier, int(row), field] = patch
    return found


def words(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text() and t.get_visible()]


def test_every_byte_is_drawn(outcome: Outcome) -> None:
    drawn = bars(picture.figure(outcome))
    for row, candidate in enumerate(outcome.candidates):
        for field in dataclasses.fields(candidate.need):
            n = getattr(candidate.need, field.name)
            found = [b for (_, r, f), b in drawn.items() if (r, f) == (row, field.name)]
            # a tier may be left out where no candidate has anything there
            assert [b.get_width() for b in found] == [n] or (not found and n == 0)
        pieces = [b for (tier, r, f), b in drawn.items() if (tier, r) == ("device", row) and f != "over"]
        assert pieces[0].get_x() == 0
        for one, after in itertools.pairwise(pieces):
            assert one.get_x() + one.get_width() == after.get_x()
        assert pieces[-1].get_x() + pieces[-1].get_width() == candidate.need.device
        over = drawn.get(("device", row, "over"))
        assert (over.get_width() if over else 0) == max(0, candidate.need.device - outcome.memory)


def test_limits_are_lines_at_their_bytes(outcome: Outcome) -> None:
    lines = {line.get_gid(): line for axes in picture.figure(outcome).axes for line in axes.lines if line.get_gid()}
    assert np.asarray(lines["device:limit"].get_xdata()).tolist() == [outcome.memory] * 2
    assert ("host:limit" in lines) == (outcome.ram is not None)
    if outcome.ram is not None:
        assert np.asarray(lines["host:limit"].get_xdata()).tolist() == [outcome.ram] * 2


def test_the_words_say_what_was_chosen_and_refused(outcome: Outcome, tmp_path: Path) -> None:
    picture.draw(outcome, tmp_path / "plan.svg")
    tree = ElementTree.parse(tmp_path / "plan.svg")
    said = ["".join(e.itertext()) for e in tree.iter("{http://www.w3.org/2000/svg}text")]
    for candidate in outcome.candidates:
        assert candidate.label() in said
        assert not candidate.refused or f"refused: {candidate.refused}" in said
    assert any(s.startswith(f"memory {show_bytes(outcome.memory)}") for s in said)
    assert any(f"batch {outcome.batch} × context {outcome.context}" in s for s in said)
    assert outcome.card.name in said
    assert sum(s.startswith("chosen: ") for s in said) == (outcome.chosen is not None)
    assert any(s.startswith("Nothing fits") for s in said) == (outcome.chosen is None)
    for change, _ in outcome.changes:
        assert any(s.strip().startswith(f"{change}: ") for s in said)


def test_lengths_in_the_file_are_the_bytes(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    found = outcomes["8B all of the card"]
    picture.draw(found, tmp_path / "plan.svg")
    lengths = {}
    for group in ElementTree.parse(tmp_path / "plan.svg").iter("{http://www.w3.org/2000/svg}g"):
        if re.fullmatch(r"device:\d+:[a-z]+", group.get("id", "")) and "over" not in group.get("id", ""):
            xs = [float(x) for path in group for x in re.findall(r"[ML] ([0-9.]+) ", path.get("d", ""))]
            lengths[group.get("id", "")] = max(xs) - min(xs)
    total = sum(n for g, n in lengths.items() if g.startswith("device:0:"))
    assert total > 100
    for row, candidate in enumerate(found.candidates):
        for field in ("outer", "resident", "streaming", "cache", "activations"):
            expected = total * getattr(candidate.need, field) / found.candidates[0].need.device
            assert lengths[f"device:{row}:{field}"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 8) for name in GIVEN), ("8B split", 3), ("nothing fits", 5), ("small", 1)]
)
def test_no_words_cover_each_other(outcomes: dict[str, Outcome], name: str, count: int) -> None:
    outcome = outcomes[name]
    most = tuple(itertools.islice(itertools.cycle(outcome.candidates), count))
    figure = picture.figure(dataclasses.replace(outcome, candidates=most))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # a legend has its place from then on
    renderer = canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words(figure)]
    assert len(boxes) > 3 * count
    for (said, box), (other, another) in itertools.combinations(boxes, 2):
        apart = (
            box.x1 <= another.x0 + 1 or another.x1 <= box.x0 + 1 or box.y1 <= another.y0 + 1 or another.y1 <= box.y0 + 1
        )
        assert apart, f"{said!r} and {other!r}"
    for said, box in boxes:
        assert box.x0 >= 0, said
        assert box.x1 <= figure.bbox.width, said
        assert box.y0 >= 0, said
        assert box.y1 <= figure.bbox.height, said


def test_a_field_that_is_added_to_need_is_drawn(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["8B split"]

    @dataclasses.dataclass(frozen=True)
    class More(type(found.candidates[0].need)):
        another: int = 0
        second_host: int = 0

        @property
        def device(self) -> int:
            return super().device + self.another

    def more(row: int, need: Any) -> More:
        return More(**dataclasses.asdict(need), another=(row + 1) * GB, second_host=row * GB)

    wider = tuple(dataclasses.replace(c, need=more(i, c.need)) for i, c in enumerate(found.candidates))
    found = dataclasses.replace(found, candidates=wider)
    assert picture.tiers(wider[0])["second_host"] == ("second_host",)
    assert "another" in picture.tiers(wider[0])["device"]
    figure = picture.figure(found)
    drawn, said = bars(figure), [t.get_text() for t in words(figure)]
    assert drawn["device", 2, "another"].get_width() == 3 * GB
    assert drawn["second_host", 2, "second_host"].get_width() == 2 * GB
    assert {"another", "second host"} <= set(said)
    colours = [drawn["device", 2, f].get_facecolor() for f in picture.tiers(wider[0])["device"]]
    assert len(set(colours)) == len(colours)


def test_every_field_of_need_has_a_name_and_a_colour(outcomes: dict[str, Outcome]) -> None:
    names = {f.name for f in dataclasses.fields(outcomes["small"].candidates[0].need)}
    assert names == set(picture.SAID) == set(picture.COLOURS)
    assert len(set(picture.COLOURS.values())) == len(picture.COLOURS)
    assert set(picture.tiers(outcomes["small"].candidates[0])) == set(picture.TITLES)


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_the_same_plan_gives_the_same_file(outcomes: dict[str, Outcome], tmp_path: Path, name: str) -> None:
    picture.draw(outcomes["8B split"], tmp_path / "a" / name)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        picture.draw(outcomes["8B split"], tmp_path / "b" / name)
        assert dict(matplotlib.rcParams) == before
    one, other = (tmp_path / "a" / name).read_bytes(), (tmp_path / "b" / name).read_bytes()
    assert one == other
    assert one.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert [p.name for p in (tmp_path / "a").iterdir()] == [name]


def test_a_picture_is_replaced_whole_or_not_at_all(
    outcomes: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plan.png"
    picture.draw(outcomes["8B split"], target)
    picture.draw(outcomes["small"], target)
    kept = target.read_bytes()

    def half(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    for name in ("plan.png", "new.png"):
        with pytest.raises(OSError, match="No space"):
            picture.draw(outcomes["8B split"], tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]
    assert target.read_bytes() == kept


def test_bad_names_are_refused(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    for name in ("plan.pdf", "plan", "plan.svg.gz", ""):
        with pytest.raises(ValueError, match=r"\.svg or \.png.*plan\.svg"):
            picture.check(tmp_path / name if name else "")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        picture.draw(outcomes["small"], tmp_path / "plan.pdf")
    picture.check("PLAN.SVG")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        picture.draw(outcomes["small"], tmp_path / "folder.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.svg"]


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = (
        "import sys; from jaxengine import picture; assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try: picture.check('plan.svg')\n"
        "except ValueError as error: assert 'pip install matplotlib' in str(error) and 'jaxengine[notebook]' in str(error)\n"
        "else: raise SystemExit('not refused')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pyplot_is_left_alone(tmp_path: Path, outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would raise
    picture.draw(outcomes["small"], tmp_path / "plan.svg")
    picture.draw(outcomes["small"], tmp_path / "plan.png")
