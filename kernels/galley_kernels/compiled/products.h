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

// What registers hold: of PANELS panels of outputs, sums of up to WIDEST rows.
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

#ifdef GALLEY_AVX2

// Of activations, which each output takes.
inline int32_t four_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return four;
}

// Sums of integers, as `Held` has those of floats. Codes are `apart` bytes apart from panel to panel. Without VNNI,
// sums of 4-bit codes are two of 16 bits, which a span's fit: 32 products with -8 to 7 of -127 to 127.
template <int PANELS>
struct Counted {
    using Register = __m256i;
    // Eight inputs' 4-bit codes, those of the first four in the low halves of bytes; two inputs' of 8 bits, as words.
    static Register halves(const uint8_t* codes, int64_t, int64_t step) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + step);
    }
    static Register low(Register both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
    static Register high(Register both) { return low(_mm256_srli_epi16(both, 4)); }
    static Register words(const uint8_t* codes, int64_t, int64_t step) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + step));
    }
    static Register spread(const void* from) { return _mm256_set1_epi32(four_bytes(from)); }
    static Register start(const int32_t* blocks, int64_t count) {
#ifdef GALLEY_VNNI
        return _mm256_set1_epi32(count == 2 ? blocks[0] + blocks[1] : blocks[0]);
#else
        const Register one = _mm256_set1_epi32(blocks[0]);
        return count == 2 ? _mm256_add_epi16(one, _mm256_set1_epi32(blocks[1])) : one;
#endif
    }
    static Register none() { return _mm256_setzero_si256(); }
    static void add_bytes(Register& sum, Register codes, Register bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        sum = _mm256_dpbusd_epi32(sum, codes, bytes);
#elif defined(GALLEY_VNNI)
        sum = _mm256_dpbusd_avx_epi32(sum, codes, bytes);
#else
        Register made;  // added at once: else all products are made first, which spills sums
        asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                     : "+x"(sum), "=&x"(made)
                     : "x"(codes), "x"(bytes));
#endif
    }
    static void add_words(Register& sum, Register codes, Register words) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, words));
        asm("" : "+x"(sum));
    }
    template <int BITS>
    static Lanes floats(Register sum) {
#ifndef GALLEY_VNNI
        if (BITS == 4) sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
        return _mm256_cvtepi32_ps(sum);
    }
    static Lanes scales(const Matrix& matrix, int64_t panel, int64_t group) {
        return eight_scales(matrix, (panel * matrix.groups + group) * PANEL);
    }
};

#ifdef GALLEY_AVX512
template <>
struct Counted<2> {
    using Register = __m512i;
    static Register halves(const uint8_t* codes, int64_t apart, int64_t step) {
        const __m256i* one = reinterpret_cast<const __m256i*>(codes) + step;
        const __m256i* other = reinterpret_cast<const __m256i*>(codes + apart) + step;
        return side_by_side(_mm256_loadu_si256(one), _mm256_loadu_si256(other));
    }
    static Register low(Register both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
    static Register high(Register both) { return low(_mm512_srli_epi16(both, 4)); }
    static Register words(const uint8_t* codes, int64_t apart, int64_t step) {
        const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + step);
        const __m128i other = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + apart) + step);
        return _mm512_cvtepi8_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1));
    }
    static Register spread(const void* from) { return _mm512_set1_epi32(four_bytes(from)); }
    static Register start(const int32_t* blocks, int64_t count) {
        return _mm512_set1_epi32(count == 2 ? blocks[0] + blocks[1] : blocks[0]);
    }
    static Register none() { return _mm512_setzero_si512(); }
    static void add_bytes(Register& sum, Register codes, Register bytes) {
        sum = _mm512_dpbusd_epi32(sum, codes, bytes);
    }
    static void add_words(Register& sum, Register codes, Register words) {
        sum = _mm512_dpwssd_epi32(sum, codes, words);
    }
    template <int BITS>
    static Wide floats(Register sum) {
        return _mm512_cvtepi32_ps(sum);
    }
    static Wide scales(const Matrix& matrix, int64_t panel, int64_t group) { return pair_scales(matrix, panel, group); }
};
#endif

// Adds a block's products to the sums of PANELS panels.
template <int BITS, int ROWS, int PANELS>
inline void add_block(const uint8_t* codes, int64_t apart, const Activations& rows, int64_t row, int64_t inputs,
                      int64_t from, typename Counted<PANELS>::Register (*sum)[ROWS]) {
    using Here = Counted<PANELS>;
    using Register = typename Here::Register;
    constexpr int REGISTERS = Held<PANELS>::REGISTERS;
    if (BITS == 4) {
        const int8_t* x = rows.bytes + row * inputs + from;
#pragma GCC unroll 4
        for (int step = 0; step < BLOCK / 8; ++step) {
            for (int half = 0; half < 2; ++half) {
                Register some[REGISTERS];
                for (int p = 0; p < REGISTERS; ++p) {
                    const Register both = Here::halves(codes + p * apart, apart, step);
                    some[p] = half ? Here::high(both) : Here::low(both);
                }
                for (int r = 0; r < ROWS; ++r) {
                    const Register four = Here::spread(x + r * inputs + 8 * step + 4 * half);
                    for (int p = 0; p < REGISTERS; ++p) Here::add_bytes(sum[p][r], some[p], four);
                }
            }
        }
    } else {
        const int16_t* x = rows.words + row * inputs + from;
#pragma GCC unroll 4
        for (int step = 0; step < BLOCK / 2; ++step) {
            Register some[REGISTERS];
            for (int p = 0; p < REGISTERS; ++p) some[p] = Here::words(codes + p * apart, apart, step);
            for (int r = 0; r < ROWS; ++r) {
                const Register two = Here::spread(x + r * inputs + 2 * step);
                for (int p = 0; p < REGISTERS; ++p) Here::add_words(sum[p][r], some[p], two);
            }
        }
    }
}

