// Operators on the rows of a matrix, RMSNorm, the gated SiLU, cross-entropy, and AdamW on a vector.
#pragma once

#include <cmath>

#include "product.h"

namespace lora_ms {

// Calls work(i) for rows i in [0, count), shared out among the threads, `per_task` rows at a time.
template <class Work>
void over_rows(long count, long per_task, const Work &work) {
    Threads::shared().run(divided(count, per_task), [&](long task) {
        for (long i = task * per_task; i < std::min(count, (task + 1) * per_task); i++) work(i);
    });
}

// to = from + the sum over `count` rows [n], each times its factor.
inline void add_rows(const float *from, const float *factors, const float *rows, long count, long n, float *to) {
    for (long j = 0; j < n; j += LANES) {
        Vec total = load_up_to(from + j, n - j);
        for (long r = 0; r < count; r++) total = add_product(total, spread(factors[r]), load_up_to(rows + r * n + j, n - j));
        store_up_to(to + j, total, n - j);
    }
}

// 1 / sqrt(mean(x^2) + eps)
inline float rms_scale(const float *x, long n, float eps) { return 1.0f / std::sqrt(dot(x, x, n) / n + eps); }

// y = x * scale(x) * weight, row by row of x [rows, n].
inline void rms_norm(const float *x, const float *weight, float eps, long rows, long n, float *y) {
    over_rows(rows, divided(8192, n), [&](long i) {
        const float *from = x + i * n, scale = rms_scale(from, n, eps);
        float *to = y + i * n;
        for (long p = 0; p < n; p++) to[p] = from[p] * (scale * weight[p]);
    });
}

// With r = scale(x) and g = d_y weight: d_x = r g - x r^3 mean(g x).
inline void rms_norm_gradient(const float *x, const float *weight, float eps, const float *d_y, long rows, long n,
                              float *d_x) {
    over_rows(rows, divided(8192, n), [&](long i) {
        const float *from = x + i * n, *grad = d_y + i * n, scale = rms_scale(from, n, eps);
        float *to = d_x + i * n;
        for (long p = 0; p < n; p++) to[p] = grad[p] * weight[p];
        const float inner = dot(to, from, n) / n * scale * scale * scale;
        for (long p = 0; p < n; p++) to[p] = to[p] * scale - from[p] * inner;
    });
}

// d_weight = the sum over the rows of scale(x) x d_y.
inline void rms_norm_weight_gradient(const float *x, float eps, const float *d_y, long rows, long n, float *d_weight) {
    std::vector<float> scales(rows);
    over_rows(rows, divided(8192, n), [&](long i) { scales[i] = rms_scale(x + i * n, n, eps); });
    const long width = divided(divided(n, Threads::shared().count()), 16) * 16;
    Threads::shared().run(divided(n, width), [&](long task) {
        const long begin = task * width, end = std::min(n, begin + width);
        std::fill(d_weight + begin, d_weight + end, 0.0f);
        for (long i = 0; i < rows; i++)
            for (long p = begin; p < end; p++) d_weight[p] += scales[i] * x[i * n + p] * d_y[i * n + p];
    });
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr long STRETCH = 4096;  // numbers that a task takes

// y = gate sigmoid(gate) up, elementwise on n numbers.
inline void gated_silu(const float *gate, const float *up, long n, float *y) {
    Threads::shared().run(divided(n, STRETCH), [&](long task) {
        for (long p = task * STRETCH, end = std::min(n, p + STRETCH); p < end; p += LANES) {
            const Vec g = load_up_to(gate + p, end - p);
            store_up_to(y + p, g * sigmoid(g) * load_up_to(up + p, end - p), end - p);
        }
    });
}

inline void gated_silu_gradient(const float *gate, const float *up, const float *d_y, long n, float *d_gate, float *d_up) {
    Threads::shared().run(divided(n, STRETCH), [&](long task) {
        for (long p = task * STRETCH, end = std::min(n, p + STRETCH); p < end; p += LANES) {
            const Vec g = load_up_to(gate + p, end - p), s = sigmoid(g), d = load_up_to(d_y + p, end - p);
            const Vec silu = g * s;
            store_up_to(d_gate + p, d * load_up_to(up + p, end - p) * (s + silu * (1.0f - s)), end - p);
            store_up_to(d_up + p, d * silu, end - p);
        }
    });
}

// Of logits [rows, v] and targets [rows]: loss -log softmax(logits)[target], whether the target has the largest logit,
// [rows]; and softmax(logits) - onehot(target). A target below 0 makes all of its row 0.
inline void cross_entropy(const float *logits, const int32_t *targets, long rows, long v, float *loss, float *right,
                          float *gradient) {
    over_rows(rows, 1, [&](long i) {
        const float *from = logits + i * v;
        float *to = gradient + i * v;
        const long target = targets[i];
        if (target < 0) {
            std::fill(to, to + v, 0.0f);
            loss[i] = right[i] = 0.0f;
            return;
        }
        Vec most = spread(-3e38f);
        for (long p = 0; p < v; p += LANES)
            most = larger(most, p + LANES <= v ? load(from + p) : load_some(from + p, v - p, -3e38f));
        const float top = largest(most);
        Vec total = {};
        for (long p = 0; p < v; p += LANES) {
            const Vec x = p + LANES <= v ? load(from + p) : load_some(from + p, v - p, -3e38f);
            const Vec e = exponential(x - top);
            store_up_to(to + p, e, v - p);
            total += e;
        }
        const float inverse = 1.0f / sum(total);
        for (long p = 0; p < v; p++) to[p] *= inverse;
        to[target] -= 1.0f;
        loss[i] = top + std::log(sum(total)) - from[target];
        // where several logits are the largest, the first counts
        right[i] = from[target] == top && std::find(from, from + target, top) == from + target ? 1.0f : 0.0f;
    });
}

}  // namespace lora_ms
