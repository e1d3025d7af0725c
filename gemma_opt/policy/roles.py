"""Which role every module plays, by transformers' names, with or without the prefixes that moved between its releases."""

from __future__ import annotations

import re
from enum import StrEnum

from torch import nn

from gemma_opt.errors import PlanError
from gemma_opt.recipe import TEXT_ROLES


class Role(StrEnum):
    """What a module does in the model. Recipes name roles, never modules."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    VISION = "vision"
    PROJECTOR = "projector"


PICTURED = {Role.VISION, Role.PROJECTOR}  # what a text-only Gemma 3 does not have

_TOWER = r"vision_tower\.(vision_model\.)?"
_LAYER = r"layers\.\d+\."
_PATTERNS = {
    Role.QUERY: _LAYER + r"self_attn\.q_proj",
    Role.KEY: _LAYER + r"self_attn\.k_proj",
    Role.VALUE: _LAYER + r"self_attn\.v_proj",
    Role.OUTPUT: _LAYER + r"self_attn\.o_proj",
    Role.GATE: _LAYER + r"mlp\.gate_proj",
    Role.UP: _LAYER + r"mlp\.up_proj",
    Role.DOWN: _LAYER + r"mlp\.down_proj",
    Role.EMBEDDING: r"embed_tokens",
    Role.HEAD: r"lm_head",
    Role.NORM: rf"norm|{_LAYER}(self_attn\.[qk]_norm|(input|post_attention|pre_feedforward|post_feedforward)_layernorm)"
    rf"|{_TOWER}(encoder\.{_LAYER}layer_norm[12]|post_layernorm)|multi_modal_projector\.mm_soft_emb_norm",
    Role.VISION: _TOWER
    + rf"(embeddings\.(patch|position)_embedding|encoder\.{_LAYER}(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))",
    Role.PROJECTOR: r"multi_modal_projector",
}
_FACTOR = r"(\.(left|right))?"  # what low rank makes of a linear
_ROLES = {
    role: re.compile(rf"((model|language_model)\.)*({pattern}){_FACTOR if role in TEXT_ROLES else ''}")
    for role, pattern in _PATTERNS.items()
}


def role_of(module_name: str) -> Role:
    """The role of a module by its name in the model, e.g. `model.language_model.layers.0.mlp.up_proj` → up.

    Only modules that own parameters have one. Raises PlanError for any other name.
    """
    role = find_role(module_name)
    if role is None:
        raise PlanError(f"{module_name}: no role is known for this module; is this a Gemma 3?")
    return role


def main_parameter(module: nn.Module) -> nn.Parameter | None:
    """The parameter a plan row is about: the weight, else the first one; None where the module owns none."""
    own = dict(module.named_parameters(recurse=False))
    return own.get("weight", next(iter(own.values()), None))


def find_role(module_name: str) -> Role | None:
    """`role_of`, None for any other name."""
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(module_name)), None)
