"""Cards: each row holds together, agrees with what others publish, is found as people write it, and compiles.

Expected numbers are written down here from documents that the table was not made from where there are two (a data sheet's
float32 rate against cores, lanes and clock; XLA's own specs), else from the same document by the quantity it prints.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot, cards
from pallas_kernels.cards import CARDS, Card, find, from_numbers

KiB, GiB = 2**10, 2**30
EVERY = list(CARDS.values())
NUMBERS = "sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128"

compiles = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def each(cards: list[Card]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("card", cards, ids=lambda c: c.name)


def test_the_table_is_whole() -> None:
    wanted = {
        "T4", "A10", "A100 40GB", "A100 80GB", "RTX A6000", "L4", "L40S", "RTX 3060 12GB", "RTX 3090", "RTX 4060 Ti 8GB",
        "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "RTX PRO 6000 Blackwell", "H100 SXM", "H100 PCIe", "H200", "B200",
    }  # fmt: skip
    assert set(CARDS) == wanted
    assert {c.capability for c in EVERY} == set(cards.LIMITS)


@each(EVERY)
def test_a_row_holds_together(card: Card) -> None:
    assert 0.85 * card.memory < card.usable < card.reported < card.memory
    assert card.usable > 0
    assert card.memory % GiB == 0
    assert card.reported >= cards.LEAST_REPORTED * card.memory * (1 - 1e-9)
    assert 0.7 * card.link_raw < card.link <= card.link_raw < 0.25 * card.bandwidth
    assert 1 < card.clock < 3
    assert 1.9 < card.tensor / card.fp32 < 33  # GeForce with float32 sums; B200
    assert 50 < card.tensor / card.bandwidth < 450  # FLOP per byte: RTX 3060, L40S
    assert card.source
    assert not card.source.startswith("http")
    assert card.notes == ""


@each(EVERY)
def test_limits_are_the_programming_guides(card: Card) -> None:
    """CUDA C++ Programming Guide, technical specifications per compute capability."""
    per_core, per_block, threads = {
        (7, 5): (64, 64, 1024),
        (8, 0): (164, 163, 2048),
        (8, 6): (100, 99, 1536),
        (8, 9): (100, 99, 1536),
        (9, 0): (228, 227, 2048),
        (10, 0): (228, 227, 2048),
        (12, 0): (100, 99, 1536),
    }[card.capability]
    limits = card.limits
    assert (limits.shared_memory, limits.shared_memory_block) == (per_core * KiB, per_block * KiB)
    assert limits.threads == threads
    if card.capability >= (8, 0):  # from there on a block's first KiB is CUDA's own
        assert limits.shared_memory_block == limits.shared_memory - KiB


@pytest.mark.parametrize(
    ("name", "tflops"),
    [  # the float32 line of each data sheet
        ("T4", 8.1), ("A10", 31.2), ("A100 40GB", 19.5), ("A100 80GB", 19.5), ("RTX A6000", 38.7), ("L4", 30.3),
        ("L40S", 91.6), ("RTX 3060 12GB", 12.7), ("RTX 3090", 35.6), ("RTX 4060 Ti 8GB", 22.1), ("RTX 4060 Ti 16GB", 22.1),
        ("RTX 4090", 82.6), ("RTX 5090", 104.8), ("RTX PRO 6000 Blackwell", 125), ("H100 SXM", 67), ("H100 PCIe", 51),
        ("H200", 67), ("B200", 75),
    ],
)  # fmt: skip
def test_float32_rate_is_the_data_sheets(name: str, tflops: float) -> None:
    assert CARDS[name].fp32 / 1e12 == pytest.approx(tflops, rel=0.01)


# openxla/xla, xla/backends/gpu/target_config/specs/*.txtpb, as in the plugin of jax 0.12.0: capability, core_count,
# fpus_per_core, shared_memory_per_core, shared_memory_per_block_optin, threads_per_core_limit, memory_bandwidth,
# l2_cache_size, clock_rate_ghz, device_memory_size
XLA = {
    "A100 40GB": ((8, 0), 108, 64, 167936, 166912, 2048, 1555200000000, 41943040, 1.41, 42331013120),
    "A100 80GB": ((8, 0), 108, 64, 167936, 166912, 2048, 2039040000000, 41943040, 1.41, 85100068864),
    "RTX A6000": ((8, 6), 84, 128, 102400, 101376, 1536, 768096000000, 6291456, 1.8, 51041271808),
    "H100 SXM": ((9, 0), 132, 128, 233472, 232448, 2048, 3352320000000, 52428800, 1.98, 84942979072),
    "H100 PCIe": ((9, 0), 114, 128, 233472, 232448, 2048, 2039040000000, 52428800, 1.755, 84942979072),
    "H200": ((9, 0), 132, 128, 233472, 232448, 2048, 4800000000000, 52428800, 1.98, 151397597184),
    "B200": ((10, 0), 148, 128, 233472, 232448, 2048, 7672320000000, 132644864, 1.965, 191514411008),
    "RTX PRO 6000 Blackwell": ((12, 0), 188, 128, 131072, 101376, 1536, 1792000000000, 134217728, 2.6, 103079215104),
}


@pytest.mark.parametrize("name", sorted(XLA))
def test_agrees_with_xlas_own_specs(name: str) -> None:
    capability, cores, fp32, per_core, per_block, threads, bandwidth, l2, clock, memory = XLA[name]
    card = CARDS[name]
    assert (card.capability, card.cores, card.limits.fp32) == (capability, cores, fp32)
    assert (card.limits.shared_memory_block, card.limits.threads) == (per_block, threads)
    # rtx6000pro.txtpb gives the 128 KiB that shared memory and L1 have together; the guide's limit for 12.0 is 100
    assert card.limits.shared_memory == (102400 if capability == (12, 0) else per_core)
    assert card.bandwidth == pytest.approx(bandwidth, rel=1e-9)
    assert (card.l2, card.clock) == (l2, clock)
    # h200 and rtx6000pro there have the sold size, the others what one driver told
    assert (0.985 if memory == card.memory else 0.997) * memory < card.reported <= memory <= card.memory


@pytest.mark.parametrize(
    ("name", "units", "flop", "ghz"),
    [  # bfloat16 of matrix_unit_description in the same files: units_per_core, ops_per_clock (of two), clock_rate_ghz
        ("A100 40GB", 4, 512, 1.41), ("A100 80GB", 4, 512, 1.41), ("H100 SXM", 4, 1024, 1.8295201),
        ("H100 PCIe", 4, 1024, 1.62162), ("H200", 4, 1024, 1.8295201), ("B200", 4, 2048, 1.8353101),
    ],
)  # fmt: skip
def test_tensor_rate_agrees_with_xlas_own_specs(name: str, units: int, flop: int, ghz: float) -> None:
    card = CARDS[name]
    assert card.tensor == pytest.approx(card.cores * units * flop * ghz * 1e9, rel=0.015)


@pytest.mark.parametrize(
    ("name", "flop"),
    [  # FLOP of a core and clock, 16 bit products and float32 sums, as the GA102, Ada and Blackwell whitepapers' rates say
        ("RTX 3060 12GB", 512), ("RTX 3090", 512), ("RTX 4060 Ti 8GB", 512), ("RTX 4060 Ti 16GB", 512), ("RTX 4090", 512),
        ("RTX 5090", 512), ("A10", 1024), ("RTX A6000", 1024), ("L4", 1024), ("L40S", 1024), ("T4", 1024),
        ("RTX PRO 6000 Blackwell", 1024),
    ],
)  # fmt: skip
def test_tensor_rate_is_the_cores(name: str, flop: int) -> None:
    card = CARDS[name]
    assert card.tensor == pytest.approx(card.cores * flop * card.clock * 1e9, rel=0.015)


@pytest.mark.parametrize(
    ("name", "seen"),
    [  # GiB that a process held and PyTorch had not, in public out-of-memory errors
        ("T4", 0.13), ("A100 80GB", 0.40), ("RTX 4090", 0.49), ("H200", 0.51), ("RTX 5090", 0.55),
        ("RTX PRO 6000 Blackwell", 0.68),
    ],
)  # fmt: skip
def test_a_context_is_counted_from_above(name: str, seen: float) -> None:
    card = CARDS[name]
    assert seen * GiB < card.reported - card.usable < seen * GiB + 0.25 * GiB


def test_links() -> None:
    """PCI Express base specification: 8, 16, 32 GT/s with 128b/130b; what copies reach as the plan of streaming has it."""
    assert find("T4").link_raw == pytest.approx(15.754e9, rel=1e-4)
    assert find("4090").link_raw == pytest.approx(31.508e9, rel=1e-4)
    assert find("h200").link_raw == pytest.approx(63.015e9, rel=1e-4)
    assert [find(n).link for n in ("T4", "4090", "4060 ti 8gb", "h200")] == [12e9, 25e9, 12.5e9, 52e9]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx4090", "RTX 4090"), ("RTX-4090", "RTX 4090"), ("4090", "RTX 4090"), ("a100-80", "A100 80GB"),
        ("A100 40 gb", "A100 40GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("h100", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("h100_pcie", "H100 PCIe"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("tesla t4", "T4"), ("a10", "A10"), ("l4", "L4"), ("NVIDIA L40S", "L40S"), ("a6000", "RTX A6000"),
        ("3060", "RTX 3060 12GB"),
        ("geforce rtx 4060ti 16g", "RTX 4060 Ti 16GB"), ("4060-ti-8gb", "RTX 4060 Ti 8GB"),
        ("rtx pro 6000", "RTX PRO 6000 Blackwell"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
        ("H200", "H200"), ("b200 180GB", "B200"), ("A100", "A100 80GB"),
    ],
)  # fmt: skip
def test_a_card_is_found_as_people_write_it(spelling: str, name: str) -> None:
    assert find(spelling) == CARDS[spelling] == CARDS[name]
    assert CARDS[name].name == name


@each(EVERY)
def test_a_card_is_found_by_its_name_and_its_drivers(card: Card) -> None:
    assert find(card.name) is card
    assert find(card.name.lower().replace(" ", "-")) == card
    if card.kind != "NVIDIA GeForce RTX 4060 Ti":  # the driver does not say which
        assert find(card.kind) is card


def test_a_guess_is_told() -> None:
    assert "A100 40GB" in find("a100").notes
    assert "H100 PCIe" in find("h100").notes
    assert "a100" in str(find("a100"))


@pytest.mark.parametrize(
    ("spelling", "names"),
    [
        ("4060 ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
        ("NVIDIA GeForce RTX 4060 Ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
        ("6000", ["RTX A6000", "RTX PRO 6000 Blackwell"]), ("a10g", ["A10"]), ("l40", ["L40S"]), ("4080", ["RTX 4090"]),
        ("3090 ti", ["RTX 3090"]), ("4090 laptop", ["RTX 4090"]), ("a100 80gb pcie", ["A100 80GB"]), ("gb200", ["B200"]),
        ("h200 nvl", ["H200"]), ("3060 8gb", ["RTX 3060 12GB"]), ("", []), ("rtx", []), ("gpu", []),
    ],
)  # fmt: skip
def test_a_name_of_none_or_of_several_is_refused(spelling: str, names: list[str]) -> None:
    with pytest.raises(ValueError, match="by numbers") as said:
        find(spelling)
    assert all(n in str(said.value) for n in names)
    assert spelling not in CARDS
    assert NUMBERS in str(said.value)
    assert find(NUMBERS).cores == 128  # what it says to write is understood


def test_numbers_make_a_card() -> None:
    given, known = find(NUMBERS), CARDS["RTX 4090"]
    same = ("capability", "cores", "memory", "bandwidth", "link", "clock", "l2", "limits", "fp32")
    assert [getattr(given, f) for f in same] == [getattr(known, f) for f in same]
    assert given.tensor == pytest.approx(known.tensor)
    assert given.usable < known.usable  # the rule is the conservative side
    assert given.pcie is None
    for word in ("l2", "clock", "tensor", "usable", "RTX 4090"):
        assert word in given.notes


def test_numbers_given_are_not_guessed() -> None:
    card = from_numbers(
        " sm_86 , cores=46, memory=8GB,usable=7.2GiB, bandwidth=448GB/s, link = pcie4x16,"
        "l2=4MB, clock=1725MHz, tensor=40.6TFLOPS"
    )
    assert (card.capability, card.cores, card.memory, card.usable) == ((8, 6), 46, 8 * GiB, int(7.2 * GiB))
    assert (card.pcie, card.link) == ((4, 16), 25e9)
    assert (card.l2, card.clock, card.tensor) == (4 * 2**20, pytest.approx(1.725), pytest.approx(40.6e12))
    assert card.fp32 == pytest.approx(20.3e12, rel=0.01)  # the GeForce RTX 3070 of the GA102 whitepaper
    assert card.notes == ""


def test_what_is_not_given_comes_from_the_nearest_of_its_capability() -> None:
    small = from_numbers("sm_89,memory=8GB,bandwidth=272GB/s,link=pcie4x8,cores=24")
    assert "RTX 4060 Ti 8GB" in small.notes
    assert small.l2 == CARDS["RTX 4060 Ti 8GB"].l2
    assert small.tensor == pytest.approx(CARDS["RTX 4060 Ti 8GB"].tensor * 24 / 34)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sm_89", "lacks memory=, bandwidth=, link=, cores="),
        (NUMBERS.replace("sm_89,", ""), "lacks sm_XY"),
        (NUMBERS.replace(",cores=128", ""), "lacks cores="),
        (NUMBERS + ",colour=red", "'colour=red' is no field"),
        (NUMBERS + ",fast", "'fast' is no field"),
        (NUMBERS + ",cores=64", "cores is given twice"),
        (NUMBERS + ",sm_90", "second compute capability"),
        (NUMBERS.replace("24GB", "-24GB"), "memory is '-24GB'; it must be more than 0"),
        (NUMBERS.replace("1008GB/s", "0GB/s"), "bandwidth is '0GB/s'; it must be more than 0"),
        (NUMBERS.replace("24GB", "24"), "memory is '24'; write a size such as 24GB"),
        (NUMBERS.replace("1008GB/s", "1008GB"), "write a rate such as 1008GB/s"),
        (NUMBERS.replace("25GB/s", "pcie9x16"), "generation 3, 4 or 5"),
        (NUMBERS.replace("25GB/s", "pcie4x7"), "1, 2, 4, 8 or 16 lanes"),
        (NUMBERS.replace("=128", "=0"), "cores is '0'"),
        (NUMBERS.replace("=128", "=12.5"), "cores is '12.5'"),
        (NUMBERS.replace("24GB", "300MB"), "must be more than 0.62GB"),
        (NUMBERS + ",usable=24GB", "usable is '24GB'; it must be less than memory"),
        (NUMBERS.replace("sm_89", "sm_70"), "sm_75 is the nearest"),
        (NUMBERS.replace("sm_89", "sm_121"), "sm_120 is the nearest"),
    ],
)
def test_numbers_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError) as said:  # noqa: PT011
        find(text)
    assert says in str(said.value)
    assert "\n" not in str(said.value)


def test_a_card_reads_as_a_table() -> None:
    lines = str(find("4090")).splitlines()
    assert lines[0] == "RTX 4090 (NVIDIA GeForce RTX 4090, sm_89)"
    told = {line[2:17].strip(): line[17:] for line in lines[1:]}
    assert told["memory"] == "24.0 GiB sold, 23.5 GiB reported, 22.9 GiB usable"
    assert told["host link"] == "PCIe 4.0 x16, 31.5 GB/s on the wire, 25.0 GB/s reached"
    assert told["tensor"] == "165.2 TFLOP/s, bfloat16, dense"
    assert told["shared memory"] == "100 KiB a core, 99 KiB a block"
    assert "whitepaper" in told["source"]
    assert "float16, dense" in str(find("t4"))
    assert "notes" not in told


def test_a_card_is_frozen_and_hashable() -> None:
    assert len(set(EVERY)) == len(EVERY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVERY[0].memory = 0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.aot
@compiles
@each([*EVERY, find(NUMBERS)])
def test_a_streamed_scan_compiles_for_the_card(card: Card) -> None:
    """Layers in pinned memory, one or two at a time on the card, and no second copy of them on the host."""
    L, B, D = 6, 8, 1024
    dtype = jnp.dtype(card.tensor_dtype)
    layer = D * D * dtype.itemsize

    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.device_put(w, jax.memory.Space.Device)), None

        return jax.lax.scan(body, x, w)[0]

    with aot.target(card) as target:
        host = NamedSharding(target.mesh, P(), memory_kind="pinned_host")
        args = (jax.ShapeDtypeStruct((L, D, D), dtype, sharding=host), jax.ShapeDtypeStruct((B, D), dtype))
        compiled = target.compile(jax.jit(run), *target.place(args))
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes == L * layer
    assert memory.host_temp_size_in_bytes == 0
    cublas = 4 * 2**20  # its workspace, where XLA leaves the product to it
    assert layer <= memory.temp_size_in_bytes < 2.1 * layer + cublas < L * layer


@pytest.mark.aot
@compiles
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["RTX 3090", "L40S", "RTX 5090"])
def test_pallas_lowers_for_a_card_that_it_has_no_name_for(name: str) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def double(x_ref: jax.Ref, o_ref: jax.Ref) -> None:  # pyright: ignore[reportAttributeAccessIssue]
        o_ref[...] = x_ref[...] * 2

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    with aot.target(CARDS[name]) as target:
        call = pl.pallas_call(double, out_shape=x, compiler_params=triton.CompilerParams(num_warps=4))
        compiled = target.compile(jax.jit(call), *target.place((x,)))
    assert "triton" in compiled.as_text()
