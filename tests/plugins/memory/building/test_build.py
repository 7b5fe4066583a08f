"""Builds end to end: what is made, what is made again, and what the end of the process leaves."""

from __future__ import annotations

import contextlib
import json
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from galley_plugins.memory.building.build import STAGES, Build, BuildOptions
from galley_plugins.memory.building.datastore import HELD_LIKELIHOODS
from galley_plugins.memory.building.stages import DONE, Stage, StageError, alone
from galley_plugins.memory.building.training import HeldOut, Schedule
from galley_plugins.memory.checkpoint import Base, check_base, load_network, load_settings, output_rows
from tests.plugins.memory.conftest import HIDDEN, LAYERS, VOCABULARY, save_model, sentences, word_tokenizer
from tests.support.killed_build import run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEDULE = Schedule(alpha=0.3, lr=1e-2, batch=128, epochs=2)


class Told:
    """What a build tells."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.there: list[str] = []
        self.rows: list[str] = []
        self.done: dict[str, int] = {}
        self.totals: dict[str, int | None] = {}

    def stage(self, name: str, total: int | None) -> Callable[[int], None]:
        self.made.append(name)
        self.totals[name], self.done[name] = total, 0

        def advance(count: int) -> None:
            self.done[name] += count

        return advance

    def reused(self, name: str) -> None:
        self.there.append(name)

    def bad_row(self, what: str) -> None:
        self.rows.append(what)

    def scored(self, step: int, mix: Any) -> None:
        pass


def built(options: BuildOptions, until: str = STAGES[-1]) -> Told:
    told = Told()
    Build(options, told).run(until)
    return told


@pytest.fixture(scope="module")
def plain(model_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildOptions:
    """A build that has run."""
    options = BuildOptions(
        corpus_file, tmp_path_factory.mktemp("memory") / "out", model_folder, context=16, neighbours=20,
        hidden=24, device="cpu", schedule=SCHEDULE,
    )  # fmt: skip
    told = built(options)
    assert told.made == list(STAGES)
    assert told.there == []
    assert {name: total for name, total in told.totals.items() if name not in ("index", "weigh")} == {
        name: told.done[name] for name in ("tokens", "datastore", "teacher", "train")
    }
    return options


def test_a_build_is_a_memory_of_its_model(plain: BuildOptions) -> None:
    assert sorted(path.name for path in plain.out.iterdir()) == sorted([*STAGES, "memory"])
    base = Base.of(plain.model)
    settings = check_base(plain.out / "memory", base)
    assert settings.layer == LAYERS - 1
    assert settings.sizes.hidden == 24
    assert settings.corpus["documents"] <= 60
    network, columns = load_network(plain.out / "memory", settings)
    # The words of the corpus, and not all of the vocabulary
    words = sorted({token for text in sentences(60) for token in word_tokenizer()(text)["input_ids"]})
    assert columns is not None
    assert set(columns.tolist()) <= set(words)
    datastore = Stage(plain.out / "datastore", {})
    mix = HeldOut(datastore, HIDDEN, columns).score(network, settings.weight)
    assert mix.nats == pytest.approx(settings.training["mix"]["nats"], abs=1e-3)
    likelihoods = datastore.read(HELD_LIKELIHOODS, "float32")
    assert settings.training["mix"]["plain"] == pytest.approx(-float(likelihoods.mean()), abs=1e-5)
    assert mix.nats < mix.plain - 0.3  # it has learned something
    assert 0 < settings.weight <= 1
    assert settings.training["teacher"]["k"] == 20


def test_what_is_there_is_not_made_again(plain: BuildOptions) -> None:
    before = {path: path.stat().st_mtime_ns for path in plain.out.rglob("*")}
    told = built(plain)
    assert told.made == []
    assert told.there == list(STAGES)
    assert {path: path.stat().st_mtime_ns for path in plain.out.rglob("*")} == before


@pytest.mark.parametrize("until", STAGES[1:])
def test_a_command_stops_at_its_stage(until: str, plain: BuildOptions, tmp_path: Path) -> None:
    options = replace(plain, out=tmp_path / "out", schedule=replace(SCHEDULE, epochs=1))
    last = STAGES.index(until) + 1
    assert built(options, until).made == list(STAGES[:last])
    expected = [*STAGES[:last], *(["memory"] if until == "weigh" else [])]
    assert sorted(path.name for path in options.out.iterdir()) == sorted(expected)


CHANGES: list[tuple[dict[str, Any], str | None]] = [
    ({"layer": LAYERS - 1}, None),  # the last, by another name
    ({"context": 12}, "datastore"),
    ({"layer": 1}, "datastore"),
    ({"index": "flat"}, "index"),
    ({"neighbours": 10}, "teacher"),
    ({"temperature": 2.0}, "teacher"),
    ({"blocks": 2}, "train"),
    ({"head": "tied"}, "train"),
    ({"schedule": replace(SCHEDULE, seed=1)}, "train"),
    ({"weight": 0.125}, "weigh"),
    ({"held_out": 0.2}, "tokens"),
]


def test_changed_options_make_only_what_follows_from_them(plain: BuildOptions, tmp_path: Path) -> None:
    options = replace(plain, out=tmp_path / "out", schedule=replace(SCHEDULE, epochs=1))
    built(options)
    for change, first in CHANGES:
        if "schedule" in change:
            change = {"schedule": replace(options.schedule, seed=1)}
        kept = STAGES.index(first) if first is not None else len(STAGES)
        options = replace(options, **change) if first is not None else options
        told = built(replace(options, **change))
        assert told.made == list(STAGES[kept:]), change
        assert told.there == list(STAGES[:kept]), change
    settings = load_settings(options.out / "memory")
    assert settings.weight == 0.125
    assert settings.sizes.blocks == 2
    network, columns = load_network(options.out / "memory", settings, options.model)
    assert torch.equal(network.lm_head.weight, output_rows(options.model, columns))


def test_another_corpus_or_model_makes_it_anew(plain: BuildOptions, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentences(20)))
    options = replace(plain, out=tmp_path / "out", corpus=corpus, schedule=replace(SCHEDULE, epochs=1))
    built(options, "index")
    corpus.write_text("\n".join(sentences(20, seed=1)))
    assert built(options, "index").made == ["tokens", "datastore", "index"]
    other = replace(options, model=save_model(tmp_path / "model", seed=9))
    told = built(other, "index")
    assert (told.there, told.made) == (["tokens"], ["datastore", "index"])


def test_no_share_of_the_teacher_needs_none(plain: BuildOptions, tmp_path: Path) -> None:
    options = replace(plain, out=tmp_path / "out", schedule=Schedule(alpha=0.0, epochs=1, batch=128))
    assert built(options).made == ["tokens", "datastore", "train", "weigh"]
    assert "teacher" not in load_settings(options.out / "memory").training
    told = built(options, "teacher")  # but one may be asked for
    assert (told.there, told.made) == (["tokens", "datastore"], ["index", "teacher"])


def test_rows_that_are_wrong_are_told_and_counted(plain: BuildOptions, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(plain.corpus.read_text() + '{"text": 5}\n')
    told = built(replace(plain, out=tmp_path / "out", corpus=corpus), "tokens")
    assert [row.split(": ")[1] for row in told.rows] == ["expected a text, or a list of texts, in 'text'; found ['text']"]  # fmt: skip
    assert json.loads((tmp_path / "out" / "tokens" / DONE).read_text())["result"]["bad_rows"] == 1


def test_a_corpus_of_two_entries_is_enough(plain: BuildOptions, tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus.txt", tmp_path / "other.txt"
    corpus.write_text("a dog")
    other.write_text("the cat runs")
    for text in ("a dog", "a dog runs"):
        corpus.write_text(text)
        options = replace(plain, out=tmp_path / "out", corpus=corpus, held_out=other)
        built(options)
        assert load_settings(options.out / "memory").corpus["entries"] == len(text.split()) - 1


def test_a_model_of_the_gpt2_family_has_memories_too(plain: BuildOptions, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    options = replace(plain, out=tmp_path / "out", model=folder, hidden=None)
    built(options)
    assert check_base(options.out / "memory", Base.of(folder)).sizes.hidden == 64


def test_two_builds_do_not_share_a_folder(plain: BuildOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with alone(out), pytest.raises(StageError, match="another build at work"):
        Build(replace(plain, out=out), Told()).run("tokens")
    Build(replace(plain, out=out), Told()).run("tokens")
    assert (out / "tokens" / DONE).is_file()


def test_a_folder_of_something_else_is_refused(plain: BuildOptions, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StageError, match="found other files, expected a build to go on with, or nothing"):
        Build(replace(plain, out=tmp_path), Told())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, "held_out: found 1.0, expected a share between 0 and 1"),
        ({"index": "hnsw"}, "index: found 'hnsw', expected auto, flat or ivf-pq"),
        ({"head": "none"}, "head: found 'none', expected own or tied"),
        ({"weight": 1.5}, "weight: found 1.5, expected 0 to 1"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
        ({"context": 1}, "context: found 1, expected 2 or more"),
        ({"neighbours": 0}, "neighbours: found 0, expected 2 or more"),
        ({"layer": 4}, "layer: found 4, expected -4 to 3"),
        ({"blocks": -1}, "blocks: found -1, expected 0 or more"),
        ({"hidden": 0}, "hidden: found 0, expected 1 or more"),
        ({"device": "tpu"}, "device: found 'tpu', expected auto, cpu or cuda"),
    ],
)
def test_wrong_options_are_refused_by_name(change: dict[str, Any], message: str, plain: BuildOptions) -> None:
    with pytest.raises(ValueError, match=message):
        Build(replace(plain, **change), Told())


@contextlib.contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    """A disk that has no more room for a file than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_a_stage_and_leaves_those_before(plain: BuildOptions, tmp_path: Path) -> None:
    options = replace(plain, out=tmp_path / "out", index="ivf-pq", hidden=200)
    for place, (stage, size) in enumerate(
        [("tokens", 1000), ("datastore", 20_000), ("index", 20_000), ("teacher", 10_000), ("train", 100_000),
         ("weigh", 20_000)]
    ):  # fmt: skip
        file = "memory" if stage == "weigh" else f"{stage}/"
        with pytest.raises(StageError, match=f"no room for .*/out/{file}"), room_for_files_of(size):
            built(options)
        told = built(options, stage)
        assert told.there == list(STAGES[:place])
        assert told.made == [stage]
    assert load_settings(options.out / "memory").sizes.hidden == 200
    assert not list(options.out.rglob("*.partial"))
    assert not list(options.out.rglob("*.tmp"))


