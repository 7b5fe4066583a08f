"""Products of 4- and 8-bit weights with activations that are integers too, and decoder layers made of them.

Activations become integers by spans of 64 inputs, each with its own scale: of 8 bits beside 4-bit weights
(W4A8; llama.cpp's Q8 blocks, of 32, are alike), of 16 bits beside 8-bit weights, at the same cost.
"""

from galley_kernels.integer.decoder import DecoderLayer, IntegerDecoder, PagedCache, Requests, Step
from galley_kernels.integer.interleaved import InterleavedMatrix, available
from galley_kernels.integer.linear import CompiledLinear, FloatLinear, IntegerLinear

__all__ = [
    "CompiledLinear",
    "DecoderLayer",
    "FloatLinear",
    "IntegerDecoder",
    "IntegerLinear",
    "InterleavedMatrix",
    "PagedCache",
    "Requests",
    "Step",
    "available",
]
