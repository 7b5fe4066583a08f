// What products are of: matrices as interleaved.py lays them out, and rows of activations, as integers too.
//
// Eight neighbouring outputs are a panel. Beside weights that are integers, activations become integers by spans
// of 64 inputs, each with a scale of its own: 8 bits beside 4-bit weights, 16 bits beside 8-bit ones, so that a
// span's sum of products is exact. It is of two blocks, or where groups or a row end, of one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../lanes.h"

namespace galley {

constexpr int64_t BLOCK = 32, SPAN = 64, PANEL = 8;
#ifdef GALLEY_AVX512
constexpr int TILE = 8;  // rows whose sums registers hold
#else
constexpr int TILE = 4;
#endif
constexpr int64_t SLAB = 48;    // rows at a time, at most: their activations stay in a core's cache
constexpr int64_t SUMMED = 64;  // products of floats, whose roundings add up

inline float wide(const void* data, int is_float, int64_t at) {
    if (is_float) return static_cast<const float*>(data)[at];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A weight apart: an input and what it adds to its product.
struct Apart {
    int32_t column;
    float value;
};

// Outputs `first` and up of a map; `starts` is null where no weights are apart. Of 16 bits (bfloat16) or 32, codes
// are the weights themselves, [panels][inputs][8].
struct Matrix {
    const void* codes;
    const void* scales;     // [panels][groups][8]
    const int32_t* starts;  // [outputs + 1]
    const Apart* apart;
    int64_t first, outputs, inputs, groups;
    int32_t bits, scales_wide;
};

// How many spans a row has.
inline int64_t spans_of(int64_t inputs) { return (inputs + SPAN - 1) / SPAN; }

// Rows of activations as integers, and as they are.
struct Activations {
    float* x;        // [rows][inputs]
    float* tiles;    // [tiles][inputs][rows of the tile], beside weights apart
    int8_t* bytes;   // [rows][inputs], beside 4-bit weights
    int16_t* words;  // [rows][inputs], beside 8-bit weights
    float* byte_scales;
    float* word_scales;  // [rows][spans]
    int32_t* starts;     // [rows][blocks]: of `start_of`
};

// What a map's matrices need of activations.
struct Needs {
    bool bytes, words, tiles;
};

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define GALLEY_VNNI 1
#endif

// Where a block's sum of products with 4-bit codes starts, which are 8 too large. The sums are of its activations, of
// the first two in every four inputs and of the others.
inline int32_t start_of(int32_t first, int32_t second) {
#if defined(GALLEY_AVX2) && !defined(GALLEY_VNNI)
    const uint32_t low = -8u * first, high = -8u * second;  // two sums of 16 bits
    return static_cast<int32_t>((low & 0xffff) | high << 16);
#else
    return -8 * (first + second);
#endif
}

inline float largest(const float* x, int64_t count) {
#ifdef GALLEY_AVX2
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_andnot_ps(sign, _mm256_loadu_ps(x));
    for (int64_t i = 8; i < count; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    float most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::fabs(x[i]));
    return most;
#endif
}

// 32 numbers times `by`, rounded to the nearest integer; for bytes, `start_of` their sums.
template <typename Integer>
inline int32_t round_block(const float* x, float by, Integer* made) {
    int32_t start = 0;
#ifdef GALLEY_AVX2
    const __m256 factor = _mm256_set1_ps(by);
    __m256i some[4];
    for (int i = 0; i < 4; ++i) some[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
    if (sizeof(Integer) == 1) {
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(some[0], some[1]), _mm256_add_epi32(some[2], some[3]));
        __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
        start = start_of(_mm_cvtsi128_si32(sums), _mm_extract_epi32(sums, 2));
        const __m256i packed =
            _mm256_packs_epi16(_mm256_packs_epi32(some[0], some[1]), _mm256_packs_epi32(some[2], some[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(made), _mm256_permutevar8x32_epi32(packed, order));
    } else {
        for (int i = 0; i < 2; ++i)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(made) + i,
                                _mm256_permute4x64_epi64(_mm256_packs_epi32(some[2 * i], some[2 * i + 1]), 0xd8));
    }
#else
    int32_t sums[2] = {};
    for (int i = 0; i < BLOCK; ++i) {
        made[i] = static_cast<Integer>(std::nearbyint(x[i] * by));
        sums[i / 2 % 2] += made[i];
    }
    start = start_of(sums[0], sums[1]);
#endif
    return start;
}

// What is needed of a row, one of `rows`; spans of zeros, or too small for a scale, become zeros.
inline void round_row(const Activations& to, int64_t row, int64_t rows, int64_t inputs, Needs needs) {
    const float* x = to.x + row * inputs;
    const int64_t spans = needs.bytes || needs.words ? spans_of(inputs) : 0;
    for (int64_t span = 0; span < spans; ++span) {
        const int64_t first = span * SPAN, last = std::min(first + SPAN, inputs), at = row * spans + span;
        const float most = largest(x + first, last - first);
        const bool some = most > 1e-30f;
        if (needs.bytes) to.byte_scales[at] = most / 127;
        if (needs.words) to.word_scales[at] = most / 32767;
        for (int64_t i = first; i < last; i += BLOCK) {
            const int64_t from = row * inputs + i;
            if (needs.bytes)
                to.starts[from / BLOCK] = round_block(x + i, some ? 127 / most : 0, to.bytes + from);
            if (needs.words) round_block(x + i, some ? 32767 / most : 0, to.words + from);
        }
    }
    if (needs.tiles) {
        const int64_t first = row / TILE * TILE, width = std::min<int64_t>(TILE, rows - first);
        float* tile = to.tiles + first * inputs + row - first;
        for (int64_t i = 0; i < inputs; ++i) tile[i * width] = x[i];
    }
}

#ifdef GALLEY_AVX2

inline __m256 eight_scales(const Matrix& matrix, int64_t at) {
    if (matrix.scales_wide) return _mm256_loadu_ps(static_cast<const float*>(matrix.scales) + at);
    const __m128i half = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(matrix.scales) + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

#endif

// Blocks from `block` to `last`, a group's end, whose sums of products are added as integers: of one span.
inline int64_t blocks_together(int64_t block, int64_t last) { return block % 2 == 0 && block + 1 < last ? 2 : 1; }

#ifdef GALLEY_AVX512

inline __m512i side_by_side(__m256i one, __m256i other) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1);
}

// A group's scales of two panels.
inline Wide pair_scales(const Matrix& matrix, int64_t panel, int64_t group) {
    const __m256 one = eight_scales(matrix, (panel * matrix.groups + group) * PANEL);
    const __m256 other = eight_scales(matrix, ((panel + 1) * matrix.groups + group) * PANEL);
    return _mm512_insertf32x8(_mm512_castps256_ps512(one), other, 1);
}

#endif

}  // namespace galley
