from __future__ import annotations

import numpy as np
import pytest

from galley_plugins.embedding.evaluation.data import Pairs, Retrieval
from galley_plugins.embedding.evaluation.metrics import ndcg, probe_accuracy, sts_spearman


def test_spearman_by_hand() -> None:
    """Cosines 1, 0.6, 0 against scores ranked 1, 3, 2: rho = 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5."""
    first = np.array([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    second = np.array([[5.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    assert sts_spearman(first, second, Pairs(["a"] * 3, ["b"] * 3, [5.0, 1.0, 2.0])) == pytest.approx(50)


def test_vectors_that_are_all_the_same_correlate_with_nothing() -> None:
    """As every prompt's last token does before the first layer."""
    same = np.full((4, 3), 0.1)
    assert sts_spearman(same, same, Pairs(["a"] * 4, ["b"] * 4, [5.0, 1.0, 2.0, 3.0])) == 0


def test_ndcg_by_hand() -> None:
    """Ranked c, a, b with gains a 1, b 3: DCG = 1/log2(3) + 3/log2(4); the best order gives 3 + 1/log2(3)."""
    documents = {"a": "", "b": "", "c": ""}
    retrieval = Retrieval(documents, {"q": "", "nothing": ""}, {"q": {"a": 1.0, "b": 3.0}})
    queries = np.array([[1.0, 0.0], [1.0, 0.0]])
    vectors = np.array([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
    found = (1 / np.log2(3) + 3 / 2) / (3 + 1 / np.log2(3))
    assert ndcg(queries, vectors, retrieval) == pytest.approx(100 * found)
    assert ndcg(queries, vectors, retrieval, depth=1) == 0


def test_a_probe_separates_what_is_separable() -> None:
    random = np.random.default_rng(3)
    centres = np.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    labels = [str(number % 3) for number in range(90)]
    vectors = np.array([centres[int(label)] for label in labels]) + random.normal(size=(90, 3)) * 0.3
    assert probe_accuracy(vectors[:60], labels[:60], vectors[60:], labels[60:]) == 100
    assert probe_accuracy(vectors[:60], labels[:60], vectors[60:], [*labels[61:], "0"]) < 50
