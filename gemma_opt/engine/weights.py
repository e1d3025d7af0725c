"""The text model's weights as plain tensors, taken once out of transformers' modules.

What a decode step multiplies with together is one matrix here: query, key and value; gate and up. Rows are put on top of
each other, so scales per row or per group of a row stay what they were. Norm weights are stored as the factor they are
(1 + w) in float32. The vision tower and the projector stay transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemma_opt.errors import EngineError
from gemma_opt.gemma import GemmaModel, text_layers
from gemma_opt.quantization.linear import Fp8Linear, Int4Linear, Int8Linear
from gemma_opt.quantization.table import Int8Embedding, Int8Head

HALVES = (128, 64, 32)  # bytes of a block of Int4Halves: as long as fits, for wide loads


@dataclass(frozen=True)
class FloatRows:
    """y = x · weightᵀ. weight: float [out, in]."""

    weight: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Int8Rows:
    """y = (x · weightᵀ) · scale. weight: int8 [out, in]; scale: float32 [out]."""

    weight: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Fp8Rows:
    """y = (x · weightᵀ) · scale. weight: float8_e4m3fn [out, in]; scale: float32 [out]."""

    weight: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Int4Rows:
    """y = x · ((nibble − zero) · scale)ᵀ, a scale and a zero point for every group of neighbours in a row.

    packed: uint8 [out, in/2], the even column in the low nibble; scale: bfloat16 [out, in/group]; zero: uint8 like scale, or
    None where every zero point is 8.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.packed.shape[0]

    @property
    def group(self) -> int:
        """Neighbours that share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        nibbles = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).view(*self.scale.shape, self.group)
        steps = nibbles.char() - (8 if self.zero is None else self.zero.char()[..., None])
        return (steps * self.scale.float()[..., None]).flatten(1)


@dataclass(frozen=True)
class Int4Halves:
    """The weights of `Int4Rows` in the order that GPU kernels read: two runs of columns in the nibbles of one run of bytes.

    packed: uint8 [out, blocks · half]; of each block of 2 · half columns, byte j holds column j in its low nibble and column
    half + j in its high one. steps: int32 [groups, out], two bfloat16 numbers: 128 + zero point above the scale. Columns
    beyond in_features, which fill the last block up, have the scale 0.
    """

    packed: Tensor
    steps: Tensor
    group: int
    half: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.packed.shape[0]

    @staticmethod
    def of(rows: Int4Rows) -> Int4Halves:
        """Rearrange; the tensors are new."""
        group, groups = rows.group, rows.scale.shape[1]
        half = next((size for size in HALVES if size >= group and group * groups % (2 * size) == 0), group)
        missing = -groups % (2 * half // group)
        nibbles = torch.stack((rows.packed & 15, rows.packed >> 4), dim=-1).flatten(1)
        low, high = functional.pad(nibbles, (0, missing * group)).view(rows.out_features, -1, 2, half).unbind(2)
        zero = torch.full_like(rows.scale, 8) if rows.zero is None else rows.zero.to(torch.bfloat16)
        words = torch.stack((rows.scale, zero + 128), dim=-1).view(torch.int32)[..., 0]
        steps = functional.pad(words, (0, missing)).T.contiguous()
        return Int4Halves((low | high << 4).flatten(1), steps, group, half, group * groups)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        numbers = self.steps.T.contiguous()[..., None].view(torch.bfloat16).float()
        blocks = self.packed.view(self.out_features, -1, self.half)
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=2).view(*numbers.shape[:2], self.group)
        weight = (nibbles + 128 - numbers[..., 1:]) * numbers[..., :1]
        return weight.flatten(1)[:, : self.in_features]


@dataclass(frozen=True)
class ModuleRows:
    """A linear of a format without a packed form here (quantized inputs, low rank): its own module computes it."""

    module: nn.Module

    @property
    def out_features(self) -> int:
        """Length of y."""
        return int(getattr(self.module, "out_features"))  # noqa: B009 every linear of this package has it


@dataclass(frozen=True)
class Stacked:
    """Linears of unlike formats on the same input, their outputs one after another."""

    parts: tuple[PackedLinear, ...]

    @property
    def out_features(self) -> int:
        """Length of y."""
        return sum(part.out_features for part in self.parts)


PackedLinear = FloatRows | Int8Rows | Fp8Rows | Int4Rows | Int4Halves | ModuleRows | Stacked
Arrange = Callable[[PackedLinear], PackedLinear]
"""Puts a packed linear into the order that a device's kernels read."""


