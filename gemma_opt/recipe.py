"""A recipe: everything that changes weights or how they are executed, and nothing that changes one reply.

Recipes are YAML files read into frozen pydantic models. A method is a class of its own, picked by its tag, so an option
that does not apply to a method cannot be written. Reading a recipe needs no torch and no model; whether it fits a model
is `policy.plan`'s question. Only what the package can do is a valid recipe: an unknown key or method is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from gemma_opt.errors import RecipeError, RecipeNotFound

TEXT_ROLES = ("query", "key", "value", "output", "gate", "up", "down")
TextRole = Literal["query", "key", "value", "output", "gate", "up", "down"]
PrunableRole = TextRole | Literal["vision"]
Ratio = Annotated[float, Field(ge=0.01, le=0.8, allow_inf_nan=False)]
_Role = TypeVar("_Role", bound=str)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# The base model


class BaseModelSection(_Section):
    """Where the weights come from: a hub id with its pinned revision, or the bundled model's name, a folder, a `.gguf` file."""

    base: str = Field(min_length=1)
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="activations; fp16 overflows in Gemma 3")

    @model_validator(mode="after")
    def _revision_is_for_hub_ids(self) -> BaseModelSection:
        if self.revision and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base):
            raise ValueError(f"a revision pins a hub id (organisation/name), and {self.base!r} is none")
        return self


# Calibration


class Calibration(_Section):
    """The data on which methods with `needs_data` measure what matters.

    source: text files, JSONL files with pictures (`gemma_opt.calibration` describes both), or "charts", the built-in picture
    task; every source gives an equal share of the windows. seed: which windows.
    """

    source: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    windows: int = Field(default=128, ge=1, le=65_536)
    window_tokens: int = Field(default=512, ge=8, le=32_768)
    seed: int = Field(default=0, ge=0)


# Sparsity: score × pattern × schedule


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """(N, M) of "N:M", which keeps N of every M neighbouring weights of a row; None for a pattern of another kind."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def _quoted(pattern: object) -> object:
    if isinstance(pattern, int):
        raise ValueError('YAML reads an unquoted N:M as a number of base 60: write it in quotes, "2:4"')
    return pattern


NM = Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$"), BeforeValidator(_quoted)]


class _Stage(_Section):
    """What every stage has. needs_data: the recipe must have a calibration section."""

    needs_data: ClassVar[bool] = False

    ratio: Ratio

    @model_validator(mode="after")
    def _ratio_is_the_patterns(self) -> _Stage:
        shape = parse_n_m(getattr(self, "pattern", ""))
        if shape and not (shape[0] < shape[1] and abs(self.ratio - 1 + shape[0] / shape[1]) < 0.005):
            raise ValueError(f"the pattern keeps {shape[0]} of every {shape[1]} weights: its ratio is not {self.ratio}")
        return self


def _once(roles: tuple[_Role, ...]) -> tuple[_Role, ...]:
    if len(set(roles)) != len(roles):
        raise ValueError("a role is named twice")
    return roles


class _WeightStage(_Stage):
    """A stage that looks at weights alone."""

    roles: Annotated[tuple[PrunableRole, ...], AfterValidator(_once)] = Field(default=TEXT_ROLES, min_length=1)


class Magnitude(_WeightStage):
    """Zero the smallest |W|: an exact share of every layer, of every row, of all layers together, or N of every M kept."""

    method: Literal["magnitude"]
    pattern: Literal["per_layer", "per_row", "global"] | NM = "per_layer"


class Schedule(_Section):
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

    roles: Annotated[tuple[TextRole, ...], AfterValidator(_once)] = Field(default=TEXT_ROLES, min_length=1)
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    order: Order = "sequential"

    @model_validator(mode="after")
    def _layers_can_differ(self) -> _CalibratedStage:
        if self.allocation == "sensitivity" and getattr(self, "pattern", "") != "per_layer":
            raise ValueError("allocation: sensitivity gives every layer a count of its own, which needs pattern: per_layer")
        return self


class Wanda(_CalibratedStage):
    """Zero the smallest |W| · ‖x‖: weights count by what they are multiplied with. The kept weights stay as they are."""

    method: Literal["wanda"]
    pattern: Literal["per_layer", "per_row"] | NM = "per_row"


class SparseGPT(_CalibratedStage):
    """Zero what the kept weights of its row can best make up for, and let them.

    damping: share of the mean of the Hessian's diagonal that is added to it. refine: conjugate-gradient steps on the kept
    weights once all masks are known; 0 leaves SparseGPT's own values. match: what a layer should give after pruning: its
    own dense output on the inputs it now gets ("own"), or on those of the dense model ("dense", which makes up for earlier
    layers too).
    """

    method: Literal["sparsegpt"]
    pattern: Literal["per_layer", "per_row"] | NM = "per_layer"
    damping: float = Field(default=0.01, gt=0, le=1)
    refine: int = Field(default=0, ge=0, le=1000)
    match: Literal["own", "dense"] = "own"


class Compact(_Section):
    """Take whole MLP channels out of gate, up and down: a smaller and faster model of the same architecture.

    ratio: of channels removed; what is kept is rounded to the nearest `multiple`, the same in every layer. compensate:
    refit the kept columns of down to the dense layer's output. `match`, `damping`, `order`: as in SparseGPT.
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


