"""The filter map: which role every module plays, and what a recipe will do to each of them.

`plan` is the one place that decides whether a recipe fits a model. It reads names and shapes only, so it works on the
meta device before a single weight is loaded, and it lists every offender at once. The stages then do what the plan says
and compare what they touched with it. Roles are matched on transformers' module names, with or without the prefixes that
moved between its releases; a module that owns parameters and is unknown here is an error, never silently skipped.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, singledispatch
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from gemma_opt import layout
from gemma_opt.errors import CorruptCheckpoint, PlanError
from gemma_opt.recipe import (
    FLOATS,
    TEXT_ROLES,
    Bf16,
    Compact,
    Fp32,
    Gradual,
    LayerNorm,
    LowRank,
    Magnitude,
    Recipe,
    Rows,
    SparseGPT,
    SparsityStage,
    StoredFormat,
    Tied,
    Wanda,
    parse_n_m,
)

log = logging.getLogger(__name__)

Kind = Literal["linear", "embedding", "conv", "norm", "parameter"]
Progress = Callable[[int, int, str], None]  # (done, total, module name), after every module of a stage

_MODEL_FORMATS: dict[str, StoredFormat] = {"bfloat16": Bf16(), "float32": Fp32()}


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


_PICTURED = {Role.VISION, Role.PROJECTOR}  # what a text-only Gemma 3 does not have
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


@dataclass(frozen=True)
class PlanRow:
    """One module that owns parameters, and what becomes of it.

    shape: of its weight (of its first parameter where none is called weight), in elements. parameters: all it owns, biases
    included; 0 for the tied head, whose weight is the embedding's. format: as stored; biases and norms are always stored in
    the recipe's `model.dtype`. ratio: the largest ratio a sparsity stage asks of it, None where no stage touches it; for
    layer_norm the recipe's overall ratio until `Plan.with_ratios` puts in the layer's share. bytes: predicted, as stored.
    """

    name: str
    role: Role
    kind: Kind
    shape: tuple[int, ...]
    parameters: int
    format: StoredFormat
    ratio: float | None
    bytes: int

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def is_quantized(self) -> bool:
        """Whether the module is replaced by one of another kind: all formats but floats and a tied head."""
        return not isinstance(self.format, (*FLOATS, Tied))


@dataclass(frozen=True)
class Plan:
    """Every module that owns parameters, in the model's order. `plan[name]` is one row; KeyError for a name without one."""

    rows: tuple[PlanRow, ...]

    def __getitem__(self, name: str) -> PlanRow:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> Mapping[str, PlanRow]:
        return {row.name: row for row in self.rows}

    @property
    def bytes(self) -> int:
        """Predicted size of all weights as stored."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of the model, shared ones counted once."""
        return sum(row.parameters for row in self.rows)

    def prunable(self, stage: SparsityStage) -> tuple[PlanRow, ...]:
        """The linears that a sparsity stage prunes."""
        return tuple(row for row in self.rows if row.kind == "linear" and row.role in stage.roles)

    def quantized(self) -> tuple[PlanRow, ...]:
        """The modules that are replaced by quantized ones: linears, and the table where it is int8."""
        return tuple(row for row in self.rows if row.is_quantized)

    def with_ratios(self, ratios: Mapping[str, float]) -> Plan:
        """The same plan with the asked ratios of the named rows replaced."""
        return Plan(tuple(replace(row, ratio=ratios.get(row.name, row.ratio)) for row in self.rows))

    def to_json(self) -> list[dict[str, object]]:
        """The rows as plain dictionaries that `json.dumps` takes and `from_json` reads back."""
        return _ROWS.dump_python(self.rows, mode="json")

    @classmethod
    def from_json(cls, rows: object) -> Plan:
        """Read `to_json`'s list back. Raises CorruptCheckpoint, since such lists live in checkpoint manifests."""
        try:
            return cls(_ROWS.validate_python(rows))
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
            raise CorruptCheckpoint(f"not a plan: {'; '.join(wrong)}") from None


_ROWS = TypeAdapter(tuple[PlanRow, ...])


def quiet(done: int, total: int, name: str) -> None:
    """The Progress that tells nobody."""


