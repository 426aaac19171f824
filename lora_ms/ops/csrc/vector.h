// Vectors of floats, as wide as the machine that compiles this has them, by GCC's and Clang's vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

namespace lora_ms {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Float16;  // the bits of a float16
enum class BFloat16 : uint16_t {};  // the upper half of a float32

inline Vec as_vec(Ints bits) { return reinterpret_cast<Vec>(bits); }
inline Ints as_ints(Vec x) { return reinterpret_cast<Ints>(x); }
inline Vec load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }

// LANES numbers of float16, exactly; without the processor's own instruction, by integers.
inline Vec load(const Float16 *from) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif LANES == 8 && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
    typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
    Words words;
    std::memcpy(&words, from, sizeof words);
    const Ints all = __builtin_convertvector(words, Ints), size = (all & 0x7fff) << 13;
    const Ints lowest = Ints{} + (113 << 23);  // the least normal float16, 2^-14
    const Vec tiny = as_vec(size + lowest) - as_vec(lowest);
    const Vec other = as_vec(size + (112 << 23) + ((size >= (31 << 23)) & (112 << 23)));  // infinity stays infinity
    return as_vec(as_ints(size < (1 << 23) ? tiny : other) | (all & 0x8000) << 16);
#endif
}

inline Vec load(const BFloat16 *from) {
    typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
    Words words;
    std::memcpy(&words, from, sizeof words);
    return as_vec(__builtin_convertvector(words, Ints) << 16);
}

inline void store(float *to, Vec x) { *reinterpret_cast<Unaligned *>(to) = x; }
inline Vec spread(float x) { return x - Vec{}; }  // x + 0 would be an addition: it turns -0 into 0
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// sum + a * b, rounded once where the processor can. Said outright: for AMD's processors GCC keeps some such sums in two
// operations, at one place and not at another, so that equal sums would differ in their last bits.
inline Vec add_product(Vec sum, Vec a, Vec b) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, sum);
#elif LANES == 8 && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#elif LANES == 4 && defined(__FMA__)
    return _mm_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
}

// The sum of `COUNT` numbers: of both halves, of both halves of that, …
template <int COUNT>
float sum_of(const float *x) {
    if constexpr (COUNT == 1) return x[0];
    float halves[COUNT > 1 ? COUNT / 2 : 1];
    for (int i = 0; i < COUNT / 2; i++) halves[i] = x[i] + x[i + COUNT / 2];
    return sum_of<COUNT / 2>(halves);
}

inline float sum(Vec x) {
    float lanes[LANES];
    store(lanes, x);
    return sum_of<LANES>(lanes);
}

inline float largest(Vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// The first `count` < LANES numbers, `rest` in the other lanes.
inline Vec load_some(const float *from, long count, float rest = 0.0f) {
    Vec x = spread(rest);
    for (long i = 0; i < count; i++) x[i] = from[i];
    return x;
}

template <class Number>
Vec load_some(const Number *from, long count) {  // of two bytes
    Number some[LANES] = {};
    std::memcpy(some, from, sizeof(Number) * count);
    return load(some);
}

// The first `count` numbers at `from`, and 0, or LANES of them; and the same to write.
template <class Numbers>
Vec load_up_to(Numbers from, long count) {
    return count >= LANES ? load(from) : load_some(from, count);
}
inline void store_up_to(float *to, Vec x, long count) {
    if (count >= LANES) return store(to, x);
    for (long i = 0; i < count; i++) to[i] = x[i];
}

// A square of four rows, transposed.
inline void transpose4(const float *from, long row, float *to, long to_row) {
    typedef float Four __attribute__((vector_size(16)));
    typedef float Anywhere __attribute__((vector_size(16), aligned(4), may_alias));
    Four x[4];
    for (int i = 0; i < 4; i++) x[i] = *reinterpret_cast<const Anywhere *>(from + i * row);
#if defined(__clang__)
#define LORA_MS_PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
    typedef int32_t Places __attribute__((vector_size(16)));
#define LORA_MS_PAIR(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif
    const Four low[2] = {LORA_MS_PAIR(x[0], x[1], 0, 4, 1, 5), LORA_MS_PAIR(x[2], x[3], 0, 4, 1, 5)};
    const Four high[2] = {LORA_MS_PAIR(x[0], x[1], 2, 6, 3, 7), LORA_MS_PAIR(x[2], x[3], 2, 6, 3, 7)};
    *reinterpret_cast<Anywhere *>(to) = LORA_MS_PAIR(low[0], low[1], 0, 1, 4, 5);
    *reinterpret_cast<Anywhere *>(to + to_row) = LORA_MS_PAIR(low[0], low[1], 2, 3, 6, 7);
    *reinterpret_cast<Anywhere *>(to + 2 * to_row) = LORA_MS_PAIR(high[0], high[1], 0, 1, 4, 5);
    *reinterpret_cast<Anywhere *>(to + 3 * to_row) = LORA_MS_PAIR(high[0], high[1], 2, 3, 6, 7);
#undef LORA_MS_PAIR
}

// e^x to two units in the last place; 0 below -87.3, where float32 has no more normal numbers, e^88 above 88.
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r by Taylor's series to r^7.
inline Vec exponential(Vec x) {
    const Vec clipped = x > spread(88.0f) ? spread(88.0f) : (x < spread(-87.3f) ? spread(-87.3f) : x);
    const Vec magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec n = (clipped * 1.44269504f + magic) - magic;
    const Vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    Vec p = spread(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vec power = as_vec((__builtin_convertvector(n, Ints) + 127) << 23);
    return x < spread(-87.3f) ? Vec{} : p * power;
}

}  // namespace lora_ms
