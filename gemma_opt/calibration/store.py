"""Finished pieces of long work on disk, each written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_opt.calibration.samples import Sample
from gemma_opt.staging import storage_errors

ORIGIN = "origin.json"


class Store:
    """Named groups of tensors in a folder that belongs to one origin: what the work is made from.

    folder None keeps nothing. A folder of another origin is emptied when the store is opened, so that nothing of an older
    recipe, model, data or library version is ever reused. Made only with the first `save`.
    """

    def __init__(self, folder: Path | None = None, origin: dict[str, object] | None = None, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._origin = json.dumps(origin or {}, sort_keys=True)
        if folder and folder.is_dir() and _read(folder / ORIGIN) != self._origin:
            shutil.rmtree(folder)

    def section(self, prefix: str) -> Store:
        """The same store, where every name begins with a prefix."""
        store = Store(prefix=self._prefix + prefix)
        store._folder, store._origin = self._folder, self._origin
        return store

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors saved under a name; None where there are none."""
        if self._folder is None or not (file := self._file(self._folder, name)).is_file():
            return None
        try:
            return load_file(file)
        except SafetensorError:
            return None  # a damaged piece is made again

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name. Raises StorageError (E3005)."""
        if self._folder is None:
            return
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ORIGIN).write_text(self._origin, "utf-8")
            file = self._file(self._folder, name)
            partial = file.with_suffix(".partial")
            save_file(kept, partial)
            os.replace(partial, file)

    def remove(self, name: str) -> None:
        """Forget what was saved under a name, if anything was."""
        if self._folder:
            self._file(self._folder, name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything: the work is done."""
        if self._folder and self._folder.is_dir():
            shutil.rmtree(self._folder)

    def _file(self, folder: Path, name: str) -> Path:
        return folder / f"{self._prefix}{name}.safetensors"


def _read(file: Path) -> str | None:
    return file.read_text("utf-8") if file.is_file() else None


@dataclass(frozen=True)
class CalibrationData:
    """What a stage that measures needs: the samples, and where to keep what is finished."""

    samples: tuple[Sample, ...]
    store: Store
