"""Every parameter is trained: the trained tree is the parameter tree, in float32, and nothing is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxengine.architecture import Architecture
from jaxengine.plan import Plan


@dataclasses.dataclass(frozen=True)
class Options:
    """narrow: whether parameters may be narrower than float32, for what changes them without small steps."""

    narrow: bool = False


FROZEN: tuple[str, ...] = ()


def matrices(options: Options, architecture: Architecture) -> tuple[str, ...]:
    """Names of all matrices."""
    del options
    return tuple(n for n, s in architecture.specs().items() if s.out is not None)


def make(options: Options, architecture: Architecture, plan: Plan, params: Any, key: Array) -> Any:
    """The parameters themselves. ValueError where some are quantised, or are not float32."""
    del key
    quantised = [n for n, s in architecture.specs().items() if plan.format_of(n, s) != "dense"]
    if quantised:
        raise ValueError(
            f"train='all' needs every parameter as it is, and {quantised[0]} is stored as"
            f" {plan.format_of(quantised[0], architecture.specs()[quantised[0]])!r}: load with weights='dense', or"
            f" train='lora' beside the quantised matrices"
        )
    if plan.dtype != "float32" and not options.narrow:
        raise ValueError(
            f"train='all' keeps parameters in float32, and they were loaded in {plan.dtype}: load with dtype='float32' and"
            f" say compute='bfloat16' for the arithmetic"
        )
    return {"outer": dict(params["outer"]), "banks": tuple(bank.weights for bank in params["banks"])}


def combine(options: Options, params: Any, trained: Any) -> Any:
    """The trained parameters in the banks' places."""
    del options
    banks = tuple(
        dataclasses.replace(bank, weights=weights)
        for bank, weights in zip(params["banks"], trained["banks"], strict=True)
    )
    return {"outer": trained["outer"], "banks": banks}
