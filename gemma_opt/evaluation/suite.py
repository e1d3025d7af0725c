"""Everything `evaluate` can measure of one model, in one call: what the command line and the report share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gemma_opt.errors import UsageError
from gemma_opt.evaluation.agreement import (
    Agreement,
    PrefixMatch,
    agreement,
    chart_prompts,
    greedy_agreement,
    refuse_other_vocabulary,
    text_agreement,
    text_prompts,
)
from gemma_opt.evaluation.perplexity import WINDOW, answer_passages, text_perplexity
from gemma_opt.evaluation.quiz import QuizScore, run_quiz
from gemma_opt.gemma import Processing
from gemma_opt.service import Service

ANSWERS = "chart answers"  # stands among the texts: the right answers to picture questions
ANSWER_PICTURES = 20

Progress = Callable[[str, int, int], None]  # what is measured, done, of how many


@dataclass(frozen=True)
class Measures:
    """What to measure. texts: name → content. charts: picture questions. windows: at most so many of each text.

    prompts: greedy replies compared with the reference's, so many from every text and so many about pictures.
    """

    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    window: int = WINDOW
    windows: int | None = None
    charts: int = 0
    seed: int = 1
    blank_images: bool = False
    prompts: int = 8


@dataclass(frozen=True)
class Evaluation:
    """What was measured; by text where it is about texts. agreement and greedy: only with a reference."""

    perplexity: Mapping[str, float]
    charts: QuizScore | None = None
    agreement: Mapping[str, Agreement] = field(default_factory=dict[str, Agreement])
    greedy: PrefixMatch | None = None

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON, without what was not measured."""
        parts: dict[str, object] = {
            "charts": self.charts.to_json() if self.charts else None,
            "perplexity": dict(self.perplexity),
            "agreement": {name: one.to_json() for name, one in self.agreement.items()},
            "greedy": self.greedy.to_json() if self.greedy else None,
        }
        return {name: part for name, part in parts.items() if part}


def evaluate(service: Service, reference: Service | None, measures: Measures, progress: Progress) -> Evaluation:
    """Measure a model, and if there is a reference, how far it strays from it. Raises UsageError, InputError, EngineError."""
    refuse_unmeasurable(service.ready.processing, measures)
    if reference:
        refuse_other_vocabulary(reference.ready, service.ready)
    quiz = None
    if measures.charts:
        quiz = run_quiz(
            service,
            measures.charts,
            measures.seed,
            blank=measures.blank_images,
            progress=lambda done, total: progress("charts", done, total),
        )
    if reference is None:
        return Evaluation(_perplexities(service, measures, progress), quiz)
    found: dict[str, Agreement] = {}
    for done, (name, text) in enumerate(measures.texts.items(), start=1):
        found[name] = text_agreement(reference.ready, service.ready, text, window=measures.window, limit=measures.windows)
        progress("texts", done, len(measures.texts))
    if measures.charts:
        passages = answer_passages(service.ready, min(measures.charts, ANSWER_PICTURES), measures.seed)
        found[ANSWERS] = agreement(reference.ready, service.ready, passages)
    prompts = [
        prompt
        for text in measures.texts.values()
        for prompt in text_prompts(service.ready, text, measures.prompts, measures.window)
    ]
    if reference.ready.processing.processor is not None:
        prompts += chart_prompts(service, measures.prompts, measures.seed)
    greedy = None
    if prompts:
        greedy = greedy_agreement(reference, service, prompts, lambda done, total: progress("greedy replies", done, total))
    return Evaluation({name: one.perplexity for name, one in found.items()}, quiz, found, greedy)


def refuse_unmeasurable(processing: Processing, measures: Measures) -> None:
    """Raises UsageError for pictures where the model reads text only, or naming every text that fills no window."""
    if measures.charts and processing.processor is None:
        raise UsageError("charts are pictures, and this model reads text only")
    tokenizer, needed = processing.tokenizer, measures.window - 1  # <bos> is the other one
    texts = measures.texts.items()
    counts = {name: len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) for name, text in texts}
    if short := ", ".join(f"{name} has {count:,}" for name, count in counts.items() if count < needed):
        raise UsageError(f"a window of {measures.window:,} takes {needed:,} tokens of text beside <bos>, and {short}")


def _perplexities(service: Service, measures: Measures, progress: Progress) -> dict[str, float]:
    found: dict[str, float] = {}
    for done, (name, text) in enumerate(measures.texts.items(), start=1):
        found[name] = text_perplexity(service.ready, text, window=measures.window, limit=measures.windows)
        progress("texts", done, len(measures.texts))
    return found
