"""A recorded step as dot products, which torch's inductor makes one C++ function of: every weight is read once.

A row times a matrix, one query against the keys, one row of attention against the values: for a single token
all of it is sums over the last axis. Written so, inductor turns a whole forward into one function of plain
loops, without calls between, that read weights and cache as fast as memory gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from streamllm import aot
from streamllm.cache import dequantized
from streamllm.models import layers

# Rows of queries up to which keys are read as dot products: for each row once more, from the processor's cache.
FEW = 16
# A sum waits for the one before it: so many side by side, of as many outputs, hide that. By bytes of a weight,
# as measured; else 1.
SIDE_BY_SIDE = {1: 2, 2: 2}
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add in one
    "size_asserts": False,  # the recording was looked up by its sizes
    "alignment_asserts": False,
    "aot_inductor.allow_stack_allocation": True,  # what is made on the way is small, and of fixed size
    "aot_inductor.precompile_headers": False,  # hundreds of megabytes, for one or two compilations
    "compile_threads": 1,  # it is one function: no pool of processes
}


def compiled(module: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The recorded function for a CPU, compiled for tensors like those given; needs a C++ compiler."""
    as_dots(module, given)
    constants = _constants_as_inputs(module)
    options = {**OPTIONS, "cpp.threads": torch.get_num_threads()}
    library = aot.library(module, [*given, *constants], options)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return library([*given, *constants])

    return run


def as_dots(module: fx.GraphModule, given: Sequence[Tensor]) -> None:
    """Replace the kernels of products by functions that say them as sums."""
    _make_once(module.graph, given)
    nodes: list[Any] = list(module.graph.nodes)
    for node in nodes:
        if node.op == "call_method" and node.target in _AS_FUNCTIONS:
            node.op, node.target = "call_function", _AS_FUNCTIONS[node.target]
        if node.op == "call_function" and node.target in _AS_DOTS:
            node.target = _AS_DOTS[node.target]
    module.recompile()


