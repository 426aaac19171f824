// The operators as MindSpore's custom operators of kind "aot" call them: addresses and shapes of the inputs, then of
// the outputs. All is float32 but indices, which are int32, and weights W and right factors of products, which may be
// float16. What each computes stands beside its function in rows.h, product.h and attention.h.

#include <memory>

#include "attention.h"
#include "dropout.h"

using namespace lora_ms;

namespace {

struct Tensors {
    void **data;
    int *ndims;
    int64_t **shapes;
    const char **types;  // their names

    float *floats(int i) const { return static_cast<float *>(data[i]); }
    const int32_t *ints(int i) const { return static_cast<const int32_t *>(data[i]); }
    long size(int i, int axis) const { return shapes[i][axis]; }
    Matrix matrix(int i) const {
        const bool half = std::strcmp(types[i], "float16") == 0;
        return {half ? nullptr : floats(i), size(i, 1), 1, half ? static_cast<const Half *>(data[i]) : nullptr};
    }
    long numbers(int i) const {
        long n = 1;
        for (int axis = 0; axis < ndims[i]; axis++) n *= shapes[i][axis];
        return n;
    }
};

enum Kind { TIMES_TRANSPOSED, TIMES, TRANSPOSED_TIMES };

// Inputs a1, b1, a2, b2, … and, where their number is odd, what the products are added to: [m, n], or [n], to each row.
int products(Kind kind, int count, Tensors t) {
    const int inputs = count - 1, c = count - 1;
    const long m = t.size(c, 0), n = t.size(c, 1);
    std::vector<Term> terms;
    for (int i = 0; i + 1 < inputs; i += 2) {
        Matrix a = t.matrix(i), b = t.matrix(i + 1);
        if (kind == TIMES_TRANSPOSED) b = b.transposed();
        if (kind == TRANSPOSED_TIMES) a = a.transposed();
        terms.push_back({a, b, t.size(i, kind == TRANSPOSED_TIMES ? 0 : 1)});
    }
    const int start = inputs - 1;
    if (inputs % 2) {
        product(terms, m, n, t.floats(start), t.ndims[start] == 2 ? n : 0, t.floats(c));
    } else {
        product(terms, m, n, nullptr, 0, t.floats(c));
    }
    return 0;
}

// A thin product [t, rank], times `scaling`.
void low_product(Matrix x, Matrix factor, long tokens, long depth, long rank, float scaling, float *low) {
    product({{x, factor, depth}}, tokens, rank, nullptr, 0, low);
    for (long i = 0; i < tokens * rank; i++) low[i] *= scaling;
}

// rows, columns and [rate, 1 / (1 - rate)] from input `first` on
Dropout dropout_of(Tensors t, int first) {
    return {t.floats(first), t.floats(first + 1), t.floats(first + 2)[0], t.floats(first + 2)[1]};
}

// Room for one call: what a thread keeps for the next would be there once for each of MindSpore's threads.
typedef std::unique_ptr<float[]> Numbers;

// x [tokens, n], dropped out into `room` where `drops`.
Matrix dropped(Tensors t, bool drops, int first, Matrix x, long tokens, long n, Numbers &room) {
    if (!drops) return x;
    room.reset(new float[tokens * n]);
    dropout_of(t, first)(x.data, tokens, n, room.get());
    return {room.get(), n, 1};
}

// q, k, v, cos, sin [b * s * n, d] (of a token's n equal rows one is read), first [b, s]
Attention attention_of(Tensors t) {
    const long dim = t.size(3, 1), kv_heads = t.size(1, 1) / dim;
    return {t.floats(0), t.floats(1), t.floats(2), t.floats(3), t.floats(4), t.ints(5), t.size(5, 0), t.size(5, 1),
            t.size(0, 1) / dim, kv_heads, dim, t.size(3, 0) / t.size(0, 0) * dim};
}

}  // namespace

#define OPERATOR(name) \
    extern "C" int name([[maybe_unused]] int count, void **data, int *ndims, int64_t **shapes, const char **types, \
                        void *, void *)
