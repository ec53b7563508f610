"""Cards as data: what XLA's compiler and a plan must know of a GPU that may not be here.

A card is a frozen row of numbers with its source. `find` takes the name as people write it ("4090", "a100-80",
"NVIDIA L40S"), or the numbers themselves, for a card that is not in the table:

    find("rtx4090")
    find("sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128")

Four things are not what the box says.

Memory: a maker's GB is 2**30 bytes. Of it the driver reports less, for inline ECC (a sixteenth on T4, A10, L4, L40S),
its firmware and page tables; `reported` is the lowest total seen in public: XLA's own target specs, or PyTorch's
out-of-memory errors ("GPU 0 has a total capacity of ..."), over drivers and clouds. A CUDA process then pays for its context,
which grows with the cores; (192 + 3 per core) MiB is above every case that could be worked out from such errors (T4 0.13
GiB, A10G 0.21, A100 0.40, RTX 4090 0.49, L40 0.49, H200 0.51, RTX 5090 0.55, RTX PRO 6000 0.68). `usable` is what remains.
A desktop that draws on the card takes its own share besides.

Link: a copy out of pinned memory reaches about four fifths of what the wire carries: 12 GB/s of PCIe 3.0 x16, 25 of
4.0, 52 of 5.0. A slot may be narrower than the card, and pageable memory is five times slower.

Tensor rates: dense, bfloat16 products summed in float32, which on GeForce cards is half of the rate with sums in
float16. The T4 knows no bfloat16: there it is float16.

Shared memory, threads and float32 lanes are the compute capability's, not the card's: `LIMITS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping

KiB, MiB, GiB = 2**10, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Limits:
    """What all cards of a compute capability have in common. Bytes, and counts per core (streaming multiprocessor)."""

    shared_memory: int  # bytes of a core
    shared_memory_block: int  # bytes, the most that one block can opt in to
    threads: int  # resident on a core
    fp32: int  # float32 lanes of a core
    lowers_as: str  # a device_kind of this capability that Pallas's lowering knows in every jax that has such a table


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and "Arithmetic Instructions"
LIMITS = {
    (7, 5): Limits(64 * KiB, 64 * KiB, 1024, 64, "Tesla T4"),
    (8, 0): Limits(164 * KiB, 163 * KiB, 2048, 64, "NVIDIA A100"),
    (8, 6): Limits(100 * KiB, 99 * KiB, 1536, 128, "NVIDIA A10"),
    (8, 9): Limits(100 * KiB, 99 * KiB, 1536, 128, "NVIDIA L4"),
    (9, 0): Limits(228 * KiB, 227 * KiB, 2048, 128, "NVIDIA H100"),
    (10, 0): Limits(228 * KiB, 227 * KiB, 2048, 128, "NVIDIA B200"),
    (12, 0): Limits(100 * KiB, 99 * KiB, 1536, 128, "NVIDIA RTX PRO 6000"),
}

# bytes/s of a lane after its 128b/130b code, and what copies of pinned memory reach of it
PCIE_RAW = {3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130, 5: 32e9 / 8 * 128 / 130}
PCIE_REACHED = {3: 12e9 / 16, 4: 25e9 / 16, 5: 52e9 / 16}

# the least part of the sold memory that a driver reports in the table below (T4: inline ECC and the firmware)
LEAST_REPORTED = 0.91

BY_NUMBERS = "sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128"


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU. Sizes in bytes, rates in bytes/s or FLOP/s, the clock in GHz."""

    name: str
    kind: str  # the driver's name for it, which is jax's device_kind on the card
    capability: tuple[int, int]  # CUDA compute capability
    cores: int  # streaming multiprocessors
    clock: float  # GHz, boost
    l2: int  # bytes
    memory: int  # bytes, as sold
    reported: int  # bytes, the total that the driver tells a process
    usable: int  # bytes that a CUDA process can allocate on an otherwise empty card
    bandwidth: float  # bytes/s, of the card's own memory
    pcie: tuple[int, int] | None  # generation and lanes; None where the link was given as a rate
    link_raw: float  # bytes/s, host to card, on the wire; `link` again where that was given as a rate
    link: float  # bytes/s, host to card, that copies of pinned memory reach
    tensor: float  # FLOP/s, dense, `tensor_dtype` summed in float32
    source: str  # titles of the documents
    notes: str = dataclasses.field(default="", compare=False)  # what was assumed in choosing or completing it

    @property
    def limits(self) -> Limits:
        return LIMITS[self.capability]

    @property
    def fp32(self) -> float:
        """FLOP/s in float32 outside the tensor cores, at the boost clock; a fused multiply and add is two."""
        return self.cores * self.limits.fp32 * 2 * self.clock * 1e9

    @property
    def tensor_dtype(self) -> str:
        return "float16" if self.wide else "bfloat16"

    @property
    def wide(self) -> bool:
        """Whether XLA writes products of 16 bits in float32 before it narrows them, and widens bfloat16 first: below sm_80."""
        return self.capability < (8, 0)

    def target_config(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        info = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * KiB,
            "shared_memory_per_core": self.limits.shared_memory, "threads_per_core_limit": self.limits.threads,
            "core_count": self.cores, "fpus_per_core": self.limits.fp32, "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2, "clock_rate_ghz": self.clock, "device_memory_size": self.reported,
            "shared_memory_per_block_optin": self.limits.shared_memory_block, "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }  # fmt: skip
        fields = " ".join(f"{k}: {v}" for k, v in info.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}"
            f' platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.limits.lowers_as}"'
        )

    def describe(self) -> str:
        """A table of a dozen lines, with units."""
        slot = (
            f"PCIe {self.pcie[0]}.0 x{self.pcie[1]}, {self.link_raw / 1e9:.1f} GB/s on the wire, " if self.pcie else ""
        )
        sizes = [f"{n / GiB:.1f} GiB {what}" for n, what in
                 ((self.memory, "sold"), (self.reported, "reported"), (self.usable, "usable"))]  # fmt: skip
        rows = {
            "memory": ", ".join(sizes),
            "bandwidth": f"{self.bandwidth / 1e9:.0f} GB/s",
            "host link": f"{slot}{self.link / 1e9:.1f} GB/s reached",
            "tensor": f"{self.tensor / 1e12:.1f} TFLOP/s, {self.tensor_dtype}, dense",
            "float32": f"{self.fp32 / 1e12:.1f} TFLOP/s",
            "cores": f"{self.cores} at {self.clock:.3g} GHz",
            "L2 cache": f"{self.l2 / MiB:.4g} MiB",
            "shared memory": f"{self.limits.shared_memory // KiB} KiB a core,"
            f" {self.limits.shared_memory_block // KiB} KiB a block",
            "source": self.source,
            "notes": self.notes,
        }
        head = f"{self.name} ({self.kind}, sm_{self.capability[0]}{self.capability[1]})"
        return "\n".join([head, *(f"  {k:<15}{v}" for k, v in rows.items() if v)])

    __str__ = describe


