from __future__ import annotations

import pytest

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.options import PluginOptions
from galley_plugins.worker.spec import WorkerSpec, parse

LEAST = ["--weights", "builtin:some", "--name", "some", "--port", "8001"]


def test_a_worker_does_both_tasks_on_whatever_device_unless_told_otherwise() -> None:
    assert parse(LEAST) == WorkerSpec(
        weights="builtin:some",
        names=("some",),
        port=8001,
        host="127.0.0.1",
        tasks=frozenset({"generate", "embed"}),
        device="auto",
        embedding=EmbeddingOptions(),
        compile="auto",
        engine={},
    )


def test_every_option_reaches_the_worker() -> None:
    flags = [
        "--name",
        "alias",
        "--host",
        "0.0.0.0",
        "--tasks",
        "embed",
        "--device",
        "cuda",
    ]
    flags += [
        "--embedding",
        '{"method": "last", "normalize": false}',
        "--compile",
        "off",
        "--engine",
        '{"max-model-len": 4096, "hf-overrides": {"a": [1]}}',
    ]
    assert parse([*LEAST, *flags]) == WorkerSpec(
        weights="builtin:some",
        names=("some", "alias"),
        port=8001,
        host="0.0.0.0",
        tasks=frozenset({"embed"}),
        device="cuda",
        embedding=EmbeddingOptions(method="last", normalize=False),
        compile="off",
        engine={"max-model-len": 4096, "hf-overrides": {"a": [1]}},
    )


@pytest.mark.parametrize(
    ("tasks", "method", "expected"),
    [
        ("generate,embed", "last", PluginOptions(embedding=EmbeddingOptions(method="last"))),
        (
            "embed",
            "last",
            PluginOptions(embedding=EmbeddingOptions(method="last"), vllm_pools=True, generate=False),
        ),
        ("embed", "echo", PluginOptions(embedding=EmbeddingOptions(method="echo"), generate=False)),
        ("generate", "last", PluginOptions()),
    ],
)
def test_vllm_itself_pools_only_plain_rows_where_nothing_is_generated(
    tasks: str, method: str, expected: PluginOptions
) -> None:
    spec = parse([*LEAST, "--tasks", tasks, "--embedding", f'{{"method": "{method}"}}'])
    assert spec.plugin_options() == expected


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ('{"path": "/m"}', (MemoryOptions("/m"),)),
        (
            '[{"path": "/m", "name": "wiki", "weight": 0.5}, {"path": "/n", "name": "code"}]',
            (MemoryOptions("/m", "wiki", 0.5), MemoryOptions("/n", "code")),
        ),
    ],
)
def test_memories_reach_the_plugins(flag: str, expected: tuple[MemoryOptions, ...]) -> None:
    spec = parse([*LEAST, "--memory", flag])
    assert spec.memory == expected
    assert spec.plugin_options().memory == expected


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [
        ([], False),
        (["--compile", "on"], True),
        (["--compile", "off"], False),
        (["--engine", '{"enforce-eager": false}'], True),
        (["--compile", "on", "--engine", '{"enforce-eager": true}'], False),
    ],
)
def test_an_engine_option_has_the_last_word_on_compiling(flags: list[str], compiled: bool) -> None:
    assert parse([*LEAST, *flags]).compiled is compiled


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks", "generate,rerank"],
            "--tasks: found 'generate,rerank', expected generate, embed or both",
        ),
        (["--tasks", ""], "--tasks: found '', expected generate, embed or both"),
        (["--tasks", "generate,"], "expected generate, embed or both"),
        (["--engine", "[1]"], "--engine: expected a JSON object"),
        (["--memory", "{}"], "--memory: memory.path: missing"),
        (["--memory", "3"], "--memory: memory: found int, expected path, name, weight"),
        (
            ["--memory", '{"path": "/m"}', "--tasks", "embed"],
            "--memory: only a model that generates has a distribution to mix into",
        ),
        (["--engine", "{max-model-len: 1}"], "--engine"),
        (["--device", "tpu"], "--device"),
        (["--pooling", "max"], "--pooling"),
        (["--port", "http"], "--port"),
        (["--temperature", "1"], "--temperature"),
    ],
)
def test_a_wrong_command_line_names_the_option_and_exits_with_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*LEAST, *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--weights", "--name", "--port"])
def test_what_has_no_default_is_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = LEAST.index(missing)
    with pytest.raises(SystemExit) as end:
        parse(LEAST[:at] + LEAST[at + 2 :])
    assert end.value.code == 2
    assert missing in capsys.readouterr().err
