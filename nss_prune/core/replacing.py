"""Replace a file as a whole: written aside, made durable, then moved into its place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".nss_prune"  # of files that are being written, before the ending of the one to be
LONGEST_ENDING = 16  # bytes; what is longer tells no format, and names have a limit


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the body is done.

    It has the ending of ``path``, by which some writers choose the format. The target of a symbolic
    link is written, not the link. The new file has the mode of the one that it replaces, or what
    the umask leaves. What writers that were killed left behind for the same file is deleted.

    Raises:
        OSError: The file cannot be written; ``path`` is something else than a file.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(path)
    prefix = f".{_token(os.fsencode(target.name))}-{_machine()}-"
    _delete_abandoned(target.parent, prefix)
    ending = target.suffix if len(os.fsencode(target.suffix)) <= LONGEST_ENDING else ""
    aside = target.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}{ending}")
    try:
        with open(aside, "xb") as created:
            umasked = stat.S_IMODE(os.fstat(created.fileno()).st_mode)
        yield aside
        os.chmod(aside, umasked if mode is None else mode)
        _synchronise(aside)
        os.replace(aside, target)
        _synchronise(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _mode_of(path: str | os.PathLike[str]) -> int | None:
    """The permissions of a file, None where there is none.

    Raises:
        OSError: There is something else, such as a folder, a pipe or a device.
    """
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "is a pipe or device; give the path of a file", str(path))
    return stat.S_IMODE(found)


def _delete_abandoned(folder: Path, prefix: str) -> None:
    """Delete what processes of this machine that are no more left behind."""
    for left in folder.glob(f"{prefix}*{SUFFIX}*"):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                left.unlink()


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _machine() -> str:
    """Distinguishes those that cannot see each other's processes: hosts and containers."""
    space = Path("/proc/self/ns/pid")
    number = os.stat(space).st_ino if space.exists() else 0
    return _token(f"{socket.gethostname()} {number}".encode())


def _token(name: bytes) -> str:
    return hashlib.blake2b(name, digest_size=6).hexdigest()


def _synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(opened)
