"""Fast paths for decoding, derived from a model's modules from outside. Models, step and cache do not know them.

api.py        compile(), and the model that it returns
recorder.py   records one token's forward as a flat list of kernels
fusion.py     makes that list shorter
cpu_loops.py  rewrites it as sums, which inductor compiles to one C++ function
library.py    compiles in another process, and keeps the result
cuda.py       captures it as a CUDA graph
"""

from streamllm.compiled.api import BACKENDS, Compiled, compile
from streamllm.compiled.library import CompileError

__all__ = ["BACKENDS", "CompileError", "Compiled", "compile"]
