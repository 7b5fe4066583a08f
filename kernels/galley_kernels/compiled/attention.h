// Causal attention of a decoder's rows over vLLM's paged cache of keys and values on a CPU.
//
// A block of the cache holds, for each key head, keys and then values: keys turned, [head][tokens], so that a vector
// is neighbouring tokens, values [tokens][head]. Keys are taken 512 at a time; a row's sums run in the
// order of its keys, whatever other rows there are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "products.h"

namespace galley {

constexpr int64_t TOKENS = 32, CHUNK = 512;
constexpr int MOST_QUERIES = 48;  // that take the same keys one after the other
#ifdef GALLEY_AVX512
using Row = Wide;
constexpr int QUERIES = 6;  // at once: what registers hold
template <typename Number>
inline Row row(const Number* from) {
    return sixteen(from);
}
#else
using Row = Lanes;
constexpr int QUERIES = 3;
template <typename Number>
inline Row row(const Number* from) {
    return lanes(from);
}
#endif
constexpr int FEWER = 3;  // at once, where there are no more
constexpr int64_t WIDTH = sizeof(Row) / sizeof(float), WIDTHS = TOKENS / WIDTH;

// Where keys and values are, and whose they are; a request's rows are its last tokens.
struct Attention {
    void* const* caches;  // of each layer
    const int32_t* starts;   // [requests + 1]: rows
    const int32_t* lengths;  // [requests]: tokens, those of this step included
    const int32_t* tables;   // [requests][table]: blocks
    const int64_t* slots;    // [rows]: where a row's key and value go
    const int64_t* again;    // [repeats]: rows whose key and value go
    const int64_t* others;   // to these slots too
    int64_t repeats, requests, table, block, block_stride, head_stride;
    double scale;
};

// A row's key and value, of every key head, into the cache. `row` is of [queries | keys | values].
template <typename Number>
inline void remember(const Attention& over, Number* cache, const Number* row, int64_t slot, int64_t query_heads,
                     int64_t key_heads, int64_t head) {
    if (slot < 0) return;  // vLLM's sign of a row that is not kept
    const int64_t place = slot % over.block;
    for (int64_t h = 0; h < key_heads; ++h) {
        Number* keys = cache + slot / over.block * over.block_stride + h * over.head_stride;
        Number* turned = keys + place;
        const Number* key = row + (query_heads + h) * head;
        for (int64_t d = 0; d < head; ++d) turned[d * over.block] = key[d];
        std::memcpy(keys + (over.block + place) * head, key + key_heads * head, head * sizeof(Number));
    }
}

// A request's keys and values, of one head.
template <typename Number>
struct Past {
    const Attention& over;
    const Number* cache;
    const int32_t* table;
    int64_t head, tokens;

