"""Fast paths for decoding, derived from a model's modules from outside. Models, step and cache do not know them.

api.py        compile(), and the model that it returns
recorder.py   records one token's forward as a flat list of kernels
fusion.py     makes that list shorter
cpu_loops.py  rewrites it as sums, which inductor compiles to one C++ function
library.py    compiles in another process, and keeps the result
takeover.py   "auto": from the flat list to a library that is compiled meanwhile
weight_guard.py   weights are stored anew only while no other thread computes with them
weight_addresses.py   whether the weights are still where a recording reads them
cuda.py       captures it as a CUDA graph

On CUDA with Triton, the list is rewritten into few kernels before it is captured:

triton_support.py    whether Triton runs here
triton_fusion.py     the rewrite: what becomes one kernel
triton_graph.py      the list while it is rewritten
triton_attention.py  rules for attention and what is around it
triton_products.py   rules for products, norms and sums
triton_launch.py     the kernels as functions of tensors
triton_kernels.py    kernels for products, norms and rotations
triton_attention_kernel.py  the kernel for attention
triton_tiles.py      tile sizes
triton_tune.py       measures tile sizes
"""

from streamllm.compiled.api import BACKENDS, Compiled, compile
from streamllm.compiled.library import CompileError

__all__ = ["BACKENDS", "CompileError", "Compiled", "compile"]
