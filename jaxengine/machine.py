"""What this machine gives a process: host memory, XLA's pools of pinned memory and of a card's own, disk.

Host memory is the least of several limits, and which one binds differs: a laptop runs out of what is free, a container or
a batch job of its control group's limit, which `free` does not show, a shell of its ulimit. Each is kept with its name, so
that a message can say what to raise. Page cache that the kernel would give back counts as free: reading a checkpoint fills
it, and a group that has just read one would otherwise seem to have no memory left.

All of it is read from /proc and /sys, on Linux; elsewhere the size of physical memory is what is known.

XLA pins host memory through a pool, one for each card. It stops at 64 GiB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says
otherwise before jax's backend starts, takes regions in powers of two, up to that limit, and returns none. `set_pool` is for
a process that we start. Read in openxla/xla: GetGpuHostAllocator in xla/pjrt/gpu/gpu_helpers.cc (the number times 2**30;
64, or 16 with XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE), BFCAllocator::Extend in xla/tsl/framework/bfc_allocator.cc.

A card's own memory comes from a pool too, which XLA fills as it starts and which ends at three quarters of the card, whatever
is free, unless XLA_CLIENT_MEM_FRACTION says otherwise before jax's backend starts (CreateBFCAllocator in gpu_helpers.cc: the
card's total times that; docs.jax.dev, "GPU memory allocation"). A budget above it could never be had, and under one below it
other processes would lack what is not used: `set_share` has the pool end where the budget does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path, PurePosixPath

GiB = 2**30
POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
TUNABLES = "GLIBC_TUNABLES"
PREALLOCATE = "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"
DEFAULT_POOL, PREALLOCATED_POOL = 64, 16  # GiB
MOST_POOL = 2**33 - 1  # GiB: XLA counts the bytes in 64 bits, with a sign
# of the machine's memory: what is pinned cannot be swapped out, and the process itself and the page cache need some
POOL_SHARE = 4 / 5
# of a card's memory; the latter is deprecated
SHARE, OLD_SHARE = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_SHARE = 0.75  # XLA's
MOST_SHARE = 0.9  # without a budget, as vLLM's gpu_memory_utilization: a context, libraries and a screen need some
BESIDE = 1.05  # of a budget: the allocator rounds sizes up and leaves gaps
TUNING = 2 * GiB  # and what XLA tries kernels on while it compiles, a head's operands at most
CORES = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, in cuda.h
UNLIMITED = 2**62  # control groups of version 1 say "no limit" by the largest multiple of a page below 2**63

ROOT = Path("/")
log = logging.getLogger(__name__)


def available_ram(root: Path = ROOT) -> int:
    """Bytes of host memory that this process can still take: the least of `ram_limits`."""
    return ram_limits(root)[0][1]


def ram_limits(root: Path = ROOT) -> list[tuple[str, int]]:
    """What bounds this process's host memory, the tightest first: (name, bytes that it leaves).

    ulimits bound address space, of which a process takes more than memory: they leave at most what is said here.
    root: where /proc and /sys are looked for. A file that cannot be understood is left out, and a warning logged.
    Raises ValueError where nothing is known of this machine's memory.
    """
    found = [*_free(root), *_groups(root), *_ulimits(root)]
    if not found and root == ROOT:
        found = _physical()
    if not found:
        raise ValueError(
            f"how much memory this machine has is not known: {root / 'proc/meminfo'} does not say, nor does"
            f" {sys.platform}; give the size of host memory to use, e.g. --ram 32GB"
        )
    return sorted(found, key=lambda limit: limit[1])


def pool_limit_bytes(environ: Mapping[str, str] = os.environ) -> int:
    """Bytes at which XLA's pool of pinned memory stops in a process with this environment; each card has a pool.

    Raises ValueError for a number that XLA would not read.
    """
    given = environ.get(POOL)
    if given is None:
        return (PREALLOCATED_POOL if _preallocated(environ) else DEFAULT_POOL) * GiB
    # what absl::SimpleAtoi reads; anything else XLA takes for an error, or for 0
    if not re.fullmatch(r"\s*\+?[0-9]+\s*", given) or int(given) > MOST_POOL:
        raise ValueError(f"{POOL} is {given!r}; it is a whole number of GiB, e.g. {DEFAULT_POOL}")
    return int(given) * GiB


def set_pool(environ: MutableMapping[str, str], ram: int) -> str | None:
    """Let XLA's pool of pinned memory grow to four fifths of `ram` bytes, where that is more than it would by itself.

    For a process that we start, before jax does. A limit that is set already stays, and so does a pool that is to be
    filled at once. Returns a line to show: what was set, or that what the user set is no number; None if there is none.
    """
    if POOL in environ:
        try:
            pool_limit_bytes(environ)
        except ValueError as error:
            return str(error)
        return None
    limit = min(int(ram * POOL_SHARE) // GiB, MOST_POOL)
    if limit <= DEFAULT_POOL or _preallocated(environ):
        return None
    environ[POOL] = str(limit)
    return f"{POOL}={limit} is set: pinned host memory may grow to {limit} GiB, where XLA stops at {DEFAULT_POOL} GiB"


def set_share(
    environ: MutableMapping[str, str], memory: int | None = None, cards: Sequence[tuple[int, int]] = ()
) -> bool:
    """Let XLA's pool of a card's memory hold a budget of `memory` bytes, and what compiling takes beside it; without one (None)
    most of the card.

    For a process that we start, before jax's backend does. cards: (bytes of memory, bytes that a process can have of them) of
    each card; what holds for the least of them is set. True where it was set: not where the environment says it already, nor
    for a budget where no card is known.
    """
    if SHARE in environ or OLD_SHARE in environ or (memory is not None and not cards):
        return False
    share = MOST_SHARE
    if memory is not None:
        wanted = (BESIDE * memory + TUNING) / min(total for total, _ in cards)
        share = min(wanted, *(usable / total for total, usable in cards))
    environ[SHARE] = f"{share * 10_000 // 1 / 10_000:.4f}"
    return True


def pool_share(environ: Mapping[str, str] = os.environ) -> float:
    """The part of a card's memory at which XLA's pool of it ends in a process with this environment."""
    try:
        return float(environ.get(SHARE) or environ.get(OLD_SHARE) or DEFAULT_SHARE)
    except ValueError:  # jax refuses it
        return DEFAULT_SHARE


def card_memories(library: str = "libcuda.so.1") -> tuple[tuple[int, int], ...]:
    """(bytes of memory, streaming multiprocessors) of each card that CUDA shows this process, by its driver (`library`), without
    a context on any; () where there is no driver or it does not answer."""
    try:
        cuda = ctypes.CDLL(library)
        count, device, cores, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return ()
        found = []
        for i in range(count.value):
            if (
                cuda.cuDeviceGet(ctypes.byref(device), i)
                or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
                or cuda.cuDeviceGetAttribute(ctypes.byref(cores), CORES, device)
            ):
                return ()
            found.append((size.value, cores.value))
        return tuple(found)
    except (OSError, AttributeError):  # no driver, or one without these
        return ()


def ask_for_large_pages(environ: MutableMapping[str, str], root: Path = ROOT) -> bool:
    """Let malloc ask for large pages: True where that was set now, for the next process to start with, as glibc reads it once.

    XLA:CPU takes a program's temporaries from malloc anew at every call, and their first touch, 4 KiB at a time, was a
    tenth to a sixth of a step of fine-tuning (scripts/LOG.md). Asked of glibc from 2.35 on, where the system gives large
    pages to those who ask, and no NVIDIA card computes. root: where /proc and /sys are looked for.
    """
    on_cpu = environ.get("JAX_PLATFORMS") == "cpu" or not (root / "proc/driver/nvidia").exists()
    try:
        given = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        new = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (OSError, ValueError, AttributeError):  # a system without one of them
        return False
    if not (on_cpu and new and "[madvise]" in given) or "glibc.malloc.hugetlb" in environ.get(TUNABLES, ""):
        return False
    environ[TUNABLES] = ":".join(t for t in (environ.get(TUNABLES), "glibc.malloc.hugetlb=1") if t)
    return True


def free_disk(path: str | os.PathLike[str]) -> int:
    """Bytes that this user can still write at `path`, which need not exist yet; a quota is not seen.

    Raises OSError where the nearest folder that exists cannot be asked.
    """
    place = Path(path).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _preallocated(environ: Mapping[str, str]) -> bool:
    return environ.get(PREALLOCATE, "").lower() in ("1", "true")


# ---------------------------------------------------------------------------------------------------------------------
# Files of /proc and /sys


def _text(path: Path) -> str | None:
    """A small file's text; None if it is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _size(path: Path, text: str | None) -> int | None:
    """A number of bytes that is all of a file; None, with a warning, if it is something else."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+", text.strip()):
        log.warning("%s holds %r, which is no number of bytes: it is left out", path, text.strip()[:40])
        return None
    return int(text)


def _fields(path: Path, pattern: str, *names: str) -> dict[str, int]:
    """Fields of a file of lines, by a pattern of (name, number); those that are not there are left out."""
    text = _text(path)
    found = {name: int(n) for name, n in re.findall(pattern, text or "", re.MULTILINE)}
    if text is not None and not any(name in found for name in names):
        log.warning("%s has no line of %s: it is left out", path, " or ".join(names))
    return {name: found[name] for name in names if name in found}


def _free(root: Path) -> list[tuple[str, int]]:
    path = root / "proc/meminfo"
    kilobytes = _fields(path, r"^(\w+):\s+([0-9]+) kB$", "MemAvailable")
    return [("free memory (MemAvailable)", n * 1024) for n in kilobytes.values()]


def _ulimits(root: Path) -> list[tuple[str, int]]:
    """What the soft limits on address space and on data leave beside what is mapped."""
    text = _text(root / "proc/self/limits") or ""
    mapped = _fields(root / "proc/self/status", r"^(\w+):\s+([0-9]+) kB$", "VmSize", "VmData")
    found = []
    for line, name, taken in (
        ("Max address space", "address space (ulimit -v)", "VmSize"),
        ("Max data size", "data (ulimit -d)", "VmData"),
    ):
        if limit := re.search(rf"^{line}\s+([0-9]+)\s", text, re.MULTILINE):
            found.append((name, max(0, int(limit[1]) - mapped.get(taken, 0) * 1024)))
    return found


def _groups(root: Path) -> list[tuple[str, int]]:
    """What the memory limits of this process's control groups leave, of both versions: where both are mounted, memory is
    counted by one of them, and the other has no such files."""
    found = []
    for version, mount, group, folder in _hierarchy(root):
        if version == 2:
            limits, usage, cache = ("memory.max", "memory.high"), "memory.current", "inactive_file"
        else:
            limits, usage, cache = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
            own = folder == mount / group.relative_to("/")
            if not own and (_text(folder / "memory.use_hierarchy") or "1").strip() == "0":
                continue  # such a group bounds its own processes, not those of groups below
        for file in limits:
            text = _text(folder / file)
            limit = None if text is None or text.strip() == "max" else _size(folder / file, text)
            if limit is None or limit >= UNLIMITED:
                continue
            used = _size(folder / usage, _text(folder / usage)) or 0
            reclaimed = _fields(folder / "memory.stat", r"^(\w+) ([0-9]+)$", cache).get(cache, 0)
            name = "/" if folder == mount else f"/{folder.relative_to(mount)}"
            found.append((f"{file} of the control group {name}", max(0, limit - max(0, used - reclaimed))))
    return found


def _hierarchy(root: Path) -> Iterator[tuple[int, Path, PurePosixPath, Path]]:
    """(version, mount point, this process's group below it, folder) for that group's folder and all above it."""
    mounts = _mounts(root)
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3 or not parts[2].startswith("/"):
            log.warning(
                "%s has the line %r, which names no control group: it is left out", root / "proc/self/cgroup", line
            )
            continue
        version = 2 if parts[:2] == ["0", ""] else 1 if "memory" in parts[1].split(",") else 0
        if version not in mounts:
            continue
        top, mount = mounts[version]
        group = PurePosixPath(parts[2])
        # a container sees its own group as the top, under the name that the host has for it or as "/"
        if group.is_relative_to(top):
            group = "/" / group.relative_to(top)
        if ".." in group.parts or not (mount / group.relative_to("/")).is_dir():
            group = PurePosixPath("/")
        for folder in (group, *group.parents):
            yield version, mount, group, mount / folder.relative_to("/")


def _mounts(root: Path) -> dict[int, tuple[PurePosixPath, Path]]:
    """By version: the group that is mounted, and where. man proc_pid_mountinfo has the fields."""
    found: dict[int, tuple[PurePosixPath, Path]] = {}
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version is None or (version == 1 and "memory" not in kind[2].split(",")):
            continue
        top, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f) for f in fields[3:5])
        found.setdefault(version, (PurePosixPath(top), root / point.lstrip("/")))
    return found


def _physical() -> list[tuple[str, int]]:
    """All of the machine's memory, where what is free of it is not told."""
    try:
        n = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return []
    return [("physical memory", n)] if n > 0 else []