SparsityStage = Annotated[Magnitude | Gradual | LayerNorm | Rows | Wanda | SparseGPT | Compact, Field(discriminator="method")]


# Low rank


class LowRank(_Section):
    """Replace each linear of the roles by two thin ones, left · right: a truncated singular value decomposition.

    Exactly one of ratio (of the weights that go) and energy (share of the squared singular values that stays, rounded up)
    sets the rank, a multiple of `multiple`. whiten: decompose the weight times the Cholesky factor of its inputs' second
    moments, so that the output is kept on the calibration data and not the weight. Source: Wang et al. 2024, arXiv:2403.07378.
    """

    roles: Annotated[tuple[TextRole, ...], AfterValidator(_once)] = Field(min_length=1)
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


def _listed(sections: object) -> object:
    return [sections] if isinstance(sections, dict) else sections


# Distillation

TrainedRole = TextRole | Literal["norm", "embedding", "vision", "projector"]


def _named(teacher: object) -> object:
    return {"base": teacher} if isinstance(teacher, str) and teacher != "base" else teacher


class Distill(_Section):
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


# Quantization: the stored format of every weight


Activation = Literal["none", "int8_dynamic", "int8_static", "fp8_dynamic", "fp8_static"]
Observer = Annotated[
    Literal["absmax", "percentile", "mse"],
    Field(description="the largest input a scale reaches: all of them, 99.99 %, or what gives the least squared error"),
]
Smooth = Annotated[
    float,
    Field(gt=0, lt=1, description="share of the input channels' unevenness that moves into the weights (SmoothQuant's alpha)"),
]


class _Format(_Section):
    """One stored format. In YAML its name alone (`int8`), or with options: `{format: int4, group: 32}`.

    needs_data: the recipe must have a calibration section. activation: what happens to the input before the product.
    str(): what tables show.
    """

    activation: ClassVar[Activation] = "none"

    @property
    def needs_data(self) -> bool:
        return False

    @model_serializer(mode="wrap")
    def _shortest(self, whole: SerializerFunctionWrapHandler) -> object:
        tree = whole(self)
        return tree["format"] if len(tree) == 1 else tree

    def __str__(self) -> str:
        return str(getattr(self, "format"))  # noqa: B009 (every subclass has it, as its tag)


class Fp32(_Format):
    """Storage in float32."""

    format: Literal["fp32"] = "fp32"


class Bf16(_Format):
    """Storage in bfloat16."""

    format: Literal["bf16"] = "bf16"


class Fp16(_Format):
    """Storage in float16. Activations never are: Gemma 3's exceed its range."""

    format: Literal["fp16"] = "fp16"


class Int8(_Format):
    """Weight-only: symmetric int8, one float32 scale an output row."""

    format: Literal["int8"] = "int8"


class Int8Dynamic(_Format):
    """int8 rows, and int8 inputs with one scale a token, found when it comes. smooth: needs data; None leaves it out."""

    activation: ClassVar[Activation] = "int8_dynamic"

    format: Literal["int8_dynamic"] = "int8_dynamic"
    smooth: Smooth | None = None

    @property
    def needs_data(self) -> bool:
        return self.smooth is not None


