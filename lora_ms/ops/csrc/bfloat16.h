// Products of bfloat16 numbers with float32 sums, by AVX512-BF16's dot products of pairs or by AMX's tiles.
//
// Both factors are rounded to bfloat16 as they are packed: A into squares of 16 rows x 32 columns, B into squares of
// 16 columns x 16 pairs of rows, padded with zeros, each 1 kB as the instructions read them. A number of C is summed in
// one order, whatever the threads do.
#pragma once

#include <vector>

#include "product.h"

#if defined(__AVX512BF16__) && LANES == 16
#define LORA_MS_BFLOAT16
#if defined(__AMX_BF16__) && defined(__linux__) && !defined(LORA_MS_NO_AMX)
#define LORA_MS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lora_ms {

#if defined(LORA_MS_BFLOAT16)

constexpr long SIDE = 16;            // rows or columns of a square
constexpr long SQUARE_DEPTH = 32;    // of the inner dimension
constexpr long SQUARE = SIDE * SQUARE_DEPTH;
constexpr long STRIPS = 2;           // of 16 rows, and of 16 columns, that are multiplied at a time
constexpr long BLOCK_SIDE = STRIPS * SIDE;
constexpr long LEAST_ROWS = 8;       // below, packing costs more than it brings
constexpr long TASK_ROWS = 256;      // what a task reads of A stays in the second-level cache
constexpr long TASK_COLUMNS = 64;
constexpr long PACKED_DEPTH = 4096;  // of the inner dimension, and of columns of B, that are packed at a time
constexpr long PACKED_COLUMNS = 4096;

// LANES floats, rounded to the nearest bfloat16, as 16 words of 16 bits.
inline __m256i rounded(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Rows of A [rows, depth], which lie whole, as squares [rows / 16][depth / 32][16][32]; `strip` of them.
inline void pack_left(const Matrix &a, long rows, long depth, long strip, BFloat16 *to) {
    const long steps = divided(depth, SQUARE_DEPTH);
    for (long r = 0; r < SIDE; r++) {
        const long i = strip * SIDE + r;
        BFloat16 *place = to + strip * steps * SQUARE + r * SQUARE_DEPTH;
        const float *from = i < rows ? a.from(i, 0).floats() : nullptr;
        for (long p = 0; p < steps * SQUARE_DEPTH; p += LANES) {
            const Vec x = from && p < depth ? load_up_to(from + p, depth - p) : Vec{};
            BFloat16 *at = place + p / SQUARE_DEPTH * SQUARE + p % SQUARE_DEPTH;
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), rounded(x));
        }
    }
}

// Sixteen columns of B [depth, columns] as squares [depth / 32][16 pairs][16 columns][2].
template <class Numbers>
void pack_right(Numbers from, const Matrix &b, long depth, long columns, BFloat16 *to) {
    for (long p = 0; p < depth; p += SQUARE_DEPTH, to += SQUARE) {
        const long rows = std::min(SQUARE_DEPTH, depth - p);
        if (b.column == 1) {  // rows lie whole: two become one row of pairs
            for (long r = 0; r < SQUARE_DEPTH; r += 2) {
                const auto row = [&](long q) {
                    fetch(from + (p + q + SQUARE_DEPTH) * b.row, SIDE);
                    const Vec x = q < rows ? load_up_to(from + (p + q) * b.row, columns) : Vec{};
                    return _mm512_maskz_cvtepu16_epi32(0xffff, rounded(x));
                };
                const __m512i pairs = _mm512_or_si512(row(r), _mm512_maskz_slli_epi32(0xffff, row(r + 1), 16));
                _mm512_storeu_si512(to + r * SIDE, pairs);
            }
        } else {  // columns lie whole: a square of pairs is transposed
            float square[SIDE * SIDE];
            for (long j = 0; j < SIDE; j++)
                for (long r = 0; r < SQUARE_DEPTH; r += LANES) {
                    const bool inside = j < columns && r < rows;
                    const Vec x = inside ? load_up_to(from + (j * b.column + p + r), rows - r) : Vec{};
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(square + j * SIDE + r / 2), rounded(x));
                }
            for (long i = 0; i < SIDE; i += 4)
                for (long j = 0; j < SIDE; j += 4)
                    transpose4(square + j * SIDE + i, SIDE, reinterpret_cast<float *>(to) + i * SIDE + j, SIDE);
        }
    }
}

