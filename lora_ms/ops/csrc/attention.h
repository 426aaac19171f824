// Causal attention and its gradient, a block of queries at a time: no [s, s] matrix is kept (Dao et al., 2022).
//
// q [b * s, n_h * d], k and v [b * s, n_kv * d] as the projections give them, not yet rotated; cos and sin a row of d
// for each token, table_row apart, the minus sign of the rotation in the first half of sin; first [b, s]: the earliest
// key that a query sees, which sees those from there up to itself: none, where that one is behind it, as of padding, for
// which there are zeros. Scores are scaled by 1 / sqrt(d).
#pragma once

#include <cmath>

#include "product.h"

namespace lora_ms {

constexpr long QUERIES = 48;  // of a block: a multiple of every ROWS

struct Attention {
    const float *q, *k, *v, *cos, *sin;
    const int32_t *first;
    long batch, seq;       // lines, and tokens of a line
    long heads, kv_heads;  // of queries, and of keys and values
    long dim;              // of a head
    long table_row;        // from a token's row of cos and sin to the next one's

    long q_row() const { return heads * dim; }
    long kv_row() const { return kv_heads * dim; }

    // x [count, d], rows x_row apart, of the tokens from `token` on -> (x * cos + swap(x) * sin) * scale, where swap
    // exchanges the halves of a row. `back`: the transpose, x * cos + swap(x * sin), which takes a gradient of what was
    // rotated to that of what it was rotated from.
    void rotate(const float *x, long x_row, long token, long count, float scale, float *to, long to_row,
                bool back = false) const {
        const long half = dim / 2;
        for (long i = 0; i < count; i++) {
            const float *c = cos + (token + i) * table_row, *s = sin + (token + i) * table_row, *from = x + i * x_row;
            const float *low = back ? s + half : s, *high = back ? s : s + half;
            float *out = to + i * to_row;
            fetch(from + AHEAD * x_row, dim);
            fetch(c + AHEAD * table_row, dim);
            fetch(s + AHEAD * table_row, dim);
            long p = 0;
            for (; p + LANES <= half; p += LANES) {
                const Vec x_low = load(from + p), x_high = load(from + half + p);
                store(out + p, (x_low * load(c + p) + x_high * load(low + p)) * scale);
                store(out + half + p, (x_high * load(c + half + p) + x_low * load(high + p)) * scale);
            }
            for (; p < half; p++) {
                out[p] = (from[p] * c[p] + from[half + p] * low[p]) * scale;
                out[half + p] = (from[half + p] * c[half + p] + from[p] * high[p]) * scale;
            }
        }
    }

    // How many of a line's queries there are without those at its end that see no key; the first one is key `offset`.
    long seeing(long line, long offset) const {
        long count = seq;
        while (count > 0 && first[line * seq + count - 1] > offset + count - 1) count--;
        return count;
    }

    // Where the panel of the earliest key begins that any of the queries [i, end) of a line sees.
    long first_panel(const int32_t *start, long i, long end) const {
        return *std::min_element(start + i, start + end) / COLUMNS * COLUMNS;
    }
};

inline long padded(long n) { return divided(n, COLUMNS) * COLUMNS; }

// Memory for a thread's intermediate numbers, kept from call to call; what is taken is valid until the next Scratch.
class Scratch {
  public:
    explicit Scratch(size_t numbers) {
        std::vector<float> &all = memory();
        if (all.size() < numbers) all.resize(numbers);
        next_ = all.data();
    }
    float *take(long numbers) {
        float *here = next_;
        next_ += numbers;
        return here;
    }

