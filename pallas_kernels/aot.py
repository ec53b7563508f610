"""Compiling for a GPU that is not there.

XLA's GPU compiler is in two wheels (jax-cuda13-pjrt, jax-cuda13-plugin; no driver, no other CUDA package), and compiles
for any card that is described to it: a `GpuTargetConfigProto` in text form. What comes out is the real program, with its
buffer sizes, copies and kernels; only what autotuning on the card would choose can differ.

    with target(CARDS["H200"]) as t:
        args = t.place(args)                       # ShapeDtypeStructs; those in pinned_host stay there
        compiled = t.compile(jax.jit(f), *args)
        device_bytes(compiled)

A compile-only device lists no memories, so a sharding on its mesh loses a memory kind, while an AbstractMesh keeps it
but selects no compiler: device arguments stand on the one, host arguments on the other, and at least one of the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from pallas_kernels.cards import CARDS as CARDS
from pallas_kernels.cards import Card

AXES = ("data", "fsdp", "tensor")

# On by default on H100, H200 and B200 alone; without it no copy overlaps any compute on other cards
OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_async_compute_limit": 16,
    # or it makes one matrix product of two (gate and up) by writing their weights side by side, for all layers at once
    "xla_gpu_dot_merger_threshold_mb": 0,
    # copies are placed by the program; XLA's own pipelining adds a layer and reads from kernels
    "xla_gpu_enable_pipelined_host_offloading": False,
    # percent: what fits is the plan's to say. Under a limit of its own, where layers in host memory are more than the card has,
    # XLA's scheduler was seen to save memory at any price, and its rematerialization to make things anew to no gain
    "xla_gpu_memory_limit_slop_factor": 100_000,
}


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here; None if it can."""
    for module in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            version = jax.__version__
            return (
                f"XLA's GPU compiler is not installed: pip install --no-deps jax-cuda13-pjrt=={version}"
                f" jax-cuda13-plugin=={version}"
            )
    return None


@dataclasses.dataclass(frozen=True)
class Target:
    """A card that programs are compiled for: `mesh` is the abstract one, to make shardings on."""

    card: Card
    mesh: AbstractMesh
    concrete: Mesh

    def place(self, tree: Any) -> Any:
        """ShapeDtypeStructs on `mesh`: those in device memory are moved to the compile-only devices, but for random keys,
        which jax 0.11 takes apart on the mesh that they stand on."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            sharding = x.sharding or NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            if sharding.memory_kind not in (None, "device") or jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.concrete, sharding.spec))

        return jax.tree.map(one, tree)

    def compile(self, jitted: Any, *args: Any, **options: Any) -> Any:
        """Trace, lower for CUDA and compile, with the options that streaming needs."""
        lowered = jitted.trace(*args).lower(lowering_platforms=("cuda",))
        with warnings.catch_warnings():
            # what a persistent cache holds of such a program cannot be loaded without a card; it is compiled anew
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)
            return lowered.compile(compiler_options=OPTIONS | options)


@contextlib.contextmanager
def target(card: Card, **axes: int) -> Iterator[Target]:
    """A mesh of such cards (one, or e.g. tensor=2) to compile for. Raises RuntimeError where the compiler is missing."""
    if said := missing():
        raise RuntimeError(said)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    shape = tuple(axes.get(a, 1) for a in AXES)
    count = int(np.prod(shape))
    topology = topologies.get_topology_desc("", "cuda", target_config=card.target_config(), topology=f"1x1x{count}")
    types = (AxisType.Auto,) * len(AXES)
    device = jax.sharding.AbstractDevice(device_kind=card.limits.lowers_as, num_cores=card.cores, platform="gpu")
    mesh = AbstractMesh(shape, AXES, axis_types=types, abstract_device=device)
    concrete = Mesh(np.array(topology.devices).reshape(shape), AXES, axis_types=types)
    with jax.sharding.use_abstract_mesh(mesh):
        yield Target(card, mesh, concrete)


def device_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device: arguments, outputs that are no arguments, temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def host_bytes(compiled: Any) -> int:
    """The same in pinned host memory."""
    m = compiled.memory_analysis()
    return (
        m.host_argument_size_in_bytes
        + m.host_output_size_in_bytes
        - m.host_alias_size_in_bytes
        + m.host_temp_size_in_bytes
    )
