"""Standard tasks over streams: the `LM` interface of lm-evaluation-harness (extra `lm-eval`).

    import lm_eval
    from streamllm.evaluate.lm_eval import harness_model

    lm = harness_model(model, tokenizer, sinks=4, window=1020)
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

In mode "sinks" (or "window") every request is a stream of its own, of any length: nothing is cut off, and
tokens that have left the window are forgotten. In mode "dense" requests are read as the harness's own backends
read them: a text longer than the model was trained for loses its beginning, and a rolling text is cut into
pieces.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.evaluate.predictions import new_cache, scored_texts
from streamllm.evaluate.texts import beginning
from streamllm.models.step import geometry_of
from streamllm.stream import Stream
from streamllm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task sets no limit
LONGEST_DENSE_TEXT = 2048  # tokens, where the model has no trained length


def harness_model(model: nn.Module, tokenizer: Tokenizer, **settings: Any) -> Any:
    """An `lm_eval.api.model.LM` for `simple_evaluate`. `settings` are the keywords of `Requests`.

    Raises ImportError where lm-evaluation-harness is not installed.
    """
    try:
        LM = importlib.import_module("lm_eval.api.model").LM
    except ImportError:
        raise ImportError(
            "the adapter needs lm-evaluation-harness: pip install 'streamllm[lm-eval]'"
        ) from None

    made = type("StreamLM", (Requests, LM), {})(model, tokenizer, **settings)
    LM.__init__(made)  # sets rank, world size and the hook of the harness's cache of answers
    return made


class Requests:
    """Answers the harness's requests. A request is any object whose `args` are as the harness documents.

    mode: "sinks", "window" or "dense". sinks, window: as for SinkCache. batch: requests that are read together,
    each as a stream of its own. chunk: tokens of each that are read at once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        mode: str = "sinks",
        sinks: int = 4,
        window: int | None = None,
        batch: int = 8,
        chunk: int = 256,
    ) -> None:
        if mode not in ("sinks", "window", "dense"):
            raise ValueError(f"mode must be sinks, window or dense, not {mode!r}")
        if batch < 1 or chunk < 1:
            raise ValueError(f"batch and chunk must be at least 1, not {batch} and {chunk}")
        self.model, self.streaming_tokenizer = model, tokenizer
        self._template: str | None = None  # the one that the harness chose by name
        self.mode, self.batch, self.chunk = mode, batch, chunk
        self.sinks = sinks if mode == "sinks" else 0
        self.longest = geometry_of(model).trained_length or LONGEST_DENSE_TEXT
        self.window = window
        if mode != "dense":
            self.window = new_cache(model, mode, self.sinks, window, chunk).window

    @property
    def tokenizer_name(self) -> str:
        return "streamllm"

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the tokenizer's chat template makes from messages, for `--apply_chat_template`.

        Without `add_generation_prompt` it ends within the last message, which the model continues.
        """
        return self.streaming_tokenizer.render_chat_template(
            chat_history,
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that the harness asks for: by name, or the tokenizer's own (True), or none ("")."""
        known = self.streaming_tokenizer.chat_template
        if not chat_template or known is None:
            return ""
        if isinstance(known, str):
            return known
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in known:
            raise ValueError(
                f"there is no chat template {name!r}; the tokenizer has {', '.join(sorted(known))}"
            )
        self._template = known[name]
        return self._template

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability in nats, and whether greedy decoding generates it."""
        texts, counts = [], []
        for request in requests:
            context, continuation = self._pair(*request.args)
            texts.append(self._fit([*context, *continuation], len(continuation)))
            counts.append(len(continuation))
        answers = []
        for (nats, hits), count in zip(self._score(texts), counts, strict=True):
            last = slice(len(nats) - count, None)
            answers.append((-float(nats[last].sum()), bool(hits[last].all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): log-probability of the whole text in nats, with each token scored once."""
        pieces, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self._encode(request.args[0], alone=False)
            for piece in self._pieces([self._prefix(), *tokens]):
                pieces.append(piece)
                owners.append(owner)
        sums = [0.0] * len(requests)
        for (nats, _), (_, count), owner in zip(
            self._score([piece for piece, _ in pieces]), pieces, owners, strict=True
        ):
            sums[owner] -= float(nats[len(nats) - count :].sum())
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the text generated before one of `until`; greedy unless `do_sample`."""
        return [self._generate(context, dict(settings)) for context, settings in (r.args for r in requests)]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        max_new_tokens = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample", False) else 0.0
        window = self.window
        if self.mode == "dense":
            room = max(1, self.longest - max_new_tokens)
            ids = self._encode(context, alone=True)
            if len(ids) > room:  # the harness drops the beginning
                context = self.streaming_tokenizer.decode(ids[-room:], skip_special_tokens=False)
            window = min(len(ids), room) + max_new_tokens + 1
        stream = Stream(
            self.model, self.streaming_tokenizer, sinks=self.sinks, window=window, chunk=self.chunk
        )
        pieces = stream.generate(
            context,
            max_new_tokens=max_new_tokens,
            stop=[stop for stop in until if stop],
            temperature=temperature,
            top_p=settings.get("top_p") if temperature else None,
            seed=0,
        )
        return "".join(pieces)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, cut as the harness cuts them: spaces between them belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            ids = self._encode(continuation, alone=False)
            return [self._prefix()], ids
        whole, before = self._encode(context + continuation, alone=True), self._encode(context, alone=True)
        cut = min(len(before), len(whole) - 1)  # at least one token is scored, even where both merge into it
        return whole[:cut], whole[cut:]

    def _fit(self, tokens: list[int], scored: int) -> list[int]:
        """A stream is read whole; of a dense text the end is kept, as the harness's own backends do."""
        if self.mode != "dense":
            return tokens
        if scored > self.longest:
            raise ValueError(
                f"a continuation of {scored} tokens is longer than the {self.longest} tokens that the model "
                f"was trained for: score it in mode 'sinks'"
            )
        return tokens[-(self.longest + 1) :]

    def _pieces(self, tokens: list[int]) -> Iterator[tuple[list[int], int]]:
        """A rolling text as pieces that are scored separately, and how many tokens at the end of each are scored.

        A stream is one piece. Dense pieces follow each other; the last is as long as the others, so it overlaps
        the one before, and only its new tokens are scored.
        """
        if self.mode != "dense" or len(tokens) <= self.longest + 1:
            if len(tokens) > 1:
                yield tokens, len(tokens) - 1
            return
        done = 0  # predictions
        while done < len(tokens) - 1:
            stop = min(done + self.longest, len(tokens) - 1)
            yield tokens[max(0, stop - self.longest) : stop + 1], stop - done
            done = stop

    def _score(self, texts: Sequence[list[int]]) -> Iterable[tuple[Tensor, Tensor]]:
        return scored_texts(self.model, texts, self._cache, self.batch, self.chunk)

    def _cache(self, rows: int, length: int) -> SinkCache:
        window = length if self.mode == "dense" else cast(int, self.window)
        return new_cache(self.model, self.mode, self.sinks, window, self.chunk, rows)

    def _encode(self, text: str, alone: bool) -> list[int]:
        """The ids of a text; `alone`: with BOS, where the tokenizer adds it and the text does not begin with it."""
        return self.streaming_tokenizer.encode_piece(text, bos=None if alone else False)

    def _prefix(self) -> int:
        """The token that precedes a text without context."""
        for ids in (
            beginning(self.streaming_tokenizer)[-1:],
            [self.streaming_tokenizer.bos_token_id],
            [self.streaming_tokenizer.eos_token_id],
        ):
            if ids and ids[0] is not None:
                return ids[0]
        raise ValueError("the tokenizer has neither BOS nor EOS to begin a text with")
