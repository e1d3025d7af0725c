"""The recipe itself: all sections, and what they demand of each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator

from gemma_opt.errors import RecipeError
from gemma_opt.recipe.execution import Compile, EngineSection
from gemma_opt.recipe.formats import FLOATS, Fp32, Int4Weights, Quantization, Tied
from gemma_opt.recipe.reading import explain, parse_yaml, read_source, set_path
from gemma_opt.recipe.section import Name, Section
from gemma_opt.recipe.source import BaseModelSection, Calibration
from gemma_opt.recipe.sparsity import Compact, Gradual, SparsityStage, parse_n_m
from gemma_opt.recipe.training import Distill, LowRank, listed


class Recipe(Section):
    """One way to compress one model. See the module docstring; `digest()` identifies what was built."""

    name: Name
    description: str = ""
    model: BaseModelSection
    calibration: Calibration | None = None
    sparsity: tuple[SparsityStage, ...] = ()
    lowrank: Annotated[tuple[LowRank, ...], BeforeValidator(listed)] = ()
    distill: Distill | None = None
    quantization: Quantization = Quantization()
    compile: Compile = Compile()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _storage_fits_activations(self) -> Recipe:
        formats = [self.quantization.default, *self.quantization.formats().values()]
        if self.model.dtype != "float32" and any(isinstance(stored, Fp32) for stored in formats):
            raise ValueError("quantization: fp32 weights need model.dtype float32")
        return self

    @model_validator(mode="after")
    def _data_is_there(self) -> Recipe:
        needing: list[str] = [stage.method for stage in self.sparsity if stage.needs_data]
        needing += ["lowrank with whiten"] * any(section.whiten for section in self.lowrank)
        needing += sorted({str(stored) for stored in self.quantization.formats().values() if stored.needs_data})
        if needing and self.calibration is None:
            raise ValueError(f"{', '.join(needing)} need data: add a section `calibration: {{source: [text.txt]}}`")
        return self

    @model_validator(mode="after")
    def _compact_comes_first(self) -> Recipe:
        methods = [stage.method for stage in self.sparsity]
        if methods != sorted(methods, key=lambda method: method != "compact"):
            raise ValueError("sparsity: compact refits whole columns and would revive earlier zeros: put it first")
        return self

    @model_validator(mode="after")
    def _targets_fit_the_engine(self) -> Recipe:
        if self.engine.kind == "fast" and "mlp" in self.compile.targets:
            raise ValueError("compile: the fast engine runs no MLP modules that 'mlp' could compile; name vision")
        return self

    @model_validator(mode="after")
    def _pairs_make_sense(self) -> Recipe:
        for stage in self.sparsity:
            packed = {str(self.quantization.of_role(role)) for role in stage.roles if self._is_int4(role)}
            if packed and parse_n_m(getattr(stage, "pattern", "")):
                raise ValueError(
                    f"sparsity: {stage.method} keeps N:M for sparse tensor cores, and none multiply {' or '.join(packed)}: the "
                    "zeros would cost quality and save nothing. Take int8 or bf16 with the pattern, or int4 without it"
                )
        return self

    def _is_int4(self, role: str) -> bool:
        return isinstance(self.quantization.of_role(role), Int4Weights)

    @model_validator(mode="after")
    def _low_rank_keeps_what_is_there(self) -> Recipe:
        named = [role for section in self.lowrank for role in section.roles]
        if twice := sorted({role for role in named if named.count(role) > 1}):
            raise ValueError(f"lowrank: {', '.join(twice)} named twice")
        zeroed = {role for stage in self.sparsity if not isinstance(stage, Compact) for role in stage.roles}
        if lost := [role for role in named if role in zeroed]:
            raise ValueError(f"lowrank: the factors of {', '.join(lost)} would be dense, and the zeros of sparsity lost")
        return self

    @model_validator(mode="after")
    def _distillation_fits(self) -> Recipe:
        if self.distill is None:
            return self
        if self.distill.precision == "float32" and self.model.dtype != "float32":
            raise ValueError("distill: precision float32 needs model.dtype float32")
        formats = self.quantization.formats().values()
        if self.distill.quantized and (measured := sorted({str(stored) for stored in formats if stored.measures})):
            raise ValueError(
                f"distill: quantized rounds by the weights alone, and {', '.join(measured)} measure their inputs: "
                "set `smooth: null`, and for int4 `method: rtn`"
            )
        if self.distill.quantized and all(isinstance(stored, (*FLOATS, Tied)) for stored in formats):
            raise ValueError("distill: quantized, and the quantization section has float formats only")
        if self.distill.steps < self.recovery_phases:
            raise ValueError(f"distill: {self.distill.steps} steps for {self.recovery_phases} phases of gradual pruning")
        return self

    @property
    def compiled(self) -> tuple[str, ...]:
        """The compile targets that torch compiles: with the fast engine not `decode`, it has a decode step of its own."""
        return tuple(target for target in self.compile.targets if target != "decode" or self.engine.kind == "reference")

    @property
    def recovery_phases(self) -> int:
        """How many times the model is trained: after every step of a gradual stage but its last, and at the end."""
        return 1 + sum(stage.schedule.steps - 1 for stage in self.sparsity if isinstance(stage, Gradual))

    @property
    def needs_calibration(self) -> bool:
        """Whether a stage or a format reads the calibration section: it must, or it can and there is one."""
        formats = self.quantization.formats().values()
        return (
            any(stage.needs_data for stage in self.sparsity)
            or any(section.whiten for section in self.lowrank)
            or any(stored.needs_data or (stored.measures and self.calibration is not None) for stored in formats)
        )

    @property
    def needs_data(self) -> bool:
        """Whether compressing reads data: such a recipe is compressed at build time, never in setup()."""
        return self.needs_calibration or self.distill is not None

    @classmethod
    def load(cls, source: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file, or the packaged recipe of that name, then apply `a.b.0=value` overrides.

        Raises RecipeNotFound, or RecipeError that lists every offending key.
        """
        return cls.from_tree(parse_yaml(read_source(source), str(source)), str(source), overrides)

    @classmethod
    def from_tree(cls, tree: object, where: str, overrides: tuple[str, ...] = ()) -> Recipe:
        """Validate a parsed YAML tree. `where` names it in errors."""
        if not isinstance(tree, dict):
            raise RecipeError(f"{where} is not a mapping of recipe sections")
        for override in overrides:
            set_path(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(f"{where}: {'; '.join(explain(error))}") from None

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """sha256 over all that decides the stored weights: not the name and description, nor how they are executed."""
        unused = set[str]() if self.needs_calibration else {"calibration"}
        content = self.model_dump(mode="json", exclude={"name", "description", "compile", "engine"} | unused)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
