"""Rules for attention: clip, head norms, rotation, the write to the ring and attention itself become one kernel."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from streamllm.cache import SinkCache
from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import LayerStore
from streamllm.compiled import fusion, triton_tiles
from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled.recorder import NotedCall
from streamllm.compiled.triton_graph import Recorded, item
from streamllm.models import alibi, attention, rotary

NOTED = (attention.attend, rotary.rotation, rotary._rotate, alibi.position_bias, LayerStore.append)
Tables = list["fx.Node | None"]


class AttentionFusion:
    """cache: the one with which the step was recorded."""

    def __init__(self, recorded: Recorded, cache: SinkCache) -> None:
        self.recorded, self.graph = recorded, recorded.graph
        self.cache, self.sinks = cache, cache.sinks
        self.rotations: dict[int, tuple[NotedCall, str]] = {}  # by a table's id: of which call, which table
        for call in recorded.calls(rotary.rotation):
            for name in ("query", "sink_query", "new_key"):
                self.rotations.setdefault(id(getattr(call.result, name)), (call, name))
        self._slopes: dict[int, fx.Node] = {}  # by a position_bias call's id
        self._tables: dict[int, Tables] = {}  # by a rotation call's id
        self._first = next(node for node in self.graph.nodes if node.op == "call_function")
        self._cleared: fx.Node | None = None
        self._taken = 0

    def fuse(self) -> bool:
        """Fuses attention, with what comes between the projections and it. Returns whether in every layer."""
        calls = self.recorded.calls(attention.attend)
        done = [call for call in calls if self._fuse_attend(call)]
        fusion.prune(self.recorded.module)
        for call in self.recorded.calls(alibi.position_bias):  # it writes to a tensor of its own
            out = self.recorded.node(call.result)
            if out is not None and not out._erased and not out.users:
                self.recorded.erase(call)
        return len(done) == len(self.recorded.calls(LayerStore.append))

    def _fuse_attend(self, call: NotedCall) -> bool:
        given = call.arguments
        appended = next(
            (
                other
                for other in self.recorded.calls(LayerStore.append)
                if other.result and other.result[0] is given["keys"]
            ),
            None,
        )
        out = self.recorded.node(call.result)
        if appended is None or out is None or appended.result[1] is not given["values"]:
            return False
        ring = appended.arguments["self"].ring
        ring_nodes = [self.recorded.inputs.get(id(tensor)) for tensor in ring.tensors.values()]
        slots = next(iter(ring.tensors.values())).shape[-2] + (
            ring.numbers.shape[3] if isinstance(ring, Int8Ring) else 0
        )
        if None in ring_nodes or given["keys"].shape[2] != slots:
            return False
        of_query, of_key = self._unrotated(given["query"]), self._unrotated(appended.arguments["k"])
        if of_query is None or of_key is None:
            return False
        (q, table), (k, key_table) = of_query, of_key
        tables: Tables = []
        if table is not None or key_table is not None:
            if table is None or key_table is None or table[1] != "query":
                return False
            if table[0] is not key_table[0] or key_table[1] not in ("new_key", "query"):
                return False
            if self.sinks and given["sink_query"] is None:
                return False
            tables = self._rope_tables(table[0], slots, self.cache._list_of(ring))
        q_norm, k_norm = self.recorded.norm_of(q), self.recorded.norm_of(k)
        if (q_norm is None) != (k_norm is None):
            return False
        head_norms = None
        if q_norm is not None and k_norm is not None:
            if kernels.LAYER_NORM in (q_norm[1][0], k_norm[1][0]):
                return False
            q, k = q_norm[0], k_norm[0]
            head_norms = (q_norm[1][1], k_norm[1][1], q_norm[1][3], k_norm[1][3])
        nodes = q, k, self.recorded.node(appended.arguments["v"])
        projections = [found for node in nodes if (found := self._projection(node)) is not None]
        if len(projections) < 3 or len({clip for _, clip in projections}) > 1:
            return False
        bias = self._alibi(given["bias"])
        if given["bias"] is not None and bias is None:
            return False
        batch, heads, dim = given["keys"].shape[0], given["keys"].shape[1], given["keys"].shape[3]
        query = given["query"]
        tile = triton_tiles.attention_tile(
            batch * heads,
            query.shape[1] // heads,
            slots,
            dim,
            query.dtype,
            query.device,
            int8=isinstance(ring, Int8Ring),
        )
        with self.graph.inserting_before(out):
            arrived, starts = self._counters(batch * heads), self._starts(self.cache._list_of(ring))
            fused = self.graph.call_function(
                launch.attended,
                (
                    *(node for node, _ in projections),
                    ring_nodes,
                    self.recorded.inputs[id(self.recorded.given[1])],
                    starts,
                    arrived,
                    tables,
                    head_norms,
                    bias,
                    dim,
                    self.sinks,
                    given["scale"],
                    projections[0][1],
                    tuple(tile),
                ),
            )
            heads_apart = self.graph.call_method("unflatten", (fused, -1, (-1, dim)))
            read = self.graph.call_method("transpose", (heads_apart, 1, 2))
        self.recorded.replace(out, read)
        self.recorded.erase(call)
        self.recorded.erase(appended)
        return True

    def _counters(self, count: int) -> fx.Node:
        """int32 [count], 0 at the start of a step. One kernel clears those of all layers."""
        if self._cleared is None:
            layers = len(self.recorded.calls(attention.attend))
            with self.graph.inserting_before(self._first):
                self._cleared = self.graph.call_function(
                    torch.zeros, (layers * count,), {"dtype": torch.int32, "device": self.recorded.device}
                )
        self._taken += count
        return self.graph.call_method("narrow", (self._cleared, 0, self._taken - count, count))

    def _starts(self, number: int) -> fx.Node:
        """int64 [B]: the first place behind the sinks in a list of entries."""
        return self.graph.call_method("select", (self.recorded.inputs[id(self.recorded.given[3])], 0, number))

    def _unrotated(self, tensor: Tensor) -> tuple[fx.Node, tuple[NotedCall, str] | None] | None:
        """The node before a rotation, and the rotation; the node itself and None where it does not rotate."""
        call = self.recorded.of_result.get(id(tensor))
        if call is None or call.function is not rotary._rotate:
            node = self.recorded.node(tensor)
            return None if node is None else (node, None)
        found = self.rotations.get(id(call.arguments["table"]))
        node = self.recorded.node(call.arguments["x"])
        return None if found is None or node is None else (node, found)

    def _rope_tables(self, call: NotedCall, slots: int, number: int) -> Tables:
        """The nodes of the six tables that a rotation needs: from one kernel, or as they were recorded."""
        if id(call) in self._tables:
            return self._tables[id(call)]
        rope, step, result = call.arguments["rope"], call.arguments["step"], call.result
        first = call.nodes[0]
        if rope.float32_angles:
            sink_query = result.sink_query or result.query
            pairs = [result.query, sink_query, result.new_key]
            nodes: Tables = [self.recorded.node(table) for pair in pairs for table in pair]
        else:
            frequencies = rope.frequencies(step.rope_length).to(self.recorded.device, torch.float64)
            places = (self.recorded.inputs[id(tensor)] for tensor in self.recorded.given[1:3])
            with self.graph.inserting_before(first):
                starts = self._starts(number)
                made = self.graph.call_function(
                    launch.rope_tables,
                    (
                        *places,
                        starts,
                        self.recorded.constant(frequencies),
                        rope.attention_factor,
                        self.sinks,
                        slots,
                    ),
                )
                nodes = [self.graph.call_function(item, (made, place)) for place in range(6)]
        self._tables[id(call)] = nodes
        return nodes

    def _projection(self, node: fx.Node | None) -> tuple[fx.Node, float | None] | None:
        """[B, H, 1, D] -> what it is a view of, [B, 1, H · D], and the limit that it was clamped to."""
        if node is None or node.op != "call_method" or node.target != "transpose" or node.args[1:] != (1, 2):
            return None
        apart = node.args[0]
        if not isinstance(apart, fx.Node) or apart.op != "call_method" or apart.target != "unflatten":
            return None
        flat = apart.args[0]
        assert isinstance(flat, fx.Node)
        if flat.op == "call_method" and flat.target == "clamp" and len(flat.args) == 3 and not flat.kwargs:
            x, low, high = flat.args
            if isinstance(x, fx.Node) and isinstance(high, float) and low == -high:
                return x, high
        return flat, None

    def _alibi(self, bias: Tensor | None) -> tuple[fx.Node, float] | None:
        """The slopes and their factor."""
        call = self.recorded.of_result.get(id(bias))
        if call is None or call.function is not alibi.position_bias:
            return None
        given = call.arguments
        if given["alibi"].bfloat16_ranks:
            return None
        key = id(call)
        if key not in self._slopes:
            with self.graph.inserting_before(call.nodes[0]):
                self._slopes[key] = self.recorded.constant(given["alibi"].slopes().to(self.recorded.device))
        return self._slopes[key], given["scale"]
