"""What is asked of llm-compressor and what is made of its answers; a script stands for it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from loadtest import llmcompressor_peer
from loadtest.llmcompressor_peer import PeerOptions, environment, quantized
from loadtest.peer_environments import PeerError

if TYPE_CHECKING:
    from pathlib import Path

ANSWERS = """
import json, sys, torch
from safetensors.torch import save_file
request = json.load(sys.stdin)
rows = torch.tensor([len(request["sequences"]), request["group_size"]])
save_file({"layer": rows.float()}, request["out"])
print("said on the way")
print(json.dumps({"seconds": 2.5, "cpu_seconds": 5, "threads": 2}))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script of the peer, with this interpreter in its environment."""
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(tmp_path / "cache"))
    python = environment().folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = tmp_path / "program.py"
    monkeypatch.setattr(llmcompressor_peer, "PROGRAM", path)
    path.write_text(ANSWERS)
    return path


@pytest.mark.usefixtures("program")
def test_only_gptq_is_given_sequences(tmp_path: Path) -> None:
    for method, count in (("rtn", 0), ("gptq", 2)):
        found = quantized(tmp_path, PeerOptions(method, 64), [[1, 2], [3]])
        assert (found.seconds, found.cpu_seconds, found.threads) == (2.5, 5, 2)
        assert torch.equal(found.weights["layer"], torch.tensor([count, 64.0]))


def test_a_peer_that_fails_says_why(program: Path, tmp_path: Path) -> None:
    program.write_text("raise ValueError('576 columns in groups of 128')")
    with pytest.raises(PeerError, match=r"group_size=128.*ValueError: 576 columns in groups of 128"):
        quantized(tmp_path, PeerOptions("rtn", 128))
    program.write_text("print('hello')")
    with pytest.raises(PeerError, match="found 'hello"):
        quantized(tmp_path, PeerOptions("rtn"))


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        PeerError, match=r"llmcompressor-.*is not there: `python loadtest/quantization_peers.py`"
    ):
        quantized(tmp_path, PeerOptions("rtn"))


def test_bits_count_scales() -> None:
    assert PeerOptions("gptq", 64).bits_per_weight(576) == 4.25
    assert PeerOptions("rtn").bits_per_weight(64) == 4.25
    assert json.dumps(vars(PeerOptions("rtn"))) == '{"method": "rtn", "group_size": 0, "bits": 4}'