  private:
    static std::vector<float> &memory() {
        static thread_local std::vector<float> all;
        return all;
    }
    float *next_;
};

struct Exponentials {
    float top, total;  // the largest score, and the sum of the exponentials
};

// Scores [from, to) of a row made e^(score - the largest).
inline Exponentials exponentiate(float *row, long from, long to) {
    Vec most = spread(-3e38f);
    long p = from;
    for (; p + LANES <= to; p += LANES) most = larger(most, load(row + p));
    if (p < to) most = larger(most, load_some(row + p, to - p, -3e38f));
    const float top = largest(most);
    Vec total = {};
    for (p = from; p + LANES <= to; p += LANES) {
        const Vec e = exponential(load(row + p) - top);
        store(row + p, e);
        total += e;
    }
    if (p < to) {
        const Vec e = exponential(load_some(row + p, to - p, -3e38f) - top);
        for (long n = 0; p + n < to; n++) row[p + n] = e[n];
        total += e;
    }
    return {top, sum(total)};
}

// Numbers of memory that `attend` needs for `keys` of them.
inline long attend_numbers(const Attention &a, long keys) {
    return padded(keys) * a.dim + keys * padded(a.dim) + QUERIES * (a.dim + padded(keys) + 16);
}

// The queries of one head of a line look at keys and values [count, d], the keys rotated; values are value_row apart.
// The line's tokens, of which the first `rows` are computed, are the keys from `offset` on, of which each sees those from
// `first` up to itself. log_sum [b * s, n_h], where there is one: of each query's exponentiated scores.
inline void attend(const Attention &a, long line, long head, const float *keys, const float *values, long value_row,
                   long rows, long offset, Scratch &scratch, float *out, float *log_sum) {
    const long count = offset + rows;
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    const long token = line * a.seq, score_row = padded(count) + 16;  // rows 2^n apart would share sets of the cache
    const int32_t *start = a.first + token;
    float *key_panels = scratch.take(padded(count) * a.dim), *value_panels = scratch.take(count * padded(a.dim));
    float *queries = scratch.take(QUERIES * a.dim), *scores = scratch.take(QUERIES * score_row);
    pack({keys, 1, a.dim}, a.dim, count, key_panels);
    pack({values, value_row, 1}, count, a.dim, value_panels);
    for (long i = 0; i < rows; i += QUERIES) {
        const long end = std::min(rows, i + QUERIES), low = a.first_panel(start, i, end), seen = offset + end - low;
        const long q_at = (token + i) * a.q_row() + head * a.dim;
        a.rotate(a.q + q_at, a.q_row(), token + i, end - i, scale, queries, a.dim);
        const Piece product = {{queries, a.dim, 1}, key_panels + low * a.dim, a.dim, a.dim};
        multiply(&product, 1, end - i, seen, nullptr, 0, scores, score_row);
        float inverse[QUERIES];
        for (long r = 0; r < end - i; r++) {
            float *row = scores + r * score_row;
            const long from = start[i + r] - low, to = offset + i + r + 1 - low;
            const bool sees = from < to;
            const Exponentials found = sees ? exponentiate(row, from, to) : Exponentials{0, 1};
            std::fill(row, row + from, 0.0f);
            std::fill(row + to, row + seen, 0.0f);
            inverse[r] = sees ? 1.0f / found.total : 0.0f;
            if (log_sum) log_sum[(token + i + r) * a.heads + head] = found.top + std::log(found.total);
        }
        const Piece mix = {{scores, score_row, 1}, value_panels + low * COLUMNS, seen, count};
        multiply(&mix, 1, end - i, a.dim, nullptr, 0, out + q_at, a.q_row());
        for (long r = 0; r < end - i; r++)
            for (long p = 0; p < a.dim; p++) out[q_at + r * a.q_row() + p] *= inverse[r];
    }
    for (long i = rows; i < a.seq; i++) {
        std::fill_n(out + (token + i) * a.q_row() + head * a.dim, a.dim, 0.0f);
        if (log_sum) log_sum[(token + i) * a.heads + head] = 0.0f;
    }
}

// out [b * s, n_h * d]; log_sum [b * s, n_h]: of each query's exponentiated scores, for the gradient.
inline void attention(const Attention &a, float *out, float *log_sum) {
    const long group = a.heads / a.kv_heads;
    Threads::shared().run(a.batch * a.heads, [&](long task) {
        const long line = task / a.heads, head = task % a.heads, token = line * a.seq, rows = a.seeing(line, 0);
        Scratch scratch(rows * a.dim + attend_numbers(a, rows));
        float *keys = scratch.take(rows * a.dim);
        const long kv_at = token * a.kv_row() + head / group * a.dim;
        a.rotate(a.k + kv_at, a.kv_row(), token, rows, 1.0f, keys, a.dim);
        attend(a, line, head, keys, a.v + kv_at, a.kv_row(), rows, 0, scratch, out, log_sum);
    });
}

// d_q, d_k, d_v like q, k, v, from the gradient of `out` and what `attention` gave. Probabilities are formed again:
// P = e^(score - log_sum), d P = d_out v^T, d score = P (d P - mean), where mean = sum(P d P) = dot(out, d_out).
inline void attention_gradient(const Attention &a, const float *out, const float *log_sum, const float *d_out,
                               float *d_q, float *d_k, float *d_v) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    const long padded_dim = padded(a.dim), group = a.heads / a.kv_heads;
    Threads::shared().run(a.batch * a.kv_heads, [&](long task) {
        const long line = task / a.kv_heads, kv_head = task % a.kv_heads, token = line * a.seq;
        const long seq = a.seeing(line, 0), padded_seq = padded(seq);
        const long score_row = padded_seq + 16;  // of scores: rows 2^n apart would share a few sets of the cache
        const int32_t *start = a.first + token;
        Scratch scratch(2 * seq * a.dim + 2 * padded_seq * a.dim + seq * padded_dim +
                        QUERIES * (2 * a.dim + 2 * padded_dim + 2 * score_row));
        float *keys = scratch.take(seq * a.dim), *d_keys = scratch.take(seq * a.dim);
        float *key_panels = scratch.take(padded_seq * a.dim);    // transposed
        float *value_panels = scratch.take(padded_seq * a.dim);  // transposed
        float *key_rows = scratch.take(seq * padded_dim);
        float *queries = scratch.take(QUERIES * a.dim), *d_queries = scratch.take(QUERIES * a.dim);
        float *query_rows = scratch.take(QUERIES * padded_dim), *d_out_rows = scratch.take(QUERIES * padded_dim);
        float *probs = scratch.take(QUERIES * score_row), *d_scores = scratch.take(QUERIES * score_row);
        const long kv_at = token * a.kv_row() + kv_head * a.dim;
        a.rotate(a.k + kv_at, a.kv_row(), token, seq, 1.0f, keys, a.dim);
        pack({keys, 1, a.dim}, a.dim, seq, key_panels);
        pack({keys, a.dim, 1}, seq, a.dim, key_rows);
        pack({a.v + kv_at, 1, a.kv_row()}, a.dim, seq, value_panels);
        std::fill(d_keys, d_keys + seq * a.dim, 0.0f);
        for (long r = 0; r < a.seq; r++) std::fill_n(d_v + kv_at + r * a.kv_row(), a.dim, 0.0f);
        for (long r = seq; r < a.seq; r++) {
            std::fill_n(d_k + kv_at + r * a.kv_row(), a.dim, 0.0f);
            std::fill_n(d_q + (token + r) * a.q_row() + kv_head * group * a.dim, group * a.dim, 0.0f);
        }
        for (long head = kv_head * group; head < (kv_head + 1) * group; head++) {
            for (long i = 0; i < seq; i += QUERIES) {
                const long end = std::min(seq, i + QUERIES), low = a.first_panel(start, i, end), count = end - low;
                const long rows = end - i, q_at = (token + i) * a.q_row() + head * a.dim;
                a.rotate(a.q + q_at, a.q_row(), token + i, rows, scale, queries, a.dim);
                const Piece score = {{queries, a.dim, 1}, key_panels + low * a.dim, a.dim, a.dim};
                multiply(&score, 1, rows, count, nullptr, 0, probs, score_row);
                const Piece d_prob = {{d_out + q_at, a.q_row(), 1}, value_panels + low * a.dim, a.dim, a.dim};
                multiply(&d_prob, 1, rows, count, nullptr, 0, d_scores, score_row);
                for (long r = 0; r < rows; r++) {
                    const long place = q_at + r * a.q_row(), from = start[i + r] - low, to = i + r + 1 - low;
                    const float shift = log_sum[(token + i + r) * a.heads + head];
                    fetch(out + place + AHEAD * a.q_row(), a.dim);
                    const float mean = dot(out + place, d_out + place, a.dim);
                    float *p = probs + r * score_row, *d = d_scores + r * score_row;
                    std::fill(p, p + from, 0.0f);
                    std::fill(d, d + from, 0.0f);
                    long n = from;
                    for (; n + LANES <= to; n += LANES) {
                        const Vec e = exponential(load(p + n) - shift);
                        store(p + n, e);
                        store(d + n, e * (load(d + n) - mean));
                    }
                    if (n < to) {
                        const Vec e = exponential(load_some(p + n, to - n, -3e38f) - shift);
                        for (long m = 0; n + m < to; m++) {
                            p[n + m] = e[m];
                            d[n + m] = e[m] * (d[n + m] - mean);
                        }
                    }
                    std::fill(p + to, p + count, 0.0f);
                    std::fill(d + to, d + count, 0.0f);
                }
                const Piece query = {{d_scores, score_row, 1}, key_rows + low * COLUMNS, count, seq};
                multiply(&query, 1, rows, a.dim, nullptr, 0, d_queries, a.dim);
                a.rotate(d_queries, a.dim, token + i, rows, scale, d_q + q_at, a.q_row(), true);
                pack({queries, a.dim, 1}, rows, a.dim, query_rows);
                const Piece key = {{d_scores, 1, score_row}, query_rows, rows, rows};
                multiply(&key, 1, count, a.dim, d_keys + low * a.dim, a.dim, d_keys + low * a.dim, a.dim);
                pack({d_out + q_at, a.q_row(), 1}, rows, a.dim, d_out_rows);
                const Piece value = {{probs, 1, score_row}, d_out_rows, rows, rows};
                float *to = d_v + kv_at + low * a.kv_row();
                multiply(&value, 1, count, a.dim, to, a.kv_row(), to, a.kv_row());
            }
        }
        a.rotate(d_keys, a.dim, token, seq, 1.0f, d_k + kv_at, a.kv_row(), true);
    });
}

