"""Rules for products: the norm before and bias, activation, gate and residual after them join their kernel.

With many rows (above `triton_tiles.MAX_MATVEC_ROWS`), products stay cuBLAS's, and the rest is fused around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from streamllm.compiled import fusion, triton_tiles
from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled.triton_graph import Recorded, is_method, item, only_user
from streamllm.compiled.triton_support import DTYPES
from streamllm.models import base, linear

NOTED = (base.RMSNorm.forward, base._gelu_fast, base._quick_gelu, linear.quantized_kernel)
ACTIVATIONS: dict[Any, int] = {F.silu: kernels.SILU, F.relu: kernels.RELU}
ACTIVATION_CALLS = {base._gelu_fast: kernels.GELU_FAST, base._quick_gelu: kernels.QUICK_GELU}


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


class ProductFusion:
    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.graph = recorded, recorded.graph

    def fuse(self) -> None:
        products = self._find_products()
        for product in products:
            self._absorb_bias(product)
            self._absorb_activation(product)
        products = self._absorb_gates(products)
        if self.recorded.rows > triton_tiles.MAX_MATVEC_ROWS:
            for product in products:
                if product.scale is None:
                    self._keep_for_cublas(product)
            for group in self._groups(product for product in products if product.scale is None):
                self._join_weights(
                    group
                )  # as with one row, so that one recording does not move another's weights
            products = [product for product in products if product.scale is not None]
        products = self._join(products)
        self._fuse_sums(products)
        for product in products:
            if not self.recorded.is_replaced(product.out):
                self.recorded.replace(product.out, self._emit(product, None, product.out))
        if self.recorded.rows > 1:
            self._fuse_norms()

    def _find_products(self) -> list[_Product]:
        found = []
        for node in self.graph.find_nodes(op="call_function", target=F.linear):
            x, weight, bias = (*node.args, None)[:3]
            if self._is_weight(weight, DTYPES) and (bias is None or bias.op == "get_attr"):
                found.append(_Product(node, x, weight, None, bias))
        for call in self.recorded.calls(linear.quantized_kernel):
            given = call.arguments
            tensors = call.result, given["x"], given["weight"], given["scale"]
            out, x, weight, scale = (self.recorded.node(tensor) for tensor in tensors)
            bias = self.recorded.node(call.arguments["bias"])
            if (
                out is not None
                and x is not None
                and weight is not None
                and self._is_weight(weight, (torch.int8, torch.uint8))
                and given["scale"].dim() < 3  # the blocks of a CPU
            ):
                found.append(_Product(out, x, weight, scale, bias))
        return sorted(found, key=lambda product: self.recorded.order[product.out])

    def _is_weight(self, node: fx.Node, types: Sequence[torch.dtype]) -> bool:
        if node.op != "get_attr":
            return False
        weight = getattr(self.recorded.module, str(node.target))
        return weight.layout == torch.strided and weight.dtype in types and weight.is_contiguous()

    def _absorb_bias(self, product: _Product) -> None:
        """A bias that is added apart, because the model rounds before it."""
        user = only_user(product.out)
        if product.bias is None and user is not None and is_method(user, "add") and len(user.args) == 2:
            other = user.args[1]
            if not isinstance(other, fx.Node) or other.op != "get_attr" or user.args[0] is not product.out:
                return
            if self.recorded.value(other).dim() == 1:
                product.bias, product.out = other, user

    def _absorb_activation(self, product: _Product) -> None:
        user = only_user(product.out)
        if user is not None and user.op == "call_function":
            if user.target in ACTIVATIONS:
                product.activation, product.out = ACTIVATIONS[user.target], user
            elif user.target is F.gelu:
                tanh = user.kwargs.get("approximate") == "tanh"
                product.activation, product.out = (kernels.GELU_TANH if tanh else kernels.GELU), user
        for function, number in ACTIVATION_CALLS.items():
            for call in self.recorded.calls(function):
                if self.recorded.node(call.arguments["x"]) is product.out and set(product.out.users) <= set(
                    call.nodes
                ):
                    out = self.recorded.node(call.result)
                    if out is not None:
                        product.activation, product.out = number, out

    def _absorb_gates(self, products: Iterable[_Product]) -> list[_Product]:
        """activation(gate) · up, two products of one input, become one."""
        by_out = {product.out: product for product in products}
        for gate in list(by_out.values()):
            user = only_user(gate.out)
            if (
                user is None
                or not is_method(user, "mul")
                or len(user.args) != 2
                or gate.activation == kernels.NONE
            ):
                continue
            other = user.args[1] if user.args[0] is gate.out else user.args[0]
            up = by_out.get(other) if isinstance(other, fx.Node) else None
            if up is None or up.activation != kernels.NONE or only_user(up.out) is None or up.x is not gate.x:
                continue
            alike = all(
                (one is None) == (two is None) for one, two in ((up.scale, gate.scale), (up.bias, gate.bias))
            )
            if alike and self._weight(up).shape == self._weight(gate).shape:
                del by_out[up.out], by_out[gate.out]
                gate.up, gate.out = up, user
                by_out[user] = gate
                if gate.scale is None:  # joined once: recordings of chunks and of many rows read them as one
                    self._join_weights([gate, up])
        return sorted(by_out.values(), key=lambda product: self.recorded.order[product.out])

    def _keep_for_cublas(self, product: _Product) -> None:
        """Leave the product to cuBLAS, with its bias; only the gate becomes a kernel."""
        for one in (product, product.up):
            if one is None or one.bias is None or one.product.args[2:3] == (one.bias,):
                continue
            user = only_user(one.product)
            assert user is not None  # it adds the bias
            with self.graph.inserting_before(one.product):
                one.product.args = (*one.product.args[:2], self.recorded.again(one.bias))
            user.replace_all_uses_with(one.product)
        if product.up is not None:
            with self.graph.inserting_before(product.out):
                gated = self.graph.call_function(
                    launch.gated, (product.product, product.up.product, product.activation)
                )
            self.recorded.replace(product.out, gated)

    def _join(self, products: Iterable[_Product]) -> list[_Product]:
        """Products of one input become one, such as queries, keys and values. Their outputs become parts of its."""
        joined = []
        for group in self._groups(products):
            if len(group) == 1:
                joined += group
                continue
            weights = [self._weight(product) for product in group]
            weight = self._join_weights(group)
            first = group[0].product
            with self.graph.inserting_before(first):
                scale, bias = self._joined(group, "scale"), self._joined(group, "bias")
                one = _Product(first, group[0].x, self.recorded.constant(weight), scale, bias)
            whole = self._emit(one, None, first)
            start = 0
            for product, part in zip(group, weights, strict=True):
                with self.graph.inserting_before(first):
                    output = self.graph.call_method("narrow", (whole, -1, start, len(part)))
                self.recorded.replace(product.out, output)
                start += len(part)
        return sorted(joined, key=lambda product: self.recorded.order[product.out])

    def _groups(self, products: Iterable[_Product]) -> list[list[_Product]]:
        """Products that become one, in groups: of one input, with nothing after them."""
        groups: dict[Any, list[_Product]] = {}
        for product in products:
            plain = product.activation == kernels.NONE and product.up is None
            dtype = self._weight(product).dtype  # that of a quantised weight, too
            key = product.x, dtype, product.bias is None, None if plain else product.out
            groups.setdefault(key, []).append(product)
        made: list[list[_Product]] = []
        for group in groups.values():
            weights = {id(self._weight(product)) for product in group}
            made += [group] if len(weights) == len(group) else [[product] for product in group]
        return made

    def _join_weights(self, group: Sequence[_Product]) -> Tensor:
        """The weights of a group in one tensor. Its biases become one, too."""
        with torch.no_grad():
            if len(group) > 1 and group[0].bias is not None:
                fusion.join(
                    [self.recorded.value(product.bias) for product in group if product.bias], by_columns=False
                )
            return fusion.join([self._weight(product) for product in group], by_columns=False)

    def _joined(self, group: Sequence[_Product], name: str) -> fx.Node | None:
        """The scales or biases of all, in one tensor; None where they have none."""
        found = [getattr(product, name) for product in group]
        if found[0] is None:
            return None
        tensors = [self.recorded.value(node) for node in found]
        with torch.no_grad():
            return self.recorded.constant(fusion.join(tensors, by_columns=False))

    def _fuse_sums(self, products: Iterable[_Product]) -> None:
        """Sums of products and other terms: each product adds the sum of what comes before it."""
        by_out = {product.out: product for product in products}
        sums = [node for node in self.recorded.order if not node._erased and self._is_sum(node)]
        for root in sums:
            user = only_user(root)
            if user is not None and self._is_sum(user):
                continue
            terms = self._terms(root)
            mine = [
                by_out[term]
                for term in terms
                if term in by_out and terms.count(term) == 1 and only_user(term) is not None
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
                    total.meta["shape"] = root.meta["shape"]
            for product in sorted(mine, key=lambda product: self.recorded.order[product.out]):
                total = self._emit(product, total, root)
                self.recorded.note_replaced(product.out, total)
            assert total is not None
            self.recorded.replace(root, total)

    def _is_sum(self, node: fx.Node) -> bool:
        if not is_method(node, "add") or len(node.args) != 2 or node.kwargs:
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
        x, norm = self.recorded.current(product.x), None
        normed = self.recorded.norm_of(product.x)
        if normed is not None and self.recorded.rows == 1:
            x, norm = self.recorded.current(normed[0]), normed[1]
        up = None if product.up is None else (product.up.weight, product.up.scale, product.up.bias)
        with self.graph.inserting_before(before):
            made = self.graph.call_function(
                launch.product,
                (x, product.weight, product.scale, product.bias, norm, up, residual, product.activation),
            )
        made.meta["shape"] = (*before.meta["shape"][:-1], len(self._weight(product)))
        return made

    def _fuse_norms(self) -> None:
        """Norms of several rows, and the sums before them."""
        nodes = [node for node in self.recorded.order if not node._erased and node.users]
        for node in nodes:
            found = self.recorded.norm_of(node)
            if found is None or node.meta["shape"][-1] != self.recorded.value(found[1][1]).shape[0]:
                continue
            x, norm = self.recorded.current(found[0]), found[1]
            if self._is_sum(x) and not x._erased:
                with self.graph.inserting_before(x):
                    weights = [self.recorded.again(weight) for weight in norm[1:3]]
                    both = self.graph.call_function(
                        launch.added_and_normalised, (*x.args, norm[0], *weights, norm[3])
                    )
                    total, normed = (self.graph.call_function(item, (both, number)) for number in range(2))
                self.recorded.replace(x, total)
            else:
                with self.graph.inserting_before(node):
                    normed = self.graph.call_function(launch.normalised, (x, *norm))
            self.recorded.replace(node, normed)

    def _weight(self, product: _Product) -> Tensor:
        return self.recorded.value(product.weight)
