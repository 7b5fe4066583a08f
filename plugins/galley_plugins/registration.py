"""Target of the `vllm.general_plugins` entry point: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import multiprocessing
from importlib import metadata

from galley_plugins import progress, vllm_compat
from galley_plugins.processes import die_with
from galley_plugins.worker import preloading

DISTRIBUTION = "galley-serve"
STAGE = "plugins loaded"

_registered = False


def register() -> None:
    """Prepare this process for Galley's plugins; further calls do nothing.

    Raises:
        IncompatibleVllmError: this vLLM is not supported.
    """
    global _registered
    if _registered:
        return
    vllm_compat.check_version()
    _register_models()
    _register_for_cpu()
    _register_quantization()
    preloading.adopt()
    process = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and not preloading.forked():
        die_with(parent.pid)
    _registered = True
    progress.report(STAGE, process=process.name, **versions())


def _register_models() -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from galley_plugins.embedding.nv_embed_config import ARCHITECTURE, MODEL_TYPE, NVEmbedConfig

    AutoConfig.register(MODEL_TYPE, NVEmbedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"galley_plugins.embedding.nv_embed_model:{ARCHITECTURE}")


def _register_for_cpu() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from galley_plugins import cpu_kernels, waiting

        cpu_kernels.register()
        waiting.register()


def _register_quantization() -> None:
    from galley_plugins.quantization import serving

    serving.register()


def versions() -> dict[str, str]:
    return {"galley": metadata.version(DISTRIBUTION), "vllm": vllm_compat.vllm_version()}
