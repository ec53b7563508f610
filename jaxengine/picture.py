"""The picture of a plan: stacked bytes of each tier for each candidate, against what there is. `jaxengine plan --plot FILE`.

A row is a candidate, nearest first, and a panel a tier: the device, then host memory and disk where anything lies there.
Panels have scales of their own, since a card and a host differ tenfold. A bar much longer than its limit is cut where
it leaves the panel and says so: drawn whole, it would leave no room for those that nearly fit.

Which tier a field of `planning.Need` belongs to is asked of `Need` itself: what `Need.device` counts is the device's, what
`Need.host` counts the host's, and any other field is a tier. A field that is added there is drawn.

matplotlib draws (the extra `jaxengine[notebook]`), onto its own canvas: a notebook's figures and settings stay as they are.
Colours are those of Okabe and Ito (2008), then of Tol (2021), told apart by every kind of colour vision.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.output import output_file
from jaxengine.plan import show_bytes
from jaxengine.planning import Candidate, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
DEVICE, HOST = "device", "host"

# what a field is called, and its colour; one that is not here goes by its own name and takes a spare colour
SAID = {
    "outer": "embeddings and head", "resident": "layers that stay",
    "streaming": "layers while they are there",
    "cache": "KV cache", "activations": "activations", "disk": "layers on disk",
    "trained": "trained parameters", "gradients": "gradients", "optimizer": "optimizer state", "kept": "kept for the way back",
    "host_weights": "layers in host memory", "host_optimizer": "optimizer state there",
    "host_kept": "kept there for the way back", "host_buffers": "buffers for the disk",
}  # fmt: skip
COLOURS = {
    "outer": "#999999", "resident": "#0072B2", "streaming": "#E69F00", "cache": "#009E73", "activations": "#CC79A7",
    "host_weights": "#F0E442", "disk": "#56B4E9", "trained": "#D55E00", "gradients": "#882255", "optimizer": "#44AA99",
    "kept": "#332288", "host_optimizer": "#117733", "host_kept": "#6699CC", "host_buffers": "#DDCC77",
}  # fmt: skip
SPARE = ("#AA4499", "#661100", "#AA4466")
LIMIT, OVER, CHOSEN, QUIET = "#111111", "#B84700", "#E3F1EA", "#555555"
TITLES = {DEVICE: "device memory", HOST: "host memory", "disk": "disk"}
LIMITED_BY = {DEVICE: "memory", HOST: "ram"}  # the fields of Outcome that limit a tier

# inches
WIDTH, MARGIN, GAP, ROW = 9.0, 0.3, 0.4, 0.58
DEVICE_SHARE = {1: 1.0, 2: 0.6, 3: 0.48}  # of the width, by the number of panels
BEHIND, PAD = 0.65, 0.05  # a bar's bytes behind its end
FARTHEST = 3  # a bar is drawn whole up to so many times its limit


def check(path: str | os.PathLike[str]) -> None:
    """Refuse, before any work, a picture that could not be written.

    Raises ValueError for a suffix other than .svg or .png, or where matplotlib is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"the picture's file is {os.fspath(path)!r}; its name ends in {' or '.join(SUFFIXES)}: call it"
            f" {str(Path(path).with_suffix('.svg')) if Path(path).name else 'plan.svg'!r}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "a picture is drawn by matplotlib, which is not installed: pip install matplotlib, or 'jaxengine[notebook]'"
        )


def draw(outcome: Outcome, path: str | os.PathLike[str]) -> None:
    """Write the picture of a plan, as .svg or .png by the name; a file there is replaced when the new one is complete.

    The same outcome gives the same bytes, with the same matplotlib. Raises ValueError as `check` does.
    """
    check(path)
    picture = figure(outcome)
    # a date in the file would make each one differ
    metadata = {"Date": None, "Creator": None} if Path(path).suffix.lower() == ".svg" else {"Software": None}
    with output_file(path, overwrite=True) as work, _settings():
        picture.savefig(work, format=Path(path).suffix.lower()[1:], metadata=metadata)


