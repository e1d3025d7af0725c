"""Which outputs matter to the loss: squared gradients of the next-token loss at the output of every linear.

If pruning changes output i of a linear by d_i, the loss grows by about ½ · E[g_i²] · E[d_i²], with g_i the gradient there
(the diagonal of the Fisher information). This puts rows and layers on one scale, which activations alone cannot.
Needs one backward pass through activations, none to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_opt.calibration.samples import Sample
from gemma_opt.calibration.walk import model_inputs
from gemma_opt.gemma import GemmaModel


@dataclass(frozen=True)
class Sensitivity:
    """Of one linear, means over tokens, float32. input_square: [in], E[x²]; gradient_square: [out], E[g²]."""

    input_square: Tensor
    gradient_square: Tensor


def measure_sensitivity(
    model: GemmaModel, samples: Sequence[Sample], names: Sequence[str], progress: Callable[[int, int], None]
) -> dict[str, Sensitivity]:
    """Sensitivity of the named linears. The loss is the next token's, where that is not a picture's soft token.

    progress(samples done, samples) is called after each sample.
    """
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    tokens = 0

    def add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
        square = x.detach().float().reshape(-1, x.shape[-1]).square().sum(dim=0)
        sums[name] = sums[name] + square if name in sums else square

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, received: tuple[Tensor, ...], output: Tensor) -> None:
            add(inputs, name, received[0])
            output.register_hook(lambda gradient: add(gradients, name, gradient))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_()))
    was_trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            for done, sample in enumerate(samples, start=1):
                _loss(model, sample).backward()
                tokens += sample.token_ids.shape[1]
                progress(done, len(samples))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in was_trained:
            parameter.requires_grad_()
    return {name: Sensitivity(inputs[name] / tokens, gradients[name] / tokens) for name in names}


def _loss(model: GemmaModel, sample: Sample) -> Tensor:
    """Summed over the predicted tokens, so that each token's own gradient is measured."""
    given = model_inputs(model, sample)
    logits = model(**given, use_cache=False).logits[0, :-1]
    targets = given["input_ids"][0, 1:]
    is_text = targets != getattr(model.config, "image_token_id", -1)
    return nn.functional.cross_entropy(logits[is_text].float(), targets[is_text], reduction="sum")
