#!/usr/bin/env python
"""sentence-transformers without a server: reads waves of requests as JSON, writes the seconds that they took.

Requests run one after another, each on all cores, with neither HTTP nor a queue in between, which is less
than any server around it would add; texts of one request are one batch. Reads from stdin
`{"model": folder, "probe": text, "waves": [{"warm": [[text]], "requests": [[text]]}]}`, writes to stdout
`{"probe": vector, "waves": [{"seconds": s, "latencies": [s]}]}`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any


def main() -> None:
    job = json.load(sys.stdin)
    model = _load(job["model"])
    probe = _embed(model, [job["probe"]])[0]
    waves = [_wave(model, wave["warm"], wave["requests"]) for wave in job["waves"]]
    json.dump({"probe": probe.tolist(), "waves": waves}, sys.stdout)


def _load(folder: str) -> Any:
    """The mean over a text's tokens; by itself the library pools the last token of a text that is a chat."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    decoder = Transformer(
        folder,
        model_kwargs={"dtype": "float32"},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    pooling = Pooling(decoder.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[decoder, pooling], device="cpu")


def _wave(model: Any, warm: list[list[str]], requests: list[list[str]]) -> dict[str, Any]:
    for texts in warm:
        _embed(model, texts)
    ends = [time.perf_counter()]
    for texts in requests:
        _embed(model, texts)
        ends.append(time.perf_counter())
    latencies = [round(end - start, 5) for start, end in itertools.pairwise(ends)]
    return {"seconds": round(ends[-1] - ends[0], 5), "latencies": latencies}


def _embed(model: Any, texts: list[str]) -> Any:
    """[texts, hidden] float32"""
    return model.encode(texts, batch_size=len(texts), show_progress_bar=False, normalize_embeddings=True)


if __name__ == "__main__":
    main()
