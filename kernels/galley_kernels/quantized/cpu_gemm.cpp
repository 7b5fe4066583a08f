// Products with 4- and 8-bit weights on a CPU: codes become float32 in registers, eight at a time.
//
// Plain C functions over pointers, so that building takes a second and depends on no library's binary interface.
// Layouts are those of packed.py: words [output][input * bits / 32], scales [output][groups].

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define GALLEY_AVX2 1
#endif

namespace {

// Scales and values apart are bfloat16 or float32.
struct Floats {
    const void* data;
    int wide;
    float operator[](int64_t at) const {
        if (wide) return static_cast<const float*>(data)[at];
        uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
};

#ifdef GALLEY_AVX2

using Eight = __m256;
inline Eight zero() { return _mm256_setzero_ps(); }
inline Eight load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Eight value) { _mm256_storeu_ps(to, value); }
inline Eight spread(float value) { return _mm256_set1_ps(value); }
inline Eight multiply_add(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
inline Eight minus(Eight a, Eight b) { return _mm256_sub_ps(a, b); }
inline Eight times(Eight a, Eight b) { return _mm256_mul_ps(a, b); }
inline float sum(Eight v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
template <int BITS>
inline Eight codes(const int32_t* words, int64_t eighth) {
    if (BITS == 4) {
        const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        __m256i word = _mm256_set1_epi32(words[eighth]);
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(word, shifts), _mm256_set1_epi32(15)));
    }
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + 2 * eighth));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

#else

struct Eight {
    float at[8];
};
inline Eight zero() { return Eight{}; }
inline Eight load(const float* from) {
    Eight made;
    std::memcpy(made.at, from, sizeof made.at);
    return made;
}
inline void store(float* to, Eight value) { std::memcpy(to, value.at, sizeof value.at); }
inline Eight spread(float value) {
    Eight made;
    for (int i = 0; i < 8; ++i) made.at[i] = value;
    return made;
}
inline Eight multiply_add(Eight a, Eight b, Eight c) {
    for (int i = 0; i < 8; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
}
inline Eight minus(Eight a, Eight b) {
    for (int i = 0; i < 8; ++i) a.at[i] -= b.at[i];
    return a;
}
inline Eight times(Eight a, Eight b) {
    for (int i = 0; i < 8; ++i) a.at[i] *= b.at[i];
    return a;
}
inline float sum(Eight v) {
    float total = 0;
    for (int i = 0; i < 8; ++i) total += v.at[i];
    return total;
}
template <int BITS>
inline Eight codes(const int32_t* words, int64_t eighth) {
    Eight made;
    for (int i = 0; i < 8; ++i) {
        if (BITS == 4) {
            made.at[i] = static_cast<float>((static_cast<uint32_t>(words[eighth]) >> (4 * i)) & 15);
        } else {
            uint32_t word = static_cast<uint32_t>(words[2 * eighth + i / 4]);
            made.at[i] = static_cast<float>((word >> (8 * (i % 4))) & 255);
        }
    }
    return made;
}

#endif

// OUTPUTS neighbouring outputs for ROWS rows of activations: so many sums at once hide the latency of each. Codes
// are used as they lie, without a sign; `sums` are of each group's activations times what that adds to a code.
template <int BITS, int ROWS, int OUTPUTS>
inline void some_outputs(const float* x, const float* sums, const int32_t* words, Floats scales, int64_t output,
                         int64_t inputs, int64_t groups, float* found) {
    const int64_t eighths = inputs / groups / 8, row_words = inputs * BITS / 32;
    Eight total[OUTPUTS][ROWS];
    float offset[OUTPUTS][ROWS];
    for (int out = 0; out < OUTPUTS; ++out)
        for (int row = 0; row < ROWS; ++row) {
            total[out][row] = zero();
            offset[out][row] = 0;
        }
    for (int64_t group = 0; group < groups; ++group) {
        Eight product[OUTPUTS][ROWS];
        for (int out = 0; out < OUTPUTS; ++out)
            for (int row = 0; row < ROWS; ++row) product[out][row] = zero();
        for (int64_t eighth = group * eighths; eighth < (group + 1) * eighths; ++eighth) {
            Eight some[ROWS];
            for (int row = 0; row < ROWS; ++row) some[row] = load(x + row * inputs + 8 * eighth);
            for (int out = 0; out < OUTPUTS; ++out) {
                const Eight weights = codes<BITS>(words + (output + out) * row_words, eighth);
                for (int row = 0; row < ROWS; ++row)
                    product[out][row] = multiply_add(weights, some[row], product[out][row]);
            }
        }
        for (int out = 0; out < OUTPUTS; ++out) {
            const float scale = scales[(output + out) * groups + group];
            for (int row = 0; row < ROWS; ++row) {
                total[out][row] = multiply_add(spread(scale), product[out][row], total[out][row]);
                offset[out][row] += scale * sums[row * groups + group];
            }
        }
    }
    for (int out = 0; out < OUTPUTS; ++out)
        for (int row = 0; row < ROWS; ++row) found[out * ROWS + row] = sum(total[out][row]) - offset[out][row];
}

// All rows of the outputs from `first` up to `last`, which are at most four.
template <int BITS, int ROWS>
inline void some_rows(const float* x, const float* sums, const int32_t* words, Floats scales, const int32_t* starts,
                      const int32_t* columns, Floats values, float* out, int64_t first, int64_t last,
                      int64_t outputs, int64_t inputs, int64_t groups) {
    float found[4 * ROWS];
    if (last - first == 4) {
        if (ROWS <= 2) {
            some_outputs<BITS, ROWS, 4>(x, sums, words, scales, first, inputs, groups, found);
        } else {
            some_outputs<BITS, ROWS, 2>(x, sums, words, scales, first, inputs, groups, found);
            some_outputs<BITS, ROWS, 2>(x, sums, words, scales, first + 2, inputs, groups, found + 2 * ROWS);
        }
    } else {
        for (int64_t output = first; output < last; ++output)
            some_outputs<BITS, ROWS, 1>(x, sums, words, scales, output, inputs, groups,
                                        found + (output - first) * ROWS);
    }
    for (int64_t output = first; output < last; ++output) {
        float* own = found + (output - first) * ROWS;
        if (starts)
            for (int32_t at = starts[output]; at < starts[output + 1]; ++at)
                for (int row = 0; row < ROWS; ++row) own[row] += values[at] * x[row * inputs + columns[at]];
        for (int row = 0; row < ROWS; ++row) out[row * outputs + output] = own[row];
    }
}

template <int BITS>
void product(const float* x, const int32_t* words, Floats scales, const int32_t* starts, const int32_t* columns,
             Floats values, float* out, int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int threads) {
    const int64_t group = inputs / groups;
    std::vector<float> sums(rows * groups);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t g = 0; g < groups; ++g) {
            float total = 0;
            for (int64_t k = g * group; k < (g + 1) * group; ++k) total += x[row * inputs + k];
            sums[row * groups + g] = total * (1 << (BITS - 1));
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < outputs; first += 4) {
        const int64_t last = std::min(first + 4, outputs);
        for (int64_t row = 0; row < rows; row += 4) {
            auto few = rows - row >= 4   ? some_rows<BITS, 4>
                       : rows - row == 3 ? some_rows<BITS, 3>
                       : rows - row == 2 ? some_rows<BITS, 2>
                                         : some_rows<BITS, 1>;
            few(x + row * inputs, sums.data() + row * groups, words, scales, starts, columns, values,
                out + row * outputs, first, last, outputs, inputs, groups);
        }
    }
}

