"""The command line as a user meets it: a process of its own, exit codes, one line for every error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import BUNDLED, EXAMPLE
from safetensors.torch import load_file, save_file

from gemma_opt import cli
from gemma_opt.gemma import text_layers
from gemma_opt.loading import Source
from gemma_opt.recipe import Recipe
from gemma_opt.service import Service

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_opt", *arguments]
    variables = os.environ | {"COLUMNS": "160"} | environment
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=600, check=False)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    result = run(
        "compress", "small-int8-pruned", "--out", str(out), "--questions", "18", "--set", "sparsity.0.ratio=0.3", "--json"
    )
    report = json.loads(result.stdout)
    sizes = [65_536, 32_768, 32_768, 65_536, 196_608, 196_608, 196_608]  # the linears of one text layer
    assert report["sparsity"] >= sum(round(size * 0.3) for size in sizes) / sum(sizes)  # int8 rounds more to zero
    assert report["bytes"] < 0.6 * report["base_bytes"]
    assert report["base_quality"]["quiz"]["questions"] == 18
    assert report["quality"]["perplexity"] > 1
    agreement = report["agreement"]
    assert 0 < agreement["kl"] < 1
    assert 0.5 < agreement["top1"] <= 1
    assert agreement["tokens"] > 100
    assert agreement["perplexity"] == report["quality"]["perplexity"]
    return out


def test_compress_writes_a_finished_folder_with_its_figures(built: Path) -> None:
    quality = json.loads((built / "quality.json").read_text())
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["measured"] == quality
    assert list(built.parent.iterdir()) == [built]


def test_compress_again_does_nothing(built: Path) -> None:
    before = (built / "manifest.json").stat().st_mtime_ns
    result = run("compress", "small-int8-pruned", "--out", str(built), "--set", "sparsity.0.ratio=0.3")
    assert "already built" in result.stderr
    assert (built / "manifest.json").stat().st_mtime_ns == before


def test_compress_of_what_is_built_prints_its_figures_as_json(built: Path) -> None:
    result = run("compress", "small-int8-pruned", "--out", str(built), "--set", "sparsity.0.ratio=0.3", "--json")
    assert json.loads(result.stdout) == json.loads((built / "quality.json").read_text())


def test_compress_says_which_section_is_not_as_built(built: Path) -> None:
    """Engine settings are not in the digest: a larger context was asked for, and "already built" was the answer."""
    same = ("compress", "small-int8-pruned", "--out", str(built), "--set", "sparsity.0.ratio=0.3")
    assert "engine section" in run(*same, "--set", "engine.slots=4", code=2).stderr


@pytest.mark.parametrize("kind", ["folder", "file", "base model"])
def test_force_replaces_checkpoints_and_nothing_else(tmp_path: Path, kind: str) -> None:
    """It once replaced whatever folder --out named."""
    place = tmp_path / "precious"
    if kind == "file":
        place.write_text("thesis")
    elif kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("thesis")
    else:
        shutil.copytree(BUNDLED, place)
    before = sorted(tmp_path.rglob("*"))
    assert "no checkpoint" in run("compress", "small-int8", "--out", str(place), "--force", code=2).stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_compress_asks_for_the_base_weights_too(built: Path, tmp_path: Path) -> None:
    """It once said "already built" of a checkpoint of other weights, where only the recipe was the same."""
    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other)
    same = ("compress", "small-int8-pruned", "--out", str(built), "--set", "sparsity.0.ratio=0.3", "--base", str(other))
    assert "already built" in run(*same).stderr  # the same bytes under another name
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = run(*same, code=2)
    assert result.stderr.startswith("error: E2000 ")
    assert "not built from the same base weights" in result.stderr


def test_compress_does_not_overwrite_another_folder(built: Path) -> None:
    result = run("compress", "small-bf16", "--out", str(built), code=2)
    assert result.stderr.startswith("error: E2000 ")
    assert "--force" in result.stderr


def test_predict_streams_an_answer_and_its_figures(built: Path) -> None:
    result = run("predict", str(built), "-i", "prompt=Describe the picture.", "-i", f"image=@{EXAMPLE}", "-i", "temperature=0")
    assert result.stdout.strip().endswith(".")
    assert "tok/s" in result.stderr
    assert "ended by stop" in result.stderr


def test_predict_frees_the_layers_that_only_evaluation_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The story: the largest model that fits a card when served did not fit it in `predict`."""
    loaded: list[Service] = []
    load = Service.load

    def watched(source: Source, device: str | None, *, only_serve: bool = False) -> Service:
        loaded.append(load(source, device, only_serve=only_serve))
        return loaded[-1]

    monkeypatch.setattr(Service, "load", watched)
    cli.predict("small-int8", ["prompt=Hello", "max_new_tokens=1"], "cpu")
    assert not any(list(layer.children()) for layer in text_layers(loaded[0].ready.model).values())


