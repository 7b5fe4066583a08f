"""Integer products and the decoder layers made of them agree with float64, and rows do not see one another."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_kernels import PackedMatrix, compiler, pack_codes
from galley_kernels.bench import random_matrix, relative_error
from galley_kernels.compiled import (
    CompiledDecoder,
    DecoderLayer,
    FloatLinear,
    IntegerLinear,
    InterleavedMatrix,
    available,
    interleaved,
)
from galley_kernels.compiled import linear as kernels_linear
from galley_kernels.compiled.interleaved import FloatMatrix
from galley_kernels.compiled.linear import exact, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")

DTYPES = {torch.float32: 0.0, torch.bfloat16: 8e-3}
# Float32 sums, and activations so near the middle between two integers that float32 rounds them to the other one.
TOLERANCE = {4: 3e-4, 8: 1e-5}
ROUNDED = {4: 8e-3, 8: 4e-5}  # what rounding normal activations in spans may cost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group"),
    [
        (9, 32, 1, 32),
        (2, 576, 40, 576),
        (3, 96, 33, 32),
        (5, 192, 8, 64),
        (67, 256, 50, 128),
        (130, 64, 7, 32),
    ],
)
def test_products_are_those_of_rounded_activations(
    dtype: torch.dtype, bits: int, outliers: float, rows: int, inputs: int, outputs: int, group: int
) -> None:
    torch.manual_seed(rows)
    matrix = random_matrix(inputs, outputs, bits, group, dtype, "cpu", outliers)
    x = torch.randn(rows, inputs).to(dtype)
    found = IntegerLinear([matrix])(x)
    assert found.dtype == dtype
    assert relative_error(found, exact(x, matrix)) < TOLERANCE[bits] + DTYPES[dtype]
    whole = x.double() @ matrix.dequantize(torch.float64).T
    assert relative_error(found, whole) < ROUNDED[bits] + TOLERANCE[bits] + DTYPES[dtype]


def has(*features: str) -> bool:
    """Whether the processor has all of these, where the system says."""
    try:
        found = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return set(features) <= set(found)


@pytest.fixture(scope="module")
def built_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """The compiled code for a processor that lacks what flags turn off."""

    @functools.cache
    def build(*flags: str) -> object:
        built = tmp_path_factory.mktemp("narrower") / "decoder.so"
        source = Path(interleaved.__file__).parent / "decoder.cpp"
        program = os.environ.get("CXX") or "c++"
        compiled = [program, *compiler.FLAGS, *flags, str(source), "-o", str(built)]
        subprocess.run(compiled, check=True, timeout=compiler.BUILD_SECONDS, capture_output=True)
        return interleaved.typed(ctypes.CDLL(str(built)))

    return build


def results(
    bits: int, rows: int, code: object, patch: pytest.MonkeyPatch, group: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product by this processor's code and by other `code`."""
    torch.manual_seed(rows)
    inputs, outputs = 192, 56  # seven panels
    if bits < 16:
        linear = IntegerLinear([random_matrix(inputs, outputs, bits, group, torch.bfloat16, "cpu", 0.02)])
    else:
        weights = torch.randn(outputs, inputs)
        linear = FloatLinear(weights.bfloat16() if bits == 16 else weights)
    x = torch.randn(rows, inputs) * torch.logspace(-2, 2, inputs)
    found = linear(x)
    patch.setattr(kernels_linear, "library", lambda: code)
    return found, linear(x)


