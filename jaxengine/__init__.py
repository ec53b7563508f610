"""jaxengine: runs and fine-tunes language models that do not fit the GPU, in JAX.

import jaxengine
model = jaxengine.load("path/to/a/Hugging Face folder")
print(model.generate("Once upon a time")[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxengine.loading import load
    from jaxengine.model import Completion, Model
    from jaxengine.plan import Plan

__all__ = ["Completion", "Model", "Plan", "demo_folder", "load"]
__version__ = "0.1.0"

# Imported when first used: `jaxengine --help` should not wait for a compiler.
_HOMES = {"load": "loading", "Completion": "model", "Model": "model", "Plan": "plan"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jaxengine has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"jaxengine.{_HOMES[name]}"), name)


def demo_folder() -> str:
    """The checkpoint folder of the small model that comes with jaxengine."""
    from pathlib import Path

    return str(Path(__file__).parent / "demo")
