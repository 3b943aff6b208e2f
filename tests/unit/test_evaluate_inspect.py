"""Attention weights read by `streamllm.evaluate`, compared with the formula and a model of known attention."""

import math

import pytest
import torch

from streamllm.evaluate import attention, recommend
from streamllm.models.llama import Config, Model
from streamllm.models.rotary import Rope

VOCABULARY, SPAN = 48, 16
MARK = 0  # the token that one head of the constructed model attends to most


def config(**changes):
    return Config(
        **{
            "vocab_size": VOCABULARY, "width": 32, "mlp_width": 8, "layers": 2, "heads": 4, "kv_heads": 2,
            "head_dim": 8, "rope": Rope(10_000.0, 8), "trained_length": 64, "norm_eps": 1e-5,
            "activation": "silu", "attention_bias": False, "mlp_bias": False, "tied": False, **changes,
        }
    )  # fmt: skip


def random_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = Model(config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@torch.no_grad()
def constructed(pull):
    """One layer, two heads. Head 0 gives the mark exp(pull) times the weight of any other token; head 1 gives
    every token the same weight.

    A token's state is a one-hot vector and a constant. The output head predicts the next number from it. The
    value that head 0 reads is zero for the mark and large noise for every other token, so that attention to the
    mark lowers the loss.
    """
    width = VOCABULARY + 2
    model = Model(
        config(
            width=width, layers=1, heads=2, kv_heads=2, trained_length=SPAN, norm_eps=1e-12,
            rope=Rope(1e40, 8),  # theta is so large that the last pair of dimensions is not rotated
        )
    ).double()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    layer = model.layers[0]
    layer.attention_norm.weight.fill_(1)
    model.norm.weight.fill_(1)
    constant, size = VOCABULARY, math.sqrt(width / 2)  # the norm divides (1, 1) by sqrt(2 / width)
    model.embed.weight[:, :VOCABULARY] = torch.eye(VOCABULARY)
    model.embed.weight[:, constant] = 1
    layer.attention.q.weight[3, constant] = 1 / size
    layer.attention.k.weight[3, MARK] = pull * math.sqrt(8) / size
    torch.manual_seed(1)
    noise = torch.randn(8, VOCABULARY, dtype=torch.float64)
    noise[:, MARK] = 0
    layer.attention.v.weight[:8, :VOCABULARY] = noise
    layer.attention.o.weight[:VOCABULARY, :8] = 10 * torch.randn(VOCABULARY, 8, dtype=torch.float64)
    model.head.weight[:, :VOCABULARY] = 3 * torch.eye(VOCABULARY).roll(1, 0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 8, 21])
def test_weights_are_the_softmax_of_the_first_layer(length):
    model = random_model()
    texts = torch.randint(VOCABULARY, (3, length))
    seen = attention(model, texts)
    assert seen.weights.shape == (2, 4, length, length)
    first = model.layers[0]
    expected = torch.zeros(4, length, length, dtype=torch.float64)
    for text in texts:
        x = first.attention_norm(model.embed(text))
        q = first.attention.q(x).view(length, 4, 8)
        k = first.attention.k(x).view(length, 2, 8)
        turn = torch.arange(length)[:, None] / 10_000.0 ** (torch.arange(4).double() / 4)  # [T, D/2]
        q, k = (
            torch.cat((a * turn.cos()[:, None] - b * turn.sin()[:, None],
                       b * turn.cos()[:, None] + a * turn.sin()[:, None]), -1)
            for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )  # fmt: skip
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / math.sqrt(8)
            hidden = torch.ones(length, length).triu(1).bool()
            expected[head] += scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(seen.weights[0], expected / 3, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(2, 4, length, dtype=torch.float64))


def test_the_known_attention_is_found():
    length = 24
    text = torch.arange(length) % VOCABULARY
    weights = attention(constructed(pull=5.0), text[None]).weights[0]
    for t in range(length):
        others = math.exp(5.0) + t
        assert weights[0, t, 0].item() == pytest.approx(math.exp(5.0) / others, rel=1e-6)
        assert weights[0, t, 1 : t + 1].tolist() == pytest.approx([1 / others] * t, rel=1e-6)
        assert weights[1, t, : t + 1].tolist() == pytest.approx([1 / (t + 1)] * (t + 1), rel=1e-6)


def test_shares_are_means_over_the_later_queries():
    length = 24
    seen = attention(constructed(pull=5.0), torch.arange(length)[None])
    share = seen.first(3)
    assert share.shape == (1, 2, 3)
    expected = sum(math.exp(5.0) / (math.exp(5.0) + t) for t in range(12, 24)) / 12
    assert share[0, 0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_the_model_is_unchanged_afterwards():
    model = random_model(torch.float32)
    text = torch.randint(VOCABULARY, (1, 30))
    with torch.no_grad():
        before = model(text)
        attention(model, text)
        assert torch.equal(model(text), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("place", "pull", "needed"), [(0, 9.0, 1), (1, 9.0, 2), (3, 9.0, 4), (0, -99.0, 0)])
def test_the_recommended_sinks_are_those_up_to_the_mark(place, pull, needed):
    """The stream needs the mark, which is at `place`. Where no head attends to it, no sink is needed."""
    model = constructed(pull)
    text = torch.arange(1, 5 * SPAN) % (VOCABULARY - 1) + 1  # counts up, without the mark
    text[place] = MARK
    found = recommend(model, text, sinks=(0, 1, 2, 4), span=SPAN)
    assert found.sinks == needed
    scores = found.scores()
    assert list(scores) == [0, 1, 2, 4]
    if needed:
        assert scores[0] > 1.5 * scores[4]


def test_wrong_arguments_are_named():
    model = random_model()
    with pytest.raises(ValueError, match="too few"):
        recommend(model, torch.zeros(64, dtype=torch.int64), span=16)
    with pytest.raises(ValueError, match="no room"):
        recommend(model, torch.zeros(640, dtype=torch.int64), span=8)
    with pytest.raises(ValueError, match="N, T"):
        attention(model, torch.zeros(5, dtype=torch.int64))
