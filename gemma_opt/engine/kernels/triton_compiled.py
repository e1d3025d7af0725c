"""Compiled kernels that travel with a checkpoint: written at build time, put into Triton's cache at start.

Triton names an entry after everything it depends on (source, options, GPU, its own version), so an entry that does not fit
is never found and does no harm. Its index files hold absolute paths, which is why a plain copy would not do.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from triton import knobs

FOLDER = "triton"
CODE = (".cubin", ".json")  # of an entry's files the one that runs and the one that describes it


@contextmanager
def keep_compiled(compile_cache: Path) -> Generator[list[dict[str, str]]]:
    """Write every kernel that this process compiles or loads meanwhile into `compile_cache`.

    Gives the list that grows with each: the files of one kernel by name.
    """
    groups: list[dict[str, str]] = []

    def note(*, metadata_group: dict[str, str], **_: object) -> None:
        groups.append(metadata_group)

    before = knobs.compilation.listener
    knobs.compilation.listener = note
    try:
        yield groups
    finally:
        knobs.compilation.listener = before
    for group in groups:
        for path in map(Path, group.values()):
            if path.suffix in CODE:
                entry = compile_cache / FOLDER / path.parent.name
                entry.mkdir(parents=True, exist_ok=True)
                (entry / path.name).write_bytes(path.read_bytes())


def install_compiled(compile_cache: Path) -> int:
    """Put a checkpoint's kernels into this machine's Triton cache; returns how many entries were new to it."""
    entries = [path for path in sorted((compile_cache / FOLDER).glob("*")) if path.is_dir()]
    return sum(_install(entry, Path(knobs.cache.dir) / entry.name) for entry in entries)


def _install(entry: Path, place: Path) -> bool:
    """False if the cache has this entry. The index is written last: without it Triton sees no entry."""
    files = [path for path in sorted(entry.iterdir()) if path.suffix in CODE]
    description = next((path.name for path in files if path.suffix == ".json"), None)
    if description is None or (place / f"__grp__{description}").exists():
        return False
    place.mkdir(parents=True, exist_ok=True)
    for path in files:
        (place / path.name).write_bytes(path.read_bytes())
    index = {"child_paths": {path.name: str(place / path.name) for path in files}}
    (place / f"__grp__{description}").write_text(json.dumps(index), "utf-8")
    return True