// New tokens of each line, k and v of `a`, are put into a cache, keys (rotated) and values [rows, d], and look at what is
// there from `first` [b, s] up to their own slots, which follow one another; q [b * s, n_h * d] -> out like q. begins
// [b * n_kv]: the rows where the heads of each line begin; slots [b]: of each line's first new token.
inline void cached_attention(const Attention &a, float *keys, float *values, const int32_t *begins,
                             const std::vector<long> &slots, float *out) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    const long group = a.heads / a.kv_heads;
    const auto put = [&](long task) {
        const long line = task / a.kv_heads, token = line * a.seq;
        const long from = token * a.kv_row() + task % a.kv_heads * a.dim, to = (begins[task] + slots[line]) * a.dim;
        const long rows = a.seeing(line, slots[line]);
        a.rotate(a.k + from, a.kv_row(), token, rows, 1.0f, keys + to, a.dim);
        for (long i = 0; i < rows; i++)
            std::memcpy(values + to + i * a.dim, a.v + from + i * a.kv_row(), a.dim * sizeof(float));
    };
    if (a.seq > 1) {
        Threads::shared().run(a.batch * a.kv_heads, put);
        Threads::shared().run(a.batch * a.heads, [&](long task) {
            const long line = task / a.heads, head = task % a.heads, rows = a.seeing(line, slots[line]);
            const long at = begins[line * a.kv_heads + head / group] * a.dim;
            Scratch scratch(attend_numbers(a, slots[line] + rows));
            attend(a, line, head, keys + at, values + at, a.dim, rows, slots[line], scratch, out, nullptr);
        });
        return;
    }
    Threads::shared().run(a.batch * a.kv_heads, [&](long task) {
        const long line = task / a.kv_heads, low = a.first[line], count = slots[line] + 1 - low;
        if (count <= 0) return void(std::fill_n(out + task * group * a.dim, group * a.dim, 0.0f));
        put(task);
        const float *seen = keys + (begins[task] + low) * a.dim, *mixed = values + (begins[task] + low) * a.dim;
        Scratch scratch(a.dim + count);
        float *query = scratch.take(a.dim), *scores = scratch.take(count);
        for (long head = task * group; head < (task + 1) * group; head++) {  // of all lines
            a.rotate(a.q + head * a.dim, 0, line, 1, scale, query, 0);
            std::fill_n(scores, count, 0.0f);
            long j = 0;
            for (; j + 4 <= count; j += 4) add_dots<1, 4>(query, 0, seen + j * a.dim, a.dim, a.dim, scores + j, 0);
            for (; j < count; j++) add_dots<1, 1>(query, 0, seen + j * a.dim, 0, a.dim, scores + j, 0);
            const float inverse = 1.0f / exponentiate(scores, 0, count).total;
            float *to = out + head * a.dim;
            std::fill_n(to, a.dim, 0.0f);
            for (j = 0; j < count; j++)
                for (long p = 0; p < a.dim; p++) to[p] += scores[j] * mixed[j * a.dim + p];
            for (long p = 0; p < a.dim; p++) to[p] *= inverse;
        }
    });
}

}  // namespace lora_ms
