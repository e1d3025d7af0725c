"""One build: compress, save, answer once, evaluate, and only then put the folder in its place.

Everything is written into a hidden folder beside the target. Text that the model wrote, layers pruned with calibration data,
teachers' answers and the state of a training are kept in another one, `.<name>.work`, until the build is done: the same build
started again after a kill goes on where it was. The model that is evaluated is the one loaded back from the folder through the
service, so one that cannot be served is never finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from gemma_opt import checkpoint, gemma, inspection, pipeline
from gemma_opt.calibration import Author, CalibrationData, Sample, Store, draw_samples
from gemma_opt.distill import DistillData
from gemma_opt.engine.compilation import save_artifacts
from gemma_opt.engine.kernels import arrangement
from gemma_opt.engine.kernels.gpu import keeping_compiled, tune
from gemma_opt.engine.weights import take_weights
from gemma_opt.errors import WeightsError
from gemma_opt.evaluation.agreement import Agreement, agreement
from gemma_opt.evaluation.perplexity import Passage, answer_passages, builtin_text, text_passages
from gemma_opt.evaluation.quiz import QuizScore, run_quiz
from gemma_opt.identity import data_identity, identity_of
from gemma_opt.loading import Ready, Source, dense_recipe
from gemma_opt.policy import Plan
from gemma_opt.policy import plan as make_plan
from gemma_opt.recipe import Calibration, Recipe
from gemma_opt.service import Request, Service
from gemma_opt.staging import staging, storage_errors

QUIZ_SEED = 1
PERPLEXITY_PICTURES = 20
PERPLEXITY_WINDOWS = 16
OVERHEAD_BYTES = 64 * 2**20  # tokenizer, configs, manifest
SMOKE_PROMPT = "Hello"


@dataclass(frozen=True)
class Quality:
    """What a model can do. perplexity: of right answers about pictures, or (text-only models) of Python's help texts."""

    perplexity: float
    quiz: QuizScore | None

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {"perplexity": self.perplexity, "quiz": self.quiz.to_json() if self.quiz else None}


@dataclass(frozen=True)
class BuildReport:
    """What a build cost and gained. Bytes of weights; base_bytes: of the base model in bfloat16.

    agreement: with the base, over the passages of the perplexities.
    """

    folder: Path
    recipe: Recipe
    seconds: float
    base_bytes: int
    bytes: int
    sparsity: float
    base_quality: Quality | None
    quality: Quality | None
    agreement: Agreement | None
    smoke_answer: str
    device: str

    def to_json(self) -> dict[str, object]:
        """Plain dictionary: what quality.json holds."""
        return {
            "recipe": self.recipe.name,
            "seconds": round(self.seconds, 1),
            "base_bytes": self.base_bytes,
            "bytes": self.bytes,
            "sparsity": self.sparsity,
            "base_quality": self.base_quality.to_json() if self.base_quality else None,
            "quality": self.quality.to_json() if self.quality else None,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "smoke_answer": self.smoke_answer,
            "device": self.device,
            "versions": checkpoint.versions(),
        }


def build(
    recipe: Recipe,
    out: Path,
    *,
    base: str | None = None,
    device: str | None = None,
    questions: int = 100,
    progress: pipeline.Progress = pipeline.silent,
) -> BuildReport:
    """Compress a recipe's base weights into the finished checkpoint `out`.

    base: other weights for the same recipe (folder or GGUF file). questions: how many pictures base and result are
    asked about; 0 skips the evaluation of both. Raises UsageError, CheckpointError, EngineError; `out` is then untouched, but
    where only the evaluation failed: `out` is finished then, and lacks these figures.
    """
    started = time.monotonic()
    place = gemma.device_of(device)
    data_identity(recipe)  # a missing file is told before gigabytes are downloaded
    files = gemma.locate(recipe.model, base, network=True)
    loaded = gemma.load_base(files, gemma.DTYPES[recipe.model.dtype], place)
    base_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    needed = make_plan(loaded.model, recipe).bytes + OVERHEAD_BYTES
    identity = identity_of(recipe, files)
    work = _Work.of(recipe, identity, loaded, out, place, progress)
    with ExitStack() as opened:
        with staging(out, needed) as folder:
            plan = pipeline.compress(loaded.model, recipe, progress, work.calibration, work.distill)
            sparsity = _write(folder, loaded, recipe, plan, identity)
            del loaded
            with keeping_compiled(folder / checkpoint.COMPILE_CACHE):
                service = opened.enter_context(closing(Service.load(Source(recipe, folder), device)))
                smoke = "".join(
                    service.stream(Request(prompt=SMOKE_PROMPT, max_new_tokens=16, min_new_tokens=1, temperature=0.0))
                )
                quiz = _quiz(service, questions, "evaluate", progress)
            if recipe.compiled:
                with storage_errors(out):
                    save_artifacts(folder / checkpoint.COMPILE_CACHE)
            report = BuildReport(
                folder=out,
                recipe=recipe,
                seconds=time.monotonic() - started,
                base_bytes=2 * base_parameters,
                bytes=checkpoint.weight_bytes(folder),
                sparsity=sparsity,
                base_quality=None,
                quality=None,
                agreement=None,
                smoke_answer=smoke,
                device=_name_of(place),
            )
            checkpoint.seal(folder, checkpoint.read_manifest(folder))
            checkpoint.record_figures(folder, report.to_json())
        work.store.clear()
        if questions:  # the work is safe now, whatever becomes of the comparison
            compared = _compare(service, quiz, str(files.path), device, questions, progress)
            report = replace(compared.added_to(report), seconds=time.monotonic() - started)
            checkpoint.record_figures(out, report.to_json())
    return report


