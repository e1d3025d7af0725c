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
from typing import Annotated, ClassVar, Literal

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


def _once(roles: tuple[PrunableRole, ...]) -> tuple[PrunableRole, ...]:
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


# Quantization: the stored format of every weight


class _Format(_Section):
    """One stored format. In YAML its name alone (`int8`), or with options: `{format: int4, group: 32}`.

    needs_data: the recipe must have a calibration section. str(): what tables show.
    """

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


class Int4(_Format):
    """Weight-only: unsigned 4-bit numbers, two in a byte, one bfloat16 scale for every `group` neighbours of a row.

    symmetric: zero is always stored as 8; else every group has a zero point of its own, from 0 to 15. method: how scales and
    zero points are chosen; rtn rounds every weight to the nearest step.
    """

    format: Literal["int4"] = "int4"
    group: Literal[32, 64, 128] = 32
    symmetric: bool = False
    method: Literal["rtn"] = "rtn"

    def __str__(self) -> str:
        return f"int4 g{self.group}{' sym' if self.symmetric else ''}"


class Tied(_Format):
    """The head: no weight of its own, it reads the embedding's table in the embedding's format."""

    format: Literal["tied"] = "tied"


def _long_form(value: object) -> object:
    return {"format": value} if isinstance(value, str) else value


_TAG = Field(discriminator="format")
FLOATS = (Fp32, Bf16, Fp16)
FloatFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16, _TAG], BeforeValidator(_long_form)]
TableFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16 | Int8, _TAG], BeforeValidator(_long_form)]
LinearFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16 | Int8 | Int4, _TAG], BeforeValidator(_long_form)]
HeadFormat = Annotated[Tied, BeforeValidator(_long_form)]
StoredFormat = Annotated[Annotated[Fp32 | Bf16 | Fp16 | Int8 | Int4 | Tied, _TAG], BeforeValidator(_long_form)]


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
    vision: LinearFormat = Bf16()
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

    @property
    def needs_data(self) -> bool:
        """Whether compressing needs calibration data: such a recipe is compressed at build time, never in setup()."""
        formats = self.quantization.formats().values()
        return any(stage.needs_data for stage in self.sparsity) or any(stored.needs_data for stored in formats)

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
        unused = set[str]() if self.needs_data else {"calibration"}
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
