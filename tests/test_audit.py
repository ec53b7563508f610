"""What `pallas_kernels.audit` says of programs whose faults are known.

The programs are the ways of streaming layers from host memory that XLA takes well, and those that it takes badly, compiled
for cards that are not there. Wrong addresses cannot be compiled any more (openxla/xla#46231 is fixed): there the text of a
real program is given the numbers that the bug wrote. What each way costs was read off XLA's thunks and buffers first, so
the oracle of every case is the way itself, not what the reader says of it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_aot import compiled_decode

from jaxengine.plan import Plan
from pallas_kernels import aot
from pallas_kernels.audit import ProgramError, Report, audit

compiles = [pytest.mark.aot, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

L, D, F, B = 6, 256, 512, 16
MATRIX = D * F * 2
LAYER = 2 * MATRIX

# A reverse scan over h = tanh(h @ w), w of [6, 512, 512] in host memory, as jax 0.12.0.1 compiles it for an RTX 4090
TEXT = """\
HloModule jit_back, is_scheduled=true, entry_computation_layout={(bf16[6,512,512]{2,1,0:S(5)}, bf16[16,512]{1,0})->bf16[16,512]{1,0}}

%gemm (param_0: bf16[16,512], param_1: bf16[512,512]) -> bf16[16,512] {
  %param_0 = bf16[16,512]{1,0} parameter(0)
  %param_1 = bf16[512,512]{1,0} parameter(1)
  ROOT %dot.2 = bf16[16,512]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sliced (param_0.12: bf16[6,512,512], param_1.8: s32[], param_2.1: s32[], param_3.1: s32[]) -> bf16[1,512,512] {
  %param_0.12 = bf16[6,512,512]{2,1,0:S(5)} parameter(0)
  %param_1.8 = s32[] parameter(1)
  %param_2.1 = s32[] parameter(2)
  %param_3.1 = s32[] parameter(3)
  ROOT %dynamic_slice.2.1 = bf16[1,512,512]{2,1,0} dynamic-slice(%param_0.12, %param_1.8, %param_2.1, %param_3.1), dynamic_slice_sizes={1,512,512}, backend_config={"dynamic_slice_config":{"loop_index":"0","byte_offset":"0","byte_stride":"0","linear":{"byte_offset":"2621440","byte_stride":"-524288"}}}
}

%fused_add (param_0.9: s32[]) -> s32[] {
  %param_0.9 = s32[] parameter(0)
  %constant_5_1 = s32[] constant(1)
  ROOT %add.1.1 = s32[] add(%param_0.9, %constant_5_1)
}

%fused_subtract (param_0.11: s32[]) -> s32[] {
  %constant_2_1 = s32[] constant(5)
  %param_0.11 = s32[] parameter(0)
  ROOT %subtract.2 = s32[] subtract(%constant_2_1, %param_0.11)
}

%region_0.2 (arg_tuple.1: (s32[], bf16[16,512], bf16[6,512,512])) -> (s32[], bf16[16,512], bf16[6,512,512]) {
  %arg_tuple.1 = (s32[], bf16[16,512]{1,0}, bf16[6,512,512]{2,1,0:S(5)}) parameter(0)
  %get-tuple-element.6 = s32[] get-tuple-element(%arg_tuple.1), index=0
  %loop_subtract_fusion = s32[] fusion(%get-tuple-element.6), kind=kLoop, calls=%fused_subtract
  %constant_0_0 = s32[] constant(0)
  %get-tuple-element.14 = bf16[6,512,512]{2,1,0:S(5)} get-tuple-element(%arg_tuple.1), index=2
  %dynamic-slice-start.1 = ((bf16[6,512,512]{2,1,0:S(5)}, s32[], s32[], s32[]), bf16[1,512,512]{2,1,0}, u32[]) fusion-start(%get-tuple-element.14, %loop_subtract_fusion, %constant_0_0, %constant_0_0), kind=kLoop, calls=%sliced
  %loop_add_fusion = s32[] fusion(%get-tuple-element.6), kind=kLoop, calls=%fused_add, control-predecessors={%loop_subtract_fusion}
  %dynamic-slice-done.1 = bf16[1,512,512]{2,1,0} fusion-done(%dynamic-slice-start.1)
  %get-tuple-element.7 = bf16[16,512]{1,0} get-tuple-element(%arg_tuple.1), index=1
  %bitcast.2.0 = bf16[512,512]{1,0} bitcast(%dynamic-slice-done.1)
  %gemm_fusion_dot = bf16[16,512]{1,0} fusion(%get-tuple-element.7, %bitcast.2.0), kind=kCustom, calls=%gemm
  ROOT %tuple.3 = (s32[], bf16[16,512]{1,0}, bf16[6,512,512]{2,1,0:S(5)}) tuple(%loop_add_fusion, %gemm_fusion_dot, %get-tuple-element.14)
}

%fused_compare (param_0.2: s32[]) -> pred[] {
  %param_0.2 = s32[] parameter(0)
  %constant_8_1 = s32[] constant(6)
  ROOT %lt.1.1 = pred[] compare(%param_0.2, %constant_8_1), direction=LT
}

%region_1.3 (arg_tuple.3: (s32[], bf16[16,512], bf16[6,512,512])) -> pred[] {
  %arg_tuple.3 = (s32[], bf16[16,512]{1,0}, bf16[6,512,512]{2,1,0:S(5)}) parameter(0)
  %get-tuple-element.9.0 = s32[] get-tuple-element(%arg_tuple.3), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%get-tuple-element.9.0), kind=kLoop, calls=%fused_compare
}

