"""What a process of ours logs: only what is its user's business, and a level that exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_opt import logs
from gemma_opt.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]


def test_the_predictor_starts_without_other_libraries_notes() -> None:
    """torchao lists the kernels it could not load, and torch deprecations of its own, at every import."""
    command = [sys.executable, "-c", "import predict"]
    quiet = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"GEMMA_OPT_LOG": ""}, check=True
    )
    assert quiet.stderr == ""


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_OPT_LOG", "foo")
    with pytest.raises(UsageError, match="'foo', not one of debug, info"):
        logs.set_up("info")
