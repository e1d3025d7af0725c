"""The command line: `python -m gemma_opt VERB`. Results on stdout, progress and figures on stderr.

Exit code 0 done, 1 failed, 2 wrong usage (an unknown option, a recipe or request that cannot be served). Every error of
this package is one line that starts with its code. Verbs import what they need: `--help` starts without torch.
"""

from __future__ import annotations

import errno
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma_opt import logs
from gemma_opt.errors import GemmaOptError, InputError, StorageError, UsageError
from gemma_opt.terminal import console, figures, print_build, print_evaluation, print_json, progress_bar

if TYPE_CHECKING:
    from gemma_opt.evaluation.lm_eval_adapter import Tasks
    from gemma_opt.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Gemma 3, compressed once and served fast."
)

DEFAULT_MODEL = "small-int8"
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
MODEL_HELP = "Finished checkpoint, base model folder, .gguf file, recipe file or packaged recipe's name."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; the default is CUDA where there is one.")]


@app.command()
def compress(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or a packaged recipe's name.")],
    base: Annotated[str | None, typer.Option(help="Other base weights: a folder or a .gguf file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Target folder.", show_default="weights_cache/<recipe name>")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in sparsity.0.ratio=0.3.")
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="Questions to evaluate base and result with; 0 skips it.")] = 100,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished checkpoint.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compress a base model into a finished checkpoint. The only verb that downloads (hub ids; token: HF_TOKEN).

    A build that calibrates keeps every finished layer beside the target: started again after an interruption, it goes on.
    """
    from gemma_opt import checkpoint, loading
    from gemma_opt.build import build
    from gemma_opt.recipe import Recipe

    chosen = Recipe.load(recipe, tuple(overrides or ()))
    target = (out or loading.default_folder(chosen)).resolve()
    if checkpoint.is_finished(target):
        if not force and (other := _unlike(target, chosen, base)):
            raise UsageError(
                f"{target} was not built from the same {' and '.join(other)}: choose another --out, or replace it with --force"
            )
        if not force:
            typer.echo(f"{target} is already built from this recipe (--force builds it again)", err=True)
            if as_json:
                print_json(checkpoint.read_manifest(target).measured)
            return
    elif target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} is no checkpoint, and only checkpoints are replaced: choose another --out")
    with progress_bar() as show:
        report = build(chosen, target, base=base, device=device, questions=questions, progress=show)
    if as_json:
        print_json(report.to_json())
    else:
        print_build(report)


def _unlike(folder: Path, recipe: Recipe, base: str | None) -> list[str]:
    """What of a finished checkpoint is not as `recipe` has it."""
    from gemma_opt import checkpoint
    from gemma_opt.identity import differences

    stored = checkpoint.read_recipe(folder)
    sections = [f"{name} section" for name in ("engine", "compile") if getattr(stored, name) != getattr(recipe, name)]
    return differences(checkpoint.read_manifest(folder), recipe, base) + sections


@app.command()
def predict(
    model: Model = DEFAULT_MODEL,
    inputs: Annotated[
        list[str] | None,
        typer.Option("-i", "--input", metavar="NAME=VALUE", help="prompt=…, image=@file.jpg, temperature=0, …"),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer one request, streamed to the terminal. The same inputs as the Cog predictor; @ reads a local file."""
    from gemma_opt.loading import resolve
    from gemma_opt.request_inputs import read_inputs
    from gemma_opt.service import Service

    request = read_inputs(inputs or [])
    request.sampling()  # wrong numbers are refused before the model is loaded
    service = Service.load(resolve(model, device), device, only_serve=True)
    try:
        reply = service.stream(request)
        text: list[str] = []
        for delta in reply:
            text.append(delta)
            if not as_json:
                typer.echo(delta, nl=False)
    finally:
        service.close()
    if as_json:
        print_json({"output": "".join(text), "metrics": reply.metrics})
        return
    typer.echo()
    typer.echo(figures(reply.metrics), err=True)


