"""The loop that runs one forward ahead is the plain loop, whenever one looks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from streamllm import GenerationConfig, SinkCache
from streamllm import generation as LOOP
from streamllm.sampling import choose, next_token
from tests.laws.scenarios import Interrupted, failing, random_tokens, tiny_llama

CONFIGS = {
    "greedy": GenerationConfig(),
    "sampled": GenerationConfig(temperature=1.0),
    "penalty": GenerationConfig(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3),
}
PROMPT = random_tokens(9)[0].tolist()


@pytest.fixture(autouse=True)
def ahead_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(LOOP, "RUN_AHEAD", ("cpu",))


class Plain(LOOP.Loop):
    """The loop as it is on a device that is not in AHEAD."""

    def _choose_and_run_ahead(self, config, generator):
        return self._choose(config, generator), None


def pair(model=None, window: int = 6):
    model = model or tiny_llama()
    return [kind(model, SinkCache(model, 2, window, chunk=4)) for kind in (Plain, LOOP.Loop)]


def same(plain, other) -> None:
    assert plain.cache.seen.tolist() == other.cache.seen.tolist()
    assert plain.unfed == other.unfed
    assert plain.past == other.past
    assert (plain.seen_tokens is None) == (other.seen_tokens is None)
    assert plain.seen_tokens is None or torch.equal(plain.seen_tokens, other.seen_tokens)
    assert (plain.logits is None) == (other.logits is None)
    assert plain.logits is None or torch.equal(plain.logits.nan_to_num(), other.logits.nan_to_num())


def both(loops, *arguments, count: int | None = None) -> Iterator[list[int]]:
    """What two loops say, each with a chance of its own, compared at every token; closed after `count`."""
    runs, states, said = [loop.run(*arguments) for loop in loops], [torch.get_rng_state()] * 2, []
    for _ in itertools.count() if count is None else range(count):
        tokens = []
        for i, run in enumerate(runs):
            torch.set_rng_state(states[i])
            tokens.append(next(run, None))
            states[i] = torch.get_rng_state()
        assert tokens[0] == tokens[1]
        same(*loops)
        assert torch.equal(*states)
        if tokens[0] is None:
            break
        said.append(tokens[0])
    for run in runs:
        run.close()
    same(*loops)
    return said


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_is_as_in_the_plain_loop_at_every_token(config, seed) -> None:
    loops = pair()
    assert len(both(loops, config, 25, seed, PROMPT)) == 25
    assert len(both(loops, config, 1, seed)) == 1
    assert both(loops, config, 0, seed) == []
    assert len(both(loops, config, None, seed, count=7)) == 7  # left alone
    assert len(both(loops, config, 12, seed, PROMPT[:3])) == 12


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_eos_token_ends_both(config) -> None:
    whole = both(pair(), config, 25, 1, PROMPT)
    for end in whole[::5]:
        loops = pair()
        said = both(loops, config.override(eos=(end,)), 25, 1, PROMPT)
        assert said == whole[: whole.index(end) + 1]
        assert both(loops, config, 4, 1)


def test_one_forward_runs_for_each_token() -> None:
    calls = 0

    def counting(*_) -> None:
        nonlocal calls
        calls += 1

    _, other = pair(tiny_llama.__wrapped__())
    other.model.register_forward_hook(counting)
    for count in (10, 1, 5):
        calls = 0
        said = list(other.run(CONFIGS["greedy"], count, None, PROMPT[:4]))
        assert calls == count, "the last token is not fed before anybody asks for more"
        assert len(said) == count
    calls = 0
    left = other.run(CONFIGS["greedy"], None, None)
    next(left)
    left.close()
    next(other.run(CONFIGS["greedy"], 1, None))
    assert calls == 2, "what ran ahead is used by whoever goes on"


@pytest.mark.parametrize("touch", ["forward", "failed", "state", "back"])
def test_who_uses_the_cache_between_two_tokens_finds_it_as_it_was(touch: str) -> None:
    model = tiny_llama.__wrapped__()
    loops, tokens = pair(model), []
    for loop in loops:
        run = loop.run(CONFIGS["greedy"], 20, None, PROMPT)
        said = list(itertools.islice(run, 8))
        if touch == "forward":
            model(random_tokens(3, seed=5), loop.cache)
        elif touch == "failed":  # a forward of another token leaves its key where the next token's will stand
            with failing(model.layers[2]), pytest.raises(Interrupted):
                model(random_tokens(1, seed=5), loop.cache)
        elif touch == "state":
            state = {name: tensor.clone() for name, tensor in loop.cache.state_dict().items()}
            loop.cache.reset()
            loop.cache.load_state_dict(state)
        else:
            model(random_tokens(1, seed=5), loop.cache)
            loop.cache.step_back()
        tokens.append(said + list(run))
    assert tokens[0] == tokens[1]
    same(*loops)


@pytest.mark.parametrize("part", ["layers.0", "layers.2", "norm", "head", ""])
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_an_error_comes_in_its_turn(part: str, kind: type[BaseException]) -> None:
    for after in range(1, 6):
        results = []
        for loop in pair(tiny_llama.__wrapped__()):
            module, left, said = loop.model.get_submodule(part), [after], []

            def hook(*_, left=left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise kind

            handle = module.register_forward_hook(hook)
            config = CONFIGS["penalty"]
            torch.manual_seed(0)
            with pytest.raises(kind):
                said.extend(loop.run(config, 20, None, PROMPT))
            handle.remove()
            results.append((said, loop, loop.cache.seen.tolist(), list(loop.unfed), torch.get_rng_state()))
            said.extend(loop.run(config, 20, None))
        (plain, *there), (other, *here) = results
        assert plain == other
        assert there[1:3] == here[1:3]
        assert torch.equal(there[3], here[3])
        same(there[0], here[0])


def test_an_interruption_is_not_lost_on_one_who_stops_asking() -> None:
    for kind, raised in ((KeyboardInterrupt, True), (Interrupted, False)):
        _, loop = pair(tiny_llama.__wrapped__())
        calls = []

        def hook(*_, calls=calls, kind=kind) -> None:
            calls.append(0)
            if len(calls) == 3:
                raise kind

        handle = loop.model.head.register_forward_hook(hook)
        run = loop.run(CONFIGS["greedy"], None, None, PROMPT[:4])
        said = [next(run), next(run)]
        if raised:
            with pytest.raises(KeyboardInterrupt):
                run.close()
        else:  # a plain loop would not have come to it
            run.close()
        handle.remove()
        plain, _ = pair(tiny_llama.__wrapped__())
        assert said + list(loop.run(CONFIGS["greedy"], 5, None)) == list(
            plain.run(CONFIGS["greedy"], 7, None, PROMPT[:4])
        )


def test_logits_that_are_no_numbers_are_an_error_before_the_token_is_said() -> None:
    for config in CONFIGS.values():
        loops = pair(tiny_llama.__wrapped__())
        for loop in loops:
            handle = loop.model.head.register_forward_hook(lambda *given: given[2] * torch.nan)
            with pytest.raises(ValueError, match="not finite"):
                list(loop.run(config, 5, 0, PROMPT))
            handle.remove()
        same(*loops)


GRID = [
    GenerationConfig(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t in (0.0, 0.7, 2.0)
    for k in (0, 1, 7, 5000)
    for p in (0.3, 0.95, 1.0)
    for m in (0.0, 0.1)
    for r in (1.0, 1.4)
]


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_what_is_chosen_without_a_look_is_what_is_chosen_with_one(size: int) -> None:
    chance = torch.Generator().manual_seed(size)
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for config in GRID:
        logits = 3 * torch.randn(size, generator=chance)
        said = torch.rand(size, generator=chance) < 0.5
        for _ in range(5):
            token, best = choose(logits, config, one, said)
            assert token.tolist() == [next_token(logits, config, other, said)]
            assert best.shape == token.shape == (1,)
    assert torch.equal(one.get_state(), other.get_state())


def test_nothing_is_looked_at_where_it_is_computed() -> None:
    """A tensor on "meta" has no values: who asks for one gets an error."""
    logits, said = torch.randn(50, device="meta"), torch.zeros(50, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        next_token(logits, GenerationConfig(), None, said)
    for config in GRID:
        token, best = choose(logits, config, None, said)
        assert (token.dtype, token.shape, best.shape) == (torch.int64, (1,), (1,))
    model = tiny_llama.__wrapped__(dtype=torch.float32).to("meta")
    cache = SinkCache(model, 2, 6)
    for _ in range(12):
        logits = model(token[None], cache, logits_to_keep=1)
        cache.step_on(cache.step_back())
    assert cache.seen.tolist() == [12]
    assert logits.shape == (1, 1, 61)
