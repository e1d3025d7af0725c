"""Checkpoints: bit-equal after a round trip, equal from both starts, and never half written or silently wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import BUNDLED, chart, fresh_model, oracle_inputs, processing
from safetensors.torch import load_file, save_file

from gemma_opt import checkpoint, gemma, inspection, loading, pipeline
from gemma_opt.errors import (
    BaseModelError,
    CorruptCheckpoint,
    PlanError,
    RecipeMismatch,
    RecipeNotFound,
    UsageError,
    WeightsError,
)
from gemma_opt.prompt import PromptEncoder, single_turn
from gemma_opt.recipe import Int4, Recipe
from gemma_opt.staging import staging

CPU = torch.device("cpu")
RECIPES = ("small-int8", "small-int8-pruned", "small-bf16", "small-int4")
SYMMETRIC = ("quantization.default={format: int4, group: 64, symmetric: true}", "name=small-int4-sym")
FP16 = ("quantization={default: fp16, roles: {vision: fp16, projector: fp16, embedding: fp16}}", "name=small-fp16")


def compressed(recipe: Recipe) -> tuple[gemma.GemmaModel, list[inspection.Layer]]:
    model = fresh_model()
    return model, inspection.measure(model, pipeline.compress(model, recipe))


def write(recipe: Recipe, folder: Path) -> gemma.GemmaModel:
    """Compress the bundled model into a finished checkpoint, without evaluation. Returns the model that was saved."""
    model, layers = compressed(recipe)
    with staging(folder, 0) as staged:
        checkpoint.write(staged, model, processing(), recipe, layers, {"name": "small-gemma3"})
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "small-int8-pruned"
    write(Recipe.load("small-int8-pruned"), folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished checkpoint that a test may damage."""
    return shutil.copytree(finished, tmp_path / "copy")


def logits_of(model: gemma.GemmaModel) -> torch.Tensor:
    prompt = PromptEncoder(processing(), 512).encode(single_turn("Which bar is tallest?", "", [chart()]))
    with torch.inference_mode():
        return model(**oracle_inputs(model, prompt)).logits


