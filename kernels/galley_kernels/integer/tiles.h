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
static_assert(SLAB % TILED == 0, "tiles are read whole");

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
        for (int place = 0; place < 8; place += 4) {
            shape(place, TILED, 4 * ACROSS);          // sums
            shape(place + 1, TILED, BLOCK);           // activations
            shape(place + 2, BLOCK / 4, 4 * ACROSS);  // codes
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

// Goes on with the sums of sixteen rows or fewer over COUNT blocks, whose sums of products are `sums`.
template <int COUNT>
inline void add_blocks(const int32_t (*sums)[TILED][ACROSS], const float* scales, int64_t blocks, int64_t rows,
                       bool begin, bool end, Wide weight, Wide* part, Wide* total) {
    const auto over = [&](int64_t r, Wide sum) {
        for (int b = 0; b < COUNT; ++b)
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[b][r])),
                                  _mm512_set1_ps(scales[r * blocks + b]), sum);
        return sum;
    };
    if (begin && end)
        for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, over(r, Wide{}), total[r]);
    else if (end)
        for (int64_t r = 0; r < rows; ++r) total[r] = fused(weight, over(r, part[r]), total[r]);
    else
        for (int64_t r = 0; r < rows; ++r) part[r] = over(r, begin ? Wide{} : part[r]);
}

// Sums [rows][16] of two panels of 4-bit codes.
inline void tiled_sums(const Matrix& matrix, int64_t panel, const Activations& from, int64_t rows, Wide* total) {
    const int64_t inputs = matrix.inputs, groups = matrix.groups, blocks = inputs / BLOCK, each = blocks / groups;
    const int64_t apart = PANEL * inputs / 2, bytes = PANEL * BLOCK / 2;  // of a panel, of its block
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + panel * apart;
    alignas(64) int8_t made[2][BLOCK * ACROSS];
    alignas(64) int32_t sums[2][2][TILED][ACROSS];
    Wide part[SLAB];
    std::fill_n(total, rows, Wide{});
    for (int64_t group = 0; group < groups; ++group) {
        const Wide weight = pair_scales(matrix, panel, group);
        const int64_t last = (group + 1) * each;
        for (int64_t first = group * each; first < last; first += 2) {
            const bool two = first + 1 < last, begin = first == group * each, end = first + 2 >= last;
            for (int64_t b = 0; b <= two; ++b) {
                const uint8_t* own = codes + (first + b) * bytes;
                for (int64_t line = 0; line < bytes; line += 64)  // of the next panels
                    for (int64_t next = 2; next < 4; ++next)
                        _mm_prefetch(reinterpret_cast<const char*>(own) + next * apart + line, _MM_HINT_T0);
                signed_codes(own, own + apart, made[b]);
            }
            _tile_loadd(2, made[0], 4 * ACROSS);
            if (two) _tile_loadd(6, made[1], 4 * ACROSS);
            const auto add = [&](int64_t row) {
                (two ? add_blocks<2> : add_blocks<1>)(sums[row / TILED % 2], from.byte_scales + row * blocks + first,
                                                      blocks, std::min(TILED, rows - row), begin, end, weight,
                                                      part + row, total + row);
            };
            for (int64_t row = 0; row < rows; row += TILED) {
                const int8_t* x = from.bytes + row * inputs + first * BLOCK;
                auto* own = sums[row / TILED % 2];
                _tile_zero(0);
                _tile_loadd(1, x, inputs);
                _tile_dpbssd(0, 1, 2);
                _tile_stored(0, own[0], 4 * ACROSS);
                if (two) {
                    _tile_zero(4);
                    _tile_loadd(5, x + BLOCK, inputs);
                    _tile_dpbssd(4, 5, 6);
                    _tile_stored(4, own[1], 4 * ACROSS);
                }
                if (row) add(row - TILED);  // while the last ones are made
            }
            add((rows - 1) / TILED * TILED);
        }
    }
}

#else

struct Tiles {
    Tiles(int, int64_t) {}
    static constexpr bool held = false;
};

#endif

}  // namespace galley
