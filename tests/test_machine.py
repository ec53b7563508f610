"""What a machine gives a process, read from trees laid out as /proc and /sys are; and the real limits of this one.

The formats are the kernel's: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, man proc_pid_mountinfo.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxengine import machine
from jaxengine.command import start_jax
from jaxengine.machine import GiB, available_ram, free_disk, pool_limit_bytes, ram_limits, set_pool

V1_NONE = "9223372036854771712"  # what version 1 says where there is no limit
V2 = r"31 23 0:28 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


def tree(root: Path, files: dict[str, str]) -> Path:
    """A machine of 64 GiB with 40 GiB free, without limits but for what `files` say."""
    plain = {
        "proc/meminfo": f"MemTotal: {64 * 2**20:>15} kB\nMemFree:  1000 kB\nMemAvailable:  {40 * 2**20} kB\nHugePages_Total: 0\n",
        "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max cpu time              unlimited            unlimited            seconds   \n"
        "Max data size             unlimited            unlimited            bytes     \n"
        "Max address space         unlimited            unlimited            bytes     \n",
        "proc/self/status": f"Name:\tpython\nVmSize:\t {2 * 2**20} kB\nVmData:\t {2**20} kB\nThreads:\t4\n",
    }  # fmt: skip
    for name, text in (plain | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, limit: str, current: int, inactive: int = 0, **more: str) -> dict[str, str]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon {current - inactive}\nfile {inactive}\ninactive_anon 5\ninactive_file {inactive}\nactive_file 0\n"
    found = {"memory.max": limit, "memory.current": f"{current}\n", "memory.stat": stat} | more
    return {f"{at}/{name.replace('_', '.') if name == 'memory_high' else name}": f"{v}\n" for name, v in found.items()}


def v1(folder: str, limit: str, usage: int, inactive: int = 0, hierarchy: str = "1") -> dict[str, str]:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n", f"{at}/memory.usage_in_bytes": f"{usage}\n",
        f"{at}/memory.stat": f"cache 1\ninactive_file 7\ntotal_cache 1\ntotal_inactive_file {inactive}\n",
        f"{at}/memory.use_hierarchy": f"{hierarchy}\n",
    }  # fmt: skip


def test_without_limits_it_is_what_is_free(tmp_path: Path) -> None:
    root = tree(tmp_path, {})
    assert ram_limits(root) == [("free memory (MemAvailable)", 40 * GiB)]
    assert available_ram(root) == 40 * GiB


def test_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/user.slice/job/step\n", "proc/self/mountinfo": V2.format(top="/")}
    files |= {"sys/fs/cgroup/cgroup.controllers": "memory\n"}  # the topmost has no memory.max
    files |= v2("user.slice", str(20 * GiB), 19 * GiB, 11 * GiB)  # 12 left: page cache is given back
    files |= v2("user.slice/job", str(16 * GiB), 2 * GiB)  # 14 left
    files |= v2("user.slice/job/step", "max", 2 * GiB)
    assert ram_limits(tree(tmp_path, files)) == [
        ("memory.max of the control group /user.slice", 12 * GiB),
        ("memory.max of the control group /user.slice/job", 14 * GiB),
        ("free memory (MemAvailable)", 40 * GiB),
    ]


def test_a_group_over_its_limit_leaves_nothing_and_a_throttled_one_that_much(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2.format(top="/")}
    files |= v2("a", str(4 * GiB), 5 * GiB, GiB // 2) | v2("a/b", "max", GiB, memory_high=str(3 * GiB))
    assert ram_limits(tree(tmp_path, files))[:2] == [
        ("memory.max of the control group /a", 0), ("memory.high of the control group /a/b", 2 * GiB)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("top", "group"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the host's name for what is mounted
        ("/docker/abc", "/"), ("/docker/abc", "/docker/gone"), ("/", "/../other"), ("/", "/elsewhere"),
    ],
)  # fmt: skip
def test_in_a_container_the_group_is_the_top(tmp_path: Path, top: str, group: str) -> None:
    files = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": V2.format(top=top)} | v2(
        "", str(8 * GiB), 3 * GiB
    )
    assert ram_limits(tree(tmp_path, files))[0] == ("memory.max of the control group /", 5 * GiB)


def test_a_group_below_the_one_that_is_mounted(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc/inner\n", "proc/self/mountinfo": V2.format(top="/docker/abc")}
    files |= v2("", "max", GiB) | v2("inner", str(2 * GiB), GiB)
    assert ram_limits(tree(tmp_path, files))[0] == ("memory.max of the control group /inner", GiB)


def test_version_1_and_both_side_by_side(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/\n0::/\n",
        "proc/self/mountinfo": f"{HYBRID}\n{V1.format(top='/')}\n",
        "sys/fs/cgroup/unified/cgroup.controllers": "\n",
    }
    files |= v1("", V1_NONE, 30 * GiB) | v1("jobs", str(10 * GiB), 9 * GiB, 4 * GiB) | v1("jobs/7", V1_NONE, GiB)
    root = tree(tmp_path, files)
    assert ram_limits(root)[0] == ("memory.limit_in_bytes of the control group /jobs", 5 * GiB)
    assert len(ram_limits(root)) == 2
    # without hierarchy, a group's limit is its own processes' alone
    tree(tmp_path, v1("jobs", str(10 * GiB), 9 * GiB, hierarchy="0") | v1("jobs/7", str(6 * GiB), GiB, hierarchy="0"))
    assert ram_limits(root)[0] == ("memory.limit_in_bytes of the control group /jobs/7", 5 * GiB)
    assert len(ram_limits(root)) == 2


def test_ulimits_less_what_is_mapped(tmp_path: Path) -> None:
    limits = f"Max data size             {9 * GiB:<20} unlimited            bytes     \n"
    limits += f"Max address space         {12 * GiB:<20} {13 * GiB:<20} bytes     \n"
    assert ram_limits(tree(tmp_path, {"proc/self/limits": limits})) == [
        ("data (ulimit -d)", 8 * GiB), ("address space (ulimit -v)", 10 * GiB), ("free memory (MemAvailable)", 40 * GiB)
    ]  # fmt: skip


def test_what_cannot_be_understood_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"proc/self/cgroup": "nonsense\n0::/a/b\n", "proc/self/mountinfo": "short\n" + V2.format(top="/")}
    files |= v2("a", "lots", GiB) | v2("a/b", str(8 * GiB), GiB) | {"sys/fs/cgroup/a/b/memory.current": "-1\n"}
    root = tree(tmp_path, files)
    (root / "sys/fs/cgroup/a/b/memory.stat").write_bytes(b"\xff\xfe")
    # the limit stands, with nothing known to be taken of it
    assert ram_limits(root) == [
        ("memory.max of the control group /a/b", 8 * GiB), ("free memory (MemAvailable)", 40 * GiB)
    ]  # fmt: skip
    said = "\n".join(r.getMessage() for r in caplog.records)
    for part in ("'nonsense'", "a/memory.max holds 'lots'", "memory.current holds '-1'", "no line of inactive_file"):
        assert part in said


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": r"31 23 0:28 / /my\040groups rw shared:9 master:1 - cgroup2 none rw",
        "my groups/memory.max": f"{GiB}\n", "my groups/memory.current": "0\n",
    }  # fmt: skip
    assert ram_limits(tree(tmp_path, files))[0] == ("memory.max of the control group /", GiB)


def test_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"not known.*--ram"):
        available_ram(tmp_path)
    # not Linux: no /proc, and sysconf knows the machine's memory or does not
    for name in ("_free", "_groups", "_ulimits"):
        monkeypatch.setattr(machine, name, lambda root: [])
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert ram_limits() == [("physical memory", 4 * GiB)]

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    for broken in (unknown, lambda name: -1 if name == "SC_PHYS_PAGES" else 4096):
        monkeypatch.setattr(os, "sysconf", broken)
        with pytest.raises(ValueError, match="not known"):
            ram_limits()


def test_this_machine() -> None:
    limits = ram_limits()
    assert limits == sorted(limits, key=lambda limit: limit[1])
    assert 0 <= available_ram() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="ulimits are read from /proc")
def test_a_real_ulimit_leaves_what_is_said() -> None:
    code = """
