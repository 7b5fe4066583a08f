"""The configuration: where values come from, and what is said about wrong ones."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from galley.config import BUILTIN_MODEL, Config, ConfigError, ModelConfig, load

YAML = """
gateway:
  port: 9000
  timeouts: {idle: 7}
models:
  - name: one
    aliases: [uno]
    weights: /models/one
    replicas: 2
    tasks: [generate]
    engine: {max_model_len: 512, --dtype: float32}
  - name: two
    urls: ["http://10.0.0.1:8000", "http://10.0.0.2:8000/"]
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith("GALLEY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "galley.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(**arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**arguments)
    return caught.value.problems


def test_the_defaults_serve_the_builtin_model():
    config = load()
    [model] = config.models
    assert (model.name, model.weights, model.replicas) == ("smollm2", BUILTIN_MODEL, 1)
    assert model.tasks == {"generate", "embed"}
    assert (config.gateway.host, config.gateway.port) == ("127.0.0.1", 8000)


def test_a_file_is_read_whole(file):
    config = load(file(YAML))
    one, two = config.models
    assert config.gateway.port == 9000
    assert config.gateway.timeouts.idle == 7
    assert config.gateway.timeouts.connect == 5
    assert one.served_names == ("one", "uno")
    assert one.engine == {"max-model-len": 512, "dtype": "float32"}
    assert [str(url) for url in two.urls] == ["http://10.0.0.1:8000/", "http://10.0.0.2:8000/"]
    assert config.model_named("uno") is one
    assert config.model_named("three") is None


def test_flags_win_over_the_environment_and_that_over_the_file(file, monkeypatch):
    path = file(YAML)
    monkeypatch.setenv("GALLEY_GATEWAY__PORT", "9001")
    monkeypatch.setenv("GALLEY_GATEWAY__DRAIN_SECONDS", "5")
    assert load(path).gateway.port == 9001
    config = load(path, {"gateway": {"port": 9002}})
    assert config.gateway.port == 9002
    assert config.gateway.drain_seconds == 5
    assert config.gateway.timeouts.idle == 7


def test_an_empty_file_means_the_defaults(file):
    assert load(file("")).models[0].weights == BUILTIN_MODEL


def test_nothing_can_be_changed_afterwards():
    config = load()
    with pytest.raises(ValidationError):
        config.gateway.port = 1
    with pytest.raises(ValidationError):
        config.gateway = None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "gateway: {port: 70000}",
            "gateway.port: found 70000 (int); input should be less than or equal to 65535",
        ),
        ("gateway: {port: many}", "gateway.port: found 'many' (str); input should be a valid integer"),
        ("gateway: {prot: 1}", "gateway.prot: unknown setting"),
        ("gateways: {}", "gateways: unknown setting, expected one of gateway, worker, models"),
        ("gateway: {timeouts: {idle: 0}}", "gateway.timeouts.idle: found 0 (int)"),
        ("models: []", "models: found none, expected at least one"),
        ("models: [{weights: x}]", "models.0.name: missing"),
        ("models: [{name: '-x'}]", "models.0.name: found '-x' (str); expected letters, digits"),
        ("models: [{name: x, aliases: ['a b']}]", "models.0.aliases: found ['a b'] (list); expected letters"),
        ("models: [{name: x}, {name: y, aliases: [x]}]", "models: the name 'x' is used twice"),
        ("models: [{name: x, tasks: [draw]}]", "models.0.tasks.0: found 'draw' (str)"),
        ("models: [{name: x, tasks: []}]", "models.0.tasks: found"),
        (
            "models: [{name: x, engine: {port: 1}}]",
            "engine option 'port' is not passed through: chosen by galley",
        ),
        ("models: [{name: x, engine: 3}]", "models.0.engine: found 3 (int)"),
        ("models: [{name: x, urls: [nowhere]}]", "models.0.urls.0: found 'nowhere' (str)"),
        ("[1, 2]", "found list, expected a mapping of settings"),
        ("a: [", "not valid YAML"),
    ],
)
def test_each_problem_names_the_key_what_was_found_and_what_was_expected(file, text, problem):
    [found] = problems(path=file(text))
    assert problem in found


