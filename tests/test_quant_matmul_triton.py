"""The Triton kernel of quant_matmul, interpreted on the CPU, against the matrix worked out in numpy from the layout's formula.

Number formats come from outside: ml_dtypes (fp8, E2M1), ldexp (e8m0), NF4 from quantiles of the normal distribution.
The PTX of the fast path does not run here: its text is, instruction by instruction, in numpy.
"""

from __future__ import annotations

import dataclasses
import re
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import quant_matmul as op
from pallas_kernels import shapes
from pallas_kernels.cards import CARDS, LIMITS
from pallas_kernels.dispatch import Gpu, Refused
from pallas_kernels.quant_matmul import triton
from pallas_kernels.quant_matmul.config import BLOCKS_PER_CORE, CODES, config

FOUR_BITS = ("int4", "nf4", "mxfp4")


def nf4_table() -> np.ndarray:
    """Dettmers et al., arXiv:2305.14314, equation 4: quantiles at equal distances, 8 above zero and 7 below, over the largest."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    values = np.sort(np.array([*above, 0.0, *below]))
    return values / values.max()


def numbers(kind: str) -> np.ndarray:
    """What codes 0 to 15 stand for, before zero and scale."""
    if kind == "int4":
        return np.arange(16.0)
    if kind == "nf4":
        return nf4_table()
    return np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    group_size: int
    M: int
    N: int
    K: int
    dtype: str = "bfloat16"
    zero: bool = False
    scale: str = "bfloat16"
    codes: str = "float8_e4m3fn"  # of fp8

    def __str__(self) -> str:
        zero = "-affine" if self.zero else ""
        return f"{self.kind}-g{self.group_size}{zero}-{self.dtype}-{self.M}x{self.N}x{self.K}-{self.scale}-{self.codes[7:]}"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        if self.kind == "fp8_block":
            return -(-self.N // 128), -(-self.K // 128)
        return (self.N, self.K // self.group_size) if self.group_size else (self.N,)

    def arrays(self, seed: int = 0) -> tuple[Any, Any, Any, Any]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.M, self.K)).astype(jnp.dtype(self.dtype))
        if self.kind in FOUR_BITS:
            codes: Any = rng.integers(0, 2**16, (self.N, self.K // 4), dtype=np.uint16)
        elif self.kind == "int8":
            codes = rng.integers(-127, 128, (self.N, self.K)).astype(np.int8)
        else:
            # subnormal ones too
            codes = (rng.standard_normal((self.N, self.K)) * 2.0 ** rng.integers(-9, 5, (self.N, self.K))).astype(
                jnp.dtype(self.codes)
            )
        if self.kind == "mxfp4":
            scale: Any = rng.integers(117, 125, self.scale_shape).astype(np.uint8)
        else:
            scale = rng.uniform(0.5, 1.5, self.scale_shape).astype(jnp.dtype(self.scale))
        zero = rng.uniform(0, 15, self.scale_shape).astype(jnp.dtype(self.scale)) if self.zero else None
        return x, codes, scale, zero

    def dense(self, codes: Any, scale: Any, zero: Any) -> np.ndarray:
        """The matrix in float64, by the formula of layout.py, one plane of words after the other."""
        N, K, G = self.N, self.K, self.group_size
        if self.kind in FOUR_BITS:
            q = np.empty((N, K))
            table, r = numbers(self.kind), np.arange(G // 4)
            for g in range(K // G):
                for j in range(4):
                    q[:, g * G + r + j * G // 4] = table[codes[:, g * G // 4 + r] >> 4 * j & 15]
        else:
            q = codes.astype(np.float64)
        s = np.ldexp(1.0, scale.astype(int) - 127) if self.kind == "mxfp4" else scale.astype(np.float64)
        if self.kind == "fp8_block":
            return q * np.kron(s, np.ones((128, 128)))[:N, :K]
        if not G:
            return q * s[:, None]
        if self.kind == "int4":
            q = q - (8 if zero is None else np.repeat(zero.astype(np.float64), G, 1))
        return q * np.repeat(s, G, 1)

    @property
    def tolerance(self) -> float:
        """Largest error, of what the root of sum (x w)^2 is. Weights that are rounded (NF4's table, and scales multiplied into
        them) are off by 2^-9 in bfloat16 and 2^-12 in float16 at most, and the largest of a thousand sums of such errors is
        within 4 of these; else only float32 sums are rounded."""
        narrow = self.kind in FOUR_BITS and self.group_size < 64
        folded = narrow and self.kind == "int4" and self.M > 16 and not self.zero and self.dtype == "bfloat16"
        if self.kind == "nf4" or folded:
            return 2.0**-7 if self.dtype == "bfloat16" else 2.0**-10
        return 3e-5

    def check(self, y: Any, x: Any, w: np.ndarray, tolerance: float | None = None) -> None:
        x64 = np.asarray(x).astype(np.float64)
        size = np.sqrt(x64**2 @ (w**2).T)
        assert y.shape == (self.M, self.N)
        error = np.abs(np.asarray(y).astype(np.float64) - x64 @ w.T) / size
        assert error.max() < (tolerance or self.tolerance), error.max()


def run(case: Case, arrays: Any, dtype: Any = jnp.float32) -> jax.Array:
    return triton.quant_matmul(
        *map(as_jax, arrays), kind=case.kind, group_size=case.group_size, dtype=dtype, interpret=True
    )


# half of the time here is LLVM's, for loops that turn a few times
QUICK = {"xla_backend_optimization_level": 0}


def compiled_run(case: Case, arrays: Any, dtype: Any = jnp.float32) -> jax.Array:
    given = tuple(map(as_jax, arrays))
    return jax.jit(lambda *a: run(case, a, dtype)).lower(*given).compile(compiler_options=QUICK)(*given)


def as_jax(array: Any) -> Any:
    return None if array is None else jnp.asarray(array)


# every number of rows, kind, and way through the kernel; N and K that are multiples of no tile where the kind allows it
CASES = [
    Case("int4", 128, 1, 200, 384),
    Case("int4", 128, 3, 64, 2304, scale="float16"),  # several parts of the inputs, the last one shorter
    Case("int4", 128, 16, 130, 256, "float16"),
    Case("int4", 128, 130, 200, 384, scale="float32"),
    Case("int4", 64, 8, 96, 192, zero=True),  # two tiles a turn, the last one half
    Case("int4", 64, 17, 96, 192, "float16", zero=True, scale="float32"),
    Case("int4", 32, 3, 72, 160),  # two groups in a product, whose columns are rows of one and of the other
    Case("int4", 32, 1, 130, 320, "float16", zero=True, scale="float16"),  # and scales loaded two at a time
    Case("int4", 32, 8, 72, 192, zero=True),
    Case("int4", 32, 2, 72, 192, scale="float32"),
    Case("int4", 32, 16, 72, 192),  # a product of each group
    Case("int4", 32, 17, 72, 160),  # scales in the weights
    Case("int4", 32, 64, 72, 160, zero=True),
    Case("int4", 16, 3, 72, 80, "float16"),  # four groups in a product
    Case("int4", 16, 1, 72, 96, zero=True),
    Case("int8", 0, 1, 200, 416),
    Case("int8", 0, 64, 200, 416, "float16", scale="float32"),
    Case("int8", 128, 17, 96, 384, scale="float32"),
    Case("int8", 32, 3, 96, 160),
    Case("nf4", 64, 3, 200, 192, scale="float32"),
    Case("nf4", 64, 130, 72, 192, "float16", scale="float32"),
    Case("nf4", 128, 16, 72, 256, scale="float32"),
    Case("mxfp4", 32, 8, 72, 160),
    Case("mxfp4", 32, 17, 72, 160),
    Case("mxfp4", 32, 64, 72, 160, "float16"),
    Case("fp8", 0, 3, 200, 416, scale="float32"),
    Case("fp8", 0, 17, 72, 160, "float16", scale="float32", codes="float8_e5m2"),
    Case("fp8_block", 128, 3, 200, 320, scale="float32"),
    Case("fp8_block", 128, 64, 300, 256, "float16", scale="float32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layouts_formula(case: Case) -> None:
    x, codes, scale, zero = case.arrays()
    case.check(compiled_run(case, (x, codes, scale, zero)), x, case.dense(codes, scale, zero))


USUAL = 2**26  # numbers of a matrix
# the usual kinds, and what GPTQ, AWQ and GGUF bring
REAL_KINDS = [
    Case("int4", 128, 0, 0, 0), Case("nf4", 64, 0, 0, 0, scale="float32"), Case("int8", 0, 0, 0, 0),
    Case("int4", 32, 0, 0, 0, zero=True), Case("fp8", 0, 0, 0, 0, scale="float32"), Case("mxfp4", 32, 0, 0, 0),
    Case("fp8_block", 128, 0, 0, 0, scale="float32"), Case("int4", 128, 0, 0, 0, zero=True), Case("int8", 128, 0, 0, 0),
]  # fmt: skip


def of_real_models() -> list[Any]:
    """Matrices of the project's list, kinds and rows in turn; of the largest (70B's and 27B's feed-forward) none, which take
    minutes and gigabytes."""
    found = []
    for i, matrix in enumerate(m for m in shapes.MATRICES if m.N * m.K <= USUAL):
        kind, M = REAL_KINDS[i % len(REAL_KINDS)], (1, 16)[i % 2]
        name = f"{matrix}, {kind.kind} {kind.group_size}{' zeros' if kind.zero else ''}, {M} rows"
        marks = () if i < 3 else pytest.mark.thorough
        found.append(pytest.param(dataclasses.replace(kind, M=M, N=matrix.N, K=matrix.K), id=name, marks=marks))
    return found


@pytest.mark.parametrize("case", of_real_models())
@pytest.mark.some_rows
def test_real_models_matrices(case: Case) -> None:
    """With the tiles, turns and splits that these shapes have; held against the formula are the first outputs, the last, and
    some between (no tile is wider than 128), whatever they are."""
    x, codes, scale, zero = case.arrays()
    y = np.asarray(run(case, (x, codes, scale, zero)))
    assert y.shape == (case.M, case.N)
    assert np.isfinite(y).all()
    middle = 128 * (case.N // 128 // 2)
    for first in sorted({0, middle, case.N - 128}):
        some = slice(first, first + 128)
        part = dataclasses.replace(case, N=128)
        of = slice(first // 128, first // 128 + 1) if case.kind == "fp8_block" else some
        part.check(y[:, some], x, part.dense(codes[some], scale[of], None if zero is None else zero[of]))


def test_a_card_that_converts_fp8_itself() -> None:
    case = Case("fp8", 0, 3, 200, 416, scale="float32")
    x, codes, scale, _ = map(as_jax, case.arrays())
    how: dict[str, Any] = {"kind": "fp8", "group_size": 0, "dtype": jnp.float32, "interpret": True}
    y = triton._local(x, codes, scale, None, card=Gpu((9, 0), 132), **how)
    assert np.array_equal(y, triton._local(x, codes, scale, None, card=Gpu((8, 0), 108), **how))


def test_the_result_is_rounded_once() -> None:
    """Two parts of the inputs are added in float32: the result is the float32 one rounded, or beside it."""
    case = Case("int4", 128, 3, 64, 2048)
    arrays = case.arrays()
    assert config(3, 64, 2048, "int4", 128, triton.ASSUMED).splits > 1
    y, exact = compiled_run(case, arrays, jnp.bfloat16), compiled_run(case, arrays)
    assert y.dtype == jnp.bfloat16
    assert np.array_equal(y, exact.astype(y.dtype))


def test_layers_of_a_scan() -> None:
    case = Case("int4", 128, 3, 128, 128)
    each = [case.arrays(seed) for seed in range(2)]
    codes, scale = (jnp.stack([as_jax(a[i]) for a in each]) for i in (1, 2))

    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        y = triton.quant_matmul(h, *w, kind="int4", group_size=128, dtype=jnp.float32, interpret=True)
        return (y / 256).astype(h.dtype), None

    x = each[0][0]
    found, _ = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(as_jax(x), (codes, scale))
    h = x
    for _, c, s, z in each:
        h = (h.astype(np.float64) @ case.dense(c, s, z).T / 256).astype(x.dtype)
    np.testing.assert_allclose(np.asarray(found, np.float64), h.astype(np.float64), atol=2**-8 * np.abs(h).max())


def test_batched_over_matrices() -> None:
    """As experts are: rows of their own for each, or the same for all."""
    case = Case("int4", 128, 3, 64, 128)
    each = [case.arrays(seed) for seed in range(2)]
    x, codes, scale = (jnp.stack([as_jax(a[i]) for a in each]) for i in range(3))

    def one(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return triton.quant_matmul(x, codes, scale, kind="int4", group_size=128, dtype=jnp.float32, interpret=True)

    for rows, axes in ((x, 0), (x[0], None)):
        found = jax.jit(jax.vmap(one, in_axes=(axes, 0, 0)))(rows, codes, scale)
        for y, own, (_, c, s, z) in zip(found, x if axes == 0 else (x[0], x[0]), each, strict=True):
            case.check(y, own, case.dense(c, s, z))


# -- over a mesh


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


SPLIT = [
    Case("int4", 128, 4, 64, 512),
    Case("int4", 64, 4, 64, 256, zero=True),
    Case("int8", 0, 4, 64, 256),
    Case("fp8_block", 128, 4, 512, 512, scale="float32"),
]


@pytest.mark.parametrize("way", ["outputs", "inputs"])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_over_a_mesh(case: Case, way: str) -> None:
    """Outputs split: no communication, and the result stays split. Inputs split: one sum. Rows go along."""
    x, codes, scale, zero = case.arrays()
    w = P("tensor", None) if way == "outputs" else P(None, "tensor")
    of_scale = w if len(case.scale_shape) == 2 else P(w[0])
    specs = (P("data", None) if way == "outputs" else P("data", "tensor"), w, of_scale, of_scale)
    there = mesh()
    placed = [
        None if a is None else jax.device_put(as_jax(a), NamedSharding(there, s))
        for a, s in zip((x, codes, scale, zero), specs, strict=True)
    ]
    compiled = jax.jit(lambda *a: run(case, a)).lower(*placed).compile(compiler_options=QUICK)
    told = set(
        re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", str(compiled.as_text()))
    )
    assert told == (set() if way == "outputs" else {"all-reduce"})
    y = compiled(*placed)
    assert y.sharding.is_equivalent_to(NamedSharding(there, P("data", "tensor" if way == "outputs" else None)), 2)
    case.check(y, x, case.dense(codes, scale, zero))


def test_a_split_through_a_group_is_undone() -> None:
    """8 inputs of a group on each device: they are gathered, and the product is whole."""
    case = Case("int4", 128, 4, 64, 128)
    x, codes, scale, _ = case.arrays()
    there = mesh()
    placed = [
        jax.device_put(as_jax(a), NamedSharding(there, s))
        for a, s in ((x, P(None, "tensor")), (codes, P(None, "tensor")), (scale, P()))
    ]
    y = jax.jit(lambda *a: run(case, (*a, None)))(*placed)
    case.check(y, x, case.dense(codes, scale, None))


def test_inside_shard_map() -> None:
    case = Case("int4", 128, 4, 64, 128)
    x, codes, scale, _ = case.arrays()

    def one(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return triton.quant_matmul(x, codes, scale, kind="int4", group_size=128, dtype=jnp.float32, interpret=True)

    split = P(("data", "tensor"), None)
    inside = jax.shard_map(one, mesh=mesh(), in_specs=(P(), split, split), out_specs=P(None, split[0]), check_vma=False)
    case.check(jax.jit(inside)(*map(as_jax, (x, codes, scale))), x, case.dense(codes, scale, None))


# -- the plain unpack, by name


@pytest.mark.parametrize(("kind", "group_size"), [("int4", 128), ("nf4", 64), ("mxfp4", 32)])
def test_the_plain_unpack_has_a_name(kind: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves then is asked for numbers in plain jnp, as the interpreter runs them here."""
    x, codes, scale, _ = map(as_jax, Case(kind, group_size, 3, 64, 256).arrays())
    how: Any = {"kind": kind, "group_size": group_size, "dtype": jnp.float32}
    asked = []

    def serving(x: Any, *rest: Any, packed: bool | None = None, **how: Any) -> jax.Array:
        asked.append(packed)
        return jnp.zeros((3, 64))

    monkeypatch.setattr(triton, "quant_matmul", serving)
    for name in ("triton", "triton_plain"):
        op.quant_matmul(x, codes, scale, **how, implementation=name)
    assert asked == [None, False]
    assert "triton_plain" in op.NAMES  # a card's table may have it


