"""The sparsity section: score × pattern × schedule, one tagged class a method."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gemma_opt.recipe.section import TEXT_ROLES, PrunableRole, Ratio, Section, TextRole, once


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """(N, M) of "N:M", which keeps N of every M neighbouring weights of a row; None for a pattern of another kind."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def _quoted(pattern: object) -> object:
    if isinstance(pattern, int):
        raise ValueError('YAML reads an unquoted N:M as a number of base 60: write it in quotes, "2:4"')
    return pattern


NM = Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$"), BeforeValidator(_quoted)]


class _Stage(Section):
    """What every stage has. needs_data: the recipe must have a calibration section."""

    needs_data: ClassVar[bool] = False

    ratio: Ratio

    @model_validator(mode="after")
    def _ratio_is_the_patterns(self) -> _Stage:
        shape = parse_n_m(getattr(self, "pattern", ""))
        if shape and not (shape[0] < shape[1] and abs(self.ratio - 1 + shape[0] / shape[1]) < 0.005):
            raise ValueError(f"the pattern keeps {shape[0]} of every {shape[1]} weights: its ratio is not {self.ratio}")
        return self


class _WeightStage(_Stage):
    """A stage that looks at weights alone."""

    roles: Annotated[tuple[PrunableRole, ...], AfterValidator(once)] = Field(default=TEXT_ROLES, min_length=1)


class Magnitude(_WeightStage):
    """Zero the smallest |W|: an exact share of every layer, of every row, of all layers together, or N of every M kept."""

    method: Literal["magnitude"]
    pattern: Literal["per_layer", "per_row", "global"] | NM = "per_layer"


class Schedule(Section):
    """How the ratio grows over the steps of gradual pruning."""

    kind: Literal["linear", "cubic"] = "cubic"
    steps: int = Field(ge=1, le=1000)


class Gradual(_WeightStage):
    """Magnitude pruning in steps. Without training between the steps it ends where one shot ends."""

    method: Literal["gradual"]
    pattern: Literal["per_layer", "per_row"] = "per_layer"
    schedule: Schedule


class LayerNorm(_WeightStage):
    """Layers with small weights give up more: shares in inverse proportion to each layer's RMS weight."""

    method: Literal["layer_norm"]


class Rows(_WeightStage):
    """Zero whole output rows of the smallest L2 norm; shapes stay. Measured to destroy Gemma 3: a reference, not advice."""

    method: Literal["rows"]


Order = Annotated[
    Literal["one_shot", "sequential"],
    Field(description="sequential: each layer is measured behind the pruned layers before it; one_shot: behind dense ones"),
]


class _CalibratedStage(_Stage):
    """A stage that measures the model on calibration data.

    allocation: one ratio for all layers; or "sensitivity", where every output counts by the loss's measured gradient there,
    within a layer and between layers, and the ratio holds exactly over all of them together.
    """

    needs_data: ClassVar[bool] = True

    roles: Annotated[tuple[TextRole, ...], AfterValidator(once)] = Field(default=TEXT_ROLES, min_length=1)
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    order: Order = "sequential"

    @model_validator(mode="after")
    def _layers_can_differ(self) -> _CalibratedStage:
        if self.allocation == "sensitivity" and getattr(self, "pattern", "") != "per_layer":
            raise ValueError("allocation: sensitivity gives every layer a count of its own, which needs pattern: per_layer")
        return self


BlockEpochs = Annotated[
    int,
    Field(
        ge=0, le=100, description="passes over the data in which a layer's kept weights together learn what its dense self gave"
    ),
]


class Wanda(_CalibratedStage):
    """Zero the smallest |W| · ‖x‖: weights count by what they are multiplied with. The kept weights stay as they are."""

    method: Literal["wanda"]
    pattern: Literal["per_layer", "per_row"] | NM = "per_row"


class _Reconstruction(_CalibratedStage):
    """A stage that zeroes weights and moves the others, so that each layer gives what it should.

    damping: share of the mean of the Hessian's diagonal that is added to it. refine: conjugate-gradient steps on the kept
    weights once all masks are known. match: what a layer should give after pruning: its own dense output on the inputs it now
    gets ("own"), or on those of the dense model ("dense", which makes up for earlier layers too). block_epochs: block-wise
    fine-tuning at the end of each layer.
    """

    pattern: Literal["per_layer", "per_row"] | NM = "per_layer"
    damping: float = Field(default=0.01, gt=0, le=1)
    refine: int = Field(default=0, ge=0, le=1000)
    match: Literal["own", "dense"] = "own"
    block_epochs: BlockEpochs = 0


class SparseGPT(_Reconstruction):
    """Zero what the kept weights of its row can best make up for, and let them; without `refine` they keep its own values."""

    method: Literal["sparsegpt"]


class ADMM(_Reconstruction):
    """The same, chosen for all weights at once: slower, and closer.

    steps: of the alternation between fitting the outputs and having the zeros.
    """

    method: Literal["admm"]
    steps: int = Field(default=40, ge=1, le=1000)
    refine: int = Field(default=20, ge=0, le=1000)


class Compact(Section):
    """Take whole MLP channels out of gate, up and down: a smaller and faster model of the same architecture.

    ratio: of channels removed; what is kept is rounded to the nearest `multiple`, the same in every layer. compensate:
    refit the kept columns of down to the dense layer's output. `match`, `damping`, `order`, `block_epochs`: as in SparseGPT.
    """

    needs_data: ClassVar[bool] = True
    roles: ClassVar[tuple[TextRole, ...]] = ("gate", "up", "down")

    method: Literal["compact"]
    ratio: Ratio
    compensate: bool = True
    multiple: int = Field(default=64, ge=1, le=4096)
    damping: float = Field(default=0.01, gt=0, le=1)
    match: Literal["own", "dense"] = "own"
    order: Order = "sequential"
    block_epochs: BlockEpochs = 0


SparsityStage = Annotated[
    Magnitude | Gradual | LayerNorm | Rows | Wanda | SparseGPT | ADMM | Compact, Field(discriminator="method")
]