def assert_same(out: Path, expected: Path) -> None:
    for name in ("memory.safetensors", "galley_memory.json"):
        found, wished = ((folder / "memory" / name).read_bytes() for folder in (out, expected))
        if name.endswith(".json"):
            first, second = json.loads(found), json.loads(wished)
            for values in (first, second):
                assert values["training"].pop("seconds") >= 0
            assert first == second
        else:
            assert found == wished
    for stage in STAGES:
        files = {path.name for path in (out / stage).iterdir()}
        assert files == {path.name for path in (expected / stage).iterdir()}
        for name in files - {DONE, "network.safetensors"}:
            assert np.array_equal(
                np.fromfile(out / stage / name, np.uint8), np.fromfile(expected / stage / name, np.uint8)
            ), (stage, name)


KILLS = [
    ("tokens", "rename", 1),
    ("datastore", "note", 3),
    ("index", "rename", 0),
    ("teacher", "note", 2),
    ("teacher", "rename", 1),
    ("train", "checkpoint", 3),
    ("out", "rename", 0),  # the memory itself
]


def test_a_build_that_is_killed_again_and_again_ends_as_one_that_was_not(
    plain: BuildOptions, tmp_path: Path
) -> None:
    def arguments(out: Path) -> list[str]:
        return [
            "build", str(plain.corpus), str(out), "--model", str(plain.model), "--context", "16",
            "--neighbours", "20", "--hidden", "24", "--device", "cpu", "--alpha", "0.3", "--lr", "0.01",
            "--batch", "128", "--epochs", "2", "--index", "ivf-pq",
        ]  # fmt: skip

    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    assert run_command(arguments(whole)) == 0
    times: dict[str, int] = {}
    for kill in KILLS:
        assert run_command(arguments(out), kill) == -9, kill
        stage = STAGES.index(kill[0]) if kill[0] != "out" else len(STAGES) - 1
        for name in STAGES[:stage]:  # whole ones are not made again
            made = (out / name / DONE).stat().st_mtime_ns
            assert times.setdefault(name, made) == made, kill
        assert not (out / "memory").exists()
        assert not (out / STAGES[stage] / DONE).exists()
    assert run_command(arguments(out)) == 0
    assert_same(out, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
