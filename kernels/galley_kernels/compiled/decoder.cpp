// All of a decoder layer but its attention in one call, with weights of 4 and 8 bits: from the attention of one
// layer to the queries, keys and values of the next. One parallel region, whose threads meet between its steps.
//
// Plain C functions over pointers, as in cpu_gemm.cpp. Structures are those of decoder.py.

#include "attention.h"
#include "products.h"

#include <memory>
#include <vector>

namespace {

using galley::Activations;
using galley::Attention;
using galley::BLOCK;
using galley::Matrix;
using galley::Needs;
using galley::SLAB;

constexpr int64_t GATHER = 16;  // rows whose attention one thread computes, at the most

struct Linear {
    const Matrix* parts;
    int64_t count, inputs, outputs;
    const float* bias;  // [outputs], or null
};

struct Layer {
    const float* input_norm;      // [hidden]
    const float* attention_norm;  // [hidden]
    Linear qkv, output, gate_up, down;
    void* kept;  // [rows][hidden], in the result's type: what enters gate_up; or null
};

struct Decoder {
    const float* final_norm;
    const float* rotations;  // [positions][rotary]: cosines, then sines
    int64_t hidden, intermediate, query_heads, key_heads, head, rotary;
    double epsilon;
    int32_t threads;
    int32_t is_float;  // queries, keys, values, attention and the result: float32, or bfloat16
};

struct Step {
    int64_t rows;
    const int64_t* positions;
    float* residual;        // [rows][hidden]
    void* qkv;              // [rows][query_heads + 2 key_heads][head]
    const void* attention;  // [rows][query_heads][head]
    void* result;           // [rows][hidden], after the last layer
};

Needs needs_of(const Linear& map) {
    Needs needs{};
    for (int64_t i = 0; i < map.count; ++i) {
        needs.bytes |= map.parts[i].bits == 4;
        needs.words |= map.parts[i].bits == 8;
        needs.tiles |= map.parts[i].starts != nullptr;
    }
    return needs;
}

inline uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void write(void* to, int is_float, int64_t at, const float* from, int64_t count) {
    if (is_float) {
        std::memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
    } else {
        uint16_t* narrowed = static_cast<uint16_t*>(to) + at;
        for (int64_t i = 0; i < count; ++i) narrowed[i] = narrow(from[i]);
    }
}

inline void read(const void* from, int is_float, int64_t at, float* to, int64_t count) {
    if (is_float)
        std::memcpy(to, static_cast<const float*>(from) + at, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; ++i) to[i] = galley::wide(from, 0, at + i);
}

// silu(gate) * up; `count` is a multiple of eight.
inline void gated(const float* gate, const float* up, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) {
        const galley::Lanes x = galley::lanes(gate + i);
        galley::put(to + i, x / (galley::exponential(-x) + 1.0f) * galley::lanes(up + i));
    }
}

// x divided by its root mean square, times the weights.
inline void norm(const float* x, const float* weights, double epsilon, float* to, int64_t count) {
    float some[8] = {};
    for (int64_t i = 0; i < count; i += 8)
        for (int lane = 0; lane < 8; ++lane) some[lane] += x[i + lane] * x[i + lane];
    float total = 0;
    for (float each : some) total += each;
    const float by = static_cast<float>(1 / std::sqrt(static_cast<double>(total) / count + epsilon));
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] * by * weights[i];
}

inline void add(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Turns pairs (i, i + rotary / 2) of a head by the angles of its position.
inline void rotate(float* head, const float* rotations, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float cosine = rotations[i], sine = rotations[half + i], one = head[i], two = head[half + i];
        head[i] = one * cosine - two * sine;
        head[half + i] = two * cosine + one * sine;
    }
}

// What the rows of a slab need between a layer's products.
class Scratch {
   public:
    void fit(const Decoder& decoder) {
        const int64_t widest = std::max({decoder.hidden, decoder.intermediate, decoder.query_heads * decoder.head});
        const int64_t qkv = (decoder.query_heads + 2 * decoder.key_heads) * decoder.head;
        input.fit(widest);
        made.resize(SLAB * std::max({decoder.hidden, 2 * decoder.intermediate, qkv}));
    }

    struct Input : Activations {
        void fit(int64_t inputs) {
            if (inputs <= size) return;
            size = inputs;
            const int64_t each = SLAB * inputs;
            const int64_t scales = SLAB * galley::spans_of(inputs);
            floats.reset(new float[2 * each + 2 * scales]);
            integers.reset(new int16_t[each + each / 2 + BLOCK / 2]);  // tiles are read a span at a time
            sums.reset(new int32_t[each / BLOCK]);
            x = floats.get();
            tiles = x + each;
            byte_scales = tiles + each;
            word_scales = byte_scales + scales;
            words = integers.get();
            bytes = reinterpret_cast<int8_t*>(words + each);
            starts = sums.get();
        }
        int64_t size = 0;
        std::unique_ptr<float[]> floats;
        std::unique_ptr<int16_t[]> integers;
        std::unique_ptr<int32_t[]> sums;
    };

