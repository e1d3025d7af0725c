"""Compile our C++ once per machine and load it: no torch headers, a plain C interface, seconds with g++.

The library is linked with the OpenMP runtime that torch has already loaded: a second pool of threads would fight over the
same cores. It is kept in the user's cache folder under a key of sources, compiler, flags and CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = ("cpu.cpp", "simd.hpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")


class BuildError(Exception):
    """Why there is no library."""


@functools.cache
def load_library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | None:
    """The compiled library; None, with one line in the log, where it cannot be had."""
    try:
        return ctypes.CDLL(str(compile_library(flags)))
    except (BuildError, OSError) as error:
        log.warning("decoding with torch operations, slowly: %s", error)
        return None


def compile_library(flags: tuple[str, ...]) -> Path:
    """The library's path, compiled if the cache does not hold it. Raises BuildError."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler (g++, or what CXX names)")
    here = Path(__file__).parent
    runtime = _openmp_runtime()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603 a compiler
    parts = [*(here.joinpath(name).read_text("utf-8") for name in SOURCES), version, *flags, *runtime, _cpu()]
    path = cache_folder() / f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    if not path.is_file():
        fresh = path.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, str(here / SOURCES[0]), *runtime, "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 a compiler on our own source
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        fresh.replace(path)  # a process that starts beside us never loads half a file
    return path


@functools.cache
def cache_folder() -> Path:
    """A folder only this user can write: code is loaded from it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_opt"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if base.stat().st_uid == os.getuid() and os.access(base, os.W_OK):
            return base
    except OSError as error:
        log.info("no cache in %s: %s", base, error.strerror)
    return Path(tempfile.mkdtemp(prefix="gemma_opt-"))  # this process alone has it


def _openmp_runtime() -> list[str]:
    """The OpenMP library in this process, so that the linker binds to that one; nothing if there is none yet."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text("utf-8").splitlines() if maps.exists() else []
    found = {line.split()[-1] for line in lines if "omp" in Path(line.split()[-1]).name and ".so" in line.split()[-1]}
    return sorted(path for path in found if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))[:1]


def _cpu() -> str:
    """What -march=native depends on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
