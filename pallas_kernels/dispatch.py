"""Which implementation of an op serves a call.

An op is a folder with `reference.py` (the meaning, in plain jnp), `xla.py`, `triton.py` and so on, each a function with the
same signature. An implementation that cannot serve a call raises `Refused` with the reason while it is traced. Asked for by
name, its refusal is the caller's error; otherwise the next one serves, and the refusal is logged once.

What a call is compiled for is known when it is traced: on a machine with a GPU its own, under `pallas_kernels.aot.target`
the card that is named there. A program for the CPU may be traced in either case, so a choice for a GPU is always one arm
of `lax.platform_dependent`, whose other arm is the form for the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from pallas_kernels.cards import LIMITS, Limits

log = logging.getLogger("pallas_kernels")


class Refused(ValueError):  # noqa: N818  (what happened, not a fault)
    """An implementation cannot serve this call; the message says why and what can."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a kernel may ask about the GPU that it is traced for."""

    capability: tuple[int, int]  # CUDA compute capability
    cores: int  # streaming multiprocessors

    @property
    def limits(self) -> Limits:
        """Shared memory, threads and lanes; those of the nearest lower capability where the table has not this one."""
        return LIMITS[max((c for c in LIMITS if c <= self.capability), default=min(LIMITS))]


def gpu() -> Gpu | None:
    """The GPU that a call traced here is compiled for; None where there is none."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and device.platform == "gpu":
        found = next((c for c, limits in LIMITS.items() if limits.lowers_as == device.device_kind), None)
        return None if found is None else Gpu(found, device.num_cores or 1)
    if jax.default_backend() != "gpu":
        return None
    here = jax.devices()[0]
    major, _, minor = str(here.compute_capability).partition(".")
    return Gpu((int(major), int(minor or 0)), here.core_count)


def choose(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    order: Sequence[str],
    cpu: str,
    name: str | None,
    arguments: Sequence[Any],
    **how: Any,
) -> Any:
    """implementations[...](*arguments, **how) of the first that serves, in `order` on a GPU and `cpu` elsewhere.

    name: the one to take whatever the platform is; ValueError where it is not known, Refused where it refuses.
    arguments: arrays, or None where one is absent.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"{op}: there is no implementation {name!r}; there are {', '.join(implementations)}")
        return implementations[name](*arguments, **how)
    card = gpu()
    if card is None:
        return implementations[cpu](*arguments, **how)
    there = [i for i, a in enumerate(arguments) if a is not None]

    def taking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Any) -> Any:
            full = list(arguments)
            for i, a in zip(there, arrays, strict=True):
                full[i] = a
            return function(*full, **how)

        return call

    def first(*arguments: Any, **how: Any) -> Any:
        said = []
        for each in order:
            try:
                return implementations[each](*arguments, **how)
            except Refused as e:
                said.append(f"{each}: {e}")
                _log_once(op, each, str(e))
        raise Refused(f"{op}: nothing serves this call on compute capability {card.capability}: {'; '.join(said)}")

    if cpu == order[0]:
        return implementations[cpu](*arguments, **how)
    return lax.platform_dependent(
        *(arguments[i] for i in there), cpu=taking(implementations[cpu]), default=taking(first)
    )


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    log.info("%s: %s does not serve: %s", op, name, reason)