def role_of(module_name: str) -> Role:
    """The role of a module by its name in the model, e.g. `model.language_model.layers.0.mlp.up_proj` → up.

    Only modules that own parameters have one. Raises PlanError for any other name.
    """
    role = _find_role(module_name)
    if role is None:
        raise PlanError(f"{module_name}: no role is known for this module; is this a Gemma 3?")
    return role


def main_parameter(module: nn.Module) -> nn.Parameter | None:
    """The parameter a plan row is about: the weight, else the first one; None where the module owns none."""
    own = dict(module.named_parameters(recurse=False))
    return own.get("weight", next(iter(own.values()), None))


def dropped_count(size: int, ratio: float) -> int:
    """How many of `size` things a ratio drops: Python's round, which takes exact halves to the even count."""
    return round(size * ratio)


@singledispatch
def pool_size(stage: object, shape: tuple[int, ...]) -> int:
    """The number of things among which a stage drops its ratio: the weights of a layer, of a row or of a group of M, or a
    layer's rows or channels.

    shape: [out, in] of one layer. A new method registers its own.
    """
    raise NotImplementedError(f"policy.pool_size knows no {type(stage).__name__}")


@pool_size.register(Magnitude)
@pool_size.register(Gradual)
@pool_size.register(Wanda)
@pool_size.register(SparseGPT)
def _(stage: Magnitude | Gradual | Wanda | SparseGPT, shape: tuple[int, ...]) -> int:
    if n_m := parse_n_m(stage.pattern):
        return n_m[1]
    return shape[1] if stage.pattern == "per_row" else math.prod(shape)


