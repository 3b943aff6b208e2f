"""The compiler of templates: it adds a call to the budget wherever code could repeat or make a large value."""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser


class CountingCodeGenerator(CodeGenerator):
    """jinja2's code generator. In the compiled code, `environment` is the `Sandbox` of the prompt."""

    def blockvisit(self, body: Iterable[nodes.Node], frame: Frame) -> None:
        # The body of each loop, macro, branch and block is compiled here, so nothing repeats without a step.
        self.writeline("environment.budget.step()")
        super().blockvisit(body, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(environment.budget.step() and ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        is_slice = isinstance(node.arg, nodes.Slice)
        self.write("environment.sliced(" if is_slice else "")
        super().visit_Getitem(node, frame)
        self.write(")" if is_slice else "")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        is_target = node.ctx == "store"  # of an assignment: nothing is made
        self.write("" if is_target else "environment.literal(")
        super().visit_Tuple(node, frame)
        self.write("" if is_target else ")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.literal(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.literal(")
        super().visit_Dict(node, frame)
        self.write(")")


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the model's words for training: no effect here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
