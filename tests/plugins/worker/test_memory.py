from __future__ import annotations

import psutil

from galley_plugins.worker.memory import available_bytes


def test_without_a_limit_it_is_what_the_machine_has_free(tmp_path):
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path) > 1_000_000


def test_a_containers_limit_counts_less_what_it_uses_already(tmp_path):
    (tmp_path / "memory.max").write_text("6000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert available_bytes(tmp_path) == 4_000_000


def test_cached_files_can_be_given_back_and_so_are_free(tmp_path):
    (tmp_path / "memory.max").write_text("6000000\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 2500000\nactive_file 500000\n")
    assert available_bytes(tmp_path) == 3_500_000


def test_a_container_at_its_limit_has_nothing_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert available_bytes(tmp_path) == 0
