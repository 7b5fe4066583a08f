import json
import sys
from pathlib import Path

import pytest

from galley_plugins.models import __main__ as command
from galley_plugins.models.builtin import BuiltinModel


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the command line in this process; gives (status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["models", *arguments])
        with pytest.raises(SystemExit) as end:
            command.main()
        return end.value.code, *capfd.readouterr()

    return run


def test_list_shows_what_is_unpacked(run, tiny: BuiltinModel, cache: Path) -> None:
    status, out, _ = run("list", "--json")
    assert status == 0
    entries = {entry["name"]: entry for entry in json.loads(out)}
    assert entries["builtin:smollm2-135m-instruct"]["licence"] == "Apache-2.0"
    path = str(cache / "models" / "tiny-1")
    expected = {"name": "builtin:tiny", "licence": "CC0-1.0", "size": 1_000_000, "path": path}
    assert entries["builtin:tiny"] == expected | {"state": "absent"}

    assert run("unpack", "tiny")[:2] == (0, f"{path}\n")
    assert f"builtin:tiny  CC0-1.0  1000000  ready  {path}\n" in run("list")[1]

    (Path(path) / "config.json").unlink()
    assert "damaged" in run("list")[1]


def test_unpack_prints_only_the_folder_on_stdout(run, tiny: BuiltinModel, cache: Path) -> None:
    for name in ("builtin:tiny", "tiny"):
        assert run("unpack", name)[:2] == (0, f"{cache}/models/tiny-1\n")


def test_errors_are_a_line_and_status_2(run, cache: Path) -> None:
    status, out, err = run("unpack", "nope")
    assert (status, out) == (2, "")
    assert err == "error: no built-in model is called 'nope'; known: builtin:smollm2-135m-instruct\n"
    assert run("unpack")[0] == 2
    assert run("no-such-command")[0] == 2


def test_help_names_the_commands_and_the_cache_folder(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for word in ("list", "unpack", "GALLEY_CACHE_DIR"):
        assert word in out
