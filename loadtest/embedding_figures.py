"""Figures of measured cells: gains in quality, lowest cosine, ratios of speeds, and tables of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from loadtest.embedding_servers import DUAL, IN_PROCESS, INFINITY, METHODS, OURS, PEERS, SERVERS, SLOWER, VLLM

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
"""A measured cell, as `bench_embeddings` writes it; `part` says what it measured."""

Rates = dict[str, dict[str, float]]
"""Texts a second by server and load."""

PARTS = ("quality", "cosine", "speed", "documents", "perplexity")
STS, MINILM, BASE = "sts", "minilm", "prompt-eol"
GAINS = {
    "tp_gain": "token-prepending",
    "gem_gain": "gem",
    "causal2vec_gain": "causal2vec",
    "nv_embed_gain": "nv-embed",
}
OVER = {
    "over_vllm_pooling": VLLM,
    "over_sentence_transformers": IN_PROCESS,
    "over_infinity": INFINITY,
}


def figures_of(rows: Sequence[Row], parts: Iterable[str]) -> dict[str, Any]:
    """What the benchmark says of the parts that were run; None where something was not measured."""
    found: dict[str, Any] = {}
    parts = set(parts)
    if "quality" in parts:
        found |= quality_figures(rows)
    if "cosine" in parts:
        found |= cosine_figures(rows)
    if "speed" in parts:
        found |= speed_figures(rates_of(rows))
    if "documents" in parts:
        found |= document_figures(rows)
    if "perplexity" in parts:
        found |= perplexity_figures(rows)
    return found


def qualities(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By method, the figures by task."""
    return {row["method"]: row["quality"] for row in rows if row["part"] == "method" and row["quality"]}


def quality_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """`*_gain` is a method's Spearman correlation on STS-B over PromptEOL's, in points."""
    sts = {method: figures[STS] for method, figures in qualities(rows).items() if STS in figures}
    base = sts.get(BASE)
    gains = {
        name: None if base is None or method not in sts else round(sts[method] - base, 3)
        for name, method in GAINS.items()
    }
    ours, theirs = sts.get("causal2vec"), sts.get(MINILM)
    ratio = None if ours is None or not theirs else round(ours / theirs, 4)
    return {**gains, "causal2vec_over_minilm": ratio, "sts": sts}


def cosine_figures(rows: Iterable[Row]) -> dict[str, Any]:
    lowest = {
        row["method"]: round(min(row["cosines"]), 6)
        for row in rows
        if row["part"] == "method" and row.get("cosines")
    }
    return {
        "reference_cosine_min": min(lowest.values(), default=None),
        "reference_cosine_min_by_method": lowest,
    }


def rates_of(rows: Iterable[Row]) -> Rates:
    """Medians over the repeats."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["part"] == "speed":
            for load, wave in row["waves"].items():
                found[row["server"]][load].append(wave["texts"] / wave["seconds"])
    return {
        server: {load: statistics.median(values) for load, values in loads.items()}
        for server, loads in found.items()
    }


def ratios(rates: Rates, server: str, other: str) -> dict[str, float]:
    """A server's texts a second over another's, by load; empty where one of them was not measured."""
    ours, theirs = rates.get(server, {}), rates.get(other, {})
    return {load: rate / theirs[load] for load, rate in ours.items() if load in theirs}


def speed_figures(rates: Rates) -> dict[str, Any]:
    """Ratios of texts a second: the geometric mean over the loads; `*_median`, `*_worst` the lowest.

    `dual_*` are the engine for chats and embeddings over the same peers. `*_time` is how many times as long a
    text takes as by mean, on that engine.
    """
    found: dict[str, Any] = {}
    for prefix, server in (("", OURS), ("dual_", DUAL)):
        for name, peer in OVER.items():
            found |= _summary(f"{prefix}{name}", ratios(rates, server, peer))
    for server, method in SLOWER.items():
        times = ratios(rates, DUAL, server)
        found[f"{method}_time"] = _geometric(times)
        found[f"{method}_time_by_load"] = {load: round(time, 3) for load, time in times.items()}
    return found


def document_figures(rows: Iterable[Row]) -> dict[str, Any]:
    row = next((row for row in rows if row["part"] == "documents"), None)
    if row is None:
        return {"document_failures": None}
    gaps, first = row["gap_ms"], row["first_token_ms"]
    return {
        "documents": row["documents"],
        "document_failures": len(row["failures"]),
        "document_tokens_per_second": round(row["documents"] * row["tokens"] / row["seconds"], 1),
        **{f"chat_gap_ms_{share}_alone": gaps["alone"][share] for share in ("p50", "p99")},
        **{f"chat_gap_ms_{share}_beside": gaps["beside"][share] for share in ("p50", "p99")},
        **{f"chat_gap_{share}_ratio": _ratio(gaps, share) for share in ("p50", "p99")},
        "chat_first_token_ms_p50_alone": first["alone"]["p50"],
        "chat_first_token_ms_p50_beside": first["beside"]["p50"],
    }


def perplexity_figures(rows: Iterable[Row]) -> dict[str, Any]:
    """`gem_perplexity_change` is relative to plain vLLM's."""
    row = next((row for row in rows if row["part"] == "perplexity"), None)
    if row is None:
        return {"gem_perplexity_change": None}
    plain, gem = row["plain"], row["gem"]
    return {
        "perplexity": round(plain, 4),
        "gem_perplexity": round(gem, 4),
        "gem_perplexity_change": round(abs(gem / plain - 1), 6),
    }


def markdown(rows: Sequence[Row]) -> str:
    """Tables: methods by task, and servers by load in tokens a second with Galley's ratio below."""
    tables = []
    found = qualities(rows)
    if found:
        tasks = list(dict.fromkeys(task for figures in found.values() for task in figures))
        names = [name for name in (*METHODS, MINILM) if name in found]
        tables.append(
            _table(
                ["method", *tasks], [[name, *(_shown(found[name].get(t)) for t in tasks)] for name in names]
            )
        )
    rates = rates_of(rows)
    if rates:
        loads = list(dict.fromkeys(load for by_load in rates.values() for load in by_load))
        lengths = {load: int(load.split("x")[0]) for load in loads}
        lines = [
            [name, *(_shown(rates[name].get(load), lengths[load]) for load in loads)]
            for name in SERVERS
            if name in rates
        ]
        for peer in PEERS:
            over = ratios(rates, OURS, peer)
            if over:
                lines.append([f"{OURS} / {peer}", *(_shown(over.get(load)) for load in loads)])
        tables.append(_table(["tokens/s", *loads], lines))
    return "\n\n".join(tables)


def _summary(name: str, by_load: dict[str, float]) -> dict[str, Any]:
    values = by_load.values()
    return {
        name: _geometric(by_load),
        f"{name}_median": round(statistics.median(values), 3) if values else None,
        f"{name}_worst": round(min(values), 3) if values else None,
    }


def _geometric(by_load: dict[str, float]) -> float | None:
    return round(statistics.geometric_mean(by_load.values()), 3) if by_load else None


def _ratio(spreads: dict[str, dict[str, Any]], share: str) -> float | None:
    alone, beside = spreads["alone"][share], spreads["beside"][share]
    return round(beside / alone, 3) if alone and beside else None


def _table(head: list[str], lines: list[list[str]]) -> str:
    every = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def _shown(value: float | None, times: float = 1.0) -> str:
    if value is None:
        return ""
    return f"{value * times:.0f}" if times > 1 else f"{value:.2f}"
