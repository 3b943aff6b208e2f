"""Compiles every Triton kernel for real chips without a GPU. Run in a process without TRITON_INTERPRET.

python -m tests.triton_launches 80 90 100
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamllm.compiled import triton_attention_kernel as attention_kernel
from streamllm.compiled import triton_chunk as chunk
from streamllm.compiled import triton_chunk_kernels as chunk_kernels
from streamllm.compiled import triton_int4_kernels as int4_kernels
from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled import triton_tiles as tiles

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
# By the name under which a kernel is shown: its module, and its name there.
KERNELS = {
    **{name: (kernels, name) for name in ("matvec", "matmul_rows", "norm_rows", "gate_rows", "rope_tables")},
    "attention": (attention_kernel, "attention"),
    **{name: (chunk_kernels, name) for name in ("rotate_heads", "join_sinks")},
    **{f"int4 {name}": (int4_kernels, name) for name in ("matvec", "matmul_rows")},
}
SOURCES = {shown: getattr(module, name) for shown, (module, name) in KERNELS.items()}


class Launches:
    """Stands in for a kernel, and keeps what it would have been launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: list[tuple[str, Any, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        names = self.kernel.arg_names
        given = {**dict(zip(names, args, strict=False)), **named}
        signature, constants, attributes = {}, {}, {}
        for place, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = given[name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        self.made.append((name, ASTSource(self.kernel, signature, constants, attributes), options))


def launched(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """The source of every kernel in the variants that models use, with the tiles of a GPU."""
    tiles.on_gpu = lambda device: True
    tiles.starts_early = lambda device: capability >= 90
    tiles.multiprocessors = lambda device: 132
    tiles.kept_tiles = lambda name: {}
    collected = {shown: Launches(source) for shown, source in SOURCES.items()}
    for shown, (module, name) in KERNELS.items():
        setattr(module, name, collected[shown])
    for _ in calls():
        pass
    return [
        (name, source, options)
        for name, launches in collected.items()
        for _, source, options in launches.made
    ]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> Iterator[Any]:
    f32, i64 = torch.float32, torch.int64
    for (outputs, inputs, gated, _), (rows, int8) in zip(  # Llama 3.1 8B
        itertools.islice(itertools.cycle(list(tiles.TILES)[:5]), 8),
        itertools.cycle([(1, False), (1, True), (8, False), (32, True), (1, False)]),
        strict=False,
    ):
        kind = torch.int8 if int8 else torch.bfloat16
        weight, scale = empty(outputs, inputs, dtype=kind), empty(outputs) if int8 else None
        norm = (kernels.RMS_NORM, empty(inputs), None, 1e-5) if outputs != inputs else None
        residual = empty(rows, 1, outputs) if norm is None else None
        up = (weight, scale, None) if gated else None
        yield launch.product(empty(rows, 1, inputs), weight, scale, None, norm, up, residual, int(gated))
    for rows, activation, dtype in ((1, kernels.GELU, f32), (1, kernels.GELU_TANH, torch.float16),
                                    (3, kernels.QUICK_GELU, f32)):  # fmt: skip
        weight, bias = empty(2000, 1000, dtype=dtype), empty(2000, dtype=dtype)  # no multiples of a tile
        norm = (kernels.LAYER_NORM, empty(1000, dtype=dtype), empty(1000, dtype=dtype), 1e-5)
        yield launch.product(
            empty(rows, 1, 1000, dtype=dtype), weight, None, bias, norm, activation=activation
        )
    for outputs, inputs, gated, rows in (  # int4
        (6144, 4096, False, 1), (14336, 4096, True, 1), (4096, 14336, False, 1), (4096, 4096, False, 8),
        (14336, 4096, True, 64), (1000, 352, True, 1),
    ):  # fmt: skip
        weight = empty(outputs, inputs // 2, dtype=torch.uint8)
        scale = empty(outputs, inputs // 32)
        norm = (kernels.RMS_NORM, empty(inputs), None, 1e-5) if outputs != inputs and rows == 1 else None
        up = (weight, scale, None) if gated else None
        yield launch.product(
            empty(rows, 1, inputs), weight, scale, None, norm, up, empty(rows, 1, outputs), int(gated)
        )
    x = empty(64, 1, 4096)
    yield launch.added_and_normalised(x, x, kernels.RMS_NORM, empty(4096), None, 1e-5)
    yield launch.gated(empty(64, 1, 14336), empty(64, 1, 14336), kernels.SILU)
    query, keys = empty(1, 2048, 32, 128).transpose(1, 2), empty(1, 8, 4, 128)
    table = empty(1, 1, 2048, 128), empty(1, 1, 2048, 128)
    yield chunk.rotated(query, table, table)
    yield chunk.with_sinks(query, keys, keys, query, empty(1, 32, 2048, dtype=f32), 10**4, 0.1)
    places, origin = empty(1, dtype=i64), empty(1, dtype=i64)
    tables = launch.rope_tables(places, origin, places, empty(64, dtype=torch.float64), 1.0, 4, 4096)

    def attended(
        heads: int, shared: int, dim: int, slots: int, dtype: torch.dtype, int8: bool = False,
        norms: bool = False, alibi: bool = False, clip: float | None = None, sinks: int = 4,
    ) -> Any:  # fmt: skip
        q, k = empty(1, 1, heads * shared * dim, dtype=dtype), empty(1, 1, heads * dim, dtype=dtype)
        ring = [empty(1, heads, slots, dim, dtype=dtype) for _ in range(2)]
        if int8:
            ring = [
                empty(2, 1, heads, sinks, dim, dtype=dtype), empty(2, 1, heads, slots - sinks, 1, dtype=dtype),
                empty(2, 1, heads, slots - sinks, dim, dtype=torch.int8),
            ]  # fmt: skip
        turned = [] if alibi else [table[:, :dim].reshape(-1, dim) for table in tables]
        weights = (empty(dim, dtype=dtype), empty(dim, dtype=dtype), 1e-6, 1e-6) if norms else None
        slopes = (empty(heads * shared, dtype=f32), 1.0) if alibi else None
        tile = tiles.attention_tile(heads, shared, slots, dim, dtype, q.device)
        return launch.attended(
            q,
            k,
            k,
            ring,
            places,
            places,
            empty(heads, dtype=torch.int32),
            turned,
            weights,
            slopes,
            dim,
            sinks,
            0.1,
            clip,
            tile,
        )

    bf16 = torch.bfloat16
    yield attended(8, 4, 128, 4096, bf16)  # Llama 3.1 8B
    yield attended(32, 1, 128, 4096, bf16)  # Llama 2 7B
    yield attended(8, 4, 128, 4096, bf16, int8=True)
    if "--few" in sys.argv:
        return
    yield attended(8, 4, 128, 4096, torch.float32)
    yield attended(8, 4, 128, 4096, bf16, norms=True, sinks=0)  # Qwen3
    yield attended(1, 71, 64, 1024, bf16)  # Falcon 7B
    yield attended(32, 1, 128, 4096, bf16, alibi=True, clip=8.0)  # MPT
    yield attended(8, 4, 128, 100, torch.float16)
    yield attended(32, 1, 128, 4096, bf16, int8=True)


def main() -> None:
    """Compiles for the compute capabilities in argv. Prints a line of JSON for each cubin."""
    for capability in (int(given) for given in sys.argv[1:] if given.isdigit()):
        sources, seen = launched(capability), set()
        for name, source, options in sources:
            key = name, source.hash(), str(options)
            if key in seen:
                continue
            seen.add(key)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(
                json.dumps(
                    {"kernel": name, "capability": capability, "cubin": len(made.asm["cubin"]),
                     "shared": made.metadata.shared, "warps": made.metadata.num_warps}
                ), flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
