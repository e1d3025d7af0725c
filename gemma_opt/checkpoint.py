"""Finished checkpoints: one folder with everything a compressed model needs, written completely or not at all.

Tensors are plain (no pickles, no tensor subclasses) under transformers' module names; the layout of each format is
described in README, "Checkpoint folder". The manifest is written last and names every file with its sha256. Loading is
strict: wrong hash, missing or surplus tensor, or anything left on the meta device is an error.
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemma_opt import gemma, layout, lowrank
from gemma_opt.errors import BaseModelError, CorruptCheckpoint, RecipeError
from gemma_opt.inspection import Layer
from gemma_opt.policy import Plan, main_parameter
from gemma_opt.quantization.weights import empty_like_plan_
from gemma_opt.recipe import FLOATS, Recipe
from gemma_opt.staging import storage_errors

MANIFEST = "manifest.json"
QUALITY = "quality.json"
COMPILE_CACHE = "compile_cache"
SHARD_BYTES = 4 * 10**9
HEAD = "lm_head.weight"


class FileRecord(BaseModel):
    """Size and hash of one file of the folder."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """manifest.json: what was built, from what, with what, and the hash of every file."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    recipe_digest: str
    base: dict[str, object]
    versions: dict[str, str]
    plan: list[dict[str, object]]
    measured: dict[str, object]
    files: dict[str, FileRecord]

    def with_measured(self, measured: dict[str, object]) -> Manifest:
        """The same manifest with the build's figures."""
        return self.model_copy(update={"measured": measured})


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: gemma.GemmaModel
    processing: gemma.Processing
    recipe: Recipe
    plan: Plan
    manifest: Manifest


# Writing


def write(
    folder: Path,
    model: gemma.GemmaModel,
    processing: gemma.Processing,
    recipe: Recipe,
    layers: list[Layer],
    base: dict[str, object],
) -> None:
    """Write a whole checkpoint into an existing folder (see `staging`), the manifest last. Raises StorageError (E3005)."""
    plan = Plan(tuple(layer.row for layer in layers))
    tensors = stored_tensors(model, plan)
    with storage_errors(folder):
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
        model.config.save_pretrained(folder)
        if model.generation_config:
            model.generation_config.save_pretrained(folder)
        processing.save(folder)
        _write_shards(folder, tensors)
    rows = [row | {"measured": layer.to_json()} for row, layer in zip(plan.to_json(), layers, strict=True)]
    seal(folder, Manifest(recipe_digest=recipe.digest(), base=base, versions=versions(), plan=rows, measured={}, files={}))


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES).filename_to_tensors.values()
    for number, names in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone; images and other users must read it


def seal(folder: Path, manifest: Manifest) -> None:
    """Record every file's hash and write the manifest, the last file of a folder. Raises StorageError (E3005).

    Sealed once more, as when compiled code has come, a folder's old files are not read again: they keep the hashes of what
    was written, and `verify` always reads.
    """
    with storage_errors(folder):
        names = _files_of(folder)
        paths = [folder / name for name in names]
        hashes = zip(names, paths, gemma.known_hashes(paths), strict=True)
        files = {name: FileRecord(bytes=path.stat().st_size, sha256=found) for name, path, found in hashes}
        (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json(indent=1), "utf-8")


def record_figures(folder: Path, measured: dict[str, object]) -> None:
    """Put a build's figures into a sealed folder: quality.json, and the same in the manifest. Raises StorageError (E3005).

    Each file is replaced at once, and no hash covers quality.json: whoever stops in between leaves a folder that loads.
    """
    with storage_errors(folder):
        _replace_text(folder / QUALITY, json.dumps(measured, indent=1))
        _replace_text(folder / MANIFEST, read_manifest(folder).with_measured(measured).model_dump_json(indent=1))


def _replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def _files_of(folder: Path) -> list[str]:
    """Every file but the manifest and the figures, by its path in the folder."""
    apart = {folder / MANIFEST, folder / QUALITY}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in apart)
    return [path.relative_to(folder).as_posix() for path in paths]


def stored_tensors(model: gemma.GemmaModel, plan: Plan) -> dict[str, Tensor]:
    """The tensors a checkpoint holds: contiguous, on the CPU, floats in the format the plan names. No tied head."""
    dtypes = {
        id(main_parameter(model.get_submodule(row.name))): layout.float_dtype(row.format)
        for row in plan.rows
        if isinstance(row.format, FLOATS)
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == HEAD:
            continue
        kept = tensor.detach()
        tensors[name] = kept.to(dtypes.get(id(tensor), kept.dtype)).cpu().contiguous()
    return tensors


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))


def versions() -> dict[str, str]:
    """What a checkpoint was built with."""
    packages = ("torch", "torchao", "transformers", "safetensors", "gemma-opt")
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}


