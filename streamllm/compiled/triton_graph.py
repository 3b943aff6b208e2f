"""A recorded step while rules rewrite it: its graph, the calls that were noted, and what replaced what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled.recorder import NotedCall, Recorder
from streamllm.models import base

# What is normalised, and how: kind, weight, bias, eps.
NormOf = tuple[fx.Node, tuple[int, fx.Node, "fx.Node | None", float]]


class Recorded:
    """given: the tokens [B, 1], places [R], origin [1], starts [lists, B], and the tensors of the cache."""

    def __init__(self, module: fx.GraphModule, recorder: Recorder, given: Sequence[Tensor]) -> None:
        self.module, self.graph, self.recorder, self.given = module, module.graph, recorder, given
        self.rows = given[0].shape[0]  # B
        self.device = given[0].device
        inputs = self.graph.find_nodes(op="placeholder")
        self.inputs = {id(tensor): node for tensor, node in zip(given, inputs, strict=True)}
        self.order = {node: number for number, node in enumerate(self.graph.nodes)}
        self.of_result = {id(call.result): call for call in recorder.calls if call.result is not None}
        self.norms = {self.node(call.result): call for call in self.calls(base.RMSNorm.forward)}
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._constants = 0

    def calls(self, function: Callable[..., Any]) -> list[NotedCall]:
        return [call for call in self.recorder.calls if call.function is function]

    def node(self, tensor: Tensor | None) -> fx.Node | None:
        return None if tensor is None else self.recorder.node_of(tensor)

    def value(self, node: fx.Node) -> Tensor:
        """The tensor of a constant."""
        return getattr(self.module, str(node.target))  # type: ignore[no-any-return]

    def constant(self, tensor: Tensor) -> fx.Node:
        """A new constant; to be called where nodes are inserted."""
        name = f"fused_{self._constants}"
        self._constants += 1
        self.module.register_buffer(name, tensor, persistent=False)
        return self.graph.get_attr(name)

    def again(self, constant: fx.Node | None) -> fx.Node | None:
        """The same constant where nodes are inserted, which may be before it was recorded."""
        return None if constant is None else self.graph.get_attr(str(constant.target))

    def current(self, node: fx.Node) -> fx.Node:
        """What has replaced a node."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def is_replaced(self, node: fx.Node) -> bool:
        return node in self._replaced or node._erased

    def replace(self, node: fx.Node, made: fx.Node) -> None:
        node.replace_all_uses_with(made)
        self.note_replaced(node, made)

    def note_replaced(self, node: fx.Node, made: fx.Node) -> None:
        self._replaced[node] = made
        made.meta.setdefault("shape", node.meta["shape"])

    def erase(self, call: NotedCall) -> None:
        """Erase what a call has recorded, also what it wrote to its own tensors."""
        for node in reversed(call.nodes):
            if not node._erased and not node.users:
                self.graph.erase_node(node)

    def norm_of(self, node: fx.Node | None) -> NormOf | None:
        """Where the node is the result of a norm: what is normalised, and how."""
        if node is None:
            return None
        if node.op == "call_function" and node.target is F.layer_norm:
            x, shape, weight = node.args[0], node.args[1], node.kwargs.get("weight")
            bias, eps = node.kwargs.get("bias"), node.kwargs.get("eps", 1e-5)
            if (
                isinstance(x, fx.Node)
                and isinstance(weight, fx.Node)
                and isinstance(shape, tuple)
                and len(shape) == 1
            ):
                assert bias is None or isinstance(bias, fx.Node)
                assert isinstance(eps, float)
                return x, (kernels.LAYER_NORM, weight, bias, eps)
        call = self.norms.get(node)
        if call is None:
            return None
        x, weight = self.node(call.arguments["x"]), self.node(call.arguments["self"].weight)
        return (
            None
            if x is None or weight is None
            else (x, (kernels.RMS_NORM, weight, None, call.arguments["self"].eps))
        )


def item(values: Sequence[Any], number: int) -> Any:
    """One of several results, as a call of a recording."""
    return values[number]


def is_method(node: fx.Node, name: str) -> bool:
    return node.op == "call_method" and node.target == name


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
