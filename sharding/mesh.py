"""The mesh: which devices, under which axis names.

Every mesh made here has the three axes data, fsdp and tensor, of size 1 where nothing was asked, and any further ones
that were named. So a table of rules never misses an axis, and a program written for eight devices runs on one.

tensor is the last of the axes: its devices are neighbours, and it is the one that communicates in every layer. Further
axes come first. The order in which a user writes them does not matter: equal sizes make equal meshes.

Axes are Auto: the compiler derives what the rules leave unsaid (GSPMD, arXiv:2105.04663). The trade-off against
Explicit axes is that a bad derivation shows in the compiled program only, not in a type; in return models need no
sharding code.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

Devices = Sequence[Any]  # of jax.Device, which is no type to a type checker

AXES = ("data", "fsdp", "tensor")


def make_mesh(spec: str | Mapping[str, int] | Mesh | None = None, devices: Devices | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor, and any others named.

    spec: "data=2,tensor=4"; {"fsdp": 8}; one size may be -1, the rest of the devices. None: one device, the first.
        A Mesh keeps its devices and sizes, and gets Auto axes and the missing ones of size 1.
    devices: default all devices of all processes. The sizes must use all of them: a device left idle is a mistake
        unless it is said, by passing fewer.
    Raises ValueError for a text that is not a mesh and for sizes that do not fit the devices, with sizes that do.
    """
    if isinstance(spec, Mesh):
        if devices is not None:
            raise ValueError("make_mesh: a Mesh has its devices; pass devices with sizes, or the Mesh alone")
        missing = tuple(axis for axis in AXES if axis not in spec.axis_names)
        names = (*spec.axis_names, *missing)
        grid = spec.devices.reshape(spec.devices.shape + (1,) * len(missing))
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    if devices is not None and len(devices) == 0:
        raise ValueError("make_mesh: devices is empty; leave it out for all devices")
    if spec is None:
        # the first that this process can reach: with several processes jax.devices()[0] may be another's
        devices, sizes = [devices[0] if devices is not None else jax.local_devices()[0]], {}
    else:
        sizes = _parse(spec) if isinstance(spec, str) else _validated(spec, spec)
        devices = list(devices) if devices is not None else jax.devices()
    sizes = _fill(sizes, len(devices))
    names = (*(axis for axis in sorted(sizes) if axis not in AXES), *AXES)
    shape = tuple(sizes.get(axis, 1) for axis in names)
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(names), devices=devices)


def processes(mesh: Mesh) -> int:
    """How many processes a mesh's devices are of."""
    return len({device.process_index for device in mesh.devices.flat})


