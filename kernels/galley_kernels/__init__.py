"""Tensor operations for the hot paths: one contract each, a readable reference and fast implementations.

Each operation takes `implementation`: `auto` is the fastest that the tensors' device and this installation
have, `reference` the formula in plain torch, `torch` the same quickly on any device, `cpu` compiled code,
`triton` a GPU's.
"""

from galley_kernels.memory_block import memory_block
from galley_kernels.mixing import mix_log_probs
from galley_kernels.quantized import w4a16_gemm, w8a16_gemm
from galley_kernels.quantized.packed import PackedMatrix, SparseRows, pack_codes, unpack_codes

__all__ = [
    "PackedMatrix",
    "SparseRows",
    "memory_block",
    "mix_log_probs",
    "pack_codes",
    "unpack_codes",
    "w4a16_gemm",
    "w8a16_gemm",
]
