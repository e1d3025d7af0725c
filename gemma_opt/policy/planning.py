"""What a recipe makes of every module of a model: the one place that decides whether it fits.

Reads names and shapes only, so it works on the meta device before a single weight is loaded, and lists every offender at
once. A module that owns parameters and is unknown is an error, never silently skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import singledispatch

from torch import nn

from gemma_opt import layout
from gemma_opt.errors import PlanError
from gemma_opt.policy.counts import dropped_count, kept_channels, kept_rank, pool_size, saves
from gemma_opt.policy.roles import PICTURED, Role, find_role, main_parameter
from gemma_opt.policy.rows import Kind, Plan, PlanRow, factor_rows
from gemma_opt.recipe import FLOATS, Bf16, Compact, Fp32, Recipe, SparsityStage, StoredFormat, Tied, parse_n_m

log = logging.getLogger(__name__)

_MODEL_FORMATS: dict[str, StoredFormat] = {"bfloat16": Bf16(), "float32": Fp32()}


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
    if ignored := sorted(_named_roles(recipe) & (PICTURED - {row.role for row in rows})):
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


def _factorized(before: Plan, recipe: Recipe) -> Plan:
    sections = {role: section for section in recipe.lowrank for role in section.roles}
    rows = [
        factor_rows(row, kept_rank(sections[row.role], row.shape)) if row.role in sections else (row,) for row in before.rows
    ]
    return Plan(tuple(row for group in rows for row in group))


def _survey(model: nn.Module, recipe: Recipe) -> tuple[list[PlanRow], list[str]]:
    """One row per module that owns parameters; and one line per module that cannot have a row."""
    formats = {role: recipe.quantization.of_role(role) for role in Role}
    formats[Role.NORM] = _MODEL_FORMATS[recipe.model.dtype]
    rows, problems, owners = list[PlanRow](), list[str](), dict[nn.Parameter, str]()
    for name, module in model.named_modules():
        weight, role = main_parameter(module), find_role(name)
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


def _misfit_ranks(before: Plan, recipe: Recipe) -> Iterator[str]:
    """Layers that low rank would not make smaller, and roles that no layer has."""
    present = {row.role for row in before.rows}
    for section in recipe.lowrank:
        yield from (f"lowrank: the model has no {role} layer" for role in section.roles if role not in present)
        for row in before.rows:
            if row.role in section.roles and not saves(rank := kept_rank(section, row.shape), row.shape):
                yield f"lowrank: {row.name} {list(row.shape)}: factors of rank {rank} would save nothing"


def _misfit_formats(final: Plan) -> Iterator[str]:
    """Shapes that a format cannot hold."""
    for row in final.quantized():
        if problem := layout.misfit(row.format, row.shape):
            yield f"{row.name} {list(row.shape)} cannot be {row.format}: {problem}"


def _misfit_stage(drawn: Plan, stage: SparsityStage) -> Iterator[str]:
    rows = drawn.prunable(stage)
    present = {row.role for row in rows}
    optional = PICTURED if present else set[Role]()
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