class Int8Static(_Format):
    """int8 rows, and int8 inputs with one scale for all tokens, calibrated once and stored."""

    activation: ClassVar[Activation] = "int8_static"

    format: Literal["int8_static"] = "int8_static"
    observer: Observer = "mse"
    smooth: Smooth | None = 0.5

    @property
    def needs_data(self) -> bool:
        return True


class _Int4Weights(_Format):
    """4-bit numbers from 0 to 15, two in a byte, one bfloat16 scale for every `group` neighbours of a row.

    symmetric: zero is always stored as 8; else every group has a zero point of its own, from 0 to 15. method: how they are
    chosen: rtn takes the nearest step of the finest grid that reaches all weights; hqq fits the grid to the weights; gptq
    does too, and lets later columns make up for the rounding of earlier ones, as calibration data weighs it.
    """

    group: Literal[32, 64, 128] = 32
    symmetric: bool = False
    method: Literal["rtn", "hqq", "gptq"] = "hqq"

    @property
    def needs_data(self) -> bool:
        return self.method == "gptq"

    def __str__(self) -> str:
        return f"{super().__str__()} g{self.group}{' sym' if self.symmetric else ''}"


class Int4(_Int4Weights):
    """Weight-only int4."""

    format: Literal["int4"] = "int4"


class Int8DynamicInt4(_Int4Weights):
    """int4 weights, and int8 inputs with one scale a token: what phones compute with."""

    activation: ClassVar[Activation] = "int8_dynamic"

    format: Literal["int8_dynamic_int4"] = "int8_dynamic_int4"


class Fp8(_Format):
    """Weight-only float8 e4m3, one float32 scale an output row. Without an fp8 kernel all fp8 formats run emulated."""

    format: Literal["fp8"] = "fp8"


class Fp8Dynamic(_Format):
    """e4m3 rows, and e4m3 inputs with one scale a token, found when it comes."""

    activation: ClassVar[Activation] = "fp8_dynamic"

    format: Literal["fp8_dynamic"] = "fp8_dynamic"


class Fp8Static(_Format):
    """e4m3 rows, and e4m3 inputs with one scale for all tokens, calibrated once and stored."""

    activation: ClassVar[Activation] = "fp8_static"

    format: Literal["fp8_static"] = "fp8_static"
    observer: Observer = "absmax"

    @property
    def needs_data(self) -> bool:
        return True


class Tied(_Format):
    """The head: no weight of its own, it reads the embedding's table in the embedding's format."""

    format: Literal["tied"] = "tied"


def _long_form(value: object) -> object:
    return {"format": value} if isinstance(value, str) else value


_TAG = Field(discriminator="format")
FLOATS = (Fp32, Bf16, Fp16)
FP8_FORMATS = (Fp8, Fp8Dynamic, Fp8Static)
FloatFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16, _TAG], BeforeValidator(_long_form)]
TableFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16 | Int8, _TAG], BeforeValidator(_long_form)]
_Linear = Fp32 | Bf16 | Fp16 | Int8 | Int8Dynamic | Int8Static | Int4 | Int8DynamicInt4 | Fp8 | Fp8Dynamic | Fp8Static
LinearFormat = Annotated[Annotated[_Linear, _TAG], BeforeValidator(_long_form)]
HeadFormat = Annotated[Tied, BeforeValidator(_long_form)]
StoredFormat = Annotated[Annotated[_Linear | Tied, _TAG], BeforeValidator(_long_form)]


def _without_data(chosen: LinearFormat) -> LinearFormat:
    if chosen.needs_data:
        raise ValueError(f"{chosen} measures its inputs, which calibration does in the text layers only")
    return chosen


VisionFormat = Annotated[LinearFormat, AfterValidator(_without_data)]


