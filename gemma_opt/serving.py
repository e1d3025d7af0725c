"""Cog's own HTTP server without Docker, started the way a Cog image starts it.

What `cog build` would have put into the image is put in place here: the interface description in .cog/, the predictor's
name, and the interpreter on PATH. The working directory becomes the checkout's, where predict.py and openapi.json lie.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def exec_server(host: str, port: int, predictor: str) -> None:
    """Become the server; does not return. predictor: FILE:CLASS, relative to the checkout."""
    environment = _environment(port, predictor)
    os.chdir(ROOT)
    _install_schema()
    command = [sys.executable, "-m", "cog.server.http", "--host", host]
    os.execve(sys.executable, command, environment)  # noqa: S606 - our own interpreter, no shell


def _install_schema() -> None:
    """Copy openapi.json to where the server looks. Without it there is no input check and no streaming."""
    folder = ROOT / ".cog"
    folder.mkdir(exist_ok=True)
    fresh = folder / f"openapi_schema.{os.getpid()}.json"
    fresh.write_bytes((ROOT / "openapi.json").read_bytes())
    fresh.replace(folder / "openapi_schema.json")  # a server that starts beside us never reads half a file


def _environment(port: int, predictor: str) -> dict[str, str]:
    """The server starts its worker as `python`, whatever PATH says that is: it must be this interpreter."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    chosen = os.environ.get("GEMMA_OPT_MODEL")
    model = {"GEMMA_OPT_MODEL": str(Path(chosen).resolve())} if chosen and Path(chosen).exists() else {}
    return {**os.environ, **model, "PATH": path, "PORT": str(port), "COG_PREDICT_TYPE_STUB": predictor}