@dataclass(frozen=True)
class TextShape:
    """The numbers of one Gemma 3 text model that its tensors do not show."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int
    eps: float
    attention_scale: float
    embedding_scale: float

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Rows of query, key and value in the packed matrix."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norms: float32 factors; query_norm and key_norm [head_dim], the others [hidden]."""

    sliding: bool
    input_norm: Tensor
    query_norm: Tensor
    key_norm: Tensor
    qkv: PackedLinear
    o: PackedLinear
    post_attention_norm: Tensor
    pre_mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    post_mlp_norm: Tensor


@dataclass(frozen=True)
class TextWeights:
    """A whole text model. `head` is `table` itself where they are tied, as in every published Gemma 3.

    dtype: of activations between modules and of the KV cache. frequencies: float32 [head_dim / 2] radians a position,
    of sliding and of full layers.
    """

    shape: TextShape
    dtype: torch.dtype
    table: FloatRows | Int8Rows
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: PackedLinear
    sliding_frequencies: Tensor
    full_frequencies: Tensor

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.final_norm.device


def as_they_are(packed: PackedLinear) -> PackedLinear:
    """The arrangement that changes nothing."""
    return packed


def take_weights(model: GemmaModel, *, release: bool, arrange: Arrange = as_they_are) -> TextWeights:
    """Pack the text model's weights. Unpacked tensors are shared with `model`, packed ones are copies.

    arrange: applied to every packed linear of the layers; see `kernels.arrangement`.
    release: empty each transformers layer once it is packed, so that no more than one layer exists twice; the model can
    then still encode pictures, and do nothing else. Raises EngineError naming what this engine does not compute.
    """
    _refuse_unknown_maths(model)
    text = model.get_decoder()
    layers: list[LayerWeights] = []
    for layer, kind in zip(text_layers(model), _layer_kinds(model), strict=True):
        layers.append(_take_layer(layer, arrange, sliding=kind == "sliding_attention"))
        if release:
            for name, _ in list(layer.named_children()):
                delattr(layer, name)
    table = _pack_one(text.get_input_embeddings())
    if not isinstance(table, FloatRows | Int8Rows):
        raise EngineError(f"the embedding is a {type(table).__name__}: it must be a float or int8 table")
    head = _pack_one(model.lm_head)
    return TextWeights(
        shape=_shape(model),
        dtype=model.dtype,
        table=table,
        layers=tuple(layers),
        final_norm=_norm(text.get_submodule("norm")),
        head=table if _share_storage(table, head) else head,
        sliding_frequencies=_frequencies(text.get_submodule("rotary_emb"), "sliding_attention"),
        full_frequencies=_frequencies(text.get_submodule("rotary_emb"), "full_attention"),
    )


