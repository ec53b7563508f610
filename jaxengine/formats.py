"""A weight format by what a user writes: 'int4', or 'int4:group_size=64,affine=true'.

The name is a file of jaxengine/weights, the options are keyword arguments of its `encode`, and the values that each can
take stand in the file's OPTIONS. Nothing is parsed that does not take effect: an option that the file does not know, or a
value that it does not take, is refused with those that there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from jaxengine import technique

WEIGHTS = "jaxengine.weights"


@dataclasses.dataclass(frozen=True)
class Format:
    """A format and its options, those that were given alone; hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def module(self) -> ModuleType:
        return technique.find(WEIGHTS, self.name)

    def encode(self, w: Any, *, out: int) -> Any:
        """w [out..., in...] in this format: an array or a Weight."""
        return self.module.encode(w, out=out, **dict(self.options))

    def leaf_axes(self, axes: tuple[str | None, ...], out: int) -> Any:
        """The tree that `encode` makes, with the logical axes of each array in its place."""
        return self.module.leaf_axes(axes, out, **dict(self.options))

    def refit(self, leaf: Any) -> Any:
        """A Weight that was stored in this format, or in one of the same codes and scales, as this format has it."""
        fit = getattr(self.module, "refit", None)
        return leaf if fit is None else fit(leaf, **dict(self.options))

    def refuses(self, stored: str, dtype: str) -> str | None:
        """Why numbers of dtype `stored` are not held under a plan of dtype `dtype`; None where they are."""
        said = getattr(self.module, "refuses", None)
        return None if said is None else said(stored, dtype)

    def check(self, name: str, leaf: Any) -> None:
        """Raises ValueError where `encode` could not hold the numbers of the matrix `name`."""
        check = getattr(self.module, "check", None)
        if check is None:
            return
        try:
            check(leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def __str__(self) -> str:
        given = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.options)
        return f"{self.name}:{given}" if given else self.name


@functools.cache
def find(text: str) -> Format:
    """The format that a text names, options that are at their default left out.

    Raises ValueError for a name, an option or a value that there is not, naming those that there are.
    """
    name, colon, rest = text.partition(":")
    module = technique.find(WEIGHTS, name)
    known: dict[str, tuple[Any, ...]] = getattr(module, "OPTIONS", {})
    defaults = {n: p.default for n, p in inspect.signature(module.encode).parameters.items() if n in known}
    given = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (s.strip() for s in part.partition("="))
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            there = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"weights={text!r}: {name} has no option {option!r}; {there}.{hint}")
        if option in given:
            raise ValueError(f"weights={text!r}: {option} is given twice")
        found = {str(v).lower(): v for v in known[option]}
        if not equals or value.lower() not in found:
            near = _nearest(value.lower(), list(found))
            hint = f". Nearest: {' or '.join(near)}" if near else ""
            raise ValueError(f"weights={text!r}: {option} is {value!r}; it can be {', '.join(found)}{hint}")
        given[option] = found[value.lower()]
    return Format(name, tuple((n, given[n]) for n in known if n in given and given[n] != defaults[n]))


YES = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false", "none": "false"}


def _nearest(value: str, there: list[str]) -> list[str]:
    """Of the values that there are, the one or two that this may have meant."""
    if YES.get(value) in there:
        return [YES[value]]
    numbers = [int(v) for v in there if v.isdigit()]
    if value.isdigit() and numbers:
        below, above = [n for n in numbers if n < int(value)], [n for n in numbers if n > int(value)]
        return [str(n) for n in (*below[-1:], *above[:1])]
    return difflib.get_close_matches(value, there, n=1)


def rules(given: Mapping[str, str] | Sequence[str | tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """(name pattern, format) pairs as a Plan has them, of {'lm_head': 'int8'}, of such pairs, or of texts 'lm_head=int8'.

    Raises ValueError for what is none of these, and for a format that there is not, naming the nearest.
    """
    if isinstance(given, str):
        raise ValueError(f"weight_rules is {given!r}; it is a mapping or a list, e.g. {{'lm_head': 'int8'}}")
    found = []
    for one in given.items() if isinstance(given, Mapping) else given:
        pair = tuple(s.strip() for s in one.split("=", 1)) if isinstance(one, str) else tuple(one)
        if len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            said = repr(one) if isinstance(one, str) else f"{pair!r}"
            raise ValueError(f"rule {said}: it is PATTERN=FORMAT, a parameter's name and a format, e.g. 'lm_head=int8'")
        found.append(rule(*pair))
    return tuple(found)


def rule(pattern: str, text: str) -> tuple[str, str]:
    """(pattern, format as a Plan has it); ValueError that names the rule for a format that there is not."""
    try:
        return pattern, str(find(text))
    except ValueError as error:
        raise ValueError(f"rule {f'{pattern}={text}'!r}: {error}") from None
