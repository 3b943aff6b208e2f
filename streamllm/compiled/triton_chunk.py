"""Chunks of a prompt on CUDA, with few kernels around the products and flash attention.

    norm, with the sum before it              one kernel
    activation(gate) · up                     one kernel
    products of one input                     one product
    rotation of q to two places               one kernel, and one for k
    the sinks beside flash attention          one kernel

The model's forward is recorded once, while it computes its first chunk. Attention stays a call in this recording,
with the plan of the current chunk, so that one recording serves chunks of any length at any place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from streamllm.cache.ring import LayerStore
from streamllm.compiled import fusion, triton_attention, triton_chunk_kernels, triton_products, triton_support
from streamllm.compiled.recorder import NotedCall, Recorder
from streamllm.compiled.triton_graph import Recorded
from streamllm.compiled.triton_launch import power_of_two
from streamllm.models import attention, linear, rotary
from streamllm.models.base import CausalLM
from streamllm.models.step import Plan, Step

NOTED = (*triton_attention.NOTED, *triton_products.NOTED)
MAX_SINKS = 256  # with more, the model's own attention is used


class FusedChunks:
    """Takes a model's place in `CausalLM.forward`. Only `hidden` differs.

    `recorded` is called when weights may have moved. Where the model is not covered, or a kernel fails, `usable` is
    False and the model computes by itself.
    """

    _stream = CausalLM._stream
    __call__ = CausalLM.forward

    def __init__(self, model: nn.Module, recorded: Callable[[], object]) -> None:
        self._model, self._note = model, recorded
        self._function: Callable[..., Tensor] | None = None
        self._plan: Plan | None = None
        self._ropes: dict[int, rotary.Rope | None] = {}  # by layer
        self._rotations: dict[int | None, rotary.Rotation] = {}  # of the current chunk, by window
        self.usable = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, tokens: Tensor, plan: Plan) -> Tensor:
        """As the model's `hidden`, from the recording."""
        if not self.usable:
            return self._model.hidden(tokens, plan)  # type: ignore[no-any-return, operator]
        if self._function is None:
            return self._record(tokens, plan)
        self._plan, self._rotations = plan, {}
        try:
            with triton_support.on(tokens.device):
                return self._function(tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            triton_support.warn(error)
            self.usable = False
            return self.hidden(tokens, plan)
        finally:
            self._plan, self._rotations = None, {}

    def _record(self, tokens: Tensor, plan: Plan) -> Tensor:
        with Recorder([tokens], NOTED) as recorder:
            result = self._model.hidden(tokens, plan)  # type: ignore[operator]
        module = recorder.finish(result)
        recorded = Recorded(module, recorder, [tokens])
        recorded.rows = 1 << 30  # above MAX_MATVEC_ROWS, so that cuBLAS computes the products
        if recorded.calls(linear.quantized_kernel) or not self._keep_attention(recorded, plan):
            self.usable = False
            return result  # type: ignore[no-any-return]
        triton_products.ProductFusion(recorded).fuse()
        self._function = fusion.flat_function(module, joined_only=True)
        self._note()
        return result  # type: ignore[no-any-return]

    def _keep_attention(self, recorded: Recorded, plan: Plan) -> bool:
        """Replace rotation, append and attention of each layer by a call of `_attend`. Whether all were found."""
        tables: dict[int, NotedCall] = {}
        for call in recorded.calls(rotary.rotation):
            for name in ("query", "sink_query", "new_key"):
                tables[id(getattr(call.result, name))] = call
        windows = {id(step): window for window, step in plan.steps.items()}
        stores = {id(store): number for number, store in enumerate(plan.stores)}
        appends = {id(call.result[0]): call for call in recorded.calls(LayerStore.append) if call.result}
        calls, attend = recorded.calls(attention.attend), self._attend
        for call in calls:
            given = call.arguments
            append = appends.get(id(given["keys"]))
            if append is None or given["bias"] is not None or id(given["step"]) not in windows:
                return False
            q, rope = _before_rotation(recorded, given["query"], tables)
            k, key_rope = _before_rotation(recorded, append.arguments["k"], tables)
            v, out = recorded.node(append.arguments["v"]), recorded.node(call.result)
            if q is None or k is None or v is None or out is None or rope is not key_rope:
                return False
            layer = stores[id(append.arguments["self"])]
            self._ropes[layer] = rope
            with recorded.graph.inserting_before(out):
                read = recorded.graph.call_function(
                    attend, (q, k, v, windows[id(given["step"])], layer, given["scale"])
                )
            recorded.replace(out, read)
            recorded.erase(call)
            recorded.erase(append)
        fusion.prune(recorded.module)
        return len(calls) == len(plan.stores)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, layer: int, scale: float
    ) -> Tensor:
        """q [B, H, T, D], k and v [B, G, T, D] before the rotation -> [B, H, T, D]."""
        assert self._plan is not None
        step, store = self._plan.steps[window], self._plan.stores[layer]
        rope, sink_query = self._ropes[layer], None
        if rope is not None:
            if window not in self._rotations:
                self._rotations[window] = rotary.rotation(rope, step, q.dtype)
            turn = self._rotations[window]
            q, sink_query = rotated(q, turn.query, turn.sink_query)
            k, _ = rotated(k, turn.new_key, None)
        keys, values = store.append(k, v)
        return attended_chunk(q, sink_query, keys, values, step, scale)