@app.command()
def inspect(model: Model = DEFAULT_MODEL, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Show a model layer by layer: role, shape, format, sparsity, scales, bytes."""
    from gemma_opt.inspection import layer_table, measure, to_json
    from gemma_opt.loading import open_model, resolve

    ready = open_model(resolve(model, device), device)
    layers = measure(ready.model, ready.plan)
    if as_json:
        print_json(to_json(layers))
        return
    screen = console()
    screen.print(layer_table(ready.recipe.name, layers, screen.width))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or a packaged recipe's name.")],
    model: Annotated[
        str | None, typer.Option(help="gemma-3-270m, -1b, -4b, -12b, -27b, or a model's folder; by default the recipe's base.")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="l40s, h100, 4090, …; repeatable; by default all known.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens a slot holds; by default the recipe's.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests at once; by default the recipe's.")] = None,
    position: Annotated[int, typer.Option(min=0, help="Tokens in a slot for which speeds are given.")] = 512,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in quantization.default=int8.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory and bandwidth-bound speed of a recipe before anything is built or downloaded."""
    from gemma_opt import sizing
    from gemma_opt.recipe import Recipe

    gpus = sizing.find_gpus(gpu or [])
    sized = sizing.size_up(Recipe.load(recipe, tuple(overrides or ())), model, context=context, slots=slots, position=position)
    if as_json:
        print_json(sized.to_json(gpus))
        return
    console().print(sizing.memory_table(sized))
    console().print(sizing.speed_table(sized, gpus))


@app.command()
def evaluate(
    model: Model = DEFAULT_MODEL,
    charts: Annotated[int, typer.Option(min=0, help="One-word questions about unseen pictures.")] = 0,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 1,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="Show white pictures instead: what is left is guessing.")
    ] = False,
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Text file: its perplexity. Repeatable.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a perplexity window, <bos> included.")] = 512,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also measure how far MODEL strays from this one (KL, top-1, greedy).")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Greedy replies to compare with the reference's, from each text and about pictures.")
    ] = 8,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="lm-eval tasks, as mmlu,chartqa (extra lm-eval; downloads them).")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder with lm-eval task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents of each lm-eval task.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a model can do: pictures (--charts), perplexity (--text), agreement (--reference), lm-eval (--tasks)."""
    from gemma_opt.evaluation.suite import Measures
    from gemma_opt.evaluation.suite import evaluate as measure
    from gemma_opt.loading import resolve
    from gemma_opt.service import Service

    if not charts and not text and not tasks and not reference:
        raise UsageError("nothing to measure: give --charts N, --text FILE, --reference MODEL or --tasks NAMES")
    chosen = _find_tasks(tasks, include_path) if tasks else None  # what is missing is said before anything is measured
    measures = Measures(_read_texts(text or []), window, None, charts, seed, blank_images, prompts)
    with ExitStack() as opened:
        service = opened.enter_context(closing(Service.load(resolve(model, device), device)))
        compared = opened.enter_context(closing(Service.load(resolve(reference, device), device))) if reference else None
        show = opened.enter_context(progress_bar())
        found = measure(service, compared, measures, show)
        scores = chosen.run(service, limit=limit) if chosen else {}
    if as_json:
        print_json({"model": model, "reference": reference, **found.to_json(), "tasks": scores})
    else:
        print_evaluation(found, scores)


@app.command()
def report(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE…", help="Recipe files or packaged recipes' names.")],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the page, the plot, the tables and built checkpoints.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base weights for all: a folder or a .gguf file; else the recipes' own.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Text file to measure perplexity on. Repeatable.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a perplexity window, <bos> included.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows of each text.")] = None,
    charts: Annotated[int, typer.Option(min=0, help="Questions about unseen pictures (models that see).")] = 0,
    prompts: Annotated[int, typer.Option(min=0, help="Greedy replies compared, from each text and about pictures.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the decode speed test.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens decoded in a round.")] = 64,
    device: Device = None,
) -> None:
    """Compare recipes in one run: quality, size, speed. Writes report.html, frontier.png, report.md, report.json."""
    from gemma_opt.evaluation.suite import Measures
    from gemma_opt.recipe import Recipe
    from gemma_opt.report.measure import SpeedTest, compare
    from gemma_opt.report.page import refuse_missing, write

    refuse_missing()
    chosen = [Recipe.load(recipe) for recipe in recipes]
    measures = Measures(_read_texts(text or []), window, windows, charts, prompts=prompts)
    with progress_bar() as show:
        found = compare(
            chosen, base, out / "checkpoints", measures, SpeedTest(new_tokens=new_tokens, rounds=rounds), device, show
        )
    for path in write(found, out):
        typer.echo(path)


@app.command()
def bench(
    model: Model = DEFAULT_MODEL,
    requests: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once; repeatable. By default 1 and 8.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed with several requests at once: tokens a second, together and each, and time to first token."""
    from gemma_opt.loading import resolve
    from gemma_opt.service import Service
    from gemma_opt.throughput import measure, refuse_clipped, table, unlike_prompts

    counts, source = requests or [1, 8], resolve(model, device)
    refuse_clipped(source.recipe.engine.context, prompt_tokens, new_tokens)
    with closing(Service.load(source, device, slots=max(counts), only_serve=True)) as service:
        prompts = unlike_prompts(service, max(counts), prompt_tokens)
        rounds = [measure(service, prompts[:count], new_tokens) for count in counts]
    if as_json:
        print_json({"model": model, "rounds": [one.to_json() for one in rounds]})
        return
    console().print(table(model, rounds))


