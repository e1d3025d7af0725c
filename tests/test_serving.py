"""The server's start: what `serve` puts in place before it becomes Cog's server."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_opt import serving
from gemma_opt.errors import StorageError
from gemma_opt.serving import exec_server, server_environment


def test_paths_are_those_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative GEMMA_OPT_RECIPE was looked for in the checkout, where the server runs."""
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "built").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_OPT_RECIPE", "mine.yaml")
    monkeypatch.setenv("GEMMA_OPT_MODEL", "built")
    found = server_environment(5000, "predict.py:Predictor")
    assert found["GEMMA_OPT_RECIPE"] == str(tmp_path / "mine.yaml")
    assert found["GEMMA_OPT_MODEL"] == str(tmp_path / "built")


def test_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small-int8").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_OPT_RECIPE", "small-int8")
    assert server_environment(5000, "predict.py:Predictor")["GEMMA_OPT_RECIPE"] == "small-int8"


def test_a_checkout_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only checkout ended `serve` in a traceback."""
    for name in ("predict.py", "openapi.json"):
        (tmp_path / name).write_bytes((serving.ROOT / name).read_bytes())
    (tmp_path / ".cog").write_text("in the way")
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"^E3005 .*/\.cog cannot be written: "):
        exec_server("127.0.0.1", 5000, "predict.py:Predictor")