@pool_size.register(LayerNorm)
def _(stage: LayerNorm, shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@pool_size.register(Rows)
def _(stage: Rows, shape: tuple[int, ...]) -> int:
    return shape[0]


def kept_channels(stage: Compact, channels: int) -> int:
    """How many MLP channels a compact stage leaves: (1 − ratio) of them, rounded to the nearest multiple, never 0."""
    return max(1, round(channels * (1 - stage.ratio) / stage.multiple)) * stage.multiple


def plan(model: nn.Module, recipe: Recipe) -> Plan:
    """What the recipe makes of every module of the model, which may be on the meta device. Shapes and bytes are the final ones.

    Linears alone take every format: where `roles.vision` is quantized, the tower's patch convolution and position embedding
    are stored as bf16. Raises one PlanError that lists every offender: unknown modules, an untied head, ratios that would
    drop nothing or everything of a layer, shapes that a format cannot hold, a stage of which no layer has the roles; and one
    for a context beyond the model's positions.

    A text-only Gemma 3 takes every recipe: what one says of vision and projector is left out, with a line in the log.
    """
    final = plan_stages(model, recipe)[-1]
    refuse_context(model, recipe.engine.context)
    return final


def refuse_context(model: nn.Module, context: int) -> None:
    """Raises PlanError for more tokens a slot than the model has positions. A module without a config has no limit."""
    config = getattr(model, "config", None)
    longest = config.get_text_config().max_position_embeddings if config else math.inf
    if context > longest:
        raise PlanError(f"engine.context is {context:,}, and this model's positions end at {longest:,}")


def _named_roles(recipe: Recipe) -> set[Role]:
    """Roles that a stage prunes or a format quantizes. (Float formats ask for nothing.)"""
    quantized = {role for role, stored in recipe.quantization.formats().items() if not isinstance(stored, (*FLOATS, Tied))}
    return {Role(role) for role in quantized.union(*(stage.roles for stage in recipe.sparsity))}


def plan_stages(model: nn.Module, recipe: Recipe) -> tuple[Plan, ...]:
    """The plan before the first sparsity stage, after it, and so on, then after low rank: they differ where shapes change.

    `plans[i]` is what stage i must find, `plans[i + 1]` what it must leave. Raises what `plan` raises.
    """
    rows, problems = _survey(model, recipe)
    plans = [Plan(tuple(rows))]
    for index, stage in enumerate(recipe.sparsity):
        problems += (f"sparsity.{index} ({stage.method}): {problem}" for problem in _misfit_stage(plans[-1], stage))
        plans.append(_after(plans[-1], stage))
    problems += _misfit_ranks(plans[-1], recipe)
    plans.append(_factorized(plans[-1], recipe))
    problems += _misfit_formats(plans[-1])
    if problems:
        raise PlanError(f"the recipe {recipe.name!r} does not fit the model:\n  " + "\n  ".join(problems))
    if ignored := sorted(_named_roles(recipe) & (_PICTURED - {row.role for row in rows})):
        log.info("the model reads text only: what recipe %s says of %s is left out", recipe.name, " and ".join(ignored))
    return tuple(plans)


def _after(before: Plan, stage: SparsityStage) -> Plan:
    """The plan that a stage leaves: compact narrows gate, up and down, the others keep every shape."""
    if not isinstance(stage, Compact):
        return before
    return Plan(tuple(_narrow(row, stage) if row.role in stage.roles else row for row in before.rows))


def _narrow(row: PlanRow, stage: Compact) -> PlanRow:
    channel_dim = 1 if row.role is Role.DOWN else 0
    kept = kept_channels(stage, row.shape[channel_dim])
    shape = (row.shape[0], kept) if channel_dim else (kept, row.shape[1])
    parameters = row.parameters - math.prod(row.shape) + math.prod(shape)
    size = row.bytes - layout.weight_bytes(row.format, row.shape) + layout.weight_bytes(row.format, shape)
    return replace(row, shape=shape, parameters=parameters, bytes=size)


def kept_rank(section: LowRank, shape: tuple[int, ...]) -> int:
    """The rank of a linear [out, in]: for a ratio the nearest multiple, never 0; for an energy the largest that still saves."""
    rows, columns = shape
    even = rows * columns / (rows + columns)  # two factors of this rank are as large as the linear
    if section.ratio is None:
        return max(1, math.ceil(even / section.multiple) - 1) * section.multiple
    return max(1, round(even * (1 - section.ratio) / section.multiple)) * section.multiple


def saves(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether two factors of that rank are smaller than a linear [out, in]."""
    return rank * sum(shape) < math.prod(shape)


def factor_rows(row: PlanRow, rank: int) -> tuple[PlanRow, PlanRow]:
    """The rows of left [out, rank], with the bias if there is one, and right [rank, in], into which low rank turns a linear."""
    (rows, columns), size = row.shape, layout.weight_bytes(row.format, row.shape)
    rest, rest_bytes = row.parameters - math.prod(row.shape), row.bytes - size

    def factor(name: str, shape: tuple[int, int], parameters: int, extra: int) -> PlanRow:
        bytes_ = layout.weight_bytes(row.format, shape) + extra
        name = f"{row.name}.{name}"
        return replace(row, name=name, shape=shape, parameters=math.prod(shape) + parameters, bytes=bytes_, ratio=None)

    return factor("left", (rows, rank), rest, rest_bytes), factor("right", (rank, columns), 0, 0)


def _factorized(before: Plan, recipe: Recipe) -> Plan:
    sections = {role: section for section in recipe.lowrank for role in section.roles}
    rows = [
        factor_rows(row, kept_rank(sections[row.role], row.shape)) if row.role in sections else (row,) for row in before.rows
    ]
    return Plan(tuple(row for group in rows for row in group))


def _misfit_ranks(before: Plan, recipe: Recipe) -> Iterator[str]:
    """Layers that low rank would not make smaller, and roles that no layer has."""
    present = {row.role for row in before.rows}
    for section in recipe.lowrank:
        yield from (f"lowrank: the model has no {role} layer" for role in section.roles if role not in present)
        for row in before.rows:
            if row.role in section.roles and not saves(rank := kept_rank(section, row.shape), row.shape):
                yield f"lowrank: {row.name} {list(row.shape)}: factors of rank {rank} would save nothing"


def planned_weights(model: nn.Module, rows: Iterable[PlanRow]) -> dict[str, nn.Parameter]:
    """Module name → main parameter of these rows. Raises a PlanError naming every one that is missing or has another shape."""
    modules, found, problems = dict(model.named_modules()), dict[str, nn.Parameter](), list[str]()
    for row in rows:
        weight = main_parameter(modules[row.name]) if row.name in modules else None
        if weight is None:
            problems.append(f"{row.name}: the model has no parameters there")
        elif tuple(weight.shape) != row.shape:
            problems.append(f"{row.name}: has shape {list(weight.shape)}, planned was {list(row.shape)}")
        else:
            found[row.name] = weight
    if problems:
        raise PlanError("the model is not the one that was planned:\n  " + "\n  ".join(problems))
    return found


def _find_role(module_name: str) -> Role | None:
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(module_name)), None)


def _survey(model: nn.Module, recipe: Recipe) -> tuple[list[PlanRow], list[str]]:
    """One row per module that owns parameters; and one line per module that cannot have a row."""
    formats = {role: recipe.quantization.of_role(role) for role in Role}
    formats[Role.NORM] = _MODEL_FORMATS[recipe.model.dtype]
    rows, problems, owners = list[PlanRow](), list[str](), dict[nn.Parameter, str]()
    for name, module in model.named_modules():
        weight, role = main_parameter(module), _find_role(name)
        if weight is None:
            continue
        owner = owners.setdefault(weight, name)
        if role is None:
            problems.append(f"{name}: no role is known for this {type(module).__name__}; is this a Gemma 3?")
        elif role is Role.HEAD and owner == name and not (weight.is_meta and _config_ties(model)):
            problems.append(f"{name}: has a weight of its own, and only a head tied to the embedding is supported")
        elif role is not Role.HEAD and owner != name:
            problems.append(f"{name}: shares its weight with {owner}")
        else:
            asked = [stage.ratio for stage in recipe.sparsity if role in stage.roles]
            rows.append(_row(name, role, module, weight, formats, max(asked, default=None)))
    return rows, problems


def _config_ties(model: nn.Module) -> bool:
    """Whether the config ties the head. accelerate's empty models lose the tie itself until their weights are loaded."""
    return getattr(getattr(model, "config", None), "tie_word_embeddings", False) is True


def _row(
    name: str, role: Role, module: nn.Module, weight: nn.Parameter, formats: Mapping[Role, StoredFormat], ratio: float | None
) -> PlanRow:
    kind, stored, shape = _kind(module, role), formats[role], tuple(weight.shape)
    if kind != "linear":
        stored, ratio = stored if role is Role.EMBEDDING or isinstance(stored, FLOATS) else Bf16(), None
    if isinstance(stored, Tied):
        return PlanRow(name, role, kind, shape, 0, stored, ratio, 0)
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    rest = (parameters - weight.numel()) * layout.float_dtype(formats[Role.NORM]).itemsize
    size = layout.weight_bytes(stored, shape) + rest
    return PlanRow(name, role, kind, shape, parameters, stored, ratio, size)


def _kind(module: nn.Module, role: Role) -> Kind:
    match module:
        case nn.Linear():
            return "linear"
        case nn.Embedding():
            return "embedding"
        case nn.Conv2d():
            return "conv"
        case _:
            return "norm" if role is Role.NORM else "parameter"


def _misfit_formats(final: Plan) -> Iterator[str]:
    """Shapes that a format cannot hold."""
    for row in final.quantized():
        if problem := layout.misfit(row.format, row.shape):
            yield f"{row.name} {list(row.shape)} cannot be {row.format}: {problem}"


def _misfit_stage(drawn: Plan, stage: SparsityStage) -> Iterator[str]:
    rows = drawn.prunable(stage)
    present = {row.role for row in rows}
    optional = _PICTURED if present else set[Role]()
    yield from (f"the model has no {role} layer" for role in stage.roles if role not in present | optional)
    yield from _misfit_rows(stage, rows)


@singledispatch
def _misfit_rows(stage: SparsityStage, rows: tuple[PlanRow, ...]) -> Iterator[str]:
    """Layers whose shape does not take what a stage asks."""
    n_m = parse_n_m(getattr(stage, "pattern", ""))
    for row in rows:
        size = pool_size(stage, row.shape)
        count = dropped_count(size, stage.ratio)
        if not 0 < count < size:
            yield f"{row.name} {list(row.shape)}: a ratio of {stage.ratio} would drop {count} of {size}"
        if n_m and row.shape[1] % n_m[1]:
            yield f"{row.name} {list(row.shape)}: rows of {row.shape[1]} do not divide into groups of {n_m[1]}"


@_misfit_rows.register
def _(stage: Compact, rows: tuple[PlanRow, ...]) -> Iterator[str]:
    widths = {row.shape[1] if row.role is Role.DOWN else row.shape[0] for row in rows}
    if len(widths) > 1:
        yield f"the layers have {len(widths)} different MLP widths, and a checkpoint holds one"
    for width in widths:
        if (kept := kept_channels(stage, width)) >= width:
            yield f"a ratio of {stage.ratio} in multiples of {stage.multiple} would keep {kept} of {width} channels"