@pytest.mark.parametrize(
    "recipe",
    [*(Recipe.load(name) for name in RECIPES), Recipe.load("small-bf16", FP16), Recipe.load("small-int4", SYMMETRIC)],
    ids=lambda recipe: recipe.name,
)
def test_a_loaded_model_is_the_saved_one(recipe: Recipe, tmp_path: Path) -> None:
    saved = write(recipe, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out", CPU)
    before, after = (checkpoint.stored_tensors(model, loaded.plan) for model in (saved, loaded.model))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(logits_of(saved), logits_of(loaded.model))
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert loaded.recipe == recipe


def test_both_starts_give_the_same_model(finished: Path) -> None:
    """(a) a finished checkpoint and (b) base weights compressed at start must answer alike, to the bit."""
    recipe = Recipe.load("small-int8-pruned")
    from_folder = loading.open_model(loading.Source(recipe, finished), "cpu")
    from_base = loading.open_model(loading.Source(recipe), "cpu")
    assert torch.equal(logits_of(from_folder.model), logits_of(from_base.model))
    assert from_folder.plan == from_base.plan


def test_the_files_hold_the_layout_of_the_contract(finished: Path) -> None:
    tensors = load_file(finished / "model-00001-of-00001.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert tensors[f"{name}.weight"].dtype == torch.int8
    assert tensors[f"{name}.weight"].shape == (256, 256)
    assert tensors[f"{name}.weight_scale"].dtype == torch.float32
    assert tensors[f"{name}.weight_scale"].shape == (256,)
    assert "lm_head.weight" not in tensors
    manifest = checkpoint.read_manifest(finished)
    assert manifest.recipe_digest == Recipe.load("small-int8-pruned").digest()
    assert {row["format"] for row in manifest.plan if row["role"] == "head"} == {"tied"}
    assert set(manifest.files) == {path.name for path in finished.iterdir()} - {"manifest.json"}
    rows = {str(row["name"]): row for row in manifest.plan}
    assert rows[name]["ratio"] == 0.2
    measured = rows[name]["measured"]
    assert isinstance(measured, dict)
    assert measured["sparsity"] >= round(256 * 256 * 0.2) / 256**2  # small weights that round to int8 zero come on top
    assert 0 < measured["scale_min"] <= measured["scale_max"]


def test_int4_files_and_the_manifest_hold_the_layout_of_the_contract(tmp_path: Path) -> None:
    write(Recipe.load("small-int4"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    name = "model.language_model.layers.0.mlp.down_proj"
    found = {key.removeprefix(name): (value.dtype, tuple(value.shape)) for key, value in tensors.items() if name in key}
    assert found == {
        ".weight_packed": (torch.uint8, (256, 384)),
        ".weight_scale": (torch.bfloat16, (256, 24)),
        ".weight_zero": (torch.uint8, (256, 24)),
    }
    table = "model.language_model.embed_tokens.weight"
    assert (tensors[table].dtype, tensors[f"{table}_scale"].dtype) == (torch.int8, torch.float32)
    rows = {str(row["name"]): row for row in checkpoint.read_manifest(tmp_path / "out").plan}
    assert rows[name]["format"] == Int4().model_dump()
    measured = rows[name]["measured"]
    assert isinstance(measured, dict)
    assert measured["scales"] == 256 * 24
    assert 0 < measured["scale_min"] < measured["scale_max"]
    assert rows["lm_head"]["measured"] == rows["model.language_model.embed_tokens"]["measured"]


def test_predicted_bytes_are_the_stored_bytes(finished: Path) -> None:
    loaded = checkpoint.load(finished, CPU)
    stored = checkpoint.stored_tensors(loaded.model, loaded.plan)
    assert sum(tensor.nbytes for tensor in stored.values()) == loaded.plan.bytes


def flip_a_byte(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def reseal(folder: Path) -> None:
    """Damage that the hashes do not see, because they were made after it."""
    checkpoint.seal(folder, checkpoint.read_manifest(folder))


def drop_a_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop("model.language_model.norm.weight")
    save_file(tensors, file)
    reseal(folder)


def add_a_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | {"surplus": torch.zeros(1)}, file)
    reseal(folder)


def no_safetensors_at_all(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"this is text")
    reseal(folder)


def another_shape(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | {"model.language_model.norm.weight": torch.zeros(3)}, file)
    reseal(folder)


def another_dtype(folder: Path) -> None:
    """Scales that a tool rounded to half precision: nothing else would notice."""
    file, name = next(folder.glob("*.safetensors")), "model.language_model.layers.0.mlp.up_proj.weight_scale"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].half()}, file)
    reseal(folder)


def leave_stale_weights(folder: Path) -> None:
    """They were loaded without a hash: whoever could add a file could replace any tensor."""
    file = next(folder.glob("*.safetensors"))
    name = "model.language_model.norm.weight"
    save_file({name: load_file(file)[name] + 1}, folder / "model-stale.safetensors")


def add_compiled_code(folder: Path) -> None:
    """Pickles that nobody has hashed would be run."""
    (folder / "compile_cache" / "triton").mkdir(parents=True)
    (folder / "compile_cache" / "triton" / "code.cubin").write_bytes(b"x")


def test_a_loaded_model_stays_what_it_was_when_its_files_change(copy: Path) -> None:
    """The story: `cp` over a folder that was being served changed its answers, and a shortened file ended the server."""
    model = checkpoint.load(copy, CPU).model
    before = logits_of(model)
    shard = copy / "model-00001-of-00001.safetensors"
    with shard.open("r+b") as file:
        file.write(bytes(shard.stat().st_size))
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (leave_stale_weights, "model-stale.safetensors: not in the manifest"),
        (add_compiled_code, "compile_cache/triton/code.cubin: not in the manifest"),
        (another_dtype, "up_proj.weight_scale'] in other dtypes"),
        (flip_a_byte, "wrong sha256"),
        (truncate, "bytes,"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 2}'), "manifest.json cannot be read"),
        (drop_a_tensor, "norm.weight"),
        (add_a_tensor, "surplus"),
        (no_safetensors_at_all, "cannot be read"),
        (another_shape, "does not fit"),
    ],
)
def test_damage_is_named(copy: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(copy)
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoint.load(copy, CPU)
    assert str(caught.value).startswith("E3002 ")
    assert named in str(caught.value)


def test_a_model_argument_means_the_first_match(finished: Path, tmp_path: Path) -> None:
    assert loading.resolve(str(finished)).folder == finished
    assert loading.resolve(str(BUNDLED)).recipe.name == "dense"
    assert loading.resolve("small-gemma3").recipe.name == "dense"
    file = tmp_path / "mine.yaml"
    file.write_text(Recipe.load("small-bf16", ("name=mine-of-this-test",)).to_yaml())
    assert loading.resolve(str(file)) == loading.Source(Recipe.load(file))
    for unknown in ("nothing", "some/where", str(tmp_path)):
        with pytest.raises(RecipeNotFound):
            loading.resolve(unknown)


def test_a_folder_of_another_version_of_the_recipe_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "WEIGHTS_CACHE", finished.parent)
    assert loading.prefer_finished(Recipe.load("small-int8-pruned")).folder == finished
    with pytest.raises(RecipeMismatch, match=r"E3003 .*--force"):
        loading.prefer_finished(Recipe.load("small-int8-pruned", ("sparsity.0.ratio=0.3",)))


