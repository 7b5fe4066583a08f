"""The server's command line, as vLLM's own parser reads it."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.quantization.serving_options import ServingOptions
from galley_plugins.speculation.options import SpeculationOptions
from galley_plugins.worker import arguments
from galley_plugins.worker.arguments import (
    COMPILED_TOKEN_COST,
    FREE_ROWS,
    WIDENED_TOKEN_COST,
    GiB,
    draft_schedule,
    server_arguments,
)
from galley_plugins.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from galley_plugins.worker.device import Device

BUILTIN = "builtin:smollm2-135m-instruct"
BOTH = WorkerSpec(weights="some/model", names=("kitchen", "galley"), port=8001)
GENERATE = replace(BOTH, tasks=frozenset({"generate"}))
EMBED = replace(BOTH, tasks=frozenset({"embed"}))
LAST = EmbeddingOptions(method="last", normalize=False)


@pytest.fixture
def served(read_by_vllm: Callable[[list[str]], Any]) -> Callable[..., Any]:
    """What vLLM is asked to do for a worker."""

    def read(spec: WorkerSpec, device: Device = "cpu", **engine: Any) -> Any:
        options = {name.replace("_", "-"): value for name, value in engine.items()}
        return read_by_vllm(server_arguments(replace(spec, engine=options), "/models/some", device))

    return read


@pytest.fixture
def parser(read_by_vllm: Any) -> argparse.ArgumentParser:
    return read_by_vllm.parser


def untouched(parser: argparse.ArgumentParser, values: Any, *names: str) -> bool:
    return all(getattr(values, name) == parser.get_default(name) for name in names)


def options_of(values: Any) -> PluginOptions:
    return PluginOptions.from_vllm_config(SimpleNamespace(additional_config=values.additional_config))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", [BOTH, GENERATE, EMBED], ids=["both", "generate", "embed"])
def test_the_server_listens_and_is_named_as_asked(
    spec: WorkerSpec, device: Device, served: Callable[..., Any]
) -> None:
    values = served(replace(spec, host="::1"), device)
    assert values.model == "/models/some"
    assert (values.host, values.port) == ("::1", 8001)
    assert values.served_model_name == ["kitchen", "galley"]
    assert values.disable_uvicorn_access_log


def without_steps(options: PluginOptions) -> PluginOptions:
    return replace(options, step_tokens=None, embed_step_tokens=None)


def test_one_engine_for_both_tasks_generates_and_takes_means_in_the_plugin(
    served: Callable[..., Any],
) -> None:
    values = served(BOTH)
    assert values.runner == "generate"
    assert values.convert == "auto"
    # Any other pooling of vLLM's would turn chunked prefill and prefix caching off.
    assert (values.pooler_config.task, values.pooler_config.seq_pooling_type) == ("embed", "LAST")
    assert values.pooler_config.use_activation is True
    assert values.scheduler_cls == "galley_plugins.scheduling.make_scheduler"
    assert values.hf_overrides == {"is_matryoshka": True}
    assert values.tool_strict_level == "parameter"
    assert without_steps(options_of(values)) == PluginOptions(embedding=EmbeddingOptions())
    values = served(replace(BOTH, embedding=LAST))
    assert values.pooler_config.seq_pooling_type == "LAST"
    assert values.pooler_config.use_activation is False
    assert without_steps(options_of(values)) == PluginOptions(embedding=LAST)


def test_an_engine_that_only_generates_is_vllms_own(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    values = served(GENERATE)
    assert untouched(parser, values, "runner", "convert", "pooler_config", "scheduler_cls", "hf_overrides")
    assert values.tool_strict_level == "parameter"
    assert not options_of(values).pools


@pytest.mark.parametrize(("method", "normalize"), [("mean", True), ("last", False)])
def test_an_engine_that_only_embeds_is_vllms_own(
    method: Any, normalize: bool, served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    values = served(replace(EMBED, embedding=EmbeddingOptions(method=method, normalize=normalize)))
    assert (values.runner, values.convert) == ("pooling", "embed")
    assert (values.pooler_config.task, values.pooler_config.seq_pooling_type) == ("embed", method.upper())
    assert values.pooler_config.use_activation is normalize
    assert values.hf_overrides == {"is_matryoshka": True}
    assert untouched(parser, values, "scheduler_cls", "tool_strict_level")
    assert not options_of(values).pools


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_has_its_worker_class(device: Device, served: Callable[..., Any]) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.worker_base import WorkerBase

    name = served(BOTH, device).worker_cls
    assert (
        name
        == {
            "cpu": "galley_plugins.runners.cpu_worker.GalleyCPUWorker",
            "cuda": "galley_plugins.runners.cuda_worker.GalleyCUDAWorker",
        }[device]
    )
    assert issubclass(resolve_obj_by_qualname(name), WorkerBase)


def test_cuda_keeps_vllms_defaults_for_everything_that_is_tuned_for_a_cpu(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    tuned = ("enforce_eager", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "dtype")
    spec = replace(BOTH, weights=BUILTIN)
    assert untouched(parser, served(spec, "cuda"), *tuned)
    on_cpu = served(spec, "cpu")
    assert [name for name in tuned if untouched(parser, on_cpu, name)] == []


@pytest.mark.parametrize(
    ("device", "compiled", "eager"),
    [
        ("cpu", "auto", True),
        ("cpu", "on", False),
        ("cpu", "off", True),
        ("cuda", "auto", False),
        ("cuda", "on", False),
        ("cuda", "off", True),
    ],
)
def test_a_model_is_compiled_where_asked_and_by_default_on_cuda(
    device: Device, compiled: Any, eager: bool, served: Callable[..., Any]
) -> None:
    assert served(replace(BOTH, compile=compiled), device).enforce_eager is eager


def test_on_a_cpu_steps_grow_with_the_cores_and_chats_never_fill_one(
    served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    for cores in (1, 2, 4, 16, 64, 192):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        values = served(BOTH)
        steps = options_of(values)
        assert 1 < values.max_num_seqs < steps.step_tokens
        assert steps.step_tokens <= steps.embed_step_tokens == values.max_num_batched_tokens
        alone = served(GENERATE).max_num_batched_tokens
        assert alone == steps.step_tokens  # chats wait no longer for it beside embeddings
        tokens.append(alone)
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[3]
    assert 32 <= tokens[0] <= tokens[-1] <= 2048


def test_steps_are_longer_where_weights_in_4_bits_meet_integers(
    served: Callable[..., Any], read_by_vllm: Callable[[list[str]], Any], tmp_path: Path
) -> None:
    plain = served(GENERATE).max_num_batched_tokens
    packed = {"method": "finequant"}
    quantized = replace(GENERATE, quantization=ServingOptions(load=packed))
    assert served(quantized).max_num_batched_tokens == 4 * plain
    for slower in (
        replace(GENERATE, quantization=ServingOptions(load=packed, activations="float")),
        replace(quantized, compile="on"),
    ):
        assert served(slower).max_num_batched_tokens == plain
    for passed in ({"enable_lora": True}, {"tensor_parallel_size": 2}):
        assert served(quantized, **passed).max_num_batched_tokens == plain
    eight = replace(GENERATE, quantization=ServingOptions(load={"method": "rtn", "bits": 8}))
    assert plain < served(eight).max_num_batched_tokens < 4 * plain
    made = {"matrices": {"a": {"bits": 4}, "b": {"bits": 8}}}
    most = {"matrices": {"a": {"bits": 8}, "b": {"bits": 8}, "c": {"bits": 4}}}
    for config, expected in (
        ({"quantization_config": {"quant_method": "galley", **made}}, 4 * plain),
        ({"quantization_config": {"quant_method": "compressed-tensors", "galley": made}}, 4 * plain),
        (
            {"quantization_config": {"quant_method": "galley", **most}},
            served(eight).max_num_batched_tokens,
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, plain),
        ({}, plain),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        values = read_by_vllm(server_arguments(GENERATE, tmp_path, "cpu"))
        assert values.max_num_batched_tokens == expected


def test_without_a_compiler_nothing_is_made_longer(
    served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = replace(GENERATE, quantization=ServingOptions(load={"method": "finequant"}))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert served(quantized).max_num_batched_tokens == served(GENERATE).max_num_batched_tokens


@pytest.mark.parametrize(
    ("tree", "device", "expected"), [("auto", "cpu", "off"), ("on", "cpu", "on"), ("auto", "cuda", "auto")]
)
def test_drafts_are_chains_where_weights_in_4_bits_meet_integers(
    tree: Any, device: Device, expected: str, served: Callable[..., Any]
) -> None:
    drafting = replace(BOTH, speculation=SpeculationOptions(tree=tree))
    quantized = replace(drafting, quantization=ServingOptions(load={"method": "finequant"}))
    for spec, wanted in ((drafting, tree), (quantized, expected)):
        speculation = options_of(served(spec, device)).speculation
        assert speculation is not None
        assert speculation.tree == wanted


@pytest.mark.parametrize("cost", [None, 0.2])
@pytest.mark.parametrize(
    ("flag", "packed"), [("avx2", WIDENED_TOKEN_COST), ("avx512_vnni", COMPILED_TOKEN_COST)]
)
def test_a_token_is_dearer_beside_compiled_passes_unless_a_user_said(
    cost: float | None,
    flag: str,
    packed: float,
    served: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "_processor_has", lambda *flags: flag in flags)
    drafting = replace(BOTH, speculation=SpeculationOptions(token_cost=cost))
    quantized = replace(drafting, quantization=ServingOptions(load={"method": "finequant"}))
    for spec, dtype, wanted in (
        (drafting, "bfloat16", cost),
        (drafting, "float32", cost or COMPILED_TOKEN_COST),
        (quantized, "bfloat16", cost or packed),
    ):
        speculation = options_of(served(spec, "cpu", dtype=dtype)).speculation
        assert speculation is not None
        assert speculation.token_cost == wanted


def test_steps_that_a_user_chose_stay_for_embeddings_too(served: Callable[..., Any]) -> None:
    values = served(BOTH, max_num_batched_tokens=100)
    assert values.max_num_batched_tokens == 100
    assert options_of(values).step_tokens == 100
    assert options_of(values).embed_step_tokens is None


def test_an_engine_for_embeddings_alone_has_long_steps(served: Callable[..., Any]) -> None:
    alone = replace(BOTH, tasks=frozenset({"embed"}), embedding=EmbeddingOptions(method="echo"))
    assert served(alone).max_num_batched_tokens > served(BOTH).max_num_batched_tokens


def test_vllms_own_pooling_runner_keeps_its_steps_which_hold_a_whole_prompt(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    values = served(replace(BOTH, tasks=frozenset({"embed"})))
    assert untouched(parser, values, "max_num_batched_tokens", "max_num_seqs")


@pytest.mark.parametrize(
    ("available", "cache"), [(2 * GiB, GiB // 2), (4 * GiB, GiB), (8 * GiB, 2 * GiB), (500 * GiB, 2 * GiB)]
)
def test_on_a_cpu_the_cache_takes_a_quarter_of_what_is_free_and_2_gib_at_most(
    available: int, cache: int, served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "available_bytes", lambda: available)
    assert served(BOTH).kv_cache_memory_bytes == cache


def test_a_builtin_model_brings_its_options_and_no_other_model_does(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    builtin = served(replace(BOTH, weights=BUILTIN))
    assert builtin.enable_auto_tool_choice
    assert builtin.tool_call_parser == "hermes"
    assert builtin.dtype == "float32"
    assert untouched(parser, served(BOTH), "enable_auto_tool_choice", "tool_call_parser", "dtype")


def test_packed_weights_keep_keys_and_values_in_16_bits_on_a_cpu(
    served: Callable[..., Any], parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_has_tiles", lambda: False)
    quantized = replace(BOTH, weights=BUILTIN, quantization=ServingOptions(load={"method": "finequant"}))
    as_floats = replace(quantized, quantization=ServingOptions({"method": "finequant"}, activations="float"))
    assert served(quantized).dtype == "bfloat16"
    assert served(quantized, dtype="float32").dtype == "float32"
    assert served(as_floats).dtype == "float32"
    assert untouched(parser, served(quantized, "cuda"), "dtype")
    monkeypatch.setattr(arguments, "_has_tiles", lambda: True)
    assert served(quantized).dtype == "float32"


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("max-model-len", 4096, 4096),
        ("max-num-seqs", 3, 3),  # over a default of Galley's
        ("kv-cache-memory-bytes", 1_000_000, 1_000_000),
        ("enforce-eager", False, False),
        ("disable-uvicorn-access-log", False, False),
        ("enable-prefix-caching", False, False),
        ("tool-strict-level", "function", "function"),
        ("dtype", "bfloat16", "bfloat16"),
        ("gpu-memory-utilization", 0.5, 0.5),
        ("seed", 0, 0),
        ("generation-config", "", ""),
        ("kv-cache-dtype-skip-layers", ["0", "5"], ["0", "5"]),
        ("cudagraph-capture-sizes", [1, 2, 4], [1, 2, 4]),
        ("logits-processors", ["a.B", "c.D"], ["a.B", "c.D"]),
        ("override-generation-config", {"temperature": 0.5, "stop": ["\n", "ü"]}, {"temperature": 0.5, "stop": ["\n", "ü"]}),
        ("limit-mm-per-prompt", {"image": 2}, {"image": 2}),
        ("hf-overrides", {"rope": {"factor": 2.0}}, {"is_matryoshka": True, "rope": {"factor": 2.0}}),
        ("hf-overrides", {"is_matryoshka": False}, {"is_matryoshka": False}),
        ("hf-overrides", None, {"is_matryoshka": True}),
        ("default-chat-template-kwargs", {"enable_thinking": False}, {"enable_thinking": False}),
        ("allowed-origins", ["https://a.example", "*"], ["https://a.example", "*"]),
        ("allowed-methods", ["GET"], ["GET"]),
        ("allowed-headers", [], []),
        ("allowed-origins", '["*"]', ["*"]),
        ("custom-histogram-buckets", [0.1, 1.0], [0.1, 1.0]),
        ("middleware", ["one.Two", "three.Four"], ["one.Two", "three.Four"]),
        ("middleware", "one.Two", ["one.Two"]),
        ("disable-log-stats", True, True),
        ("disable-log-stats", False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_user_passes_through_wins_and_arrives_as_it_was(
    name: str, value: Any, parsed: Any, device: Device, served: Callable[..., Any]
) -> None:
    assert getattr(served(BOTH, device, **{name: value}), name.replace("-", "_")) == parsed


def test_lora_modules_with_their_settings_arrive_whole(served: Callable[..., Any]) -> None:
    modules = [{"name": "sql", "path": "/a"}, {"name": "chef", "path": "/b", "base_model_name": "kitchen"}]
    values = served(BOTH, lora_modules=modules)
    assert [(each.name, each.path, each.base_model_name) for each in values.lora_modules] == [
        ("sql", "/a", None),
        ("chef", "/b", "kitchen"),
    ]


def test_on_a_cpu_one_place_for_adapters_stays_empty(served: Callable[..., Any]) -> None:
    modules = ["one=/a", "two=/b"]
    assert served(BOTH, enable_lora=True, lora_modules=modules).max_loras == 3
    assert served(BOTH, enable_lora=True, lora_modules=modules, max_loras=2).max_loras == 2
    assert served(BOTH, "cuda", enable_lora=True, lora_modules=modules).max_loras == 1


def test_none_takes_a_default_of_galleys_back(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    taken = {"tool-strict-level": None, "max-num-seqs": None, "scheduler-cls": None, "enforce-eager": None}
    values = served(BOTH, "cpu", **taken)
    assert untouched(parser, values, *(name.replace("-", "_") for name in taken))
    assert values.max_num_batched_tokens is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_every_switch_of_vllm_can_be_turned_on_and_off(wanted: bool, parser: argparse.ArgumentParser) -> None:
    kinds = (argparse.BooleanOptionalAction, argparse._StoreTrueAction)
    switches = {
        next(
            flag for flag in action.option_strings if flag.startswith("--") and not flag.startswith("--no-")
        ): action
        for action in parser._actions
        if isinstance(action, kinds)
    }
    assert len(switches) > 80
    engine = {flag.removeprefix("--"): wanted for flag in switches}
    values = parser.parse_args(server_arguments(replace(BOTH, engine=engine), "/models/some", "cpu"))
    assert {flag: getattr(values, action.dest) for flag, action in switches.items()} == dict.fromkeys(
        switches, wanted
    )


def test_every_list_of_words_of_vllm_arrives_as_a_list(parser: argparse.ArgumentParser) -> None:
    lists = [
        action
        for action in parser._actions
        if action.nargs == "+" and action.type is not None and not action.choices
    ]
    lists = [action for action in lists if "lora-modules" not in action.option_strings[0]]
    assert len(lists) > 10
    engine = {action.option_strings[0].removeprefix("--"): ["3", "4"] for action in lists}
    values = parser.parse_args(server_arguments(replace(BOTH, engine=engine), "/models/some", "cpu"))
    assert {action.dest: [str(item) for item in getattr(values, action.dest)] for action in lists} == {
        action.dest: ["3", "4"] for action in lists
    }


@pytest.mark.parametrize("method", ["mean", "last"])
def test_an_engine_for_both_tasks_keeps_chunked_prefill_and_prefix_caching(
    method: Any, llama: Path, read_by_vllm: Callable[[list[str]], Any], own_environment: None
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    spec = replace(BOTH, embedding=EmbeddingOptions(method=method), engine={"skip-tokenizer-init": True})
    values = read_by_vllm(server_arguments(spec, llama, "cpu"))
    config = AsyncEngineArgs.from_cli_args(values).create_engine_config()
    assert config.model_config.runner_type == "generate"
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert config.model_config.is_matryoshka
    found = PluginOptions.from_vllm_config(config)
    assert without_steps(found) == PluginOptions(embedding=EmbeddingOptions(method=method))


def speculating(tmp_path: Path, device: str, **options: Any) -> dict[str, Any]:
    spec = WorkerSpec("x", ("m",), 1, speculation=SpeculationOptions(**options))
    arguments = server_arguments(spec, tmp_path, device)  # type: ignore[arg-type]
    flags = [argument for argument in arguments if argument.startswith("--")]
    found = {flag: arguments[arguments.index(flag) + 1] for flag in flags if flag != arguments[-1]}
    found["config"] = json.loads(found["--speculative-config"])
    return found


def test_speculation_asks_each_runner_for_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    v1 = speculating(tmp_path, "cpu", max_draft_tokens=5)
    assert v1["config"]["method"] == "custom_class"
    assert v1["config"]["num_speculative_tokens"] == 5
    assert v1["--block-size"] == "32"
    assert "--block-size" not in speculating(tmp_path, "cpu", tree="off")
    for_v2 = {"method": "ngram_gpu", "num_speculative_tokens": 16}
    on_a_gpu = {**for_v2, "num_speculative_tokens_per_batch_size": draft_schedule(16)}
    assert speculating(tmp_path, "cuda")["config"] == on_a_gpu
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert speculating(tmp_path, "cpu")["config"] == for_v2


@pytest.mark.parametrize("most", [1, 6, 16, 96])
def test_on_a_gpu_drafts_shrink_as_the_batch_grows_and_end(most: int) -> None:
    """vLLM's own reading of the schedule: no step of full drafts has more rows than are nearly free."""
    lookup = build_dynamic_sd_schedule_lookup(draft_schedule(most), 256, most)
    assert lookup[1] == most
    assert all(size * (1 + lookup[size]) <= FREE_ROWS for size in range(1, 257) if lookup[size])
    assert lookup[1:] == sorted(lookup[1:], reverse=True)
    assert lookup[256] == 0
    assert len(set(lookup[1:])) <= 6  # each length has graphs of its own


