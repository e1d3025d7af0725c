"""What a recipe will need before anything is built: memory by role and format, KV cache, and the speed bandwidth allows.

Arithmetic on shapes only: the model lies on the meta device. Weights and KV cache are exact; the workspace is what the fast
engine takes on a GPU (see `workspace`). The speeds are upper bounds: at one request a decode step reads every weight of the
text model once and the whole KV cache, and no GPU does that faster than its memory bandwidth. Real engines reach 40 to 80 %.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.table import Table

from gemma_opt import gemma
from gemma_opt.errors import UsageError
from gemma_opt.policy import Plan, PlanRow, Role
from gemma_opt.policy import plan as make_plan
from gemma_opt.recipe import FLOATS, EngineSection, Recipe, Tied
from gemma_opt.recipe.reading import explain
from gemma_opt.shapes import TEXT, shape_name
from gemma_opt.workspace import Workspace, workspace


@dataclass(frozen=True)
class Gpu:
    """Facts of one GPU: memory (decimal GB, as sold) and memory bandwidth (GB/s), from the maker's data sheet."""

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    source: str


GPUS: dict[str, Gpu] = {
    "t4": Gpu("T4", 16, 320, "NVIDIA T4 data sheet"),
    "l4": Gpu("L4", 24, 300, "NVIDIA L4 data sheet"),
    "a10g": Gpu("A10G", 24, 600, "NVIDIA A10 data sheet; AWS G5 instances"),
    "3090": Gpu("RTX 3090", 24, 936, "NVIDIA Ampere GA102 white paper"),
    "4090": Gpu("RTX 4090", 24, 1008, "NVIDIA Ada white paper"),
    "l40s": Gpu("L40S", 48, 864, "NVIDIA L40S data sheet"),
    "a100": Gpu("A100 80GB SXM", 80, 2039, "NVIDIA A100 data sheet"),
    "h100": Gpu("H100 SXM", 80, 3350, "NVIDIA H100 data sheet"),
    "h200": Gpu("H200 SXM", 141, 4800, "NVIDIA H200 data sheet"),
}


@dataclass(frozen=True)
class Weights:
    """All weights of one role and format. Bytes in a checkpoint, in memory, and read for every decoded token.

    Float weights rest in `model.dtype`, whatever they are stored as. A tied head holds nothing and reads the whole table.
    """

    role: Role
    format: str
    layers: int
    parameters: int
    stored_bytes: int
    resident_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class KvCache:
    """Bytes of keys and values. Sliding layers keep their window only.

    token_bytes: a new token's, in all layers; late_token_bytes: growth a token beyond the window (full layers only).
    """

    window: int
    token_bytes: int
    late_token_bytes: int

    def bytes_at(self, tokens: int) -> int:
        """What a slot with that many tokens holds, and a decode step reads."""
        return self.late_token_bytes * tokens + (self.token_bytes - self.late_token_bytes) * min(tokens, self.window)


@dataclass(frozen=True)
class Sizing:
    """The whole answer for one recipe on one shape. position: tokens in each slot for which speeds are given."""

    recipe: str
    model: str
    context: int
    slots: int
    position: int
    weights: tuple[Weights, ...]
    kv: KvCache
    workspace: Workspace

    @property
    def stored_bytes(self) -> int:
        """Size of the checkpoint's tensors."""
        return sum(part.stored_bytes for part in self.weights)

    @property
    def resident_bytes(self) -> int:
        """Weights in memory."""
        return sum(part.resident_bytes for part in self.weights)

    @property
    def read_bytes(self) -> int:
        """Weights read for one decode step."""
        return sum(part.read_bytes for part in self.weights)

    @property
    def kv_bytes(self) -> int:
        """KV cache of all slots, full."""
        return self.slots * self.kv.bytes_at(self.context)

    @property
    def total_bytes(self) -> int:
        """Peak: weights, full KV cache, workspace."""
        return self.resident_bytes + self.kv_bytes + self.workspace.total

    def tokens_per_second(self, gpu: Gpu, slots: int = 1) -> float:
        """Upper bound of decoded tokens a second, all of `slots` busy slots together, at `position`."""
        return slots * gpu.bandwidth_gb_s * 1e9 / (self.read_bytes + slots * self.kv.bytes_at(self.position))

    def to_json(self, gpus: list[Gpu]) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {
            **asdict(self),
            "stored_bytes": self.stored_bytes,
            "resident_bytes": self.resident_bytes,
            "weight_bytes_read_per_token": self.read_bytes,
            "kv_bytes_per_slot": self.kv.bytes_at(self.context),
            "kv_bytes_read_per_token": self.kv.bytes_at(self.position),
            "workspace_bytes": self.workspace.total,
            "total_bytes": self.total_bytes,
            "gpus": [
                asdict(gpu)
                | {
                    "fits": self.total_bytes <= gpu.memory_gb * 1e9,
                    "tokens_per_second": self.tokens_per_second(gpu),
                    "tokens_per_second_all_slots": self.tokens_per_second(gpu, self.slots),
                }
                for gpu in gpus
            ],
        }


