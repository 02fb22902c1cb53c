// A thin layer over the vectors of a processor: LANES floats, read from and rounded to an element.
// Compile-time constants: ELEMENT (16: float16, 17: bfloat16, 32: float32) and, by the compiler's
// flags, the instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace mnemosyne {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, REGISTERS = 32;
#else
#error "AVX2, AVX-512 or NEON"
#endif

using half_bits = uint16_t;
#if ELEMENT == 32
using element = float;
#else
using element = half_bits;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

constexpr int GROUP = 6;                        // rows of a product
constexpr int SPAN = REGISTERS == 16 ? 2 : 4;   // vectors of a product: GROUP x SPAN sums fit

inline vec all(float x) { return vec{} + x; }

inline vec load(const float* at) {
  vec x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }

[[gnu::always_inline]] inline void prefetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

// Operations that instruction sets spell differently: a * b + c rounded once; the larger one, b where
// either is nan; the sum and the largest of all lanes; elements in and out, rounded to even.

#if defined(__AVX512F__)

inline vec fma(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
inline float sum_of(vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest_of(vec x) { return _mm512_reduce_max_ps((__m512)x); }

#elif defined(__AVX2__)

inline vec fma(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }

template <typename Join>
inline float join_lanes(vec x, Join join) {
  __m128 y = join(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = join(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(join(y, _mm_shuffle_ps(y, y, 1)));
}

inline float sum_of(vec x) {
  return join_lanes(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float largest_of(vec x) {
  return join_lanes(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

#else

inline vec fma(vec a, vec b, vec c) {
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }  // vmaxq_f32 gives nan for either
inline vec smaller(vec a, vec b) { return a < b ? a : b; }
inline float sum_of(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest_of(vec x) { return vmaxvq_f32((float32x4_t)x); }

#endif

#if ELEMENT == 32

inline vec widen(const float* at) { return load(at); }
inline void narrow(float* to, vec x) { store(to, x); }

#elif ELEMENT == 16

#if defined(__AVX512F__)
inline vec widen(const half_bits* at) {
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
}
inline void narrow(half_bits* to, vec x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline vec widen(const half_bits* at) {
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at));
}
inline void narrow(half_bits* to, vec x) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vec widen(const half_bits* at) { return (vec)vcvt_f32_f16(vld1_f16((const float16_t*)at)); }
inline void narrow(half_bits* to, vec x) {
  vst1_f16((float16_t*)to, vcvt_f16_f32((float32x4_t)x));
}
#endif

#else  // bfloat16: the upper half of a float

typedef uint32_t words __attribute__((vector_size(4 * LANES)));

inline words rounded(vec x) {
  const words bits = (words)x;
  const words even = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (x == x ? even : bits | 0x400000u) >> 16;  // a nan stays one
}

#if defined(__AVX512F__)
inline vec widen(const half_bits* at) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
  return (vec)_mm512_slli_epi32(x, 16);
}
inline void narrow(half_bits* to, vec x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)rounded(x)));
#endif
}
#elif defined(__AVX2__)
inline vec widen(const half_bits* at) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
  return (vec)_mm256_slli_epi32(x, 16);
}
inline void narrow(half_bits* to, vec x) {
  const __m256i y = (__m256i)rounded(x);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(y),
                                                  _mm256_extracti128_si256(y, 1)));
}
#else
inline vec widen(const half_bits* at) { return (vec)vshll_n_u16(vld1_u16(at), 16); }
inline void narrow(half_bits* to, vec x) { vst1_u16(to, vmovn_u32((uint32x4_t)rounded(x))); }
#endif

#endif

// The first count < LANES lanes.
inline void narrow_some(element* to, vec x, int count) {
  element y[LANES];
  narrow(y, x);
  std::memcpy(to, y, count * sizeof(element));
}

inline vec widen_some(const element* at, int count) {
  element x[LANES] = {};
  std::memcpy(x, at, count * sizeof(element));
  return widen(x);
}

// D floats, a multiple of LANES, times a factor, rounded.
template <int D>
[[gnu::always_inline]] inline void narrow_scaled(const float* from, float factor, element* to) {
  for (int d = 0; d < D; d += LANES) narrow(to + d, load(from + d) * all(factor));
}

// 2^x, relative error below 3e-7; 0 below 2^-126, inf from 2^128 on, nan for nan.
inline vec exp2_of(vec x) {
  // 2^x = 2^n 2^f with f in [-1/2, 1/2]; the sum with 1.5 2^23 has no place for a fraction
  const vec bounded = smaller(all(128.0f), larger(all(-127.0f), x));
  const vec shifted = bounded + all(12582912.0f);
  const vec f = bounded - (shifted - all(12582912.0f));
  vec y = all(0.00132669704f);
  y = fma(y, f, all(0.00967545975f));
  y = fma(y, f, all(0.0555074262f));
  y = fma(y, f, all(0.240221218f));
  y = fma(y, f, all(0.693146949f));
  y = fma(y, f, all(1.00000007f));
  const ints power = ((ints)shifted - 0x4b400000 + 127) << 23;
  return y * (vec)power;
}

inline vec silu(vec x) { return x / (all(1.0f) + exp2_of(x * all(-1.44269504088896340736f))); }

// LANES x LANES transpose.
inline void transpose(vec r[LANES]);

#if defined(__AVX512F__)

inline void transpose(vec rows[16]) {
  __m512 *r = (__m512*)rows, t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

#elif defined(__AVX2__)

inline void transpose(vec rows[8]) {
  __m256 *r = (__m256*)rows, t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

#else

inline void transpose(vec r[4]) {
  const float32x4x2_t a = vzipq_f32((float32x4_t)r[0], (float32x4_t)r[2]);
  const float32x4x2_t b = vzipq_f32((float32x4_t)r[1], (float32x4_t)r[3]);
  const float32x4x2_t low = vzipq_f32(a.val[0], b.val[0]), high = vzipq_f32(a.val[1], b.val[1]);
  r[0] = (vec)low.val[0], r[1] = (vec)low.val[1];
  r[2] = (vec)high.val[0], r[3] = (vec)high.val[1];
}

#endif

// The sums of the lanes of four vectors, each as sum_of would give it.
inline void sum_each(const vec x[4], float to[4]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m128 y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    y[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)x[i]), _mm256_extractf128_ps((__m256)x[i], 1));
  _MM_TRANSPOSE4_PS(y[0], y[1], y[2], y[3]);
  _mm_storeu_ps(to, _mm_add_ps(_mm_add_ps(y[0], y[2]), _mm_add_ps(y[1], y[3])));
#else
  for (int i = 0; i < 4; i++) to[i] = sum_of(x[i]);
#endif
}

// Call body with the number of rows, 1 to GROUP, as a compile-time constant.
template <typename Body>
inline void for_rows(int rows, Body body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    default: return body(std::integral_constant<int, 6>());
  }
}

}  // namespace mnemosyne
