"""Techniques are found by file name: `weights/int8.py` is `--weights int8`. Nothing is registered anywhere.

A folder of techniques is a package; every module in it whose name has no leading underscore and is not `base` is one
technique, and the module's attributes are what the folder's contract (its `base.py`) asks for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache  # each call would list the folder, and every layer of every pass asks
def names(package: str) -> tuple[str, ...]:
    """The techniques in a package such as 'jaxengine.weights', sorted."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(m.name for m in found if m.name != "base" and not m.name.startswith("_")))


def find(package: str, name: str) -> ModuleType:
    """The module that is technique `name`; raises ValueError with the nearest name if there is none."""
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no {name!r} in {package}; there are: {', '.join(known)}.{hint}")
    return importlib.import_module(f"{package}.{name}")