def test_the_environment_chooses(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.source_from_environment().recipe.name == "small-int8"
    monkeypatch.setenv("GEMMA_OPT_RECIPE", "small-bf16")
    assert loading.source_from_environment().recipe.name == "small-bf16"
    monkeypatch.setenv("GEMMA_OPT_MODEL", str(finished))
    assert loading.source_from_environment().folder == finished


def test_a_context_beyond_the_positions_is_refused() -> None:
    with pytest.raises(PlanError, match="positions end at 8,192"):
        loading.open_model(loading.Source(Recipe.load("small-bf16", ("engine.context=9000",))), "cpu")


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "cpu:7"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"no device {name} here, only: cpu"):
        gemma.device_of(name)


def test_the_cpu_is_always_here() -> None:
    assert gemma.device_of("cpu").type == "cpu"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base folder that a test may damage."""
    return shutil.copytree(BUNDLED, tmp_path / "base")


def load_base(folder: Path) -> gemma.Base:
    return gemma.load_base(gemma.BaseFiles("x", folder), torch.float32, CPU)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "no .safetensors weights"),
        (lambda base: (base / "model.safetensors").write_bytes(b"text"), "cannot be read"),
        (lambda base: (base / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda base: (base / "config.json").write_text('{"model_type": "llama"}'), "holds a llama model"),
        (lambda base: (base / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_a_damaged_base_is_named(base: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(base)
    with pytest.raises(BaseModelError, match="E3001") as caught:
        load_base(base)
    assert named in str(caught.value)


def test_a_teacher_without_a_readable_tokenizer_is_named(base: Path) -> None:
    """It was a traceback of the tokenizer library's."""
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="E3001 tokenizer or processor files"):
        gemma.refuse_other_tokenizer(gemma.BaseFiles("x", base), processing())


def test_a_base_that_lacks_tensors_is_refused(base: Path) -> None:
    """transformers would fill them with random numbers and warn."""
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(BaseModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        load_base(base)


def test_nan_weights_are_refused_by_name() -> None:
    model = fresh_model()
    model.get_decoder().layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(WeightsError, match=r"E3004 .*\n.*layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        pipeline.compress(model, Recipe.load("small-int8"))


@pytest.mark.parametrize(
    ("name", "named"), [("org/model", "needs model.revision"), ("/nowhere", "neither a folder"), ("x.gguf", "no GGUF file")]
)
def test_a_base_that_is_not_there_is_named(name: str, named: str) -> None:
    with pytest.raises(BaseModelError, match=named):
        gemma.locate(Recipe.load("small-bf16", (f"model.base={name}",)).model)


def test_a_revision_pins_the_recipes_own_base_only() -> None:
    with pytest.raises(BaseModelError, match=r"no base model at org/other: .* needs model\.revision"):
        gemma.locate(Recipe.load("gemma-3-4b-int8").model, "org/other")


def test_sealing_again_reads_only_what_is_new(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.seal(copy, checkpoint.read_manifest(copy))
    before, read = checkpoint.read_manifest(copy), list[str]()
    add_compiled_code(copy)
    monkeypatch.setattr(gemma, "sha256_of", lambda path: read.append(path.name) or "0" * 64)
    checkpoint.seal(copy, before)
    assert read == ["code.cubin"]
    assert checkpoint.read_manifest(copy).files == before.files | {
        "compile_cache/triton/code.cubin": checkpoint.FileRecord(bytes=1, sha256="0" * 64)
    }


def test_a_pinned_hub_model_is_not_downloaded_without_permission() -> None:
    with pytest.raises(BaseModelError, match=r"E3001 google/gemma-3-4b-it .* python -m gemma_opt compress"):
        gemma.locate(Recipe.load("gemma-3-4b-int8").model)


def test_a_tuned_gguf_ends_its_replies_with_its_turns() -> None:
    """The story: llama.cpp's converter writes one end of text, often <eos>, and a reply then ran on to its length."""
    model = fresh_model()
    model.generation_config.eos_token_id = 1
    gemma._end_replies_with_turns_(model, processing().tokenizer)
    assert gemma.stop_token_ids(model) == {1, 106}


def test_a_text_file_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("text")
    with pytest.raises(BaseModelError, match="not a readable Gemma 3 GGUF"):
        gemma.load_base(gemma.BaseFiles("x.gguf", tmp_path, gguf="x.gguf"), torch.float32, CPU)


def test_the_manifest_is_json_for_everyone(finished: Path) -> None:
    assert json.loads((finished / "manifest.json").read_text())["format_version"] == 1


def test_a_source_tree_that_is_not_installed_has_no_version() -> None:
    """The story: figures measured on a rented GPU were lost because this package, run from a copied tree, had no metadata."""
    assert checkpoint.version_of("no-such-package") == "not installed"
    assert checkpoint.version_of("torch") == checkpoint.versions()["torch"]