def tiers(candidate: Candidate) -> dict[str, tuple[str, ...]]:
    """The fields of Need by where their bytes lie: {'device': ('outer', ...), 'host': ('host_weights', ...), ...}."""
    need = candidate.need
    names = tuple(f.name for f in dataclasses.fields(need))

    def counted(name: str) -> str:
        more: Any = {name: getattr(need, name) + 1}
        one_more = dataclasses.replace(need, **more)
        return next((t for t in (DEVICE, HOST) if getattr(one_more, t) != getattr(need, t)), name)

    found: dict[str, tuple[str, ...]] = {DEVICE: (), HOST: ()}
    for name in names:
        tier = counted(name)
        found[tier] = (*found.get(tier, ()), name)
    return found


def figure(outcome: Outcome) -> Figure:
    """The picture as a matplotlib Figure. Widths are in bytes; each piece of a bar has the gid 'tier:row:field'."""
    from matplotlib.figure import Figure

    found = tiers(outcome.candidates[0])
    limits = {tier: getattr(outcome, LIMITED_BY[tier]) if tier in LIMITED_BY else None for tier in found}
    totals = {t: [sum(getattr(c.need, f) for f in fields) for c in outcome.candidates] for t, fields in found.items()}
    shown = [t for t in found if t == DEVICE or any(totals[t]) or limits[t] is not None]
    colours = _colours([f for fields in found.values() for f in fields])

    named = outcome.card.name + (f", a step{outcome.of_task}" if outcome.of_task else "")
    title, head, foot = textwrap.wrap(named, 84), _heading(outcome), _ending(outcome)
    fields = [f for t in shown for f in found[t] if any(getattr(c.need, f) for c in outcome.candidates)]
    columns = max(1, min(len(fields), 4 if len(fields) > 6 else 6))
    lines = 0.19 * len(foot) + 0.12 * bool(foot)
    above = 0.63 + 0.2 * len(title)
    below = 0.62 + 0.19 * -(-len(fields) // columns) + lines
    rows = ROW * len(outcome.candidates)
    height = above + rows + below

    with _settings():
        drawn = Figure(figsize=(WIDTH, height), dpi=200)

        def axes(left: float, width: float, order: int) -> Axes:
            made = drawn.add_axes((left / WIDTH, below / height, width / WIDTH, rows / height))
            made.set(zorder=order, ylim=(len(outcome.candidates) - 0.5, -0.5), facecolor="none")
            return made

        bands, words = axes(MARGIN, WIDTH - 2 * MARGIN, 0), axes(MARGIN, WIDTH - 2 * MARGIN, 2)
        for plain in (bands, words):
            plain.set(xlim=(0, 1))
            plain.axis("off")
        for row, candidate in enumerate(outcome.candidates):
            if candidate is outcome.chosen:
                bands.axhspan(row - 0.5, row + 0.5, color=CHOSEN, lw=0)
            _row(words, row, candidate, candidate is outcome.chosen)

        room = WIDTH - 2 * MARGIN - 0.2 - GAP * (len(shown) - 1)
        left = MARGIN + 0.1
        for tier in shown:
            device = DEVICE_SHARE.get(len(shown), 0.4)
            share = device if tier == DEVICE else (1 - device) / (len(shown) - 1)
            panel = axes(left, room * share, 1)
            _panel(panel, tier, found[tier], outcome, totals[tier], limits[tier], colours, room * share)
            left += room * share + GAP

        for i, line in enumerate(title):
            drawn.text(MARGIN / WIDTH, 1 - (0.2 + 0.2 * i) / height, line, size=11.5, weight="bold", va="center")
        drawn.text(MARGIN / WIDTH, 1 - (0.21 + 0.2 * len(title)) / height, head, size=8.5, va="center")
        for i, line in enumerate(foot):
            drawn.text(
                MARGIN / WIDTH, (0.19 * (len(foot) - i) - 0.04) / height, line, size=8, va="center",
                color=OVER if i == 0 else LIMIT, weight="bold" if i == 0 else "normal",
            )  # fmt: skip
        _legend(drawn, fields, colours, columns, (lines + 0.06) / height)
    return drawn


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user has set, with text as text and the same ids each time."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "svg.hashsalt": "jaxengine", "hatch.linewidth": 0.7,
                "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
            }
        )  # fmt: skip
        yield


def _colours(fields: list[str]) -> dict[str, str]:
    spare = iter(SPARE * len(fields))
    return {f: COLOURS.get(f) or next(spare) for f in fields}


