"""Recorder: traces a call into a flat list of torch's functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


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
    Python numbers and branches are recorded as they were taken: when they change, record again.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # an id is unique only while its tensor lives
        for number, tensor in enumerate(inputs):
            self._name(tensor, self.graph.placeholder(f"given_{number}"))

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
        if isinstance(result, Tensor):
            self._name(result, node)
        elif isinstance(result, (tuple, list)):
            for index, output in enumerate(result):
                if isinstance(output, Tensor):
                    self._name(output, self.graph.call_function(operator.getitem, (node, index)))
        return result

    def finish(self, result: Tensor | tuple[Tensor, ...]) -> Recorded:
        """The function from the inputs to `result`."""
        self.graph.output(self._mapped(result))
        root = nn.Module()
        for name, tensor in self.constants.items():
            setattr(root, name, tensor)
        return Recorded(root, self.graph)

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
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
