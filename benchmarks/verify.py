"""Is this model, on this machine, right and fast? `python -m benchmarks.verify MODEL --base google/gemma-3-4b-it`.

What a user with the real weights runs once. Three questions, one JSON:

- engine: the engine's logits, prefill and decode, and its greedy tokens against transformers' forward on the same weights;
- quality: perplexity, KL divergence, top-1 and greedy agreement with the base model, answers to picture questions;
- speed and memory: one request, eight requests, peak bytes.

Nothing is downloaded: a hub id must be in the local cache at the recipe's revision. Exit code 1 if the engine strays from
transformers by more than `--tolerance` logits where it chose another token.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.environment import RESULTS, describe
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import Prefill, Recorder, prefill_of
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.kernels import arrangement
from gemma_opt.engine.pictures import picture_encoder
from gemma_opt.engine.runner import picture_spans
from gemma_opt.engine.scheduler import chunk_ends
from gemma_opt.engine.weights import take_weights
from gemma_opt.evaluation.agreement import chart_prompts, kl_divergence, text_prompts
from gemma_opt.evaluation.perplexity import Passage, builtin_text, prediction_logits
from gemma_opt.evaluation.suite import Measures, evaluate
from gemma_opt.gemma import stop_token_ids, weights_device
from gemma_opt.loading import Ready, Source, dense_recipe, resolve
from gemma_opt.prompt import EncodedPrompt
from gemma_opt.recipe import BaseModelSection, EngineSection
from gemma_opt.service import Service
from gemma_opt.throughput import measure, unlike_prompts

TOLERANCE = 0.05  # of the contract: below this the two best tokens count as equally good
AT_ONCE = 8
SEED = 1


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Finished checkpoint, folder, .gguf file or recipe.")],
    base: Annotated[str, typer.Option(help="The uncompressed model: folder, .gguf file or the recipe's own hub id.")],
    out: Annotated[Path, typer.Option(help="Result.")] = RESULTS / "verify.json",
    tokens: Annotated[int, typer.Option(min=2, help="Greedy tokens of each reply.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of text, and as many pictures.")] = 4,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens for perplexity.")] = 8,
    charts: Annotated[int, typer.Option(min=0, help="Picture questions; 0 for text-only models.")] = 50,
    tolerance: Annotated[float, typer.Option(help="Logits by which a chosen token may be second best.")] = TOLERANCE,
) -> None:
    """Verify one model and write what was found."""
    source = resolve(model)
    texts = {"python help": builtin_text()}
    with closing(Service.load(source, slots=AT_ONCE)) as service:
        chosen = [*text_prompts(service.ready, builtin_text(), prompts), *chart_prompts(service, prompts, SEED)]
        engine = check_engine(service, chosen, tokens)
        unlike = unlike_prompts(service, AT_ONCE, 64)
        speed = [measure(service, unlike[:count], tokens).to_json() for count in (1, AT_ONCE)]
        memory = peak_memory()
        with closing(Service.load(base_source(base, source))) as reference:
            sees = reference.ready.processing.processor is not None
            measures = Measures(texts, windows=windows, charts=charts if sees else 0, seed=SEED, prompts=prompts)
            quality = evaluate(service, reference, measures, lambda *_: None)
            base_charts = evaluate(reference, None, Measures(charts=measures.charts, seed=SEED), lambda *_: None).charts
    result = {
        "model": model,
        "base": base,
        "recipe": source.recipe.model_dump(mode="json"),
        "environment": describe(),
        "engine": engine.to_json(tolerance),
        "quality": quality.to_json(),
        "base_charts": base_charts.to_json() if base_charts else None,
        "speed": speed,
        "memory": memory,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    typer.echo(json.dumps({"engine": result["engine"], "written": str(out)}, indent=1))
    raise typer.Exit(0 if engine.worst_choice <= tolerance else 1)


def base_source(base: str, source: Source) -> Source:
    """The uncompressed model. The recipe's own base keeps the revision that the recipe names."""
    recipe = dense_recipe(base)
    own = source.recipe.model
    if base == own.base:
        section = BaseModelSection(base=own.base, revision=own.revision, dtype=recipe.model.dtype)
        recipe = recipe.model_copy(update={"model": section})
    return Source(recipe)