def _said(field: str) -> str:
    return SAID.get(field, field.replace("_", " "))


def _heading(outcome: Outcome) -> str:
    host = "" if outcome.ram is None else f", {show_bytes(outcome.ram)} of host memory"
    return f"{show_bytes(outcome.memory)} of device memory{host}; batch {outcome.batch} × context {outcome.context}"


def _ending(outcome: Outcome) -> list[str]:
    """What is said below the bars where nothing fits."""
    if outcome.chosen is not None:
        return []
    short = f": {outcome.shortage}" if outcome.shortage else ""
    what = ". What would fit:" if outcome.changes else ""
    return [
        f"Nothing fits{short}{what}",
        *(f"   {said}: {c.label()}, {show_bytes(c.need.device)} on the device" for said, c in outcome.changes),
    ]


def _row(words: Axes, row: int, candidate: Candidate, chosen: bool) -> None:
    """The line over a bar: the plan on the left, the verdict on the right."""
    rounded = float(f"{candidate.tokens_per_second:.3g}")
    rate = f"{rounded:,.10g} tokens/s at most ({candidate.limit})"
    if candidate.refused:
        verdict, colour = f"refused: {candidate.refused}", OVER
    else:
        verdict, colour = f"{'chosen' if chosen else 'fits, farther'}: {rate}", LIMIT if chosen else QUIET
    width = WIDTH - 2 * MARGIN
    # a letter is at most 0.66 of its size wide on average, in bold; smaller ones where both ends would meet
    size = min(8.5, (width - 0.6) * 72 / 0.66 / (len(candidate.label()) + len(verdict)))
    shared: dict[str, Any] = {
        "va": "center", "weight": "bold" if chosen else "normal", "size": size,
        "bbox": _behind(CHOSEN if chosen else "white"),  # over the limit's line
    }  # fmt: skip
    words.text(0.16 / width, row - 0.27, candidate.label(), color=LIMIT, **shared)
    words.text(1 - 0.1 / width, row - 0.27, verdict, ha="right", color=colour, **shared)


def _behind(colour: Any) -> dict[str, Any]:
    """A box that keeps lines and hatching off a text; an outline of its letters would turn it into shapes in SVG."""
    return {"facecolor": colour, "edgecolor": "none", "pad": 0.6}


def _extent(totals: list[int], limit: int | None, inches: float) -> float:
    """Bytes that a panel shows: all of every bar, unless one is many times what there is; and the limit, unless that is
    many times every bar."""
    longest, whole = max(totals), inches / (inches - BEHIND)
    if limit is None:
        return max(whole * longest, 1)
    if longest > FARTHEST * limit:
        return max(1.6 * limit, whole * max((t for t in totals if t <= FARTHEST * limit), default=0))
    return whole * max(longest, limit if limit <= FARTHEST * longest or not longest else 0)


