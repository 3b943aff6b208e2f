"""generate() and Stream: the generated tokens, where generation ends, and continuing after an interruption."""

from __future__ import annotations

import itertools

import pytest
import torch

import streamllm
from streamllm import GenerationConfig, SinkCache, Stream, generate, loop
from streamllm.weights.errors import UnsupportedConfig

PROMPT = [0, 40, 50, 60, 70, 80, 90]
TEXT = "def once(upon):\n    return"
NOT_GENERATED = "\ue000"  # a character that the model never generates


@pytest.fixture(params=["", "run ahead"], autouse=True)
def run_ahead(request, monkeypatch) -> None:
    """Every test runs twice, the second time with the loop that runs one forward ahead."""
    if request.param:
        monkeypatch.setattr(loop, "RUN_AHEAD", ("cpu",))


def greedy(model: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    """The next tokens by a dense forward over the whole text for each."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


def cache_of(model: torch.nn.Module, **options: int) -> SinkCache:
    return SinkCache(model, **{"sinks": 2, "window": 10, "chunk": 4, **options})


# Tokens


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_greedy_decoding_without_eviction_equals_the_argmax_of_dense_forwards(model, chunk: int) -> None:
    cache = SinkCache(model, sinks=4, window=60, chunk=chunk)
    generated = list(generate(model, PROMPT, cache, max_new_tokens=30, eos=[]))
    assert generated == greedy(model, PROMPT, 30)
    assert len(set(generated)) > 10  # varied enough that a fault of the cache would change it
    assert cache.seen.tolist() == [len(PROMPT) + 29]


def test_a_prompt_may_be_a_tensor_but_not_a_batch(model) -> None:
    wanted = list(generate(model, PROMPT, max_new_tokens=5, eos=[]))
    assert list(generate(model, torch.tensor(PROMPT), max_new_tokens=5, eos=[])) == wanted
    assert list(generate(model, torch.tensor([PROMPT]), max_new_tokens=5, eos=[])) == wanted
    with pytest.raises(ValueError, match="one stream"):
        generate(model, torch.tensor([PROMPT, PROMPT]))
    with pytest.raises(ValueError, match="batch of 2"):
        generate(model, PROMPT, cache_of(model, batch_size=2))


def test_a_call_with_the_last_token_continues_the_stream(model) -> None:
    whole = list(generate(model, PROMPT, cache_of(model), max_new_tokens=40, eos=[]))
    cache = cache_of(model)
    first = list(generate(model, PROMPT, cache, max_new_tokens=15, eos=[]))
    second = list(generate(model, first[-1:], cache, max_new_tokens=25, eos=[]))
    assert first + second == whole


def test_generation_ends_after_an_eos_token(model) -> None:
    whole = list(generate(model, PROMPT, max_new_tokens=30, eos=[]))
    end = whole[9]
    expected = whole[: whole.index(end) + 1]
    for eos in (end, [end], (end, 10**6)):
        assert list(generate(model, PROMPT, max_new_tokens=30, eos=eos)) == expected
    by_config = GenerationConfig(eos=(end,))
    assert list(generate(model, PROMPT, max_new_tokens=30, generation_config=by_config)) == expected
    assert list(generate(model, [end, *PROMPT], max_new_tokens=2, eos=end))  # eos in the prompt has no effect


def test_eos_is_read_from_the_checkpoint(model) -> None:
    assert model.generation_config.eos == (1,)
    whole = list(generate(model, PROMPT, max_new_tokens=300))
    assert whole == list(generate(model, PROMPT, max_new_tokens=300, eos=[]))[: len(whole)]
    assert 1 not in whole[:-1]


def test_max_new_tokens_may_be_0_or_none(model) -> None:
    cache = cache_of(model)
    assert list(generate(model, PROMPT, cache, max_new_tokens=0)) == []
    assert cache.seen.tolist() == [0]
    endless = generate(model, PROMPT, cache, eos=[])
    assert len(list(itertools.islice(endless, 300))) == 300
    assert cache.seen.tolist() == [len(PROMPT) + 299]


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([], {}, "no tokens to begin with"),
        ([5, -1], {}, "token id -1 is outside"),
        ([10**6], {}, "token id 1000000 is outside"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"top_p": 2.0}, "top_p"),
        (PROMPT, {"seed": 2**80}, "seed"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(model, tokens, arguments, message: str) -> None:
    cache = cache_of(model)
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, cache, **arguments)
    assert cache.seen.tolist() == [0]


def test_tokens_that_are_not_integers_are_refused_at_the_call(model) -> None:
    with pytest.raises(TypeError):
        generate(model, [5.0])
    with pytest.raises(TypeError):
        generate(model, torch.tensor([5.0]))


def test_an_unsupported_generation_config_is_refused(model) -> None:
    config = GenerationConfig(unsupported=("num_beams=4",))
    with pytest.raises(UnsupportedConfig, match="num_beams=4"):
        generate(model, PROMPT, generation_config=config)


def test_a_seed_makes_a_stream_repeatable_and_independent_of_other_streams(model) -> None:
    def sampled(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=seed, eos=[]))

    first, second = sampled(1), sampled(2)
    assert sampled(1) == first != second
    state = torch.get_rng_state()
    pairs = zip(
        generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=1, eos=[]),
        generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=2, eos=[]),
        strict=True,
    )
    assert list(map(list, zip(*pairs, strict=True))) == [first, second]
    assert torch.equal(torch.get_rng_state(), state)  # the global random generator is not used


def test_the_repetition_penalty_applies_to_the_prompt_and_to_generated_tokens(model) -> None:
    config = {"repetition_penalty": 1.4, "eos": []}
    cache = SinkCache(model, window=60)
    tokens = list(PROMPT)
    for _ in range(25):
        scores = model(torch.tensor([tokens]))[0, -1].detach()
        seen = torch.tensor(sorted(set(tokens)))
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.4, scores[seen] / 1.4)
        tokens.append(int(scores.argmax()))
    assert list(generate(model, PROMPT, cache, max_new_tokens=25, **config)) == tokens[len(PROMPT) :]
    assert tokens[len(PROMPT) :] != greedy(model, PROMPT, 25)


def test_the_caller_is_not_in_inference_mode_between_tokens(model, tokenizer) -> None:
    for _ in generate(model, PROMPT, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    for _ in Stream(model, tokenizer).generate("a", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():  # a caller may also leave inference mode between two tokens
        tokens = generate(model, PROMPT, max_new_tokens=6, repetition_penalty=1.2, eos=[])
        next(tokens)
    assert len(list(tokens)) == 5


# Interruptions, in the prompt and while decoding

# "" is the model itself, which fails after the commit.
FAILING_MODULES = ["layers.0.attention.q", "layers.1.mlp.down", "norm", "head", ""]


@pytest.mark.parametrize("name", FAILING_MODULES)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("call", [0, 1, 2, 9, 14])
def test_an_interrupted_stream_continues_with_the_same_text(
    model, tokenizer, interrupt, name: str, error: BaseException, call: int
) -> None:
    if name in ("head", "") and call == 14:
        call = 5
    whole = "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=40, eos=[]))
    stream = _stream(model, tokenizer)
    interrupt(name, error, call)
    pieces: list[str] = []  # one for each token
    with pytest.raises(type(error)):
        pieces.extend(stream.generate(TEXT, max_new_tokens=40, eos=[]))
    pieces += stream.generate(max_new_tokens=40 - len(pieces), eos=[])
    assert "".join(pieces) == whole


def _stream(model, tokenizer) -> Stream:
    return Stream(model, tokenizer, sinks=2, window=10, chunk=4)


@pytest.mark.parametrize("name", FAILING_MODULES)
@pytest.mark.parametrize("call", [0, 1, 2, 9])
def test_after_an_interruption_the_tokens_that_the_cache_has_not_seen_continue_the_stream(
    model, interrupt, name: str, call: int
) -> None:
    prompt = [*PROMPT, *PROMPT, *PROMPT]
    whole = list(generate(model, prompt, cache_of(model), max_new_tokens=20, eos=[]))
    cache = cache_of(model)
    generated: list[int] = []
    interrupt(name, KeyboardInterrupt(), call)
    with pytest.raises(KeyboardInterrupt):
        generated.extend(generate(model, prompt, cache, max_new_tokens=20, eos=[]))
    rest = [*prompt, *generated][int(cache.seen[0]) :]
    assert rest, "a failed forward must not leave its last token in the cache"
    generated += generate(model, rest, cache, max_new_tokens=20 - len(generated), eos=[])
    assert generated == whole


def test_an_interrupted_feed_is_continued_by_generate(model, tokenizer, interrupt) -> None:
    whole = "".join(_stream(model, tokenizer).generate(TEXT + " and so on", max_new_tokens=20, eos=[]))
    stream = _stream(model, tokenizer)
    interrupt("layers.1", RuntimeError("out of memory"), 2)
    with pytest.raises(RuntimeError):
        stream.feed(TEXT)
    assert 0 < stream.seen < len(tokenizer.encode(TEXT))
    assert "".join(stream.generate(" and so on", max_new_tokens=20, eos=[])) == whole


# Stream


def test_pieces_join_to_the_text_of_the_tokens(model, tokenizer) -> None:
    ids = list(generate(model, tokenizer.encode(TEXT), cache_of(model), max_new_tokens=120, eos=[]))
    pieces = list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=120, eos=[]))
    decoder = tokenizer.decoder()
    for token in tokenizer.encode(TEXT):
        decoder.push(token)
    assert "".join(pieces) == "".join(map(decoder.push, ids))
    whole = tokenizer.decode([*tokenizer.encode(TEXT), *ids])
    assert (TEXT + "".join(pieces)) == whole[: len(TEXT + "".join(pieces))]
    assert len(whole) - len(TEXT + "".join(pieces)) <= 1  # an incomplete character at the end


def test_several_calls_generate_the_text_of_one_call(model, tokenizer) -> None:
    whole = "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=60, eos=[]))
    stream = _stream(model, tokenizer)
    pieces = list(stream.generate(TEXT, max_new_tokens=1, eos=[]))
    for count in (0, 1, 2, 20, 36):
        pieces += stream.generate(max_new_tokens=count, eos=[])
    assert "".join(pieces) == whole
    assert stream.seen == len(tokenizer.encode(TEXT)) + 59


def test_special_tokens_are_added_only_at_the_start(model, tokenizer) -> None:
    stream = _stream(model, tokenizer)
    count = stream.feed("one two")
    count += stream.feed(" three")
    expected = tokenizer.encode("one two") + tokenizer.encode(" three", add_special_tokens=False)
    assert count == stream.seen == len(expected)
    assert expected[0] == tokenizer.bos_token_id
    assert expected.count(tokenizer.bos_token_id) == 1
    stream.reset()
    assert stream.seen == 0
    assert stream.feed("one two") == len(tokenizer.encode("one two"))


def test_after_a_reset_the_same_prompt_gives_the_same_text(model, tokenizer) -> None:
    stream = _stream(model, tokenizer)
    first = list(stream.generate(TEXT, max_new_tokens=30, repetition_penalty=1.3, eos=[]))
    stream.reset()
    assert list(stream.generate(TEXT, max_new_tokens=30, repetition_penalty=1.3, eos=[])) == first


def _stop(model, tokenizer, stop, count: int = 40) -> str:
    return "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=count, stop=stop, eos=[]))


def test_generation_ends_before_the_stop_string(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    pieces = list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=40, eos=[]))
    assert len(pieces) > 20
    for start in range(0, len(whole) - 6, 9):
        for length in (1, 4):
            stop = whole[start : start + length]
            assert _stop(model, tokenizer, stop) == whole[: whole.index(stop)]


def test_an_incomplete_stop_string_is_not_lost(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    for start in range(0, len(whole) - 3, 9):
        assert _stop(model, tokenizer, [whole[start : start + 3] + NOT_GENERATED]) == whole
    assert _stop(model, tokenizer, whole[-4:] + "more") == whole  # also at the end


def test_the_stop_string_that_completes_first_ends_the_text(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    at = next(at for at in range(10, 40) if whole.index(whole[at : at + 2]) == at)
    inner, outer = whole[at : at + 2], whole[at - 1 : at + 9]
    assert _stop(model, tokenizer, [outer, inner]) == whole[:at]
    # Both complete with the same character. Then the one that begins first ends the text.
    assert _stop(model, tokenizer, [inner, outer[:3]]) == whole[: at - 1]


def test_text_held_back_for_a_stop_string_is_yielded_by_the_next_call(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    stop = [whole[start : start + 12] + NOT_GENERATED for start in range(0, 30)]
    for count in (1, 2, 3, 5, 8, 13, 19):
        stream = _stream(model, tokenizer)
        pieces = list(itertools.islice(stream.generate(TEXT, stop=stop, eos=[]), count))
        pieces += stream.generate(max_new_tokens=40 - count, eos=[])
        assert "".join(pieces) == whole


def test_refused_arguments_do_not_change_the_stream(model, tokenizer) -> None:
    stream = _stream(model, tokenizer)
    for wrong in (
        {"stop": ""},
        {"stop": ["a", ""]},
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"seed": 2**80},
        {"generation_config": GenerationConfig(unsupported=("num_beams=4",))},
    ):
        with pytest.raises((ValueError, UnsupportedConfig)):
            stream.generate("not fed", **wrong)
    whole = "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=20, eos=[]))
    assert "".join(stream.generate(TEXT, max_new_tokens=20, eos=[])) == whole


def test_an_empty_prompt_needs_a_bos_token(model, tokenizer, checkpoint_without_bos) -> None:
    assert len(list(_stream(model, tokenizer).generate("", max_new_tokens=3, eos=[]))) == 3
    other, without = streamllm.load(checkpoint_without_bos, device="cpu")
    stream = Stream(other, without)
    for call in (stream.generate, stream.feed):
        with pytest.raises(ValueError, match="no BOS token"):
            call("")
    assert len(list(stream.generate("x", max_new_tokens=3, eos=[]))) == 3


def test_streams_of_one_model_are_independent(model, tokenizer) -> None:
    def start(text: str, seed: int) -> tuple[Stream, object]:
        stream = _stream(model, tokenizer)
        options = {"temperature": 1.2, "seed": seed, "repetition_penalty": 1.2, "eos": []}
        return stream, stream.generate(text, max_new_tokens=30, **options)

    separately = ["".join(start(text, seed)[1]) for text, seed in (("one", 1), ("two", 2))]
    (_, first), (_, second) = start("one", 1), start("two", 2)
    together = [[], []]
    for a, b in itertools.zip_longest(first, second, fillvalue=""):
        together[0].append(a)
        together[1].append(b)
    assert ["".join(pieces) for pieces in together] == separately


# What a stop string cut off


def cached_text(stream: Stream, tokenizer) -> str:
    """The text of the tokens that the stream's model has been given or will be."""
    return tokenizer.decode(stream._loop.last_tokens(10**6))


@pytest.mark.parametrize("window", [60, 10])
def test_the_model_remembers_what_was_shown_of_a_stopped_text(model, tokenizer, window: int) -> None:
    def stream() -> Stream:
        return Stream(model, tokenizer, sinks=2, window=window, chunk=4)

    whole = "".join(stream().generate(TEXT, max_new_tokens=40, eos=[]))
    for start in range(0, len(whole) - 8, 3):
        stop = whole[start : start + 6]
        stopped = stream()
        shown = "".join(stopped.generate(TEXT, max_new_tokens=40, stop=stop, eos=[]))
        assert (shown, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert cached_text(stopped, tokenizer).rstrip("\ufffd") == (TEXT + shown).rstrip("\ufffd")
        assert int(stopped.cache.held[0]) + len(stopped._loop.unfed) <= 2 + window
        if window == 60:  # nothing was pushed out, so the text goes on as if it had been typed
            typed = stream()
            typed.feed(stopped._loop.last_tokens(10**6))
            for each in (stopped, typed):
                list(each.generate(max_new_tokens=5, eos=[]))
            assert stopped._loop.last_tokens(10**6) == typed._loop.last_tokens(10**6)


def test_a_stop_string_may_be_a_special_token(model, tokenizer) -> None:
    name, token = "</s>", tokenizer.eos_token_id

    def say_eos(tokens, logits):
        return logits.index_fill(0, torch.tensor([token]), 100.0) if len(tokens) > 9 else logits

    stream = _stream(model, tokenizer)
    text = "".join(stream.generate("one two", max_new_tokens=40, stop=name, eos=[], logits_processor=say_eos))
    assert stream.finish_reason == "stop"
    assert name not in text
    assert token not in stream._loop.last_tokens(100)


def test_finish_reasons_and_logprobs(model, tokenizer) -> None:
    stream = _stream(model, tokenizer)
    ids = [int(i) for i in generate(model, tokenizer.encode(TEXT), cache_of(model), max_new_tokens=4, eos=[])]
    list(stream.generate(TEXT, max_new_tokens=4, eos=[], top_logprobs=2))
    assert stream.finish_reason == "length"
    assert [found.token for found in stream.logprobs] == ids
    assert all(found.top[0] == (found.token, found.logprob) for found in stream.logprobs)  # greedy
    stream.reset()
    list(stream.generate(TEXT, max_new_tokens=9, eos=ids[2:3]))
    assert (stream.finish_reason, stream.said) == ("eos", ids.index(ids[2]) + 1)
    next(stream.generate(max_new_tokens=9, eos=[]))
    assert stream.finish_reason is None


def test_a_stream_takes_ids_and_a_bos_once(model, tokenizer) -> None:
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode("one two", add_special_tokens=False)
    for pieces, options in (
        (["one two"], {}), (["<s>one two"], {}), ([ids], {"bos": True}), ([[bos, *ids]], {"bos": True}),
        (["", "one two"], {}), ([torch.tensor([bos]), "one two"], {}),
    ):  # fmt: skip
        stream = _stream(model, tokenizer)
        for piece in pieces:
            stream.feed(piece, **options)
        assert stream._loop.last_tokens(100) == [bos, *ids], pieces
    stream = _stream(model, tokenizer)
    stream.feed("one two", bos=False)
    assert stream._loop.last_tokens(100) == ids


WRONG_CALLS = [
    {"seed": 1.5}, {"seed": "a"}, {"seed": True}, {"stop": [3]}, {"stop": 3}, {"top_k": 2.5}, {"max_new_tokens": 2.5},
    {"max_new_tokens": True}, {"top_logprobs": -1}, {"top_logprobs": 10**9}, {"bos": 3}, {"logits_processor": 3},
    {"temprature": 1.0}, {"text": 3}, {"text": [5.0]}, {"text": [[1, 2], [3, 4]]}, {"text": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_CALLS, ids=str)
def test_a_wrong_call_pushes_nothing(model, tokenizer, wrong: dict) -> None:
    stream = _stream(model, tokenizer)
    stream.feed(TEXT)
    with pytest.raises((TypeError, ValueError)) as error:
        stream.generate(**{"text": "x", **wrong})
    assert "\n" not in str(error.value)
    assert stream._loop.end == stream.seen == len(tokenizer.encode(TEXT))


def test_numpy_numbers_are_numbers(model, tokenizer) -> None:
    numpy = pytest.importorskip("numpy")
    settings = {"temperature": 1.0, "eos": []}
    wanted = list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=5, seed=3, **settings))
    count, seed = numpy.int64(5), numpy.int64(3)
    assert (
        list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=count, seed=seed, **settings)) == wanted
    )
