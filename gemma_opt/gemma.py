"""Base models in: a folder in Hugging Face layout, a hub id at a pinned revision, or a GGUF file.

The only module that imports transformers' Gemma classes. Every Gemma 3 checkpoint is one of two architectures:
`Gemma3ForConditionalGeneration` (pictures and text) or `Gemma3ForCausalLM` (text only); both are used as transformers
builds them. The processor always uses transformers' PIL image path, so that a picture becomes the same pixels with and
without torchvision. GGUF files carry text weights only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.utils import logging as transformers_logging

from gemma_opt.errors import BaseModelError, UsageError
from gemma_opt.recipe import HUB_ID, BaseModelSection
from gemma_opt.shapes import PICTURED, SIGLIP, TEXT

GemmaModel = Gemma3ForConditionalGeneration | Gemma3ForCausalLM
GemmaConfig = Gemma3Config | Gemma3TextConfig

WEIGHTS_CACHE = Path(__file__).resolve().parent.parent / "weights_cache"  # beside the package: the checkout, or Cog's /src
BUNDLED = {"small-gemma3": WEIGHTS_CACHE / "small-gemma3"}
PICTURE_TOKENS = 64  # by which the vocabularies of Gemma 3's sizes differ
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Processing:
    """What turns text and pictures into model inputs. `processor` is None for text-only models."""

    tokenizer: PreTrainedTokenizerBase
    processor: Gemma3Processor | None

    def save(self, folder: Path) -> None:
        """Write tokenizer, chat template and (if any) processor files into a folder."""
        (self.processor or self.tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class BaseFiles:
    """Where base weights lie on this machine. `gguf` is the file's name for a GGUF base."""

    name: str
    folder: Path
    revision: str | None = None
    gguf: str | None = None

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file in it."""
        return self.folder / self.gguf if self.gguf else self.folder

    def weight_files(self) -> list[Path]:
        """The files that hold weights, sorted by name."""
        return [self.path] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    def identity(self) -> dict[str, object]:
        """Name, revision and sha256 of every weight file: what a manifest records as its base. Read once a process."""
        files = self.weight_files()
        hashes = {path.name: found for path, found in zip(files, known_hashes(files), strict=True)}
        return {"name": self.name, "revision": self.revision, "files": hashes}


@dataclass(frozen=True)
class Base:
    """A loaded base model: float weights, tokenizer and processor."""

    model: GemmaModel
    processing: Processing


def sha256_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hashes(files: Sequence[Path]) -> list[str]:
    """sha256 of files. Hashing 8 GB takes seconds: each is read once a process, as long as it looks the same."""
    states = [path.stat() for path in files]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return list(pool.map(_hash_of, files, [state.st_size for state in states], [state.st_mtime_ns for state in states]))


@cache
def _hash_of(path: Path, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def device_of(name: str | None = None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU. Raises UsageError for one that is not here."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = {"cpu": 1}
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        here[accelerator.type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= here.get(device.type, 0):
        raise UsageError(f"there is no device {name} here, only: {', '.join(map(_counted, here.items()))}")
    return device


def _counted(device: tuple[str, int]) -> str:
    kind, count = device
    return kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"


def locate(
    section: BaseModelSection, override: str | None = None, *, network: bool = False, recipe: str = "RECIPE"
) -> BaseFiles:
    """Find the base weights of a recipe. `override` names other weights for the same recipe (`--base`).

    A hub id is looked up in the local cache, and downloaded only with `network=True` (token: the HF_TOKEN variable).
    recipe: what the message calls it that says how to download them. Raises BaseModelError (E3001).
    """
    base = override or section.base
    revision = section.revision if base == section.base else None
    if base in BUNDLED:
        return _folder(base, BUNDLED[base])
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no GGUF file {base}")
        return BaseFiles(path.name, path.parent, gguf=path.name)
    if path.is_dir():
        return _folder(base, path)
    like_hub_id = HUB_ID.fullmatch(base)
    if like_hub_id and revision:
        return BaseFiles(base, _snapshot(base, revision, network=network, recipe=recipe), revision)
    hint = " (a hub id needs model.revision in the recipe)" if like_hub_id else ""
    raise BaseModelError(f"no base model at {base}: neither a folder, a .gguf file nor a bundled model{hint}")


def _folder(name: str, folder: Path) -> BaseFiles:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder} is no base model: it has no config.json")
    return BaseFiles(name, folder)


def _snapshot(hub_id: str, revision: str, *, network: bool, recipe: str) -> Path:
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=HUB_FILES,
                local_files_only=not network,
                token=os.environ.get("HF_TOKEN"),
            )
        )
    except LocalEntryNotFoundError:
        if not network:
            raise BaseModelError(
                f"{hub_id} at {revision[:12]} is not on this machine. Download and compress it with: "
                f"python -m gemma_opt compress {recipe} (set HF_TOKEN for gated models)"
            ) from None
        raise BaseModelError(f"{hub_id} could not be downloaded: the hub cannot be reached") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "accept the model's terms and set HF_TOKEN" if status in (401, 403) else f"the hub answered {status}"
        raise BaseModelError(f"{hub_id} at {revision[:12]} could not be downloaded: {why}") from None


def load_base(files: BaseFiles, dtype: torch.dtype, device: torch.device) -> Base:
    """Load float weights in `dtype` on `device`, every parameter accounted for. Raises BaseModelError."""
    transformers_logging.disable_progress_bar()  # ours shows the stages; this one flashes by for each small file
    if files.gguf:
        return _load_gguf(files, dtype, device)
    config = read_config(files.folder)
    if not files.weight_files():
        raise BaseModelError(f"{files.folder} has no .safetensors weights")
    if getattr(config, "quantization_config", None):
        raise BaseModelError(f"{files.folder} is quantized already, as an export is: name the model it was made from")
    try:
        loaded = model_class(config).from_pretrained(
            files.folder, config=config, dtype=dtype, device_map=device, output_loading_info=True, local_files_only=True
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"the weights in {files.folder} cannot be read: {_first_line(error)}") from None
    model, info = cast(tuple[GemmaModel, dict[str, set[str] | list[tuple[str, ...]]]], loaded)
    lost = sorted(map(str, info["missing_keys"])) + sorted(str(row[0]) for row in info["mismatched_keys"])
    if lost:
        raise BaseModelError(f"{files.folder} lacks {len(lost)} tensors of its own config: {', '.join(lost[:5])}")
    return Base(model.eval(), load_processing(files.folder, config))


def _load_gguf(files: BaseFiles, dtype: torch.dtype, device: torch.device) -> Base:
    with _readable_gguf(files):
        model = Gemma3ForCausalLM.from_pretrained(
            files.folder, gguf_file=files.gguf, quantization_config=GgufConfig(dequantize=True), dtype=dtype, device_map=device
        )
    processing = find_processing(files)
    if model.config.model_type != "gemma3_text":
        raise BaseModelError(f"{files.gguf} holds a {model.config.model_type} model, not Gemma 3")
    _end_replies_with_turns_(model, processing.tokenizer)
    return Base(model.eval(), processing)


def _end_replies_with_turns_(model: GemmaModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A GGUF file names one token that ends a text, often not the one that ends the turns of its chat template."""
    if tokenizer.chat_template and model.generation_config:
        ends = {tokenizer.get_vocab()[token] for token in ("<eos>", "<end_of_turn>")}
        model.generation_config.eos_token_id = sorted(stop_token_ids(model) | ends)


