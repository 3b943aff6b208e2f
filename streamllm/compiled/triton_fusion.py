"""Rewrites a recorded decoding step into few Triton kernels. What no rule covers stays as it was recorded.

    norm, then products of one input          one kernel
    product, then bias, activation, gate      the same kernel
    product, then + residual                  the same kernel
    clip, head norms, rotation, ring write,   one kernel
      attention over sinks and window
    the tables of the rotation                one kernel

The recorded list is flat, and attention alone has a dozen shapes in it. So the rules do not search for them: the
recorder notes the calls of `attend`, `RMSNorm.forward` and so on while it records, with arguments and results. The
rules connect these calls; the models do not know it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from streamllm.cache import SinkCache
from streamllm.compiled import fusion, triton_attention, triton_products
from streamllm.compiled.recorder import Recorder
from streamllm.compiled.triton_graph import Recorded

NOTED = (*triton_attention.NOTED, *triton_products.NOTED)


def fuse(module: fx.GraphModule, recorder: Recorder, given: Sequence[Tensor], cache: SinkCache) -> bool:
    """Rewrite the recording, in place. Returns whether the attention of all layers was fused: else it is of no use.

    given: the tokens [B, 1], places [R], origin [1], starts and tensors of the cache with which it was recorded.
    """
    recorded = Recorded(module, recorder, given)
    if not triton_attention.AttentionFusion(recorded, cache).fuse():
        return False
    triton_products.ProductFusion(recorded).fuse()
    fusion.prune(module)
    return True