def context_bytes(cores: int) -> int:
    """What a CUDA context takes of the card before the first allocation, from above (see the head of this file)."""
    return (192 + 3 * cores) * MiB


def _card(
    name: str, kind: str, capability: tuple[int, int], *, cores: int, clock: float, l2: float, memory: int, reported: float,
    bandwidth: float, pcie: tuple[int, int], tensor: float, source: str,
) -> Card:  # fmt: skip
    """One row: l2 in MiB, memory and reported in GiB, bandwidth in GB/s, tensor in TFLOP/s."""
    told = int(reported * GiB)
    generation, lanes = pcie
    return Card(
        name=name, kind=kind, capability=capability, cores=cores, clock=clock, l2=int(l2 * MiB), memory=memory * GiB,
        reported=told, usable=told - context_bytes(cores), bandwidth=bandwidth * 1e9, pcie=pcie,
        link_raw=lanes * PCIE_RAW[generation], link=lanes * PCIE_REACHED[generation], tensor=tensor * 1e12, source=source,
    )  # fmt: skip


_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
_XLA = "openxla/xla, xla/backends/gpu/target_config/specs/{}.txtpb"

_ROWS = (
    _card(
        "T4", "Tesla T4", (7, 5), cores=40, clock=1.59, l2=4, memory=16, reported=14.56, bandwidth=320, pcie=(3, 16),
        tensor=65, source="NVIDIA T4 Tensor Core GPU datasheet; NVIDIA Turing GPU Architecture whitepaper, WP-09183-001",
    ),
    _card(
        "A10", "NVIDIA A10", (8, 6), cores=72, clock=1.695, l2=6, memory=24, reported=21.96, bandwidth=600, pcie=(4, 16),
        tensor=125, source="NVIDIA A10 Tensor Core GPU datasheet; " + _AMPERE,
    ),
    _card(
        "A100 40GB", "NVIDIA A100-SXM4-40GB", (8, 0), cores=108, clock=1.41, l2=40, memory=40, reported=39.38,
        bandwidth=1555.2, pcie=(4, 16), tensor=312,
        source="NVIDIA A100 Tensor Core GPU datasheet; " + _XLA.format("a100_sxm_40"),
    ),
    _card(
        "A100 80GB", "NVIDIA A100-SXM4-80GB", (8, 0), cores=108, clock=1.41, l2=40, memory=80, reported=79.14,
        bandwidth=2039.04, pcie=(4, 16), tensor=312,
        source="NVIDIA A100 Tensor Core GPU datasheet; " + _XLA.format("a100_sxm_80"),
    ),
    _card(
        "RTX A6000", "NVIDIA RTX A6000", (8, 6), cores=84, clock=1.8, l2=6, memory=48, reported=47.4, bandwidth=768.096,
        pcie=(4, 16), tensor=154.8, source=_AMPERE + "; " + _XLA.format("a6000"),
    ),
    _card(
        "L4", "NVIDIA L4", (8, 9), cores=58, clock=2.04, l2=48, memory=24, reported=22.03, bandwidth=300, pcie=(4, 16),
        tensor=121, source="NVIDIA L4 Tensor Core GPU datasheet; " + _ADA,
    ),
    _card(
        "L40S", "NVIDIA L40S", (8, 9), cores=142, clock=2.52, l2=96, memory=48, reported=44.39, bandwidth=864, pcie=(4, 16),
        tensor=362, source="NVIDIA L40S GPU datasheet; " + _ADA,
    ),
    _card(
        "RTX 3060 12GB", "NVIDIA GeForce RTX 3060", (8, 6), cores=28, clock=1.777, l2=3, memory=12, reported=11.62,
        bandwidth=360, pcie=(4, 16), tensor=25.5,
        source="GeForce RTX 3060 Family specifications, NVIDIA; tensor rate by the 512 FLOP a core and clock of " + _AMPERE,
    ),
    _card(
        "RTX 3090", "NVIDIA GeForce RTX 3090", (8, 6), cores=82, clock=1.695, l2=6, memory=24, reported=23.56, bandwidth=936,
        pcie=(4, 16), tensor=71.2, source=_AMPERE,
    ),
    # no total of an 8 GB RTX 4060 Ti was found in public: the lowest of any GeForce with 8 GB
    _card(
        "RTX 4060 Ti 8GB", "NVIDIA GeForce RTX 4060 Ti", (8, 9), cores=34, clock=2.535, l2=32, memory=8, reported=7.6,
        bandwidth=288, pcie=(4, 8), tensor=44.1,
        source="GeForce RTX 4060 Family specifications, NVIDIA; tensor rate by the 512 FLOP a core and clock of " + _ADA,
    ),
    _card(
        "RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", (8, 9), cores=34, clock=2.535, l2=32, memory=16, reported=15.57,
        bandwidth=288, pcie=(4, 8), tensor=44.1,
        source="GeForce RTX 4060 Family specifications, NVIDIA; tensor rate by the 512 FLOP a core and clock of " + _ADA,
    ),
    _card(
        "RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), cores=128, clock=2.52, l2=72, memory=24, reported=23.51,
        bandwidth=1008, pcie=(4, 16), tensor=165.2, source=_ADA,
    ),
    _card(
        "RTX 5090", "NVIDIA GeForce RTX 5090", (12, 0), cores=170, clock=2.407, l2=96, memory=32, reported=31.34,
        bandwidth=1792, pcie=(5, 16), tensor=209.5, source="NVIDIA RTX Blackwell GPU Architecture whitepaper, table 3",
    ),
    _card(
        "RTX PRO 6000 Blackwell", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), cores=188, clock=2.6, l2=128,
        memory=96, reported=94.97, bandwidth=1792, pcie=(5, 16), tensor=503.8,
        source="NVIDIA RTX Blackwell PRO GPU Architecture whitepaper, V1.0, table 4; " + _XLA.format("rtx6000pro"),
    ),
    _card(
        "H100 SXM", "NVIDIA H100 80GB HBM3", (9, 0), cores=132, clock=1.98, l2=50, memory=80, reported=79.1,
        bandwidth=3352.32, pcie=(5, 16), tensor=989.4, source=_HOPPER + "; " + _XLA.format("h100_sxm"),
    ),
    _card(
        "H100 PCIe", "NVIDIA H100 PCIe", (9, 0), cores=114, clock=1.755, l2=50, memory=80, reported=79.1, bandwidth=2039.04,
        pcie=(5, 16), tensor=756, source=_HOPPER + "; " + _XLA.format("h100_pcie"),
    ),
    _card(
        "H200", "NVIDIA H200", (9, 0), cores=132, clock=1.98, l2=50, memory=141, reported=139.8, bandwidth=4800, pcie=(5, 16),
        tensor=989.4, source="NVIDIA H200 Tensor Core GPU datasheet; " + _XLA.format("h200"),
    ),
    # the card knows PCIe 6.0; the hosts that carry it give it 5.0
    _card(
        "B200", "NVIDIA B200", (10, 0), cores=148, clock=1.965, l2=126.5, memory=180, reported=178.35, bandwidth=7672.32,
        pcie=(5, 16), tensor=2250, source="NVIDIA HGX B200 datasheet; " + _XLA.format("b200"),
    ),
)  # fmt: skip

