"""The command line of vLLM's server for a worker: Galley's defaults, then what the user passes through."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.options import WHOLE_PROMPT
from galley_plugins.models import engine_options
from galley_plugins.quantization.options import SERVED_AS, QuantizationOptions
from galley_plugins.worker.environment import runs_intel_openmp
from galley_plugins.worker.memory import available_bytes

if TYPE_CHECKING:
    from galley_plugins.options import PluginOptions
    from galley_plugins.worker.device import Device
    from galley_plugins.worker.spec import WorkerSpec

GiB = 1024**3

# On a CPU everyone waits for the end of a step: running chats for their next token, an aborted request to be
# gone. This keeps a step of a small model near 100 ms. Longer ones cost less per token; measured on two cores
# with the built-in model in float32: 2.1 ms with 48 tokens, 1.9 with 64, 1.6 with 128, 1.5 with 256.
PREFILL_TOKENS_PER_CORE = 24
# Of packed weights beside integers, by their bits: they take a fourth of the time, and a third.
INTEGER_PREFILL_TOKENS_PER_CORE = {4: 96, 8: 64}

# A token's cost over what any step takes, on two cores: beside `galley_plugins.few_rows` 1.3 ms over 18,
# beside packed weights with instructions for such products 1 over 13, without them 1.1 over 6. A first guess:
# serving measures its own.
COMPILED_TOKEN_COST, WIDENED_TOKEN_COST = 0.08, 0.15

EMBED_TOKENS_PER_CORE = 96  # of a step in which only embeddings run; a chat may have to wait for one of them
EMBED_ALONE_TOKENS_PER_CORE = (
    256  # in an engine without chats; a request that is cancelled ends with its step
)

MOST_STEP_TOKENS = 2048

# In vLLM's registry: the compiled norms of `galley_plugins.cpu_kernels`, and vLLM's for what they refuse.
ONE_PROCESS = "galley_plugins.runners.cpu_executor.CPUExecutor"
COMPILED_NORMS = {name: ["galley_cpu", "native"] for name in ("rms_norm", "fused_add_rms_norm")}

# Rows of a step up to which a GPU waits for weights in 16 bits, not for products: on an H200 790 TFLOP/s over
# 4.3 TB/s are 184 operations a byte, and a row does one on each byte of the weights.
FREE_ROWS = 184
DRAFT_LENGTHS = (8, 4, 2, 1)  # below the most

SCHEDULER = "galley_plugins.scheduling.make_scheduler"

MOST_REQUESTS = 1024  # that vLLM runs at once by default, on a large GPU

# Where vLLM's parser differs from its habit of `--no-NAME` for false and `--NAME a b` for a list.
SWITCHES = {
    "aggregate-engine-logging",
    "data-parallel-multi-port-external-lb",
    "disable-log-stats",
    "grpc",
    "headless",
}
JSON_LISTS = {"allowed-headers", "allowed-methods", "allowed-origins", "custom-histogram-buckets"}
REPEATED = {"middleware"}


def server_arguments(spec: WorkerSpec, model: Path | str, device: Device) -> list[str]:
    """Arguments of `vllm serve`, without the program's name and the word `serve`."""
    drafts = spec.speculation
    if device == "cpu" and drafts is not None:
        integers = _integer_bits(spec, model)
        cost = COMPILED_TOKEN_COST if integers or _float32(spec) else None
        if integers and not _processor_has("avx512_vnni", "avx_vnni"):
            cost = WIDENED_TOKEN_COST
        if integers:
            # Planning branches takes of such short steps what they bring.
            drafts = replace(drafts, tree="off" if drafts.tree == "auto" else drafts.tree)
        spec = replace(
            spec,
            speculation=replace(drafts, token_cost=cost if drafts.token_cost is None else drafts.token_cost),
        )
    options: dict[str, Any] = {
        "host": spec.host,
        "port": spec.port,
        "served-model-name": list(spec.names),
        "worker-cls": f"galley_plugins.runners.{device}_worker.Galley{device.upper()}Worker",
        "disable-uvicorn-access-log": True,
        "enforce-eager": spec.compile == "off" or (spec.compile == "auto" and device == "cpu"),
        **_task_options(spec),
        **(_cpu_options(spec, model) if device == "cpu" else {}),
        **_speculation_options(spec, device),
        **({} if spec.quantization.load is None else {"quantization": SERVED_AS}),
        **engine_options(spec.weights, device),
        **({"dtype": "bfloat16"} if device == "cpu" and _halves_cache(spec, model) else {}),
    }
    passed = dict(spec.engine)
    plugins = spec.plugin_options()
    if plugins.pools:
        plugins = _embedding_steps(spec, plugins, options, passed)
    options["additional-config"] = plugins.to_additional_config()
    if "embed" in spec.tasks:
        options["hf-overrides"] = {"is_matryoshka": True, **(passed.pop("hf-overrides", None) or {})}
    return ["--model", str(model), *_render({**options, **passed})]


