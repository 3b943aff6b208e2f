"""Linear computes the same product in every layout of its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streamllm.models import linear as linear_module
from streamllm.models.base import Embedding
from streamllm.models.linear import Linear, arrange, quantize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[False, True], ids=["amd", "intel"])
def processor_vendor(request, monkeypatch):
    monkeypatch.setattr(linear_module, "IS_INTEL", request.param)


def random_linear(dtype: torch.dtype, bias: bool = True, inputs: int = 72, outputs: int = 40) -> Linear:
    linear = Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 3), (4, 1), (2, 130)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_arranged_linear_is_as_accurate_as_torchs(dtype, bias, rows):
    linear = random_linear(dtype, bias)
    x = torch.randn(*rows, 72, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    plain = (F.linear(x, linear.weight, linear.bias) - exact).abs().mean()
    arrange(linear)
    with torch.inference_mode():
        got = linear(x)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    # oneDNN adds in sequence. MKL adds several partial sums on Intel's processors, which rounds less.
    assert (got - exact).abs().mean() <= (3 if dtype in (torch.float64, torch.float32) else 1.01) * plain
    assert (got - exact).abs().max() <= 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_dict_has_the_loaded_weights(dtype):
    linear, plain = random_linear(dtype), random_linear(dtype)
    arrange(linear)
    arrange(linear)  # a second time changes nothing
    saved = linear.state_dict()
    assert torch.equal(saved["weight"], plain.weight)
    assert torch.equal(saved["bias"], plain.bias)
    assert linear.weight.shape == plain.weight.shape
    assert linear.weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tied_head_still_shares_the_weight_of_the_embedding(dtype):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = Embedding(40, 72), Linear(72, 40, bias=False)
            self.head.weight = self.embed.weight

    model = Tied().to(dtype).requires_grad_(False)
    model.embed.weight.copy_(random_linear(dtype).weight)
    tokens = torch.tensor([[3, 39, 0]])
    before = model.embed(tokens)
    arrange(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed(tokens), before)
    exact = before.double() @ random_linear(dtype).weight.double().t()
    assert (model.head(before) - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_gradients_pass_through_a_frozen_arranged_weight():
    linear = random_linear(torch.float32)
    arrange(linear)
    x = torch.randn(5, 72, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_torch_without_the_fused_kernel_uses_plain_ones(dtype, monkeypatch):
    monkeypatch.setattr(linear_module, "linear_pointwise", None)
    linear, plain = random_linear(dtype), random_linear(dtype)
    arrange(linear)
    x = torch.randn(2, 9, 72).to(dtype)
    torch.testing.assert_close(linear(x), plain(x))


@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (1, 200)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_equals_the_product_with_the_rounded_weight(dtype, bias, rows):
    linear, plain = (
        random_linear(dtype, bias, inputs=96, outputs=64),
        random_linear(dtype, bias, inputs=96, outputs=64),
    )
    quantize(linear)
    arrange(linear)  # leaves int8 weights as they are
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


def test_quantizing_a_tied_head_does_not_change_the_embedding():
    linear, embed = random_linear(torch.bfloat16), Embedding(40, 72)
    embed.weight = linear.weight
    linear.quantize()
    assert embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 5, 60])
def test_a_weight_may_be_a_view_of_fused_weights(rows):
    fused = torch.randn(72, 100, generator=torch.Generator().manual_seed(8))
    linear = random_linear(torch.float32)
    arrange(linear)
    linear.weight.data = fused[:, 30:70].t()
    x = torch.randn(rows, 72)
    torch.testing.assert_close(linear(x), F.linear(x, fused[:, 30:70].t(), linear.bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs", [200, 512, 600])
def test_large_float32_weights_have_the_layout_of_their_kernel(threaded, outputs, threads):
    threaded(threads)
    linear = random_linear(torch.float32, inputs=300, outputs=outputs)
    x = torch.randn(1, 1, 300)
    wanted = linear(x)
    arrange(linear)
    torch.testing.assert_close(linear(x), wanted, atol=1e-4, rtol=1e-5)
    by_columns = outputs > 300 and (threads == 1 or linear_module.linear_pointwise is None)
    assert linear.weight.stride() == ((1, outputs) if by_columns else (300, 1))