@contextmanager
def _readable_gguf(files: BaseFiles) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(f"{files.path} is not a readable Gemma 3 GGUF: {_first_line(error)}") from None


def read_config(folder: Path) -> GemmaConfig:
    """The Gemma 3 config in a folder. Raises BaseModelError if it is another model's."""
    try:
        declared = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
        config = AutoConfig.from_pretrained(folder, local_files_only=True) if declared in ("gemma3", "gemma3_text") else None
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{folder / 'config.json'} cannot be read: {_first_line(error)}") from None
    if not isinstance(config, Gemma3Config | Gemma3TextConfig):
        raise BaseModelError(f"{folder} holds a {declared} model, not Gemma 3")
    return config


def named_config(shape: str) -> GemmaConfig:
    """The config of a published size (`shapes.TEXT`). KeyError for another name."""
    text = Gemma3TextConfig.from_dict(dict(TEXT[shape]))
    return (
        Gemma3Config(text_config=text, vision_config=SiglipVisionConfig.from_dict(dict(SIGLIP))) if shape in PICTURED else text
    )


def picture_tokens(config: GemmaConfig) -> int:
    """Soft tokens of a picture; 0 for models that do not see."""
    return getattr(config, "mm_tokens_per_image", None) or 0


def load_processing(folder: Path, config: GemmaConfig) -> Processing:
    """Tokenizer and processor of a folder. Raises BaseModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not isinstance(config, Gemma3Config):
            return Processing(tokenizer, None)
        pictures = Gemma3ImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"tokenizer or processor files in {folder} cannot be read: {_first_line(error)}") from None
    seq_length = config.mm_tokens_per_image or 256
    return Processing(tokenizer, Gemma3Processor(pictures, tokenizer, tokenizer.chat_template, image_seq_length=seq_length))


def find_processing(files: BaseFiles) -> Processing:
    """Tokenizer and processor of base weights, without reading these. Raises BaseModelError."""
    if files.gguf:
        with _readable_gguf(files):
            return Processing(AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf), None)
    return load_processing(files.folder, read_config(files.folder))


def refuse_other_tokenizer(files: BaseFiles, processing: Processing) -> None:
    """Raises BaseModelError where a teacher's tokens mean something else than those of `processing`."""
    theirs, ours = find_processing(files).tokenizer.get_vocab(), processing.tokenizer.get_vocab()
    other = [token for token, number in theirs.items() if token in ours and ours[token] != number]
    if other or abs(len(theirs) - len(ours)) > PICTURE_TOKENS:
        named = f", e.g. {other[0]!r}" if other else ""
        raise BaseModelError(f"{files.name} has another tokenizer than the student{named}: it cannot be its teacher")


