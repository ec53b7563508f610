"""Which implementation of an op serves a call.

An op is a folder with `reference.py` (the meaning, in plain jnp), `xla.py`, `triton.py` and so on, each a function with the
same signature. An implementation that cannot serve a call raises `Refused` with the reason while it is traced. Asked for by
name, its refusal is the caller's error; otherwise the next one serves, and the refusal is logged once.

What a call is compiled for is known when it is traced: on a machine with a GPU its own, under `pallas_kernels.aot.target`
the card that is named there. A program for the CPU may be traced in either case, so a choice for a GPU is always one arm
of `lax.platform_dependent`, whose other arm is the form for the CPU.

The order in which implementations are tried is an op's own, derived from what is published, until a card was measured: then it
is that of the card's table, a JSON file of milliseconds that `scripts/bench_attention.py --table`, `scripts/bench_quant.py
--table` and `scripts/gpu_suite.py` write. One that the user measured goes before one that comes along in `measured/`. A
program compiled for a card that is not there takes the derived order, so that it is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
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
    name: str = ""  # the driver's for it; '' for a card that is not there

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
    return Gpu((int(major), int(minor or 0)), here.core_count, here.device_kind)


def below_ampere() -> bool:
    """Whether a call traced here is compiled for a GPU of before sm_80, which multiplies no bfloat16 (cards.Card.wide)."""
    found = gpu()
    return found is not None and found.capability < (8, 0)


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


# ---- what was measured


def table_file(card: str) -> Path:
    """Where the user's own table of a card is: ~/.cache/pallas_kernels/nvidia_h200.json, or under $XDG_CACHE_HOME."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "pallas_kernels" / f"{re.sub(r'[^a-z0-9]+', '_', card.lower())}.json"


def write_table(card: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Keep rows {'op', 'milliseconds': {implementation: ms}, and what else tells a case from others} as the card's table,
    in the place of rows of the same cases."""
    if bad := next((r for r in rows if not _is_row(r)), None):
        raise ValueError(
            f"{bad!r} is no row of a table: it is {{'op': name, 'milliseconds': {{name: number}}}} with what tells the case"
        )
    file, new = table_file(card), [dict(r) for r in rows]
    cases = [_case(r) for r in new]
    rest = [r for r in _read(file) if _case(r) not in cases] if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.writing")
    beside.write_text(json.dumps({"card": card, "jax": jax.__version__, "rows": rest + new}, indent=1) + "\n")
    beside.replace(file)
    measured.cache_clear()
    return file


@functools.cache
def measured(card: str) -> tuple[Mapping[str, Any], ...]:
    """The rows of a card's table, those of the user before those that come along; none where it was not measured."""
    try:
        mine = table_file(card)
        files = [f for f in (mine, Path(__file__).parent / "measured" / mine.name) if f.exists()]
    except (OSError, RuntimeError) as e:  # no home, or one that may not be read
        log.warning("no table of what was measured can be looked for (%s): the derived order is taken", e)
        return ()
    return tuple(row for file in files for row in _read(file, card))


def by_measure(op: str, order: Sequence[str], there: Collection[str], **case: str | int) -> tuple[str, ...]:
    """Implementations, fastest first where the card was measured on such a case, then the rest of the derived `order`.

    there: all that can be asked for. case: of the rows that are comparable (`_apart`) the nearest decides, by what is named
    first, and among those that are as near by the next.
    """
    card = gpu()
    rows = [] if card is None or not card.name else [r for r in measured(card.name) if r["op"] == op]
    distances = [([_apart(v, r.get(n)) for n, v in case.items()], r["milliseconds"]) for r in rows]
    near = [(d, times) for d, times in distances if None not in d]
    if not near:
        return tuple(order)
    best = min(near, key=lambda row: row[0])[1]
    fastest = sorted((n for n in best if n in there), key=lambda n: best[n])
    return (*fastest, *(n for n in order if n not in fastest))


def _apart(asked: str | int, row: Any) -> float | None:
    """How far what was measured is from what is asked for; None where one says nothing of the other.

    Numbers: their ratio, in powers of two; so too a number at the end of text that is the same before it ('int8, pages of 32').
    float16 and bfloat16 take the same bytes and as many operations: they stand for each other where the one itself is not
    there. Other text is the same or of another case.
    """
    if isinstance(asked, str) != isinstance(row, str) or row is None:
        return None
    if asked == row:
        return 0.0
    if isinstance(asked, int | float):
        return abs(math.log2(row / asked)) if isinstance(row, int | float) else None
    if {asked, row} == {"float16", "bfloat16"}:
        return 1.0
    ends = [re.fullmatch(r"(.* )(\d+)", x) for x in (asked, row)]
    if ends[0] is None or ends[1] is None or ends[0][1] != ends[1][1]:
        return None
    return abs(math.log2(int(ends[0][2]) / int(ends[1][2])))


def _case(row: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in row.items() if n != "milliseconds"}


def _is_row(row: Any) -> bool:
    if not isinstance(row, Mapping) or not isinstance(row.get("op"), str):
        return False
    times, sizes = (
        row.get("milliseconds"),
        [v for n, v in row.items() if n != "milliseconds" and not isinstance(v, str)],
    )
    numbers = [*(times.values() if isinstance(times, Mapping) else [None]), *sizes]
    return all(isinstance(v, int | float) and v > 0 for v in numbers)


def _read(file: Path, card: str = "") -> list[dict[str, Any]]:
    """The rows of a file; none, with a warning, of one that is damaged: which order is taken changes no result."""
    try:
        found = json.loads(file.read_text())
        rows = found["rows"]
        if card and found["card"] != card:
            raise ValueError(f"it is of a card called {found['card']!r}, and this one is {card!r}")
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise ValueError("its rows are not those of a table")
    except (OSError, ValueError, KeyError, TypeError) as e:
        log.warning(
            "%s is left aside (%s): measure anew with --table of scripts/bench_attention.py and bench_quant.py", file, e
        )
        return []
    return rows


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    log.info("%s: %s does not serve: %s", op, name, reason)
