// Sums of products in tile registers (AMX): sixteen rows with sixteen outputs, a block of inputs at a time.
//
// Sums are the same integers as elsewhere, and floats are made of them and added in the same order.

#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix.h"

#if defined(GALLEY_AVX512) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define GALLEY_TILES 1
#endif

namespace galley {

constexpr int64_t TILED = 16;  // rows of a tile, and the least that are worth it

#ifdef GALLEY_TILES

constexpr int64_t ACROSS = 16;  // outputs of a tile
static_assert(SLAB == 3 * TILED, "tiles are read whole, and there are three for sums");

// Linux has each process ask for tile registers, once.
inline bool tiles_allowed() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

// Holds the thread's tile registers in the shapes of `tiled_sums`.
class Tiles {
   public:
    Tiles(int bits, int64_t rows) : held(bits == 4 && rows >= TILED && tiles_allowed()) {
        if (!held) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, none[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        const auto shape = [&](int tile, int64_t rows, int64_t bytes) {
            shapes.rows[tile] = static_cast<uint8_t>(rows);
            shapes.bytes[tile] = static_cast<uint16_t>(bytes);
        };
        for (int sums = 0; sums < 3; ++sums) shape(sums, TILED, 4 * ACROSS);
        for (int blocks = 1; blocks < 3; ++blocks) {
            shape(2 * blocks + 1, TILED, blocks * BLOCK);           // activations
            shape(2 * blocks + 2, blocks * BLOCK / 4, 4 * ACROSS);  // codes
        }
        _tile_loadconfig(&shapes);
    }
    ~Tiles() {
        if (held) _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    const bool held;
};

// Codes of a block and of two panels as the tiles take them, signed: [inputs / 4][outputs][4].
inline void signed_codes(const uint8_t* one, const uint8_t* other, int8_t* to) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t at = 0; at < BLOCK * PANEL / 2; at += 32, to += 128) {
        const __m512i both = side_by_side(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + at)),
                                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other + at)));
        _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(both, low), eight));
        _mm512_store_si512(to + 64,
                           _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), eight));
    }
}

// What registers of tiles are for: 0 to 2 sums, 3 and 4 activations and codes of a block, 5 and 6 of two.
#define GALLEY_MULTIPLY(sums, activations, codes, x, inputs) \
    _tile_zero(sums);                                        \
    _tile_loadd(activations, x, inputs);                     \
    _tile_dpbssd(sums, activations, codes)

// Sums of products [rows][16] of up to three tiles of rows, one or two blocks of inputs from `x` on.
inline void multiply(const int8_t* x, int64_t inputs, int64_t tiles, int64_t count, const int8_t* codes,
                     int32_t (*sums)[ACROSS]) {
    const int64_t next = TILED * inputs;
    if (count == 2) {
        _tile_loadd(6, codes, 4 * ACROSS);
        GALLEY_MULTIPLY(0, 5, 6, x, inputs);
        if (tiles > 1) {
            GALLEY_MULTIPLY(1, 5, 6, x + next, inputs);
        }
        if (tiles > 2) {
            GALLEY_MULTIPLY(2, 5, 6, x + 2 * next, inputs);
        }
    } else {
        _tile_loadd(4, codes, 4 * ACROSS);
        GALLEY_MULTIPLY(0, 3, 4, x, inputs);
        if (tiles > 1) {
            GALLEY_MULTIPLY(1, 3, 4, x + next, inputs);
        }
        if (tiles > 2) {
            GALLEY_MULTIPLY(2, 3, 4, x + 2 * next, inputs);
        }
    }
    _tile_stored(0, sums, 4 * ACROSS);
    if (tiles > 1) _tile_stored(1, sums + TILED, 4 * ACROSS);
    if (tiles > 2) _tile_stored(2, sums + 2 * TILED, 4 * ACROSS);
}

// Sums [rows][16] of two panels of 4-bit codes.
inline void tiled_sums(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, Wide* total) {
    const int64_t inputs = matrix.inputs, groups = matrix.groups, each = inputs / BLOCK / groups;
    const int64_t apart = PANEL * inputs / 2, bytes = PANEL * BLOCK / 2;  // of a panel, of its block
    const int64_t spans = spans_of(inputs), tiles = (rows + TILED - 1) / TILED;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    alignas(64) int8_t made[SPAN * ACROSS];
    alignas(64) int32_t sums[SLAB][ACROSS];
    Wide part[SLAB];
    std::fill_n(total, rows, Wide{});
    for (int64_t group = 0; group < groups; ++group) {
        const Wide weight = pair_scales(matrix, panel, group);
        const int64_t begin = group * each, last = begin + each;
        for (int64_t block = begin, count; block < last; block += count) {
            count = blocks_together(block, last);
            for (int64_t b = 0; b < count; ++b) {
                const uint8_t* own = codes + (block + b) * bytes;
                for (int64_t line = 0; line < bytes; line += 64)  // of the next panels
                    for (int64_t next = 2; next < 4; ++next)
                        _mm_prefetch(reinterpret_cast<const char*>(own) + next * apart + line, _MM_HINT_T0);
                signed_codes(own, own + apart, made + b * BLOCK * ACROSS);
            }
            multiply(from.bytes + block * BLOCK, inputs, tiles, count, made, sums);
            const float* scales = from.byte_scales + block / 2;
            const auto scaled = [&](int64_t r, Wide more) {
                return fused(_mm512_cvtepi32_ps(_mm512_load_si512(sums[r])), _mm512_set1_ps(scales[r * spans]), more);
            };
            if (count == each)
                for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, scaled(r, Wide{}), total[r]);
            else if (block + count == last)
                for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, scaled(r, part[r]), total[r]);
            else
                for (int64_t r = 0; r < rows; ++r) part[r] = scaled(r, block == begin ? Wide{} : part[r]);
        }
    }
}

#undef GALLEY_MULTIPLY

#else

struct Tiles {
    Tiles(int, int64_t) {}
    static constexpr bool held = false;
};

#endif

}  // namespace galley