import mmap, resource
from jaxengine.machine import ram_limits
taken = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, taken + 2**30))
left = dict(ram_limits())["address space (ulimit -v)"]
assert abs(left - 2**30) < 2**26, left
mmap.mmap(-1, left - 2**26).close()
try:
    mmap.mmap(-1, left + 2**26)
except OSError:
    print("bounded")
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "bounded"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 64), ({machine.PREALLOCATE: "true"}, 16), ({machine.PREALLOCATE: "0"}, 64), ({machine.POOL: "100"}, 100),
        ({machine.POOL: " +8 ", machine.PREALLOCATE: "1"}, 8), ({machine.POOL: "0"}, 0),
    ],
)  # fmt: skip
def test_the_pool_as_xla_reads_it(environ: dict[str, str], expected: int) -> None:
    assert pool_limit_bytes(environ) == expected * 2**30


@pytest.mark.parametrize("given", ["", "64GB", "-1", "1e2", "12.5", "1_000", str(2**33)])
def test_a_pool_that_is_no_number(given: str) -> None:
    environ = {machine.POOL: given}
    with pytest.raises(ValueError, match=f"{machine.POOL} is {given!r}.*whole number of GiB"):
        pool_limit_bytes(environ)
    assert set_pool(environ, 512 * GiB) == f"{machine.POOL} is {given!r}; it is a whole number of GiB, e.g. 64"
    assert environ == {machine.POOL: given}