def _task_options(spec: WorkerSpec) -> dict[str, Any]:
    # The arguments of a tool call that was asked for fit the tool's schema, "strict" or not.
    generate = {"tool-strict-level": "parameter"} if "generate" in spec.tasks else {}
    if "embed" not in spec.tasks:
        return generate
    normalize = spec.embedding.normalize
    if spec.pooling_runner:
        # An engine for embeddings alone is vLLM's own pooling runner, which means and normalises by itself.
        pooling = spec.embedding.method.upper()
        pooler = {"task": "embed", "seq_pooling_type": pooling, "use_activation": normalize}
        return {"runner": "pooling", "convert": "embed", "pooler-config": pooler}
    # Always LAST here: MEAN would turn chunked prefill and prefix caching off for the whole engine.
    pooler = {"task": "embed", "seq_pooling_type": "LAST", "use_activation": normalize}
    return {
        **generate,
        "runner": "generate",
        "pooler-config": pooler,
        "scheduler-cls": SCHEDULER,
    }


def _embedding_steps(
    spec: WorkerSpec, plugins: PluginOptions, options: dict[str, Any], passed: dict[str, Any]
) -> PluginOptions:
    """Let a batch be as large as a step without chats, or a prompt that runs in one step beside every chat.

    Steps of chats are no larger than before.
    """
    step = passed.pop("max-num-batched-tokens", None)
    most = step or options.get("max-num-batched-tokens")
    if most is None:
        return plugins  # vLLM's own choice for the device is larger
    if step is None:  # only on a CPU
        longer = min(EMBED_TOKENS_PER_CORE * len(os.sched_getaffinity(0)), MOST_STEP_TOKENS)
        step, most = most, max(most, longer)
        plugins = replace(plugins, embed_step_tokens=most)
    if spec.embedding.method in WHOLE_PROMPT:
        requests = passed.get("max-num-seqs", options.get("max-num-seqs", MOST_REQUESTS))
        drafts = spec.speculation.max_draft_tokens if spec.speculation is not None else 0
        most = max(most, spec.embedding.max_tokens + int(requests) * (1 + drafts))
    options["max-num-batched-tokens"] = most
    return replace(plugins, step_tokens=step)


def _speculation_options(spec: WorkerSpec, device: Device) -> dict[str, Any]:
    options = spec.speculation
    if options is None:
        return {}
    metrics = {"per-request-spec-decode-metrics": "summary"}
    if device == "cuda" or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        # Runner V2 takes no drafter by name; Galley's stands in for vLLM's own n-grams on the device.
        v2: dict[str, Any] = {"method": "ngram_gpu", "num_speculative_tokens": options.max_draft_tokens}
        if device == "cuda":
            v2["num_speculative_tokens_per_batch_size"] = draft_schedule(options.max_draft_tokens)
        return {"speculative-config": v2, **metrics}
    v1 = {
        "method": "custom_class",
        "model": "galley_plugins.runners.speculation_v1.PassiveProposer",
        "num_speculative_tokens": options.max_draft_tokens,
    }
    # Branches of a tree start from a copy of the last block: small blocks are soon copied.
    blocks = {} if options.tree == "off" else {"block-size": 32}
    # Drafts come with the steps that they were made in, see `handover`.
    return {"speculative-config": v1, **metrics, **blocks, "scheduler-cls": SCHEDULER}


