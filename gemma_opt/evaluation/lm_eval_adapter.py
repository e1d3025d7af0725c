"""A loaded compressed model as a language model of lm-eval (EleutherAI's harness), for mmlu, chartqa and the like.

The harness's own Hugging Face class is not used on purpose: it calls `tie_weights()` on the model it is given, which makes
the head of a quantized or untied model the embedding's again without a word. Here the model is only asked, never changed.

Text requests are raw continuations after one `<bos>`, as published mmlu figures are measured. Requests with pictures go
through the service's own encoder and chat template, each `<image>` mark of the task replaced by its picture.
Needs the extra `lm-eval`. Task files and data sets are downloaded by the harness, unless they lie in `include_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image

from gemma_opt.engine.interface import LIMITS, SamplingParams
from gemma_opt.errors import UsageError
from gemma_opt.gemma import weights_device
from gemma_opt.prompt import EncodedPrompt, Part, Turn
from gemma_opt.service import Reply, Service
from gemma_opt.text import TextStream

try:
    from lm_eval import simple_evaluate, utils  # pyright: ignore[reportMissingImports] an extra
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
except ImportError:
    raise UsageError("lm-eval is not installed: pip install '.[lm-eval]' in the repository's folder") from None

IMAGE_MARK = "<image>"  # the harness's own placeholder in task texts
DEFAULT_NEW_TOKENS = 256  # the harness's default

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context tokens, continuation tokens


class GenerationOptions(TypedDict, total=False):
    """What tasks may ask of a generation; other keys are refused."""

    until: str | list[str]
    max_gen_toks: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int


class Tasks:
    """lm-eval tasks and groups by name. include_path: a folder with further task files. Raises UsageError for unknown ones."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        self._names = list(names)
        self._manager = _manager(names, include_path)

    def run(self, service: Service, *, limit: int | None = None) -> dict[str, dict[str, float]]:
        """Task or group → metric → value. limit: at most so many documents of every task.

        Raises UsageError where data cannot be downloaded, and for picture tasks on a text-only model.
        """
        try:
            results = simple_evaluate(
                CompressedLM(service),
                tasks=self._names,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        except ConnectionError as error:
            raise UsageError(f"the tasks' data could not be downloaded: {error}") from None
        return {
            task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
            for task, metrics in results["results"].items()
        }


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """The index in which all tasks are found: the given folder alone, or (a minute to read) with the harness's own tasks."""
    folder = str(include_path) if include_path else None
    unknown = list(tasks)
    for manager in (TaskManager(include_path=folder, include_defaults=defaults) for defaults in (False, True)):
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UsageError(f"lm-eval knows no task {', '.join(unknown)}; its list: lm-eval ls tasks")


class CompressedLM(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """One service for lm-eval: log likelihoods by the model's forward, replies by the service's engine."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self.model = service.ready.model
        self.tokenizer = service.ready.processing.tokenizer
        self.max_length = service.ready.context
        self._device = weights_device(self.model)
        self.MULTIMODAL = service.ready.processing.processor is not None

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.get_vocab()["<eos>"]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: `<bos>`."""
        return self.tokenizer.get_vocab()["<bos>"]

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's request caches."""
        return self.service.ready.recipe.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Tokens of a text: after exactly one `<bos>`, or without any if special tokens are switched off."""
        ids = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        if add_special_tokens is False or ids[:1] == [self.prefix_token_id]:
            return ids
        return [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log probability (nats) of every continuation, and whether greedy decoding would give it. Texts only."""
        if any(len(request.args) > 2 for request in requests):
            raise UsageError("lm-eval tasks that choose among answers to a picture are not supported: use one that generates")
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows of the context's length, every token predicted once."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, cut before the first stop string."""
        replies: list[str] = []
        for request in requests:
            context, options, *rest = request.args
            sampling = _sampling(options)
            prompt = self._encode(context, rest[0].get("visual", []) if rest else [], sampling.max_new_tokens)
            generation = self.service.generate(prompt, sampling)
            replies.append("".join(Reply(generation, TextStream(self.tokenizer, sampling.stop_sequences), prompt, 0)))
            self.cache_hook.add_partial("generate_until", (context, options), replies[-1])
        return replies

    def _encode(self, context: str, pictures: Sequence[Image.Image], room: int) -> EncodedPrompt:
        """A picture request as a user's turn; a text as it is, its beginning dropped where it does not leave room to reply."""
        if not pictures:
            ids = self.tok_encode(context)
            most = max(1, self.max_length - room)
            return EncodedPrompt(tuple(ids if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]), (), 0)
        texts = context.split(IMAGE_MARK)
        if len(texts) == 1:
            texts = ["", *texts]
        if len(texts) != len(pictures) + 1:
            raise UsageError(f"the task sends {len(pictures)} pictures for {len(texts) - 1} places in its text")
        parts: list[Part] = [texts[0]]
        for picture, text in zip(pictures, texts[1:], strict=True):
            parts += [picture.convert("RGB"), text]
        return self.service.encode((Turn("user", tuple(part for part in parts if part != "")),))

    def _rolling(self, text: str) -> float:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
        return sum(score for score, _ in self._loglikelihood_tokens(pairs))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """One forward for neighbours with the same input: the answers to one multiple-choice question, one token each."""
        answers: list[tuple[float, bool]] = []
        for given, group in groupby(requests, key=lambda request: [*request[1], *request[2][:-1]][-self.max_length :]):
            members = list(group)
            longest = max(len(continuation) for _, _, continuation in members)
            if longest > len(given):
                raise UsageError(f"lm-eval asks for a continuation of {longest} tokens, the context holds {self.max_length}")
            ids = torch.tensor([given], device=self._device)
            chances = torch.log_softmax(self.model(ids, logits_to_keep=longest).logits[0].float(), dim=-1)
            for texts, _, continuation in members:
                rows, targets = chances[-len(continuation) :], torch.tensor(continuation, device=self._device)
                score = float(rows.gather(1, targets[:, None]).sum())
                answers.append((score, bool((rows.argmax(-1) == targets).all())))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers


def _sampling(options: GenerationOptions) -> SamplingParams:
    """A task's generation options as sampling parameters. Greedy unless it samples. Raises UsageError."""
    unknown = sorted(options.keys() - GenerationOptions.__annotations__.keys())
    if unknown:
        raise UsageError(f"lm-eval asks for generation options that are not supported: {', '.join(unknown)}")
    until = options.get("until") or []
    return SamplingParams(
        max_new_tokens=min(options.get("max_gen_toks", DEFAULT_NEW_TOKENS), int(LIMITS["max_new_tokens"].high)),
        temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
        top_p=options.get("top_p", 1.0),
        top_k=options.get("top_k", 0),
        stop_sequences=tuple([until] if isinstance(until, str) else until),
    )
