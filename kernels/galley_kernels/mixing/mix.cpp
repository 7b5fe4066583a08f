// log((1 - w) softmax(a) + w softmax(b)), one row after another; a thread takes whole rows.
//
// Plain C functions over pointers, as in ../quantized/cpu_gemm.cpp.

#include "../lanes.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

using galley::all;
using galley::exponential;
using galley::Lanes;
using galley::lanes;
using galley::put;

constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline Lanes larger(Lanes one, Lanes two) { return one > two ? one : two; }

// The last lanes of a row, filled with minus infinity.
inline Lanes rest(const float* from, int64_t count) {
    float padded[8];
    for (int64_t i = 0; i < 8; ++i) padded[i] = i < count ? from[i] : NEVER;
    return lanes(padded);
}

// log(sum(exp(x))); minus infinity where all of x is.
float log_sum(const float* x, int64_t count) {
    const int64_t whole = count / 8 * 8;
    Lanes most = rest(x + whole, count - whole);
    for (int64_t i = 0; i < whole; i += 8) most = larger(most, lanes(x + i));
    float highest = NEVER;
    for (int lane = 0; lane < 8; ++lane) highest = std::max(highest, most[lane]);
    if (highest < -FLT_MAX) return NEVER;
    Lanes sums = {};
    double total = 0;
    for (int64_t i = 0; i < whole; i += 8) {
        sums += exponential(lanes(x + i) - highest);
        if (i % 4096 == 0) {
            for (int lane = 0; lane < 8; ++lane) total += sums[lane];
            sums = Lanes{};
        }
    }
    if (whole < count) sums += exponential(rest(x + whole, count - whole) - highest);
    for (int lane = 0; lane < 8; ++lane) total += sums[lane];
    return highest + static_cast<float>(std::log(total));
}

// log(exp(one) + exp(two)). With e the smaller over the larger, log(1 + e) is twice the area tangent of
// e / (2 + e), which is a third at most: seven terms are exact to the last bit of a float.
inline Lanes log_add(Lanes one, Lanes two) {
    const Lanes most = larger(one, two), least = one > two ? two : one;
    const Lanes ratio = exponential(most < -FLT_MAX ? all(-88) : least - most);
    const Lanes x = ratio / (ratio + 2.0f), square = x * x;
    Lanes made = all(1.0f / 13);
    for (float term : {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) made = made * square + term;
    return most + 2.0f * x * made;
}

void mix_row(const float* logits, const float* other, float weight, const int64_t* columns, float* out,
             int64_t vocabulary, int64_t count) {
    const float first = std::log1p(-weight) - log_sum(logits, vocabulary);
    const float second = std::log(weight) - log_sum(other, count);
    if (columns) {
        for (int64_t i = 0; i < vocabulary; ++i) out[i] = logits[i] + first;
        for (int64_t i = 0; i < count; i += 8) {
            const int64_t some = std::min<int64_t>(8, count - i);
            Lanes own = all(NEVER);
            for (int64_t lane = 0; lane < some; ++lane) own[lane] = out[columns[i + lane]];
            const Lanes mixed = log_add(own, rest(other + i, some) + second);
            for (int64_t lane = 0; lane < some; ++lane) out[columns[i + lane]] = mixed[lane];
        }
        return;
    }
    const int64_t whole = vocabulary / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        put(out + i, log_add(lanes(logits + i) + first, lanes(other + i) + second));
    const Lanes mixed = log_add(rest(logits + whole, vocabulary - whole) + first,
                                rest(other + whole, vocabulary - whole) + second);
    for (int64_t i = whole; i < vocabulary; ++i) out[i] = mixed[i - whole];
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Strides are between rows. `columns`, or null: where each of `other`'s columns is in the vocabulary.
void galley_mix(const float* logits, const float* other, const float* weights, const int64_t* columns, float* out,
                int64_t rows, int64_t vocabulary, int64_t count, int64_t logits_stride, int64_t other_stride,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(std::min<int64_t>(threads, rows))
    for (int64_t row = 0; row < rows; ++row)
        mix_row(logits + row * logits_stride, other + row * other_stride, weights[row], columns,
                out + row * vocabulary, vocabulary, count);
}
}
#pragma GCC visibility pop