def _before_rotation(
    recorded: Recorded, tensor: Tensor, tables: dict[int, NotedCall]
) -> tuple[fx.Node | None, rotary.Rope | None]:
    """The node that was rotated, and its Rope; for a tensor without rotation, its own node and None."""
    call = recorded.of_result.get(id(tensor))
    if call is None or call.function is not rotary._rotate:
        return recorded.node(tensor), None
    found = tables.get(id(call.arguments["table"]))
    return (None, None) if found is None else (recorded.node(call.arguments["x"]), found.arguments["rope"])


def rotated(x: Tensor, table: rotary.Table, sink_table: rotary.Table | None) -> tuple[Tensor, Tensor | None]:
    """x [B, H, T, D] rotated by one or two tables of a Rotation; stored as [B, T, H, D]."""
    batch, heads, length, dim = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty(batch, length, heads, dim)
    sink_out = out if sink_table is None else torch.empty_like(out)
    tables = [part.contiguous() for part in (*table, *(sink_table or table))]
    rows, turning = tables[0].shape[0], tables[0].shape[-1]
    block = min(16, power_of_two(heads))
    triton_chunk_kernels.rotate_heads[(batch * length, -(-heads // block))](
        x, *tables, out, sink_out, x.stride(0), x.stride(1), x.stride(2), length * turning if rows > 1 else 0, length,
        HEADS=heads, D=dim, D_PADDED=power_of_two(dim), ROTATED=turning, BOTH=sink_table is not None, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2), None if sink_table is None else sink_out.transpose(1, 2)


def attended_chunk(
    query: Tensor, sink_query: Tensor | None, keys: Tensor, values: Tensor, step: Step, scale: float
) -> Tensor:
    """As `attention.attend`, without a bias."""
    band, length = step.band, query.shape[2]
    apart = sink_query is not None and step.sinks > 0
    if band is None or length == 1 or not attention._flash_cuda_serves(query):
        return attention.attend(query, sink_query, keys, values, step, scale)
    if not apart:
        end = band.start + length
        # How many columns to skip, so that each key is read once, in order.
        skipped = {0: band.columns, band.columns: 0}.get(band.first)
        if skipped is None or end > band.columns + band.window:
            return attention.attend(query, sink_query, keys, values, step, scale)
        whole = keys[:, :, skipped:], values[:, :, skipped:]
        return attention._by_flash_cuda(query, *whole, scale, end)[0]
    assert sink_query is not None
    first = min(length, max(0, band.sinks - band.start))
    if first == length or band.columns > MAX_SINKS:
        return attention.attend(query, sink_query, keys, values, step, scale)
    low, high = band.run(first, length)
    run, log_sums = attention._by_flash_cuda(
        query[:, :, first:], keys[:, :, low:high], values[:, :, low:high], scale, band.window
    )
    return with_sinks(
        sink_query, keys[:, :, : band.columns], values[:, :, : band.columns], run, log_sums, band.start, scale
    )


def with_sinks(
    query: Tensor, keys: Tensor, values: Tensor, run: Tensor, log_sums: Tensor, place: int, scale: float
) -> Tensor:
    """One softmax over the sinks and over keys that flash attention has read.

    query [B, H, T, D] is rotated for the sinks [B, G, S, D]. The first query is at `place`; each sees the sinks up to
    its own place. run [B, H, N, D] and log_sums [B, H, N]: the result of flash attention for the last N queries, and
    its log-sum-exp. Returns [B, H, T, D].
    """
    batch, heads, length, dim = query.shape
    sinks, groups = keys.shape[2], keys.shape[1]
    query, run = (x.transpose(1, 2).contiguous() for x in (query, run))
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    out, shared, rows = torch.empty_like(query), heads // groups, 64
    triton_chunk_kernels.join_sinks[(-(-length * shared // rows), batch * groups)](
        query, keys, values, run, log_sums.contiguous(), out, *keys.stride()[:3], *values.stride()[:3], length,
        length - run.shape[1], place, scale, SINKS=sinks, HEADS=groups, SHARED=shared, D=dim,
        D_PADDED=max(16, power_of_two(dim)), ROWS=rows, BLOCK=max(16, min(64, power_of_two(sinks))), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)
