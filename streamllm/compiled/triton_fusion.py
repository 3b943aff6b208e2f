"""Rewrites a recorded decoding step into few Triton kernels. What no rule covers stays as it was recorded.

    norm, then products of one input          one kernel
    product, then bias, activation, gate      the same kernel
    product, then + residual                  the same kernel
    clip, head norms, rotation, ring write,   one kernel
      attention over sinks and window
    the tables of the rotation                one kernel

The recorded list is flat, and attention alone has a dozen shapes in it. So the rules do not search for them: the
recorder notes the calls of `attend`, `RMSNorm.forward` and so on while it records, with arguments and results. The
rules connect these calls; the models do not know it.

With many rows (above `triton_tiles.MAX_MATVEC_ROWS`), products stay cuBLAS's, and the rest is fused around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from streamllm.cache.int8_ring import Int8Ring
from streamllm.cache.ring import LayerStore
from streamllm.compiled import fusion, triton_tiles
from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled.recorder import NotedCall, Recorder
from streamllm.models import alibi, attention, base, linear, rotary

NOTED: tuple[Callable[..., Any], ...] = (
    attention.attend,
    rotary.rotation,
    rotary._rotate,
    alibi.position_bias,
    base.RMSNorm.forward,
    base._gelu_fast,
    base._quick_gelu,
    linear.int8_kernel,
    LayerStore.append,
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {F.silu: kernels.SILU, F.relu: kernels.RELU}
ACTIVATION_CALLS = {base._gelu_fast: kernels.GELU_FAST, base._quick_gelu: kernels.QUICK_GELU}


def fuse(
    module: fx.GraphModule, recorder: Recorder, given: Sequence[Tensor], sinks: int, layers: int
) -> bool:
    """Rewrite the recording, in place. Returns whether the attention of all layers was fused: else it is of no use.

    given: the tokens [B, 1], places [R], origin [1] and the cache's tensors that were recorded. sinks: the cache's.
    """
    rewriter = _Rewriter(module, recorder, given, sinks)
    if rewriter.fuse_attention() < layers:
        return False
    rewriter.fuse_products()
    fusion.prune(module)
    return True


@dataclass(eq=False)
class _Product:
    """A product and what follows it, to become one kernel."""

    product: fx.Node
    x: fx.Node
    weight: fx.Node
    scale: fx.Node | None
    bias: fx.Node | None
    activation: int = kernels.NONE
    up: _Product | None = None

    def __post_init__(self) -> None:
        self.out = self.product  # the node that the kernel replaces


class _Rewriter:
    def __init__(
        self, module: fx.GraphModule, recorder: Recorder, given: Sequence[Tensor], sinks: int
    ) -> None:
        self.module, self.graph, self.recorder = module, module.graph, recorder
        self.given, self.sinks = given, sinks
        self.rows = given[0].shape[0]  # B
        inputs = self.graph.find_nodes(op="placeholder")
        self.inputs = {id(tensor): node for tensor, node in zip(given, inputs, strict=True)}
        self.order = {node: number for number, node in enumerate(self.graph.nodes)}
        self.of_result = {id(call.result): call for call in recorder.calls if call.result is not None}
        self.rotations: dict[int, tuple[NotedCall, str]] = {}  # by a table's id: of which call, which table
        for call in self._calls(rotary.rotation):
            for name in ("query", "sink_query", "new_key"):
                self.rotations.setdefault(id(getattr(call.result, name)), (call, name))
        self._slopes: dict[int, fx.Node] = {}  # by a position_bias call's id
        self._tables: dict[int, list[fx.Node]] = {}  # by a rotation call's id
        self.norms = {self._node(call.result): call for call in self._calls(base.RMSNorm.forward)}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self._constants = 0
        self._first = next(node for node in self.graph.nodes if node.op == "call_function")
        self._cleared: fx.Node | None = None
        self._taken = 0

    # Attention

    def fuse_attention(self) -> int:
        """Attention of every layer, with what comes between the projections and it."""
        calls = self._calls(attention.attend)
        done = [call for call in calls if self._fuse_attend(call)]
        fusion.prune(self.module)
        self._erase_if_unused(alibi.position_bias)  # it writes to a tensor of its own
        return len(done)

    def _fuse_attend(self, call: NotedCall) -> bool:
        given = call.arguments
        appended = next(
            (
                other
                for other in self._calls(LayerStore.append)
                if other.result and other.result[0] is given["keys"]
            ),
            None,
        )
        out = self._node(call.result)
        if appended is None or out is None or appended.result[1] is not given["values"]:
            return False
        ring = appended.arguments["self"].ring
        ring_nodes = [self.inputs.get(id(tensor)) for tensor in ring.tensors.values()]
        slots = next(iter(ring.tensors.values())).shape[-2] + (
            ring.numbers.shape[3] if isinstance(ring, Int8Ring) else 0
        )
        if None in ring_nodes or given["keys"].shape[2] != slots:
            return False
        before = self._unrotated(given["query"]), self._unrotated(appended.arguments["k"])
        if before[0] is None or before[1] is None:
            return False
        (q, table), (k, key_table) = before
        tables: list[fx.Node] = []
        if table is not None or key_table is not None:
            if table is None or key_table is None or table[1] != "query":
                return False
            if table[0] is not key_table[0] or key_table[1] not in ("new_key", "query"):
                return False
            if self.sinks and given["sink_query"] is None:
                return False
            tables = self._rope_tables(table[0], slots)
        q_norm, k_norm = self._norm_of(q), self._norm_of(k)
        if (q_norm is None) != (k_norm is None):
            return False
        head_norms = None
        if q_norm is not None and k_norm is not None:
            if kernels.LAYER_NORM in (q_norm[1][0], k_norm[1][0]):
                return False
            q, k = q_norm[0], k_norm[0]
            head_norms = (q_norm[1][1], k_norm[1][1], q_norm[1][3], k_norm[1][3])
        projections = [self._projection(node) for node in (q, k, self._node(appended.arguments["v"]))]
        if None in projections or len({clip for _, clip in projections if projections}) > 1:
            return False
        bias = self._alibi(given["bias"])
        if given["bias"] is not None and bias is None:
            return False
        batch, heads, dim = given["keys"].shape[0], given["keys"].shape[1], given["keys"].shape[3]
        query = given["query"]
        tile = triton_tiles.attention_tile(
            batch * heads, query.shape[1] // heads, slots, dim, query.dtype, query.device
        )
        with self.graph.inserting_before(out):
            arrived = self._counters(batch * heads)
            fused = self.graph.call_function(
                launch.attended,
                (
                    *(node for node, _ in projections),
                    ring_nodes,
                    self.inputs[id(self.given[1])],
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
        self._shaped(read, out)
        out.replace_all_uses_with(read)
        self._erase(call)
        self._erase(appended)
        return True

    def _counters(self, count: int) -> fx.Node:
        """int32 [count], 0 at the start of a step. One kernel clears those of all layers."""
        if self._cleared is None:
            layers = len(self._calls(attention.attend))
            with self.graph.inserting_before(self._first):
                self._cleared = self.graph.call_function(
                    torch.zeros, (layers * count,), {"dtype": torch.int32, "device": self.given[0].device}
                )
        self._taken += count
        return self.graph.call_method("narrow", (self._cleared, 0, self._taken - count, count))

    def _unrotated(self, tensor: Tensor) -> tuple[fx.Node, tuple[NotedCall, str] | None] | None:
        """The node before a rotation, and the rotation; the node itself and None where it does not rotate."""
        call = self.of_result.get(id(tensor))
        if call is None or call.function is not rotary._rotate:
            node = self._node(tensor)
            return None if node is None else (node, None)
        found = self.rotations.get(id(call.arguments["table"]))
        node = self._node(call.arguments["x"])
        return None if found is None or node is None else (node, found)

    def _rope_tables(self, call: NotedCall, slots: int) -> list[fx.Node]:
        """The nodes of the six tables that a rotation needs: from one kernel, or as they were recorded."""
        if id(call) in self._tables:
            return self._tables[id(call)]
        rope, step, result = call.arguments["rope"], call.arguments["step"], call.result
        first = call.nodes[0]
        if rope.float32_angles:
            sink_query = result.sink_query or result.query
            pairs = [result.query, sink_query, result.new_key]
            nodes = [self._node(table) for pair in pairs for table in pair]
        else:
            frequencies = rope.frequencies(step.rope_length).to(self.given[0].device, torch.float64)
            with self.graph.inserting_before(first):
                made = self.graph.call_function(
                    launch.rope_tables,
                    (self.inputs[id(self.given[1])], self.inputs[id(self.given[2])], self._constant(frequencies),
                     rope.attention_factor, self.sinks, slots),
                )  # fmt: skip
                nodes = [self.graph.call_function(_item, (made, number)) for number in range(6)]
        self._tables[id(call)] = nodes  # type: ignore[assignment]
        return nodes  # type: ignore[return-value]

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
        call = self.of_result.get(id(bias))
        if call is None or call.function is not alibi.position_bias:
            return None
        given = call.arguments
        if given["alibi"].bfloat16_ranks:
            return None
        key = id(call)
        if key not in self._slopes:
            with self.graph.inserting_before(call.nodes[0]):
                self._slopes[key] = self._constant(given["alibi"].slopes().to(self.given[0].device))
        return self._slopes[key], given["scale"]

    # Products

    def fuse_products(self) -> None:
        products = self._find_products()
        for product in products:
            self._absorb_bias(product)
            self._absorb_activation(product)
        products = self._absorb_gates(products)
        if self.rows > triton_tiles.MAX_MATVEC_ROWS:
            for product in products:
                if product.scale is None:
                    self._keep_for_cublas(product)
            products = [product for product in products if product.scale is not None]
        products = self._join(products)
        self._fuse_sums(products)
        for product in products:
            if not product.out._erased and product.out not in self.replaced:
                self._replace(product.out, self._emit(product, None, product.out))
        if self.rows > 1:
            self._fuse_norms()

    def _find_products(self) -> list[_Product]:
        found = []
        for node in self.graph.find_nodes(op="call_function", target=F.linear):
            x, weight, bias = (*node.args, None)[:3]
            if self._is_weight(weight, FLOATS) and (bias is None or bias.op == "get_attr"):
                found.append(_Product(node, x, weight, None, bias))
        for call in self._calls(linear.int8_kernel):
            out, x, weight, scale = (
                self._node(tensor) for tensor in (call.result, *(call.arguments[name] for name in ("x", "weight", "scale")))
            )  # fmt: skip
            bias = self._node(call.arguments["bias"])
            if (
                out is not None
                and x is not None
                and weight is not None
                and self._is_weight(weight, (torch.int8,))
            ):
                found.append(_Product(out, x, weight, scale, bias))
        return sorted(found, key=lambda product: self.order[product.out])

    def _is_weight(self, node: fx.Node, types: Sequence[torch.dtype]) -> bool:
        if node.op != "get_attr":
            return False
        weight = getattr(self.module, str(node.target))
        return weight.layout == torch.strided and weight.dtype in types and weight.is_contiguous()

    def _absorb_bias(self, product: _Product) -> None:
        """A bias that is added apart, because the model rounds before it."""
        user = _only_user(product.out)
        if product.bias is None and user is not None and _is_method(user, "add") and len(user.args) == 2:
            other = user.args[1]
            if isinstance(other, fx.Node) and other.op == "get_attr" and user.args[0] is product.out:
                if getattr(self.module, str(other.target)).dim() == 1:
                    product.bias, product.out = other, user

    def _absorb_activation(self, product: _Product) -> None:
        user = _only_user(product.out)
        if user is not None and user.op == "call_function":
            if user.target in ACTIVATIONS:
                product.activation, product.out = ACTIVATIONS[user.target], user
            elif user.target is F.gelu:
                tanh = user.kwargs.get("approximate") == "tanh"
                product.activation, product.out = (kernels.GELU_TANH if tanh else kernels.GELU), user
        for function, number in ACTIVATION_CALLS.items():
            for call in self._calls(function):
                if self._node(call.arguments["x"]) is product.out and set(product.out.users) <= set(
                    call.nodes
                ):
                    out = self._node(call.result)
                    if out is not None:
                        product.activation, product.out = number, out

    def _absorb_gates(self, products: Iterable[_Product]) -> list[_Product]:
        """activation(gate) · up, two products of one input, become one."""
        by_out = {product.out: product for product in products}
        for gate in list(by_out.values()):
            user = _only_user(gate.out)
            if (
                user is None
                or not _is_method(user, "mul")
                or len(user.args) != 2
                or gate.activation == kernels.NONE
            ):
                continue
            other = user.args[1] if user.args[0] is gate.out else user.args[0]
            up = by_out.get(other) if isinstance(other, fx.Node) else None
            if (
                up is None
                or up.activation != kernels.NONE
                or _only_user(up.out) is None
                or up.x is not gate.x
            ):
                continue
            alike = all(
                (one is None) == (two is None) for one, two in ((up.scale, gate.scale), (up.bias, gate.bias))
            )
            if alike and self._weight(up).shape == self._weight(gate).shape:
                del by_out[up.out], by_out[gate.out]
                gate.up, gate.out = up, user
                by_out[user] = gate
        return sorted(by_out.values(), key=lambda product: self.order[product.out])

    def _keep_for_cublas(self, product: _Product) -> None:
        """Leave the product to cuBLAS, with its bias; only the gate becomes a kernel."""
        for one in (product, product.up):
            if one is None or one.bias is None or one.product.args[2:3] == (one.bias,):
                continue
            user = _only_user(one.product)
            assert user is not None  # it adds the bias
            with self.graph.inserting_before(one.product):
                one.product.args = (*one.product.args[:2], self._again(one.bias))
            user.replace_all_uses_with(one.product)
        if product.up is not None:
            with self.graph.inserting_before(product.out):
                gated = self.graph.call_function(
                    launch.gated, (product.product, product.up.product, product.activation)
                )
            self._replace(product.out, gated)

    def _join(self, products: Iterable[_Product]) -> list[_Product]:
        """Products of one input become one, such as queries, keys and values. Their outputs become parts of its."""
        groups: dict[Any, list[_Product]] = {}
        for product in products:
            plain = product.activation == kernels.NONE and product.up is None
            groups.setdefault(
                (product.x, product.scale is None, product.bias is None, None if plain else product.out), []
            ).append(product)
        joined = []
        for group in groups.values():
            weights = [self._weight(product) for product in group]
            if len(group) == 1 or len({id(weight) for weight in weights}) < len(group):
                joined += group
                continue
            with torch.no_grad():
                weight = fusion.join(weights, by_columns=False)
            first = group[0].product
            with self.graph.inserting_before(first):
                one = _Product(first, group[0].x, self._constant(weight), *(
                    None if getattr(group[0], name) is None
                    else self._constant(torch.cat([self._value(getattr(product, name)) for product in group]))
                    for name in ("scale", "bias")
                ))  # fmt: skip
            whole = self._emit(one, None, first)
            start = 0
            for product, part in zip(group, weights, strict=True):
                with self.graph.inserting_before(first):
                    output = self.graph.call_method("narrow", (whole, -1, start, len(part)))
                self._replace(product.out, output)
                start += len(part)
        return sorted(joined, key=lambda product: self.order[product.out])

    def _fuse_sums(self, products: Iterable[_Product]) -> None:
        """Sums of products and other terms: each product adds the sum of what comes before it."""
        by_out = {product.out: product for product in products}
        sums = [node for node in self.order if not node._erased and self._is_sum(node)]
        for root in sums:
            user = _only_user(root)
            if user is not None and self._is_sum(user):
                continue
            terms = self._terms(root)
            mine = [
                by_out[term]
                for term in terms
                if term in by_out and terms.count(term) == 1 and _only_user(term) is not None
            ]
            if not mine:
                continue
            outs = {product.out for product in mine}
            rest = [term for term in terms if term not in outs]
            with self.graph.inserting_before(root):
                total = rest[0] if rest else None
                for term in rest[1:]:
                    assert total is not None
                    total = self.graph.call_method("add", (total, term))
                    self._shaped(total, root)
            for product in sorted(mine, key=lambda product: self.order[product.out]):
                total = self._emit(product, total, root)
                self.replaced[product.out] = total
            assert total is not None
            self._replace(root, total)

    def _is_sum(self, node: fx.Node) -> bool:
        if not _is_method(node, "add") or len(node.args) != 2 or node.kwargs:
            return False
        shapes = {
            term.meta.get("shape") if isinstance(term, fx.Node) else None for term in (*node.args, node)
        }
        return len(shapes) == 1 and None not in shapes

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        terms: list[fx.Node] = []
        for term in node.args:
            assert isinstance(term, fx.Node)
            terms += self._terms(term) if self._is_sum(term) and len(term.users) == 1 else [term]
        return terms

    def _emit(self, product: _Product, residual: fx.Node | None, before: fx.Node) -> fx.Node:
        """The node of one kernel."""
        x, norm = self._current(product.x), None
        normed = self._norm_of(product.x)
        if normed is not None and self.rows == 1:
            x, norm = self._current(normed[0]), normed[1]
        up = None if product.up is None else (product.up.weight, product.up.scale, product.up.bias)
        with self.graph.inserting_before(before):
            made = self.graph.call_function(
                launch.product,
                (x, product.weight, product.scale, product.bias, norm, up, residual, product.activation),
            )
        made.meta["shape"] = (*before.meta["shape"][:-1], len(self._weight(product)))
        return made

    # Norms

    def _norm_of(self, node: fx.Node | None) -> tuple[fx.Node, tuple[Any, ...]] | None:
        """What is normalised, and how, where the node is the result of a norm."""
        if node is None:
            return None
        if node.op == "call_function" and node.target is F.layer_norm:
            x, shape = node.args[:2]
            weight, bias = node.kwargs.get("weight"), node.kwargs.get("bias")
            if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and len(shape) == 1:  # type: ignore[arg-type]
                return x, (kernels.LAYER_NORM, weight, bias, node.kwargs.get("eps", 1e-5))
        call = self.norms.get(node)
        if call is None:
            return None
        x, weight = self._node(call.arguments["x"]), self._node(call.arguments["self"].weight)
        if x is None or weight is None:
            return None
        return x, (kernels.RMS_NORM, weight, None, call.arguments["self"].eps)

    def _fuse_norms(self) -> None:
        """Norms of several rows, and the sums before them."""
        nodes = [node for node in self.order if not node._erased and node.users]
        for node in nodes:
            found = self._norm_of(node)
            if found is None or node.meta["shape"][-1] != self._value(found[1][1]).shape[0]:
                continue
            x, norm = self._current(found[0]), found[1]
            if self._is_sum(x) and not x._erased:
                with self.graph.inserting_before(x):
                    weights = [self._again(weight) for weight in norm[1:3]]
                    both = self.graph.call_function(
                        launch.added_and_normalised, (*x.args, norm[0], *weights, norm[3])
                    )
                    total, normed = (self.graph.call_function(_item, (both, number)) for number in range(2))
                self._shaped(total, x)
                self._replace(x, total)
            else:
                with self.graph.inserting_before(node):
                    normed = self.graph.call_function(launch.normalised, (x, *norm))
            self._shaped(normed, node)
            self._replace(node, normed)

    # The graph

    def _calls(self, function: Callable[..., Any]) -> list[NotedCall]:
        return [call for call in self.recorder.calls if call.function is function]

    def _node(self, tensor: Tensor | None) -> fx.Node | None:
        return None if tensor is None else self.recorder.node_of(tensor)

    def _value(self, node: fx.Node) -> Tensor:
        return getattr(self.module, str(node.target))  # type: ignore[no-any-return]

    def _weight(self, product: _Product) -> Tensor:
        return self._value(product.weight)

    def _constant(self, tensor: Tensor) -> fx.Node:
        """A new constant; to be called where nodes are inserted."""
        name = f"fused_{self._constants}"
        self._constants += 1
        self.module.register_buffer(name, tensor, persistent=False)
        return self.graph.get_attr(name)

    def _again(self, constant: fx.Node | None) -> fx.Node | None:
        """The same constant where nodes are inserted, which may be before it was recorded."""
        return None if constant is None else self.graph.get_attr(str(constant.target))

    def _shaped(self, made: fx.Node, like: fx.Node) -> None:
        made.meta["shape"] = like.meta["shape"]

    def _current(self, node: fx.Node) -> fx.Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        node.replace_all_uses_with(made)
        self.replaced[node] = made

    def _erase(self, call: NotedCall) -> None:
        """Erase what a call has recorded, also what it wrote to its own tensors."""
        for node in reversed(call.nodes):
            if not node._erased and not node.users:
                self.graph.erase_node(node)

    def _erase_if_unused(self, function: Callable[..., Any]) -> None:
        for call in self._calls(function):
            out = self._node(call.result)
            if out is not None and not out._erased and not out.users:
                self._erase(call)


def _item(values: Sequence[Any], number: int) -> Any:
    return values[number]


def _is_method(node: fx.Node, name: str) -> bool:
    return node.op == "call_method" and node.target == name


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