def abstract_mesh(spec: str) -> AbstractMesh:
    """The mesh that `make_mesh` makes of a text such as "data=2,tensor=4", of devices that need not be there.

    Raises ValueError for a text that is not a mesh, or a size of -1: there are no devices to take the rest of.
    """
    sizes = _parse(spec)
    if -1 in sizes.values():
        raise ValueError(f"mesh {spec!r}: -1 is the rest of the devices, and none are counted here; write the number")
    names = (*(axis for axis in sorted(sizes) if axis not in AXES), *AXES)
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in names), names, axis_types=(AxisType.Auto,) * len(names))


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
) -> None:
    """Join the processes of one job, so that jax.devices() are the devices of all. Call it before any other JAX call.

    coordinator_address: "host:port" that process 0 listens on. num_processes: how many there are. process_id: which one
    this is, from 0. What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; with
    none of the three, JAX asks the cluster (Slurm, Open MPI, Kubernetes). All or none: a half-described job would hang.

    Raises RuntimeError if JAX has started already or the processes were joined before.
    """
    given = {
        "coordinator_address": coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        "num_processes": num_processes if num_processes is not None else _environment_int("JAX_NUM_PROCESSES"),
        "process_id": process_id if process_id is not None else _environment_int("JAX_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"initialize_distributed: {', '.join(missing)} missing; give all three as arguments or in the environment "
            f"({', '.join('JAX_' + name.upper() for name in missing)}), or none to ask the cluster"
        )
    address, count, index = given["coordinator_address"], given["num_processes"], given["process_id"]
    if isinstance(address, str) and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator_address {address!r} is not host:port, such as 10.0.0.1:1234")
    if isinstance(count, int) and isinstance(index, int) and not 0 <= index < count:
        raise ValueError(f"process_id {index} is not in 0..{count - 1}: num_processes is {count}")
    if jax.distributed.is_initialized():
        raise RuntimeError("initialize_distributed: the processes are joined already; call it once per process")
    try:
        jax.distributed.initialize(
            coordinator_address=address if isinstance(address, str) else None,
            num_processes=count if isinstance(count, int) else None,
            process_id=index if isinstance(index, int) else None,
            local_device_ids=None if local_device_ids is None else list(local_device_ids),
        )
    except RuntimeError as error:
        if "XLA backend" not in str(error):
            raise
        raise RuntimeError(
            "initialize_distributed: JAX has started its devices already, and can no longer see other processes. Call "
            "it first in the program, before jax.devices(), make_mesh or any array"
        ) from error
    except ValueError as error:
        if missing:
            raise ValueError(
                "initialize_distributed: no cluster was found to ask. Give coordinator_address, num_processes and "
                "process_id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error
        raise


def memory_kinds(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The memories the mesh's devices can address, such as ("device", "pinned_host"); empty where there is no device to
    ask: an abstract mesh, or the devices of an ahead-of-time topology."""
    if isinstance(mesh, AbstractMesh):
        return ()
    device = mesh.local_devices[0] if len(mesh.local_devices) else mesh.devices.flat[0]
    return tuple(memory.kind for memory in device.addressable_memories())


def host_memory_kind(mesh: Mesh | AbstractMesh) -> str:
    """'pinned_host', or a ValueError where arrays placed there would silently stay on the device.

    An abstract mesh keeps any memory kind (so do the compiled programs made with it), hence is not asked.
    """
    if isinstance(mesh, AbstractMesh):
        return "pinned_host"
    kinds = memory_kinds(mesh)
    if "pinned_host" in kinds:
        return "pinned_host"
    kind = mesh.devices.flat[0].device_kind
    if not kinds:
        raise ValueError(
            f"the devices of this mesh ({kind}) list no memories, as those of an ahead-of-time topology do, and would "
            "drop a host placement without a word; describe host arrays over an AbstractMesh with the same axes"
        )
    raise ValueError(
        f"these devices ({kind}) have no pinned_host memory, only {', '.join(kinds)}; keep weights on the device "
        "(rules without 'pinned_host'), or use a GPU, a TPU or a CPU backend"
    )


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not re.fullmatch(r"-?[0-9]+", value):
            raise ValueError(f"mesh {text!r}: {item.strip()!r} is not axis=size; write it like 'data=2,tensor=4'")
        if name in sizes:
            raise ValueError(f"mesh {text!r}: axis {name!r} stands twice; name each once")
        sizes[name] = int(value)
    return _validated(sizes, text)


def _validated(sizes: Mapping[str, int], said: object) -> dict[str, int]:
    if not sizes:
        raise ValueError("make_mesh: {} names no axis; write {'data': 8}, or None for one device")
    for name, size in sizes.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"mesh {said!r}: {name!r} is not an axis name; use letters, digits and _")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or (size < 1 and size != -1):
            raise ValueError(f"mesh {said!r}: {name}={size!r} is not a size; use 1 or more, or -1 for the rest")
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ValueError(f"mesh {said!r}: two axes are -1; only one can take the rest of the devices")
    return {name: int(size) for name, size in sizes.items()}


def _fill(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The same sizes with -1 put in numbers, their product being the number of devices."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = next((name for name, size in sizes.items() if size == -1), None)
    if rest is not None and devices % fixed == 0:
        return {**sizes, rest: devices // fixed}
    if rest is None and fixed == devices:
        return dict(sizes)
    _refuse(sizes, devices, fixed)


def _refuse(sizes: Mapping[str, int], devices: int, fixed: int) -> NoReturn:
    """Say which sizes near the ones asked for would use all devices."""
    said = ",".join(f"{name}={size}" for name, size in sizes.items())
    fits = []
    for name in (name for name, size in sizes.items() if size != -1):
        others = math.prod(size for other, size in sizes.items() if other != name and size != -1)
        if devices % others == 0:
            n = devices // others if -1 not in sizes.values() else _divisor(devices // others, sizes[name])
            if n > 1 or name in AXES:
                fits.append(",".join(f"{axis}={n if axis == name else size}" for axis, size in sizes.items()))
    if devices % fixed == 0:
        other = next((axis for axis in AXES if axis not in sizes), None)
        if other is not None:
            fits.append(f"{said},{other}={devices // fixed}")
    if not fits:
        fits.append(f"data={devices}")
    fewer = f", or pass devices= with the {fixed} to use" if fixed < devices else ""
    needs = f"{'a multiple of ' * (-1 in sizes.values())}{fixed} device{'s' * (fixed > 1)}"
    if own := [name for name in sizes if name not in AXES]:
        said_of = f"; there is no axis {own[0]!r} but for rules of your own that name it: there are {', '.join(AXES)}"
    else:
        said_of = ""
    raise ValueError(
        f"mesh {said!r} needs {needs} and there are {devices}{said_of}. "
        f"What fits: {' or '.join(repr(fit) for fit in dict.fromkeys(fits))}{fewer}"
    )


def _divisor(n: int, near: int) -> int:
    """The divisor of n nearest to `near`, the smaller of two."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - near), d))


def _environment_int(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment is not a number")
    return int(text)
