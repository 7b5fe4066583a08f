// Products of 4- and 8-bit weights with activations that are integers too, and of floating ones as they are.
//
// Eight neighbouring outputs are a panel. Beside weights that are integers, activations become integers by blocks
// of 32, each with a scale of its own: 8 bits beside 4-bit weights, 16 bits beside 8-bit ones, so that a block's
// sum of products is exact. Sums of blocks are floats, added in the order of the inputs however many rows there
// are: a row's result does not depend on its neighbours. Layouts are those of interleaved.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../lanes.h"

namespace galley {

constexpr int64_t BLOCK = 32, PANEL = 8;
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

// Rows of activations as integers by blocks, and as they are.
struct Activations {
    float* x;        // [rows][inputs]
    float* tiles;    // [tiles][inputs][rows of the tile], beside weights apart
    int8_t* bytes;   // [rows][inputs], beside 4-bit weights
    int16_t* words;  // [rows][inputs], beside 8-bit weights
    float* byte_scales;
    float* word_scales;  // [rows][blocks]
    int32_t* starts;     // [rows][blocks]: of `start_of`
};

// What a map's matrices need of activations.
struct Needs {
    bool bytes, words, tiles;
};

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define GALLEY_VNNI 1
#endif

// Where a block's sum of products with 4-bit codes starts, which are 8 too large; `sum` is of its activations.
inline int32_t start_of(int32_t sum) {
#if defined(GALLEY_AVX2) && !defined(GALLEY_VNNI)
    return ((-4 * sum) & 0xffff) * 0x10001u;  // half in each of the two sums of 16 bits
#else
    return -8 * sum;
#endif
}

inline float largest(const float* x) {
#ifdef GALLEY_AVX2
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_andnot_ps(sign, _mm256_loadu_ps(x));
    for (int i = 8; i < BLOCK; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    float most = 0;
    for (int i = 0; i < BLOCK; ++i) most = std::max(most, std::fabs(x[i]));
    return most;
#endif
}

// 32 numbers times `by`, rounded to the nearest integer.
template <typename Integer>
inline int32_t round_block(const float* x, float by, Integer* made) {
    int32_t sum = 0;
#ifdef GALLEY_AVX2
    const __m256 factor = _mm256_set1_ps(by);
    __m256i some[4];
    for (int i = 0; i < 4; ++i) some[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
    if (sizeof(Integer) == 1) {
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(some[0], some[1]), _mm256_add_epi32(some[2], some[3]));
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        sum = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
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
    for (int i = 0; i < BLOCK; ++i) {
        made[i] = static_cast<Integer>(std::nearbyint(x[i] * by));
        sum += made[i];
    }
#endif
    return sum;
}

// What is needed of a row, one of `rows`; blocks of zeros, or too small for a scale, become zeros.
inline void round_row(const Activations& to, int64_t row, int64_t rows, int64_t inputs, Needs needs) {
    const float* x = to.x + row * inputs;
    const int64_t blocks = needs.bytes || needs.words ? inputs / BLOCK : 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const float most = largest(x + block * BLOCK);
        const int64_t at = row * (inputs / BLOCK) + block, from = row * inputs + block * BLOCK;
        const bool some = most > 1e-30f;
        if (needs.bytes) {
            to.byte_scales[at] = most / 127;
            to.starts[at] = start_of(round_block(x + block * BLOCK, some ? 127 / most : 0, to.bytes + from));
        }
        if (needs.words) {
            to.word_scales[at] = most / 32767;
            round_block(x + block * BLOCK, some ? 32767 / most : 0, to.words + from);
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

// Four bytes of an activation for each of eight outputs.
inline __m256i spread_four(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

#ifdef GALLEY_VNNI
inline __m256i add_products(__m256i sum, __m256i codes, __m256i bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, codes, bytes);
#else
    return _mm256_dpbusd_avx_epi32(sum, codes, bytes);
#endif
}
#endif

// A block's sums of products, as integers of 32 bits: of PANELS panels, whose codes are `apart` bytes apart.
template <int BITS, int ROWS, int PANELS>
inline void block_sums(const uint8_t* codes, int64_t apart, const Activations& rows, int64_t row, int64_t inputs,
                       int64_t from, const int32_t* starts, int64_t blocks, __m256i (*sum)[ROWS]) {
    for (int r = 0; r < ROWS; ++r) {
        const __m256i start = _mm256_set1_epi32(BITS == 4 ? starts[r * blocks] : 0);
        for (int p = 0; p < PANELS; ++p) sum[p][r] = start;
    }
    if (BITS == 4) {
        const __m256i low = _mm256_set1_epi8(15);
        const int8_t* x = rows.bytes + row * inputs + from;
#pragma GCC unroll 1  // else products are all made first, and spilled
        for (int step = 0; step < BLOCK / 8; ++step) {
            __m256i one[PANELS], two[PANELS];
            for (int p = 0; p < PANELS; ++p) {
                const __m256i both =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + p * apart) + step);
                one[p] = _mm256_and_si256(both, low);
                two[p] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            }
            for (int r = 0; r < ROWS; ++r) {
                const __m256i left = spread_four(x + r * inputs + 8 * step);
                const __m256i right = spread_four(x + r * inputs + 8 * step + 4);
                for (int p = 0; p < PANELS; ++p) {
#ifdef GALLEY_VNNI
                    sum[p][r] = add_products(add_products(sum[p][r], one[p], left), two[p], right);
#else
                    // All sixteen products and the start are at most 30480, which fits 16 bits.
                    // Added so, else products are added to each other first, which spills sums.
                    asm("vpaddw %1, %0, %0" : "+x"(sum[p][r]) : "x"(_mm256_maddubs_epi16(one[p], left)));
                    asm("vpaddw %1, %0, %0" : "+x"(sum[p][r]) : "x"(_mm256_maddubs_epi16(two[p], right)));
#endif
                }
            }
        }
#ifndef GALLEY_VNNI
        for (int p = 0; p < PANELS; ++p)
            for (int r = 0; r < ROWS; ++r) sum[p][r] = _mm256_madd_epi16(sum[p][r], _mm256_set1_epi16(1));
#endif
    } else {
        const int16_t* x = rows.words + row * inputs + from;
#pragma GCC unroll 1
        for (int step = 0; step < BLOCK / 2; ++step) {
            __m256i some[PANELS];
            for (int p = 0; p < PANELS; ++p)
                some[p] = _mm256_cvtepi8_epi16(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + p * apart) + step));
            for (int r = 0; r < ROWS; ++r) {
                const __m256i two = spread_four(x + r * inputs + 2 * step);
                for (int p = 0; p < PANELS; ++p) {
                    sum[p][r] = _mm256_add_epi32(sum[p][r], _mm256_madd_epi16(some[p], two));
                    asm("" : "+x"(sum[p][r]));
                }
            }
        }
    }
}

#ifdef GALLEY_AVX512

inline __m512i side_by_side(__m256i one, __m256i other) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1);
}

