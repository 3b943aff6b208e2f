"""Linear computes the same whatever its layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamllm.models import linear as layers
from streamllm.models.base import Embedding
from streamllm.models.linear import Linear, arrange, quantize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[False, True], ids=["others", "intel"])
def of_each_maker(request, monkeypatch):
    monkeypatch.setattr(layers, "IS_INTEL", request.param)


def filled(dtype: torch.dtype, bias: bool = True, wide: int = 72, high: int = 40) -> Linear:
    linear = Linear(wide, high, bias=bias).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 3), (4, 1), (2, 130)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_arranged_linear_is_as_near_to_the_exact_product(dtype, bias, rows):
    linear = filled(dtype, bias)
    x = torch.randn(*rows, 72, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    plain = (F.linear(x, linear.weight, linear.bias) - exact).abs().mean()
    arrange(linear)
    with torch.inference_mode():
        got = linear(x)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    # oneDNN sums one after the other, MKL on Intel's processors some side by side: then 2.1 times as far in float32.
    assert (got - exact).abs().mean() <= (3 if dtype in (torch.float64, torch.float32) else 1.01) * plain
    assert (got - exact).abs().max() <= 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_dict_is_what_was_loaded(dtype):
    linear, plain = filled(dtype), filled(dtype)
    arrange(linear)
    arrange(linear)  # a second time changes nothing
    saved = linear.state_dict()
    assert torch.equal(saved["weight"], plain.weight)
    assert torch.equal(saved["bias"], plain.bias)
    assert linear.weight.shape == plain.weight.shape
    assert linear.weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tied_head_stays_the_embedding(dtype):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = Embedding(40, 72), Linear(72, 40, bias=False)
            self.head.weight = self.embed.weight

    model = Tied().to(dtype).requires_grad_(False)
    model.embed.weight.copy_(filled(dtype).weight)
    tokens = torch.tensor([[3, 39, 0]])
    before = model.embed(tokens)
    arrange(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed(tokens), before)
    exact = before.double() @ filled(dtype).weight.double().t()
    assert (model.head(before) - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_frozen_arranged_weight_lets_gradients_through():
    linear = filled(torch.float32)
    arrange(linear)
    x = torch.randn(5, 72, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_torch_has_no_such_kernel_plain_ones_serve(dtype, monkeypatch):
    monkeypatch.setattr(layers, "linear_pointwise", None)
    linear, plain = filled(dtype), filled(dtype)
    arrange(linear)
    x = torch.randn(2, 9, 72).to(dtype)
    torch.testing.assert_close(linear(x), plain(x))


@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (1, 200)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_the_product_with_its_own_rounded_weight(dtype, bias, rows):
    linear, plain = filled(dtype, bias, wide=96, high=64), filled(dtype, bias, wide=96, high=64)
    quantize(linear)
    arrange(linear)  # has nothing to add
    assert linear.weight.dtype == torch.int8
    rounded = linear.weight.double() * linear.scale.double()[:, None]
    step = plain.weight.double().abs().amax(1, keepdim=True) / 127
    assert ((rounded - plain.weight).abs() <= step * (0.5 + 127 * torch.finfo(dtype).eps)).all()
    x = torch.randn(*rows, 96, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = linear(x)
    exact = F.linear(x.double(), rounded, plain.bias.double() if bias else None)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 4 * eps * exact.abs().max()


def test_int8_leaves_the_embedding_of_a_tied_head():
    linear, embed = filled(torch.bfloat16), Embedding(40, 72)
    embed.weight = linear.weight
    linear.quantize()
    assert embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 5, 60])
def test_a_view_of_fused_weights_is_as_good(rows):
    fused = torch.randn(72, 100, generator=torch.Generator().manual_seed(8))
    linear = filled(torch.float32)
    arrange(linear)
    linear.weight.data = fused[:, 30:70].t()
    x = torch.randn(rows, 72)
    torch.testing.assert_close(linear(x), F.linear(x, fused[:, 30:70].t(), linear.bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("high", [200, 512, 600])
def test_large_float32_weights_lie_as_their_kernel_reads_them(threaded, high, threads):
    threaded(threads)
    linear = filled(torch.float32, wide=300, high=high)
    x = torch.randn(1, 1, 300)
    wanted = linear(x)
    arrange(linear)
    torch.testing.assert_close(linear(x), wanted, atol=1e-4, rtol=1e-5)
    by_columns = high > 300 and (threads == 1 or layers.linear_pointwise is None)
    assert linear.weight.stride() == ((1, high) if by_columns else (300, 1))