def version_of(package: str) -> str:
    """The installed version; "not installed" for what runs from its source tree, as on a GPU machine it was copied to."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# Reading


def is_finished(folder: Path) -> bool:
    """Whether a folder claims to be a finished checkpoint."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """manifest.json. Raises CorruptCheckpoint (E3002)."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CorruptCheckpoint(f"{folder / MANIFEST} cannot be read: {str(error).splitlines()[0]}") from None


def read_recipe(folder: Path) -> Recipe:
    """recipe.yaml. Raises CorruptCheckpoint (E3002): what a build wrote can be read."""
    try:
        return Recipe.load(folder / "recipe.yaml")
    except RecipeError as error:
        raise CorruptCheckpoint(f"{folder / 'recipe.yaml'} cannot be read: {error.message}") from None


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded size and sha256. Raises CorruptCheckpoint that lists all offenders.

    Weights and compiled code that the manifest does not name are offenders too: nobody has hashed them.
    """

    def fault(name: str, record: FileRecord) -> str | None:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != record.bytes:
            return f"{name}: {path.stat().st_size:,} bytes, {record.bytes:,} expected"
        return None if gemma.sha256_of(path) == record.sha256 else f"{name}: wrong sha256"

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        faults = [row for row in pool.map(fault, manifest.files, manifest.files.values()) if row]
    strange = sorted(set(_files_of(folder)) - manifest.files.keys())
    surplus = [name for name in strange if _is_weights(name) or name.startswith(f"{COMPILE_CACHE}/")]
    unnamed = [f"{name}: not in the manifest" for name in surplus]
    if unnamed and not faults:
        raise CorruptCheckpoint(f"{folder} holds files that nobody hashed; remove them:\n" + "\n".join(unnamed))
    faults += unnamed
    if faults:
        raise CorruptCheckpoint(
            f"{folder} is damaged:\n"
            + "\n".join(faults)
            + f"\nBuild it again with: python -m gemma_opt compress RECIPE --out {folder} --force"
        )


def load(folder: Path, device: torch.device) -> Checkpoint:
    """Load a finished checkpoint: hashes, strict tensors, ties. Raises CorruptCheckpoint."""
    manifest = read_manifest(folder)
    verify(folder, manifest)
    recipe = read_recipe(folder)
    plan = Plan.from_json([{key: value for key, value in row.items() if key != "measured"} for row in manifest.plan])
    dtype = gemma.DTYPES[recipe.model.dtype]
    try:
        config = gemma.read_config(folder)
        processing = gemma.load_processing(folder, config)
        model = gemma.empty_model(config, dtype)
        model.generation_config = gemma.load_generation_config(folder)
    except BaseModelError as error:
        raise CorruptCheckpoint(error.message) from None
    lowrank.empty_like_plan_(model, plan)
    empty_like_plan_(model, plan)
    shards = [folder / name for name in sorted(manifest.files) if _is_weights(name)]
    _fill_(model, _read_tensors(shards, device), folder)
    nn.Module.to(model, device)  # the buffers that no checkpoint stores
    return Checkpoint(model, processing, recipe, plan, manifest)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _read_tensors(shards: list[Path], device: torch.device) -> dict[str, Tensor]:
    """All tensors of these files, as stored. On the CPU copies: what is mapped changes with its file, or ends the process."""
    tensors: dict[str, Tensor] = {}
    for file in shards:
        try:
            read = load_file(file, device=str(device))
            tensors |= {name: tensor.clone() for name, tensor in read.items()} if device.type == "cpu" else read
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{file} cannot be read: {error}") from None
    return tensors


def _fill_(model: gemma.GemmaModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors into an empty model, tie the head, and make sure nothing stayed empty.

    Float weights and biases take the dtype the model computes in; quantized data and scales must have their stored one.
    """
    empty = model.state_dict(keep_vars=True)
    ready = {
        name: tensor.to(empty[name].dtype) if isinstance(empty.get(name), nn.Parameter) else tensor
        for name, tensor in tensors.items()
    }
    other = [name for name in ready.keys() & empty.keys() if ready[name].dtype != empty[name].dtype]
    if other:
        raise CorruptCheckpoint(f"{folder} holds {sorted(other)[:5]} in other dtypes than its plan says")
    try:
        result = model.load_state_dict(ready, strict=False, assign=True)
    except RuntimeError as error:
        raise CorruptCheckpoint(f"{folder} does not fit its own config: {str(error).splitlines()[-1].strip()}") from None
    missing = sorted(set(result.missing_keys) - {HEAD})
    if missing or result.unexpected_keys:
        raise CorruptCheckpoint(f"{folder} lacks {missing[:5]} and has unknown {result.unexpected_keys[:5]}")
    gemma.tie_head_(model)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CorruptCheckpoint(f"{folder} left {len(left)} tensors empty: {', '.join(left[:5])}")
    model.requires_grad_(False).eval()
