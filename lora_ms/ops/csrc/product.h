// Matrix products C = D + A1 B1 + A2 B2 + … in float32; a B may be of any type, whose numbers are widened as they are
// used.
//
// Columns of B are packed into panels of 2 * LANES, once for all threads; a tile of ROWS x 2 LANES of C is held in
// registers while it goes through some 512 rows of a panel (Goto and van de Geijn, 2008). A is read where it lies, and
// its rows of zeros, which padding has, are left out: what they give is known. Tasks are small, some 30 us, as a thread
// may lose its core to another program. A number of C is summed in one order, whatever the threads do.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "threads.h"

namespace lora_ms {

constexpr int ROWS = LANES == 8 ? 6 : 12;  // of a tile: 12 of 16 registers with AVX, 24 of 32 elsewhere
constexpr int COLUMNS = 2 * LANES;         // of a tile
constexpr long DEPTH = 512;                // rows of a panel that a tile goes through at a time, about
constexpr long FEW_ROWS = 12;     // up to which B is read where it lies,
constexpr int ROWS_OF_DOTS = LANES == 8 ? 1 : 2;  // at a time, in 16 registers and in 32
constexpr long ASKED = 1 << 14;   // bytes of some columns of B, up to which the next ones are asked for in one stream:
                                  // the processor foresees several at once only in long rows
constexpr long FEW = 256;         // rows up to which each task packs its own columns of B,
constexpr long FEW_WIDTH = 128;   // so many at most
constexpr long BLOCK = 96;        // rows of a task, at most: they stay in the second-level cache from one to the next
constexpr long WIDTH = 64;        // columns of a task
constexpr long SHARED = 1024;     // columns of B that are packed at a time for all threads,
constexpr long PACKED = 1 << 20;  // and about how many numbers: they come from the third-level cache
constexpr long AHEAD = 8;         // rows: what is fetched now is wanted then; a panel's come from far, and a tile that
                                  // waits for them reaches four fifths of the speed

// A [m, depth] times B [depth, n].
struct Term {
    Matrix a, b;
    long depth;
};

// A stretch of the inner dimension: columns of A, and where in the panels those rows of B begin.
struct Piece {
    Matrix a;
    float *panels;  // [n / COLUMNS][height][COLUMNS]
    long depth, height;
    float *panel(long j) const { return panels + j * height; }  // j: a multiple of COLUMNS
};

inline long divided(long a, long b) { return (a + b - 1) / b; }

// Asks for numbers that are wanted soon: parts of rows lie too far apart for the processor to foresee.
template <class Number>
void fetch(const Number *from, long count) {
    for (long i = 0; i < count; i += 64 / sizeof(Number)) __builtin_prefetch(from + i);
}
template <class FourBits>
void fetch(FourBits from, long count) {
    fetch(from.codes + from.place / 2, count / 2);
}

// Rows [0, depth) and columns [0, width) of a B whose rows lie whole, as panels; columns beyond it are zero.
template <class Numbers>
void pack_rows(Numbers from, long row, long depth, long width, float *to) {
    const long whole = width / COLUMNS * COLUMNS;
    if (whole < width) std::fill_n(to + whole * depth, COLUMNS * depth, 0.0f);
    for (long p = 0; p < depth; p++, from = from + row, to += COLUMNS) {
        fetch(from + AHEAD * row, width);
        for (long j = 0; j < whole; j += COLUMNS)
            for (long i = 0; i < COLUMNS; i += LANES) store(to + j * depth + i, load(from + j + i));
        for (long j = whole; j < width; j += LANES) {
            const Vec last = load_up_to(from + j, width - j);
            store(to + whole * depth + j - whole, last);
        }
    }
}

// Rows [0, depth) and some columns of a B whose columns lie whole, as a panel.
inline void pack_columns(const float *from, long column, long depth, long columns, float *to) {
    long done = 0;
    if (columns == COLUMNS)
        for (; done + 4 <= depth; done += 4)
            for (long i = 0; i < COLUMNS; i += 4)
                transpose4(from + done + i * column, column, to + done * COLUMNS + i, COLUMNS);
    for (long p = done; p < depth; p++)
        for (long i = 0; i < COLUMNS; i++) to[p * COLUMNS + i] = i < columns ? from[p + i * column] : 0.0f;
}

// Of another type: a small square after another is widened first.
template <class Numbers>
void pack_columns(Numbers from, long column, long depth, long columns, float *to) {
    constexpr long SOME = 64;
    float square[COLUMNS * SOME];
    for (long p = 0; p < depth; p += SOME) {
        const long rows = std::min(SOME, depth - p);
        for (long i = 0; i < columns; i++)
            for (long n = 0; n < rows; n += LANES)
                store(square + i * SOME + n, load_up_to(from + p + i * column + n, rows - n));
        pack_columns(static_cast<const float *>(square), SOME, rows, columns, to + p * COLUMNS);
    }
}

// Rows [0, depth) and columns [0, width) of B, of which one or the other lie whole, as panels.
inline void pack(const Matrix &b, long depth, long width, float *to) {
    with_numbers(b, [&](auto from) {
        if (b.column == 1) return pack_rows(from, b.row, depth, width, to);
        for (long j = 0; j < width; j += COLUMNS)
            pack_columns(from + j * b.column, b.column, depth, std::min<long>(COLUMNS, width - j), to + j * depth);
    });
}

// [M, width] of C from what `start` has (nothing: 0) and the pieces.
template <int M>
void tile(const Piece *pieces, int count, long i, long j, const float *start, long start_row, float *c, long c_row,
          long width) {
    Vec sums[M][2];
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) sums[r][0] = sums[r][1] = Vec{};
    for (int n = 0; n < count; n++) {
        const long row = pieces[n].a.row, column = pieces[n].a.column, depth = pieces[n].depth;
        const float *a = pieces[n].a.floats() + i * row, *b = pieces[n].panel(j);
        for (long p = 0; p < depth; p++, a += column, b += COLUMNS) {
            const Vec left = load(b), right = load(b + LANES);
            fetch(b + AHEAD * COLUMNS, COLUMNS);
#pragma GCC unroll 16
            for (int r = 0; r < M; r++) {
                const Vec x = spread(a[r * row]);
                sums[r][0] = add_product(sums[r][0], x, left);
                sums[r][1] = add_product(sums[r][1], x, right);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
        float *to = c + r * c_row;
        const float *from = start ? start + r * start_row : nullptr;
        if (width == COLUMNS) {
            store(to, from ? load(from) + sums[r][0] : sums[r][0]);
            store(to + LANES, from ? load(from + LANES) + sums[r][1] : sums[r][1]);
        } else {
            for (long q = 0; q < width; q++) {
                const float x = q < LANES ? sums[r][0][q] : sums[r][1][q - LANES];
                to[q] = from ? from[q] + x : x;
            }
        }
    }
}

template <int M>
void tile_of(int rows, const Piece *pieces, int count, long i, long j, const float *start, long start_row, float *c,
             long c_row, long width) {
    if (rows == M) return tile<M>(pieces, count, i, j, start, start_row, c, c_row, width);
    if constexpr (M > 1) tile_of<M - 1>(rows, pieces, count, i, j, start, start_row, c, c_row, width);
}

// C [m, n] = start, or 0 where there is none.
inline void begin_rows(long m, long n, const float *start, long start_row, float *c, long c_row) {
    for (long i = 0; i < m; i++)
        if (start)
            std::copy_n(start + i * start_row, n, c + i * c_row);
        else
            std::fill_n(c + i * c_row, n, 0.0f);
}

// C [m, n] = start (nothing: 0) + the pieces' products; C and start by their first number and the distance of rows.
// zero: of each ROWS rows of A, whether they are all zero; nothing: none are.
inline void multiply(const Piece *pieces, int count, long m, long n, const float *start, long start_row, float *c,
                     long c_row, const char *zero = nullptr) {
    for (long block = 0; block < m; block += BLOCK)
        for (long j = 0; j < n; j += COLUMNS)
            for (long i = block; i < std::min(m, block + BLOCK); i += ROWS) {
                const long rows = std::min<long>(ROWS, std::min(m, block + BLOCK) - i);
                const long width = std::min<long>(COLUMNS, n - j);
                const float *from = start ? start + i * start_row + j : nullptr;
                float *to = c + i * c_row + j;
                if (zero && zero[i / ROWS])
                    begin_rows(rows, width, from, start_row, to, c_row);
                else
                    tile_of<ROWS>(static_cast<int>(rows), pieces, count, i, j, from, start_row, to, c_row, width);
            }
}

// Whether row i of all A is zero. A's rows lie whole.
inline bool zero_row(const std::vector<Term> &terms, long i) {
    constexpr long SOME = 64;  // numbers that are looked at without a branch
    for (const Term &term : terms) {
        const float *a = term.a.floats() + i * term.a.row;
        for (long p = 0; p < term.depth; p += SOME) {
            const long count = std::min(SOME, term.depth - p);
            int others = 0;
            if (count == SOME)
                for (long q = 0; q < SOME; q++) others |= a[p + q] != 0;
            else
                for (long q = 0; q < count; q++) others |= a[p + q] != 0;
            if (others) return false;
        }
    }
    return true;
}

// How many rows of all A there are without those at the end that are zero.
inline long without_zero_end(const std::vector<Term> &terms, long m) {
    while (m > 0 && zero_row(terms, m - 1)) m--;
    return m;
}

// Ends C [m, n] for those rows, and returns the others' number.
inline long end_zero_rows(const std::vector<Term> &terms, long m, long n, const float *start, long start_row, float *c) {
    const long rows = without_zero_end(terms, m);
    begin_rows(m - rows, n, start ? start + rows * start_row : nullptr, start_row, c + rows * n, n);
    return rows;
}

// Of each ROWS rows of all A, whether they are zero: empty where none are.
inline std::vector<char> zero_rows(const std::vector<Term> &terms, long m) {
    std::vector<char> zero(divided(m, ROWS));
    bool any = false;
    for (long block = 0; block < static_cast<long>(zero.size()); block++) {
        bool all = true;
        for (long i = std::min(m, (block + 1) * ROWS); all && i-- > block * ROWS;) all = zero_row(terms, i);
        zero[block] = all;
        any = any || all;
    }
    return any ? zero : std::vector<char>();
}

// Rows [0, m) and columns [j, j + n) of a product: columns of B are packed, then rows of A go through them, both
// shared out among the threads, or by one where this is itself a part of what is shared out.
//
// The inner dimension is gone through in passes: for one pass a tile of C stays in registers. As many passes are packed
// at a time as `room` numbers of B hold, at least one. How many that are changes no sum: a pass begins at the same
// place whatever was packed before it. zero: what `zero_rows` gives.
inline void multiply_columns(const std::vector<Term> &terms, long m, long j, long n, const float *start, long start_row,
                             float *c, long c_row, long room, const std::vector<char> &zero) {
    static thread_local std::vector<float> packed;
    Threads &threads = Threads::shared();
    const long padded = divided(n, COLUMNS) * COLUMNS, groups = divided(n, WIDTH);
    // of a task; fewer where there are few tasks
    const long rows = m <= FEW ? m : std::min(BLOCK, divided(m * groups, 16 * threads.count() * ROWS) * ROWS);
    constexpr long PASS = DEPTH + DEPTH / 4;  // rows of B in a pass, at most
    const long packed_limit = room / padded;  // packed rows of B, from which on no other pass begins
    long total_depth = 0;
    for (const Term &term : terms) total_depth += term.depth;
    packed.resize(std::max<size_t>(packed.size(), padded * std::min(total_depth, packed_limit + PASS)));
    std::vector<Piece> pieces;
    std::vector<Matrix> sources;           // of their panels
    std::vector<size_t> passes{0};         // the first piece of each
    long pass_depth = 0, packed_depth = 0;  // rows of B in this pass, and in all that are to be packed

    const auto multiply_packed = [&] {
        passes.push_back(pieces.size());
        threads.run(groups, [&](long group) {
            const long x = group * WIDTH;
            for (size_t i = 0; i < pieces.size(); i++)
                pack(sources[i].from(0, x), pieces[i].depth, std::min(WIDTH, n - x), pieces[i].panel(x));
        });
        threads.run(divided(m, rows) * groups, [&](long task) {
            const long x = task % groups * WIDTH, y = task / groups * rows;
            const long height = std::min(rows, m - y), width = std::min(WIDTH, n - x);
            const float *from = start ? start + y * start_row + x : nullptr;
            long from_row = start_row;
            float *to = c + y * c_row + x;
            std::vector<Piece> shifted(pieces);  // to this task's rows and columns
            for (Piece &piece : shifted) {
                piece.a = piece.a.from(y, 0);
                piece.panels = piece.panel(x);
            }
            for (size_t i = 0; i + 1 < passes.size(); i++) {
                const int count = static_cast<int>(passes[i + 1] - passes[i]);
                multiply(shifted.data() + passes[i], count, height, width, from, from_row, to, c_row,
                         zero.empty() ? nullptr : &zero[y / ROWS]);
                from = to;  // the next pass adds to what this one has found
                from_row = c_row;
            }
        });
        start = c;
        start_row = c_row;
        pieces.clear();
        sources.clear();
        passes = {0};
        pass_depth = packed_depth = 0;
    };

    for (const Term &term : terms) {
        if (term.depth == 0) continue;
        const long parts = divided(term.depth, DEPTH), part_depth = divided(term.depth, parts);
        for (long p = 0; p < term.depth; p += part_depth) {
            const long depth = std::min(part_depth, term.depth - p);
            if (pass_depth + depth > PASS) {
                if (packed_depth + depth > packed_limit) {
                    multiply_packed();
                } else {
                    passes.push_back(pieces.size());
                    pass_depth = 0;
                }
            }
            pieces.push_back({term.a.from(0, p), packed.data() + packed_depth * padded, depth, depth});
            sources.push_back(term.b.from(p, j));
            pass_depth += depth;
            packed_depth += depth;
        }
    }
    multiply_packed();
}

// What add_dots adds, of numbers in four bits whose rows are whole blocks: what a code means is found once for a block,
// and the codes of later rows are asked for. The same sums in the same order.
template <int M, int N, class FourBits>
void add_dots_of_blocks(const float *a, long a_row, FourBits b, long b_row, long depth, float *out, long out_row) {
    Vec sums[M][N][2] = {};
    for (long p = 0; p < depth; p += b.block())
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const long place = b.place + j * b_row + p;
            const Levels levels(b, place);
            const uint8_t *codes = b.codes + place / 2;
            for (long q = 0; q < b.block(); q += 64) {
                __builtin_prefetch(codes + (N * b_row + q) / 2);
#pragma GCC unroll 8
                for (long k = q; k < q + 64; k += 2 * LANES) {
                    const Vec left = levels.at(codes_at(codes + k / 2));
                    const Vec right = levels.at(codes_at(codes + (k + LANES) / 2));
#pragma GCC unroll 4
                    for (int i = 0; i < M; i++) {
                        const float *x = a + i * a_row + p + k;
                        sums[i][j][0] = add_product(sums[i][j][0], load(x), left);
                        sums[i][j][1] = add_product(sums[i][j][1], load(x + LANES), right);
                    }
                }
            }
        }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) out[i * out_row + j] += sum(sums[i][j][0] + sums[i][j][1]);
}
template <class FourBits>
bool whole_blocks(FourBits b, long row, long depth) {
    const long block = b.block();
    return block % 64 == 0 && b.place % block == 0 && row % block == 0 && depth % block == 0;
}

