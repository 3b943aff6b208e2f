"""Many streams: throughput beside a loop over single streams and transformers, and what a long prompt costs the others.

    python tools/streams.py throughput --model M --streams 1 8 32 --threads 2
    python tools/streams.py stall --model M --streams 8 --threads 2

throughput: each system gets the same prompts, of 16 … 64 tokens, and generates as many tokens after each, greedily.
Rounds are run in turn; printed are medians of new tokens per second, prompts included, and their ratios to the first.
transformers generates them as one batch with padding on the left, and with --continuous by its continuous batching.

stall: streams run, then a prompt of 10,000 tokens joins. Printed are the median time of a step before, and the median
and the longest time of a step while the prompt is read. Weights are random, or those of --folder. --cpu-time takes the
time that this thread computes, for a busy machine; it is only right with --threads 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark.machine import describe
from benchmark.ours import random_llama
from benchmark.peer_transformers import random_transformers_model
from benchmark.spec import SIZES, Spec

import streamllm
from streamllm.engine.batch import Batch
from streamllm.engine.row import TokenRow
from streamllm.generation import make_sampler
from streamllm.generation_config import GenerationConfig
from streamllm.loop import Loop
from streamllm.models.step import geometry_of

SHORTEST, LONGEST = 16, 64  # tokens of a prompt
JOINING = 10_000  # tokens of the prompt that joins
STEPS = 30  # that are timed before it joins


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["throughput", "stall"])
    parser.add_argument("--model", default="M", choices=list(SIZES))
    parser.add_argument("--folder", help="a checkpoint instead of --model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", dest="backend", help="of the library's systems; default: none")
    parser.add_argument("--prefill-tokens", type=int)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--without-loop", action="store_true", help="it takes the longest")
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching, too")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    print(json.dumps(describe()))
    spec = Spec("ours", "decode", args.model, args.dtype, args.window, 1, args.threads, args.device, 0)
    if args.folder:
        model, _ = streamllm.load(args.folder, dtype=args.dtype, device=args.device)
        args.model = args.folder
    else:
        model = random_llama(spec)
    args.vocab_size = geometry_of(model).vocab_size
    if args.backend:
        model = streamllm.compile(model, args.backend)
    for count in args.streams:
        if args.task == "throughput":
            throughput(args, spec, model, count)
        else:
            stall(args, model, count)


def throughput(args: argparse.Namespace, spec: Spec, model: torch.nn.Module, count: int) -> None:
    prompts = random_prompts(args.vocab_size, count)
    systems: dict[str, Callable[[], object]] = {
        "loop": lambda: [
            list(
                streamllm.generate(model, prompt, cache(args, model), max_new_tokens=args.new_tokens, eos=[])
            )
            for prompt in prompts
        ],
        "engine": lambda: list(
            streamllm.generate_batch(
                model, prompts, window=args.window, max_new_tokens=args.new_tokens, eos=[], slots=count
            )
        ),
    }
    if not args.without_transformers:
        systems["transformers"] = padded(args, spec, prompts)
    if args.continuous:
        systems["continuous"] = continuous(args, spec, prompts)
    if args.without_loop:
        del systems["loop"]
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(args.rounds + 1):
        for name, run in systems.items():
            began = args.clock()
            run()
            if turn or args.rounds == 0:  # the first one warms up
                times[name].append(args.clock() - began)
    speeds = {name: count * args.new_tokens / statistics.median(found) for name, found in times.items()}
    first = next(iter(speeds.values()))
    text = ", ".join(f"{name} {speed:.1f} ({speed / first:.2f} x)" for name, speed in speeds.items())
    print(f"{args.model} {args.dtype} {count} streams, {args.threads} threads, tokens/s: {text}", flush=True)


def random_prompts(vocab_size: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def cache(args: argparse.Namespace, model: torch.nn.Module) -> streamllm.SinkCache:
    return streamllm.SinkCache(model, window=args.window)


def peer(args: argparse.Namespace, spec: Spec) -> Any:
    """transformers' model of the same sizes, or of the same checkpoint."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if args.folder:
        return AutoModelForCausalLM.from_pretrained(args.folder, dtype=spec.dtype).to(spec.device).eval()
    return random_transformers_model(spec, LlamaForCausalLM)


def padded(args: argparse.Namespace, spec: Spec, prompts: Sequence[Sequence[int]]) -> Callable[[], object]:
    """transformers' generate for all prompts as one batch."""
    model = peer(args, spec)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run() -> object:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.generate(
                ids.to(spec.device), attention_mask=mask.to(spec.device), max_new_tokens=args.new_tokens,
                do_sample=False,
            )  # fmt: skip

    return run


def continuous(
    args: argparse.Namespace, spec: Spec, prompts: Sequence[Sequence[int]]
) -> Callable[[], object]:
    """transformers' generate_batch, which joins and leaves by itself."""
    from transformers import GenerationConfig

    model = peer(args, spec)
    config = GenerationConfig(
        max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run() -> object:
        found = model.generate_batch(list(map(list, prompts)), generation_config=config, progress_bar=False)
        assert len(found) == len(prompts), "some prompts have no result"
        return found

    return run


def stall(args: argparse.Namespace, model: torch.nn.Module, count: int) -> None:
    batch = Batch(model, count + 1, window=args.window, prefill_tokens=args.prefill_tokens)
    config = GenerationConfig(eos=())

    def add(prompt: Sequence[int]) -> TokenRow:
        loop = Loop(batch.plain, batch.slots.new_cache())
        sampler = make_sampler(loop, prompt, config, 0, None, ())
        loop.push(prompt)
        row = TokenRow(loop, sampler, None, lambda token: None)
        batch.add(row)
        return row

    for prompt in random_prompts(args.vocab_size, count):
        add(prompt)

    def timed_step() -> float:
        began = args.clock()
        batch.step()
        return args.clock() - began

    while not all(row.generated for row in batch.rows()):
        batch.step()
    before = [timed_step() for _ in range(STEPS)]
    long = add(torch.randint(args.vocab_size, (JOINING,)).tolist())
    during = []
    while not long.generated:
        during.append(timed_step())
    after = [timed_step() for _ in range(STEPS)]
    middle = statistics.median(before)
    name = f"{args.model} {args.dtype} {count} streams, {args.threads} threads"
    numbers = {
        "median step": middle,
        f"while {JOINING} tokens are read, {batch.prefill_tokens} a step": statistics.median(during),
        "90 % of them below": sorted(during)[len(during) * 9 // 10],
        "longest": max(during),
        "after": statistics.median(after),
    }
    text = ", ".join(f"{what} {1e3 * time:.1f} ({time / middle:.2f} x)" for what, time in numbers.items())
    print(f"{name}, ms: {text}", flush=True)


if __name__ == "__main__":
    main()