def draft_schedule(most: int) -> list[list[int]]:
    """How many tokens to draft by the batch's size, so that a step has no more rows than are nearly free.

    Returns:
        first and last size and drafted tokens of each range; for each length vLLM captures graphs of its own.
    """
    ranges: list[list[int]] = []
    begin = 1
    lengths = sorted({most, *(length for length in DRAFT_LENGTHS if length < most)}, reverse=True)
    for length in lengths:
        end = FREE_ROWS // (1 + length)
        if end >= begin:
            ranges.append([begin, end, length])
            begin = end + 1
    return [*ranges, [begin, begin, 0]]  # and beyond


def _cpu_options(spec: WorkerSpec, model: Path | str) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    bits = _integer_bits(spec, model)
    each = PREFILL_TOKENS_PER_CORE if bits is None else INTEGER_PREFILL_TOKENS_PER_CORE[bits]
    if "generate" not in spec.tasks:
        each = EMBED_ALONE_TOKENS_PER_CORE
    prefill = min(max(cores * each, 48), MOST_STEP_TOKENS)
    common: dict[str, Any] = {"kv-cache-memory-bytes": min(2 * GiB, available_bytes() // 4)}
    parts = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    if runs_intel_openmp(os.environ) and all(int(spec.engine.get(part) or 1) == 1 for part in parts):
        common["distributed-executor-backend"] = ONE_PROCESS
    if not spec.compiled:  # torch.compile fuses by itself
        common["ir-op-priority"] = COMPILED_NORMS
    if spec.engine.get("enable-lora"):
        # On a CPU vLLM gives rows without an adapter the last slot's, where others have one: it stays empty.
        adapters = spec.engine.get("lora-modules") or []
        common["max-loras"] = 1 + (len(adapters) if isinstance(adapters, list | tuple) else 1)
    if spec.pooling_runner:
        return common  # it pools whole prompts: its own steps are long enough for one
    return {
        **common,
        "max-num-batched-tokens": prefill,
        "max-num-seqs": min(prefill // 2, 256),  # running chats never take the whole step
    }


def _integer_bits(spec: WorkerSpec, model: Path | str) -> int | None:
    """Of most matrices, where products run on packed weights and integers; None where they do not.

    See `galley_plugins.quantization.decoder`.
    """
    ranks = int(spec.engine.get("tensor-parallel-size") or 1)
    if (
        spec.quantization.activations != "integer"
        or spec.compiled
        or ranks > 1
        or spec.engine.get("enable-lora")
        or shutil.which(os.environ.get("CXX") or "c++") is None  # what `galley_kernels.compiler` builds with
    ):
        return None  # vLLM's own passes
    if spec.quantization.load is not None:
        return QuantizationOptions.from_values(spec.quantization.load).bits
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        described = config["quantization_config"]
        if described["quant_method"] != SERVED_AS:
            described = described[SERVED_AS]
        bits = [int(matrix["bits"]) for matrix in described["matrices"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a model of a hub, or one that is not quantized
    return 8 if 2 * bits.count(8) > len(bits) else 4


def _halves_cache(spec: WorkerSpec, model: Path | str) -> bool:
    """Whether keys and values are to have 16 bits: packed weights' sums are floats in any case."""
    return _integer_bits(spec, model) is not None and not _has_tiles()


def _has_tiles() -> bool:
    """Whether the processor has AMX: vLLM then lays out a bfloat16 cache as compiled passes do not read."""
    return _processor_has("amx_tile")


def _processor_has(*flags: str) -> bool:
    """Whether it has any of these, as far as the system says."""
    try:
        return not set(flags).isdisjoint(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False


def _float32(spec: WorkerSpec) -> bool:
    """Whether the engine computes in it, eagerly, as `galley_plugins.few_rows` wants it."""
    dtype = spec.engine.get("dtype") or engine_options(spec.weights, "cpu").get("dtype")
    return dtype in ("float32", "float") and not spec.compiled and not spec.engine.get("enable-lora")


def _render(options: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name}"
        if value is None or (value is False and name in SWITCHES):
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{name}")
        elif isinstance(value, list | tuple) and name in REPEATED:
            for item in value:
                arguments += [flag, str(item)]
        elif isinstance(value, list | tuple) and name not in JSON_LISTS:
            arguments += [
                flag,
                *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value),
            ]
        elif isinstance(value, dict | list | tuple):
            arguments += [flag, json.dumps(value)]
        else:
            arguments += [flag, str(value)]
    return arguments
