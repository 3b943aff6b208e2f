"""The rolling cache: attention sinks plus a window.

sink_cache.py  SinkCache, what users see and what a forward asks of it
streams.py     its base: what the rows hold, and how entries are taken out, copied and restored
ring.py        one layer's ring: slots, places and visibility of new tokens, and the tensors
int8_ring.py   the same, with recent tokens in 8 bits
entries.py     which entries each row holds, and what is left after some are taken out
state.py       that as tensors, and whether a saved state fits a cache
checks.py      wrong arguments
"""

from streamllm.cache.sink_cache import SinkCache

__all__ = ["SinkCache"]
