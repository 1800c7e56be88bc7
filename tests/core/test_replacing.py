"""Files are replaced as a whole, with the mode of the old one, and killed writers leave nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nss_prune.core import replacing as module
from nss_prune.core.replacing import replacing, write_text


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as aside:
        aside.write_bytes(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o640


@pytest.mark.parametrize("old", [0o600, 0o664, 0o440])
def test_a_replaced_file_keeps_its_mode(old: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(old)
    write(path)
    assert (path.read_bytes(), mode(path)) == (b"new", old)


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_is_written(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list((tmp_path / "elsewhere").iterdir()) == [target]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(OSError, match="link"):
        write(link)
    assert link.is_symlink()


def test_the_longest_name_that_a_folder_takes(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_is_moved_and_its_folder_after(
    tmp_path: Path, monkeypatch
) -> None:
    path, done = tmp_path / "file", []
    replace, synchronise = os.replace, os.fsync

    def replaced(source: Path, target: Path) -> None:
        done.append("move")
        replace(source, target)

    def synchronised(opened: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(opened).st_mode) else "file")
        synchronise(opened)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synchronised)
    write(path)
    assert done == ["file", "move", "folder"]


KILLED = """
import pathlib, sys, time
from nss_prune.core.replacing import replacing, write_text
with replacing(sys.argv[1]) as aside:
    aside.write_bytes(b"half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    write(path, b"old")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    write(other)
    assert len(list(tmp_path.iterdir())) == 3  # of one that still writes nothing is deleted
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_bytes() == b"old"
    write(path)
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_one_that_still_writes_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as outer:
        outer.write_bytes(b"outer")
        write(path, b"inner")
    assert path.read_bytes() == b"outer"


def test_of_another_machine_nothing_is_deleted(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(module, "_machine", lambda: "elsewhere")
        with replacing(tmp_path / "file") as aside:
            left = aside.with_name(aside.name.replace(f"-{os.getpid()}-", "-99999999-"))
            left.write_bytes(b"half")
    write(tmp_path / "file")
    assert left.exists()


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as aside:
        assert aside.suffix == ".txt"
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
