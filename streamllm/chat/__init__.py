"""Chat templates: a list of messages -> the prompt that a model was trained on.

A template is a small jinja2 program in a checkpoint. It is untrusted, and it runs for every prompt. It gets the
variables and functions that the templates on the hub expect, and nothing else:

* **It is confined** (sandbox.py, allowed.py). It runs in jinja2's immutable sandbox with a list of allowed
  attributes; any other attribute raises an error. There is no loader, so `include` and `import` fail.
* **It ends** (budget.py, compiler.py, costs.py). Every block, call, filter, test, comparison and operator takes
  a step from a budget and checks the time. Every operation that makes a value pays for the value's size, in
  advance if it could be large. That bounds nested loops, recursive macros, `"a" * 10**9`, repeated doubling, and
  lists that contain another list twice, 40 levels deep. Between two steps, the work is in proportion to the size
  of values that were paid for. No signal and no second process is needed, so a template can run in any thread.
"""

from streamllm.chat.budget import Limits
from streamllm.chat.errors import ChatTemplateError
from streamllm.chat.render import Message, render

__all__ = ["ChatTemplateError", "Limits", "Message", "render"]
