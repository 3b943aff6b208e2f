"""generate() and Stream: what is said, where it ends, and what an interruption leaves behind."""

from __future__ import annotations

import itertools

import pytest
import torch

import streamllm
from streamllm import GenerationConfig, SinkCache, Stream, generate
from streamllm import generation as LOOP
from streamllm.weights.errors import UnsupportedConfig

PROMPT = [0, 40, 50, 60, 70, 80, 90]
TEXT = "def once(upon):\n    return"
NEVER = "\ue000"  # a character that the model does not say


@pytest.fixture(params=["", "ahead"], autouse=True)
def ahead(request, monkeypatch) -> bool:
    """Every test here runs twice: the second time as on a device that is never waited for."""
    if request.param:
        monkeypatch.setattr(LOOP, "RUN_AHEAD", ("cpu",))
    return bool(request.param)


def greedy(model: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    """By a dense forward of the whole text for every token."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


def cache_of(model: torch.nn.Module, **numbers: int) -> SinkCache:
    return SinkCache(model, **{"sinks": 2, "window": 10, "chunk": 4, **numbers})


# Tokens


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_greedy_is_a_dense_argmax_while_nothing_is_evicted(model, chunk: int) -> None:
    cache = SinkCache(model, sinks=4, window=60, chunk=chunk)
    said = list(generate(model, PROMPT, cache, max_new_tokens=30, eos=[]))
    assert said == greedy(model, PROMPT, 30)
    assert len(set(said)) > 10  # a text that a wrong cache would show in
    assert cache.seen.tolist() == [len(PROMPT) + 29]


def test_a_tensor_is_a_prompt_too_and_a_batch_is_not(model) -> None:
    wanted = list(generate(model, PROMPT, max_new_tokens=5, eos=[]))
    assert list(generate(model, torch.tensor(PROMPT), max_new_tokens=5, eos=[])) == wanted
    assert list(generate(model, torch.tensor([PROMPT]), max_new_tokens=5, eos=[])) == wanted
    with pytest.raises(ValueError, match="one stream"):
        generate(model, torch.tensor([PROMPT, PROMPT]))
    with pytest.raises(ValueError, match="batch of 2"):
        generate(model, PROMPT, cache_of(model, batch_size=2))


def test_the_next_call_goes_on_with_the_last_token(model) -> None:
    whole = list(generate(model, PROMPT, cache_of(model), max_new_tokens=40, eos=[]))
    cache = cache_of(model)
    first = list(generate(model, PROMPT, cache, max_new_tokens=15, eos=[]))
    second = list(generate(model, first[-1:], cache, max_new_tokens=25, eos=[]))
    assert first + second == whole


def test_eos_is_the_last_token(model) -> None:
    whole = list(generate(model, PROMPT, max_new_tokens=30, eos=[]))
    end = whole[9]
    expected = whole[: whole.index(end) + 1]
    for eos in (end, [end], (end, 10**6)):
        assert list(generate(model, PROMPT, max_new_tokens=30, eos=eos)) == expected
    by_config = GenerationConfig(eos=(end,))
    assert list(generate(model, PROMPT, max_new_tokens=30, generation_config=by_config)) == expected
    assert list(generate(model, [end, *PROMPT], max_new_tokens=2, eos=end))  # in the prompt it ends nothing


def test_the_checkpoint_says_what_eos_is(model) -> None:
    assert model.generation_config.eos == (1,)
    whole = list(generate(model, PROMPT, max_new_tokens=300))
    assert whole == list(generate(model, PROMPT, max_new_tokens=300, eos=[]))[: len(whole)]
    assert 1 not in whole[:-1]


def test_no_tokens_and_no_end(model) -> None:
    cache = cache_of(model)
    assert list(generate(model, PROMPT, cache, max_new_tokens=0)) == []
    assert cache.seen.tolist() == [0]
    endless = generate(model, PROMPT, cache, eos=[])
    assert len(list(itertools.islice(endless, 300))) == 300
    assert cache.seen.tolist() == [len(PROMPT) + 299]


@pytest.mark.parametrize(
    ("tokens", "arguments", "said"),
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
def test_what_is_wrong_is_said_at_the_call(model, tokens, arguments, said: str) -> None:
    cache = cache_of(model)
    with pytest.raises(ValueError, match=said):
        generate(model, tokens, cache, **arguments)
    assert cache.seen.tolist() == [0]


def test_a_token_that_is_no_whole_number_is_an_error_at_the_call(model) -> None:
    with pytest.raises(TypeError):
        generate(model, [5.0])
    with pytest.raises(TypeError):
        generate(model, torch.tensor([5.0]))


def test_what_the_checkpoint_asks_for_and_cannot_have_is_refused_unless_overridden(model) -> None:
    beams = GenerationConfig(unsupported=("num_beams=4",))
    with pytest.raises(UnsupportedConfig, match="num_beams=4"):
        generate(model, PROMPT, generation_config=beams)


def test_a_seed_is_a_text_and_streams_do_not_share_their_chance(model) -> None:
    def text(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=seed, eos=[]))

    first, second = text(1), text(2)
    assert text(1) == first != second
    state = torch.get_rng_state()
    pairs = zip(
        generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=1, eos=[]),
        generate(model, PROMPT, max_new_tokens=30, temperature=1.5, seed=2, eos=[]),
        strict=True,
    )
    assert list(map(list, zip(*pairs, strict=True))) == [first, second]
    assert torch.equal(torch.get_rng_state(), state)  # with a seed the global generator is left alone


def test_the_repetition_penalty_is_for_prompt_and_text(model) -> None:
    config = {"repetition_penalty": 1.4, "eos": []}
    cache = SinkCache(model, window=60)
    tokens = list(PROMPT)
    for _ in range(25):
        scores = model(torch.tensor([tokens]))[0, -1].detach()
        said = torch.tensor(sorted(set(tokens)))
        scores[said] = torch.where(scores[said] < 0, scores[said] * 1.4, scores[said] / 1.4)
        tokens.append(int(scores.argmax()))
    assert list(generate(model, PROMPT, cache, max_new_tokens=25, **config)) == tokens[len(PROMPT) :]
    assert tokens[len(PROMPT) :] != greedy(model, PROMPT, 25)


def test_the_consumer_is_not_put_into_inference_mode(model, tokenizer) -> None:
    for _ in generate(model, PROMPT, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    for _ in Stream(model, tokenizer).generate("a", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():  # and one who is in it may leave between two tokens
        tokens = generate(model, PROMPT, max_new_tokens=6, repetition_penalty=1.2, eos=[])
        next(tokens)
    assert len(list(tokens)) == 5


# Interruptions: cache first, then Stream, in the prompt and while decoding

WHERE = ["layers.0.attention.q", "layers.1.mlp.down", "norm", "head", ""]  # "": all done, and committed


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("call", [0, 1, 2, 9, 14])
def test_a_stream_that_was_interrupted_goes_on_as_if_it_had_not_been(
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


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("call", [0, 1, 2, 9])
def test_a_cache_says_how_far_it_came_and_goes_on(model, interrupt, name: str, call: int) -> None:
    prompt = [*PROMPT, *PROMPT, *PROMPT]
    whole = list(generate(model, prompt, cache_of(model), max_new_tokens=20, eos=[]))
    cache = cache_of(model)
    said: list[int] = []
    interrupt(name, KeyboardInterrupt(), call)
    with pytest.raises(KeyboardInterrupt):
        said.extend(generate(model, prompt, cache, max_new_tokens=20, eos=[]))
    rest = [*prompt, *said][int(cache.seen[0]) :]
    assert rest, "a forward that failed took in its last token"
    said += generate(model, rest, cache, max_new_tokens=20 - len(said), eos=[])
    assert said == whole


def test_an_interrupted_prompt_is_read_on_by_feed(model, tokenizer, interrupt) -> None:
    whole = "".join(_stream(model, tokenizer).generate(TEXT + " and so on", max_new_tokens=20, eos=[]))
    stream = _stream(model, tokenizer)
    interrupt("layers.1", RuntimeError("out of memory"), 2)
    with pytest.raises(RuntimeError):
        stream.feed(TEXT)
    assert 0 < stream.seen < len(tokenizer.encode(TEXT))
    assert "".join(stream.generate(" and so on", max_new_tokens=20, eos=[])) == whole


# Stream


def test_the_pieces_are_the_text_of_the_tokens(model, tokenizer) -> None:
    ids = list(generate(model, tokenizer.encode(TEXT), cache_of(model), max_new_tokens=120, eos=[]))
    pieces = list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=120, eos=[]))
    decoder = tokenizer.decoder()
    for token in tokenizer.encode(TEXT):
        decoder.push(token)
    assert "".join(pieces) == "".join(map(decoder.push, ids))
    whole = tokenizer.decode([*tokenizer.encode(TEXT), *ids])
    assert (TEXT + "".join(pieces)) == whole[: len(TEXT + "".join(pieces))]
    assert len(whole) - len(TEXT + "".join(pieces)) <= 1  # a character that was not complete at the end


def test_several_calls_say_what_one_call_says(model, tokenizer) -> None:
    whole = "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=60, eos=[]))
    stream = _stream(model, tokenizer)
    pieces = list(stream.generate(TEXT, max_new_tokens=1, eos=[]))
    for count in (0, 1, 2, 20, 36):
        pieces += stream.generate(max_new_tokens=count, eos=[])
    assert "".join(pieces) == whole
    assert stream.seen == len(tokenizer.encode(TEXT)) + 59


def test_special_tokens_come_at_the_start_only(model, tokenizer) -> None:
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


def test_reset_starts_the_same_text_again(model, tokenizer) -> None:
    stream = _stream(model, tokenizer)
    first = list(stream.generate(TEXT, max_new_tokens=30, repetition_penalty=1.3, eos=[]))
    stream.reset()
    assert list(stream.generate(TEXT, max_new_tokens=30, repetition_penalty=1.3, eos=[])) == first


def _stop(model, tokenizer, stop, count: int = 40) -> str:
    return "".join(_stream(model, tokenizer).generate(TEXT, max_new_tokens=count, stop=stop, eos=[]))


def test_every_substring_of_the_text_stops_it_before_itself(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    pieces = list(_stream(model, tokenizer).generate(TEXT, max_new_tokens=40, eos=[]))
    assert len(pieces) > 20
    for start in range(0, len(whole) - 6, 9):
        for length in (1, 4):
            stop = whole[start : start + length]
            assert _stop(model, tokenizer, stop) == whole[: whole.index(stop)]


def test_a_stop_string_that_never_completes_loses_nothing(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    for start in range(0, len(whole) - 3, 9):
        assert _stop(model, tokenizer, [whole[start : start + 3] + NEVER]) == whole
    assert _stop(model, tokenizer, whole[-4:] + "more") == whole  # not even at the end


def test_the_stop_string_that_is_complete_first_ends_the_text(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    at = next(at for at in range(10, 40) if whole.index(whole[at : at + 2]) == at)
    inner, outer = whole[at : at + 2], whole[at - 1 : at + 9]
    assert _stop(model, tokenizer, [outer, inner]) == whole[:at]
    assert _stop(model, tokenizer, [inner, outer[:3]]) == whole[: at - 1]  # at once: the longer one


def test_what_a_stop_string_held_back_is_said_when_the_stream_goes_on(model, tokenizer) -> None:
    whole = _stop(model, tokenizer, ())
    stop = [whole[start : start + 12] + NEVER for start in range(0, 30)]
    for count in (1, 2, 3, 5, 8, 13, 19):
        stream = _stream(model, tokenizer)
        pieces = list(itertools.islice(stream.generate(TEXT, stop=stop, eos=[]), count))  # left alone
        pieces += stream.generate(max_new_tokens=40 - count, eos=[])
        assert "".join(pieces) == whole


def test_what_is_refused_changes_nothing(model, tokenizer) -> None:
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
            stream.generate("never read", **wrong)
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


def test_streams_of_one_model_do_not_meet(model, tokenizer) -> None:
    def start(text: str, seed: int) -> tuple[Stream, object]:
        stream = _stream(model, tokenizer)
        options = {"temperature": 1.2, "seed": seed, "repetition_penalty": 1.2, "eos": []}
        return stream, stream.generate(text, max_new_tokens=30, **options)

    alone = ["".join(start(text, seed)[1]) for text, seed in (("one", 1), ("two", 2))]
    (_, first), (_, second) = start("one", 1), start("two", 2)
    together = [[], []]
    for a, b in itertools.zip_longest(first, second, fillvalue=""):
        together[0].append(a)
        together[1].append(b)
    assert ["".join(pieces) for pieces in together] == alone
