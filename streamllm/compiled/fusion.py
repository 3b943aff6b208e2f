"""Makes a recording shorter: products of one input become one, unused nodes go, weights are looked up once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from streamllm.compiled.recorder import Recorded, changes
from streamllm.models.torch_private import linear_pointwise


def flat_function(module: Recorded, joined_only: bool = False) -> Callable[..., Any]:
    """The recording as one plain function, kernel by kernel. Looking up a weight in a module takes 0.3 us each.

    joined_only: make one product only of those whose weights lie in one tensor already.
    """
    prune(module)
    _fuse_linears(module, joined_only)
    _share_rolls(module.graph)
    constants = {node.target: getattr(module, node.target) for node in module.graph.find_nodes(op="get_attr")}
    return module.function(SimpleNamespace(**constants))


def _fuse_linears(module: fx.GraphModule, joined_only: bool) -> None:
    """Linear layers with the same input become one. Their weights and biases become views of its own: no copy
    stays, and what changes them later changes it, too.
    """
    graph = module.graph
    groups: dict[Any, list[Any]] = {}
    candidates: list[Any] = list(graph.nodes)
    for node in candidates:
        if node.op == "call_function" and node.target in (F.linear, linear_pointwise):
            x, weight, bias = node.args[:3]
            if weight.op == "get_attr" and (bias is None or bias.op == "get_attr"):
                found = getattr(module, weight.target)
                by_columns = _by_columns(found)
                if by_columns is not None:
                    storage = found.untyped_storage().data_ptr() if joined_only else 0
                    groups.setdefault((x, node.target, by_columns, bias is None, storage), []).append(node)
    for number, ((x, kernel, by_columns, *_), nodes) in enumerate(groups.items()):
        weights = [getattr(module, node.args[1].target) for node in nodes]
        biases = [node.args[2] and getattr(module, node.args[2].target) for node in nodes]
        if len(nodes) == 1 or len({id(weight) for weight in weights}) < len(nodes):
            continue
        with torch.no_grad():
            weight = join(weights, by_columns)
            bias = None if biases[0] is None else join(biases, False)
        module.register_buffer(f"weight_{number}", weight)
        module.register_buffer(f"bias_{number}", bias)
        with graph.inserting_before(nodes[0]):
            added = None if bias is None else graph.get_attr(f"bias_{number}")
            product = graph.call_function(
                kernel, (x, graph.get_attr(f"weight_{number}"), added, *nodes[0].args[3:])
            )
            ends = list(accumulate(len(weight) for weight in weights))
            outputs = [
                graph.call_method("narrow", (product, -1, end - len(weight), len(weight)))
                for end, weight in zip(ends, weights, strict=True)
            ]
        for node, output in zip(nodes, outputs, strict=True):
            node.replace_all_uses_with(output)
            graph.erase_node(node)
    for node in reversed(graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)


def _by_columns(weight: Tensor) -> bool | None:
    """Whether a weight [out, in] is stored [in, out]; None where it is packed and cannot be joined."""
    if weight.layout != torch.strided or not weight.is_floating_point():
        return None
    return weight.stride(0) == 1 and weight.stride(1) != 1


def _share_rolls(graph: fx.Graph) -> None:
    """A query that is rotated to two places is rolled once."""
    first: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_method", target="roll"):
        same = first.setdefault(node.args, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def join(weights: Sequence[Tensor], by_columns: bool) -> Tensor:
    """[out, in] each -> [sum of out, in], or biases [out] each -> [sum]; each becomes a view of it."""
    # As the weights were made: else they could not be trained afterwards.
    with torch.inference_mode(any(weight.is_inference() for weight in weights)), torch.no_grad():
        return _joined(weights, by_columns)


def _joined(weights: Sequence[Tensor], by_columns: bool) -> Tensor:
    sizes = [len(weight) for weight in weights]
    shape, stride = (sum(sizes), *weights[0].shape[1:]), weights[0].stride()
    if all(
        weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr() for weight in weights
    ):
        joined = weights[0].as_strided(shape, stride)  # an earlier recording may have joined them
        parts = zip(weights, torch.split(joined, sizes), strict=True)
        if all(weight.data_ptr() == part.data_ptr() and weight.stride() == stride for weight, part in parts):
            return joined
    joined = torch.cat([weight.t() for weight in weights], 1).t() if by_columns else torch.cat(list(weights))
    for weight, part in zip(weights, torch.split(joined, sizes), strict=True):
        weight.data = part
    return joined


def prune(module: fx.GraphModule) -> None:
    """Drop unused nodes, such as the places of keys without ALiBi."""
    for node in reversed(module.graph.nodes):
        called = node.op in ("call_method", "call_function")
        if called and not node.users and not changes(node.target):
            module.graph.erase_node(node)
    module.recompile()