@dataclass(frozen=True)
class EngineCheck:
    """The engine beside transformers on the same weights, over all prompts and reply tokens.

    worst_choice: how many logits the token that the engine chose lay behind transformers' best, at worst.
    """

    prompts: int
    tokens: int
    equal_choices: int
    worst_choice: float
    mean_kl: float
    largest_logit_difference: float

    def to_json(self, tolerance: float) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {**vars(self), "tolerance": tolerance, "passed": self.worst_choice <= tolerance}


@torch.inference_mode()
def check_engine(service: Service, prompts: Sequence[EncodedPrompt], tokens: int) -> EngineCheck:
    """Let the engine answer, and look at every token and every logit with transformers' eyes."""
    ready = service.ready
    weights = take_weights(ready.model, release=False, arrange=arrangement(weights_device(ready.model)))
    longest = max(len(prompt.token_ids) for prompt in prompts) + tokens
    model = TextModel(weights, KvCache(weights, slots=1, context=longest))
    read = prefill_of(model, EngineSection().prefill_chunk, Recorder(weights.device))
    sampling = SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens, temperature=0)
    behind: list[float] = []
    divergences: list[float] = []
    largest = 0.0
    for prompt in prompts:
        reply = list(service.generate(prompt, sampling))
        passage = Passage([*prompt.token_ids, *reply], len(reply), prompt.images)
        theirs = prediction_logits(ready, passage).float()
        ours = engine_logits(model, read, ready, prompt, reply)
        largest = max(largest, float((ours - theirs).abs().max()))
        divergences += kl_divergence(theirs, ours).tolist()
        best, picked = without_stops(theirs, ready), torch.tensor(reply, device=theirs.device)[:, None]
        behind += (best.amax(-1, keepdim=True) - best.gather(1, picked))[:, 0].tolist()
    return EngineCheck(
        prompts=len(prompts),
        tokens=len(behind),
        equal_choices=sum(gap == 0 for gap in behind),
        worst_choice=max(behind),
        mean_kl=sum(divergences) / len(divergences),
        largest_logit_difference=largest,
    )


def engine_logits(model: TextModel, read: Prefill, ready: Ready, prompt: EncodedPrompt, reply: Sequence[int]) -> Tensor:
    """The forward's own logits [reply, vocabulary]: the first from prefill, the others decoded after the reply's tokens."""
    device, start = model.weights.device, len(prompt.token_ids)
    image_token_id = getattr(ready.model.config, "image_token_id", None)
    spans = picture_spans(prompt.token_ids, image_token_id)
    embeddings = model.embed(torch.tensor([0 if one == image_token_id else one for one in prompt.token_ids], device=device))
    for (begin, end), pixels in zip(spans, prompt.images, strict=True):
        embeddings[begin:end] = picture_encoder(ready.model)(pixels)
    logits = [
        read(0, embeddings[begin:end], begin, spans).clone()
        for begin, end in pairwise((0, *chunk_ends(start, spans, EngineSection().prefill_chunk)))
    ]
    rows = logits[-1:]
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    rows += [model.decode(slot + token, slot, slot + start + ahead)[0] for ahead, token in enumerate(reply[:-1])]
    return torch.stack(rows)


def without_stops(logits: Tensor, ready: Ready) -> Tensor:
    """The replies were asked to have full length: no stop token could be chosen."""
    return logits.index_fill(1, torch.tensor(sorted(stop_token_ids(ready.model)), device=logits.device), -torch.inf)


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: allocated on the GPU where there is one, and this process's memory."""
    found = {"resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found |= {"gpu_allocated_bytes": torch.cuda.max_memory_allocated()}
    return found


if __name__ == "__main__":
    typer.run(main)
