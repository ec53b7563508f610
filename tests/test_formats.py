"""What a user may write for a weight format, and what is refused. A format of our own stands for the ones with options."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jaxengine import formats, technique
from jaxengine.plan import Plan


def encode(w: Any, *, out: int, group_size: int = 128, affine: bool = False, scale: str = "bfloat16") -> Any:
    return ("encoded", w, out, group_size, affine, scale)


def leaf_axes(axes: Any, out: int, group_size: int = 128, affine: bool = False, scale: str = "bfloat16") -> Any:
    return (axes, out, group_size, affine, scale)


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"group_size": (32, 64, 128), "affine": (False, True), "scale": ("bfloat16", "float16")}
    module: Any = SimpleNamespace(encode=encode, leaf_axes=leaf_axes, OPTIONS=options)
    real = technique.find

    def found(package: str, name: str) -> ModuleType:
        return module if name == "grouped" else real(package, name)

    formats.find.cache_clear()
    monkeypatch.setattr(technique, "find", found)
    yield
    formats.find.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grouped", "grouped"),
        ("grouped:group_size=64", "grouped:group_size=64"),
        ("grouped:group_size=128", "grouped"),  # the default
        ("grouped:affine=TRUE, group_size=32", "grouped:group_size=32,affine=true"),  # one order, whatever was written
        ("grouped:scale=float16", "grouped:scale=float16"),
    ],
)
def test_equal_choices_are_equal(grouped: None, text: str, said: str) -> None:
    assert str(formats.find(text)) == said
    assert formats.find(text) == formats.find(said)
    assert Plan(weights=text) == Plan(weights=said)
    assert Plan(weight_rules=(("lm_head", text),)).weight_rules == (("lm_head", said),)
    assert Plan.from_json(Plan(weights=text).to_json()) == Plan(weights=text)


def test_options_arrive(grouped: None) -> None:
    found = formats.find("grouped:affine=true,group_size=64")
    assert found.encode("w", out=2) == ("encoded", "w", 2, 64, True, "bfloat16")
    assert found.leaf_axes(("mlp", "embed"), 1) == (("mlp", "embed"), 1, 64, True, "bfloat16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grouped:group_size=48", "group_size is '48'; it can be 32, 64, 128"),
        (
            "grouped:group=64",
            "no option 'group'; its options are group_size, affine, scale. Did you mean 'group_size'?",
        ),
        ("grouped:affine", "affine is ''; it can be false, true"),
        ("grouped:", "no option ''"),
        ("grouped:affine=true,affine=false", "affine is given twice"),
        ("dense:group_size=64", "dense has no option 'group_size'; it has no options"),
        ("int9", "There is no 'int9'.*Did you mean 'int"),
    ],
)
def test_what_there_is_not_is_refused_by_name(grouped: None, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        formats.find(text)
    with pytest.raises(ValueError, match=said):
        Plan(weights=text)
