"""The published Gemma 3 sizes as plain data: what their config.json say that differs from transformers' defaults.

For planning before any download, and for tests on the true shapes. `gemma.named_config` makes transformers configs of
them. Source: the config.json of google/gemma-3-{270m,1b,4b,12b,27b}-it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Section = Mapping[str, object]

_SCALED_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_PICTURED = {"vocab_size": 262_208, "sliding_window": 1024, "rope_parameters": _SCALED_ROPE}
_TEXT_ONLY = {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768}

# SigLIP So400m at 896 × 896, the same in every multimodal size.
SIGLIP: Section = MappingProxyType(
    {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14, "vision_use_head": False,
    }
)  # fmt: skip

TEXT: Mapping[str, Section] = MappingProxyType(
    {
        "gemma-3-270m": _TEXT_ONLY | {
            "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        },
        "gemma-3-1b": _TEXT_ONLY | {
            "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        },
        "gemma-3-4b": _PICTURED | {
            "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        },
        "gemma-3-12b": _PICTURED | {
            "hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
        },
        "gemma-3-27b": _PICTURED | {
            "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
        },
    }
)  # fmt: skip

PICTURED = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")


def shape_name(model: str) -> str | None:
    """The shape a name or hub id means: `google/gemma-3-4b-it` → gemma-3-4b; None if it is none of ours."""
    name = model.rpartition("/")[2].removesuffix("-it").removesuffix("-pt")
    return name if name in TEXT else None
