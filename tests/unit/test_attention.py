"""attend(): its kernels against the softmax written out, in every type, and against each other."""

from __future__ import annotations

import pytest
import torch

from streamllm.models import attention
from streamllm.models.attention import attend
from streamllm.models.step import Step

HEADS = [(4, 4), (4, 2), (4, 1)]
B, D, S = 2, 16, 3


@pytest.fixture(autouse=True, params=[False, True], ids=["others", "intel"])
def of_each_maker(request, monkeypatch):
    monkeypatch.setattr(attention, "INTEL", request.param)


def case(H, G, T, K, dtype=torch.float64, rows=1, holes=True, far=False, seed=0):
    """Queries, keys and values, and a step in which each query sees itself and a random half of the keys."""
    torch.manual_seed(seed)
    near, apart = torch.randn(2, B, H, T, D, dtype=torch.float64).mul(1.5).to(dtype)
    keys, values = torch.randn(2, B, G, K, D, dtype=torch.float64).to(dtype)
    visible = (torch.rand(rows, T, K) < 0.5) | (torch.arange(K) == K - 1) if holes else None
    places = torch.arange(T).expand(rows, T)
    keys_at = torch.arange(K).expand(rows, K)
    step = Step(places, places, places, places, keys_at, visible, S if far else 0, K)
    return near, apart if far else near, keys, values, step


def written_out(near, far, keys, values, step, scale, bias=None):
    """The same in float64, head by head and query by query."""
    near, far, keys, values = (x.double() for x in (near, far, keys, values))
    mask = step.mask()
    B, H, T, _ = near.shape
    G, K = keys.shape[1:3]
    out = torch.empty_like(near)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                row = b if step.near.shape[0] > 1 else 0
                scores = torch.stack(
                    [
                        (far if k < step.sinks else near)[b, h, t] @ keys[b, g, k] * scale
                        + (0 if bias is None else bias[row, h, t, k].double())
                        for k in range(K)
                    ]
                )
                if mask is not None:
                    scores[~mask[row, t]] = -torch.inf
                out[b, h, t] = scores.softmax(0) @ values[b, g]
    return out


# Allowed and, in brackets, observed: the largest error of an output of size 1.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "holes", "far", "rows", "biased"), [
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
def test_every_kernel_is_the_softmax_written_out(H, G, T, holes, far, rows, biased, dtype):
    near, apart, keys, values, step = case(H, G, T, 9, dtype, rows, holes, far)
    bias = torch.randn(rows, H, T, 9) if biased else None
    wanted = written_out(near, apart, keys, values, step, 0.25, bias)
    kernels = [attend, attention._by_matmul]
    got = [kernel(near, apart, keys, values, step, 0.25, bias) for kernel in kernels]
    if not far:
        got.append(attention._fused(near, keys, values, step, 0.25, bias))
    for read in got:
        assert read.dtype == dtype
        assert read.shape == (B, H, T, D)
        assert (read.double() - wanted).abs().max() <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_dense_texts_by_both_kernels(dtype, window):
    near, far, keys, values, _ = case(4, 2, 12, 12, dtype)
    step = Step.dense(12, window)
    wanted = written_out(near, far, keys, values, step, 0.25)
    for read in (
        attention._by_matmul(near, far, keys, values, step, 0.25, None),
        attention._fused(near, keys, values, step, 0.25, None),
    ):
        assert (read.double() - wanted).abs().max() <= ROUNDING[dtype]


def test_nothing_that_is_given_is_written_to():
    for far in (False, True):
        given = case(4, 2, 5, 9, far=far)
        before = [x.clone() for x in given[:4]]
        bias = torch.zeros(1, 4, 5, 9)
        for kernel in (attend, attention._by_matmul):
            kernel(*given, 0.25, bias)
        assert all(torch.equal(x, y) for x, y in zip(given[:4], before, strict=True))
        assert torch.equal(bias, torch.zeros_like(bias))


def test_tensors_need_not_be_contiguous():
    near, far, keys, values, step = case(4, 2, 5, 9, far=True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (near, far, keys, values)]
    roomy = [torch.cat((x, x + 1), 2)[:, :, : x.shape[2]] for x in strided[2:]]
    wanted = attend(near, far, keys, values, step, 0.25)
    assert torch.allclose(attend(*strided, step, 0.25), wanted, atol=1e-14)
    assert torch.allclose(attend(*strided[:2], *roomy, step, 0.25), wanted, atol=1e-14)


def test_gradients_flow_through_both_kernels():
    for kernel in (attention._by_matmul, lambda near, far, *rest: attention._fused(near, *rest)):
        near, _, keys, values, step = case(4, 2, 5, 9)
        near, keys, values = (x.requires_grad_() for x in (near, keys, values))
        assert torch.autograd.gradcheck(
            lambda q, k, v, step=step, kernel=kernel: kernel(q, q, k, v, step, 0.25, None),
            (near, keys, values),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_half_types_do_not_overflow(dtype):
    """Some models' keys are so large that q·k passes 65,504, the end of float16, before it is scaled."""
    for far in (False, True):
        near, apart, keys, values, step = case(4, 2, 1, 9, dtype, holes=False, far=far)
        for x in (near, apart, keys):
            x.fill_(80)  # 16 · 80² is 102,400, for all keys alike
        wanted = values.float().mean(2, keepdim=True).repeat_interleave(2, 1)
        for kernel in (attend, attention._by_matmul):
            assert (kernel(near, apart, keys, values, step, D**-0.5, None) - wanted).abs().max() < 0.01
