"""A drafter of runner V2 through steps of random texts; its kernels, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galley_plugins.speculation.device import BINS, DeviceDrafter
from galley_plugins.speculation.device_stats import DeviceStats
from galley_plugins.speculation.device_steps import Asked, Rows, Texts
from galley_plugins.speculation.options import MiB, SpeculationOptions
from galley_plugins.speculation.stats import SpeculationStats

SLOTS, MOST, LONGEST = 6, 5, 2200


def steps_of(kind: str, method: str, budget: int, seed: int) -> dict[str, Any]:
    """All that a drafter says over some steps of random texts, and what it has learned in the end."""
    subject = drafter_of(kind, method, budget)
    subject.begin(list(range(SLOTS)), [3, 3, 4, 5, 5, 6], [MOST, MOST, 2, MOST, 0, MOST])
    random = torch.Generator().manual_seed(seed)

    def below(most: int, *size: int) -> torch.Tensor:
        return torch.randint(0, most, size, generator=random)

    tokens = below(4, SLOTS, LONGEST).int()  # few tokens, so that texts repeat themselves
    lengths = torch.tensor([1, 2, 3, 40, 1500, 2100])
    said = []
    for step in range(6):
        slots = torch.randperm(SLOTS, generator=random)[: 4 + step % 3]
        new = below(MOST + 1, len(slots)).clamp(max=lengths[slots] - 1)
        texts = Texts(slots, tokens, lengths[slots], new, slots % 2 == 1)
        count = 50
        contexts = below(4, count, 3) - (below(6, count, 3) == 0).long() * 5
        contexts = torch.where(contexts < 0, -1, contexts)
        best = torch.rand(count, 9, generator=random).argsort(1)[:, :8]
        best = torch.where(torch.arange(8) < 4 + below(5, count, 1), best, -1)
        rows = Rows(
            slots=slots[below(len(slots), count)],
            contexts=contexts,
            tokens=best,
            probs=torch.rand(count, 8, generator=random).softmax(1).sort(1, descending=True).values,
            following=below(6, count) - 1,
            sampled=below(2, count) > 0,
        )
        subject.observe(rows)
        said.append(subject.propose(texts, None if step % 2 else MOST - 2))
        lengths = (lengths + below(3, SLOTS)).clamp(max=LONGEST)
    learned = {} if subject.table is None else subject.table.table.tensors()
    rates = subject._calibration.rates[: 2 * BINS]
    return {
        "said": said,
        "learned": learned,
        "rates": rates,
        "ahead": subject._ahead,
        "size": subject._matched,
    }


def drafter_of(kind: str, method: str = "hybrid", budget: int = MiB) -> DeviceDrafter:
    options = SpeculationOptions.from_values({"method": method, "table_bytes": MiB})
    object.__setattr__(options, "table_bytes", budget)  # smaller ones than users may ask for, too
    if kind == "triton":
        from galley_plugins.speculation.triton_drafter import TritonDrafter

        return TritonDrafter(options, requests=SLOTS, most=MOST, device="cpu")
    return DeviceDrafter(options, requests=SLOTS, most=MOST, device="cpu")


def rows_of_a_step(kind: str) -> dict[str, torch.Tensor]:
    """Rows of 4 requests with drafts of 0 to 5 tokens; some dropped, some limited, one at its prompt's end."""
    random = torch.Generator().manual_seed(3)
    subject = drafter_of(kind)
    slots = torch.tensor([4, 0, 5, 2])
    subject.begin(slots.tolist(), [0, 0, 0, 0], [MOST, 2, MOST, 0])
    rows_each = torch.tensor([6, 4, 1, 3])
    tokens = torch.randint(0, 90, (SLOTS, 40), generator=random).int()
    lengths, new = torch.tensor([12, 2, 9, 30]), torch.tensor([3, 1, 0, 2])
    owner = torch.arange(4).repeat_interleave(rows_each)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), rows_each.cumsum(0))).int()
    local = torch.arange(len(owner)) - bounds[owner]
    padding = 3  # tokens of the step before the first row, as of a prompt's chunk
    positions = torch.cat((torch.zeros(padding, dtype=torch.int64), (lengths - new - 1)[owner] + local))
    asked = Asked(
        places=torch.arange(len(owner)) + padding,
        slots=slots[owner],
        local=local.int(),
        bounds=bounds,
        tokens=torch.randint(0, 90, (padding + len(owner),), generator=random).int(),
        positions=positions.clamp(min=0),
        prompts=torch.tensor([3, 1, 1, 30, 2, 4], dtype=torch.int32),
    )
    texts = Texts(slots, tokens, lengths, new, slots % 2 == 0)
    best = torch.zeros(len(owner), 8, dtype=torch.int64)
    found = subject.rows(asked, texts, best, best.float())
    return {name: getattr(found, name) for name in ("slots", "contexts", "following", "sampled")}


def counts_of_steps(kind: str) -> torch.Tensor:
    """What three steps of 150 requests add up to."""
    random = torch.Generator().manual_seed(9)
    stats = DeviceStats(SpeculationStats(None), "cpu")
    stats._fused = kind == "triton"
    for _ in range(3):
        nodes = torch.randint(0, 80, (150,), generator=random)
        accepted = (nodes * torch.rand(150, generator=random)).long()
        stats.verified(nodes, accepted, torch.rand(150, generator=random) < 0.7)
    return stats._values


def compile_kernels(method: str) -> dict[str, int]:
    """Bytes of each kernel that a step of `method` launches, as compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from galley_plugins.speculation import triton_drafter, triton_stats

    launched: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    class Launches:
        def __init__(self, name: str, kernel: Any) -> None:
            self._name, self._kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **named: launched.setdefault(self._name, (self._kernel, given, named))

    with pytest.MonkeyPatch.context() as patched:
        for module in (triton_drafter, triton_stats):
            for name in [each for each in vars(module) if each.endswith("_kernel")]:
                patched.setattr(module, name, Launches(name, getattr(module, name)))
        one_step(drafter_of("triton", method))
        none = torch.zeros(2, dtype=torch.int64)
        triton_stats.add_verified(torch.zeros(1).double(), none, none, none, none > 0)
    options = {"enable_fp_fusion": True}
    sizes = {}
    for name, (kernel, given, named) in launched.items():
        signature = {
            argument: kind_of(value) for argument, value in zip(kernel.arg_names, given, strict=False)
        }
        constants = {(kernel.arg_names.index(argument),): value for argument, value in named.items()}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(named, "constexpr")}, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        sizes[name] = len(compiled.asm["cubin"])
    return sizes


def one_step(subject: DeviceDrafter) -> None:
    """Launch all that a step does, with tensors of the types that runner V2 has."""
    long, short = torch.zeros(2, dtype=torch.int64), torch.zeros(SLOTS, dtype=torch.int32)
    texts = Texts(long, torch.zeros(SLOTS, 64, dtype=torch.int32), long + 1, long, long > 0)
    asked = Asked(
        places=long,
        slots=long,
        local=short[:2],
        bounds=short[:3],
        tokens=short,
        positions=long,
        prompts=short,
    )
    best = torch.zeros(2, 8, dtype=torch.int64)
    subject.observe(subject.rows(asked, texts, best, best.float()))
    subject.propose(texts)


def kind_of(value: Any) -> str:
    """The name of an argument's type in Triton."""
    if isinstance(value, torch.Tensor):
        names = {torch.int64: "i64", torch.int32: "i32", torch.float32: "fp32", torch.float64: "fp64"}
        return "*" + names.get(value.dtype, "i1")
    return "fp32" if isinstance(value, float) else "i32"