@pytest.mark.skipif(
    not has("avx2", "fma", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    reason="no processor with AVX-512, or another system",
)
@pytest.mark.parametrize("flags", [["-mno-amx-tile"], ["-mno-avx512f", "-mno-avxvnni"]], ids=" ".join)
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 16, 37, 48, 100])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_wider_registers_make_the_same_numbers(
    bits: int,
    rows: int,
    flags: list[str],
    built_without: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert torch.equal(*results(bits, rows, built_without(*flags), monkeypatch))


@pytest.mark.skipif(not has("avx2", "fma"), reason="no processor with AVX2, or another system")
@pytest.mark.parametrize("group", [32, 64, 96, 192])  # spans end with groups, in them, or both
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_registers_make_the_numbers_of_plain_code(
    bits: int, rows: int, group: int, built_without: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = built_without("-mno-avx")
    assert torch.equal(*results(bits, rows, plain, monkeypatch, group))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    blocks=st.integers(1, 6),
    outputs=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    kind=st.sampled_from(["zeros", "huge", "tiny", "one", "mixed"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_adversarial_values(
    rows: int, blocks: int, outputs: int, bits: int, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = random_matrix(32 * blocks, outputs, bits, 32, torch.float32, "cpu", 0.05)
    x = torch.randn(rows, 32 * blocks)
    if kind == "zeros":
        x.zero_()
    elif kind == "huge":
        x[:, ::7] *= 1e20
    elif kind == "tiny":
        x *= 1e-40  # denormal: blocks become zeros
    elif kind == "one":
        x[:, 1:] = 0
    else:
        x[0] = 0
        x[-1] *= 1e6
    found = IntegerLinear([matrix])(x).double()
    expected = exact(x, matrix) if kind != "tiny" else torch.zeros(rows, outputs, dtype=torch.float64)
    scale = expected.abs().amax(-1, keepdim=True) + 1e-30
    assert bool(((found - expected).abs() <= 2e-5 * scale + 1e-35).all())


@pytest.mark.parametrize("groups", [1, 2])
def test_extreme_codes_do_not_overflow(groups: int) -> None:
    # All sums of a span are as large as they can be: -8 or 7 times 127, 64 times, or 32 where groups end.
    for code in (-8, 7):
        words = pack_codes(torch.full((8, 64), code), 4)
        matrix = PackedMatrix(words, torch.ones(8, groups), 4)
        for value in (-1.0, 1.0):
            x = torch.full((4, 64), value)
            assert torch.equal(IntegerLinear([matrix])(x), torch.full((4, 8), 64.0 * code * value))


@pytest.mark.parametrize("groups", [1, 2])
def test_opposite_parts_of_a_span_do_not_overflow(groups: int) -> None:
    # Two sums of 16 bits have half of a span's inputs each, and start at minus eight times their activations.
    place = torch.arange(64)
    patterns = [place % 4 < 2, place % 4 >= 2, place % 2 == 0, place < 16, place < 32, place >= 0]
    signs = torch.stack([torch.where(chosen, 1, -1) for chosen in patterns])
    x = torch.cat([signs, -signs]).float()
    codes = torch.cat([torch.where(x > 0, high, low) for high in (7, 0, -8) for low in (-8, 0, 7)]).int()
    matrix = PackedMatrix(pack_codes(codes, 4), torch.ones(len(codes), groups), 4)
    assert torch.allclose(IntegerLinear([matrix])(x), x @ codes.float().T, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_neighbours(bits: int) -> None:
    torch.manual_seed(1)
    linear = IntegerLinear([random_matrix(192, 50, bits, 64, torch.bfloat16, "cpu", 0.02)])
    x = torch.randn(71, 192)
    together = linear(x)
    assert torch.equal(together, torch.cat([linear(row) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([linear(some) for some in x.split(3)]))


def test_results_may_be_wider_than_activations() -> None:
    x = torch.randn(5, 192).bfloat16()
    linear = IntegerLinear([random_matrix(192, 50, 4, 64, torch.bfloat16, "cpu", 0.02)])
    wide = linear(x, torch.float32)
    assert torch.equal(wide, linear(x.float()))
    assert torch.equal(wide.bfloat16(), linear(x))
    with pytest.raises(ValueError, match=r"found torch\.float16 for the result"):
        linear(x, torch.float16)


def test_matrices_side_by_side_are_one_map() -> None:
    torch.manual_seed(2)
    parts = [
        random_matrix(128, 24, 4, 32, torch.bfloat16, "cpu", 0.02),
        random_matrix(128, 9, 8, 128, torch.bfloat16, "cpu", 0.0),
        random_matrix(128, 16, 4, 64, torch.float32, "cpu", 0.0),
    ]
    linear, bias = IntegerLinear(parts), torch.randn(49)
    x = torch.randn(2, 3, 128)
    expected = torch.cat([exact(x.flatten(0, 1), part) for part in parts], -1).view(2, 3, 49)
    assert relative_error(linear(x), expected) < TOLERANCE[4]
    linear.add_bias(bias)
    assert relative_error(linear(x), expected + bias) < TOLERANCE[4]


def test_activations_round_to_the_nearest_of_their_span() -> None:
    x = torch.zeros(1, 96)
    x[0, :3] = torch.tensor([127.0, -3.4, 0.5])
    x[0, 63] = 1.4
    x[0, 64:66] = torch.tensor([-2.54, 1.0])  # a span of its own: steps of 0.02
    found = rounded(x, 8)
    assert found.shape == x.shape
    assert found[0, [0, 1, 2, 63]].tolist() == [127.0, -3.0, 0.0, 1.0]
    assert found[0, 64:66].tolist() == pytest.approx([-2.54, 1.0])


def test_what_does_not_suit_is_refused() -> None:
    matrix = random_matrix(48, 8, 4, 24, torch.float32, "cpu", 0.0)
    assert not InterleavedMatrix.suits(matrix)
    with pytest.raises(ValueError, match="found groups of 24"):
        IntegerLinear([matrix])
    first, second = (random_matrix(inputs, 8, 4, 32, torch.float32, "cpu", 0.0) for inputs in (32, 64))
    with pytest.raises(ValueError, match=r"inputs, expected the same"):
        IntegerLinear([first, second])
    with pytest.raises(ValueError, match=r"found activations torch.float16 \[1, 32\]"):
        IntegerLinear([first])(torch.ones(1, 32, dtype=torch.float16))


MAGNITUDES = {"zeros": 0.0, "huge": 1e18, "tiny": 1e-40, "one": 1.0}
EXACT = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # sums of float32; half a unit in the last place


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 40),
    kind=st.sampled_from(sorted(MAGNITUDES)),
    seed=st.integers(0, 2**16),
)
def test_floating_weights_of_any_shape(
    dtype: torch.dtype, kept: torch.dtype, rows: int, inputs: int, outputs: int, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, inputs) * MAGNITUDES[kind]).to(dtype)
    weights = torch.randn(outputs, inputs).to(kept).float()
    linear = FloatLinear(weights)
    found, expected = linear(x), x.double() @ weights.double().T
    assert found.dtype == dtype
    size = x.double().abs() @ weights.double().abs().T  # of what is added, which may cancel
    assert bool(((found.double() - expected).abs() <= EXACT[dtype] * size + 1e-30).all())
    assert torch.equal(found, torch.cat([linear(row) for row in x.split(1)]))
    assert torch.equal(found, torch.cat([linear(some) for some in x.split(3)]))


def test_weights_take_half_the_bytes_where_no_bit_is_lost() -> None:
    weights = torch.randn(9, 32)
    (whole,), (half,) = FloatLinear(weights).parts, FloatLinear(weights.bfloat16().float()).parts
    assert isinstance(whole, FloatMatrix)
    assert isinstance(half, FloatMatrix)
    assert (whole.codes.dtype, half.codes.dtype) == (torch.float32, torch.bfloat16)
    assert half.codes.shape == (2, 32, 8)  # filled up to two panels
    bias = torch.randn(9)
    linear = FloatLinear(weights)
    linear.add_bias(bias)
    x = torch.randn(2, 3, 32)
    assert torch.allclose(linear(x), torch.nn.functional.linear(x, weights, bias), atol=1e-5)
    with pytest.raises(ValueError, match=r"found weights torch.float64 \[9, 32\]"):
        FloatLinear(weights.double())


HIDDEN, INNER, QUERIES, KEYS, HEAD, ROTARY = 64, 160, 4, 2, 16, 8


def some_layer(bits: int, sigma: float) -> tuple[DecoderLayer, dict[str, PackedMatrix]]:
    def matrix(inputs: int, outputs: int) -> PackedMatrix:
        return random_matrix(inputs, outputs, bits, 32, torch.float32, "cpu", 0.02)

    matrices = {
        "qkv": matrix(HIDDEN, (QUERIES + 2 * KEYS) * HEAD),
        "output": matrix(QUERIES * HEAD, HIDDEN),
        "gate_up": matrix(HIDDEN, 2 * INNER),
        "down": matrix(INNER, HIDDEN),
    }
    norms = [1 + sigma * torch.randn(HIDDEN) for _ in range(2)]
    return DecoderLayer(*norms, *(IntegerLinear([each]) for each in matrices.values())), matrices


def normed(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights.double()


def turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + ROTARY / 2) as complex numbers, turned."""
    half = ROTARY // 2
    pairs = torch.complex(heads[..., :half], heads[..., half:ROTARY])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag, heads[..., ROTARY:]], -1)


def test_a_decoder_of_floating_maps() -> None:
    """Beside one of 8-bit weights with the same values, whose activations are rounded to 16 bits."""
    torch.manual_seed(5)
    integers, matrices = some_layer(8, 0.1)
    floats = DecoderLayer(
        integers.input_norm,
        integers.attention_norm,
        *(FloatLinear(each.dequantize()) for each in matrices.values()),
    )
    angles = torch.randn(100, ROTARY)
    results = []
    attention = torch.randn(5, QUERIES, HEAD)
    for layer in (integers, floats):
        decoder = CompiledDecoder(
            [layer], torch.ones(HIDDEN), angles, query_heads=QUERIES, key_heads=KEYS, head=HEAD, epsilon=1e-5,
            dtype=torch.float32,
        )  # fmt: skip
        torch.manual_seed(6)
        step = decoder.begin(torch.arange(5), torch.randn(5, HIDDEN))
        step.attention.copy_(attention)
        decoder.follow(0, step)
        results.append((step.qkv, step.result))
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other.double()) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_decoder_layers_are_norms_maps_and_a_gate(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(3)
    made = [some_layer(bits, 0.1) for bits in (8, 8)]
    final = 1 + 0.1 * torch.randn(HIDDEN)
    angles = torch.randn(100, ROTARY // 2, dtype=torch.float64)
    decoder = CompiledDecoder(
        [layer for layer, _ in made],
        final,
        torch.cat([angles.cos(), angles.sin()], -1).float(),
        query_heads=QUERIES,
        key_heads=KEYS,
        head=HEAD,
        epsilon=1e-5,
        dtype=dtype,
    )
    positions = torch.randint(100, (rows,))
    x = torch.randn(rows, HIDDEN)
    attentions = [torch.randn(rows, QUERIES, HEAD).to(dtype) for _ in made]

    state, before = x.double(), x.clone()
    kept = torch.zeros(rows + 2, HIDDEN, dtype=dtype)
    decoder.keep(1, kept)
    step = decoder.begin(positions, x)
    enough = {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    for place, ((layer, matrices), attention) in enumerate(zip(made, attentions, strict=True)):
        qkv = exact(normed(state, layer.input_norm), matrices["qkv"]).view(rows, -1, HEAD)
        qkv[:, : QUERIES + KEYS] = turned(qkv[:, : QUERIES + KEYS], angles[positions])
        assert relative_error(step.qkv, qkv) < enough
        state = state + exact(attention.view(rows, -1).double(), matrices["output"])
        entering = normed(state, layer.attention_norm)
        gate, up = exact(entering, matrices["gate_up"]).chunk(2, -1)
        state = state + exact(torch.nn.functional.silu(gate) * up, matrices["down"])
        step.attention.copy_(attention)
        decoder.follow(place, step)
    assert step.result.dtype == dtype
    assert relative_error(step.result, normed(state, final)) < enough
    assert torch.equal(x, before)  # the residual is a copy
    assert relative_error(kept[:rows], entering) < enough
    assert not kept[rows:].any()
    decoder.keep(1, None)
    kept.zero_()
    decoder.follow(1, step)
    assert not kept.any()


def test_rows_that_cannot_be_kept_are_refused() -> None:
    layer, _ = some_layer(4, 0.0)
    decoder = CompiledDecoder(
        [layer],
        torch.ones(HIDDEN),
        torch.ones(4, ROTARY),
        query_heads=QUERIES,
        key_heads=KEYS,
        head=HEAD,
        epsilon=1e-5,
        dtype=torch.float32,
    )
    with pytest.raises(
        ValueError, match=r"found rows torch.bfloat16 \[3, 64\], expected torch.float32 \[row"
    ):
        decoder.keep(0, torch.zeros(3, HIDDEN, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"found rows torch.float32 \[3, 32\]"):
        decoder.keep(0, torch.zeros(3, HIDDEN // 2))


def test_the_gate_holds_at_both_ends() -> None:
    # Gates so large that their exponentials would overflow: silu is 0 below, the gate itself above.
    torch.manual_seed(4)
    layer, _ = some_layer(4, 0.0)
    for value in (-1e4, 1e4):
        gates = torch.full((2 * INNER, 32), 7)
        gates[:INNER] = int(math.copysign(7, value))
        wide = torch.zeros(2 * INNER, HIDDEN, dtype=torch.int64)
        wide[:, :32] = gates
        scales = torch.full((2 * INNER, 2), 100.0)
        gate_up = IntegerLinear([PackedMatrix(pack_codes(wide, 4), scales, 4)])
        one = DecoderLayer(
            layer.input_norm, layer.attention_norm, layer.qkv, layer.output, gate_up, layer.down
        )
        decoder = CompiledDecoder(
            [one],
            torch.ones(HIDDEN),
            torch.ones(4, ROTARY),
            query_heads=QUERIES,
            key_heads=KEYS,
            head=HEAD,
            epsilon=1e-5,
            dtype=torch.float32,
        )
        step = decoder.begin(torch.zeros(1, dtype=torch.int64), torch.ones(1, HIDDEN))
        before = step.residual.clone()
        step.attention.zero_()
        decoder.follow(0, step)
        assert bool(torch.isfinite(step.result).all())
        assert torch.equal(step.residual, before) == (value < 0)


def test_sizes_that_do_not_fit_are_named() -> None:
    layer, _ = some_layer(4, 0.0)
    with pytest.raises(
        ValueError, match="layer 0, qkv: found 64 inputs and 128 outputs, expected 64 and 160"
    ):
        CompiledDecoder(
            [layer],
            torch.ones(HIDDEN),
            torch.ones(4, ROTARY),
            query_heads=QUERIES,
            key_heads=KEYS + 1,
            head=HEAD,
            epsilon=1e-5,
            dtype=torch.float32,
        )