// Adds to out[i * out_row + j], for i in [0, M) and j in [0, N), the sum of a[i * a_row + p] * b[j * b_row + p] for p in
// [0, depth): in one order, whatever M and N are.
template <int M, int N, class Numbers>
void add_dots(const float *a, long a_row, Numbers b, long b_row, long depth, float *out, long out_row) {
    if constexpr (!std::is_pointer_v<Numbers>)
        if (whole_blocks(b, b_row, depth)) return add_dots_of_blocks<M, N>(a, a_row, b, b_row, depth, out, out_row);
    Vec sums[M][N][2] = {};
    const auto add = [&](int half, long p, const auto &numbers) {
        Vec left[M];
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) left[i] = numbers(a + i * a_row + p);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            const Vec right = numbers(b + (j * b_row + p));
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) sums[i][j][half] = add_product(sums[i][j][half], left[i], right);
        }
    };
    const auto whole = [](auto from) { return load(from); };
    long p = 0;
    const auto add_all = [&](auto before) {
        for (; p + 2 * LANES <= depth; p += 2 * LANES) {
            before();
            add(0, p, whole);
            add(1, p + LANES, whole);
        }
    };
    if constexpr (std::is_pointer_v<Numbers>) {
        if (N * depth * static_cast<long>(sizeof *b) <= ASKED && b_row == depth)
            add_all([&] { fetch(b + N * (b_row + p), N * 2 * LANES); });
    }
    add_all([] {});
    for (; p < depth; p += LANES) add(0, p, [&](auto from) { return load_up_to(from, depth - p); });
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) out[i * out_row + j] += sum(sums[i][j][0] + sums[i][j][1]);
}

