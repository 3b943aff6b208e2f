"""Calls with wrong, extreme or oddly typed values: one sentence each, and nothing has changed afterwards."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import streamllm
from streamllm import GenerationConfig, SinkCache
from streamllm.generation_config import attach, read_generation_config, resolve
from streamllm.models.checks import whole_number
from tests.laws.families import tiny_model
from tests.laws.scenarios import random_tokens, tiny_llama

MODEL = tiny_llama(dtype=torch.float32)
OTHER_HEADS = tiny_llama(dtype=torch.float32, kv_heads=4)
OTHER_LAYERS = tiny_llama(dtype=torch.float32, layers=1)
OTHER_WINDOWS = tiny_llama(dtype=torch.float32, windows=(7, 7, 7))
TOKENS = random_tokens(6, rows=2)


def forward(cache: SinkCache, **changes: Any) -> Any:
    given: dict[str, Any] = {"tokens": TOKENS, **changes}
    return MODEL(given.pop("tokens"), cache, **given)


def state(cache: SinkCache, **changes: Any) -> dict[str, Any]:
    return {**cache.state_dict(), **changes}


# With a cache of two rows that have seen 3 tokens: a call, and what its sentence says.
CALLS: list[tuple[str, Callable[[SinkCache], Any], str]] = [
    ("tokens 1-D", lambda c: forward(c, tokens=TOKENS[0]), "shape"),
    ("tokens 3-D", lambda c: forward(c, tokens=TOKENS[None]), "shape"),
    ("tokens float", lambda c: forward(c, tokens=TOKENS.float()), "int64"),
    ("tokens bool", lambda c: forward(c, tokens=TOKENS > 3), "int64"),
    ("tokens list", lambda c: forward(c, tokens=[[1, 2]]), "tensor"),
    ("tokens none", lambda c: forward(c, tokens=TOKENS[:, :0]), "at least one"),
    ("tokens negative", lambda c: forward(c, tokens=TOKENS - 100), "vocabulary"),
    ("tokens too large", lambda c: forward(c, tokens=TOKENS + 1000), "vocabulary"),
    ("tokens of another batch", lambda c: forward(c, tokens=TOKENS[:1]), "batch"),
    ("tokens on another device", lambda c: forward(c, tokens=TOKENS.to("meta")), "move one"),
    ("lengths too long", lambda c: forward(c, lengths=[7, 1]), "lengths"),
    ("lengths negative", lambda c: forward(c, lengths=[-1, 1]), "lengths"),
    ("lengths too many", lambda c: forward(c, lengths=[1, 1, 1]), "lengths"),
    ("lengths of floats", lambda c: forward(c, lengths=[1.0, 2.0]), "lengths"),
    ("lengths of bools", lambda c: forward(c, lengths=[True, False]), "lengths"),
    ("lengths a number", lambda c: forward(c, lengths=3), "lengths"),
    ("lengths without a cache", lambda c: MODEL(TOKENS, lengths=[1, 2]), "need a cache"),
    ("keep 0", lambda c: forward(c, logits_to_keep=0), "logits_to_keep"),
    ("keep -1", lambda c: forward(c, logits_to_keep=-1), "logits_to_keep"),
    ("keep 1.5", lambda c: forward(c, logits_to_keep=1.5), "logits_to_keep"),
    ("keep True", lambda c: forward(c, logits_to_keep=True), "logits_to_keep"),
    ("keep a string", lambda c: forward(c, logits_to_keep="1"), "logits_to_keep"),
    ("a cache of other heads", lambda c: OTHER_HEADS(TOKENS, c), "another model"),
    ("a cache of other layers", lambda c: OTHER_LAYERS(TOKENS, c), "another model"),
    ("a cache of other windows", lambda c: OTHER_WINDOWS(TOKENS, c), "other sliding windows"),
    ("the same, one token", lambda c: OTHER_WINDOWS(TOKENS[:, :1], c), "another model"),
    ("the same, compiled", lambda c: streamllm.compile(OTHER_HEADS, "flat")(TOKENS[:, :1], c), "another model"),
    ("a cache of another type", lambda c: tiny_llama()(TOKENS, c), "made for torch.float32"),
    ("sinks -1", lambda c: SinkCache(MODEL, -1), "sinks"),
    ("sinks 1.0", lambda c: SinkCache(MODEL, 1.0), "sinks"),
    ("sinks True", lambda c: SinkCache(MODEL, True), "sinks"),
    ("sinks None", lambda c: SinkCache(MODEL, None), "sinks"),
    ("window 0", lambda c: SinkCache(MODEL, 1, 0), "window"),
    ("window a string", lambda c: SinkCache(MODEL, 1, "8"), "window"),
    ("window infinite", lambda c: SinkCache(MODEL, 1, math.inf), "window"),
    ("batch_size 0", lambda c: SinkCache(MODEL, 1, 4, 0), "batch_size"),
    ("batch_size NumPy float", lambda c: SinkCache(MODEL, 1, 4, np.float64(2)), "batch_size"),
    ("chunk 0", lambda c: SinkCache(MODEL, 1, 4, chunk=0), "chunk"),
    ("origin -1", lambda c: SinkCache(MODEL, 1, 4, origin=-1), "origin"),
    ("origin too large", lambda c: SinkCache(MODEL, 1, 4, origin=1 << 60), "origin"),
    ("quantize another", lambda c: SinkCache(MODEL, 1, 4, quantize="int4"), "quantize"),
    ("a module of torch", lambda c: SinkCache(torch.nn.Linear(2, 2)), "not a model"),
    ("reset a number too large", lambda c: c.reset([2]), "rows"),
    ("reset a mask", lambda c: c.reset(torch.tensor([True, False])), "rows"),
    ("reset floats", lambda c: c.reset([0.0]), "rows"),
    ("reset negative", lambda c: c.reset([-1]), "rows"),
    ("seen negative", lambda c: c.load_state_dict(state(c, seen=torch.tensor([-5, 3]))), "damaged"),
    ("seen of another type", lambda c: c.load_state_dict(state(c, seen=torch.tensor([3.0, 3.0]))), "seen"),
    ("sizes of another cache", lambda c: c.load_state_dict(state(c, sizes=torch.tensor([1, 9, 0]))), "sinks"),
    ("state without a layer", lambda c: c.load_state_dict({"seen": c.seen}), "layers"),
    ("temperature negative", lambda c: GenerationConfig(temperature=-1), "temperature"),
    ("temperature NaN", lambda c: GenerationConfig(temperature=math.nan), "temperature"),
    ("temperature infinite", lambda c: GenerationConfig(temperature=math.inf), "temperature"),
    ("temperature a string", lambda c: GenerationConfig(temperature="hot"), "temperature"),
    ("temperature None", lambda c: GenerationConfig(temperature=None), "temperature"),
    ("temperature True", lambda c: GenerationConfig(temperature=True), "temperature"),
    ("top_k 2.5", lambda c: GenerationConfig(top_k=2.5), "top_k"),
    ("top_k -1", lambda c: GenerationConfig(top_k=-1), "top_k"),
    ("top_p 0", lambda c: GenerationConfig(top_p=0), "top_p"),
    ("top_p 2", lambda c: GenerationConfig(top_p=2), "top_p"),
    ("top_p a list", lambda c: GenerationConfig(top_p=[0.5]), "top_p"),
    ("min_p 1.5", lambda c: GenerationConfig(min_p=1.5), "min_p"),
    ("repetition_penalty 0", lambda c: GenerationConfig(repetition_penalty=0), "repetition_penalty"),
    ("eos a string", lambda c: GenerationConfig(eos="</s>"), "eos"),
    ("eos of strings", lambda c: GenerationConfig(eos=["a"]), "eos"),
    ("eos 1.5", lambda c: GenerationConfig(eos=1.5), "eos"),
    ("eos True", lambda c: GenerationConfig(eos=True), "eos"),
    ("override unsupported", lambda c: GenerationConfig().override(unsupported=("a",)), "not a setting"),
    ("override a misspelt name", lambda c: GenerationConfig().override(temprature=1), "not a setting"),
    ("override top_k 2.5", lambda c: GenerationConfig().override(top_k=2.5), "top_k"),
    ("compile another backend", lambda c: streamllm.compile(MODEL, "fast"), "backend"),
    ("compile a module of torch", lambda c: streamllm.compile(torch.nn.Linear(2, 2)), "not a model"),
    ("generate nothing", lambda c: streamllm.generate(MODEL, [], SinkCache(MODEL, 1, 4)), "no tokens"),
    ("generate with a dict", lambda c: streamllm.generate(MODEL, [1], generation_config={}), "GenerationConfig"),
    ("load another dtype", lambda c: streamllm.load_model(dtype="int4"), "dtype"),
    ("load another quantize", lambda c: streamllm.load_model(quantize="int2"), "quantize"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_a_wrong_call_is_one_sentence_and_changes_nothing(call, says):
    with torch.no_grad():
        cache = SinkCache(MODEL, 2, 5, 2)
        MODEL(TOKENS[:, :3], cache)
        before = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            call(cache)
        sentence = str(raised.value)
        assert says in sentence
        assert len(sentence) < 400
        assert "\n" not in sentence
        after = cache.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_numpy_integers_are_numbers():
    number = np.int64(3)
    cache = SinkCache(MODEL, number, np.int32(5), np.uint8(2), chunk=number, origin=np.int64(7))
    assert MODEL(TOKENS, cache, lengths=np.array([2, 3]), logits_to_keep=np.int64(1)).shape == (2, 1, 61)
    cache.reset(np.array([1]))
    config = GenerationConfig(temperature=np.float32(0.5), top_k=number, eos=[number])
    assert (config.top_k, config.eos) == (3, (3,))
    assert type(config.top_k) is int
    assert whole_number("n", torch.tensor(4)) == 4


@pytest.mark.parametrize(
    ("lengths", "keep", "rows"),
    [(None, 9, 6), ([6, 6], 9, 6), ([6, 2], 9, 6), ([2, 0], 1, 1), ([0, 0], 3, 3)],
)
def test_logits_to_keep_is_at_most_the_length(lengths, keep, rows):
    cache = SinkCache(MODEL, 2, 5, 2, chunk=4)
    whole = MODEL(TOKENS, SinkCache(MODEL, 2, 5, 2, chunk=4), lengths=lengths)
    got = MODEL(TOKENS, cache, lengths=lengths, logits_to_keep=keep)
    assert got.shape == (2, rows, 61)
    for row, count in enumerate(lengths or [6, 6]):
        for place in range(rows):
            wanted = whole[row, max(count - rows + place, 0)] if count else torch.zeros(61)
            torch.testing.assert_close(got[row, place], wanted)
    assert cache.seen.tolist() == (lengths or [6, 6])


def test_values_that_keep_all_tokens_do_not_switch_sampling_on():
    greedy = GenerationConfig()
    assert greedy.override(top_k=0, top_p=1, min_p=0).temperature == 0
    assert greedy.override(top_k=5).temperature == 1
    assert greedy.override(top_p=0.5, temperature=0).temperature == 0
    assert GenerationConfig(temperature=0.3).override(top_k=5).temperature == 0.3


def test_a_second_thread_is_refused_while_a_forward_runs():
    model = tiny_model("gpt_neox")
    cache, tokens, inside, leave = (
        SinkCache(model, 2, 5),
        random_tokens(4),
        threading.Event(),
        threading.Event(),
    )

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            leave.wait(30)

    hook = model.layers[1].register_forward_hook(wait)
    thread = threading.Thread(target=model, args=(tokens, cache))
    try:
        thread.start()
        assert inside.wait(30)
        for use in (
            lambda: model(tokens, cache),
            lambda: model(tokens[:, :1], cache),
            lambda: streamllm.compile(model, "flat")(tokens[:, :1], cache),
            cache.reset,
        ):
            with pytest.raises(RuntimeError, match="another thread is using this cache"):
                use()
    finally:
        leave.set()
        thread.join()
        hook.remove()
    assert cache.seen.tolist() == [4]
    alone = SinkCache(model, 2, 5)
    model(tokens, alone)
    assert torch.equal(model(tokens, cache), model(tokens, alone))


def test_a_forward_that_fails_lets_other_threads_in():
    cache = SinkCache(MODEL, 2, 5, 2)
    with pytest.raises(ValueError, match="made for torch"):
        tiny_llama()(TOKENS, cache)
    thread = threading.Thread(target=MODEL, args=(TOKENS, cache))
    thread.start()
    thread.join()
    assert cache.seen.tolist() == [6, 6]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_cache_copied_in_inference_mode_can_be_used_outside(quantize):
    with torch.inference_mode():
        cache = SinkCache(MODEL, 2, 5, 2, quantize=quantize)
        MODEL(TOKENS, cache)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    wanted = MODEL(TOKENS, cache)
    for other in copies:
        assert torch.equal(MODEL(TOKENS, other), wanted)
        other.reset()


def test_step_back_is_not_exact_after_a_single_token_that_failed():
    """`rewindable` tells it."""
    cache = SinkCache(MODEL, 1, 3, 2)
    MODEL(TOKENS, cache)
    assert cache.rewindable.tolist() == [1, 1]
    hook = MODEL.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MODEL(TOKENS[:, :1], cache)
    hook.remove()
    assert cache.rewindable.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("checkpoint", "given", "call", "wanted"),
    [
        # The call, the given config, the checkpoint, the default: as transformers 5.23 resolves them
        ({}, None, {}, {}),
        ({"repetition_penalty": 1.7, "eos": 2}, None, {}, {"repetition_penalty": 1.7, "eos": 2}),
        ({"eos": (3, 4), "top_p": 0.9, "temperature": 0.6}, {"temperature": 0.2}, {},
         {"eos": (3, 4), "top_p": 0.9, "temperature": 0.2}),
        ({"eos": (3, 4), "temperature": 0.6}, {"temperature": 0.2}, {"temperature": 0.4, "eos": []},
         {"eos": (), "temperature": 0.4}),
        ({"temperature": 0.6, "top_k": 7}, {"top_k": 0}, {}, {"temperature": 0.6}),
    ],
)  # fmt: skip
def test_the_first_of_call_config_and_checkpoint_counts(checkpoint, given, call, wanted):
    model = torch.nn.Module()
    attach(model, GenerationConfig(**checkpoint))
    config = None if given is None else GenerationConfig(**given)
    assert resolve(model, config, call) == GenerationConfig(**wanted)


def test_a_greedy_checkpoints_settings_hold_where_the_call_samples():
    config = read_generation_config({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 3})
    assert config == GenerationConfig(eos=3)
    assert config.override(top_k=5) == GenerationConfig(0.6, 5, 0.9, eos=3)
    assert config.override(temperature=1.0) == GenerationConfig(1.0, 0, 0.9, eos=3)
    assert config.override(temperature=0.0) == GenerationConfig(eos=3)