def find_gpus(names: list[str]) -> list[Gpu]:
    """The named GPUs, or all. Raises UsageError."""
    unknown = [name for name in names if name.lower() not in GPUS]
    if unknown:
        raise UsageError(f"no facts about {', '.join(unknown)}; known GPUs: {', '.join(GPUS)}")
    return [GPUS[name.lower()] for name in names or GPUS]


def find_config(model: str) -> tuple[str, gemma.GemmaConfig]:
    """Name and config of a shape, hub id of a published size, bundled model or folder. Raises UsageError, BaseModelError."""
    if shape := shape_name(model):
        return shape, gemma.named_config(shape)
    folder = gemma.BUNDLED.get(model, Path(model).expanduser())
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model} is neither a folder with config.json nor a published size: {', '.join(TEXT)}")
    return model, gemma.read_config(folder)


def _with_engine(recipe: Recipe, asked: dict[str, int | None]) -> Recipe:
    """The recipe with the asked engine settings, None for its own. Raises UsageError for what no recipe could say."""
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        engine = EngineSection.model_validate(recipe.engine.model_dump() | given)
    except ValidationError as error:
        raise UsageError("; ".join(explain(error))) from None
    return recipe.model_copy(update={"engine": engine})


def size_up(
    recipe: Recipe, model: str | None = None, *, context: int | None = None, slots: int | None = None, position: int = 512
) -> Sizing:
    """Size a recipe up for a model (by default its own base). Raises UsageError, PlanError, BaseModelError.

    context, slots: by default the recipe's, and within a recipe's limits. position: tokens in a slot for which read bytes and
    speeds are given.
    """
    recipe = _with_engine(recipe, {"context": context, "slots": slots})
    name, config = find_config(model or recipe.model.base)
    dtype, settings = gemma.DTYPES[recipe.model.dtype], recipe.engine
    context, slots = settings.context, settings.slots
    planned = make_plan(gemma.empty_model(config, dtype), recipe)
    return Sizing(
        recipe=recipe.name,
        model=name,
        context=context,
        slots=slots,
        position=min(position, context),
        weights=weights_by_role(planned, dtype),
        kv=kv_cache(config, dtype, settings.lookup),
        workspace=workspace(config, planned, dtype, context, slots, settings.prefill_chunk),
    )


def weights_by_role(planned: Plan, dtype: torch.dtype) -> tuple[Weights, ...]:
    """The plan's rows added up by role and format, in the order of `Role`."""
    table = next(row for row in planned.rows if row.role is Role.EMBEDDING)
    groups: dict[tuple[Role, str], list[PlanRow]] = defaultdict(list)
    for row in planned.rows:
        groups[row.role, str(row.format)].append(row)
    order = list(Role)
    return tuple(
        Weights(
            role=role,
            format=stored,
            layers=len(rows),
            parameters=sum(row.parameters for row in rows),
            stored_bytes=sum(row.bytes for row in rows),
            resident_bytes=sum(resident_bytes(row, dtype) for row in rows),
            read_bytes=sum(_read_bytes(row, table, dtype) for row in rows),
        )
        for (role, stored), rows in sorted(groups.items(), key=lambda item: order.index(item[0][0]))
    )


def resident_bytes(row: PlanRow, dtype: torch.dtype) -> int:
    """Bytes of a planned module in memory, where float weights have the dtype the model computes in."""
    return row.parameters * dtype.itemsize if isinstance(row.format, FLOATS) else row.bytes


