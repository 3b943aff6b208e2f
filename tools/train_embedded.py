"""Train the embedded checkpoint from scratch: tokenizer, weights, configuration.

The corpus is the standard library of the Python that runs this program, so nothing is downloaded, and one
core is enough. weights/embedded/README.md describes the recipe, and why the loss has an auxiliary term.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import streamllm
from streamllm.evaluate import Bucket, Result, compare, perplexity
from streamllm.evaluate.corpus import held_out_texts, training_texts
from streamllm.evaluate.texts import as_stream
from streamllm.models.llama import Block, Model
from streamllm.models.rotary import rotation
from streamllm.models.step import NoCache, Plan, Step
from streamllm.weights import llama
from streamllm.weights.config_reader import ConfigReader

BOS, EOS = 0, 1
SAVE_EVERY_SECONDS = 180  # between two saves of the training state


@dataclass(frozen=True)
class Recipe:
    """Every number that the checkpoint depends on, except the seed and the length of the training."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    mlp: int = 352
    length: int = 256  # tokens in a training window, including the <s> at its start
    theta: float = 10_000.0
    norm_eps: float = 1e-5

    batch_tokens: tuple[int, int] = (2048, 4096)  # per step: while the loss falls fast, and afterwards
    batch_switch: float = 0.15  # fraction of the training after which the batch grows
    muon_rate: float = 0.02
    adamw_rate: float = 3e-3
    weight_decay: float = 0.1
    warm_up: int = 60  # steps
    final_rate: float = 0.05  # the learning rate at the end of the cosine, relative to its start
    clip: float = 1.0  # norm of the gradient

    sink_target: float = 0.8  # attention on the first token, the target of the auxiliary term
    sink_weight: float = 1.0
    sink_fade: float = 0.7  # fraction of the training after which the auxiliary term fades to zero
    sink_share: float = (
        0.25  # share of a batch for the auxiliary term: enough for a mean, and four times cheaper
    )

    def config(self) -> dict[str, Any]:
        """The content of config.json, in Hugging Face's layout."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "bfloat16",
        }


# ------------------------------------------------------------------------------------- tokenizer and data


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE, which can encode every text. It adds `<s>` in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one sequence [N], with `</s>` after each. `draw_windows` adds the `<s>`."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, EOS)])


def draw_windows(
    corpus: Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows: inputs [count, length], each starting with `<s>`, and their targets, the next tokens."""
    offsets = torch.randint(len(corpus) - length, (count, 1), generator=generator)
    targets = corpus[offsets + torch.arange(length)]
    inputs = torch.cat((torch.full((count, 1), BOS), targets[:, :-1]), dim=1)
    return inputs, targets


# ------------------------------------------------------------------------------------------------------ model


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Matrices scaled by their fan-in. The last matrix of each residual branch is zero: a block starts as identity."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif name.endswith(("attention.o.weight", "mlp.down.weight")):
                weight.zero_()
            else:
                std = 0.02 if "embed" in name else 0.5 / math.sqrt(weight.shape[1])
                weight.normal_(0.0, std, generator=generator)


class Forward:
    """A forward over training windows that also returns the attention of every head on the first token.

    The attention is computed from the outputs of the query and key projections, which forward hooks collect.
    """

    def __init__(self, model: Model, length: int, share: float) -> None:
        self.model, self.share = model, share
        # Computed once: every training window has the places 0 … length - 1.
        self.plan = Plan({None: Step.dense(length)}, [NoCache()] * len(model.layers))
        self.rotation = rotation(model.config.rope, self.plan.steps[None], torch.float32)
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        for block in model.layers:
            assert isinstance(block, Block)
            block.attention.q.register_forward_hook(self._keep(self.queries))
            block.attention.k.register_forward_hook(self._keep(self.keys))

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, T] -> logits [B, T, V], and the mean attention on the first token, [layers, heads].

        The mean is taken over the last three quarters of the queries, in `share` of the windows.
        """
        self.queries.clear()
        self.keys.clear()
        logits = self.model.project(self.model.hidden(tokens, self.plan))
        means = [self._mean(q, k) for q, k in zip(self.queries, self.keys, strict=True)]
        return logits, torch.stack(means)

    def _keep(self, outputs: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            outputs.append(output[: max(1, int(len(output) * self.share))])

        return hook

    def _mean(self, q: Tensor, k: Tensor) -> Tensor:
        length, dim = q.shape[1], self.model.config.head_dim
        q, k = (x.view(*x.shape[:2], -1, dim).transpose(1, 2) for x in (q, k))  # [B, H, T, D]
        queries, keys = self.rotation.queries(q)[0].to(q.dtype), self.rotation.keys(k).to(k.dtype)
        late = torch.arange(length // 4, length)
        scores = (queries[:, :, length // 4 :] @ keys.transpose(2, 3)).float() * dim**-0.5
        scores = scores.masked_fill(torch.arange(length) > late[:, None], -math.inf)
        on_first: Tensor = (scores[..., 0] - scores.logsumexp(-1)).exp()
        return on_first.mean((0, 2))


# --------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """How much of the training is done. With a time limit, the schedule follows the clock, so that it completes."""

    token_limit: int
    second_limit: float = math.inf
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        return min(1.0, max(self.tokens / self.token_limit, self.seconds / self.second_limit))


def make_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            others, lr=recipe.adamw_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        ),
    ]


def rate_factor(recipe: Recipe, progress: Progress) -> float:
    """The learning rate, relative to its start: a linear warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress.fraction))
    return min(1.0, (progress.step + 1) / recipe.warm_up) * (
        recipe.final_rate + (1 - recipe.final_rate) * cosine
    )


