"""Where a figure was measured: hardware, versions, commit. Part of every result file. No names of machines or users."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from gemma_opt.checkpoint import versions

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, object]:
    """Hardware, versions and the commit this tree stands on (marked if files differ from it; None for an installed package)."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(terse=True),
        "versions": versions(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this checkout, with "+changes" if tracked files differ, other than results that were just measured.

    Outside a checkout what GEMMA_OPT_COMMIT says: trees are copied to GPU machines without their history. None without it.
    """
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return os.environ.get("GEMMA_OPT_COMMIT")

    def ask(*arguments: str) -> str:
        return subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 our own arguments

    changes = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return ask("rev-parse", "HEAD") + ("+changes" if changes else "")


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
