"""The other library's products are the same products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gemma_opt.onednn import OneDnnLinears, product, with_onednn


@pytest.mark.parametrize("with_bias", [False, True])
def test_linears_give_the_same_values(with_bias: bool) -> None:
    x, weight, bias = torch.randn(2, 7, 33), torch.randn(19, 33), torch.randn(19) if with_bias else None
    expected = functional.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    with torch.no_grad(), OneDnnLinears():
        torch.testing.assert_close(functional.linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_products_give_the_same_values() -> None:
    one, other = torch.randn(300, 17), torch.randn(300, 23)
    torch.testing.assert_close(product(one, other).double(), one.double().T @ other.double(), rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same() -> None:
    x, weight, slope = torch.randn(2, 7, 33), torch.randn(19, 33), torch.randn(2, 7, 19)
    found: list[tuple[torch.Tensor, ...]] = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        with OneDnnLinears():
            output = functional.linear(*leaves)
        found.append(torch.autograd.grad(output, leaves, slope.to(dtype)))
        assert ("_Linear" in type(output.grad_fn).__name__) == (dtype == torch.float32)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


def test_gradients_and_other_types_pass_by() -> None:
    layer = torch.nn.Linear(8, 4)
    with OneDnnLinears():
        layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None

    @with_onednn
    def half(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    with torch.no_grad():
        assert half(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