// The sum of a[i] * b[i] for i in [0, depth).
inline float dot(const float *a, const float *b, long depth) {
    float total = 0;
    add_dots<1, 1>(a, 0, b, 0, depth, &total, 0);
    return total;
}

// C [m, n] += A B for a few columns of B, which lie whole, as A's rows do.
template <int N>
void add_few_rows(const Term &term, long m, float *c, long c_row) {
    with_numbers(term.b, [&](auto b) {
        const float *a = term.a.floats();
        const long a_row = term.a.row, b_row = term.b.column;
        long i = 0;
        for (; i + ROWS_OF_DOTS <= m; i += ROWS_OF_DOTS)
            add_dots<ROWS_OF_DOTS, N>(a + i * a_row, a_row, b, b_row, term.depth, c + i * c_row, c_row);
        for (; i < m; i++) add_dots<1, N>(a + i * a_row, a_row, b, b_row, term.depth, c + i * c_row, c_row);
    });
}

// The nested scales of a matrix's next numbers of NF4, decoded here, where they are needed: they are read once.
inline void decode_scales(Matrix &matrix, long numbers, std::vector<float> &scales) {
    const long first = matrix.place / Nf4::BLOCK, end = divided(matrix.place + numbers, Nf4::BLOCK);
    scales.resize(end - first);
    matrix.nested.decode(first, end, scales.data());
    matrix.data = static_cast<const uint8_t *>(matrix.data) + first * Nf4::BLOCK / 2;
    matrix.place -= first * Nf4::BLOCK;
    matrix.scales = scales.data();
}

