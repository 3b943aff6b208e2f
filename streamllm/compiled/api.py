"""compile(): the same model with a faster way to decode single tokens.

model = streamllm.compile(model)            # the same calls, the same logits, less time per token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from streamllm.cache import SinkCache
from streamllm.cache.rolling_cache import TokenKinds
from streamllm.compiled import cpu_loops, cuda, fusion, library, triton_support
from streamllm.compiled.recorder import record
from streamllm.compiled.takeover import Takeover, can_pay
from streamllm.compiled.weight_addresses import WeightAddresses
from streamllm.compiled.weight_guard import weight_guard_of
from streamllm.lru import LRU
from streamllm.malloc import trim_heap
from streamllm.models import linear
from streamllm.models.base import check_lengths, check_tokens
from streamllm.models.step import Cache, Plan, geometry_of
from streamllm.tensor_parallel import is_tensor_parallel

if TYPE_CHECKING:
    from streamllm.compiled.triton_chunk import FusedChunks

BACKENDS = ("auto", "flat", "inductor", "cudagraphs")
CAPTURABLE = ("cuda",)  # device types with graphs that can be captured

# How many recordings are kept, and how many steps of each cache. The least recently used one is dropped first.
MAX_RECORDINGS = 16
MAX_STEPS_OF_A_CACHE = 8

# (tokens [B, 1], places [R], origin [1], starts [windows, B], *the cache's tensors) -> logits [B, 1, V]
Recording = Callable[..., Tensor]


def compile(model: nn.Module, backend: str | None = None) -> Compiled:
    """The model, called as before, with a faster way for single tokens.

    Every token runs the same kernels, on other numbers. So they are recorded once for each size of the cache, as a
    flat list of kernels without modules and branches. Later tokens run from that list, for one stream or for rows at
    different places. While a window fills, it is read in a few sizes, and each is recorded once. Prompts and chunks
    are computed by the model itself. The logits are those of `model`, up to rounding. Weights are shared with it.

    Args:
        backend: one of

            "auto"        (the default, also as None) "cudagraphs" on CUDA. On a CPU, "flat" at first; after some
                          seconds of decoding, another process compiles for "inductor" at low priority, and tokens
                          use the result when it is ready. That needs a C++ compiler and weights of at most 2 GiB;
                          elsewhere it is "flat". The change alters rounding, so a text may differ from run to run.
            "flat"        runs the kernels one by one. The same text on each run.
            "inductor"    hands the list to torch's compiler. On a CPU that makes one C++ function, which reads
                          weights and cache at the speed of memory. It needs a C++ compiler, and half a minute for
                          each recording. On CUDA, its kernels are launched together.
            "cudagraphs"  launches the kernels together, on CUDA.

    Compiled libraries are kept for later processes in the folder that the environment variable STREAMLLM_CACHE names,
    or else in streamllm under XDG_CACHE_HOME or ~/.cache. The folder may be deleted at any time.

    On CUDA with Triton, in float32 or a half type, the list is first rewritten into a few fused kernels
    (triton_fusion.py), and one recording serves a stream from its first token on. Chunks then use fused kernels, too.

    A tensor-parallel model is recorded with its sums over the processes, by "flat" and "cudagraphs".

    Hooks on the model's modules run only where the model itself computes. When a model is moved, quantized or
    arranged anew, it is recorded anew. Raises TypeError for a model of another library, ValueError for an
    unknown backend or one that the model or its device cannot have, CompileError (a RuntimeError) where
    "inductor" finds no C++ compiler. A forward raises CompileError where compiling fails.
    """
    geometry_of(model)
    device = next(model.parameters()).device.type
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend is None or backend == "auto":
        may_take_over = device == "cpu" and not is_tensor_parallel(model) and can_pay(model)
        backend = "cudagraphs" if device in CAPTURABLE else "auto" if may_take_over else "flat"
    if backend == "inductor" and is_tensor_parallel(model):
        raise ValueError(
            'backend="inductor" cannot compile the sums over the processes of a tensor-parallel model: take '
            '"flat", or "cudagraphs" on CUDA'
        )
    if backend == "cudagraphs" and device not in CAPTURABLE:
        raise ValueError(
            f'backend="cudagraphs" needs a model on CUDA, and this one is on {device}: take "flat" or "inductor"'
        )
    if backend == "inductor" and device == "cpu":
        library.check()  # now, not at the first token
    return Compiled(model.model if isinstance(model, Compiled) else model, backend)


class Compiled(nn.Module):
    """What `compile` returns. `recordings` counts how often a token was recorded."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__()
        self.model, self.backend = model, backend
        self.geometry = geometry_of(model)
        self._forget()

    def _forget(self) -> None:
        self.recordings = 0
        self._fusable = True  # whether Triton kernels cover the model's attention
        self._recorded: LRU[Any, Recording] = LRU(MAX_RECORDINGS)
        self._bound: WeakKeyDictionary[SinkCache, LRU[Any, _BoundStep]] = WeakKeyDictionary()
        self._takeovers: LRU[Any, Takeover] = LRU(MAX_RECORDINGS)  # of "auto"
        self._by_rows = False  # whether the weights are stored by rows, as loops read them
        self._weights = WeightAddresses()
        self._chunks: FusedChunks | None = None
        self._guard = weight_guard_of(self.model)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: a copy has weights of its own, so it gets no recordings."""
        recorded = "_recorded", "_bound", "_takeovers", "_weights", "_chunks", "_guard"
        return {name: value for name, value in self.__dict__.items() if name not in recorded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """As the model's own forward."""
        if isinstance(cache, SinkCache) and tokens.dim() == 2 and tokens.shape[1] == 1:
            check_tokens(self.model, tokens, logits_to_keep)  # type: ignore[arg-type]
            if check_lengths(tokens, cache, lengths) is None:  # None: every row has a token
                cache.check_model(self.geometry, tokens.device)
                with self._guard, cache.guard, torch.no_grad():
                    cache.finish_commit()
                    logits = self._step(tokens, cache)(tokens, cache)
                    cache.commit_token()
                return logits
        model = self._model_of_chunks(cache) if isinstance(cache, SinkCache) else self.model
        with self._guard:
            return model(tokens, cache, lengths=lengths, logits_to_keep=logits_to_keep)  # type: ignore[no-any-return]

    def _model_of_chunks(self, cache: SinkCache) -> Any:
        """What computes a chunk of a prompt: the model, or the same with fused kernels."""
        if not self._uses_triton(cache) or is_tensor_parallel(self.model):
            return self.model
        if self._chunks is None or not self._weights.unchanged():
            from streamllm.compiled import triton_chunk

            self._chunks = triton_chunk.FusedChunks(self.model, self._remember_weights)
        return self._chunks

    def _step(self, tokens: Tensor, cache: SinkCache) -> _BoundStep:
        """The step that computes the next token of this cache."""
        self._drop_stale()
        fused = self._uses_triton(cache)
        loops = self._uses_loops(cache.device)
        if self.backend == "auto":
            kinds, key = self._kinds(tokens, cache, fused, loops=True)
            takeover = self._takeover(tokens, cache, kinds, key)
            loops = takeover.library is not None
        if self.backend != "auto" or not loops:
            kinds, key = self._kinds(tokens, cache, fused, loops)
        steps = self._bound.get(cache)
        step = None if steps is None else steps.get(key)
        if step is None:
            step = self._bind(cache, self._given(tokens, cache, kinds), kinds, key, loops)
            if step is None:
                return self._step(tokens, cache)
            # Only now: `_bind` may have cleared self._bound.
            self._bound.setdefault(cache, LRU(MAX_STEPS_OF_A_CACHE)).put(key, step)
        return step

    def _kinds(self, tokens: Tensor, cache: SinkCache, fused: bool, loops: bool) -> tuple[TokenKinds, Any]:
        """What the next token's recording depends on, and the key under which it is kept."""
        # Kernels that take long to compile serve a window that fills and a full one by one recording.
        kinds = cache.token_kinds(recorded=True, for_any_place=fused or loops)
        if fused or (loops and self.backend == "auto"):
            # A fused kernel reads the entries that are held, of any number of slots. "auto" compiles one library.
            kinds = {own: replace(kind, reads=cache._slots_of(own)) for own, kind in kinds.items()}
        threads = cache.device.type == "cpu" and torch.get_num_threads()
        return kinds, (loops, *kinds.items(), tokens.dtype, torch.is_inference_mode_enabled(), threads)

    def _takeover(self, tokens: Tensor, cache: SinkCache, kinds: TokenKinds, key: Any) -> Takeover:
        """The Takeover for tokens like the next one, advanced by one token."""
        name = cache.recording_key, key
        takeover = self._takeovers.get(name)
        if takeover is None:
            takeover = Takeover()
            self._takeovers.put(name, takeover)

        def request() -> library.Request:
            given = self._given(tokens, cache, kinds)
            with self._guard.changing():
                try:
                    recorded = self._loops_graph(given, self._function(cache, given, kinds, loops=True))
                    inputs = [*given, *cpu_loops.prepare(recorded, given)]
                    return library.Request.of(recorded, inputs, cpu_loops.options())
                finally:
                    if not self._by_rows:
                        linear.arrange(self.model)

        takeover.advance(request)
        return takeover

    def _given(self, tokens: Tensor, cache: SinkCache, kinds: TokenKinds) -> list[Tensor]:
        """What a recording of the next token takes: see `Recording`."""
        rows = next(iter(kinds.values())).rows
        places = torch.zeros(rows, dtype=torch.int64, device=cache.device)
        cache.write_places(places)
        origin = torch.full((1,), cache.origin, dtype=torch.int64, device=cache.device)
        return [tokens.contiguous(), places, origin, cache.starts, *cache.tensors()]

    def _function(
        self, cache: SinkCache, given: Sequence[Tensor], kinds: TokenKinds, loops: bool
    ) -> Callable[[], Tensor]:
        """The next token's forward, to be recorded."""
        tokens, places, origin = given[:3]

        def step() -> Tensor:
            planned = cache.plan_token(places, kinds, origin)
            plan: Plan = planned
            if loops:
                plan = Plan(planned.steps, [cpu_loops.LoopStore(store) for store in planned.stores])
            return self.model.project(self.model.hidden(tokens, plan))  # type: ignore[no-any-return, operator]

        return step

    def _bind(
        self, cache: SinkCache, given: Sequence[Tensor], kinds: TokenKinds, key: Any, loops: bool
    ) -> _BoundStep | None:
        """The recording for caches like this one, with this cache's own tensors.

        None: it cannot be used, and `_step` chooses again.
        """
        recording_key = (cache.recording_key, key)
        recording = self._recorded.get(recording_key)
        if recording is None:
            step = self._function(cache, given, kinds, loops)
            if self._uses_triton(cache):
                recording = self._record_fused(given, step, cache)
                if recording is None:
                    return None
            elif loops:
                with self._guard.changing():
                    recording = self._record_loops(given, step, self._takeovers.get(recording_key))
                if recording is None:  # for example, the model was quantized meanwhile
                    self._takeovers.put(recording_key, Takeover())
                    return None
            else:
                recording = self._record(given, step)
            self._recorded.put(recording_key, recording)
        if self._is_captured(cache.device):
            return _CapturedStep(recording, given)
        return _BoundStep(recording, given)

    def _record(self, given: Sequence[Tensor], function: Callable[[], Tensor]) -> Recording:
        recorder, result = record(function, given)
        recorded = recorder.finish(result)
        if self.backend == "inductor":
            made = _by_inductor(fx.GraphModule(recorded, recorded.graph))
        else:
            made = fusion.flat_function(recorded)
        self._count_recording()
        return made

    def _loops_graph(self, given: Sequence[Tensor], function: Callable[[], Tensor]) -> fx.GraphModule:
        """The recorded list that becomes loops. Stores the weights by rows first, as loops read them."""
        linear.arrange_by_rows(self.model)
        recorder, result = record(function, given)
        return recorder.finish((result,))

    def _record_loops(
        self, given: Sequence[Tensor], function: Callable[[], Tensor], takeover: Takeover | None
    ) -> Recording | None:
        """One C++ function for the CPU. With a takeover: its library, or None where that was made of another model."""
        try:
            recorded = self._loops_graph(given, function)
            if takeover is None:
                made = cpu_loops.compiled(recorded, given)
            else:
                constants = cpu_loops.prepare(recorded, given)
                now = library.Request.of(recorded, [*given, *constants], cpu_loops.options())
                if takeover.library is None or takeover.key != now.key():
                    return None
                made = cpu_loops.with_constants(takeover.library, constants)
        except BaseException:  # also Ctrl-C: the caller may use the model without loops
            linear.arrange(self.model)
            raise
        self._by_rows = True
        self._count_recording()
        return made

    def _record_fused(
        self, given: Sequence[Tensor], function: Callable[[], Tensor], cache: SinkCache
    ) -> Recording | None:
        """As `_record`, rewritten into Triton kernels; None where they do not cover or do not run this model."""
        from streamllm.compiled import triton_fusion

        recorder, result = record(function, given, triton_fusion.NOTED)
        recorded = recorder.finish(result)
        if triton_fusion.fuse(recorded, recorder, given, cache):
            made = fusion.flat_function(recorded, joined_only=True)
            try:
                with triton_support.on(given[0].device):
                    made(*given)  # compiles the kernels
                self._count_recording()
                return made
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                triton_support.warn(error)
        self._fusable = False
        return None

    def _count_recording(self) -> None:
        if self._remember_weights():
            self._chunks = None
        self.recordings += 1
        trim_heap()

    def _drop_stale(self) -> bool:
        """Drop what was recorded of weights that have moved since. Returns whether they have."""
        moved = not self._weights.unchanged()
        if moved:
            self._recorded.clear()
            self._bound.clear()
        return moved

    def _remember_weights(self) -> bool:
        """As `_drop_stale`, and note where the weights are now."""
        moved = self._drop_stale()
        self._weights = WeightAddresses(self.model)
        return moved

    def _uses_triton(self, cache: SinkCache) -> bool:
        return (
            self._fusable
            and self._is_captured(cache.device)
            and triton_support.supported(cache.device, cache.dtype)
        )

    def _uses_loops(self, device: torch.device) -> bool:
        """Whether a token's products become sums over rows, compiled to C++, from the first token on."""
        return self.backend == "inductor" and device.type == "cpu"

    def _is_captured(self, device: torch.device) -> bool:
        return self.backend == "cudagraphs" or (self.backend == "inductor" and device.type in CAPTURABLE)


def _by_inductor(module: fx.GraphModule) -> Recording:
    fusion.prune(module)
    return torch.compile(module, fullgraph=True, dynamic=False)


class _BoundStep:
    """A recording with the tensors of one cache."""

    def __init__(self, recording: Recording, given: Sequence[Tensor]) -> None:
        self._recording = recording
        self._places, self._rest = given[1], given[2:]

    def __call__(self, tokens: Tensor, cache: SinkCache) -> Tensor:
        cache.write_places(self._places)
        return self._recording(tokens.contiguous(), self._places, *self._rest)


class _CapturedStep(_BoundStep):
    """As `_BoundStep`, captured as one CUDA graph. Tokens and places are copied to where the graph reads them."""

    def __init__(self, recording: Recording, given: Sequence[Tensor]) -> None:
        super().__init__(recording, given)
        self._tokens = given[0].clone()
        self._replay = cuda.capture(
            lambda: recording(self._tokens, self._places, *self._rest), self._tokens.device
        )

    def __call__(self, tokens: Tensor, cache: SinkCache) -> Tensor:
        self._tokens.copy_(tokens)
        cache.write_places(self._places)
        return self._replay().clone()  # the next replay overwrites it
