"""The laws for steps that are rewritten as sums (compiled/cpu_loops.py): run unchanged, and compiled to C++.

A rewritten step also runs without a compiler, kernel by kernel. Every family is tested that way. A few models are
compiled, each to test several things. compiled/library.py is tested in tests/unit/test_library.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import cpu_loops, library
from streamllm.models import linear
from tests.laws import families
from tests.laws.scenarios import TOLERANCE, error, feed, random_tokens, reference_logits, tiny_llama

S, W = 4, 6
PARTS = [16, *[1] * 14]  # a prompt that fills the window, then single tokens
MATRIX_PRODUCT_KERNELS = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "_linear_pointwise", "_weight_int8pack_mm", "linear",
)  # fmt: skip


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products, the kernels that must not remain in a rewritten step of one row."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in MATRIX_PRODUCT_KERNELS
        return function(*args, **(kwargs or {}))


@pytest.fixture
def matrix_products(monkeypatch):
    """Steps are rewritten and run without a compiler. The list has the number of matrix products of each step."""
    counts = []

    def not_compiled(module, inputs):
        cpu_loops.as_sums(module, inputs)

        def run(*inputs):
            with MatrixProducts() as products:
                (logits,) = module(*inputs)
            counts.append(products.count)
            return logits

        return run

    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setattr(cpu_loops, "compiled", not_compiled)
    return counts


def fresh(name="llama", dtype=torch.float64, **changes) -> nn.Module:
    """A new model, which a test may move and quantize."""
    if name == "llama":
        return tiny_llama.__wrapped__(dtype=dtype, **changes)
    return families.tiny_model.__wrapped__(name, **changes).to(dtype)


def dequantized(model: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of `like` with the dequantized weights of `model`."""
    exact = copy.deepcopy(like)
    for module, quantized in zip(exact.modules(), model.modules(), strict=True):
        if isinstance(quantized, linear.Linear):
            module.weight = nn.Parameter(quantized.weight * quantized.scale[:, None], False)
    return exact


def difference_from_the_definition(name, rows=1, **changes):
    model, tokens = fresh(name, **changes), random_tokens(30, rows)
    compiled = streamllm.compile(model, "inductor")
    with torch.inference_mode():
        got = feed(compiled, SinkCache(compiled, S, W, rows), tokens, PARTS)
    assert compiled.recordings == 1
    return error(got, reference_logits(fresh(name, **changes), tokens, S, W))


# Rewritten, not compiled


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", *families.CONFIGS])
def test_every_family_equals_the_definition(matrix_products, name, rows):
    assert difference_from_the_definition(name, rows) <= TOLERANCE
    assert len(matrix_products) == 14
    assert (max(matrix_products) == 0) == (rows == 1)


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (4, 1), (8, 3), (2, 20)])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_any_sinks_and_window_equal_the_definition(matrix_products, sinks, window, quantize):
    compiled, tokens = streamllm.compile(fresh(kv_heads=1), "inductor"), random_tokens(40)
    for origin in (0, 10**9) if quantize is None else (0,):
        cache = SinkCache(compiled, sinks, window, origin=origin, quantize=quantize)
        wanted = reference_logits(tiny_llama(kv_heads=1), tokens, sinks, window, bool(quantize))
        assert error(feed(compiled, cache, tokens), wanted) <= TOLERANCE
    assert compiled.recordings == 1


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon rw", "mpt", "qwen3"])
def test_a_step_of_one_row_has_no_matrix_product(matrix_products, name, dtype, quantized):
    """A single one would remain a call, and inductor would not fuse what is around it."""
    model = fresh(name, dtype, layers=1)
    if quantized:
        linear.quantize(model)
    else:
        linear.arrange(model)  # layouts of oneDNN and MKL, which rewriting must undo
    compiled = streamllm.compile(model, "inductor")
    feed(compiled, SinkCache(compiled, S, W), random_tokens(13), [10, 1, 1, 1])
    assert matrix_products == [0] * 3


def test_matrix_products_are_counted_where_nothing_is_rewritten(matrix_products, monkeypatch):
    monkeypatch.delitem(cpu_loops._AS_SUMS, torch.nn.functional.linear)
    monkeypatch.delitem(cpu_loops._AS_SUMS, torch.matmul)
    assert difference_from_the_definition("llama") <= TOLERANCE
    assert min(matrix_products) > 0


@pytest.mark.parametrize(("name", "minimum"), [("llama", 6), ("falcon rw", 1)])
def test_values_that_depend_only_on_places_are_stored_once_for_all_layers(monkeypatch, name, minimum):
    """Llama: three cosines and three sines. Falcon RW: the ALiBi bias."""
    graphs = []

    def not_compiled(module, inputs):
        cpu_loops.as_sums(module, inputs)
        graphs.append((module.graph, inputs))
        return lambda *inputs: module(*inputs)[0]

    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setattr(cpu_loops, "compiled", not_compiled)
    for layers in (1, 3):
        model = streamllm.compile(fresh(name, layers=layers), "inductor")
        feed(model, SinkCache(model, S, W), random_tokens(13), [12, 1])
    stored = [
        len([node for node in graph.nodes if node.target is cpu_loops._stored])
        for graph, inputs in graphs
        if len(inputs) > 1
    ]
    assert stored[0] == stored[1] >= minimum


