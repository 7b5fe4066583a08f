"""Check and time every kernel on this machine's GPU: `python -m galley_kernels.bench`.

Each operation is compared with its float64 reference on random inputs, then timed against what torch has for
the same work: bfloat16 products by cuBLAS, torch's own int4 product, and eager and compiled torch elsewhere.
Weights come from the GPU's memory, not its cache: copies of them take turns within one CUDA graph. Times are
medians of replays, of all rivals in turn, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import (
    PackedMatrix,
    SparseRows,
    memory_block,
    mix_log_probs,
    pack_codes,
    w4a16_gemm,
    w8a16_gemm,
)
from galley_kernels.choice import has_triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

RESULTS = Path(__file__).parents[1] / "results"
PRODUCTS = {4: w4a16_gemm, 8: w8a16_gemm}
SHAPES = {  # input, output
    "8b qkv": (4096, 6144),
    "8b gate_up": (4096, 28672),
    "8b down": (14336, 4096),
    "135m gate_up": (576, 3072),
}
ROWS = (1, 2, 4, 16, 32, 64, 128, 256, 1024)
TUNED_SHAPES, TUNED_ROWS = ("8b gate_up", "8b down", "135m gate_up"), (1, 2, 16, 64)
CACHE_BYTES = 256 * 2**20  # more than any GPU's cache
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def random_matrix(
    inputs: int,
    outputs: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: str,
    share: float = 0.0,
) -> PackedMatrix:
    """Random codes and scales; `share` of the weights have a value apart."""
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), device=device)
    scales = (torch.rand(outputs, inputs // group, device=device) + 0.5) / (half * inputs**0.5)
    apart = None
    if share:
        rows, columns = (torch.rand(outputs, inputs, device=device) < share).nonzero(as_tuple=True)
        values = torch.randn(len(rows), device=device) * 4 / inputs**0.5
        apart = SparseRows.of(rows, columns, values.to(dtype), outputs)
    return PackedMatrix(pack_codes(codes, bits), scales.to(dtype), bits, apart)


def check(device: str, implementation: str = "triton") -> list[dict[str, Any]]:
    """Errors of every operation over shapes that tiles do and do not divide."""
    found = []

    def note(operation: str, dtype: torch.dtype, error: float, **what: Any) -> None:
        good = error <= TOLERANCE[dtype]  # NaN is not
        found.append({"operation": operation, "dtype": str(dtype)[6:], "error": error, "good": good, **what})

    for bits, product in PRODUCTS.items():
        for inputs, outputs, group, rows in (
            (576, 1536, 64, 1), (576, 200, 576, 3), (4096, 512, 128, 2), (1024, 333, 32, 17),
            (1024, 64, 32, 1), (1536, 576, 64, 70), (96, 64, 24, 5), (96, 50, 8, 33), (2048, 512, 128, 512),
        ):  # fmt: skip
            for dtype in TOLERANCE:
                for share in (0.0, 0.01):
                    matrix = random_matrix(inputs, outputs, bits, group, dtype, device, share)
                    x = torch.randn(rows, inputs, device=device, dtype=dtype)
                    expected = product(x, matrix, implementation="reference")
                    error = relative_error(product(x, matrix, implementation=implementation), expected)
                    note(
                        f"w{bits}a16_gemm",
                        dtype,
                        error,
                        shape=[rows, inputs, outputs],
                        group=group,
                        apart=share,
                    )
    for dtype in TOLERANCE:
        for rows, vocabulary in ((1, 49152), (5, 9001), (64, 32000)):
            logits, other = (torch.randn(2, rows, vocabulary, device=device) * 4).to(dtype)
            logits[:, 3] = other[:, 3] = float("-inf")
            weight = torch.rand(rows, device=device)
            weight[0] = 0
            expected = mix_log_probs(logits, other, weight, implementation="reference")
            mixed = mix_log_probs(logits, other, weight, implementation=implementation)
            finite = torch.isfinite(expected)
            error = relative_error(mixed[finite], expected[finite])
            note(
                "mix_log_probs",
                torch.float32,
                error if torch.equal(torch.isfinite(mixed), finite) else float("nan"),
                shape=[rows, vocabulary],
                logits=str(dtype)[6:],
            )
        for rows, width, hidden in ((1, 576, 1536), (19, 100, 70), (64, 4096, 512)):
            tensors = random_block(rows, width, hidden, dtype, device)
            expected = memory_block(*tensors, implementation="reference")
            error = relative_error(memory_block(*tensors, implementation=implementation), expected)
            note("memory_block", dtype, error, shape=[rows, width, hidden])
    return found


def random_block(rows: int, width: int, hidden: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    sizes = ((rows, width), (width,), (hidden, width), (hidden, width), (width, hidden))
    factors = (1.0, 1.0, width**-0.5, width**-0.5, hidden**-0.5)
    return [
        (torch.randn(size, device=device) * factor).to(dtype)
        for size, factor in zip(sizes, factors, strict=True)
    ]


def times(
    rivals: Mapping[str, Sequence[Callable[[], Any]]], repeats: int, least: float = 0.003
) -> dict[str, float]:
    """Median microseconds of a call of each rival; each has its calls on several copies of its data."""
    graphs = {}
    for name, calls in rivals.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls[0]()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        graphs[name] = graph
    spent: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replays = 1
            while True:
                begin.record()
                for _ in range(replays):
                    graph.replay()
                end.record()
                torch.cuda.synchronize()
                taken = begin.elapsed_time(end) / 1000
                if taken >= least:
                    break
                replays = max(replays * 2, int(replays * least / max(taken, 1e-6)) + 1)
            spent[name].append(taken / replays / len(rivals[name]))
    return {name: 1e6 * statistics.median(each) for name, each in spent.items()}


def copies_of(bytes_each: int) -> int:
    return max(2, min(64, -(-CACHE_BYTES // max(bytes_each, 1))))


def product_rivals(
    bits: int, shape: tuple[int, int], rows: int, group: int
) -> dict[str, list[Callable[[], Any]]]:
    inputs, outputs = shape
    dtype = torch.bfloat16
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
    dense = [
        torch.randn(outputs, inputs, device="cuda", dtype=dtype)
        for _ in range(copies_of(2 * inputs * outputs))
    ]
    count = copies_of(inputs * outputs * bits // 8)
    product = PRODUCTS[bits]
    packed = [random_matrix(inputs, outputs, bits, group, dtype, "cuda") for _ in range(count)]
    apart = [random_matrix(inputs, outputs, bits, group, dtype, "cuda", 0.005) for _ in range(min(count, 8))]
    rivals: dict[str, list[Callable[[], Any]]] = {
        "bf16 cuBLAS": [partial(torch.nn.functional.linear, x, w) for w in dense],
        "galley": [partial(product, x, m) for m in packed],
        "galley, 0.5 % apart": [partial(product, x, m) for m in apart],
    }
    if rows > 32:
        from galley_kernels.quantized.triton_gemm import default_tiles, gemm

        cut = default_tiles(rows, outputs, inputs, bits)
        rivals["tiles"] = [partial(gemm, x, m, cut) for m in packed]
        rivals["dense"] = [partial(gemm, x, m, dense_rows=0) for m in packed]
    if bits == 4 and rows <= 64 and inputs % 1024 == 0 and outputs % 64 == 0:
        try:
            nibbles = [
                torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
                for _ in range(count)
            ]
            words = [torch.ops.aten._convert_weight_to_int4pack(each, 8) for each in nibbles]
            scales = torch.rand(inputs // group, outputs, 2, device="cuda", dtype=dtype)
            pack = torch.ops.aten._weight_int4pack_mm
            rivals["torch int4"] = [partial(pack, x, w, group, scales) for w in words]
        except RuntimeError as error:
            print(f"torch's int4 product: {error}", file=sys.stderr)
    return rivals


def bench_products(
    rows_list: Iterable[int], shapes: Iterable[str], repeats: int, group: int = 128
) -> list[dict[str, Any]]:
    found = []
    for bits in PRODUCTS:
        for name in shapes:
            inputs, outputs = SHAPES[name]
            size = group if inputs % group == 0 else 64
            for rows in rows_list:
                row: dict[str, Any] = {"bits": bits, "shape": name, "rows": rows, "group": size}
                row["us"] = times(product_rivals(bits, SHAPES[name], rows, size), repeats)
                row["over_bf16"] = row["us"]["bf16 cuBLAS"] / row["us"]["galley"]
                row["gb_per_s"] = inputs * outputs * bits / 8 / row["us"]["galley"] / 1e3
                found.append(row)
                _say(f"w{bits}a16 {name} rows {rows}", row["us"])
    return found


def _mix_by_torch(*given: torch.Tensor) -> torch.Tensor:
    return mix_log_probs(*given, implementation="torch")


def _block_by_torch(*given: torch.Tensor) -> torch.Tensor:
    return memory_block(*given, implementation="torch")


def bench_mix(rows_list: Iterable[int], vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    found = []
    compiled = torch.compile(_mix_by_torch, dynamic=False)
    for rows in rows_list:
        bytes_each = 2 * 2 * rows * vocabulary
        given = [
            (
                torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16),
                torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16),
                torch.rand(rows, device="cuda"),
            )
            for _ in range(copies_of(bytes_each))
        ]
        rivals: dict[str, list[Callable[[], Any]]] = {
            "torch": [partial(_mix_by_torch, *g) for g in given],
            "torch.compile": [partial(compiled, *g) for g in given],
            "galley": [partial(mix_log_probs, *g) for g in given],
        }
        us = times(rivals, repeats)
        moved = rows * vocabulary * (2 * 2 + 4)
        found.append(
            {
                "rows": rows,
                "vocabulary": vocabulary,
                "us": us,
                "over_torch": us["torch"] / us["galley"],
                "gb_per_s": moved / us["galley"] / 1e3,
            }
        )
        _say(f"mix_log_probs rows {rows}", us)
    return found


def bench_block(
    rows_list: Iterable[int], sizes: Iterable[tuple[int, int]], repeats: int
) -> list[dict[str, Any]]:
    found = []
    compiled = torch.compile(_block_by_torch, dynamic=False)
    for width, hidden in sizes:
        for rows in rows_list:
            count = copies_of(6 * width * hidden)
            given = [random_block(rows, width, hidden, torch.bfloat16, "cuda") for _ in range(count)]
            rivals: dict[str, list[Callable[[], Any]]] = {
                "torch": [partial(_block_by_torch, *g) for g in given],
                "torch.compile": [partial(compiled, *g) for g in given],
                "galley": [partial(memory_block, *g, implementation="triton") for g in given],
            }
            us = times(rivals, repeats)
            found.append(
                {
                    "rows": rows,
                    "width": width,
                    "hidden": hidden,
                    "us": us,
                    "over_torch": us["torch"] / us["galley"],
                    "gb_per_s": 6 * width * hidden / us["galley"] / 1e3,
                }
            )
            _say(f"memory_block {width} x {hidden} rows {rows}", us)
    return found


def tune(bits: int, shape: str, rows: int, repeats: int = 3, group: int = 128) -> list[dict[str, Any]]:
    """Every cut of one product, the fastest first."""
    from galley_kernels.quantized.triton_gemm import Tiles, gemm

    inputs, outputs = SHAPES[shape]
    group = group if inputs % group == 0 else 64
    matrices = [
        random_matrix(inputs, outputs, bits, group, torch.bfloat16, "cuda")
        for _ in range(copies_of(inputs * outputs * bits // 8))
    ]
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    cuts = []
    if rows <= 2:
        cuts += [
            Tiles(1, outputs_each, inputs_each, warps=warps)
            for outputs_each, inputs_each, warps in (
                (2, 2048, 4), (4, 1024, 4), (4, 2048, 4), (8, 512, 2), (8, 1024, 4), (16, 256, 2),
            )
        ]  # fmt: skip
    high = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if rows > 1 or bits == 8:
        cuts += [
            Tiles(high, outputs_each, inputs_each, splits, warps, stages)
            for outputs_each, inputs_each, splits, warps, stages in (
                (16, 128, 0, 2, 4), (32, 128, 0, 4, 4), (32, 128, 1, 4, 4), (64, 128, 0, 4, 4),
                (128, 128, 0, 4, 3), (128, 64, 0, 4, 4),
            )
        ]  # fmt: skip
    found: list[dict[str, Any]] = []
    for cut in cuts:
        try:
            (us,) = times({"it": [partial(gemm, x, m, cut) for m in matrices]}, repeats).values()
        except Exception as error:  # a cut that this GPU cannot take is passed over
            print(f"{cut}: {str(error)[:100]}", file=sys.stderr)
            continue
        found.append(
            {
                "us": us,
                "cut": [cut.rows, cut.outputs, cut.inputs, cut.splits, cut.warps, cut.stages],
                "bits": bits,
                "shape": shape,
                "rows": rows,
            }
        )
    found.sort(key=lambda each: each["us"])
    _say(f"w{bits}a16 {shape} rows {rows}", {str(each["cut"]): each["us"] for each in found[:4]})
    return found


def _say(what: str, figures: dict[str, float]) -> None:
    print(f"{what}: " + ", ".join(f"{name} {figure:.1f}" for name, figure in figures.items()), flush=True)


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m galley_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="check all, time a few shapes")
    parser.add_argument("--tune", action="store_true", help="also time every way to cut the products")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; default %(default)s")
    parser.add_argument("--commit", default=_commit(), help="that is measured; default: the checkout's")
    parser.add_argument("--output", type=Path, help="default: kernels/results/GPU.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = read_options()
    if not torch.cuda.is_available() or not has_triton():
        sys.exit("galley_kernels.bench: found no GPU with Triton, expected one; nothing was measured")
    name = torch.cuda.get_device_name()
    begun = time.monotonic()
    torch.manual_seed(0)
    checks = check("cuda")
    bad = [each for each in checks if not each["good"]]
    print(f"{name}: {len(checks)} checks, {len(bad)} beyond the tolerance", flush=True)
    for each in bad:
        print(f"  {each}")
    shapes = ("8b gate_up",) if options.quick else tuple(SHAPES)
    rows = (1, 16, 256) if options.quick else ROWS
    report: dict[str, Any] = {
        "gpu": name,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton_version()},
        "commit": options.commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "repeats": options.repeats,
        "checks": checks,
    }
    output: Path = options.output or RESULTS / f"{name.replace(' ', '-').lower()}.json"

    def keep(section: str, found: Any) -> None:
        report[section] = found
        report["seconds"] = round(time.monotonic() - begun, 1)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(output)

    sizes = ((4096, 14336),) if options.quick else ((4096, 14336), (576, 1536))
    keep("memory_block", bench_block((1, 8) if options.quick else (1, 8, 16, 64), sizes, options.repeats))
    if options.tune:
        keep(
            "tune",
            [
                each
                for bits in PRODUCTS
                for shape in TUNED_SHAPES
                for count in TUNED_ROWS
                for each in tune(bits, shape, count)
            ],
        )
    keep("products", bench_products(rows, shapes, options.repeats))
    keep("mix_log_probs", bench_mix((1, 8) if options.quick else (1, 8, 64, 256), 128256, options.repeats))
    print(f"{output}: {report['seconds']} s")
    if bad:
        sys.exit(1)


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    main()
