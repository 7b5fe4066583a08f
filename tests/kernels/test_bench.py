"""The kernels' bench: it checks before it times, and measures nothing without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from galley_kernels import bench


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.PRODUCTS[4]
    monkeypatch.setattr(bench, "TOLERANCE", {torch.float32: 1e-5})
    monkeypatch.setitem(
        bench.PRODUCTS,
        4,
        lambda *given, implementation: (
            right(*given, implementation=implementation) * (1.01 if implementation == "torch" else 1)
        ),
    )
    found = bench.check("cpu", "torch")
    assert {each["operation"] for each in found if not each["good"]} == {"w4a16_gemm"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["bench", "--output", str(output)])
    with pytest.raises(SystemExit, match="found no GPU"):
        bench.main()
    assert not output.exists()


def test_what_was_recorded_on_a_gpu_passed_its_checks() -> None:
    for path in sorted(Path(bench.RESULTS).glob("*.json")):
        record = json.loads(path.read_text())
        assert record["checks"], path
        assert all(each["good"] for each in record["checks"])
        assert record["commit"]
