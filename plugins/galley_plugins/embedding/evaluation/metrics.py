"""Figures of merit of vectors: Spearman's correlation, nDCG, accuracy of a linear probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from galley_plugins.embedding.evaluation.data import Pairs, Retrieval


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """[rows, dimensions] with rows of length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: NDArray[np.float32] = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return found


def sts_spearman(first: NDArray[Any], second: NDArray[Any], pairs: Pairs) -> float:
    """Spearman's correlation of cosines with scores, times 100; 0 if all cosines are the same.

    Args:
        first, second: [pairs, dimensions]
    """
    from scipy.stats import spearmanr

    cosines = (unit(first) * unit(second)).sum(1)
    if np.ptp(cosines) == 0:
        return 0.0
    return float(spearmanr(cosines, pairs.scores).statistic) * 100


def ndcg(queries: NDArray[Any], documents: NDArray[Any], retrieval: Retrieval, depth: int = 10) -> float:
    """Mean normalised discounted cumulative gain at `depth`, times 100, over queries that have any gain.

    Args:
        queries, documents: [count, dimensions], in the order of `retrieval`.
    """
    names = list(retrieval.documents)
    ranked = np.argsort(-(unit(queries) @ unit(documents).T), axis=1, kind="stable")[:, :depth]
    found = []
    for row, query in enumerate(retrieval.queries):
        gains = retrieval.gains.get(query, {})
        best = _discounted(sorted(gains.values(), reverse=True)[:depth])
        if best > 0:
            found.append(_discounted([gains.get(names[place], 0.0) for place in ranked[row]]) / best)
    return float(np.mean(found)) * 100


def _discounted(gains: list[float]) -> float:
    return float(sum(gain / np.log2(place + 2) for place, gain in enumerate(gains)))


def probe_accuracy(
    train: NDArray[Any], train_labels: list[str], test: NDArray[Any], test_labels: list[str]
) -> float:
    """Accuracy of logistic regression on unit vectors, times 100.

    Args:
        train, test: [texts, dimensions]
    """
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=200, C=10.0)
    probe.fit(unit(train), train_labels)
    return float(probe.score(unit(test), test_labels)) * 100
