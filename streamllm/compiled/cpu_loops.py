"""A recorded step rewritten as sums, which torch's inductor compiles to one C++ function for the CPU.

For a single token, a row times a matrix, a query against the keys and a row of attention against the values are
sums over the last axis. Written like that, inductor turns a whole forward into one function of plain loops
without calls in between. It reads weights and cache once, at the speed of memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function_unary

from streamllm.cache.int8_ring import Int8Ring, dequantize
from streamllm.cache.ring import LayerStore
from streamllm.compiled import library
from streamllm.compiled.recorder import changes
from streamllm.models import quantized
from streamllm.models.torch_private import int4_matmul, int8_matmul, linear_pointwise

# Up to this many query rows, keys are read as sums: once from memory, then from the processor's cache.
MAX_SUM_ROWS = 16
# Independent sums computed together hide the latency of an add. How many, by bytes of a weight; else 1.
# tools/bench.py decode, AMD EPYC, 2026-11.
PARALLEL_SUMS = {1: 2, 2: 2}
# Calls of a recording that return views of their first argument.
VIEWS = ("__getitem__", operator.getitem, "unbind", "unsqueeze", "transpose", "view")
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    "size_asserts": False,  # the recording was looked up by its sizes
    "alignment_asserts": False,
    "aot_inductor.allow_stack_allocation": True,  # intermediate results are small and of fixed size
    "aot_inductor.precompile_headers": False,  # they take hundreds of megabytes, for one or two compilations
    "compile_threads": 1,  # one function needs no pool of processes
}


def compiled(module: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The recorded function for a CPU, compiled for tensors like those given; needs a C++ compiler."""
    constants = prepare(module, given)
    return with_constants(library.library(module, [*given, *constants], options()), constants)


def prepare(module: fx.GraphModule, given: Sequence[Tensor]) -> list[Tensor]:
    """Rewrite the recorded function as sums. Returns the weights, which it then takes behind the given tensors."""
    as_sums(module, given)
    return _constants_as_inputs(module)


def options() -> dict[str, Any]:
    """Inductor's options, which depend on the number of threads."""
    return {**OPTIONS, "cpp.threads": torch.get_num_threads()}


def with_constants(made: library.Library, constants: Sequence[Tensor]) -> Callable[..., Tensor]:
    def run(*given: Tensor) -> Tensor:
        return made([*given, *constants])[0]

    return run


class LoopStore:
    """A layer's store while a step is recorded: an int8 ring's dequantisation is recorded as one call."""

    def __init__(self, store: LayerStore) -> None:
        self._store = store

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ring, reads = self._store.ring, self._store.writes.reads
        if not isinstance(ring, Int8Ring):
            return self._store.append(k, v)
        self._store.write(k, v)
        return dequantized(*ring.parts(reads))