class RoleFormats(_Section):
    """Formats by role. An unnamed text role takes `Quantization.default`.

    vision: the tower's linears; in a quantized format, its patch convolution and position embedding are stored as bf16.
    embedding: int8 makes one table of int8 rows that embedding and head share.
    """

    query: LinearFormat | None = None
    key: LinearFormat | None = None
    value: LinearFormat | None = None
    output: LinearFormat | None = None
    gate: LinearFormat | None = None
    up: LinearFormat | None = None
    down: LinearFormat | None = None
    vision: VisionFormat = Bf16()
    projector: FloatFormat = Bf16()
    embedding: TableFormat = Bf16()
    head: HeadFormat = Tied()


class Quantization(_Section):
    """The stored format of every weight. Float formats are storage: activations stay in `model.dtype`.

    Norms are stored in `model.dtype`.
    """

    default: LinearFormat = Field(default=Bf16(), description="text linears")
    roles: RoleFormats = RoleFormats()

    def of_role(self, role: str) -> StoredFormat:
        """The format of the role's weights."""
        chosen = getattr(self.roles, role, None)
        return self.default if chosen is None else chosen

    def formats(self) -> dict[str, StoredFormat]:
        """Role → format, every role that has one."""
        return {role: self.of_role(role) for role in RoleFormats.model_fields}


# Compilation, engine


class Compile(_Section):
    """Which hot submodules `setup()` compiles, `none` for none. A failed compilation is an error unless the recipe says so."""

    targets: tuple[Literal["decode", "mlp", "vision"], ...] = ()
    on_failure: Literal["error", "eager"] = "error"

    @field_validator("targets", mode="before")
    @classmethod
    def _read_none(cls, value: object) -> object:
        return () if value in ("none", ["none"]) else value

    @model_validator(mode="after")
    def _no_overlap(self) -> Compile:
        if {"decode", "mlp"} <= set(self.targets):
            raise ValueError("'decode' compiles the whole step, MLPs included: name one of decode and mlp")
        return self


class EngineSection(_Section):
    """How requests are served: at once, waiting, tokens a slot can hold, wall-clock limit of one reply.

    kind: `reference` is transformers' own decoding, one request at a time. prefill_chunk: tokens of a prompt read between
    two decode steps. lookup: longest guess of speculative decoding by prompt lookup, 0 for none; it never changes a reply.
    """

    kind: Literal["fast", "reference"] = "fast"
    slots: int = Field(default=1, ge=1, le=64)
    queue: int = Field(default=16, ge=0, le=1024)
    context: int = Field(default=8192, ge=16, le=131_072)
    timeout_s: float = Field(default=300.0, gt=0, le=86_400)
    prefill_chunk: int = Field(default=512, ge=16, le=8192)
    lookup: int = Field(default=0, ge=0, le=15)