template <int BITS>
void expand(const int32_t* words, Floats scales, const int32_t* starts, const int32_t* columns, Floats values,
            float* out, int64_t outputs, int64_t inputs, int64_t groups, int threads) {
    const int64_t eighths = inputs / groups / 8, row_words = inputs * BITS / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t output = 0; output < outputs; ++output) {
        float* line = out + output * inputs;
        for (int64_t eighth = 0; eighth < inputs / 8; ++eighth) {
            const Eight scale = spread(scales[output * groups + eighth / eighths]);
            const Eight code = minus(codes<BITS>(words + output * row_words, eighth), spread(1 << (BITS - 1)));
            store(line + 8 * eighth, times(code, scale));
        }
        if (starts)
            for (int32_t at = starts[output]; at < starts[output + 1]; ++at) line[columns[at]] += values[at];
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// float32 out [rows][outputs] of float32 x [rows][inputs]; `starts` is null where nothing is apart.
void galley_product(int bits, const float* x, const int32_t* words, const void* scales, int scales_wide,
                    const int32_t* starts, const int32_t* columns, const void* values, int values_wide, float* out,
                    int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int threads) {
    (bits == 4 ? product<4> : product<8>)(x, words, {scales, scales_wide}, starts, columns, {values, values_wide},
                                          out, rows, outputs, inputs, groups, threads);
}

// float32 out [outputs][inputs]: the weights.
void galley_expand(int bits, const int32_t* words, const void* scales, int scales_wide, const int32_t* starts,
                   const int32_t* columns, const void* values, int values_wide, float* out, int64_t outputs,
                   int64_t inputs, int64_t groups, int threads) {
    (bits == 4 ? expand<4> : expand<8>)(words, {scales, scales_wide}, starts, columns, {values, values_wide}, out,
                                        outputs, inputs, groups, threads);
}
}
#pragma GCC visibility pop
