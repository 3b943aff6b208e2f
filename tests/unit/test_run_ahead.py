"""The loop that runs one forward ahead yields the tokens of the plain loop, with the same state between tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch

from streamllm import GenerationConfig, SinkCache
from streamllm import loop as loop_module
from streamllm.generation import _generated, make_sampler
from streamllm.loop import Loop
from streamllm.sampling import History, RowSettings, Sampler, check_finite, choose_rows, sample, uniform
from tests.laws.scenarios import Interrupted, failing, random_tokens, tiny_llama

CONFIGS = {
    "greedy": GenerationConfig(),
    "sampled": GenerationConfig(temperature=1.0),
    "penalty": GenerationConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3),
}
PROMPT = random_tokens(9)[0].tolist()


@pytest.fixture(autouse=True)
def run_ahead_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "RUN_AHEAD", ("cpu",))


class PlainLoop(Loop):
    """The loop as it runs on devices that are not in RUN_AHEAD."""

    def draw(self, sampler: Sampler, generated: int, run_ahead: bool = True) -> int:
        return super().draw(sampler, generated, run_ahead=False)


def run(
    loop: Loop, config: GenerationConfig, count: int | None, seed: int | None, tokens: Sequence[int] = ()
) -> Iterator[int]:
    """The tokens of one call, as `generate` yields them, on a loop that is kept for the next call."""
    loop.push_drawn()
    sampler = make_sampler(loop, tokens, config, seed, None, ())
    loop.push(tokens)
    return _generated(loop, sampler, count)


def pair(model=None, window: int = 6) -> list[Loop]:
    """A plain loop and one that runs ahead, with a cache each."""
    model = model or tiny_llama()
    return [kind(model, SinkCache(model, 2, window, chunk=4)) for kind in (PlainLoop, Loop)]


def with_drawn(loop: Loop, tokens: list[int]) -> list[int]:
    """The tokens, and behind them the token that was drawn and not pushed yet."""
    return tokens + ([] if loop.drawn is None else [loop.drawn])


def assert_equal_state(plain: Loop, other: Loop) -> None:
    assert plain.cache.seen.tolist() == other.cache.seen.tolist()
    assert plain.unfed == other.unfed
    assert plain.drawn == other.drawn
    assert plain.end == other.end
    assert plain.last_tokens(10**6) == other.last_tokens(10**6)
    assert plain.log.history.total == other.log.history.total
    assert (plain.logits is None) == (other.logits is None)
    assert plain.logits is None or torch.equal(plain.logits.nan_to_num(), other.logits.nan_to_num())


def run_both(loops, *arguments, count: int | None = None) -> list[int]:
    """Run two loops side by side and compare their states at every token. Returns their tokens.

    Each loop has its own state of the global random generator. `count`: close both after so many tokens.
    """
    random_states, runs = [torch.get_rng_state()] * 2, []
    for i, loop in enumerate(loops):
        torch.set_rng_state(random_states[i])
        runs.append(run(loop, *arguments))
        random_states[i] = torch.get_rng_state()
    generated = []
    for _ in itertools.count() if count is None else range(count):
        tokens = []
        for i, iterator in enumerate(runs):
            torch.set_rng_state(random_states[i])
            tokens.append(next(iterator, None))
            random_states[i] = torch.get_rng_state()
        assert tokens[0] == tokens[1]
        assert_equal_state(*loops)
        assert torch.equal(*random_states)
        if tokens[0] is None:
            break
        generated.append(tokens[0])
    for iterator in runs:
        iterator.close()
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
        generated = list(run(loop, CONFIGS["greedy"], count, None, PROMPT[:4]))
        assert calls == count, "the last token must not be fed before another one is requested"
        assert len(generated) == count
    calls = 0
    closed = run(loop, CONFIGS["greedy"], None, None)
    next(closed)
    closed.close()
    next(run(loop, CONFIGS["greedy"], 1, None))
    assert calls == 2, "the next run must use the forward that ran ahead"


@pytest.mark.parametrize("use", ["forward", "failed forward", "state_dict", "step_back"])
def test_between_two_tokens_the_cache_can_be_used(use: str) -> None:
    model = tiny_llama.__wrapped__()
    loops, tokens = pair(model), []
    for loop in loops:
        iterator = run(loop, CONFIGS["greedy"], 20, None, PROMPT)
        generated = list(itertools.islice(iterator, 8))
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
        tokens.append(generated + list(iterator))
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
                generated.extend(run(loop, config, 20, None, PROMPT))
            handle.remove()
            state = (
                loop.cache.seen.tolist(),
                with_drawn(loop, loop.unfed),
                with_drawn(loop, loop.last_tokens(10**6)),
            )
            random_state = torch.get_rng_state()
            generated.extend(run(loop, config, 20, None))
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
        iterator = run(loop, CONFIGS["greedy"], None, None, PROMPT[:4])
        generated = [next(iterator), next(iterator)]
        if raised:
            with pytest.raises(KeyboardInterrupt):
                iterator.close()
        else:  # the plain loop would not have run the forward that failed
            iterator.close()
        handle.remove()
        plain, _ = pair(tiny_llama.__wrapped__())
        rest = list(run(loop, CONFIGS["greedy"], 5, None))
        assert generated + rest == list(run(plain, CONFIGS["greedy"], 7, None, PROMPT[:4]))


@pytest.mark.parametrize("length", [5, 8, 9])
def test_logits_that_are_not_finite_are_an_error_before_the_token_is_yielded(length: int) -> None:
    """The last token leaves the cache again. It stays where a token that ran ahead has overwritten its oldest key."""
    for config in CONFIGS.values():
        loops = pair(tiny_llama.__wrapped__())
        for loop in loops:
            handle = loop.model.head.register_forward_hook(lambda *call: call[2] * torch.nan)
            with pytest.raises(ValueError, match="not finite"):
                list(run(loop, config, 5, 0, PROMPT[:length]))
            handle.remove()
        assert loops[0].seen == length - 1
        if length < 8:
            assert_equal_state(*loops)
        else:
            assert (loops[1].seen, loops[1].unfed, loops[1].drawn) == (length, [], None)
            loops[0].feed()
            loops[1]._logits = loops[0]._logits
            assert_equal_state(*loops)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted])
def test_draw_raises_ctrl_c_at_once_and_other_errors_when_the_token_is_fed(kind: type[BaseException]) -> None:
    plain, _ = pair()
    wanted = list(run(plain, CONFIGS["penalty"], 6, 1, PROMPT))
    for part in ("layers.2", "head", ""):
        _, ahead = pair(tiny_llama.__wrapped__())
        generated = list(run(ahead, CONFIGS["penalty"], 2, 1, PROMPT))
        ahead.push_drawn()
        ahead.feed()
        sampler = make_sampler(ahead, (), CONFIGS["penalty"], 1, None, ())
        calls = []

        def hook(*_, calls=calls) -> None:
            calls.append(None)
            if len(calls) == 1:
                raise kind

        handle = ahead.model.get_submodule(part).register_forward_hook(hook)
        seen = ahead.seen
        if kind is KeyboardInterrupt:
            with pytest.raises(kind):
                ahead.draw(sampler, 2)
        else:
            assert ahead.draw(sampler, 2) == wanted[2]
        assert (ahead.drawn, ahead.unfed, ahead.seen) == (wanted[2], [], seen)
        assert ahead.draw(sampler, 2) == wanted[2], "the drawn token comes first"
        assert calls == [None]
        ahead.push_drawn()
        if kind is not KeyboardInterrupt:
            with pytest.raises(kind):
                ahead.feed()
            assert (ahead.unfed, ahead.seen) == ([wanted[2]], seen)
        handle.remove()
        rest = list(run(ahead, CONFIGS["penalty"], 3, 1))
        assert [*generated, wanted[2], *rest] == wanted


def test_an_error_of_the_draw_behind_a_forward_that_ran_ahead_leaves_an_exact_cache() -> None:
    """The token that ran ahead has overwritten a key that the last token needs, so that one stays fed."""
    forbidden = torch.zeros(61)

    def forbid(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits + forbidden

    model, logits = tiny_llama(), []
    for kind in (PlainLoop, Loop):
        loop = kind(model, SinkCache(model, 2, 6, chunk=4))
        sampler = make_sampler(loop, PROMPT, CONFIGS["greedy"], 0, forbid, ())
        loop.push(PROMPT)
        iterator = _generated(loop, sampler, 30)
        tokens = PROMPT + list(itertools.islice(iterator, 15))
        forbidden.fill_(-torch.inf)
        with pytest.raises(ValueError, match="every token is forbidden"):
            next(iterator)
        forbidden.zero_()
        after = model(torch.tensor([[*tokens[loop.seen :], 5]]), loop.cache)[0, -1]
        logits.append(after)
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=1e-9)


GRID = [
    GenerationConfig(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t in (0.0, 0.7, 2.0)
    for k in (0, 1, 7, 5000)
    for p in (0.3, 0.95, 1.0)
    for m in (0.0, 0.1)
    for r in (1.0, 1.4)
]


def penalised(logits: torch.Tensor, config: GenerationConfig, seen_tokens: torch.Tensor) -> torch.Tensor:
    penalty = config.repetition_penalty
    return torch.where(seen_tokens, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_sample_gives_the_token_of_the_penalised_logits_and_of_the_number_of_its_place(size: int) -> None:
    inputs = torch.Generator().manual_seed(size)
    state = torch.get_rng_state()
    for config in GRID:
        logits = 3 * torch.randn(size, generator=inputs)
        seen_tokens = torch.rand(size, generator=inputs) < 0.5
        history = History(size, seen_tokens.nonzero()[:, 0].tolist())
        sampler, rows = Sampler(config, vocab_size=size, window=size, seed=1), RowSettings([config], "cpu")
        for place in range(5):
            token, best = sample(logits[None], [sampler], rows, [history], [place], [0])
            scores = penalised(logits, config, seen_tokens)
            assert token.tolist() == choose_rows(scores[None], rows, uniform(1, place))[0].tolist()
            assert best.tolist() == [float(scores.max())]
            assert best.shape == token.shape == (1,)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's generator alone"


def test_choosing_and_running_ahead_read_no_values() -> None:
    """A tensor on "meta" has no values: reading one raises."""
    logits = torch.randn(1, 50, device="meta")
    history = History(20, [1, 2, 1, 3])
    for config in GRID:
        sampler, rows = Sampler(config, vocab_size=50, window=20, seed=1), RowSettings([config], "meta")
        token, best = sample(logits, [sampler], rows, [history], [4], [0])
        assert (token.dtype, token.shape, best.shape) == (torch.int64, (1,), (1,))
        with pytest.raises(RuntimeError):
            check_finite(float(best))
    model = tiny_llama.__wrapped__(dtype=torch.float32).to("meta")
    cache = SinkCache(model, 2, 6)
    for _ in range(12):
        logits = model(token[None], cache, logits_to_keep=1)
        cache.step_on(cache.step_back())
    assert cache.seen.tolist() == [12]
    assert logits.shape == (1, 1, 61)
