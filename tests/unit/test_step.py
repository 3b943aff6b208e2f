"""Step, and the forward with a cache: worked examples, gradients and memory, and wrong arguments."""

from __future__ import annotations

import weakref

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.models.step import Step, geometry_of
from tests.laws.scenarios import random_tokens, tiny_llama


def trainable(**options):
    """A copy of tiny_llama whose weights require gradients."""
    model = tiny_llama(**options)
    copy = type(model)(model.config).to(model.embed.weight.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def test_the_example_in_the_docstring_of_step():
    cache = SinkCache(tiny_llama(), sinks=2, window=3)
    tiny_llama()(random_tokens(9), cache)
    step = cache.plan(1).steps[None]
    assert step.slots.tolist() == [[3]]
    assert step.key_place.tolist() == [[0, 1, 8, 9, 7]]
    assert step.visible is None
    assert (step.query_place.item(), step.sink_query_place.item(), step.sinks) == (9, 4, 2)
    assert sorted(step.distance().flatten().tolist()) == [0, 1, 2, 3, 4]


def test_a_first_chunk_sees_its_sinks_once():
    cache = SinkCache(tiny_llama(), sinks=2, window=3)
    seen_by_query = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 3, 4, 5]]
    step = cache.plan(5).steps[None]  # all fit: the plain causal triangle
    assert step.is_causal
    assert step.key_place.tolist() == [[0, 1, 2, 3, 4]]
    assert [step.key_place[0, visible].tolist() for visible in step.mask()[0]] == seen_by_query[:5]
    step = cache.plan(6).steps[None]  # the sinks, then the chunk, in which the sinks are masked
    assert step.key_place.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5]]
    assert not step.mask()[0, :, 2:4].any()
    assert [step.key_place[0, visible].tolist() for visible in step.mask()[0]] == seen_by_query


def test_distances_of_the_visible_keys_are_consecutive():
    """n visible keys are at the distances 0 … n-1, after any evictions and for any origin."""
    for origin in (0, 5, 10**12):
        cache = SinkCache(tiny_llama(), sinks=3, window=4, origin=origin)
        for length in (1, 1, 2, 9, 1, 30, 1, 1):
            step = cache.plan(length).steps[None]
            mask = step.mask()
            visible = torch.ones(1, length, step.key_place.shape[1]).bool() if mask is None else mask
            for row, seen in zip(step.distance()[0], visible[0], strict=True):
                assert sorted(row[seen].tolist()) == list(range(int(seen.sum())))
            tiny_llama()(random_tokens(length), cache)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 9])
def test_a_dense_step_is_causal_and_banded(window):
    step = Step.dense(8, window)
    expected = torch.ones(8, 8).tril().bool()
    if window is not None:
        expected &= torch.ones(8, 8).triu(1 - window).bool()
    assert torch.equal(step.mask()[0], expected)
    assert torch.equal(step.distance()[0], torch.arange(8)[:, None] - torch.arange(8))
    assert Step.dense(1, window).mask() is None


def test_a_forward_with_a_cache_builds_no_autograd_graph():
    model, cache = trainable(), SinkCache(tiny_llama(), 2, 5, chunk=8)
    for tokens in (random_tokens(30), random_tokens(1), random_tokens(20)):
        assert not model(tokens, cache).requires_grad
    model(random_tokens(20)).sum().backward()  # without a cache it does
    assert all(weight.grad is not None for weight in model.parameters())


def test_inference_and_training_may_alternate():
    """Cached frequencies and masks can be used in inference mode and by autograd."""
    model = trainable(rope="yarn")
    cache = SinkCache(model, 2, 5)
    for _ in range(2):
        with torch.inference_mode():
            model(random_tokens(12), cache)
            model(random_tokens(12))
        model(random_tokens(12)).sum().backward()
        model(random_tokens(1), cache)


