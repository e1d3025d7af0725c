"""Build or reuse every recipe, and measure all of them in one run beside the base.

Two models are in memory at a time: the base and one candidate. Speed is measured in rounds that alternate between the two,
so that a machine that slows down slows both; the ratio of a round compares neighbours in time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma_opt import checkpoint, environment, gemma, inspection
from gemma_opt.build import build
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.errors import UsageError
from gemma_opt.evaluation.perplexity import builtin_text
from gemma_opt.evaluation.suite import Evaluation, Measures, Progress, evaluate, refuse_unmeasurable
from gemma_opt.identity import differences
from gemma_opt.loading import DENSE_CONTEXT, Source, default_folder, dense_recipe
from gemma_opt.prompt import EncodedPrompt
from gemma_opt.recipe import Recipe
from gemma_opt.report.candidates import Candidate, Recommendation, Speed, frontier, recommend
from gemma_opt.service import Service
from gemma_opt.staging import storage_errors
from gemma_opt.throughput import refuse_clipped

BASE = "base"


@dataclass(frozen=True)
class SpeedTest:
    """How decode speed is measured: batch 1, greedy, base and candidate in turn."""

    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5


@dataclass(frozen=True)
class Report:
    """All candidates, the base first, with the conditions under which they were measured."""

    base: str
    candidates: tuple[Candidate, ...]
    texts: tuple[str, ...]
    measures: Measures
    speed_test: SpeedTest
    conditions: dict[str, object] = field(default_factory=environment.describe)

    @property
    def recommendations(self) -> list[Recommendation]:
        """The recipe for each budget."""
        return recommend(self.candidates)

    def on_frontier(self, by: str) -> list[str]:
        """Names of the Pareto set, quality against "size" or "speed"."""
        return [one.name for one in frontier(self.candidates, by=by)]

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON: everything the page shows."""
        return {
            "base": self.base,
            "conditions": self.conditions
            | {
                "batch": 1,
                "prompt_tokens": self.speed_test.prompt_tokens,
                "new_tokens": self.speed_test.new_tokens,
                "rounds": self.speed_test.rounds,
                "texts": list(self.texts),
                "window": self.measures.window,
                "windows": self.measures.windows,
                "charts": self.measures.charts,
                "greedy_prompts": self.measures.prompts,
            },
            "candidates": [one.to_json() for one in self.candidates],
            "frontier": {by: self.on_frontier(by) for by in ("size", "speed")},
            "recommendations": [one.to_json() for one in self.recommendations],
        }


def compare(
    recipes: Sequence[Recipe],
    base: str | None,
    folder: Path,
    measures: Measures,
    speed_test: SpeedTest,
    device: str | None,
    progress: Progress,
) -> Report:
    """Measure all recipes. Checkpoints that are not there yet are built in `folder`.

    Without texts and charts, Python's help texts are the text. Raises UsageError if two recipes share a name or, without
    `base`, their base models differ, and for what cannot be measured; and what building and loading raise. What can be
    refused is refused before the first build.
    """
    names = [recipe.name for recipe in recipes]
    if len(set(names)) != len(names) or BASE in names:
        raise UsageError(f"every recipe of a report needs a name of its own, not {BASE!r}: {', '.join(names)}")
    bases = {recipe.model.base for recipe in recipes}
    if base is None and len(bases) > 1:
        raise UsageError(f"the recipes have different base models ({', '.join(sorted(bases))}): name one with --base")
    if not measures.texts and not measures.charts:
        measures = replace(measures, texts={"Python's help texts": builtin_text()}, windows=measures.windows or 16)
    files = gemma.locate(recipes[0].model, base)
    refuse_unmeasurable(gemma.find_processing(files), measures)
    context = min(DENSE_CONTEXT, *(recipe.engine.context for recipe in recipes))
    refuse_clipped(context, speed_test.prompt_tokens, speed_test.new_tokens)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    title = "build or reuse"
    folders = dict[str, Path]()
    for done, recipe in enumerate(recipes, start=1):
        folders[recipe.name] = _finished(recipe, str(files.path), folder, device, progress)
        progress(title, done, len(recipes))
    with closing(Service.load(Source(dense_recipe(str(files.path), device)), device)) as dense:
        parameters = dense.ready.plan.parameters
        found = [_measure(recipe, folders[recipe.name], dense, measures, speed_test, device, progress) for recipe in recipes]
        quiz = evaluate(
            dense, None, replace(measures, texts={}), lambda what, done, total: progress(f"{BASE}: {what}", done, total)
        )
    rate = statistics.median(one.speed.tokens_per_second / one.speed.ratio for one in found)
    compared = found[0].evaluation.agreement
    own = Evaluation({name: one.reference_perplexity for name, one in compared.items()}, quiz.charts)
    what = f"{files.name}, uncompressed; computes in {dense.ready.recipe.model.dtype}, size in bfloat16"
    itself = Candidate(BASE, what, 2 * parameters, 0.0, Speed(rate, 1.0, 1.0, 1.0), own, is_base=True)
    return Report(files.name, (itself, *found), tuple(compared), measures, speed_test)


