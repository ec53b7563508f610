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
from typing import Any

import jax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive
from jax.interpreters import mlir

_call_p = Primitive("pallas_triton_call")
_call_p.multiple_results = True


def triton_call(
    kernel: Callable[..., None],
    *arrays: jax.Array,
    out_shape: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: pl.BlockSpec,
    num_warps: int,
    num_stages: int,
    name: str,
    interpret: bool = False,
) -> jax.Array:
    """One array in `out_shape` from a kernel over `grid`, compiled by Triton for the GPU that it is lowered for."""
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )
    if interpret:
        return call(*arrays)
    shape = jax.ShapeDtypeStruct(out_shape.shape, out_shape.dtype)  # which an array, that has them too, is not
    return _call_p.bind(*arrays, call=call, out_shape=shape)[0]


@_call_p.def_impl
def _run(*arrays: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_call_p.bind, **params))(*arrays)


@_call_p.def_abstract_eval
def _shapes(*_: Any, call: Callable[..., Any], out_shape: jax.ShapeDtypeStruct) -> list[Any]:
    return [ShapedArray(out_shape.shape, out_shape.dtype)]


def _lower(context: Any, *values: Any, call: Callable[..., Any], out_shape: jax.ShapeDtypeStruct) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(lambda *arrays: [call(*arrays)], multiple_results=True)(context, *values)


mlir.register_lowering(_call_p, _lower)
