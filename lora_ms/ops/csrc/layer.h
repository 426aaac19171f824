// A decoder layer, and its gradient with frozen weights. It calls what the operators of its parts call, in their order,
// so that its numbers are theirs to the bit.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "attention.h"
#include "bfloat16.h"
#include "dropout.h"
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
// `choice` among all. Tokens of all lines, as many of each; or of one, and then all have chosen the same. sum may be y.
struct RowUpdates {
    const float *a, *b;
    const int32_t *choice;
    long places, lines, rank;

    // Whether all lines have chosen one that there is.
    bool exist() const {
        return std::all_of(choice, choice + lines, [this](int32_t place) { return place >= 0 && place < places; });
    }
    void operator()(const float *y, const float *x, long all_tokens, long in, long out, float *sum) const {
        const long count = all_tokens % lines == 0 ? lines : 1, tokens = all_tokens / count;
        Threads::shared().run(count, [&](long line) {
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

// x [tokens, n], dropped out into `memory` where there is a dropout.
inline Matrix dropped(const std::optional<Dropout> &dropout, Matrix x, long tokens, long n, Numbers &memory) {
    if (!dropout) return x;
    memory.reset(new float[tokens * n]);
    (*dropout)(x.floats(), tokens, n, memory.get());
    return {memory.get(), n, 1};
}

// The gradients of x W^T + low B^T with low = scaling dropout(x) A^T by what belongs to the adapter, from d_y [tokens,
// out]: d_low = scaling d_y B [tokens, rank], d_A = d_low^T dropout(x), d_B = d_y^T low.
inline void factor_gradients(Matrix d_y, Matrix x, Matrix low, Matrix b, float scaling,
                             const std::optional<Dropout> &dropout, long tokens, long in, long out, long rank,
                             float *d_low, float *d_a, float *d_b) {
    low_product(d_y, b, tokens, out, rank, scaling, d_low);
    const long real = without_zero_end({{d_y, {}, out}}, tokens);  // padding adds nothing to a sum
    Numbers memory;
    const Matrix seen = dropped(dropout, x, real, in, memory);
    product({{Matrix{d_low, rank, 1}.transposed(), seen, real}}, rank, in, nullptr, 0, d_a);
    product({{d_y.transposed(), low, real}}, out, rank, nullptr, 0, d_b);
}

// d_x [tokens, in] = d_y W + dropout(d_low A), of a W [out, in].
inline void dropped_gradient(Matrix d_y, Matrix weight, Matrix d_low, Matrix a, const Dropout &dropout, long tokens,
                             long in, long out, long rank, Multiply multiply, float *d_x) {
    const Numbers update(new float[tokens * in]);
    product({{d_low, a, rank}}, tokens, in, nullptr, 0, update.get());
    dropout(update.get(), tokens, in, update.get());
    multiply({{d_y, weight, out}}, tokens, in, update.get(), in, d_x);
}

// The same matrix, of `numbers` numbers, with its scales decoded where they are nested.
inline Matrix with_scales(Matrix weight, long numbers, Numbers &scales) {
    if (!weight.nested.bytes) return weight;
    constexpr long SOME = 1 << 13;
    const long n = divided(numbers, Nf4::BLOCK);
    scales.reset(new float[n]);
    Threads::shared().run(divided(n, SOME), [&](long task) {
        weight.nested.decode(task * SOME, std::min(n, (task + 1) * SOME), scales.get() + task * SOME);
    });
    weight.scales = scales.get();
    weight.nested = {};
    return weight;
}

// y = x W^T + b, with what an adapter adds before the bias.
struct Linear {
    Matrix weight;  // [out, in]
    long in, out;
    long rank = 0;  // of an update scaling dropout(x) A^T B^T, where it is not 0
    Matrix a, b;    // [rank, in], [out, rank]
    float scaling = 0;
    std::optional<Dropout> dropout;
    RowUpdates lines{};  // an update for each line, where it has any
    Numbers bias;        // [out], or nothing

    long factor_numbers() const { return rank * (in + out); }

    void operator()(const float *x, long tokens, Multiply multiply, float *y) const {
        Numbers low, scales;
        const bool as_they_are = tokens <= FEW_ROWS && multiply == product;
        const Matrix decoded = as_they_are ? weight : with_scales(weight, in * out, scales);
        std::vector<Term> terms{{{x, in, 1}, decoded.transposed(), in}};
        if (rank) {
            low = low_input(x, tokens);
            terms.push_back({{low.get(), rank, 1}, b.transposed(), rank});
        }
        multiply(terms, tokens, out, nullptr, 0, y);
        if (lines.lines) lines(y, x, tokens, in, out, y);
        if (bias)
            for (long i = 0; i < tokens; i++) add(y + i * out, bias.get(), out, y + i * out);
    }

    // From d_y [tokens, out] the gradients of A and B, one after the other, and of x [tokens, in], where it is wanted.
    void backward(const float *x, const float *d_y, long tokens, Multiply multiply, float *d_x, float *d_factors) const {
        const Matrix from{d_y, out, 1};
        Numbers scales;
        const Matrix decoded = d_x ? with_scales(weight, in * out, scales) : weight;
        std::vector<Term> terms{{from, decoded, out}};
        Numbers d_low;
        if (rank) {
            const Numbers low = low_input(x, tokens);
            d_low.reset(new float[tokens * rank]);
            factor_gradients(from, {x, in, 1}, {low.get(), rank, 1}, b, scaling, dropout, tokens, in, out, rank,
                             d_low.get(), d_factors, d_factors + rank * in);
            const Matrix of_low{d_low.get(), rank, 1};
            if (d_x && dropout)
                return dropped_gradient(from, decoded, of_low, a, *dropout, tokens, in, out, rank, multiply, d_x);
            terms.push_back({of_low, a, rank});
        }
        if (d_x) multiply(terms, tokens, in, nullptr, 0, d_x);
    }

  private:
    Numbers low_input(const float *x, long tokens) const {
        Numbers low(new float[tokens * rank]), memory;
        const Matrix seen = dropped(dropout, {x, in, 1}, tokens, in, memory);
        low_product(seen, a.transposed(), tokens, in, rank, scaling, low.get());
        return low;
    }
};

// What a layer computes on its way, [tokens, …] each. Where it is kept for a gradient, no two are the same.
struct Between {
    float *q, *k, *v;        // as they come from the projections
    float *mixed, *sums;     // of the attention; sums in training alone
    float *middle;           // x and what the attention gave
    float *gate, *up;
};

struct Layer {
    Numbers input_norm, post_norm, q_norm, k_norm;  // weights; of q and k, or nothing
    float eps;
    Linear q, k, v, o, gate, up, down;
    Multiply multiply;
    Attention attention;  // but for q, k and v

    long hidden() const { return o.out; }
    // Numbers of a token in `Between`, and beside it while the layer is computed, and its gradient.
    long between_numbers() const { return 2 * q.out + k.out + v.out + attention.heads + hidden() + 2 * gate.out; }
    long spare_numbers() const { return 2 * hidden() + gate.out + (q_norm ? q.out + k.out : 0); }
    long spare_numbers_back() const {
        return 4 * hidden() + 3 * gate.out + 2 * q.out + k.out + v.out + (q_norm ? q.out + k.out : 0);
    }
    long factor_numbers() const {
        long n = 0;
        for (const Linear *each : {&q, &k, &v, &o, &gate, &up, &down}) n += each->factor_numbers();
        return n;
    }

    Between between(float *from, long tokens) const {
        const auto take = [&](long n) { return std::exchange(from, from + tokens * n); };
        Between all;
        all.q = take(q.out), all.k = take(k.out), all.v = take(v.out), all.mixed = take(q.out);
        all.sums = take(attention.heads), all.middle = take(hidden());
        all.gate = take(gate.out), all.up = take(gate.out);
        return all;
    }

    // x [t, h] -> result [t, h], which may be x. attend(a, mixed) is called with the attention's inputs. spare: of
    // spare_numbers() for each token. Rows of zeros at the end, as of padding, are left out where they are found, in each
    // tensor anew: a token may be zero and see others.
    template <class Attend>
    void operator()(const float *x, long tokens, const Between &all, float *spare, const Attend &attend,
                    float *result) const {
        const long h = hidden();
        float *normed = spare, *more = normed + tokens * h, *gated = more + tokens * h;
        norm(input_norm, x, tokens, normed);
        q(normed, tokens, multiply, all.q);
        k(normed, tokens, multiply, all.k);
        v(normed, tokens, multiply, all.v);
        attend(attended(all, tokens, gated + tokens * gate.out), all.mixed);
        o(all.mixed, tokens, multiply, more);
        add(x, more, tokens * h, all.middle);

        norm(post_norm, all.middle, tokens, normed);
        gate(normed, tokens, multiply, all.gate);
        up(normed, tokens, multiply, all.up);
        gated_product(all, tokens, gated);
        down(gated, tokens, multiply, more);
        add(all.middle, more, tokens * h, result);
    }

    // From d_result [t, h] the gradients of the factors of all seven, one after another, and of x, where it is wanted,
    // which may be d_result. feed_alone: nothing below the feed-forward block has a gradient. spare: of
    // spare_numbers_back() for each token.
    void backward(const float *x, const Between &all, const float *d_result, long tokens, bool feed_alone, float *spare,
                  float *d_x, float *d_factors) const {
        const long h = hidden(), wide = gate.out;
        const auto take = [&](long n) { return std::exchange(spare, spare + tokens * n); };
        const auto next = [&](const Linear &of) { return std::exchange(d_factors, d_factors + of.factor_numbers()); };
        float *of_q = next(q), *of_k = next(k), *of_v = next(v), *of_o = next(o);
        float *of_gate = next(gate), *of_up = next(up), *of_down = next(down);
        float *normed = take(h), *d_normed = take(h), *more = take(h), *d_middle = take(h);
        float *gated = take(wide), *d_gate = take(wide), *d_up = take(wide);

        gated_product(all, tokens, gated);
        down.backward(gated, d_result, tokens, multiply, d_gate, of_down);
        const long fed = real_rows(d_gate, tokens, wide);
        lora_ms::gated_silu_gradient(all.gate, all.up, d_gate, fed * wide, d_gate, d_up);  // which may be one
        std::fill_n(d_gate + fed * wide, (tokens - fed) * wide, 0.0f);
        std::fill_n(d_up + fed * wide, (tokens - fed) * wide, 0.0f);
        norm(post_norm, all.middle, tokens, normed);
        const bool to_middle = d_x || !feed_alone;
        gate.backward(normed, d_gate, tokens, multiply, to_middle ? d_normed : nullptr, of_gate);
        up.backward(normed, d_up, tokens, multiply, to_middle ? more : nullptr, of_up);
        if (!to_middle) return;
        add(d_normed, more, tokens * h, d_normed);
        norm_gradient(post_norm, all.middle, d_normed, tokens, h, more);
        add(d_result, more, tokens * h, d_middle);
        if (feed_alone) return void(std::copy_n(d_middle, tokens * h, d_x));

        float *d_mixed = take(q.out), *d_q = take(q.out), *d_k = take(k.out), *d_v = take(v.out);
        o.backward(all.mixed, d_middle, tokens, multiply, d_mixed, of_o);
        float *norms = take(q_norm ? q.out + k.out : 0);
        attention_gradient(attended(all, tokens, norms), all.mixed, all.sums, d_mixed, d_q, d_k, d_v);
        if (q_norm) {
            norm_gradient(q_norm, all.q, d_q, tokens * q.out / attention.dim, attention.dim, norms);
            norm_gradient(k_norm, all.k, d_k, tokens * k.out / attention.dim, attention.dim, norms + tokens * q.out);
            d_q = norms, d_k = norms + tokens * q.out;
        }
        norm(input_norm, x, tokens, normed);
        q.backward(normed, d_q, tokens, multiply, d_x ? d_normed : nullptr, of_q);
        k.backward(normed, d_k, tokens, multiply, d_x ? more : nullptr, of_k);
        if (d_x) add(d_normed, more, tokens * h, d_normed);
        v.backward(normed, d_v, tokens, multiply, d_x ? more : nullptr, of_v);
        if (!d_x) return;
        add(d_normed, more, tokens * h, d_normed);
        norm_gradient(input_norm, x, d_normed, tokens, h, more);
        add(d_middle, more, tokens * h, d_x);
    }

  private:
    static long real_rows(const float *x, long tokens, long n) {
        return without_zero_end({{{x, n, 1}, {}, n}}, tokens);
    }
    void norm(const Numbers &weight, const float *x, long tokens, float *y) const {
        norm_rows(weight, x, tokens, hidden(), y);
    }
    void norm_rows(const Numbers &weight, const float *x, long rows, long n, float *y) const {
        const long real = real_rows(x, rows, n);
        rms_norm(x, weight.get(), eps, real, n, y);
        std::fill_n(y + real * n, (rows - real) * n, 0.0f);
    }
    void norm_gradient(const Numbers &weight, const float *x, const float *d_y, long rows, long n, float *d_x) const {
        const long real = real_rows(d_y, rows, n);
        rms_norm_gradient(x, weight.get(), eps, d_y, real, n, d_x);
        std::fill_n(d_x + real * n, (rows - real) * n, 0.0f);
    }
    void gated_product(const Between &all, long tokens, float *gated) const {
        const long real = real_rows(all.gate, tokens, gate.out);
        gated_silu(all.gate, all.up, real * gate.out, gated);
        std::fill_n(gated + real * gate.out, (tokens - real) * gate.out, 0.0f);
    }
    // The attention's inputs; norms: memory for normalised queries and keys, where they are.
    Attention attended(const Between &all, long tokens, float *norms) const {
        Attention found = attention;
        found.q = all.q, found.k = all.k, found.v = all.v;
        if (q_norm) {
            float *keys = norms + tokens * q.out;
            norm_rows(q_norm, all.q, tokens * q.out / attention.dim, attention.dim, norms);
            norm_rows(k_norm, all.k, tokens * k.out / attention.dim, attention.dim, keys);
            found.q = norms, found.k = keys;
        }
        return found;
    }
};

}  // namespace lora_ms