#define TENSORS \
    Tensors { data, ndims, shapes, types }

extern "C" void set_threads(int count) { Threads::shared().set_count(count); }

// a b^T + …: a [m, k], b [n, k]
OPERATOR(times_transposed) { return products(TIMES_TRANSPOSED, count, TENSORS); }

// a b + …: a [m, k], b [k, n]
OPERATOR(times) { return products(TIMES, count, TENSORS); }

// a^T b + …: a [k, m], b [k, n]
OPERATOR(transposed_times) { return products(TRANSPOSED_TIMES, count, TENSORS); }

// x [t, in], W [out, in], A [rank, in], B [out, rank], scaling [] -> x W^T + low B^T [t, out], low = scaling x A^T. With
// rows [t], columns [in], [rate, 1 / (1 - rate)] besides, the x of A is dropped out.
OPERATOR(adapted) {
    const Tensors t = TENSORS;
    const int out_at = count - 2, low_at = count - 1;
    const long tokens = t.size(0, 0), in = t.size(0, 1), out = t.size(1, 0), rank = t.size(2, 0);
    const Matrix x = t.matrix(0), low = t.matrix(low_at);
    Numbers room;
    low_product(dropped(t, count == 10, 5, x, tokens, in, room), t.matrix(2).transposed(), tokens, in, rank,
                *t.floats(4), t.floats(low_at));
    const std::vector<Term> terms = {{x, t.matrix(1).transposed(), in}, {low, t.matrix(3).transposed(), rank}};
    product(terms, tokens, out, nullptr, 0, t.floats(out_at));
    return 0;
}

// Of the same: d_y [t, out], x, low, B, scaling -> d_low = scaling d_y B [t, rank], d_A = d_low^T x, d_B = d_y^T low;
// with rows, columns and rate as there.
OPERATOR(adapted_gradient) {
    const Tensors t = TENSORS;
    const int low_at = count - 3;
    const long tokens = t.size(0, 0), out = t.size(0, 1), in = t.size(1, 1), rank = t.size(2, 1);
    const Matrix grad = t.matrix(0), d_low = t.matrix(low_at);
    low_product(grad, t.matrix(3), tokens, out, rank, *t.floats(4), t.floats(low_at));
    Numbers room;
    const Matrix x = dropped(t, count == 11, 5, t.matrix(1), tokens, in, room);
    product({{d_low.transposed(), x, tokens}}, rank, in, nullptr, 0, t.floats(count - 2));
    product({{grad.transposed(), t.matrix(2), tokens}}, out, rank, nullptr, 0, t.floats(count - 1));
    return 0;
}

// d_y, W, d_low, A, rows, columns, [rate, 1 / (1 - rate)] -> d_x = d_y W + dropout(d_low A)
OPERATOR(dropped_gradient) {
    const Tensors t = TENSORS;
    const long tokens = t.size(0, 0), out = t.size(0, 1), in = t.size(1, 1), rank = t.size(2, 1);
    const Numbers own(new float[tokens * in]);
    product({{t.matrix(2), t.matrix(3), rank}}, tokens, in, nullptr, 0, own.get());
    dropout_of(t, 4)(own.get(), tokens, in, own.get());
    product({{t.matrix(0), t.matrix(1), out}}, tokens, in, own.get(), in, t.floats(7));
    return 0;
}

// x [t, n], weight [n], eps [1] -> y [t, n]
OPERATOR(norm) {
    const Tensors t = TENSORS;
    lora_ms::norm(t.floats(0), t.floats(1), *t.floats(2), t.size(0, 0), t.size(0, 1), t.floats(3));
    return 0;
}

// x [t, n], weight [n], eps [1], d_y [t, n] -> d_x [t, n]
OPERATOR(norm_gradient) {
    const Tensors t = TENSORS;
    lora_ms::norm_gradient(t.floats(0), t.floats(1), *t.floats(2), t.floats(3), t.size(0, 0), t.size(0, 1),
                           t.floats(4));
    return 0;
}

