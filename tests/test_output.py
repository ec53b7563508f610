"""checkpoints.output: whole or not at all, whatever happens in between. Kills are real processes that are killed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import CheckpointError
from checkpoints.output import output_file, output_folder, room_is_said

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with output_folder(target) as work:
        assert work.parent == target.parent
        assert not target.exists()
        (work / "sub").mkdir()
        (work / "sub" / "a").write_text("a")
        (work / "b").write_text("b")
    assert names(target.parent) == ["out"]
    assert names(target) == ["b", "sub"]
    assert (target / "sub" / "a").read_text() == "a"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as work:
        (work / "a").touch()
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path: Path, failure: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    before = [(p, p.read_bytes() if p.is_file() else None) for p in sorted(tmp_path.rglob("*"))]

    def work() -> None:
        with output_folder(tmp_path / "out", overwrite=overwrite) as folder:
            (folder / "half").write_text("x")
            raise failure

    with pytest.raises(failure):
        work()
    assert [(p, p.read_bytes() if p.is_file() else None) for p in sorted(tmp_path.rglob("*"))] == before


def test_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for path, message in (("full", "not empty"), ("file", "is a file"), ("file/out", "a folder in its path is a file")):
        with pytest.raises(CheckpointError, match=message), output_folder(tmp_path / path):
            pytest.fail("the block ran")
    for path, message in (("full", "is a folder"), ("file", "exists"), ("file/out", "a folder in its path is a file")):
        with pytest.raises(CheckpointError, match=message), output_file(tmp_path / path):
            pytest.fail("the block ran")
    with pytest.raises(CheckpointError, match="root of the file system"), output_folder("/"):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["file", "full"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with output_folder(target, overwrite=True) as work:
        (work / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_some_folders_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "home" / "here"
    inner.mkdir(parents=True)
    (inner / "x").touch()
    monkeypatch.chdir(inner)
    for place in (inner, inner.parent):
        with pytest.raises(CheckpointError, match="the current folder"), output_folder(place, overwrite=True):
            pytest.fail("the block ran")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(inner))
    with pytest.raises(CheckpointError, match="the home folder"), output_folder(inner, overwrite=True):
        pytest.fail("the block ran")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with output_folder(tmp_path / "link") as work:
        (work / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["a"]


def test_what_appears_meanwhile_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def run() -> None:
        with output_folder(target) as work:
            (work / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(CheckpointError, match="appeared"):
        run()
    assert names(target) == ["theirs"]
    assert names(tmp_path / f"out-{os.getpid()}") == ["mine"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with output_file(target) as work:
        assert work.name == "a.txt"
        work.write_text("new")
        assert not target.exists()
    assert names(tmp_path) == ["a.txt"]
    with output_file(target, overwrite=True) as work:
        work.write_text("newer")
        assert target.read_text() == "new"
    assert target.read_text() == "newer"

    def fail() -> None:
        with output_file(target, overwrite=True) as work:
            work.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(CheckpointError, match="Nothing was written"), output_file(tmp_path / "b.txt"):
        pass
    assert target.read_text() == "newer"
    assert names(tmp_path) == ["a.txt"]


def start(target: Path, then: str) -> subprocess.Popen[str]:
    """Another process that begins an output, says so, and does `then`."""
    code = (
        "import os, signal, sys, time\n"
        "from checkpoints.output import output_folder\n"
        f"with output_folder({str(target)!r}) as work:\n"
        "    (work / 'half').write_text('x')\n"
        "    print('begun', flush=True)\n"
        f"    {then}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with start(target, "os.kill(os.getpid(), signal.SIGKILL)") as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    (tmp_path / ".other.host.1.partial").mkdir()
    with output_folder(target) as work:
        assert names(work) == []
    assert names(tmp_path) == [".other.host.1.partial", "out"]


def test_a_run_that_lives_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with start(target, "sys.stdin.readline() or time.sleep(60)") as process:
        try:
            with pytest.raises(CheckpointError, match=f"process {process.pid}"), output_folder(target):
                pytest.fail("the block ran")
            (work,) = tmp_path.iterdir()
            assert names(work) == ["half"]
        finally:
            process.kill()
            process.wait()
    with output_folder(target):
        pass


def test_the_same_place_twice_in_one_process(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with output_folder(target):
        with pytest.raises(CheckpointError, match="being written already"), output_folder(target):
            pytest.fail("the block ran")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["out"]


def test_a_leftover_with_our_own_process_number(tmp_path: Path) -> None:
    """In containers every run may be process 1: nobody holds the lock, so it is nobody's."""
    with output_folder(tmp_path / "out") as work:
        mine = work.name
    (tmp_path / "out").rmdir()
    (tmp_path / mine).mkdir()
    (tmp_path / mine / "half").touch()
    with output_folder(tmp_path / "out") as work:
        assert names(work) == []


def test_another_host_is_believed_to_live(tmp_path: Path) -> None:
    (tmp_path / ".out.elsewhere.999999.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"on elsewhere.*delete"), output_folder(tmp_path / "out"):
        pytest.fail("the block ran")


def test_killed_between_the_two_renames_of_an_overwrite(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").touch()
    with pytest.raises(CheckpointError, match="not empty"), output_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert names(tmp_path / "out") == ["old"]


def test_bytes_are_synced_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename
    opened: dict[int, str] = {}
    os_open = os.open

    def remember(path: str, flags: int, *rest: int) -> int:
        handle = os_open(path, flags, *rest)
        opened[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(opened[handle]) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda self, to: synced.append("rename") or rename(self, to))
    with output_folder(tmp_path / "out") as work:
        (work / "a").write_text("a")
    assert synced == ["a", work.name, "rename", tmp_path.name]


def test_what_another_library_says_of_a_full_disk_is_the_systems_error(tmp_path: Path) -> None:
    """Texts of tensorstore; what says nothing of a disk stays what it was."""
    for said in (
        "RESOURCE_EXHAUSTED: Failed to write 30766 bytes to file 8: No space left on device [os_error_code='28']",
        "Error writing file: OS error 28",
    ):
        with pytest.raises(OSError, match="No space left") as found, room_is_said(tmp_path):
            raise ValueError(said)
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ValueError, match="OS error 280"), room_is_said(tmp_path):
        raise ValueError("OS error 280")
