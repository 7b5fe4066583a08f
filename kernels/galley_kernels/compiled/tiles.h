// Sums of products in tile registers (AMX): sixteen rows with sixteen outputs, a span of inputs at a time.
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

constexpr int64_t TILE_ROWS = 16, LEAST_TILE_ROWS = 10;  // of a tile register; that are worth one

#ifdef GALLEY_TILES

constexpr int64_t ACROSS = 16;  // outputs of a tile
static_assert(SLAB == 3 * TILE_ROWS, "tiles are read whole, and there are six for sums");

// Linux has each process ask for tile registers, once.
inline bool tiles_allowed() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

// Holds the thread's tile registers in the shapes of `tiled_sums`.
class Tiles {
   public:
    Tiles(int bits, int64_t rows) : held(bits == 4 && rows >= LEAST_TILE_ROWS && tiles_allowed()) {
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
        for (int sums = 0; sums < 6; ++sums) shape(sums, TILE_ROWS, 4 * ACROSS);
        shape(6, TILE_ROWS, SPAN);           // activations
        shape(7, SPAN / 4, 4 * ACROSS);  // codes
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

// Sums of products of up to three tiles of rows, a span of inputs from `x` on: in tile registers 0 to 2 or 3 to 5, by
// turns, since a sum is there long after the next ones are begun.
#define GALLEY_MULTIPLY(sums, x) \
    _tile_zero(sums);            \
    _tile_loadd(6, x, inputs);   \
    _tile_dpbssd(sums, 6, 7)
inline void multiply(int64_t turn, const int8_t* x, int64_t inputs, int64_t tiles, const int8_t* codes) {
    const int64_t next = TILE_ROWS * inputs;
    _tile_loadd(7, codes, 4 * ACROSS);
    if (turn) {
        GALLEY_MULTIPLY(3, x);
        if (tiles > 1) {
            GALLEY_MULTIPLY(4, x + next);
        }
        if (tiles > 2) {
            GALLEY_MULTIPLY(5, x + 2 * next);
        }
    } else {
        GALLEY_MULTIPLY(0, x);
        if (tiles > 1) {
            GALLEY_MULTIPLY(1, x + next);
        }
        if (tiles > 2) {
            GALLEY_MULTIPLY(2, x + 2 * next);
        }
    }
}
#undef GALLEY_MULTIPLY

// Those sums to [rows][16].
inline void store(int64_t turn, int64_t tiles, int32_t (*sums)[ACROSS]) {
    if (turn) {
        _tile_stored(3, sums, 4 * ACROSS);
        if (tiles > 1) _tile_stored(4, sums + TILE_ROWS, 4 * ACROSS);
        if (tiles > 2) _tile_stored(5, sums + 2 * TILE_ROWS, 4 * ACROSS);
    } else {
        _tile_stored(0, sums, 4 * ACROSS);
        if (tiles > 1) _tile_stored(1, sums + TILE_ROWS, 4 * ACROSS);
        if (tiles > 2) _tile_stored(2, sums + 2 * TILE_ROWS, 4 * ACROSS);
    }
}

// Sums [rows][16] of two panels of 4-bit codes.
inline void tiled_sums(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, Wide* total) {
    const int64_t inputs = matrix.inputs, groups = matrix.groups, each = inputs / BLOCK / groups;
    const int64_t apart = PANEL * inputs / 2, bytes = PANEL * BLOCK / 2;  // of a panel, of its block
    const int64_t spans = spans_of(inputs), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    alignas(64) int8_t made[2][SPAN * ACROSS];
    alignas(64) int32_t sums[SLAB][ACROSS];
    Wide part[SLAB];
    std::fill_n(total, rows, Wide{});
    struct Chunk {
        int64_t block, count, begin, last;  // and its group's blocks
    };
    const auto multiplied = [&](Chunk chunk, int64_t turn) {
        for (int64_t b = 0; b < chunk.count; ++b) {
            const uint8_t* own = codes + (chunk.block + b) * bytes;
            for (int64_t line = 0; line < bytes; line += 64)  // of the next panels
                for (int64_t next = 2; next < 4; ++next)
                    _mm_prefetch(reinterpret_cast<const char*>(own) + next * apart + line, _MM_HINT_T0);
            signed_codes(own, own + apart, made[turn] + b * BLOCK * ACROSS);
        }
        if (chunk.count == 1) std::fill_n(made[turn] + BLOCK * ACROSS, BLOCK * ACROSS, 0);
        multiply(turn, from.bytes + chunk.block * BLOCK, inputs, tiles, made[turn]);
    };
    const auto added = [&](Chunk chunk, int64_t turn) {
        store(turn, tiles, sums);
        const float* scales = from.byte_scales + chunk.block / 2;
        const Wide weight = pair_scales(matrix, panel, chunk.begin / each);
        const auto scaled = [&](int64_t r, Wide more) {
            return fused(_mm512_cvtepi32_ps(_mm512_load_si512(sums[r])), _mm512_set1_ps(scales[r * spans]), more);
        };
        if (chunk.count == each)
            for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, scaled(r, Wide{}), total[r]);
        else if (chunk.block + chunk.count == chunk.last)
            for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, scaled(r, part[r]), total[r]);
        else
            for (int64_t r = 0; r < rows; ++r) part[r] = scaled(r, chunk.block == chunk.begin ? Wide{} : part[r]);
    };
    Chunk before{};
    int64_t turn = 0;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * each, last = begin + each;
        for (int64_t block = begin, count; block < last; block += count, turn ^= 1) {
            count = blocks_together(block, last);
            const Chunk chunk{block, count, begin, last};
            multiplied(chunk, turn);
            if (before.count) added(before, turn ^ 1);
            before = chunk;
        }
    }
    added(before, turn ^ 1);
}

#else

struct Tiles {
    Tiles(int, int64_t) {}
    static constexpr bool held = false;
};

#endif

}  // namespace galley
