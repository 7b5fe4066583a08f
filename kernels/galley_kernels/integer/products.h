// Products of 4- and 8-bit weights with activations that are integers too, and of floating ones as they are.
//
// Sums of blocks are floats, added in the order of the inputs however many rows there are: a row's result does not
// depend on its neighbours, nor on how wide registers are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "matrix.h"
#include "tiles.h"

namespace galley {

#ifdef GALLEY_AVX2

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

template <typename Number>
inline __m512i spread_wide(const Number* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// Adds a block's products to the sums of two panels, side by side.
template <int BITS, int ROWS>
inline void pair_block(const uint8_t* codes, int64_t apart, const Activations& rows, int64_t row, int64_t inputs,
                       int64_t from, __m512i* sum) {
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
    const int64_t spans = spans_of(inputs);
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    const float* scales = (BITS == 4 ? rows.byte_scales : rows.word_scales) + row * spans;
    const int32_t* starts = rows.starts + row * blocks;
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        __m512 part[ROWS];
        for (int r = 0; r < ROWS; ++r) part[r] = _mm512_setzero_ps();
        const int64_t last = (group + 1) * each;
        for (int64_t block = group * each, count; block < last; block += count) {
            count = blocks_together(block, last);
            if (!row)  // see `panel_sums`
                for (int64_t line = 0; line < 2 * count * bytes; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(codes) + 2 * (apart + block * bytes) + line,
                                 _MM_HINT_T0);
            __m512i sum[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                const int32_t* start = starts + r * blocks + block;
                sum[r] = BITS == 4 ? _mm512_set1_epi32(count == 2 ? start[0] + start[1] : start[0])
                                   : _mm512_setzero_si512();
            }
            for (int64_t b = block; b < block + count; ++b)
                pair_block<BITS, ROWS>(codes + b * bytes, apart, rows, row, inputs, b * BLOCK, sum);
            for (int r = 0; r < ROWS; ++r)
                part[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_set1_ps(scales[r * spans + block / 2]),
                                          part[r]);
        }
        const __m512 scale = pair_scales(matrix, panel, group);
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
    const int64_t spans = spans_of(inputs);
    const float* scales = (BITS == 4 ? rows.byte_scales : rows.word_scales) + row * spans;
    const int32_t* starts = BITS == 4 ? rows.starts + row * blocks : nullptr;
    __m256 total[PANELS][ROWS];
    for (int p = 0; p < PANELS; ++p)
        for (int r = 0; r < ROWS; ++r) total[p][r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
        __m256 part[PANELS][ROWS];
        for (int p = 0; p < PANELS; ++p)
            for (int r = 0; r < ROWS; ++r) part[p][r] = _mm256_setzero_ps();
        const int64_t last = (group + 1) * each;
        for (int64_t block = group * each, count; block < last; block += count) {
            count = blocks_together(block, last);
            __m256i sum[PANELS][ROWS];
            for (int64_t b = block; b < block + count; ++b) {
                if (!row)  // rows to come need none of this from memory, but the next panels do
                    for (int64_t line = 0; line < PANELS * PANEL * BLOCK * BITS / 8; line += 64)
                        _mm_prefetch(reinterpret_cast<const char*>(codes) + PANELS * apart +
                                         b * PANELS * PANEL * BLOCK * BITS / 8 + line,
                                     _MM_HINT_T0);
                __m256i more[PANELS][ROWS];
                block_sums<BITS, ROWS, PANELS>(codes + b * PANEL * BLOCK * BITS / 8, apart, rows, row, inputs,
                                               b * BLOCK, starts + b, blocks, more);
                for (int p = 0; p < PANELS; ++p)
                    for (int r = 0; r < ROWS; ++r)
                        sum[p][r] = b == block ? more[p][r] : _mm256_add_epi32(sum[p][r], more[p][r]);
            }
            for (int r = 0; r < ROWS; ++r) {
                const __m256 scale = _mm256_set1_ps(scales[r * spans + block / 2]);
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
            const int64_t last = (group + 1) * each;
            for (int64_t block = group * each, count; block < last; block += count) {
                count = blocks_together(block, last);
                int32_t sum = 0;
                for (int64_t b = block; b < block + count; ++b) sum += BITS == 4 ? rows.starts[r * blocks + b] : 0;
                for (int64_t k = block * BLOCK; k < (block + count) * BLOCK; ++k) {
                    if (BITS == 4) {
                        const uint8_t both = codes[k / 8 * PANEL * 4 + out * 4 + k % 4];
                        sum += (k % 8 < 4 ? both & 15 : both >> 4) * rows.bytes[r * inputs + k];
                    } else {
                        sum += static_cast<int8_t>(codes[k / 2 * PANEL * 2 + out * 2 + k % 2]) *
                               rows.words[r * inputs + k];
                    }
                }
                const int64_t at = r * spans_of(inputs) + block / 2;
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

// A panel's outputs of a row, as many as there are.
inline void copy(const float* from, int64_t count, float* to) {
    if (count == PANEL)
        put(to, lanes(from));
    else
        std::memcpy(to, from, count * sizeof(float));
}

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
            copy(total + (p * rows + r) * PANEL, own, out + r * stride + matrix.first + first);
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

// Sums `found` [PANELS][ROWS][8], and what is added to them, into the result.
template <int ROWS, int PANELS>
inline void finish(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* found, float* out,
                   int64_t stride) {
    for (int p = 0; p < PANELS; ++p) {
        const int64_t first = (panel + p) * PANEL, count = std::min(PANEL, matrix.outputs - first);
        float* own = found + p * ROWS * PANEL;
        if (matrix.starts) add_apart<ROWS>(matrix, first, count, rows, row, own);
        for (int r = 0; r < ROWS; ++r) copy(own + r * PANEL, count, out + (row + r) * stride + matrix.first + first);
    }
}

template <int BITS, int ROWS, int PANELS>
inline void some_rows(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* out,
                      int64_t stride) {
    float found[PANELS * ROWS * PANEL];
    panel_sums<BITS, ROWS, PANELS>(matrix, panel, rows, row, found);
    finish<ROWS, PANELS>(matrix, panel, rows, row, found, out, stride);
}

#ifdef GALLEY_TILES

template <int ROWS>
inline void some_tiled(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, const Wide* sums,
                       float* out, int64_t stride) {
    float found[2 * ROWS * PANEL];
    for (int r = 0; r < ROWS; ++r) put(found + r * PANEL, found + (ROWS + r) * PANEL, sums[r]);
    finish<ROWS, 2>(matrix, panel, rows, row, found, out, stride);
}

template <int... LESS>
inline auto tiled_of(int64_t rows, std::integer_sequence<int, LESS...>) {
    static constexpr decltype(&some_tiled<1>) by_rows[] = {some_tiled<LESS + 1>...};
    return by_rows[rows - 1];
}

inline void tiled_rows(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, float* out,
                       int64_t stride) {
    Wide total[SLAB];
    tiled_sums(matrix, panel, from, rows, total);
    for (int64_t row = 0; row < rows; row += TILE)
        tiled_of(std::min<int64_t>(TILE, rows - row), std::make_integer_sequence<int, TILE>())(
            matrix, panel, from, row, total + row, out, stride);
}

#endif

// The same for a tile of so many rows.
template <int BITS, int PANELS, int... LESS>
inline auto tile_of(int64_t rows, std::integer_sequence<int, LESS...>) {
    static constexpr decltype(&some_rows<BITS, 1, PANELS>) by_rows[] = {some_rows<BITS, LESS + 1, PANELS>...};
    return by_rows[rows - 1];
}

template <int BITS, int PANELS>
inline void all_rows(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, float* out,
                     int64_t stride, bool tiled) {
#ifdef GALLEY_TILES
    if constexpr (BITS == 4 && PANELS == 2)
        if (tiled) return tiled_rows(matrix, panel, from, rows, out, stride);
#endif
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
    const Tiles tiles(BITS, rows);
#pragma omp for schedule(guided, 2) nowait  // cores may be shared with others, who slow one down
    for (int64_t panel = 0; panel < panels; panel += TOGETHER)
        (panels - panel < TOGETHER ? all_rows<BITS, 1> : all_rows<BITS, TOGETHER>)(matrix, panel, from, rows, out,
                                                                                  stride, tiles.held);
}

inline void product(const Matrix& matrix, const Activations& from, int64_t rows, float* out, int64_t stride) {
    auto made = matrix.bits == 4    ? product<4>
                : matrix.bits == 8  ? product<8>
                : matrix.bits == 16 ? product<16>
                                    : product<32>;
    made(matrix, from, rows, out, stride);
}

}  // namespace galley