// x [t, n], eps [1], d_y [t, n] -> d_weight [n]
OPERATOR(norm_weight_gradient) {
    const Tensors t = TENSORS;
    lora_ms::norm_weight_gradient(t.floats(0), *t.floats(1), t.floats(2), t.size(0, 0), t.size(0, 1), t.floats(3));
    return 0;
}

// gate, up -> y, all of one shape
OPERATOR(gated) {
    const Tensors t = TENSORS;
    lora_ms::gated(t.floats(0), t.floats(1), t.numbers(0), t.floats(2));
    return 0;
}

// gate, up, d_y -> d_gate, d_up, all of one shape
OPERATOR(gated_gradient) {
    const Tensors t = TENSORS;
    lora_ms::gated_gradient(t.floats(0), t.floats(1), t.floats(2), t.numbers(0), t.floats(3), t.floats(4));
    return 0;
}

// logits [c, v], targets [c] -> loss [c], right [c], d_logits [c, v]
OPERATOR(cross_entropy) {
    const Tensors t = TENSORS;
    lora_ms::cross_entropy(t.floats(0), t.ints(1), t.size(0, 0), t.size(0, 1), t.floats(2), t.floats(3), t.floats(4));
    return 0;
}

// old, grad, exp_avg, exp_avg_sq [n], rate and decay [n] or [], the numbers of Step [7] -> old, exp_avg, exp_avg_sq anew
OPERATOR(adamw) {
    const Tensors t = TENSORS;
    const long n = t.numbers(0);
    Step step;
    static_assert(sizeof step == 7 * sizeof(float));
    std::memcpy(&step, t.floats(6), sizeof step);
    lora_ms::adamw(t.floats(0), t.floats(1), t.floats(2), t.floats(3), t.floats(4), t.numbers(4) == n, t.floats(5),
                   t.numbers(5) == n, step, n, t.floats(7), t.floats(8), t.floats(9));
    return 0;
}

// q, k, v, cos, sin, first -> out like q, log_sum [t, n_h]
OPERATOR(attention) {
    const Tensors t = TENSORS;
    attend(attention_of(t), t.floats(6), t.floats(7));
    return 0;
}

// k, v, cos, sin, first -> keys, values, both [b * n_kv * s, d]
OPERATOR(cache_rows) {
    const Tensors t = TENSORS;
    const long dim = t.size(2, 1), kv_heads = t.size(0, 1) / dim, row = t.size(2, 0) / t.size(0, 0) * dim;
    const Attention a = {nullptr, t.floats(0), t.floats(1), t.floats(2), t.floats(3), nullptr, t.size(4, 0),
                         t.size(4, 1), 0, kv_heads, dim, row};
    lora_ms::cache_rows(a, t.floats(5), t.floats(6));
    return 0;
}

// q [b, n_h * d], keys, values [b * n_kv, length, d], cos, sin [b * n, d], first [b, 1], rows of the cache [n], of
// which the first is the slot of all -> like q
OPERATOR(attend_cache) {
    const Tensors t = TENSORS;
    const long batch = t.size(5, 0), dim = t.size(3, 1);
    const Attention a = {t.floats(0), t.floats(1), t.floats(2), t.floats(3), t.floats(4), t.ints(5), batch, 1,
                         t.size(0, 1) / dim, t.size(1, 0) / batch, dim, t.size(3, 0) / batch * dim};
    lora_ms::attend_cache(a, t.size(1, 1), t.ints(6)[0], t.floats(7));
    return 0;
}

// q, k, v, cos, sin, first, out, log_sum, d_out -> d_q, d_k, d_v
OPERATOR(attention_gradient) {
    const Tensors t = TENSORS;
    attend_gradient(attention_of(t), t.floats(6), t.floats(7), t.floats(8), t.floats(9), t.floats(10), t.floats(11));
    return 0;
}
