"""Gemma 3 models for tests: the true shapes on the meta device, and two tiny ones with random weights on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from gemma_opt.gemma import named_config
from gemma_opt.recipe import Recipe


def gemma_4b() -> Gemma3ForConditionalGeneration:
    """google/gemma-3-4b-it on the meta device."""
    with torch.device("meta"):
        return Gemma3ForConditionalGeneration(named_config("gemma-3-4b"))  # type: ignore[arg-type]


def gemma_1b() -> Gemma3ForCausalLM:
    """google/gemma-3-1b-it on the meta device."""
    with torch.device("meta"):
        return Gemma3ForCausalLM(named_config("gemma-3-1b"))  # type: ignore[arg-type]


def gemma_270m() -> Gemma3ForCausalLM:
    """google/gemma-3-270m-it on the meta device."""
    with torch.device("meta"):
        return Gemma3ForCausalLM(named_config("gemma-3-270m"))  # type: ignore[arg-type]


def small_text_model(seed: int = 0, intermediate: int = 48) -> Gemma3ForCausalLM:
    """A text-only Gemma 3 of 20,000 parameters, float32: one sliding layer (window 8) and one full layer, grouped heads."""
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Gemma3ForCausalLM(config)
        _shake_norms_(model)
    model.config.max_position_embeddings = 8192  # RoPE has no table: the context of a recipe that names none fits
    return model.eval()


def small_model(seed: int = 0) -> Gemma3ForConditionalGeneration:
    """The bundled model's shape (scripts/train_small_gemma.py) with random weights, float32."""
    from scripts.train_small_gemma import build_config, build_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(build_config())
        _shake_norms_(model)
    return model.eval()


def recipe(*stages: Mapping[str, object], dtype: str = "float32", **quantization: object) -> Recipe:
    """A recipe with these sparsity stages; keywords are the quantization section."""
    model = {"base": "small-gemma3", "dtype": dtype}
    return Recipe.from_tree(
        {"name": "test", "model": model, "sparsity": [dict(stage) for stage in stages], "quantization": quantization}, "test"
    )


def _shake_norms_(model: nn.Module) -> None:
    """Norms start at exactly one, which would hide a norm that is skipped or swapped."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