ENTRY %main.4 (W.1: bf16[6,512,512], h.1: bf16[16,512]) -> bf16[16,512] {
  %constant_9_0 = s32[] constant(0)
  %copy.9 = s32[] copy(%constant_9_0)
  %h.1 = bf16[16,512]{1,0} parameter(1)
  %copy.8 = bf16[16,512]{1,0} copy(%h.1)
  %W.1 = bf16[6,512,512]{2,1,0:S(5)} parameter(0)
  %tuple = (s32[], bf16[16,512]{1,0}, bf16[6,512,512]{2,1,0:S(5)}) tuple(%copy.9, %copy.8, %W.1)
  %while.5 = (s32[], bf16[16,512]{1,0}, bf16[6,512,512]{2,1,0:S(5)}) while(%tuple), condition=%region_1.3, body=%region_0.2, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %while.7.0 = bf16[16,512]{1,0} get-tuple-element(%while.5), index=1
}
"""  # noqa: E501
LINE = '"linear":{"byte_offset":"2621440","byte_stride":"-524288"}'


def edited(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def line(offset: int, stride: int) -> tuple[str, str]:
    return LINE, f'"linear":{{"byte_offset":"{offset}","byte_stride":"{stride}"}}'


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_a_copy_is_told_in_full() -> None:
    report = audit(TEXT).check()
    (copy,) = report.copies
    assert (copy.name, copy.source, copy.target) == ("dynamic-slice-start.1", "host", "device")
    assert (copy.bytes, copy.dma, copy.matmuls) == (512 * 512 * 2, True, 0)
    assert (copy.offset, copy.stride) == (5 * 524288, -524288)
    assert (copy.loop, copy.turns, copy.runs) == ("while.5", 6, 6)
    assert (report.name, report.device, report.host) == ("jit_back", None, None)
    assert report.streamed == 6 * 512 * 512 * 2
    shown = str(report)
    for cell in (
        "dynamic-slice-start.1",
        "host to device",
        "DMA",
        "512.00 KiB",
        "2621440",
        "-524288",
        "no problem found",
    ):
        assert cell in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # what jax 0.10.2 and 0.11.0 write for a reverse scan
        (line(0, 524288), "reads at byte 0 of its stack in turn 0, and its index there says byte 2621440 (layer 5)"),
        (line(2621440, -262144), "in turn 1, and its index there says byte 2097152 (layer 4)"),
        (line(2097152, -524288), "reads at byte 2097152 of its stack in turn 0"),
        (line(3145728, -524288), "reads at byte 3145728 of its stack in turn 0"),
        (line(2621440, 0), "reads at byte 2621440 of its stack in turn 1"),
        ((LINE, '"table":{"offsets":["2621440","2097152","1572864","524288","1048576","0"]}'), "in turn 3"),
        ((f'"byte_offset":"0","byte_stride":"0",{LINE}', '"byte_offset":"0","byte_stride":"524288"'), "in turn 0"),
        (('"loop_index":"0"', '"loop_index":"1"'), "only 1 are around it"),
        # an address that stands still, as XLA writes for a turn that it takes out of its loop
        (('"loop_index":"0",', ""), "reads at byte 2621440 of its stack in turn 1"),
        # the index itself: 4 - i where 5 - i was compiled
        (("%constant_2_1 = s32[] constant(5)", "%constant_2_1 = s32[] constant(4)"), "says byte 2097152 (layer 4)"),
        # the counter starts at one, the compiled address at its place for zero
        (("%constant_9_0 = s32[] constant(0)", "%constant_9_0 = s32[] constant(1)"), "says byte 2097152 (layer 4)"),
    ],
)
def test_addresses_other_than_the_index(change: tuple[str, str], said: str) -> None:
    """Turn by turn, the compiled address against the index, whatever form either takes."""
    report = audit(edited(TEXT, change))
    (problem,) = report.problems
    assert "%dynamic-slice-start.1 in loop %while.5" in problem
    assert said in problem
    with pytest.raises(ProgramError, match=r"1 problem.*\n.*dynamic-slice-start\.1"):
        report.check()


SAME = """\
%fused_same (p: s32[]) -> s32[] {
  ROOT %p = s32[] parameter(0)
}

