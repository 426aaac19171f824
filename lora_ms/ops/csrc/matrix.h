// Matrices of the types in which weights lie in memory. Products read them by `load`, as vectors of float32.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lora_ms {

enum class Type { FLOAT32, FLOAT16, BFLOAT16, NF4 };

// Element (i, j) is number place + i * row + j * column of data.
struct Matrix {
    const void *data;
    long row, column;
    Type type = Type::FLOAT32;
    const float *scales = nullptr;  // of NF4: the largest size of each block
    long place = 0;

    Matrix transposed() const {
        Matrix other = *this;
        std::swap(other.row, other.column);
        return other;
    }
    Matrix from(long i, long j) const {
        Matrix part = *this;
        part.place += i * row + j * column;
        return part;
    }
    const float *floats() const { return static_cast<const float *>(data) + place; }  // of FLOAT32
};

// Numbers of NF4 from `place` on: two in a byte, the first in its high half, each times its block's scale (QLoRA,
// Dettmers et al., 2023).
struct Nf4 {
    static constexpr long BLOCK = 64;
    const uint8_t *codes;
    const float *scales;
    long place;
    Nf4 operator+(long n) const { return {codes, scales, place + n}; }
    float operator[](long n) const { return number(place + n); }
    float number(long n) const {
        const uint8_t two = codes[n / 2];
        return LEVELS[n % 2 ? two & 15 : two >> 4] * scales[n / BLOCK];
    }
    // quantiles of a normal distribution, as the format names them
    static constexpr float LEVELS[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
        1.0f};
};

inline Vec load_some(Nf4 from, long count) {
    Vec x{};
    for (long i = 0; i < count; i++) x[i] = from[i];
    return x;
}

inline Vec load(Nf4 from) {
    if (from.place % LANES) return load_some(from, LANES);  // across two blocks, or from the middle of a byte
    const uint8_t *codes = from.codes + from.place / 2;
    const float scale = from.scales[from.place / Nf4::BLOCK];
#if LANES == 16 && defined(__AVX512F__)
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)), low = _mm_set1_epi8(15);
    const __m128i one = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(two, 4), low), _mm_and_si128(two, low));
    const __m512i place = _mm512_maskz_cvtepu8_epi32(0xffff, one);
    return _mm512_maskz_permutexvar_ps(0xffff, place, _mm512_loadu_ps(Nf4::LEVELS)) * scale;
#elif LANES == 8 && defined(__AVX2__)
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i one = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), shifts), _mm256_set1_epi32(15));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(Nf4::LEVELS), one);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(Nf4::LEVELS + 8), one);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(one, 28))) * scale;
#else
    Vec x;
    for (long i = 0; i < LANES; i++) x[i] = Nf4::LEVELS[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
    return x * scale;
#endif
}

// Calls work with the numbers of `matrix` from its place on: a pointer, or what behaves like one.
template <class Work>
void with_numbers(const Matrix &matrix, const Work &work) {
    switch (matrix.type) {
        case Type::FLOAT32: return work(matrix.floats());
        case Type::FLOAT16: return work(static_cast<const Float16 *>(matrix.data) + matrix.place);
        case Type::BFLOAT16: return work(static_cast<const BFloat16 *>(matrix.data) + matrix.place);
        case Type::NF4: return work(Nf4{static_cast<const uint8_t *>(matrix.data), matrix.scales, matrix.place});
    }
}

}  // namespace lora_ms
