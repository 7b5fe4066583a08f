from __future__ import annotations

import pytest

from galley_plugins.embedding.evaluation.data import DataError, Labelled, Pairs
from galley_plugins.embedding.training.data import (
    AlikePairs,
    Blend,
    ClassPairs,
    ScoredPairs,
    TrainingData,
    spread,
)


def numbered(count: int) -> Pairs:
    """Pair n has texts of n + 1 characters, and the scores 0 to 4.9 in turn."""
    return Pairs(
        ["x" * (number + 1) for number in range(count)],
        ["y" * (number + 1) for number in range(count)],
        [number % 50 / 10 for number in range(count)],
    )


def test_every_pair_comes_once_an_epoch() -> None:
    source = ScoredPairs(numbered(50), 5, seed=1)
    epochs = [
        [text for place in range(10) for text in source.batch(10 * epoch + place).first] for epoch in (0, 1)
    ]
    for epoch in epochs:
        assert sorted(map(len, epoch)) == list(range(1, 51))
    assert epochs[0] != epochs[1]


def test_texts_and_scores_stay_together() -> None:
    pairs = numbered(40)
    batch = ScoredPairs(pairs, 8, seed=2).batch(3)
    assert batch.scores is not None
    for first, second, score in zip(batch.first, batch.second, batch.scores, strict=True):
        assert len(first) == len(second)
        assert score == pairs.scores[len(first) - 1]


def test_a_batch_has_texts_of_alike_lengths() -> None:
    """Of 64 pairs in batches of 8, all sorted together, each batch has eight neighbours."""
    source = ScoredPairs(numbered(64), 8, seed=3)
    for number in range(8):
        lengths = sorted(map(len, source.batch(number).first))
        assert lengths[-1] - lengths[0] == 7


def test_batches_follow_from_seed_and_number() -> None:
    source = ScoredPairs(numbered(50), 5, seed=4)
    found = [source.batch(number) for number in (17, 3, 44)]
    assert [ScoredPairs(numbered(50), 5, seed=4).batch(number) for number in (17, 3, 44)] == found
    assert ScoredPairs(numbered(50), 5, seed=5).batch(17) != found[0]


def test_only_pairs_that_say_the_same_are_positives() -> None:
    source = AlikePairs(numbered(100), 4, seed=0)
    for number in range(5):
        batch = source.batch(number)
        assert batch.scores is None
        assert all((len(text) - 1) % 50 >= 40 for text in batch.first)


def test_classes_come_once_in_a_batch() -> None:
    texts = Labelled([f"{label}{n}" for label in "abcde" for n in range(4)], list("aaaabbbbccccddddeeee"))
    source = ClassPairs(texts, 3, seed=0)
    for number in range(20):
        batch = source.batch(number)
        assert len({text[0] for text in batch.first}) == 3
        for first, second in zip(batch.first, batch.second, strict=True):
            assert first[0] == second[0]
            assert first != second
    assert len(ClassPairs(texts, 32, seed=0).batch(0).first) == 5


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_a_blend_takes_its_share_and_leaves_nothing_out(share: float, expected: int) -> None:
    pairs, texts = (
        ScoredPairs(numbered(50), 5, 0),
        ClassPairs(Labelled(["a", "b", "c", "d"], list("xxyy")), 2, 0),
    )
    batches = [Blend(pairs, texts, share).batch(number) for number in range(100)]
    assert sum(batch.scores is None for batch in batches) == expected
    scored = [batch for batch in batches if batch.scores is not None]
    assert scored == [pairs.batch(number) for number in range(100 - expected)]


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="found 7 pairs, expected at least the batch of 8"):
        ScoredPairs(numbered(7), 8, 0)
    with pytest.raises(DataError, match="found 1 classes of two texts or more, expected at least 2"):
        ClassPairs(Labelled(["a", "b", "c"], ["x", "x", "y"]), 4, 0)


def test_a_sample_is_spread_over_the_file() -> None:
    assert list(map(len, spread(numbered(100), 4).first)) == [1, 26, 51, 76]
    assert spread(numbered(3), 10).scores == numbered(3).scores


def test_a_folder_is_read_with_the_digest_of_what_is_trained_on(data: TrainingData, data_folder) -> None:
    assert (len(data.train), len(data.dev), len(data.test)) == (8, 8, 8)
    assert set(data.classes.labels) == {"animals", "people", "x"}
    with (data_folder / "sts" / "stsb_en_dev.csv").open("a") as file:
        file.write("a,b,1\n")
    assert TrainingData.read(data_folder).digest == data.digest
    with (data_folder / "cls" / "train.csv").open("a") as file:
        file.write("a,b\n")
    assert TrainingData.read(data_folder).digest != data.digest
