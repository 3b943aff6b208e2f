"""The scores of `streamllm.evaluate`, compared with simple loops."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from streamllm.cache import SinkCache
from streamllm.evaluate import Result, compare, load, perplexity, save
from streamllm.models.llama import Config, Model
from streamllm.models.rotary import Rope

S, W = 3, 13
VOCABULARY = 61


def build(dtype=torch.float64, seed=0):
    """A tiny Llama with weights so large that every visible token changes the logits."""
    torch.manual_seed(seed)
    model = Model(
        Config(
            vocab_size=VOCABULARY,
            width=32,
            mlp_width=48,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            rope=Rope(10_000.0, 8),
            trained_length=64,
            norm_eps=1e-5,
            activation="silu",
            attention_bias=False,
            mlp_bias=False,
            tied=False,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def text():
    return torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(1))


def nll(logits, target):
    return float(F.cross_entropy(logits.double(), target))


@torch.no_grad()
def one_by_one(model, text, cache):
    return [nll(model(text[None, t, None], cache)[0, -1], text[t + 1]) for t in range(len(text) - 1)]


def approx(value):
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("mode", ["sinks", "window", "dense"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64, 1000])
def test_a_stream_scores_as_token_by_token(model, text, mode, chunk):
    sinks, window = {"sinks": (S, W), "window": (0, W), "dense": (0, len(text))}[mode]
    with pytest.warns(UserWarning, match="trained") if mode == "dense" else torch.no_grad():
        cache = SinkCache(model, sinks=sinks, window=window)
    expected = one_by_one(model, text, cache)
    result = perplexity(model, text, mode=mode, sinks=S, window=W, chunk=chunk)
    assert result.nll == approx(sum(expected))
    assert result.tokens == result.total == len(text) - 1
    assert result.done
    assert result.perplexity == approx(math.exp(sum(expected) / len(expected)))
    assert [bucket.start for bucket in result.buckets] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for bucket in result.buckets:
        inside = expected[bucket.start - 1 : bucket.stop - 1]
        assert (bucket.tokens, bucket.nll) == (len(inside), approx(sum(inside)))
    assert result.beyond(64).nll == approx(sum(expected[63:]))


def test_window_mode_is_sinks_mode_with_no_sinks(model, text):
    window = perplexity(model, text, mode="window", sinks=S, window=W)
    assert window.nll == perplexity(model, text, mode="sinks", sinks=0, window=W).nll
    assert window.nll != approx(perplexity(model, text, sinks=S, window=W).nll)


@torch.no_grad()
def test_dense_mode_is_one_forward(model, text):
    expected = F.cross_entropy(model(text[None])[0, :-1], text[1:], reduction="sum")
    assert perplexity(model, text, mode="dense", chunk=37).nll == approx(float(expected))


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, S])
def test_recompute_is_a_fresh_forward_for_every_token(model, text, sinks):
    expected = []
    for t in range(len(text) - 1):
        recent = range(max(sinks, t - W + 1), t + 1)
        read = text[[*range(min(sinks, t + 1)), *recent]]
        assert len(read) == min(t + 1, sinks + W)
        expected.append(nll(model(read[None])[0, -1], text[t + 1]))
    result = perplexity(model, text, mode="recompute", sinks=sinks, window=W, batch=7)
    assert (result.nll, result.tokens) == (approx(sum(expected)), len(expected))
    some = perplexity(model, text, mode="recompute", sinks=sinks, window=W, every=10)
    assert (some.nll, some.tokens) == (approx(sum(expected[::10])), 30)


def test_the_same_positions_are_drawn_in_every_mode(model, text):
    settings = {"sinks": S, "window": W, "positions": 100, "seed": 5}
    stream = perplexity(model, text, mode="sinks", **settings)
    fresh = perplexity(model, text, mode="recompute", **settings)
    assert stream.tokens == fresh.tokens == fresh.total == 100
    assert [bucket.tokens for bucket in stream.buckets] == [bucket.tokens for bucket in fresh.buckets]
    assert stream.nll == approx(perplexity(model, text, chunk=3, **settings).nll)


def test_each_of_several_texts_starts_with_an_empty_cache(model, text):
    parts = [text[:100], text[100:102], text[102:]]
    alone = [perplexity(model, part, sinks=S, window=W) for part in parts]
    together = perplexity(model, parts, sinks=S, window=W, chunk=9)
    assert together.nll == approx(sum(result.nll for result in alone))
    assert together.tokens == together.total == len(text) - 3
    assert together.nll != approx(perplexity(model, text, sinks=S, window=W).nll)


class Interruption(Exception):
    pass


@pytest.mark.parametrize("mode", ["sinks", "dense", "recompute"])
@pytest.mark.parametrize("stop", [0, 1, 5])
@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_interrupted_run_can_be_continued(model, text, mode, stop, through_a_file, quantize, tmp_path):
    texts = [text[:120], text[120:]]
    arguments = {"mode": mode, "sinks": S, "window": W, "chunk": 40, "batch": 16, "quantize": quantize}
    whole = perplexity(model, texts, **arguments)
    reached = []

    def progress(result):
        reached.append(result)
        if len(reached) > stop:
            raise Interruption

    with pytest.raises(Interruption):
        perplexity(model, texts, **arguments, progress=progress)
    last = reached[-1]
    assert not last.done
    if through_a_file:
        save(last, tmp_path / "run.safetensors")
        last = load(model, tmp_path / "run.safetensors")
    assert perplexity(model, texts, **arguments, resume=last) == whole


def test_a_run_is_continued_with_the_same_settings_and_cache_only(model, text, tmp_path):
    seen = []
    perplexity(model, text, sinks=S, window=W, chunk=40, progress=seen.append)
    assert [result.tokens for result in seen] == [40, 80, 120, 160, 200, 240, 280, 299]
    with pytest.raises(ValueError, match="other settings"):
        perplexity(model, text, sinks=S, window=W + 1, resume=seen[0])
    with pytest.raises(ValueError, match="other settings"):
        perplexity(model, text, sinks=S, window=W, quantize="int8", resume=seen[0])
    with pytest.raises(ValueError, match="moved on"):
        perplexity(model, text, sinks=S, window=W, resume=seen[0])
    with pytest.raises(ValueError, match="moved on"):
        save(seen[0], tmp_path / "run")


def test_a_saved_run_of_another_model_is_refused(model, text, tmp_path):
    kept = []

    def progress(result):
        if not kept:
            kept.append(result)
            save(result, tmp_path / "run")

    perplexity(model, text, sinks=S, window=W, progress=progress, chunk=100)
    with pytest.raises(ValueError, match="another model"):
        load(build(torch.float32), tmp_path / "run")


@torch.no_grad()
def test_compare_scores_the_same_predictions_twice(model, text):
    comparison = compare(model, text, sinks=S, window=W, positions=120, seed=3, batch=11)
    places = S + W + torch.randperm(299 - S - W, generator=torch.Generator().manual_seed(3))[:120]
    stream = one_by_one(model, text, SinkCache(model, sinks=S, window=W))
    differences, fresh = [], []
    for t in places.tolist():
        read = torch.cat((text[:S], text[t - W + 1 : t + 1]))
        fresh.append(nll(model(read[None])[0, -1], text[t + 1]))
        differences.append(stream[t] - fresh[-1])
    assert comparison.tokens == 120
    assert comparison.recompute == approx(sum(fresh) / 120)
    assert comparison.difference == approx(sum(differences) / 120)
    assert comparison.difference == pytest.approx(comparison.streaming - comparison.recompute, abs=1e-12)
    assert comparison.spread == approx(float(torch.tensor(differences, dtype=torch.float64).std()))
    assert comparison.ratio == approx(math.exp(sum(differences) / 120))
    assert len(comparison.eighths) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_give_almost_the_same_score(model, text, dtype):
    exact = perplexity(model, text, sinks=S, window=W)
    rounded = perplexity(build(dtype), text, sinks=S, window=W, chunk=50)
    assert rounded.mean == pytest.approx(exact.mean, rel=1e-5 if dtype == torch.float32 else 0.05)


def test_dense_and_recomputed_scores_are_those_of_transformers(model, text):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    layer = {f"self_attn.{name}_proj": f"attention.{name}" for name in "qkvo"}
    layer |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
    layer |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    table = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
    table |= {f"model.layers.{i}.{a}": f"layers.{i}.{b}" for i in range(2) for a, b in layer.items()}
    ours = model.state_dict()
    theirs.load_state_dict({f"{a}.weight": ours[f"{b}.weight"] for a, b in table.items()})
    with torch.no_grad():
        loss = float(theirs(text[None], labels=text[None]).loss)
        assert perplexity(model, text, mode="dense").mean == pytest.approx(loss, rel=1e-6)
        t = 200
        read = torch.cat((text[:S], text[t - W + 1 : t + 1]))
        expected = nll(theirs(read[None]).logits[0, -1], text[t + 1])
    fresh = perplexity(model, text[: t + 2], mode="recompute", sinks=S, window=W, every=t)
    first = perplexity(model, text[:2], mode="recompute", sinks=S, window=W)
    assert fresh.nll - first.nll == pytest.approx(expected, rel=1e-6)


def test_results_can_be_written_as_json(model, text):
    result = perplexity(model, text, sinks=S, window=W, positions=3)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["perplexity"] == result.perplexity
    assert Result.from_dict(plain) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sliding"}, "mode must be one of sinks, window, dense, recompute"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"positions": 0}, "positions must be at least 1"),
        ({"positions": 5, "every": 2}, "every or positions"),
        ({"window": 0}, "window"),
        ({"tokens": torch.zeros(1, dtype=torch.int64)}, "at least 2"),
        ({"tokens": []}, "no text"),
    ],
)
def test_wrong_arguments_are_named(model, text, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, **{"tokens": text, **arguments})


def test_a_short_text_cannot_be_compared(model, text):
    with pytest.raises(ValueError, match="do not outgrow"):
        compare(model, text[: S + W], sinks=S, window=W)