    Input input;
    std::vector<float> made;
};

inline void product(const Linear& map, const Activations& from, int64_t rows, float* out) {
    for (int64_t part = 0; part < map.count; ++part) galley::product(map.parts[part], from, rows, out, map.outputs);
#pragma omp barrier
}

// Queries, keys and values of a slab's rows, out of rows that are already integers.
inline void attend(const Decoder& decoder, const Layer& layer, const Step& step, int64_t first, int64_t rows,
                   Scratch& scratch) {
    const int64_t heads = decoder.query_heads + decoder.key_heads, head = decoder.head;
    float* made = scratch.made.data();
    product(layer.qkv, scratch.input, rows, made);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* own = made + row * layer.qkv.outputs;
        if (layer.qkv.bias) add(own, layer.qkv.bias, layer.qkv.outputs);
        const float* rotations = decoder.rotations + step.positions[first + row] * decoder.rotary;
        for (int64_t each = 0; each < heads; ++each) rotate(own + each * head, rotations, decoder.rotary);
        write(step.qkv, decoder.is_float, (first + row) * layer.qkv.outputs, own, layer.qkv.outputs);
    }
}

// The residual's norm as a map's input.
inline void enter(const Decoder& decoder, const float* weights, const Linear& map, const Step& step, int64_t first,
                  int64_t row, int64_t rows, Scratch& scratch, Needs needs, void* kept = nullptr) {
    float* own = scratch.input.x + row * map.inputs;
    norm(step.residual + (first + row) * decoder.hidden, weights, decoder.epsilon, own, decoder.hidden);
    if (kept) write(kept, decoder.is_float, (first + row) * decoder.hidden, own, decoder.hidden);
    galley::round_row(scratch.input, row, rows, map.inputs, needs);
}

void begin(const Decoder& decoder, const Layer& layer, const Step& step, Scratch& scratch) {
    const Needs needs = needs_of(layer.qkv);
    for (int64_t first = 0; first < step.rows; first += SLAB) {
        const int64_t rows = std::min(SLAB, step.rows - first);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            enter(decoder, layer.input_norm, layer.qkv, step, first, row, rows, scratch, needs);
        attend(decoder, layer, step, first, rows, scratch);
    }
}

void follow(const Decoder& decoder, const Layer& layer, const Layer* next, const Step& step, int64_t first,
            int64_t rows, Scratch& scratch) {
    const int64_t hidden = decoder.hidden, inner = decoder.intermediate;
    float* made = scratch.made.data();
    const Linear &output = layer.output, &gate_up = layer.gate_up, &down = layer.down;
    const Needs needs[] = {needs_of(output), needs_of(gate_up), needs_of(down), next ? needs_of(next->qkv) : Needs{}};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        read(step.attention, decoder.is_float, (first + row) * output.inputs, scratch.input.x + row * output.inputs,
             output.inputs);
        galley::round_row(scratch.input, row, rows, output.inputs, needs[0]);
    }
    product(output, scratch.input, rows, made);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* residual = step.residual + (first + row) * hidden;
        add(residual, made + row * hidden, hidden);
        if (output.bias) add(residual, output.bias, hidden);
        enter(decoder, layer.attention_norm, gate_up, step, first, row, rows, scratch, needs[1], layer.kept);
    }
    product(gate_up, scratch.input, rows, made);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* own = made + row * 2 * inner;
        if (gate_up.bias) add(own, gate_up.bias, 2 * inner);
        gated(own, own + inner, scratch.input.x + row * inner, inner);
        galley::round_row(scratch.input, row, rows, inner, needs[2]);
    }
    product(down, scratch.input, rows, made);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        float* residual = step.residual + (first + row) * hidden;
        add(residual, made + row * hidden, hidden);
        if (down.bias) add(residual, down.bias, hidden);
        if (next) {
            enter(decoder, next->input_norm, next->qkv, step, first, row, rows, scratch, needs[3]);
        } else {
            float* own = scratch.input.x + row * hidden;
            norm(residual, decoder.final_norm, decoder.epsilon, own, hidden);
            write(step.result, decoder.is_float, (first + row) * hidden, own, hidden);
        }
    }
    if (next) attend(decoder, *next, step, first, rows, scratch);
}

