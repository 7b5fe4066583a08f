"""Galley's configuration: one YAML file, `GALLEY_*` environment over it, command-line flags over both.

Everything is validated once at start-up into frozen objects. A wrong value stops the start with a
`ConfigError` that names the key, what was found and what was expected.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

BUILTIN_MODEL = "builtin:smollm2-135m-instruct"
ENV_PREFIX = "GALLEY_"

MiB = 1024 * 1024
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has one line for each wrong key."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join([f"{source}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Timeouts(_Frozen):
    """Limits of one relayed request, in seconds. There is none on its total: long answers are legitimate."""

    connect: Seconds = 5.0
    first_byte: Seconds = Field(
        600.0, description="until the worker's first byte; a unary answer is one byte run"
    )
    idle: Seconds = Field(120.0, description="between two chunks of a stream")


class GatewayConfig(_Frozen):
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65_535, description="0 takes a free port")
    timeouts: Timeouts = Timeouts()
    max_body_bytes: int = Field(32 * MiB, ge=1024)
    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="how long a shutdown waits for running requests"
    )
    probe_seconds: Seconds = Field(2.0, description="between two health probes of a worker")
    count_stream_tokens: bool = Field(
        True,
        description="ask the worker for usage on every stream, and hide it from clients that did not ask",
    )
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = True


class EmbeddingConfig(_Frozen):
    """How `/v1/embeddings` turns texts into vectors."""

    method: Literal[
        "mean", "last", "prompt-eol", "token-prepending", "echo", "splade", "gem", "causal2vec", "nv-embed"
    ] = "mean"
    adapter: str | None = Field(
        None, min_length=1, description="folder of a trained adapter, which names its method"
    )
    prompt: str | None = Field(None, min_length=1, description="a template's name, or a template with {text}")
    clean: bool | None = Field(None, description="end texts as sentences, without quotation marks in them")
    start_layer: int | None = Field(None, ge=1)
    exit_layer: int | None = Field(None, ge=2)
    output_layer: int | None = Field(None, description="as transformers counts hidden states")
    instructions: dict[str, str] | None = Field(None, description="what input_type says to the model")
    instruction_template: str | None = Field(
        None, description="how an instruction is written, {instruction} in it"
    )
    normalize: bool = True
    weights: int | None = Field(None, ge=1, description="the most weights of a sparse vector")
    max_tokens: int | None = Field(None, ge=16, description="the longest prompt that has to run in one step")


class TrigramConfig(_Frozen):
    """Constants of the `trigram` drafter."""

    iterations: int = Field(150, ge=1, le=100_000, description="simulations of the tree search a step")
    depth: int = Field(4, ge=2, le=32)
    c1: float = Field(32.0, ge=0)
    c2: float = Field(8.0, gt=0)
    successors: int = Field(12, ge=1, le=32)
    paths: int = Field(24, ge=1, le=256)
    gain: float = Field(0.04, ge=0)
    cap: float = Field(3.0, gt=0)
    window: int = Field(16, ge=3, le=4096)


class SwiftConfig(_Frozen):
    """Constants of the `self` drafter."""

    skip_ratio: float = Field(0.45, ge=0, le=1, description="share of the middle sub-layers that are skipped")
    draft_tokens: int = Field(25, ge=1, le=96)
    confidence: float = Field(0.8, ge=0, le=1, description="a draft ends below this probability")
    context_window: int = Field(50, ge=1, le=4096)
    bayes_interval: int = Field(25, ge=1)
    enough: float = Field(0.93, ge=0, le=1)
    patience: int = Field(300, ge=1)
    iterations: int = Field(1000, ge=0)
    seed: int = 0


class SpeculationConfig(_Frozen):
    """Draft-verify speculation: the same output in fewer steps."""

    method: Literal["hybrid", "trigram", "recycling", "prompt-lookup", "self"] = "hybrid"
    max_draft_tokens: int = Field(16, ge=1, le=96, description="the most tokens drafted for a request a step")
    tree: Literal["auto", "on", "off"] = Field("auto", description="drafts may branch")
    scope: Literal["request", "worker", "key"] = Field("worker", description="who shares what is learned")
    table_bytes: int = Field(64 * MiB, ge=MiB)
    tables: Path | None = Field(None, description="learned tables are loaded from here and saved here")
    corpus: Path | None = Field(None, description="a table made by `galley speculation build-table`")
    trigram: TrigramConfig = TrigramConfig()
    swift: SwiftConfig = SwiftConfig()
    token_cost: float | None = Field(
        None, ge=0, le=1, description="a token's cost over a step's fixed one, until it was measured"
    )


class QuantizationConfig(_Frozen):
    """Weight-only quantization: while a model is loaded, and how packed weights are computed with."""

    method: Literal["rtn", "finequant", "easyquant", "finequant+easyquant"] | None = Field(
        None,
        description="how matrices are quantized while loading; without one they stay",
    )
    bits: Literal[4, 8] = 4
    group_size: int = Field(
        0, ge=0, multiple_of=8, description="where the method does not choose; 0 is a channel"
    )
    group_sizes: tuple[int, ...] = (128, 64, 32)
    shrink: float = Field(0.93, gt=0, le=1, description="what a smaller group must bring")
    sigma: float = Field(3.0, gt=0, le=100, description="where outliers begin, in standard deviations")
    steps: int = Field(100, ge=1)
    learning_rate: float = Field(0.01, gt=0, le=1)
    rules: dict[str, dict[str, Any] | None] = Field({}, description="other options for some, by pattern")
    activations: Literal["integer", "float"] = Field("integer", description="on a CPU, beside packed weights")
    output_bits: Literal[8] | None = Field(
        8, description="of the output layer on a CPU, beside packed weights"
    )


class MemoryConfig(_Frozen):
    """A memory that is mixed into the model's next-token distribution."""

    path: Path = Field(description="its folder, or that of the build")
    method: Literal["mlp", "knn-lm"] = Field("mlp", description="the trained memory, or the datastore itself")
    name: str = Field(
        "memory", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="what requests call it"
    )
    weight: float | None = Field(None, ge=0, le=1, description="its share; without one, that in its folder")


