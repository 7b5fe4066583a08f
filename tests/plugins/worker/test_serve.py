from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins.worker import serve
from galley_plugins.worker.arguments import server_arguments
from galley_plugins.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Starts the server up to the point where vLLM would run it; gives what it would run with."""

    def start(**engine: Any) -> list[Any]:
        from vllm.entrypoints.cli.serve import ServeSubcommand

        runs: list[Any] = []
        monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(runs.append))
        options = {name.replace("_", "-"): value for name, value in engine.items()}
        spec = WorkerSpec(weights="some/model", names=("kitchen",), port=8001, engine=options)
        monkeypatch.setattr(sys, "argv", ["serve", *server_arguments(spec, "/models/some", "cpu")])
        serve.main()
        return runs

    return start


def test_the_launchers_arguments_become_vllms_server(served: Callable[..., list[Any]]) -> None:
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    (arguments,) = served(max_model_len=512)
    assert (arguments.model, arguments.port, arguments.max_model_len) == ("/models/some", 8001, 512)
    assert arguments.served_model_name == ["kitchen"]
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_arguments_that_contradict_each_other_are_refused_before_anything_runs(
    served: Callable[..., list[Any]],
) -> None:
    with pytest.raises(TypeError, match="--enable-auto-tool-choice requires --tool-call-parser"):
        served(enable_auto_tool_choice=True)


def test_another_vllm_is_refused_before_it_is_imported() -> None:
    program = """
import sys
from galley_plugins import vllm_compat
vllm_compat.vllm_version = lambda: "0.33.0"
from galley_plugins.worker import serve
try:
    serve.main()
except vllm_compat.IncompatibleVllmError as error:
    print(error, "vllm" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "found vLLM 0.33.0, expected 0.32.* False\n"
