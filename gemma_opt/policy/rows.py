"""A plan: one row for every module that owns parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from gemma_opt import layout
from gemma_opt.errors import CorruptCheckpoint, PlanError
from gemma_opt.policy.roles import Role, main_parameter
from gemma_opt.recipe import FLOATS, SparsityStage, StoredFormat, Tied

Kind = Literal["linear", "embedding", "conv", "norm", "parameter"]
Progress = Callable[[int, int, str], None]  # (done, total, module name), after every module of a stage


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


def factor_rows(row: PlanRow, rank: int) -> tuple[PlanRow, PlanRow]:
    """The rows of left [out, rank], with the bias if there is one, and right [rank, in], into which low rank turns a linear."""
    (rows, columns), size = row.shape, layout.weight_bytes(row.format, row.shape)
    rest, rest_bytes = row.parameters - math.prod(row.shape), row.bytes - size

    def factor(name: str, shape: tuple[int, int], parameters: int, extra: int) -> PlanRow:
        bytes_ = layout.weight_bytes(row.format, shape) + extra
        name = f"{row.name}.{name}"
        return replace(row, name=name, shape=shape, parameters=math.prod(shape) + parameters, bytes=bytes_, ratio=None)

    return factor("left", (rows, rank), rest, rest_bytes), factor("right", (rank, columns), 0, 0)


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