def _panel(
    panel: Axes, tier: str, fields: tuple[str, ...], outcome: Outcome, totals: list[int], limit: int | None,
    colours: dict[str, str], inches: float,
) -> None:  # fmt: skip
    """The bars of one tier, its limit and its axis."""
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    extent = _extent(totals, limit, inches)
    seen = min(extent, max(totals) or extent)
    unit, size = next(((u, s) for u, s in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if seen >= s), ("B", 1))
    panel.set_xlim(0, extent)

    def number(n: float) -> str:
        return f"{n / size:.0f}" if n >= 100 * size else f"{n / size:.3g}"

    def across(text: str, points: float) -> float:
        """Bytes that a text covers, a digit being about 0.65 of its height wide."""
        return len(text) * 0.65 * points / 72 / inches * extent

    for row, candidate in enumerate(outcome.candidates):
        start, middle = 0, row + 0.15
        for field in fields:
            n = getattr(candidate.need, field)
            colour = colours[field]
            if candidate.refused:  # paler
                r, g, b = (0.42 * c + 0.58 for c in to_rgb(colour))
                colour = to_hex((r, g, b))
            panel.barh(
                middle, n, left=start, height=0.4, color=colour, edgecolor="white", linewidth=0.5, zorder=2,
                gid=f"{tier}:{row}:{field}",
            )  # fmt: skip
            # within the limit if it has room there, and never across the line
            first = start + n if limit is None or not start < limit < start + n else limit
            for low, high in ((start, first), (first, start + n)):
                if len(fields) > 1 and start + n <= extent and high - low > 1.35 * across(number(n), 7):
                    r, g, b = to_rgb(colour)
                    ink = "white" if 0.3 * r + 0.59 * g + 0.11 * b < 0.5 else LIMIT
                    panel.text(
                        (low + high) / 2, middle, number(n), size=7, ha="center", va="center_baseline", color=ink, zorder=4,
                        bbox=_behind(colour),
                    )  # fmt: skip
                    break
            start += n
        if limit is not None and start > limit:
            panel.barh(
                middle, start - limit, left=limit, height=0.4, color="none", edgecolor=OVER, hatch="////", linewidth=0,
                zorder=3, gid=f"{tier}:{row}:over",
            )  # fmt: skip
        _total(
            panel,
            middle,
            start,
            f"{number(start)} {unit}",
            extent,
            limit,
            across,
            candidate is outcome.chosen,
            PAD / inches * extent,
        )

    if limit is not None:
        panel.axvline(limit, color=LIMIT, lw=1.1, ls=(0, (4, 2)), zorder=5, gid=f"{tier}:limit")
        said = f"{LIMITED_BY[tier]} {show_bytes(limit)}"
        half = across(said, 8) / 2
        place, align = (limit, "center") if limit <= extent else (extent, "right")
        if limit <= extent and limit + half > extent:
            place, align = extent, "right"
        elif limit < half:
            place, align = 0.0, "left"
        said += " →" if limit > extent else ""
        panel.text(
            place, 1.0 + 0.06 / (ROW * len(totals)), said, size=8, weight="bold", ha=align, va="bottom",
            transform=panel.get_xaxis_transform(),
        )  # fmt: skip
    ticks = MaxNLocator(max(2, int(inches / 0.6)), steps=[1, 2, 2.5, 5, 10]).tick_values(0, extent)
    panel.set_xticks([t for t in ticks if t <= extent])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}"))
    panel.set_yticks([])
    panel.tick_params(labelsize=7.5, length=3)
    panel.grid(axis="x", color="#DDDDDD", lw=0.5, zorder=0)
    panel.set_axisbelow(True)
    panel.set_xlabel(f"{TITLES.get(tier, tier)} ({unit})", size=8.5)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    rows = range(len(totals))  # where bars begin, and not through the lines of words between
    panel.vlines([0] * len(totals), [r - 0.12 for r in rows], [r + 0.42 for r in rows], color=LIMIT, lw=1, zorder=3)


def _total(
    panel: Axes,
    middle: float,
    total: int,
    said: str,
    extent: float,
    limit: int | None,
    across: Any,
    chosen: bool,
    pad: float,
) -> None:
    """A bar's bytes behind its end; of one that leaves the panel, the cut and its bytes at the edge."""
    colour = OVER if limit is not None and total > limit else LIMIT
    background = CHOSEN if chosen else "white"
    if total > extent:
        said += " →"
        at, align = extent - pad, "right"
        cut, lean = extent - 1.3 * across("1000 GB →", 7.5), 0.012 * extent
        xs = [cut - lean, cut, cut + lean, cut]
        panel.fill(xs, [middle + 0.26, middle - 0.26, middle - 0.26, middle + 0.26], color=background, lw=0, zorder=4)
    else:
        at, align = total + pad, "left"
        if limit is not None and total <= limit < at + across(said, 7.5):  # not across the line
            at = limit + pad
        if total == 0:
            said, colour = "0", QUIET
    panel.text(
        at, middle, said, size=7.5, ha=align, va="center_baseline", color=colour, weight="bold" if chosen else "normal",
        bbox=_behind(background), zorder=6,
    )  # fmt: skip


def _legend(drawn: Figure, fields: list[str], colours: dict[str, str], columns: int, bottom: float) -> None:
    from matplotlib.patches import Patch

    drawn.legend(
        handles=[Patch(facecolor=colours[f], label=_said(f)) for f in fields], loc="lower left",
        bbox_to_anchor=(MARGIN / WIDTH, bottom), ncols=columns, frameon=False, fontsize=7.5,
        handlelength=1.1, handleheight=1.0, columnspacing=1.4, handletextpad=0.5, borderpad=0, borderaxespad=0,
    )  # fmt: skip