"""


@pytest.mark.parametrize(
    "changes",
    [
        [(LINE, '"table":{"offsets":["2621440","2097152","1572864","1048576","524288","0"]}')],
        [(f'"byte_offset":"0","byte_stride":"0",{LINE}', '"byte_offset":"2621440","byte_stride":"-524288"')],
        [line(0, 524288), ("calls=%fused_subtract", "calls=%fused_same"), ("%fused_add (", SAME + "%fused_add (")],
        [
            line(524288, 1048576),
            ("constant(5)", "constant(1)"),
            ("  ROOT %subtract.2", "  %twice = s32[] add(%param_0.11, %param_0.11)\n  ROOT %subtract.2"),
            ("subtract(%constant_2_1, %param_0.11)", "add(%twice, %constant_2_1)"),
            ('"n":"6"', '"n":"3"'),
        ],
    ],
    ids=["a table", "jax 0.10.2's line", "forwards", "every other layer"],
)
def test_addresses_that_are_the_index(changes: list[tuple[str, str]]) -> None:
    assert audit(edited(TEXT, *changes)).problems == ()


@pytest.mark.parametrize(
    ("offset", "stride", "said"),
    [
        (0, 524288, None),
        (2621440, -524288, None),
        (
            524288,
            524288,
            "is at byte 3145728 of its stack, which is no layer's: layers of 524288 bytes start at 0 to 2621440",
        ),
        (0, 262144, "goes 262144 bytes a turn, and a layer of its stack has 524288"),
        (1024, 524288, "is at byte 1024 of its stack, which is no layer's"),
        (2621440, 524288, "is at byte 5242880 of its stack"),
    ],
)
def test_an_index_that_is_not_known_is_judged_by_form(offset: int, stride: int, said: str | None) -> None:
    unknown = edited(TEXT, line(offset, stride), ("subtract(%constant_2_1", "remainder(%constant_2_1"))
    problems = audit(unknown).problems
    if said is None:
        assert problems == ()
    else:
        (problem,) = problems
        assert said in problem


def test_a_slice_that_no_copy_engine_can_take_is_read_by_a_kernel() -> None:
    """One without addresses, and one that its fusion does something with."""
    head, tail = TEXT.split(', backend_config={"dynamic_slice_config"', 1)
    said_by_a_kernel(audit(head + "\n" + tail.split("\n", 1)[1]))
    root = "  ROOT %dynamic_slice.2.1"
    negated = "\n  ROOT %neg = bf16[1,512,512]{2,1,0} negate(%dynamic_slice.2.1)\n}\n\n%fused_add"
    said_by_a_kernel(audit(edited(TEXT, (root, root.replace("ROOT ", "")), ("\n}\n\n%fused_add", negated))))


def said_by_a_kernel(report: Report) -> None:
    (copy,), (problem,) = report.copies, report.problems
    assert not copy.dma
    assert "%dynamic-slice-start.1 in loop %while.5 reads 512.00 KiB of host memory from a kernel" in problem


@pytest.mark.parametrize(
    ("between", "matmuls"),
    [
        ("bf16[16,512]{1,0} fusion(%get-tuple-element.6), kind=kCustom, calls=%gemm", 1),
        ('(f32[16,512]{1,0}, s8[0]{0}) custom-call(%get-tuple-element.6), custom_call_target="__cublas$gemm"', 1),
        ('bf16[16,512]{1,0} custom-call(%get-tuple-element.6), custom_call_target="__gpu$xla.gpu.triton"', 1),
        ('bf16[16,512]{1,0} custom-call(%get-tuple-element.6), custom_call_target="TopK"', 0),
        ("s32[] fusion(%get-tuple-element.6), kind=kLoop, calls=%fused_add", 0),
    ],
)
def test_what_runs_beside_a_copy_is_counted(between: str, matmuls: int) -> None:
    done = "  %dynamic-slice-done.1 ="
    text = edited(TEXT, (done, f"  %between = {between}\n{done}"))
    report = audit(text, overlap=True)
    assert report.copies[0].matmuls == matmuls
    assert bool(report.problems) == (matmuls == 0)
    assert not matmuls or audit(text, overlap=True).check()
    for problem in report.problems:
        assert "no matrix product runs while %dynamic-slice-start.1 in loop %while.5 copies" in problem


def test_streamed_bytes_must_be_those_expected() -> None:
    whole = 6 * 512 * 512 * 2
    assert audit(TEXT, streamed=whole).problems == ()
    (problem,) = audit(TEXT, streamed=whole // 2).problems
    assert f"brings {whole} bytes from host to device and {whole // 2} were expected" in problem
    # a loop whose turns are not known counts once
    assert audit(edited(TEXT, ('"known_trip_count":{"n":"6"},', ""))).streamed == whole // 6


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device_limit needs the bytes"):
        audit(TEXT, device_limit=1)
    with pytest.raises(ValueError, match=r"in_place needs the bytes"):
        audit(TEXT, in_place=True)
    with pytest.raises(ValueError, match=r"no HloModule"):
        audit("module @jit_f {")
    with pytest.raises(ValueError, match=r"no ENTRY"):
        audit(TEXT.split("ENTRY")[0])


def test_a_program_for_the_cpu_is_refused() -> None:
    """It has host arguments and no host memory: every check would pass."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    host = NamedSharding(mesh, P(), memory_kind="pinned_host")
    stack = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=host)
    h = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(mesh, P()))
    step = jax.jit(lambda w, h: lax.scan(lambda h, w: (h @ on_device(w), None), h, w)[0])
    with pytest.raises(ValueError, match=r"only one memory .* pallas_kernels\.aot"):
        audit(step.lower(stack, h).compile())


