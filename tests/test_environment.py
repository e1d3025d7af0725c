"""Where figures were measured: what cannot be found out must not cost the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_opt import environment


def test_a_checkout_that_git_does_not_read_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The story: in a container git refuses a checkout of another user, and a report was lost after all its measuring."""
    (tmp_path / ".git").write_text("not a repository")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("GEMMA_OPT_COMMIT", raising=False)
    assert environment.describe()["commit"] is None
    monkeypatch.setenv("GEMMA_OPT_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
