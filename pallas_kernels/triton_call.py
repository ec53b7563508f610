"""pallas_call for Triton, said once for all kernels.

Triton is chosen by passing `plt.CompilerParams`: without them jax 0.10 lowers for Mosaic. Since jax 0.11 lowering warns that
this backend is deprecated, when a program is lowered and not where it was written, so that a caller who turns warnings
into errors could not silence it around the call. The call is therefore an operation of its own whose lowering silences
that one warning and no other. In interpret mode, for the CPU, it is `pl.pallas_call` itself.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive
from jax.interpreters import mlir

_call_p = Primitive("pallas_triton_call")
_call_p.multiple_results = True


@overload
def triton_call(
    kernel: Callable[..., None], *arrays: jax.Array | None, out_shape: jax.ShapeDtypeStruct, grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec | None], out_specs: pl.BlockSpec, num_warps: int, num_stages: int, name: str,
    interpret: bool = False,
) -> jax.Array: ...  # fmt: skip
@overload
def triton_call(
    kernel: Callable[..., None], *arrays: jax.Array | None, out_shape: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...], in_specs: Sequence[pl.BlockSpec | None], out_specs: tuple[pl.BlockSpec, ...],
    num_warps: int, num_stages: int, name: str, interpret: bool = False,
) -> tuple[jax.Array, ...]: ...  # fmt: skip
def triton_call(
    kernel: Callable[..., None],
    *arrays: jax.Array | None,
    out_shape: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec | None],
    out_specs: pl.BlockSpec | tuple[pl.BlockSpec, ...],
    num_warps: int,
    num_stages: int,
    name: str,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, ...]:
    """One array in `out_shape`, or a tuple, from a kernel over `grid`, compiled by Triton for the GPU it is lowered for.

    An array that is None is a reference that is None in the kernel; its spec counts for nothing.
    """
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=[None if array is None else spec for array, spec in zip(arrays, in_specs, strict=True)],
        out_specs=out_specs,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )
    if interpret:
        return call(*arrays)
    leaves, tree = jax.tree.flatten(arrays)
    shapes = out_shape if isinstance(out_shape, tuple) else (out_shape,)
    # anew, since a shape may be given by an array, which cannot be a parameter
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes)
    made = _call_p.bind(*leaves, call=_flat(call, tree), out_shapes=shapes)
    return tuple(made) if isinstance(out_shape, tuple) else made[0]


def _flat(call: Callable[..., Any], tree: Any) -> Callable[..., list[jax.Array]]:
    """call, from the arrays that are there to a list."""
    return lambda *leaves: jax.tree.leaves(call(*jax.tree.unflatten(tree, leaves)))


@_call_p.def_impl
def _run(*arrays: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_call_p.bind, **params))(*arrays)


@_call_p.def_abstract_eval
def _shapes(*_: Any, call: Callable[..., Any], out_shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Any]:
    return [ShapedArray(x.shape, x.dtype) for x in out_shapes]


def _lower(context: Any, *values: Any, call: Callable[..., Any], out_shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(call, multiple_results=True)(context, *values)


mlir.register_lowering(_call_p, _lower)
