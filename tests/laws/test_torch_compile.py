"""The law of torch.compile: the same logits past eviction, and no compilation once the ring is full."""

from __future__ import annotations

import torch

from streamllm.cache import SinkCache
from tests.laws.scenarios import error, feed, random_tokens, tiny_llama

GRAPHS: list[torch.fx.GraphModule] = []


def counting(graph, inputs):
    """A backend of torch.compile that records the graph in GRAPHS and runs it unchanged."""
    GRAPHS.append(graph)
    return graph.forward


def test_a_full_ring_causes_no_new_compilation():
    model, tokens = tiny_llama(layers=1, dtype=torch.float32), random_tokens(60, rows=2)
    wanted = feed(model, SinkCache(model, 4, 12, 2), tokens)
    torch._dynamo.reset()
    GRAPHS.clear()
    try:
        compiled, cache = torch.compile(model, backend=counting), SinkCache(model, 4, 12, 2)
        got = [feed(compiled, cache, tokens[:, :20])]
        graphs_until_full = len(GRAPHS)
        got.append(feed(compiled, cache, tokens[:, 20:]))
        assert len(GRAPHS) == graphs_until_full > 0
        assert error(torch.cat(got, 1), wanted) <= 1e-4
        cache.reset()  # a second stream needs no new graph
        assert error(feed(compiled, cache, tokens), wanted) <= 1e-4
        assert len(GRAPHS) == graphs_until_full
    finally:
        torch._dynamo.reset()


def test_dense_texts_of_any_length_share_their_graphs():
    model, tokens = tiny_llama(layers=1, dtype=torch.float32), random_tokens(60, rows=2)
    torch._dynamo.reset()
    GRAPHS.clear()
    try:
        compiled = torch.compile(model, backend=counting)
        for length in (20, 33):  # the second length makes the size a variable
            assert error(compiled(tokens[:, :length]), model(tokens[:, :length])) <= 1e-4
        graphs = len(GRAPHS)
        for length in (34, 47, 58):
            assert error(compiled(tokens[:, :length]), model(tokens[:, :length])) <= 1e-4
        assert len(GRAPHS) == graphs > 0
    finally:
        torch._dynamo.reset()