def test_drafts_come_with_steps_whatever_the_worker_is_for(
    served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Galley's scheduler takes them out, whether or not the engine embeds as well."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    for spec in (BOTH, GENERATE):
        drafting = served(replace(spec, speculation=SpeculationOptions()))
        assert drafting.scheduler_cls == "galley_plugins.scheduling.make_scheduler"
    assert served(GENERATE).scheduler_cls is None


def test_without_speculation_nothing_is_drafted(tmp_path: Path) -> None:
    assert "--speculative-config" not in server_arguments(WorkerSpec("x", ("m",), 1), tmp_path, "cpu")


TP = EmbeddingOptions(method="token-prepending")


def test_a_batch_has_room_for_a_prompt_of_one_step_and_steps_are_as_small_as_before(
    served: Callable[..., Any],
) -> None:
    plain = served(BOTH)
    values = served(replace(BOTH, embedding=TP))
    assert values.max_num_batched_tokens == 2048 + values.max_num_seqs
    assert values.max_num_seqs == plain.max_num_seqs
    assert options_of(values).step_tokens == options_of(plain).step_tokens
    assert options_of(values).embed_step_tokens == options_of(plain).embed_step_tokens
    speculating = replace(BOTH, embedding=TP, speculation=SpeculationOptions(max_draft_tokens=8))
    values = served(speculating, max_num_seqs=10, max_num_batched_tokens=100)
    assert values.max_num_batched_tokens == 2048 + 10 * 9
    assert options_of(values).step_tokens == 100


def test_cuda_keeps_vllms_own_batch_which_is_larger(
    served: Callable[..., Any], parser: argparse.ArgumentParser
) -> None:
    values = served(replace(BOTH, embedding=TP), "cuda")
    assert untouched(parser, values, "max_num_batched_tokens")
    assert options_of(values).step_tokens is None


@pytest.mark.parametrize("openmp", [True, False])
def test_a_worker_alone_shares_the_engine_core_s_process(
    openmp: bool, served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "runs_intel_openmp", lambda _: openmp)
    assert served(BOTH).distributed_executor_backend == (arguments.ONE_PROCESS if openmp else None)
    assert served(BOTH, tensor_parallel_size=2).distributed_executor_backend is None
    assert served(BOTH, data_parallel_size=2).distributed_executor_backend is None
    assert served(BOTH, distributed_executor_backend="mp").distributed_executor_backend == "mp"
    assert served(BOTH, "cuda").distributed_executor_backend is None
