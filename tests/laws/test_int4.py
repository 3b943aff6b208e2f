"""The law of int4 weights: the logits are those of a model whose weights were rounded by the plain formula."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import library
from streamllm.models import int4_blocks, linear, quantized
from streamllm.models.linear import Linear, quantize
from tests.laws import families
from tests.laws.scenarios import error, feed, random_tokens, tiny_llama

S, W = 2, 6
PARTS = [9, *[1] * 8, 5, *[1] * 3]
TOLERANCE = 1e-5  # of the standard deviation of the logits, in float32


def fresh(name="llama", dtype=torch.float32) -> nn.Module:
    """Most layers can be divided into groups; some models have widths of 40 and 48, and those layers are int8."""
    if name == "llama":
        return tiny_llama.__wrapped__(dtype=dtype, width=64, mlp_width=96)
    return families.tiny_model.__wrapped__(name, mlp_width=96).to(dtype)


def by_definition(weight: Tensor, is_head: bool) -> Tensor:
    """The weight rounded by the plain formula, one group after another."""
    outputs, inputs = weight.shape
    kind = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    rounded = torch.zeros(outputs, inputs, dtype=torch.float64)
    for row in range(outputs):
        if is_head or inputs % 32:
            scale = (weight[row].abs().max().float() / 127).to(kind)
            rounded[row] = (weight[row].float() / scale.float()).round() * scale.double()
            continue
        for start in range(0, inputs, 32):
            group = weight[row, start : start + 32].float()
            farthest = max(group.tolist(), key=abs)
            scale = torch.tensor(farthest / -8, dtype=torch.float32).to(kind)
            numbers = (group / scale.float()).round().clamp(-8, 7)
            rounded[row, start : start + 32] = numbers.double() * scale.double()
    return rounded


def defined(model: nn.Module) -> nn.Module:
    """A copy in float64, with weights rounded by the plain formula."""
    exact = copy.deepcopy(model).double()
    for (name, module), ours in zip(exact.named_modules(), model.modules(), strict=True):
        if isinstance(module, Linear):
            module.weight = nn.Parameter(by_definition(ours.weight, name == "head"), False)
    return exact


def streamed(model: nn.Module, rows: int = 1) -> Tensor:
    return feed(model, SinkCache(model, S, W, rows), random_tokens(sum(PARTS), rows), PARTS)


def difference_from_the_definition(name="llama", rows=1) -> float:
    model = fresh(name)
    exact = defined(model)
    quantize(model, "int4")
    tokens = random_tokens(12, rows)
    return max(error(model(tokens), exact(tokens)), error(streamed(model, rows), streamed(exact, rows)))


@pytest.mark.parametrize("name", ["llama", *families.CONFIGS])
def test_every_family_equals_the_definition(name):
    assert difference_from_the_definition(name, rows=3 if name == "falcon rw" else 1) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon rw", "mpt", "qwen3"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", ["flat", "inductor"])
def test_a_compiled_model_equals_the_definition(name, rows, backend, monkeypatch):
    """The graph that inductor compiles is run without compilation."""

    def not_compiled(module, inputs, options):
        pickle.dumps(module.graph)  # another process compiles it
        return lambda inputs: torch.fx.Interpreter(module).run(*inputs)

    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setattr(library, "library", not_compiled)
    model = fresh(name)
    exact = defined(model)
    quantize(model, "int4")
    compiled = streamllm.compile(model, backend)
    assert error(streamed(compiled, rows), streamed(exact, rows)) <= TOLERANCE
    assert compiled.recordings > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_library_equals_the_model(compiling, dtype):
    model = tiny_llama.__wrapped__(dtype=dtype, width=64, mlp_width=96, layers=1)
    exact = defined(model)
    quantize(model, "int4")
    got, wanted = streamed(streamllm.compile(model, "inductor")), streamed(exact)
    if dtype == torch.float32:
        assert error(got, wanted) <= TOLERANCE
    of_step, of_model = ((logits.double() - wanted).abs().mean() for logits in (got, streamed(model)))
    assert of_step <= 1.2 * of_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_half_types_are_as_close_to_the_definition_as_the_rounded_weights_in_that_type(
    dtype, has_kernel, monkeypatch
):
    if not has_kernel:
        monkeypatch.setattr(int4_blocks, "int4_matmul", None)
    model = fresh(dtype=dtype)
    exact = defined(model)
    quantize(model, "int4")
    is_packed = model.layers[0].mlp.up.scale.dim() == 3
    assert is_packed == (has_kernel and dtype == torch.bfloat16 and int4_blocks.int4_matmul is not None)
    wanted, plain = streamed(exact), copy.deepcopy(exact).to(dtype)
    errors = [(streamed(one).double() - wanted).abs().mean() for one in (model, plain)]
    assert errors[0] <= 1.1 * errors[1]


def halves_are_swapped(patch):
    unpaired = quantized._unpaired
    patch.setattr(quantized, "_unpaired", lambda *given: unpaired(*given).roll(1, 2))


def the_scale_of_another_group(patch):
    rounding = quantized.INT4.round

    def wrong(weight, group):
        numbers, scale = rounding(weight, group)
        return numbers, scale.roll(1, 1)

    patch.setattr(quantized.INT4, "round", wrong)


def one_bit_less(patch):
    rounding = quantized.INT4.round
    patch.setattr(quantized.INT4, "round", lambda weight, group: (rounding(weight, group)[0] & 0xEE,
                                                                  rounding(weight, group)[1]))  # fmt: skip


@pytest.mark.parametrize("mutation", [halves_are_swapped, the_scale_of_another_group, one_bit_less])
def test_a_mutation_breaks_the_law(mutation, monkeypatch):
    mutation(monkeypatch)
    assert difference_from_the_definition() > 1e-2


# One layer


def random_linear(dtype=torch.bfloat16, inputs=96, outputs=64, bias=True) -> Linear:
    layer = Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    for number, weight in enumerate(layer.parameters()):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return layer


def rounded_linear(**given) -> tuple[Linear, Tensor]:
    """An int4 layer, and its dequantised weight in float64."""
    layer = random_linear(**given)
    layer.quantize("int4")
    return layer, quantized.INT4.dequantized(layer.weight, layer.scale, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [1, 16, 40, 48, 64, 80, 200])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_products_of_any_shape_equal_the_rounded_weight(dtype, outputs, rows):
    layer, weight = rounded_linear(dtype=dtype, inputs=160, outputs=outputs)
    for wide in (160, 163):  # the second x is a view that is not aligned
        x = torch.randn(2, rows, wide, generator=torch.Generator().manual_seed(9)).to(dtype)[
            ..., wide - 160 :
        ]
        got, wanted = layer(x), F.linear(x.double(), weight, layer.bias.double())
        assert got.dtype == dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert (got - wanted).abs().max() <= 8 * eps * wanted.abs().max()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_larger_groups_equal_the_rounded_weight(group, monkeypatch):
    monkeypatch.setattr(linear, "INT4_GROUP", group)
    layer, weight = rounded_linear(inputs=384)
    x = torch.randn(3, 384).bfloat16()
    wanted = F.linear(x.double(), weight, layer.bias.double())
    assert (layer(x) - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_groups_of_zeros_and_of_tiny_numbers_are_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = random_linear(dtype)
        layer.weight[:, :32] = 0
        layer.weight[:, 32:64] = torch.finfo(dtype).tiny
        layer.quantize("int4")
        weight = quantized.INT4.dequantized(layer.weight, layer.scale, torch.float64)
        assert weight.isfinite().all()
        assert (weight[:, :32] == 0).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_types_and_states_keep_the_numbers(copied):
    layer, weight = rounded_linear()
    other, x = copied(layer), torch.randn(3, 96).bfloat16()
    assert torch.equal(other(x), layer(x))
    other.float()
    assert torch.equal(quantized.INT4.dequantized(other.weight, other.scale, torch.float64), weight)
    other.bfloat16().train().eval()
    assert torch.equal(other(x), layer(x))
    state = layer.state_dict()
    assert (state["weight"].shape, state["scale"].shape) == ((64, 48), (64, 3))
    float32, _ = rounded_linear(dtype=torch.float32)
    assert torch.equal(float32.state_dict()["weight"] & 0, state["weight"] & 0)  # one layout for all
    for assign in (False, True):
        empty = random_linear()
        empty.weight.zero_()
        empty.quantize("int4")
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty(x), layer(x))


def test_a_state_of_another_type_is_refused():
    layer, _ = rounded_linear()
    for name in (None, "int8"):
        other = random_linear()
        if name:
            other.quantize(name)
        for one, two in ((layer, other), (other, layer)):
            with pytest.raises(RuntimeError, match="quantize both models or neither, to the same type"):
                one.load_state_dict(two.state_dict(), strict=False)


def test_a_rounded_weight_stays_as_it_is_and_cannot_be_trained():
    layer, weight = rounded_linear()
    layer.quantize("int8")
    layer.quantize("int4")
    layer.arrange()
    assert torch.equal(quantized.INT4.dequantized(layer.weight, layer.scale, torch.float64), weight)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        layer.requires_grad_(True)
    with pytest.raises(ValueError, match="rounded to int8 or int4, not 'int3'"):
        random_linear().quantize("int3")


def test_gradients_pass_through_int4_weights():
    layer, weight = rounded_linear()
    x = torch.randn(2, 96).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(2, -1), rtol=0.02, atol=0.2)


def test_inputs_that_are_no_multiple_of_a_group_and_the_head_are_int8():
    layer = random_linear(inputs=100)
    layer.quantize("int4")
    assert layer.weight.dtype == torch.int8
    model = families.tiny_model.__wrapped__("falcon 7b", mlp_width=96)
    quantize(model, "int4")
    assert model.head.weight.dtype == torch.int8
    assert model.embed.weight.dtype == torch.float64
    assert model.layers[0].mlp.up.weight.dtype == torch.uint8


@pytest.mark.parametrize("outputs", [16, 48, 64, 112, 4096 + 80])
def test_blocks_are_read_back(outputs):
    if int4_blocks.int4_convert is None:
        pytest.skip("this torch has no int4 kernel")
    numbers = torch.randint(16, (outputs, 64), dtype=torch.uint8)
    blocks = int4_blocks.to_blocks(numbers)
    assert not torch.equal(int4_blocks.from_blocks(blocks.flip(0)), numbers)
    assert torch.equal(int4_blocks.from_blocks(blocks), numbers)


def test_samples_are_values_of_the_weight():
    for dtype in (torch.float32, torch.bfloat16):
        layer, weight = rounded_linear(dtype=dtype, outputs=80)
        for place in ((0, 0), (79, 95), (70, 33)):
            value, step = quantized.INT4.sample(layer.weight, layer.scale, *place)
            assert value == pytest.approx(weight[place].item())
            assert abs(value - random_linear(dtype, outputs=80).weight[place].item()) <= 1.01 * step
