// Dropout by t + n uniform numbers for x [t, n], as Dropout in lora_ms/ops/portable.py has it, bit for bit.
#pragma once

#include "rows.h"

namespace lora_ms {

// Number (i, j) is kept where the fractional part of (8 + 32 rows[i]) (8 + 32 columns[j]) is not below `rate`.
struct Dropout {
    const float *rows, *columns;
    float rate, scale;  // scale: of what is kept, 1 / (1 - rate)

    // x [count, n] -> to, which may be x.
    void operator()(const float *x, long count, long n, float *to) const {
        std::vector<float> factors(n);
        for (long p = 0; p < n; p++) factors[p] = 8.0f + 32.0f * columns[p];
        over_rows(count, divided(8192, n), [&](long i) {
            const float row = 8.0f + 32.0f * rows[i];
            for (long p = 0; p < n; p += LANES) {
                Vec turns = row * load_up_to(factors.data() + p, n - p);
                asm("" : "+m"(turns));  // rounded before the subtraction, which would else be one operation with it
                const Vec part = turns - __builtin_convertvector(__builtin_convertvector(turns, Ints), Vec);
                const Vec kept = load_up_to(x + i * n + p, n - p) * scale;
                store_up_to(to + i * n + p, part >= spread(rate) ? kept : Vec{}, n - p);
            }
        });
    }
};

}  // namespace lora_ms
