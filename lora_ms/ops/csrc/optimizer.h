// AdamW (Loshchilov and Hutter, 2019) on vectors, with moments in float32 or in eight bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace lora_ms {

// What is the same for all numbers of a step.
struct Step {
    float scale;               // of the gradient
    float taken;               // 1; or 0: the moments stay as they are
    float share1, share2;      // of the new gradient in the moments, 1 - beta
    float correct1, correct2;  // 1 / (1 - beta1^count), 1 / sqrt(1 - beta2^count)
    float eps;

    // A gradient that is not finite counts as 0.
    float used(float grad) const { return std::isfinite(grad) ? grad * scale : 0.0f; }
    float average(float before, float grad) const { return before + taken * share1 * (grad - before); }
    float square(float before, float grad) const { return before + taken * share2 * (grad * grad - before); }
    float after(float old, float average, float square, float rate, float decay) const {
        const float update = correct1 * average / (std::sqrt(square) * correct2 + eps);
        return old - rate * (decay * old + update);
    }
};

// One number for all, or one for each.
struct PerNumber {
    const float *values;
    long step;  // from one to the next: 0 or 1

    float at(long i) const { return values[i * step]; }
};

// What a step takes of each number.
struct StepInputs {
    const float *old, *grad;
    PerNumber rate, decay;  // of the weights
};

inline void adamw(const StepInputs &inputs, const Step &step, long count, float *__restrict average,
                  float *__restrict square, float *__restrict out) {
    const StepInputs n = inputs;
    const Step s = step;
    Threads::shared().run(divided(count, STRETCH), [&](long task) {
        for (long i = task * STRETCH; i < std::min(count, (task + 1) * STRETCH); i++) {
            const float g = s.used(n.grad[i]);
            average[i] = s.average(average[i], g);
            square[i] = s.square(square[i], g);
            out[i] = s.after(n.old[i], average[i], square[i], n.rate.at(i), n.decay.at(i));
        }
    });
}

constexpr long CODED = 256;  // numbers with a common factor

// What the 256 codes stand for, rising, and between which numbers each is the nearest.
struct Table {
    float values[256], thresholds[255];

    // The number of thresholds below x.
    uint8_t code(float x) const {
        long first = 0;
        for (long width = 128; width > 0; width /= 2)
            if (thresholds[first + width - 1] < x) first += width;
        return static_cast<uint8_t>(first);
    }
};

struct Tables {
    Table with_sign, without;  // of the two moments
};

// A moment in eight bits.
struct Coded {
    uint8_t *codes;
    float *factors;  // of each block

    void read(const Table &table, long block, float *numbers) const {
        for (long i = 0; i < CODED; i++) numbers[i] = table.values[codes[block * CODED + i]] * factors[block];
    }

    void write(const Table &table, long block, const float *numbers) const {
        float largest = 0.0f;
        for (long i = 0; i < CODED; i++) largest = std::max(largest, std::fabs(numbers[i]));
        const float divisor = largest > 0.0f ? largest : 1.0f;
        for (long i = 0; i < CODED; i++) codes[block * CODED + i] = table.code(numbers[i] / divisor);
        factors[block] = largest;
    }
};

// `codes` are of whole blocks, whose last one may reach beyond `count` numbers.
inline void adamw_8bit(const StepInputs &inputs, const Step &step, long count, const Tables &tables, const Coded &average,
                       const Coded &square, float *__restrict out) {
    constexpr long WHOLE = STRETCH / CODED;  // blocks of a task
    const long blocks = divided(count, CODED);
    Threads::shared().run(divided(blocks, WHOLE), [&](long task) {
        float averages[CODED], squares[CODED];
        for (long block = task * WHOLE; block < std::min(blocks, (task + 1) * WHOLE); block++) {
            average.read(tables.with_sign, block, averages);
            square.read(tables.without, block, squares);
            const long first = block * CODED;
            for (long i = 0; i < std::min(CODED, count - first); i++) {
                const float g = step.used(inputs.grad[first + i]);
                averages[i] = step.average(averages[i], g);
                squares[i] = step.square(squares[i], g);
                out[first + i] = step.after(inputs.old[first + i], averages[i], squares[i],
                                            inputs.rate.at(first + i), inputs.decay.at(first + i));
            }
            if (step.taken == 0.0f) continue;
            average.write(tables.with_sign, block, averages);
            square.write(tables.without, block, squares);
        }
    });
}

}  // namespace lora_ms
