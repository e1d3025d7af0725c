"""Folders that are written completely or not at all, by writers that fail, are killed, or work at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_opt.errors import StorageError, WeightsError
from gemma_opt.staging import staging, storage_errors

WRITER = """
import sys, time
from pathlib import Path
from gemma_opt.staging import staging
with staging(Path(sys.argv[1]), 0) as folder:
    (folder / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def folder_with(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def start_writer(out: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def stop(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    with process:
        return process.wait(30)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with staging(tmp_path / "out", 0) as folder:
            (folder / "half").write_text("x")
            raise WeightsError("stop")

    with pytest.raises(WeightsError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_folder(tmp_path: Path) -> None:
    old = folder_with(tmp_path / "out", "old")
    with pytest.raises(WeightsError), staging(old, 0):
        raise WeightsError("stop")
    assert (old / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_too_little_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"E3005 .*are needed"), staging(tmp_path / "out", 10**18):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="E3005"), staging(tmp_path / "file" / "out", 0):
        raise AssertionError


def test_a_killed_writers_folder_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Gigabytes of a killed build once stayed for ever."""
    assert stop(start_writer(tmp_path / "out"), signal.SIGKILL) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    other = folder_with(tmp_path / ".out.more.00000000.partial", "of a neighbour called out.more")
    with staging(tmp_path / "out", 0) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([other, folder])


def test_a_folder_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "out")
    (theirs,) = tmp_path.iterdir()
    with staging(tmp_path / "out", 0) as folder:
        (folder / "file").write_text("whole")
    assert (theirs / "file").read_text() == "half"
    assert (tmp_path / "out" / "file").read_text() == "whole"
    stop(process, signal.SIGTERM)


def test_where_locks_are_unknown_what_is_in_doubt_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, which locks no folders."""

    def unknown(_: int, __: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unknown)
    doubtful = folder_with(tmp_path / ".out.0123abcd.partial", "half")
    with staging(tmp_path / "out", 0) as folder:
        (folder / "file").write_text("whole")
    assert sorted(tmp_path.iterdir()) == [doubtful, tmp_path / "out"]


def test_sigterm_ends_a_writer_without_a_trace(tmp_path: Path) -> None:
    assert stop(start_writer(tmp_path / "out"), signal.SIGTERM) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_sigterm_means_afterwards_what_it_meant_before(tmp_path: Path) -> None:
    with staging(tmp_path / "out", 0):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_left_aside_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old checkpoint was whole, and nobody found it."""
    folder_with(tmp_path / ".out.0123abcd.old", "old")
    with pytest.raises(WeightsError), staging(tmp_path / "out", 0):
        raise WeightsError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_left_aside_beside_its_successor_is_removed(tmp_path: Path) -> None:
    folder_with(tmp_path / ".out.0123abcd.old", "old")
    folder_with(tmp_path / "out", "new")
    with pytest.raises(WeightsError), staging(tmp_path / "out", 0):
        raise WeightsError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_only_what_the_disk_refuses_is_a_storage_error(tmp_path: Path) -> None:
    """Every OSError of a whole build, a missing compiler's too, once became "cannot be written"."""
    with pytest.raises(FileNotFoundError, match="no-such-compiler"), staging(tmp_path / "out", 0):
        os.stat("no-such-compiler")
    with pytest.raises(StorageError, match=r"E3005 .*out cannot be written: No space left"), storage_errors(tmp_path / "out"):
        raise OSError(28, "No space left on device")