def model_class(config: GemmaConfig) -> type[Gemma3ForConditionalGeneration] | type[Gemma3ForCausalLM]:
    """The architecture a config describes."""
    return Gemma3ForConditionalGeneration if isinstance(config, Gemma3Config) else Gemma3ForCausalLM


def empty_model(config: GemmaConfig, dtype: torch.dtype) -> GemmaModel:
    """The model with every parameter on the meta device, and every buffer real.

    Buffers that no checkpoint stores (RoPE tables, the embedding scale, position ids) are computed by the constructors
    and must not be left on meta: transformers reports "all keys matched" without them.
    """
    with init_empty_weights(include_buffers=False):
        return model_class(config)._from_config(config, dtype=dtype).eval()


def tie_head_(model: GemmaModel) -> None:
    """Make the head read the embedding's float table, as every Gemma 3 does. (A quantized head knows its table.)"""
    table = model.get_input_embeddings().weight
    if isinstance(table, nn.Parameter):
        model.lm_head.weight = table


def weights_device(model: nn.Module) -> torch.device:
    """Where a model's parameters lie."""
    return next(model.parameters()).device


def text_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → decoder layer of the text model, in order."""
    lists = [(name, part) for name, part in model.named_modules() if re.fullmatch(r"model\.(language_model\.)?layers", name)]
    ((prefix, layers),) = lists
    return {f"{prefix}.{number}": layer for number, layer in layers.named_children()}


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The SigLIP tower, None for text-only models."""
    return dict(model.named_modules()).get("model.vision_tower")


def stop_token_ids(model: GemmaModel) -> frozenset[int]:
    """Every token that ends a reply, from the generation config: for instruction-tuned models 1 and 106."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = cast(int | list[int], model.config.get_text_config().eos_token_id if declared is None else declared)
    return frozenset(ids if isinstance(ids, list) else [ids])


def load_generation_config(folder: Path) -> GenerationConfig:
    """generation_config.json of a folder. Raises BaseModelError."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise BaseModelError(f"{folder} has no readable generation_config.json: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
