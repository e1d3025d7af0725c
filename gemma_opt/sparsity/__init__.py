"""Sparsity: score × pattern × schedule. `sparsify_` walks a model; the other modules are pure maths on tensors."""

from gemma_opt.sparsity.apply import LayerSparsity, sparsify_

__all__ = ["LayerSparsity", "sparsify_"]
