"""Recorder: traces a call into a flat list of torch's functions."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


@dataclass(eq=False)
class NotedCall:
    """A call of a Python function while a step was recorded."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Any = None
    nodes: list[fx.Node] = field(default_factory=list)  # recorded within it


class Recorded(fx.GraphModule):
    """A recorded graph. Unlike fx's own module, it leaves nothing behind: fx keeps the code of each for good."""

    def recompile(self) -> Any:
        code = self._graph.python_code(root_module="self")
        self._code = code.src
        return code

    def function(self, owner: Any) -> Callable[..., Any]:
        """The graph as a function of its inputs. `owner` has the constants as attributes."""
        code = self.recompile()
        names = dict(code.globals)
        exec(compile(code.src, "<recording>", "exec", dont_inherit=True), names)
        return partial(names["forward"], owner)

    def forward(self, *given: Tensor) -> Any:
        return self.function(self)(*given)


class Recorder(TorchFunctionMode):
    """Records every call to a torch function while it is active, as a graph from `inputs` to a result.

    A tensor that is neither an input nor a result of a recorded call becomes a constant of the graph: a weight.
    Python numbers and branches are recorded as they were taken: when they change, record again. The shape of a
    node's result is its meta["shape"].

    `noted` are Python functions whose calls are listed in `calls`, with arguments and results. The functions do
    not know it: Python's profiling hook reports the calls.
    """

    def __init__(self, inputs: Iterable[Tensor], noted: Iterable[Callable[..., Any]] = ()) -> None:
        super().__init__()
        self.calls: list[NotedCall] = []
        self._noted = {function.__code__: function for function in noted}
        self._open: list[tuple[FrameType, NotedCall]] = []
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # an id is unique only while its tensor lives
        for number, tensor in enumerate(inputs):
            self._name(tensor, self.graph.placeholder(f"given_{number}"))

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        if self._noted:
            self._profiler: Any = sys.getprofile()
            sys.setprofile(self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._noted:
            sys.setprofile(self._profiler if callable(self._profiler) else None)
            if hasattr(
                self._profiler, "enable"
            ):  # cProfile before Python 3.12, which setprofile does not take
                self._profiler.enable()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _note(self, frame: FrameType, event: str, value: Any) -> None:
        function = self._noted.get(frame.f_code)
        if function is None:
            return
        if event == "call":
            call = NotedCall(function, dict(frame.f_locals))
            self.calls.append(call)
            self._open.append((frame, call))
        elif event == "return" and self._open and self._open[-1][0] is frame:
            self._open.pop()[1].result = value

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node whose result the tensor is; None for one that was not recorded."""
        return self._nodes.get(id(tensor))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(function, MethodWrapperType):  # an attribute
            if isinstance(result, Tensor):
                raise NotImplementedError(f"a tensor as an attribute of a tensor: {function}")
            return result
        name = function.__name__
        in_place = changes(name)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if not in_place and not any(isinstance(output, Tensor) for output in outputs):
            return result  # a size, a type, a number
        if len(outputs) == 1 and any(result is given for given in args) and not in_place:
            return result  # a conversion without effect
        method = isinstance(function, (MethodDescriptorType, WrapperDescriptorType))
        method = method or getattr(Tensor, name, None) is function
        node = self.graph.create_node(
            "call_method" if method else "call_function",
            name if method else function,
            self._mapped(args),
            self._mapped(kwargs),
        )
        for _, call in self._open:
            call.nodes.append(node)
        if isinstance(result, Tensor):
            self._name(result, node)
        elif isinstance(result, (tuple, list)):
            for index, output in enumerate(result):
                if isinstance(output, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    for _, call in self._open:
                        call.nodes.append(part)
                    self._name(output, part)
        return result

    def finish(self, result: Tensor | tuple[Tensor, ...]) -> Recorded:
        """The function from the inputs to `result`."""
        self.graph.output(self._mapped(result))
        root = nn.Module()
        for name, tensor in self.constants.items():
            setattr(root, name, tensor)
        return Recorded(root, self.graph)

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._nodes:
                name = f"constant_{len(self.constants)}"
                self.constants[name] = value
                self._name(value, self.graph.get_attr(name))
            return self._nodes[id(value)]
        if isinstance(value, (tuple, list)):
            return type(value)(self._mapped(item) for item in value)
        if isinstance(value, dict):
            return {key: self._mapped(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._mapped(value.start), self._mapped(value.stop), self._mapped(value.step))
        return value


def changes(function: Any) -> bool:
    """Whether a call in a recording, by name or as a function, writes to its argument."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "_")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def record(
    function: Callable[[], Tensor], inputs: Sequence[Tensor], noted: Iterable[Callable[..., Any]] = ()
) -> tuple[Recorder, Tensor]:
    """Call `function` twice and record the second call: the first fills caches of constants. See `Recorder`."""
    function()
    with Recorder(inputs, noted) as recorder:
        result = function()
    return recorder, result
