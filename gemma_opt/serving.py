"""Cog's own HTTP server without Docker, started the way a Cog image starts it.

What `cog build` would have put into the image is put in place here: the interface description in .cog/, the predictor's
name and how many requests it takes at once, and the interpreter on PATH. The working directory becomes the checkout's,
where predict.py and openapi.json lie.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

from gemma_opt.errors import UsageError
from gemma_opt.staging import storage_errors

ROOT = Path(__file__).resolve().parents[1]


def exec_server(host: str, port: int, predictor: str) -> None:
    """Become the server; does not return. predictor: FILE:CLASS, relative to the checkout.

    Raises UsageError where these files are not there, as in an installed package, and StorageError.
    """
    missing = [name for name in (predictor.partition(":")[0], "openapi.json") if not (ROOT / name).is_file()]
    if missing:
        raise UsageError(f"there is no {' and no '.join(missing)} in {ROOT}: `serve` needs the repository's folder")
    environment = server_environment(port, predictor)
    os.chdir(ROOT)
    _install_schema()
    command = [sys.executable, "-m", "cog.server.http", "--host", host]
    os.execve(sys.executable, command, environment)  # noqa: S606 - our own interpreter, no shell


def _install_schema() -> None:
    """Copy openapi.json to where the server looks. Without it there is no input check and no streaming."""
    folder = ROOT / ".cog"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        fresh = folder / f"openapi_schema.{os.getpid()}.json"
        fresh.write_bytes((ROOT / "openapi.json").read_bytes())
        fresh.replace(folder / "openapi_schema.json")  # a server that starts beside us never reads half a file


def server_environment(port: int, predictor: str) -> dict[str, str]:
    """The server's variables: paths of model and recipe as seen from the folder that the user stands in.

    The server starts its worker as `python`, whatever PATH says that is: it must be this interpreter.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    model, recipe = (os.environ.get(name) for name in ("GEMMA_OPT_MODEL", "GEMMA_OPT_RECIPE"))
    places = {"GEMMA_OPT_MODEL": str(Path(model).resolve())} if model and Path(model).exists() else {}
    if recipe and Path(recipe).is_file():  # a folder may be called like a packaged recipe
        places["GEMMA_OPT_RECIPE"] = str(Path(recipe).resolve())
    at_once = {"COG_MAX_CONCURRENCY": str(_max_concurrency(predictor))}
    return {**at_once, **os.environ, **places, "PATH": path, "PORT": str(port), "COG_PREDICT_TYPE_STUB": predictor}


def _max_concurrency(predictor: str) -> int:
    """The number in `@cog.concurrent(max=…)` on a predictor's predict, read without importing it, as `cog build` reads it."""
    file, _, class_name = predictor.partition(":")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return next(
        (
            keyword.value.value
            for item in tree.body
            if isinstance(item, ast.ClassDef) and item.name == class_name
            for method in item.body
            if isinstance(method, ast.AsyncFunctionDef)
            for decorator in method.decorator_list
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "cog.concurrent"
            for keyword in decorator.keywords
            if keyword.arg == "max" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, int)
        ),
        1,
    )
