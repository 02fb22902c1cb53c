// Building blocks of the kernels: products of small tiles in bfloat16, a transpose, 2^x.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mnemosyne {

using bf16 = uint16_t;
using element = bf16;  // of what attention.h takes

constexpr int GROUP = 6;  // rows of a product: 6 x 4 sums fill the registers

// Where the elements of two vectors go when these are interleaved: the lower half of the result.
alignas(64) const uint16_t INTERLEAVED[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                              37, 6, 38, 7, 39, 8,  40, 9,  41, 10, 42,
                                              11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

[[gnu::always_inline]] inline void prefetch_line(const bf16* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

inline __m512 exp2_of(__m512 x) {
  // 2^x = 2^n 2^f with f in [-1/2, 1/2]; relative error below 3e-7
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(0.00132669704f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.00967545975f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0555074262f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240221218f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693146949f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000007f));
  return _mm512_scalef_ps(y, n);
}

// D floats, a multiple of 32, times a factor, rounded.
template <int D>
[[gnu::always_inline]] inline void narrow_scaled(const float* from, float factor, bf16* to) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int d = 0; d < D; d += 32) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + d), scale);
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(from + d + 16), scale);
    _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
}

// Two neighbouring elements in every lane.
inline __m512bh pair_of(const bf16* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// C[R][16 NV] = alpha[R] C + A[R][2 num_pairs] B, B packed by pairs of rows.
template <int R, int NV, bool ADD>
inline void multiply(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c, int64_t ldc,
                     int num_pairs, const float* alpha) {
  __m512 acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++)
      acc[r][n] = ADD ? _mm512_mul_ps(_mm512_load_ps(c + r * ldc + 16 * n), _mm512_set1_ps(alpha[r]))
                      : _mm512_setzero_ps();
  for (int p = 0; p < num_pairs; p++) {
    __m512i col[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) col[n] = _mm512_load_si512(b + p * ldb + 32 * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh row = pair_of(a + r * lda + 2 * p);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], row, (__m512bh)col[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) _mm512_store_ps(c + r * ldc + 16 * n, acc[r][n]);
}

// 16 x 16 transpose of 32-bit words.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Columns of 16 rows of 32 elements, pairs of neighbours kept together.
template <typename Row>
inline void load_words(Row row, __m512i r[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(row(i));
  transpose(r);
}

// The same to memory: 16 vectors, step apart.
template <typename Row>
inline void pack_words(Row row, bf16* to, int64_t step) {
  __m512i r[16];
  load_words(row, r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * step, r[i]);
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
