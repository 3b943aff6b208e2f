"""attend(): which kernel it chooses, and each kernel against a plain softmax, in every dtype."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from streamllm.models import attention
from streamllm.models.attention import attend
from streamllm.models.step import Band, Step

HEADS = [(4, 4), (4, 2), (4, 1)]
B, D, S = 2, 16, 3


@pytest.fixture(autouse=True, params=[False, True], ids=["amd", "intel"])
def processor_vendor(request, monkeypatch):
    monkeypatch.setattr(attention, "IS_INTEL", request.param)


def case(H, G, T, K, dtype=torch.float64, rows=1, masked=True, sink_queries=False, seed=0):
    """Random queries, sink queries, keys and values, and a step.

    `masked`: each query sees the last key and a random half of the others; else all keys. `sink_queries`: the first S
    keys are scored by a query of their own.
    """
    torch.manual_seed(seed)
    query, sink_query = torch.randn(2, B, H, T, D, dtype=torch.float64).mul(1.5).to(dtype)
    keys, values = torch.randn(2, B, G, K, D, dtype=torch.float64).to(dtype)
    visible = (torch.rand(rows, T, K) < 0.5) | (torch.arange(K) == K - 1) if masked else None
    places = torch.arange(T).expand(rows, T)
    key_places = torch.arange(K).expand(rows, K)
    step = Step(places, places, places, places, key_places, visible, S if sink_queries else 0, K)
    return query, sink_query if sink_queries else None, keys, values, step


def plain_softmax(query, sink_query, keys, values, step, scale, bias=None):
    """The same in float64, one head and one query at a time."""
    sink_query = query if sink_query is None else sink_query
    query, sink_query, keys, values = (x.double() for x in (query, sink_query, keys, values))
    mask = step.mask()
    B, H, T, _ = query.shape
    G, K = keys.shape[1:3]
    out = torch.empty_like(query)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                row = b if step.query_place.shape[0] > 1 else 0
                scores = torch.stack(
                    [
                        (sink_query if k < step.sinks else query)[b, h, t] @ keys[b, g, k] * scale
                        + (0 if bias is None else bias[row, h, t, k].double())
                        for k in range(K)
                    ]
                )
                if mask is not None:
                    scores[~mask[row, t]] = -torch.inf
                out[b, h, t] = scores.softmax(0) @ values[b, g]
    return out


# The largest error that is allowed, for outputs of about 1.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "masked", "sink_queries", "rows", "biased"), [
    (1, False, False, 1, False),
    (1, False, True, 1, False),
    (1, True, True, B, False),
    (5, True, False, 1, False),
    (5, True, False, B, False),
    (5, True, True, 1, False),
    (5, True, True, B, False),
    (1, False, False, 1, True),
    (5, True, False, B, True),
    (5, False, False, 1, True),
])  # fmt: skip
def test_every_kernel_equals_the_plain_softmax(H, G, T, masked, sink_queries, rows, biased, dtype):
    inputs = case(H, G, T, 9, dtype, rows, masked, sink_queries)
    bias = torch.randn(rows, H, T, 9) if biased else None
    wanted = plain_softmax(*inputs, 0.25, bias)
    kernels = [attend, attention.one_softmax, *([] if sink_queries else [attention.fused])]
    for kernel in kernels:
        out = kernel(*inputs, 0.25, bias)
        assert out.dtype == dtype
        assert out.shape == (B, H, T, D)
        assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_every_kernel_computes_dense_attention(dtype, window):
    inputs = *case(4, 2, 12, 12, dtype)[:4], Step.dense(12, window)
    wanted = plain_softmax(*inputs, 0.25)
    for name, kernel in attention.KERNELS.items():
        out = kernel(*inputs, 0.25, None)
        assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype], name


def test_arguments_are_not_changed():
    for sink_queries in (False, True):
        inputs = case(4, 2, 5, 9, sink_queries=sink_queries)
        tensors = [x for x in inputs[:4] if x is not None]
        before = [x.clone() for x in tensors]
        bias = torch.zeros(1, 4, 5, 9)
        for kernel in (attend, attention.one_softmax):
            kernel(*inputs, 0.25, bias)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
        assert torch.equal(bias, torch.zeros_like(bias))


def test_tensors_need_not_be_contiguous():
    *inputs, step = case(4, 2, 5, 9, sink_queries=True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    padded = [torch.cat((x, x + 1), 2)[:, :, : x.shape[2]] for x in strided[2:]]
    wanted = attend(*inputs, step, 0.25)
    assert torch.allclose(attend(*strided, step, 0.25), wanted, atol=1e-14)
    assert torch.allclose(attend(*strided[:2], *padded, step, 0.25), wanted, atol=1e-14)


def test_gradients_flow_through_both_kernels():
    for kernel in (attention.one_softmax, attention.fused):
        query, _, keys, values, step = case(4, 2, 5, 9)
        inputs = tuple(x.requires_grad_() for x in (query, keys, values))
        assert torch.autograd.gradcheck(
            lambda q, k, v, step=step, kernel=kernel: kernel(q, None, k, v, step, 0.25, None), inputs
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float16_scores_do_not_overflow(dtype):
    """Keys of some models are so large that q·k exceeds 65,504, the largest float16, before it is scaled."""
    for sink_queries in (False, True):
        inputs = case(4, 2, 1, 9, dtype, masked=False, sink_queries=sink_queries)
        for x in inputs[:3]:
            if x is not None:
                x.fill_(80)  # q·k is 16 · 80² = 102,400 for every key
        wanted = inputs[3].float().mean(2, keepdim=True).repeat_interleave(2, 1)
        for kernel in (attend, attention.one_softmax):
            assert (kernel(*inputs, D**-0.5, None) - wanted).abs().max() < 0.01


# The choice of the kernel: the rows of the table in `kernel_for`

BANDED, CAUSAL, BY_PLACES = "banded", "causal", "by places"


@pytest.mark.parametrize(("queries", "visibility", "sink_queries", "dtype", "biased", "kernel"), [
    (1, BY_PLACES, True, torch.float32, False, "one_softmax"),
    (1, BY_PLACES, True, torch.bfloat16, True, "one_softmax"),
    (5, BANDED, True, torch.float32, False, "tiles"),
    (5, BANDED, True, torch.float64, True, "tiles"),
    (5, BANDED, True, torch.bfloat16, True, "tiles"),
    (5, BY_PLACES, True, torch.float32, False, "one_softmax"),
    (5, BANDED, False, torch.bfloat16, True, "tiles"),
    (5, CAUSAL, False, torch.float16, True, "tiles"),
    (5, BY_PLACES, False, torch.bfloat16, True, "one_softmax"),
    (1, BY_PLACES, False, torch.bfloat16, True, "one_softmax"),
    (1, BY_PLACES, False, torch.float32, False, "one_softmax"),
    (1, BY_PLACES, False, torch.float32, True, "one_softmax"),
    (5, BANDED, False, torch.float32, False, "tiles"),
    (5, BANDED, False, torch.bfloat16, False, "tiles"),
    (5, CAUSAL, False, torch.float32, False, "fused"),
    (5, CAUSAL, False, torch.bfloat16, False, "fused"),
    (5, CAUSAL, False, torch.float32, True, "fused"),
    (5, BY_PLACES, False, torch.float32, False, "fused"),
])  # fmt: skip
def test_the_kernel_is_chosen_by_the_table(
    monkeypatch, queries, visibility, sink_queries, dtype, biased, kernel
):
    step = case(2, 1, queries, 9, dtype, sink_queries=sink_queries)[4]
    if visibility == BANDED:
        step = replace(step, band=Band(4, 3, S, S, 5), visible=None)
    elif visibility == CAUSAL:
        step = Step.dense(queries)
    keys = step.key_place.shape[1]
    query, sink_query = torch.ones(2, 1, 2, queries, D, dtype=dtype)
    stored = torch.ones(1, 1, keys, D, dtype=dtype)
    bias = torch.zeros(1, 2, queries, keys) if biased else None
    called = []
    for name, plain in attention.KERNELS.items():
        spy = lambda *inputs, name=name, plain=plain: called.append(name) or plain(*inputs)  # noqa: E731
        monkeypatch.setitem(attention.KERNELS, name, spy)
    attend(query, sink_query if sink_queries else None, stored, stored, step, 0.25, bias)
    assert called == [kernel]


@pytest.mark.parametrize(
    ("queries", "band", "kernel"), [(1, None, "fused"), (5, Band(4, 0, 0, 0, 5), "fused")]
)
def test_the_kernel_on_an_accelerator_is_chosen_by_the_table(queries, band, kernel):
    step = replace(case(2, 1, queries, 9)[4], band=band)
    query = torch.empty(1, 2, queries, D, device="meta")
    assert attention.kernel_for(query, None, step, None) == kernel
    assert attention.kernel_for(query, query, step, None) == ("tiles" if band else "one_softmax")


def test_merged_parts_equal_one_softmax_over_all_keys():
    """For any split of the keys, also with a part that some queries do not see at all."""
    query, _, keys, values, _ = case(4, 2, 5, 9)
    bias = torch.zeros(5, 9, dtype=torch.float64)
    bias[2:, 6:] = -torch.inf
    ((whole, _),) = [attention._by_matmul(query, keys, values, 0.25, bias)]
    for cuts in ([0, 9], [0, 3, 9], [0, 6, 9], [0, 1, 6, 9], [0, 0, 9]):
        parts = [
            attention._by_matmul(query, keys[:, :, a:b], values[:, :, a:b], 0.25, bias[:, a:b])
            for a, b in itertools.pairwise(cuts)
        ]
        assert (attention.merge(parts) - whole).abs().max() < 1e-14


def test_both_kernels_of_a_part_return_the_same_output_and_logsumexp():
    query, _, keys, values, _ = case(4, 4, 5, 9, torch.float32)
    for bias in (None, torch.randn(5, 9)):
        for got, wanted in zip(
            attention._by_flash(query, keys, values, 0.25, bias),
            attention._by_matmul(query, keys, values, 0.25, bias),
            strict=True,
        ):
            assert (got - wanted).abs().max() < 2e-6