// Sums of `count` blocks' products, of no more than one span, for PANELS panels.
template <int BITS, int ROWS, int PANELS>
[[gnu::always_inline]] inline void sum_span(const uint8_t* codes, int64_t apart, const Activations& rows, int64_t row,
                                            int64_t inputs, const int32_t* starts, int64_t blocks, int64_t block,
                                            int64_t count, typename Counted<PANELS>::Register (*sum)[ROWS]) {
    using Here = Counted<PANELS>;
    constexpr int REGISTERS = Held<PANELS>::REGISTERS;
    constexpr int64_t bytes = PANEL * BLOCK * BITS / 8;  // of a panel's block
    if (!row)  // rows to come need none of this from memory, but the next panels do
        for (int64_t line = 0; line < PANELS * count * bytes; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(codes) + PANELS * (apart + block * bytes) + line, _MM_HINT_T0);
    for (int r = 0; r < ROWS; ++r) {
        sum[0][r] = BITS == 4 ? Here::start(starts + r * blocks + block, count) : Here::none();
        for (int p = 1; p < REGISTERS; ++p) sum[p][r] = sum[0][r];
    }
    for (int64_t b = block; b < block + count; ++b)
        add_block<BITS, ROWS, PANELS>(codes + b * bytes, apart, rows, row, inputs, b * BLOCK, sum);
}

// Sums [PANELS][ROWS][8] of neighbouring panels.
template <int BITS, int ROWS, int PANELS>
inline void panel_sums(const Matrix& matrix, int64_t panel, const Activations& rows, int64_t row, float* found) {
    using Here = Counted<PANELS>;
    using Floats = Held<PANELS>;
    constexpr int REGISTERS = Floats::REGISTERS;
    const int64_t inputs = matrix.inputs, groups = matrix.groups, blocks = inputs / BLOCK, each = blocks / groups;
    const int64_t apart = PANEL * inputs * BITS / 8;  // of panels, in bytes
    const int64_t spans = spans_of(inputs);
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    const float* scales = (BITS == 4 ? rows.byte_scales : rows.word_scales) + row * spans;
    const int32_t* starts = BITS == 4 ? rows.starts + row * blocks : nullptr;
    typename Floats::Register total[REGISTERS][ROWS];
    for (int p = 0; p < REGISTERS; ++p)
        for (int r = 0; r < ROWS; ++r) total[p][r] = Floats::same(0);
    const auto of_one_span = [&](auto size) __attribute__((always_inline)) {  // groups of one span, the usual ones
        constexpr int64_t EACH = decltype(size)::value;
        for (int64_t group = 0; group < groups; ++group) {
            typename Here::Register sum[REGISTERS][ROWS];
            sum_span<BITS, ROWS, PANELS>(codes, apart, rows, row, inputs, starts, blocks, EACH * group, EACH, sum);
            for (int p = 0; p < REGISTERS; ++p) {
                const auto scale = Here::scales(matrix, panel + p, group);
                for (int r = 0; r < ROWS; ++r) {
                    const auto by = Floats::same(scales[r * spans + EACH * group / 2]);
                    total[p][r] = fused(scale, Here::template floats<BITS>(sum[p][r]) * by, total[p][r]);
                }
            }
        }
    };
    if (BITS == 4 && each == 2) {
        of_one_span(std::integral_constant<int64_t, 2>());
    } else if (BITS == 4 && each == 1) {
        of_one_span(std::integral_constant<int64_t, 1>());
    } else {
        for (int64_t group = 0; group < groups; ++group) {
            typename Floats::Register part[REGISTERS][ROWS];
            for (int p = 0; p < REGISTERS; ++p)
                for (int r = 0; r < ROWS; ++r) part[p][r] = Floats::same(0);
            const int64_t last = (group + 1) * each;
            for (int64_t block = group * each, count; block < last; block += count) {
                count = blocks_together(block, last);
                typename Here::Register sum[REGISTERS][ROWS];
                sum_span<BITS, ROWS, PANELS>(codes, apart, rows, row, inputs, starts, blocks, block, count, sum);
                for (int r = 0; r < ROWS; ++r) {
                    const auto scale = Floats::same(scales[r * spans + block / 2]);
                    for (int p = 0; p < REGISTERS; ++p)
                        part[p][r] = fused(Here::template floats<BITS>(sum[p][r]), scale, part[p][r]);
                }
            }
            for (int p = 0; p < REGISTERS; ++p) {
                const auto scale = Here::scales(matrix, panel + p, group);
                for (int r = 0; r < ROWS; ++r) total[p][r] = fused(scale, part[p][r], total[p][r]);
            }
        }
    }
    for (int p = 0; p < REGISTERS; ++p)
        for (int r = 0; r < ROWS; ++r) Floats::write(found + (p * ROWS + r) * PANEL, ROWS * PANEL, total[p][r]);
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
