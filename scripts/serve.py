"""Runs Cog's own HTTP server without Docker: python scripts/serve.py --port 5000

What `cog build` would have put into the image is put in place here: the interface description in .cog/, the predictor's
name, and the interpreter on PATH. It serves on this machine only (`--host 0.0.0.0` opens it; read README, "Limits").
The working directory becomes the repository's, so give GEMMA_OPT_MODEL as an absolute path if you are elsewhere.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install_schema() -> None:
    """Copy openapi.json to where the server looks. Without it there is no input check and no streaming."""
    folder = ROOT / ".cog"
    folder.mkdir(exist_ok=True)
    fresh = folder / f"openapi_schema.{os.getpid()}.json"
    fresh.write_bytes((ROOT / "openapi.json").read_bytes())
    fresh.replace(folder / "openapi_schema.json")  # a server that starts beside us never reads half a file


def environment(port: int, predictor: str) -> dict[str, str]:
    """The server starts its worker as `python`, whatever PATH says that is: it must be this interpreter."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {**os.environ, "PATH": path, "PORT": str(port), "COG_PREDICT_TYPE_STUB": predictor}


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(description="Serve the predictor over HTTP without Docker.")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--predictor", default="predict.py:Predictor", metavar="FILE:CLASS")
    options = parser.parse_args()
    os.chdir(ROOT)
    install_schema()
    command = [sys.executable, "-m", "cog.server.http", "--host", options.host]
    os.execve(sys.executable, command, environment(options.port, options.predictor))


if __name__ == "__main__":
    main()