def _make_once(graph: fx.Graph, given: Sequence[Tensor]) -> None:
    """What follows from places alone, such as a rotation, is the same in all layers: it is kept for them.

    Else inductor computes it again wherever it is read: cosines for every head of every layer.
    """
    nodes: list[Any] = list(graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    inputs = graph.find_nodes(op="placeholder")
    of_places = {
        node for node, tensor in zip(inputs[1:], given[1:], strict=True) if tensor.dtype == torch.int64
    }
    for node in nodes:
        read = node.all_input_nodes
        made = node.op == "call_function" and not read  # from nothing: 0, 1, 2 …
        of_them = any(of in of_places for of in read)
        if made or (of_them and all(of in of_places or of.op == "get_attr" for of in read)):
            of_places.add(node)
    for node in nodes:
        outside = [user for user in node.users if user not in of_places]
        if node in of_places and node.op != "placeholder" and outside:
            first = min(outside, key=order.__getitem__)
            if any(changes(user.target) and order[user] >= order[first] for user in node.users):
                continue  # it is not yet what others will read
            with graph.inserting_before(first):
                kept = graph.call_function(_made, (node,))
            for user in outside:
                user.replace_input_with(node, kept)


def changes(function: Any) -> bool:
    """Whether a call in a recording, by name or as a function, writes to what it is given."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "_")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _constants_as_inputs(module: fx.GraphModule) -> list[Tensor]:
    """Weights are handed over with each call, behind what is given: they are not looked into, nor copied."""
    graph = module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    constants = []
    for node in graph.find_nodes(op="get_attr"):
        constants.append(getattr(module, node.target))
        with graph.inserting_after(last):
            last = graph.placeholder(node.target)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    module.recompile()
    return constants


# What stands in the graph instead of a kernel. Sizes are known when inductor runs these, once.


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *more: Any) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if rows > 1:
        return F.linear(x, weight, bias)
    product = _row_times(x, weight)
    if bias is not None:
        product = product + bias
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if len(x) > 1:
        return torch._weight_int8pack_mm(x, weight, scale)
    return (_row_times(x, weight) * scale).to(x.dtype).view(1, -1)


def _row_times(x: Tensor, weight: Tensor) -> Tensor:
    """One row and a weight [out, in] -> [out], in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype == torch.int8:  # widened once: for each output again, it takes as long as its weights
        x = x.to(wide)
    row = _made(x).view(1, -1).to(wide)
    parts = SIDE_BY_SIDE.get(weight.itemsize, 1)
    if len(weight) % parts:  # only loops of one length run side by side
        parts = 1
    sums = [(row * part.to(wide)).sum(-1) for part in weight.chunk(parts)]
    return sums[0] if parts == 1 else torch.cat(sums)


def _matmul(a: Tensor | _Quantized, b: Tensor | _Quantized) -> Tensor:
    if isinstance(a, _Quantized):  # keys and a query in their columns; else the query comes first
        return _matmul(b.transpose(-1, -2), a.transpose(-1, -2)).transpose(-1, -2)
    if isinstance(b, _Quantized):
        return b.behind(a)
    if min(a.shape[-2], b.shape[-1]) > FEW or min(a.dim(), b.dim()) < 2:
        return torch.matmul(a, b)
    return _dots(a, b).to(a.dtype)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as sums, in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    turned = b.transpose(-1, -2)
    if a.shape[-2] < b.shape[-1]:  # the few are made first, the many are read where they lie
        a = _made(a)
    else:
        turned = _made(turned)
    return (a[..., :, None, :].to(wide) * turned[..., None, :, :].to(wide)).sum(-1)


def _dequantized(
    sinks: Tensor, numbers: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[_Quantized, _Quantized]:
    (number,), (scale,) = numbers, scales  # a ring in one piece: a single token brings no chunk
    keys, values = zip(sinks.unbind(), number.unbind(), scale.unbind(), strict=True)
    return _Quantized(*keys), _Quantized(*values)


class _Quantized:
    """Keys or values [B, G, K, D] of an int8 ring, which are never made whole.

    A product is one with the numbers, and its scale comes behind it (of keys) or before it (of values). So
    half as many bytes are read as of bfloat16; and nothing is rounded before it is summed.
    """

    def __init__(self, sinks: Tensor, numbers: Tensor, scales: Tensor, turned: bool = False) -> None:
        self._sinks, self._numbers, self._scales = sinks, numbers, scales
        self._turned = turned  # [B, G, D, K]

    def transpose(self, *axes: int) -> _Quantized:
        return _Quantized(self._sinks, self._numbers, self._scales, not self._turned)

    def __getitem__(self, places: tuple[slice, ...]) -> Tensor:
        """What attention looks at alone: the sinks, or some of them."""
        alone = not self._turned and places[2].stop <= self._sinks.shape[2]
        return self._sinks[places] if alone else self._whole()[places]

    def behind(self, x: Tensor) -> Tensor:
        """x @ self."""
        sunk, rows = self._sinks.shape[2], x.shape[-2]
        scales = self._scales.transpose(2, 3).to(torch.promote_types(x.dtype, torch.float32))
        if rows > FEW:
            return torch.matmul(x, self._whole())
        if self._turned:
            recent = _dots(x, self._numbers.transpose(2, 3)) * scales
            return torch.cat((_dots(x, self._sinks.transpose(2, 3)), recent), -1).to(x.dtype)
        recent = _dots(x[..., sunk:] * scales, self._numbers)
        return (_dots(x[..., :sunk], self._sinks) + recent).to(x.dtype)

    def _whole(self) -> Tensor:
        whole = torch.cat((self._sinks, self._numbers * self._scales), 2)
        return whole.transpose(2, 3) if self._turned else whole


def _softmax(scores: Tensor, dim: int) -> Tensor:
    return _made(scores).softmax(dim)  # it reads them three times


def _made(x: Tensor) -> Tensor:
    """x, computed and kept. Else inductor computes it again wherever it is read: cosines for every key."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


_AS_FUNCTIONS = {"matmul": torch.matmul, "__matmul__": torch.matmul, "softmax": torch.softmax}
_AS_DOTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    layers._pointwise: _linear,
    torch._weight_int8pack_mm: _int8_linear,
    torch.matmul: _matmul,
    torch.softmax: _softmax,
    dequantized: _dequantized,
    operator.matmul: _matmul,
}
