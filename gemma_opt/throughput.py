"""How fast a service answers several requests at once: total and per-request speed, time to first token.

Measured at the engine, below text and HTTP: every request is submitted at the same moment, greedy, with a prompt of its own
(so that none begins like another) and exactly the same number of new tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from gemma_opt.engine.interface import SamplingParams
from gemma_opt.errors import UsageError
from gemma_opt.evaluation.perplexity import builtin_text
from gemma_opt.prompt import EncodedPrompt
from gemma_opt.service import Service

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Throughput:
    """One round. Tokens a second: all requests together, by wall clock from the first submit to the last token; and the
    median request's own, after its first token. time_to_first_token_s: percentile → seconds, waiting included.

    total_tokens_per_cpu_second: by the processor time of all threads, which other work on the machine hardly changes.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    total_tokens_per_second: float
    total_tokens_per_cpu_second: float
    request_tokens_per_second: float
    time_to_first_token_s: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return asdict(self)


def unlike_prompts(service: Service, count: int, tokens: int) -> list[EncodedPrompt]:
    """`count` prompts of exactly `tokens` tokens, each from another place of Python's help texts."""
    tokenizer = service.ready.processing.tokenizer
    ids: list[int] = tokenizer.encode(builtin_text(), add_special_tokens=False, verbose=False)
    begin = tokenizer.get_vocab()["<bos>"]
    if count * tokens > len(ids):
        raise UsageError(f"{count} prompts of {tokens} tokens are more text than there is: {len(ids):,} tokens")
    return [EncodedPrompt((begin, *ids[n * tokens : (n + 1) * tokens - 1]), (), 0) for n in range(count)]


def measure(service: Service, prompts: Sequence[EncodedPrompt], new_tokens: int) -> Throughput:
    """Answer all prompts at once. Raises QueueFull where they are more than slots and queue hold.

    Raises UsageError where prompt and answer are more than a slot holds: the engine would end the answer early.
    """
    refuse_clipped(service.ready.context, max(len(prompt.token_ids) for prompt in prompts), new_tokens)
    sampling = SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens, temperature=0)
    started, cpu_started = time.monotonic(), time.process_time()
    running = [service.generate(prompt, sampling) for prompt in prompts]
    produced = sum(len(list(generation)) for generation in running)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    ends = [generation.finished for generation in running]
    return Throughput(
        requests=len(prompts),
        prompt_tokens=len(prompts[0].token_ids),
        new_tokens=new_tokens,
        total_tokens_per_second=produced / seconds,
        total_tokens_per_cpu_second=produced / cpu_seconds,
        request_tokens_per_second=statistics.median(end.tokens_per_second or 0.0 for end in ends),
        time_to_first_token_s=percentiles([end.time_to_first_token_s or 0.0 for end in ends]),
    )


def refuse_clipped(context: int, prompt_tokens: int, new_tokens: int) -> None:
    """Raises UsageError where an answer of exactly `new_tokens` does not fit behind the prompt."""
    if prompt_tokens + new_tokens > context:
        raise UsageError(
            f"{prompt_tokens:,} tokens in and {new_tokens:,} out are {prompt_tokens + new_tokens:,}, "
            f"and a slot of this model holds {context:,}"
        )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99: the smallest value that so many percent of all values do not exceed."""
    ordered = sorted(values)
    return {f"p{percent}": ordered[max(0, -(-percent * len(ordered) // 100) - 1)] for percent in PERCENTILES}


def table(title: str, rounds: Sequence[Throughput]) -> Table:
    """Rounds for people."""
    shown = Table(title=f"{title}: {rounds[0].prompt_tokens} tokens in, {rounds[0].new_tokens} out", title_justify="left")
    for heading in (
        "requests",
        "tok/s together",
        "tok/s each",
        *(f"first token {name}" for name in rounds[0].time_to_first_token_s),
    ):
        shown.add_column(heading, justify="right")
    for one in rounds:
        speeds = f"{one.total_tokens_per_second:,.1f}", f"{one.request_tokens_per_second:,.1f}"
        shown.add_row(str(one.requests), *speeds, *(f"{seconds:.3f} s" for seconds in one.time_to_first_token_s.values()))
    return shown
