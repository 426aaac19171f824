// Matrices of the types in which weights lie in memory. Products read them by `load`, as vectors of float32.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lora_ms {

enum class Type { FLOAT32, FLOAT16, BFLOAT16, NF4, INT4 };

// Scales of NF4 that are bytes, quantised in blocks of 256: a table's number times the block's factor, plus an offset
// (QLoRA's double quantisation).
struct Nested {
    static constexpr long BLOCK = 256;
    const uint8_t *bytes = nullptr;
    const float *table = nullptr, *factors = nullptr;
    float offset = 0;

    void decode(long begin, long end, float *to) const {
        for (long i = begin; i < end; i++) to[i - begin] = table[bytes[i]] * factors[i / BLOCK];
        for (long i = begin; i < end; i++) to[i - begin] += offset;  // rounded in between, as where MindSpore computes it
    }
};

// Element (i, j) is number place + i * row + j * column of data.
struct Matrix {
    const void *data;
    long row, column;
    Type type = Type::FLOAT32;
    const void *scales = nullptr;    // of NF4 and INT4, of each group of neighbours,
    const uint8_t *zeros = nullptr;  // and, of INT4, its zero
    long group = 0;                  // numbers of a group
    Nested nested = {};              // of NF4, where its scales are not decoded
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
    static constexpr long block() { return BLOCK; }  // numbers with one scale
    Nf4 operator+(long n) const { return {codes, scales, place + n}; }
    float operator[](long n) const {
        const long i = place + n;
        const uint8_t two = codes[i / 2];
        return LEVELS[i % 2 ? two & 15 : two >> 4] * scales[i / BLOCK];
    }
    // quantiles of a normal distribution, as the format names them
    static constexpr float LEVELS[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
        1.0f};
};

// Numbers of four bits from `place` on: two in a byte, the first in its high half, each less its group's zero, times the
// group's scale (GPTQ, Frantar et al., 2023; AWQ, Lin et al., 2024).
struct Int4 {
    const uint8_t *codes;
    const Float16 *scales;
    const uint8_t *zeros;
    long group, place;
    long block() const { return group; }
    Int4 operator+(long n) const { return {codes, scales, zeros, group, place + n}; }
    float operator[](long n) const {
        const long i = place + n;
        const uint8_t two = codes[i / 2];
        const int code = i % 2 ? two & 15 : two >> 4;
        return static_cast<float>(code - zeros[i / group]) * scale(i / group);
    }
    float scale(long n) const { return load_some(scales + n, 1)[0]; }
};

// LANES codes, two in a byte, the first in its high half: in the lowest four bits, whatever is above them.
inline Ints codes_at(const uint8_t *codes) {
#if LANES == 16 && defined(__AVX512F__)
    int32_t four, next;
    std::memcpy(&four, codes, sizeof four);
    std::memcpy(&next, codes + 4, sizeof next);
    const __m512i all = _mm512_mask_set1_epi32(_mm512_set1_epi32(four), 0xff00, next);
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    return (Ints)_mm512_maskz_srlv_epi32(0xffff, all, shifts);
#elif LANES == 8 && defined(__AVX2__)
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    return (Ints)_mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
#else
    Ints all;
    for (long i = 0; i < LANES; i++) all[i] = i % 2 ? codes[i / 2] : codes[i / 2] >> 4;
    return all;
#endif
}

// The sixteen numbers that a code can mean in one block or group.
class Levels {
  public:
    Levels(Nf4 from, long place) {
        for (long i = 0; i < 16; i += LANES)
            levels_[i / LANES] = load(Nf4::LEVELS + i) * from.scales[place / Nf4::BLOCK];
    }
    Levels(Int4 from, long place) {
        static constexpr float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const long group = place / from.group;
        const float zero = from.zeros[group], scale = from.scale(group);
        for (long i = 0; i < 16; i += LANES) levels_[i / LANES] = (load(CODES + i) - zero) * scale;
    }
    Vec at(Ints codes) const {
#if LANES == 16 && defined(__AVX512F__)
        return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)codes, levels_[0]);
#elif LANES == 8 && defined(__AVX2__)
        const __m256 low = _mm256_permutevar8x32_ps(levels_[0], (__m256i)codes);
        const __m256 high = _mm256_permutevar8x32_ps(levels_[1], (__m256i)codes);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)codes, 28)));
#else
        Vec x;
        for (long i = 0; i < LANES; i++) x[i] = levels_[(codes[i] & 15) / LANES][(codes[i] & 15) % LANES];
        return x;
#endif
    }

  private:
    Vec levels_[16 / LANES];
};

template <class FourBits>
Vec load_one_by_one(FourBits from, long count) {
    Vec x{};
    for (long i = 0; i < count; i++) x[i] = from[i];
    return x;
}
inline Vec load_some(Nf4 from, long count) { return load_one_by_one(from, count); }
inline Vec load_some(Int4 from, long count) { return load_one_by_one(from, count); }

inline Vec load(Nf4 from) {
    if (from.place % LANES) return load_some(from, LANES);  // across two blocks, or from the middle of a byte
    return Levels(from, from.place).at(codes_at(from.codes + from.place / 2));
}

inline Vec load(Int4 from) {
    if (from.place % LANES || from.group % LANES) return load_some(from, LANES);
    const long group = from.place / from.group;
    const Ints codes = (codes_at(from.codes + from.place / 2) & 15) - static_cast<int32_t>(from.zeros[group]);
    return __builtin_convertvector(codes, Vec) * from.scale(group);
}

// Calls work with the numbers of `matrix` from its place on: a pointer, or what behaves like one.
template <class Work>
void with_numbers(const Matrix &matrix, const Work &work) {
    switch (matrix.type) {
        case Type::FLOAT32: return work(matrix.floats());
        case Type::FLOAT16: return work(static_cast<const Float16 *>(matrix.data) + matrix.place);
        case Type::BFLOAT16: return work(static_cast<const BFloat16 *>(matrix.data) + matrix.place);
        case Type::NF4:
            return work(Nf4{static_cast<const uint8_t *>(matrix.data), static_cast<const float *>(matrix.scales),
                            matrix.place});
        case Type::INT4:
            return work(Int4{static_cast<const uint8_t *>(matrix.data), static_cast<const Float16 *>(matrix.scales),
                             matrix.zeros, matrix.group, matrix.place});
    }
}

}  // namespace lora_ms