def _take_layer(layer: nn.Module, arrange: Arrange, *, sliding: bool) -> LayerWeights:
    def packed(*names: str) -> PackedLinear:
        return arrange(pack_rows([_pack_checked(name, layer.get_submodule(name)) for name in names]))

    def norm(name: str) -> Tensor:
        return _norm(layer.get_submodule(name))

    return LayerWeights(
        sliding=sliding,
        input_norm=norm("input_layernorm"),
        query_norm=norm("self_attn.q_norm"),
        key_norm=norm("self_attn.k_norm"),
        qkv=packed("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=packed("self_attn.o_proj"),
        post_attention_norm=norm("post_attention_layernorm"),
        pre_mlp_norm=norm("pre_feedforward_layernorm"),
        gate_up=packed("mlp.gate_proj", "mlp.up_proj"),
        down=packed("mlp.down_proj"),
        post_mlp_norm=norm("post_feedforward_layernorm"),
    )


def _pack_checked(name: str, module: nn.Module) -> PackedLinear:
    if getattr(module, "bias", None) is not None:
        raise EngineError(f"{name}: Gemma 3 linears have no bias, and this one has")
    return ModuleRows(module) if getattr(module, "activation", "none") != "none" else _pack_one(module)


@singledispatch
def _pack_one(module: nn.Module) -> PackedLinear:
    return ModuleRows(module)


@_pack_one.register(nn.Linear)
@_pack_one.register(nn.Embedding)
def _(module: nn.Linear | nn.Embedding) -> PackedLinear:
    return FloatRows(module.weight.detach())


@_pack_one.register(Int8Linear)
@_pack_one.register(Int8Embedding)
@_pack_one.register(Int8Head)
def _(module: Int8Linear | Int8Embedding | Int8Head) -> PackedLinear:
    return Int8Rows(module.weight, module.weight_scale)


@_pack_one.register
def _(module: Fp8Linear) -> PackedLinear:
    return Fp8Rows(module.weight, module.weight_scale)


@_pack_one.register
def _(module: Int4Linear) -> PackedLinear:
    return Int4Rows(module.weight_packed, module.weight_scale, module.weight_zero)


def pack_rows(parts: Sequence[PackedLinear]) -> PackedLinear:
    """One linear whose output is the parts' outputs one after another: one matrix if they share a format."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Stacked) or any(_layout(part) != _layout(first) for part in parts):
        return Stacked(tuple(parts))
    tensors = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    return replace(first, **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


def _layout(part: PackedLinear) -> tuple[object, ...]:
    """Everything but the number of rows: parts of one layout can be put on top of each other."""
    fields = ((value.dtype, value.shape[1:]) if isinstance(value, Tensor) else value for value in vars(part).values())
    return type(part), *fields


def _norm(module: nn.Module) -> Tensor:
    """Gemma's RMSNorm multiplies by 1 + weight, in float32."""
    weight = dict(module.named_parameters())["weight"]
    return 1.0 + weight.detach().float()


def _frequencies(rotary: nn.Module, kind: str) -> Tensor:
    buffers = dict(rotary.named_buffers())
    if f"{kind}_inv_freq" not in buffers:  # a model may lack one of the two kinds of layers
        return torch.zeros_like(next(iter(buffers.values())))
    return buffers[f"{kind}_inv_freq"].float()


def _shape(model: GemmaModel) -> TextShape:
    config = model.config.get_text_config()
    scale = torch.as_tensor(getattr(model.get_input_embeddings(), "embed_scale"))  # noqa: B009 a buffer, or a number
    return TextShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        window=config.sliding_window,
        eps=config.rms_norm_eps,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        embedding_scale=float(scale.to(model.dtype)),  # transformers rounds it to the weights' dtype
    )


def _layer_kinds(model: GemmaModel) -> list[str]:
    return list(model.config.get_text_config().layer_types or ())


def _share_storage(one: PackedLinear, other: PackedLinear) -> bool:
    return type(one) is type(other) and all(
        mine.data_ptr() == yours.data_ptr() for mine, yours in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def _refuse_unknown_maths(model: GemmaModel) -> None:
    """No published Gemma 3 has any of these; a checkpoint that has would silently get wrong logits."""
    config = model.config.get_text_config()
    rotary = model.get_decoder().rotary_emb
    scaled = [kind for kind in sorted(set(_layer_kinds(model))) if getattr(rotary, f"{kind}_attention_scaling") != 1]
    found = {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "use_bidirectional_attention": config.use_bidirectional_attention,
        "rope types that scale attention": scaled,
    }
    wrong = [f"{name} = {value}" for name, value in found.items() if value]
    if config.hidden_activation != "gelu_pytorch_tanh":
        wrong.append(f"hidden_activation = {config.hidden_activation}")
    if wrong:
        raise EngineError(f"this engine does not compute: {', '.join(wrong)}")