#if defined(LORA_MS_AMX)

// Whether the system lets this process use the tiles; asked for once.
inline bool tiles_allowed() {
    static const bool allowed = [] {
        constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    }();
    return allowed;
}

// All eight tiles of 16 rows of 64 bytes.
inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// c [32, 32] = the sum over `steps` squares of two strips of A times two of B; strips lie `strip` numbers apart.
inline void multiply_tiles(const BFloat16 *a, const BFloat16 *b, long steps, long strip, float *c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long p = 0; p < steps; p++, a += SQUARE, b += SQUARE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + strip, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + strip, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    constexpr long ROW = 4 * BLOCK_SIDE;
    _tile_stored(0, c, ROW);
    _tile_stored(1, c + SIDE, ROW);
    _tile_stored(2, c + SIDE * BLOCK_SIDE, ROW);
    _tile_stored(3, c + SIDE * BLOCK_SIDE + SIDE, ROW);
}

#endif

// The same by dot products of pairs.
inline void multiply_pairs(const BFloat16 *a, const BFloat16 *b, long steps, long strip, float *c) {
    for (long i = 0; i < STRIPS; i++)
        for (long j = 0; j < STRIPS; j++) {
            Vec sums[SIDE];
#pragma GCC unroll 16
            for (long r = 0; r < SIDE; r++) sums[r] = Vec{};
            for (long p = 0; p < steps * SIDE; p++) {
                const BFloat16 *left = a + i * strip + p / SIDE * SQUARE + p % SIDE * 2;
                const __m512bh right = (__m512bh)_mm512_loadu_si512(b + j * strip + p * 2 * SIDE);
#pragma GCC unroll 16
                for (long r = 0; r < SIDE; r++) {
                    int32_t pair;
                    std::memcpy(&pair, left + r * SQUARE_DEPTH, sizeof pair);
                    sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), right);
                }
            }
            for (long r = 0; r < SIDE; r++) store(c + (i * SIDE + r) * BLOCK_SIDE + j * SIDE, sums[r]);
        }
}

// Multiplies blocks of C on one thread, by tiles where there are any.
class BlocksOfC {
  public:
#if defined(LORA_MS_AMX)
    BlocksOfC() {
        if (tiles_) configure_tiles();
    }
    ~BlocksOfC() {
        if (tiles_) _tile_release();
    }
    void operator()(const BFloat16 *a, const BFloat16 *b, long steps, long strip, float *c) const {
        tiles_ ? multiply_tiles(a, b, steps, strip, c) : multiply_pairs(a, b, steps, strip, c);
    }

  private:
    const bool tiles_ = tiles_allowed();
#else
    void operator()(const BFloat16 *a, const BFloat16 *b, long steps, long strip, float *c) const {
        multiply_pairs(a, b, steps, strip, c);
    }
#endif
};