def _listed(value: Any) -> Any:
    """Accept one mapping in place of a list of one."""
    return [value] if isinstance(value, dict) else value


def _flag_name(value: Any) -> Any:
    """Accept `max_model_len` and `max-model-len` alike as the name of an engine option."""
    if not isinstance(value, dict):
        return value
    return {str(key).lstrip("-").replace("_", "-"): item for key, item in value.items()}


EngineOptions = Annotated[dict[str, Any], BeforeValidator(_flag_name)]

# Galley sets these itself; passing them through as well would start something else than was asked for.
RESERVED_ENGINE_OPTIONS = {
    "additional-config": "set by galley",
    "host": "workers listen on loopback",
    "model": "use weights:",
    "pooler-config": "use embedding:",
    "port": "chosen by galley",
    "runner": "use tasks:",
    "scheduler-cls": "set by galley",
    "served-model-name": "use name: and aliases:",
    "speculative-config": "use speculation:",
    "worker-cls": "set by galley",
}

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")


class ModelConfig(_Frozen):
    """One served model and the workers that serve it."""

    name: str
    aliases: tuple[str, ...] = ()
    weights: str = Field(BUILTIN_MODEL, min_length=1, description="builtin:NAME, a local path or a hub id")
    replicas: int = Field(1, ge=1, le=64)
    tasks: frozenset[Literal["generate", "embed"]] = Field(frozenset({"generate", "embed"}), min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile")
    embedding: EmbeddingConfig = EmbeddingConfig()
    speculation: SpeculationConfig | None = Field(None, description="draft and verify; off without it")
    quantization: QuantizationConfig = QuantizationConfig()
    memory: Annotated[tuple[MemoryConfig, ...], BeforeValidator(_listed)] = ()
    engine: EngineOptions = Field({}, description="any option of `vllm serve`, by its flag name")
    env: dict[str, str] = Field({}, description="environment variables of the worker")
    urls: tuple[HttpUrl, ...] = Field((), description="workers that run already; galley starts none then")

    @field_validator("name", "aliases", mode="after")
    @classmethod
    def _check_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not _NAME.match(name):
                raise ValueError(
                    "expected letters, digits and . _ / : - (128 at most), starting with one of the first two"
                )
        return value

    @field_validator("engine", mode="after")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        for option, instead in RESERVED_ENGINE_OPTIONS.items():
            if option in value:
                raise ValueError(f"engine option {option!r} is not passed through: {instead}")
        return value

    @model_validator(mode="after")
    def _check_speculation(self) -> ModelConfig:
        if self.speculation is not None and "generate" not in self.tasks:
            raise ValueError(f"speculation: model {self.name!r} does not generate")
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> ModelConfig:
        if self.memory and "generate" not in self.tasks:
            raise ValueError(f"memory: model {self.name!r} does not generate")
        names = [memory.name for memory in self.memory]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"memory: model {self.name!r} has two of the name {twice[0]!r}")
        return self

    @property
    def served_names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class WorkerConfig(_Frozen):
    """How workers are started and kept running."""

    ready_seconds: Seconds = Field(900.0, description="how long a worker may take to become ready")
    backoff_seconds: Seconds = Field(1.0, description="first wait before a dead worker is restarted; doubles")
    backoff_max_seconds: Seconds = 60.0
    stop_seconds: Seconds = Field(15.0, description="between asking a worker to stop and ending it")
    log_dir: Path | None = Field(None, description="default: logs/ in galley's cache folder")


