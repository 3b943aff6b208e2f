"""Measures how much of an endless text lies inside loops, with and without the settings against repetition.

    python tools/loops.py                                     # the embedded checkpoint, 20,000 tokens, 3 seeds
    python tools/loops.py --model folder --prompt "Once upon a time" --tokens 4000 --seeds 1 --rows plain dry

For each row of settings and each seed, one stream is sampled. Printed are the mean of `History.loop_share(512)` over
the text, read every 64 tokens; the share of these readings above 0.5, where the text is in a loop; and the share of
distinct 4-grams in the whole text. The tokens per second say what the settings cost.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from typing import Any

import torch

import streamllm
from streamllm.sampling import History, RowSettings, Sampler, breaker_tokens, check_finite, sample

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
ROWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "plain": SAMPLED,
    "repetition": {**SAMPLED, "repetition_penalty": 1.1},
    "frequency": {**SAMPLED, "frequency_penalty": 0.1},
    "presence": {**SAMPLED, "presence_penalty": 0.5},
    "ngrams": {**SAMPLED, "no_repeat_ngram_size": 6},
    "dry": {**SAMPLED, "dry_multiplier": 0.8},
    "dry without breakers": {**SAMPLED, "dry_multiplier": 0.8, "dry_sequence_breakers": ()},
    "dry far": {**SAMPLED, "dry_multiplier": 0.8, "dry_penalty_last_n": 4096},
}
SHARE_WINDOW, READ_EVERY, IN_A_LOOP = 512, 64, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub name; default: the embedded checkpoint")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds: 0, 1, …")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--backend", choices=("flat", "inductor"), help="compile the step of one token")
    arguments = parser.parse_args()
    model, tokenizer = streamllm.load(arguments.model)
    if arguments.backend:
        model = streamllm.compile(model, arguments.backend)
    print("| settings | seed | loop share | readings in a loop | distinct 4-grams | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in arguments.rows:
        for seed in range(arguments.seeds if row != "greedy" else 1):
            print(f"| {row} | {seed} | {measure(model, tokenizer, arguments, ROWS[row], seed)} |", flush=True)


def measure(
    model: torch.nn.Module, tokenizer: Any, arguments: argparse.Namespace, settings: dict[str, Any], seed: int
) -> str:
    """The cells of one row of the table."""
    config = streamllm.GenerationConfig(**settings)
    tokens = tokenizer.encode(arguments.prompt)
    prompt, readings = len(tokens), []
    begin = time.perf_counter()
    for token, history in islice(stream(model, tokenizer, arguments, config, seed, tokens), arguments.tokens):
        tokens.append(token)
        if len(tokens) % READ_EVERY == 0 and len(tokens) > SHARE_WINDOW:
            readings.append(history.loop_share(SHARE_WINDOW))
    seconds = time.perf_counter() - begin
    ngrams = list(zip(*(tokens[prompt + i :] for i in range(4)), strict=False))
    looping = sum(reading > IN_A_LOOP for reading in readings)
    return (
        f"{sum(readings) / len(readings):.3f} | {looping / len(readings):.3f} | "
        f"{len(set(ngrams)) / len(ngrams):.3f} | {arguments.tokens / seconds:.0f}"
    )


@torch.inference_mode()
def stream(
    model: torch.nn.Module,
    tokenizer: Any,
    arguments: argparse.Namespace,
    config: streamllm.GenerationConfig,
    seed: int,
    tokens: list[int],
) -> Any:
    """Endless tokens after `tokens`, each with the history that ends in it."""
    cache = streamllm.SinkCache(model, sinks=arguments.sinks, window=arguments.window)
    logits = model(torch.tensor([tokens]), cache, logits_to_keep=1)[:, -1]
    sampler = Sampler(
        config,
        vocab_size=logits.shape[-1],
        window=arguments.sinks + arguments.window,
        seed=seed,
        breakers=breaker_tokens(tokenizer, config.dry_sequence_breakers) if config.dry_multiplier else (),
    )
    history = History(max(sampler.needs, SHARE_WINDOW), tokens)
    rows = RowSettings([config], logits.device)
    place = prompt = len(tokens)
    while True:
        token, best = sample(logits, [sampler], rows, [history], [place], [place - prompt])
        check_finite(float(best))
        history.push(int(token))
        place += 1
        yield int(token), history
        logits = model(token[None], cache, logits_to_keep=1)[:, -1]


if __name__ == "__main__":
    main()
