"""An engine that drafts for itself and skips nothing: `python -m tests.support.self_drafting_whole WEIGHTS`.

The draft is then the model's own continuation, so all of it must be accepted, and every set must score 1.
Around each draft the cache is compared. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.models import resolve
from galley_plugins.options import PluginOptions
from galley_plugins.speculation.options import SpeculationOptions
from galley_plugins.speculation.stats import PLACES
from loadtest.servers import FLOAT32
from tests.e2e.texts import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS = 72
DRAFT = 12


def watch_cache(runner: Any) -> list[str]:
    """Complaints about drafts that change a block of tokens that were verified, or the values of one."""
    complaints: list[str] = []
    draft = runner.self_draft

    def watched(names: Sequence[str], limits: Sequence[int]) -> list[list[int]]:
        table, before = runner.input_batch.block_table[0], runner._arena.clone()
        chains: list[list[int]] = draft(names, limits)
        changed = (before != runner._arena).any(-1).any(0).nonzero()[:, 0].tolist()
        allowed = set(runner._scratch)
        for name in names:
            row = runner.input_batch.req_id_to_index[name]
            stored = int(runner.input_batch.num_tokens_no_spec[row]) - 1
            own = table.block_table.np[row, : table.num_blocks_per_row[row]].tolist()
            index, within = divmod(stored, table.block_size)
            allowed |= set(own[index:])
            for layer, cache in enumerate(runner.kv_caches):
                for block in own[index : index + 1]:
                    # [heads, keys and then values, width]; only values lie token by token
                    shape = (cache.shape[1], 2 * table.block_size, cache.shape[3] // 2)
                    one, other = before[layer, block].view(shape), runner._arena[layer, block].view(shape)
                    verified = slice(table.block_size, table.block_size + within)
                    if not (one[:, verified] == other[:, verified]).all():
                        complaints.append(f"layer {layer}: values below position {stored}")
        if not set(changed) <= allowed:
            complaints.append(f"blocks {sorted(set(changed) - allowed)}")
        return chains

    runner.self_draft = watched
    return complaints


def main() -> None:
    from vllm import LLM, SamplingParams

    options = SpeculationOptions(method="self", max_draft_tokens=DRAFT, tree="off")
    llm = LLM(
        model=str(resolve(sys.argv[1])),
        **{name.replace("-", "_"): value for name, value in FLOAT32.items()},
        block_size=32,
        enforce_eager=True,
        max_num_seqs=8,
        worker_cls="galley_plugins.runners.cpu_worker.GalleyCPUWorker",
        additional_config=PluginOptions(speculation=options).to_additional_config(),
        speculative_config={
            "method": "custom_class",
            "model": "galley_plugins.runners.speculation_v1.PassiveProposer",
            "num_speculative_tokens": DRAFT,
        },
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    search, values = runner.skip_search, runner.speculation_stats.values
    nothing = np.zeros_like(search.skip_set)
    scores: list[float] = []
    search.skip_set = nothing
    search.propose = lambda: nothing
    search.judge = lambda skip_set, score: scores.append(score)
    complaints = watch_cache(runner)

    def answers(**fields: Any) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, **fields)
        return [
            list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS[:4], params, use_tqdm=False)
        ]

    whole = answers()
    runner._scratch = runner._scratch[:3]  # one request's window; drafts must end at their blocks
    short = answers()
    plain = answers(extra_args={"speculation": False})
    found = {
        "same": whole == short == plain,
        "drafted": float(values[PLACES["draft_tokens"]]),
        "accepted": float(values[PLACES["accepted_tokens"]]),
        "scores": sorted(set(scores)),
        "complaints": complaints,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
