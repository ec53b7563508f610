"""jaxengine.finetune.events against the checksums of RFC 3720, TensorBoard's own bytes, and a reader that is not ours.

TENSORBOARD is what TensorBoard 2.21's RecordWriter and protocol buffers make of the events in `test_bytes`. The reader
below walks records and messages by the wire format alone; where tensorboard is installed, its own loader reads as well.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.finetune import events
from jaxengine.finetune.events import EventWriter, crc32c, record

TENSORBOARD = bytes.fromhex(
    "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b3531100f000000000000006d532b090900002040fc54"
    "d94110653a0208014da449a831000000000000009d8383e90900005040fc54d94110652a240a110a0a747261696e2f6c6f73731500001440"
    "0a0f0a08747261696e2fc3a915cdccccbd2bf626fcf200000000000000265d02960900008040fc54d9411080e497d0122ae0010ad0010ac801"
    + "74" * 200
    + "150000c07f0a0b0a047a65726f15000000009254a573"
)


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4, and the check value of the catalogue of CRCs
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_checksums(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def test_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.time, "time", lambda: 1700000000.5)
    with EventWriter(tmp_path, first_step=101) as writer:
        writer.scalars(101, {"train/loss": 2.3125, "train/é": -0.1}, wall_time=1700000001.25)
        writer.scalars(5_000_000_000, {"t" * 200: math.nan, "zero": 0.0}, wall_time=1700000002.0)
    assert writer.path.read_bytes() == TENSORBOARD
    assert writer.path.name.startswith("events.out.tfevents.1700000000.")


# -- a reader by the wire format ----------------------------------------------------------------------------------------


def bitwise_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        for i in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if (crc ^ (byte >> i)) & 1 else 0)
    return crc ^ 0xFFFFFFFF


def records(raw: bytes) -> Iterator[bytes]:
    def check(data: bytes, masked: bytes) -> None:
        crc = bitwise_crc32c(data)
        assert struct.unpack("<I", masked)[0] == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32

    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        check(raw[:8], raw[8:12])
        check(raw[12 : 12 + length], raw[12 + length : 16 + length])
        yield raw[12 : 12 + length]
        raw = raw[16 + length :]


def fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    def varint() -> int:
        nonlocal raw
        value, shift = 0, 0
        while True:
            byte, raw = raw[0], raw[1:]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while raw:
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            yield key >> 3, raw[:size]
            raw = raw[size:]


def read(path: Path) -> list[tuple[int, dict[str, float]]]:
    found = []
    for i, data in enumerate(records(path.read_bytes())):
        event = dict(fields(data))
        assert struct.unpack("<d", event[1])[0] > 1e9
        if i == 0:
            assert event[3] == b"brain.Event:2"
        if 5 in event:
            values = [dict(fields(value)) for _, value in fields(event[5])]
            step = event.get(2, 0)
            numbers = {v[1].decode(): struct.unpack("<f", v[2])[0] for v in values}
            found.append((step - 2**64 if step >= 2**63 else step, numbers))
    return found


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1), st.dictionaries(st.text(max_size=20), st.floats(width=32), max_size=3)
        ),
        max_size=4,
    )
)
def test_all_that_is_written_can_be_read(tmp_path_factory: pytest.TempPathFactory, said: list[Any]) -> None:
    with EventWriter(tmp_path_factory.mktemp("run")) as writer:
        for step, values in said:
            writer.scalars(step, values)
    assert repr(read(writer.path)) == repr(said)  # as text, where NaN is itself


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300))
def test_records(data: bytes) -> None:
    assert list(records(record(data) + record(b""))) == [data, b""]


def test_numbers_too_large_for_float32(tmp_path: Path) -> None:
    with EventWriter(tmp_path) as writer:
        writer.scalars(0, {"up": 1e300, "down": -1e300, "tiny": 1e-300, "whole": 3})
    assert read(writer.path) == [(0, {"up": math.inf, "down": -math.inf, "tiny": 0.0, "whole": 3.0})]


def test_each_step_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "new" / "folder")
    for step in range(3):
        writer.scalars(step, {"loss": step})
        assert len(read(writer.path)) == step + 1
    writer.close()
    writer.close()


def test_a_run_that_goes_on_has_a_later_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for clock in (1700000000.0, 1700000000.4, 1600000000.0):  # within a second, and after the clock was set back
        monkeypatch.setattr(events.time, "time", lambda clock=clock: clock)
        with EventWriter(tmp_path) as writer:
            paths.append(writer.path)
    assert paths == sorted(paths)
    assert len(set(paths)) == 3
    (tmp_path / "events.out.tfevents.profile").touch()  # another tool's name
    EventWriter(tmp_path).close()


@pytest.mark.oracle
def test_tensorboard_reads_it(tmp_path: Path) -> None:
    """Two files: the first was written past the checkpoint it went on from."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventWriter(tmp_path) as writer:
        for step in range(8):
            writer.scalars(step, {"train/loss": 10 - step, "rate": 0.5**step})
    with EventWriter(tmp_path, first_step=5) as writer:
        for step in range(5, 7):
            writer.scalars(step, {"train/loss": 20 - step})
    os.utime(tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert sorted(found.Tags()["scalars"]) == ["rate", "train/loss"]
    got = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert got == [*((step, 10.0 - step) for step in range(5)), (5, 15.0), (6, 14.0)]
    assert [event.step for event in found.Scalars("rate")] == [0, 1, 2, 3, 4]