def sink_factor(recipe: Recipe, progress: Progress) -> float:
    """The weight of the auxiliary term: constant, then a linear fade to zero."""
    return recipe.sink_weight * min(1.0, (1 - progress.fraction) / (1 - recipe.sink_fade))


def make_loss(
    model: Model, recipe: Recipe, compiled: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function (inputs, targets), each [B, T] -> (mean loss, attention on `<s>` [layers, heads])."""
    forward = Forward(model, recipe.length, recipe.sink_share)

    def loss(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, on_start = forward(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), on_start

    return torch.compile(loss, dynamic=False) if compiled else loss


def train(
    model: Model,
    corpus: Tensor,
    recipe: Recipe,
    progress: Progress,
    generator: torch.Generator,
    state_file: Path,
    compiled: bool = True,
) -> Iterator[dict[str, float]]:
    """Train until `progress` is complete. After every step, yields the numbers for a progress bar."""
    optimisers = make_optimisers(model, recipe)
    base_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    if state_file.exists():
        _restore(state_file, model, optimisers, progress, generator)
    loss_of = make_loss(model, recipe, compiled)
    now = saved = time.monotonic()
    while progress.fraction < 1:
        batch_tokens = recipe.batch_tokens[progress.fraction >= recipe.batch_switch]
        inputs, targets = draw_windows(corpus, batch_tokens // recipe.length, recipe.length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss, on_start = loss_of(inputs, targets)
        auxiliary = sink_factor(recipe, progress) * (on_start - recipe.sink_target).square().mean()
        torch.autograd.backward(loss + auxiliary)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        factor = rate_factor(recipe, progress)
        for optimiser, rate in zip(optimisers, base_rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad()
        before, now = now, time.monotonic()
        progress.step += 1
        progress.tokens += inputs.numel()
        progress.seconds += now - before
        if now - saved > SAVE_EVERY_SECONDS:
            saved = now
            _save(state_file, model, optimisers, progress, generator)
        yield {"loss": loss.item(), "on_start": on_start.mean().item()}


def _save(
    file: Path,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    progress: Progress,
    generator: torch.Generator,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "progress": [progress.step, progress.tokens, progress.seconds],
        "generator": generator.get_state(),
    }
    new = file.with_suffix(".new")  # an interruption while writing leaves the older file whole
    torch.save(state, new)
    new.replace(file)


def _restore(
    file: Path,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    progress: Progress,
    generator: torch.Generator,
) -> None:
    state = torch.load(file)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    progress.step, progress.tokens, progress.seconds = state["progress"]
    generator.set_state(state["generator"])


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """Each parameter's name in this library -> its name in a Hugging Face file."""
    their_names = {ours: theirs for theirs, ours in llama.TENSORS.items() if isinstance(ours, str)}
    names = {}
    for name, _ in model.named_parameters():
        layer = re.search(r"\d+", name)
        names[name] = their_names[re.sub(r"\d+", "{}", name)].format(layer[0] if layer else None)
    return names


def write_checkpoint(out: Path, model: nn.Module, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write config.json, model.safetensors (bfloat16), and the files of the tokenizer and of generation."""
    names = names_on_disk(model)
    tensors = {
        names[name]: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(recipe.config(), indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    # Below a temperature of 0.6 a model this small repeats itself. Generation continues after the end of a file.
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "eos_token_id": None}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------- evaluation

COLUMNS = (1, 256, 512, 1024, 4096, 16384, 65536)  # first positions of the columns of the table
DENSE_TEXT = 16_384  # tokens in a text: the cost of dense attention grows with the square


def measure(folder: Path, seed: int, positions: int) -> Iterator[str]:
    """The numbers of the model card, as lines of Markdown: held-out perplexity by position, in float32."""
    model, tokenizer = streamllm.load(folder, dtype=torch.float32, device="cpu")
    stream = as_stream(tokenizer, held_out_texts())
    pieces = [torch.cat((stream[:1], piece)) for piece in torch.split(stream[1:], DENSE_TEXT - 1)]

    def score(what: str, text: Tensor | list[Tensor], **how: Any) -> Result:
        with tqdm(desc=what, unit="tok", unit_scale=True, leave=False) as bar:

            def show(so_far: Result) -> None:
                bar.total = so_far.total
                bar.update(so_far.tokens - bar.n)

            return perplexity(model, text, progress=show, **how)

    yield f"{len(stream):,} held-out tokens, one stream; sinks + window = the trained length"
    yield ""
    edges = [f"{low:,}–{high - 1:,}" for low, high in pairwise(COLUMNS)]
    yield f"| perplexity at position | {' | '.join(edges)} | {COLUMNS[-1]:,}– | all from {COLUMNS[1]} |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for sinks in (4, 1, 0):
        result = score(f"{sinks} sinks", stream, sinks=sinks)
        yield _row(f"sinks {sinks}, window {result.window}", result)
    yield _row(f"dense, texts of {DENSE_TEXT:,}", score("dense", pieces, mode="dense"))
    yield ""
    for sinks in (4, 0):
        fresh, streamed = (
            score(mode, stream, mode=mode, sinks=sinks, positions=positions, seed=seed)
            for mode in ("recompute", "sinks")
        )
        yield (
            f"at {positions:,} random positions, sinks {sinks}: "
            f"re-computation {fresh.perplexity:.2f}, streaming {streamed.perplexity:.2f}"
        )
    gap = compare(model, stream, sinks=4, positions=positions, seed=seed)
    eighths = ", ".join(f"{math.exp(part):.3f}" for part in gap.eighths)
    yield f"streaming / re-computation, 4 sinks: {gap.ratio:.4f} ± {gap.error:.4f}"
    yield f"in each eighth of the stream: {eighths}"


def _row(name: str, result: Result) -> str:
    cells = [_cell(result.between(low, high)) for low, high in pairwise((*COLUMNS, math.inf))]
    return f"| {name} | {' | '.join(cells)} | **{_cell(result.beyond(COLUMNS[1]))}** |"


def _cell(bucket: Bucket) -> str:
    return f"{bucket.perplexity:,.1f}" if bucket.tokens else "–"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the checkpoint."
)
@click.option("--tokens", default=50_000_000, help="Training tokens.")
@click.option("--minutes", type=float, help="Shorten the schedule so that training ends after this time.")
@click.option("--seed", default=0, help="For the weights, the windows and the compared positions.")
@click.option("--threads", default=1, help="CPU threads; a model this small gains little from more.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Use torch.compile, which is twice as fast."
)
@click.option("--measure-only", is_flag=True, help="Do not train; measure the checkpoint in --out.")
@click.option("--positions", default=8000, help="Random positions to compare with re-computation.")
def main(
    out: Path,
    tokens: int,
    minutes: float | None,
    seed: int,
    threads: int,
    compiled: bool,
    measure_only: bool,
    positions: int,
) -> None:
    torch.set_num_threads(threads)
    if not measure_only:
        make(out, tokens, minutes, seed, compiled)
    for line in measure(out, seed, positions):
        click.echo(line)


def make(out: Path, tokens: int, minutes: float | None, seed: int, compiled: bool) -> None:
    """Train and write the checkpoint. An interrupted training continues from its last saved state."""
    recipe = Recipe()
    out.mkdir(parents=True, exist_ok=True)
    texts = training_texts()
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    corpus = encode(tokenizer, texts)
    generator = torch.Generator().manual_seed(seed)
    model = Model(llama.read_config(ConfigReader(recipe.config()), match_transformers=False))
    initialise(model, generator)
    parameters = sum(weight.numel() for weight in model.parameters())
    click.echo(f"{len(texts)} texts, {len(corpus):,} tokens; {parameters:,} parameters", err=True)
    progress = Progress(tokens, 60 * minutes if minutes else math.inf)
    state_file = out / "training.pt"
    with tqdm(total=tokens, unit="tok", unit_scale=True, smoothing=0.02, mininterval=2) as bar:
        for shown in train(model, corpus, recipe, progress, generator, state_file, compiled):
            bar.set_postfix(shown, refresh=False)
            bar.update(progress.tokens - bar.n)
    write_checkpoint(out, model, recipe, tokenizer)
    state_file.unlink(missing_ok=True)
    click.echo(
        f"{progress.tokens:,} tokens in {progress.step:,} steps, {progress.seconds / 60:.0f} minutes",
        err=True,
    )


if __name__ == "__main__":
    main()