// C [m, n] = start (nothing: 0) + A [m, depth] B [depth, n] + the pieces, for a depth and an n that are packed at a time.
inline void multiply_rounded(const Term &term, const std::vector<Piece> &pieces, long m, long n, const float *start,
                             long start_row, float *c, long c_row) {
    static thread_local std::vector<BFloat16> left, right;
    static_assert(BLOCK_SIDE == COLUMNS);  // of a panel
    Threads &threads = Threads::shared();
    const long steps = divided(term.depth, SQUARE_DEPTH), strip = steps * SQUARE;
    const long rows = divided(m, BLOCK_SIDE) * STRIPS, columns = divided(n, BLOCK_SIDE) * STRIPS;  // strips
    left.resize(std::max<size_t>(left.size(), rows * strip));
    right.resize(std::max<size_t>(right.size(), columns * strip));
    BFloat16 *a = left.data(), *b = right.data();
    threads.run(rows + columns, [&](long i) {
        if (i < rows) return pack_left(term.a, m, term.depth, i, a);
        const long j = (i - rows) * SIDE;
        with_numbers(term.b.from(0, std::min(j, n)), [&](auto from) {
            pack_right(from, term.b, term.depth, std::max(0L, std::min(SIDE, n - j)), b + (i - rows) * strip);
        });
    });
    const long groups = divided(n, TASK_COLUMNS);
    const long height = std::min(TASK_ROWS, divided(m * groups, 8 * threads.count() * BLOCK_SIDE) * BLOCK_SIDE);
    threads.run(divided(m, height) * groups, [&](long task) {
        const long x = task % groups * TASK_COLUMNS, y = task / groups * height;
        const BlocksOfC multiply_block;
        for (long j = x; j < std::min(n, x + TASK_COLUMNS); j += BLOCK_SIDE)
            for (long i = y; i < std::min(m, y + height); i += BLOCK_SIDE) {
                const long down = std::min(BLOCK_SIDE, m - i), across = std::min(BLOCK_SIDE, n - j);
                float *to = c + i * c_row + j;
                for (long r = 0; r < down; r++)  // comes while the tiles are multiplied
                    for (long q = 0; q < across; q += LANES) __builtin_prefetch(to + r * c_row + q, 1);
                float sums[BLOCK_SIDE * BLOCK_SIDE];
                multiply_block(a + i / SIDE * strip, b + j / SIDE * strip, steps, strip, sums);
                for (long r = 0; r < down && !pieces.empty(); r += ROWS) {
                    float *part = sums + r * BLOCK_SIDE;
                    tile_of<ROWS>(static_cast<int>(std::min<long>(ROWS, down - r)), pieces.data(),
                                  static_cast<int>(pieces.size()), i + r, j, part, BLOCK_SIDE, part, BLOCK_SIDE, across);
                }
                for (long r = 0; r < down; r++)
                    for (long q = 0; q < across; q += LANES) {
                        Vec sum = load(sums + r * BLOCK_SIDE + q);
                        if (start) sum += load_up_to(start + (i + r) * start_row + j + q, across - q);
                        store_up_to(to + r * c_row + q, sum, across - q);
                    }
            }
    });
}

// As `product`, with the factors of the first term rounded to bfloat16; A's rows lie whole, and B's rows or columns.
inline void product_bfloat16(const std::vector<Term> &terms, long m, long n, const float *start, long start_row,
                             float *c) {
    if (m < LEAST_ROWS) return product(terms, m, n, start, start_row, c);
    m = end_zero_rows(terms, m, n, start, start_row, c);
    if (m == 0) return;
    const Term &first = terms[0];
    for (long p = 0; p < first.depth; p += PACKED_DEPTH) {
        const long depth = std::min(PACKED_DEPTH, first.depth - p);
        for (long j = 0; j < n; j += PACKED_COLUMNS) {
            const long width = std::min(PACKED_COLUMNS, n - j), padded = divided(width, COLUMNS) * COLUMNS;
            std::vector<float> panels;  // of the other terms
            std::vector<Piece> pieces;
            if (p + depth == first.depth) {
                long others = -first.depth, packed = 0;
                for (const Term &term : terms) others += term.depth;
                panels.resize(others * padded);
                for (size_t i = 1; i < terms.size(); packed += terms[i++].depth) {
                    float *to = panels.data() + packed * padded;
                    pack(terms[i].b.from(0, j), terms[i].depth, width, to);
                    pieces.push_back({terms[i].a, to, terms[i].depth, terms[i].depth});
                }
            }
            multiply_rounded({first.a.from(0, p), first.b.from(p, j), depth}, pieces, m, width,
                             start ? start + j : nullptr, start_row, c + j, n);
        }
        start = c;
        start_row = n;
    }
}

constexpr bool ROUNDS_TO_BFLOAT16 = true;

#else

// This processor has no such instructions: float32 products.
inline void product_bfloat16(const std::vector<Term> &terms, long m, long n, const float *start, long start_row,
                             float *c) {
    product(terms, m, n, start, start_row, c);
}

constexpr bool ROUNDS_TO_BFLOAT16 = false;

#endif

}  // namespace lora_ms