def _read_bytes(row: PlanRow, table: PlanRow, dtype: torch.dtype) -> int:
    """Bytes of a planned module that one decoded token reads: pictures are not looked at again."""
    if "vision_tower" in row.name or "multi_modal_projector" in row.name:
        return 0
    if row.role is Role.EMBEDDING:
        return resident_bytes(row, dtype) // row.shape[0]
    return resident_bytes(table if isinstance(row.format, Tied) else row, dtype)


def kv_cache(config: gemma.GemmaConfig, dtype: torch.dtype, guesses: int = 0) -> KvCache:
    """The KV cache of a config, keys and values kept in `dtype`. guesses: tokens of a guess that may be taken back."""
    text = config.get_text_config()
    layer = 2 * text.num_key_value_heads * text.head_dim * dtype.itemsize
    full = sum(kind == "full_attention" for kind in text.layer_types)
    return KvCache(text.sliding_window + guesses, layer * len(text.layer_types), layer * full)


# Tables for people

_WORKSPACE = {
    "pictures": "cache of encoded pictures, full",
    "libraries": "cuBLAS",
    "step": "logits, seen tokens, intermediates of a step",
    "prefill": "a chunk of a prompt, while it is read",
    "picture": "a picture, while it is encoded",
    "sampling": "tokens being drawn with every filter",
}


def memory_table(sizing: Sizing) -> Table:
    """Where the bytes are."""
    title = f"{sizing.recipe} on {sizing.model}: memory with {sizing.slots} × {sizing.context:,} tokens"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("format")
    for heading, footer in (
        ("parameters", f"{sum(part.parameters for part in sizing.weights):,}"),
        ("checkpoint", _size(sizing.stored_bytes)),
        ("in memory", _size(sizing.total_bytes)),
        ("read a token", _size(sizing.read_bytes + sizing.kv.bytes_at(sizing.position))),
    ):
        table.add_column(heading, footer=footer, justify="right")
    for part in sizing.weights:
        sizes = (_size(count) for count in (part.stored_bytes, part.resident_bytes, part.read_bytes))
        table.add_row(part.role, part.format, f"{part.parameters:,}", *sizes)
    table.add_section()
    kv = sizing.kv
    growth = f"{kv.token_bytes / 1024:g} KiB a token to {kv.window:,}, then {kv.late_token_bytes / 1024:g}"
    table.add_row("KV cache", growth, "", "", _size(sizing.kv_bytes), _size(kv.bytes_at(sizing.position)))
    space = sizing.workspace
    for name in ("pictures", "libraries", "step"):
        table.add_row("workspace", _WORKSPACE[name], "", "", _size(getattr(space, name)), "")
    rest = space.lasting - space.pictures - space.libraries - space.step
    table.add_row("workspace", "RoPE tables, inputs of recordings, rearranged scales and norms", "", "", _size(rest), "")
    passing = {name: getattr(space, name) for name in ("prefill", "picture", "sampling")}
    largest = max(passing, key=lambda name: passing[name])
    table.add_row("workspace", _WORKSPACE[largest], "", "", _size(space.passing), "")
    return table


def speed_table(sizing: Sizing, gpus: list[Gpu]) -> Table:
    """What each GPU's memory and bandwidth allow."""
    table = Table(title=f"Most that bandwidth allows at {sizing.position:,} tokens a slot", title_justify="left")
    batches = sorted({1, sizing.slots})
    rates = (f"tok/s, {slots} at once" if slots > 1 else "tok/s, 1 request" for slots in batches)
    for heading in ("GPU", "memory", "bandwidth", "fits", *rates):
        table.add_column(heading, justify="left" if heading == "GPU" else "right")
    for gpu in gpus:
        free = gpu.memory_gb * 1e9 - sizing.total_bytes
        fits = f"yes, {_size(free)} free" if free >= 0 else f"no, {_size(-free)} short"
        rates = (f"{sizing.tokens_per_second(gpu, slots):,.0f}" for slots in batches)
        table.add_row(gpu.name, f"{gpu.memory_gb:g} GB", f"{gpu.bandwidth_gb_s:g} GB/s", fits, *rates)
    return table


def _size(count: float) -> str:
    """Bytes in decimal units, three significant digits or two decimals."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B" if count else "–"
