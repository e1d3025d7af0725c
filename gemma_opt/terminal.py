"""What the command line shows: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from gemma_opt.build import BuildReport
    from gemma_opt.evaluation.suite import Evaluation

PIPED_COLUMNS = 400  # more than any table has: what is piped is searched, not looked at


@contextmanager
def progress_bar() -> Generator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, one task for each stage it hears of. What stands behind " · " in a stage's title may change."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        bar.start()  # only now: an error before the first step stays one line
        name = stage.partition(" · ")[0]
        if name not in tasks:
            tasks[name] = bar.add_task(stage, total=total)
        bar.update(tasks[name], completed=done, description=stage)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def console() -> Console:
    """stdout, as wide as the screen, or as any table where it is piped."""
    from rich.console import Console

    on_screen = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if on_screen else PIPED_COLUMNS)


def print_json(value: object) -> None:
    """For machines."""
    typer.echo(json.dumps(value, indent=1, default=str))


def figures(metrics: dict[str, int | float | str]) -> str:
    """One line about an answer."""
    first, rate = metrics.get("time_to_first_token"), metrics.get("tokens_per_second")
    parts = [
        f"{metrics['input_token_count']} tokens in, {metrics['output_token_count']} out",
        f"ended by {metrics['finish_reason']}",
    ]
    parts += [f"first token after {float(first):.3f} s"] if first is not None else []
    parts += [f"{float(rate):.1f} tok/s"] if rate is not None else []
    return f"[{'; '.join(parts)}; seed {metrics['seed']}]"


def print_evaluation(found: Evaluation, tasks: dict[str, dict[str, float]]) -> None:
    """What `evaluate` found. tasks: lm-eval's figures by task."""
    if quiz := found.charts:
        kinds = ", ".join(f"{kind} {rate:.0%}" for kind, rate in quiz.by_kind.items())
        typer.echo(f"charts: {quiz.accuracy:.1%} of {quiz.questions} exact (chance {quiz.chance:.1%}): {kinds}")
    for name, perplexity in found.perplexity.items():
        typer.echo(f"{name}: perplexity {perplexity:.3f}")
    for name, agreement in found.agreement.items():
        typer.echo(
            f"{name}: {agreement.ratio:.4f} × the reference's perplexity {agreement.reference_perplexity:.3f}, "
            f"KL {agreement.kl:.5f} nats/token, top-1 agreement {agreement.top1:.2%} of {agreement.tokens:,} tokens"
        )
    if greedy := found.greedy:
        typer.echo(
            f"greedy replies to {greedy.prompts} prompts: {greedy.tokens:.1f} tokens equal before the first difference "
            f"({greedy.share:.1%} of the reference's), {greedy.identical:.1%} identical"
        )
    for task, metrics in tasks.items():
        typer.echo(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def print_build(report: BuildReport) -> None:
    """What a build cost and gained."""
    from rich.table import Table

    table = Table(title=f"{report.recipe.name} → {report.folder}", title_justify="left")
    for heading in ("", "base (bf16)", "compressed"):
        table.add_column(heading)
    table.add_row("weights", f"{report.base_bytes / 1e6:,.2f} MB", f"{report.bytes / 1e6:,.2f} MB")
    table.add_row("zeros in text linears", "", f"{report.sparsity:.2%}")
    if report.base_quality and report.quality:
        table.add_row("perplexity", f"{report.base_quality.perplexity:.4f}", f"{report.quality.perplexity:.4f}")
    if found := report.agreement:
        table.add_row("KL to the base, nats/token", "", f"{found.kl:.5f}")
        table.add_row("top-1 agreement with the base", "", f"{found.top1:.2%} of {found.tokens:,} tokens")
    if report.base_quality and report.quality and report.base_quality.quiz and report.quality.quiz:
        title = f"chart answers ({report.quality.quiz.questions})"
        table.add_row(title, f"{report.base_quality.quiz.accuracy:.1%}", f"{report.quality.quiz.accuracy:.1%}")
    console().print(table)
    typer.echo(
        f"built in {report.seconds:.0f} s; try: python -m gemma_opt predict {report.folder} -i prompt=… -i image=@picture.png",
        err=True,
    )