// A product of a few rows: B is read once and in its order, where packing it would cost more than the product.
inline void multiply_few_rows(const std::vector<Term> &terms, long m, long n, const float *start, long start_row,
                              float *c, long tasks) {
    Threads::shared().run(tasks, [&](long task) {
        const long end = (task + 1) * n / tasks;
        std::vector<float> scales;
        for (long j = task * n / tasks; j < end;) {
            const long columns = j + 4 <= end ? 4 : 1;  // rows of weights at a time, which come from memory
            for (long i = 0; i < m; i++)
                for (long q = j; q < j + columns; q++) c[i * n + q] = start ? start[i * start_row + q] : 0.0f;
            for (const Term &term : terms) {
                Term part{term.a, term.b.from(0, j), term.depth};
                if (part.b.nested.bytes) decode_scales(part.b, (columns - 1) * part.b.column + term.depth, scales);
                columns == 4 ? add_few_rows<4>(part, m, c + j, n) : add_few_rows<1>(part, m, c + j, n);
            }
            j += columns;
        }
    });
}

// The same, of the rows that are not all zero.
inline void multiply_few_of_rows(const std::vector<Term> &terms, long m, long n, const float *start, long start_row,
                                 float *c, long tasks) {
    std::vector<long> rows;
    for (long i = 0; i < m; i++)
        if (!zero_row(terms, i)) rows.push_back(i);
    const long count = static_cast<long>(rows.size());
    if (count == m) return multiply_few_rows(terms, m, n, start, start_row, c, tasks);
    begin_rows(m, n, start, start_row, c, n);
    if (count == 0) return;
    std::vector<Term> fewer(terms);
    long depth = 0;
    for (const Term &term : terms) depth += term.depth;
    std::vector<float> a(count * depth), found(count * n);
    float *to = a.data();
    for (Term &term : fewer) {
        const float *from = term.a.floats();
        for (long i = 0; i < count; i++) std::copy_n(from + rows[i] * term.a.row, term.depth, to + i * term.depth);
        term.a = {to, term.depth, 1};
        to += count * term.depth;
    }
    for (long i = 0; start && i < count; i++) std::copy_n(c + rows[i] * n, n, found.data() + i * n);
    multiply_few_rows(fewer, count, n, start ? found.data() : nullptr, n, found.data(), tasks);
    for (long i = 0; i < count; i++) std::copy_n(found.data() + i * n, n, c + rows[i] * n);
}

