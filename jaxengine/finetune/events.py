"""Scalars for TensorBoard: an event file, written by hand.

TensorBoard's own writer comes with a web server and a dozen packages; the format is small. An event file is a sequence of
TFRecords (tensorflow/core/lib/io/record_writer.h),

    length, 8 bytes | masked crc32c of these | data | masked crc32c of the data        all little-endian

with crc32c the Castagnoli checksum (RFC 3720, appendix B.4) and masked(c) = rotate_right(c, 15) + 0xa282ead8. The data are
protocol buffers (Event in tensorflow/core/util/event.proto, Summary in tensorflow/core/framework/summary.proto), of which
five fields of Event and two of a summary's values are needed here. Field numbers and wire types are below, at their use.

A run that goes on after a stop writes a new file into the same folder; TensorBoard reads them in the order of their names.
The new file begins with a session's start at the step it goes on from: TensorBoard then drops what the old file has from
that step on, the steps that were made after the last checkpoint and are made again.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self, final

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
CASTAGNOLI = 0x82F63B78  # the polynomial, lowest bit first


@cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """The CRC-32C of RFC 3720."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers as 64 bits, two's complement
    said = bytearray()
    while value > 0x7F:
        said.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*said, value])


def _field(number: int, wire: int, payload: bytes) -> bytes:
    return _varint(number << 3 | wire) + (_varint(len(payload)) if wire == BYTES else b"") + payload


def _event(wall_time: float, step: int | None, what: bytes) -> bytes:
    said = _field(1, EIGHT_BYTES, struct.pack("<d", wall_time))
    return record(said + (b"" if step is None else _field(2, VARINT, _varint(step))) + what)


def _value(tag: str, value: float) -> bytes:
    """One of a Summary's values; `value` as float32, as TensorBoard keeps it."""
    try:
        number = struct.pack("<f", value)
    except OverflowError:  # no float32 is so large
        number = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _field(1, BYTES, _field(1, BYTES, tag.encode()) + _field(2, FOUR_BYTES, number))


@final
class EventWriter:
    """Writes scalars into a new event file in `folder`, which is made if there is none.

    first_step: of a run that goes on, the step it makes next; what older files in the folder hold from there on is void.
    Each call of `scalars` has reached the operating system when it returns: it outlives a killed process.
    """

    def __init__(self, folder: str | Path, *, first_step: int | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # sorted by name is sorted by time: never before a file that is there, whatever the clock says
        stamps = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
        stamp = max([int(now), *(int(s) + 1 for s in stamps if s.isdecimal())])
        self.path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 (it stays open)
        start = _event(now, None, _field(3, BYTES, b"brain.Event:2"))  # file_version
        if first_step is not None:
            start += _event(
                now, first_step, _field(7, BYTES, _field(1, VARINT, _varint(1)))
            )  # session_log, status START
        self._file.write(start)

    def scalars(self, step: int, values: Mapping[str, float], *, wall_time: float | None = None) -> None:
        """One number for each tag at this step; tags with slashes ("train/loss") are grouped by what stands before it."""
        said = b"".join(_value(tag, float(value)) for tag, value in values.items())
        self._file.write(_event(time.time() if wall_time is None else wall_time, int(step), _field(5, BYTES, said)))

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
