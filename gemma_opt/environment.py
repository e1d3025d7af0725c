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

    Where git knows of none, what GEMMA_OPT_COMMIT says: trees are copied to GPU machines without their history, and git
    refuses to look into a checkout of another user. None without it.
    """
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return os.environ.get("GEMMA_OPT_COMMIT")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 our own arguments

    head = ask("rev-parse", "HEAD")
    changes = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    if head.returncode or changes.returncode:
        return os.environ.get("GEMMA_OPT_COMMIT")
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
