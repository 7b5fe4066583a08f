from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys

import pytest

from galley.config import ModelConfig
from galley.launch import worker_command, worker_environment


def test_the_command_names_everything_the_model_is_configured_with():
    model = ModelConfig(
        name="m",
        aliases=("a", "b"),
        weights="/models/m",
        tasks=frozenset({"embed"}),
        device="cpu",
        compile="off",
        embedding={"method": "last", "normalize": False},
        engine={"max_model_len": 2048, "--dtype": "float32"},
    )
    command = worker_command(model, "127.0.0.1", 4321)
    assert command[:3] == [sys.executable, "-m", "galley_plugins.worker"]
    pairs = list(itertools.pairwise(command[3:]))
    assert [value for flag, value in pairs if flag == "--name"] == ["m", "a", "b"]
    for flag, value in {
        "--weights": "/models/m",
        "--host": "127.0.0.1",
        "--port": "4321",
        "--tasks": "embed",
        "--device": "cpu",
        "--compile": "off",
    }.items():
        assert (flag, value) in pairs
    assert json.loads(command[command.index("--embedding") + 1]) == {"method": "last", "normalize": False}
    assert json.loads(command[command.index("--engine") + 1]) == {"max-model-len": 2048, "dtype": "float32"}


def test_the_worker_package_reads_the_command_as_it_was_meant():
    from galley_plugins.worker.spec import parse

    model = ModelConfig(name="m", engine={"max-model-len": 64}, embedding={"method": "last"})
    spec = parse(worker_command(model, "127.0.0.1", 1)[3:])
    assert spec.names == ("m",)
    assert spec.tasks == {"generate", "embed"}
    assert spec.embedding.method == "last"
    assert spec.embedding.normalize
    assert spec.engine == {"max-model-len": 64}


def test_a_worker_inherits_the_environment_but_not_the_gateways_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("GALLEY_GATEWAY__PORT", "1")
    monkeypatch.setenv("GALLEY_CACHE_DIR", "/cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ModelConfig(name="m", env={"OMP_NUM_THREADS": "2"})
    environment = worker_environment(model, tmp_path / "status")
    assert "GALLEY_GATEWAY__PORT" not in environment
    assert environment["GALLEY_CACHE_DIR"] == "/cache"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["GALLEY_STATUS_FILE"] == str(tmp_path / "status")
    assert environment["GALLEY_PARENT_PID"] == str(os.getpid())
    alone = worker_environment(model)
    assert "GALLEY_PARENT_PID" not in alone
    assert "GALLEY_STATUS_FILE" not in alone


def test_speculation_reaches_the_worker_as_it_was_configured():
    from galley_plugins.speculation.options import SpeculationOptions, TrigramOptions
    from galley_plugins.worker.spec import parse

    plain = ModelConfig(name="m")
    assert "--speculation" not in worker_command(plain, "127.0.0.1", 4321)
    assert parse(worker_command(plain, "127.0.0.1", 4321)[3:]).speculation is None
    model = ModelConfig(
        name="m",
        speculation={
            "method": "trigram",
            "scope": "key",
            "tables": "/var/tables",
            "trigram": {"iterations": 10},
        },
    )
    spec = parse(worker_command(model, "127.0.0.1", 4321)[3:])
    assert spec.speculation == SpeculationOptions(
        method="trigram", scope="key", tables="/var/tables", trigram=TrigramOptions(iterations=10)
    )


def test_gateway_and_worker_agree_on_the_defaults_of_speculation():
    from galley.config import SpeculationConfig
    from galley_plugins.speculation.options import SpeculationOptions

    assert SpeculationConfig().model_dump() == dataclasses.asdict(SpeculationOptions())


@pytest.mark.parametrize(
    "memory",
    [
        {"path": "/memories/wiki"},
        [
            {"path": "/memories/wiki", "name": "wiki", "weight": 0.5},
            {"path": "/memories/code", "name": "code"},
        ],
    ],
    ids=["one", "two"],
)
def test_memories_reach_the_worker_as_they_were_configured(memory):
    from galley_plugins.memory.options import MemoryOptions
    from galley_plugins.worker.spec import parse

    assert "--memory" not in worker_command(ModelConfig(name="m"), "127.0.0.1", 4321)
    model = ModelConfig(name="m", memory=memory)
    found = parse(worker_command(model, "127.0.0.1", 4321)[3:]).memory
    assert found == MemoryOptions.from_values(memory)


def test_gateway_and_worker_agree_on_the_defaults_of_a_memory():
    from galley.config import MemoryConfig
    from galley_plugins.memory.options import MemoryOptions

    assert MemoryConfig(path="/m").model_dump(mode="json") == dataclasses.asdict(MemoryOptions("/m"))


def test_quantization_reaches_the_worker_as_it_was_configured():
    from galley_plugins.quantization.plan import Plan
    from galley_plugins.quantization.serving_options import ServingOptions
    from galley_plugins.worker.spec import parse

    plain = ModelConfig(name="m")
    assert "--quantization" not in worker_command(plain, "127.0.0.1", 4321)
    assert parse(worker_command(plain, "127.0.0.1", 4321)[3:]).quantization == ServingOptions()
    rules = {"*.down_proj": {"bits": 8}, "*.layers.0.*": None}
    model = ModelConfig(
        name="m", quantization={"method": "finequant", "bits": 4, "rules": rules, "activations": "float"}
    )
    found = parse(worker_command(model, "127.0.0.1", 4321)[3:]).quantization
    assert found.activations == "float"
    assert found.plan() == Plan.from_values({"method": "finequant", "bits": 4}, list(rules.items()))


def test_gateway_and_worker_agree_on_the_defaults_of_quantization():
    from galley.config import QuantizationConfig
    from galley_plugins.quantization.options import QuantizationOptions
    from galley_plugins.quantization.serving_options import ServingOptions

    method = {**QuantizationOptions().to_values(), "group_sizes": (128, 64, 32), "method": None}
    assert QuantizationConfig().model_dump() == {**method, **ServingOptions().to_values()}