def test_predict_as_json(built: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "Hello"}])
    answer = json.loads(run("predict", str(built), "-i", f"messages={messages}", "-i", "seed=7", "--json").stdout)
    assert answer["metrics"]["seed"] == 7
    assert answer["output"]


def test_inspect_shows_every_layer(built: Path) -> None:
    layers = json.loads(run("inspect", str(built), "--json").stdout)
    rows = {row["name"]: row for row in layers["layers"]}
    assert rows["model.language_model.layers.0.mlp.up_proj"]["format"] == "int8"
    assert rows["lm_head"]["format"] == "tied"
    assert layers["totals"]["bytes"] == sum(row["bytes"] for row in layers["layers"])
    table = run("inspect", str(built)).stdout
    assert "model.language_model.layers.3.mlp.down_proj" in table
    assert "int8" in table
    assert f"{layers['totals']['bytes']:,} bytes" in table
    assert "…" not in re.sub(r"\d…\d", "", table)


def test_evaluate_prints_charts_and_perplexity(built: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A bar chart with two bars: red and blue. " * 60)
    result = json.loads(
        run("evaluate", str(built), "--charts", "9", "--blank-images", "--text", str(text), "--window", "64", "--json").stdout
    )
    assert result["charts"]["questions"] == 9
    assert result["charts"]["blank"] is True
    assert result["perplexity"]["text.txt"] > 1


def test_plan_answers_without_weights() -> None:
    sized = json.loads(run("plan", "gemma-3-4b-int8", "--gpu", "l40s", "--slots", "4", "--json").stdout)
    assert sized["model"] == "gemma-3-4b"
    assert sized["gpus"][0]["fits"] is True
    assert sized["gpus"][0]["tokens_per_second_all_slots"] > sized["gpus"][0]["tokens_per_second"]
    table = run("plan", "small-int8").stdout
    assert "KV cache" in table
    assert "L40S" in table


def test_evaluate_with_a_reference(built: Path) -> None:
    arguments = ("--reference", "small-bf16", "--charts", "3", "--prompts", "1")
    result = json.loads(run("evaluate", str(built), *arguments, "--json").stdout)
    assert 0 <= result["agreement"]["chart answers"]["kl"] < 5
    assert result["greedy"]["prompts"] == 1
    assert "KL " in run("evaluate", str(built), *arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "start"),
    [
        (("compress", "small-int8", "--set", "sparsty=1"), 2, "error: E2001 small-int8: sparsty: unknown key"),
        (("compress", "small-int8-pruned", "--set", "sparsity.0.ratio=0.95"), 2, "error: E2001"),
        (("compress", "no-such-recipe"), 2, "error: E2002"),
        (("compress", "small-int8", "--base", "/nowhere", "--out", "{tmp}/x"), 1, "error: E3001"),
        (("compress", "small-int8", "--out", "/proc/nowhere/x"), 1, "error: E3005"),
        (("predict", "-i", "prompt= "), 2, "error: E1001"),
        (("predict", "-i", "temprature=1"), 2, "error: E1005"),
        (("predict", "-i", "prompt=x", "-i", "temperature=hot"), 2, "error: E1005"),
        (("predict", "-i", "prompt=x", "-i", "image=@/nowhere.png"), 2, "error: E1010"),
        (("predict", "-i", "prompt=x", "-i", "image=@README.md"), 2, "error: E1010"),
        (("predict", "-i", "prompt=@/nowhere"), 2, "error: E1005 prompt: /nowhere cannot be read: No such file"),
        (("predict", "-i", "messages=@/nowhere"), 2, "error: E1005 messages: /nowhere cannot be read"),
        (("predict", "-i", "messages=" + "[" * 5000), 2, "error: E1005 messages are not JSON"),
        (("predict", "-i", "messages=" + "1" * 5000), 2, "error: E1005 messages are not JSON"),
        (("predict", "-i", "prompt=@examples/chart.png"), 2, "error: E1005 prompt: examples/chart.png is not UTF-8 text"),
        (("predict", "-i", "prompt=x", "-i", "seed=-1"), 2, "error: E1005 seed must be 0 to 4294967295, got -1"),
        (("evaluate", "--text", "cog.yaml", "--window", "99999"), 2, "error: E2000 a window of 99,999 takes 99,998 tokens"),
        (("bench", "--new-tokens", "8000"), 2, "error: E2000 64 tokens in and 8,000 out are 8,064"),
        (("predict", "--device", "foo", "-i", "prompt=x"), 2, "error: E2000 there is no device foo here"),
        (("evaluate", "small-int8"), 2, "error: E2000"),
        (("plan", "small-int8", "--gpu", "voodoo2"), 2, "error: E2000 no facts about voodoo2"),
        (("plan", "small-int8", "--model", "gemma-9"), 2, "error: E2000 gemma-9 is neither"),
        (("report", "small-int8", "small-int8", "--out", "{tmp}/x"), 2, "error: E2000 every recipe"),
        (("predict", "no/such/model", "-i", "prompt=x"), 2, "error: E2002"),
        (("serve", "--predictor", "none.py:Predictor"), 2, "error: E2000 there is no none.py in "),
        (("report", "small-int8", "--charts", "1", "--new-tokens", "4000", "--out", "{tmp}/x"), 2, "error: E2000 64 tokens in"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments: tuple[str, ...], code: int, start: str, tmp_path: Path) -> None:
    result = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments), code=code)
    assert result.stdout == ""
    assert result.stderr.startswith(start), result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [("evaluate", "small-int8"), ("report", "small-int8", "--out", "report")])
