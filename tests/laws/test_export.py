"""The law of torch.export: an exported dense forward gives the logits of the model, where it can for any length."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from streamllm.models import linear
from tests.laws.families import CONFIGS, tiny_model
from tests.laws.scenarios import error, random_tokens

# What these compute depends on the length in other ways than by its size: they are exported for one length.
ONE_LENGTH = (
    "gpt_neox, dynamic",
    "mistral",
    "qwen2, upper layers slide",
    "qwen2, three windows",
    "qwen3, dynamic and sliding",
)
LENGTH = torch.export.Dim("length", min=2, max=512)


def exported(model, tokens, any_length):
    return torch.export.export(
        model, (tokens,), dynamic_shapes=({1: LENGTH},) if any_length else None
    ).module()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_model_gives_the_same_logits(name):
    model = deepcopy(tiny_model(name)).float().requires_grad_(False).eval()
    linear.arrange(model)
    tokens, longer = random_tokens(33), random_tokens(90)
    with torch.no_grad():
        assert error(exported(model, tokens, any_length=False)(tokens), model(tokens)) <= 1e-4
        if name in ONE_LENGTH:
            with pytest.raises(Exception, match=r"onstraint|Guard|specializ|hash"):
                exported(model, tokens, any_length=True)
        else:
            assert error(exported(model, tokens, any_length=True)(longer), model(longer)) <= 1e-4
        assert error(model(longer), deepcopy(model)(longer)) == 0  # nothing of the trace stayed behind


def test_a_packed_model_is_exported_and_stays_as_it_is():
    model = deepcopy(tiny_model("qwen2")).to(torch.bfloat16).requires_grad_(False).eval()
    linear.arrange(model)
    tokens = random_tokens(33)
    with torch.no_grad():
        before = model(tokens)
        got = exported(model, tokens, any_length=False)(tokens)
        assert torch.equal(model(tokens), before)
    assert (got - before).float().abs().mean() <= 0.02 * before.float().std()
