"""The loop that runs one forward ahead yields the tokens of the plain loop, with the same state between tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from streamllm import GenerationConfig, SinkCache, generation
from streamllm.generation import Loop
from streamllm.sampling import choose, next_token
from tests.laws.scenarios import Interrupted, failing, random_tokens, tiny_llama

CONFIGS = {
    "greedy": GenerationConfig(),
    "sampled": GenerationConfig(temperature=1.0),
    "penalty": GenerationConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3),
}
PROMPT = random_tokens(9)[0].tolist()


@pytest.fixture(autouse=True)
def run_ahead_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(generation, "RUN_AHEAD", ("cpu",))


class PlainLoop(Loop):
    """The loop as it runs on devices that are not in RUN_AHEAD."""

    def _choose_and_run_ahead(self, config, generator):
        return self._choose(config, generator), None


def pair(model=None, window: int = 6) -> list[Loop]:
    """A plain loop and one that runs ahead, with a cache each."""
    model = model or tiny_llama()
    return [kind(model, SinkCache(model, 2, window, chunk=4)) for kind in (PlainLoop, Loop)]


def assert_equal_state(plain: Loop, other: Loop) -> None:
    assert plain.cache.seen.tolist() == other.cache.seen.tolist()
    assert plain.unfed == other.unfed
    assert plain.past == other.past
    assert (plain.seen_tokens is None) == (other.seen_tokens is None)
    assert plain.seen_tokens is None or torch.equal(plain.seen_tokens, other.seen_tokens)
    assert (plain.logits is None) == (other.logits is None)
    assert plain.logits is None or torch.equal(plain.logits.nan_to_num(), other.logits.nan_to_num())


def run_both(loops, *arguments, count: int | None = None) -> list[int]:
    """Run two loops side by side and compare their states at every token. Returns their tokens.

    Each loop has its own state of the global random generator. `count`: close both after so many tokens.
    """
    runs: list[Iterator[int]] = [loop.run(*arguments) for loop in loops]
    random_states, generated = [torch.get_rng_state()] * 2, []
    for _ in itertools.count() if count is None else range(count):
        tokens = []
        for i, run in enumerate(runs):
            torch.set_rng_state(random_states[i])
            tokens.append(next(run, None))
            random_states[i] = torch.get_rng_state()
        assert tokens[0] == tokens[1]
        assert_equal_state(*loops)
        assert torch.equal(*random_states)
        if tokens[0] is None:
            break
        generated.append(tokens[0])
    for run in runs:
        run.close()
    assert_equal_state(*loops)
    return generated


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_and_state_equal_those_of_the_plain_loop_at_every_token(config, seed) -> None:
    loops = pair()
    assert len(run_both(loops, config, 25, seed, PROMPT)) == 25
    assert len(run_both(loops, config, 1, seed)) == 1
    assert run_both(loops, config, 0, seed) == []
    assert len(run_both(loops, config, None, seed, count=7)) == 7  # endless, closed by the caller
    assert len(run_both(loops, config, 12, seed, PROMPT[:3])) == 12


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_eos_token_ends_both_loops(config) -> None:
    whole = run_both(pair(), config, 25, 1, PROMPT)
    for eos in whole[::5]:
        loops = pair()
        generated = run_both(loops, config.override(eos=(eos,)), 25, 1, PROMPT)
        assert generated == whole[: whole.index(eos) + 1]
        assert run_both(loops, config, 4, 1)


def test_one_forward_runs_for_each_token() -> None:
    calls = 0

    def counting(*_) -> None:
        nonlocal calls
        calls += 1

    _, loop = pair(tiny_llama.__wrapped__())
    loop.model.register_forward_hook(counting)
    for count in (10, 1, 5):
        calls = 0
        generated = list(loop.run(CONFIGS["greedy"], count, None, PROMPT[:4]))
        assert calls == count, "the last token must not be fed before another one is requested"
        assert len(generated) == count
    calls = 0
    closed = loop.run(CONFIGS["greedy"], None, None)
    next(closed)
    closed.close()
    next(loop.run(CONFIGS["greedy"], 1, None))
    assert calls == 2, "the next run must use the forward that ran ahead"


@pytest.mark.parametrize("use", ["forward", "failed forward", "state_dict", "step_back"])
def test_between_two_tokens_the_cache_can_be_used(use: str) -> None:
    model = tiny_llama.__wrapped__()
    loops, tokens = pair(model), []
    for loop in loops:
        run = loop.run(CONFIGS["greedy"], 20, None, PROMPT)
        generated = list(itertools.islice(run, 8))
        if use == "forward":
            model(random_tokens(3, seed=5), loop.cache)
        elif use == "failed forward":  # it leaves another token's key in the slot of the next token
            with failing(model.layers[2]), pytest.raises(Interrupted):
                model(random_tokens(1, seed=5), loop.cache)
        elif use == "state_dict":
            state = {name: tensor.clone() for name, tensor in loop.cache.state_dict().items()}
            loop.cache.reset()
            loop.cache.load_state_dict(state)
        else:
            model(random_tokens(1, seed=5), loop.cache)
            loop.cache.step_back()
        tokens.append(generated + list(run))
    assert tokens[0] == tokens[1]
    assert_equal_state(*loops)


@pytest.mark.parametrize("part", ["layers.0", "layers.2", "norm", "head", ""])
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_an_error_is_raised_after_the_same_token_as_in_the_plain_loop(
    part: str, kind: type[BaseException]
) -> None:
    config = CONFIGS["penalty"]
    for failing_call in range(1, 6):
        results = []
        for loop in pair(tiny_llama.__wrapped__()):
            module, calls, generated = loop.model.get_submodule(part), [], []

            def hook(*_, calls=calls, failing_call=failing_call) -> None:
                calls.append(None)
                if len(calls) == failing_call:
                    raise kind

            handle = module.register_forward_hook(hook)
            torch.manual_seed(0)
            with pytest.raises(kind):
                generated.extend(loop.run(config, 20, None, PROMPT))
            handle.remove()
            state = loop.cache.seen.tolist(), list(loop.unfed)
            random_state = torch.get_rng_state()
            generated.extend(loop.run(config, 20, None))
            results.append((generated, loop, state, random_state))
        (plain_tokens, plain, plain_state, plain_random), (tokens, ahead, state, random) = results
        assert plain_tokens == tokens
        assert plain_state == state
        assert torch.equal(plain_random, random)
        assert_equal_state(plain, ahead)


def test_ctrl_c_is_raised_when_the_loop_is_closed_and_other_errors_are_not() -> None:
    for kind, raised in ((KeyboardInterrupt, True), (Interrupted, False)):
        _, loop = pair(tiny_llama.__wrapped__())
        calls = []

        def hook(*_, calls=calls, kind=kind) -> None:
            calls.append(None)
            if len(calls) == 3:
                raise kind

        handle = loop.model.head.register_forward_hook(hook)
        run = loop.run(CONFIGS["greedy"], None, None, PROMPT[:4])
        generated = [next(run), next(run)]
        if raised:
            with pytest.raises(KeyboardInterrupt):
                run.close()
        else:  # the plain loop would not have run the forward that failed
            run.close()
        handle.remove()
        plain, _ = pair(tiny_llama.__wrapped__())
        rest = list(loop.run(CONFIGS["greedy"], 5, None))
        assert generated + rest == list(plain.run(CONFIGS["greedy"], 7, None, PROMPT[:4]))


def test_logits_that_are_not_finite_are_an_error_before_the_token_is_yielded() -> None:
    for config in CONFIGS.values():
        loops = pair(tiny_llama.__wrapped__())
        for loop in loops:
            handle = loop.model.head.register_forward_hook(lambda *call: call[2] * torch.nan)
            with pytest.raises(ValueError, match="not finite"):
                list(loop.run(config, 5, 0, PROMPT))
            handle.remove()
        assert_equal_state(*loops)


GRID = [
    GenerationConfig(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t in (0.0, 0.7, 2.0)
    for k in (0, 1, 7, 5000)
    for p in (0.3, 0.95, 1.0)
    for m in (0.0, 0.1)
    for r in (1.0, 1.4)
]


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_choose_on_the_device_gives_the_same_tokens_as_next_token(size: int) -> None:
    inputs = torch.Generator().manual_seed(size)
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for config in GRID:
        logits = 3 * torch.randn(size, generator=inputs)
        seen_tokens = torch.rand(size, generator=inputs) < 0.5
        for _ in range(5):
            token, best = choose(logits, config, generator, seen_tokens)
            assert token.tolist() == [next_token(logits, config, other, seen_tokens)]
            assert best.shape == token.shape == (1,)
    assert torch.equal(generator.get_state(), other.get_state())


def test_choosing_and_running_ahead_read_no_values() -> None:
    """A tensor on "meta" has no values: reading one raises."""
    logits, seen_tokens = torch.randn(50, device="meta"), torch.zeros(50, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        next_token(logits, GenerationConfig(), None, seen_tokens)
    for config in GRID:
        token, best = choose(logits, config, None, seen_tokens)
        assert (token.dtype, token.shape, best.shape) == (torch.int64, (1,), (1,))
    model = tiny_llama.__wrapped__(dtype=torch.float32).to("meta")
    cache = SinkCache(model, 2, 6)
    for _ in range(12):
        logits = model(token[None], cache, logits_to_keep=1)
        cache.step_on(cache.step_back())
    assert cache.seen.tolist() == [12]
    assert logits.shape == (1, 1, 61)