def test_without_a_gpu_the_plain_unpack_refuses() -> None:
    x, codes, scale, _ = map(as_jax, Case("int4", 128, 1, 64, 128).arrays())
    with pytest.raises(Refused, match="no GPU"):
        op.quant_matmul(x, codes, scale, kind="int4", group_size=128, dtype=jnp.float32, implementation="triton_plain")


# -- refusals and tiles


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": np.zeros((1025, 128), jnp.bfloat16)}, "1025 rows; the kernel serves 1 to 1024"),
        ({"x": np.zeros((0, 128), jnp.bfloat16)}, "0 rows"),
        ({"x": np.zeros((4, 128), np.float32)}, "x is float32; the kernel takes bfloat16 or float16"),
        ({"kind": "int3"}, "no kernel of int3"),
        ({"group_size": 96}, "powers of two from 16 on"),
        ({"group_size": 8}, "powers of two from 16 on"),
        ({"card": Gpu((7, 5), 40)}, r"\(7, 5\) knows no bfloat16 products"),
        ({"codes": np.zeros((0, 32), np.uint16)}, r"the matrix \[0, 128\] is empty"),
        ({"codes": jax.ShapeDtypeStruct((2**26, 32), jnp.uint16)}, "2147483648 words of codes"),
        ({"group_size": 4096, "x": np.zeros((64, 4096), jnp.bfloat16)}, "take a smaller group_size"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], said: str) -> None:
    given = {"x": np.zeros((4, 128), jnp.bfloat16), "codes": np.zeros((64, 32), np.uint16)} | change
    how = {"kind": "int4", "group_size": 128, "card": Gpu((8, 6), 82)} | {
        k: v for k, v in given.items() if k not in ("x", "codes")
    }
    found = triton.refusal(given["x"], given["codes"], **how)
    assert found is not None
    assert re.search(said, found), found


