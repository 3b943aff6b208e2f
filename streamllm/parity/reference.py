"""The checkpoint in transformers. This is the only module of streamllm that imports transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamllm.models.rotary import DynamicRope, LongRope
from streamllm.parity.helpers import free_memory, no_warnings, rope_of
from streamllm.parity.hooks import captured
from streamllm.parity.names import compared_modules, names_in_transformers
from streamllm.weights.checkpoint import Checkpoint
from streamllm.weights.errors import CheckpointError
from streamllm.weights.source import Source

INSTALL = "pip install 'streamllm[parity]'"


def import_transformers() -> Any:
    """The module transformers. Raises ImportError, with the next step, where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"parity compares with transformers, which is not installed: {INSTALL}") from error
    return transformers


def transformers_arguments(source: Source, theirs: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the same commit or the same folder; or for `theirs`, where given."""
    if theirs is not None:
        return {"pretrained_model_name_or_path": os.path.expanduser(os.fspath(theirs))}
    commit = getattr(source, "commit", None)
    if commit is not None:
        return {"pretrained_model_name_or_path": source.name, "revision": commit}
    return {"pretrained_model_name_or_path": str(source.file("config.json").parent)}


def longest_text(checkpoint: Checkpoint) -> int | None:
    """The most tokens that transformers accepts: its MPT stops at max_seq_len, the others have no limit."""
    if checkpoint.config_reader.get("model_type") != "mpt":
        return None
    return checkpoint.config_reader.size("max_seq_len", 2048)


@dataclass(frozen=True)
class Outputs:
    """What a model computes for a text: logits [1, T, V], and the outputs [1, T, C] of the compared modules."""

    logits: Tensor
    modules: dict[str, Tensor]  # by our names

    def first(self, length: int) -> Outputs:
        return Outputs(self.logits[:, :length], {name: x[:, :length] for name, x in self.modules.items()})


class Reference:
    """A checkpoint in transformers. It is loaded for each question and released at once, to save memory."""

    def __init__(
        self,
        arguments: dict[str, Any],
        checkpoint: Checkpoint,
        device: str | torch.device,
        say: Callable[[str], object],
    ) -> None:
        self._arguments, self._checkpoint, self._device, self._say = arguments, checkpoint, device, say
        self.attention = "sdpa"  # transformers' name of the implementation in use

    def outputs(
        self, ids: Tensor, dtype: torch.dtype, short: int, modules: bool = True
    ) -> dict[int, Outputs]:
        """The outputs for all of `ids` [1, T] and for the first `short` of them, by their length.

        modules: also the outputs of modules, not only the logits.
        """
        outputs = {}
        # transformers changes these two frequencies with the longest text so far: load a model per length.
        by_length = isinstance(rope_of(self._checkpoint.config), (DynamicRope, LongRope))
        lengths = {ids.shape[1], short} if by_length else {ids.shape[1]}
        for length in sorted(lengths):
            self._say(f"running it in transformers, {str(dtype).removeprefix('torch.')}")
            with self.model(dtype) as (model, names):
                found: dict[str, Tensor] = {}
                ours = compared_modules(self._checkpoint) if modules else []
                with captured({names[name]: name for name in ours if name in names}, model, found):
                    logits = self.logits(model, ids[:, :length])
                del model
                outputs[length] = Outputs(logits, found)
        if short not in outputs:
            outputs[short] = outputs[ids.shape[1]].first(short)
        return outputs

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids.to(self._device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]

    @contextmanager
    def model(self, dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, str]]]:
        """transformers' model, and our module names -> its module names."""
        transformers = import_transformers()
        logging = transformers.utils.logging
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with no_warnings():
                model = self._load(transformers.AutoModelForCausalLM.from_pretrained, dtype)
            yield model, names_in_transformers(self._checkpoint, model)
        finally:
            model = None
            free_memory(self._checkpoint)
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()

    def _load(self, from_pretrained: Callable[..., Any], dtype: torch.dtype) -> Any:
        """With sdpa, the default: transformers' eager Falcon adds ALiBi twice. Its MPT has only eager."""
        try:
            try:
                model = from_pretrained(**self._arguments, dtype=dtype, attn_implementation=self.attention)
            except ValueError as error:
                if self.attention == "eager" or "scaled_dot_product_attention" not in str(error):
                    raise
                self.attention = "eager"
                model = from_pretrained(**self._arguments, dtype=dtype, attn_implementation=self.attention)
        except MemoryError:
            raise
        except Exception as error:  # its checks of configs raise types of their own
            reason = (
                next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
            )
            raise CheckpointError(
                f"transformers cannot load {self._arguments['pretrained_model_name_or_path']}: {reason}"
            ) from error
        return model.eval().to(self._device)