template <typename Number>
inline __m512i spread_wide(const Number* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// `block_sums` of two panels, side by side.
template <int BITS, int ROWS>
inline void pair_block(const uint8_t* codes, int64_t apart, const Activations& rows, int64_t row, int64_t inputs,
                       int64_t from, const int32_t* starts, int64_t blocks, __m512i* sum) {
    for (int r = 0; r < ROWS; ++r) sum[r] = _mm512_set1_epi32(BITS == 4 ? starts[r * blocks] : 0);
    if (BITS == 4) {
        const __m512i low = _mm512_set1_epi8(15);
        const int8_t* x = rows.bytes + row * inputs + from;
        for (int step = 0; step < BLOCK / 8; ++step) {
            const __m256i* one = reinterpret_cast<const __m256i*>(codes) + step;
            const __m256i* other = reinterpret_cast<const __m256i*>(codes + apart) + step;
            const __m512i both = side_by_side(_mm256_loadu_si256(one), _mm256_loadu_si256(other));
            const __m512i left = _mm512_and_si512(both, low);
            const __m512i right = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* own = x + r * inputs + 8 * step;
                sum[r] = _mm512_dpbusd_epi32(sum[r], left, spread_wide(own));
                sum[r] = _mm512_dpbusd_epi32(sum[r], right, spread_wide(own + 4));
            }
        }
    } else {
        const int16_t* x = rows.words + row * inputs + from;
        for (int step = 0; step < BLOCK / 2; ++step) {
            const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + step);
            const __m128i other = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + apart) + step);
            const __m512i some = _mm512_cvtepi8_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1));
            for (int r = 0; r < ROWS; ++r)
                sum[r] = _mm512_dpwssd_epi32(sum[r], some, spread_wide(x + r * inputs + 2 * step));
        }
    }
}