def _default_models() -> tuple[ModelConfig, ...]:
    return (ModelConfig(name="smollm2"),)


class Config(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", protected_namespaces=()
    )

    gateway: GatewayConfig = GatewayConfig()
    worker: WorkerConfig = WorkerConfig()
    models: tuple[ModelConfig, ...] = Field(default_factory=_default_models)

    @model_validator(mode="after")
    def _check_models(self) -> Config:
        if not self.models:
            raise ValueError("models: found none, expected at least one")
        seen: set[str] = set()
        for model in self.models:
            for name in model.served_names:
                if name in seen:
                    raise ValueError(
                        f"models: the name {name!r} is used twice; names and aliases must be unique"
                    )
                seen.add(name)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
        )  # no .env file, no secrets folder; `load` adds the YAML file below

    def model_named(self, name: str) -> ModelConfig | None:
        return next((model for model in self.models if name in model.served_names), None)


# Variables read outside the configuration; any other unknown GALLEY_* name is a spelling mistake.
_OTHER_VARIABLES = {
    "GALLEY_API_KEY",
    "GALLEY_CACHE_DIR",
    "GALLEY_DATA",
    "GALLEY_DEVICE",
    "GALLEY_FEW_ROWS",
    "GALLEY_PRELOAD",
    "GALLEY_STATUS_FILE",
}


def load(path: Path | None = None, flags: dict[str, Any] | None = None) -> Config:
    """Read and validate the configuration.

    Args:
        path: the YAML file; None means the defaults (the built-in model on loopback).
        flags: nested values from the command line, e.g. `{"gateway": {"port": 8080}}`; they win.

    Raises:
        ConfigError: naming each wrong key, what was found and what was expected.
    """
    source = str(path) if path else "configuration"
    values = _read_yaml(path) if path else {}
    _check_environment()

    class Loaded(Config):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file_settings = InitSettingsSource(settings_cls, init_kwargs=values)
            return (named["init_settings"], named["env_settings"], file_settings)

    try:
        return Loaded(**(flags or {}))
    except ValidationError as error:
        raise ConfigError(source, [_describe(problem) for problem in error.errors()]) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"found {type(values).__name__}, expected a mapping of settings"])
    unknown = sorted(str(key) for key in values if key not in Config.model_fields)
    if unknown:
        expected = ", ".join(Config.model_fields)
        raise ConfigError(
            str(path), [f"{key}: unknown setting, expected one of {expected}" for key in unknown]
        )
    return values


def _check_environment() -> None:
    known = {ENV_PREFIX + field.upper() for field in Config.model_fields}
    expected = f"{', '.join(sorted(known))} (nested with __) or {', '.join(sorted(_OTHER_VARIABLES))}"
    problems = [
        f"{name}: unknown variable, expected {expected}"
        for name in sorted(os.environ)
        if name.startswith(ENV_PREFIX) and name.split("__")[0] not in known and name not in _OTHER_VARIABLES
    ]
    if problems:
        raise ConfigError("environment", problems)


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "configuration"
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown setting"
    if not problem["loc"]:
        return message
    found = problem["input"]
    return f"{key}: found {found!r} ({type(found).__name__}); {message[0].lower() + message[1:]}"
