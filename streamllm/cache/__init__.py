"""The rolling cache: attention sinks plus a window.

sink_cache.py     SinkCache, what users see: its settings, how entries are taken out, copied and restored
rolling_cache.py  its base: what a forward asks of it
ring.py           one layer's ring: slots, places and visibility of a new token, and the tensors
chunks.py         the same plan for many tokens at once
int8_ring.py      a ring with recent tokens in 8 bits
entries.py        which entries each row holds, and what is left after some are taken out
shared.py         the caches of an engine's streams, in one memory
state.py          the state as tensors, and whether a saved one fits a cache
checks.py         wrong arguments
"""

from streamllm.cache.sink_cache import SinkCache

__all__ = ["SinkCache"]