// Sums [2][ROWS][8] of two panels.
template <int BITS, int ROWS>
inline void pair_sums(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* found) {
    const int64_t inputs = matrix.inputs, groups = matrix.groups, blocks = inputs / BLOCK, each = blocks / groups;
    const int64_t apart = PANEL * inputs * BITS / 8, bytes = PANEL * BLOCK * BITS / 8;  // of a panel, of its block
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    const float* scales = (BITS == 4 ? rows.byte_scales : rows.word_scales) + row * blocks;
    const int32_t* starts = BITS == 4 ? rows.starts + row * blocks : nullptr;
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        __m512 part[ROWS];
        for (int r = 0; r < ROWS; ++r) part[r] = _mm512_setzero_ps();
        for (int64_t block = group * each; block < (group + 1) * each; ++block) {
            if (!row)  // see `panel_sums`
                for (int64_t line = 0; line < 2 * bytes; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(codes) + 2 * (apart + block * bytes) + line,
                                 _MM_HINT_T0);
            __m512i sum[ROWS];
            pair_block<BITS, ROWS>(codes + block * bytes, apart, rows, row, inputs, block * BLOCK, starts + block,
                                   blocks, sum);
            for (int r = 0; r < ROWS; ++r)
                part[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_set1_ps(scales[r * blocks + block]),
                                          part[r]);
        }
        const __m256 one = eight_scales(matrix, (panel * groups + group) * PANEL);
        const __m256 other = eight_scales(matrix, ((panel + 1) * groups + group) * PANEL);
        const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(one), other, 1);
        for (int r = 0; r < ROWS; ++r) total[r] = _mm512_fmadd_ps(scale, part[r], total[r]);
    }
    for (int r = 0; r < ROWS; ++r) put(found + r * PANEL, found + (ROWS + r) * PANEL, total[r]);
}

#endif

// Sums [PANELS][ROWS][8] of neighbouring panels.
template <int BITS, int ROWS, int PANELS>
inline void panel_sums(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* found) {
#ifdef GALLEY_AVX512
    if constexpr (PANELS == 2) return pair_sums<BITS, ROWS>(matrix, panel, rows, row, found);
#endif
    const int64_t inputs = matrix.inputs, groups = matrix.groups, blocks = inputs / BLOCK, each = blocks / groups;
    const int64_t apart = PANEL * inputs * BITS / 8;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    const float* scales = (BITS == 4 ? rows.byte_scales : rows.word_scales) + row * blocks;
    const int32_t* starts = BITS == 4 ? rows.starts + row * blocks : nullptr;
    __m256 total[PANELS][ROWS];
    for (int p = 0; p < PANELS; ++p)
        for (int r = 0; r < ROWS; ++r) total[p][r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        __m256 part[PANELS][ROWS];
        for (int p = 0; p < PANELS; ++p)
            for (int r = 0; r < ROWS; ++r) part[p][r] = _mm256_setzero_ps();
        for (int64_t block = group * each; block < (group + 1) * each; ++block) {
            if (!row)  // rows to come need none of this from memory, but the next panels do
                for (int64_t line = 0; line < PANELS * PANEL * BLOCK * BITS / 8; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(codes) + PANELS * apart +
                                     block * PANELS * PANEL * BLOCK * BITS / 8 + line,
                                 _MM_HINT_T0);
            __m256i sum[PANELS][ROWS];
            block_sums<BITS, ROWS, PANELS>(codes + block * PANEL * BLOCK * BITS / 8, apart, rows, row, inputs,
                                           block * BLOCK, starts + block, blocks, sum);
            for (int r = 0; r < ROWS; ++r) {
                const __m256 scale = _mm256_set1_ps(scales[r * blocks + block]);
                for (int p = 0; p < PANELS; ++p)
                    part[p][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[p][r]), scale, part[p][r]);
            }
        }
        for (int p = 0; p < PANELS; ++p) {
            const __m256 scale = eight_scales(matrix, ((panel + p) * groups + group) * PANEL);
            for (int r = 0; r < ROWS; ++r) total[p][r] = _mm256_fmadd_ps(scale, part[p][r], total[p][r]);
        }
    }
    for (int p = 0; p < PANELS; ++p)
        for (int r = 0; r < ROWS; ++r) _mm256_storeu_ps(found + (p * ROWS + r) * PANEL, total[p][r]);
}

