// A decoder layer in generation, new tokens alone. It calls what the operators of its parts call, in their order, so that
// its numbers are theirs to the bit.
#pragma once

#include <memory>
#include <utility>

#include "attention.h"
#include "bfloat16.h"
#include "rows.h"

namespace lora_ms {

typedef void (*Multiply)(const std::vector<Term> &, long, long, const float *, long, float *);

// Memory for one call: what a thread keeps for the next would be there once for each of MindSpore's threads.
typedef std::unique_ptr<float[]> Numbers;

// A thin product [t, rank], times `scaling`.
inline void low_product(Matrix x, Matrix factor, long tokens, long depth, long rank, float scaling, float *low) {
    product({{x, factor, depth}}, tokens, rank, nullptr, 0, low);
    for (long i = 0; i < tokens * rank; i++) low[i] *= scaling;
}

inline void add(const float *x, const float *y, long n, float *sum) {
    for (long i = 0; i < n; i++) sum[i] = x[i] + y[i];
}

// y [t, out] + x [t, in] A^T B with the A [rank, in] and B [rank, out] of each token's line, of `lines` ones: those at its
// `choice` among all. sum may be y.
struct RowUpdates {
    const float *a, *b;
    const int32_t *choice;
    long places, lines, rank;

    // Whether all lines have chosen one that there is.
    bool exist() const {
        return std::all_of(choice, choice + lines, [this](int32_t place) { return place >= 0 && place < places; });
    }
    void operator()(const float *y, const float *x, long all_tokens, long in, long out, float *sum) const {
        const long tokens = all_tokens / lines;
        Threads::shared().run(lines, [&](long line) {
            const long place = choice[line], first = line * tokens;
            const Numbers low(new float[tokens * rank]);
            const Matrix factor{a + place * rank * in, in, 1}, other{b + place * rank * out, out, 1};
            product({{{x + first * in, in, 1}, factor.transposed(), in}}, tokens, rank, nullptr, 0, low.get());
            const float *from = y + first * out;
            float *to = sum + first * out;
            if (tokens > FEW_ROWS) return product({{{low.get(), rank, 1}, other, rank}}, tokens, out, from, out, to);
            for (long i = 0; i < tokens; i++)
                add_rows(from + i * out, low.get() + i * rank, other.floats(), rank, out, to + i * out);
        });
    }
};

// y = x W^T + b, with what an adapter adds before the bias.
struct Linear {
    Matrix weight;  // [out, in]
    long in, out;
    long rank = 0;  // of an update scaling x A^T B^T, where it is not 0
    Matrix a, b;    // [rank, in], [out, rank]
    float scaling = 0;
    RowUpdates lines{};  // an update for each line, where it has any
    Numbers bias;        // [out], or nothing
    Numbers absmax;      // of the weight, where it had to be decoded

    void operator()(const float *x, long tokens, Multiply multiply, float *y) const {
        std::vector<Term> terms{{{x, in, 1}, weight.transposed(), in}};
        Numbers low;
        if (rank) {
            low.reset(new float[tokens * rank]);
            low_product({x, in, 1}, a.transposed(), tokens, in, rank, scaling, low.get());
            terms.push_back({{low.get(), rank, 1}, b.transposed(), rank});
        }
        multiply(terms, tokens, out, nullptr, 0, y);
        if (lines.lines) lines(y, x, tokens, in, out, y);
        if (bias)
            for (long i = 0; i < tokens; i++) add(y + i * out, bias.get(), out, y + i * out);
    }
};

// Of bytes that are absmax [n] of NF4, quantised in blocks of 256: codes [256] times the block's, plus offset.
inline Numbers nested_absmax(const uint8_t *bytes, long n, const float *codes, const float *outer, float offset) {
    Numbers found(new float[n]);
    for (long i = 0; i < n; i++) found[i] = codes[bytes[i]] * outer[i / 256];
    for (long i = 0; i < n; i++) found[i] += offset;  // rounded in between, as where MindSpore computes it
    return found;
}

struct Layer {
    Numbers input_norm, post_norm, q_norm, k_norm;  // weights; of q and k, or nothing
    float eps;
    Linear q, k, v, o, gate, up, down;
    Multiply multiply;

    // x [t, h] -> result [t, h], which may be x; attention: all but q, k and v; what follows it as `cached_attention`
    // takes it. Rows of x from `real` on are zero: padding.
    void operator()(const float *x, long tokens, long real, Attention attention, float *keys, float *values,
                    const int32_t *begins, const std::vector<long> &slots, float *result) const {
        const long hidden = o.out, dim = attention.dim;
        const Numbers memory(new float[tokens * (2 * hidden + 2 * q.out + k.out + v.out + 2 * gate.out)]);
        float *free = memory.get();
        const auto take = [&](long n) { return std::exchange(free, free + tokens * n); };
        float *normed = take(hidden), *more = take(hidden), *queries = take(q.out), *mixed = take(q.out);
        float *new_keys = take(k.out), *new_values = take(v.out), *gated = take(gate.out), *upper = take(gate.out);

        norm(input_norm, x, tokens, real, normed);
        q(normed, tokens, multiply, queries);
        k(normed, tokens, multiply, new_keys);
        v(normed, tokens, multiply, new_values);
        if (q_norm) {
            rms_norm(queries, q_norm.get(), eps, real * q.out / dim, dim, queries);
            rms_norm(new_keys, k_norm.get(), eps, real * k.out / dim, dim, new_keys);
        }
        attention.q = queries, attention.k = new_keys, attention.v = new_values;
        cached_attention(attention, keys, values, begins, slots, mixed);
        o(mixed, tokens, multiply, more);
        add(x, more, tokens * hidden, result);

        norm(post_norm, result, tokens, real, normed);
        gate(normed, tokens, multiply, gated);
        up(normed, tokens, multiply, upper);
        gated_silu(gated, upper, real * gate.out, gated);
        std::fill_n(gated + real * gate.out, (tokens - real) * gate.out, 0.0f);
        down(gated, tokens, multiply, more);
        add(result, more, tokens * hidden, result);
    }

  private:
    void norm(const Numbers &weight, const float *x, long tokens, long real, float *y) const {
        const long hidden = o.out;
        rms_norm(x, weight.get(), eps, real, hidden, y);
        std::fill_n(y + real * hidden, (tokens - real) * hidden, 0.0f);
    }
};

}  // namespace lora_ms