// C [m, n] = start (nothing: 0) + the terms; rows of start are start_row apart, so that 0 adds one row to all.
inline void product(const std::vector<Term> &terms, long m, long n, const float *start, long start_row, float *c) {
    if (m == 0 || n == 0) return;
    bool narrow = !start && n <= 2 * COLUMNS && n < m;
    for (const Term &term : terms) narrow = narrow && term.a.column != 1 && term.b.type == Type::FLOAT32;
    if (narrow) {  // C^T = B^T A: rows of a transposed A are read whole where it is the right factor
        std::vector<Term> swapped;
        for (const Term &term : terms) swapped.push_back({term.b.transposed(), term.a.transposed(), term.depth});
        std::vector<float> c_transposed(m * n);
        product(swapped, n, m, nullptr, 0, c_transposed.data());
        for (long i = 0; i < m; i++)
            for (long j = 0; j < n; j++) c[i * n + j] = c_transposed[j * m + i];
        return;
    }
    Threads &threads = Threads::shared();
    const long tasks = threads.count() == 1 ? 1 : 2 * threads.count();  // at least
    bool whole_rows = true, few_rows = m <= FEW_ROWS;  // by the shape alone: rows sum alike whichever others are zero
    for (const Term &term : terms) {
        whole_rows = whole_rows && term.a.column == 1;
        few_rows = few_rows && term.a.column == 1 && term.b.row == 1;
    }
    if (whole_rows) m = end_zero_rows(terms, m, n, start, start_row, c);
    if (m == 0) return;
    if (few_rows) return multiply_few_of_rows(terms, m, n, start, start_row, c, std::min(n, tasks));
    const std::vector<char> zero = whole_rows ? zero_rows(terms, m) : std::vector<char>();
    const auto columns = [&](long j, long width, long room) {
        const float *from = start ? start + j : nullptr;
        multiply_columns(terms, m, j, std::min(width, n - j), from, start_row, c + j, n, room, zero);
    };
    if (m <= FEW) {  // each task packs its own columns, for its own cache
        const long width = std::min(FEW_WIDTH, divided(n, 2 * tasks * COLUMNS) * COLUMNS);
        threads.run(divided(n, width), [&](long task) { columns(task * width, width, 0); });
    } else {
        for (long j = 0; j < n; j += SHARED) columns(j, SHARED, PACKED);
    }
}

}  // namespace lora_ms