def dequantized(sinks: Tensor, numbers: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`dequantize` as one call of a recording, in whose place sums over the stored numbers are put."""
    if has_torch_function_unary(sinks):
        return handle_torch_function(dequantized, (sinks,), sinks, numbers, scales)
    return dequantize(sinks, numbers, scales)


def as_sums(module: fx.GraphModule, given: Sequence[Tensor]) -> None:
    """Replace matrix products by functions that write them as sums."""
    _keep_shared_results(module.graph, given)
    nodes: list[Any] = list(module.graph.nodes)
    for node in nodes:
        if node.op == "call_method" and node.target in _AS_FUNCTIONS:
            node.op, node.target = "call_function", _AS_FUNCTIONS[node.target]
        if node.op == "call_function" and node.target in _AS_SUMS:
            node.target = _AS_SUMS[node.target]
    module.recompile()


def _keep_shared_results(graph: fx.Graph, given: Sequence[Tensor]) -> None:
    """Store what depends on places alone, such as a rotation, once for all layers.

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
        made = node.op == "call_function" and not read  # without tensors, such as arange
        of_them = any(of in of_places for of in read)
        if made or (of_them and all(of in of_places or of.op == "get_attr" for of in read)):
            of_places.add(node)
    for node in nodes:
        outside = [user for user in node.users if user not in of_places]
        if node not in of_places or node.op == "placeholder" or not outside:
            continue
        first = min(outside, key=order.__getitem__)
        if any(changes(user.target) and order[user] >= order[first] for user in node.users):
            continue  # it changes before others read it
        # What a view looks at is stored, not the view: inductor before torch 2.12 loses the offset of the view.
        source = node
        while source.target in VIEWS:
            source = source.all_input_nodes[0]
        if source is node:
            with graph.inserting_before(first):
                kept = graph.call_function(_stored, (node,))
            for user in outside:
                user.replace_input_with(node, kept)
        elif source.op != "placeholder" and all(_may_read_stored(user) for user in source.users):
            with graph.inserting_after(source):
                kept = graph.call_function(_stored, (source,))
            for user in set(source.users) - {kept}:
                user.replace_input_with(source, kept)


def _may_read_stored(user: fx.Node) -> bool:
    return user.target is not _stored and not changes(user.target)


def _constants_as_inputs(module: fx.GraphModule) -> list[Tensor]:
    """Weights become inputs, behind the given ones, so that inductor neither inspects nor copies them."""
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


# What replaces the kernels in the graph. Inductor traces these once, with known sizes.


def _linear(x: Tensor, weight: Tensor | _Int4, bias: Tensor | None = None, *more: Any) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if rows > 1:
        return F.linear(x, weight.dequantized() if isinstance(weight, _Int4) else weight, bias)
    product = weight.times_row(x) if isinstance(weight, _Int4) else _row_times(x, weight)
    if bias is not None:
        product = product + bias
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if len(x) > 1:
        return _int8_product(x, weight, scale)
    return (_row_times(x, weight) * scale).to(x.dtype).view(1, -1)


def _int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    assert int8_matmul is not None  # it was recorded
    return int8_matmul(x, weight, scale)  # type: ignore[no-any-return]


def _int4_product(x: Tensor, weight: Tensor, group: int, scale: Tensor) -> Tensor:
    """torch's own kernel, for any number of rows: for one it takes 0.5 to 0.8 of the time of sums (see `_Int4`)."""
    assert int4_matmul is not None  # it was recorded
    return int4_matmul(x, weight, group, scale)  # type: ignore[no-any-return]


def _row_times(x: Tensor, weight: Tensor) -> Tensor:
    """One row and a weight [out, in] -> [out], in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype == torch.int8:  # widened once; once per output would take as long as reading the weights
        x = x.to(wide)
    row = _stored(x).view(1, -1).to(wide)
    parts = PARALLEL_SUMS.get(weight.itemsize, 1)
    if len(weight) % parts:  # only loops of equal length run together
        parts = 1
    sums = [(row * part.to(wide)).sum(-1) for part in weight.chunk(parts)]
    return sums[0] if parts == 1 else torch.cat(sums)


class _Int4:
    """An int4 weight by rows (quantized.py), never dequantised as a whole where it meets one row.

    Where torch's own int4 kernel is recorded, `_int4_product` calls it instead: on the CPU in bfloat16.
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self._weight, self._scale, self._dtype = weight, scale, dtype

    def dequantized(self) -> Tensor:
        return quantized.dequantized_rows(self._weight, self._scale, self._dtype)

    def times_row(self, x: Tensor) -> Tensor:
        """x [1, in] in any shape -> [out], in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = self._scale.shape[1]
        low, high = (_stored(half) for half in x.to(wide).reshape(groups, 2, -1).unbind(1))
        pairs = self._weight.view(len(self._weight), groups, -1).to(torch.int32)
        products = ((pairs & 15) - 8).to(wide) * low + ((pairs >> 4) - 8).to(wide) * high
        return (products * self._scale.to(wide)[:, :, None]).sum((1, 2))


def _matmul(a: Tensor | _Quantized, b: Tensor | _Quantized) -> Tensor:
    if isinstance(a, _Quantized):  # keys times queries in columns; other products have the query in front
        return _matmul(b.transpose(-1, -2), a.transpose(-1, -2)).transpose(-1, -2)
    if isinstance(b, _Quantized):
        return b.behind(a)
    if min(a.dim(), b.dim()) < 2 or min(a.shape[-2], b.shape[-1]) > MAX_SUM_ROWS:
        return torch.matmul(a, b)
    return _sums(a, b).to(a.dtype)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as sums, in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    transposed = b.transpose(-1, -2)
    if a.shape[-2] < b.shape[-1]:  # store the smaller factor first; the larger one is read in place
        a = _stored(a)
    else:
        transposed = _stored(transposed)
    return (a[..., :, None, :].to(wide) * transposed[..., None, :, :].to(wide)).sum(-1)


def _dequantized(
    sinks: Tensor, numbers: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[_Quantized, _Quantized]:
    (number,), (scale,) = numbers, scales  # one range of slots: a single token brings no chunk
    keys, values = zip(sinks.unbind(), number.unbind(), scale.unbind(), strict=True)
    return _Quantized(*keys), _Quantized(*values)


class _Quantized:
    """Keys or values [B, G, K, D] of an int8 ring, never dequantised as a whole.

    Products use the int8 numbers. The scale of a key multiplies its score, that of a value its weight. So half
    as many bytes are read as in bfloat16, and nothing is rounded before it is summed.
    """

    def __init__(self, sinks: Tensor, numbers: Tensor, scales: Tensor, transposed: bool = False) -> None:
        self._sinks, self._numbers, self._scales = sinks, numbers, scales
        self._transposed = transposed  # [B, G, D, K]

    def float(self) -> _Quantized:
        """Itself: sums of it run in float32 anyway."""
        return self

    def transpose(self, *axes: int) -> _Quantized:
        return _Quantized(self._sinks, self._numbers, self._scales, not self._transposed)

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        """A part of it: attention asks for the sinks."""
        are_sinks = not self._transposed and slices[2].stop <= self._sinks.shape[2]
        return self._sinks[slices] if are_sinks else self._dequantized()[slices]

    def behind(self, x: Tensor) -> Tensor:
        """x @ self."""
        sinks, rows = self._sinks.shape[2], x.shape[-2]
        scales = self._scales.transpose(2, 3).to(torch.promote_types(x.dtype, torch.float32))
        if rows > MAX_SUM_ROWS:
            return torch.matmul(x, self._dequantized())
        if self._transposed:
            recent = _sums(x, self._numbers.transpose(2, 3)) * scales
            return torch.cat((_sums(x, self._sinks.transpose(2, 3)), recent), -1).to(x.dtype)
        recent = _sums(x[..., sinks:] * scales, self._numbers)
        return (_sums(x[..., :sinks], self._sinks) + recent).to(x.dtype)

    def _dequantized(self) -> Tensor:
        whole = torch.cat((self._sinks, self._numbers * self._scales), 2)
        return whole.transpose(2, 3) if self._transposed else whole


def _softmax(scores: Tensor, dim: int) -> Tensor:
    return _stored(scores).softmax(dim)  # a softmax reads its input three times


def _stored(x: Tensor) -> Tensor:
    """x, computed once. Else inductor computes it again wherever it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


_AS_FUNCTIONS = {"matmul": torch.matmul, "__matmul__": torch.matmul, "softmax": torch.softmax}
_AS_SUMS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.softmax: _softmax,
    dequantized: _dequantized,
    quantized.dequantized_rows: _Int4,
    operator.matmul: _matmul,
}
if linear_pointwise is not None:
    _AS_SUMS[linear_pointwise] = _linear
if int8_matmul is not None:
    _AS_SUMS[int8_matmul] = _int8_linear
if int4_matmul is not None:
    _AS_SUMS[int4_matmul] = _int4_product