def test_a_value_that_is_changed_in_place_after_its_first_use_is_not_stored():
    graph = torch.fx.Graph()
    tokens, places = graph.placeholder("tokens"), graph.placeholder("places")
    changed_between_uses, changed_before_use = (graph.call_method("mul", (places, 2)) for _ in range(2))
    x = graph.call_method("add", (tokens, changed_between_uses))
    graph.call_method("add_", (changed_between_uses, places))
    graph.call_method("add_", (changed_before_use, places))
    x = graph.call_method("add", (graph.call_method("add", (x, changed_between_uses)), changed_before_use))
    graph.output(x)
    module, inputs = torch.fx.GraphModule({}, graph), [torch.tensor([1]), torch.tensor([10])]
    cpu_loops.as_sums(module, inputs)
    assert module(*inputs).item() == 1 + 20 + 30 + 30
    assert [node.args[0] for node in graph.nodes if node.target is cpu_loops._stored] == [changed_before_use]


# Mutations: faults of the rewriting must break the law


def no_bias(patch):
    linear = cpu_loops._linear
    patch(torch.nn.functional.linear, lambda x, weight, bias=None, *rest: linear(x, weight))


def keys_in_another_order(patch):
    matmul = cpu_loops._matmul
    patch(torch.matmul, lambda a, b: matmul(a, b.roll(1, -1)))


def outputs_in_another_order(patch):
    linear = cpu_loops._linear
    patch(torch.nn.functional.linear, lambda x, weight, *bias: linear(x, weight.roll(1, 0), *bias))


@pytest.mark.parametrize("mutation", [no_bias, keys_in_another_order, outputs_in_another_order])
def test_a_mutation_breaks_the_law(matrix_products, monkeypatch, mutation):
    mutation(lambda target, mutant: monkeypatch.setitem(cpu_loops._AS_SUMS, target, mutant))
    assert difference_from_the_definition("llama") > 1e-3


# Compiled to C++


def test_a_step_is_compiled_once_for_resets_other_caches_and_other_places(compiling):
    """The model has grouped heads, an odd vocabulary and biases."""
    model, tokens = fresh(layers=1), random_tokens(40)
    compiled = streamllm.compile(model, "inductor")
    wanted = reference_logits(tiny_llama(layers=1), tokens, S, W)
    with torch.inference_mode():
        cache = SinkCache(compiled, S, W)
        assert error(feed(compiled, cache, tokens), wanted) <= TOLERANCE
        cache.reset()
        assert error(feed(compiled, cache, tokens, [9, 1, 6, *[1] * 10, 14]), wanted) <= TOLERANCE
        cache = SinkCache(compiled, S, W, origin=10**9)
        feed(compiled, cache, torch.cat((tokens[:, :20], random_tokens(1, seed=1)), 1))
        cache.step_back()
        assert error(feed(compiled, cache, tokens[:, 20:]), wanted[:, 20:]) <= TOLERANCE
    assert compiled.recordings == 1
    generated = [
        list(streamllm.generate(model, tokens[0], SinkCache(model, S, W), max_new_tokens=20))
        for model in (compiled, tiny_llama(layers=1))
    ]
    assert generated[0] == generated[1]
    assert compiled.recordings == 1


def test_strided_tokens_of_several_rows_and_alibi_equal_the_definition(compiling):
    model, tokens = fresh("falcon rw", layers=1), random_tokens(20, rows=3)
    compiled = streamllm.compile(model, "inductor")
    wanted = reference_logits(fresh("falcon rw", layers=1), tokens, S, W)
    for layout in (tokens, tokens.t().contiguous().t()):
        cache = SinkCache(compiled, S, W, 3)
        assert error(feed(compiled, cache, layout, [15, *[1] * 5]), wanted) <= TOLERANCE
    assert compiled.recordings == 1


def test_bfloat16_is_as_close_to_float32_as_in_the_model(compiling):
    model, tokens = fresh(dtype=torch.bfloat16, layers=1), random_tokens(60)
    exact, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    compiled = streamllm.compile(model, "inductor")
    parts = [20, *[1] * 40]
    wanted, of_model, of_step = (
        feed(forward, SinkCache(forward, S, W), tokens, parts) for forward in (exact, plain, compiled)
    )
    errors = [(logits.float() - wanted)[:, 20:].abs().mean() for logits in (of_model, of_step)]
    assert errors[1] <= 1.1 * errors[0]


