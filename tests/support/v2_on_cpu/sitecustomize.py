"""On PYTHONPATH with TRITON_INTERPRET=1: a Triton "cpu" backend, so that runner V2 starts without a GPU.

Triton then runs vLLM's kernels in its interpreter; slow, and the same contracts as on CUDA.
"""

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


triton.backends.backends["cpu"] = _Backend
