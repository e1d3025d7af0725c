"""The text model's weights as plain tensors, taken once out of transformers' modules.

What a decode step multiplies with together is one matrix here: query, key and value; gate and up. Rows are put on top of
each other, so scales per row or per group of a row stay what they were. Norm weights are stored as the factor they are
(1 + w) in float32. The vision tower and the projector stay transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from gemma_opt.engine.packed import (
    Arrange,
    FloatRows,
    Fp8Rows,
    GridInput,
    Int4Rows,
    Int8Rows,
    LowRankRows,
    PackedLinear,
    as_they_are,
    pack_rows,
)
from gemma_opt.errors import EngineError
from gemma_opt.gemma import GemmaModel, text_layers
from gemma_opt.lowrank import LowRankLinear
from gemma_opt.quantization.linear import Fp8Linear, Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.quantization.table import Int8Embedding, Int8Head


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
    def group(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.kv_heads

    @property
    def all_heads(self) -> int:
        """Query, key and value heads, as they lie side by side in the packed product."""
        return self.heads + 2 * self.kv_heads

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


def take_weights(model: GemmaModel, *, release: bool, arrange: Arrange = as_they_are) -> TextWeights:
    """Pack the text model's weights. Unpacked tensors are shared with `model`, packed ones are copies.

    arrange: applied to every packed linear of the layers; see `kernels.arrangement`.
    release: empty each transformers layer once it is packed, so that no more than one layer exists twice; the model can
    then still encode pictures, and do nothing else. Raises EngineError naming what this engine does not compute.
    """
    _refuse_unknown_maths(model)
    text = model.get_decoder()
    layers: list[LayerWeights] = []
    for layer, kind in zip(text_layers(model).values(), _layer_kinds(model), strict=True):
        layers.append(_take_layer(layer, arrange, sliding=kind == "sliding_attention"))
        if release:
            for name, _ in list(layer.named_children()):
                delattr(layer, name)
    table = pack_module(text.get_input_embeddings())
    if not isinstance(table, FloatRows | Int8Rows):
        raise EngineError(f"the embedding is a {type(table).__name__}: it must be a float or int8 table")
    head = pack_module(model.lm_head)
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
    return pack_module(module)


@singledispatch
def pack_module(module: nn.Module) -> PackedLinear:
    """The same tensors without their bias. Raises EngineError."""
    raise EngineError(f"this engine does not know a {type(module).__name__}")


@pack_module.register(nn.Linear)
@pack_module.register(nn.Embedding)
def _(module: nn.Linear | nn.Embedding) -> PackedLinear:
    return FloatRows(module.weight.detach())


@pack_module.register(Int8Embedding)
@pack_module.register(Int8Head)
def _(module: Int8Embedding | Int8Head) -> PackedLinear:
    return Int8Rows(module.weight, module.weight_scale)


@pack_module.register
def _(module: Int8Linear) -> PackedLinear:
    return _with_grid(module, Int8Rows(module.weight, module.weight_scale))


@pack_module.register
def _(module: Fp8Linear) -> PackedLinear:
    return _with_grid(module, Fp8Rows(module.weight, module.weight_scale))


@pack_module.register
def _(module: Int4Linear) -> PackedLinear:
    return _with_grid(module, Int4Rows(module.weight_packed, module.weight_scale, module.weight_zero))


@pack_module.register
def _(module: LowRankLinear) -> PackedLinear:
    return LowRankRows(pack_module(module.left), pack_module(module.right))


def _with_grid(module: QuantizedLinear, rows: Int8Rows | Fp8Rows | Int4Rows) -> PackedLinear:
    return rows if module.activation == "none" else GridInput(rows, module.activation, module.input_scale)


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
