"""The parts of tools/bench.py.

spec.py                 sizes of models; Spec: one system, one task, one setting
limit.py                how fast the machine can read the bytes that a token needs
ours.py                 streamllm
peer_transformers.py    transformers with its own caches
peer_streaming_llm.py   streaming-llm and attention_sinks, both on transformers
peer_llama_cpp.py       llama.cpp
systems.py              the table of systems, and what each supports
worker.py               a process that runs one system
loading.py              time of loading and of imports
memory.py               resident memory while decoding
profiling.py            synchronizations, launches and kernels per token
machine.py              what the machine is, and how busy it is
tables.py               the rows, as Markdown and as a plot

Workers run in the environments of the peers, where streamllm, and perhaps torch, are not installed. So the modules
import only the standard library at the top, and everything else inside functions.
"""
