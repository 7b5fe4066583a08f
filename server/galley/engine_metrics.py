"""The engines' own metrics, scraped through the gateway: one valid exposition with a `worker` label on each
sample.
"""

from __future__ import annotations

import asyncio
import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from galley.metrics import WORKER_SCRAPE_UP

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Sequence

SCRAPE_SECONDS = 5.0  # half of Prometheus's default limit on the whole scrape

_OWN_WORKER_LABEL = re.compile(r'([{,]\s*)worker(\s*=\s*")')


@dataclass
class Family:
    """One metric family over all workers."""

    help: str = ""
    type: str = ""
    samples: list[str] = field(default_factory=list)


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def scraper() -> httpx.AsyncClient:
    """A client for scrapes; what is slow to make, the list of trusted certificates, is made once."""
    return httpx.AsyncClient(verify=_tls(), timeout=SCRAPE_SECONDS)


async def scrape(client: httpx.AsyncClient, url: str | None) -> str | None:
    """A worker's metrics as text; None if it gives none."""
    if url is None:
        return None
    try:
        answer = await client.get(f"{url}/metrics")
    except httpx.HTTPError:
        return None
    return answer.text if answer.status_code == 200 else None


async def merged_metrics(workers: Sequence[tuple[str, str | None]]) -> str:
    """Scrape all workers, given as (id, URL), at once; those that do not answer are left out and reported
    as down.
    """
    async with scraper() as client:
        texts = await asyncio.gather(*(scrape(client, url) for _, url in workers))
    found = [(worker, text) for (worker, _), text in zip(workers, texts, strict=True)]
    return merge((worker, text) for worker, text in found if text is not None) + _scrape_up(found)


def merge(expositions: Iterable[tuple[str, str]]) -> str:
    """Join the metrics of several workers, given as (id, text): each family once, each sample with its
    worker.
    """
    families: dict[str, Family] = {}
    for worker, text in expositions:
        _add(families, worker, text)
    lines: list[str] = []
    for name, family in families.items():
        if family.help:
            lines.append(f"# HELP {name} {family.help}")
        if family.type:
            lines.append(f"# TYPE {name} {family.type}")
        lines += family.samples
    return "".join(line + "\n" for line in lines)


def label_sample(line: str, worker: str) -> str:
    """Put a `worker` label first into a sample line; one it has already becomes `exported_worker`."""
    label = f'worker="{_escape(worker)}"'
    brace, space = line.find("{"), line.find(" ")
    if brace < 0 or 0 <= space < brace:
        return f"{line[:space]}{{{label}}}{line[space:]}"
    name, rest = line[:brace], line[brace:]
    if "worker" in rest:
        rest = _OWN_WORKER_LABEL.sub(r"\1exported_worker\2", rest, count=1)
    separator = "" if rest[1:].lstrip().startswith("}") else ","
    return f"{name}{{{label}{separator}{rest[1:]}"


def _add(families: dict[str, Family], worker: str, text: str) -> None:
    current = ""
    for line in text.split("\n"):
        if line.startswith("# "):
            _, kind, *rest = line.split(" ", 3)
            if kind not in ("HELP", "TYPE") or not rest:
                continue
            current = rest[0]
            family = families.setdefault(current, Family())
            value = rest[1] if len(rest) > 1 else ""
            if kind == "HELP":
                family.help = family.help or value
            else:
                family.type = family.type or value
        elif line.strip() and not line.startswith("#"):
            name = re.split(r"[{ ]", line, maxsplit=1)[0]
            owner = current if current and name.startswith(current) else name
            families.setdefault(owner, Family()).samples.append(label_sample(line, worker))


def _scrape_up(found: Sequence[tuple[str, str | None]]) -> str:
    lines = [
        f"# HELP {WORKER_SCRAPE_UP} 1 if the worker gave its metrics to this scrape.",
        f"# TYPE {WORKER_SCRAPE_UP} gauge",
    ]
    lines += [
        f'{WORKER_SCRAPE_UP}{{worker="{_escape(worker)}"}} {int(text is not None)}' for worker, text in found
    ]
    return "".join(line + "\n" for line in lines)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