// Attention of all rows, queries of one key head and neighbouring rows together.
template <typename Number>
void attend_all(const Decoder& decoder, const Step& step, const Attention& over, void* cache) {
    const int64_t width = (decoder.query_heads + 2 * decoder.key_heads) * decoder.head, head = decoder.head;
    const int64_t shared = decoder.query_heads / decoder.key_heads;
    // Rows that are few are shared out among the threads; neighbours among many read the same keys.
    const int64_t gather = std::clamp(step.rows * decoder.key_heads / (4 * decoder.threads), int64_t{1}, GATHER);
    const Number* qkv = static_cast<const Number*>(step.qkv);
    Number* kept = static_cast<Number*>(cache);
#pragma omp for schedule(static)
    for (int64_t each = 0; each < step.rows + over.repeats; ++each) {
        const int64_t more = each - step.rows, row = more < 0 ? each : over.again[more];
        galley::remember(over, kept, qkv + row * width, more < 0 ? over.slots[row] : over.others[more],
                         decoder.query_heads, decoder.key_heads, head);
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t key_head = 0; key_head < decoder.key_heads; ++key_head)
        for (int64_t first = 0; first < step.rows; first += gather) {
            float made[galley::MOST_QUERIES * 512];
            const Number* queries[galley::MOST_QUERIES];
            int64_t limits[galley::MOST_QUERIES], places[galley::MOST_QUERIES];
            float* results[galley::MOST_QUERIES];
            for (int q = 0; q < galley::MOST_QUERIES; ++q) results[q] = made + q * head;
            const int64_t last = std::min(first + gather, step.rows);
            int64_t request = std::upper_bound(over.starts, over.starts + over.requests + 1, first) - over.starts - 1;
            int count = 0;
            const auto flush = [&] {
                if (!count) return;
                galley::attend(over, kept + key_head * over.head_stride, over.tables + request * over.table, head,
                               count, queries, limits, results);
                for (int q = 0; q < count; ++q)
                    write(const_cast<void*>(step.attention), decoder.is_float, places[q], results[q], head);
                count = 0;
            };
            for (int64_t row = first; row < last; ++row) {
                if (row >= over.starts[request + 1]) {
                    flush();
                    while (row >= over.starts[request + 1]) ++request;
                }
                for (int64_t each = key_head * shared; each < (key_head + 1) * shared; ++each) {
                    queries[count] = qkv + row * width + each * head;
                    limits[count] = over.lengths[request] - over.starts[request + 1] + row + 1;
                    places[count] = (row * decoder.query_heads + each) * head;
                    if (++count == galley::MOST_QUERIES) flush();
                }
            }
            flush();
        }
}

Scratch& scratch_of(const Decoder& decoder) {
    static thread_local Scratch scratch;
    scratch.fit(decoder);
    return scratch;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Queries, keys and values of the first layer, of the residual.
void galley_decoder_begin(const Decoder* decoder, const Layer* layer, const Step* step) {
    Scratch& scratch = scratch_of(*decoder);
#pragma omp parallel num_threads(decoder->threads)
    begin(*decoder, *layer, *step, scratch);
}

// From a layer's attention to the next one's queries, keys and values; to the result where there is no next.
void galley_decoder_follow(const Decoder* decoder, const Layer* layer, const Layer* next, const Step* step) {
    Scratch& scratch = scratch_of(*decoder);
#pragma omp parallel num_threads(decoder->threads)
    for (int64_t first = 0; first < step->rows; first += SLAB)
        follow(*decoder, *layer, next, *step, first, std::min(SLAB, step->rows - first), scratch);
}

// A whole pass, attention included: from the residual to the result.
void galley_decoder_run(const Decoder* decoder, const Layer* layers, int64_t count, const Step* step,
                        const Attention* over) {
    Scratch& scratch = scratch_of(*decoder);
#pragma omp parallel num_threads(decoder->threads)
    {
        begin(*decoder, *layers, *step, scratch);
        for (int64_t layer = 0; layer < count; ++layer) {
            (decoder->is_float ? attend_all<float> : attend_all<uint16_t>)(*decoder, *step, *over,
                                                                          over->caches[layer]);
            for (int64_t first = 0; first < step->rows; first += SLAB)
                follow(*decoder, layers[layer], layer + 1 < count ? layers + layer + 1 : nullptr, *step, first,
                       std::min(SLAB, step->rows - first), scratch);
        }
    }
}

// float32 or bfloat16 out [rows][outputs] of x [rows][inputs].
void galley_compiled_linear(const Linear* map, const void* x, void* out, int64_t rows, int from_float, int to_float,
                           int threads) {
    static thread_local Scratch::Input scratch;
    static thread_local std::vector<float> made;
    scratch.fit(map->inputs);
    made.resize(SLAB * map->outputs);
    Activations& from = scratch;
    float* to = made.data();
    const int64_t inputs = map->inputs, outputs = map->outputs;
    const Needs needs = needs_of(*map);
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += SLAB) {
        const int64_t some = std::min(SLAB, rows - first);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < some; ++row) {
            read(x, from_float, (first + row) * inputs, from.x + row * inputs, inputs);
            galley::round_row(from, row, some, inputs, needs);
        }
        product(*map, from, some, to);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < some; ++row) {
            if (map->bias) add(to + row * outputs, map->bias, outputs);
            write(out, to_float, (first + row) * outputs, to + row * outputs, outputs);
        }
    }
}
}
#pragma GCC visibility pop