# where a bare family name may be meant for several, the one that is nearly always meant
_USUAL = ("A100 80GB", "H100 SXM")
_BRAND = {"nvidia", "geforce", "tesla", "rtx"}
_EXTRA = {"H200": {"sxm"}, "B200": {"sxm"}, "RTX PRO 6000 Blackwell": {"server"}}


def _words(name: str) -> set[str]:
    """Letters and digits apart, units and the memory's kind away: 'RTX4060Ti-16GB' is {rtx, 4060, ti, 16}."""
    name = re.sub(r"sxm\d?", " sxm ", name.lower())
    name = re.sub(r"hbm\d?e?", " ", name)
    name = re.sub(r"\b(\d+)\s*g\b", r"\1 ", name)  # 80g, but not the G of A10G, which is another card than the A10
    name = re.sub(r"(?<=\d)\s*gi?b", " ", name)
    name = re.sub("|".join(sorted(_BRAND | {"pcie"})), r" \g<0> ", name)
    return set(re.findall(r"\d+|[a-z]+", name))


def _answers(card: Card, words: set[str]) -> bool:
    """Whether the words are this card's: its model, and nothing that it is not."""
    own = _words(card.name)
    size = str(card.memory // GiB)
    model = own - _BRAND - {"sxm", "pcie", "blackwell", size}
    return model <= words <= own | _words(card.kind) | _BRAND | {size} | _EXTRA.get(card.name, set())


class Cards(Mapping[str, Card]):
    """The table by name; any spelling that `find` takes is a key."""

    def __init__(self, rows: tuple[Card, ...]) -> None:
        self._rows = {c.name: c for c in rows}

    def __getitem__(self, name: str) -> Card:
        if name in self._rows:
            return self._rows[name]
        try:
            return _named(self._rows, name)
        except ValueError as e:
            raise KeyError(str(e)) from e

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _named(rows: Mapping[str, Card], name: str) -> Card:
    words = _words(name)
    same = [c for c in rows.values() if name.strip().lower() in (c.name.lower(), c.kind.lower())]
    found = same or [c for c in rows.values() if words and _answers(c, words)]
    if len(found) == 1:
        return found[0]
    if usual := [c for c in found if c.name in _USUAL]:
        others = ", ".join(c.name for c in found if c is not usual[0])
        return dataclasses.replace(usual[0], notes=f"{name!r} was taken for {usual[0].name}; there is {others} too")
    by_numbers = f"or give the card by numbers, such as {BY_NUMBERS!r}"
    if found:
        raise ValueError(f"{name!r} may be {' or '.join(c.name for c in found)}; say which, {by_numbers}")

    def bare(name: str) -> str:
        return re.sub("|".join(sorted(_BRAND)), "", name.lower()).strip()

    def likeness(card: Card) -> float:
        shared = len(words & (_words(card.name) - _BRAND))
        return shared + difflib.SequenceMatcher(None, bare(name), bare(card.name)).ratio()

    near = sorted(rows.values(), key=likeness, reverse=True)[:3]
    raise ValueError(f"no card is known as {name!r}; the nearest are {', '.join(c.name for c in near)}; {by_numbers}")


CARDS = Cards(_ROWS)


def find(name: str) -> Card:
    """The card of that name, in any usual spelling, or of those numbers (see `from_numbers`).

    Raises ValueError, naming the nearest, where the name is of none or may be of several.
    """
    if "=" in name or re.match(r"\s*sm_?\d", name):
        return from_numbers(name)
    return _named(CARDS, name)


_UNITS = {
    "B": "a size such as 24GB (a card's GB is 2**30 bytes)",
    "B/s": "a rate such as 1008GB/s (10**9 bytes a second)",
    "Hz": "a clock such as 2.52GHz",
    "FLOP/s": "a rate such as 165TFLOP/s",
}
_MEASURED_IN = {
    "memory": "B", "usable": "B", "l2": "B", "bandwidth": "B/s", "link": "B/s", "clock": "Hz", "tensor": "FLOP/s",
}  # fmt: skip
_NEEDED = ("memory", "bandwidth", "link", "cores")


def _quantity(field: str, text: str, unit: str) -> float:
    spelt = unit.replace("/s", "(?:/s|ps|s)")
    found = re.fullmatch(rf"(-?\d+\.?\d*|-?\.\d+)\s*([KMGTP]?)(i?){spelt}", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{field} is {text!r}; write {_UNITS[unit]}")
    value = float(found[1]) * (1024 if unit == "B" or found[3] else 1000) ** " KMGTP".index(found[2].upper() or " ")
    if value <= 0:
        raise ValueError(f"{field} is {text!r}; it must be more than 0: write {_UNITS[unit]}")
    return value


def _link(text: str) -> tuple[tuple[int, int] | None, float, float]:
    """(generation and lanes or None, bytes/s on the wire, bytes/s reached)."""
    if found := re.fullmatch(r"pcie\s*(\d)(?:\.0)?\s*x\s*(\d+)", text, re.IGNORECASE):
        generation, lanes = int(found[1]), int(found[2])
        if generation not in PCIE_RAW or lanes not in (1, 2, 4, 8, 16):
            raise ValueError(f"link is {text!r}; PCIe is of generation 3, 4 or 5 with 1, 2, 4, 8 or 16 lanes: pcie4x16")
        return (generation, lanes), lanes * PCIE_RAW[generation], lanes * PCIE_REACHED[generation]
    rate = _quantity("link", text, "B/s")
    return None, rate, rate


def from_numbers(text: str) -> Card:
    """A card that is not in the table: 'sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128'.

    Needed: the compute capability, memory as sold, its bandwidth, the host link (a rate that copies reach, or a slot such
    as pcie4x16), cores (streaming multiprocessors). Optional: usable (memory), tensor (FLOP/s), l2, clock; those not given are
    taken from the nearest card of the same capability, or by rule, and `notes` says which. Sizes are binary (24GB is 24
    * 2**30, as cards are sold), rates decimal. Raises ValueError for an unknown, missing, doubled or impossible field.
    """
    given: dict[str, str] = {}
    capability: tuple[int, int] | None = None
    for part in filter(None, (p.strip() for p in text.split(","))):
        if found := re.fullmatch(r"sm_?(\d+)(\d)", part, re.IGNORECASE):
            if capability:
                raise ValueError(f"{part} is a second compute capability; give one")
            capability = (int(found[1]), int(found[2]))
            continue
        field, equals, value = (p.strip() for p in part.partition("="))
        field = field.lower()
        if not equals or field not in ("cores", *_MEASURED_IN):
            raise ValueError(
                f"{part!r} is no field of a card; the fields are sm_XY, cores=, {'=, '.join(_MEASURED_IN)}="
            )
        if field in given:
            raise ValueError(f"{field} is given twice: {given[field]!r} and {value!r}")
        given[field] = value

    if lacking := [*([] if capability else ["sm_XY"]), *(f"{f}=" for f in _NEEDED if f not in given)]:
        raise ValueError(f"{text!r} lacks {', '.join(lacking)}; write e.g. {BY_NUMBERS!r}")
    assert capability is not None
    if capability not in LIMITS:
        near = min(LIMITS, key=lambda c: abs(10 * (c[0] - capability[0]) + c[1] - capability[1]))
        raise ValueError(
            f"sm_{capability[0]}{capability[1]} is no compute capability that is known here; there are"
            f" {', '.join(f'sm_{a}{b}' for a, b in LIMITS)}, and sm_{near[0]}{near[1]} is the nearest"
        )
    if not re.fullmatch(r"\d+", given["cores"]) or int(given["cores"]) < 1:
        raise ValueError(f"cores is {given['cores']!r}; it is a number of streaming multiprocessors, 1 or more")
    cores = int(given["cores"])
    number = {f: _quantity(f, given[f], u) for f, u in _MEASURED_IN.items() if f in given and f != "link"}
    pcie, link_raw, link = _link(given["link"])
    memory = int(number["memory"])

    peers = [c for c in CARDS.values() if c.capability == capability]
    like = min(peers, key=lambda c: (abs(math.log(c.cores / cores)), abs(c.memory - memory)))
    clock = number["clock"] / 1e9 if "clock" in number else like.clock
    scaled = like.tensor * cores * clock / (like.cores * like.clock)
    usable = int(number.get("usable", memory * LEAST_REPORTED - context_bytes(cores)))
    if usable <= 0:
        raise ValueError(
            f"memory is {given['memory']!r}; a driver and a CUDA context on {cores} cores leave none of it: it must be"
            f" more than {context_bytes(cores) / LEAST_REPORTED / GiB:.2f}GB"
        )
    if usable >= memory:
        raise ValueError(f"usable is {given['usable']!r}; it must be less than memory, which is {given['memory']!r}")
    notes = [f"{f} from the {like.name}" for f in ("l2", "clock") if f not in number]
    if "tensor" not in number:
        notes.append(f"tensor rate from the {like.name} by cores and clock")
    if "usable" not in number:
        notes.append(f"usable memory is {LEAST_REPORTED:.0%} of that sold less a CUDA context")
    return Card(
        name=text.strip(), kind="a card given by numbers", capability=capability, cores=cores, clock=clock,
        l2=int(number.get("l2", like.l2)), memory=memory, reported=min(memory, usable + context_bytes(cores)), usable=usable,
        bandwidth=number["bandwidth"], pcie=pcie, link_raw=link_raw, link=link, tensor=number.get("tensor", scaled),
        source="numbers given by hand", notes="; ".join(notes),
    )  # fmt: skip
