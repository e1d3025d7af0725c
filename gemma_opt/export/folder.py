"""An exported folder: config, tokenizer and processor, weights, and a model card; written completely or not at all."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from gemma_opt import checkpoint
from gemma_opt.errors import UsageError
from gemma_opt.export import compressed
from gemma_opt.export.card import card, program_card
from gemma_opt.export.tensors import hub_tensors
from gemma_opt.gemma import DTYPES
from gemma_opt.loading import Ready, Source, open_model
from gemma_opt.quantization import QuantizedLinear
from gemma_opt.recipe import TEXT_ROLES, BaseModelSection
from gemma_opt.staging import staging, storage_errors

MAX_SHARD = "4GB"
SPARE_BYTES = 64 * 10**6  # tokenizer, configs


class ExportFormat(StrEnum):
    """transformers: all weights as floats. compressed-tensors: quantized text linears stay quantized. executorch: a program."""

    TRANSFORMERS = "transformers"
    COMPRESSED_TENSORS = "compressed-tensors"
    EXECUTORCH = "executorch"


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: of the weights, or of the program."""

    folder: Path
    bytes: int


def refuse(form: ExportFormat, out: Path, dtype: str | None = None) -> None:
    """What can be told before the model is loaded: a folder that is not empty, a library that is not there. UsageError."""
    if form is ExportFormat.EXECUTORCH and dtype not in (None, "float32"):
        raise UsageError(f"a program's floats are float32, not {dtype}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists, and an export replaces nothing: choose another --out")
    if form is ExportFormat.COMPRESSED_TENSORS:
        compressed.refuse_missing()
    elif form is ExportFormat.EXECUTORCH:
        import_module("gemma_opt.export.executorch")  # which raises UsageError where the library is missing


def export(source: Source, out: Path, form: ExportFormat, dtype: str | None = None, device: str | None = None) -> Exported:
    """Write a model into the new folder `out`, for other programs.

    dtype: of everything that is stored as floats, and in which the model will compute; by default the recipe's (a program's
    floats are float32). Needs memory for these beside the model. Raises UsageError, CheckpointError; then there is no `out`.
    """
    refuse(form, out, dtype)
    ready = open_model(source, device)
    if form is ExportFormat.EXECUTORCH:
        return _export_program(ready, _base_of(source), out)
    floats = DTYPES[dtype or ready.recipe.model.dtype]
    config: Any = copy.deepcopy(ready.model.config)
    config.architectures, config.dtype = [type(ready.model).__name__], floats
    if form is ExportFormat.COMPRESSED_TENSORS:
        config.quantization_config = compressed.config_of(ready.plan)
    tensors = _tensors(ready, form, floats)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staging(out, size + SPARE_BYTES) as folder, storage_errors(out):
        config.save_pretrained(folder)
        if ready.model.generation_config:
            ready.model.generation_config.save_pretrained(folder)
        ready.processing.save(folder)
        (folder / "README.md").write_text(
            card(ready, _base_of(source), compressed=form is not ExportFormat.TRANSFORMERS), "utf-8"
        )
        save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for the owner alone
    return Exported(out, size)


def _export_program(ready: Ready, base: BaseModelSection, out: Path) -> Exported:
    from gemma_opt.export import executorch

    at_most = 4 * sum(row.parameters for row in ready.plan.rows)
    with staging(out, at_most + SPARE_BYTES) as folder, storage_errors(out):
        executorch.write_program(ready.model, ready.context, folder)
        ready.processing.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(program_card(ready, base), "utf-8")
        size = (folder / executorch.PROGRAM).stat().st_size
    return Exported(out, size)


def _base_of(source: Source) -> BaseModelSection:
    """What the weights really are of: a build may have been given others than its recipe names."""
    if source.folder is None:
        return source.recipe.model
    base = checkpoint.read_manifest(source.folder).base
    revision = base["revision"]
    return BaseModelSection(base=str(base["name"]), revision=None if revision is None else str(revision))


def _tensors(ready: Ready, form: ExportFormat, floats: torch.dtype) -> dict[str, Tensor]:
    if form is ExportFormat.TRANSFORMERS:
        return hub_tensors(ready.model, floats)

    def keep(name: str, linear: QuantizedLinear) -> dict[str, Tensor] | None:
        return compressed.stored_tensors(linear, floats) if ready.plan[name].role in TEXT_ROLES else None

    return hub_tensors(ready.model, floats, keep)
