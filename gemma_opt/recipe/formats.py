"""The quantization section: the stored format of every weight, one tagged class a format."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gemma_opt.recipe.section import Section

Activation = Literal["none", "int8_dynamic", "int8_static", "fp8_dynamic", "fp8_static"]
Observer = Annotated[
    Literal["absmax", "percentile", "mse"],
    Field(description="the largest input a scale reaches: all of them, 99.99 %, or what gives the least squared error"),
]
Smooth = Annotated[
    float,
    Field(gt=0, lt=1, description="share of the input channels' unevenness that moves into the weights (SmoothQuant's alpha)"),
]


class _Format(Section):
    """One stored format. In YAML its name alone (`int8`), or with options: `{format: int4, group: 32}`.

    measures: in decoder layers it looks at what the linear receives; without a calibration section that is random tokens.
    needs_data: it measures, and random tokens will not do: the recipe must have that section. activation: what happens to the
    input before the product. str(): what tables show.
    """

    activation: ClassVar[Activation] = "none"

    @property
    def measures(self) -> bool:
        return self.needs_data

    @property
    def needs_data(self) -> bool:
        return False

    def _tree(self, tree: dict[str, object], *, exclude_none: bool) -> object:
        whole = super()._tree(tree, exclude_none=exclude_none)
        return tree["format"] if whole == {"format": tree["format"]} else whole

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


class Smoothed(_Format):
    """Weights and inputs of a layer share their unevenness before they are rounded. smooth: None leaves that out."""

    smooth: Smooth | None = 0.5

    @property
    def measures(self) -> bool:
        return self.needs_data or self.smooth is not None


class Int8Dynamic(Smoothed):
    """int8 rows, and int8 inputs with one scale a token, found when it comes."""

    activation: ClassVar[Activation] = "int8_dynamic"

    format: Literal["int8_dynamic"] = "int8_dynamic"


class Int8Static(Smoothed):
    """int8 rows, and int8 inputs with one scale for all tokens, calibrated once and stored."""

    activation: ClassVar[Activation] = "int8_static"

    format: Literal["int8_static"] = "int8_static"
    observer: Observer = "mse"
    smooth: Smooth | None = 0.65

    @property
    def needs_data(self) -> bool:
        return True


class Int4Weights(Smoothed):
    """4-bit numbers from 0 to 15, two in a byte, one bfloat16 scale for every `group` neighbours of a row.

    symmetric: zero is always stored as 8; else every group has a zero point of its own, from 0 to 15. method: how they are
    chosen: rtn takes the nearest step of the finest grid that reaches all weights; hqq fits the grid to the weights, in
    decoder layers as the inputs they meet weigh them; gptq does too, and lets later columns make up for the rounding of
    earlier ones, as calibration data weighs it. smooth: takes the inputs' large channels into the weights, so that groups
    follow what counts (the idea of AWQ, Lin et al. 2023, arXiv:2306.00978); weights that lie on an int4 grid are left alone.
    """

    group: Literal[32, 64, 128] = 32
    symmetric: bool = False
    method: Literal["rtn", "hqq", "gptq"] = "hqq"

    @property
    def measures(self) -> bool:
        return super().measures or self.method != "rtn"

    @property
    def needs_data(self) -> bool:
        return self.method == "gptq"

    def __str__(self) -> str:
        return f"{super().__str__()} g{self.group}{' sym' if self.symmetric else ''}"


class Int4(Int4Weights):
    """Weight-only int4."""

    format: Literal["int4"] = "int4"


class Int8DynamicInt4(Int4Weights):
    """int4 weights, and int8 inputs with one scale a token: what phones compute with."""

    activation: ClassVar[Activation] = "int8_dynamic"

    format: Literal["int8_dynamic_int4"] = "int8_dynamic_int4"


class Fp8(_Format):
    """Weight-only float8 e4m3, one float32 scale an output row. Without an fp8 kernel all fp8 formats run emulated."""

    format: Literal["fp8"] = "fp8"


class Fp8Dynamic(Smoothed):
    """e4m3 rows, and e4m3 inputs with one scale a token, found when it comes."""

    activation: ClassVar[Activation] = "fp8_dynamic"

    format: Literal["fp8_dynamic"] = "fp8_dynamic"


class Fp8Static(Smoothed):
    """e4m3 rows, and e4m3 inputs with one scale for all tokens, calibrated once and stored."""

    activation: ClassVar[Activation] = "fp8_static"

    format: Literal["fp8_static"] = "fp8_static"
    observer: Observer = "absmax"
    smooth: Smooth | None = 0.65

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


class RoleFormats(Section):
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


class Quantization(Section):
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
