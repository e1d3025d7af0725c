"""Texts for quality figures, read from what Python and its packages ship: nothing is downloaded, and nothing is copied here.

Kinds are kept apart. Calibration: docstrings, package descriptions, source code, command help. Choices between variants are
made on `development` (the language reference in Python's help topics); results are measured on `evaluation`: licences (legal
prose) and IDLE's changelog. No kind of text is in two of the three.
"""

from __future__ import annotations

import ast
import hashlib
import pydoc_data.topics
import random
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = Path(sysconfig.get_paths()["purelib"])
DOCSTRING_PACKAGES = ("numpy", "sympy", "networkx", "torch", "transformers", "PIL", "pydantic", "mpmath", "werkzeug")
CODE_PACKAGES = ("werkzeug", "rich", "pip", "networkx", "jinja2", "pygments", "httpx", "typer")
MAX_KIND = 400_000  # characters of each kind: about 200 windows of 512 tokens
MIN_DOCSTRING = 300  # characters: shorter ones are labels, not prose


def evaluation() -> dict[str, str]:
    """The two texts that results are measured on."""
    return {"licences": _licences(), "changelog": _changelog()}


def development() -> str:
    """The text that choices are made on."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def calibration(seed: int = 0) -> dict[str, str]:
    """Name → text of the calibration kinds, each shuffled in pieces by the seed."""
    kinds = {"docstrings": _docstrings(), "descriptions": _descriptions(), "code": _code(), "prose": _prose()}
    shuffled: dict[str, str] = {}
    for name, pieces in kinds.items():
        listed = sorted(set(pieces))
        random.Random(f"{seed}/{name}").shuffle(listed)
        shuffled[name] = "\n\n".join(listed)[:MAX_KIND]
    return shuffled


def write_calibration(folder: Path, seed: int = 0) -> list[Path]:
    """The calibration kinds as text files, for a recipe's `calibration.source`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, text in calibration(seed).items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text, "utf-8")
    return paths


def sha256(text: str) -> str:
    """The hash of a text, to record beside its figures."""
    return hashlib.sha256(text.encode()).hexdigest()


def _licences() -> str:
    names = ("numpy", "pillow", "grpcio", "ruff")
    files = [file for name in names for file in metadata.files(name) or [] if file.name.startswith("LICENSE")]
    texts = {Path(str(file.locate())).read_text("utf-8", errors="replace") for file in files}
    return "\n\n".join([(STDLIB / "LICENSE.txt").read_text("utf-8"), *sorted(texts, key=lambda text: (-len(text), text))])


def _changelog() -> str:
    folder = STDLIB / "idlelib"
    return "\n\n".join(
        (folder / name).read_text("utf-8", errors="replace") for name in ("NEWS.txt", "NEWS2x.txt", "HISTORY.txt")
    )


def _sources(packages: tuple[str, ...]) -> Iterator[str]:
    for package in packages:
        files = [file for file in (PACKAGES / package).rglob("*.py") if "test" not in str(file.relative_to(PACKAGES))]
        for file in random.Random(package).sample(sorted(files), min(len(files), 60)):
            text = file.read_text("utf-8", errors="replace")
            if len(text) > 1000:
                yield text


def _docstrings() -> Iterator[str]:
    for source in _sources(DOCSTRING_PACKAGES):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= MIN_DOCSTRING and "copyright" not in text.lower():
                    yield text


def _descriptions() -> Iterator[str]:
    for distribution in metadata.distributions():
        text = distribution.metadata.json.get("description")
        if isinstance(text, str) and "changelog" not in text.lower()[:20_000]:
            yield text[:20_000]


def _code() -> Iterator[str]:
    for source in _sources(CODE_PACKAGES):
        yield source[:8000]


def _prose() -> Iterator[str]:
    """Longer English: module docstrings of the standard library and comments of the interpreter's own modules."""
    for file in sorted(STDLIB.glob("*.py")):
        text = file.read_text("utf-8", errors="replace")
        doc = ast.get_docstring(ast.parse(text)) or ""
        if len(doc) > MIN_DOCSTRING and "copyright" not in doc.lower():
            yield doc


if __name__ == "__main__":
    for written in write_calibration(Path(sys.argv[1])):
        print(written, written.stat().st_size)