@pytest.mark.parametrize("options", [{}, {"lengths": [1590]}])
def test_a_long_prompt_keeps_the_activations_of_one_chunk(options):
    """Outputs of the norm for earlier chunks are freed before the next chunk."""
    model, cache, outputs, alive = tiny_llama(), SinkCache(tiny_llama(), 2, 5, chunk=16), [], []

    def remember(module, inputs, output):
        outputs.append(weakref.ref(output))

    def count(module, inputs):
        alive.append(sum(output() is not None for output in outputs))

    hooks = [model.norm.register_forward_hook(remember), model.embed.register_forward_pre_hook(count)]
    try:
        model(random_tokens(1600), cache, logits_to_keep=3, **options)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(alive) == 100
    assert max(alive) <= 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 3), "not torch.float32 of shape"),
        (torch.zeros(1, 3, dtype=torch.complex64), "not torch.complex64"),
        (torch.zeros(1, 3, dtype=torch.bool), "not torch.bool"),
        (torch.zeros(1, 3, dtype=torch.uint8), "not torch.uint8"),
        (torch.zeros(3, dtype=torch.int64), r"of shape \[3\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"of shape \[1, 0\]"),
        (torch.zeros(0, 3, dtype=torch.int64), r"of shape \[0, 3\]"),
        (torch.tensor([[0, 61]]), "token id 61 is outside the model's vocabulary of 0 … 60"),
        (torch.tensor([[0, -1]]), "token id -1 is outside"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_wrong_tokens_are_refused(tokens, message, cached):
    cache = SinkCache(tiny_llama(), 2, 5) if cached else None
    with pytest.raises(ValueError, match=message):
        tiny_llama()(tokens, cache)
    assert cache is None or cache.seen.tolist() == [0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (3, {}, "made for a batch of 2, the tokens have 3 rows"),
        (2, {"lengths": torch.tensor([1, 6])}, r"2 whole numbers in 0 … 5, one per row, not \[1, 6\]"),
        (2, {"lengths": [-1, 5]}, r"not \[-1, 5\]"),
        (2, {"lengths": [1, 2, 3]}, r"2 whole numbers in 0 … 5, one per row, not \[1, 2, 3\]"),
        (2, {"lengths": [1.5, 2]}, r"not \[1.5, 2\]"),
        (2, {"lengths": torch.tensor([1.0, 2.0])}, r"not \[1.0, 2.0\]"),
        (2, {"lengths": torch.tensor(3)}, "2 whole numbers in 0 … 5, one per row, not 3"),
        (2, {"lengths": torch.ones(2, 1).long()}, r"not \[\[1\], \[1\]\]"),
        (2, {"logits_to_keep": 0}, r"logits_to_keep must be a whole number of at least 1, not 0"),
    ],
)
def test_arguments_that_do_not_fit_the_cache_are_refused(rows, options, message):
    cache = SinkCache(tiny_llama(), 2, 5, batch_size=2)
    with pytest.raises(ValueError, match=message):
        tiny_llama()(random_tokens(5, rows), cache, **options)
    assert cache.seen.tolist() == [0, 0]


def test_lengths_need_a_cache():
    with pytest.raises(ValueError, match="lengths need a cache"):
        tiny_llama()(random_tokens(5), lengths=[3])


def test_lengths_may_be_a_list_or_a_tensor():
    one, other = (SinkCache(tiny_llama(), 2, 5, batch_size=2) for _ in range(2))
    wanted = tiny_llama()(random_tokens(5, 2), one, lengths=[5, 2])
    assert torch.equal(
        wanted, tiny_llama()(random_tokens(5, 2), other, lengths=torch.tensor([5, 2], dtype=torch.int32))
    )
    assert one.seen.tolist() == other.seen.tolist() == [5, 2]


def test_a_model_of_another_library_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.modules\.linear\.Linear is not a model of this library"):
        SinkCache(torch.nn.Linear(2, 2))
    assert geometry_of(tiny_llama()) == tiny_llama().geometry


@pytest.mark.parametrize("length", [5, 40])  # of one chunk, and of three
@pytest.mark.parametrize("keep", [1, 3])
def test_the_head_reads_rows_of_their_own(monkeypatch, length, keep):
    """torch copies a whole weight in bfloat16 for rows that are a part of a longer tensor."""
    model = tiny_llama(dtype=torch.bfloat16)
    strides = []
    project = model.project
    monkeypatch.setattr(model, "project", lambda x: strides.append(x.stride()) or project(x))
    tokens = random_tokens(length)
    model(tokens, logits_to_keep=keep)
    model(tokens, SinkCache(model, 2, 60, chunk=16), logits_to_keep=keep)
    width = model.config.width
    assert strides == [(keep * width, width, 1)] * 2
