"""C++ files are built once for a machine, and where that fails callers have torch."""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from galley_kernels import compiler, w4a16_gemm
from galley_kernels.bench import random_matrix
from galley_kernels.quantized import cpu_gemm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(tmp_path / "cache"))
    compiler.load.cache_clear()
    yield
    compiler.load.cache_clear()


def source(folder: Path, body: str = "return 7;") -> Path:
    path = folder / "seven.cpp"
    path.write_text(f'extern "C" __attribute__((visibility("default"))) int seven() {{ {body} }}')
    return path


def test_a_file_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = compiler.load(source(tmp_path))
    assert built is not None
    assert built.seven() == 7
    compiler.load.cache_clear()
    monkeypatch.setattr(compiler, "_build", lambda *_: pytest.fail("built again"))
    again = compiler.load(source(tmp_path))
    assert again is not None
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


def test_a_changed_file_is_built_anew(tmp_path: Path) -> None:
    assert compiler.load(source(tmp_path)) is not None
    compiler.load.cache_clear()
    changed = compiler.load(source(tmp_path, "return 8;"))
    assert changed is not None
    assert changed.seven() == 8


def test_libraries_share_nothing_of_inline_functions(tmp_path: Path) -> None:
    # A processor's code and another's are both loaded where they are compared.
    inline = "inline int& kept() {{ static int value = {}; return value; }}\n"
    found = []
    for value in (7, 8):
        path = source(tmp_path, "return kept();")
        path.write_text(inline.format(value) + path.read_text())
        built = compiler.load(path)
        assert built is not None
        found.append(built.seven())
        compiler.load.cache_clear()
    assert found == [7, 8]


@pytest.mark.parametrize("how", ["no compiler", "an error", "no cache"])
def test_without_a_build_there_is_a_warning(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = "return 7;"
    if how == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif how == "an error":
        body = "return seven_and_a_half;"
    else:
        (tmp_path / "cache").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        assert compiler.load(source(tmp_path, body)) is None
    assert "left to torch" in caplog.text
    if how == "an error":
        assert "seven_and_a_half" in caplog.text
        assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_products_fall_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_gemm.available.cache_clear()
    cpu_gemm._library.cache_clear()
    try:
        matrix, x = random_matrix(64, 24, 4, 32, torch.float32, "cpu"), torch.randn(3, 64)
        assert torch.allclose(w4a16_gemm(x, matrix), x @ matrix.dequantize().T, atol=1e-5)
    finally:
        cpu_gemm.available.cache_clear()
        cpu_gemm._library.cache_clear()


def test_panels_of_a_large_product_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "PANEL_BYTES", 10 * 4 * 64)  # ten outputs
    matrix = random_matrix(64, 33, 4, 32, torch.bfloat16, "cpu", 0.05)
    x = torch.randn(cpu_gemm.FEW_ROWS + 1, 64)
    found = w4a16_gemm(x, matrix, implementation="cpu")
    assert torch.allclose(found, x @ matrix.dequantize().T, atol=1e-5)
