// Eight floats at a time, or sixteen, and what is computed with them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define GALLEY_AVX2 1
#endif
#if defined(GALLEY_AVX2) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define GALLEY_AVX512 1
#endif

namespace galley {

typedef float Lanes __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

inline Lanes lanes(const float* from) {
    Lanes made;
    std::memcpy(&made, from, sizeof made);
    return made;
}
inline Lanes lanes(const uint16_t* from) {
#ifdef GALLEY_AVX2
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    Halves half;
    std::memcpy(&half, from, sizeof half);
    const Words words = __builtin_convertvector(half, Words) << 16;
    Lanes made;
    std::memcpy(&made, &words, sizeof made);
    return made;
#endif
}
// What is read once and multiplied several times: else compilers read it each time, which takes as long.
inline Lanes once(Lanes value) {
#ifdef GALLEY_AVX2
    asm("" : "+x"(value));
#endif
    return value;
}
inline void put(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }
inline Lanes maximum(Lanes one, Lanes other) {
#ifdef GALLEY_AVX2
    return _mm256_max_ps(one, other);
#else
    for (int i = 0; i < 8; ++i) one[i] = one[i] > other[i] ? one[i] : other[i];
    return one;
#endif
}
// one * other + more, rounded once where the processor can.
inline Lanes fused(Lanes one, Lanes other, Lanes more) {
#ifdef GALLEY_AVX2
    return _mm256_fmadd_ps(one, other, more);
#else
    return one * other + more;
#endif
}
inline Lanes all(float value) { return Lanes{value, value, value, value, value, value, value, value}; }

#ifdef GALLEY_AVX512
typedef float Wide __attribute__((vector_size(64)));

inline Wide sixteen(const float* from) { return _mm512_loadu_ps(from); }
inline Wide sixteen(const uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void put(float* to, Wide value) { _mm512_storeu_ps(to, value); }

// Eight of the one and eight of the other.
inline Wide lanes(const float* one, const float* other) {
    const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(_mm256_loadu_ps(one)));
    return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm256_loadu_ps(other)), 1));
}
inline Wide lanes(const uint16_t* one, const uint16_t* other) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(one)));
    const __m256i both = _mm256_inserti128_si256(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(other)), 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
}
inline Wide once(Wide value) {
    asm("" : "+v"(value));
    return value;
}
inline void put(float* one, float* other, Wide value) {
    _mm256_storeu_ps(one, _mm512_castps512_ps256(value));
    _mm256_storeu_ps(other, _mm512_extractf32x8_ps(value, 1));
}
inline Wide fused(Wide one, Wide other, Wide more) { return _mm512_fmadd_ps(one, other, more); }
#endif

// e to the power of x: 2 to a whole number times a polynomial of what is left (the coefficients of Cephes' expf).
inline Lanes exponential(Lanes x) {
#ifdef GALLEY_AVX2
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
    const __m256 whole = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 left = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), x);
    left = _mm256_fnmadd_ps(whole, _mm256_set1_ps(-2.12194440e-4f), left);
    __m256 made = _mm256_set1_ps(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        made = _mm256_fmadd_ps(made, left, _mm256_set1_ps(next));
    made = _mm256_fmadd_ps(made, _mm256_mul_ps(left, left), _mm256_add_ps(left, _mm256_set1_ps(1)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(made, _mm256_castsi256_ps(power));
#else
    for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
    return x;
#endif
}

}  // namespace galley
