"""A compressed model as plain float tensors, under the names that Gemma 3's checkpoints have on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gemma_opt.gemma import GemmaModel
from gemma_opt.lowrank import LowRankLinear
from gemma_opt.quantization import Int8Embedding, QuantizedLinear

# transformers renames modules from release to release, and reads these names in all of them, as vLLM does.
HUB_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
HEAD = "lm_head"

Stored = dict[str, Tensor]  # name behind the module's → tensor


def hub_name(name: str) -> str:
    """The name a tensor of a multimodal Gemma 3 has in checkpoints on the hub; a text-only one's names are those already."""
    ours, theirs = next((pair for pair in HUB_PREFIXES if name.startswith(pair[0])), ("", ""))
    return theirs + name.removeprefix(ours)


@torch.no_grad()
def hub_tensors(
    model: GemmaModel, dtype: torch.dtype, keep: Callable[[str, QuantizedLinear], Stored | None] = lambda name, linear: None
) -> Stored:
    """Every tensor of a checkpoint, contiguous and on the CPU; the head is absent, it is the embedding's table.

    Quantized weights and tables are dequantized, factors of low rank multiplied, everything rounded to `dtype`, unless `keep`
    gives the tensors that a quantized linear keeps (its bias comes by itself).
    """
    found: Stored = {}
    for name, module in weight_owners(model):
        if name == HEAD:
            continue
        if isinstance(module, QuantizedLinear | LowRankLinear):
            kept = keep(name, module) if isinstance(module, QuantizedLinear) else None
            own = {"weight": weight_of(module).to(dtype)} if kept is None else kept
            if (bias := bias_of(module)) is not None:
                own = own | {"bias": bias.to(dtype)}
        elif isinstance(module, Int8Embedding):
            own = {"weight": module.dequantize().to(dtype)}
        else:
            own = {leaf: parameter.detach().to(dtype) for leaf, parameter in module.named_parameters(recurse=False)}
        found |= {hub_name(f"{name}.{leaf}"): tensor.cpu().contiguous() for leaf, tensor in own.items()}
    return found


def weight_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name; a linear that low rank has split comes as the one it was, without its factors."""
    for name, module in model.named_modules():
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLinear):
            yield name, module


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [out, in] that a linear of any kind multiplies with: float32, or a plain linear's own dtype."""
    match linear:
        case LowRankLinear():
            return weight_of(linear.left).float() @ weight_of(linear.right).float()
        case QuantizedLinear():
            return linear.dequantize()
        case _:
            return linear.get_parameter("weight").detach()


def bias_of(linear: nn.Module) -> Tensor | None:
    """[out], where there is one."""
    return bias_of(linear.left) if isinstance(linear, LowRankLinear) else getattr(linear, "bias", None)
