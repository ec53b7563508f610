"""How fast a packed store is streamed from disk, beside what the disk gives, in one run.

    python scripts/bench_disk.py --folder /where/the/store/would/be

A store of random bytes is written, read in several ways, and removed. Every round runs each way once, cold and warm,
and medians over rounds are printed with the spread, so that a disk or a machine whose speed drifts slows all alike.

    raw      preadv of 8 MiB at a time, round a reused buffer as long as a layer, one for each thread: what the disk (or
             the cache) can give. `4 KiB pages`: the same with buffers that have no huge pages, which numpy asks for
    ring     checkpoints.packed.PackedReader, every layer taken in order and released at once. `in place`: of arrays that lie
             one after another from byte 8 on, at no page, as in a safetensors file
    memmap   each layer of a numpy memory map copied into one reused array

`direct` goes past the page cache (O_DIRECT), `cached` through it. Cold: the file was synced and its pages dropped
(posix_fadvise); a virtual disk may have a cache of its own below, which nothing here can empty. Warm: the file was read
through the cache just before; that direct reads gain nothing from it is the point of showing them. The ring's first
pass also checks each layer's crc32 and touches the memory of its buffers for the first time.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from checkpoints.packed import PackedReader, write_packed
from checkpoints.safetensors import TensorInfo, aligned_empty
from jaxengine.command import SETTINGS, reported

BLOCK = 8 << 20
BYTE = np.dtype(np.uint8)


def write(path: Path, layers: int, nbytes: int) -> None:
    """A store of `layers` layers of about `nbytes` random bytes (nothing below the file can compress them)."""
    rng = np.random.default_rng(0)
    parts = {"up": nbytes // 2, "down": nbytes - nbytes // 2}
    write_packed(
        path,
        layers,
        [{name: ((n,), BYTE) for name, n in parts.items()}] * layers,
        lambda layer, name: np.frombuffer(rng.bytes(parts[name]), np.uint8),
        fingerprint="bench",
    )


def drop_cache(path: Path) -> None:
    """Write back the file's pages and give them up."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def small_pages(nbytes: int) -> np.ndarray:
    """Memory that begins at a page and has no huge ones."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def raw(path: Path, flags: int, buffers: list[np.ndarray]) -> Callable[[], int]:
    """Reads the file once; its blocks go round the threads, of which there is one for each buffer."""
    for buffer in buffers:
        buffer[:] = 0  # the memory is there before the clock starts
    size, threads = path.stat().st_size, len(buffers)

    def run() -> int:
        descriptor = os.open(path, os.O_RDONLY | flags)
        got = [0] * threads

        def read(i: int) -> None:
            places = itertools.cycle(range(0, buffers[i].size, BLOCK))
            for start, place in zip(range(i * BLOCK, size, threads * BLOCK), places, strict=False):
                got[i] += os.preadv(descriptor, [buffers[i][place : place + BLOCK]], start)

        workers = [threading.Thread(target=read, args=(i,)) for i in range(1, threads)]
        try:
            for worker in workers:
                worker.start()
            read(0)
            for worker in workers:
                worker.join()
        finally:
            os.close(descriptor)
        return sum(got)

    return run


def once(reader: PackedReader) -> int:
    """All layers taken and released; the bytes read."""
    reader.order(range(reader.layers))
    for _ in range(reader.layers):
        with reader.layer():
            pass
    return sum(reader.nbytes(i) for i in range(reader.layers))


def in_place(path: Path, layers: int, nbytes: int) -> list[dict[str, TensorInfo]]:
    """Where the arrays of layers would be if the file were a checkpoint's."""
    sizes = {"up": nbytes // 2, "down": nbytes - nbytes // 2}
    found, at = [], 8
    for _ in range(layers):
        found.append({})
        for name, n in sizes.items():
            found[-1][name] = TensorInfo(name, BYTE, (n,), path, at, at + n)
            at += n
    return found


def mapped(path: Path, nbytes: int) -> Callable[[], int]:
    """Reads the file once through a memory map."""
    buffer = aligned_empty((nbytes,), BYTE)
    buffer[:] = 0

    def run() -> int:
        whole = np.memmap(path, BYTE, "r")
        for start in range(0, whole.size, nbytes):
            piece = whole[start : start + nbytes]
            np.copyto(buffer[: piece.size], piece)
        return whole.size

    return run


def measure(path: Path, layers: int, nbytes: int, depth: int, threads: int, rounds: int) -> list[dict[str, object]]:
    """One row for each way: GB/s of every round, cold and warm."""
    direct = getattr(os, "O_DIRECT", 0)
    length = -(-nbytes // BLOCK) * BLOCK
    buffers = [aligned_empty((length,), BYTE) for _ in range(threads)]
    several = sorted({1, threads})
    ways = {("raw", "cached", n): raw(path, 0, buffers[:n]) for n in several}
    if direct:
        ways |= {("raw", "direct", n): raw(path, direct, buffers[:n]) for n in several}
        ways["raw, 4 KiB pages", "direct", threads] = raw(path, direct, [small_pages(length) for _ in range(threads)])
    ways["memmap", "cached", 1] = mapped(path, nbytes)
    with (
        PackedReader(path, depth=depth, threads=threads, direct=False, verify="never") as through,
        PackedReader(path, depth=depth, threads=threads, verify="never") as past,
        PackedReader(in_place(path, layers, nbytes), depth=depth, threads=threads) as placed,
    ):
        for reader in (through, past, placed):
            once(reader)  # the memory of its buffers is there before the clock starts
        ways["ring", "cached", threads] = lambda: once(through)
        ways["ring", "direct", threads] = lambda: once(past)
        ways["ring, in place", "direct", threads] = lambda: once(placed)

        def first() -> int:
            with PackedReader(path, depth=depth, threads=threads) as new:
                return once(new)

        ways["ring, first pass", "direct", threads] = first
        rates: dict[tuple[tuple[str, str, int], str], list[float]] = {}
        warm_up = raw(path, 0, buffers[:1])
        for _ in range(rounds):
            for state, prepare in (("cold", lambda: drop_cache(path)), ("warm", warm_up)):
                for way, run in ways.items():
                    prepare()
                    start = time.perf_counter()
                    got = run()
                    rates.setdefault((way, state), []).append(got / (time.perf_counter() - start) / 1e9)
    best = {
        s: max(statistics.median(r) for (w, t), r in rates.items() if w[0] == "raw" and t == s)
        for s in ("cold", "warm")
    }
    rows: list[dict[str, object]] = []
    for way in ways:
        row: dict[str, object] = dict(zip(("way", "path", "threads"), way, strict=True))
        for state in ("cold", "warm"):
            found = rates[way, state]
            row[f"{state}_GBs"] = round(statistics.median(found), 3)
            row[f"{state}_rounds"] = [round(r, 3) for r in found]
            row[f"{state}_of_raw"] = round(statistics.median(found) / best[state], 3)
        rows.append(row)
    return rows


@click.command(**SETTINGS)
@click.option("--gb", metavar="GB", type=click.FloatRange(0, min_open=True), default=2.0, help="Size of the store.")
@click.option(
    "--folder",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=".",
    help="Where the store is written, and removed at the end: on the disk to be measured.",
)
@click.option("--layers", metavar="L", type=click.IntRange(1), default=16, help="Layers of the store.")
@click.option("--depth", metavar="N", type=click.IntRange(1), default=3, help="Buffers of the ring.")
@click.option("--threads", metavar="N", type=click.IntRange(1), default=2, help="Threads that read.")
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=3, help="Rounds, whose medians are printed.")
@reported()
def main(gb: float, folder: Path, layers: int, depth: int, threads: int, rounds: int) -> None:
    """Speed of streaming layers from a disk, beside the disk's own."""
    console = Console()
    nbytes = max(1, round(gb * 1e9 / layers))
    with tempfile.TemporaryDirectory(prefix=".bench_disk.", dir=folder) as place:
        path = Path(place, "store")
        write(path, layers, nbytes)
        size = path.stat().st_size
        rows = measure(path, layers, nbytes, depth, threads, rounds)
    console.print(
        f"{layers} layers, {size / 1e9:.2f} GB; ring of {depth} buffers; {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; medians (lowest to highest) of {rounds} rounds",
        highlight=False,
    )
    table = Table("way", "path", "threads", "cold GB/s", "of best raw", "warm GB/s", "of best raw")
    for row in rows:
        cells = []
        for state in ("cold", "warm"):
            found = row[f"{state}_rounds"]
            assert isinstance(found, list)
            cells += [
                f"{row[f'{state}_GBs']:.2f} ({min(found):.2f} to {max(found):.2f})",
                f"{row[f'{state}_of_raw']:.0%}",
            ]
        table.add_row(str(row["way"]), str(row["path"]), str(row["threads"]), *cells)
        print(json.dumps({**row, "bytes": size, "layers": layers, "depth": depth}))
    console.print(table)


if __name__ == "__main__":
    main()