def test_all_problems_are_told_at_once(file):
    path = file("gateway: {port: -1, drain_seconds: -1}\nmodels: [{name: ''}]")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith(f"{path}: 3 problem(s)\n  ")


def test_a_file_that_cannot_be_read(tmp_path):
    [found] = problems(path=tmp_path / "none.yaml")
    assert found == "cannot be read: No such file or directory"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    [found] = problems(path=tmp_path / "binary.yaml")
    assert "not valid YAML" in found


def test_a_misspelt_variable_stops_the_start(monkeypatch):
    monkeypatch.setenv("GALLEY_GATWAY__PORT", "1")
    [found] = problems()
    assert found.startswith("GALLEY_GATWAY__PORT: unknown variable, expected GALLEY_GATEWAY")
    monkeypatch.delenv("GALLEY_GATWAY__PORT")
    monkeypatch.setenv("GALLEY_CACHE_DIR", "/tmp/x")
    load()


@pytest.mark.parametrize("name", ["GALLEY_FEW_ROWS", "GALLEY_PRELOAD"])
def test_variables_of_workers_that_the_readme_names_may_be_set(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    load()


def test_a_wrong_variable_is_named_by_its_key(monkeypatch):
    monkeypatch.setenv("GALLEY_GATEWAY__PORT", "many")
    [found] = problems()
    assert found.startswith("gateway.port: found 'many'")


def test_names_of_models_may_look_like_those_of_a_hub():
    assert ModelConfig(name="org/model-1.5:latest").name == "org/model-1.5:latest"
    with pytest.raises(ValidationError):
        ModelConfig(name="x" * 129)


def test_a_configuration_built_in_code_is_checked_as_well():
    with pytest.raises(ValidationError, match="'x' is used twice"):
        Config(models=(ModelConfig(name="x"), ModelConfig(name="x")))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{method: magic}", "models.0.speculation.method"),
        ("{max_draft_tokens: 0}", "models.0.speculation.max_draft_tokens"),
        ("{tre: off}", "models.0.speculation.tre"),
        ("{trigram: {depth: 1}}", "models.0.speculation.trigram.depth"),
    ],
)
def test_wrong_options_of_speculation_are_named(file, text, key):
    [problem] = problems(path=file(f"models: [{{name: m, speculation: {text}}}]"))
    assert problem.startswith(f"{key}:")


def test_a_model_that_only_embeds_cannot_speculate(file):
    [problem] = problems(path=file("models: [{name: m, tasks: [embed], speculation: {}}]"))
    assert "does not generate" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "models.0.memory.0.path: missing"),
        ("{path: m, weight: 2}", "models.0.memory.0.weight: found 2"),
        ("{path: m, name: a.b}", "models.0.memory.0.name: found 'a.b'"),
        ("[{path: m, name: a}, {path: n, nam: b}]", "models.0.memory.1.nam: unknown setting"),
        ("3", "models.0.memory: found 3"),
    ],
)
def test_wrong_options_of_a_memory_are_named(file, text, expected):
    [problem] = problems(path=file(f"models: [{{name: m, memory: {text}}}]"))
    assert problem.startswith(expected)


def test_memories_of_one_model_have_names_of_their_own(file):
    [problem] = problems(path=file("models: [{name: m, memory: [{path: a}, {path: b}]}]"))
    assert "has two of the name 'memory'" in problem


def test_a_model_that_only_embeds_has_no_distribution_for_a_memory(file):
    [problem] = problems(path=file("models: [{name: m, tasks: [embed], memory: {path: a}}]"))
    assert "memory: model 'm' does not generate" in problem
