"""One int8 table for the embedding and the head that is tied to it.

Embedding: rows are gathered first, then scaled, so a lookup touches only the rows it asks for. Head: a product with int8
rows, then one scale a logit. The head holds no tensors of its own, so no load, copy or move can break the tie; on the 4B a
second table would cost 0.67 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemma_opt.errors import PlanError
from gemma_opt.quantization.linear import Int8Linear

_HEAD_ROWS = 32_768  # rows multiplied at once: bounds the copy in the activations' dtype, 168 MB on the 4B instead of 1.3 GB


class Int8Embedding(nn.Module):
    """Row i is weight[i] · weight_scale[i], times Gemma's factor for embeddings.

    weight: int8 [vocabulary, hidden]; weight_scale: float32 [vocabulary]; embed_scale: that factor, a number. dtype: of the
    rows it gives.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, embed_scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        # transformers multiplies in the rows' dtype
        self.embed_scale = float(torch.tensor(embed_scale, dtype=dtype, device="cpu"))
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: integers [...]. Returns [..., hidden]."""
        rows = functional.embedding(input_ids, self.weight) * functional.embedding(input_ids, self.weight_scale[:, None])
        return rows.to(self.dtype) * self.embed_scale

    def dequantize(self) -> Tensor:
        """The table as float32 [vocabulary, hidden], without Gemma's factor: what head and embedding share."""
        return self.weight * self.weight_scale[:, None]

    def zeros(self) -> int:
        """How many entries are exactly zero."""
        return int((self.weight == 0).sum())

    def extra_repr(self) -> str:
        """The figures nn.Embedding prints."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Head(nn.Module):
    """Logits from the embedding's table: (x · weightᵀ) · weight_scale, computed by the block of rows."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, so that it is not registered: its tensors have one name and one owner

    @property
    def table(self) -> Int8Embedding:
        return self._table[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's own tensor."""
        return self.table.weight

    @property
    def weight_scale(self) -> Tensor:
        """The embedding's own tensor."""
        return self.table.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden], any float dtype. Returns logits [..., vocabulary] in x's dtype."""
        blocks = zip(self.weight.split(_HEAD_ROWS), self.weight_scale.split(_HEAD_ROWS), strict=True)
        return torch.cat([(functional.linear(x, rows.to(x.dtype)) * scale).to(x.dtype) for rows, scale in blocks], dim=-1)


def untie_head_(model: nn.Module) -> None:
    """Give the head a copy of the table as an `Int8Linear`, for export to formats that cannot share one.

    Costs the table's bytes again; such a model is not saved as a checkpoint. Raises PlanError where the head shares no int8
    table.
    """
    head = model.get_submodule("lm_head")
    if not isinstance(head, Int8Head):
        raise PlanError(f"the head is a {type(head).__name__}, not one that shares an int8 table")
    model.set_submodule("lm_head", Int8Linear(head.weight.clone(), head.weight_scale.clone()))
