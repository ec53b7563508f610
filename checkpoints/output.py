"""A result appears whole or not at all.

Work that writes for hours is done in a hidden folder beside the place it is for (same file system, so that the last
step is one rename), synced to disk, and renamed. An exception or Ctrl-C removes it. After a kill or a power cut it
stays behind, unseen under its real name; the next attempt for the same place recognises it and clears it away.

Whose leftover it is: the folder's name holds the host and the process, and the process holds a lock on the folder for
as long as it works. One of another process that lives is never touched, nor one of another host (shared disks). The
lock tells apart what the process number cannot, since in a container each run may have the same one.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from checkpoints.errors import CheckpointError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # on a disk, in a quota, under a limit on files


@contextlib.contextmanager
def room_is_said(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of another library's, of which only the text says that a disk is full, becomes the system's own, of `path`."""
    try:
        yield
    except Exception as error:
        found = next((n for n in NO_ROOM if re.search(rf"OS error {n}\b|{re.escape(os.strerror(n))}", str(error))), 0)
        if found and not isinstance(error, OSError):
            raise OSError(found, os.strerror(found), str(path)) from error
        raise


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an exception it becomes `path`.

    `path` must not exist or be an empty folder: anything else is refused at once with CheckpointError. With `overwrite`
    a folder there stays untouched until the new one is complete, and is then replaced.
    """
    target = _target(path)
    _clear_leftovers(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a folder is to be written there. Give another path.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{target} is not empty. Give a new folder, or allow overwriting it.")
        _refuse_precious(target)
    with _working(target) as work:
        yield work
        _sync(work)
        if overwrite and target.is_dir():
            aside = target.with_name(f".{target.name}.replaced")
            target.rename(aside)
            try:
                work.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            try:
                work.rename(target)  # replaces an empty folder, and no other
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                kept = target.with_name(f"{target.name}-{os.getpid()}")
                work.rename(kept)
                raise CheckpointError(
                    f"Something else appeared at {target} while the result was made; it is kept in {kept}."
                ) from None
        _sync_entry(target.parent)


@contextlib.contextmanager
def output_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a file to create (of the same name, in a hidden folder); at the end it becomes `path`.

    An existing `path` is refused at once with CheckpointError, unless `overwrite` is given; then it stays untouched
    until the new file is complete.
    """
    target = _target(path)
    _clear_leftovers(target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; a file is to be written there. Give another path.")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists. Give a new file name, or allow overwriting it.")
    with _working(target) as work:
        yield work / target.name
        if not (work / target.name).is_file():
            raise CheckpointError(f"Nothing was written for {target}.")
        _sync(work)
        (work / target.name).replace(target)
        _sync_entry(target.parent)


def _target(path: str | os.PathLike[str]) -> Path:
    # links are followed: the place a link points to is what gets replaced, never the link
    target = Path(path).expanduser().resolve()
    if not target.name:
        raise CheckpointError(f"{path} is the root of the file system; give the path of a new folder or file.")
    return target


def _refuse_precious(target: Path) -> None:
    for place, name in ((Path.cwd(), "the current folder"), (Path.home(), "the home folder")):
        if place == target or target in place.parents:
            raise CheckpointError(f"{target} is, or holds, {name}: it is not overwritten. Give another path.")
    if target.is_mount():
        raise CheckpointError(f"{target} is where a disk is mounted: it cannot be replaced. Give a folder inside it.")


@contextlib.contextmanager
def _working(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{target} cannot be made: a folder in its path is a file. Give another path.") from None
    work = target.with_name(f".{target.name}.{_host()}.{os.getpid()}.partial")
    work.mkdir()
    lock = os.open(work, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
    except OSError as error:
        if error.errno in NO_ROOM:  # of what is to be written, and not of a file on the way
            raise OSError(error.errno, f"{os.strerror(error.errno)}; nothing of it was left", str(target)) from error
        raise
    finally:
        # after success it is `target`, or the emptied folder of a file
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _partial(target: Path) -> re.Pattern[str]:
    """The name of a folder in which what is for this place is made, and its host and process."""
    return re.compile(rf"\.{re.escape(target.name)}\.([A-Za-z0-9_-]+)\.([0-9]+)\.partial")


def in_the_making(entry: Path, path: str | os.PathLike[str]) -> bool:
    """Whether an entry beside `path` is where what is for it is made, or was when a process ended."""
    return _partial(Path(path)).fullmatch(entry.name) is not None


def _clear_leftovers(target: Path) -> None:
    """Remove what dead runs left for this target; refuse when a run for it may be alive."""
    if not target.parent.is_dir():
        return
    pattern = _partial(target)
    for entry in list(target.parent.iterdir()):
        found = pattern.fullmatch(entry.name)
        if not found or entry.is_symlink() or not entry.is_dir():
            continue
        if found[1] != _host() or not _abandoned(entry, int(found[2])):
            raise CheckpointError(
                f"{target} is being written already, by process {found[2]} on {found[1]}. Wait for it or give another "
                f"path; if no such process runs any more, delete {entry}."
            )
        shutil.rmtree(entry, ignore_errors=True)
    aside = target.with_name(f".{target.name}.replaced")
    if aside.is_dir() and not aside.is_symlink():
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)  # killed between the two renames of an overwrite: the old result is the one there is


def _abandoned(work: Path, process: int) -> bool:
    if process != os.getpid() and _alive(process):
        return False
    try:
        handle = os.open(work, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:64] or "host"


def _sync(folder: Path) -> None:
    """Everything in `folder` reaches the disk before its name does."""
    for parent, _, files in os.walk(folder):
        for name in files:
            file = Path(parent, name)
            if not file.is_symlink():
                _sync_entry(file)
        _sync_entry(Path(parent))


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)