def _write(folder: Path, made: gemma.Base, recipe: Recipe, plan: Plan, identity: dict[str, object]) -> float:
    """Fill and seal the folder, the fastest kernels of this GPU among the rest. Returns the share of zeros in text linears."""
    _refuse_broken_logits(made.model)
    layers = inspection.measure(made.model, plan)
    device = gemma.weights_device(made.model)
    if recipe.engine.kind == "fast" and device.type == "cuda":
        tune(take_weights(made.model, release=False, arrange=arrangement(device)), folder / checkpoint.COMPILE_CACHE)
    checkpoint.write(folder, made.model, made.processing, recipe, layers, identity)
    return inspection.linear_sparsity(layers)


@dataclass(frozen=True)
class _Work:
    """The data a build reads, and the folder that keeps what is finished of it."""

    store: Store
    calibration: CalibrationData | None
    distill: DistillData | None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        identity: dict[str, object],
        base: gemma.Base,
        out: Path,
        device: torch.device,
        progress: pipeline.Progress,
    ) -> _Work:
        """Read the data of a recipe, or let the model write it. identity: see `identity_of`."""
        calibration = recipe.calibration if recipe.needs_calibration else None
        distill, load_teacher = recipe.distill, None
        if distill and distill.teacher != "base":
            files = gemma.locate(distill.teacher, network=True)
            gemma.refuse_other_tokenizer(files, base.processing)
            load_teacher = partial(_load_teacher, files, base.model.dtype, device)
        if not recipe.needs_data:
            return cls(Store(), None, None)
        store = Store(out.parent / f".{out.name}.work", _origin(recipe, identity, device))
        author = Author(base.model, base.processing, store.section("written."), partial(progress, "write calibration text"))

        def drawn(section: Calibration, key: str) -> tuple[Sample, ...]:
            return draw_samples(section, base.processing, key, author.write)

        return cls(
            store,
            CalibrationData(drawn(calibration, "calibration.source"), store) if calibration else None,
            DistillData(drawn(distill.calibration, "distill.data"), store, load_teacher) if distill else None,
        )


def _load_teacher(files: gemma.BaseFiles, dtype: torch.dtype, device: torch.device) -> gemma.GemmaModel:
    return gemma.load_base(files, dtype, device).model


def _origin(recipe: Recipe, identity: dict[str, object], device: torch.device) -> dict[str, object]:
    """All that decides what a stage with data makes of a layer: work done for another origin is worth nothing."""
    made_from = recipe.model_dump(
        mode="json", include={"model", "calibration", "sparsity", "lowrank", "distill", "quantization"}
    )
    return {"recipe": made_from, "base": identity, "versions": checkpoint.versions(), "device": str(device)}


@dataclass(frozen=True)
class _Compared:
    """Both models' quality, and how far one strays from the other."""

    base: Quality
    result: Quality
    agreement: Agreement

    def added_to(self, report: BuildReport) -> BuildReport:
        return replace(report, base_quality=self.base, quality=self.result, agreement=self.agreement)


def _compare(
    service: Service, quiz: QuizScore | None, base: str, device: str | None, questions: int, progress: pipeline.Progress
) -> _Compared:
    """Measure the finished model beside its base: every passage goes through each of them once. quiz: the model's own."""
    with closing(Service.load(Source(dense_recipe(base, device)), device)) as dense:
        base_quiz = _quiz(dense, questions, "evaluate the base", progress)
        found = agreement(dense.ready, service.ready, _passages(service.ready))
    return _Compared(Quality(found.reference_perplexity, base_quiz), Quality(found.perplexity, quiz), found)


def _passages(ready: Ready) -> Iterable[Passage]:
    if ready.processing.processor is None:
        return text_passages(ready, builtin_text(), limit=PERPLEXITY_WINDOWS)
    return answer_passages(ready, PERPLEXITY_PICTURES, QUIZ_SEED)


def _quiz(service: Service, questions: int, title: str, progress: pipeline.Progress) -> QuizScore | None:
    """None for a text-only model, and where nothing is to be asked."""
    if service.ready.processing.processor is None or not questions:
        return None
    return run_quiz(service, questions, QUIZ_SEED, progress=lambda done, total: progress(title, done, total))


@torch.inference_mode()
def _refuse_broken_logits(model: gemma.GemmaModel) -> None:
    """One forward before anything is written: a model that answers NaN is not worth a folder."""
    tokens = torch.arange(2, 18, device=gemma.weights_device(model))[None]
    if not torch.isfinite(model(tokens).logits).all():
        raise WeightsError("the compressed model's logits are not finite: this recipe breaks this model")


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
