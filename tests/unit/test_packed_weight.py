"""A packed weight can be used, changed, copied and trained as the plain weight that it stands for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from streamllm.models import linear as linear_module
from streamllm.models.linear import Linear, arrange, quantize
from streamllm.models.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(not linear_module._can_pack(), reason="this torch or processor does not pack")


def packed_linear(inputs: int = 48, outputs: int = 64) -> tuple[Linear, torch.Tensor]:
    linear = Linear(inputs, outputs).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    plain = linear.weight.detach().clone()
    arrange(linear.eval())
    assert isinstance(linear.weight, PackedWeight)
    return linear, plain


READS = {
    "float": lambda weight: weight.float(),
    "plus": lambda weight: weight + 1,
    "detach": lambda weight: weight.detach(),
    "clone": lambda weight: weight.clone(),
    "transpose": lambda weight: weight.T,
    "index": lambda weight: weight[3, 4:9],
    "norm": lambda weight: weight.float().norm(),
    "stack": lambda weight: torch.stack([weight, weight]),
    "foreach": lambda weight: torch._foreach_norm([weight])[0],
    "numpy": lambda weight: weight.float().numpy().sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_reading_gives_the_plain_values_and_leaves_it_packed(read):
    linear, plain = packed_linear()
    got, wanted = read(linear.weight), read(plain)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    assert isinstance(linear.weight, PackedWeight)
    assert (linear.weight.shape, linear.weight.dtype) == (plain.shape, plain.dtype)
    assert "tensor" in repr(linear.weight)


CHANGES = {
    "copy_": lambda weight: weight.copy_(torch.ones_like(weight)),
    "mul_": lambda weight: weight.mul_(2),
    "data": lambda weight: weight.data.add_(1),
    "iadd": lambda weight: weight.__iadd__(1),
    "item": lambda weight: weight.__setitem__(0, 7.0),
    "foreach": lambda weight: torch._foreach_mul_([weight], 3.0),
    "out": lambda weight: torch.add(torch.ones(64, 48, dtype=torch.bfloat16), 1, out=weight),
    "new data": lambda weight: setattr(weight, "data", torch.ones(64, 48, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changes_reach_the_product(change):
    linear, plain = packed_linear()
    weight, x = linear.weight, torch.randn(5, 48).bfloat16()
    with torch.no_grad():
        change(linear.weight)
        change(plain)
        assert linear.weight is weight
        assert torch.equal(linear.weight.detach(), plain)
        wanted = torch.nn.functional.linear(x, plain, linear.bias)
        torch.testing.assert_close(linear(x), wanted)
        linear.eval()
        assert linear.weight is weight
        assert isinstance(weight, PackedWeight)
        torch.testing.assert_close(linear(x), wanted)


@pytest.mark.parametrize("ask", ["requires_grad_", "requires_grad", "train", "train and eval"])
def test_gradients_reach_the_weight(ask):
    linear, plain = packed_linear()
    if ask == "requires_grad":
        linear.weight.requires_grad = True
    else:
        linear.requires_grad_(True)
    if ask.startswith("train"):
        linear.train()
    if ask.endswith("eval"):
        linear.eval()
        assert linear.weight.requires_grad
    x = torch.randn(5, 48).bfloat16()
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(64, -1), rtol=0.02, atol=0.02)
    linear.eval()  # the gradient stays
    assert linear.weight.grad is not None
    linear.train()
    assert linear.weight.grad.shape == plain.shape
    linear.zero_grad()
    assert linear.weight.grad is None


def test_gradients_pass_through_a_frozen_packed_weight():
    linear, plain = packed_linear()
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(5, -1), rtol=0.02, atol=0.1)
    assert isinstance(linear.weight, PackedWeight)
    linear.requires_grad_(False)
    assert isinstance(linear.weight, PackedWeight)


def test_a_bias_alone_is_trained():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear = Linear(48, 64).to(dtype).requires_grad_(False)
        for weight in linear.parameters():
            weight.copy_(torch.randn(weight.shape))
        arrange(linear)
        linear.bias.requires_grad_(True)
        linear(torch.randn(7, 48).to(dtype)).sum().backward()
        assert linear.bias.grad.tolist() == [7.0] * 64


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_and_packed(assign):
    linear, _ = packed_linear()
    other, _ = packed_linear()
    state = linear.state_dict()
    with torch.no_grad():
        other.weight.zero_()
    other.eval()
    assert other.load_state_dict(state, assign=assign).missing_keys == []
    assert isinstance(other.weight, PackedWeight)
    x = torch.randn(5, 48).bfloat16()
    assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))])
def test_a_copy_is_packed_and_has_weights_of_its_own(copied):
    linear, plain = packed_linear()
    other = copied(linear)
    assert isinstance(other.weight, PackedWeight)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(linear.weight.detach(), plain)


def test_a_graph_that_needs_the_weight_keeps_it_plain():
    linear, _ = packed_linear()
    linear.requires_grad_(True).train()
    y = linear(torch.randn(5, 48).bfloat16().requires_grad_())
    with pytest.warns(UserWarning, match="such as a loss"):
        linear.eval()
    y.sum().backward()
    assert linear.weight.grad is not None


def test_int8_does_not_take_float_weights_and_is_quantized_once():
    linear, plain = packed_linear()
    other, _ = packed_linear()
    quantize(linear)
    numbers, scale = linear.weight.clone(), linear.scale.clone()
    quantize(linear)
    assert torch.equal(linear.weight, numbers)
    assert torch.equal(linear.scale, scale)
    # Rounded by the scale as it is stored: no number is more than half a step off.
    assert (
        numbers.float() * scale.float()[:, None] - plain.float()
    ).abs().max() <= 0.5001 * scale.float().max()
    with pytest.raises(RuntimeError, match="quantize both models or neither"):
        linear.load_state_dict(other.state_dict(), strict=False)
    linear.load_state_dict(linear.state_dict())


@pytest.mark.parametrize("inputs", [1, 7, 15, 16, 17, 31, 32, 40, 100, 120, 3200])
@pytest.mark.parametrize("outputs", [1, 7, 33])
@pytest.mark.parametrize("rows", [1, 3, 60])
def test_int8_products_of_any_shape(inputs, outputs, rows):
    """torch's int8 kernel reads beyond the end of rows that are no multiple of 16 long."""
    linear = Linear(inputs, outputs, bias=False).to(torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1)))
    quantize(linear)
    x = torch.randn(rows, inputs + 3, generator=torch.Generator().manual_seed(2)).bfloat16()[
        :, 1 : inputs + 1
    ]
    weight = linear.weight.double() * linear.scale.double()[:, None]
    largest = (x.double().abs() @ weight.abs().t()).max()  # of the sums without cancellation
    assert (linear(x) - x.double() @ weight.t()).abs().max() <= 2**-7 * largest