    const Number* block(int64_t token) const { return cache + table[token / over.block] * over.block_stride; }
    const Number* keys(int64_t token) const { return block(token) + token % over.block; }
    const Number* values(int64_t token) const { return block(token) + (over.block + token % over.block) * head; }
};

// Some queries, scaled, and what they have found so far.
struct Some {
    int count;
    const float* queries;  // [count][head]
    const int64_t* limits;
    float *most, *total;
    float* const* results;
};

// Sums of up to MOST queries go on over keys `first` to `last`; if ASKING, the cache is asked for what comes next.
template <bool ASKING, int MOST, typename Number>
inline void take(const Past<Number>& past, const Some& some, int64_t first, int64_t last) {
    constexpr int64_t LINE = 64 / sizeof(Number), LINES = TOKENS / LINE;  // of the processor's cache
    const int64_t head = past.head, stride = past.over.block;
    alignas(32) float scores[MOST][CHUNK];
    const float* query[MOST];
    for (int q = 0; q < MOST; ++q) query[q] = some.queries + std::min(q, some.count - 1) * head;
    for (int64_t token = first; token < last; token += TOKENS) {
        const Number* keys = past.keys(token);
        // The next keys, which are far apart, and the values that these scores will weigh.
        const Number* ahead = past.keys(token + TOKENS < past.tokens ? token + TOKENS : token);
        const Number* values = past.values(token);
        Row sum[MOST][WIDTHS] = {};
        for (int64_t d = 0; d < head; ++d) {
            if (ASKING)
                for (int64_t line = 0; line < LINES; ++line) {
                    __builtin_prefetch(ahead + d * stride + line * LINE, 0, 3);
                    __builtin_prefetch(values + (d * LINES + line) * LINE, 0, 2);
                }
            for (int v = 0; v < WIDTHS; ++v) {
                const Row key = once(row(keys + d * stride + WIDTH * v));
                for (int q = 0; q < MOST; ++q) sum[q][v] += query[q][d] * key;
            }
        }
        for (int q = 0; q < MOST; ++q)
            for (int v = 0; v < WIDTHS; ++v) put(scores[q] + token - first + WIDTH * v, sum[q][v]);
    }
    float old[MOST];
    for (int q = 0; q < some.count; ++q) {
        const int64_t own = std::min(std::max(some.limits[q] - first, int64_t{0}), last - first);
        const int64_t width = (last - first + TOKENS - 1) / TOKENS * TOKENS;
        Lanes larger = all(some.most[q]);
        for (int64_t t = own; t < (own + 7) / 8 * 8; ++t) scores[q][t] = -std::numeric_limits<float>::infinity();
        for (int64_t t = 0; t < own; t += 8) larger = maximum(larger, lanes(scores[q] + t));
        float highest = larger[0];
        for (int i = 1; i < 8; ++i) highest = std::max(highest, larger[i]);
        old[q] = std::exp(some.most[q] - highest);
        some.most[q] = highest;
        Lanes sums{};
        for (int64_t t = 0; t < width; t += 8) {
            Lanes made{};
            if (t < own) {
                made = exponential(lanes(scores[q] + t) - highest);
                for (int64_t i = own - t; i < 8; ++i) made[i] = 0;
            }
            put(scores[q] + t, made);
            sums += made;
        }
        float more = 0;
        for (int i = 0; i < 8; ++i) more += sums[i];
        some.total[q] = some.total[q] * old[q] + more;
    }
    for (int64_t d = 0; d < head; d += 32) {
        Row sum[MOST][WIDTHS];
        for (int q = 0; q < MOST; ++q)
            for (int v = 0; v < WIDTHS; ++v)
                sum[q][v] = q < some.count ? row(some.results[q] + d + WIDTH * v) * old[q] : Row{};
        for (int64_t token = first; token < last; token += TOKENS) {
            const Number* values = past.values(token) + d;
            const int64_t count = std::min(TOKENS, last - token);
            for (int64_t t = 0; t < count; ++t)
                for (int v = 0; v < WIDTHS; ++v) {
                    const Row value = once(row(values + t * head + WIDTH * v));
                    for (int q = 0; q < MOST; ++q) sum[q][v] += scores[q][token - first + t] * value;
                }
        }
        for (int q = 0; q < some.count; ++q)
            for (int v = 0; v < WIDTHS; ++v) put(some.results[q] + d + WIDTH * v, sum[q][v]);
    }
}

// Queries of one request and one key head, `count` of them, each over its first `limits` keys; floats [head] each.
// All of them take a chunk of the keys before the next chunk, which then lies in the core's cache.
template <typename Number>
inline void attend(const Attention& over, const Number* cache, const int32_t* table, int64_t head, int count,
                   const Number* const* queries, const int64_t* limits, float* const* results) {
    alignas(32) float scaled[MOST_QUERIES * 512];
    float most[MOST_QUERIES], total[MOST_QUERIES];
    for (int q = 0; q < count; ++q) {
        for (int64_t d = 0; d < head; d += 8)
            put(scaled + q * head + d, lanes(queries[q] + d) * static_cast<float>(over.scale));
        std::memset(results[q], 0, head * sizeof(float));
        most[q] = -std::numeric_limits<float>::infinity();
        total[q] = 0;
    }
    const int64_t keys = *std::max_element(limits, limits + count);
    const Past<Number> past{over, cache, table, head, keys};
    for (int64_t first = 0; first < keys; first += CHUNK) {
        bool asked = false;
        for (int q = 0; q < count; q += QUERIES) {
            const Some some{std::min(QUERIES, count - q), scaled + q * head, limits + q, most + q, total + q, results + q};
            const int64_t last = std::min(first + CHUNK, *std::max_element(limits + q, limits + q + some.count));
            if (last <= first) continue;
            const bool few = some.count <= FEWER;
            (asked ? few ? take<false, FEWER, Number> : take<false, QUERIES, Number>
             : few ? take<true, FEWER, Number>
                   : take<true, QUERIES, Number>)(past, some, first, last);
            asked = true;
        }
    }
    for (int q = 0; q < count; ++q)
        for (int64_t d = 0; d < head; d += 8) put(results[q] + d, lanes(results[q] + d) / total[q]);
}

}  // namespace galley