#else

template <int BITS, int ROWS, int PANELS>
inline void panel_sums(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* found) {
    const int64_t inputs = matrix.inputs, groups = matrix.groups, blocks = inputs / BLOCK, each = blocks / groups;
    for (int64_t place = 0; place < PANELS * ROWS * PANEL; ++place) {
        const int64_t from = panel + place / (ROWS * PANEL), r = row + place / PANEL % ROWS, out = place % PANEL;
        const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + from * PANEL * inputs * BITS / 8;
        float total = 0;
        for (int64_t group = 0; group < groups; ++group) {
            float part = 0;
            for (int64_t block = group * each; block < (group + 1) * each; ++block) {
                const int64_t at = r * blocks + block;
                int32_t sum = BITS == 4 ? rows.starts[at] : 0;
                for (int64_t k = block * BLOCK; k < (block + 1) * BLOCK; ++k) {
                    if (BITS == 4) {
                        const uint8_t both = codes[k / 8 * PANEL * 4 + out * 4 + k % 4];
                        sum += (k % 8 < 4 ? both & 15 : both >> 4) * rows.bytes[r * inputs + k];
                    } else {
                        sum += static_cast<int8_t>(codes[k / 2 * PANEL * 2 + out * 2 + k % 2]) *
                               rows.words[r * inputs + k];
                    }
                }
                const float scale = BITS == 4 ? rows.byte_scales[at] : rows.word_scales[at];
                part = std::fma(static_cast<float>(sum), scale, part);
            }
            const float scale = wide(matrix.scales, matrix.scales_wide, (from * groups + group) * PANEL + out);
            total = std::fma(scale, part, total);
        }
        found[place] = total;
    }
}

#endif

// What the next panels need of memory, which a tile asks for at one input, `due`, and at each `every` after it.
struct Ahead {
    const char* weights;
    int64_t apart, input, due, every;  // bytes from panel to panel and from input to input; inputs
};

// What registers hold beside floating weights: of PANELS panels of outputs, sums of up to WIDEST rows.
template <int PANELS>
struct Held {
    using Register = Lanes;
    static constexpr int REGISTERS = PANELS, WIDEST = 6;
    static Register same(float value) { return all(value); }
    template <typename Weight>
    static Register read(const Weight* from, int64_t) {
        return lanes(from);
    }
    static void write(float* to, int64_t, Register value) { put(to, value); }
};
#ifdef GALLEY_AVX512
template <>
struct Held<2> {
    using Register = Wide;
    static constexpr int REGISTERS = 1, WIDEST = 12;
    static Register same(float value) { return _mm512_set1_ps(value); }
    template <typename Weight>
    static Register read(const Weight* from, int64_t apart) {
        return lanes(from, from + apart);
    }
    static void write(float* to, int64_t apart, Register value) { put(to, to + apart, value); }
};
#endif