def test_gradients_pass_through_int8_weights():
    linear = Linear(48, 64).to(torch.bfloat16).requires_grad_(False)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape))
    quantize(linear)
    x = torch.randn(2, 48).bfloat16().requires_grad_()
    linear(x).sum().backward()
    exact = (linear.weight.double() * linear.scale.double()[:, None]).sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad.double(), exact, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 17, 25, 33, 65, 100, 200, 513])
def test_products_in_row_blocks(dtype, rows, monkeypatch):
    monkeypatch.setattr(linear_module, "IS_INTEL", False)
    linear = Linear(48, 64).to(dtype).requires_grad_(False)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape))
    x = torch.randn(1, rows, 48).to(dtype)
    wanted = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    arrange(linear)
    got = linear(x)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()
    blocks = linear_module.row_blocks(rows)
    assert sum(blocks) >= rows
    assert sum(blocks) <= max(4, 2 * rows)
    few = {1, *linear_module.BLOCK_ROWS, *(2**power for power in range(7, 11))}
    assert set(blocks) <= few
    assert len(few) <= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_onednn_meets_few_sizes(dtype, monkeypatch):
    """Whatever the number of rows, and without much padding: MKL computes float32 products of other sizes."""
    if linear_module.linear_pointwise is None:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(linear_module, "IS_INTEL", False)
    product, met = linear_module.linear_pointwise, []

    def spy(x, *rest):
        met.append(x.shape[-2])
        return product(x, *rest)

    monkeypatch.setattr(linear_module, "linear_pointwise", spy)
    linear = Linear(64, 48).to(dtype).requires_grad_(False)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape))
    arrange(linear)
    if dtype == torch.bfloat16 and not isinstance(linear.weight, PackedWeight):
        pytest.skip("this processor does not pack bfloat16")
    for rows in range(2, 300):
        met.clear()
        linear(torch.randn(1, rows, 64).to(dtype))
        assert set(met) <= {1, *linear_module.BLOCK_ROWS, 128, 256}
        if dtype == torch.float32:
            assert sum(met) <= 1.3 * rows + 4
        else:
            assert rows <= sum(met) <= 1.5 * rows + 4


def test_a_strided_bias_is_read_as_it_is(monkeypatch):
    monkeypatch.setattr(linear_module, "IS_INTEL", False)
    linear = Linear(48, 64).requires_grad_(False)
    for weight in linear.parameters():
        weight.copy_(torch.randn(weight.shape))
    linear.bias.data = torch.randn(128)[::2]
    x = torch.randn(4, 48)
    wanted = nn.functional.linear(x, linear.weight, linear.bias)
    arrange(linear)
    torch.testing.assert_close(linear(x), wanted)


def test_a_loss_that_is_kept_stops_packing_with_a_warning():
    linear, _ = packed_linear()
    linear.requires_grad_(True).train()
    loss = linear(torch.randn(2, 48).bfloat16()).sum()
    loss.backward()
    linear.requires_grad_(False)
    with pytest.warns(UserWarning, match="delete it and call model.eval"):
        linear.eval()
    assert not linear.weight.is_mkldnn
    del loss
    linear.eval()
    assert linear.weight.is_mkldnn