def test_the_pool_grows_with_the_machine_and_never_shrinks() -> None:
    environ: dict[str, str] = {}
    said = set_pool(environ, 128 * GiB)
    assert environ == {machine.POOL: "102"}
    assert said is not None
    assert "102 GiB" in said
    assert "\n" not in said
    assert 64 * GiB < pool_limit_bytes(environ) <= 128 * GiB * 4 / 5
    for ram in (0, 32 * GiB, 64 * GiB, 80 * GiB):  # four fifths of it are no more than XLA's own
        environ = {}
        assert set_pool(environ, ram) is None
        assert environ == {}
    for given in ("8", "64", "1000"):
        environ = {machine.POOL: given}
        assert set_pool(environ, 256 * GiB) is None
        assert environ == {machine.POOL: given}
    environ = {machine.PREALLOCATE: "true"}  # a larger pool would be filled at once
    assert set_pool(environ, 256 * GiB) is None
    assert environ == {machine.PREALLOCATE: "true"}


def test_free_disk_of_a_place_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    for place in (tmp_path, tmp_path / "new" / "deep", str(tmp_path)):
        assert free_disk(place) == pytest.approx(found.f_bavail * found.f_frsize, abs=GiB)
    monkeypatch.chdir(tmp_path)
    assert free_disk("new") == pytest.approx(found.f_bavail * found.f_frsize, abs=GiB)


def test_it_is_read_before_jax() -> None:
    code = "import sys, jaxengine.machine; heavy = {'jax', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "enabled", "card", "then"),
    [
        ({}, "always [madvise] never", False, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "always [madvise] never", False,
         "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "always [madvise] never", False, None),
        ({}, "[always] madvise never", False, None),
        ({}, "always madvise [never]", False, None),
        ({}, "always [madvise] never", True, None),
        ({"JAX_PLATFORMS": "cpu"}, "always [madvise] never", True, "glibc.malloc.hugetlb=1"),
    ],
)  # fmt: skip
def test_large_pages_are_asked_for_once_where_it_helps(
    given: dict[str, str], enabled: str, card: bool, then: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "sys/kernel/mm/transparent_hugepage"
    kernel.mkdir(parents=True)
    (kernel / "enabled").write_text(enabled + "\n")
    if card:
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    monkeypatch.setattr(os, "confstr", {"CS_GNU_LIBC_VERSION": "glibc 2.35"}.get)
    environ = dict(given)
    assert machine.ask_for_large_pages(environ, tmp_path) == (then is not None)
    assert environ.get("GLIBC_TUNABLES") == (then or given.get("GLIBC_TUNABLES"))
    assert not machine.ask_for_large_pages(environ, tmp_path)  # or a process would begin for ever
    monkeypatch.setattr(os, "confstr", {"CS_GNU_LIBC_VERSION": "glibc 2.34"}.get)
    assert not machine.ask_for_large_pages({}, tmp_path)


def test_processes_that_we_start_have_a_larger_pool(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Set before jax starts, and left as the user has it; what is no number is told at once."""
    monkeypatch.setattr(machine, "available_ram", lambda: 128 * GiB)
    stand_in = types.SimpleNamespace(config=types.SimpleNamespace(update=lambda name, value: None))
    for given, found, said in (({}, "102", 0), ({machine.POOL: "8"}, "8", 0), ({machine.POOL: "8GB"}, "8GB", 1)):
        environ = {"XDG_CACHE_HOME": "/cache", **given}
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environ)
            patch.setitem(sys.modules, "jax", stand_in)
            start_jax()
        assert environ[machine.POOL] == found
        assert [f"{machine.POOL} is '8GB'" in r.getMessage() for r in caplog.records] == [True] * said
