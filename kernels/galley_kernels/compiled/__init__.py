"""Code compiled for the processor it runs on: products of few rows, and decoder layers made of them.

Weights are of 4 or 8 bits, and activations integers too; or both are floating numbers. Activations become
integers by spans of 64 inputs, each with its own scale: of 8 bits beside 4-bit weights (W4A8; llama.cpp's Q8
blocks, of 32, are alike), of 16 bits beside 8-bit weights, at about one and a half times the cost.
"""

from galley_kernels.compiled.decoder import CompiledDecoder, DecoderLayer, PagedCache, Requests, Step
from galley_kernels.compiled.interleaved import InterleavedMatrix, available
from galley_kernels.compiled.linear import CompiledLinear, FloatLinear, IntegerLinear

__all__ = [
    "CompiledDecoder",
    "CompiledLinear",
    "DecoderLayer",
    "FloatLinear",
    "IntegerLinear",
    "InterleavedMatrix",
    "PagedCache",
    "Requests",
    "Step",
    "available",
]