def test_texts_have_names_of_their_own_and_are_utf8(verb: tuple[str, ...], tmp_path: Path) -> None:
    """The story: of two files with one name one was dropped, and a Latin-1 file was a traceback."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_bytes("é".encode("latin-1"))
    one, other = (str(tmp_path / name / "notes.txt") for name in ("one", "other"))
    same = run(*verb, "--text", one, "--text", other, code=2).stderr
    assert same.startswith("error: E2000 texts are reported by their file names, and notes.txt")
    assert run(*verb, "--text", one, code=2).stderr.startswith(f"error: E2000 not UTF-8 text: {one}")


def test_the_installed_command_is_the_module() -> None:
    """The story: it skipped `main`, so every error was a traceback and libraries chattered."""
    command = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]["gemma-opt"]
    start = f"from importlib.metadata import EntryPoint; EntryPoint('gemma-opt', {command!r}, 'console_scripts').load()()"
    result = subprocess.run(
        [sys.executable, "-c", start, "plan", "none"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 2
    assert result.stderr == run("plan", "none", code=2).stderr


def test_unknown_options_are_usage_errors() -> None:
    assert "No such option" in run("predict", "--colour", code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "--json"), ("inspect",), ("predict", "-i", "prompt=Hello", "-i", "temperature=0"), ("plan", "--help")],
)
def test_output_that_cannot_be_written_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "gemma_opt", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=600, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: E3005 the output cannot be written: No space left on device\n"


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    command = f"{sys.executable} -m gemma_opt inspect --json | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert (result.stdout, result.stderr) == ("{\n", "")


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_extra_is_said_before_anything_is_measured() -> None:
    result = run("evaluate", "--charts", "100", "--tasks", "mmlu", code=2)
    assert result.stderr == "error: E2000 lm-eval is not installed: pip install '.[lm-eval]' in the repository's folder\n"


def test_an_unknown_log_level_is_one_line() -> None:
    result = run("--help", code=2, GEMMA_OPT_LOG="foo")
    assert result.stderr == "error: E2000 GEMMA_OPT_LOG is 'foo', not one of debug, info, warning, error, critical\n"


def test_help_starts_without_torch() -> None:
    code = "import sys, gemma_opt.cli as cli; cli.app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("on_failure", "code"), [("error", 1), ("eager", 0)])
def test_a_failed_compilation_is_an_error_unless_the_recipe_says_eager(on_failure: str, code: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    overrides = ("name=broken-compiler", f"compile={{targets: [vision], on_failure: {on_failure}}}")
    recipe.write_text(Recipe.load("small-bf16", overrides).to_yaml())
    no_compiler = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run("predict", str(recipe), "-i", "prompt=Hello", "-i", "temperature=0", code=code, **no_compiler)
    assert ("error: E4001" in result.stderr) == (code == 1)
    assert bool(result.stdout) == (code == 0)


@pytest.mark.slow
def test_compiled_code_travels_with_the_checkpoint(tmp_path: Path) -> None:
    """On another machine of the same kind (here: with another cache folder), setup finds it in the checkpoint."""
    out = tmp_path / "out"
    first, second = ({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "GEMMA_OPT_LOG": "info"} for name in "ab")
    run("compress", "small-int8", "--out", str(out), "--questions", "0", "--set", "compile.targets=[vision]", **first)
    manifest = json.loads((out / "manifest.json").read_text())
    assert any(name.startswith("compile_cache/torch-") for name in manifest["files"])
    result = run("predict", str(out), "-i", "prompt=Hello", "-i", "temperature=0", **second)
    assert "comes with the checkpoint" in result.stderr
    assert "compiled vision: 1 graphs" in result.stderr


@pytest.mark.parametrize(
    ("pair", "start"),
    [
        (b"prompt=a \xff", "error: E1005 prompt: "),
        (rb'messages=[{"role": "user", "content": "\ud800"}]', "error: E1004 messages: not valid Unicode"),
    ],
)
def test_bytes_that_are_no_text_are_an_input_error(pair: bytes, start: str) -> None:
    command = [sys.executable.encode(), b"-m", b"gemma_opt", b"predict", b"-i", pair]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=600, check=False)
    assert result.returncode == 2
    assert result.stderr.decode().startswith(start)