class Recipe(_Section):
    """One way to compress one model. See the module docstring; `digest()` identifies what was built."""

    name: Name
    description: str = ""
    model: BaseModelSection
    calibration: Calibration | None = None
    sparsity: tuple[SparsityStage, ...] = ()
    lowrank: Annotated[tuple[LowRank, ...], BeforeValidator(_listed)] = ()
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
        methods = [stage.method for stage in self.sparsity]
        if "compact" in methods[1:] and set(methods[: len(methods) - methods[::-1].index("compact")]) != {"compact"}:
            raise ValueError("sparsity: compact refits whole columns and would revive earlier zeros: put it first")
        return self

    @model_validator(mode="after")
    def _targets_fit_the_engine(self) -> Recipe:
        if self.engine.kind == "fast" and "mlp" in self.compile.targets:
            raise ValueError("compile: the fast engine runs no MLP modules that 'mlp' could compile; name decode or vision")
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
        return isinstance(self.quantization.of_role(role), _Int4Weights)

    @model_validator(mode="after")
    def _low_rank_keeps_what_is_there(self) -> Recipe:
        named = [role for section in self.lowrank for role in section.roles]
        if twice := sorted({role for role in named if named.count(role) > 1}):
            raise ValueError(f"lowrank: {', '.join(twice)} named twice")
        zeroed = {role for stage in self.sparsity if not isinstance(stage, Compact) for role in stage.roles}
        if lost := [role for role in named if role in zeroed]:
            raise ValueError(f"lowrank: the factors of {', '.join(lost)} would be dense, and the zeros of sparsity lost")
        if self.lowrank and self.engine.kind != "reference":
            raise ValueError("lowrank: the fast engine packs no factors; set engine.kind: reference")
        return self

    @model_validator(mode="after")
    def _distillation_fits(self) -> Recipe:
        if self.distill is None:
            return self
        if self.distill.precision == "float32" and self.model.dtype != "float32":
            raise ValueError("distill: precision float32 needs model.dtype float32")
        formats = self.quantization.formats().values()
        if self.distill.quantized and (measured := sorted({str(stored) for stored in formats if stored.needs_data})):
            raise ValueError(f"distill: quantized rounds by the weights alone, and {', '.join(measured)} measure data")
        if self.distill.quantized and all(isinstance(stored, (*FLOATS, Tied)) for stored in formats):
            raise ValueError("distill: quantized, and the quantization section has float formats only")
        if self.distill.steps < self.recovery_phases:
            raise ValueError(f"distill: {self.distill.steps} steps for {self.recovery_phases} phases of gradual pruning")
        return self

    @property
    def recovery_phases(self) -> int:
        """How many times the model is trained: after every step of a gradual stage but its last, and at the end."""
        return 1 + sum(stage.schedule.steps - 1 for stage in self.sparsity if isinstance(stage, Gradual))

    @property
    def needs_calibration(self) -> bool:
        """Whether a stage or a format reads the calibration section."""
        formats = self.quantization.formats().values()
        return (
            any(stage.needs_data for stage in self.sparsity)
            or any(section.whiten for section in self.lowrank)
            or any(stored.needs_data for stored in formats)
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
        text = _read_source(source)
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
        return cls.from_tree(tree, str(source), overrides)

    @classmethod
    def from_tree(cls, tree: object, where: str, overrides: tuple[str, ...] = ()) -> Recipe:
        """Validate a parsed YAML tree. `where` names it in errors."""
        if not isinstance(tree, dict):
            raise RecipeError(f"{where} is not a mapping of recipe sections")
        for override in overrides:
            _set_path(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(f"{where}: {'; '.join(_explain(error))}") from None

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """sha256 over all that decides the stored weights: not the name and description, nor how they are executed."""
        unused = set[str]() if self.needs_calibration else {"calibration"}
        content = self.model_dump(mode="json", exclude={"name", "description", "compile", "engine"} | unused)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def packaged_recipes() -> dict[str, str]:
    """Name → YAML text of every recipe in the package."""
    folder = resources.files("gemma_opt") / "recipes"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in files}


def _read_source(source: str | Path) -> str:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeNotFound(f"no recipe file {path}")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not UTF-8 text") from None
    packaged = packaged_recipes()
    if str(source) not in packaged:
        raise RecipeNotFound(f"no recipe named {str(source)!r}; packaged recipes: {', '.join(packaged)}; or give a .yaml file")
    return packaged[str(source)]


def _set_path(tree: dict[str, object], override: str) -> None:
    """Apply one `sparsity.0.ratio=0.3`. The value is YAML, so numbers, lists and null work."""
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"override {override!r} is not KEY=VALUE, as in sparsity.0.ratio=0.3")
    node: object = tree
    *parents, last = path.split(".")
    for key in parents:
        if isinstance(node, dict) and key not in node:
            node[key] = {}
        node = _child(node, key, override)
    if isinstance(node, list):
        index = _index(node, last, override)
        node[index : index + 1] = [yaml.safe_load(value)]
    elif isinstance(node, dict):
        node[last] = yaml.safe_load(value)
    else:
        raise RecipeError(f"override {override!r}: there is no section to hold {last!r}")


def _child(node: object, key: str, override: str) -> object:
    if isinstance(node, dict):
        return node[key]
    if isinstance(node, list):
        return node[_index(node, key, override)]
    raise RecipeError(f"override {override!r}: {key!r} is inside a plain value")


def _index(node: list[object], key: str, override: str) -> int:
    if not re.fullmatch(r"\d+", key) or int(key) >= len(node):
        raise RecipeError(f"override {override!r}: the list has {len(node)} entries, {key!r} is not one of them")
    return int(key)


def _explain(error: ValidationError) -> Iterator[str]:
    """One short line per offending key: where, what is wrong, what was given."""
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
            continue
        given = item["input"]
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
        yield f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}"