def _finished(recipe: Recipe, base: str, folder: Path, device: str | None, progress: Progress) -> Path:
    """The recipe's checkpoint of exactly this base and data: the usual one if it fits, else the report's own."""
    own = folder / recipe.name
    for place in (default_folder(recipe), own):
        if checkpoint.is_finished(place) and not differences(checkpoint.read_manifest(place), recipe, base):
            return place
    build(
        recipe,
        own,
        base=base,
        device=device,
        questions=0,
        progress=lambda stage, done, total: progress(f"{recipe.name}: {stage}", done, total),
    )
    return own


def _measure(
    recipe: Recipe,
    folder: Path,
    dense: Service,
    measures: Measures,
    speed_test: SpeedTest,
    device: str | None,
    progress: Progress,
) -> Candidate:
    def show(what: str, done: int, total: int) -> None:
        progress(f"{recipe.name}: {what}", done, total)

    with closing(Service.load(Source(recipe, folder), device)) as service:
        speed = _race(dense, service, speed_test, show)
        found: Evaluation = evaluate(service, dense, measures, show)
        layers = inspection.measure(service.ready.model, service.ready.plan)
    sparsity = inspection.linear_sparsity(layers)
    return Candidate(recipe.name, recipe.description, checkpoint.weight_bytes(folder), sparsity, speed, found)


def _race(base: Service, candidate: Service, test: SpeedTest, progress: Progress) -> Speed:
    """Decode rates of base and candidate in turn; each round starts with the other one."""
    ratios, rates = list[float](), list[float]()
    for number in range(test.rounds):
        pair = [base, candidate] if number % 2 == 0 else [candidate, base]
        found = {id(service): decode_rate(service, test) for service in pair}
        ratios.append(found[id(candidate)] / found[id(base)])
        rates.append(found[id(candidate)])
        progress("decode speed", number + 1, test.rounds)
    return Speed(statistics.median(rates), statistics.median(ratios), min(ratios), max(ratios))


def decode_rate(service: Service, test: SpeedTest) -> float:
    """Tokens a second of one greedy reply of exactly `new_tokens`, the first one not counted."""
    tokenizer = service.ready.processing.tokenizer
    words = tokenizer.encode(builtin_text()[:4000], add_special_tokens=False)
    prompt = EncodedPrompt((tokenizer.get_vocab()["<bos>"], *words[: test.prompt_tokens - 1]), (), 0)
    sampling = SamplingParams(max_new_tokens=test.new_tokens, min_new_tokens=test.new_tokens, temperature=0)
    generation = service.generate(prompt, sampling)
    for _ in generation:
        pass
    rate = generation.finished.tokens_per_second
    if rate is None:
        raise UsageError(f"the decode test needs at least 2 new tokens, got {test.new_tokens}")
    return rate