// Floating weights: a row's products are added in the order of the inputs, and sums of 64 to each other. This adds
// those of up to 64 inputs, `count`, to total [PANELS][..][8], whose panels are `rows` rows apart. If KEPT, the
// weights are left as floats in `kept` [PANELS][64][8]. A line of the cache is LINE inputs of the weights in memory.
template <typename Weight, int ROWS, int PANELS, bool KEPT, int LINE>
inline void add_floats(const Weight* weights, int64_t apart, const float* x, int64_t inputs, int64_t count,
                       float* total, int64_t rows, Ahead ahead, float* kept) {
    using Here = Held<PANELS>;
    constexpr int REGISTERS = Here::REGISTERS;
    typename Here::Register part[REGISTERS][ROWS];
    for (int p = 0; p < REGISTERS; ++p)
        for (int r = 0; r < ROWS; ++r) part[p][r] = Here::same(0);
    const auto add = [&](int64_t i) {
        typename Here::Register some[REGISTERS];
        for (int p = 0; p < REGISTERS; ++p) some[p] = once(Here::read(weights + p * apart + i * PANEL, apart));
        if (KEPT)
            for (int p = 0; p < REGISTERS; ++p)
                Here::write(kept + (p * SUMMED + i) * PANEL, SUMMED * PANEL, some[p]);
        for (int r = 0; r < ROWS; ++r) {
            const typename Here::Register one = Here::same(x[r * inputs + i]);
            for (int p = 0; p < REGISTERS; ++p) part[p][r] = fused(some[p], one, part[p][r]);
        }
    };
    int64_t i = 0;
    for (; i + LINE <= count; i += LINE) {
#ifdef GALLEY_AVX2
        if (i == ahead.due) {
            for (int p = 0; p < PANELS; ++p)
                _mm_prefetch(ahead.weights + p * ahead.apart + i * ahead.input, _MM_HINT_T0);
            ahead.due += ahead.every;
        }
#endif
#pragma GCC unroll 4
        for (int64_t k = 0; k < LINE; ++k) add(i + k);
    }
    for (; i < count; ++i) add(i);
    for (int p = 0; p < REGISTERS; ++p)
        for (int r = 0; r < ROWS; ++r) {
            float* to = total + (p * rows + r) * PANEL;
            Here::write(to, rows * PANEL, Here::read(to, rows * PANEL) + part[p][r]);
        }
}

// The same for a tile of so many rows.
template <typename Weight, int PANELS, bool KEPT, int LINE, int... LESS>
inline auto adding(int64_t rows, std::integer_sequence<int, LESS...>) {
    static constexpr decltype(&add_floats<Weight, 1, PANELS, KEPT, LINE>) by_rows[] = {
        add_floats<Weight, LESS + 1, PANELS, KEPT, LINE>...};
    return by_rows[rows - 1];
}
template <typename Weight, int PANELS, bool KEPT, int LINE>
inline auto adding(int64_t rows) {
    return adding<Weight, PANELS, KEPT, LINE>(rows, std::make_integer_sequence<int, Held<PANELS>::WIDEST>());
}

// Rows are taken in tiles as even as can be, all of them over 64 inputs before the next 64. Of more than two tiles
// the first keeps 16-bit weights as floats for the others, and each asks memory for a share of the next panels.
template <typename Weight, int PANELS>
inline void floating_rows(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, float* out,
                          int64_t stride) {
    constexpr int64_t WIDEST = Held<PANELS>::WIDEST;
    const int64_t inputs = matrix.inputs, apart = PANEL * inputs, tiles = (rows + WIDEST - 1) / WIDEST;
    const int64_t low = rows / tiles, higher = rows % tiles;  // tiles of one row more
    const Weight* weights = static_cast<const Weight*>(matrix.codes) + panel * apart;
    constexpr int64_t width = sizeof(Weight), line = 64 / (PANEL * width);
    const bool kept = tiles > 2 && width == 2;
    alignas(64) float floats[PANELS * SUMMED * PANEL], total[PANELS * SLAB * PANEL];
    std::memset(total, 0, PANELS * rows * PANEL * sizeof(float));
    for (int64_t first = 0; first < inputs; first += SUMMED) {
        const int64_t count = std::min(SUMMED, inputs - first);
        const Weight* chunk = weights + first * PANEL;
        Ahead ahead{reinterpret_cast<const char*>(chunk + PANELS * apart), apart * width, PANEL * width, 0,
                    tiles * line};
        int64_t row = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t some = low + (tile < higher);
            const float* x = from.x + row * inputs + first;
            float* to = total + row * PANEL;
            if (tile && kept)
                adding<float, PANELS, false, line>(some)(floats, SUMMED * PANEL, x, inputs, count, to, rows, ahead,
                                                         nullptr);
            else if (kept)
                adding<Weight, PANELS, true, line>(some)(chunk, apart, x, inputs, count, to, rows, ahead, floats);
            else
                adding<Weight, PANELS, false, line>(some)(chunk, apart, x, inputs, count, to, rows, ahead, nullptr);
            ahead.due += line;
            row += some;
        }
    }
    for (int p = 0; p < PANELS; ++p) {
        const int64_t first = (panel + p) * PANEL, own = std::min(PANEL, matrix.outputs - first);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(out + r * stride + matrix.first + first, total + (p * rows + r) * PANEL, own * sizeof(float));
    }
}

