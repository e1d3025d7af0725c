"""Sparsity: score × pattern × schedule. `sparsify_` walks a model; `apply` and `calibrated` hold its methods, without and
with data; the other modules are pure maths on tensors.
"""

from gemma_opt.sparsity import calibrated as calibrated  # registers its methods
from gemma_opt.sparsity.apply import LayerSparsity, sparsify_

__all__ = ["LayerSparsity", "sparsify_"]