def test_int8_weights_and_cache_equal_the_dequantized_weights(compiling):
    model, tokens = fresh("gpt_neox", torch.float32, layers=1), random_tokens(30)
    plain = copy.deepcopy(model)
    linear.quantize(model)
    exact = dequantized(model, plain)
    compiled = streamllm.compile(model, "inductor")
    got, wanted = (
        feed(forward, SinkCache(forward, S, W, quantize="int8"), tokens, PARTS)
        for forward in (compiled, exact)
    )
    assert error(got, wanted) <= 1e-4
    assert error(feed(plain, SinkCache(plain, S, W, quantize="int8"), tokens, PARTS), wanted) > 1e-3


# When a step is recorded again


@pytest.mark.parametrize("backend", ["flat", "inductor"])
def test_a_step_is_recorded_again_when_weights_are_moved_or_converted(matrix_products, backend):
    """A recording depends on the layout and the memory of the weights."""
    model, tokens = fresh(dtype=torch.float32, layers=1), random_tokens(30)
    compiled, plain = streamllm.compile(model, backend), fresh(dtype=torch.float32, layers=1)

    def equal() -> bool:
        got, wanted = (
            feed(forward, SinkCache(forward, S, W), tokens, PARTS) for forward in (compiled, plain)
        )
        assert got.dtype == wanted.dtype
        return error(got, wanted) <= 1e-4

    assert equal()
    assert equal()
    assert compiled.recordings == 1
    cache = SinkCache(compiled, S, W)
    feed(compiled, cache, tokens, PARTS)
    compiled.to(torch.float64)
    plain.to(torch.float64)
    with pytest.raises(ValueError, match="the cache was made for"):
        compiled(tokens[:, :1], cache)
    assert equal()
    model.to(torch.float32)
    plain.to(torch.float32)
    assert equal()
    assert compiled.recordings == 3
    for weight in (*model.parameters(), *plain.parameters()):
        weight.data = weight * 1.1
    assert equal()
    linear.quantize(model)
    linear.quantize(plain)
    assert equal()
    assert compiled.recordings == 5
    model.load_state_dict(model.state_dict())
    assert equal()
    assert compiled.recordings == 5


@pytest.mark.parametrize("backend", ["flat", "inductor"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_weights(matrix_products, backend, copied):
    tokens = random_tokens(30)
    compiled = streamllm.compile(fresh(layers=1), backend)
    before = feed(compiled, SinkCache(compiled, S, W), tokens, PARTS)
    other = copied(compiled)
    assert (compiled.recordings, other.recordings) == (1, 0)
    for weight in other.parameters():
        weight.data.mul_(1.1)
    got = feed(other, SinkCache(other, S, W), tokens)
    assert error(got, reference_logits(other.model, tokens, S, W)) <= TOLERANCE
    assert error(feed(compiled, SinkCache(compiled, S, W), tokens), before) <= TOLERANCE


def test_prompts_and_gradients_use_the_model_and_no_recording(matrix_products):
    model = fresh(layers=1).requires_grad_(True)
    compiled = streamllm.compile(model, "inductor")
    cache = SinkCache(compiled, S, W)
    feed(compiled, cache, random_tokens(S + W), [S + W - 2, 2])
    assert not matrix_products
    feed(compiled, cache, random_tokens(2))
    assert len(matrix_products) == 2
    compiled(random_tokens(1)).sum().backward()
    assert model.head.weight.grad is not None
    assert len(matrix_products) == 2


def test_an_interrupted_compilation_does_not_change_the_stream(matrix_products, monkeypatch):
    compiled, tokens = streamllm.compile(fresh(), "inductor"), random_tokens(30)
    cache, not_interrupted = SinkCache(compiled, S, W), cpu_loops.compiled
    got = feed(compiled, cache, tokens[:, :20], [20])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_loops, "compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(tokens[:, 20:21], cache)
    monkeypatch.setattr(cpu_loops, "compiled", not_interrupted)
    got = torch.cat((got, feed(compiled, cache, tokens[:, 20:])), 1)
    assert error(got, reference_logits(tiny_llama(), tokens, S, W)) <= TOLERANCE


def test_a_failed_compilation_does_not_change_the_layout_of_the_weights(matrix_products, monkeypatch):
    def failing(*_):
        raise streamllm.CompileError("no compiler")

    model, tokens = fresh(dtype=torch.bfloat16), random_tokens(S + W + 5)
    linear.arrange(model)
    before = [weight.is_mkldnn for weight in model.parameters()]
    wanted = feed(model, SinkCache(model, S, W), tokens)
    monkeypatch.setattr(cpu_loops, "compiled", failing)
    compiled = streamllm.compile(model, "inductor")
    with pytest.raises(streamllm.CompileError):
        feed(compiled, SinkCache(compiled, S, W), tokens)
    assert [weight.is_mkldnn for weight in model.parameters()] == before
    assert torch.equal(feed(model, SinkCache(model, S, W), tokens), wanted)
