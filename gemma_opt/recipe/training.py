"""Low rank and distillation: what replaces linears by thinner ones, and what trains the model afterwards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gemma_opt.recipe.section import TEXT_ROLES, Ratio, Section, TextRole, once
from gemma_opt.recipe.source import BaseModelSection, Calibration


class LowRank(Section):
    """Replace each linear of the roles by two thin ones, left · right: a truncated singular value decomposition.

    Exactly one of ratio (of the weights that go) and energy (share of the squared singular values that stays, rounded up)
    sets the rank, a multiple of `multiple`. whiten: decompose the weight times the Cholesky factor of its inputs' second
    moments, so that the output is kept on the calibration data and not the weight. Source: Wang et al. 2024, arXiv:2403.07378.
    """

    roles: Annotated[tuple[TextRole, ...], AfterValidator(once)] = Field(min_length=1)
    ratio: Ratio | None = None
    energy: float | None = Field(default=None, gt=0, lt=1)
    whiten: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)
    multiple: int = Field(default=8, ge=1, le=4096)

    @model_validator(mode="after")
    def _one_target(self) -> LowRank:
        if (self.ratio is None) == (self.energy is None):
            raise ValueError("give exactly one of ratio and energy")
        return self


def listed(sections: object) -> object:
    """One section may stand without its list."""
    return [sections] if isinstance(sections, dict) else sections


TrainedRole = TextRole | Literal["norm", "embedding", "vision", "projector"]


def _named(teacher: object) -> object:
    return {"base": teacher} if isinstance(teacher, str) and teacher != "base" else teacher


class Distill(Section):
    """Recovery training: the student learns the teacher's next-token distributions. Comes after sparsity and low rank,
    before quantization.

    teacher: "base", the model before compression; or another Gemma 3 with the same tokenizer. data: as `calibration.source`;
    `windows` of them are drawn and seen over and over, `batch` a step. steps: of the optimizer, in all; a gradual stage of S
    steps gets equal shares of them for each of its first S − 1 pruning steps. Pruned weights stay exactly zero.
    """

    teacher: Annotated[Literal["base"] | BaseModelSection, BeforeValidator(_named)] = "base"
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    windows: int = Field(default=512, ge=1, le=1_000_000)
    window_tokens: int = Field(default=256, ge=8, le=32_768)
    seed: int = Field(default=0, ge=0, description="which windows, and their order")
    steps: int = Field(ge=1, le=1_000_000)
    batch: int = Field(default=8, ge=1, le=4096, description="windows an optimizer step")
    micro_batch: int = Field(default=4, ge=1, le=4096, description="windows in memory at once; changes rounding only")
    temperature: float = Field(default=1.0, ge=0.1, le=20)
    top_k: int = Field(default=64, ge=0, le=4096, description="teacher logits kept on disk; 0: all, the teacher runs along")
    negatives: int = Field(default=0, ge=0, description="tokens drawn to stand for those no teacher of the batch likes; 0: all")
    hidden: float = Field(default=0.0, ge=0, le=100, description="weight of the hidden states' relative squared error")
    learning_rate: float = Field(default=5e-5, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    roles: tuple[TrainedRole, ...] = Field(default=(*TEXT_ROLES, "norm"), min_length=1, description="what is trained")
    precision: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of products; weights train in float32")
    quantized: bool = Field(default=False, description="train linears behind the rounding that the quantization section does")

    @model_validator(mode="after")
    def _terms_fit_each_other(self) -> Distill:
        if self.hidden and self.top_k:
            raise ValueError("hidden states are not kept on disk: `hidden` needs top_k: 0")
        if self.negatives and not self.top_k:
            raise ValueError("`negatives` stand beside a teacher's top_k, and that is 0")
        return self

    @property
    def calibration(self) -> Calibration:
        """The data in the words of the calibration section."""
        return Calibration(source=self.data, windows=self.windows, window_tokens=self.window_tokens, seed=self.seed)