// What weights apart add to a panel, in the order of their inputs.
template <int ROWS>
inline void add_apart(const Matrix& matrix, int64_t first, int64_t count, const Activations& rows, int64_t row,
                      float* found) {
    const float* tile = rows.tiles + row * matrix.inputs;
    for (int64_t output = 0; output < count; ++output) {
        float added[ROWS] = {};
        for (int32_t at = matrix.starts[first + output]; at < matrix.starts[first + output + 1]; ++at) {
            const Apart apart = matrix.apart[at];
            const float* x = tile + apart.column * static_cast<int64_t>(ROWS);
            for (int r = 0; r < ROWS; ++r) added[r] = std::fma(apart.value, x[r], added[r]);
        }
        for (int r = 0; r < ROWS; ++r) found[r * PANEL + output] += added[r];
    }
}

template <int BITS, int ROWS, int PANELS>
inline void some_rows(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* out,
                      int64_t stride) {
    float found[PANELS * ROWS * PANEL];
    panel_sums<BITS, ROWS, PANELS>(matrix, panel, rows, row, found);
    for (int p = 0; p < PANELS; ++p) {
        const int64_t first = (panel + p) * PANEL, count = std::min(PANEL, matrix.outputs - first);
        float* own = found + p * ROWS * PANEL;
        if (matrix.starts) add_apart<ROWS>(matrix, first, count, rows, row, own);
        for (int r = 0; r < ROWS; ++r)
            std::memcpy(out + (row + r) * stride + matrix.first + first, own + r * PANEL, count * sizeof(float));
    }
}

// The same for a tile of so many rows.
template <int BITS, int PANELS, int... LESS>
inline auto tile_of(int64_t rows, std::integer_sequence<int, LESS...>) {
    static constexpr decltype(&some_rows<BITS, 1, PANELS>) by_rows[] = {some_rows<BITS, LESS + 1, PANELS>...};
    return by_rows[rows - 1];
}

template <int BITS, int PANELS>
inline void all_rows(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, float* out,
                     int64_t stride) {
    if constexpr (BITS > 8) {
        floating_rows<std::conditional_t<BITS == 16, uint16_t, float>, PANELS>(matrix, panel, from, rows, out, stride);
    } else {
        for (int64_t row = 0; row < rows; row += TILE)
            tile_of<BITS, PANELS>(std::min<int64_t>(TILE, rows - row), std::make_integer_sequence<int, TILE>())(
                matrix, panel, from, row, out, stride);
    }
}

// float32 out [rows][stride]; called by all threads of a parallel region, and waits for none of them at its end.
template <int BITS>
inline void product(const Matrix& matrix, const Activations& from, int64_t rows, float* out, int64_t stride) {
    const int64_t panels = (matrix.outputs + PANEL - 1) / PANEL;
    constexpr int TOGETHER = 2;  // what registers hold
#pragma omp for schedule(guided, 2) nowait  // cores may be shared with others, who slow one down
    for (int64_t panel = 0; panel < panels; panel += TOGETHER)
        (panels - panel < TOGETHER ? all_rows<BITS, 1> : all_rows<BITS, TOGETHER>)(matrix, panel, from, rows, out,
                                                                                  stride);
}

inline void product(const Matrix& matrix, const Activations& from, int64_t rows, float* out, int64_t stride) {
    auto made = matrix.bits == 4    ? product<4>
                : matrix.bits == 8  ? product<8>
                : matrix.bits == 16 ? product<16>
                                    : product<32>;
    made(matrix, from, rows, out, stride);
}

}  // namespace galley