# ---------------------------------------------------------------------------------------------------------------------
# Programs, compiled


def on_device(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), tree)


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Host), tree)


def at(stacks: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), stacks)


def layer(h: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(h @ w["up"]) @ w["down"]


def scan(W: Any, h: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (layer(h, on_device(w)), None), h, W)[0]


def scan_back(W: Any, h: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (layer(h, on_device(w)), None), h, W, reverse=True)[0]


def counted(W: Any, h: jax.Array) -> jax.Array:
    return lax.fori_loop(0, L, lambda i, h: layer(h, on_device(at(W, i))), h)


def carried(first: Any, W: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    """Each turn brings the next turn's layer; W is stored one layer on."""

    def body(c: Any, w: Any) -> tuple[Any, None]:
        h, here = c
        ahead = on_device(w)
        return (layer(h, here), ahead), None

    return lax.scan(body, (h, first), W)[0]


def carried_by_counter(first: Any, W: Any, h: jax.Array) -> jax.Array:
    """The same with W as it is: i + 1, which older versions of XLA got wrong."""

    def body(i: Any, c: Any) -> Any:
        h, here = c
        ahead = on_device(at(W, i + 1))
        return layer(h, here), ahead

    return layer(*lax.fori_loop(0, L - 1, body, (h, first)))


def carried_by_array(first: Any, W: Any, h: jax.Array) -> jax.Array:
    def body(c: Any, i: Any) -> tuple[Any, None]:
        h, here = c
        ahead = on_device(at(W, jnp.minimum(i + 1, L - 1)))
        return (layer(h, here), ahead), None

    return lax.scan(body, (h, first), jnp.arange(L, dtype=jnp.int32))[0][0]


def scan_by_two(W: Any, h: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (layer(h, on_device(w)), None), h, W, unroll=2)[0]


def carried_modulo(first: Any, W: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    def body(i: Any, c: Any) -> Any:
        h, here = c
        ahead = on_device(at(W, (i + 1) % L))
        return layer(h, here), ahead

    return lax.fori_loop(0, L, body, (h, first))


def first_of_a_stack(W: Any, h: jax.Array) -> jax.Array:
    """The first layer is taken from the stack before the loop, which brings the next one ahead."""
    return carried_by_counter(on_device(jax.tree.map(lambda a: a[0], W)), W, h)


def slices(W: Any, h: jax.Array) -> jax.Array:
    for i in range(L):
        h = layer(h, on_device(jax.tree.map(lambda a, i=i: a[i], W)))
    return h


def ordered(layers: Any, h: jax.Array) -> jax.Array:
    here = on_device(layers[0])
    for i in range(L):
        ahead = None
        if i + 1 < L:
            stored, h = lax.optimization_barrier((layers[i + 1], h))
            ahead = on_device(stored)
        h, here = layer(h, here), ahead
    return h


def unordered(layers: Any, h: jax.Array) -> jax.Array:
    for w in layers:
        h = layer(h, on_device(w))
    return h


def brought_whole(W: Any, h: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (layer(h, w), None), h, on_device(W))[0]


def sliced_outside(first: Any, W: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    return carried(first, jax.tree.map(lambda a: a[1:], W), h)


def tuned(W: Any, small: jax.Array, h: jax.Array, *, prevent_cse: bool) -> jax.Array:
    """Gradients of something small beside each layer: W is streamed forwards and backwards."""

    def loss(small: jax.Array) -> jax.Array:
        def body(h: jax.Array, x: Any) -> tuple[jax.Array, None]:
            w, s = x
            return layer(h, on_device(w)) * s, None

        h_last, _ = lax.scan(jax.checkpoint(body, prevent_cse=prevent_cse), h, (W, small))
        return jnp.sum(h_last.astype(jnp.float32))

    return jax.grad(loss)(small)


def trained(W: Any, small: jax.Array, h: jax.Array) -> jax.Array:
    return tuned(W, small, h, prevent_cse=False)


def trained_behind_barriers(W: Any, small: jax.Array, h: jax.Array) -> jax.Array:
    return tuned(W, small, h, prevent_cse=True)


def written(stack: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, on_host(x), n, 0)


def updated(stack: jax.Array, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, L, lambda i, s: written(s, on_device(at(s, i)) + x, i), stack)


def updated_ahead(stack: jax.Array, x: jax.Array) -> jax.Array:
    """Brings a layer from the stack that it writes another layer of."""

    def body(i: Any, c: Any) -> Any:
        s, here = c
        ahead = on_device(at(s, i + 1))
        return written(s, here + x, i), ahead

    return lax.fori_loop(0, L - 1, body, (stack, on_device(at(stack, 0))))[0]


def doubled(h: jax.Array, stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    return h, stack + stack


# one of each generation that streams differently: the scheduler that overlaps copies is on by default on the H200 alone
CARDS = ("A100", "RTX 4090", "H200")
AHEAD = (("xla_gpu_enable_while_loop_double_buffering", True),)
UNSCHEDULED = (("xla_gpu_enable_latency_hiding_scheduler", False),)


def compiled(card: str, form: Callable[..., Any], rows: int = B, donate: int | None = None, options: tuple = ()) -> Any:
    """One of the forms, for arguments by the names of its parameters."""
    return _compiled(card, form, rows, donate, options)


@functools.cache
def _compiled(card: str, form: Callable[..., Any], rows: int, donate: int | None, options: tuple) -> Any:
    with aot.target(aot.CARDS[card]) as target:
        host = NamedSharding(target.mesh, P(), memory_kind="pinned_host")

        def here(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

        def there(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=host)

        shapes = {
            "W": {"up": there(L, D, F), "down": there(L, F, D)},
            "first": {"up": here(D, F), "down": here(F, D)},
            "layers": [{"up": there(D, F), "down": there(F, D)} for _ in range(L)],
            "h": here(rows, D),
            "small": here(L, 1, D),
            "stack": there(L, D, F),
            "x": here(D, F),
            "n": jax.ShapeDtypeStruct((), jnp.int32),
        }
        names = list(inspect.signature(form).parameters)
        jitted = jax.jit(
            form,
            donate_argnums=() if donate is None else donate,
            out_shardings=host if names[0] == "stack" else None,
        )
        return target.compile(jitted, *target.place(tuple(shapes[n] for n in names)), **dict(options))


def told(report: Report, *words: str) -> bool:
    """Every problem has one of the words, and every word a problem."""
    said = all(any(w in p for w in words) for p in report.problems)
    return bool(report.problems) and said and all(any(w in p for p in report.problems) for w in words)


@pytest.mark.parametrize("card", CARDS)
class TestGood:
    pytestmark = compiles

    @pytest.mark.parametrize("form", [scan, scan_back, counted])
    def test_a_layer_a_turn(self, card: str, form: Callable[..., Any]) -> None:
        report = audit(compiled(card, form), in_place=True, device_limit=4 * LAYER, streamed=L * LAYER).check()
        assert {c.bytes for c in report.copies} == {MATRIX}
        assert all(c.dma and c.turns == L for c in report.copies)
        walk = ((L - 1) * MATRIX, -MATRIX) if form is scan_back else (0, MATRIX)
        assert {(c.offset, c.stride) for c in report.copies} == {walk}
        assert report.host is not None
        assert (report.host.arguments, report.host.temporaries) == (L * LAYER, 0)

    @pytest.mark.parametrize("rows", [1, B])
    def test_one_layer_ahead(self, card: str, rows: int) -> None:
        """With one row XLA writes no matrix products: sums of products, under their old name."""
        program = compiled(card, carried, rows=rows, donate=0, options=AHEAD)
        report = audit(program, overlap=True, in_place=True, device_limit=4 * LAYER, streamed=L * LAYER).check()
        # XLA unrolls the loop by two: two layers a turn, each copy under both matrix products of a layer
        assert {(c.offset, c.stride, c.turns) for c in report.copies} == {(0, 2 * MATRIX, 3), (MATRIX, 2 * MATRIX, 3)}
        assert {c.matmuls for c in report.copies} == {2}

    def test_one_layer_ahead_by_a_counter(self, card: str) -> None:
        report = audit(compiled(card, carried_by_counter), overlap=True, streamed=(L - 1) * LAYER).check()
        assert {(c.offset, c.stride) for c in report.copies} == {(MATRIX, MATRIX)}

    def test_a_list_in_order(self, card: str) -> None:
        report = audit(compiled(card, ordered), device_limit=4 * LAYER, streamed=L * LAYER).check()
        assert len(report.copies) == 2 * L
        assert all(c.dma and c.loop is None and c.runs == 1 for c in report.copies)

    def test_forwards_and_backwards(self, card: str) -> None:
        report = audit(compiled(card, trained), in_place=True, device_limit=4 * LAYER, streamed=2 * L * LAYER).check()
        assert {(c.offset, c.stride) for c in report.copies} == {(0, MATRIX), ((L - 1) * MATRIX, -MATRIX)}

    def test_a_stack_written_in_place(self, card: str) -> None:
        one = audit(compiled(card, written, donate=0), in_place=True).check()
        assert [(c.source, c.target, c.bytes) for c in one.copies] == [("device", "host", MATRIX)]
        report = audit(compiled(card, updated, donate=0), in_place=True, streamed=L * MATRIX).check()
        assert {(c.source, c.target) for c in report.copies} == {("device", "host"), ("host", "device")}
        assert all(c.dma and (c.offset, c.stride) == (0, MATRIX) for c in report.copies)


FURTHER = ("RTX A6000", "B200", "RTX 5090")  # with CARDS, every generation


@pytest.mark.parametrize("card", FURTHER)
class TestFurtherGenerations:
    """A layer a turn, forwards and backwards, on the cards that stand for no difference known."""

    pytestmark = compiles

    @pytest.mark.parametrize(("form", "walk"), [(scan, (0, MATRIX)), (scan_back, ((L - 1) * MATRIX, -MATRIX))])
    def test_a_layer_a_turn(self, card: str, form: Callable[..., Any], walk: tuple[int, int]) -> None:
        report = audit(compiled(card, form), in_place=True, device_limit=4 * LAYER, streamed=L * LAYER).check()
        assert {c.bytes for c in report.copies} == {MATRIX}
        assert {(c.offset, c.stride, c.turns, c.dma) for c in report.copies} == {(*walk, L, True)}


def test_every_generation_is_compiled_for() -> None:
    found = {aot.CARDS[card].capability for card in (*CARDS, *FURTHER)}
    assert found == {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}


@pytest.mark.parametrize("card", CARDS)
class TestBad:
    pytestmark = compiles

    @pytest.mark.parametrize(
        ("form", "donate", "options", "right", "said"),
        [
            (scan_back, None, (), ((L - 1) * MATRIX, -MATRIX), f"at byte 0 of its stack in turn 0, .* {(L - 1) * MATRIX} "),
            (carried_by_counter, None, (), (MATRIX, MATRIX), f"at byte 0 of its stack in turn 0, .* says byte {MATRIX} "),
            (carried, 0, AHEAD, (0, 2 * MATRIX), f"at byte {MATRIX} of its stack in turn 1, .* says byte {2 * MATRIX} "),
        ],
    )  # fmt: skip
    def test_wrong_addresses(
        self, card: str, form: Callable[..., Any], donate: int | None, options: tuple, right: tuple[int, int], said: str
    ) -> None:
        """Real programs with the walk that openxla/xla#46231 wrote for all of them: 0, S, 2S."""
        text = compiled(card, form, donate=donate, options=options).as_text()
        assert audit(text).problems == ()
        problems = audit(edited(text, (line(*right)[1], line(0, MATRIX)[1]))).problems
        assert len(problems) == 2
        assert all(re.search(said, p) for p in problems)

    def test_a_stack_brought_whole(self, card: str) -> None:
        program = compiled(card, brought_whole)
        assert told(audit(program), "brings a whole stack of 1.50 MiB to the device")
        assert told(audit(program, device_limit=4 * LAYER), "brings a whole stack", "and the limit is 2.00 MiB")

    def test_a_stack_sliced_outside_the_loop(self, card: str) -> None:
        program = compiled(card, sliced_outside, rows=1)
        assert told(audit(program), "host compute")
        assert told(audit(program, in_place=True), "host compute", "of host memory for itself")

    @pytest.mark.parametrize("form", [carried_by_array, carried_modulo, scan_by_two])
    def test_an_index_that_is_no_counter(self, card: str, form: Callable[..., Any]) -> None:
        assert told(audit(compiled(card, form, rows=1)), "index the stack by the loop's own counter alone")

    @pytest.mark.parametrize(("form", "layers"), [(first_of_a_stack, 1), (slices, L)])
    def test_a_layer_of_a_stack_outside_a_loop(self, card: str, form: Callable[..., Any], layers: int) -> None:
        report = audit(compiled(card, form, rows=1))
        assert told(report, "of a stack in host memory from a kernel, not by DMA: outside a loop")
        assert len(report.problems) == 2 * layers

    def test_ways_back_behind_barriers(self, card: str) -> None:
        """jax.checkpoint's own barriers end what stands in for overlap in a plain scan: one matrix beside the other's use."""
        beside = []
        for form in (trained, trained_behind_barriers):
            back = [c for c in audit(compiled(card, form)).copies if c.stride == -MATRIX]
            beside.append(sum(c.matmuls for c in back))
        assert beside == [1, 0]

    def test_a_whole_scan_that_xla_pipelines_itself(self, card: str) -> None:
        """With its own pipelining it reads from kernels; our options say no, whatever a version's default is."""
        own = compiled(card, scan, options=(("xla_gpu_enable_pipelined_host_offloading", True),))
        assert told(audit(own), "from a kernel, not by DMA")
        assert aot.OPTIONS["xla_gpu_enable_pipelined_host_offloading"] is False

    def test_a_stack_read_ahead_while_it_is_written(self, card: str) -> None:
        program = compiled(card, updated_ahead, donate=0)
        both = (
            "copies 1.50 MiB from host memory to host memory",
            "outside a loop",
        )  # and its first layer, before the loop
        assert told(audit(program), *both)
        assert told(audit(program, in_place=True), *both, "of host memory for itself")

    def test_a_stack_that_is_not_donated(self, card: str) -> None:
        program = compiled(card, written)
        assert told(audit(program, in_place=True), "from host memory to host memory", "only 0 B of 1.50 MiB of outputs")

    def test_a_list_without_order(self, card: str) -> None:
        program = compiled(card, unordered, rows=1)
        assert audit(program).problems == ()
        assert told(audit(program, device_limit=4 * LAYER), "and the limit is 2.00 MiB")

    def test_nothing_beside_the_copies(self, card: str) -> None:
        program = compiled(card, carried, donate=0, options=UNSCHEDULED)
        assert audit(program).problems == ()
        assert told(audit(program, overlap=True), "no matrix product runs while %dynamic-slice-start")

    def test_compute_on_the_host(self, card: str) -> None:
        assert told(audit(compiled(card, doubled)), "host compute")


def written_one_on(stack: jax.Array, x: jax.Array) -> jax.Array:
    """The last turn writes behind the stack, where jax says that it is clamped."""
    return lax.fori_loop(
        0, L, lambda i, s: lax.dynamic_update_slice(s, on_host((x + i.astype(x.dtype))[None]), (i + 1, 0, 0)), stack
    )


def gathered(W: Any, h: jax.Array) -> jax.Array:
    return layer(h, jax.tree.map(lambda a: a[jnp.asarray([1])][0], W))


def gathered_there(W: Any, h: jax.Array) -> jax.Array:
    return layer(h, on_device(jax.tree.map(lambda a: a[on_host(jnp.asarray([1]))][0], W)))


def scattered_there(stack: jax.Array, x: jax.Array) -> jax.Array:
    return stack.at[on_host(jnp.asarray([1]))].set(on_host(x)[None])


def added(stack: jax.Array, x: jax.Array) -> jax.Array:
    return stack[0] + x


class TestTraps:
    """What else was found of arrays in host memory, on one card."""

    pytestmark = compiles
    CARD = "RTX 4090"

    def test_a_write_behind_its_stack(self) -> None:
        """A copy's addresses are not clamped (openxla/xla#49120 is of constant ones)."""
        program = compiled(self.CARD, written_one_on, donate=0)
        (copy,) = audit(program).copies
        assert copy.dma
        assert told(
            audit(program), f"writes at byte {L * MATRIX} of its stack in turn {L - 1}, and its index there says byte"
        )

    @pytest.mark.parametrize("form", [gathered, added])
    def test_spaces_that_are_mixed(self, form: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"memory_space of all inputs passed to .* must be the same"):
            compiled(self.CARD, form)

    @pytest.mark.parametrize(("form", "donate"), [(gathered_there, None), (scattered_there, 0)])
    def test_gathers_and_scatters(self, form: Callable[..., Any], donate: int | None) -> None:
        """openxla/xla#34565."""
        problems = audit(compiled(self.CARD, form, donate=donate)).problems
        assert any("host compute" in p for p in problems)

    def test_xla_warns_of_what_it_computes_on_the_host(self, capfd: pytest.CaptureFixture[str]) -> None:
        compiled(self.CARD, sliced_outside, rows=3)
        assert "host compute" in capfd.readouterr().err
        for form in (scan, carried):
            compiled(self.CARD, form, rows=3, donate=0 if form is carried else None)
        compiled_decode("H200", Plan(dtype="bfloat16", home="host"))
        assert "host_offloader" not in capfd.readouterr().err

    def test_few_copies_at_a_time_leave_some_without_compute(self) -> None:
        """Of a list in order, with the two that XLA allows by itself."""
        beside = {}
        for limit in (2, 16):
            options = (("xla_gpu_experimental_parallel_async_compute_limit", limit),)
            beside[limit] = sum(c.matmuls for c in audit(compiled(self.CARD, ordered, options=options)).copies)
        assert beside[2] < beside[16]
        assert aot.OPTIONS["xla_gpu_experimental_parallel_async_compute_limit"] == 16

    def test_host_arguments_alone_choose_no_compiler(self) -> None:
        with aot.target(aot.CARDS[self.CARD]) as target:
            host = NamedSharding(target.mesh, P(), memory_kind="pinned_host")
            stack = jax.ShapeDtypeStruct((L, D, F), jnp.bfloat16, sharding=host)
            with pytest.raises(RuntimeError, match="device_assignment"):
                target.compile(jax.jit(lambda s: on_device(s).sum()), stack)


SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
class TestEngine:
    pytestmark = compiles

    def test_decode_from_the_host(self, card: str) -> None:
        """Each token brings every layer once, by DMA, and takes no host memory for itself."""
        program, _ = compiled_decode(card, Plan(dtype="bfloat16", home="host"), SMALL)
        host = program.memory_analysis().host_argument_size_in_bytes  # pyright: ignore[reportAttributeAccessIssue]
        report = audit(program, in_place=True, streamed=host).check()
        assert report.copies
        assert all(c.dma and c.turns == 4 for c in report.copies)
