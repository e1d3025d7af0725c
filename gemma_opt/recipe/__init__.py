"""A recipe: everything that changes weights or how they are executed, and nothing that changes one reply.

Recipes are YAML files read into frozen pydantic models. A method is a class of its own, picked by its tag, so an option
that does not apply to a method cannot be written. Reading a recipe needs no torch and no model; whether it fits a model
is `policy.plan`'s question. Only what the package can do is a valid recipe: an unknown key or method is refused.
"""

from gemma_opt.recipe.execution import Compile, EngineSection
from gemma_opt.recipe.formats import (
    FLOATS,
    FP8_FORMATS,
    Activation,
    Bf16,
    Fp8,
    Fp8Dynamic,
    Fp8Static,
    Fp16,
    Fp32,
    Int4,
    Int8,
    Int8Dynamic,
    Int8DynamicInt4,
    Int8Static,
    Observer,
    Quantization,
    RoleFormats,
    Smoothed,
    StoredFormat,
    Tied,
)
from gemma_opt.recipe.reading import packaged_recipes
from gemma_opt.recipe.recipe import Recipe
from gemma_opt.recipe.section import TEXT_ROLES
from gemma_opt.recipe.source import HUB_ID, BaseModelSection, Calibration
from gemma_opt.recipe.sparsity import (
    ADMM,
    Compact,
    Gradual,
    LayerNorm,
    Magnitude,
    Rows,
    Schedule,
    SparseGPT,
    SparsityStage,
    Wanda,
    parse_n_m,
)
from gemma_opt.recipe.training import Distill, LowRank

__all__ = [
    "ADMM",
    "FLOATS",
    "FP8_FORMATS",
    "HUB_ID",
    "TEXT_ROLES",
    "Activation",
    "BaseModelSection",
    "Bf16",
    "Calibration",
    "Compact",
    "Compile",
    "Distill",
    "EngineSection",
    "Fp8",
    "Fp8Dynamic",
    "Fp8Static",
    "Fp16",
    "Fp32",
    "Gradual",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "Int8DynamicInt4",
    "Int8Static",
    "LayerNorm",
    "LowRank",
    "Magnitude",
    "Observer",
    "Quantization",
    "Recipe",
    "RoleFormats",
    "Rows",
    "Schedule",
    "Smoothed",
    "SparseGPT",
    "SparsityStage",
    "StoredFormat",
    "Tied",
    "Wanda",
    "packaged_recipes",
    "parse_n_m",
]
