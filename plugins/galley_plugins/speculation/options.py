"""What `speculation:` of the configuration may say; read in each process of the engine."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

Method = Literal["hybrid", "trigram", "recycling", "prompt-lookup", "self"]
Scope = Literal["request", "worker", "key"]
Tree = Literal["auto", "on", "off"]

STATS_VARIABLE = "GALLEY_SPECULATION_STATS"  # names the file that carries the counters to /metrics
MOST_DRAFT_TOKENS = 96
MiB = 1024 * 1024


def stats_path() -> Path:
    """A file for the counters of the server that this process becomes."""
    return Path(tempfile.gettempdir()) / f"galley-speculation-{os.getpid()}.stats"


def _check_bounds(options: Any, section: str, *bounds: tuple[str, float, float | None]) -> None:
    """Raises: ValueError naming an option outside its bounds."""
    for name, least, most in bounds:
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            expected = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"speculation.{section}.{name}: found {value}, expected {expected}")


@dataclass(frozen=True)
class TrigramOptions:
    """ADED's search; the defaults are the authors' (arXiv 2407.12021 and their code).

    Attributes:
        iterations: simulations of the tree search a step.
        depth: tokens that the search looks ahead.
        c1, c2: constants of the PUCT score.
        successors: how many of a bi-gram's successors a table loaded from a corpus keeps.
        paths: how many of the most visited paths become the draft.
        gain, cap: the adaptive update adds `gain` to every tri-gram of the window, up to `cap`.
        window: tokens of the text's end that each update covers.
    """

    iterations: int = 150
    depth: int = 4
    c1: float = 32.0
    c2: float = 8.0
    successors: int = 12
    paths: int = 24
    gain: float = 0.04
    cap: float = 3.0
    window: int = 16

    def __post_init__(self) -> None:
        _check_bounds(
            self,
            "trigram",
            ("iterations", 1, 100_000),
            ("depth", 2, 32),
            ("c1", 0, None),
            ("c2", 1e-6, None),
            ("successors", 1, 32),
            ("paths", 1, 256),
            ("gain", 0, None),
            ("cap", 1e-6, None),
            ("window", 3, 4096),
        )


@dataclass(frozen=True)
class SwiftOptions:
    """Constants of self-drafting; the defaults are the authors' (arXiv 2410.06916 and their eval_llama.sh).

    Attributes:
        skip_ratio: share of the middle layers' sub-layers that are skipped.
        draft_tokens: the most tokens of a draft.
        confidence: a draft ends after a token whose probability is below this.
        context_window: generated tokens that a skip set is scored on.
        bayes_interval: every so many proposals one comes from the surrogate, the others are random.
        enough: the search ends once a set scores more than this,
        patience: or after so many proposals in a row that were not better,
        iterations: or after so many in all.
        seed: of the proposals.
    """

    skip_ratio: float = 0.45
    draft_tokens: int = 25
    confidence: float = 0.8
    context_window: int = 50
    bayes_interval: int = 25
    enough: float = 0.93
    patience: int = 300
    iterations: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_bounds(
            self,
            "swift",
            ("skip_ratio", 0, 1),
            ("draft_tokens", 1, MOST_DRAFT_TOKENS),
            ("confidence", 0, 1),
            ("context_window", 1, 4096),
            ("bayes_interval", 1, None),
            ("enough", 0, 1),
            ("patience", 1, None),
            ("iterations", 0, None),
        )


@dataclass(frozen=True)
class SpeculationOptions:
    """Options of draft-verify speculation.

    Attributes:
        method: the drafter.
        max_draft_tokens: the most nodes a request's draft may have.
        tree: drafts may branch; `auto` where the runner verifies trees.
        scope: who shares what drafters learn: nobody beyond the request, all requests of the worker, or
            those of the same key.
        table_bytes: bound of the shared tables.
        tables: file to load the learned tables from at start and to save them to at the end; None keeps none.
        corpus: a table built by `galley speculation build-table`, for `trigram`.
        trigram: constants of the `trigram` drafter.
        swift: constants of the `self` drafter.
        token_cost: what a token costs, over what a step takes whatever its tokens, as long as `hybrid` has
            not measured it; None is the usual for how the weights are multiplied.
    """

    method: Method = "hybrid"
    max_draft_tokens: int = 16
    tree: Tree = "auto"
    scope: Scope = "worker"
    table_bytes: int = 64 * MiB
    tables: str | None = None
    corpus: str | None = None
    trigram: TrigramOptions = field(default_factory=TrigramOptions)
    swift: SwiftOptions = field(default_factory=SwiftOptions)
    token_cost: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("tree", Tree), ("scope", Scope)):
            if getattr(self, name) not in get_args(kind):
                expected = ", ".join(get_args(kind))
                raise ValueError(
                    f"speculation.{name}: found {getattr(self, name)!r}, expected one of {expected}"
                )
        if not 1 <= self.max_draft_tokens <= MOST_DRAFT_TOKENS:
            raise ValueError(
                f"speculation.max_draft_tokens: found {self.max_draft_tokens}, "
                f"expected 1 to {MOST_DRAFT_TOKENS}"
            )
        if self.token_cost is not None and not 0 <= self.token_cost <= 1:
            raise ValueError(f"speculation.token_cost: found {self.token_cost}, expected 0 to 1")
        if self.table_bytes < MiB:
            raise ValueError(f"speculation.table_bytes: found {self.table_bytes}, expected at least {MiB}")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> SpeculationOptions:
        """Build from plain values, as JSON carries them.

        Raises:
            ValueError: an option is unknown or out of range, by its name.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"speculation: unknown option {', '.join(unknown)}, expected {', '.join(sorted(known))}"
            )
        values = dict(values)
        sections: dict[str, Any] = {}
        for name, kind in (("trigram", TrigramOptions), ("swift", SwiftOptions)):
            section = values.pop(name, None) or {}
            unknown = sorted(set(section) - {entry.name for entry in fields(kind)})
            if unknown:
                raise ValueError(f"speculation.{name}: unknown option {', '.join(unknown)}")
            sections[name] = kind(**section)
        return cls(**values, **sections)