@app.command("export")
def export_(
    model: Model,
    out: Annotated[Path, typer.Option(file_okay=False, help="New folder.")],
    form: Annotated[
        Literal["transformers", "compressed-tensors", "executorch"],
        typer.Option(
            "--format",
            help="Every weight as floats; text linears as they are quantized, for vLLM too; or a .pte program of text.",
        ),
    ] = "transformers",
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="Of all floats.", show_default="the recipe's")
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to the hub (token: HF_TOKEN).")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write a folder for plain transformers, vLLM or ExecuTorch. With --push the only verb that uploads."""
    from gemma_opt import export
    from gemma_opt.loading import resolve

    target = export.ExportFormat(form)
    export.refuse(target, out, dtype)
    if push:
        export.refuse_name(push)
    made = export.export(resolve(model, device), out, target, dtype, device)
    commit = export.push(made.folder, push, public=public) if push else None
    if as_json:
        print_json({"folder": str(made.folder), "bytes": made.bytes, "commit": commit})
        return
    typer.echo(commit or made.folder)
    typer.echo(f"{made.bytes / 1e6:,.1f} MB, {form}", err=True)


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 opens it to the network; put something in front (README, Limits).")
    ] = "127.0.0.1",
    predictor: Annotated[str, typer.Option(metavar="FILE:CLASS")] = "predict.py:Predictor",
) -> None:
    """Run the Cog HTTP server without Docker, for GEMMA_OPT_MODEL or GEMMA_OPT_RECIPE."""
    from gemma_opt.serving import exec_server

    exec_server(host, port, predictor)


def main() -> None:
    """Run the command line and turn this package's errors into one line and an exit code."""
    try:
        logs.set_up("warning")
        app()
    except GemmaOptError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError | UsageError) else 1)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        sys.stdout = None
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:  # of a file by name, or not of writing: a defect
            raise
        sys.stdout = None  # Python would try once more at the end
        typer.echo(f"error: {StorageError(f'the output cannot be written: {error.strerror}')}", err=True)
        sys.exit(1)


def _read_texts(paths: list[Path]) -> dict[str, str]:
    """File name → content. Raises UsageError if two files share a name, or one is not UTF-8."""
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"texts are reported by their file names, and {', '.join(twice)} is given more than once: rename one")
    texts: dict[str, str] = {}
    broken: list[str] = []
    for path in paths:
        try:
            texts[path.name] = path.read_text("utf-8")
        except UnicodeDecodeError:
            broken.append(str(path))
    if broken:
        raise UsageError(f"not UTF-8 text: {', '.join(broken)}")
    return texts


def _find_tasks(names: str, include_path: Path | None) -> Tasks:
    """lm-eval tasks by their names, between commas. Raises UsageError for unknown ones, or without the extra."""
    from gemma_opt.evaluation.lm_eval_adapter import Tasks

    return Tasks(names.split(","), include_path)
