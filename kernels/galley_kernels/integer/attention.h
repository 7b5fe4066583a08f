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
constexpr int QUERIES = 3;  // at once: what registers hold

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

// Up to three queries [head] of one key head, each over its first `limits` keys; floats [head] each.
template <typename Number>
inline void attend(const Attention& over, const Number* cache, const int32_t* table, int64_t head, int count,
                   const Number* const* queries, const int64_t* limits, float* const* results) {
    alignas(32) float scores[QUERIES][CHUNK], query[QUERIES][512];
    float most[QUERIES], total[QUERIES];
    int64_t keys = 0;
    for (int q = 0; q < QUERIES; ++q) {
        const int own = std::min(q, count - 1);
        for (int64_t d = 0; d < head; d += 8)
            put(query[q] + d, lanes(queries[own] + d) * static_cast<float>(over.scale));
        keys = std::max(keys, limits[own]);
        most[q] = -std::numeric_limits<float>::infinity();
        total[q] = 0;
        if (q < count) std::memset(results[q], 0, head * sizeof(float));
    }
    const auto block_of = [&](int64_t token) {
        return cache + table[token / over.block] * over.block_stride;
    };
    for (int64_t first = 0; first < keys; first += CHUNK) {
        const int64_t last = std::min(first + CHUNK, keys);
        for (int64_t token = first; token < last; token += TOKENS) {
            const Number* turned = block_of(token) + token % over.block;
            // Asked for on the way: the next keys, which are far apart, and the values that these scores will weigh.
            const int64_t next = token + TOKENS < keys ? token + TOKENS : token;
            const Number* ahead = block_of(next) + next % over.block;
            const Number* values = block_of(token) + (over.block + token % over.block) * head;
            Lanes sum[QUERIES][4] = {};
            for (int64_t d = 0; d < head; ++d) {
                __builtin_prefetch(ahead + d * over.block, 0, 3);
                __builtin_prefetch(values + d * TOKENS, 0, 2);
                for (int v = 0; v < 4; ++v) {
                    const Lanes key = lanes(turned + d * over.block + 8 * v);
                    for (int q = 0; q < QUERIES; ++q) sum[q][v] += all(query[q][d]) * key;
                }
            }
            for (int q = 0; q < QUERIES; ++q)
                for (int v = 0; v < 4; ++v) put(scores[q] + token - first + 8 * v, sum[q][v]);
        }
        float old[QUERIES];
        for (int q = 0; q < count; ++q) {
            const int64_t own = std::min(std::max(limits[q] - first, int64_t{0}), last - first);
            const int64_t width = (last - first + TOKENS - 1) / TOKENS * TOKENS;
            Lanes larger = all(most[q]);
            for (int64_t t = own; t < (own + 7) / 8 * 8; ++t) scores[q][t] = -std::numeric_limits<float>::infinity();
            for (int64_t t = 0; t < own; t += 8) larger = maximum(larger, lanes(scores[q] + t));
            float highest = larger[0];
            for (int i = 1; i < 8; ++i) highest = std::max(highest, larger[i]);
            old[q] = std::exp(most[q] - highest);
            most[q] = highest;
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
            total[q] = total[q] * old[q] + more;
        }
        for (int64_t d = 0; d < head; d += 32) {
            Lanes sum[QUERIES][4];
            for (int q = 0; q < QUERIES; ++q)
                for (int v = 0; v < 4; ++v)
                    sum[q][v] = q < count ? lanes(results[q] + d + 8 * v) * old[q] : Lanes{};
            for (int64_t token = first; token < last; token += TOKENS) {
                const Number* values = block_of(token) + (over.block + token % over.block) * head + d;
                const int64_t some = std::min(TOKENS, last - token);
                for (int64_t t = 0; t < some; ++t)
                    for (int v = 0; v < 4; ++v) {
                        const Lanes value = lanes(values + t * head + 8 * v);
                        for (int q = 0; q < QUERIES; ++q) sum[q][v] += all(scores[q][token - first + t]) * value;
                    }
            }
            for (int q = 0; q < count; ++q)
                for (int v = 0; v < 4; ++v) put(results[q] + d + 8 * v, sum[q][v]);
        }
    }
    for (int q = 0; q < count; ++q)
        for (int64_t d = 0; d < head; d += 8) put(results[q] + d, lanes(results[q] + d) / total[q]);
}

}  // namespace galley
