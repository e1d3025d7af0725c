"""A folder that is written completely or not at all, also where the writer is killed.

It grows in a hidden folder beside its place and is renamed at the end. Who writes holds a lock on that folder, which ends
with the process: a folder that nobody holds is what a killed writer left, and the next one removes it.

On a file system without such locks (NFS has none for folders) all that is in doubt stays: what killed writers left has to be
removed by hand, and of two that finish the same folder at the same moment one may fail.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from gemma_opt.errors import StorageError

PARTIAL, OLD = ".partial", ".old"


@contextmanager
def storage_errors(place: Path) -> Generator[None]:
    """What the disk refuses in the block is a StorageError (E3005) about `place`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:  # its way of passing the disk's errors on
        raise StorageError(f"{place} cannot be written: {error}") from None


@contextmanager
def staging(out: Path, needed_bytes: int) -> Generator[Path]:
    """A temporary folder that becomes `out` if the block succeeds and vanishes if it does not; SIGTERM ends the block too.

    What killed writers of the same `out` left is removed first; an `out` that one of them had moved aside is put back.
    Raises StorageError (E3005) where the disk refuses, and before anything is written if it has too little room.
    """
    out = out.resolve()  # a link stays, and what it names is replaced
    with _ended_by_sigterm():
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with _locked(out.parent):  # nobody sees a folder between its making and its lock
                _tidy(out)
                free = shutil.disk_usage(out.parent).free
                if free < needed_bytes:
                    raise StorageError(f"{out.parent} has {free / 1e6:,.0f} MB free, {needed_bytes / 1e6:,.0f} MB are needed")
                folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
                folder.mkdir()
                lock = _lock(folder)
        try:
            yield folder
            with storage_errors(out), _locked(out.parent):
                _replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older `out` is moved aside first and removed last, if need be by the next writer."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_suffix(OLD)
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(out: Path) -> None:
    """Remove what writers of `out` that are no more have left. An older `out` exists once: in its place, or moved aside."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}({re.escape(PARTIAL)}|{re.escape(OLD)})")
    for path in sorted(out.parent.iterdir()):
        if not (match := ours.fullmatch(path.name)):
            continue
        if match[1] == OLD and not out.exists():
            path.rename(out)
        elif match[1] == OLD:
            shutil.rmtree(path)
        elif (lock := _lock(path)) is not None:
            shutil.rmtree(path)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or the process ends; None where another holds it, or locks are unknown."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """One process at a time, where the file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """SIGTERM unwinds the block as an exit would, with the exit code that shells give it, unless someone else handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
