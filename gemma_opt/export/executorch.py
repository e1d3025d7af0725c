"""The text decoder as an ExecuTorch program: one file that runs without Python, on phones too.

XNNPACK computes it. Linears with int8 inputs stay quantized, int8 rows and symmetric groups of int4, and so does an int8 table:
the head has a copy of it, with int8 inputs, as programs share no weights between embedding and head. All else is float32.
Pictures are left out: the program's mask is causal, and Gemma 3's picture tokens see each other both ways. Needs the extra
`executorch`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as torchao
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from gemma_opt.errors import UsageError
from gemma_opt.export.tensors import Stored, weight_of, weight_owners
from gemma_opt.gemma import GemmaConfig, GemmaModel, empty_model, stop_token_ids
from gemma_opt.lowrank import LowRankLinear
from gemma_opt.quantization import Int4Linear, Int8Embedding, Int8Linear, QuantizedLinear

try:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports] an extra
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import (  # pyright: ignore[reportMissingImports]
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes.sym_shape_eval_pass import (  # pyright: ignore[reportMissingImports]
        ConstraintBasedSymShapeEvalPass,
    )
except ImportError:
    raise UsageError("executorch is not installed: pip install '.[executorch]' in the repository's folder") from None

PROGRAM = "model.pte"
_INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 torch has it, its type stubs do not


def write_program(model: GemmaModel, context: int, folder: Path) -> None:
    """Write the program. Its method `forward` takes token ids [1, n] and positions [n], and returns logits [1, n, vocabulary].

    context: positions that its cache holds. Raises UsageError for int4 with zero points, for which XNNPACK has no kernel.
    """
    decoder = _decoder(model)
    lowered: Any = to_edge_transform_and_lower(
        _exported(decoder, context),
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_max_seq_len": context,
            "get_vocab_size": decoder.config.vocab_size,
            "get_bos_id": decoder.config.bos_token_id,
            "get_eos_ids": sorted(stop_token_ids(model)),
            "use_kv_cache": True,
            "enable_dynamic_shape": True,
        },
    )
    program = lowered.to_executorch(
        ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(), do_quant_fusion_and_const_prop=True)
    )
    (folder / PROGRAM).write_bytes(program.buffer)


def _exported(decoder: GemmaModel, context: int) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=1, max=context - 1)
    return TorchExportableModuleForDecoderOnlyLM(decoder, batch_size=1, max_cache_len=context).export(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        cache_position=torch.arange(2),
        dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
    )


@torch.no_grad()
def _decoder(model: GemmaModel) -> GemmaModel:
    """The model's text part with a head of its own, in float32 or as torchao tensors that ExecuTorch understands."""
    config = cast(GemmaConfig, copy.deepcopy(model.config.get_text_config()))
    config.tie_word_embeddings, config._attn_implementation = False, "sdpa"
    decoder = empty_model(config, torch.float32)
    weights: Stored = {}
    for name, module in weight_owners(cast(nn.Module, model.get_decoder())):
        if isinstance(module, QuantizedLinear | LowRankLinear):
            weights[f"model.{name}.weight"] = _weight(module)
        elif isinstance(module, Int8Embedding):
            weights[f"model.{name}.weight"] = _rows(module.weight, module.weight_scale, dynamic=False)
            weights["lm_head.weight"] = _rows(module.weight, module.weight_scale, dynamic=True)
        else:
            weights |= {f"model.{name}.{leaf}": value.float() for leaf, value in module.named_parameters(recurse=False)}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        elif isinstance(module, nn.Embedding):
            module.padding_idx = None  # it is for training alone, and hides the quantized lookup from ExecuTorch
    decoder.generation_config = model.generation_config
    return decoder


def _weight(linear: nn.Module) -> Tensor:
    match linear:
        case Int8Linear(activation="int8_dynamic"):
            return _rows(linear.weight, linear.weight_scale, dynamic=True)
        case Int4Linear(activation="int8_dynamic", weight_zero=None):
            return _intx(linear.steps().flatten(1), linear.weight_scale.float(), _INT4, linear.group, dynamic=True)
        case Int4Linear(activation="int8_dynamic"):
            raise UsageError("XNNPACK has no kernel for int4 with zero points: build it with {symmetric: true} in its format")
        case _:
            return weight_of(linear).float()


def _rows(weight: Tensor, scale: Tensor, *, dynamic: bool) -> Tensor:
    return _intx(weight, scale[:, None], torch.int8, weight.shape[1], dynamic=dynamic)


def _intx(steps: Tensor, scale: Tensor, dtype: torch.dtype, group: int, *, dynamic: bool) -> Tensor:
    """torchao's form for export. steps: int8 [out, in]; scale: float32 [out, in/group]; dynamic: inputs become int8."""
    inputs = torchao.IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN if dynamic else None
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return torchao.IntxUnpackedToInt8Tensor(steps, scale, zero, dtype, (1, group), torch.float32, inputs)