def test_it_refuses_where_there_is_no_gpu() -> None:
    x, codes, scale, _ = Case("int4", 128, 1, 64, 128).arrays()
    with pytest.raises(Refused, match="no GPU"):
        triton.quant_matmul(*map(as_jax, (x, codes, scale)), kind="int4", group_size=128, dtype=jnp.float32)
    with pytest.raises(Refused, match="x is float32"):
        triton.quant_matmul(
            jnp.zeros((1, 128)),
            as_jax(codes),
            as_jax(scale),
            kind="int4",
            group_size=128,
            dtype=jnp.float32,
            interpret=True,
        )


@pytest.mark.parametrize("capability", [c for c in LIMITS if c >= (8, 0)], ids=str)
def test_tiles_fit_and_fill_the_card(capability: tuple[int, int]) -> None:
    gpu = Gpu(capability, max(c.cores for c in CARDS.values() if c.capability == capability))
    for kind in CODES:
        for group_size in {"int8": (0, 32, 128), "fp8": (0,), "fp8_block": (128,)}.get(kind, (16, 32, 64, 128)):
            for matrix in shapes.MATRICES:
                for M in (1, 8, 9, 16, 32, 64, 1024):
                    for affine in (False, True)[: 1 + (kind == "int4")]:
                        made = config(M, matrix.N, matrix.K, kind, group_size, gpu, affine=affine)
                        assert made.shared_memory(kind) <= gpu.limits.shared_memory_block
                        inputs = made.columns * made.unroll * (4 if CODES[kind][0] == 4 else 1)
                        turns = -(-matrix.K // inputs)
                        each = -(-turns // made.splits)
                        assert made.splits == 1 or (made.splits - 1) * each < turns <= made.splits * each
                        assert made.splits == 1 or each >= 4
                        blocks = -(-matrix.N // made.block_n) * -(-M // made.block_m) * made.splits
                        # enough for each core, or as many as parts of four turns make
                        assert blocks >= gpu.cores or made.splits >= min(16, turns // 5), (matrix, made)
                        if M == 1 and matrix.N * matrix.K >= 2**25 and made.splits < 16:
                            assert blocks >= gpu.cores * BLOCKS_PER_CORE * 2 // made.warps


def test_shapes_are_of_whole_groups() -> None:
    assert len({str(m) for m in shapes.MATRICES}) == len(shapes.MATRICES)
    assert all(m.N % 128 == 0 and m.K % 128 == 0 for m in shapes.MATRICES)


# -- PTX


def ptx(text: str, *given: np.ndarray, results: int = 1) -> list[np.ndarray]:
    """The registers $0 ... of inline PTX, for arrays of 32-bit registers. Raises for an instruction that is not known here."""
    registers: dict[str, Any] = {f"${results + i}": v.astype(np.uint32) for i, v in enumerate(given)}
    registers["%lanemask_eq"], registers["%lanemask_lt"] = np.uint32(1 << 7), np.uint32((1 << 7) - 1)  # of lane 7

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        out, *sources = (s.strip() for s in rest.split(","))
        a = [value(s) for s in sources]
        registers[out] = OPERATIONS[name](*a)
    return [np.broadcast_to(registers[f"${i}"], given[0].shape) for i in range(results)]


def lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    found = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def prmt(a: Any, b: Any, selector: Any) -> Any:
    source = [(a >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)]
    source += [(b >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)]
    found = np.uint32(0)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.choose(np.broadcast_to(pick & np.uint32(7), np.broadcast(a, b, selector).shape), source)
        byte = np.where(pick & np.uint32(8), np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        found = found | byte << np.uint32(8 * i)
    return found


def fma_of(dtype: Any) -> Any:
    def one(a: Any, b: Any, c: Any) -> Any:
        with np.errstate(invalid="ignore", over="ignore"):
            return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype)

    def fma(*registers: Any) -> Any:
        low, high = (
            [(np.asarray(r) >> np.uint32(s)).astype(np.uint16).view(dtype) for r in registers] for s in (0, 16)
        )
        return one(*low).view(np.uint16).astype(np.uint32) | one(*high).view(np.uint16).astype(np.uint32) << np.uint32(
            16
        )

    return fma


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "shl.b32": lambda a, n: a << n,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": fma_of(jnp.bfloat16),
    "fma.rn.f16x2": fma_of(np.float16),
}

WORDS = np.arange(2**16, dtype=np.uint32)
OTHERS = np.random.default_rng(1).permutation(WORDS)


def halves(register: np.ndarray, dtype: str) -> list[np.ndarray]:
    return [(register >> np.uint32(s)).astype(np.uint16).view(jnp.dtype(dtype)) for s in (0, 16)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_ptx_of_four_bits(kind: str, dtype: str) -> None:
    """All words, each beside another."""
    text = {"int4": triton.int4_ptx, "nf4": triton.nf4_ptx, "mxfp4": triton.mxfp4_ptx}[kind]
    table = numbers(kind) + (triton.MAGIC[dtype][1] if kind == "int4" else 0)
    table = table.astype(np.float32).astype(jnp.dtype(dtype))
    for j in range(4):
        [found] = ptx(text(j, dtype), WORDS | OTHERS << np.uint32(16))
        for half, words in zip(halves(found, dtype), (WORDS, OTHERS), strict=True):
            assert np.array_equal(half, table[words >> np.uint32(4 * j) & np.uint32(15)])


@pytest.mark.parametrize("codes", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ptx_of_fp8(dtype: str, codes: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        finite = every[np.isfinite(every.view(jnp.dtype(codes)).astype(np.float32))]
    four = np.stack([np.roll(finite, i) for i in range(4)], 1)
    registers = np.ascontiguousarray(four).view("<u4")[:, 0]
    found = ptx(triton.fp8_ptx(dtype, codes == "float8_e5m2"), registers, results=2)
    for i in range(4):
        wanted = four[:, i].copy().view(jnp.dtype(codes)).astype(jnp.dtype(dtype))
        assert np.array_equal(halves(found[i // 2], dtype)[i % 2], wanted)


@pytest.mark.parametrize("offset", [0, 136])
def test_ptx_of_scales_in_the_weights(offset: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, 2**12) + (128 if offset else 0)
    scales = rng.uniform(1e-3, 1e-2, 2**12).astype(jnp.bfloat16)
    w, s = (a.astype(jnp.bfloat16).view(np.uint32) for a in (codes, scales))
    [found] = ptx(triton.folded_ptx(offset), w, s)
    exact = (codes - offset) * scales.astype(np.float64)
    assert np.array_equal(found.view(jnp.bfloat16), exact.astype(jnp.bfloat16))
