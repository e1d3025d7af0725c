"""All the training of one recipe: the teacher is kept before anything changes, then phase follows phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gemma_opt.calibration import Sample, Store
from gemma_opt.distill.rounding import Rounding
from gemma_opt.distill.teacher import make_teacher
from gemma_opt.distill.training import SAVE_EVERY_S, Student, distill_, phases
from gemma_opt.gemma import GemmaModel
from gemma_opt.recipe import Distill

Progress = Callable[[str, int, int], None]  # title, done, in all


@dataclass(frozen=True)
class DistillData:
    """What a distillation reads and where it keeps what is finished.

    load_teacher: None where the teacher is the model before compression. save_every_s: seconds between saved states.
    """

    samples: tuple[Sample, ...]
    store: Store
    load_teacher: Callable[[], GemmaModel] | None = None
    save_every_s: float = SAVE_EVERY_S


class Recovery:
    """The phases of training of one model, in order. Made while the model is uncompressed.

    count: how many phases there will be. Titles of progress end in the loss: "distill 2/3 · loss 0.123".
    """

    def __init__(self, model: GemmaModel, section: Distill, data: DistillData, count: int, progress: Progress) -> None:
        self._model = model
        self._section = section
        self._data = data
        self._phases = phases(section, count)
        self._done = 0
        self._progress = progress
        self._teacher = make_teacher(
            model, data.load_teacher, section, data.samples, data.store, lambda done, total: progress("teacher", done, total)
        )

    def train_(self, masked: frozenset[str], roundings: Mapping[str, Rounding] | None = None) -> list[float]:
        """The next phase, in place. Returns the loss of every step.

        masked: modules whose zeros stay zero; roundings: how the named linears will be stored, used if the section says so.
        """
        phase = self._phases[self._done]
        self._done += 1
        title = f"distill {self._done}/{len(self._phases)}"
        return distill_(
            Student(self._model, masked, (roundings or {}) if self._section.quantized else {}),
            self._teacher,
            self._section,
            phase,
            self._data.samples,
            self._data.store.section(f"distill.{phase.number}."),
            lambda done, total, loss: self._progress(f"{title} · loss {loss:.4f}", done, total),
            self._data.save_every_s,
        )
